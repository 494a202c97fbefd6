"""Training steps on one GPU: clips/s, MFU and share of the measured matmul peak; beside PyTorch's.

    python benchmarks/gpu_step.py                          # all MODELS, largest batch that fits
    python benchmarks/gpu_step.py --only=bbs --batch=64    # one, at a given batch
    python benchmarks/gpu_step.py --tiny                   # on a CPU: small towers, float32; that
                                        # both sides compute the same, and that it runs

Models: VATT bbs, lbs and agnostic medium, MMV tsm50 and s3d, in bfloat16.

Ours is the step of --mode=train (device stage from bytes, loss, Adam, finite guard) with DropToken
0.5 and the platform's fused attention, so without dropout on attention probabilities; all other
dropout is on. FLOPs are those the model needs, counted from shapes (vatt_jax/performance/flops.py):
`needed` for ours and, for both, `all tokens`, as published counts have it. MFU is against the data
sheet; the matmul peak is the best of 8192³ products in bf16 in the same run.

PyTorch (`torch.compile`, scaled_dot_product_attention, fused Adam): the same VATT towers,
DropToken, heads with batch norm and NCE (support/vatt_torch.py), from float inputs that already lie
on the device, which favours it. --tiny gives both sides the same weights and clips and compares
losses (to 1e-4) and the gradient's norm (to 1e-3). Without torch, and for MMV, the row is empty.

Each run adds its rows to benchmarks/results/gpu_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
if '--tiny' in sys.argv:
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# PyTorch runs in the same process.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from support import repository

import data_pipelines
from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.performance import chips, flops
from vatt_jax.planning import plan
from vatt_jax.rng import Rng
from vatt_jax.training import loop

RESULTS = repository.RESULTS / 'gpu_step.json'
TINY = '--tiny' in sys.argv
MODELS = {
    'bbs': 'configs/vatt.py:bbs,synthetic,fused',
    'lbs': 'configs/vatt.py:lbs,synthetic,fused',
    'agnostic': 'configs/vatt.py:agnostic_medium,synthetic,fused',
    'tsm50': 'configs/mmv.py:tsm50_fac_vat,synthetic',
    's3d': 'configs/mmv.py:s3d_fac_vat,synthetic',
}
BATCHES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
TINY_BATCH = 4
BLOCK, ROUNDS = (1, 1) if TINY else (10, 5)
TRANSFORMERS = ('vit', 'wat', 't5')


def load_config(name: str, batch_size: int) -> ConfigDict:
    """The config of one of MODELS on one device, with as many clips as a batch has."""
    config = configs.load(MODELS[name])
    config.batch_size = batch_size
    config.mesh.replica = 1
    config.mesh.fsdp = 1
    config.data.synthetic_size = batch_size
    if TINY:
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Makes towers and inputs small enough for a CPU."""
    config.compute_dtype = 'float32'
    config.model.inputs.video.update({'frames': 4, 'size': 32})
    config.model.inputs.audio.samples = 4096
    encoder_size = {'layers': 2, 'width': 64, 'mlp': 128, 'heads': 2, 'head_width': 32}
    other_sizes = {'positions': (), 'post': 48, 'depth': 18, 'multiplier': 0.25}
    if config.model.shared:
        config.model.encoder.update(encoder_size)
    for tower in config.model.towers.values():
        for field, value in other_sizes.items():
            if field in tower:
                tower[field] = value
        if tower.name in TRANSFORMERS and not config.model.shared:
            tower.update(encoder_size)
        if tower.name in ('t5', 'linear'):
            tower.vocab = 1000


def seconds_of(step: Callable[[], Callable]) -> float:
    """Seconds of one step: the best of ROUNDS turns of BLOCK steps.

    Args:
        step: begins a step and returns what waits for its end.
    """
    best = math.inf
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(BLOCK):
            wait = step()
        wait()
        best = min(best, (time.perf_counter() - began) / BLOCK)
    return best


def matmul_peak() -> float:
    """FLOP/s of the best of several products of two square bf16 matrices (float32 on a CPU)."""
    size, dtype = (512, jnp.float32) if TINY else (8192, jnp.bfloat16)
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(3):
        product = matrix
        began = time.perf_counter()
        for _ in range(10):
            product = matmul(matrix, product)
        product.block_until_ready()
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * size**3 / best


# ---- ours


def measure_ours(name: str, batch_size: int) -> dict[str, float]:
    """Seconds of a step, FLOPs of a clip and peak memory.

    Raises:
        JaxRuntimeError: the step does not fit.
    """
    config = load_config(name, batch_size)
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    counts = count_flops(config, built)
    with jax.set_mesh(built.mesh):
        batch = feature_extractor.place_on_mesh(next(data.train(0, batch_size)), built.mesh)
        state = built.init()
        compiled = built.step.lower(state, batch).compile()
        memory = compiled.memory_analysis()

        def step():
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics['loss'].block_until_ready

        wait = step()
        wait()
        seconds = seconds_of(step)
    return {
        'seconds': seconds,
        'flops_needed': flops.model_flops(counts, 'needed'),
        'flops_all_tokens': flops.model_flops(counts, 'all_tokens'),
        'memory_GB': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
    }


def count_flops(config: ConfigDict, built: loop.Built) -> dict[str, Any]:
    """FLOPs of one clip by tower, of the model with dense attention: kernels cannot be counted."""
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    dense = configs.ConfigDict(config.to_dict())
    dense.model.attention = 'dense'
    model = models.build(dense.model, config.compute_dtype)
    return flops.by_tower(model, variables, plan.two_rows(built.inputs))


# ---- PyTorch


def torch_model(config: ConfigDict, rate: float):
    """A config's VATT in PyTorch; None without torch or where a tower is no transformer."""
    if importlib.util.find_spec('torch') is None:
        return None
    if any(tower.name not in TRANSFORMERS for tower in config.model.towers.values()):
        return None
    from support import vatt_torch

    return vatt_torch.Model(config.model, rate)


def torch_step(name: str, batch_size: int) -> Callable[[], Callable] | None:
    """One step of a VATT, for seconds_of; None where torch or the model is not there."""
    config = load_config(name, batch_size)
    model = torch_model(config, rate=0.1)
    if model is None:
        return None
    import torch

    device = 'cpu' if TINY else 'cuda'
    model = model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-4, fused=device == 'cuda')
    compiled = model if TINY else torch.compile(model)
    video_size, audio_size, text_size = (config.model.inputs[m] for m in ('video', 'audio', 'text'))
    frames, side, samples = video_size.frames, video_size.size, audio_size.samples
    video = torch.rand(batch_size, frames, side, side, 3, device=device) * 2 - 1
    audio = torch.rand(batch_size, samples, device=device)
    sentences = (batch_size, text_size.candidates, text_size.words)
    text = torch.randint(1, 1000, sentences, device=device)
    tokens = {'video': math.prod(model.grid), 'audio': samples // 128}

    def step():
        kept = {}
        for modality, count in tokens.items():
            kept[modality] = torch.randperm(count, device=device)[: count // 2]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=not TINY):
            loss = compiled(video, audio, text, kept)
        loss.backward()
        optimizer.step()
        return torch.cuda.synchronize if device == 'cuda' else wait_for_nothing

    return step


def wait_for_nothing() -> None:
    """On a CPU a step of PyTorch has ended when it returns."""


def measure_torch(name: str, batch_size: int) -> float | None:
    """Seconds of a step, or None without a PyTorch side."""
    step = torch_step(name, batch_size)
    if step is None:
        return None
    for _ in range(3):
        wait = step()
        wait()
    return seconds_of(step)


# ---- that both sides compute the same


def check(name: str) -> None:
    """Compares loss and gradient of both sides, in float32 and without dropout.

    Both have the same weights, clips and tokens that DropToken leaves. Exits where they differ.
    """
    config = load_config(name, TINY_BATCH)
    turn_dropout_off(config)
    theirs = torch_model(config, rate=0.0)
    if theirs is None:
        print(f'{name}: no PyTorch side to compare with', flush=True)
        return
    import torch
    from support import vatt_torch

    data = data_pipelines.open(config)
    built = loop.build(config, data)
    rng = Rng.create(0, 0, np.arange(TINY_BATCH))
    with jax.set_mesh(built.mesh):
        state = built.init()
        params = with_noise(state.params)
        batch = preprocess.device_stage(
            feature_extractor.place_on_mesh(next(data.train(0, TINY_BATCH)), built.mesh),
            config.model.inputs,
            config.augment,
            rng,
            augment=False,
            dtype='float32',
        )

        def loss_and_encoded(params):
            variables = {'params': params['model'], 'batch_stats': state.batch_stats}
            loss = built.objective.loss(built.model, variables, {}, {}, batch, rng).value
            encoded = built.model.apply(variables, batch, train=True, rng=rng, method='encode_all')
            return loss, encoded

        loss_and_gradient = jax.jit(jax.value_and_grad(loss_and_encoded, has_aux=True))
        (our_loss, encoded), gradient = loss_and_gradient(params)

    vatt_torch.load(theirs, params['model'])
    streams = []
    for modality in ('video', 'audio', 'text'):
        streams.append(torch.tensor(np.asarray(batch[modality]['data'])))
    kept = {}
    for modality in ('video', 'audio'):
        kept[modality] = torch.tensor(np.asarray(encoded[modality].kept)).long()
    their_loss = theirs(*streams, kept)
    their_loss.backward()

    our_norm = norm(jax.tree.leaves(gradient))
    their_norm = norm(p.grad for p in theirs.parameters() if p.requires_grad)
    print(
        f'{name}: loss {float(our_loss):.6f}, PyTorch {their_loss.item():.6f}; '
        f'norm of the gradient {our_norm:.6f}, {their_norm:.6f}',
        flush=True,
    )
    loss_differs = abs(their_loss.item() / float(our_loss) - 1) > 1e-4
    gradient_differs = abs(their_norm / our_norm - 1) > 1e-3
    if loss_differs or gradient_differs:
        sys.exit(f'error: {name}: the two sides do not compute the same')


def turn_dropout_off(config: ConfigDict) -> None:
    """Sets every rate of dropout, but DropToken's, to zero."""
    for size in (*config.model.towers.values(), config.model.encoder):
        size.update({'dropout': 0.0, 'attention_dropout': 0.0})
        # A shared encoder, which has no name, has no positions either.
        if 'name' in size:
            size.update({'position_dropout': 0.0})


def with_noise(params):
    """A tree of parameters that hides nothing: zeros and ones would hide what is left out."""
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def norm(gradients) -> float:
    """Norm of all arrays together, of either library."""
    return sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5


# ---- rows


def largest_fitting(name: str, batches: Sequence[int], measure: Callable):
    """(batch, measurement) of the first batch that fits; (None, why) when none does."""
    why = 'no batch'
    for batch_size in batches:
        try:
            return batch_size, measure(name, batch_size)
        # Out of memory has a type of its own in each library.
        except Exception as error:
            message = str(error)
            lines = message.strip().splitlines() or [type(error).__name__]
            why = lines[0][:200]
            if 'memory' not in message.lower() and 'RESOURCE_EXHAUSTED' not in message:
                raise
    return None, why


def measure_both(name: str, batches: Sequence[int], peak: float, sheet: float | None) -> dict:
    """Our part of a row, and PyTorch's where it has one.

    Args:
        name: one of MODELS.
        batches: to try, the largest first.
        peak: FLOP/s measured.
        sheet: FLOP/s of the data sheet, if known.
    """
    batch_size, ours = largest_fitting(name, batches, measure_ours)
    if batch_size is None:
        return {'batch': None, 'error': ours}
    rate = batch_size / ours['seconds']
    row = {
        'batch': batch_size,
        **ours,
        'clips_per_s': rate,
        'share_of_matmul_peak': rate * ours['flops_needed'] / peak,
        'share_all_tokens': rate * ours['flops_all_tokens'] / peak,
        'mfu': sheet and rate * ours['flops_needed'] / sheet,
    }
    jax.clear_caches()
    not_larger = [batch for batch in batches if batch <= batch_size]
    torch_batch_size, torch_seconds = largest_fitting(name, not_larger, measure_torch)
    if torch_batch_size and torch_seconds:
        row['torch_batch'] = torch_batch_size
        row['torch_clips_per_s'] = torch_batch_size / torch_seconds
        row['times_torch'] = rate * torch_seconds / torch_batch_size
    return row


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

    batches = (TINY_BATCH,) if TINY else BATCHES
    if flags.batch:
        batches = (flags.batch,)
    sheet, peak = chips.peak_of([device]), matmul_peak()
    sheet_teraflops = sheet and sheet / 1e12
    print(
        f'{device.device_kind}: data sheet {sheet_teraflops} TFLOP/s, measured {peak / 1e12:.1f}',
        flush=True,
    )
    for name in [flags.only] if flags.only else MODELS:
        if TINY:
            check(name)
        row = {
            'model': name,
            'device': device.device_kind,
            'date': datetime.date.today().isoformat(),
            'commit': repository.git('rev-parse', '--short', 'HEAD'),
            'jax': jax.__version__,
            'matmul_peak': peak,
            'data_sheet': sheet,
            **measure_both(name, batches, peak, sheet),
        }
        printed = {}
        for field, value in row.items():
            printed[field] = round(value, 3) if isinstance(value, float) else value
        print(printed, flush=True)
        if not TINY:
            add_row(row)


def add_row(row: dict) -> None:
    """Adds a row to the results of earlier runs."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*rows, row], indent=1) + '\n')


if __name__ == '__main__':
    main()
