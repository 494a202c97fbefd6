"""Retrieval where clips have several captions, against definitions that sort every list."""

import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from vatt_jax import evals
from vatt_jax.evals import FeatureView, retrieval, statistics

BOTH_WAYS = (('text', 'video', 'vat'), ('video', 'text', 'vat'))


class KnownView(FeatureView):
    """Features of the split `test`, as `FeatureView` gives them."""

    seed = 0

    def __init__(self, features):
        self._features = features

    def features(self, split, **request):
        return self._features


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def features(video, captions, mask):
    """Features of n clips.

    Args:
        video: [n E].
        captions: [n K E].
        mask: bool [n K], which captions there are.
    """
    n = len(video)
    spaces = {'vat': {'video': video, 'text': captions[:, :1], 'text.caption': captions}}
    return {
        'spaces': spaces,
        'index': np.arange(n),
        'valid': {name: np.ones(n, bool) for name in spaces['vat']},
        'mask': {'text': mask[:, :1], 'text.caption': mask},
    }


def retrieve(known, **fields):
    entry = ConfigDict({'type': 'retrieval', 'pairs': BOTH_WAYS, **fields})
    return evals.build('r', entry).run(KnownView(known))


def noisy_captions(n, num_captions, seed=0):
    """Clips, captions near them, and a mask that leaves each clip one to all of its captions."""
    rng = np.random.default_rng(seed)
    video = unit(rng.normal(size=(n, 8)))
    captions = unit(video[:, None] + 0.5 * rng.normal(size=(n, num_captions, 8)))
    count = rng.integers(1, num_captions + 1, n)
    return video, captions, np.arange(num_captions) < count[:, None]


def place_of(right, scores):
    """Place from 1 of the first right answer in the sorted list."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return min(order.index(i) for i in right) + 1


def test_all_captions_count():
    """Each caption asks for its clip; a clip asks for any of its captions among all of them."""
    n, num_captions = 40, 5
    video, captions, mask = noisy_captions(n, num_captions)
    result = retrieve(features(video, captions, mask)).scalars

    existing = [(clip, k) for clip in range(n) for k in range(num_captions) if mask[clip, k]]
    to_video = []
    for clip, k in existing:
        to_video.append(place_of([clip], (video @ captions[clip, k]).tolist()))
    to_text = []
    for clip in range(n):
        scores = [float(video[clip] @ captions[other]) for other in existing]
        own = [i for i, (owner, _) in enumerate(existing) if owner == clip]
        to_text.append(place_of(own, scores))
    for name, places in (('text_to_video', to_video), ('video_to_text', to_text)):
        for k in (1, 5, 10):
            assert result[f'{name}/R@{k}'] == pytest.approx(np.mean(np.array(places) <= k))
        assert result[f'{name}/median_rank'] == np.median(places)
        assert result[f'{name}/clips'] == n
        assert result[f'{name}/captions'] == len(existing)
    # They matter: captions other than the first are found at other places.
    first_only = retrieve(features(video, captions[:, :1], mask[:, :1])).scalars
    assert first_only['text_to_video/R@1'] != result['text_to_video/R@1']
    assert 'text_to_video/captions' not in first_only


def test_one_caption_each_is_the_plain_retrieval():
    """Captions that are not there change nothing, not even the intervals."""
    video, captions, _ = noisy_captions(30, 4)
    mask = np.arange(4) < np.ones((30, 1))
    padded = retrieve(features(video, captions, mask))
    plain = retrieve(features(video, captions[:, :1], mask[:, :1]))
    assert padded.scalars == plain.scalars
    interval = 'text_to_video/R@5/interval'
    assert padded.artifacts[interval] == plain.artifacts[interval]


def test_a_model_that_embeds_all_alike_scores_chance():
    n, num_captions = 25, 4
    alike = np.ones((n, num_captions, 8)) / 8**0.5
    mask = np.ones((n, num_captions), bool)
    result = retrieve(features(alike[:, 0], alike, mask))
    total = n * num_captions
    for k in (1, 5, 10):
        # None of four right answers among k of a hundred, drawn without replacement.
        chance = 1 - math.comb(total - num_captions, k) / math.comb(total, k)
        assert result.scalars[f'video_to_text/R@{k}'] == pytest.approx(chance)
        assert result.artifacts[f'video_to_text/R@{k}/chance'] == pytest.approx(chance)
        assert result.scalars[f'text_to_video/R@{k}'] == pytest.approx(k / n)
        assert result.artifacts[f'text_to_video/R@{k}/chance'] == pytest.approx(k / n)
    assert result.artifacts['text_to_video/median_rank/chance'] == (n + 1) / 2
    # The smallest r at which one of the four is among the first r in half of all orders.
    odds = [1 - math.comb(total - num_captions, r) / math.comb(total, r) for r in range(1, total)]
    expected = next(r for r, odd in enumerate(odds, 1) if odd >= 0.5)
    assert result.artifacts['video_to_text/median_rank/chance'] == expected


def test_what_is_not_a_number_never_comes_first():
    similarity = np.array([[np.nan, 1.0, 0.5], [np.nan, np.nan, 0.5], [0.2, 0.9, np.nan]])
    is_own = np.array([[True, True, False], [True, True, False], [True, True, False]])
    better, _, tied = statistics.compare_with_own(similarity, is_own)
    # The other answer is good; there is none; the wrong one is no number.
    assert better.tolist() == [0, 1, 1]
    assert tied.min() == 1


def test_blocks_of_queries_do_not_matter(monkeypatch):
    known = features(*noisy_captions(20, 3, seed=4))
    whole = retrieve(known)
    monkeypatch.setattr(retrieval, 'QUERIES_AT_ONCE', 7)
    blocks = retrieve(known)
    assert blocks.scalars == whole.scalars
    np.testing.assert_array_equal(
        blocks.artifacts['text_to_video/top'], whole.artifacts['text_to_video/top']
    )


def test_what_is_shown_is_one_row_a_clip():
    """The first caption of each clip asks, and the best caption of each answers."""
    n = 15
    video, captions, mask = noisy_captions(n, 4)
    artifacts = retrieve(features(video, captions, mask)).artifacts
    np.testing.assert_allclose(
        artifacts['text_to_video/similarity'], captions[:, 0] @ video.T, atol=1e-3
    )
    scores = np.where(mask, np.einsum('ve,nke->vnk', video, captions), -np.inf)
    np.testing.assert_allclose(artifacts['video_to_text/similarity'], scores.max(-1), atol=1e-3)
    for name in ('text_to_video', 'video_to_text'):
        assert artifacts[f'{name}/top'].shape == (n, retrieval.SHOWN_CLIPS)
        assert artifacts[f'{name}/rank'].shape == (n,)


def test_intervals_are_over_clips():
    """Twenty copies of a caption say no more than one: the interval stays as wide."""
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 50).astype(float)
    once = statistics.bootstrap_groups(hits, np.arange(50))
    copies = statistics.bootstrap_groups(np.repeat(hits, 20), np.repeat(np.arange(50), 20))
    assert copies == pytest.approx(once)
    low, high = statistics.bootstrap(np.repeat(hits, 20))
    assert high - low < 0.5 * (once[1] - once[0])


@pytest.mark.parametrize('max_captions', [1, 2])
def test_a_part_of_the_captions_counts(max_captions):
    """COCO's pictures have five to seven captions, of which some count five."""
    video, captions, mask = noisy_captions(30, 4, seed=2)
    limited = retrieve(features(video, captions, mask), captions=max_captions)
    expected = retrieve(features(video, captions, mask & (np.arange(4) < max_captions)))
    assert limited.scalars == expected.scalars
    whole = retrieve(features(video, captions, mask))
    assert limited.scalars['text_to_video/R@1'] != whole.scalars['text_to_video/R@1']


def test_large_galleries_show_a_part(monkeypatch):
    """The scores are of all; the matrix of the report is of the first clips."""
    known = features(*noisy_captions(20, 3, seed=4))
    whole = retrieve(known)
    monkeypatch.setattr(retrieval, 'MATRIX_CLIPS', 6)
    monkeypatch.setattr(retrieval, 'QUERIES_AT_ONCE', 4)
    part = retrieve(known)
    assert part.scalars == whole.scalars
    for name in ('text_to_video', 'video_to_text'):
        matrix = whole.artifacts[f'{name}/similarity']
        np.testing.assert_array_equal(part.artifacts[f'{name}/similarity'], matrix[:6, :6])
        np.testing.assert_array_equal(part.artifacts[f'{name}/top'], whole.artifacts[f'{name}/top'])
