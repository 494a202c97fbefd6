"""What evaluators found, to look at.

Clips that came first for a few queries, and the surest ones of each cluster.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from vatt_jax.evals.base import Result


def save(
    folder: pathlib.Path, results: Mapping[str, Result], config: Any, data: Any, batch_size: int
) -> None:
    """Write gallery.npz (`retrievals`) and clusters.npz (`clusters`).

    Each is written where there is something to show. Single process.

    Args:
      folder: of the evaluation.
      results: evaluator -> what it found.
      config: `config.evals`.
      data: the data object of docs/architecture.md.
      batch_size: clips read at a time.
    """
    retrievals(folder / 'gallery.npz', results, config, data, batch_size)
    clusters(folder / 'clusters.npz', results, config, data, batch_size)


def clusters(
    path: pathlib.Path, results: Mapping[str, Result], config: Any, data: Any, batch_size: int
) -> None:
    """Write the surest clips of the largest clusters.

    They come from the first evaluator of type `clustering` that has them. The file (npz) holds
    `entries` (JSON: evaluator, [{'name', 'clips': indices in the pass}], `fps` and `rate`),
    frames/<index> uint8 [T H W 3] and audio/<index> int16 [S].
    """
    for name, entry in config.items():
        if name not in results or entry.get('type') != 'clustering':
            continue
        surest = results[name].artifacts.get('surest')
        if not surest:
            continue
        # A second pass over the data, since evaluation stores features and no frames.
        shown = {clip for cluster in surest for clip in cluster['clips']}
        # Indices are positions in the pass, so this must be the same split, in segments, without
        # augmentation. The default is that of `Clustering`.
        batches = data.one_pass(entry.get('split', 'train'), batch_size)
        arrays = _stored_arrays(batches, shown)
        document = {'evaluator': name, 'clusters': surest, **_speeds(data)}
        _savez(path, document, arrays)
        return


def retrievals(
    path: pathlib.Path,
    results: Mapping[str, Result],
    config: Any,
    data: Any,
    batch_size: int,
    queries: int = 8,
) -> None:
    """Write the clips that came first for a few queries. Single process.

    Takes the evaluators of type `retrieval` that change nothing; queries are spaced evenly over the
    gallery, so nobody chose them. The file (npz) holds `entries` (JSON: what was found, what is
    said of each clip, `fps` and `rate`), frames/<index> uint8 [T H W 3] and audio/<index> int16
    [S], the sound of every clip that has one.
    """
    entries: list[dict[str, Any]] = []
    gallery: tuple[str, int] | None = None  # (split, limit)
    for name, entry in config.items():
        if name not in results or not _is_plain_retrieval(entry):
            continue
        # `config` holds entries as written, without the evaluator's defaults: these repeat those of
        # `Retrieval`.
        entry_gallery = (entry.get('split', 'test'), entry.get('limit', 512))
        if gallery is None:
            gallery = entry_gallery
        if entry_gallery == gallery:  # one gallery, one pass
            entries += _retrieval_entries(results[name].artifacts, queries)
    if gallery is None or not entries:
        return

    shown = set()
    for entry in entries:
        # The query's own clip is shown too, beside what came first.
        shown.update([entry['index'], *entry['top']])
    split, limit = gallery
    arrays = _stored_arrays(data.one_pass(split, batch_size, limit=limit), shown)
    texts = data.texts(split)
    fields = ('id', 'start', 'end', 'caption', 'sentences')
    clips = {}
    for index in sorted(shown):
        # JSON has only strings as keys.
        clips[str(index)] = {field: texts[index][field] for field in fields}
    _savez(path, {'entries': entries, 'clips': clips, **_speeds(data)}, arrays)


def _speeds(data: Any) -> dict[str, float]:
    """Frames and samples a second of what the data object yields."""
    inputs = data.config.model.inputs
    return {'fps': float(inputs.video.fps), 'rate': int(inputs.audio.rate)}


def _is_plain_retrieval(entry: Any) -> bool:
    """Whether an entry of `config.evals` retrieves clips whose input is not changed."""
    if entry.get('type') != 'retrieval':
        return False
    return not entry.get('change') and not entry.get('views')


def _retrieval_entries(artifacts: Mapping[str, Any], queries: int) -> list[dict[str, Any]]:
    """What to show of one retrieval: queries against galleries of video."""
    entries = []
    for key in artifacts:
        if not key.endswith('/top'):
            continue
        pair = key.removesuffix('/top')
        # Artifacts of `Retrieval` are named 'text_to_video/top'.
        query, _, gallery = pair.partition('_to_')
        # Only video can be shown as a row of pictures.
        if gallery != 'video':
            continue
        # [N], the positions in the pass of the rows of all arrays of this pair.
        clips = artifacts[f'{pair}/clips']
        # Galleries smaller than `queries` would give some rows twice.
        for row in np.unique(np.linspace(0, len(clips) - 1, queries).astype(int)):
            entries.append(
                {
                    'query': query,
                    'index': int(clips[row]),
                    'top': artifacts[key][row].tolist(),
                    'rank': float(artifacts[f'{pair}/rank'][row]),
                }
            )
    return entries


def _stored_arrays(
    batches: Iterable[Mapping[str, Any]], shown: Collection[int]
) -> dict[str, np.ndarray]:
    """frames/<index> [T H W 3] and audio/<index> [S] of the clips with these indices."""
    arrays = {}
    for batch in batches:
        # `position` numbers the whole pass; `index` starts anew in each source.
        for row, index in enumerate(batch['position'].tolist()):
            # Rows that fill up the last batch, or could not be read.
            if not batch['valid'][row] or index not in shown:
                continue
            if 'video' in batch:
                arrays[f'frames/{index}'] = batch['video']['data'][row]
            # Zeros stand in for a missing sound.
            if 'audio' in batch and batch['audio']['valid'][row]:
                arrays[f'audio/{index}'] = batch['audio']['data'][row]
    return arrays


def _savez(
    path: pathlib.Path, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write <path> (npz): `entries`, a JSON document, and the arrays."""
    # A string array of no dimension: reading it needs no pickle.
    entries = np.array(json.dumps(document))
    np.savez_compressed(path, entries=entries, **arrays)  # type: ignore[arg-type]  # stubs: a flag
