"""A frozen model as evaluators and users see it: batches in, features out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess
from vatt_jax.models import attention
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng


class Encoder:
    """Jitted evaluation-mode forward pass over a mesh.

    config: the run's resolved config (`model`, `compute_dtype`, `augment` are read).
    variables: {'params', 'batch_stats'} of the model, already on the mesh.
    objective: whose trained heads to apply as well (`Objective.predict`), with its parameters and state.
    """

    def __init__(
        self, config, variables, mesh, objective=None, objective_params=None, objective_state=None
    ):
        self.config, self.variables, self.mesh = config, variables, mesh
        self.objective, self.heads = objective, (objective_params, objective_state)
        self.model = models.build(attention.portable(config.model), config.compute_dtype)
        self.modalities = tuple(
            m for m in config.model.towers if self.model.has_tower(variables['params'], m)
        )
        self._forward = jax.jit(
            self._features, static_argnums=3, out_shardings=sharding.replicated(mesh)
        )

    def on(self, variables, objective_params=None, objective_state=None) -> Encoder:
        """The same programs, compiled once, on other values of the same variables."""
        other = copy.copy(self)
        other.variables, other.heads = variables, (objective_params, objective_state)
        return other

    def _features(self, variables, heads, batch, maps):
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch,
            self.config.model.inputs,
            self.config.augment,
            rng,
            augment=False,
            dtype=self.config.compute_dtype,
        )
        out = self.model.apply(variables, batch, train=False, rng=rng, features=bool(maps))
        length = lambda x: jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1), 1e-12))
        each = lambda f: {
            space: {name: f(x) for name, x in members.items()}
            for space, members in out.spaces.items()
        }
        predictions = (
            self.objective.predict(*heads, out.encoded) if self.objective is not None else {}
        )
        return {
            'predictions': predictions,
            'pooled': {name: e.pooled.astype(jnp.float32) for name, e in out.encoded.items()},
            **(
                {'maps': {name: coarse(out.encoded[name]) for name in maps if name in out.encoded}}
                if maps
                else {}
            ),
            'spaces': each(lambda x: x / length(x)[..., None]),
            'lengths': each(length),
        }

    def __call__(self, batch: Mapping[str, Any], maps: tuple[str, ...] = ()) -> dict[str, Any]:
        """batch: this host's rows of a host batch; streams of a modality without a tower are passed over. Returns NumPy features of *all*
        hosts' rows, in global order:
        {'pooled': {stream: [B D] or [B K D]}, 'spaces': {space: {stream: [B(,K) E], unit length}}, 'lengths': {space: {stream: [B(,K)]}} of those
        before, 'predictions': {name: [B P]}} and, for the streams named in `maps`, 'maps': {stream: [B F], unit length}, see `coarse`."""
        batch = {
            k: v
            for k, v in batch.items()
            if not _is_stream(v) or k.split('.')[0] in self.modalities
        }
        with jax.set_mesh(self.mesh):
            out = self._forward(self.variables, self.heads, place(batch, self.mesh), maps)
        return jax.tree.map(np.asarray, jax.device_get(out))


def coarse(encoded) -> jax.Array:
    """[B F], unit length: the last map of features, its maximum over blocks of two along every axis of its grid (a last odd row is left out, an
    axis of one stays), all in one vector."""
    if encoded.tokens is None or not encoded.grid:
        raise ConfigError('feature maps are asked for of a stream whose tower makes none')
    x = encoded.tokens.astype(jnp.float32).reshape(len(encoded.tokens), *encoded.grid, -1)
    block = (1, *(min(2, n) for n in encoded.grid), 1)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, block, block, 'VALID').reshape(len(x), -1)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))


def _is_stream(value: Any) -> bool:
    return isinstance(value, Mapping) and 'data' in value


def device_part(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a host batch that go to the device, `position` reduced modulo 2^32."""
    out = {k: v for k, v in batch.items() if k != 'position'}
    out['position'] = (np.asarray(batch['position'], np.int64) & 0xFFFFFFFF).astype(np.uint32)
    return out


def place(batch: Mapping[str, Any], mesh) -> dict[str, Any]:
    """This host's rows -> arrays of the global batch, sharded by rows over the mesh's data axes."""
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(rows, np.asarray(x)), device_part(batch)
    )


def gather_rows(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named host arrays of every host's rows, in global order (a copy of the local ones in a single process)."""
    picked = {n: np.asarray(batch[n]) for n in names}
    if jax.process_count() == 1:
        return picked
    from jax.experimental import multihost_utils

    return {
        n: np.asarray(v) for n, v in multihost_utils.process_allgather(picked, tiled=True).items()
    }


def features_of(
    encoder: Encoder,
    batches: Iterator[Mapping[str, Any]],
    keep: tuple[str, ...] = (),
    maps: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Features of a whole pass, padding rows dropped, in the order of the pass, each example once (checked).

    Returns {'pooled': …, 'spaces': …, 'lengths': …, 'index': [N] (place in the pass), 'labels': {name: [N …]}, 'valid': {stream:
    bool [N]}, 'mask': {text stream: bool [N K]}} and, for each stream named in `keep`, 'data': {stream: [N …]} (single process only: they
    are for pictures); in `maps`, 'maps': {stream: [N F]}. Raises RuntimeError when an example came twice.
    """
    parts = []
    for batch in batches:
        # `position` numbers the pass over all sources; `index` starts anew in each source.
        flat = {'index': batch['position'], 'valid': batch['valid']}
        streams = [k for k, v in batch.items() if _is_stream(v)]
        for s in streams:
            flat[f'valid/{s}'] = batch[s]['valid']
            if 'mask' in batch[s]:
                flat[f'mask/{s}'] = batch[s]['mask']
        for name, value in batch.get('labels', {}).items():
            flat[f'labels/{name}'] = value
        flat = gather_rows(flat, tuple(flat))
        real = flat.pop('valid')
        row = {'flat': flat, **encoder(batch, maps)}
        if keep and jax.process_count() == 1:
            row['data'] = {s: np.asarray(batch[s]['data']) for s in keep if s in batch}
        parts.append(jax.tree.map(lambda x, real=real: x[real], row))
    if not parts:
        raise RuntimeError('the pass yielded no batch; is the split empty?')
    out = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    order = np.argsort(out['flat']['index'], kind='stable')
    out = jax.tree.map(lambda x: x[order], out)
    flat = out.pop('flat')
    index = flat.pop('index')
    if len(np.unique(index)) != len(index):
        raise RuntimeError(
            f'{len(index) - len(np.unique(index))} examples came more than once in one pass'
        )
    out.update(index=index, labels={}, valid={}, mask={})
    for key, value in flat.items():
        group, name = key.split('/', 1)
        out[group][name] = value
    return out
