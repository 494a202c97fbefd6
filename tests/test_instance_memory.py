"""AVID and CMA: losses, gradients and memories against NumPy in float64, on any mesh."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

import data_pipelines
from tests.configs import tiny
from tests.test_train import run, state_of, stop_at
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.losses.noise_contrastive import noise_contrastive
from vatt_jax.objectives import instance_memory
from vatt_jax.objectives.base import Spec, TrainingRecords
from vatt_jax.objectives.memory import negatives
from vatt_jax.parallel import sharding
from vatt_jax.planning import memory as planned_memory
from vatt_jax.rng import Rng
from vatt_jax.training import loop

RECORDS, WIDTH, CLIPS, NEGATIVES = 60, 6, 8, 20
TEMPERATURE, MOMENTUM = 0.2, 0.4
CROSS = (('video', 'audio'), ('audio', 'video'))
WITHIN = (('video', 'video'), ('audio', 'audio'))


# ---- The loss.


def reference_loss(positive, negative, log_z, valid):
    """(loss, derivatives by positives and by negatives), float64, as the fact sheet has it."""
    positive, negative = np.float64(positive), np.float64(negative)
    noise = negative.shape[1] * np.exp(np.float64(log_z))
    is_data = np.exp(positive) / (np.exp(positive) + noise)
    is_noise = noise / (np.exp(negative) + noise)
    loss = -np.log(is_data).mean(1) - np.log(is_noise).sum(1)
    weight = (valid / valid.sum())[:, None]
    by_positive = weight * (is_data - 1) / positive.shape[1]
    by_negative = weight * (1 - is_noise)
    return np.sum(loss * weight[:, 0]), by_positive, by_negative


@pytest.mark.parametrize('num_positives', [1, 5])
def test_noise_contrastive(num_positives):
    random = np.random.default_rng(num_positives)
    positive = jnp.asarray(random.normal(0, 4, (CLIPS, num_positives)), jnp.float32)
    negative = jnp.asarray(random.normal(0, 4, (CLIPS, NEGATIVES)), jnp.float32)
    valid = np.arange(CLIPS) % 3 > 0

    def loss(positive, negative):
        return noise_contrastive(positive, negative, log_z=0.7, valid=jnp.asarray(valid))

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(positive, negative)
    expected, *expected_gradients = reference_loss(positive, negative, 0.7, valid)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(gradients, tuple(expected_gradients), rtol=1e-5, atol=1e-7)


def test_noise_contrastive_does_not_overflow():
    """Scores of ±1000: the loss of a negative is then its score, less log(K Z)."""
    positive, negative = jnp.full((1, 1), 1000.0), jnp.full((1, 2), 1000.0)
    expected = 2 * (1000 - np.log(2))
    loss = noise_contrastive(positive, negative, log_z=0.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    loss = noise_contrastive(-positive, -negative, log_z=0.0)
    np.testing.assert_allclose(loss, 1000 + np.log(2), rtol=1e-6)


def test_clips_that_do_not_count_spoil_nothing():
    positive = jnp.asarray([[1.0], [jnp.nan]])
    negative = jnp.asarray([[0.5, 0.2], [jnp.inf, 3.0]])

    def loss(positive, negative, valid):
        return noise_contrastive(positive, negative, log_z=0.0, valid=jnp.asarray(valid))

    value, gradient = jax.value_and_grad(loss)(positive, negative, [True, False])
    np.testing.assert_allclose(value, loss(positive[:1], negative[:1], [True]), rtol=1e-6)
    assert gradient[1, 0] == 0
    assert loss(positive, negative, [False, False]) == 0
    assert np.isnan(loss(positive, negative, [True, True]))
    with pytest.raises(ValueError, match='expected scores of positives and negatives'):
        loss(positive, negative[:, :0], [True, False])


# ---- The objective. The model is left out: its pooled features are the embeddings.


class Identity:
    """A model whose embeddings are the pooled features."""

    def apply(self, variables, streams, valid, **_):
        return {'va': {name: stream.pooled for name, stream in streams.items()}}, {}


def make(**fields):
    """(objective, its first state)."""
    config = {
        'name': 'instance_memory',
        'negatives': NEGATIVES,
        'temperature': TEMPERATURE,
        'momentum': MOMENTUM,
        **fields,
    }
    objective = objectives.build(ConfigDict(config))
    embedding = jax.ShapeDtypeStruct((CLIPS, WIDTH), jnp.float32)

    class Outputs:
        spaces = {'va': {'video': embedding, 'audio': embedding}}

    spec = Spec(None, Outputs, {}, RECORDS, {})
    _, state = objective.init(jax.random.key(0), spec)
    return objective, jax.tree.map(
        lambda leaf: leaf.unbox() if hasattr(leaf, 'unbox') else leaf,
        state,
        is_leaf=lambda leaf: hasattr(leaf, 'unbox'),
    )


def make_batch(step, columns=None):
    """(embeddings, batch): a clip without sound, a padding row, a record that comes twice."""
    random = np.random.default_rng(100 + step)
    records = random.integers(0, RECORDS, CLIPS).astype(np.int32)
    records[1] = records[0]
    pooled = {
        view: jnp.asarray(random.normal(size=(CLIPS, WIDTH)), jnp.float32)
        for view in ('video', 'audio')
    }
    valid = np.arange(CLIPS) != 7
    has_sound = np.arange(CLIPS) != 3
    batch = {
        'video': {'valid': jnp.ones(CLIPS, bool)},
        'audio': {'valid': jnp.asarray(has_sound)},
        'valid': jnp.asarray(valid),
        'record': jnp.asarray(records),
        'position': jnp.arange(CLIPS) + step * CLIPS,
    }
    if columns is not None:
        batch['columns'] = {'positives': jnp.asarray(columns[records])}
    return pooled, batch


def unit(x):
    return np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True)


class Reference:
    """AVID and CMA in float64."""

    def __init__(self, memory, terms):
        self.memory = {view: np.float64(rows) for view, rows in memory.items()}
        self.terms = terms  # (query view, memory view, with agreeing records, negatives, weight)
        self.log_z = None

    def step(self, pooled, batch, drawn):
        """(loss, gradient of the raw embeddings by view); the memory is written."""
        record = np.asarray(batch['record'])
        valid = {view: np.asarray(batch[view]['valid'] & batch['valid']) for view in self.memory}
        q = {view: unit(x) for view, x in pooled.items()}
        total = 0.0
        by_unit = {view: np.zeros_like(x) for view, x in q.items()}
        for query, memory, is_agreeing, count, weight in self.terms:
            rows = np.asarray(batch['columns']['positives']) if is_agreeing else record[:, None]
            used = valid[query] & valid[memory]
            positives = self.memory[memory][rows]
            noise = self.memory[memory][np.asarray(drawn)[:, :count]]
            s_positive = np.einsum('be,bke->bk', q[query], positives) / TEMPERATURE
            s_negative = np.einsum('be,bke->bk', q[query], noise) / TEMPERATURE
            if self.log_z is None:
                self.log_z = np.log(np.exp(s_negative[used]).mean())
            loss, d_positive, d_negative = reference_loss(s_positive, s_negative, self.log_z, used)
            total += weight * loss
            d_query = np.einsum('bk,bke->be', d_positive, positives)
            d_query += np.einsum('bk,bke->be', d_negative, noise)
            by_unit[query] += weight * d_query / TEMPERATURE
        gradients = {}
        for view, x in pooled.items():
            # Through x / |x|: what is along the unit vector is lost.
            along = np.sum(by_unit[view] * q[view], -1, keepdims=True) * q[view]
            gradients[view] = (by_unit[view] - along) / np.linalg.norm(
                np.float64(x), axis=-1, keepdims=True
            )
        self.write(record, q, valid)
        return total, gradients

    def write(self, record, q, valid):
        for view, rows in self.memory.items():
            old = rows.copy()
            for r in set(record[valid[view]].tolist()):
                new = q[view][valid[view] & (record == r)].mean(0)
                rows[r] = unit(MOMENTUM * old[r] + (1 - MOMENTUM) * new)


TERMS = {
    'cross': ({}, [(*pair, False, NEGATIVES, 0.5) for pair in CROSS]),
    'self': ({'directions': WITHIN}, [(*pair, False, NEGATIVES, 0.5) for pair in WITHIN]),
    'joint': (
        {'directions': CROSS + WITHIN},
        [(*pair, False, NEGATIVES, 0.25) for pair in CROSS + WITHIN],
    ),
    'cma': (
        {'positives': 3, 'positive_negatives': 7, 'positive_weight': 0.4},
        [(*pair, False, NEGATIVES, 0.3) for pair in CROSS]
        + [(*pair, True, 7, 0.2) for pair in WITHIN],
    ),
}


@pytest.mark.parametrize('name', TERMS)
def test_steps_are_those_of_float64(name):
    """Loss, gradient and memories over three steps; Z is that of the first."""
    fields, terms = TERMS[name]
    objective, state = make(**fields)
    columns = None
    if name == 'cma':
        columns = np.random.default_rng(5).integers(0, RECORDS, (RECORDS, 3)).astype(np.int32)
    reference = Reference(state['memory'], terms)

    @jax.jit
    def step(pooled, state, batch, rng):
        def loss_of(pooled):
            loss = objective.compute_loss(
                Identity(), {'batch_stats': {}}, {}, state, pooled, batch, rng
            )
            return loss.value, loss

        (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(pooled)
        return loss, gradients, objective.write_memory(loss.state, loss.writes, jnp.asarray(True))

    first_log_z = None
    for i in range(3):
        pooled, batch = make_batch(i, columns)
        rng = Rng.create(0, i, batch['position'])
        record = np.asarray(batch['record'])
        excluded = [record[:, None]]
        if columns is not None:
            excluded.append(columns[record])
        excluded = np.concatenate(excluded, 1)
        drawn = np.asarray(
            negatives.draw(rng.at('negatives'), RECORDS, NEGATIVES, jnp.asarray(excluded))
        )
        assert not (drawn[:, :, None] == excluded[:, None, :]).any()
        loss, gradients, state = step(pooled, state, batch, rng)
        expected, expected_gradients = reference.step(pooled, batch, drawn)
        np.testing.assert_allclose(loss.value, expected, rtol=2e-6)
        chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state['memory'], reference.memory, atol=1e-6)
        first_log_z = state['log_z'] if first_log_z is None else first_log_z
        np.testing.assert_allclose(state['log_z'], reference.log_z, rtol=1e-6)
        assert state['log_z'] == first_log_z


def test_z_waits_for_a_clip_that_counts():
    objective, state = make()
    pooled, batch = make_batch(0)
    rng = Rng.create(0, 0, batch['position'])

    def loss_of(batch, state):
        return objective.compute_loss(
            Identity(), {'batch_stats': {}}, {}, state, pooled, batch, rng
        )

    silent = {**batch, 'audio': {'valid': jnp.zeros(CLIPS, bool)}}
    loss = loss_of(silent, state)
    assert loss.value == 0
    assert not loss.state['has_z']
    loss = loss_of(batch, loss.state)
    assert loss.state['has_z']
    assert np.isfinite(loss.state['log_z'])
    kept = loss_of(silent, loss.state).state
    assert kept['log_z'] == loss.state['log_z']
    assert kept['has_z']


def test_a_step_that_is_not_finite_writes_nothing():
    objective, state = make()
    pooled, batch = make_batch(0)
    loss = objective.compute_loss(
        Identity(),
        {'batch_stats': {}},
        {},
        state,
        pooled,
        batch,
        Rng.create(0, 0, batch['position']),
    )
    written = objective.write_memory(loss.state, loss.writes, jnp.asarray(False))
    chex.assert_trees_all_equal(written['memory'], state['memory'])


def neighbours_of_all_pairs(memory, num_records, count):
    """int [M count], from all cosines in float64."""
    rows = [np.float64(memory[view][:num_records]) for view in ('video', 'audio')]
    least = np.minimum(*(x @ x.T for x in rows))
    np.fill_diagonal(least, -np.inf)
    return np.argsort(-least, 1, kind='stable')[:, :count]


def test_refresh_finds_the_records_that_agree():
    objective, state = make(positives=4, positive_negatives=4)
    records = TrainingRecords(RECORDS, {}, encode=lambda *_: {})
    refreshed = objective.refresh({}, {}, state, 0, records)
    expected = neighbours_of_all_pairs(state['memory'], RECORDS, 4)
    np.testing.assert_array_equal(refreshed.columns['positives'], expected)
    memory = {view: np.float64(rows) for view, rows in state['memory'].items()}
    cosines = [np.einsum('me,mpe->mp', rows[:RECORDS], rows[expected]) for rows in memory.values()]
    agreement = np.minimum(*cosines)
    assert refreshed.metrics['agreement'] == pytest.approx(agreement.mean(), abs=1e-6)
    assert refreshed.metrics['least_agreement'] == pytest.approx(agreement.min(), abs=1e-6)


def test_a_refresh_on_eight_devices_is_that_on_one():
    """The same sets; each device returns the rows that it has, and no more of them."""
    objective, state = make(positives=4, positive_negatives=4)
    records = TrainingRecords(RECORDS, {}, encode=lambda *_: {})
    found = []
    for axes in ({'replica': 1}, {'replica': 4, 'fsdp': 2}):
        with jax.set_mesh(sharding.make_mesh(axes)):
            found.append(objective.refresh({}, {}, state, 0, records))
    one, eight = found
    np.testing.assert_array_equal(eight.columns['positives'], one.columns['positives'])
    assert eight.metrics == pytest.approx(one.metrics, rel=1e-6)

    mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
    rows = jax.NamedSharding(mesh, jax.P(('replica', 'fsdp')))
    memory = jax.ShapeDtypeStruct((66 * 3072, WIDTH), jnp.float32, sharding=rows)
    with jax.set_mesh(mesh):
        search = instance_memory._find_neighbours.lower([memory, memory], 200_000, 32)
    # 32 records of 4 bytes and two cosines, of an eighth of the rows.
    expected = 66 * 3072 / 8 * (32 + 2) * 4
    assert search.compile().memory_analysis().output_size_in_bytes == pytest.approx(
        expected, rel=0.01
    )


def test_refreshes_of_cma_come_at_fixed_steps():
    objective, _ = make(positives=4, positive_negatives=4, every=10)
    assert [step for step in range(25) if objective.refresh_due(step, 25)] == [0, 10, 20]
    assert not make()[0].refresh_due(0, 25)  # AVID has none


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'temperature': 0.0}, 'temperature: expected a positive number'),
        ({'negatives': 0}, 'negatives: expected at least 1, got 0'),
        ({'directions': ('video',)}, 'directions: expected pairs'),
        ({'directions': (('video', 'text'),)}, "directions: expected views .* got 'text'"),
        (
            {'positives': 59, 'positive_negatives': 4},
            'positives: expected at most 58 for a training set of 60',
        ),
        ({'positives': 2, 'positive_negatives': 21}, 'positive_negatives: expected at most'),
        ({'momentum': 1.5}, 'momentum'),
    ],
)
def test_configs_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


# ---- Whole runs of CMA.


def curve(folder):
    """[(step, loss, log Z) …] of the log."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [(line['step'], line['loss'], line['log_z']) for line in lines if 'loss' in line]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(the folder of an uninterrupted run on one device, its state, its columns)."""
    folder = tmp_path_factory.mktemp('whole')
    run(folder, tiny.get_config('memory'))
    state, _, columns = state_of(folder, tiny.get_config('memory'))
    return folder, state, columns


def test_z_is_that_of_the_first_batch(whole):
    folder, state, _ = whole
    log_z = [line[2] for line in curve(folder)]
    assert len(log_z) == 6
    assert set(log_z) == {float(state.objective['log_z'])}
    # Cosines over 0.07 of random vectors of width 8: E[exp] is far from 1.
    assert log_z[0] > 1


def test_steps_write_their_records_and_every_record_has_positives(whole):
    folder, state, columns = whole
    memory = {view: np.float64(rows) for view, rows in state.objective['memory'].items()}
    num_records = int(state.objective['num_records'])
    assert num_records == 40
    config = tiny.get_config('memory')
    before, _, _ = state_of(folder, config, step=4)
    batches = data_pipelines.open(config).train(4 * config.batch_size, config.batch_size)
    records = np.concatenate([next(batches)['index'] for _ in range(2)])
    assert len(set(records.tolist())) < num_records
    for view, rows in memory.items():
        np.testing.assert_allclose(np.linalg.norm(rows[:num_records], axis=-1), 1, atol=1e-6)
        np.testing.assert_array_equal(rows[num_records:], 0)
        # Those of the last two steps, and no others.
        moved = np.abs(rows - np.asarray(before.objective['memory'][view])).max(-1) > 0
        np.testing.assert_array_equal(np.flatnonzero(moved), np.unique(records))
    # What they are is checked in test_refresh_finds_the_records_that_agree.
    chex.assert_shape(columns['positives'], (num_records, 3))
    assert columns['positives'].dtype == np.int32
    assert (columns['positives'] != np.arange(num_records)[:, None]).all()


def test_a_run_that_is_continued_has_the_same_bits(whole, tmp_path):
    """Stopped after a refresh: memories, Z and columns go on."""
    folder, state, columns = whole
    with stop_at(4):
        run(tmp_path, tiny.get_config('memory'))
    assert not (tmp_path / 'done.json').exists()
    run(tmp_path, tiny.get_config('memory'))
    assert curve(tmp_path) == curve(folder)
    again, _, columns_again = state_of(tmp_path, tiny.get_config('memory'))
    chex.assert_trees_all_equal((again, columns_again), (state, columns), strict=True)


@pytest.mark.parametrize('mesh', [{'replica': 4, 'fsdp': 2}, {'fsdp': 8}], ids=str)
@pytest.mark.slow  # tables on every mesh are in test_memory; here, whole runs
def test_memories_are_equal_on_any_mesh(whole, tmp_path, mesh):
    """Begun on one device and continued on eight, after the second refresh."""
    folder, state, columns = whole
    with stop_at(2):
        run(tmp_path, tiny.get_config('memory'))
    config = tiny.get_config('memory')
    config.mesh.update(mesh)
    run(tmp_path, config)
    found, expected = np.array(curve(tmp_path)), np.array(curve(folder))
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    again, _, columns_again = state_of(tmp_path, config)
    assert again.objective['memory']['video'].addressable_shards[0].data.shape == (384, 8)
    chex.assert_trees_all_close(
        jax.device_get(again.objective), jax.device_get(state.objective), atol=1e-4
    )
    assert (columns_again['positives'] != columns['positives']).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('accumulation', ['exact', 'plain'])
def test_microbatches_write_all_clips(whole, tmp_path, accumulation):
    """One loss of the whole batch: the numbers of the run in one go. Or means of four losses."""
    folder, state, _ = whole
    config = tiny.get_config('memory')
    config.accumulate, config.accumulation = 4, accumulation
    run(tmp_path, config)
    again, _, _ = state_of(tmp_path, config)
    memory = again.objective['memory']
    chex.assert_trees_all_equal_shapes_and_dtypes(again.objective, state.objective)
    if accumulation == 'exact':
        np.testing.assert_allclose(np.array(curve(tmp_path)), np.array(curve(folder)), rtol=2e-4)
        chex.assert_trees_all_close(memory, state.objective['memory'], atol=1e-4)
    built = loop.build(config, data_pipelines.open(config))
    with jax.set_mesh(built.mesh):
        start = built.init().objective['memory']
    # Six batches of 16 hold each of the 40 records.
    for view, rows in memory.items():
        moved = np.abs(np.asarray(rows) - np.asarray(start[view])).max(-1)
        assert (moved[:40] > 1e-3).all()


def test_a_plan_counts_the_memories_of_one_device():
    """Two million records on 64 devices: a 64th of both tables, and three numbers."""
    config = tiny.get_config('memory')
    config.batch_size, config.data.synthetic_size = 128, 2_000_000
    mesh = AbstractMesh((16, 4, 1, 1), sharding.MESH_AXES)
    built = loop.assemble(config, data_pipelines.open(config), mesh)
    found = planned_memory.shares(built.shape.objective, built.shardings.objective)
    # 652 times 3072 rows of 8 numbers of 4 bytes, of video and of audio; M, log Z, whether it is.
    assert found == 2 * (652 * 3072) * 8 * 4 / 64 + 4 + 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_step_copies_no_memory(accumulate):
    """Of two tables of 64 MB the compiled step makes no copy, guard and microbatches included."""
    config = tiny.get_config('memory')
    config.accumulate, config.data.synthetic_size = accumulate, 2_000_000
    built = loop.build(config, data_pipelines.open(config))
    with jax.set_mesh(built.mesh):
        compiled = built.step.lower(built.shape, built.batch).compile()
    one_table = 652 * 3072 * 8 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_table / 2


@pytest.mark.slow
def test_cma_begins_with_the_weights_memories_and_z_of_avid(tmp_path):
    """And with the neighbours of all pairs in these memories."""
    avid = tiny.get_config('memory')
    avid.objective.positives = 0
    run(tmp_path / 'avid', avid)
    trained, _, _ = state_of(tmp_path / 'avid', avid)
    cma = tiny.get_config('memory')
    cma.init_from, cma.init_trees = str(tmp_path / 'avid'), ('model', 'state')
    with stop_at(0):
        run(tmp_path / 'cma', cma)
    state, _, columns = state_of(tmp_path / 'cma', cma)
    assert int(state.step) == 1
    assert state.objective['log_z'] == trained.objective['log_z']
    first = next(data_pipelines.open(cma).train(0, cma.batch_size))['index']
    untouched = np.setdiff1d(np.arange(40), first)
    assert len(untouched)
    memory = {view: np.asarray(rows) for view, rows in trained.objective['memory'].items()}
    for view, rows in state.objective['memory'].items():
        np.testing.assert_array_equal(np.asarray(rows)[untouched], memory[view][untouched])
        assert (np.asarray(rows)[first] != memory[view][first]).any()
    expected = neighbours_of_all_pairs(memory, 40, 3)
    np.testing.assert_array_equal(columns['positives'], expected)
