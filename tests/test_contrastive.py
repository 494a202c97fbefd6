"""The contrastive objective: every form through the loop, learnt temperature, mistakes named."""

import json
import pathlib
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.losses import nce
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.rng import Rng
from vatt_jax.training import loop


def run(workdir, mesh=None, **fields):
    """Losses by step and the last step's logged values of three steps of the tiny model."""
    config = tiny.config(steps=3)
    config.objective = type(config)({'name': 'contrastive', **fields})
    config.mesh.update(mesh or {})
    loop.train(config, data_pipelines.open(config), workdir, quiet=True)
    metrics = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    steps = [line for line in lines if 'loss' in line]
    return [step['loss'] for step in steps], steps[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    [
        {'form': 'clip', 'learn_temperature': True},
        {'form': 'siglip', 'learn_temperature': True},
        {'form': 'symmetric', 'replicas': 4},
        {'form': 'mil_nce'},
    ],
)
def test_training_is_the_same_dense_gathered_and_in_a_ring(tmp_path, fields):
    expected, dense = run(tmp_path / 'dense', method='dense', **fields)
    for method, mesh in (
        ('auto', {}),
        ('gather', {'replica': 8}),
        ('ring', {'replica': 2, 'fsdp': 2, 'model': 2}),
    ):
        got, last = run(tmp_path / method, mesh, method=method, **fields)
        np.testing.assert_allclose(got, expected, rtol=2e-4)
        for name in ('temperature/video-text', 'bias/video-text'):
            assert (name in last) == (name in dense)
            if name in last:
                np.testing.assert_allclose(last[name], dense[name], rtol=1e-4)
    if fields.get('learn_temperature'):
        initial = {'clip': 0.07, 'siglip': 0.1}[fields['form']]
        assert dense['temperature/video-text'] != initial


@pytest.mark.parametrize(
    'fields, expected',
    [({}, (np.log(100), 1.0, -1.0)), ({'scales': (1.0, 1e3)}, (np.log(1e3), 1.0, 0.0))],
)
def test_the_learnt_scale_stops_at_its_bounds(fields, expected):
    objective = Contrastive({'form': 'clip', 'learn_temperature': True, **fields})
    before = {'log_scale': jnp.array([9.0, 1.0, -1.0])}
    _, params, _ = objective.after_update({}, before, {}, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, before)
    chex.assert_trees_all_close(params, {'log_scale': np.float32(expected)}, rtol=1e-6)


@pytest.mark.parametrize(
    'fields, message',
    [
        (
            {'form': 'triplet'},
            "config.objective.form='triplet': choose one of asymmetric, symmetric, clip",
        ),
        (
            {'method': 'rign'},
            "config.objective.method='rign': choose one of auto, gather, ring, dense",
        ),
        ({'dtype': 'float16'}, "config.objective.dtype='float16': choose one of float32, bfloat16"),
        ({'temperature': -1.0}, 'config.objective.temperature=-1: expected a number of at least 0'),
        ({'scales': (2.0, 1.0)}, 'config.objective.scales: expected two rising numbers'),
        ({'replicas': 0}, 'config.objective.replicas: expected a positive number, got 0'),
        ({'blok': 3}, "config.objective.blok=3: no such field; did you mean 'block'"),
        ({'pairs': ()}, 'config.objective.pairs: expected at least one pair'),
        (
            {'pairs': (('video', 'audio', 'va'),)},
            'config.objective.pairs: expected (stream, stream, space, weight of at least 0), got '
            "('video', 'audio', 'va')",
        ),
        (
            {'pairs': (('video', 'audio', 'va', 0.0),)},
            'config.objective.pairs: expected a pair with a weight above 0, got none',
        ),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError) as error:
        Contrastive(fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    'fields, message',
    [
        (
            {'pairs': (('video', 'audio', 'vat', 1.0),)},
            "no 'audio' in space 'vat'; it has video in va",
        ),
        ({'form': 'nt_xent'}, "for form='nt_xent'"),
        (
            {'pairs': (('text', 'video', 'vat', 1.0),)},
            'expected a first stream with one embedding per clip',
        ),
        (
            {'replicas': 5},
            'config.objective.replicas: expected a divisor of the (micro)batch of 16 clips, got 5',
        ),
    ],
)
def test_what_the_model_or_the_batch_does_not_have_is_named(fields, message):
    def embedding(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    spaces = {
        'va': {'video': embedding(16, 8), 'audio': embedding(16, 8)},
        'vat': {'video': embedding(16, 4), 'text': embedding(16, 2, 4)},
    }
    # An objective sizes itself by abstract shapes alone.
    output = types.SimpleNamespace(spaces=spaces)
    spec = Spec(None, output, {'index': embedding(16)}, 64, {})

    with pytest.raises(ConfigError) as error:
        Contrastive(fields).init(jax.random.key(0), spec)
    assert message in str(error.value)


class TestLossOfGivenEmbeddings:
    """The objective on four clips, whose embeddings are given instead of a model's."""

    pairs = (
        ('video', 'audio', 'va', 3.0),
        ('video', 'text', 'vat', 1.0),
    )
    valid = {
        'video': [1, 1, 1, 0],
        'audio': [1, 0, 1, 1],
        'text': [0, 1, 1, 1],
    }

    def spaces(self):
        """Random embeddings of each modality in its spaces."""
        rng = np.random.default_rng(0)
        video = jnp.float32(rng.normal(size=(4, 5)))
        audio = jnp.float32(rng.normal(size=(4, 5)))
        text = jnp.float32(rng.normal(size=(4, 2, 5)))
        return {'va': {'video': video, 'audio': audio}, 'vat': {'video': video, 'text': text}}

    def batch(self):
        """Which clips have each modality."""
        return {
            modality: {'valid': jnp.array(valid, bool), 'data': None}
            for modality, valid in self.valid.items()
        }

    def loss(self, objective, params):
        """The objective's loss of the given embeddings."""
        model = types.SimpleNamespace(apply=lambda *_, **__: (self.spaces(), {}))
        streams = dict.fromkeys(self.valid)
        rng = Rng.create(0, 0, jnp.arange(4))
        loss = objective.compute_loss(model, {}, params, {}, streams, self.batch(), rng)
        chex.assert_shape(loss.value, ())
        chex.assert_type(loss.value, jnp.float32)
        chex.assert_tree_all_finite(loss.metrics)
        return loss

    def objective(self, **fields):
        """The symmetric form of both pairs."""
        fields = {'form': 'symmetric', 'pairs': self.pairs, 'padded': True, **fields}
        return Contrastive(fields)

    @pytest.mark.parametrize('each_mask', [False, True])
    def test_it_is_the_weighted_mean_of_the_pairs_losses_each_on_its_own_masks(self, each_mask):
        got = self.loss(self.objective(each_mask=each_mask), {}).value
        spaces = self.spaces()
        batch = self.batch()
        losses = []
        for first, second, space, _ in self.pairs:
            losses.append(
                nce.symmetric(
                    spaces[space][first],
                    spaces[space][second],
                    x_valid=batch[first]['valid'],
                    y_valid=batch[second]['valid'],
                    each_mask=each_mask,
                )
            )
        np.testing.assert_allclose(got, (3 * losses[0] + losses[1]) / 4, rtol=1e-6)

    def test_a_pair_of_weight_0_is_logged_and_teaches_nothing(self):
        pairs = (self.pairs[0], ('video', 'text', 'vat', 0.0))
        watched = self.objective(pairs=pairs, learn_temperature=True)
        alone = self.objective(pairs=pairs[:1], learn_temperature=True)
        params = {'log_scale': jnp.log(jnp.array([10.0, 20.0]))}
        loss = self.loss(watched, params)
        np.testing.assert_allclose(loss.value, self.loss(alone, params).value, rtol=1e-6)
        assert loss.metrics['loss/video-text'] != loss.metrics['loss/video-audio']
        other = {'log_scale': params['log_scale'] + jnp.array([0.0, 1.0])}
        assert self.loss(watched, other).value == loss.value

    def test_the_scale_of_each_mask_is_the_official_one(self):
        # By the clips that have both: 1 / 2; by each modality's: 4 / 3 · 4 / 3 · 1 / 4.
        by_pair = self.loss(self.objective(each_mask=False), {}).value
        by_each = self.loss(self.objective(each_mask=True), {}).value
        np.testing.assert_allclose(by_each, by_pair * 2 * 4 / (3 * 3), rtol=1e-5)

    def test_a_learnt_temperature_is_logged_for_each_pair(self):
        params = {'log_scale': jnp.log(jnp.array([10.0, 20.0]))}
        metrics = self.loss(self.objective(learn_temperature=True), params).metrics
        assert set(metrics) == {
            'loss/video-audio',
            'loss/video-text',
            'temperature/video-audio',
            'temperature/video-text',
        }
        np.testing.assert_allclose(metrics['temperature/video-audio'], 0.1, rtol=1e-6)
        np.testing.assert_allclose(metrics['temperature/video-text'], 0.05, rtol=1e-6)


def test_each_mask_is_of_the_symmetric_form_alone():
    with pytest.raises(ConfigError, match='each_mask: expected False unless form="symmetric"'):
        Contrastive({'each_mask': True})
