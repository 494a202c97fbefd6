"""k-means (Lloyd's iterations from a k-means++ start), deterministic from its key."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=('clusters', 'iterations'))
def kmeans(key: jax.Array, x: jax.Array, clusters: int, iterations: int = 20) -> tuple[jax.Array, jax.Array]:
    """(labels int32 [M], centroids float32 [P D]) of x [M D]. An emptied cluster keeps its last centroid."""
    x = x.astype(jnp.float32)

    def distances(centroids):  # [M P], up to the constant |x|^2
        return jnp.sum(centroids ** 2, -1)[None] - 2 * jnp.matmul(x, centroids.T, precision='highest')

    def seed(carry, key):  # the next centroid is drawn in proportion to the squared distance to those drawn so far
        nearest, centroids, i = carry
        pick = jax.random.categorical(key, jnp.log(jnp.maximum(nearest, 1e-12)))
        distance = jnp.sum((x - x[pick]) ** 2, -1)
        return (jnp.where(i == 0, distance, jnp.minimum(nearest, distance)), centroids.at[i].set(x[pick]), i + 1), None
    start = (jnp.ones(len(x)), jnp.zeros((clusters, x.shape[1])), 0)  # ones: the first is drawn uniformly
    first, rest = jax.random.split(key)
    (_, centroids, _), _ = jax.lax.scan(seed, start, jnp.concatenate([first[None], jax.random.split(rest, clusters - 1)]))

    def lloyd(centroids, _):
        one_hot = jax.nn.one_hot(jnp.argmin(distances(centroids), -1), clusters)
        count = one_hot.sum(0)[:, None]
        mean = jnp.matmul(one_hot.T, x, precision='highest') / jnp.maximum(count, 1)
        return jnp.where(count > 0, mean, centroids), None
    centroids, _ = jax.lax.scan(lloyd, centroids, None, length=iterations)
    return jnp.argmin(distances(centroids), -1).astype(jnp.int32), centroids
