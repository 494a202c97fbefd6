"""k-means: Lloyd's iterations from a k-means++ start, deterministic given its key."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.clustering.rows import lay_out, mesh_by_process

# What k-means++ carries: squared distances to the nearest centroid so far [M], the centroids [P D],
# and how many of them are drawn.
_Seeding = tuple[Array, Array, Array | int]


@functools.partial(jax.jit, static_argnames=('clusters', 'iterations'))
def kmeans(
    key: jax.Array,
    x: Float[Array, 'M D'],
    clusters: int,
    iterations: int = 20,
    weight: Float[Array, ' M'] | Bool[Array, ' M'] | None = None,
    numbers: Int[Array, ' M'] | None = None,
) -> tuple[Int[Array, ' M'], Float[Array, 'P D']]:
    """Cluster the rows of a matrix.

    Args:
      key: Of the random start.
      x: Rows to cluster, which may be spread over devices.
      clusters: Number of clusters P.
      iterations: Of Lloyd's algorithm.
      weight: Of each row in the centroids, at least 0; by default 1. Rows of weight 0 are never
        drawn as a start.
      numbers: Of the rows, 0 to M - 1, where they lie in another order than the one in which the
        random start counts them.

    Returns:
      int32 labels and float32 centroids. A cluster that lost all its rows stays at its last
      centroid.
    """
    x = x.astype(jnp.float32)
    if weight is None:
        weight = jnp.ones(len(x))
    else:
        weight = weight.astype(jnp.float32)

    def distances(centroids: Float[Array, 'P D']) -> Float[Array, 'M P']:
        # |x - c|² = |x|² - 2 x·c + |c|². |x|² is the same for all centroids, so it changes no
        # argmin. The default precision of a product on TPU is bfloat16, too coarse for the
        # difference of two large numbers.
        squared_norms = jnp.sum(centroids**2, -1)[None]  # [1 P]
        products = jnp.matmul(x, centroids.T, precision='highest')  # [M P]
        return squared_norms - 2 * products

    def draw_centroid(carry: _Seeding, key: jax.Array) -> tuple[_Seeding, None]:
        # k-means++: the next centroid is a row, drawn in proportion to weight · d², with d its
        # distance to the nearest centroid so far. The first one is drawn by weight alone.
        nearest, centroids, i = carry
        odds = weight * jnp.where(i == 0, 1.0, nearest)
        # The floor leaves a choice where all rows coincide with a centroid. Rows of weight 0, such
        # as padding, are no choice even then.
        can_be_drawn = weight > 0
        log_odds = jnp.log(jnp.maximum(odds, 1e-12))
        log_odds = jnp.where(can_be_drawn, log_odds, -jnp.inf)
        # As jax.random.categorical draws, but for which row has which noise.
        noise = jax.random.gumbel(key, log_odds.shape, log_odds.dtype)
        if numbers is not None:
            noise = noise[numbers]
        pick = jnp.argmax(log_odds + noise)
        # By differences here: the expanded form above can come out negative for nearby rows.
        distance = jnp.sum((x - x[pick]) ** 2, -1)  # [M]
        nearest = jnp.where(i == 0, distance, jnp.minimum(nearest, distance))
        centroids = centroids.at[i].set(x[pick])
        return (nearest, centroids, i + 1), None

    first_key, rest_key = jax.random.split(key)
    start: _Seeding = (jnp.ones(len(x)), jnp.zeros((clusters, x.shape[1])), 0)
    keys = jnp.concatenate([first_key[None], jax.random.split(rest_key, clusters - 1)])  # [P]
    (_, centroids, _), _ = jax.lax.scan(draw_centroid, start, keys)

    def lloyd(centroids: Float[Array, 'P D'], _: None) -> tuple[Float[Array, 'P D'], None]:
        assigned = jnp.argmin(distances(centroids), -1)  # [M]
        # Sums over clusters as a matrix product: with rows spread over devices it becomes one
        # all-reduce of [P D].
        one_hot = jax.nn.one_hot(assigned, clusters) * weight[:, None]  # [M P]
        count = one_hot.sum(0)[:, None]  # [P 1]
        sums = jnp.matmul(one_hot.T, x, precision='highest')  # [P D]
        # Both branches of a `where` are computed: the inner one avoids 0 / 0.
        mean = sums / jnp.where(count > 0, count, 1)
        return jnp.where(count > 0, mean, centroids), None

    centroids, _ = jax.lax.scan(lloyd, centroids, None, length=iterations)
    # Once more, so that the labels are those of the centroids returned.
    labels = jnp.argmin(distances(centroids), -1).astype(jnp.int32)
    return labels, centroids


def cluster_rows(
    key: jax.Array, x: Float[np.ndarray, 'n D'], clusters: int, iterations: int, mesh: Mesh
) -> Int[np.ndarray, ' n']:
    """Cluster the rows of all hosts, with the work spread over all devices of a mesh.

    Args:
      key: Of the random start, the same on every host.
      x: This host's rows; the rows of all hosts, one host after another, are clustered.
      clusters: Number of clusters P.
      iterations: Of Lloyd's algorithm.
      mesh: The devices; rows are split over all of its axes, and stay on their host.

    Returns:
      int32 labels of this host's rows.
    """
    layout = lay_out(len(x), mesh_by_process(mesh))
    # Rows split evenly only with padding. Its weight is 0, so it moves no centroid.
    rows = layout.place(x.astype(np.float32, copy=False))
    weight = layout.place(np.ones(len(x), np.float32))
    numbers = None
    # Those of a single host lie in their order, but for padding behind them.
    if len(layout.lengths) > 1:
        own = layout.own
        numbers = layout.place(np.arange(own.start, own.stop, dtype=np.int32))
    run = _compiled(clusters, iterations, layout.sharding)
    return layout.fetch(run(key, rows, weight, numbers))


# Cached because `jax.jit` of a new function compiles anew at each call.
@functools.cache
def _compiled(clusters: int, iterations: int, by_rows: NamedSharding) -> Callable[..., jax.Array]:
    """The labels of `kmeans` as a compiled function of key, rows, weight and numbers."""

    def labels(
        key: jax.Array, x: jax.Array, weight: jax.Array, numbers: jax.Array | None
    ) -> jax.Array:
        return kmeans(key, x, clusters, iterations, weight, numbers)[0]

    return jax.jit(labels, out_shardings=by_rows)
