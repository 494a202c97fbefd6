"""Everything a step changes, as one pytree with one sharding tree."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vatt_jax import optim
from vatt_jax.objectives.base import Spec
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng


@flax.struct.dataclass
class TrainState:
    """step: int32 [], optimizer steps taken (skipped ones count). params: {'model', 'objective'}. ema: averaged params or
    {}. bad: int32 [], non-finite steps in a row. skipped: int32 [], non-finite steps so far."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    objective: Any
    ema: Any
    bad: jax.Array
    skipped: jax.Array


def abstract(model, batch, size: int, labels) -> Spec:
    """What an objective may size itself by; nothing is computed.

    batch: abstract device batch (after preprocess.device_stage) of one microbatch.
    """

    def init(key, b):
        outputs, variables = model.init_with_output(
            key, b, train=False, rng=Rng.create(0, 0, jnp.zeros(b['index'].shape, jnp.uint32))
        )
        return outputs, dict(variables)

    init = jax.jit(init)  # so that all who ask for its shapes or values share one trace
    outputs, variables = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return Spec(model, outputs, batch, size, labels, variables.get('batch_stats', {}), init)


def create(
    config, model, objective, spec: Spec, mesh
) -> tuple[Any, Any, Any, optax.GradientTransformation]:
    """(init, abstract state, shardings, optimizer): `init()` makes the TrainState on the mesh in one jitted call.

    The whole state, optimizer counters included, is made under jit with explicit shardings: arrays made outside sit on
    one device. Initial values depend on config.seed alone, not on the mesh.
    """

    def variables(key):
        model_key, objective_key = jax.random.split(key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.batch)
        _, boxed = spec.init(model_key, zeros)
        objective_params, objective_state = objective.init(objective_key, spec)
        return (
            {'model': boxed['params'], 'objective': objective_params},
            boxed.get('batch_stats', {}),
            objective_state,
        )

    key = jax.random.key(config.seed)
    boxed_params, boxed_stats, boxed_state = jax.eval_shape(variables, key)
    plain = nn.meta.unbox(boxed_params)
    tx = optim.build(config.optimizer, config.steps, plain)

    def init(key):
        params, stats, state = nn.meta.unbox(variables(key))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=stats,
            opt_state=tx.init(params),
            objective=state,
            ema=jax.tree.map(jnp.copy, params['model']) if config.optimizer.ema else {},
            bad=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )

    one = sharding.replicated(mesh)
    masked = lambda x: isinstance(x, optax.MaskedNode)
    param_shardings = sharding.tree_shardings(boxed_params, mesh)
    shape = jax.eval_shape(init, key)
    shardings = TrainState(
        step=one,
        params=param_shardings,
        batch_stats=sharding.tree_shardings(boxed_stats, mesh),
        # Frozen parameters have no slots: optax leaves a MaskedNode in their place.
        opt_state=optax.tree.map_params(
            tx,
            lambda slot, s: slot if masked(slot) else s,
            shape.opt_state,
            param_shardings,
            transform_non_params=lambda _: one,
            is_leaf=masked,
        ),
        objective=sharding.tree_shardings(boxed_state, mesh),
        ema=param_shardings['model'] if config.optimizer.ema else {},
        bad=one,
        skipped=one,
    )
    # It runs once, and LLVM takes seconds over each random draw (a convolutional tower has a hundred): unoptimised, the same values come sooner.
    here = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == 'cpu'
    options = {'xla_backend_optimization_level': 0} if here else None
    return (
        jax.jit(lambda: init(key), out_shardings=shardings, compiler_options=options),
        shape,
        shardings,
        tx,
    )


def evaluation_variables(state: TrainState) -> dict[str, Any]:
    """The model's variables as evaluation uses them: averaged parameters where they are kept."""
    return {'params': state.ema or state.params['model'], 'batch_stats': state.batch_stats}


def fresh_slots(tx, state: TrainState, patterns: tuple[str, ...]) -> Any:
    """Optimizer state with the slots of objective parameters matching `patterns` as at initialisation."""
    if not patterns:
        return state.opt_state
    new = tx.init(state.params)
    names = optim.paths(state.opt_state)
    pick = lambda name, old, fresh: (
        fresh
        if '/objective/' in name and optim.matches(name.split('/objective/')[1], patterns)
        else old
    )
    return jax.tree.map(pick, names, state.opt_state, new)
