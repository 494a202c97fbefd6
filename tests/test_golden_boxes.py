"""One step of localisation and one of the detector, whose numbers are known.

Features and parameters come from NumPy's frozen generator, so the numbers depend on nothing but
this project's arithmetic.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from ml_collections import ConfigDict

from tests.test_golden import initial_value, seven_digits
from tests.test_localisation import FIELDS, features
from vatt_jax import objectives, optim
from vatt_jax.models.multimodal import Encoded
from vatt_jax.objectives.forward import map_of
from vatt_jax.rng import Rng

REGENERATE = (
    'The numbers of this step have changed. If that was meant (another form of loss, targets or '
    'layers), say why in the commit and replace the dictionary by {found}; else it is a bug.'
)
LOCALISATION = {
    'accuracy/audio': 0.0,
    'accuracy/video': 0.3333333,
    'after': 1.227145,
    'gradient': 0.8366186,
    'loss': 1.27797,
    'loss/audio': 1.203291,
    'loss/contrast': 1.236823,
    'loss/labels': 1.295604,
    'loss/video': 1.387918,
}
DETECTION = {
    'after': 3.573699,
    'gradient': 4.120532,
    'loss': 4.432699,
    'loss/box': 0.8786842,
    'loss/centre': 1.414529,
    'loss/class': 2.139486,
    'positive_places': 17.0,
}


def spec_of(widths, grid, batch, labels):
    """What an objective is told of a model whose features are so wide."""
    encoded = {
        name: Encoded(jax.ShapeDtypeStruct((3, width), 'float32'), grid=grid)
        for name, width in widths.items()
    }
    outputs = type('Outputs', (), {'encoded': encoded})
    return objectives.Spec(None, outputs, batch, 8, labels)


def one_step(objective, spec, pooled, batch):
    """The loss, its parts, the norm of the gradient, and the loss after a step of Adam."""
    params, state = meta.unbox(objective.init(jax.random.key(0), spec))
    params = jax.tree.map(
        lambda path, x: jnp.asarray(initial_value(path, x)), optim.paths(params), params
    )

    @jax.jit
    def loss(params):
        rng = Rng.create(0, 0, jnp.arange(3))
        found = objective.compute_loss(None, {'batch_stats': {}}, params, state, pooled, batch, rng)
        return found.value, found.metrics

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    tx = optax.adam(1e-2)
    updates, _ = tx.update(gradients, tx.init(params), params)
    after, _ = loss(optax.apply_updates(params, updates))
    found = {**metrics, 'loss': value, 'gradient': optax.global_norm(gradients), 'after': after}
    return {name: seven_digits(float(number)) for name, number in sorted(found.items())}


def check(found, expected):
    is_same = found.keys() == expected.keys() and all(
        np.isclose(found[name], expected[name], rtol=2e-4) for name in expected
    )
    assert is_same, REGENERATE.format(found=found)


def test_a_step_of_localisation():
    """Three clips: maps of 4 × 3 and sounds, two of them of one cluster."""
    grid, sound = features()
    pooled = {'video': jnp.asarray(grid.mean((1, 2, 3))), 'audio': jnp.asarray(sound)}
    pooled[map_of('video')] = jnp.asarray(grid)
    there = {'valid': jnp.ones(3, bool)}
    labels = jnp.array([[0], [2], [0]], jnp.int8)
    batch = {
        'video': there,
        'audio': there,
        'valid': jnp.ones(3, bool),
        'columns': {'label': labels},
    }
    objective = objectives.build(ConfigDict({**FIELDS, 'contrast': 0.3, 'temperature': 0.2}))
    spec = spec_of({'video': 5, 'audio': 7}, (1, 4, 3), {}, {})
    check(one_step(objective, spec, pooled, batch), LOCALISATION)


def test_a_step_of_the_detector():
    """Three pictures with two boxes, one of which is ignored; maps of 4 × 4."""
    random = np.random.RandomState(3)
    feature_map = jnp.asarray(random.normal(size=(3, 1, 4, 4, 5)).astype(np.float32))
    corners = np.array([[[0.1, 0.1, 0.6, 0.5], [0.5, 0.4, 1.0, 0.9]]] * 3, np.float32)
    valid = np.ones((3, 2), bool)
    ignored = np.array([[False, False], [False, True], [False, False]])
    boxes = {
        'corners': jnp.asarray(corners),
        'class': jnp.array([[0, 1], [1, 0], [1, 1]]),
        'valid': jnp.asarray(valid),
        'ignored': jnp.asarray(ignored),
    }
    batch = {'video': {'valid': jnp.ones(3, bool)}, 'boxes': boxes}
    objective = objectives.build(ConfigDict({'name': 'detection', 'width': 8, 'convs': 1}))
    spec = spec_of({'video': 5}, (1, 4, 4), {'boxes': boxes}, {'object': 2})
    check(one_step(objective, spec, {map_of('video'): feature_map}, batch), DETECTION)
