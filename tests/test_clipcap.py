"""ClipCap's mappers, logits and captions against NumPy float64; its files."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_media_language as tiny
from tests.tiny_media_language import EMBEDDING, FORM, MAPPERS
from vatt_jax.config import ConfigError
from vatt_jax.importers import media_language as importer
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.losses import next_words
from vatt_jax.models.language import Rules
from vatt_jax.models.media_language import TransformerMapper, write_captions

B, N = 2, 4
EMBEDDINGS = np.random.default_rng(3).normal(size=(B, EMBEDDING)).astype(np.float32)
# The word 0 is one like any other.
IDS = np.array([[0, 5, 2, 7], [3, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)


@functools.cache
def logits_of(model):
    return jax.jit(model.apply)


def expected_logits(mapper, model, embedding, ids):
    weights = tiny.clipcap_theirs(model)
    prefix = tiny.PREFIXES[mapper](weights, model.mapper, embedding.astype(np.float64))
    return tiny.clipcap_logits(weights, FORM, prefix, ids)


@pytest.mark.parametrize('mapper', MAPPERS)
def test_logits_and_loss_are_those_of_the_definition(mapper):
    model, variables = tiny.clipcap(mapper)
    logits = logits_of(model)(variables, EMBEDDINGS, IDS, MASK)
    losses = []
    for row in range(B):
        words = IDS[row][MASK[row]]
        expected = expected_logits(mapper, model, EMBEDDINGS[row], words)
        np.testing.assert_allclose(logits[row][MASK[row]], expected, rtol=2e-4, atol=2e-4)
        for word, of_word in zip(words, expected):
            losses.append(np.log(np.exp(of_word).sum()) - of_word[word])
    found = next_words.words(logits, jnp.asarray(IDS), jnp.asarray(MASK))
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)


def test_embeddings_may_be_scaled_to_length_one():
    model, variables = tiny.clipcap('mlp')
    prefix = jax.jit(lambda v, x: model.clone(unit=True).apply(v, x, method='prefix'))
    found = prefix(variables, 7 * EMBEDDINGS)
    weights = tiny.clipcap_theirs(model)
    for row in range(B):
        unit = EMBEDDINGS[row].astype(np.float64) / np.linalg.norm(EMBEDDINGS[row])
        expected = tiny.mlp_prefix(weights, model.mapper, unit)
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_captions_are_the_likeliest_words_of_whole_passes():
    """A beam of one, with an end."""
    model, variables = tiny.clipcap('mlp')
    end, longest = 5, 3
    beams = write_captions(
        model,
        variables,
        jnp.asarray(EMBEDDINGS),
        rules=Rules(longest, (end,)),
        width=1,
        length_power=0.0,
    )
    for row in range(B):
        # What goes on longest, and every text that ends before: the best of them.
        texts, going, total = {}, [], 0.0
        for _ in range(longest):
            logits = expected_logits('mlp', model, EMBEDDINGS[row], np.array([*going, 0]))[-1]
            log_p = logits - np.log(np.exp(logits).sum())
            texts[*going, end] = total + log_p[end]
            log_p[end] = -np.inf
            going.append(int(log_p.argmax()))
            total += log_p.max()
        texts[tuple(going)] = total
        best = max(texts, key=texts.get)
        np.testing.assert_allclose(beams.scores[row, 0], texts[best], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(beams.tokens[row, 0, : len(best)], best)


@pytest.mark.parametrize('mapper', MAPPERS)
def test_files_come_out_as_they_went_in(mapper, tmp_path):
    model, variables = tiny.clipcap(mapper)
    path = tmp_path / 'coco_prefix-009.pt'
    importer.save_clipcap(path, variables['params'])
    arrays = importer.clip.read_arrays(path, str(path))
    names = {
        'mlp': ('clip_project.model.0.weight', 'clip_project.model.2.bias'),
        'transformer': (
            'clip_project.prefix_const',
            'clip_project.linear.weight',
            'clip_project.transformer.layers.1.attn.to_keys_values.weight',
            'clip_project.transformer.layers.0.attn.project.bias',
            'clip_project.transformer.layers.1.mlp.fc2.bias',
        ),
    }
    of_gpt = (
        'gpt.transformer.wte.weight',
        'gpt.transformer.h.2.mlp.c_fc.bias',
        'gpt.lm_head.weight',
    )
    assert {*names[mapper], *of_gpt} <= set(arrays)
    # A triangle of ones, which Hugging Face's GPT-2 used to save.
    torch_writer.write(
        path, {**arrays, 'gpt.transformer.h.0.attn.bias': np.ones((1, 2), np.float32)}
    )
    found, report = importer.load_clipcap(path, model)
    chex.assert_trees_all_equal(found, variables['params'])
    assert not report.unused


def test_what_does_not_fit(tmp_path):
    model, variables = tiny.clipcap('mlp')
    path = tmp_path / 'coco_prefix-009.pt'
    importer.save_clipcap(path, variables['params'])
    with pytest.raises(ConfigError, match='clip_project.prefix_const'):
        importer.load_clipcap(path, tiny.clipcap('transformer')[0])
    longer = model.clone(mapper=model.mapper.clone(prefix=4))
    with pytest.raises(ConfigError, match=r'clip_project.model.0.weight has shape \[12, 5\]'):
        importer.load_clipcap(path, longer)
    with pytest.raises(ConfigError, match='TransformerMapper.heads: expected a divisor of width=8'):
        jax.eval_shape(TransformerMapper(8, heads=3).init, jax.random.key(0), EMBEDDINGS)
