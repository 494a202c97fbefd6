"""Optimizers from `config.optimizer`, with rates, decay and freezing by parameter path."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose
from vatt_jax.optim.keras import scale_by_keras_adam, skippable
from vatt_jax.optim.parameter_paths import check_patterns, matches, paths
from vatt_jax.optim.schedules import schedule

OPTIMIZERS = ('adam', 'adamw', 'sgd', 'lamb', 'keras_adam', 'keras_sgd')

# Upper bound, exclusive, of each number; the lower bound is 0.
UPPER_BOUNDS = {
    'b1': 1,
    'b2': 1,
    'momentum': 1,
    'ema': 1,
    'eps': math.inf,
    'weight_decay': math.inf,
    'clip': math.inf,
}


def check(config: ConfigDict, steps: int) -> None:
    """Check everything of the config that does not depend on the parameters.

    Args:
        config: `config.optimizer`.
        steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: A field has a value that makes no sense.
    """
    choose(config.name, OPTIMIZERS, 'config.optimizer.name')
    # Called for its checks only.
    schedule(config.schedule, steps)
    for field, upper in UPPER_BOUNDS.items():
        if not 0 <= config[field] < upper:
            expected = 'a number of at least 0'
            if upper < math.inf:
                expected += f' and below {upper}'
            raise ConfigError(f'config.optimizer.{field}={config[field]:g}: expected {expected}.')
    for field in ('decay_skip', 'clip_paths', 'frozen'):
        check_patterns(config.get(field, ()), f'config.optimizer.{field}')
    for pair in config.rates:
        if not _is_rate(pair):
            raise ConfigError(
                f'config.optimizer.rates has {pair!r}; expected pairs of a pattern and a factor, '
                "such as (('^objective/', 10.0),)"
            )
    check_patterns([pattern for pattern, _ in config.rates], 'config.optimizer.rates')


def _is_rate(pair: Any) -> bool:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return False
    factor = pair[1]
    return isinstance(factor, (int, float)) and 0 <= factor < math.inf


def build(config: ConfigDict, steps: int, params: Any) -> optax.GradientTransformationExtraArgs:
    """Build the optimizer.

    Order: clip the global norm, the method's direction, decoupled weight decay, learning rate,
    factor by path. keras_sgd takes the learning rate into the velocity,

        v = momentum · v - rate · g

    so that a change of rate does not rescale what was gathered. Where the extra argument `apply` of
    `update` (bool []) is False, the state stays and the updates mean nothing. Frozen parameters
    have no optimizer slots and zero updates.

    Args:
        config: `config.optimizer`.
        steps: Optimizer steps of the whole run.
        params: Tree shaped like the parameters, arrays or abstract.

    Raises:
        ConfigError: `check` finds a mistake, or a pattern of `rates` or `clip_paths` matches no
            parameter.
    """
    check(config, steps)
    names = paths(params)
    clip_paths = tuple(config.get('clip_paths', ()))
    _check_found('rates', [pattern for pattern, _ in config.rates], names)
    _check_found('clip_paths', clip_paths, names)
    # Trees shaped like the parameters, made once from the paths: inside the step nothing is
    # matched.
    is_frozen = jax.tree.map(lambda name: matches(name, config.frozen), names)

    def mask_frozen(tree: Any) -> Any:
        # The method sees only trained leaves (optax.partition masks the rest), so the trees it
        # closes over must be masked alike.
        return jax.tree.map(
            lambda leaf, frozen: optax.MaskedNode() if frozen else leaf, tree, is_frozen
        )

    def rate_factor(name: str) -> float:
        for pattern, factor in config.rates:  # the first that matches
            if re.search(pattern, name):
                return float(factor)
        return 1.0

    # The norm of the gradients, before anything scales them.
    clip = optax.identity()
    if config.clip:
        clip = optax.clip_by_global_norm(config.clip)
        if config.get('clip_lookups', False):
            is_counted = jax.tree.map(lambda name: matches(name, clip_paths or ('',)), names)
            counted = jax.tree.map(operator.and_, is_counted, _inverted(is_frozen))
            clip = clip_by_lookup_norm(config.clip, names, counted)
        if clip_paths:
            is_clipped = jax.tree.map(lambda name: matches(name, clip_paths), names)
            clip = optax.masked(clip, mask_frozen(is_clipped))

    # Decoupled (AdamW, Loshchilov & Hutter 2019): after the direction, so that no second moment
    # divides it.
    weight_decay = optax.identity()
    if config.weight_decay:
        is_decayed = jax.tree.map(lambda name: not matches(name, config.decay_skip), names)
        weight_decay = optax.add_decayed_weights(config.weight_decay, mask_frozen(is_decayed))

    velocity = optax.identity()
    if config.name == 'keras_sgd':
        velocity = skippable(optax.trace(config.momentum))

    # After the learning rate: a factor of 10 is ten times the schedule. It scales weight decay too.
    path_factors = optax.identity()
    if config.rates:
        path_factors = scale_by_path(mask_frozen(jax.tree.map(rate_factor, names)))

    # Identities stay in the chain, so that the state has the same tree whatever is switched on.
    method = optax.chain(
        clip,
        _direction(config, weight_decay),
        # Guarded too: it counts steps, so warm-up waits where steps are not applied.
        skippable(optax.scale_by_learning_rate(schedule(config.schedule, steps))),
        velocity,
        path_factors,
    )
    # set_to_zero has no slots, so frozen towers take no optimizer memory.
    labels = jax.tree.map(lambda frozen: 'frozen' if frozen else 'train', is_frozen)
    return optax.partition({'train': method, 'frozen': optax.set_to_zero()}, labels)


def _inverted(tree: Any) -> Any:
    return jax.tree.map(operator.not_, tree)


def clip_by_lookup_norm(
    max_norm: float, names: Any, is_counted: Any
) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm as TensorFlow takes it of tables that were looked up.

    The extra argument `lookup_excess` of `update` says by how much the squared norm of such a table
    is larger there, see `models.embeddings.spread_counting`.

    Args:
        max_norm: Largest norm.
        names: Paths of the parameters, a tree.
        is_counted: Whether a parameter takes part in the norm, a tree of the same structure.
    """
    counted = set()
    for name, counts in zip(jax.tree.leaves(names), jax.tree.leaves(is_counted), strict=True):
        if counts:
            counted.add(name)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        lookup_excess: Mapping[str, Float[Array, '']] | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        squared = jnp.square(optax.global_norm(updates))
        for name, excess in (lookup_excess or {}).items():
            if name in counted:
                squared = squared + excess
        norm = jnp.sqrt(jnp.maximum(squared, 0.0))
        # As optax clips: gradients within the norm stay as they are, bit for bit.
        clipped = jax.tree.map(
            lambda x: jnp.where(norm < max_norm, x, (x / norm) * max_norm), updates
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _direction(
    config: ConfigDict, weight_decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return the method's direction followed by weight decay."""
    if config.name == 'keras_sgd':
        return weight_decay  # its velocity comes after the learning rate
    if config.name == 'sgd':
        return optax.chain(skippable(optax.trace(config.momentum)), weight_decay)
    if config.name == 'keras_adam':
        keras_adam = scale_by_keras_adam(config.b1, config.b2, config.eps)
        return optax.chain(keras_adam, weight_decay)
    adam = skippable(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.name == 'lamb':
        # LAMB: the trust ratio |w| / |update| scales the decayed direction, layer by layer.
        return optax.chain(adam, weight_decay, optax.scale_by_trust_ratio())
    # adam and adamw are one: what tells them apart is config.weight_decay.
    return optax.chain(adam, weight_decay)


def _check_found(field: str, patterns: Iterable[str], names: Any) -> None:
    """Raise ConfigError for a pattern that matches no parameter path of the tree `names`."""
    all_names = jax.tree.leaves(names)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in all_names):
            raise ConfigError(
                f'config.optimizer.{field}: {pattern!r} matches no parameter; there are '
                f'{", ".join(all_names[:4])}, …'
            )


def scale_by_path(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by its factor, a tree of floats shaped like the parameters."""

    def scale(updates: Any, params: Any) -> Any:
        # Python floats, so that the updates keep their dtype.
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scale)
