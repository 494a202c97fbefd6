"""Optimizers and schedules from config, chosen per parameter path."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vatt_jax.config import ConfigError, choose

OPTIMIZERS = ('adam', 'adamw', 'sgd', 'lamb', 'keras_adam', 'keras_sgd')
SCHEDULES = ('warmup_cosine', 'warmup_quarter_cosine', 'constant', 'vatt')


def paths(tree: Any) -> Any:
    """The tree with each leaf replaced by its path, 'model/video/encoder/layers/mlp/kernel'."""
    return jax.tree.map_with_path(
        lambda p, _: '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in p), tree
    )


def matches(path: str, patterns) -> bool:
    return any(re.search(p, path) for p in patterns)


def check_patterns(patterns, where: str) -> None:
    """Raises ConfigError unless each is a regular expression. where: the field."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f'{where}: {pattern!r} is not a regular expression ({error}); parameter paths are matched, such as '
                r"'^model/encoders_video/' or 'bias$'"
            ) from error


def check(config, steps: int) -> None:
    """Raises ConfigError for what is wrong with `config.optimizer` whatever the parameters are."""
    choose(config.name, OPTIMIZERS, 'config.optimizer.name')
    schedule(config.schedule, steps)
    for field, low, high in (
        ('b1', 0, 1),
        ('b2', 0, 1),
        ('momentum', 0, 1),
        ('ema', 0, 1),
        ('eps', 0, math.inf),
        ('weight_decay', 0, math.inf),
        ('clip', 0, math.inf),
    ):
        if not low <= config[field] < high:
            wanted = (
                'a number of at least 0'
                if high == math.inf
                else 'a number of at least 0 and below 1'
            )
            raise ConfigError(f'config.optimizer.{field}={config[field]:g}: {wanted} is wanted')
    for field in ('decay_skip', 'clip_paths', 'frozen'):
        check_patterns(config.get(field, ()), f'config.optimizer.{field}')
    for pair in config.rates:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[1], (int, float))
            and pair[1] >= 0
        ):
            raise ConfigError(
                f'config.optimizer.rates has {pair!r}; pairs of a pattern and a factor are wanted, such as '
                "(('^objective/', 10.0),)"
            )
    check_patterns([p for p, _ in config.rates], 'config.optimizer.rates')


def schedule(config, steps: int) -> optax.Schedule:
    """step -> learning rate (float32). config: `config.optimizer.schedule`; steps: of the whole run.

    vatt: linear warm-up to the first level, then a half-period cosine from each level to the next, and from the last one to 0 at the run's end
    (official VATT; its pre-training has 1e-4 at 5k and 5e-5 at 500k, the end, where the official formula divides zero by zero and returns
    NaN and this one the last level). warmup_cosine: half a period from peak to end;
    warmup_quarter_cosine: the first quarter, so that it falls fastest at the end (VATT paper, section 4.1).
    """
    choose(config.name, SCHEDULES, 'config.optimizer.schedule.name')
    for field in ('peak', 'warmup', 'end'):
        if config[field] < 0:
            raise ConfigError(
                f'config.optimizer.schedule.{field}={config[field]:g}: a number of at least 0 is wanted'
            )
    if config.name == 'vatt' and not (
        config.levels and all(isinstance(x, tuple) and len(x) == 2 for x in config.levels)
    ):
        raise ConfigError(
            f'config.optimizer.schedule.levels={config.levels}: (step, rate) pairs are wanted, such as ((5000, 1e-4), (500000, 5e-5))'
        )
    if config.name == 'constant':
        return lambda step: jnp.where(
            step < config.warmup, config.peak * step / max(1, config.warmup), config.peak
        )
    levels = (
        config.levels
        if config.name == 'vatt'
        else ((config.warmup, config.peak), (steps, config.end))
    )
    if config.name == 'vatt' and levels[-1][0] < steps:
        levels = (*levels, (steps, 0.0))
    if config.name != 'vatt' and config.warmup >= steps:
        raise ConfigError(
            f'config.optimizer.schedule.warmup={config.warmup} leaves nothing of config.steps={steps}; '
            f'try {max(1, steps // 10)}'
        )
    if any(a[0] >= b[0] for a, b in zip(levels, levels[1:])):
        raise ConfigError(f'config.optimizer.schedule.levels={levels}: the steps must increase')

    curve = {'warmup_quarter_cosine': lambda share: jnp.cos(math.pi / 2 * share)}.get(
        config.name, lambda share: 0.5 * (1 + jnp.cos(math.pi * share))
    )

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        value = levels[0][1] * step / max(1, levels[0][0])
        for (s0, v0), (s1, v1) in zip(levels, levels[1:]):
            share = jnp.clip((step - s0) / (s1 - s0), 0.0, 1.0)
            value = jnp.where(step >= s0, v1 + (v0 - v1) * curve(share), value)
        return value.astype(jnp.float32) if len(levels) > 1 else jnp.minimum(value, levels[0][1])

    return rate


def build(config, steps: int, params: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `config.optimizer` for parameters shaped like `params` (arrays or abstract).

    Order: clip the global norm (of the parameters that `clip_paths` names, where it does), the method's direction, decoupled weight decay,
    learning rate, factor by path. keras_sgd takes the learning rate into the velocity (v = momentum · v - rate · g), so that a change of rate
    does not rescale what was gathered. `update(…, apply=…)`: where this bool [] is False the state stays and the updates mean nothing. Frozen
    parameters have no optimizer slots and zero updates. Raises ConfigError when a pattern of `rates` or `clip_paths` matches no parameter.
    """
    check(config, steps)
    names = paths(params)
    flat = jax.tree.leaves(names)
    clip_paths = tuple(config.get('clip_paths', ()))
    for field, pattern in [('rates', p) for p, _ in config.rates] + [
        ('clip_paths', p) for p in clip_paths
    ]:
        if not any(re.search(pattern, n) for n in flat):
            raise ConfigError(
                f'config.optimizer.{field}: {pattern!r} matches no parameter; there are {", ".join(flat[:4])}, …'
            )
    frozen = jax.tree.map(lambda n: matches(n, config.frozen), names)
    # The method below sees only trained leaves (optax.partition masks the rest), so trees it closes over are masked alike.
    trained = lambda tree: jax.tree.map(lambda x, f: optax.MaskedNode() if f else x, tree, frozen)
    decay = trained(jax.tree.map(lambda n: not matches(n, config.decay_skip), names))
    factor = trained(
        jax.tree.map(
            lambda n: next((float(f) for p, f in config.rates if re.search(p, n)), 1.0), names
        )
    )
    adam = guarded(optax.scale_by_adam(config.b1, config.b2, config.eps))
    weight_decay = (
        optax.add_decayed_weights(config.weight_decay, decay)
        if config.weight_decay
        else optax.identity()
    )
    direction = {
        'adam': optax.chain(adam, weight_decay),
        'adamw': optax.chain(adam, weight_decay),
        'keras_adam': optax.chain(
            scale_by_keras_adam(config.b1, config.b2, config.eps), weight_decay
        ),
        'sgd': optax.chain(guarded(optax.trace(config.momentum)), weight_decay),
        'keras_sgd': weight_decay,
        'lamb': optax.chain(adam, weight_decay, optax.scale_by_trust_ratio()),
    }[config.name]
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    if config.clip and clip_paths:
        clip = optax.masked(clip, trained(jax.tree.map(lambda n: matches(n, clip_paths), names)))
    method = optax.chain(
        clip,
        direction,
        guarded(optax.scale_by_learning_rate(schedule(config.schedule, steps))),
        guarded(optax.trace(config.momentum)) if config.name == 'keras_sgd' else optax.identity(),
        scale_by_path(factor) if config.rates else optax.identity(),
    )
    return optax.partition(
        {'train': method, 'frozen': optax.set_to_zero()},
        jax.tree.map(lambda f: 'frozen' if f else 'train', frozen),
    )


def scale_by_path(factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by its factor (a tree of floats shaped like the parameters)."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, f: u * f, updates, factors)
    )


class KerasAdamState(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any


def scale_by_keras_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    """Adam as Keras writes it: direction = sqrt(1-b2^t)/(1-b1^t) · m / (sqrt(v) + eps), eps outside the bias correction
    (so it weighs more in early steps than in Kingma & Ba's algorithm 1). The form official VATT weights were trained with.
    Knows `apply` itself (see `guarded`)."""

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return KerasAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None, *, apply=None, **_):
        t = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        # 1 - b^t without the cancellation that costs 1e-4 in early steps
        rest = lambda b: -jnp.expm1(t.astype(jnp.float32) * math.log(b)) if b else 1.0
        correct = jnp.sqrt(rest(b2)) / rest(b1)
        # The direction is read from the moments as they are stored: so these are updated in place, where otherwise XLA on CPU keeps a copy
        # of the old ones to make the direction from.
        new = kept(apply, KerasAdamState(t, mu, nu), state)
        return jax.tree.map(lambda m, v: correct * m / (jnp.sqrt(v) + eps), new.mu, new.nu), new

    return optax.GradientTransformationExtraArgs(init, update)


def kept(apply, new: Any, old: Any) -> Any:
    """`new` where `apply` (bool [], or None for True), else `old`."""
    return new if apply is None else jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state stays as it is where the extra argument `apply` of `update` is False."""

    def update(updates, state, params=None, *, apply=None, **_):
        updates, new = inner.update(updates, state, params)
        return updates, kept(apply, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)
