"""Sums over all pairs of two sets of embeddings, exact, without ever holding the matrix of their scores.

    score(i, j) = scale * <x_i, y_j> (+ bias)

`log_sum_exp` gives, in one sweep over blocks of keys and rows, the log-sum-exp of every row, of every column, and of every row's positives;
`sigmoid_sum` gives the sum of pairwise logistic losses. The named losses (nce.py) are a few lines on these two. Their derivative is a second
sweep that makes each block of scores again: four matrix products where a stored matrix needs three, and memory linear in the rows.

Inside `jax.set_mesh(mesh)` rows and keys are spread over *all* axes of the mesh (the model and seq axes, which hold copies of the batch, take
a share of the work too), in one of two ways:

  gather  every device collects all keys once and meets them block by block; key gradients go home in one reduce-scatter.
          Memory: all keys and their float32 gradient on each device.
  ring    blocks of keys travel from device to device, their column sums and gradients behind them; the transfer of a block overlaps with the
          arithmetic on another one. Memory: the device's own share only.

The result is that of the global batch, whatever the mesh. Differentiable in x, y, scale and bias; reverse mode, once.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

NEVER = -1e9                 # the log-sum-exp of nothing
METHODS = ('auto', 'gather', 'ring')
TILE = 512 * 512             # scores in one block
KEEP = 2048 * 2048           # up to this many scores per device they are kept for the backward pass: 16 MB, and a matrix product saved
SPAN = 60.0                  # scores closer than this can share an exponential in float32: exp(-60) is far from its smallest number
GATHER_BYTES = 256 * 2 ** 20  # auto: the ring once gathered keys and their gradients would take more than this on a device


@dataclasses.dataclass(frozen=True)
class How:
    """method: auto | gather | ring. block: rows and keys of one block; 0: chosen. dtype: what the scores are multiplied in
    ('bfloat16': products exact, sums and everything after them float32)."""
    method: str = 'auto'
    block: int = 0
    dtype: str = 'float32'


AUTO = How()


class Sums(NamedTuple):
    """rows [m], columns [n], positives [m]: float32; None where not asked for. A sum over nothing is NEVER."""
    rows: jax.Array
    columns: jax.Array | None
    positives: jax.Array | None


class Side(NamedTuple):
    """One set: data [rows E]; valid bool [rows]; apart, own int32 [rows]: pairs equal in `apart` are left out, pairs equal in `own` are
    positives. None: all valid, none apart, no positives."""
    data: jax.Array
    valid: jax.Array | None = None
    apart: jax.Array | None = None
    own: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static. axes: mesh axes that rows are spread over, `devices` of them in all. tile: rows and keys of a block."""
    kind: str
    columns: bool
    key_gradient: bool
    mesh: Any
    axes: tuple[str, ...]
    devices: int
    ring: bool
    tile: tuple[int, int]
    keep: bool


def log_sum_exp(x, y, scale=1.0, *, x_valid=None, y_valid=None, apart=None, own=None, columns: bool = True, stop_gradient: bool = False,
                how: How = AUTO) -> Sums:
    """rows[i] = log sum_j exp score(i, j) over valid keys; columns[j] = the same over valid rows; positives[i] = over row i's positives.

    x [m E], y [n E]; x_valid bool [m], y_valid bool [n]; apart, own: pairs of int32 arrays ([m], [n]), see `Side`. stop_gradient: y gets
    no gradient, and none is computed. The sums of rows and columns that are not valid themselves mean nothing. Over several key sets (a
    queue beside the batch): `jnp.logaddexp` of the rows of several calls.
    """
    rows, column_sums, positives = _sums('softmax', x, y, scale, 0.0, x_valid, y_valid, apart, own, columns, stop_gradient, how)
    return Sums(rows, column_sums, positives)


def sigmoid_sum(x, y, scale, bias, *, own, x_valid=None, y_valid=None, how: How = AUTO) -> jax.Array:
    """float32 [m]: sum_j softplus(score(i, j)) over valid keys, with the score's sign turned for row i's positives."""
    return _sums('sigmoid', x, y, scale, bias, x_valid, y_valid, None, own, False, False, how)[0]


def _sums(kind, x, y, scale, bias, x_valid, y_valid, apart, own, columns, stop_gradient, how):
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise ValueError(f'x {x.shape} and y {y.shape}: two sets of embeddings [rows E] of one width are wanted, neither empty')
    if how.method not in METHODS:
        raise ValueError(f'method={how.method!r}: choose one of {", ".join(METHODS)}')
    m, n = len(x), len(y)
    double = jnp.promote_types(x.dtype, y.dtype) == jnp.float64
    dtype = jnp.float64 if double else jnp.dtype(how.dtype)
    pairs = [(None, None) if p is None else p for p in (apart, own)]
    sides = []
    for data, valid, a, o in zip((x, y), (x_valid, y_valid), *pairs):
        # What is masked is cut out before anything is computed from it, so that not even 0 * NaN reaches a gradient.
        data = data if valid is None else jnp.where(jnp.asarray(valid)[:, None], data, 0)
        sides.append(Side(data.astype(dtype), *(None if v is None else jnp.asarray(v) for v in (valid, a, o))))
    if stop_gradient:
        sides[1] = sides[1]._replace(data=jax.lax.stop_gradient(sides[1].data))
    plan = _plan(kind, m, n, x.shape[1], dtype.itemsize if not double else 8, columns, not stop_gradient, how)
    sides = [_padded(s, -(-len(s.data) // plan.devices) * plan.devices) for s in sides]
    accumulate = jnp.float64 if double else jnp.float32
    rows, cols, positives = _pairwise(plan, *sides, jnp.asarray(scale, accumulate), jnp.asarray(bias, accumulate))
    return rows[:m], None if cols is None else cols[:n], None if positives is None else positives[:m]


def _plan(kind, m, n, width, itemsize, columns, key_gradient, how: How) -> Plan:
    mesh = jax.sharding.get_abstract_mesh()
    spread = mesh is not None and not mesh.empty and mesh.size > 1
    axes, devices = (tuple(mesh.axis_names), mesh.size) if spread else ((), 1)
    m, n = -(-m // devices), -(-n // devices) * devices
    gathered = n * width * (itemsize + (4 if key_gradient else 0))
    ring = devices > 1 and (how.method == 'ring' or how.method == 'auto' and gathered > GATHER_BYTES)
    met = n // devices if ring else n
    keep = not ring and not how.block and m * n <= KEEP
    tile = (m, n) if keep else (_even(m, how.block or math.isqrt(TILE)), 0)
    if not keep:
        tile = (tile[0], _even(met, how.block or max(math.isqrt(TILE), TILE // tile[0])))
    return Plan(kind, columns, key_gradient, mesh if spread else None, axes, devices, ring, tile, keep)


def _even(rows: int, most: int) -> int:
    """Rows of a block when `rows` are cut into as few blocks as `most` allows, all alike, with as little padding as multiples of 8 allow."""
    blocks = -(-rows // most)
    even = -(-rows // blocks)
    return even if blocks == 1 else -(-even // 8) * 8


def _padded(side: Side, rows: int) -> Side:
    more = rows - len(side.data)
    if not more:
        return side
    valid = jnp.ones(len(side.data), bool) if side.valid is None else side.valid
    side = side._replace(valid=valid)
    return jax.tree.map(lambda a: jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)), side)


# ---- the derivative's frame: everything below it runs on one device's share, inside shard_map where there is a mesh

@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairwise(plan: Plan, x: Side, y: Side, scale, bias):
    return _pairwise_forward(plan, x, y, scale, bias)[0]


def _pairwise_forward(plan, x, y, scale, bias):
    rows, one = P(plan.axes), P()
    sums, kept = _spread(plan, _forward, (rows, rows, one, one), rows)(x, y, scale, bias)
    return sums, (x, y, scale, bias, sums, kept)


def _pairwise_backward(plan, residuals, cotangents):
    x, y, scale, bias, sums, kept = residuals
    rows, one = P(plan.axes), P()
    dx, dy, dscale, dbias = _spread(plan, _backward, (rows, rows, one, one, rows, rows, rows), (rows, rows, one, one))(
        x, y, scale, bias, sums, cotangents, kept)
    nothing = lambda side: jax.tree.map(lambda _: None, side)
    return nothing(x)._replace(data=dx), nothing(y)._replace(data=dy), dscale, dbias


_pairwise.defvjp(_pairwise_forward, _pairwise_backward)


def _spread(plan, function, inputs, outputs):
    function = functools.partial(function, plan)
    if not plan.axes:
        return function
    return jax.shard_map(function, mesh=plan.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _forward(plan, x: Side, y: Side, scale, bias):
    m, n, accumulate = len(x.data), len(y.data), scale.dtype
    keys = _collect(plan, y)
    met = len(keys.data)
    x, keys = _blocks(x, plan.tile[0]), _blocks(keys, plan.tile[1])
    start = lambda shape: (jnp.full(shape, NEVER, accumulate), jnp.zeros(shape, accumulate))
    rows = tuple(start(x.data.shape[:2]) if wanted else None for wanted in (True, plan.kind == 'softmax' and x.own is not None))
    kept = None

    def meet(rows, key: Side, column):
        def tile(i, carry):
            (every, own), column = carry
            row = _at(x, i)
            s = _scores(row, key, scale, bias)
            if plan.keep:
                nonlocal kept
                kept = s
            row_mask, column_mask, own_mask = _masks(row, key)
            if plan.kind == 'sigmoid':
                total = jnp.sum(_where(row_mask, jax.nn.softplus(_turned(s, own_mask)), 0), 1)
                return (_put(every, (every[0][i], every[1][i] + total), i), own), column
            by_row, by_column = _block_sums(s, row_mask, column_mask, plan.columns)
            every = _put(every, _join(_at(every, i), by_row), i)
            if own is not None:
                add = lambda state: _join(state, _exp_sum(s, own_mask, 1))
                own = _put(own, jax.lax.cond(jnp.any(own_mask), add, lambda state: state, _at(own, i)), i)
            return (every, own), _join(column, by_column) if plan.columns else None
        return _loop(len(x.data), tile, (rows, column))

    (every, own), columns = _sweep(plan, meet, rows, keys, start(keys.data.shape[1:2]) if plan.columns else None)
    if columns is not None:
        columns = tuple(c.reshape(-1)[:met] for c in columns)
        if plan.axes and not plan.ring:
            # Each device has seen its rows only: join them, and keep the columns of its own keys.
            top = jax.lax.pmax(columns[0], plan.axes)
            total = jax.lax.psum_scatter(columns[1] * jnp.exp(columns[0] - top), plan.axes, tiled=True)
            columns = (jax.lax.dynamic_slice_in_dim(top, jax.lax.axis_index(plan.axes) * n, n), total)
        columns = _finish(columns)
    if plan.kind == 'sigmoid':
        return (every[1].reshape(-1)[:m], None, None), kept
    finish = lambda state: None if state is None else _finish(state).reshape(-1)[:m]
    return (finish(every), columns, finish(own)), kept


def _backward(plan, x: Side, y: Side, scale, bias, sums, cotangents, kept):
    m, n, accumulate, (x_type, y_type) = len(x.data), len(y.data), scale.dtype, (x.data.dtype, y.data.dtype)
    # The scale of every score's derivative is folded into the cotangents, so that the gradients need no further pass.
    totals = [None if total is None else _nonempty(total, g * scale) for total, g in zip(sums, cotangents)] if plan.kind == 'softmax' else [
        (None, cotangents[0] * scale), None, None]
    keys, beside = _collect(plan, (y, totals[1]))
    met = len(keys.data)
    x, every, own = _blocks((x, totals[0], totals[2]), plan.tile[0])
    keys, beside = _blocks((keys, beside), plan.tile[1])

    def meet(state, key, key_total):
        key, beside = key

        def tile(i, carry):
            (x_total, bias_total), key_total = carry
            row = _at(x, i)
            s = kept if plan.keep else _scores(row, key, scale, bias)
            row_mask, column_mask, own_mask = _masks(row, key)
            if plan.kind == 'sigmoid':
                w = _where(row_mask, _turned(jax.nn.sigmoid(_turned(s, own_mask)) * every[1][i][:, None], own_mask), 0)
                bias_total = bias_total + jnp.sum(w)
            else:
                w = _block_weights(s, _at(every, i), beside, row_mask, column_mask)
                if own is not None:
                    # A positive's pull is joined to its push here, in float32: near convergence they nearly cancel.
                    total, g = _at(own, i)
                    pull = lambda w: w + jnp.where(own_mask, jnp.exp(s - total[:, None]) * g[:, None], 0)
                    w = jax.lax.cond(jnp.any(own_mask), pull, lambda w: w, w)
            w = w.astype(x_type)
            x_total = _put(x_total, x_total[i] + _product(w, key.data, (1, 0), accumulate), i)
            if plan.key_gradient:
                key_total = key_total + _product(w, row.data, (0, 0), accumulate)
            return (x_total, bias_total), key_total
        return _loop(len(x.data), tile, (state, key_total))

    state = (jnp.zeros(x.data.shape, accumulate), jnp.zeros((), accumulate))
    # On one device a block's key gradient is final when the block is done; gathered or in a ring it is float32 until it is home.
    done = lambda part: part if plan.axes else jax.tree.map(lambda a: a.astype(y_type), part)
    part = jnp.zeros(keys.data.shape[1:], accumulate) if plan.key_gradient else None
    (dx, dbias), dy = _sweep(plan, meet, state, (keys, beside), part, done)
    dx = dx.reshape(-1, dx.shape[-1])[:m]
    dscale = jnp.sum(dx * x.data.reshape(-1, dx.shape[-1])[:m].astype(accumulate)) / scale
    dbias = dbias / scale
    if dy is None:
        dy = jnp.zeros((n, dx.shape[-1]), y_type)
    else:
        dy = dy.reshape(-1, dx.shape[-1])[:met]
        if plan.axes and not plan.ring:
            dy = jax.lax.psum_scatter(dy, plan.axes, tiled=True)
    if plan.axes:
        dscale, dbias = jax.lax.psum((dscale, dbias), plan.axes)
    return dx.astype(x_type), dy.astype(y_type), dscale, dbias


# ---- the sweep

def _sweep(plan, meet, state, keys, start, done=lambda part: part):
    """Lets every block of keys meet this device's rows: meet(state, block, part) -> (state, part), where part, from `start` on, is what is
    summed up for the block's keys. Returns (state, parts [blocks …]), each part through `done`.

    keys: tree of [blocks t …]. In a ring they travel and their parts follow; after as many hops as there are devices these are home again.
    """
    blocks = len(jax.tree.leaves(keys)[0])
    if not plan.ring:
        def one(state, key):
            state, part = meet(state, key, start)
            return state, done(part)
        if blocks == 1:
            state, part = one(state, _at(keys, 0))
            return state, jax.tree.map(lambda a: a[None], part)
        return jax.lax.scan(one, state, keys)

    ring = [(i, (i + 1) % plan.devices) for i in range(plan.devices)]
    hop = lambda tree: jax.tree.map(lambda a: jax.lax.ppermute(a, plan.axes, ring), tree)
    parts = jax.tree.map(lambda a: jnp.broadcast_to(a, (blocks, *a.shape)), start)

    def step(t, carry):
        # Both transfers start before the block's arithmetic and, by the barrier, are waited for after it: the keys of this block, which its
        # arithmetic only reads, and the part of the block before.
        state, keys, parts, sent = carry
        j, before = t % blocks, (t + blocks - 1) % blocks
        key, part = _at(keys, j), _at(parts, j)
        arrived, following = hop(sent), hop(key)
        state, sent = meet(state, key, arrived if blocks == 1 else part)
        following, arrived, sent = jax.lax.optimization_barrier((following, arrived, sent))
        return state, _put(keys, following, j), _put(parts, arrived, before), sent

    state, _, parts, sent = jax.lax.fori_loop(0, plan.devices * blocks, step, (state, keys, parts, start))
    return state, done(_put(parts, hop(sent), blocks - 1))


def _collect(plan, tree):
    """All devices' keys, where they are gathered."""
    if not plan.axes or plan.ring:
        return tree
    return jax.tree.map(lambda a: jax.lax.all_gather(a, plan.axes, tiled=True), tree)


def _loop(count, body, carry):
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def _blocks(tree, size):
    """[rows …] -> [blocks size …]; the last block is filled with invalid rows."""
    def fill(side):
        return _padded(side, -(-len(side.data) // size) * size) if isinstance(side, Side) else side
    tree = jax.tree.map(fill, tree, is_leaf=lambda s: isinstance(s, Side))

    def cut(a):
        a = jnp.pad(a, [(0, -len(a) % size)] + [(0, 0)] * (a.ndim - 1)) if len(a) % size else a
        return a.reshape(-1, size, *a.shape[1:])
    return jax.tree.map(cut, tree)


def _at(tree, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _put(tree, new, i):
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), tree, new)


# ---- one block of scores

def _product(a, b, contracted, accumulate):
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), ((), ())), precision=precision, preferred_element_type=accumulate)


def _scores(row: Side, key: Side, scale, bias):
    return _product(row.data, key.data, (1, 1), scale.dtype) * scale + bias


def _masks(row: Side, key: Side):
    """Which pairs count: for rows, for columns, as positives; None: all."""
    apart = None if row.apart is None else row.apart[:, None] != key.apart
    rows = _both(apart, None if key.valid is None else key.valid[None])
    columns = _both(apart, None if row.valid is None else row.valid[:, None])
    own = None if row.own is None else _both(row.own[:, None] == key.own, rows)
    return rows, columns, own


def _both(a, b):
    return b if a is None else a if b is None else a & b


def _where(mask, a, b):
    return a if mask is None else jnp.where(mask, a, b)


def _turned(s, own):
    return s if own is None else jnp.where(own, -s, s)


# Sums of exponentials are kept as (top, total): total = sum of exp(score - top), top = NEVER where nothing was summed.

def _block_sums(s, row_mask, column_mask, columns: bool):
    """The sums of a block's rows and, if wanted, columns."""
    if not columns:
        return _exp_sum(s, row_mask, 1), None
    top = jnp.max(s)

    def shared(s):
        # One exponential serves both directions when no score is so far below the block's largest that it could be lost.
        e = jnp.exp(s - top)
        totals = jnp.sum(_where(row_mask, e, 0), 1), jnp.sum(_where(column_mask, e, 0), 0)
        return tuple((jnp.where(t > 0, top, NEVER), t) for t in totals)
    return jax.lax.cond(top - jnp.min(s) < SPAN, shared, lambda s: (_exp_sum(s, row_mask, 1), _exp_sum(s, column_mask, 0)), s)


def _exp_sum(s, mask, axis):
    top = jnp.max(_where(mask, s, NEVER), axis)
    return top, jnp.sum(_where(mask, jnp.exp(s - jnp.expand_dims(top, axis)), 0), axis)


def _join(a, b):
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)


def _finish(state):
    top, total = state
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), NEVER)


def _nonempty(total, g):
    """(log-sum-exp, cotangent) in which an empty sum has no cotangent and does not stretch the range of the others."""
    empty = total <= NEVER / 2
    return jnp.where(empty, jnp.max(total), total), jnp.where(empty, 0, g)


def _block_weights(s, row, column, row_mask, column_mask):
    """Derivative by each score: exp(s_ij - row_i) g_i + exp(s_ij - column_j) h_j. row, column: (log-sum-exp, cotangent); column may be None."""
    weight = lambda s, total, g, mask: _where(mask, jnp.exp(s - total) * g, 0)
    (r, g) = (v[:, None] for v in row)
    if column is None:
        return weight(s, r, g, row_mask)
    c, h = column
    top, low = jnp.maximum(jnp.max(r), jnp.max(c)), jnp.minimum(jnp.min(r), jnp.min(c))

    def shared(s):
        # No score that counts is above its row's log-sum-exp.
        return jnp.exp(jnp.minimum(s - top, 0)) * (_where(row_mask, g * jnp.exp(top - r), 0) + _where(column_mask, h * jnp.exp(top - c), 0))
    return jax.lax.cond(top - low < SPAN, shared, lambda s: weight(s, r, g, row_mask) + weight(s, c, h, column_mask), s)
