"""Matching: who is mismatched with what, the loss of a batch, the evaluator, runs."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.test_train import log_lines, run
from vatt_jax.config import ConfigError
from vatt_jax.evals import CHANGES
from vatt_jax.models import Encoded
from vatt_jax.models.fusion import BlockOptions, Fusion, FusionStack
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.forward import mask_of, tokens_of
from vatt_jax.objectives.matching import Matching
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.rng import Rng

THREE = {'streams': ('video', 'text', 'audio'), 'replaced': ('text', 'audio')}

# ---- hard negatives


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(st.integers(0, 4), min_size=7, max_size=7),
    valid=st.lists(st.booleans(), min_size=7, max_size=7),
    seed=st.integers(0, 1000),
    candidates=st.integers(1, 9),
)
def test_of_the_next_few_in_the_circle_the_most_alike_is_taken(records, valid, seed, candidates):
    likeness = np.random.default_rng(seed).normal(size=(7, 7)).astype(np.float32)
    rng = Rng.create(seed, 0, jnp.arange(7))
    partner, has_partner = jax.device_get(
        draw_partners(jnp.array(records), jnp.array(valid), rng, jnp.array(likeness), candidates)
    )
    place = np.array(rng.permutation(7, per_example=False))
    for clip in range(7):
        behind = [np.flatnonzero(place == (place[clip] + step) % 7)[0] for step in range(1, 7)]
        others = [row for row in behind if records[row] != records[clip] and valid[row]]
        assert has_partner[clip] == bool(others)
        if others:
            assert partner[clip] == max(others[:candidates], key=lambda row: likeness[clip, row])


# ---- the loss of a batch


class Meeting:
    """Stands for a model: the mean token of the valid others is added to a stream's vector."""

    meets = True

    def apply(self, variables, encoded, *, valid, train, rng, method):
        assert method == 'interact'
        means = {}
        for name, stream in encoded.items():
            tokens = stream.tokens.reshape(len(stream.tokens), -1, stream.tokens.shape[-1])
            means[name] = jnp.where(valid[name][:, None], tokens.mean(1), 0)
        met = {}
        for name, stream in encoded.items():
            others = sum(means[other] ** 2 for other in encoded if other != name)
            others = others if self.meets else jnp.zeros_like(others)
            leading = others if stream.pooled.ndim == 2 else others[:, None]
            met[name] = stream.replace(pooled=stream.pooled * (1 + leading))
        return met


class Apart(Meeting):
    """A model whose streams do not attend to each other."""

    meets = False


class Batch:
    """Six clips. The second record comes twice; clip 3 is silent, 4 wordless, 5 has no picture."""

    width = 4
    records = [0, 1, 1, 2, 3, 4]
    valid = {
        'video': [1, 1, 1, 1, 1, 0],
        'text': [1, 1, 1, 1, 0, 1],
        'audio': [1, 1, 1, 0, 1, 1],
    }

    def __init__(self, is_whole=False):
        if is_whole:
            self.records = list(range(6))
            self.valid = dict.fromkeys(self.valid, [1] * 6)
        noise = np.random.default_rng(0)
        self.features = {}
        for stream in self.valid:
            leading = (6, 2) if stream == 'text' else (6,)
            self.features[stream] = noise.normal(size=(*leading, 4)).astype(np.float32)
            tokens = noise.normal(size=(*leading, 3, 4)).astype(np.float32)
            self.features[tokens_of(stream)] = tokens
        # Every second sentence of clips 1 and 2 is padding.
        self.features[mask_of('text')] = np.ones((6, 2, 3), np.float32)
        self.features[mask_of('text')][1:3, 1] = 0
        self.head = {
            'kernel': noise.normal(size=(12, 2)).astype(np.float32),
            'bias': noise.normal(size=2).astype(np.float32),
        }

    def fields(self):
        streams = {name: {'valid': jnp.array(v, bool)} for name, v in self.valid.items()}
        return {'record': jnp.array(self.records), **streams}

    def loss(self, objective, model, features=None, head=None):
        features = jax.tree.map(jnp.asarray, features or self.features)
        rng = Rng.create(0, 7, jnp.arange(6))
        variables = {'batch_stats': {}}
        return objective.compute_loss(
            model, variables, head or self.head, {}, features, self.fields(), rng
        )

    def definition(self, objective):
        """(loss, accuracy, usable clips) in float64, clip by clip, by the draws that are made."""
        rng = Rng.create(0, 7, jnp.arange(6))
        replaced = objective.config.replaced
        drawn = np.floor(np.array(rng.at('replaced').uniform()) * len(replaced)).astype(int)
        losses, correct = [], []
        for clip in range(6):
            stream = replaced[drawn[clip]]
            has_stream = jnp.array(self.valid[stream], bool)
            found = draw_partners(jnp.array(self.records), has_stream, rng.at(stream))
            partner, has_partner = (np.array(x)[clip] for x in found)
            others = [name for name in self.valid if name != stream and self.valid[name][clip]]
            if not (self.valid[stream][clip] and has_partner and others):
                continue
            for label, source in ((1, clip), (0, partner)):
                rows = {name: clip for name in self.valid}
                rows[stream] = source
                logits = self.logits(rows, clip)
                losses.append(np.log(np.exp(logits).sum()) - logits[label])
                correct.append(np.argmax(logits) == label)
        return np.mean(losses), np.mean(correct), len(losses) // 2

    def logits(self, rows, clip):
        """Of a clip whose streams are those of these rows."""
        x = {name: np.float64(value) for name, value in self.features.items()}
        means = {}
        for name, row in rows.items():
            mean = x[tokens_of(name)][row].reshape(-1, 4).mean(0)
            means[name] = mean if self.valid[name][clip] else np.zeros(4)
        joined = []
        for name, row in rows.items():
            vector = x[name][row]
            if name == 'text':
                is_sentence = x[mask_of('text')][row].any(-1)
                vector = vector[is_sentence].mean(0)
            others = sum(means[other] ** 2 for other in rows if other != name)
            joined.append(vector * (1 + others) if self.valid[name][clip] else np.zeros(4))
        return np.concatenate(joined) @ np.float64(self.head['kernel']) + self.head['bias']


def test_it_is_the_mean_over_pairs_that_match_and_others():
    batch = Batch()
    objective = Matching(THREE)
    got = batch.loss(objective, Meeting())
    value, accuracy, num_usable = batch.definition(objective)
    assert 3 <= num_usable < 6
    chex.assert_shape(got.value, ())
    np.testing.assert_allclose(got.value, value, rtol=1e-5)
    np.testing.assert_allclose(got.metrics['accuracy'], accuracy, rtol=1e-6)
    np.testing.assert_allclose(got.metrics['share/usable'], num_usable / 6, rtol=1e-6)


def test_the_contrastive_form_tells_a_clip_from_its_mismatched_ones():
    batch = Batch(is_whole=True)
    objective = Matching({**THREE, 'replaced': ('text',), 'negatives': 3})
    got = batch.loss(objective, Meeting())
    rng = Rng.create(0, 7, jnp.arange(6))
    partners = [
        np.array(draw_partners(jnp.arange(6), jnp.ones(6, bool), rng.at(number).at('text'))[0])
        for number in range(3)
    ]
    losses, correct = [], []
    for clip in range(6):
        sources = [clip, *(partner[clip] for partner in partners)]
        rows = [{**dict.fromkeys(batch.valid, clip), 'text': source} for source in sources]
        logits = np.array([batch.logits(row, clip) for row in rows])  # [4 2]
        scores = logits[:, 1] - logits[:, 0]
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
        correct.append(scores.argmax() == 0)
    np.testing.assert_allclose(got.value, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(got.metrics['accuracy'], np.mean(correct), rtol=1e-6)


def test_what_is_missing_has_zero_gradient_and_the_rest_a_finite_one():
    batch = Batch()
    features = dict(batch.features)
    for stream, valid in batch.valid.items():
        missing = ~np.array(valid, bool)
        for name in (stream, tokens_of(stream)):
            x = features[name].copy()
            x[missing] = 1e6
            features[name] = x
    objective = Matching(THREE)

    def loss(features):
        return batch.loss(objective, Meeting(), features).value

    gradients = jax.grad(loss)(features)
    chex.assert_tree_all_finite(gradients)
    for stream, valid in batch.valid.items():
        missing = ~np.array(valid, bool)
        for name in (stream, tokens_of(stream)):
            np.testing.assert_array_equal(gradients[name][missing], 0)
            assert np.abs(gradients[name][~missing]).max() > 0


@pytest.mark.parametrize('seed', range(3))
def test_streams_that_do_not_meet_cannot_beat_chance(seed):
    """Each text is in one pair of either kind, so a sum over streams has loss log 2 at best."""
    batch = Batch(is_whole=True)
    noise = np.random.default_rng(seed)
    head = jax.tree.map(lambda x: noise.normal(size=x.shape).astype(np.float32), batch.head)
    objective = Matching({**THREE, 'replaced': ('text',)})
    assert batch.loss(objective, Apart(), head=head).value >= np.log(2) - 1e-6
    nothing = jax.tree.map(np.zeros_like, head)
    np.testing.assert_allclose(
        batch.loss(objective, Apart(), head=nothing).value, np.log(2), rtol=1e-6
    )


def test_predictions_are_of_clips_as_they_are_and_need_all_streams():
    batch = Batch(is_whole=True)
    objective = Matching(THREE)
    encoded = {}
    for stream in batch.valid:
        mask = batch.features[mask_of('text')] > 0 if stream == 'text' else None
        encoded[stream] = Encoded(jnp.asarray(batch.features[stream]), mask=mask)
    logits = objective.predict(batch.head, {}, encoded)['matching']
    batch.features.update({tokens_of(stream): np.zeros((6, 1, 4)) for stream in batch.valid})
    expected = [batch.logits(dict.fromkeys(batch.valid, clip), clip) for clip in range(6)]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert objective.predict(batch.head, {}, {'text': encoded['text']}) == {}


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'streams': ('video',)}, 'config.objective.streams: expected at least two different'),
        ({'streams': ('text', 'text')}, 'expected at least two different streams'),
        ({'replaced': ()}, 'config.objective.replaced: expected some of the streams'),
        ({'replaced': ('audio',)}, "config.objective.replaced: expected some of the streams ('vi"),
        ({'candidates': 0}, 'config.objective.candidates=0: expected a number'),
        ({'negatives': -1}, 'config.objective.negatives=-1: expected a number'),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError) as error:
        Matching(fields)
    assert message in str(error.value)


def test_a_model_whose_streams_do_not_meet_is_refused():
    encoded = {name: Encoded(jnp.zeros((2, 4))) for name in ('video', 'text')}
    outputs = types.SimpleNamespace(encoded=encoded)
    for fusion in ({}, {'streams': ('video', 'audio')}):
        model = types.SimpleNamespace(config={'fusion': fusion, 'towers': {}})
        with pytest.raises(
            ConfigError, match='expected a model in which streams meet, video, text'
        ):
            Matching({}).init(jax.random.key(0), Spec(model, outputs, {}, 64, {}))


# ---- what an evaluator shows


@pytest.mark.parametrize('num_rows', [2, 3, 6, 32, 64, 512])
def test_the_other_clip_of_cyclic_data_is_of_another_class(num_rows):
    """Of classes in turn, an even number of each, the other clip must not be of the same class."""
    kind = np.arange(num_rows) % 16
    batch = {'valid': np.ones(num_rows, bool), 'text': {'data': kind, 'valid': kind >= 0}}
    other = CHANGES['other_text'](batch)['text']
    assert (other['data'] != kind).all()
    assert sorted(other['data']) == sorted(kind)


@pytest.mark.parametrize('num_real', [1, 2, 5, 6])
def test_every_clip_gets_the_stream_of_another_one(num_real):
    is_real = np.arange(6) < num_real
    text = {'data': np.arange(6)[:, None], 'valid': is_real & (np.arange(6) != 2)}
    batch = {'valid': is_real, 'text': text, 'video': {'data': np.arange(6)}}
    changed = CHANGES['other_text'](batch)
    found = changed['text']['data'][:num_real, 0]
    assert changed['video'] is batch['video']
    if num_real == 1:
        assert not changed['text']['valid'].any()
        return
    assert sorted(found) == list(range(num_real))
    assert (found != np.arange(num_real)).all()
    np.testing.assert_array_equal(changed['text']['valid'][:num_real], text['valid'][found])


# ---- runs


def config_of(**overrides):
    """Two tiny towers of one layer, whose streams meet in one merged layer."""
    config = tiny.config(steps=3, **overrides)
    del config.model.towers['audio']
    config.model.towers.video.layers = 1
    config.model.fusion = {'types': ('merged',), 'mlp': 32, 'heads': 2, 'head_width': 8}
    config.objective = type(config)({'name': 'matching'})
    config.evals.matching = {'type': 'matching', 'limit': 24}
    return config


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder, done.json) of a run."""
    folder = tmp_path_factory.mktemp('matching')
    return folder, run(folder, config_of())


def steps_of(folder):
    return [line for line in log_lines(folder) if 'loss' in line]


def test_a_run_trains_what_meets_and_is_evaluated(whole):
    lines = log_lines(whole[0])
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 3
    assert all(np.isfinite(step['loss']) and step['share/usable'] == 1 for step in steps)
    scalars = {name: value for line in lines for name, value in line.items() if 'eval/' in name}
    for name in ('accuracy', 'binary_accuracy'):
        assert 0 <= scalars[f'eval/matching/{name}'] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    [
        {'mesh__replica': 2, 'mesh__fsdp': 2, 'mesh__model': 2},
        {'accumulate': 2, 'accumulation': 'exact'},
        {'model__remat': 'full'},
    ],
)
def test_meshes_microbatches_and_recomputation_learn_the_same(fields, whole, tmp_path):
    run(tmp_path, config_of(**fields))
    for expected, got in zip(steps_of(whole[0]), steps_of(tmp_path), strict=True):
        for name in ('loss', 'accuracy', 'grad_norm'):
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-3)


class ToyModel:
    """A fusion stack without towers."""

    def __init__(self, kind):
        options = BlockOptions(mlp=32, heads=2, head_width=8)
        self.fusion = Fusion(FusionStack(('video', 'text'), (kind, kind), options))

    def apply(self, variables, encoded, *, valid, train, rng, method):
        return self.fusion.apply({'params': variables['params']}, encoded, valid, rng, train)


def toy_batch(step):
    """64 clips of four kinds, each of which has a vector of its own in either stream."""
    kinds = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (64,), 0, 4)
    features = {}
    for number, stream in enumerate(('video', 'text')):
        vectors = jax.random.normal(jax.random.key(2 + number), (4, 8))
        features[stream] = jnp.ones((64, 8))
        features[tokens_of(stream)] = vectors[kinds][:, None]
    valid = {name: {'valid': jnp.ones(64, bool)} for name in ('video', 'text')}
    # Clips of one kind match each other: as if they were of one record.
    return features, {'record': kinds, **valid}


@pytest.mark.slow
@pytest.mark.parametrize('kind, learns', [('merged', True), ('co', True), ('specific', False)])
def test_matching_needs_attention_across_streams(kind, learns):
    model, objective = ToyModel(kind), Matching({})
    features, _ = toy_batch(0)
    encoded = {s: Encoded(features[s], features[tokens_of(s)]) for s in ('video', 'text')}
    fusion = model.fusion.init(jax.random.key(0), encoded, None, None, False)['params']
    outputs = types.SimpleNamespace(encoded=encoded)
    head, _ = objective.init(jax.random.key(1), Spec(None, outputs, {}, 64, {}))
    params = jax.tree.map(jnp.asarray, meta.unbox({'fusion': fusion, 'head': head}))
    optimizer = optax.adam(3e-3)

    def loss_of(params, step):
        features, batch = toy_batch(step)
        variables = {'params': params['fusion'], 'batch_stats': {}}
        rng = Rng.create(0, step, jnp.arange(64))
        loss = objective.compute_loss(model, variables, params['head'], {}, features, batch, rng)
        return loss.value, loss.metrics['accuracy']

    def update(carry, step):
        params, slots = carry
        (_, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(params, step)
        updates, slots = optimizer.update(grads, slots)
        return (optax.apply_updates(params, updates), slots), accuracy

    train = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.arange(300)))
    _, accuracy = train((params, optimizer.init(params)))
    last = float(accuracy[-30:].mean())
    if learns:
        assert last > 0.95
    else:
        # 30 · 128 decisions: a deviation of chance is 0.008.
        assert abs(last - 0.5) < 0.05
