"""Newton's method for potentials whose rows are nearly decided: a line search on every step.

The potentials g of sinkhorn.py maximise the concave

    F(g) = Σ_k prior_k g_k - mean over rows of log Σ_k exp(Z_k + g_k),

with the gradient prior - c(g), c being the column means of softmax(Z + g), and minus the Hessian
diag(c) - mean of s sᵀ over rows s of the softmax. Where most rows are decided only a few of them
say where mass can move, and the Hessian changes within a nat: full steps overshoot and short ones
get nowhere. Here the matrix is made anew for every step, from all rows, and the length of the step
is searched for. That is a dozen times the arithmetic of the fast search, which comes first.

Only slopes of F are compared, never its values: a slope is a sum over clusters in float64, where
values would be differences of sums over all rows in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

# Damping of the matrix, next to eigenvalues of at most 2: clusters that no undecided row connects
# can exchange mass at no cost, and the step along them would be infinite.
DAMPING = 1e-4

# A step is long enough once the slope along it has fallen to this share, up to its sign.
SLOPE_SHARE = 0.5

# Lengths tried for one step.
TRIALS = 12

# Steps without a tenth of progress after which float precision is taken to be reached.
PATIENCE = 8

Vector = Float[np.ndarray, ' P']
Matrix = Float[np.ndarray, 'P P']


@dataclasses.dataclass
class Point:
    """Potentials, their column means, and Σ_k |column mean - prior|."""

    potentials: Vector
    marginal: Vector
    residual: float


def maximise(
    marginal: Callable[[Vector], Vector],
    coupling: Callable[[Vector], Matrix],
    g: Vector,
    prior: Vector,
    limit: float,
    max_passes: int,
) -> tuple[Point, list[float]]:
    """Finds potentials whose column means are the prior, or the best of `max_passes`.

    Args:
      marginal: g -> c(g) [P], one pass over the rows.
      coupling: g -> mean of s sᵀ [P P] over the rows.
      g: [P], where to start.
      prior: [P].
      limit: Residual that is small enough.
      max_passes: Most calls of `marginal`.

    Returns:
      (the best point seen, the residual of every pass).
    """
    history: list[float] = []

    def visit(potentials: Vector) -> Point:
        c = marginal(potentials)
        residual = float(np.abs(c - prior).sum())
        history.append(residual)
        return Point(potentials, c, residual)

    best = point = visit(g)
    smallest_slope = np.inf
    stalled = 0
    while best.residual > limit and len(history) < max_passes and stalled < PATIENCE:
        step = ascent_step(coupling(point.potentials), point.marginal, prior)
        slope = float((prior - point.marginal) @ step)
        trials = min(TRIALS, max_passes - len(history))
        point = search_line(visit, point.potentials, step, slope, prior, trials)
        # Far from the solution the residual may rise for some steps while the slope falls.
        has_progress = point.residual < 0.9 * best.residual or slope < 0.9 * smallest_slope
        stalled = 0 if has_progress else stalled + 1
        smallest_slope = min(slope, smallest_slope)
        best = min(point, best, key=lambda seen: seen.residual)
    return best, history


def ascent_step(coupling: Matrix, marginal: Vector, prior: Vector) -> Vector:
    """Returns Newton's step [P], or Sinkhorn's where Newton's does not lead upwards."""
    # A cluster may have lost all its mass in floating point: no log of 0.
    sinkhorn_step = np.log(prior) - np.log(np.maximum(marginal, 1e-300))
    step = inverse(coupling, DAMPING) @ sinkhorn_step
    if (prior - marginal) @ step > 0:
        return step
    # Always upwards: prior - c and log(prior / c) have the same sign in every cluster.
    return sinkhorn_step


def search_line(
    visit: Callable[[Vector], Point],
    g: Vector,
    step: Vector,
    slope: float,
    prior: Vector,
    trials: int,
) -> Point:
    """Finds a point on the line g + length · step near the line's maximum.

    Args:
      visit: Evaluates potentials.
      g: [P], where the line starts.
      step: [P], an ascent direction.
      slope: Of F along the step at g, positive.
      prior: [P].
      trials: Most points to evaluate, at least one.
    """
    shortest = 0.0
    longest = np.inf
    length = 1.0
    for _ in range(trials):
        moved = g + length * step
        # A constant added to all potentials changes nothing; it must not drift away.
        point = visit(moved - prior @ moved)
        remaining = (prior - point.marginal) @ step
        if remaining > SLOPE_SHARE * slope:
            shortest = length
        elif remaining < -SLOPE_SHARE * slope:
            longest = length
        else:
            break
        length = 2 * length if longest == np.inf else (shortest + longest) / 2
    return point


def inverse(coupling: Matrix, damping: float) -> Matrix:
    """Returns (I - A)⁻¹ [P P] without its null direction, a constant added to all potentials.

    Args:
      coupling: [P P], mean of s sᵀ; its row sums are the column means c.
      damping: What is added to the identity.
    """
    mass = coupling.sum(1)
    # With C the coupling, D its row sums (c) and S = D^-1/2 C D^-1/2, which is symmetric:
    # (I - A)⁻¹ = (I - D⁻¹ C)⁻¹ = D^-1/2 (I - S)⁻¹ D^1/2.
    root = np.sqrt(np.maximum(mass, 1e-12 * mass.max()))
    # The eigenvalue 1 of the symmetric form belongs to `root`; moved to 0, the matrix below is
    # positive definite.
    unit = root / np.linalg.norm(root)
    damped_identity = (1 + damping) * np.eye(len(mass))
    symmetric = damped_identity - coupling / root[:, None] / root + np.outer(unit, unit)
    return np.linalg.inv(symmetric) / root[:, None] * root
