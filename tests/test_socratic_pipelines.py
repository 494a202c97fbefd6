"""Socratic models: both pipelines on a made-up model, re-ranking, the page, the command."""

import re
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.test_socratic import INPUTS, Words, by_length, echo, scored
from vatt_jax import socratic
from vatt_jax.config import ConfigError
from vatt_jax.socratic import Graph, ModelScorer, Ranking, page, pipelines, playground
from vatt_jax.socratic import __main__ as command
from vatt_jax.socratic.rerank import best_of_groups, rerank

# ---- pipelines


def clips():
    """Three clips of `Words`: what is seen lacks the verb, what is heard has it."""
    seen = ['red disc', 'red ring', 'red disc']
    heard = ['disc bounces', 'ring appears', 'disc appears']
    model = Words()
    embedded = []
    for video, audio in zip(seen, heard, strict=True):
        embedded.append(
            {
                'video': model.embed(video=video, quiet=True)['video'],
                'audio': model.embed(audio=audio, quiet=True)['audio'],
            }
        )
    return playground.Clips(
        embedded,
        ['a red disc bounces on the floor', 'a red ring appears', 'a red disc appears'],
        {
            'event': ['bounce', 'appear', 'appear'],
            'object': ['disc', 'ring', 'disc'],
            'color': ['red', 'red', 'red'],
        },
        {
            'event': ['vanish', 'collide', 'appear', 'bounce'],
            'object': ['ring', 'disc'],
            'color': ['red', 'blue'],
        },
        {},
        left_out=0,
    )


def test_the_six_steps_hear_what_the_pictures_do_not_show():
    see, hear = ModelScorer(Words(), 'video'), ModelScorer(Words(), 'audio')
    logs = playground.run_activity(see, hear, clips())
    assert [entry.step for entry in logs[0].entries] == [
        'entities',
        'possible_sounds',
        'sound',
        'possible_activities',
        'activities',
        'summary',
    ]
    assert [log.output for log in logs] == clips().captions
    assert logs[0].values['entities'].texts[0] == 'a red disc'
    assert logs[0].values['sound'].texts == ('something bounces on the floor',)
    shares = playground.activity_shares(logs, see, clips())
    assert shares['six steps']['event'].value == 1
    assert shares['six steps']['event'].chance == 0.25
    # The pictures alone cannot tell verbs apart: the first of the equal ones is right by luck.
    assert shares['pictures alone']['event'].value < 1
    assert shares['pictures alone']['object'].value == 1


def test_retrieval_gains_by_what_is_heard():
    see, hear = ModelScorer(Words(), 'video'), ModelScorer(Words(), 'audio')
    logs = playground.run_hearing(hear, clips())
    assert [log.output for log in logs] == [
        'a disc bounces on the floor',
        'a ring appears',
        'a disc appears',
    ]
    assert playground.hearing_shares(logs, clips())['object'].value == 1
    shares = playground.retrieval_shares(logs, see, hear, clips())
    assert shares['video → text, base']['R@1'].value == pytest.approx(2 / 3)  # two discs tie
    assert shares['video → text, words, product']['R@1'].value == 1
    assert shares['text → video, truth, standard']['R@1'].value == 1


def test_data_that_are_no_playground_are_named():
    with pytest.raises(ConfigError, match='expected the labels of a playground'):
        playground.check_names({'class': ['walk', 'run']})


def test_any_generator_will_do():
    see = hear = by_length
    graph = pipelines.activity(see, hear, lambda prompt: f'1. {prompt[:5]}\n2. b', entities=1)
    log = graph.run(clip=1, names=['ab', 'abc'])
    assert log.values['possible_sounds'] == ['A vid', 'b']
    assert log.values['sound'] == Ranking(('b',), (0.0,))
    assert log.entries[1].prompt.startswith('A video shows ab. Which sounds')


# ---- re-ranking


def reranked_by_hand(base, second, keep):
    """The order of the candidates of one query, as the published recipe has it."""
    first = sorted(range(len(base)), key=lambda i: -base[i])
    anew = sorted(first[:keep], key=lambda i: -base[i] * second[i])
    return anew + first[keep:]


@pytest.mark.parametrize('keep', [1, 3, 7, 100])
def test_the_first_are_ordered_by_the_product_and_the_others_stay(keep):
    noise = np.random.default_rng(0)
    base, second = noise.uniform(-1, 1, (5, 7)), noise.uniform(-1, 1, (5, 7))
    scores = rerank(base, second, keep=keep)
    for row in range(5):
        expected = reranked_by_hand(base[row].tolist(), second[row].tolist(), keep)
        assert np.argsort(-scores[row], kind='stable').tolist() == expected


def test_queries_without_a_summary_stay_as_they_are():
    base = np.array([[0.1, 0.2], [0.3, 0.4]])
    second = np.array([[1.0, 0.1], [1.0, 0.1]])
    scores = rerank(base, second, np.array([True, False]))
    np.testing.assert_array_equal(scores.argmax(1), [0, 1])
    np.testing.assert_array_equal(scores[1], base[1])


def test_standard_scores_do_not_depend_on_the_spread_of_either():
    noise = np.random.default_rng(1)
    base, second = noise.normal(size=(2, 6)), noise.normal(size=(2, 6))
    expected = rerank(base, second, combination='standard')
    got = rerank(0.01 * base + 3, second, combination='standard')
    np.testing.assert_allclose(got, expected, atol=1e-9)
    by_hand = [(x - x.mean()) / x.std() for x in (base[0], second[0])]
    np.testing.assert_allclose(expected[0], sum(by_hand))


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'second': np.zeros((2, 2))}, r'one shape, got \(2, 3\) and \(2, 2\)'),
        ({'keep': 0}, r'rerank\(keep=0\): expected a positive number'),
        ({'combination': 'sum'}, r"'sum': choose one of product, standard"),
    ],
)
def test_arguments_of_rerank_that_are_wrong_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        rerank(np.zeros((2, 3)), **{'second': np.zeros((2, 3)), **arguments})


def test_the_best_caption_of_each_video_counts():
    scores = np.array([[0.1, 0.9, 0.2, 0.3, 0.4]])
    np.testing.assert_array_equal(best_of_groups(scores, [2, 1, 2]), [[0.9, 0.2, 0.4]])
    with pytest.raises(ConfigError, match='add up to 5 captions, got 4 in 2 groups'):
        best_of_groups(scores, [2, 2])


# ---- the page


def test_the_page_shows_every_step_and_escapes_words(tmp_path):
    graph = Graph(INPUTS, [scored(keep=2), socratic.generate('said', echo, 'see {x}', x='best')])
    names = ['<b>', *(f'name {i}' for i in range(20))]
    log = graph.run(clip=3, names=names)
    table = page.Table('Numbers', 'of <i>', ['', 'R@1'], [['base', '10.0 %']])
    noise = np.random.default_rng(0)
    example = page.Example(
        'What happens: clip 0',
        'a <ring>',
        log,
        noise.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        noise.integers(-99, 99, 100).astype(np.int16),
        8000,
    )
    page.write(tmp_path / 'out' / 'index.html', 'Socratic <models>', [table], [example])
    text = (tmp_path / 'out' / 'index.html').read_text()
    for piece in ('Socratic &lt;models&gt;', '&lt;b&gt;', 'a &lt;ring&gt;', 'of &lt;i&gt;'):
        assert piece in text
    assert '<b>' not in text
    assert text.count('data:image/jpeg') == page.MOST_PICTURES
    assert text.count('data:audio/wav') == 1
    assert '… and 13 more' in text
    assert '<q>see &lt;b&gt;, name 0</q>' in text
    assert '1 best' in text and '2 said' in text


# ---- the command


class Coded(Words):
    """`Words` for batches: a clip's first number says which phrase it shows, or sounds like."""

    phrases = ('red disc', 'red ring', 'disc bounces', 'ring appears', 'disc appears')

    config = types.SimpleNamespace(name='coded')

    def embed(self, quiet, batch_size=32, **given):
        ((modality, items),) = given.items()
        if isinstance(items, np.ndarray):
            items = [self.phrases[clip.flat[0]] for clip in items]
        return super().embed(quiet, **{modality: items})


class FourClips:
    """A data object of four clips, the third of which has no sound."""

    config = ConfigDict({'model': {'inputs': {'audio': {'rate': 8000}}}})
    info = {'labels': {**clips().names, 'class': ['any']}}

    def texts(self, split, by):
        assert (split, by) == ('test', 'segments')
        captions = [*clips().captions[:2], 'silence', clips().captions[2]]
        return [{'caption': caption} for caption in captions]

    def one_pass(self, split, batch_size, by, limit):
        video = np.zeros((5, 2, 4, 4, 3), np.uint8)
        video[:4] = np.array([0, 1, 0, 0])[:, None, None, None, None]
        audio = np.zeros((5, 100), np.int16)
        audio[:4] = np.array([2, 3, 0, 4])[:, None]
        # The last row fills up the batch.
        valid = np.array([True, True, True, True, False])
        yield {
            'valid': valid,
            'position': np.arange(5),
            'video': {'data': video, 'valid': valid},
            'audio': {'data': audio, 'valid': valid & (np.arange(5) != 2)},
            'labels': {
                'event': np.array([3, 2, 0, 2, -1]),
                'object': np.array([1, 0, 1, 1, -1]),
                'color': np.array([0, 0, 0, 0, -1]),
            },
        }


def test_the_command_prints_both_tables_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.api, 'load', lambda folder: Coded())
    monkeypatch.setattr(command, 'open_data', lambda folder: FourClips())
    command.main(['--workdir=runs/any', f'--out={tmp_path}', '--examples=2'])
    printed = capsys.readouterr().out
    assert 'Share of 3 clips' in printed
    assert '1 without pictures or sound are left out' in printed
    assert re.search(r'^event +100.0 % \(100.0 – 100.0\) .* 25.0 %$', printed, re.M)
    assert re.search(r'^video → text, words, product +100.0 %', printed, re.M)
    text = (tmp_path / 'index.html').read_text()
    # Of the first clip and of the last, of both pipelines.
    assert re.findall(r'<h2 id="example-\d">(.*)</h2>', text) == [
        'What happens: clip 0',
        'What is heard: clip 0',
        'What happens: clip 2',
        'What is heard: clip 2',
    ]
    assert text.count('data:audio/wav') == 2


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--workdir=runs/any', '--limit=1'], 'expected at least 2 and 0, got 1, 4'),
        (['--workdir=/nowhere'], '/nowhere'),
    ],
)
def test_flags_that_are_wrong_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        command.main(flags)
