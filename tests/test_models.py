"""Towers against their definition in NumPy float64, and the equalities that options must keep."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests import tiny
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.models import embeddings, layers
from vatt_jax.models.attention import attention
from vatt_jax.models.transformer import relative_buckets
from vatt_jax.rng import Rng

B = 3  # clips in a batch
VOCAB = 30


def model_of(**overrides):
    """The tiny config and its model, two layers in each tower."""
    config = tiny.config(**overrides)
    config.model.towers.text.vocab = VOCAB
    for tower in config.model.towers.values():
        tower.layers = 2
    return config, models.build(config.model, 'float32')


def inputs(config):
    """A batch of noise of every modality; the first clip's first sentence has three words."""
    noise = np.random.default_rng(2)
    sizes = config.model.inputs
    valid = np.ones(B, bool)

    words = noise.integers(1, VOCAB, (B, sizes.text.candidates, sizes.text.words)).astype(np.int32)
    words[0, 0, 3:] = 0
    frames_shape = (B, sizes.video.frames, sizes.video.size, sizes.video.size, 3)
    frames = noise.normal(size=frames_shape).astype(np.float32)
    samples = noise.normal(size=(B, sizes.audio.samples)).astype(np.float32)
    return {
        'video': {'data': frames, 'valid': valid},
        'audio': {'data': samples, 'valid': valid},
        'text': {'data': words, 'mask': (words != 0).any(-1), 'valid': valid},
    }


def initial_variables(model, batch, rng):
    """Unboxed initial variables, in one compilation."""

    def init():
        return model.init(jax.random.key(1), batch, train=False, rng=rng)

    return meta.unbox(jax.jit(init)())


def with_noise(variables):
    """Adds noise: initial biases and scales of 0 and 1 would hide their being left out."""
    noise = np.random.default_rng(0)

    def add_noise(x):
        return x + 0.1 * noise.normal(size=x.shape).astype(np.float32)

    return jax.tree.map(add_noise, variables)


@pytest.fixture(scope='module')
def reference():
    """(config, model, variables, batch, rng), for reading."""
    config, model = model_of()
    batch = inputs(config)
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = with_noise(initial_variables(model, batch, rng))
    variables['batch_stats'] = jax.tree.map(jnp.abs, variables['batch_stats'])
    return config, model, variables, batch, rng


def encode(model, variables, modality, stream, rng, features=False):
    """One compilation instead of one for each operation."""

    def apply(variables):
        return model.apply(
            variables, modality, stream, train=False, rng=rng, features=features, method='encode'
        )

    return jax.jit(apply)(variables)


# ---- the definition
def f64(tree):
    """The tree with float64 NumPy leaves."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def erf(x):
    """The error function, entry by entry."""
    return np.vectorize(math.erf)(x)


def gelu(x):
    """The exact GELU, not its approximation by tanh."""
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer_norm(params, x, rms=False):
    """Layer norm, or T5's RMS norm: no mean is taken off and no bias added."""
    if not rms:
        x = x - x.mean(-1, keepdims=True)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * params['scale']
    if rms:
        return normed
    return normed + params['bias']


def softmax(logits):
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def project_heads(params, x):
    """x [N D] -> [heads N K], by a kernel [D heads K] and, where there is one, a bias."""
    projected = np.einsum('nd,dhk->hnk', x, params['kernel'])
    if 'bias' in params:
        projected = projected + params['bias'][:, None]
    return projected


def self_attention(layer, x, mask=None, scaled=True, bias=0.0):
    """Attention of x [N D] of one example to itself; mask [N]: the keys to attend to."""
    query = project_heads(layer['query'], x)
    key = project_heads(layer['key'], x)
    value = project_heads(layer['value'], x)
    logits = np.einsum('hqk,hnk->hqn', query, key)
    if scaled:
        logits = logits / np.sqrt(query.shape[-1])
    logits = logits + bias
    if mask is not None:
        logits = np.where(mask[None, None], logits, -1e9)
    out = np.einsum('hqn,hnk,hkd->qd', softmax(logits), value, layer['out']['kernel'])
    return out + layer['out'].get('bias', 0)


def feed_forward(layer, x):
    """Two products with a GELU between."""
    hidden = gelu(x @ layer['mlp_in']['kernel'] + layer['mlp_in'].get('bias', 0))
    return hidden @ layer['mlp_out']['kernel'] + layer['mlp_out'].get('bias', 0)


def layer_of(stacked, index):
    """Parameters of one layer out of those stacked along the first axis."""
    return jax.tree.map(lambda x: x[index], stacked)


def encoder(params, x, mask=None, rms=False, scaled=True, bias=0.0):
    """x [N D] of one example through pre-norm layers and the final norm."""
    stacked = params['layers']
    for index in range(len(stacked['attention_norm']['scale'])):
        layer = layer_of(stacked, index)
        normed = layer_norm(layer['attention_norm'], x, rms)
        x = x + self_attention(layer, normed, mask, scaled, bias)
        x = x + feed_forward(layer, layer_norm(layer['mlp_norm'], x))
    return layer_norm(params['final_norm'], x, rms)


def voxel_token(front, clip, t, h, w):
    """Token of the voxel at (t, h, w): its patch, projected, plus its normalised position."""
    voxel = clip[2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].reshape(-1)
    table = front['positions']
    position = (
        table['temporal_positions'][t]
        + table['vertical_positions'][h]
        + table['horizontal_positions'][w]
    )
    projected = voxel @ front['patch']['kernel'] + front['patch']['bias']
    return projected + layer_norm(table['norm'], position)


def test_video_tower_is_its_definition(reference):
    config, model, variables, batch, rng = reference
    got = encode(model, variables, 'video', batch['video'], rng, features=True)
    params = f64(variables['params'])
    front = params['fronts_video']
    grid = (2, 2, 2)
    width = config.model.towers.video.width
    chex.assert_shape(got.pooled, (B, width))
    chex.assert_shape(got.tokens, (B, math.prod(grid), width))
    chex.assert_type([got.pooled, got.tokens], jnp.float32)

    for b in range(B):
        clip = np.asarray(batch['video']['data'][b], np.float64)
        tokens = [front['agg']]
        for t, h, w in np.ndindex(*grid):
            tokens.append(voxel_token(front, clip, t, h, w))
        out = encoder(params['encoders_video'], np.stack(tokens))
        np.testing.assert_allclose(got.pooled[b], out[0], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(got.tokens[b], out[1:], rtol=2e-4, atol=2e-4)


def bucket(distance):
    """T5's relative bucket (Raffel et al., 2020) of key minus query: 32 buckets, distance 64."""
    behind = 16 if distance > 0 else 0
    distance = abs(distance)
    if distance < 8:
        return behind + distance
    logarithmic = 8 + int(np.log(distance / 8) / np.log(64 / 8) * 8)
    return behind + min(15, logarithmic)


def buckets(length):
    """Buckets [length length] of each query and key, entry by entry."""
    table = np.zeros((length, length), int)
    for query, key in np.ndindex(length, length):
        table[query, key] = bucket(key - query)
    return table


def test_text_tower_is_its_definition(reference):
    config, model, variables, batch, rng = reference
    got = encode(model, variables, 'text', batch['text'], rng)
    params = f64(variables['params'])
    front, tower = params['fronts_text'], params['encoders_text']
    bias = tower['relative_bias'][buckets(7)].transpose(2, 0, 1)
    candidates = config.model.inputs.text.candidates
    chex.assert_shape(got.pooled, (B, candidates, config.model.towers.text.width))
    chex.assert_type(got.pooled, jnp.float32)

    for b, c in np.ndindex(B, candidates):
        ids = batch['text']['data'][b, c]
        words = np.concatenate([front['agg'][None], front['word_table'][ids]])
        x = gelu(words @ front['projection']['kernel'])
        mask = np.concatenate([[True], ids != 0])
        out = encoder(tower, x, mask, rms=True, scaled=False, bias=bias)
        np.testing.assert_allclose(got.pooled[b, c], out[0], rtol=3e-4, atol=3e-4)


def abstract_encoding(model, variables, modality, stream, rng, features):
    """Shapes and dtypes of what a tower gives: nothing is computed."""

    def apply(variables, stream):
        return model.apply(
            variables, modality, stream, train=False, rng=rng, features=features, method='encode'
        )

    return jax.eval_shape(apply, variables, stream)


@pytest.mark.parametrize('features', [False, True])
def test_shapes_and_dtypes_of_every_tower_and_space(reference, features):
    """One row a clip, one a sentence for text; every space has its own width."""
    config, model, variables, batch, rng = reference
    sentences = (B, config.model.inputs.text.candidates)
    leading = {'video': (B,), 'audio': (B,), 'text': sentences}
    tokens = {'video': 8, 'audio': 16, 'text': 6}
    for modality, stream in batch.items():
        out = abstract_encoding(model, variables, modality, stream, rng, features)
        width = config.model.towers[modality].width
        chex.assert_shape(out.pooled, (*leading[modality], width))
        chex.assert_type(out.pooled, jnp.float32)
        if features:
            chex.assert_shape(out.tokens, (*leading[modality], tokens[modality], width))
            chex.assert_type(out.tokens, jnp.float32)
        else:
            assert out.tokens is None

    def forward_pass(variables, batch):
        return model.apply(variables, batch, train=False, rng=rng)

    spaces = jax.eval_shape(forward_pass, variables, batch).spaces
    va, vat = config.model.head.va, config.model.head.vat
    expected = {
        'va': {
            'video': jax.ShapeDtypeStruct((B, va), jnp.float32),
            'audio': jax.ShapeDtypeStruct((B, va), jnp.float32),
        },
        'vat': {
            'video': jax.ShapeDtypeStruct((B, vat), jnp.float32),
            'text': jax.ShapeDtypeStruct((*sentences, vat), jnp.float32),
        },
    }
    chex.assert_trees_all_equal_shapes_and_dtypes(spaces, expected)


def test_buckets_far_away():
    """Beyond the exact ones, at a length where the logarithm matters."""
    np.testing.assert_array_equal(relative_buckets(90, 32, 64), buckets(90))


# ---- equalities
def forward(model, variables, batch, rng, train=True):
    """(a scalar of everything in all spaces, its gradient by the parameters)."""

    def loss(params):
        out, _ = model.apply(
            {**variables, 'params': params}, batch, train=train, rng=rng, mutable=['batch_stats']
        )
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out.spaces))

    return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.fixture(scope='module')
def unrolled(reference):
    """Loss and gradient of the reference, its layers one after the other."""
    _, model, variables, batch, rng = reference
    return forward(model, variables, batch, rng)


@pytest.mark.parametrize(
    'option',
    [
        {'model__scan': True, 'model__remat': 'dots'},
        pytest.param({'model__scan': True}, marks=pytest.mark.slow),
        pytest.param({'model__remat': 'full'}, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_neither_loss_nor_gradient(option, reference, unrolled):
    _, _, variables, batch, rng = reference
    _, model = model_of(**option)
    got = forward(model, variables, batch, rng)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, unrolled)
    chex.assert_tree_all_finite(got)
    chex.assert_trees_all_close(got, unrolled, rtol=2e-3, atol=2e-4)


class AttentionTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attention_implementations_agree(self):
        query, key, value = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4)) for i in range(3))
        mask = jnp.array([[True] * 5, [True, True, False, True, False]])

        def attend(implementation):
            def apply(query, key, value, mask):
                return attention(
                    query, key, value, mask=mask, scale=0.5, implementation=implementation
                )

            return self.variant(apply)(query, key, value, mask)

        dense, xla = attend('dense'), attend('xla')
        chex.assert_shape([dense, xla], query.shape)
        chex.assert_trees_all_close(dense, xla, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('per_example', [False, True])
def test_dropping_before_projection_is_dropping_after(per_example):
    def patches(drop_token):
        return embeddings.Patches(
            (2, 4),
            (4, 4),
            ('temporal', 'vertical'),
            8,
            drop_token=drop_token,
            per_example=per_example,
            position_dropout=0.0,
        )

    data = jax.random.normal(jax.random.key(0), (B, 8, 16, 3))
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = patches(0.0).init(jax.random.key(1), data, rng, True)
    every = patches(0.0).apply(variables, data, rng, True)
    some = patches(0.4).apply(variables, data, rng, True)

    remaining = int(0.6 * 16)
    chex.assert_shape(every.x, (B, 1 + 16, 8))
    chex.assert_shape(some.x, (B, 1 + remaining, 8))
    chex.assert_shape(some.kept, (B, remaining) if per_example else (remaining,))
    chex.assert_type(some.kept, int)

    positions = np.broadcast_to(some.kept, (B, remaining))
    for b in range(B):
        assert len(set(positions[b])) == remaining
        np.testing.assert_allclose(
            some.x[b, 1:], every.x[b, 1:][positions[b]], rtol=1e-5, atol=1e-6
        )
    distinct = {tuple(sorted(row)) for row in positions.tolist()}
    assert (len(distinct) > 1) == per_example


def agnostic(**fields):
    """The tiny config with one encoder for every modality, and its model."""
    config = tiny.config(model__shared=True, **fields)
    config.model.encoder = {
        'layers': 2,
        'width': 32,
        'mlp': 64,
        'heads': 2,
        'head_width': 16,
        'dropout': 0.1,
    }
    config.model.towers.text.vocab = VOCAB
    return config, models.build(config.model, 'float32')


@pytest.fixture(scope='module')
def shared():
    """(config, model, variables, batch, rng) of a modality-agnostic model, for reading."""
    config, model = agnostic()
    batch = inputs(config)
    rng = Rng.create(0, 0, jnp.arange(B))
    return config, model, initial_variables(model, batch, rng), batch, rng


def test_agnostic_shares_one_encoder(shared):
    _, model, variables, batch, rng = shared
    encoders = [name for name in variables['params'] if 'encoder' in name]
    assert encoders == ['shared_encoder']
    value, grads = forward(model, variables, batch, rng)
    chex.assert_tree_all_finite((value, grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, variables['params'])
    for grad in jax.tree.leaves(grads['shared_encoder']['layers']['mlp_in']):
        assert np.abs(grad).sum() > 0


@pytest.mark.parametrize('features', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_packed_pass_is_three_passes(shared, features):
    """Outputs, value and gradients, in training.

    Dropout, DropToken and dropout on probabilities included; padded words, two sentences a clip
    and a second video too.
    """
    _, _, variables, batch, rng = shared
    reversed_video = {**batch['video'], 'data': batch['video']['data'][::-1]}
    batch = {**batch, 'video.second': reversed_video}

    def value_outputs_and_gradient(packed):
        _, model = agnostic(model__packed=packed)
        options = {'train': True, 'rng': rng, 'features': features}

        def total(params):
            bound = {**variables, 'params': params}
            if packed:
                encoded = model.apply(bound, batch=batch, method='encode_all', **options)
            else:
                encoded = {}
                for name, stream in batch.items():
                    encoded[name] = model.apply(
                        bound, name=name, stream=stream, method='encode', **options
                    )
            outputs = [(each.pooled, each.tokens) for each in encoded.values()]
            value = sum(jnp.sin(3 * x).sum() for x in jax.tree.leaves(outputs))
            return value, encoded

        run = jax.jit(jax.value_and_grad(total, has_aux=True))
        (value, encoded), grads = run(variables['params'])
        return value, encoded, grads

    value, encoded, grads = value_outputs_and_gradient(packed=True)
    expected_value, expected_encoded, expected_grads = value_outputs_and_gradient(packed=False)
    chex.assert_trees_all_equal_shapes_and_dtypes(encoded, expected_encoded)
    chex.assert_trees_all_close(encoded, expected_encoded, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    chex.assert_tree_all_finite(grads)
    scale = max(np.abs(grad).max() for grad in jax.tree.leaves(expected_grads))
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-5 * scale)


def test_spline_passes_through_its_knots_and_is_a_cubic_spline_between():
    table = np.random.default_rng(0).normal(size=(6, 3))
    same_size, double = embeddings.spline_matrix(6, 6), embeddings.spline_matrix(6, 12)
    chex.assert_shape([same_size, double], [(6, 6), (12, 6)])
    np.testing.assert_allclose(same_size @ table, table, atol=1e-8)
    fine = double @ table
    np.testing.assert_allclose(fine[::2], table, atol=1e-8)
    # radial cubics plus a line: exact on straight lines, and the natural cubic spline in between
    line = np.arange(6)[:, None] * 2.0 + 1
    np.testing.assert_allclose(double @ line, np.arange(12)[:, None] + 1.0, atol=1e-8)
    scipy = pytest.importorskip('scipy.interpolate')
    natural = scipy.CubicSpline(np.arange(6), table, bc_type='natural')(np.arange(11) / 2)
    np.testing.assert_allclose(fine[:11], natural, atol=1e-6)


class BatchNormTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_batch_norm_counts_valid_rows_only(self):
        x = np.random.default_rng(0).normal(2, 3, (6, 4)).astype(np.float32)
        valid = np.array([1, 1, 0, 1, 0, 1], bool)
        module = layers.BatchNorm()
        variables = module.init(jax.random.key(0), x, valid, True)

        @self.variant
        def train(variables, x, valid):
            return module.apply(variables, x, valid, True, mutable=['batch_stats'])

        y, new = train(variables, x, valid)
        chex.assert_equal_shape([x, y])
        chex.assert_type(y, jnp.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(new['batch_stats'], variables['batch_stats'])
        rows = x[valid].astype(np.float64)
        normed = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        np.testing.assert_allclose(y[valid], normed, rtol=1e-4, atol=1e-5)
        stats = new['batch_stats']
        np.testing.assert_allclose(stats['mean'], 0.1 * rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * rows.var(0), rtol=1e-5)

        # without a valid row nothing moves
        _, unmoved = train(variables, x, np.zeros(6, bool))
        chex.assert_trees_all_equal(unmoved['batch_stats'], variables['batch_stats'])


def test_fac_head_is_its_definition(reference):
    """z_va of video = BN(W₂ ReLU(BN(W₁ x))), z_vat = BN(W₃ ReLU(z_va)); audio, text: one W."""
    _, model, variables, batch, rng = reference

    def apply(variables):
        return model.apply(variables, batch, train=False, rng=rng)

    out = jax.jit(apply)(variables)
    params, stats = f64(variables['params']['head']), f64(variables['batch_stats']['head'])

    def norm(name, x):
        centred = (x - stats[name]['mean']) / np.sqrt(stats[name]['var'] + 1e-5)
        return centred * params[name]['scale'] + params[name]['bias']

    def dense(name, x):
        return x @ params[name]['kernel'] + params[name].get('bias', 0)

    def relu(x):
        return np.maximum(x, 0)

    pooled = {name: f64(encoded.pooled) for name, encoded in out.encoded.items()}
    hidden = relu(norm('video_va_pre_norm', dense('video_hidden', pooled['video'])))
    video_va = norm('video_va_norm', dense('video_va', hidden))
    video_vat = norm('video_vat_norm', dense('video_vat', relu(video_va)))
    expected = {
        'va': {'video': video_va, 'audio': dense('audio_va', pooled['audio'])},
        'vat': {'video': video_vat, 'text': dense('text_vat', pooled['text'])},
    }
    chex.assert_trees_all_equal_shapes(out.spaces, expected)
    chex.assert_type(jax.tree.leaves(out.spaces), jnp.float32)
    chex.assert_trees_all_close(f64(out.spaces), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    'fields, message',
    [
        (
            {'towers__video__patch': (2, 8)},
            r'config.model.towers.video.patch: expected 3 numbers from 1 to \(4, 16, 16\), '
            r'.*\(2, 8\)',
        ),
        (
            {'towers__video__patch': (2, 32, 8)},
            r'expected 3 numbers .* got \(2, 32, 8\)',
        ),
        (
            {'towers__audio__patch': 5000},
            r'config.model.towers.audio.patch: expected 1 numbers from 1 to \(1024,\), .* got 5000',
        ),
        (
            {'towers__video__layers': 0},
            'config.model.towers.video.layers: expected a positive number, got 0',
        ),
        (
            {'towers__video__drop_token': 1.0},
            'config.model.towers.video.drop_token: expected a number of at least 0 and below 1, '
            'got 1',
        ),
        (
            {'towers__audio__drop_token': 0.99},
            'drop_token=0.99 leaves none of 16 tokens',
        ),
        (
            {'towers__text__dropout': -0.1},
            r'config.model.towers.text.dropout: expected .* got -0.1',
        ),
        (
            {'shared': True, 'encoder': {'heads': 0}},
            'config.model.encoder.heads: expected a positive number, got 0',
        ),
    ],
)
def test_sizes_that_make_no_sense_are_sentences(fields, message):
    overrides = {f'model__{name}': value for name, value in fields.items()}
    layers_of_video = overrides.pop('model__towers__video__layers', None)
    config, model = model_of(**overrides)
    if layers_of_video is not None:
        # model_of sets the number of layers itself
        config.model.towers.video.layers = layers_of_video
        model = models.build(config.model, 'float32')
    with pytest.raises(ConfigError, match=message):
        abstract_variables(model, config)


def abstract_variables(model, config):
    """Shapes and dtypes of a model's variables: nothing is computed."""

    def init():
        rng = Rng.create(0, 0, jnp.arange(B))
        return model.init(jax.random.key(0), inputs(config), train=False, rng=rng)

    return jax.eval_shape(init)


def test_a_shared_encoder_has_default_sizes():
    config, model = model_of(model__shared=True)
    params = meta.unbox(abstract_variables(model, config)['params'])
    chex.assert_shape(params['shared_encoder']['final_norm']['scale'], (768,))


def scan_outputs(jaxpr):
    """(shape, dtype) of every output of every scan of a jaxpr, those of inner jaxprs too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan':
            for output in equation.outvars:
                found.add((output.aval.shape, str(output.aval.dtype)))
        for param in equation.params.values():
            closed = param if hasattr(param, 'eqns') else None
            inner = getattr(param, 'jaxpr', closed)
            if inner:
                found |= scan_outputs(inner)
    return found


def test_gradients_of_scanned_kernels_are_stacked_in_the_compute_type(reference):
    """What is no kernel stays float32.

    [layers - 1, …] of float32 would take twice the memory of the largest buffer of a step.
    """
    config, _, variables, batch, rng = reference
    config = config.copy_and_resolve_references()
    config.model.scan, config.model.remat = True, 'full'
    model = models.build(config.model, 'bfloat16')

    traced = jax.make_jaxpr(lambda: forward(model, variables, batch, rng))()
    stacked = scan_outputs(traced.jaxpr)
    mlp_in = variables['params']['encoders_video']['layers']['mlp_in']['kernel']
    kernel = (1, *mlp_in.shape[1:])
    scale = (1, config.model.towers.video.width)
    assert (kernel, 'bfloat16') in stacked
    assert (kernel, 'float32') not in stacked
    assert (scale, 'float32') in stacked
