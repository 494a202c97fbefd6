"""The contrastive objective: every form through the loop, learnt temperature, and mistakes as sentences."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax.config import ConfigError
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.training import loop


def run(workdir, mesh=None, **fields):
    """Losses by step and the last step's logged values of three steps of the tiny model."""
    config = tiny.config(steps=3)
    config.objective = type(config)({'name': 'contrastive', **fields})
    config.mesh.update(mesh or {})
    loop.train(config, data_pipelines.open(config), workdir, quiet=True)
    lines = [
        json.loads(line)
        for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    ]
    lines = [line for line in lines if 'loss' in line]
    return [line['loss'] for line in lines], lines[-1]


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
    want, dense = run(tmp_path / 'dense', method='dense', **fields)
    for method, mesh in (
        ('auto', {}),
        ('gather', {'replica': 8}),
        ('ring', {'replica': 2, 'fsdp': 2, 'model': 2}),
    ):
        got, last = run(tmp_path / method, mesh, method=method, **fields)
        np.testing.assert_allclose(got, want, rtol=2e-4)
        for name in ('temperature/video-text', 'bias/video-text'):
            assert (name in last) == (name in dense)
            if name in last:
                np.testing.assert_allclose(last[name], dense[name], rtol=1e-4)
    if fields.get('learn_temperature'):
        assert dense['temperature/video-text'] != {'clip': 0.07, 'siglip': 0.1}[fields['form']]


def test_the_learnt_scale_stops_at_a_hundred():
    objective = Contrastive({'form': 'clip', 'learn_temperature': True})
    _, params, _ = objective.after_update({}, {'log_scale': jnp.array([9.0, 1.0])}, {}, 0)
    np.testing.assert_allclose(params['log_scale'], [np.log(100), 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    'fields, told',
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
        ({'temperature': -1.0}, 'config.objective.temperature: expected a positive number'),
        ({'replicas': 0}, 'config.objective.replicas: expected a positive number, got 0'),
        ({'blok': 3}, "config.objective.blok=3: no such field; did you mean 'block'"),
        ({'pairs': ()}, 'config.objective.pairs: expected at least one pair'),
        (
            {'pairs': (('video', 'audio', 'va'),)},
            'config.objective.pairs: expected (stream, stream, space, weight above 0), got '
            "('video', 'audio', 'va')",
        ),
    ],
)
def test_mistakes_in_the_config_are_sentences(fields, told):
    with pytest.raises(ConfigError) as error:
        Contrastive(fields)
    assert told in str(error.value)


@pytest.mark.parametrize(
    'fields, told',
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
def test_what_the_model_or_the_batch_does_not_have_is_a_sentence(fields, told):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

    spaces = {
        'va': {'video': shape(16, 8), 'audio': shape(16, 8)},
        'vat': {'video': shape(16, 4), 'text': shape(16, 2, 4)},
    }
    # An objective sizes itself by abstract shapes alone.
    spec = Spec(None, types.SimpleNamespace(spaces=spaces), {'index': shape(16)}, 64, {})

    with pytest.raises(ConfigError) as error:
        Contrastive(fields).init(jax.random.key(0), spec)
    assert told in str(error.value)


def test_weights_and_the_scale_of_masks_reach_the_loss():
    """The weighted mean of the pairs' losses, each on its own masks, from embeddings that are given."""
    from types import SimpleNamespace

    from vatt_jax.losses import nce
    from vatt_jax.rng import Rng

    noise = np.random.default_rng(0)
    video, audio, text = (jnp.float32(noise.normal(size=s)) for s in ((4, 5), (4, 5), (4, 2, 5)))
    spaces = {'va': {'video': video, 'audio': audio}, 'vat': {'video': video, 'text': text}}
    model = SimpleNamespace(apply=lambda *_, **__: (spaces, {}))
    valid = {'video': [1, 1, 1, 0], 'audio': [1, 0, 1, 1], 'text': [0, 1, 1, 1]}
    batch = {m: {'valid': jnp.array(v, bool), 'data': None} for m, v in valid.items()}
    pairs = (('video', 'audio', 'va', 3.0), ('video', 'text', 'vat', 1.0))
    values = {}
    for each in (False, True):
        objective = Contrastive(
            {'form': 'symmetric', 'pairs': pairs, 'padded': True, 'each_mask': each}
        )
        values[each] = float(
            objective.compute_loss(
                model, {}, {}, {}, dict.fromkeys(valid), batch, Rng.create(0, 0, jnp.arange(4))
            ).value
        )
        each_loss = [
            nce.symmetric(
                spaces[s][a],
                spaces[s][b],
                x_valid=batch[a]['valid'],
                y_valid=batch[b]['valid'],
                each_mask=each,
            )
            for a, b, s, _ in pairs
        ]
        np.testing.assert_allclose(values[each], (3 * each_loss[0] + each_loss[1]) / 4, rtol=1e-6)
    learnt = Contrastive(
        {'form': 'symmetric', 'pairs': pairs, 'padded': True, 'learn_temperature': True}
    )
    metrics = learnt.compute_loss(
        model,
        {},
        {'log_scale': jnp.log(jnp.array([10.0, 20.0]))},
        {},
        dict.fromkeys(valid),
        batch,
        Rng.create(0, 0, jnp.arange(4)),
    ).metrics
    assert set(metrics) == {
        f'{what}/video-{other}' for what in ('loss', 'temperature') for other in ('audio', 'text')
    }
    np.testing.assert_allclose(
        [metrics['temperature/video-audio'], metrics['temperature/video-text']],
        [0.1, 0.05],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        values[True], values[False] * 2 * 4 / (3 * 3), rtol=1e-5
    )  # two clips of four have both, three have each
    with pytest.raises(ConfigError, match='each_mask: expected False unless form="symmetric"'):
        Contrastive({'each_mask': True})
