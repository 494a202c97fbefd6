"""What trackers get of an evaluation beside its scalars: a table and pictures."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num, Shaped, UInt8

from vatt_jax.evals.base import Result
from vatt_jax.training.trackers import Trackers

# Pixels along the longer side of a frame and of a matrix.
FRAME_SIZE = 112
MATRIX_SIZE = 512
BORDER = 3
# Frame of the query's own clip, RGB.
OWN = (0, 160, 90)


def report(
    trackers: Trackers, step: int, results: Mapping[str, Result], folder: pathlib.Path
) -> None:
    """Hand an evaluation to the trackers.

    Args:
        trackers: Of the run.
        step: Of the evaluated state.
        results: Evaluator -> what it found.
        folder: Of the evaluation, for its gallery, if there is one.
    """
    if not trackers.open:
        return
    trackers.text(step, 'evaluation', table(results))
    for evaluator, result in results.items():
        for name, artifact in result.artifacts.items():
            if name.endswith('/similarity'):
                picture = similarity_image(np.asarray(artifact))
                trackers.image(step, f'{evaluator}/{name}', picture)
    gallery = folder / 'gallery.npz'
    if gallery.exists():
        for query, picture in gallery_images(gallery).items():
            trackers.image(step, f'gallery/{query}_to_video', picture)


def table(results: Mapping[str, Result]) -> str:
    """Return a table in Markdown: scalars with their intervals and what chance gives."""
    lines = ['| evaluator | score | value | 95 % interval | chance |', '|---|---|---|---|---|']
    for evaluator, result in results.items():
        for name, value in result.scalars.items():
            interval = result.artifacts.get(f'{name}/interval')
            limits = f'{interval[0]:.4g} to {interval[1]:.4g}' if interval else ''
            chance = result.artifacts.get(f'{name}/chance')
            chance_text = '' if chance is None else f'{chance:.4g}'
            lines.append(f'| {evaluator} | {name} | {value:.4g} | {limits} | {chance_text} |')
    return '\n'.join(lines)


def similarity_image(similarity: Shaped[np.ndarray, 'N N']) -> UInt8[np.ndarray, 'H W 3']:
    """Return similarities as shades of grey, the highest white; what is not finite is black."""
    values = similarity[:MATRIX_SIZE, :MATRIX_SIZE].astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.any():
        grey = np.zeros(values.shape, np.uint8)
    else:
        low, high = values[is_finite].min(), values[is_finite].max()
        shades = (values - low) / max(high - low, 1e-12)
        grey = np.where(is_finite, 255 * shades, 0).astype(np.uint8)
    # A matrix of few clips would be a speck.
    scale = max(1, MATRIX_SIZE // len(grey))
    grey = grey.repeat(scale, 0).repeat(scale, 1)
    return np.stack([grey, grey, grey], -1)


def gallery_images(path: pathlib.Path) -> dict[str, UInt8[np.ndarray, 'H W 3']]:
    """Return a picture for each kind of query of a gallery, see `evals.gallery.retrievals`.

    A row is a query: the middle frame of its own clip, then those of the clips that came first. The
    own clip has a green frame wherever it is.
    """
    pictures: dict[str, list[np.ndarray]] = {}
    with np.load(path) as stored:
        document: dict[str, Any] = json.loads(str(stored['entries']))
        for entry in document['entries']:
            tiles = []
            for index in (entry['index'], *entry['top'][:5]):
                name = f'frames/{index}'
                # Clips that could not be read are missing.
                if name in stored.files:
                    tiles.append(_tile(stored[name], is_own=index == entry['index']))
            if tiles:
                pictures.setdefault(entry['query'], []).append(np.concatenate(tiles, 1))
    return {query: _stack(rows) for query, rows in pictures.items()}


def _tile(frames: Num[np.ndarray, 'T H W 3'], is_own: bool) -> UInt8[np.ndarray, 'H2 W2 3']:
    """Return a clip's middle frame, made smaller by leaving pixels out, in a frame."""
    picture = frames[len(frames) // 2]
    stride = max(1, -(-max(picture.shape[:2]) // FRAME_SIZE))
    small = picture[::stride, ::stride]
    height, width = small.shape[:2]
    tile = np.full((height + 2 * BORDER, width + 2 * BORDER, 3), 255, np.uint8)
    if is_own:
        tile[:] = OWN
    tile[BORDER:-BORDER, BORDER:-BORDER] = small
    return tile


def _stack(rows: list[UInt8[np.ndarray, 'H W 3']]) -> UInt8[np.ndarray, 'H2 W2 3']:
    """Return rows of pictures below one another; shorter ones are white at their end."""
    width = max(row.shape[1] for row in rows)
    padded = []
    for row in rows:
        missing = ((0, 0), (0, width - row.shape[1]), (0, 0))
        padded.append(np.pad(row, missing, constant_values=255))
    return np.concatenate(padded, 0)
