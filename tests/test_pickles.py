"""The restricted reader: what honest writers write is read as it was; whatever else is refused, and nothing of it runs."""

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

import ml_dtypes
import numpy as np
import pytest

from vatt_jax.importers import pickles
from vatt_jax.importers.pickles import Damaged, Refused


def stand_in(monkeypatch, qualified, value):
    """Makes `value` picklable under the name of a package that is not installed."""
    module, _, name = qualified.rpartition('.')
    for i in range(module.count('.') + 1):
        at = '.'.join(module.split('.')[: i + 1])
        if at not in sys.modules:
            monkeypatch.setitem(sys.modules, at, types.ModuleType(at))
    value.__module__, value.__qualname__, value.__name__ = module, name, name
    monkeypatch.setattr(sys.modules[module], name, value, raising=False)
    return value


class Flat(dict):
    def __reduce__(self):
        return type(self), (dict(self),)


def tree():
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    return {
        'params': {
            'a/~/b': {
                'w': x.astype(np.float32),
                'moved': x.transpose(2, 0, 1),
                'fortran': np.asfortranarray(x),
                'none': np.zeros((0, 3)),
                'bf16': x.astype(ml_dtypes.bfloat16),
                'big': np.arange(3, dtype='>i4'),
                'text': np.array(['ab', 'c']),
            }
        },
        'state': collections.OrderedDict(
            m={
                'counter': np.array(3, np.int32),
                's': np.float32(2),
                'flags': np.array([True, False]),
            }
        ),
        'more': (
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
        ),
    }


def same(have, want):
    if isinstance(want, dict):
        assert type(have) is dict and list(have) == list(want)
        for k in want:
            same(have[k], want[k])
    elif isinstance(want, (np.ndarray, np.generic)):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(have, want)
    elif isinstance(want, (list, tuple)):
        assert type(have) is type(want) and len(have) == len(want)
        for a, b in zip(have, want):
            same(a, b)
    else:
        assert have == want and type(have) is type(want)


def write(path, content):
    path.write_bytes(content)
    return path


# ---- honest files
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_trees_of_arrays_are_read_as_they_were(tmp_path, protocol, monkeypatch):
    flat = stand_in(
        monkeypatch, 'haiku._src.data_structures.FlatMapping', type('FlatMapping', (Flat,), {})
    )
    frozen = stand_in(
        monkeypatch, 'flax.core.frozen_dict.FrozenDict', type('FrozenDict', (Flat,), {})
    )
    x = tree()
    given = {**x, 'flat': flat(m=flat(w=x['params']['a/~/b']['w'])), 'frozen': frozen(a=1)}
    got = pickles.read(write(tmp_path / 'f', pickle.dumps(given, protocol)))
    same(got, {**x, 'flat': {'m': {'w': x['params']['a/~/b']['w']}}, 'frozen': {'a': 1}})
    assert got['flat']['m']['w'] is got['params']['a/~/b']['w']  # one array, twice


def test_a_file_that_dill_and_haiku_wrote(tmp_path):
    """{'params': FlatMapping({'a/~/b': FlatMapping(w=array)}), 'state': {'a/~/m': {'average': jax array, 'counter': int32}}}, by dill 0.4.1."""
    told = (
        'c-n1{%}&BV5XW0=t%@H}6HV|1@KP=wjUGrmNbJEE*evbJR@&0+hsXiL1+mH89N&k>@NINkK#6fSnM^YC-}(P$;(UDCRuyAx!e&kdO(jBu)3~pFB1Py&R8b<8(4o?Tn'
        'P&Yaq3Vw2d7Sm|9mfbRZN0R*$Q@JLLxi0uP7<G#8DWovf>Ff?6@re8pb00LPV<pZ!hv9ZsuLA2daz3b3kTU^n;8YSnndujXeIAhQ*7H^oME$Ln^${9egJNyMmZ}bwTBBV-e'
        '!1j`Ws+hVh{wkUnZ*5u@rWT_LgPMuMPDa6$Z-8%IPYBE0wYP!<Axr8jn6PL3<2g|B*f~F0(X!v~K#BlJE1w(knk+IyGgZXgiiQxiVYL_uE58`=s(+$kGIO;Xr4K3FP&^`g'
        '48?wRjDUpZy2sc!p{PrKR@20gOMtN&'
    )
    got = pickles.read(write(tmp_path / 'f', zlib.decompress(base64.b85decode(told))))
    same(
        got,
        {
            'params': {'a/~/b': {'w': np.array([[1.5, -2]], np.float32)}},
            'state': {
                'a/~/m': {'average': np.array([0.25], np.float32), 'counter': np.array(7, np.int32)}
            },
        },
    )


# ---- hostile files
class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Outside(pickle.Pickler):
    def persistent_id(self, x):
        return 'file:///etc/passwd' if x is Ellipsis else None


def outside(protocol):
    file = io.BytesIO()
    Outside(file, protocol).dump([...])
    return file.getvalue()


def attribute(protocol):
    """getattr(os, 'system')(…), the way around a list of forbidden names."""
    return pickle.dumps(Call(getattr, Call(__import__, 'os'), 'system'), protocol)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize(
    'make, named',
    [
        (lambda p: pickle.dumps(Call(os.system, 'touch ran'), p), r'posix\.system'),
        (lambda p: pickle.dumps(Call(eval, "open('ran', 'w')"), p), r'builtins\.eval'),
        (lambda p: pickle.dumps(Call(builtins.exec, "open('ran', 'w')"), p), r'builtins\.exec'),
        (lambda p: pickle.dumps(Call(open, 'ran', 'w'), p), r'_?io\.open'),
        (attribute, r'builtins\.(getattr|__import__)'),
        (
            lambda p: pickle.dumps(
                {
                    'params': collections.OrderedDict(
                        a=[np.ones(2), (Call(os.system, 'touch ran'),)]
                    )
                },
                p,
            ),
            r'posix\.system',
        ),
        (
            lambda p: pickle.dumps(
                Call(collections.OrderedDict, Call(list, Call(os.listdir, '.'))), p
            ),
            'builtins.list|posix.listdir',
        ),
        (lambda p: pickle.dumps(Call(np.fromfile, 'ran'), p), r'numpy.*\.fromfile'),
        (lambda p: pickle.dumps(Call(np.load, 'ran', None, True), p), r'numpy.*\.load'),
        (outside, 'PERSID|outside of the file'),
        (lambda p: pickle.dumps(collections.Counter('ab'), p), r'collections\.Counter'),
        (lambda p: pickle.dumps(np.array([1, {}], object), p), "type 'O8'"),
        (lambda p: pickle.dumps(np.zeros(2, [('a', 'f4')]), p), "'V4'"),
        (lambda p: pickle.dumps(ValueError('a'), p), r'\.ValueError'),
        (lambda p: pickle.dumps(types.SimpleNamespace(a=1), p), r'SimpleNamespace'),
        (lambda p: pickle.dumps(np.ndarray, p), r'numpy.ndarray itself'),
        (lambda p: pickle.dumps(Call(np.dtype, Call(np.dtype, 'f4')), p), 'type <'),
    ],
)
def test_what_is_no_array_is_refused_and_does_not_run(tmp_path, monkeypatch, protocol, make, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=f'hostile.*({named})'):
        pickles.read(write(tmp_path / 'hostile', make(protocol)))
    assert [p.name for p in tmp_path.iterdir()] == ['hostile']


def test_names_by_number_are_refused_even_when_this_process_knows_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension('posix', 'system', 0x66)
    try:
        content = pickle.dumps(Call(os.system, 'touch ran'), 2)
        assert content[2:4] == b'\x82\x66'
        with pytest.raises(Refused, match='EXT1 102'):
            pickles.read(write(tmp_path / 'first', content))
        copyreg._extension_cache[0x66] = os.system  # then the unpickler asks find_class no more
        with pytest.raises(Refused, match='EXT1 102'):
            pickles.read(write(tmp_path / 'second', content))
    finally:
        copyreg.remove_extension('posix', 'system', 0x66)
        copyreg._extension_cache.pop(0x66, None)
    assert not (tmp_path / 'ran').exists()


def op(*parts):
    return b'\x80\x04' + b''.join(parts) + b'.'


def text(s):
    return b'\x8c' + bytes([len(s)]) + s.encode()


def name(module, attr):
    return text(module) + text(attr) + b'\x93'


@pytest.mark.parametrize(
    'content, words',
    [
        (op(name('numpy', 'ndarray.tofile')), 'refers to numpy.ndarray.tofile'),
        (op(name('vatt_jax.importers.pickles', '_Array')), 'refers to vatt_jax'),
        (op(b'c__builtin__\neval\n'), 'refers to builtins.eval'),
        (op(b'(ios\nsystem\n'), 'opcode INST'),
        (op(b'(', name('numpy', 'ndarray'), b'o'), 'opcode OBJ'),
        (op(name('numpy', 'ndarray'), b')\x81'), 'opcode NEWOBJ'),
        # BUILD, on what stands for a name: nothing of this process may be changed by a file
        (
            op(
                name('collections', 'OrderedDict'),
                b'N}',
                text('make'),
                name('numpy', 'dtype'),
                b's\x86b',
            ),
            'a name with a state',
        ),
        (op(name('numpy', 'ndarray'), b')R'), 'numpy.ndarray is called'),
        (op(name('collections', 'OrderedDict'), b'K\x05\x85R'), 'a mapping of'),
        (op(name('dill._dill', '_load_type'), text('CodeType'), b'\x85R'), "the type 'CodeType'"),
        (op(name('_codecs', 'encode'), text('a'), text('rot13'), b'\x86R'), "the encoding 'rot13'"),
        (
            op(
                name('numpy._core.multiarray', '_reconstruct'),
                name('collections', 'OrderedDict'),
                b')',
                b'C\x01b',
                b'\x87R',
            ),
            'an array of class',
        ),
        (
            op(
                name('jax._src.array', '_reconstruct_array'), name('builtins', 'set'), b'))', b'NtR'
            ),
            'MARK|mark|an array made by|damaged',
        ),
    ],
)
def test_pickles_made_by_hand(tmp_path, content, words):
    with pytest.raises((Refused, Damaged), match=words):
        pickles.read(write(tmp_path / 'f', content))


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is empty'),
        (
            b'\x89HDF\r\n\x1a\n' + b'0' * 50,
            r"not a pickle of protocol 2 or later \(it begins with b'.x89HDF",
        ),
        (b'cos\nsystem\n(S"true"\ntR.', 'not a pickle of protocol 2'),
        (b'\x80\x09N.', 'protocol 9'),
        (b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x00N.', 'damaged|whole'),
        (
            op(b'\x8e' + struct.pack('<Q', 1 << 40)),
            'not a whole pickle.*BINBYTES8|not a whole pickle.*expected',
        ),
        (op(b'\x96' + struct.pack('<Q', 1 << 40)), 'not a whole pickle'),
        (op(b'Nr' + struct.pack('<I', 1 << 31)), 'LONG_BINPUT 2147483648'),
        (op(b'Nh\x05'), 'damaged'),
        (op(b']' * 100 + b'a' * 99), 'containers more than 64 deep'),
        (op(b']\x94h\x00a'), 'contains itself'),
        (op(b'N') + b'more', '4 bytes follow the end'),
        (b'PK\x03\x04 no zip at all', 'damaged|zip'),
    ],
)
def test_damaged_files_are_told_in_one_sentence(tmp_path, content, words):
    with pytest.raises(Damaged, match=words) as caught:
        pickles.read(write(tmp_path / 'f', content))
    assert '\n' not in str(caught.value) and str(tmp_path / 'f') in str(caught.value)


def test_truncated_anywhere(tmp_path):
    content = pickle.dumps(tree(), 4)
    for length in range(1, len(content), 37):
        with pytest.raises(Damaged):
            pickles.read(write(tmp_path / 'f', content[:length]))
    with pytest.raises(pickles.ConfigError, match='missing cannot be read .No such file'):
        pickles.read(tmp_path / 'missing')


def test_arrays_must_have_the_bytes_they_claim(tmp_path):
    content = pickle.dumps(np.zeros((2, 3), np.float32), 4)
    assert content.count(b'K\x02K\x03\x86') == 1
    with pytest.raises(Refused, match=r'shape \[200, 3\] and type float32 with 24 bytes'):
        pickles.read(write(tmp_path / 'f', content.replace(b'K\x02K\x03\x86', b'K\xc8K\x03\x86')))


def test_shared_containers_cost_no_more_than_they_are(tmp_path):
    x = [np.ones(3)]
    for _ in range(50):  # 2^50 paths
        x = [x, x]
    got = pickles.read(write(tmp_path / 'f', pickle.dumps(x, 4)))
    assert got[0] is got[1]


# ---- PyTorch: its two formats, written out
class Storage:
    def __init__(self, key, data):
        self.key, self.data = key, data


class TorchPickler(pickle.Pickler):
    legacy, kinds = False, {}

    def persistent_id(self, x):
        if isinstance(x, Storage):
            return ('storage', self.kinds[x.data.dtype.name], x.key, 'cpu', x.data.size) + (
                (None,) if self.legacy else ()
            )


class Tensor:
    """View of a storage."""

    def __init__(self, storage, offset, size, stride):
        self.args = storage, offset, size, stride, False, collections.OrderedDict()

    def __reduce__(self):
        return sys.modules['torch._utils']._rebuild_tensor_v2, self.args


@pytest.fixture
def torch_file(monkeypatch, tmp_path):
    """write(kind, object) -> path."""
    stand_in(monkeypatch, 'torch._utils._rebuild_tensor_v2', lambda *a: None)
    size = stand_in(
        monkeypatch,
        'torch.Size',
        type('Size', (tuple,), {'__reduce__': lambda x: (type(x), (tuple(x),))}),
    )
    kinds = {
        n: stand_in(monkeypatch, f'torch.{k}Storage', type(k, (), {}))
        for n, k in (('float32', 'Float'), ('int64', 'Long'), ('bfloat16', 'BFloat16'))
    }
    monkeypatch.setattr(TorchPickler, 'kinds', kinds)

    def make(kind, value, storages):
        def dumped(x, legacy=False):
            file = io.BytesIO()
            pickler = TorchPickler(file, 2)
            pickler.legacy = legacy
            pickler.dump(x)
            return file.getvalue()

        path = tmp_path / f'{kind}.pth'
        if kind == 'zip':
            with zipfile.ZipFile(path, 'w') as z:
                z.writestr('archive/data.pkl', dumped(value))
                z.writestr('archive/byteorder', 'little')
                for s in storages:
                    z.writestr(f'archive/data/{s.key}', s.data.tobytes())
                z.writestr('archive/version', '3\n')
            return path
        machine = {
            'protocol_version': 1001,
            'little_endian': True,
            'type_sizes': {'short': 2, 'int': 4, 'long': 4},
        }
        head = (
            b''.join(dumped(x) for x in (0x1950A86A20F9469CFC6C, 1001, machine))
            + dumped(value, True)
            + dumped([s.key for s in storages])
        )
        return write(
            path,
            head + b''.join(struct.pack('<q', s.data.size) + s.data.tobytes() for s in storages),
        )

    make.size = size
    return make


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_pytorch_files(torch_file, kind):
    numbers = np.arange(24, dtype=np.float32)
    a, b, c = (
        Storage('0', numbers),
        Storage('1', np.arange(3)),
        Storage('2', np.ones(2, ml_dtypes.bfloat16)),
    )
    weights = collections.OrderedDict(
        [
            ('w', Tensor(a, 0, (2, 3, 4), (12, 4, 1))),
            ('part', Tensor(a, 1, (4, 2), (1, 12))),
            ('n', Tensor(b, 1, (), ())),
            ('h', Tensor(c, 0, (2,), (1,))),
            ('no', Tensor(b, 0, (0, 5), (5, 1))),
        ]
    )
    weights._metadata = {'version': 1}  # as Module.state_dict leaves it
    path = torch_file(
        kind, {'state_dict': weights, 'epoch': 3, 'shape': torch_file.size((1, 2))}, [a, b, c]
    )
    got = pickles.read(path)
    same(
        got,
        {
            'state_dict': {
                'w': numbers.reshape(2, 3, 4),
                'part': np.stack([numbers[1:5], numbers[13:17]], 1),
                'n': np.array(1),
                'h': np.ones(2, ml_dtypes.bfloat16),
                'no': np.zeros((0, 5), np.int64),
            },
            'epoch': 3,
            'shape': (1, 2),
        },
    )
    for cut in (1, 20, 200):
        with pytest.raises(Damaged):
            pickles.read(write(path.with_suffix('.cut'), path.read_bytes()[:-cut]))


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_hostile_pytorch_files(torch_file, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = Storage('0', np.arange(4, dtype=np.float32))
    for value, words in (
        ({'a': Tensor(s, 0, (2,), (1,)), 'b': Call(os.system, 'touch ran')}, r'posix\.system'),
        (Tensor(s, 2, (3,), (1,)), r'tensor of shape \[3\] at 2 of a storage of 4'),
        (Tensor(s, 0, (1 << 40, 1 << 40), (0, 0)), 'storage of 4 numbers'),
        (Tensor(s, 0, (2,), (-1,)), 'strides'),
        (Tensor(s, -1, (2,), (1,)), 'at -1'),
    ):
        with pytest.raises(Refused, match=words):
            pickles.read(torch_file(kind, value, [s]))
    with pytest.raises(Damaged):
        pickles.read(
            torch_file(
                kind, Tensor(s, 0, (2,), (1,)), [Storage('0', np.arange(3, dtype=np.float32))]
            )
        )
    assert not (tmp_path / 'ran').exists()
