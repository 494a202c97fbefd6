"""Word vectors from files in word2vec's formats, text and binary: into the word table of a run that starts (config.init_words).

Text: a word and its numbers on each line, separated by spaces, after a line `words width` or without it (as GloVe's). Binary: that line, then for
each word its letters, a space and float32 numbers, with or without a line break behind them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer as tokenizers


def read(path: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """(V words in the order of the file, float32 [V width]). Raises ConfigError for a file that is neither format, or ends early."""
    try:
        with open(path, 'rb') as f:
            data = f.read()
    except OSError as e:
        raise ConfigError(
            f'config.init_words={os.fspath(path)} cannot be read ({e.strerror})'
        ) from None
    head, _, body = data.partition(b'\n')
    sizes = head.split()
    if len(sizes) == 2 and all(s.isdigit() for s in sizes):
        count, width = map(int, sizes)
        first = body.partition(b'\n')[0].rstrip().split(b' ')
        return (
            _text(body, width, path, count)
            if len(first) == width + 1 and _numbers(first[1:])
            else _binary(body, count, width, path)
        )
    return _text(data, len(head.rstrip().split(b' ')) - 1, path, None)


def _numbers(values: list[bytes]) -> bool:
    try:
        return bool(values) and all(float(v) is not None for v in values)
    except ValueError:
        return False


def _text(data: bytes, width: int, path: Any, count: int | None) -> tuple[list[str], np.ndarray]:
    words, rows = [], []
    for number, line in enumerate(data.splitlines()):
        parts = line.rstrip().rsplit(b' ', width)  # from behind: some words hold spaces
        try:
            if width < 1 or len(parts) != width + 1:
                raise ValueError
            rows.append(np.array(parts[1:], np.float64).astype(np.float32))
        except ValueError:
            raise ConfigError(
                f'config.init_words={os.fspath(path)}: vector {number + 1} is not a word and {width} numbers; word2vec text or '
                'binary is wanted'
            ) from None
        words.append(parts[0].decode('utf-8', 'replace'))
    if count is not None and count != len(words):
        raise ConfigError(
            f'config.init_words={os.fspath(path)} says that it holds {count} vectors and holds {len(words)}; is it cut off?'
        )
    return words, np.stack(rows) if rows else np.zeros((0, max(width, 0)), np.float32)


def _binary(data: bytes, count: int, width: int, path: Any) -> tuple[list[str], np.ndarray]:
    words, vectors, at = [], np.zeros((count, width), np.float32), 0
    for i in range(count):
        end = data.find(b' ', at)
        if end < 0 or end + 1 + 4 * width > len(data):
            raise ConfigError(
                f'config.init_words={os.fspath(path)} says that it holds {count} vectors of {width} and ends in vector {i + 1}'
            )
        words.append(data[at:end].lstrip(b'\n').decode('utf-8', 'replace'))
        vectors[i] = np.frombuffer(data, '<f4', width, end + 1)
        at = end + 1 + 4 * width
    return words, vectors


def tokenizer(path: str | os.PathLike) -> tokenizers.Words:
    """The tokenizer whose words are those of the file, in its order. A file that begins with <pad> and has <unk> gives the numbers of its rows, as
    the official tables have them; other words begin at 2."""
    words, _ = read(path)
    return (
        tokenizers.Words.from_table(words)
        if words[:1] == ['<pad>']
        else tokenizers.Words(list(dict.fromkeys(words)))
    )


def fill(
    path: str | os.PathLike, params: Mapping[str, Any], spec: Mapping[str, Any]
) -> tuple[Any, str]:
    """(params whose word tables have the file's vector in the row of each word that the tokenizer `spec` numbers, what was done in a clause).

    Rows of words that the file lacks keep their initial values. Raises ConfigError where nothing fits.
    """
    words, vectors = read(path)
    own = tokenizers.from_spec(spec)
    if own.kind != 'words':
        raise ConfigError(
            f"config.init_words wants config.model.inputs.text.tokenizer 'words'; it is {own.kind!r}, whose pieces have no vectors"
        )
    place = {word: i for i, word in reversed(list(enumerate(words)))}
    pairs = [(n + own.first, place[w]) for n, w in enumerate(own.vocabulary) if w in place]
    if own.first == 1 and '<pad>' in place:  # a table of official layout: padding has a row too
        pairs.append((0, place['<pad>']))
    if not pairs:
        raise ConfigError(
            f'config.init_words={os.fspath(path)}: none of its {len(words)} words is in the vocabulary (which is in lower case)'
        )
    flat, found = flatten_dict(dict(params)), False
    for key, table in flat.items():
        if key[-1] != 'word_table':
            continue
        if table.shape[1] != vectors.shape[1]:
            raise ConfigError(
                f'config.init_words={os.fspath(path)} has vectors of {vectors.shape[1]} numbers and {"/".join(key)} rows '
                f'of {table.shape[1]}; set word_width of the text tower to {vectors.shape[1]}'
            )
        given, known = np.zeros(table.shape, np.float32), np.zeros(len(table), bool)
        inside = [(n, i) for n, i in pairs if n < len(table)]
        rows, source = np.array(inside, np.int64).reshape(-1, 2).T
        given[rows], known[rows] = vectors[source], True
        flat[key] = jax.jit(
            lambda t, g, k: jnp.where(k[:, None], g, t), out_shardings=table.sharding
        )(table, given, known)
        found = True
    if not found:
        raise ConfigError('config.init_words: this model has no word table')
    return unflatten_dict(
        flat
    ), f'{len(pairs)} of {own.size} words with vectors of {os.fspath(path)}'
