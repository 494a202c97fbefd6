"""Reads what the records of DMVR hold: TFRecord files of SequenceExamples."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage import record_messages

FRAMES = ('image/encoded',)
AUDIO = ('WAVEFORM/feature/floats', 'waveform/floats')
LABELS = ('clip/label', 'label')  # with /index and /text
HEADER = 12  # bytes of a TFRecord before the data: its length and the checksum of that
FOOTER = 4  # bytes behind the data: its checksum
# Resampling overshoots full scale a little; integers written as floats are far beyond it.
_LOUDEST = 4.0  # beyond this, samples are no sound in [-1, 1] that was clipped late


def read_records(path: str, skipped: dict[str, str]) -> Iterator[tuple[int, bytes]]:
    """(where the record begins, its bytes), checksums compared, up to the first damage."""
    import tensorflow as tf

    with open(path, 'rb') as f:
        if f.read(2) == b'\x1f\x8b':  # gzip's magic number
            raise DataError(
                f'{path} is compressed (gzip), so its records cannot be reached one by one; '
                'unpack it first'
            )
    offset = 0
    try:
        for raw in tf.data.TFRecordDataset(path).as_numpy_iterator():
            yield offset, raw
            # TFRecordDataset says no offsets; a TFRecord is length, its crc, data, crc without
            # padding.
            offset += HEADER + len(raw) + FOOTER
    # TensorFlow's reader stops here: what follows in this file is not reached.
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as e:
        # TensorFlow adds the name of its operation and a stack to the message.
        reason = str(e).splitlines()[0].split(' [Op')[0][:120]
        skipped[f'{path}, from byte {offset}'] = f'corrupt: {reason}'


class _LengthRatios:
    """Frames and sound of a record must last about equally long, or fps or rate is wrong."""

    def __init__(self, fps: float, rate: int):
        self._fps = fps
        self._rate = rate
        self._num_records = 0
        self._num_short = 0
        self._num_long = 0
        self._first = (0, 0)

    def add(self, frames: int, samples: int) -> None:
        """Count a record, if it has both."""
        if not frames or not samples:
            return
        if not self._num_records:
            self._first = (frames, samples)
        self._num_records += 1
        # Seconds of sound over seconds of frames.
        ratio = samples / self._rate / (frames / self._fps)
        self._num_short += ratio <= 0.8
        self._num_long += ratio >= 1.25

    def check(self) -> None:
        """DataError where most records disagree: single ones may lack the end of their sound."""
        if max(self._num_short, self._num_long) <= self._num_records / 2:
            return
        frames, samples = self._first
        raise DataError(
            f'--fps={self._fps:g} and --rate={self._rate} cannot both be right: a record has '
            f'{frames} frames ({frames / self._fps:.2f} s) and {samples} samples '
            f'({samples / self._rate:.2f} s)'
        )


class RecordParser:
    """Reads what DMVR records hold, and checks that all of them are laid out alike.

    Attributes:
      fps: of the stored frames.
      rate: of the stored samples.
      feature_names: {'frames', 'audio'} -> which of the possible features these records have.
      class_names: number of a class -> its name, as far as records name them.
      is_multi_hot: whether any record has several classes.
      short_side: of the smallest frames, in pixels; 0 before any.
    """

    def __init__(self, fps: float, rate: int):
        self.fps = fps
        self.rate = rate
        self.feature_names: dict[str, str] = {}
        self.class_names: dict[int, str] = {}
        self.is_multi_hot = False
        self.short_side = 0
        self._lengths = _LengthRatios(fps, rate)

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        """What one record holds, as `IndexWriter.add` takes it, and its classes as `labelled`.

        Args:
          raw: a serialized SequenceExample.
          where: its place in the errors.

        Raises:
          DataError: the record is no SequenceExample, or not one of DMVR's, or laid out in another
            way than those before.
        """
        import tensorflow as tf

        try:
            # Another message may parse as well, unknown fields being passed over; then the features
            # that are looked up below are missing.
            example = tf.train.SequenceExample.FromString(raw)
        except Exception as e:  # the library's own kinds
            raise DataError(
                f'{where}: this is not a SequenceExample ({type(e).__name__}); '
                'are these DMVR records?'
            ) from None
        lists = example.feature_lists.feature_list
        context = example.context.feature

        frame_features = self._feature_list(lists, 'frames', FRAMES, where)
        # Encoded pictures, JPEG as a rule, one for each frame.
        frames = [f.bytes_list.value[0] for f in frame_features if f.bytes_list.value]
        audio_features = self._feature_list(lists, 'audio', AUDIO, where)
        # Meant to be samples in [-1, 1], in one piece (record_messages refuses several).
        sound = [np.asarray(f.float_list.value, np.float32) for f in audio_features]
        num_samples = sum(len(piece) for piece in sound)
        if not frames and not num_samples:
            present = ', '.join([*lists, *context]) or 'nothing'
            raise DataError(
                f'{where} has neither {FRAMES[0]} nor {" nor ".join(AUDIO)}; it has {present}'
            )
        if num_samples:
            loudest = max(float(np.abs(piece).max(initial=0)) for piece in sound)
            if not loudest <= _LOUDEST:  # written so that it holds for NaN too
                raise DataError(
                    f'{where}: its sound is not in [-1, 1]; were integers written as floats?'
                )
        height, width = _frame_shape(frames, where)
        if frames:
            self.short_side = min(self.short_side or height, height, width)
        # One record with several classes makes the label multi-hot for all, as arrays of one shape.
        classes = sorted(set(self._labels(context, where)))
        self.is_multi_hot |= len(classes) > 1
        self._lengths.add(len(frames), num_samples)
        duration = len(frames) / self.fps if frames else num_samples / self.rate  # seconds
        captions = [caption for caption in _strings(context, 'caption/string') if caption]
        # DMVR's captions have no times: each is of the whole clip.
        sentences = [{'text': text, 'start': 0.0, 'end': duration} for text in captions]
        # A DMVR record is a clip that was cut already, so it is one segment.
        segment = {
            'start': 0.0,
            'end': duration,
            'caption': captions[0] if captions else '',
            'labels': {},
        }
        return {
            'id': _clip_id(context),
            'frames': len(frames),
            'samples': num_samples,
            'height': height,
            'width': width,
            'duration': duration,
            'ground_truth': '{}',  # JSON of what else is known of a clip: nothing here
            'labelled': classes,
            'sentences': sentences,
            'segments': [segment],
        }

    def pieces(self, raw: bytes, record: Mapping[str, Any], where: str) -> record_messages.Pieces:
        """Where the frames and the sound of a record lie in it.

        Args:
          raw: the serialized SequenceExample.
          record: as `parse` returned it.
          where: its place in the errors.

        Raises:
          DataError: they are not laid out so that they can be read one by one.
        """
        try:
            pieces = record_messages.pieces_of_sequence_example(
                raw,
                self.feature_names.get('frames', ''),
                self.feature_names.get('audio', ''),
                self.rate,
            )
        except ValueError as e:
            raise DataError(f'{where}: {e}') from None
        num_seconds = -(-record['samples'] // self.rate)  # rounded up
        found = (len(pieces.frames), len(pieces.seconds))
        if found != (record['frames'], num_seconds):
            raise DataError(
                f'{where}: expected {record["frames"]} frames of one picture each and '
                f'{num_seconds} seconds of packed samples, got {found[0]} and {found[1]}'
            )
        return pieces

    def labels(self) -> dict[str, list[str]]:
        """{label: names of its classes}: `class`, if any record has one."""
        if not self.class_names:
            return {}
        # The index in this list is the number of the class, so gaps in the numbers are filled.
        num_classes = max(self.class_names) + 1
        return {'class': [self.class_names.get(i, f'class {i}') for i in range(num_classes)]}

    def check_rates(self) -> None:
        """Check fps and rate by the records parsed so far; see `_LengthRatios`."""
        self._lengths.check()

    def _feature_list(
        self, lists: Mapping[str, Any], kind: str, possible: Sequence[str], where: str
    ) -> list[Any]:
        """The features of the first possible list that is there, the same in all records."""
        present = [name for name in possible if name in lists]
        if not present:
            return []
        # The index names one feature list for all records, by which they are read.
        known = self.feature_names.setdefault(kind, present[0])
        if known != present[0]:
            raise DataError(
                f'{where} has its {kind} in {present[0]!r}, records before in {known!r}; '
                'index them apart'
            )
        return list(lists[present[0]].feature)

    def _labels(self, context: Mapping[str, Any], where: str) -> list[int]:
        """Numbers of the record's classes; their names are added to `class_names`."""
        for prefix in LABELS:  # the first that is there
            if f'{prefix}/index' not in context:
                continue
            labels = list(context[f'{prefix}/index'].int64_list.value)
            for label, text in zip(labels, _strings(context, f'{prefix}/text')):
                known = self.class_names.setdefault(label, text)
                if known != text:
                    raise DataError(f'{where}: label {label} is {text!r} here and {known!r} before')
            for label in labels:
                self.class_names.setdefault(label, f'class {label}')
            return labels
        return []


def _strings(context: Mapping[str, Any], key: str) -> list[str]:
    if key not in context:
        return []
    return [value.decode('utf-8', 'replace') for value in context[key].bytes_list.value]


def _seconds(context: Mapping[str, Any], key: str) -> float | None:
    """A timestamp, which DMVR stores in microseconds; None if the record has none."""
    if key not in context or not context[key].int64_list.value:
        return None
    return context[key].int64_list.value[0] / 1e6


def _frame_shape(frames: Sequence[bytes], where: str) -> tuple[int, int]:
    """(height, width) of the first frame, (0, 0) without frames."""
    from PIL import Image

    if not frames:
        return 0, 0
    try:
        # PIL reads the header alone here. Frames of one record have one size.
        width, height = Image.open(io.BytesIO(frames[0])).size
    except OSError:
        raise DataError(f'{where}: its first frame is no image') from None
    return height, width


def _clip_id(context: Mapping[str, Any]) -> str:
    """File and times of the clip, '' if the record does not name its file."""
    file = ''
    for key in ('video/filename', 'clip/media_id', 'clip/data_path'):
        file = ''.join(_strings(context, key))
        if _strings(context, key):
            break  # also with an empty name: the fields behind are for records without this one
    start = _seconds(context, 'clip/start/timestamp')
    end = _seconds(context, 'clip/end/timestamp')
    if file and start is not None and end is not None:
        return f'{file}@{start:g}-{end:g}'
    return file
