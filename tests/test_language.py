"""The causal language model against NumPy float64; its cache; what it writes against counting."""

import dataclasses
import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests import tiny_language
from tests.tiny_language import FORMS
from vatt_jax.config import ConfigError
from vatt_jax.importers import language as importer
from vatt_jax.models.language import (
    PUBLISHED,
    Cache,
    CausalLM,
    Form,
    Rules,
    Scaling,
    beam_search,
    generate,
    sampling,
)
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

B, N = 3, 6
NAMES = tuple(FORMS)
# Row 0 is whole, row 1 begins with padding, row 2 has it within and at the end.
MASK = np.array(
    [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]],
    bool,
)


def ids(seed=0, vocab=13):
    return np.random.default_rng(seed).integers(0, vocab, (B, N)).astype(np.int32)


@functools.cache
def logits_of(model):
    """The jitted logits of a module."""
    return jax.jit(lambda variables, *inputs: model.apply(variables, *inputs).logits)


# ---- the forward pass
@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_the_definition(name):
    """Of every token that is there, as if its row held no padding."""
    form, words = FORMS[name], ids()
    logits = logits_of(CausalLM(form))(tiny_language.tree(form), words, MASK)
    weights = tiny_language.theirs(name, form)
    for row in range(B):
        expected = tiny_language.LOGITS[name](weights, form, words[row][MASK[row]])
        np.testing.assert_allclose(logits[row][MASK[row]], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('options', [{'scan': False, 'remat': 'dots'}, {'remat': 'full'}])
def test_layers_unrolled_or_recomputed_are_the_same(options):
    """Value and gradients, with dropout."""
    form, words, mask = FORMS['gpt2'], jnp.asarray(ids()), jnp.asarray(MASK)
    rng = Rng.create(0, 0, jnp.arange(B))

    def loss(variables, model):
        return jnp.sum(jnp.sin(model.apply(variables, words, mask, None, rng).logits))

    def both(model):
        return jax.jit(jax.value_and_grad(functools.partial(loss, model=model)))

    variables = tiny_language.tree(form)
    expected = both(CausalLM(form, dropout=0.3))(variables)
    found = both(CausalLM(form, dropout=0.3, **options))(variables)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dropout_belongs_to_training_and_to_each_example():
    form, words = FORMS['gpt2'], ids()
    variables = tiny_language.tree(form)
    logits = logits_of(CausalLM(form, dropout=0.5))
    plain = logits(variables, words)
    np.testing.assert_array_equal(plain, logits_of(CausalLM(form))(variables, words))
    rng = Rng.create(0, 0, jnp.arange(B))
    dropped = logits(variables, words, None, None, rng)
    assert not np.allclose(dropped, plain)
    # The same examples in another order.
    order = np.array([2, 0, 1])
    moved = logits(variables, words[order], None, None, rng.replace(examples=rng.examples[order]))
    np.testing.assert_allclose(moved, dropped[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_no_word_changes_what_comes_before_it(name):
    form, words = FORMS[name], ids()
    variables = tiny_language.tree(form)
    logits = logits_of(CausalLM(form))
    plain = logits(variables, words)
    for column in range(N):
        changed = words.copy()
        changed[:, column] = (changed[:, column] + 1) % form.vocab
        found = logits(variables, changed)
        np.testing.assert_array_equal(found[:, :column], plain[:, :column])
        assert (np.abs(found[:, column] - plain[:, column]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize('name', NAMES)
def test_nothing_sees_padding(name):
    form, words = FORMS[name], ids()
    logits = logits_of(CausalLM(form))
    changed = np.where(MASK, words, (words + 1) % form.vocab)
    variables = tiny_language.tree(form)
    plain, found = logits(variables, words, MASK), logits(variables, changed, MASK)
    np.testing.assert_array_equal(found[MASK], plain[MASK])


def test_embeddings_may_stand_in_the_place_of_words():
    form, words = FORMS['gpt2'], ids()
    variables = tiny_language.tree(form)
    embeddings = variables['params']['word_table'][words]
    logits = logits_of(CausalLM(form))
    np.testing.assert_array_equal(logits(variables, embeddings), logits(variables, words))


# From the owners' files.
@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('gpt2', 124_439_808),
        ('gpt2_medium', 354_823_168),
        ('gpt2_large', 774_030_080),
        ('gpt2_xl', 1_557_611_200),
        ('llama2_7b', 6_738_415_616),
        ('llama3_2_1b', 1_235_814_400),
    ],
)
def test_published_sizes(name, count):
    shapes = importer.abstract_variables(PUBLISHED[name]).values()
    assert sum(math.prod(like.shape) for like in shapes) == count


# ---- the cache
@pytest.mark.parametrize('name', NAMES)
def test_cached_logits_are_the_uncached(name):
    """Prompts of different lengths at once, then one word, two words, and one word."""
    form, words = FORMS[name], ids()
    mask = np.sort(MASK[:, :N], axis=1)
    mask[:, -4:] = True
    variables = tiny_language.tree(form)
    model = CausalLM(form)
    plain = logits_of(model)(variables, words, mask)

    @functools.partial(jax.jit, static_argnames=('length',))
    def apply(cache, start, length):
        part = jax.lax.dynamic_slice_in_dim(words, start, length, axis=1)
        of_part = jax.lax.dynamic_slice_in_dim(mask, start, length, axis=1)
        outputs = model.apply(variables, part, of_part, cache)
        return outputs.logits, outputs.cache

    cache, start = Cache.create(form, B, N + 2), 0
    for length in (2, 1, 2, 1):
        logits, cache = apply(cache, start, length)
        here = slice(start, start + length)
        there = mask[:, here]
        np.testing.assert_allclose(logits[there], plain[:, here][there], rtol=1e-4, atol=1e-4)
        start += length
    assert int(cache.filled) == N
    np.testing.assert_array_equal(cache.num_tokens(), mask.sum(1))


# ---- writing
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


# ---- the mesh
def test_eight_devices_are_one():
    form, words = FORMS['llama'], np.concatenate([ids(), ids(1)])[:4]
    mask = np.concatenate([MASK, MASK])[:4]
    model, variables = CausalLM(form), tiny_language.tree(form)
    rules = Rules(3, (0,))
    expected = logits_of(model)(variables, words, mask)
    written = generate(model, variables, words, mask, rules=rules)
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2})
    boxed = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids), words)
    placed = jax.device_put(variables, sharding.tree_shardings(boxed, mesh))
    kernel = placed['params']['layers']['mlp_in']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 4, 6)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        split_words, split_mask = jax.device_put((words, mask), rows)
        found = jax.jit(lambda v, *x: model.apply(v, *x).logits)(placed, split_words, split_mask)
        found_text = generate(model, placed, split_words, split_mask, rules=rules)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found_text.tokens, written.tokens)
    assert jax.tree.structure(meta.unbox(boxed)) == jax.tree.structure(variables)


# ---- errors
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'layers': 0}, 'Form.layers: expected at least 1'),
        ({'key_heads': 3}, 'Form.key_heads: expected a divisor of heads=2'),
        ({'positions': 'sines'}, 'Form.positions'),
        ({'activation': 'tanh'}, 'Form.activation'),
        ({'biased': ('gate',)}, 'Form.biased'),
        ({'eps': math.nan}, 'Form.eps'),
        ({'rope_scaling': Scaling('yarn', 2.0)}, 'Form.rope_scaling.kind'),
        ({'rope_scaling': Scaling('llama3', 2.0, 4.0, 4.0)}, 'Form.rope_scaling.high'),
        ({'positions': 'rotary', 'head_width': 3}, 'Form.head_width: expected an even number'),
    ],
)
def test_forms_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FORMS['gpt2'], **changes)


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
    form = FORMS['gpt2']
    model, variables = CausalLM(form), tiny_language.tree(form)
    with pytest.raises(ConfigError, match='a text of 16 tokens .* at most 12'):
        generate(model, variables, ids(), rules=Rules(10))
    with pytest.raises(ConfigError, match='needs an rng'):
        generate(model, variables, ids(), rules=Rules(2, temperature=1.0))
    with pytest.raises(ConfigError, match='expected Rules.temperature=0'):
        beam_search(model, variables, ids(), rules=Rules(2, temperature=1.0), width=2)
    with pytest.raises(ConfigError, match='a width of at least 1'):
        beam_search(model, variables, ids(), rules=Rules(2), width=0)
    with pytest.raises(ConfigError, match='CausalLM.remat'):
        CausalLM(Form(vocab=3), remat='some').init(jax.random.key(0), jnp.asarray(ids()))
