import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.loading import order
from data_pipelines.loading.order import Order, Source

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
    _, counts = np.unique(
        [order.permute(np.arange(3), 3, 0, e) for e in range(3000)], axis=0, return_counts=True
    )
    assert len(counts) == 6 and ((counts - 500) ** 2 / 500).sum() < 25.7


@pytest.mark.parametrize('n', [10**5, 10**6, 10**7])
def test_epochs_of_small_seeds_are_not_correlated(n):
    """For seeds such as these other index shuffles have 0.94 between epochs 1 and 2 of a million records, 0.4 between neighbours."""
    i = np.arange(20000)
    epochs = [Order([Source(n)], seed).rows(e * n + i)[1] for seed in (0, 1) for e in range(4)]
    c = np.corrcoef(np.stack([*epochs, i]))
    assert np.abs(c - np.eye(9)).max() < 0.035  # five standard deviations of what chance does
    for e in epochs:
        for lag in (1, 2, 8, 256):
            assert abs(np.corrcoef(e[lag:], e[:-lag])[0, 1]) < 0.035


@st.composite
def mixtures(draw):
    """(sources, batch size): weights, exact shares, records weighted by a column, in any combination that is allowed."""
    batch = draw(st.sampled_from([12, 24]))
    n = draw(st.integers(1, 4))
    shared = draw(st.lists(st.integers(0, batch // n // 2), min_size=n, max_size=n))
    shared[draw(st.integers(0, n - 1))] = 0  # one takes what is left
    sources = []
    for rows in shared:
        size = draw(st.integers(1, 90))
        sampling = None
        if draw(st.booleans()):
            sampling = np.array(
                draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=size, max_size=size))
            )
            sampling[draw(st.integers(0, size - 1))] = 1.0
        sources.append(
            Source(size, draw(st.sampled_from([0.37, 1.0, 3.0])), rows / batch, sampling)
        )
    return sources, batch


@settings(max_examples=60, deadline=None)
@given(
    mixture=mixtures(),
    seed=seeds,
    begin=st.integers(0, 40),
    hosts=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_any_mixture_resumed_at_any_step_on_any_number_of_hosts(mixture, seed, begin, hosts):
    sources, batch = mixture
    steps, counts = 4, np.array([round(s.share * batch) for s in sources])
    whole = Order(sources, seed, batch).rows(np.arange((begin + steps) * batch))
    later = [x[begin * batch :].reshape(steps, batch) for x in whole]
    resumed = Order(
        sources, seed, batch, begin * batch
    )  # as a run does that has consumed that much
    for step in range(steps):
        parts = [
            resumed.rows(order.train_positions(step, begin * batch, batch, (i, hosts)))
            for i in range(hosts)
        ]
        for x, y in zip(later, map(np.concatenate, zip(*parts))):
            np.testing.assert_array_equal(x[step], y)
    source, index, epoch = whole
    of_batch = np.stack([np.bincount(s, minlength=len(sources)) for s in source.reshape(-1, batch)])
    rest = counts == 0
    assert (of_batch[:, ~rest] == counts[~rest]).all() and (
        of_batch[:, rest].sum(1) == batch - counts.sum()
    ).all()
    for i, s in enumerate(sources):
        mine = source == i
        assert index[mine].size == 0 or (0 <= index[mine].min() and index[mine].max() < s.size)
        if s.sampling is not None:
            assert (s.sampling[index[mine]] > 0).all()
            continue
        place = (
            epoch[mine] * s.size + index[mine]
        )  # each record once in every epoch, epochs one after another
        assert len(np.unique(place)) == len(place) and (np.diff(epoch[mine]) >= 0).all()
        full = np.bincount(epoch[mine])[:-1]
        assert (full == s.size).all()


def test_permute_one_element_of_a_huge_set_is_immediate():
    got = order.permute(np.array([0, 1, 10**15 - 1]), 10**15, 3)
    assert len(set(got.tolist())) == 3 and got.max() < 10**15


def test_uniform_is_keyed_and_flat():
    p = np.arange(50000)
    u = order.uniform(7, p, 'crop', 3)
    assert u.shape == (50000, 3) and u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(u[[5, 900]], order.uniform(7, np.array([5, 900]), 'crop', 3))
    np.testing.assert_array_equal(
        u[:, :2], order.uniform(7, p, 'crop', 2)
    )  # more draws change no earlier one
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 3000) ** 2 / 3000).sum() < 100  # 49 degrees of freedom: 99.998 % point
    columns = [
        u[:, 0],
        u[:, 1],
        order.uniform(7, p, 'flip', 1)[:, 0],
        order.uniform(8, p, 'crop', 1)[:, 0],
        np.roll(u[:, 0], 1),
    ]
    c = np.corrcoef(columns)
    assert abs(c - np.eye(5)).max() < 0.025


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(5, 60), st.integers(1, 4)), min_size=1, max_size=4),
    seed=seeds,
)
def test_each_record_once_per_epoch_per_source(parts, seed):
    o = Order([Source(n, w) for n, w in parts], seed)
    total = sum(w for _, w in parts)
    block = total // math.gcd(
        *(w for _, w in parts)
    )  # slots after which proportions are exact, before they are repeated
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
    assert (
        (counts[:, 0] == 8).all()
        and (counts[:, 1] == 2).all()
        and (counts[:, 2:].sum(1) == 6).all()
    )
    for i in range(len(sources)):
        for e in np.unique(epoch[source == i]):
            seen = index[(source == i) & (epoch == e)]
            assert len(set(seen.tolist())) == len(seen)


def test_each_epoch_has_its_own_order():
    _, index, _ = Order([Source(1000)], 0).rows(np.arange(3000))
    epochs = index.reshape(3, 1000)
    assert (np.sort(epochs) == np.arange(1000)).all()
    assert (
        np.abs(np.corrcoef(epochs) - np.eye(3)).max() < 0.15 and (epochs[0] == epochs[1]).sum() < 20
    )


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
    source, _, _ = Order([Source(10, 0.1234567), Source(10, 1e-9), Source(10, 0.7)], 2).rows(
        np.arange(4096 * 4)
    )
    share = np.bincount(source, minlength=3) / len(source)
    assert abs(share[0] - 0.1234567 / 0.8234567) < 1e-3 and share[1] > 0


@pytest.mark.parametrize(
    'weights, shares',
    [
        ((1.0, 1e-7), (1 - 1 / 4097, 1 / 4097)),  # rare, not never
        ((1e-7, 3e-7), (0.25, 0.75)),
        ((6e-7, 1.2e-6), (1 / 3, 2 / 3)),
        ((5e-324, 5e-324), (0.5, 0.5)),
    ],
)
def test_small_weights_are_in_proportion(weights, shares):
    sources = [Source(10, weight) for weight in weights]
    length = 4097 * 3
    source, _, _ = Order(sources, 2).rows(np.arange(length))
    share = np.bincount(source, minlength=2) / length
    np.testing.assert_allclose(share, shares, atol=1e-3)
    assert share.min() > 0


@pytest.mark.parametrize(
    'sources, batch, say',
    [
        ([], 8, 'no source'),
        ([Source(0)], 8, 'no records'),
        ([Source(9, share=0.3), Source(9)], 8, 'whole number of rows'),
        ([Source(9, share=0.75), Source(9, share=0.5)], 8, 'more than a whole batch'),
        ([Source(9, share=0.5)], 8, 'no source without'),
        ([Source(9, share=1.0), Source(9)], 8, 'never be read'),
        ([Source(3, sampling=np.zeros(3))], 8, 'not all'),
        ([Source(3, sampling=np.ones(2))], 8, '3 finite'),
    ],
)
def test_wrong_mixtures_say_what_is_wrong(sources, batch, say):
    with pytest.raises(DataError, match=say):
        Order(sources, 0, batch)


def test_batch_must_divide_over_hosts():
    with pytest.raises(DataError, match='multiple of 3'):
        order.train_positions(0, 0, 8, (0, 3))
