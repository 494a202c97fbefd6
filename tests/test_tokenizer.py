"""Tokenizers: VATT's words, WordPiece and SentencePiece behind one interface."""

import json
import re
import subprocess
import sys

import chex
import numpy as np
import pytest

from vatt_jax.inputs import tokenizer

TEXTS = ["It's a DOG, a big dog!", 'the cat sat', 'a dog and a cat', '...']


def test_words_are_numbered_by_frequency_then_by_alphabet():
    words = tokenizer.train('words', TEXTS, 100)
    assert words.vocabulary[:3] == ['a', 'dog', 'cat']
    assert words.vocabulary[3:] == sorted(words.vocabulary[3:])
    assert 'its' in words.vocabulary  # punctuation is deleted, not split at


def test_words_are_cut_and_padded():
    words = tokenizer.train('words', TEXTS, 100)
    numbers = words.encode(['A dog, barks', 'a ' * 9, ''], 4)
    chex.assert_type(numbers, np.int32)
    expected = [[2, 3, tokenizer.UNKNOWN, 0], [2, 2, 2, 2], [0, 0, 0, 0]]
    np.testing.assert_array_equal(numbers, expected)


def test_words_size_is_a_limit():
    words = tokenizer.train('words', TEXTS, 4)
    assert words.size == 4
    assert words.vocabulary == ['a', 'dog']


@pytest.mark.parametrize('kind', ['words', 'wordpiece', 'sentencepiece'])
def test_spec_round_trip_and_special_numbers(kind):
    trained = tokenizer.train(kind, TEXTS * 20, 60)
    spec = json.loads(json.dumps(trained.to_spec()))
    restored = tokenizer.from_spec(spec)
    texts = [*TEXTS, '☃']
    numbers = trained.encode(texts, 12)
    chex.assert_trees_all_equal(restored.encode(texts, 12), numbers, strict=True)
    assert spec['size'] == trained.size == restored.size
    assert 3 <= trained.size <= 60
    chex.assert_shape(numbers, (5, 12))
    chex.assert_type(numbers, np.int32)
    assert numbers.max() < trained.size
    snowman, cat = numbers[4], numbers[1]
    if kind == 'words':
        assert snowman.max() == tokenizer.UNKNOWN
    assert (cat != 0).sum() >= 3
    assert cat[-1] == 0  # the padding comes last
    np.testing.assert_array_equal(trained.encode(['THE CAT SAT'], 12)[0], cat)


def test_errors_name_the_kinds():
    with pytest.raises(ValueError, match='words, wordpiece, sentencepiece'):
        tokenizer.train('bpe', TEXTS, 10)
    with pytest.raises(ValueError, match='at least 3'):
        tokenizer.train('words', TEXTS, 2)
    with pytest.raises(ValueError, match='kinds are'):
        tokenizer.from_spec({'kind': 'x'})
    with pytest.raises(ValueError, match='without any text'):
        tokenizer.train('sentencepiece', [''], 10)


# In a process of its own: the library stays importable for the other tests of this one.
WITHOUT_LIBRARY = """
import sys
sys.modules['tokenizers'] = None  # importing it raises ImportError
from vatt_jax.inputs import tokenizer
tokenizer.train('words', ['a b'], 9)
try:
    tokenizer.train('wordpiece', ['a b'], 9)
except ImportError as error:
    print(error)
"""


def test_missing_library_is_one_clear_sentence():
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_LIBRARY], capture_output=True, text=True, check=True
    )
    assert re.match(
        r"a wordpiece tokenizer needs the extra 'text' \(.*tokenizers.*\): "
        r'pip install "tokenizers>=\S+" "sentencepiece>=\S+"\n$',
        done.stdout,
    )
