"""A config that trains in seconds: towers of two layers (video) and one on the synthetic source."""

import numpy as np
from ml_collections import ConfigDict

from configs import default
from vatt_jax.performance import hlo


def config(**overrides):
    """overrides: dotted names with __ for the dots, such as optimizer__clip=1.0."""
    c = default.get_config()
    c.name = 'tiny'
    c.steps = 6
    c.batch_size = 16
    c.log_every = 1
    c.model.inputs.video.update({'frames': 4, 'size': 16, 'fps': 8.0})
    c.model.inputs.audio.update({'samples': 1024, 'rate': 2000})
    c.model.inputs.text = ConfigDict({'candidates': 2, 'words': 6, 'tokenizer': 'words'})
    size = {'layers': 1, 'width': 32, 'mlp': 64, 'heads': 2, 'head_width': 16, 'dropout': 0.1}
    video = {'name': 'vit', **size, 'layers': 2, 'patch': (2, 8, 8), 'drop_token': 0.5}
    audio = {'name': 'wat', **size, 'patch': 64, 'drop_token': 0.5}
    text = {'name': 't5', **size, 'vocab': 0, 'word_width': 16}
    c.model.towers.video = ConfigDict(video)
    c.model.towers.audio = ConfigDict(audio)
    c.model.towers.text = ConfigDict(text)
    c.model.head = ConfigDict({'name': 'fac', 'va': 16, 'vat': 8})
    c.optimizer.frozen = ()
    c.optimizer.schedule.warmup = 2
    c.optimizer.schedule.peak = 3e-3
    c.optimizer.schedule.end = 1e-3
    c.data.source = 'synthetic'
    c.data.synthetic_size = 64
    # Tests of meshes say so; one device compiles several times faster than eight.
    c.mesh.replica = 1
    c.checkpoint.every = 2
    c.max_bad_steps = 2
    c.evals = ConfigDict({})
    for name, value in overrides.items():
        node = c
        *parents, last = name.split('__')
        for parent in parents:
            node = node[parent]
        node[last] = value
    return c


def axes_of_collectives(compiled, mesh) -> list[set[str]]:
    """Per collective of a compiled program: the mesh axes along which devices of a group differ."""
    found = []
    for collective in hlo.read(compiled.as_text()).collectives:
        # One row a mesh axis: the coordinates along it of the group's devices.
        coordinates = np.unravel_index(collective.members, mesh.devices.shape)
        axes = set()
        for axis, along in zip(mesh.axis_names, coordinates, strict=True):
            if len(np.unique(along)) > 1:
                axes.add(axis)
        found.append(axes)
    return found
