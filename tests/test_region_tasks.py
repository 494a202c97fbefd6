"""Heads, losses and scores of fine-tuning against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from vatt_jax.evals import region_tasks as scores
from vatt_jax.losses import region_tasks as losses
from vatt_jax.models.vision_language import tasks


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initial(module, *inputs):
    shapes = meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))
    leaves, tree = jax.tree.flatten(shapes['params'])
    return jax.tree.unflatten(tree, [noise(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def test_answers_are_summed_and_examples_averaged():
    logits = 3 * noise(0, 4, 5)
    targets = np.random.default_rng(1).random((4, 5)).astype(np.float32)
    is_there = np.arange(5)[None] < np.array([[5], [3], [2], [4]])
    valid = np.array([True, True, False, True])
    # What does not count may be anything.
    spoilt = np.where(is_there & valid[:, None], logits, np.nan)
    p = 1 / (1 + np.exp(-np.float64(logits)))
    each = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
    expected = np.where(is_there, each, 0).sum(1)[valid].mean()
    value, grad = jax.value_and_grad(losses.soft_answers)(
        jnp.asarray(spoilt), targets, is_there, valid=valid
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    counts = is_there & valid[:, None]
    np.testing.assert_allclose(grad, np.where(counts, p - targets, 0) / 3, atol=1e-6)


def test_ranking_wants_a_margin_after_the_sigmoid():
    values = 2 * noise(0, 3, 4)
    p = 1 / (1 + np.exp(-np.float64(values)))
    lacking = np.maximum(0.2 + p[:, 1:] - p[:, :1], 0)
    np.testing.assert_allclose(losses.ranking_margin(values), lacking.mean(), rtol=1e-5)
    valid = np.array([True, False, True])
    got = losses.ranking_margin(values, valid=valid)
    np.testing.assert_allclose(got, lacking[valid].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match='expected a negative'):
        losses.ranking_margin(values[:, :1])


def test_heads_are_linear_in_what_the_model_made():
    regions = jnp.asarray(noise(0, 2, 3, 4))
    is_there = jnp.array([[True, True, False], [True, False, False]])
    params = initial(tasks.RegionScores(), regions, is_there)
    got = tasks.RegionScores().apply({'params': params}, regions, is_there)
    score = params['score']
    expected = (regions @ score['kernel'])[..., 0] + score['bias']
    np.testing.assert_allclose(got, np.where(is_there, expected, -1e4), rtol=1e-5)

    pooled = jnp.asarray(noise(1, 5, 2, 4))
    params = initial(tasks.PictureClassifier(), pooled)['classifier']
    got = tasks.PictureClassifier().apply({'params': {'classifier': params}}, pooled)
    both = np.concatenate([pooled[:, 0], pooled[:, 1]], -1)
    np.testing.assert_allclose(got, both @ params['kernel'] + params['bias'], rtol=1e-4, atol=1e-5)


def test_retrieval_begins_with_the_row_of_pairs_that_match():
    head = {'kernel': noise(0, 4, 2), 'bias': noise(1, 2)}
    pooled = jnp.asarray(noise(2, 3, 4))
    got = tasks.PairScore().apply({'params': tasks.score_of_matching(head)}, pooled)
    match_logits = pooled @ head['kernel'] + head['bias']
    np.testing.assert_allclose(got, match_logits[:, 1], rtol=1e-4, atol=1e-6)


def test_scores_by_hand():
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    assert scores.answer_score(logits, np.array([[1.0, 0.25, 0], [0.5, 1.0, 0]])) == 0.375
    got = scores.choice_scores(logits, np.array([1, 1]), logits, np.array([1, 0]))
    assert got == {'answer': 0.5, 'rationale': 1.0, 'both': 0.5}
    boxes = np.array([[[0, 0, 1, 1], [0, 0, 2, 1], [0, 0, 1, 1]]] * 2, float)
    # Of the first the best box has an IoU of 0.5, which is not above it; of the second 0.8.
    true = np.array([[0, 0, 1, 1], [0, 0, 1, 0.8]])
    assert scores.expression_accuracy(logits, boxes, true) == 0.5
    is_right, sentence = np.array([True, True, False, True]), np.array([7, 7, 9, 9])
    assert scores.consistency(is_right, sentence) == 0.5
    is_match = np.array([[True, False, False], [False, False, True]])
    assert [scores.recall_at(logits, is_match, k) for k in (1, 2, 3)] == [0, 0.5, 1]
