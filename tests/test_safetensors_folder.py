"""Models as safetensors: what the library reads is what the run holds, and the way back."""

import json
import shutil
import struct

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

import vatt_jax
from vatt_jax.config import ConfigError, from_json
from vatt_jax.importers import parameter_map, safetensors_folder
from vatt_jax.importers.__main__ import main
from vatt_jax.training import checkpoint


@pytest.fixture(scope='module')
def exported(tiny_run, tmp_path_factory):
    """(run, folder) of a model written by the command."""
    run, _, _ = tiny_run
    folder = tmp_path_factory.mktemp('exchange') / 'new' / 'model'
    main(['--format=safetensors', f'--export={run}', f'--out={folder}'])
    return run, folder


def arrays_of(run):
    """{path joined by /: array} of a run."""
    _, _, ours = parameter_map.read_run(run)
    return {'/'.join(path): np.asarray(value) for path, value in ours.items()}


def test_the_library_reads_what_the_run_holds(exported):
    run, folder = exported
    found = safetensors.numpy.load_file(folder / 'model.safetensors')
    expected = arrays_of(run)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)
    with safetensors.safe_open(folder / 'model.safetensors', framework='numpy') as file:
        assert file.metadata() == {'format': 'vatt_jax 1'}


def test_the_file_is_the_published_format(exported):
    """Length of the header in 8 bytes, the header in JSON, then the numbers as they lie."""
    run, folder = exported
    content = (folder / 'model.safetensors').read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, array in arrays_of(run).items():
        begin, end = header[name]['data_offsets']
        numbers = content[8 + length + begin : 8 + length + end]
        assert header[name]['dtype'] == {'float32': 'F32', 'int32': 'I32'}[array.dtype.name]
        np.testing.assert_array_equal(
            np.frombuffer(numbers, array.dtype).reshape(header[name]['shape']), array
        )


def test_the_folder_is_loaded_as_the_run_is(exported):
    run, folder = exported
    from_run, from_folder = vatt_jax.load(run), vatt_jax.load(folder)
    assert from_folder.config == from_run.config
    assert from_folder.info == from_run.info
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, from_folder.variables),
        jax.tree.map(np.asarray, from_run.variables),
    )
    text = ['red circle', 'a word']
    chex.assert_trees_all_equal(from_folder.embed(text=text), from_run.embed(text=text))


def test_it_becomes_a_run_again(exported, tmp_path, capsys):
    run, folder = exported
    main(['--format=safetensors', f'--checkpoint={folder}', f'--out={tmp_path / "run"}'])
    assert 'not used: none' in capsys.readouterr().out
    chex.assert_trees_all_equal(arrays_of(tmp_path / 'run'), arrays_of(run))
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / 'run'))
    assert meta['info'] == checkpoint.read_meta(checkpoint.find(run))['info']
    stored = from_json((folder / 'config.json').read_text())
    assert from_json((tmp_path / 'run' / 'config.json').read_text()) == stored


def test_nothing_is_replaced_unless_asked(exported, tmp_path):
    run, folder = exported
    shutil.copytree(folder, tmp_path / 'model')
    flags = ['--format=safetensors', f'--export={run}', f'--out={tmp_path / "model"}']
    with pytest.raises(ConfigError, match='model.safetensors exists .*--overwrite'):
        main(flags)
    with pytest.raises(ConfigError, match='is the folder of a run'):
        main(['--format=safetensors', f'--export={run}', f'--out={run}', '--overwrite'])
    (tmp_path / 'model' / 'model.safetensors').write_bytes(b'')
    main([*flags, '--overwrite'])
    content = (folder / 'model.safetensors').read_bytes()
    assert (tmp_path / 'model' / 'model.safetensors').read_bytes() == content


# ---- what is not whole, or no such folder
def remove_the_config(folder):
    (folder / 'config.json').unlink()


def break_the_config(folder):
    (folder / 'config.json').write_text('{"model": ')


def replace_the_config(folder):
    (folder / 'config.json').write_text('{"model_type": "bert"}')


def replace_the_config_by_a_list(folder):
    (folder / 'config.json').write_text('[1, 2]')


def nest_the_info(folder):
    (folder / 'info.json').write_text('[' * 100_000)


def empty_the_info(folder):
    (folder / 'info.json').write_text('{}')


def cut(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_the_header(folder):
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', 1 << 62) + b'{}')


def change_an_array(folder, change):
    path = folder / 'model.safetensors'
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)


KERNEL = 'params/head/audio_va/kernel'


def remove_an_array(folder):
    change_an_array(folder, lambda arrays: arrays.pop(KERNEL))


def widen_an_array(folder):
    change_an_array(folder, lambda arrays: arrays.update({KERNEL: np.ones((3, 4, 5), np.float32)}))


def make_an_array_complex(folder):
    def change(arrays):
        arrays[KERNEL] = arrays[KERNEL].astype(np.complex64)

    change_an_array(folder, change)


def rename_all_arrays(folder):
    def change(arrays):
        for name in list(arrays):
            arrays[f'model.{name}\x1b[2J'] = arrays.pop(name)

    change_an_array(folder, change)


@pytest.mark.parametrize(
    'damage, message',
    [
        (remove_the_config, 'config.json and info.json belong to model.safetensors'),
        (break_the_config, 'config.json and info.json belong to model.safetensors'),
        (replace_the_config, 'config.json: expected the config of a run, it lacks'),
        (replace_the_config_by_a_list, 'config.json and info.json belong to model.safetensors'),
        (nest_the_info, 'config.json and info.json belong to model.safetensors'),
        (empty_the_info, 'info.json: expected a group with labels, got {}'),
        (cut, 'model.safetensors cannot be read .*; fetch or export it again'),
        (lie_about_the_header, 'model.safetensors cannot be read'),
        (remove_an_array, r'lacks 1 of the .*params/head/audio_va/kernel'),
        (widen_an_array, r'kernel has shape \[3, 4, 5\], this config expects'),
        (make_an_array_complex, 'kernel.*(expected real numbers, got complex64|cannot be read)'),
        (rename_all_arrays, 'expected arrays of params, batch_stats, objective, got'),
    ],
)
def test_what_does_not_fit_is_one_message(exported, tmp_path, damage, message):
    shutil.copytree(exported[1], tmp_path / 'model')
    damage(tmp_path / 'model')
    with pytest.raises(ConfigError, match=message) as error:
        vatt_jax.load(tmp_path / 'model')
    assert '\x1b' not in str(error.value)
    with pytest.raises(ConfigError, match=message):
        safetensors_folder.import_checkpoint(tmp_path / 'model', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ConfigError, match='holds no model.safetensors; expected a folder'):
        safetensors_folder.import_checkpoint(tmp_path, tmp_path / 'run')
    with pytest.raises(ConfigError, match='--classes'):
        main(['--format=safetensors', '--checkpoint=a', '--out=b', '--classes=c'])
