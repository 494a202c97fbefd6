"""The tables of places against the libraries that wrote the files."""

import zlib

import numpy as np
import pytest
import tensorflow as tf
from test_data_dmvr import sequence_example

from data_pipelines.errors import DataError
from data_pipelines.storage import byte_offsets


def sizes(n):
    rng = np.random.default_rng(0)
    return [
        0,
        1,
        3,
        byte_offsets.BLOCK - 24 - 24 - 40 - 3,
        *(10 ** rng.uniform(0, 5.5, n)).astype(int).tolist(),
    ]


def array_record(path, records, options='group_size:1,uncompressed'):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for r in records:
        writer.write(r)
    writer.close()


@pytest.mark.parametrize('size', [0, 1, 2])
def test_a_chunk_without_its_record_is_an_error_in_a_sentence(tmp_path, size):
    """The header of a chunk of one record, and less data than the sizes in front of it take."""
    block_header = bytes(byte_offsets.HEADER)
    head = bytes(8) + size.to_bytes(8, 'little') + bytes(8) + b'r' + (1).to_bytes(7, 'little')
    (tmp_path / 'x').write_bytes(block_header + head + bytes(8) + b'\0\x80'[:size])
    with pytest.raises(DataError, match='x is damaged'):
        list(byte_offsets.array_records(tmp_path / 'x'))


def test_records_of_a_file_and_any_part_of_them(tmp_path):
    rng = np.random.default_rng(1)
    records = [rng.bytes(n) for n in sizes(40)]
    array_record(tmp_path / 'x', records)
    got = list(byte_offsets.array_records(tmp_path / 'x'))
    assert [r for _, r in got] == records
    # Three pieces of each record, the first behind the second, far ones read by calls of their own.
    tables, firsts = [], [0]
    for r in records:
        cuts = sorted(rng.integers(0, len(r) + 1, 4).tolist())
        spans = [(cuts[1], cuts[2]), (cuts[0], cuts[1]), (cuts[2], cuts[3])]
        tables.append(np.array([(a, b - a, zlib.crc32(r[a:b])) for a, b in spans], np.uint32))
        firsts.append(firsts[-1] + 3)
    byte_offsets.save(
        tmp_path, 'train', [tmp_path / 'x'], [(0, at, len(r)) for at, r in got], tables
    )
    pieces = byte_offsets.Pieces(
        tmp_path, 'train', [tmp_path / 'x'], np.array(firsts), True, 'again'
    )
    assert max(map(len, records)) > byte_offsets._APART + 1000
    for i, r in enumerate(records):
        assert pieces[i] == r
        for numbers in ([0, 1, 2], [2, 0], [1], []):
            assert pieces.read(i, numbers) == [
                r[a : a + n] for a, n, _ in tables[i][numbers].tolist()
            ]
    pieces._pieces = pieces._pieces ^ np.array([0, 0, 1], np.uint32)
    with pytest.raises(ValueError, match='crc32'):
        pieces.read(10, [1])
    with pytest.raises(DataError, match='2 records and its index.*again|has 44 records'):
        byte_offsets.Pieces(
            tmp_path, 'train', [tmp_path / 'x'], np.array(firsts[:-1]), True, 'again'
        )
    with open(tmp_path / 'x', 'ab') as f:
        f.write(b'x')
    with pytest.raises(DataError, match='is not the file of .* bytes that .*again'):
        byte_offsets.Pieces(tmp_path, 'train', [tmp_path / 'x'], np.array(firsts), True, 'again')


def test_other_files_are_refused(tmp_path):
    array_record(tmp_path / 'x', [b'a' * 1000] * 3, 'group_size:1,zstd')
    with pytest.raises(DataError, match='compressed'):
        list(byte_offsets.array_records(tmp_path / 'x'))


def test_pieces_of_messages():
    frames, pcm = [b'first', b'', b'third' * 50], np.arange(25, dtype='<i2')
    bytes_ = lambda *v: tf.train.Feature(bytes_list=tf.train.BytesList(value=v))
    example = tf.train.Example(
        features=tf.train.Features(
            feature={
                'id': bytes_(b'me'),
                'frames': bytes_(*frames),
                'audio': bytes_(pcm.tobytes()),
                'rate': tf.train.Feature(int64_list=tf.train.Int64List(value=[10])),
                'fps': tf.train.Feature(float_list=tf.train.FloatList(value=[1.5])),
            }
        )
    ).SerializeToString()
    name, table = byte_offsets.pieces_of_example(example, 10)
    want = [*frames, pcm[:10].tobytes(), pcm[10:20].tobytes(), pcm[20:].tobytes()]
    assert name == 'me' and [example[a : a + n] for a, n, _ in table.tolist()] == want
    assert [c for *_, c in table.tolist()] == list(map(zlib.crc32, want))
    sound = np.linspace(-1, 1, 25).astype('<f4')
    other = sequence_example(frames, sound)
    table = byte_offsets.pieces_of_sequence_example(
        other, 'image/encoded', 'WAVEFORM/feature/floats', 10
    )
    want = [*frames, sound[:10].tobytes(), sound[10:20].tobytes(), sound[20:].tobytes()]
    assert [other[a : a + n] for a, n, _ in table.tolist()] == want
    assert len(byte_offsets.pieces_of_sequence_example(other, 'image/encoded', '', 10)) == 3


def test_a_dataset_without_tables_gets_them_when_opened(prepared, tmp_path, monkeypatch):
    import shutil

    from data_pipelines.storage.records import Prepared, Split

    shutil.copytree(prepared[0], tmp_path / 'old')
    for name in ('places-test.npz', 'pieces-test.npy'):
        (tmp_path / 'old' / name).unlink()
    with monkeypatch.context() as m:
        m.setattr(
            byte_offsets.np, 'savez', lambda *a, **k: (_ for _ in ()).throw(OSError('read only'))
        )
        with pytest.raises(DataError, match='make the folder writable once'):
            Split(Prepared(tmp_path / 'old'), 'test')
    old, new = (Split(Prepared(p), 'test') for p in (tmp_path / 'old', prepared[0]))
    assert old.clip(3, [2, 5], [1]) == new.clip(3, [2, 5], [1])
