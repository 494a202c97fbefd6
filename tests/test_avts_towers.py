"""The towers of AVTS in NumPy float64, layer by layer, and published sizes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests.test_mmv_towers import Reference, apply, close, conv, f64, frames, pool, variables_of
from vatt_jax.config import ConfigError
from vatt_jax.models import layers, presets
from vatt_jax.models.multimodal import NETS
from vatt_jax.models.towers.mixed_convolutions import MixedConvolutions
from vatt_jax.models.towers.vggish import VGGish


def mixed_convolutions(reference, x, first_2d):
    """The last map of ResNet-18 with 2-D convolutions from a group on, from its own values."""
    x = reference.unit('stem', x, (1, 2, 2), even=True)
    for group in (2, 3, 4, 5):
        for block in range(2):
            name = f'conv{group}_block_{block}'
            strides = (1, 1, 1)
            shortcut = x
            if group > 2 and block == 0:
                strides = (2, 2, 2) if group < first_2d else (1, 2, 2)
                shortcut = reference.unit(f'{name}_short', x, strides, even=True, relu=False)
            y = reference.unit(f'{name}_conv_1', x, strides, even=True)
            y = reference.unit(f'{name}_conv_2', y, (1, 1, 1), even=True, relu=False)
            x = np.maximum(shortcut + y, 0)
    return x


@pytest.mark.parametrize('first_2d', [3, 5])
def test_mixed_convolutions(first_2d):
    module, x = MixedConvolutions(first_2d, 1 / 16), frames(2, 5, 22, 20, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = mixed_convolutions(Reference(variables), f64(x), first_2d)
    close(last, expected)
    close(pooled, expected.mean((1, 2, 3)))


@pytest.mark.parametrize(
    'first_2d, frames_left, num_3d', [(1, 8, 0), (2, 8, 1), (3, 8, 5), (4, 4, 9), (6, 1, 17)]
)
def test_what_is_3d(first_2d, frames_left, num_3d):
    """Of 8 frames, how many are left, and how many kernels see three of them."""
    module = MixedConvolutions(first_2d, 1 / 64)
    x = jnp.zeros((1, 8, 32, 32, 3))
    (_, last), variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, jnp.ones(1, bool), False), x
    )
    assert last.shape[1] == frames_left
    kernels = [leaf for leaf in jax.tree.leaves(meta.unbox(variables)['params']) if leaf.ndim == 5]
    assert sum(kernel.shape[0] == 3 for kernel in kernels) == num_3d


def test_first_2d_is_a_group():
    with pytest.raises(ConfigError, match='first_2d=7: expected a number from 1 to 6'):
        variables_of(MixedConvolutions(7), frames(1, 2, 8, 8, 3))


def vggish(reference, x, batch_norm, dense):
    """(pooled, last map) from the network's own values."""
    for stage, count in enumerate((1, 1, 2, 2), start=1):
        for i in range(1, count + 1):
            name = f'conv_{stage}_{i}'
            if batch_norm:
                x = reference.unit(name, x, (1, 1))
            else:
                kernel = reference.kernel(name)
                x = np.maximum(conv(x, kernel, (1, 1)) + reference.params[f'{name}_bias'], 0)
        x = pool(x, (2, 2), (2, 2))
    if not dense:
        return x.mean((1, 2)), x
    y = x.reshape(len(x), -1)
    for i in range(1, len(dense) + 1):
        layer = reference.params[f'dense_{i}']
        y = y @ layer['kernel'] + layer['bias']
        if i < len(dense):
            y = np.maximum(y, 0)
    return y, x


@pytest.mark.parametrize('batch_norm, dense', [(False, (7, 5)), (True, ())])
def test_vggish(batch_norm, dense):
    # 35 frames: an odd number that SAME pads at the end
    module, x = VGGish(dense, 1 / 32, batch_norm), frames(2, 35, 24) * 4 - 3
    variables = {'batch_stats': {}, **variables_of(module, x)}
    pooled, last = apply(module, variables, x)
    expected, expected_map = vggish(Reference(variables), f64(x)[..., None], batch_norm, dense)
    close(last, expected_map)
    close(pooled, expected)


# torchvision counts the classifier of Kinetics-400, 512 · 400 + 400, which a tower does not have.
CLASSIFIER = 512 * 400 + 400


@pytest.mark.parametrize(
    'name, size, width',
    [
        ('mc3', 11_695_440 - CLASSIFIER, 512),  # torchvision's mc3_18
        ('r3d_18', 33_371_472 - CLASSIFIER, 512),  # torchvision's r3d_18
        # MC3 less the second and third frame of the kernels of conv2: 4 · 2 · 9 · 64 · 64 values.
        ('mc2', 11_695_440 - CLASSIFIER - 294_912, 512),
        ('vggish', 72_141_184, 128),  # as released
    ],
)
def test_published_sizes(name, size, width, monkeypatch):
    for init in layers.INITS:  # cheaper to trace
        monkeypatch.setitem(layers.INITS, init, jax.nn.initializers.zeros)
    fields = presets.tower(name)
    _, net = NETS[fields.pop('name')]
    module = net(**fields)

    def init_with_output(x):
        return module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False)

    shape = (2, 96, 64) if name == 'vggish' else (2, 4, 32, 32, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (pooled, last), variables = jax.eval_shape(init_with_output, x)
    params = jax.tree.leaves(meta.unbox(variables)['params'])
    assert sum(param.size for param in params) == size
    chex.assert_shape(pooled, (2, width))
    chex.assert_type([*params, pooled, last], jnp.float32)
