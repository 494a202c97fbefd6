"""Region features: files made here in their owners' layouts, and bytes that are no such files."""

import base64
import io
import pathlib
import pickle
import sys
import types

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.regions.pictures import Chosen, Picture, to_classes, to_regions
from data_pipelines.regions.records import parse_uniter, parse_vilbert
from data_pipelines.regions.stores import open_store
from data_pipelines.regions.tsv import Tsv
from vatt_jax.extras import MissingExtra

WIDTH, HEIGHT = 200, 100
BOXES = np.array([[0, 0, 100, 50], [20, 10, 200, 100]], np.float32)
SHARES = np.array([[0, 0, 0.5, 0.5], [0.1, 0.1, 1, 1]])
FEATURES = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
CLASSES = np.array([[0.5, 0.5], [0.1, 0.9]], np.float32)


def columns(name: str, features=FEATURES) -> dict:
    """A picture as bottom-up attention has it."""
    return {
        'image_id': name,
        'image_w': WIDTH,
        'image_h': HEIGHT,
        'num_boxes': len(BOXES),
        'boxes': base64.b64encode(BOXES.tobytes()),
        'features': base64.b64encode(features.tobytes()),
    }


def tsv_line(name: str, features=FEATURES) -> str:
    values = [v.decode() if isinstance(v, bytes) else v for v in columns(name, features).values()]
    return '\t'.join(map(str, values)) + '\n'


def packed(array: np.ndarray) -> dict:
    """An array as msgpack_numpy encodes it."""
    return {
        b'nd': True,
        b'type': array.dtype.str,
        b'kind': b'',
        b'shape': array.shape,
        b'data': array.tobytes(),
    }


def uniter_fields() -> dict[str, np.ndarray]:
    sides = SHARES[:, 2:] - SHARES[:, :2]
    return {
        'features': FEATURES.astype(np.float16),
        'norm_bb': np.concatenate([SHARES, sides], 1).astype(np.float16),
        'conf': np.array([0.9, 0.1], np.float16),
        'soft_labels': CLASSES.astype(np.float16),
    }


def npz_bytes(fields: dict) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **fields)
    return file.getvalue()


def test_tsv_by_image_id_whatever_the_length_of_a_field(tmp_path):
    path = tmp_path / 'a.tsv'
    # More characters than `csv` lets a field have.
    wide = np.random.default_rng(0).normal(size=(2, 20_000)).astype(np.float32)
    path.write_text(tsv_line('7') + tsv_line('wide', wide))
    store = open_store('tsv', path)
    assert list(store) == ['7', 'wide']
    np.testing.assert_array_equal(store['wide'].features, wide)
    np.testing.assert_allclose(store['7'].corners, SHARES, atol=1e-7)
    np.testing.assert_array_equal(store['7'].features, FEATURES)
    assert store['7'].classes is None


@pytest.mark.parametrize(
    'text, words',
    [
        ('7\t200\t100\n', 'line 1: expected 6 columns'),
        (tsv_line('7') + tsv_line('7'), 'line 2: image_id 7 is in the file twice'),
    ],
)
def test_tsv_errors_name_the_line(tmp_path, text, words):
    path = tmp_path / 'a.tsv'
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        Tsv(path)


def test_tsv_with_a_cut_field(tmp_path):
    path = tmp_path / 'a.tsv'
    path.write_text(tsv_line('7', FEATURES.ravel()[:5]))
    with pytest.raises(DataError, match='image_id 7: features: expected rows for num_boxes = 2'):
        Tsv(path)['7']


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('encoded', [True, False])
def test_vilbert_record(protocol, encoded):
    fields = columns('12') | {'cls_prob': base64.b64encode(CLASSES.tobytes())}
    if not encoded:
        fields |= {'boxes': BOXES, 'features': FEATURES, 'cls_prob': CLASSES}
    picture = parse_vilbert(pickle.dumps(fields, protocol), 'x, 12')
    np.testing.assert_allclose(picture.corners, SHARES, atol=1e-7)
    np.testing.assert_array_equal(picture.features, FEATURES)
    np.testing.assert_array_equal(picture.classes, CLASSES)


class Touch:
    """Makes a file where its pickle is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_nothing_in_a_record_is_executed(tmp_path):
    path = tmp_path / 'touched'
    with pytest.raises(DataError, match='posix|pathlib|getattr|Path'):
        parse_vilbert(pickle.dumps(columns('1') | {'boxes': Touch(path)}), 'x')
    fields = uniter_fields() | {'conf': np.array([Touch(path)], object)}
    with pytest.raises(DataError, match='expected an npz file of numbers'):
        parse_uniter(npz_bytes(fields), 'x', 'a')
    entry = {b'nd': True, b'type': 'O', b'shape': (1,), b'data': pickle.dumps([Touch(path)])}
    with pytest.raises(DataError, match='expected numbers'):
        parse_uniter(msgpack.packb({'features': entry}), 'x', 'a')
    assert not path.exists()


@pytest.mark.parametrize('form', ['msgpack', 'npz'])
def test_uniter_record(form):
    fields = uniter_fields()
    if form == 'npz':
        data = npz_bytes(fields)
    else:
        data = msgpack.packb({name: packed(array) for name, array in fields.items()})
    picture = parse_uniter(data, 'x', 'a')
    assert picture.features.dtype == np.float32
    np.testing.assert_array_equal(picture.features, FEATURES.astype(np.float16))
    np.testing.assert_allclose(picture.corners, SHARES, atol=1e-3)
    np.testing.assert_allclose(picture.classes, CLASSES, atol=1e-3)
    np.testing.assert_allclose(picture.confidence, [0.9, 0.1], atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_other_bytes_are_a_data_error(data):
    with pytest.raises(DataError):
        parse_vilbert(data, 'x')
    for head in (b'', b'PK\x03\x04', b'\x81'):
        with pytest.raises(DataError):
            parse_uniter(head + data, 'x', 'a')


def test_npz_folder(tmp_path):
    (tmp_path / 'a.npz').write_bytes(npz_bytes(uniter_fields()))
    store = open_store('npz', tmp_path)
    assert list(store) == ['a'] and store['a'].name == 'a'
    assert 'b' not in store


class FakeLmdb(types.ModuleType):
    """As much of lmdb as the reader calls, over a dict; where the package is missing."""

    class Error(Exception):
        pass

    def __init__(self, content):
        super().__init__('lmdb')
        self.content = content

    def open(self, path, **options):
        assert options['readonly'] and not options['lock']
        return self

    def begin(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def cursor(self):
        return self

    def iternext(self, keys, values):
        return iter(sorted(self.content))

    def get(self, key):
        return self.content[key]


def test_lmdb_by_its_keys(tmp_path, monkeypatch):
    content = {b'12': pickle.dumps(columns('12')), b'keys': pickle.dumps([b'12'])}
    monkeypatch.setitem(sys.modules, 'lmdb', FakeLmdb(content))
    store = open_store('vilbert_lmdb', tmp_path)
    assert list(store) == ['12']
    np.testing.assert_array_equal(store['12'].features, FEATURES)
    content = {b'a.npz': npz_bytes(uniter_fields()), b'__keys__': b'[]'}
    monkeypatch.setitem(sys.modules, 'lmdb', FakeLmdb(content))
    assert open_store('uniter_lmdb', tmp_path)['a.npz'].name == 'a'


def test_without_lmdb_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lmdb', None)
    with pytest.raises(MissingExtra, match="needs the extra 'regions'.*pip install"):
        open_store('uniter_lmdb', tmp_path)


def picture(count: int, confidence=None) -> Picture:
    rows = np.arange(count, dtype=np.float32)[:, None]
    corners = np.tile(np.array([[0.2, 0.4, 0.6, 1.0]], np.float32), (count, 1))
    return Picture('a', rows, corners, None, confidence)


@pytest.mark.parametrize(
    'sure, least, most, expected', [(3, 2, 9, 3), (1, 2, 9, 2), (8, 2, 5, 5), (0, 9, 9, 8)]
)
def test_chosen_regions(sure, least, most, expected):
    confidence = np.where(np.arange(8) < sure, 0.9, 0.1)
    kept = Chosen(0.2, least, most).of(picture(8, confidence))
    assert len(kept.features) == len(kept.corners) == len(kept.confidence) == expected


def test_batch_of_pictures():
    regions = to_regions([picture(1), picture(4)], 3, 7)
    assert regions.mask.tolist() == [[True, False, False], [True, True, True]]
    assert regions.features[:, :, 0].tolist() == [[0, 0, 0], [0, 1, 2]]
    np.testing.assert_allclose(regions.boxes[0, 0], [0.2, 0.4, 0.6, 1, 0.4, 0.6, 0.24], rtol=1e-6)
    five = to_regions([picture(1)], 2, 5)
    np.testing.assert_allclose(five.boxes[0], [[0.2, 0.4, 0.6, 1, 0.24], [0] * 5], rtol=1e-6)
    assert to_classes([picture(1)], 3) is None
