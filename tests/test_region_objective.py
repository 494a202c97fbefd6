"""The objective region_pretraining: words and regions of a batch, tasks of a step, evaluator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from ml_collections import ConfigDict

from configs import vilbert_uniter
from data_pipelines.loading import synthetic_regions
from vatt_jax import objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.evals.base import FeatureView
from vatt_jax.evals.region_words import RegionWords
from vatt_jax.inputs.masking import VILBERT_REGIONS, WordMasking
from vatt_jax.inputs.regions import Regions, Words, box_numbers
from vatt_jax.objectives.region_pretraining import (
    Pairs,
    UniterLosses,
    mismatched,
    networks,
    sources,
    steps,
    vilbert_inputs,
    vilbert_losses,
)
from vatt_jax.rng import Rng

B, L, N, F, P = 6, 5, 4, 8, 7
RNG = Rng.create(0, 3, jnp.arange(B))
MARKS = sources.marks_of((), 2, 20)


def make_steps(tasks, schedule='sum', masking='joint', **fields):
    """Steps of ViLBERT's kind; fields replace its own."""
    usual = {
        'words': WordMasking(MARKS.mask, MARKS.words, share=0.4),
        'regions': VILBERT_REGIONS,
        'side': 'words',
        'share': 0.5,
        'candidates': 1,
        'matched_only': False,
        'losses': UniterLosses(mean_over_classes=False, alignment=0.0),
    }
    names, weights = tuple(tasks), tuple(tasks.values())
    return steps.Steps(names, weights, schedule, masking, **{**usual, **fields})


def make_pairs(form=5):
    """Six pairs of words and regions of the synthetic world."""
    entry = synthetic_regions.make(np.arange(B), np.arange(B), N, F, P)
    ids = np.random.default_rng(0).integers(2, 20, (B, 1, L)).astype(np.int32)
    ids[1, 0, 3:] = 0
    stream = {'data': ids, 'mask': np.ones((B, 1), bool), 'valid': np.arange(B) != 4}
    regions = sources.regions_of_records(entry, form)
    return sources.make_pairs(stream, regions, entry['classes'], jnp.ones(B, bool), MARKS, RNG)


def test_sentences_stand_between_their_marks():
    ids = np.array([[5, 6, 7], [5, 0, 0], [0, 0, 0]])
    words, maskable = sources.marked_words(jnp.asarray(ids), MARKS)
    begin, end = 20, 21
    np.testing.assert_array_equal(
        words.ids, [[begin, 5, 6, 7, end], [begin, 5, end, 0, 0], [begin, end, 0, 0, 0]]
    )
    np.testing.assert_array_equal(words.mask.sum(-1), [5, 3, 2])
    np.testing.assert_array_equal(maskable.sum(-1), [3, 1, 0])
    assert not maskable[:, 0].any()
    assert MARKS.table == 23 and MARKS.words == (2, 20)


def test_one_of_the_sentences_that_are_there_is_drawn():
    data = np.arange(B * 3 * 2).reshape(B, 3, 2)
    mask = np.ones((B, 3), bool)
    mask[:, 0] = False
    mask[5] = False
    drawn = set()
    for step in range(8):
        rng = Rng.create(0, step, jnp.arange(B))
        ids, has_sentence = sources.drawn_sentence({'data': data, 'mask': mask}, rng)
        np.testing.assert_array_equal(has_sentence, mask.any(-1))
        drawn.add(int(np.flatnonzero((data[2] == np.asarray(ids)[2]).all(-1))[0]))
    assert drawn == {1, 2}
    first, _ = sources.drawn_sentence({'data': data, 'mask': mask}, None)
    np.testing.assert_array_equal(first[:5], data[:5, 1])


def test_cells_of_a_map_are_regions():
    feature_map = jnp.arange(2 * 2 * 2 * 3 * 4.0).reshape(2, 2, 2, 3, 4)
    regions = sources.regions_of_map(feature_map, 7)
    third = 1 / 3
    # Second row, first column.
    np.testing.assert_allclose(
        regions.boxes[0, 3], [0, 0.5, third, 1, third, 0.5, third / 2], atol=1e-6
    )
    mean = np.asarray(feature_map, np.float64).mean(1)
    np.testing.assert_allclose(regions.features[1, 3], mean[1, 1, 0])
    assert regions.mask.all()


def test_a_pair_counts_with_words_and_a_region():
    pairs = make_pairs()
    np.testing.assert_array_equal(pairs.valid, np.arange(B) != 4)


def test_the_task_of_a_step_is_drawn_by_its_share():
    tasks = make_steps({'words': 1.0, 'match': 3.0}, 'one')
    draw = jax.jit(lambda step: steps.drawn_task(tasks, Rng.create(1, step, jnp.arange(2))))
    drawn = np.array([draw(step) for step in range(400)])
    # Five standard deviations of a binomial.
    assert abs((drawn == 1).mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 400)
    other_examples = steps.drawn_task(tasks, Rng.create(1, 7, jnp.arange(90, 95)))
    assert other_examples == drawn[7]


def test_a_step_hides_what_its_task_is_about():
    tasks = {'words': 1.0, 'features': 1.0, 'match': 1.0}
    for masking, expected in (
        ('conditional', [(1, 0), (0, 1), (0, 0)]),
        ('joint', [(1, 1), (1, 1), (0, 0)]),
    ):
        for number, sides in enumerate(expected):
            found = steps.hidden_sides(make_steps(tasks, 'one', masking), jnp.int32(number), RNG)
            assert [bool(side.all()) for side in found] == [bool(side) for side in sides]
            assert [bool(side.any()) for side in found] == [bool(side) for side in sides]
    of_words, of_regions = steps.hidden_sides(make_steps(tasks, masking='conditional'), None, RNG)
    np.testing.assert_array_equal(of_words, ~of_regions)
    only_words = steps.hidden_sides(make_steps({'words': 1.0}), None, RNG)
    assert only_words[0].all() and not only_words[1].any()


def test_hard_negatives_are_of_the_picture_most_alike():
    features = np.random.default_rng(1).normal(size=(B, N, F)).astype(np.float32)
    features[3] = 2 * features[0]
    ids = np.repeat(np.arange(B)[:, None], L, axis=1)
    mask = np.ones((B, N), bool)
    pairs = Pairs(
        Words(ids, np.ones((B, L), bool)),
        np.ones((B, L), bool),
        Regions(features, np.zeros((B, N, 5)), mask),
    )
    found = mismatched(pairs, np.arange(B), 'words', RNG, share=1.0, candidates=B)
    mean = features.mean(1)
    cosine = mean @ mean.T / np.outer(*[np.linalg.norm(mean, axis=-1)] * 2)
    np.fill_diagonal(cosine, -np.inf)
    np.testing.assert_array_equal(found.words.ids[:, 0], cosine.argmax(-1))


def test_the_sum_of_tasks_is_vilberts_loss():
    module = networks.network(networks.sizes_of('vilbert', 'tiny', 23, F, P), 'dense', 'float32')
    params = meta.unbox(jax.jit(networks.init, static_argnums=(0, 2))(module, jax.random.key(0), 7))
    pairs, record = make_pairs(), jnp.arange(B)
    weights = {'words': 1.0, 'divergence': 2.0, 'match': 0.5}

    @jax.jit
    def ours(params):
        summed = make_steps(weights)
        read = steps.inputs(summed, module, pairs, record, None, RNG)
        return steps.losses(summed, module, params, read, None, RNG)

    @jax.jit
    def theirs(params):
        given = mismatched(pairs, record, 'words', RNG)
        words, regions, told = vilbert_inputs(given, make_steps(weights).words, RNG)
        return vilbert_losses(module.apply({'params': params}, words, regions, RNG, True), told)

    total, by_task, _ = ours(params)
    parts = theirs(params)
    np.testing.assert_allclose(by_task['divergence'], parts['regions'], rtol=1e-5)
    expected = parts['words'] + 2 * parts['regions'] + 0.5 * parts['match']
    np.testing.assert_allclose(total, expected, rtol=1e-5)


class Counted(FeatureView):
    """Features of which the hidden words of four clips are known."""

    def __init__(self, counts):
        self.seed = 0
        self.counts = counts

    def features(self, split, **request):
        return {'predictions': {'region_words': self.counts}}


def test_masked_words_are_counted_over_all_clips():
    counts = np.array([[2, 2, 1], [1, 0, 0], [0, 0, 0], [3, 2, 0]])
    result = RegionWords(ConfigDict({'type': 'region_words'})).run(Counted(counts))
    assert result.scalars == pytest.approx(
        {'accuracy': 4 / 6, 'accuracy_without': 1 / 6, 'gain': 0.5}
    )
    low, high = result.artifacts['accuracy/interval']
    assert 0 <= low <= 4 / 6 <= high <= 1


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'tasks': {'pixels': 1.0}}, 'choose one of words'),
        ({'tasks': {'words': 0.0}}, 'expected a task of a positive weight'),
        ({'tasks': {'features': 1.0, 'classes': 1.0}}, 'vilbert tells one thing of a region'),
        ({'schedule': 'two'}, 'config.objective.schedule'),
        ({'text': 'video'}, 'config.objective.text'),
    ],
)
def test_mistakes_are_named(fields, message):
    config = ConfigDict({'name': 'region_pretraining', **fields})
    with pytest.raises(ConfigError, match=message):
        objectives.build(config)


def test_configs_have_the_published_sizes():
    for model in ('vilbert', 'uniter'):
        c = vilbert_uniter.get_config(f'{model},published,synthetic')
        objectives.build(c.objective)
        assert c.model.inputs.regions.width == 2048
    with pytest.raises(ConfigError, match='option'):
        vilbert_uniter.get_config('uniter,demo,large')


def test_the_linear_schedule():
    schedule = ConfigDict({'name': 'warmup_linear', 'peak': 1.0, 'end': 0.2, 'warmup': 10})
    rate = optim.schedule(schedule, 50)
    np.testing.assert_allclose(
        [rate(s) for s in (0, 5, 10, 30, 50)], [0, 0.5, 1, 0.6, 0.2], rtol=1e-6
    )


def test_boxes_of_synthetic_regions_lie_in_the_picture():
    entry = synthetic_regions.make(np.arange(40) % 16, np.arange(40), N, F, P)
    corners = entry['corners']
    assert (corners >= 0).all() and (corners <= 1).all()
    assert (box_numbers(corners, 7)[..., 4:] > 0).all()
    np.testing.assert_allclose(entry['classes'].sum(-1), 1, rtol=1e-5)
    assert not entry['features'][~entry['mask']].any()
