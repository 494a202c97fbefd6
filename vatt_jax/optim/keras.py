"""Adam as Keras writes it, and optimizer states that stay where a step is not applied."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int


class KerasAdamState(NamedTuple):
    """Steps taken and both moments, trees shaped like the parameters."""

    count: Int[Array, '']  # type: ignore[assignment]  # optax's name for it, also a tuple method
    mu: Any
    nu: Any


def scale_by_keras_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by Adam as Keras writes it, the form official VATT weights were trained with.

        direction = sqrt(1 - b2^t) / (1 - b1^t) · m / (sqrt(v) + eps)

    eps stands outside the bias correction, so it weighs more in early steps than in Kingma & Ba's
    algorithm 1. Takes the extra argument `apply` itself, see `skippable`.

    Args:
        b1: Decay of the first moment m.
        b2: Decay of the second moment v.
        eps: Added to the root of the second moment.
    """

    def bias_correction(decay: float, count: jax.Array) -> jax.Array | float:
        """Return 1 - decay^t, without the cancellation that costs 1e-4 in early steps."""
        # log(0) does not exist; without decay there is no bias.
        if not decay:
            return 1.0
        # decay^t = exp(t log decay). In float32, 1 - 0.999^t of small t would lose its last digits.
        return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))

    def init(params: Any) -> KerasAdamState:
        return KerasAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        grads: Any,
        state: KerasAdamState,
        params: Any = None,
        *,
        apply: Bool[Array, ''] | None = None,
        **_: Any,
    ) -> tuple[Any, KerasAdamState]:
        # t counts from 1.
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        # []: both corrections in one factor, as Keras folds them into the learning rate.
        scale = jnp.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)
        # The direction is read from the moments as they are stored, so that these are updated in
        # place; otherwise XLA on CPU keeps a copy of the old ones to make the direction from.
        new_state = tree_select(apply, KerasAdamState(count, mu, nu), state)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            return scale * m / (jnp.sqrt(v) + eps)

        return jax.tree.map(direction, new_state.mu, new_state.nu), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def tree_select(apply: Bool[Array, ''] | None, new: Any, old: Any) -> Any:
    """Select the tree `new` where `apply` is True or None, `old` where it is False."""
    if apply is None:
        return new
    # A select, not a product with 0: NaN times 0 is NaN.
    return jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)


def skippable(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep the state of `inner` where the extra argument `apply` of `update` is False.

    A step with gradients that are not finite thereby leaves no trace; its updates mean nothing.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        apply: Bool[Array, ''] | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        # `apply` stays here: plain optax transformations take no extra arguments.
        updates, new_state = inner.update(updates, state, params)
        return updates, tree_select(apply, new_state, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)
