"""Bottom-up-attention's tsv files: a line per picture, arrays in base64 of float32."""

from __future__ import annotations

import base64
import binascii
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from data_pipelines.errors import DataError
from data_pipelines.regions.pictures import Picture, as_shares

# The columns, in this order; the files have no header.
FIELDS = ('image_id', 'image_w', 'image_h', 'num_boxes', 'boxes', 'features')
# What ViLBERT's extractor adds where it keeps the probabilities.
CLASSES = 'cls_prob'


class Tsv(Mapping[str, Picture]):
    """Pictures of a tsv file by their image_id.

    Only where each line begins is kept in memory: opening reads the file once, a picture reads its
    line. Lines are split at tabs, not read by `csv`, whose fields are limited to 131,072
    characters: a picture of 36 regions has 393,216.

    Args:
        path: the file.
        fields: its columns; some files have more.

    Raises:
        DataError: a line has other columns, or two lines have one image_id.
    """

    def __init__(self, path: str | os.PathLike, fields: tuple[str, ...] = FIELDS) -> None:
        lacking = [field for field in FIELDS if field not in fields]
        if lacking:
            raise DataError(f'fields: expected {", ".join(FIELDS)} among them, lacking {lacking}')
        self.path = pathlib.Path(path)
        self.fields = fields
        self._starts: dict[str, int] = {}
        start = 0
        try:
            with open(self.path, 'rb') as file:
                for number, line in enumerate(file, 1):
                    self._note(line, start, number)
                    start += len(line)
        except OSError as error:
            raise DataError(f'{self.path} cannot be read ({error.strerror or error})') from error

    def _note(self, line: bytes, start: int, number: int) -> None:
        """Remember where a line begins."""
        if not line.strip():
            return
        values = line.rstrip(b'\r\n').split(b'\t')
        name = values[self.fields.index('image_id')] if len(values) == len(self.fields) else b''
        where = f'{self.path}, line {number}'
        if not name:
            raise DataError(
                f'{where}: expected {len(self.fields)} columns between tabs '
                f'({", ".join(self.fields)}), got {len(values)}'
            )
        text = name.decode('utf-8', 'backslashreplace')
        if text in self._starts:
            raise DataError(f'{where}: image_id {text} is in the file twice')
        self._starts[text] = start

    def __getitem__(self, name: str) -> Picture:
        with open(self.path, 'rb') as file:
            file.seek(self._starts[name])
            line = file.readline()
        values = dict(zip(self.fields, line.rstrip(b'\r\n').split(b'\t'), strict=True))
        return parse(values, f'{self.path}, image_id {name}')

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)


def parse(values: Mapping[str, Any], where: str) -> Picture:
    """One record of bottom-up attention: a line of a tsv file, or a value of ViLBERT's lmdb.

    Args:
        values: {column: what stands there}, bytes or what they mean; arrays in base64, or as they
            are.
        where: names the record in errors.

    Raises:
        DataError: a column is missing or damaged.
    """
    try:
        width, height = float(values['image_w']), float(values['image_h'])
        count = int(values['num_boxes'])
        name = values['image_id']
        boxes, features = values['boxes'], values['features']
    except KeyError as error:
        raise DataError(f'{where}: there is no {error}; expected {", ".join(FIELDS)}') from None
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f'{where}: image_w, image_h, num_boxes: expected numbers ({error})'
        ) from None
    classes = None
    if CLASSES in values:
        classes = rows_of(values[CLASSES], count, f'{where}: {CLASSES}')
    text = name.decode('utf-8', 'backslashreplace') if isinstance(name, bytes) else str(name)
    corners = as_shares(rows_of(boxes, count, f'{where}: boxes'), width, height, where)
    return Picture(text, rows_of(features, count, f'{where}: features'), corners, classes)


def rows_of(encoded: Any, count: int, where: str) -> Float[np.ndarray, 'N F']:
    """Base64 of float32 (or an array as it is) as `count` rows.

    Raises:
        DataError: it is no base64, or its numbers do not make so many rows.
    """
    if isinstance(encoded, np.ndarray):
        if encoded.dtype.kind not in 'fiu':
            raise DataError(f'{where}: expected numbers, got {encoded.dtype}')
        numbers = encoded.astype(np.float32).ravel()
    else:
        try:
            # Without `validate`, as encodebytes puts line ends between.
            data = base64.b64decode(encoded)
            numbers = np.frombuffer(data, '<f4')
        except (binascii.Error, TypeError, ValueError) as error:
            raise DataError(f'{where}: expected base64 of float32 numbers ({error})') from None
    if count < 1 or not numbers.size or numbers.size % count:
        raise DataError(
            f'{where}: expected rows for num_boxes = {count}, got {numbers.size} numbers'
        )
    return numbers.reshape(count, -1)
