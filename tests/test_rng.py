"""Keyed random bits: good statistics in every direction of the key, and the same bits however a batch is laid out."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

B, N = (
    256,
    1024,
)  # examples × counters: 2^18 draws, so a mean of uniforms has a standard error of 0.0006


def rng(step=0, seed=0, examples=B):
    return Rng.create(seed, step, jnp.arange(examples))


# Each pair is two sets of draws [B N] that differ by one step along one direction of the key.
NEIGHBOURS = {
    'example': lambda: (rng(), rng().replace(examples=rng().examples + 1)),
    'far example': lambda: (rng(), rng().replace(examples=rng().examples + B)),
    'step': lambda: (rng(0), rng(1)),
    'seed': lambda: (rng(seed=0), rng(seed=1)),
    'site': lambda: (rng().at('q'), rng().at('k')),
    'layer': lambda: (rng().at('dropout').at(0), rng().at('dropout').at(1)),
    'depth of the path': lambda: (rng().at(0), rng().at(0).at(0)),
    'order of the path': lambda: (rng().at(0).at(1), rng().at(1).at(0)),
    'step against seed': lambda: (rng(1, 0), rng(0, 1)),
}


def test_bytes_are_uniform():
    """Chi-square over 256 values of each byte: mean 255, standard deviation 22.6."""
    bits = np.asarray(rng().at('site').bits((N,)))
    assert bits.dtype == np.uint32 and bits.shape == (B, N)
    for byte in range(4):
        counts = np.bincount(((bits >> (8 * byte)) & 255).ravel(), minlength=256)
        expected = bits.size / 256
        assert 150 < ((counts - expected) ** 2 / expected).sum() < 380
    # the low byte of the shared draws, and of one draw per example, where only the key or only the example varies
    for few in (
        rng().at('site').shared_bits((B * N,)),
        Rng.create(0, 0, jnp.arange(B * N)).bits(()),
    ):
        counts = np.bincount(np.asarray(few).ravel() & 255, minlength=256)
        assert 150 < ((counts - expected) ** 2 / expected).sum() < 380


def test_uniform_and_normal_moments():
    u, z = (
        np.asarray(rng().uniform((N,)), np.float64),
        np.asarray(rng().at('z').normal((N,)), np.float64),
    )
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    np.testing.assert_allclose(
        [u.mean(), u.var(), ((u - 0.5) ** 4).mean()], [1 / 2, 1 / 12, 1 / 80], atol=0.003
    )
    np.testing.assert_allclose(
        [z.mean(), z.var(), (z**3).mean(), (z**4).mean()], [0, 1, 0, 3], atol=0.06
    )
    assert np.isfinite(z).all() and 4 < np.abs(z).max() < 5.5
    v = np.asarray(rng().uniform((N,), -3.0, 5.0))
    np.testing.assert_allclose(v, -3 + 8 * u, atol=1e-5)
    # the lowest and the highest draw there is: inside the half-open interval, and finite
    ends = types.SimpleNamespace(bits=lambda shape: jnp.array([0, 2**32 - 1], jnp.uint32))
    low, high = np.asarray(Rng.uniform(ends))
    assert low == 0 and 1 - 1e-7 < high < 1
    low, high = np.asarray(Rng.normal(ends))
    assert -6 < low == -high < -5
    # each example and each counter by itself: means of N and B draws, 5.5 standard errors for the worst of them
    assert np.abs(u.mean(1) - 0.5).max() < 5.5 / np.sqrt(12 * N) and np.abs(
        u.mean(0) - 0.5
    ).max() < 5.5 / np.sqrt(12 * B)


@pytest.mark.parametrize('direction', NEIGHBOURS)
def test_neighbouring_keys_are_independent(direction):
    """Neither equal, nor correlated, nor shifted copies, nor alike in any single bit."""
    a, b = (np.asarray(r.bits((N,))) for r in NEIGHBOURS[direction]())
    assert (a == b).mean() < 1e-4
    x, y = a / 2.0**32 - 0.5, b / 2.0**32 - 0.5
    error = 1 / np.sqrt(a.size)
    for shift in range(-3, 4):
        for axis in (
            (0, 1) if direction != 'example' else (1,)
        ):  # an example further down is the other set's own
            assert abs((x * np.roll(y, shift, axis)).mean() * 12) < 5.5 * error
            assert (a == np.roll(b, shift, axis)).mean() < 1e-4
    agree = [((((a ^ b) >> bit) & 1) == 0).mean() for bit in range(32)]
    np.testing.assert_allclose(agree, 0.5, atol=5.5 * 0.5 * error)


def test_neighbouring_counters_are_independent():
    x = np.asarray(rng().at('site').uniform((32, 32)), np.float64) - 0.5
    for axis in (1, 2):
        for shift in (1, 2, 3, 16):
            assert abs((x * np.roll(x, shift, axis)).mean() * 12) < 5.5 / np.sqrt(x.size)
    bits = np.asarray(rng().at('site').bits((N,)))
    assert (
        len(np.unique(bits)) > bits.size - 60
    )  # 8 collisions are expected of 2^18 draws among 2^32


def test_no_example_is_a_shifted_copy_of_another():
    """2^20 draws of 2^16 examples: 128 equal pairs by chance (standard deviation 11), each of another two examples. Were the counter merely
    added to an example's word, the 15 or so pairs of examples whose words lie close would share several draws each."""
    bits = np.asarray(Rng.create(0, 0, jnp.arange(1 << 16)).at('site').bits((16,)))
    assert abs(bits.size - len(np.unique(bits)) - 128) < 60
    order = np.argsort(bits, axis=None)
    equal = np.flatnonzero(np.diff(bits.ravel()[order]) == 0)
    pairs = np.sort(np.stack([order[equal], order[equal + 1]]) // 16, 0)
    assert len(np.unique(pairs, axis=1).T) == len(equal)


def test_permutations_are_uniform():
    """Each of the 24 orders of four things equally often (chi-square, 23 degrees of freedom), and fixed points as they should be."""
    p = np.asarray(Rng.create(0, 0, jnp.arange(24_000)).at('order').permutation(4))
    assert p.dtype == np.int32 and (np.sort(p, -1) == np.arange(4)).all()
    _, counts = np.unique(p @ 4 ** np.arange(4), return_counts=True)
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 60
    long = np.asarray(rng().permutation(100))
    assert (np.sort(long, -1) == np.arange(100)).all()
    assert (
        abs((long == np.arange(100)).sum(-1).mean() - 1) < 0.35
    )  # one fixed point on average, standard error 1/16
    shared = np.asarray(rng().permutation(100, per_example=False))
    np.testing.assert_array_equal(shared, rng(examples=3).permutation(100, per_example=False))
    assert sorted(shared) == list(range(100)) and not (shared == np.arange(100)).all()


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_dropout_statistics(rate):
    x = jnp.broadcast_to(jnp.linspace(-2.0, 3.0, N), (B, N))
    y = np.asarray(rng().at('drop').dropout(x, rate))
    kept = y != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    # expectation of each element is the element: per column, 5.5 standard errors
    error = np.abs(np.asarray(x[0])) * np.sqrt(rate / (1 - rate) / B)
    assert (np.abs(y.mean(0) - np.asarray(x[0])) < 5.5 * error + 1e-6).all()
    assert not np.asarray(rng().dropout(x, 1.0 - 1e-12)).any() and rng().dropout(x, 0.0) is x
    assert rng().dropout(x.astype(jnp.bfloat16), rate).dtype == jnp.bfloat16


def test_an_example_keeps_its_bits_in_any_batch():
    whole = rng().at('site').at(3)
    picked = jnp.array([7, 200, 7, 0])
    some = Rng.create(0, 0, picked).at('site').at(3)
    for draw in (
        lambda r: r.bits((5, 7)),
        lambda r: r.uniform((9,)),
        lambda r: r.normal((9,)),
        lambda r: r.permutation(11),
        lambda r: r.dropout(jnp.ones((len(r.examples), 40)), 0.3),
    ):
        np.testing.assert_array_equal(draw(some), np.asarray(draw(whole))[picked])
    np.testing.assert_array_equal(some.shared_bits((9,)), whole.shared_bits((9,)))
    # parts of an example: row b·n + j depends on (b, j) alone
    parts = np.asarray(whole.repeat(3).bits((6,))).reshape(B, 3, 6)
    np.testing.assert_array_equal(
        np.asarray(some.repeat(3).bits((6,))).reshape(4, 3, 6), parts[picked]
    )
    assert len(np.unique(parts)) == parts.size
    # positions beyond 2^31, as uint32 and as the int32 with the same bits
    high = jnp.array([2**32 - 2, 2**31], jnp.uint32)
    np.testing.assert_array_equal(
        Rng.create(0, 0, high).bits((4,)), Rng.create(0, 0, high.astype(jnp.int32)).bits((4,))
    )


def test_same_bits_on_eight_devices():
    assert jax.device_count() == 8
    want = np.asarray(rng().at('drop').normal((33,)))
    for sizes in ({'replica': 8}, {'replica': 2, 'fsdp': 4}):
        mesh = sharding.make_mesh(sizes)
        draw = jax.jit(
            lambda e: Rng.create(0, 0, e).at('drop').normal((33,)),
            out_shardings=NamedSharding(mesh, P(('replica', 'fsdp'))),
        )
        got = draw(jax.device_put(jnp.arange(B), sharding.batch_sharding(mesh)))
        assert len({s.data.shape for s in got.addressable_shards}) == 1 and got.addressable_shards[
            0
        ].data.shape == (B // 8, 33)
        np.testing.assert_array_equal(got, want)


def test_layers_scanned_or_unrolled_traced_or_static():
    r = rng(examples=8).at('layers')
    unrolled = np.stack([r.at(i).bits((16,)) for i in range(5)])
    assert len(np.unique(unrolled)) == unrolled.size
    _, scanned = jax.lax.scan(lambda c, i: (c, r.at(i).bits((16,))), 0, jnp.arange(5))
    np.testing.assert_array_equal(scanned, unrolled)
    mapped = jax.vmap(lambda i: r.at(i).bits((16,)))(jnp.arange(5, dtype=jnp.uint32))
    np.testing.assert_array_equal(mapped, unrolled)
    traced = jax.jit(lambda seed, step, e: Rng.create(seed, step, e).at('layers').at(2).bits((16,)))
    np.testing.assert_array_equal(traced(0, 0, jnp.arange(8)), unrolled[2])


@pytest.mark.parametrize('seed', [2**31, 2**32 - 1, 10**12, -1])
def test_any_seed_works(seed):
    a, b = Rng.create(seed, 0, jnp.arange(4)).bits((8,)), Rng.create(0, 0, jnp.arange(4)).bits((8,))
    assert not (np.asarray(a) == np.asarray(b)).any()


def test_drawing_fetches_nothing_from_the_device():
    """A step that draws runs with every implicit transfer forbidden, its key being on the device already."""
    r = jax.device_put(rng(examples=8))

    @jax.jit
    def step(r, layer):
        r = r.at('site').at(layer)
        return (
            r.bits((4,)),
            r.shared_bits((4,)),
            r.uniform((4,)),
            r.normal((4,)),
            r.permutation(4),
            r.dropout(jnp.ones((8, 4)), 0.5),
        )

    layer = jax.device_put(jnp.int32(1))
    with jax.transfer_guard('disallow'):
        jax.block_until_ready(step(r, layer))
    text = step.lower(r, layer).as_text()
    assert 'callback' not in text and 'infeed' not in text
