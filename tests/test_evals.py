"""Evaluators against closed forms on known features, and on a real encoder of synthetic data."""

import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import data_pipelines
from tests import tiny
from vatt_jax import api, evals
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView, Result, solvers, statistics, synchrony
from vatt_jax.evals.linear_probe import mean_color, mean_spectrum
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import loop


class KnownFeatures(FeatureView):
    """A view whose features are given.

    Args:
        features: {request: what feature_extractor.compute_features returns}. A request is a split,
            (split, draw) or (split, number of the window, crop).
        labels: names of the classes of the label `class`.
    """

    seed = 0

    def __init__(self, features, labels=()):
        self._features = features
        self.requests = []
        self.data = types.SimpleNamespace(info={'labels': {'class': list(labels)}})
        objective = types.SimpleNamespace(streams=lambda: ('video',))
        self.encoder = types.SimpleNamespace(objective=objective)

    def features(self, split, window=None, draw='', **request):
        self.requests.append((split, request))
        if window:
            return self._features[split, window['number'], window.get('crop')]
        if draw:
            return self._features[split, draw]
        return self._features[split]


def run_evaluator(view, name='x', **fields):
    """The result of an entry of config.evals on a view."""
    return evals.build(name, ConfigDict(fields)).run(view)


def embeddings(n, spaces, valid=None, mask=None):
    """Features of n clips: spaces {space: {stream: [n …]}}."""
    all_valid = {}
    for members in spaces.values():
        for stream in members:
            all_valid[stream] = np.ones(n, bool)
    return {
        'spaces': spaces,
        'index': np.arange(n),
        'valid': {**all_valid, **(valid or {})},
        'mask': mask or {},
    }


def labelled(x, y, stream='video', label='class'):
    """Features x [N D] of one stream with classes y [N]."""
    return {
        'pooled': {stream: x},
        'labels': {label: y},
        'valid': {stream: np.ones(len(y), bool)},
        'index': np.arange(len(y)),
    }


def one_hot(n):
    return np.eye(n, dtype=np.float32)


def shifted_one_hot(n, by):
    """Row i points at i + by, modulo n."""
    return np.roll(one_hot(n), by, 1)


def retrieve(features, **fields):
    """The result of a retrieval evaluator, sound to pictures unless the fields say otherwise."""
    fields = {'pairs': (('audio', 'video', 'va'),), **fields}
    return run_evaluator(KnownFeatures({'test': features}), 'r', type='retrieval', **fields)


def recalls(result, direction):
    """R@1, R@5 and R@10."""
    return [result.scalars[f'{direction}/R@{k}'] for k in (1, 5, 10)]


# ---- ranks


def ranks(similarity):
    """0-based rank of the diagonal in each row."""
    is_own = np.eye(len(similarity), dtype=bool)
    return statistics.ranks_of_best(*statistics.compare_with_own(similarity, is_own))


def hits(similarity, k):
    """How far the diagonal of each row is among the first k."""
    is_own = np.eye(len(similarity), dtype=bool)
    return statistics.hits_of_best(*statistics.compare_with_own(similarity, is_own), k)


def test_ranks_and_hits_with_ties():
    similarity = np.array(
        [
            [1, 2, 3, 0],  # two score higher
            [5, 4, 4, 0],  # tied with one, one higher
            [2, 2, 2, 2],  # all equal
            [0, 1, 2, 9],  # alone at the top
        ],
        float,
    )
    np.testing.assert_array_equal(ranks(similarity), [2, 1.5, 1.5, 0])
    np.testing.assert_allclose(hits(similarity, 1), [0, 0, 1 / 4, 1])
    np.testing.assert_allclose(hits(similarity, 2), [0, 1 / 2, 2 / 4, 1])
    np.testing.assert_allclose(hits(similarity, 3), [1, 1, 3 / 4, 1])
    np.testing.assert_allclose(hits(similarity, 10), 1)


def test_hits_are_what_random_tie_breaking_gives():
    """Of a few levels, so that ties abound: the mean over random orders of the ties."""
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, (12, 12)).astype(float)
    drawn = []
    for _ in range(4000):
        drawn.append(ranks(similarity + 1e-6 * rng.random(similarity.shape)))
    drawn = np.stack(drawn)
    for k in (1, 3, 5):
        np.testing.assert_allclose(hits(similarity, k), (drawn < k).mean(0), atol=0.04)
    np.testing.assert_allclose(ranks(similarity), drawn.mean(0), atol=0.2)


def test_not_a_number_never_ranks_first():
    similarity = np.array([[np.nan, 1, 2], [0, 5, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(ranks(similarity), [2, 1, 2])
    np.testing.assert_array_equal(hits(similarity, 1), 0)


def test_bootstrap_interval_of_a_share():
    """95 % of a mean of 400 coin tosses is ± 1.96 · 0.5 / 20."""
    tosses = np.arange(400) % 2
    low, high = statistics.bootstrap(tosses)
    assert low == pytest.approx(0.5 - 0.049, abs=0.008)
    assert high == pytest.approx(0.5 + 0.049, abs=0.008)
    # It belongs to the seed.
    assert statistics.bootstrap(tosses) == (low, high)


@pytest.mark.parametrize('at_once', [1, 100, 1000])
def test_bootstrap_of_some_rounds_at_a_time_is_that_of_all_at_once(monkeypatch, at_once):
    """To the digit: a block holds one round, a few, or a part that does not divide them."""
    monkeypatch.setattr(statistics, 'RESAMPLED_AT_ONCE', at_once)
    values = np.random.default_rng(0).random(33)
    rows = np.random.default_rng(5).integers(0, 33, (100, 33))
    draws = np.median(values[rows], axis=1)
    expected = (np.percentile(draws, 2.5), np.percentile(draws, 97.5))
    assert statistics.bootstrap(values, np.median, 5, rounds=100) == expected


def test_bootstrap_interval_of_a_median():
    draws = np.random.default_rng(3).normal(7, 1, 101)
    low, high = statistics.bootstrap(draws, np.median, seed=1)
    assert low < np.median(draws) < high
    assert high - low < 1


# ---- retrieval


def test_a_constant_embedding_scores_chance():
    n = 64
    constant = np.full((n, 5), 5**-0.5, np.float32)
    result = retrieve(embeddings(n, {'va': {'video': constant, 'audio': constant}}))
    for k in (1, 5, 10):
        assert result.scalars[f'audio_to_video/R@{k}'] == pytest.approx(k / n)
        assert result.artifacts[f'audio_to_video/R@{k}/chance'] == pytest.approx(k / n)
    assert result.scalars['audio_to_video/median_rank'] == (n + 1) / 2
    assert result.artifacts['audio_to_video/median_rank/chance'] == (n + 1) / 2


def test_a_perfect_embedding_ranks_first():
    n = 40
    result = retrieve(embeddings(n, {'va': {'video': one_hot(n), 'audio': one_hot(n)}}))
    assert recalls(result, 'audio_to_video') == [1, 1, 1]
    assert result.scalars['audio_to_video/median_rank'] == 1
    assert result.artifacts['audio_to_video/R@1/interval'] == (1, 1)
    assert result.scalars['audio_to_video/clips'] == n
    np.testing.assert_array_equal(result.artifacts['audio_to_video/top'][:, 0], np.arange(n))


def test_a_shifted_embedding_ranks_where_it_belongs():
    """Clip i is nearest to clip i+3, then i+2, i+1, i: rank 4 everywhere."""
    n = 40
    audio = np.zeros((n, n), np.float32)
    for shift, weight in ((3, 4), (2, 3), (1, 2), (0, 1)):
        audio += weight * shifted_one_hot(n, shift)
    result = retrieve(embeddings(n, {'va': {'video': one_hot(n), 'audio': audio}}))
    assert recalls(result, 'audio_to_video') == [0, 1, 1]
    assert result.scalars['audio_to_video/median_rank'] == 4
    np.testing.assert_array_equal(result.artifacts['audio_to_video/top'][0], [3, 2, 1, 0, 4])


def test_direction_and_intervals():
    """The query is the row: with a third of the sounds lost, R@1 is two thirds.

    Sound 3i points at clip 3i + 1, as sound 3i + 1 does.
    """
    n = 90
    audio = one_hot(n)
    audio[::3] = shifted_one_hot(n, 1)[::3]
    result = retrieve(
        embeddings(n, {'va': {'video': one_hot(n), 'audio': audio}}),
        pairs=(('audio', 'video', 'va'), ('video', 'audio', 'va')),
    )
    assert result.scalars['audio_to_video/R@1'] == pytest.approx(2 / 3)
    low, high = result.artifacts['audio_to_video/R@1/interval']
    assert 0.52 < low < 2 / 3 < high < 0.80
    # Video 3i: no sound of its own, so all are tied; 3i + 1: two sounds, tied; 3i + 2: its own.
    expected = (1 / n + 1 / 2 + 1) / 3
    assert result.scalars['video_to_audio/R@1'] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(result.artifacts['audio_to_video/similarity'], audio)


def test_clips_without_a_side_are_left_out():
    n = 30
    silent = np.arange(n) % 5 == 0
    audio = one_hot(n)
    audio[silent] = 7.0  # whatever a tower makes of nothing must not draw anyone
    space = {'va': {'video': one_hot(n), 'audio': audio}}
    result = retrieve(embeddings(n, space, valid={'audio': ~silent}))
    assert result.scalars['audio_to_video/clips'] == 24
    assert result.scalars['audio_to_video/R@1'] == 1
    assert result.artifacts['audio_to_video/R@10/chance'] == pytest.approx(10 / 24)
    assert not set(result.artifacts['audio_to_video/clips']) & set(np.flatnonzero(silent))
    one_sound = embeddings(n, space, valid={'audio': np.arange(n) == 3})
    with pytest.raises(
        ConfigError, match=r"retrieval audio → video: only 1 of 30 clips of split 'test' have both"
    ):
        retrieve(one_sound)


TEXT_TO_VIDEO = (('text', 'video', 'vat'),)


def test_padded_candidates_do_not_count():
    n = 12
    padding = 9 * shifted_one_hot(n, 2)
    spaces = {'vat': {'video': one_hot(n), 'text': np.stack([one_hot(n), padding], 1)}}
    mask = {'text': np.stack([np.ones(n, bool), np.zeros(n, bool)], 1)}
    result = retrieve(embeddings(n, spaces, mask=mask), pairs=TEXT_TO_VIDEO)
    assert result.scalars['text_to_video/R@1'] == 1


def test_text_is_the_mean_of_its_candidates():
    """The mean points at both, at the own clip twice as much."""
    n = 12
    candidates = np.stack([one_hot(n), 0.5 * shifted_one_hot(n, 1)], 1)
    spaces = {'vat': {'video': one_hot(n), 'text': candidates}}
    mask = {'text': np.ones((n, 2), bool)}
    result = retrieve(embeddings(n, spaces, mask=mask), pairs=TEXT_TO_VIDEO)
    expected = np.array([1, 0.5]) / 1.25**0.5
    similarity = result.artifacts['text_to_video/similarity']
    np.testing.assert_allclose(similarity[0, :2], expected, atol=1e-3)


def test_text_is_the_caption_where_there_is_one():
    n = 12
    candidates = np.stack([one_hot(n), 9 * shifted_one_hot(n, 2)], 1)
    caption = shifted_one_hot(n, 1)[:, None]
    spaces = {'vat': {'video': one_hot(n), 'text': candidates, 'text.caption': caption}}
    mask = {
        'text': np.stack([np.ones(n, bool), np.zeros(n, bool)], 1),
        'text.caption': np.ones((n, 1), bool),
    }
    result = retrieve(embeddings(n, spaces, mask=mask), pairs=TEXT_TO_VIDEO)
    assert result.scalars['text_to_video/R@1'] == 0


def test_retrieval_of_what_the_features_lack():
    features = embeddings(4, {'va': {'video': one_hot(4)}})
    with pytest.raises(ConfigError, match="asks for stream 'audio' in space 'va', which has video"):
        retrieve(features)
    with pytest.raises(ConfigError, match="in space 'vat', which has nothing"):
        retrieve(features, pairs=TEXT_TO_VIDEO)


@pytest.mark.parametrize(
    'entry, message',
    [
        (
            {'type': 'retrieval', 'limmit': 3},
            r"config.evals.x.limmit=3: no such field; did you mean 'limit'",
        ),
        (
            {'type': 'knn'},
            r"config.evals.x.type='knn': choose one of retrieval",
        ),
        (
            {'type': 'retrieval', 'change': 'sepia'},
            r"config.evals.x.change='sepia': choose one of single_frame",
        ),
    ],
)
def test_mistakes_of_an_entry_are_sentences(entry, message):
    with pytest.raises(ConfigError, match=message):
        evals.build('x', ConfigDict(entry))


@pytest.fixture
def data_and_outputs():
    """As much of a data object and of a model's outputs as evals.check reads."""
    data = types.SimpleNamespace(
        size=lambda split, by: 0 if split == 'validation' else 8,
        info={'labels': {'class': ['a', 'b']}},
    )
    outputs = types.SimpleNamespace(
        encoded={'video': 0, 'audio': 0},
        spaces={'va': {'video': 0, 'audio': 0}, 'vat': {'video': 0}},
    )
    return data, outputs


@pytest.mark.parametrize(
    'entry, message',
    [
        (
            {'type': 'retrieval', 'split': 'validation'},
            "config.evals.x.split='validation': the data have no such split; "
            'name another, or leave',
        ),
        (
            {'type': 'retrieval', 'pairs': (('text', 'video', 'va'),)},
            "text and video do not meet in space 'va'; spaces are va: audio, video; vat: video",
        ),
        (
            {'type': 'retrieval', 'pairs': (('audio', 'video'),)},
            r"config.evals.x.pairs: expected \(query, gallery, space\).* got \('audio', 'video'\)",
        ),
        (
            {'type': 'sync', 'space': 'joint'},
            "video and audio do not meet in space 'joint'",
        ),
        (
            {'type': 'linear_probe', 'stream': 'text'},
            "config.evals.x.stream='text': the model encodes audio, video",
        ),
        (
            {'type': 'linear_probe', 'beside': ('flow',)},
            "config.evals.x.beside='flow': the model encodes audio, video",
        ),
        (
            {'type': 'neighbours', 'stream': 'flow', 'beside': ('text',), 'beside_run': 'r'},
            "config.evals.x.stream='flow': the model encodes audio, video",
        ),
        (
            {'type': 'simple_probe', 'beside': ('audio',)},
            r'config.evals.x.beside: expected none \(a simple probe sees one stream\)',
        ),
        (
            {'type': 'linear_probe', 'label': 'colour'},
            "config.evals.x.label='colour': the data have class",
        ),
        (
            {'type': 'classification', 'label': 'colour'},
            "config.evals.x.label='colour'",
        ),
        (
            {'type': 'linear_probe', 'test_limit': 0},
            'config.evals.x.test_limit: expected a positive number, got 0',
        ),
        (
            {'type': 'linear_probe', 'strengths': (0,)},
            r'config.evals.x.strengths: expected positive numbers, got \(0,\)',
        ),
    ],
)
def test_what_data_and_model_lack_is_an_error_before_anything_is_computed(
    entry, message, data_and_outputs
):
    with pytest.raises(ConfigError, match=message):
        evals.check(ConfigDict({'x': entry}), *data_and_outputs)


@pytest.mark.parametrize('kind', ['linear_probe', 'neighbours'])
def test_sentences_are_not_probed(kind, data_and_outputs):
    data, outputs = data_and_outputs
    encoded = {**outputs.encoded, 'text': outputs.encoded['video']}
    outputs = types.SimpleNamespace(encoded=encoded, spaces=outputs.spaces)
    evaluator = evals.build('x', ConfigDict({'type': kind, 'stream': 'text'}))
    with pytest.raises(ConfigError, match='config.evals.x.stream: .* one for each sentence'):
        evaluator.check(data, outputs)


def test_entries_that_data_and_model_can_answer_pass_the_check(data_and_outputs):
    entries = {
        'a': {'type': 'retrieval', 'pairs': (('audio.shifted', 'video', 'va'),)},
        'b': {'type': 'linear_probe'},
        'c': {'type': 'sync'},
    }
    evals.check(ConfigDict(entries), *data_and_outputs)


# ---- synchrony


def sync(features):
    """The result of a synchrony evaluator."""
    return run_evaluator(KnownFeatures({'test': features}), 's', type='sync', seconds=0.5)


def sync_of_sounds(audio, shifted, valid=None):
    """The result for clips that are one-hot, their sounds and their shifted sounds."""
    n = len(audio)
    space = {'va': {'video': one_hot(n), 'audio': audio, 'audio.shifted': shifted}}
    return sync(embeddings(n, space, valid=valid))


def test_sync_counts_clips_nearer_to_their_own_sound():
    own, other = one_hot(8), shifted_one_hot(8, 1)
    assert sync_of_sounds(own, other).scalars['accuracy'] == 1
    assert sync_of_sounds(other, own).scalars['accuracy'] == 0


def test_sync_counts_ties_as_halves():
    own = one_hot(8)
    tied = sync_of_sounds(own, own)
    assert tied.scalars['accuracy'] == 0.5
    assert tied.artifacts['accuracy/chance'] == 0.5


def test_sync_of_a_share_of_the_clips():
    own, other = one_hot(8), shifted_one_hot(8, 1)
    in_first_six = np.arange(8)[:, None] < 6
    audio = np.where(in_first_six, own, other)
    result = sync_of_sounds(audio, np.where(in_first_six, other, own))
    assert result.scalars['accuracy'] == 0.75
    low, high = result.artifacts['accuracy/interval']
    assert low < 0.75 < high

    # Only the first four clips have a shifted sound, and all of them are right.
    in_last_four = np.arange(8) >= 4
    shifted = np.where(in_last_four[:, None], own, other)
    result = sync_of_sounds(audio, shifted, valid={'audio.shifted': ~in_last_four})
    assert result.scalars['accuracy'] == 1


def test_sync_mistakes_are_sentences():
    with pytest.raises(ConfigError, match="asks for stream 'audio' in space 'va', which has video"):
        sync(embeddings(3, {'va': {'video': one_hot(3)}}))
    with pytest.raises(ConfigError, match='none of 3 clips'):
        sync_of_sounds(one_hot(3), one_hot(3), valid={'audio': np.zeros(3, bool)})


def sync_features(n, seed=0):
    """Features of clips on both sides of the threshold, at several lengths."""
    rng = np.random.default_rng(seed)
    raw = {'video': rng.normal(size=(n, 3))}
    raw['audio'] = raw['video'] + rng.normal(size=(n, 3)) * rng.uniform(0.1, 1.5, (n, 1))
    # In the direction of the video, and too long: near by the cosine, far by the distance.
    raw['audio.shifted'] = 2 * raw['video'] + rng.normal(size=(n, 3))
    spaces, all_lengths = {}, {}
    for stream, x in raw.items():
        length = np.linalg.norm(x, axis=-1)
        spaces[stream] = x / length[:, None]
        all_lengths[stream] = length
    return raw, {**embeddings(n, {'va': spaces}), 'lengths': {'va': all_lengths}}


def test_sync_by_distance_compares_embeddings_as_they_are():
    raw, features = sync_features(50)
    result = run_evaluator(KnownFeatures({'test': features}), type='sync', measure='distance')
    own = np.linalg.norm(raw['video'] - raw['audio'], axis=1)
    other = np.linalg.norm(raw['video'] - raw['audio.shifted'], axis=1)
    assert result.scalars == {'accuracy': np.mean(own < other)}
    by_cosine = run_evaluator(KnownFeatures({'test': features}), type='sync')
    assert by_cosine.scalars['accuracy'] != result.scalars['accuracy']


@pytest.mark.parametrize('against', ['shifted', 'other'])
def test_sync_decides_by_the_best_threshold_of_another_split(against):
    raw, features = sync_features(60)
    raw_validation, validation = sync_features(40, seed=1)
    view = KnownFeatures({'test': features, 'validation': validation})
    result = run_evaluator(
        view,
        type='sync',
        measure='distance',
        threshold_split='validation',
        against=against,
        apart=0.5,
    )

    def distances(raw):
        """(own, other) of each clip."""
        other = raw['audio.shifted']
        if against == 'other':
            other = np.roll(raw['audio'], len(other) // 2, axis=0)
        own = np.linalg.norm(raw['video'] - raw['audio'], axis=1)
        return own, np.linalg.norm(raw['video'] - other, axis=1)

    def correct(raw, threshold):
        own, other = distances(raw)
        return 0.5 * ((own < threshold).mean() + (other >= threshold).mean())

    # All thresholds that tell the pairs of the validation split in different ways, tried in turn.
    known = np.sort(np.concatenate(distances(raw_validation)))
    candidates = [0.0, *(known[1:] + known[:-1]) / 2, 9.0]
    accuracies = np.array([correct(raw_validation, threshold) for threshold in candidates])
    # Of equally good ones that of the largest distance, which is the lowest nearness.
    best = candidates[np.flatnonzero(accuracies == accuracies.max())[-1]]
    np.testing.assert_allclose(result.scalars['binary_accuracy'], correct(raw, best))
    assert 0.5 < result.scalars['binary_accuracy'] < result.scalars['accuracy'] + 0.2
    assert result.artifacts['binary_accuracy/chance'] == 0.5
    low, high = result.artifacts['binary_accuracy/interval']
    assert low < result.scalars['binary_accuracy'] < high

    asked = [request.get('views') for _, request in view.requests]
    far = {'audio.shifted': {'kind': 'shift', 'seconds': 'random', 'apart': 0.5}}
    assert asked == [None if against == 'other' else far] * 2


@pytest.mark.parametrize(
    'match, mismatch, expected',
    [
        ([3, 4], [1, 2], 2.5),
        ([1, 2], [3, 4], -np.inf),  # all are called in sync, as good as none
        ([2, 2, 5], [2, 2, 2, 1], 3.5),  # equal scores stay together
        ([1, 1], [1, 1], -np.inf),
    ],
)
def test_best_threshold(match, mismatch, expected):
    assert synchrony.best_threshold(np.float64(match), np.float64(mismatch)) == expected


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'measure': 'dot'}, "config.evals.x.measure='dot': choose one of cosine, distance"),
        ({'against': 'all'}, "config.evals.x.against='all': choose one of shifted, other"),
    ],
)
def test_sync_fields_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        evals.build('x', ConfigDict({'type': 'sync', **fields}))


def test_the_split_of_the_threshold_is_checked():
    outputs = types.SimpleNamespace(spaces={'va': ('video', 'audio')})
    data = types.SimpleNamespace(info={}, size=lambda split, by: 10 * (split == 'test'))
    entry = ConfigDict({'type': 'sync', 'threshold_split': 'validation'})
    with pytest.raises(
        ConfigError, match=r"x\.threshold_split='validation': the data have no such"
    ):
        evals.build('x', entry).check(data, outputs)


# ---- probes


def blobs(n, classes, apart, seed, width=6):
    """Features [n width] around one corner per class, and their classes [n]."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return apart * np.eye(classes, width)[y] + rng.normal(size=(n, width)), y


def probe(train_set, test_set, **fields):
    """The result of a linear probe of (x, y) pairs, and the view with its requests."""
    features = {'train': labelled(*train_set), 'test': labelled(*test_set)}
    view = KnownFeatures(features, labels=['a', 'b', 'c'])
    return run_evaluator(view, 'p', type='linear_probe', **fields), view


def solve(name, x, y, x_test, strengths=(), epochs=1000):
    """(scores [N W P], C) of a solver; x_test [N D] or [N W D]."""
    if x_test.ndim == 2:
        x_test = x_test[:, None]
    config = ConfigDict({'strengths': strengths, 'epochs': epochs})
    num_classes = int(y.max()) + 1
    return solvers.SOLVERS[name](x, y, x_test, num_classes, config, 0)


def accuracy_of(scores, y):
    """Share of the rows of scores [N P] whose largest one is that of the class."""
    return (scores.argmax(-1) == y).mean()


def test_linear_probe_on_separable_features():
    result, view = probe(
        blobs(120, 3, 30.0, 0), blobs(60, 3, 30.0, 1), train_limit=120, test_limit=60
    )
    assert result.scalars['accuracy'] == 1
    assert result.artifacts['accuracy/interval'] == (1, 1)
    assert result.artifacts['accuracy/chance'] == pytest.approx(1 / 3)
    assert result.artifacts['train'] == 120
    assert result.artifacts['test'] == 60
    np.testing.assert_array_equal(result.artifacts['confusion'], 20 * np.eye(3))
    limits = [(split, request['limit']) for split, request in view.requests]
    assert limits == [('train', 120), ('test', 60)]


def test_linear_probe_on_meaningless_features():
    result, _ = probe(blobs(300, 3, 0.0, 2), blobs(300, 3, 0.0, 3))
    assert abs(result.scalars['accuracy'] - 1 / 3) < 0.11
    low, high = result.artifacts['accuracy/interval']
    assert low < result.scalars['accuracy'] < high
    assert result.artifacts['confusion'].sum() == 300


def test_linear_probe_does_not_mind_scale():
    """The features that separate the classes are a million times smaller than the others."""
    (x, y), (x_test, y_test) = blobs(120, 3, 30.0, 0), blobs(60, 3, 30.0, 1)
    scale = np.array([1e-6, 1e-6, 1e-6, 1, 1, 1])
    result, _ = probe((x * scale, y), (x_test * scale, y_test))
    assert result.scalars['accuracy'] == 1


def test_linear_probe_leaves_unknown_labels_out():
    x_test, y_test = blobs(60, 3, 30.0, 1)
    y_test = np.where(np.arange(60) < 20, -1, y_test)
    result, _ = probe(blobs(120, 3, 30.0, 0), (x_test, y_test))
    assert result.artifacts['test'] == 40
    assert result.scalars['accuracy'] == 1
    assert result.artifacts['unlabelled'] == 20
    assert result.remarks == [
        "20 of 60 clips of split 'test' have no label 'class' and are left out"
    ]


def test_clips_without_the_stream_are_not_told_as_unlabelled():
    x, y = blobs(60, 3, 30.0, 1)
    part = labelled(x, np.where(np.arange(60) < 20, -1, y))
    part['valid'] = {'video': np.arange(60) >= 5}
    train = labelled(*blobs(120, 3, 30.0, 0))
    view = KnownFeatures({'train': train, 'test': part}, labels=['a', 'b', 'c'])
    result = run_evaluator(view, 'p', type='linear_probe')
    assert result.artifacts['unlabelled'] == 15
    assert "15 of 55 clips of split 'test'" in result.remarks[0]


def test_all_labelled_clips_need_no_remark():
    result, _ = probe(blobs(120, 3, 30.0, 0), blobs(60, 3, 30.0, 1))
    assert (result.artifacts['unlabelled'], result.remarks) == (0, [])


@pytest.mark.parametrize(
    'entry, count',
    [
        ({'type': 'neighbours', 'of': 'pooled', 'windows': 1, 'first': (1,)}, 20),
        ({'type': 'clustering', 'of': 'features', 'streams': ('video',), 'clusters': 3}, 10),
    ],
)
def test_evaluators_by_class_tell_of_clips_without_one(entry, count):
    x, y = blobs(60, 3, 30.0, 1)
    parts = {}
    for split in ('train', 'test'):
        parts[split] = labelled(x, np.where(np.arange(60) < 10, -1, y))
        parts[split]['index'] = np.arange(60)
    view = KnownFeatures(parts, labels=['a', 'b', 'c'])
    view.encoder.mesh = sharding.make_mesh({'replica': -1})
    result = run_evaluator(view, 'x', **entry)
    assert result.artifacts['unlabelled'] == count
    assert '10 of 60 clips of split ' in result.remarks[0]


def test_regularisation_is_chosen_by_what_generalises():
    """Useless features need a strong penalty (small C), small differences a weak one."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    useful = 2 * y[:, None] + rng.normal(size=(200, 3))
    noisy = np.concatenate([useful, rng.normal(size=(200, 150))], 1)
    # Two features whose small difference is what separates the classes.
    base = rng.normal(size=(200, 1))
    difference = 0.05 * rng.normal(size=(200, 1)) + 0.06 * (2 * y[:, None] - 1)
    alike = np.concatenate([base, base + difference], 1)

    _, strength = solve('logistic', noisy, y, noisy[:5], (1e-4, 1e3))
    assert strength == 1e-4
    scores, strength = solve('logistic', alike, y, alike[:7], (1e-4, 1e3))
    assert strength == 1e3
    chex.assert_shape(scores, (7, 1, 2))
    _, strength = solve('logistic', alike, y, alike[:7], (3.0,))
    assert strength == 3.0


def test_probe_mistakes_are_sentences():
    x, y = blobs(20, 2, 5.0, 0)
    with pytest.raises(ConfigError, match="stream 'flow' is not among video"):
        probe((x, y), (x, y), stream='flow')
    with pytest.raises(ConfigError, match="label 'colour' is not among class"):
        probe((x, y), (x, y), label='colour')
    with pytest.raises(ConfigError, match="label 'class' has 20 labelled examples of 1 classes"):
        probe((x, np.zeros(20, int)), (x, y))
    with pytest.raises(ConfigError, match='multi-hot'):
        probe((x, np.eye(20, dtype=int)), (x, y))


def test_mean_color_is_mean_and_deviation_of_each_channel():
    frames = np.zeros((2, 3, 4, 4, 3), np.uint8)
    frames[0, ..., 0] = 200
    frames[1, :, :2, :, 2] = 100
    expected = [[200, 0, 0, 0, 0, 0], [0, 0, 50, 0, 0, 50]]
    np.testing.assert_allclose(mean_color(frames), expected, atol=1e-4)


def test_mean_spectrum_has_its_peak_at_the_tone():
    seconds = np.arange(8000) / 8000
    for pitch in (500, 2000):
        tone = (9000 * np.sin(2 * np.pi * pitch * seconds + 1)).astype(np.int16)
        spectrum = mean_spectrum(tone[None])
        chex.assert_shape(spectrum, (1, 128))
        assert spectrum[0].argmax() + 1 == round(pitch * 256 / 8000)
    silence = mean_spectrum(np.zeros((1, 8000), np.int16))
    assert silence[0] == pytest.approx(np.log(1e-3))


# ---- several windows


def unit(x):
    """Vectors [… D] divided by their lengths."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_both_zero_shot_variants_over_windows():
    """Two windows of video against one caption.

    'embeddings': the cosine of the mean of the embeddings before normalisation; 'similarities': the
    mean of the cosines.
    """
    n = 20
    rng = np.random.default_rng(0)
    video = rng.normal(size=(2, n, 6)) * rng.uniform(0.1, 9, (2, n, 1))  # [window clip E]
    text = rng.normal(size=(n, 6))
    features = {}
    for w in range(2):
        space = {'vat': {'video': unit(video[w]), 'text.caption': unit(text)[:, None]}}
        lengths = {'video': np.linalg.norm(video[w], axis=-1), 'text.caption': np.ones((n, 1))}
        part = embeddings(n, space, mask={'text.caption': np.ones((n, 1), bool)})
        features['test', w, None] = {**part, 'lengths': {'vat': lengths}}
    # A window that cannot be read: the other one speaks for the clip.
    features['test', 1, None]['valid']['video'][3] = False
    has_one_window = np.arange(n) == 3

    def similarity(pool):
        view = KnownFeatures(features)
        fields = {'type': 'retrieval', 'windows': 2, 'pool': pool, 'pairs': TEXT_TO_VIDEO}
        return run_evaluator(view, 'r', **fields).artifacts['text_to_video/similarity']

    mean_video = np.where(has_one_window[:, None], video[0], video.mean(0))
    cosine_of_mean = unit(text) @ unit(mean_video).T
    np.testing.assert_allclose(similarity('embeddings'), cosine_of_mean, atol=2e-3)
    cosines = np.einsum('te,wge->tgw', unit(text), unit(video))
    mean_cosine = np.where(has_one_window, cosines[..., 0], cosines.mean(-1))
    np.testing.assert_allclose(similarity('similarities'), mean_cosine, atol=2e-3)
    assert np.abs(mean_cosine - cosine_of_mean).max() > 0.05
    with pytest.raises(
        ConfigError, match=r"config.evals.r.pool='median': choose one of embeddings, similarities"
    ):
        similarity('median')


def test_probe_averages_probabilities_over_windows_and_scores_over_folds():
    x, y = blobs(90, 3, 4.0, 0)
    rng = np.random.default_rng(5)
    fold = np.arange(90) // 30
    has_fold = np.arange(90) != 7

    def features(noise):
        part = labelled(x + noise, y)
        part['labels']['part'] = np.where(has_fold, fold, -1)
        return part

    parts = {'train': features(0)}
    for w in range(2):
        parts['train', w, None] = features(rng.normal(size=x.shape))
    view = KnownFeatures(parts, labels=['a', 'b', 'c'])
    view.data.info['labels']['part'] = ['one', 'two', 'three']
    fields = {
        'type': 'linear_probe',
        'windows': 2,
        'strengths': (1.0,),
        'folds': (('part', 'one'), ('part', 'three')),
    }
    result = run_evaluator(view, 'p', **fields)

    accuracies = []
    for k in (0, 2):
        test = (fold == k) & has_fold
        train = (fold != k) & has_fold
        scores = []
        for w in range(2):
            x_test = parts['train', w, None]['pooled']['video'][test]
            window_scores, _ = solve('logistic', x[train], y[train], x_test, (1.0,))
            scores.append(window_scores[:, 0])
        accuracies.append(accuracy_of(np.mean(scores, 0), y[test]))
    assert result.scalars['accuracy'] == pytest.approx(np.mean(accuracies))
    assert result.artifacts['test'] == 59
    assert result.artifacts['train'] == 119
    with pytest.raises(
        ConfigError,
        match=r"folds has \('part', 'ten'\); the classes of that label are one, two, three",
    ):
        run_evaluator(view, 'p', **{**fields, 'folds': (('part', 'ten'),)})


def two_streams(rng, counts):
    """Windows {(split, window): features} of pictures and sound that tell apart other classes.

    Pictures confuse the classes 0 and 1, sound the classes 1 and 2; one clip in six has no sound.
    """
    parts = {}
    for split, num_windows, count in counts:
        y = rng.integers(0, 3, count)
        has_sound = rng.uniform(size=count) < 5 / 6
        for w in range(num_windows):
            corners = np.eye(3)
            pictures = corners[np.maximum(y, 1)] + 0.3 * rng.normal(size=(count, 3))
            sound = 4 * corners[np.minimum(y, 1)] + 0.9 * rng.normal(size=(count, 3))
            part = labelled(pictures, y)
            part['pooled']['audio'] = np.concatenate([sound, sound**2], 1)  # of another width
            part['valid']['audio'] = has_sound
            parts[(split, w, None) if num_windows > 1 else split] = part
    return parts


@pytest.mark.parametrize('run', ['', 'runs/sound'], ids=['one model', 'two models'])
def test_a_two_stream_probe_averages_the_probabilities_of_two_classifiers(run):
    """Class by class in float64, over windows and then over streams; of one model, or of two."""
    parts = two_streams(np.random.default_rng(3), (('train', 1, 90), ('test', 2, 70)))
    view = KnownFeatures(parts, labels=['a', 'b', 'c'])
    asked = []
    if run:
        # Each model has its own stream alone.
        other = {}
        for key, part in parts.items():
            other[key] = {**part, 'pooled': {'audio': part['pooled']['audio']}}
            part['pooled'] = {'video': part['pooled']['video']}

        def of_run(name):
            asked.append(name)
            return KnownFeatures(other)

        view.of_run = of_run
    fields = {'windows': 2, 'strengths': (0.3,), 'beside': ('audio',), 'beside_run': run}
    result = run_evaluator(view, 'p', type='linear_probe', **fields)

    has_sound = {key: part['valid']['audio'] for key, part in parts.items()}
    sources = {'video': parts, 'audio': other if run else parts}
    total, alone = 0, []
    y_test = parts['test', 0, None]['labels']['class'][has_sound['test', 0, None]]
    for stream, source in sources.items():
        x = source['train']['pooled'][stream][has_sound['train']]
        y = source['train']['labels']['class'][has_sound['train']]
        probabilities = []
        for w in range(2):
            x_test = source['test', w, None]['pooled'][stream][has_sound['test', w, None]]
            scores, _ = solve('logistic', x, y, x_test, (0.3,))
            probabilities.append(scores[:, 0])
        alone.append([stream, pytest.approx(accuracy_of(np.mean(probabilities, 0), y_test))])
        total = total + np.mean(probabilities, 0) / 2
    assert result.scalars['accuracy'] == pytest.approx(accuracy_of(total, y_test))
    assert [list(pair) for pair in result.artifacts['accuracy/streams']] == alone
    # Neither stream alone tells what both tell.
    assert result.scalars['accuracy'] > max(pair[1].expected for pair in alone) + 0.1
    assert result.artifacts['test'] == len(y_test)
    assert set(asked) == ({run} if run else set())


def head_init(width=7, num_classes=3):
    """Initial parameters of VATT's probe of four features."""
    return solvers._head_init(jax.random.key(3), 4, width, num_classes)


def head_fit(x, y, batch, epochs):
    """VATT's probe after its training, without dropout."""
    rate, dropout, decay = 5e-4, 0.0, 0.1
    return solvers._head_fit(
        head_init(),
        jax.random.key(0),
        jnp.float32(x),
        jnp.array(y),
        batch,
        rate,
        dropout,
        decay,
        epochs,
    )


def test_published_head_takes_the_published_step():
    """One step on the mean cross entropy plus 0.1 |W|², written out in float64.

    Keras's first step of Adam: w − 5e-4 · √0.001 g / (√0.001 |g| + 1e-7).
    """
    n, num_classes = 5, 3
    x, y = blobs(n, num_classes, 1.0, 0, width=4)
    start = jax.tree.map(np.float64, head_init())
    hidden = x @ start['in']
    logits = hidden @ start['out']
    error = statistics.softmax(logits) - np.eye(num_classes)[y]
    gradients = {
        'out': hidden.T @ error / n + 0.2 * start['out'],
        'out_bias': error.mean(0),
        'in': x.T @ error @ start['out'].T / n,
        'in_bias': (error @ start['out'].T).mean(0),
    }
    expected = {}
    for name, gradient in gradients.items():
        step = np.sqrt(1e-3) * gradient / (np.sqrt(1e-3) * np.abs(gradient) + 1e-7)
        expected[name] = start[name] - 5e-4 * step
    params = head_fit(x, y, batch=n, epochs=1)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, head_init())
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-7)


def test_a_last_batch_of_one_example_counts_as_much_as_a_full_one():
    """All examples are the same: batches of four and one take the steps of two batches of five."""
    x, _ = blobs(5, 3, 1.0, 0, width=4)
    same_x, same_y = np.tile(x[:1], (5, 1)), np.zeros(5, int)
    uneven = head_fit(same_x, same_y, batch=4, epochs=1)
    even = head_fit(same_x, same_y, batch=5, epochs=2)
    chex.assert_trees_all_close(uneven, even, rtol=1e-7, atol=1e-7)


def test_published_classifiers_classify():
    (x, y), (x_test, y_test) = blobs(150, 3, 6.0, 0), blobs(60, 3, 6.0, 1)
    windows = np.stack([x_test, x_test + 0.1], 1)
    scores, strength = solve('head', x, y, windows, epochs=150)
    chex.assert_shape(scores, (60, 2, 3))
    assert strength is None
    assert accuracy_of(scores.mean(1), y_test) > 0.95
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)

    values, strength = solve('svm', x, y, windows)
    chex.assert_shape(values, (60, 2, 3))
    assert strength == 6e-5
    assert accuracy_of(values.mean(1), y_test) > 0.9


def test_support_vector_machine_of_two_classes():
    (x, y), (x_test, y_test) = blobs(150, 3, 6.0, 0), blobs(60, 3, 6.0, 1)
    values, _ = solve('svm', x[y < 2], y[y < 2], x_test)
    chex.assert_shape(values, (60, 1, 2))
    assert accuracy_of(values[y_test < 2, 0], y_test[y_test < 2]) > 0.9


# ---- nearest neighbours


def neighbours(queries, gallery, **fields):
    """The result of a neighbours evaluator, and the view with its requests.

    queries, gallery: ({window: x [N F]}, classes [N]).
    """
    parts = {}
    for split, (windows, y) in (('test', queries), ('train', gallery)):
        for w, x in windows.items():
            parts[split, w, None] = {**labelled(x, y), 'maps': {'video': x}}
    view = KnownFeatures(parts)
    fields = {'type': 'neighbours', 'windows': 2, 'of': 'maps', **fields}
    return run_evaluator(view, 'n', **fields), view


def neighbour_windows(rng, y):
    """Two windows of features around the corners of classes; the second is 31 times as long."""
    windows = {}
    for w in range(2):
        x = np.eye(4, 6)[y] + 0.8 * rng.normal(size=(len(y), 6))
        windows[w] = ((1 + w * 30) * x).astype(np.float32)
    return windows


def test_neighbours_are_those_of_the_mean_of_unit_features():
    """By loops over pairs in float64; a query without a class is left out.

    Of two windows the longer one weighs no more.
    """
    rng = np.random.default_rng(0)
    y, classes = rng.integers(-1, 4, 30), rng.integers(0, 4, 50)
    queries = neighbour_windows(rng, y)
    gallery = neighbour_windows(rng, classes)
    query_mean = np.mean([unit(x.astype(float)) for x in queries.values()], 0)
    gallery_mean = np.mean([unit(x.astype(float)) for x in gallery.values()], 0)
    result, view = neighbours((queries, y), (gallery, classes), first=(1, 3, 10))
    for k in (1, 3, 10):
        hits = []
        for i in np.flatnonzero(y >= 0):
            distances = ((query_mean[i] - gallery_mean) ** 2).sum(-1)
            nearest = np.argsort(distances, kind='stable')[:k]
            hits.append(y[i] in classes[nearest])
        recall = np.mean(hits)
        assert recall > 0.2
        assert result.scalars[f'R@{k}'] == pytest.approx(recall)
        low, high = result.artifacts[f'R@{k}/interval']
        assert low <= recall <= high

        drawn = []
        for _ in range(400):
            for query_class in y[y >= 0]:
                drawn.append(query_class in classes[rng.choice(50, k, replace=False)])
        assert result.artifacts[f'R@{k}/chance'] == pytest.approx(np.mean(drawn), abs=0.02)
    for _, request in view.requests:
        assert request['maps'] == ('video',)
    pooled, _ = neighbours((queries, y), (gallery, classes), first=(1, 3, 10), of='pooled')
    chex.assert_trees_all_equal(pooled.scalars, result.scalars)


def test_neighbours_of_centred_means_are_cosines_of_two_streams():
    """CoCLR's retrieval by loops over pairs in float64, of one stream and of two.

    Each split is centred by its own mean; clips that lack a stream or a class are left out. The
    gallery lies apart from the queries, which centring undoes.
    """
    rng = np.random.default_rng(1)
    parts, means, kept = {}, {}, {}
    for split, count, offset in (('test', 30, 0.0), ('train', 50, 7.0)):
        y = rng.integers(-1, 4, count)
        has_sound = rng.uniform(size=count) < 0.8
        windows = {}
        for stream in ('video', 'audio'):
            windows[stream] = [offset + x for x in neighbour_windows(rng, y).values()]
        for w in range(2):
            part = labelled(windows['video'][w], y)
            part['pooled']['audio'] = windows['audio'][w]
            part['valid']['audio'] = has_sound
            parts[split, w, None] = part
        kept[split] = y, has_sound
        means[split] = {name: np.mean(x, 0, dtype=np.float64) for name, x in windows.items()}

    for beside in ((), ('audio',)):
        features, classes = {}, {}
        for split, (y, has_sound) in kept.items():
            is_used = (y >= 0) & (has_sound if beside else True)
            classes[split] = y[is_used]
            features[split] = []
            for stream in ('video', *beside):
                x = means[split][stream][is_used]
                features[split].append(unit(x - x.mean(0)))
        hits = []
        for i, query_class in enumerate(classes['test']):
            cosines = np.zeros(len(classes['train']))
            for queries, gallery in zip(features['test'], features['train'], strict=True):
                cosines += gallery @ queries[i] / len(features['test'])
            nearest = np.argsort(-cosines, kind='stable')[:3]
            hits.append(query_class in classes['train'][nearest])
        fields = {'windows': 2, 'of': 'pooled', 'unit': 'mean', 'centre': True, 'first': (1, 3, 10)}
        view = KnownFeatures(parts)
        result = run_evaluator(view, 'n', type='neighbours', beside=beside, **fields)
        assert result.scalars['R@3'] == pytest.approx(np.mean(hits))
        assert result.artifacts['queries'] == len(hits)
        if beside:
            # The same where the sound is another model's.
            other = KnownFeatures(parts)
            view.of_run = {'runs/sound': other}.get
            of_two = run_evaluator(
                view, 'n', type='neighbours', beside=beside, beside_run='runs/sound', **fields
            )
            chex.assert_trees_all_equal(of_two.scalars, result.scalars)
            assert other.requests
        # Without centring the two splits would not lie over one another.
        apart = run_evaluator(
            view, 'n', type='neighbours', beside=beside, **{**fields, 'centre': False}
        )
        assert apart.scalars != result.scalars


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'unit': 'clips'}, 'unit=.clips.: choose one of windows, mean'),
        ({'beside': ('flow',)}, "stream 'flow' is not among video"),
        ({'first': (1, 60)}, 'the gallery has 50 clips, fewer than the 60 neighbours'),
        ({'first': ()}, 'first: expected numbers of neighbours'),
        ({'beside_run': 'runs/flow'}, "beside_run='runs/flow': expected the streams that its"),
        ({'stream': 'flow'}, "stream 'flow' is not among video"),
        ({'label': 'colour'}, "label 'colour' is not among"),
    ],
)
def test_neighbours_mistakes_are_sentences(fields, message):
    rng = np.random.default_rng(0)
    y, classes = rng.integers(-1, 4, 30), rng.integers(0, 4, 50)
    queries = neighbour_windows(rng, y)
    gallery = neighbour_windows(rng, classes)
    with pytest.raises(ConfigError, match=message):
        neighbours((queries, y), (gallery, classes), **{'first': (1,), **fields})


def test_mmv_probe_standardises_learns_from_passes_and_averages_decisions():
    """Against scikit-learn, written out.

    Scaler and machine see every pass, windows are scaled by the same numbers, decision values are
    averaged.
    """
    (x, y), (x_test, y_test) = blobs(60, 3, 2.0, 0), blobs(45, 3, 2.0, 1)
    rng = np.random.default_rng(5)
    # As they are, the first feature would decide; the last is constant.
    scale = np.array([1e3, 1, 1, 1e-3, 1, 0])

    def near(x):
        return (x + rng.normal(size=x.shape)) * scale

    parts = {}
    for i in range(3):
        parts['train', f'probe {i}'] = labelled(near(x), y)
    for w in range(4):
        parts['test', w, None] = labelled(near(x_test), y_test)
    view = KnownFeatures(parts, labels=['a', 'b', 'c'])
    fields = {
        'type': 'linear_probe',
        'solver': 'svm',
        'standardise': True,
        'passes': 3,
        'windows': 4,
        'strengths': (1e-2,),
    }
    result = run_evaluator(view, 'p', **fields)

    every_pass = np.concatenate([parts['train', f'probe {i}']['pooled']['video'] for i in range(3)])
    scaler = StandardScaler().fit(every_pass)
    machine = LinearSVC(C=1e-2, random_state=0).fit(scaler.transform(every_pass), np.tile(y, 3))
    values = []
    for w in range(4):
        window = scaler.transform(parts['test', w, None]['pooled']['video'])
        values.append(machine.decision_function(window))
    predicted = np.mean(values, 0).argmax(-1)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (y_test, predicted), 1)
    np.testing.assert_array_equal(result.artifacts['confusion'], confusion)
    assert result.scalars['accuracy'] == pytest.approx((predicted == y_test).mean())
    assert result.scalars['C'] == 1e-2
    assert result.artifacts['train'] == 180
    assert result.artifacts['test'] == 45

    plain = run_evaluator(view, 'p', **{**fields, 'standardise': False})
    assert not np.array_equal(plain.artifacts['confusion'], confusion)
    with pytest.raises(
        ConfigError,
        match=r'config.evals.p.strengths: .* with passes=3, got \(0.1, 1.0\).* Give one strength',
    ):
        evals.build('p', ConfigDict({**fields, 'strengths': (0.1, 1.0)}))
    # Without strengths logistic regression chooses among three of its own, the machine has one.
    undecided = {**fields, 'strengths': ()}
    evals.build('p', ConfigDict(undecided))
    with pytest.raises(ConfigError, match=r'with passes=3, got \(0.01, 0.1, 1.0\)'):
        evals.build('p', ConfigDict({**undecided, 'solver': 'logistic'}))
    with pytest.raises(ConfigError, match='passes: expected a number of passes, .* got -1'):
        evals.build('p', ConfigDict({**fields, 'passes': -1}))


def product_labels(rng, n):
    """Features [n 4] and labels [n 3].

    Labels 0 and 1 are the sign of a product, which no linear classifier can learn; label 2 is the
    sign of one feature.
    """
    x = rng.normal(size=(n, 4))
    product = x[:, 0] * x[:, 1]
    labels = np.stack([product > 0, product < 0, x[:, 2] > 0], 1)
    return x, labels.astype(np.float32)


def test_mlp_probe_of_several_labels():
    rng = np.random.default_rng(0)
    (x, y), (x_test, y_test) = product_labels(rng, 600), product_labels(rng, 200)
    train = labelled(9 * x + 5, y, 'audio', 'tags')
    test = labelled(9 * x_test + 5, y_test, 'audio', 'tags')
    # The first clip of each split has no sound.
    train['valid']['audio'][0] = False
    test['valid']['audio'][0] = False
    view = KnownFeatures({'train': train, ('test', 0, None): test, ('test', 1, None): test})
    fields = {
        'type': 'linear_probe',
        'stream': 'audio',
        'label': 'tags',
        'solver': 'mlp',
        'epochs': 20,
        'windows': 2,
    }
    result = run_evaluator(view, 'p', **fields)
    assert result.scalars['mAP'] > 0.9
    assert result.scalars['AUC'] > 0.9
    assert result.artifacts['train'] == 599
    assert result.artifacts['test'] == 199

    config = ConfigDict({'epochs': 20})
    scores, _ = solvers.mlp(9 * x[1:] + 5, y[1:], 9 * x_test[1:, None] + 5, 3, config, 0)
    chex.assert_shape(scores, (199, 1, 3))
    expected = average_precision_score(y_test[1:], scores[:, 0], average='macro')
    assert result.scalars['mAP'] == pytest.approx(expected)
    with pytest.raises(
        ConfigError,
        match="label 'tags' is multi-hot; expected a single class per example, or solver='mlp'",
    ):
        run_evaluator(view, 'p', **{**fields, 'solver': 'svm'})


def test_mlp_probe_of_one_class_a_clip_is_a_softmax():
    rng = np.random.default_rng(0)
    (x, y), (x_test, y_test) = product_labels(rng, 600), product_labels(rng, 200)
    config = ConfigDict({'epochs': 20})
    scores, _ = solvers.mlp(x, y[:, 0].astype(int), x_test[:, None], 2, config, 0)
    chex.assert_shape(scores, (200, 1, 2))
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    assert accuracy_of(scores[:, 0], y_test[:, 0]) > 0.85


# ---- a real encoder


def test_scores_of_a_tiny_run(tiny_run):
    """Every evaluator has a result, and those that ask for one a baseline, chance and interval."""
    folder, config, _ = tiny_run
    trained = evals.load(folder / 'evals' / 'step_000002')
    random = evals.load(folder / 'evals' / 'random_init')
    assert set(trained) == set(config.evals)
    assert set(random) == {'retrieval', 'sync', 'probe_video'}
    for query in ('text', 'audio'):
        for name in ('R@1', 'R@5', 'R@10', 'median_rank'):
            assert f'{query}_to_video/{name}' in trained['retrieval'].scalars
    assert trained['retrieval'].scalars['text_to_video/clips'] == 29
    for result in (*trained.values(), *random.values()):
        chex.assert_tree_all_finite(result.scalars)
        for name, value in result.scalars.items():
            if name.rsplit('/')[-1] in ('clips', 'C'):
                continue
            low, high = result.artifacts[f'{name}/interval']
            assert low <= value <= high
            assert result.artifacts[f'{name}/chance'] >= 0
    assert trained['retrieval'].scalars != random['retrieval'].scalars  # it is another model
    # The class decides the pitch: the mean spectrum knows it, a random video tower knows some.
    assert trained['simple_probe_spectrum'].scalars['accuracy'] > 0.2
    logged = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert any('eval/retrieval/text_to_video/R@10' in line for line in logged)


@pytest.fixture(scope='module')
def view(tiny_run):
    """Features of the tiny run."""
    folder, _, data = tiny_run
    return FeatureView(api.load(folder)._encoder, data, batch_size=16)


class CountedData:
    """A data object that counts the passes that are made over it."""

    def __init__(self, data):
        self._data = data
        self.info = data.info
        self.num_passes = 0

    def one_pass(self, *args, **kwargs):
        self.num_passes += 1
        return self._data.one_pass(*args, **kwargs)


class RepeatedData:
    """A data object whose pass yields its first batch twice."""

    def __init__(self, data):
        self._data = data

    def one_pass(self, *args, **kwargs):
        batch = next(iter(self._data.one_pass('test', 16, limit=16)))
        return iter([batch, batch])


def test_each_example_once_and_in_order(view):
    """29 clips in batches of 16: no padding row is left, and each clip is encoded for itself."""
    features = view.features('test', limit=29)
    np.testing.assert_array_equal(features['index'], np.arange(29))
    chex.assert_shape(features['pooled']['video'], (29, 32))
    chex.assert_shape(features['spaces']['vat']['text.caption'], (29, 1, 8))
    chex.assert_tree_all_finite(features)
    lengths = np.linalg.norm(features['spaces']['va']['audio'], axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    np.testing.assert_array_equal(features['labels']['class'], np.arange(29) % 16)
    other_batches = FeatureView(view.encoder, view.data, batch_size=8).features('test', limit=29)
    chex.assert_trees_all_equal_shapes_and_dtypes(other_batches, features)
    chex.assert_trees_all_close(other_batches, features, rtol=1e-7, atol=1e-5)


def test_maps_are_maxima_of_the_last_feature_map(view):
    """The grid of the tiny model is 2 x 2 x 2 (video) and 16 (audio), so one block, and eight."""
    features = view.features('test', limit=29, maps=('video', 'audio'))
    plain = view.features('test', limit=29)
    np.testing.assert_allclose(features['pooled']['video'], plain['pooled']['video'], atol=1e-5)
    encoder = view.encoder

    @jax.jit
    def encode_tokens(batch):
        rng = Rng.create(0, 0, batch['position'])
        batch = preprocess.device_stage(
            batch,
            encoder.config.model.inputs,
            encoder.config.augment,
            rng,
            augment=False,
            dtype='float32',
        )
        encoded = encoder.model.apply(
            encoder.variables, batch, train=False, rng=rng, features=True, method='encode_all'
        )
        return {name: stream.tokens for name, stream in encoded.items()}

    batch = next(iter(view.data.one_pass('test', 16, limit=29)))
    with jax.set_mesh(encoder.mesh):
        tokens = encode_tokens(feature_extractor.place_on_mesh(batch, encoder.mesh))
    tokens = jax.tree.map(np.float64, tokens)
    maxima = {
        'video': tokens['video'].max(1),
        'audio': tokens['audio'].reshape(16, 8, 2, -1).max(2).reshape(16, -1),
    }
    for name, expected in maxima.items():
        np.testing.assert_allclose(features['maps'][name][:16], unit(expected), atol=1e-5)


def test_an_example_that_comes_twice_is_an_error(view):
    repeated = FeatureView(view.encoder, RepeatedData(view.data), 16)
    with pytest.raises(RuntimeError, match='16 examples came more than once'):
        repeated.features('test')


def test_a_pass_without_batches_is_an_error(view):
    with pytest.raises(RuntimeError, match='no batch'):
        feature_extractor.compute_features(view.encoder, iter([]))


def test_equal_requests_are_computed_once(view):
    data = CountedData(view.data)
    counted = FeatureView(view.encoder, data, 16)
    retrieval = {'type': 'retrieval', 'limit': 16, 'pairs': (('audio', 'video', 'va'),)}
    results = evals.run_all(ConfigDict({'b': retrieval, 'a': retrieval}), counted)
    assert data.num_passes == 1
    assert list(results) == ['a', 'b']
    assert results['a'].scalars == results['b'].scalars
    assert counted.features('test', limit=16) is counted.features('test', limit=16)
    for request in (
        {'limit': 8},
        {'limit': 16, 'change': 'single_frame'},
        {'limit': 16, 'by': 'records'},
        {'limit': 16, 'views': {'audio.shifted': {'kind': 'shift', 'seconds': 0.5}}},
        {'limit': 16, 'window': {'kind': 'window', 'number': 0, 'of': 2}},
    ):
        before = data.num_passes
        counted.features('test', **request)
        assert data.num_passes == before + 1, request


def test_a_second_evaluation_computes_with_its_own_variables(view):
    batch = next(iter(view.data.one_pass('test', 16, limit=16)))
    first = view.encoder(batch)
    larger = jax.tree.map(lambda x: 1.5 * x, view.encoder.variables)
    second = view.encoder.on(larger)(batch)
    alone = feature_extractor.FeatureExtractor(view.encoder.config, larger, view.encoder.mesh)
    chex.assert_trees_all_equal(second, alone(batch), strict=True)
    assert np.abs(second['pooled']['video'] - first['pooled']['video']).max() > 0.1
    chex.assert_trees_all_equal(view.encoder(batch), first, strict=True)


def test_a_second_evaluation_of_a_run_compiles_nothing(view):
    """Neither another batch of the same shapes nor other variables trace the forward pass again."""
    chex.clear_trace_counter()

    class TracedOnce(feature_extractor.FeatureExtractor):
        @chex.assert_max_traces(n=1)
        def _features(self, *args):
            return super()._features(*args)

    encoder = TracedOnce(view.encoder.config, view.encoder.variables, view.encoder.mesh)
    larger = jax.tree.map(lambda x: 1.5 * x, view.encoder.variables)
    one, two = view.data.one_pass('test', 16, limit=32)
    encoder(one)
    encoder(two)
    encoder.on(larger)(one)


def test_baseline_runs_only_the_evaluators_with_a_baseline(view):
    sync_entry = {'type': 'sync', 'limit': 16, 'seconds': 0.5}
    config = ConfigDict(
        {
            'with_baseline': {**sync_entry, 'baseline': True},
            'without_baseline': {**sync_entry, 'baseline': False},
        }
    )
    assert set(evals.run_all(config, view)) == {'with_baseline', 'without_baseline'}
    assert set(evals.run_all(config, view, baseline=True)) == {'with_baseline'}


def test_single_frame_holds_the_middle_frame(view):
    batch = next(iter(view.data.one_pass('test', 8, limit=8)))
    batch['video.second'] = batch['video']
    frames = batch['video']['data']
    middle = frames[:, 2:3]
    assert (frames != middle).any()
    changed = evals.CHANGES['single_frame'](batch)
    still = np.broadcast_to(middle, frames.shape)
    expected = {
        **batch,
        'video': {**batch['video'], 'data': still},
        'video.second': {**batch['video'], 'data': still},
    }
    chex.assert_trees_all_equal(changed, expected, strict=True)
    assert changed['audio'] is batch['audio']


def test_features_of_single_frames_differ_in_video_alone(view):
    still = view.features('test', limit=8, change='single_frame')
    moving = view.features('test', limit=8)
    assert not np.allclose(still['pooled']['video'], moving['pooled']['video'], atol=1e-4)
    np.testing.assert_allclose(still['pooled']['audio'], moving['pooled']['audio'], atol=1e-6)


def test_each_pass_draws_other_windows(view):
    plain = view.features('train', limit=16)
    one = view.features('train', limit=16, draw='probe 0')
    two = view.features('train', limit=16, draw='probe 1')
    for a, b in ((plain, one), (one, two), (plain, two)):
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
        assert np.abs(a['pooled']['video'] - b['pooled']['video']).max() > 1e-3
    np.testing.assert_array_equal(one['labels']['class'], two['labels']['class'])
    assert view.features('train', limit=16, draw='probe 0') is one


def test_simple_probe_on_the_synthetic_source(view):
    """A class has a colour (4 of 16 classes apart) and a pitch, so both are far above chance."""

    def simple_probe(**fields):
        limits = {'train_limit': 64, 'test_limit': 32}
        return run_evaluator(
            view, 'p', type='simple_probe', strengths=(1.0,), **{**limits, **fields}
        )

    colour = simple_probe(stream='video')
    assert colour.scalars['accuracy'] > 2.5 * colour.artifacts['accuracy/chance']
    assert colour.artifacts['train'] == 64
    assert simple_probe(stream='audio').scalars['accuracy'] > 2.5 / 16
    with pytest.raises(ConfigError, match="no stream 'flow'"):
        simple_probe(stream='flow')
    with pytest.raises(ConfigError, match="label 'colour' is not among class"):
        simple_probe(label='colour')


def test_save_and_load_round_trip(tmp_path):
    artifacts = {
        'x/y/interval': (0.1, 0.9),
        'matrix': np.arange(6, dtype=np.float16).reshape(2, 3),
        'classes': ['é'],
    }
    results = {'a': Result({'x/y': 0.5}, artifacts), 'b': Result({'z': 1.0})}
    folder = tmp_path / 'evals' / 'step'
    evals.save(results, folder)
    evals.save(results, folder)  # a second time replaces the first
    assert [path.name for path in folder.parent.iterdir()] == ['step']
    loaded = evals.load(folder)
    assert set(loaded) == {'a', 'b'}
    assert loaded['a'].scalars == {'x/y': 0.5}
    assert loaded['b'].scalars == {'z': 1.0}
    # JSON has lists, no tuples.
    expected = {**artifacts, 'x/y/interval': [0.1, 0.9]}
    assert set(loaded['a'].artifacts) == set(expected)
    assert loaded['a'].artifacts['x/y/interval'] == [0.1, 0.9]
    assert loaded['a'].artifacts['classes'] == ['é']
    chex.assert_trees_all_equal(loaded['a'].artifacts['matrix'], artifacts['matrix'], strict=True)
    assert loaded['b'].artifacts == {}


# ---- classification


def classify(logits, y, valid=None, name='class', **fields):
    """The result of a classification evaluator; name: the label that the objective predicts."""
    if valid is None:
        valid = np.ones(len(y), bool)
    features = {
        'predictions': {name: logits},
        'labels': {'class': y},
        'valid': {'video': valid},
    }
    return run_evaluator(KnownFeatures({'test': features}), 'c', type='classification', **fields)


# Of four clips; classes in order of their distance from 0, 0, 0, 7.
DISTANCE_LOGITS = -np.abs(np.arange(8.0)[None] - np.array([[0], [0], [0], [7]]))


def test_classification_top1_and_top5():
    # The clip without a label does not count.
    result = classify(DISTANCE_LOGITS, np.array([0, 4, 5, -1]))
    assert result.scalars == {
        'accuracy': pytest.approx(1 / 3),
        'top5': pytest.approx(2 / 3),
        'mean_class_accuracy': pytest.approx(1 / 3),
    }
    assert result.artifacts['accuracy/chance'] == 1 / 8
    assert result.artifacts['top5/chance'] == 5 / 8


def test_classification_leaves_clips_without_video_out():
    only_first = np.array([True, False, False, False])
    result = classify(DISTANCE_LOGITS, np.array([0, 4, 5, 0]), valid=only_first)
    assert result.scalars['accuracy'] == 1


def test_top5_of_three_classes_is_one():
    result = classify(DISTANCE_LOGITS[:, :3], np.array([0, 1, 2, 2]))
    assert result.scalars['top5'] == 1


def test_classification_mistakes_are_sentences():
    with pytest.raises(
        ConfigError, match=r"expected a label that the objective predicts \(colour\), got 'class'"
    ):
        classify(DISTANCE_LOGITS, np.array([0, 0, 0, 0]), name='colour')
    with pytest.raises(ConfigError, match='none of 4 clips'):
        classify(DISTANCE_LOGITS, np.full(4, -1))


def test_multi_window_logits_or_probabilities_are_averaged():
    """Three windows and two crops; the true classes of the two clips are 2 and 0.

    One very sure window outweighs the others in logits and not in probabilities.
    """
    logits = np.zeros((6, 2, 3))  # [window·crop, clip, class]
    logits[:, 0, 1] = 1.0
    logits[0, 0, 2] = 9.0
    logits[:, 1, 0] = 1.0
    parts = {}
    for i in range(6):
        window, crop = divmod(i, 2)
        parts['test', window, float(crop)] = {
            'predictions': {'class': logits[i]},
            'labels': {'class': np.array([2, 0])},
            'valid': {'video': np.ones(2, bool)},
        }

    def accuracy(**fields):
        fields = {'windows': 3, 'crops': 2, **fields}
        result = run_evaluator(KnownFeatures(parts), 'c', type='classification', **fields)
        return result.scalars['accuracy']

    assert accuracy() == 1
    assert accuracy(pool='probabilities') == 0.5
    with pytest.raises(ConfigError, match='expected positive numbers, got windows=0, crops=2'):
        accuracy(windows=0)


def test_multi_label_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(300, 7)), 1)  # ties abound
    targets = (rng.uniform(size=(300, 7)) < 1 / (1 + np.exp(-2 * scores - 0.5))).astype(np.float32)
    # Nothing can be said about classes without examples, or without others.
    targets[:, 5] = 0
    targets[:, 6] = 1
    # The clip without any label does not count.
    targets[9] = 0
    result = classify(scores, targets)
    is_used = np.arange(300) != 9
    precisions, areas = [], []
    for c in range(5):
        precisions.append(average_precision_score(targets[is_used, c], scores[is_used, c]))
        areas.append(roc_auc_score(targets[is_used, c], scores[is_used, c]))
    assert result.artifacts['classes_scored'] == 5
    assert result.scalars['mAP'] == pytest.approx(np.mean(precisions))
    assert result.scalars['AUC'] == pytest.approx(np.mean(areas))
    # d' = √2 Φ⁻¹(AUC)
    d_primes = np.sqrt(2) * norm.ppf(areas)
    assert result.scalars['d_prime'] == pytest.approx(np.mean(d_primes))
    low, high = result.artifacts['mAP/interval']
    assert low < result.scalars['mAP'] < high
    assert high - low < 0.15
    assert result.artifacts['unlabelled'] == 1
    assert '1 of 300 clips have no label' in result.remarks[0]


def test_clips_without_labels_count_as_the_official_metric_counts_them():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(50, 4))
    targets = (rng.uniform(size=(50, 4)) < 0.2).astype(np.float32)
    assert (targets.sum(1) == 0).any()
    result = classify(scores, targets, count_unlabelled=True)
    expected = average_precision_score(targets, scores, average='macro')
    assert result.scalars['mAP'] == pytest.approx(expected)
    assert 'count as clips of no class' in result.remarks[0]


def test_perfect_multi_label_scores_are_finite():
    scores = np.array([[2.0, -1], [1, -2], [0, 3]])
    result = classify(scores, np.array([[1, 0], [1, 0], [0, 1]]))
    assert result.scalars['mAP'] == 1
    assert result.scalars['AUC'] == 1
    chex.assert_tree_all_finite(result.scalars)


@pytest.mark.slow  # as test_importers does from imported weights
def test_fine_tuning_from_a_run_trains_and_classifies(tiny_run, tmp_path):
    """The objective's head, trained a little from the run's tower, is what the evaluator reads."""
    folder, _, _ = tiny_run
    config = tiny.config(
        steps=300,
        init_from=str(folder),
        checkpoint__every=300,
        log_every=100,
        augment__color=0.0,
        objective=ConfigDict({'name': 'classification', 'dropout': 0.0}),
    )
    config.optimizer.schedule.peak = 1e-2
    config.optimizer.rates = ((r'^objective/', 5.0),)
    config.evals = {
        'classification': {'type': 'classification', 'split': 'test'},
        'multi_view': {'type': 'classification', 'split': 'test', 'windows': 2, 'crops': 3},
    }
    data = data_pipelines.open(config)
    _, scalars = loop.train(config, data, tmp_path, quiet=True)
    assert scalars['multi_view/accuracy'] > 3 / 16
    assert scalars['classification/accuracy'] > 3 / 16
    assert scalars['classification/top5'] >= scalars['classification/accuracy']
    assert loop.newest(tmp_path) == 300

    # The objective reads no sound, so there is no audio tower, and the error says so.
    tuned = api.load(tmp_path)
    assert not [path for path in tuned.paths() if 'audio' in path]
    embedded = tuned.embed(video=np.zeros((4, 16, 16, 3), np.uint8))
    chex.assert_shape(embedded['video']['pooled'], (32,))
    with pytest.raises(ConfigError, match='this model has no audio tower; it has video'):
        tuned.embed(audio=np.zeros(1024, np.int16))


def test_features_on_eight_devices(tiny_run, view):
    _, config, data = tiny_run
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})
    variables = jax.device_put(view.encoder.variables, sharding.replicated(mesh))
    encoder = feature_extractor.FeatureExtractor(config, variables, mesh)
    on_one = view.features('test', limit=29)
    on_eight = FeatureView(encoder, data, 16).features('test', limit=29)
    np.testing.assert_array_equal(on_eight['index'], np.arange(29))
    chex.assert_trees_all_equal_shapes_and_dtypes(on_eight, on_one)
    chex.assert_trees_all_close(on_eight, on_one, rtol=1e-7, atol=1e-5)
