"""SIGReg: how far embeddings are from an isotropic Gaussian (LeJEPA, Balestriero and LeCun 2025).

By Cramér and Wold, a distribution is the standard normal one if it looks so along every direction.
Here along some of them, other ones in every step, by the test of Epps and Pulley: the distance of
the empirical characteristic function of n projections u from that of the standard normal,

    n · ∫ |mean exp(i t u) - exp(-t²/2)|² exp(-t²/2) dt.

Statistics are those of the global batch, on any mesh: means over rows are all that meets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vatt_jax.rng import Rng


def draw_directions(width: int, count: int, rng: Rng) -> Float[Array, 'E S']:
    """Draw unit vectors, uniform on the sphere and the same for the whole batch.

    Args:
        width: E of the embeddings.
        count: S, number of directions.
        rng: of the step.
    """
    normal = rng.at('directions').shared_normal((width, count))
    return normal / jnp.linalg.norm(normal, axis=0)


def epps_pulley(
    x: Float[Array, 'B S'], valid: Bool[Array, ' B'], knots: int = 17, largest: float = 3.0
) -> Float[Array, ' S']:
    """The statistic of Epps and Pulley of each column, by the quadrature of LeJEPA's code.

    The integrand is even, so that the trapezoidal rule on [0, largest] is doubled.

    Args:
        x: projections; float32, since statistics of a batch are small differences.
        valid: rows that count.
        knots: points of the quadrature.
        largest: t of the last one.
    """
    t = np.linspace(0, largest, knots)
    normal = np.exp(-np.square(t) / 2)
    weights = np.full(knots, 2 * largest / (knots - 1))
    weights[[0, -1]] /= 2
    angles = x.astype(jnp.float32)[..., None] * t.astype(np.float32)  # [B S T]
    count = jnp.maximum(valid.sum(), 1)
    counts = valid[:, None, None]

    def mean(values: jax.Array) -> jax.Array:
        # `where` instead of a product: NaN times 0 is NaN.
        return jnp.where(counts, values, 0).sum(0) / count  # [S T]

    real = mean(jnp.cos(angles)) - normal.astype(np.float32)
    distance = jnp.square(real) + jnp.square(mean(jnp.sin(angles)))
    # Without a row there is nothing to judge.
    return jnp.sum(distance * (weights * normal).astype(np.float32), -1) * valid.sum()


def sliced_epps_pulley(
    embeddings: Float[Array, 'B E'],
    valid: Bool[Array, ' B'],
    directions: Float[Array, 'E S'],
    knots: int = 17,
    largest: float = 3.0,
) -> Float[Array, '']:
    """SIGReg: the mean over directions of the statistic along each.

    Args:
        embeddings: as they are, neither centred nor scaled.
        valid: rows that count.
        directions: unit vectors.
        knots: points of the quadrature.
        largest: t of the last one.
    """
    # Cut out before anything is computed from them: not even NaN reaches their gradient.
    embeddings = jnp.where(valid[:, None], embeddings, 0).astype(jnp.float32)
    x = jnp.matmul(embeddings, directions, precision='highest')
    return epps_pulley(x, valid, knots, largest).mean()
