"""PyTorch's files: pickles that refer to storages, which follow in the same file."""

from __future__ import annotations

import io
import mmap
import pathlib
import zipfile
from typing import Any

from vatt_jax.importers.messages import escaped, shown
from vatt_jax.importers.pickles.conversion import converted
from vatt_jax.importers.pickles.errors import Damaged, errors_of
from vatt_jax.importers.pickles.machine import load_one
from vatt_jax.importers.pickles.stand_ins import Storage

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file from before 1.6
VERSION = 1001  # second pickle of such a file


def read_zip(path: pathlib.Path) -> Any:
    """Read a PyTorch file since 1.6: a zip of `data.pkl` and one file for each storage."""
    with errors_of(path), zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # All names of an archive begin with one folder, whose name varies.
        found = [name for name in entries if name == 'data.pkl' or name.endswith('/data.pkl')]
        if len(found) != 1:
            raise Damaged(
                f'{path}: expected a PyTorch file (torch.save), got a zip file without a data.pkl'
            )
        root = found[0].removesuffix('data.pkl')
        remaining = path.stat().st_size

        def content(name: str) -> bytes:
            nonlocal remaining
            entry = entries.get(root + name)
            if entry is None:
                raise Damaged(f'{path} lacks {escaped(root + name)}')
            # What is stored as it is cannot expand to more memory than the file has bytes, unless
            # several entries claim the same ones.
            remaining -= entry.file_size
            if entry.compress_type != zipfile.ZIP_STORED or remaining < 0:
                raise Damaged(
                    f'{path}: {escaped(root + name)} is compressed, or shares its bytes with '
                    'another entry; torch.save writes neither'
                )
            return archive.read(entry)

        # Older versions do not write it.
        if f'{root}byteorder' in entries and content('byteorder') != b'little':
            raise Damaged(f'{path} was written on a big-endian machine; save it on another one')
        storages: dict[str, Storage] = {}
        value = load_one(path, io.BytesIO(content('data.pkl')), storages)
        for key, storage in storages.items():
            storage.data = content(f'data/{key}')
            if len(storage.data) != storage.bytes:
                raise Damaged(
                    f'{path}: {escaped(f"{root}data/{key}")}: expected {storage.bytes} bytes, got '
                    f'{len(storage.data)}'
                )
        return converted(path, value)


def read_legacy(path: pathlib.Path, data: mmap.mmap) -> Any:
    """Read a PyTorch file from before 1.6, after its magic number.

    Magic number, version, machine, object, list of storages as pickles one after the other; then
    the numbers of each storage.
    """
    version = load_one(path, data)
    machine = load_one(path, data)
    if (
        version != VERSION
        or not isinstance(machine, dict)
        or not machine.get('little_endian', True)
    ):
        raise Damaged(
            f'{path}: expected a PyTorch file of version {VERSION} of a little-endian '
            f'machine, got version {shown(version)} and machine {shown(machine)}'
        )
    storages: dict[str, Storage] = {}
    value = load_one(path, data, storages)
    keys = load_one(path, data)
    if (
        type(keys) is not list
        or any(type(key) is not str for key in keys)
        or set(keys) != set(storages)
        or len(set(keys)) != len(keys)
    ):
        raise Damaged(f'{path}: its list of storages is not that of its tensors')
    for key in keys:
        storage = storages[key]
        # Each storage: the number of its elements in 8 bytes, then the elements.
        count = int.from_bytes(data.read(8), 'little')
        if count != storage.count or storage.bytes > len(data) - data.tell():
            raise Damaged(
                f'{path} ends within storage {shown(key)} of {storage.count} numbers; fetch it '
                'again'
            )
        storage.data = data.read(storage.bytes)
    if data.tell() != len(data):
        raise Damaged(f'{path}: {len(data) - data.tell()} bytes follow the last storage')
    return converted(path, value)
