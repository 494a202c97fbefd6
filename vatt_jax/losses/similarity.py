"""Sums over all pairs of two sets of embeddings, exact, without ever holding the matrix of scores.

    score(i, j) = scale * <x_i, y_j> (+ bias)

`log_sum_exp` gives, in one loop over blocks of keys and rows, the log-sum-exp of every row, of
every column, and of every row's positives; `sigmoid_sum` gives the sum of pairwise logistic losses.
The named losses (nce.py) are a few lines on these two. Their derivative is a second loop that
computes each block of scores again: four matrix products where a stored matrix needs three, and
memory linear in the rows.

Inside `jax.set_mesh(mesh)` the work is spread over the mesh, by gathering keys or in a ring
(blockwise.py). Any sizes do: what does not divide into blocks or devices is padded with rows that
count for nothing.

The result is that of the global batch, whatever the mesh. Differentiable in x, y, scale and bias;
reverse mode, once.

The order below: the public functions; the custom derivative; the loop of the forward pass; the loop
of the backward pass; the arithmetic of one block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.losses.arguments import as_mask, check_shape
from vatt_jax.losses.blockwise import (
    AUTO,
    METHODS,
    How,
    Layout,
    choose_layout,
    gather_keys,
    get_block,
    loop_over_keys,
    loop_over_rows,
    on_devices,
    pad_rows,
    rows_per_device,
    set_block,
    split_blocks,
)

__all__ = ['AUTO', 'METHODS', 'NEVER', 'How', 'Sums', 'log_sum_exp', 'sigmoid_sum']

# The log-sum-exp of nothing: lower than any score, yet finite, because -inf - -inf would be NaN
# where two empty sums are joined. A sixteenth leaves room for the few that a loss adds up.
NEVER = float(np.finfo(np.float32).min) / 16

# Scores closer than this can share an exponential in float32: exp(-60) is far from its smallest
# number.
SPAN = 60.0

# Letters of shapes: m rows and n keys (of the global batch, or of one device inside the loops);
# t rows and u keys of one block; E embedding width.
AnyArray = Array | np.ndarray
Scalar = float | np.floating | Float[AnyArray, '']
# Of rows and of keys; either may be None.
Valid = tuple[Bool[AnyArray, ' m'] | None, Bool[AnyArray, ' n'] | None]
Ids = Sequence[Int[AnyArray, '...']]
# [t u] scores of one block, and which of them count; None: all.
Scores = Float[Array, 't u']
PairMask = Bool[Array, '#t #u'] | None


class Sums(NamedTuple):
    """rows [m], columns [n], positives [m]: float32; None where not asked for.

    A sum over nothing is NEVER.
    """

    rows: Float[Array, ' m']
    columns: Float[Array, ' n'] | None
    positives: Float[Array, ' m'] | None


class Side(NamedTuple):
    """One of the two sets, rows or keys.

    Attributes:
      data: [rows E].
      valid: bool [rows]; None: all are valid.
      excluded_ids: int32 [rows]. A row and a key of equal ids are left out; None: no pair is.
      positive_ids: int32 [rows]. A row and a key of equal ids are positives; None: no pair is.
    """

    data: jax.Array
    valid: jax.Array | None = None
    excluded_ids: jax.Array | None = None
    positive_ids: jax.Array | None = None


class Task(NamedTuple):
    """What is summed: kind softmax | sigmoid; columns: theirs too; key_gradient: keys get one."""

    kind: str
    columns: bool
    key_gradient: bool


class ExpSum(NamedTuple):
    """Sums of exponentials that cannot overflow: total = sum of exp(score - top).

    Where nothing was summed, top is NEVER and total 0. For the sigmoid loss only `total` is used: a
    plain sum.
    """

    top: jax.Array
    total: jax.Array


class RowSums(NamedTuple):
    """What the forward pass sums up for rows, as blocks [blocks t]."""

    all_pairs: ExpSum
    positives: ExpSum | None


class KeySums(NamedTuple):
    """What the forward pass sums up for one block of keys.

    Attributes:
      columns: [u]; None where columns are not summed.
      scores: [blocks t u], the scores of all rows with these keys; None where they are not stored.
    """

    columns: ExpSum | None
    scores: jax.Array | None


class SoftmaxTerm(NamedTuple):
    """One direction's share of the derivative: exp(score - log_sum_exp) * cotangent."""

    log_sum_exp: jax.Array
    cotangent: jax.Array


class KeyBlock(NamedTuple):
    """What the backward pass needs of one block of keys: themselves, their columns, the scores."""

    keys: Side
    columns: SoftmaxTerm | None
    scores: jax.Array | None


# In the backward pass: gradients of rows [blocks t E] and of the bias; of a block of keys [u E].
RowState = tuple[jax.Array, jax.Array]
KeyGradient = jax.Array | None


class Masks(NamedTuple):
    """Which pairs of a block count [t u], for each kind of sum; None: all.

    Attributes:
      rows: For the sums of rows.
      columns: For the sums of columns.
      positives: For the sums of positives; None: there are none.
    """

    rows: jax.Array | None
    columns: jax.Array | None
    positives: jax.Array | None


def log_sum_exp(
    x: Float[AnyArray, 'm E'],
    y: Float[AnyArray, 'n E'],
    scale: Scalar = 1.0,
    *,
    x_valid: Bool[AnyArray, ' m'] | None = None,
    y_valid: Bool[AnyArray, ' n'] | None = None,
    apart: Ids | None = None,
    own: Ids | None = None,
    columns: bool = True,
    stop_gradient: bool = False,
    how: How = AUTO,
) -> Sums:
    """Computes log-sum-exps of the scores.

    rows[i] = log sum_j exp score(i, j) over valid keys; columns[j] = the same over valid rows;
    positives[i] = over row i's positives. Over several key sets (a queue beside the batch):
    `jnp.logaddexp` of the rows of several calls.

    Args:
      x: [m E], rows.
      y: [n E], keys.
      scale: [], what products are multiplied by.
      x_valid: bool [m]. The sums of rows that are not valid themselves mean nothing.
      y_valid: bool [n]. Likewise of columns.
      apart: int32 ids of the rows [m] and of the keys [n]. Where those of i and j are equal, the
        pair is left out.
      own: Likewise; where the ids of i and j are equal, the pair is positive.
      columns: Whether columns are summed too.
      stop_gradient: y gets no gradient, and none is computed.
      how: Method, block size and dtype.

    Returns:
      float32 sums; columns and positives are None where not asked for.

    Raises:
      ValueError: x and y are not two non-empty sets of embeddings of one width.
    """
    task = Task('softmax', columns, not stop_gradient)
    return _sum_pairs(task, x, y, scale, 0.0, (x_valid, y_valid), apart, own, how)


def sigmoid_sum(
    x: Float[AnyArray, 'm E'],
    y: Float[AnyArray, 'n E'],
    scale: Scalar,
    bias: Scalar,
    *,
    own: Ids | None,
    x_valid: Bool[AnyArray, ' m'] | None = None,
    y_valid: Bool[AnyArray, ' n'] | None = None,
    how: How = AUTO,
) -> Float[Array, ' m']:
    """Computes sum_j softplus(-z_ij score(i, j)) over valid keys: float32 [m].

    z_ij is 1 for row i's positives, else -1. Arguments as for `log_sum_exp`.
    """
    task = Task('sigmoid', False, True)
    return _sum_pairs(task, x, y, scale, bias, (x_valid, y_valid), None, own, how).rows


def _sum_pairs(
    task: Task,
    x: Float[AnyArray, 'm E'],
    y: Float[AnyArray, 'n E'],
    scale: Scalar,
    bias: Scalar,
    valid: Valid,
    excluded_ids: Ids | None,
    positive_ids: Ids | None,
    how: How,
) -> Sums:
    """Pads both sides to equal shares, sums, and cuts the padding off again."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(
            'expected two sets of embeddings [rows E] of one width, neither empty, '
            f'got x {x.shape} and y {y.shape}'
        )
    # float64 embeddings (as in checks of the gradient) stay float64, whatever `how` says.
    dtype, accumulate = jnp.dtype(how.dtype), jnp.dtype(jnp.float32)
    if jnp.promote_types(x.dtype, y.dtype) == jnp.float64:
        dtype = accumulate = jnp.dtype(jnp.float64)

    (m, width), n = x.shape, len(y)
    # Gathered keys are in `dtype`, their gradients in `accumulate` until they are summed.
    key_bytes = width * (dtype.itemsize + accumulate.itemsize * task.key_gradient)
    layout = choose_layout(m, n, key_bytes, how)
    if not task.key_gradient:
        # The derivative below would return zeros for y; cut here, what y came from is not
        # differentiated at all.
        y = jax.lax.stop_gradient(y)

    # Cast, masked and padded outside of the custom derivative: JAX takes gradients back through
    # these by itself.
    row_ids, key_ids = zip(excluded_ids or (None, None), positive_ids or (None, None))
    rows = _pad_side(layout, 0, x.astype(dtype), valid[0], *row_ids)
    keys = _pad_side(layout, 1, y.astype(dtype), valid[1], *key_ids)
    sums = _pairwise(
        task, layout, rows, keys, jnp.asarray(scale, accumulate), jnp.asarray(bias, accumulate)
    )
    return Sums(
        columns=None if sums.columns is None else sums.columns[:n],
        positives=None if sums.positives is None else sums.positives[:m],
        rows=sums.rows[:m],
    )


def _pad_side(
    layout: Layout,
    which: int,
    data: Float[AnyArray, 'rows E'],
    valid: Bool[AnyArray, ' rows'] | None,
    excluded_ids: Int[AnyArray, ' rows'] | None,
    positive_ids: Int[AnyArray, ' rows'] | None,
) -> Side:
    """Makes rows (which = 0) or keys (1), padded to an equal share for each device."""
    side_name = 'xy'[which]
    shape = (len(data),)
    side = Side(
        data=jnp.asarray(data),
        valid=None if valid is None else as_mask(valid, shape, f'{side_name}_valid'),
        excluded_ids=_as_ids(excluded_ids, shape, f'apart of {side_name}'),
        positive_ids=_as_ids(positive_ids, shape, f'own of {side_name}'),
    )
    num_rows = layout.devices * rows_per_device(len(data), layout.devices)
    # Padding comes twice: here to equal shares, in split_blocks to whole blocks. `valid` must be
    # there for either, or zeros would be keys of score 0.
    is_padded = num_rows > len(data) or layout.local[which] % layout.tile[which]
    if side.valid is not None:
        # What is masked is cut out before anything is computed from it, so that not even 0 * NaN
        # reaches a gradient.
        side = side._replace(data=jnp.where(side.valid[:, None], data, 0))
    elif is_padded:
        # Padding is filled with False.
        side = side._replace(valid=jnp.ones(len(data), bool))
    # None is an empty tree to JAX, not a leaf: what is absent stays absent.
    return jax.tree.map(lambda array: pad_rows(array, num_rows), side)


def _as_ids(
    ids: Int[AnyArray, ' rows'] | None, shape: tuple[int, ...], name: str
) -> Int[Array, ' rows'] | None:
    if ids is None:
        return None
    check_shape(ids, shape, name)
    return jnp.asarray(ids)


# ---- The custom derivative. Everything below it runs on one device's share, inside shard_map
# where there is a mesh.

# What the backward pass is given: both sides, scale, bias, the sums and the stored scores.
Residuals = tuple[Side, Side, Float[Array, ''], Float[Array, ''], Sums, Float[Array, '...'] | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pairwise(
    task: Task, layout: Layout, x: Side, y: Side, scale: Float[Array, ''], bias: Float[Array, '']
) -> Sums:
    return _pairwise_forward(task, layout, x, y, scale, bias)[0]


def _pairwise_forward(
    task: Task, layout: Layout, x: Side, y: Side, scale: Float[Array, ''], bias: Float[Array, '']
) -> tuple[Sums, Residuals]:
    # Specs are prefixes of trees: one P stands for all the arrays of a Side, or of the sums.
    rows, scalar = P(layout.axes), P()
    forward = on_devices(_forward, task, layout, (rows, rows, scalar, scalar), rows)
    sums, scores = forward(x, y, scale, bias)
    return sums, (x, y, scale, bias, sums, scores)


def _pairwise_backward(
    task: Task, layout: Layout, residuals: Residuals, cotangents: Sums
) -> tuple[Side, Side, Float[Array, ''], Float[Array, '']]:
    rows, scalar = P(layout.axes), P()
    in_specs = (rows, rows, scalar, scalar, rows, rows, rows)
    backward = on_devices(_backward, task, layout, in_specs, (rows, rows, scalar, scalar))
    dx, dy, dscale, dbias = backward(*residuals, cotangents)
    # None as a cotangent means zero: masks and ids have no derivative.
    return Side(data=dx), Side(data=dy), dscale, dbias


_pairwise.defvjp(_pairwise_forward, _pairwise_backward)


# ---- The forward pass.


def _forward(
    task: Task, layout: Layout, x: Side, y: Side, scale: Float[Array, ''], bias: Float[Array, '']
) -> tuple[Sums, Float[Array, 'key_blocks row_blocks t u'] | None]:
    """Returns this device's sums, and the scores where they are stored for the backward pass."""
    num_rows, num_own_keys, accumulate = len(x.data), len(y.data), scale.dtype
    keys = gather_keys(layout, y)
    # Keys before they are padded to whole blocks.
    num_keys = len(keys.data)
    rows = split_blocks(x, layout.tile[0])  # [row_blocks t …]
    keys = split_blocks(keys, layout.tile[1])  # [key_blocks u …]
    num_blocks, block_rows = rows.data.shape[:2]

    has_positive_sums = task.kind == 'softmax' and rows.positive_ids is not None
    row_sums = RowSums(
        all_pairs=_empty_sums((num_blocks, block_rows), accumulate),
        positives=_empty_sums((num_blocks, block_rows), accumulate) if has_positive_sums else None,
    )
    # The loop over keys stacks the scores of its blocks.
    scores = jnp.zeros((num_blocks, *layout.tile), accumulate) if layout.store_scores else None
    columns = _empty_sums(keys.data.shape[1:2], accumulate) if task.columns else None

    def visit_keys(
        row_sums: RowSums, key_block: Side, key_sums: KeySums
    ) -> tuple[RowSums, KeySums]:
        def visit_block(i: Any, carry: tuple[RowSums, KeySums]) -> tuple[RowSums, KeySums]:
            row_sums, key_sums = carry
            row_block = get_block(rows, i)
            s = _scores(row_block, key_block, scale, bias)  # [t u]
            if layout.store_scores:
                key_sums = key_sums._replace(scores=set_block(key_sums.scores, s, i))
            if task.kind == 'sigmoid':
                return _add_logistic_losses(row_sums, i, s, _masks(row_block, key_block)), key_sums
            return _add_exp_sums(row_sums, key_sums, i, s, _masks(row_block, key_block))

        return loop_over_rows(num_blocks, visit_block, (row_sums, key_sums))

    row_sums, key_sums = loop_over_keys(
        layout, visit_keys, row_sums, keys, KeySums(columns, scores)
    )
    if task.kind == 'sigmoid':
        total = row_sums.all_pairs.total.reshape(-1)[:num_rows]
        return Sums(total, None, None), key_sums.scores

    column_sums = None
    if key_sums.columns is not None:
        # The blocks' columns, end to end.
        columns = jax.tree.map(lambda c: c.reshape(-1)[:num_keys], key_sums.columns)
        column_sums = _log(_home_columns(layout, columns, num_own_keys))
    sums = Sums(
        rows=_log(row_sums.all_pairs).reshape(-1)[:num_rows],
        columns=column_sums,
        positives=None,
    )
    if row_sums.positives is not None:
        sums = sums._replace(positives=_log(row_sums.positives).reshape(-1)[:num_rows])
    return sums, key_sums.scores


def _empty_sums(shape: tuple[int, ...], dtype: jnp.dtype) -> ExpSum:
    return ExpSum(jnp.full(shape, NEVER, dtype), jnp.zeros(shape, dtype))


def _add_logistic_losses(row_sums: RowSums, i: Any, s: Scores, masks: Masks) -> RowSums:
    """Adds sum_j -log σ(z s) = sum_j softplus(-z s) to the rows of block i."""
    losses = jnp.sum(_where(masks.rows, jax.nn.softplus(_signed(s, masks.positives)), 0), 1)
    top, total = row_sums.all_pairs
    return row_sums._replace(
        all_pairs=set_block(row_sums.all_pairs, ExpSum(top[i], total[i] + losses), i)
    )


def _add_exp_sums(
    row_sums: RowSums, key_sums: KeySums, i: Any, s: Scores, masks: Masks
) -> tuple[RowSums, KeySums]:
    """Adds exp(s) to the rows of block i, to the columns and to the positives of block i."""
    block_rows, block_columns = _block_sums(s, masks, key_sums.columns is not None)
    all_pairs = _join(get_block(row_sums.all_pairs, i), block_rows)
    row_sums = row_sums._replace(all_pairs=set_block(row_sums.all_pairs, all_pairs, i))
    if row_sums.positives is not None and masks.positives is not None:
        # Positives are few: most blocks hold none and skip the exponentials.
        positives = jax.lax.cond(
            jnp.any(masks.positives),
            lambda sums: _join(sums, _exp_sum(s, masks.positives, 1)),
            lambda sums: sums,
            get_block(row_sums.positives, i),
        )
        row_sums = row_sums._replace(positives=set_block(row_sums.positives, positives, i))
    if key_sums.columns is not None and block_columns is not None:
        key_sums = key_sums._replace(columns=_join(key_sums.columns, block_columns))
    return row_sums, key_sums


def _home_columns(layout: Layout, columns: ExpSum, num_own_keys: int) -> ExpSum:
    """Returns the columns of this device's own keys, summed over the rows of all devices.

    In a ring they have come home complete, and on one device there is nothing to add.
    """
    if not layout.axes or layout.ring:
        return columns
    # Totals can be added once they refer to the same top.
    top = jax.lax.pmax(columns.top, layout.axes)
    total = columns.total * jnp.exp(columns.top - top)
    total = jax.lax.psum_scatter(total, layout.axes, tiled=True)
    first = jax.lax.axis_index(layout.axes) * num_own_keys
    return ExpSum(jax.lax.dynamic_slice_in_dim(top, first, num_own_keys), total)


# ---- The backward pass.


def _backward(
    task: Task,
    layout: Layout,
    x: Side,
    y: Side,
    scale: Float[Array, ''],
    bias: Float[Array, ''],
    sums: Sums,
    scores: Float[Array, 'key_blocks row_blocks t u'] | None,
    cotangents: Sums,
) -> tuple[Float[Array, 'm E'], Float[Array, 'n E'], Float[Array, ''], Float[Array, '']]:
    """Returns this device's gradients by x, y, scale and bias.

    With w_ij = scale * (derivative by the score):

        dx_i = Σ_j w_ij y_j,  dy_j = Σ_i w_ij x_i,  dscale = Σ_ij w_ij <x_i, y_j> / scale,
        dbias = Σ_ij w_ij / scale
    """
    num_rows, num_own_keys, accumulate = len(x.data), len(y.data), scale.dtype
    x_type, y_type = x.data.dtype, y.data.dtype
    # The scale of every score's derivative is folded into the cotangents, so that the gradients
    # need no further pass.
    cotangents = jax.tree.map(lambda g: g * scale, cotangents)
    row_terms: Any
    if task.kind == 'softmax':
        row_terms = _softmax_term(sums.rows, cotangents.rows)
        column_terms = _softmax_term(sums.columns, cotangents.columns)
        positive_terms = _softmax_term(sums.positives, cotangents.positives)
    else:
        # The derivative of the logistic loss needs no sum, and only rows have one.
        row_terms, column_terms, positive_terms = cotangents.rows, None, None
    keys, column_terms = gather_keys(layout, (y, column_terms))
    num_keys = len(keys.data)
    x, row_terms, positive_terms = split_blocks((x, row_terms, positive_terms), layout.tile[0])
    keys, column_terms = split_blocks((keys, column_terms), layout.tile[1])
    num_blocks, _, width = x.data.shape

    def visit_keys(row_state: RowState, block: KeyBlock, dy: KeyGradient) -> tuple[Any, Any]:
        def visit_block(i: Any, carry: tuple[RowState, KeyGradient]) -> tuple[Any, Any]:
            (dx, dbias), dy = carry
            row = get_block(x, i)
            if layout.store_scores:
                s = get_block(block.scores, i)
            else:
                s = _scores(row, block.keys, scale, bias)
            masks = _masks(row, block.keys)
            w = _weights(task, s, i, row_terms, positive_terms, block.columns, masks)
            if task.kind == 'sigmoid':
                dbias = dbias + jnp.sum(w)

            # w is rounded once, for both products.
            w = w.astype(x_type)
            dx = set_block(dx, dx[i] + _product(w, block.keys.data, (1, 0), accumulate), i)
            if dy is not None:
                dy = dy + _key_gradient(w, row.data, accumulate)
            return (dx, dbias), dy

        return loop_over_rows(num_blocks, visit_block, (row_state, dy))

    def finish_key_gradient(dy: KeyGradient) -> KeyGradient:
        # On one device a block's key gradient is final when the block is done; gathered or in a
        # ring it is float32 until it is home.
        if dy is None or layout.axes:
            return dy
        return dy.astype(y_type)

    row_state = (jnp.zeros(x.data.shape, accumulate), jnp.zeros((), accumulate))
    dy = jnp.zeros(keys.data.shape[1:], accumulate) if task.key_gradient else None
    (dx, dbias), dy = loop_over_keys(
        layout, visit_keys, row_state, KeyBlock(keys, column_terms, scores), dy, finish_key_gradient
    )
    dx = dx.reshape(-1, width)[:num_rows]
    # dx_i = Σ_j w_ij y_j holds all that the scale needs: Σ_ij w_ij <x_i, y_j> = Σ_i <dx_i, x_i>.
    x_rows = x.data.reshape(-1, width)[:num_rows]
    dscale = jnp.sum(dx * x_rows.astype(accumulate)) / scale
    dbias = dbias / scale
    if dy is None:
        dy = jnp.zeros((num_own_keys, width), y_type)
    else:
        dy = _home_key_gradient(layout, dy.reshape(-1, width)[:num_keys])
    if layout.axes:
        dscale, dbias = jax.lax.psum((dscale, dbias), layout.axes)
    return dx.astype(x_type), dy.astype(y_type), dscale, dbias


def _softmax_term(
    log_sum_exp: Float[Array, ' rows'] | None, cotangent: Float[Array, ' rows'] | None
) -> SoftmaxTerm | None:
    """Pairs a sum with its cotangent; of the forward pass only the sums are needed.

        d logsumexp_i / d s_ij = exp(s_ij - logsumexp_i)

    An empty sum has no cotangent, and does not stretch the range of the others.
    """
    if log_sum_exp is None or cotangent is None:
        return None
    is_empty = log_sum_exp == NEVER
    return SoftmaxTerm(
        log_sum_exp=jnp.where(is_empty, jnp.max(log_sum_exp), log_sum_exp),
        cotangent=jnp.where(is_empty, 0, cotangent),
    )


def _weights(
    task: Task,
    s: Scores,
    i: Any,
    row_terms: Any,
    positive_terms: SoftmaxTerm | None,
    columns: SoftmaxTerm | None,
    masks: Masks,
) -> Scores:
    """Computes w of a block: the derivative by each of its scores, times the scale.

    Args:
      task: What is summed.
      s: The scores of the block.
      i: Its block of rows.
      row_terms: For softmax a SoftmaxTerm, else the cotangents, of all blocks of rows.
      positive_terms: The same of the positives' sums.
      columns: The term of the block's keys.
      masks: Which pairs count.
    """
    if task.kind == 'sigmoid':
        # d softplus(-z s) / ds = -z σ(-z s), times the row's cotangent.
        w = jax.nn.sigmoid(_signed(s, masks.positives)) * row_terms[i][:, None]
        return _where(masks.rows, _signed(w, masks.positives), 0)
    w = _softmax_weights(s, get_block(row_terms, i), columns, masks)
    if positive_terms is not None and masks.positives is not None:
        w = _add_positive_weights(w, s, get_block(positive_terms, i), masks.positives)
    return w


def _softmax_weights(
    s: Scores, row: SoftmaxTerm, column: SoftmaxTerm | None, masks: Masks
) -> Scores:
    """Computes the derivative by each score: exp(s_ij - r_i) g_i + exp(s_ij - c_j) h_j.

    r, g: the rows' log-sum-exp and cotangent; c, h: the columns'.
    """

    def weights_of(s, log_sum_exp, cotangent, mask):
        return _where(mask, jnp.exp(s - log_sum_exp) * cotangent, 0)

    r, g = row.log_sum_exp[:, None], row.cotangent[:, None]
    if column is None:
        return weights_of(s, r, g, masks.rows)
    c, h = column
    top = jnp.maximum(jnp.max(r), jnp.max(c))
    low = jnp.minimum(jnp.min(r), jnp.min(c))

    def with_one_exponential(s):
        # No score that counts is above its row's log-sum-exp.
        # One that does not count may be, and inf * 0 would be NaN.
        e = jnp.exp(jnp.minimum(s - top, 0))
        # The factors exp(top - r) are at most exp(SPAN), far from the largest float32.
        by_row = _where(masks.rows, g * jnp.exp(top - r), 0)
        by_column = _where(masks.columns, h * jnp.exp(top - c), 0)
        return e * (by_row + by_column)

    def with_two_exponentials(s):
        return weights_of(s, r, g, masks.rows) + weights_of(s, c, h, masks.columns)

    return jax.lax.cond(top - low < SPAN, with_one_exponential, with_two_exponentials, s)


def _add_positive_weights(
    w: Scores, s: Scores, positive: SoftmaxTerm, mask: Bool[Array, 't u']
) -> Scores:
    """Adds the derivative of the positives' sums to the block's weights.

    A positive's pull is joined to its push here, in float32: near convergence they nearly cancel.
    """

    def add(w):
        pull = jnp.exp(s - positive.log_sum_exp[:, None]) * positive.cotangent[:, None]
        return w + jnp.where(mask, pull, 0)

    # Most blocks hold no positive.
    return jax.lax.cond(jnp.any(mask), add, lambda w: w, w)


def _key_gradient(
    w: Scores, rows: Float[Array, 't E'], accumulate: jnp.dtype
) -> Float[Array, 'u E']:
    """Computes Σ_i w_ij x_i."""

    # Contracting over the rows of both is a fifth slower on a CPU than transposing one of them
    # first.
    def transposed_first(w):
        transposed = jax.lax.optimization_barrier(w.T)
        return _product(transposed, rows, (1, 0), accumulate)

    def contracted(w):
        return _product(w, rows, (0, 0), accumulate)

    return jax.lax.platform_dependent(w, cpu=transposed_first, default=contracted)


def _home_key_gradient(layout: Layout, dy: Float[Array, 'keys E']) -> Float[Array, 'own_keys E']:
    """Returns the gradient of this device's own keys, summed over the rows of all devices.

    In a ring it has come home complete, and on one device there is nothing to add.
    """
    if not layout.axes or layout.ring:
        return dy
    return jax.lax.psum_scatter(dy, layout.axes, tiled=True)


# ---- The arithmetic of one block.


def _product(
    a: Float[Array, '_ _'],
    b: Float[Array, '_ _'],
    contracted: tuple[int, int],
    accumulate: jnp.dtype,
) -> Float[Array, '_ _']:
    """Multiplies two matrices over the axis `contracted` of each."""
    # Products of two bfloat16 are exact in float32. Operands in float32 would be rounded at the
    # default precision: to bfloat16 on TPUs, to TF32 on GPUs.
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=precision,
        preferred_element_type=accumulate,
    )


def _scores(row: Side, key: Side, scale: Float[Array, ''], bias: Float[Array, '']) -> Scores:
    return _product(row.data, key.data, (1, 1), scale.dtype) * scale + bias


def _masks(row: Side, key: Side) -> Masks:
    # A row that is not valid has sums like any other, which the caller drops; it must only stay
    # out of the columns' sums. And the reverse.
    allowed = None
    if row.excluded_ids is not None and key.excluded_ids is not None:
        allowed = jnp.not_equal(row.excluded_ids[:, None], key.excluded_ids)
    rows = _and(allowed, None if key.valid is None else key.valid[None])
    columns = _and(allowed, None if row.valid is None else row.valid[:, None])
    positives = None
    if row.positive_ids is not None and key.positive_ids is not None:
        positives = _and(jnp.equal(row.positive_ids[:, None], key.positive_ids), rows)
    return Masks(rows, columns, positives)


def _and(a: PairMask, b: PairMask) -> PairMask:
    if a is None:
        return b
    if b is None:
        return a
    return a & b


def _where(mask: PairMask, a: Array, b: float) -> Array:
    return a if mask is None else jnp.where(mask, a, b)


def _signed(s: Scores, positives: PairMask) -> Scores:
    """Computes -z s: z is 1 for positives, else -1."""
    return s if positives is None else jnp.where(positives, -s, s)


def _block_sums(s: Scores, masks: Masks, with_columns: bool) -> tuple[ExpSum, ExpSum | None]:
    """Sums a block's rows and, if asked for, columns."""
    if not with_columns:
        return _exp_sum(s, masks.rows, 1), None
    # The largest of all scores, of masked ones too: it only has to be near those that count.
    top = jnp.max(s)

    def with_one_exponential(s):
        # One exponential serves both directions when no score is so far below the block's largest
        # that it could be lost.
        e = jnp.exp(s - top)
        rows = jnp.sum(_where(masks.rows, e, 0), 1)
        columns = jnp.sum(_where(masks.columns, e, 0), 0)
        return (
            ExpSum(jnp.where(rows > 0, top, NEVER), rows),
            ExpSum(jnp.where(columns > 0, top, NEVER), columns),
        )

    def with_two_exponentials(s):
        return _exp_sum(s, masks.rows, 1), _exp_sum(s, masks.columns, 0)

    return jax.lax.cond(top - jnp.min(s) < SPAN, with_one_exponential, with_two_exponentials, s)


def _exp_sum(s: Scores, mask: PairMask, axis: int) -> ExpSum:
    # A masked score may be above the top and its exponential inf: it is replaced, and JAX never
    # differentiates this (the gradient of where would be NaN).
    top = jnp.max(_where(mask, s, NEVER), axis)
    e = jnp.exp(s - jnp.expand_dims(top, axis))
    return ExpSum(top, jnp.sum(_where(mask, e, 0), axis))


def _join(a: ExpSum, b: ExpSum) -> ExpSum:
    """Adds two sums of exponentials."""
    top = jnp.maximum(a.top, b.top)
    # Both exponents are at most 0; where both are NEVER, 0 * exp(0).
    return ExpSum(top, a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top))


def _log(sums: ExpSum) -> Float[Array, '...']:
    """Returns the log-sum-exp; NEVER where nothing was summed."""
    top, total = sums
    # Not `total > 0`, which is false of NaN as well: a sum with NaN in it is no empty one.
    is_empty = total == 0
    return jnp.where(is_empty, NEVER, top + jnp.log(jnp.where(is_empty, 1, total)))
