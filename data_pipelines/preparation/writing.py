"""Staged files -> the tfds dataset with its index files, published only when all of it is whole."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.preparation.file_list import Selection
from data_pipelines.preparation.media_catalog import MediaCatalog
from data_pipelines.preparation.record_contents import Records
from data_pipelines.preparation.splits import STORED_SPLITS
from data_pipelines.storage import columns, record_index
from data_pipelines.storage.index_writer import IndexWriter
from data_pipelines.storage.records import SPLITS, shards, write_byte_offsets
from vatt_jax.inputs import optical_flow


def write_dataset(
    records: Records, stage_dir: pathlib.Path, name: str, multi_hot: Mapping[str, int | None]
) -> pathlib.Path:
    """Write the records as a tfds dataset below the staging folder.

    Args:
        records: with their splits.
        stage_dir: the staging folder.
        name: of the dataset.
        multi_hot: label name -> number of classes of a multi-hot label, None for class numbers.

    Returns:
        The folder of the dataset.
    """
    # Before the import that follows: TensorFlow prints its start-up messages otherwise.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    from data_pipelines.datasets import folder

    # What a killed run left cannot be trusted.
    shutil.rmtree(stage_dir / 'tfds', ignore_errors=True)

    splits = {}
    for split in STORED_SPLITS:
        examples = _SplitExamples(records, split, multi_hot)
        # There is no split without records.
        if len(examples):
            splits[split] = examples
    labels = {
        # The number of classes matters for multi-hot labels alone, whose width it is.
        label: (num_classes or 0, num_classes is not None)
        for label, num_classes in multi_hot.items()
    }
    has_flow = bool(records.settings.flow)
    return pathlib.Path(folder.write(str(stage_dir / 'tfds'), name, labels, splits, has_flow))


class _SplitExamples:
    """The records of a split in the form of `datasets.folder.Examples`."""

    def __init__(self, records: Records, split: str, multi_hot: Mapping[str, int | None]):
        self._records = records
        self._numbers = records.numbers_of(split)
        self._multi_hot = multi_hot

    def __len__(self) -> int:
        return len(self._numbers)

    def keys(self) -> Iterator[str]:
        """The ids of the records."""
        for file in Selection(self._records.files, self._numbers):
            yield file.id

    def example(self, i: int) -> dict[str, Any]:
        """A record with its frames and its sound."""
        number = int(self._numbers[i])
        # Frames stay encoded; only bytes are moved from one file to another.
        content = decoded_files.content(self._records.staged_path(number))
        return self._example(number, content)

    def outline(self, i: int) -> dict[str, Any]:
        """A record with zeros for frames, flows and sound, which need not be read then."""
        number = int(self._numbers[i])
        header = decoded_files.header(self._records.staged_path(number))
        content = decoded_files.Content(
            frames=[bytes(length) for length in header['lengths']],
            flows=[bytes(length) for length in header.get('flow_lengths', ())],
            pcm=bytes(2 * header['samples']),  # int16
        )
        return self._example(number, content)

    def _example(self, number: int, content: decoded_files.Content) -> dict[str, Any]:
        """One record in the form of `datasets.folder.features`."""
        record = self._records[number]
        settings = self._records.settings
        example: dict[str, Any] = {
            'id': record['id'],
            'fps': settings.fps,
            'height': record['height'],
            'width': record['width'],
            'rate': settings.rate,
            'frames': content.frames,
            'audio': content.pcm,
        }
        if settings.flow:
            example['flow'] = content.flows
        # Columns, one list for each field, as in the features.
        for field in ('text', 'start', 'end'):
            example[f'caption_{field}'] = [sentence[field] for sentence in record['sentences']]
        for field in ('start', 'end', 'caption'):
            example[f'segment_{field}'] = [segment[field] for segment in record['segments']]
        example['segment_labels'] = {
            label: [segment['labels'][label] for segment in record['segments']]
            for label in self._multi_hot
        }
        example['ground_truth'] = record['ground_truth']
        return example


def publish(
    produced: pathlib.Path,
    stage_dir: pathlib.Path,
    target: pathlib.Path,
    name: str,
    catalog: MediaCatalog,
    records: Records,
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Move the dataset into place with its sidecars, reading every record back on the way.

    Args:
        produced: folder that `write_dataset` returned.
        stage_dir: the staging folder, which also holds `tokenizer.json`.
        target: folder of the finished dataset.
        name: of the dataset.
        catalog: what was prepared.
        records: as written.
        skipped: id or name of each file that was left out -> the reason.

    Returns:
        The summary of `prepare`, without 'seconds' and 'fresh'.

    Raises:
        DataError: if records cannot be read back.
    """
    # Every file here is from this run or from a killed one: `prepare` refuses a folder that holds
    # anything else before it decodes.
    for leftover in list(target.iterdir()):
        if leftover.is_file():
            leftover.unlink()
        elif columns.is_table(leftover):
            shutil.rmtree(leftover)

    summary: dict[str, Any] = {
        'splits': {},
        'skipped': dict(skipped),
        'labels': {label: list(names) for label, names in catalog.classes.items()},
    }
    for split in STORED_SPLITS:
        if not shards(produced, split):
            continue
        # Reads every record back, which also notes at which bytes of which file it lies.
        _write_index(produced, split, catalog.multi_hot, records)
        index = record_index.Index.open(record_index.folder_of(produced, split))
        summary['splits'][split] = index.summary()
    # The stored split is `clips`; these are the sizes of the splits that each fold makes of it.
    if catalog.folds:
        summary['folds'] = _fold_counts(catalog, records)

    # Renames within one file system. Interrupted here, the dataset is still unfinished, because
    # prepare.json does not exist yet.
    for file in produced.iterdir():
        os.replace(file, target / file.name)
    os.replace(stage_dir / 'tokenizer.json', target / 'tokenizer.json')
    record_index.write_json(target / 'skipped.json', dict(skipped))
    record_index.write_json(
        target / 'index.json', _dataset_description(name, records.settings, catalog, summary)
    )
    return summary


def _write_index(
    produced: pathlib.Path, split: str, multi_hot: Mapping[str, int | None], records: Records
) -> None:
    """Write the index of a split, in the order in which its records lie in the files."""
    from data_pipelines.datasets import folder

    numbers = records.numbers_of(split)
    ids = (file.id for file in Selection(records.files, numbers))
    written = numbers[folder.record_order(split, ids)]
    settings = records.settings
    stored = write_byte_offsets(produced, split, settings.rate, bool(settings.flow))
    with IndexWriter(record_index.folder_of(produced, split), multi_hot) as writer:
        # The one check of the way through the files: as many come back as were given, in order.
        for number, found in itertools.zip_longest(written, stored):
            if number is None or found is None or records.files[number].id != found[0]:
                raise DataError(
                    f'{produced}: expected {len(written)} records in split {split}, got others '
                    f'behind {writer.num_records} when they were read back; is the disk sound?'
                )
            _, checksum = found
            writer.add(records[number], checksum)


def _fold_counts(catalog: MediaCatalog, records: Records) -> list[Mapping[str, int]]:
    """Number of records in each split of each fold."""
    counts: list[collections.Counter[str]] = [collections.Counter() for _ in range(catalog.folds)]
    for file in records.files:
        for count, split in zip(counts, catalog.splits[file.id]):
            count[split] += 1
    # In the order of SPLITS, as tables show them; '' is in no split of a fold.
    return [{split: count[split] for split in SPLITS if count[split]} for count in counts]


def _dataset_description(
    name: str,
    settings: decoded_files.Settings,
    catalog: MediaCatalog,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Contents of `index.json`."""
    # What readers need in order to decode: 'example' is a serialized tf.train.Example. Without
    # 'frames' they are JPEG.
    stored_format: dict[str, Any] = {'kind': 'example'}
    if settings.crf:
        # To show frame n, decoding begins at the keyframe n - n % gop.
        stored_format |= {'frames': 'h264', 'gop': media.GOP}
    # Not in folders without flow, which are those of before.
    flow: dict[str, Any] = {}
    if settings.flow:
        flow['flow'] = {'method': settings.flow, 'bound': optical_flow.BOUND}
    return {
        'version': record_index.VERSION,
        'name': name,
        'fps': settings.fps,
        'size': settings.size,
        'rate': settings.rate,
        'quality': settings.quality,
        'labels': summary['labels'],
        # Names only; the number of classes follows from 'labels'.
        'multi_hot': [
            label for label, num_classes in catalog.multi_hot.items() if num_classes is not None
        ],
        'splits': summary['splits'],
        'folds': summary.get('folds', []),
        'format': stored_format,
        **flow,
    }
