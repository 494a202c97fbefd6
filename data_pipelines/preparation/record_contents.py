"""What is known about each decoded file: its times, sentences, segments, labels and split."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Int8, Int64

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.preparation.file_list import Selection
from data_pipelines.preparation.media_catalog import MediaCatalog
from data_pipelines.preparation.splits import STORED_SPLITS
from data_pipelines.storage import record_index
from data_pipelines.storage.records import SPLITS


class Records(Sequence[dict[str, Any]]):
    """The records of a dataset. Each is made when it is asked for: all are larger than memory.

    A record is a dict of the fields of `record_index.Index`, and of 'split'.

    Attributes:
        files: the media file of each record.
        settings: how the files were decoded.
        splits: number of each record's split in STORED_SPLITS [M].
    """

    def __init__(
        self,
        catalog: MediaCatalog,
        usable: Int64[np.ndarray, ' M'],
        settings: decoded_files.Settings,
        stage_dir: pathlib.Path,
    ):
        """See the class.

        Args:
            catalog: captions and annotations of all files.
            usable: numbers of the files that become records.
            settings: how the files were decoded.
            stage_dir: the staging folder.
        """
        self.files = Selection(catalog.files, usable)
        self.settings = settings
        self.splits: Int8[np.ndarray, ' M'] = np.zeros(len(usable), np.int8)
        self._catalog = catalog
        self._stage_dir = stage_dir

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, i: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._record(self.files[i], int(self.splits[i]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file, split in zip(self.files, self.splits):
            yield self._record(file, int(split))

    def staged_path(self, i: int) -> pathlib.Path:
        """The staged file of a record."""
        return decoded_files.staged_path(self._stage_dir, self.files[i], self.settings)

    def numbers_of(self, split: str) -> Int64[np.ndarray, ' m']:
        """Numbers of the records of a split."""
        return np.flatnonzero(self.splits == STORED_SPLITS.index(split))

    def _record(self, file: decoded_files.File, split: int) -> dict[str, Any]:
        # Headers alone: the frames of a large dataset do not fit into memory.
        path = decoded_files.staged_path(self._stage_dir, file, self.settings)
        record = make_record(file, decoded_files.header(path), self._catalog)
        record['split'] = STORED_SPLITS[split]
        ground_truth = record['ground_truth']
        if self._catalog.folds:
            official = self._catalog.splits[file.id]
            record['folds'] = fold_numbers(official)
            ground_truth = {**ground_truth, 'folds': list(official)}
        record['ground_truth'] = json.dumps(ground_truth)
        return record


def fold_numbers(official: Iterable[str]) -> list[int]:
    """Number in SPLITS of a clip's split in each fold; -1 where it is in none."""
    return [SPLITS.index(split) if split else -1 for split in official]


def make_record(
    file: decoded_files.File, header: Mapping[str, Any], catalog: MediaCatalog
) -> dict[str, Any]:
    """Join what was decoded of a file with what its annotations say.

    Times are cut to the record, and entries that begin behind its end are dropped. A record without
    segments gets one that spans it. Without sentences, the captions of its segments are used.

    Args:
        file: the media file.
        header: of its staged file.
        catalog: captions and annotations of all files.

    Returns:
        The fields of `record_index.Index`, still without split and folds. The ground truth is not
        JSON yet.
    """
    # Of what was decoded; what the container declares may be longer.
    duration = header['duration']
    annotation = catalog.annotations.get(file.id) or {}
    segments = _cut_to(duration, annotation.get('segments') or [])
    if not segments:
        # Evaluation goes by segments, so a record without one would never be evaluated.
        segments = [{'start': 0.0, 'end': duration, 'caption': '', 'labels': {}}]

    sentences = _cut_to(duration, catalog.sentences.get(file.id) or [])
    if not sentences:
        sentences = [
            {'text': segment['caption'], 'start': segment['start'], 'end': segment['end']}
            for segment in segments
            if segment['caption']
        ]
    # The index promises the sentences of a record in the order of their start times.
    sentences.sort(key=lambda sentence: (sentence['start'], sentence['end']))

    return {
        'id': file.id,
        'frames': len(header['lengths']),
        'samples': header['samples'],
        'height': header['height'],
        'width': header['width'],
        'duration': duration,
        'sentences': sentences,
        'segments': [_with_all_labels(segment, catalog.multi_hot) for segment in segments],
        'ground_truth': annotation.get('ground_truth', {}),
    }


def _cut_to(duration: float, entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the entries that begin within the record, ending with it at the latest."""
    return [
        # An entry without times ends at infinity, which becomes the end of the record here.
        {**entry, 'end': min(entry['end'], duration)}
        for entry in entries
        if entry['start'] < duration
    ]


def remark_on_late_sentences(
    records: Iterable[Mapping[str, Any]], catalog: MediaCatalog
) -> list[str]:
    """Say how many sentences begin behind the end of their file: their times may be milliseconds.

    Args:
        records: as of `make_record`.
        catalog: what was given.

    Returns:
        A sentence for the user, or none.
    """
    if not catalog.sentences:
        return []
    num_late = 0
    num_given = 0
    example = ''
    for record in records:
        starts = [sentence['start'] for sentence in catalog.sentences.get(record['id']) or []]
        late = [start for start in starts if start >= record['duration']]
        num_given += len(starts)
        num_late += len(late)
        if late and not example:
            example = f'{record["id"]} ({late[0]:g} s of {record["duration"]:g} s)'
    if not num_late:
        return []
    return [
        f'{num_late} of {num_given} sentences begin behind the end of their file and are left out, '
        f'for example in {example}; times are expected in seconds'
    ]


def _with_all_labels(
    segment: Mapping[str, Any], multi_hot: Mapping[str, int | None]
) -> dict[str, Any]:
    """The segment with a value for every label of the dataset; -1 where it is unknown."""
    labels = {}
    for name, num_classes in multi_hot.items():
        # Every segment has every label, because labels are stored as columns.
        value = segment['labels'].get(name, -1)
        labels[name] = value if num_classes is None else _to_multi_hot(value, num_classes)
    return {**segment, 'labels': labels}


def _to_multi_hot(value: int | list[int], num_classes: int) -> list[int]:
    classes = value if isinstance(value, list) else [value]
    # -1 (unknown) is no class: a row of zeros.
    return [int(i in classes) for i in range(num_classes)]


# Kind of tokenizer -> optional modules that train it.
TOKENIZERS: dict[str, tuple[str, ...]] = {
    'words': (),
    'wordpiece': ('tokenizers',),
    'sentencepiece': ('sentencepiece',),
    'clip': ('tokenizers',),
    'siglip': ('sentencepiece',),
}


def tokenizer_modules(kind: str) -> tuple[str, ...]:
    """Optional modules that train a kind of tokenizer, to be looked for before long work."""
    return TOKENIZERS.get(kind, ())


def train_tokenizer(
    records: Sequence[Mapping[str, Any]], kind: str, size: int, stage_dir: pathlib.Path
) -> None:
    """Train a tokenizer on the text of the training split and write `tokenizer.json`.

    Args:
        records: with their splits.
        kind: key of TOKENIZERS.
        size: of the vocabulary, at most.
        stage_dir: folder of the file.

    Raises:
        DataError: if the tokenizer cannot be trained, with the reason.
    """
    # Imported here: a tokenizer may bring libraries that decoding does without.
    from vatt_jax.inputs import tokenizer as tokenizers

    def texts() -> Iterator[str]:
        # Words of validation and test must not enter the vocabulary.
        for record in _training(records):
            yield from (sentence['text'] for sentence in record['sentences'])
        # All sentences before all captions: a trainer may depend on the order of its texts.
        for record in _training(records):
            yield from (segment['caption'] for segment in record['segments'])

    try:
        tokenizer = tokenizers.train(kind, texts(), size)
    # Too few texts for the size, a library that is not installed, an error inside one.
    except (ValueError, ImportError, RuntimeError) as error:
        raise DataError(f'--tokenizer={kind}: {error}') from None
    record_index.write_json(stage_dir / 'tokenizer.json', tokenizer.to_spec())


def _training(records: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (record for record in records if record['split'] == 'train')
