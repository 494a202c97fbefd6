"""Random bits keyed by (seed, step, site, layer, example), never by process, device or microbatch.

`jax.random` keys a whole array at once, so the bits of an example depend on where it sits in the batch. Here a bit is a
hash of *which example* and *which place of the network* asks, so a mask is the same on one device and on eight, scanned
or unrolled, microbatched or not (DESIGN §4). The hash is a counter through two multiply-xorshift rounds: it is
elementwise, so XLA fuses it into its consumer, which makes dropout several times cheaper than with threefry on CPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def mix(x: jax.Array) -> jax.Array:
    """A bijective 32-bit finaliser with low bias ("lowbias32" constants); uint32 in, uint32 out."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _word(value: str | int | jax.Array) -> jax.Array:
    if isinstance(value, str):
        return jnp.uint32(zlib.crc32(value.encode()))
    if isinstance(value, int):
        return jnp.uint32(
            value & 0xFFFFFFFF
        )  # a seed may be any integer; JAX would refuse one beyond int32
    return jnp.asarray(value).astype(jnp.uint32)


def _fold(key: jax.Array, value: str | int | jax.Array) -> jax.Array:
    return mix((key + jnp.uint32(_GOLDEN)) ^ mix(_word(value) + jnp.uint32(0x85EBCA6B)))


@flax.struct.dataclass
class Rng:
    """A place in the tree of random bits.

    key: uint32 [], the path so far (seed, step, sites, layers).
    examples: uint32 [B], identity of each example of the batch.
    """

    key: jax.Array
    examples: jax.Array

    @staticmethod
    def create(seed: int | jax.Array, step: int | jax.Array, examples: jax.Array) -> Rng:
        """`examples`: integers [B], the global position of each example."""
        return Rng(
            _fold(_fold(jnp.uint32(0), seed), step), jnp.asarray(examples).astype(jnp.uint32)
        )

    def at(self, site: str | int | jax.Array) -> Rng:
        """The rng of a named site or of a (possibly traced) layer number below this one."""
        return self.replace(key=_fold(self.key, site))

    def repeat(self, n: int) -> Rng:
        """For rows [B*n] made of n parts per example (sentences of a clip): part j of example b, b-major."""
        parts = mix(
            self.examples[:, None] * jnp.uint32(n)
            + jnp.arange(n, dtype=jnp.uint32)
            + jnp.uint32(_GOLDEN)
        )
        return self.replace(examples=parts.reshape(-1))

    def bits(self, shape: tuple[int, ...]) -> jax.Array:
        """uint32 [B, *shape]: bits of each example."""
        return _draw(self.examples, self.key, _counter(shape))

    def shared_bits(self, shape: tuple[int, ...]) -> jax.Array:
        """uint32 shape: the same bits whatever the batch holds."""
        return mix(mix(_counter(shape) + self.key) ^ (self.key * jnp.uint32(_GOLDEN)))

    def uniform(
        self, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0
    ) -> jax.Array:
        """float32 [B, *shape] in [low, high)."""
        return low + (high - low) * (
            (self.bits(shape) >> 8).astype(jnp.float32) * (1.0 / (1 << 24))
        )

    def normal(self, shape: tuple[int, ...] = ()) -> jax.Array:
        """float32 [B, *shape], standard normal (inverse error function of a uniform in (-1, 1))."""
        # 23 bits and a half: exact in float32, so the argument stays inside (-1, 1) where the inverse is finite
        u = ((self.bits(shape) >> 9).astype(jnp.float32) + 0.5) * (2.0 / (1 << 23)) - 1.0
        return jax.lax.erf_inv(u) * math.sqrt(2.0)

    def permutation(self, n: int, per_example: bool = True, parts: int = 1) -> jax.Array:
        """int32 [B, n] (or [n], one for the batch): uniformly random permutations of range(n).

        parts > 1, without per_example: [B, n], one permutation for each of that many equal runs of rows, which must divide B.
        """
        if per_example or parts == 1:
            return jnp.argsort(
                self.bits((n,)) if per_example else self.shared_bits((n,)), axis=-1
            ).astype(jnp.int32)
        return jnp.repeat(
            jnp.argsort(self.shared_bits((parts, n)), axis=-1).astype(jnp.int32),
            len(self.examples) // parts,
            axis=0,
        )

    def dropout(self, x: jax.Array, rate: float) -> jax.Array:
        """x [B, ...] with each element zeroed with probability `rate` and the rest scaled by 1/(1-rate)."""
        if rate == 0.0:
            return x
        keep = self.bits(x.shape[1:]) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


@flax.struct.dataclass
class Packed(Rng):
    """Rows of several places of the tree end to end: each draws what it would draw by itself.

    key: uint32 [N], the path of each column's place. examples: uint32 [B N]. column: uint32 [N], where in its row each column is.
    """

    column: jax.Array

    @staticmethod
    def of(parts: Sequence[Rng], layout: Sequence[tuple[int, int]]) -> Packed:
        """parts: of [B·K] rows each, b-major; layout: (K, n) of each, K rows of n columns for every example."""
        spread = lambda r, k, n: jnp.repeat(r.examples.reshape(-1, k), n, axis=1)
        return Packed(
            jnp.concatenate(
                [jnp.broadcast_to(r.key, (k * n,)) for r, (k, n) in zip(parts, layout, strict=True)]
            ),
            jnp.concatenate([spread(r, k, n) for r, (k, n) in zip(parts, layout)], 1),
            jnp.concatenate([jnp.tile(jnp.arange(n, dtype=jnp.uint32), k) for k, n in layout]),
        )

    def parts(self, layout: Sequence[tuple[int, int]]) -> list[Rng]:
        """What `of` was given."""
        starts = [sum(k * n for k, n in layout[:i]) for i in range(len(layout))]
        return [
            Rng(self.key[at], self.examples[:, at : at + k * n : n].reshape(-1))
            for at, (k, n) in zip(starts, layout)
        ]

    def take(self, columns: Any) -> Packed:
        """That of some columns."""
        return Packed(self.key[columns], self.examples[:, columns], self.column[columns])

    def bits(self, shape: tuple[int, ...]) -> jax.Array:
        """uint32 [B, *shape], shape [N, …]."""
        rest = shape[1:]
        wide = lambda x: x.reshape(x.shape + (1,) * len(rest))
        return _draw(
            self.examples,
            wide(self.key),
            wide(self.column * jnp.uint32(math.prod(rest))) + _counter(rest),
        )


def _draw(examples: jax.Array, key: jax.Array, counter: jax.Array) -> jax.Array:
    """uint32: a bit pattern for each example and counter under a path. examples: its leading axes; key: a number, or of the counter's rank."""
    lead = examples.shape + (1,) * (counter.ndim + 1 - examples.ndim)
    row = mix(examples.reshape(lead) * jnp.uint32(0x9E3779B1) + key)
    # The row enters before and after the first round: two rows whose words differ by a small number would
    # otherwise be shifted copies of one another.
    return mix(mix(counter + row) ^ (row * jnp.uint32(_GOLDEN) + key))


def _counter(shape: tuple[int, ...]) -> jax.Array:
    """uint32 shape, 0, 1, 2, … in row-major order, built from iotas so that nothing is stored."""
    count = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        count = count + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return count
