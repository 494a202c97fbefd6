"""Named dataset of lists with an address and a caption of each picture: CC3M, CC12M, LAION."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import media
from data_pipelines.datasets.named_dataset import AnnotationFolder, Dataset, described
from data_pipelines.errors import DataError
from data_pipelines.preparation.media_catalog import Clip
from data_pipelines.preparation.values import checked_text, is_missing, quote

# What columns are called, in lower case, likeliest first.
_ADDRESS = ('url', 'image_url', 'link')
_CAPTION = ('caption', 'text', 'top_caption', 'description', 'alt_text')
_FILE = ('file', 'filename', 'file_name', 'filepath', 'path', 'key')
# Rows of a parquet file in memory.
_ROWS_AT_ONCE = 10_000


class ImageLists(Dataset):
    """A picture is a record of one frame, with its caption. Pictures are downloaded by others
    (img2dataset with `--output_format=files`, or any script). A list says which file is whose by a
    column `file`, `path` or `key` (img2dataset's own parquet files have `key`); or the file is
    called by its address: the md5, sha1 or sha256 of it, or ROW_CRC, the row (from 0) and the
    crc32, as a common script for CC3M has it. Rows that lack a caption or have too many fields are
    listed in `skipped.json`, and so are pictures that are gone. Lists whose names hold train, val
    or test are these splits; of others, --validation and --test hold out a share.

        *.tsv                       Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv
                                    (caption, address), cc12m.tsv (address, caption), or with a
                                    header; fields are separated by tabs, quotes mean nothing
        *.parquet                   LAION, YFCC, img2dataset: columns url and caption (or TEXT)
        anywhere: the pictures
    """

    name = 'image_lists'
    title = 'Lists of addresses and captions: CC3M, CC12M, LAION, YFCC'
    suffixes = media.IMAGES

    def clips(self, folder: AnnotationFolder) -> tuple[Iterable[Clip], dict[str, list[str]]]:
        paths = folder.find_all('*.tsv', '*.parquet')
        if not paths:
            # Raises: there is none.
            folder.find_one('*.tsv', '*.parquet')
        # What is wrong with a list as a whole shows before any picture is decoded.
        return itertools.chain.from_iterable(self._clips(folder, path) for path in paths), {}

    def _clips(self, folder: AnnotationFolder, path: pathlib.Path) -> Iterator[Clip]:
        """The rows of one list that have all that is needed."""
        split = _split_of(path)
        rows = _table_rows(folder, path) if path.suffix == '.tsv' else _parquet_rows(folder, path)
        for number, row in enumerate(rows):
            if isinstance(row, str):
                folder.skipped[f'{path.name}, row {number}'] = row
                continue
            address, caption, file = (row.get(field) for field in ('address', 'caption', 'file'))
            try:
                text = '' if is_missing(caption) else checked_text(caption, '').strip()
            except DataError:
                text = ''
            names = _names_of(number, address, file)
            if not text or not names:
                lacking = 'caption' if names else 'address'
                folder.skipped[f'{path.name}, row {number}'] = f'no {lacking}'
                continue
            known = {} if is_missing(address) else {'url': str(address)}
            yield described(names, split, [text], ground_truth=known)


def _names_of(row: int, address: Any, file: Any) -> list[str]:
    """What the file of a picture may be called."""
    if not is_missing(file):
        return [str(file)]
    if is_missing(address):
        return []
    encoded = str(address).encode()
    hashes = [hashlib.new(kind, encoded).hexdigest() for kind in ('md5', 'sha1', 'sha256')]
    # The address first: it is what is listed where no file is found.
    return [str(address), *hashes, f'{row}_{zlib.crc32(encoded)}']


def _split_of(path: pathlib.Path) -> str:
    """The split that the name of a list says; '' for a share of each."""
    name = path.name.lower()
    for word, split in (('train', 'train'), ('val', 'validation'), ('test', 'test')):
        if word in name:
            return split
    return ''


def _table_rows(folder: AnnotationFolder, path: pathlib.Path) -> Iterator[Mapping[str, str] | str]:
    """Rows of a list with tabs: the fields 'address', 'caption' and 'file', or what is wrong."""
    lines = folder.open(path).lines()
    first = next(lines, '').rstrip('\n').split('\t')
    columns, is_header = _columns(first, path)
    if not is_header:
        lines = itertools.chain(['\t'.join(first)], lines)
    for line in lines:
        if not line.strip():
            continue
        fields = line.rstrip('\n').split('\t')
        if len(fields) != len(columns):
            yield f'expected {len(columns)} fields, got {len(fields)} ({quote(line.strip())!r})'
        else:
            yield {column: field.strip() for column, field in zip(columns, fields) if column}


def _columns(first: Sequence[str], path: pathlib.Path) -> tuple[list[str], bool]:
    """What the columns are ('' for others), by the first row of a list; whether it is a header."""
    if len(first) == 2:
        is_address = [field.strip().lower().startswith(('http:', 'https:')) for field in first]
        # CC3M has the caption first, CC12M the address.
        if is_address == [False, True]:
            return ['caption', 'address'], False
        if is_address == [True, False]:
            return ['address', 'caption'], False
    return _named_columns(first, path), True


def _named_columns(names: Sequence[str], path: pathlib.Path) -> list[str]:
    """What each column is, by its name; '' for others."""
    lowered = [name.strip().lower() for name in names]
    columns = [''] * len(names)
    for meaning, known in (('address', _ADDRESS), ('caption', _CAPTION), ('file', _FILE)):
        for name in known:
            if name in lowered:
                columns[lowered.index(name)] = meaning
                break
    if 'caption' not in columns or not {'address', 'file'} & set(columns):
        raise DataError(
            f'image_lists: {path}: expected an address and a caption in each row, or columns '
            f'called url (or file) and caption, got {quote(", ".join(names))}'
        )
    return columns


def _parquet_rows(folder: AnnotationFolder, path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a parquet file, some thousand in memory at a time."""
    # Comes with tensorflow-datasets, which writes the records.
    import pyarrow
    import pyarrow.parquet

    folder.note_digest(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _named_columns(names, path)
            meanings = {name: meaning for name, meaning in zip(names, columns) if meaning}
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(meanings)):
                for row in batch.to_pylist():
                    yield {meanings[name]: value for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split('\n')[0]
        raise DataError(f'image_lists: {path} is not readable as parquet: {reason}') from None
