import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import order
from data_pipelines.errors import DataError
from data_pipelines.order import Order, Source

sizes = st.integers(1, 700)
seeds = st.integers(0, 2**40)


@settings(max_examples=60, deadline=None)
@given(n=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(order.permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_permute_looks_random():
    n = 10**6
    i = np.arange(20000)
    a, b, c = (order.permute(i, n, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1)))
    for x, y in ((a, b), (a, c), (a[1:], a[:-1]), (a, i)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03
    # Every permutation of three comes about equally often (chi-squared with 5 degrees of freedom, 99.99 % point 25.7).
    _, counts = np.unique([order.permute(np.arange(3), 3, 0, e) for e in range(3000)], axis=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 500) ** 2 / 500).sum() < 25.7


def test_permute_one_element_of_a_huge_set_is_immediate():
    got = order.permute(np.array([0, 1, 10**15 - 1]), 10**15, 3)
    assert len(set(got.tolist())) == 3 and got.max() < 10**15


def test_uniform_is_keyed_and_flat():
    p = np.arange(50000)
    u = order.uniform(7, p, 'crop', 3)
    assert u.shape == (50000, 3) and u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(u[[5, 900]], order.uniform(7, np.array([5, 900]), 'crop', 3))
    np.testing.assert_array_equal(u[:, :2], order.uniform(7, p, 'crop', 2))  # more draws change no earlier one
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 3000) ** 2 / 3000).sum() < 100  # 49 degrees of freedom: 99.998 % point
    columns = [u[:, 0], u[:, 1], order.uniform(7, p, 'flip', 1)[:, 0], order.uniform(8, p, 'crop', 1)[:, 0], np.roll(u[:, 0], 1)]
    c = np.corrcoef(columns)
    assert abs(c - np.eye(5)).max() < 0.025


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(5, 60), st.integers(1, 4)), min_size=1, max_size=4), seed=seeds)
def test_each_record_once_per_epoch_per_source(parts, seed):
    o = Order([Source(n, w) for n, w in parts], seed)
    total = sum(w for _, w in parts)
    block = total // math.gcd(*(w for _, w in parts))  # slots after which proportions are exact, before they are repeated
    block *= max(1, 64 // block) * 2
    source, index, epoch = o.rows(np.arange(block * 3))
    for i, (n, w) in enumerate(parts):
        mine = source == i
        assert mine.sum() == block * 3 * w // total  # exact proportions over whole blocks
        for e in np.unique(epoch[mine]):
            seen = index[mine & (epoch == e)]
            assert len(set(seen.tolist())) == len(seen) and seen.max() < n
            if e < epoch[mine].max():
                assert len(seen) == n


@settings(max_examples=30, deadline=None)
@given(batches=st.integers(1, 12), seed=seeds, start=st.integers(0, 5000))
def test_shares_are_exact_in_every_batch(batches, seed, start):
    sources = [Source(37, share=0.5), Source(11, share=0.125), Source(50, 3.0), Source(9, 1.0)]
    o = Order(sources, seed, 16, offset=start)
    source, index, epoch = o.rows(start + np.arange(16 * batches))
    counts = np.stack([np.bincount(s, minlength=4) for s in source.reshape(-1, 16)])
    assert (counts[:, 0] == 8).all() and (counts[:, 1] == 2).all() and (counts[:, 2:].sum(1) == 6).all()
    for i in range(len(sources)):
        for e in np.unique(epoch[source == i]):
            seen = index[(source == i) & (epoch == e)]
            assert len(set(seen.tolist())) == len(seen)


def test_each_epoch_has_its_own_order():
    _, index, _ = Order([Source(1000)], 0).rows(np.arange(3000))
    epochs = index.reshape(3, 1000)
    assert (np.sort(epochs) == np.arange(1000)).all()
    assert np.abs(np.corrcoef(epochs) - np.eye(3)).max() < 0.15 and (epochs[0] == epochs[1]).sum() < 20


def test_shares_continue_when_the_batch_size_changes():
    sources = [Source(40, share=0.25), Source(300)]
    before = Order(sources, 0, 8).rows(np.arange(80))
    after = Order(sources, 0, 16, offset=80).rows(np.arange(80, 160))
    first = np.concatenate([before[1][before[0] == 0], after[1][after[0] == 0]])
    assert sorted(first) == list(range(40))  # 20 rows of either: one epoch, nobody twice


@settings(max_examples=30, deadline=None)
@given(hosts=st.sampled_from([1, 2, 3, 4, 6]), consumed=st.integers(0, 10**12), seed=seeds)
def test_hosts_partition_the_global_order(hosts, consumed, seed):
    o = Order([Source(1000, 2.0), Source(77, 1.0)], seed)
    whole = o.rows(order.train_positions(3, consumed, 12))
    parts = [o.rows(order.train_positions(3, consumed, 12, (i, hosts))) for i in range(hosts)]
    for a, b in zip(whole, map(np.concatenate, zip(*parts))):
        np.testing.assert_array_equal(a, b)


def test_order_does_not_know_the_batch_size():
    o = Order([Source(50, 1.0), Source(70, 0.37)], 5)
    whole = o.rows(np.arange(960))
    for b in (8, 96):
        got = [o.rows(order.train_positions(k, 0, b)) for k in range(960 // b)]
        for x, y in zip(whole, map(np.concatenate, zip(*got))):
            np.testing.assert_array_equal(x, y)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), per_host=st.integers(1, 9), hosts=st.integers(1, 4))
def test_one_pass_is_exactly_once(n, per_host, hosts):
    b = per_host * hosts
    seen = []
    for step in range(order.one_pass_batches(n, b)):
        for i in range(hosts):
            positions, valid = order.one_pass(step, n, b, (i, hosts))
            assert len(positions) == per_host
            seen += positions[valid].tolist()
    assert sorted(seen) == list(range(n))


def test_sampling_by_a_column():
    weights = np.array([0.0, 1, 2, 0, 5])
    _, index, _ = Order([Source(5, sampling=weights)], 1).rows(np.arange(40000))
    share = np.bincount(index, minlength=5) / 40000
    np.testing.assert_allclose(share, weights / 8, atol=0.012)
    assert share[0] == share[3] == 0


def test_unequal_weights_of_any_kind():
    source, _, _ = Order([Source(10, 0.1234567), Source(10, 1e-9), Source(10, 0.7)], 2).rows(np.arange(4096 * 4))
    share = np.bincount(source, minlength=3) / len(source)
    assert abs(share[0] - 0.1234567 / 0.8234567) < 1e-3 and share[1] > 0


@pytest.mark.parametrize('sources, batch, say', [
    ([], 8, 'no source'), ([Source(0)], 8, 'no records'), ([Source(9, share=0.3), Source(9)], 8, 'whole number of rows'),
    ([Source(9, share=0.75), Source(9, share=0.5)], 8, 'more than a whole batch'), ([Source(9, share=0.5)], 8, 'no source without'),
    ([Source(9, share=1.0), Source(9)], 8, 'never be read'), ([Source(3, sampling=np.zeros(3))], 8, 'not all'),
    ([Source(3, sampling=np.ones(2))], 8, '3 finite')])
def test_wrong_mixtures_say_what_is_wrong(sources, batch, say):
    with pytest.raises(DataError, match=say):
        Order(sources, 0, batch)


def test_batch_must_divide_over_hosts():
    with pytest.raises(DataError, match='multiple of 3'):
        order.train_positions(0, 0, 8, (0, 3))
