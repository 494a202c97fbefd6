"""Memories on the host: the numbers of those on devices, saved while steps write them."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.test_instance_memory import (
    CLIPS,
    MOMENTUM,
    NEGATIVES,
    RECORDS,
    TERMS,
    WIDTH,
    Identity,
    Reference,
    make,
    make_batch,
    neighbours_of_all_pairs,
)
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.objectives.base import TrainingRecords
from vatt_jax.objectives.memory import host_agreement, negatives
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import columns, host_tables
from vatt_jax.training.host_tables import HostTables
from vatt_jax.training.metrics import Meter
from vatt_jax.training.starting_values import OtherRun
from vatt_jax.training.table_storage import StoredTable

SEED = 7
STEPS = 6
TABLES = {
    f'memory/{view}': jax.ShapeDtypeStruct((RECORDS, WIDTH), jnp.float32)
    for view in ('video', 'audio')
}


def make_step(objective):
    """(state, pooled, device batch, step) -> (loss, gradients, state, written), as train_step."""

    @jax.jit
    def step(state, pooled, batch, number):
        rng = Rng.create(SEED, number, batch['position'])

        def loss_of(pooled):
            loss = objective.compute_loss(
                Identity(), {'batch_stats': {}}, {}, state, pooled, batch, rng
            )
            return loss.value, loss

        (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(pooled)
        is_finite = number != STEPS - 2
        rows = objective.new_rows(batch, loss.writes, is_finite)
        return loss.value, gradients, loss.state, {'records': batch['record'], 'rows': rows}

    return step


def drawn_by(batch, number, agreeing):
    """The negatives of a step, [B K], which tests/test_memory.py holds against enumeration."""
    record = np.asarray(batch['record'])[:, None]
    excluded = record if agreeing is None else np.concatenate([record, agreeing[record[:, 0]]], 1)
    rng = Rng.create(SEED, number, batch['position']).at('negatives')
    return np.asarray(negatives.draw(rng, RECORDS, NEGATIVES, jnp.asarray(excluded)))


@pytest.mark.parametrize(
    'name, axes', [('cross', {'replica': 1}), ('cma', {'replica': 4, 'fsdp': 2})], ids=str
)
def test_steps_are_those_of_float64(name, axes):
    """Losses and gradients of overlapping steps, and the tables that they leave.

    Of 60 records most are looked up again in the step after the one that wrote them.
    """
    fields, terms = TERMS[name]
    on_host, state = make(**fields, memory='host')
    assert 'memory' not in state
    agreeing = None
    if name == 'cma':
        agreeing = np.random.default_rng(5).integers(0, RECORDS, (RECORDS, 3)).astype(np.int32)
    step = make_step(on_host)
    mesh = sharding.make_mesh(axes)
    with jax.set_mesh(mesh):
        arrays = host_tables.first(on_host, TABLES, seed=0)
        tables = HostTables(arrays, on_host, mesh, SEED, Meter())
        reference = Reference(
            {view: arrays[f'memory/{view}'].copy() for view in ('video', 'audio')}, terms
        )
        for number in range(STEPS):
            pooled, batch = make_batch(number, agreeing)
            host_batch = jax.tree.map(np.asarray, batch)
            device_batch = tables.place(host_batch, number)
            loss, gradients, state, written = step(state, pooled, device_batch, number)
            tables.hold(written)
            kept = {view: rows.copy() for view, rows in reference.memory.items()}
            expected, expected_gradients = reference.step(
                pooled, batch, drawn_by(batch, number, agreeing)
            )
            if number == STEPS - 2:  # which is not finite
                reference.memory = kept
            np.testing.assert_allclose(loss, expected, rtol=2e-6)
            chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
        tables.settle()
    for view, rows in reference.memory.items():
        np.testing.assert_allclose(arrays[f'memory/{view}'], rows, atol=1e-6)
    tables.close()
