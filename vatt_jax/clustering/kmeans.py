"""k-means (Lloyd's iterations from a k-means++ start), deterministic from its key."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec


@functools.partial(jax.jit, static_argnames=('clusters', 'iterations'))
def kmeans(
    key: jax.Array,
    x: jax.Array,
    clusters: int,
    iterations: int = 20,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(labels int32 [M], centroids float32 [P D]) of x [M D], which may be spread over devices by rows. weight [M] >= 0 (None: ones): of
    each row in the centroids; rows of weight 0 are never drawn as a start. An emptied cluster keeps its last centroid."""
    x = x.astype(jnp.float32)
    weight = jnp.ones(len(x)) if weight is None else weight.astype(jnp.float32)

    def distances(centroids):  # [M P], up to the constant |x|^2
        return jnp.sum(centroids**2, -1)[None] - 2 * jnp.matmul(x, centroids.T, precision='highest')

    def seed(
        carry, key
    ):  # the next centroid is drawn in proportion to the squared distance to those drawn so far
        nearest, centroids, i = carry
        odds = weight * jnp.where(i == 0, 1.0, nearest)
        pick = jax.random.categorical(
            key, jnp.where(weight > 0, jnp.log(jnp.maximum(odds, 1e-12)), -jnp.inf)
        )
        distance = jnp.sum((x - x[pick]) ** 2, -1)
        return (
            jnp.where(i == 0, distance, jnp.minimum(nearest, distance)),
            centroids.at[i].set(x[pick]),
            i + 1,
        ), None

    first, rest = jax.random.split(key)
    (_, centroids, _), _ = jax.lax.scan(
        seed,
        (jnp.ones(len(x)), jnp.zeros((clusters, x.shape[1])), 0),
        jnp.concatenate([first[None], jax.random.split(rest, clusters - 1)]),
    )

    def lloyd(centroids, _):
        one_hot = jax.nn.one_hot(jnp.argmin(distances(centroids), -1), clusters) * weight[:, None]
        count = one_hot.sum(0)[:, None]
        mean = jnp.matmul(one_hot.T, x, precision='highest') / jnp.where(count > 0, count, 1)
        return jnp.where(count > 0, mean, centroids), None

    centroids, _ = jax.lax.scan(lloyd, centroids, None, length=iterations)
    return jnp.argmin(distances(centroids), -1).astype(jnp.int32), centroids


def labels_of(
    key: jax.Array, x: np.ndarray, clusters: int, iterations: int, mesh: Mesh
) -> np.ndarray:
    """int32 [M]: k-means of host rows x [M D] that every host holds, the work spread over all devices of the mesh."""
    pad = -len(x) % mesh.size
    rows = NamedSharding(mesh, Spec(mesh.axis_names))
    place = lambda a: jax.make_array_from_callback(a.shape, rows, lambda index: a[index])
    weight = place(np.pad(np.ones(len(x), np.float32), (0, pad)))
    labels = _spread(clusters, iterations, mesh)(
        key, place(np.pad(x.astype(np.float32), ((0, pad), (0, 0)))), weight
    )
    return np.asarray(labels)[: len(x)]


@functools.cache
def _spread(clusters: int, iterations: int, mesh: Mesh):
    return jax.jit(
        lambda key, x, weight: kmeans(key, x, clusters, iterations, weight)[0],
        out_shardings=NamedSharding(mesh, Spec()),
    )
