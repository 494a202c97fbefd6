"""Two processes of four devices, through run.py's own path, against one process.

Same order, same numbers, one voice.
"""

import json
import pathlib
import re
import shutil
import time

import chex
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
    """(processes of run.py on four devices each that know of one another, their logs)."""
    coordinator = f'127.0.0.1:{runs.free_port()}'
    started, logs = [], []
    for i in range(processes):
        log = folder / f'log{i}.txt'
        process = runs.start(
            f'--config=tests/configs/tiny.py:{variant}',
            '--config.mesh.replica=4',
            '--config.mesh.fsdp=2',
            '--quiet',
            *argv,
            log=log,
            devices=4,
            VATT_COORDINATOR=coordinator,
            VATT_PROCESSES=str(processes),
            VATT_PROCESS=str(i),
        )
        started.append(process)
        logs.append(log)
    return started, logs


def ends_of(logs: list[pathlib.Path]) -> list[str]:
    """The last thing each process said, for messages."""
    return [log.read_text()[-3000:] for log in logs]


def finish_all(started: list, logs: list[pathlib.Path]) -> None:
    """Waits for all processes, which are to end well."""
    for process, log in zip(started, logs, strict=True):
        assert runs.finish(process, log) == 0, ends_of(logs)


def run_together(folder: pathlib.Path, *argv: str, **kwargs) -> list[pathlib.Path]:
    """Logs of the processes of `start`, all of which ended well."""
    started, logs = start(folder, *argv, **kwargs)
    try:
        finish_all(started, logs)
    finally:
        for process in started:
            process.kill()
    return logs


def steps_logged(workdir: pathlib.Path) -> list[dict]:
    """The lines of the log that are of training steps."""
    return [line for line in runs.log_lines(workdir) if 'loss' in line]


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """(run folder of two processes, their logs, run folder of one process)."""
    folder = tmp_path_factory.mktemp('processes')
    logs = run_together(folder, f'--workdir={folder / "two"}')
    config = tiny.get_config('prime')
    loop.train(config, data_pipelines.open(config), folder / 'one', quiet=True)
    return folder / 'two', logs, folder / 'one'


def test_same_order_and_losses(both):
    two, _, one = both
    assert runs.done(two)['order'] == runs.done(one)['order']
    assert runs.done(two)['consumed'] == 64
    assert runs.done(one)['consumed'] == 64
    steps, expected = steps_logged(two), steps_logged(one)
    assert [line['step'] for line in steps] == [1, 2, 3, 4]
    # float32 sums in another order, through four steps: the tolerance of one device against eight
    for name, rtol in (('loss', 2e-4), ('grad_norm', 2e-3)):
        np.testing.assert_allclose(
            [line[name] for line in steps], [line[name] for line in expected], rtol=rtol
        )


def test_states_of_one_and_two_processes_have_the_same_leaves(both):
    """Trees, shapes and dtypes, whoever wrote them; finite everywhere, and at the same step."""
    two, _, one = both
    config = tiny.get_config('prime')
    state, meta, _ = state_of(two, config)
    expected, expected_meta, _ = state_of(one, config)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    chex.assert_tree_all_finite((state, expected))
    assert int(state.step) == int(expected.step) == 4
    assert meta['order'] == expected_meta['order']


def test_one_process_speaks(both):
    two, logs, _ = both
    assert 'step 4/4' in logs[0].read_text()
    for word in ('step', 'loss', 'records'):
        assert word not in logs[1].read_text()
    assert len(list((two / 'tensorboard').glob('events*'))) == 1
    assert len(runs.log_lines(two)) == 5  # four steps and the evaluation


def test_evaluation_counts_each_example_once(both):
    two, _, one = both
    similarity = []
    for workdir in (two, one):
        folder = workdir / 'evals' / 'step_000004'
        results = json.loads((folder / 'results.json').read_text())
        arrays = np.load(folder / 'arrays.npz')
        assert results['retrieval']['scalars']['audio_to_video/clips'] == TEST
        assert sorted(arrays['retrieval/audio_to_video/clips']) == list(range(TEST))
        similarity.append(arrays['retrieval/audio_to_video/similarity'].astype(np.float32))
    chex.assert_equal_shape(similarity)
    np.testing.assert_allclose(similarity[0], similarity[1], atol=5e-3)


def written_features(written) -> dict:
    """The features of an embeddings file, as `compute_features` returns them."""
    features = {'pooled': {}, 'spaces': {}}
    for path in written.files:
        group, *names = path.split('/')
        if group == 'pooled':
            features['pooled'][names[0]] = written[path]
        if group == 'space':
            features['spaces'].setdefault(names[0], {})[names[1]] = written[path]
    return features


def test_embeddings_of_a_prime_split_on_1_8_and_2x4_devices(both):
    """One pass of the two processes' checkpoint over 37 test records.

    Each once, and the same features wherever it runs.
    """
    two, _, _ = both
    run_together(two.parent, f'--workdir={two}', '--mode=embed')
    written = np.load(two / 'embeddings' / 'test.npz')
    assert written['index'].tolist() == list(range(TEST))
    assert written['id'].tolist() == [f'test/{i}' for i in range(TEST)]
    expected = written_features(written)
    assert set(expected['pooled']) == {'video', 'audio', 'text', 'text.caption'}
    assert set(expected['spaces']) == {'va', 'vat'}
    for devices in (1, 8):
        mesh = sharding.make_mesh({'replica': devices})
        config, variables, _ = checkpoint.load_model(two, mesh)
        data = data_pipelines.open(config)
        assert data.size('test') == TEST
        extractor = feature_extractor.FeatureExtractor(config, variables, mesh)
        features = feature_extractor.compute_features(extractor, data.one_pass('test', 16))
        assert features['index'].tolist() == list(range(TEST))
        assert len(jax.tree.leaves(variables)[0].sharding.device_set) == devices
        np.testing.assert_array_equal(features['labels']['class'], written['labels/class'])
        found = {'pooled': features['pooled'], 'spaces': features['spaces']}
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_example_that_comes_twice_is_an_error(both):
    """compute_features refuses a pass that repeats a batch, rather than counting it twice."""
    _, _, one = both
    mesh = sharding.make_mesh({'replica': 1})
    config, variables, _ = checkpoint.load_model(one, mesh)
    batches = list(data_pipelines.open(config).one_pass('test', 16))
    extractor = feature_extractor.FeatureExtractor(config, variables, mesh)
    with pytest.raises(RuntimeError, match='16 examples came more than once'):
        feature_extractor.compute_features(extractor, iter([*batches, batches[0]]))


@pytest.mark.slow
def test_labels_of_the_whole_set(tmp_path):
    """Refreshes spread over two processes, whose sums have another order.

    The labels, alignment, potentials and steps of one process.
    """
    run_together(tmp_path, f'--workdir={tmp_path / "two"}', variant='labels')
    config = tiny.get_config('labels')
    data = data_pipelines.open(config)
    loop.train(config, data, tmp_path / 'one', quiet=True)
    state, _, columns = state_of(tmp_path / 'two', config)
    expected_state, _, expected_columns = state_of(tmp_path / 'one', config)
    labels, expected_labels = columns['label'], expected_columns['label']
    chex.assert_shape([labels, expected_labels], (data.size('train'), 2))
    assert (expected_labels >= 0).all()
    assert (expected_labels[:, 0] != expected_labels[:, 1]).any()
    assert np.mean(labels != expected_labels) < 0.02
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)
    chex.assert_tree_all_finite((state, expected_state))
    np.testing.assert_allclose(
        state.objective['potentials'], expected_state.objective['potentials'], atol=0.05
    )

    lines = runs.log_lines(tmp_path / 'two')
    expected_lines = runs.log_lines(tmp_path / 'one')
    assert [line['step'] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert [line['step'] for line in expected_lines] == [0, 1, 2, 2, 3, 4, 4]
    np.testing.assert_allclose(
        [line['loss'] for line in lines if 'loss' in line],
        [line['loss'] for line in expected_lines if 'loss' in line],
        rtol=5e-3,
    )
    expected_nmi = pytest.approx(expected_lines[-1]['eval/clusters/NMI'], abs=0.02)
    assert lines[-1]['eval/clusters/NMI'] == expected_nmi


@pytest.mark.slow
def test_columns_are_saved_in_pieces_and_restored_by_any_number_of_processes(tmp_path):
    """Labels of two processes: one process reads the same, and two go on to the same bits."""
    run_together(tmp_path, f'--workdir={tmp_path / "two"}', variant='labels')
    folder = tmp_path / 'two' / 'checkpoints' / '2' / 'columns'
    pieces = [np.load(folder / f'label-0000{host}-of-00002.npy') for host in range(2)]
    config = tiny.get_config('labels')
    num_records = data_pipelines.open(config).size('train')
    assert [len(piece) for piece in pieces] == [num_records // 2, num_records - num_records // 2]
    _, _, columns = state_of(tmp_path / 'two', config, step=2)
    np.testing.assert_array_equal(columns['label'], np.concatenate(pieces))

    # The run as it was after two steps, continued by two processes and by one.
    for name in ('again', 'alone'):
        shutil.copytree(tmp_path / 'two', tmp_path / name)
        shutil.rmtree(tmp_path / name / 'checkpoints' / '4')
    run_together(tmp_path, f'--workdir={tmp_path / "again"}', variant='labels')
    whole, _, labels = state_of(tmp_path / 'two', config)
    again, _, labels_again = state_of(tmp_path / 'again', config)
    chex.assert_trees_all_equal((again, labels_again), (whole, labels), strict=True)
    loop.train(config, data_pipelines.open(config), tmp_path / 'alone', quiet=True)
    assert runs.done(tmp_path / 'alone')['order'] == runs.done(tmp_path / 'two')['order']
    _, _, labels_alone = state_of(tmp_path / 'alone', config)
    assert np.mean(labels_alone['label'] != labels['label']) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['memory', 'host_memory'])
def test_memories_of_two_processes_are_those_of_one(tmp_path, variant):
    """AVID-CMA: what is scored, written and found over two processes."""
    run_together(tmp_path, f'--workdir={tmp_path / "two"}', variant=variant)
    config = tiny.get_config(variant)
    loop.train(config, data_pipelines.open(config), tmp_path / 'one', quiet=True)
    state, _, columns = state_of(tmp_path / 'two', config)
    expected, _, expected_columns = state_of(tmp_path / 'one', config)
    lines, expected_lines = steps_logged(tmp_path / 'two'), steps_logged(tmp_path / 'one')
    for name, rtol in (('loss', 2e-4), ('log_z', 1e-5)):
        np.testing.assert_allclose(
            [line[name] for line in lines], [line[name] for line in expected_lines], rtol=rtol
        )
    assert np.mean(columns.pop('positives') != expected_columns.pop('positives')) < 0.02
    # Tables of the host: a piece by each process, read by one.
    assert len(columns) == (2 if variant == 'host_memory' else 0)
    chex.assert_trees_all_close(columns, expected_columns, atol=1e-4)
    chex.assert_trees_all_close(
        jax.device_get(state.objective), jax.device_get(expected.objective), atol=1e-4
    )


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_both_continue(tmp_path):
    workdir = tmp_path / 'run'
    started, logs = start(tmp_path, '--config.steps=400', f'--workdir={workdir}')
    while started[0].exitcode is None and not (workdir / 'checkpoints' / '2').is_dir():
        time.sleep(0.01)
    started[1].terminate()
    finish_all(started, logs)
    assert 'asked to stop: step' in logs[0].read_text()
    assert not (workdir / 'done.json').exists()
    saved = loop.newest(workdir)
    run_together(tmp_path, f'--workdir={workdir}', f'--config.steps={saved + 2}')
    assert [line['step'] for line in steps_logged(workdir)] == list(range(1, saved + 3))


LONG = ('--config.steps=20',)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The run folder of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    run_together(folder, f'--workdir={folder / "run"}', *LONG, variant='plain')
    return folder / 'run'


@pytest.mark.slow
@pytest.mark.parametrize(
    'victim, message',
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
    uninterrupted, tmp_path, victim, message
):
    """kill -9 of one of two.

    Where the coordinating process is killed, JAX's own thread ends the other, at times before
    Python can speak. Where the other one is, likewise, if the survivor waits in what notices
    nothing: after JAX's 100 s without a sign of life, in JAX's words, which number the process.
    """
    workdir = tmp_path / 'run'
    started, logs = start(tmp_path, f'--workdir={workdir}', *LONG, variant='plain')
    survivor = 1 - victim
    while started[survivor].exitcode is None and not (workdir / 'checkpoints' / '4').is_dir():
        time.sleep(0.01)
    started[victim].kill()
    code = runs.finish(started[survivor], logs[survivor], timeout=150)
    assert code not in (0, None), ends_of(logs)
    started[victim].join()
    assert started[victim].exitcode is not None
    output = logs[survivor].read_text()
    assert re.search(message, output), output[-3000:]
    if 'another task died' not in output:
        assert output.rstrip().splitlines()[-1].startswith('error: ')
        assert 'Traceback' not in output
    assert not (workdir / 'done.json').exists()
    assert loop.newest(workdir) >= 4

    run_together(tmp_path, f'--workdir={workdir}', *LONG, variant='plain')
    assert 'continuing from step' in logs[0].read_text()
    assert runs.done(workdir)['order'] == runs.done(uninterrupted)['order']
    assert runs.log_lines(workdir) == runs.log_lines(uninterrupted)
    config = tiny.get_config('plain')
    config.steps = 20
    state, _, _ = state_of(workdir, config)
    expected, _, _ = state_of(uninterrupted, config)
    chex.assert_trees_all_equal(state, expected, strict=True)
