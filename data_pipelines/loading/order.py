"""Position in the stream of examples -> which record: a pure function, hence exact and elastic resume.

Nothing is shuffled in memory and nothing is saved: the checkpoint holds one integer, the examples consumed. Every function
here is arithmetic on integers (NumPy only), so that any host computes its rows alone and all hosts agree.

What holds when things change between two runs of one seed:
- another number of hosts: the global order is the same, always;
- another batch size: the same, if no source has a `share`. With shares a batch holds exact counts, so its boundaries enter:
  the records already seen of each source are carried over (to within one), the interleaving from there on is new.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_pipelines.errors import DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6  # 4 rounds already decorrelate; two more cost little and help very small sets
_MAX_BLOCK = (
    4096  # weights are exact when they are fractions of at most this denominator, else to 1/4096
)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of uint64."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int | str) -> np.uint64:
    """One 64-bit key of a path of words; every word, and its place, changes all bits."""
    out = np.uint64(0)
    with np.errstate(over='ignore'):
        for word in words:
            number = zlib.crc32(word.encode()) | 1 << 32 if isinstance(word, str) else int(word)
            out = mix(out + _GOLDEN) ^ mix(np.uint64(number & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
        return mix(out + _GOLDEN)


def uniform(seed: int, positions: np.ndarray, site: str, n: int) -> np.ndarray:
    """float64 [len(positions), n] in [0, 1): the draws of each example at a named site, whatever batch it comes in."""
    with np.errstate(over='ignore'):
        rows = mix(np.asarray(positions, np.int64).astype(np.uint64) * _GOLDEN + key(seed, site))
        bits = mix(rows[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(i: np.ndarray, n: int, *words: int | str) -> np.ndarray:
    """int64 like `i`: the image of i under the permutation of range(n) that `words` name. O(1) memory.

    A Feistel network permutes the smallest even number of bits that holds n; whatever falls outside range(n) is sent
    through again until it falls inside (cycle walking), which keeps it a bijection.
    """
    i = np.array(i, np.int64, ndmin=1).astype(np.uint64)
    if n <= 1:
        return np.zeros(i.shape, np.int64)
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    start = key('permute', *words)
    with np.errstate(over='ignore'):
        keys = mix(start + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)

        def network(x: np.ndarray) -> np.ndarray:
            left, right = x >> half, x & low
            for k in keys:
                left, right = right, left ^ (mix(right + k) & low)
            return left << half | right

        i = network(i)
        while len(outside := np.flatnonzero(i >= n)):
            i[outside] = network(i[outside])
    return i.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture.

    size: records. weight: relative frequency among the sources without a share. share: exact fraction of every batch (0: none).
    sampling: float [size] or None; given, records are drawn with these relative weights, with replacement, instead of in epochs.
    """

    size: int
    weight: float = 1.0
    share: float = 0.0
    sampling: np.ndarray | None = None
    name: str = ''


class Order:
    """rows(positions) for a mixture of sources.

    batch_size: global; matters only if some source has a share. offset: where batches begin, modulo batch_size.
    Raises DataError for shares that are not whole rows of a batch or leave nothing for, or too much to, the weighted sources.
    """

    def __init__(self, sources: Sequence[Source], seed: int, batch_size: int = 1, offset: int = 0):
        if not sources:
            raise DataError('the training mixture config.data.train has no source')
        for s in sources:
            if s.size <= 0:
                raise DataError(f'source {s.name!r} of the training mixture has no records')
        self.sources, self.seed = tuple(sources), seed
        self._batch, self._offset = batch_size, offset % batch_size
        self._counts = [self._rows_of(s) for s in sources]
        self._rest = batch_size - sum(self._counts)
        weights = [0.0 if s.share else float(s.weight) for s in sources]
        if any(w < 0 for w in weights):
            raise DataError('config.data.train: weights must not be negative')
        if self._rest < 0:
            raise DataError(
                f'config.data.train: the shares sum to {sum(s.share for s in sources):g}, more than a whole batch'
            )
        if self._rest and not any(weights):
            raise DataError(
                f'config.data.train: the shares sum to {sum(s.share for s in sources):g} and no source without a '
                'share has weight, so part of every batch would be empty'
            )
        if not self._rest and any(weights):
            raise DataError(
                'config.data.train: the shares fill the batch, so sources without a share would never be read'
            )
        self._quotas = _quotas(weights) if self._rest else np.zeros(len(sources), np.int64)
        self._cumulative = [None if s.sampling is None else _cumulative(s) for s in sources]

    def _rows_of(self, s: Source) -> int:
        rows = s.share * self._batch
        if abs(rows - round(rows)) > 1e-6 or not 0 <= s.share <= 1:
            raise DataError(
                f'config.data.train: share {s.share:g} of source {s.name!r} is {rows:g} rows of a batch of '
                f'{self._batch}; it must be a whole number of rows (a fraction of the batch between 0 and 1)'
            )
        return round(rows)

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 positions [n] -> (source int32 [n], record index int64 [n], epoch of that source int64 [n])."""
        positions = np.asarray(positions, np.int64)
        source, draw = self._draws(positions)
        index = np.zeros(len(positions), np.int64)
        epoch = np.zeros(len(positions), np.int64)
        for i, s in enumerate(self.sources):
            mine = np.flatnonzero(source == i)
            epoch[mine], within = np.divmod(draw[mine], s.size)
            if self._cumulative[i] is not None:
                u = uniform(self.seed, draw[mine], f'sampling/{i}', 1)[:, 0]
                index[mine] = np.minimum(
                    np.searchsorted(self._cumulative[i], u, side='right'), s.size - 1
                )
                continue
            for e in np.unique(epoch[mine]):
                now = epoch[mine] == e
                index[mine[now]] = permute(within[now], s.size, self.seed, 'record', i, int(e))
        return source, index, epoch

    def _draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and how many earlier positions had the same source."""
        if not any(self._counts):
            return self._weighted(positions)
        source = np.zeros(len(positions), np.int32)
        draw = np.zeros(len(positions), np.int64)
        # Batches begin at multiples of the batch size plus the offset; one partial batch may come before the first.
        batch, row = np.divmod(positions - self._offset, self._batch)
        slots = np.arange(self._batch)
        # Stratum of each slot before the rows of the batch are permuted: the sources with a share, then the rest (-1).
        strata = np.concatenate(
            [np.full(c, i) for i, c in enumerate(self._counts)] + [np.full(self._rest, -1)]
        )
        for b in np.unique(batch):
            mine = np.flatnonzero(batch == b)
            of_row = strata[permute(slots, self._batch, self.seed, 'strata', int(b))]
            begin = int(b) * self._batch + self._offset
            # Integer rounding of share * begin: the same number whatever the batch size that led here.
            before = [
                max(0, (2 * begin * c + self._batch) // (2 * self._batch)) for c in self._counts
            ]
            rank = np.zeros(self._batch, np.int64)
            for i in {*np.unique(of_row).tolist()}:
                here = np.flatnonzero(of_row == i)
                rank[here] = np.arange(len(here)) + (
                    max(0, begin - sum(before)) if i < 0 else before[i]
                )
            source[mine], draw[mine] = of_row[row[mine]], rank[row[mine]]
        rest = np.flatnonzero(source < 0)
        if len(rest):
            source[rest], draw[rest] = self._weighted(draw[rest])
        return source, draw

    def _weighted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As _draws, among the sources with a weight: blocks of fixed quotas, permuted inside each block."""
        if len(self.sources) == 1:
            return np.zeros(len(positions), np.int32), positions.copy()
        source = np.zeros(len(positions), np.int32)
        draw = np.zeros(len(positions), np.int64)
        length = int(self._quotas.sum())
        block, slot = np.divmod(positions, length)
        owner = np.repeat(np.arange(len(self.sources)), self._quotas)
        # One network for all blocks asked for would need a key per element; a batch touches few blocks.
        for b in np.unique(block):
            mine = np.flatnonzero(block == b)
            of_slot = owner[permute(np.arange(length), length, self.seed, 'mixture', int(b))]
            rank = np.zeros(length, np.int64)
            for i, quota in enumerate(self._quotas):
                rank[of_slot == i] = int(b) * int(quota) + np.arange(quota)
            source[mine], draw[mine] = of_slot[slot[mine]], rank[slot[mine]]
        return source, draw


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """int64 [sources]: slots of a block, in proportion to the weights."""
    total = sum(Fraction(w).limit_denominator(10**6) for w in weights)
    shares = [Fraction(w).limit_denominator(10**6) / total for w in weights]
    length = 1
    for share in shares:
        length = length * share.denominator // np.gcd(length, share.denominator)
        if length > _MAX_BLOCK:
            break
    if length <= _MAX_BLOCK:
        # Blocks of a few slots would alternate almost regularly.
        length *= max(1, 64 // length)
        return np.array([int(share * length) for share in shares], np.int64)
    quotas = np.array([int(share * _MAX_BLOCK) for share in shares], np.int64)
    remainders = [float(share * _MAX_BLOCK - q) for share, q in zip(shares, quotas)]
    for i in np.argsort(remainders)[::-1][: _MAX_BLOCK - int(quotas.sum())]:
        quotas[i] += 1
    return np.maximum(quotas, np.asarray(weights) > 0)  # a tiny weight is rare, not never


def _cumulative(s: Source) -> np.ndarray:
    weights = np.asarray(s.sampling, np.float64)
    if (
        weights.shape != (s.size,)
        or not np.isfinite(weights).all()
        or (weights < 0).any()
        or not weights.sum() > 0
    ):
        raise DataError(
            f'sampling weights of source {s.name!r} must be {s.size} finite numbers, none negative and not all '
            f'zero; got an array of shape {weights.shape}'
        )
    total = np.cumsum(weights)
    return total / total[-1]


def host_rows(batch_size: int, process: tuple[int, int]) -> tuple[int, int]:
    """(first, last+1): the rows of every global batch that host i of n owns. Raises DataError if they do not divide."""
    i, n = process
    if not 0 <= i < n or batch_size % n:
        raise DataError(
            f'batch_size={batch_size} does not divide over {n} hosts (host {i}); make it a multiple of {n}'
        )
    return i * batch_size // n, (i + 1) * batch_size // n


def train_positions(
    step: int, consumed: int, batch_size: int, process: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """int64 [B/n]: positions of this host's rows in the `step`-th batch (from 0) after `consumed` examples."""
    first, last = host_rows(batch_size, process)
    return consumed + step * batch_size + np.arange(first, last, dtype=np.int64)


def one_pass_batches(size: int, batch_size: int) -> int:
    return -(-size // batch_size)


def one_pass(
    step: int, size: int, batch_size: int, process: tuple[int, int] = (0, 1)
) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64 [B/n], valid bool [B/n]) of the `step`-th batch of one pass over `size` examples: each exactly once
    over all hosts, the last batch filled up with rows that are not valid. The example at a position is its number."""
    positions = train_positions(step, 0, batch_size, process)
    return positions, positions < size
