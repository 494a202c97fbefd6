"""A folder that an older version prepared -> one of the present version, in place.

    python -m data_pipelines.upgrade data/mine [data/others …]

Older folders are read as they are; this makes them open at once and take less memory and disk. It
writes the tables of the index and of the byte offsets anew, from the old ones alone: no record is
read and no frame decoded. The old tables go when the new ones are whole. It may be killed at any
moment and started again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.preparation.console import Console
from data_pipelines.storage import columns, index_writer, piece_tables, record_index, version_1
from data_pipelines.storage.columns import TableWriter, write_json
from data_pipelines.storage.record_index import Index
from data_pipelines.storage.records import Prepared
from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError
from vatt_jax.object_store import check_local
from vatt_jax.terminal import printable, use_plain_characters

# Bytes of an old table that are in memory at a time.
_BLOCK = 1 << 22


def upgrade(folder: str, quiet: bool = False) -> dict[str, int]:
    """Give a prepared folder the tables of the present version.

    Args:
      folder: made by `prepare` or `dmvr`.
      quiet: print nothing.

    Returns:
      {split: number of records} of the splits whose tables were written; none where the folder was
      of the present version already.

    Raises:
      DataError: the folder is not a prepared one, or its tables or records are damaged.
    """
    say = Console(quiet)
    check_local(folder, 'FOLDER')
    path = pathlib.Path(folder)
    prepared = Prepared(path)
    splits = list(prepared.meta['splits'])
    written = {}
    if prepared.version == record_index.VERSION:
        say(f'{path} is of version {record_index.VERSION} already; nothing to do.')
    else:
        _remove_unfinished(path)
        for split in splits:
            written[split] = _upgrade_split(prepared, split, say)
        # The commit point: from here on the new tables are read.
        write_json(path / 'index.json', {**prepared.meta, 'version': record_index.VERSION})
    # Also of a run that was killed behind the commit point.
    freed = _remove_old(path, splits)
    if written:
        say(f'{path} is of version {record_index.VERSION} now; old tables removed: {_size(freed)}.')
    return written


def _upgrade_split(prepared: Prepared, split: str, say: Console) -> int:
    """Write the new tables of a split, where they are not there yet; its number of records."""
    old_index = version_1.index_path(prepared.folder, split)
    index_folder = record_index.folder_of(prepared.folder, split)
    pieces_folder = piece_tables.folder_of(prepared.folder, split)
    if columns.is_table(index_folder) and not _is_of(index_folder, old_index):
        # An older version prepared the folder anew after a killed run of this command.
        shutil.rmtree(index_folder)
        shutil.rmtree(pieces_folder, ignore_errors=True)
    if not columns.is_table(index_folder):
        _upgrade_index(old_index, index_folder)
    index = Index.open(index_folder)
    if not columns.is_table(pieces_folder):
        _upgrade_pieces(prepared, split, index)
    # Opened, so that nothing old goes before the new is known to be whole.
    piece_tables.PieceTables(prepared.folder, split, index.frames, prepared.again)
    say(
        f'{split}: {len(index)} records; index {_size(_bytes(index_folder))}, byte offsets '
        f'{_size(_bytes(pieces_folder))}'
    )
    return len(index)


def _is_of(new: pathlib.Path, old: pathlib.Path) -> bool:
    """Whether two indices are of the same records."""
    return np.array_equal(Index.open(new).crc, version_1.checksums(old))


def _upgrade_index(old: pathlib.Path, new: pathlib.Path) -> None:
    """Copy the columns of an index; they hold the same, each in a file of its own."""
    try:
        # An .npz file is a zip file of uncompressed .npy files, whose checksums zipfile compares.
        with zipfile.ZipFile(old) as archive, TableWriter(new) as table:
            labels: dict[str, int | None] = {}
            shapes = {}
            for member in archive.namelist():
                name = member.removesuffix('.npy')
                kind, _, label = name.partition('/')
                if kind == 'labels':
                    name = record_index.label_column(len(labels))
                    shape = _copy_column(archive, member, table, name)
                    labels[label] = shape[1] if len(shape) > 1 else None
                else:
                    shapes[name] = _copy_column(archive, member, table, name.replace('/', '.'))
            counts = {
                'records': shapes['crc'][0],
                'sentences': shapes['sentence_start'][0],
                'segments': shapes['segment_start'][0],
                'folds': shapes['folds'][1] if 'folds' in shapes else 0,
            }
            index_writer.publish(table, counts, labels)
    except (zipfile.BadZipFile, FileNotFoundError, KeyError, ValueError) as e:
        raise DataError(
            f'{old} cannot be read ({e}); prepare the data again with --overwrite'
        ) from None


def _copy_column(
    archive: zipfile.ZipFile, member: str, table: TableWriter, name: str
) -> tuple[int, ...]:
    """Copy one array of an .npz file into a new column; its shape."""
    with archive.open(member) as file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if is_fortran or len(shape) not in (1, 2):
            raise ValueError(f'{member} is no column')
        column = table.column(name, dtype, *shape[1:])
        # Whole rows at a time; a row is a few kB at most.
        row_bytes = max(1, dtype.itemsize * int(np.prod(shape[1:])))
        block_bytes = max(1, _BLOCK // row_bytes) * row_bytes
        while block := file.read(block_bytes):
            column.extend(np.frombuffer(block, dtype))
    return shape


def _upgrade_pieces(prepared: Prepared, split: str, index: Index) -> None:
    """Write the byte offsets of a split from its old tables."""
    if not version_1.places_path(prepared.folder, split).is_file():
        # Older still: these are found by reading the records.
        prepared.add_byte_offsets(split)
        return
    # Refuses files of records that were replaced since: offsets into them would be worth nothing.
    prepared.pieces(split, index)
    tables = version_1.PieceTables(
        prepared.folder, split, index.frames, index.samples, prepared.meta['rate'], prepared.again
    )
    with prepared.pieces_writer(split) as writer:
        for i in range(len(tables)):
            writer.add(*tables.place(i), *tables.record(i))


def _remove_unfinished(path: pathlib.Path) -> None:
    """Delete what a killed run of this command was about to write."""
    for kind in ('index', 'pieces'):
        for leftover in path.glob(f'{kind}-*{columns.TEMPORARY}*'):
            shutil.rmtree(leftover)


def _remove_old(path: pathlib.Path, splits: Sequence[str]) -> int:
    """Delete the old tables of a folder of the present version; how many bytes they took."""
    old_tables = []
    for split in splits:
        for find in (version_1.index_path, version_1.places_path, version_1.pieces_path):
            old_tables.append(find(path, split))
    finished = json.loads((path / 'prepare.json').read_text(encoding='utf-8'))
    # The list of what `prepare --overwrite` may delete; the index of DMVR records has none.
    if 'files' in finished:
        new = {table.name for table in path.iterdir() if columns.is_table(table)}
        old = {table.name for table in old_tables}
        finished['files'] = sorted({*finished['files'], *new} - old)
        write_json(path / 'prepare.json', finished)
    freed = 0
    for table in old_tables:
        if table.is_file():
            freed += table.stat().st_size
            table.unlink()
    return freed


def _bytes(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _size(num_bytes: int) -> str:
    """Bytes for people."""
    if num_bytes < 10**6:
        return f'{num_bytes / 1e3:.1f} kB'
    return f'{num_bytes / 1e6:.1f} MB'


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    use_plain_characters()
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.upgrade',
        allow_abbrev=False,
        description='Prepared folders of an older version -> folders of the present one, in place '
        '(docs/data.md).',
    )
    parser.add_argument('folders', nargs='+', metavar='FOLDER', help='made by prepare or dmvr')
    parser.add_argument('--quiet', action='store_true', help='print errors only')
    arguments = expand_home(sys.argv[1:] if arguments is None else arguments)
    parsed: Any = parser.parse_args(arguments)
    for folder in parsed.folders:
        try:
            upgrade(folder, parsed.quiet)
        except (DataError, ConfigError) as e:
            print(f'error: {printable(str(e))}', file=sys.stderr)
            return 2  # as argparse exits after a wrong flag
        except OSError as e:
            reason = printable(f'{folder} could not be upgraded ({e})')
            print(f'error: {reason}; the same command goes on from here', file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print('stopped; the same command goes on from here', file=sys.stderr)
            return 130  # 128 + SIGINT, as shells report it
    return 0


if __name__ == '__main__':
    sys.exit(main())
