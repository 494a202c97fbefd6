"""What evaluators found, to look at: clips that came first for a few queries, and the surest ones of each cluster."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vatt_jax.evals.base import Result


def save(
    folder: pathlib.Path, results: Mapping[str, Result], config, data, batch_size: int
) -> None:
    """Writes gallery.npz (`retrievals`) and clusters.npz (`clusters`) where there is something to show. config: `config.evals`. Single process."""
    retrievals(folder / 'gallery.npz', results, config, data, batch_size)
    clusters(folder / 'clusters.npz', results, config, data, batch_size)


def clusters(
    path: pathlib.Path, results: Mapping[str, Result], config, data, batch_size: int
) -> None:
    """Writes <path> (npz): `entries` (JSON: evaluator, and [{'name', 'clips': places in the pass}]) and frames/<place> uint8 [T H W 3] of the surest
    clips of the largest clusters, for the first evaluator of type `clustering` that has them."""
    for name, entry in config.items():
        chosen = (
            results[name].artifacts.get('surest')
            if name in results and entry.get('type') == 'clustering'
            else None
        )
        if not chosen:
            continue
        wanted, frames = {i for c in chosen for i in c['clips']}, {}
        for batch in data.one_pass(entry.get('split', 'train'), batch_size):
            for row, index in enumerate(batch['position'].tolist()):
                if index in wanted and batch['valid'][row] and 'video' in batch:
                    frames[f'frames/{index}'] = batch['video']['data'][row]
        np.savez_compressed(
            path, entries=np.array(json.dumps({'evaluator': name, 'clusters': chosen})), **frames
        )
        return


def retrievals(
    path: pathlib.Path,
    results: Mapping[str, Result],
    config,
    data,
    batch_size: int,
    queries: int = 8,
) -> None:
    """Writes <path> (npz): `entries` (JSON), frames/<index> uint8 [T H W 3] and audio/<index> int16 [S]. Single process.

    Takes the evaluators of type `retrieval` that change nothing; queries are spaced evenly over the gallery, so
    nobody chose them.
    """
    entries, frames, sounds = [], set(), set()
    split, limit = None, None
    for name, entry in config.items():
        if (
            entry.get('type') != 'retrieval'
            or entry.get('change')
            or entry.get('views')
            or name not in results
        ):
            continue
        here = (entry.get('split', 'test'), entry.get('limit', 512))
        if split is not None and here != (split, limit):
            continue  # one gallery, one pass
        split, limit = here
        found = results[name].artifacts
        for key in [k.removesuffix('/top') for k in found if k.endswith('/top')]:
            query, _, gallery = key.partition('_to_')
            if gallery != 'video':
                continue
            clips = found[f'{key}/clips']
            for row in np.linspace(0, len(clips) - 1, queries).astype(int):
                top = found[f'{key}/top'][row].tolist()
                entries.append(
                    {
                        'query': query,
                        'index': int(clips[row]),
                        'top': top,
                        'rank': float(found[f'{key}/rank'][row]),
                    }
                )
                frames |= {int(clips[row]), *top}
                sounds |= {int(clips[row])} if query == 'audio' else set()
    if not entries:
        return
    arrays: dict[str, Any] = {}
    for batch in data.one_pass(split, batch_size, limit=limit):
        for row, index in enumerate(batch['position'].tolist()):
            if batch['valid'][row] and index in frames:
                arrays[f'frames/{index}'] = batch['video']['data'][row]
            if batch['valid'][row] and index in sounds:
                arrays[f'audio/{index}'] = batch['audio']['data'][row]
    texts = data.texts(split)
    told = {
        str(i): {k: texts[i][k] for k in ('id', 'start', 'end', 'caption', 'sentences')}
        for i in sorted(frames)
    }
    document = {
        'entries': entries,
        'clips': told,
        'rate': int(data.config.model.inputs.audio.rate) if sounds else 0,
    }
    np.savez_compressed(path, entries=np.array(json.dumps(document)), **arrays)
