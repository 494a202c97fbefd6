"""Contrastive losses, each a few lines on the sums of similarity.py: exact, and with memory linear in the batch.

x [B E] are one modality's embeddings; y [B E] or [B K E] the other's, K candidates per clip (MIL-NCE). Semantics are those of the global
batch, whatever the mesh. dense.py holds the same losses, by the same names, as one would write them on a blackboard.

Arguments they share: x_valid, y_valid bool [B] and y_mask bool [B K] say what is there; a clip counts for a pair when both its sides are
there, and what is not there gets exactly zero gradient, even where it holds NaN. No valid clip: loss 0. temperature: a number or a float32
[] (learnt). normalise: embeddings are put on the unit sphere first. replicas: see `mean_over_clips`. how: see similarity.How.
All return float32 [].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vatt_jax.losses import similarity
from vatt_jax.losses.similarity import AUTO, NEVER, How


def asymmetric(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.07,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> jax.Array:
    """NCE (K = 1) or MIL-NCE with one denominator for both directions (VATT paper, equations 2 and 3; MMV).

    For clip b: P = logsumexp over its own candidates of s(x_b, y_bk), D = logsumexp over {s(x_b, y_ak)} and {s(x_a, y_bk)} together, every
    clip a and candidate k, so each positive is counted twice; the loss is the mean of D - P over valid clips. A perfect model tends to log 2.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = _both_ways(p, temperature, how)
    # -log( Σ_k e^s(x_b,y_bk) / (Σ_ak e^s(x_b,y_ak) + Σ_ak e^s(x_a,y_bk)) ), one logarithm for both
    # directions: it is not the sum of two cross entropies.
    return mean_over_clips(jnp.logaddexp(forward, backward) - positive, p.valid, replicas)


def mil_nce(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=1.0,
    replicas: int = 1,
    how: How = AUTO,
) -> jax.Array:
    """MIL-NCE as its authors released it: `asymmetric` on raw dot products (no sphere, no temperature)."""
    # Lengths are left to the model: they do the work of a temperature.
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
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.07,
    replicas: int = 1,
    normalise: bool = True,
    each_mask: bool = False,
    how: How = AUTO,
) -> jax.Array:
    """NCE or MIL-NCE with a denominator for each direction, their losses added (official VATT's symmetric variant). The infimum is 0.

    each_mask: see `mean_over_clips`; True is the official scale. Where all clips have one of the two modalities both scales agree.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = _both_ways(p, temperature, how)
    return mean_over_clips(
        # Each direction is a cross entropy of its own: (forward - P) + (backward - P).
        forward + backward - 2 * positive,
        p.valid,
        replicas,
        # Which clips have the one modality, and which the other.
        (p.x_valid, p.y_mask.any(-1)) if each_mask else (),
    )


def clip(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.07,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> jax.Array:
    """CLIP: the mean of both directions' cross entropies, half of `symmetric`; usually with a learnt temperature."""
    return (
        symmetric(
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
        / 2
    )


def siglip(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.1,
    bias=-10.0,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> jax.Array:
    """Sigmoid loss (SigLIP, equation 1): every pair is a yes/no question, -log sigmoid(z (s + bias)), z = 1 for own pairs and -1 otherwise;
    summed over pairs and divided by valid clips. Its defaults are the paper's initial values of the learnt temperature and bias."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    # A clip has K positives and (B - 1) K negatives; the bias of -10 makes up for that at the
    # start (SigLIP, section 3.2).
    loss = similarity.sigmoid_sum(
        p.x, p.keys, 1 / temperature, bias, own=p.own, y_valid=p.key_valid, how=how
    )
    return mean_over_clips(loss, p.valid, replicas)


def nt_xent(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.1,
    replicas: int = 1,
    normalise: bool = True,
    how: How = AUTO,
) -> jax.Array:
    """NT-Xent (SimCLR, equation 1): each of a clip's two views must find the other among all views but itself, those of its own kind
    included; the mean over both. One candidate only (K = 1)."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how, single=True)
    forward, backward, positive = _both_ways(p, temperature, how)
    # A view is not compared with itself: of unit vectors that score is the largest of all.
    # Within one kind the matrix of scores is symmetric: sums of its rows are enough.
    me = jnp.arange(len(p.x))
    within = lambda a, valid: (
        similarity.log_sum_exp(
            a, a, 1 / temperature, y_valid=valid, apart=(me, me), columns=False, how=how
        ).rows
    )
    loss = (
        jnp.logaddexp(forward, within(p.x, p.x_valid))
        + jnp.logaddexp(backward, within(p.keys, p.key_valid))
        - 2 * positive
    )
    return mean_over_clips(loss / 2, p.valid, replicas)


class Keys(NamedTuple):
    """Further keys of `info_nce`, such as a queue. data [M E]; valid bool [M]; apart, own int32 [M]: a key whose number equals the query's
    `ids` is left out (apart) or is one more positive (own). None: all valid, none left out, none positive."""

    data: jax.Array  # [M E]
    valid: jax.Array | None = None  # bool [M]
    apart: jax.Array | None = None  # int32 [M]
    own: jax.Array | None = None  # int32 [M]

    def prepared(self, normalise: bool, how: How) -> jax.Array:
        # Empty slots of a queue may hold anything; cut out before the norm, as in `prepare`.
        data = self.data if self.valid is None else jnp.where(self.valid[:, None], self.data, 0)
        return _cast(unit(_wide(data)) if normalise else _wide(data), how)


def info_nce(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    ids=None,
    keys: tuple[Keys, ...] = (),
    temperature=0.07,
    replicas: int = 1,
    normalise: bool = True,
    stop_gradient: bool = True,
    how: How = AUTO,
) -> jax.Array:
    """x_b must find its own keys y_b among the batch's and any further keys: MoCo (a queue), CoCLR (several positives in the queue, their sum
    inside the logarithm), GDT (other views' keys). Keys carry no gradient unless stop_gradient is False. ids: int32 [B], see `Keys`."""
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    # One direction only, from query to key, as in MoCo.
    options = {'columns': False, 'stop_gradient': stop_gradient, 'how': how}
    batch = similarity.log_sum_exp(
        p.x, p.keys, 1 / temperature, y_valid=p.key_valid, own=p.own, **options
    )
    every, positive = batch.rows, batch.positives  # [B], [B]
    for k in keys:
        more = similarity.log_sum_exp(
            p.x,
            k.prepared(normalise, how),
            1 / temperature,
            y_valid=k.valid,
            apart=None if k.apart is None else (ids, k.apart),
            own=None if k.own is None else (ids, k.own),
            **options,
        )
        # The log-sum-exp over a union of keys; batch and queue are never concatenated.
        every = jnp.logaddexp(every, more.rows)
        positive = positive if k.own is None else jnp.logaddexp(positive, more.positives)
    return mean_over_clips(every - positive, p.valid, replicas)


class Prepared(NamedTuple):
    """x [B E], y [B K E]: ready to be multiplied; x_valid, valid bool [B], y_mask bool [B K]."""

    x: jax.Array  # [B E]
    y: jax.Array  # [B K E]
    x_valid: jax.Array  # bool [B]
    y_mask: jax.Array  # bool [B K]
    valid: jax.Array  # bool [B], both sides are there

    @property
    def keys(self):
        return self.y.reshape(-1, self.y.shape[-1])  # [B*K E]: key a * K + k

    @property
    def key_valid(self):
        return self.y_mask.reshape(-1)

    @property
    def own(self):
        """Which clip each row and each key belongs to."""
        b, k = self.y_mask.shape
        return jnp.arange(b), jnp.arange(b * k) // k  # [B], [B*K]


def prepare(x, y, x_valid, y_valid, y_mask, normalise, how: How, single: bool = False) -> Prepared:
    if x.ndim != 2 or y.ndim not in (2, 3) or len(x) != len(y) or x.shape[-1] != y.shape[-1]:
        raise ValueError(f'x {x.shape}, y {y.shape}: [B E] and [B E] or [B K E] are wanted')
    y = y[:, None] if y.ndim == 2 else y  # [B K E]
    b, k = y.shape[:2]
    if single and k > 1:
        raise ValueError(
            f'y {y.shape}: this loss knows one candidate per clip, and there are {k}; use asymmetric or symmetric'
        )
    x_valid = jnp.ones(b, bool) if x_valid is None else jnp.asarray(x_valid)
    y_valid = jnp.ones(b, bool) if y_valid is None else jnp.asarray(y_valid)
    # A clip without y has no candidates, whatever its mask says.
    y_mask = y_valid[:, None] & (
        jnp.ones((b, k), bool) if y_mask is None else jnp.asarray(y_mask).reshape(b, k)
    )
    # Masked rows are cut out before anything is computed from them, so that not even 0 * NaN reaches their gradient.
    x = jnp.where(x_valid[:, None], _wide(x), 0)
    y = jnp.where(y_mask[..., None], _wide(y), 0)
    if normalise:
        x, y = unit(x), unit(y)
    return Prepared(_cast(x, how), _cast(y, how), x_valid, y_mask, x_valid & y_mask.any(-1))


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, the squared norm floored at 1e-12 (official VATT)."""
    # With the floor inside, zero vectors (masked rows are) have a finite gradient; x / norm(x) has
    # NaN there.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def mean_over_clips(loss, valid, replicas: int, masks: tuple = ()):
    """Mean over valid clips; with replicas, over each replica's valid clips first and then over replicas, as the official code does.

    masks: bool [B] each. Instead of by the number of valid clips the sum of B clips is scaled by B / n for each mask, n clips of which hold,
    one factor times the other, and divided by B (official VATT where both modalities are masked; no mean, if clips lack different ones).
    """
    if len(loss) % replicas:
        raise ValueError(f'replicas={replicas} does not divide the batch of {len(loss)} clips')
    # Consecutive rows make a replica, as the official code shards its batch.
    split = lambda a: a.reshape(replicas, -1)
    rows, count = len(loss) // replicas, lambda mask: jnp.maximum(split(mask).sum(-1), 1)
    # An invalid clip's value means nothing (it may be 1e9, see NEVER). The count is at least 1:
    # without any valid clip the loss is 0, not 0 / 0.
    loss = split(jnp.where(valid, loss, 0)).sum(-1)
    if not masks:
        return jnp.mean(loss / count(valid))
    for mask in masks:
        loss = loss * (rows / count(mask))
    return jnp.mean(loss / rows)


def _both_ways(p: Prepared, temperature, how):
    """Per clip b: log-sum-exp of x_b with every candidate; of b's candidates with every x; of x_b with its own candidates."""
    s = similarity.log_sum_exp(
        p.x, p.keys, 1 / temperature, x_valid=p.x_valid, y_valid=p.key_valid, own=p.own, how=how
    )
    # Columns are sums over all x for one candidate; a clip's are joined over its K.  [B K] -> [B]
    backward = jax.nn.logsumexp(jnp.where(p.y_mask, s.columns.reshape(p.y_mask.shape), NEVER), -1)
    return s.rows, backward, s.positives


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _cast(x, how: How):
    # Called after `unit`: norms are computed in float32, and the result rounded once.
    return x if x.dtype == jnp.float64 else x.astype(how.dtype)
