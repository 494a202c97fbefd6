"""The pure training step: device stage, objective, gradients, update, finite guard."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vatt_jax import optim, preprocess
from vatt_jax.objectives.base import Loss
from vatt_jax.rng import Rng
from vatt_jax.train_state import TrainState


def make(config, model, objective, tx: optax.GradientTransformation):
    """step(state, batch) -> (state, metrics). batch: a device batch of global arrays, uint8 / int16 / int32.

    metrics: float32 scalars, and `index`/`source` [B], so that a bad step can name its records one step late.
    """
    rate = optim.schedule(config.optimizer.schedule, config.steps)

    def loss_and_gradients(params, batch_stats, objective_state, batch, rng):
        batch = preprocess.device_stage(batch, config.model.inputs, config.augment, rng.at('augment'), augment=True,
                                        dtype=config.compute_dtype)

        def objective_loss(params):
            variables = {'params': params['model'], 'batch_stats': batch_stats}
            out = objective.loss(model, variables, params['objective'], objective_state, batch, rng)
            return out.value, out
        (_, out), grads = jax.value_and_grad(objective_loss, has_aux=True)(params)
        return grads, out

    def accumulated(state: TrainState, batch, rng: Rng):
        if config.accumulate == 1:
            return loss_and_gradients(state.params, state.batch_stats, state.objective, batch, rng)
        parts = config.accumulate
        # Microbatch a takes rows a, a+parts, …: every device keeps its rows, where contiguous blocks would move them.
        split = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        def one(carry, part):
            stats, objective_state, total = carry
            examples, part = part
            grads, out = loss_and_gradients(state.params, stats, objective_state, part, rng.replace(examples=examples))
            total = jax.tree.map(lambda t, g: t + g / parts, total, grads)
            return (out.batch_stats, out.state, total), (out.value, out.metrics, jnp.asarray(out.apply_update))
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (stats, objective_state, grads), (value, metrics, apply) = jax.lax.scan(
            one, (state.batch_stats, state.objective, zeros), (split(rng.examples), jax.tree.map(split, batch)))
        return grads, Loss(value.mean(), jax.tree.map(lambda m: m.mean(0), metrics), stats, objective_state, apply.all())

    def step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = Rng.create(config.seed, state.step, batch['position'])
        grads, out = accumulated(state, batch, rng)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(out.value) & jnp.isfinite(norm)
        apply = finite & jnp.asarray(out.apply_update)

        updates, opt_state = tx.update(grads, state.opt_state, state.params, apply=apply)
        params = optax.apply_updates(state.params, updates)
        model_params, objective_params, objective_state = objective.after_update(
            params['model'], params['objective'], out.state, state.step)
        params = {'model': model_params, 'objective': objective_params}
        params = optim.kept(apply, params, state.params)
        decay = config.optimizer.ema
        new = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=optim.kept(finite, out.batch_stats, state.batch_stats),
            opt_state=opt_state,
            objective=optim.kept(finite, objective_state, state.objective),
            ema=jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params['model']) if decay else {},
            bad=jnp.where(finite, 0, state.bad + 1),
            skipped=state.skipped + jnp.where(finite, 0, 1))
        metrics = {**out.metrics, 'loss': out.value, 'grad_norm': norm, 'lr': rate(state.step),
                   'valid': jnp.mean(batch['valid'].astype(jnp.float32)), 'bad': new.bad, 'skipped': new.skipped,
                   'index': batch['index'], 'source': batch['source']}
        return new, metrics
    return step
