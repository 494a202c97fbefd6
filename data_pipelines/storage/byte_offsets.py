"""Where every frame and every second of sound of a record lies in its file: a clip reads its own bytes and no others, however long the video is.

A piece is one frame (JPEG or one H.264 packet) or one second of sound; `pieces-SPLIT.npy` (uint32 [pieces 3]: offset in the record, bytes,
crc32; memory-mapped) lists them record by record, frames first, and `places-SPLIT.npz` says where each record begins. Both are written when the
records are. Records are protocol buffers whose bytes lie in one run in their file: TFRecord files, and ArrayRecord files as `prepare` writes
them (uncompressed, one record a chunk), of which only the block headers that the format puts every 64 KiB have to be left out.
"""

from __future__ import annotations

import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.errors import DataError

BLOCK, HEADER = (
    1 << 16,
    24,
)  # of ArrayRecord (Riegeli) files: every BLOCK bytes begin with a header, which belongs to no record
_CHUNK = 40  # bytes of a chunk's header there
_APART = 1 << 17  # wanted pieces farther apart than this are read by calls of their own


class Pieces:
    """Random access to the pieces of one split's records. Safe from several threads.

    paths: the files of the records; firsts int64 [M + 1]: first piece of each record; blocks: ArrayRecord, else TFRecord files. Raises DataError,
    which ends with `again`, for files and tables that are missing, damaged or not those that were written together.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        split: str,
        paths: Sequence[str],
        firsts: np.ndarray,
        blocks: bool,
        again: str,
    ):
        try:
            with np.load(folder / f'places-{split}.npz') as f:
                self._shard, self._offset, self._length, sizes = (
                    f['shard'],
                    f['offset'],
                    f['length'],
                    f['bytes'].tolist(),
                )
            self._pieces = np.load(folder / f'pieces-{split}.npy', mmap_mode='r')
        except (OSError, ValueError, KeyError, EOFError) as e:
            raise DataError(
                f'the tables places-{split}.npz and pieces-{split}.npy of {folder} cannot be read ({e}); {again}'
            ) from None
        if len(paths) != len(sizes):
            raise DataError(
                f'{folder} has {len(paths)} files of split {split!r}, and had {len(sizes)} when it was made; {again}'
            )
        for path, size in zip(paths, sizes):
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise DataError(
                    f'{path} is not the file of {size} bytes that {folder} was made for; {again}'
                )
        if len(self._offset) != len(firsts) - 1 or self._pieces.shape != (firsts[-1], 3):
            raise DataError(
                f'{folder}: split {split!r} has {len(self._offset)} records and its index {len(firsts) - 1}; {again}'
            )
        self._paths, self._firsts, self._blocks = list(paths), firsts, blocks

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, i: int) -> bytes:
        """A whole record, unchecked."""
        with open(self._paths[self._shard[i]], 'rb', buffering=0) as f:
            return bytes(self._bytes(f.fileno(), int(self._offset[i]), int(self._length[i])))

    def read(self, i: int, numbers: Sequence[int]) -> list[bytes]:
        """Pieces `numbers` of record i. Raises ValueError if one is not what was written."""
        table = np.asarray(self._pieces[self._firsts[i] : self._firsts[i + 1]])[numbers].tolist()
        order = sorted(
            range(len(table)), key=table.__getitem__
        )  # sound may lie before or behind the frames
        begin, out = int(self._offset[i]), [b''] * len(table)
        with open(self._paths[self._shard[i]], 'rb', buffering=0) as f:
            while order:
                end, last = 0, 0  # of a run of pieces that are read together
                while last < len(order) and (not last or table[order[last]][0] - end <= _APART):
                    end = sum(table[order[last]][:2])
                    last += 1
                run, order = order[:last], order[last:]
                start = table[run[0]][0]
                data = self._bytes(f.fileno(), begin + start, end - start)
                for k in run:
                    offset, size, crc = table[k]
                    out[k] = bytes(data[offset - start : offset - start + size])
                    if zlib.crc32(out[k]) != crc:
                        raise ValueError('its bytes are not those that were written (crc32)')
        return out

    def _bytes(self, file: int, offset: int, size: int) -> memoryview:
        if not self._blocks:
            return memoryview(os.pread(file, size, offset))
        begin, end = (
            _physical(offset),
            _physical(offset + size - 1) + 1 if size else _physical(offset),
        )
        data = memoryview(os.pread(file, end - begin, begin))
        return _without_headers(data, begin)


def _physical(logical: int) -> int:
    """Place in the file of a byte that `logical` bytes other than block headers come before."""
    return logical + HEADER * (logical // (BLOCK - HEADER) + 1)


def _without_headers(data: memoryview, begin: int) -> memoryview:
    """What lies from place `begin` of a file on, block headers left out; neither end lies in one."""
    cuts = range(-begin % BLOCK, len(data), BLOCK)
    if not len(cuts):
        return data
    edges = [0, *(e for cut in cuts for e in (cut, cut + HEADER)), len(data)]
    return memoryview(b''.join(data[a:b] for a, b in zip(edges[::2], edges[1::2])))


def array_records(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(bytes before it that are no block headers, the record) of an ArrayRecord file that `prepare` wrote. Raises DataError for another kind."""
    size = os.path.getsize(path)
    whole = size - HEADER * -(-size // BLOCK)
    with open(path, 'rb', buffering=0) as f:

        def at(logical: int, count: int) -> memoryview:
            begin = _physical(logical)
            return _without_headers(
                memoryview(os.pread(f.fileno(), _physical(logical + count - 1) + 1 - begin, begin)),
                begin,
            )

        here = 0
        while here + _CHUNK <= whole:
            head = at(here, _CHUNK)
            length, kind, count = (
                int.from_bytes(head[8:16], 'little'),
                head[24:25],
                int.from_bytes(head[25:32], 'little'),
            )
            here += _CHUNK
            if kind == b'r' and count == 1:
                data = at(here, length)
                sizes, start = _varint(data, 1)
                size, _ = _varint(data, start)
                if data[0] or start + sizes + size != length:
                    raise DataError(
                        f'{path} holds compressed records; prepare the data again with --overwrite'
                    )
                yield here + start + sizes, bytes(data[start + sizes :])
            elif kind == b'r':
                return  # the table of contents, behind the records
            here += length


def save(
    folder: pathlib.Path,
    split: str,
    paths: Sequence[str],
    rows: Sequence[tuple[int, int, int]],
    pieces: Sequence[np.ndarray],
) -> None:
    """rows: (number of the file, offset, bytes) of each record; pieces: uint32 [pieces 3] of each. The tables appear whole or not at all."""
    shard, offset, length = np.array(rows, np.int64).reshape(-1, 3).T
    for name, write in (
        (
            f'pieces-{split}.npy',
            lambda f: np.save(f, np.concatenate([np.zeros((0, 3), np.uint32), *pieces])),
        ),
        (
            f'places-{split}.npz',
            lambda f: np.savez(
                f,
                shard=shard.astype(np.int32),
                offset=offset,
                length=length,
                bytes=[os.path.getsize(p) for p in paths],
            ),
        ),
    ):
        temporary = folder / f'{name}.{os.getpid()}'
        with open(temporary, 'wb') as f:
            write(f)
        os.replace(temporary, folder / name)


def firsts(frames: np.ndarray, samples: np.ndarray, rate: int) -> np.ndarray:
    """int64 [M + 1]: first piece of each record, from its frames [M] and samples [M]."""
    return np.concatenate([[0], np.cumsum(frames.astype(np.int64) + -(-samples // rate))]).astype(
        np.int64
    )


def of_example(raw: bytes, rate: int) -> tuple[str, np.ndarray]:
    """(id, pieces) of one tf.train.Example that `prepare` wrote."""
    raw, values = memoryview(raw), {}
    for _, a, b in _fields(raw, 0, len(raw)):  # Example.features
        for _, c, d in _fields(raw, a, b):  # Features.feature, a map
            entry = {n: (e, f) for n, e, f in _fields(raw, c, d)}
            name = bytes(raw[slice(*entry[1])]).decode()
            if name in ('id', 'frames', 'audio') and 2 in entry:
                values[name] = [
                    v for _, e, f in _fields(raw, *entry[2]) for _, *v in _fields(raw, e, f)
                ]
    sound = values['audio'][0] if values.get('audio') else (0, 0)
    return bytes(raw[slice(*values['id'][0])]).decode(), _pieces(
        raw, values.get('frames', []), sound, 2 * rate
    )


def of_sequence_example(raw: bytes, frames: str, audio: str, rate: int) -> np.ndarray:
    """Pieces of one tf.train.SequenceExample of DMVR. frames, audio: names of the feature lists. Raises ValueError for sound in several lists."""
    raw, values = memoryview(raw), {}
    for number, a, b in _fields(raw, 0, len(raw)):
        if number != 2:  # SequenceExample.feature_lists
            continue
        for _, c, d in _fields(raw, a, b):  # FeatureLists.feature_list, a map
            entry = {n: (e, f) for n, e, f in _fields(raw, c, d)}
            name = bytes(raw[slice(*entry[1])]).decode()
            if (
                name in (frames, audio) and 2 in entry
            ):  # FeatureList.feature → Feature.bytes_list or .float_list → value
                values[name] = [
                    v
                    for _, e, f in _fields(raw, *entry[2])
                    for _, g, h in _fields(raw, e, f)
                    for _, *v in _fields(raw, g, h)
                ]
    sound = values.get(audio) or [(0, 0)]
    if len(sound) > 1:
        raise ValueError(f'{audio} is not one list of samples')
    return _pieces(raw, values.get(frames, []), sound[0], 4 * rate)


def _pieces(
    raw: memoryview, frames: Sequence[Sequence[int]], sound: Sequence[int], second: int
) -> np.ndarray:
    spans = [*frames, *((a, min(a + second, sound[1])) for a in range(*sound, second))]
    return np.array([(a, b - a, zlib.crc32(raw[a:b])) for a, b in spans], np.uint32).reshape(-1, 3)


def _fields(raw: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, last + 1) of every field of a message that has a length; others are passed over."""
    while at < end:
        tag, at = _varint(raw, at)
        if tag & 7 == 2:
            size, at = _varint(raw, at)
            yield tag >> 3, at, at + size
            at += size
        else:
            at = _varint(raw, at)[1] if tag & 7 == 0 else at + (8 if tag & 7 == 1 else 4)


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
