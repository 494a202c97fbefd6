"""Runs beside a frozen model (config.base): what moves, what is saved, what is joined again."""

import json
import shutil

import jax
import numpy as np
import pytest

import data_pipelines
import vatt_jax
from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map, safetensors_folder
from vatt_jax.models import adapters
from vatt_jax.training import (
    checkpoint,
    frozen_base,
    loop,
    session,
    starting_values,
)

CLIP = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)


def base_config():
    """Two towers, of which the runs below read one; with dropout, DropToken and batch norm."""
    c = tiny.config(steps=4)
    del c.model.towers['text']
    c.model.head = {'name': 'fac', 'va': 16}
    return c


def write_base(folder, seed):
    """A run folder whose model is noise."""
    c = base_config()
    state = parameter_map.abstract_state(c, {}, with_objective=False)
    noise = np.random.default_rng(seed)
    arrays = {}
    for path, leaf in parameter_map.variables(state).items():
        x = 0.2 * noise.normal(size=leaf.shape)
        # A negative zero would not survive the addition of an update of zero.
        x.flat[0] = -0.0
        if path[-1] in ('scale', 'var'):
            x = 1 + np.abs(x)
        arrays[path] = x.astype(leaf.dtype)
    parameter_map.write_run(folder, c, state, arrays, {})
    return folder


def adapted_config(base, **adapter):
    c = base_config()
    c.base = str(base)
    c.model.adapter = adapter
    c.objective = {'name': 'classification', 'stream': 'video', 'label': 'class', 'dropout': 0.0}
    c.optimizer.weight_decay = 0.1
    c.optimizer.schedule.warmup = 0
    return c


def train(config, folder):
    loop.train(config, data_pipelines.open(config), folder, quiet=True)
    return json.loads((folder / 'done.json').read_text())


def restored(config, folder, step=4):
    """The state of a step, on the device."""
    built = loop.build(config, data_pipelines.open(config))
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.checkpoint)
    with jax.set_mesh(built.mesh):
        state, _, _ = frozen_base.restore(checkpoints, step, built, config)
    checkpoints.close()
    return state, built


def by_path(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(found, expected):
    found, expected = by_path(found), by_path(expected)
    assert found.keys() <= expected.keys()
    for path, x in found.items():
        assert np.asarray(x).tobytes() == np.asarray(expected[path]).tobytes(), path


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp('base') / 'run', seed=1)


@pytest.fixture(scope='module')
def frozen_after_training():
    """What the loop held of the frozen model at the last save of `adapted`."""
    return {}


@pytest.fixture(scope='module')
def adapted(base, tmp_path_factory, frozen_after_training):
    """A run of four steps with LoRA: its config, its folder and what it said at the end."""
    config = adapted_config(base, name='lora', rank=2)
    folder = tmp_path_factory.mktemp('adapted') / 'run'
    save = session.Session.save

    def keeping(self, run):
        frozen_after_training.update(jax.device_get(run.state.frozen))
        save(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, 'save', keeping)
        done = train(config, folder)
    return config, folder, done


def test_what_is_frozen_stays_to_the_bit_and_what_is_new_moves(base, adapted):
    config, folder, _ = adapted
    state, built = restored(config, folder)
    values = checkpoint.read_model(checkpoint.find(base))
    assert_same_bits(state.frozen['params'], values['params'])
    with jax.set_mesh(built.mesh):
        first = built.init()
    moved, initial = by_path(state.params), by_path(first.params)
    assert moved.keys() == initial.keys()
    for path, x in moved.items():
        assert (np.asarray(x) != np.asarray(initial[path])).any(), path
        assert 'adapters_video' in path or 'objective' in path


def test_the_steps_leave_the_frozen_model_as_it_was(base, adapted, frozen_after_training):
    """As the loop holds it, not as it is read again; negative zeros too."""
    values = checkpoint.read_model(checkpoint.find(base))
    assert_same_bits(frozen_after_training['params'], values['params'])
    zeros = [x for x in jax.tree.leaves(frozen_after_training) if np.signbit(x.flat[0])]
    assert any(x.flat[0] == 0 for x in zeros)


def test_optimizer_and_checkpoint_hold_what_is_new_alone(adapted):
    config, folder, _ = adapted
    state, _ = restored(config, folder)
    num_new = sum(x.size for x in jax.tree.leaves(state.params))
    # Rank 2 of queries and values of 2 layers of width 32; 16 classes.
    assert num_new == 2 * 2 * (32 * 2 + 2 * 32) + 16 * 32 + 16
    slots = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(slots) == 2 * num_new
    saved = checkpoint.saved_shapes(checkpoint.find(folder))
    of_model = {path for path in saved if path.startswith('params/model/')}
    names = [f'{name}_{part}' for name in ('query', 'value') for part in ('down', 'up')]
    assert of_model == {f'params/model/adapters_video/{name}' for name in names}
    assert not any(path.startswith(('frozen', 'batch_stats')) for path in saved)


def test_a_checkpoint_names_the_frozen_model(base, adapted):
    _, folder, _ = adapted
    identity = checkpoint.read_meta(checkpoint.find(folder))['base']
    values = checkpoint.read_model(checkpoint.find(base))
    assert identity == {
        'run': str(base),
        'name': 'tiny',
        'step': 0,
        'digest': checkpoint.digest(values),
    }


def test_resumed_is_uninterrupted(adapted, tmp_path):
    config, folder, done = adapted
    shutil.copytree(folder, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
    (tmp_path / 'run' / 'done.json').unlink()
    again = train(config, tmp_path / 'run')
    assert again['digests'] == done['digests']
    assert again['order'] == done['order']


def test_loaded_it_is_the_frozen_model_and_the_new_part(base, adapted):
    config, folder, _ = adapted
    whole = checkpoint.read_model(checkpoint.find(folder), objective=True)
    new, rest = adapters.split(whole['params'])
    values = checkpoint.read_model(checkpoint.find(base))
    # Also of the tower that the run did not read.
    assert_same_bits(values, {**whole, 'params': rest})
    state, _ = restored(config, folder)
    assert_same_bits(new, state.params['model'])

    model = vatt_jax.load(folder)
    found = model.embed(video=CLIP)['video']
    before = vatt_jax.load(base).embed(video=CLIP)['video']
    assert np.abs(found['pooled'] - before['pooled']).max() > 1e-4
    assert model.classify(video=CLIP)['scores'].shape == (16,)
    assert set(model.modalities) == {'video', 'audio'}
    assert set(state.variables()['params']) >= {'adapters_video', 'encoders_video'}


def test_other_runs_start_from_the_whole(adapted):
    _, folder, _ = adapted
    other = starting_values.read(str(folder))
    c = base_config()
    c.model.adapter = {'name': 'lora', 'rank': 2, 'modalities': ('video',)}
    state = parameter_map.abstract_state(c, {}, with_objective=False)
    other.check('params', state.params['model'])
    other.check('batch_stats', state.batch_stats)


def test_exported_it_stands_alone(adapted, tmp_path):
    _, folder, _ = adapted
    safetensors_folder.export_checkpoint(folder, tmp_path / 'model')
    alone = vatt_jax.load(tmp_path / 'model')
    assert alone.config.base == ''
    found = alone.embed(video=CLIP)['video']['pooled']
    np.testing.assert_array_equal(found, vatt_jax.load(folder).embed(video=CLIP)['video']['pooled'])


def test_another_model_in_the_place_of_the_frozen_one_is_an_error(adapted, tmp_path):
    config, folder, _ = adapted
    other = write_base(tmp_path / 'other', seed=2)
    message = r"other.* holds the model 'tiny' of step 0 \(digest .*trained beside the model"
    with pytest.raises(ConfigError, match=message):
        vatt_jax.load(folder, base=other)
    shutil.copytree(folder, tmp_path / 'run')
    moved = config.copy_and_resolve_references()
    moved.base = str(other)
    moved.steps = 6
    with pytest.raises(ConfigError, match=message):
        train(moved, tmp_path / 'run')


def test_a_frozen_model_may_move(base, adapted, tmp_path):
    config, folder, _ = adapted
    run = shutil.copytree(folder, tmp_path / 'run')
    identity = {**checkpoint.read_meta(checkpoint.find(folder))['base'], 'run': 'nowhere'}
    with pytest.raises(ConfigError, match='nowhere holds no checkpoint.*base=FOLDER'):
        checkpoint.read_base(run, identity)
    assert_same_bits(
        checkpoint.read_base(run, identity, base), checkpoint.read_model(checkpoint.find(base))
    )


@pytest.mark.parametrize(
    'field, value, message',
    [
        ('base', 'nowhere', 'config.base: nowhere holds no checkpoint'),
        ('model.towers.video.heads', 4, 'config.model.towers.video.heads: expected 2, as the'),
        ('init_words', 'words.bin', 'config.init_words=words.bin: expected no word vectors'),
    ],
)
def test_a_config_that_contradicts_the_frozen_model_is_refused(base, field, value, message):
    config = adapted_config(base)
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as error:
        frozen_base.check_fields(config)
        frozen_base.check(config)
    assert message in str(error.value)


def test_a_run_with_and_one_without_a_frozen_model_do_not_continue_one_another(adapted, tmp_path):
    config, folder, _ = adapted
    run = shutil.copytree(folder, tmp_path / 'run')
    whole = config.copy_and_resolve_references()
    whole.base, whole.steps = '', 6
    with pytest.raises(ConfigError, match='trained beside the model of .*expected config.base='):
        train(whole, run)


def test_an_adapted_model_is_no_base(adapted):
    _, folder, _ = adapted
    config = adapted_config(folder, name='lora', rank=2)
    with pytest.raises(ConfigError, match="without adapters, got one with 'lora'"):
        frozen_base.check(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'mesh.replica': 2, 'mesh.fsdp': 2, 'mesh.model': 2},
        {'accumulate': 2, 'accumulation': 'exact'},
    ],
)
def test_on_a_mesh_and_in_microbatches_it_is_the_same(base, adapted, tmp_path, changes):
    config, folder, _ = adapted

    def losses(run):
        lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
        return [line['loss'] for line in lines if 'loss' in line]

    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    train(changed, tmp_path / 'run')
    np.testing.assert_allclose(losses(tmp_path / 'run'), losses(folder), rtol=2e-4)
    state, _ = restored(changed, tmp_path / 'run')
    assert_same_bits(state.frozen['params'], checkpoint.read_model(checkpoint.find(base))['params'])
