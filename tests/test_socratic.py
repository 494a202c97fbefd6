"""Socratic models: the graph's checks and its log, steps, generators, scorers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    steps,
)


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
