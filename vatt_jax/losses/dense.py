"""The contrastive losses, dense: the readable definitions that nce.py must equal.

They hold matrices of all scores. The same names, arguments and semantics as in nce.py, where each
loss is described; of `how` only the dtype is used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.losses.arguments import (
    AnyArray,
    CandidateMask,
    Candidates,
    Embeddings,
    Prepared,
    Scalar,
    Valid,
    check_shape,
    check_temperature,
    mean_over_clips,
    prepare,
)
from vatt_jax.losses.info_nce import Keys, of_each_clip, usable_pairs
from vatt_jax.losses.similarity import AUTO, NEVER, How


def scores(
    x: Float[Array, 'B E'], y: Float[Array, 'A K E'], temperature: Scalar
) -> Float[Array, 'B A K']:
    """x_b against every candidate y_ak, at least in float32."""
    check_temperature(temperature)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.einsum(
        'be,ake->bak', x, y, precision='highest', preferred_element_type=accumulate
    )
    return products / temperature


def log_sum_exp(s: jax.Array, mask: Bool[Array, '...'], axes: int | tuple[int, ...]) -> jax.Array:
    """Over the scores that the mask holds. No score at all: a large negative number, not -inf."""
    return jax.nn.logsumexp(jnp.where(mask, s, NEVER), axes)


def terms(p: Prepared, temperature: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums that most losses are made of.

    Returns:
        Per clip b, each [B]: over every candidate of x_b; over every x of its own candidates; over
        its own pairs.
    """
    s = scores(p.x, p.y, temperature)  # [B A K]
    products = jnp.einsum(
        'be,bke->bk', p.x, p.y, precision='highest', preferred_element_type=s.dtype
    )
    own = products / temperature  # [B K]
    forward = log_sum_exp(s, p.y_mask[None], (1, 2))
    backward = log_sum_exp(s, p.y_mask[None] & p.x_valid[:, None, None], (0, 2))
    return forward, backward, log_sum_exp(own, p.y_mask, 1)


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
    """See nce.asymmetric."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = terms(p, temperature)
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
    """See nce.mil_nce."""
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
    """See nce.symmetric."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = terms(p, temperature)
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
    """See nce.clip."""
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
    """See nce.siglip."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    s = scores(p.x, p.y, temperature) + bias
    sign = jnp.where(jnp.eye(len(p.x), dtype=bool)[..., None], -1, 1)
    loss = jnp.where(p.y_mask[None], jax.nn.softplus(sign * s), 0)
    return mean_over_clips(loss.sum((1, 2)), p, replicas)


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
    """See nce.nt_xent."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how, single=True)
    views = jnp.concatenate([p.x, p.y[:, 0]])
    usable = jnp.concatenate([p.x_valid, p.y_mask[:, 0]])
    b = len(p.x)
    s = scores(views, views[:, None], temperature)[..., 0]
    others = usable[None] & ~jnp.eye(2 * b, dtype=bool)
    positive = jnp.sum(p.x.astype(s.dtype) * p.y[:, 0], -1) / temperature
    loss = log_sum_exp(s, others, 1) - jnp.concatenate([positive, positive])
    return mean_over_clips((loss[:b] + loss[b:]) / 2, p, replicas)


def info_nce(
    x: Embeddings,
    y: Candidates,
    *,
    x_valid: Valid = None,
    y_valid: Valid = None,
    y_mask: CandidateMask = None,
    ids: Int[AnyArray, ' B'] | None = None,
    keys: tuple[Keys, ...] = (),
    in_batch: bool = True,
    own_positive: bool | Bool[AnyArray, ' B'] = True,
    temperature: Scalar = 0.07,
    replicas: int = 1,
    normalise: bool = True,
    stop_gradient: bool = True,
    how: How = AUTO,
) -> Float[Array, '']:
    """See nce.info_nce."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    b, k, _ = p.y.shape
    if ids is not None:
        check_shape(ids, (b,), 'ids')

    def stopped(data: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(data) if stop_gradient else data

    # One block of columns for the batch's own candidates, then one for each further set of keys.
    is_own = jnp.repeat(jnp.eye(b, dtype=bool), k, axis=1)  # [B B·K]
    own_positive = of_each_clip(own_positive, b)
    usable = jnp.broadcast_to(p.y_mask.reshape(1, -1), is_own.shape)
    blocks = [scores(p.x, stopped(p.y), temperature).reshape(b, -1)]
    allowed = [usable if in_batch else usable & is_own]
    positive = [is_own & own_positive[:, None]]
    for further in keys:
        further = further.prepared(x, ids, normalise, how)
        blocks.append(scores(p.x, stopped(further.data)[:, None], temperature)[..., 0])  # [B M]
        shape = blocks[-1].shape
        allowed.append(jnp.broadcast_to(usable_pairs(further, ids), shape))
        positive.append(_positives(further, ids, shape))
    s = jnp.concatenate(blocks, 1)
    is_allowed = jnp.concatenate(allowed, 1)
    is_positive = jnp.concatenate(positive, 1) & is_allowed
    loss = log_sum_exp(s, is_allowed, 1) - log_sum_exp(s, is_positive, 1)
    p = p._replace(valid=p.valid & (own_positive | is_positive.any(1)))
    return mean_over_clips(loss, p, replicas)


def _positives(
    further: Keys, ids: Int[AnyArray, ' B'] | None, shape: tuple[int, ...]
) -> Bool[Array, 'B M']:
    """Which further keys are positives of which queries, if they may be compared at all."""
    if further.positive is not None:
        return further.positive
    if further.own is None:
        return jnp.zeros(shape, bool)
    return jnp.equal(jnp.asarray(ids)[:, None], further.own)
