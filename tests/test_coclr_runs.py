"""Runs of InfoNCE and CoCLR: teacher, queue and the frozen model of another run, in the loop."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from configs import coclr, default
from tests import tiny
from tests.configs.coclr import MOMENTUM, QUEUE, coclr_config, infonce_config
from tests.test_multiprocess import run_together
from tests.test_train import log_lines, losses, run, state_of, stop_at
from vatt_jax import config as configs
from vatt_jax import evals, phases
from vatt_jax.config import ConfigError
from vatt_jax.inference.feature_extractor import FeatureExtractor, place_on_mesh
from vatt_jax.inputs import preprocess
from vatt_jax.modes import embed, train_phases
from vatt_jax.objectives import Objective
from vatt_jax.objectives.memory import teacher as teachers
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.run_folder import RunFolder
from vatt_jax.training import checkpoint, frozen_models, loop, train_state

# Batches of 16 that fill the queue.
FILLING = 3
EVALS = {
    'neighbours': {
        'type': 'neighbours',
        'of': 'pooled',
        'windows': 1,
        'first': (1,),
        'query_limit': 16,
        'gallery_limit': 16,
        'baseline': False,
    }
}


@pytest.fixture(scope='module')
def sampler(tmp_path_factory):
    """The run folder of InfoNCE on sound."""
    folder = tmp_path_factory.mktemp('sampler') / 'audio'
    run(folder, infonce_config('audio', steps=3))
    return folder


@pytest.fixture(scope='module')
def mined(tmp_path_factory, sampler):
    """(run folder, done.json) of CoCLR on video with that sampler."""
    folder = tmp_path_factory.mktemp('mined') / 'video'
    return folder, run(folder, coclr_config(sampler))


@pytest.fixture(scope='module')
def states(mined, sampler):
    """{step: state of CoCLR}, on the host."""
    folder, _ = mined
    config = coclr_config(sampler)
    return {step: jax.device_get(state_of(folder, config, step)[0]) for step in (2, 4, 6)}


def test_nothing_is_mined_and_nothing_moves_while_the_queue_fills(mined, states):
    """The gauge and the number of positives in the log, and the parameters."""
    folder, _ = mined
    lines = log_lines(folder)
    assert [line['queue_filled'] for line in lines] == pytest.approx([0, 0.4, 0.8, 1, 1, 1])
    # 64 records: a queue of 40 seldom holds the one of a clip.
    assert all(line['positives'] < 1 for line in lines[:FILLING])
    assert all(line['positives'] >= 3 for line in lines[FILLING:])

    student = states[2].params['model']
    chex.assert_trees_all_equal(states[2].objective['teacher']['params'], student)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[4].params['model'], student)
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_the_teacher_follows_what_the_student_has_become(states):
    """t' = m t + (1 - m) s' in float64, in the one step between the queue's filling and step 4."""
    expected = jax.tree.map(
        lambda t, s: MOMENTUM * np.float64(t) + (1 - MOMENTUM) * np.float64(s),
        states[2].objective['teacher']['params'],
        states[4].params['model'],
    )
    chex.assert_trees_all_close(
        states[4].objective['teacher']['params'], expected, rtol=1e-5, atol=1e-7
    )


def test_the_teacher_has_batch_statistics_of_its_own(states):
    """They move from the first step on, by other clips than the student's."""
    for state in states.values():
        own, other = state.batch_stats, state.objective['teacher']['batch_stats']
        chex.assert_trees_all_equal_shapes(own, other)
        mean, teacher_mean = jax.tree.leaves(own)[0], jax.tree.leaves(other)[0]
        assert np.abs(teacher_mean).max() > 0
        assert np.abs(mean - teacher_mean).max() > 1e-5


def test_the_queue_holds_the_newest_records_in_their_order(sampler, states):
    """Those of the training order, wherever they lie in it; the last step wrote at `next`."""
    config = coclr_config(sampler)
    batches = data_pipelines.open(config).train(0, config.batch_size)
    # The synthetic source is one source, whose index is the record.
    seen = np.concatenate([next(batches)['index'] for _ in range(6)])
    queue = states[6].objective['queue']
    assert queue['is_full']
    assert int(queue['next']) == 6 * 16 % QUEUE
    newest = np.roll(queue['columns']['record'], -int(queue['next']))
    np.testing.assert_array_equal(newest, seen[-QUEUE:])
    lengths = np.linalg.norm(queue['columns']['key'], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_the_sampler_is_the_other_run_and_stays(sampler, states):
    """Bit by bit; in no optimizer, and only what its stream needs."""
    saved = checkpoint.read_model(checkpoint.find(sampler))
    for state in states.values():
        chex.assert_trees_all_equal(
            state.objective['sampler'],
            {'params': saved['params'], 'batch_stats': saved['batch_stats']},
        )
    slots = jax.tree.leaves(jax.tree.map(lambda x: str(x.shape), states[6].opt_state))
    assert 'nets_audio' not in str(slots)


def test_sampled_features_are_those_of_the_other_run_in_evaluation(sampler, states):
    """The same bits, of the same clips without augmentation; unit vectors but for the last one."""
    config = coclr_config(sampler)
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    batch = next(data.train(0, config.batch_size))

    mesh = sharding.make_mesh({'replica': 1})
    other_config, variables, _ = checkpoint.load_model(sampler, mesh)
    sound = {**batch, 'audio': batch['audio.second']}
    extractor = FeatureExtractor(other_config, variables, mesh)
    expected = extractor(sound)

    def sampled(variables, batch):
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch, config.model.inputs, config.augment, rng, augment=False, dtype='float32'
        )
        frozen = built.objective.frozen['sampler']
        outputs = frozen.outputs(variables, batch, ('audio.second',), rng)
        return outputs.encoded['audio.second'].pooled, built.objective.sampled(
            variables, batch, rng
        )

    pooled, found = jax.jit(sampled)(states[6].objective['sampler'], place_on_mesh(batch, mesh))
    np.testing.assert_array_equal(pooled, expected['pooled']['audio'])
    np.testing.assert_allclose(found, expected['spaces']['projection']['audio'], rtol=1e-6)


@pytest.mark.parametrize('stop', [2, 4], ids=['while it fills', 'when it is full'])
def test_resume_is_exact_and_needs_no_other_folder(mined, sampler, tmp_path, stop):
    _, expected = mined
    with stop_at(stop):
        run(tmp_path, coclr_config(sampler))
    elsewhere = sampler.with_name('elsewhere')
    sampler.rename(elsewhere)
    try:
        done = run(tmp_path, coclr_config(sampler))
    finally:
        elsewhere.rename(sampler)
    assert done['digests'] == expected['digests']
    assert done['order'] == expected['order']


def test_eight_devices_are_one(mined, sampler, tmp_path):
    """Losses, queue and teacher; what is split lies as the student does."""
    folder, _ = mined
    config = coclr_config(sampler, mesh__replica=4, mesh__fsdp=2)
    run(tmp_path, config)
    expected, found = losses(folder), losses(tmp_path)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3, atol=1e-5)
    state, _, _ = state_of(tmp_path, config)
    expected_state, _, _ = state_of(folder, coclr_config(sampler))
    chex.assert_trees_all_equal(
        state.objective['queue']['columns']['record'],
        expected_state.objective['queue']['columns']['record'],
    )
    for name in ('queue', 'teacher', 'sampler'):
        chex.assert_trees_all_close(
            jax.device_get(state.objective[name]),
            jax.device_get(expected_state.objective[name]),
            rtol=2e-3,
            atol=2e-3,
        )
    student = jax.tree.map(lambda x: x.sharding, state.params['model'])
    teacher = jax.tree.map(lambda x: x.sharding, state.objective['teacher']['params'])
    chex.assert_trees_all_equal(teacher, student)
    sampler_kernel = state.objective['sampler']['params']['nets_audio']['linear']['kernel']
    assert 'fsdp' in str(sampler_kernel.sharding.spec)


@pytest.mark.slow
def test_two_processes_are_one(mined, sampler, tmp_path):
    """Order, losses, and the records of the queue, which are pushed in global order."""
    folder, expected_done = mined
    run_together(
        tmp_path,
        '--config=tests/configs/coclr.py:coclr',
        f'--config.objective.sampler={sampler}',
        f'--workdir={tmp_path / "two"}',
    )
    done = json.loads((tmp_path / 'two' / 'done.json').read_text())
    assert done['order'] == expected_done['order']
    expected, found = losses(folder), losses(tmp_path / 'two')
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3, atol=1e-5)
    config = coclr_config(sampler)
    objective = state_of(tmp_path / 'two', config)[0].objective
    expected_objective = state_of(folder, config)[0].objective
    np.testing.assert_array_equal(
        objective['queue']['columns']['record'], expected_objective['queue']['columns']['record']
    )
    chex.assert_trees_all_equal(objective['sampler'], expected_objective['sampler'])
    chex.assert_trees_all_close(objective, expected_objective, rtol=2e-3, atol=2e-3)


def test_keys_in_microbatches_are_those_of_the_batch(tmp_path):
    """accumulation='exact' without batch norm; 'plain' pushes each microbatch by itself."""
    whole = infonce_config(normed=False, steps=4)
    run(tmp_path / 'whole', whole)
    exact = infonce_config(normed=False, steps=4, accumulate=4, accumulation='exact')
    run(tmp_path / 'exact', exact)
    expected, found = losses(tmp_path / 'whole'), losses(tmp_path / 'exact')
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4, atol=1e-5)
    expected_state = state_of(tmp_path / 'whole', whole)[0].objective
    chex.assert_trees_all_close(
        state_of(tmp_path / 'exact', exact)[0].objective, expected_state, rtol=1e-3, atol=1e-4
    )

    plain = infonce_config(normed=False, steps=1, accumulate=2, accumulation='plain')
    run(tmp_path / 'plain', plain)
    keys = state_of(tmp_path / 'plain', plain)[0].objective['queue']['columns']['key']
    first = state_of(tmp_path / 'whole', whole, step=2)[0].objective['queue']['columns']['key']
    # Microbatch a has the rows a, a + 2, …; the teacher of the first step is the same.
    in_parts = np.concatenate([first[0:16:2], first[1:16:2]])
    np.testing.assert_allclose(keys[:16], in_parts, rtol=1e-4, atol=1e-5)


def test_a_teacher_encodes_as_its_student_would(sampler):
    """Of the same clips: the same features and statistics; state returns through the encoding."""
    config = infonce_config()
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
    batch = next(data.train(0, config.batch_size))
    batch['video.second'] = batch['video']

    def encode(state, batch):
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch, config.model.inputs, config.augment, rng, augment=False, dtype='float32'
        )
        variables = {'params': state.params['model'], 'batch_stats': state.batch_stats}
        return built.objective.encode(built.model, variables, {}, state.objective, batch, rng)

    encoding = jax.jit(encode)(state, place_on_mesh(batch, built.mesh))
    np.testing.assert_array_equal(encoding.pooled['teacher/video.second'], encoding.pooled['video'])
    chex.assert_trees_all_equal(encoding.state['teacher']['batch_stats'], encoding.batch_stats)
    assert max(np.abs(x).max() for x in jax.tree.leaves(encoding.batch_stats)) > 0


# ---- the teacher in evaluation


def test_a_teacher_is_loaded_and_evaluated(mined, sampler, states, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(mined[0], folder)
    teacher = states[6].objective['teacher']
    loaded = vatt_jax.load(folder, which='teacher')
    chex.assert_trees_all_equal(jax.device_get(loaded.variables), teacher)
    student = vatt_jax.load(folder)
    chex.assert_trees_all_equal(
        jax.device_get(student.variables['params']), states[6].params['model']
    )

    config = coclr_config(sampler, evaluated='teacher', evals=ConfigDict(EVALS))
    built = loop.build(config, data_pipelines.open(config))
    state, _, _ = state_of(folder, config)
    with jax.set_mesh(built.mesh):
        loop.evaluate(config, built, state, data_pipelines.open(config), folder, 6)
    chex.assert_trees_all_equal(jax.device_get(built.encoder.variables), teacher)

    for which in ('student', 'teacher'):
        config.evaluated = which
        embed.run(config, folder, data_pipelines.open)
    files = sorted((folder / 'embeddings').glob('*.npz'))
    assert len(files) == 2
    by_which = {}
    for file in files:
        with np.load(file) as arrays:
            which = json.loads(str(arrays['source'])).get('evaluated', 'student')
            by_which[which] = arrays['pooled/video']
    assert np.abs(by_which['teacher'] - by_which['student']).max() > 1e-4


# ---- two streams of two runs

# Of an entry of config.evals; the run is named by the test.
BESIDE = {'type': 'neighbours', 'of': 'pooled', 'windows': 1, 'first': (1,), 'beside': ('audio',)}


def test_the_networks_of_two_runs_are_evaluated_together(mined, sampler, tmp_path):
    """The other run's network as it was saved; not beside the untrained one."""
    folder, _ = mined
    evaluators = {
        'both': {**BESIDE, 'beside_run': str(sampler)},
        'video': {**EVALS['neighbours'], 'query_limit': 32, 'gallery_limit': 64},
        'probe': {'type': 'linear_probe', 'beside': ('audio',), 'beside_run': str(sampler)},
    }
    config = coclr_config(sampler, evals=ConfigDict(evaluators))
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    state, _, _ = state_of(folder, config)
    with jax.set_mesh(built.mesh):
        scalars = loop.evaluate(config, built, state, data, tmp_path, 6)
        untrained = loop.evaluate(config, built, state, data, tmp_path, 0, tag='random_init')
    saved = checkpoint.read_model(checkpoint.find(sampler))
    other = built.others[str(sampler)]
    chex.assert_trees_all_equal(jax.device_get(other.variables)['params'], saved['params'])
    assert set(scalars) == {'both/R@1', 'video/R@1', 'probe/accuracy', 'probe/C'}
    assert untrained == {}

    results = evals.load(RunFolder(tmp_path).evaluation('step_000006'))
    both, video = results['both'].artifacts, results['video'].artifacts
    audio_width = saved['params']['nets_audio']['linear']['kernel'].shape[-1]
    assert both['width'] == video['width'] + audio_width
    assert both['queries'] == video['queries'] == 32
    assert [name for name, _ in results['probe'].artifacts['accuracy/streams']] == [
        'video',
        'audio',
    ]


@pytest.mark.parametrize(
    'fields, rate, message',
    [
        (
            {'beside_run': 'no/such'},
            2000,
            r'config\.evals\.both\.beside_run: no/such holds no check',
        ),
        ({'beside': ('text',)}, 2000, 'with a tower for the stream .text., got one for audio'),
        (
            {},
            4000,
            r'model\.inputs\.audio\.rate: expected 2000, as the model of config\.evals\.both',
        ),
    ],
)
def test_a_second_run_that_does_not_fit_is_refused(sampler, fields, rate, message):
    config = infonce_config(model__inputs__audio__rate=rate)
    config.evals.both = {**BESIDE, 'beside_run': str(sampler), **fields}
    with pytest.raises(ConfigError, match=message):
        loop.build(config, data_pipelines.open(config))


def test_a_run_without_a_teacher_says_so(plain_run):
    with pytest.raises(ConfigError, match='expected a run whose objective keeps a teacher'):
        vatt_jax.load(plain_run, which='teacher')
    with pytest.raises(ConfigError, match="which='mean': choose one of student, teacher"):
        vatt_jax.load(plain_run, which='mean')
    config = tiny.config(evaluated='teacher')
    message = "config.evaluated='teacher': the objective contrastive keeps no momentum copy"
    with pytest.raises(ConfigError, match=message):
        loop.check(config)


def test_a_teacher_of_a_part_is_evaluated_with_the_rest_of_the_student():
    """`evaluation_variables` lays the copy over the student's parameters."""

    class WithPart(Objective):
        def teacher(self, state):
            return state['teacher']

    params = {'a': jnp.ones(2), 'b': jnp.zeros(2)}
    state = train_state.TrainState(
        step=0,
        params={'model': params},
        batch_stats={},
        opt_state={},
        objective={'teacher': teachers.create({'a': jnp.full(2, 3.0)}, {})},
        ema={},
        bad=0,
        skipped=0,
    )
    found = train_state.evaluation_variables(state, WithPart({}), 'teacher')
    np.testing.assert_array_equal(found['params']['a'], 3)
    np.testing.assert_array_equal(found['params']['b'], 0)


# ---- phases


@pytest.mark.parametrize('other', ['audio', 'flow'])
def test_the_chain_of_the_demo_is_infonce_twice_then_coclr_twice(other, tmp_path):
    """Who starts from whom, and who mines for whom; each phase is a config without mistakes."""
    found = phases.resolve(coclr.get_config(f'demo,synthetic,{other}'), tmp_path)
    folders = {phase.name: str(phase.folder) for phase in found}
    assert list(folders) == ['infonce_video', f'infonce_{other}', 'coclr_video', f'coclr_{other}']
    names = {folder: name for name, folder in folders.items()}
    origins, samplers, others = {}, {}, {}
    for phase in found:
        loop.check(phase.config)
        runs = {entry.get('beside_run', '') for entry in phase.config.evals.values()} - {''}
        others[phase.name] = {names[run] for run in runs}
        origins[phase.name] = names.get(phase.config.init_from, '')
        samplers[phase.name] = names.get(phase.config.objective.get('sampler', ''), '')
    assert origins == {
        'infonce_video': '',
        f'infonce_{other}': '',
        'coclr_video': 'infonce_video',
        f'coclr_{other}': f'infonce_{other}',
    }
    assert samplers == {
        'infonce_video': '',
        f'infonce_{other}': '',
        'coclr_video': f'infonce_{other}',
        # The newest network of the video.
        f'coclr_{other}': 'coclr_video',
    }
    # The last one is evaluated by itself, and with the network of the video.
    assert others.pop(f'coclr_{other}') == {'coclr_video'}
    assert not any(others.values())


def test_two_published_cycles_go_on_from_one_another():
    config = coclr.get_config('ucf101')
    found = {name: fields for name, fields in config.phases}
    assert len(found) == 6
    last = found['coclr_flow_2']
    assert last['init_from'] == 'phase:coclr_flow_1'
    assert last['objective']['sampler'] == 'phase:coclr_video_2'


def test_a_phase_mines_by_the_one_before(tmp_path):
    """The sampler is the first phase's network; the second goes on where it was stopped."""
    config = configs.load('tests/configs/coclr.py:chain')
    train_phases.run(config, tmp_path, data_pipelines.open, quiet=True)
    sound, video = phases.resolve(config, tmp_path)
    saved = checkpoint.read_model(checkpoint.find(sound.folder))
    objective = jax.device_get(state_of(video.folder, video.config)[0].objective)
    chex.assert_trees_all_equal(objective['sampler']['params'], saved['params'])
    assert objective['queue']['is_full']

    # Without its last checkpoint the second goes on from step 2, by the same command.
    expected = json.loads((video.folder / 'done.json').read_text())
    (video.folder / 'done.json').unlink()
    shutil.rmtree(video.folder / 'checkpoints' / '4')
    train_phases.run(config, tmp_path, data_pipelines.open, quiet=True)
    assert json.loads((video.folder / 'done.json').read_text())['digests'] == expected['digests']

    # It is moved, and the first is lost: a longer second phase needs its own alone.
    moved = tmp_path / 'elsewhere'
    shutil.copytree(video.folder, moved)
    longer = configs.fill_missing(configs.stored(moved), default.get_config())
    assert longer.objective.sampler_model
    longer.steps = 5
    loop.train(longer, data_pipelines.open(longer), moved, quiet=True)
    later = jax.device_get(state_of(moved, longer)[0].objective)
    chex.assert_trees_all_equal(later['sampler'], objective['sampler'])


# ---- samplers of other kinds


def test_any_run_is_a_sampler(plain_run):
    """Contrastive, of three modalities, of which words are read; by the same vocabulary."""
    config = coclr_config(plain_run)
    config.data.views = (*config.data.views, ('text.second', {'kind': 'clip'}))
    config.objective.update({'sampler_stream': 'text.second', 'sampler_space': 'vat'})
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    shape = built.shape.objective
    assert shape['queue']['columns']['sampled'].shape == (QUEUE, 8)
    assert {'fronts_text', 'encoders_text', 'head'} == set(shape['sampler']['params'])
    assert 'text_vat' in shape['sampler']['params']['head']

    config.objective.sampler_model = ConfigDict()
    tokenizer = {**data.info['tokenizer'], 'words': ['other']}
    with pytest.raises(ConfigError, match='trained with another vocabulary than that of these'):
        frozen_models.resolve(config, {'tokenizer': tokenizer})


# ---- mistakes


@pytest.mark.parametrize(
    'change, message',
    [
        (
            {'model__inputs__audio__rate': 4000},
            r'config\.model\.inputs\.audio\.rate: expected 2000, as the model of .* got 4000',
        ),
        (
            {'model__inputs__audio__samples': 512},
            r'config\.model\.inputs\.audio\.samples: expected 1024',
        ),
        ({'objective__sampler': 'no/such'}, r'config\.objective\.sampler: no/such holds no check'),
        ({'objective__sampler': ''}, r'config\.objective\.sampler: expected the folder of a run'),
        (
            {'objective__sampler_stream': 'text.second'},
            "expected a model with a tower for the stream 'text.second', got one for audio",
        ),
        (
            {'objective__sampler_space': 'va'},
            r"config\.objective\.sampler_space='va': expected a common space of 'audio.second'",
        ),
        ({'objective__space': 'va'}, r"config\.objective\.space='va': expected a common space of"),
        ({'objective__queue': 15}, r'objective\.queue: expected at least the .*batch of 16 clips'),
    ],
)
def test_what_does_not_fit_is_refused(sampler, tmp_path, change, message):
    config = coclr_config(sampler)
    config.data.views = (*config.data.views, ('text.second', {'kind': 'clip'}))
    for name, value in change.items():
        *parents, last = name.split('__')
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(ConfigError, match=message):
        loop.train(config, data_pipelines.open(config), tmp_path / 'run', quiet=True)
    assert not (tmp_path / 'run').exists()
