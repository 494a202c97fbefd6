"""Socratic models: the graph's checks and log, scorers, both pipelines, re-ranking, the page."""

import math
import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vatt_jax import socratic
from vatt_jax.config import ConfigError
from vatt_jax.socratic import (
    CLIP,
    RANKING,
    TEXT,
    TEXTS,
    Graph,
    ModelScorer,
    Ranking,
    StepError,
    TemplateGenerator,
    page,
    pipelines,
    playground,
    steps,
)
from vatt_jax.socratic import __main__ as command
from vatt_jax.socratic.rerank import best_of_groups, rerank


def by_length(clip, texts):
    """A scorer: the nearer the text's length to the clip, a number, the better."""
    return [-abs(len(text) - clip) for text in texts]


def echo(prompt):
    return f'({prompt})'


def scored(name='best', clip='clip', texts='names', keep=1):
    return socratic.score(name, by_length, clip, texts, keep)


INPUTS = {'clip': CLIP, 'names': TEXTS}


# ---- the graph


def test_steps_run_in_order_and_are_logged():
    graph = Graph(
        INPUTS,
        [
            scored(keep=2),
            socratic.generate('said', echo, 'see {things}!', things='best'),
            socratic.function('shout', lambda x: x.upper(), {'x': TEXT}, TEXT, x='said'),
        ],
    )
    log = graph.run(clip=3, names=['a', 'abc', 'abcd'])
    assert log.values['best'] == Ranking(('abc', 'abcd'), (0.0, -1.0))
    assert log.output == '(SEE ABC, ABCD!)'
    assert [entry.step for entry in log.entries] == ['best', 'said', 'shout']
    assert [entry.action for entry in log.entries] == ['score', 'generate', 'function']
    assert log.entries[0].inputs == {'clip': 3, 'names': ['a', 'abc', 'abcd']}
    assert log.entries[1].prompt == 'see abc, abcd!'
    assert all(entry.seconds >= 0 for entry in log.entries)


@pytest.mark.parametrize(
    'made, message',
    [
        ([], 'expected at least one step, got none'),
        ([scored(), scored()], "step 'best': there is an input or a step of this name already"),
        ([scored('names')], "step 'names': there is an input"),
        (
            [scored(texts='nouns')],
            "step 'best': texts reads 'nouns', which is no input and no step before it; there "
            'are clip, names',
        ),
        (
            [scored('first', texts='second'), scored('second')],
            "step 'first': texts reads 'second', which is no input and no step before it",
        ),
        (
            [scored(texts='clip')],
            "step 'best': texts takes texts or ranking, but 'clip' is clip",
        ),
        ([scored(clip='names')], "step 'best': clip takes clip, but 'names' is texts"),
        (
            [socratic.function('f', len, {'x': TEXT}, TEXT, y='names')],
            "step 'f': expected the arguments x, got y",
        ),
    ],
)
def test_a_graph_that_does_not_fit_names_the_step(made, message):
    with pytest.raises(ConfigError) as error:
        Graph(INPUTS, made)
    assert message in str(error.value)


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: scored(keep=0), "step 'best': keep expects a positive number, got 0"),
        (
            lambda: socratic.generate('said', echo, 'see {thing}', things='best'),
            "step 'said': the template names thing, the step reads things",
        ),
        (
            lambda: socratic.generate('said', echo, 'see', RANKING),
            "step 'said': makes expects TEXT or TEXTS",
        ),
    ],
)
def test_a_step_that_is_none_is_named(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    'inputs, message',
    [
        ({'clip': 3}, 'expected the inputs clip, names, got clip'),
        ({'clip': 3, 'names': ['a'], 'more': 1}, 'got clip, names, more'),
        (
            {'clip': 3, 'names': []},
            'Graph.run(names=…): expected a texts (a list of strings, not empty), got []',
        ),
        ({'clip': None, 'names': ['a']}, 'Graph.run(clip=…): expected a clip'),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, message):
    with pytest.raises(ConfigError) as error:
        Graph(INPUTS, [scored()]).run(**inputs)
    assert message in str(error.value)


def broken(prompt):
    raise OSError('no such model')


@pytest.mark.parametrize(
    'second, message',
    [
        (
            socratic.generate('said', broken, '{x}', x='best'),
            "step 'said' failed: OSError: no such model",
        ),
        (
            socratic.generate('said', len, '{x}', x='best'),
            "step 'said': expected it to make a text (a string), got 1",
        ),
        (
            socratic.generate('said', lambda _: '- \n', '{x}', TEXTS, x='best'),
            "step 'said': expected it to make a texts (a list of strings, not empty), got []",
        ),
        (
            socratic.score('again', lambda clip, texts: [math.nan], 'clip', 'best'),
            "step 'again' failed: ValueError: the scorer gave array([nan])",
        ),
        (
            socratic.score('again', lambda clip, texts: [1, 2], 'clip', 'best'),
            'expected 1 finite numbers, one for each text',
        ),
    ],
)
def test_a_step_that_fails_is_named_and_the_log_before_it_kept(second, message):
    with pytest.raises(StepError) as error:
        Graph(INPUTS, [scored(), second]).run(clip=1, names=['a'])
    assert message in str(error.value)
    assert [entry.step for entry in error.value.log.entries] == ['best']


# ---- steps and generators


def test_what_ties_stays_in_the_order_of_the_texts():
    log = Graph(INPUTS, [scored(keep=3)]).run(clip=1, names=['ab', 'b', '', 'a'])
    assert log.output.texts == ('b', 'a', 'ab')


def test_lines_of_an_answer():
    answer = '1. a dog barks\n\n- rain\n  * rain\n2) 3 cats \n10 dogs'
    assert steps.lines_of(answer) == ['a dog barks', 'rain', '3 cats', '10 dogs']


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(categories=['L']), min_size=1), unique=True))
def test_any_list_comes_back_from_its_lines(texts):
    assert steps.lines_of('\n'.join(f'- {text}' for text in texts)) == texts


def test_a_generator_by_rules_answers_by_the_first_that_fits():
    generator = TemplateGenerator(
        ((r'see (\w+)', r'\1!'), (r'see', 'nothing'), (r'\d+', lambda match: match[0] * 2))
    )
    assert generator('I see cats and see dogs') == 'cats!'
    assert generator('see') == 'nothing'
    assert generator('count 12') == '1212'
    with pytest.raises(ConfigError, match=r"no rule for the prompt 'hear'; there are 'see \(\\\\w"):
        generator('hear')
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        TemplateGenerator((('(', ''),))
    with pytest.raises(ConfigError, match='expected at least one'):
        TemplateGenerator(())


# ---- scorers


class Words:
    """A model whose space has an axis for each of a few words."""

    words = ('red', 'disc', 'bounces', 'appears', 'ring')
    modalities = ('video', 'audio', 'text')

    def __init__(self):
        self.calls = []

    def embed(self, quiet, batch_size=32, **given):
        ((modality, items),) = given.items()
        self.calls.append(modality)
        many = [items] if isinstance(items, str) else items
        rows = np.array([[float(word in text.split()) for word in self.words] for text in many])
        rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
        if isinstance(items, str):
            rows = rows[0]
        return {modality: {'pooled': rows, 'vat': rows.astype(np.float32)}}

    def similarity(self, a, b, space):
        return a[space or 'vat'] @ b[space or 'vat'].T


def test_a_scorer_gives_the_models_cosines_and_reads_texts_once():
    model = Words()
    scorer = ModelScorer(model, 'video', 'a {}')
    clip = {'video': 'red disc', 'audio': 'bounces'}
    np.testing.assert_allclose(scorer(clip, ['red', 'disc red', 'ring']), [0.5**0.5, 1, 0])
    encoded = {'video': model.embed(video='red', quiet=True)['video']}
    model.calls.clear()
    np.testing.assert_allclose(scorer(encoded, ['red', 'disc red', 'ring']), [1, 0.5**0.5, 0])
    assert model.calls == []
    np.testing.assert_allclose(scorer('red', ['ring']), [0])


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda model: ModelScorer(model, 'flow'), 'expected a model of flow, got one of video'),
        (lambda model: ModelScorer(model, 'video', 'a'), "template='a'): expected {} in it"),
        (
            lambda model: ModelScorer(model, 'audio')({'video': 'red'}, ['red']),
            "expected a path or a clip with 'audio', got video",
        ),
        (
            lambda model: ModelScorer(model, 'audio')(3, ['red']),
            "expected a path or a clip with 'audio', got 3",
        ),
    ],
)
def test_what_a_scorer_lacks_is_named(make, message):
    with pytest.raises(ConfigError) as error:
        make(Words())
    assert message in str(error.value)


@pytest.mark.slow
def test_a_scorer_gives_the_cosines_of_a_trained_model(tiny_run):
    import vatt_jax

    model = vatt_jax.load(tiny_run[0])
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    texts = ['red left', 'green right']
    got = ModelScorer(model, 'video')({'video': frames}, texts)
    video = model.embed(video=frames)['video']['vat']
    np.testing.assert_allclose(got, model.embed(text=texts)['text']['vat'] @ video, atol=1e-6)
    # VATT's sound is not in the space of its words.
    with pytest.raises(ConfigError, match='expected one common space of both, got none'):
        ModelScorer(model, 'audio')({'audio': np.zeros(1024, np.int16)}, texts)


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
