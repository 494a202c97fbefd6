"""The objective captioning, what it writes, its evaluator, and a run that is loaded."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from tests import tiny_media_language as tiny
from tests.test_next_token import expected_sums
from tests.tiny_media_language import EMBEDDING, FORM
from vatt_jax import config as configs
from vatt_jax import evals, objectives
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView
from vatt_jax.evals.captions import nearest
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.inputs.tokenizer import Words
from vatt_jax.modes import train_phases
from vatt_jax.objectives.base import Spec
from vatt_jax.rng import Rng

B, K, L = 2, 2, 4
WORDS = np.array([[[3, 4, 0, 0], [2, 6, 6, 1]], [[1, 1, 2, 0], [5, 0, 0, 0]]], np.int32)
MASK = np.array([[True, True], [True, False]])
CLIPS = np.random.default_rng(2).normal(size=(B, EMBEDDING)).astype(np.float32)
TOWER = {
    'name': 'language',
    'kind': 'gpt2',
    'remat': 'none',
    **{
        field: getattr(FORM, field)
        for field in ('vocab', 'layers', 'width', 'mlp', 'heads', 'key_heads', 'head_width')
    },
    'context': FORM.context,
}


class Towers:
    """A model whose embedding of a clip is the clip, doubled in the common space."""

    config = {'towers': {'text': TOWER}, 'inputs': {'text': {'words': L}}}
    dtype = 'float32'

    def apply(self, variables, batch, train, rng):
        assert not train and set(batch) == {'video'}
        data = batch['video']['data'] * variables['params']['scale']
        encoded = {'video': types.SimpleNamespace(pooled=data)}
        return types.SimpleNamespace(encoded=encoded, spaces={'joint': {'video': 2 * data}})


def batch_of(valid=(True, True)):
    text = {'data': jnp.asarray(WORDS), 'mask': jnp.asarray(MASK), 'valid': jnp.ones(B, bool)}
    return {'video': {'data': jnp.asarray(CLIPS), 'valid': jnp.array(valid)}, 'text': text}


def build(**fields):
    return objectives.build(ConfigDict({'name': 'captioning', 'prefix': 3, **fields}))


def case(mapper):
    """(objective, variables, params, weights for the definition) with noise for parameters."""
    model, drawn = tiny.clipcap(mapper)
    sizes = {'mlp': {}, 'transformer': {'tokens': 2, 'layers': 2, 'heads': 2}}[mapper]
    params = drawn['params']
    variables = {
        'params': {'nets_text': {'model': params['language']}, 'scale': jnp.float32(1)},
        'batch_stats': {},
    }
    objective = build(mapper=mapper, **sizes)
    return objective, variables, {'mapper': params['mapper']}, tiny.clipcap_theirs(model)


def loss_of(objective):
    rng = Rng.create(0, 0, jnp.arange(B))

    def loss(variables, params, batch):
        found = objective.loss(Towers(), variables, params, {}, batch, rng)
        return found.value, found.metrics

    return jax.jit(loss)


@pytest.mark.parametrize('mapper', tiny.MAPPERS)
def test_the_loss_is_that_of_every_word_after_the_prefix(mapper):
    """Of each caption by itself, with the mark behind its words, if there is room."""
    objective, variables, params, weights = case(mapper)
    value, metrics = loss_of(objective)(variables, params, batch_of())
    sums = np.zeros(3)
    for clip, captions, is_there in zip(CLIPS, WORDS, MASK):
        prefix = tiny.PREFIXES[mapper](weights, tiny.MAPPERS[mapper], clip.astype(np.float64))
        for ids in captions[is_there]:
            sums += expected_sums(tiny.clipcap_logits(weights, FORM, prefix, ids), ids)
    np.testing.assert_allclose(value, sums[0] / sums[1], rtol=1e-4)
    np.testing.assert_allclose(metrics['accuracy'], sums[2] / sums[1], rtol=1e-6)


def test_what_learns():
    """The mapper and the language model, not the tower; nothing from a clip without its medium."""
    objective, variables, params, _ = case('mlp')
    loss = loss_of(objective)
    gradient = jax.jit(jax.grad(lambda v, p, b: loss(v, p, b)[0], (0, 1)))
    of_model, of_mapper = gradient(variables, params, batch_of())
    assert of_model['params']['scale'] == 0
    learnt = [*jax.tree.leaves(of_mapper), of_model['params']['nets_text']['model']['word_table']]
    assert all(np.any(leaf) for leaf in learnt)
    nothing = gradient(variables, params, batch_of((False, False)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    # The second clip alone is left out, with all of its captions.
    first, _ = loss(variables, params, batch_of((True, False)))
    other = batch_of((True, False))
    other['text']['data'] = other['text']['data'].at[1].set(3)
    np.testing.assert_array_equal(loss(variables, params, other)[0], first)


def test_the_embedding_of_a_space_is_of_unit_length():
    objective, variables, params, weights = case('mlp')
    in_space = build(space='joint')
    value, _ = loss_of(in_space)(variables, params, batch_of())
    unit = CLIPS / np.linalg.norm(CLIPS, axis=1, keepdims=True)
    batch = batch_of()
    batch['video']['data'] = jnp.asarray(unit)
    np.testing.assert_allclose(value, loss_of(objective)(variables, params, batch)[0], rtol=1e-5)
    features = {'pooled': {'video': CLIPS}, 'spaces': {'joint': {'video': unit}}}
    np.testing.assert_array_equal(in_space.embeddings(features), unit)
    np.testing.assert_array_equal(objective.embeddings(features), CLIPS)


def test_the_likeliest_words_are_written():
    """With a beam of one: the largest logit of the definition, word by word, up to the mark."""
    objective, variables, params, weights = case('mlp')
    found = objective.write(Towers(), variables, params, jnp.asarray(CLIPS), 1)
    for clip, row in zip(CLIPS, np.asarray(found)):
        prefix = tiny.mlp_prefix(weights, tiny.MAPPERS['mlp'], clip.astype(np.float64))
        expected = []
        while len(expected) < L:
            # The last word is a filler, whose logits nothing before it sees.
            logits = tiny.clipcap_logits(weights, FORM, prefix, np.array([*expected, 0]))
            expected.append(int(logits[-1].argmax()))
            if not expected[-1]:
                break
        expected += [0] * (L - len(expected))
        assert row.tolist() == expected


def spec_of(space=None, words=L):
    encoded = {'video': types.SimpleNamespace(pooled=np.zeros((B, EMBEDDING)))}
    spaces = {} if space is None else {space: {'video': np.zeros((B, 4))}}
    outputs = types.SimpleNamespace(encoded=encoded, spaces=spaces)
    return Spec(Towers(), outputs, {'text': {'data': np.zeros((B, K, words))}}, B, {})


def test_the_mapper_is_as_wide_as_what_it_reads():
    key = jax.random.key(0)
    for objective, spec, width in (
        (build(), spec_of(), EMBEDDING),
        (build(space='joint'), spec_of('joint'), 4),
    ):
        params = meta.unbox(jax.eval_shape(lambda k: objective.init(k, spec), key)[0])  # noqa: B023
        assert params['mapper']['mlp_in']['kernel'].shape[0] == width


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'mapper': 'lstm'}, "objective.mapper='lstm': choose one of mlp, transformer"),
        ({'prefix': 0}, 'objective.prefix'),
        ({'media': 'text'}, "objective.media: expected a stream of clips.*got 'text'"),
        ({'space': 'va'}, r"objective.space: expected a space of 'video' \(joint\).*got 'va'"),
        ({'prefix': 13}, 'text.context: expected room for a prefix of 13 and 4 words.*got 16'),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(**fields).init(jax.random.key(0), spec_of('joint'))


# ---- evaluation


class Writes:
    """An objective that tells clips by the largest number of their embedding."""

    config = types.SimpleNamespace(stream='text', media='video')

    def embeddings(self, features):
        return features['pooled']['video']

    def write(self, model, variables, params, embeddings, width):
        ids = 2 + np.asarray(embeddings).argmax(1)
        return np.stack([ids, ids, np.zeros_like(ids)], axis=1)


class Encoder(FeatureExtractor):
    """What a Captioner reads of one."""

    def __init__(self, objective):
        self.objective, self.heads = objective, ({}, {})
        self.model, self.variables = None, {}
        self.mesh = jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])


class View(FeatureView):
    """Four clips of training and three of the test, of which one has no words and one no video."""

    seed, batch_size = 0, 2
    words = Words(['one', 'two', 'three', 'four'])
    data = types.SimpleNamespace(info={'tokenizer': words.to_spec()})

    def __init__(self, objective):
        self.encoder = Encoder(objective)

    def features(self, split, limit, keep):
        assert keep == ('text',)
        count = {'train': 4, 'test': 5}[split]
        ids = 2 + np.arange(count) % 4
        text = np.stack([np.stack([ids, ids], 1), np.stack([ids, 0 * ids], 1)], 1)  # [N 2 2]
        embeddings = np.eye(4, dtype=np.float32)[np.arange(count) % 4]
        mask, is_there = np.ones((count, 2), bool), np.ones(count, bool)
        if split == 'test':
            mask[3] = False
            is_there[4] = False
            # Its neighbour in the training part is another one than what it shows.
            embeddings[2] = [0, 0.9, 1, 0]
        else:
            embeddings[1] = [0, 1, 0.8, 0]
        return {
            'pooled': {'video': embeddings},
            'mask': {'text': mask},
            'valid': {'video': is_there, 'text': np.ones(count, bool)},
            'data': {'text': text},
        }


def test_captions_are_scored_beside_neighbours_and_chance():
    evaluator = evals.build('told', ConfigDict({'type': 'captions', 'metrics': ('BLEU',)}))
    result = evaluator.run(View(Writes()))
    assert result.artifacts['clips'] == 3
    first = result.artifacts['examples'][0]
    assert first == {'caption': 'one one', 'nearest': 'one one', 'references': ['one one', 'one']}
    # All three are told right; a neighbour is wrong for the third.
    assert [x['nearest'] for x in result.artifacts['examples']] == ['one one', 'two two', 'two two']
    np.testing.assert_allclose(result.scalars['BLEU-1'], 1, rtol=1e-6)
    np.testing.assert_allclose(result.scalars['nearest/BLEU-1'], 2 / 3, rtol=1e-6)
    assert result.artifacts['BLEU-1/chance'] < 1


def test_neighbours_have_the_largest_cosine():
    draw = np.random.default_rng(0)
    queries, gallery = draw.normal(size=(5, 3)), draw.normal(size=(7, 3))
    for query, found in zip(queries, nearest(queries, gallery)):
        cosines = [query @ x / np.sqrt((query @ query) * (x @ x)) for x in gallery]
        assert found == int(np.argmax(cosines))


def test_a_model_that_writes_nothing_has_no_captions():
    evaluator = evals.build('told', ConfigDict({'type': 'captions'}))
    with pytest.raises(ConfigError, match="captions are written by .*'captioning', got 'none'"):
        evaluator.run(View(None))


# ---- as a run


@pytest.mark.slow
def test_both_phases_train_and_the_run_writes_captions(tmp_path):
    c = configs.load('configs/clipcap.py:demo,synthetic')
    configs.override(
        c,
        [
            ('steps', '2'),
            ('batch_size', '8'),
            ('data.synthetic_size', '16'),
            ('optimizer.schedule.warmup', '1'),
            ('report', 'False'),
        ],
    )
    changes = {'towers': {'evals': {}}, 'captions': {'steps': 2, 'optimizer.schedule.warmup': 1}}
    c.phases = tuple((name, {**fields, **changes[name]}) for name, fields in c.phases)
    train_phases.run(c, tmp_path / 'run', data_pipelines.open, quiet=True)
    folder = tmp_path / 'run' / 'phases' / '2-captions'
    results = evals.load(max((folder / 'evals').glob('step_*')))['captions']
    assert results.artifacts['clips'] > 0
    model = vatt_jax.load(folder)
    captions = model.caption(video=np.zeros((3, 8, 32, 32, 3), np.uint8), batch_size=2)
    assert len(captions) == 3 and len(set(captions)) == 1
    assert model.caption(video=np.zeros((8, 32, 32, 3), np.uint8), batch_size=2) == captions[0]
    with pytest.raises(ConfigError, match='trained to tell video; pass video='):
        model.caption(image=None, audio=np.zeros(16_000, np.float32))
