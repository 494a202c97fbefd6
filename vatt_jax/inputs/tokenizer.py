"""Sentences -> word numbers. Five kinds, one interface.

`words` is the tokenizer of VATT: ASCII punctuation deleted, lower case, split at white space,
vocabulary look-up, no begin or end marks. It needs nothing but Python; the others import their
libraries when made. Of `words`, `wordpiece` and `sentencepiece` 0 is padding and 1 the unknown
word. `clip` and `siglip` number as the released models do, with marks of begin and end.
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib
import io
import itertools
import json
import os
import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

from vatt_jax import extras
from vatt_jax.config import ConfigError
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

    def is_cut(self, texts: Sequence[str], words: int) -> Bool[np.ndarray, ' N']:
        """Return which sentences lose something when they are encoded in `words` numbers."""
        # One more, to see whether there is a next one.
        return self.encode(texts, words + 1)[:, words] != PAD

    def decode(self, numbers: Int[np.ndarray, 'N L']) -> list[str]:
        """Return the texts of N rows, each up to its first 0, as far as numbers remember them."""
        rows = np.asarray(numbers)
        lengths = np.cumprod(rows != PAD, axis=1).sum(1)
        return [self._text(row[:length].tolist()) for row, length in zip(rows, lengths)]

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        raise NotImplementedError

    def _text(self, numbers: list[int]) -> str:
        raise ConfigError(
            f'the tokenizer {self.kind!r} makes no text of numbers here; use words, wordpiece or '
            'sentencepiece'
        )

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

    def _text(self, numbers: list[int]) -> str:
        return ' '.join(self._word(number) for number in numbers)

    def _word(self, number: int) -> str:
        # Rows of a word table beyond the vocabulary are no words.
        is_word = number != self.unknown and self.first <= number < self.size
        return self.vocabulary[number - self.first] if is_word else '<unk>'

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

    def _text(self, numbers: list[int]) -> str:
        return str(self._model.decode(numbers, skip_special_tokens=False))

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

    def _text(self, numbers: list[int]) -> str:
        # The library ends the process at a number that it does not have.
        return str(self._model.decode([number for number in numbers if number < self.size]))

    def to_spec(self) -> dict[str, Any]:
        return {
            'kind': self.kind,
            'size': self.size,
            # A protocol buffer; base64 lets it travel in the JSON of a checkpoint.
            'model': base64.b64encode(self._bytes).decode(),
        }


START, END = '<|startoftext|>', '<|endoftext|>'
# The words of CLIP's pattern: English contractions, letters, single digits, everything else.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Of the released file, which holds more merges than its vocabulary of 49,408 has room for.
CLIP_MERGES = 49_152 - 256 - 2


class ClipBPE(Tokenizer):
    """CLIP's byte-level pairs, lower-cased: begin, pieces, end, then 0.

    The end has the largest number of all. A sentence that is too long loses pieces, never its end.
    HTML entities are resolved as in the released code, twice; what ftfy repairs beyond Unicode's
    normal form (text decoded in a wrong encoding) is left as it is.
    """

    kind = 'clip'
    # Every byte has a number, so no word is unknown.
    unknown = -1

    def __init__(self, model: str):
        """Load the JSON text of a `tokenizers` tokenizer, such as a `tokenizer.json`."""
        self._model = _library('tokenizers', self.kind).Tokenizer.from_str(model)
        self._json = model
        self.size = self._model.get_vocab_size()
        self._start, self._end = self._model.token_to_id(START), self._model.token_to_id(END)
        if (self._start, self._end) != (self.size - 2, self.size - 1):
            raise ValueError(
                f'expected a clip tokenizer that numbers {START} and {END} last; this one of '
                f'{self.size} numbers has {self._start} and {self._end}'
            )

    @classmethod
    def from_merges(cls, merges: Sequence[tuple[str, str]]) -> ClipBPE:
        """Number bytes, bytes that end a word, merges and the two marks, as CLIP does."""
        library = _library('tokenizers', cls.kind)
        alphabet = _byte_characters()
        pieces = [*alphabet, *(f'{character}</w>' for character in alphabet)]
        pieces += [first + second for first, second in merges]
        # Two merges may make one piece.
        pieces = list(dict.fromkeys([*pieces, START, END]))
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        model = library.Tokenizer(
            library.models.BPE(
                vocab=vocabulary, merges=list(merges), end_of_word_suffix='</w>', unk_token=END
            )
        )
        _set_clip_steps(library, model)
        return cls(model.to_str())

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> ClipBPE:
        """Train with at most `size` numbers, of which 514 are bytes and marks.

        Raises:
            ValueError: the size leaves no room for a merge.
        """
        num_fixed = 2 * 256 + 2
        if size <= num_fixed:
            raise ValueError(f'a clip tokenizer needs more than {num_fixed} numbers, got {size}')
        library = _library('tokenizers', cls.kind)
        model = library.Tokenizer(library.models.BPE(end_of_word_suffix='</w>'))
        _set_clip_steps(library, model)
        trainer = library.trainers.BpeTrainer(
            vocab_size=size - 2,
            end_of_word_suffix='</w>',
            initial_alphabet=_byte_characters(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        merges = [tuple(pair) for pair in json.loads(model.to_str())['model']['merges']]
        return cls.from_merges(merges[: size - num_fixed])

    def encode(self, texts: Sequence[str], words: int) -> Int32[np.ndarray, 'N L']:
        """Return the numbers of N sentences: begin, pieces, end, 0 to the length `words`."""
        out = np.zeros((len(texts), words), np.int32)
        for row, numbers in zip(out, self._numbers(texts)):
            marked = [self._start, *numbers[: words - 2], self._end][:words]
            row[: len(marked)] = marked
        return out

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        cleaned = [html.unescape(html.unescape(text)).strip() for text in texts]
        encodings = self._model.encode_batch(cleaned, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def to_spec(self) -> dict[str, Any]:
        return {'kind': self.kind, 'size': self.size, 'model': self._json}


def _byte_characters() -> list[str]:
    """A printable character for each byte, in the order of CLIP's (GPT-2's) vocabulary.

    Bytes that are printable stand for themselves and come first.
    """
    printable = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _set_clip_steps(library: Any, model: Any) -> None:
    """What comes before the pairs: one space for white space, lower case, words, bytes."""
    steps = library.normalizers
    model.normalizer = steps.Sequence(
        [steps.NFC(), steps.Replace(library.Regex(r'\s+'), ' '), steps.Lowercase()]
    )
    splits = library.pre_tokenizers
    model.pre_tokenizer = splits.Sequence(
        [
            splits.Split(library.Regex(_CLIP_WORDS), behavior='removed', invert=True),
            splits.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = library.decoders.ByteLevel()


class Siglip(Tokenizer):
    """SigLIP's SentencePiece, lower-cased: pieces, end, and the end again as padding.

    As in big_vision (`eos="sticky", pad_value=1`): the last number of every sentence is the end.
    """

    kind = 'siglip'
    END = 1

    def __init__(self, model: bytes):
        """Load a `sentencepiece` model whose mark of the end has the number 1 (c4_en)."""
        self._bytes = model
        self._model = _library('sentencepiece', self.kind).SentencePieceProcessor(model_proto=model)
        self.size = self._model.get_piece_size()
        self.unknown = self._model.unk_id()
        if self._model.eos_id() != self.END:
            raise ValueError(
                f'expected a siglip tokenizer whose end has the number {self.END}, got '
                f'{self._model.eos_id()}'
            )

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Siglip:
        """Train a model with at most `size` pieces: a small corpus gives fewer."""
        writer = io.BytesIO()
        _library('sentencepiece', cls.kind).SentencePieceTrainer.train(
            sentence_iterator=(text.lower() for text in texts),
            model_writer=writer,
            vocab_size=size,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=cls.END,
            unk_id=2,
            bos_id=-1,
            # Errors only.
            minloglevel=2,
        )
        return cls(writer.getvalue())

    def encode(self, texts: Sequence[str], words: int) -> Int32[np.ndarray, 'N L']:
        """Return the numbers of N sentences, each cut to `words` - 1 and filled with the end."""
        out = np.full((len(texts), words), self.END, np.int32)
        for row, numbers in zip(out, self._numbers(texts)):
            pieces = numbers[: words - 1]
            row[: len(pieces)] = pieces
        return out

    def is_cut(self, texts: Sequence[str], words: int) -> Bool[np.ndarray, ' N']:
        # Padding has the number of the end, so the next piece is looked at.
        return self.encode(texts, words + 1)[:, words - 1] != self.END

    def _numbers(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        return self._model.encode([text.lower() for text in texts])

    def to_spec(self) -> dict[str, Any]:
        return {
            'kind': self.kind,
            'size': self.size,
            'model': base64.b64encode(self._bytes).decode(),
        }


KINDS: dict[str, Any] = {
    Words.kind: Words,
    WordPiece.kind: WordPiece,
    SentencePiece.kind: SentencePiece,
    ClipBPE.kind: ClipBPE,
    Siglip.kind: Siglip,
}


def from_file(kind: str, path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of a released model.

    Args:
        kind: `clip` or `siglip`.
        path: of clip a `tokenizer.json`, or the merges (`bpe_simple_vocab_16e6.txt.gz`,
            `merges.txt`); of siglip a SentencePiece model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another kind.
    """
    content = pathlib.Path(path).read_bytes()
    if kind == Siglip.kind:
        return Siglip(content)
    if content[:2] == b'\x1f\x8b':
        content = gzip.decompress(content)
    text = content.decode('utf-8')
    if text.lstrip().startswith('{'):
        return ClipBPE(text)
    pairs: list[tuple[str, str]] = []
    # The first line says what the file is.
    for line in text.split('\n')[1 : 1 + CLIP_MERGES]:
        pieces = line.split()
        if len(pieces) == 2:
            pairs.append((pieces[0], pieces[1]))
        elif pieces:
            raise ValueError('expected a line of the version, and lines of two pieces')
    return ClipBPE.from_merges(pairs)


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
    if kind == ClipBPE.kind:
        return ClipBPE(spec['model'])
    if kind in (SentencePiece.kind, Siglip.kind):
        return KINDS[kind](base64.b64decode(spec['model']))
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
