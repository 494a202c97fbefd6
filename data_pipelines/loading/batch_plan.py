"""Rows of a batch -> all of it but its pixels and samples, and what must be read for those.

The index of a prepared dataset says what every record holds, so a batch is planned in NumPy before
any record is opened: windows, crops, sentences and labels. Every draw is keyed by the row's
position, so a plan depends on nothing that was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from data_pipelines.loading import frame_windows, order, sample_windows, sentence_windows
from data_pipelines.loading import views as view_rules
from data_pipelines.loading.data_source import Data, Request, Rows, blank_stream
from data_pipelines.loading.lazy_split import LazySplit
from data_pipelines.storage.frame_shapes import Shapes
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.inputs.tokenizer import Tokenizer

_DURATION_TOLERANCE = 1e-3  # seconds; segment times are float32, durations float64


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """The pictures of one modality to read and decode: of the rows of a batch, or of one row.

    Attributes:
      frames: stored ones of each view in the order shown, -1 where the record has none.
      corners: (y, x) in pixels where each view is cut to a square; None where frames travel whole.
    """

    frames: Int[np.ndarray, '*B views T']
    corners: Int[np.ndarray, '*B views 2'] | None

    def row(self, row: int) -> PictureRequest:
        """The part of one row."""
        corners = None if self.corners is None else self.corners[row]
        return PictureRequest(self.frames[row], corners)


@dataclasses.dataclass(frozen=True)
class RowRequest:
    """What to read of one record; see `ReadRequest`, whose row it is."""

    pictures: dict[str, PictureRequest]
    first_samples: Int[np.ndarray, ' audio_views'] | None
    total_samples: int


@dataclasses.dataclass(frozen=True)
class ReadRequest:
    """What to read and decode for the rows of a batch.

    Attributes:
      formats: for each row, the number of its record layout in `BatchPlanner.formats`.
      pictures: of each modality that has views of pictures (video, flow).
      first_samples: first sample of each audio view, -1 where the record has none; None without
        audio.
      total_samples: samples that each record holds; None without audio.
    """

    # All arrays begin with the row, so `row` can hand the reader its part of each array.
    formats: Int[np.ndarray, ' B']
    pictures: dict[str, PictureRequest] = dataclasses.field(default_factory=dict)
    first_samples: Int[np.ndarray, 'B audio_views'] | None = None
    total_samples: Int[np.ndarray, ' B'] | None = None

    def row(self, row: int) -> RowRequest:
        """The part of one row."""
        return RowRequest(
            pictures={name: request.row(row) for name, request in self.pictures.items()},
            first_samples=None if self.first_samples is None else self.first_samples[row],
            total_samples=0 if self.total_samples is None else int(self.total_samples[row]),
        )


@dataclasses.dataclass(frozen=True)
class RecordTimes:
    """What the index says of the records of a batch.

    Attributes:
      duration: in seconds.
      frames: how many are stored.
      flows: how many optical flows are stored: none, or one for each frame.
      samples: how many are stored.
      fps: stored frames per second.
    """

    duration: Float[np.ndarray, ' B']
    frames: Int[np.ndarray, ' B']
    flows: Int[np.ndarray, ' B']
    samples: Int[np.ndarray, ' B']
    fps: Float[np.ndarray, ' B']

    def pictures(self, modality: str) -> Int[np.ndarray, ' B']:
        """How many pictures of a modality are stored."""
        return self.flows if modality == 'flow' else self.frames


class BatchPlanner:
    """Plans the batches of one request.

    Attributes:
      inputs: config.model.inputs as dicts.
      request: how rows become a batch.
      splits: the datasets that `Rows.source` counts.
      picture_views: modality -> its streams of pictures, in order; without those that have none.
      audio_views: the audio streams of the request, in order.
      formats: the different record layouts of the splits.
      height: rows of pixels of a frame of a batch.
      width: columns of pixels of a frame of a batch.
      cuts_squares: frames have several shapes, so that each is cut to a square of their common
        short side.
      yields_planes: video (not flow) leaves the decoder as YUV 4:2:0 planes instead of RGB.
    """

    def __init__(
        self,
        source: Data,
        tokenizer: Tokenizer,
        label_classes: Mapping[str, int | None],
        request: Request,
        splits: list[LazySplit],
    ):
        """See the class.

        Args:
          source: the data object, for its window, seed and draws.
          tokenizer: encodes sentences and captions.
          label_classes: label name -> number of classes if labels are multi-hot, else None.
          request: how rows become a batch.
          splits: the datasets that `Rows.source` counts.
        """
        self.inputs = source.inputs
        self.request = request
        self.splits = splits
        self.picture_views: dict[str, list[view_rules.View]] = {}
        for view in request.views:
            if kind_of(view.modality) == PICTURES:
                self.picture_views.setdefault(view.modality, []).append(view)
        self.audio_views = [view for view in request.views if view.modality == 'audio']
        self._data = source
        self._tokenizer = tokenizer
        self._label_classes = label_classes
        # [B K L] of one K in all batches and on all hosts; 0 where there are no captions.
        self._num_captions = 0
        if request.segments and 'text' in self.inputs:
            self._num_captions = max(split.index.max_captions for split in splits)

        # A layout says how frames are encoded and how the record is serialized. Rows carry its
        # number, so that the graph of tf.data has one decoder for each layout instead of each
        # source.
        layouts = [split.prepared.format for split in splits]
        self.formats: list[dict[str, Any]] = []
        format_numbers = []
        for layout in layouts:
            if layout not in self.formats:
                self.formats.append(layout)
            format_numbers.append(self.formats.index(layout))
        # By source. Both are looked up by the rows of a batch, which may be of few of them.
        self._format_numbers = np.array(format_numbers, np.int32)
        # One rate for each dataset: `prepare` resamples all its videos to it.
        self._stored_fps = np.array([split.prepared.meta['fps'] for split in splits])
        self._has_flow = np.array([bool(split.prepared.flow) for split in splits])

        # Frames of one shape travel whole and the device crops. Mixed shapes are cut to squares of
        # their common short side on the host: anywhere along the long side in training, the middle
        # in evaluation; views may say where.
        # Only over these splits: an evaluation dataset of another shape does not change training.
        shapes: Shapes = set()
        if self.picture_views:
            for split in splits:
                shapes |= split.frame_shapes()
        self.cuts_squares = len(shapes) > 1
        if len(shapes) == 1:
            self.height, self.width = next(iter(shapes))
        else:
            self.height = self.width = splits[0].prepared.meta['size']

        # In training, video leaves the host as the decoder makes it: the training step converts it
        # to RGB and doubles the colour planes. Other passes need RGB from the host.
        # Planes are 1.5 bytes per pixel, RGB is 3: half the memory traffic and half the transfer
        # to the device. A square is cut by slicing [H W 3], which does not work on stacked planes.
        is_training = request.split == 'train' and not request.segments
        all_h264 = all(layout.get('frames') == 'h264' for layout in layouts)
        self.yields_planes = is_training and not self.cuts_squares and all_h264

    def frame_shape(self, modality: str) -> tuple[int, ...]:
        """Shape of one decoded frame: (H, W, 3), or (H * 3 / 2, W) as planes; of flow (H, W, 2)."""
        if modality == 'flow':
            return (self.height, self.width, 2)
        if self.yields_planes:
            # H rows of Y, then U and V, a quarter of the pixels each: together H/2 rows of W.
            return (self.height * 3 // 2, self.width)
        return (self.height, self.width, 3)

    def frames_per_row(self, modality: str) -> int:
        """Frames of all views of a modality of a row."""
        return len(self.picture_views[modality]) * self.inputs[modality]['frames']

    def record_numbers(self, rows: Rows) -> Int[np.ndarray, ' B']:
        """The record of each row, also where `Rows.index` counts segments."""
        if self.request.segments:
            return self._gather(rows, lambda split: split.index.segment_record, np.int64)
        return rows.index

    def plan(self, rows: Rows) -> tuple[dict[str, Any], ReadRequest]:
        """Plan one batch.

        Args:
          rows: which examples the batch holds.

        Returns:
          The batch without the data of video and audio, and what to read for those.
        """
        # The caller counts segments or records, as the request says, and batch['index'] reports
        # that count. From here on `rows` counts records.
        example = rows.index
        if self.request.segments:
            begin = self._gather(rows, lambda split: split.index.segment_start, np.float64)
            end = self._gather(rows, lambda split: split.index.segment_end, np.float64)
            rows = dataclasses.replace(rows, index=self.record_numbers(rows))
        frames = self._gather(rows, lambda split: split.index.frames, np.int64)
        times = RecordTimes(
            duration=self._gather(rows, lambda split: split.index.duration, np.float64),
            frames=frames,
            flows=np.where(self._has_flow[rows.source], frames, 0),
            samples=self._gather(rows, lambda split: split.index.samples, np.int64),
            fps=self._stored_fps[rows.source],
        )
        if not self.request.segments:
            # A record as a whole is one segment from 0 to its end.
            begin, end = np.zeros(len(rows.index)), times.duration
        # {suffix of a view: [B] seconds}. Video, audio and text of one suffix share the start,
        # which is what makes them a positive pair.
        starts = view_rules.starts(
            self.request.views,
            self._data.window,
            times.duration,
            # Random numbers of each row, keyed by its position in the stream, not by a generator's
            # state: any batch can be planned alone, so resuming needs no replay.
            self._data.draws(self.request, rows),
            (begin, end) if self.request.centred else None,
            1.0 / times.fps,
        )
        has_window = view_rules.present(starts)
        starts = view_rules.with_substitutes(starts)

        batch: dict[str, Any] = {
            'index': example.astype(np.int32),
            'source': rows.source.astype(np.int32),
            'position': rows.position,
            'valid': rows.valid.copy(),
        }
        for view in self.request.views:
            # 'data' of video and audio is filled in by RecordBatches, once it is read and decoded.
            stream = self._stream(rows, view, starts[view.suffix], times)
            blank_stream(stream, ~has_window[view.suffix])
            batch[view.stream] = stream
        if self._num_captions:
            # Only where the examples are segments.
            batch['text.caption'] = self._caption_stream(rows, example, begin)
        if self.request.segments:
            labelling_segment = example
        else:
            # A training window has the label of what happens in its middle. The suffix '' is the
            # main window.
            middle = starts[''] + self._data.window / 2
            labelling_segment = self._segment_at(rows, middle)
        batch['labels'] = self._labels(rows, labelling_segment)
        return batch, self._read_request(rows, starts, times)

    def _gather(
        self, rows: Rows, column: Callable[[LazySplit], Any], dtype: Any
    ) -> Shaped[np.ndarray, ' B']:
        """A column of the index for each row, over the sources; 0 where a row is padding."""
        # A loop over the sources of these rows: each is one vectorized lookup.
        values = np.zeros(len(rows.index), dtype)
        for split, members in self.by_split(rows):
            values[members] = column(split)[rows.index[members]]
        return values

    def by_split(self, rows: Rows) -> Iterator[tuple[LazySplit, Int[np.ndarray, ' n']]]:
        """Yield each split that has rows in a batch, and which rows: those that are no padding."""
        members = np.flatnonzero(rows.valid)
        by_source = members[np.argsort(rows.source[members], kind='stable')]
        numbers, firsts = np.unique(rows.source[by_source], return_index=True)
        for number, of_source in zip(numbers.tolist(), np.split(by_source, firsts[1:])):
            yield self.splits[number], of_source

    def _stream(
        self, rows: Rows, view: view_rules.View, starts: Float[np.ndarray, ' B'], times: RecordTimes
    ) -> dict[str, Any]:
        stream: dict[str, Any] = {'start': starts.astype(np.float32)}
        if view.modality == 'text':
            # The only stream that is complete after planning: the index holds the sentences.
            stream['data'], stream['mask'] = self._sentences(rows, starts)
            stream['valid'] = stream['mask'].any(axis=-1)  # [B K] -> [B]
        elif view.modality == 'audio':
            stream['valid'] = times.samples > 0
        else:
            stream['valid'] = times.pictures(view.modality) > 0
            # All rows have one frame shape by now, either stored that way or cut to squares.
            height = np.full(len(rows.index), self.height)
            width = np.full(len(rows.index), self.width)
            stream['box'], stream['flip'] = self._data.crops(
                self.request, rows, view, height, width
            )
        return stream

    def _sentences(
        self, rows: Rows, starts: Float[np.ndarray, ' B']
    ) -> tuple[Int[np.ndarray, 'B K L'], Bool[np.ndarray, 'B K']]:
        """Sentences around the window of each row, encoded."""
        num_candidates = self.inputs['text']['candidates']
        sentences: list[list[str]] = []
        for source, record, start, valid in zip(rows.source, rows.index, starts, rows.valid):
            index = self.splits[source].index
            # Offsets as in CSR matrices: record r owns the sentences from offset[r] up to, not
            # including, offset[r + 1]. The index number of a padding row means nothing and must
            # not be looked up.
            first, last = index.sentence_offset[record : record + 2] if valid else (0, 0)
            nearest = sentence_windows.candidates(
                index.sentence_start[first:last],
                index.sentence_end[first:last],
                start,
                self._data.window,
                num_candidates,
            )
            sentences.append([index.sentence_text[first + i] for i in nearest])
        num_words = self.inputs['text']['words']
        return sentence_windows.encode(self._tokenizer, sentences, num_candidates, num_words)

    def _caption_stream(
        self, rows: Rows, segment: Int[np.ndarray, ' B'], begin: Float[np.ndarray, ' B']
    ) -> dict[str, Any]:
        """The captions of each segment, as a text stream of as many candidates as one has."""
        captions: list[list[str]] = []
        for source, number, valid in zip(rows.source, segment, rows.valid):
            split = self.splits[source]
            # No caption gives a row of zeros, whose mask is False.
            captions.append(split.index.captions_of(number) if valid else [])
        num_words = self.inputs['text']['words']
        data, mask = sentence_windows.encode(
            self._tokenizer, captions, self._num_captions, num_words
        )
        return {
            'data': data,
            'mask': mask,
            'valid': mask.any(axis=-1),
            'start': begin.astype(np.float32),
        }

    def _segment_at(self, rows: Rows, moment: Float[np.ndarray, ' B']) -> Int[np.ndarray, ' B']:
        """The last segment of each record that holds the moment (seconds), -1 if none does."""
        segments = np.full(len(rows.index), -1, np.int64)
        for row, (source, record) in enumerate(zip(rows.source, rows.index)):
            if not rows.valid[row]:
                continue
            index = self.splits[source].index
            first, last = index.segment_offset[record : record + 2]
            is_single = last == first + 1
            if is_single and _covers_record(index, first, record):
                # Also where the window is longer than both, so that its middle lies behind the end.
                segments[row] = first
                continue
            # Bounds included, so a moment between two adjoining segments belongs to the later one.
            begins_before = index.segment_start[first:last] <= moment[row]
            ends_after = moment[row] <= index.segment_end[first:last]
            containing = np.flatnonzero(begins_before & ends_after)
            if len(containing):
                segments[row] = first + containing[-1]
        return segments

    def _labels(self, rows: Rows, segment: Int[np.ndarray, ' B']) -> dict[str, np.ndarray]:
        """Labels {name: int32 [B], -1 unknown, or multi-hot float32 [B P]} of the segments."""
        labels = {}
        for name, num_classes in self._label_classes.items():
            if num_classes is None:
                values = np.full(len(segment), -1, np.int32)
            else:
                values = np.zeros((len(segment), num_classes), np.float32)
            for split, members in self.by_split(rows):
                stored = split.index.labels.get(name)
                labelled = members[segment[members] >= 0]
                if stored is None or not len(labelled):
                    continue
                stored = stored[segment[labelled]]  # [n] class numbers, or [n P] multi-hot
                if num_classes is not None and stored.ndim == 1:
                    # Another source of the mixture is multi-hot: one class becomes one 1 in a row.
                    known = stored >= 0
                    # An unknown class (-1) stays all zeros; as an index it would have set the last
                    # class.
                    values[labelled[known], stored[known]] = 1.0
                else:
                    values[labelled] = stored
            labels[name] = values
        return labels

    def _read_request(
        self, rows: Rows, starts: Mapping[str, np.ndarray], times: RecordTimes
    ) -> ReadRequest:
        formats = self._format_numbers[rows.source]  # [B]
        first_samples = total_samples = None
        pictures = {}
        for modality, views in self.picture_views.items():
            frames = self._frame_numbers(modality, views, starts, times)
            corners = self._square_corners(rows, views) if self.cuts_squares else None
            pictures[modality] = PictureRequest(frames, corners)
        if self.audio_views:
            first_samples = self._first_samples(starts, times)
            total_samples = times.samples
        return ReadRequest(formats, pictures, first_samples, total_samples)

    def _frame_numbers(
        self,
        modality: str,
        views: list[view_rules.View],
        starts: Mapping[str, np.ndarray],
        times: RecordTimes,
    ) -> Int[np.ndarray, 'B views T']:
        fps = self.inputs[modality]['fps']
        num_frames = self.inputs[modality]['frames']
        num_stored = times.pictures(modality)
        numbers_by_view = []
        for view in views:
            numbers = frame_windows.frame_numbers(
                starts[view.suffix], num_stored, times.fps, fps, num_frames
            )
            if view.kind == 'reverse' and modality == 'flow':
                # From frame n back to n - 1 everything moves against the flow of frame n - 1.
                numbers = np.maximum(numbers - 1, 0)
            # [B T]. Time runs backwards by reading the frames in the opposite order; nothing has
            # to be reversed after decoding.
            numbers_by_view.append(numbers[:, ::-1] if view.kind == 'reverse' else numbers)
        # All -1 or none in a row: the reader looks at the first number alone.
        has_frames = (num_stored > 0)[:, None, None]
        return np.where(has_frames, np.stack(numbers_by_view, axis=1), -1).astype(np.int32)

    def _square_corners(
        self, rows: Rows, views: list[view_rules.View]
    ) -> Int[np.ndarray, 'B views 2']:
        """Upper left corners (y, x) of the squares, in pixels of the stored frames."""
        height = self._gather(rows, lambda split: split.index.height, np.int64)
        width = self._gather(rows, lambda split: split.index.width, np.int64)
        # How far along the longer side the square lies, 0 to 1: one draw for all views of a row.
        row_fraction = np.full(len(rows.index), 0.5)
        if self.request.augment:
            site = f'{self.request.site}/square'
            seed = self._data.config.seed
            # Its own site in the key makes this draw independent of those for windows and crops.
            row_fraction = order.uniform(seed, rows.position, site, 1)[:, 0]
        fractions = []
        for view in views:
            # A view may state its position, as those of three-crop evaluation do.
            fixed = view.crop
            fractions.append(row_fraction if fixed is None else np.full(len(rows.index), fixed))
        fraction = np.stack(fractions, axis=1)  # [B views]
        # The short side has no room, so the fraction moves the square along the long side only.
        room = np.stack([height, width], axis=1) - self.height  # [B 2]
        corners = np.floor(room[:, None] * fraction[..., None] + 0.5)  # [B views 2]
        # A row without frames has height 0, and a negative room.
        return np.maximum(corners, 0).astype(np.int32)

    def _first_samples(
        self, starts: Mapping[str, np.ndarray], times: RecordTimes
    ) -> Int[np.ndarray, 'B views']:
        rate = self.inputs['audio']['rate']
        first_by_view = []
        for view in self.audio_views:
            first = sample_windows.first_samples(starts[view.suffix], times.samples, rate)
            # A reversed view reads the same samples; they are turned around once they are read.
            first_by_view.append(first)
        has_samples = (times.samples > 0)[:, None]
        return np.where(has_samples, np.stack(first_by_view, axis=1), -1).astype(np.int64)


def _covers_record(index: Any, segment: int, record: int) -> bool:
    end = index.duration[record] - _DURATION_TOLERANCE
    return bool(index.segment_start[segment] == 0 and index.segment_end[segment] >= end)
