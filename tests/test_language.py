"""The causal language model against NumPy float64; its cache; the mesh."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from tests import tiny_language
from tests.tiny_language import FORMS, logits_of
from vatt_jax.config import ConfigError
from vatt_jax.importers import language as importer
from vatt_jax.models.language import (
    PUBLISHED,
    Cache,
    CausalLM,
    Form,
    Rules,
    Scaling,
    generate,
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


def test_layers_unrolled_are_the_scanned():
    """With dropout."""
    form, words = FORMS['gpt2'], ids()
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = tiny_language.tree(form)
    expected = logits_of(CausalLM(form, dropout=0.5))(variables, words, MASK, None, rng)
    unrolled = CausalLM(form, dropout=0.5, scan=False)
    found = logits_of(unrolled)(variables, words, MASK, None, rng)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('options', [{'scan': False, 'remat': 'dots'}, {'remat': 'full'}])
def test_gradients_of_layers_unrolled_or_recomputed_are_the_same(options):
    form, words, mask = FORMS['llama'], jnp.asarray(ids()), jnp.asarray(MASK)
    rng = Rng.create(0, 0, jnp.arange(B))

    def loss(variables, model):
        return jnp.sum(jnp.sin(model.apply(variables, words, mask, None, rng).logits))

    def gradient(model):
        return jax.jit(jax.grad(functools.partial(loss, model=model)))

    variables = tiny_language.tree(form)
    expected = gradient(CausalLM(form, dropout=0.3))(variables)
    found = gradient(CausalLM(form, dropout=0.3, **options))(variables)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


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


def test_parameters_of_another_number_of_layers():
    form = FORMS['gpt2']
    deeper = tiny_language.tree(dataclasses.replace(form, layers=3))
    with pytest.raises(
        ValueError, match=r'layers\[.*: expected parameters of 2 layers, got .*\(3,'
    ):
        jax.eval_shape(CausalLM(form).apply, deeper, ids())


def test_a_module_that_cannot_be():
    with pytest.raises(ConfigError, match='CausalLM.remat'):
        CausalLM(Form(vocab=3), remat='some').init(jax.random.key(0), jnp.asarray(ids()))
