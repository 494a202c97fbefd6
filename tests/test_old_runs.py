"""A run folder written before the packages were regrouped still loads, evaluates and trains on.

tests/data/run_of_version_0_1.tar.gz is the run of tests/configs/tiny.py:plain after two steps, made
by the code at commit 3add503. The expected numbers are what that code printed on one device.
"""

import json
import pathlib
import shutil
import tarfile

import chex
import jax
import numpy as np
import pytest

import vatt_jax
from tests import runs

ARCHIVE = pathlib.Path(__file__).parent / 'data' / 'run_of_version_0_1.tar.gz'


@pytest.fixture(scope='module')
def old_run(tmp_path_factory) -> pathlib.Path:
    """For reading: whoever writes copies it."""
    folder = tmp_path_factory.mktemp('old') / 'run'
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    return folder


def test_embeddings_are_those_of_the_code_that_wrote_it(old_run):
    model = vatt_jax.load(old_run)
    embedded = model.embed(
        text='red stripes move',
        audio=(np.arange(1024) * 37 % 2001 - 1000).astype(np.int16),
        video=(np.arange(4 * 16 * 16 * 3) % 251).astype(np.uint8).reshape(4, 16, 16, 3),
    )
    chex.assert_tree_all_finite(embedded)
    chex.assert_shape([embedded['video']['va'], embedded['audio']['va']], (16,))
    chex.assert_shape([embedded['video']['vat'], embedded['text']['vat']], (8,))
    found = {
        'text': embedded['text']['vat'][:4],
        'audio': embedded['audio']['va'][:4],
        'video': embedded['video']['va'][:4],
    }
    expected = {
        'text': np.array([-0.23655818, -0.42302251, -0.30128586, -0.28278968]),
        'audio': np.array([-0.14217378, 0.00455031, -0.37724045, -0.14240506]),
        'video': np.array([0.40061909, -0.50266433, 0.37235996, -0.08890561]),
    }
    chex.assert_trees_all_close(jax.tree.map(np.float64, found), expected, atol=1e-4)


def test_the_same_command_continues_it(old_run, tmp_path):
    folder, log = tmp_path / 'run', tmp_path / 'log'
    shutil.copytree(old_run, folder)
    process = runs.start(f'--workdir={folder}', '--quiet', '--config.steps=4', log=log)
    assert runs.finish(process, log) == 0, log.read_text()
    assert 'continuing from step 2' in log.read_text()
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    losses = {line['step']: line['loss'] for line in lines if 'loss' in line}
    np.testing.assert_allclose([losses[3], losses[4]], [5.57394648, 8.64561653], rtol=1e-3)
    # The order of examples does not depend on the machine: its digest is exact.
    assert [line['order'] for line in lines if line['step'] == 4] == ['ef262174da321f66']
