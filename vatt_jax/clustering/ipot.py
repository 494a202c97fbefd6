"""Optimal transport between two small sets, batched: IPOT (Xie et al. 2018, "A Fast Proximal Point
Method for Computing Exact Wasserstein Distance").

`sinkhorn.py` solves one large problem of labels. Here every example has a small problem of its
own, the words of a sentence against the regions of its picture, solved inside the training step.

The plan T minimises Σ C·T subject to uniform marginals. Sinkhorn adds an entropy, whose solution
is blurred; the proximal point method subtracts it again: each step solves

    T ← argmin over T' of  Σ C·T' + β KL(T' ‖ T)

by one sweep of Sinkhorn on the kernel exp(-C / β) ⊙ T. The blur of t steps is that of a weight of
β / t, so the plan tends to the exact one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

# Of UNITER (Chen et al. 2020), as released.
BETA = 0.5
ITERATIONS = 50

AnyArray = Array | np.ndarray


def transport_plan(
    cost: Float[AnyArray, 'B L N'],
    x_valid: Bool[AnyArray, 'B L'],
    y_valid: Bool[AnyArray, 'B N'],
    *,
    beta: float = BETA,
    iterations: int = ITERATIONS,
) -> Float[Array, 'B L N']:
    """Returns the plan of each example after a fixed number of steps. No gradient flows into it.

    Every element of x that counts holds mass 1 / (how many there are), and so does every one of y.
    The x side is scaled last: sums over y are 1 / (number of x) up to rounding, sums over x are
    met as closely as the steps have converged.

    Args:
      cost: between each element of x (L of them, padded) and of y (N). What it is at padding does
        not matter.
      x_valid: elements that are no padding.
      y_valid: the same of y. An example without any on either side has a plan of zeros.
      beta: weight of the proximal term. Smaller ones converge in fewer steps, until exp(-cost /
        beta) underflows.
      iterations: proximal steps, each with one sweep (the released code takes no other number).

    Returns:
      At least float32, zero at padding.

    Raises:
      ValueError: the shapes do not fit, or a number is not positive.
    """
    _check(cost, x_valid, y_valid, beta, iterations)
    cost = jax.lax.stop_gradient(jnp.asarray(cost))
    cost = cost.astype(jnp.promote_types(cost.dtype, jnp.float32))
    is_pair = jnp.asarray(x_valid)[:, :, None] & jnp.asarray(y_valid)[:, None, :]
    kernel = jnp.where(is_pair, jnp.exp(-cost / beta), 0)  # [B L N]
    num_x = jnp.sum(x_valid, -1, keepdims=True).astype(cost.dtype)  # [B 1]
    num_y = jnp.sum(y_valid, -1, keepdims=True).astype(cost.dtype)

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        plan, x_scale = state
        weights = kernel * plan
        y_scale = _inverse(num_y * _product('bln,bl->bn', weights, x_scale))
        x_scale = _inverse(num_x * _product('bln,bn->bl', weights, y_scale))
        return x_scale[:, :, None] * weights * y_scale[:, None, :], x_scale

    first_scale = jnp.where(x_valid, _inverse(num_x), 0)  # [B L]
    plan, _ = jax.lax.fori_loop(0, iterations, step, (is_pair.astype(cost.dtype), first_scale))
    return plan


def _product(formula: str, a: Array, b: Array) -> Array:
    # Sums of scalings over fifty steps: bfloat16 products, an accelerator's default, would drift.
    return jnp.einsum(formula, a, b, precision='highest')


def _inverse(x: Array) -> Array:
    """1 / x, and 0 where x is 0, as it is at padding."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _check(
    cost: AnyArray, x_valid: AnyArray, y_valid: AnyArray, beta: float, iterations: int
) -> None:
    """Raises ValueError where arguments do not fit each other."""
    num_examples, num_x, num_y = jnp.shape(cost)
    for name, mask, size in (('x_valid', x_valid, num_x), ('y_valid', y_valid, num_y)):
        if jnp.shape(mask) != (num_examples, size):
            raise ValueError(
                f'{name}: expected shape {(num_examples, size)}, that of cost {jnp.shape(cost)}, '
                f'got {jnp.shape(mask)}'
            )
    if not beta > 0:
        raise ValueError(f'beta: expected a positive number, got {beta}')
    if iterations < 1:
        raise ValueError(f'iterations: expected a positive number, got {iterations}')
