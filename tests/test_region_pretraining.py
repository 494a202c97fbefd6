"""Losses of ViLBERT and UNITER against their definitions, and what each hides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax.core import meta

from vatt_jax.config import ConfigError
from vatt_jax.inputs.masking import RegionMasking, WordMasking
from vatt_jax.inputs.regions import Regions, Words, box_numbers
from vatt_jax.models.vision_language import (
    UNITER,
    Uniter,
    UniterEncoded,
    UniterOutputs,
    VilbertOutputs,
)
from vatt_jax.models.vision_language.sizes import Layers
from vatt_jax.objectives.region_pretraining import (
    ALL,
    COCO_SBU,
    Pairs,
    Told,
    UniterLosses,
    VilbertLosses,
    mismatched,
    task_of_step,
    uniter_inputs,
    uniter_losses,
    uniter_task_loss,
    vilbert_inputs,
    vilbert_losses,
)
from vatt_jax.rng import Rng

B, L, N, F, P, V = 8, 6, 5, 12, 11, 50
MASK = 49
MASKING = WordMasking(MASK, (5, 40), share=0.5, at_least_one=True)
RNG = Rng.create(0, 0, jnp.arange(B))


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pairs(form):
    rng = np.random.default_rng(1)
    mask = np.arange(L)[None] < rng.integers(3, L + 1, (B, 1))
    words = Words(rng.integers(5, 40, (B, L)).astype(np.int32), mask)
    low = 0.5 * rng.random((B, N, 2))
    corners = np.concatenate([low, low + 0.4], -1).astype(np.float32)
    is_region = np.arange(N)[None] < rng.integers(2, N + 1, (B, 1))
    regions = Regions(noise(2, B, N, F), np.asarray(box_numbers(corners, form)), is_region)
    classes = scipy.special.softmax(noise(3, B, N, P), -1)
    maskable = mask & (np.arange(L) > 0)
    return Pairs(words, maskable, regions, classes)


def region_places(num_regions):
    """Regions but the global one; of pair 4 none, of pair 1 one less."""
    places = np.broadcast_to(np.arange(num_regions) > 0, (B, num_regions)).copy()
    places[4] = False
    places[1, -1] = False
    return places


def told(num_regions):
    rng = np.random.default_rng(4)
    is_masked_region = rng.random((B, num_regions)) < 0.5
    is_masked_region &= region_places(num_regions)
    return Told(
        words=rng.integers(0, V, (B, L)).astype(np.int32),
        is_masked_word=jnp.asarray(rng.random((B, L)) < 0.5),
        features=noise(5, B, num_regions, F),
        classes=scipy.special.softmax(noise(6, B, num_regions, P), -1),
        is_masked_region=jnp.asarray(is_masked_region),
        # Pair 4 does not count, and others have padding.
        is_region=jnp.asarray(region_places(num_regions)),
        is_match=jnp.asarray(np.arange(B) % 3 > 0),
        valid=jnp.asarray(np.arange(B) != 4),
    )


def vilbert_outputs(region_logits):
    return VilbertOutputs(
        encoded=None,
        word_logits=noise(7, B, L, V),
        region_logits=region_logits,
        match_logits=noise(9, B, 2),
    )


def uniter_outputs():
    return UniterOutputs(
        encoded=UniterEncoded(noise(11, B, L, F), noise(12, B, N, F), pooled=None),
        word_logits=noise(7, B, L, V),
        region_features=noise(8, B, N, F),
        region_logits=noise(9, B, N, P),
        match_logits=noise(10, B, 2),
    )


def cross_entropy(logits, labels, mask):
    """Mean over what is masked, float64."""
    log_probs = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    labels = np.asarray(labels)
    return -np.take_along_axis(log_probs, labels[..., None], -1)[..., 0][np.asarray(mask)].mean()


def divergence(logits, target, mask):
    """KL(target ‖ model), summed over classes, mean over what is masked."""
    log_probs = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
    mask = np.asarray(mask)
    return (target * (np.log(target) - log_probs)).sum(-1)[mask].mean()


@pytest.mark.parametrize('matched_only', [False, True])
def test_vilbert_sums_three_losses(matched_only):
    outputs = vilbert_outputs(noise(8, B, N, P))
    told_ = told(N)
    counts = np.asarray(told_.is_match) if matched_only else np.ones(B, bool)
    masked_word = np.asarray(told_.is_masked_word) & counts[:, None]
    masked_region = np.asarray(told_.is_masked_region) & counts[:, None]
    expected = {
        'words': cross_entropy(outputs.word_logits, told_.words, masked_word),
        'regions': divergence(outputs.region_logits, told_.classes, masked_region),
        # 0 is a match.
        'match': cross_entropy(outputs.match_logits, 1 - np.int32(told_.is_match), told_.valid),
    }
    got = vilbert_losses(outputs, told_, VilbertLosses(matched_only=matched_only))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(got['loss'], sum(expected.values()), rtol=1e-5)
    without = vilbert_losses(outputs, told_, VilbertLosses(match=False, region_weight=0.5))
    parts = without['words'] + 0.5 * without['regions']
    np.testing.assert_allclose(without['loss'], parts, rtol=1e-6)


def test_vilbert_may_tell_features_or_which_region_it_was():
    told_ = told(N)
    predicted = noise(8, B, N, F)
    outputs = vilbert_outputs(predicted)
    mask = np.asarray(told_.is_masked_region)
    regression = ((predicted - told_.features)[mask] ** 2).mean()
    got = vilbert_losses(outputs, told_, VilbertLosses('features'))
    np.testing.assert_allclose(got['regions'], regression, rtol=1e-5)
    # All regions of the batch are candidates: no global ones, no padding, none of pair 4.
    places = region_places(N)
    candidates = told_.features[places].astype(np.float64)
    own = np.cumsum(places).reshape(B, N) - 1
    contrast = cross_entropy(predicted @ candidates.T, own, mask)
    features = np.where(places[..., None], told_.features, np.nan)
    told_ = dataclasses.replace(told_, features=features)
    got = vilbert_losses(outputs, told_, VilbertLosses('contrast'))
    np.testing.assert_allclose(got['regions'], contrast, rtol=1e-4)


def test_uniter_has_one_loss_a_task():
    outputs = uniter_outputs()
    told_ = told(N)
    words, regions = pairs(7).words, pairs(7).regions
    mask = np.asarray(told_.is_masked_region)
    kl = divergence(outputs.region_logits, told_.classes, mask)
    best = 1 + np.argmax(told_.classes[..., 1:], -1)
    expected = {
        'words': cross_entropy(outputs.word_logits, told_.words, told_.is_masked_word),
        'features': ((outputs.region_features - told_.features)[mask] ** 2).mean(),
        'classes': cross_entropy(outputs.region_logits, best, mask),
        'divergence': kl / P,
        # 1 is a match.
        'match': cross_entropy(outputs.match_logits, np.int32(told_.is_match), told_.valid),
    }

    def loss(task, **options):
        options = UniterLosses(**options)
        return uniter_task_loss(outputs, words, regions, told_, task, options)

    for task, value in expected.items():
        np.testing.assert_allclose(loss(task, alignment=0.0), value, rtol=1e-5, err_msg=task)
    usual = loss('divergence', mean_over_classes=False)
    np.testing.assert_allclose(usual, kl, rtol=1e-5)
    # Alignment is tested by itself (tests/test_ipot.py); here, that it is added.
    without, some, all_ = (float(loss('match', alignment=weight)) for weight in (0.0, 0.1, 1.0))
    assert some != without
    np.testing.assert_allclose(10 * (some - without), all_ - without, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('task', ['words', 'features', 'match'])
def test_uniter_hides_one_side(task):
    given = pairs(7)
    words, regions, told_ = uniter_inputs(given, task, MASKING, RNG)
    is_word_changed = np.asarray(words.ids) != given.words.ids
    is_hidden = np.asarray(regions.is_hidden)
    assert is_word_changed.any() == (task == 'words')
    assert is_hidden.any() == (task == 'features')
    assert not (is_word_changed & ~np.asarray(told_.is_masked_word)).any()
    assert not (np.asarray(told_.is_masked_word) & ~given.maskable).any()
    if task == 'words':
        assert np.asarray(told_.is_masked_word).any(1).all()
    if task == 'features':
        assert is_hidden.any(1).all()
        assert not np.asarray(regions.features)[is_hidden].any()
        np.testing.assert_array_equal(told_.features, given.regions.features)


def test_vilbert_divides_the_global_region_by_what_is_not_covered():
    given = pairs(5)
    rule = RegionMasking(share=0.4, zero_share=0.5, at_least_one=False)
    _, regions, told_ = vilbert_inputs(given, MASKING, RNG, regions=rule)
    mask = np.asarray(told_.is_masked_region)
    assert not mask[:, 0].any() and mask.any()
    features = np.asarray(regions.features)
    corners = given.regions.boxes[..., :4].astype(np.float64)
    for row in range(B):
        real = np.flatnonzero(given.regions.mask[row])
        num_counted = 0
        for region in real:
            chosen = [other for other in real if mask[row, 1 + other]]
            overlaps = [iou(corners[row, region], corners[row, other]) for other in chosen]
            num_counted += max(overlaps, default=0) <= 0.4
        expected = features[row, 1 + real].sum(0) / max(num_counted, 1)
        np.testing.assert_allclose(features[row, 0], expected, rtol=1e-4, atol=1e-5)


def iou(a, b):
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    both = sides.prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


@pytest.mark.parametrize('side', ['words', 'regions'])
def test_mismatched_pairs_have_a_side_of_another_picture(side):
    given = pairs(7)
    # Two captions of each picture are no negatives of each other.
    record = np.arange(B) // 2
    got = mismatched(given, record, side, RNG)
    is_match = np.asarray(got.is_match)
    assert is_match.any() and not is_match.all()
    theirs, ours = (np.asarray(x.regions.features) for x in (got, given))
    if side == 'words':
        theirs, ours = np.asarray(got.words.ids), given.words.ids
    for row in range(B):
        source = next(i for i in range(B) if np.array_equal(theirs[row], ours[i]))
        assert (source == row) == is_match[row]
        assert is_match[row] or record[source] != record[row]
    other = got.words.ids if side == 'regions' else got.regions.features
    kept = given.words.ids if side == 'regions' else given.regions.features
    np.testing.assert_array_equal(other, kept)


def test_tasks_are_drawn_by_their_shares():
    drawn = [task_of_step(step, 0, COCO_SBU) for step in range(400)]
    assert drawn[:50] == [task_of_step(step, 0, COCO_SBU) for step in range(50)]
    for task, share in COCO_SBU.items():
        # A deviation of the most frequent one is 10.
        assert abs(drawn.count(task) - 400 * share / 22) < 40
    with pytest.raises(ConfigError, match='positive share'):
        task_of_step(0, 0, {'words': 0.0})
    with pytest.raises(ConfigError, match="mix='word'"):
        task_of_step(0, 0, {'word': 1.0})


ALL_TASKS = pytest.param(ALL, tuple(COCO_SBU), marks=pytest.mark.slow)


@pytest.mark.parametrize('task, summed', [('features', ('features',)), ALL_TASKS])
def test_tasks_of_uniter_reach_its_parameters(task, summed):
    sizes = dataclasses.replace(UNITER['tiny'], layers=Layers(1, 24, 3, 40))
    model, given = Uniter(sizes), pairs(7)
    record = np.arange(B)

    def init():
        return model.init(jax.random.key(0), given.words, given.regions, RNG, False)

    def loss(params):
        variables = {'params': params}
        losses = uniter_losses(model, variables, given, record, task, MASKING, RNG, True)
        return losses['loss'], losses

    shapes = meta.unbox(jax.eval_shape(init))['params']
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [0.1 * noise(i, *x.shape) for i, x in enumerate(leaves)])
    (total, losses), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert set(losses) == {'loss', *summed}
    np.testing.assert_allclose(total, sum(losses[name] for name in summed), rtol=1e-6)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        # A shift of all keys of a query changes nothing.
        if task == ALL:
            assert grad.any() or "['key']['bias']" in name, name
    mask_table = grads['region_embeddings']['mask_table']
    assert mask_table[1].any() and not mask_table[0].any()


def test_missing_classes_are_named():
    given = pairs(7).replace(classes=None)
    words, regions, told_ = uniter_inputs(given, 'divergence', MASKING, RNG)
    outputs = uniter_outputs()
    with pytest.raises(ConfigError, match='classes: expected the probabilities'):
        uniter_task_loss(outputs, words, regions, told_, 'divergence')
