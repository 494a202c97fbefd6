"""Contrastive losses, each a few lines on the sums of similarity.py.

Exact, and with memory linear in the batch. x [B E] are one modality's embeddings; y [B E] or [B K
E] the other's, K candidates per clip (MIL-NCE). Semantics are those of the global batch, whatever
the mesh. dense.py holds the same losses, by the same names, as one would write them on a
blackboard.

Arguments that they share:

    x_valid, y_valid  bool [B]: which clips have the modality. A clip counts for a pair when both
                      its sides are there; what is not there gets exactly zero gradient, even where
                      it holds NaN. No valid clip: loss 0.
    y_mask            bool [B K]: which candidates are there.
    temperature       a number, or a float32 [] where it is learnt.
    normalise         embeddings are put on the unit sphere first.
    replicas          see `mean_over_clips`.
    how               see similarity.How.

All return float32 [].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.losses import similarity
from vatt_jax.losses.similarity import AUTO, NEVER, How

AnyArray = Array | np.ndarray
Embeddings = Float[AnyArray, 'B E']
# One embedding or K candidates for each clip: [B E] or [B K E].
Candidates = Float[AnyArray, 'B *K E']
Valid = Bool[AnyArray, ' B'] | None
# [B K]; of one embedding for each clip [B] or [B 1].
CandidateMask = Bool[AnyArray, 'B *mask'] | None
# A number, or a learnt scalar.
Scalar = float | Float[AnyArray, '']


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
    return mean_over_clips(jnp.logaddexp(forward, backward) - positive, p.valid, replicas)


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
    return mean_over_clips(forward + backward - 2 * positive, p.valid, replicas, masks)


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
    loss = similarity.sigmoid_sum(
        p.x, p.keys, 1 / temperature, bias, own=p.own, y_valid=p.key_valid, how=how
    )
    return mean_over_clips(loss, p.valid, replicas)


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
    return mean_over_clips(loss / 2, p.valid, replicas)


class Keys(NamedTuple):
    """Further keys of `info_nce`, such as a queue.

    Attributes:
        data: [M E].
        valid: bool [M]; None: all.
        apart: int32 [M]; a key whose number equals the query's `ids` is left out. None: none is.
        own: int32 [M]; a key whose number equals the query's `ids` is one more positive.
            None: no key is.
    """

    data: jax.Array
    valid: jax.Array | None = None
    apart: jax.Array | None = None
    own: jax.Array | None = None

    def prepared(self, normalise: bool, how: How) -> Float[Array, 'M E']:
        data = self.data
        if self.valid is not None:
            # Before anything is computed from them: not even 0 · NaN may reach a gradient.
            data = jnp.where(self.valid[:, None], data, 0)
        data = _wide(data)
        return _cast(unit(data) if normalise else data, how)


def info_nce(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    ids: Int[AnyArray, ' B'] | None = None,
    keys: tuple[Keys, ...] = (),
    temperature: Scalar = 0.07,
    replicas: int = 1,
    normalise: bool = True,
    stop_gradient: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """x_b must find its own keys y_b among the batch's and any further keys.

    MoCo (a queue), CoCLR (several positives in the queue, their sum inside the logarithm), GDT
    (other views' keys).

    Args:
        ids: numbers of the queries, which `Keys` compare.
        keys: further sets of keys.
        stop_gradient: keys carry no gradient.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    options: dict[str, Any] = {'columns': False, 'stop_gradient': stop_gradient, 'how': how}
    batch = similarity.log_sum_exp(
        p.x, p.keys, 1 / temperature, y_valid=p.key_valid, own=p.own, **options
    )
    all_pairs, positive = batch.rows, batch.positives
    assert positive is not None  # own pairs were named
    for k in keys:
        more = similarity.log_sum_exp(
            p.x,
            k.prepared(normalise, how),
            1 / temperature,
            y_valid=k.valid,
            apart=_id_pair(ids, k.apart),
            own=_id_pair(ids, k.own),
            **options,
        )
        all_pairs = jnp.logaddexp(all_pairs, more.rows)
        if k.own is not None:
            assert more.positives is not None  # it was asked for
            positive = jnp.logaddexp(positive, more.positives)
    return mean_over_clips(all_pairs - positive, p.valid, replicas)


def _id_pair(
    ids: Int[AnyArray, ' B'] | None, key_ids: Int[AnyArray, ' M'] | None
) -> tuple[Int[AnyArray, ' B'], Int[AnyArray, ' M']] | None:
    """Pairs the ids of queries with those of further keys; None where these have none.

    Raises:
        ValueError: keys have ids and queries do not.
    """
    if key_ids is None:
        return None
    if ids is None:
        raise ValueError(
            'expected ids, the numbers that apart and own of keys are compared with, got None; '
            'pass ids=...'
        )
    return ids, key_ids


class Prepared(NamedTuple):
    """Both sides of a loss, ready to be multiplied.

    Attributes:
        x: [B E], zeros where x_valid is False.
        y: [B K E], zeros where y_mask is False.
        x_valid: bool [B].
        y_mask: bool [B K]: candidates that are there, of clips that have the modality.
        valid: bool [B]: clips that count, with x and at least one candidate.
    """

    x: jax.Array
    y: jax.Array
    x_valid: jax.Array
    y_mask: jax.Array
    valid: jax.Array

    @property
    def keys(self):
        return self.y.reshape(-1, self.y.shape[-1])

    @property
    def key_valid(self):
        return self.y_mask.reshape(-1)

    @property
    def own(self):
        """Which clip each row and each key belongs to."""
        b, k = self.y_mask.shape
        return jnp.arange(b), jnp.arange(b * k) // k


def prepare(
    x: Embeddings,
    y: Candidates,
    x_valid: Valid,
    y_valid: Valid,
    y_mask: CandidateMask,
    normalise: bool,
    how: How,
    single: bool = False,
) -> Prepared:
    """Both sides as [B E] and [B K E], masked, normalised and cast.

    Args:
        single: the loss takes one candidate per clip.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.ndim != 2 or y.ndim not in (2, 3) or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f'expected x [B E] and y [B E] or [B K E], got x {x.shape} and y {y.shape}'
        )
    candidates = y[:, None] if y.ndim == 2 else y
    num_clips, num_candidates = candidates.shape[:2]
    if single and num_candidates > 1:
        raise ValueError(
            f'expected one candidate per clip, got {num_candidates} (y {y.shape}); '
            'use asymmetric or symmetric'
        )
    x_mask = jnp.ones(num_clips, bool) if x_valid is None else jnp.asarray(x_valid)
    has_y = jnp.ones(num_clips, bool) if y_valid is None else jnp.asarray(y_valid)
    if y_mask is None:
        candidate_mask = jnp.ones((num_clips, num_candidates), bool)
    else:
        candidate_mask = jnp.asarray(y_mask).reshape(num_clips, num_candidates)
    candidate_mask = has_y[:, None] & candidate_mask
    # Masked rows are cut out before anything is computed from them, so that not even 0 * NaN
    # reaches their gradient.
    rows = jnp.where(x_mask[:, None], _wide(x), 0)
    keys = jnp.where(candidate_mask[..., None], _wide(candidates), 0)
    if normalise:
        rows, keys = unit(rows), unit(keys)
    return Prepared(
        x=_cast(rows, how),
        y=_cast(keys, how),
        x_valid=x_mask,
        y_mask=candidate_mask,
        valid=x_mask & candidate_mask.any(-1),
    )


def unit(x: Float[Array, '*rows E']) -> Float[Array, '*rows E']:
    """x / |x| over the last axis, the squared norm floored at 1e-12 (official VATT)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def mean_over_clips(
    loss: Float[Array, ' B'],
    valid: Bool[Array, ' B'],
    replicas: int,
    masks: tuple[Bool[Array, ' B'], ...] = (),
) -> Float[Array, '']:
    """Mean over valid clips.

    With replicas, over each replica's valid clips first and then over replicas, as the official
    code does on so many devices.

    Args:
        loss: of each clip.
        valid: clips that count.
        replicas: equal parts of the batch.
        masks: instead of by the number of valid clips, the sum of B clips is scaled by B / n for
            each mask, n clips of which hold, one factor times the other, and divided by B (official
            VATT where both modalities are masked; no mean, if clips lack different ones).
    """
    if len(loss) % replicas:
        raise ValueError(f'replicas={replicas} does not divide the batch of {len(loss)} clips')
    rows = len(loss) // replicas

    def split(values: jax.Array) -> jax.Array:
        return values.reshape(replicas, -1)

    def count(mask: jax.Array) -> jax.Array:
        # A replica without a valid clip has loss 0, not 0/0.
        return jnp.maximum(split(mask).sum(-1), 1)

    # Selected, not multiplied: the loss of a clip that is not there may be NaN.
    total = split(jnp.where(valid, loss, 0)).sum(-1)  # [replicas]
    if not masks:
        return jnp.mean(total / count(valid))
    for mask in masks:
        total = total * (rows / count(mask))
    return jnp.mean(total / rows)


def _both_ways(
    p: Prepared, temperature: Scalar, how: How
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three sums of scores that losses of both directions are made of.

    Returns:
        Log-sum-exps, each [B]. forward: of x_b with the candidates of all clips; backward: of b's
        candidates with the x of all clips; positive: of x_b with b's own candidates.
    """
    sums = similarity.log_sum_exp(
        p.x, p.keys, 1 / temperature, x_valid=p.x_valid, y_valid=p.key_valid, own=p.own, how=how
    )
    assert sums.columns is not None and sums.positives is not None
    by_candidate = sums.columns.reshape(p.y_mask.shape)  # [B K]
    backward = jax.nn.logsumexp(jnp.where(p.y_mask, by_candidate, NEVER), -1)
    return sums.rows, backward, sums.positives


def _wide(x: AnyArray) -> jax.Array:
    """At least float32: what is normalised in less loses digits."""
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _cast(x: jax.Array, how: How) -> jax.Array:
    """In the dtype that scores are computed from (`how.dtype`); float64, of tests alone, stays."""
    return x if x.dtype == jnp.float64 else x.astype(how.dtype)
