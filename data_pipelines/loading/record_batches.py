"""Planned batches -> host batches, on tf.data: TensorFlow's threads decode the frames.

Nothing in the graph is random and nothing is shuffled there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

# Before TensorFlow is imported, which reads it then; 3 silences all but fatal messages.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.loading.batch_plan import BatchPlanner
from data_pipelines.loading.data_source import Rows, blank_stream
from data_pipelines.loading.record_reader import RecordReader, RowPictures
from data_pipelines.loading.views import View
from vatt_jax import extras
from vatt_jax.inputs import optical_flow
from vatt_jax.object_store import StoreError

with extras.needed('data', 'reading prepared records'):
    import tensorflow as tf

with contextlib.suppress(RuntimeError):  # too late if TensorFlow is in use already
    tf.config.set_visible_devices([], 'GPU')  # the accelerator belongs to JAX


class RecordBatches(Iterator):
    """Iterator of host batches; close() stops its threads. After an error it is over."""

    def __init__(
        self,
        planner: BatchPlanner,
        reader: RecordReader,
        rows: Callable[[int], Rows],
        number: int | None,
        data_config: ConfigDict,
    ):
        """See the class.

        Args:
          planner: plans each batch.
          reader: reads what was planned.
          rows: batch number -> its examples.
          number: batches until the end; None for endless ones.
          data_config: config.data, for `threads` and `prefetch`.
        """
        self.closed = False
        self._planner = planner
        self._reader = reader
        self._rows_of_batch = rows
        # Batches that are planned and read, until their frames are decoded. Only the frames travel
        # through the graph.
        self._planned: dict[int, dict[str, Any]] = {}
        self._error: BaseException | None = None
        self._iterator = iter(self._dataset(number, data_config))

    def __next__(self) -> dict[str, Any]:
        if self.closed:
            raise StopIteration
        try:
            arrays = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        except Exception as e:
            # TensorFlow wraps what `_fetch` raised in an error of its own, so the original is
            # recorded there.
            original_error = self._error
            self.close()
            if isinstance(original_error, DataError | StoreError):
                raise original_error from None
            first_line = str(e).splitlines()[0][:200]
            raise DataError(
                f'a record cannot be decoded although its bytes are as written ({first_line}); '
                'prepare the data again with --overwrite'
            ) from e
        # All rows of a batch carry its number through unbatch and batch.
        batch = self._planned.pop(int(arrays['batch_number'][0]))
        for modality, views in self._planner.picture_views.items():
            # Not .numpy(), which copies.
            frames = np.asarray(memoryview(arrays[modality]))  # [B views T ...]
            for i, view in enumerate(views):
                stream = batch[view.stream]
                stream['data'] = np.ascontiguousarray(frames[:, i])
                if modality == 'flow' and view.kind == 'reverse':
                    # Rows without flow stay zeros.
                    valid = stream['valid']
                    stream['data'][valid] = optical_flow.negative(stream['data'][valid])
                _empty_missing_windows(view, stream)
        return batch

    def close(self) -> None:
        """Stop the threads and drop what was read ahead."""
        self.closed = True
        # Dropping the last reference to the tf.data iterator cancels its threads.
        self._iterator = None
        self._planned.clear()

    # ---- the dataset
    def _dataset(self, num_batches: int | None, data_config: ConfigDict) -> tf.data.Dataset:
        options = tf.data.Options()
        # Order must not depend on thread timing, or a resumed run would see other batches.
        options.deterministic = True
        # Threads and buffers are those of config.data, not what TensorFlow would tune at run time.
        options.autotune.enabled = False
        # Where reading waits for an object store, several batches are read side by side; from a
        # disk one at a time. Decoding, the slow part there, is parallel below.
        batches_at_once = data_config.prefetch if self._reader.is_remote else 1
        # As many more than decode, for the threads that plan and read.
        options.threading.private_threadpool_size = max(2, data_config.threads + batches_at_once)

        if num_batches is None:
            num_batches = np.iinfo(np.int64).max  # endless
        batches = tf.data.Dataset.range(num_batches).map(
            self._fetch_tensors,
            num_parallel_calls=batches_at_once if batches_at_once > 1 else None,
            deterministic=True if batches_at_once > 1 else None,
        )
        if self._planner.picture_views:
            # Rows are decoded side by side, across the border of batches too, so that a heavy row
            # keeps nobody waiting.
            rows = batches.prefetch(1).unbatch()
            rows = rows.map(
                self._decode_row,
                num_parallel_calls=max(1, data_config.threads),
                deterministic=True,
            )
            # Every batch has this many rows, the last of a pass too (padding), so none is dropped.
            batch_size = len(self._rows_of_batch(0).index)
            batches = rows.batch(batch_size, drop_remainder=True)
        return batches.prefetch(max(1, data_config.prefetch)).with_options(options)

    # Nothing here has Python branches on tensors for AutoGraph to rewrite.
    @tf.autograph.experimental.do_not_convert
    def _fetch_tensors(self, number: tf.Tensor) -> dict[str, tf.Tensor]:
        # (name, type, shape) of the arrays of `_fetch`, one row a line; a None is a size that only
        # the batch knows.
        columns: list[tuple[str, tf.DType, list[int | None]]] = [('batch_number', tf.int64, [None])]
        if self._planner.picture_views:
            columns.append(('format', tf.int32, [None]))
        for modality in self._planner.picture_views:
            frames_per_row = self._planner.frames_per_row(modality)
            columns += [
                (f'{modality}/packets', tf.string, [None, None]),
                (f'{modality}/entry_packets', tf.int32, [None, None]),
                (f'{modality}/entry_corners', tf.int32, [None, None, 2]),
                (f'{modality}/frame_entries', tf.int32, [None, frames_per_row]),
            ]
        arrays = tf.numpy_function(self._fetch, [number], [dtype for _, dtype, _ in columns])
        tensors = {}
        for (name, _, shape), array in zip(columns, arrays):
            # numpy_function loses all static shapes, which unbatch and map_fn need.
            tensors[name] = tf.ensure_shape(array, shape)
        return tensors

    def _fetch(self, number: np.ndarray | np.integer) -> list[np.ndarray]:
        """Plan a batch and read its rows; return what TensorFlow needs to decode the frames."""
        if self.closed:
            raise RuntimeError('closed')
        try:
            rows = self._rows_of_batch(int(number))
            batch, request = self._planner.plan(rows)
            contents = self._reader.read(rows, batch, request)
            for i, view in enumerate(self._planner.audio_views):
                # [B S]; contents.audio is [views S], one row a view.
                sound = np.stack([row.audio[i] for row in contents if row.audio is not None])
                stream = batch[view.stream]
                stream['data'] = sound[:, ::-1] if view.kind == 'reverse' else sound
                _empty_missing_windows(view, stream)
            self._planned[int(number)] = batch
            arrays = [np.full(len(contents), number)]  # of the batch, on every row
            if self._planner.picture_views:
                arrays.append(request.formats)
            for modality in self._planner.picture_views:
                arrays += _frame_arrays([row.pictures[modality] for row in contents])
            return arrays
        except Exception as e:
            self._error = e
            raise

    # ---- in the graph: one row
    @tf.autograph.experimental.do_not_convert
    def _decode_row(self, row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        clips = {name: self._decode_clips(name, row) for name in self._planner.picture_views}
        return {'batch_number': row['batch_number'], **clips}

    def _decode_clips(self, modality: str, row: dict[str, tf.Tensor]) -> tf.Tensor:
        """The clips [views T ...] of a modality's views."""
        planner = self._planner
        frame_shape = planner.frame_shape(modality)
        num_views = len(planner.picture_views[modality])
        clip_shape = (num_views, planner.inputs[modality]['frames'], *frame_shape)
        packets = row[f'{modality}/packets']
        entry_corners = row[f'{modality}/entry_corners']
        # Without the entries that were added to make rows equally long.
        entry_packets = row[f'{modality}/entry_packets']
        entry_packets = tf.boolean_mask(entry_packets, entry_packets >= 0)

        def decode_jpegs() -> tf.Tensor:
            def decode(entry: tf.Tensor) -> tf.Tensor:
                packet = packets[entry_packets[entry]]
                corner = entry_corners[entry] if planner.cuts_squares else None
                if modality == 'flow':
                    return _decode_flow(packet, corner, frame_shape)
                if corner is None:
                    return tf.image.decode_jpeg(packet, channels=3)
                # (y, x, height, width). Decoding and cropping in one op skips most of the blocks
                # outside.
                window = tf.concat([corner, frame_shape[:2]], axis=0)
                return tf.image.decode_and_crop_jpeg(packet, window, channels=3)

            return tf.map_fn(
                decode,
                tf.range(tf.size(entry_packets)),
                fn_output_signature=tf.TensorSpec(frame_shape, tf.uint8),
                # Rows already run in parallel; more threads inside a row would compete with them.
                parallel_iterations=1,
            )

        def decode_h264() -> tf.Tensor:
            decode = functools.partial(_decode_h264, frame_shape, planner.yields_planes)
            arguments = [packets, entry_packets]
            if planner.cuts_squares:
                arguments.append(entry_corners)
            decoded = tf.numpy_function(decode, arguments, tf.uint8)
            return tf.ensure_shape(decoded, [None, *frame_shape])

        decoders = []
        for record_format in planner.formats:
            is_h264 = modality == 'video' and record_format.get('frames') == 'h264'
            decoders.append(decode_h264 if is_h264 else decode_jpegs)

        def decode_clip() -> tf.Tensor:
            # Rows of one batch may come from sources with different layouts.
            if len(set(decoders)) > 1:
                decoded = tf.switch_case(row['format'], decoders)
            else:
                decoded = decoders[0]()
            # With as many entries as frames, entry i is frame i. Gathering would only copy them, at
            # the cost of some decoding.
            each_shown_once = tf.size(entry_packets) == clip_shape[0] * clip_shape[1]
            frames = tf.cond(
                each_shown_once,
                lambda: decoded,
                lambda: tf.gather(decoded, row[f'{modality}/frame_entries']),
            )
            return tf.reshape(frames, clip_shape)

        has_frames = tf.size(entry_packets) > 0
        return tf.cond(has_frames, decode_clip, lambda: tf.zeros(clip_shape, tf.uint8))


def _empty_missing_windows(view: View, stream: dict[str, Any]) -> None:
    """Zero what was read in place of windows that records do not have."""
    # Other views have every window, and zeros already where a record lacks the modality.
    if view.apart is not None:
        blank_stream(stream, ~stream['valid'])


def _decode_flow(packet: tf.Tensor, corner: tf.Tensor | None, shape: tuple[int, ...]) -> tf.Tensor:
    """The flow [H W 2] of what `optical_flow.to_planes` made, encoded as JPEG.

    Args:
      packet: the bytes.
      corner: (y, x) where it is cut; None: nowhere.
      shape: of the result.
    """
    planes = tf.image.decode_jpeg(packet, channels=1)[..., 0]  # [rows W]
    height, width, _ = shape
    y, x = (0, 0) if corner is None else (corner[0], corner[1])
    # The vertical plane begins half-way down, below the rows that fill up the horizontal one.
    vertical_y = y + tf.shape(planes)[0] // 2
    horizontal = planes[y : y + height, x : x + width]
    vertical = planes[vertical_y : vertical_y + height, x : x + width]
    return tf.stack([horizontal, vertical], axis=-1)


def _frame_arrays(contents: list[RowPictures]) -> list[np.ndarray]:
    """The columns of `_fetch_tensors` of one modality, rows filled up to the longest one.

    Packets are filled up with b'' and entries with packet -1.
    """
    num_rows = len(contents)
    # At least one, for a batch without any frames.
    max_packets = max(1, *(len(row.packets) for row in contents))
    max_entries = max(1, *(len(row.entry_packets) for row in contents))
    packets = np.full((num_rows, max_packets), b'', object)
    entry_packets = np.full((num_rows, max_entries), -1, np.int32)
    entry_corners = np.zeros((num_rows, max_entries, 2), np.int32)
    for i, row in enumerate(contents):
        packets[i, : len(row.packets)] = row.packets
        entry_packets[i, : len(row.entry_packets)] = row.entry_packets
        if row.entry_corners:
            entry_corners[i, : len(row.entry_corners)] = row.entry_corners
    frame_entries = np.array([row.frame_entries for row in contents], np.int32)
    return [packets, entry_packets, entry_corners, frame_entries]


def _decode_h264(
    frame_shape: tuple[int, ...],
    planes: bool,
    packets: np.ndarray,
    entry_packets: Int[np.ndarray, ' entries'],
    corners: Int[np.ndarray, 'padded 2'] | None = None,
) -> UInt8[np.ndarray, 'entries ...']:
    """Decode H.264 frames, and cut them at the corners if there are any.

    The packets must begin with one that decodes alone.

    Args:
      frame_shape: of one frame of the result.
      planes: as YUV 4:2:0 planes instead of RGB.
      packets: bytes objects, filled up with empty ones.
      entry_packets: which packet each entry shows.
      corners: (y, x) of each entry in pixels; more than entries where filled up.
    """
    from data_pipelines import media

    stored = [packet for packet in packets if packet]
    frames = media.decode_h264(stored, entry_packets.tolist(), 'yuv420p' if planes else 'rgb24')
    if corners is None:
        return frames
    height, width = frame_shape[:2]
    cut_frames = []
    for frame, (y, x) in zip(frames, corners):
        cut_frames.append(frame[y : y + height, x : x + width])
    return np.stack(cut_frames)
