"""Captioning metrics against brute force in float64 and values worked by hand; their files."""

import collections
import functools
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.config import ConfigError
from vatt_jax.evals import captioning
from vatt_jax.evals.captioning import __main__ as command
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


# ---- All of them, and files


def write_example(folder):
    """A file of results and one of references; the second caption is right."""
    results, references = folder / 'results.json', folder / 'references.json'
    captioning.write_results(results, {7: 'A dog runs.', 'b': 'Two red cats sleep here!'})
    known = {7: ['A cat sits.', 'One dog runs'], 'b': ['two red cats sleep here']}
    captioning.write_references(references, known)
    return results, references


def test_scores_are_of_tokenised_captions(tmp_path):
    results, references = write_example(tmp_path)
    scores = captioning.score_files(results, references)
    candidates = ['a dog runs', 'two red cats sleep here']
    known = [['a cat sits', 'one dog runs'], ['two red cats sleep here']]
    expected = {
        **{f'BLEU-{n}': value for n, value in enumerate(captioning.bleu(candidates, known), 1)},
        'METEOR-like': captioning.meteor_like(candidates, known),
        'ROUGE-L': captioning.rouge_l(candidates, known).mean(),
        'CIDEr': captioning.cider(candidates, known).mean(),
        'CIDEr-D': captioning.cider_d(candidates, known).mean(),
    }
    assert list(scores) == list(expected)
    np.testing.assert_allclose(list(scores.values()), list(expected.values()))
    # Eight of eight words: "a" of the first reference, "dog runs" of the second.
    np.testing.assert_allclose(scores['BLEU-1'], 1, rtol=1e-6)


def test_the_command_prints_them(tmp_path, capsys):
    results, references = write_example(tmp_path)
    flags = [f'--results={results}', f'--references={references}', '--metrics=ROUGE-L,BLEU']
    command.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['ROUGE-L', *(f'BLEU-{n}' for n in (1, 2, 3, 4))]
    assert lines[1].split()[1] == '1.0000'


@pytest.mark.parametrize('name', ['SPICE', 'METEOR'])
def test_what_needs_java_is_told(name):
    with pytest.raises(ConfigError, match=f'{name} is not available.*Java.*write_results'):
        captioning.score(['a'], [['a']], ['BLEU', name])


def test_an_unknown_metric_is_named():
    with pytest.raises(ConfigError, match='metrics=.BLUE.: choose one of BLEU, METEOR-like'):
        captioning.score(['a'], [['a']], ['BLUE'])


@pytest.mark.parametrize(
    'candidates, references, message',
    [
        (['a'], [['a'], ['b']], 'as many candidates as lists of references.*1 and 2'),
        ([], [], 'at least one, got 0 and 0'),
        (['a', 'b'], [['a'], []], r'references\[1\]: expected a list of at least one caption'),
        (['a'], ['a b'], r"references\[0\]: expected a list of at least one caption, got 'a b'"),
    ],
)
def test_lists_that_do_not_fit_are_named(candidates, references, message):
    for metric in (captioning.bleu, captioning.rouge_l, captioning.cider, captioning.meteor_like):
        with pytest.raises(ValueError, match=message):
            metric(candidates, references)


def test_files_are_read_as_they_were_written(tmp_path):
    results, references = write_example(tmp_path)
    assert captioning.read_results(results) == {7: 'A dog runs.', 'b': 'Two red cats sleep here!'}
    known = captioning.read_references(references)
    assert known == {7: ['A cat sits.', 'One dog runs'], 'b': ['two red cats sleep here']}
    entry = json.loads(references.read_text())
    assert entry['images'] == [{'id': 7}, {'id': 'b'}]
    assert [caption['id'] for caption in entry['annotations']] == [0, 1, 2]


def test_pictures_are_paired_in_the_order_of_the_results():
    references = {1: ['a'], 2: ['b', 'c'], 3: ['d']}
    assert captioning.pair({3: 'x', 1: 'y', 2: 'z'}, references) == (
        ['x', 'y', 'z'],
        [['d'], ['a'], ['b', 'c']],
    )
    with pytest.raises(ConfigError, match='2 of 3 pictures have no caption.*image_id 2'):
        captioning.pair({1: 'x'}, references)
    assert captioning.pair({1: 'x'}, references, allow_missing=True) == (['x'], [['a']])
    with pytest.raises(ConfigError, match="no reference, the first is image_id '1'; .* like 1"):
        captioning.pair({'1': 'x'}, references)


@pytest.mark.parametrize(
    'read, text, message',
    [
        (captioning.read_results, '{', 'expected a JSON file of captions'),
        (captioning.read_results, '{}', 'expected results, a list'),
        (captioning.read_results, '[{"image_id": 1}]', r'\[0\]: expected an object with image_id'),
        (captioning.read_results, '[{"image_id": 1.5, "caption": "a"}]', 'expected a number or a'),
        (captioning.read_results, '[{"image_id": 1, "caption": 2}]', 'expected a sentence, got 2'),
        (
            captioning.read_results,
            '[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]',
            r'\[1\]: image_id 1 has a second caption',
        ),
        (captioning.read_references, '[]', 'expected references, an object with a list'),
        (captioning.read_references, '{"annotations": [3]}', r'annotations\[0\]: expected an obj'),
    ],
)
def test_files_of_another_form_are_named(tmp_path, read, text, message):
    path = tmp_path / 'file.json'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(['image_id', 'caption', 'annotations']), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_any_json_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.mktemp('any') / 'file.json'
    path.write_text(json.dumps(value))
    for read in (captioning.read_results, captioning.read_references):
        try:
            captions = read(path)
        except ConfigError:
            continue
        assert all(isinstance(image, int | str) for image in captions)
