"""Processes that decode: the batches of threads bit for bit, their problems, and how they end."""

import json
import multiprocessing
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from batches import assert_equal, stack

import data_pipelines
from data_pipelines.errors import DataError
from data_pipelines.loading import worker_batches
from data_pipelines.loading.data_source import PassRows, TrainingRows
from data_pipelines.loading.order import Order, Source
from data_pipelines.loading.worker_batches import BatchMaker, WorkerBatches, useful_workers
from vatt_jax import config as configs
from vatt_jax import extras

BATCH = 4
CONSUMED = 26  # in the middle of an epoch of 13


@pytest.fixture
def data(config):
    """The prepared clocks, with views that decode frames twice and turn arrays round."""
    config.data.views = (('video.back', {'kind': 'reverse'}), ('audio.back', {'kind': 'reverse'}))
    opened = data_pipelines.open(config)
    yield opened
    opened.close()


def with_workers(config, workers):
    """The data of the same config, read by so many processes."""
    config = config.copy_and_resolve_references()
    config.data.workers = workers
    return data_pipelines.open(config)


def take(batches, count):
    """Their next batches in one; then they are closed."""
    taken = stack(batches, count)
    batches.close()
    return taken


# ---- In this process.


def test_which_passes_are_worth_processes(monkeypatch):
    monkeypatch.setattr(worker_batches, 'MIN_BATCHES_OF_WORKER', 10)
    assert useful_workers(0, None) == 0
    assert useful_workers(3, None) == 3
    assert useful_workers(3, 29) == 0
    assert useful_workers(3, 30) == 3


@pytest.mark.parametrize('first', [0, 1])
def test_every_second_batch_is_that_of_threads(data, config, first):
    rows = data.training_rows(CONSUMED, BATCH)
    make_batch = BatchMaker(config, data.training_request(), rows, None, step=2)
    expected = data.train(CONSUMED, BATCH)
    for number in range(4):
        of_threads = next(expected)
        if number % 2 == first:
            made = make_batch(number)
            reads = made.pop('reads')
            assert_equal(made, of_threads)
            assert [read.split for read in reads] == ['clocks/train']
            np.testing.assert_array_equal(reads[0].records, of_threads['index'])
    expected.close()
    with pytest.raises(ValueError, match='was expected to follow'):
        make_batch(2)


def test_arrays_of_a_batch_can_be_shared(data, config):
    make_batch = BatchMaker(
        config, data.training_request(), data.training_rows(0, BATCH), None, step=1
    )
    batch = make_batch(0)
    del batch['reads']
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(batch))


def test_rows_can_be_sent():
    sampling = np.array([0.0, 1.0, 3.0])
    stream = Order([Source(5), Source(3, weight=2.0, sampling=sampling)], seed=1, batch_size=8)
    of_training = TrainingRows(stream, consumed=3, batch_size=8, process=(1, 2))
    begins = np.array([0, 5, 5])
    of_pass = PassRows(begins, total=9, batch_size=8, process=(1, 2))
    for rows in (of_training, of_pass):
        sent = pickle.loads(pickle.dumps(rows))
        for number in range(2):
            assert_equal(vars(sent(number)), vars(rows(number)))


def test_without_grain_the_extra_is_named(data, config, monkeypatch):
    monkeypatch.setitem(sys.modules, 'grain', None)
    with pytest.raises(extras.MissingExtra, match='config.data.workers=2 needs .* "grain>='):
        with_workers(config, 2).train(0, BATCH)


@pytest.mark.parametrize(
    'exit_code, cause', [(-9, 'memory runs out'), (-7, '/dev/shm'), (1, '__main__'), (3, 'code 3')]
)
def test_what_is_said_of_a_process_that_ended(exit_code, cause):
    sentence = worker_batches._death_sentence(2, exit_code)
    assert sentence.startswith('config.data.workers=2: a process that reads batches ended')
    assert cause in sentence


# ---- With processes.


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2, 4])
def test_workers_make_the_batches_of_threads(data, config, workers):
    parallel = with_workers(config, workers)
    # Weights, one of them 0, so that records are drawn with replacement.
    weights = {'weight': np.linspace(0, 1, 13)}
    expected = take(data.train(CONSUMED, BATCH, columns=weights), 6)
    made = parallel.train(CONSUMED, BATCH, columns=weights)
    assert isinstance(made, WorkerBatches)
    assert_equal(take(made, 6), expected)
    assert parallel.problems()['read'] == 6 * BATCH


@pytest.mark.slow
def test_each_of_four_hosts_resumes_with_workers(data, config):
    parallel = with_workers(config, 1)
    for host in range(4):
        whole = data.train(0, 8, (host, 4))
        next(whole)
        resumed = parallel.train(8, 8, (host, 4))
        assert_equal(take(resumed, 3), take(whole, 3))


@pytest.mark.slow
def test_a_pass_with_workers_ends(data, config, monkeypatch):
    monkeypatch.setattr(worker_batches, 'MIN_BATCHES_OF_WORKER', 1)
    expected = list(data.one_pass('test', 3))
    parallel = with_workers(config, 3)
    made = parallel.one_pass('test', 3)
    assert isinstance(made, WorkerBatches)
    # 10 segments: four batches, so that one worker makes two.
    batches = list(made)
    assert len(batches) == len(expected) == 4
    for batch, other in zip(batches, expected):
        assert_equal(batch, other)
    assert multiprocessing.active_children() == []


class RowsWithoutBackend:
    """Rows for a process that has started no backend of JAX, and may start that of the CPU only."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, number):
        from jax._src import xla_bridge

        assert multiprocessing.parent_process() is not None
        assert jax.config.jax_platforms == 'cpu'
        assert not xla_bridge.backends_are_initialized()
        return self.rows(number)


@pytest.mark.slow
def test_workers_start_no_backend_and_a_killed_one_is_a_sentence(data, config):
    rows = RowsWithoutBackend(data.training_rows(0, BATCH))
    made = WorkerBatches(config, data.training_request(), rows, None, 2, data._problems)
    next(made)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match='config.data.workers=2: a process .* memory runs out'):
        # What it had made by then is still delivered.
        for _ in range(20):
            next(made)
    with pytest.raises(StopIteration):
        next(made)
    assert multiprocessing.active_children() == []


def damage_frames(folder):
    """Flips a bit in the checksum of every frame and second of sound of the training records."""
    table = folder / 'pieces-train'
    about = json.loads((table / 'table.json').read_text())
    for name in ('frame_crc', 'second_crc'):
        checksums = np.load(table / f'{name}.npy') ^ 1
        np.save(table / f'{name}.npy', checksums)
        # The table itself is whole.
        about['columns'][name] = zlib.crc32(checksums.tobytes())
    (table / 'table.json').write_text(json.dumps(about))


@pytest.mark.slow
def test_damaged_records_of_workers_are_counted_and_stop_the_run(config, prepared, tmp_path):
    folder = tmp_path / 'damaged'
    shutil.copytree(prepared[0], folder)
    damage_frames(folder)
    config.data.train = {'clocks': {'path': str(folder)}}
    config.data.max_corrupt = 1.0
    parallel = with_workers(config, 1)
    batch = take(parallel.train(0, 13), 1)
    assert not batch['valid'].any()
    problems = parallel.problems()
    assert (problems['corrupt'], problems['read']) == (13, 13)
    assert {source for source, _, _ in problems['indices']} == {'clocks/train'}
    config.data.max_corrupt = 0.5
    with pytest.raises(DataError, match='13 of 13 records could not be read'):
        next(with_workers(config, 1).train(0, 13))


# Writes the process ids of its workers, and would go on reading.
PARENT = """
import multiprocessing, sys, time
from ml_collections import ConfigDict
import data_pipelines
from vatt_jax import config as configs

if __name__ == '__main__':
    batches = data_pipelines.open(configs.from_json(sys.argv[1])).train(0, 4)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # The first process of a container may not collect what it inherits.
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0] != 'Z'


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(config, tmp_path):
    config.data.workers = 2
    script = tmp_path / 'parent.py'
    script.write_text(PARENT)
    command = [sys.executable, str(script), configs.to_json(config)]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.stdout.close()
    assert len(workers) == 2
    assert all(is_running(pid) for pid in workers)
    # Preemption and Ctrl-C reach workers too; they wait for what the parent decides.
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert all(is_running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
