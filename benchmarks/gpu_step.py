"""Training steps on one GPU: clips/s, MFU and share of the measured matmul peak; beside the same VATT towers and loss in PyTorch.

    python benchmarks/gpu_step.py                          # VATT bbs, lbs, agnostic medium, MMV tsm50 and s3d, bf16, largest batch that fits
    python benchmarks/gpu_step.py --only=bbs --batch=64    # one, at a given batch
    python benchmarks/gpu_step.py --tiny                   # on a CPU: small towers, float32; that both sides compute the same, and that it runs

Ours is the step of --mode=train (device stage from bytes, loss, Adam, finite guard) with DropToken 0.5 and the platform's fused attention, so without
dropout on attention probabilities; all other dropout is on. FLOPs are those the model needs, counted from shapes (vatt_jax/performance/flops.py):
`needed` for ours and, for both, `all tokens`, as published counts have it. MFU is against the data sheet; the matmul peak is the best of 8192³
products in bf16 in the same run.
PyTorch (`torch.compile`, scaled_dot_product_attention, fused Adam): the same transformers, DropToken, heads with batch norm and NCE, from float
inputs that already lie on the device, which favours it. --tiny gives both sides the same weights and clips and compares losses (to 1e-4) and the
gradient's norm (to 1e-3). Without torch, and for MMV, the row is empty.
Each run adds its rows to benchmarks/results/gpu_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = '--tiny' in sys.argv
if TINY:
    os.environ['JAX_PLATFORMS'], os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = 'cpu', '1'
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch runs in the same process

import jax
import jax.numpy as jnp

import data_pipelines
from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.models.transformer import relative_buckets
from vatt_jax.performance import chips, flops
from vatt_jax.rng import Rng
from vatt_jax.training import loop

RESULTS = ROOT / 'benchmarks' / 'results' / 'gpu_step.json'
MODELS = {
    'bbs': 'configs/vatt.py:bbs,synthetic,fused',
    'lbs': 'configs/vatt.py:lbs,synthetic,fused',
    'agnostic': 'configs/vatt.py:agnostic_medium,synthetic,fused',
    'tsm50': 'configs/mmv.py:tsm50_fac_vat,synthetic',
    's3d': 'configs/mmv.py:s3d_fac_vat,synthetic',
}
BATCHES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
BLOCK, ROUNDS = (1, 1) if TINY else (10, 5)


def config(name: str, batch: int):
    c = configs.load(MODELS[name])
    c.batch_size, c.mesh.replica, c.mesh.fsdp, c.data.synthetic_size = batch, 1, 1, batch
    if TINY:
        c.compute_dtype = 'float32'
        c.model.inputs.video.update({'frames': 4, 'size': 32})
        c.model.inputs.audio.samples = 4096
        size = {'layers': 2, 'width': 64, 'mlp': 128, 'heads': 2, 'head_width': 32}
        c.model.encoder.update(size if c.model.shared else {})
        for t in c.model.towers.values():
            t.update(
                {
                    k: v
                    for k, v in {
                        'positions': (),
                        'post': 48,
                        'depth': 18,
                        'multiplier': 0.25,
                    }.items()
                    if k in t
                }
            )
            t.update(size if t.name in ('vit', 'wat', 't5') and not c.model.shared else {})
            t.update({'vocab': 1000} if t.name in ('t5', 'linear') else {})
    return c


def seconds(step) -> float:
    """Of one step: the best of ROUNDS turns of BLOCK steps. step: () -> something to wait for."""
    best = math.inf
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(BLOCK):
            last = step()
        last()
        best = min(best, (time.perf_counter() - began) / BLOCK)
    return best


def matmul_peak() -> float:
    """FLOP/s of the best of several products of two square bf16 matrices (float32 on a CPU)."""
    n, kind = (512, jnp.float32) if TINY else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(kind)
    f = jax.jit(lambda a, b: a @ b)
    f(a, a).block_until_ready()
    best = math.inf
    for _ in range(3):
        began, x = time.perf_counter(), a
        for _ in range(10):
            x = f(a, x)
        x.block_until_ready()
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * n**3 / best


def ours(name: str, batch: int) -> dict:
    """Seconds of a step, FLOPs of a clip and peak memory. Raises XLA's error when it does not fit."""
    c = config(name, batch)
    data = data_pipelines.open(c)
    built = loop.build(c, data)
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    plain = configs.ConfigDict(c.to_dict())
    plain.model.attention = 'dense'
    counts = flops.by_tower(
        models.build(plain.model, c.compute_dtype),
        variables,
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), dict(built.inputs)
        ),
    )
    with jax.set_mesh(built.mesh):
        on_device = feature_extractor.place_on_mesh(next(data.train(0, batch)), built.mesh)
        state = built.init()
        step = built.step.lower(state, on_device).compile()
        memory = step.memory_analysis()

        def once():
            nonlocal state
            state, metrics = step(state, on_device)
            return metrics['loss'].block_until_ready

        once()()
        took = seconds(once)
    return {
        'seconds': took,
        'flops_needed': flops.model_flops(counts, 'needed'),
        'flops_all_tokens': flops.model_flops(counts, 'all_tokens'),
        'memory_GB': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
    }


# ---- the same towers and loss in PyTorch


def torch_model(c, rate: float):
    """The VATT of a resolved config as a PyTorch module, (video, audio, text, kept) -> loss; None without torch or where a tower is no transformer.

    rate: of every dropout; none on attention probabilities, as with the kernels. kept: {modality: tokens that DropToken leaves}. As in ours, what is
    dropped is never projected and the last layer computes what the first token needs.
    """
    try:
        import torch
        from torch import nn
        from torch.nn import functional as F
    except ImportError:
        return None
    towers, shared = c.model.towers, c.model.shared
    if any(t.name not in ('vit', 'wat', 't5') for t in towers.values()):
        return None

    class Patches(nn.Module):
        def __init__(self, patch, grid, width):
            super().__init__()
            self.patch, self.projection = (
                nn.Linear(patch, width),
                nn.Linear(width, width) if shared else None,
            )
            self.places = nn.ParameterList(0.02 * torch.randn(n, width) for n in grid)
            self.norm, self.agg = nn.LayerNorm(width, 1e-6), nn.Parameter(0.02 * torch.randn(width))

        def forward(self, x, kept):
            x = self.patch(x[:, kept])
            x = F.gelu(self.projection(x)) if shared else x
            axes = len(self.places)
            places = sum(
                p.view(*(-1 if i == axis else 1 for i in range(axes)), p.shape[1])
                for axis, p in enumerate(self.places)
            )
            x = F.dropout(x + self.norm(places.reshape(-1, x.shape[-1]))[kept], rate)
            return torch.cat([self.agg.expand(len(x), 1, -1), x], 1), None

    class Words(nn.Module):
        def __init__(self, t, words, width):
            super().__init__()
            self.table = nn.Embedding(t.get('vocab') or 1 << 16, 300)
            self.table.weight.requires_grad_(False)
            self.projection, self.agg = (
                nn.Linear(300, width, shared),
                nn.Parameter(0.02 * torch.randn(width if shared else 300)),
            )
            self.places, self.norm = (
                (nn.Parameter(0.02 * torch.randn(words, width)), nn.LayerNorm(width, 1e-6))
                if shared
                else (None, None)
            )

        def forward(self, ids):
            first = lambda x: torch.cat([self.agg.expand(len(x), 1, -1), x], 1)
            x = self.table(ids)
            x = F.gelu(self.projection(x if shared else first(x)))
            x = F.dropout(x + self.norm(self.places) if shared else x, rate)
            return first(x) if shared else x, F.pad(ids != 0, (1, 0), value=True)

    class Block(nn.Module):
        def __init__(self, t, t5):
            super().__init__()
            self.heads, inner, self.scale = (
                t.heads,
                t.heads * t.get('head_width', 64),
                1.0 if t5 else None,
            )
            self.norm, self.norm2 = (
                (nn.RMSNorm if t5 else nn.LayerNorm)(t.width, 1e-6),
                nn.LayerNorm(t.width, 1e-6),
            )
            self.q, self.kv, self.out = (
                nn.Linear(*size, not t5)
                for size in ((t.width, inner), (t.width, 2 * inner), (inner, t.width))
            )
            self.up, self.down = (
                nn.Linear(t.width, t.mlp, not t5),
                nn.Linear(t.mlp, t.width, not t5),
            )

        def forward(self, x, mask, last):
            b, n, _ = x.shape
            y = self.norm(x)
            k, v = self.kv(y).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            x, y = (x[:, :1], y[:, :1]) if last else (x, y)
            q = self.q(y).view(b, -1, self.heads, k.shape[-1]).transpose(1, 2)
            mask = (
                mask
                if mask is None or mask.dtype == torch.bool
                else mask[:, :, : q.shape[2]].to(q.dtype)
            )
            y = (
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
                .transpose(1, 2)
                .flatten(2)
            )
            x = x + F.dropout(self.out(y), rate)
            return x + F.dropout(self.down(F.dropout(F.gelu(self.up(self.norm2(x))), rate)), rate)

    class Encoder(nn.Module):
        def __init__(self, t, t5=False, tokens=0):
            super().__init__()
            self.blocks = nn.ModuleList(Block(t, t5) for _ in range(t.layers))
            self.norm = (nn.RMSNorm if t5 else nn.LayerNorm)(t.width, 1e-6)
            self.bias = nn.Parameter(torch.zeros(32, t.heads)) if t5 else None
            self.buckets = torch.from_numpy(relative_buckets(tokens, 32, 64)) if t5 else None

        def forward(self, x, mask):
            mask = None if mask is None else mask[:, None, None]
            if self.bias is not None:
                mask = self.bias[self.buckets.to(x.device)].permute(2, 0, 1)[None] + torch.where(
                    mask, 0.0, -1e9
                )
            for i, block in enumerate(self.blocks):
                x = block(x, mask, i == len(self.blocks) - 1)
            return F.dropout(self.norm(x), rate)[:, 0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            i, head = c.model.inputs, c.model.head
            width = {m: c.model.encoder.width if shared else t.width for m, t in towers.items()}
            self.grid, words = (
                (i.video.frames // 4, i.video.size // 16, i.video.size // 16),
                i.text.words,
            )
            self.fronts = nn.ModuleDict(
                {
                    'video': Patches(4 * 16 * 16 * 3, self.grid, width['video']),
                    'audio': Patches(128, (i.audio.samples // 128,), width['audio']),
                    'text': Words(towers.text, words, width['text']),
                }
            )
            one = Encoder(c.model.encoder) if shared else None
            self.encoders = nn.ModuleDict(
                {m: one or Encoder(t, m == 'text', words + 1) for m, t in towers.items()}
            )
            self.posts = nn.ModuleDict(
                {m: nn.Linear(width[m], t.post) for m, t in towers.items() if t.get('post')}
            )
            out = {m: t.get('post') or width[m] for m, t in towers.items()}
            self.va = nn.Sequential(
                nn.Linear(out['video'], head.va, False),
                nn.BatchNorm1d(head.va),
                nn.ReLU(),
                nn.Linear(head.va, head.va, False),
                nn.BatchNorm1d(head.va),
            )
            self.vat = nn.Sequential(
                nn.ReLU(), nn.Linear(head.va, head.vat, False), nn.BatchNorm1d(head.vat)
            )
            self.heard, self.read = (
                nn.Linear(out['audio'], head.va),
                nn.Linear(out['text'], head.vat),
            )

        def pooled(self, m, *stream):
            x = self.encoders[m](*self.fronts[m](*stream))
            return F.gelu(self.posts[m](x)) if m in self.posts else x

        def forward(self, video, audio, text, kept):
            b, (t, h, w) = len(video), self.grid
            voxels = (
                video.view(b, t, 4, h, 16, w, 16, 3)
                .permute(0, 1, 3, 5, 2, 4, 6, 7)
                .reshape(b, t * h * w, -1)
            )
            va = self.va(self.pooled('video', voxels, kept['video']))
            heard = self.heard(self.pooled('audio', audio.view(b, -1, 128), kept['audio']))
            vat, read = self.vat(va), self.read(self.pooled('text', text.flatten(0, 1)))
            with torch.autocast(va.device.type, enabled=False):  # scores in float32, as in ours
                return (
                    nce(va.float(), heard.float()[:, None]) / 2
                    + nce(vat.float(), read.float().view(b, -1, read.shape[-1])) / 2
                )

    def nce(x, y):
        scores = torch.einsum('be,ake->bak', F.normalize(x, dim=-1), F.normalize(y, dim=-1)) / 0.07
        own = torch.diagonal(scores, dim1=0, dim2=1).T.logsumexp(-1)
        every = torch.cat([scores.flatten(1), scores.transpose(0, 1).flatten(1)], 1).logsumexp(-1)
        return (every - own).mean()

    return Model()


def load(model, params) -> None:
    """Our parameters into a torch_model."""
    import numpy as np
    import torch

    p = jax.tree.map(np.asarray, params)
    left = {id(x) for x in model.parameters()}

    def put(target, value):
        left.discard(id(target))
        with torch.no_grad():
            assert tuple(target.shape) == value.shape, (target.shape, value.shape)
            target.copy_(torch.tensor(value))

    def part(module, tree):
        """A matrix of any number of axes or a norm, one of each name."""
        if 'kernel' in tree:
            put(module.weight, tree['kernel'].reshape(module.weight.shape[::-1]).T)
        else:
            put(module.weight, tree['scale'])
        if 'bias' in tree:
            put(module.bias, tree['bias'].reshape(-1))

    for m, front in model.fronts.items():
        f = p[f'fronts_{m}']
        for name in ('patch', 'projection'):
            if name in f:
                part(getattr(front, name), f[name])
        put(front.agg, f['agg'])
        if m == 'text':
            put(front.table.weight, f['word_table'])
        if 'positions' in f:
            part(front.norm, f['positions']['norm'])
            places = [
                f['positions'][f'{axis}_positions']
                for axis in ('temporal', 'vertical', 'horizontal')
                if f'{axis}_positions' in f['positions']
            ]
            for target, value in zip(
                [front.places] if m == 'text' else front.places, places, strict=True
            ):
                put(target, value)
        e, encoder_ = p.get(f'encoders_{m}') or p['shared_encoder'], model.encoders[m]
        part(encoder_.norm, e['final_norm'])
        if 'relative_bias' in e:
            put(encoder_.bias, e['relative_bias'])
        for i, block in enumerate(encoder_.blocks):
            one = jax.tree.map(lambda x, i=i: x[i], e['layers'])
            flat = {
                n: {
                    k: v.reshape(len(v), -1) if k == 'kernel' else v.reshape(-1)
                    for k, v in one[n].items()
                }
                for n in ('query', 'key', 'value')
            }
            both = {k: np.concatenate([flat['key'][k], flat['value'][k]], -1) for k in flat['key']}
            for module, tree in (
                (block.norm, one['attention_norm']),
                (block.norm2, one['mlp_norm']),
                (block.q, flat['query']),
                (block.kv, both),
                (block.out, one['out']),
                (block.up, one['mlp_in']),
                (block.down, one['mlp_out']),
            ):
                part(module, tree)
        if m in model.posts:
            part(model.posts[m], p[f'posts_{m}'])
    heads = {
        'video_hidden': model.va[0],
        'video_va_pre_norm': model.va[1],
        'video_va': model.va[3],
        'video_va_norm': model.va[4],
        'video_vat': model.vat[1],
        'video_vat_norm': model.vat[2],
        'audio_va': model.heard,
        'text_vat': model.read,
    }
    for name, module in heads.items():
        part(module, p['head'][name])
    assert not left, f'{len(left)} parameters of the PyTorch model were not set'


def check(name: str) -> None:
    """Exits where both sides, given the same weights, clips and tokens that DropToken leaves, differ in loss or gradient. Float32, no dropout."""
    c = config(name, 4)
    for t in (*c.model.towers.values(), c.model.encoder):
        t.update(
            dict.fromkeys(
                ('dropout', 'attention_dropout', *(['position_dropout'] if 'name' in t else [])),
                0.0,
            )
        )
    theirs = torch_model(c, 0.0)
    if theirs is None:
        return print(f'{name}: no PyTorch side to compare with', flush=True)
    import numpy as np
    import torch

    data = data_pipelines.open(c)
    built = loop.build(c, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        noise = iter(
            jax.random.split(jax.random.key(1), 1000)
        )  # zeros and ones would hide what is left out
        params = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), state.params
        )
        rng = Rng.create(0, 0, np.arange(4))
        batch = preprocess.device_stage(
            feature_extractor.place_on_mesh(next(data.train(0, 4)), built.mesh),
            c.model.inputs,
            c.augment,
            rng,
            augment=False,
            dtype='float32',
        )

        def loss(params):
            variables = {'params': params['model'], 'batch_stats': state.batch_stats}
            return built.objective.loss(
                built.model, variables, {}, {}, batch, rng
            ).value, built.model.apply(variables, batch, train=True, rng=rng, method='encode_all')

        (value, encoded), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    load(theirs, params['model'])
    tensor = lambda x: torch.tensor(np.asarray(x))
    other = theirs(
        *(tensor(batch[s]['data']) for s in ('video', 'audio', 'text')),
        {m: tensor(encoded[m].kept).long() for m in ('video', 'audio')},
    )
    other.backward()
    both = jax.tree.leaves(grads), [p.grad for p in theirs.parameters() if p.requires_grad]
    norms = [sum(float((g**2).sum()) for g in gs) ** 0.5 for gs in both]
    print(
        f'{name}: loss {float(value):.6f}, PyTorch {other.item():.6f}; norm of the gradient {norms[0]:.6f}, {norms[1]:.6f}',
        flush=True,
    )
    if abs(other.item() / float(value) - 1) > 1e-4 or abs(norms[1] / norms[0] - 1) > 1e-3:
        sys.exit(f'error: {name}: the two sides do not compute the same')


def torch_step(name: str, batch: int):
    """() -> something to wait for: one step of the VATT `name`, or None where torch or the model is not there."""
    c = config(name, batch)
    model = torch_model(c, 0.1)
    if model is None:
        return None
    import torch

    place = 'cpu' if TINY else 'cuda'
    model = model.to(place)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], 1e-4, fused=place == 'cuda'
    )
    run = model if TINY else torch.compile(model)
    i = c.model.inputs
    video = torch.rand(batch, i.video.frames, i.video.size, i.video.size, 3, device=place) * 2 - 1
    audio, text = (
        torch.rand(batch, i.audio.samples, device=place),
        torch.randint(1, 1000, (batch, i.text.candidates, i.text.words), device=place),
    )
    tokens = {'video': math.prod(model.grid), 'audio': i.audio.samples // 128}

    def once():
        kept = {m: torch.randperm(n, device=place)[: n // 2] for m, n in tokens.items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place, torch.bfloat16, enabled=not TINY):
            loss = run(video, audio, text, kept)
        loss.backward()
        optimizer.step()
        return torch.cuda.synchronize if place == 'cuda' else lambda: None

    return once


def largest(name: str, batches, measure):
    """(batch, measurement) of the first batch that fits; (None, why) when none does."""
    why = 'no batch'
    for batch in batches:
        try:
            return batch, measure(name, batch)
        except Exception as error:  # out of memory has a type of its own in each library
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if 'memory' not in str(error).lower() and 'RESOURCE_EXHAUSTED' not in str(error):
                raise
    return None, why


def in_torch(name: str, batch: int):
    step = torch_step(name, batch)
    if step is None:
        return None
    for _ in range(3):
        step()()
    return seconds(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default='', help='one of ' + ', '.join(MODELS))
    parser.add_argument(
        '--batch', type=int, default=0, help='clips; default: the largest of a list that fits'
    )
    parser.add_argument('--tiny', action='store_true')
    flags = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != 'gpu' and not TINY:
        sys.exit(f'error: this is {device.device_kind}, no GPU; --tiny shows that it runs')
    batches = (flags.batch,) if flags.batch else (4,) if TINY else BATCHES
    sheet, peak = chips.peak_of([device]), matmul_peak()
    print(
        f'{device.device_kind}: data sheet {sheet and sheet / 1e12} TFLOP/s, measured {peak / 1e12:.1f}',
        flush=True,
    )
    git = lambda *c: subprocess.run(
        ['git', *c], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    for name in [flags.only] if flags.only else MODELS:
        if TINY:
            check(name)
        batch, got = largest(name, batches, ours)
        row = {
            'model': name,
            'device': device.device_kind,
            'date': datetime.date.today().isoformat(),
            'commit': git('rev-parse', '--short', 'HEAD'),
            'jax': jax.__version__,
            'matmul_peak': peak,
            'data_sheet': sheet,
            'batch': batch,
        }
        if batch is None:
            row['error'] = got
        else:
            rate = batch / got['seconds']
            row |= got | {
                'clips_per_s': rate,
                'share_of_matmul_peak': rate * got['flops_needed'] / peak,
                'share_all_tokens': rate * got['flops_all_tokens'] / peak,
                'mfu': sheet and rate * got['flops_needed'] / sheet,
            }
            jax.clear_caches()
            theirs, took = largest(name, [b for b in batches if b <= batch], in_torch)
            if theirs and took:
                row |= {
                    'torch_batch': theirs,
                    'torch_clips_per_s': theirs / took,
                    'times_torch': rate * took / theirs,
                }
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if not TINY:
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            RESULTS.write_text(json.dumps([*rows, row], indent=1) + '\n')


if __name__ == '__main__':
    main()
