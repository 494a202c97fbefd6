"""Kernels of attention against the definition, and which is taken when."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.models import attention
from vatt_jax.parallel import sharding
from vatt_jax.training import loop


def operands(queries, keys, heads=2, rows=2):
    """((query, key, value), cotangent, mask): noise; the second row has a third of the keys."""
    lengths = (queries, keys, keys, queries)
    arrays = []
    for seed, length in enumerate(lengths):
        arrays.append(jax.random.normal(jax.random.key(seed), (rows, length, heads, 16)))
    query, key, value, cotangent = arrays
    mask = jnp.ones((rows, keys), bool).at[1, keys // 3 :].set(False)
    return (query, key, value), cotangent, mask


@pytest.mark.parametrize('kernel', ['splash', 'triton'])
@pytest.mark.parametrize('mesh', [{}, {'replica': 2, 'model': 2}])
def test_kernels_are_dense_attention(mesh, kernel):
    """Value and gradients, on a mesh too; the kernels run in Python.

    140 queries and 150 keys (triton: 140), padded to 256; keys masked (splash).
    """
    qkv, cotangent, mask = operands(140, 150 if kernel == 'splash' else 140)
    mask = mask if kernel == 'splash' else None

    def dense(query, key, value):
        return attention.attention(query, key, value, mask=mask, scale=0.25)

    def splash(query, key, value):
        return attention.splash(query, key, value, mask, 0.25, interpret=True)

    def triton(query, key, value):
        return attention.triton(query, key, value, 0.25, interpret=True)

    fused = {'splash': splash, 'triton': triton}[kernel]

    def value_and_gradients(function):
        def total(query, key, value):
            return (function(query, key, value) * cotangent).sum()

        call = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        with jax.set_mesh(sharding.make_mesh({'replica': 1, **mesh}, jax.devices()[:4])):
            return call(*qkv)

    expected_value, expected_grads = value_and_gradients(dense)
    value, grads = value_and_gradients(fused)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, qkv)
    chex.assert_tree_all_finite((value, grads))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    'length, tile',
    [
        (128, 128),
        (640, 640),
        (896, 896),
        (1024, 1024),
        (1280, 640),
        (1664, 128),
    ],
)
def test_tiles_divide(length, tile):
    assert attention._tile(length) == tile


# What stands in for a kernel's output where only the choice is tested: no output of attention has
# this shape.
FUSED = jnp.zeros((1, 1, 1, 1))


def takes_kernel(implementation, queries, keys, **options):
    """Whether attention goes to the kernel that was replaced by one that returns FUSED."""
    qkv, _, _ = operands(queries, keys)
    out = attention.attention(*qkv, implementation=implementation, **options)
    return out is FUSED


def test_what_splash_takes_and_what_stays_dense(monkeypatch):
    monkeypatch.setattr(attention, 'splash', lambda *args: FUSED)
    _, _, mask = operands(140, 150)
    assert takes_kernel('splash', 140, 128)
    assert takes_kernel('splash', 140, 150, mask=mask)

    assert not takes_kernel('splash', 1, 150)
    assert not takes_kernel('splash', 17, 17)
    assert not takes_kernel('splash', 140, 140, bias=jnp.zeros((1, 2, 140, 140)))
    assert not takes_kernel('splash', 140, 140, mask=jnp.ones((2, 140, 140), bool))

    message = (
        "config.model.attention='splash' has no dropout on attention probabilities; "
        'set attention_dropout=0.0'
    )
    with pytest.raises(ConfigError, match=message):
        takes_kernel('splash', 140, 140, dropout=0.1)


def test_what_triton_takes_and_what_stays_dense(monkeypatch):
    monkeypatch.setattr(attention, 'triton', lambda *args: FUSED)
    assert takes_kernel('triton', 140, 140)

    assert not takes_kernel('triton', 140, 150)
    assert not takes_kernel('triton', 17, 17)
    assert not takes_kernel('triton', 140, 140, mask=jnp.ones((2, 140), bool))
    assert not takes_kernel('triton', 140, 140, bias=jnp.zeros((1, 2, 140, 140)))


def test_auto_takes_the_kernel_of_the_platform(monkeypatch):
    monkeypatch.setattr(attention, 'splash', lambda *args: FUSED)
    assert not takes_kernel('auto', 140, 140)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert takes_kernel('auto', 140, 140)
    assert not takes_kernel('auto', 140, 140, dropout=0.1)


def test_a_kernel_of_another_platform():
    message = "config.model.attention='triton' is a kernel of GPUs and this is cpu"
    with pytest.raises(ConfigError, match=message):
        loop.mesh_of(tiny.config(model__attention='triton'))

    config = tiny.config(model__attention='splash')
    message = (
        "config.model.attention='splash' is a kernel of TPUs and this is cpu; "
        "set config.model.attention='auto'"
    )
    with pytest.raises(ConfigError, match=message):
        loop.mesh_of(config)


def test_evaluation_replaces_a_kernel_of_one_platform():
    config = tiny.config(model__attention='splash')
    assert attention.portable(config.model).attention == 'auto'
    assert config.model.attention == 'splash'
    assert attention.portable(tiny.config().model).attention == 'dense'
