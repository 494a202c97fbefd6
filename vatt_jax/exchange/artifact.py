"""A model as programs that JAX alone runs (jax.export), each tower with its preprocessing.

A folder holds, for each tower, `<modality>.jax` (a serialized program of any batch size, for CPU,
GPU and TPU), the weights that it takes as `<modality>.npz`, and for all of them `manifest.json`,
`load.py`, which reads it without this package, and the model card README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.exchange import model_card, standalone
from vatt_jax.inference import classes
from vatt_jax.inputs import optical_flow, preprocess
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.models import attention
from vatt_jax.rng import Rng

# Raised when the layout of the folder changes.
VERSION = 1
PLATFORMS = ('cpu', 'cuda', 'tpu')


def write(
    folder: str | os.PathLike,
    config: ConfigDict,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    modalities: tuple[str, ...],
    run: pathlib.Path | None = None,
    licence: str = '',
    classifier: Any = None,
    heads: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes the artifact of a model; it appears whole or not at all.

    Args:
        folder: to make.
        config: the run's resolved config.
        variables: {'params', 'batch_stats'}.
        info: {'tokenizer', 'labels', …} of the data.
        modalities: the towers to export.
        run: the run folder, whose evaluation the model card shows.
        licence: of the weights, for the model card.
        classifier: the objective of a fine-tuned model; its tower gives logits, too.
        heads: the parameters of the classifier.

    Returns:
        The names of the files.

    Raises:
        ConfigError: the folder is there and not empty, or cannot be written.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f'{folder}: expected a folder that is new or empty; name another one')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as made:
            whole = pathlib.Path(made) / 'export'
            whole.mkdir()
            towers = {}
            for modality in modalities:
                tower = _Tower(modality, config, variables)
                if classifier is not None and classifier.config.stream == modality:
                    tower = _Tower(modality, config, variables, classifier, heads)
                towers[modality] = _write_tower(whole, tower, info)
            _write_manifest(whole, config, info, towers)
            shutil.copyfile(standalone.__file__, whole / 'load.py')
            card = model_card.text(config, variables, info, run, licence)
            (whole / model_card.NAME).write_text(card, 'utf-8')
            os.replace(whole, folder)
    except OSError as error:
        raise ConfigError(f'{folder}: expected a folder that can be written: {error}') from error
    return sorted(path.name for path in folder.iterdir())


@dataclasses.dataclass(frozen=True)
class _Tower:
    """What is exported as one program.

    Attributes:
        modality: of the tower.
        config: the run's resolved config.
        variables: {'params', 'batch_stats'} of the whole model.
        classifier: the objective whose logits the tower gives, if any.
        heads: the parameters of the classifier.
    """

    modality: str
    config: ConfigDict
    variables: Mapping[str, Any]
    classifier: Any = None
    heads: Mapping[str, Any] | None = None

    def weights(self) -> dict[str, np.ndarray]:
        """Flat variables that the tower may read: its own, those of all, and the classifier's."""
        # Modules of one modality alone are called `fronts_video`, `encoders_audio`, ….
        own = ('fronts', 'encoders', 'posts', 'nets', 'adapters')
        groups = dict(self.variables)
        if self.heads is not None:
            groups['objective'] = self.heads
        weights = {}
        for path, array in flatten_dict(groups).items():
            kind, _, of = path[1].partition('_')
            if kind in own and of != self.modality:
                continue
            weights['/'.join(path)] = np.asarray(jax.device_get(array))
        return weights


def _write_tower(folder: pathlib.Path, tower: _Tower, info: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the program and its weights; returns what the manifest says of them."""
    modality = tower.modality
    weights = tower.weights()
    exported = _export_tower(tower, weights)
    (folder / f'{modality}.jax').write_bytes(exported.serialize())
    # NumPy declares a flag among the keywords that are names of arrays.
    np.savez(folder / f'{modality}.npz', **weights)  # type: ignore[arg-type]
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    widths = {name: aval.shape[-1] for name, aval in outputs.items()}
    described = {
        'program': f'{modality}.jax',
        'weights': f'{modality}.npz',
        'input': describe_input(modality, tower.config),
        'outputs': widths,
    }
    if tower.classifier is not None:
        objective = tower.classifier.config
        described['classifier'] = {
            'names': classes.names_of_classes(info, objective, widths['logits']),
            'form': objective.form,
        }
    return described


def _write_manifest(
    folder: pathlib.Path, config: ConfigDict, info: Mapping[str, Any], towers: dict[str, Any]
) -> None:
    manifest = {
        'format': 'vatt_jax artifact',
        'version': VERSION,
        'name': config.name,
        'jax': jax.__version__,
        'platforms': PLATFORMS,
        'towers': towers,
        'tokenizer': info.get('tokenizer'),
        'labels': info.get('labels', {}),
    }
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1), 'utf-8')


def describe_input(modality: str, config: ConfigDict) -> dict[str, Any]:
    """Shape, dtype and meaning of what an exported tower takes.

    Args:
        modality: one of the model's towers.
        config: the run's resolved config.
    """
    spec = config.model.inputs[modality]
    if modality == 'video':
        return {
            'shape': ['B', spec.frames, 'S', 'S', 3],
            'dtype': 'uint8',
            'meaning': f'RGB frames at {spec.fps:g} a second, squares that are resized to '
            f'{spec.size} pixels',
            'fps': spec.fps,
            'size': spec.size,
        }
    if modality == 'flow':
        return {
            'shape': ['B', spec.frames, 'S', 'S', 2],
            'dtype': 'uint8',
            'meaning': f'horizontal and vertical displacement of every pixel until the next frame, '
            f'{optical_flow.ZERO} + pixels · {optical_flow.STEPS} / {optical_flow.BOUND:g} within '
            f'±{optical_flow.BOUND:g}, of frames at {spec.fps:g} a second; squares that are '
            f'resized to {spec.size} pixels',
            'fps': spec.fps,
            'size': spec.size,
        }
    if modality == 'audio':
        return {
            'shape': ['B', spec.samples],
            'dtype': 'int16',
            'meaning': f'mono samples at {spec.rate} Hz',
            'rate': spec.rate,
        }
    return {'shape': ['B', spec.words], 'dtype': 'int32', 'meaning': 'word numbers, 0 is padding'}


def _export_tower(tower: _Tower, weights: Mapping[str, np.ndarray]) -> Any:
    """The program of one tower: (weights, batch) -> {'pooled', common spaces, maybe 'logits'}."""
    modality, config = tower.modality, tower.config
    model = models.build(attention.portable(config.model), config.compute_dtype)

    def embed(flat: Mapping[str, jax.Array], data: jax.Array) -> dict[str, jax.Array]:
        variables = unflatten_dict({tuple(name.split('/')): x for name, x in flat.items()})
        heads = variables.pop('objective', None)
        batch_size = data.shape[0]
        stream = {'data': data, 'valid': jnp.ones(batch_size, bool)}
        if kind_of(modality) == PICTURES:
            # All of the frame, as it is.
            whole = jnp.array([0.0, 0.0, 1.0, 1.0])
            stream['box'] = jnp.broadcast_to(whole, (batch_size, 4))
            stream['flip'] = jnp.zeros(batch_size, bool)
        if modality == 'text':
            # One candidate sentence each.
            stream['data'] = data[:, None]
            stream['mask'] = (data != 0).any(-1)[:, None]
        # Nothing is drawn in evaluation mode, but modules take an Rng.
        rng = Rng.create(0, 0, jnp.zeros(batch_size, jnp.uint32))
        batch = preprocess.device_stage(
            {modality: stream},
            config.model.inputs,
            config.augment,
            rng,
            augment=False,
            dtype=config.compute_dtype,
        )
        out: Any = model.apply(variables, batch, train=False, rng=rng)
        features = {'pooled': out.encoded[modality].pooled.astype(jnp.float32)}
        for space, members in out.spaces.items():
            if modality in members:
                features[space] = _unit(members[modality])
        if modality == 'text':
            features = {name: x[:, 0] for name, x in features.items()}
        if tower.classifier is not None:
            (features['logits'],) = tower.classifier.predict(heads, {}, out.encoded).values()
        return features

    shape = ', '.join(str(axis) for axis in describe_input(modality, config)['shape'])
    symbolic = jax.export.symbolic_shape(shape.lower(), constraints=('b >= 1',))
    dtype = describe_input(modality, config)['dtype']
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    return jax.export.export(jax.jit(embed), platforms=PLATFORMS)(
        abstract, jax.ShapeDtypeStruct(symbolic, dtype)
    )


def _unit(x: jax.Array) -> jax.Array:
    """Rows of unit length, as `FeatureExtractor` makes them."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
