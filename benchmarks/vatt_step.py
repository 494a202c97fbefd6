"""VATT's pretraining step, ours against a plain TensorFlow 2 restatement of the official one.

    python benchmarks/vatt_step.py                        # 6 rounds of 6 steps for each variant;
                                                          # leave the machine alone meanwhile
    python benchmarks/vatt_step.py --rounds=1 --block=2   # to see that it runs

Both sides, interleaved on this CPU: 4 clips of 16×112×112 frames, 32768 samples and 5 sentences of
16 words; three towers of 4 layers, width 256, 4 heads of 64, MLP 1024; FAC head 512/256, asymmetric
NCE, dropout 0.1, Adam as Keras writes it, float32, frozen word table of 65536 × 300; with DropToken
0.5 and without. They start from the same floats (our device stage from uint8 is a variant of its
own) and the same weights: without dropout their losses agree, which is checked first. Both use the
heap that run.py sets up. The restatement does what the official code does: convolutions for
patches, stateful random bits, every token in every layer, Keras's Adam by its own op, NaN gradients
to zero, one tf.function.

Ours, `all tokens`, does the same work; `first token` computes in the last layer what the loss reads
(keys and values of all tokens, the rest for the aggregate token), which is exact. GFLOP/s are those
of the whole step (all tokens, forward and backward, matrix products only) for every variant, so a
variant that does less shows more; the peak is the best of both frameworks' 2048³ products in the
same run. Wall and CPU seconds: the minimum over steps, and over blocks. Writes
benchmarks/results/vatt_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# The faster setting for the official step.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from support import repository

import data_pipelines
from configs import default
from vatt_jax.importers import parameter_map, vatt_tf
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.modes import process
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

# As every run on the CPU does; both sides share the heap. Before they compute.
process.keep_freed_memory()

RESULTS = repository.RESULTS / 'vatt_step.json'
BATCH, FRAMES, SIZE, SAMPLES, SENTENCES, WORDS = 4, 16, 112, 32768, 5, 16
LAYERS, WIDTH, HEADS, HEAD_WIDTH, MLP, WORD_WIDTH = 4, 256, 4, 64, 1024, 300
VOXEL, WAVE = (4, 16, 16), 128
HIDDEN, VIDEO_AUDIO, VIDEO_TEXT = 512, 512, 256
LEARNING_RATE, DROPOUT = 1e-4, 0.1
MODALITIES = ('video', 'audio', 'text')
OFFICIAL = 'official, TensorFlow 2'
# Variant -> options of Ours; the last needs no second row without DropToken.
OUR_VARIANTS = {
    'ours, all tokens': {'every_token': True},
    'ours, first token': {},
    'ours, first token, from uint8': {'floats': False},
}
FROM_BYTES = 'ours, first token, from uint8'


def make_config(drop_token: float = 0.5, dropout: float = DROPOUT) -> ConfigDict:
    """The config of the step described above."""
    config = default.get_config()
    config.name, config.steps, config.batch_size = 'vatt_step', 1000, BATCH
    config.model.inputs.video.update({'frames': FRAMES, 'size': SIZE})
    config.model.inputs.audio.update({'samples': SAMPLES})
    size = {
        'layers': LAYERS,
        'width': WIDTH,
        'mlp': MLP,
        'heads': HEADS,
        'head_width': HEAD_WIDTH,
        'dropout': dropout,
        'attention_dropout': dropout,
    }
    patched = {**size, 'drop_token': drop_token, 'position_dropout': dropout}
    config.model.towers = ConfigDict(
        {
            'video': {'name': 'vit', **patched},
            'audio': {'name': 'wat', **patched},
            'text': {'name': 't5', **size},
        }
    )
    config.objective = ConfigDict({'name': 'contrastive', 'form': 'asymmetric', 'padded': True})
    config.optimizer.name, config.optimizer.eps = 'keras_adam', 1e-7
    config.optimizer.schedule.update({'name': 'constant', 'peak': LEARNING_RATE, 'warmup': 0})
    config.data.source, config.data.synthetic_size = 'synthetic', 8
    config.mesh.replica = 1
    return config


def make_inputs() -> dict[str, np.ndarray]:
    """Noise in the shape of a batch; one sentence of each clip is padded."""
    rng = np.random.default_rng(0)
    text = rng.integers(1, 1 << 16, (BATCH, SENTENCES, WORDS)).astype(np.int32)
    text[:, 1, 9:] = 0
    return {
        'video': rng.uniform(-1, 1, (BATCH, FRAMES, SIZE, SIZE, 3)).astype(np.float32),
        'audio': rng.uniform(-1, 1, (BATCH, SAMPLES)).astype(np.float32),
        'text': text,
    }


def host_batch(inputs: dict[str, np.ndarray], floats: bool = True) -> dict:
    """The batch as a reader of ours gives it; with floats=False as bytes, for the device stage."""
    valid = np.ones(BATCH, bool)
    video = {'data': inputs['video'], 'valid': valid}
    audio = {'data': inputs['audio'], 'valid': valid}
    text = {'data': inputs['text'], 'valid': valid, 'mask': np.ones((BATCH, SENTENCES), bool)}
    if not floats:
        video['data'] = ((inputs['video'] + 1) * 127).astype(np.uint8)
        video['box'] = np.tile(np.float32([0, 0, 1, 1]), (BATCH, 1))
        video['flip'] = ~valid
        audio['data'] = (inputs['audio'] * 32767).astype(np.int16)
    return {
        'video': video,
        'audio': audio,
        'text': text,
        'index': np.arange(BATCH, dtype=np.int32),
        'source': np.zeros(BATCH, np.int32),
        'position': np.arange(BATCH),
        'valid': valid,
    }


# ---- the official step in TensorFlow 2: official names (vatt_jax/importers/vatt_tf.py), layer by
# layer


class Official(tf.Module):
    """The official model, loss and optimizer.

    Args:
        weights: {official key: array}.
        drop_token: share of tokens dropped.
        dropout: rate of every dropout.
        train: False for the comparison of losses: no dropout, running statistics.
    """

    def __init__(self, weights, drop_token: float, dropout: float = DROPOUT, train: bool = True):
        super().__init__()
        self.drop_token, self.rate, self.train = drop_token, dropout, train
        self.weights = {}
        for key, value in weights.items():
            frozen = key.endswith(('embedding/embeddings', 'moving_mean', 'moving_variance'))
            name = key.replace('/', '.')
            self.weights[key] = tf.Variable(value, trainable=not frozen, name=name)
        self.trained = [weight for weight in self.weights.values() if weight.trainable]
        self.first_moments = self.moments()
        self.second_moments = self.moments()
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False)

    def moments(self) -> list[tf.Variable]:
        """Zeros for every trained weight."""
        return [tf.Variable(tf.zeros_like(weight), trainable=False) for weight in self.trained]

    def drop(self, x):
        """Dropout in training."""
        return tf.nn.dropout(x, self.rate) if self.train and self.rate else x

    def dense(self, key: str, x):
        """A product with a kernel, and a bias where there is one."""
        y = tf.tensordot(x, self.weights[f'{key}/kernel'], 1)
        return y + self.weights[f'{key}/bias'] if f'{key}/bias' in self.weights else y

    def norm(self, key: str, x):
        """T5's root mean square norm or a layer norm, by the names of the weights."""
        if f'{key}/weight' in self.weights:
            mean_square = tf.reduce_mean(tf.square(x), -1, keepdims=True)
            return x * tf.math.rsqrt(mean_square + 1e-6) * self.weights[f'{key}/weight']
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        offset, scale = self.weights[f'{key}/beta'], self.weights[f'{key}/gamma']
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, 1e-6)

    def heads(self, key: str, x):
        """[B N D] -> [B N heads head_width]."""
        return tf.reshape(self.dense(key, x), [tf.shape(x)[0], -1, HEADS, HEAD_WIDTH])

    def attend(self, key: str, x, bias, scale: float):
        """Self-attention of x: [B N D]."""
        query, keys = self.heads(f'{key}/q', x), self.heads(f'{key}/k', x)
        logits = tf.einsum('bqhd,bkhd->bhqk', query, keys) * scale
        if bias is not None:
            logits = logits + bias
        probabilities = self.drop(tf.nn.softmax(logits))
        out = tf.einsum('bhqk,bkhd->bqhd', probabilities, self.heads(f'{key}/v', x))
        return self.dense(f'{key}/o', tf.reshape(out, [tf.shape(x)[0], -1, HEADS * HEAD_WIDTH]))

    def stack(self, key: str, x, norm: str, attention: str, bias=None, scale=HEAD_WIDTH**-0.5):
        """All layers and the final norm; `norm` and `attention` are the names in a layer."""
        for i in range(LAYERS):
            layer = f'{key}/layers/{i}'
            y = self.norm(f'{layer}/{norm}', x)
            x += self.drop(self.attend(f'{layer}/{attention}', y, bias, scale))
            y = self.norm(f'{layer}/feed_forward/layer_norm', x)
            y = self.drop(tf.nn.gelu(self.dense(f'{layer}/feed_forward/mlp/wi', y)))
            x += self.drop(self.dense(f'{layer}/feed_forward/mlp/wo', y))
        return self.drop(self.norm(f'{key}/final_layer_norm', x))

    def with_aggregate(self, key: str, x):
        """x: [B N D]. Returns [B 1+N D], the aggregate token first."""
        token = self.weights[f'{key}/agg_embedding'][None, None]
        return tf.concat([tf.tile(token, [x.shape[0], 1, 1]), x], 1)

    def position_embeddings(self, key: str, grid, axes: tuple[str, ...]):
        """The sum of one embedding for each axis: [tokens, D]."""
        indices = tf.meshgrid(*(tf.range(size) for size in grid), indexing='ij')
        indices = tf.reshape(tf.stack(indices, -1), [-1, len(axes)])
        embeddings = []
        for i, axis in enumerate(axes):
            table = self.weights[f'{key}/{axis}_position_embeddings/embeddings']
            embeddings.append(tf.gather(table, indices[:, i]))
        return tf.add_n(embeddings)

    def patch_tower(self, key: str, name: str, x, axes: tuple[str, ...]):
        """A tower of patches; `name`: that of the convolution. Returns [B D]."""
        kernel = self.weights[f'{key}/{name}/kernel']
        strides = list(kernel.shape[:-2])
        x = tf.nn.convolution(x, kernel, strides=strides, padding='VALID')
        x = x + self.weights[f'{key}/{name}/bias']
        grid = x.shape[1:-1]
        positions = self.position_embeddings(f'{key}/pos_embedding_lookup', grid, axes)
        positions = self.norm(f'{key}/pos_embedding_lookup/layernorm', positions)
        x = self.drop(tf.reshape(x, [BATCH, -1, WIDTH]) + positions)
        if self.train and self.drop_token:
            tokens = int(np.prod(grid))
            kept = tf.random.shuffle(tf.range(tokens))[: int((1 - self.drop_token) * tokens)]
            x = tf.gather(x, kept, axis=1)
        x = self.with_aggregate(key, x)
        return self.stack(f'{key}/tx', x, 'layer_norm', 'mha')[:, 0]

    def text_tower(self, key: str, ids):
        """ids: [B K W]. Returns [B·K D]."""
        ids = tf.reshape(ids, [-1, WORDS])
        x = tf.nn.embedding_lookup(self.weights[f'{key}/embedding/embeddings'], ids)
        x = self.with_aggregate(key, x)
        x = self.drop(tf.nn.gelu(self.dense(f'{key}/pre_proj', x)))
        mask = tf.pad(tf.cast(ids != 0, tf.float32), [[0, 0], [1, 0]], constant_values=1.0)
        attention = 'self_attention/attention'
        table = self.weights[
            f'{key}/base_lm/layers/0/{attention}/relative_attention_bias/embeddings'
        ]
        relative = tf.transpose(tf.gather(table, self.buckets), [2, 0, 1])[None]
        bias = relative + (mask[:, None, None] - 1) * 1e9
        norm = 'self_attention/layer_norm'
        return self.stack(f'{key}/base_lm', x, norm, attention, bias, 1.0)[:, 0]

    @functools.cached_property
    def buckets(self) -> np.ndarray:
        """T5's buckets of distances between tokens: int32 [1+W 1+W]."""
        tokens = np.arange(WORDS + 1)
        signed = tokens[None] - tokens[:, None]
        distance = np.abs(signed)
        far = 8 + (np.log(np.maximum(distance, 1) / 8) / np.log(64 / 8) * 8).astype(int)
        bucket = np.where(distance < 8, distance, np.minimum(far, 15))
        return (bucket + 16 * (signed > 0)).astype(np.int32)

    def batch_norm(self, key: str, x):
        """Batch norm, which updates its running statistics in training."""
        if not self.train:
            mean = self.weights[f'{key}/moving_mean']
            variance = self.weights[f'{key}/moving_variance']
        else:
            mean, variance = tf.nn.moments(x, [0])
            for name, new in (('moving_mean', mean), ('moving_variance', variance)):
                running = self.weights[f'{key}/{name}']
                running.assign(0.9 * running + 0.1 * new)
        offset, scale = self.weights[f'{key}/beta'], self.weights[f'{key}/gamma']
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, 1e-5)

    def loss(self, video, audio, text):
        """Towers, FAC head and the mean of both losses."""
        base = f'{vatt_tf.ROOT}/_base_layer'
        head = f'{vatt_tf.ROOT}/_head_layer/_bridge_heads/0'
        axes = ('temporal', 'vertical', 'horizontal')
        video = self.patch_tower(f'{base}/vid_backbone/_base', 'voxel_to_patch', video, axes)
        audio = self.patch_tower(
            f'{base}/aud_backbone/_base', 'wave_to_patch', audio[..., None], ('temporal',)
        )
        text = self.text_tower(f'{base}/txt_backbone', text)

        hidden = self.dense(f'{head}/vid_to_hid', video)
        video_va = tf.nn.relu(self.batch_norm(f'{head}/hid_to_va/pre_bn', hidden))
        video_va = self.dense(f'{head}/hid_to_va/dense', video_va)
        video_va = self.batch_norm(f'{head}/hid_to_va/bn', video_va)
        video_vat = self.dense(f'{head}/va_to_vat/dense', tf.nn.relu(video_va))
        video_vat = self.batch_norm(f'{head}/va_to_vat/bn', video_vat)
        audio_va = self.dense(f'{head}/aud_to_va', audio)
        text_vat = self.dense(f'{head}/txt_to_vat', text)
        return (self.nce(video_va, audio_va) + self.nce(video_vat, text_vat)) / 2

    def nce(self, x, y):
        """MIL-NCE of x [B E] against y [B·K E], both directions in one denominator."""
        x, y = tf.math.l2_normalize(x, -1), tf.math.l2_normalize(y, -1)
        y = tf.reshape(y, [BATCH, -1, y.shape[-1]])
        scores = tf.einsum('be,ake->bak', x, y) / 0.07
        own = tf.stack([scores[i, i] for i in range(BATCH)])
        positive = tf.reduce_logsumexp(own, -1)
        forward = tf.reshape(scores, [BATCH, -1])
        backward = tf.reshape(tf.transpose(scores, [1, 0, 2]), [BATCH, -1])
        both = tf.concat([forward, backward], 1)
        return tf.reduce_mean(tf.reduce_logsumexp(both, 1) - positive)

    @tf.function
    def step(self, video, audio, text):
        """One step of training. Returns its loss."""
        with tf.GradientTape() as tape:
            loss = self.loss(video, audio, text)
        gradients = tape.gradient(loss, self.trained)
        self.count.assign_add(1)
        count = tf.cast(self.count, tf.float32)
        for weight, first, second, gradient in zip(
            self.trained, self.first_moments, self.second_moments, gradients, strict=True
        ):
            gradient = tf.convert_to_tensor(gradient)
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=0.9**count,
                beta2_power=0.999**count,
                lr=LEARNING_RATE,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-7,
                grad=tf.where(tf.math.is_nan(gradient), 0.0, gradient),
            )
        return loss


# ---- ours


def with_every_token(method, args, kwargs, context):
    """Has the last layers compute all tokens; for nn.intercept_methods."""
    if context.method_name == 'encode_all':
        kwargs = {**kwargs, 'features': True}
    return method(*args, **kwargs)


def not_in_training(method, args, kwargs, context):
    """Has a model not train, whatever the objective asks for; for nn.intercept_methods."""
    if 'train' in kwargs:
        kwargs = {**kwargs, 'train': False}
    return method(*args, **kwargs)


def as_called(method, args, kwargs, context):
    """Changes nothing; for nn.intercept_methods."""
    return method(*args, **kwargs)


class Ours:
    """Our compiled step.

    Args:
        config: of make_config.
        inputs: of make_inputs.
        every_token: the last layer computes all tokens, as the official one does.
        floats: without the device stage.
    """

    def __init__(
        self, config: ConfigDict, inputs: dict, every_token: bool = False, floats: bool = True
    ):
        built = loop.build(config, data_pipelines.open(config))
        self.built = built
        self.state = built.init()
        with jax.set_mesh(built.mesh):
            step = jax.jit(
                train_step.make(config, built.model, built.objective, built.tx),
                donate_argnums=0,
                in_shardings=(built.shardings, sharding.batch_sharding(built.mesh)),
                out_shardings=(built.shardings, sharding.replicated(built.mesh)),
            )
            self.batch = feature_extractor.place_on_mesh(host_batch(inputs, floats), built.mesh)
            stages = preprocess.STAGES
            if floats:
                preprocess.STAGES = {}
            with nn.intercept_methods(with_every_token if every_token else as_called):
                lowered = step.lower(self.state, self.batch)
            self.compiled = lowered.compile()
            preprocess.STAGES = stages

    def step(self) -> float:
        """One step of training. Returns its loss."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics['loss'])

    def compiled_gflop(self) -> float:
        """GFLOP of the compiled step, as the compiler counts."""
        return self.compiled.cost_analysis().get('flops', 0) / 1e9


def official_weights(config: ConfigDict, state) -> dict[str, np.ndarray]:
    """The weights of a state of ours under their official names."""
    collections = {'params': state.params['model'], 'batch_stats': state.batch_stats}
    ours = {}
    for collection, tree in collections.items():
        for path, value in flatten_dict(jax.device_get(tree)).items():
            ours[(collection, *path)] = value
    return parameter_map.to_theirs(ours, list(vatt_tf.layout(vatt_tf.filled(config))))


def losses_without_dropout(config: ConfigDict, inputs: dict, ours: Ours) -> tuple[float, float]:
    """(official, ours) of one batch, without DropToken and with a fresh model's statistics."""
    weights = official_weights(config, ours.state)
    official = Official(weights, drop_token=0.0, dropout=0.0, train=False)
    official_loss = official.loss(*(tf.constant(inputs[modality]) for modality in MODALITIES))

    batch = jax.tree.map(jnp.asarray, host_batch(inputs))
    variables = {'params': ours.state.params['model'], 'batch_stats': ours.state.batch_stats}

    @jax.jit
    def our_loss():
        rng = Rng.create(0, 0, jnp.arange(BATCH))
        return ours.built.objective.loss(ours.built.model, variables, {}, {}, batch, rng).value

    with nn.intercept_methods(not_in_training):
        return float(official_loss), float(our_loss())


# ---- matrix products


def tower_flop(rows: int, tokens: int, patch: int, all_tokens: int) -> float:
    """Of one tower, forward and backward.

    A product costs twice as much backward, but for the patches, whose input has no gradient.

    Args:
        rows: clips or sentences.
        tokens: those that DropToken leaves, and the aggregate token.
        patch: numbers in a patch.
        all_tokens: those that are projected.
    """
    inner = HEADS * HEAD_WIDTH
    projections = 8 * tokens * WIDTH * inner
    attention = 4 * tokens * tokens * inner
    mlp = 4 * tokens * WIDTH * MLP
    layer = projections + attention + mlp
    patches = 2 * all_tokens * patch * WIDTH
    return rows * (3 * LAYERS * layer + 2 * patches)


def step_gflop(drop_token: float) -> float:
    """GFLOP of the matrix products of one official step, 2 FLOP per multiplication and addition.

    Every token is projected; those that are kept are in every layer.
    """
    video_tokens = FRAMES // VOXEL[0] * (SIZE // VOXEL[1]) ** 2
    audio_tokens = SAMPLES // WAVE
    kept_video = int((1 - drop_token) * video_tokens) + 1
    kept_audio = int((1 - drop_token) * audio_tokens) + 1
    video = tower_flop(BATCH, kept_video, math.prod(VOXEL) * 3, video_tokens)
    audio = tower_flop(BATCH, kept_audio, WAVE, audio_tokens)

    sentences = BATCH * SENTENCES
    word_projection = 3 * 2 * sentences * (WORDS + 1) * WORD_WIDTH * WIDTH
    text = tower_flop(sentences, WORDS + 1, 0, 0) + word_projection

    of_video = WIDTH * HIDDEN + HIDDEN * VIDEO_AUDIO + VIDEO_AUDIO * VIDEO_TEXT
    of_audio = WIDTH * VIDEO_AUDIO
    of_text = WIDTH * VIDEO_TEXT
    head = 3 * 2 * (BATCH * (of_video + of_audio) + sentences * of_text)
    return (video + audio + text + head) / 1e9


# ---- timing


def timed(step: Callable[[], object], times: int) -> tuple[list[float], float]:
    """(wall seconds of each, CPU seconds of the mean) of `times` calls."""
    wall = []
    cpu_began = time.process_time()
    for _ in range(times):
        began = time.perf_counter()
        step()
        wall.append(time.perf_counter() - began)
    return wall, (time.process_time() - cpu_began) / times


class Peak:
    """GFLOP/s of n³ float32 products by the faster framework; to be measured now and then."""

    def __init__(self, size: int = 2048):
        self.flop = 2 * size**3
        matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
        self.jax_matrix, self.tf_matrix = jnp.asarray(matrix), tf.constant(matrix)
        self.jax_matmul, self.tf_matmul = jax.jit(jnp.matmul), tf.function(tf.matmul)
        self.in_jax()
        self.in_tensorflow()

    def in_jax(self) -> None:
        """One product."""
        self.jax_matmul(self.jax_matrix, self.jax_matrix).block_until_ready()

    def in_tensorflow(self) -> None:
        """One product."""
        self.tf_matmul(self.tf_matrix, self.tf_matrix).numpy()

    def measure(self) -> float:
        """The best of three products of each."""
        fastest = min(min(timed(call, 3)[0]) for call in (self.in_jax, self.in_tensorflow))
        return self.flop / 1e9 / fastest


# ---- the table


def describe(drop_token: float) -> str:
    """What a variant's name begins with."""
    return f'DropToken {drop_token}' if drop_token else 'no DropToken'


def build_variants(
    inputs: dict, chosen: str
) -> tuple[dict[str, Callable[[], float]], dict[str, float], dict[str, float | None]]:
    """Compiles every variant whose name has `chosen` in it, and makes its first step.

    Returns:
        By name: steps, the DropToken of each, and GFLOP of those that are compiled by XLA.
    """
    steps, drop_tokens, compiled_gflop = {}, {}, {}
    for drop_token in (0.5, 0.0):
        config = make_config(drop_token)
        for variant in (OFFICIAL, *OUR_VARIANTS):
            name = f'{describe(drop_token)}: {variant}'
            if chosen not in name or (variant == FROM_BYTES and not drop_token):
                continue
            began = time.perf_counter()
            if variant == OFFICIAL:
                steps[name] = official_step(config, inputs, drop_token)
                compiled_gflop[name] = None
            else:
                ours = Ours(config, inputs, **OUR_VARIANTS[variant])
                steps[name] = ours.step
                compiled_gflop[name] = ours.compiled_gflop()
            drop_tokens[name] = drop_token
            loss = steps[name]()
            took = time.perf_counter() - began
            print(f'{name}: first loss {loss:.4f}, ready after {took:.1f} s', flush=True)
    return steps, drop_tokens, compiled_gflop


def official_step(config: ConfigDict, inputs: dict, drop_token: float) -> Callable[[], float]:
    """The official step from a fresh state of ours."""
    state = loop.build(config, data_pipelines.open(config)).init()
    official = Official(official_weights(config, state), drop_token)
    tensors = [tf.constant(inputs[modality]) for modality in MODALITIES]

    def step() -> float:
        return float(official.step(*tensors))

    return step


def measure(
    steps: dict[str, Callable[[], float]], rounds: int, block: int
) -> tuple[float, dict[str, list[float]], dict[str, list[float]]]:
    """Peak in GFLOP/s; by name, wall seconds of every step and CPU seconds of every block."""
    peak, highest = Peak(), 0.0
    wall_seconds = {name: [] for name in steps}
    cpu_seconds = {name: [] for name in steps}
    for _ in range(rounds):
        highest = max(highest, peak.measure())
        for name, step in steps.items():
            # The other framework's threads go to sleep.
            time.sleep(0.1)
            step()
            wall, cpu = timed(step, block)
            wall_seconds[name] += wall
            cpu_seconds[name].append(cpu)
    return highest, wall_seconds, cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--block', type=int, default=6, help='steps of one variant in a row')
    parser.add_argument('--variants', default='', help='only those whose name has this in it')
    args = parser.parse_args()
    inputs = make_inputs()
    steps, drop_tokens, compiled_gflop = build_variants(inputs, args.variants)
    plain = make_config(drop_token=0.0, dropout=0.0)
    official_loss, our_loss = losses_without_dropout(plain, inputs, Ours(plain, inputs))
    print(f'loss without dropout: official {official_loss:.6f}, ours {our_loss:.6f}', flush=True)
    if not abs(official_loss - our_loss) < 1e-4 * abs(official_loss):
        sys.exit('error: the two sides do not compute the same loss')

    peak, wall_seconds, cpu_seconds = measure(steps, args.rounds, args.block)
    print(f'peak {peak:.0f} GFLOP/s')
    print(
        f'{"variant":50} {"wall s":>8} {"median":>8} {"CPU s":>8} {"GFLOP/s":>8} {"of peak":>8} '
        f'{"× wall":>7} {"× CPU":>7}'
    )
    rows = []
    for name in steps:
        wall, cpu = min(wall_seconds[name]), min(cpu_seconds[name])
        times_wall, times_cpu = 0.0, 0.0
        official = f'{describe(drop_tokens[name])}: {OFFICIAL}'
        if official in steps:
            times_wall = min(wall_seconds[official]) / wall
            times_cpu = min(cpu_seconds[official]) / cpu
        total = step_gflop(drop_tokens[name])
        row = {
            'variant': name,
            'wall_seconds': wall,
            'median_wall_seconds': float(np.median(wall_seconds[name])),
            'cpu_seconds': cpu,
            'gflop_of_step': total,
            'gflops': total / wall,
            'share_of_peak': total / wall / peak,
            'times_official_wall': times_wall,
            'times_official_cpu': times_cpu,
            'gflop_compiled': compiled_gflop[name],
        }
        rows.append(row)
        print(
            f'{name:50} {wall:8.3f} {row["median_wall_seconds"]:8.3f} {cpu:8.3f} '
            f'{row["gflops"]:8.1f} {row["share_of_peak"]:8.1%} {times_wall:7.2f} {times_cpu:7.2f}'
        )
    results = {
        'commit': repository.commit('vatt_jax'),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'tensorflow': tf.__version__,
        'onednn': os.environ['TF_ENABLE_ONEDNN_OPTS'],
        'hardware': f'{os.cpu_count()} × {repository.processor()}',
        'load_average': os.getloadavg(),
        'rounds': args.rounds,
        'block': args.block,
        'peak_gflops': peak,
        'loss_without_dropout': {'official': official_loss, 'ours': our_loss},
        'rows': rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
