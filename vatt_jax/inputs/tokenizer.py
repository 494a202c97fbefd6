"""Sentences -> word numbers. Three kinds, one interface; 0 is padding and 1 the unknown word.

`words` is the tokenizer of VATT: ASCII punctuation deleted, lower case, split at white space,
vocabulary look-up, no begin or end marks. It needs nothing but Python; the other two import their
libraries when made.
"""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from vatt_jax import extras
from vatt_jax.inputs.word_counts import WordCounts

PAD, UNKNOWN = 0, 1
# Deleted, not replaced by a space: "don't" becomes one word, as in the official vocabulary.
_DELETE = str.maketrans('', '', string.punctuation)


def split_words(text: str) -> list[str]:
    """Return the words of a sentence: 'It's HOT, now!' -> ['its', 'hot', 'now']."""
    return text.translate(_DELETE).lower().split()


class Tokenizer:
    """The interface of all kinds.

    Attributes:
        kind: The name in `config.model.inputs.text.tokenizer`.
        size: Numbers in use, padding and unknown included (rows of a word table).
    """

    kind = ''
    size = 0

    def encode(self, texts: Sequence[str], words: int) -> Int32[np.ndarray, 'N L']:
        """Return the numbers of N sentences, each cut to `words` or filled with 0."""
        # 0 is PAD.
        out = np.zeros((len(texts), words), np.int32)
        for row, numbers in zip(out, self._numbers(texts)):
            row[: len(numbers)] = numbers[:words]
        return out

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        raise NotImplementedError

    def to_spec(self) -> dict[str, Any]:
        """Return a JSON-able description, see `from_spec`."""
        raise NotImplementedError


class Words(Tokenizer):
    """Whole words of a vocabulary."""

    kind = 'words'

    def __init__(self, vocabulary: Sequence[str], first: int = 2, unknown: int = UNKNOWN):
        """Number the words.

        Args:
            vocabulary: The words numbered first, first + 1, …
            first: The number of the first word.
            unknown: The number of any other word.

        Raises:
            ValueError: The vocabulary holds a word twice.
        """
        self.vocabulary = list(vocabulary)
        self.first = first
        self.unknown = unknown
        self._number = {word: i + first for i, word in enumerate(self.vocabulary)}
        if len(self._number) != len(self.vocabulary):
            raise ValueError('the vocabulary of a words tokenizer holds a word twice')
        self.size = len(self.vocabulary) + first

    @classmethod
    def from_table(cls, words: Sequence[str]) -> Words:
        """Return the tokenizer of a word table whose row i is words[i].

        Official VATT vocabularies are of this form: `<pad>` first, `<unk>` anywhere.

        Raises:
            ValueError: Either is not there.
        """
        words = list(words)
        has_unknown = '<unk>' in words
        if words[:1] != ['<pad>'] or not has_unknown:
            raise ValueError(
                f'a word table begins with <pad> and has <unk>; this one begins with {words[:1]} '
                f'and {"has" if has_unknown else "lacks"} <unk>'
            )
        # `<unk>` stays in the list, so that the numbers of all others are the rows of the table. A
        # word `<unk>` cannot occur in a text: its brackets are deleted.
        return cls(words[1:], 1, words.index('<unk>'))

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Words:
        """Take the `size` - 2 most frequent words, ties in alphabetical order."""
        counts = WordCounts()
        for text in texts:
            counts.add(split_words(text))
        return cls(counts.most_frequent(size - 2))  # two numbers are padding and unknown

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        for text in texts:
            yield [self._number.get(word, self.unknown) for word in split_words(text)]

    def to_spec(self) -> dict[str, Any]:
        spec = {'kind': self.kind, 'size': self.size, 'vocabulary': self.vocabulary}
        # Left out where they are the defaults, so that older specs and new ones are equal.
        if (self.first, self.unknown) != (2, UNKNOWN):
            spec['first'] = self.first
            spec['unknown'] = self.unknown
        return spec


class WordPiece(Tokenizer):
    """BERT-style pieces, lower-cased."""

    kind = 'wordpiece'

    def __init__(self, model: str):
        """Load a model, the JSON text of a `tokenizers` tokenizer with [PAD] 0 and [UNK] 1."""
        self._model = _library('tokenizers', self.kind).Tokenizer.from_str(model)
        # Kept as it came: to_str() of another version of the library may write it otherwise.
        self._json = model
        self.size = self._model.get_vocab_size()
        _check_special(
            self.kind, self._model.token_to_id('[PAD]'), self._model.token_to_id('[UNK]')
        )

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> WordPiece:
        """Train a model with at most `size` pieces."""
        library = _library('tokenizers', cls.kind)
        model = library.Tokenizer(library.models.WordPiece(unk_token='[UNK]'))
        # BERT's own steps: clean, lower-case, strip accents, then split at white space and
        # punctuation.
        model.normalizer = library.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        model.decoder = library.decoders.WordPiece()
        trainer = library.trainers.WordPieceTrainer(
            # Special tokens are numbered first, in this order: PAD is 0 and UNK 1.
            vocab_size=size,
            special_tokens=['[PAD]', '[UNK]'],
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model.to_str())

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        # No [CLS] or [SEP]: towers add an aggregate token of their own where they have one.
        encodings = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def to_spec(self) -> dict[str, Any]:
        return {'kind': self.kind, 'size': self.size, 'model': self._json}


class SentencePiece(Tokenizer):
    """Pieces of a unigram model."""

    kind = 'sentencepiece'

    def __init__(self, model: bytes):
        """Load a `sentencepiece` model trained with padding 0 and unknown 1."""
        self._bytes = model
        self._model = _library('sentencepiece', self.kind).SentencePieceProcessor(model_proto=model)
        self.size = self._model.get_piece_size()
        _check_special(self.kind, self._model.pad_id(), self._model.unk_id())

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> SentencePiece:
        """Train a model with at most `size` pieces: a small corpus gives fewer."""
        writer = io.BytesIO()
        _library('sentencepiece', cls.kind).SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=writer,
            vocab_size=size,
            # A small corpus cannot fill the vocabulary; with the hard limit training would fail.
            hard_vocab_limit=False,
            pad_id=PAD,
            unk_id=UNKNOWN,
            # -1 switches a mark off. Padding is off by default and unknown is 0, hence all four.
            bos_id=-1,
            eos_id=-1,
            normalization_rule_name='nmt_nfkc_cf',  # cf: case folding
            # Errors only.
            minloglevel=2,
        )
        return cls(writer.getvalue())

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return self._model.encode(list(texts))

    def to_spec(self) -> dict[str, Any]:
        return {
            'kind': self.kind,
            'size': self.size,
            # A protocol buffer; base64 lets it travel in the JSON of a checkpoint.
            'model': base64.b64encode(self._bytes).decode(),
        }


KINDS: dict[str, Any] = {
    Words.kind: Words,
    WordPiece.kind: WordPiece,
    SentencePiece.kind: SentencePiece,
}


def train(kind: str, texts: Iterable[str], size: int) -> Tokenizer:
    """Train a tokenizer.

    Args:
        kind: One of KINDS.
        texts: The sentences to train on.
        size: The most numbers it may use.

    Raises:
        ValueError: The kind is unknown, the size too small, or there is no text at all.
    """
    if kind not in KINDS:
        raise ValueError(f'tokenizer {kind!r} is unknown; kinds are {", ".join(KINDS)}')
    if size < 3:
        raise ValueError(
            f'a vocabulary of {size} has no room: 0 is padding, 1 the unknown word, so it needs at '
            'least 3'
        )
    # One by one: together they may be larger than memory.
    texts = (text for text in texts if text.strip())
    first_text = list(itertools.islice(texts, 1))
    # A words tokenizer of no words maps everything to unknown, enough for data without captions.
    if not first_text and kind != Words.kind:
        raise ValueError(
            f'a {kind} tokenizer cannot be trained without any text; use --tokenizer=words'
        )
    return KINDS[kind].train(itertools.chain(first_text, texts), size)


def from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that `to_spec` described.

    Raises:
        ValueError: Its kind is unknown.
    """
    kind = spec.get('kind')
    if kind == Words.kind:
        # Older specs have neither.
        return Words(spec['vocabulary'], spec.get('first', 2), spec.get('unknown', UNKNOWN))
    if kind == WordPiece.kind:
        return WordPiece(spec['model'])
    if kind == SentencePiece.kind:
        return SentencePiece(base64.b64decode(spec['model']))
    raise ValueError(f'tokenizer spec of kind {kind!r} is unknown; kinds are {", ".join(KINDS)}')


def _library(name: str, kind: str) -> Any:
    """Import the library that a kind needs."""
    # Optional packages: `words`, the default, needs neither.
    with extras.needed('text', f'a {kind} tokenizer'):
        return importlib.import_module(name)


def _check_special(kind: str, pad: int | None, unknown: int | None) -> None:
    """Raise ValueError where a model numbers padding and unknown otherwise than all kinds do."""
    if (pad, unknown) != (PAD, UNKNOWN):
        raise ValueError(
            f'this {kind} model numbers padding {pad} and unknown {unknown}; they must be {PAD} '
            f'and {UNKNOWN}'
        )
