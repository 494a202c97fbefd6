"""Random bits keyed by (seed, step, site, layer, example), never by process, device or microbatch.

`jax.random` keys a whole array at once, so the bits of an example depend on where it sits in the
batch. Here a bit is a hash of *which example* and *which place of the network* asks, so a mask is
the same on one device and on eight, scanned or unrolled, microbatched or not. The hash is a counter
through two multiply-xorshift rounds: it is elementwise, so XLA fuses it into its consumer, which
makes dropout several times cheaper than with threefry on CPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

_GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: its multiples spread evenly

# (K, n) of each part of a packed row: K rows of n columns for every example.
Layout = Sequence[tuple[int, int]]


def mix(x: UInt32[Array, '*shape']) -> UInt32[Array, '*shape']:
    """Hash 32 bits: a bijective finaliser with low bias ("lowbias32" constants)."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _word(value: str | int | Array | np.integer) -> UInt32[Array, '*shape']:
    """Return 32 bits that stand for a site's name or a number."""
    if isinstance(value, str):
        return jnp.uint32(zlib.crc32(value.encode()))
    if isinstance(value, int):
        # A seed may be any integer; JAX would refuse one beyond int32.
        return jnp.uint32(value & 0xFFFFFFFF)
    return jnp.asarray(value).astype(jnp.uint32)


def _fold(key: Array, value: str | int | Array | np.integer) -> UInt32[Array, '*shape']:
    """Return the key one step further down the path."""
    # mix(0) is 0: without the constants seed 0 and step 0 would leave the key at 0.
    return mix((key + jnp.uint32(_GOLDEN)) ^ mix(_word(value) + jnp.uint32(0x85EBCA6B)))


@flax.struct.dataclass
class Rng:
    """A place in the tree of random bits.

    Attributes:
        key: uint32 [], the path so far (seed, step, sites, layers).
        examples: uint32 [B], identity of each example of the batch.
    """

    # Any: JAX rebuilds this tree with other things than arrays as leaves (shardings, avals).
    key: Any
    examples: Any

    @staticmethod
    def create(
        seed: int | Array | np.integer, step: int | Array | np.integer, examples: Any
    ) -> Rng:
        """Return the root of the tree of one step.

        Args:
            seed: `config.seed`.
            step: Optimizer steps taken.
            examples: Integers [B], the global position of each example.
        """
        root = jnp.uint32(0)
        key = _fold(_fold(root, seed), step)
        return Rng(key, jnp.asarray(examples).astype(jnp.uint32))

    def at(self, site: str | int | Array | np.integer) -> Rng:
        """Return the rng of a named site or of a (possibly traced) layer number below this one."""
        return self.replace(key=_fold(self.key, site))  # type: ignore[attr-defined]  # by flax

    def repeat(self, n: int) -> Rng:
        """Return the rng for rows [B·n] made of n parts per example (sentences of a clip).

        The rows are b-major: part j of example b is row b·n + j.
        """
        parts = mix(
            self.examples[:, None] * jnp.uint32(n)
            + jnp.arange(n, dtype=jnp.uint32)
            + jnp.uint32(_GOLDEN)
        )  # [B n]
        return self.replace(examples=parts.reshape(-1))  # type: ignore[attr-defined]  # by flax

    def bits(self, shape: tuple[int, ...]) -> UInt32[Array, 'B ...']:
        """Draw uint32 [B, *shape], bits of each example."""
        return _draw(self.examples, self.key, _counter(shape))

    def shared_bits(self, shape: tuple[int, ...]) -> UInt32[Array, '*shape']:
        """Draw uint32 of this shape, the same bits whatever the batch holds."""
        return mix(mix(_counter(shape) + self.key) ^ (self.key * jnp.uint32(_GOLDEN)))

    def uniform(
        self, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0
    ) -> Float[Array, '*shape']:
        """Draw float32 [B, *shape], uniform in [low, high)."""
        # The upper 24 bits are exact in float32, so that no draw is rounded up to 1.
        unit = (self.bits(shape) >> 8).astype(jnp.float32) * (1.0 / (1 << 24))
        return low + (high - low) * unit

    def normal(self, shape: tuple[int, ...] = ()) -> Float[Array, '*shape']:
        """Draw float32 [B, *shape], standard normal.

        By the inverse error function of a uniform draw in (-1, 1).
        """
        return _to_normal(self.bits(shape))

    def shared_normal(self, shape: tuple[int, ...]) -> Float[Array, '*shape']:
        """Draw float32 of this shape, standard normal, the same whatever the batch holds."""
        return _to_normal(self.shared_bits(shape))

    def permutation(
        self, n: int, per_example: bool = True, parts: int = 1
    ) -> Int32[Array, '*rows n']:
        """Draw uniformly random permutations of range(n).

        Args:
            n: Things to permute.
            per_example: One permutation for each example, else one for the batch.
            parts: With more than 1, and without `per_example`: one permutation for each of that
                many equal runs of rows. It must divide B.

        Returns:
            int32 [B n]; [n] where there is one for the batch.
        """
        # Sorting n random words; equal ones are too rare to matter.
        if per_example:
            return jnp.argsort(self.bits((n,)), axis=-1).astype(jnp.int32)
        if parts == 1:
            return jnp.argsort(self.shared_bits((n,)), axis=-1).astype(jnp.int32)
        orders = jnp.argsort(self.shared_bits((parts, n)), axis=-1).astype(jnp.int32)
        return jnp.repeat(orders, len(self.examples) // parts, axis=0)  # [B n]

    def dropout(self, x: Float[Array, '*shape'], rate: float) -> Float[Array, '*shape']:
        """Zero each element of x [B …] with probability `rate`, scale the rest by 1/(1-rate)."""
        if rate == 0.0:
            return x
        threshold = min(round(rate * 2**32), 2**32 - 1)  # compared as integers: exact
        keep = self.bits(x.shape[1:]) >= jnp.uint32(threshold)  # [B …]
        scale = jnp.asarray(1.0 / (1.0 - rate), x.dtype)
        return jnp.where(keep, x * scale, jnp.zeros((), x.dtype))


@flax.struct.dataclass
class Packed(Rng):
    """Rows of several places of the tree end to end: each draws what it would draw by itself.

    Attributes:
        key: uint32 [N], the path of each column's place.
        examples: uint32 [B N].
        column: uint32 [N], where in its row each column is.
    """

    column: Any

    @staticmethod
    def pack(parts: Sequence[Rng], layout: Layout) -> Packed:
        """Pack rngs end to end.

        Args:
            parts: Rngs of [B·K] rows each, b-major.
            layout: (K, n) of each, K rows of n columns for every example.
        """
        keys, examples, columns = [], [], []
        for part, (num_rows, length) in zip(parts, layout, strict=True):
            keys.append(jnp.broadcast_to(part.key, (num_rows * length,)))
            rows = part.examples.reshape(-1, num_rows)  # [B K]
            examples.append(jnp.repeat(rows, length, axis=1))  # [B K·n]
            columns.append(jnp.tile(jnp.arange(length, dtype=jnp.uint32), num_rows))
        return Packed(jnp.concatenate(keys), jnp.concatenate(examples, 1), jnp.concatenate(columns))

    def parts(self, layout: Layout) -> list[Rng]:
        """Return the rngs that `pack` packed."""
        rngs = []
        start = 0
        for num_rows, length in layout:
            end = start + num_rows * length
            rows = self.examples[:, start:end:length]  # [B K]
            rngs.append(Rng(self.key[start], rows.reshape(-1)))
            start = end
        return rngs

    def take(self, columns: Any) -> Packed:
        """Return the rng of some columns (an index of axis N)."""
        return Packed(self.key[columns], self.examples[:, columns], self.column[columns])

    def bits(self, shape: tuple[int, ...]) -> UInt32[Array, 'B ...']:
        """Draw uint32 [B, *shape] for a shape [N …]."""
        rest = shape[1:]
        # A column's counter goes on where the one before it in its row ends.
        first = self.column * jnp.uint32(math.prod(rest))  # [N]
        expanded = (-1, *(1,) * len(rest))
        return _draw(
            self.examples,
            self.key.reshape(expanded),
            first.reshape(expanded) + _counter(rest),
        )


def _to_normal(bits: UInt32[Array, '*shape']) -> Float[Array, '*shape']:
    """Turn random bits into standard normal draws."""
    # 23 bits and a half: exact in float32, so the argument stays inside (-1, 1), where the inverse
    # is finite.
    u = ((bits >> 9).astype(jnp.float32) + 0.5) * (2.0 / (1 << 23)) - 1.0
    return jax.lax.erf_inv(u) * math.sqrt(2.0)


def _draw(examples: Array, key: Array, counter: Array) -> UInt32[Array, '*shape']:
    """Hash a bit pattern for each example and counter under a path.

    Args:
        examples: uint32, the leading axes of the result.
        key: uint32, a number or of the counter's rank.
        counter: uint32.
    """
    trailing = (1,) * (counter.ndim + 1 - examples.ndim)
    row = mix(examples.reshape(examples.shape + trailing) * jnp.uint32(0x9E3779B1) + key)
    # The row enters before and after the first round: two rows whose words differ by a small number
    # would otherwise be shifted copies of one another.
    return mix(mix(counter + row) ^ (row * jnp.uint32(_GOLDEN) + key))


def _counter(shape: tuple[int, ...]) -> UInt32[Array, '*shape']:
    """Return 0, 1, 2, … in row-major order, built from iotas so that nothing is stored."""
    count = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        count = count + position * jnp.uint32(stride)
        stride *= shape[axis]
    return count
