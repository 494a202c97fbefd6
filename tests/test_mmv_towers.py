"""MMV's towers, R(2+1)D and ResNet-9 in NumPy float64, layer by layer, and their published sizes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from vatt_jax.config import ConfigError
from vatt_jax.models import layers, presets
from vatt_jax.models.multimodal import NETS
from vatt_jax.models.towers import convolutions, resnet_v2
from vatt_jax.models.towers.audio_resnet import ResNet2DV2, ResNet9
from vatt_jax.models.towers.r2plus1d import R2Plus1D, mid_planes
from vatt_jax.models.towers.s3d import S3D, space_to_depth
from vatt_jax.models.towers.tsm_resnet import TSMResNet, shift

NOISE = np.random.default_rng(0)


# ---- the definition
def same(length, k, stride):
    """Padding (before, after) of one axis as TensorFlow's SAME has it."""
    total = max((math.ceil(length / stride) - 1) * stride + k - length, 0)
    return total // 2, total - total // 2


def windows(x, kernel, strides, pads, fill):
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    n = len(kernel)
    x = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=tuple(range(1, n + 1)))
    return x[(slice(None), *(slice(None, None, s) for s in strides))]


def conv(x, kernel, strides, even=False, pads=None):
    """even: PyTorch's padding by (k - 1) / 2 on both sides."""
    n, k = kernel.ndim - 2, kernel.shape[:-2]
    pads = pads or [
        ((a - 1) // 2,) * 2 if even else same(x.shape[1 + i], a, strides[i])
        for i, a in enumerate(k)
    ]
    return np.tensordot(
        windows(x, k, strides, pads, 0.0),
        kernel,
        ([n + 1 + i for i in range(n + 1)], [n, *range(n)]),
    )


def pool(x, k, strides, pads=None):
    n = len(k)
    pads = pads or [same(x.shape[1 + i], a, strides[i]) for i, a in enumerate(k)]
    return windows(x, k, strides, pads, -np.inf).max(tuple(range(-n, 0)))


class Reference:
    """Reads a net's own values by path."""

    def __init__(self, variables, eps=1e-5):
        f64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
        self.params, self.stats, self.eps = (
            f64(variables['params']),
            f64(variables['batch_stats']),
            eps,
        )

    def at(self, path):
        p, s = self.params, self.stats
        for part in path.split('/'):
            p, s = p[part], s.get(part, {})
        return p, s

    def norm(self, path, x):
        p, s = self.at(path)
        return (x - s['mean']) / np.sqrt(s['var'] + self.eps) * p['scale'] + p['bias']

    def unit(self, path, x, strides, even=False, relu=True):
        x = self.norm(f'{path}/norm', conv(x, self.at(f'{path}/conv')[0]['kernel'], strides, even))
        return np.maximum(x, 0) if relu else x

    def s3d(self, frames, pools=4, blocks=('3b', '3c', '4b', '4c', '4d', '4e', '4f', '5b', '5c')):
        def unit(path, x):
            parts = self.at(path)[0]
            for i in range(2 if 'conv_1' in parts else 1):
                x = self.unit(f'{path}/conv_{i}', x, (1, 1, 1))
            if 'gate' in parts:
                gate = parts['gate']['dense']
                x = (
                    x
                    / (1 + np.exp(-(x.mean((1, 2, 3)) @ gate['kernel'] + gate['bias'])))[
                        :, None, None, None
                    ]
                )
            return x

        # the first kernel on raw frames: 4×8×8 with stride 2, padded by (0, 2) in time and (2, 4) in space
        k = self.at('conv_1a/conv_0/conv')[0]['kernel']
        raw = (
            k.reshape(2, 4, 4, 2, 2, 2, 3, -1)
            .transpose(0, 3, 1, 4, 2, 5, 6, 7)
            .reshape(4, 8, 8, 3, -1)
        )
        x = np.maximum(
            self.norm(
                'conv_1a/conv_0/norm', conv(frames, raw, (2, 2, 2), pads=[(0, 2), (2, 4), (2, 4)])
            ),
            0,
        )
        x = pool(x, (1, 3, 3), (1, 2, 2))
        x = pool(unit('conv_2c', unit('conv_2b', x)), (1, 3, 3), (1, 2, 2))
        between = {'4b': ((3, 3, 3), (2, 2, 2)), '5b': ((2, 2, 2), (2, 2, 2))} if pools == 4 else {}
        for block in blocks:
            x = pool(x, *between[block]) if block in between else x
            u = lambda branch, x: unit(f'mixed_{block}/{branch}', x)  # noqa: B023
            x = np.concatenate(
                [
                    u('b0', x),
                    u('b1', u('b1_in', x)),
                    u('b2', u('b2_in', x)),
                    u('b3', pool(x, (3, 3, 3), (1, 1, 1))),
                ],
                -1,
            )
        return x

    def resnet_v2(self, x, blocks, clip=0):
        """x [N H W C], clip: frames of a clip whose channels are shifted (0: none) -> (map before, map after the last norm and ReLU)."""
        kernel = lambda path: self.at(f'resnet/{path}')[0]['kernel']
        relu_norm = lambda path, x: np.maximum(self.norm(f'resnet/{path}', x), 0)
        x = pool(conv(x, kernel('stem'), (2, 2)), (3, 3), (2, 2))
        for u, count in enumerate(blocks):
            for b in range(count):
                name, s = f'unit_{u}_block_{b}', 2 if u and not b else 1
                p = relu_norm(f'{name}/norm_0', x)
                short = (
                    x
                    if b
                    else conv(p, kernel(f'{name}/shortcut'), (s, s))
                    if 'shortcut' in self.at(f'resnet/{name}')[0]
                    else x
                )
                y = conv(shifted(p, clip) if clip else p, kernel(f'{name}/conv_0'), (1, 1))
                y = conv(relu_norm(f'{name}/norm_1', y), kernel(f'{name}/conv_1'), (s, s))
                if 'conv_2' in self.at(f'resnet/{name}')[0]:
                    y = conv(relu_norm(f'{name}/norm_2', y), kernel(f'{name}/conv_2'), (1, 1))
                x = short + y
        return x, relu_norm('norm', x)

    def r2plus1d(self, x):
        x = self.unit(
            'stem_temporal', self.unit('stem_spatial', x, (1, 2, 2), True), (1, 1, 1), True
        )
        for layer in range(1, 5):
            for block in range(2):
                name, s = f'layer_{layer}_block_{block}', 2 if layer > 1 and not block else 1
                short = self.unit(f'{name}_short', x, (s, s, s), True, False) if s == 2 else x
                y = self.unit(
                    f'{name}_conv_1/temporal',
                    self.unit(f'{name}_conv_1/spatial', x, (1, s, s), True),
                    (s, 1, 1),
                    True,
                )
                y = self.unit(
                    f'{name}_conv_2/temporal',
                    self.unit(f'{name}_conv_2/spatial', y, (1, 1, 1), True),
                    (1, 1, 1),
                    True,
                    False,
                )
                x = np.maximum(short + y, 0)
        return x

    def resnet9(self, x):
        x = pool(self.unit('stem', x, (2, 2), True), (3, 3), (2, 2), [(1, 1), (1, 1)])
        for g in range(1, 5):
            s = 2 if g > 1 else 1
            short = self.unit(f'group_{g}_short', x, (s, s), True, False) if g > 1 else x
            y = self.unit(
                f'group_{g}_conv_2',
                self.unit(f'group_{g}_conv_1', x, (s, s), True),
                (1, 1),
                True,
                False,
            )
            x = np.maximum(short + y, 0)
        return x


def shifted(x, clip):
    """Frame by frame: the last eighth of the next frame's channels, this frame's middle, the first eighth of those of the frame before."""
    x = x.reshape(-1, clip, *x.shape[1:])
    fold, out = x.shape[-1] // 8, np.zeros_like(x)
    for t in range(clip):
        out[:, t, ..., fold:-fold] = x[:, t, ..., fold:-fold]
        if t + 1 < clip:
            out[:, t, ..., :fold] = x[:, t + 1, ..., -fold:]
        if t:
            out[:, t, ..., -fold:] = x[:, t - 1, ..., :fold]
    return out.reshape(-1, *x.shape[2:])


def variables_of(module, x):
    """Values that hide nothing: no scale of 1, no bias of 0."""
    shapes = meta.unbox(
        jax.eval_shape(lambda: module.init(jax.random.key(0), x, np.ones(len(x), bool), False))
    )

    def value(path, s):
        name, noise = path[-1].key, NOISE.normal(size=s.shape).astype(np.float32)
        return {
            'kernel': noise * (1.5 / max(1, math.prod(s.shape[:-1]))) ** 0.5,
            'scale': 1 + 0.2 * noise,
            'var': 0.5 + noise**2,
        }.get(name, np.zeros(s.shape, s.dtype) if name == 'count' else 0.2 * noise)

    return jax.tree.map_with_path(value, shapes)


def apply(module, variables, x, valid=None, train=False):
    # the older code generator, which the tests use, runs pooling slowly
    f = jax.jit(
        lambda v: module.apply(
            v,
            x,
            np.ones(len(x), bool) if valid is None else valid,
            train,
            mutable=['batch_stats'] if train else False,
        ),
        compiler_options={'xla_cpu_use_fusion_emitters': True},
    )
    return f(variables)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def frames(*shape):
    return NOISE.uniform(size=shape).astype(np.float32)


# ---- towers
@pytest.mark.parametrize(
    'shape,fields,reference',
    [
        ((2, 6, 38, 34, 3), {}, ()),
        ((2, 4, 18, 14, 3), {'pools': 2, 'blocks': (1, 2, 1)}, (2, ('3b', '4b', '4c', '5b'))),
    ],
)
def test_s3d_and_its_first_kernel_on_raw_frames(shape, fields, reference):
    module, x = S3D(multiplier=1 / 16, **fields), frames(*shape)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    want = Reference(variables).s3d(np.asarray(x, np.float64), *reference)
    close(last, want)
    close(pooled, want.mean((1, 2, 3)))


@pytest.mark.parametrize(
    'fields,told',
    [
        ({'pools': 5}, 'pools=5'),
        ({'blocks': (2, 6, 2)}, r'blocks=\(2, 6, 2\)'),
        ({'blocks': (2, 5)}, r'blocks=\(2, 5\)'),
    ],
)
def test_s3d_that_does_not_exist(fields, told):
    with pytest.raises(ConfigError, match=f'config.model.towers.video: .*{told}.*0 to 4 pools'):
        jax.eval_shape(
            lambda x: S3D(**fields).init(jax.random.key(0), x, jnp.ones(2, bool), False),
            frames(2, 4, 16, 16, 3),
        )


def test_space_to_depth_order():
    x = frames(1, 4, 6, 2, 3)
    got = np.asarray(space_to_depth(x))
    assert got.shape == (1, 2, 3, 1, 24)
    for channel in range(24):
        t, h, w, c = channel // 12, channel // 6 % 2, channel // 3 % 2, channel % 3
        np.testing.assert_array_equal(got[..., channel], x[:, t::2, h::2, w::2, c])
    with pytest.raises(ConfigError, match='5 frames of 4×4 do not fold into blocks'):
        space_to_depth(frames(1, 5, 4, 4, 3))


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 2, 1, 1), True, (256, 512, 1024, 2048)))
    monkeypatch.setitem(resnet_v2.DEPTHS, 18, ((2, 1, 1, 1), False, (64, 128, 256, 512)))


def test_tsm(shallow):
    module, x = TSMResNet(multiplier=1 / 8), frames(2, 3, 40, 38, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    _, want = Reference(variables).resnet_v2(
        np.asarray(x, np.float64).reshape(6, 40, 38, 3), (1, 2, 1, 1), clip=3
    )
    close(last, want.reshape(last.shape))
    close(pooled, want.mean((1, 2)).reshape(2, 3, -1).mean(1))
    # training: a clip that is not there is in no statistics
    valid = np.array([True, False])
    (one, _), new = apply(module, variables, x, valid, True)
    (other, _), same_stats = apply(
        module, variables, np.concatenate([x[:1], x[1:] + 1]), valid, True
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new, same_stats, rtol=1e-5, atol=1e-6)


def test_the_shift_as_published():
    """Channels 0…15 of three frames, numbered 100·frame + channel."""
    x = (100 * np.arange(1, 4)[:, None] + np.arange(16))[None, :, None, None].astype(np.float32)
    got = np.asarray(shift(jnp.asarray(x), 0.125))[0, :, 0, 0]
    assert got[1].tolist() == [314, 315, *range(202, 214), 100, 101]
    assert got[0, -2:].tolist() == [0, 0] and got[2, :2].tolist() == [0, 0]
    few = jnp.arange(14.0).reshape(1, 2, 1, 1, 7)  # too few channels to shift any
    np.testing.assert_array_equal(shift(few, 0.125), few)


@pytest.mark.parametrize('depth,blocks', [(50, (1, 2, 1, 1)), (18, (2, 1, 1, 1))])
def test_audio_resnet_v2(shallow, depth, blocks):
    module, x = ResNet2DV2(depth, multiplier=1 / 8), frames(2, 50, 40) - 0.7
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    before, after = Reference(variables).resnet_v2(np.asarray(x, np.float64)[..., None], blocks)
    close(last, before)  # the end point of sound is before the last norm
    close(pooled, after.mean((1, 2)))
    block = variables['params']['resnet']['unit_0_block_0']
    assert ('shortcut' in block) == (depth == 50) and block['conv_0']['kernel'].shape[:2] == (1, 1)


@pytest.mark.parametrize('mid,norm', [('block', 'torch'), ('conv', 'xdc')])
def test_r2plus1d(mid, norm):
    module, x = R2Plus1D(mid, 1 / 16, norm), frames(2, 5, 22, 20, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    want = Reference(variables, 1e-3 if norm == 'xdc' else 1e-5).r2plus1d(np.asarray(x, np.float64))
    close(last, want)
    close(pooled, want.mean((1, 2, 3)))


def test_mid_planes():
    table = {
        (64, 64): 144,
        (64, 128): 230,
        (128, 128): 288,
        (128, 256): 460,
        (256, 256): 576,
        (256, 512): 921,
        (512, 512): 1152,
    }
    assert {widths: mid_planes(*widths) for widths in table} == table


def test_resnet9():
    module, x = (
        ResNet9(1 / 8),
        frames(2, 31, 40) * 4 - 3,
    )  # sizes whose pooling SAME would pad otherwise
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    want = Reference(variables).resnet9(np.asarray(x, np.float64)[..., None])
    close(last, want)
    close(pooled, want.mean((1, 2)))


@pytest.mark.parametrize(
    'name,size,width',
    [
        ('s3d_pixels', 9_162_704, 1024),
        ('s3d', 9_146_000, 1024),
        ('tsm50', 23_500_352, 2048),
        ('tsm50x2', 93_891_712, 4096),
        ('resnet2d_v2_50', 23_494_080, 2048),
        ('r2plus1d', 33_165_639, 512),
        ('r2plus1d_torchvision', 31_300_125, 512),
    ],
)
def test_published_sizes(name, size, width, monkeypatch):
    for init in layers.INITS:  # cheaper to trace
        monkeypatch.setitem(layers.INITS, init, jax.nn.initializers.zeros)
    fields = presets.tower(name)
    module = NETS[fields.pop('name')][1](**fields)
    x = jax.ShapeDtypeStruct(
        (2, 150, 80) if name.startswith('res') else (2, 8, 32, 32, 3), jnp.float32
    )
    (pooled, _), variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False), x
    )
    assert sum(p.size for p in jax.tree.leaves(meta.unbox(variables)['params'])) == size
    assert pooled.shape == (2, width)


# ---- batch norm of each kind
@pytest.mark.parametrize('kind', list(layers.NORMS))
def test_running_statistics(kind):
    """Three batches, the second without a valid row. debiased: hidden = 0.9 hidden + 0.1 batch, average = hidden / (1 - 0.9^n)."""
    module, valid = layers.BatchNorm(kind), np.array([1, 1, 0, 1, 1], bool)
    batches = NOISE.normal(2, 3, (3, 5, 4)).astype(np.float32)
    variables = module.init(jax.random.key(0), batches[0], valid, False)
    keep, eps = (0.1, 1e-3) if kind == 'xdc' else (0.9, 1e-5)
    mean, var = (np.zeros(4), np.zeros(4)) if kind == 'debiased' else (np.zeros(4), np.ones(4))
    for i, x in enumerate(batches):
        y, new = module.apply(variables, x, valid & (i != 1), True, mutable=['batch_stats'])
        variables = {**variables, **new}
        if i == 1:
            continue
        rows = x[valid].astype(np.float64)
        np.testing.assert_allclose(
            y[valid], (rows - rows.mean(0)) / np.sqrt(rows.var(0) + eps), rtol=1e-4, atol=1e-5
        )
        mean = keep * mean + (1 - keep) * rows.mean(0)
        var = keep * var + (1 - keep) * rows.var(0, ddof=1 if kind in ('torch', 'xdc') else 0)
    share = 1 - 0.9**2 if kind == 'debiased' else 1
    np.testing.assert_allclose(variables['batch_stats']['mean'], mean / share, rtol=1e-4)
    np.testing.assert_allclose(variables['batch_stats']['var'], var / share, rtol=1e-4)
    x = batches[0]
    y = module.apply(variables, x, valid, False)
    np.testing.assert_allclose(
        y, (x - mean / share) / np.sqrt(var / share + eps), rtol=1e-3, atol=1e-4
    )


def test_initial_values():
    draw = lambda name, shape: np.asarray(
        layers.INITS[name](jax.random.key(0), shape, jnp.float32), np.float64
    )
    x = (
        draw('fan_in', (3, 3, 16, 200)) * 144**0.5
    )  # a normal cut at two deviations has deviation 0.8796
    assert np.abs(x).max() <= 2 + 1e-6 and abs(x.std() - 0.8796) < 0.01
    assert abs(draw('kaiming', (3, 3, 200, 16)).std() - (2 / 144) ** 0.5) < 0.001


@pytest.mark.parametrize(
    'shape, kernel, strides, padding',
    [
        ((2, 5, 6, 7, 3), (3, 3, 3), (2, 2, 1), 'SAME'),  # few channels: frames become channels
        ((2, 5, 6, 7, 30), (3, 3, 3), (1, 1, 1), 'SAME'),  # XLA's own
        ((2, 5, 6, 7, 4), (1, 3, 3), (2, 1, 2), ((0, 0), (1, 1), (1, 1))),
        ((2, 6, 4, 5, 40), (3, 1, 1), (2, 2, 1), ((1, 1), (0, 0), (0, 0))),
        ((2, 5, 6, 7, 4), (1, 1, 1), (2, 2, 2), 'SAME'),
        ((3, 6, 7, 4), (1, 1), (2, 2), 'SAME'),
        ((3, 6, 7, 4), (3, 3), (2, 2), 'SAME'),
    ],
)
def test_convolution_in_any_form_is_the_definition_and_so_are_its_derivatives(
    shape, kernel, strides, padding
):
    noise = np.random.default_rng(1)
    x, k = noise.normal(size=shape), noise.normal(size=(*kernel, shape[-1], 5))
    want = conv(x, k, strides, pads=None if padding == 'SAME' else list(padding))
    g, (dx, dk) = (
        noise.normal(size=want.shape),
        (noise.normal(size=x.shape), noise.normal(size=k.shape)),
    )
    got, pull = jax.vjp(
        lambda x, k: convolutions.convolve(x, k, strides, padding), jnp.float32(x), jnp.float32(k)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * abs(want).max())
    # linear in each argument, so the definition at a direction is the derivative along it
    for by, grad, direction in (
        (
            lambda d: conv(d, k, strides, pads=None if padding == 'SAME' else list(padding)),
            pull(jnp.float32(g))[0],
            dx,
        ),
        (
            lambda d: conv(x, d, strides, pads=None if padding == 'SAME' else list(padding)),
            pull(jnp.float32(g))[1],
            dk,
        ),
    ):
        np.testing.assert_allclose(
            (np.float64(grad) * direction).sum(),
            (g * by(direction)).sum(),
            rtol=1e-4,
            atol=1e-4 * np.sqrt(g.size),
        )


@pytest.mark.parametrize(
    'shape, window, strides, padding',
    [
        ((2, 5, 6, 7, 3), (3, 3, 3), (1, 1, 1), 'SAME'),
        ((2, 5, 6, 7, 3), (2, 2, 2), (2, 2, 2), 'SAME'),
        ((2, 4, 7, 8, 3), (1, 3, 3), (1, 2, 2), 'SAME'),
        ((2, 7, 6, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ],
)
def test_maximum_over_windows_and_where_its_derivative_goes(shape, window, strides, padding):
    x = (
        np.random.default_rng(2).permutation(math.prod(shape)).reshape(shape) - 2000.0
    )  # no ties; negative, so that padding with 0 would win
    pads = (
        [same(x.shape[1 + i], a, strides[i]) for i, a in enumerate(window)]
        if padding == 'SAME'
        else list(padding)
    )
    want = windows(x, window, strides, pads, -np.inf).max(tuple(range(-len(window), 0)))
    got, pull = jax.vjp(
        lambda x: convolutions.max_pool(x, window, strides, padding), jnp.float32(x)
    )
    np.testing.assert_array_equal(got, want)
    g = np.random.default_rng(3).integers(1, 9, want.shape)
    grad = np.zeros(x.size)
    place = {v: i for i, v in enumerate(x.reshape(-1))}
    for value, weight in zip(want.reshape(-1), g.reshape(-1)):
        grad[place[value]] += weight
    np.testing.assert_array_equal(pull(jnp.float32(g))[0], grad.reshape(shape))
