"""A frozen model as evaluators and users see it: batches in, features out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.inputs.batch import (
    device_part,
    gather_rows,
    is_stream,
    modality_of,
    place_on_mesh,
    stream_names,
)
from vatt_jax.models import attention
from vatt_jax.models.pooling import max_to_width
from vatt_jax.models.towers import stages as tower_stages
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

__all__ = [
    'FeatureExtractor',
    'Stage',
    'coarse',
    'device_part',
    'compute_features',
    'gather_rows',
    'place_on_mesh',
]


class Stage(NamedTuple):
    """The features after a stage of a tower, as a vector (pooling.max_to_width).

    Attributes:
        stream: whose tower.
        number: of the stage, from 1.
        width: of the vector, at most.
    """

    stream: str
    number: int
    width: int

    @property
    def name(self) -> str:
        """Under which its features are returned."""
        return f'{self.stream}/stage_{self.number}'


class FeatureExtractor:
    """Jitted evaluation-mode forward pass over a mesh.

    Args:
        config: the run's resolved config (`model`, `compute_dtype`, `augment` are read).
        variables: {'params', 'batch_stats'} of the model, already on the mesh.
        mesh: the devices it runs on.
        objective: whose trained heads to apply as well (`Objective.predict`).
        objective_params: parameters of these heads.
        objective_state: state of the objective.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        mesh: Mesh,
        objective: Any = None,
        objective_params: Any = None,
        objective_state: Any = None,
    ):
        self.config, self.variables, self.mesh = config, variables, mesh
        self.objective, self.heads = objective, (objective_params, objective_state)
        # A run trained with another platform's attention kernel is evaluated with this one's.
        self.model = models.build(attention.portable(config.model), config.compute_dtype)
        # Towers that the objective never read have no parameters and cannot encode.
        params = variables['params']
        self.modalities = tuple(m for m in config.model.towers if self.model.has_tower(params, m))
        # Replicated results: every host can read all rows, whichever devices computed them. `maps`
        # and `stages` are static since they decide what the program returns.
        self._forward = jax.jit(
            self._features, static_argnums=(3, 4), out_shardings=sharding.replicated(mesh)
        )

    def on(
        self,
        variables: Mapping[str, Any],
        objective_params: Any = None,
        objective_state: Any = None,
    ) -> FeatureExtractor:
        """The same programs, compiled once, on other values of the same variables."""
        # The copy shares `_forward`, whose cache of compiled programs is keyed by shapes, not
        # values.
        other = copy.copy(self)
        other.variables, other.heads = variables, (objective_params, objective_state)
        return other

    def _features(
        self,
        variables: Any,
        heads: tuple[Any, Any],
        batch: Any,
        maps: tuple[str, ...],
        stages: tuple[Stage, ...],
    ) -> dict[str, Any]:
        """The traced forward pass; see `__call__`."""
        # Nothing is drawn in evaluation mode, but modules take an Rng.
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch,
            self.config.model.inputs,
            self.config.augment,
            rng,
            augment=False,
            dtype=self.config.compute_dtype,
        )
        # Words, say, that the objective alone reads.
        own = self._own_streams()
        read = {name: value for name, value in batch.items() if name not in own}
        # Tokens are made for feature maps alone; otherwise the last layer computes one token.
        needs_maps = bool(maps)
        if self.objective is not None:
            needs_maps |= bool(self.objective.map_streams())
        out: Any
        out, _ = self.model.apply(
            variables,
            read,
            train=False,
            rng=rng,
            features=needs_maps,
            # Stages are sown only where their collection is mutable.
            mutable=[tower_stages.COLLECTION] if stages else [],
        )
        features: dict[str, Any] = {
            'predictions': {},
            # [B D] or [B K D], float32 whatever the towers compute in
            'pooled': {s: e.pooled.astype(jnp.float32) for s, e in out.encoded.items()},
            'spaces': {},
            'lengths': {},
        }
        spaces = out.spaces
        if self.objective is not None:
            params, state = heads
            params = self.objective.with_model(params, variables['params'])
            features['predictions'] = {
                **self.objective.predict(params, state, out.encoded),
                **self.objective.predict_batch(params, state, out.encoded, batch, rng),
            }
            spaces = {**spaces, **self.objective.embed(*heads, out.encoded)}
        for space, members in spaces.items():
            features['spaces'][space], features['lengths'][space] = {}, {}
            for stream, embedding in members.items():
                # Products of these are cosine similarities; the lengths are returned beside them.
                length = _length(embedding)
                features['spaces'][space][stream] = embedding / length[..., None]
                features['lengths'][space][stream] = length
        if maps:
            features['maps'] = {s: coarse(out.encoded[s]) for s in maps if s in out.encoded}
        if stages:
            features['stages'] = {
                stage.name: _stage_vector(out.encoded[stage.stream], stage) for stage in stages
            }
        if maps and self.objective is not None:
            features['heat_maps'] = self.objective.heat_maps(*heads, out.encoded)
        return features

    def _own_streams(self) -> tuple[str, ...]:
        """Streams that the objective reads itself."""
        return () if self.objective is None else self.objective.own_streams()

    def __call__(
        self,
        batch: Mapping[str, Any],
        maps: tuple[str, ...] = (),
        stages: tuple[Stage, ...] = (),
    ) -> dict[str, Any]:
        """Features of *all* hosts' rows, in global order, as NumPy arrays.

        Args:
            batch: this host's rows of a host batch. Streams of a modality without a tower are
                passed over, but for the objective's own.
            maps: streams whose feature maps to return as well.
            stages: of towers, whose features to return as well.

        Returns:
            {'pooled': {stream: [B D] or [B K D]},
             'spaces': {space: {stream: [B(,K) E], unit length}},
             'lengths': {space: {stream: [B(,K)]}}, of the embeddings before,
             'predictions': {name: [B P]},
             'maps': {stream: [B F], unit length}, see `coarse`; only where asked for,
             'stages': {name of a Stage: [B F]}; only where asked for,
             'heat_maps': {name: [B T h w]}, `Objective.heat_maps`; where maps are asked for}

        Raises:
            ConfigError: the stream's tower has no such stage or makes no map.
        """
        encoded = {}
        for name, value in batch.items():
            is_read = modality_of(name) in self.modalities or name in self._own_streams()
            if not is_stream(value) or is_read:
                encoded[name] = value
        # The sharding constraints in the model read this mesh while the program is traced.
        with jax.set_mesh(self.mesh):
            features = self._forward(
                self.variables, self.heads, place_on_mesh(encoded, self.mesh), maps, stages
            )
        # device_get starts all copies before it waits for the first.
        return jax.tree.map(np.asarray, jax.device_get(features))


def _length(x: jax.Array) -> jax.Array:
    """Euclidean length over the last axis, never 0."""
    # Floored inside the root, so that an embedding of zeros is not divided by 0.
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1), 1e-12))


def coarse(encoded: Any) -> Float[Array, 'B F']:
    """The last feature map at half its resolution, as one vector of unit length.

    The maximum over blocks of two along every axis of the grid. A last odd row is left out, an axis
    of one stays.

    Args:
        encoded: the Encoded of a stream, with its tokens.

    Raises:
        ConfigError: the stream's tower makes no map.
    """
    if encoded.tokens is None or not encoded.grid:
        raise ConfigError('feature maps are asked for of a stream whose tower makes none')
    tokens = encoded.tokens.astype(jnp.float32)
    grid = tokens.reshape(len(tokens), *encoded.grid, -1)
    # Window and stride are the same, so blocks do not overlap.
    block = (1, *(min(2, n) for n in encoded.grid), 1)
    # [B grid/2… D]
    pooled = jax.lax.reduce_window(grid, -jnp.inf, jax.lax.max, block, block, 'VALID')
    x = pooled.reshape(len(pooled), -1)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def _stage_vector(encoded: Any, stage: Stage) -> Float[Array, 'B F']:
    """The features of a stage, pooled."""
    if stage.number not in encoded.stages:
        raise ConfigError(
            f'expected a stage of the tower of {stage.stream!r}, '
            f'{", ".join(map(str, encoded.stages)) or "which has none"}, got {stage.number}'
        )
    return max_to_width(encoded.stages[stage.number].astype(jnp.float32), stage.width)


def compute_features(
    encoder: FeatureExtractor,
    batches: Iterable[Mapping[str, Any]],
    keep: tuple[str, ...] = (),
    maps: tuple[str, ...] = (),
    stages: tuple[Stage, ...] = (),
) -> dict[str, Any]:
    """Features of a whole pass, in the order of the pass, without padding rows.

    Args:
        encoder: what encodes.
        batches: host batches of one pass.
        keep: streams whose data to return as well; in a single process only, as they are for
            pictures.
        maps: streams whose feature maps to return as well.
        stages: of towers, whose features to return as well.

    Returns:
        What `FeatureExtractor.__call__` returns, of N examples, and
        {'index': [N] place in the pass,
         'labels': {name: [N ...]},
         'valid': {stream: bool [N]},
         'mask': {text stream: bool [N K]},
         'start': {picture stream: [N]}, seconds; 'crop': {picture stream: [N 4]}, what is seen,
         y0 x0 y1 x1 as shares of the frame,
         'data': {stream: [N ...]}, of the streams in `keep`}

    Raises:
        RuntimeError: an example came twice, or there was none.
    """
    parts = []
    for batch in batches:
        # Labels and masks are this host's, features those of all hosts: the rows must agree.
        local = _flat(batch)
        arrays = gather_rows(local, tuple(local))
        is_real = arrays.pop('is_real')
        part = {'arrays': arrays, **encoder(batch, maps, stages)}
        if keep and jax.process_count() == 1:
            part['data'] = {s: np.asarray(batch[s]['data']) for s in keep if s in batch}
        parts.append(jax.tree.map(lambda x, rows=is_real: x[rows], part))
    if not parts:
        raise RuntimeError('the pass yielded no batch; is the split empty?')
    features = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    parts.clear()  # features of a large split fill the memory
    # Row i is the i-th example of the pass, in whatever order the batches came.
    index = features['arrays']['index']
    if (index[1:] < index[:-1]).any():
        order = np.argsort(index, kind='stable')
        features = jax.tree.map(lambda x: x[order], features)
    arrays = features.pop('arrays')
    index = arrays.pop('index')
    # A row twice would count twice in every metric, and silently.
    num_repeated = len(index) - len(np.unique(index))
    if num_repeated:
        raise RuntimeError(f'{num_repeated} examples came more than once in one pass')
    features.update(index=index, labels={}, valid={}, mask={}, start={}, crop={})
    for key, value in arrays.items():
        group, name = key.split('/', 1)  # once: names of labels may hold a slash
        features[group][name] = value
    return features


def _flat(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a host batch beside its features, `group/name` -> array."""
    # `position` numbers the pass over all sources; `index` starts anew in each source.
    arrays = {'index': batch['position'], 'is_real': batch['valid']}
    for stream in stream_names(batch):
        arrays[f'valid/{stream}'] = batch[stream]['valid']
        if 'mask' in batch[stream]:
            arrays[f'mask/{stream}'] = batch[stream]['mask']
        if 'box' in batch[stream] and 'start' in batch[stream]:
            arrays[f'start/{stream}'] = batch[stream]['start']
            arrays[f'crop/{stream}'] = batch[stream]['box']
    for name, value in batch.get('labels', {}).items():
        arrays[f'labels/{name}'] = value
    return arrays
