"""Run folders with results of any size, written as a run would, without a training."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from vatt_jax import evals
from vatt_jax.evals.base import Result
from vatt_jax.run_folder import RunFolder, evaluation_name

STEPS = 1000


def write_run(
    folder: pathlib.Path,
    classes: int = 16,
    queries: int = 8,
    clips: int = 200,
    size: int = 32,
    frames: int = 8,
    words: str = 'a red ring bounces',
) -> pathlib.Path:
    """A run of STEPS steps with retrievals, a probe and clusters.

    Args:
        folder: the run folder to make.
        classes: of the probe and the clustering.
        queries: shown retrievals, each of sound and of text.
        clips: in the gallery; the shown ones are among them.
        size: side of the frames, in pixels.
        frames: of each clip.
        words: the name of the run, and what captions, classes and ids begin with.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    config = {
        'name': words,
        'seed': 0,
        'steps': STEPS,
        'batch_size': 64,
        'objective': {'name': 'contrastive'},
        'evals': {
            'retrieval': {'type': 'retrieval'},
            'probe_video': {'type': 'linear_probe'},
            'clusters': {'type': 'clustering'},
        },
    }
    run.config.write_text(json.dumps(config))
    run.done.write_text(json.dumps({'step': STEPS, 'skipped_steps': 0, 'corrupt_records': 0}))
    _write_metrics(run.metrics, rng)
    (run.checkpoints / str(STEPS)).mkdir(parents=True)

    names = [f'{words} {i}' for i in range(classes)]
    results = {
        'retrieval': _retrieval(clips, rng),
        'probe_video': _probe(names, rng),
        'clusters': _clustering(names, rng),
    }
    evaluation = run.evaluation(evaluation_name(STEPS))
    evals.save(results, evaluation)
    evals.save({'retrieval': _retrieval(clips, rng)}, run.evaluation('random_init'))
    _write_gallery(evaluation / 'gallery.npz', queries, clips, size, frames, words, rng)
    _write_clusters(evaluation / 'clusters.npz', names, size, frames, rng)
    return folder


def _write_metrics(path: pathlib.Path, rng: np.random.Generator) -> None:
    lines = []
    for step in range(1, STEPS + 1):
        line = {
            'step': step,
            'loss': 4 * np.exp(-step / 300) + 1 + 0.1 * rng.random(),
            'loss/va': 2 * np.exp(-step / 300) + 0.5 + 0.1 * rng.random(),
            'lr': 1e-3 * min(1, step / 100),
            'grad_norm': 1 + rng.random(),
            'clips_per_s': 200 + 10 * rng.random(),
        }
        lines.append(json.dumps(line))
    path.write_text('\n'.join(lines))


def _retrieval(clips: int, rng: np.random.Generator) -> Result:
    scalars, artifacts = {}, {}
    for pair in ('text_to_video', 'audio_to_video'):
        scalars[f'{pair}/clips'] = float(clips)
        for k in (1, 5, 10):
            share = min(1.0, k / clips)
            key = f'{pair}/R@{k}'
            scalars[key] = min(1.0, 20 * share * rng.random())
            artifacts[f'{key}/interval'] = [0.8 * scalars[key], min(1.0, 1.1 * scalars[key])]
            artifacts[f'{key}/chance'] = share
        shown = min(clips, 128)
        similarity = rng.normal(size=(shown, shown)) * 0.1 + 0.5 * np.eye(shown)
        artifacts[f'{pair}/similarity'] = similarity.astype(np.float16)
    return Result(scalars, artifacts)


def _counts(classes: int, rng: np.random.Generator) -> np.ndarray:
    """int [P P]: most on the diagonal, the rest near it."""
    counts = rng.poisson(0.02, (classes, classes))
    counts += np.diag(rng.integers(10, 60, classes))
    for offset in (1, 2):
        counts += np.diag(rng.integers(0, 8, classes - offset), offset)
    return counts.astype(np.int64)


def _probe(names: list[str], rng: np.random.Generator) -> Result:
    counts = _counts(len(names), rng)
    accuracy = float(np.trace(counts) / counts.sum())
    artifacts = {
        'confusion': counts,
        'classes': names,
        'accuracy/interval': [accuracy - 0.02, accuracy + 0.02],
        'accuracy/chance': 1 / len(names),
    }
    return Result({'accuracy': accuracy}, artifacts)


def _clustering(names: list[str], rng: np.random.Generator) -> Result:
    artifacts = {
        'confusion': _counts(len(names), rng),
        'contingency': _counts(len(names), rng),
        'classes': names,
        'NMI/chance': 0.1,
    }
    return Result({'NMI': 0.57}, artifacts)


def _film(size: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T H W 3]: a disc on noise, as hard to store as real films."""
    y, x = np.mgrid[:size, :size] / size
    color, start = rng.integers(80, 255, 3), rng.random(2)
    film = []
    for t in range(frames):
        background = rng.integers(0, 60, (size, size, 3))
        is_disc = (x - start[0]) ** 2 + (y - (start[1] + 0.05 * t) % 1) ** 2 < 0.04
        film.append(np.where(is_disc[..., None], color, background))
    return np.array(film, np.uint8)


def _sound(frames: int, rng: np.random.Generator) -> np.ndarray:
    """int16 [S]: a tone at 8000 samples a second, as long as the frames at 4 a second."""
    time = np.arange(frames * 2000) / 8000
    tone = 8000 * np.sin(2 * np.pi * rng.integers(200, 800) * time)
    return tone.astype(np.int16)


def _write_gallery(
    path: pathlib.Path,
    queries: int,
    clips: int,
    size: int,
    frames: int,
    words: str,
    rng: np.random.Generator,
) -> None:
    entries = []
    for query in ('text', 'audio'):
        for i in range(queries):
            top = rng.choice(clips, min(5, clips), replace=False).tolist()
            entries.append({'query': query, 'index': i % clips, 'top': top, 'rank': 3.0})
    shown = set()
    for entry in entries:
        shown.update([entry['index'], *entry['top']])
    texts, arrays = {}, {}
    for index in sorted(shown):
        caption = f'{words}, clip {index}'
        texts[str(index)] = {'id': f'{words}.mp4', 'caption': caption, 'sentences': []}
        arrays[f'frames/{index}'] = _film(size, frames, rng)
        arrays[f'audio/{index}'] = _sound(frames, rng)
    document = {'entries': entries, 'clips': texts, 'fps': 4.0, 'rate': 8000}
    np.savez(path, entries=np.array(json.dumps(document)), **arrays)


def _write_clusters(
    path: pathlib.Path, names: list[str], size: int, frames: int, rng: np.random.Generator
) -> None:
    clusters, arrays = [], {}
    for number, name in enumerate(names[:24]):
        clips = list(range(5 * number, 5 * number + 5))
        clusters.append({'name': f'cluster {number} ({name}), 40 clips', 'clips': clips})
        for index in clips:
            arrays[f'frames/{index}'] = _film(size, frames, rng)
    document = {'evaluator': 'clusters', 'clusters': clusters, 'fps': 4.0, 'rate': 8000}
    np.savez(path, entries=np.array(json.dumps(document)), **arrays)
