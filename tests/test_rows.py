"""Rows of several hosts on devices: where each lies, and what is padding."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vatt_jax.clustering.rows import RowLayout, lay_out, mesh_by_process
from vatt_jax.parallel import hosts


def rows_mesh(num_devices):
    return mesh_by_process(Mesh(np.array(jax.devices()[:num_devices]), ('rows',)))


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    num_devices=st.integers(1, 3),
    spare=st.integers(0, 2),
)
def test_places_are_those_of_rows_that_are_put_there(lengths, num_devices, spare):
    """Against arrays that are padded by hand, process after process."""
    rows_per_device = -(-max(lengths) // num_devices) + spare
    if not rows_per_device or not sum(lengths):
        return
    sharding = NamedSharding(rows_mesh(1), PartitionSpec('rows'))
    layout = RowLayout(
        sharding, tuple(lengths), (num_devices,) * len(lengths), len(lengths) - 1, rows_per_device
    )
    padded = []
    first = 0
    for length in lengths:
        rows = np.full(num_devices * rows_per_device, -1)
        rows[:length] = np.arange(first, first + length)
        padded.append(rows)
        first += length
    padded = np.concatenate(padded)
    numbers = np.arange(layout.total)
    np.testing.assert_array_equal(padded[layout.places(numbers)], numbers)
    by_device = padded.reshape(-1, rows_per_device)
    np.testing.assert_array_equal(layout.counts, (by_device >= 0).sum(1))
    assert (layout.own.start, layout.own.stop) == (sum(lengths[:-1]), sum(lengths))


@pytest.mark.parametrize('num_rows', [1, 8, 21])
def test_rows_come_back_without_padding(num_rows):
    rows = np.arange(3 * num_rows, dtype=np.float32).reshape(num_rows, 3)
    layout = lay_out(num_rows, rows_mesh(8))
    placed = layout.place(rows)
    assert placed.shape == (-(-num_rows // 8) * 8, 3)
    assert len(placed.sharding.device_set) == 8
    np.testing.assert_array_equal(layout.fetch(placed), rows)


def test_what_one_process_exchanges_with_itself():
    part = np.arange(10, dtype=np.int64).reshape(5, 2) << 40
    np.testing.assert_array_equal(hosts.gather(part), part[None])
    assert hosts.total(np.float64(0.1)) == 0.1
    assert hosts.first_text('') == ''
    assert hosts.first_text('row 3: ' + 'ä' * 400).startswith('row 3: ä')
    assert hosts.own_stretch(7) == slice(0, 7)


def test_blocks_of_all_are_the_rows(monkeypatch):
    monkeypatch.setattr(hosts, 'EXCHANGED_BYTES', 33)  # two rows
    part = np.arange(14, dtype=np.int64).reshape(7, 2)
    joined = np.zeros_like(part)
    firsts = []
    for first, rows in hosts.blocks_of_all(part):
        firsts.append(first)
        joined[first : first + len(rows)] = rows
    assert firsts == [0, 2, 4, 6]
    np.testing.assert_array_equal(joined, part)


def test_rows_are_exchanged_by_their_numbers(monkeypatch):
    """In blocks; of every type, with rows of any shape; those that are not wanted are passed by."""
    monkeypatch.setattr(hosts, 'EXCHANGED_BYTES', 200)
    random = np.random.default_rng(0)
    numbers = random.permutation(50)[:40]
    missing = np.setdiff1d(np.arange(10, 20), numbers)
    numbers = np.concatenate([numbers, missing])
    for rows in (random.integers(0, 9, (50, 3), np.int32), random.random(50, np.float32)):
        found = hosts.exchanged(numbers, rows[numbers], slice(10, 20))
        np.testing.assert_array_equal(found, rows[10:20])
        assert found.dtype == rows.dtype
