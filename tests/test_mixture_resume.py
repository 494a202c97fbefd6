"""Two playgrounds, one without words, train on two hosts, are killed (-9) and go on with one.

The run sees the records that it would have seen.
"""

import hashlib
import json
import time

import numpy as np
import pytest

from data_pipelines.datasets import playground
from data_pipelines.loading import order
from data_pipelines.prepare import prepare
from data_pipelines.storage.records import Prepared, Split
from tests import runs

STEPS, BATCH = 40, 8
SMALL = {'validation': 1, 'test': 1, 'seconds': 4.5, 'episodes': 2, 'size': 48}


def make_sources(folder):
    """(records with words, records of media alone)."""
    words = playground.make(folder / 'words', processes=1, quiet=True, train=5, seed=3, **SMALL)
    playground.make(folder / 'other', processes=1, quiet=True, train=7, seed=4, **SMALL)
    mute = folder / 'mute'
    prepare(
        str(folder / 'other' / 'media'),
        '',
        str(mute),
        fps=8,
        size=48,
        rate=8000,
        processes=1,
        quiet=True,
    )
    assert len(train_split(words).index.sentence_start)
    assert not len(train_split(mute).index.sentence_start)
    return words, mute


def train_split(path):
    return Split(Prepared(path), 'train')


def run_to_the_end(command, workdir, log):
    """One process of two devices."""
    process = runs.start(*command, f'--workdir={workdir}', log=log, devices=2)
    assert runs.finish(process, log) == 0, log.read_text()[-3000:]


def newest_step(workdir):
    """Of the checkpoints, 0 without one."""
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    return max([int(name) for name in names if name.isdigit()], default=0)


def ends_of(logs):
    """The last thing each process said, for messages."""
    return [log.read_text()[-3000:] for log in logs if log.exists()]


def run_and_kill(command, workdir, folder):
    """Two hosts of one device, killed once step 8 is saved."""
    coordinator = f'127.0.0.1:{runs.free_port()}'
    logs = [folder / f'log{i}.txt' for i in range(2)]
    hosts = []
    for i, log in enumerate(logs):
        host = runs.start(
            *command,
            f'--workdir={workdir}',
            log=log,
            devices=1,
            VATT_COORDINATOR=coordinator,
            VATT_PROCESSES='2',
            VATT_PROCESS=str(i),
        )
        hosts.append(host)
    try:
        deadline = time.monotonic() + 300
        while newest_step(workdir) < 8:
            time.sleep(0.005)
            assert time.monotonic() < deadline, ends_of(logs)
            assert all(host.exitcode is None for host in hosts), ends_of(logs)
    finally:
        for host in hosts:
            host.kill()
            host.join()
    assert not (workdir / 'done.json').exists()


def expected_digest(sources, seed):
    """The digest of the sources and records that the order names, half of each batch of words."""
    words, mute = sources
    # A config's groups are in order of their names.
    stream = order.Order(
        [order.Source(len(train_split(mute))), order.Source(len(train_split(words)), share=0.5)],
        seed,
        BATCH,
    )
    digest = ''
    for step in range(STEPS):
        source, index, _ = stream.rows(order.train_positions(step, 0, BATCH))
        assert (source == 1).sum() == BATCH // 2
        rows = np.stack([source, index], 1).astype(np.int32)
        digest = hashlib.sha256(digest.encode() + rows.tobytes()).hexdigest()
    return digest


@pytest.mark.slow
def test_killed_mixture_goes_on_with_another_number_of_hosts(tmp_path):
    words, mute = make_sources(tmp_path)
    mixture = {'words': {'path': str(words), 'share': 0.5}, 'mute': {'path': str(mute)}}
    command = [
        '--config=tests/configs/tiny.py:plain',
        f'--config.data.train={mixture!r}',
        '--config.data.source=records',
        f'--config.steps={STEPS}',
        f'--config.batch_size={BATCH}',
        '--config.model.inputs.audio.rate=8000',
        '--config.checkpoint.every=4',
        '--config.mesh.replica=2',
    ]
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    run_to_the_end(command, whole, tmp_path / 'whole.txt')
    run_and_kill(command, killed, tmp_path)
    run_to_the_end(command, killed, tmp_path / 'killed.txt')
    assert 'continuing from step' in (tmp_path / 'killed.txt').read_text()

    orders = {}
    for workdir in (whole, killed):
        steps = [line for line in runs.log_lines(workdir) if 'loss' in line]
        assert [line['step'] for line in steps] == list(range(1, STEPS + 1))
        assert np.isfinite([line['loss'] for line in steps]).all()
        orders[workdir.name] = [line['order'] for line in steps]
    assert orders['killed'] == orders['whole']

    seed = json.loads((whole / 'config.json').read_text())['seed']
    digest = expected_digest((words, mute), seed)
    assert runs.done(whole)['order'] == digest
    assert runs.done(killed)['order'] == digest
