"""Sentences -> word numbers. Three kinds, one interface; 0 is padding and 1 the unknown word in all of them.

`words` is the tokenizer of VATT: ASCII punctuation deleted, lower case, split at white space, vocabulary look-up, no begin
or end marks. It needs nothing but Python; the other two import their libraries when made.
"""

from __future__ import annotations

import base64
import collections
import io
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PAD, UNKNOWN = 0, 1
_DELETE = str.maketrans('', '', string.punctuation)


def split_words(text: str) -> list[str]:
    """'It's HOT, now!' -> ['its', 'hot', 'now']."""
    return text.translate(_DELETE).lower().split()


class Tokenizer:
    """size: numbers in use, padding and unknown included (rows of a word table). spec: JSON-able, see `from_spec`."""

    kind = ''
    size = 0

    def encode(self, texts: Sequence[str], words: int) -> np.ndarray:
        """n sentences -> int32 [n, words], cut or filled with 0."""
        out = np.zeros((len(texts), words), np.int32)
        for row, numbers in zip(out, self._numbers(texts)):
            row[: len(numbers)] = numbers[:words]
        return out

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        raise NotImplementedError

    def to_spec(self) -> dict[str, Any]:
        raise NotImplementedError


class Words(Tokenizer):
    """vocabulary: the words numbered first, first + 1, …; any other word is number `unknown`."""

    kind = 'words'

    def __init__(self, vocabulary: Sequence[str], first: int = 2, unknown: int = UNKNOWN):
        self.vocabulary, self.first, self.unknown = list(vocabulary), first, unknown
        self._number = {word: i + first for i, word in enumerate(self.vocabulary)}
        if len(self._number) != len(self.vocabulary):
            raise ValueError('the vocabulary of a words tokenizer holds a word twice')
        self.size = len(self.vocabulary) + first

    @classmethod
    def from_table(cls, words: Sequence[str]) -> Words:
        """The tokenizer of a word table whose row i is words[i]: `<pad>` first, `<unk>` anywhere (official VATT vocabularies).
        Raises ValueError when either is not there."""
        words = list(words)
        if not words or words[0] != '<pad>' or '<unk>' not in words:
            raise ValueError(
                f'a word table begins with <pad> and has <unk>; this one begins with {words[:1]} and '
                f'{"has" if "<unk>" in words else "lacks"} <unk>'
            )
        return cls(words[1:], 1, words.index('<unk>'))

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Words:
        """The `size` - 2 most frequent words, the most frequent first, ties in alphabetical order."""
        count = collections.Counter(word for text in texts for word in split_words(text))
        return cls(
            [
                word
                for word, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[
                    : size - 2
                ]
            ]
        )

    def _numbers(self, texts):
        return (
            [self._number.get(word, self.unknown) for word in split_words(text)] for text in texts
        )

    def to_spec(self):
        numbers = (
            {}
            if (self.first, self.unknown) == (2, UNKNOWN)
            else {'first': self.first, 'unknown': self.unknown}
        )
        return {'kind': self.kind, 'size': self.size, 'vocabulary': self.vocabulary, **numbers}


class WordPiece(Tokenizer):
    """BERT-style pieces, lower-cased. model: the JSON text of a `tokenizers` tokenizer with [PAD] 0 and [UNK] 1."""

    kind = 'wordpiece'

    def __init__(self, model: str):
        self._model = _library('tokenizers', self.kind).Tokenizer.from_str(model)
        self._json = model
        self.size = self._model.get_vocab_size()
        _check_special(
            self.kind, self._model.token_to_id('[PAD]'), self._model.token_to_id('[UNK]')
        )

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> WordPiece:
        t = _library('tokenizers', cls.kind)
        model = t.Tokenizer(t.models.WordPiece(unk_token='[UNK]'))
        model.normalizer = t.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
        model.decoder = t.decoders.WordPiece()
        model.train_from_iterator(
            texts,
            t.trainers.WordPieceTrainer(
                vocab_size=size, special_tokens=['[PAD]', '[UNK]'], show_progress=False
            ),
        )
        return cls(model.to_str())

    def _numbers(self, texts):
        return [e.ids for e in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def to_spec(self):
        return {'kind': self.kind, 'size': self.size, 'model': self._json}


class SentencePiece(Tokenizer):
    """model: the bytes of a `sentencepiece` model trained with padding 0 and unknown 1."""

    kind = 'sentencepiece'

    def __init__(self, model: bytes):
        self._bytes = model
        self._model = _library('sentencepiece', self.kind).SentencePieceProcessor(model_proto=model)
        self.size = self._model.get_piece_size()
        _check_special(self.kind, self._model.pad_id(), self._model.unk_id())

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> SentencePiece:
        """`size` is an upper limit: a small corpus gives fewer pieces."""
        writer = io.BytesIO()
        _library('sentencepiece', cls.kind).SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=writer,
            vocab_size=size,
            hard_vocab_limit=False,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=-1,
            eos_id=-1,
            normalization_rule_name='nmt_nfkc_cf',
            minloglevel=2,
        )
        return cls(writer.getvalue())

    def _numbers(self, texts):
        return self._model.encode(list(texts))

    def to_spec(self):
        return {
            'kind': self.kind,
            'size': self.size,
            'model': base64.b64encode(self._bytes).decode(),
        }


KINDS: dict[str, type] = {t.kind: t for t in (Words, WordPiece, SentencePiece)}


def train(kind: str, texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of this kind with at most `size` numbers. Raises ValueError for an unknown kind or no text at all."""
    if kind not in KINDS:
        raise ValueError(f'tokenizer {kind!r} is unknown; kinds are {", ".join(KINDS)}')
    if size < 3:
        raise ValueError(
            f'a vocabulary of {size} has no room: 0 is padding, 1 the unknown word, so it needs at least 3'
        )
    texts = [text for text in texts if text.strip()]
    if not texts and kind != Words.kind:
        raise ValueError(
            f'a {kind} tokenizer cannot be trained without any text; use --tokenizer=words'
        )
    return KINDS[kind].train(texts, size)


def from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `to_spec` described. Raises ValueError for an unknown kind."""
    kind = spec.get('kind')
    if kind == Words.kind:
        return Words(spec['vocabulary'], spec.get('first', 2), spec.get('unknown', UNKNOWN))
    if kind == WordPiece.kind:
        return WordPiece(spec['model'])
    if kind == SentencePiece.kind:
        return SentencePiece(base64.b64decode(spec['model']))
    raise ValueError(f'tokenizer spec of kind {kind!r} is unknown; kinds are {", ".join(KINDS)}')


def _library(name: str, kind: str) -> Any:
    try:
        return __import__(name)
    except ImportError as e:
        raise ImportError(
            f'a {kind} tokenizer needs the package {name!r}; install it, or use the words tokenizer'
        ) from e


def _check_special(kind: str, pad: int | None, unknown: int | None) -> None:
    if (pad, unknown) != (PAD, UNKNOWN):
        raise ValueError(
            f'this {kind} model numbers padding {pad} and unknown {unknown}; they must be {PAD} and {UNKNOWN}'
        )
