"""Tables of byte offsets: what they give back, and how many bytes they take."""

import multiprocessing
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.storage import byte_offsets, columns, piece_tables, record_messages
from data_pipelines.storage.piece_tables import EXAMPLE, SEQUENCE_EXAMPLE, PiecesWriter, PieceTables
from data_pipelines.storage.record_files import LocalFiles

RATE = 10
AUDIO = 'WAVEFORM/feature/floats'
# Around the sizes at which lengths take another byte, or do not fit 16 bits.
EDGES = [0, 1, 126, 127, 128, 16380, 16383, 16384, 65534, 65535, 65536, 70000, 2**21 + 1]
FRAMES = st.lists(st.sampled_from(EDGES[:8]) | st.integers(0, 400), max_size=6)


def frames_of(sizes):
    """Frames of these sizes, each of other bytes."""
    return [bytes([i % 251]) * size for i, size in enumerate(sizes)]


def bytes_feature(values):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def example_of(frames, num_samples):
    """A record of `prepare`: (its bytes, its sound)."""
    sound = np.arange(num_samples, dtype='<i2').tobytes()
    features = {'id': bytes_feature([b'me']), 'frames': bytes_feature(frames)}
    features['audio'] = bytes_feature([sound])
    message = tf.train.Example(features=tf.train.Features(feature=features))
    return message.SerializeToString(), sound


def sequence_example_of(frames, num_samples):
    """A record of DMVR: (its bytes, its sound)."""
    message = tf.train.SequenceExample()
    lists = message.feature_lists.feature_list
    for frame in frames:
        lists['image/encoded'].feature.add().bytes_list.value[:] = [frame]
    sound = np.arange(num_samples, dtype='<f4')
    if num_samples:
        lists[AUDIO].feature.add().float_list.value[:] = sound
    return message.SerializeToString(), sound.tobytes()


def find_pieces(raw, nesting):
    if nesting == EXAMPLE:
        return record_messages.pieces_of_example(raw, RATE)[1]
    return record_messages.pieces_of_sequence_example(raw, 'image/encoded', AUDIO, RATE)


MAKERS = {EXAMPLE: (example_of, 2), SEQUENCE_EXAMPLE: (sequence_example_of, 4)}


def write_tables(folder, records, nesting, change=None):
    """Records behind one another in one file, and their table; `change` may alter frames' rows."""
    path = folder / 'records'
    path.write_bytes(b''.join(records))
    sample_bytes = MAKERS[nesting][1]
    begin = 0
    with PiecesWriter(folder, 'train', [path], sample_bytes * RATE, nesting) as writer:
        for raw in records:
            frames, seconds, _ = find_pieces(raw, nesting)
            if change is not None:
                frames = change(frames)
            writer.add(0, begin, len(raw), frames, seconds)
            begin += len(raw)
    return path


def open_tables(folder, num_frames):
    return PieceTables(folder, 'train', np.array(num_frames, np.int32), 'again')


def seconds_of(sound, sample_bytes):
    """The sound in pieces of a second."""
    size = sample_bytes * RATE
    return [sound[begin : begin + size] for begin in range(0, len(sound), size)]


def assert_reads(folder, path, nesting, contents):
    """Every frame and every second of every record, together and alone."""
    tables = open_tables(folder, [len(frames) for frames, _ in contents])
    pieces = byte_offsets.Pieces(tables, LocalFiles([path]), False, 'split', 'again')
    for i, (frames, sound) in enumerate(contents):
        seconds = seconds_of(sound, MAKERS[nesting][1])
        numbers = range(len(seconds))
        assert pieces.read(i, range(len(frames)), numbers) == [*frames, *seconds]
        for k, frame in enumerate(frames):
            assert pieces.read(i, [k], []) == [frame]
        for k, second in enumerate(seconds):
            assert pieces.read(i, [], [k]) == [second]


@pytest.mark.parametrize('nesting', [EXAMPLE, SEQUENCE_EXAMPLE])
@given(contents=st.lists(st.tuples(FRAMES, st.integers(0, 35)), max_size=4))
@example(contents=[([], 0)])
@example(contents=[(EDGES, 25), ([], 31), ([5, 6], 0), (EDGES[:9], 30)])
@example(contents=[([70000], 10)])
def test_every_piece_comes_back(tmp_path_factory, nesting, contents):
    folder = tmp_path_factory.mktemp('pieces')
    make, _ = MAKERS[nesting]
    made = [make(frames_of(sizes), samples) for sizes, samples in contents]
    path = write_tables(folder, [raw for raw, _ in made], nesting)
    expected = [(frames_of(sizes), sound) for (sizes, _), (_, sound) in zip(contents, made)]
    assert_reads(folder, path, nesting, expected)
    # All offsets followed from the lengths.
    table = columns.Table(piece_tables.folder_of(folder, 'train'), 'again')
    assert table.number('offsets') == 0
    assert table.number('high') == sum(max(sizes, default=0) > 65535 for sizes, _ in contents)


def test_other_ways_to_write_the_message_cost_more_and_are_read(tmp_path):
    """A writer may put something between the frames; then every offset is stored."""
    # A field 9 that nobody reads, in front of each feature: legal in a protocol buffer.
    unknown = b'\x4a\x03abc'
    frames = frames_of([200, 0, 3])
    inner = b''
    for frame in frames:
        value = b'\x0a' + varint(len(frame)) + frame
        feature = b'\x0a' + varint(len(value)) + value
        inner += unknown + b'\x0a' + varint(len(feature)) + feature
    entry = b'\x0a\x0dimage/encoded\x12' + varint(len(inner)) + inner
    lists = b'\x0a' + varint(len(entry)) + entry
    raw = b'\x12' + varint(len(lists)) + lists
    parsed = tf.train.SequenceExample.FromString(raw)
    stored = parsed.feature_lists.feature_list['image/encoded'].feature
    assert [feature.bytes_list.value[0] for feature in stored] == frames

    plain, sound = sequence_example_of(frames, 15)
    path = write_tables(tmp_path, [plain, raw, plain], SEQUENCE_EXAMPLE)
    contents = [(frames, sound), (frames, b''), (frames, sound)]
    assert_reads(tmp_path, path, SEQUENCE_EXAMPLE, contents)
    table = columns.Table(piece_tables.folder_of(tmp_path, 'train'), 'again')
    assert table.number('offsets') == 1


def varint(value):
    """A length as protocol buffers write it."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def test_four_bytes_a_frame_and_two_a_second(tmp_path):
    """Files grow by the budget: 4 a frame, 2 a second, 40 a record; 2 more beside a large frame."""

    def size_of(name, records):
        folder = tmp_path / name
        folder.mkdir()
        write_tables(folder, records, EXAMPLE)
        table = piece_tables.folder_of(folder, 'train')
        return sum(path.stat().st_size for path in table.glob('*.npy'))

    def record(num_frames, num_seconds, size=100):
        return example_of(frames_of([size] * num_frames), num_seconds * RATE)[0]

    empty = size_of('empty', [record(0, 0)])
    assert size_of('two', [record(0, 0)] * 2) - empty == 40
    assert size_of('frames', [record(1000, 0)]) - empty == 4000
    assert size_of('seconds', [record(0, 1000)]) - empty == 2000
    exception = 8 + 8  # the record's number, and where its rows begin
    assert size_of('large', [record(10, 0, 70000)]) - empty == 40 + 20 + exception


@pytest.mark.parametrize('change', [(0, 1), (1, 1), (2, 1), (2, 1 << 15)])
def test_a_changed_piece_is_noticed(tmp_path, change):
    """Offset, length and each of the 16 stored bits of a checksum matter."""
    column, bits = change
    frames = frames_of([300, 301, 302])
    raw, _ = example_of(frames, 0)

    def damage(rows):
        rows = rows.copy()
        rows[1, column] ^= bits
        return rows

    path = write_tables(tmp_path, [raw], EXAMPLE, damage)
    tables = open_tables(tmp_path, [3])
    pieces = byte_offsets.Pieces(tables, LocalFiles([path]), False, 'split', 'again')
    assert pieces.read(0, [0], []) == frames[:1]
    with pytest.raises(ValueError, match='crc32'):
        pieces.read(0, [1], [])


def test_damage_passes_once_in_65536_times():
    """Two bytes of a crc32 miss 1 damaged piece of 65,536; 200,000 tries expect 3."""
    rng = np.random.default_rng(0)
    content = rng.bytes(64)
    stored = zlib.crc32(content) & PieceTables.crc_mask
    passed = 0
    for _ in range(200_000):
        passed += zlib.crc32(rng.bytes(64)) & PieceTables.crc_mask == stored
    assert 0 <= passed <= 12  # beyond: less than one chance in 10,000


def test_sound_with_gaps_is_refused(tmp_path):
    (tmp_path / 'records').write_bytes(b'')
    no_frames = np.zeros((0, 3), np.uint32)
    seconds = np.array([[0, 20, 1], [21, 20, 1]], np.uint32)
    with pytest.raises(ValueError, match='sound in seconds of 20 bytes without gaps'):
        with PiecesWriter(tmp_path, 'train', [tmp_path / 'records'], 20, EXAMPLE) as writer:
            writer.add(0, 0, 50, no_frames, seconds)
    assert not list(tmp_path.glob('pieces-*'))


def test_records_of_several_files_some_empty(tmp_path):
    paths = [tmp_path / name for name in 'abcd']
    for path in paths:
        path.write_bytes(b'')
    no_rows = np.zeros((0, 3), np.uint32)
    with PiecesWriter(tmp_path, 'train', paths, 20, EXAMPLE) as writer:
        for file in (1, 1, 3):
            writer.add(file, 5, 7, no_rows, no_rows)
    tables = open_tables(tmp_path, [0, 0, 0])
    assert [tables.place(i) for i in range(3)] == [(1, 5, 7), (1, 5, 7), (3, 5, 7)]
    assert tables.file_sizes == [0, 0, 0, 0]


@pytest.mark.parametrize('read_whole', [1 << 16, 0])
@pytest.mark.parametrize('name', ['offset', 'frame_row', 'frame_crc', 'second_crc', 'high.value'])
def test_a_damaged_table_is_one_sentence(tmp_path, monkeypatch, name, read_whole):
    raw, _ = example_of(frames_of([70000, 2]), 15)
    write_tables(tmp_path, [raw, raw], EXAMPLE)
    monkeypatch.setattr(columns, 'READ_WHOLE', read_whole)
    path = piece_tables.folder_of(tmp_path, 'train') / f'{name}.npy'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f'{name}.npy cannot be read.*again'):
        open_tables(tmp_path, [2, 2])
    path.unlink()
    with pytest.raises(DataError, match=f'{name}.npy cannot be read.*again'):
        open_tables(tmp_path, [2, 2])


def test_the_table_of_another_index_is_refused(tmp_path):
    raw, _ = example_of(frames_of([1, 2]), 15)
    write_tables(tmp_path, [raw, raw], EXAMPLE)
    with pytest.raises(DataError, match='has 2 records and its index 1; again'):
        open_tables(tmp_path, [2])
    with pytest.raises(DataError, match='frame_row.npy: expected offsets from 0 to 5, got 0 to 4'):
        open_tables(tmp_path, [2, 3])


def read_in_process(folder, path, queue):
    """Read the last frame and second of each record in a process of its own."""
    columns.READ_WHOLE = 0
    pieces = byte_offsets.Pieces(
        open_tables(folder, [3, 3]), LocalFiles([path]), False, 'split', 'again'
    )
    queue.put([pieces.read(i, [2], [1]) for i in range(2)])


@pytest.mark.slow
def test_processes_map_one_table(tmp_path):
    frames = frames_of([3, 4, 70000])
    raw, sound = example_of(frames, 15)
    path = write_tables(tmp_path, [raw, raw], EXAMPLE)
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    processes = [
        context.Process(target=read_in_process, args=(tmp_path, path, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    expected = [[frames[2], sound[2 * RATE :]]] * 2
    assert [queue.get(timeout=120) for _ in processes] == [expected] * 2
    for process in processes:
        process.join()


def test_flows_come_back_beside_frames_and_sound(tmp_path):
    """Also long ones, and of a record that has none."""
    contents = [([3, 400, 5], [100, 70000, 7], 25), ([], [], 12), ([9], [130], 0)]
    records, expected = [], []
    for frame_sizes, flow_sizes, num_samples in contents:
        raw, sound = example_of(frames_of(frame_sizes), num_samples)
        message = tf.train.Example.FromString(raw)
        flows = [bytes([200 + i]) * size for i, size in enumerate(flow_sizes)]
        message.features.feature['flow'].bytes_list.value[:] = flows
        records.append(message.SerializeToString(deterministic=True))
        expected.append((frames_of(frame_sizes), seconds_of(sound, 2), flows))
    path = tmp_path / 'records'
    path.write_bytes(b''.join(records))
    begin = 0
    with PiecesWriter(tmp_path, 'train', [path], 2 * RATE, EXAMPLE, has_flow=True) as writer:
        for raw in records:
            _, pieces = record_messages.pieces_of_example(raw, RATE)
            writer.add(0, begin, len(raw), *pieces)
            begin += len(raw)
    tables = open_tables(tmp_path, [3, 0, 1])
    pieces = byte_offsets.Pieces(tables, LocalFiles([path]), False, 'split', 'again')
    for i, (frames, seconds, flows) in enumerate(expected):
        numbers = range(len(flows))
        assert pieces.read(i, numbers, range(len(seconds)), numbers) == [
            *frames,
            *seconds,
            *flows,
        ]
        for k in numbers:
            assert pieces.read(i, [], [], [k]) == [flows[k]]


def test_tables_without_flow_are_asked_for_it(tmp_path):
    raw, _ = example_of(frames_of([3]), 0)
    path = write_tables(tmp_path, [raw], EXAMPLE)
    pieces = byte_offsets.Pieces(
        open_tables(tmp_path, [1]), LocalFiles([path]), False, 'split', 'again'
    )
    with pytest.raises(ValueError, match='nothing of optical flow'):
        pieces.read(0, [], [], [0])
