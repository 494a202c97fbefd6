"""Records drawn by weights, without a table as long as the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64

from data_pipelines.errors import DataError

_BLOCK = 128  # records whose weights are added up anew for a draw
_AT_ONCE = 1 << 10  # blocks that are summed at a time: 1 MB


class WeightedRecords:
    """Uniform numbers -> records, by the inverse of the weights' cumulative distribution.

    The weights stay where they are, which may be on disk, in whatever type they have. What is kept
    is the running sum at the end of each block of them: an eighth of a byte a record. All sums run
    in float64 from the first record on, so a draw is to the digit what it is by one table of all.
    """

    def __init__(self, factors: Sequence[np.ndarray], size: int, name: str):
        """See the class.

        Args:
          factors: arrays [size] whose product is the weight of each record.
          size: records.
          name: of the source, for errors.

        Raises:
          DataError: weights that are not `size` finite numbers, or negative, or all zero.
        """
        self._factors = factors
        self._size = size
        self._num_blocks = -(-size // _BLOCK)
        shapes = [factor.shape for factor in factors]
        if any(shape != (size,) for shape in shapes):
            raise _unusable(name, size, shapes[0])
        self._ends = np.empty(self._num_blocks)  # running sum at the end of each block
        total = 0.0
        for begin in range(0, self._num_blocks, _AT_ONCE):
            blocks = np.arange(begin, min(begin + _AT_ONCE, self._num_blocks))
            weights = self._weights(blocks)
            if not np.isfinite(weights).all() or (weights < 0).any():
                raise _unusable(name, size, shapes[0])
            # The sum goes on from the one before: 0.1 + 0.2 + 0.3 is not 0.1 + (0.2 + 0.3).
            weights[0, 0] += total
            sums = np.cumsum(weights.reshape(-1))
            self._ends[blocks] = sums[_BLOCK - 1 :: _BLOCK]
            total = sums[-1]
        if not 0 < total < np.inf:
            raise _unusable(name, size, shapes[0])
        self._total = total
        # Divided by its own last entry, so that the distribution ends in exactly 1.
        self._distribution = self._ends / total

    def _weights(self, blocks: Int64[np.ndarray, ' n']) -> Float64[np.ndarray, 'n block']:
        """The weights of whole blocks, 0 behind the last record."""
        numbers = blocks[:, None] * _BLOCK + np.arange(_BLOCK)
        is_record = numbers < self._size
        numbers = np.minimum(numbers, self._size - 1)
        weights = np.ones(numbers.shape)
        for factor in self._factors:
            weights *= factor[numbers]
        return np.where(is_record, weights, 0)

    def draw(self, u: Float[np.ndarray, ' n']) -> Int64[np.ndarray, ' n']:
        """The record of each of these numbers in [0, 1)."""
        # 'right' here and `<=` below, so that records of weight 0 are never drawn. A mere guard:
        # the last entry is exactly 1 and u is below it.
        found = np.searchsorted(self._distribution, u, side='right')
        blocks = np.minimum(found, self._num_blocks - 1)
        weights = self._weights(blocks)
        before = np.where(blocks > 0, self._ends[blocks - 1], 0)
        weights[:, 0] += before
        distribution = np.cumsum(weights, axis=1) / self._total  # [n block]
        records = blocks * _BLOCK + (distribution <= u[:, None]).sum(axis=1)
        return np.minimum(records, self._size - 1)


def _unusable(name: str, size: int, shape: tuple[int, ...]) -> DataError:
    return DataError(
        f'sampling weights of source {name!r} must be {size} finite numbers, none negative and not '
        f'all zero; got an array of shape {shape}'
    )
