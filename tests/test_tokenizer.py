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


@pytest.mark.parametrize('kind', ['words', 'wordpiece', 'sentencepiece'])
def test_numbers_are_text_again(kind):
    trained = tokenizer.train(kind, TEXTS * 20, 60)
    numbers = trained.encode(['the cat sat', 'a dog', '', 'the cat', 'a'], 20)
    # What stands behind a 0 is not read; a row that no word has.
    numbers[1, 19], numbers[4, 0] = numbers[0, 0], 999
    texts = trained.decode(numbers)
    assert texts[0] == 'the cat sat'
    assert texts[2:4] == ['', 'the cat']
    assert texts[1] == 'a dog' and texts[4] in ('', '<unk>')
    np.testing.assert_array_equal(trained.encode(texts[:1], 20)[0], numbers[0])


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


MERGES = [('c', 'a'), ('ca', 't</w>'), ('d', 'o'), ('do', 'g</w>')]


def clip_numbers(text, merges):
    """OpenAI's SimpleTokenizer on plain ASCII, pair by pair; every word of letters."""
    characters = [chr(code) for code in range(ord('!'), ord('~') + 1)]
    pieces = [*characters, *['?'] * 162, *(f'{c}</w>' for c in characters), *['?'] * 162]
    pieces += [''.join(pair) for pair in merges]
    numbers = []
    for word in text.lower().split():
        parts = [*word[:-1], f'{word[-1]}</w>']
        for first, second in merges:  # the first merge is the most urgent
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == (first, second):
                    parts[i : i + 2] = [first + second]
                i += 1
        numbers += [pieces.index(part) for part in parts]
    return [len(pieces), *numbers, len(pieces) + 1]


def test_clip_numbers_are_those_of_the_released_tokenizer(tmp_path):
    lines = ['#version: 0.2', *(' '.join(pair) for pair in MERGES), '']
    (tmp_path / 'merges.txt').write_text('\n'.join(lines))
    clip = tokenizer.from_file('clip', tmp_path / 'merges.txt')
    assert clip.size == 512 + len(MERGES) + 2
    got = clip.encode(['A  CAT\nand a dog'], 12)[0]
    expected = clip_numbers('a cat and a dog', MERGES)
    np.testing.assert_array_equal(got, expected + [0] * (12 - len(expected)))
    # Digits and punctuation are words by themselves, and entities what they stand for.
    np.testing.assert_array_equal(
        clip.encode(['12!', '&amp;amp;'], 5),
        [
            [clip.size - 2, *(256 + ord(c) - ord('!') for c in '12!')] + [clip.size - 1],
            [clip.size - 2, 256 + ord('&') - ord('!'), clip.size - 1, 0, 0],
        ],
    )


def test_clip_keeps_the_end_of_a_sentence_that_is_too_long():
    clip = tokenizer.train('clip', TEXTS * 20, 530)
    assert clip.size <= 530
    texts = ['a dog and a cat sat', 'a']
    numbers = clip.encode(texts, 4)
    chex.assert_type(numbers, np.int32)
    np.testing.assert_array_equal(numbers.argmax(-1), [3, 2])
    np.testing.assert_array_equal(numbers.max(-1), clip.size - 1)
    np.testing.assert_array_equal(clip.is_cut(texts, 4), [True, False])
    again = tokenizer.from_spec(json.loads(json.dumps(clip.to_spec())))
    np.testing.assert_array_equal(again.encode(texts, 4), numbers)


def test_a_tokenizer_json_is_read_and_another_one_refused(tmp_path):
    clip = tokenizer.train('clip', TEXTS * 20, 530)
    (tmp_path / 'tokenizer.json').write_text(clip.to_spec()['model'])
    again = tokenizer.from_file('clip', tmp_path / 'tokenizer.json')
    np.testing.assert_array_equal(again.encode(TEXTS, 9), clip.encode(TEXTS, 9))
    with pytest.raises(ValueError, match='numbers <|startoftext|> and <|endoftext|> last'):
        tokenizer.ClipBPE(tokenizer.train('wordpiece', TEXTS * 20, 60).to_spec()['model'])


def test_siglip_fills_with_the_end():
    siglip = tokenizer.train('siglip', TEXTS * 20, 40)
    numbers = siglip.encode(['A DOG', 'a dog', 'a dog and a cat ' * 9], 8)
    np.testing.assert_array_equal(numbers[0], numbers[1])
    np.testing.assert_array_equal(numbers[:, -1], 1)
    assert 1 not in numbers[2, :-1]
    np.testing.assert_array_equal(siglip.is_cut(['a dog', 'a dog and a cat ' * 9], 8), [0, 1])
    again = tokenizer.from_spec(json.loads(json.dumps(siglip.to_spec())))
    np.testing.assert_array_equal(again.encode(['a dog'], 8), numbers[:1])
    with pytest.raises(ValueError, match='whose end has the number 1'):
        tokenizer.Siglip(tokenizer.SentencePiece.train(TEXTS * 20, 40)._bytes)
