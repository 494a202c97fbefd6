"""Microbatches under one loss of the whole batch (config.accumulation='exact').

The gradient is that of the batch in one go, random bits included.
"""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny, traces
from vatt_jax import config as configs
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step


def make_config(**fields):
    """Dropout everywhere; one DropToken permutation a batch (video) and one a clip (audio)."""
    config = tiny.config(**{'accumulate': 4, 'accumulation': 'exact', **fields})
    config.model.towers.audio.per_example = True
    return config


def first_gradients(config):
    """(gradients, Loss) of the first step; a clip lacks its video and one its words."""
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = next(data.train(0, config.batch_size))
        batch['video']['valid'][3] = False
        batch['text']['valid'][5] = False
        batch['text']['mask'][5] = False
        batch = feature_extractor.place_on_mesh(batch, built.mesh)
        compute_gradients = jax.jit(
            train_step.gradients(config, built.model, built.objective),
            out_shardings=(built.shardings.params, None),
        )
        grads, loss = compute_gradients(
            state.params,
            state.batch_stats,
            state.frozen,
            state.objective,
            batch,
            Rng.create(config.seed, 0, batch['position']),
        )
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, state.params)
    chex.assert_tree_all_finite((grads, loss.value, loss.metrics, loss.batch_stats))
    # On the host, so that gradients of different meshes can be compared.
    return jax.device_get(grads), loss


def global_norm(tree):
    """sqrt(sum of squares of all elements), in float64."""
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))


def relative_distance(grads, expected):
    """‖grads - expected‖ / ‖expected‖ over all parameters together."""
    difference = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), grads, expected)
    return global_norm(difference) / global_norm(expected)


@pytest.mark.slow
def test_training_in_microbatches_has_the_losses_of_the_whole_batch(tmp_path, monkeypatch):
    """The loop in float32, scanned and rematerialised: the same losses but for rounding."""
    curves = {}
    for accumulate in (1, 8):
        config = make_config(accumulate=accumulate, steps=3, model__scan=True, model__remat='full')
        data = data_pipelines.open(config)
        traces.limit_step_to_one(monkeypatch, config, data)
        folder = tmp_path / str(accumulate)
        loop.train(config, data, folder, quiet=True)
        lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        curves[accumulate] = [line['loss'] for line in lines if 'loss' in line]
    assert len(curves[1]) == 3
    np.testing.assert_allclose(curves[8], curves[1], rtol=1e-4)


def test_what_mixes_clips_before_the_pooled_vectors_is_refused():
    config = make_config()
    config.model.towers.video = {'name': 's3d'}
    message = (
        r"config.accumulation='exact': the video tower \(s3d\) normalises by statistics of the "
        r"batch.*'plain'"
    )
    with pytest.raises(ConfigError, match=message):
        loop.check(config)
    config.accumulation = 'plain'
    loop.check(config)

    fields = {'name': 'classification', 'stream': 'audio', 'form': 'sigmoid', 'mixup': 5}
    mixing = objectives.build(type(config)(fields))
    model = models.build(config.model)
    with pytest.raises(ConfigError, match='config.objective.mixup mixes clips of the whole batch'):
        train_step.check(make_config(), model, mixing, {})


@pytest.fixture(scope='module')
def float64():
    """Everything in float64: what is left of a difference is not rounding. Yields the fields."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, 'float32', jnp.float64)
        patch.setitem(configs.CHOICES, 'compute_dtype', ('float64',))
        jax.config.update('jax_enable_x64', True)
        yield {'compute_dtype': 'float64'}
        jax.config.update('jax_enable_x64', False)


@pytest.fixture(scope='module')
def whole_batch(float64):
    """(gradients, Loss) of the batch in one go."""
    return first_gradients(make_config(accumulate=1, **float64))


def test_the_gradient_is_that_of_the_whole_batch(float64, whole_batch):
    expected, expected_loss = whole_batch
    grads, loss = first_gradients(make_config(**float64))
    assert relative_distance(grads, expected) < 1e-12
    chex.assert_trees_all_close(grads, expected, rtol=0, atol=1e-10)
    chex.assert_trees_all_close(
        (loss.value, loss.batch_stats, loss.metrics),
        (expected_loss.value, expected_loss.batch_stats, expected_loss.metrics),
        rtol=1e-10,
    )


@pytest.mark.slow
def test_the_gradient_on_eight_devices_that_share_the_parameters(float64, whole_batch):
    expected, _ = whole_batch
    config = make_config(accumulate=2, mesh__replica=2, mesh__fsdp=4, **float64)
    grads, _ = first_gradients(config)
    assert relative_distance(grads, expected) < 1e-6


@pytest.mark.slow
def test_plain_accumulation_is_another_loss(float64, whole_batch):
    """Its negatives and batch statistics are those of microbatches."""
    expected, _ = whole_batch
    grads, _ = first_gradients(make_config(accumulation='plain', **float64))
    assert relative_distance(grads, expected) > 0.1
