"""Towers against their definition in NumPy float64, and the equalities that options must keep."""

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
from vatt_jax.models.transformer import relative_buckets
from vatt_jax.rng import Rng

B = 3


def model_of(**overrides):
    config = tiny.config(**overrides)
    config.model.towers.text.vocab = 30
    for tower in config.model.towers.values():
        tower.layers = 2
    return config, models.build(config.model, 'float32')


@pytest.fixture(scope='module')
def reference():
    """(config, model, variables, batch, rng), for reading."""
    config, model = model_of()
    batch = inputs(config)
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = meta.unbox(
        jax.jit(lambda: model.init(jax.random.key(1), batch, train=False, rng=rng))()
    )
    # Initial biases and scales of 0 and 1 would hide their being left out.
    noise = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), variables
    )
    variables['batch_stats'] = jax.tree.map(jnp.abs, variables['batch_stats'])
    return config, model, variables, batch, rng


def encode(model, variables, modality, stream, rng, features=False):
    """One compilation instead of one for each operation."""
    return jax.jit(
        lambda v: model.apply(
            v, modality, stream, train=False, rng=rng, features=features, method='encode'
        )
    )(variables)


def inputs(config):
    noise = np.random.default_rng(2)
    i, ok = config.model.inputs, np.ones(B, bool)
    text = noise.integers(1, 30, (B, i.text.candidates, i.text.words)).astype(np.int32)
    text[0, 0, 3:] = 0
    return {
        'video': {
            'data': noise.normal(size=(B, i.video.frames, i.video.size, i.video.size, 3)).astype(
                np.float32
            ),
            'valid': ok,
        },
        'audio': {'data': noise.normal(size=(B, i.audio.samples)).astype(np.float32), 'valid': ok},
        'text': {'data': text, 'mask': (text != 0).any(-1), 'valid': ok},
    }


# ---- the definition
f64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def erf(x):
    from math import erf as one

    return np.vectorize(one)(x)


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer_norm(p, x, rms=False):
    x = x if rms else x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p['scale']
    return y if rms else y + p['bias']


def encoder(p, x, mask=None, rms=False, scaled=True, bias=0.0):
    """x [N D] of one example."""
    stacked = p['layers']
    for i in range(len(stacked['attention_norm']['scale'])):
        one = jax.tree.map(lambda a, i=i: a[i], stacked)
        y = layer_norm(one['attention_norm'], x, rms)
        lin = lambda name: (
            np.einsum('nd,dhk->hnk', y, one[name]['kernel'])
            + (one[name]['bias'][:, None] if 'bias' in one[name] else 0)
        )  # noqa: B023
        q, k, v = lin('query'), lin('key'), lin('value')
        logits = np.einsum('hqk,hnk->hqn', q, k) / (np.sqrt(q.shape[-1]) if scaled else 1) + bias
        if mask is not None:
            logits = np.where(mask[None, None], logits, -1e9)
        w = np.exp(logits - logits.max(-1, keepdims=True))
        w /= w.sum(-1, keepdims=True)
        x = x + np.einsum('hqn,hnk,hkd->qd', w, v, one['out']['kernel']) + one['out'].get('bias', 0)
        y = layer_norm(one['mlp_norm'], x)
        x = (
            x
            + gelu(y @ one['mlp_in']['kernel'] + one['mlp_in'].get('bias', 0))
            @ one['mlp_out']['kernel']
            + one['mlp_out'].get('bias', 0)
        )
    return layer_norm(p['final_norm'], x, rms)


def test_video_tower_is_its_definition(reference):
    config, model, variables, batch, rng = reference
    got = encode(model, variables, 'video', batch['video'], rng, features=True)
    p = f64(variables['params'])
    front = p['fronts_video']
    t, h, w = 2, 2, 2
    for b in range(B):
        x = np.asarray(batch['video']['data'][b], np.float64)
        tokens = []
        for i in range(t):
            for j in range(h):
                for k in range(w):
                    voxel = x[2 * i : 2 * i + 2, 8 * j : 8 * j + 8, 8 * k : 8 * k + 8].reshape(-1)
                    table = front['positions']
                    place = (
                        table['temporal_positions'][i]
                        + table['vertical_positions'][j]
                        + table['horizontal_positions'][k]
                    )
                    tokens.append(
                        voxel @ front['patch']['kernel']
                        + front['patch']['bias']
                        + layer_norm(table['norm'], place)
                    )
        out = encoder(p['encoders_video'], np.stack([front['agg'], *tokens]))
        np.testing.assert_allclose(got.pooled[b], out[0], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(got.tokens[b], out[1:], rtol=2e-4, atol=2e-4)


def buckets(n):
    """T5's relative buckets (Raffel et al., 2020), 32 buckets, distance 64, entry by entry."""
    out = np.zeros((n, n), int)
    for q in range(n):
        for k in range(n):
            d = k - q
            b = 16 if d > 0 else 0
            a = abs(d)
            out[q, k] = b + (a if a < 8 else min(15, 8 + int(np.log(a / 8) / np.log(64 / 8) * 8)))
    return out


def test_text_tower_is_its_definition(reference):
    config, model, variables, batch, rng = reference
    got = encode(model, variables, 'text', batch['text'], rng)
    p = f64(variables['params'])
    front, tower = p['fronts_text'], p['encoders_text']
    bias = tower['relative_bias'][buckets(7)].transpose(2, 0, 1)
    for b in range(B):
        for c in range(2):
            ids = batch['text']['data'][b, c]
            x = gelu(
                np.concatenate([front['agg'][None], front['word_table'][ids]])
                @ front['projection']['kernel']
            )
            out = encoder(
                tower, x, np.concatenate([[True], ids != 0]), rms=True, scaled=False, bias=bias
            )
            np.testing.assert_allclose(got.pooled[b, c], out[0], rtol=3e-4, atol=3e-4)


def test_buckets_far_away():
    """Beyond the exact ones, at a length where the logarithm matters."""
    np.testing.assert_array_equal(relative_buckets(90, 32, 64), buckets(90))


# ---- equalities
def forward(model, variables, batch, rng, train=True):
    def loss(params):
        out, _ = model.apply(
            {**variables, 'params': params}, batch, train=train, rng=rng, mutable=['batch_stats']
        )
        return sum(jnp.sum(jnp.sin(x)) for s in out.spaces.values() for x in s.values())

    return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.fixture(scope='module')
def unrolled(reference):
    _, model, variables, batch, rng = reference
    return forward(model, variables, batch, rng)


@pytest.mark.parametrize(
    'option',
    [
        {'model__scan': True},
        {'model__remat': 'full'},
        {'model__scan': True, 'model__remat': 'dots'},
    ],
)
def test_scan_and_remat_change_neither_loss_nor_gradient(option, reference, unrolled):
    _, _, variables, batch, rng = reference
    got = forward(model_of(**option)[1], variables, batch, rng)
    chex.assert_trees_all_close(got, unrolled, rtol=2e-3, atol=2e-4)


def test_attention_implementations_agree():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, 3, 4)) for i in range(3))
    mask = jnp.array([[True] * 5, [True, True, False, True, False]])
    from vatt_jax.models.attention import attention

    a, b = (attention(q, k, v, mask=mask, scale=0.5, implementation=i) for i in ('dense', 'xla'))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('per_example', [False, True])
def test_dropping_before_projection_is_dropping_after(per_example):
    make = lambda rate: embeddings.Patches(
        (2, 4),
        (4, 4),
        ('temporal', 'vertical'),
        8,
        drop_token=rate,
        per_example=per_example,
        position_dropout=0.0,
    )
    data = jax.random.normal(jax.random.key(0), (B, 8, 16, 3))
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = make(0.0).init(jax.random.key(1), data, rng, True)
    every, some = (
        make(0.0).apply(variables, data, rng, True),
        make(0.4).apply(variables, data, rng, True),
    )
    assert some.kept.shape[-1] == int(0.6 * 16) and some.x.shape[1] == 1 + some.kept.shape[-1]
    kept = np.broadcast_to(some.kept, (B, some.kept.shape[-1]))
    for b in range(B):
        assert len(set(kept[b])) == len(kept[b])
        np.testing.assert_allclose(some.x[b, 1:], every.x[b, 1:][kept[b]], rtol=1e-5, atol=1e-6)
    assert (len({tuple(sorted(row)) for row in kept.tolist()}) > 1) == per_example


def agnostic(**fields):
    config = tiny.config(model__shared=True, **fields)
    config.model.encoder = {
        'layers': 2,
        'width': 32,
        'mlp': 64,
        'heads': 2,
        'head_width': 16,
        'dropout': 0.1,
    }
    config.model.towers.text.vocab = 30
    return config, models.build(config.model, 'float32')


@pytest.fixture(scope='module')
def shared():
    """(config, model, variables, batch, rng) of a modality-agnostic model, for reading."""
    config, model = agnostic()
    batch, rng = inputs(config), Rng.create(0, 0, jnp.arange(B))
    return (
        config,
        model,
        meta.unbox(jax.jit(lambda: model.init(jax.random.key(1), batch, train=False, rng=rng))()),
        batch,
        rng,
    )


def test_agnostic_shares_one_encoder(shared):
    _, model, variables, batch, rng = shared
    assert [k for k in variables['params'] if 'encoder' in k] == ['shared_encoder']
    value, grads = forward(model, variables, batch, rng)
    assert np.isfinite(value) and all(
        np.abs(g).sum() > 0 for g in jax.tree.leaves(grads['shared_encoder']['layers']['mlp_in'])
    )


@pytest.mark.parametrize('features', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_packed_pass_is_three_passes(shared, features):
    """Dropout, DropToken and dropout on probabilities included, value and gradients; padded words, two sentences a clip and a second video too."""
    _, _, variables, batch, rng = shared
    batch = {**batch, 'video.second': {**batch['video'], 'data': batch['video']['data'][::-1]}}

    def of(packed):
        model = agnostic(model__packed=packed)[1]

        def total(params):
            apply = lambda how, **k: model.apply(
                {**variables, 'params': params},
                **k,
                train=True,
                rng=rng,
                features=features,
                method=how,
            )
            out = (
                apply('encode_all', batch=batch)
                if packed
                else {n: apply('encode', name=n, stream=s) for n, s in batch.items()}
            )
            return sum(
                jnp.sin(3 * x).sum()
                for e in out.values()
                for x in (e.pooled, e.tokens)
                if x is not None
            ), out

        return jax.jit(jax.value_and_grad(total, has_aux=True))(variables['params'])

    (value, got), grads = of(True)
    (want_value, want), want_grads = of(False)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(want_grads))
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-4, atol=1e-5 * scale)


def test_spline_passes_through_its_knots_and_is_a_cubic_spline_between():
    table = np.random.default_rng(0).normal(size=(6, 3))
    np.testing.assert_allclose(embeddings.spline_matrix(6, 6) @ table, table, atol=1e-8)
    fine = embeddings.spline_matrix(6, 12) @ table
    np.testing.assert_allclose(fine[::2], table, atol=1e-8)
    # radial cubics plus a line: exact on straight lines, and the natural cubic spline in between
    line = np.arange(6)[:, None] * 2.0 + 1
    np.testing.assert_allclose(
        embeddings.spline_matrix(6, 12) @ line, np.arange(12)[:, None] + 1.0, atol=1e-8
    )
    scipy = pytest.importorskip('scipy.interpolate')
    natural = scipy.CubicSpline(np.arange(6), table, bc_type='natural')(np.arange(11) / 2)
    np.testing.assert_allclose(fine[:11], natural, atol=1e-6)


def test_batch_norm_counts_valid_rows_only():
    x = np.random.default_rng(0).normal(2, 3, (6, 4)).astype(np.float32)
    valid = np.array([1, 1, 0, 1, 0, 1], bool)
    module = layers.BatchNorm()
    variables = module.init(jax.random.key(0), x, valid, True)
    y, new = module.apply(variables, x, valid, True, mutable=['batch_stats'])
    real = x[valid].astype(np.float64)
    np.testing.assert_allclose(
        y[valid], (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-5), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(new['batch_stats']['mean'], 0.1 * real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new['batch_stats']['var'], 0.9 + 0.1 * real.var(0), rtol=1e-5)
    _, kept = module.apply(variables, x, np.zeros(6, bool), True, mutable=['batch_stats'])
    np.testing.assert_array_equal(kept['batch_stats']['var'], variables['batch_stats']['var'])


def test_fac_head_is_its_definition(reference):
    config, model, variables, batch, rng = reference
    out = jax.jit(lambda v: model.apply(v, batch, train=False, rng=rng))(variables)
    p, s = f64(variables['params']['head']), f64(variables['batch_stats']['head'])
    bn = lambda n, x: (
        (x - s[n]['mean']) / np.sqrt(s[n]['var'] + 1e-5) * p[n]['scale'] + p[n]['bias']
    )
    dense = lambda n, x: x @ p[n]['kernel'] + p[n].get('bias', 0)
    pooled = {k: np.asarray(e.pooled, np.float64) for k, e in out.encoded.items()}
    va = bn(
        'video_va_norm',
        dense(
            'video_va',
            np.maximum(bn('video_va_pre_norm', dense('video_hidden', pooled['video'])), 0),
        ),
    )
    vat = bn('video_vat_norm', dense('video_vat', np.maximum(va, 0)))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
    close(out.spaces['va']['video'], va)
    close(out.spaces['vat']['video'], vat)
    close(out.spaces['va']['audio'], dense('audio_va', pooled['audio']))
    close(out.spaces['vat']['text'], dense('text_vat', pooled['text']))


@pytest.mark.parametrize(
    'fields, told',
    [
        (
            {'towers__video__patch': (2, 8)},
            r'config.model.towers.video.patch: expected 3 numbers from 1 to \(4, 16, 16\), .*\(2, 8\)',
        ),
        ({'towers__video__patch': (2, 32, 8)}, r'expected 3 numbers .* got \(2, 32, 8\)'),
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
            'config.model.towers.video.drop_token: expected a number of at least 0 and below 1, got 1',
        ),
        ({'towers__audio__drop_token': 0.99}, 'drop_token=0.99 leaves none of 16 tokens'),
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
def test_sizes_that_make_no_sense_are_sentences(fields, told):
    config, model = model_of(
        **{f'model__{k}': v for k, v in fields.items() if k != 'towers__video__layers'}
    )
    if 'towers__video__layers' in fields:
        config.model.towers.video.layers = 0
        model = models.build(config.model, 'float32')
    with pytest.raises(ConfigError, match=told):
        jax.eval_shape(
            lambda: model.init(
                jax.random.key(0), inputs(config), train=False, rng=Rng.create(0, 0, jnp.arange(B))
            )
        )


def test_a_shared_encoder_has_default_sizes():
    config, _ = model_of(model__shared=True)
    params = jax.eval_shape(
        lambda: models.build(config.model, 'float32').init(
            jax.random.key(0), inputs(config), train=False, rng=Rng.create(0, 0, jnp.arange(B))
        )
    )['params']
    assert meta.unbox(params)['shared_encoder']['final_norm']['scale'].shape == (768,)


def test_gradients_of_scanned_kernels_are_stacked_in_the_compute_type(reference):
    """[layers - 1, …] of float32 would take twice the memory of the largest buffer of a step; what is no kernel stays float32."""
    config, _, variables, batch, rng = reference
    config = config.copy_and_resolve_references()
    config.model.scan, config.model.remat = True, 'full'
    model = models.build(config.model, 'bfloat16')

    stacked = set()

    def walk(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == 'scan':
                stacked.update((v.aval.shape, str(v.aval.dtype)) for v in e.outvars)
            for p in e.params.values():
                if inner := getattr(p, 'jaxpr', p if hasattr(p, 'eqns') else None):
                    walk(inner)

    walk(jax.make_jaxpr(lambda: forward(model, variables, batch, rng))().jaxpr)
    kernel, scale = (
        (1, *variables['params']['encoders_video']['layers']['mlp_in']['kernel'].shape[1:]),
        (1, config.model.towers.video.width),
    )
    assert (
        (kernel, 'bfloat16') in stacked
        and (kernel, 'float32') not in stacked
        and (scale, 'float32') in stacked
    )
