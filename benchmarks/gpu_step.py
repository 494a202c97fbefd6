"""Training steps on one GPU: clips/s, MFU and share of the measured matmul peak; beside the same VATT towers and loss in PyTorch.

    python benchmarks/gpu_step.py                          # VATT bbs, lbs, agnostic medium, MMV tsm50 and s3d, bf16, largest batch that fits
    python benchmarks/gpu_step.py --only=bbs --batch=64    # one, at a given batch
    python benchmarks/gpu_step.py --tiny                   # to see that it runs, on a CPU: small towers, float32, no claim

Ours is the step of --mode=train (device stage from bytes, loss, Adam, finite guard) with DropToken 0.5 and the platform's fused attention, so without
dropout on attention probabilities; all other dropout is on. FLOPs are those the model needs, counted from shapes (vatt_jax/flops.py):
`needed` for ours and, for both, `all tokens`, as published counts have it. MFU is against the data sheet; the matmul peak is the best of 8192³
products in bf16 in the same run. PyTorch (`torch.compile`, scaled_dot_product_attention, fused Adam): the same three transformers, position
codes, DropToken, heads with batch norm and NCE, from float inputs that already lie on the device, which favours it. Without torch the row is empty.
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
    os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')   # PyTorch runs in the same process

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import data_pipelines  # noqa: E402
from vatt_jax import chips, encoder, flops, train  # noqa: E402
from vatt_jax import config as configs  # noqa: E402

RESULTS = ROOT / 'benchmarks' / 'results' / 'gpu_step.json'
MODELS = {'bbs': 'configs/vatt.py:bbs,synthetic,fused', 'lbs': 'configs/vatt.py:lbs,synthetic,fused',
          'agnostic': 'configs/vatt.py:agnostic_medium,synthetic,fused', 'tsm50': 'configs/mmv.py:tsm50_fac_vat,synthetic',
          's3d': 'configs/mmv.py:s3d_fac_vat,synthetic'}
BATCHES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
BLOCK, ROUNDS = (1, 1) if TINY else (10, 5)


def config(name: str, batch: int):
    c = configs.load(MODELS[name])
    c.batch_size, c.mesh.replica, c.mesh.fsdp, c.data.synthetic_size = batch, 1, 1, batch
    if TINY:
        c.compute_dtype = 'float32'
        c.model.inputs.video.update({'frames': 4, 'size': 32})
        c.model.inputs.audio.samples = 4096
        for t in c.model.towers.values():
            if t.name in ('vit', 'wat', 't5'):
                t.update({'layers': 2, 'width': 64, 'mlp': 128, 'heads': 2, 'head_width': 32})
                if 'positions' in t:
                    t.positions = ()
            if 'vocab' in t or t.name == 't5':
                t.vocab = 1000
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
    return 2 * n ** 3 / best


def ours(name: str, batch: int) -> dict:
    """Seconds of a step, FLOPs of a clip and peak memory. Raises XLA's error when it does not fit."""
    c = config(name, batch)
    data = data_pipelines.open(c)
    built = train.build(c, data)
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    plain = configs.ConfigDict(c.to_dict())
    plain.model.attention = 'dense'
    counts = flops.towers(train.models.build(plain.model, c.compute_dtype), variables,
                          jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), dict(built.inputs)))
    with jax.set_mesh(built.mesh):
        on_device = encoder.place(next(data.train(0, batch)), built.mesh)
        state = built.init()
        step = built.step.lower(state, on_device).compile()
        memory = step.memory_analysis()

        def once():
            nonlocal state
            state, metrics = step(state, on_device)
            return metrics['loss'].block_until_ready
        once()()
        took = seconds(once)
    return {'seconds': took, 'flops_needed': flops.model_flops(counts, 'needed'), 'flops_all_tokens': flops.model_flops(counts, 'all_tokens'),
            'memory_GB': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9}


# ---- the same towers and loss in PyTorch

def torch_step(name: str, batch: int):
    """() -> something to wait for: one step of the modality-specific VATT `name`, or None where torch or the model is not there."""
    try:
        import torch
        from torch import nn
        from torch.nn import functional as F
    except ImportError:
        return None
    c = config(name, batch)
    if c.model.shared or any(t.name not in ('vit', 'wat', 't5') for t in c.model.towers.values()):
        return None
    place = 'cuda' if torch.cuda.is_available() else 'cpu'
    rate = 0.1

    class Block(nn.Module):
        def __init__(self, width, mlp, heads, bias):
            super().__init__()
            self.heads = heads
            self.norm, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
            self.up, self.down = nn.Linear(width, mlp, bias), nn.Linear(mlp, width, bias)

        def forward(self, x, bias):
            b, n, d = x.shape
            q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, d)
            x = x + F.dropout(self.out(y), rate)
            return x + F.dropout(self.down(F.dropout(F.gelu(self.up(self.norm2(x))), rate)), rate)

    class Tower(nn.Module):
        def __init__(self, t, patch, tokens):
            super().__init__()
            self.text = t.name == 't5'
            self.kept = None if self.text else int((1 - t.get('drop_token', 0.5)) * tokens)
            self.tokens = tokens
            if self.text:
                self.table = nn.Embedding(t.get('vocab') or 1 << 16, 300)
                self.table.weight.requires_grad_(False)
                self.bias = nn.Parameter(torch.zeros(1, t.heads, tokens + 1, tokens + 1))
            else:
                self.places, self.place_norm = nn.Parameter(0.02 * torch.randn(tokens, t.width)), nn.LayerNorm(t.width)
            self.patch = nn.Linear(patch, t.width)
            self.first = nn.Parameter(0.02 * torch.randn(t.width))
            self.blocks = nn.ModuleList(Block(t.width, t.mlp, t.heads, not self.text) for _ in range(t.layers))
            self.norm = nn.LayerNorm(t.width)

        def forward(self, x):
            if self.text:
                x, bias = F.gelu(self.patch(self.table(x))), self.bias
            else:   # what is dropped is never projected, as in ours
                kept, bias = torch.randperm(self.tokens, device=x.device)[:self.kept], None
                x = self.patch(x[:, kept]) + self.place_norm(self.places)[kept]
            x = torch.cat([self.first.expand(len(x), 1, -1), F.dropout(x, rate)], 1)
            for block in self.blocks:
                x = block(x, bias)
            return self.norm(x)[:, 0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            i, t = c.model.inputs, c.model.towers
            self.grid = i.video.frames // 4, i.video.size // 16, i.video.size // 16
            self.video, self.audio = Tower(t.video, 4 * 16 * 16 * 3, math.prod(self.grid)), Tower(t.audio, 128, i.audio.samples // 128)
            self.words = Tower(t.text, 300, i.text.words)
            self.a = nn.Sequential(nn.Linear(t.video.width, 512, False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512, False),
                                   nn.BatchNorm1d(512))
            self.b, self.ab = nn.Linear(t.audio.width, 512), nn.Sequential(nn.BatchNorm1d(512))
            self.va, self.w = nn.Sequential(nn.ReLU(), nn.Linear(512, 256, False), nn.BatchNorm1d(256)), nn.Linear(t.text.width, 256)

        def forward(self, video, audio, text):
            b, (t, h, w) = len(video), self.grid
            x = video.view(b, t, 4, h, 16, w, 16, 3).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, t * h * w, -1)
            va = self.a(self.video(x))
            heard = self.ab(self.b(self.audio(audio.view(b, -1, 128))))
            vat, read = self.va(va), self.w(self.words(text.view(-1, text.shape[-1])))
            return nce(va, heard[:, None]) / 2 + nce(vat, read.view(b, -1, 256)) / 2

    def nce(x, y):
        x, y = F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)
        scores = torch.einsum('be,ake->bak', x, y) / 0.07
        own = torch.diagonal(scores, dim1=0, dim2=1).T.logsumexp(-1)
        every = torch.cat([scores.flatten(1), scores.transpose(0, 1).flatten(1)], 1).logsumexp(-1)
        return (every - own).mean()

    model = Model().to(place)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4, fused=place == 'cuda')
    run = model if TINY else torch.compile(model)
    i = c.model.inputs
    video = torch.rand(batch, i.video.frames, i.video.size, i.video.size, 3, device=place) * 2 - 1
    audio, text = torch.rand(batch, i.audio.samples, device=place), torch.randint(1, 1000, (batch, i.text.candidates, i.text.words), device=place)

    def once():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place, torch.bfloat16, enabled=not TINY):
            loss = run(video, audio, text)
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
        except Exception as error:   # out of memory has a type of its own in each library
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='one of ' + ', '.join(MODELS))
    parser.add_argument('--batch', type=int, default=0, help='clips; default: the largest of a list that fits')
    parser.add_argument('--tiny', action='store_true')
    flags = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != 'gpu' and not TINY:
        sys.exit(f'error: this is {device.device_kind}, no GPU; --tiny shows that it runs')
    batches = (flags.batch,) if flags.batch else (4,) if TINY else BATCHES
    sheet, peak = chips.peak_of([device]), matmul_peak()
    print(f'{device.device_kind}: data sheet {sheet and sheet / 1e12} TFLOP/s, measured {peak / 1e12:.1f}', flush=True)
    git = lambda *c: subprocess.run(['git', *c], cwd=ROOT, text=True, capture_output=True).stdout.strip()
    for name in [flags.only] if flags.only else MODELS:
        batch, got = largest(name, batches, ours)
        row = {'model': name, 'device': device.device_kind, 'date': datetime.date.today().isoformat(), 'commit': git('rev-parse', '--short', 'HEAD'),
               'jax': jax.__version__, 'matmul_peak': peak, 'data_sheet': sheet, 'batch': batch}
        if batch is None:
            row['error'] = got
        else:
            rate = batch / got['seconds']
            row |= got | {'clips_per_s': rate, 'share_of_matmul_peak': rate * got['flops_needed'] / peak,
                          'share_all_tokens': rate * got['flops_all_tokens'] / peak, 'mfu': sheet and rate * got['flops_needed'] / sheet}
            jax.clear_caches()
            theirs, took = largest(name, [b for b in batches if b <= batch], in_torch)
            if theirs and took:
                row |= {'torch_batch': theirs, 'torch_clips_per_s': theirs / took, 'times_torch': rate * took / theirs}
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if not TINY:
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            RESULTS.write_text(json.dumps([*rows, row], indent=1) + '\n')


if __name__ == '__main__':
    main()
