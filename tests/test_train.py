"""The loop end to end on the synthetic source: resume, meshes, guard, accumulation, refresh, start order."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
import vatt_jax
from tests import tiny
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.training import checkpoint, loop


def run(workdir, config):
    data = data_pipelines.open(config)
    loop.train(config, data, workdir, quiet=True)
    file = pathlib.Path(workdir) / 'done.json'
    return json.loads(file.read_text()) if file.exists() else None


def losses(workdir):
    lines = [
        json.loads(line)
        for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    ]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def state_of(workdir, config, step=None):
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    keeper = checkpoint.Checkpoints(pathlib.Path(workdir) / 'checkpoints', config.checkpoint)
    state, meta, columns = keeper.restore(
        keeper.latest() if step is None else step, built.shape, built.shardings
    )
    keeper.close()
    return state, meta, columns


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run, the reference of several tests."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, run(folder, tiny.config())


def test_learns_and_logs(whole):
    folder, done = whole
    curve = losses(folder)
    assert sorted(curve) == [1, 2, 3, 4, 5, 6] and all(np.isfinite(list(curve.values())))
    assert done['step'] == 6 and done['consumed'] == 96 and done['skipped_steps'] == 0
    assert (folder / 'config.json').exists() and list((folder / 'tensorboard').glob('events*'))


def test_resume_is_exact(whole, tmp_path):
    """Stopped after four steps and continued: same losses, same digests of parameters, moments and records seen."""
    folder, want = whole
    first = tiny.config()
    with stop_at(3):
        run(tmp_path, first)
    assert not (tmp_path / 'done.json').exists()
    got = run(tmp_path, tiny.config())
    assert got['digests'] == want['digests'] and got['order'] == want['order']
    assert losses(tmp_path) == losses(folder)


class stop_at:
    """SIGTERM's effect before a step, without a signal."""

    def __init__(self, step):
        self.step = step

    def __enter__(self):
        self.original = loop.distributed.StopSignal.should_stop
        loop.distributed.StopSignal.should_stop = lambda stop, step: step >= self.step

    def __exit__(self, *_):
        loop.distributed.StopSignal.should_stop = self.original


@pytest.mark.parametrize(
    'mesh',
    [
        {'replica': 2, 'fsdp': 2, 'model': 2},
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ({'replica': 8}, {'fsdp': 8}, {'replica': 2, 'seq': 4})
        ),
    ],
)
def test_same_numbers_on_any_mesh(whole, tmp_path, mesh):
    """Losses within 2e-4 of one device's, parameters after six steps within 1e-3 of their norm; and over each axis by itself something moves in the
    compiled step (sums of gradients, gathered weights, halves of products, tokens), so none of them is left unsharded."""
    folder, want = whole
    config = tiny.config()
    config.mesh.update(mesh)
    got = run(tmp_path, config)
    assert got['order'] == want['order']
    a, b = losses(folder), losses(tmp_path)
    np.testing.assert_allclose([b[s] for s in a], [a[s] for s in a], rtol=2e-4)
    mine, theirs = (
        jax.tree.leaves(state_of(*of)[0].params)
        for of in ((tmp_path, config), (folder, tiny.config()))
    )
    norm = lambda xs: sum((np.asarray(x) ** 2).sum() for x in xs) ** 0.5
    assert norm(
        [np.asarray(x) - np.asarray(y) for x, y in zip(mine, theirs, strict=True)]
    ) < 1e-3 * norm(theirs)
    built = loop.build(config, data_pipelines.open(config))
    with jax.set_mesh(built.mesh):
        found = tiny.axes_of_collectives(
            built.step.lower(built.shape, built.batch).compile(), built.mesh
        )
    assert all({axis} in found for axis, size in mesh.items() if size > 1)


def test_restore_on_another_mesh_and_batch_size(whole, tmp_path):
    """Six steps of 16 on one device, then on with 24 rows a step over fsdp=4 × replica=2: the order continues where it was."""
    folder, _ = whole
    shutil.copytree(folder, tmp_path / 'run')
    config = tiny.config(steps=8, batch_size=24)
    config.mesh.update({'replica': 2, 'fsdp': 4})
    data = data_pipelines.open(config)
    seen = []
    original = data.train
    data.train = lambda consumed, *a, **k: seen.append(consumed) or original(consumed, *a, **k)
    loop.train(config, data, tmp_path / 'run', quiet=True)
    done = json.loads((tmp_path / 'run' / 'done.json').read_text())
    assert seen == [96] and done['step'] == 8 and done['consumed'] == 96 + 48
    state, _, _ = state_of(tmp_path / 'run', config)
    kernel = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    assert len(kernel.sharding.device_set) == 8 and any(kernel.sharding.spec)


def next_loss(folder, config):
    """(digests of the state as restored, loss of the step after) of a run's newest checkpoint under another config."""
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    keeper = checkpoint.Checkpoints(folder / 'checkpoints', config.checkpoint)
    with jax.set_mesh(built.mesh):
        state, meta, _ = keeper.restore(keeper.latest(), built.shape, built.shardings)
        keeper.close()
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == built.mesh.size
        digests = {
            k: checkpoint.digest(getattr(state, k))
            for k in ('params', 'batch_stats', 'opt_state', 'objective')
        }
        batch = feature_extractor.place_on_mesh(
            next(data.train(meta['consumed'], config.batch_size)), built.mesh
        )
        return digests, float(built.step(state, batch)[1]['loss'])


@pytest.mark.parametrize(
    'devices, mesh',
    [(1, {}), (2, {'fsdp': 2}), (4, {'fsdp': 2, 'replica': 2}), (8, {'fsdp': 4, 'replica': 2})],
)
@pytest.mark.slow
def test_a_checkpoint_is_restored_on_any_number_of_devices(whole, devices, mesh):
    """Saved on one device: the same parameters, moments and statistics bit for bit, and the next loss up to the order of float32 sums."""
    folder, want = whole
    config = tiny.config(steps=7)
    config.mesh.update(mesh)
    digests, loss = next_loss(folder, config)
    assert digests == want['digests']
    assert loss == pytest.approx(next_loss(folder, tiny.config(steps=7))[1], rel=1e-5)


def test_a_checkpoint_is_restored_between_scanned_and_unrolled_layers(whole, tmp_path):
    """Unrolled, continued scanned, and back: the state bit for bit, the next loss up to rounding; the same through init_from."""
    folder, want = whole
    unrolled, scanned = tiny.config(steps=7), tiny.config(steps=7, model__scan=True)
    digests, loss = next_loss(folder, scanned)
    assert digests == want['digests'] and loss == pytest.approx(
        next_loss(folder, unrolled)[1], rel=1e-5
    )
    shutil.copytree(folder, tmp_path / 'run')
    done = run(tmp_path / 'run', scanned)
    state, _, _ = state_of(tmp_path / 'run', unrolled)
    assert (
        done['step'] == 7
        and checkpoint.digest(state.params)
        == done['digests']['params']
        != want['digests']['params']
    )
    fresh = loop.build(unrolled, data_pipelines.open(unrolled)).init()
    params, _, left = checkpoint.init_from(
        str(tmp_path / 'run'), fresh.params['model'], fresh.batch_stats, (), ()
    )
    assert not left and checkpoint.digest(params) == checkpoint.digest(state.params['model'])


def test_accumulation_averages_microbatches(tmp_path):
    """The loss of a step of two microbatches of 8 is the mean of theirs, each with the random bits of its own rows."""
    from vatt_jax.inference import feature_extractor
    from vatt_jax.inputs import preprocess
    from vatt_jax.rng import Rng
    from vatt_jax.training import train_step

    config = tiny.config(accumulate=2)
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = feature_extractor.place_on_mesh(next(data.train(0, 16)), built.mesh)
        new, metrics = jax.jit(train_step.make(config, built.model, built.objective, built.tx))(
            state, batch
        )
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
            loss = jax.jit(
                lambda state, rows, rng: (
                    built.objective.loss(
                        built.model,
                        {'params': state.params['model'], 'batch_stats': state.batch_stats},
                        {},
                        {},
                        rows,
                        rng,
                    ).value
                )
            )
            values.append(float(loss(state, rows, rng)))
    np.testing.assert_allclose(float(metrics['loss']), np.mean(values), rtol=1e-5)
    assert int(new.step) == 1


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


def test_non_finite_step_is_skipped_counted_and_named(tmp_path):
    config = tiny.config()
    data = poisoned(data_pipelines.open(config), {2})
    data.problems = lambda: {'corrupt': 2, 'read': 96, 'indices': [('synthetic/train', 7, 'crc32')]}
    loop.train(config, data, tmp_path, quiet=True)
    strict = {'parse_constant': lambda name: pytest.fail(f'{name} is no JSON')}
    lines = [
        json.loads(line, **strict) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()
    ]
    assert [
        (line['step'], line['records'])
        for line in lines
        if line.get('event') == 'unreadable records'
    ] == [(1, ['synthetic/train:7 crc32'])]
    assert [None in (line['loss'], line['grad_norm']) for line in lines if 'loss' in line] == [
        step == 3 for step in range(1, 7)
    ]
    events = [line for line in lines if line.get('event') == 'non-finite step']
    assert len(events) == 1 and events[0]['step'] == 3 and len(events[0]['records']) == 16
    done = json.loads((tmp_path / 'done.json').read_text())
    assert done['skipped_steps'] == 1
    state, _, _ = state_of(tmp_path, config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def test_speed_goodput_and_mfu_of_a_log_line(monkeypatch):
    """Ten seconds of compiling, then eight of steps with 2 s of waiting and 1 s of saving, five of evaluation, four of steps."""
    from vatt_jax.performance import chips
    from vatt_jax.training import metrics

    now = [0.0]
    monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
    meter = metrics.Meter(flops=3e9, peak=1e12)
    now[0] = 10
    meter.reset()
    now[0], meter.waited, meter.lost, meter.clips = 18, 2.0, 1.0, 80
    assert meter.read() == {
        'clips_per_s': 10,
        'data_wait': 0.25,
        'goodput': 5 / 18,
        'mfu': pytest.approx(10 * 3e9 / 1e12),
    }
    now[0] = 23
    meter.reset()
    now[0], meter.clips = 27, 8
    assert meter.read()['goodput'] == pytest.approx(9 / 27)
    assert 'mfu' not in metrics.Meter().read()
    assert chips.peak_of(jax.devices()) is None
    kind = type('Device', (), {'device_kind': 'TPU v5 lite'})
    assert chips.peak_of([kind] * 4) == 4 * 197e12


@pytest.mark.slow
def test_chosen_steps_are_traced_and_mfu_is_told_where_the_peak_is_known(tmp_path, monkeypatch):
    from vatt_jax.performance import chips

    monkeypatch.setattr(chips, 'peak_of', lambda devices: 1e12)
    run(tmp_path, tiny.config(steps=4, profile=(2, 3)))
    assert list((tmp_path / 'profile').rglob('*.xplane.pb'))
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert all(0 < x['mfu'] < 1 and 0 < x['goodput'] <= 1 for x in lines if 'loss' in x)


def test_several_non_finite_steps_stop_the_run(tmp_path):
    config = tiny.config()
    with pytest.raises(
        loop.TrainingStopped,
        match='2 non-finite steps in a row up to step 5; the last good checkpoint is step',
    ):
        loop.train(config, poisoned(data_pipelines.open(config), {3, 4}), tmp_path, quiet=True)


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
    folder, _, state = averaged
    # After k steps the average is sum of 0.5^i-weighted parameters: it differs from both ends and is what load_model returns.
    from vatt_jax.parallel import sharding

    _, variables, _ = checkpoint.load_model(folder, sharding.make_mesh({'replica': -1}))
    for a, b in zip(jax.tree.leaves(variables['params']), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(
            jax.tree.leaves(state.ema), jax.tree.leaves(state.params['model']), strict=True
        )
    )


def test_compiler_options_are_checked_and_reach_the_step(tmp_path, monkeypatch):
    config = tiny.config()
    config.compiler_options = {'xla_cpu_use_fusion_emitter': False}
    with pytest.raises(
        ConfigError,
        match='xla_cpu_use_fusion_emitter=False is not taken by XLA on cpu.*No such compile option',
    ):
        run(tmp_path / 'run', config)
    assert not (tmp_path / 'run').exists()
    config.compiler_options = {'xla_llvm_disable_expensive_passes': True}
    compiled, jit = [], jax.jit
    monkeypatch.setattr(
        loop.jax,
        'jit',
        lambda f, **k: compiled.append((f.__name__, k.get('compiler_options'))) or jit(f, **k),
    )
    loop.build(config, data_pipelines.open(config))
    assert ('step', {'xla_llvm_disable_expensive_passes': True}) in compiled


def kmeans_config(**overrides):
    config = tiny.config(data__views=(('video.second', {'kind': 'clip'}),), **overrides)
    config.objective = type(config)(
        {
            'name': 'kmeans_labels',
            'views': ('video', 'video.second', 'audio'),
            'clusters': 4,
            'every': 3,
            'iterations': 3,
        }
    )
    return config


@pytest.fixture(scope='module')
def kmeans(tmp_path_factory):
    """(folder, its done.json) of six steps with refreshes before the first and the fourth."""
    folder = tmp_path_factory.mktemp('kmeans')
    return folder, run(folder, kmeans_config())


def test_another_objective_through_the_same_loop(kmeans, tmp_path):
    """Own parameters, state, refresh with fresh slots, columns and two views; killed between refreshes it continues exactly."""
    folder, want = kmeans
    with stop_at(4):
        run(tmp_path / 'cut', kmeans_config())
    got = run(tmp_path / 'cut', kmeans_config())
    assert got['digests'] == want['digests'] and got['order'] == want['order']
    state, meta, columns = state_of(folder, kmeans_config())
    assert columns['cluster.joint'].shape == (64,) and set(
        np.unique(columns['cluster.joint'])
    ) <= set(range(4))
    assert set(state.params['objective']) == {'video', 'video.second', 'audio'}
    np.testing.assert_allclose(float(state.objective['frequency']['joint'].sum()), 1, rtol=1e-5)


def test_refresh_gives_fresh_optimizer_slots(kmeans):
    """Right after a refresh (step 3 saved, then refresh, one step) the classifier's first moment is 0.1 × one gradient: its second
    moment then equals 0.001/0.01 of its square, element by element, which no older slot would satisfy."""
    state, meta, _ = state_of(kmeans[0], kmeans_config(), step=4)
    assert meta['step'] == 4 and [kmeans_config().optimizer[k] for k in ('name', 'b1', 'b2')] == [
        'adam',
        0.9,
        0.999,
    ]
    paths = {
        jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    pairs = [(k, k.replace('.mu', '.nu')) for k in paths if '.mu' in k and "['objective']" in k]
    assert pairs
    for mu, nu in pairs:
        np.testing.assert_allclose(
            paths[nu], 0.001 * (np.asarray(paths[mu]) / 0.1) ** 2, rtol=1e-3, atol=1e-12
        )


def test_evaluations_of_a_run_are_compiled_once(whole, tmp_path, monkeypatch):
    """The second one, of other weights, traces nothing, and its numbers are of those weights."""
    from vatt_jax.inference import feature_extractor

    config = tiny.config()
    config.evals = {
        'retrieval': {'type': 'retrieval', 'limit': 16, 'pairs': (('audio', 'video', 'va'),)}
    }
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    keeper = checkpoint.Checkpoints(whole[0] / 'checkpoints', config.checkpoint)
    traced, stage = [], feature_extractor.preprocess.device_stage
    monkeypatch.setattr(
        feature_extractor.preprocess,
        'device_stage',
        lambda *a, **k: traced.append(1) or stage(*a, **k),
    )
    with jax.set_mesh(built.mesh):
        for step in (4, 6):
            loop.evaluate(
                config,
                built,
                keeper.restore(step, built.shape, built.shardings)[0],
                data,
                tmp_path,
                step,
            )
    keeper.close()
    assert len(traced) == 1
    similarity = [
        np.load(tmp_path / 'evals' / f'step_00000{i}' / 'arrays.npz')[
            'retrieval/audio_to_video/similarity'
        ]
        for i in (4, 6)
    ]
    assert (similarity[0] != similarity[1]).any()


def test_training_files_name_no_objective():
    root = pathlib.Path(vatt_jax.__file__).parent
    shared = [*root.glob('training/*.py'), *root.glob('optim/*.py'), *root.glob('inference/*.py')]
    assert len(shared) > 6
    names = [*objectives.OBJECTIVES, 'nce', 'kmeans', 'contrast', 'cluster', 'sinkhorn']
    for file in shared:
        text = file.read_text().lower()
        found = [n for n in names if re.search(rf'\b{n}', text)]
        assert not found, f'{file.name} names {found}'


def test_init_from_takes_leaves_and_renames(whole, tmp_path):
    folder, _ = whole
    config = tiny.config(init_from=str(folder), init_skip=('^head/',))
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    state = built.init()
    params, _, left = checkpoint.init_from(
        config.init_from, state.params['model'], state.batch_stats, (), config.init_skip
    )
    source = checkpoint.read_model(checkpoint.find(folder))['params']
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    for name, mine, theirs, fresh in zip(
        names,
        jax.tree.leaves(params),
        jax.tree.leaves(source),
        jax.tree.leaves(state.params['model']),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, fresh if "['head']" in name else theirs)
    assert left and all('head/' in n for n in left)
    run(tmp_path, config)


def test_init_from_mistakes_are_sentences(whole, tmp_path):
    folder, _ = whole
    wide = tiny.config(init_from=str(folder))
    wide.model.head.va = 24
    with pytest.raises(
        ConfigError, match=r'config.init_from=.*has shape \(.*this model wants .*init_skip'
    ):
        run(tmp_path, wide)
    with pytest.raises(ConfigError, match='holds no checkpoint'):
        run(tmp_path, tiny.config(init_from=str(tmp_path / 'nowhere')))
    assert not (tmp_path / 'config.json').exists()  # nothing was written


def test_run_folder_of_another_model_is_refused(whole):
    folder, _ = whole
    before = sorted(p.name for p in folder.iterdir())
    config = tiny.config()
    config.model.towers.video.layers = 3
    with pytest.raises(
        ConfigError, match='config.model.towers.video.layers=2 and this config has 3'
    ):
        run(folder, config)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_run_folder_older_than_a_field_of_the_model_is_continued(whole, tmp_path):
    stored = json.loads((whole[0] / 'config.json').read_text())
    del stored['model']['inputs']['video']['range'], stored['compiler_options']
    (tmp_path / 'checkpoints' / '6').mkdir(parents=True)
    (tmp_path / 'checkpoints' / '6' / '_CHECKPOINT_METADATA').touch()
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    loop.check_run_folder(tiny.config(), tmp_path)
    with pytest.raises(ConfigError, match='model.head.va'):
        config = tiny.config()
        config.model.head.va = 24
        loop.check_run_folder(config, tmp_path)


def test_unreadable_checkpoint_is_a_sentence(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / 'run')
    for file in (tmp_path / 'run' / 'checkpoints').rglob('*'):
        if file.is_file() and file.parent.name == 'd':
            file.write_bytes(b'')
    with pytest.raises(ConfigError, match='every checkpoint in .* is damaged'):
        run(tmp_path / 'run', tiny.config(steps=8))


def test_missing_modalities_train(tmp_path):
    """Batches in which some or all clips lack audio or text: finite, and towers that saw nothing do not move."""
    config = tiny.config()
    data = data_pipelines.open(config)
    original = data.train

    def batches(*args, **kwargs):
        for batch in original(*args, **kwargs):
            for stream in ('audio', 'text'):
                gone = np.ones(16, bool) if stream == 'audio' else np.arange(16) % 3 == 0
                for part, x in batch[stream].items():
                    batch[stream][part] = np.where(
                        gone.reshape(-1, *[1] * (x.ndim - 1)), np.zeros((), x.dtype), x
                    )
            yield batch

    data.train = batches
    loop.train(config, data, tmp_path, quiet=True)
    assert all(np.isfinite(v) for v in losses(tmp_path).values())
    state, _, _ = state_of(tmp_path, config)
    built = loop.build(config, data_pipelines.open(config))
    start = built.init()
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)),
        jax.device_get(state.params['model']),
        jax.device_get(start.params['model']),
    )
    flat = {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(moved)}
    assert not any(v for k, v in flat.items() if 'audio' in k)
    assert any(v for k, v in flat.items() if 'video' in k) and any(
        v for k, v in flat.items() if 'text' in k
    )


def test_frozen_parameters_stay_and_have_no_slots(averaged):
    _, config, state = averaged
    data = data_pipelines.open(config)
    first = loop.build(config, data).init()
    table = lambda s: s.params['model']['fronts_text']['word_table']
    np.testing.assert_array_equal(table(state), table(first))
    assert table(state).shape not in [x.shape for x in jax.tree.leaves(state.opt_state)]
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        state.params['model']['fronts_text'],
        first.params['model']['fronts_text'],
    )
    assert moved['projection']['kernel'] and not moved['word_table']


def test_multi_label_fine_tuning_runs_and_position_tables_are_resized_from_init(whole, tmp_path):
    config = tiny.config(init_from=str(whole[0]))
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
    assert (
        done['step'] == 6
        and done['skipped_steps'] == 0
        and np.isfinite(list(losses(tmp_path).values())).all()
    )
    params = checkpoint.read_model(checkpoint.find(tmp_path))['params']
    assert params['fronts_audio']['positions']['temporal_positions'].shape[0] == 8
