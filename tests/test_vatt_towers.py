"""The less common towers against independent definitions.

BERT and linear text in NumPy, I3D and ResNet in TensorFlow's own operations.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests import tiny
from tests.test_models import (
    VOCAB,
    B,
    encode,
    encoder,
    f64,
    feed_forward,
    gelu,
    initial_variables,
    inputs,
    layer_norm,
    layer_of,
    self_attention,
    with_noise,
)
from vatt_jax import models
from vatt_jax.models import embeddings
from vatt_jax.models.towers.audio_resnet import ResNet2D
from vatt_jax.models.towers.i3d import I3D, MIXED
from vatt_jax.rng import Rng

SIZE = {'layers': 2, 'width': 16, 'mlp': 24, 'heads': 2, 'head_width': 8}


def text_model(tower):
    """(parameters in float64, word ids [B candidates words], what the tower gives for them)."""
    config = tiny.config()
    config.model.towers = {'text': {'vocab': VOCAB, 'word_width': 10, **tower}}
    config.model.head = {'name': 'none'}
    model = models.build(config.model)
    rng = Rng.create(0, 0, jnp.arange(B))
    stream = inputs(config)['text']
    # nothing but padding: the aggregate token alone is left to attend to
    stream['data'][1, 0] = 0
    variables = with_noise(initial_variables(model, {'text': stream}, rng))
    got = encode(model, variables, 'text', stream, rng, features=True)
    return f64(variables['params']), stream['data'], got


def post_norm(params, x, mask):
    """The stack of `bert_small`: norms after the sums, none at the end."""
    for index in range(SIZE['layers']):
        layer = layer_of(params['layers'], index)
        x = layer_norm(layer['attention_norm'], x + self_attention(layer, x, mask))
        x = layer_norm(layer['mlp_norm'], x + feed_forward(layer, x))
    return x


def natural_spline(table, length):
    """A table resized by the natural cubic spline, straight beyond the last knot."""
    scipy = pytest.importorskip('scipy.interpolate')
    knots = len(table)
    spline = scipy.CubicSpline(np.arange(knots) / knots, table, bc_type='natural')
    at = np.arange(length) / length
    last = (knots - 1) / knots
    beyond = spline(last) + (at - last)[:, None] * spline(last, 1)
    return np.where((at <= last)[:, None], spline(at), beyond)


@pytest.mark.parametrize('small', [False, True])
def test_bert(small):
    tower = {'name': 'bert', **SIZE, 'positions': 6}
    if small:
        tower.update(pre_norm=False, extra=True)
    params, ids, got = text_model(tower)
    front = params['fronts_text']
    assert ('final_norm' in params['encoders_text']) != small
    assert ('word_agg' in front) == small

    positions = front['positions']['temporal_positions']
    if small:
        # the token in word space makes seven of six words: the table is resized
        positions = natural_spline(positions, 7)

    candidates = ids.shape[1]
    chex.assert_shape(got.pooled, (B, candidates, SIZE['width']))
    chex.assert_shape(got.tokens, (B, candidates, len(positions), SIZE['width']))
    chex.assert_type([got.pooled, got.tokens], jnp.float32)

    for b in range(B):
        words = front['word_table'][ids[b, 0]]
        mask = np.concatenate([[True], ids[b, 0] != 0])
        if small:
            words = np.concatenate([front['word_agg'][None], words])
            mask = np.concatenate([[True], mask])
        embedded = gelu(words @ front['projection']['kernel'])
        embedded = embedded + layer_norm(front['positions']['norm'], positions)
        x = np.concatenate([front['agg'][None], embedded])
        if small:
            x = post_norm(params['encoders_text'], x, mask)
        else:
            x = encoder(params['encoders_text'], x, mask)
        np.testing.assert_allclose(got.pooled[b, 0], x[0], rtol=3e-4, atol=3e-4)
        np.testing.assert_allclose(got.tokens[b, 0], x[1:], rtol=3e-4, atol=3e-4)


def test_linear_text_takes_the_maximum_over_words_padding_included():
    params, ids, got = text_model({'name': 'linear', 'width': 12})
    net = params['nets_text']
    projected = net['word_table'][ids] @ net['projection']['kernel'] + net['projection']['bias']
    words = np.maximum(projected, 0)
    chex.assert_equal_shape([got.tokens, words])
    chex.assert_shape(got.pooled, (*ids.shape[:2], 12))
    chex.assert_type([got.pooled, got.tokens], jnp.float32)
    np.testing.assert_allclose(got.tokens, words, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.pooled, words.max(2), rtol=1e-4, atol=1e-5)


class Net:
    """A net's units in TensorFlow's operations, from our parameters.

    train: normalise by the statistics of the rows it is given, not by the running ones.
    """

    def __init__(self, variables, train):
        import tensorflow as tf

        self.tf, self.variables, self.train = tf, variables, train

    def unit(self, path, x, stride, padding='SAME', relu=True):
        """Convolution, batch norm and, if asked for, a ReLU."""
        tf = self.tf
        params, stats = self.variables['params'], self.variables['batch_stats']
        for part in path.split('/'):
            params, stats = params[part], stats.get(part, {})
        kernel = np.asarray(params['conv']['kernel'])
        axes = len(x.shape) - 2

        if padding == 'FIXED' and stride > 1:
            # as much on both sides whatever the length; one more behind for an even kernel
            size = kernel.shape[0]
            before = (size - 1) // 2
            after = size - 1 - before
            x = tf.pad(x, [[0, 0], *[[before, after]] * axes, [0, 0]])
            padding = 'VALID'
        elif padding == 'FIXED':
            padding = 'SAME'
        conv = tf.nn.conv3d if axes == 3 else tf.nn.conv2d
        x = conv(x, kernel, [1, *[stride] * axes, 1], padding)

        if self.train:
            mean, var = tf.nn.moments(x, list(range(axes + 1)))
        else:
            mean, var = stats['norm']['mean'], stats['norm']['var']
        norm = params['norm']
        x = tf.nn.batch_normalization(x, mean, var, norm['bias'], norm['scale'], 1e-5)
        return tf.nn.relu(x) if relu else x

    def max_pool(self, x, window, stride):
        """Maximum over windows of frames, padded as TensorFlow's SAME."""
        return self.tf.nn.max_pool3d(x, window, stride, 'SAME')

    def mixed(self, name, x):
        """An Inception block: four branches beside each other."""
        branches = [
            self.unit(f'{name}/b0', x, 1),
            self.unit(f'{name}/b1', self.unit(f'{name}/b1_in', x, 1), 1),
            self.unit(f'{name}/b2', self.unit(f'{name}/b2_in', x, 1), 1),
            self.unit(f'{name}/b3', self.max_pool(x, 3, 1), 1),
        ]
        return self.tf.concat(branches, -1)

    def i3d(self, x):
        """The last map of I3D."""
        x = self.unit('conv_1a', x, 2)
        x = self.max_pool(x, [1, 3, 3], [1, 2, 2])
        x = self.unit('conv_2b', x, 1)
        x = self.unit('conv_2c', x, 1)
        x = self.max_pool(x, [1, 3, 3], [1, 2, 2])
        windows = {'mixed_4b': 3, 'mixed_5b': 2}
        for name in MIXED:
            if name in windows:
                x = self.max_pool(x, windows[name], 2)
            x = self.mixed(name, x)
        return x

    def resnet(self, x, blocks):
        """The last map of a ResNet of as many blocks in each group, on spectrograms [B T F]."""
        tf = self.tf
        x = self.unit('stem', x[..., None], 2, 'FIXED')
        x = tf.nn.max_pool2d(x, 3, 2, 'SAME')
        for group, count in enumerate(blocks):
            for block in range(count):
                name = f'group_{group + 1}_block_{block + 1}'
                first = block == 0
                stride = 2 if group > 0 and first else 1
                shortcut = x
                if first:
                    shortcut = self.unit(f'{name}/short', x, stride, 'FIXED', relu=False)
                y = self.unit(f'{name}/conv_1', x, 1)
                y = self.unit(f'{name}/conv_2', y, stride, 'FIXED')
                y = self.unit(f'{name}/conv_3', y, 1, relu=False)
                x = tf.nn.relu(y + shortcut)
        return x


BLOCKS = (1, 2, 1, 1)  # of the ResNet


def last_map(net, variables, x, train):
    """The definition's last map, as NumPy."""
    reference = Net(variables, train)
    out = reference.i3d(x) if net == 'i3d' else reference.resnet(x, BLOCKS)
    return out.numpy()


def mean_of_map(x):
    """Mean over all axes but the batch and the channels."""
    return x.mean(tuple(range(1, x.ndim - 1)))


def first_convolution(net, kernel, x):
    """Rows [N channels] of the first convolution's output, by TensorFlow."""
    import tensorflow as tf

    if net == 'i3d':
        out = tf.nn.conv3d(x, kernel, [1, 2, 2, 2, 1], 'SAME')
    else:
        padded = np.pad(x[..., None], ((0, 0), (3, 3), (3, 3), (0, 0)))
        out = tf.nn.conv2d(padded, kernel, 2, 'VALID')
    return out.numpy().reshape(-1, 64)


def fast_pooling_jit(function):
    """The older code generator, which the tests use, runs pooling slowly."""
    return jax.jit(function, compiler_options={'xla_cpu_use_fusion_emitters': True})


@pytest.mark.parametrize('net', ['i3d', 'resnet'])
def test_convolutional_towers(net):
    module = I3D() if net == 'i3d' else ResNet2D(BLOCKS)
    noise = np.random.default_rng(0)
    shape = (3, 8, 45, 45, 3) if net == 'i3d' else (3, 61, 45)
    x = jnp.asarray(noise.normal(size=shape), jnp.float32)
    valid = np.array([True, False, True])

    def init():
        return module.init(jax.random.key(0), x, valid, False)

    def draw(like):
        values = noise.normal(size=like.shape)
        if like.ndim == 1:
            return np.abs(1 + 0.2 * values).astype(np.float32)
        return (values * np.prod(like.shape[:-1]) ** -0.5).astype(np.float32)

    variables = jax.tree.map(draw, meta.unbox(jax.eval_shape(init)))

    @fast_pooling_jit
    def evaluated(variables):
        return module.apply(variables, x, valid, False)

    @fast_pooling_jit
    def trained(variables):
        return module.apply(variables, x, valid, True, mutable=['batch_stats'])

    pooled, last = evaluated(variables)
    expected = last_map(net, variables, x, train=False)
    chex.assert_shape(last, expected.shape)
    chex.assert_shape(pooled, (3, expected.shape[-1]))
    chex.assert_type([pooled, last], jnp.float32)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(last, expected, rtol=1e-3, atol=1e-3 * scale)
    np.testing.assert_allclose(pooled, mean_of_map(expected), rtol=1e-3, atol=1e-3 * scale)

    # training: statistics of the valid clips alone, and they move the running ones by a tenth
    (pooled, _), new = trained(variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(new['batch_stats'], variables['batch_stats'])
    chex.assert_tree_all_finite(new)
    rows = x[valid]
    expected = last_map(net, variables, rows, train=True)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(pooled[valid], mean_of_map(expected), rtol=5e-3, atol=2e-3 * scale)

    first = 'conv_1a' if net == 'i3d' else 'stem'
    kernel = variables['params'][first]['conv']['kernel']
    activations = first_convolution(net, kernel, rows)
    before = variables['batch_stats'][first]['norm']
    after = new['batch_stats'][first]['norm']
    mean = 0.9 * before['mean'] + 0.1 * activations.mean(0)
    var = 0.9 * before['var'] + 0.1 * activations.var(0)
    np.testing.assert_allclose(after['mean'], mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after['var'], var, rtol=1e-3, atol=1e-4)


def test_a_permutation_for_each_replica():
    def patches(drop_token):
        return embeddings.Patches(
            (2, 4),
            (4, 4),
            ('temporal', 'vertical'),
            8,
            drop_token=drop_token,
            replicas=2,
            position_dropout=0.0,
        )

    data = jax.random.normal(jax.random.key(0), (4, 8, 16, 3))
    rng = Rng.create(0, 0, jnp.arange(4))
    variables = patches(0.0).init(jax.random.key(1), data, rng, True)
    every = patches(0.0).apply(variables, data, rng, True)
    some = patches(0.4).apply(variables, data, rng, True)

    kept = np.asarray(some.kept)
    chex.assert_shape(kept, (4, 9))
    chex.assert_shape(some.x, (4, 1 + 9, 8))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[2], kept[3])
    assert (kept[1] != kept[2]).any()
    for b in range(4):
        np.testing.assert_allclose(some.x[b, 1:], every.x[b, 1:][kept[b]], rtol=1e-5, atol=1e-6)
