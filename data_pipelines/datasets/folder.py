"""A folder of anyone's videos as a tfds dataset.

`data_pipelines.prepare` decodes the files and calls `write` here to write them.

The order of the records and their division into files are those of tfds, which shuffles examples by
a hash of their keys. Its own writer collects up to a gigabyte of them in memory to do so, and more
than that on disk; here the keys alone are sorted, and each example is made when it is its turn.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from data_pipelines.errors import DataError
from vatt_jax import extras

with extras.needed('data', 'writing records'):
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import dataset_builder, example_serializer, hashing
    from tensorflow_datasets.core.utils import shard_utils

# How many files there are for so many bytes: tfds' own rule.
SHARD_CONFIG = shard_utils.ShardConfig()

# Label name -> (number of classes, whether it is multi-hot).
Labels = Mapping[str, tuple[int, bool]]


@runtime_checkable
class Examples(Protocol):
    """The examples of one split, each made when it is asked for."""

    def __len__(self) -> int:
        """Number of examples."""

    def keys(self) -> Iterator[str]:
        """The key of each example, by which they are put into order."""

    def example(self, i: int) -> dict[str, Any]:
        """An example."""

    def outline(self, i: int) -> dict[str, Any]:
        """An example of the same length as `example`, with any values in it."""


def features(labels: Labels, has_flow: bool = False) -> tfds.features.FeaturesDict:
    """The features of one record.

    Frames are JPEG (or H.264) bytes, flows JPEG bytes and audio is int16 PCM bytes. All are opaque
    to tfds, so that readers decode only the moments they need.

    Args:
        labels: label name -> (number of classes, whether it is multi-hot).
        has_flow: whether optical flow is stored.
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

    # Records without flow are those of before.
    flow = {}
    if has_flow:
        # [T] JPEG of both planes (vatt_jax/inputs/optical_flow.py), one for each frame
        flow['flow'] = sequence(raw_bytes)
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
            **flow,
        }
    )


class Folder(
    dataset_builder.FileReaderBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # tfds has no types
):
    """The builder that writes prepared media files; `write` makes a subclass for each name.

    Args:
        labels: as of `features`.
        splits: split -> its examples.
        has_flow: as of `features`.
        kwargs: of the tfds builder.
    """

    VERSION = tfds.core.Version('1.0.0')
    # Nothing is downloaded. The inherited property looks for a checksum file beside this module.
    url_infos: dict = {}

    def __init__(
        self, *, labels: Labels, splits: Mapping[str, Examples], has_flow: bool, **kwargs: Any
    ):
        # Set first: the constructor of tfds calls `_info`.
        self._labels = labels
        self._has_flow = has_flow
        self._splits = splits
        super().__init__(file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features(self._labels, self._has_flow),
            description='Prepared media files.',
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Write the records; tfds calls this, and writes what it knows of the dataset behind it."""
        infos = [self._write_split(split, examples) for split, examples in self._splits.items()]
        self.info.set_splits(tfds.core.splits.SplitDict(infos))

    def _write_split(self, split: str, examples: Examples) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split_name=split)
        # Before the first file is written, as the number of files depends on it.
        num_bytes = 0
        for i in range(len(examples)):
            num_bytes += self._message(examples.outline(i)).ByteSize()
        num_shards = SHARD_CONFIG.get_number_shards(num_bytes, len(examples))
        ends = shard_utils.get_shard_boundaries(len(examples), num_shards)

        order = record_order(split, examples.keys())
        begin = 0
        num_written = 0
        for shard, end in enumerate(ends):
            path = template.sharded_filepath(shard_index=shard, num_shards=num_shards)
            num_written += _write_shard(path, self._records(examples, order[begin:end]))
            begin = end
        if num_written != num_bytes:
            raise DataError(
                f'{self.data_dir}: expected {num_bytes} bytes of records in split {split}, got '
                f'{num_written} from the decoded files; is the disk sound?'
            )
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=np.diff([0, *ends]).tolist(),
            num_bytes=num_bytes,
            filename_template=template,
        )

    def _records(self, examples: Examples, numbers: Int64[np.ndarray, ' m']) -> Iterator[bytes]:
        for i in numbers:
            message = self._message(examples.example(int(i)))
            # The same bytes in every run: a map of protocol buffers has no order of its own.
            yield message.SerializeToString(deterministic=True)

    def _message(self, example: Mapping[str, Any]) -> Any:
        """The tf.train.Example of an example."""
        return self._serializer.get_tf_example(self.info.features.encode_example(example))

    @functools.cached_property
    def _serializer(self) -> example_serializer.ExampleSerializer:
        return example_serializer.ExampleSerializer(self.info.features.get_serialized_info())

    # tfds prints that it downloads, which it does not. Its output is not redirected instead: that
    # would swallow what other threads of the caller print meanwhile, and two calls at once would
    # leave standard output redirected for good.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def record_order(split: str, keys: Iterable[str]) -> Int64[np.ndarray, ' M']:
    """The order in which tfds puts the examples of a split: by a hash of their keys.

    Args:
        split: whose examples; it decides the order too.
        keys: of the examples.

    Returns:
        The number of the example in each place.
    """
    hasher = hashing.Hasher(split)
    # 128 bits of each key, as bytes whose order is that of the number.
    hashes = bytearray()
    for key in keys:
        hashes += hasher.hash_key(key).to_bytes(16, 'big')
    high, low = np.frombuffer(bytes(hashes), '>u8').reshape(-1, 2).T
    return np.lexsort((low, high))


def _write_shard(path: os.PathLike, records: Iterable[bytes]) -> int:
    """Write records into one file, and return the number of their bytes.

    Without compression, as JPEG does not shrink, and with one record per group: random access takes
    half as long.
    """
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1,uncompressed')
    num_bytes = 0
    for record in records:
        writer.write(record)
        num_bytes += len(record)
    writer.close()
    return num_bytes


def write(
    directory: str,
    name: str,
    labels: Labels,
    splits: Mapping[str, Examples],
    has_flow: bool = False,
) -> str:
    """Write a tfds dataset.

    Args:
        directory: folder below which it is written.
        name: of the dataset.
        labels: as of `features`.
        splits: split -> its examples.
        has_flow: whether optical flow is stored.

    Returns:
        The folder that `tfds.builder_from_directory` reads.
    """
    tfds.disable_progress_bar()

    def fill_namespace(namespace: dict[str, Any]) -> None:
        namespace.update(name=name, __module__=__name__)

    # A builder's name is a class attribute, which tfds reads while the class is created.
    builder_class = types.new_class(name, (Folder,), {'skip_registration': True}, fill_namespace)
    builder = builder_class(labels=labels, splits=splits, has_flow=has_flow, data_dir=directory)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            try_download_gcs=False,
            compute_stats=tfds.download.ComputeStatsMode.SKIP,
        )
    )
    return builder.data_dir
