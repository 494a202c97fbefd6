"""The index of a split: written record by record, mapped when read."""

import errno
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.storage import columns
from data_pipelines.storage.columns import ColumnWriter, Strings, TableWriter
from data_pipelines.storage.index_writer import IndexWriter
from data_pipelines.storage.record_index import Index

# Surrogates alone have no UTF-8; `test_lone_surrogates_are_replaced` has one.
TEXTS = st.lists(st.text(st.characters(exclude_categories=('Cs',)), max_size=5), max_size=8)


def make_record(number, num_sentences, num_segments):
    """What `prepare` knows of a record: every third has no pictures, every fourth no sound."""
    sentences = [
        {'start': 0.1 * k, 'end': 0.1 * k + 0.05, 'text': f'sentence {k} of {number} ☃'}
        for k in range(num_sentences)
    ]
    segments = [
        {
            'start': 0.1 * k,
            'end': 0.1 * k + 0.05,
            'caption': f'sentence {k} of {number} ☃' if k % 2 else '',
            'labels': {'class': k - 1, 'a/b': [k % 2, 1, 0]},
        }
        for k in range(num_segments)
    ]
    return {
        'id': f'v/{number}.mp4',
        'frames': number * 7 % 40 if number % 3 else 0,
        'samples': 3 * 10**9 + number if number % 4 else 0,
        'height': 32 + number,
        'width': 48,
        'duration': 1.5 * number,
        'ground_truth': json.dumps({'number': number}),
        'sentences': sentences,
        'segments': segments,
        'folds': [number % 3, -1],
    }


COUNTS = [(0, 1), (3, 2), (0, 0), (5, 4), (1, 0), (2, 3)]  # sentences and segments of each record
RECORDS = [make_record(number, *counts) for number, counts in enumerate(COUNTS)]
CHECKSUMS = [0, 2**32 - 1, 7, 8, 9, 10]
MULTI_HOT = {'class': None, 'a/b': 3}


def write_index(folder, records, checksums=CHECKSUMS, multi_hot=MULTI_HOT):
    """The index of these records, opened."""
    with IndexWriter(folder, multi_hot) as writer:
        for record, crc in zip(records, checksums):
            writer.add(record, crc)
    return Index.open(folder)


@pytest.fixture
def index(tmp_path):
    return write_index(tmp_path / 'index-train', RECORDS)


def entries(records, kind):
    """All sentences or segments of some records."""
    return [entry for record in records for entry in record[kind]]


def assert_holds(index, records, checksums):
    """Every field of an index says what the records do."""
    assert list(index.id) == [record['id'] for record in records]
    assert list(index.ground_truth) == [record['ground_truth'] for record in records]
    np.testing.assert_array_equal(index.crc, np.array(checksums, np.uint32))
    for name in ('frames', 'samples', 'height', 'width', 'duration', 'folds'):
        np.testing.assert_array_equal(getattr(index, name), [record[name] for record in records])
    for kind, offset in (
        ('sentences', index.sentence_offset),
        ('segments', index.segment_offset),
    ):
        counts = [len(record[kind]) for record in records]
        np.testing.assert_array_equal(np.diff(offset), counts)
    sentences, segments = entries(records, 'sentences'), entries(records, 'segments')
    assert list(index.sentence_text) == [sentence['text'] for sentence in sentences]
    assert list(index.segment_caption) == [segment['caption'] for segment in segments]
    for time in ('start', 'end'):
        expected = np.array([sentence[time] for sentence in sentences], np.float32)
        np.testing.assert_array_equal(getattr(index, f'sentence_{time}'), expected)
        expected = np.array([segment[time] for segment in segments], np.float32)
        np.testing.assert_array_equal(getattr(index, f'segment_{time}'), expected)
    owners = [i for i, record in enumerate(records) for _ in record['segments']]
    np.testing.assert_array_equal(index.segment_record, owners)
    for name, values in index.labels.items():
        np.testing.assert_array_equal(values, [segment['labels'][name] for segment in segments])


def test_every_field_comes_back(index):
    assert_holds(index, RECORDS, CHECKSUMS)
    assert index.labels['class'].dtype == np.int32
    assert index.labels['a/b'].dtype == np.uint8
    assert index.max_captions == 1


def test_some_records_alone(index):
    rows = np.array([3, 0, 5])
    part = index.take(rows)
    chosen = [RECORDS[i] for i in rows]
    assert_holds(part, chosen, [CHECKSUMS[i] for i in rows])
    assert list(index.take(np.zeros(0, np.int64)).id) == []


def test_a_split_without_records(tmp_path):
    empty = write_index(tmp_path / 'index-train', [])
    assert len(empty) == 0
    assert empty.labels['a/b'].shape == (0, 3)
    assert list(empty.sentence_text) == []
    assert empty.max_captions == 0


def test_large_columns_are_mapped_and_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, 'READ_WHOLE', 0)
    index = write_index(tmp_path / 'index-train', RECORDS)
    assert_holds(index, RECORDS, CHECKSUMS)
    for array in (index.crc, index.sentence_text.data, index.labels['class'], index.folds):
        assert isinstance(array.base, np.memmap)
        with pytest.raises(ValueError, match='read-only'):
            array[0] = 0


def test_a_label_may_be_added_when_all_records_are(tmp_path):
    records = [{**record, 'segments': record['segments'][:1]} for record in RECORDS]
    with IndexWriter(tmp_path / 'index-train', {}) as writer:
        for record in records:
            writer.add(record, 0)
        blocks = [np.array([[0, 1]]), np.array([[1, 0], [1, 1], [0, 0]])]
        writer.add_label('late', 2, blocks)
    index = Index.open(tmp_path / 'index-train')
    np.testing.assert_array_equal(index.labels['late'], np.concatenate(blocks))


def test_an_index_that_is_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match='the disk is full'):
        with IndexWriter(tmp_path / 'index-train', MULTI_HOT) as writer:
            writer.add(RECORDS[1], 1)
            raise OSError('the disk is full')
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    def fail(self):
        raise OSError('the disk is full')

    writer = IndexWriter(tmp_path / 'index-train', MULTI_HOT)
    monkeypatch.setattr(ColumnWriter, 'close', fail)
    with pytest.raises(OSError, match='the disk is full'):
        with writer:
            writer.add(RECORDS[1], 1)
    assert list(tmp_path.iterdir()) == []


def test_too_many_open_files_are_no_damage(index, tmp_path, monkeypatch):
    def fail(*arguments, **fields):
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(columns.np, 'load', fail)
    with pytest.raises(DataError, match='too many open files; raise the limit') as error:
        Index.open(tmp_path / 'index-train')
    assert 'prepare' not in str(error.value)


def test_the_limit_of_open_files_is_raised_where_it_may_be(index, tmp_path, monkeypatch):
    resource = pytest.importorskip('resource')
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(pathlib.Path('/proc/self/fd').iterdir()))
    monkeypatch.setattr(columns, 'READ_WHOLE', 0)  # every column is mapped, and stays open
    if hard not in (-1, resource.RLIM_INFINITY) and hard < num_open + 64:
        pytest.skip('the system allows no more open files')
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 4, hard))
    try:
        opened = Index.open(tmp_path / 'index-train')
        assert list(opened.id) == [record['id'] for record in RECORDS]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_killed_writer_leaves_no_index(tmp_path):
    writer = IndexWriter(tmp_path / 'index-train', MULTI_HOT)
    writer.add(RECORDS[1], 1)
    with pytest.raises(DataError, match='table.json cannot be read.*again'):
        Index.open(tmp_path / 'index-train')
    writer.discard()


def test_of_two_writers_the_first_stays(tmp_path):
    late = TableWriter(tmp_path / 'table')
    late.about = {'writer': 'late'}
    late.path = late.path.rename(tmp_path / 'table.tmp-other')
    with TableWriter(tmp_path / 'table') as first:
        first.about = {'writer': 'first'}
        first.finish()
        first.publish()
    late.finish()
    late.publish()
    assert json.loads((tmp_path / 'table' / 'table.json').read_text())['writer'] == 'first'
    assert not late.path.exists()


# ---- Damage.


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def make_shorter(path):
    np.save(path, np.load(path)[:-1])


def change_dtype(path):
    np.save(path, np.load(path).astype(np.int16))


@pytest.mark.parametrize('read_whole', [1 << 16, 0])
@pytest.mark.parametrize('damage', [cut_short, make_shorter, change_dtype, 'missing', flip_a_bit])
@pytest.mark.parametrize('name', ['frames', 'sentence_text.data', 'segment_offset', 'label.1'])
def test_a_damaged_column_is_one_sentence(tmp_path, monkeypatch, name, damage, read_whole):
    write_index(tmp_path / 'index-train', RECORDS)
    path = tmp_path / 'index-train' / f'{name}.npy'
    if damage == 'missing':
        path.unlink()
    else:
        damage(path)
    monkeypatch.setattr(columns, 'READ_WHOLE', read_whole)
    if damage == flip_a_bit and not read_whole and name != 'segment_offset':
        # Only the lengths of large columns are looked at.
        Index.open(tmp_path / 'index-train')
        return
    with pytest.raises(DataError, match=f'{name}.npy.*prepare the data again') as error:
        Index.open(tmp_path / 'index-train')
    assert '\n' not in str(error.value)


def test_a_column_of_pickles_runs_no_code(tmp_path):
    write_index(tmp_path / 'index-train', RECORDS)
    np.save(tmp_path / 'index-train' / 'frames.npy', np.array([print] * 6), allow_pickle=True)
    with pytest.raises(DataError, match='frames.npy cannot be read'):
        Index.open(tmp_path / 'index-train')


@pytest.mark.parametrize(
    'text',
    [
        '',
        '[]',
        '{}',
        '{"columns": {}, "records": -1}',
        '{"columns": {}, "records": "6"}',
        'no labels',
    ],
)
def test_a_damaged_description_is_one_sentence(tmp_path, index, text):
    if text == 'no labels':
        about = json.loads((tmp_path / 'index-train' / 'table.json').read_text())
        text = json.dumps({**about, 'labels': None})
    folder = tmp_path / 'other'
    shutil.copytree(tmp_path / 'index-train', folder)
    (folder / 'table.json').write_text(text)
    with pytest.raises(DataError, match='table.json.*prepare the data again'):
        Index.open(folder)


# ---- Strings and columns.


@given(TEXTS, st.data())
def test_strings_are_a_sequence_of_their_texts(texts, data):
    strings = Strings.from_texts(texts)
    assert list(strings) == texts
    assert len(strings) == len(texts)
    assert strings[1:-1] == texts[1:-1]
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=5)) if texts else []
    assert list(strings.take(np.array(rows, np.int64))) == [texts[row] for row in rows]


@given(st.lists(TEXTS, max_size=4))
def test_strings_written_in_parts_are_those_written_at_once(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp('strings') / 'table'
    texts = [text for part in parts for text in part]
    with TableWriter(folder) as table:
        writer = table.strings('text')
        for part in parts:
            writer.extend(part)
        table.finish()
        table.publish()
    opened = columns.Table(folder, 'again').strings('text', len(texts))
    expected = Strings.from_texts(texts)
    np.testing.assert_array_equal(opened.data, expected.data)
    np.testing.assert_array_equal(opened.offsets, expected.offsets)


def test_strings_count_from_the_end_and_end(index):
    assert index.id[-1] == RECORDS[-1]['id']
    with pytest.raises(IndexError):
        index.id[len(RECORDS)]


def test_lone_surrogates_are_replaced():
    assert list(Strings.from_texts(['a\udce9b'])) == ['a?b']


def test_a_column_in_parts_is_a_plain_npy_file(tmp_path):
    blocks = [np.arange(6).reshape(3, 2), np.zeros((0, 2)), np.full((2, 2), 9)]
    column = ColumnWriter(tmp_path / 'x.npy', np.int16, 2)
    for block in blocks:
        column.extend(block)
    column.close()
    np.save(tmp_path / 'y.npy', np.concatenate(blocks).astype(np.int16))
    np.testing.assert_array_equal(np.load(tmp_path / 'x.npy'), np.load(tmp_path / 'y.npy'))
    assert np.load(tmp_path / 'x.npy').dtype == np.int16


# ---- Captions.


def captioned(sentences, segments):
    """A record with (start, end, text) of sentences and of segments."""
    record = make_record(1, 0, 0)
    record['sentences'] = [{'start': s, 'end': e, 'text': t} for s, e, t in sentences]
    record['segments'] = [
        {'start': s, 'end': e, 'caption': t, 'labels': {}} for s, e, t in segments
    ]
    return record


SPANS = st.tuples(
    st.sampled_from([0.0, 0.1]), st.sampled_from([1.0, 0.3]), st.text('ab', max_size=2)
)


@given(st.lists(st.tuples(st.lists(SPANS, max_size=6), st.lists(SPANS, max_size=4)), max_size=4))
def test_max_captions_is_the_most_of_any_segment(tmp_path_factory, contents):
    records = [captioned(*content) for content in contents]
    folder = tmp_path_factory.mktemp('captions') / 'index'
    index = write_index(folder, records, [0] * len(records), {})
    counts = [len(index.captions_of(segment)) for segment in range(len(index.segment_record))]
    assert index.max_captions == max(counts, default=0)


def test_max_captions_over_several_runs_of_pairs(tmp_path, monkeypatch):
    from data_pipelines.storage import segment_captions

    whole = (0.0, 2.0, 'same')
    records = [captioned([whole] * k, [whole]) for k in (1, 7, 3)]
    index = write_index(tmp_path / 'index', records, [0] * 3, {})
    assert index.max_captions == 7
    assert index.take(np.array([0, 2])).max_captions == 3
    index.known_max_captions = None
    del index.max_captions
    monkeypatch.setattr(segment_captions, '_PAIRS', 4)
    monkeypatch.setattr(segment_captions, '_SEGMENTS', 2)
    assert index.max_captions == 7
