"""What a labelling problem may be: the checks of everything that `sinkhorn.solve` is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# A block of rows: one array per view, [rows P] logits or [rows D] features.
Block = tuple[Any, ...]
# Each view's (kernel [D P], bias [P]).
Heads = Sequence[tuple[Any, Any]]


def check_prior(prior: Any) -> np.ndarray:
    """Returns the prior as float64 [P], positive and summing to 1.

    Raises:
      ValueError: If it is not a vector of at least two positive shares that sum to 1.
    """
    prior = np.asarray(prior, np.float64)
    if prior.ndim != 1 or len(prior) < 2:
        raise ValueError(
            f'prior: expected a vector with the share of each of at least 2 clusters, got shape '
            f'{prior.shape}.'
        )
    bad = np.flatnonzero(~(prior > 0) | ~np.isfinite(prior))
    if len(bad):
        raise ValueError(
            f'prior[{bad[0]}]={prior[bad[0]]} ({len(bad)} such of {len(prior)}): every cluster '
            'needs a positive share; leave empty clusters out, or give them a small one'
        )
    if abs(prior.sum() - 1) > 1e-5:
        raise ValueError(
            f'prior sums to {prior.sum():.6g}; expected shares that sum to 1 (divide by the sum).'
        )
    # Shares computed in float32 miss a sum of 1 by their rounding, and tolerances can be smaller.
    return prior / prior.sum()


def check_tolerance(tolerance: float | str, num_rows: int, published: float) -> float:
    """Returns the residual that is small enough.

    Args:
      tolerance: That residual, or 'published'.
      num_rows: M.
      published: Sum over rows at which the published loop stops.

    Raises:
      ValueError: If it is neither a number from 0 up nor 'published'.
    """
    if tolerance == 'published':
        return published / num_rows
    if isinstance(tolerance, str) or not float(tolerance) >= 0:
        raise ValueError(
            f"tolerance: expected a number from 0 up or 'published', got {tolerance!r}."
        )
    return float(tolerance)


def check_start(
    potentials: Any, preconditioner: Any, clusters: int
) -> tuple[Float[np.ndarray, ' P'], Float[np.ndarray, 'P P'] | None]:
    """Returns both as float64, of as many clusters as the problem has.

    Raises:
      ValueError: If they belong to another number of clusters, or the potentials are not finite.
    """
    potentials = np.asarray(potentials, np.float64)
    shapes: list[tuple[int, ...]] = [potentials.shape]
    expected: list[tuple[int, ...]] = [(clusters,)]
    if preconditioner is not None:
        preconditioner = np.asarray(preconditioner, np.float64)
        shapes.append(preconditioner.shape)
        expected.append((clusters, clusters))
    if shapes != expected:
        raise ValueError(
            f'start: expected potentials [{clusters}] and, if any, a preconditioner '
            f'[{clusters} {clusters}], got shapes {", ".join(map(str, shapes))}; start from a '
            'solution with the same clusters, or from none.'
        )
    if not np.isfinite(potentials).all():
        raise ValueError('start: expected finite potentials, got NaN or an infinity.')
    return potentials, preconditioner


def check_heads(heads: Heads | None, num_views: int, clusters: int) -> None:
    """Checks that there is one head for each view, and that each is for so many clusters.

    Raises:
      ValueError: If not.
    """
    if heads is None:
        return
    if len(heads) != num_views:
        raise ValueError(
            f'heads: expected one (kernel, bias) for each of {num_views} views, got {len(heads)}.'
        )
    for i, (kernel, bias) in enumerate(heads):
        kernel_shape, bias_shape = np.shape(kernel), np.shape(bias)
        if len(kernel_shape) != 2 or kernel_shape[1] != clusters or bias_shape != (clusters,):
            raise ValueError(
                f'heads[{i}]: expected a kernel [D {clusters}] and a bias [{clusters}], got '
                f'{kernel_shape} and {bias_shape}.'
            )


def split_views(views: Sequence[Any], heads: Heads | None, clusters: int) -> list[Block]:
    """Returns the blocks of rows: a single one, unless the views are lists of blocks.

    Raises:
      ValueError: If there is no view, or if blocks, rows or widths do not fit.
    """
    if not len(views):
        raise ValueError('views: expected at least one array of logits or features, got none.')
    if not is_blocked(views):
        blocks = [tuple(views)]
    else:
        num_blocks = [len(view) if isinstance(view, (list, tuple)) else 0 for view in views]
        if min(num_blocks) != max(num_blocks) or not num_blocks[0]:
            raise ValueError(
                'views: expected all views cut into the same blocks, got '
                f'{", ".join(map(str, num_blocks))} blocks (0: no list).'
            )
        blocks = list(zip(*views))
    for block in blocks:
        _check_block(block, heads, clusters)
    return blocks


def is_blocked(views: Sequence[Any]) -> bool:
    """Whether views are lists of blocks of rows, not arrays."""
    return isinstance(views[0], (list, tuple))


def _check_block(block: Block, heads: Heads | None, clusters: int) -> None:
    num_rows = np.shape(block[0])[0]
    for i, x in enumerate(block):
        width = clusters if heads is None else np.shape(heads[i][0])[0]
        if np.shape(x) != (num_rows, width):
            raise ValueError(f'views: expected shape [{num_rows} {width}], got {np.shape(x)}.')


def find_not_finite(blocks: Sequence[Block], first_rows: Sequence[int], heads: Heads | None) -> str:
    """Says which value is the first wrong one; '' where all are finite.

    Args:
      blocks: The rows, on the host.
      first_rows: Numbers of the first rows of the blocks.
      heads: Of each view, on the host.
    """
    for block, first in zip(blocks, first_rows):
        for view, x in enumerate(block):
            bad = np.isnan(x) | (x == np.inf)
            # -inf forbids a cluster, but not all of them; in a feature it is an error.
            bad |= np.isneginf(x).all(-1, keepdims=True) if heads is None else np.isneginf(x)
            if bad.any():
                row = int(np.flatnonzero(bad.any(-1))[0])
                return (
                    f'logits or features hold NaN or +inf (or a row of -inf only), first in view '
                    f'{view}, row {first + row}; labels need finite values'
                )
    for view, (kernel, bias) in enumerate(heads or ()):
        if not np.isfinite(kernel).all() or not (bias < np.inf).all():
            return f'heads[{view}]: expected finite weights, got NaN or an infinity'
    return ''
