"""VATT's pretraining step, ours against a plain TensorFlow 2 restatement of the official one, interleaved on this CPU.

    python benchmarks/vatt_step.py                        # 6 rounds of 6 steps for each variant; leave the machine alone meanwhile
    python benchmarks/vatt_step.py --rounds=1 --block=2   # to see that it runs

Both sides: 4 clips of 16×112×112 frames, 32768 samples and 5 sentences of 16 words; three towers of 4 layers, width 256, 4 heads of 64, MLP 1024;
FAC head 512/256, asymmetric NCE, dropout 0.1, Adam as Keras writes it, float32, frozen word table of 65536 × 300; with DropToken 0.5 and without.
They start from the same floats (our device stage from uint8 is a variant of its own) and the same weights: without dropout their losses
agree, which is checked first. Both use the heap that run.py sets up. The restatement does what the official code does: convolutions for
patches, stateful random bits, every token in every layer, Keras's Adam by its own op, NaN gradients to zero, one tf.function.

Ours, `all tokens`, does the same work; `first token` computes in the last layer what the loss reads (keys and values of all tokens, the rest for
the aggregate token), which is exact. GFLOP/s are those of the whole step (all tokens, forward and backward, matrix products only) for every variant,
so a variant that does less shows more; the peak is the best of both frameworks' 2048³ products in the same run. Wall and CPU seconds: the
minimum over steps, and over blocks. Writes benchmarks/results/vatt_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')  # the faster setting for the official step

import run

run.keep_freed_memory()  # as every run on the CPU does; both sides share the heap. Before threads begin

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import data_pipelines
from configs import default
from vatt_jax.importers import parameter_map, vatt_tf
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

RESULTS = ROOT / 'benchmarks' / 'results' / 'vatt_step.json'
B, FRAMES, SIZE, SAMPLES, K, W = 4, 16, 112, 32768, 5, 16
LAYERS, D, HEADS, KV, F, WORD = 4, 256, 4, 64, 1024, 300
RATE, DROP = 1e-4, 0.1


def config(drop_token=0.5, dropout=DROP):
    c = default.get_config()
    c.name, c.steps, c.batch_size = 'vatt_step', 1000, B
    c.model.inputs.video.update({'frames': FRAMES, 'size': SIZE})
    c.model.inputs.audio.update({'samples': SAMPLES})
    size = {
        'layers': LAYERS,
        'width': D,
        'mlp': F,
        'heads': HEADS,
        'head_width': KV,
        'dropout': dropout,
        'attention_dropout': dropout,
    }
    patched = {**size, 'drop_token': drop_token, 'position_dropout': dropout}
    c.model.towers = ConfigDict(
        {
            'video': {'name': 'vit', **patched},
            'audio': {'name': 'wat', **patched},
            'text': {'name': 't5', **size},
        }
    )
    c.objective = ConfigDict({'name': 'contrastive', 'form': 'asymmetric', 'padded': True})
    c.optimizer.name, c.optimizer.eps = 'keras_adam', 1e-7
    c.optimizer.schedule.update({'name': 'constant', 'peak': RATE, 'warmup': 0})
    c.data.source, c.data.synthetic_size = 'synthetic', 8
    c.mesh.replica = 1
    return c


def inputs():
    noise = np.random.default_rng(0)
    text = noise.integers(1, 1 << 16, (B, K, W)).astype(np.int32)
    text[:, 1, 9:] = 0
    return {
        'video': noise.uniform(-1, 1, (B, FRAMES, SIZE, SIZE, 3)).astype(np.float32),
        'audio': noise.uniform(-1, 1, (B, SAMPLES)).astype(np.float32),
        'text': text,
    }


def host_batch(data, floats=True):
    ok = np.ones(B, bool)
    streams = {
        'video': {'data': data['video'], 'valid': ok},
        'audio': {'data': data['audio'], 'valid': ok},
        'text': {'data': data['text'], 'valid': ok, 'mask': np.ones((B, K), bool)},
    }
    if not floats:
        streams['video'] |= {
            'data': ((data['video'] + 1) * 127).astype(np.uint8),
            'box': np.tile(np.float32([0, 0, 1, 1]), (B, 1)),
            'flip': ~ok,
        }
        streams['audio'] |= {'data': (data['audio'] * 32767).astype(np.int16)}
    return {
        **streams,
        'index': np.arange(B, dtype=np.int32),
        'source': np.zeros(B, np.int32),
        'position': np.arange(B),
        'valid': ok,
    }


# ---- the official step in TensorFlow 2: official names (vatt_jax/importers/vatt_tf.py), layer by layer


class Official(tf.Module):
    """weights: {official key: array}. drop_token: share of tokens dropped. dropout 0 and train False for the comparison of losses."""

    def __init__(self, weights, drop_token, dropout=DROP, train=True):
        super().__init__()
        self.drop_token, self.rate, self.train = drop_token, dropout, train
        frozen = lambda k: k.endswith(('embedding/embeddings', 'moving_mean', 'moving_variance'))
        self.w = {
            k: tf.Variable(v, trainable=not frozen(k), name=k.replace('/', '.'))
            for k, v in weights.items()
        }
        self.trained = [v for v in self.w.values() if v.trainable]
        self.m, self.v = (
            [tf.Variable(tf.zeros_like(v), trainable=False) for v in self.trained] for _ in range(2)
        )
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False)

    def drop(self, x):
        return tf.nn.dropout(x, self.rate) if self.train and self.rate else x

    def dense(self, key, x):
        y = tf.tensordot(x, self.w[f'{key}/kernel'], 1)
        return y + self.w[f'{key}/bias'] if f'{key}/bias' in self.w else y

    def norm(self, key, x):
        if f'{key}/weight' in self.w:
            return (
                x
                * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + 1e-6)
                * self.w[f'{key}/weight']
            )
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        return tf.nn.batch_normalization(
            x, mean, variance, self.w[f'{key}/beta'], self.w[f'{key}/gamma'], 1e-6
        )

    def attend(self, key, x, bias, scale):
        heads = lambda n: tf.reshape(self.dense(f'{key}/{n}', x), [tf.shape(x)[0], -1, HEADS, KV])
        logits = tf.einsum('bqhd,bkhd->bhqk', heads('q'), heads('k')) * scale
        p = self.drop(tf.nn.softmax(logits if bias is None else logits + bias))
        out = tf.einsum('bhqk,bkhd->bqhd', p, heads('v'))
        return self.dense(f'{key}/o', tf.reshape(out, [tf.shape(x)[0], -1, HEADS * KV]))

    def stack(self, key, x, norm, attention, bias=None, scale=KV**-0.5):
        for i in range(LAYERS):
            here = f'{key}/layers/{i}'
            x += self.drop(
                self.attend(f'{here}/{attention}', self.norm(f'{here}/{norm}', x), bias, scale)
            )
            y = self.norm(f'{here}/feed_forward/layer_norm', x)
            y = self.drop(tf.nn.gelu(self.dense(f'{here}/feed_forward/mlp/wi', y)))
            x += self.drop(self.dense(f'{here}/feed_forward/mlp/wo', y))
        return self.drop(self.norm(f'{key}/final_layer_norm', x))

    def patched(self, key, name, x, axes):
        kernel = self.w[f'{key}/{name}/kernel']
        strides = kernel.shape[:-2]
        x = (
            tf.nn.convolution(x, kernel, strides=list(strides), padding='VALID')
            + self.w[f'{key}/{name}/bias']
        )
        grid = x.shape[1:-1]
        tables = [
            self.w[f'{key}/pos_embedding_lookup/{axis}_position_embeddings/embeddings']
            for axis in axes
        ]
        ids = tf.reshape(
            tf.stack(tf.meshgrid(*(tf.range(n) for n in grid), indexing='ij'), -1), [-1, len(axes)]
        )
        places = tf.add_n([tf.gather(t, ids[:, i]) for i, t in enumerate(tables)])
        x = self.drop(
            tf.reshape(x, [B, -1, D]) + self.norm(f'{key}/pos_embedding_lookup/layernorm', places)
        )
        if self.train and self.drop_token:
            n = int(np.prod(grid))
            x = tf.gather(
                x, tf.random.shuffle(tf.range(n))[: int((1 - self.drop_token) * n)], axis=1
            )
        x = tf.concat([tf.tile(self.w[f'{key}/agg_embedding'][None, None], [B, 1, 1]), x], 1)
        return self.stack(f'{key}/tx', x, 'layer_norm', 'mha')[:, 0]

    def text(self, key, ids):
        ids = tf.reshape(ids, [-1, W])
        x = tf.nn.embedding_lookup(self.w[f'{key}/embedding/embeddings'], ids)
        x = tf.concat([tf.tile(self.w[f'{key}/agg_embedding'][None, None], [B * K, 1, 1]), x], 1)
        x = self.drop(tf.nn.gelu(self.dense(f'{key}/pre_proj', x)))
        mask = tf.pad(tf.cast(ids != 0, tf.float32), [[0, 0], [1, 0]], constant_values=1.0)
        table = self.w[
            f'{key}/base_lm/layers/0/self_attention/attention/relative_attention_bias/embeddings'
        ]
        bias = (
            tf.transpose(tf.gather(table, self.buckets), [2, 0, 1])[None]
            + (mask[:, None, None] - 1) * 1e9
        )
        return self.stack(
            f'{key}/base_lm', x, 'self_attention/layer_norm', 'self_attention/attention', bias, 1.0
        )[:, 0]

    @functools.cached_property
    def buckets(self):
        distance = np.arange(W + 1)[None] - np.arange(W + 1)[:, None]
        far = 8 + (np.log(np.maximum(np.abs(distance), 1) / 8) / np.log(64 / 8) * 8).astype(int)
        return (
            np.where(np.abs(distance) < 8, np.abs(distance), np.minimum(far, 15))
            + 16 * (distance > 0)
        ).astype(np.int32)

    def batch_norm(self, key, x):
        if not self.train:
            mean, variance = self.w[f'{key}/moving_mean'], self.w[f'{key}/moving_variance']
        else:
            mean, variance = tf.nn.moments(x, [0])
            for name, new in (('moving_mean', mean), ('moving_variance', variance)):
                self.w[f'{key}/{name}'].assign(0.9 * self.w[f'{key}/{name}'] + 0.1 * new)
        return tf.nn.batch_normalization(
            x, mean, variance, self.w[f'{key}/beta'], self.w[f'{key}/gamma'], 1e-5
        )

    def loss(self, video, audio, text):
        b, h = f'{vatt_tf.ROOT}/_base_layer', f'{vatt_tf.ROOT}/_head_layer/_bridge_heads/0'
        seen = self.patched(
            f'{b}/vid_backbone/_base',
            'voxel_to_patch',
            video,
            ('temporal', 'vertical', 'horizontal'),
        )
        heard = self.patched(
            f'{b}/aud_backbone/_base', 'wave_to_patch', audio[..., None], ('temporal',)
        )
        read = self.text(f'{b}/txt_backbone', text)
        va = tf.nn.relu(
            self.batch_norm(f'{h}/hid_to_va/pre_bn', self.dense(f'{h}/vid_to_hid', seen))
        )
        va = self.batch_norm(f'{h}/hid_to_va/bn', self.dense(f'{h}/hid_to_va/dense', va))
        vat = self.batch_norm(
            f'{h}/va_to_vat/bn', self.dense(f'{h}/va_to_vat/dense', tf.nn.relu(va))
        )
        return (
            self.nce(va, self.dense(f'{h}/aud_to_va', heard))
            + self.nce(vat, self.dense(f'{h}/txt_to_vat', read))
        ) / 2

    def nce(self, x, y):
        x, y = tf.math.l2_normalize(x, -1), tf.math.l2_normalize(y, -1)
        y = tf.reshape(y, [B, -1, y.shape[-1]])
        scores = tf.einsum('be,ake->bak', x, y) / 0.07
        own = tf.reduce_logsumexp(tf.stack([scores[i, i] for i in range(B)]), -1)
        both = tf.concat(
            [tf.reshape(scores, [B, -1]), tf.reshape(tf.transpose(scores, [1, 0, 2]), [B, -1])], 1
        )
        return tf.reduce_mean(tf.reduce_logsumexp(both, 1) - own)

    @tf.function
    def step(self, video, audio, text):
        with tf.GradientTape() as tape:
            loss = self.loss(video, audio, text)
        gradients = tape.gradient(loss, self.trained)
        self.count.assign_add(1)
        t = tf.cast(self.count, tf.float32)
        for w, m, v, g in zip(self.trained, self.m, self.v, gradients, strict=True):
            g = tf.where(tf.math.is_nan(tf.convert_to_tensor(g)), 0.0, g)
            tf.raw_ops.ResourceApplyAdam(
                var=w.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=0.9**t,
                beta2_power=0.999**t,
                lr=RATE,
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-7,
                grad=g,
            )
        return loss


# ---- ours


class Ours:
    """every_token: the last layer computes all tokens, as the official one does. floats: without the device stage."""

    def __init__(self, c, data, every_token=False, floats=True):
        built = loop.build(c, data_pipelines.open(c))
        self.built, self.floats = built, floats
        self.mesh, self.state = built.mesh, built.init()
        model = (
            types.SimpleNamespace(apply=functools.partial(built.model.apply, features=True))
            if every_token
            else built.model
        )
        with jax.set_mesh(self.mesh):
            step = jax.jit(
                train_step.make(c, model, built.objective, built.tx),
                donate_argnums=0,
                in_shardings=(built.shardings, sharding.batch_sharding(self.mesh)),
                out_shardings=(built.shardings, sharding.replicated(self.mesh)),
            )
            self.batch = feature_extractor.place_on_mesh(host_batch(data, floats), self.mesh)
            stages, preprocess.STAGES = preprocess.STAGES, {} if floats else preprocess.STAGES
            self.compiled = step.lower(self.state, self.batch).compile()
            preprocess.STAGES = stages

    def step(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics['loss'])


def official_weights(c, state):
    ours = {
        ('params', *k): v for k, v in flatten_dict(jax.device_get(state.params['model'])).items()
    }
    ours |= {
        ('batch_stats', *k): v for k, v in flatten_dict(jax.device_get(state.batch_stats)).items()
    }
    return parameter_map.to_theirs(ours, list(vatt_tf.layout(vatt_tf.filled(c))))


def same_loss(c, data, ours):
    """(theirs, ours) of one batch, without dropout and DropToken, with the statistics of a fresh model."""
    official = Official(official_weights(c, ours.state), 0.0, 0.0, train=False)
    theirs = float(official.loss(*(tf.constant(data[k]) for k in ('video', 'audio', 'text'))))
    still = types.SimpleNamespace(
        apply=lambda v, b, train, rng, mutable: (
            ours.built.model.apply(v, b, train=False, rng=rng),
            {},
        )
    )
    batch = {k: jax.tree.map(jnp.asarray, v) for k, v in host_batch(data).items()}
    variables = {'params': ours.state.params['model'], 'batch_stats': ours.state.batch_stats}
    loss = jax.jit(
        lambda: (
            ours.built.objective.loss(
                still, variables, {}, {}, batch, Rng.create(0, 0, jnp.arange(B))
            ).value
        )
    )
    return theirs, float(loss())


def gflop(drop_token):
    """Matrix products of one official step, forward and backward, 2 per multiplication and addition: every token projected, those that are
    kept in every layer. A product costs twice as much backward, but for the patches, whose input has no gradient."""

    def tower(rows, n, patch, total):
        layer = 8 * n * D * HEADS * KV + 4 * n * n * HEADS * KV + 4 * n * D * F
        return rows * (3 * LAYERS * layer + 2 * 2 * total * patch * D)

    video, audio = FRAMES // 4 * (SIZE // 16) ** 2, SAMPLES // 128
    kept = lambda n: int((1 - drop_token) * n) + 1
    text = tower(B * K, W + 1, 0, 0) + B * K * (W + 1) * 3 * 2 * WORD * D
    head = 3 * 2 * (B * (D * 512 + 512 * 512 + 512 * 256 + D * 512) + B * K * D * 256)
    return (
        tower(B, kept(video), 4 * 16 * 16 * 3, video)
        + tower(B, kept(audio), 128, audio)
        + text
        + head
    ) / 1e9


# ---- timing


def timed(f, times):
    """(least wall s, CPU s for each) of `times` calls."""
    wall, cpu = [], time.process_time()
    for _ in range(times):
        began = time.perf_counter()
        f()
        wall.append(time.perf_counter() - began)
    return wall, (time.process_time() - cpu) / times


def peak(n=2048):
    """GFLOP/s of n³ float32 products by either framework, to be called now and then; the best counts."""
    a = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
    x, t = jnp.asarray(a), tf.constant(a)
    ours, theirs = jax.jit(jnp.matmul), tf.function(tf.matmul)
    calls = (lambda: ours(x, x).block_until_ready(), lambda: theirs(t, t).numpy())
    for f in calls:
        f()
    return lambda: max(2 * n**3 / 1e9 / min(timed(f, 3)[0]) for f in calls)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=6)
    parser.add_argument('--block', type=int, default=6, help='steps of one variant in a row')
    parser.add_argument('--variants', default='', help='only those whose name has this in it')
    args = parser.parse_args()
    data = inputs()
    tensors = [tf.constant(data[k]) for k in ('video', 'audio', 'text')]
    variants, work = {}, {}
    for drop_token in (0.5, 0.0):
        c = config(drop_token)
        what = f'DropToken {drop_token}' if drop_token else 'no DropToken'
        makes = {
            'official, TensorFlow 2': None,
            'ours, all tokens': {'every_token': True},
            'ours, first token': {},
        }
        makes |= {'ours, first token, from uint8': {'floats': False}} if drop_token else {}
        for name, options in makes.items():
            if args.variants not in f'{what}: {name}':
                continue
            began = time.perf_counter()
            if options is None:
                start = loop.build(c, data_pipelines.open(c)).init()
                official = Official(official_weights(c, start), drop_token)
                f = lambda official=official: float(official.step(*tensors))
                counted = None
            else:
                ours = Ours(c, data, **options)
                f, counted = ours.step, ours.compiled.cost_analysis().get('flops', 0) / 1e9
            loss = f()
            variants[f'{what}: {name}'], work[f'{what}: {name}'] = f, counted
            print(
                f'{what}: {name}: first loss {loss:.4f}, ready after {time.perf_counter() - began:.1f} s',
                flush=True,
            )
    plain = config(0.0, 0.0)
    theirs, own = same_loss(plain, data, Ours(plain, data))
    print(f'loss without dropout: official {theirs:.6f}, ours {own:.6f}', flush=True)
    assert abs(theirs - own) < 1e-4 * abs(theirs), 'the two sides do not compute the same loss'

    measure = peak()
    top, walls, cpus = 0.0, {n: [] for n in variants}, {n: [] for n in variants}
    for _ in range(args.rounds):
        top = max(top, measure())
        for name, f in variants.items():
            time.sleep(0.1)  # the other framework's threads go to sleep
            f()
            wall, cpu = timed(f, args.block)
            walls[name] += wall
            cpus[name].append(cpu)
    rows = []
    print(
        f'peak {top:.0f} GFLOP/s\n{"variant":50} {"wall s":>8} {"median":>8} {"CPU s":>8} {"GFLOP/s":>8} {"of peak":>8} {"× wall":>7} {"× CPU":>7}'
    )
    for name in variants:
        what = name.split(':')[0]
        base = f'{what}: official, TensorFlow 2'
        total, wall, cpu = (
            gflop(0.0 if what.startswith('no') else 0.5),
            min(walls[name]),
            min(cpus[name]),
        )
        times = (min(walls[base]) / wall, min(cpus[base]) / cpu) if base in variants else (0.0, 0.0)
        middle = float(np.median(walls[name]))
        rows.append(
            {
                'variant': name,
                'wall_seconds': wall,
                'median_wall_seconds': middle,
                'cpu_seconds': cpu,
                'gflop_of_step': total,
                'gflops': total / wall,
                'share_of_peak': total / wall / top,
                'times_official_wall': times[0],
                'times_official_cpu': times[1],
                'gflop_compiled': work[name],
            }
        )
        print(
            f'{name:50} {wall:8.3f} {middle:8.3f} {cpu:8.3f} {total / wall:8.1f} {total / wall / top:8.1%} {times[0]:7.2f} {times[1]:7.2f}'
        )
    ask = lambda *command: subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    cpu_file = pathlib.Path('/proc/cpuinfo')
    names = (
        [
            line.split(':')[1].strip()
            for line in cpu_file.read_text().splitlines()
            if line.startswith('model name')
        ]
        if cpu_file.exists()
        else []
    )
    about = {
        'commit': ask('git', 'rev-parse', '--short', 'HEAD')
        + ('+' if ask('git', 'status', '--porcelain', 'vatt_jax') else ''),
        'date': datetime.date.today().isoformat(),
        'jax': jax.__version__,
        'tensorflow': tf.__version__,
        'onednn': os.environ['TF_ENABLE_ONEDNN_OPTS'],
        'hardware': f'{os.cpu_count()} × {names[0] if names else platform.processor()}',
        'load_average': os.getloadavg(),
        'rounds': args.rounds,
        'block': args.block,
        'peak_gflops': top,
        'loss_without_dropout': {'official': theirs, 'ours': own},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, 'rows': rows}, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
