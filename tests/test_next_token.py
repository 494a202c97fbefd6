"""Next-word prediction against its definition, and a short run of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

import data_pipelines
from configs import default
from configs import language as language_config
from vatt_jax import config as configs
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.importers import language
from vatt_jax.models.language import Rules, generate
from vatt_jax.models.language.tower import LanguageTower
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.next_token import sums_of_rows
from vatt_jax.rng import Rng
from vatt_jax.training import loop

B, K, L, VOCAB = 2, 2, 5, 7
WORDS = np.array(
    [[[3, 4, 0, 0, 0], [2, 6, 6, 1, 5]], [[1, 1, 2, 0, 0], [5, 0, 0, 0, 0]]],
    np.int32,
)
MASK = np.array([[True, True], [True, False]])


def tiny(kind):
    """The model and the variables of a tiny tower, and the batch of its sentences."""
    c = language_config.get_config(f'demo,synthetic{kind}')
    size = {'layers': 2, 'width': 8, 'mlp': 12, 'head_width': 4, 'vocab': VOCAB, 'context': L}
    c.model.towers.text.update(size)
    model = models.build(c.model, 'float32')
    batch = {
        'text': {
            'data': jnp.asarray(WORDS),
            'mask': jnp.asarray(MASK),
            'valid': jnp.ones(B, bool),
        }
    }
    rng = Rng.create(0, 0, jnp.arange(B))
    init = functools.partial(model.init, train=False, rng=rng)
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), batch))
    noise = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(noise.normal(size=x.shape), x.dtype), shapes)
    return c, model, variables, batch, rng


def loss_of(c, model, rng):
    """The jitted loss of variables and a batch, with its metrics."""
    objective = objectives.build(c.objective)

    @jax.jit
    def loss(variables, batch):
        variables = {'batch_stats': {}, **variables}
        found = objective.loss(model, variables, {}, {}, batch, rng)
        return found.value, found.metrics

    return loss


def expected_sums(logits, ids):
    """Word by word, in float64: the words and one mark behind them, if there is room."""
    loss, count, right = 0.0, 0, 0
    length = list(ids).index(0) if 0 in ids else len(ids)
    for column in range(min(length + 1, len(ids))):
        row = np.asarray(logits[column], np.float64)
        loss += np.log(np.exp(row).sum()) - row[ids[column]]
        right += int(row.argmax() == ids[column])
        count += 1
    return loss, count, right


def test_sums_of_rows_are_counted_word_by_word():
    ids = WORDS.reshape(-1, L)
    logits = np.random.default_rng(1).normal(0, 2, (len(ids), L, VOCAB)).astype(np.float32)
    found = sums_of_rows(jnp.asarray(logits), jnp.asarray(ids))
    expected = np.array([expected_sums(*pair) for pair in zip(logits, ids)])
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=1e-5)
    assert expected[:, 1].tolist() == [3, 5, 4, 2]


@pytest.mark.parametrize('kind', ['', ',llama'])
def test_the_loss_is_that_of_every_word_from_those_before_it(kind):
    c, model, variables, batch, rng = tiny(kind)
    value, metrics = loss_of(c, model, rng)(variables, batch)
    fields = {k: v for k, v in c.model.towers.text.to_dict().items() if k != 'name'}
    decoder = LanguageTower(**fields).decoder(parent=None)
    # The mark and the whole sentence, one by one: no shift, no padding.
    logits_of = jax.jit(lambda ids: decoder.apply(of_decoder, ids).logits)
    of_decoder = {'params': variables['params']['nets_text']['model']}
    total = np.zeros(3)
    for ids, is_there in zip(WORDS.reshape(-1, L), MASK.ravel()):
        if is_there:
            begun = jnp.asarray([[0, *ids[:-1]]])
            total += expected_sums(np.asarray(logits_of(begun))[0], ids)
    np.testing.assert_allclose(value, total[0] / total[1], rtol=1e-4)
    np.testing.assert_allclose(metrics['perplexity'], np.exp(total[0] / total[1]), rtol=1e-3)
    np.testing.assert_allclose(metrics['accuracy'], total[2] / total[1], rtol=1e-6)


def test_what_is_not_there_teaches_nothing():
    c, model, variables, batch, rng = tiny('')
    loss = loss_of(c, model, rng)
    plain, _ = loss(variables, batch)
    # The sentence that the mask leaves out.
    other = {'text': {**batch['text'], 'data': batch['text']['data'].at[1, 1].set(3)}}
    np.testing.assert_array_equal(loss(variables, other)[0], plain)
    nothing = {'text': {**batch['text'], 'valid': jnp.zeros(B, bool)}}
    gradient = jax.jit(jax.grad(lambda v: loss(v, nothing)[0]))(variables)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_mistakes_are_named():
    c, model, *_ = tiny('')
    with pytest.raises(ConfigError, match='expected text or a view of it'):
        objectives.build(type(c)({'name': 'next_token', 'stream': 'audio'}))
    objective, key = objectives.build(c.objective), jax.random.key(0)

    def spec(model, kind):
        return Spec(model, None, None, 0, {}, info={'tokenizer': {'kind': kind}})

    assert objective.init(key, spec(model, 'words')) == ({}, {})
    with pytest.raises(ConfigError, match="or sentencepiece, got 'clip'"):
        objective.init(key, spec(model, 'clip'))
    c.model.towers.text = {'name': 'linear'}
    with pytest.raises(ConfigError, match="expected 'language', got 'linear'"):
        objective.init(key, spec(models.build(c.model, 'float32'), 'words'))
    with pytest.raises(ConfigError, match='choose one of synthetic, llama'):
        configs.load('configs/language.py:demo,gpt3')


@pytest.mark.parametrize('arg', ['demo', 'demo,llama', 'demo,synthetic'])
def test_every_name_is_a_config(arg):
    configs.check_fields(language_config.get_config(arg), default.get_config())


@pytest.mark.slow
def test_a_short_run_learns_the_words(tmp_path):
    """And what it learnt writes sentences, and goes out as a folder of Hugging Face."""
    c = language_config.get_config('demo,synthetic')
    c.steps, c.batch_size, c.log_every, c.checkpoint.every = 60, 16, 20, 60
    c.optimizer.schedule.warmup = 5
    loop.train(c, data_pipelines.open(c), tmp_path / 'run', quiet=True)
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    perplexities = [entry['perplexity'] for entry in entries if 'perplexity' in entry]
    assert perplexities[-1] < perplexities[0] / 2
    decoder, variables = language.from_run(tmp_path / 'run')
    written = generate(decoder, variables, jnp.zeros((1, 1), int), rules=Rules(10, ends=(0,)))
    assert 0 < int(written.lengths[0]) < 10
    language.save(tmp_path / 'out', decoder.form, variables)
    loaded = language.load(tmp_path / 'out')
    assert loaded.model.form == decoder.form
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    with pytest.raises(ConfigError, match='no checkpoint'):
        language.from_run(tmp_path / 'nothing')
