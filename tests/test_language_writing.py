"""What a causal language model writes, against all texts counted one by one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_language
from tests.tiny_language import FORMS, logits_of
from vatt_jax.config import ConfigError
from vatt_jax.models.language import CausalLM, Rules, beam_search, generate, sampling
from vatt_jax.rng import Rng

# Few words, so that all texts can be counted.
FEW = dataclasses.replace(FORMS['gpt2'], vocab=4)
PROMPT = np.array([[1, 2, 3], [3, 1, 0]], np.int32)
PROMPT_MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
LONGEST = 3


@functools.cache
def conditional():
    """{(row, words of a text): log probabilities [V] of the word after it}, by whole passes."""
    texts = np.array(list(itertools.product(range(FEW.vocab), repeat=LONGEST)), np.int32)
    table = {}
    for row in range(2):
        prompt = PROMPT[row][PROMPT_MASK[row]]
        whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
        logits = logits_of(CausalLM(FEW))(tiny_language.tree(FEW), whole)
        for text, found in zip(texts.tolist(), np.asarray(jax.nn.log_softmax(logits), np.float64)):
            for length in range(LONGEST):
                table[row, tuple(text[:length])] = found[len(prompt) - 1 + length]
    return table


def log_probability(row, text):
    return sum(conditional()[row, text[:n]][word] for n, word in enumerate(text))


def all_texts(row, ends, power):
    """(score, text) of every text, best first."""
    found = []
    for length in range(1, LONGEST + 1):
        for text in itertools.product(range(FEW.vocab), repeat=length):
            is_whole = length == LONGEST or text[-1] in ends
            if is_whole and not any(word in ends for word in text[:-1]):
                found.append((log_probability(row, text) / length**power, text))
    return sorted(found, reverse=True)


def plain_beam(row, ends, width, power):
    """The same search with lists, to the last word."""
    going, ended = [()], []
    for _ in range(LONGEST):
        longer = [(*text, word) for text in going for word in range(FEW.vocab)]
        ended += [text for text in longer if text[-1] in ends]
        longer = [text for text in longer if text[-1] not in ends]
        going = sorted(longer, key=lambda text: -log_probability(row, text))[:width]
    scored = [(log_probability(row, text) / len(text) ** power, text) for text in ended + going]
    return sorted(scored, reverse=True)[:width]


def texts_of(beams, row, ends):
    """The texts of a row, with their ends."""
    found = []
    for words, length in zip(np.asarray(beams.tokens[row]), np.asarray(beams.lengths[row])):
        with_end = length + (length < LONGEST)
        if length < LONGEST:
            assert (words[length:] == ends[0]).all()
        found.append(tuple(words[:with_end].tolist()))
    return found


def test_a_wide_beam_finds_all_texts_in_their_order():
    ends, power = (0,), 0.5
    count = len(all_texts(0, ends, power))
    beams = beam_search(
        CausalLM(FEW),
        tiny_language.tree(FEW),
        PROMPT,
        PROMPT_MASK,
        rules=Rules(LONGEST, ends),
        width=count + 1,
        length_power=power,
    )
    for row in range(2):
        expected = all_texts(row, ends, power)
        scores = np.asarray(beams.scores[row])
        np.testing.assert_allclose(scores[:count], [s for s, _ in expected], rtol=1e-4, atol=1e-5)
        assert np.isneginf(scores[count:]).all()
        # Neighbours of nearly equal scores may have changed places.
        found = texts_of(beams, row, ends)[:count]
        assert set(found) == {text for _, text in expected}
        assert found[0] == expected[0][1]


@pytest.mark.parametrize(('width', 'power'), [(2, 1.0), (3, -1.0)])
def test_a_narrow_beam_is_the_plain_search(width, power):
    """Also where it stops early: a prefix that cannot come in any more changes nothing."""
    ends = (2, 0)
    variables = tiny_language.tree(FEW)
    beams = beam_search(
        CausalLM(FEW),
        variables,
        PROMPT,
        PROMPT_MASK,
        rules=Rules(LONGEST, ends),
        width=width,
        length_power=power,
    )
    for row in range(2):
        expected = plain_beam(row, ends, width, power)
        np.testing.assert_allclose(
            beams.scores[row], [score for score, _ in expected], rtol=1e-4, atol=1e-5
        )
        assert int(beams.lengths[row, 0]) == sum(w not in ends for w in expected[0][1])


def test_greedy_text_is_the_likeliest_word_of_a_whole_pass():
    ends = (0, 3)
    written = generate(
        CausalLM(FEW), tiny_language.tree(FEW), PROMPT, PROMPT_MASK, rules=Rules(LONGEST, ends)
    )
    for row in range(2):
        text = ()
        while len(text) < LONGEST and not (text and text[-1] in ends):
            text = (*text, int(conditional()[row, text].argmax()))
        length = sum(word not in ends for word in text)
        assert int(written.lengths[row]) == length
        assert tuple(np.asarray(written.tokens[row, : len(text)]).tolist()) == text
        assert (np.asarray(written.tokens[row, len(text) :]) == ends[0]).all()
        np.testing.assert_allclose(
            written.log_probabilities[row], log_probability(row, text), rtol=1e-4, atol=1e-5
        )


def test_draws_belong_to_the_example_and_obey_the_rules():
    rules = Rules(LONGEST, temperature=0.7, top_k=2)
    model, variables = CausalLM(FEW), tiny_language.tree(FEW)
    many = 64
    rng = Rng.create(1, 0, jnp.arange(many))
    prompt = np.repeat(PROMPT[:1], many, axis=0)
    written = np.asarray(generate(model, variables, prompt, None, rng, rules=rules).tokens)
    assert len({tuple(row) for row in written.tolist()}) > 4
    for row in written.tolist():
        for n, word in enumerate(row):
            best = np.argsort(-conditional()[0, tuple(row[:n])])[:2]
            assert word in best
    # The same example in another batch.
    order = np.arange(many)[::-1]
    other = rng.replace(examples=rng.examples[order])
    found = generate(model, variables, prompt, None, other, rules=rules).tokens
    np.testing.assert_array_equal(found, written[order])


def test_top_k_and_top_p_keep_the_fewest_words():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (50, 9)), jnp.float32)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for k in (1, 4, 9, 20):
        kept = np.isfinite(sampling.keep_top_k(logits, k))
        for row in range(50):
            assert set(np.flatnonzero(kept[row])) == set(np.argsort(-logits[row])[:k])
    for p in (0.0, 0.3, 0.9, 1.0):
        kept = np.isfinite(sampling.keep_top_p(logits, p))
        for row in range(50):
            expected, together = set(), 0.0
            for word in np.argsort(-probabilities[row]):
                if expected and together >= p:
                    break
                expected.add(word)
                together += probabilities[row, word]
            assert set(np.flatnonzero(kept[row])) == expected


def test_draws_have_the_probabilities_of_the_temperature():
    logits = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
    many, temperature = 20_000, 1.5
    rng = Rng.create(3, 0, jnp.arange(many))
    drawn = sampling.draw(jnp.tile(logits, (many, 1)), rng, temperature, 0, 1.0)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    found = np.bincount(drawn, minlength=4) / many
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / many)).all()


# ---- errors
@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'new_tokens': 0}, 'Rules.new_tokens'),
        ({'new_tokens': 1, 'top_k': 2}, 'Rules.temperature: expected more than 0'),
        ({'new_tokens': 1, 'temperature': -1.0}, 'Rules.temperature'),
        ({'new_tokens': 1, 'temperature': 1.0, 'top_p': 1.5}, 'Rules.top_p'),
    ],
)
def test_rules_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Rules(**fields)


def test_what_cannot_be_written():
    form, prompt = FORMS['gpt2'], np.ones((2, 6), np.int32)
    model, variables = CausalLM(form), tiny_language.tree(form)
    with pytest.raises(ConfigError, match='a text of 16 tokens .* at most 12'):
        generate(model, variables, prompt, rules=Rules(10))
    with pytest.raises(ConfigError, match='needs an rng'):
        generate(model, variables, prompt, rules=Rules(2, temperature=1.0))
    with pytest.raises(ConfigError, match='expected Rules.temperature=0'):
        beam_search(model, variables, prompt, rules=Rules(2, temperature=1.0), width=2)
    with pytest.raises(ConfigError, match='a width of at least 1'):
        beam_search(model, variables, prompt, rules=Rules(2), width=0)
