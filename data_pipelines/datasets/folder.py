"""A folder of anyone's videos as a tfds dataset.

`data_pipelines.prepare` decodes the files and calls `write` here to write them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vatt_jax import extras

with extras.needed('data', 'writing records'):
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import writer as tfds_writer

SHARD_BYTES = 512 << 20  # at most, of one file

# Label name -> (number of classes, whether it is multi-hot).
Labels = Mapping[str, tuple[int, bool]]
# A function that yields the (key, example) pairs of a split.
Examples = Callable[[], Iterable[tuple[str, dict[str, Any]]]]


def features(labels: Labels) -> tfds.features.FeaturesDict:
    """The features of one record.

    Frames are JPEG (or H.264) bytes and audio is int16 PCM bytes. Both are opaque to tfds, so that
    readers decode only the moments they need.

    Args:
        labels: label name -> (number of classes, whether it is multi-hot).
    """
    text = tfds.features.Text()
    raw_bytes = tfds.features.Tensor(shape=(), dtype=np.object_)
    sequence = tfds.features.Sequence

    segment_labels = {}
    for name, (num_classes, is_multi_hot) in labels.items():
        if is_multi_hot:
            value = tfds.features.Tensor(shape=(num_classes,), dtype=np.uint8)
        else:
            value = np.int32
        segment_labels[name] = sequence(value)

    return tfds.features.FeaturesDict(
        {
            'id': text,  # path of the file below the folder
            'fps': np.float32,
            'height': np.int32,
            'width': np.int32,
            'rate': np.int32,
            # [T] JPEG, or one H.264 packet a frame; empty for audio alone
            'frames': sequence(raw_bytes),
            # int16 little-endian mono; empty if the file has no audio
            'audio': raw_bytes,
            # Times in seconds from the beginning of the record.
            'caption_text': sequence(text),
            'caption_start': sequence(np.float32),
            'caption_end': sequence(np.float32),
            'segment_start': sequence(np.float32),
            'segment_end': sequence(np.float32),
            'segment_caption': sequence(text),
            'segment_labels': segment_labels,
            'ground_truth': text,  # JSON, whatever the annotations say about the file
        }
    )


class UncompressedWriter(tfds_writer.ExampleWriter):
    """Writes ArrayRecord without compression, one record per group.

    JPEG does not shrink, and random access takes half as long.
    """

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        """Write serialized examples, given with their keys, to one file."""
        writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
        # The key has done its work: tfds has ordered the examples by its hash.
        for _, example in examples:
            writer.write(example)
        writer.close()


class Folder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # tfds has no types
):
    """The builder that writes prepared media files; `write` makes a subclass for each name.

    Args:
        labels: as of `features`.
        splits: split -> function that yields its (key, example) pairs.
        kwargs: of the tfds builder.
    """

    VERSION = tfds.core.Version('1.0.0')
    # Nothing is downloaded. The inherited property looks for a checksum file beside this module.
    url_infos: dict = {}

    def __init__(self, *, labels: Labels, splits: Mapping[str, Examples], **kwargs: Any):
        # Set first: the constructor of tfds calls `_info`.
        self._labels = labels
        self._splits = splits
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=features(self._labels), description='Prepared media files.'
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # Generators, so that tfds takes one example at a time.
        return {split: generate() for split, generate in self._splits.items()}

    def _generate_examples(self) -> Any:
        raise NotImplementedError('_split_generators gives the generators themselves')

    def _example_writer(self) -> tfds_writer.ExampleWriter:
        return UncompressedWriter(self.info.file_format)

    # tfds prints that it downloads, which it does not. Its output is not redirected instead: that
    # would swallow what other threads of the caller print meanwhile, and two calls at once would
    # leave standard output redirected for good.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def write(directory: str, name: str, labels: Labels, splits: Mapping[str, Examples]) -> str:
    """Write a tfds dataset.

    Args:
        directory: folder below which it is written.
        name: of the dataset.
        labels: as of `features`.
        splits: split -> function that yields its (key, example) pairs.

    Returns:
        The folder that `tfds.builder_from_directory` reads.
    """
    tfds.disable_progress_bar()

    def fill_namespace(namespace: dict[str, Any]) -> None:
        namespace.update(name=name, __module__=__name__)

    # A builder's name is a class attribute, which tfds reads while the class is created.
    builder_class = types.new_class(name, (Folder,), {'skip_registration': True}, fill_namespace)
    builder = builder_class(labels=labels, splits=splits, data_dir=directory)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False,
            max_shard_size=SHARD_BYTES,
            compute_stats=tfds.download.ComputeStatsMode.SKIP,
        )
    )
    return builder.data_dir
