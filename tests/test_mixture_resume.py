"""Two playgrounds, one without words, train on two hosts, are killed (-9) and go on with one: it sees the records that it would have."""

import hashlib
import itertools
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


@pytest.mark.slow
def test_killed_mixture_goes_on_with_another_number_of_hosts(tmp_path):
    words = playground.make(tmp_path / 'words', processes=1, quiet=True, train=5, seed=3, **SMALL)
    playground.make(tmp_path / 'other', processes=1, quiet=True, train=7, seed=4, **SMALL)
    mute = tmp_path / 'mute'
    prepare(
        str(tmp_path / 'other' / 'media'),
        '',
        str(mute),
        fps=8,
        size=48,
        rate=8000,
        processes=1,
        quiet=True,
    )
    assert not len(Split(Prepared(mute), 'train').index.sentence_start) and len(
        Split(Prepared(words), 'train').index.sentence_start
    )
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

    def whole(workdir, log):
        assert (
            runs.finish(runs.start(*command, f'--workdir={workdir}', log=log, devices=2), log) == 0
        ), log.read_text()[-3000:]

    whole(tmp_path / 'whole', tmp_path / 'whole.txt')

    port, logs = runs.free_port(), [tmp_path / f'log{i}.txt' for i in range(2)]
    hosts = [
        runs.start(
            *command,
            f'--workdir={tmp_path / "killed"}',
            log=log,
            devices=1,
            VATT_COORDINATOR=f'127.0.0.1:{port}',
            VATT_PROCESSES='2',
            VATT_PROCESS=str(i),
        )
        for i, log in enumerate(logs)
    ]
    saved = lambda: [
        int(p.name) for p in (tmp_path / 'killed' / 'checkpoints').glob('*') if p.name.isdigit()
    ]
    try:
        deadline = time.monotonic() + 300
        while not saved() or max(saved()) < 8:
            time.sleep(0.005)
            assert time.monotonic() < deadline and all(h.exitcode is None for h in hosts), [
                f.read_text()[-3000:] for f in logs
            ]
    finally:
        for h in hosts:
            h.kill()
            h.join()
    assert not (tmp_path / 'killed' / 'done.json').exists()
    whole(tmp_path / 'killed', tmp_path / 'killed.txt')
    assert 'step' in (tmp_path / 'killed.txt').read_text()

    a, b = (
        [(line['step'], line['order']) for line in runs.log_lines(tmp_path / w) if 'loss' in line]
        for w in ('whole', 'killed')
    )
    assert a == b and [step for step, _ in a] == list(range(1, STEPS + 1))
    assert runs.done(tmp_path / 'whole')['order'] == runs.done(tmp_path / 'killed')['order']
    # The digest is that of the sources and records that the order names.
    seed = json.loads((tmp_path / 'whole' / 'config.json').read_text())['seed']
    records = [
        len(Split(Prepared(path), 'train')) for path in (mute, words)
    ]  # a config's groups are in order of their names
    stream = order.Order(
        [order.Source(records[0]), order.Source(records[1], share=0.5)], seed, BATCH
    )
    digest = ''
    for step in range(STEPS):
        source, index, _ = stream.rows(order.train_positions(step, 0, BATCH))
        assert (source == 1).sum() == BATCH // 2
        digest = hashlib.sha256(
            digest.encode() + np.stack([source, index], 1).astype(np.int32).tobytes()
        ).hexdigest()
    assert digest == runs.done(tmp_path / 'whole')['order']
    assert all(
        np.isfinite(line['loss'])
        for line in itertools.chain(runs.log_lines(tmp_path / 'killed'))
        if 'loss' in line
    )
