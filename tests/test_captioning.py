"""Captioning metrics against brute force in float64 and values worked by hand."""

import collections
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.evals import captioning
from vatt_jax.evals.captioning import meteor_score

NUM_PICTURES = 7


@pytest.fixture(scope='module')
def corpus():
    """Candidates and references of few words, so that n-grams repeat; one candidate is empty."""
    rng = np.random.default_rng(0)

    def sentence():
        return ' '.join(rng.choice(list('abcde'), rng.integers(1, 11)))

    references = []
    for _ in range(NUM_PICTURES):
        references.append([sentence() for _ in range(rng.integers(1, 5))])
    candidates = [sentence() for _ in range(NUM_PICTURES)]
    candidates[2] = ''
    candidates[4] = references[4][0]
    return candidates, references


def grams(sentence, n):
    """The runs of n words, in order."""
    words = sentence.split()
    return [' '.join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]


# ---- BLEU


def brute_force_bleu(candidates, references, n):
    log_precision = 0.0
    for k in range(1, n + 1):
        right = total = 0
        for candidate, of_picture in zip(candidates, references):
            own = grams(candidate, k)
            total += len(own)
            for gram in set(own):
                most = max(grams(reference, k).count(gram) for reference in of_picture)
                right += min(own.count(gram), most)
        log_precision += math.log(right / total) / n
    length = sum(len(candidate.split()) for candidate in candidates)
    closest = 0
    for candidate, of_picture in zip(candidates, references):
        lengths = sorted(len(reference.split()) for reference in of_picture)
        gaps = [abs(other - len(candidate.split())) for other in lengths]
        closest += lengths[int(np.argmin(gaps))]
    return math.exp(log_precision + min(0, 1 - closest / length))


def test_bleu_is_brute_force(corpus):
    expected = [brute_force_bleu(*corpus, n) for n in (1, 2, 3, 4)]
    assert 0.1 < expected[3] < expected[0] < 1
    np.testing.assert_allclose(captioning.bleu(*corpus), expected, rtol=1e-6)


def test_bleu_by_hand():
    # Papineni et al.'s own example: of seven "the" two are right.
    references = [['the cat is on the mat', 'there is a cat on the mat']]
    scores = captioning.bleu(['the the the the the the the'], references)
    np.testing.assert_allclose(scores[0], 2 / 7, rtol=1e-6)
    # Half as long as the reference: e^(1 - 4/2).
    np.testing.assert_allclose(captioning.bleu(['a b'], [['a b c d']], 2), math.exp(-1), rtol=1e-6)
    # Of references as close, the shorter one counts, so that nothing is too short.
    np.testing.assert_allclose(captioning.bleu(['a b c'], [['a b c d', 'x y']], 1), 1, rtol=1e-6)
    # Nothing in common: not 0, as the released code adds 1e-15 above and 1e-9 below.
    np.testing.assert_allclose(captioning.bleu(['a b'], [['x y']], 1), 1e-15 / 2, rtol=1e-6)
    assert captioning.bleu([''], [['x y']]) == [0.0] * 4


# ---- ROUGE-L


def brute_force_rouge(candidate, of_picture):
    words = candidate.split()
    precision, recall = [], []
    for reference in of_picture:
        other = reference.split()

        @functools.lru_cache(None)
        def common(i, j, other=tuple(other)):
            if not i or not j:
                return 0
            if words[i - 1] == other[j - 1]:
                return 1 + common(i - 1, j - 1)
            return max(common(i - 1, j), common(i, j - 1))

        length = common(len(words), len(other))
        precision.append(length / len(words) if words else 0)
        recall.append(length / len(other))
    p, r = max(precision), max(recall)
    return (1 + 1.44) * p * r / (r + 1.44 * p) if p and r else 0


def test_rouge_is_brute_force(corpus):
    expected = [brute_force_rouge(*picture) for picture in zip(*corpus)]
    np.testing.assert_allclose(captioning.rouge_l(*corpus), expected, rtol=1e-12)


def test_rouge_by_hand():
    # Three words of four in common, in order: P = R = 3/4.
    found = captioning.rouge_l(['police kill the gunman'], [['police killed the gunman']])
    np.testing.assert_allclose(found, [0.75])
    # P = 1, R = 1/2, by the weight of recall: 2.44 · 0.5 / (0.5 + 1.44).
    np.testing.assert_allclose(captioning.rouge_l(['a b'], [['a x b y']]), [1.22 / 1.94])
    # The best precision and the best recall are of different references.
    found = captioning.rouge_l(['a b c d'], [['a b c x x x', 'd']])
    np.testing.assert_allclose(found, [2.44 * 0.75 / (1 + 1.44 * 0.75)])


# ---- CIDEr


def dense_cider(candidates, references, documents, is_d):
    """By matrices over all n-grams: [pictures] in float64."""
    scores = np.zeros(len(candidates))
    for n in (1, 2, 3, 4):
        sentences = [*candidates, *itertools.chain(*references)]
        vocabulary = sorted(set(itertools.chain(*(grams(x, n) for x in sentences))))

        def counts(sentence, n=n, vocabulary=vocabulary):
            return np.array([grams(sentence, n).count(gram) for gram in vocabulary], float)

        held = np.zeros(len(vocabulary))
        for captions in documents:
            held += np.max([counts(caption) > 0 for caption in captions], axis=0)
        idf = np.log(len(documents) / np.maximum(held, 1))
        for number, (candidate, of_picture) in enumerate(zip(candidates, references)):
            for reference in of_picture:
                x, y = counts(candidate) * idf, counts(reference) * idf
                norms = np.linalg.norm(x) * np.linalg.norm(y)
                if not norms:
                    continue
                if is_d:
                    gap = len(candidate.split()) - len(reference.split())
                    similarity = np.minimum(x, y) @ y * np.exp(-(gap**2) / 72)
                else:
                    similarity = x @ y
                scores[number] += 10 * similarity / norms / 4 / len(of_picture)
    return scores


@pytest.mark.parametrize('is_d', [False, True])
@pytest.mark.parametrize('has_corpus', [False, True])
def test_cider_is_its_dense_definition(corpus, is_d, has_corpus):
    candidates, references = corpus
    documents = [['a b c', 'd'], ['b b'], ['e a'], ['c']] if has_corpus else references
    expected = dense_cider(candidates, references, documents, is_d)
    metric = captioning.cider_d if is_d else captioning.cider
    found = metric(candidates, references, documents if has_corpus else None)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert found[2] == 0 and found.max() > 1


def test_cider_by_hand():
    references = [['a'], ['x y z w']]
    # The other picture's caption is repeated: all four cosines are 1. That of the first one has
    # runs of one word alone: cosine 1 of four, and in CIDEr-D min(2w, w) w / (2w w) = 1/2, times
    # the penalty of one word too many.
    candidates = ['a a', 'x y z w']
    np.testing.assert_allclose(captioning.cider(candidates, references), [2.5, 10])
    expected = [10 / 4 / 2 * math.exp(-1 / 72), 10]
    np.testing.assert_allclose(captioning.cider_d(candidates, references), expected)
    # Of one picture every word is in every document.
    assert captioning.cider_d(['a'], [['a']]) == [0]


# ---- METEOR-like


def fewest_chunks(candidate, reference):
    """(matches, chunks) by enumeration of all alignments."""
    best = (0, 0)
    choices = []
    for word in candidate:
        own = [place for place, other in enumerate(reference) if other == word]
        choices.append([None, *own])
    for alignment in itertools.product(*choices):
        taken = [place for place in alignment if place is not None]
        if len(set(taken)) < len(taken):
            continue
        chunks = 0
        for before, place in zip((None, *alignment), alignment):
            if place is not None and (before is None or place != before + 1):
                chunks += 1
        best = min(best, (-len(taken), chunks))
    return -best[0], best[1]


def test_alignments_have_the_fewest_chunks():
    rng = np.random.default_rng(3)
    chunks_seen = collections.Counter()
    for _ in range(60):
        candidate = list(rng.choice(list('abcd'), rng.integers(1, 7)))
        reference = list(rng.choice(list('abcd'), rng.integers(1, 7)))
        found = meteor_score.align(candidate, reference)
        matches, chunks = fewest_chunks(candidate, reference)
        if candidate == reference:
            chunks = 0
        assert found == (matches, chunks, len(candidate), len(reference))
        chunks_seen[chunks] += 1
    assert len(chunks_seen) > 3


def test_meteor_by_hand():
    assert captioning.meteor_like(['a b c', 'x'], [['a b c'], ['y', 'x']]) == 1
    # Four matches in three chunks: ab, c, d.
    found = captioning.meteor_like(['a b c d'], [['a b d c']])
    np.testing.assert_allclose(found, 1 - 0.6 * 0.75**0.2)
    # P = 1/2, R = 1: one match in one chunk, 1 / (0.15 / 0.5 + 0.85) less 0.6 of it.
    np.testing.assert_allclose(captioning.meteor_like(['a x'], [['a']]), 0.4 / 1.15)
    # Summed over pictures before the formula: 3 matches of 4 and 3 words, in 1 chunk (the second
    # caption is whole and has none).
    found = captioning.meteor_like(['a x', 'b c'], [['a'], ['b c']])
    np.testing.assert_allclose(found, (1 - 0.6 * (1 / 3) ** 0.2) / (0.15 / 0.75 + 0.85))
    assert captioning.meteor_like(['', 'x'], [['a'], ['y']]) == 0


def test_a_caption_of_one_word_many_times_is_aligned_in_no_time():
    found = meteor_score.align(['a'] * 25, ['a'] * 20)
    assert found.matches == 20 and found.chunks == 1


# ---- Words


@pytest.mark.parametrize(
    'caption, words',
    [
        ('A man riding a wave on top of a surfboard.', 'a man riding a wave on top of a surfboard'),
        (
            "A dog's bowl isn't here; they've moved it!",
            "a dog 's bowl is n't here they 've moved it",
        ),
        ('The girls’ “black-and-white” T-shirts', 'the girls black-and-white t-shirts'),
        ('I cannot wait, gonna go...', 'i can not wait gon na go'),
        ('$1,000.50 at 10:30pm – 50% off', '$ 1,000.50 at 10:30 pm 50 % off'),
        ('a 3-year-old and/or 1/2 pizza', 'a 3-year-old and/or 1/2 pizza'),
        ('Mr. Smith of the U.S. at 5 o’clock', "mr. smith of the u.s. at 5 o'clock"),
        # As in the released evaluation: brackets and runs of marks are words.
        ('a cat (gray) !!', 'a cat -lrb- gray -rrb- !!'),
        ('two\nlines\t and   blanks ', 'two lines and blanks'),
        ('. , -- "" \' ', ''),
    ],
)
def test_captions_are_split_as_the_treebank_does(caption, words):
    assert captioning.tokenize(caption) == words


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_any_text_becomes_words(text):
    words = captioning.tokenize(text).split(' ')
    for word in words:
        assert word == ''.join(word.split())
        assert word not in {'.', ',', '?', '!', '-', '--', '...', '"', "'", ';', ':'}
    if text.isascii() and text.isalpha():
        assert ''.join(words) == text.lower()
