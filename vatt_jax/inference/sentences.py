"""Sentences of users as the numbers of their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer as tokenizers


def list_texts(value: Any, where: str) -> tuple[list[Any], bool]:
    """(sentences, whether a single one was given).

    Raises:
        ConfigError: it is neither a sentence nor a list.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        return [value], True
    if isinstance(value, (bytes, Mapping)) or not np.iterable(value):
        raise ConfigError(
            f'{where}: expected strings, got {type(value).__name__}; pass a sentence or a list'
        )
    return list(value), False


class SentenceReader:
    """Sentences -> word numbers, with a warning where words are lost.

    Args:
        tokenizer: of the model; None where its checkpoint carries none.
        length: words that the model reads.
        tell: warns once for each key.
    """

    def __init__(self, tokenizer: Any, length: int, tell: Callable[[str, str], None]):
        self._tokenizer, self._length, self._tell = tokenizer, length, tell

    def words(self, sentences: Sequence[Any], where: str) -> Int32[np.ndarray, 'N 1 L']:
        """The word numbers of N sentences, one candidate each.

        Raises:
            ConfigError: they are no strings, or the model has no tokenizer.
        """
        for sentence in sentences:
            if not isinstance(sentence, str):
                raise ConfigError(f'{where}: expected strings, got {type(sentence).__name__}')
        if self._tokenizer is None:
            raise ConfigError(
                f'{where}: this checkpoint carries no tokenizer; import it again with '
                '--vocabulary=FILE'
            )
        is_cut = self._tokenizer.is_cut(list(sentences), self._length)
        self._tell_cut(sentences, is_cut, where)
        numbers = self._tokenizer.encode(list(sentences), self._length)
        self._tell_unknown(sentences, numbers, where)
        return numbers[:, None]

    def _tell_cut(self, sentences: Sequence[str], is_cut: np.ndarray, where: str) -> None:
        if is_cut.any():
            self._tell(
                'cut',
                f'{where}: {is_cut.sum()} of {len(sentences)} sentences have more than the '
                f'{self._length} words that this model reads; the rest is left out, first of '
                f'{sentences[int(is_cut.argmax())][:200]!r}',
            )

    def _tell_unknown(
        self, sentences: Sequence[str], numbers: Int32[np.ndarray, 'N L'], where: str
    ) -> None:
        unknown = getattr(self._tokenizer, 'unknown', tokenizers.UNKNOWN)
        is_word = numbers != tokenizers.PAD
        # An empty sentence, such as a caption that is missing, has none either.
        is_unknown = ((numbers == unknown) | ~is_word).all(-1)
        if is_unknown.any():
            first = sentences[int(is_unknown.argmax())][:200]
            self._tell(
                'unknown words',
                f'{where}: {is_unknown.sum()} of {len(sentences)} sentences have no word of the '
                f'vocabulary, first {first!r}; sentences of as many unknown words have one '
                'embedding, whatever they say',
            )
