"""What preparation keeps on disk behaves as the lists and dicts of memory do, at any length."""

import collections
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.preparation import json_files, text_files
from data_pipelines.preparation import store as store_module
from data_pipelines.preparation.decoded_files import File
from data_pipelines.preparation.file_list import FileList, Selection
from data_pipelines.preparation.store import Store, StoredDict, StoredLists
from vatt_jax.inputs import tokenizer
from vatt_jax.inputs.word_counts import WordCounts

# Times say nothing on a busy machine; fixtures may serve all examples of a test.
property_test = hypothesis.settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)

NAMES = st.sampled_from(['a', 'b/c.mp4', 'Å☃', 'half \ud83d', ''])
# None: nothing is added, but the list is looked at.
ENTRIES = st.lists(st.tuples(NAMES, st.none() | st.lists(st.integers(), max_size=3)), max_size=12)


# ---- dicts and lists


@property_test
@hypothesis.given(ENTRIES)
def test_stored_lists_are_a_dict_of_lists(steps):
    expected: dict[str, list[int]] = {}
    stored = StoredLists(Store())
    for name, entries in steps:
        if entries is None:
            assert stored.get(name) == expected.get(name)
        else:
            expected.setdefault(name, []).extend(entries)
            stored.extend(name, entries)
    assert list(stored.items()) == list(expected.items())
    assert len(stored) == len(expected)
    assert 'missing' not in stored


def test_a_list_is_longer_than_what_is_collected_at_once():
    stored = StoredLists(Store())
    for number in range(2500):
        stored.extend('long', [number])
    assert stored['long'] == list(range(2500))


@property_test
@hypothesis.given(st.lists(st.tuples(NAMES, st.integers() | st.floats(allow_nan=False))))
def test_a_stored_dict_is_a_dict(pairs):
    expected = dict(pairs)
    stored = StoredDict(Store())
    for name, value in pairs:
        stored[name] = value
    assert list(stored.items()) == list(expected.items())
    assert list(stored.in_order()) == sorted(expected)
    for name in expected:
        del stored[name]
    assert not stored
    with pytest.raises(KeyError):
        del stored['a']


def test_values_come_back_as_json_has_them():
    stored = StoredDict(Store())
    stored['a'] = {'end': float('inf'), 'split': ('train', ''), 'text': '\ud83d ☃'}
    assert stored['a'] == {'end': float('inf'), 'split': ['train', ''], 'text': '\ud83d ☃'}


def test_a_store_leaves_nothing_behind(tmp_path, monkeypatch):
    # Little is held in memory: the file is written, and read again.
    monkeypatch.setattr(store_module, '_CACHE_KIB', 10)
    store = Store(tmp_path)
    stored = StoredDict(store)
    for number in range(500):
        stored[f'name {number}'] = 'x' * 1000
    assert all(value == 'x' * 1000 for value in stored.values())
    # Nor while it is open: the process may be killed.
    assert not list(tmp_path.iterdir())
    store.close()


# ---- files


def files_of(*names):
    stored = FileList(Store())
    for number, name in enumerate(names):
        stored.append(File(name, f'/videos/{name}', number, 7 * number, (0.5 * number, np.inf)))
    return stored


def test_a_file_list_is_a_sequence():
    # A path with a byte that is no UTF-8.
    names = ['b.mp4', 'a/x.wav', 'a/x.mp4', 'c\udce9.mp4']
    files = files_of(*names)
    assert [file.id for file in files] == list(files.ids()) == names
    assert len(files) == 4
    assert files[2] == File('a/x.mp4', '/videos/a/x.mp4', 2, 14, (1.0, float('inf')))
    assert files[-1].path == '/videos/c\udce9.mp4'
    assert files[1:3] == [files[1], files[2]]
    with pytest.raises(IndexError):
        files[4]
    assert files.by_id('a/x.wav') == files[1]
    with pytest.raises(KeyError):
        files.by_id('x.wav')


def test_files_of_one_name():
    files = files_of('a/x.wav', 'a/x.mp4', 'x.mp4')
    assert files.ids_called('a/x') == ['a/x.wav', 'a/x.mp4']
    assert files.ids_called('a/x.mp4') == ['a/x.mp4']
    assert files.ids_called('x.wav') == []


def test_a_selection_is_a_sequence():
    files = files_of('a', 'b', 'c', 'd')
    selection = Selection(files, np.array([1, 3]))
    assert [file.id for file in selection] == ['b', 'd']
    assert selection[-1].id == 'd'
    assert len(selection) == 2
    # Of a selection, too.
    assert [file.id for file in Selection(selection, np.array([1]))] == ['d']


# ---- JSON

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=25,
)


@pytest.fixture
def member_by_member(monkeypatch):
    """Every JSON file is taken for one that is too large to be decoded at once."""
    monkeypatch.setattr(json_files, '_AT_ONCE', 1)
    monkeypatch.setattr(json_files, '_CHUNK', 5)


def plain(content):
    """The lists and dicts of a content that is read from a file member by member."""
    if isinstance(content, json_files.JsonObject):
        return {name: plain(value) for name, value in content.items()}
    if isinstance(content, json_files.JsonList):
        return [plain(value) for value in content]
    return content


def load(path):
    """(content, None) or (None, the error's message)."""
    try:
        return plain(json_files.load(text_files.TextFile(path))), None
    except ValueError as error:
        return None, str(error)


@property_test
@hypothesis.given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_members_one_by_one_are_what_pythons_decoder_finds(
    tmp_path, member_by_member, value, is_ascii, indent
):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(value, ensure_ascii=is_ascii, indent=indent), encoding='utf-8')
    content, error = load(path)
    assert error is None
    # Text, so that 1 and 1.0 differ.
    assert json.dumps(content) == json.dumps(value)


@property_test
@hypothesis.given(
    VALUES, st.integers(0, 200), st.sampled_from(['', '}', ']', ',', ':', '"', '1', '\n'])
)
def test_damage_is_told_in_the_words_of_pythons_decoder(
    tmp_path, member_by_member, value, position, inserted
):
    text = json.dumps(value, indent=1)
    damaged = text[:position] + inserted + text[position + 1 :]
    (tmp_path / 'a.json').write_text(damaged, encoding='utf-8')
    expected, message = None, None
    try:
        expected = json.loads(damaged)
    except ValueError as error:
        message = str(error)
    content, error = load(tmp_path / 'a.json')
    assert error == message
    assert json.dumps(content) == json.dumps(expected)


def test_a_member_that_is_asked_for_by_name(tmp_path, member_by_member):
    path = tmp_path / 'a.json'
    path.write_text('{"labels": null, "videos": {"a": [NaN, 1e5], "b": {}}, "n": 1}')
    content = json_files.load(text_files.TextFile(path))
    assert isinstance(content, json_files.JsonObject)
    assert list(content) == ['labels', 'videos', 'n']
    assert (content['labels'], content['n'], content.get('x')) == (None, 1, None)
    videos = content['videos']
    assert isinstance(videos, json_files.JsonObject)
    assert len(videos) == 2
    assert videos['a'][1] == 1e5
    assert json_files.is_list(videos['a'])


def test_a_list_is_a_sequence(tmp_path, member_by_member):
    path = tmp_path / 'a.json'
    path.write_text('[10, 11, [12], 13]')
    content = json_files.load(text_files.TextFile(path))
    assert (content[0], content[-1], content[1:3]) == (10, 13, [11, [12]])
    with pytest.raises(IndexError):
        content[4]


@pytest.mark.parametrize('text', ['{"a": 1, "b": 22222222, "a": 3}', '[{"a": [1, 2, 3], "a": 3}]'])
def test_a_name_that_comes_twice(tmp_path, member_by_member, text):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(ValueError, match="the name 'a' comes twice in one object"):
        json_files.load(text_files.TextFile(path))
    assert json_files.load(text_files.TextFile(path), unique_names=False)


# ---- text


@pytest.mark.parametrize(
    'content, encoding',
    [
        ('é☃😀' * 5, 'utf-8'),
        ('\ufeffé☃😀\r\nx\ry', 'utf-8'),
        ('é☃😀' * 5, 'utf-16'),
        ('Latin letters' * 3, 'utf-16-le'),
        ('テスト' * 5, 'shift_jis'),
    ],
)
def test_a_text_file_is_decoded_in_parts(tmp_path, monkeypatch, content, encoding):
    # Characters are cut in two.
    monkeypatch.setattr(text_files, '_CHUNK_BYTES', 3)
    path = tmp_path / 'a.txt'
    path.write_bytes(content.encode(encoding))
    lines = content.lstrip('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
    file = text_files.TextFile(path, 'shift_jis')
    assert list(file.lines()) == list(io.StringIO(lines))


@pytest.mark.parametrize('encoding, byte', [('', None), ('ascii', '0xe9')])
def test_the_line_of_a_byte_that_is_no_text(tmp_path, monkeypatch, encoding, byte):
    monkeypatch.setattr(text_files, '_CHUNK_BYTES', 3)
    path = tmp_path / 'a.txt'
    path.write_bytes('eins\nzwei\ncaf\xe9 drei\nvier'.encode('latin-1'))
    expected = f'line 3: .*the byte {byte}' if byte else "line 3: .*'café drei'"
    with pytest.raises(ValueError, match=expected):
        text_files.TextFile(path, encoding)


# ---- words


@property_test
@hypothesis.given(st.lists(st.lists(st.sampled_from(list('abcdefÅ')))), st.integers(1, 8))
def test_words_that_are_counted_on_disk(texts, size):
    counts = WordCounts(max_in_memory=2)
    total: collections.Counter[str] = collections.Counter()
    for words in texts:
        counts.add(words)
        total.update(words)
    expected = sorted(total, key=lambda word: (-total[word], word))[:size]
    assert counts.most_frequent(size) == expected


@pytest.mark.parametrize('kind', ['words', 'wordpiece', 'sentencepiece'])
def test_a_tokenizer_is_trained_on_texts_that_come_once(kind):
    texts = ['chop the onions', ' ', 'stir the soup, then the onions'] * 20
    trained = tokenizer.train(kind, iter(texts), 40)
    assert trained.to_spec()['size'] == tokenizer.train(kind, texts, 40).to_spec()['size']
    assert (trained.encode(['the onions'], 4)[0, :2] > 1).all()
