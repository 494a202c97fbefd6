"""Scores of captions by name, the command that prints them, and their files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_jax.config import ConfigError
from vatt_jax.evals import captioning
from vatt_jax.evals.captioning import __main__ as command


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
