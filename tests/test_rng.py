"""Keyed random bits.

They have good statistics in every direction of the key, and are the same however a batch is laid
out.
"""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

# Examples and counters: 2^18 draws, so a mean of uniforms has a standard error of 0.0006.
B, N = 256, 1024


def rng(step=0, seed=0, examples=B):
    """The root of one step's bits, for examples 0, 1, …"""
    return Rng.create(seed, step, jnp.arange(examples))


def later_examples(by):
    """The root for examples further down the order."""
    root = rng()
    return root.replace(examples=root.examples + by)


def neighbours(direction):
    """Two places of the tree that differ by one step along one direction of the key."""
    root = rng()
    return {
        'example': (root, later_examples(1)),
        'far example': (root, later_examples(B)),
        'step': (rng(step=0), rng(step=1)),
        'seed': (rng(seed=0), rng(seed=1)),
        'site': (root.at('q'), root.at('k')),
        'layer': (root.at('dropout').at(0), root.at('dropout').at(1)),
        'depth of the path': (root.at(0), root.at(0).at(0)),
        'order of the path': (root.at(0).at(1), root.at(1).at(0)),
        'step against seed': (rng(step=1, seed=0), rng(step=0, seed=1)),
    }[direction]


def chi_square(counts, expected):
    """Sum of (counted - expected)² / expected."""
    return ((counts - expected) ** 2 / expected).sum()


def assert_bytes_are_uniform(values):
    """Chi-square over 256 values: mean 255, standard deviation 22.6."""
    counts = np.bincount(values.ravel(), minlength=256)
    assert 150 < chi_square(counts, values.size / 256) < 380


def test_bytes_are_uniform():
    bits = rng().at('site').bits((N,))
    chex.assert_shape(bits, (B, N))
    chex.assert_type(bits, jnp.uint32)
    for byte in range(4):
        assert_bytes_are_uniform((np.asarray(bits) >> (8 * byte)) & 255)


def test_low_bytes_are_uniform_where_only_the_counter_or_only_the_example_varies():
    by_counter = rng().at('site').shared_bits((B * N,))
    by_example = Rng.create(0, 0, jnp.arange(B * N)).bits(())
    for bits in (by_counter, by_example):
        chex.assert_shape(bits, (B * N,))
        chex.assert_type(bits, jnp.uint32)
        assert_bytes_are_uniform(np.asarray(bits) & 255)


def test_uniform_draws_have_the_moments_of_the_distribution():
    draws = rng().uniform((N,))
    chex.assert_shape(draws, (B, N))
    chex.assert_type(draws, jnp.float32)
    u = np.asarray(draws, np.float64)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    moments = [u.mean(), u.var(), ((u - 0.5) ** 4).mean()]
    np.testing.assert_allclose(moments, [1 / 2, 1 / 12, 1 / 80], atol=0.003)
    # Each example and each counter by itself: means of N and of B draws, 5.5 standard errors for
    # the worst of them.
    assert np.abs(u.mean(1) - 0.5).max() < 5.5 / np.sqrt(12 * N)
    assert np.abs(u.mean(0) - 0.5).max() < 5.5 / np.sqrt(12 * B)
    between = np.asarray(rng().uniform((N,), -3.0, 5.0))
    np.testing.assert_allclose(between, -3 + 8 * u, atol=1e-5)


def test_normal_draws_have_the_moments_of_the_distribution():
    draws = rng().at('z').normal((N,))
    chex.assert_shape(draws, (B, N))
    chex.assert_type(draws, jnp.float32)
    chex.assert_tree_all_finite(draws)
    z = np.asarray(draws, np.float64)
    moments = [z.mean(), z.var(), (z**3).mean(), (z**4).mean()]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
    assert 4 < np.abs(z).max() < 5.5


def test_the_lowest_and_the_highest_draw_are_inside_and_finite():
    extremes = types.SimpleNamespace(bits=lambda shape: jnp.array([0, 2**32 - 1], jnp.uint32))
    low, high = np.asarray(Rng.uniform(extremes))
    assert low == 0
    assert 1 - 1e-7 < high < 1
    low, high = np.asarray(Rng.normal(extremes))
    assert -6 < low == -high < -5


@pytest.mark.parametrize(
    'direction',
    [
        'example',
        'far example',
        'step',
        'seed',
        'site',
        'layer',
        'depth of the path',
        'order of the path',
        'step against seed',
    ],
)
def test_neighbouring_keys_are_independent(direction):
    """Neither equal, nor correlated, nor shifted copies, nor alike in any single bit."""
    first, second = neighbours(direction)
    a = np.asarray(first.bits((N,)))
    b = np.asarray(second.bits((N,)))
    assert (a == b).mean() < 1e-4
    x = a / 2.0**32 - 0.5
    y = b / 2.0**32 - 0.5
    standard_error = 1 / np.sqrt(a.size)
    # An example further down is the other set's own.
    axes = (1,) if direction == 'example' else (0, 1)
    for shift in range(-3, 4):
        for axis in axes:
            correlation = (x * np.roll(y, shift, axis)).mean() * 12
            assert abs(correlation) < 5.5 * standard_error
            assert (a == np.roll(b, shift, axis)).mean() < 1e-4
    differing = a ^ b
    agree = [(((differing >> bit) & 1) == 0).mean() for bit in range(32)]
    np.testing.assert_allclose(agree, 0.5, atol=5.5 * 0.5 * standard_error)


def test_neighbouring_counters_are_independent():
    x = np.asarray(rng().at('site').uniform((32, 32)), np.float64) - 0.5
    for axis in (1, 2):
        for shift in (1, 2, 3, 16):
            correlation = (x * np.roll(x, shift, axis)).mean() * 12
            assert abs(correlation) < 5.5 / np.sqrt(x.size)
    bits = np.asarray(rng().at('site').bits((N,)))
    # 8 collisions are expected of 2^18 draws among 2^32.
    assert len(np.unique(bits)) > bits.size - 60


def test_no_example_is_a_shifted_copy_of_another():
    """2^20 draws of 2^16 examples, among which 128 pairs are equal by chance.

    Their standard deviation is 11, and each is of another two examples. Were the counter merely
    added to an example's word, the 15 or so pairs of examples whose words lie close would share
    several draws each.
    """
    bits = np.asarray(Rng.create(0, 0, jnp.arange(1 << 16)).at('site').bits((16,)))
    assert abs(bits.size - len(np.unique(bits)) - 128) < 60
    order = np.argsort(bits, axis=None)
    equal = np.flatnonzero(np.diff(bits.ravel()[order]) == 0)
    draws = np.stack([order[equal], order[equal + 1]])
    examples = np.sort(draws // 16, 0)
    assert len(np.unique(examples, axis=1).T) == len(equal)


def test_permutations_are_uniform():
    """Each of the 24 orders of four things equally often: chi-square, 23 degrees of freedom."""
    orders = Rng.create(0, 0, jnp.arange(24_000)).at('order').permutation(4)
    chex.assert_shape(orders, (24_000, 4))
    chex.assert_type(orders, jnp.int32)
    orders = np.asarray(orders)
    assert (np.sort(orders, -1) == np.arange(4)).all()
    _, counts = np.unique(orders @ 4 ** np.arange(4), return_counts=True)
    assert len(counts) == 24
    assert chi_square(counts, 1000) < 60


def test_a_permutation_has_one_fixed_point_on_average():
    orders = np.asarray(rng().permutation(100))
    chex.assert_shape(orders, (B, 100))
    assert (np.sort(orders, -1) == np.arange(100)).all()
    fixed_points = (orders == np.arange(100)).sum(-1)
    # Standard error 1/16.
    assert abs(fixed_points.mean() - 1) < 0.35


def test_a_shared_permutation_is_the_same_whatever_the_batch_holds():
    shared = np.asarray(rng().permutation(100, per_example=False))
    few = rng(examples=3).permutation(100, per_example=False)
    chex.assert_trees_all_equal(shared, np.asarray(few))
    assert sorted(shared) == list(range(100))
    assert not (shared == np.arange(100)).all()


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation(rate):
    x = jnp.broadcast_to(jnp.linspace(-2.0, 3.0, N), (B, N))
    dropped = rng().at('drop').dropout(x, rate)
    chex.assert_trees_all_equal_shapes_and_dtypes(dropped, x)
    y = np.asarray(dropped)
    remains = y != 0
    standard_error = np.sqrt(rate * (1 - rate) / remains.size)
    assert abs(remains.mean() - (1 - rate)) < 5 * standard_error
    np.testing.assert_allclose(y[remains], np.asarray(x)[remains] / (1 - rate), rtol=1e-6)
    # The expectation of each element is the element: per column, 5.5 standard errors.
    column = np.asarray(x[0])
    standard_error = np.abs(column) * np.sqrt(rate / (1 - rate) / B)
    assert (np.abs(y.mean(0) - column) < 5.5 * standard_error + 1e-6).all()
    # The type stays, whatever the scale.
    small = x.astype(jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(rng().dropout(small, rate), small)


def test_dropout_of_nothing_and_of_everything():
    x = jnp.broadcast_to(jnp.linspace(-2.0, 3.0, N), (B, N))
    assert rng().dropout(x, 0.0) is x
    assert not np.asarray(rng().dropout(x, 1.0 - 1e-12)).any()


def draws(place):
    """A draw of every kind that depends on the example."""
    ones = jnp.ones((len(place.examples), 40))
    return {
        'bits': place.bits((5, 7)),
        'uniform': place.uniform((9,)),
        'normal': place.normal((9,)),
        'permutation': place.permutation(11),
        'dropout': place.dropout(ones, 0.3),
    }


def test_an_example_has_the_same_bits_in_any_batch():
    whole = rng().at('site').at(3)
    picked = jnp.array([7, 200, 7, 0])
    some = Rng.create(0, 0, picked).at('site').at(3)
    expected = jax.tree.map(lambda draw: draw[picked], draws(whole))
    chex.assert_trees_all_equal(draws(some), expected)
    chex.assert_trees_all_equal(some.shared_bits((9,)), whole.shared_bits((9,)))


def test_a_part_of_an_example_has_the_same_bits_in_any_batch():
    """Row b·n + j depends on (b, j) alone."""
    whole = rng().at('site').at(3)
    picked = jnp.array([7, 200, 7, 0])
    some = Rng.create(0, 0, picked).at('site').at(3)
    parts = np.asarray(whole.repeat(3).bits((6,))).reshape(B, 3, 6)
    of_picked = np.asarray(some.repeat(3).bits((6,))).reshape(4, 3, 6)
    np.testing.assert_array_equal(of_picked, parts[picked])
    assert len(np.unique(parts)) == parts.size


def test_positions_beyond_int32_are_those_with_the_same_bits():
    unsigned = jnp.array([2**32 - 2, 2**31], jnp.uint32)
    signed = unsigned.astype(jnp.int32)
    chex.assert_trees_all_equal(
        Rng.create(0, 0, unsigned).bits((4,)),
        Rng.create(0, 0, signed).bits((4,)),
    )


@pytest.mark.parametrize(
    'sizes',
    [
        {'replica': 8},
        {'replica': 2, 'fsdp': 4},
    ],
)
def test_bits_on_eight_devices_are_those_on_one(sizes):
    chex.assert_devices_available(8, 'cpu')
    mesh = sharding.make_mesh(sizes)

    def draw(examples):
        return Rng.create(0, 0, examples).at('drop').normal((33,))

    spread = NamedSharding(mesh, PartitionSpec(('replica', 'fsdp')))
    examples = jax.device_put(jnp.arange(B), sharding.batch_sharding(mesh))
    got = jax.jit(draw, out_shardings=spread)(examples)
    shards = [shard.data for shard in got.addressable_shards]
    assert len(shards) == 8
    chex.assert_shape(shards, (B // 8, 33))
    np.testing.assert_array_equal(got, draw(jnp.arange(B)))


def test_layers_scanned_mapped_traced_or_unrolled_draw_the_same():
    layers = rng(examples=8).at('layers')

    def draw(layer):
        return layers.at(layer).bits((16,))

    unrolled = jnp.stack([draw(layer) for layer in range(5)])
    assert len(np.unique(unrolled)) == unrolled.size

    _, scanned = jax.lax.scan(lambda carry, layer: (carry, draw(layer)), 0, jnp.arange(5))
    chex.assert_trees_all_equal(scanned, unrolled)

    mapped = jax.vmap(draw)(jnp.arange(5, dtype=jnp.uint32))
    chex.assert_trees_all_equal(mapped, unrolled)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(seed, step, examples):
        return Rng.create(seed, step, examples).at('layers').at(2).bits((16,))

    chex.assert_trees_all_equal(traced(0, 0, jnp.arange(8)), unrolled[2])
    # Another seed and another step are other bits of the same program.
    assert not np.array_equal(traced(1, 0, jnp.arange(8)), unrolled[2])
    assert not np.array_equal(traced(0, 1, jnp.arange(8)), unrolled[2])


@pytest.mark.parametrize('seed', [2**31, 2**32 - 1, 10**12, -1])
def test_any_seed_works(seed):
    bits = Rng.create(seed, 0, jnp.arange(4)).bits((8,))
    of_seed_zero = Rng.create(0, 0, jnp.arange(4)).bits((8,))
    chex.assert_trees_all_equal_shapes_and_dtypes(bits, of_seed_zero)
    assert not (np.asarray(bits) == np.asarray(of_seed_zero)).any()


def test_drawing_fetches_nothing_from_the_device():
    """A step that draws runs with every implicit transfer forbidden.

    Its key is on the device already.
    """
    root = jax.device_put(rng(examples=8))

    @jax.jit
    def step(root, layer):
        place = root.at('site').at(layer)
        return (
            place.bits((4,)),
            place.shared_bits((4,)),
            place.uniform((4,)),
            place.normal((4,)),
            place.permutation(4),
            place.dropout(jnp.ones((8, 4)), 0.5),
        )

    layer = jax.device_put(jnp.int32(1))
    with jax.transfer_guard('disallow'):
        jax.block_until_ready(step(root, layer))
    text = step.lower(root, layer).as_text()
    assert 'callback' not in text
    assert 'infeed' not in text
