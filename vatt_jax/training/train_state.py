"""Everything a step changes, as one pytree with one sharding tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.config import ConfigError, choose
from vatt_jax.models import adapters
from vatt_jax.models.towers import stages
from vatt_jax.objectives.base import Objective, Spec
from vatt_jax.objectives.memory import teacher as teachers
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng


class TrainState(flax.struct.PyTreeNode):
    """What a step takes and returns; abstract values and shardings come in the same form.

    Attributes:
        step: int32 [], optimizer steps taken; skipped ones count.
        params: {'model', 'objective'}, trees of parameters. With config.base those of the model
            are the new ones alone.
        batch_stats: the model's running statistics; with config.base the new ones alone.
        opt_state: the optimizer's slots.
        objective: the objective's untrained arrays.
        ema: averaged parameters of the model; {} where none are kept.
        bad: int32 [], non-finite steps in a row.
        skipped: int32 [], non-finite steps so far.
        frozen: {'params', 'batch_stats'} of the model of config.base, which no step changes and no
            checkpoint holds; {} without it.
    """

    # Any: the same class holds arrays, ShapeDtypeStructs and NamedShardings.
    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    objective: Any
    ema: Any
    bad: Any
    skipped: Any
    frozen: Any = flax.struct.field(default_factory=dict)

    def variables(self) -> dict[str, Any]:
        """{'params', 'batch_stats'} of the whole model."""
        new = {'params': self.params['model'], 'batch_stats': self.batch_stats}
        return whole_model(new, self.frozen)


def whole_model(new: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """{'params', 'batch_stats'} of a model, of its new part and the frozen one ({}: none)."""
    return {group: adapters.merge(tree, frozen.get(group, {})) for group, tree in new.items()}


def abstract(
    model: nn.Module,
    batch: Any,
    size: int,
    labels: Mapping[str, int],
    towerless: Sequence[str] = (),
    features: bool = False,
) -> Spec:
    """What an objective may size itself by; nothing is computed.

    Args:
        model: the Linen module.
        batch: abstract device batch (after preprocess.device_stage) of one microbatch.
        size: records of the training set (M).
        labels: name -> number of classes.
        towerless: streams of the batch that the model does not read
            (`Objective.frozen_streams`, `own_streams`).
        features: whether outputs hold every token (`Objective.map_streams`).
    """

    def init(key: Array, batch: Any) -> tuple[Any, dict[str, Any]]:
        # train=False draws nothing; the rng only has to have the right shape.
        rng = Rng.create(0, 0, jnp.zeros(batch['index'].shape, jnp.uint32))
        read = {name: value for name, value in batch.items() if name not in towerless}
        # With the stages of towers, so that an evaluator which asks for one that is not there is
        # told so before the run.
        outputs, variables = model.init_with_output(
            key, read, train=False, rng=rng, features=features, mutable=True
        )
        kept = {name: variables[name] for name in variables if name != stages.COLLECTION}
        # A model without towers has none: the objective's own network is all there is.
        return outputs, {'params': {}, **kept}

    # Jitted, so that all who ask for its shapes or values share one trace.
    jitted_init = jax.jit(init)
    key = jax.eval_shape(lambda: jax.random.key(0))
    outputs, variables = jax.eval_shape(jitted_init, key, batch)
    # Absent for towers without batch norm.
    batch_stats = variables.get('batch_stats', {})
    return Spec(model, outputs, batch, size, labels, batch_stats, jitted_init)


def create(
    config: ConfigDict, model: nn.Module, objective: Objective, spec: Spec, mesh: Any
) -> tuple[Callable[[], TrainState], TrainState, TrainState, optax.GradientTransformation]:
    """How a run's TrainState is made, and how it lies on the mesh.

    The whole state, optimizer counters included, is made under jit with explicit shardings:
    arrays made outside sit on one device. Initial values depend on config.seed alone, not on the
    mesh.

    Args:
        config: of the run.
        model: the Linen module.
        objective: of that config.
        spec: of model and data (`abstract`).
        mesh: its devices need not be here, as long as nothing is computed.

    Returns:
        (init, abstract state, shardings, optimizer); `init()` makes the TrainState on the mesh in
        one jitted call.
    """

    def variables(key: Array) -> tuple[dict[str, Any], Any, Any, Any]:
        """(params, batch_stats, objective state, frozen), boxed with their logical axes."""
        # jax.random here, not `Rng`: parameters belong to no example.
        model_key, objective_key = _split(key)
        # Flax initialises by a forward pass. Values depend on the key and on shapes alone, so zeros
        # will do, and under jit the pass itself is dead code that XLA removes.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.batch)
        assert spec.init is not None
        _, boxed = spec.init(model_key, zeros)
        batch_stats = boxed.get('batch_stats', {})
        full_spec = dataclasses.replace(spec, model_params=boxed['params'], batch_stats=batch_stats)
        objective_params, objective_state = objective.init(objective_key, full_spec)
        model_params, frozen = boxed['params'], {}
        if config.get('base'):
            model_params, frozen['params'] = adapters.split(model_params)
            batch_stats, frozen['batch_stats'] = adapters.split(batch_stats)
        params = {'model': model_params, 'objective': objective_params}
        return params, batch_stats, objective_state, frozen

    key = jax.random.key(config.seed)
    # Traced once with the boxes, which carry the logical axes, and below once without: optax and
    # the objectives work on plain arrays.
    boxed_params, boxed_stats, boxed_state, boxed_frozen = jax.eval_shape(variables, key)
    tx = optim.build(config.optimizer, config.steps, nn.meta.unbox(boxed_params))

    def init(key: Array) -> TrainState:
        params, batch_stats, objective_state, frozen = nn.meta.unbox(variables(key))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            objective=objective_state,
            # A copy, since a buffer that occurs twice in the state cannot be donated.
            ema=jax.tree.map(jnp.copy, params['model']) if config.optimizer.ema else {},
            bad=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            frozen=frozen,
        )

    shape = jax.eval_shape(init, key)
    replicated = sharding.replicated(mesh)
    param_shardings = sharding.tree_shardings(boxed_params, mesh)
    shardings = TrainState(
        step=replicated,
        params=param_shardings,
        batch_stats=sharding.tree_shardings(boxed_stats, mesh),
        opt_state=_slot_shardings(tx, shape.opt_state, param_shardings, replicated),
        objective=sharding.tree_shardings(boxed_state, mesh),
        ema=param_shardings['model'] if config.optimizer.ema else {},
        bad=replicated,
        skipped=replicated,
        frozen=sharding.tree_shardings(boxed_frozen, mesh),
    )
    jitted_init = jax.jit(
        lambda: init(key), out_shardings=shardings, compiler_options=_init_options(mesh)
    )
    return jitted_init, shape, shardings, tx


def objective_key(seed: int) -> Array:
    """The key that `Objective.init` is given."""
    return _split(jax.random.key(seed))[1]


def _split(key: Array) -> tuple[Array, Array]:
    """(key of the model's values, key of the objective's)."""
    model_key, objective_key = jax.random.split(key)
    return model_key, objective_key


def _slot_shardings(
    tx: optax.GradientTransformation, opt_state: Any, param_shardings: Any, replicated: Any
) -> Any:
    """Shardings of the optimizer's slots: those of their parameters; counters are replicated."""

    def is_masked(node: Any) -> bool:
        # Frozen parameters have no slots: optax leaves a MaskedNode in their place.
        return isinstance(node, optax.MaskedNode)

    def slot_sharding(slot: Any, param_sharding: Any) -> Any:
        return slot if is_masked(slot) else param_sharding

    # Finds the parts of an optimizer's state that are shaped like the parameters, in whatever
    # transformation they are nested.
    return optax.tree.map_params(
        tx,
        slot_sharding,
        opt_state,
        param_shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=is_masked,
    )


def _init_options(mesh: Any) -> dict[str, int] | None:
    """Compiler options of the initialisation.

    It runs once, and on the CPU LLVM takes seconds over each random draw (a convolutional tower
    has a hundred): unoptimised, the same values come sooner.
    """
    is_cpu = isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == 'cpu'
    return {'xla_backend_optimization_level': 0} if is_cpu else None


def evaluation_variables(
    state: TrainState, objective: Objective, which: str = 'student'
) -> dict[str, Any]:
    """The model's variables as evaluation uses them.

    Args:
        state: of the run.
        objective: of that run.
        which: student, with averaged parameters where they are kept, or teacher, the objective's
            momentum copy (`check_evaluated`).
    """
    # An empty dict is false: no average is kept.
    new = {'params': state.ema or state.params['model'], 'batch_stats': state.batch_stats}
    variables = whole_model(new, state.frozen)
    if which == 'teacher':
        momentum_copy = objective.teacher(state.objective)
        assert momentum_copy is not None
        return teachers.variables(momentum_copy, variables['params'])
    return variables


def check_evaluated(which: str, objective: Objective) -> None:
    """Check config.evaluated against the objective.

    Raises:
        ConfigError: it is none of the two models, or the objective has no teacher.
    """
    choose(which, ('student', 'teacher'), 'config.evaluated')
    if which == 'teacher' and type(objective).teacher is Objective.teacher:
        raise ConfigError(
            f"config.evaluated='teacher': the objective {objective.config.name} keeps no momentum "
            "copy of the model; set config.evaluated='student'"
        )


def fresh_slots(
    tx: optax.GradientTransformation, state: TrainState, patterns: tuple[str, ...]
) -> Any:
    """Optimizer state with some slots as at initialisation.

    Args:
        tx: the optimizer.
        state: its present slots.
        patterns: regular expressions; slots of objective parameters whose path within the
            objective matches one are made anew.
    """
    if not patterns:
        return state.opt_state

    def choose(path: str, old: Any, fresh: Any) -> Any:
        # A slot's path ends as its parameter's does: 'inner/mu/objective/heads/kernel'.
        _, is_objective, name = path.partition('/objective/')
        return fresh if is_objective and optim.matches(name, patterns) else old

    # All slots are made and most thrown away; under jit XLA computes only those that are chosen.
    initial = tx.init(state.params)
    return jax.tree.map(choose, optim.paths(state.opt_state), state.opt_state, initial)
