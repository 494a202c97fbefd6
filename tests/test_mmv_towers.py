"""Towers of MMV, CVRL and AVID, R(2+1)D and ResNet-9 in NumPy float64; published sizes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax.linen import meta

from vatt_jax.config import ConfigError
from vatt_jax.models import layers, presets
from vatt_jax.models.multimodal import NETS
from vatt_jax.models.towers import convolutions, resnet_v2
from vatt_jax.models.towers.audio_resnet import ResNet2DV2, ResNet9
from vatt_jax.models.towers.avid import AVIDAudio, AVIDVideo
from vatt_jax.models.towers.r2plus1d import R2Plus1D, mid_planes
from vatt_jax.models.towers.r3d import R3D
from vatt_jax.models.towers.s3d import S3D, space_to_depth
from vatt_jax.models.towers.tsm_resnet import TSMResNet, shift

NOISE = np.random.default_rng(0)


# ---- the definition
def same(length, kernel, stride):
    """Padding (before, after) of one axis as TensorFlow's SAME has it."""
    outputs = math.ceil(length / stride)
    total = max((outputs - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


def same_pads(x, kernel, strides):
    """`same` of every axis of x between the batch and the channels."""
    pads = []
    for axis, size in enumerate(kernel):
        pads.append(same(x.shape[1 + axis], size, strides[axis]))
    return pads


def windows(x, kernel, strides, pads, fill):
    """x [B *axes C] -> [B *outputs C *kernel], what each output sees."""
    x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=fill)
    axes = tuple(range(1, len(kernel) + 1))
    views = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=axes)
    steps = [slice(None, None, stride) for stride in strides]
    return views[(slice(None), *steps)]


def conv(x, kernel, strides, even=False, pads=None):
    """Convolution of x [B *axes C] with [*axes C D].

    even: PyTorch's padding by (k - 1) / 2 on both sides.
    """
    axes = kernel.ndim - 2
    sizes = kernel.shape[:-2]
    if not pads and even:
        pads = [((size - 1) // 2, (size - 1) // 2) for size in sizes]
    elif not pads:
        pads = same_pads(x, sizes, strides)
    views = windows(x, sizes, strides, pads, 0.0)
    channels_and_window = [axes + 1 + axis for axis in range(axes + 1)]
    return np.tensordot(views, kernel, (channels_and_window, [axes, *range(axes)]))


def pool(x, kernel, strides, pads=None):
    """Maximum over windows of x [B *axes C]."""
    if not pads:
        pads = same_pads(x, kernel, strides)
    views = windows(x, kernel, strides, pads, -np.inf)
    return views.max(tuple(range(-len(kernel), 0)))


def f64(tree):
    """The tree with float64 NumPy leaves."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


class Reference:
    """Reads a net's own values by path."""

    def __init__(self, variables, eps=1e-5):
        self.params = f64(variables['params'])
        self.stats = f64(variables['batch_stats'])
        self.eps = eps

    def at(self, path):
        """(parameters, statistics) of a module."""
        params, stats = self.params, self.stats
        for part in path.split('/'):
            params, stats = params[part], stats.get(part, {})
        return params, stats

    def kernel(self, path):
        """The kernel of a convolution."""
        return self.at(path)[0]['kernel']

    def norm(self, path, x):
        """Batch norm by the running statistics."""
        params, stats = self.at(path)
        centred = (x - stats['mean']) / np.sqrt(stats['var'] + self.eps)
        return centred * params['scale'] + params['bias']

    def unit(self, path, x, strides, even=False, relu=True):
        """Convolution, batch norm and, if asked for, a ReLU."""
        x = conv(x, self.kernel(f'{path}/conv'), strides, even)
        x = self.norm(f'{path}/norm', x)
        return np.maximum(x, 0) if relu else x

    # S3D
    def separable(self, path, x):
        """A convolution in space and one in time, or one alone; then a gate on the channels."""
        parts = self.at(path)[0]
        x = self.unit(f'{path}/conv_0', x, (1, 1, 1))
        if 'conv_1' in parts:
            x = self.unit(f'{path}/conv_1', x, (1, 1, 1))
        if 'gate' in parts:
            gate = parts['gate']['dense']
            weights = sigmoid(x.mean((1, 2, 3)) @ gate['kernel'] + gate['bias'])
            x = x * weights[:, None, None, None]
        return x

    def mixed(self, name, x):
        """An Inception block: four branches beside each other."""
        branches = [
            self.separable(f'{name}/b0', x),
            self.separable(f'{name}/b1', self.separable(f'{name}/b1_in', x)),
            self.separable(f'{name}/b2', self.separable(f'{name}/b2_in', x)),
            self.separable(f'{name}/b3', pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        return np.concatenate(branches, -1)

    def s3d_stem(self, frames):
        """The first kernel on raw frames.

        4×8×8 with stride 2, padded by (0, 2) in time and (2, 4) in space.
        """
        folded = self.kernel('conv_1a/conv_0/conv').reshape(2, 4, 4, 2, 2, 2, 3, -1)
        raw = folded.transpose(0, 3, 1, 4, 2, 5, 6, 7).reshape(4, 8, 8, 3, -1)
        x = conv(frames, raw, (2, 2, 2), pads=[(0, 2), (2, 4), (2, 4)])
        return np.maximum(self.norm('conv_1a/conv_0/norm', x), 0)

    def s3d(self, frames, pools=4, blocks=('3b', '3c', '4b', '4c', '4d', '4e', '4f', '5b', '5c')):
        """The last map of S3D."""
        x = self.s3d_stem(frames)
        x = pool(x, (1, 3, 3), (1, 2, 2))
        x = self.separable('conv_2b', x)
        x = self.separable('conv_2c', x)
        x = pool(x, (1, 3, 3), (1, 2, 2))
        pools_before = {}
        if pools == 4:
            pools_before = {'4b': (3, 3, 3), '5b': (2, 2, 2)}
        for block in blocks:
            if block in pools_before:
                x = pool(x, pools_before[block], (2, 2, 2))
            x = self.mixed(f'mixed_{block}', x)
        return x

    # ResNet v2
    def norm_relu(self, path, x):
        """Batch norm and a ReLU of the residual network."""
        return np.maximum(self.norm(f'resnet/{path}', x), 0)

    def preactivated_block(self, name, x, stride, clip):
        """A block whose norms stand before its convolutions; clip: as in resnet_v2."""
        parts = self.at(f'resnet/{name}')[0]
        normed = self.norm_relu(f'{name}/norm_0', x)
        shortcut = x
        if name.endswith('block_0') and 'shortcut' in parts:
            kernel = self.kernel(f'resnet/{name}/shortcut')
            shortcut = conv(normed, kernel, (stride, stride))

        y = shifted(normed, clip) if clip else normed
        y = conv(y, self.kernel(f'resnet/{name}/conv_0'), (1, 1))
        y = self.norm_relu(f'{name}/norm_1', y)
        y = conv(y, self.kernel(f'resnet/{name}/conv_1'), (stride, stride))
        if 'conv_2' in parts:
            y = self.norm_relu(f'{name}/norm_2', y)
            y = conv(y, self.kernel(f'resnet/{name}/conv_2'), (1, 1))
        return shortcut + y

    def resnet_v2(self, x, blocks, clip=0):
        """x [N H W C] -> (map before, map after the last norm and ReLU).

        clip: frames of a clip whose channels are shifted (0: none).
        """
        x = conv(x, self.kernel('resnet/stem'), (2, 2))
        x = pool(x, (3, 3), (2, 2))
        for unit, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if unit > 0 and block == 0 else 1
                x = self.preactivated_block(f'unit_{unit}_block_{block}', x, stride, clip)
        return x, self.norm_relu('norm', x)

    # R(2+1)D
    def space_then_time(self, path, x, stride, relu=True):
        """A convolution in space, then one in time."""
        x = self.unit(f'{path}/spatial', x, (1, stride, stride), even=True)
        return self.unit(f'{path}/temporal', x, (stride, 1, 1), even=True, relu=relu)

    def r2plus1d(self, x):
        """The last map of R(2+1)D-18."""
        x = self.unit('stem_spatial', x, (1, 2, 2), even=True)
        x = self.unit('stem_temporal', x, (1, 1, 1), even=True)
        for layer in range(1, 5):
            for block in range(2):
                name = f'layer_{layer}_block_{block}'
                stride = 2 if layer > 1 and block == 0 else 1
                shortcut = x
                if stride == 2:
                    shortcut = self.unit(f'{name}_short', x, (2, 2, 2), even=True, relu=False)
                y = self.space_then_time(f'{name}_conv_1', x, stride)
                y = self.space_then_time(f'{name}_conv_2', y, 1, relu=False)
                x = np.maximum(shortcut + y, 0)
        return x

    # R3D
    def r3d(self, x, blocks):
        """The last map of R3D; time is in the first kernels of the last two groups."""
        x = self.unit('stem', x, (2, 2, 2))
        x = pool(x, (1, 3, 3), (1, 2, 2))
        for group, count in enumerate(blocks, start=1):
            for block in range(count):
                name = f'group_{group}_block_{block}'
                stride = (1, 2, 2) if group > 1 and block == 0 else (1, 1, 1)
                shortcut = x
                if block == 0:
                    shortcut = self.unit(f'{name}/short', x, stride, relu=False)
                seen = self.kernel(f'{name}/temporal/conv').shape[0]
                assert seen == (3 if group > 2 else 1)
                y = self.unit(f'{name}/temporal', x, (1, 1, 1))
                y = self.unit(f'{name}/spatial', y, stride)
                y = self.unit(f'{name}/expand', y, (1, 1, 1), relu=False)
                x = np.maximum(shortcut + y, 0)
        return x

    # AVID
    def avid_video(self, x):
        """The last map of AVID's R(2+1)D-18: the norm of a block's end is that of the sum."""
        x = self.unit('stem', x, (1, 2, 2), even=True)
        x = pool(x, (1, 3, 3), (1, 2, 2), [(0, 0), (1, 1), (1, 1)])
        for layer in range(1, 5):
            for block in range(2):
                name = f'layer_{layer}_block_{block}'
                stride = 2 if layer > 1 and block == 0 else 1
                y = self.space_then_time(f'{name}/conv_1', x, stride)
                y = self.unit(f'{name}/conv_2_spatial', y, (1, 1, 1), even=True)
                y = conv(y, self.kernel(f'{name}/conv_2_temporal'), (1, 1, 1), even=True)
                if stride == 2:
                    x = conv(x, self.kernel(f'{name}/short'), (2, 2, 2), even=True)
                x = np.maximum(self.norm(f'{name}/norm', x + y), 0)
        return x

    def avid_audio(self, x):
        """The last map of AVID's ten layers; x [B T F]."""
        x = self.norm('bands', x)[..., None]
        x = self.unit('stem', x, (2, 2), even=True)
        for block in range(1, 5):
            strides = (1, 1) if block == 4 else (2, 2)
            x = self.unit(f'block_{block}_conv_1', x, strides, even=True)
            x = self.unit(f'block_{block}_conv_2', x, (1, 1), even=True)
        return x

    # ResNet-9
    def resnet9(self, x):
        """The last map of ResNet-9."""
        x = self.unit('stem', x, (2, 2), even=True)
        x = pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for group in range(1, 5):
            name = f'group_{group}'
            stride = 2 if group > 1 else 1
            shortcut = x
            if group > 1:
                shortcut = self.unit(f'{name}_short', x, (2, 2), even=True, relu=False)
            y = self.unit(f'{name}_conv_1', x, (stride, stride), even=True)
            y = self.unit(f'{name}_conv_2', y, (1, 1), even=True, relu=False)
            x = np.maximum(shortcut + y, 0)
        return x


def shifted(x, clip):
    """Channels of frames [N H W C] exchanged between the `clip` frames of each clip.

    Frame by frame: the last eighth of the next frame's channels, this frame's middle, the first
    eighth of those of the frame before.
    """
    x = x.reshape(-1, clip, *x.shape[1:])
    fold = x.shape[-1] // 8
    out = np.zeros_like(x)
    for t in range(clip):
        out[:, t, ..., fold:-fold] = x[:, t, ..., fold:-fold]
        if t + 1 < clip:
            out[:, t, ..., :fold] = x[:, t + 1, ..., -fold:]
        if t > 0:
            out[:, t, ..., -fold:] = x[:, t - 1, ..., :fold]
    return out.reshape(-1, *x.shape[2:])


def variables_of(module, x):
    """Values that hide nothing: no scale of 1, no bias of 0."""
    x = jnp.asarray(x)

    def init():
        return module.init(jax.random.key(0), x, np.ones(len(x), bool), False)

    def value(path, like):
        name = path[-1].key
        noise = NOISE.normal(size=like.shape).astype(np.float32)
        if name == 'count':
            return np.zeros(like.shape, like.dtype)
        if name == 'kernel':
            fan_in = max(1, math.prod(like.shape[:-1]))
            return noise * (1.5 / fan_in) ** 0.5
        if name == 'scale':
            return 1 + 0.2 * noise
        if name == 'var':
            return 0.5 + noise**2
        return 0.2 * noise

    return jax.tree.map_with_path(value, meta.unbox(jax.eval_shape(init)))


def apply(module, variables, x, valid=None, train=False):
    """(pooled, last map), and the new statistics in training."""
    x = jnp.asarray(x)
    if valid is None:
        valid = np.ones(len(x), bool)
    mutable = ['batch_stats'] if train else False

    def forward(variables):
        return module.apply(variables, x, valid, train, mutable=mutable)

    # the older code generator, which the tests use, runs pooling slowly
    options = {'xla_cpu_use_fusion_emitters': True}
    return jax.jit(forward, compiler_options=options)(variables)


def close(got, expected):
    """Equal to a thousandth, shapes included, and float32 as nets compute."""
    chex.assert_equal_shape([got, expected])
    chex.assert_type(got, jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def frames(*shape):
    """Pixels from 0 to 1."""
    return NOISE.uniform(size=shape).astype(np.float32)


# ---- towers
@pytest.mark.parametrize(
    'shape, fields, reference',
    [
        ((2, 6, 38, 34, 3), {}, ()),
        ((2, 4, 18, 14, 3), {'pools': 2, 'blocks': (1, 2, 1)}, (2, ('3b', '4b', '4c', '5b'))),
    ],
)
def test_s3d_and_its_first_kernel_on_raw_frames(shape, fields, reference):
    module, x = S3D(multiplier=1 / 16, **fields), frames(*shape)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables).s3d(f64(x), *reference)
    close(last, expected)
    close(pooled, expected.mean((1, 2, 3)))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'pools': 5}, 'pools=5'),
        ({'blocks': (2, 6, 2)}, r'blocks=\(2, 6, 2\)'),
        ({'blocks': (2, 5)}, r'blocks=\(2, 5\)'),
    ],
)
def test_s3d_that_does_not_exist(fields, message):
    def init(x):
        return S3D(**fields).init(jax.random.key(0), x, jnp.ones(2, bool), False)

    with pytest.raises(ConfigError, match=f'config.model.towers.video: .*{message}.*0 to 4 pools'):
        jax.eval_shape(init, frames(2, 4, 16, 16, 3))


class SpaceToDepthTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_space_to_depth_order(self):
        """Channel ((t · 2 + h) · 2 + w) · 3 + c of a block is its pixel (t, h, w, c)."""
        x = frames(1, 4, 6, 2, 3)
        got = np.asarray(self.variant(space_to_depth)(jnp.asarray(x)))
        chex.assert_shape(got, (1, 2, 3, 1, 24))
        chex.assert_type(got, jnp.float32)
        for channel, (t, h, w, c) in enumerate(np.ndindex(2, 2, 2, 3)):
            np.testing.assert_array_equal(got[..., channel], x[:, t::2, h::2, w::2, c])

    def test_frames_that_do_not_fold_are_a_sentence(self):
        with pytest.raises(ConfigError, match='5 frames of 4×4 do not fold into blocks'):
            space_to_depth(jnp.asarray(frames(1, 5, 4, 4, 3)))


@pytest.fixture
def shallow(monkeypatch):
    """ResNets of fewer blocks: compiling is what takes the time."""
    monkeypatch.setitem(resnet_v2.DEPTHS, 50, ((1, 2, 1, 1), True, (256, 512, 1024, 2048)))
    monkeypatch.setitem(resnet_v2.DEPTHS, 18, ((2, 1, 1, 1), False, (64, 128, 256, 512)))


def test_tsm(shallow):
    module, x = TSMResNet(multiplier=1 / 8), frames(2, 3, 40, 38, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    images = f64(x).reshape(6, 40, 38, 3)
    _, expected = Reference(variables).resnet_v2(images, (1, 2, 1, 1), clip=3)
    close(last, expected.reshape(last.shape))
    close(pooled, expected.mean((1, 2)).reshape(2, 3, -1).mean(1))

    # training: a clip that is not there is in no statistics
    valid = np.array([True, False])
    other_x = np.concatenate([x[:1], x[1:] + 1])
    (one, _), new = apply(module, variables, x, valid, train=True)
    (other, _), other_new = apply(module, variables, other_x, valid, train=True)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(new)
    chex.assert_trees_all_equal_shapes_and_dtypes(new['batch_stats'], variables['batch_stats'])
    chex.assert_trees_all_close(new, other_new, rtol=1e-5, atol=1e-6)


class ShiftTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_shift_as_published(self):
        """Channels 0…15 of three frames, numbered 100·frame + channel."""
        shift_eighth = self.variant(lambda x: shift(x, 0.125))
        numbers = 100 * np.arange(1, 4)[:, None] + np.arange(16)
        x = numbers[None, :, None, None].astype(np.float32)
        out = shift_eighth(jnp.asarray(x))
        chex.assert_equal_shape([out, x])
        first, second, third = np.asarray(out)[0, :, 0, 0]
        assert second.tolist() == [314, 315, *range(202, 214), 100, 101]
        assert first[-2:].tolist() == [0, 0]
        assert third[:2].tolist() == [0, 0]

        # too few channels to shift any
        few = jnp.arange(14.0).reshape(1, 2, 1, 1, 7)
        np.testing.assert_array_equal(shift_eighth(few), few)


@pytest.mark.parametrize(
    'depth, blocks',
    [
        (50, (1, 2, 1, 1)),
        (18, (2, 1, 1, 1)),
    ],
)
def test_audio_resnet_v2(shallow, depth, blocks):
    module, x = ResNet2DV2(depth, multiplier=1 / 8), frames(2, 50, 40) - 0.7
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    before, after = Reference(variables).resnet_v2(f64(x)[..., None], blocks)
    close(last, before)  # the end point of sound is before the last norm
    close(pooled, after.mean((1, 2)))

    block = variables['params']['resnet']['unit_0_block_0']
    assert ('shortcut' in block) == (depth == 50)
    chex.assert_shape(block['conv_0']['kernel'], (1, 1, None, None))


@pytest.mark.parametrize(
    'mid, norm, eps',
    [
        ('block', 'torch', 1e-5),
        ('conv', 'xdc', 1e-3),
    ],
)
def test_r2plus1d(mid, norm, eps):
    module, x = R2Plus1D(mid, 1 / 16, norm), frames(2, 5, 22, 20, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables, eps).r2plus1d(f64(x))
    close(last, expected)
    close(pooled, expected.mean((1, 2, 3)))


def test_r3d():
    blocks = (1, 2, 1, 1)
    module, x = R3D(blocks, 1 / 16), frames(2, 6, 38, 34, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables).r3d(f64(x), blocks)
    chex.assert_shape(last, (2, 3, 2, 2, 128))
    close(last, expected)
    close(pooled, expected.mean((1, 2, 3)))


@pytest.mark.parametrize(
    'inputs, outputs, planes',
    [
        (64, 64, 144),
        (64, 128, 230),
        (128, 128, 288),
        (128, 256, 460),
        (256, 256, 576),
        (256, 512, 921),
        (512, 512, 1152),
    ],
)
def test_mid_planes(inputs, outputs, planes):
    assert mid_planes(inputs, outputs) == planes


def test_resnet9():
    # sizes whose pooling SAME would pad otherwise
    module, x = ResNet9(1 / 8), frames(2, 31, 40) * 4 - 3
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables).resnet9(f64(x)[..., None])
    close(last, expected)
    close(pooled, expected.mean((1, 2)))


def test_avid_towers():
    module, x = AVIDVideo(1 / 16), frames(2, 5, 40, 36, 3)
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables).avid_video(f64(x))
    close(last, expected)
    close(pooled, expected.max((1, 2, 3)))

    module, x = AVIDAudio(1 / 8), frames(2, 31, 40) * 4 - 3
    variables = variables_of(module, x)
    pooled, last = apply(module, variables, x)
    expected = Reference(variables).avid_audio(f64(x))
    close(last, expected)
    close(pooled, expected.max((1, 2)))


@pytest.mark.parametrize(
    'name, size, width',
    [
        ('avid_video', 15_379_136, 512),
        ('avid_audio', 4_726_210, 512),
        ('s3d_pixels', 9_162_704, 1024),
        ('s3d', 9_146_000, 1024),
        ('tsm50', 23_500_352, 2048),
        ('tsm50x2', 93_891_712, 4096),
        ('resnet2d_v2_50', 23_494_080, 2048),
        ('r2plus1d', 33_165_639, 512),
        ('r2plus1d_torchvision', 31_300_125, 512),
        ('r3d_50', 31_672_128, 2048),
    ],
)
def test_published_sizes(name, size, width, monkeypatch):
    for init in layers.INITS:  # cheaper to trace
        monkeypatch.setitem(layers.INITS, init, jax.nn.initializers.zeros)
    fields = presets.tower(name)
    modality, net = NETS[fields.pop('name')]
    module = net(**fields)

    def init_with_output(x):
        return module.init_with_output(jax.random.key(0), x, jnp.ones(2, bool), False)

    of_sound = modality == 'audio'
    # AVID normalises its 257 bands, with parameters of each.
    shape = (2, 150, 257) if of_sound else (2, 8, 32, 32, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    (pooled, last), variables = jax.eval_shape(init_with_output, x)
    params = jax.tree.leaves(meta.unbox(variables)['params'])
    assert sum(param.size for param in params) == size
    chex.assert_type(params, jnp.float32)
    chex.assert_shape(pooled, (2, width))
    chex.assert_rank(last, 4 if of_sound else 5)
    chex.assert_type([pooled, last], jnp.float32)
    assert last.shape[0] == 2
    assert last.shape[-1] == width


# ---- batch norm of each kind
class RunningStatisticsTest(chex.TestCase):
    def setUp(self):
        super().setUp()
        chex.clear_trace_counter()  # chex counts over all variants of a test

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(*[(kind, kind) for kind in layers.NORMS])
    def test_running_statistics(self, kind):
        """Three batches, the second without a valid row.

        average = keep · average + (1 - keep) · batch, from mean 0 and variance 1;
        debiased: hidden = 0.9 hidden + 0.1 batch from 0, average = hidden / (1 - 0.9^n).
        """
        module = layers.BatchNorm(kind)
        valid = np.array([1, 1, 0, 1, 1], bool)
        batches = NOISE.normal(2, 3, (3, 5, 4)).astype(np.float32)
        variables = module.init(jax.random.key(0), batches[0], valid, False)

        @self.variant
        @chex.assert_max_traces(n=1)
        def train(variables, x, valid):
            return module.apply(variables, x, valid, True, mutable=['batch_stats'])

        @self.variant
        def evaluate(variables, x, valid):
            return module.apply(variables, x, valid, False)

        keep, eps = (0.1, 1e-3) if kind == 'xdc' else (0.9, 1e-5)
        unbiased = 1 if kind in ('torch', 'xdc') else 0
        mean = np.zeros(4)
        var = np.zeros(4) if kind == 'debiased' else np.ones(4)
        for turn, x in enumerate(batches):
            without_rows = turn == 1
            y, new = train(variables, x, valid & (not without_rows))
            chex.assert_equal_shape([x, y])
            chex.assert_trees_all_equal_shapes_and_dtypes(
                new['batch_stats'], variables['batch_stats']
            )
            if without_rows:
                chex.assert_trees_all_equal(new['batch_stats'], variables['batch_stats'])
                continue
            variables = {**variables, **new}
            rows = x[valid].astype(np.float64)
            normed = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + eps)
            np.testing.assert_allclose(y[valid], normed, rtol=1e-4, atol=1e-5)
            mean = keep * mean + (1 - keep) * rows.mean(0)
            var = keep * var + (1 - keep) * rows.var(0, ddof=unbiased)

        if kind == 'debiased':
            mean, var = mean / (1 - 0.9**2), var / (1 - 0.9**2)
        stats = variables['batch_stats']
        np.testing.assert_allclose(stats['mean'], mean, rtol=1e-4)
        np.testing.assert_allclose(stats['var'], var, rtol=1e-4)
        y = evaluate(variables, batches[0], valid)
        normed = (batches[0] - mean) / np.sqrt(var + eps)
        np.testing.assert_allclose(y, normed, rtol=1e-3, atol=1e-4)


def test_initial_values():
    def draw(name, shape):
        values = layers.INITS[name](jax.random.key(0), shape, jnp.float32)
        chex.assert_shape(values, shape)
        chex.assert_type(values, jnp.float32)
        return np.asarray(values, np.float64)

    # a normal cut at two deviations has deviation 0.8796
    standardised = draw('fan_in', (3, 3, 16, 200)) * 144**0.5
    assert np.abs(standardised).max() <= 2 + 1e-6
    assert abs(standardised.std() - 0.8796) < 0.01

    assert abs(draw('kaiming', (3, 3, 200, 16)).std() - (2 / 144) ** 0.5) < 0.001


# ---- convolutions and pooling
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
    """It is linear in each argument: the definition at a direction is the derivative along it.

    <gradient, direction> = <cotangent, conv(direction)>.
    """
    noise = np.random.default_rng(1)
    x, weights = noise.normal(size=shape), noise.normal(size=(*kernel, shape[-1], 5))
    pads = None if padding == 'SAME' else list(padding)
    expected = conv(x, weights, strides, pads=pads)

    def convolve(x, weights):
        return convolutions.convolve(x, weights, strides, padding)

    operands = (jnp.float32(x), jnp.float32(weights))
    got, pull_back = jax.vjp(convolve, *operands)
    chex.assert_equal_shape([got, expected])
    chex.assert_type(got, jnp.float32)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)

    cotangent = noise.normal(size=expected.shape)
    x_direction = noise.normal(size=x.shape)
    weights_direction = noise.normal(size=weights.shape)
    grads = pull_back(jnp.float32(cotangent))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, operands)
    x_grad, weights_grad = f64(grads)
    along_x = conv(x_direction, weights, strides, pads=pads)
    along_weights = conv(x, weights_direction, strides, pads=pads)
    atol = 1e-4 * np.sqrt(cotangent.size)
    np.testing.assert_allclose(
        (x_grad * x_direction).sum(), (cotangent * along_x).sum(), rtol=1e-4, atol=atol
    )
    np.testing.assert_allclose(
        (weights_grad * weights_direction).sum(),
        (cotangent * along_weights).sum(),
        rtol=1e-4,
        atol=atol,
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
    """The whole of a window's cotangent goes to the entry that is its maximum."""
    # no ties; negative, so that padding with 0 would win
    permutation = np.random.default_rng(2).permutation(math.prod(shape))
    x = permutation.reshape(shape) - 2000.0
    pads = None if padding == 'SAME' else list(padding)
    expected = pool(x, window, strides, pads)

    def max_pool(x):
        return convolutions.max_pool(x, window, strides, padding)

    got, pull_back = jax.vjp(max_pool, jnp.float32(x))
    chex.assert_equal_shape([got, expected])
    chex.assert_type(got, jnp.float32)
    np.testing.assert_array_equal(got, expected)

    cotangent = np.random.default_rng(3).integers(1, 9, expected.shape)
    expected_grad = np.zeros(x.size)
    index_of = {value: index for index, value in enumerate(x.reshape(-1))}
    for maximum, weight in zip(expected.reshape(-1), cotangent.reshape(-1)):
        expected_grad[index_of[maximum]] += weight
    (grad,) = pull_back(jnp.float32(cotangent))
    np.testing.assert_array_equal(grad, expected_grad.reshape(shape))
