"""Word vectors from files in word2vec's formats, text and binary.

They go into the word table of a run that starts (config.init_words). Text: a word and its numbers
on each line, separated by spaces, after a line `words width` or without it (as GloVe's). Binary:
that line, then for each word its letters, a space and float32 numbers, with or without a line break
behind them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer as tokenizers


def read(path: str | os.PathLike) -> tuple[list[str], Float[np.ndarray, 'V width']]:
    """Read a file of word vectors.

    Returns:
        The V words in the order of the file, and their vectors, float32.

    Raises:
        ConfigError: The file is neither format, or ends early.
    """
    try:
        with open(path, 'rb') as file:
            data = file.read()
    except OSError as error:
        raise ConfigError(
            f'config.init_words={os.fspath(path)} cannot be read ({error.strerror})'
        ) from None
    # Bytes throughout: a binary file is not text, and a line break may be part of a vector.
    first_line, _, body = data.partition(b'\n')
    sizes = first_line.split()
    # A line of GloVe's is a word and many numbers, so two integers alone are the header.
    has_header = len(sizes) == 2 and all(size.isdigit() for size in sizes)
    if not has_header:
        width = len(first_line.rstrip().split(b' ')) - 1
        return _read_text(data, width, path, None)
    count, width = int(sizes[0]), int(sizes[1])
    # Both formats have the header. In the text format a word and `width` numbers follow.
    first_entry = body.partition(b'\n')[0].rstrip().split(b' ')
    if len(first_entry) == width + 1 and _are_numbers(first_entry[1:]):
        return _read_text(body, width, path, count)
    return _read_binary(body, count, width, path)


def _are_numbers(values: list[bytes]) -> bool:
    try:
        for value in values:
            float(value)
    except ValueError:
        return False
    return bool(values)


def _read_text(
    data: bytes, width: int, path: str | os.PathLike, count: int | None
) -> tuple[list[str], np.ndarray]:
    """Read lines of a word and `width` numbers. count: what the header says."""
    words: list[str] = []
    rows: list[np.ndarray] = []
    # Bytes split at line breaks alone; str.splitlines would split at U+2028 and others as well.
    for number, line in enumerate(data.splitlines(), start=1):
        parts = line.rstrip().rsplit(b' ', width)  # from behind: some words hold spaces
        try:
            if width < 1 or len(parts) != width + 1:
                raise ValueError
            rows.append(np.array(parts[1:], np.float64).astype(np.float32))
        except ValueError:
            raise ConfigError(
                f'config.init_words={os.fspath(path)}: vector {number} is not a word and {width} '
                'numbers; expected word2vec text or binary'
            ) from None
        # word2vec cuts long words at a number of bytes, which can split a character.
        words.append(parts[0].decode('utf-8', 'replace'))
    if count is not None and count != len(words):
        raise ConfigError(
            f'config.init_words={os.fspath(path)} says that it holds {count} vectors and holds '
            f'{len(words)}; is it cut off?'
        )
    if not rows:
        return words, np.zeros((0, max(width, 0)), np.float32)
    return words, np.stack(rows)


def _read_binary(
    data: bytes, count: int, width: int, path: str | os.PathLike
) -> tuple[list[str], np.ndarray]:
    """Read `count` entries of a word, a space and `width` little-endian float32 numbers."""
    words: list[str] = []
    vectors = np.zeros((count, width), np.float32)
    start = 0
    for i in range(count):
        word_end = data.find(b' ', start)
        vector_start = word_end + 1
        vector_end = vector_start + 4 * width  # float32: four bytes each
        if word_end < 0 or vector_end > len(data):
            raise ConfigError(
                f'config.init_words={os.fspath(path)} says that it holds {count} vectors of '
                f'{width} and ends in vector {i + 1}'
            )
        # Some writers put a line break behind each vector.
        words.append(data[start:word_end].lstrip(b'\n').decode('utf-8', 'replace'))
        vectors[i] = np.frombuffer(data, '<f4', width, vector_start)
        start = vector_end
    return words, vectors


def tokenizer(path: str | os.PathLike) -> tokenizers.Words:
    """Return the tokenizer whose words are those of the file, in its order.

    A file that begins with <pad> and has <unk> gives the numbers of its rows, as the official
    tables have them; other words begin at 2.
    """
    words, _ = read(path)
    if words[:1] == ['<pad>']:
        return tokenizers.Words.from_table(words)
    # The tokenizer takes no word twice; dict.fromkeys keeps the first of each, in order.
    unique = list(dict.fromkeys(words))
    return tokenizers.Words(unique)


def fill(
    path: str | os.PathLike, params: Mapping[str, Any], spec: Mapping[str, Any]
) -> tuple[Any, str]:
    """Put the vectors of a file into the word tables of a model.

    Rows of words that the file lacks keep their initial values.

    Args:
        path: The file, `config.init_words`.
        params: The model's parameters, arrays with shardings.
        spec: The tokenizer's, whose numbers are the rows of a table.

    Returns:
        The parameters, and what was done, in a clause.

    Raises:
        ConfigError: The tokenizer has no words, none of its words is in the file, or the model has
            no word table of this width.
    """
    words, vectors = read(path)
    words_tokenizer = tokenizers.from_spec(spec)
    # A vector belongs to a word: the pieces of other tokenizers are parts of words.
    if not isinstance(words_tokenizer, tokenizers.Words):
        raise ConfigError(
            "config.init_words: expected config.model.inputs.text.tokenizer 'words', got "
            f'{words_tokenizer.kind!r}, whose pieces have no vectors'
        )
    pairs = _rows_of_words(words, words_tokenizer)
    if not pairs:
        raise ConfigError(
            f'config.init_words={os.fspath(path)}: none of its {len(words)} words is in the '
            'vocabulary (which is in lower case)'
        )
    flat = flatten_dict(dict(params))
    # Found by the parameter's name, since the modules around it differ between models.
    table_paths = [key for key in flat if key[-1] == 'word_table']
    if not table_paths:
        raise ConfigError('config.init_words: this model has no word table')
    for key in table_paths:
        table_width = flat[key].shape[1]
        if table_width != vectors.shape[1]:
            raise ConfigError(
                f'config.init_words={os.fspath(path)} has vectors of {vectors.shape[1]} numbers '
                f'and {"/".join(key)} rows of {table_width}; set word_width of the text tower to '
                f'{vectors.shape[1]}'
            )
        flat[key] = _fill_table(flat[key], vectors, pairs)
    summary = f'{len(pairs)} of {words_tokenizer.size} words with vectors of {os.fspath(path)}'
    return unflatten_dict(flat), summary


def _rows_of_words(words: list[str], words_tokenizer: tokenizers.Words) -> list[tuple[int, int]]:
    """Return (row of the word table, row of the file) of each word that both have."""
    file_rows: dict[str, int] = {}
    for i, word in enumerate(words):
        file_rows.setdefault(word, i)  # the first of a word that comes twice
    pairs = []
    for number, word in enumerate(words_tokenizer.vocabulary, start=words_tokenizer.first):
        if word in file_rows:
            pairs.append((number, file_rows[word]))
    # A table of official layout: padding has a row too.
    if words_tokenizer.first == 1 and '<pad>' in file_rows:
        pairs.append((0, file_rows['<pad>']))
    return pairs


def _fill_table(table: jax.Array, vectors: np.ndarray, pairs: list[tuple[int, int]]) -> jax.Array:
    """Return the table [V D] with the file's vectors in the rows of `pairs`, sharded as it was."""
    given = np.zeros(table.shape, np.float32)  # [V D]
    is_known = np.zeros(len(table), bool)
    for row, source in pairs:
        if row < len(table):  # a table may be smaller than the vocabulary
            given[row] = vectors[source]
            is_known[row] = True

    def select(initial: jax.Array, given: jax.Array, is_known: jax.Array) -> jax.Array:
        return jnp.where(is_known[:, None], given, initial)

    # Under jit, so that each device gets its own part of the table.
    return jax.jit(select, out_shardings=table.sharding)(table, given, is_known)
