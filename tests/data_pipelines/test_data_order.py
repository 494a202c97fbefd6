"""The order of examples: a pure function of position and seed, whatever the hosts and batches."""

import math
import tracemalloc

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.loading import order
from data_pipelines.loading.order import Order, Source
from data_pipelines.loading.weighted_records import WeightedRecords
from vatt_jax.parallel.hosts import stretch

sizes = st.integers(1, 700)
seeds = st.integers(0, 2**40)


def chi_squared(counts, expected):
    """Σ (count - expected)² / expected."""
    return ((counts - expected) ** 2 / expected).sum()


def correlation(first, second):
    """Correlation coefficient of two sequences."""
    return np.corrcoef(first, second)[0, 1]


def is_without_repetition(values):
    """Whether no value comes twice."""
    return len(np.unique(values)) == len(values)


def rows_of_hosts(order_, step, consumed, batch_size, hosts):
    """(source, index, epoch) of one global batch, joined from the rows of each host."""
    parts = []
    for host in range(hosts):
        positions = order.train_positions(step, consumed, batch_size, (host, hosts))
        parts.append(order_.rows(positions))
    return tuple(np.concatenate(columns) for columns in zip(*parts))


@settings(max_examples=60, deadline=None)
@given(n=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(order.permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_permutations_look_random():
    n = 10**6
    i = np.arange(20000)
    first_epoch = order.permute(i, n, 0, 1)
    second_epoch = order.permute(i, n, 0, 2)
    another_seed = order.permute(i, n, 1, 1)
    assert abs(correlation(first_epoch, second_epoch)) < 0.03
    assert abs(correlation(first_epoch, another_seed)) < 0.03
    assert abs(correlation(first_epoch[1:], first_epoch[:-1])) < 0.03
    assert abs(correlation(first_epoch, i)) < 0.03


def test_every_permutation_of_three_comes_about_equally_often():
    permutations = [order.permute(np.arange(3), 3, 0, epoch) for epoch in range(3000)]
    _, counts = np.unique(permutations, axis=0, return_counts=True)
    chex.assert_shape(counts, (6,))
    # 5 degrees of freedom: 99.99 % point.
    assert chi_squared(counts, 500) < 25.7


@pytest.mark.parametrize('n', [10**5, 10**6, 10**7])
def test_epochs_of_small_seeds_are_not_correlated(n):
    """For such seeds other index shuffles have 0.94 between epochs 1 and 2 of a million records.

    Between neighbours they have 0.4.
    """
    bound = 0.035  # five standard deviations of what chance does
    i = np.arange(20000)
    epochs = []
    for seed in (0, 1):
        order_ = Order([Source(n)], seed)
        for epoch in range(4):
            _, index, _ = order_.rows(epoch * n + i)
            epochs.append(index)
    correlations = np.corrcoef(np.stack([*epochs, i]))
    assert np.abs(correlations - np.eye(9)).max() < bound
    for index in epochs:
        for lag in (1, 2, 8, 256):
            assert abs(correlation(index[lag:], index[:-lag])) < bound


@st.composite
def mixtures(draw):
    """(arguments of each `Source`, batch size).

    Weights, exact shares and records weighted by a column, in any combination that is allowed.
    """
    batch_size = draw(st.sampled_from([12, 24]))
    count = draw(st.integers(1, 4))
    rows_at_most = batch_size // count // 2
    share_rows = draw(st.lists(st.integers(0, rows_at_most), min_size=count, max_size=count))
    share_rows[draw(st.integers(0, count - 1))] = 0  # one takes what is left
    sources = []
    for rows in share_rows:
        size = draw(st.integers(1, 90))
        sampling = None
        if draw(st.booleans()):
            weights = st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=size, max_size=size)
            sampling = np.array(draw(weights))
            sampling[draw(st.integers(0, size - 1))] = 1.0
        weight = draw(st.sampled_from([0.37, 1.0, 3.0]))
        sources.append((size, weight, rows / batch_size, sampling))
    return sources, batch_size


@settings(max_examples=60, deadline=None)
@given(
    mixture=mixtures(),
    seed=seeds,
    begin=st.integers(0, 40),
    hosts=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_any_mixture_resumed_at_any_step_on_any_number_of_hosts(mixture, seed, begin, hosts):
    specs, batch_size = mixture
    sources = [Source(*spec) for spec in specs]
    num_steps = 4
    consumed = begin * batch_size
    whole = Order(sources, seed, batch_size).rows(np.arange(consumed + num_steps * batch_size))
    resumed = Order(sources, seed, batch_size, offset=consumed)
    for step in range(num_steps):
        first = consumed + step * batch_size
        expected = tuple(column[first : first + batch_size] for column in whole)
        got = rows_of_hosts(resumed, step, consumed, batch_size, hosts)
        chex.assert_trees_all_equal(got, expected)

    source, index, epoch = whole
    check_shares(sources, source.reshape(-1, batch_size))
    for i, spec in enumerate(sources):
        is_mine = source == i
        check_records(spec, index[is_mine], epoch[is_mine])


def check_shares(sources, source_of_rows):
    """In every batch [steps B] sources with a share have exactly it, the others the rest."""
    batch_size = source_of_rows.shape[1]
    share_rows = np.array([round(spec.share * batch_size) for spec in sources])
    counts = np.stack([np.bincount(batch, minlength=len(sources)) for batch in source_of_rows])
    has_share = share_rows > 0
    assert (counts[:, has_share] == share_rows[has_share]).all()
    assert (counts[:, ~has_share].sum(1) == batch_size - share_rows.sum()).all()


def check_records(spec, index, epoch):
    """The records drawn from one source exist, and come once in every epoch or by their weights."""
    if not len(index):
        return
    assert index.min() >= 0
    assert index.max() < spec.size
    if spec.sampling is not None:
        assert (spec.sampling[index] > 0).all()
        return
    # Each record once in every epoch, epochs one after another, all but the last complete.
    assert is_without_repetition(epoch * spec.size + index)
    assert (np.diff(epoch) >= 0).all()
    complete_epochs = np.bincount(epoch)[:-1]
    assert (complete_epochs == spec.size).all()


def test_permute_one_element_of_a_huge_set_is_immediate():
    permuted = order.permute(np.array([0, 1, 10**15 - 1]), 10**15, 3)
    assert len(set(permuted.tolist())) == 3
    assert permuted.max() < 10**15


def test_uniform_draws_are_keyed_by_position():
    positions = np.arange(50000)
    draws = order.uniform(7, positions, 'crop', 3)
    chex.assert_shape(draws, (50000, 3))
    assert draws.min() >= 0
    assert draws.max() < 1
    two_positions = order.uniform(7, np.array([5, 900]), 'crop', 3)
    np.testing.assert_array_equal(two_positions, draws[[5, 900]])
    # More draws change no earlier one.
    np.testing.assert_array_equal(order.uniform(7, positions, 'crop', 2), draws[:, :2])


def test_uniform_draws_are_flat_and_not_correlated():
    positions = np.arange(50000)
    draws = order.uniform(7, positions, 'crop', 3)
    counts, _ = np.histogram(draws, 50, (0, 1))
    # 49 degrees of freedom: 99.998 % point.
    assert chi_squared(counts, 3000) < 100
    columns = [
        draws[:, 0],
        draws[:, 1],
        order.uniform(7, positions, 'flip', 1)[:, 0],
        order.uniform(8, positions, 'crop', 1)[:, 0],
        np.roll(draws[:, 0], 1),
    ]
    assert np.abs(np.corrcoef(columns) - np.eye(5)).max() < 0.025


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(5, 60), st.integers(1, 4)), min_size=1, max_size=4),
    seed=seeds,
)
def test_each_record_once_per_epoch_per_source(parts, seed):
    """`parts` are (size, weight) of each source."""
    sources = [Source(size, weight) for size, weight in parts]
    weights = [weight for _, weight in parts]
    total = sum(weights)
    # Slots after which proportions are exact, before they are repeated.
    block = total // math.gcd(*weights)
    block *= max(1, 64 // block) * 2
    source, index, epoch = Order(sources, seed).rows(np.arange(block * 3))
    for i, (size, weight) in enumerate(parts):
        is_mine = source == i
        # Exact proportions over whole blocks.
        assert is_mine.sum() == block * 3 * weight // total
        for e in np.unique(epoch[is_mine]):
            seen = index[is_mine & (epoch == e)]
            assert is_without_repetition(seen)
            assert seen.max() < size
            if e < epoch[is_mine].max():
                assert len(seen) == size


@settings(max_examples=30, deadline=None)
@given(batches=st.integers(1, 12), seed=seeds, start=st.integers(0, 5000))
def test_shares_are_exact_in_every_batch(batches, seed, start):
    sources = [Source(37, share=0.5), Source(11, share=0.125), Source(50, 3.0), Source(9, 1.0)]
    positions = start + np.arange(16 * batches)
    source, index, epoch = Order(sources, seed, 16, offset=start).rows(positions)
    counts = np.stack([np.bincount(batch, minlength=4) for batch in source.reshape(-1, 16)])
    assert (counts[:, 0] == 8).all()
    assert (counts[:, 1] == 2).all()
    assert (counts[:, 2:].sum(1) == 6).all()
    for i in range(len(sources)):
        for e in np.unique(epoch[source == i]):
            assert is_without_repetition(index[(source == i) & (epoch == e)])


def test_each_epoch_has_its_own_order():
    _, index, _ = Order([Source(1000)], 0).rows(np.arange(3000))
    epochs = index.reshape(3, 1000)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(1000), (3, 1)))
    assert np.abs(np.corrcoef(epochs) - np.eye(3)).max() < 0.15
    assert (epochs[0] == epochs[1]).sum() < 20


def test_shares_continue_when_the_batch_size_changes():
    sources = [Source(40, share=0.25), Source(300)]
    source_before, index_before, _ = Order(sources, 0, 8).rows(np.arange(80))
    source_after, index_after, _ = Order(sources, 0, 16, offset=80).rows(np.arange(80, 160))
    of_first = np.concatenate([index_before[source_before == 0], index_after[source_after == 0]])
    # 20 rows of either: one epoch, none twice.
    assert sorted(of_first) == list(range(40))


@settings(max_examples=30, deadline=None)
@given(hosts=st.sampled_from([1, 2, 3, 4, 6]), consumed=st.integers(0, 10**12), seed=seeds)
def test_hosts_partition_the_global_order(hosts, consumed, seed):
    order_ = Order([Source(1000, 2.0), Source(77, 1.0)], seed)
    whole = order_.rows(order.train_positions(3, consumed, 12))
    chex.assert_trees_all_equal(rows_of_hosts(order_, 3, consumed, 12, hosts), whole)


@pytest.mark.parametrize('batch_size', [8, 96])
def test_order_does_not_know_the_batch_size(batch_size):
    order_ = Order([Source(50, 1.0), Source(70, 0.37)], 5)
    batches = []
    for step in range(960 // batch_size):
        batches.append(order_.rows(order.train_positions(step, 0, batch_size)))
    got = tuple(np.concatenate(columns) for columns in zip(*batches))
    chex.assert_trees_all_equal(got, order_.rows(np.arange(960)))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), rows_per_host=st.integers(1, 9), hosts=st.integers(1, 4))
def test_one_pass_is_exactly_once(n, rows_per_host, hosts):
    batch_size = rows_per_host * hosts
    seen = []
    for step in range(order.one_pass_batches(n, batch_size)):
        for host in range(hosts):
            positions, valid = order.one_pass(step, n, batch_size, (host, hosts))
            chex.assert_shape([positions, valid], (rows_per_host,))
            seen += positions[valid].tolist()
    assert sorted(seen) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), rows_per_host=st.integers(1, 9), num_hosts=st.integers(1, 4))
def test_stretches_are_consecutive_and_exactly_once(n, rows_per_host, num_hosts):
    batch_size = rows_per_host * num_hosts
    seen = []
    for host in range(num_hosts):
        of_host = []
        for step in range(order.stretch_batches(n, batch_size, num_hosts)):
            positions, valid = order.stretch_pass(step, n, batch_size, (host, num_hosts))
            chex.assert_shape([positions, valid], (rows_per_host,))
            of_host += positions[valid].tolist()
        # The stretches of `vatt_jax.parallel.hosts`, by which refreshes number their records.
        assert of_host == list(range(*stretch(n, host, num_hosts)))
        seen += of_host
    assert seen == list(range(n))
    # No batch is there for nothing.
    longest = max(1, -(-n // num_hosts)) if n else 0
    assert order.stretch_batches(n, batch_size, num_hosts) == -(-longest // rows_per_host)


def test_sampling_by_a_column():
    weights = np.array([0.0, 1, 2, 0, 5])
    _, index, _ = Order([Source(5, sampling=weights)], 1).rows(np.arange(40000))
    share = np.bincount(index, minlength=5) / 40000
    np.testing.assert_allclose(share, weights / 8, atol=0.012)
    assert share[0] == 0
    assert share[3] == 0


def test_unequal_weights_of_any_kind():
    sources = [Source(10, 0.1234567), Source(10, 1e-9), Source(10, 0.7)]
    source, _, _ = Order(sources, 2).rows(np.arange(4096 * 4))
    share = np.bincount(source, minlength=3) / len(source)
    assert abs(share[0] - 0.1234567 / 0.8234567) < 1e-3
    assert share[1] > 0


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
    'sources, message',
    [
        ([], 'no source'),
        ([Source(0)], 'no records'),
        ([Source(9, share=0.3), Source(9)], 'whole number of rows'),
        ([Source(9, share=0.75), Source(9, share=0.5)], 'more than a whole batch'),
        ([Source(9, share=0.5)], 'no source without'),
        ([Source(9, share=1.0), Source(9)], 'never be read'),
        ([Source(9, share=float('nan'))], 'share nan'),
        ([Source(9, -1.0)], 'expected weights that are not negative'),
        ([Source(9, float('nan'))], 'expected weights that are not negative'),
        ([Source(9, float('inf'))], 'expected weights that are not negative'),
        ([Source(3, sampling=np.zeros(3))], 'not all'),
        ([Source(3, sampling=np.ones(2))], '3 finite'),
    ],
)
def test_wrong_mixtures_say_what_is_wrong(sources, message):
    with pytest.raises(DataError, match=message):
        Order(sources, 0, 8)


def test_batch_must_divide_over_hosts():
    with pytest.raises(DataError, match='multiple of 3'):
        order.train_positions(0, 0, 8, (0, 3))


@st.composite
def factors_of_weights(draw):
    """One to three arrays of one length, of several types; their product is not all zero."""
    size = draw(st.integers(1, 700))  # several blocks of sums, the last one in part
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    factors = []
    for dtype in draw(st.lists(st.sampled_from(['f4', 'f8', 'u1', 'i4']), min_size=1, max_size=3)):
        values = rng.integers(0, 9, size) / (7 if dtype.startswith('f') else 1)
        values[draw(st.integers(0, size - 1))] = 0
        factors.append(values.astype(dtype))
    total = np.ones(size)
    for factor in factors:
        total = total * factor.astype(np.float64)
    if not total.any():
        factors = [np.ones(size, np.float32)]
    return tuple(factors)


@settings(max_examples=60, deadline=None)
@given(factors=factors_of_weights(), seed=seeds)
def test_draws_by_weights_are_those_of_one_cumulative_table(factors, seed):
    """To the digit, and never a record of weight 0, also where a draw falls on an entry."""
    weights = np.ones(len(factors[0]))
    for factor in factors:
        weights = weights * factor.astype(np.float64)
    table = np.cumsum(weights)
    table = table / table[-1]
    draws = np.random.default_rng(seed).random(300)
    u = np.concatenate([draws, table[table < 1], [0.0, np.nextafter(1, 0)]])
    expected = np.minimum(np.searchsorted(table, u, side='right'), len(weights) - 1)
    got = WeightedRecords(factors, len(weights), 'a').draw(u)
    np.testing.assert_array_equal(got, expected)
    assert (weights[got] > 0).all()


def test_weights_of_records_take_little_memory():
    """Summed block by block, whatever their number: they are read where they lie."""
    size = 2_000_000
    weights = np.random.default_rng(0).random(size, np.float32)
    tracemalloc.start()
    try:
        order_ = Order([Source(size, sampling=(weights, weights))], 0)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 0.2 * size
    assert peak < 8e6
    _, index, _ = order_.rows(np.arange(4096))
    # Drawn in proportion to the square of a uniform number, whose mean is then 3/4.
    assert abs(weights[index].mean() - 0.75) < 0.02


@pytest.mark.parametrize('with_shares', [False, True])
def test_hundreds_of_sources_have_the_order_of_each_by_itself(with_shares):
    """Rows of each source are its own permutation, epoch after epoch, whatever comes beside it."""
    sources = []
    for i in range(300):
        has_share = with_shares and i % 5 == 0
        sources.append(Source(1 + i % 37, 1.0 + i % 3, 2 / 512 if has_share else 0.0))
    num_rows = 512 * 40
    source, index, epoch = Order(sources, 3, 512).rows(np.arange(num_rows))
    assert set(source.tolist()) == set(range(300))
    for i, spec in enumerate(sources):
        draws = np.arange((source == i).sum())
        expected = []
        for e in range(math.ceil(len(draws) / spec.size)):
            expected += order.permute(np.arange(spec.size), spec.size, 3, 'record', i, e).tolist()
        assert index[source == i].tolist() == expected[: len(draws)]
        assert epoch[source == i].tolist() == (draws // spec.size).tolist()


def test_an_epoch_may_have_several_clips_of_each_record():
    """In each epoch all of them, in one order: the gaps between clips of a record are random."""
    clips, size = 10, 200
    positions = np.arange(3 * clips * size)
    for sources in ([Source(size)], [Source(size), Source(size)]):
        source, index, epoch = Order(sources, 5, clips_per_epoch=clips).rows(
            np.arange(len(sources) * len(positions))
        )
        of_first = source == 0
        for e in range(3):
            counts = np.bincount(index[of_first & (epoch == e)], minlength=size)
            assert counts.tolist() == [clips] * size
    _, index, epoch = Order([Source(size)], 5, clips_per_epoch=clips).rows(positions)
    assert epoch.tolist() == (positions // (clips * size)).tolist()
    # Of clips in random order, one in `size` is of the record of the clip before it.
    gaps = np.concatenate([np.diff(np.flatnonzero(index == record)) for record in range(size)])
    assert (gaps < size / 2).mean() > 0.3
    resumed = Order([Source(size)], 5, 8, offset=24, clips_per_epoch=clips).rows(positions[24:])
    assert resumed[1].tolist() == index[24:].tolist()


def test_digits_of_the_order():
    """Written down once: a run that is resumed by a later version goes on in the same order."""
    sources = [Source(1000, 2.0), Source(77, 1.0), Source(5, share=0.25)]
    positions = np.array([0, 1, 2, 3, 500, 10**12])
    source, index, epoch = Order(sources, -7, 8, 3).rows(positions)
    assert source.tolist() == [2, 1, 2, 0, 1, 1]
    assert index.tolist() == [4, 61, 1, 696, 53, 66]
    assert epoch.tolist() == [0, 0, 0, 0, 1, 3246753246]
    assert order.key('a', 1, -2) == 12527402457856292239
