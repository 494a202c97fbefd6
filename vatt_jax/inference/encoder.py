"""A frozen model as evaluators and users see it: batches in, features out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.models import Encoded, attention
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

MIN_SQUARED_LENGTH = 1e-12  # below it, vectors are not brought to unit length


class Encoder:
    """Jitted evaluation-mode forward pass over a mesh.

    Args:
        config: the run's resolved config (`model`, `compute_dtype` and `augment` are read).
        variables: {'params', 'batch_stats'} of the model, already on the mesh.
        mesh: to run on.
        objective: whose trained heads to apply as well (`Objective.predict`), or None.
        objective_params: its parameters.
        objective_state: its state.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        mesh: Mesh,
        objective: Any = None,
        objective_params: Any = None,
        objective_state: Any = None,
    ) -> None:
        self.config = config
        self.variables = variables
        self.mesh = mesh
        self.objective = objective
        self.heads = (objective_params, objective_state)
        self.model = models.build(attention.portable(config.model), config.compute_dtype)
        self.modalities = tuple(
            modality
            for modality in config.model.towers
            if self.model.has_tower(variables['params'], modality)
        )
        self._forward = jax.jit(
            self._features, static_argnums=3, out_shardings=sharding.replicated(mesh)
        )

    def on(
        self,
        variables: Mapping[str, Any],
        objective_params: Any = None,
        objective_state: Any = None,
    ) -> Encoder:
        """The same programs, compiled once, on other values of the same variables."""
        # A shallow copy shares the jitted function, and so its cache.
        other = copy.copy(self)
        other.variables = variables
        other.heads = (objective_params, objective_state)
        return other

    def _features(
        self,
        variables: Mapping[str, Any],
        heads: tuple[Any, Any],
        batch: Mapping[str, Any],
        maps: tuple[str, ...],
    ) -> dict[str, Any]:
        """The traced part of a call."""
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch,
            self.config.model.inputs,
            self.config.augment,
            rng,
            augment=False,
            dtype=self.config.compute_dtype,
        )
        outputs: Any = self.model.apply(variables, batch, train=False, rng=rng, features=bool(maps))
        predictions = {}
        if self.objective is not None:
            predictions = self.objective.predict(*heads, outputs.encoded)

        unit_vectors: dict[str, Any] = {}
        lengths: dict[str, Any] = {}
        for space, members in outputs.spaces.items():
            lengths[space] = {name: _length(x) for name, x in members.items()}
            unit_vectors[space] = {
                name: x / lengths[space][name][..., None] for name, x in members.items()
            }
        features = {
            'predictions': predictions,
            'pooled': {
                name: stream.pooled.astype(jnp.float32) for name, stream in outputs.encoded.items()
            },
            'spaces': unit_vectors,
            'lengths': lengths,
        }
        if maps:
            features['maps'] = {
                name: coarse(outputs.encoded[name]) for name in maps if name in outputs.encoded
            }
        return features

    def __call__(self, batch: Mapping[str, Any], maps: tuple[str, ...] = ()) -> dict[str, Any]:
        """Compute features of a batch.

        Args:
            batch: this host's rows of a host batch. Streams of a modality without a tower are
                passed over.
            maps: streams whose feature maps to return as well.

        Returns:
            NumPy features of *all* hosts' rows, in global order:

            - 'pooled': {stream: [B D] or [B K D]};
            - 'spaces': {space: {stream: [B E] or [B K E], of unit length}};
            - 'lengths': {space: {stream: [B] or [B K]}} of these before;
            - 'predictions': {name: [B P]};
            - 'maps': {stream: [B F], of unit length} for the streams named in `maps`; see `coarse`.
        """
        batch = {
            name: value
            for name, value in batch.items()
            if not _is_stream(value) or name.split('.')[0] in self.modalities
        }
        with jax.set_mesh(self.mesh):
            features = self._forward(self.variables, self.heads, place(batch, self.mesh), maps)
        return jax.tree.map(np.asarray, jax.device_get(features))


def _length(x: jax.Array) -> jax.Array:
    """Euclidean length over the last axis."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1), MIN_SQUARED_LENGTH))


def coarse(encoded: Encoded) -> jax.Array:
    """The last map of features, at half its resolution, as one vector of unit length.

    It is the maximum over blocks of two along every axis of the map's grid; a last odd row is left
    out, an axis of one stays.

    Returns:
        float32 [B F].

    Raises:
        ConfigError: if the stream's tower makes no map.
    """
    if encoded.tokens is None or not encoded.grid:
        raise ConfigError('feature maps were requested of a stream whose tower makes none')
    batch_size = len(encoded.tokens)
    x = encoded.tokens.astype(jnp.float32).reshape(batch_size, *encoded.grid, -1)
    window = (1, *(min(2, length) for length in encoded.grid), 1)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, 'VALID')
    x = x.reshape(batch_size, -1)  # [B F]
    squared_length = jnp.sum(x * x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared_length, MIN_SQUARED_LENGTH))


def _is_stream(value: Any) -> bool:
    return isinstance(value, Mapping) and 'data' in value


def device_part(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a host batch that go to the device, `position` reduced modulo 2^32."""
    arrays = {name: value for name, value in batch.items() if name != 'position'}
    # int64 on the host; devices have 32 bits.
    position = np.asarray(batch['position'], np.int64)
    arrays['position'] = (position & 0xFFFFFFFF).astype(np.uint32)
    return arrays


def place(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """This host's rows as arrays of the global batch, sharded by rows over the mesh's data axes."""
    row_sharding = sharding.batch_sharding(mesh)

    def to_global(local_rows: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(row_sharding, np.asarray(local_rows))

    return jax.tree.map(to_global, device_part(batch))


def gather_rows(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named host arrays of every host's rows, in global order.

    In a single process these are the local ones.
    """
    local_rows = {name: np.asarray(batch[name]) for name in names}
    if jax.process_count() == 1:
        return local_rows
    from jax.experimental import multihost_utils

    all_rows = multihost_utils.process_allgather(local_rows, tiled=True)
    return {name: np.asarray(value) for name, value in all_rows.items()}


def features_of(
    encoder: Any,
    batches: Iterable[Mapping[str, Any]],
    keep: tuple[str, ...] = (),
    maps: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Compute features of a whole pass, in its order, each example once (checked).

    Padding rows are dropped.

    Args:
        encoder: an Encoder.
        batches: host batches of the pass.
        keep: streams whose data to return as well (single process only: they are for pictures).
        maps: streams whose feature maps to return as well.

    Returns:
        What the encoder returns, and

        - 'index': [N], each example's place in the pass;
        - 'labels': {name: [N …]};
        - 'valid': {stream: bool [N]};
        - 'mask': {text stream: bool [N K]};
        - 'data': {stream: [N …]} for the streams named in `keep`;
        - 'maps': {stream: [N F]} for the streams named in `maps`.

    Raises:
        RuntimeError: when an example came twice, or no batch came at all.
    """
    parts = []
    for batch in batches:
        annotations = _annotations(batch)
        annotations = gather_rows(annotations, tuple(annotations))
        is_real = annotations.pop('valid')  # [B]; False: padding
        part = {'annotations': annotations, **encoder(batch, maps)}
        if keep and jax.process_count() == 1:
            part['data'] = {name: np.asarray(batch[name]['data']) for name in keep if name in batch}
        parts.append(_select_rows(part, is_real))
    if not parts:
        raise RuntimeError('the pass yielded no batch; is the split empty?')

    features = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    order = np.argsort(features['annotations']['index'], kind='stable')
    features = _select_rows(features, order)
    annotations = features.pop('annotations')
    index = annotations.pop('index')
    num_repeated = len(index) - len(np.unique(index))
    if num_repeated:
        raise RuntimeError(f'{num_repeated} examples came more than once in one pass')

    features.update(index=index, labels={}, valid={}, mask={})
    for key, value in annotations.items():
        group, name = key.split('/', 1)
        features[group][name] = value
    return features


def _annotations(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a host batch holds beside data, by flat names."""
    # `position` numbers the pass over all sources; `index` starts anew in each source.
    annotations = {'index': batch['position'], 'valid': batch['valid']}
    for name, value in batch.items():
        if not _is_stream(value):
            continue
        annotations[f'valid/{name}'] = value['valid']
        if 'mask' in value:
            annotations[f'mask/{name}'] = value['mask']
    for name, value in batch.get('labels', {}).items():
        annotations[f'labels/{name}'] = value
    return annotations


def _select_rows(tree: Any, rows: np.ndarray) -> Any:
    """The rows of every array of a tree."""
    return jax.tree.map(lambda array: array[rows], tree)
