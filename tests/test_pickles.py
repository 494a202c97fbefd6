"""The restricted reader of pickles.

What honest writers write is read as it was; whatever else is refused, and nothing of it runs.
"""

import base64
import builtins
import collections
import copyreg
import io
import os
import pickle
import struct
import sys
import types
import zipfile
import zlib

import chex
import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from vatt_jax.importers import pickles
from vatt_jax.importers.pickles import ConfigError, Damaged, Refused


def stand_in(monkeypatch, qualified, value):
    """Makes `value` picklable under the name of a package that is not installed."""
    module, _, name = qualified.rpartition('.')
    parts = module.split('.')
    for count in range(1, len(parts) + 1):
        package = '.'.join(parts[:count])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    value.__module__ = module
    value.__qualname__ = name
    value.__name__ = name
    monkeypatch.setattr(sys.modules[module], name, value, raising=False)
    return value


class Flat(dict):
    """A mapping that is pickled as a call of its class on a dict, as Haiku's and Flax's are."""

    def __reduce__(self):
        return type(self), (dict(self),)


def make_tree():
    """A tree with every kind of value that is read."""
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    arrays = {
        'w': x.astype(np.float32),
        'moved': x.transpose(2, 0, 1),
        'fortran': np.asfortranarray(x),
        'none': np.zeros((0, 3)),
        'bf16': x.astype(ml_dtypes.bfloat16),
        'big': np.arange(3, dtype='>i4'),
        'text': np.array(['ab', 'c']),
    }
    state = {
        'counter': np.array(3, np.int32),
        's': np.float32(2),
        'flags': np.array([True, False]),
    }
    more = (
        1,
        2**70,
        -5,
        'a\n',
        [1.5, True, None],
        b'xy',
        b'',
        bytearray(b'q'),
        {3, 4},
        frozenset([1]),
    )
    return {
        'params': {'a/~/b': arrays},
        'state': collections.OrderedDict(m=state),
        'more': more,
    }


def assert_same(found, expected):
    """Equal in values, in types of arrays and containers, and in the order of keys.

    Mappings of any class are expected to come back as dicts.
    """
    if isinstance(expected, dict):
        assert type(found) is dict
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype
        chex.assert_shape(found, expected.shape)
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for found_item, expected_item in zip(found, expected):
            assert_same(found_item, expected_item)
    else:
        assert type(found) is type(expected)
        assert found == expected


def write(path, content):
    """Writes bytes; returns the path."""
    path.write_bytes(content)
    return path


# ---- honest files
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_trees_of_arrays_are_read_as_they_were(tmp_path, protocol, monkeypatch):
    haiku_class = type('FlatMapping', (Flat,), {})
    flat = stand_in(monkeypatch, 'haiku._src.data_structures.FlatMapping', haiku_class)
    flax_class = type('FrozenDict', (Flat,), {})
    frozen = stand_in(monkeypatch, 'flax.core.frozen_dict.FrozenDict', flax_class)

    tree = make_tree()
    weight = tree['params']['a/~/b']['w']
    written = {**tree, 'flat': flat(m=flat(w=weight)), 'frozen': frozen(a=1)}
    found = pickles.read(write(tmp_path / 'f', pickle.dumps(written, protocol)))
    assert_same(found, {**tree, 'flat': {'m': {'w': weight}}, 'frozen': {'a': 1}})
    # One array that is in the tree twice is read once.
    assert found['flat']['m']['w'] is found['params']['a/~/b']['w']


# {'params': FlatMapping({'a/~/b': FlatMapping(w=array)}),
#  'state': {'a/~/m': {'average': jax array, 'counter': int32}}}, by dill 0.4.1.
DILL_FILE = (
    'c-n1{%}&BV5XW0=t%@H}6HV|1@KP=wjUGrmNbJEE*evbJR@&0+hsXiL1+mH89N&k>@NINkK#6fSnM^YC-}(P$;(U'
    'DCRuyAx!e&kdO(jBu)3~pFB1Py&R8b<8(4o?TnP&Yaq3Vw2d7Sm|9mfbRZN0R*$Q@JLLxi0uP7<G#8DWovf>Ff?6'
    '@re8pb00LPV<pZ!hv9ZsuLA2daz3b3kTU^n;8YSnndujXeIAhQ*7H^oME$Ln^${9egJNyMmZ}bwTBBV-e!1j`Ws+'
    'hVh{wkUnZ*5u@rWT_LgPMuMPDa6$Z-8%IPYBE0wYP!<Axr8jn6PL3<2g|B*f~F0(X!v~K#BlJE1w(knk+IyGgZXg'
    'iiQxiVYL_uE58`=s(+$kGIO;Xr4K3FP&^`g48?wRjDUpZy2sc!p{PrKR@20gOMtN&'
)


def test_a_file_that_dill_and_haiku_wrote(tmp_path):
    content = zlib.decompress(base64.b85decode(DILL_FILE))
    found = pickles.read(write(tmp_path / 'f', content))
    weight = np.array([[1.5, -2]], np.float32)
    average, counter = np.array([0.25], np.float32), np.array(7, np.int32)
    expected = {
        'params': {'a/~/b': {'w': weight}},
        'state': {'a/~/m': {'average': average, 'counter': counter}},
    }
    assert_same(found, expected)


# ---- hostile files
class Call:
    """Pickled as a call of `function`, which an unrestricted reader runs."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class PersistentPickler(pickle.Pickler):
    """Writes an ellipsis as a reference to something outside of the file."""

    def persistent_id(self, value):
        return 'file:///etc/passwd' if value is Ellipsis else None


def assert_refused(tmp_path, monkeypatch, content, message):
    """The file is refused with the message, and left nothing beside itself in the folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=f'hostile.*({message})'):
        pickles.read(write(tmp_path / 'hostile', content))
    assert [path.name for path in tmp_path.iterdir()] == ['hostile']


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize(
    'value, message',
    [
        # Calls that would leave a file `ran` if they ran.
        pytest.param(Call(os.system, 'touch ran'), r'posix\.system', id='system'),
        pytest.param(Call(eval, "open('ran', 'w')"), r'builtins\.eval', id='eval'),
        pytest.param(Call(builtins.exec, "open('ran', 'w')"), r'builtins\.exec', id='exec'),
        pytest.param(Call(open, 'ran', 'w'), r'_?io\.open', id='open'),
        # getattr(os, 'system'), the way around a list of forbidden names.
        pytest.param(
            Call(getattr, Call(__import__, 'os'), 'system'),
            r'builtins\.(getattr|__import__)',
            id='getattr',
        ),
        pytest.param(
            {'params': collections.OrderedDict(a=[np.ones(2), (Call(os.system, 'touch ran'),)])},
            r'posix\.system',
            id='within a tree',
        ),
        pytest.param(
            Call(collections.OrderedDict, Call(list, Call(os.listdir, '.'))),
            'builtins.list|posix.listdir',
            id='within an allowed call',
        ),
        pytest.param(Call(np.fromfile, 'ran'), r'numpy.*\.fromfile', id='fromfile'),
        pytest.param(Call(np.load, 'ran', None, True), r'numpy.*\.load', id='load'),
        # Values that are no arrays.
        pytest.param(collections.Counter('ab'), r'collections\.Counter', id='Counter'),
        pytest.param(np.array([1, {}], object), "type 'O8'", id='objects'),
        pytest.param(np.zeros(2, [('a', 'f4')]), "'V4'", id='structs'),
        pytest.param(ValueError('a'), r'\.ValueError', id='exception'),
        pytest.param(types.SimpleNamespace(a=1), r'SimpleNamespace', id='namespace'),
        pytest.param(np.ndarray, r'numpy.ndarray itself', id='class'),
        pytest.param(Call(np.dtype, Call(np.dtype, 'f4')), 'type <', id='dtype of a dtype'),
    ],
)
def test_what_is_no_array_is_refused_and_does_not_run(
    tmp_path, monkeypatch, protocol, value, message
):
    assert_refused(tmp_path, monkeypatch, pickle.dumps(value, protocol), message)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_references_out_of_the_file_are_refused(tmp_path, monkeypatch, protocol):
    file = io.BytesIO()
    PersistentPickler(file, protocol).dump([...])
    assert_refused(tmp_path, monkeypatch, file.getvalue(), 'PERSID|outside of the file')


def test_names_by_number_are_refused_even_when_this_process_knows_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension('posix', 'system', 0x66)
    try:
        content = pickle.dumps(Call(os.system, 'touch ran'), 2)
        assert content[2:4] == b'\x82\x66'
        with pytest.raises(Refused, match='EXT1 102'):
            pickles.read(write(tmp_path / 'first', content))
        # What is in the cache an unpickler takes without a call of find_class.
        copyreg._extension_cache[0x66] = os.system
        with pytest.raises(Refused, match='EXT1 102'):
            pickles.read(write(tmp_path / 'second', content))
    finally:
        copyreg.remove_extension('posix', 'system', 0x66)
        copyreg._extension_cache.pop(0x66, None)
    assert not (tmp_path / 'ran').exists()


# ---- pickles put together from opcodes
def program(*opcodes):
    """A pickle of protocol 4 with these opcodes."""
    return b'\x80\x04' + b''.join(opcodes) + b'.'


def push_text(text):
    """SHORT_BINUNICODE."""
    return b'\x8c' + bytes([len(text)]) + text.encode()


def push_global(module, name):
    """STACK_GLOBAL of two strings."""
    return push_text(module) + push_text(name) + b'\x93'


@pytest.mark.parametrize(
    'content, message',
    [
        pytest.param(
            program(push_global('numpy', 'ndarray.tofile')),
            'refers to numpy.ndarray.tofile',
            id='attribute of a class',
        ),
        pytest.param(
            program(push_global('vatt_jax.importers.pickles.stand_ins', 'Array')),
            'refers to vatt_jax',
            id='name of ours',
        ),
        pytest.param(program(b'c__builtin__\neval\n'), 'refers to builtins.eval', id='GLOBAL'),
        pytest.param(program(b'(ios\nsystem\n'), 'opcode INST', id='INST'),
        pytest.param(program(b'(', push_global('numpy', 'ndarray'), b'o'), 'opcode OBJ', id='OBJ'),
        pytest.param(
            program(push_global('numpy', 'ndarray'), b')\x81'), 'opcode NEWOBJ', id='NEWOBJ'
        ),
        # BUILD on what stands for a name: nothing of this process may be changed by a file.
        pytest.param(
            program(
                push_global('collections', 'OrderedDict'),
                b'N}',
                push_text('make'),
                push_global('numpy', 'dtype'),
                b's\x86b',
            ),
            'a name with a state',
            id='BUILD',
        ),
        pytest.param(
            program(push_global('numpy', 'ndarray'), b')R'),
            'numpy.ndarray is called',
            id='call of a class',
        ),
        pytest.param(
            program(push_global('collections', 'OrderedDict'), b'K\x05\x85R'),
            'a mapping of',
            id='mapping of a number',
        ),
        pytest.param(
            program(push_global('dill._dill', '_load_type'), push_text('CodeType'), b'\x85R'),
            "the type 'CodeType'",
            id='type by dill',
        ),
        pytest.param(
            program(push_global('_codecs', 'encode'), push_text('a'), push_text('rot13'), b'\x86R'),
            "the encoding 'rot13'",
            id='encoding',
        ),
        pytest.param(
            program(
                push_global('numpy._core.multiarray', '_reconstruct'),
                push_global('collections', 'OrderedDict'),
                b')',
                b'C\x01b',
                b'\x87R',
            ),
            'an array of class',
            id='array of another class',
        ),
        pytest.param(
            program(
                push_global('jax._src.array', '_reconstruct_array'),
                push_global('builtins', 'set'),
                b'))',
                b'NtR',
            ),
            'MARK|mark|an array made by|damaged',
            id='array made by another function',
        ),
    ],
)
def test_pickles_made_by_hand(tmp_path, content, message):
    with pytest.raises((Refused, Damaged), match=message):
        pickles.read(write(tmp_path / 'f', content))


@pytest.mark.parametrize(
    'content, message',
    [
        pytest.param(b'', 'is empty', id='empty'),
        pytest.param(
            b'\x89HDF\r\n\x1a\n' + b'0' * 50,
            r"not a pickle of protocol 2 or later \(it begins with b'.x89HDF",
            id='HDF5',
        ),
        pytest.param(b'cos\nsystem\n(S"true"\ntR.', 'not a pickle of protocol 2', id='protocol 0'),
        pytest.param(b'\x80\x09N.', 'protocol 9', id='protocol 9'),
        pytest.param(
            b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00N.', 'damaged|whole', id='long frame'
        ),
        pytest.param(
            program(b'\x8e' + struct.pack('<Q', 1 << 40)),
            'not a whole pickle.*BINBYTES8|not a whole pickle.*expected',
            id='long bytes',
        ),
        pytest.param(
            program(b'\x96' + struct.pack('<Q', 1 << 40)), 'not a whole pickle', id='long bytearray'
        ),
        pytest.param(
            program(b'Nr' + struct.pack('<I', 1 << 31)), 'LONG_BINPUT 2147483648', id='far memo'
        ),
        pytest.param(program(b'Nh\x05'), 'damaged', id='unknown memo'),
        pytest.param(program(b']' * 100 + b'a' * 99), 'containers more than 64 deep', id='deep'),
        pytest.param(program(b']\x94h\x00a'), 'contains itself', id='cycle'),
        pytest.param(program(b'N') + b'more', '4 bytes follow the end', id='more bytes'),
        pytest.param(b'PK\x03\x04 no zip at all', 'damaged|zip', id='zip'),
    ],
)
def test_what_is_wrong_with_a_damaged_file_is_one_sentence(tmp_path, content, message):
    with pytest.raises(Damaged, match=message) as caught:
        pickles.read(write(tmp_path / 'f', content))
    assert '\n' not in str(caught.value)
    assert str(tmp_path / 'f') in str(caught.value)


def test_truncated_anywhere(tmp_path):
    content = pickle.dumps(make_tree(), 4)
    for length in range(1, len(content), 37):
        with pytest.raises(Damaged):
            pickles.read(write(tmp_path / 'f', content[:length]))
    with pytest.raises(ConfigError, match='missing cannot be read .No such file'):
        pickles.read(tmp_path / 'missing')


def test_arrays_must_have_the_bytes_they_claim(tmp_path):
    content = pickle.dumps(np.zeros((2, 3), np.float32), 4)
    shape, false_shape = b'K\x02K\x03\x86', b'K\xc8K\x03\x86'  # (2, 3), (200, 3)
    assert content.count(shape) == 1
    with pytest.raises(Refused, match=r'shape \[200, 3\] and type float32 with 24 bytes'):
        pickles.read(write(tmp_path / 'f', content.replace(shape, false_shape)))


def test_shared_containers_cost_no_more_than_they_are(tmp_path):
    nested = [np.ones(3)]
    for _ in range(50):  # 2^50 paths to the array
        nested = [nested, nested]
    found = pickles.read(write(tmp_path / 'f', pickle.dumps(nested, 4)))
    assert found[0] is found[1]


# ---- PyTorch: its two formats, written out
class Storage:
    """The numbers of one or more tensors, with its name in the file."""

    def __init__(self, key, data):
        self.key, self.data = key, data


class Tensor:
    """View of a storage."""

    def __init__(self, storage, offset, size, stride):
        self.args = storage, offset, size, stride, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules['torch._utils']._rebuild_tensor_v2, self.args


class TorchPickler(pickle.Pickler):
    """Writes a storage as a reference, as torch.save does."""

    legacy = False
    storage_classes = {}  # {dtype: stand-in for PyTorch's class}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        storage_class = self.storage_classes[value.data.dtype.name]
        reference = ('storage', storage_class, value.key, 'cpu', value.data.size)
        if self.legacy:
            reference += (None,)
        return reference


def torch_pickle(value, legacy=False):
    """The bytes of one pickle of a file of PyTorch."""
    file = io.BytesIO()
    pickler = TorchPickler(file, 2)
    pickler.legacy = legacy
    pickler.dump(value)
    return file.getvalue()


def write_torch_zip(path, value, storages):
    """The format since PyTorch 1.6."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', torch_pickle(value))
        archive.writestr('archive/byteorder', 'little')
        for storage in storages:
            archive.writestr(f'archive/data/{storage.key}', storage.data.tobytes())
        archive.writestr('archive/version', '3\n')


def write_torch_legacy(path, value, storages):
    """The format before: five pickles, then each storage with its length in front."""
    machine = {
        'protocol_version': 1001,
        'little_endian': True,
        'type_sizes': {'short': 2, 'int': 4, 'long': 4},
    }
    parts = [torch_pickle(head) for head in (0x1950A86A20F9469CFC6C, 1001, machine)]
    parts.append(torch_pickle(value, legacy=True))
    parts.append(torch_pickle([storage.key for storage in storages]))
    for storage in storages:
        parts.append(struct.pack('<q', storage.data.size))
        parts.append(storage.data.tobytes())
    path.write_bytes(b''.join(parts))


@pytest.fixture
def torch_file(monkeypatch, tmp_path):
    """write(kind, value, storages) -> path; write.size stands for torch.Size."""

    def rebuild_tensor(*args):
        raise AssertionError('expected no call of a function of PyTorch')

    def reduce_size(size):
        return type(size), (tuple(size),)

    stand_in(monkeypatch, 'torch._utils._rebuild_tensor_v2', rebuild_tensor)
    size_class = type('Size', (tuple,), {'__reduce__': reduce_size})
    names = {'float32': 'FloatStorage', 'int64': 'LongStorage', 'bfloat16': 'BFloat16Storage'}
    storage_classes = {
        dtype: stand_in(monkeypatch, f'torch.{name}', type(name, (), {}))
        for dtype, name in names.items()
    }
    monkeypatch.setattr(TorchPickler, 'storage_classes', storage_classes)

    def write_torch(kind, value, storages):
        path = tmp_path / f'{kind}.pth'
        if kind == 'zip':
            write_torch_zip(path, value, storages)
        else:
            write_torch_legacy(path, value, storages)
        return path

    write_torch.size = stand_in(monkeypatch, 'torch.Size', size_class)
    return write_torch


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_pytorch_files(torch_file, kind):
    numbers = np.arange(24, dtype=np.float32)
    halves = np.ones(2, ml_dtypes.bfloat16)
    floats = Storage('0', numbers)
    integers = Storage('1', np.arange(3))
    bfloats = Storage('2', halves)
    weights = collections.OrderedDict(
        [
            ('w', Tensor(floats, 0, (2, 3, 4), (12, 4, 1))),
            ('part', Tensor(floats, 1, (4, 2), (1, 12))),
            ('n', Tensor(integers, 1, (), ())),
            ('h', Tensor(bfloats, 0, (2,), (1,))),
            ('no', Tensor(integers, 0, (0, 5), (5, 1))),
        ]
    )
    weights._metadata = {'version': 1}  # as Module.state_dict leaves it
    written = {'state_dict': weights, 'epoch': 3, 'shape': torch_file.size((1, 2))}
    path = torch_file(kind, written, [floats, integers, bfloats])

    expected_weights = {
        'w': numbers.reshape(2, 3, 4),
        'part': np.stack([numbers[1:5], numbers[13:17]], 1),
        'n': np.array(1),
        'h': halves,
        'no': np.zeros((0, 5), np.int64),
    }
    found = pickles.read(path)
    assert_same(found, {'state_dict': expected_weights, 'epoch': 3, 'shape': (1, 2)})

    content = path.read_bytes()
    for cut in (1, 20, 200):
        with pytest.raises(Damaged):
            pickles.read(write(path.with_suffix('.cut'), content[:-cut]))


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_hostile_pytorch_files(torch_file, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage('0', np.arange(4, dtype=np.float32))
    tensor = Tensor(storage, 0, (2,), (1,))
    hostile = [
        ({'a': tensor, 'b': Call(os.system, 'touch ran')}, r'posix\.system'),
        (Tensor(storage, 2, (3,), (1,)), r'tensor of shape \[3\] at 2 of a storage of 4'),
        (Tensor(storage, 0, (1 << 40, 1 << 40), (0, 0)), 'storage of 4 numbers'),
        (Tensor(storage, 0, (2,), (-1,)), 'strides'),
        (Tensor(storage, -1, (2,), (1,)), 'at -1'),
    ]
    for value, message in hostile:
        with pytest.raises(Refused, match=message):
            pickles.read(torch_file(kind, value, [storage]))

    # The file holds fewer numbers than the reference to the storage says.
    short = Storage('0', np.arange(3, dtype=np.float32))
    with pytest.raises(Damaged):
        pickles.read(torch_file(kind, tensor, [short]))
    assert not (tmp_path / 'ran').exists()


# ---- against Python's own reader
KEYS = st.one_of(
    st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=4), st.booleans()
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.binary(max_size=300),
    st.frozensets(KEYS, max_size=3),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.tuples(inner),
        st.dictionaries(st.one_of(KEYS, st.tuples(KEYS, KEYS)), inner, max_size=4),
    ),
    max_leaves=20,
)


@hypothesis.given(VALUES, st.integers(2, 5))
@hypothesis.settings(max_examples=150, deadline=None)
def test_plain_values_are_read_as_python_reads_them(tmp_path_factory, value, protocol):
    shared = [value, value]
    content = pickle.dumps(shared, protocol)
    path = write(tmp_path_factory.getbasetemp() / 'plain.pkl', content)
    assert_same(pickles.read(path), pickle.loads(content))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path_factory, data):
    """Never another exception, and never a message that a terminal would obey."""
    content = bytearray(pickle.dumps(make_tree(), data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(2, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / 'changed.pkl', bytes(content))
    try:
        pickles.read(path)
    except ConfigError as error:
        assert str(error).isprintable()
