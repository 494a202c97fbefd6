"""Clipping by TensorFlow's norm of looked-up position tables (config.optimizer.clip_lookups)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import data_pipelines
from tests import tiny
from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.models.embeddings import LOOKUP_PROBES, Positions
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

GRID = (2, 3, 4)
NAMES = ('temporal', 'vertical', 'horizontal')
WIDTH = 5


def module(transposed=False):
    return Positions(GRID, NAMES, WIDTH, dropout=0.0, transposed=transposed)


def token_gradients(tables, weights, axes):
    """Gradient of Σ weights · LayerNorm(Σ of the tables' rows) at each token [N D], float64."""
    total = np.zeros((*GRID, WIDTH))
    for table, axis in zip(tables, axes):
        shape = [1] * len(GRID) + [WIDTH]
        shape[axis] = len(table)
        total = total + np.asarray(table, np.float64).reshape(shape)
    rows = total.reshape(-1, WIDTH)
    centred = rows - rows.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    unit = centred / deviation
    mean_of_product = (weights * unit).mean(-1, keepdims=True)
    return (weights - weights.mean(-1, keepdims=True) - unit * mean_of_product) / deviation


@pytest.mark.parametrize('kept', [None, np.array([0, 5, 7, 20])])
def test_probes_give_the_excess_of_each_table(kept):
    positions = module()
    rng = Rng.create(0, 0, jnp.zeros((3,), jnp.uint32))
    x = jnp.zeros((3, 24 if kept is None else len(kept), WIDTH))
    params = positions.init(jax.random.key(0), x, GRID, kept, rng, False)['params']
    params = jax.tree.map(
        lambda leaf: leaf.value if hasattr(leaf, 'value') else leaf,
        params,
        is_leaf=lambda leaf: hasattr(leaf, 'value'),
    )
    factors = np.random.default_rng(0).normal(size=x.shape)

    def loss(params, probes):
        variables = {'params': params}
        if probes is not None:
            variables[LOOKUP_PROBES] = probes
        return jnp.sum(positions.apply(variables, x, GRID, kept, rng, False) * factors)

    probes = {f'{name}_positions': jnp.zeros(()) for name in NAMES}
    value, (grads, excess) = jax.value_and_grad(loss, argnums=(0, 1))(params, probes)
    plain_value, plain_grads = jax.value_and_grad(loss)(params, None)
    # Probes change neither values nor gradients.
    assert value == plain_value
    for name, grad in grads.items():
        expected = plain_grads[name]
        if hasattr(grad, 'shape'):
            np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)

    weights = np.zeros((24, WIDTH))
    weights[slice(None) if kept is None else kept] = factors.sum(0)
    tables = [params[f'{name}_positions'] for name in NAMES]
    by_token = token_gradients(tables, weights, axes=(0, 1, 2)).reshape(*GRID, WIDTH)
    for axis, name in enumerate(NAMES):
        others = tuple(other for other in range(3) if other != axis)
        by_row = by_token.sum(others)
        expected = (by_token**2).sum() - (by_row**2).sum()
        assert excess[f'{name}_positions'] == pytest.approx(expected, rel=1e-4)


def test_the_clip_takes_the_excess_of_the_paths_that_it_clips():
    config = tiny.config().optimizer
    config.update({'name': 'sgd', 'momentum': 0.0, 'clip': 1.0, 'clip_paths': ('^model/',)})
    config.schedule.update({'name': 'constant', 'peak': 1.0, 'warmup': 0})
    params = {'model': {'a': jnp.zeros(2), 'b': jnp.zeros(2)}, 'objective': {'c': jnp.zeros(2)}}
    grads = jax.tree.map(lambda leaf: leaf + 3.0, params)
    excess = {'model/a': jnp.asarray(28.0), 'objective/c': jnp.asarray(1000.0)}
    config.clip_lookups = True
    tx = optim.build(config, 10, params)
    updates, _ = tx.update(grads, tx.init(params), params, lookup_excess=excess)
    # 4 · 3² + 28 = 8²
    np.testing.assert_allclose(updates['model']['a'], -3.0 / 8, rtol=1e-6)
    np.testing.assert_allclose(updates['objective']['c'], -3.0)
    # Without an excess it is the plain clip.
    updates, _ = tx.update(grads, tx.init(params), params)
    config.clip_lookups = False
    plain = optim.build(config, 10, params)
    expected, _ = plain.update(grads, plain.init(params), params)
    for name in ('a', 'b'):
        np.testing.assert_allclose(updates['model'][name], expected['model'][name], rtol=1e-6)


@pytest.mark.slow
def test_a_step_clips_by_that_norm():
    """The whole step: what plain clipping by a norm made so much larger does to parameters."""
    config = tiny.config(optimizer__clip=0.5, optimizer__clip_lookups=True)
    config.optimizer.update({'name': 'sgd', 'momentum': 0.0})
    config.optimizer.schedule.update({'name': 'constant', 'peak': 1.0, 'warmup': 0})
    config.objective = ConfigDict({'name': 'contrastive'})
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        before = jax.tree.map(np.asarray, state.params)
        from vatt_jax.inference import feature_extractor

        batch = feature_extractor.place_on_mesh(next(data.train(0, config.batch_size)), built.mesh)
        # The gradient and the excess by themselves.
        function = train_step.gradients(config, built.model, built.objective)

        def probe(state, batch):
            rng = Rng.create(config.seed, state.step, batch['position'])
            both = {**state.params, **train_step.probes(config, state.params)}
            grads, _ = function(both, state.batch_stats, state.frozen, state.objective, batch, rng)
            return grads

        grads = jax.jit(probe)(state, batch)
        excess = sum(float(x) for x in jax.tree.leaves(grads.pop(LOOKUP_PROBES)))
        squared = float(optax.global_norm(grads)) ** 2
        grads = jax.tree.map(np.asarray, grads)
        new_state, metrics = built.step(state, batch)
        after = jax.tree.map(np.asarray, new_state.params)
    assert excess != 0
    # The reported norm stays that of the true gradient.
    assert float(metrics['grad_norm']) == pytest.approx(squared**0.5, rel=1e-5)
    scale = 0.5 / (squared + excess) ** 0.5
    assert scale < 1
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        new, grad = after, grads
        for key in path:
            new, grad = new[key.key], grad[key.key]
        np.testing.assert_allclose(new - old, -scale * grad, rtol=2e-3, atol=1e-6)


def test_microbatches_are_refused():
    config = tiny.config(accumulate=2, optimizer__clip=1.0, optimizer__clip_lookups=True)
    with pytest.raises(ConfigError, match='clip_lookups: expected config.accumulate=1'):
        loop.check(config)
