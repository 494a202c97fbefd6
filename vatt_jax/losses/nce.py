"""Contrastive losses, each a few lines on the sums of similarity.py.

Exact, and with memory linear in the batch. x [B E] are one modality's embeddings; y [B E] or [B K
E] the other's, K candidates per clip (MIL-NCE). Semantics are those of the global batch, whatever
the mesh. dense.py holds the same losses, by the same names, as one would write them on a
blackboard.

Arguments that they share:

    x_valid, y_valid  bool [B]: which clips have the modality. A clip counts for a pair when both
                      its sides are there; what is not there gets exactly zero gradient, even where
                      it holds NaN. No valid clip: loss 0. NaN or an infinity in what is there: NaN.
    y_mask            bool [B K]: which candidates are there; for K = 1 also [B].
    temperature       a number, or a float32 [] where it is learnt.
    normalise         embeddings are put on the unit sphere first.
    replicas          see `mean_over_clips`.
    how               see similarity.How.

All return float32 [].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.losses import similarity
from vatt_jax.losses.arguments import (
    CandidateMask,
    Candidates,
    Embeddings,
    Prepared,
    Scalar,
    Valid,
    check_temperature,
    mean_over_clips,
    prepare,
)
from vatt_jax.losses.info_nce import Keys, info_nce
from vatt_jax.losses.similarity import AUTO, NEVER, How

__all__ = [
    'Keys',
    'asymmetric',
    'clip',
    'info_nce',
    'mil_nce',
    'nt_xent',
    'siglip',
    'symmetric',
]


def asymmetric(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 0.07,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """NCE (K = 1) or MIL-NCE with one denominator for both directions (VATT, MMV).

    As in the VATT paper. For clip b, over every clip a and candidate k:

        P_b  = log Σ_k exp s(x_b, y_bk)
        D_b  = log (Σ_ak exp s(x_b, y_ak) + Σ_ak exp s(x_a, y_bk))
        loss = mean over valid clips of D_b - P_b

    Each positive is counted twice in D_b, so a perfect model tends to log 2.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = _both_ways(p, temperature, how)
    return mean_over_clips(jnp.logaddexp(forward, backward) - positive, p, replicas)


def mil_nce(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 1.0,
    replicas: int = 1,
    how: How = AUTO,
) -> Float[Array, '']:
    """MIL-NCE as its authors released it.

    `asymmetric` on raw dot products: neither unit sphere nor temperature.
    """
    return asymmetric(
        x,
        y,
        x_valid=x_valid,
        y_valid=y_valid,
        y_mask=y_mask,
        temperature=temperature,
        replicas=replicas,
        normalise=False,
        how=how,
    )


def symmetric(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 0.07,
    replicas: int = 1,
    normalise: bool = True,
    each_mask: bool = False,
    how: How = AUTO,
) -> Float[Array, '']:
    """NCE or MIL-NCE with a denominator for each direction, their losses added.

    The symmetric variant of the official VATT. The infimum is 0.

    Args:
        each_mask: see `mean_over_clips`; True is the official scale. Where all clips have one of
            the two modalities both scales agree.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = _both_ways(p, temperature, how)
    masks = (p.x_valid, p.y_mask.any(-1)) if each_mask else ()
    return mean_over_clips(forward + backward - 2 * positive, p, replicas, masks)


def clip(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 0.07,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """CLIP: the mean of both directions' cross entropies; usually with a learnt temperature."""
    both = symmetric(
        x,
        y,
        x_valid=x_valid,
        y_valid=y_valid,
        y_mask=y_mask,
        temperature=temperature,
        replicas=replicas,
        normalise=normalise,
        how=how,
    )
    return both / 2


def siglip(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 0.1,
    bias: Scalar = -10.0,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """Sigmoid loss (SigLIP): every pair is a yes/no question.

        loss = 1/B Σ_ba -log sigmoid(z_ba (s(x_b, y_a) + bias)),  z = 1 for own pairs, else -1

    The defaults are the paper's initial values of the learnt temperature and bias.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    check_temperature(temperature)
    loss = similarity.sigmoid_sum(
        p.x, p.keys, 1 / temperature, bias, own=p.own, y_valid=p.key_valid, how=how
    )
    return mean_over_clips(loss, p, replicas)


def nt_xent(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    temperature: Scalar = 0.1,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """NT-Xent (SimCLR), for one candidate per clip (K = 1).

    Each of a clip's two views must find the other among all views but itself, those of its own kind
    included; the mean over both.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how, single=True)
    forward, backward, positive = _both_ways(p, temperature, how)
    # Negatives of a view's own kind; the view itself is left out of them.
    number = jnp.arange(len(p.x))
    options: dict[str, Any] = {'apart': (number, number), 'columns': False, 'how': how}
    among_x = similarity.log_sum_exp(p.x, p.x, 1 / temperature, y_valid=p.x_valid, **options)
    among_y = similarity.log_sum_exp(
        p.keys, p.keys, 1 / temperature, y_valid=p.key_valid, **options
    )
    loss_x = jnp.logaddexp(forward, among_x.rows)
    loss_y = jnp.logaddexp(backward, among_y.rows)
    loss = loss_x + loss_y - 2 * positive
    return mean_over_clips(loss / 2, p, replicas)


def _both_ways(
    p: Prepared, temperature: Scalar, how: How
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three sums of scores that losses of both directions are made of.

    Returns:
        Log-sum-exps, each [B]. forward: of x_b with the candidates of all clips; backward: of b's
        candidates with the x of all clips; positive: of x_b with b's own candidates.
    """
    check_temperature(temperature)
    sums = similarity.log_sum_exp(
        p.x, p.keys, 1 / temperature, x_valid=p.x_valid, y_valid=p.key_valid, own=p.own, how=how
    )
    assert sums.columns is not None and sums.positives is not None
    by_candidate = sums.columns.reshape(p.y_mask.shape)  # [B K]
    backward = jax.nn.logsumexp(jnp.where(p.y_mask, by_candidate, NEVER), -1)
    return sums.rows, backward, sums.positives
