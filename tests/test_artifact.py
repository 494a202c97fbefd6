"""model.export(folder): programs that JAX alone runs, equal to `embed`, and the model card."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import run
import vatt_jax
from tests import typecheck
from vatt_jax.config import ConfigError

# Of tests/tiny.py.
FRAMES, SIZE, SAMPLES = 4, 16, 1024
# Reads inputs.npz and writes outputs.npz with the exported folder alone: this package cannot be
# imported, nor can Flax.
ALONE = """
import sys
for name in ('vatt_jax', 'data_pipelines', 'flax', 'ml_collections'):
    sys.modules[name] = None
import numpy as np
from load import Artifact
model = Artifact(sys.argv[1])
with np.load(sys.argv[2]) as file:
    given = {name: file[name] for name in file.files}
given['text'] = [str(x) for x in given['text']]
arrays = {}
for tower, features in model.embed(**given).items():
    for name, x in features.items():
        arrays[f'{tower}/{name}'] = x
np.savez(sys.argv[3], **arrays)
try:
    model.embed(video=given['video'][:, :2])
except ValueError as error:
    print(error)
"""


def run_alone(folder, inputs, tmp_path):
    """({tower/name: array}, what was printed) of an exported folder in a process of its own."""
    np.savez(tmp_path / 'inputs.npz', **inputs)
    environment = {name: x for name, x in os.environ.items() if not name.startswith('XLA_')}
    done = subprocess.run(
        [sys.executable, '-c', ALONE, folder, tmp_path / 'inputs.npz', tmp_path / 'outputs.npz'],
        cwd=folder,
        env={**environment, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(folder)},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'outputs.npz') as file:
        return {name: file[name] for name in file.files}, done.stdout


@pytest.fixture(scope='module')
def model(plain_run):
    return vatt_jax.load(plain_run)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('export') / 'tiny'
    # While a program for any batch size is traced, its length is a symbol where `int` is annotated.
    with typecheck.off():
        files = model.export(folder, licence='cc-by-4.0')
    assert files == sorted(path.name for path in folder.iterdir())
    return folder


def test_without_this_package_it_equals_embed(model, folder, tmp_path):
    rng = np.random.default_rng(0)
    for side, count in ((SIZE, 3), (2 * SIZE, 1)):
        inputs = {
            'video': rng.integers(0, 256, (count, FRAMES, side, side, 3), dtype=np.uint8),
            'audio': rng.integers(-9000, 9000, (count, SAMPLES), dtype=np.int16),
            'text': np.array(["It's red, and moves left!", 'never heard', ''][:count]),
        }
        arrays, printed = run_alone(folder, inputs, tmp_path)
        expected = model.embed(**{**inputs, 'text': inputs['text'].tolist()})
        names = {f'{tower}/{name}' for tower, out in expected.items() for name in out}
        assert set(arrays) == names
        for tower, features in expected.items():
            for name, x in features.items():
                np.testing.assert_allclose(arrays[f'{tower}/{name}'], x, atol=2e-5, err_msg=name)
        assert f"video: expected uint8 ['B', {FRAMES}, 'S', 'S', 3]" in printed


def test_the_manifest_says_what_goes_in_and_out(folder):
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert set(manifest['towers']) == {'video', 'audio', 'text'}
    assert manifest['towers']['audio']['input'] == {
        'shape': ['B', SAMPLES],
        'dtype': 'int16',
        'meaning': 'mono samples at 2000 Hz',
        'rate': 2000,
    }
    assert manifest['towers']['text']['outputs'] == {'pooled': 32, 'vat': 8}
    # No tower carries another one's weights.
    with np.load(folder / 'text.npz') as file:
        assert not any('video' in name for name in file.files if 'head' not in name)


def test_the_model_card(folder, tiny_run):
    card = (folder / 'README.md').read_text()
    assert card.startswith('---\nlicense: "cc-by-4.0"\n')
    assert '2 steps of 16 clips' in card
    assert 'No evaluation lies beside these weights' in card


def test_the_model_card_of_an_evaluated_run(tiny_run):
    from vatt_jax.exchange import model_card

    path, _, _ = tiny_run
    model = vatt_jax.load(path / 'checkpoints' / '2')
    run_folder = model_card.run_folder_of(model.path)
    assert run_folder == path
    card = model_card.text(model.config, model.variables, model.info, run_folder)
    assert '# tiny \\<run\\>' in card
    assert '| retrieval text → video R@10 | ' in card
    assert 'license: "other"' in card
    assert 'Not stated' in card


def test_nothing_is_overwritten(model, folder, tmp_path):
    def contents():
        # Another test's program may have left byte code in a folder beside.
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = contents()
    with pytest.raises(ConfigError, match='new or empty'):
        model.export(folder)
    assert contents() == before
    blocked = tmp_path / 'file'
    blocked.write_text('mine')
    with pytest.raises(ConfigError, match='can be written'):
        model.export(blocked / 'below')
    assert blocked.read_text() == 'mine'


def test_the_command_line_names_its_folder(plain_run):
    with pytest.raises(ConfigError, match='name it with --out'):
        run.main(['--mode=export', f'--workdir={plain_run}'])
    assert pathlib.Path(plain_run).exists()
