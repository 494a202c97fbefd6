"""Official VATT checkpoints: what is imported computes what the official weights compute.

The files here are in exactly the official layout and written with TensorFlow. The reference is an
independent NumPy forward pass, in float64, on the official names.
"""

import functools
import json
import math

import chex
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

ROOT = 'model/layer_with_weights-0'
TOWERS = f'{ROOT}/_base_layer'
UNIFIED = f'{TOWERS}/unified_backbone/unified_transformer'
HEAD = f'{ROOT}/_head_layer/_bridge_heads/0'
FINETUNED = f'{ROOT}/_base'  # the tower of a fine-tuned checkpoint

WIDTH, MLP, HEADS = 12, 20, 2
HEAD_WIDTH = 64  # as in all official models
VOCAB, WORD_WIDTH = 30, 10
VA, VAT, POST = 14, 6, 18


# ---- the official layout, name by name and shape by shape: {name: shape}
def norm_shapes(key, width):
    """A layer norm, or the trained part of a batch norm."""
    return {f'{key}/gamma': (width,), f'{key}/beta': (width,)}


def batch_norm_shapes(key, width):
    """A batch norm with its running statistics."""
    return norm_shapes(key, width) | {
        f'{key}/moving_mean': (width,),
        f'{key}/moving_variance': (width,),
    }


def dense_shapes(key, inputs, outputs, bias=True):
    """A dense layer."""
    shapes = {f'{key}/kernel': (inputs, outputs)}
    if bias:
        shapes[f'{key}/bias'] = (outputs,)
    return shapes


def mlp_shapes(key, bias=True):
    """The two dense layers of a feed-forward block."""
    return dense_shapes(f'{key}/wi', WIDTH, MLP, bias) | dense_shapes(f'{key}/wo', MLP, WIDTH, bias)


def attention_shapes(key, bias=True):
    """The four projections of self-attention."""
    shapes = {}
    for projection in 'qkv':
        shapes |= dense_shapes(f'{key}/{projection}', WIDTH, HEADS * HEAD_WIDTH, bias)
    return shapes | dense_shapes(f'{key}/o', HEADS * HEAD_WIDTH, WIDTH, bias)


def stack_shapes(key, layers, bias=True):
    """A stack of transformer layers and its final norm."""
    shapes = norm_shapes(f'{key}/final_layer_norm', WIDTH)
    for i in range(layers):
        layer = f'{key}/layers/{i}'
        shapes |= norm_shapes(f'{layer}/layer_norm', WIDTH)
        shapes |= norm_shapes(f'{layer}/feed_forward/layer_norm', WIDTH)
        shapes |= attention_shapes(f'{layer}/mha', bias)
        shapes |= mlp_shapes(f'{layer}/feed_forward/mlp', bias)
    return shapes


def position_shapes(key, **rows):
    """A table of positions for each axis, and the norm of their sum."""
    shapes = {}
    for axis, count in rows.items():
        shapes[f'{key}/{axis}_position_embeddings/embeddings'] = (count, WIDTH)
    return shapes | norm_shapes(f'{key}/layernorm', WIDTH)


def vit_shapes(key, projected=False):
    """The video tower; `projected`: with dense layers before and after its stack."""
    shapes = {
        f'{key}/voxel_to_patch/kernel': (2, 8, 8, 3, WIDTH),
        f'{key}/voxel_to_patch/bias': (WIDTH,),
        f'{key}/agg_embedding': (WIDTH,),
    }
    shapes |= position_shapes(f'{key}/pos_embedding_lookup', temporal=2, vertical=2, horizontal=2)
    shapes |= stack_shapes(f'{key}/tx', 2)
    if projected:
        shapes |= dense_shapes(f'{key}/pre_proj', WIDTH, WIDTH)
        shapes |= dense_shapes(f'{key}/post_proj', WIDTH, POST)
    return shapes


def wat_shapes(key):
    """The tower of the waveform."""
    shapes = {
        f'{key}/wave_to_patch/kernel': (64, 1, WIDTH),
        f'{key}/wave_to_patch/bias': (WIDTH,),
        f'{key}/agg_embedding': (WIDTH,),
    }
    shapes |= position_shapes(f'{key}/pos_embedding_lookup', temporal=16)
    return shapes | stack_shapes(f'{key}/tx', 1)


def spt_shapes(key):
    """The tower of the spectrogram."""
    shapes = {
        f'{key}/spectrum_to_patch/kernel': (2, 4, 1, WIDTH),
        f'{key}/spectrum_to_patch/bias': (WIDTH,),
        f'{key}/agg_embedding': (WIDTH,),
    }
    shapes |= position_shapes(f'{key}/pos_embedding_lookup', temporal=3, spectoral=2)
    return shapes | stack_shapes(f'{key}/tx', 1, bias=False)


def t5_shapes(key):
    """The default tower of text: relative positions, no biases."""
    model = f'{key}/base_lm'
    attention = f'{model}/layers/0/self_attention/attention'
    shapes = {
        f'{key}/embedding/embeddings': (VOCAB, WORD_WIDTH),
        f'{key}/agg_embedding': (WORD_WIDTH,),
        f'{key}/pre_proj/kernel': (WORD_WIDTH, WIDTH),
        f'{attention}/relative_attention_bias/embeddings': (32, HEADS),
        f'{model}/final_layer_norm/weight': (WIDTH,),
    }
    for i in range(2):
        layer = f'{model}/layers/{i}'
        shapes[f'{layer}/self_attention/layer_norm/weight'] = (WIDTH,)
        shapes |= norm_shapes(f'{layer}/feed_forward/layer_norm', WIDTH)
        shapes |= attention_shapes(f'{layer}/self_attention/attention', bias=False)
        shapes |= mlp_shapes(f'{layer}/feed_forward/mlp', bias=False)
    return shapes


def bert_shapes(key, small=False):
    """A BERT tower; `small`: a further token in word space and no final norm."""
    model = f'{key}/base_lm'
    shapes = {
        f'{key}/embedding/embeddings': (VOCAB, WORD_WIDTH),
        f'{key}/pre_proj/kernel': (WORD_WIDTH, WIDTH),
        f'{model}/agg_embedding': (WIDTH,),
    }
    shapes |= position_shapes(f'{model}/pos_embedding_lookup', temporal=6)
    shapes |= stack_shapes(f'{model}/tx', 2)
    if small:
        shapes = {name: shape for name, shape in shapes.items() if 'final_layer_norm' not in name}
        shapes[f'{key}/agg_embedding'] = (WORD_WIDTH,)
    return shapes


def bert_small_shapes(key):
    """The tower `bert_small`."""
    return bert_shapes(key, small=True)


def linear_text_shapes(key):
    """Text as a maximum over projected words."""
    return {
        f'{key}/embedding/embeddings': (VOCAB, WORD_WIDTH),
        f'{key}/base_lm/conv1d/kernel': (1, WORD_WIDTH, WIDTH),
        f'{key}/base_lm/conv1d/bias': (WIDTH,),
    }


TEXT_TOWERS = {
    'bert_base': bert_shapes,
    'bert_small': bert_small_shapes,
    'linear': linear_text_shapes,
}


def head_shapes(video, audio, text):
    """The FAC head, on features of these widths."""
    return (
        dense_shapes(f'{HEAD}/vid_to_hid', video, VA, bias=False)
        | batch_norm_shapes(f'{HEAD}/hid_to_va/pre_bn', VA)
        | dense_shapes(f'{HEAD}/hid_to_va/dense', VA, VA, bias=False)
        | batch_norm_shapes(f'{HEAD}/hid_to_va/bn', VA)
        | dense_shapes(f'{HEAD}/va_to_vat/dense', VA, VAT, bias=False)
        | batch_norm_shapes(f'{HEAD}/va_to_vat/bn', VAT)
        | dense_shapes(f'{HEAD}/aud_to_va', audio, VA)
        | dense_shapes(f'{HEAD}/txt_to_vat', text, VAT)
    )


def tx_fac_shapes(text_shapes=t5_shapes):
    """The modality-specific model."""
    return (
        vit_shapes(f'{TOWERS}/vid_backbone/_base')
        | wat_shapes(f'{TOWERS}/aud_backbone/_base')
        | text_shapes(f'{TOWERS}/txt_backbone')
        | head_shapes(WIDTH, WIDTH, WIDTH)
    )


def ut_fac_shapes():
    """The modality-agnostic model."""
    shapes = {
        f'{UNIFIED}/raw_to_embeddings/video/kernel': (2, 8, 8, 3, WIDTH),
        f'{UNIFIED}/raw_to_embeddings/video/bias': (WIDTH,),
        f'{UNIFIED}/raw_to_embeddings/audio/kernel': (64, 1, WIDTH),
        f'{UNIFIED}/raw_to_embeddings/audio/bias': (WIDTH,),
        f'{UNIFIED}/raw_to_embeddings/text/embeddings': (VOCAB, WORD_WIDTH),
    }
    for modality, width in (('video', WIDTH), ('audio', WIDTH), ('text', WORD_WIDTH)):
        shapes |= dense_shapes(f'{UNIFIED}/pre_proj/{modality}', width, WIDTH)
        shapes |= dense_shapes(f'{UNIFIED}/post_proj/{modality}', WIDTH, POST)
    positions = f'{UNIFIED}/pos_embedding_lookup'
    shapes |= position_shapes(f'{positions}/video', temporal=2, vertical=2, horizontal=2)
    shapes |= position_shapes(f'{positions}/audio', temporal=16)
    shapes |= position_shapes(f'{positions}/text', temporal=6)
    for modality in ('vid', 'aud', 'txt'):
        shapes[f'{UNIFIED}/{modality}_agg_embedding'] = (WIDTH,)
    return shapes | stack_shapes(f'{UNIFIED}/tx', 2) | head_shapes(POST, POST, POST)


def finetuned_shapes(tower, width=None, classes=5):
    """A tower with a classifier on features of `width`."""
    return tower | dense_shapes(f'{ROOT}/_ops/cls', width or WIDTH, classes)


def random_variable(noise, name, shape):
    """float32 of this shape: a variance is positive and a norm's scale is about 1."""
    values = noise.normal(size=shape)
    if name.endswith('moving_variance'):
        return (np.abs(values) + 0.5).astype(np.float32)
    values = (0.3 * values).astype(np.float32)
    if name.endswith(('gamma', 'weight')):
        values = values + 1
    return values


def write_checkpoint(path, shapes, optimizer_state=True):
    """Writes random values under these names; returns them as float64, {name: array}.

    With `optimizer_state` the file also holds what an optimizer leaves there: four variables.
    """
    import tensorflow as tf

    noise = np.random.default_rng(0)
    weights = {name: random_variable(noise, name, shape) for name, shape in shapes.items()}
    variables = dict(weights)
    if optimizer_state:
        variables['optimizer/iter'] = np.int64(7)
        variables['save_counter'] = np.int64(1)
        for name in list(weights)[:2]:
            variables[f'{name}/.OPTIMIZER_SLOT/optimizer/m'] = weights[name]
    names = [f'{name}/.ATTRIBUTES/VARIABLE_VALUE' for name in variables]
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=names,
        shape_and_slices=[''] * len(names),
        tensors=[tf.constant(value) for value in variables.values()],
    )
    return {name: value.astype(np.float64) for name, value in weights.items()}


def assert_checkpoint_holds(prefix, weights):
    """The checkpoint holds these variables, bit for bit as float32, and no others."""
    shapes, read = vatt_tf.open_checkpoint(str(prefix))
    assert shapes == {name: value.shape for name, value in weights.items()}
    found = {name: read(name) for name in shapes}
    expected = {name: value.astype(np.float32) for name, value in weights.items()}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


# ---- the forward pass, from the fact sheet, on official names
def gelu(x):
    """x Φ(x), with Φ the normal distribution function."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def layer_norm(weights, key, x):
    """Over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)
    return centred / deviation * weights[f'{key}/gamma'] + weights[f'{key}/beta']


def rms_norm(weights, key, x):
    """Over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weights[f'{key}/weight']


def dense(weights, key, x):
    """Kernel and, where there is one, bias."""
    return x @ weights[f'{key}/kernel'] + weights.get(f'{key}/bias', 0)


def mlp(weights, key, x):
    """The feed-forward block without its norm."""
    return dense(weights, f'{key}/wo', gelu(dense(weights, f'{key}/wi', x)))


def split_heads(x):
    """[N, heads * head width] -> [heads, N, head width]."""
    return x.reshape(len(x), HEADS, HEAD_WIDTH).transpose(1, 0, 2)


def attention(weights, key, x, bias, scale):
    """softmax(scale q kᵀ + bias) v of each head, put together and projected."""
    query, keys, values = (
        split_heads(dense(weights, f'{key}/{projection}', x)) for projection in 'qkv'
    )
    logits = query @ keys.transpose(0, 2, 1) * scale + bias
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = probabilities / probabilities.sum(-1, keepdims=True)
    mixed = (probabilities @ values).transpose(1, 0, 2).reshape(len(x), -1)
    return dense(weights, f'{key}/o', mixed)


def transformer(weights, key, x, mask=None, post_norm=False):
    """The stack of layers; norms lie before the blocks, or after the sums with `post_norm`."""
    bias = 0.0
    if mask is not None:
        bias = np.where(mask, 0, -1e9)[None, None]
    scale = HEAD_WIDTH**-0.5
    index = 0
    while f'{key}/layers/{index}/layer_norm/gamma' in weights:
        layer = f'{key}/layers/{index}'
        attention_norm = f'{layer}/layer_norm'
        mlp_norm = f'{layer}/feed_forward/layer_norm'
        if post_norm:
            x = x + attention(weights, f'{layer}/mha', x, bias, scale)
            x = layer_norm(weights, attention_norm, x)
            x = x + mlp(weights, f'{layer}/feed_forward/mlp', x)
            x = layer_norm(weights, mlp_norm, x)
        else:
            normed = layer_norm(weights, attention_norm, x)
            x = x + attention(weights, f'{layer}/mha', normed, bias, scale)
            normed = layer_norm(weights, mlp_norm, x)
            x = x + mlp(weights, f'{layer}/feed_forward/mlp', normed)
        index += 1
    if post_norm:
        return x
    return layer_norm(weights, f'{key}/final_layer_norm', x)


def position_embeddings(weights, key, rows):
    """rows: {axis: row numbers [N]}."""
    total = 0
    for axis, numbers in rows.items():
        total = total + weights[f'{key}/{axis}_position_embeddings/embeddings'][numbers]
    return layer_norm(weights, f'{key}/layernorm', total)


def video_tokens(weights, key, video):
    """[T, H, W, 3] -> (tokens [N, width], {axis: position [N]})."""
    kernel = weights[f'{key}/kernel']
    frames, height, width = kernel.shape[:3]
    tokens, positions = [], []
    for t in range(video.shape[0] // frames):
        for y in range(video.shape[1] // height):
            for x in range(video.shape[2] // width):
                patch = video[
                    t * frames : (t + 1) * frames,
                    y * height : (y + 1) * height,
                    x * width : (x + 1) * width,
                ]
                tokens.append(np.tensordot(patch, kernel, 4))
                positions.append((t, y, x))
    rows = dict(zip(('temporal', 'vertical', 'horizontal'), np.array(positions).T))
    return np.stack(tokens) + weights[f'{key}/bias'], rows


def audio_tokens(weights, key, waveform):
    """[samples] -> (tokens [N, width], {axis: position [N]}); an incomplete patch is dropped."""
    kernel = weights[f'{key}/kernel'][:, 0]
    count = len(waveform) // len(kernel)
    patches = waveform[: count * len(kernel)].reshape(count, len(kernel))
    return patches @ kernel + weights[f'{key}/bias'], {'temporal': np.arange(count)}


def spectrum_tokens(weights, key, spectrogram):
    """[frames, bins] -> (tokens [N, width], {axis: position [N]}); positions run along time first.

    Tokens run along frequency first all the same, as in the release.
    """
    kernel = weights[f'{key}/kernel'][:, :, 0]
    frames, bins = kernel.shape[:2]
    times, bands = spectrogram.shape[0] // frames, spectrogram.shape[1] // bins
    tokens = []
    for t in range(times):
        for band in range(bands):
            patch = spectrogram[
                t * frames : (t + 1) * frames,
                band * bins : (band + 1) * bins,
            ]
            tokens.append(np.tensordot(patch, kernel, 2))
    number = np.arange(times * bands)
    rows = {'temporal': number % times, 'spectoral': number // times}
    return np.stack(tokens) + weights[f'{key}/bias'], rows


PATCHES = {
    'vit': ('voxel_to_patch', video_tokens),
    'wat': ('wave_to_patch', audio_tokens),
    'spt': ('spectrum_to_patch', spectrum_tokens),
}


def own_tower(weights, key, tower, data):
    """The aggregation token and the tokens of a tower with its own stack: [1 + N, width]."""
    patch, tokens_of = PATCHES[tower]
    tokens, rows = tokens_of(weights, f'{key}/{patch}', data)
    if f'{key}/pre_proj/kernel' in weights:
        tokens = gelu(dense(weights, f'{key}/pre_proj', tokens))
    tokens = tokens + position_embeddings(weights, f'{key}/pos_embedding_lookup', rows)
    x = np.concatenate([weights[f'{key}/agg_embedding'][None], tokens])
    x = transformer(weights, f'{key}/tx', x)
    if f'{key}/post_proj/kernel' in weights:
        x = gelu(dense(weights, f'{key}/post_proj', x))
    return x


def relative_bucket(distance):
    """T5's bucket of a relative position: 32 in all, of distances up to 64."""
    offset = 16 if distance > 0 else 0
    distance = abs(distance)
    if distance < 8:
        return offset + distance
    return offset + min(15, 8 + int(np.log(distance / 8) / np.log(64 / 8) * 8))


def t5_tower(weights, key, ids):
    """[words] -> [width]."""
    words = weights[f'{key}/embedding/embeddings'][ids]
    x = np.concatenate([weights[f'{key}/agg_embedding'][None], words])
    x = gelu(dense(weights, f'{key}/pre_proj', x))
    model, length = f'{key}/base_lm', len(x)
    table = weights[f'{model}/layers/0/self_attention/attention/relative_attention_bias/embeddings']
    bias = np.zeros((HEADS, length, length))
    for query in range(length):
        for at in range(length):
            bias[:, query, at] = table[relative_bucket(at - query)]
    mask = np.concatenate([[True], ids != 0])
    bias = bias + np.where(mask, 0, -1e9)
    for i in range(2):
        layer = f'{model}/layers/{i}'
        normed = rms_norm(weights, f'{layer}/self_attention/layer_norm', x)
        x = x + attention(weights, f'{layer}/self_attention/attention', normed, bias, scale=1.0)
        normed = layer_norm(weights, f'{layer}/feed_forward/layer_norm', x)
        x = x + mlp(weights, f'{layer}/feed_forward/mlp', normed)
    return rms_norm(weights, f'{model}/final_layer_norm', x)[0]


def bert_tower(weights, key, ids):
    """[words] -> [width]: positions are added before the aggregation token goes in front.

    `bert_small` has one more word in front of the words, and its table has a row too few.
    """
    model = f'{key}/base_lm'
    words = weights[f'{key}/embedding/embeddings'][ids]
    mask = ids != 0
    small = f'{key}/agg_embedding' in weights
    if small:
        interpolate = pytest.importorskip('scipy.interpolate')
        words = np.concatenate([weights[f'{key}/agg_embedding'][None], words])
        mask = np.concatenate([[True], mask])
        table = f'{model}/pos_embedding_lookup/temporal_position_embeddings/embeddings'
        old, new = np.arange(6)[:, None] / 6, np.arange(7)[:, None] / 7
        fit = interpolate.RBFInterpolator(old, weights[table], kernel='cubic', degree=1)
        weights = {**weights, table: fit(new)}
    rows = {'temporal': np.arange(len(words))}
    x = gelu(dense(weights, f'{key}/pre_proj', words))
    x = x + position_embeddings(weights, f'{model}/pos_embedding_lookup', rows)
    x = np.concatenate([weights[f'{model}/agg_embedding'][None], x])
    mask = np.concatenate([[True], mask])
    return transformer(weights, f'{model}/tx', x, mask, post_norm=small)[0]


def linear_text_tower(weights, key, ids):
    """[words] -> [width]."""
    words = weights[f'{key}/embedding/embeddings'][ids]
    projected = words @ weights[f'{key}/base_lm/conv1d/kernel'][0]
    return np.maximum(projected + weights[f'{key}/base_lm/conv1d/bias'], 0).max(0)


def each_text(tower, weights, key, text):
    """Text [clips, candidates, words] -> features [clips, candidates, width] of a text tower."""
    features = [tower(weights, key, ids) for ids in text.reshape(-1, text.shape[-1])]
    return np.reshape(features, (*text.shape[:2], -1))


def unified(weights, modality, data):
    """The aggregation token and the tokens of the modality-agnostic model: [1 + N, post]."""
    embedding = f'{UNIFIED}/raw_to_embeddings/{modality}'
    mask = None
    if modality == 'text':
        tokens = weights[f'{embedding}/embeddings'][data]
        rows = {'temporal': np.arange(len(data))}
        mask = np.concatenate([[True], data != 0])
    elif modality == 'audio':
        tokens, rows = audio_tokens(weights, embedding, data)
    else:
        tokens, rows = video_tokens(weights, embedding, data)
    x = gelu(dense(weights, f'{UNIFIED}/pre_proj/{modality}', tokens))
    x = x + position_embeddings(weights, f'{UNIFIED}/pos_embedding_lookup/{modality}', rows)
    short = {'video': 'vid', 'audio': 'aud', 'text': 'txt'}[modality]
    x = np.concatenate([weights[f'{UNIFIED}/{short}_agg_embedding'][None], x])
    x = transformer(weights, f'{UNIFIED}/tx', x, mask)
    return gelu(dense(weights, f'{UNIFIED}/post_proj/{modality}', x))


def batch_norm(weights, key, x):
    """With the running statistics."""
    deviation = np.sqrt(weights[f'{key}/moving_variance'] + 1e-5)
    normed = (x - weights[f'{key}/moving_mean']) / deviation
    return normed * weights[f'{key}/gamma'] + weights[f'{key}/beta']


def fac_spaces(weights, video, audio, text):
    """Features of the FAC head, {(space, modality): array}, from pooled features."""
    hidden = dense(weights, f'{HEAD}/vid_to_hid', video)
    hidden = np.maximum(batch_norm(weights, f'{HEAD}/hid_to_va/pre_bn', hidden), 0)
    video_va = dense(weights, f'{HEAD}/hid_to_va/dense', hidden)
    video_va = batch_norm(weights, f'{HEAD}/hid_to_va/bn', video_va)
    video_vat = dense(weights, f'{HEAD}/va_to_vat/dense', np.maximum(video_va, 0))
    video_vat = batch_norm(weights, f'{HEAD}/va_to_vat/bn', video_vat)
    return {
        ('va', 'video'): video_va,
        ('vat', 'video'): video_vat,
        ('va', 'audio'): dense(weights, f'{HEAD}/aud_to_va', audio),
        ('vat', 'text'): dense(weights, f'{HEAD}/txt_to_vat', text),
    }


# ---- configs and inputs
def make_config(**changes):
    """The config of the modality-specific model in the files here."""
    config = tiny.config(**changes)
    size = {'width': WIDTH, 'mlp': MLP, 'heads': HEADS, 'head_width': HEAD_WIDTH}
    config.model.towers = {
        'video': {'name': 'vit', **size, 'layers': 2, 'patch': (2, 8, 8)},
        'audio': {'name': 'wat', **size, 'layers': 1, 'patch': 64},
        'text': {'name': 't5', **size, 'layers': 2, 'vocab': VOCAB, 'word_width': WORD_WIDTH},
    }
    config.model.head = {'name': 'fac', 'va': VA, 'vat': VAT}
    return config


def set_fields(config, values):
    """The config with fields set by dotted names."""
    for name, value in values.items():
        node = config
        *parents, last = name.split('.')
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def agnostic_config():
    """The config of the modality-agnostic model in the files here."""
    config = make_config(model__shared=True)
    config.model.encoder = {
        'layers': 2,
        'width': WIDTH,
        'mlp': MLP,
        'heads': HEADS,
        'head_width': HEAD_WIDTH,
    }
    config.model.towers = {
        'video': {'name': 'vit', 'patch': (2, 8, 8), 'post': POST},
        'audio': {'name': 'wat', 'patch': 64, 'post': POST},
        'text': {'name': 't5', 'vocab': VOCAB, 'word_width': WORD_WIDTH, 'post': POST},
    }
    return config


def agnostic_classifier_config(modality):
    """What configs/vatt_finetune.py:TASK,agnostic_medium makes of `agnostic_config`."""
    config = agnostic_config()
    config.model.towers = {modality: config.model.towers[modality]}
    config.model.head = {'name': 'none'}
    config.objective = {'name': 'classification', 'stream': modality}
    return config


def make_batch():
    """Two clips with two sentences each; one sentence is short, one is empty."""
    noise = np.random.default_rng(3)
    text = noise.integers(1, VOCAB, (2, 2, 6)).astype(np.int32)
    text[0, 0, 3:] = 0
    text[1, 1] = 0
    valid = np.ones(2, bool)
    video = noise.normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    audio = noise.normal(size=(2, 1024)).astype(np.float32)
    return {
        'video': {'data': video, 'valid': valid},
        'audio': {'data': audio, 'valid': valid},
        'text': {'data': text, 'valid': valid},
    }


def load_run(run):
    """(config, variables) of a run on one device."""
    mesh = sharding.make_mesh({'replica': 1, 'fsdp': 1, 'model': 1, 'seq': 1})
    config, variables, _ = checkpoint.load_model(run, mesh)
    return config, variables


def forward(run, batch):
    """Our model's output for the batch, with all features."""
    config, variables = load_run(run)
    model = models.build(config.model)

    @jax.jit
    def apply(variables, batch):
        rng = Rng.create(0, 0, jnp.zeros(2))
        return model.apply(variables, batch, train=False, rng=rng, features=True)

    return apply(variables, batch)


def assert_close(found, expected):
    """Of the same shape, and equal to what float32 allows."""
    expected = np.asarray(expected)
    chex.assert_shape(found, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---- imports compute what the official weights compute
def test_the_modality_specific_model_computes_what_the_official_weights_compute(tmp_path):
    weights = write_checkpoint(tmp_path / 'ckpt-7', tx_fac_shapes())
    prefix = str(tmp_path / 'ckpt-7')
    _, report = vatt_tf.import_checkpoint(prefix, tmp_path / 'run', make_config())
    assert report.read == len(weights)
    assert report.resized == []
    assert report.unused == []
    assert report.bookkeeping == 4

    batch = make_batch()
    found = forward(tmp_path / 'run', batch)
    pooled = {}
    towers = {'video': ('vid_backbone', 'vit'), 'audio': ('aud_backbone', 'wat')}
    for modality, (backbone, tower) in towers.items():
        key = f'{TOWERS}/{backbone}/_base'
        expected = np.stack([own_tower(weights, key, tower, x) for x in batch[modality]['data']])
        assert_close(found.encoded[modality].tokens, expected[:, 1:])
        pooled[modality] = expected[:, 0]
    pooled['text'] = each_text(t5_tower, weights, f'{TOWERS}/txt_backbone', batch['text']['data'])
    for modality, expected in pooled.items():
        assert_close(found.encoded[modality].pooled, expected)
    for (space, modality), expected in fac_spaces(weights, **pooled).items():
        assert_close(found.spaces[space][modality], expected)


def test_the_modality_agnostic_model_is_read_with_sizes_from_the_file(tmp_path):
    weights = write_checkpoint(tmp_path / 'ckpt-1', ut_fac_shapes())
    config, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'ckpt-1'), tmp_path / 'run', None, tiny.config()
    )
    assert report.read == len(weights)
    assert config.model.shared
    assert config.model.encoder.to_dict() == {
        'layers': 2,
        'width': WIDTH,
        'mlp': MLP,
        'heads': HEADS,
        'head_width': HEAD_WIDTH,
    }

    batch = make_batch()
    found = forward(tmp_path / 'run', batch)
    pooled = {}
    for modality in ('video', 'audio'):
        expected = np.stack([unified(weights, modality, x) for x in batch[modality]['data']])
        assert_close(found.encoded[modality].tokens, expected[:, 1:])
        pooled[modality] = expected[:, 0]

    def text_tower(weights, modality, ids):
        return unified(weights, modality, ids)[0]

    pooled['text'] = each_text(text_tower, weights, 'text', batch['text']['data'])
    assert_close(found.encoded['text'].pooled, pooled['text'])
    for (space, modality), expected in fac_spaces(weights, **pooled).items():
        assert_close(found.spaces[space][modality], expected)


@pytest.mark.parametrize('name', TEXT_TOWERS)
def test_other_text_towers_go_in_and_out(tmp_path, name):
    shapes = tx_fac_shapes(TEXT_TOWERS[name])
    weights = write_checkpoint(tmp_path / 'a', shapes, optimizer_state=False)
    config, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert report.read == len(weights)
    assert report.unused == []
    assert report.resized == []
    assert config.model.towers.text.name == name.split('_')[0]

    text = make_batch()['text']
    found = forward(tmp_path / 'run', {'text': text})
    tower = linear_text_tower if name == 'linear' else bert_tower
    expected = each_text(tower, weights, f'{TOWERS}/txt_backbone', text['data'])
    assert_close(found.encoded['text'].pooled, expected)
    assert_close(found.spaces['vat']['text'], dense(weights, f'{HEAD}/txt_to_vat', expected))

    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(weights)
    assert_checkpoint_holds(tmp_path / 'b', weights)


def test_a_final_norm_in_a_file_of_bert_small_is_left_over(tmp_path):
    """Counts of its variables differ by one norm that a post-LN stack does not use."""
    final = norm_shapes(f'{TOWERS}/txt_backbone/base_lm/tx/final_layer_norm', WIDTH)
    write_checkpoint(tmp_path / 'a', tx_fac_shapes(bert_small_shapes) | final)
    config, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config()
    )
    assert report.unused == sorted(final)
    assert not config.model.towers.text.pre_norm
    assert config.model.towers.text.extra


@pytest.mark.parametrize('tower', ['vit', 'wat', 'spt'])
def test_finetuned_towers_and_their_classifier(tmp_path, tower):
    modality = 'video' if tower == 'vit' else 'audio'
    base_config = tiny.config()
    data = make_batch()[modality]['data']
    if tower == 'vit':
        shapes = finetuned_shapes(vit_shapes(FINETUNED, projected=True), POST)
    elif tower == 'wat':
        shapes = finetuned_shapes(wat_shapes(FINETUNED))
    else:
        shapes = finetuned_shapes(spt_shapes(FINETUNED))
        # 7 frames of 9 bands: the last frame and the last band are in no patch.
        mel = {'bins': 9, 'hop': 150, 'window': 256, 'low': 10.0, 'high': 900.0}
        base_config.model.inputs.audio.mel = mel
        data = np.random.default_rng(1).normal(size=(2, 7, 9)).astype(np.float32)

    weights = write_checkpoint(tmp_path / 'ckpt-5', shapes)
    _, report = vatt_tf.import_checkpoint(
        str(tmp_path / 'ckpt-5'), tmp_path / 'run', None, base_config, classes=list('abcde')
    )
    assert report.read == len(weights)
    assert not report.unused

    batch = {modality: {'data': data, 'valid': np.ones(2, bool)}}
    found = forward(tmp_path / 'run', batch).encoded[modality]
    expected = np.stack([own_tower(weights, FINETUNED, tower, x) for x in data])
    assert_close(found.pooled, expected[:, 0])
    assert_close(found.tokens, expected[:, 1:])

    saved = checkpoint.find(tmp_path / 'run')
    classifier = checkpoint.read_model(saved, objective=True)['objective']
    expected_kernel = weights[f'{ROOT}/_ops/cls/kernel'].astype(np.float32)
    np.testing.assert_array_equal(classifier['kernel'], expected_kernel)
    assert checkpoint.read_meta(saved)['info']['labels'] == {'class': list('abcde')}


@pytest.mark.parametrize('modality', ['video', 'audio'])
def test_classifiers_from_a_modality_agnostic_model_are_towers_of_their_own_in_the_file(
    tmp_path, modality
):
    tower, tower_shapes, layers = {
        'video': ('vit', vit_shapes, 2),
        'audio': ('wat', wat_shapes, 1),
    }[modality]
    shapes = tower_shapes(FINETUNED)
    shapes |= dense_shapes(f'{FINETUNED}/pre_proj', WIDTH, WIDTH)
    shapes |= dense_shapes(f'{FINETUNED}/post_proj', WIDTH, POST)
    shapes = finetuned_shapes(shapes, POST)
    weights = write_checkpoint(tmp_path / 'a', shapes, optimizer_state=False)
    config = agnostic_classifier_config(modality)
    config.model.encoder.layers = layers
    _, report = vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', config)
    assert report.read == len(weights)
    assert report.unused == []

    data = make_batch()[modality]['data']
    batch = {modality: {'data': data, 'valid': np.ones(2, bool)}}
    found = forward(tmp_path / 'run', batch).encoded[modality]
    expected = np.stack([own_tower(weights, FINETUNED, tower, x) for x in data])
    assert_close(found.pooled, expected[:, 0])
    assert_close(found.tokens, expected[:, 1:])

    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(tmp_path / 'b')) == len(weights)
    assert_checkpoint_holds(tmp_path / 'b', weights)


@pytest.mark.parametrize('head_width', [8, 96])
def test_heads_of_another_width_need_a_config(tmp_path, monkeypatch, head_width):
    """Two heads of 8 or 96 have the shapes of one head of 16 and of three of 64."""
    monkeypatch.setitem(globals(), 'HEAD_WIDTH', head_width)
    weights = write_checkpoint(tmp_path / 'a', finetuned_shapes(wat_shapes(FINETUNED)))
    prefix = str(tmp_path / 'a')
    if head_width == 8:
        with pytest.raises(ConfigError, match='audio.heads × head_width = 16'):
            vatt_tf.import_checkpoint(prefix, tmp_path / 'run', None, tiny.config())

    config = make_config()
    config.model.head = {'name': 'none'}
    config.objective = {'name': 'classification', 'stream': 'audio'}
    vatt_tf.import_checkpoint(prefix, tmp_path / 'run', config)
    audio = make_batch()['audio']
    found = forward(tmp_path / 'run', {'audio': audio}).encoded['audio'].pooled
    expected = [own_tower(weights, FINETUNED, 'wat', x)[0] for x in audio['data']]
    assert_close(found, expected)


# ---- training
def batch_moments(weights, video):
    """The means and variances that the head's batch norms take in a batch of pooled video."""
    layers = (
        ('vid_to_hid', 'hid_to_va/pre_bn'),
        ('hid_to_va/dense', 'hid_to_va/bn'),
        ('va_to_vat/dense', 'va_to_vat/bn'),
    )
    moments = {}
    x = video
    for layer, norm in layers:
        hidden = dense(weights, f'{HEAD}/{layer}', x)
        moments[f'{HEAD}/{norm}/moving_mean'] = hidden.mean(0)
        moments[f'{HEAD}/{norm}/moving_variance'] = hidden.var(0)
        x = np.maximum(batch_norm({**weights, **moments}, f'{HEAD}/{norm}', hidden), 0)
    return moments


def official_loss(weights, data, text_valid):
    """The mean of both spaces' losses, with statistics of the batch."""
    video_key, audio_key = f'{TOWERS}/vid_backbone/_base', f'{TOWERS}/aud_backbone/_base'
    pooled = {
        'video': np.array([own_tower(weights, video_key, 'vit', x)[0] for x in data['video']]),
        'audio': np.array([own_tower(weights, audio_key, 'wat', x)[0] for x in data['audio']]),
        'text': each_text(t5_tower, weights, f'{TOWERS}/txt_backbone', data['text']),
    }
    weights = {**weights, **batch_moments(weights, pooled['video'])}
    features = fac_spaces(weights, **pooled)
    audio_valid = np.ones(len(text_valid), bool)
    audio_loss = joint_denominator(
        features['va', 'video'], features['va', 'audio'][:, None], audio_valid, 1
    )
    text_loss = joint_denominator(features['vat', 'video'], features['vat', 'text'], text_valid, 1)
    return (audio_loss + text_loss) / 2


def test_training_loss_and_gradient_norm_are_those_of_the_official_weights(tmp_path):
    """The slope of the official loss along our gradient g is the norm of g.

    d/dε L(w + ε g / |g|) at ε = 0 is |g| for g = ∇L(w), and less for any other direction.
    """
    weights = write_checkpoint(tmp_path / 'ckpt', tx_fac_shapes())
    config = make_config()
    for tower in config.model.towers.values():
        tower.update({'dropout': 0.0, 'attention_dropout': 0.0, 'position_dropout': 0.0})
        if tower.name != 't5':
            tower.drop_token = 0.0
    config.objective.update({'padded': True})
    vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', config)

    noise, clips = np.random.default_rng(8), 4
    text_valid = np.array([True, True, False, True])
    every = np.ones(clips, bool)
    text = noise.integers(0, VOCAB, (clips, 2, 6)).astype(np.int32)
    data = {
        'video': noise.normal(size=(clips, 4, 16, 16, 3)).astype(np.float32),
        'audio': noise.normal(size=(clips, 1024)).astype(np.float32),
        'text': text * text_valid[:, None, None],
    }
    batch = {
        'video': {'data': data['video'], 'valid': every},
        'audio': {'data': data['audio'], 'valid': every},
        'text': {'data': data['text'], 'valid': text_valid},
    }
    _, variables = load_run(tmp_path / 'run')
    model, objective = models.build(config.model), objectives.build(config.objective)

    def loss(params):
        rng = Rng.create(0, 0, jnp.arange(clips))
        return objective.loss(model, {**variables, 'params': params}, {}, {}, batch, rng).value

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables['params'])
    chex.assert_tree_all_finite(gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, variables['params'])
    np.testing.assert_allclose(value, official_loss(weights, data, text_valid), rtol=1e-4)

    entries = vatt_tf.layout(vatt_tf.filled(config))
    entries = [entry for entry in entries if entry.ours[0] == 'params']
    flat = {
        ('params', *path): np.asarray(gradient)
        for path, gradient in flatten_dict(gradients).items()
    }
    gradients = parameter_map.to_theirs(flat, entries)
    squares = [np.square(gradient.astype(np.float64)).sum() for gradient in gradients.values()]
    norm = np.sqrt(sum(squares))

    def loss_along_the_gradient(step):
        moved = dict(weights)
        for name, gradient in gradients.items():
            moved[name] = weights[name] + step / norm * gradient
        return official_loss(moved, data, text_valid)

    slope = (loss_along_the_gradient(1e-5) - loss_along_the_gradient(-1e-5)) / 2e-5
    np.testing.assert_allclose(norm, slope, rtol=1e-3)


def test_an_imported_run_is_evaluated_and_fine_tuned(tmp_path):
    """--mode=eval on what was imported; init_from in a classifier of one modality.

    The classifier's first step has rate 0, so that its export holds what the release takes over
    from its modality-agnostic model, and the classifier.
    """
    import data_pipelines
    import run
    from vatt_jax.training import loop

    weights = write_checkpoint(tmp_path / 'ckpt', ut_fac_shapes())
    config = agnostic_config()
    config.evals = {
        'retrieval': {
            'type': 'retrieval',
            'limit': 12,
            'pairs': (('audio', 'video', 'va'),),
            'baseline': False,
        }
    }
    config.compute_dtype = 'bfloat16'  # as in configs/vatt.py: evaluated in float32 all the same
    vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', config)
    audio = make_batch()['audio']['data'] / 8
    found = vatt_jax.load(tmp_path / 'run').embed(audio=audio)['audio']['pooled']
    assert_close(found, [unified(weights, 'audio', x)[0] for x in audio])

    run.main(['--mode=eval', f'--workdir={tmp_path / "run"}'])
    results = tmp_path / 'run' / 'evals' / 'step_000000' / 'results.json'
    scalars = json.loads(results.read_text())['retrieval']['scalars']
    assert 1 <= scalars['audio_to_video/median_rank'] <= 12

    config = agnostic_classifier_config('video')
    config.init_from = str(tmp_path / 'run')
    config.steps = 1
    config.optimizer.name = 'keras_sgd'
    config.optimizer.schedule.update({'name': 'vatt', 'levels': ((1, 1e-3), (2, 0.0))})
    config.evals = {}
    loop.train(config, data_pipelines.open(config), tmp_path / 'tuned', quiet=True)
    vatt_tf.export_checkpoint(tmp_path / 'tuned', str(tmp_path / 'out'))
    shapes, read = vatt_tf.open_checkpoint(str(tmp_path / 'out'))

    expected = {f'{FINETUNED}/agg_embedding': weights[f'{UNIFIED}/vid_agg_embedding']}
    parts = {
        'raw_to_embeddings/video': 'voxel_to_patch',
        'pre_proj/video': 'pre_proj',
        'post_proj/video': 'post_proj',
        'tx': 'tx',
        'pos_embedding_lookup/video': 'pos_embedding_lookup',
    }
    for agnostic, own in parts.items():
        prefix = f'{UNIFIED}/{agnostic}/'
        for name, value in weights.items():
            if name.startswith(prefix):
                expected[f'{FINETUNED}/{own}/{name.removeprefix(prefix)}'] = value
    kernel, bias = f'{ROOT}/_ops/cls/kernel', f'{ROOT}/_ops/cls/bias'
    assert set(shapes) == {*expected, kernel, bias}
    assert shapes[kernel][0] == POST
    chex.assert_trees_all_equal(
        {name: read(name) for name in expected},
        {name: value.astype(np.float32) for name, value in expected.items()},
    )


# ---- exports
@pytest.mark.parametrize('model', ['tx', 'ut', 'wat'])
def test_round_trip_is_exact(tmp_path, model):
    if model == 'tx':
        shapes = tx_fac_shapes()
    elif model == 'ut':
        shapes = ut_fac_shapes()
    else:
        shapes = finetuned_shapes(wat_shapes(FINETUNED))
    weights = write_checkpoint(tmp_path / 'a', shapes, optimizer_state=False)
    vatt_tf.import_checkpoint(str(tmp_path / 'a'), tmp_path / 'run', None, tiny.config())
    exported = tmp_path / 'out' / 'b'
    assert vatt_tf.export_checkpoint(tmp_path / 'run', str(exported)) == len(weights)
    assert_checkpoint_holds(exported, weights)


def test_an_exported_checkpoint_is_restored_by_tensorflow_object_by_object(tmp_path):
    import tensorflow as tf

    values = np.arange(3, dtype=np.float32)
    vatt_tf.write_checkpoint(str(tmp_path / 'c'), {f'{FINETUNED}/agg_embedding': values})
    tower, layer, model = tf.Module(), tf.Module(), tf.Module()
    tower.agg_embedding = tf.Variable(np.zeros(3, np.float32))
    layer._base = tower
    setattr(model, 'layer_with_weights-0', layer)
    tf.train.Checkpoint(model=model).read(str(tmp_path / 'c')).assert_consumed()
    np.testing.assert_array_equal(tower.agg_embedding.numpy(), [0, 1, 2])


def test_position_tables_of_another_length_are_resized(tmp_path):
    """8 patches of sound where the table has 16 rows: a natural cubic spline through them."""
    interpolate = pytest.importorskip('scipy.interpolate')
    weights = write_checkpoint(tmp_path / 'ckpt', tx_fac_shapes())
    config = make_config()
    config.model.inputs.audio.samples = 512
    _, report = vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', config)
    positions = f'{TOWERS}/aud_backbone/_base/pos_embedding_lookup'
    table = f'{positions}/temporal_position_embeddings/embeddings'
    assert report.resized == [f'{table}: 16 → 8 rows']

    params = checkpoint.read_model(checkpoint.find(tmp_path / 'run'))['params']
    found = params['fronts_audio']['positions']['temporal_positions']
    spline = interpolate.CubicSpline(np.arange(16), weights[table], bc_type='natural')
    chex.assert_shape(found, (8, WIDTH))
    np.testing.assert_allclose(found, spline(np.arange(8) * 2), atol=1e-5)


# ---- what does not fit
@pytest.fixture(scope='module')
def pretrained_checkpoint(tmp_path_factory):
    """The prefix of a file of the modality-specific model."""
    prefix = tmp_path_factory.mktemp('pretrained') / 'ckpt'
    write_checkpoint(prefix, tx_fac_shapes())
    return str(prefix)


@pytest.fixture(scope='module')
def finetuned_checkpoint(tmp_path_factory):
    """The prefix of a file of a fine-tuned video tower with projections."""
    prefix = tmp_path_factory.mktemp('finetuned') / 'ckpt'
    write_checkpoint(prefix, finetuned_shapes(vit_shapes(FINETUNED, projected=True), POST))
    return str(prefix)


@pytest.mark.parametrize(
    'changes, message',
    [
        pytest.param(
            {'model.towers.video.width': 16},
            r'voxel_to_patch/kernel has shape \[2, 8, 8, 3, 12\], '
            r'this config expects \[2, 8, 8, 3, 16\].*config.model.towers.video.width',
            id='width',
        ),
        pytest.param({'model.head.va': 15}, r'config.model.head.va', id='space'),
        pytest.param(
            {'model.towers.text.vocab': 31},
            r'embedding/embeddings has shape \[30, 10\].*config.model.towers.text.vocab',
            id='vocabulary',
        ),
        pytest.param(
            {'model.towers.audio.layers': 2},
            r'lacks 16 of the .* variables this config expects: .*/layers/1/layer_norm/gamma',
            id='more layers: variables',
        ),
        pytest.param(
            {'model.towers.audio.layers': 2},
            r'config.model.towers.audio.layers=2 \(checkpoint: 1\)',
            id='more layers: field',
        ),
        pytest.param(
            {'model.towers.video.layers': 1},
            r'config.model.towers.video.layers=1 \(checkpoint: 2\)(.|\n)*'
            r'not used: .*/tx/layers/1/',
            id='fewer layers',
        ),
        pytest.param(
            {'model.towers.audio.patch': 32},
            r'config.model.towers.audio.patch=32 .*(.|\n)*\[64, 1, 12\].*'
            r'set config.model.towers.audio.patch',
            id='patch',
        ),
        pytest.param(
            {'model.towers.audio.post': 8},
            r'config.model.towers.audio.post=8 \(checkpoint: 0\)(.|\n)*post_proj/kernel',
            id='projection',
        ),
        pytest.param(
            {
                'model.towers.audio': {'name': 'spt', 'patch': (2, 5), 'width': WIDTH},
                'model.inputs.audio.mel': {
                    'bins': 10,
                    'hop': 16,
                    'window': 32,
                    'low': 10.0,
                    'high': 900.0,
                },
            },
            r"config.model.towers.audio.name='spt' \(checkpoint: 'wat'\)(.|\n)*"
            r'lacks .*spectrum_to_patch/kernel(.|\n)*not used: .*/aud_backbone/_base/',
            id='tower',
        ),
        pytest.param(
            {'objective': {'name': 'classification', 'stream': 'video', 'label': 'class'}},
            'is pretrained',
            id='objective',
        ),
    ],
)
def test_what_does_not_fit_is_named(pretrained_checkpoint, tmp_path, changes, message):
    config = set_fields(make_config(), changes)
    with pytest.raises(ConfigError, match=message):
        vatt_tf.import_checkpoint(pretrained_checkpoint, tmp_path / 'run', config)


def test_all_that_does_not_fit_is_in_one_message(tmp_path):
    """Fields that differ, what is missing, wrong shapes with their fields, and the unused."""
    official = tx_fac_shapes()
    shapes = {
        name: shape
        for name, shape in official.items()
        if 'txt_backbone/base_lm/layers/1/' not in name
    }
    shapes['model/odd'] = (3,)
    write_checkpoint(tmp_path / 'ckpt', shapes)
    changes = {
        'model.towers.video.width': 16,
        'model.head.vat': 7,
        'model.towers.audio.layers': 6,
    }
    config = set_fields(make_config(), changes)
    with pytest.raises(ConfigError) as error:
        vatt_tf.import_checkpoint(str(tmp_path / 'ckpt'), tmp_path / 'run', config)

    first, missing, *wrong, more, unused = str(error.value).split('\n')
    assert 'video.width=16 (checkpoint: 12)' in first
    assert 'audio.layers=6 (checkpoint: 1)' in first
    assert 'text.layers=2 (checkpoint: 1)' in first
    assert 'head.vat=7 (checkpoint: 6)' in first
    # Layers of sound, 16 variables each, and of text, 9; the first five are named.
    assert missing.startswith(f'lacks {5 * 16 + 9} of the ')
    assert missing.endswith(f', and {5 * 16 + 9 - 5} more')
    assert missing.count('/aud_backbone/_base/tx/layers/') == 5
    assert unused == 'not used: model/odd'

    expected = {}
    for name, shape in official.items():
        if ('/vid_backbone/' in name and WIDTH in shape) or VAT in shape:
            expected[name] = shape
    expected[f'{HEAD}/vid_to_hid/kernel'] = (WIDTH, VA)
    assert more == f'and {len(expected) - 5} more shapes that do not fit'
    assert len(wrong) == 5
    for line in wrong:
        shape = list(expected[line.split()[0]])
        assert f'has shape {shape}, this config expects' in line
        assert '; set config.model.' in line


@pytest.mark.parametrize(
    'make, changes, message',
    [
        pytest.param(
            make_config,
            {},
            r'config.model.towers.video.pre=False \(checkpoint: True\), '
            r'config.model.towers.video.post=0 \(checkpoint: 18\)',
            id='projections',
        ),
        pytest.param(
            make_config,
            {
                'model.towers.video.pre': True,
                'model.towers.video.post': POST,
                'objective.stream': 'audio',
            },
            r"config.objective.stream='audio' \(checkpoint: video\)",
            id='modality',
        ),
        pytest.param(
            functools.partial(agnostic_classifier_config, 'video'),
            {'model.encoder.layers': 3},
            r'config.model.encoder.layers=3 \(checkpoint: 2\)',
            id='layers of a shared encoder',
        ),
        pytest.param(
            make_config,
            {'model.towers.video': {'name': 's3d'}},
            'the official layout of vit, wat, spt, i3d, resnet2d is known',
            id='tower',
        ),
    ],
)
def test_what_does_not_fit_a_finetuned_checkpoint_is_named(
    finetuned_checkpoint, tmp_path, make, changes, message
):
    config = make()
    config.model.head = {'name': 'none'}
    config.objective = {'name': 'classification', 'stream': 'video', 'label': 'class'}
    set_fields(config, changes)
    with pytest.raises(ConfigError, match=message):
        vatt_tf.import_checkpoint(finetuned_checkpoint, tmp_path / 'run', config)


# ---- the command line, and the layout
def test_the_command_line_lists_unused_variables_and_takes_a_vocabulary(tmp_path, capsys):
    from vatt_jax.importers.__main__ import main

    unused = f'{TOWERS}/vid_backbone/_base/mask_embedding'
    write_checkpoint(tmp_path / 'ckpt', tx_fac_shapes() | {unused: (WIDTH,)})
    words = ['<pad>', 'red', '<unk>', *(f'w{i}' for i in range(VOCAB - 3))]
    (tmp_path / 'words').write_text('\n'.join(words))
    (tmp_path / 'small.py').write_text(
        'from tests import test_importers\nget_config = test_importers.make_config\n'
    )
    main(
        [
            f'--checkpoint={tmp_path / "ckpt"}',
            f'--out={tmp_path / "run"}',
            f'--config={tmp_path / "small.py"}',
            f'--vocabulary={tmp_path / "words"}',
        ]
    )
    printed = capsys.readouterr().out
    assert f'not used: {unused}' in printed
    assert 'missing: none' in printed
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert saved['model']['towers']['video']['width'] == WIDTH

    model = vatt_jax.load(tmp_path / 'run')
    chex.assert_shape(model.embed(text='red w0 nothing')['text']['vat'], (VAT,))
    np.testing.assert_array_equal(model.tokenizer.encode(['Red w0, nothing!'], 4), [[1, 3, 2, 0]])

    main([f'--export={tmp_path / "run"}', f'--out={tmp_path / "back"}'])
    assert f'{len(tx_fac_shapes())} variables' in capsys.readouterr().out
    assert (tmp_path / 'back.index').exists()
    with pytest.raises(ConfigError, match=r'no file .*nothing.index; there are .*ckpt'):
        main([f'--checkpoint={tmp_path / "nothing"}', f'--out={tmp_path / "x"}'])


def test_the_layout_knows_linear_text_and_refuses_towers_of_mmv():
    from vatt_jax import config as configs
    from vatt_jax.models import presets

    config = configs.load('configs/vatt.py:bbs')
    config.model.towers.text = presets.tower('linear')
    names = {entry.theirs for entry in vatt_tf.layout(vatt_tf.filled(config))}
    assert set(linear_text_shapes(f'{TOWERS}/txt_backbone')) <= names

    config = configs.load('configs/vatt.py:mmv')
    config.model.towers.audio = presets.tower('resnet9')
    message = "towers.audio.name='resnet9': the official layout of vit, wat, spt, i3d"
    with pytest.raises(ConfigError, match=message):
        list(vatt_tf.layout(vatt_tf.filled(config)))
