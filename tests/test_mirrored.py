"""Streams that the device makes of others: their mirror in time, augmentation included."""

import chex
import jax
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs.batch import stream_names
from vatt_jax.objectives.base import Loss, Objective
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

MEL = {'bins': 8, 'window': 256, 'hop': 128, 'low': 60.0, 'high': 900.0}


class Streams(Objective):
    """Needs the streams that its config names."""

    def streams(self):
        return tuple(self.config.names)

    def compute_loss(self, model, variables, params, state, pooled, batch, rng):
        value = sum(x.sum() for x in pooled.values())
        return Loss(value, {}, variables['batch_stats'], state)


def config(names, mirrored, mel=None, views=()):
    """A config with an objective of these streams, and all augmentation of sound."""
    c = tiny.config(batch_size=8)
    c.data.views = views
    c.augment.mirrored = mirrored
    c.augment.volume, c.augment.audio_noise = 0.5, 0.1
    if mel:
        c.model.inputs.audio.mel = mel
        c.augment.spec_augment.update({'time_masks': 2, 'time_width': 4})
        c.model.towers.audio = {'name': 'spt', 'layers': 1, 'patch': (2, 8), 'width': 32}
    c.objective = type(c)({'name': 'streams', 'names': names})
    return c


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, 'streams', Streams)


def staged(c):
    """The first training batch after the device stage, as the training step makes it."""
    batch = next(data_pipelines.open(c).train(0, c.batch_size))
    batch['audio']['valid'][2] = False
    batch = feature_extractor.device_part(batch)
    objective = objectives.build(c.objective)
    whole = train_step.WholeBatch(c, models.build(c.model), objective)

    @jax.jit
    def stage(batch):
        return whole.device_stage(batch, Rng.create(0, 0, batch['position']))

    return jax.device_get(stage(batch))


SECOND = (('audio.second', {'kind': 'clip'}), ('video.second', {'kind': 'clip'}))
REVERSED = (('audio.reversed', {'kind': 'reverse'}),)
MIRRORED = (
    ('audio.reversed', 'audio'),
    ('audio.second_reversed', 'audio.second'),
    ('video.reversed', 'video'),
)


@pytest.mark.parametrize('mel', [None, MEL], ids=['waveform', 'log_mel'])
def test_a_mirrored_stream_is_its_source_backwards_bit_for_bit(mel):
    """Volume, noise and masks, crop and colours included; what is missing is missing in both."""
    batch = staged(config((), MIRRORED, mel, SECOND))
    for name, source in MIRRORED:
        forwards, backwards = batch[source]['data'], batch[name]['data']
        np.testing.assert_array_equal(backwards, forwards[:, ::-1])
        assert (backwards != forwards).any()
        np.testing.assert_array_equal(batch[name]['valid'], batch[source]['valid'])
    assert not batch['audio.reversed']['valid'][2]
    if mel:
        assert (batch['audio']['data'] == 0).all(axis=2).any()


def test_a_reversed_view_draws_augmentation_of_its_own():
    c = config((), (), None, REVERSED)
    # Volume alone: the same noise on other samples would be no mirror either.
    c.augment.audio_noise = 0.0
    batch = staged(c)
    forwards, backwards = batch['audio']['data'], batch['audio.reversed']['data']
    there = batch['audio']['valid']
    assert (forwards[there][:, ::-1] != backwards[there]).any(axis=1).all()


def test_the_step_is_built_for_mirrored_streams_that_no_host_sends():
    c = config(('audio', 'audio.reversed'), (('audio.reversed', 'audio'),))
    built = loop.build(c, data_pipelines.open(c))
    assert stream_names(built.batch) == ['audio']
    assert stream_names(built.inputs) == ['audio', 'audio.reversed']
    chex.assert_equal_shape([built.inputs[name]['data'] for name in c.objective.names])


@pytest.mark.parametrize(
    'mirrored, message',
    [
        (('audio.reversed',), 'mirrored: expected pairs of streams such as .*, got '),
        (
            (('audio.back', 'video'),),
            'a view of video or audio and the stream of the same modality',
        ),
        ((('text.back', 'text'),), 'a view of video or audio and the stream of the same modality'),
        (
            (('audio.a', 'audio'), ('audio.b', 'audio.a')),
            "expected 'audio.a' to come with the batch",
        ),
    ],
)
def test_wrong_pairs_are_refused(mirrored, message):
    with pytest.raises(ConfigError, match=message):
        loop.check(config(('audio',), mirrored))


def test_a_stream_whose_source_is_missing_is_missing():
    c = config(('audio', 'audio.reversed'), (('audio.reversed', 'audio.second'),))
    with pytest.raises(
        ConfigError, match="expected the stream 'audio.reversed', the data has audio"
    ):
        loop.build(c, data_pipelines.open(c))
