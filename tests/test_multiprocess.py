"""Two processes of four devices, through run.py's own path, against one process: same order, same numbers, one voice."""

import json
import pathlib
import re
import time

import jax
import numpy as np
import pytest

import data_pipelines
from tests import runs
from tests.configs import tiny
from tests.test_train import state_of
from vatt_jax.inference import feature_extractor
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint, loop

TEST = 37  # records of the test split: a prime


def start(
    folder: pathlib.Path, *argv: str, processes: int = 2, variant: str = 'prime'
) -> tuple[list, list[pathlib.Path]]:
    """run.py started in `processes` processes of four devices that know of one another, and their logs."""
    port = runs.free_port()
    logs = [folder / f'log{i}.txt' for i in range(processes)]
    return [
        runs.start(
            f'--config=tests/configs/tiny.py:{variant}',
            '--config.mesh.replica=4',
            '--config.mesh.fsdp=2',
            '--quiet',
            *argv,
            log=log,
            devices=4,
            VATT_COORDINATOR=f'127.0.0.1:{port}',
            VATT_PROCESSES=str(processes),
            VATT_PROCESS=str(i),
        )
        for i, log in enumerate(logs)
    ], logs


def together(folder: pathlib.Path, *argv: str, **kwargs) -> list[pathlib.Path]:
    """Logs of the processes of `start`, all of which ended well."""
    started, logs = start(folder, *argv, **kwargs)
    try:
        for process, log in zip(started, logs, strict=True):
            assert runs.finish(process, log) == 0, [f.read_text()[-3000:] for f in logs]
    finally:
        for process in started:
            process.kill()
    return logs


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """(run folder of two processes, their logs, run folder of one process)."""
    folder = tmp_path_factory.mktemp('processes')
    logs = together(folder, f'--workdir={folder / "two"}')
    config = tiny.get_config('prime')
    loop.train(config, data_pipelines.open(config), folder / 'one', quiet=True)
    return folder / 'two', logs, folder / 'one'


def test_same_order_and_losses(both):
    two, _, one = both
    assert (
        runs.done(two)['order'] == runs.done(one)['order']
        and runs.done(two)['consumed'] == runs.done(one)['consumed'] == 64
    )
    a, b = ([line for line in runs.log_lines(folder) if 'loss' in line] for folder in (one, two))
    assert [line['step'] for line in b] == [1, 2, 3, 4]
    # float32 sums in another order, through four steps: the tolerance of one device against eight
    np.testing.assert_allclose([x['loss'] for x in b], [x['loss'] for x in a], rtol=2e-4)
    np.testing.assert_allclose([x['grad_norm'] for x in b], [x['grad_norm'] for x in a], rtol=2e-3)


def test_one_process_speaks(both):
    two, logs, _ = both
    assert 'step 4/4' in logs[0].read_text() and not any(
        w in logs[1].read_text() for w in ('step', 'loss', 'records')
    )
    assert len(list((two / 'tensorboard').glob('events*'))) == 1
    assert len(runs.log_lines(two)) == 5  # four steps and the evaluation


def test_evaluation_counts_each_example_once(both):
    two, _, one = both
    results = [
        json.loads((folder / 'evals' / 'step_000004' / 'results.json').read_text())['retrieval'][
            'scalars'
        ]
        for folder in (one, two)
    ]
    arrays = [np.load(folder / 'evals' / 'step_000004' / 'arrays.npz') for folder in (one, two)]
    for scalars, array in zip(results, arrays, strict=True):
        assert scalars['audio_to_video/clips'] == TEST
        assert sorted(array['retrieval/audio_to_video/clips']) == list(range(TEST))
    np.testing.assert_allclose(
        arrays[1]['retrieval/audio_to_video/similarity'].astype(np.float32),
        arrays[0]['retrieval/audio_to_video/similarity'].astype(np.float32),
        atol=5e-3,
    )


def test_embeddings_of_a_prime_split_on_1_8_and_2x4_devices(both):
    """The checkpoint of the two processes, one pass over 37 test records: each once, and the same features wherever it runs."""
    two, logs, _ = both
    together(two.parent, f'--workdir={two}', '--mode=embed')
    written = np.load(two / 'embeddings' / 'test.npz')
    assert written['index'].tolist() == list(range(TEST)) and written['id'].tolist() == [
        f'test/{i}' for i in range(TEST)
    ]
    for devices in (1, 8):
        mesh = sharding.make_mesh({'replica': devices})
        config, variables, _ = checkpoint.load_model(two, mesh)
        data = data_pipelines.open(config)
        assert data.size('test') == TEST
        features = feature_extractor.compute_features(
            feature_extractor.FeatureExtractor(config, variables, mesh), data.one_pass('test', 16)
        )
        assert features['index'].tolist() == list(range(TEST))
        assert len(jax.tree.leaves(variables)[0].sharding.device_set) == devices
        np.testing.assert_array_equal(features['labels']['class'], written['labels/class'])
        for name in ('video', 'audio', 'text'):
            np.testing.assert_allclose(
                features['pooled'][name], written[f'pooled/{name}'], rtol=1e-4, atol=1e-5
            )
        for space, members in features['spaces'].items():
            for name, x in members.items():
                np.testing.assert_allclose(
                    x, written[f'space/{space}/{name}'], rtol=1e-4, atol=1e-5
                )


def test_an_example_that_comes_twice_is_an_error(both):
    """The check inside compute_features: a pass that repeats a batch is refused rather than counted."""
    config, variables, _ = checkpoint.load_model(
        both[2], mesh := sharding.make_mesh({'replica': 1})
    )
    batches = list(data_pipelines.open(config).one_pass('test', 16))
    with pytest.raises(RuntimeError, match='16 examples came more than once'):
        feature_extractor.compute_features(
            feature_extractor.FeatureExtractor(config, variables, mesh),
            iter([*batches, batches[0]]),
        )


@pytest.mark.slow
def test_labels_of_the_whole_set(tmp_path):
    """Refreshes spread over two processes: the labels, alignment, potentials and steps of one process, whose sums have another order."""
    together(tmp_path, f'--workdir={tmp_path / "two"}', variant='labels')
    config = tiny.get_config('labels')
    data = data_pipelines.open(config)
    loop.train(config, data, tmp_path / 'one', quiet=True)
    one, two = (state_of(tmp_path / name, config) for name in ('one', 'two'))
    labels, other = one[2]['label'], two[2]['label']
    assert (
        labels.shape == (data.size('train'), 2)
        and (labels >= 0).all()
        and (labels[:, 0] != labels[:, 1]).any()
    )
    assert np.mean(labels != other) < 0.02
    np.testing.assert_allclose(
        two[0].objective['potentials'], one[0].objective['potentials'], atol=0.05
    )
    lines = [runs.log_lines(tmp_path / name) for name in ('one', 'two')]
    assert (
        [line['step'] for line in lines[1]]
        == [line['step'] for line in lines[0]]
        == [0, 1, 2, 2, 3, 4, 4]
    )
    losses = [[line['loss'] for line in part if 'loss' in line] for part in lines]
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)
    assert lines[1][-1]['eval/clusters/NMI'] == pytest.approx(
        lines[0][-1]['eval/clusters/NMI'], abs=0.02
    )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_both_continue(tmp_path):
    workdir = tmp_path / 'run'
    started, logs = start(tmp_path, '--config.steps=400', f'--workdir={workdir}')
    while started[0].exitcode is None and not (workdir / 'checkpoints' / '2').is_dir():
        time.sleep(0.01)
    started[1].terminate()
    for process, log in zip(started, logs, strict=True):
        assert runs.finish(process, log) == 0, [f.read_text()[-3000:] for f in logs]
    assert 'asked to stop: step' in logs[0].read_text() and not (workdir / 'done.json').exists()
    saved = loop.newest(workdir)
    together(tmp_path, f'--workdir={workdir}', f'--config.steps={saved + 2}')
    assert [line['step'] for line in runs.log_lines(workdir) if 'loss' in line] == list(
        range(1, saved + 3)
    )


LONG = ('--config.steps=20',)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('uninterrupted')
    together(folder, f'--workdir={folder / "run"}', *LONG, variant='plain')
    return folder / 'run'


@pytest.mark.slow
@pytest.mark.parametrize(
    'victim, told',
    [
        (
            1,
            '1 of 2 processes did not come to .* process 1 on .* continues from the last checkpoint'
            r'|another task died[^*]*stopped sending heartbeats\):\n1\n',
        ),
        (0, 'another task died|the coordinating process cannot be reached'),
    ],
)
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on_exactly(
    uninterrupted, tmp_path, victim, told
):
    """kill -9 of one of two. With the coordinating process JAX's own thread ends the other, at times before Python can speak; with the other one too,
    where the survivor waits in what notices nothing: after JAX's 100 s without a sign of life, in JAX's words, which number the process."""
    workdir, (started, logs) = (
        tmp_path / 'run',
        start(tmp_path, f'--workdir={tmp_path / "run"}', *LONG, variant='plain'),
    )
    other = 1 - victim
    while started[other].exitcode is None and not (workdir / 'checkpoints' / '4').is_dir():
        time.sleep(0.01)
    started[victim].kill()
    assert runs.finish(started[other], logs[other], timeout=150) not in (0, None), logs[
        other
    ].read_text()[-3000:]
    assert started[victim].exitcode is not None or started[victim].join() is None
    said = logs[other].read_text()
    assert re.search(told, said), said[-3000:]
    if 'another task died' not in said:
        assert said.rstrip().splitlines()[-1].startswith('error: ') and 'Traceback' not in said
    assert not (workdir / 'done.json').exists() and loop.newest(workdir) >= 4
    together(tmp_path, f'--workdir={workdir}', *LONG, variant='plain')
    assert 'continuing from step' in logs[0].read_text()
    assert runs.done(workdir)['order'] == runs.done(uninterrupted)['order'] and runs.log_lines(
        workdir
    ) == runs.log_lines(uninterrupted)
    config = tiny.get_config('plain')
    config.steps = 20
    got, want = (state_of(folder, config)[0] for folder in (workdir, uninterrupted))
    assert checkpoint.digest(got) == checkpoint.digest(want)
