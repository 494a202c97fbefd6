"""The blockwise loop: all pairs of rows and keys, block by block.

What is summed over a pair of blocks is not known here (similarity.py).

On one device, block after block. Inside `jax.set_mesh(mesh)`, rows and keys are spread over *all*
axes of the mesh (the model and seq axes, which hold copies of the batch, take a share of the work
too), in one of two ways:

  gather  every device collects all keys once and goes over them block by block; key gradients go
          home in one reduce-scatter. Memory: all keys and their float32 gradient on each device.
  ring    blocks of keys travel from device to device, their column sums and gradients behind them;
          the transfer of a block overlaps with the arithmetic on another one. Memory: the device's
          own share only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

METHODS = ('auto', 'gather', 'ring')

# Rows and keys of a block, where there are enough of both.
# 512 x 512 scores in float32 are 1 MiB.
SIDE = 512

# Up to this many scores per device are stored for the backward pass: 84 MB, and a matrix product
# saved.
MAX_STORED_SCORES = 20 * 2**20

# auto: the ring, once gathered keys and their gradients would take more than this on a device.
# 256 MiB are 65 536 keys of width 512 in float32 (4 bytes of the key, 4 of its gradient).
GATHER_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class How:
    """How the sums are computed; the result is the same, up to rounding.

    Attributes:
      method: auto | gather | ring.
      block: Rows and keys of one block; 0: chosen.
      dtype: What the scores are multiplied in ('bfloat16': products exact, sums and everything
        after them float32).
    """

    method: str = 'auto'
    block: int = 0
    dtype: str = 'float32'


AUTO = How()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How rows and keys lie on devices and in blocks.

    Attributes:
      mesh: The mesh, or None on one device.
      axes: The mesh axes that rows and keys are spread over; none on one device.
      devices: Devices in all.
      ring: Keys travel in a ring; else they are gathered.
      local: Rows of a device, and the keys it sees at once (in a ring: at each hop).
      tile: Rows and keys of a block.
      store_scores: The scores are few enough to be stored for the backward pass.
    """

    mesh: Any
    axes: tuple[str, ...]
    devices: int
    ring: bool
    local: tuple[int, int]
    tile: tuple[int, int]
    store_scores: bool


def choose_layout(num_rows: int, num_keys: int, key_bytes: int, how: How) -> Layout:
    """Chooses the layout inside the mesh that is set, if any.

    Args:
      num_rows: Rows of all devices.
      num_keys: Keys of all devices.
      key_bytes: Bytes that a gathered key and its gradient take.
      how: Method and block size.

    Raises:
      ValueError: For an unknown method or a negative block.
    """
    if how.method not in METHODS:
        raise ValueError(f'method={how.method!r}: choose one of {", ".join(METHODS)}')
    if how.block < 0:
        raise ValueError(f'block: expected rows of a block, or 0 (chosen), got {how.block}')
    # Axis names and sizes are all that is needed. Empty without jax.set_mesh.
    mesh = jax.sharding.get_abstract_mesh()
    axes: tuple[str, ...] = ()
    devices = 1
    if not mesh.empty and mesh.size > 1:
        axes = tuple(mesh.axis_names)
        devices = mesh.size

    local_rows = rows_per_device(num_rows, devices)
    local_keys = rows_per_device(num_keys, devices)
    is_large = devices * local_keys * key_bytes > GATHER_BYTES
    ring = devices > 1 and (how.method == 'ring' or (how.method == 'auto' and is_large))
    if not ring:
        local_keys = devices * local_keys
    # In a ring all that belongs to a block of keys travels with it; scores would be far too much.
    # A block size that was asked for is a sign that memory is short.
    store_scores = not ring and not how.block and local_rows * local_keys <= MAX_STORED_SCORES

    tile_rows = _even_block(local_rows, how.block or SIDE)
    # Few rows make room for more keys: a block has about SIDE * SIDE scores.
    tile_keys = _even_block(local_keys, how.block or max(SIDE, SIDE * SIDE // tile_rows))
    return Layout(
        mesh=mesh if axes else None,
        axes=axes,
        devices=devices,
        ring=ring,
        local=(local_rows, local_keys),
        tile=(tile_rows, tile_keys),
        store_scores=store_scores,
    )


def rows_per_device(num_rows: int, devices: int) -> int:
    """Returns the rows of each device; the last ones may be padding."""
    # Ceiling division in integers; the same below.
    return -(-num_rows // devices)


def _even_block(num_rows: int, largest: int) -> int:
    """Returns the rows of a block when `num_rows` are cut into as few blocks as `largest` allows.

    All blocks are alike, with as little padding as multiples of 8 allow.
    """
    num_blocks = -(-num_rows // largest)
    size = -(-num_rows // num_blocks)
    if num_blocks == 1:
        return size
    return -(-size // 8) * 8


# All arguments hash by value, so equal ones return the same jitted function. A new partial at every
# call would be a new function to jit, and compile again.
@functools.cache
def on_devices(
    function: Callable[..., Any], task: Any, layout: Layout, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns function(task, layout, …), run by every device on its share.

    It is compiled once per shape, so that a loss called outside of jit is not compiled at every
    call; inside, it is part of the whole.
    """
    function = functools.partial(function, task, layout)
    if layout.axes:
        # check_vma off: similarity.py writes its derivative by hand, outside of the shard_map, so
        # nothing in here is ever transposed.
        function = jax.shard_map(
            function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
    return jax.jit(function, inline=True)


# ---- Below: on one device's share.


def gather_keys(layout: Layout, tree: Any) -> Any:
    """Returns the keys a device sees without a hop: all where they are gathered, else its own."""
    if not layout.axes or layout.ring:
        return tree
    # tiled: concatenated along the rows, not stacked on a new axis.
    return jax.tree.map(lambda x: jax.lax.all_gather(x, layout.axes, tiled=True), tree)


def loop_over_keys(
    layout: Layout,
    visit: Callable[[Any, Any, Any], tuple[Any, Any]],
    state: Any,
    keys: Any,
    start: Any,
    finish: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Visits all blocks of keys, each with this device's rows.

    Args:
      layout: Gathered or in a ring.
      visit: (state, block, part) -> (state, part), where part is what is summed up for the block's
        keys.
      state: What is summed up for the rows.
      keys: Tree of [blocks t …]. In a ring they travel and their parts follow; after as many hops
        as there are devices these are home again.
      start: Every part's first value.
      finish: Applied to each part once it is complete.

    Returns:
      (state, parts [blocks …]).
    """
    if layout.ring:
        # A part is complete only when it is back home, so `finish` has to wait until the end.
        state, parts = _ring(layout, visit, state, keys, start)
        return state, parts if finish is None else finish(parts)

    def step(state, block):
        state, part = visit(state, block, start)
        return state, part if finish is None else finish(part)

    if len(jax.tree.leaves(keys)[0]) == 1:
        # A single block needs no loop.
        state, part = step(state, get_block(keys, 0))
        return state, jax.tree.map(lambda x: x[None], part)
    # scan stacks the parts: [blocks …].
    return jax.lax.scan(step, state, keys)


def _ring(layout: Layout, visit: Any, state: Any, keys: Any, start: Any) -> tuple[Any, Any]:
    num_blocks = len(jax.tree.leaves(keys)[0])
    # (source, destination) pairs of ppermute; devices are numbered along all axes together.
    neighbours = [(i, (i + 1) % layout.devices) for i in range(layout.devices)]

    def hop(tree):
        return jax.tree.map(lambda x: jax.lax.ppermute(x, layout.axes, neighbours), tree)

    parts = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_blocks, *x.shape)), start)

    def step(t, carry):
        # Both transfers start before the block's arithmetic and, by the barrier, are waited for
        # after it: the keys of this block, which its arithmetic only reads, and the part of the
        # block before.
        state, keys, parts, sent = carry
        current, previous = t % num_blocks, (t + num_blocks - 1) % num_blocks
        block, part = get_block(keys, current), get_block(parts, current)
        arrived, following = hop(sent), hop(block)
        # A single block's part is the one that has just arrived.
        state, sent = visit(state, block, arrived if num_blocks == 1 else part)
        following, arrived, sent = jax.lax.optimization_barrier((following, arrived, sent))
        keys = set_block(keys, following, current)
        parts = set_block(parts, arrived, previous)
        return state, keys, parts, sent

    # Every block of this device's share visits every device once.
    num_steps = layout.devices * num_blocks
    carry = (state, keys, parts, start)
    state, _, parts, sent = jax.lax.fori_loop(0, num_steps, step, carry)
    # The part of the last block is still to make its last hop.
    return state, set_block(parts, hop(sent), num_blocks - 1)


def loop_over_rows(num_blocks: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Runs step(i, carry) for every block of rows; a single one without a loop."""
    if num_blocks == 1:
        return step(0, carry)
    return jax.lax.fori_loop(0, num_blocks, step, carry)


def split_blocks(tree: Any, size: int) -> Any:
    """Cuts [rows …] into [blocks size …], the last block filled with zeros."""

    def split(x):
        num_blocks = -(-len(x) // size)
        return pad_rows(x, num_blocks * size).reshape(-1, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def pad_rows(x: Any, num_rows: int) -> Any:
    """Appends zeros, up to `num_rows` rows."""
    if len(x) == num_rows:
        return x
    return jnp.pad(x, [(0, num_rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def get_block(tree: Any, i: Any) -> Any:
    """Returns block i of every array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def set_block(tree: Any, block: Any, i: Any) -> Any:
    """Returns the arrays with block i replaced."""
    return jax.tree.map(lambda x, b: jax.lax.dynamic_update_index_in_dim(x, b, i, 0), tree, block)
