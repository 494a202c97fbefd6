"""The pure training step: device stage, objective, gradients, update, finite guard."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vatt_jax import optim
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.objectives.base import Loss
from vatt_jax.rng import Rng
from vatt_jax.training.train_state import TrainState


def gradients(config, model, objective):
    """(params, batch_stats, objective state, device batch, rng) -> (gradients of params, Loss) of one step, in microbatches where config says so."""
    parts = config.accumulate
    # Microbatch a takes rows a, a+parts, …: every device keeps its rows, where contiguous blocks would move them.
    split = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def device_stage(batch, rng: Rng):
        return preprocess.device_stage(
            batch,
            config.model.inputs,
            config.augment,
            rng.at('augment'),
            augment=True,
            dtype=config.compute_dtype,
        )

    def whole(params, batch_stats, objective_state, batch, rng: Rng):
        """(gradients, Loss) of a batch in one go."""
        batch = device_stage(batch, rng)

        def loss(params):
            variables = {'params': params['model'], 'batch_stats': batch_stats}
            out = objective.loss(model, variables, params['objective'], objective_state, batch, rng)
            return out.value, out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, out

    def plain(params, batch_stats, objective_state, batch, rng: Rng):
        """Means over microbatches, each with a loss of its own."""

        def one(carry, part):
            stats, objective_state, total = carry
            examples, part = part
            grads, out = whole(params, stats, objective_state, part, rng.replace(examples=examples))
            total = jax.tree.map(lambda t, g: t + g / parts, total, grads)
            return (out.batch_stats, out.state, total), (
                out.value,
                out.metrics,
                jnp.asarray(out.apply_update),
            )

        zeros = jax.tree.map(jnp.zeros_like, params)
        (stats, objective_state, grads), (value, metrics, apply) = jax.lax.scan(
            one,
            (batch_stats, objective_state, zeros),
            (split(rng.examples), jax.tree.map(split, batch)),
        )
        return grads, Loss(
            value.mean(),
            jax.tree.map(lambda m: m.mean(0), metrics),
            stats,
            objective_state,
            apply.all(),
        )

    def exact(params, batch_stats, objective_state, batch, rng: Rng):
        """Gradients and Loss of `whole`, with the activations of one microbatch at a time: the pooled vectors of all clips, the loss and its
        gradient at them, then each microbatch's towers again, backwards from there (GradCache; Gao et al. 2021)."""
        cut = split(rng.examples), jax.tree.map(split, batch)

        def towers(params, part):
            examples, part = part
            mine = rng.replace(examples=examples)
            return objective.encode(
                model,
                {'params': params['model'], 'batch_stats': batch_stats},
                device_stage(part, mine),
                mine,
            )[0]

        def rest(params, pooled):
            variables = {'params': params['model'], 'batch_stats': batch_stats}
            out = objective.compute_loss(
                model, variables, params['objective'], objective_state, pooled, batch, rng
            )
            return out.value, out

        _, pooled = jax.lax.scan(lambda _, part: (None, towers(params, part)), None, cut)
        (_, out), (grads, at_pooled) = jax.value_and_grad(rest, argnums=(0, 1), has_aux=True)(
            params, jax.tree.map(join, pooled)
        )

        def back(total, part):
            part, cotangent = part
            (grads,) = jax.vjp(lambda p: towers(p, part), params)[1](cotangent)
            return jax.tree.map(jnp.add, total, grads), None

        grads, _ = jax.lax.scan(back, grads, (cut, jax.tree.map(split, at_pooled)))
        return grads, out

    return whole if parts == 1 else {'plain': plain, 'exact': exact}[config.accumulation]


def make(config, model, objective, tx: optax.GradientTransformation):
    """step(state, batch) -> (state, metrics). batch: a device batch of global arrays, uint8 / int16 / int32.

    metrics: float32 scalars, and `index`/`source` [B], so that a bad step can name its records one step late.
    """
    rate = optim.schedule(config.optimizer.schedule, config.steps)
    of_step = gradients(config, model, objective)

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = Rng.create(config.seed, state.step, batch['position'])
        grads, out = of_step(state.params, state.batch_stats, state.objective, batch, rng)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(out.value) & jnp.isfinite(norm)
        apply = finite & jnp.asarray(out.apply_update)

        updates, opt_state = tx.update(grads, state.opt_state, state.params, apply=apply)
        params = optax.apply_updates(state.params, updates)
        model_params, objective_params, objective_state = objective.after_update(
            params['model'], params['objective'], out.state, state.step
        )
        params = {'model': model_params, 'objective': objective_params}
        params = optim.kept(apply, params, state.params)
        decay = config.optimizer.ema
        new = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=optim.kept(finite, out.batch_stats, state.batch_stats),
            opt_state=opt_state,
            objective=optim.kept(finite, objective_state, state.objective),
            ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params['model'])
            if decay
            else {},
            bad=jnp.where(finite, 0, state.bad + 1),
            skipped=state.skipped + jnp.where(finite, 0, 1),
        )
        metrics = {
            **out.metrics,
            'loss': out.value,
            'grad_norm': norm,
            'lr': rate(state.step),
            'valid': jnp.mean(batch['valid'].astype(jnp.float32)),
            'bad': new.bad,
            'skipped': new.skipped,
            'index': batch['index'],
            'source': batch['source'],
        }
        return new, metrics

    return step


def check(config, model, objective, batch_stats) -> None:
    """Raises ConfigError where config.accumulation='exact' would not be exact. batch_stats: of the model, abstract."""
    if config.accumulate == 1 or config.accumulation != 'exact':
        return
    met = model.batch_normed(batch_stats)
    if met:
        raise ConfigError(
            f"config.accumulation='exact': the {met[0]} tower ({config.model.towers[met[0]].name}) normalises by statistics of the "
            "batch, which microbatches do not have; set config.accumulation='plain', or config.accumulate=1, or choose a tower "
            'without batch norm'
        )
    if objective.mixes_examples:
        raise ConfigError(
            "config.accumulation='exact': config.objective.mixup mixes clips of the whole batch before the towers; set mixup=0, "
            "or config.accumulation='plain'"
        )
