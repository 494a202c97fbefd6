"""What the data objects share: order, hosts, passes. A source adds how the rows it is asked for become a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows, order
from data_pipelines.loading.views import View, streams, window_seconds
from data_pipelines.storage.records import CLIPS, SPLITS
from vatt_jax.inputs import tokenizer as tokenizers


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one host batch shall hold. position int64 [B], source int32 [B], index int64 [B], valid bool [B] (False: padding)."""

    position: np.ndarray
    source: np.ndarray
    index: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """How rows become a batch. segments: `index` counts segments, else records. centred: evaluation's windows, else random
    ones. augment: random crop and flip. site: keeps the draws of a pass apart from those of training."""

    split: str
    views: tuple[View, ...]
    segments: bool
    centred: bool
    augment: bool
    site: str


class Data:
    """The data object of docs/architecture.md; `config` is the resolved config of the run.

    A subclass sets `info` and implements `size`, `texts`, `_sizes` and `_batches`.
    """

    info: dict[str, Any]

    def __init__(self, config):
        self.config = config
        self.inputs = {k: dict(v) for k, v in config.model.inputs.items()}
        self.window = window_seconds(self.inputs)
        self._views = streams(self.inputs, config.data.views)
        self._problems: dict[str, Any] = {'corrupt': 0, 'read': 0, 'indices': []}

    # ---- for subclasses
    def _sources(self, split: str, by: str) -> list[order.Source]:
        """The sources a split is made of, one after another in a pass."""
        raise NotImplementedError

    def _batches(
        self, request: Request, rows: Callable[[int], Rows], number: int | None
    ) -> Iterator[dict[str, Any]]:
        """Batches 0, 1, … (`number` of them, None: endless), each of the rows that rows(i) names."""
        raise NotImplementedError

    # ---- the contract
    def size(self, split: str, by: str = 'records') -> int:
        """Examples of one pass over a split."""
        return sum(s.size for s in self._sources(_split(split), _by(by)))

    def offsets(self, split: str, by: str = 'records') -> np.ndarray:
        """int64 [sources]: where each source begins in a pass, so an example's place in it is offsets[source] + index."""
        sizes = [s.size for s in self._sources(_split(split), _by(by))]
        return np.cumsum([0, *sizes[:-1]])

    def problems(self) -> dict[str, Any]:
        """{'corrupt': count, 'read': count, 'indices': [(source, index, reason)]} of all reads so far."""
        return {**self._problems, 'indices': list(self._problems['indices'])}

    def texts(self, split: str, by: str = 'segments') -> list[dict[str, Any]]:
        """{'id', 'start', 'end', 'caption', 'sentences'} of every example of a pass, by index."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases files. Iterators have a close() of their own."""

    def train(
        self,
        consumed: int,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Endless host batches; row r of the first global batch is the example at position consumed + r.

        columns: {name: float [M]} sampling weights over the records of the training set (sources one after another), multiplied
        together; they choose records inside a source, the mixture keeps its proportions.
        """
        sources = self._sources('train', 'records')
        if columns:
            sources = _weigh(sources, columns)
        stream = order.Order(sources, self.config.seed, batch_size, consumed)
        order.host_rows(batch_size, process)  # stops here, not in the first batch

        def rows(step: int) -> Rows:
            positions = order.train_positions(step, consumed, batch_size, process)
            source, index, _ = stream.rows(positions)
            return Rows(positions, source, index, np.ones(len(positions), bool))

        batches = self._batches(
            Request('train', self._views, False, False, True, 'train'), rows, None
        )
        return (
            _mismatched(batches, tuple(self.config.data.mismatch))
            if self.config.data.mismatch
            else batches
        )

    def one_pass(
        self,
        split: str,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        by: str = 'segments',
        augment: bool = False,
        views: Mapping[str, Any] | None = None,
        limit: int | None = None,
        draw: str = '',
        window: Mapping[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Every example (or the first `limit`) exactly once over all hosts, in a fixed order, padded to full batches.

        augment: windows, crops and flips as in training, other ones for every `draw`. views: replaces config.data.views. window: which window
        the main streams show, as a view of kind `window`; None: the middle one.
        """
        begins = self.offsets(split, by)
        total = self.size(split, by)
        total = total if limit is None else min(total, limit)
        order.host_rows(batch_size, process)

        def rows(step: int) -> Rows:
            positions, valid = order.one_pass(step, total, batch_size, process)
            number = np.where(valid, positions, 0)
            source = (np.searchsorted(begins, number, side='right') - 1).astype(np.int32)
            return Rows(positions, source, np.where(valid, number - begins[source], 0), valid)

        chosen = streams(self.inputs, self.config.data.views if views is None else views, window)
        request = Request(
            split,
            chosen,
            by == 'segments',
            not augment,
            augment,
            f'pass/{split}{draw and "/" + draw}',
        )
        return self._batches(request, rows, order.one_pass_batches(total, batch_size))

    # ---- draws and boxes, the same for every source
    def _draw(self, request: Request, rows: Rows) -> Callable[[str], np.ndarray]:
        return lambda site: order.uniform(
            self.config.seed, rows.position, f'{request.site}/{site}', 1
        )[:, 0]

    def _crops(
        self, request: Request, rows: Rows, view: View, height: np.ndarray, width: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(box float32 [B 4], flip bool [B]) of one video stream."""
        if not request.augment or view.crop is not None:
            return frame_windows.square_boxes(
                height, width, 0.5 if view.crop is None else view.crop
            ), np.zeros(len(rows.position), bool)
        d = self.config.data
        u = order.uniform(self.config.seed, rows.position, f'{request.site}/crop/{view.stream}', 5)
        return frame_windows.random_boxes(u, height, width, d.crop, d.aspect), u[:, 4] < d.flip


def blank(batch: dict[str, Any], bad: np.ndarray) -> dict[str, Any]:
    """The batch with rows `bad` [B] emptied in place: zeros and valid False everywhere, labels unknown; no row moves."""
    if not bad.any():
        return batch
    batch['valid'] = batch['valid'] & ~bad
    for name, value in batch.items():
        if isinstance(value, dict) and 'valid' in value:  # a stream; its data may come later
            for part in value:
                value[part] = np.where(
                    bad.reshape(-1, *[1] * (value[part].ndim - 1)),
                    np.zeros((), value[part].dtype),
                    value[part],
                )
        if name == 'labels':
            for label, array in value.items():
                unknown = -1 if np.issubdtype(array.dtype, np.integer) else 0
                value[label] = np.where(
                    bad.reshape(-1, *[1] * (array.ndim - 1)), array.dtype.type(unknown), array
                )
    return batch


def _mismatched(
    batches: Iterator[dict[str, Any]], modalities: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The batches with every stream of these modalities one row further down: each clip has its neighbour's, and the order is random."""
    try:
        for batch in batches:
            moved = {
                k: {part: np.roll(x, 1, 0) for part, x in v.items()}
                if k.split('.')[0] in modalities
                else v
                for k, v in batch.items()
            }
            yield moved
    finally:
        batches.close()


def tokenizer_of(
    inputs: Mapping[str, Any], own: Mapping[str, Any], where: str
) -> tokenizers.Tokenizer:
    """The tokenizer of config.model.inputs.text if it holds a spec (a trained model's config does), else the data's own."""
    wanted = inputs.get('text', {}).get('tokenizer', own['kind'])
    if not isinstance(wanted, str):
        return tokenizers.from_spec(wanted)
    if wanted != own['kind']:
        raise DataError(
            f'config.model.inputs.text.tokenizer is {wanted!r} and {where} has a {own["kind"]!r} vocabulary; prepare '
            f'it with --tokenizer={wanted}, or set the field'
        )
    return tokenizers.from_spec(own)


def _weigh(sources: list[order.Source], columns: Mapping[str, np.ndarray]) -> list[order.Source]:
    total = sum(s.size for s in sources)
    weights = np.ones(total)
    for name, column in columns.items():
        column = np.asarray(column, np.float64)
        if column.shape != (total,):
            raise DataError(
                f'column {name!r} has shape {column.shape}; the training set has {total} records'
            )
        weights = weights * column
    ends = np.cumsum([s.size for s in sources])
    own = lambda s: 1.0 if s.sampling is None else s.sampling
    return [
        dataclasses.replace(s, sampling=own(s) * weights[end - s.size : end])
        for s, end in zip(sources, ends)
    ]


def _split(split: str) -> str:
    if split not in (*SPLITS, CLIPS):
        raise DataError(
            f'split {split!r} is unknown; splits are {", ".join(SPLITS)}, and {CLIPS} of a dataset with folds'
        )
    return split


def _by(by: str) -> str:
    if by not in ('segments', 'records'):
        raise DataError(f"by={by!r}; a pass goes by 'segments' or 'records'")
    return by
