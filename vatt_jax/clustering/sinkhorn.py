"""Labels by optimal transport: M samples to P clusters of prescribed sizes.

The samples are given as logits, or as features and head weights.

The problem (Asano et al. 2019, "Self-labelling"): minimise the mean cross entropy of
the labels under the model, subject to the share prior[k] for cluster k, relaxed by an entropy of
weight 1/λ. With Z = λ · mean over views of their logits, the solution is softmax(Z + g) by rows,
where the P potentials g make its column means equal the prior; the label of a row is argmax(Z + g).
Constants of a row change nothing, so logits need no log-softmax.

Only g is unknown. One *pass* reads the rows once, in blocks that stay in cache, and returns the
column means c(g) of softmax(Z + g). Plain Sinkhorn is g += log(prior / c(g)). It is accelerated
twice, on the host, in float64, on vectors of length P:

- Preconditioning. Around the solution, log c moves by (I - A) dg with A = diag(1/c) · mean of s sᵀ
  over rows s of the softmax, so (I - A)⁻¹ log(prior / c) is Newton's step. A is summed over a
  *sample* of rows only, near the solution that this sample gives.
- Anderson mixing over the last steps takes care of what A misses. A step that fails falls back to
  plain Sinkhorn, which cannot.

Large λ (or confident rows) make plain Sinkhorn slow in proportion to λ, so the first potentials are
found on a small sample with λ doubled from a small value up. All sums over rows are all-reduced, so
nothing depends on how rows are spread over devices. With several processes each has its own rows,
which stay on its devices: the samples are those of process 0, then those of process 1 and so on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float

from vatt_jax.clustering import newton
from vatt_jax.clustering.problem import (
    check_heads,
    check_prior,
    check_start,
    check_tolerance,
    find_not_finite,
    is_blocked,
    split_views,
)
from vatt_jax.clustering.rows import RowLayout, lay_out, mesh_by_process
from vatt_jax.parallel import hosts

# The published loop stops when the sum over samples of |beta / beta' - 1| falls below this.
PUBLISHED = 0.1

# Rows per cluster of the two samples: one to anneal on, one to sum Newton's matrix over.
COARSE = 16
FINE = 64

# Nats between a row's best and mean cluster at which annealing starts.
SOFT = 10.0

# Up to as many clusters Newton's matrix is also built for the guess; on a CPU it costs P / 50
# passes over its rows.
EAGER = 512

# Residual at which the matrix is built where it will be used.
NEAR = 1e-2

# Damping of Newton's matrix, in units of P / (rows it was summed over).
DAMPING = 0.5

# How often a step that failed is halved before it is given up.
HALVINGS = 12

# Steps that Anderson mixing looks back on.
MEMORY = 10

# Longest accelerated step of one potential, in nats.
LONGEST = 8.0

# A search that ends above this residual has lost its way: all rows are annealed.
LOST = 1e-3

# Passes without a tenth of progress after which float precision is taken to be reached.
PATIENCE = 60

# Logits are centred by rows where the largest of a row lies further than this from 0. Nearer ones
# lose no digit that matters, and need no copy.
OFFSET = 32.0

OVERFLOW = (
    'all views are finite, but their sums overflow: logits times strength are too large for '
    "this dtype; scale them down, or set dtype='float64'"
)

# Method -> how many past steps a step may look back on.
STEPS = {'newton': MEMORY, 'anderson': MEMORY, 'plain': 0}


@dataclasses.dataclass
class Solution:
    """What `solve` found.

    Attributes:
      potentials: float64 [P], weighted mean zero under the prior.
      labels: int32 [M]; with several processes, of this process's rows.
      cost: Mean over samples and views of -log p(label).
      residual: Sum over clusters of |column mean - prior|.
      published_error: The published loop's error at these potentials, a sum over samples.
      passes: Full passes over the rows.
      work: Rows read, those of samples included, divided by M.
      converged: False when float precision or max_passes ended the search; the potentials are then
        the best seen.
      preconditioner: float64 [P P], for the next, similar problem.
      history: The residual of every pass.
    """

    potentials: np.ndarray
    labels: np.ndarray
    cost: float
    residual: float
    published_error: float
    passes: int
    work: float
    converged: bool
    preconditioner: np.ndarray | None
    history: list[float]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where to start: the potentials and, if kept, the preconditioner of an earlier Solution."""

    potentials: np.ndarray
    preconditioner: np.ndarray | None = None


def solve(
    views: Sequence[Any],
    prior: np.ndarray,
    strength: float,
    *,
    heads: Sequence[tuple[Any, Any]] | None = None,
    tolerance: float | str = 1e-5,
    start: Start | Solution | None = None,
    method: str = 'newton',
    max_passes: int = 2000,
    dtype: str = 'float32',
    mesh: Mesh | None = None,
) -> Solution:
    """Finds the labels of M samples.

    Args:
      views: One array per view (modality): logits [M P], or features [M D] when `heads` is given. A
        view may also be a list of arrays, blocks of rows (all views cut alike): blocks on the host
        are sent to the devices one by one in each pass. With several processes these are this
        one's rows, of any number; lists have as many blocks on all.
      prior: [P], share of each cluster, positive, summing to 1.
      strength: λ.
      heads: Each view's (kernel [D P], bias [P]). M × P logits are then never stored.
      tolerance: On `residual`; or 'published', small enough (0.1 / M) that the published loop would
        stop, its error being at most M · residual.
      start: Potentials, and perhaps a preconditioner, to start from.
      method: 'newton' (both accelerations), 'anderson' (no preconditioner) or 'plain' (Sinkhorn as
        published).
      max_passes: Most full passes over the rows of one search.
      dtype: Of the passes; float64 works whatever jax_enable_x64 says.
      mesh: Rows are spread over all its devices (default: one device).

    Raises:
      ValueError: For a prior with empty clusters, logits that are not finite, or arguments that do
        not fit each other.
    """
    prior = check_prior(prior)
    if method not in STEPS:
        raise ValueError(f'method: expected one of {", ".join(STEPS)}, got {method!r}.')
    if not strength > 0 or not np.isfinite(strength):
        raise ValueError(f'strength: expected a positive, finite λ, got {strength}.')
    if max_passes < 1:
        raise ValueError(f'max_passes: expected a positive number, got {max_passes}.')
    # Without it JAX would cast float64 arrays to float32, silently.
    with jax.enable_x64(dtype == 'float64'):
        rows = Rows(views, heads, len(prior), dtype, mesh)
        use_newton = method == 'newton'
        limit = check_tolerance(tolerance, rows.count, PUBLISHED)

        g = np.zeros(len(prior))
        inverse = None
        rebuild = None
        if start is not None:
            g, inverse = check_start(start.potentials, start.preconditioner, len(prior))
            if not use_newton:
                inverse = None
        elif method != 'plain':
            g, inverse, rebuild = first_guess(rows, prior, strength, use_newton)

        marginal = functools.partial(rows.marginal, strength=strength)
        found = search(marginal, g, prior, limit, max_passes, inverse, rebuild, STEPS[method])
        is_lost = found.residual > max(limit, LOST)
        if method != 'plain' and is_lost and len(found.history) < max_passes:
            # The guess came from a sample; annealing on all rows cannot be misled by it.
            g = anneal(rows, prior, strength, LOST, use_newton)
            second = search(marginal, g, prior, limit, max_passes, None, rebuild)
            second.history[:0] = found.history
            found = min(second, found, key=lambda result: result.residual)
        if use_newton and found.residual > limit:
            coupling = functools.partial(rows.coupling, strength=strength)
            found = refine(marginal, coupling, found, prior, limit, max_passes)
        labels, cost, error = rows.label(found.potentials, found.marginal, prior, strength)
    return Solution(
        potentials=found.potentials,
        labels=labels,
        cost=cost,
        residual=found.residual,
        published_error=error,
        passes=len(found.history),
        work=rows.read / rows.count,
        converged=found.residual <= limit,
        preconditioner=found.inverse,
        history=found.history,
    )


def shares(
    views: Sequence[Any],
    strength: float,
    *,
    heads: Sequence[tuple[Any, Any]] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Returns the share of each cluster without any prior: the column means of softmax(Z).

    Args:
      views: As for `solve`.
      strength: λ.
      heads: As for `solve`.
      mesh: As for `solve`.

    Returns:
      float64 [P].
    """
    num_clusters = _count_clusters(views, heads)
    rows = Rows(views, heads, num_clusters, 'float32', mesh)
    return rows.marginal(np.zeros(num_clusters), strength)


def _count_clusters(views: Sequence[Any], heads: Sequence[tuple[Any, Any]] | None) -> int:
    if heads:
        kernel, _ = heads[0]
        return kernel.shape[1]
    if not len(views):
        # Refused by name where the rows are made.
        return 0
    first_block = views[0][0] if is_blocked(views) else views[0]
    return first_block.shape[1]


# ---- The rows: everything that touches devices.


class Rows:
    """The samples, placed once (arrays) or block by block in each pass (lists of blocks).

    Attributes:
      count: M, of all processes.
      layouts: Of each block.
      read: Rows read so far, by samples of these rows too.
    """

    def __init__(
        self,
        views: Sequence[Any],
        heads: Sequence[tuple[Any, Any]] | None,
        clusters: int,
        dtype: str,
        mesh: Mesh | None,
    ):
        self.dtype = jnp.dtype(dtype)
        self.clusters = clusters
        # A list, because samples of these rows add to the same count.
        self._rows_read = [0]
        if mesh is None:
            mesh = Mesh(np.array(jax.local_devices()[:1]), ('rows',))
        self.mesh = mesh_by_process(mesh)
        self.replicated = NamedSharding(self.mesh, Spec())

        check_heads(heads, len(views), clusters)
        blocks = split_views(views, heads, clusters)
        self.heads = None if heads is None else tuple(self._place_head(*head) for head in heads)
        self.streamed = is_blocked(views)
        self.layouts = [self._lay_out(block) for block in blocks]
        self.count = sum(layout.total for layout in self.layouts)
        self.blocks = blocks
        if not self.streamed:
            self.blocks = [self.place(*placed) for placed in zip(blocks, self.layouts)]

    def _lay_out(self, block: Sequence[Any]) -> RowLayout:
        layout = lay_out(len(block[0]), self.mesh)
        if not layout.total:
            shape = np.shape(block[0])
            raise ValueError(f'views: expected at least one row, got shape {shape}.')
        return layout

    def _place_head(self, kernel: Any, bias: Any) -> tuple[jax.Array, jax.Array]:
        # What all clusters have in common changes no label and would cost digits in the products.
        # The bias may hold -inf, which forbids a cluster, so its mean would not do.
        kernel = np.asarray(kernel, np.float64)
        bias = np.asarray(bias, np.float64)
        kernel = kernel - kernel.mean(1, keepdims=True)
        bias = bias - bias.max()
        kernel = jax.device_put(jnp.asarray(kernel, self.dtype), self.replicated)
        bias = jax.device_put(jnp.asarray(bias, self.dtype), self.replicated)
        return kernel, bias

    @property
    def read(self) -> int:
        return self._rows_read[0]

    def place(self, block: Sequence[Any], layout: RowLayout) -> tuple[jax.Array, ...]:
        """Spreads rows over all devices, padded to a multiple of their number."""
        views = tuple(self._place_view(x, layout) for x in block)
        if self.heads is not None:
            return views
        return tuple(_centred(x) if float(_largest_top(x)) > OFFSET else x for x in views)

    def _place_view(self, x: Any, layout: RowLayout) -> jax.Array:
        has_padding = len(x) < layout.rows_per_device * self.mesh.size
        if isinstance(x, jax.Array) and x.dtype == self.dtype and not has_padding:
            if x.sharding.is_equivalent_to(layout.sharding, x.ndim):
                return x
        host = np.asarray(x)
        if self.heads is None and host.dtype.itemsize > self.dtype.itemsize:
            # Before digits are lost. A row of -inf alone becomes NaN, and is reported.
            with np.errstate(invalid='ignore'):
                host = host - host.max(-1, keepdims=True)
        return layout.place(host.astype(self.dtype, copy=False))

    def sample(self, size: int) -> Rows:
        """Draws `size` rows, or all rows if there are no more.

        They are drawn without regard to their order, and are the same ones on any mesh.
        """
        if size >= self.count:
            return self
        # A fixed seed: all processes must draw the same rows, and a resumed run those of the first.
        chosen = np.sort(np.random.default_rng(0).choice(self.count, size, replace=False))
        parts = []
        first = 0
        for block, layout in zip(self.blocks, self.layouts):
            numbers = chosen[(chosen >= first) & (chosen < first + layout.total)] - first
            parts.append([self._take(x, numbers, layout) for x in block])
            first += layout.total
        own = [np.concatenate(pieces) for pieces in zip(*parts)]
        out = copy.copy(self)
        out.streamed = False
        out.count = size
        out.layouts = [lay_out(len(own[0]), self.mesh)]
        out.blocks = [out.place(own, out.layouts[0])]
        return out

    def _take(self, x: Any, numbers: np.ndarray, layout: RowLayout) -> np.ndarray:
        """This process's rows among those of these numbers."""
        is_own = (numbers >= layout.own.start) & (numbers < layout.own.stop)
        if self.streamed:
            return np.asarray(x[numbers[is_own] - layout.own.start])
        # Replicated, as no process can say by itself which rows of an array to compute.
        gather = jax.jit(lambda x, index: x[index], out_shardings=self.replicated)
        return np.asarray(gather(x, layout.places(numbers)))[is_own]

    def passes(
        self, statistic: str, g: np.ndarray, strength: float, ratio: np.ndarray | None = None
    ) -> Iterator[Any]:
        """Yields the results of `_block_pass` for all blocks.

        g is split so that float32 passes still feel changes of g below its own resolution.
        """
        # exp(z + g) = exp(z + coarse) · exp(g - coarse), whose second factor is near 1.
        coarse = g.astype(self.dtype)
        fine_factor = np.exp(g - coarse)
        ratio = np.ones(len(g)) if ratio is None else ratio
        vectors = jnp.asarray(np.stack([coarse, fine_factor, ratio]), self.dtype)  # [3 P]
        self._rows_read[0] += self.count
        for block, layout in zip(self.blocks, self.layouts):
            if self.streamed:
                block = self.place(block, layout)
            scale = jnp.asarray(strength / len(block), self.dtype)  # λ / views
            yield _block_pass(
                block,
                self.heads,
                vectors,
                scale,
                layout.counts,
                statistic=statistic,
                mesh=self.mesh,
                chunk=chunk_rows(self.clusters),
            )

    def marginal(self, g: np.ndarray, strength: float) -> np.ndarray:
        """Returns the column means c(g): float64 [P]."""
        total = np.zeros(self.clusters)
        # The two halves are added in float64: high + low in float32 would round low away.
        for high, low in self.passes('marginal', g, strength):
            total = total + (np.asarray(high, np.float64) + np.asarray(low, np.float64))
        # Divided by its own sum, not by M, so that rounding does not move the total from 1.
        self._must_be_finite(total)
        return total / total.sum()

    def coupling(self, g: np.ndarray, strength: float) -> np.ndarray:
        """Returns the mean of s sᵀ over the rows s of softmax(Z + g): float64 [P P]."""
        total = np.zeros((self.clusters, self.clusters))
        for block in self.passes('coupling', g, strength):
            total = total + np.asarray(block, np.float64)
        return total / self.count

    def spread(self, strength: float) -> float:
        """Returns the mean over rows of max Z - mean Z, in nats."""
        blocks = self.passes('spread', np.zeros(self.clusters), strength)
        total = sum(np.float64(block) for block in blocks)
        self._must_be_finite(total)
        return float(total) / self.count

    def label(
        self, g: np.ndarray, marginal: np.ndarray, prior: np.ndarray, strength: float
    ) -> tuple[np.ndarray, float, float]:
        """Labels the rows at g, whose column means are `marginal`.

        Returns:
          (labels of this process's rows, mean cost, published error).
        """
        # Bounded, so that an empty cluster is no inf in float32 (which ends at 3e38).
        ratio = np.minimum(prior / np.maximum(marginal, 1e-30), 1e30)
        labels = []
        cost = np.float64(0)
        error = np.float64(0)
        results = self.passes('label', g, strength, ratio)
        for (block_labels, block_cost, block_error), layout in zip(results, self.layouts):
            labels.append(layout.fetch(block_labels))
            cost += np.float64(block_cost)
            error += np.float64(block_error)
        return np.concatenate(labels), float(cost) / self.count, float(error)

    def _must_be_finite(self, sums: Any) -> None:
        """Raises ValueError, with the reason, where sums over the rows are not finite."""
        if np.isfinite(sums).all():
            return
        blocks = []
        first_rows = []
        first = 0
        for block, layout in zip(self.blocks, self.layouts):
            fetch = np.asarray if self.streamed else layout.fetch
            blocks.append(tuple(fetch(x) for x in block))
            first_rows.append(first + layout.own.start)
            first += layout.total
        heads = None
        if self.heads is not None:
            heads = [(np.asarray(kernel), np.asarray(bias)) for kernel, bias in self.heads]
        # The rows of another process may be the reason, and process 0 is the one that speaks.
        reason = hosts.first_text(find_not_finite(blocks, first_rows, heads))
        raise ValueError(reason or OVERFLOW)


def chunk_rows(clusters: int) -> int:
    """Returns the rows of one step of a pass.

    About 1 MB of float32 on a CPU (its cache), 32 MB on an accelerator.
    """
    scores = 1 << (18 if jax.default_backend() == 'cpu' else 23)
    return max(8, scores // clusters)


@jax.jit
def _largest_top(logits: jax.Array) -> jax.Array:
    """Returns the largest absolute value of a row's largest logit: []."""
    return jnp.abs(logits.max(-1)).max()


@jax.jit
def _centred(logits: jax.Array) -> jax.Array:
    """Returns the logits [rows P] with the largest of each row at 0, as exact as they are given.

    What all clusters of a row have in common changes no softmax, but costs digits once it is
    multiplied by λ. The difference of two floats is exact where they are near each other.
    """
    return logits - logits.max(-1, keepdims=True)


def combined(pieces: Sequence[Any], heads: Sequence[tuple[Any, Any]] | None) -> jax.Array:
    """Returns the sum over views of their logits: [rows P]."""
    if heads is None:
        return sum(pieces)
    # One view after the other: two [rows P] arrays at a time, however many views there are.
    return sum(
        jnp.matmul(x, kernel, precision='highest') + bias
        for x, (kernel, bias) in zip(pieces, heads, strict=True)
    )


class _Chunk(NamedTuple):
    """Some rows R and their softmax, which is exponentials [R P] times inverse [R]."""

    first: jax.Array
    pieces: list[jax.Array]  # [R P] or [R D] per view
    weight: jax.Array  # [R]
    exponentials: jax.Array
    inverse: jax.Array


@functools.partial(jax.jit, static_argnames=('statistic', 'mesh', 'chunk'))
def _block_pass(
    block: tuple[jax.Array, ...],
    heads: tuple[tuple[jax.Array, jax.Array], ...] | None,
    vectors: jax.Array,
    scale: jax.Array,
    counts: Any,
    *,
    statistic: str,
    mesh: Mesh,
    chunk: int,
) -> Any:
    """Makes one pass over a block of rows.

    Args:
      block: One array of rows per view, as a RowLayout lays them.
      heads: (kernel [D P], bias [P]) per view, or None where the rows are logits.
      vectors: [3 P]: g, the factor for what g's rounding lost, and prior / c.
      scale: [], λ over the number of views.
      counts: [devices], rows of each that are not padding.
      statistic: What is computed, see below.
      mesh: The rows are spread over all its axes.
      chunk: Rows of one step.

    Returns:
      'marginal': column sums [P] as an unevaluated sum (high, low).
      'coupling': sum of s sᵀ [P P].
      'spread': sum over rows of max Z - mean Z.
      'label': (labels [rows], sum of costs, sum over rows of |Σ_k s_k prior_k / c_k - 1|, which is
        |beta / beta' - 1| of the published loop).
    """
    axes = mesh.axis_names
    g, fine, ratio = vectors

    def device_pass(block, heads):
        num_rows, num_clusters = len(block[0]), len(g)
        size = min(chunk, num_rows)
        count = counts[jax.lax.axis_index(axes)]

        def read_chunk(i):
            # The last chunk starts early enough to be whole; rows already seen, and padding, weigh
            # nothing.
            first = jnp.minimum(i * size, num_rows - size)
            pieces = [jax.lax.dynamic_slice_in_dim(x, first, size) for x in block]
            row = first + jnp.arange(size)
            weight = ((row >= i * size) & (row < count)).astype(g.dtype)
            # NaN, +inf or a row of -inf only turn the sums into NaN, which _must_be_finite reports.
            z = scale * combined(pieces, heads) + g  # [R P]
            exponentials = jnp.exp(z - z.max(-1, keepdims=True)) * fine
            return _Chunk(first, pieces, weight, exponentials, 1 / exponentials.sum(-1))

        def step(i, carry):
            chunk = read_chunk(i)
            if statistic == 'marginal':
                return _add_marginal(carry, chunk)
            if statistic == 'coupling':
                return _add_coupling(carry, chunk)
            if statistic == 'spread':
                return _add_spread(carry, chunk, heads, scale)
            return _add_labels(carry, chunk, heads, ratio)

        scalar = jnp.zeros((), g.dtype)
        start: Any
        if statistic == 'marginal':
            start = (jnp.zeros(num_clusters, g.dtype), jnp.zeros(num_clusters, g.dtype))
        elif statistic == 'coupling':
            start = jnp.zeros((num_clusters, num_clusters), g.dtype)
        elif statistic == 'spread':
            start = scalar
        else:
            start = (jnp.zeros(num_rows, jnp.int32), scalar, scalar)
        total = jax.lax.fori_loop(0, -(-num_rows // size), step, start)
        if statistic == 'label':
            labels, cost, error = total
            return labels, jax.lax.psum(cost, axes), jax.lax.psum(error, axes)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), total)

    by_rows = Spec(axes)
    out_specs = (by_rows, Spec(), Spec()) if statistic == 'label' else Spec()
    run = jax.shard_map(
        device_pass, mesh=mesh, in_specs=(by_rows, Spec()), out_specs=out_specs, check_vma=False
    )
    return run(block, heads)


def _add_marginal(carry: Any, chunk: _Chunk) -> Any:
    """Adds the column sums of the softmax, with the rounding error carried along (two-sum)."""
    high, low = carry
    part = jnp.matmul(chunk.weight * chunk.inverse, chunk.exponentials, precision='highest')  # [P]
    # Knuth's two-sum: what `new` lost to rounding, exactly. XLA does not reassociate floats.
    new = high + part
    back = new - high
    return new, low + ((high - (new - back)) + (part - back))


def _add_coupling(carry: jax.Array, chunk: _Chunk) -> jax.Array:
    """Adds Σ s sᵀ; a weight is 0 or 1, so that its square is itself."""
    s = chunk.exponentials * (chunk.inverse * chunk.weight)[:, None]  # [R P]
    return carry + jnp.matmul(s.T, s, precision='highest')


def _add_spread(carry: jax.Array, chunk: _Chunk, heads: Any, scale: jax.Array) -> jax.Array:
    """Adds Σ max Z - mean Z, the mean over the clusters that are not forbidden (-inf)."""
    z = scale * combined(chunk.pieces, heads)
    finite = jnp.isfinite(z)
    mean = jnp.where(finite, z, 0).sum(-1) / finite.sum(-1)
    return carry + jnp.sum(chunk.weight * (z.max(-1) - mean))


def _add_labels(carry: Any, chunk: _Chunk, heads: Any, ratio: jax.Array) -> Any:
    """Writes the labels of the rows, and adds their costs and the published loop's error."""
    labels, cost, error = carry
    exponentials = chunk.exponentials
    num_clusters = exponentials.shape[-1]
    # The first index of the maximum; argmax itself is twice as slow on CPUs.
    is_top = exponentials == exponentials.max(-1, keepdims=True)
    label = jnp.min(jnp.where(is_top, jnp.arange(num_clusters), num_clusters), -1)  # [R]
    is_label = jax.nn.one_hot(label, num_clusters, dtype=bool)  # [R P]

    view_costs = []
    for view, x in enumerate(chunk.pieces):
        logits = combined([x], None if heads is None else [heads[view]])
        log_normaliser = jax.nn.logsumexp(logits, -1)
        view_costs.append(log_normaliser - jnp.where(is_label, logits, 0).sum(-1))
    cost = cost + jnp.sum(chunk.weight * sum(view_costs)) / len(view_costs)

    # beta / beta' of the published loop.
    row_ratio = chunk.inverse * jnp.matmul(exponentials, ratio, precision='highest')
    error = error + jnp.sum(chunk.weight * jnp.abs(row_ratio - 1))
    labels = jax.lax.dynamic_update_slice(labels, label.astype(jnp.int32), (chunk.first,))
    return labels, cost, error


# ---- The search: float64 vectors of length P on the host.


@dataclasses.dataclass
class Found:
    """The best point of a search, and the residual of every pass it made."""

    potentials: np.ndarray
    marginal: np.ndarray
    residual: float
    inverse: np.ndarray | None
    history: list[float]


def search(
    marginal: Callable[[np.ndarray], np.ndarray],
    g: np.ndarray,
    prior: np.ndarray,
    limit: float,
    max_passes: int,
    inverse: np.ndarray | None = None,
    rebuild: Callable[[np.ndarray], np.ndarray] | None = None,
    memory: int = MEMORY,
) -> Found:
    """Finds potentials whose column means are the prior, or the best of `max_passes`.

    Args:
      marginal: g -> c(g), one pass.
      g: [P], where to start.
      prior: [P].
      limit: Sum of absolute differences of column means and prior that is small enough.
      max_passes: Most passes.
      inverse: The preconditioner (I - A)⁻¹ [P P], or None.
      rebuild: Makes a better preconditioner, once, when near the solution.
      memory: Past steps to mix; 0: plain Sinkhorn.
    """
    # Anderson's least squares: Σ_k prior_k · (step of cluster k)², large clusters count more.
    norm_weight = np.sqrt(prior)
    log_prior = np.log(prior)
    best, best_marginal, best_residual = g, prior, np.inf
    history: list[float] = []
    past: list[tuple[np.ndarray, np.ndarray]] = []  # (g, step) of points since the last restart
    stalled = 0  # passes without a tenth of progress
    failures = 0
    halved = 0

    def sinkhorn_step(c: np.ndarray) -> np.ndarray:
        # A cluster may have lost all its mass in floating point: no log of 0.
        return log_prior - np.log(np.maximum(c, 1e-300))

    while len(history) < max_passes:
        c = marginal(g)
        residual = float(np.abs(c - prior).sum())
        history.append(residual)
        stalled = 0 if residual < 0.9 * best_residual else stalled + 1
        if residual < best_residual:
            best, best_marginal, best_residual = g, c, residual
        if best_residual <= limit or (memory and stalled > PATIENCE):
            break
        if not memory:
            g = g + sinkhorn_step(c)
            continue

        # A step that failed. Somewhat above the best is no failure: mixing is not monotone.
        if residual > 2 * best_residual:
            if failures and halved < HALVINGS:
                # Not the first that fails: rows are nearly decided, so the way is right and its
                # length is not.
                halved += 1
                g = (g + best) / 2
                continue
            # Back to the best point and a plain step from there; a preconditioner that misleads
            # three times is dropped.
            failures += 1
            halved = 0
            if failures >= 3:
                inverse = None
            past = []
            g = best + np.clip(sinkhorn_step(best_marginal), -LONGEST, LONGEST)
            continue

        halved = 0
        if rebuild is not None and residual < NEAR:
            # Steps made with another preconditioner cannot be mixed with this one's.
            inverse = rebuild(g)
            rebuild = None
            past = []
        step = sinkhorn_step(c)
        if inverse is not None:
            step = inverse @ step
        past = [*past, (g, step)][-(memory + 1) :]
        g = g + np.clip(mixed(past, norm_weight), -LONGEST, LONGEST)
        # A constant added to all potentials changes nothing; it must not drift away.
        g = g - prior @ g
    return Found(best, best_marginal, best_residual, inverse, history)


def refine(
    marginal: Callable[[np.ndarray], np.ndarray],
    coupling: Callable[[np.ndarray], np.ndarray],
    found: Found,
    prior: np.ndarray,
    limit: float,
    max_passes: int,
) -> Found:
    """Goes on from where the fast search ended, by Newton's method on all rows."""
    point, history = newton.maximise(marginal, coupling, found.potentials, prior, limit, max_passes)
    # The preconditioner stays: the next problem's search is the fast one, for which it was made.
    return Found(
        point.potentials,
        point.marginal,
        point.residual,
        found.inverse,
        found.history + history,
    )


def mixed(past: Sequence[tuple[np.ndarray, np.ndarray]], weight: np.ndarray) -> np.ndarray:
    """Returns Anderson's step (type II).

    The combination of past points at which the steps, were they linear, would cancel best.

    Args:
      past: (point [P], step [P]), oldest first.
      weight: [P], of the components in the least squares.
    """
    points = np.array([point for point, _ in past])
    steps = np.array([step for _, step in past])
    if len(past) < 2:
        return steps[-1]
    point_changes = np.diff(points, axis=0)
    step_changes = np.diff(steps, axis=0)
    # rcond: near convergence the changes are nearly parallel, and their differences rounding.
    mix = np.linalg.lstsq((step_changes * weight).T, steps[-1] * weight, rcond=1e-8)[0]
    return steps[-1] - mix @ (point_changes + step_changes)


def preconditioner(rows: Rows, g: np.ndarray, strength: float) -> np.ndarray:
    """Returns (I - A)⁻¹ [P P] at g, without its null direction, a constant added to all potentials.

    The damping is of the order of the noise of a mean over M / P rows for each cluster: slow
    directions are trusted no further.
    """
    damping = DAMPING * rows.clusters / rows.count
    return newton.inverse(rows.coupling(g, strength), damping)


def anneal(
    rows: Rows, prior: np.ndarray, strength: float, tolerance: float, newton: bool
) -> np.ndarray:
    """Finds potentials with λ doubled up to `strength`, each time solved to `tolerance`.

    It starts from a λ at which every row is undecided.
    """
    # Z grows in proportion to λ, and its spread with it: log2(spread / SOFT) halvings.
    doublings = int(np.clip(np.ceil(np.log2(max(rows.spread(strength), 1) / SOFT)), 0, 60))
    g = np.zeros(len(prior))
    for left in range(doublings, -1, -1):
        lower = strength / 2**left
        marginal = functools.partial(rows.marginal, strength=lower)
        inverse = None
        rebuild = None
        if newton:
            rebuild = functools.partial(preconditioner, rows, strength=lower)
            inverse = rebuild(g)
        # 100 passes at most: every λ but the last is only a start for the next one.
        g = search(marginal, g, prior, tolerance, 100, inverse, rebuild).potentials
        if left:
            g = g * 2  # potentials are in units of λ
    return g


def first_guess(
    rows: Rows, prior: np.ndarray, strength: float, newton: bool
) -> tuple[np.ndarray, np.ndarray | None, Callable[[np.ndarray], np.ndarray] | None]:
    """Finds potentials from samples: annealed on a small one, Newton's matrix from a larger one.

    Returns:
      (potentials, preconditioner, rebuild), where rebuild(g) is the preconditioner at g. Without
      `newton` the last two are None.
    """
    # To 0.1 only: 16 rows of a cluster say no more than that about all of its rows.
    g = anneal(rows.sample(COARSE * len(prior)), prior, strength, 0.1, False)
    fine = rows.sample(FINE * len(prior))
    if not newton:
        return g, None, None
    rebuild = functools.partial(preconditioner, fine, strength=strength)
    if len(prior) > EAGER:
        return g, None, rebuild
    marginal = functools.partial(fine.marginal, strength=strength)
    found = search(marginal, g, prior, 0.03, 20, rebuild(g))
    return found.potentials, rebuild(found.potentials), rebuild


# ---- Soft codes.


def soft_codes(
    scores: Float[Array | np.ndarray, 'B P'],
    epsilon: float = 0.05,
    iterations: int = 3,
    valid: Bool[Array | np.ndarray, ' B'] | None = None,
) -> Float[Array, 'B P']:
    """Returns SwAV's codes of a batch (Caron et al. 2020). Traced; no gradient.

    Exactly `iterations` times, clusters are scaled to equal mass, then rows to equal mass; three
    are far from convergence on purpose. Sums over rows are over the global batch.

    Args:
      scores: Similarities to the prototypes.
      epsilon: Weight of the entropy; scores are divided by it.
      iterations: Rounds of scaling.
      valid: Rows that count; the codes of others are zero.

    Returns:
      float32, rows summing to 1.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32)) / epsilon
    valid = jnp.ones(len(scores), bool) if valid is None else valid
    # log Q of the transport plan Q = exp(scores / ε), [B P]; rows that do not count have no mass.
    # In logarithms: the maximum is taken out before every exponential, which changes nothing and
    # cannot overflow.
    log_q = jnp.where(valid[:, None], scores, -jnp.inf)
    for _ in range(iterations):
        # Without any valid row all sums are -inf, and -inf - -inf would be NaN.
        log_q = log_q - jnp.where(valid.any(), jax.nn.logsumexp(log_q, 0, keepdims=True), 0)
        row_mass = jax.nn.logsumexp(log_q, -1, keepdims=True)
        # The same trap, of rows: one that does not count is -inf throughout.
        scaled = log_q - jnp.where(valid[:, None], row_mass, 0)
        log_q = jnp.where(valid[:, None], scaled, -jnp.inf)
    return jnp.exp(log_q)


def soft_assignments(logits: np.ndarray, potentials: np.ndarray) -> np.ndarray:
    """Returns softmax(logits + potentials) by rows: the transport plan of a solved problem's rows.

    Args:
      logits: [M P], already scaled by λ; some rows are enough.
      potentials: [P].

    Returns:
      float64 [M P].
    """
    x = np.asarray(logits, np.float64) + potentials
    exponentials = np.exp(x - x.max(-1, keepdims=True))  # [M P]
    return exponentials / exponentials.sum(-1, keepdims=True)
