"""Where the frames and the sound of a serialized record lie in it.

The message is walked by hand: a protocol buffer library gives the values, but not where they lie.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

# Wire types of protocol buffers: the lowest three bits of a field's tag.
_VARINT = 0
_FIXED_64 = 1
_LENGTH_DELIMITED = 2

# (first byte, last + 1) of a part of a message.
Span = tuple[int, int]


class Pieces(NamedTuple):
    """Offset in the record, bytes and crc32 of each frame, second of sound and optical flow."""

    frames: UInt32[np.ndarray, 'frames 3']
    seconds: UInt32[np.ndarray, 'seconds 3']
    flows: UInt32[np.ndarray, 'flows 3']


def pieces_of_example(raw: bytes, rate: int) -> tuple[str, Pieces]:
    """Find the pieces of one tf.train.Example that `prepare` wrote.

    Args:
      raw: the serialized record.
      rate: samples a second.

    Returns:
      The record's id and its pieces.
    """
    message = memoryview(raw)
    values: dict[str, list[Span]] = {}
    for _, begin, end in _fields(message, 0, len(message)):  # Example.features
        for name, feature in _map_entries(message, begin, end):  # Features.feature
            if name in ('id', 'frames', 'audio', 'flow'):
                values[name] = _values(message, *feature)
    id_begin, id_end = values['id'][0]
    record_id = bytes(message[id_begin:id_end]).decode()
    # A record without sound has an empty list, or none.
    sound = values['audio'][0] if values.get('audio') else (0, 0)
    frames = values.get('frames', [])
    flows = values.get('flow', [])  # of a dataset prepared with --flow
    return record_id, _pieces(message, frames, sound, 2 * rate, flows)  # int16


def pieces_of_sequence_example(raw: bytes, frames: str, audio: str, rate: int) -> Pieces:
    """Find the pieces of one tf.train.SequenceExample of DMVR.

    Args:
      raw: the serialized record.
      frames: name of the feature list of frames, '' for none.
      audio: name of the feature list of sound, '' for none.
      rate: samples a second.

    Raises:
      ValueError: sound in several lists.
    """
    message = memoryview(raw)
    values: dict[str, list[Span]] = {}
    for number, begin, end in _fields(message, 0, len(message)):
        if number != 2:  # SequenceExample.feature_lists; 1 is the context
            continue
        for name, feature_list in _map_entries(message, begin, end):  # FeatureLists.feature_list
            if name in (frames, audio):
                spans = []
                for _, *feature in _fields(message, *feature_list):  # FeatureList.feature
                    spans.extend(_values(message, *feature))
                values[name] = spans
    sound = values.get(audio) or [(0, 0)]
    if len(sound) > 1:
        raise ValueError(f'{audio} is not one list of samples')
    return _pieces(message, values.get(frames, []), sound[0], 4 * rate)  # float32


def _map_entries(message: memoryview, begin: int, end: int) -> Iterator[tuple[str, Span]]:
    """(key, span of the value) of each entry of a message that holds one map."""
    # On the wire a map is a repeated message of two fields: the key, 1, and the value, 2.
    for _, entry_begin, entry_end in _fields(message, begin, end):
        entry = {}
        for number, field_begin, field_end in _fields(message, entry_begin, entry_end):
            entry[number] = (field_begin, field_end)
        key_begin, key_end = entry[1]
        name = bytes(message[key_begin:key_end]).decode()
        if 2 in entry:
            yield name, entry[2]


def _values(message: memoryview, begin: int, end: int) -> list[Span]:
    """Spans of the values of the tf.train.Feature from `begin` to `end`.

    Those of a bytes_list one by one. The numbers of a float_list are packed: one span holds all.
    """
    spans = []
    for _, list_begin, list_end in _fields(message, begin, end):  # Feature.bytes_list, .float_list
        for _, value_begin, value_end in _fields(message, list_begin, list_end):
            spans.append((value_begin, value_end))
    return spans


def _pieces(
    message: memoryview,
    frames: Sequence[Span],
    sound: Span,
    second: int,
    flows: Sequence[Span] = (),
) -> Pieces:
    """The pieces of a record; `second`: bytes of a second of sound."""
    sound_begin, sound_end = sound
    seconds = []
    for begin in range(sound_begin, sound_end, second):
        seconds.append((begin, min(begin + second, sound_end)))
    return Pieces(_table(message, frames), _table(message, seconds), _table(message, flows))


def _table(message: memoryview, spans: Sequence[Span]) -> UInt32[np.ndarray, 'n 3']:
    """Offset, bytes and crc32 of parts of a message."""
    table = [(begin, end - begin, zlib.crc32(message[begin:end])) for begin, end in spans]
    return np.array(table, np.uint32).reshape(-1, 3)


def _fields(message: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, last + 1) of the fields of a message that have a length.

    Fields of numbers are passed over.
    """
    while position < end:
        tag, position = read_varint(message, position)
        number = tag >> 3
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            size, position = read_varint(message, position)
            yield number, position, position + size
            position += size
        elif wire_type == _VARINT:
            _, position = read_varint(message, position)
        elif wire_type == _FIXED_64:
            position += 8
        else:  # 32 bits
            position += 4


def read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of variable length, and the position behind it.

    Seven bits a byte, the lowest first; all bytes but the last have the highest bit set.
    """
    value = 0
    shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
