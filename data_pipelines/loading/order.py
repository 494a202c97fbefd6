"""Position in the stream of examples -> which record: a pure function, for exact, elastic resume.

Nothing is shuffled in memory and nothing is saved: the checkpoint holds one integer, the examples
consumed. Every function here is arithmetic on integers (NumPy only), so that any host computes its
rows alone and all hosts agree.

What holds when things change between two runs of one seed:
- another number of hosts: the global order is the same, always;
- another batch size: the same, if no source has a `share`. With shares a batch holds exact counts,
so its boundaries enter:
  the records already seen of each source are carried over (to within one), the interleaving from
  there on is new.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, UInt64

from data_pipelines.errors import DataError
from data_pipelines.loading.weighted_records import WeightedRecords

# 2^64 divided by the golden ratio: its multiples spread evenly over 64 bits.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6  # 4 rounds already decorrelate; two more cost little and help very small sets
# Weights are exact when they are fractions of at most this denominator, else to 1/4096.
_MAX_BLOCK = 4096
_MIN_BLOCK = 64  # slots; shorter blocks are repeated up to about this many
_MASK_64 = 0xFFFFFFFFFFFFFFFF  # negative seeds become their two's complement


def mix(x: np.ndarray | np.uint64) -> Any:
    """The finaliser of splitmix64, a bijection of uint64; an array or one number."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over='ignore'):  # products wrap around, as intended
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*words: int | str) -> np.uint64:
    """One 64-bit key of a path of words; every word, and its place, changes all bits."""
    # In Python's integers: NumPy's scalars take ten times as long, and a batch of many sources
    # needs a key for each.
    state = 0
    golden = int(_GOLDEN)
    for word in words:
        if isinstance(word, str):
            # The bit above the checksum keeps strings apart from numbers.
            number = zlib.crc32(word.encode()) | 1 << 32
        else:
            number = int(word)
        state = _mix_one(state + golden) ^ _mix_one((number & _MASK_64) + golden)
    return np.uint64(_mix_one(state + golden))


def _mix_one(x: int) -> int:
    """`mix` of one number; bits above the 64th are dropped."""
    x &= _MASK_64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def uniform(
    seed: int, positions: Int[np.ndarray, ' n'], site: str, n: int
) -> Float64[np.ndarray, 'n draws']:
    """The draws of each example at a named site, whatever batch it comes in.

    Args:
      seed: config.seed.
      positions: of the examples.
      site: name of the place in the code that draws.
      n: draws for each example.

    Returns:
      Uniform numbers in [0, 1), `n` for each position.
    """
    with np.errstate(over='ignore'):
        rows = mix(np.asarray(positions, np.int64).astype(np.uint64) * _GOLDEN + key(seed, site))
        bits = mix(rows[:, None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN)  # [n draws]
    # The upper 53 bits fill the mantissa of a float64.
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(i: np.ndarray | int, n: int, *words: int | str) -> Int64[np.ndarray, ' m']:
    """The images of `i` under the permutation of range(n) that `words` name, in O(1) memory."""
    image = np.array(i, np.int64, ndmin=1)
    if n <= 1:
        return np.zeros(image.shape, np.int64)
    permutation = key('permute', *words)
    every = np.zeros(image.shape, np.uint64)
    return _permute_each(image, every + np.uint64(n), every + permutation)


def _permute_each(
    i: Int64[np.ndarray, ' m'], n: UInt64[np.ndarray, ' m'], keys: UInt64[np.ndarray, ' m']
) -> Int64[np.ndarray, ' m']:
    """As `permute`, each element under a permutation of its own.

    A Feistel network permutes the smallest even number of bits that holds n; whatever falls outside
    range(n) is sent through again until it falls inside (cycle walking), which keeps it a
    bijection.

    Args:
      i: elements, each of range(n).
      n: of each element's permutation.
      keys: of each element's permutation.
    """
    # Two halves of equal size: at most 4 n numbers are permuted, so few passes suffice.
    half_bits = (_bit_lengths(n - np.uint64(1)) + np.uint64(1)) // np.uint64(2)
    low_masks = (np.uint64(1) << half_bits) - np.uint64(1)

    def network(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        bits, low_mask, start = half_bits[rows], low_masks[rows], keys[rows]
        left, right = x >> bits, x & low_mask
        for number in range(1, _ROUNDS + 1):
            with np.errstate(over='ignore'):  # sums wrap around, as intended
                round_key = mix(start + np.uint64(number) * _GOLDEN)
                # Invertible whatever `mix` gives: right is carried over unchanged and can undo the
                # xor.
                left, right = right, left ^ (mix(right + round_key) & low_mask)
        return left << bits | right

    image = network(i.astype(np.uint64), np.arange(len(i)))
    while len(outside := np.flatnonzero(image >= n)):
        # Ends, because the orbit of a number below n under a bijection returns to it.
        image[outside] = network(image[outside], outside)
    return image.astype(np.int64)


def _bit_lengths(x: UInt64[np.ndarray, ' m']) -> UInt64[np.ndarray, ' m']:
    """Bits that each number needs, as int.bit_length."""
    different, places = np.unique(x, return_inverse=True)
    lengths = [number.bit_length() for number in different.tolist()]
    return np.array(lengths, np.uint64)[places]


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
      size: records.
      weight: relative frequency among the sources without a share.
      share: exact fraction of every batch (0: none).
      sampling: [size] or None; given, records are drawn with these relative weights, with
        replacement, instead of in epochs. Of several arrays it is the product. They are read where
        they lie, and may be memory-mapped.
      name: for errors.
    """

    size: int
    weight: float = 1.0
    share: float = 0.0
    sampling: np.ndarray | tuple[np.ndarray, ...] | None = None
    name: str = ''


class Order:
    """Which record each position of the stream of a mixture is, see `rows`.

    A position gives a source and a draw (how many earlier positions had the same source); a draw
    gives a record.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        batch_size: int = 1,
        offset: int = 0,
        clips_per_epoch: int = 1,
    ):
        """See the class.

        Args:
          sources: of the mixture.
          seed: config.seed.
          batch_size: global; matters only if some source has a share.
          offset: where batches begin, modulo batch_size.
          clips_per_epoch: how often an epoch has each record, at random places of one order.

        Raises:
          DataError: shares that are not whole rows of a batch or leave nothing for, or too much to,
            the weighted sources.
        """
        if not sources:
            raise DataError('the training mixture config.data.train has no source')
        for source in sources:
            if source.size <= 0:
                raise DataError(f'source {source.name!r} of the training mixture has no records')
        self.sources = tuple(sources)
        self._sizes = np.array([source.size for source in sources], np.int64)
        self.seed = seed
        self._batch_size = batch_size
        self._offset = offset % batch_size
        self._clips_per_epoch = clips_per_epoch
        # A share fills a fixed number of rows of every batch; what is left goes by weights.
        self._share_rows = [_share_rows(source, batch_size) for source in sources]
        self._weighted_rows = batch_size - sum(self._share_rows)
        weights = [0.0 if source.share else float(source.weight) for source in sources]
        self._check(weights)
        if self._weighted_rows:
            self._quotas = _quotas(weights)
        else:
            self._quotas = np.zeros(len(sources), np.int64)
        # What is the same in every batch and block is laid out once: there may be hundreds of
        # sources, and a batch sees few of them.
        self._strata = self._slots_of_batch()  # [B]
        self._owner = np.repeat(np.arange(len(sources)), self._quotas)  # [slots of a block]
        self._weighted: dict[int, WeightedRecords] = {}
        for i, source in enumerate(sources):
            if source.sampling is not None:
                factors = source.sampling
                if not isinstance(factors, tuple):
                    factors = (factors,)
                self._weighted[i] = WeightedRecords(factors, source.size, source.name)

    def _slots_of_batch(self) -> Int[np.ndarray, ' B']:
        """Source of each row of a batch before rows are permuted, -1 of those without a share."""
        with_share = np.repeat(np.arange(len(self.sources)), self._share_rows)
        return np.concatenate([with_share, np.full(self._weighted_rows, -1)])

    def _check(self, weights: Sequence[float]) -> None:
        total_share = sum(source.share for source in self.sources)
        # Not `weight < 0`, which is False for NaN.
        if not all(0 <= weight < math.inf for weight in weights):
            raise DataError(
                f'config.data.train: expected weights that are not negative, got {weights}'
            )
        if self._weighted_rows < 0:
            raise DataError(
                f'config.data.train: the shares sum to {total_share:g}, more than a whole batch'
            )
        if self._weighted_rows and not any(weights):
            raise DataError(
                f'config.data.train: the shares sum to {total_share:g} and no source without a '
                'share has weight, so part of every batch would be empty'
            )
        if not self._weighted_rows and any(weights):
            raise DataError(
                'config.data.train: the shares fill the batch, so sources without a share would '
                'never be read'
            )

    def rows(
        self, positions: Int[np.ndarray, ' n']
    ) -> tuple[Int[np.ndarray, ' n'], Int[np.ndarray, ' n'], Int[np.ndarray, ' n']]:
        """The examples at these positions of the stream.

        Returns:
          source int32, index of the record in it int64, and epoch of that source int64.
        """
        positions = np.asarray(positions, np.int64)
        source, draw = self._draws(positions)
        # A source's epochs are its own: a small one begins its tenth while a large one is in its
        # first.
        size = self._sizes[source] * self._clips_per_epoch
        epoch, within_epoch = np.divmod(draw, size)
        index = np.zeros(len(positions), np.int64)
        is_weighted = np.zeros(len(positions), bool)
        # Only sources that occur here: of hundreds a batch may hold a few.
        for i in np.unique(source).tolist():
            if i not in self._weighted:
                continue
            members = np.flatnonzero(source == i)
            u = uniform(self.seed, draw[members], f'sampling/{i}', 1)[:, 0]
            index[members] = self._weighted[i].draw(u)
            is_weighted[members] = True
        # The others in one go, however many sources they are of.
        others = np.flatnonzero(~is_weighted)
        keys = self._epoch_keys(source[others], epoch[others])
        clip = _permute_each(within_epoch[others], size[others].astype(np.uint64), keys)
        index[others] = clip % self._sizes[source[others]]
        return source, index, epoch

    def _epoch_keys(
        self, source: Int[np.ndarray, ' n'], epoch: Int64[np.ndarray, ' n']
    ) -> UInt64[np.ndarray, ' n']:
        """The permutation of each row's source in its epoch: a new one for each of both."""
        pairs = np.stack([source.astype(np.int64), epoch], axis=1)
        different, places = np.unique(pairs, axis=0, return_inverse=True)
        keys = [key('permute', self.seed, 'record', i, e) for i, e in different.tolist()]
        return np.array(keys, np.uint64)[places.reshape(-1)]

    def _draws(
        self, positions: Int[np.ndarray, ' n']
    ) -> tuple[Int[np.ndarray, ' n'], Int[np.ndarray, ' n']]:
        """Source of each position, and how many earlier positions had the same source."""
        if not any(self._share_rows):
            return self._weighted_draws(positions)
        source = np.zeros(len(positions), np.int32)
        draw = np.zeros(len(positions), np.int64)
        # Batches begin at multiples of the batch size plus the offset; one partial batch may come
        # before the first.
        batch, row = np.divmod(positions - self._offset, self._batch_size)
        for b in np.unique(batch):
            members = np.flatnonzero(batch == b)
            source_of_row, draw_of_row = self._batch_draws(int(b))
            source[members] = source_of_row[row[members]]
            draw[members] = draw_of_row[row[members]]
        # Of the rows without a share, `draw` is the position in the stream of the weighted sources.
        weighted = np.flatnonzero(source < 0)
        if len(weighted):
            source[weighted], draw[weighted] = self._weighted_draws(draw[weighted])
        return source, draw

    def _batch_draws(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_draws`, of all rows [B] of one batch; source -1 marks the weighted sources."""
        # Permuted, or each host would have the rows of the same sources in every batch.
        slots = permute(np.arange(self._batch_size), self._batch_size, self.seed, 'strata', batch)
        source_of_row = self._strata[slots]

        begin = batch * self._batch_size + self._offset
        # By source; the last entry, which -1 finds too, is that of the weighted ones.
        before = np.zeros(len(self.sources) + 1, np.int64)
        for i in np.flatnonzero(self._share_rows).tolist():
            # Integer rounding of share * begin: the same number whatever batch size led here.
            doubled = 2 * begin * self._share_rows[i]
            rounded = (doubled + self._batch_size) // (2 * self._batch_size)
            # The partial batch at the start begins before 0, when nothing has been drawn.
            before[i] = max(0, rounded)
        before[-1] = max(0, begin - int(before.sum()))
        return source_of_row, before[source_of_row] + _earlier_equals(source_of_row)

    def _weighted_draws(
        self, positions: Int[np.ndarray, ' n']
    ) -> tuple[Int[np.ndarray, ' n'], Int[np.ndarray, ' n']]:
        """As `_draws`, among the sources with a weight: permuted blocks of fixed quotas."""
        if len(self.sources) == 1:
            return np.zeros(len(positions), np.int32), positions.copy()
        source = np.zeros(len(positions), np.int32)
        draw = np.zeros(len(positions), np.int64)
        length = int(self._quotas.sum())
        block, slot = np.divmod(positions, length)
        # One network for all blocks asked for would need a key per element; a batch touches few.
        for b in np.unique(block):
            members = np.flatnonzero(block == b)
            slots = permute(np.arange(length), length, self.seed, 'mixture', int(b))
            source_of_slot = self._owner[slots]
            # Every block holds the same number of each source, so the draws of earlier blocks are
            # counted by a product.
            first_draw = int(b) * self._quotas  # [sources]
            draw_of_slot = first_draw[source_of_slot] + _earlier_equals(source_of_slot)
            source[members] = source_of_slot[slot[members]]
            draw[members] = draw_of_slot[slot[members]]
        return source, draw


def _share_rows(source: Source, batch_size: int) -> int:
    """Rows of every batch that a source's share fills."""
    rows = source.share * batch_size
    # The range first: NaN and infinity have no nearest whole number.
    if not 0 <= source.share <= 1 or abs(rows - round(rows)) > 1e-6:
        raise DataError(
            f'config.data.train: share {source.share:g} of source {source.name!r} is {rows:g} rows '
            f'of a batch of {batch_size}; it must be a whole number of rows (a fraction of the '
            'batch between 0 and 1)'
        )
    return round(rows)


def _quotas(weights: Sequence[float]) -> Int64[np.ndarray, ' sources']:
    """Slots of a block for each source, in proportion to the weights."""
    fractions = [_as_written(weight) for weight in weights]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    # The least common multiple of the denominators: the shortest block of whole slots.
    length = 1
    for share in shares:
        # Not NumPy's: the denominators of small weights exceed 64 bits.
        length = math.lcm(length, share.denominator)
        if length > _MAX_BLOCK:
            break
    if length <= _MAX_BLOCK:
        # Blocks of a few slots would alternate almost regularly.
        length *= max(1, _MIN_BLOCK // length)
        return np.array([int(share * length) for share in shares], np.int64)
    # Too long: round to blocks of the greatest length, the largest remainders up.
    quotas = np.array([int(share * _MAX_BLOCK) for share in shares], np.int64)
    remainders = [float(share * _MAX_BLOCK - quota) for share, quota in zip(shares, quotas)]
    num_missing = _MAX_BLOCK - int(quotas.sum())
    for i in np.argsort(remainders)[::-1][:num_missing]:
        quotas[i] += 1
    return np.maximum(quotas, np.asarray(weights) > 0)  # a tiny weight is rare, not never


def _as_written(weight: float) -> Fraction:
    """A weight as the fraction that was meant: 0.1 has the denominator 2^55, its limit 10."""
    limited = Fraction(weight).limit_denominator(10**6)
    # Small weights lie between such fractions, or next to 0. Written in decimals they are exact.
    if abs(limited - Fraction(weight)) > Fraction(weight) / 1000:
        return Fraction(str(weight))
    return limited


def _earlier_equals(groups: Int[np.ndarray, ' n']) -> Int64[np.ndarray, ' n']:
    """How many earlier elements have the same value as each."""
    by_group = np.argsort(groups, kind='stable')
    in_order = groups[by_group]
    first_of_group = np.searchsorted(in_order, in_order, side='left')
    counts = np.empty(len(groups), np.int64)
    counts[by_group] = np.arange(len(groups)) - first_of_group
    return counts


def host_rows(batch_size: int, process: tuple[int, int]) -> tuple[int, int]:
    """The rows of every global batch that one host owns.

    Args:
      batch_size: of the global batch.
      process: (number of the host, hosts).

    Returns:
      (first, last + 1).

    Raises:
      DataError: the rows do not divide over the hosts.
    """
    host, num_hosts = process
    if not 0 <= host < num_hosts or batch_size % num_hosts:
        raise DataError(
            f'batch_size={batch_size} does not divide over {num_hosts} hosts (host {host}); '
            f'make it a multiple of {num_hosts}'
        )
    return host * batch_size // num_hosts, (host + 1) * batch_size // num_hosts


def train_positions(
    step: int, consumed: int, batch_size: int, process: tuple[int, int] = (0, 1)
) -> Int64[np.ndarray, ' B']:
    """Positions of this host's rows in the `step`-th batch (from 0) after `consumed` examples."""
    first, last = host_rows(batch_size, process)
    # A host owns contiguous rows, so host arrays joined in order are the global batch.
    return consumed + step * batch_size + np.arange(first, last, dtype=np.int64)


def one_pass_batches(size: int, batch_size: int) -> int:
    """Batches of one pass over `size` examples."""
    return -(-size // batch_size)  # division that rounds up


def one_pass(
    step: int, size: int, batch_size: int, process: tuple[int, int] = (0, 1)
) -> tuple[Int64[np.ndarray, ' B'], Bool[np.ndarray, ' B']]:
    """The `step`-th batch of one pass over `size` examples, each exactly once over all hosts.

    Returns:
      Positions of this host's rows, the example at a position being its number, and which of them
      are valid: the last batch is filled up with rows that are not.
    """
    positions = train_positions(step, 0, batch_size, process)
    return positions, positions < size


def stretch_batches(size: int, batch_size: int, num_hosts: int) -> int:
    """Batches of a pass of `stretch_pass`, the same number for all hosts."""
    longest = -(-size // num_hosts)
    return -(-longest // (batch_size // num_hosts))


def stretch_pass(
    step: int, size: int, batch_size: int, process: tuple[int, int]
) -> tuple[Int64[np.ndarray, ' B'], Bool[np.ndarray, ' B']]:
    """As `one_pass`, but host i of n has the examples size·i/n … size·(i+1)/n, in their order."""
    host, num_hosts = process
    first = size * host // num_hosts
    last = size * (host + 1) // num_hosts
    num_rows = batch_size // num_hosts
    positions = first + step * num_rows + np.arange(num_rows, dtype=np.int64)
    return positions, positions < last
