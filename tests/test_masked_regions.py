"""The losses over masked regions against their definitions in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests import typecheck
from vatt_jax.losses import masked_regions
from vatt_jax.parallel import sharding

B, N, D, P = 4, 6, 5, 9


def places(mask):
    return [tuple(place) for place in np.argwhere(mask)]


def regression(predicted, target, mask):
    errors = [np.square(predicted[p] - target[p]).sum() / D for p in places(mask)]
    return np.mean(errors)


def cross_entropy(logits, classes, mask):
    log_probs = scipy.special.log_softmax(logits, -1)
    return -np.mean([log_probs[p][classes[p]] for p in places(mask)])


def divergence(logits, teacher, mask):
    probs = scipy.special.softmax(logits, -1)
    return np.mean([scipy.special.rel_entr(teacher[p], probs[p]).sum() for p in places(mask)])


def nce(predicted, target, mask, valid, own_picture, temperature=1.0):
    losses = []
    for b, n in places(mask):
        keys = [(b, n)]
        for other in places(valid):
            if other != (b, n) and (own_picture or other[0] != b):
                keys.append(other)
        scores = np.array([predicted[b, n] @ target[key] for key in keys]) / temperature
        losses.append(scipy.special.logsumexp(scores) - scores[0])
    return np.mean(losses)


@pytest.fixture
def arrays():
    """What the losses take, float64; regions beyond a picture's own are padding."""
    rng = np.random.default_rng(0)
    valid = np.arange(N) < np.array([6, 4, 1, 5])[:, None]
    mask = valid & (rng.random((B, N)) < 0.5)
    teacher = scipy.special.softmax(3 * rng.normal(size=(B, N, P)), -1)
    teacher[..., 3] = 0
    return {
        'predicted': rng.normal(size=(B, N, D)),
        'target': rng.normal(size=(B, N, D)),
        'logits': rng.normal(size=(B, N, P)),
        'teacher': teacher / teacher.sum(-1, keepdims=True),
        'classes': rng.integers(0, P, (B, N)),
        'mask': mask,
        'valid': valid,
    }


LOSSES = {
    'feature_regression': ('predicted', 'target', 'mask'),
    'class_cross_entropy': ('logits', 'classes', 'mask'),
    'class_divergence': ('logits', 'teacher', 'mask'),
    'region_nce': ('predicted', 'target', 'mask', 'valid'),
}
DEFINITIONS = {
    'feature_regression': regression,
    'class_cross_entropy': cross_entropy,
    'class_divergence': divergence,
    'region_nce': lambda *arguments: nce(*arguments, own_picture=True),
}


def evaluate(name, arrays, **options):
    """Value, and gradients in what the model predicts and in a float target."""
    arguments = [arrays[field] for field in LOSSES[name]]
    arguments = [np.float32(x) if x.dtype == np.float64 else x for x in arguments]
    wanted = (0,) if name == 'class_cross_entropy' else (0, 1)
    loss = getattr(masked_regions, name)
    return jax.jit(jax.value_and_grad(lambda *given: loss(*given, **options), wanted))(*arguments)


@pytest.mark.parametrize('name', LOSSES)
def test_losses_are_their_definitions(arrays, name):
    value, gradients = evaluate(name, arrays)
    definition = DEFINITIONS[name]
    arguments = [arrays[field] for field in LOSSES[name]]
    np.testing.assert_allclose(value, definition(*arguments), rtol=1e-5)
    # The derivative along a random direction, by central differences in float64.
    direction = np.random.default_rng(1).normal(size=arguments[0].shape)
    step = 1e-6
    ahead = definition(arguments[0] + step * direction, *arguments[1:])
    behind = definition(arguments[0] - step * direction, *arguments[1:])
    slope = np.sum(np.float64(gradients[0]) * direction)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-4)
    # Targets are constants.
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('name', LOSSES)
def test_what_is_not_masked_may_be_anything(arrays, name):
    expected, expected_gradients = evaluate(name, arrays)
    spoilt = dict(arrays)
    for field in ('predicted', 'logits', 'teacher'):
        spoilt[field] = np.where(arrays['mask'][..., None], arrays[field], np.nan)
    # Features of regions that are there serve as negatives.
    known = arrays['valid'] if name == 'region_nce' else arrays['mask']
    spoilt['target'] = np.where(known[..., None], arrays['target'], np.inf)
    spoilt['classes'] = np.where(arrays['mask'], arrays['classes'], -1)
    value, gradients = evaluate(name, spoilt)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradients[0], expected_gradients[0])
    np.testing.assert_array_equal(np.asarray(gradients[0])[~arrays['mask']], 0)


@pytest.mark.parametrize('name', LOSSES)
def test_without_a_masked_region_the_loss_is_zero(arrays, name):
    value, gradients = evaluate(name, {**arrays, 'mask': np.zeros((B, N), bool)})
    assert value == 0
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_negatives_may_be_of_other_pictures_alone(arrays):
    value, _ = evaluate('region_nce', arrays, own_picture=False, temperature=0.5)
    arguments = [arrays[field] for field in LOSSES['region_nce']]
    expected = nce(*arguments, own_picture=False, temperature=0.5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert abs(expected - nce(*arguments, own_picture=True, temperature=0.5)) > 0.1


@pytest.mark.parametrize('own_picture', [True, False])
def test_negatives_are_those_of_the_global_batch_on_any_mesh(arrays, own_picture):
    arguments = [arrays[field] for field in LOSSES['region_nce']]
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    with jax.set_mesh(mesh):
        value, gradients = evaluate('region_nce', arrays, own_picture=own_picture)
    np.testing.assert_allclose(value, nce(*arguments, own_picture), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradients[0])[~arrays['mask']], 0)


def test_uniter_divides_the_divergence_by_the_number_of_classes(arrays):
    value, _ = evaluate('class_divergence', arrays)
    divided, _ = evaluate('class_divergence', arrays, mean_over_classes=True)
    np.testing.assert_allclose(divided * P, value, rtol=1e-6)


def test_the_best_class_is_not_the_background():
    probabilities = np.array([[0.7, 0.1, 0.2], [0.1, 0.6, 0.3]], np.float32)
    np.testing.assert_array_equal(masked_regions.best_classes(probabilities), [2, 1])
    np.testing.assert_array_equal(masked_regions.best_classes(probabilities, None), [0, 1])


@pytest.mark.parametrize(
    'name, changes, message',
    [
        ('feature_regression', {'target': np.zeros((B, N, 4))}, r'target: expected shape'),
        ('class_cross_entropy', {'classes': np.zeros((B, 5), int)}, r'classes: expected shape'),
        ('class_divergence', {'teacher': np.zeros((B, N, 8))}, r'teacher: expected shape'),
        ('region_nce', {'mask': np.zeros((B, 5), bool)}, r'is_masked: expected shape'),
    ],
)
def test_mistakes_are_named(arrays, name, changes, message):
    with typecheck.off(), pytest.raises(ValueError, match=message):
        evaluate(name, {**arrays, **changes})
