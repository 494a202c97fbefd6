"""Nearest neighbours of unit embeddings: exact (scikit-learn) or approximate (USearch)."""

from __future__ import annotations

import os
import pathlib

import numpy as np
from jaxtyping import Float, Int

from vatt_jax import extras


class Exact:
    """Compares a query with every row.

    Args:
        vectors: unit embeddings.
    """

    def __init__(self, vectors: Float[np.ndarray, 'N E']):
        from sklearn.neighbors import NearestNeighbors

        # Of the kinds of scikit-learn, brute force is the fastest in more than a few dimensions.
        self._tree = NearestNeighbors(metric='cosine', algorithm='brute').fit(vectors)
        self._num_rows = len(vectors)

    def find(
        self, query: Float[np.ndarray, ' E'], count: int
    ) -> tuple[Int[np.ndarray, ' K'], Float[np.ndarray, ' K']]:
        """(rows, cosine similarities) of the nearest, best first; fewer where there are fewer."""
        distances, rows = self._tree.kneighbors(query[None], min(count, self._num_rows))
        return rows[0], (1 - distances[0]).astype(np.float32)


class Approximate:
    """A graph of neighbours (HNSW): misses a few, and does not slow down with the number of rows.

    Args:
        vectors: unit embeddings.
        path: where the graph is kept; read if it is there. None keeps none.

    Raises:
        MissingExtra: USearch is not installed.
    """

    def __init__(self, vectors: Float[np.ndarray, 'N E'], path: pathlib.Path | None = None):
        with extras.needed('search', '--approximate'):
            from usearch.index import Index

        self._graph = Index(ndim=vectors.shape[1], metric='cos', dtype='f32')
        if path is not None and path.exists():
            self._graph.load(os.fspath(path))
            return
        self._graph.add(np.arange(len(vectors), dtype=np.uint64), vectors)
        if path is not None:
            # Whole or not at all, as a kill may come at any time.
            temporary = path.with_name(path.name + '.tmp')
            self._graph.save(os.fspath(temporary))
            os.replace(temporary, path)

    def find(
        self, query: Float[np.ndarray, ' E'], count: int
    ) -> tuple[Int[np.ndarray, ' K'], Float[np.ndarray, ' K']]:
        """(rows, cosine similarities) of the nearest, best first; fewer where there are fewer."""
        matches = self._graph.search(query, min(count, len(self._graph)))
        scores = (1 - matches.distances).astype(np.float32)
        return matches.keys.astype(np.int64), scores
