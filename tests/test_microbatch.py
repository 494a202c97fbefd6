"""Microbatches under one loss of the whole batch (config.accumulation='exact'): the gradient is that of the batch in one go, random bits included."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax import config as configs
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step


def config(**fields):
    """Dropout everywhere; one permutation of DropToken for the batch (video) and one for each clip (audio)."""
    c = tiny.config(**{'accumulate': 4, 'accumulation': 'exact', **fields})
    c.model.towers.audio.per_example = True
    return c


def gradients(c):
    """(gradients by path, Loss) of the first step; a clip lacks its video and one its words."""
    data = data_pipelines.open(c)
    built = loop.build(c, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = next(data.train(0, c.batch_size))
        batch['video']['valid'][3], batch['text']['valid'][5], batch['text']['mask'][5] = (
            False,
            False,
            False,
        )
        batch = feature_extractor.place_on_mesh(batch, built.mesh)
        of = jax.jit(
            train_step.gradients(c, built.model, built.objective),
            out_shardings=(built.shardings.params, None),
        )
        grads, out = of(
            state.params,
            state.batch_stats,
            state.objective,
            batch,
            Rng.create(c.seed, 0, batch['position']),
        )
    return {
        jax.tree_util.keystr(k): np.asarray(x, np.float64)
        for k, x in jax.tree_util.tree_leaves_with_path(grads)
    }, out


def distance(got, want):
    """Of gradients, relative to the whole one's norm."""
    return np.sqrt(
        sum(((got[k] - want[k]) ** 2).sum() for k in want)
        / sum((x**2).sum() for x in want.values())
    )


@pytest.mark.slow
def test_training_in_microbatches(tmp_path):
    """The loop in float32, scanned and rematerialised: losses of the whole batch's run, but for rounding."""
    curves = {}
    for accumulate in (1, 8):
        c = config(accumulate=accumulate, steps=3, model__scan=True, model__remat='full')
        loop.train(c, data_pipelines.open(c), tmp_path / str(accumulate), quiet=True)
        lines = (tmp_path / str(accumulate) / 'metrics.jsonl').read_text().splitlines()
        curves[accumulate] = [x['loss'] for x in map(json.loads, lines) if 'loss' in x]
    np.testing.assert_allclose(curves[8], curves[1], rtol=1e-4)


def test_what_meets_before_the_cut_is_refused():
    c = config()
    c.model.towers.video = {'name': 's3d'}
    with pytest.raises(
        ConfigError,
        match=r"config.accumulation='exact': the video tower \(s3d\) normalises by statistics of the batch.*'plain'",
    ):
        loop.check(c)
    c.accumulation = 'plain'
    loop.check(c)
    mixing = objectives.build(
        type(c)({'name': 'classification', 'stream': 'audio', 'form': 'sigmoid', 'mixup': 5})
    )
    with pytest.raises(ConfigError, match='config.objective.mixup mixes clips of the whole batch'):
        train_step.check(config(), models.build(c.model), mixing, {})


@pytest.fixture(scope='module')
def double():
    """Everything in float64: what is left of a difference is not rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, 'float32', jnp.float64)
        patch.setitem(configs.CHOICES, 'compute_dtype', ('float64',))
        jax.config.update('jax_enable_x64', True)
        yield {'compute_dtype': 'float64'}
        jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='module')
def whole(double):
    return gradients(config(accumulate=1, **double))


def test_the_gradient_is_that_of_the_whole_batch(double, whole):
    want, loss = whole
    got, other = gradients(config(**double))
    assert distance(got, want) < 1e-12 and max(np.abs(got[k] - want[k]).max() for k in want) < 1e-10
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10),
        (other.value, other.batch_stats, other.metrics),
        (loss.value, loss.batch_stats, loss.metrics),
    )


def test_on_eight_devices_that_share_the_parameters(double, whole):
    got, _ = gradients(config(accumulate=2, mesh__replica=2, mesh__fsdp=4, **double))
    assert distance(got, whole[0]) < 1e-6


@pytest.mark.slow
def test_plain_accumulation_is_another_loss(double, whole):
    """Its negatives and batch statistics are those of microbatches."""
    assert distance(gradients(config(accumulation='plain', **double))[0], whole[0]) > 0.1
