"""A config that trains in seconds: towers of two layers (video) and one on the synthetic source."""

import numpy as np
from ml_collections import ConfigDict

from configs import default
from vatt_jax.performance import hlo


def config(**overrides):
    """overrides: dotted names with __ for the dots, such as optimizer__clip=1.0."""
    c = default.get_config()
    c.name = 'tiny'
    c.steps, c.batch_size, c.log_every = 6, 16, 1
    c.model.inputs.video.update({'frames': 4, 'size': 16, 'fps': 8.0})
    c.model.inputs.audio.update({'samples': 1024, 'rate': 2000})
    c.model.inputs.text = ConfigDict({'candidates': 2, 'words': 6, 'tokenizer': 'words'})
    size = {'layers': 1, 'width': 32, 'mlp': 64, 'heads': 2, 'head_width': 16, 'dropout': 0.1}
    c.model.towers.video = ConfigDict(
        {'name': 'vit', **size, 'layers': 2, 'patch': (2, 8, 8), 'drop_token': 0.5}
    )
    c.model.towers.audio = ConfigDict({'name': 'wat', **size, 'patch': 64, 'drop_token': 0.5})
    c.model.towers.text = ConfigDict({'name': 't5', **size, 'vocab': 0, 'word_width': 16})
    c.model.head = ConfigDict({'name': 'fac', 'va': 16, 'vat': 8})
    c.optimizer.frozen = ()
    c.optimizer.schedule.warmup, c.optimizer.schedule.peak, c.optimizer.schedule.end = 2, 3e-3, 1e-3
    c.data.source, c.data.synthetic_size = 'synthetic', 64
    c.mesh.replica = (
        1  # tests of meshes say so; one device compiles several times faster than eight
    )
    c.checkpoint.every, c.max_bad_steps = 2, 2
    c.evals = ConfigDict({})
    for name, value in overrides.items():
        node = c
        *parents, last = name.split('__')
        for p in parents:
            node = node[p]
        node[last] = value
    return c


def axes_of_collectives(compiled, mesh) -> list[set[str]]:
    """Of each collective of a compiled program, the mesh axes along which the devices of a group differ."""
    places = [
        np.stack(np.unravel_index(c.members, mesh.devices.shape))
        for c in hlo.read(compiled.as_text()).collectives
    ]
    return [
        {axis for axis, along in zip(mesh.axis_names, place) if len(set(along)) > 1}
        for place in places
    ]
