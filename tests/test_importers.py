"""Official VATT checkpoints: files in exactly their layout, written with TensorFlow, against an independent NumPy forward pass on them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import vatt_jax
from tests import tiny
from tests.test_vatt_definitions import joint_denominator
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map, vatt_tf
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import checkpoint

R = 'model/layer_with_weights-0'
D, F, HEADS, KV = 12, 20, 2, 64  # width, mlp; official heads are 64 wide
WORDS, EMBED = 30, 10
VA, VAT, POST = 14, 6, 18


# ---- the official layout, name by name and shape by shape
def norm(key, width):
    return {f'{key}/gamma': (width,), f'{key}/beta': (width,)}


def dense(key, i, o, bias=True):
    return {f'{key}/kernel': (i, o), **({f'{key}/bias': (o,)} if bias else {})}


def stack(key, layers, bias=True):
    out = norm(f'{key}/final_layer_norm', D)
    for i in range(layers):
        here = f'{key}/layers/{i}'
        out |= norm(f'{here}/layer_norm', D) | norm(f'{here}/feed_forward/layer_norm', D)
        for n in 'qkv':
            out |= dense(f'{here}/mha/{n}', D, HEADS * KV, bias)
        out |= dense(f'{here}/mha/o', HEADS * KV, D, bias)
        out |= dense(f'{here}/feed_forward/mlp/wi', D, F, bias) | dense(
            f'{here}/feed_forward/mlp/wo', F, D, bias
        )
    return out


def positions(key, **sizes):
    return {
        f'{key}/{axis}_position_embeddings/embeddings': (n, D) for axis, n in sizes.items()
    } | norm(f'{key}/layernorm', D)


def vit(key, projected=False):
    out = {
        f'{key}/voxel_to_patch/kernel': (2, 8, 8, 3, D),
        f'{key}/voxel_to_patch/bias': (D,),
        f'{key}/agg_embedding': (D,),
    }
    out |= positions(f'{key}/pos_embedding_lookup', temporal=2, vertical=2, horizontal=2) | stack(
        f'{key}/tx', 2
    )
    return out | (
        dense(f'{key}/pre_proj', D, D) | dense(f'{key}/post_proj', D, POST) if projected else {}
    )


def wat(key):
    out = {
        f'{key}/wave_to_patch/kernel': (64, 1, D),
        f'{key}/wave_to_patch/bias': (D,),
        f'{key}/agg_embedding': (D,),
    }
    return out | positions(f'{key}/pos_embedding_lookup', temporal=16) | stack(f'{key}/tx', 1)


def spt(key):
    out = {
        f'{key}/spectrum_to_patch/kernel': (2, 4, 1, D),
        f'{key}/spectrum_to_patch/bias': (D,),
        f'{key}/agg_embedding': (D,),
    }
    return (
        out
        | positions(f'{key}/pos_embedding_lookup', temporal=3, spectoral=2)
        | stack(f'{key}/tx', 1, bias=False)
    )


def t5(key):
    lm = f'{key}/base_lm'
    out = {
        f'{key}/embedding/embeddings': (WORDS, EMBED),
        f'{key}/agg_embedding': (EMBED,),
        f'{key}/pre_proj/kernel': (EMBED, D),
        f'{lm}/layers/0/self_attention/attention/relative_attention_bias/embeddings': (32, HEADS),
        f'{lm}/final_layer_norm/weight': (D,),
    }
    for i in range(2):
        here = f'{lm}/layers/{i}'
        out |= {f'{here}/self_attention/layer_norm/weight': (D,)} | norm(
            f'{here}/feed_forward/layer_norm', D
        )
        for n in 'qkv':
            out |= dense(f'{here}/self_attention/attention/{n}', D, HEADS * KV, False)
        out |= dense(f'{here}/self_attention/attention/o', HEADS * KV, D, False)
        out |= dense(f'{here}/feed_forward/mlp/wi', D, F, False) | dense(
            f'{here}/feed_forward/mlp/wo', F, D, False
        )
    return out


def bert(key, small=False):
    """small: `bert_small`, a further token in word space and no final norm."""
    lm = f'{key}/base_lm'
    out = {
        f'{key}/embedding/embeddings': (WORDS, EMBED),
        f'{key}/pre_proj/kernel': (EMBED, D),
        f'{lm}/agg_embedding': (D,),
    }
    out |= positions(f'{lm}/pos_embedding_lookup', temporal=6) | stack(f'{lm}/tx', 2)
    return (
        {k: v for k, v in out.items() if 'final_layer_norm' not in k}
        | {f'{key}/agg_embedding': (EMBED,)}
        if small
        else out
    )


def linear_text(key):
    return {
        f'{key}/embedding/embeddings': (WORDS, EMBED),
        f'{key}/base_lm/conv1d/kernel': (1, EMBED, D),
        f'{key}/base_lm/conv1d/bias': (D,),
    }


TEXTS = {'bert_base': bert, 'bert_small': lambda key: bert(key, True), 'linear': linear_text}


def head(video, audio, text):
    h = f'{R}/_head_layer/_bridge_heads/0'
    bn = lambda key, n: norm(key, n) | {f'{key}/moving_mean': (n,), f'{key}/moving_variance': (n,)}
    return (
        dense(f'{h}/vid_to_hid', video, VA, False)
        | bn(f'{h}/hid_to_va/pre_bn', VA)
        | dense(f'{h}/hid_to_va/dense', VA, VA, False)
        | bn(f'{h}/hid_to_va/bn', VA)
        | dense(f'{h}/va_to_vat/dense', VA, VAT, False)
        | bn(f'{h}/va_to_vat/bn', VAT)
        | dense(f'{h}/aud_to_va', audio, VA)
        | dense(f'{h}/txt_to_vat', text, VAT)
    )


def tx_fac(text=t5):
    b = f'{R}/_base_layer'
    return (
        vit(f'{b}/vid_backbone/_base')
        | wat(f'{b}/aud_backbone/_base')
        | text(f'{b}/txt_backbone')
        | head(D, D, D)
    )


def ut_fac():
    u = f'{R}/_base_layer/unified_backbone/unified_transformer'
    out = {
        f'{u}/raw_to_embeddings/video/kernel': (2, 8, 8, 3, D),
        f'{u}/raw_to_embeddings/video/bias': (D,),
        f'{u}/raw_to_embeddings/audio/kernel': (64, 1, D),
        f'{u}/raw_to_embeddings/audio/bias': (D,),
        f'{u}/raw_to_embeddings/text/embeddings': (WORDS, EMBED),
    }
    for m, i in (('video', D), ('audio', D), ('text', EMBED)):
        out |= dense(f'{u}/pre_proj/{m}', i, D) | dense(f'{u}/post_proj/{m}', D, POST)
    p = f'{u}/pos_embedding_lookup'
    out |= (
        positions(f'{p}/video', temporal=2, vertical=2, horizontal=2)
        | positions(f'{p}/audio', temporal=16)
        | positions(f'{p}/text', temporal=6)
    )
    out |= {f'{u}/{m}_agg_embedding': (D,) for m in ('vid', 'aud', 'txt')}
    return out | stack(f'{u}/tx', 2) | head(POST, POST, POST)


def finetuned(tower, width=D, classes=5):
    return tower | dense(f'{R}/_ops/cls', width, classes)


def written(path, shapes, seed=0, slots=True):
    """Random values under these names, as float64 {name: array}; the file also holds what an optimizer leaves there."""
    noise = np.random.default_rng(seed)
    values = {
        k: (
            np.abs(noise.normal(size=s)) + 0.5
            if k.endswith('moving_variance')
            else 0.3 * noise.normal(size=s)
        ).astype(np.float32)
        for k, s in shapes.items()
    }
    values = {k: v + 1 if k.endswith(('gamma', 'weight')) else v for k, v in values.items()}
    extra = {'optimizer/iter': np.int64(7), 'save_counter': np.int64(1)} if slots else {}
    extra |= (
        {f'{k}/.OPTIMIZER_SLOT/optimizer/m': v for k, v in list(values.items())[:2]}
        if slots
        else {}
    )
    import tensorflow as tf

    every = values | extra
    names = [f'{k}/.ATTRIBUTES/VARIABLE_VALUE' for k in every]
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=names,
        shape_and_slices=[''] * len(names),
        tensors=[tf.constant(v) for v in every.values()],
    )
    return {k: v.astype(np.float64) for k, v in values.items()}


# ---- the forward pass, from the fact sheet, on official names
def erf(x):
    from math import erf as one

    return np.vectorize(one)(x)


gelu = lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer_norm(w, key, x):
    x = x - x.mean(-1, keepdims=True)
    return (
        x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f'{key}/gamma'] + w[f'{key}/beta']
    )


def rms_norm(w, key, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f'{key}/weight']


def linear(w, key, x):
    return x @ w[f'{key}/kernel'] + w.get(f'{key}/bias', 0)


def heads(x):
    return x.reshape(len(x), HEADS, KV).transpose(1, 0, 2)


def mix(q, k, v, bias, scale):
    s = q @ k.transpose(0, 2, 1) * scale + bias
    p = np.exp(s - s.max(-1, keepdims=True))
    return ((p / p.sum(-1, keepdims=True)) @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def tx(w, key, x, mask=None, post_norm=False):
    bias = 0.0 if mask is None else np.where(mask, 0, -1e9)[None, None]
    i = 0
    while f'{key}/layers/{i}/layer_norm/gamma' in w:
        here = f'{key}/layers/{i}'
        before, after = (lambda n, x: layer_norm(w, f'{here}/{n}', x), lambda n, x: x)[
            :: -1 if post_norm else 1
        ]  # noqa: B023
        y = before('layer_norm', x)
        q, k, v = (heads(linear(w, f'{here}/mha/{n}', y)) for n in 'qkv')
        x = after('layer_norm', x + linear(w, f'{here}/mha/o', mix(q, k, v, bias, KV**-0.5)))
        y = before('feed_forward/layer_norm', x)
        x = after(
            'feed_forward/layer_norm',
            x
            + linear(
                w, f'{here}/feed_forward/mlp/wo', gelu(linear(w, f'{here}/feed_forward/mlp/wi', y))
            ),
        )
        i += 1
    return x if post_norm else layer_norm(w, f'{key}/final_layer_norm', x)


def place(w, key, ids):
    """ids: {axis: row numbers [N]}."""
    total = sum(
        w[f'{key}/{axis}_position_embeddings/embeddings'][rows] for axis, rows in ids.items()
    )
    return layer_norm(w, f'{key}/layernorm', total)


def video_tokens(w, key, x):
    kernel = w[f'{key}/kernel']
    t, h, h2 = kernel.shape[:3]
    grid = np.stack(
        np.meshgrid(*(np.arange(n // p) for n, p in zip(x.shape[:3], kernel.shape)), indexing='ij'),
        -1,
    ).reshape(-1, 3)
    patches = [x[t * a : t * a + t, h * b : h * b + h, h2 * c : h2 * c + h2] for a, b, c in grid]
    tokens = np.stack([np.tensordot(p, kernel, 4) for p in patches]) + w[f'{key}/bias']
    return tokens, dict(zip(('temporal', 'vertical', 'horizontal'), grid.T))


def audio_tokens(w, key, x):
    kernel = w[f'{key}/kernel'][:, 0]
    x = x[: len(x) // len(kernel) * len(kernel)].reshape(-1, len(kernel))
    return x @ kernel + w[f'{key}/bias'], {'temporal': np.arange(len(x))}


def spectrum_tokens(w, key, x):
    kernel = w[f'{key}/kernel'][:, :, 0]
    t, s = (n // k for n, k in zip(x.shape, kernel.shape))
    a, b = kernel.shape[:2]
    tokens = [
        np.tensordot(x[a * i : a * i + a, b * j : b * j + b], kernel, 2)
        for i in range(t)
        for j in range(s)
    ]
    n = np.arange(t * s)
    return np.stack(tokens) + w[f'{key}/bias'], {'temporal': n % t, 'spectoral': n // t}


def own_tower(w, key, tokens, ids):
    if f'{key}/pre_proj/kernel' in w:
        tokens = gelu(linear(w, f'{key}/pre_proj', tokens))
    x = np.concatenate(
        [w[f'{key}/agg_embedding'][None], tokens + place(w, f'{key}/pos_embedding_lookup', ids)]
    )
    x = tx(w, f'{key}/tx', x)
    return gelu(linear(w, f'{key}/post_proj', x)) if f'{key}/post_proj/kernel' in w else x


def bucket(d):
    a = abs(d)
    return (16 if d > 0 else 0) + (
        a if a < 8 else min(15, 8 + int(np.log(a / 8) / np.log(64 / 8) * 8))
    )


def text_tower(w, key, ids):
    x = np.concatenate([w[f'{key}/agg_embedding'][None], w[f'{key}/embedding/embeddings'][ids]])
    x = gelu(linear(w, f'{key}/pre_proj', x))
    lm, n = f'{key}/base_lm', len(x)
    table = w[f'{lm}/layers/0/self_attention/attention/relative_attention_bias/embeddings']
    bias = np.array([[table[bucket(k - q)] for k in range(n)] for q in range(n)]).transpose(2, 0, 1)
    bias = bias + np.where(np.concatenate([[True], ids != 0]), 0, -1e9)
    for i in range(2):
        here = f'{lm}/layers/{i}'
        y = rms_norm(w, f'{here}/self_attention/layer_norm', x)
        q, k, v = (heads(linear(w, f'{here}/self_attention/attention/{m}', y)) for m in 'qkv')
        x = x + linear(w, f'{here}/self_attention/attention/o', mix(q, k, v, bias, 1.0))
        y = layer_norm(w, f'{here}/feed_forward/layer_norm', x)
        x = x + linear(
            w, f'{here}/feed_forward/mlp/wo', gelu(linear(w, f'{here}/feed_forward/mlp/wi', y))
        )
    return rms_norm(w, f'{lm}/final_layer_norm', x)


def bert_tower(w, key, ids):
    """Positions, then the token; `bert_small` has one more word in front of the words, whose table has a row too few."""
    x, mask, lm = w[f'{key}/embedding/embeddings'][ids], ids != 0, f'{key}/base_lm'
    small = f'{key}/agg_embedding' in w
    if small:
        x, mask = (
            np.concatenate([w[f'{key}/agg_embedding'][None], x]),
            np.concatenate([[True], mask]),
        )
        scipy = pytest.importorskip('scipy.interpolate')
        table = f'{lm}/pos_embedding_lookup/temporal_position_embeddings/embeddings'
        fit = scipy.RBFInterpolator(np.arange(6)[:, None] / 6, w[table], kernel='cubic', degree=1)
        w = {**w, table: fit(np.arange(7)[:, None] / 7)}
    x = gelu(linear(w, f'{key}/pre_proj', x)) + place(
        w, f'{lm}/pos_embedding_lookup', {'temporal': np.arange(len(x))}
    )
    return tx(
        w,
        f'{lm}/tx',
        np.concatenate([w[f'{lm}/agg_embedding'][None], x]),
        np.concatenate([[True], mask]),
        post_norm=small,
    )[0]


def linear_tower(w, key, ids):
    words = (
        w[f'{key}/embedding/embeddings'][ids] @ w[f'{key}/base_lm/conv1d/kernel'][0]
        + w[f'{key}/base_lm/conv1d/bias']
    )
    return np.maximum(words, 0).max(0)


def unified(w, m, data, mask=None):
    u = f'{R}/_base_layer/unified_backbone/unified_transformer'
    if m == 'text':
        tokens, ids = (
            w[f'{u}/raw_to_embeddings/text/embeddings'][data],
            {'temporal': np.arange(len(data))},
        )
        mask = np.concatenate([[True], data != 0])
    else:
        tokens, ids = {'video': video_tokens, 'audio': audio_tokens}[m](
            w, f'{u}/raw_to_embeddings/{m}', data
        )
    x = gelu(linear(w, f'{u}/pre_proj/{m}', tokens)) + place(
        w, f'{u}/pos_embedding_lookup/{m}', ids
    )
    agg = w[f'{u}/{ {"video": "vid", "audio": "aud", "text": "txt"}[m] }_agg_embedding']
    x = tx(w, f'{u}/tx', np.concatenate([agg[None], x]), mask)
    return gelu(linear(w, f'{u}/post_proj/{m}', x))


def spaces(w, video, audio, text):
    h = f'{R}/_head_layer/_bridge_heads/0'
    bn = lambda key, x: (
        (x - w[f'{key}/moving_mean'])
        / np.sqrt(w[f'{key}/moving_variance'] + 1e-5)
        * w[f'{key}/gamma']
        + w[f'{key}/beta']
    )
    hidden = np.maximum(bn(f'{h}/hid_to_va/pre_bn', linear(w, f'{h}/vid_to_hid', video)), 0)
    va = bn(f'{h}/hid_to_va/bn', linear(w, f'{h}/hid_to_va/dense', hidden))
    vat = bn(f'{h}/va_to_vat/bn', linear(w, f'{h}/va_to_vat/dense', np.maximum(va, 0)))
    return {
        ('va', 'video'): va,
        ('vat', 'video'): vat,
        ('va', 'audio'): linear(w, f'{h}/aud_to_va', audio),
        ('vat', 'text'): linear(w, f'{h}/txt_to_vat', text),
    }


# ---- configs and inputs
def config(**changes):
    c = tiny.config(**changes)
    size = {'width': D, 'mlp': F, 'heads': HEADS, 'head_width': KV}
    c.model.towers = {
        'video': {'name': 'vit', **size, 'layers': 2, 'patch': (2, 8, 8)},
        'audio': {'name': 'wat', **size, 'layers': 1, 'patch': 64},
        'text': {'name': 't5', **size, 'layers': 2, 'vocab': WORDS, 'word_width': EMBED},
    }
    c.model.head = {'name': 'fac', 'va': VA, 'vat': VAT}
    return c


def put(c, values):
    """c with fields set by dotted names, __ for the dots."""
    for name, value in values.items():
        node = c
        *parents, last = name.split('__')
        for p in parents:
            node = node[p]
        node[last] = value
    return c


def shared_config():
    c = config(model__shared=True)
    c.model.encoder = {'layers': 2, 'width': D, 'mlp': F, 'heads': HEADS, 'head_width': KV}
    c.model.towers = {
        'video': {'name': 'vit', 'patch': (2, 8, 8), 'post': POST},
        'audio': {'name': 'wat', 'patch': 64, 'post': POST},
        'text': {'name': 't5', 'vocab': WORDS, 'word_width': EMBED, 'post': POST},
    }
    return c


def inputs():
    noise = np.random.default_rng(3)
    text = noise.integers(1, WORDS, (2, 2, 6)).astype(np.int32)
    text[0, 0, 3:], text[1, 1] = 0, 0
    ok = np.ones(2, bool)
    return {
        'video': {'data': noise.normal(size=(2, 4, 16, 16, 3)).astype(np.float32), 'valid': ok},
        'audio': {'data': noise.normal(size=(2, 1024)).astype(np.float32), 'valid': ok},
        'text': {'data': text, 'valid': ok},
    }


def ours(run, batch):
    c, variables, _ = checkpoint.load_model(
        run, sharding.make_mesh({'replica': 1, 'fsdp': 1, 'model': 1, 'seq': 1})
    )
    model = models.build(c.model)
    forward = jax.jit(
        lambda v, b: model.apply(
            v, b, train=False, rng=Rng.create(0, 0, jnp.zeros(2)), features=True
        )
    )
    return forward(variables, batch)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- tests
def test_tx_fac_is_read_and_computes_what_the_official_weights_compute(tmp_path):
    w = written(tmp_path / 'ckpt-7', tx_fac())
    c, report = vatt_tf.import_checkpoint(str(tmp_path / 'ckpt-7'), tmp_path / 'run', config())
    assert (report.read, report.resized, report.unused, report.bookkeeping) == (len(w), [], [], 4)
    batch = inputs()
    out = ours(tmp_path / 'run', batch)
    b = f'{R}/_base_layer'
    pooled = {m: [] for m in ('video', 'audio', 'text')}
    for i in range(2):
        x = own_tower(
            w,
            f'{b}/vid_backbone/_base',
            *video_tokens(w, f'{b}/vid_backbone/_base/voxel_to_patch', batch['video']['data'][i]),
        )
        close(out.encoded['video'].tokens[i], x[1:])
        pooled['video'].append(x[0])
        x = own_tower(
            w,
            f'{b}/aud_backbone/_base',
            *audio_tokens(w, f'{b}/aud_backbone/_base/wave_to_patch', batch['audio']['data'][i]),
        )
        close(out.encoded['audio'].tokens[i], x[1:])
        pooled['audio'].append(x[0])
        pooled['text'].append(
            [text_tower(w, f'{b}/txt_backbone', ids)[0] for ids in batch['text']['data'][i]]
        )
    pooled = {k: np.array(v) for k, v in pooled.items()}
    for m, x in pooled.items():
        close(out.encoded[m].pooled, x)
    for (space, m), x in spaces(w, **pooled).items():
        close(out.spaces[space][m], x)


def test_ut_fac_is_read_with_sizes_told_by_the_file(tmp_path):
    w = written(tmp_path / 'ckpt-1', ut_fac())
    base = tiny.config()
    c, report = vatt_tf.import_checkpoint(str(tmp_path / 'ckpt-1'), tmp_path / 'run', None, base)
    assert (
        report.read == len(w)
        and c.model.shared
        and c.model.encoder.to_dict()
        == {'layers': 2, 'width': D, 'mlp': F, 'heads': HEADS, 'head_width': KV}
    )
    batch = inputs()
    out = ours(tmp_path / 'run', batch)
    pooled = {}
    for m in ('video', 'audio'):
        x = [unified(w, m, batch[m]['data'][i]) for i in range(2)]
        close(out.encoded[m].tokens, np.stack(x)[:, 1:])
        pooled[m] = np.stack(x)[:, 0]
    pooled['text'] = np.array(
        [[unified(w, 'text', ids)[0] for ids in clip] for clip in batch['text']['data']]
    )
    close(out.encoded['text'].pooled, pooled['text'])
    for (space, m), x in spaces(w, **pooled).items():
        close(out.spaces[space][m], x)


@pytest.mark.parametrize('name', TEXTS)
def test_other_text_towers_go_in_and_out(tmp_path, name):
    w, key = (
        written(tmp_path / 'a', tx_fac(TEXTS[name]), slots=False),
        f'{R}/_base_layer/txt_backbone',
    )
    c, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert (report.read, report.unused, report.resized) == (
        len(w),
        [],
        [],
    ) and c.model.towers.text.name == name.split('_')[0]
    text = inputs()['text']
    got = ours(tmp_path / 'run', {'text': text})
    want = np.array(
        [
            [(linear_tower if name == 'linear' else bert_tower)(w, key, ids) for ids in clip]
            for clip in text['data']
        ]
    )
    close(got.encoded['text'].pooled, want)
    close(got.spaces['vat']['text'], linear(w, f'{R}/_head_layer/_bridge_heads/0/txt_to_vat', want))
    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(w)
    have, read = vatt_tf.open_checkpoint(str(tmp_path / 'b'))
    assert have == {k: v.shape for k, v in w.items()} and all(
        (read(k) == v.astype(np.float32)).all() for k, v in w.items()
    )


def test_a_final_norm_in_a_file_of_bert_small_is_left_over(tmp_path):
    """Counts of its variables differ by one norm that a post-LN stack does not use."""
    text = f'{R}/_base_layer/txt_backbone'
    final = norm(f'{text}/base_lm/tx/final_layer_norm', D)
    written(tmp_path / 'a', tx_fac(TEXTS['bert_small']) | final)
    c, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert (
        report.unused == sorted(final)
        and not c.model.towers.text.pre_norm
        and c.model.towers.text.extra
    )


@pytest.mark.parametrize('tower', ['vit', 'wat', 'spt'])
def test_finetuned_towers_and_their_classifier(tmp_path, tower):
    base = f'{R}/_base'
    shapes = finetuned(
        {'vit': vit(base, projected=True), 'wat': wat(base), 'spt': spt(base)}[tower],
        POST if tower == 'vit' else D,
    )
    w = written(tmp_path / 'ckpt-5', shapes)
    base_config = tiny.config()
    if tower == 'spt':
        base_config.model.inputs.audio.mel = {
            'bins': 9,
            'hop': 150,
            'window': 256,
            'low': 10.0,
            'high': 900.0,
        }  # 7 frames
    c, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'ckpt-5'), tmp_path / 'run', None, base_config, classes=list('abcde')
    )
    assert report.read == len(w) and not report.unused
    modality = 'video' if tower == 'vit' else 'audio'
    data = inputs()[modality]['data']
    if tower == 'spt':
        data = (
            np.random.default_rng(1).normal(size=(2, 7, 9)).astype(np.float32)
        )  # the last frame and band fall off
    got = ours(tmp_path / 'run', {modality: {'data': data, 'valid': np.ones(2, bool)}}).encoded[
        modality
    ]
    tokens = {
        'vit': (video_tokens, 'voxel_to_patch'),
        'wat': (audio_tokens, 'wave_to_patch'),
        'spt': (spectrum_tokens, 'spectrum_to_patch'),
    }[tower]
    for i in range(2):
        x = own_tower(w, base, *tokens[0](w, f'{base}/{tokens[1]}', data[i]))
        close(got.pooled[i], x[0])
        close(got.tokens[i], x[1:])
    heads_ = checkpoint.read_model(checkpoint.find(tmp_path / 'run'), objective=True)['objective']
    np.testing.assert_array_equal(heads_['kernel'], w[f'{R}/_ops/cls/kernel'].astype(np.float32))
    assert checkpoint.read_meta(checkpoint.find(tmp_path / 'run'))['info']['labels'] == {
        'class': list('abcde')
    }


def shared_classifier(modality):
    """What `configs/vatt_finetune.py:TASK,agnostic_medium` makes of `shared_config`."""
    c = shared_config()
    c.model.towers = {modality: c.model.towers[modality]}
    c.model.head, c.objective = {'name': 'none'}, {'name': 'classification', 'stream': modality}
    return c


@pytest.mark.parametrize('modality', ['video', 'audio'])
def test_classifiers_from_a_modality_agnostic_model_are_towers_of_their_own_in_the_file(
    tmp_path, modality
):
    towers = {
        'video': (vit, 'voxel_to_patch', video_tokens),
        'audio': (wat, 'wave_to_patch', audio_tokens),
    }
    base, (make, patch, tokens) = f'{R}/_base', towers[modality]
    shapes = finetuned(
        make(base) | dense(f'{base}/pre_proj', D, D) | dense(f'{base}/post_proj', D, POST), POST
    )
    w = written(tmp_path / 'a', shapes, slots=False)
    c = shared_classifier(modality)
    c.model.encoder.layers = 2 if modality == 'video' else 1
    _, report = vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', c)
    assert (report.read, report.unused) == (len(w), [])
    data = inputs()[modality]['data']
    got = ours(tmp_path / 'run', {modality: {'data': data, 'valid': np.ones(2, bool)}}).encoded[
        modality
    ]
    for i in range(2):
        x = own_tower(w, base, *tokens(w, f'{base}/{patch}', data[i]))
        close(got.pooled[i], x[0])
        close(got.tokens[i], x[1:])
    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(w)
    have, read = vatt_tf.open_checkpoint(str(tmp_path / 'b'))
    assert have == {k: v.shape for k, v in w.items()}
    for k, v in w.items():
        np.testing.assert_array_equal(read(k), v.astype(np.float32))


@pytest.mark.parametrize('kv', [8, 96])
def test_heads_of_another_width_need_a_config(tmp_path, monkeypatch, kv):
    """Two heads of 8 or 96: the shapes do not tell them from one of 16, or three of 64."""
    monkeypatch.setitem(globals(), 'KV', kv)
    w = written(tmp_path / 'a', finetuned(wat(f'{R}/_base')))
    c = config()
    c.model.head, c.objective = {'name': 'none'}, {'name': 'classification', 'stream': 'audio'}
    if kv == 8:
        with pytest.raises(ConfigError, match='queries of audio are not made of heads of 64'):
            vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())
    vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', c)
    data = inputs()['audio']
    got = ours(tmp_path / 'run', {'audio': data}).encoded['audio'].pooled
    close(
        got,
        [
            own_tower(w, f'{R}/_base', *audio_tokens(w, f'{R}/_base/wave_to_patch', x))[0]
            for x in data['data']
        ],
    )


def test_training_loss_and_gradient_norm_are_those_of_the_official_weights(tmp_path):
    """Both losses with statistics of the batch, in NumPy on the official names; and as slope along our gradient its own norm."""
    w = written(tmp_path / 'ckpt', tx_fac())
    c = config()
    for tower in c.model.towers.values():
        tower.update(
            {
                'dropout': 0.0,
                'attention_dropout': 0.0,
                'position_dropout': 0.0,
                **({} if tower.name == 't5' else {'drop_token': 0.0}),
            }
        )
    c.objective.update({'padded': True})
    vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', c)
    noise, n = np.random.default_rng(8), 4
    there = np.array([True, True, False, True])
    text = noise.integers(0, WORDS, (n, 2, 6)).astype(np.int32) * there[:, None, None]
    data = {
        'video': noise.normal(size=(n, 4, 16, 16, 3)).astype(np.float32),
        'audio': noise.normal(size=(n, 1024)).astype(np.float32),
        'text': text,
    }
    batch = {
        m: {'data': x, 'valid': there if m == 'text' else np.ones(n, bool)} for m, x in data.items()
    }
    _, variables, _ = checkpoint.load_model(
        tmp_path / 'run', sharding.make_mesh({'replica': 1, 'fsdp': 1, 'model': 1, 'seq': 1})
    )
    model, objective = models.build(c.model), objectives.build(c.objective)

    @jax.jit
    def step(params):
        loss = lambda p: objective.loss(
            model, {**variables, 'params': p}, {}, {}, batch, Rng.create(0, 0, jnp.arange(n))
        )
        return jax.value_and_grad(lambda p: loss(p).value)(params)

    value, grads = step(variables['params'])

    def loss(w):
        b, h, pooled = f'{R}/_base_layer', f'{R}/_head_layer/_bridge_heads/0', {}
        for m, tower, patches in (
            ('video', 'vid_backbone', 'voxel_to_patch'),
            ('audio', 'aud_backbone', 'wave_to_patch'),
        ):
            base, tokens = f'{b}/{tower}/_base', video_tokens if m == 'video' else audio_tokens
            pooled[m] = np.array(
                [own_tower(w, base, *tokens(w, f'{base}/{patches}', x))[0] for x in data[m]]
            )
        pooled['text'] = np.array(
            [[text_tower(w, f'{b}/txt_backbone', ids)[0] for ids in clip] for clip in text]
        )
        hidden, moments = linear(w, f'{h}/vid_to_hid', pooled['video']), {}
        for key in (
            'hid_to_va/pre_bn',
            'hid_to_va/bn',
            'va_to_vat/bn',
        ):  # of this batch; the first does not depend on the others
            moments |= {
                f'{h}/{key}/moving_mean': hidden.mean(0),
                f'{h}/{key}/moving_variance': hidden.var(0),
            }
            y = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * w[
                f'{h}/{key}/gamma'
            ] + w[f'{h}/{key}/beta']
            after = {'hid_to_va/pre_bn': 'hid_to_va/dense', 'hid_to_va/bn': 'va_to_vat/dense'}.get(
                key
            )
            hidden = linear(w, f'{h}/{after}', np.maximum(y, 0)) if after else y
        s = spaces({**w, **moments}, **pooled)
        return (
            joint_denominator(s['va', 'video'], s['va', 'audio'][:, None], np.ones(n, bool), 1)
            + joint_denominator(s['vat', 'video'], s['vat', 'text'], there, 1)
        ) / 2

    np.testing.assert_allclose(value, loss(w), rtol=1e-4)
    entries = [e for e in vatt_tf.layout(vatt_tf.filled(c)) if e.ours[0] == 'params']
    theirs = parameter_map.to_theirs(
        {('params', *k): np.asarray(v) for k, v in flatten_dict(grads).items()}, entries
    )
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in theirs.values()))
    ahead, behind = (
        {k: v + sign * 1e-5 / norm * theirs[k] if k in theirs else v for k, v in w.items()}
        for sign in (1, -1)
    )
    np.testing.assert_allclose(norm, (loss(ahead) - loss(behind)) / 2e-5, rtol=1e-3)


def test_an_imported_run_is_evaluated_and_fine_tuned(tmp_path):
    """--mode=eval on what was imported; init_from in a classifier of one modality, whose first step has rate 0: the export of it holds what the
    release takes over from its modality-agnostic model, and the classifier."""
    import data_pipelines
    import run
    from vatt_jax.training import loop

    w = written(tmp_path / 'ckpt', ut_fac())
    c = shared_config()
    c.evals = {
        'retrieval': {
            'type': 'retrieval',
            'limit': 12,
            'pairs': (('audio', 'video', 'va'),),
            'baseline': False,
        }
    }
    c.compute_dtype = 'bfloat16'  # as in configs/vatt.py: evaluated in float32 all the same
    vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', c)
    batch = inputs()
    got = vatt_jax.load(tmp_path / 'run').embed(audio=batch['audio']['data'] / 8)['audio']['pooled']
    close(got, [unified(w, 'audio', x / 8)[0] for x in batch['audio']['data']])
    run.main(['--mode=eval', f'--workdir={tmp_path / "run"}'])
    result = json.loads((tmp_path / 'run' / 'evals' / 'step_000000' / 'results.json').read_text())[
        'retrieval'
    ]
    assert 1 <= result['scalars']['audio_to_video/median_rank'] <= 12

    c = shared_classifier('video')
    c.init_from, c.steps, c.optimizer.name, c.evals = str(tmp_path / 'run'), 1, 'keras_sgd', {}
    c.optimizer.schedule.update({'name': 'vatt', 'levels': ((1, 1e-3), (2, 0.0))})
    loop.train(c, data_pipelines.open(c), tmp_path / 'tuned', quiet=True)
    vatt_tf.export_checkpoint(tmp_path / 'tuned', str(tmp_path / 'out'))
    have, read = vatt_tf.open_checkpoint(str(tmp_path / 'out'))
    u, base = f'{R}/_base_layer/unified_backbone/unified_transformer', f'{R}/_base'
    same = {f'{base}/agg_embedding': f'{u}/vid_agg_embedding'}
    for part, of in (
        ('voxel_to_patch', 'raw_to_embeddings/video'),
        ('pre_proj', 'pre_proj/video'),
        ('post_proj', 'post_proj/video'),
        ('tx', 'tx'),
        ('pos_embedding_lookup', 'pos_embedding_lookup/video'),
    ):
        same |= {
            k.replace(f'{u}/{of}/', f'{base}/{part}/'): k for k in w if k.startswith(f'{u}/{of}/')
        }
    assert (
        set(have) == {*same, f'{R}/_ops/cls/kernel', f'{R}/_ops/cls/bias'}
        and have[f'{R}/_ops/cls/kernel'][0] == POST
    )
    for theirs, old in same.items():
        np.testing.assert_array_equal(read(theirs), w[old].astype(np.float32), err_msg=theirs)


@pytest.mark.parametrize('of', ['tx', 'ut', 'wat'])
def test_round_trip_is_exact(tmp_path, of):
    shapes = {'tx': tx_fac, 'ut': ut_fac, 'wat': lambda: finetuned(wat(f'{R}/_base'))}[of]()
    w = written(tmp_path / 'a', shapes, slots=False)
    vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())
    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'out' / 'b')) == len(w)
    have, read = vatt_tf.open_checkpoint(str(tmp_path / 'out' / 'b'))
    assert have == {k: v.shape for k, v in w.items()}
    for k, v in w.items():
        np.testing.assert_array_equal(read(k), v.astype(np.float32))


def test_an_exported_checkpoint_is_restored_by_tensorflow_object_by_object(tmp_path):
    import tensorflow as tf

    vatt_tf.write_checkpoint(
        str(tmp_path / 'c'),
        {'model/layer_with_weights-0/_base/agg_embedding': np.arange(3, dtype=np.float32)},
    )
    leaf, base, root, model = (tf.Module() for _ in range(4))
    leaf.agg_embedding = tf.Variable(np.zeros(3, np.float32))
    root._base = leaf
    setattr(model, 'layer_with_weights-0', root)
    tf.train.Checkpoint(model=model).read(str(tmp_path / 'c')).assert_consumed()
    np.testing.assert_array_equal(leaf.agg_embedding.numpy(), [0, 1, 2])


def test_position_tables_of_another_length_are_resized(tmp_path):
    scipy = pytest.importorskip('scipy.interpolate')
    w = written(tmp_path / 'ckpt', tx_fac())
    c = config()
    c.model.inputs.audio.samples = 512  # 8 patches where the table has 16
    _, report = vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', c)
    assert report.resized == [
        f'{R}/_base_layer/aud_backbone/_base/pos_embedding_lookup/temporal_position_embeddings/embeddings: 16 → 8 rows'
    ]
    got = checkpoint.read_model(checkpoint.find(tmp_path / 'run'))['params']['fronts_audio'][
        'positions'
    ]['temporal_positions']
    table = w[
        f'{R}/_base_layer/aud_backbone/_base/pos_embedding_lookup/temporal_position_embeddings/embeddings'
    ]
    np.testing.assert_allclose(
        got, scipy.CubicSpline(np.arange(16), table, bc_type='natural')(np.arange(8) * 2), atol=1e-5
    )


@pytest.mark.parametrize(
    'spoil,words',
    [
        (
            {'model__towers__video__width': 16},
            r'voxel_to_patch/kernel has shape \[2, 8, 8, 3, 12\], this config wants \[2, 8, 8, 3, 16\].*'
            r'config.model.towers.video.width',
        ),
        ({'model__head__va': 15}, r'config.model.head.va'),
        (
            {'model__towers__text__vocab': 31},
            r'embedding/embeddings has shape \[30, 10\].*config.model.towers.text.vocab',
        ),
        (
            {'model__towers__audio__layers': 2},
            r'lacks 16 of the .* variables this config wants: .*/layers/1/layer_norm/gamma',
        ),
        (
            {'model__towers__audio__layers': 2},
            r'config.model.towers.audio.layers=2 \(checkpoint: 1\)',
        ),
        (
            {'model__towers__video__layers': 1},
            r'config.model.towers.video.layers=1 \(checkpoint: 2\)(.|\n)*not used: .*/tx/layers/1/',
        ),
        (
            {'model__towers__audio__patch': 32},
            r'config.model.towers.audio.patch=32 .*(.|\n)*\[64, 1, 12\].*set config.model.towers.audio.patch',
        ),
        (
            {'model__towers__audio__post': 8},
            r'config.model.towers.audio.post=8 \(checkpoint: 0\)(.|\n)*post_proj/kernel',
        ),
        (
            {'model__towers__audio': {'name': 'spt', 'patch': (2, 5), 'width': D}},
            r"config.model.towers.audio.name='spt' \(checkpoint: 'wat'\)(.|\n)*lacks .*spectrum_to_patch/kernel(.|\n)*not used: .*wave_to_patch/kernel",
        ),
        ({'objective__name': 'classification'}, 'is pretrained'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path_factory, spoil, words):
    path = tmp_path_factory.getbasetemp() / 'shared_ckpt'
    if not path.with_suffix('.index').exists():
        written(path, tx_fac())
    c = config()
    put(c, spoil)
    if 'objective__name' in spoil:
        c.objective = {'name': 'classification', 'stream': 'video', 'label': 'class'}
    if c.model.towers.audio.name == 'spt':
        c.model.inputs.audio.mel = {'bins': 10, 'hop': 16, 'window': 32, 'low': 10.0, 'high': 900.0}
    with pytest.raises(ConfigError, match=words):
        vatt_tf.import_checkpoint(str(path), tmp_path_factory.mktemp('bad') / 'run', c)


def test_every_variable_that_does_not_fit_is_named(tmp_path):
    """All wrong shapes with their fields, all that is missing and all that nothing took, in one message."""
    written(
        tmp_path / 'ckpt',
        {k: v for k, v in tx_fac().items() if 'txt_backbone/base_lm/layers/1/' not in k}
        | {'model/odd': (3,)},
    )
    c = put(
        config(),
        {
            'model__towers__video__width': 16,
            'model__head__vat': 7,
            'model__towers__audio__layers': 6,
        },
    )
    with pytest.raises(ConfigError) as error:
        vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', c)
    first, missing, *wrong, unused = str(error.value).split('\n')
    for field in (
        'video.width=16 (checkpoint: 12)',
        'audio.layers=6 (checkpoint: 1)',
        'text.layers=2 (checkpoint: 1)',
        'head.vat=7 (checkpoint: 6)',
    ):
        assert field in first
    assert (
        missing.count('/aud_backbone/_base/tx/layers/') == 5 * 16
        and missing.count('/txt_backbone/') == 9
        and unused == 'not used: model/odd'
    )
    have = {k: v for k, v in tx_fac().items() if '/vid_backbone/' in k and D in v} | {
        k: v for k, v in tx_fac().items() if VAT in v
    }
    have[f'{R}/_head_layer/_bridge_heads/0/vid_to_hid/kernel'] = (D, VA)
    assert sorted(line.split(' has shape ')[0] for line in wrong) == sorted(have)
    assert all(
        f'has shape {list(have[line.split()[0]])}, this config wants' in line
        and '; set config.model.' in line
        for line in wrong
    )


@pytest.mark.parametrize(
    'spoil,words',
    [
        (
            {},
            r'config.model.towers.video.pre=False \(checkpoint: True\), config.model.towers.video.post=0 \(checkpoint: 18\)',
        ),
        (
            {
                'model__towers__video__pre': True,
                'model__towers__video__post': POST,
                'objective__stream': 'audio',
            },
            r"config.objective.stream='audio' \(checkpoint: video\)",
        ),
        (
            {'model__shared': True, 'model__encoder__layers': 3},
            r'config.model.encoder.layers=3 \(checkpoint: 2\)',
        ),
        ({'model__towers__video__name': 'i3d'}, 'the official layout of vit, wat, spt is known'),
    ],
)
def test_what_does_not_fit_a_finetuned_checkpoint_is_named(tmp_path_factory, spoil, words):
    path = tmp_path_factory.getbasetemp() / 'shared_tuned'
    if not path.with_suffix('.index').exists():
        written(path, finetuned(vit(f'{R}/_base', projected=True), POST))
    c = shared_classifier('video') if 'model__shared' in spoil else config()
    c.model.head, c.objective = (
        {'name': 'none'},
        {'name': 'classification', 'stream': 'video', 'label': 'class'},
    )
    put(c, spoil)
    if c.model.towers.video.name == 'i3d':
        c.model.towers.video = {'name': 'i3d'}
    with pytest.raises(ConfigError, match=words):
        vatt_tf.import_checkpoint(str(path), tmp_path_factory.mktemp('bad') / 'run', c)


def test_unused_variables_are_listed_and_the_command_line_tells_all(tmp_path, capsys, monkeypatch):
    from vatt_jax.importers.__main__ import main

    written(
        tmp_path / 'ckpt', tx_fac() | {f'{R}/_base_layer/vid_backbone/_base/mask_embedding': (D,)}
    )
    (tmp_path / 'words').write_text(
        '\n'.join(['<pad>', 'red', '<unk>', *(f'w{i}' for i in range(WORDS - 3))])
    )
    (tmp_path / 'small.py').write_text(
        'from tests import test_importers\nget_config = test_importers.config\n'
    )
    main(
        [
            f'--checkpoint={tmp_path / "ckpt"}',
            f'--out={tmp_path / "run"}',
            f'--config={tmp_path / "small.py"}',
            f'--vocabulary={tmp_path / "words"}',
        ]
    )
    told = capsys.readouterr().out
    assert (
        'not used: model/layer_with_weights-0/_base_layer/vid_backbone/_base/mask_embedding' in told
        and 'missing: none' in told
    )
    assert (
        json.loads((tmp_path / 'run' / 'config.json').read_text())['model']['towers']['video'][
            'width'
        ]
        == D
    )
    model = vatt_jax.load(tmp_path / 'run')
    assert model.embed(text='red w0 nothing')['text']['vat'].shape == (VAT,)
    np.testing.assert_array_equal(model.tokenizer.encode(['Red w0, nothing!'], 4), [[1, 3, 2, 0]])
    main([f'--export={tmp_path / "run"}', f'--out={tmp_path / "back"}'])
    assert (
        f'{len(tx_fac())} variables' in capsys.readouterr().out
        and (tmp_path / 'back.index').exists()
    )
    with pytest.raises(ConfigError, match=r'no file .*nothing.index; there are .*ckpt'):
        main([f'--checkpoint={tmp_path / "nothing"}', f'--out={tmp_path / "x"}'])


def test_the_layout_knows_linear_text_and_refuses_convolutional_towers():
    from vatt_jax import config as configs
    from vatt_jax.models import presets

    c = configs.load('configs/vatt.py:bbs')
    c.model.towers.text = presets.tower('linear')
    names = {e.theirs for e in vatt_tf.layout(vatt_tf.filled(c))}
    text = 'model/layer_with_weights-0/_base_layer/txt_backbone'
    assert {
        f'{text}/embedding/embeddings',
        f'{text}/base_lm/conv1d/kernel',
        f'{text}/base_lm/conv1d/bias',
    } <= names
    with pytest.raises(
        ConfigError,
        match="towers.audio.name='resnet2d': the official layout of vit, wat, spt is known",
    ):
        list(vatt_tf.layout(vatt_tf.filled(configs.load('configs/vatt.py:mmv'))))
