import json
import subprocess
import sys

import numpy as np
import pytest

from vatt_jax.inputs import tokenizer

TEXTS = ["It's a DOG, a big dog!", 'the cat sat', 'a dog and a cat', '...']


def test_words_as_in_the_paper():
    t = tokenizer.train('words', TEXTS, 100)
    assert (
        t.vocabulary[:3] == ['a', 'dog', 'cat'] and 'its' in t.vocabulary
    )  # by frequency, punctuation deleted not split
    assert t.vocabulary[3:] == sorted(t.vocabulary[3:])
    got = t.encode(['A dog, barks', 'a ' * 9, ''], 4)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, [[2, 3, tokenizer.UNKNOWN, 0], [2, 2, 2, 2], [0, 0, 0, 0]])


def test_words_size_is_a_limit():
    t = tokenizer.train('words', TEXTS, 4)
    assert t.size == 4 and t.vocabulary == ['a', 'dog']


@pytest.mark.parametrize('kind', ['words', 'wordpiece', 'sentencepiece'])
def test_spec_round_trip_and_special_numbers(kind):
    t = tokenizer.train(kind, TEXTS * 20, 60)
    spec = json.loads(json.dumps(t.to_spec()))
    again = tokenizer.from_spec(spec)
    got = t.encode(TEXTS + ['☃'], 12)
    np.testing.assert_array_equal(again.encode(TEXTS + ['☃'], 12), got)
    assert spec['size'] == t.size == again.size and 3 <= t.size <= 60
    assert got.shape == (5, 12) and got.max() < t.size
    assert got[4].max() == tokenizer.UNKNOWN or kind != 'words'
    assert (got[1] != 0).sum() >= 3 and got[1, -1] == 0  # the padding comes last
    np.testing.assert_array_equal(t.encode(['THE CAT SAT'], 12)[0], got[1])  # case does not matter


def test_errors_name_the_kinds():
    with pytest.raises(ValueError, match='words, wordpiece, sentencepiece'):
        tokenizer.train('bpe', TEXTS, 10)
    with pytest.raises(ValueError, match='at least 3'):
        tokenizer.train('words', TEXTS, 2)
    with pytest.raises(ValueError, match='kinds are'):
        tokenizer.from_spec({'kind': 'x'})
    with pytest.raises(ValueError, match='without any text'):
        tokenizer.train('sentencepiece', [''], 10)


def test_missing_library_is_one_clear_sentence():
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from vatt_jax.inputs import tokenizer\ntokenizer.train('words', ['a b'], 9)\n"
        "try: tokenizer.train('wordpiece', ['a b'], 9)\nexcept ImportError as e: print(e)"
    )
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout
    assert "needs the package 'tokenizers'" in out
