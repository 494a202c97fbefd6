"""The pure training step: device stage, objective, gradients, update, finite guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Shaped
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.inputs import mirrored, preprocess
from vatt_jax.models import adapters
from vatt_jax.models.embeddings import LOOKUP_PROBES
from vatt_jax.objectives.base import Loss, Objective
from vatt_jax.rng import Rng
from vatt_jax.training.train_state import TrainState, whole_model

# (params, batch_stats, frozen, objective state, device batch, rng) -> (gradients of params, Loss).
# params: {'model': …, 'objective': …}, and the probes of `probes` where they are on. frozen: of the
# TrainState; nothing is differentiated by it, so no gradient of a frozen kernel is computed.
GradientFunction = Callable[[Any, Any, Any, Any, dict[str, Any], Rng], tuple[Any, Loss]]


def make(
    config: ConfigDict,
    model: nn.Module,
    objective: Objective,
    tx: optax.GradientTransformation,
) -> Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Array]]]:
    """Makes the step of a config.

    Args:
        config: of the run.
        model: the Linen module.
        objective: what is being learnt.
        tx: the optimizer.

    Returns:
        step(state, batch) -> (state, metrics), to be jitted. batch: a device batch of global
        arrays, uint8 / int16 / int32. metrics: float32 scalars, and `index` and `source` [B]: the
        host reads metrics one step late, when it no longer has the batch whose records a bad step
        names. With tables of the host also `written`, {'records': [B], 'rows': {name: [B …]}}.
    """
    learning_rate = optim.schedule(config.optimizer.schedule, config.steps)
    compute_gradients = gradients(config, model, objective)
    decay = config.optimizer.ema

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Array]]:
        # The state's own counter, not the host's: a resumed step draws the same bits, and
        # `position`, not the place in the batch, identifies an example (see vatt_jax.rng).
        rng = Rng.create(config.seed, state.step, batch['position'])
        params_and_probes = {**state.params, **probes(config, state.params)}
        grads, loss = compute_gradients(
            params_and_probes, state.batch_stats, state.frozen, state.objective, batch, rng
        )
        lookup_excess = grads.pop(LOOKUP_PROBES, {})
        # Before clipping, which is part of `tx`. One non-finite gradient anywhere makes the norm
        # non-finite, so this one number stands for all.
        grad_norm = optax.global_norm(grads)  # []
        is_finite = jnp.isfinite(loss.value) & jnp.isfinite(grad_norm)  # []
        # An objective that still fills its memory asks for parameters to stay. Batch statistics and
        # that memory move all the same: below they depend on `is_finite` alone.
        is_applied = is_finite & jnp.asarray(loss.apply_update)  # []

        # A jitted step cannot leave the update out, so it is computed in any case. Where it is not
        # applied, `optim.keras.skippable` inside `tx` keeps the old slots, and `tree_select` the
        # old parameters.
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            apply=is_applied,
            lookup_excess=flatten_probes(lookup_excess),
        )
        updated = optax.apply_updates(state.params, updates)
        params = optim.tree_select(is_applied, updated, state.params)
        objective_state = optim.tree_select(is_finite, loss.state, state.objective)
        # After the guard: what an objective derives from parameters (a momentum encoder) must come
        # from those that stay.
        model_params, objective_params, new_objective_state = objective.after_update(
            adapters.merge(params['model'], state.frozen.get('params', {})),
            params['objective'],
            objective_state,
            state.step,
        )
        if state.frozen:
            model_params, _ = adapters.split(model_params)
        constrained = {'model': model_params, 'objective': objective_params}
        # Its constraints round. Parameters that were not updated stay what they were, bit by bit.
        params = _select_changes(is_applied, constrained, params)
        objective_state = _select_changes(is_finite, new_objective_state, objective_state)
        # Last: a select over a memory of millions of rows would read it twice.
        objective_state = objective.write_memory(objective_state, loss.writes, is_finite)

        new_state = TrainState(
            # A skipped step counts too: the data go on, or the same records would come again.
            step=state.step + 1,
            params=params,
            batch_stats=optim.tree_select(is_finite, loss.batch_stats, state.batch_stats),
            opt_state=opt_state,
            objective=objective_state,
            # From the guarded parameters, so that a bad step cannot reach the average.
            ema=moving_average(state.ema, params['model'], decay) if decay else {},
            bad=jnp.where(is_finite, 0, state.bad + 1),
            skipped=state.skipped + jnp.where(is_finite, 0, 1),
            frozen=state.frozen,
        )
        metrics = {
            **loss.metrics,
            'loss': loss.value,
            'grad_norm': grad_norm,
            # By the run's own counter; the optimizer's, which is guarded, counts applied steps
            # only.
            'lr': learning_rate(state.step),
            'valid': jnp.mean(batch['valid'].astype(jnp.float32)),
            'bad': new_state.bad,
            'skipped': new_state.skipped,
            # Not scalars: the records of this step, replicated as all metrics are.
            'index': batch['index'],
            'source': batch['source'],
        }
        if 'tables' in batch:
            # Neither: for the tables of all hosts (host_tables.py), whole on each of them.
            rows = objective.new_rows(batch, loss.writes, is_finite)
            metrics['written'] = {'records': batch['record'], 'rows': rows}
        return new_state, metrics

    return step


def _select_changes(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`; a leaf that is one in both needs no select."""

    def select(new_leaf: Any, old_leaf: Any) -> Any:
        return old_leaf if new_leaf is old_leaf else jnp.where(condition, new_leaf, old_leaf)

    return jax.tree.map(select, new, old)


def probes_are_on(config: ConfigDict) -> bool:
    """Whether gradients are clipped by a norm that counts lookups of a table token by token."""
    return bool(config.optimizer.clip and config.optimizer.get('clip_lookups', False))


def probes(config: ConfigDict, params: Any) -> dict[str, Any]:
    """What is differentiated beside the parameters for config.optimizer.clip_lookups.

    Returns:
        {LOOKUP_PROBES: a zero for each position table, nested as the tables are}; {} without it.
    """
    if not probes_are_on(config):
        return {}
    nested: dict[str, Any] = {}
    for path in jax.tree.leaves(optim.paths(params['model'])):
        *modules, name = path.split('/')
        if not modules or modules[-1] != 'positions' or not name.endswith('_positions'):
            continue
        group = nested
        for module in modules:
            group = group.setdefault(module, {})
        group[name] = jnp.zeros(())
    return {LOOKUP_PROBES: nested}


def flatten_probes(nested: Any) -> dict[str, Array]:
    """Path of each position table -> its probe."""
    names = jax.tree.leaves(optim.paths({'model': nested}))
    return dict(zip(names, jax.tree.leaves(nested), strict=True))


def moving_average(average: Any, params: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def gradients(config: ConfigDict, model: nn.Module, objective: Objective) -> GradientFunction:
    """The function that computes one step's gradients, in microbatches where the config says so."""
    whole = WholeBatch(config, model, objective)
    if config.accumulate == 1:
        return whole.gradients
    if config.accumulation == 'plain':
        return MeanOfMicrobatches(whole, config.accumulate).gradients
    return GradCache(whole, config.accumulate).gradients


class WholeBatch:
    """Gradients of a batch in one go."""

    def __init__(self, config: ConfigDict, model: nn.Module, objective: Objective):
        self.config = config
        self.model = model
        self.objective = objective

    def device_stage(self, batch: dict[str, Any], rng: Rng) -> dict[str, Any]:
        batch = preprocess.device_stage(
            batch,
            self.config.model.inputs,
            self.config.augment,
            rng.at('augment'),
            augment=True,
            dtype=self.config.compute_dtype,
        )
        return mirrored.add(batch, self.config.augment)

    def gradients(
        self,
        params: Any,
        batch_stats: Any,
        frozen: Any,
        objective_state: Any,
        batch: dict[str, Any],
        rng: Rng,
    ) -> tuple[Any, Loss]:
        """One `GradientFunction`: bytes to floats, forwards, backwards."""
        batch = self.device_stage(batch, rng)

        def loss_of(params: Any) -> tuple[Array, Loss]:
            variables = whole_model({'params': params['model'], 'batch_stats': batch_stats}, frozen)
            if LOOKUP_PROBES in params:
                variables[LOOKUP_PROBES] = params[LOOKUP_PROBES]
            loss = self.objective.loss(
                self.model, variables, params['objective'], objective_state, batch, rng
            )
            return loss.value, loss

        # `value` is differentiated. The whole Loss comes back beside it, for the new statistics and
        # the objective's new state, through which no gradient flows.
        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return grads, _of_new_part(loss, frozen)


class MeanOfMicrobatches:
    """Means over microbatches, each with a loss of its own; statistics pass through them."""

    def __init__(self, whole: WholeBatch, num_parts: int):
        self.whole = whole
        self.num_parts = num_parts

    def gradients(
        self,
        params: Any,
        batch_stats: Any,
        frozen: Any,
        objective_state: Any,
        batch: dict[str, Any],
        rng: Rng,
    ) -> tuple[Any, Loss]:
        def one_part(carry: Any, part: Any) -> tuple[Any, Any]:
            batch_stats, objective_state, total = carry
            examples, part_batch = part
            part_rng = _for_examples(rng, examples)
            grads, loss = self.whole.gradients(
                params, batch_stats, frozen, objective_state, part_batch, part_rng
            )
            # The mean, not the sum: the learning rate need not follow the number of microbatches.
            total = jax.tree.map(lambda t, g: t + g / self.num_parts, total, grads)
            outputs = (loss.value, loss.metrics, jnp.asarray(loss.apply_update), loss.writes)
            return (loss.batch_stats, loss.state, total), outputs

        zeros = jax.tree.map(jnp.zeros_like, params)
        # Statistics and the objective's state run through the microbatches as through successive
        # steps; parameters stay.
        carry = (batch_stats, objective_state, zeros)
        # A scan, not a Python loop: one compiled body, whose activations are freed before the next
        # part.
        carry, outputs = jax.lax.scan(one_part, carry, split_batch(batch, rng, self.num_parts))
        batch_stats, objective_state, grads = carry
        values, metrics, apply_update, writes = outputs  # each [parts …]
        mean_loss = Loss(
            values.mean(),
            jax.tree.map(lambda metric: metric.mean(0), metrics),
            batch_stats,
            objective_state,
            apply_update.all(),
            # All microbatches see the memory of the step before.
            jax.tree.map(_join, writes),
        )
        return grads, mean_loss


class GradCache:
    """Gradients and Loss of the whole batch, with the activations of one microbatch at a time.

    GradCache (Gao et al. 2021). With microbatches x_a, towers h_a = f(x_a; w) and one loss
    L(h_1, ..., h_A; w) of all of them together:

        dL/dw = (dL/dw at fixed h)  +  sum over a of (dh_a/dw)^T dL/dh_a

    First the pooled vectors h of all clips, without their activations; then L and its gradient
    at h; then each microbatch's towers again, backwards from dL/dh_a.
    """

    def __init__(self, whole: WholeBatch, num_parts: int):
        self.whole = whole
        self.num_parts = num_parts

    def gradients(
        self,
        params: Any,
        batch_stats: Any,
        frozen: Any,
        objective_state: Any,
        batch: dict[str, Any],
        rng: Rng,
    ) -> tuple[Any, Loss]:
        model, objective = self.whole.model, self.whole.objective
        parts = split_batch(batch, rng, self.num_parts)  # leaves [parts, B / parts, …]
        # The loss reads masks of all streams, and none of their data.
        whole_batch = mirrored.add(batch, self.whole.config.augment)

        def towers(params: Any, part: Any) -> dict[str, Array]:
            examples, part_batch = part
            part_rng = _for_examples(rng, examples)
            variables = whole_model({'params': params['model'], 'batch_stats': batch_stats}, frozen)
            part_batch = self.whole.device_stage(part_batch, part_rng)
            encoding = objective.encode(
                model, variables, params['objective'], objective_state, part_batch, part_rng
            )
            # New statistics would be those of a microbatch; `check` refuses towers that have any.
            return encoding.pooled

        # Pass 1: pooled vectors only. Nothing differentiates through this scan, so no activation is
        # kept.
        def forward(carry: None, part: Any) -> tuple[None, dict[str, Array]]:
            return carry, towers(params, part)

        # Pass 2: heads and loss on the whole batch, with gradients of its own parameters and of h.
        def loss_of(params: Any, pooled: dict[str, Array]) -> tuple[Array, Loss]:
            variables = whole_model({'params': params['model'], 'batch_stats': batch_stats}, frozen)
            loss = objective.compute_loss(
                model, variables, params['objective'], objective_state, pooled, whole_batch, rng
            )
            return loss.value, loss

        # Pass 3: the towers again with activations. They draw the same bits as in pass 1, since
        # these are keyed by example, so the forward values agree with those that dL/dh was taken
        # at.
        def backward(total: Any, part: Any) -> tuple[Any, None]:
            part, pooled_grads = part
            _, towers_vjp = jax.vjp(lambda params: towers(params, part), params)
            (grads,) = towers_vjp(pooled_grads)
            return jax.tree.map(jnp.add, total, grads), None

        _, pooled_parts = jax.lax.scan(forward, None, parts)  # leaves [parts, B / parts, D]
        pooled = jax.tree.map(_join, pooled_parts)  # leaves [B D]
        value_and_grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (_, loss), (grads, pooled_grads) = value_and_grads(params, pooled)

        pooled_grads = jax.tree.map(lambda x: _split(x, self.num_parts), pooled_grads)
        # The carry begins at dL/dw at fixed h, the first term of the formula.
        grads, _ = jax.lax.scan(backward, grads, (parts, pooled_grads))
        return grads, _of_new_part(loss, frozen)


def _of_new_part(loss: Loss, frozen: Any) -> Loss:
    """The loss with statistics of what the state holds outside of `frozen`, which stay."""
    if not frozen:
        return loss
    new_stats, _ = adapters.split(loss.batch_stats)
    # Flax adds `replace` where type checkers do not see it.
    return loss.replace(batch_stats=new_stats)  # type: ignore[attr-defined]


def split_batch(
    batch: dict[str, Any], rng: Rng, num_parts: int
) -> tuple[Shaped[Array, 'A B ...'], dict[str, Any]]:
    """Cuts a step into A microbatches, along a new first axis.

    Returns:
        The ids by which `rng` keys the draws of each example (see `_for_examples`), and the batch.
    """
    return _split(rng.examples, num_parts), jax.tree.map(lambda x: _split(x, num_parts), batch)


def _split(x: Shaped[Array, 'N ...'], num_parts: int) -> Shaped[Array, 'A B ...']:
    # Microbatch a takes rows a, a + A, …: every device keeps its rows, where contiguous blocks
    # would move them.
    return x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)


def _for_examples(rng: Rng, examples: Shaped[Array, 'B ...']) -> Rng:
    """The same random numbers, for some of the examples: those of one microbatch."""
    # Flax adds `replace` where type checkers do not see it.
    return rng.replace(examples=examples)  # type: ignore[attr-defined]


def _join(x: Shaped[Array, 'A B ...']) -> Shaped[Array, 'N ...']:
    """The inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def check(config: ConfigDict, model: nn.Module, objective: Objective, batch_stats: Any) -> None:
    """Checks that config.accumulation='exact' would be exact.

    Args:
        config: of the run.
        model: the Linen module.
        objective: what is being learnt.
        batch_stats: of the model, abstract.

    Raises:
        ConfigError: statistics or mixing of the whole batch come before the pooled vectors, or the
            objective computes its loss in a way of its own.
    """
    if config.accumulate > 1 and probes_are_on(config):
        raise ConfigError(
            'config.optimizer.clip_lookups: expected config.accumulate=1, as the norm of single '
            f'tokens is not a sum over microbatches, got {config.accumulate}. Set '
            '--config.optimizer.clip_lookups=False'
        )
    if config.accumulate == 1 or config.accumulation != 'exact':
        return
    normalised = model.batch_normed(batch_stats)
    if normalised:
        name = normalised[0]
        raise ConfigError(
            f"config.accumulation='exact': the {name} tower ({config.model.towers[name].name}) "
            'normalises by statistics of the batch, which microbatches do not have; set '
            "config.accumulation='plain', or config.accumulate=1, or choose a tower without batch "
            'norm'
        )
    if type(objective).loss is not Objective.loss:
        raise ConfigError(
            f"config.accumulation='exact': the objective {type(objective).__name__} overrides "
            'loss(), which would not be called, only its encode() and compute_loss(); set '
            "config.accumulation='plain', or override those two instead"
        )
    # Mixup pairs each clip with any other of the batch, which may be in another microbatch.
    if objective.mixes_examples:
        name = type(objective).__name__
        mixing = 'config.objective.mixup' if 'mixup' in objective.config else name
        raise ConfigError(
            f"config.accumulation='exact': {mixing} mixes clips of the whole batch before the "
            "towers; turn that off, or set config.accumulation='plain'"
        )
