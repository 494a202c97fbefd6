"""The settings of DPC and MemDPC, and the size and the sums of their network."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import comparison, default, dpc
from vatt_jax import config as configs
from vatt_jax import evals, objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.models.towers.resnet_2d3d import ResNet2D3D

SPECS = [
    'demo,synthetic',
    *(f'{name},{option}' for name in dpc.SETTINGS for option in dpc.OPTIONS),
    *('ucf101', 'k400', 'k400,large', 'k400,memdpc,large,two_streams'),
]


@pytest.mark.parametrize('spec', SPECS)
def test_passes_the_checks(spec):
    c = configs.load(f'configs/dpc.py:{spec}')
    configs.check_fields(c, default.get_config())
    optim.schedule(c.optimizer.schedule, c.steps)
    trainings = [fields for _, fields in c.phases] or [
        {'objective': c.objective, 'model.towers': c.model.towers, 'evals': c.evals}
    ]
    for fields in trainings:
        objective = objectives.build(ConfigDict(fields['objective']))
        assert set(objective.streams()) == set(fields['model.towers'])
        frames = c.model.inputs[objective.config.stream].frames
        o = objective.config
        assert frames == (o.blocks - 1) * o.stride + o.frames
        for name, entry in fields['evals'].items():
            evals.build(name, ConfigDict(entry))


def test_published_values():
    c = configs.load('configs/dpc.py:k400,memdpc,large')
    o = objectives.build(c.objective).config
    assert (o.blocks, o.frames, o.curriculum, o.memory) == (8, 5, ((0, 3),), 1024)
    assert (o.bidirectional, o.gain, o.dropout, o.kernel) == (True, 0.1, 0.1, 1)
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    epoch = 232_067 // 64
    for step, expected in (
        (0, 1e-3),
        (120 * epoch - 1, 1e-3),
        (121 * epoch, 1e-4),
        (c.steps - 1, 1e-4),
    ):
        np.testing.assert_allclose(rate(step), expected, rtol=1e-4)
    o = objectives.build(configs.load('configs/dpc.py:k400').objective).config
    assert (o.memory, o.bidirectional, o.gain) == (0, False, 1.0)


def test_two_streams_are_averaged_in_the_last_phase():
    c = configs.load('configs/dpc.py:demo,memdpc,two_streams')
    (first, flow), (second, video) = c.phases
    assert (first, second) == ('flow', 'video')
    assert flow['objective']['stream'] == 'flow'
    both = video['evals']['probe_both']
    assert (both['beside'], both['beside_run']) == (('flow',), 'phase:flow')


@pytest.mark.parametrize('row', ['dpc', 'memdpc'])
def test_rows_of_the_comparison_cut_its_clips(row):
    c = comparison.get_config(row)
    objective = objectives.build(c.objective)
    o = objective.config
    assert c.model.inputs.video.frames == (o.blocks - 1) * o.stride + o.frames
    assert c.model.towers.video.name == 'tsm_resnet'
    assert bool(o.memory) == (row == 'memdpc')


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match='setting.*choose one of demo, ucf101, k400'):
        dpc.get_config('hmdb51')
    with pytest.raises(ConfigError, match='option.*memdpc, flow, two_streams, curriculum'):
        dpc.get_config('demo,sound')


# ---- The network.


def count_parameters(depth):
    """By the published description: convolutions, and two numbers a channel in batch norms."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    total = 49 * 3 * 64 + 2 * 64
    channels = 64
    for group, count in enumerate(blocks):
        inner = (64, 128, 256, 256)[group]
        window = 9 if group < 2 else 27
        outer = 4 * inner if depth == 50 else inner
        for block in range(count):
            if (block == 0 and group > 0) or channels != outer:
                total += channels * outer + 2 * outer
            if depth == 50:
                total += channels * inner + inner * inner * window + inner * outer
                total += 2 * (inner + inner + outer)
            else:
                total += window * (channels * inner + inner * inner) + 4 * inner
            channels = outer
    return total


@pytest.mark.parametrize('depth, width', [(18, 256), (34, 256), (50, 1024)])
def test_size_of_the_network(depth, width):
    module = ResNet2D3D(depth)

    def init_with_output(x):
        return module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False)

    x = jax.ShapeDtypeStruct((2, 5, 128, 128, 3), jnp.float32)
    (pooled, last), variables = jax.eval_shape(init_with_output, x)
    params = jax.tree.leaves(nn.meta.unbox(variables)['params'])
    assert sum(param.size for param in params) == count_parameters(depth)
    chex.assert_shape(pooled, (2, width))
    chex.assert_shape(last, (2, 2, 4, 4, width))


def convolve(x, kernel, strides, pads):
    """Sum over the places of a kernel, x [B T H W I]."""
    x = np.pad(x, [(0, 0), *((pad, pad) for pad in pads), (0, 0)])
    sizes = kernel.shape[:3]
    counts = [(x.shape[i + 1] - sizes[i]) // strides[i] + 1 for i in range(3)]
    y = 0.0
    for place in np.ndindex(*sizes):
        cut = [
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(place, counts, strides)
        ]
        y = y + x[:, cut[0], cut[1], cut[2]] @ kernel[place]
    return y


def pool(x):
    """Maxima over 3 × 3, every second of them."""
    pads = [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)]
    x = np.pad(x, pads, constant_values=-np.inf)
    height, width = ((x.shape[i] - 3) // 2 + 1 for i in (2, 3))
    rows = [x[:, :, i : i + 2 * height - 1 : 2] for i in range(3)]
    x = np.maximum.reduce(rows)
    return np.maximum.reduce([x[:, :, :, i : i + 2 * width - 1 : 2] for i in range(3)])


def test_the_network_is_its_definition():
    """2D3D-ResNet-18 of few channels, in evaluation mode with random statistics."""
    module = ResNet2D3D(18, multiplier=1 / 16)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 5, 33, 40, 3))
    shapes = jax.eval_shape(
        lambda x: module.init(jax.random.key(0), x, jnp.ones(2, bool), False), jnp.float32(x)
    )
    variables = jax.tree.map(
        lambda leaf: draw.uniform(0.2, 1, leaf.shape) * draw.choice([-1, 1], leaf.shape),
        nn.meta.unbox(shapes),
    )
    variables['batch_stats'] = jax.tree.map(abs, variables['batch_stats'])
    params, stats = variables['params'], variables['batch_stats']

    def layer(x, path, strides=(1, 1, 1)):
        p, s = params, stats
        for name in path:
            p, s = p[name], s[name]
        kernel = p['conv']['kernel']
        x = convolve(x, kernel, strides, [size // 2 for size in kernel.shape[:3]])
        scale = p['norm']['scale'] / np.sqrt(s['norm']['var'] + 1e-5)
        return (x - s['norm']['mean']) * scale + p['norm']['bias']

    y = pool(np.maximum(layer(x, ['stem'], (1, 2, 2)), 0))
    for group in range(1, 5):
        for block in range(2):
            name = f'group_{group}_block_{block}'
            strides, shortcut = (1, 1, 1), y
            if group > 1 and block == 0:
                strides = (2 if group > 2 else 1, 2, 2)
                shortcut = layer(y, [name, 'short'], strides)
            y = np.maximum(layer(y, [name, 'conv_0'], strides), 0)
            y = layer(y, [name, 'conv_1']) + shortcut
            if (group, block) != (4, 1):
                y = np.maximum(y, 0)

    pooled, last = module.apply(
        jax.tree.map(jnp.float32, variables), jnp.float32(x), jnp.ones(2, bool), False
    )
    assert (y < 0).any()
    np.testing.assert_allclose(last, y, rtol=1e-3, atol=1e-4 * np.abs(y).max())
    expected = np.maximum(y, 0).mean((1, 2, 3))
    np.testing.assert_allclose(pooled, expected, rtol=1e-3)
