"""Labels by optimal transport: M samples to P clusters of prescribed sizes, from logits or from features and head weights.

The problem (Asano et al. 2019, "Self-labelling", section 3.2): minimise the mean cross entropy of the labels under the model, subject
to the share prior[k] for cluster k, relaxed by an entropy of weight 1/λ. With Z = λ · mean over views of their logits, the solution is
softmax(Z + g) by rows, where the P potentials g make its column means equal the prior; the label of a row is argmax(Z + g). Constants
of a row change nothing, so logits need no log-softmax.

Only g is unknown. One *pass* reads the rows once, in blocks that stay in cache, and returns the column means c(g) of softmax(Z + g).
Plain Sinkhorn is g += log(prior / c(g)). It is accelerated twice, on the host, in float64, on vectors of length P:

- Preconditioning. Around the solution, log c moves by (I - A) dg with A = diag(1/c) · mean of s sᵀ over rows s of the softmax, so
  (I - A)⁻¹ log(prior / c) is Newton's step. A is summed over a *sample* of rows only, near the solution that this sample gives.
- Anderson mixing over the last steps takes care of what A misses. A step that fails falls back to plain Sinkhorn, which cannot.

Large λ (or confident rows) make plain Sinkhorn slow in proportion to λ, so the first potentials are found on a small sample with λ
doubled from a small value up. All sums over rows are all-reduced, so nothing depends on how rows are spread over devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

PUBLISHED = (
    0.1  # the published loop stops when sum over samples of |beta / beta' - 1| falls below this
)
COARSE, FINE = 16, 64  # rows per cluster of the two samples
SOFT = 10.0  # nats between a row's best and mean cluster at which annealing starts
EAGER = 512  # up to as many clusters Newton's matrix is also built for the guess; on a CPU it costs P / 50 passes over its rows
NEAR = 1e-2  # residual at which the matrix is built where it will be used
DAMPING = 0.5  # of Newton's matrix, in units of P / rows it was summed over
HALVINGS = 12  # of a step that failed, before it is given up
MEMORY = 10  # steps that Anderson mixing looks back on
LONGEST = 8.0  # nats: longest accelerated step of one potential
LOST = 1e-3  # a search that ends above this has lost its way: all rows are annealed
PATIENCE = (
    60  # passes without a tenth of progress after which float precision is taken to be reached
)


@dataclasses.dataclass
class Solution:
    """What `solve` found.

    potentials: float64 [P], weighted mean zero under the prior. labels: int32 [M]. cost: mean over samples and views of -log p(label).
    residual: sum over clusters of |column mean - prior|. published_error: the published loop's error at these potentials (a sum over
    samples). passes: full passes over the rows. work: rows read, those of samples included, over M. converged: False when float precision
    or max_passes ended the search; the potentials are then the best seen. preconditioner: [P P], for the next, similar problem.
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
    """Labels of M samples.

    views: one array per view (modality), logits [M P], or features [M D] when `heads` gives each view's (kernel [D P], bias [P]): M × P
    is then never stored. A view may also be a list of arrays, blocks of rows (all views cut alike): blocks on the host are sent to
    the devices one by one in each pass.
    prior: share of each cluster [P], positive, summing to 1. strength: λ.
    tolerance: on `residual`; or 'published', small enough (0.1 / M) that the published loop would stop, its error being at most M · residual.
    method: 'newton' (both accelerations), 'anderson' (no preconditioner), 'plain' (Sinkhorn as published).
    dtype: of the passes; float64 works whatever jax_enable_x64 says. mesh: rows are spread over all its devices (default: one device).
    Raises ValueError, in a sentence, for a prior with empty clusters or logits that are not finite.
    """
    prior = check_prior(prior)
    if method not in STEPS:
        raise ValueError(f'method={method!r}: choose one of {", ".join(STEPS)}')
    if not strength > 0 or not np.isfinite(strength):
        raise ValueError(f'strength={strength}: a positive, finite λ is wanted')
    with jax.enable_x64(dtype == 'float64'):
        rows = Rows(views, heads, len(prior), dtype, mesh)
        limit = PUBLISHED / rows.count if tolerance == 'published' else float(tolerance)
        g, inverse, rebuild = np.zeros(len(prior)), None, None
        if start is not None:
            g = np.asarray(start.potentials, np.float64)
            inverse = start.preconditioner if method == 'newton' else None
        elif method != 'plain':
            g, inverse, rebuild = first_guess(rows, prior, strength, method == 'newton')
        whole = lambda g: rows.marginal(g, strength)
        found = search(whole, g, prior, limit, max_passes, inverse, rebuild, STEPS[method])
        if (
            method != 'plain'
            and found.residual > max(limit, LOST)
            and len(found.history) < max_passes
        ):
            g = anneal(rows, prior, strength, LOST, method == 'newton')
            again = search(whole, g, prior, limit, max_passes, None, rebuild)
            again.history[:0] = found.history
            found = min(again, found, key=lambda f: f.residual)
        labels, cost, error = rows.label(found.potentials, found.marginal, prior, strength)
    return Solution(
        found.potentials,
        labels,
        cost,
        found.residual,
        error,
        len(found.history),
        rows.read / rows.count,
        found.residual <= limit,
        found.inverse,
        found.history,
    )


def shares(
    views: Sequence[Any],
    strength: float,
    *,
    heads: Sequence[tuple[Any, Any]] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """float64 [P]: share of each cluster without any prior, the column means of softmax(Z). Arguments as for `solve`."""
    clusters = (
        heads[0][0].shape[1]
        if heads is not None
        else (views[0][0] if isinstance(views[0], (list, tuple)) else views[0]).shape[1]
    )
    return Rows(views, heads, clusters, 'float32', mesh).marginal(np.zeros(clusters), strength)


def check_prior(prior) -> np.ndarray:
    """float64 [P], positive and summing to 1; ValueError in a sentence otherwise."""
    prior = np.asarray(prior, np.float64)
    if prior.ndim != 1 or len(prior) < 2:
        raise ValueError(
            f'prior has shape {prior.shape}; a vector with the share of each of at least 2 clusters is wanted'
        )
    bad = np.flatnonzero(~(prior > 0) | ~np.isfinite(prior))
    if len(bad):
        raise ValueError(
            f'prior[{bad[0]}]={prior[bad[0]]} ({len(bad)} such of {len(prior)}): every cluster needs a positive share; leave '
            'empty clusters out, or give them a small one'
        )
    if abs(prior.sum() - 1) > 1e-5:
        raise ValueError(
            f'prior sums to {prior.sum():.6g}; shares that sum to 1 are wanted (divide by the sum)'
        )
    return prior / prior.sum()


# ---- the rows: everything that touches devices


class Rows:
    """The samples, placed once (arrays) or block by block in each pass (lists of blocks). count: M. read: rows read so far, by samples of these
    rows too."""

    def __init__(self, views, heads, clusters: int, dtype: str, mesh: Mesh | None):
        self.dtype, self.clusters, self._read = jnp.dtype(dtype), clusters, [0]
        self.mesh = (
            Mesh(np.array(jax.devices()[:1]), ('rows',))
            if mesh is None
            else Mesh(mesh.devices, mesh.axis_names)
        )
        self.sharding = NamedSharding(self.mesh, Spec(self.mesh.axis_names))
        self.whole = NamedSharding(self.mesh, Spec())
        views = tuple(views)
        self.streamed = isinstance(views[0], (list, tuple))
        blocks = list(zip(*views, strict=True)) if self.streamed else [views]
        for block in blocks:
            for x in block:
                if (
                    x.ndim != 2
                    or len(x) != len(block[0])
                    or (heads is None and x.shape[1] != clusters)
                ):
                    raise ValueError(
                        f'a view has shape {tuple(x.shape)}; [{len(block[0])} {"D" if heads else clusters}] is wanted'
                    )
        self.blocks = blocks if self.streamed else [self.place(b) for b in blocks]
        self.lengths = [len(b[0]) for b in blocks]
        self.count = sum(self.lengths)
        self.heads = (
            None
            if heads is None
            else tuple(
                (
                    jax.device_put(jnp.asarray(k, self.dtype), self.whole),
                    jax.device_put(jnp.asarray(b, self.dtype), self.whole),
                )
                for k, b in heads
            )
        )

    @property
    def read(self) -> int:
        return self._read[0]

    def place(self, block) -> tuple[jax.Array, ...]:
        """Rows over all devices, padded to a multiple of their number."""
        pad = -len(block[0]) % self.mesh.size

        def one(x):
            if (
                isinstance(x, jax.Array)
                and x.dtype == self.dtype
                and not pad
                and x.sharding.is_equivalent_to(self.sharding, x.ndim)
            ):
                return x
            x = np.asarray(x, self.dtype)
            if pad:
                x = np.concatenate([x, np.zeros((pad, x.shape[1]), x.dtype)])
            return jax.make_array_from_callback(x.shape, self.sharding, lambda index: x[index])

        return tuple(one(x) for x in block)

    def sample(self, size: int) -> Rows:
        """`size` rows drawn without regard to their order (the same ones on any mesh), or all rows if there are no more."""
        if size >= self.count:
            return self
        chosen = np.sort(np.random.default_rng(0).choice(self.count, size, replace=False))
        parts, first = [], 0
        for block, length in zip(self.blocks, self.lengths):
            index = chosen[(chosen >= first) & (chosen < first + length)] - first
            take = lambda x, i=index: np.asarray(
                x[i]
                if isinstance(x, np.ndarray)
                else jax.jit(lambda x, i: x[i], out_shardings=self.whole)(x, i)
            )
            parts.append([take(x) for x in block])
            first += length
        out = object.__new__(Rows)
        out.__dict__.update(self.__dict__)
        out.streamed, out.count, out.lengths = False, size, [size]
        out.blocks = [out.place([np.concatenate(p) for p in zip(*parts)])]
        return out

    def sweep(self, want: str, g: np.ndarray, strength: float, ratio: np.ndarray | None = None):
        """Results of `_sweep` over all blocks. g is split so that float32 passes still feel changes of g below its own resolution."""
        coarse = g.astype(self.dtype)
        vectors = jnp.asarray(
            np.stack([coarse, np.exp(g - coarse), np.ones(len(g)) if ratio is None else ratio]),
            self.dtype,
        )
        self._read[0] += self.count
        for block, length in zip(self.blocks, self.lengths):
            block = self.place(block) if self.streamed else block
            scale = jnp.asarray(strength / len(block), self.dtype)
            yield _sweep(
                block,
                self.heads,
                vectors,
                scale,
                np.int32(length),
                want=want,
                mesh=self.mesh,
                chunk=chunk_rows(self.clusters),
            )

    def marginal(self, g: np.ndarray, strength: float) -> np.ndarray:
        """float64 [P]: column means c(g)."""
        total = sum(
            np.asarray(hi, np.float64) + np.asarray(lo, np.float64)
            for hi, lo in self.sweep('marginal', g, strength)
        )
        return must_be_finite(total) / total.sum()

    def coupling(self, g: np.ndarray, strength: float) -> np.ndarray:
        """float64 [P P]: mean of s sᵀ over the rows s of softmax(Z + g)."""
        return (
            sum(np.asarray(x, np.float64) for x in self.sweep('coupling', g, strength)) / self.count
        )

    def spread(self, strength: float) -> float:
        """Mean over rows of max Z - mean Z, in nats."""
        return (
            float(
                must_be_finite(
                    sum(
                        np.float64(x)
                        for x in self.sweep('spread', np.zeros(self.clusters), strength)
                    )
                )
            )
            / self.count
        )

    def label(
        self, g: np.ndarray, marginal: np.ndarray, prior: np.ndarray, strength: float
    ) -> tuple[np.ndarray, float, float]:
        """(labels [M], mean cost, published error) at g, whose column means are `marginal`."""
        parts = list(
            self.sweep('label', g, strength, np.minimum(prior / np.maximum(marginal, 1e-30), 1e30))
        )
        labels = np.concatenate([np.asarray(p[0])[:n] for p, n in zip(parts, self.lengths)])
        return (
            labels,
            float(sum(np.float64(p[1]) for p in parts)) / self.count,
            float(sum(np.float64(p[2]) for p in parts)),
        )


def must_be_finite(x):
    if not np.isfinite(x).all():
        raise ValueError(
            'logits or features hold NaN or +inf (or a row of -inf only); labels need finite values'
        )
    return x


def chunk_rows(clusters: int) -> int:
    """Rows of one step of a pass: about 1 MB of float32 on a CPU (its cache), 32 MB on an accelerator."""
    return max(8, (1 << (18 if jax.default_backend() == 'cpu' else 23)) // clusters)


def combined(pieces, heads) -> jax.Array:
    """[rows P]: sum over views of their logits."""
    if heads is None:
        return sum(pieces)
    return sum(jnp.matmul(x, k, precision='highest') + b for x, (k, b) in zip(pieces, heads))


@functools.partial(jax.jit, static_argnames=('want', 'mesh', 'chunk'))
def _sweep(block, heads, vectors, scale, count, *, want: str, mesh: Mesh, chunk: int):
    """One pass over a block of rows. vectors: [3 P], g, factor for what g's rounding lost, prior / c.

    want 'marginal': column sums [P] as an unevaluated sum (hi, lo). 'coupling': sum of s sᵀ [P P]. 'label': (labels [rows], sum of costs,
    sum over rows of |Σ_k s_k prior_k / c_k - 1|, which is |beta / beta' - 1| of the published loop).
    """
    axes = mesh.axis_names
    g, fine, ratio = vectors

    def local(block, heads):
        rows, clusters = len(block[0]), len(g)
        size = min(chunk, rows)
        offset = jax.lax.axis_index(axes) * rows

        def softmax(i):
            # The last chunk starts early enough to be whole; rows already seen, and padding, weigh nothing.
            first = jnp.minimum(i * size, rows - size)
            pieces = [jax.lax.dynamic_slice_in_dim(x, first, size) for x in block]
            row = first + jnp.arange(size)
            weight = ((row >= i * size) & (offset + row < count)).astype(g.dtype)
            x = scale * combined(pieces, heads) + g
            e = jnp.exp(x - x.max(-1, keepdims=True)) * fine
            return first, pieces, weight, e, 1 / e.sum(-1)

        def marginal(i, carry):
            hi, lo = carry
            _, _, weight, e, scaled = softmax(i)
            part = jnp.matmul(weight * scaled, e, precision='highest')
            new = hi + part
            back = new - hi
            return new, lo + ((hi - (new - back)) + (part - back))

        def coupling(i, carry):
            _, _, weight, e, scaled = softmax(i)
            s = e * (scaled * weight)[:, None]
            return carry + jnp.matmul(s.T, s, precision='highest')

        def label(i, carry):
            labels, cost, error = carry
            first, pieces, weight, e, scaled = softmax(i)
            # The first index of the maximum; argmax itself is twice as slow on CPUs.
            name = jnp.min(
                jnp.where(e == e.max(-1, keepdims=True), jnp.arange(clusters), clusters), -1
            )
            hit = jax.nn.one_hot(name, clusters, dtype=bool)
            cross = lambda z: jax.nn.logsumexp(z, -1) - jnp.where(hit, z, 0).sum(-1)
            each = [
                cross(combined([x], None if heads is None else [h]))
                for x, h in zip(pieces, heads or [None] * len(pieces))
            ]
            cost = cost + jnp.sum(weight * sum(each)) / len(each)
            error = error + jnp.sum(
                weight * jnp.abs(scaled * jnp.matmul(e, ratio, precision='highest') - 1)
            )
            return (
                jax.lax.dynamic_update_slice(labels, name.astype(jnp.int32), (first,)),
                cost,
                error,
            )

        def spread(i, carry):
            _, pieces, weight, _, _ = softmax(i)
            z = scale * combined(pieces, heads)
            finite = jnp.isfinite(z)
            mean = jnp.where(finite, z, 0).sum(-1) / finite.sum(-1)
            return carry + jnp.sum(weight * (z.max(-1) - mean))

        zero = lambda *shape: jnp.zeros(shape, g.dtype)
        body, carry = {
            'marginal': (marginal, (zero(clusters), zero(clusters))),
            'coupling': (coupling, zero(clusters, clusters)),
            'spread': (spread, zero()),
            'label': (label, (jnp.zeros(rows, jnp.int32), zero(), zero())),
        }[want]
        out = jax.lax.fori_loop(0, -(-rows // size), body, carry)
        if want == 'label':
            return out[0], *(jax.lax.psum(x, axes) for x in out[1:])
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), out)

    by_rows = Spec(axes)
    outputs = (by_rows, Spec(), Spec()) if want == 'label' else Spec()
    out = jax.shard_map(
        local, mesh=mesh, in_specs=(by_rows, Spec()), out_specs=outputs, check_vma=False
    )(block, heads)
    replicate = NamedSharding(mesh, Spec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicate), out)


# ---- the search: float64 vectors of length P on the host


@dataclasses.dataclass
class Found:
    potentials: np.ndarray
    marginal: np.ndarray
    residual: float
    inverse: np.ndarray | None
    history: list[float]


# method -> how many past steps a step may look back on
STEPS = {'newton': MEMORY, 'anderson': MEMORY, 'plain': 0}


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
    """Potentials whose column means are the prior to within `limit` (sum of absolute differences), or the best of max_passes.

    inverse: (I - A)⁻¹ or None. rebuild: makes a better one, once, when near the solution. memory 0: plain Sinkhorn.
    """
    weight, log_prior = np.sqrt(prior), np.log(prior)
    best, best_c, best_residual, history = g, prior, np.inf, []
    past: list[tuple[np.ndarray, np.ndarray]] = []  # (g, step) of the points since the last restart
    since = failures = halved = 0
    plain_step = lambda c: log_prior - np.log(np.maximum(c, 1e-300))
    while len(history) < max_passes:
        c = marginal(g)
        residual = float(np.abs(c - prior).sum())
        history.append(residual)
        since = 0 if residual < 0.9 * best_residual else since + 1
        if residual < best_residual:
            best, best_c, best_residual = g, c, residual
        if best_residual <= limit or (memory and since > PATIENCE):
            break
        plain = plain_step(c)
        if not memory:
            g = g + plain
            continue
        if residual > 2 * best_residual:
            if failures and halved < HALVINGS:
                # Not the first that fails: rows are nearly decided, so the way is right and its length is not.
                halved, g = halved + 1, (g + best) / 2
                continue
            # Back to the best point and a plain step from there; a preconditioner that misleads three times is dropped.
            failures, halved = failures + 1, 0
            inverse = inverse if failures < 3 else None
            past = []
            g = best + np.clip(plain_step(best_c), -LONGEST, LONGEST)
            continue
        halved = 0
        if rebuild is not None and residual < NEAR:
            inverse, rebuild, past = rebuild(g), None, []
        step = plain if inverse is None else inverse @ plain
        past = [*past, (g, step)][-(memory + 1) :]
        g = g + np.clip(mixed(past, weight), -LONGEST, LONGEST)
        g = g - prior @ g
    return Found(best, best_c, best_residual, inverse, history)


def mixed(past, weight: np.ndarray) -> np.ndarray:
    """Anderson's step (type II): the combination of past points at which the steps, were they linear, would cancel best."""
    points, steps = np.array([p for p, _ in past]), np.array([s for _, s in past])
    if len(past) < 2:
        return steps[-1]
    dp, ds = np.diff(points, axis=0), np.diff(steps, axis=0)
    mix = np.linalg.lstsq((ds * weight).T, steps[-1] * weight, rcond=1e-8)[0]
    return steps[-1] - mix @ (dp + ds)


def preconditioner(rows: Rows, g: np.ndarray, strength: float) -> np.ndarray:
    """(I - A)⁻¹ [P P] at g, without its null direction (a constant added to all potentials).

    The damping is of the order of the noise of a mean over M / P rows for each cluster: slow directions are trusted no further.
    """
    coupling = rows.coupling(g, strength)
    mass = coupling.sum(1)
    root = np.sqrt(np.maximum(mass, 1e-12 * mass.max()))
    # The eigenvalue 1 of the symmetric form belongs to `root`; moved to 0, the matrix below is positive definite.
    unit = root / np.linalg.norm(root)
    damping = DAMPING * len(mass) / rows.count
    symmetric = (
        (1 + damping) * np.eye(len(mass)) - coupling / root[:, None] / root + np.outer(unit, unit)
    )
    return np.linalg.inv(symmetric) / root[:, None] * root


def anneal(
    rows: Rows, prior: np.ndarray, strength: float, tolerance: float, newton: bool
) -> np.ndarray:
    """Potentials found with λ doubled up to `strength`, each time solved to `tolerance`, from a λ at which every row is undecided."""
    doublings = int(np.clip(np.ceil(np.log2(max(rows.spread(strength), 1) / SOFT)), 0, 60))
    g = np.zeros(len(prior))
    for left in range(doublings, -1, -1):
        here = strength / 2**left
        build = lambda g, here=here: preconditioner(rows, g, here)
        g = search(
            lambda g, here=here: rows.marginal(g, here),
            g,
            prior,
            tolerance,
            100,
            *((build(g), build) if newton else ()),
        ).potentials
        g = g * (2 if left else 1)
    return g


def first_guess(rows: Rows, prior: np.ndarray, strength: float, newton: bool):
    """(potentials, preconditioner, rebuild) from samples: annealed on a small one, Newton's matrix from a larger one.

    rebuild(g) is that matrix's preconditioner at g. Without `newton` the last two are None.
    """
    g = anneal(rows.sample(COARSE * len(prior)), prior, strength, 0.1, False)
    fine = rows.sample(FINE * len(prior))
    build = lambda g: preconditioner(fine, g, strength)
    if not newton or len(prior) > EAGER:
        return g, None, build if newton else None
    found = search(lambda g: fine.marginal(g, strength), g, prior, 0.03, 20, build(g))
    return found.potentials, build(found.potentials), build


# ---- soft codes


def soft_codes(
    scores: jax.Array, epsilon: float = 0.05, iterations: int = 3, valid: jax.Array | None = None
) -> jax.Array:
    """float32 [B P]: SwAV's codes of a batch, rows summing to 1 (Caron et al. 2020, section 3.1). Traced; no gradient.

    scores [B P]: similarities to the prototypes. Exactly `iterations` times: clusters scaled to equal mass, then rows to equal mass;
    three are far from convergence on purpose. Sums over rows are over the global batch. valid bool [B]: rows that count; the codes of
    others are zero. The maximum is taken out before the exponential, which changes nothing and cannot overflow.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32)) / epsilon
    alive = jnp.ones(len(scores), bool) if valid is None else valid
    log_q = jnp.where(alive[:, None], scores, -jnp.inf)
    rows = lambda x: jax.nn.logsumexp(x, -1, keepdims=True)
    for _ in range(iterations):
        log_q = log_q - jnp.where(alive.any(), jax.nn.logsumexp(log_q, 0, keepdims=True), 0)
        log_q = jnp.where(
            alive[:, None], log_q - jnp.where(alive[:, None], rows(log_q), 0), -jnp.inf
        )
    return jnp.exp(log_q)


def soft_assignments(logits: np.ndarray, potentials: np.ndarray) -> np.ndarray:
    """softmax(logits + potentials) by rows [m P], float64: the transport plan of some rows of a solved problem; logits already scaled by λ."""
    x = np.asarray(logits, np.float64) + potentials
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
