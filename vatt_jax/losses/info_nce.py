"""InfoNCE with further keys: a queue, other views, mined positives. Arguments as in nce.py."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.losses import similarity
from vatt_jax.losses.arguments import (
    AnyArray,
    CandidateMask,
    Candidates,
    Embeddings,
    Prepared,
    Scalar,
    Valid,
    as_mask,
    cast,
    check_shape,
    check_temperature,
    find_taint,
    mean_over_clips,
    prepare,
    unit,
    wide,
)
from vatt_jax.losses.similarity import AUTO, NEVER, How


class Keys(NamedTuple):
    """Further keys of `info_nce`, such as a queue.

    Attributes:
        data: [M E].
        valid: bool [M]; None: all.
        apart: int32 [M]; a key whose number equals the query's `ids` is left out. None: none is.
        own: int32 [M]; a key whose number equals the query's `ids` is one more positive.
            None: no key is.
        positive: bool [B M] instead of `own`, where positives are no matter of equal numbers (mined
            ones). All scores with these keys are then in memory, as the mask is.
    """

    data: jax.Array
    valid: jax.Array | None = None
    apart: jax.Array | None = None
    own: jax.Array | None = None
    positive: jax.Array | None = None

    def prepared(
        self, queries: Embeddings, ids: Int[AnyArray, ' B'] | None, normalise: bool, how: How
    ) -> Keys:
        """The keys checked against their queries, masked, normalised and cast.

        Raises:
            ValueError: shapes do not fit, numbers are to be compared and queries have none, or
                positives are named twice.
        """
        num_queries, width = queries.shape
        if jnp.ndim(self.data) != 2 or not len(self.data) or self.data.shape[1] != width:
            raise ValueError(
                f'keys: expected data [M {width}] of at least one key, got {jnp.shape(self.data)}'
            )
        num_keys = len(self.data)
        for name, numbers in (('apart', self.apart), ('own', self.own)):
            if numbers is None:
                continue
            if ids is None:
                raise ValueError(
                    f'expected ids, the numbers that {name} of keys is compared with, got None; '
                    'pass ids=...'
                )
            check_shape(numbers, (num_keys,), f'keys: {name}')
        if self.own is not None and self.positive is not None:
            raise ValueError('keys: expected own or positive, got both; leave one of them out')
        positive = self.positive
        if positive is not None:
            positive = as_mask(positive, (num_queries, num_keys), 'keys: positive')
        data, valid = wide(self.data), self.valid
        if valid is not None:
            valid = as_mask(valid, (num_keys,), 'keys: valid')
            # Before anything is computed from them: not even 0 · NaN may reach a gradient.
            data = jnp.where(valid[:, None], data, 0)
        # A NaN of raw keys shows in every sum over them.
        data = unit(data) if normalise else data + find_taint(data)
        return self._replace(data=cast(data, how), valid=valid, positive=positive)


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
    """x_b must find its own keys y_b among the batch's and any further keys.

        loss = mean over valid clips of  log Σ_all exp s - log Σ_positives exp s

    MoCo (a queue), CoCLR (several positives in the queue, their sum inside the logarithm), GDT
    (other views' keys).

    Args:
        ids: numbers of the queries, which `Keys` compare.
        keys: further sets of keys.
        in_batch: keys of the batch's other clips are negatives; False: own and further keys alone
            (MoCo, CoCLR).
        own_positive: y_b is a positive, of all clips or of those where it is True. Elsewhere it is
            in the denominator only, and a clip without a positive among further keys is left out
            of the mean.
        stop_gradient: keys carry no gradient.
    """
    p = prepare(x, y, x_valid, y_valid, y_mask, normalise, how)
    check_temperature(temperature)
    if ids is not None:
        check_shape(ids, (len(p.x),), 'ids')
    if in_batch:
        all_pairs, own = _batch_sums(p, temperature, stop_gradient, how)
    else:
        all_pairs = own = _own_sums(p, temperature, stop_gradient)
    own_positive = of_each_clip(own_positive, len(own))
    positive = jnp.where(own_positive, own, NEVER)

    for further in keys:
        further = further.prepared(x, ids, normalise, how)
        more = _further_sums(p, further, ids, temperature, stop_gradient, how)
        all_pairs = jnp.logaddexp(all_pairs, more.rows)
        if more.positives is not None:
            positive = jnp.logaddexp(positive, more.positives)
    p = p._replace(valid=p.valid & (own_positive | (positive != NEVER)))
    return mean_over_clips(all_pairs - positive, p, replicas)


def of_each_clip(own_positive: bool | Bool[AnyArray, ' B'], num_clips: int) -> Bool[Array, ' B']:
    """`own_positive` of `info_nce` as a mask."""
    if isinstance(own_positive, bool):
        return jnp.full(num_clips, own_positive)
    return as_mask(own_positive, (num_clips,), 'own_positive')


def _batch_sums(
    p: Prepared, temperature: Scalar, stop_gradient: bool, how: How
) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
    """Log-sum-exps of each query with all keys of the batch, and with its own."""
    sums = similarity.log_sum_exp(
        p.x,
        p.keys,
        1 / temperature,
        y_valid=p.key_valid,
        own=p.own,
        columns=False,
        stop_gradient=stop_gradient,
        how=how,
    )
    assert sums.positives is not None  # own pairs were named
    return sums.rows, sums.positives


def _own_sums(p: Prepared, temperature: Scalar, stop_gradient: bool) -> Float[Array, ' B']:
    """Log-sum-exp of each query with its own keys, no other pair being computed."""
    keys = jax.lax.stop_gradient(p.y) if stop_gradient else p.y
    scores = _scores('be,bke->bk', p.x, keys, temperature)
    return jax.nn.logsumexp(jnp.where(p.y_mask, scores, NEVER), -1)


def _further_sums(
    p: Prepared,
    further: Keys,
    ids: Int[AnyArray, ' B'] | None,
    temperature: Scalar,
    stop_gradient: bool,
    how: How,
) -> similarity.Sums:
    """Log-sum-exps of each query with further keys, and with the positives among them."""
    sums = similarity.log_sum_exp(
        p.x,
        further.data,
        1 / temperature,
        y_valid=further.valid,
        apart=_id_pair(ids, further.apart),
        own=_id_pair(ids, further.own),
        columns=False,
        stop_gradient=stop_gradient,
        how=how,
    )
    if further.positive is None:
        return sums
    data = jax.lax.stop_gradient(further.data) if stop_gradient else further.data
    scores = _scores('be,me->bm', p.x, data, temperature)
    is_positive = further.positive & usable_pairs(further, ids)
    positives = jax.nn.logsumexp(jnp.where(is_positive, scores, NEVER), -1)
    return sums._replace(positives=positives)


def usable_pairs(further: Keys, ids: Int[AnyArray, ' B'] | None) -> Bool[Array, '#B M']:
    """Which queries may be compared with which further keys, be they positives or negatives."""
    usable = as_mask(further.valid, (len(further.data),), 'keys: valid')[None]
    if further.apart is None or ids is None:
        return usable
    return usable & jnp.not_equal(jnp.asarray(ids)[:, None], further.apart)


def _scores(
    formula: str, x: Float[Array, 'B E'], y: Float[Array, '...'], temperature: Scalar
) -> Float[Array, 'B _']:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    products = jnp.einsum(formula, x, y, precision='highest', preferred_element_type=accumulate)
    # Times the inverse, as in similarity.py: near convergence the two sums nearly cancel.
    return products * (1 / temperature)


def _id_pair(
    ids: Int[AnyArray, ' B'] | None, key_ids: Int[AnyArray, ' M'] | None
) -> tuple[Int[AnyArray, ' B'], Int[AnyArray, ' M']] | None:
    """The numbers of queries and keys that are compared; None where keys have none."""
    if ids is None or key_ids is None:
        return None
    return ids, key_ids
