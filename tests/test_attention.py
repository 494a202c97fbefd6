"""Kernels of attention against the definition, and which is taken when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.models import attention
from vatt_jax.parallel import sharding
from vatt_jax.training import loop


def operands(n, m, heads=2, rows=2):
    q, k, v, g = (
        jax.random.normal(jax.random.key(i), (rows, length, heads, 16))
        for i, length in enumerate((n, m, m, n))
    )
    mask = jnp.ones((rows, m), bool).at[1, m // 3 :].set(False)
    return (q, k, v), g, mask


@pytest.mark.parametrize('kernel', ['splash', 'triton'])
@pytest.mark.parametrize('mesh', [{}, {'replica': 2, 'model': 2}])
def test_kernels_are_dense_attention(mesh, kernel):
    """140 queries and 150 keys (triton: 140), padded to 256; value and gradients, keys masked (splash); on a mesh too. Kernels run in Python."""
    qkv, g, mask = operands(140, 150 if kernel == 'splash' else 140)
    mask = mask if kernel == 'splash' else None
    fused = {
        'splash': lambda q, k, v: attention.splash(q, k, v, mask, 0.25, interpret=True),
        'triton': lambda q, k, v: attention.triton(q, k, v, 0.25, interpret=True),
    }[kernel]

    def of(function):
        call = jax.jit(
            jax.value_and_grad(lambda q, k, v: (function(q, k, v) * g).sum(), argnums=(0, 1, 2))
        )
        with jax.set_mesh(sharding.make_mesh({'replica': 1, **mesh}, jax.devices()[:4])):
            return call(*qkv)

    want = of(lambda q, k, v: attention.attention(q, k, v, mask=mask, scale=0.25))
    got = of(fused)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_tiles_divide():
    assert [attention._tile(n) for n in (128, 640, 896, 1024, 1280, 1664)] == [
        128,
        640,
        896,
        1024,
        640,
        128,
    ]


def test_what_splash_takes_and_what_stays_dense(monkeypatch):
    monkeypatch.setattr(attention, 'splash', lambda *a: 'fused')
    ask = lambda n, m, **k: attention.attention(*operands(n, m)[0], implementation='splash', **k)
    is_fused = lambda *a, **k: isinstance(ask(*a, **k), str)
    assert is_fused(140, 128) and is_fused(140, 150, mask=operands(140, 150)[2])
    assert not is_fused(1, 150) and not is_fused(17, 17)
    assert not is_fused(140, 140, bias=jnp.zeros((1, 2, 140, 140))) and not is_fused(
        140, 140, mask=jnp.ones((2, 140, 140), bool)
    )
    with pytest.raises(
        ConfigError,
        match="config.model.attention='splash' has no dropout on attention probabilities; set attention_dropout=0.0",
    ):
        ask(140, 140, dropout=0.1)


def test_what_triton_takes_and_what_stays_dense(monkeypatch):
    monkeypatch.setattr(attention, 'triton', lambda *a: 'fused')
    is_fused = lambda n, m, **k: isinstance(
        attention.attention(*operands(n, m)[0], implementation='triton', **k), str
    )
    assert is_fused(140, 140) and not is_fused(140, 150) and not is_fused(17, 17)
    assert not is_fused(140, 140, mask=jnp.ones((2, 140), bool)) and not is_fused(
        140, 140, bias=jnp.zeros((1, 2, 140, 140))
    )


def test_auto_takes_the_kernel_of_the_platform(monkeypatch):
    monkeypatch.setattr(attention, 'splash', lambda *a: 'fused')
    ask = lambda **k: isinstance(
        attention.attention(*operands(140, 140)[0], implementation='auto', **k), str
    )
    assert not ask()
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    assert ask() and not ask(dropout=0.1)


def test_a_kernel_of_another_platform():
    with pytest.raises(
        ConfigError, match="config.model.attention='triton' is a kernel of GPUs and this is cpu"
    ):
        loop.mesh_of(tiny.config(model__attention='triton'))
    c = tiny.config(model__attention='splash')
    with pytest.raises(
        ConfigError,
        match="config.model.attention='splash' is a kernel of TPUs and this is cpu; set config.model.attention='auto'",
    ):
        loop.mesh_of(c)
    assert (
        attention.portable(c.model).attention == 'auto' and c.model.attention == 'splash'
    )  # for evaluation
    assert attention.portable(tiny.config().model).attention == 'dense'
