"""The loop end to end on the synthetic source.

Resume, meshes, the guard against non-finite steps, accumulation, refreshes, starting values.
"""

import json
import pathlib
import re
import shutil

import chex
import jax
import numpy as np
import pytest

import data_pipelines
import vatt_jax
from tests import tiny, traces
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips
from vatt_jax.rng import Rng
from vatt_jax.training import checkpoint, loop, metrics, starting_values, train_step


def run(workdir, config):
    """Trains; returns done.json, None where the run was stopped before its end."""
    loop.train(config, data_pipelines.open(config), workdir, quiet=True)
    file = pathlib.Path(workdir) / 'done.json'
    return json.loads(file.read_text()) if file.exists() else None


def log_lines(workdir, **options):
    """The lines of metrics.jsonl; `options` are those of json.loads."""
    text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
    return [json.loads(line, **options) for line in text.splitlines()]


def losses(workdir):
    """{step: loss} of a run folder."""
    return {line['step']: line['loss'] for line in log_lines(workdir) if 'loss' in line}


def state_of(workdir, config, step=None):
    """(state, meta, columns) of a checkpoint, the newest by default, laid out as `config` says."""
    built = loop.build(config, data_pipelines.open(config))
    checkpoints = checkpoint.Checkpoints(pathlib.Path(workdir) / 'checkpoints', config.checkpoint)
    if step is None:
        step = checkpoints.latest()
    state, meta, columns = checkpoints.restore(step, built.shape, built.shardings)
    checkpoints.close()
    assert_laid_out(state, built)
    return state, meta, columns


def assert_laid_out(state, built):
    """A state has the tree, shapes, dtypes and shardings of the run that it belongs to."""
    chex.assert_trees_all_equal_shapes_and_dtypes(state, built.shape)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, state), built.shardings)


def by_path(tree):
    """{path: array} of the leaves of a tree."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def global_norm(tree):
    """sqrt(sum of squares of all elements), in float64."""
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))


class stop_at:
    """SIGTERM's effect before a step, without a signal."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        self.original = loop.distributed.StopSignal.should_stop
        loop.distributed.StopSignal.should_stop = lambda stop, step: step >= self.step

    def __exit__(self, *_):
        loop.distributed.StopSignal.should_stop = self.original


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run, the reference of several tests."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, run(folder, tiny.config())


def test_learns_and_logs(whole):
    folder, done = whole
    curve = losses(folder)
    assert sorted(curve) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(list(curve.values())).all()
    assert done['step'] == 6
    assert done['consumed'] == 96
    assert done['skipped_steps'] == 0
    assert (folder / 'config.json').exists()
    assert list((folder / 'tensorboard').glob('events*'))
    state, _, _ = state_of(folder, tiny.config())
    chex.assert_tree_all_finite(state)
    assert int(state.step) == 6


def test_resume_is_exact(whole, tmp_path, monkeypatch):
    """Stopped after four steps and continued: same losses, same digests, same records seen.

    Digests are of parameters, moments and statistics. Of the new run, the continued one and the
    steps of each, only the first step is traced and compiled.
    """
    folder, expected = whole
    config = tiny.config()
    traces.limit_step_to_one(monkeypatch, config, data_pipelines.open(config))
    with stop_at(3):
        run(tmp_path, config)
    assert not (tmp_path / 'done.json').exists()
    done = run(tmp_path, tiny.config())
    assert done['digests'] == expected['digests']
    assert done['order'] == expected['order']
    assert losses(tmp_path) == losses(folder)
    state, _, _ = state_of(tmp_path, config)
    expected_state, _, _ = state_of(folder, config)
    chex.assert_trees_all_equal(state, expected_state, strict=True)


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    'mesh',
    [
        {'replica': 2, 'fsdp': 2, 'model': 2},
        slow({'replica': 8}),
        slow({'fsdp': 8}),
        slow({'replica': 2, 'seq': 4}),
    ],
)
def test_same_numbers_on_any_mesh(whole, tmp_path, mesh):
    """Losses within 2e-4 of one device's, parameters after six steps within 1e-3 of their norm.

    And over each axis by itself something moves in the compiled step (sums of gradients, gathered
    weights, halves of products, tokens), so none of them is left unsharded.
    """
    folder, expected = whole
    config = tiny.config()
    config.mesh.update(mesh)
    done = run(tmp_path, config)
    assert done['order'] == expected['order']
    curve, expected_curve = losses(tmp_path), losses(folder)
    np.testing.assert_allclose(
        [curve[step] for step in expected_curve], list(expected_curve.values()), rtol=2e-4
    )

    state, _, _ = state_of(tmp_path, config)
    expected_state, _, _ = state_of(folder, tiny.config())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)
    params = jax.device_get(state.params)
    expected_params = jax.device_get(expected_state.params)
    difference = jax.tree.map(np.subtract, params, expected_params)
    assert global_norm(difference) < 1e-3 * global_norm(expected_params)

    built = loop.build(config, data_pipelines.open(config))
    with jax.set_mesh(built.mesh):
        compiled = built.step.lower(built.shape, built.batch).compile()
    found = tiny.axes_of_collectives(compiled, built.mesh)
    for axis, size in mesh.items():
        assert size == 1 or {axis} in found, axis


def test_restore_on_another_mesh_and_batch_size(whole, tmp_path, monkeypatch):
    """Six steps of 16 on one device, then on with 24 rows a step over fsdp=4 × replica=2.

    The order continues where it was.
    """
    folder, _ = whole
    shutil.copytree(folder, tmp_path / 'run')
    config = tiny.config(steps=8, batch_size=24)
    config.mesh.update({'replica': 2, 'fsdp': 4})
    data = data_pipelines.open(config)
    begun_at = []
    open_batches = data.train

    def train(consumed, *args, **kwargs):
        begun_at.append(consumed)
        return open_batches(consumed, *args, **kwargs)

    monkeypatch.setattr(data, 'train', train)
    loop.train(config, data, tmp_path / 'run', quiet=True)
    done = json.loads((tmp_path / 'run' / 'done.json').read_text())
    assert begun_at == [96]
    assert done['step'] == 8
    assert done['consumed'] == 96 + 48
    state, _, _ = state_of(tmp_path / 'run', config)
    kernel = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    assert len(kernel.sharding.device_set) == 8
    assert any(kernel.sharding.spec)


def next_loss(folder, config):
    """(digests of the state as restored, loss of the step after) of a run's newest checkpoint.

    `config` may differ from the one that the run was trained with.
    """
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.checkpoint)
    with jax.set_mesh(built.mesh):
        state, meta, _ = checkpoints.restore(checkpoints.latest(), built.shape, built.shardings)
        checkpoints.close()
        assert_laid_out(state, built)
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == built.mesh.size
        digests = {}
        for group in ('params', 'batch_stats', 'opt_state', 'objective'):
            digests[group] = checkpoint.digest(getattr(state, group))
        batch = next(data.train(meta['consumed'], config.batch_size))
        _, step_metrics = built.step(state, feature_extractor.place_on_mesh(batch, built.mesh))
        return digests, float(step_metrics['loss'])


@pytest.mark.parametrize(
    'devices, mesh',
    [(1, {}), (2, {'fsdp': 2}), (4, {'fsdp': 2, 'replica': 2}), (8, {'fsdp': 4, 'replica': 2})],
)
@pytest.mark.slow
def test_a_checkpoint_is_restored_on_any_number_of_devices(whole, devices, mesh):
    """Saved on one device: the same parameters, moments and statistics bit for bit.

    And the next loss up to the order of float32 sums.
    """
    folder, done = whole
    config = tiny.config(steps=7)
    config.mesh.update(mesh)
    digests, loss = next_loss(folder, config)
    assert digests == done['digests']
    _, expected_loss = next_loss(folder, tiny.config(steps=7))
    assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_is_restored_between_scanned_and_unrolled_layers(whole, tmp_path):
    """Unrolled, continued scanned, and back: the state bit for bit, the next loss up to rounding.

    The same through init_from.
    """
    folder, unrolled_done = whole
    unrolled = tiny.config(steps=7)
    scanned = tiny.config(steps=7, model__scan=True)
    digests, loss = next_loss(folder, scanned)
    assert digests == unrolled_done['digests']
    _, expected_loss = next_loss(folder, unrolled)
    assert loss == pytest.approx(expected_loss, rel=1e-5)

    shutil.copytree(folder, tmp_path / 'run')
    done = run(tmp_path / 'run', scanned)
    assert done['step'] == 7
    assert done['digests']['params'] != unrolled_done['digests']['params']
    state, _, _ = state_of(tmp_path / 'run', unrolled)
    assert checkpoint.digest(state.params) == done['digests']['params']

    fresh = loop.build(unrolled, data_pipelines.open(unrolled)).init()
    other = starting_values.read(str(tmp_path / 'run'))
    params = other.take('params', fresh.params['model'])
    assert not other.skipped
    chex.assert_trees_all_equal(params, state.params['model'], strict=True)


def test_accumulation_averages_microbatches():
    """The loss of a step of two microbatches of 8 is the mean of theirs.

    Each has the random bits of its own rows. The step is traced once, whatever the batch.
    """
    config = tiny.config(accumulate=2)
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    chex.clear_trace_counter()
    make_step = train_step.make(config, built.model, built.objective, built.tx)
    step = jax.jit(chex.assert_max_traces(make_step, n=1))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def loss_of_rows(state, rows, rng):
        variables = {'params': state.params['model'], 'batch_stats': state.batch_stats}
        return built.objective.loss(built.model, variables, {}, {}, rows, rng).value

    with jax.set_mesh(built.mesh):
        state = built.init()
        batches = data.train(0, 16)
        batch = feature_extractor.place_on_mesh(next(batches), built.mesh)
        after, step_metrics = step(state, batch)
        values = []
        for part in range(2):
            rows = jax.tree.map(lambda x, part=part: x[part::2], batch)
            rng = Rng.create(config.seed, 0, rows['position'])
            rows = preprocess.device_stage(
                rows,
                config.model.inputs,
                config.augment,
                rng.at('augment'),
                augment=True,
                dtype='float32',
            )
            values.append(float(loss_of_rows(state, rows, rng)))
        second, _ = step(after, feature_extractor.place_on_mesh(next(batches), built.mesh))
    np.testing.assert_allclose(float(step_metrics['loss']), np.mean(values), rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after, second)
    chex.assert_tree_all_finite((after, second))
    assert int(after.step) == 1
    assert int(second.step) == 2


def poisoned(data, steps):
    """The data object with NaN-making batches at the given batches: the crop box becomes NaN."""
    original = data.train

    def batches(consumed, batch_size, **kwargs):
        for batch in original(consumed, batch_size, **kwargs):
            if int(batch['position'][0]) // batch_size in steps:
                batch['video']['box'] = np.full_like(batch['video']['box'], np.nan)
            yield batch

    data.train = batches
    return data


def refuse_constant(name):
    pytest.fail(f'{name} is no JSON')


def test_non_finite_step_is_skipped_counted_and_named(tmp_path):
    config = tiny.config()
    data = poisoned(data_pipelines.open(config), {2})
    data.problems = lambda: {'corrupt': 2, 'read': 96, 'indices': [('synthetic/train', 7, 'crc32')]}
    loop.train(config, data, tmp_path, quiet=True)

    lines = log_lines(tmp_path, parse_constant=refuse_constant)
    unreadable = [line for line in lines if line.get('event') == 'unreadable records']
    assert len(unreadable) == 1
    assert unreadable[0]['step'] == 1
    assert unreadable[0]['records'] == ['synthetic/train:7 crc32']
    steps = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        has_null = None in (line['loss'], line['grad_norm'])
        assert has_null == (line['step'] == 3)
    events = [line for line in lines if line.get('event') == 'non-finite step']
    assert len(events) == 1
    assert events[0]['step'] == 3
    assert len(events[0]['records']) == 16

    done = json.loads((tmp_path / 'done.json').read_text())
    assert done['skipped_steps'] == 1
    after, _, _ = state_of(tmp_path, config, step=4)
    final, _, _ = state_of(tmp_path, config)
    chex.assert_tree_all_finite((after, final))


def test_a_non_finite_step_changes_nothing_but_the_counters():
    """Parameters, moments and statistics stay bit for bit; only the step and the guard count on.

    It is the second step: the learning rate of the first is 0.
    """
    config = tiny.config()
    data = poisoned(data_pipelines.open(config), {1})
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        batches = data.train(0, config.batch_size)
        state, _ = built.step(
            built.init(), feature_extractor.place_on_mesh(next(batches), built.mesh)
        )
        before = jax.device_get(state)
        state, step_metrics = built.step(
            state, feature_extractor.place_on_mesh(next(batches), built.mesh)
        )
    after = jax.device_get(state)
    assert step_metrics['lr'] > 0
    assert not np.isfinite(step_metrics['grad_norm'])
    expected = before.replace(step=np.int32(2), bad=np.int32(1), skipped=np.int32(1))
    chex.assert_trees_all_equal(after, expected)
    chex.assert_trees_all_equal_dtypes(after, before)


def test_speed_goodput_and_mfu_of_a_log_line(monkeypatch):
    """Ten seconds of compiling, then eight of steps, five of evaluation, four of steps.

    Of the eight, two are spent waiting for data and one saving.
    """
    clock = [0.0]
    monkeypatch.setattr(metrics.time, 'monotonic', lambda: clock[0])
    meter = metrics.Meter(flops=3e9, peak=1e12)
    clock[0] = 10
    meter.reset()
    clock[0] = 18
    meter.waited = 2.0
    meter.lost = 1.0
    meter.clips = 80
    assert meter.read() == {
        'clips_per_s': 10,
        'data_wait': 0.25,
        'goodput': 5 / 18,
        'mfu': pytest.approx(10 * 3e9 / 1e12),
    }
    clock[0] = 23
    meter.reset()
    clock[0] = 27
    meter.clips = 8
    assert meter.read()['goodput'] == pytest.approx(9 / 27)
    assert 'mfu' not in metrics.Meter().read()
    assert chips.peak_of(jax.devices()) is None
    chip = type('Device', (), {'device_kind': 'TPU v5 lite'})
    assert chips.peak_of([chip] * 4) == 4 * 197e12


@pytest.mark.slow
def test_chosen_steps_are_profiled_and_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, 'peak_of', lambda devices: 1e12)
    run(tmp_path, tiny.config(steps=4, profile=(2, 3)))
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
    steps = [line for line in log_lines(tmp_path) if 'loss' in line]
    assert len(steps) == 4
    for line in steps:
        assert 0 < line['mfu'] < 1
        assert 0 < line['goodput'] <= 1


def test_several_non_finite_steps_stop_the_run(tmp_path):
    config = tiny.config()
    data = poisoned(data_pipelines.open(config), {3, 4})
    message = '2 non-finite steps in a row up to step 5; the last good checkpoint is step'
    with pytest.raises(loop.TrainingStopped, match=message):
        loop.train(config, data, tmp_path, quiet=True)


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """(folder, config, final state) of a run with averaged parameters and a frozen table."""
    folder = tmp_path_factory.mktemp('averaged')
    config = tiny.config(
        optimizer__ema=0.5, optimizer__frozen=('word_table',), optimizer__name='keras_adam', steps=3
    )
    run(folder, config)
    return folder, config, state_of(folder, config)[0]


def test_parameter_averaging(averaged):
    """The average differs from the last parameters, and is what load_model returns."""
    folder, _, state = averaged
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.ema, state.params['model'])
    _, variables, _ = checkpoint.load_model(folder, sharding.make_mesh({'replica': -1}))
    chex.assert_trees_all_equal(variables['params'], state.ema)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(state.ema, state.params['model'])


def test_compiler_options_are_checked_and_reach_the_step(tmp_path, monkeypatch):
    config = tiny.config()
    config.compiler_options = {'xla_cpu_use_fusion_emitter': False}
    message = 'xla_cpu_use_fusion_emitter=False is not taken by XLA on cpu.*No such compile option'
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / 'run', config)
    assert not (tmp_path / 'run').exists()

    config.compiler_options = {'xla_llvm_disable_expensive_passes': True}
    options_by_name = []
    jit = jax.jit

    def recording_jit(function, **kwargs):
        options_by_name.append((function.__name__, kwargs.get('compiler_options')))
        return jit(function, **kwargs)

    monkeypatch.setattr(jax, 'jit', recording_jit)
    loop.build(config, data_pipelines.open(config))
    assert ('step', {'xla_llvm_disable_expensive_passes': True}) in options_by_name


def kmeans_config():
    config = tiny.config(data__views=(('video.second', {'kind': 'clip'}),))
    objective = {
        'name': 'kmeans_labels',
        'views': ('video', 'video.second', 'audio'),
        'clusters': 4,
        'every': 3,
        'iterations': 3,
    }
    config.objective = type(config)(objective)
    return config


@pytest.fixture(scope='module')
def kmeans(tmp_path_factory):
    """(folder, its done.json) of six steps with refreshes before the first and the fourth."""
    folder = tmp_path_factory.mktemp('kmeans')
    return folder, run(folder, kmeans_config())


def test_another_objective_through_the_same_loop(kmeans, tmp_path, monkeypatch):
    """Own parameters, state, refresh with fresh slots, columns and two views.

    Stopped between refreshes it continues exactly. Neither a refresh nor the new start makes the
    step be traced again.
    """
    folder, expected = kmeans
    config = kmeans_config()
    traces.limit_step_to_one(monkeypatch, config, data_pipelines.open(config))
    with stop_at(4):
        run(tmp_path / 'cut', config)
    done = run(tmp_path / 'cut', kmeans_config())
    assert done['digests'] == expected['digests']
    assert done['order'] == expected['order']

    state, _, columns = state_of(folder, kmeans_config())
    clusters = columns['cluster.joint']
    chex.assert_shape(clusters, (64,))
    assert set(np.unique(clusters)) <= set(range(4))
    assert set(state.params['objective']) == {'video', 'video.second', 'audio'}
    chex.assert_tree_all_finite(state)
    np.testing.assert_allclose(float(state.objective['frequency']['joint'].sum()), 1, rtol=1e-5)


def test_refresh_gives_fresh_optimizer_slots(kmeans):
    """After a refresh and one step the classifier's moments are those of a first step.

    Step 3 is saved, then comes the refresh, then step 4. With m_3 = v_3 = 0 and gradient g,

        m_4 = 0.1 g    and    v_4 = 0.001 g^2 = 0.001 (m_4 / 0.1)^2

    element by element, which no older slot would satisfy.
    """
    folder, _ = kmeans
    state, meta, _ = state_of(folder, kmeans_config(), step=4)
    optimizer = kmeans_config().optimizer
    assert meta['step'] == 4
    assert (optimizer.name, optimizer.b1, optimizer.b2) == ('adam', 0.9, 0.999)
    slots = by_path(state.opt_state)
    first_moments = [path for path in slots if '.mu' in path and "['objective']" in path]
    assert first_moments
    for path in first_moments:
        mu, nu = slots[path], slots[path.replace('.mu', '.nu')]
        np.testing.assert_allclose(nu, 0.001 * (mu / 0.1) ** 2, rtol=1e-3, atol=1e-12)


def test_evaluations_of_a_run_are_compiled_once(whole, tmp_path, monkeypatch):
    """The second one, of other weights, traces nothing, and its numbers are of those weights."""
    folder, _ = whole
    config = tiny.config()
    retrieval = {'type': 'retrieval', 'limit': 16, 'pairs': (('audio', 'video', 'va'),)}
    config.evals = {'retrieval': retrieval}
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    assert built.encoder is None  # made, and traced, by the first evaluation
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.checkpoint)
    num_traces = 0
    device_stage = preprocess.device_stage

    def counting_stage(*args, **kwargs):
        nonlocal num_traces
        num_traces += 1
        return device_stage(*args, **kwargs)

    chex.clear_trace_counter()
    limited_stage = chex.assert_max_traces(counting_stage, n=1)
    monkeypatch.setattr(feature_extractor.preprocess, 'device_stage', limited_stage)
    similarity = []
    with jax.set_mesh(built.mesh):
        for step in (4, 6):
            state, _, _ = checkpoints.restore(step, built.shape, built.shardings)
            loop.evaluate(config, built, state, data, tmp_path, step)
            arrays = np.load(tmp_path / 'evals' / f'step_{step:06d}' / 'arrays.npz')
            similarity.append(arrays['retrieval/audio_to_video/similarity'])
    checkpoints.close()
    assert num_traces == 1
    chex.assert_equal_shape(similarity)
    chex.assert_tree_all_finite(similarity)
    assert (similarity[0] != similarity[1]).any()


def test_training_files_name_no_objective():
    root = pathlib.Path(vatt_jax.__file__).parent
    shared = [*root.glob('training/*.py'), *root.glob('optim/*.py'), *root.glob('inference/*.py')]
    assert len(shared) > 6
    # What the calls `detect`, `localise` and `caption` of a loaded model are: each serves one
    # method.
    shared = [
        file for file in shared if file.name not in ('detector.py', 'localiser.py', 'captioner.py')
    ]
    names = [*objectives.OBJECTIVES, 'nce', 'kmeans', 'contrast', 'cluster', 'sinkhorn']
    for file in shared:
        text = file.read_text().lower()
        found = [name for name in names if re.search(rf'\b{name}', text)]
        assert not found, f'{file.name} names {found}'


def test_init_from_takes_leaves_and_renames(whole, tmp_path):
    folder, _ = whole
    config = tiny.config(init_from=str(folder), init_skip=('^head/',))
    built = loop.build(config, data_pipelines.open(config))
    state = built.init()
    fresh = state.params['model']
    other = starting_values.read(config.init_from, skip=config.init_skip)
    params = other.take('params', fresh)
    source = checkpoint.read_model(checkpoint.find(folder))['params']
    expected = {**source, 'head': fresh['head']}
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(expected), strict=True)
    assert other.skipped
    assert all('head/' in path for path in other.skipped)
    run(tmp_path, config)


def test_init_from_mistakes_are_sentences(whole, tmp_path):
    folder, _ = whole
    wide = tiny.config(init_from=str(folder))
    wide.model.head.va = 24
    message = r'config.init_from=.*has shape \(.*this model wants .*init_skip'
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, wide)
    with pytest.raises(ConfigError, match='holds no checkpoint'):
        run(tmp_path, tiny.config(init_from=str(tmp_path / 'nowhere')))
    assert not (tmp_path / 'config.json').exists()  # nothing was written


def test_run_folder_of_another_model_is_refused(whole):
    folder, _ = whole
    before = sorted(path.name for path in folder.iterdir())
    config = tiny.config()
    config.model.towers.video.layers = 3
    message = 'config.model.towers.video.layers=2 and this config has 3'
    with pytest.raises(ConfigError, match=message):
        run(folder, config)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_run_folder_older_than_a_field_of_the_model_is_continued(whole, tmp_path):
    folder, _ = whole
    stored = json.loads((folder / 'config.json').read_text())
    del stored['model']['inputs']['video']['range']
    del stored['compiler_options']
    (tmp_path / 'checkpoints' / '6').mkdir(parents=True)
    (tmp_path / 'checkpoints' / '6' / '_CHECKPOINT_METADATA').touch()
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    loop.check_run_folder(tiny.config(), tmp_path)
    config = tiny.config()
    config.model.head.va = 24
    with pytest.raises(ConfigError, match='model.head.va'):
        loop.check_run_folder(config, tmp_path)


def test_unreadable_checkpoint_is_a_sentence(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints').rglob('*'):
        if file.is_file() and file.parent.name == 'd':
            file.write_bytes(b'')
    with pytest.raises(ConfigError, match='every checkpoint in .* is damaged'):
        run(tmp_path / 'run', tiny.config(steps=8))


def without_rows(stream, is_missing):
    """A stream of a host batch whose rows are zeros and not valid where `is_missing` says so."""
    arrays = {}
    for name, array in stream.items():
        arrays[name] = array.copy()
        arrays[name][is_missing] = 0
    return arrays


def changed(before, after):
    """The paths of the leaves that differ between two trees of the same shape."""
    before, after = by_path(before), by_path(after)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    return {path for path in before if (before[path] != after[path]).any()}


def test_missing_modalities_train(tmp_path):
    """Batches in which no clip has audio, and a third no text.

    Finite, and towers that saw nothing do not move.
    """
    config = tiny.config()
    data = data_pipelines.open(config)
    open_batches = data.train
    no_audio = np.ones(16, bool)
    no_text = np.arange(16) % 3 == 0

    def batches(*args, **kwargs):
        for batch in open_batches(*args, **kwargs):
            batch['audio'] = without_rows(batch['audio'], no_audio)
            batch['text'] = without_rows(batch['text'], no_text)
            yield batch

    data.train = batches
    loop.train(config, data, tmp_path, quiet=True)
    assert np.isfinite(list(losses(tmp_path).values())).all()
    state, _, _ = state_of(tmp_path, config)
    chex.assert_tree_all_finite(state)
    start = loop.build(config, data_pipelines.open(config)).init()
    moved = changed(start.params['model'], state.params['model'])
    assert not any('audio' in path for path in moved)
    assert any('video' in path for path in moved)
    assert any('text' in path for path in moved)


def test_frozen_parameters_stay_and_have_no_slots(averaged):
    _, config, state = averaged
    first = loop.build(config, data_pipelines.open(config)).init()
    front = state.params['model']['fronts_text']
    first_front = first.params['model']['fronts_text']
    chex.assert_trees_all_equal(front['word_table'], first_front['word_table'], strict=True)
    slot_shapes = [slot.shape for slot in jax.tree.leaves(state.opt_state)]
    assert front['word_table'].shape not in slot_shapes
    moved = changed(first_front, front)
    assert "['projection']['kernel']" in moved
    assert "['word_table']" not in moved


def test_multi_label_fine_tuning_runs_and_position_tables_are_resized_from_init(whole, tmp_path):
    folder, _ = whole
    config = tiny.config(init_from=str(folder))
    config.model.inputs.audio.samples = 512  # 8 patches where the run before had 16
    config.model.head = {'name': 'none'}
    config.model.towers = {'audio': config.model.towers.audio}
    config.objective = {
        'name': 'classification',
        'stream': 'audio',
        'label': 'class',
        'form': 'sigmoid',
        'dropout': 0.0,
        'mixup': 5,
    }
    config.optimizer.update({'name': 'keras_sgd', 'clip': 0.75, 'clip_paths': ('^model/',)})
    done = run(tmp_path, config)
    assert done['step'] == 6
    assert done['skipped_steps'] == 0
    assert np.isfinite(list(losses(tmp_path).values())).all()
    params = checkpoint.read_model(checkpoint.find(tmp_path))['params']
    chex.assert_axis_dimension(
        params['fronts_audio']['positions']['temporal_positions'], axis=0, expected=8
    )
