"""Evaluators against closed forms on features that are known, and on a real encoder over the synthetic source."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
from tests import tiny
from vatt_jax import api, evals
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView, Result, solvers, statistics
from vatt_jax.evals.linear_probe import mean_color, mean_spectrum
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import loop


class Known(FeatureView):
    """A view whose features are given. features: {split, (split, draw) or (split, window number, crop): what feature_extractor.compute_features returns}."""

    seed = 0

    def __init__(self, features, labels=()):
        self._features, self.asked = features, []
        self.data = types.SimpleNamespace(info={'labels': {'class': list(labels)}})
        self.encoder = types.SimpleNamespace(
            objective=types.SimpleNamespace(streams=lambda: ('video',))
        )

    def features(self, split, window=None, draw='', **asked):
        self.asked.append((split, asked))
        return self._features[
            (split, window['number'], window.get('crop'))
            if window
            else (split, draw)
            if draw
            else split
        ]


def embeddings(n, spaces, valid=None, mask=None):
    """Features of n clips: spaces {space: {stream: [n …]}}."""
    names = {s for members in spaces.values() for s in members}
    return {
        'spaces': spaces,
        'index': np.arange(n),
        'valid': {s: np.ones(n, bool) for s in names} | (valid or {}),
        'mask': mask or {},
    }


def one_hot(n):
    return np.eye(n, dtype=np.float32)


def retrieve(features, **config):
    pair = {'pairs': (('audio', 'video', 'va'),)}
    return evals.build('r', ConfigDict({'type': 'retrieval', **pair, **config})).run(
        Known({'test': features})
    )


# ---- ranks


def test_ranks_and_hits_with_ties():
    """Row 0: two score higher. Row 1: tied with one, one higher. Row 2: all equal. Row 3: alone at the top."""
    similarity = np.array([[1, 2, 3, 0], [5, 4, 4, 0], [2, 2, 2, 2], [0, 1, 2, 9]], float)
    np.testing.assert_array_equal(statistics.ranks(similarity), [2, 1.5, 1.5, 0])
    np.testing.assert_allclose(statistics.hits(similarity, 1), [0, 0, 1 / 4, 1])
    np.testing.assert_allclose(statistics.hits(similarity, 2), [0, 1 / 2, 2 / 4, 1])
    np.testing.assert_allclose(statistics.hits(similarity, 3), [1, 1, 3 / 4, 1])
    np.testing.assert_allclose(statistics.hits(similarity, 10), 1)


def test_hits_are_what_random_tie_breaking_gives():
    """Levels of a few values, so ties abound: the mean over orders of the ties, drawn at random, of being within the first k."""
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, (12, 12)).astype(float)
    broken = np.stack(
        [statistics.ranks(similarity + 1e-6 * rng.random(similarity.shape)) for _ in range(4000)]
    )
    for k in (1, 3, 5):
        np.testing.assert_allclose(statistics.hits(similarity, k), (broken < k).mean(0), atol=0.04)
    np.testing.assert_allclose(statistics.ranks(similarity), broken.mean(0), atol=0.2)


def test_not_a_number_never_ranks_first():
    similarity = np.array([[np.nan, 1, 2], [0, 5, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(statistics.ranks(similarity), [2, 1, 2])
    assert not statistics.hits(similarity, 1).any()


def test_bootstrap_interval_of_a_share():
    """95 % of a mean of 400 coin tosses is ± 1.96 · 0.5 / 20; and it belongs to the seed."""
    tosses = np.arange(400) % 2
    low, high = statistics.bootstrap(tosses)
    assert low == pytest.approx(0.5 - 0.049, abs=0.008) and high == pytest.approx(
        0.5 + 0.049, abs=0.008
    )
    assert statistics.bootstrap(tosses) == (low, high)
    draws = np.random.default_rng(3).normal(7, 1, 101)
    low, high = statistics.bootstrap(draws, np.median, seed=1)
    assert low < np.median(draws) < high and high - low < 1


# ---- retrieval


def test_a_constant_embedding_scores_chance():
    n = 64
    same = np.full((n, 5), 5**-0.5, np.float32)
    r = retrieve(embeddings(n, {'va': {'video': same, 'audio': same}}))
    for k in (1, 5, 10):
        assert (
            r.scalars[f'audio_to_video/R@{k}']
            == pytest.approx(k / n)
            == r.artifacts[f'audio_to_video/R@{k}/chance']
        )
    assert (
        r.scalars['audio_to_video/median_rank']
        == (n + 1) / 2
        == r.artifacts['audio_to_video/median_rank/chance']
    )


def test_a_perfect_embedding_ranks_first_and_a_shifted_one_where_it_belongs():
    n = 40
    r = retrieve(embeddings(n, {'va': {'video': one_hot(n), 'audio': one_hot(n)}}))
    assert [r.scalars[f'audio_to_video/R@{k}'] for k in (1, 5, 10)] == [1, 1, 1] and r.scalars[
        'audio_to_video/median_rank'
    ] == 1
    assert (
        r.artifacts['audio_to_video/R@1/interval'] == (1, 1)
        and r.scalars['audio_to_video/clips'] == n
    )
    np.testing.assert_array_equal(r.artifacts['audio_to_video/top'][:, 0], np.arange(n))
    # clip i is nearest to clip i+3, then i+2, i+1, i: rank 4 everywhere
    circle = sum((4 - j) * np.roll(one_hot(n), 3 - j, 1) for j in range(4))
    r = retrieve(embeddings(n, {'va': {'video': one_hot(n), 'audio': circle.astype(np.float32)}}))
    assert [r.scalars[f'audio_to_video/R@{k}'] for k in (1, 5, 10)] == [0, 1, 1] and r.scalars[
        'audio_to_video/median_rank'
    ] == 4
    np.testing.assert_array_equal(r.artifacts['audio_to_video/top'][0], [3, 2, 1, 0, 4])


def test_direction_and_intervals():
    """The query is the row: with a third of the sounds lost, R@1 is two thirds and its interval holds it."""
    n = 90
    audio = one_hot(n)
    audio[::3] = np.roll(audio, 1, 1)[::3]
    r = retrieve(
        embeddings(n, {'va': {'video': one_hot(n), 'audio': audio}}),
        pairs=(('audio', 'video', 'va'), ('video', 'audio', 'va')),
    )
    assert r.scalars['audio_to_video/R@1'] == pytest.approx(2 / 3)
    low, high = r.artifacts['audio_to_video/R@1/interval']
    assert 0.52 < low < 2 / 3 < high < 0.80
    # video 3i has no sound of its own: all are equally far but one; video 3i+1 has two sounds
    expected = (
        np.mean([0 if i % 3 == 0 else 1 / 2 if i % 3 == 1 else 1 for i in range(n)])
        + 1 / 3 * 1 / n * 0
    )
    assert r.scalars['video_to_audio/R@1'] == pytest.approx(expected + (1 / 3) / n, abs=1e-6)
    np.testing.assert_allclose(r.artifacts['audio_to_video/similarity'], audio)


def test_clips_without_a_side_are_left_out():
    n = 30
    silent = np.arange(n) % 5 == 0
    audio = one_hot(n)
    audio[silent] = 7.0  # whatever a tower makes of nothing must not draw anyone
    r = retrieve(
        embeddings(n, {'va': {'video': one_hot(n), 'audio': audio}}, valid={'audio': ~silent})
    )
    assert r.scalars['audio_to_video/clips'] == 24 and r.scalars['audio_to_video/R@1'] == 1
    assert r.artifacts['audio_to_video/R@10/chance'] == pytest.approx(10 / 24)
    assert not set(r.artifacts['audio_to_video/clips']) & set(np.flatnonzero(silent))
    with pytest.raises(
        ConfigError, match=r"retrieval audio → video: only 1 of 30 clips of split 'test' have both"
    ):
        retrieve(
            embeddings(
                n, {'va': {'video': one_hot(n), 'audio': audio}}, valid={'audio': np.arange(n) == 3}
            )
        )


def test_text_is_the_caption_or_the_mean_of_its_candidates():
    n, text = 12, (('text', 'video', 'vat'),)
    candidates = np.stack([one_hot(n), 9 * np.roll(one_hot(n), 2, 1)], 1)  # the second is padding
    mask = np.stack([np.ones(n, bool), np.zeros(n, bool)], 1)
    spaces = {'vat': {'video': one_hot(n), 'text': candidates}}
    assert (
        retrieve(embeddings(n, spaces, mask={'text': mask}), pairs=text).scalars[
            'text_to_video/R@1'
        ]
        == 1
    )
    # two true candidates: their mean points at both, own clip first by weight
    both = np.stack([one_hot(n), 0.5 * np.roll(one_hot(n), 1, 1)], 1)
    r = retrieve(
        embeddings(
            n, {'vat': {'video': one_hot(n), 'text': both}}, mask={'text': np.ones((n, 2), bool)}
        ),
        pairs=text,
    )
    np.testing.assert_allclose(
        r.artifacts['text_to_video/similarity'][0, :2], np.array([1, 0.5]) / 1.25**0.5, atol=1e-3
    )
    spaces['vat']['text.caption'] = np.roll(one_hot(n), 1, 1)[:, None]
    r = retrieve(
        embeddings(n, spaces, mask={'text': mask, 'text.caption': np.ones((n, 1), bool)}),
        pairs=text,
    )
    assert r.scalars['text_to_video/R@1'] == 0  # the caption is what counts where there is one


def test_retrieval_mistakes_are_sentences():
    f = embeddings(4, {'va': {'video': one_hot(4)}})
    with pytest.raises(ConfigError, match="asks for stream 'audio' in space 'va', which has video"):
        retrieve(f)
    with pytest.raises(ConfigError, match="in space 'vat', which has nothing"):
        retrieve(f, pairs=(('text', 'video', 'vat'),))
    with pytest.raises(
        ConfigError, match=r"config.evals.x.limmit=3: no such field; did you mean 'limit'"
    ):
        evals.build('x', ConfigDict({'type': 'retrieval', 'limmit': 3}))
    with pytest.raises(ConfigError, match=r"config.evals.x.type='knn': choose one of retrieval"):
        evals.build('x', ConfigDict({'type': 'knn'}))
    with pytest.raises(
        ConfigError, match=r"config.evals.x.change='sepia': choose one of single_frame"
    ):
        evals.build('x', ConfigDict({'type': 'retrieval', 'change': 'sepia'}))


@pytest.mark.parametrize(
    'entry, told',
    [
        (
            {'type': 'retrieval', 'split': 'validation'},
            "config.evals.x.split='validation': the data have no such split; name another, or leave",
        ),
        (
            {'type': 'retrieval', 'pairs': (('text', 'video', 'va'),)},
            "text and video do not meet in space 'va'; spaces are va: audio, video; vat: video",
        ),
        (
            {'type': 'retrieval', 'pairs': (('audio', 'video'),)},
            r"config.evals.x.pairs: expected \(query, gallery, space\).* got \('audio', 'video'\)",
        ),
        ({'type': 'sync', 'space': 'joint'}, "video and audio do not meet in space 'joint'"),
        (
            {'type': 'linear_probe', 'stream': 'text'},
            "config.evals.x.stream='text': the model encodes audio, video",
        ),
        (
            {'type': 'linear_probe', 'label': 'colour'},
            "config.evals.x.label='colour': the data have class",
        ),
        ({'type': 'classification', 'label': 'colour'}, "config.evals.x.label='colour'"),
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
def test_what_data_and_model_lack_is_said_before_anything_is_computed(entry, told):
    data = types.SimpleNamespace(
        size=lambda split, by: 0 if split == 'validation' else 8,
        info={'labels': {'class': ['a', 'b']}},
    )
    outputs = types.SimpleNamespace(
        encoded={'video': 0, 'audio': 0},
        spaces={'va': {'video': 0, 'audio': 0}, 'vat': {'video': 0}},
    )
    with pytest.raises(ConfigError, match=told):
        evals.check(ConfigDict({'x': entry}), data, outputs)
    shifted = {'type': 'retrieval', 'pairs': (('audio.shifted', 'video', 'va'),)}
    evals.check(
        ConfigDict({'a': shifted, 'b': {'type': 'linear_probe'}, 'c': {'type': 'sync'}}),
        data,
        outputs,
    )


# ---- synchrony


def sync(features):
    return evals.build('s', ConfigDict({'type': 'sync', 'seconds': 0.5})).run(
        Known({'test': features})
    )


def test_sync_counts_shares_and_halves():
    n = 8
    own, away = one_hot(n), np.roll(one_hot(n), 1, 1)
    space = lambda audio, shifted: {'va': {'video': own, 'audio': audio, 'audio.shifted': shifted}}
    assert sync(embeddings(n, space(own, away))).scalars['accuracy'] == 1
    assert sync(embeddings(n, space(away, own))).scalars['accuracy'] == 0
    same = sync(embeddings(n, space(own, own)))
    assert same.scalars['accuracy'] == 0.5 == same.artifacts['accuracy/chance']
    mixed = np.where(np.arange(n)[:, None] < 6, own, away)
    result = sync(embeddings(n, space(mixed, np.where(np.arange(n)[:, None] < 6, away, own))))
    assert result.scalars['accuracy'] == 0.75
    low, high = result.artifacts['accuracy/interval']
    assert low < 0.75 < high
    some = np.arange(n) >= 4
    assert (
        sync(
            embeddings(
                n, space(mixed, np.where(some[:, None], own, away)), valid={'audio.shifted': ~some}
            )
        ).scalars['accuracy']
        == 1
    )


def test_sync_mistakes_are_sentences():
    with pytest.raises(ConfigError, match="asks for stream 'audio' in space 'va', which has video"):
        sync(embeddings(3, {'va': {'video': one_hot(3)}}))
    space = {'va': {k: one_hot(3) for k in ('video', 'audio', 'audio.shifted')}}
    with pytest.raises(ConfigError, match='none of 3 clips'):
        sync(embeddings(3, space, valid={'audio': np.zeros(3, bool)}))


# ---- probes


def blobs(n, classes, apart, seed, width=6):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return apart * np.eye(classes, width)[y] + rng.normal(size=(n, width)), y


def probe(train_set, test_set, **config):
    def features(x, y):
        valid = np.ones(len(y), bool)
        return {
            'pooled': {'video': x},
            'labels': {'class': y},
            'valid': {'video': valid},
            'index': np.arange(len(y)),
        }

    view = Known(
        {'train': features(*train_set), 'test': features(*test_set)}, labels=['a', 'b', 'c']
    )
    return evals.build('p', ConfigDict({'type': 'linear_probe', **config})).run(view), view


def solve(name, x, y, x_test, strengths=(), epochs=1000):
    """(scores [N W P], C); x_test [N D] or [N W D]."""
    x_test = x_test if x_test.ndim == 3 else x_test[:, None]
    return solvers.SOLVERS[name](
        x, y, x_test, int(y.max()) + 1, ConfigDict({'strengths': strengths, 'epochs': epochs}), 0
    )


def test_linear_probe_on_separable_and_on_meaningless_features():
    result, view = probe(
        blobs(120, 3, 30.0, 0), blobs(60, 3, 30.0, 1), train_limit=120, test_limit=60
    )
    assert result.scalars['accuracy'] == 1 and result.artifacts['accuracy/interval'] == (1, 1)
    assert result.artifacts['accuracy/chance'] == pytest.approx(1 / 3) and (
        result.artifacts['train'],
        result.artifacts['test'],
    ) == (120, 60)
    np.testing.assert_array_equal(result.artifacts['confusion'], 20 * np.eye(3))
    assert [(s, a['limit']) for s, a in view.asked] == [('train', 120), ('test', 60)]
    chance, _ = probe(blobs(300, 3, 0.0, 2), blobs(300, 3, 0.0, 3))
    assert abs(chance.scalars['accuracy'] - 1 / 3) < 0.11
    low, high = chance.artifacts['accuracy/interval']
    assert low < chance.scalars['accuracy'] < high and chance.artifacts['confusion'].sum() == 300


def test_linear_probe_does_not_mind_scale_and_leaves_unknown_labels_out():
    (x, y), (x_test, y_test) = blobs(120, 3, 30.0, 0), blobs(60, 3, 30.0, 1)
    scale = np.array(
        [1e-6, 1e-6, 1e-6, 1, 1, 1]
    )  # what tells is a million times smaller than what does not
    assert probe((x * scale, y), (x_test * scale, y_test))[0].scalars['accuracy'] == 1
    y_test = np.where(np.arange(60) < 20, -1, y_test)
    result, _ = probe((x, y), (x_test, y_test))
    assert result.artifacts['test'] == 40 and result.scalars['accuracy'] == 1


def test_regularisation_is_chosen_by_what_generalises():
    """150 useless features beside three useful ones want a strong penalty; two features whose small difference tells want a weak one."""
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    noisy = np.concatenate(
        [2 * y[:, None] + rng.normal(size=(200, 3)), rng.normal(size=(200, 150))], 1
    )
    base = rng.normal(size=(200, 1))
    alike = np.concatenate(
        [base, base + 0.05 * rng.normal(size=(200, 1)) + 0.06 * (2 * y[:, None] - 1)], 1
    )
    assert solve('logistic', noisy, y, noisy[:5], (1e-4, 1e3))[1] == 1e-4
    scores, strength = solve('logistic', alike, y, alike[:7], (1e-4, 1e3))
    assert strength == 1e3 and scores.shape == (7, 1, 2)
    assert solve('logistic', alike, y, alike[:7], (3.0,))[1] == 3.0


def test_probe_mistakes_are_sentences():
    good = blobs(20, 2, 5.0, 0)
    with pytest.raises(ConfigError, match="stream 'flow' is not among video"):
        probe(good, good, stream='flow')
    with pytest.raises(ConfigError, match="label 'colour' is not among class"):
        probe(good, good, label='colour')
    with pytest.raises(ConfigError, match="label 'class' has 20 labelled examples of 1 classes"):
        probe((good[0], np.zeros(20, int)), good)
    with pytest.raises(ConfigError, match='multi-hot'):
        probe((good[0], np.eye(20, dtype=int)), good)


def test_simple_features():
    """Mean and deviation of colour; log spectrum whose peak lies at the tone, whatever its phase."""
    frames = np.zeros((2, 3, 4, 4, 3), np.uint8)
    frames[0, ..., 0], frames[1, :, :2, :, 2] = 200, 100
    np.testing.assert_allclose(
        mean_color(frames), [[200, 0, 0, 0, 0, 0], [0, 0, 50, 0, 0, 50]], atol=1e-4
    )
    t = np.arange(8000) / 8000
    for pitch in (500, 2000):
        spectrum = mean_spectrum((9000 * np.sin(2 * np.pi * pitch * t + 1)).astype(np.int16)[None])
        assert spectrum.shape == (1, 128) and spectrum[0].argmax() + 1 == round(pitch * 256 / 8000)
    assert mean_spectrum(np.zeros((1, 8000), np.int16))[0] == pytest.approx(np.log(1e-3))


# ---- several windows


def test_both_zero_shot_variants_over_windows():
    """Two windows of video against one caption: the cosine of the mean of the embeddings before normalisation, and the mean of the cosines."""
    rng = np.random.default_rng(0)
    raw, words = (
        rng.normal(size=(2, 20, 6)) * rng.uniform(0.1, 9, (2, 20, 1)),
        rng.normal(size=(20, 6)),
    )
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    parts = {}
    for w in range(2):
        f = embeddings(
            20,
            {'vat': {'video': unit(raw[w]), 'text.caption': unit(words)[:, None]}},
            mask={'text.caption': np.ones((20, 1), bool)},
        )
        parts['test', w, None] = {
            **f,
            'lengths': {
                'vat': {'video': np.linalg.norm(raw[w], axis=-1), 'text.caption': np.ones((20, 1))}
            },
        }
    parts['test', 1, None]['valid']['video'][3] = (
        False  # a window that cannot be read: the other one speaks for the clip
    )
    run = lambda pool: (
        evals.build(
            'r',
            ConfigDict(
                {
                    'type': 'retrieval',
                    'windows': 2,
                    'pool': pool,
                    'pairs': (('text', 'video', 'vat'),),
                }
            ),
        )
        .run(Known(parts))
        .artifacts['text_to_video/similarity']
    )
    kept = np.where(np.arange(20)[:, None] == 3, raw[0], raw.mean(0))
    np.testing.assert_allclose(run('embeddings'), unit(words) @ unit(kept).T, atol=2e-3)
    cosines = np.einsum('te,wge->tgw', unit(words), unit(raw))
    want = np.where(np.arange(20) == 3, cosines[..., 0], cosines.mean(-1))
    np.testing.assert_allclose(run('similarities'), want, atol=2e-3)
    assert np.abs(want - unit(words) @ unit(kept).T).max() > 0.05
    with pytest.raises(
        ConfigError, match=r"config.evals.r.pool='median': choose one of embeddings, similarities"
    ):
        run('median')


def test_probe_averages_probabilities_over_windows_and_scores_over_folds():
    (x, y), rng = blobs(90, 3, 4.0, 0), np.random.default_rng(5)
    fold = np.arange(90) // 30 % 3

    def features(noise):
        labels = {'class': y, 'part': np.where(np.arange(90) == 7, -1, fold)}
        return {
            'pooled': {'video': x + noise},
            'labels': labels,
            'valid': {'video': np.ones(90, bool)},
        }

    parts = {
        'train': features(0),
        **{('train', w, None): features(rng.normal(size=x.shape)) for w in range(2)},
    }
    view = Known(parts, labels=['a', 'b', 'c'])
    view.data.info['labels']['part'] = ['one', 'two', 'three']
    fields = {
        'type': 'linear_probe',
        'windows': 2,
        'strengths': (1.0,),
        'folds': (('part', 'one'), ('part', 'three')),
    }
    got = evals.build('p', ConfigDict(fields)).run(view)
    rights = []
    for k in (0, 2):
        inside, outside = (fold == k) & (np.arange(90) != 7), (fold != k) & (np.arange(90) != 7)
        scores = [
            solve(
                'logistic',
                x[outside],
                y[outside],
                parts['train', w, None]['pooled']['video'][inside],
                (1.0,),
            )[0][:, 0]
            for w in range(2)
        ]
        rights.append((np.mean(scores, 0).argmax(-1) == y[inside]).mean())
    assert (
        got.scalars['accuracy'] == pytest.approx(np.mean(rights))
        and got.artifacts['test'] == 59
        and got.artifacts['train'] == 119
    )
    with pytest.raises(
        ConfigError,
        match=r"folds has \('part', 'ten'\); the classes of that label are one, two, three",
    ):
        evals.build('p', ConfigDict({**fields, 'folds': (('part', 'ten'),)})).run(view)


def test_published_head_takes_the_published_steps():
    """One step of Keras's Adam on the mean cross entropy plus 0.1 |W|², written out; a last batch of one example counts as much as a full one."""
    (x, y), (n, p, w) = blobs(5, 3, 1.0, 0, width=4), (5, 3, 7)
    start = jax.tree.map(np.float64, solvers._head_init(jax.random.key(3), 4, w, p))
    fit = lambda x, y, batch, epochs: solvers._head_fit(
        jax.tree.map(jnp.float32, start),
        jax.random.key(0),
        jnp.float32(x),
        jnp.array(y),
        batch,
        5e-4,
        0.0,
        0.1,
        epochs,
    )
    got = fit(x, y, n, 1)
    hidden = x @ start['in']
    z = hidden @ start['out']
    error = np.exp(z) / np.exp(z).sum(-1, keepdims=True) - np.eye(p)[y]
    slope = {
        'out': hidden.T @ error / n + 0.2 * start['out'],
        'out_bias': error.mean(0),
        'in': x.T @ error @ start['out'].T / n,
        'in_bias': (error @ start['out'].T).mean(0),
    }
    for name, g in slope.items():
        want = start[name] - 5e-4 * np.sqrt(1e-3) * g / (np.sqrt(1e-3) * np.abs(g) + 1e-7)
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-7, err_msg=name)
    same = np.tile(x[:1], (5, 1)), np.zeros(5, int)
    for a, b in zip(
        jax.tree.leaves(fit(*same, 4, 1)), jax.tree.leaves(fit(*same, 5, 2))
    ):  # batches of 4 and 1; two of 5
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_published_classifiers_classify():
    (x, y), (x_test, y_test) = blobs(150, 3, 6.0, 0), blobs(60, 3, 6.0, 1)
    windows = np.stack([x_test, x_test + 0.1], 1)
    scores, strength = solve('head', x, y, windows, epochs=150)
    assert (
        scores.shape == (60, 2, 3)
        and strength is None
        and (scores.mean(1).argmax(-1) == y_test).mean() > 0.95
    )
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    values, strength = solve('svm', x, y, windows)
    assert (
        strength == 6e-5
        and values.shape == (60, 2, 3)
        and (values.mean(1).argmax(-1) == y_test).mean() > 0.9
    )
    two = y < 2
    values, _ = solve('svm', x[two], y[two], x_test)
    assert (
        values.shape == (60, 1, 2)
        and (values[y_test < 2, 0].argmax(-1) == y_test[y_test < 2]).mean() > 0.9
    )


# ---- nearest neighbours


def neighbours(queries, gallery, **config):
    """queries, gallery: ({window: x [N F]}, classes)."""
    of = config.get('of', 'maps')

    def features(x, y):
        valid = np.ones(len(y), bool)
        return {
            'pooled': {'video': x},
            'maps': {'video': x},
            'labels': {'class': y},
            'valid': {'video': valid},
            'index': np.arange(len(y)),
        }

    parts = {
        (split, w, None): features(x, y)
        for split, (xs, y) in (('test', queries), ('train', gallery))
        for w, x in xs.items()
    }
    view = Known(parts)
    return evals.build(
        'n', ConfigDict({'type': 'neighbours', 'windows': 2, 'of': of, **config})
    ).run(view), view


def test_neighbours_are_those_of_the_mean_of_unit_features():
    """By loops over pairs in float64; a query without a class is left out. Of two windows the longer one weighs no more."""
    rng = np.random.default_rng(0)
    y, classes = rng.integers(-1, 4, 30), rng.integers(0, 4, 50)
    make = lambda y: {
        w: ((1 + w * 30) * (np.eye(4, 6)[y] + 0.8 * rng.normal(size=(len(y), 6)))).astype(
            np.float32
        )
        for w in range(2)
    }
    queries, gallery = make(y), make(classes)
    mean = lambda xs: np.mean(
        [[v / np.sqrt((v.astype(float) ** 2).sum()) for v in x] for x in xs.values()], 0
    )
    q, g = mean(queries), mean(gallery)
    got, view = neighbours((queries, y), (gallery, classes), first=(1, 3, 10))
    for k in (1, 3, 10):
        hits = []
        for i in np.flatnonzero(y >= 0):
            nearest = sorted(range(50), key=lambda j: ((q[i] - g[j]) ** 2).sum())[:k]
            hits.append(y[i] in classes[nearest])
        assert got.scalars[f'R@{k}'] == pytest.approx(np.mean(hits)) and 0.2 < np.mean(hits)
        low, high = got.artifacts[f'R@{k}/interval']
        assert low <= np.mean(hits) <= high
        drawn = [
            np.mean([c in classes[rng.choice(50, k, replace=False)] for c in y[y >= 0]])
            for _ in range(400)
        ]
        assert got.artifacts[f'R@{k}/chance'] == pytest.approx(np.mean(drawn), abs=0.02)
    assert all(a['maps'] == ('video',) for _, a in view.asked)
    assert (
        neighbours((queries, y), (gallery, classes), first=(1, 3, 10), of='pooled')[0].scalars
        == got.scalars
    )
    for fields, words in (
        ({'first': (1, 60)}, 'the gallery has 50 clips, fewer than the 60 neighbours'),
        ({'first': ()}, 'first: expected numbers of neighbours'),
        ({'stream': 'flow'}, "stream 'flow' is not among video"),
        ({'label': 'colour'}, "label 'colour' is not among"),
    ):
        with pytest.raises(ConfigError, match=words.replace('(', r'\(').replace(')', r'\)')):
            neighbours((queries, y), (gallery, classes), **{'first': (1,), **fields})


def test_mmv_probe_standardises_learns_from_passes_and_averages_decisions():
    """Against scikit-learn, written out: scaler and machine see every pass, windows are scaled by the same numbers, decision values averaged."""
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    (x, y), (x_test, y_test), rng = (
        blobs(60, 3, 2.0, 0),
        blobs(45, 3, 2.0, 1),
        np.random.default_rng(5),
    )
    size = np.array(
        [1e3, 1, 1, 1e-3, 1, 0]
    )  # as they are, the first feature would decide; the last is constant
    near = lambda x: (x + rng.normal(size=x.shape)) * size
    features = lambda x, y: {
        'pooled': {'video': x},
        'labels': {'class': y},
        'valid': {'video': np.ones(len(y), bool)},
    }
    parts = {('train', f'probe {i}'): features(near(x), y) for i in range(3)}
    parts |= {('test', w, None): features(near(x_test), y_test) for w in range(4)}
    fields = {
        'type': 'linear_probe',
        'solver': 'svm',
        'standardise': True,
        'passes': 3,
        'windows': 4,
        'strengths': (1e-2,),
    }
    got = evals.build('p', ConfigDict(fields)).run(Known(parts, labels=['a', 'b', 'c']))
    every = np.concatenate([parts['train', f'probe {i}']['pooled']['video'] for i in range(3)])
    scaler = StandardScaler().fit(every)
    machine = LinearSVC(C=1e-2, random_state=0).fit(scaler.transform(every), np.tile(y, 3))
    values = np.mean(
        [
            machine.decision_function(scaler.transform(parts['test', w, None]['pooled']['video']))
            for w in range(4)
        ],
        0,
    )
    np.testing.assert_array_equal(
        np.argwhere(got.artifacts['confusion'] > 0),
        np.unique(np.stack([y_test, values.argmax(-1)], 1), axis=0),
    )
    assert (
        got.scalars['accuracy'] == pytest.approx((values.argmax(-1) == y_test).mean())
        and got.scalars['C'] == 1e-2
    )
    assert (got.artifacts['train'], got.artifacts['test']) == (180, 45)
    plain = evals.build('p', ConfigDict({**fields, 'standardise': False})).run(
        Known(parts, labels=['a', 'b', 'c'])
    )
    assert not np.array_equal(plain.artifacts['confusion'], got.artifacts['confusion'])
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


def test_mlp_probe_of_several_labels():
    """Whether a clip has label 0 or 1 is the sign of a product, which no linear classifier can tell; label 2 is the sign of one feature."""
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)

    def part(n):
        x = rng.normal(size=(n, 4))
        return x, np.stack([x[:, 0] * x[:, 1] > 0, x[:, 0] * x[:, 1] < 0, x[:, 2] > 0], 1).astype(
            np.float32
        )

    (x, y), (x_test, y_test) = part(600), part(200)
    features = lambda x, y: {
        'pooled': {'audio': 9 * x + 5},
        'labels': {'tags': y},
        'valid': {'audio': np.arange(len(y)) > 0},
    }
    view = Known(
        {
            'train': features(x, y),
            ('test', 0, None): features(x_test, y_test),
            ('test', 1, None): features(x_test, y_test),
        }
    )
    fields = {
        'type': 'linear_probe',
        'stream': 'audio',
        'label': 'tags',
        'solver': 'mlp',
        'epochs': 20,
        'windows': 2,
    }
    got = evals.build('p', ConfigDict(fields)).run(view)
    assert (
        got.scalars['mAP'] > 0.9
        and got.scalars['AUC'] > 0.9
        and (got.artifacts['train'], got.artifacts['test']) == (599, 199)
    )
    scores, _ = solvers.mlp(
        9 * x[1:] + 5, y[1:], 9 * x_test[1:, None] + 5, 3, ConfigDict({'epochs': 20}), 0
    )
    assert got.scalars['mAP'] == pytest.approx(
        average_precision_score(y_test[1:], scores[:, 0], average='macro')
    )
    single, _ = solvers.mlp(
        x, y[:, 0].astype(int), x_test[:, None], 2, ConfigDict({'epochs': 20}), 0
    )  # one class a clip: softmax
    np.testing.assert_allclose(single.sum(-1), 1, rtol=1e-5)
    assert (single[:, 0].argmax(-1) == y_test[:, 0]).mean() > 0.85
    with pytest.raises(
        ConfigError,
        match="label 'tags' is multi-hot; expected a single class per example, or solver='mlp'",
    ):
        evals.build('p', ConfigDict({**fields, 'solver': 'svm'})).run(view)


# ---- a real encoder


def test_scores_of_a_tiny_run(tiny_run):
    """Everything asked for is there, once for the trained model and once for its random initialisation, with chance and interval."""
    folder, config, _ = tiny_run
    trained, random = (
        evals.load(folder / 'evals' / 'step_000002'),
        evals.load(folder / 'evals' / 'random_init'),
    )
    assert set(trained) == set(config.evals) and set(random) == {'retrieval', 'sync', 'probe_video'}
    assert trained['retrieval'].scalars.keys() >= {
        f'{q}_to_video/{k}'
        for q in ('text', 'audio')
        for k in ('R@1', 'R@5', 'R@10', 'median_rank')
    }
    assert trained['retrieval'].scalars['text_to_video/clips'] == 29
    for result in (*trained.values(), *random.values()):
        for name, value in result.scalars.items():
            assert np.isfinite(value)
            if name.rsplit('/')[-1] not in ('clips', 'C'):
                low, high = result.artifacts[f'{name}/interval']
                assert low <= value <= high and result.artifacts[f'{name}/chance'] >= 0
    assert trained['retrieval'].scalars != random['retrieval'].scalars  # it is another model
    # the class decides the pitch: the mean spectrum knows it, a random video tower knows some
    assert trained['simple_probe_spectrum'].scalars['accuracy'] > 0.2
    logged = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert any('eval/retrieval/text_to_video/R@10' in line for line in logged)


@pytest.fixture(scope='module')
def view(tiny_run):
    folder, config, data = tiny_run
    return FeatureView(api.load(folder)._encoder, data, batch_size=16)


def test_each_example_once_and_in_order(view):
    """29 clips in batches of 16: no padding row is left, and a clip's feature is that of the clip alone."""
    f = view.features('test', limit=29)
    np.testing.assert_array_equal(f['index'], np.arange(29))
    assert f['pooled']['video'].shape == (29, 32) and f['spaces']['vat']['text.caption'].shape == (
        29,
        1,
        8,
    )
    np.testing.assert_allclose(np.linalg.norm(f['spaces']['va']['audio'], axis=-1), 1, atol=1e-5)
    assert f['labels']['class'].tolist() == [i % 16 for i in range(29)]
    again = FeatureView(view.encoder, view.data, batch_size=8).features('test', limit=29)
    for a, b in zip(jax.tree.leaves(f), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_maps_are_maxima_of_the_last_feature_map(view):
    """The grid of the tiny model is 2 x 2 x 2 (video) and 16 (audio), so one block, and eight."""
    f = view.features('test', limit=29, maps=('video', 'audio'))
    plain = view.features('test', limit=29)
    np.testing.assert_allclose(f['pooled']['video'], plain['pooled']['video'], atol=1e-5)
    enc, batch = view.encoder, next(iter(view.data.one_pass('test', 16, limit=29)))

    @jax.jit
    def tokens(batch):
        batch = preprocess.device_stage(
            batch,
            enc.config.model.inputs,
            enc.config.augment,
            rng := Rng.create(0, 0, batch['position']),
            augment=False,
            dtype='float32',
        )
        return {
            k: e.tokens
            for k, e in enc.model.apply(
                enc.variables, batch, train=False, rng=rng, features=True, method='encode_all'
            ).items()
        }

    with jax.set_mesh(enc.mesh):
        t = jax.tree.map(np.float64, tokens(feature_extractor.place_on_mesh(batch, enc.mesh)))
    for name, want in (
        ('video', t['video'].max(1)),
        ('audio', t['audio'].reshape(16, 8, 2, -1).max(2).reshape(16, -1)),
    ):
        np.testing.assert_allclose(
            f['maps'][name][:16], want / np.linalg.norm(want, axis=-1, keepdims=True), atol=1e-5
        )


def test_an_example_that_comes_twice_is_an_error(view):
    class Twice:
        def one_pass(self, *args, **kwargs):
            batch = next(iter(view.data.one_pass('test', 16, limit=16)))
            return iter([batch, batch])

    with pytest.raises(RuntimeError, match='16 examples came more than once'):
        FeatureView(view.encoder, Twice(), 16).features('test')
    with pytest.raises(RuntimeError, match='no batch'):
        feature_extractor.compute_features(view.encoder, iter([]))


def test_equal_requests_are_computed_once(view):
    class Counted:
        info, passes = view.data.info, 0

        def one_pass(self, *args, **kwargs):
            Counted.passes += 1
            return view.data.one_pass(*args, **kwargs)

    own = FeatureView(view.encoder, Counted(), 16)
    results = evals.run_all(
        ConfigDict(
            {
                n: {'type': 'retrieval', 'limit': 16, 'pairs': (('audio', 'video', 'va'),)}
                for n in ('b', 'a')
            }
        ),
        own,
    )
    assert (
        Counted.passes == 1
        and list(results) == ['a', 'b']
        and results['a'].scalars == results['b'].scalars
    )
    assert own.features('test', limit=16) is own.features('test', limit=16)
    for other in (
        {'limit': 8},
        {'limit': 16, 'change': 'single_frame'},
        {'limit': 16, 'by': 'records'},
        {'limit': 16, 'views': {'audio.shifted': {'kind': 'shift', 'seconds': 0.5}}},
        {'limit': 16, 'window': {'kind': 'window', 'number': 0, 'of': 2}},
    ):
        before = Counted.passes
        own.features('test', **other)
        assert Counted.passes == before + 1, other


def test_other_variables_use_the_compiled_programs(view):
    """A second evaluation of a run compiles nothing, and computes with its own variables."""
    batch = next(iter(view.data.one_pass('test', 16, limit=16)))
    first, programs = view.encoder(batch), view.encoder._forward._cache_size()
    larger = jax.tree.map(lambda x: 1.5 * x, view.encoder.variables)
    second = view.encoder.on(larger)(batch)
    assert view.encoder._forward._cache_size() == programs
    alone = feature_extractor.FeatureExtractor(view.encoder.config, larger, view.encoder.mesh)(
        batch
    )
    np.testing.assert_array_equal(second['pooled']['video'], alone['pooled']['video'])
    assert np.abs(second['pooled']['video'] - first['pooled']['video']).max() > 0.1
    np.testing.assert_array_equal(view.encoder(batch)['pooled']['video'], first['pooled']['video'])


def test_baseline_runs_only_what_asks_for_it(view):
    config = ConfigDict(
        {
            n: {'type': 'sync', 'limit': 16, 'seconds': 0.5, 'baseline': n == 'kept'}
            for n in ('kept', 'dropped')
        }
    )
    assert set(evals.run_all(config, view)) == {'kept', 'dropped'} and set(
        evals.run_all(config, view, baseline=True)
    ) == {'kept'}


def test_single_frame_holds_the_middle_frame(view):
    batch = next(iter(view.data.one_pass('test', 8, limit=8)))
    batch['video.second'] = batch['video']
    changed = evals.CHANGES['single_frame'](batch)
    for name in ('video', 'video.second'):
        assert (changed[name]['data'] == batch[name]['data'][:, 2:3]).all() and changed[name][
            'data'
        ].shape == batch[name]['data'].shape
        assert (changed[name]['box'] == batch[name]['box']).all()
    assert (
        changed['audio'] is batch['audio']
        and (batch['video']['data'] != batch['video']['data'][:, 2:3]).any()
    )
    still, moving = (
        view.features('test', limit=8, change='single_frame'),
        view.features('test', limit=8),
    )
    assert not np.allclose(still['pooled']['video'], moving['pooled']['video'], atol=1e-4)
    np.testing.assert_allclose(still['pooled']['audio'], moving['pooled']['audio'], atol=1e-6)


def test_passes_draw_other_windows_each(view):
    plain, one, two = (
        view.features('train', limit=16, **asked)
        for asked in ({}, {'draw': 'probe 0'}, {'draw': 'probe 1'})
    )
    away = lambda a, b: np.abs(a['pooled']['video'] - b['pooled']['video']).max()
    assert min(away(plain, one), away(one, two), away(plain, two)) > 1e-3
    np.testing.assert_array_equal(one['labels']['class'], two['labels']['class'])
    assert view.features('train', limit=16, draw='probe 0') is one


def test_simple_probe_on_the_synthetic_source(view):
    """Its mean colour is the class's colour (4 of 16 classes apart), its mean spectrum the pitch: both far above chance."""
    run = lambda **c: evals.build(
        'p',
        ConfigDict(
            {'type': 'simple_probe', 'train_limit': 64, 'test_limit': 32, 'strengths': (1.0,), **c}
        ),
    ).run(view)
    colour = run(stream='video')
    assert (
        colour.scalars['accuracy'] > 2.5 * colour.artifacts['accuracy/chance']
        and colour.artifacts['train'] == 64
    )
    assert run(stream='audio').scalars['accuracy'] > 2.5 / 16
    with pytest.raises(ConfigError, match="no stream 'flow'"):
        run(stream='flow')
    with pytest.raises(ConfigError, match="label 'colour' is not among class"):
        run(label='colour')


def test_save_and_load_round_trip(tmp_path):
    results = {
        'a': Result(
            {'x/y': 0.5},
            {
                'x/y/interval': (0.1, 0.9),
                'matrix': np.arange(6, dtype=np.float16).reshape(2, 3),
                'classes': ['é'],
            },
        ),
        'b': Result({'z': 1.0}),
    }
    folder = tmp_path / 'evals' / 'step'
    evals.save(results, folder)
    evals.save(results, folder)  # a second time replaces the first
    assert sorted(p.name for p in folder.parent.iterdir()) == ['step']
    back = evals.load(folder)
    assert {k: r.scalars for k, r in back.items()} == {'a': {'x/y': 0.5}, 'b': {'z': 1.0}}
    assert (
        back['a'].artifacts['x/y/interval'] == [0.1, 0.9]
        and back['a'].artifacts['classes'] == ['é']
        and back['b'].artifacts == {}
    )
    np.testing.assert_array_equal(back['a'].artifacts['matrix'], results['a'].artifacts['matrix'])
    assert back['a'].artifacts['matrix'].dtype == np.float16


# ---- classification


def classify(logits, y, valid=None, name='class'):
    n = len(y)
    f = {
        'predictions': {name: logits},
        'labels': {'class': y},
        'valid': {'video': np.ones(n, bool) if valid is None else valid},
    }
    return evals.build('c', ConfigDict({'type': 'classification'})).run(Known({'test': f}))


def test_classification_top1_and_top5():
    logits = -np.abs(np.arange(8)[None] - np.array([[0], [0], [0], [7]])).astype(
        float
    )  # classes in order of distance from 0, 0, 0, 7
    result = classify(logits, np.array([0, 4, 5, -1]))
    assert result.scalars == {
        'accuracy': pytest.approx(1 / 3),
        'top5': pytest.approx(2 / 3),
    }  # the unlabelled clip does not count
    assert result.artifacts['accuracy/chance'] == 1 / 8 and result.artifacts['top5/chance'] == 5 / 8
    assert (
        classify(logits, np.array([0, 4, 5, 0]), valid=np.array([1, 0, 0, 0], bool)).scalars[
            'accuracy'
        ]
        == 1
    )  # nor do clips without video
    assert classify(logits[:, :3], np.array([0, 1, 2, 2])).scalars['top5'] == 1
    with pytest.raises(
        ConfigError, match=r"expected a label that the objective predicts \(colour\), got 'class'"
    ):
        classify(logits, np.array([0, 0, 0, 0]), name='colour')
    with pytest.raises(ConfigError, match='none of 4 clips'):
        classify(logits, np.full(4, -1))


def test_multi_window_logits_or_probabilities_are_averaged():
    """Three windows and two crops; one very sure window outweighs the others in logits and not in probabilities."""
    logits = np.zeros((6, 2, 3))
    logits[:, 0, 1], logits[0, 0, 2] = 1.0, 9.0
    logits[:, 1, 0] = 1.0
    y = np.array([2, 0])
    part = lambda x: {
        'predictions': {'class': x},
        'labels': {'class': y},
        'valid': {'video': np.ones(2, bool)},
    }
    parts = {('test', i // 2, float(i % 2)): part(x) for i, x in enumerate(logits)}
    run = lambda **c: (
        evals.build('c', ConfigDict({'type': 'classification', 'windows': 3, 'crops': 2, **c}))
        .run(Known(parts))
        .scalars['accuracy']
    )
    assert run() == 1 and run(pool='probabilities') == 0.5
    with pytest.raises(ConfigError, match='expected positive numbers, got windows=0, crops=2'):
        run(windows=0)


def test_multi_label_scores_are_scikit_learns():
    from scipy.stats import norm
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(300, 7)), 1)  # ties abound
    targets = (rng.uniform(size=(300, 7)) < 1 / (1 + np.exp(-2 * scores - 0.5))).astype(np.float32)
    targets[:, 5], targets[:, 6] = (
        0,
        1,
    )  # nothing can be said about classes without examples, or without others
    targets[9] = 0
    result = classify(scores, targets)
    use = np.arange(300) != 9  # the clip without any label does not count
    aucs = [roc_auc_score(targets[use, c], scores[use, c]) for c in range(5)]
    assert result.scalars['mAP'] == pytest.approx(
        np.mean([average_precision_score(targets[use, c], scores[use, c]) for c in range(5)])
    )
    assert (
        result.scalars['AUC'] == pytest.approx(np.mean(aucs))
        and result.artifacts['classes_scored'] == 5
    )
    assert result.scalars['d_prime'] == pytest.approx(np.mean(np.sqrt(2) * norm.ppf(aucs)))
    low, high = result.artifacts['mAP/interval']
    assert low < result.scalars['mAP'] < high and high - low < 0.15
    perfect = classify(np.array([[2.0, -1], [1, -2], [0, 3]]), np.array([[1, 0], [1, 0], [0, 1]]))
    assert perfect.scalars['mAP'] == 1 == perfect.scalars['AUC'] and np.isfinite(
        perfect.scalars['d_prime']
    )


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
    assert (
        scalars['classification/accuracy'] > 3 / 16
        and scalars['classification/top5'] >= scalars['classification/accuracy']
    )
    assert loop.newest(tmp_path) == 300
    # what was not read was not made, and says so
    tuned = api.load(tmp_path)
    assert not [p for p in tuned.paths() if 'audio' in p] and tuned.embed(
        video=np.zeros((4, 16, 16, 3), np.uint8)
    )['video']['pooled'].shape == (32,)
    with pytest.raises(ConfigError, match='this model has no audio tower; it has video'):
        tuned.embed(audio=np.zeros(1024, np.int16))


def test_features_on_eight_devices(tiny_run, view):
    _, config, data = tiny_run
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})
    many = FeatureView(
        feature_extractor.FeatureExtractor(
            config, jax.device_put(view.encoder.variables, sharding.replicated(mesh)), mesh
        ),
        data,
        16,
    )
    one, eight = view.features('test', limit=29), many.features('test', limit=29)
    np.testing.assert_array_equal(eight['index'], np.arange(29))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
