"""Refreshes whose records are divided over processes: the labels of one process."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import divided_refreshes, runs, tiny_refreshes
from vatt_jax.objectives import self_labelling

# Two minutes: two processes compile what one process compiles, and it does.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def start(folder: pathlib.Path, process: int, processes: int, coordinator: str) -> subprocess.Popen:
    """One process of tests/divided_refreshes.py with its share of eight devices."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('XLA_', 'VATT_', 'SLURM_'))
    }
    environment |= {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(8 // processes),
        'VATT_COORDINATOR': coordinator,
        'VATT_PROCESSES': str(processes),
        'VATT_PROCESS': str(process),
    }
    return subprocess.Popen(
        [sys.executable, '-m', 'tests.divided_refreshes', str(folder)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What each of two processes found, and what one process finds of all records."""
    folder = tmp_path_factory.mktemp('divided')
    coordinator = f'127.0.0.1:{runs.free_port()}'
    started = [start(folder, process, 2, coordinator) for process in range(2)]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self_labelling, 'PAIRED', tiny_refreshes.NUM_PAIRED)
            expected = tiny_refreshes.run(slice(0, tiny_refreshes.NUM_RECORDS))
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], outputs
    return [dict(np.load(folder / f'{process}.npz')) for process in range(2)], expected


def test_labels_of_two_processes_are_those_of_one(found):
    """Whole columns on both, of records that are not read, lack a view, or lie in the other."""
    both, expected = found
    for name, column in expected.items():
        if not name.startswith('column/'):
            continue
        assert column.dtype == both[0][name].dtype
        for one in both:
            np.testing.assert_array_equal(one[name], column, name)
    labels = expected['column/label/second']
    assert set(np.unique(labels)) == {-1, 0, 1, 2, 3, 4}
    assert (expected['column/cluster.audio/kmeans'] == -1).sum() > 200


def test_metrics_of_two_processes_are_those_of_one(found):
    both, expected = found
    names = [name for name in expected if name.startswith('metric/')]
    assert 'metric/NMI_to_last/second' in names
    assert 0 < expected['metric/changed/second'] < 1
    for name in names:
        # Rows are added in another order, in float32; a search may take another pass for it.
        rtol = 0.2 if 'passes' in name else 1e-5
        # A sum over 600 rows of what is 0 at the solution.
        atol = 1e-4 if 'published_error' in name else 2e-6
        for one in both:
            np.testing.assert_allclose(one[name], expected[name], rtol, atol, err_msg=name)


def test_each_process_gets_its_stretch_of_rows_that_lie_anywhere(found):
    parts = [process['own stretch'] for process in found[0]]
    assert [len(part) for part in parts] == [300, 301]
    np.testing.assert_array_equal(np.concatenate(parts), divided_refreshes.rows_of_array()[:601])


def test_both_name_the_row_that_is_wrong_in_one(found):
    both, expected = found
    message = str(expected['message'])
    assert 'view 1, row 599;' in message
    assert [str(one['message']) for one in both] == [message, message]
