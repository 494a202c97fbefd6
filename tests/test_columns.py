"""Columns of many records: small types, mapped files, pieces that each host writes one of."""

import tempfile
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.objectives import heads
from vatt_jax.parallel import sharding
from vatt_jax.training import columns, refresh
from vatt_jax.training.checkpoint import Checkpoints
from vatt_jax.training.refresh import RecordRows

NUM_RECORDS = 1003
REPLICATED = sharding.replicated(sharding.make_mesh({'replica': 1}))


def some_columns():
    """Of several types and ranks; one has a name that is no file name."""
    rng = np.random.default_rng(0)
    return {
        'label': rng.integers(-1, 100, (NUM_RECORDS, 3)).astype(np.int8),
        'cluster.video/audio': rng.integers(-1, 3000, NUM_RECORDS).astype(np.int16),
        'weight': rng.random(NUM_RECORDS),
        'rough': rng.random((NUM_RECORDS, 2)).astype(jnp.bfloat16),
        'is_hard': rng.random(NUM_RECORDS) < 0.5,
    }


@pytest.fixture
def always_mapped(monkeypatch, tmp_path):
    """The folder of temporary files; every column is mapped."""
    folder = tmp_path / 'temporary'
    folder.mkdir()
    monkeypatch.setattr(columns, 'MAPPED_BYTES', 1)
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    return folder


def test_large_columns_are_mapped_and_leave_no_file(always_mapped):
    given = some_columns()
    kept = columns.keep(given)
    chex.assert_trees_all_equal(kept, given, strict=True)
    assert all(isinstance(column, np.memmap) for column in kept.values())
    assert not list(always_mapped.iterdir())
    assert columns.keep(kept)['label'] is kept['label']
    with pytest.raises(ValueError, match='read-only'):
        kept['label'][0] = 1

    records = np.array([5, 1002, 5, 0])
    found = columns.lookup(kept, records)
    chex.assert_trees_all_equal(found, {name: x[records] for name, x in given.items()}, strict=True)
    assert not any(isinstance(entries, np.memmap) for entries in found.values())


def test_columns_stay_in_memory_where_the_disk_has_no_room(always_mapped, monkeypatch):
    def full():
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tempfile, 'TemporaryFile', full)
    given = some_columns()
    kept = columns.keep(given)
    chex.assert_trees_all_equal(kept, given, strict=True)
    assert not any(isinstance(column, np.memmap) for column in kept.values())


def test_room_for_a_column_is_in_memory_where_the_disk_has_none(always_mapped, monkeypatch):
    """What is exchanged between processes cannot be asked for twice, so room is taken before."""
    room = columns.room_for((5, 2), np.dtype(np.int16))
    assert isinstance(room, np.memmap)
    assert not list(always_mapped.iterdir())

    def full():
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tempfile, 'TemporaryFile', full)
    room = columns.room_for((5, 2), np.dtype(np.int16))
    assert not isinstance(room, np.memmap)
    chex.assert_shape(room, (5, 2))


def test_small_columns_stay_in_memory():
    given = some_columns()
    assert all(column is given[name] for name, column in columns.keep(given).items())


@pytest.mark.parametrize('hosts', [1, 2, 3, 7])
@pytest.mark.parametrize('size', [NUM_RECORDS, 2, 0])
def test_pieces_of_any_number_of_hosts_are_the_whole(tmp_path, always_mapped, hosts, size):
    given = {name: column[:size] for name, column in some_columns().items()}
    for host in reversed(range(hosts)):
        assert not columns.has_pieces(tmp_path)
        columns.write_piece(tmp_path, given, host, hosts)
    assert columns.has_pieces(tmp_path)
    chex.assert_trees_all_equal(columns.read_pieces(tmp_path), given, strict=True)
    # A host writes its share and no more.
    sizes = []
    for host in range(hosts):
        sizes.append(np.load(tmp_path / f'weight-{host:05d}-of-{hosts:05d}.npy').nbytes)
    assert sum(sizes) == size * 8
    assert max(sizes) - min(sizes) <= 8


def save(folder, given, step=1):
    """Saves a checkpoint with these columns."""
    checkpoints = Checkpoints(folder, ConfigDict({'keep': 3, 'keep_every': 0}))
    state = {'w': jax.device_put(np.arange(3.0, dtype=np.float32), REPLICATED)}
    checkpoints.save(step, state, {'step': step}, given)
    checkpoints.wait()
    checkpoints.close()


def restore(folder, step=1):
    """The columns of a checkpoint."""
    checkpoints = Checkpoints(folder, ConfigDict({'keep': 3, 'keep_every': 0}))
    shape = {'w': jax.ShapeDtypeStruct((3,), np.float32)}
    _, meta, restored = checkpoints.restore(step, shape, {'w': REPLICATED})
    checkpoints.close()
    assert meta == {'step': step}
    return restored


def test_a_checkpoint_holds_the_columns_or_none(tmp_path):
    save(tmp_path / 'with', some_columns())
    chex.assert_trees_all_equal(restore(tmp_path / 'with'), some_columns(), strict=True)
    save(tmp_path / 'without', {})
    assert restore(tmp_path / 'without') == {}


def test_a_checkpoint_of_whole_columns_is_restored(tmp_path):
    """As it was written before there were pieces: a tree of arrays with a placeholder."""
    given = some_columns()
    state = {'w': jax.device_put(np.arange(3.0, dtype=np.float32), REPLICATED)}
    with ocp.CheckpointManager(tmp_path, item_names=('state', 'meta', 'columns')) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({'step': 1}),
            columns=ocp.args.StandardSave({'_': np.zeros((), np.int8), **given}),
        )
        manager.save(1, args=items, force=True)
    chex.assert_trees_all_equal(restore(tmp_path), given, strict=True)


def test_a_piece_of_another_size_is_a_sentence(tmp_path):
    save(tmp_path, {'label': np.arange(10)})
    piece = tmp_path / '1' / 'columns' / 'label-00000-of-00001.npy'
    np.save(piece, np.arange(9))
    with pytest.raises(ConfigError, match=r'cannot be read .*expected int64 of shape \(10,\)'):
        restore(tmp_path)
    piece.unlink()
    with pytest.raises(ConfigError, match='cannot be read .*No such file'):
        restore(tmp_path)


def test_older_columns_get_the_declared_type():
    stored = {'label': np.array([[3, -1]], np.int32), 'other': np.ones(1)}
    declared = {'label': jax.ShapeDtypeStruct((2,), np.int8)}
    expected = {'label': np.array([[3, -1]], np.int8), 'other': np.ones(1)}
    chex.assert_trees_all_equal(columns.as_declared(stored, declared), expected, strict=True)


@pytest.mark.parametrize(
    'classes, dtype', [(2, 'int8'), (128, 'int8'), (129, 'int16'), (32768, 'int16'), (32769, 'i4')]
)
def test_labels_take_the_smallest_type(classes, dtype):
    assert heads.label_dtype(classes) == dtype
    labels = np.array([-1, classes - 1])
    np.testing.assert_array_equal(labels.astype(heads.label_dtype(classes)), labels)


def test_rows_of_records_come_in_any_order_and_some_not_at_all(monkeypatch):
    monkeypatch.setattr(refresh, 'MOVED_AT_ONCE', 2)
    rng = np.random.default_rng(0)
    features = rng.random((9, 2), np.float32)
    for missing in ([], [4], [0, 7, 8]):
        found = RecordRows(9)
        records = np.setdiff1d(rng.permutation(9), missing)
        rng.shuffle(records)
        for part in np.array_split(records, 3):
            found.add(part, {'x': features[part], 'x/valid': part % 2 == 0})
        expected = np.sort(records)
        joined = found.joined()
        assert joined['index'].tolist() == expected.tolist()
        np.testing.assert_array_equal(joined['x'], features[expected])
        np.testing.assert_array_equal(joined['x/valid'], expected % 2 == 0)


@pytest.mark.parametrize('missing', [0, 1])
def test_rows_of_records_are_in_memory_once(missing):
    size, width = 200_000, 32
    tracemalloc.start()
    try:
        found = RecordRows(size)
        for first in range(0, size, 500):
            part = np.arange(first + missing, first + 500)
            found.add(part, {'x': np.ones((len(part), width), np.float32)})
        joined = found.joined()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * joined['x'].nbytes
