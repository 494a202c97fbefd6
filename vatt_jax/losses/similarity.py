"""Sums over all pairs of two sets of embeddings, exact, without ever holding the matrix of scores.

    score(i, j) = scale * <x_i, y_j> (+ bias)

`log_sum_exp` gives, in one loop over blocks of keys and rows, the log-sum-exp of every row, of
every column, and of every row's positives; `sigmoid_sum` gives the sum of pairwise logistic losses.
The named losses (nce.py) are a few lines on these two. Their derivative is a second loop that makes
each block of scores again: four matrix products where a stored matrix needs three, and memory
linear in the rows.

Inside `jax.set_mesh(mesh)` the work is spread over the mesh, by gathering keys or in a ring
(blockwise.py). Any sizes do: what does not divide into blocks or devices is padded with rows that
count for nothing.

The result is that of the global batch, whatever the mesh. Differentiable in x, y, scale and bias;
reverse mode, once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

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

# The log-sum-exp of nothing.
# Finite, because -inf - -inf would be NaN where two empty sums are joined.
NEVER = -1e9

# Scores closer than this can share an exponential in float32: exp(-60) is far from its smallest
# number.
SPAN = 60.0


class Sums(NamedTuple):
    """rows [m], columns [n], positives [m]: float32; None where not asked for.

    A sum over nothing is NEVER.
    """

    rows: jax.Array
    columns: jax.Array | None
    positives: jax.Array | None


class Side(NamedTuple):
    """One of the two sets, rows or keys.

    Attributes:
      data: [rows E].
      valid: bool [rows]; None: all are valid.
      apart: int32 [rows]. Pairs equal in it are left out; None: none is.
      own: int32 [rows]. Pairs equal in it are positives; None: there are none.
    """

    data: jax.Array
    valid: jax.Array | None = None
    apart: jax.Array | None = None
    own: jax.Array | None = None


class Task(NamedTuple):
    """What is summed: kind softmax | sigmoid; columns: theirs too; key_gradient: keys get one."""

    kind: str
    columns: bool
    key_gradient: bool


def log_sum_exp(
    x,
    y,
    scale=1.0,
    *,
    x_valid=None,
    y_valid=None,
    apart=None,
    own=None,
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
      apart: Pair of int32 arrays ([m], [n]), see `Side`.
      own: Pair of int32 arrays ([m], [n]), see `Side`.
      columns: Whether columns are summed too.
      stop_gradient: y gets no gradient, and none is computed.
      how: Method, block size and dtype.
    """
    task = Task('softmax', columns, not stop_gradient)
    valid = (x_valid, y_valid)
    return Sums(*_sums(task, x, y, scale, 0.0, valid, apart, own, how))


def sigmoid_sum(
    x, y, scale, bias, *, own, x_valid=None, y_valid=None, how: How = AUTO
) -> jax.Array:
    """Computes sum_j softplus(score(i, j)) over valid keys: float32 [m].

    The score's sign is turned for row i's positives. Arguments as for `log_sum_exp`.
    """
    task = Task('sigmoid', False, True)
    total, _, _ = _sums(task, x, y, scale, bias, (x_valid, y_valid), None, own, how)
    return total


def _sums(task: Task, x, y, scale, bias, valid, apart, own, how: How):
    """Pads both sides to equal shares, sums, and cuts the padding off again.

    valid, apart, own: each a pair, of rows and keys; None: see `Side`.
    """
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
    pairs = [pair or (None, None) for pair in (valid, apart, own)]
    # Cast, masked and padded outside of the custom derivative: JAX takes gradients back through
    # these by itself.
    x = _side(layout, 0, x.astype(dtype), *(of_rows for of_rows, _ in pairs))
    y = _side(layout, 1, y.astype(dtype), *(of_keys for _, of_keys in pairs))
    scale, bias = jnp.asarray(scale, accumulate), jnp.asarray(bias, accumulate)
    rows, columns, positives = _pairwise(task, layout, x, y, scale, bias)
    if columns is not None:
        columns = columns[:n]
    if positives is not None:
        positives = positives[:m]
    return rows[:m], columns, positives


def _side(layout: Layout, which: int, data: Any, *more: Any) -> Side:
    """Makes rows (which = 0) or keys (1), padded to an equal share for each device."""
    side = Side(data, *(None if array is None else jnp.asarray(array) for array in more))
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


# ---- The derivative's frame. Everything below it runs on one device's share, inside shard_map
# where there is a mesh.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pairwise(task: Task, layout: Layout, x: Side, y: Side, scale, bias):
    return _pairwise_forward(task, layout, x, y, scale, bias)[0]


def _pairwise_forward(task, layout, x, y, scale, bias):
    # Specs are prefixes of trees: one P stands for all the arrays of a Side, or of the sums.
    rows, one = P(layout.axes), P()
    sums, kept = on_devices(_forward, task, layout, (rows, rows, one, one), rows)(x, y, scale, bias)
    return sums, (x, y, scale, bias, sums, kept)


def _pairwise_backward(task, layout, residuals, cotangents):
    rows, one = P(layout.axes), P()
    back = on_devices(
        _backward, task, layout, (rows, rows, one, one, rows, rows, rows), (rows, rows, one, one)
    )
    dx, dy, dscale, dbias = back(*residuals, cotangents)
    # None as a cotangent means zero: masks and numbers have no derivative.
    x, y, *_ = (jax.tree.map(lambda _: None, r) for r in residuals)
    return x._replace(data=dx), y._replace(data=dy), dscale, dbias


_pairwise.defvjp(_pairwise_forward, _pairwise_backward)


def _forward(task, layout, x: Side, y: Side, scale, bias):
    m, n, accumulate = len(x.data), len(y.data), scale.dtype
    keys = gather_keys(layout, y)
    # Keys before they are padded to whole blocks.
    met = len(keys.data)
    x, keys = split_blocks(x, layout.tile[0]), split_blocks(keys, layout.tile[1])

    def start(shape):
        return jnp.full(shape, NEVER, accumulate), jnp.zeros(shape, accumulate)

    # (every, own): for each block of rows a pair (top, total), both [blocks t].
    rows = tuple(
        start(x.data.shape[:2]) if is_needed else None
        for is_needed in (True, task.kind == 'softmax' and x.own is not None)
    )
    # All rows' scores with one block of keys; the loop over keys stacks these.  [blocks t u]
    kept = jnp.zeros((len(x.data), *layout.tile), accumulate) if layout.store_scores else None

    def meet(rows, key: Side, part):
        def tile(i, carry):
            (every, own), (column, kept) = carry
            row = get_block(x, i)
            s = _scores(row, key, scale, bias)  # [t u]
            kept = set_block(kept, s, i) if layout.store_scores else None
            row_mask, column_mask, own_mask = _masks(row, key)
            if task.kind == 'sigmoid':
                # -log σ(z s) = softplus(-z s). A plain sum: of (top, total) only the total is used.
                total = jnp.sum(_where(row_mask, jax.nn.softplus(_turned(s, own_mask)), 0), 1)
                return (set_block(every, (every[0][i], every[1][i] + total), i), own), (
                    column,
                    kept,
                )
            by_row, by_column = _block_sums(s, row_mask, column_mask, task.columns)
            every = set_block(every, _join(get_block(every, i), by_row), i)
            if own is not None:
                # Positives are few: most blocks hold none and skip the exponentials.
                own_block = jax.lax.cond(
                    jnp.any(own_mask),
                    lambda state: _join(state, _exp_sum(s, own_mask, 1)),
                    lambda state: state,
                    get_block(own, i),
                )
                own = set_block(own, own_block, i)
            return (every, own), (_join(column, by_column) if task.columns else None, kept)

        return loop_over_rows(len(x.data), tile, (rows, part))

    (every, own), (columns, kept) = loop_over_keys(
        layout, meet, rows, keys, (start(keys.data.shape[1:2]) if task.columns else None, kept)
    )
    if columns is not None:
        columns = tuple(c.reshape(-1)[:met] for c in columns)
        if layout.axes and not layout.ring:
            # Each device has seen its rows only: join them, and keep the columns of its own keys.
            # Totals can be added once they refer to the same top.
            top = jax.lax.pmax(columns[0], layout.axes)
            total = jax.lax.psum_scatter(
                columns[1] * jnp.exp(columns[0] - top), layout.axes, tiled=True
            )
            columns = (
                jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(layout.axes) * n, n),
                total,
            )
        columns = _finish(columns)
    if task.kind == 'sigmoid':
        return (every[1].reshape(-1)[:m], None, None), kept

    def finish(state):
        return None if state is None else _finish(state).reshape(-1)[:m]

    return (finish(every), columns, finish(own)), kept


def _backward(task, layout, x: Side, y: Side, scale, bias, sums, kept, cotangents):
    m, n, accumulate, (x_type, y_type) = (
        len(x.data),
        len(y.data),
        scale.dtype,
        (x.data.dtype, y.data.dtype),
    )
    # The scale of every score's derivative is folded into the cotangents, so that the gradients
    # need no further pass.
    cotangents = [None if g is None else g * scale for g in cotangents]
    if task.kind == 'softmax':
        # d logsumexp_i / d s_ij = exp(s_ij - logsumexp_i): of the forward pass only the sums are
        # needed.
        every, columns, own = (
            None if g is None else _nonempty(total, g) for total, g in zip(sums, cotangents)
        )
    else:
        every, columns, own = cotangents
    keys, beside = gather_keys(layout, (y, columns))
    met = len(keys.data)
    x, every, own = split_blocks((x, every, own), layout.tile[0])
    keys, beside = split_blocks((keys, beside), layout.tile[1])

    def meet(state, key, key_total):
        key, beside, kept = key

        def tile(i, carry):
            (x_total, bias_total), key_total = carry
            row = get_block(x, i)
            s = get_block(kept, i) if layout.store_scores else _scores(row, key, scale, bias)
            row_mask, column_mask, own_mask = _masks(row, key)
            if task.kind == 'sigmoid':
                # d softplus(-z s) / ds = -z σ(-z s), times the row's cotangent.
                w = _where(
                    row_mask,
                    _turned(jax.nn.sigmoid(_turned(s, own_mask)) * every[i][:, None], own_mask),
                    0,
                )
                bias_total = bias_total + jnp.sum(w)
            else:
                w = _block_weights(s, get_block(every, i), beside, row_mask, column_mask)
                if own is not None:
                    # A positive's pull is joined to its push here, in float32: near convergence
                    # they nearly cancel.
                    total, g = get_block(own, i)

                    def pull(w):
                        pulled = jnp.exp(s - total[:, None]) * g[:, None]
                        return w + jnp.where(own_mask, pulled, 0)

                    w = jax.lax.cond(jnp.any(own_mask), pull, lambda w: w, w)
            # dx_i = Σ_j w_ij y_j and dy_j = Σ_i w_ij x_i; w is rounded once, for both products.
            w = w.astype(x_type)
            x_total = set_block(x_total, x_total[i] + _product(w, key.data, (1, 0), accumulate), i)
            if task.key_gradient:
                # Contracting over the rows of both is a fifth slower on a CPU than turning one of
                # them first.
                key_total = key_total + jax.lax.platform_dependent(
                    w,
                    cpu=lambda w: _product(
                        jax.lax.optimization_barrier(w.T), row.data, (1, 0), accumulate
                    ),
                    default=lambda w: _product(w, row.data, (0, 0), accumulate),
                )
            return (x_total, bias_total), key_total

        return loop_over_rows(len(x.data), tile, (state, key_total))

    state = (jnp.zeros(x.data.shape, accumulate), jnp.zeros((), accumulate))

    def done(part):
        # On one device a block's key gradient is final when the block is done; gathered or in a
        # ring it is float32 until it is home.
        if layout.axes:
            return part
        return jax.tree.map(lambda array: array.astype(y_type), part)

    part = jnp.zeros(keys.data.shape[1:], accumulate) if task.key_gradient else None
    (dx, dbias), dy = loop_over_keys(layout, meet, state, (keys, beside, kept), part, done)
    dx = dx.reshape(-1, dx.shape[-1])[:m]
    # dx_i is Σ_j scale g_ij y_j, g being the derivative by the score: what the scale needs,
    # Σ_ij g_ij <x_i, y_j>, is Σ_i <dx_i, x_i> / scale.
    dscale = jnp.sum(dx * x.data.reshape(-1, dx.shape[-1])[:m].astype(accumulate)) / scale
    dbias = dbias / scale
    if dy is None:
        dy = jnp.zeros((n, dx.shape[-1]), y_type)
    else:
        dy = dy.reshape(-1, dx.shape[-1])[:met]
        if layout.axes and not layout.ring:
            # Every device has a part of all keys' gradients: add them up, and keep one's own keys'.
            dy = jax.lax.psum_scatter(dy, layout.axes, tiled=True)
    if layout.axes:
        dscale, dbias = jax.lax.psum((dscale, dbias), layout.axes)
    return dx.astype(x_type), dy.astype(y_type), dscale, dbias


# ---- one block of scores


def _product(a, b, contracted, accumulate):
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


def _scores(row: Side, key: Side, scale, bias):
    return _product(row.data, key.data, (1, 1), scale.dtype) * scale + bias


def _masks(row: Side, key: Side):
    """Which pairs count: for rows, for columns, as positives; None: all."""
    # A row that is not valid has sums like any other, which the caller drops; it must only stay
    # out of the columns' sums. And the reverse.
    apart = None if row.apart is None else row.apart[:, None] != key.apart
    rows = _both(apart, None if key.valid is None else key.valid[None])
    columns = _both(apart, None if row.valid is None else row.valid[:, None])
    own = None if row.own is None else _both(row.own[:, None] == key.own, rows)
    return rows, columns, own


def _both(a, b):
    if a is None:
        return b
    if b is None:
        return a
    return a & b


def _where(mask, a, b):
    return a if mask is None else jnp.where(mask, a, b)


def _turned(s, own):
    return s if own is None else jnp.where(own, -s, s)


# Sums of exponentials are stored as (top, total): total = sum of exp(score - top), top = NEVER
# where nothing was summed.


def _block_sums(s, row_mask, column_mask, columns: bool):
    """Sums a block's rows and, if asked for, columns."""
    if not columns:
        return _exp_sum(s, row_mask, 1), None
    # The largest of all scores, of masked ones too: it only has to be near those that count.
    top = jnp.max(s)

    def shared(s):
        # One exponential serves both directions when no score is so far below the block's largest
        # that it could be lost.
        e = jnp.exp(s - top)
        totals = jnp.sum(_where(row_mask, e, 0), 1), jnp.sum(_where(column_mask, e, 0), 0)
        return tuple((jnp.where(t > 0, top, NEVER), t) for t in totals)

    return jax.lax.cond(
        top - jnp.min(s) < SPAN,
        shared,
        lambda s: (_exp_sum(s, row_mask, 1), _exp_sum(s, column_mask, 0)),
        s,
    )


def _exp_sum(s, mask, axis):
    # A masked score may be above the top and its exponential inf: it is replaced, and JAX never
    # differentiates this (the gradient of where would be NaN).
    top = jnp.max(_where(mask, s, NEVER), axis)
    return top, jnp.sum(_where(mask, jnp.exp(s - jnp.expand_dims(top, axis)), 0), axis)


def _join(a, b):
    top = jnp.maximum(a[0], b[0])
    # Both exponents are at most 0; where both are NEVER, 0 * exp(0).
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)


def _finish(state):
    top, total = state
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), NEVER)


def _nonempty(total, g):
    """Returns (log-sum-exp, cotangent).

    An empty sum has no cotangent, and does not stretch the range of the others.
    """
    # No real score comes near NEVER / 2.
    empty = total <= NEVER / 2
    return jnp.where(empty, jnp.max(total), total), jnp.where(empty, 0, g)


def _block_weights(s, row, column, row_mask, column_mask):
    """Computes the derivative by each score: exp(s_ij - row_i) g_i + exp(s_ij - column_j) h_j.

    row, column: (log-sum-exp, cotangent); column may be None.
    """

    def weight(s, total, g, mask):
        return _where(mask, jnp.exp(s - total) * g, 0)

    (r, g) = (v[:, None] for v in row)
    if column is None:
        return weight(s, r, g, row_mask)
    c, h = column
    top, low = jnp.maximum(jnp.max(r), jnp.max(c)), jnp.minimum(jnp.min(r), jnp.min(c))

    def shared(s):
        # No score that counts is above its row's log-sum-exp.
        # One that does not count may be, and inf * 0 would be NaN. The factors exp(top - r) are at
        # most exp(SPAN), far from the largest float32.
        return jnp.exp(jnp.minimum(s - top, 0)) * (
            _where(row_mask, g * jnp.exp(top - r), 0) + _where(column_mask, h * jnp.exp(top - c), 0)
        )

    return jax.lax.cond(
        top - low < SPAN,
        shared,
        lambda s: weight(s, r, g, row_mask) + weight(s, c, h, column_mask),
        s,
    )
