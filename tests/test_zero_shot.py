"""Classes by their names, and those of a fine-tuned model: classify, predict, the evaluator."""

import shutil
import types

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from tests import tiny, typecheck
from tests.test_evals import KnownFeatures, run_evaluator
from vatt_jax import api, evals
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView
from vatt_jax.evals.base import Sentences
from vatt_jax.exchange import hub, standalone
from vatt_jax.importers import safetensors_folder
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import class_sentences
from vatt_jax.training import loop

NAMES = ['red left', 'green_right', 'BlueUp']
TEMPLATES = ('{}', 'stripes move {}')


@pytest.fixture(scope='module')
def model(tiny_run):
    folder, _, _ = tiny_run
    return vatt_jax.load(folder)


def clips(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8) for _ in range(count)]


# ---- names and sentences


@pytest.mark.parametrize(
    'name, words',
    [
        ('brush_hair', 'brush hair'),
        ('ApplyEyeMakeup', 'Apply Eye Makeup'),
        ('playing trumpet', 'playing trumpet'),
        ('Male speech, man speaking', 'Male speech, man speaking'),
        ('walk-with-dog', 'walk with dog'),
        ('TV', 'TV'),
        ('__odd__name_', 'odd name'),
    ],
)
def test_words_of_class_names(name, words):
    assert class_sentences.class_words(name) == words


def test_prompts_are_every_template_of_every_name():
    assert class_sentences.prompts(['a_b', 'c{'], ('{}', 'see {} {'), 'x') == [
        'a b',
        'see a b {',
        'c{',
        'see c{ {',
    ]
    assert class_sentences.prompts(('a', 'b'), 'only {c}', 'x') == ['only a', 'only b']


@pytest.mark.parametrize(
    'names, templates, message',
    [
        ('walk', ('{}',), r"x.names: expected a list of class names, got 'walk'"),
        (['walk'], ('{}',), r'expected two classes or more'),
        (['walk', 'run', 'walk'], ('{}',), r"'walk' occurs more than once"),
        (['walk', 3], ('{}',), r'expected class names, got 3'),
        (['walk', ' '], ('{}',), r"expected class names, got ' '"),
        (['walk', 'run'], ('a video',), r"x.templates: expected sentences .* got 'a video'"),
        (['walk', 'run'], (), r'x.templates: expected sentences with {}, got none'),
    ],
)
def test_names_and_templates_that_are_none(names, templates, message):
    with pytest.raises(ConfigError, match=message):
        class_sentences.prompts(names, templates, 'x')


# ---- Model.classify


def test_zero_shot_scores_are_cosines_with_the_mean_of_the_sentences(model):
    videos = clips(3)
    out = model.classify(video=videos, names=NAMES, templates=TEMPLATES)
    embedded = model.embed(video=videos)['video']['vat'].astype(float)
    sentences = [
        'red left',
        'stripes move red left',
        'green right',
        'stripes move green right',
        'Blue Up',
        'stripes move Blue Up',
    ]
    texts = model.embed(text=sentences)['text']['vat'].astype(float).reshape(3, 2, -1).mean(1)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    np.testing.assert_allclose(out['scores'], embedded @ texts.T, atol=1e-5)
    assert out['names'] == NAMES
    assert out['predicted'] == [NAMES[i] for i in (embedded @ texts.T).argmax(-1)]

    one = model.classify(video=videos[0], names=NAMES, templates=TEMPLATES)
    chex.assert_shape(one['scores'], (3,))
    assert one['predicted'] == out['predicted'][0]
    over_time = model.classify(video=np.concatenate(videos), names=NAMES, windows=3)
    chex.assert_shape(over_time['scores'], (3, 3))
    np.testing.assert_array_equal(over_time['start'], [0, 0.5, 1])
    picture = model.classify(image=videos[0][0], names=NAMES)
    chex.assert_shape(picture['scores'], (3,))


@pytest.mark.parametrize(
    'call, message',
    [
        ({}, 'expected one of video=, audio=, image= and flow=, got none'),
        ({'names': NAMES}, 'expected one of video=, audio=, image= and flow=, got none'),
        (
            {'video': clips(1)[0], 'audio': np.zeros(100), 'names': NAMES},
            'got video and audio',
        ),
        (
            {'video': clips(1)[0]},
            r'classify\(video=…\): this model has no classifier, it was trained with the objective '
            r"'contrastive'; .*classify\(…, names=",
        ),
        (
            {'audio': np.zeros(100), 'names': NAMES},
            r'classify.space: expected a common space of audio and text \(this model has none\)',
        ),
        (
            {'video': clips(1)[0], 'names': NAMES, 'space': 'va'},
            r"expected a common space of video and text \(vat\), got 'va'",
        ),
    ],
)
def test_what_cannot_be_classified_is_a_sentence(model, call, message):
    with pytest.raises(ConfigError, match=message):
        model.classify(**call)


# ---- a fine-tuned model


@pytest.fixture(scope='module')
def tuned_run(tiny_run, tmp_path_factory):
    """(folder, config, data) of a classifier trained for two steps."""
    folder, _, _ = tiny_run
    config = tiny.config(
        steps=2,
        init_from=str(folder),
        optimizer__schedule__warmup=1,
        objective=ConfigDict({'name': 'classification', 'dropout': 0.0}),
    )
    data = data_pipelines.open(config)
    tuned = tmp_path_factory.mktemp('tuned')
    loop.train(config, data, tuned, quiet=True)
    return tuned, config, data


def test_a_fine_tuned_model_gives_its_class_scores(tuned_run):
    """They are what the evaluator `classification` scores."""
    folder, _, data = tuned_run
    model = vatt_jax.load(folder)
    batch = next(iter(data.one_pass('test', 8, limit=8)))
    out = model.predict(video=batch['video']['data'])
    expected = model._encoder(batch)['predictions']['class']
    np.testing.assert_allclose(out['logits'], expected, atol=1e-5)
    np.testing.assert_allclose(out['scores'], jax.nn.softmax(expected, -1), atol=1e-5)
    np.testing.assert_allclose(out['scores'].sum(-1), 1, atol=1e-5)
    names = data.info['labels']['class']
    assert out['names'] == names
    assert out['predicted'] == [names[i] for i in expected.argmax(-1)]
    # By hand: pooled feature, kernel and bias.
    pooled = model.embed(video=batch['video']['data'])['video']['pooled'].astype(float)
    kernel, bias = (np.asarray(model._encoder.heads[0][key], float) for key in ('kernel', 'bias'))
    np.testing.assert_allclose(out['logits'], pooled @ kernel + bias, atol=1e-4)

    assert model.classify(video=batch['video']['data'])['predicted'] == out['predicted']
    one = model.predict(video=batch['video']['data'][0])
    assert one['predicted'] == out['predicted'][0]
    without_heads = api.Model(model.config, model.variables, model.info, model._encoder.mesh)
    with pytest.raises(ConfigError, match='holds the fine-tuned model without its classifier'):
        without_heads.predict(video=clips(1)[0])
    with pytest.raises(ConfigError, match='this model has no text tower; leave names out'):
        model.classify(video=batch['video']['data'], names=NAMES)
    with pytest.raises(ConfigError, match=r'was fine-tuned on video; pass video='):
        model.predict(audio=np.zeros(100))


def through_safetensors(run, tmp_path):
    """The run written as safetensors, and loaded from there."""
    safetensors_folder.export_checkpoint(run, tmp_path / 'model')
    return vatt_jax.load(tmp_path / 'model')


def through_a_run_made_of_safetensors(run, tmp_path):
    safetensors_folder.export_checkpoint(run, tmp_path / 'model')
    safetensors_folder.import_checkpoint(tmp_path / 'model', tmp_path / 'again')
    return vatt_jax.load(tmp_path / 'again')


def through_the_layout_of_the_hub(run, tmp_path):
    files, _ = hub._files_of(run)
    for name, path in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / name)
    return vatt_jax.load(tmp_path)


def through_safetensors_on_the_hub(run, tmp_path):
    exported = tmp_path / 'model'
    safetensors_folder.export_checkpoint(run, exported)
    return through_the_layout_of_the_hub(exported, tmp_path / 'hub')


def through_programs(run, tmp_path):
    # While a program for any batch size is traced, its length is a symbol where `int` is annotated.
    with typecheck.off():
        vatt_jax.load(run).export(tmp_path / 'programs')
    return standalone.Artifact(tmp_path / 'programs')


@pytest.mark.parametrize(
    'way',
    [
        through_safetensors,
        through_a_run_made_of_safetensors,
        through_the_layout_of_the_hub,
        through_safetensors_on_the_hub,
        through_programs,
    ],
)
def test_the_classifier_comes_along(tuned_run, tmp_path, way):
    folder, _, data = tuned_run
    batch = next(iter(data.one_pass('test', 8, limit=8)))
    expected = vatt_jax.load(folder).predict(video=batch['video']['data'])
    got = way(folder, tmp_path).predict(video=batch['video']['data'])
    assert got['names'] == expected['names']
    assert got['predicted'] == expected['predicted']
    np.testing.assert_allclose(got['logits'], expected['logits'], atol=1e-5)
    np.testing.assert_allclose(got['scores'], expected['scores'], atol=1e-5)


def test_programs_without_a_classifier_say_so(plain_run, tmp_path):
    with typecheck.off():
        vatt_jax.load(plain_run).export(tmp_path / 'programs')
    artifact = standalone.Artifact(tmp_path / 'programs')
    with pytest.raises(ValueError, match='predict: expected a model with a classifier, got video'):
        artifact.predict(video=clips(1))


def test_a_checkpoint_alone_is_enough(tuned_run, tmp_path):
    """Taken out of its run, under another name, named itself or through the folder it is in."""
    folder, _, _ = tuned_run
    alone = tmp_path / 'downloads' / 'vatt_tiny'
    shutil.copytree(folder / 'checkpoints' / '2', alone)
    expected = vatt_jax.load(folder).predict(video=clips(1)[0])
    for path in (alone, alone.parent):
        got = vatt_jax.load(path).predict(video=clips(1)[0])
        np.testing.assert_array_equal(got['logits'], expected['logits'])
    shutil.copytree(alone, tmp_path / 'downloads' / 'other')
    with pytest.raises(ConfigError, match=r'got a folder with 2 of them \(other, vatt_tiny'):
        vatt_jax.load(tmp_path / 'downloads')
    with pytest.raises(ConfigError, match='got a folder of runs; name one of '):
        vatt_jax.load(folder.parent)
    official = tmp_path / 'mmv.pkl'
    official.write_bytes(b'1')
    with pytest.raises(ConfigError, match='got a file; official checkpoints are imported first'):
        vatt_jax.load(official)


# ---- the evaluator


class KnownSentences(KnownFeatures):
    """Features and embeddings of sentences that are given."""

    def __init__(self, features, labels, sentences):
        super().__init__({'test': features}, labels)
        self._sentences = sentences

    def sentences(self, texts):
        rows = np.stack([self._sentences[text][0] for text in texts])
        is_known = np.array([self._sentences[text][1] for text in texts])
        return Sentences({'vat': rows.astype(np.float32)}, is_known)


def features_of(x, targets, valid=None):
    return {
        'spaces': {'vat': {'video': np.asarray(x, np.float32)}},
        'labels': {'class': targets},
        'valid': {'video': np.ones(len(x), bool) if valid is None else valid},
        'index': np.arange(len(x)),
    }


def test_accuracy_of_the_nearest_name():
    """Classes along the axes; one clip in four is nearer to another class, one has no label."""
    axes = np.eye(3)
    x = [axes[0], axes[1], axes[2], axes[0], axes[1]]
    targets = np.array([0, 1, 2, 1, -1])
    # Two templates that lean to both sides of the axis.
    sentences = {}
    for number, name in enumerate('abc'):
        lean = 0.3 * axes[(number + 1) % 3]
        sentences[f'see {name}'] = (axes[number] + lean, True)
        sentences[f'hear {name}'] = (axes[number] - lean, name != 'c')
    sentences['see c'] = (sentences['see c'][0], False)
    view = KnownSentences(features_of(x, targets), ['a', 'b', 'c'], sentences)
    templates = ('see {}', 'hear {}')
    result = run_evaluator(view, type='zero_shot', templates=templates, space='vat')
    assert result.scalars['accuracy'] == 3 / 4
    assert result.scalars['top5'] == 1
    assert result.scalars['clips'] == 4
    assert result.artifacts['accuracy/chance'] == pytest.approx(1 / 3)
    assert result.artifacts['names_without_known_words'] == ['c']

    silent = np.array([True, True, False, False, True])
    view = KnownSentences(features_of(x, targets, silent), ['a', 'b', 'c'], sentences)
    result = run_evaluator(view, type='zero_shot', templates=templates)
    assert result.scalars['accuracy'] == 1
    assert result.scalars['clips'] == 2
    view = KnownSentences(features_of(x, np.full(5, -1)), ['a', 'b', 'c'], sentences)
    with pytest.raises(ConfigError, match='none of 5 clips .* has the label'):
        run_evaluator(view, type='zero_shot', templates=templates)


def test_several_labels_a_clip_give_average_precision():
    axes = np.eye(2)
    sentences = {'a': (axes[0], True), 'b': (axes[1], True)}
    x = [axes[0], axes[1], axes[0], axes.sum(0) / 2**0.5]
    targets = np.array([[1, 0], [0, 1], [1, 0], [1, 1]])
    view = KnownSentences(features_of(x, targets), ['a', 'b'], sentences)
    result = run_evaluator(view, type='zero_shot')
    assert result.scalars['mAP'] == 1
    assert result.scalars['AUC'] == 1


def test_the_evaluator_is_what_classify_gives(tiny_run, model):
    """On a real model and data: the same predictions, clip by clip."""
    folder, config, data = tiny_run
    encoder = feature_extractor.FeatureExtractor(config, model.variables, model._encoder.mesh)
    view = FeatureView(encoder, data, batch_size=16)
    result = run_evaluator(view, type='zero_shot', limit=24, templates=TEMPLATES)
    names = data.info['labels']['class']
    batches = list(data.one_pass('test', 8, limit=24))
    frames = np.concatenate([batch['video']['data'] for batch in batches])
    targets = np.concatenate([batch['labels']['class'] for batch in batches])
    predicted = model.classify(video=frames, names=names, templates=TEMPLATES)['predicted']
    is_right = [name == names[target] for name, target in zip(predicted, targets)]
    assert result.scalars['accuracy'] == np.mean(is_right)
    assert result.artifacts['names_without_known_words'] == []

    # More sentences than a batch holds.
    texts = [f'red {i}' for i in range(19)] + ['blue']
    few = FeatureView(encoder, data, batch_size=8).sentences(texts)
    expected = model.embed(text=texts)['text']['vat']
    np.testing.assert_allclose(few.embeddings['vat'], expected, atol=1e-5)
    assert not view.sentences(['quagga']).is_known[0]


@pytest.mark.parametrize(
    'entry, message',
    [
        ({'space': 'va'}, r"config.evals.x.space: expected a common space .* got 'va'"),
        ({'stream': 'audio'}, r'a common space of audio and text \(this model has none\)'),
        ({'label': 'colour'}, r"config.evals.x.label='colour': the data have class"),
        ({'templates': ('a video',)}, r'config.evals.x.templates: expected sentences'),
        ({'names': ('a', 'b')}, r'config.evals.x.names: expected 16 names'),
        ({'windows': 0}, r'config.evals.x.windows: expected a positive number'),
    ],
)
def test_mistakes_show_before_anything_is_computed(tiny_run, entry, message):
    _, _, data = tiny_run
    spaces = {'va': {'video': 0, 'audio': 0}, 'vat': {'video': 0, 'text': 0}}
    outputs = types.SimpleNamespace(spaces=spaces)
    with pytest.raises(ConfigError, match=message):
        evals.check(ConfigDict({'x': {'type': 'zero_shot', **entry}}), data, outputs)
    evals.check(ConfigDict({'x': {'type': 'zero_shot'}}), data, outputs)
