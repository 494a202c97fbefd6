"""CLIP's training step, ours against open_clip itself (PyTorch), on this CPU.

    python -m venv ELSEWHERE && ELSEWHERE/bin/pip install torch open_clip_torch safetensors
    python benchmarks/clip_step.py --opponent=ELSEWHERE/bin/python        # leave the machine alone
    python benchmarks/clip_step.py --opponent=… --rounds=2 --block=2      # to see that it runs

Each side is a process of its own; both live through the whole run and take turns. They train the
same model on the same batch from the same weights: B/32's towers (7×7 patches of 32 pixels, 77
words of a vocabulary of 49,408) with 6 layers of width 256 in each, 32 pairs, float32, AdamW with
open_clip's constants, and the gradients of the whole batch. Ours reads open_clip's weights by its
importer. Before anything is timed, the losses of the first steps are compared.

open_clip's step is that of its training script: zero_grad, forward, ClipLoss, backward, the
optimizer, the clamp of the temperature; it runs eagerly, as its users run it, and begins with
floats. Ours is the step of --mode=train; `floats` begins where open_clip's does, `bytes` with the
device stage (crop and mean and deviation of uint8 pictures). Wall and CPU seconds: the least and
the median over the steps of all rounds. Writes benchmarks/results/clip_step.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

BATCH, SIZE, PATCH, WORDS, VOCAB = 32, 224, 32, 77, 49_408
LAYERS, WIDTH, HEAD_WIDTH, SPACE = 6, 256, 64, 256
RATE, DECAY, BETAS, EPS = 5e-4, 0.2, (0.9, 0.98), 1e-6
OPEN_CLIP = 'open_clip'
# Steps whose losses are compared, and how far they may be apart, relatively. Rounding of two
# libraries grows by the optimizer from step to step.
COMPARED, TOLERANCE = 5, 1e-3
WEIGHTS = 'open_clip.pt'


def make_pictures() -> np.ndarray:
    """Noise: uint8 [B H W 3]."""
    return np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)


def make_sentences() -> np.ndarray:
    """Words, the end mark (the largest number), padding: int32 [B L]."""
    rng = np.random.default_rng(1)
    sentences = rng.integers(1, VOCAB - 2, (BATCH, WORDS)).astype(np.int32)
    for row, length in enumerate(rng.integers(5, WORDS, BATCH)):
        sentences[row, length] = VOCAB - 1
        sentences[row, length + 1 :] = 0
    return sentences


def as_floats(pictures: np.ndarray) -> np.ndarray:
    """As a model of either side reads them: float32."""
    return (pictures.astype(np.float32) / 255 - 0.5) / 0.25


def timed(step: Callable[[], float], times: int) -> dict[str, list[float]]:
    """Wall and CPU seconds and loss of each of so many steps."""
    turn: dict[str, list[float]] = {'wall': [], 'cpu': [], 'loss': []}
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        turn['loss'].append(step())
        turn['wall'].append(time.perf_counter() - wall)
        turn['cpu'].append(time.process_time() - cpu)
    return turn


# ---- open_clip's process


def serve_open_clip(folder: pathlib.Path) -> None:
    """Writes its weights into `folder`, then takes as many steps as each line of input says."""
    import torch

    step, model = open_clip_step()
    torch.save(model.state_dict(), folder / WEIGHTS)
    print(json.dumps({'torch': torch.__version__, 'threads': torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(step, int(line))), flush=True)


def open_clip_step() -> tuple[Callable[[], float], Any]:
    """(one training step as open_clip's script takes it, the model)."""
    import open_clip
    import torch

    torch.manual_seed(0)
    heads = WIDTH // HEAD_WIDTH
    picture = {'layers': LAYERS, 'width': WIDTH, 'head_width': HEAD_WIDTH, 'patch_size': PATCH}
    sentence = {'context_length': WORDS, 'vocab_size': VOCAB, 'width': WIDTH, 'heads': heads}
    model = open_clip.CLIP(
        embed_dim=SPACE,
        vision_cfg={**picture, 'image_size': SIZE},
        text_cfg={**sentence, 'layers': LAYERS},
        output_dict=True,
    )
    model.train()
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=RATE, betas=BETAS, eps=EPS)
    pictures = torch.from_numpy(as_floats(make_pictures())).permute(0, 3, 1, 2).contiguous()
    sentences = torch.from_numpy(make_sentences()).long()

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(**model(pictures, sentences))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return float(loss.detach())

    return step, model


def parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Gains, biases and vectors are not decayed, as in open_clip's training script."""
    decayed, other = [], []
    for name, parameter in model.named_parameters():
        is_exempt = parameter.ndim < 2 or any(part in name for part in ('bn', 'ln', 'bias'))
        (other if is_exempt or 'logit_scale' in name else decayed).append(parameter)
    return [{'params': other, 'weight_decay': 0.0}, {'params': decayed, 'weight_decay': DECAY}]


class OpenClip:
    """open_clip's process.

    Args:
        python: an interpreter that has torch and open_clip.
        folder: where it writes its weights.
    """

    def __init__(self, python: str, folder: pathlib.Path):
        command = [python, __file__, f'--serve={folder}']
        # Of the interpreter's own packages alone.
        env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.about = self._answer()

    def turn(self, times: int) -> dict[str, list[float]]:
        """Steps, as `timed` has them."""
        assert self.process.stdin is not None
        self.process.stdin.write(f'{times}\n')
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: open_clip's process ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- ours


def make_config() -> Any:
    """The config of the same model and optimizer."""
    from configs import clip

    config = clip.get_config('b32_cc12m,synthetic')
    config.batch_size, config.compute_dtype = BATCH, 'float32'
    config.model.scan, config.model.remat = False, 'none'
    size = {'layers': LAYERS, 'width': WIDTH, 'mlp': 4 * WIDTH, 'activation': 'gelu'}
    heads = {'heads': WIDTH // HEAD_WIDTH, 'head_width': HEAD_WIDTH}
    config.model.towers.video.update({**size, **heads})
    config.model.towers.text.update({**size, **heads})
    config.model.head.vt = SPACE
    config.model.inputs.video.update({'mean': (0.5,) * 3, 'deviation': (0.25,) * 3})
    config.optimizer.weight_decay = DECAY
    config.optimizer.schedule.update({'name': 'constant', 'peak': RATE, 'warmup': 0})
    # Sentences are made above; those of the synthetic source are not read.
    config.model.inputs.text.tokenizer = 'words'
    config.data.synthetic_size = BATCH
    config.mesh.update({'replica': 1, 'fsdp': 1})
    return config


def host_batch(is_floats: bool) -> dict[str, Any]:
    """The batch as a reader of ours gives it, or with pictures as the model reads them."""
    valid = np.ones(BATCH, bool)
    pictures = make_pictures()[:, None]  # clips of one frame
    video: dict[str, Any] = {'data': pictures, 'valid': valid}
    if is_floats:
        video['data'] = as_floats(pictures)
    else:
        video['box'] = np.tile(np.float32([0, 0, 1, 1]), (BATCH, 1))
        video['flip'] = ~valid
    mask = np.ones((BATCH, 1), bool)
    return {
        'video': video,
        'text': {'data': make_sentences()[:, None], 'valid': valid, 'mask': mask},
        'index': np.arange(BATCH, dtype=np.int32),
        'source': np.zeros(BATCH, np.int32),
        'position': np.arange(BATCH),
        'valid': valid,
    }


def our_step(weights: pathlib.Path, is_floats: bool) -> Callable[[], float]:
    """One compiled step of ours, from open_clip's weights.

    Args:
        weights: of open_clip's process.
        is_floats: without the device stage.
    """
    import jax

    import data_pipelines
    from vatt_jax.inference import feature_extractor
    from vatt_jax.inputs import preprocess
    from vatt_jax.parallel import sharding
    from vatt_jax.training import loop, train_step

    config = make_config()
    built = loop.build(config, data_pipelines.open(config))
    state = with_weights(built.init(), weights, config)
    stages = preprocess.STAGES
    with jax.set_mesh(built.mesh):
        step = jax.jit(
            train_step.make(config, built.model, built.objective, built.tx),
            donate_argnums=0,
            in_shardings=(built.shardings, sharding.batch_sharding(built.mesh)),
            out_shardings=(built.shardings, sharding.replicated(built.mesh)),
        )
        batch = feature_extractor.place_on_mesh(host_batch(is_floats), built.mesh)
        if is_floats:
            preprocess.STAGES = {}
        compiled = step.lower(state, batch).compile()
        preprocess.STAGES = stages

    def next_step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics['loss'])

    return next_step


def with_weights(state: Any, weights: pathlib.Path, config: Any) -> Any:
    """A fresh state with the weights of open_clip in it, read by our importer."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from configs import default
    from vatt_jax.importers import clip, parameter_map

    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / 'run'
        clip.FORMATS['open_clip'].import_checkpoint(weights, run, config, default.get_config())
        _, _, theirs = parameter_map.read_run(run)
    params = {}
    for (part, *path), value in flatten_dict(state.params).items():
        group = 'params' if part == 'model' else part
        found = np.asarray(theirs[(group, *path)], value.dtype)
        params[(part, *path)] = jax.device_put(found, value.sharding)
    return state.replace(params=unflatten_dict(params))


# ---- the table


def compare(open_clip: OpenClip, steps: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """The first losses of each side; ends the program where they differ."""
    losses = {OPEN_CLIP: open_clip.turn(COMPARED)['loss']}
    for name, step in steps.items():
        losses[name] = timed(step, COMPARED)['loss']
    for name, values in losses.items():
        print(f'{name:16} first losses {" ".join(f"{value:.6f}" for value in values)}', flush=True)
        if not np.allclose(values, losses[OPEN_CLIP], rtol=TOLERANCE):
            sys.exit(f'error: {name} does not compute the losses of {OPEN_CLIP}')
    return losses


def measure(
    open_clip: OpenClip, steps: dict[str, Callable[[], float]], rounds: int, block: int
) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of every step; the sides take turns, one step before each is not read"""
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        turns = {OPEN_CLIP: open_clip.turn(block + 1)}
        for name, step in steps.items():
            # The other library's threads go to sleep.
            time.sleep(0.1)
            turns[name] = timed(step, block + 1)
        for name, turn in turns.items():
            of_side = times.setdefault(name, {'wall': [], 'cpu': []})
            of_side['wall'] += turn['wall'][1:]
            of_side['cpu'] += turn['cpu'][1:]
    return times


def rows_of(times: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row for each side: seconds, and how many times as fast as open_clip it is."""
    rows = []
    for name, of_side in times.items():
        row: dict[str, Any] = {'side': name}
        for clock in ('wall', 'cpu'):
            mine, theirs = of_side[clock], times[OPEN_CLIP][clock]
            row[f'{clock}_seconds'] = min(mine)
            row[f'median_{clock}_seconds'] = statistics.median(mine)
            row[f'times_{clock}'] = min(theirs) / min(mine)
            row[f'times_median_{clock}'] = statistics.median(theirs) / statistics.median(mine)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Seconds, medians in brackets, and ratios to open_clip's."""
    print('| side | wall s | CPU s | times open_clip, wall | CPU |\n|---|---|---|---|---|')
    for row in rows:
        cells = [row['side']]
        for clock in ('wall', 'cpu'):
            cells.append(f'{row[f"{clock}_seconds"]:.3f} ({row[f"median_{clock}_seconds"]:.3f})')
        for clock in ('wall', 'cpu'):
            cells.append(f'{row[f"times_{clock}"]:.2f} ({row[f"times_median_{clock}"]:.2f})')
        print(f'| {" | ".join(cells)} |')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--opponent', help='a Python interpreter with torch and open_clip_torch')
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--block', type=int, default=3, help='steps of one side in a row')
    parser.add_argument('--serve', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_open_clip(pathlib.Path(args.serve))
        return
    if not args.opponent:
        parser.error('--opponent is missing: an interpreter that has torch and open_clip_torch')

    os.environ['JAX_PLATFORMS'] = 'cpu'
    import jax
    from support import repository

    from vatt_jax.modes import process

    # As every run on the CPU does.
    process.keep_freed_memory()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        open_clip = OpenClip(args.opponent, pathlib.Path(folder))
        steps = {}
        for name, is_floats in (('ours, floats', True), ('ours, bytes', False)):
            steps[name] = our_step(pathlib.Path(folder) / WEIGHTS, is_floats)
        losses = compare(open_clip, steps)
        times = measure(open_clip, steps, args.rounds, args.block)
        open_clip.close()
    rows = rows_of(times)
    print_table(rows)
    results = {
        'commit': repository.commit('vatt_jax', 'configs', 'benchmarks/clip_step.py'),
        'date': datetime.date.today().isoformat(),
        'processor': repository.processor(),
        'cores': os.cpu_count(),
        'load_before': load_before,
        'jax': jax.__version__,
        **open_clip.about,
        'rounds': args.rounds,
        'block': args.block,
        'first_losses': losses,
        'rows': rows,
    }
    out = repository.RESULTS / 'clip_step.json'
    out.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {out.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
