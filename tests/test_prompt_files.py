"""Files of class names and templates, and what the evaluator zero_shot makes of them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_evals import run_evaluator
from tests.test_zero_shot import KnownSentences, features_of
from vatt_jax.config import ConfigError
from vatt_jax.inference import prompt_files
from vatt_jax.inference.prompt_files import ClassNames
from vatt_jax.inputs import class_sentences

NAMES = ('great white shark', "jack-o'-lantern", 'T-shirt')
IDS = ('n01484850', 'n03590841', 'n04370456')


@pytest.fixture
def write(tmp_path):
    """Writes a file of text, or of anything as JSON; returns its path."""

    def write_file(content, name='names.txt'):
        path = tmp_path / name
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding='utf-8')
        return str(path)

    return write_file


# ---- files of names


def lines(*rows):
    return ''.join(f'{row}\n' for row in rows)


@pytest.mark.parametrize(
    'content, ids',
    [
        (lines(*NAMES), ()),
        ('\ufeff' + '\r\n'.join(NAMES), ()),
        (lines('', NAMES[0].replace(' ', '_'), *NAMES[1:], ' '), ()),
        (list(NAMES), ()),
        (lines(*map(' '.join, zip(IDS, NAMES))), IDS),
        (lines(*map('\t'.join, zip(IDS, NAMES))), IDS),
        (dict(zip(IDS, NAMES)), IDS),
        # Keras' imagenet_class_index.json; in any order, as objects have none.
        ({str(i): [IDS[i], NAMES[i].replace(' ', '_')] for i in (2, 0, 1)}, IDS),
        ({str(i): NAMES[i] for i in (1, 2, 0)}, ()),
        # torchvision's class_to_idx.
        ({NAMES[i]: i for i in (1, 0, 2)}, NAMES),
        ({'imagenet1k': list(NAMES)}, ()),
    ],
)
def test_files_of_names(write, content, ids):
    found = prompt_files.read_names(write(content, 'names.json'), 'x')
    assert found == ClassNames(NAMES, ids)


def test_one_list_of_an_object_of_lists(write):
    path = write({'imagenet1k': list(NAMES), 'cifar10': ['cat', 'dog']}, 'en_classnames.json')
    assert prompt_files.read_names(f'{path}:cifar10', 'x').names == ('cat', 'dog')
    assert prompt_files.read_names(f'{path}:imagenet1k', 'x').names == NAMES
    with pytest.raises(ConfigError, match='one of the keys imagenet1k, cifar10, got none'):
        prompt_files.read_names(path, 'x')
    with pytest.raises(ConfigError, match="imagenet1k, cifar10, got 'imagenet'"):
        prompt_files.read_names(f'{path}:imagenet', 'x')
    with pytest.raises(ConfigError, match='no JSON object of lists; drop :cifar10'):
        prompt_files.read_names(f'{write(list(NAMES), "list.json")}:cifar10', 'x')


@pytest.mark.parametrize(
    'content, message',
    [
        ('', 'the file is empty'),
        ('[]', 'the file is empty'),
        ('["a", "b"', 'not readable as JSON: Expecting'),
        ('[' * 100_000, 'nested too deeply'),
        (lines("'a dog',", "'a cat',"), 'entry 1: expected a line without quotes'),
        (['a', 3], 'expected class names, got 3'),
        (['a', ' '], "expected class names, got ' '"),
        ({'0': 'a', '2': 'b'}, r'expected the keys 0 to 1, got \[0, 2\]'),
        ({'a': 0, 'b': 2}, r'expected the numbers 0 to 1, each once, got \[0, 2\]'),
        ({'a': 0, 'b': 0}, r'expected the numbers 0 to 1, each once, got \[0, 0\]'),
    ],
)
def test_broken_files_of_names_are_one_sentence(write, content, message):
    path = write(content)
    with pytest.raises(ConfigError, match=message) as error:
        prompt_files.read_names(path, 'config.evals.x.names_file')
    assert f'config.evals.x.names_file={path!r}' in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match='cannot be read: No such file'):
        prompt_files.read_names(str(tmp_path / 'nowhere.txt'), 'x')
    (tmp_path / 'latin.txt').write_bytes('Gänse\n'.encode('latin-1'))
    with pytest.raises(ConfigError, match='expected UTF-8'):
        prompt_files.read_names(str(tmp_path / 'latin.txt'), 'x')


# Names as people write them: of one line, no marks of JSON or Python before them.
words = st.text(st.characters(codec='utf-8', exclude_categories=['C', 'Z']), min_size=1, max_size=8)
names = st.lists(words, min_size=1, max_size=4).map(' '.join)


def is_plain(name):
    spaced = ' '.join(name.replace('_', ' ').split())
    return name[0] not in '[{\'"' and spaced == name


@settings(max_examples=30, deadline=None)
@given(st.lists(names.filter(is_plain), min_size=1, max_size=6))
def test_names_come_back_from_every_kind_of_file(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp('names')
    ids = [f'n{number:08d}' for number in range(len(written))]
    for content in (
        lines(*written),
        written,
        dict(zip(ids, written)),
        lines(*(f'{i} {name}' for i, name in zip(ids, written))),
        {str(number): list(pair) for number, pair in enumerate(zip(ids, written))},
    ):
        path = folder / 'file.json'
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding='utf-8')
        assert list(prompt_files.read_names(str(path), 'x').names) == written


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_names_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp('any') / 'file.json'
    path.write_bytes(content)
    try:
        assert prompt_files.read_names(str(path), 'x').names
    except ConfigError as error:
        assert '\n' not in str(error)


# ---- files of templates


@pytest.mark.parametrize(
    'content, key',
    [
        (lines('a photo of a {}.', '{} on a table'), ''),
        (lines('{} on a table', 'a photo of a {}.'), ''),
        (['a photo of a {}.', '{} on a table'], ''),
        ({'a': ['a photo of a {}.', '{} on a table'], 'b': ['{}']}, ':a'),
    ],
)
def test_files_of_templates(write, content, key):
    found = prompt_files.read_templates(write(content, 'templates.json') + key, 'x')
    assert sorted(found) == ['a photo of a {}.', '{} on a table']


def test_broken_files_of_templates(write):
    with pytest.raises(ConfigError, match='got a JSON object of other things'):
        prompt_files.read_templates(write({'a': 'b'}), 'x')
    with pytest.raises(ConfigError, match='without quotes, got "lambda|without quotes, got'):
        prompt_files.read_templates(write(lines("'a photo of a {}.',")), 'x')


def test_both_marks_stand_for_the_name():
    assert class_sentences.fill(['a {}', 'two {c} and {c}', '{d} {}'], r'\1 {c}') == [
        r'a \1 {c}',
        r'two \1 {c} and \1 {c}',
        r'{d} \1 {c}',
    ]


# ---- which name a class of the data has


def test_names_without_ids_are_in_order():
    given_names = ClassNames(('a', 'b', 'c'))
    assert prompt_files.match_classes(['x', 'y', 'z'], given_names, 'w') == ['a', 'b', 'c']
    with pytest.raises(ConfigError, match='w: expected 2 names, .* got 3; for a part'):
        prompt_files.match_classes(['x', 'y'], given_names, 'w')
    # ImageNet-V2 calls its folders by their positions; ten classes called 1 to 10 are in order.
    assert prompt_files.match_classes(['0', '2'], given_names, 'w') == ['a', 'c']
    assert prompt_files.match_classes(['1', '2', '3'], given_names, 'w') == ['a', 'b', 'c']


def test_names_with_ids_are_looked_up():
    given_names = ClassNames(NAMES, IDS)
    classes = [f'{IDS[2]} jersey, T-shirt', IDS[0]]
    found = prompt_files.match_classes(classes, given_names, 'w')
    assert found == [NAMES[2], NAMES[0]]
    assert prompt_files.match_classes(['2', '0'], given_names, 'w') == [NAMES[2], NAMES[0]]
    with pytest.raises(ConfigError, match="got none for 'n00000000'"):
        prompt_files.match_classes([IDS[0], 'n00000000'], given_names, 'w')
    with pytest.raises(ConfigError, match='as many ids as names, got 2 and 3'):
        prompt_files.match_classes(classes, ClassNames(NAMES, IDS[:2]), 'w')


# ---- the evaluator


class Directions(KnownSentences):
    """A sentence points where its letters lead; clips point anywhere."""

    def __init__(self, features, labels, seen):
        super().__init__(features, labels, {})
        self.seen = seen

    def sentences(self, texts):
        self.seen.extend(texts)
        self._sentences = {text: (direction(text), True) for text in texts}
        return super().sentences(texts)


def direction(text):
    """A unit vector that the letters of a sentence say."""
    drawn = np.random.default_rng(list(text.encode())).normal(size=8)
    return drawn / np.linalg.norm(drawn)


def expected_scores(x, sentences_of_classes):
    """CLIP's protocol, in float64: mean of unit vectors, of unit length again."""
    classes = []
    for sentences in sentences_of_classes:
        mean = np.mean([direction(text) for text in sentences], axis=0)
        classes.append(mean / np.sqrt(np.sum(mean**2)))
    return x @ np.array(classes).T


@pytest.fixture
def clips():
    """Unit vectors of 60 clips, and their classes of three; the last class is rare."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8))
    targets = rng.choice(3, 60, p=(0.6, 0.3, 0.1))
    return x / np.linalg.norm(x, axis=-1, keepdims=True), targets


@pytest.mark.parametrize('at_once', [1, 5, 8192])
def test_scores_are_those_of_clips_protocol(write, clips, monkeypatch, at_once):
    from vatt_jax.evals import zero_shot as evaluator

    monkeypatch.setattr(evaluator, 'SENTENCES_AT_ONCE', at_once)
    x, targets = clips
    templates = ['a photo of a {}.', 'art of the {c}']
    # The data have a part of the classes, in another order.
    classes = [f'{IDS[2]} jersey', IDS[0], IDS[1]]
    seen = []
    view = Directions(features_of(x, targets), classes, seen)
    result = run_evaluator(
        view,
        type='zero_shot',
        names_file=write(list((*NAMES, 'cat'))),
        ids_file=write(lines(*IDS, 'n02121620'), 'ids.txt'),
        templates_file=write({'imagenet1k': templates}, 'templates.json'),
    )
    names_in_order = (NAMES[2], NAMES[0], NAMES[1])
    sentences = [[f'a photo of a {name}.', f'art of the {name}'] for name in names_in_order]
    assert seen == sum(sentences, [])
    predicted = expected_scores(x, sentences).argmax(-1)
    assert result.scalars['accuracy'] == pytest.approx(np.mean(predicted == targets))
    recalls = [np.mean(predicted[targets == k] == k) for k in range(3)]
    assert result.scalars['mean_class_accuracy'] == pytest.approx(np.mean(recalls))
    assert result.artifacts['mean_class_accuracy/chance'] == pytest.approx(1 / 3)
    assert result.scalars['accuracy'] != pytest.approx(result.scalars['mean_class_accuracy'])


def test_classes_without_clips_compete_but_have_no_accuracy():
    axes = np.eye(8)
    view = Directions(features_of([axes[0], axes[1]], np.array([0, 0])), ['a', 'b'], [])
    view.sentences = lambda texts: KnownSentences.sentences(view, texts)
    view._sentences = {'a': (axes[0], True), 'b': (axes[1], True)}
    result = run_evaluator(view, type='zero_shot')
    assert result.scalars['mean_class_accuracy'] == 0.5


def test_frames_are_averaged_as_unit_vectors(clips):
    """Of two windows, the mean of unit embeddings; of each window alone others win."""
    x, targets = clips
    second = np.roll(x, 1, axis=0)
    windows = {
        ('test', 0, None): features_of(x, targets),
        ('test', 1, None): features_of(second, targets),
    }
    view = Directions({}, ['a', 'b', 'c'], [])
    view._features = windows
    result = run_evaluator(view, type='zero_shot', windows=2)
    mean = (x + second) / 2
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    predicted = expected_scores(mean, [['a'], ['b'], ['c']]).argmax(-1)
    assert result.scalars['accuracy'] == pytest.approx(np.mean(predicted == targets))
    alone = expected_scores(x, [['a'], ['b'], ['c']]).argmax(-1)
    assert not np.array_equal(alone, predicted)


def test_given_names_stay_as_they_are_written(clips):
    seen = []
    view = Directions(features_of(*clips), ['a_b', 'iPod', 'c'], seen)
    run_evaluator(view, type='zero_shot')
    assert seen == ['a b', 'i Pod', 'c']
    seen.clear()
    result = run_evaluator(view, type='zero_shot', names=('T-shirt', 'iPod', 'iPod'))
    assert seen == ['T-shirt', 'iPod', 'iPod']
    assert "classes of one name cannot be told apart: 'iPod'" in result.remarks[-1]


@pytest.mark.parametrize(
    'entry, message',
    [
        ({'names': ('a', 'b', 'c'), 'names_file': 'x'}, 'names and names_file are given'),
        ({'templates': ('a {}',), 'templates_file': 'x'}, 'templates and templates_file are'),
        ({'ids_file': 'x'}, 'x.ids_file: expected names or names_file beside it'),
        ({'names_file': 'nowhere.txt'}, "x.names_file='nowhere.txt': cannot be read"),
        ({'templates_file': 'nowhere.txt'}, "x.templates_file='nowhere.txt': cannot be read"),
    ],
)
def test_mistakes_of_an_entry(clips, entry, message):
    view = Directions(features_of(*clips), ['a', 'b', 'c'], [])
    with pytest.raises(ConfigError, match=message):
        run_evaluator(view, type='zero_shot', **entry)
