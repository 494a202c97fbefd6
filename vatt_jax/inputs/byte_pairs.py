"""Byte pairs of released language models: texts -> numbers of words with a mask, and back.

The five kinds of `tokenizer` number words for training, with 0 as padding. In a language model's
vocabulary every number is a word, 0 among them, so that a mask says what is padding.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from vatt_jax import extras
from vatt_jax.config import ConfigError

TOKENIZER, VOCABULARY, MERGES = 'tokenizer.json', 'vocab.json', 'merges.txt'
END = '<|endoftext|>'


class BytePairs:
    """A tokenizer of the library `tokenizers`: GPT-2's, Llama 3's, and others of its files.

    Attributes:
        size: numbers in use.
    """

    def __init__(self, model: Any) -> None:
        """Take a `tokenizers.Tokenizer`; files are read by `find`."""
        self._model = model
        # A file may ask for padding or cutting, which here is the caller's.
        self._model.no_padding()
        self._model.no_truncation()
        self.size: int = model.get_vocab_size()

    @classmethod
    def find(cls, folder: str | os.PathLike) -> BytePairs | None:
        """The tokenizer of a folder: tokenizer.json, or vocab.json with merges.txt; None: neither.

        Raises:
            ConfigError: a file cannot be read, or is no tokenizer.
        """
        folder = pathlib.Path(folder)
        if (folder / TOKENIZER).is_file():
            return cls(_from_json(folder / TOKENIZER))
        if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
            return cls(_from_merges(folder / VOCABULARY, folder / MERGES))
        return None

    def encode(
        self, texts: Sequence[str], marks: bool = True
    ) -> tuple[Int32[np.ndarray, 'B N'], Bool[np.ndarray, 'B N']]:
        """Numbers of texts, and which of them are there: shorter texts are padded at the end.

        Args:
            texts: B of them.
            marks: whether to add the marks that the file adds (Llama: one that begins a text;
                GPT-2: none).
        """
        found = [e.ids for e in self._model.encode_batch(list(texts), add_special_tokens=marks)]
        lengths = np.array([len(numbers) for numbers in found], np.int32)
        longest = int(lengths.max(initial=0))
        ids = np.zeros((len(found), longest), np.int32)
        for row, numbers in zip(ids, found):
            row[: len(numbers)] = numbers
        return ids, np.arange(longest) < lengths[:, None]

    def decode(
        self, ids: Int[np.ndarray, 'B N'], lengths: Int[np.ndarray, ' B'] | None = None
    ) -> list[str]:
        """Texts of numbers, without marks; of each row the first `lengths`."""
        rows = np.asarray(ids)
        counts = [rows.shape[1]] * len(rows) if lengths is None else np.asarray(lengths).tolist()
        # Rows of a word table beyond the vocabulary, as some releases have, stand for no text.
        known = [
            [number for number in row[:count].tolist() if number < self.size]
            for row, count in zip(rows, counts)
        ]
        return self._model.decode_batch(known, skip_special_tokens=True)

    def number(self, piece: str) -> int:
        """The number of a piece or mark.

        Raises:
            ConfigError: there is none.
        """
        number = self._model.token_to_id(piece)
        if number is None:
            raise ConfigError(f'this tokenizer of {self.size} numbers has no piece {piece!r}')
        return number


def _from_json(path: pathlib.Path) -> Any:
    """The tokenizer of a tokenizer.json."""
    try:
        return _library().Tokenizer.from_str(path.read_text(encoding='utf-8'))
    # The library raises plain Exceptions.
    except Exception as error:
        raise _no_tokenizer(path, error) from error


def _from_merges(vocabulary: pathlib.Path, merges: pathlib.Path) -> Any:
    """GPT-2's tokenizer, of the two files of its release."""
    library = _library()
    try:
        numbers = json.loads(vocabulary.read_text(encoding='utf-8'))
        pairs = []
        for line in merges.read_text(encoding='utf-8').split('\n'):
            # The first line says what the file is.
            if line and not line.startswith('#version'):
                first, second = line.split(' ')
                pairs.append((first, second))
        model = library.Tokenizer(library.models.BPE(vocab=numbers, merges=pairs))
    # The library raises plain Exceptions, and a line without two pieces is a ValueError.
    except Exception as error:
        raise _no_tokenizer(vocabulary, error) from error
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    # The one mark of GPT-2; a vocabulary without it has none.
    if END in numbers:
        model.add_special_tokens([END])
    return model


def _no_tokenizer(path: pathlib.Path, error: Exception) -> ConfigError:
    return ConfigError(
        f'{path} is no tokenizer ({type(error).__name__}: {str(error)[:200]!r}); fetch it again, '
        f'or give {TOKENIZER}, or {VOCABULARY} with {MERGES}'
    )


def _library() -> Any:
    with extras.needed('text', 'a tokenizer of byte pairs'):
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
    return tokenizers
