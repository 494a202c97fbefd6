"""Staged files -> the tfds dataset with its index files, published only when all of it is whole."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, media_catalog
from data_pipelines.preparation.media_catalog import MediaCatalog
from data_pipelines.storage import columns, record_index
from data_pipelines.storage.index_writer import IndexWriter
from data_pipelines.storage.records import CLIPS, SPLITS, shards, write_byte_offsets


def write_dataset(
    records: Sequence[dict[str, Any]],
    files: Mapping[str, decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    name: str,
    multi_hot: Mapping[str, int | None],
) -> pathlib.Path:
    """Write the records as a tfds dataset below the staging folder.

    Args:
        records: in the order in which they are given to tfds, which shuffles them by their id.
        files: media file of each id.
        settings: how the files were decoded.
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

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        # A generator: only one record's frames are in memory at a time.
        for record in records:
            if record['split'] != split:
                continue
            # Frames stay encoded; only bytes are moved from one file to another.
            staged_path = decoded_files.staged_path(stage_dir, files[record['id']], settings)
            frames, pcm = decoded_files.content(staged_path)
            yield record['id'], _example(record, frames, pcm, settings, multi_hot)

    used_splits = {record['split'] for record in records}
    generators = {
        # partial, not a lambda: a lambda would see the last `split` of the loop.
        split: functools.partial(examples, split)
        # tfds writes a split for each generator, so there is none for splits without records.
        for split in (*SPLITS, CLIPS)
        if split in used_splits
    }
    labels = {
        # The number of classes matters for multi-hot labels alone, whose width it is.
        label: (num_classes or 0, num_classes is not None)
        for label, num_classes in multi_hot.items()
    }
    return pathlib.Path(folder.write(str(stage_dir / 'tfds'), name, labels, generators))


def _example(
    record: Mapping[str, Any],
    frames: list[bytes],
    pcm: bytes,
    settings: decoded_files.Settings,
    multi_hot: Mapping[str, int | None],
) -> dict[str, Any]:
    """One record in the form of `datasets.folder.features`."""
    example = {
        'id': record['id'],
        'fps': settings.fps,
        'height': record['height'],
        'width': record['width'],
        'rate': settings.rate,
        'frames': frames,
        'audio': pcm,
    }
    # Columns, one list for each field, as in the features.
    for field in ('text', 'start', 'end'):
        example[f'caption_{field}'] = [sentence[field] for sentence in record['sentences']]
    for field in ('start', 'end', 'caption'):
        example[f'segment_{field}'] = [segment[field] for segment in record['segments']]
    example['segment_labels'] = {
        label: [segment['labels'][label] for segment in record['segments']] for label in multi_hot
    }
    example['ground_truth'] = record['ground_truth']
    return example


def publish(
    produced: pathlib.Path,
    stage_dir: pathlib.Path,
    target: pathlib.Path,
    name: str,
    settings: decoded_files.Settings,
    catalog: MediaCatalog,
    records: Sequence[dict[str, Any]],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Move the dataset into place with its sidecars, reading every record back on the way.

    Args:
        produced: folder that `write_dataset` returned.
        stage_dir: the staging folder, which also holds `tokenizer.json`.
        target: folder of the finished dataset.
        name: of the dataset.
        settings: how the files were decoded.
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
    for split in (*SPLITS, CLIPS):
        # Whether tfds wrote any file of this split.
        if not shards(produced, split):
            continue
        # Reads every record back, which also notes at which bytes of which file it lies.
        _write_index(produced, split, settings, catalog, records)
        index = record_index.Index.open(record_index.folder_of(produced, split))
        summary['splits'][split] = index.summary()
    # The stored split is `clips`; these are the sizes of the splits that each fold makes of it.
    if catalog.folds:
        summary['folds'] = [_fold_counts(records, fold) for fold in range(catalog.folds)]

    # Renames within one file system. Interrupted here, the dataset is still unfinished, because
    # prepare.json does not exist yet.
    for file in produced.iterdir():
        os.replace(file, target / file.name)
    os.replace(stage_dir / 'tokenizer.json', target / 'tokenizer.json')
    record_index.write_json(target / 'skipped.json', dict(skipped))
    record_index.write_json(
        target / 'index.json', _dataset_description(name, settings, catalog, summary)
    )
    return summary


def _write_index(
    produced: pathlib.Path,
    split: str,
    settings: decoded_files.Settings,
    catalog: MediaCatalog,
    records: Sequence[dict[str, Any]],
) -> None:
    """Write the index of a split, in the order in which its records lie in the files."""
    # tfds shuffles by a hash of the key, so the order in the files is not that of `records`.
    record_by_id = {record['id']: record for record in records}
    with IndexWriter(record_index.folder_of(produced, split), catalog.multi_hot) as writer:
        for record_id, checksum in write_byte_offsets(produced, split, settings.rate):
            writer.add(record_by_id[record_id], checksum)
        # The one check of the way through tfds: as many come back as were given.
        num_written = sum(record['split'] == split for record in records)
        if writer.num_records != num_written:
            raise DataError(
                f'{produced}: expected {num_written} records in split {split}, got '
                f'{writer.num_records} when they were read back; is the disk sound?'
            )


def _fold_counts(records: Sequence[dict[str, Any]], fold: int) -> Mapping[str, int]:
    """Number of records in each split of one fold."""
    # -1: in no split of this fold.
    split_numbers = [record['folds'][fold] for record in records]
    return media_catalog.counts(SPLITS[number] for number in split_numbers if number >= 0)


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
    }
