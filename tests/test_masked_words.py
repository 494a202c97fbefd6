"""Masked words: what is hidden, the loss of a batch, its head, the evaluator, a run."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy.special import erf, log_softmax

from tests import tiny
from tests.test_train import log_lines, run
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView
from vatt_jax.evals.changes import HIDDEN_WORDS, change_of
from vatt_jax.evals.masked_words import MaskedWords as Evaluator
from vatt_jax.inputs import masking
from vatt_jax.models import Encoded
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.forward import tokens_of
from vatt_jax.objectives.masked_words import TABLE, MaskedWords
from vatt_jax.objectives.multi_task import MultiTask
from vatt_jax.rng import Rng

WORDS, WIDTH, TABLE_ROWS = 9, 4, 11


class Meeting:
    """Stands for a model without towers: a word's token gets the mean token of the video."""

    config = {
        'towers': {'text': {'name': 't5', 'word_width': 3, 'vocab': TABLE_ROWS}},
        'fusion': {'streams': ('video', 'text')},
    }

    def apply(self, variables, batch, *, method, train, rng, valid=None, **_):
        assert train
        if method == 'encode_all':
            self.seen = batch['text']['data']
            table = variables['params']['tokens']
            text = Encoded(table[self.seen][:, :, 0], table[self.seen], self.seen > 0)
            video = Encoded(batch['video']['data'][:, 0], batch['video']['data'])
            return {'text': text, 'video': video}, {}
        video = jnp.where(valid['video'][:, None], batch['video'].tokens.mean(1), 0)
        text = batch['text']
        met = text.tokens + video[:, None, None]
        return {**batch, 'text': text.replace(tokens=met)}


class Batch:
    """Five clips of two sentences; clip 3 has no video, 4 no words, clip 0 one sentence."""

    def __init__(self):
        noise = np.random.default_rng(0)
        ids = noise.integers(1, WORDS, size=(5, 2, 6)).astype(np.int32)
        ids[:, 1, 4:] = 0
        ids[0, 1] = 0
        mask = ids.any(-1)
        has_video, has_text = np.array([1, 1, 1, 0, 1], bool), np.array([1, 1, 1, 1, 0], bool)
        video = noise.normal(size=(5, 3, WIDTH)).astype(np.float32)
        self.fields = {
            'text': {'data': jnp.array(ids), 'mask': jnp.array(mask), 'valid': has_text},
            'video': {'data': jnp.array(video), 'valid': has_video},
        }
        self.params = {
            'tokens': noise.normal(size=(WORDS, WIDTH)).astype(np.float32),
            'fronts_text': {TABLE: noise.normal(size=(TABLE_ROWS, 3)).astype(np.float32)},
        }
        self.params = jax.tree.map(jnp.array, self.params)
        self.rng = Rng.create(0, 3, jnp.arange(5))

    def spec(self, kind='words'):
        text, video = (
            Encoded(jnp.zeros((5, 2, WIDTH)), jnp.zeros((5, 2, 6, WIDTH))),
            Encoded(jnp.zeros((5, WIDTH)), jnp.zeros((5, 3, WIDTH))),
        )
        outputs = types.SimpleNamespace(encoded={'text': text, 'video': video})
        info = {'tokenizer': {'kind': kind, 'size': WORDS}}
        return Spec(Meeting(), outputs, self.fields, 64, {}, info=info)

    def head(self, objective):
        params, _ = objective.init(jax.random.key(0), self.spec())
        noise = np.random.default_rng(1)
        # Also where initial values are zero.
        return jax.tree.map(lambda x: x + noise.normal(size=x.shape) * 0.5, meta.unbox(params))

    def loss(self, objective, head, params=None):
        variables = {'params': params or self.params, 'batch_stats': {}}
        return objective.loss(Meeting(), variables, head, {}, self.fields, self.rng)


def told(head, tokens, table):
    """Logits of words in float64, by their definition."""
    head = jax.tree.map(np.float64, head)
    x = np.float64(tokens) @ head['hidden']['kernel'] + head['hidden']['bias']
    x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * head['norm']['scale'] + head['norm']['bias']
    return x @ np.float64(table).T + head['bias']


@pytest.mark.parametrize('tied', [False, True])
def test_it_is_the_mean_over_hidden_words(tied):
    objective = MaskedWords({'tied': tied, 'share': 0.5})
    batch = Batch()
    head = batch.head(objective)
    got = batch.loss(objective, head)

    ids = np.array(batch.fields['text']['data'])
    options = masking.WordMasking(mask_id=1, vocabulary=(2, WORDS), share=0.5)
    maskable = (ids > 1).reshape(10, 6)
    hidden = masking.mask_words(ids.reshape(10, 6), maskable, options, batch.rng.repeat(2))
    labels = np.array(hidden.labels).reshape(5, 2, 6)
    video = np.float64(batch.fields['video']['data']).mean(1) * np.array([1, 1, 1, 0, 1])[:, None]
    tokens = np.float64(batch.params['tokens'])[np.array(hidden.ids).reshape(5, 2, 6)]
    table = batch.params['fronts_text'][TABLE][:WORDS] if tied else head['words']['table']
    logits = told(head['words'], tokens + video[:, None, None], table)
    logits[..., :2] = -1e9
    losses, right = [], []
    for place in np.argwhere((labels > 0)[:4]):
        i = tuple(place)
        losses.append(-log_softmax(logits[i])[labels[i]])
        right.append(logits[i].argmax() == labels[i])
    assert len(losses) > 8
    np.testing.assert_allclose(got.value, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(got.metrics['accuracy'], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(got.metrics['words_per_clip'], len(losses) / 5, rtol=1e-6)


def test_hidden_patches_are_regressed_beside_the_words():
    batch = Batch()
    objective = MaskedWords({'scheme': 'joint', 'share': 0.5, 'patch_weight': 3.0})
    head = batch.head(objective)
    got = batch.loss(objective, head)

    video = np.float64(batch.fields['video']['data'])
    is_there = np.repeat(batch.fields['video']['valid'][:, None], 3, 1)
    drawn = masking.mask_regions(video, is_there, masking.RegionMasking(share=0.15), batch.rng)
    is_masked = np.array(drawn.is_masked)
    # At least one patch of each clip that has a video, and none of the other.
    assert is_masked.any(1).tolist() == is_there[:, 0].tolist()
    # In this model videos stay as they are: hidden ones are zeros, and what is told is the bias.
    layer = jax.tree.map(np.float64, head['patches'])
    error = np.mean((layer['bias'] - video[is_masked]) ** 2)
    np.testing.assert_allclose(got.metrics['patches/loss'], error, rtol=1e-5)
    expected = got.metrics['words/loss'] + 3 * error
    np.testing.assert_allclose(got.value, expected, rtol=1e-5)


def test_conditional_hides_one_side_of_each_clip():
    batch = Batch()
    objective = MaskedWords({'scheme': 'conditional', 'share': 1.0, 'patch_share': 1.0})
    of_words, of_patches = masking.corrupted_sides('conditional', batch.rng)
    text = batch.fields['text']
    hidden = objective._hide(text, of_words, WORDS, batch.rng)
    by_clip = np.array(hidden.is_masked).reshape(5, -1).any(1)
    features = {tokens_of('video'): batch.fields['video']['data']}
    valid = {'video': jnp.ones(5, bool)}
    _, is_masked = objective._hide_patches(features, valid, batch.rng)
    assert by_clip.tolist() == np.array(of_words).tolist()
    assert np.array(is_masked).any(1).tolist() == np.array(of_patches).tolist()
    assert 0 < by_clip.sum() < 5


@pytest.mark.parametrize('frozen', [False, True])
def test_gradients_reach_the_words_of_the_tied_table_unless_it_is_frozen(frozen, monkeypatch):
    batch = Batch()
    monkeypatch.setitem(Meeting.config['towers']['text'], 'frozen_words', frozen)
    objective = MaskedWords({'tied': True, 'share': 0.5})
    head = batch.head(objective)
    assert 'table' not in head['words']
    grads = jax.grad(lambda p: batch.loss(objective, head, p).value)(batch.params)
    chex.assert_tree_all_finite(grads)
    table = np.abs(grads['fronts_text'][TABLE]).sum(1)
    assert ((table[2:WORDS] > 0) == (not frozen)).all() and (table[WORDS:] == 0).all()


def test_a_prediction_is_the_likeliest_word_of_each_place():
    batch = Batch()
    objective = MaskedWords({'tied': True})
    head = batch.head(objective)
    completed = objective.with_model(head, batch.params)
    tokens = np.random.default_rng(2).normal(size=(5, 2, 6, WIDTH)).astype(np.float32)
    encoded = {'text': Encoded(jnp.zeros((5, 2, WIDTH)), jnp.array(tokens))}
    got = objective.predict(completed, {}, encoded)['masked_words']
    logits = told(head['words'], tokens, batch.params['fronts_text'][TABLE][:WORDS])
    np.testing.assert_array_equal(got, (logits[..., 2:].argmax(-1) + 2).reshape(5, 12))
    assert objective.predict(completed, {}, {}) == {}
    # As a task beside others too.
    tasks = MultiTask({'tasks': {'words': {'name': 'masked_words', 'tied': True}}}, MaskedWords)
    again = tasks.with_model({'words': head}, batch.params)
    np.testing.assert_array_equal(again['words'][TABLE], batch.params['fronts_text'][TABLE])


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'streams': ('video', 'audio')}, 'config.objective.streams: expected text once'),
        ({'scheme': 'all'}, "config.objective.scheme='all': choose one of joint"),
        ({'scheme': 'joint', 'patches': 'audio'}, "config.objective.patches='audio': choose one"),
        ({'share': 2}, 'config.objective.share=2'),
        ({'mask_share': 0.8, 'random_share': 0.3}, 'mask_share + random_share'),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError) as error:
        MaskedWords(fields)
    assert message in str(error.value)


def test_a_tokenizer_without_an_unknown_word_of_its_own_number_is_refused():
    with pytest.raises(ConfigError, match="numbers words otherwise|got 'clip'"):
        MaskedWords({}).init(jax.random.key(0), Batch().spec('clip'))


def test_what_cannot_be_told_is_refused(monkeypatch):
    key, spec = jax.random.key(0), Batch().spec()
    monkeypatch.setitem(Meeting.config, 'fusion', {'streams': ('video', 'text'), 'width': 16})
    with pytest.raises(ConfigError, match="fusion.width: expected 0 with scheme='joint'.*got 16"):
        MaskedWords({'scheme': 'joint'}).init(key, spec)
    with pytest.raises(ConfigError, match='expected data with sentences'):
        MaskedWords({}).init(key, dataclasses.replace(spec, info={}))
    monkeypatch.setitem(Meeting.config, 'fusion', {'streams': ('audio', 'text')})
    with pytest.raises(ConfigError, match='streams meet, video, text, got audio, text'):
        MaskedWords({}).init(key, spec)


# ---- what the evaluator shows


def test_one_word_of_each_sentence_is_hidden_and_changes_follow_each_other():
    fields = Batch().fields
    host = {name: jax.tree.map(np.array, stream) for name, stream in fields.items()}
    host |= {'position': np.arange(5), 'valid': np.ones(5, bool)}
    changed = change_of('masked_words+no_video')(host)
    ids, labels = host['text']['data'], changed['labels'][HIDDEN_WORDS]
    is_hidden = labels >= 0
    assert (is_hidden.sum(-1) == (ids > 1).any(-1)).all()
    np.testing.assert_array_equal(changed['text']['data'], np.where(is_hidden, 1, ids))
    np.testing.assert_array_equal(labels[is_hidden], ids[is_hidden])
    assert not changed['video']['valid'].any() and host['video']['valid'].any()
    with pytest.raises(ConfigError, match="change='no_such': choose one of"):
        change_of('masked_words+no_such')


class View(FeatureView):
    """Features of three clips: with its own video a model tells all, with others less."""

    def __init__(self):
        self.seed = 0

    told = {'': [[5], [6], [7]], '+other_video': [[5], [2], [2]], '+no_video': [[2], [2], [7]]}

    def features(self, split, by, limit, change):
        change = change.removeprefix('masked_words')
        has_video = np.array([change != '+no_video'] * 3)
        return {
            'predictions': {'masked_words': np.array(self.told[change])},
            'labels': {HIDDEN_WORDS: np.array([[[5]], [[6]], [[-1]]])},
            'valid': {'video': has_video, 'text': np.ones(3, bool)},
        }


def test_accuracies_are_shares_of_the_hidden_words():
    found = Evaluator({'type': 'masked_words'}).run(View())
    expected = {'accuracy': 1, 'accuracy/other': 0.5, 'accuracy/without': 0, 'gain': 0.5}
    assert found.scalars == expected and found.artifacts['clips'] == 2


@pytest.mark.slow
def test_a_run_sums_both_tasks_and_is_evaluated(tmp_path):
    config = tiny.config(steps=2, optimizer__schedule__warmup=1)
    del config.model.towers['audio']
    config.model.towers.video.layers = 1
    config.model.fusion = {'types': ('merged',), 'mlp': 32, 'heads': 2, 'head_width': 8}
    words = {'name': 'masked_words', 'tied': True, 'at_least_one': True, 'scheme': 'joint'}
    tasks = {'matching': {'name': 'matching'}, 'words': words}
    config.objective = type(config)({'name': 'multi_task', 'tasks': tasks})
    config.evals.words = {'type': 'masked_words', 'limit': 16}
    config.evals.matching = {'type': 'matching', 'limit': 16}
    run(tmp_path, config)
    lines = log_lines(tmp_path)
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 2
    for step in steps:
        np.testing.assert_allclose(
            step['loss'], step['matching/loss'] + step['words/loss'], rtol=1e-5
        )
        assert step['words/words_per_clip'] >= 1
    scalars = {name: value for line in lines for name, value in line.items() if 'eval/' in name}
    for name in ('words/accuracy', 'words/accuracy/other', 'matching/accuracy'):
        assert 0 <= scalars[f'eval/{name}'] <= 1
