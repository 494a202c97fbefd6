"""Reads from the records what a plan requests, and nothing more.

The packets of frames and the sound of each row are compared with their checksums.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int16

from data_pipelines.errors import DataError
from data_pipelines.loading import sample_windows
from data_pipelines.loading.batch_plan import (
    BatchPlanner,
    PictureRequest,
    ReadRequest,
    RowRequest,
)
from data_pipelines.loading.data_source import Rows, blank
from data_pipelines.loading.lazy_split import LazySplit
from data_pipelines.loading.requests_in_flight import RequestsInFlight

_MIN_READS = 100  # records read before the share of unreadable ones is compared with the limit
_MAX_LISTED = 1000  # unreadable records listed by problems()


class ReadProblems:
    """Counts the records that could not be read, over all passes. Safe from several threads."""

    def __init__(self, max_corrupt: float):
        """`max_corrupt`: share of unreadable records, 0 to 1, beyond which reading stops."""
        self._max_corrupt = max_corrupt
        self._lock = threading.Lock()
        self._num_read = 0
        self._num_corrupt = 0
        self._listed: list[tuple[str, int, str]] = []
        self._seen: set[tuple[str, int]] = set()

    def add(self, split: str, records: np.ndarray, reasons: Sequence[str], size: int) -> None:
        """Count reads of one split.

        Args:
          split: where the records were read: 'source/split'.
          records: their numbers, int64 [n].
          reasons: why each could not be read, '' where it could.
          size: records of all splits of the pass; a pass shorter than the usual patience is
            compared with the limit earlier.

        Raises:
          DataError: more records than config.data.max_corrupt allows cannot be read.
        """
        # The count is cumulative over the run, so one damaged file that comes round in every epoch
        # weighs the same as its share of the data.
        with self._lock:
            self._num_read += len(records)
            for record, reason in zip(records, reasons):
                if reason:
                    self._num_corrupt += 1
                    self._list(split, int(record), reason)
            # One damaged record among the first few is no evidence about the share.
            enough_reads = self._num_read >= min(_MIN_READS, max(size, 1))
            if enough_reads and self._num_corrupt > self._max_corrupt * self._num_read:
                name, number, reason = self._listed[0]
                raise DataError(
                    f'{self._num_corrupt} of {self._num_read} records could not be read, more than '
                    f'config.data.max_corrupt={self._max_corrupt:g} (first: record {number} of '
                    f'{name}: {reason}); prepare the data again with --overwrite'
                )

    def _list(self, split: str, record: int, reason: str) -> None:
        key = (split, record)
        if key not in self._seen and len(self._seen) < _MAX_LISTED:
            self._seen.add(key)
            self._listed.append((split, record, reason))

    def summary(self) -> dict[str, Any]:
        """{'corrupt': count, 'read': count, 'indices': [(source, record, reason)]}."""
        with self._lock:
            return {
                'corrupt': self._num_corrupt,
                'read': self._num_read,
                'indices': list(self._listed),
            }


@dataclasses.dataclass(frozen=True)
class Reads:
    """One call of `ReadProblems.add`, whose arguments these are."""

    split: str
    records: Int[np.ndarray, ' n']
    reasons: Sequence[str]
    size: int


class ReadLog:
    """Notes reads as ReadProblems counts them: for another process, which counts those of all."""

    def __init__(self) -> None:
        self._reads: list[Reads] = []

    def add(self, split: str, records: np.ndarray, reasons: Sequence[str], size: int) -> None:
        """Note reads of one split; the arguments are those of `ReadProblems.add`."""
        self._reads.append(Reads(split, records, reasons, size))

    def take(self) -> list[Reads]:
        """What was noted since the last time."""
        reads = self._reads
        self._reads = []
        return reads


@dataclasses.dataclass
class RowPictures:
    """The pictures of one modality that were read of one row.

    Overlapping views ask for the same frames, and each frame is to be decoded once. Three lists say
    how: stored packets are decoded into entries (the different frames, or squares of frames), and
    each frame that is shown is one of the entries. Two views of two frames each, of JPEGs 4 and 5
    and of 5 and 6:

        packets        [JPEG 4, JPEG 5, JPEG 6]
        entry_packets  [0, 1, 2]
        frame_entries  [0, 1, 1, 2]

    With H.264 there are more packets than entries: those that a frame is predicted from.

    Attributes:
      packets: the stored frames that must be decoded, in record order.
      entry_packets: for each entry, the number of its packet.
      entry_corners: for each entry, the (y, x) in pixels where it is cut; empty where frames are
        not cut.
      frame_entries: for each frame of each view, one view after another, its entry.
    """

    packets: list[bytes]
    entry_packets: list[int]
    entry_corners: list[tuple[int, ...]]
    frame_entries: list[int]


@dataclasses.dataclass
class RowContents:
    """What was read of one row.

    Attributes:
      pictures: of each modality that has views of pictures.
      audio: the windows of the audio views [views S]; None without audio.
    """

    pictures: dict[str, RowPictures]
    audio: Int16[np.ndarray, 'views S'] | None


class RecordReader:
    """Reads the rows of planned batches."""

    def __init__(self, planner: BatchPlanner, problems: ReadProblems | ReadLog):
        """`planner`: makes the requests; `problems`: told of every read."""
        self._planner = planner
        self._problems = problems
        self._pass_size = sum(len(split) for split in planner.splits)
        self._in_flight: RequestsInFlight | None = None
        remote = [split.prepared for split in planner.splits if split.prepared.is_remote]
        if remote:
            self._in_flight = RequestsInFlight(remote[0].settings)

    @property
    def is_remote(self) -> bool:
        """Whether reading waits for an object store, so that several batches should be read."""
        return self._in_flight is not None

    def read(self, rows: Rows, batch: dict[str, Any], request: ReadRequest) -> list[RowContents]:
        """Read the rows of a batch.

        Args:
          rows: the examples of the batch.
          batch: what was planned; rows that cannot be read are emptied in place.
          request: what to read.

        Returns:
          Contents of each row; empty ones where a row is padding or cannot be read.

        Raises:
          DataError: too many records cannot be read.
          StoreError: an object store cannot be read.
        """
        records = self._planner.record_numbers(rows)  # [B]
        contents: dict[int, RowContents] = {}
        # Padding is emptied like an unreadable row: zeros with valid False.
        is_bad = ~rows.valid
        # By source, because problems are counted for each split.
        for split, members in self._planner.by_split(rows):
            reasons = []
            found = self._read_rows(split, records, request, members.tolist())
            for row, (row_contents, reason) in zip(members.tolist(), found):
                if row_contents is not None:
                    contents[row] = row_contents
                reasons.append(reason)
                is_bad[row] = bool(reason)
            name = f'{split.name}/{split.split}'
            self._problems.add(name, records[members], reasons, self._pass_size)
        # Streams have no 'data' for video and audio yet; the empty contents below supply zeros.
        blank(batch, is_bad)
        return [contents.get(row) or self._empty_row() for row in range(len(records))]

    def _read_rows(
        self, split: LazySplit, records: np.ndarray, request: ReadRequest, numbers: list[int]
    ) -> list[tuple[RowContents | None, str]]:
        """Read rows of one split; (None, reason) for each that cannot be read."""

        def read_one(row: int) -> tuple[RowContents | None, str]:
            try:
                return self._read_row(split, int(records[row]), request.row(row)), ''
            # A wrong checksum is a ValueError. One bad record costs its row, not the run; the limit
            # on their share is checked in `ReadProblems.add`. A StoreError passes through: it says
            # nothing about the record.
            except (ValueError, OSError) as e:
                return None, str(e)

        if self._in_flight is not None and split.prepared.is_remote:
            return self._in_flight.map(read_one, numbers, _num_bytes)
        return [read_one(row) for row in numbers]

    def _empty_row(self) -> RowContents:
        audio = None
        if self._planner.audio_views:
            num_samples = self._planner.inputs['audio']['samples']
            audio = np.zeros((len(self._planner.audio_views), num_samples), np.int16)
        pictures = {}
        for modality in self._planner.picture_views:
            # frame_entries must have its length for the batch to be an array. Its zeros are never
            # looked up: a row without entries decodes to zeros.
            frame_entries = [0] * self._planner.frames_per_row(modality)
            pictures[modality] = RowPictures([], [], [], frame_entries)
        return RowContents(pictures, audio)

    def _read_row(self, split: LazySplit, record: int, request: RowRequest) -> RowContents:
        contents = self._empty_row()
        # Flow is stored as JPEG, whatever the frames are stored as.
        formats = {'video': split.prepared.format, 'flow': {}}
        packet_numbers: dict[str, list[int]] = {}
        for modality, pictures in request.pictures.items():
            packet_numbers[modality] = []
            # -1 in the first frame means -1 in all: the record has no pictures.
            if pictures.frames[0, 0] >= 0:
                packet_numbers[modality] = _assign_entries(
                    contents.pictures[modality], pictures, formats[modality]
                )
        rate = split.prepared.meta['rate']
        total = request.total_samples
        # Where the windows of the audio views begin; none for a record without sound.
        first_samples: list[int] = []
        sound_pieces: list[int] = []  # numbers of the stored seconds to read
        if request.first_samples is not None and total:
            num_samples = self._planner.inputs['audio']['samples']
            first_samples = [int(first) for first in request.first_samples]
            # Sound is stored in pieces of one second, each with its checksum. Windows of several
            # views overlap, and a piece that two of them need is read once.
            needed: set[int] = set()
            for first in first_samples:
                needed.update(sample_windows.seconds(first, num_samples, total, rate))
            sound_pieces = sorted(needed)

        frames, sound, flows = split.clip(
            record,
            packet_numbers.get('video', []),
            sound_pieces,
            packet_numbers.get('flow', []),
        )
        for modality, packets in (('video', frames), ('flow', flows)):
            if modality in contents.pictures:
                contents.pictures[modality].packets = packets
        if first_samples:
            is_dmvr = split.prepared.format['kind'] == 'dmvr'
            # DMVR records hold float32 samples in [-1, 1], ours int16.
            dtype = '<f4' if is_dmvr else '<i2'
            pieces = {s: np.frombuffer(raw, dtype) for s, raw in zip(sound_pieces, sound)}
            windows = []
            for first in first_samples:
                window = sample_windows.window(pieces, first, num_samples, total, rate)
                windows.append(sample_windows.to_int16(window))
            contents.audio = np.stack(windows)  # [views S]
        return contents


def _num_bytes(found: tuple[RowContents | None, str]) -> int:
    """Bytes that were read for a row."""
    contents, _ = found
    if contents is None:
        return 0
    num_bytes = 0 if contents.audio is None else contents.audio.nbytes
    for pictures in contents.pictures.values():
        num_bytes += sum(len(packet) for packet in pictures.packets)
    return num_bytes


def _assign_entries(
    contents: RowPictures, request: PictureRequest, record_format: dict[str, Any]
) -> list[int]:
    """Fill the entries of `contents`; return the stored frames to read for them, ascending."""
    frames_by_view = request.frames.tolist()
    corner_by_view: list[tuple[int, ...]] = [()] * len(frames_by_view)
    if request.corners is not None:
        corner_by_view = [tuple(corner) for corner in request.corners.tolist()]

    # Each frame is decoded once, however many views show it (once for each corner it is cut at).
    # A dict remembers the order of insertion, so its n-th key is entry n; the two lists at the end
    # rely on it.
    entries: dict[tuple[int, tuple[int, ...]], int] = {}
    frame_entries = []
    for numbers, corner in zip(frames_by_view, corner_by_view):
        for number in numbers:
            frame_entries.append(entries.setdefault((number, corner), len(entries)))
    contents.frame_entries = frame_entries

    packet_numbers = sorted({number for number, _ in entries})
    if record_format.get('frames') == 'h264':
        # The extra packets are decoded on the way and shown by no entry.
        packet_numbers = _with_earlier_frames(packet_numbers, record_format['gop'])
    packet_of_frame = {number: i for i, number in enumerate(packet_numbers)}
    contents.entry_packets = [packet_of_frame[number] for number, _ in entries]
    # Either every view has a corner or none has, so the list is as long as the entries or empty.
    contents.entry_corners = [corner for _, corner in entries if corner]
    return packet_numbers


def _with_earlier_frames(numbers: list[int], gop: int) -> list[int]:
    """Frames with those they are predicted from.

    Every `gop`-th frame decodes alone; a frame needs all since the last of those.
    """
    last_of_group = {number // gop: number for number in numbers}  # numbers ascend
    needed: list[int] = []
    for group, last in last_of_group.items():
        needed.extend(range(group * gop, last + 1))
    return needed
