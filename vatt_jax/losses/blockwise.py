"""How rows meet keys, block by block; what is summed when a block meets a block is not known here (similarity.py).

On one device block after block. Inside `jax.set_mesh(mesh)` rows and keys are spread over *all* axes of the mesh (the model and seq axes, which
hold copies of the batch, take a share of the work too), in one of two ways:

  gather  every device collects all keys once and meets them block by block; key gradients go home in one reduce-scatter.
          Memory: all keys and their float32 gradient on each device.
  ring    blocks of keys travel from device to device, their column sums and gradients behind them; the transfer of a block overlaps with the
          arithmetic on another one. Memory: the device's own share only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

METHODS = ('auto', 'gather', 'ring')
SIDE = 512  # rows and keys of a block, where there are enough of both
KEEP = (
    20 * 2**20
)  # up to this many scores per device they are kept for the backward pass: 84 MB, and a matrix product saved
GATHER_BYTES = (
    256 * 2**20
)  # auto: the ring once gathered keys and their gradients would take more than this on a device


@dataclasses.dataclass(frozen=True)
class How:
    """method: auto | gather | ring. block: rows and keys of one block; 0: chosen. dtype: what the scores are multiplied in
    ('bfloat16': products exact, sums and everything after them float32)."""

    method: str = 'auto'
    block: int = 0
    dtype: str = 'float32'


AUTO = How()


@dataclasses.dataclass(frozen=True)
class Layout:
    """axes: those of the mesh that rows and keys are spread over, `devices` devices in all; none: one device. meeting: the rows of a device and
    the keys that meet them at once (in a ring: at each hop). tile: rows and keys of a block. keep: the scores are few enough to be kept."""

    mesh: Any
    axes: tuple[str, ...]
    devices: int
    ring: bool
    meeting: tuple[int, int]
    tile: tuple[int, int]
    keep: bool


def choose(m: int, n: int, key_bytes: int, how: How) -> Layout:
    """The layout of m rows and n keys inside the mesh that is set, if any. key_bytes: what a gathered key and its gradient take."""
    if how.method not in METHODS:
        raise ValueError(f'method={how.method!r}: choose one of {", ".join(METHODS)}')
    mesh = jax.sharding.get_abstract_mesh()
    axes, devices = (
        (tuple(mesh.axis_names), mesh.size) if not mesh.empty and mesh.size > 1 else ((), 1)
    )
    rows, keys = share(m, devices), share(n, devices)
    ring = devices > 1 and (
        how.method == 'ring' or how.method == 'auto' and devices * keys * key_bytes > GATHER_BYTES
    )
    met = keys if ring else devices * keys
    keep = not ring and not how.block and rows * met <= KEEP
    high = _even(rows, how.block or SIDE)
    tile = high, _even(met, how.block or max(SIDE, SIDE * SIDE // high))
    return Layout(mesh if axes else None, axes, devices, ring, (rows, met), tile, keep)


def share(rows: int, devices: int) -> int:
    """Rows of each device; the last ones may be padding."""
    return -(-rows // devices)


def _even(rows: int, most: int) -> int:
    """Rows of a block when `rows` are cut into as few blocks as `most` allows, all alike, with as little padding as multiples of 8 allow."""
    blocks = -(-rows // most)
    even = -(-rows // blocks)
    return even if blocks == 1 else -(-even // 8) * 8


@functools.cache
def on_shares(function, task, layout: Layout, inputs, outputs):
    """function(task, layout, …) run by every device on its share. inputs, outputs: PartitionSpecs.

    It is compiled once per shape, so that a loss called outside of jit is not compiled at every call; inside, it is part of the whole.
    """
    function = functools.partial(function, task, layout)
    if layout.axes:
        function = jax.shard_map(
            function, mesh=layout.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
    return jax.jit(function, inline=True)


# ---- below: on one device's share


def collect(layout: Layout, tree):
    """The keys a device meets without a hop: all devices' where they are gathered, else its own."""
    if not layout.axes or layout.ring:
        return tree
    return jax.tree.map(lambda a: jax.lax.all_gather(a, layout.axes, tiled=True), tree)


def sweep(layout: Layout, meet, state, keys, start, done=lambda part: part):
    """Lets every block of keys meet this device's rows: meet(state, block, part) -> (state, part), where part, from `start` on, is what is
    summed up for the block's keys. Returns (state, parts [blocks …]), each part through `done`.

    keys: tree of [blocks t …]. In a ring they travel and their parts follow; after as many hops as there are devices these are home again.
    """
    count = len(jax.tree.leaves(keys)[0])
    if not layout.ring:

        def one(state, key):
            state, part = meet(state, key, start)
            return state, done(part)

        if count == 1:
            state, part = one(state, at(keys, 0))
            return state, jax.tree.map(lambda a: a[None], part)
        return jax.lax.scan(one, state, keys)

    ring = [(i, (i + 1) % layout.devices) for i in range(layout.devices)]
    hop = lambda tree: jax.tree.map(lambda a: jax.lax.ppermute(a, layout.axes, ring), tree)
    parts = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), start)

    def step(t, carry):
        # Both transfers start before the block's arithmetic and, by the barrier, are waited for after it: the keys of this block, which its
        # arithmetic only reads, and the part of the block before.
        state, keys, parts, sent = carry
        j, before = t % count, (t + count - 1) % count
        key, part = at(keys, j), at(parts, j)
        arrived, following = hop(sent), hop(key)
        state, sent = meet(state, key, arrived if count == 1 else part)
        following, arrived, sent = jax.lax.optimization_barrier((following, arrived, sent))
        return state, put(keys, following, j), put(parts, arrived, before), sent

    state, _, parts, sent = jax.lax.fori_loop(
        0, layout.devices * count, step, (state, keys, parts, start)
    )
    return state, done(put(parts, hop(sent), count - 1))


def loop(count, body, carry):
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def blocks(tree, size):
    """[rows …] -> [blocks size …], the last block filled with zeros."""
    return jax.tree.map(
        lambda a: padded(a, -(-len(a) // size) * size).reshape(-1, size, *a.shape[1:]), tree
    )


def padded(a, rows):
    return a if len(a) == rows else jnp.pad(a, [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1))


def at(tree, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def put(tree, new, i):
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0), tree, new)
