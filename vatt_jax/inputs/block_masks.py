"""Multi-block masks of V-JEPA (Bardes et al. 2024, section 3.3): which tokens of a clip are hidden.

A mask is the union of blocks of tubelets, all of one size, at places drawn for each. A few large
ones leave little to look at (long-range); many small ones leave gaps (short-range).

The published code cuts all clips of a batch to the fewest tokens that any of them has, so that
shapes change from step to step. Here the numbers of tokens that are seen and told are fields, the
same in every step: see `draw`. Draws are keyed by example (`rng.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from vatt_jax.config import ConfigError, check_range
from vatt_jax.rng import Rng


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """How the blocks of one mask are drawn.

    Attributes:
        blocks: their number.
        area: smallest and largest share of the grid's two last axes that a block covers.
        aspect: smallest and largest height over width of a block.
        time: smallest and largest share of the frames; not of grids of two axes.
        keep: share of the tokens that the context encoder sees.
        predict: share of the tokens that are predicted.
    """

    blocks: int = 8
    area: tuple[float, float] = (0.15, 0.15)
    aspect: tuple[float, float] = (0.75, 1.5)
    time: tuple[float, float] = (1.0, 1.0)
    keep: float = 0.23
    predict: float = 0.47

    def counts(self, num_tokens: int) -> tuple[int, int]:
        """(tokens that are seen, tokens that are predicted) of so many."""
        return int(self.keep * num_tokens), int(self.predict * num_tokens)


# The published ones. Shares are what the published code has left on average when it has cut 24
# clips, on its grid of 8×14×14 (docs/jepa.md).
SHORT_RANGE = BlockMask()
LONG_RANGE = BlockMask(blocks=2, area=(0.7, 0.7), keep=0.03, predict=0.69)


class Masked(NamedTuple):
    """The tokens of B clips, in row-major order of their grid.

    Attributes:
        kept: int32 [B K], those that the context encoder sees.
        hidden: int32 [B M], those that are predicted; none of them is kept.
    """

    kept: Int32[Array, 'B K']
    hidden: Int32[Array, 'B M']


def read(fields: Mapping[str, Any], where: str) -> BlockMask:
    """A BlockMask of a config's fields; those that are missing have their defaults.

    Args:
        fields: name -> value.
        where: they stand, for messages.

    Raises:
        ConfigError: a field is unknown or out of range.
    """
    known = dataclasses.asdict(BlockMask())
    for name in fields:
        if name not in known:
            raise ConfigError(f'{where}.{name}: expected one of {", ".join(known)}')
    mask = BlockMask(**fields)
    if isinstance(mask.blocks, bool) or not isinstance(mask.blocks, int) or mask.blocks < 1:
        raise ConfigError(f'{where}.blocks: expected a number of at least 1, got {mask.blocks!r}.')
    _check_interval(mask.area, 1, f'{where}.area')
    _check_interval(mask.time, 1, f'{where}.time')
    _check_interval(mask.aspect, math.inf, f'{where}.aspect')
    check_range(mask.keep, 0, 1, f'{where}.keep')
    check_range(mask.predict, 0, 1, f'{where}.predict')
    check_range(mask.keep + mask.predict, 0, 1, f'{where}.keep + predict')
    return mask


def _check_interval(interval: Any, largest: float, where: str) -> None:
    """Raise ConfigError unless it is (low, high) with 0 < low <= high <= largest."""
    is_pair = isinstance(interval, tuple | list) and len(interval) == 2
    if not is_pair or not 0 < interval[0] <= interval[1] <= largest:
        bound = '' if largest == math.inf else f' <= {largest:g}'
        raise ConfigError(
            f'{where}: expected (low, high) with 0 < low <= high{bound}, got {interval!r}.'
        )


def check_grid(mask: BlockMask, grid: tuple[int, ...], where: str) -> None:
    """Check that clips of this grid can be masked so.

    Raises:
        ConfigError: the grid has one axis, or the shares leave no token.
    """
    if len(grid) not in (2, 3):
        raise ConfigError(
            f'{where}: expected tokens in a grid of two or three axes (vit, spt), got {grid}'
        )
    num_kept, num_hidden = mask.counts(math.prod(grid))
    if not num_kept or not num_hidden:
        raise ConfigError(
            f'{where}: keep={mask.keep:g} and predict={mask.predict:g} leave {num_kept} and '
            f'{num_hidden} of {math.prod(grid)} tokens, expected at least 1; raise them'
        )


def draw(mask: BlockMask, grid: tuple[int, ...], rng: Rng) -> Masked:
    """Draw a mask for each clip.

    Blocks rarely leave exactly the tokens that are to be seen. Where they leave more, those seen
    are drawn among them, and the rest is neither seen nor predicted, as in the published code
    (which leaves out the last ones). Where they leave fewer, some inside the blocks are seen and
    not predicted. Likewise for those that are predicted.

    Args:
        mask: of these clips.
        grid: number of tokens along each axis, two or three.
        rng: of these clips.
    """
    is_hidden = inside_blocks(mask, grid, rng)
    num_tokens = is_hidden.shape[1]
    # Tokens outside of all blocks first, and each part in an order of its own.
    rank = is_hidden + rng.at('order').uniform((num_tokens,))
    order = jnp.argsort(rank, axis=1).astype(jnp.int32)  # [B N]
    num_kept, num_hidden = mask.counts(num_tokens)
    return Masked(order[:, :num_kept], order[:, num_tokens - num_hidden :])


def inside_blocks(mask: BlockMask, grid: tuple[int, ...], rng: Rng) -> Bool[Array, 'B N']:
    """Which tokens lie in any of the blocks."""
    # A picture, or a spectrogram, is a clip of one frame.
    lengths = np.array(grid if len(grid) == 3 else (1, *grid))
    extent = _block_extent(mask, lengths, rng.at('size'))[:, None]  # [B 1 3]
    places = rng.at('place').uniform((mask.blocks, 3))
    first = jnp.floor(places * (lengths - extent + 1)).astype(jnp.int32)  # [B blocks 3]
    is_hidden = jnp.zeros((len(first), *lengths), bool)
    for block in range(mask.blocks):
        inside: Any = True
        for axis in range(3):
            index = np.arange(lengths[axis])
            start = first[:, block, axis, None]  # [B 1]
            is_within = (index >= start) & (index < start + extent[:, 0, axis, None])
            shape = [-1, 1, 1, 1]
            shape[axis + 1] = lengths[axis]
            inside = inside & is_within.reshape(shape)
        is_hidden = is_hidden | inside
    return is_hidden.reshape(len(first), -1)


def _block_extent(mask: BlockMask, lengths: np.ndarray, rng: Rng) -> Int32[Array, 'B 3']:
    """Frames, rows and columns of the blocks of each clip."""
    duration, height, width = lengths
    draws = rng.uniform((3,))  # [B 3]
    frames = jnp.floor(duration * _between(mask.time, draws[:, 0]))
    tokens = jnp.floor(height * width * _between(mask.area, draws[:, 1]))
    aspect = _between(mask.aspect, draws[:, 2])
    rows = jnp.round(jnp.sqrt(tokens * aspect))
    columns = jnp.round(jnp.sqrt(tokens / aspect))
    extent = jnp.stack([frames, rows, columns], axis=1)
    return jnp.clip(extent, 1, lengths).astype(jnp.int32)


def _between(interval: tuple[float, float], draw: Float[Array, ' B']) -> Float[Array, ' B']:
    low, high = interval
    return low + (high - low) * draw
