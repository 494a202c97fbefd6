"""A folder of anyone's videos as a tfds dataset; `data_pipelines.prepare` decodes the files and calls this to write them."""

from __future__ import annotations

import contextlib
import io
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import writer as tfds_writer

SHARD_BYTES = 512 << 20


def features(labels: Mapping[str, tuple[int, bool]]) -> tfds.features.FeaturesDict:
    """Features of one record. labels: name -> (number of classes, multi-hot?).

    Frames are JPEG (or H.264) bytes and sound is int16 PCM bytes, both opaque to tfds: readers decode only the moments they want.
    """
    text, seconds, raw = (
        tfds.features.Text(),
        np.float32,
        tfds.features.Tensor(shape=(), dtype=np.object_),
    )
    sequence = tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            'id': text,  # path of the file below the folder
            'fps': seconds,
            'height': np.int32,
            'width': np.int32,
            'rate': np.int32,
            'frames': sequence(raw),  # [T] JPEG, or one H.264 packet a frame; empty for sound alone
            'audio': raw,  # int16 little-endian mono; empty if the file has no sound
            'caption_text': sequence(text),
            'caption_start': sequence(seconds),
            'caption_end': sequence(seconds),
            'segment_start': sequence(seconds),
            'segment_end': sequence(seconds),
            'segment_caption': sequence(text),
            'segment_labels': {
                name: sequence(tfds.features.Tensor(shape=(classes,), dtype=np.uint8))
                if multi
                else sequence(np.int32)
                for name, (classes, multi) in labels.items()
            },
            'ground_truth': text,  # JSON, whatever the annotations say about the file
        }
    )


class UncompressedWriter(tfds_writer.ExampleWriter):
    """ArrayRecord without compression, one record per group: JPEG does not shrink, and random access reads half as long."""

    def write(self, path, examples):
        out = array_record_module.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
        for _, example in examples:
            out.write(example)
        out.close()


class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """labels: as for `features`. splits: {split: function -> (key, example) pairs}. `write` makes a subclass for each name."""

    VERSION = tfds.core.Version('1.0.0')
    url_infos: dict = {}  # nothing is downloaded; the inherited property looks for a checksum file beside this module

    def __init__(
        self,
        *,
        labels: Mapping[str, tuple[int, bool]],
        splits: Mapping[str, Callable[[], Iterable[tuple[str, dict[str, Any]]]]],
        **kwargs,
    ):
        self._labels, self._splits = labels, splits
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=features(self._labels), description='Prepared media files.'
        )

    def _split_generators(self, dl_manager):
        return {split: make() for split, make in self._splits.items()}

    def _generate_examples(self):
        raise NotImplementedError('_split_generators gives the generators themselves')

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return UncompressedWriter(self.info.file_format)


def write(
    directory: str,
    name: str,
    labels: Mapping[str, tuple[int, bool]],
    splits: Mapping[str, Callable[[], Iterable[tuple[str, dict[str, Any]]]]],
) -> str:
    """Writes the dataset below `directory`; returns the folder that `tfds.builder_from_directory` reads."""
    tfds.disable_progress_bar()
    named = types.new_class(
        name,
        (Folder,),
        {'skip_registration': True},
        lambda body: body.update(name=name, __module__=__name__),
    )
    builder = named(labels=labels, splits=splits, data_dir=directory)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces a download
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False,
                max_shard_size=SHARD_BYTES,
                compute_stats=tfds.download.ComputeStatsMode.SKIP,
            )
        )
    return builder.data_dir
