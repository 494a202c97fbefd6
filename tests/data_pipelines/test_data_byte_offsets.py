"""The tables of byte offsets against the libraries that wrote the files."""

import zlib

import numpy as np
import pytest
import tensorflow as tf
from test_data_dmvr import sequence_example

from data_pipelines.errors import DataError
from data_pipelines.storage import array_record_files, byte_offsets, record_files, record_messages
from data_pipelines.storage.piece_tables import EXAMPLE, PiecesWriter, PieceTables


def record_sizes(count):
    """Sizes around the edges of a block, and `count` others from 1 to 300 kB."""
    edges = [0, 1, 3, array_record_files.BLOCK - 24 - 24 - 40 - 3]
    exponents = np.random.default_rng(0).uniform(0, 5.5, count)
    return [*edges, *(10**exponents).astype(int).tolist()]


def write_array_record(path, records, options='group_size:1,uncompressed'):
    """A file of these records by the library."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def pieces_of(record, rng):
    """uint32 [3 3] of (offset, size, crc32): three frames of a record, the first behind the second.

    A few bytes before them and behind them belong to none.
    """
    cuts = sorted(rng.integers(0, len(record) + 1, 4).tolist())
    spans = [(cuts[1], cuts[2]), (cuts[0], cuts[1]), (cuts[2], cuts[3])]
    rows = [(begin, end - begin, zlib.crc32(record[begin:end])) for begin, end in spans]
    return np.array(rows, np.uint32)


def cut_out(record, table):
    """The pieces of a record that the rows of a table describe."""
    return [record[offset : offset + size] for offset, size, _ in table.tolist()]


@pytest.mark.parametrize('size', [0, 1, 2])
def test_a_chunk_without_its_record_is_an_error_in_a_sentence(tmp_path, size):
    """The header of a chunk of one record, and less data than the sizes in front of it take."""
    block_header = bytes(array_record_files.HEADER)
    head = bytes(8) + size.to_bytes(8, 'little') + bytes(8) + b'r' + (1).to_bytes(7, 'little')
    (tmp_path / 'x').write_bytes(block_header + head + bytes(8) + b'\0\x80'[:size])
    with pytest.raises(DataError, match='x is damaged'):
        list(array_record_files.array_records(tmp_path / 'x'))


def test_records_of_a_file_and_any_part_of_them(tmp_path):
    path = tmp_path / 'x'
    rng = np.random.default_rng(1)
    records = [rng.bytes(size) for size in record_sizes(40)]
    write_array_record(path, records)
    found = list(array_record_files.array_records(path))
    assert [record for _, record in found] == records

    tables = [pieces_of(record, rng) for record in records]
    no_seconds = np.zeros((0, 3), np.uint32)
    with PiecesWriter(tmp_path, 'train', [path], 100, EXAMPLE) as writer:
        for (offset, record), table in zip(found, tables):
            writer.add(0, offset, len(record), table, no_seconds)
    num_frames = np.full(len(records), 3)
    opened = PieceTables(tmp_path, 'train', num_frames, 'again')
    pieces = byte_offsets.Pieces(opened, record_files.LocalFiles([path]), True, 'split', 'again')
    # Far pieces are read by calls of their own.
    assert max(len(record) for record in records) > record_files.LocalFiles.apart + 1000
    for i, record in enumerate(records):
        assert pieces[i] == record
        for numbers in ([0, 1, 2], [2, 0], [1], []):
            assert pieces.read(i, numbers, []) == cut_out(record, tables[i][numbers])

    opened._frames._crc = opened._frames._crc ^ np.uint16(1)
    with pytest.raises(ValueError, match='crc32'):
        pieces.read(10, [1], [])
    with pytest.raises(DataError, match='has 44 records and its index 43; again'):
        PieceTables(tmp_path, 'train', num_frames[:-1], 'again')
    with open(path, 'ab') as file:
        file.write(b'x')
    with pytest.raises(DataError, match='is not the file of .* bytes that .*again'):
        byte_offsets.Pieces(opened, record_files.LocalFiles([path]), True, 'split', 'again')


def test_compressed_files_are_refused(tmp_path):
    write_array_record(tmp_path / 'x', [b'a' * 1000] * 3, 'group_size:1,zstd')
    with pytest.raises(DataError, match='compressed'):
        list(array_record_files.array_records(tmp_path / 'x'))


def bytes_feature(*values):
    """A feature of an Example that holds these bytes."""
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def test_pieces_of_an_example():
    frames = [b'first', b'', b'third' * 50]
    pcm = np.arange(25, dtype='<i2')
    features = {
        'id': bytes_feature(b'me'),
        'frames': bytes_feature(*frames),
        'audio': bytes_feature(pcm.tobytes()),
        'rate': tf.train.Feature(int64_list=tf.train.Int64List(value=[10])),
        'fps': tf.train.Feature(float_list=tf.train.FloatList(value=[1.5])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    name, pieces = record_messages.pieces_of_example(example, 10)
    seconds = [pcm[:10].tobytes(), pcm[10:20].tobytes(), pcm[20:].tobytes()]
    assert name == 'me'
    assert cut_out(example, pieces.frames) == frames
    assert cut_out(example, pieces.seconds) == seconds
    assert pieces.frames[:, 2].tolist() == [zlib.crc32(piece) for piece in frames]
    assert pieces.seconds[:, 2].tolist() == [zlib.crc32(piece) for piece in seconds]


def test_pieces_of_a_sequence_example():
    frames = [b'first', b'', b'third' * 50]
    audio = np.linspace(-1, 1, 25).astype('<f4')
    example = sequence_example(frames, audio)
    pieces = record_messages.pieces_of_sequence_example(
        example, 'image/encoded', 'WAVEFORM/feature/floats', 10
    )
    assert cut_out(example, pieces.frames) == frames
    seconds = [audio[:10].tobytes(), audio[10:20].tobytes(), audio[20:].tobytes()]
    assert cut_out(example, pieces.seconds) == seconds
    frames_alone = record_messages.pieces_of_sequence_example(example, 'image/encoded', '', 10)
    assert len(frames_alone.frames) == 3
    assert not len(frames_alone.seconds)
