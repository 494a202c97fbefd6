"""Files made to harm: each is refused in one sentence, within a second and 100 MB.

They are written byte by byte, since no honest writer makes them, and read in processes of their
own, which a crash may end.
"""

import json
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# CPU seconds: an attack costs more, and a busy machine makes a second of half a second.
SECONDS, MEGABYTES = 5.0, 100

# Reads each file in a process of its own: {name: (exit status, message, seconds, megabytes)}.
READ = """
import json, os, resource, sys
from vatt_jax.config import ConfigError
from vatt_jax.importers import mmv

def read(path, report):
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    begin = resource.getrusage(resource.RUSAGE_SELF)
    try:
        mmv.open_checkpoint(path)
        message = 'read'
    except ConfigError as error:
        message = str(error)
    end = resource.getrusage(resource.RUSAGE_SELF)
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    megabytes = (end.ru_maxrss - begin.ru_maxrss) / 1024
    with open(report, 'w') as file:
        json.dump([message, seconds, megabytes], file)

found = {}
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            read(path, path + '.report')
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    try:
        with open(path + '.report') as file:
            found[os.path.basename(path)] = [status, *json.load(file)]
    except FileNotFoundError:
        found[os.path.basename(path)] = [status, 'ended without a word', 0, 0]
print(json.dumps(found))
"""


def program(*opcodes):
    """A pickle of protocol 4."""
    return b'\x80\x04' + b''.join(opcodes) + b'.'


def text(value):
    """BINUNICODE."""
    encoded = value.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def name(module, attribute):
    """STACK_GLOBAL."""
    return text(module) + text(attribute) + b'\x93'


def long(value):
    """LONG4."""
    encoded = value.to_bytes((value.bit_length() + 8) // 8, 'little')
    return b'\x8b' + struct.pack('<I', len(encoded)) + encoded


def nested_tuples(depth):
    return b')' + b'\x85' * depth


def doubled(begin, opcode, times):
    """A container that holds another one twice, and that one a third one twice, and so on."""
    return begin + b''.join(b'\x94h' + bytes([i]) + opcode for i in range(times))


def doubled_lists(times):
    code = b']'
    for i in range(times):
        # MEMOIZE, POP; a new list of two references to the one before.
        code += b'\x940](h' + bytes([i]) + b'h' + bytes([i]) + b'e'
    return code


def reconstructed(shape):
    """An array of this shape (opcodes of a tuple), with no bytes."""
    return b''.join(
        [
            name('numpy._core.multiarray', '_reconstruct'),
            name('numpy', 'ndarray') + b'K\x00\x85C\x01b\x87R',
            b'(K\x01' + shape,
            name('numpy', 'dtype') + text('f4') + b'\x89\x88\x87R',
            b'\x89C\x00tb',
        ]
    )


def with_module(module, value=b'K\x01'):
    """{'params': {module: {'w': value}}, 'state': {}}."""
    inner = b'}' + text('w') + value + b's'
    params = b'}' + text(module) + inner + b's'
    return b'}' + text('params') + params + b's' + text('state') + b'}s'


TUPLES = doubled(b')', b'\x86', 55)
ORDERED = name('collections', 'OrderedDict')
INTEGER = long(1 << (8 << 20))
PICKLES = {
    'deep tuple as a key': program(b'}', nested_tuples(200_000), b'K\x01s'),
    'deep tuple in a set': program(b'\x8f(', nested_tuples(200_000), b'\x90'),
    'deep tuple in a frozenset': program(b'(', nested_tuples(200_000), b'\x91'),
    'deep tuple as a value': program(nested_tuples(200_000)),
    'deep tuple in a pair': program(ORDERED, b']', nested_tuples(200_000), b'K\x01\x86a\x85R'),
    'deep tuple as a state': program(ORDERED, b')R', nested_tuples(200_000), b'b'),
    'deep lists': program(b']' * 200_000 + b'a' * 199_999),
    'deep calls': program((ORDERED + b'}K\x01') * 2000 + b'}' + b's\x85R' * 2000),
    'doubled tuples as a key': program(b'}', TUPLES, b'K\x01s'),
    'doubled tuples as one of several keys': program(b'}(', TUPLES, b'K\x01u'),
    'doubled tuples in a set': program(b'\x8f(', TUPLES, b'\x90'),
    'doubled tuples in a frozenset': program(b'(', TUPLES, b'\x91'),
    'doubled tuples in a set made by a call': program(
        name('builtins', 'set'), b']', TUPLES, b'a\x85R'
    ),
    'doubled tuples in a pair': program(ORDERED, b']', TUPLES, b'K\x01\x86a\x85R'),
    'doubled frozensets': program(b'(K\x01\x91' + b'\x94(h\x00\x91' * 3),
    'doubled lists': program(doubled_lists(60)),
    'doubled lists as a name': program(doubled_lists(60), text('a'), b'\x93'),
    'doubled lists in a call': program(ORDERED, doubled_lists(60), b'K\x01\x86R'),
    'doubled lists as a shape': program(reconstructed(doubled_lists(60))),
    'doubled lists as a type': program(name('numpy', 'dtype'), doubled_lists(60), b'\x85R'),
    'doubled lists put into a number': program(b'K\x01', doubled_lists(60), b'a'),
    'doubled lists as a state': program(b'K\x01', doubled_lists(60), b'b'),
    'doubled mappings as a key': program(b'}', ORDERED, b'}', b'K\x01', TUPLES, b's\x85RK\x01s'),
    'long integer': program(INTEGER),
    'shape of long integers': program(
        reconstructed(b'(' + INTEGER + b'\x94' + b'h\x00' * 1000 + b't')
    ),
    'shape of many integers': program(
        reconstructed(b'(' + long(1 << 60) + b'\x94' + b'h\x00' * 100_000 + b't')
    ),
    # Hashes of integers are their remainders by 2⁶¹ - 1.
    'integers of one hash as keys': program(
        b'}(' + b''.join(long((2**61 - 1) * (2**60 + i)) + b'N' for i in range(20_000)) + b'u'
    ),
    'name of 20 MB as a key': program(with_module('n' * (20 << 20))),
    'name of 20 MB of a function': program(name('n' * (20 << 20), 'n')),
    'name of 20 MB of an opcode': program(b'c' + b'n' * (20 << 20) + b'\nn\n'),
    'name with terminal codes': program(with_module('a\x1b[2J\nb\u202e')),
    'function with terminal codes': program(name('os\x1b[2J\n', 'system')),
    'text of 20 MB as an array': program(with_module('a', text('t' * (20 << 20)))),
    'bytes copied again and again': program(
        name('builtins', 'bytearray') + b'\x94',
        b'B' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) + b'\x85\x94',
        b'h\x00h\x01R' * 10_000,
    ),
    'text copied again and again': program(
        name('_codecs', 'encode') + b'\x94',
        text('a' * (1 << 20)) + text('latin1') + b'\x86\x94',
        b'h\x00h\x01R' * 10_000,
    ),
    'sets copied again and again': program(
        name('builtins', 'set') + b'\x94',
        b'](' + b''.join(b'J' + struct.pack('<i', i) for i in range(20_000)) + b'e\x85\x94',
        b'h\x00h\x01R' * 10_000,
    ),
    'long memo': program(b'Nr' + struct.pack('<I', (1 << 32) - 1)),
    'long frame': b'\x80\x04\x95' + b'\xff' * 7 + b'\x00N.',
    'list that holds itself': program(b']\x94h\x00a'),
    'marks alone': program(b'(' * 200_000),
    'pops below a mark': program(b'N(0000'),
    'infinity of names': program(
        b'}(' + b''.join(text(f'{i}\x1b') + b'N' for i in range(20_000)) + b'u'
    ),
}


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """{name of a file: (exit status, message, seconds, megabytes)}."""
    folder = tmp_path_factory.mktemp('hostile')
    paths = []
    for title, content in PICKLES.items():
        # Nothing in these files may reach Python's own reader, not even that of the tests.
        path = folder / title.replace(' ', '_')
        path.write_bytes(content)
        paths.append(path)
    paths += write_archives(folder)
    command = [sys.executable, '-c', READ, *map(str, paths)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def write_archives(folder):
    """PyTorch files: one whose storages are the same bytes, and one with a long name."""
    torch = b''.join([b'\x80\x02', b'ctorch\nFloatStorage\n\x94', b'('])
    for i in range(50):
        torch += b'(' + text('storage') + b'h\x00' + text(str(i)) + text('cpu')
        torch += b'J' + struct.pack('<i', 1 << 18) + b'tQ'
    overlapping = folder / 'overlapping_archive'
    with zipfile.ZipFile(overlapping, 'w') as archive:
        archive.writestr('a/data.pkl', torch + b't.')
        archive.writestr('a/data/0', bytes(1 << 20))
        for i in range(1, 50):
            entry = zipfile.ZipInfo(f'a/data/{i}')
            first = archive.getinfo('a/data/0')
            for field in ('header_offset', 'file_size', 'compress_size', 'CRC'):
                setattr(entry, field, getattr(first, field))
            archive.filelist.append(entry)
        archive._didModify = True
    long_name = folder / 'archive_with_terminal_codes'
    with zipfile.ZipFile(long_name, 'w') as archive:
        archive.writestr('a\x1b[2J/data.pkl', b'\x80\x02N.')
        archive.writestr('a\x1b[2J/byteorder', 'big')
    return [overlapping, long_name]


@pytest.mark.parametrize('title', [*PICKLES, 'overlapping archive', 'archive with terminal codes'])
def test_it_is_refused_in_one_sentence_at_little_cost(outcomes, title):
    status, message, seconds, megabytes = outcomes[title.replace(' ', '_')]
    assert status == 0, message
    assert message != 'read'
    assert message.isprintable(), message
    assert len(message) < 1000
    assert seconds < SECONDS, message
    assert megabytes < MEGABYTES, message


def test_the_files_are_what_they_say():
    """Python's own reader takes the harmless ones: the opcodes above are pickles."""
    assert pickle.loads(program(with_module('a'))) == {'params': {'a': {'w': 1}}, 'state': {}}
    assert pickle.loads(program(doubled_lists(2))) == [[[], []], [[], []]]
    array = pickle.loads(program(reconstructed(b'K\x00\x85')))
    assert array.shape == (0,)
    assert array.dtype == np.float32
