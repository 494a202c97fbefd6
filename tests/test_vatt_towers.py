"""The less common towers against independent definitions: BERT and linear text in NumPy, I3D and ResNet in TensorFlow's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests.test_models import B, encode, encoder, f64, gelu, inputs, layer_norm
from vatt_jax import models
from vatt_jax.models import embeddings
from vatt_jax.models.towers.audio_resnet import ResNet2D
from vatt_jax.models.towers.i3d import I3D, MIXED
from vatt_jax.rng import Rng


def text_model(tower):
    from tests import tiny

    c = tiny.config()
    c.model.towers = {'text': {'vocab': 30, 'word_width': 10, **tower}}
    c.model.head = {'name': 'none'}
    model, batch, rng = (
        models.build(c.model),
        {'text': inputs(c)['text']},
        Rng.create(0, 0, jnp.arange(B)),
    )
    batch['text']['data'][1, 0] = (
        0  # nothing but padding: the aggregate token alone is left to attend to
    )
    variables = meta.unbox(
        jax.jit(lambda: model.init(jax.random.key(1), batch, train=False, rng=rng))()
    )
    noise = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), variables
    )
    got = encode(model, variables, 'text', batch['text'], rng, features=True)
    return f64(variables['params']), batch['text']['data'], got


SIZE = {'layers': 2, 'width': 16, 'mlp': 24, 'heads': 2, 'head_width': 8}


def post_norm(p, x, mask):
    """The stack of `bert_small`: norms after the sums, none at the end."""
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], p['layers'])
        lin = lambda name, y: (
            np.einsum('nd,dhk->hnk', y, one[name]['kernel']) + one[name]['bias'][:, None]
        )  # noqa: B023
        q, k, v = lin('query', x), lin('key', x), lin('value', x)
        logits = np.where(mask[None, None], np.einsum('hqk,hnk->hqn', q, k) / np.sqrt(8), -1e9)
        w = np.exp(logits - logits.max(-1, keepdims=True))
        w /= w.sum(-1, keepdims=True)
        x = layer_norm(
            one['attention_norm'],
            x + np.einsum('hqn,hnk,hkd->qd', w, v, one['out']['kernel']) + one['out']['bias'],
        )
        y = (
            gelu(x @ one['mlp_in']['kernel'] + one['mlp_in']['bias']) @ one['mlp_out']['kernel']
            + one['mlp_out']['bias']
        )
        x = layer_norm(one['mlp_norm'], x + y)
    return x


@pytest.mark.parametrize('small', [False, True])
def test_bert(small):
    p, ids, got = text_model(
        {
            'name': 'bert',
            **SIZE,
            'positions': 6,
            **({'pre_norm': False, 'extra': True} if small else {}),
        }
    )
    front = p['fronts_text']
    place = front['positions']['temporal_positions']
    if small:  # the token in word space makes seven of six words: the table is resized
        scipy = pytest.importorskip('scipy.interpolate')
        spline = scipy.CubicSpline(np.arange(6) / 6, place, bc_type='natural')
        q = np.arange(7) / 7
        place = np.where(
            (q <= 5 / 6)[:, None],
            spline(q),
            spline(5 / 6) + (q - 5 / 6)[:, None] * spline(5 / 6, 1),
        )  # straight beyond the last knot
    assert ('final_norm' in p['encoders_text']) != small and ('word_agg' in front) == small
    for b in range(B):
        words = front['word_table'][ids[b, 0]]
        mask = np.concatenate([[True], ids[b, 0] != 0])
        if small:
            words, mask = (
                np.concatenate([front['word_agg'][None], words]),
                np.concatenate([[True], mask]),
            )
        x = gelu(words @ front['projection']['kernel']) + layer_norm(
            front['positions']['norm'], place
        )
        x = np.concatenate([front['agg'][None], x])
        x = (
            post_norm(p['encoders_text'], x, mask)
            if small
            else encoder(p['encoders_text'], x, mask)
        )
        np.testing.assert_allclose(got.pooled[b, 0], x[0], rtol=3e-4, atol=3e-4)
        np.testing.assert_allclose(got.tokens[b, 0], x[1:], rtol=3e-4, atol=3e-4)


def test_linear_text_takes_the_maximum_over_words_padding_included():
    p, ids, got = text_model({'name': 'linear', 'width': 12})
    p = p['nets_text']
    words = np.maximum(
        p['word_table'][ids] @ p['projection']['kernel'] + p['projection']['bias'], 0
    )
    np.testing.assert_allclose(got.tokens, words, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.pooled, words.max(2), rtol=1e-4, atol=1e-5)


class Net:
    """A net's units in TensorFlow's operations, from our parameters; train: statistics of the rows it is given."""

    def __init__(self, variables, train):
        import tensorflow as tf

        self.tf, self.variables, self.train = tf, variables, train

    def unit(self, path, x, stride, padding='SAME', relu=True):
        tf, p, s = self.tf, self.variables['params'], self.variables['batch_stats']
        for part in path.split('/'):
            p, s = p[part], s.get(part, {})
        kernel, axes = np.asarray(p['conv']['kernel']), len(x.shape) - 2
        if padding == 'FIXED' and stride > 1:
            k = kernel.shape[0]
            x = tf.pad(x, [[0, 0], *[[(k - 1) // 2, k - 1 - (k - 1) // 2]] * axes, [0, 0]])
            padding = 'VALID'
        conv = tf.nn.conv3d if axes == 3 else tf.nn.conv2d
        x = conv(x, kernel, [1, *[stride] * axes, 1], 'SAME' if padding == 'FIXED' else padding)
        mean, var = (
            tf.nn.moments(x, list(range(axes + 1)))
            if self.train
            else (s['norm']['mean'], s['norm']['var'])
        )
        x = tf.nn.batch_normalization(x, mean, var, p['norm']['bias'], p['norm']['scale'], 1e-5)
        return tf.nn.relu(x) if relu else x

    def i3d(self, x):
        tf = self.tf
        pool = lambda x, k, s: tf.nn.max_pool3d(x, k, s, 'SAME')
        x = pool(self.unit('conv_1a', x, 2), [1, 3, 3], [1, 2, 2])
        x = pool(self.unit('conv_2c', self.unit('conv_2b', x, 1), 1), [1, 3, 3], [1, 2, 2])
        for name in MIXED:
            x = pool(x, 3, 2) if name == 'mixed_4b' else pool(x, 2, 2) if name == 'mixed_5b' else x
            u = lambda branch, x: self.unit(f'{name}/{branch}', x, 1)  # noqa: B023
            x = tf.concat(
                [
                    u('b0', x),
                    u('b1', u('b1_in', x)),
                    u('b2', u('b2_in', x)),
                    u('b3', pool(x, 3, 1)),
                ],
                -1,
            )
        return x

    def resnet(self, x, blocks):
        tf = self.tf
        x = tf.nn.max_pool2d(self.unit('stem', x[..., None], 2, 'FIXED'), 3, 2, 'SAME')
        for g, count in enumerate(blocks):
            for b in range(count):
                name, stride = f'group_{g + 1}_block_{b + 1}', 2 if g and not b else 1
                short = x if b else self.unit(f'{name}/short', x, stride, 'FIXED', False)
                y = self.unit(f'{name}/conv_2', self.unit(f'{name}/conv_1', x, 1), stride, 'FIXED')
                x = tf.nn.relu(self.unit(f'{name}/conv_3', y, 1, relu=False) + short)
        return x


@pytest.mark.parametrize('net', ['i3d', 'resnet'])
def test_convolutional_towers(net):
    blocks = (1, 2, 1, 1)
    module = I3D() if net == 'i3d' else ResNet2D(blocks)
    noise = np.random.default_rng(0)
    x = noise.normal(size=(3, 8, 45, 45, 3) if net == 'i3d' else (3, 61, 45)).astype(np.float32)
    valid = np.array([True, False, True])
    # the older code generator, which the tests use, runs pooling slowly
    jit = lambda f: jax.jit(f, compiler_options={'xla_cpu_use_fusion_emitters': True})
    shapes = meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), x, valid, False)))
    draw = lambda v: (
        np.abs(1 + 0.2 * noise.normal(size=v.shape))
        if v.ndim == 1
        else noise.normal(size=v.shape) * np.prod(v.shape[:-1]) ** -0.5
    ).astype(np.float32)
    variables = jax.tree.map(draw, shapes)
    pooled, last = jit(lambda v: module.apply(v, x, valid, False))(variables)
    reference = Net(variables, False)
    want = (reference.i3d(x) if net == 'i3d' else reference.resnet(x, blocks)).numpy()
    np.testing.assert_allclose(last, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose(
        pooled, want.mean(tuple(range(1, want.ndim - 1))), rtol=1e-3, atol=1e-3 * np.abs(want).max()
    )
    # training: statistics of the valid clips alone, and they move the running ones by a tenth
    (pooled, _), new = jit(lambda v: module.apply(v, x, valid, True, mutable=['batch_stats']))(
        variables
    )
    reference = Net(variables, True)
    rows = x[valid]
    want = (reference.i3d(rows) if net == 'i3d' else reference.resnet(rows, blocks)).numpy()
    scale = np.abs(want).max()
    np.testing.assert_allclose(
        pooled[valid], want.mean(tuple(range(1, want.ndim - 1))), rtol=5e-3, atol=2e-3 * scale
    )
    first = 'conv_1a' if net == 'i3d' else 'stem'
    import tensorflow as tf

    k = variables['params'][first]['conv']['kernel']
    y = (
        (
            tf.nn.conv3d(rows, k, [1, 2, 2, 2, 1], 'SAME')
            if net == 'i3d'
            else tf.nn.conv2d(
                np.pad(rows[..., None], ((0, 0), (3, 3), (3, 3), (0, 0))), k, 2, 'VALID'
            )
        )
        .numpy()
        .reshape(-1, 64)
    )
    old, moved = variables['batch_stats'][first]['norm'], new['batch_stats'][first]['norm']
    np.testing.assert_allclose(
        moved['mean'], 0.9 * old['mean'] + 0.1 * y.mean(0), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        moved['var'], 0.9 * old['var'] + 0.1 * y.var(0), rtol=1e-3, atol=1e-4
    )


def test_a_permutation_for_each_replica():
    make = lambda rate: embeddings.Patches(
        (2, 4),
        (4, 4),
        ('temporal', 'vertical'),
        8,
        drop_token=rate,
        replicas=2,
        position_dropout=0.0,
    )
    data = jax.random.normal(jax.random.key(0), (4, 8, 16, 3))
    rng = Rng.create(0, 0, jnp.arange(4))
    variables = make(0.0).init(jax.random.key(1), data, rng, True)
    every, some = (
        make(0.0).apply(variables, data, rng, True),
        make(0.4).apply(variables, data, rng, True),
    )
    kept = np.asarray(some.kept)
    assert (
        kept.shape == (4, 9)
        and (kept[0] == kept[1]).all()
        and (kept[2] == kept[3]).all()
        and (kept[1] != kept[2]).any()
    )
    for b in range(4):
        np.testing.assert_allclose(some.x[b, 1:], every.x[b, 1:][kept[b]], rtol=1e-5, atol=1e-6)
