"""The contrastive losses, dense: the readable definitions that nce.py must equal. They hold matrices of all scores.

The same names, arguments and semantics as in nce.py, where each loss is described; `how` is taken and only its dtype used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.losses.nce import Keys, mean_over_clips, prepare
from vatt_jax.losses.similarity import AUTO, NEVER


def scores(x, y, temperature):
    """float32 [B A K]: x_b against every candidate y_ak."""
    # precision: TPUs would round float32 operands to bfloat16, and the losses would not agree.
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    return (
        jnp.einsum('be,ake->bak', x, y, precision='highest', preferred_element_type=accumulate)
        / temperature
    )


def log_sum_exp(s, mask, axes):
    # NEVER is finite: with -inf the gradient of an empty sum would be NaN.
    return jax.nn.logsumexp(jnp.where(mask, s, NEVER), axes)


def terms(p, temperature):
    """Per clip b: forward = over every candidate of x_b; backward = over every x of its own candidates; positive = over its own pairs."""
    s = scores(p.x, p.y, temperature)  # [B A K]
    # The diagonal a = b of s.  [B K]
    own = (
        jnp.einsum('be,bke->bk', p.x, p.y, precision='highest', preferred_element_type=s.dtype)
        / temperature
    )
    # Over candidates (A and K) for each x; then, for each clip's candidates, over x (B) and K.
    forward = log_sum_exp(s, p.y_mask[None], (1, 2))
    backward = log_sum_exp(s, p.y_mask[None] & p.x_valid[:, None, None], (0, 2))
    return forward, backward, log_sum_exp(own, p.y_mask, 1)


def asymmetric(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.07,
    replicas=1,
    normalise=True,
    how=AUTO,
):
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = terms(p, temperature)
    # Both directions in one logarithm; VATT paper, equations 2 and 3.
    return mean_over_clips(jnp.logaddexp(forward, backward) - positive, p.valid, replicas)


def mil_nce(
    x, y, *, x_valid=None, y_valid=None, y_mask=None, temperature=1.0, replicas=1, how=AUTO
):
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
    replicas=1,
    normalise=True,
    each_mask=False,
    how=AUTO,
):
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    forward, backward, positive = terms(p, temperature)
    return mean_over_clips(
        # Two cross entropies, added.
        forward + backward - 2 * positive,
        p.valid,
        replicas,
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
    replicas=1,
    normalise=True,
    how=AUTO,
):
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
    replicas=1,
    normalise=True,
    how=AUTO,
):
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    s = scores(p.x, p.y, temperature) + bias  # [B A K]
    # -log σ(z s) = softplus(-z s); this is -z, [B A 1].
    sign = jnp.where(jnp.eye(len(p.x), dtype=bool)[..., None], -1, 1)
    loss = jnp.where(p.y_mask[None], jax.nn.softplus(sign * s), 0)
    return mean_over_clips(loss.sum((1, 2)), p.valid, replicas)


def nt_xent(
    x,
    y,
    *,
    x_valid=None,
    y_valid=None,
    y_mask=None,
    temperature=0.1,
    replicas=1,
    normalise=True,
    how=AUTO,
):
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how, single=True)
    views = jnp.concatenate([p.x, p.y[:, 0]])  # [2B E]: all x, then all y
    usable = jnp.concatenate([p.x_valid, p.y_mask[:, 0]])  # [2B]
    b = len(p.x)
    s = scores(views, views[:, None], temperature)[..., 0]  # [2B 2B]
    # All views but oneself; the positive is among them.
    others = usable[None] & ~jnp.eye(2 * b, dtype=bool)
    # s(x_b, y_b) is the positive of both of a clip's views.  [B]
    positive = jnp.sum(p.x.astype(s.dtype) * p.y[:, 0], -1) / temperature
    loss = log_sum_exp(s, others, 1) - jnp.concatenate([positive, positive])  # [2B]
    return mean_over_clips((loss[:b] + loss[b:]) / 2, p.valid, replicas)


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
    replicas=1,
    normalise=True,
    stop_gradient=True,
    how=AUTO,
):
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    b, k, _ = p.y.shape
    # Keys of a momentum encoder carry no gradient (MoCo, section 3.2).
    stop = jax.lax.stop_gradient if stop_gradient else lambda a: a
    s = scores(p.x, stop(p.y), temperature).reshape(b, -1)  # [B A*K]
    # One entry for each set of keys, [B keys]; the first is the batch itself, where key a * K + k
    # belongs to clip a.
    allowed, positive = (
        [jnp.broadcast_to(p.y_mask.reshape(1, -1), s.shape)],
        [jnp.repeat(jnp.eye(b, dtype=bool), k, axis=1)],
    )
    every = [s]
    for q in keys:
        data = q.prepared(normalise, how)
        every.append(scores(p.x, stop(data)[:, None], temperature)[..., 0])
        allowed.append(
            jnp.ones((b, len(data)), bool)
            if q.valid is None
            else jnp.broadcast_to(q.valid, (b, len(data)))
        )
        if q.apart is not None:
            # Such keys are no positives either.
            allowed[-1] &= ids[:, None] != q.apart
        positive.append(jnp.zeros((b, len(data)), bool) if q.own is None else ids[:, None] == q.own)
    # All sets side by side: this is what nce.py avoids.  [B all keys]
    every, allowed, positive = (jnp.concatenate(a, 1) for a in (every, allowed, positive))
    return mean_over_clips(
        # Several positives are added inside the logarithm, as in MIL-NCE and CoCLR.
        log_sum_exp(every, allowed, 1) - log_sum_exp(every, allowed & positive, 1),
        p.valid,
        replicas,
    )
