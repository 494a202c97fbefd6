"""Prepared records -> host batches: the training mixture and the evaluation dataset of a run.

A batch is planned from the index alone (`batch_plan`), just the frames and the sound that were
chosen are read and checked (`record_reader`), and TensorFlow's threads decode the frames
(`record_batches`), in this process or in several others (`worker_batches`).
"""

from __future__ import annotations

import bisect
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.loading import order, reading_speed
from data_pipelines.loading.batch_plan import BatchPlanner
from data_pipelines.loading.data_source import SPLITS, Data, Request, Rows, tokenizer_of
from data_pipelines.loading.few_labels import few_labels
from data_pipelines.loading.lazy_split import LazySplit
from data_pipelines.loading.record_batches import RecordBatches
from data_pipelines.loading.record_reader import ReadProblems, RecordReader
from data_pipelines.loading.texts import Texts
from data_pipelines.loading.worker_batches import WorkerBatches, useful_workers
from data_pipelines.storage.record_index import Index
from data_pipelines.storage.records import Prepared, read_entries
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.inputs.tokenizer import Tokenizer
from vatt_jax.object_store import StoreSettings

# A mixture of more sources opens each at its first record.
OPENED_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One source of the training mixture.

    Attributes:
      name: its name in config.data.train.
      entry: its fields there, all of them.
      split: the records.
    """

    name: str
    entry: dict[str, Any]
    split: LazySplit


class Records(Data):
    """The data object of prepared records.

    config.data.train is the training mixture {name: {path, split, weight, share, fold, label,
    per_class}} (no path: what config.data.make makes); config.data.eval {path, fold} the dataset
    that evaluation passes read (default: the first training source). `train` by records means the
    mixture, everything else the evaluation dataset.

    info['tokenizer'] is that of config.model.inputs.text if it holds a spec, else the first
    source's.
    """

    def __init__(self, config: ConfigDict):
        """Open the datasets of a resolved config.

        Raises:
          DataError: nothing to read, or datasets that are missing, damaged or do not fit the config
            or one another.
        """
        super().__init__(config)
        # The mixture {name: entry}, and the entry of config.data.eval, whose path is '' when
        # unset.
        entries, evaluation_entry = read_entries(config)
        if not entries and not evaluation_entry['path']:
            raise DataError(
                "config.data.source is 'records' and config.data.train is empty; set it to "
                "{'mine': {'path': FOLDER}} with a folder made by python -m data_pipelines.prepare"
            )
        all_entries = [*entries.values()]
        if evaluation_entry['path']:
            all_entries.append(evaluation_entry)
        # A folder that several entries name (one split to train on, another to evaluate) is opened
        # once: its metadata and tokenizer are shared, and `is` tells whether two entries mean one
        # dataset.
        datasets = self._open_datasets(all_entries)
        self._check_frame_sizes(datasets, entries.values())
        flow = self._check_flow(list(datasets.values()))

        self._mixture: list[MixtureSource] = []
        for name, entry in entries.items():
            split = LazySplit(datasets[_dataset_key(entry)], entry['split'], name)
            self._mixture.append(MixtureSource(name, entry, split))
        if len(self._mixture) <= OPENED_AT_ONCE:
            # What is damaged or missing shows before the run begins.
            for source in self._mixture:
                source.split.open()
        # Without config.data.eval, evaluators read the first source, so that a config with one
        # dataset names it once.
        if evaluation_entry['path']:
            self._evaluated = datasets[_dataset_key(evaluation_entry)]
        else:
            self._evaluated = self._mixture[0].split.prepared
        # Sampling weights of the records of sources of which only a few labels are known.
        self._few_labels: dict[str, np.ndarray] = {}
        for source in self._mixture:
            label, per_class = source.entry['label'], source.entry['per_class']
            if per_class:
                # Edits the index of this source in memory: its other labels become unknown.
                # Nothing on disk changes.
                weights = few_labels(source.split, label, per_class, config.seed)
                self._few_labels[source.name] = weights
        # By split name, for evaluation passes; `_splits_of_pass` adds those that are opened later.
        self._splits = self._splits_of_mixture()

        # One tokenizer encodes all sources, since the embedding table has one vocabulary.
        first = self._mixture[0].split.prepared if self._mixture else self._evaluated
        self.tokenizer: Tokenizer = tokenizer_of(self.inputs, first.tokenizer(), str(first.path))
        labels, self._label_classes = _merge_labels(datasets.values())
        source_names = [source.name for source in self._mixture]
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': labels,
            'sources': source_names or [self._evaluated.meta['name']],
        }
        if flow:
            self.info['flow'] = flow
        self._problems = ReadProblems(config.data.max_corrupt)
        # Weak references: an iterator that its user has dropped can be collected although this
        # object lives on.
        self._iterators: weakref.WeakSet[RecordBatches | WorkerBatches] = weakref.WeakSet()

    def _open_datasets(self, entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], Prepared]:
        """Each (path, fold) of the entries once, checked against config.model.inputs."""
        datasets: dict[tuple[str, int], Prepared] = {}
        for entry in entries:
            # The fold is part of the key: it decides which records belong to which split.
            key = _dataset_key(entry)
            if key not in datasets:
                datasets[key] = Prepared(*key, StoreSettings.from_config(self.config))
                datasets[key].check(self.inputs)
        return datasets

    def _check_frame_sizes(
        self, datasets: dict[tuple[str, int], Prepared], entries: Iterable[dict[str, Any]]
    ) -> None:
        # `size` is the short side of stored frames, in pixels. Frames of one batch must have one
        # shape, and a batch mixes sources; frames of different aspect ratios can be cut to a
        # square of this side, frames of different sizes cannot.
        train_sizes = {datasets[_dataset_key(entry)].meta['size'] for entry in entries}
        has_pictures = any(kind_of(modality) == PICTURES for modality in self.inputs)
        if len(train_sizes) > 1 and has_pictures:
            sizes = sorted({prepared.meta['size'] for prepared in datasets.values()})
            raise DataError(
                f'the sources of config.data.train store frames of different sizes {sizes}; '
                'prepare them with the same --size'
            )

    def _check_flow(self, datasets: list[Prepared]) -> dict[str, Any]:
        """How all optical flow was computed: {'method', 'bound', 'size'}; {} if none is read.

        Raises:
          DataError: no dataset has flow, or two have flow of different meaning.
        """
        if 'flow' not in self.inputs:
            return {}
        with_flow = [prepared for prepared in datasets if prepared.flow]
        if not with_flow:
            raise DataError(
                f'config.model.inputs.flow is given and {datasets[0].path} has no optical flow; '
                'prepare it again with --flow, or set the field to {}'
            )
        first = with_flow[0]
        for prepared in with_flow:
            if prepared.flow != first.flow or prepared.meta['size'] != first.meta['size']:
                raise DataError(
                    f'the optical flow of {prepared.path} is {prepared.flow} on frames of '
                    f'{prepared.meta["size"]} pixels, that of {first.path} {first.flow} on '
                    f'{first.meta["size"]}; prepare both with the same --flow and --size'
                )
        return {**first.flow, 'size': first.meta['size']}

    def _splits_of_mixture(self) -> dict[str, LazySplit]:
        """Splits that the mixture opened and an evaluation pass may read too.

        Not those of which only a few labels are known: evaluation needs all of them.
        """
        splits: dict[str, LazySplit] = {}
        for source in self._mixture:
            split = source.split
            # An index may hold millions of rows, so it is not loaded twice.
            is_evaluated = split.prepared is self._evaluated and split.split in SPLITS
            if is_evaluated and source.name not in self._few_labels:
                splits[split.split] = split
        return splits

    # ---- what a split is made of
    def _is_mixture(self, split: str, by: str) -> bool:
        return split == 'train' and by == 'records' and bool(self._mixture)

    def _splits_of_pass(self, split: str, by: str) -> list[LazySplit]:
        """The split of each source that a pass or training reads; none if it does not exist."""
        # By segments, `train` means the train split of the evaluation dataset, in order and each
        # segment once, whatever the weights of the mixture.
        if self._is_mixture(split, by):
            return [source.split for source in self._mixture]
        if split not in self._evaluated.splits:
            return []
        if split not in self._splits:
            self._splits[split] = LazySplit(self._evaluated, split)
        # There is one such dataset, and evaluators ask for its sizes before training begins: what
        # is damaged shows then, not after hours.
        self._splits[split].open()
        return [self._splits[split]]

    def _sources(self, split: str, by: str) -> list[order.Source]:
        sources = []
        if self._is_mixture(split, by):
            for source in self._mixture:
                sources.append(
                    order.Source(
                        size=len(source.split),
                        weight=float(source.entry['weight']),
                        share=float(source.entry['share']),
                        # None for a source that draws its records uniformly.
                        sampling=self._few_labels.get(source.name),
                        name=source.name,
                    )
                )
            return sources
        # A pass over the evaluation dataset: one split, no weights, each example once.
        for opened in self._splits_of_pass(split, by):
            size = len(opened) if by == 'records' else opened.num_segments
            sources.append(order.Source(size, name=opened.name))
        return sources

    def texts(self, split: str, by: str = 'segments') -> Texts:
        """Texts of every example of a pass, by its place in the pass; each is made when asked for.

        Returns:
          {'id', 'start', 'end', 'caption', 'sentences', 'ground_truth'} of each.
        """
        splits = self._splits_of_pass(split, by)
        # The first example of each source, and the number of all.
        begins = [*self.offsets(split, by).tolist(), self.size(split, by)]
        text_of = _record_text if by == 'records' else _segment_text

        def entry(place: int) -> dict[str, Any]:
            # The last source that begins at or before the example.
            source = bisect.bisect_right(begins, place) - 1
            return text_of(splits[source].index, place - begins[source])

        return Texts(range(begins[-1]), entry)

    def planner(self, request: Request) -> BatchPlanner:
        """Plans the batches of a request.

        Raises:
          DataError: the evaluation dataset has no such split.
        """
        splits = self._splits_of_pass(request.split, 'segments' if request.segments else 'records')
        if not splits:
            raise DataError(
                f'{self._evaluated.path} has no split {request.split!r}; it has '
                f'{", ".join(self._evaluated.splits)} '
                '(config.data.eval names the dataset that evaluators read)'
            )
        # A planner for each request: it depends on the views, which differ between passes.
        return BatchPlanner(self, self.tokenizer, self._label_classes, request, splits)

    def _batches(
        self, request: Request, rows_of_batch: Callable[[int], Rows], num_batches: int | None
    ) -> Iterator[dict[str, Any]]:
        # Made here in any case: what is wrong with the request is told before workers start.
        planner = self.planner(request)
        workers = useful_workers(self.config.data.workers, num_batches)
        iterator: RecordBatches | WorkerBatches
        if workers:
            iterator = WorkerBatches(
                self.config, request, rows_of_batch, num_batches, workers, self._problems
            )
        else:
            reader = RecordReader(planner, self._problems)
            # It calls the three in turn for each batch: rows_of_batch, then planner.plan, then
            # reader.read; the frames that were read it decodes itself.
            iterator = RecordBatches(planner, reader, rows_of_batch, num_batches, self.config.data)
        self._iterators.add(iterator)
        return iterator

    def clips_per_core_second(self, batch_size: int) -> float:
        return reading_speed.clips_per_core_second(self, batch_size)

    def problems(self) -> dict[str, Any]:
        return self._problems.summary()

    def close(self) -> None:
        # A copy, because the garbage collector may shrink the set during the loop.
        for iterator in list(self._iterators):
            iterator.close()


def _dataset_key(entry: dict[str, Any]) -> tuple[str, int]:
    return entry['path'], entry['fold']


def _merge_labels(
    datasets: Iterable[Prepared],
) -> tuple[dict[str, list[str]], dict[str, int | None]]:
    """Labels of all datasets.

    Class numbers must mean the same everywhere, so sources that share a label share its names.

    Returns:
      {label: class names}, and {label: number of classes if it is multi-hot in some dataset, else
      None}.

    Raises:
      DataError: a label has other classes in another dataset.
    """
    class_names: dict[str, list[str]] = {}
    multi_hot_classes: dict[str, int | None] = {}
    for prepared in datasets:
        for label, names in prepared.labels.items():
            # The first dataset that has a label defines it; the later ones must agree in every
            # name and in the order, because heads are shared across sources.
            if class_names.setdefault(label, names) != names:
                raise DataError(
                    f'label {label!r} has other classes in {prepared.path} than in the datasets '
                    'before it'
                )
            # Multi-hot in one dataset is multi-hot in all: one class number converts to a vector,
            # a vector with several ones does not convert back.
            is_multi_hot = label in prepared.meta['multi_hot'] or multi_hot_classes.get(label)
            multi_hot_classes[label] = len(names) if is_multi_hot else None
    return class_names, multi_hot_classes


def _record_text(index: Index, record: int) -> dict[str, Any]:
    # Offsets as in CSR matrices: record r owns the segments from offset[r] up to, not including,
    # offset[r + 1].
    first, last = index.segment_offset[record], index.segment_offset[record + 1]
    captions = [index.segment_caption[segment] for segment in range(first, last)]
    end = float(index.duration[record])
    return _text(index, record, 0.0, end, ' '.join(filter(None, captions)))


def _segment_text(index: Index, segment: int) -> dict[str, Any]:
    record = int(index.segment_record[segment])
    start, end = float(index.segment_start[segment]), float(index.segment_end[segment])
    return _text(index, record, start, end, index.segment_caption[segment])


def _text(index: Index, record: int, start: float, end: float, caption: str) -> dict[str, Any]:
    """An entry of `Records.texts` with the sentences that overlap start..end (seconds)."""
    sentences = []
    for i in range(index.sentence_offset[record], index.sentence_offset[record + 1]):
        # Closed intervals: a sentence that only touches the segment counts.
        if index.sentence_end[i] >= start and index.sentence_start[i] <= end:
            sentences.append(index.sentence_text[i])
    return {
        'id': index.id[record],
        'start': start,
        'end': end,
        'caption': caption,
        'sentences': sentences,
        'ground_truth': index.ground_truth[record],
    }
