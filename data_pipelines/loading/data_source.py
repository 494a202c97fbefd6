"""What the data objects share: order, hosts, passes.

A source adds how the rows it is asked for become a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows, order
from data_pipelines.loading.views import View, streams, window_seconds
from data_pipelines.storage.records import CLIPS, SPLITS
from vatt_jax.inputs import tokenizer as tokenizers
from vatt_jax.inputs.modalities import described


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which examples one host batch holds.

    Attributes:
      position: place of each example in the stream or the pass.
      source: number of its source.
      index: number of the record (or segment) within that source.
      valid: False for padding.
    """

    position: Int[np.ndarray, ' B']  # keys the random draws
    source: Int[np.ndarray, ' B']
    index: Int[np.ndarray, ' B']
    valid: Bool[np.ndarray, ' B']


@dataclasses.dataclass(frozen=True)
class TrainingRows:
    """Number of a training batch -> this host's examples; processes that decode are sent it.

    Attributes:
      stream: which record each position is.
      consumed: examples before batch 0.
      batch_size: of the global batch.
      process: (number of this host, hosts).
    """

    stream: order.Order
    consumed: int
    batch_size: int
    process: tuple[int, int]

    def __call__(self, number: int) -> Rows:
        """The rows of batch `number`, counted from `consumed` on, whatever the training step."""
        # [B], this host's rows alone.
        positions = order.train_positions(number, self.consumed, self.batch_size, self.process)
        source, index, _ = self.stream.rows(positions)
        # Endless, so no row is padding.
        return Rows(positions, source, index, np.ones(len(positions), bool))


@dataclasses.dataclass(frozen=True)
class PassRows:
    """Number of a batch of a pass -> this host's examples; processes that decode are sent it.

    Attributes:
      begins: the first example of each source.
      total: examples of the pass.
      batch_size: of the global batch.
      process: (number of this host, hosts).
      in_stretches: each host has consecutive examples, else the rows of every batch are dealt.
    """

    begins: Int[np.ndarray, ' sources']
    total: int
    batch_size: int
    process: tuple[int, int]
    in_stretches: bool = False

    @property
    def num_batches(self) -> int:
        """Batches of the pass, the same number for all hosts."""
        if self.in_stretches:
            return order.stretch_batches(self.total, self.batch_size, self.process[1])
        return order.one_pass_batches(self.total, self.batch_size)

    def __call__(self, number: int) -> Rows:
        """The rows of batch `number`."""
        rows_of_batch = order.stretch_pass if self.in_stretches else order.one_pass
        positions, valid = rows_of_batch(number, self.total, self.batch_size, self.process)
        # Padding points at the first example, so that every lookup is in range.
        examples = np.where(valid, positions, 0)
        # The last source that begins at or before the example; 'right' passes over empty ones.
        source = (np.searchsorted(self.begins, examples, side='right') - 1).astype(np.int32)
        index = np.where(valid, examples - self.begins[source], 0)
        return Rows(positions, source, index, valid)


@dataclasses.dataclass(frozen=True)
class Request:
    """How rows become a batch.

    Attributes:
      split: of the dataset.
      views: the streams of a batch.
      segments: `Rows.index` counts segments, else records.
      centred: evaluation's windows, else random ones.
      augment: random crop and flip.
      site: keeps the draws of a pass apart from those of training.
    """

    split: str
    views: tuple[View, ...]
    segments: bool
    centred: bool
    augment: bool
    site: str


class Data:
    """The data object of docs/architecture.md; `config` is the resolved config of the run.

    A subclass sets `info` and implements `texts`, `_sources` and `_batches`.
    """

    info: dict[str, Any]

    def __init__(self, config: ConfigDict):
        self.config = config
        self.inputs = described(config.model.inputs)
        self.window = window_seconds(self.inputs)  # seconds
        self._views = streams(self.inputs, config.data.views)

    # ---- for subclasses
    def _sources(self, split: str, by: str) -> list[order.Source]:
        """The sources a split is made of, one after another in a pass."""
        raise NotImplementedError

    def _batches(
        self, request: Request, rows_of_batch: Callable[[int], Rows], num_batches: int | None
    ) -> Iterator[dict[str, Any]]:
        """Host batches 0, 1, … (`num_batches` of them; None: endless).

        Args:
          request: how rows become a batch.
          rows_of_batch: number of a batch -> its examples.
          num_batches: batches until the end.
        """
        raise NotImplementedError

    # ---- the contract
    def size(self, split: str, by: str = 'records') -> int:
        """Examples of one pass over a split, by 'records' or 'segments'."""
        sources = self._sources(_checked_split(split), _checked_by(by))
        return sum(source.size for source in sources)

    def offsets(self, split: str, by: str = 'records') -> Int[np.ndarray, ' sources']:
        """Where each source begins in a pass: an example's place is offsets[source] + index."""
        sources = self._sources(_checked_split(split), _checked_by(by))
        sizes = [source.size for source in sources]
        return np.cumsum([0, *sizes[:-1]])  # [sources]; the first begins at 0

    def problems(self) -> dict[str, Any]:
        """All reads so far: {'corrupt': n, 'read': n, 'indices': [(source, index, reason)]}."""
        return {'corrupt': 0, 'read': 0, 'indices': []}

    def texts(self, split: str, by: str = 'segments') -> Sequence[dict[str, Any]]:
        """{'id', 'start', 'end', 'caption', 'sentences'} of every example of a pass, by its place.

        Take only the entries that are needed: each is made when it is looked at.
        """
        raise NotImplementedError

    def clips_per_core_second(self, batch_size: int) -> float | None:
        """Training clips that one core reads and decodes in a second.

        Args:
          batch_size: of the global batch.

        Returns:
          None where no files are decoded, so that reading costs next to nothing.
        """
        return None

    def close(self) -> None:
        """Release files. Iterators have a close() of their own."""

    def train(
        self,
        consumed: int,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Endless host batches of the training mixture.

        Args:
          consumed: examples before the first batch; row r of the first global batch is the example
            at position consumed + r.
          batch_size: of the global batch.
          process: (number of this host, hosts).
          columns: {name: float [M]} sampling weights over the records of the training set (sources
            one after another), multiplied together; they choose records inside a source, the
            mixture keeps its proportions.

        Raises:
          DataError: columns that do not fit, or a batch that does not divide over the hosts.
        """
        rows_of_batch = self.training_rows(consumed, batch_size, process, columns)
        batches = self._batches(self.training_request(), rows_of_batch, None)
        if self.config.data.mismatch:
            return _mismatched(batches, tuple(self.config.data.mismatch))
        return batches

    def training_rows(
        self,
        consumed: int,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> TrainingRows:
        """Which examples the batches of `train` hold; its arguments."""
        sources = self._sources('train', 'records')
        if columns:
            sources = _with_sampling(sources, columns)
        # A batch holds exact counts of the sources that have a `share`, so the order must know
        # where batches begin: at `consumed`, which need not be a multiple of the batch size.
        stream = order.Order(
            sources, self.config.seed, batch_size, consumed, self.config.data.clips_per_epoch
        )
        order.host_rows(batch_size, process)  # raises here, not in the first batch
        return TrainingRows(stream, consumed, batch_size, process)

    def training_request(self) -> Request:
        """How the rows of `train` become a batch."""
        return Request(
            split='train',
            views=self._views,
            segments=False,
            centred=False,
            augment=True,
            site='train',
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
        in_stretches: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Every example exactly once over all hosts, in a fixed order, padded to full batches.

        Args:
          split: of the evaluation dataset (by records, `train` is the mixture).
          batch_size: of the global batch.
          process: (number of this host, hosts).
          by: examples are 'segments' or 'records'.
          augment: windows, crops and flips as in training, other ones for every `draw`.
          views: replaces config.data.views.
          limit: only the first examples.
          draw: name of this pass among augmented ones.
          window: which window the main streams show, as a view of kind `window`; None: the middle
            one.
          in_stretches: host i of n has the examples total·i/n … total·(i+1)/n, one after another;
            else every batch holds consecutive examples, whose rows are dealt to the hosts.
        """
        begins = self.offsets(split, by)
        total = self.size(split, by)
        if limit is not None:
            total = min(total, limit)
        order.host_rows(batch_size, process)  # raises here, not in the first batch
        rows_of_batch = PassRows(begins, total, batch_size, process, in_stretches)
        if views is None:
            views = self.config.data.views
        request = Request(
            split=split,
            views=streams(self.inputs, views, window),
            segments=by == 'segments',
            centred=not augment,
            augment=augment,
            # By another name each pass draws anew; the same name gives the same crops again.
            site=f'pass/{split}/{draw}' if draw else f'pass/{split}',
        )
        return self._batches(request, rows_of_batch, rows_of_batch.num_batches)

    # ---- draws and boxes, the same for every source
    def draws(self, request: Request, rows: Rows) -> Callable[[str], np.ndarray]:
        """site -> uniform float64 [B], keyed by the rows' positions."""

        def draw(site: str) -> Float[np.ndarray, ' B']:
            # The position, not the row: draws do not depend on hosts and batch size.
            full_site = f'{request.site}/{site}'
            return order.uniform(self.config.seed, rows.position, full_site, 1)[:, 0]

        return draw

    def crops(
        self,
        request: Request,
        rows: Rows,
        view: View,
        height: Int[np.ndarray, ' B'],
        width: Int[np.ndarray, ' B'],
    ) -> tuple[Float32[np.ndarray, 'B 4'], Bool[np.ndarray, ' B']]:
        """Crop and flip of one stream of pictures.

        Args:
          request: whether they are random.
          rows: whose positions key the draws.
          view: the stream; it may say where its square lies.
          height: of the frames, in pixels.
          width: of the frames, in pixels.

        Returns:
          (y0, x0, y1, x1) as fractions of the frame, and whether the clip is mirrored.
        """
        if not request.augment or view.crop is not None:
            place = 0.5 if view.crop is None else view.crop
            # A view with a square of its own is never random, not even in training.
            boxes = frame_windows.square_boxes(height, width, place)
            return boxes, np.zeros(len(rows.position), bool)
        data_config = self.config.data
        site = f'{request.site}/crop/{view.stream}'
        u = order.uniform(self.config.seed, rows.position, site, 5)  # [B 5]: four for the box, flip
        boxes = frame_windows.random_boxes(u, height, width, data_config.crop, data_config.aspect)
        return boxes, u[:, 4] < data_config.flip  # [B 4], [B]


def blank(batch: dict[str, Any], bad: Bool[np.ndarray, ' B']) -> dict[str, Any]:
    """Empty rows of a batch in place; no row moves.

    They become zeros with valid False everywhere, and their labels unknown.
    """
    if not bad.any():
        return batch
    # Shapes must not change between steps (a new shape is a new compilation), so rows stay.
    batch['valid'] = batch['valid'] & ~bad
    for name, value in batch.items():
        if isinstance(value, dict) and 'valid' in value:  # a stream; its data may come later
            blank_stream(value, bad)
        if name == 'labels':
            for label, array in value.items():
                # -1 is an unknown class number; a multi-hot row of zeros is one without any class.
                is_multi_hot = not np.issubdtype(array.dtype, np.integer)
                value[label] = _fill_rows(array, bad, 0 if is_multi_hot else -1)
    return batch


def blank_stream(stream: dict[str, Any], bad: Bool[np.ndarray, ' B']) -> None:
    """Empty rows of one stream in place: zeros with valid False."""
    if not bad.any():
        return
    for part, array in stream.items():
        stream[part] = _fill_rows(array, bad, 0)


def _fill_rows(array: np.ndarray, rows: Bool[np.ndarray, ' B'], fill: int) -> np.ndarray:
    """`array` [B ...] with these rows filled."""
    selected = rows.reshape(-1, *[1] * (array.ndim - 1))
    return np.where(selected, array.dtype.type(fill), array)


def _mismatched(
    batches: Iterator[dict[str, Any]], modalities: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The batches with every stream of these modalities one row further down.

    Each clip has its neighbour's; the order being random, that is another clip's at random.
    """
    try:
        for batch in batches:
            moved = {}
            for name, value in batch.items():
                if name.split('.')[0] in modalities:
                    # Masks and validity move along with the data that they describe.
                    moved[name] = {part: np.roll(x, 1, axis=0) for part, x in value.items()}
                else:
                    moved[name] = value
            yield moved
    finally:
        batches.close()  # type: ignore[attr-defined]  # iterators of batches have one


def tokenizer_of(
    inputs: Mapping[str, Any], data_spec: Mapping[str, Any], where: str
) -> tokenizers.Tokenizer:
    """The tokenizer of config.model.inputs.text if it holds a spec, else the data's own.

    The config of a trained model holds a spec.

    Args:
      inputs: config.model.inputs.
      data_spec: the spec of the data's tokenizer.
      where: the data's name in the error.

    Raises:
      DataError: the config names a kind of tokenizer that is not the data's.
    """
    expected = inputs.get('text', {}).get('tokenizer', data_spec['kind'])
    if not isinstance(expected, str):
        return tokenizers.from_spec(expected)
    if expected != data_spec['kind']:
        raise DataError(
            f'config.model.inputs.text.tokenizer is {expected!r} and {where} has a '
            f'{data_spec["kind"]!r} vocabulary; '
            f'prepare it with --tokenizer={expected}, or set the field'
        )
    return tokenizers.from_spec(data_spec)


def _with_sampling(
    sources: list[order.Source], columns: Mapping[str, np.ndarray]
) -> list[order.Source]:
    """Multiply the sampling weights by the columns [M], sources one after another."""
    total = sum(source.size for source in sources)
    factors = []
    for name, values in columns.items():
        column = np.asarray(values)
        if column.shape != (total,):
            raise DataError(
                f'column {name!r} has shape {column.shape}; the training set has {total} records'
            )
        factors.append(column)
    weighted = []
    begin = 0
    for source in sources:
        end = begin + source.size
        # Views, multiplied where a record is drawn: no copy of M weights is made.
        sampling = [column[begin:end] for column in factors]
        # Even without weights of its own a source is now drawn with replacement, no longer in
        # epochs.
        if source.sampling is not None:
            sampling += source.sampling if isinstance(source.sampling, tuple) else [source.sampling]
        weighted.append(dataclasses.replace(source, sampling=tuple(sampling)))
        begin = end
    return weighted


def _checked_split(split: str) -> str:
    if split not in (*SPLITS, CLIPS):
        raise DataError(
            f'split {split!r} is unknown; splits are {", ".join(SPLITS)}, '
            f'and {CLIPS} of a dataset with folds'
        )
    return split


def _checked_by(by: str) -> str:
    if by not in ('segments', 'records'):
        raise DataError(f"by={by!r}; a pass goes by 'segments' or 'records'")
    return by
