"""Memories on the host: the numbers of those on devices, saved while steps write them."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import data_pipelines
from tests.configs import tiny
from tests.test_instance_memory import (
    NEGATIVES,
    RECORDS,
    TERMS,
    WIDTH,
    Identity,
    Reference,
    curve,
    make,
    make_batch,
    neighbours_of_all_pairs,
)
from tests.test_train import run, state_of, stop_at
from vatt_jax.config import ConfigError
from vatt_jax.objectives.base import TrainingRecords
from vatt_jax.objectives.memory import host_agreement, negatives, table
from vatt_jax.parallel import hosts, sharding
from vatt_jax.planning import memory as planned_memory
from vatt_jax.planning import preflight
from vatt_jax.rng import Rng
from vatt_jax.training import checkpoint, columns, host_tables, loop, table_storage, train_state
from vatt_jax.training.host_tables import HostTables
from vatt_jax.training.metrics import Meter
from vatt_jax.training.starting_values import OtherRun
from vatt_jax.training.table_storage import Snapshot, StoredTable

SEED = 7
STEPS = 6
TABLES = {
    f'memory/{view}': jax.ShapeDtypeStruct((RECORDS, WIDTH), jnp.float32)
    for view in ('video', 'audio')
}


def make_step(objective):
    """(state, pooled, device batch, step) -> (loss, gradients, state, written), as train_step."""

    @jax.jit
    def step(state, pooled, batch, number):
        rng = Rng.create(SEED, number, batch['position'])

        def loss_of(pooled):
            loss = objective.compute_loss(
                Identity(), {'batch_stats': {}}, {}, state, pooled, batch, rng
            )
            return loss.value, loss

        (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(pooled)
        is_finite = number != STEPS - 2
        rows = objective.new_rows(batch, loss.writes, is_finite)
        return loss.value, gradients, loss.state, {'records': batch['record'], 'rows': rows}

    return step


def drawn_by(batch, number, agreeing):
    """The negatives of a step, [B K], which tests/test_memory.py holds against enumeration."""
    record = np.asarray(batch['record'])[:, None]
    excluded = record if agreeing is None else np.concatenate([record, agreeing[record[:, 0]]], 1)
    rng = Rng.create(SEED, number, batch['position']).at('negatives')
    return np.asarray(negatives.draw(rng, RECORDS, NEGATIVES, jnp.asarray(excluded)))


@pytest.mark.parametrize(
    'name, axes', [('cross', {'replica': 1}), ('cma', {'replica': 4, 'fsdp': 2})], ids=str
)
def test_steps_are_those_of_float64(name, axes):
    """Losses and gradients of overlapping steps, and the tables that they leave.

    Of 60 records most are looked up again in the step after the one that wrote them.
    """
    fields, terms = TERMS[name]
    on_host, state = make(**fields, memory='host')
    assert 'memory' not in state
    agreeing = None
    if name == 'cma':
        agreeing = np.random.default_rng(5).integers(0, RECORDS, (RECORDS, 3)).astype(np.int32)
    step = make_step(on_host)
    mesh = sharding.make_mesh(axes)
    with jax.set_mesh(mesh):
        arrays = host_tables.first(on_host, TABLES, seed=0)
        tables = HostTables(arrays, on_host, mesh, SEED, Meter())
        reference = Reference(
            {view: arrays[f'memory/{view}'].copy() for view in ('video', 'audio')}, terms
        )
        for number in range(STEPS):
            pooled, batch = make_batch(number, agreeing)
            host_batch = jax.tree.map(np.asarray, batch)
            device_batch = tables.place(host_batch, number)
            loss, gradients, state, written = step(state, pooled, device_batch, number)
            tables.hold(written)
            kept = {view: rows.copy() for view, rows in reference.memory.items()}
            expected, expected_gradients = reference.step(
                pooled, batch, drawn_by(batch, number, agreeing)
            )
            if number == STEPS - 2:  # which is not finite
                reference.memory = kept
            np.testing.assert_allclose(loss, expected, rtol=2e-6)
            chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
        tables.settle()
    for view, rows in reference.memory.items():
        np.testing.assert_allclose(arrays[f'memory/{view}'], rows, atol=1e-6)
    tables.close()


def test_first_rows_are_those_of_a_memory_on_the_devices(monkeypatch):
    monkeypatch.setattr(train_state, 'objective_key', jax.random.key)  # as in `make`
    monkeypatch.setattr(host_tables, 'MADE_AT_ONCE', 32)
    on_host, _ = make(memory='host')
    _, state = make()
    for name, rows in host_tables.first(on_host, TABLES, seed=0).items():
        expected = state['memory'][name.removeprefix('memory/')][:RECORDS]
        np.testing.assert_allclose(rows, expected, atol=2e-7)
        assert rows.flags.writeable


@pytest.mark.parametrize('axes', [None, {'replica': 4, 'fsdp': 2}], ids=str)
def test_neighbours_are_those_of_all_pairs(axes, monkeypatch):
    """In blocks that divide neither records nor queries; of this host's records alone."""
    monkeypatch.setattr(host_agreement, 'QUERIES', 4)
    monkeypatch.setattr(host_agreement, 'KEYS', 7)
    monkeypatch.setattr(host_agreement, 'QUERY_BLOCKS', 1)
    monkeypatch.setattr(host_agreement, 'KEY_BLOCKS', 2)
    random = np.random.default_rng(0)
    tables = []
    for _ in range(2):
        raw = random.normal(size=(RECORDS, WIDTH)).astype(np.float32)
        tables.append(raw / np.linalg.norm(raw, axis=-1, keepdims=True))
    memory = {'video': tables[0], 'audio': tables[1]}
    expected = neighbours_of_all_pairs(memory, RECORDS, 4)
    own = slice(9, 54)
    mesh = sharding.make_mesh(axes) if axes else None
    with jax.set_mesh(mesh) if axes else contextlib.nullcontext():
        found, records = host_agreement.find_neighbours(tables, own, 4)
    np.testing.assert_array_equal(records, expected[own])
    cosines = [np.einsum('me,mpe->mp', x[own], np.float64(x)[expected[own]]) for x in tables]
    np.testing.assert_allclose(found, np.minimum(*cosines), atol=1e-6)


def test_a_refresh_reads_the_tables_of_the_host():
    on_host, state = make(positives=4, positive_negatives=4, memory='host')
    device, device_state = make(positives=4, positive_negatives=4)
    tables = {}
    for view, rows in device_state['memory'].items():
        tables[f'memory/{view}'] = np.asarray(rows)[:RECORDS]
    encode = dict
    found = on_host.refresh({}, {}, state, 0, TrainingRecords(RECORDS, {}, encode, tables=tables))
    expected = device.refresh({}, {}, device_state, 0, TrainingRecords(RECORDS, {}, encode))
    chex.assert_trees_all_equal(found.columns, expected.columns)
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-6)


# ---- What is saved.


def test_a_checkpoint_is_written_while_steps_store(tmp_path, monkeypatch):
    """Rows change before, between and after the blocks that are written: they are the old ones."""
    monkeypatch.setattr(columns, 'WRITTEN_BYTES', 4 * 5 * 4)  # four rows
    random = np.random.default_rng(0)
    stored = StoredTable(random.normal(size=(21, 5)).astype(np.float32))
    expected = stored.array.copy()

    def store():
        records = random.integers(0, 21, 6)
        records[1] = records[0]
        rows = random.normal(size=(6, 5)).astype(np.float32)
        rows[1] = rows[0]
        stored.store(records, rows)

    class Storing(Snapshot):
        """Each time that it is asked for rows, a step stores some."""

        def __getitem__(self, rows):
            store()
            return super().__getitem__(rows)

    monkeypatch.setattr(table_storage, 'Snapshot', Storing)
    for host in range(2):
        own = slice(*hosts.stretch(21, host, 2))
        stored.array[:] = expected
        snapshot = stored.snapshot(own)
        store()
        store()
        columns.write_piece(tmp_path, {'memory/video': snapshot}, host, 2)
        assert not snapshot._old
        store()
        assert not snapshot._old
    assert not np.array_equal(stored.array, expected)
    found = columns.read_pieces(tmp_path)['memory/video']
    np.testing.assert_array_equal(found, expected)


def test_restored_and_mapped_tables_can_be_written(tmp_path, monkeypatch):
    for mapped_bytes in (1 << 26, 1):
        monkeypatch.setattr(columns, 'MAPPED_BYTES', mapped_bytes)
        rows = np.arange(12.0, dtype=np.float32).reshape(6, 2)
        columns.write_piece(tmp_path, {'table': rows}, 0, 1)
        found = columns.writable(columns.read_pieces(tmp_path)['table'])
        found[3] = 7
        np.testing.assert_array_equal(found[2:4], [[4, 5], [7, 7]])
    foreign = np.frombuffer(bytes(8), np.float32)
    assert columns.writable(foreign).flags.writeable


def test_tables_of_another_run_are_taken_from_its_host_or_its_devices():
    own = np.zeros((5, 2), np.float32)
    theirs = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    from_host = OtherRun('run', {'tables': {'memory': {'video': theirs}}})
    np.testing.assert_array_equal(from_host.take_table('memory/video', own), theirs)
    padded = np.zeros((table.num_rows(5), 2), np.float32)
    padded[:5] = theirs
    from_devices = OtherRun('run', {'state': {'memory': {'video': padded}}})
    np.testing.assert_array_equal(from_devices.take_table('memory/video', own), theirs)
    with pytest.raises(ConfigError, match=r'has shape \(5, 2\), this objective wants \(4, 2\)'):
        from_host.take_table('memory/video', own[:4])
    with pytest.raises(ConfigError, match="it has no array 'state/memory/audio'"):
        from_host.take_table('memory/audio', own)
    kept = OtherRun('run', {'tables': {}}, skip=('memory',))
    assert kept.take_table('memory/video', own) is own


# ---- What is said beforehand.


def on_the_host(**fields):
    config = tiny.get_config('host_memory')
    config.objective.update(fields)
    return config


def test_a_plan_counts_the_tables_of_a_host_and_the_rows_of_a_batch():
    config = on_the_host()
    config.batch_size, config.data.synthetic_size = 128, 2_000_000
    mesh = AbstractMesh((16, 4, 1, 1), sharding.MESH_AXES)
    built = loop.assemble(config, data_pipelines.open(config), mesh)
    assert checkpoint.size_of(built.tables) == 2 * 2_000_000 * 8 * 4
    # M, log Z and whether it is; no memory.
    assert planned_memory.shares(built.shape.objective, built.shardings.objective) == 9
    # A clip's own record, 3 that agree with it and 16 others.
    chex.assert_shape(built.batch['tables']['memory/audio'], (128, 20, 8))


def test_memories_that_do_not_fit_are_advised_to_the_host():
    layout = {
        'mesh': {'replica': 1, 'fsdp': 4, 'model': 1, 'seq': 1},
        'model': {'remat': 'full', 'layers': True},
        'per_device_batch': 32.0,
        'accumulate': 1,
    }
    sizes = {'limit': 16e9, 'state': 12e9, 'peak': 20e9, 'objective': 10e9}
    advised = planned_memory.would_fit(layout, {**sizes, 'moves_to_host': 'config.x=1'})
    assert 'config.x=1: memories of the objective on every host, 10.0 GB less' in advised[0]
    elsewhere = planned_memory.would_fit(layout, {**sizes, 'moves_to_host': ''})
    assert not any('memories' in line for line in elsewhere)
    assert make()[0].moves_to_host() == "config.objective.memory='host'"
    assert make(memory='host')[0].moves_to_host() == ''


def test_a_host_without_room_for_tables_is_told(monkeypatch):
    tables = {'memory': jax.ShapeDtypeStruct((10**12, 8), jnp.float32)}
    monkeypatch.setattr(preflight, 'free_space', lambda _: 10**9)
    with pytest.raises(ConfigError, match='expected room in .* 1.*GB.*TMPDIR'):
        preflight.host_tables(tables)
    monkeypatch.setattr(preflight, 'free_space', lambda _: 10**15)
    assert 'mapped from' in preflight.host_tables(tables)


def test_places_of_memories():
    with pytest.raises(ConfigError, match='config.objective.memory.*choose one of device, host'):
        make(memory='disk')


# ---- Whole runs of CMA: with the runs of a memory on the devices beside them.


def of_run(folder, config):
    """(state, tables by view, neighbours) of the newest checkpoint."""
    state, _, saved = state_of(folder, config)
    tables = {view: saved[f'memory/{view}'] for view in ('video', 'audio')}
    return state, tables, saved['positives']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an uninterrupted run on one device."""
    folder = tmp_path_factory.mktemp('whole')
    run(folder, on_the_host())
    return folder


@pytest.mark.slow
def test_the_run_is_that_of_memories_on_the_devices(whole, tmp_path):
    config = tiny.get_config('memory')
    run(tmp_path, config)
    expected, _, expected_columns = state_of(tmp_path, config)
    _, tables, positives = of_run(whole, on_the_host())
    np.testing.assert_allclose(np.array(curve(whole)), np.array(curve(tmp_path)), rtol=1e-5)
    for view, rows in tables.items():
        np.testing.assert_allclose(rows, expected.objective['memory'][view][:40], atol=1e-5)
    np.testing.assert_array_equal(positives, expected_columns['positives'])


@pytest.mark.slow
def test_a_run_that_is_continued_has_the_same_bits(whole, tmp_path):
    """Stopped after a refresh, while rows of its last step are still to be stored."""
    with stop_at(4):
        run(tmp_path, on_the_host())
    assert not (tmp_path / 'done.json').exists()
    run(tmp_path, on_the_host())
    assert curve(tmp_path) == curve(whole)
    config = on_the_host()
    chex.assert_trees_all_equal(of_run(tmp_path, config), of_run(whole, config), strict=True)


@pytest.mark.slow
def test_a_run_goes_on_with_other_meshes_and_microbatches(whole, tmp_path):
    with stop_at(2):
        run(tmp_path, on_the_host())
    config = on_the_host()
    config.mesh.update({'replica': 2, 'fsdp': 2})
    config.accumulate, config.accumulation = 2, 'exact'
    run(tmp_path, config)
    np.testing.assert_allclose(np.array(curve(tmp_path)), np.array(curve(whole)), rtol=2e-4)
    _, tables, _ = of_run(tmp_path, config)
    _, expected, _ = of_run(whole, on_the_host())
    chex.assert_trees_all_close(tables, expected, atol=1e-4)


@pytest.mark.slow
def test_cma_begins_with_the_tables_of_avid(tmp_path):
    avid = on_the_host(positives=0)
    run(tmp_path / 'avid', avid)
    _, _, trained = state_of(tmp_path / 'avid', avid)
    cma = on_the_host()
    cma.init_from, cma.init_trees = str(tmp_path / 'avid'), ('model', 'state')
    with stop_at(0):
        run(tmp_path / 'cma', cma)
    _, tables, positives = of_run(tmp_path / 'cma', cma)
    first = next(data_pipelines.open(cma).train(0, cma.batch_size))['index']
    untouched = np.setdiff1d(np.arange(40), first)
    memory = {view: trained[f'memory/{view}'] for view in tables}
    for view, rows in tables.items():
        np.testing.assert_array_equal(rows[untouched], memory[view][untouched])
        assert (rows[first] != memory[view][first]).any()
    np.testing.assert_array_equal(positives, neighbours_of_all_pairs(memory, 40, 3))
