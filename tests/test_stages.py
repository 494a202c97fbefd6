"""Stages of convolutional towers, and the linear probe of several of them."""

import itertools
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
from tests import tiny
from tests.test_evals import KnownFeatures, blobs, labelled, run_evaluator
from vatt_jax import evals, objectives
from vatt_jax.config import ConfigError
from vatt_jax.evals import FeatureView, solvers
from vatt_jax.inference.feature_extractor import FeatureExtractor, Stage
from vatt_jax.models.layers import Dense
from vatt_jax.models.multimodal import NETS, register_net
from vatt_jax.models.pooling import adaptive_means, max_to_width
from vatt_jax.models.towers.stages import COLLECTION, sow_stage, sown_stages
from vatt_jax.objectives import Spec
from vatt_jax.objectives.distillation import Distillation
from vatt_jax.rng import Rng
from vatt_jax.training import loop

# ---- towers

# Narrow or shallow, so that they are traced in less time; (): as published.
TOWERS = {
    'i3d': {'blocks': (1, 1, 1)},
    's3d': {'blocks': (1, 1, 1)},
    'tsm_resnet': {'depth': 18},
    'r2plus1d': {},
    'r3d': {'blocks': (1, 1, 1, 1)},
    'mixed_convolutions': {},
    'resnet2d': {'blocks': (1, 1, 1, 1)},
    'resnet2d_v2': {'depth': 18},
    'resnet9': {},
    'vggish': {},
    'avid_video': {},
    'avid_audio': {},
}
SHAPES = {'video': (2, 8, 64, 64, 3), 'audio': (2, 96, 64)}


@pytest.mark.parametrize('name', TOWERS)
def test_a_tower_hands_out_four_stages_of_which_the_last_is_its_map(name):
    modality, module = NETS[name]
    net = module(**TOWERS[name])

    def stages_and_map(x):
        (_, last), variables = net.init_with_output(
            jax.random.key(0), x, jnp.ones(2, bool), False, mutable=True
        )
        return sown_stages(variables), last

    data = jax.ShapeDtypeStruct(SHAPES[modality], jnp.float32)
    stages, last = jax.eval_shape(stages_and_map, data)
    assert list(stages) == [1, 2, 3, 4]
    assert stages[4].shape == last.shape
    for stage in stages.values():
        # Frames are back in their clips.
        assert stage.ndim == {'video': 5, 'audio': 4}[modality]
        assert len(stage) == 2
    # From stage to stage the map has fewer places or more channels.
    for before, after in itertools.pairwise(stages.values()):
        assert math.prod(after.shape[1:-1]) <= math.prod(before.shape[1:-1])
        assert after.shape[-1] >= before.shape[-1]


class StagedNet(nn.Module):
    """Video [B T H W C] -> (pooled [B D], map [B T H W D]) in two stages."""

    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        for number, width in enumerate((4, 6), start=1):
            x = jax.nn.relu(Dense(width, ('embed', None), name=f'layer_{number}')(x))
            sow_stage(self, number, x)
        return x.mean((1, 2, 3)), x


register_net('staged_video', 'video', StagedNet)


@pytest.fixture(scope='module')
def staged():
    """(config, data object, Built) of a model of a staged tower, not trained."""
    c = tiny.config(batch_size=4)
    c.model.towers = ConfigDict({'video': {'name': 'staged_video'}})
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({'name': 'classification'})
    data = data_pipelines.open(c)
    return c, data, loop.build(c, data)


def test_features_hold_the_stages_that_are_asked_for(staged):
    c, data, built = staged
    assert list(built.outputs.encoded['video'].stages) == [1, 2]
    with jax.set_mesh(built.mesh):
        state = built.init()
    assert COLLECTION not in state.params['model']
    variables = {'params': state.params['model'], 'batch_stats': state.batch_stats}
    view = FeatureView(FeatureExtractor(c, variables, built.mesh), data, 4)
    # Two streams of one tower: each has its own stages.
    request = {'limit': 6, 'views': {'video.late': {'kind': 'shift', 'seconds': 0.2}}}
    streams = ('video', 'video.late')
    asked = tuple(Stage(stream, 1, 4 * 2 * 2) for stream in streams)
    features = view.features('test', stages=asked, **request)
    assert 'stages' not in view.features('test', **request)

    kept = view.features('test', keep=streams, **request)['data']
    weights = variables['params']['nets_video']['layer_1']
    low, high = c.model.inputs.video.range
    for stream in streams:
        pixels = low + (high - low) * np.float64(kept[stream]) / 255  # [N 4 16 16 3]
        hidden = pixels @ np.float64(weights['kernel']) + np.float64(weights['bias'])
        maxima = np.maximum(hidden, 0).reshape(6, 4, 2, 8, 2, 8, 4).max((1, 3, 5))
        got = features['stages'][f'{stream}/stage_1']
        np.testing.assert_allclose(got, maxima.reshape(6, -1), rtol=1e-4, atol=1e-5)
    assert not np.allclose(*(features['stages'][f'{stream}/stage_1'] for stream in streams))


def test_distillation_of_stages_compares_their_means(staged):
    """Each stage a task of one sum, of which all share one pass."""
    _, _, built = staged
    tasks = {}
    for stage in (1, 2):
        tasks[f'stage_{stage}'] = {'name': 'distillation', 'teacher': 'video.late', 'stage': stage}
    objective = objectives.build(ConfigDict({'name': 'multi_task', 'tasks': tasks}))
    draw = np.random.default_rng(0)
    clips = {stream: draw.normal(size=(3, 4, 16, 16, 3)) for stream in ('video', 'video.late')}
    valid = {'video': np.array([1, 1, 0], bool), 'video.late': np.ones(3, bool)}
    batch = {
        stream: {'data': jnp.float32(clips[stream]), 'valid': jnp.array(valid[stream])}
        for stream in clips
    }
    with jax.set_mesh(built.mesh):
        params = built.init().params['model']
    own = dict.fromkeys(tasks, {})
    rng = Rng.create(0, 0, jnp.arange(3, dtype=jnp.uint32))

    @jax.jit
    def loss_of(params):
        variables = {'params': params, 'batch_stats': {}}
        return objective.loss(built.model, variables, own, own, batch, rng)

    metrics = loss_of(params).metrics
    x = {stream: clips[stream] for stream in clips}
    for stage in (1, 2):
        layer = params['nets_video'][f'layer_{stage}']
        kernel, bias = np.float64(layer['kernel']), np.float64(layer['bias'])
        x = {stream: np.maximum(x[stream] @ kernel + bias, 0) for stream in x}
        means = {stream: x[stream].mean((1, 2, 3)) for stream in x}
        expected = np.linalg.norm(means['video'] - means['video.late'], axis=1)[:2].mean()
        np.testing.assert_allclose(metrics[f'stage_{stage}/loss'], expected, rtol=1e-4)


def test_distillation_of_a_stage_that_is_not_there(staged):
    _, _, built = staged
    encoded = {stream: built.outputs.encoded['video'] for stream in ('video', 'flow')}
    outputs = types.SimpleNamespace(encoded=encoded)
    spec = Spec(model=None, outputs=outputs, batch={}, size=4, labels={})
    linear = Distillation({'stage': 2, 'projection': 'linear'})
    params = nn.meta.unbox(linear.init(jax.random.key(0), spec)[0])
    assert params['kernel'].shape == (6, 6)
    with pytest.raises(ConfigError, match=r"stage: expected a stage of .*'video' \(1, 2\), got 3"):
        Distillation({'stage': 3}).init(jax.random.key(0), spec)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'stages': (1, 3)}, r'stages: expected some .* video tower, \(1, 2\), got \(1, 3\); name'),
        ({'stages': (1, 1)}, r'stages: expected numbers of stages, each once, got \(1, 1\)'),
        ({'stage_width': 0}, 'stage_width=0: expected a number of at least 1'),
    ],
)
def test_mistakes_of_a_stage_probe_are_sentences(staged, fields, message):
    _, data, built = staged
    entry = ConfigDict({'probe': {'type': 'stage_probe', **fields}})
    with pytest.raises(ConfigError, match=message):
        evals.check(entry, data, built.outputs)


# ---- pooling


@pytest.mark.parametrize('length, parts', [(7, 4), (56, 12), (3, 4), (6, 2), (5, 5)])
def test_bins_are_those_of_adaptive_pooling(length, parts):
    """A bin holds every element that it touches: from i·L/S, rounded down, to (i + 1)·L/S, up."""
    expected = np.zeros((parts, length))
    for part in range(parts):
        for element in range(length):
            touches = element + 1 > part * length / parts and element < (part + 1) * length / parts
            expected[part, element] = touches
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(adaptive_means(length, parts), expected, rtol=1e-6)


@pytest.mark.parametrize(
    'size, channels, bins', [(56, 64, 12), (28, 128, 8), (14, 256, 6), (7, 512, 4)]
)
def test_a_stage_has_the_published_number_of_bins(size, channels, bins):
    video = jax.ShapeDtypeStruct((2, 3, size, size, channels), jnp.float32)
    vector = jax.eval_shape(lambda x: max_to_width(x, 9216), video)
    assert vector.shape == (2, bins * bins * channels)


def test_a_vector_holds_the_maxima_of_bins():
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 5, 4))
    x = jnp.asarray(x, jnp.float32)
    expected = np.full((2, 3, 3, 4), -np.inf)
    for row, column in np.ndindex(7, 5):
        for part, other in np.ndindex(3, 3):
            in_row = row + 1 > part * 7 / 3 and row < (part + 1) * 7 / 3
            in_column = column + 1 > other * 5 / 3 and column < (other + 1) * 5 / 3
            if in_row and in_column:
                here = expected[:, part, other]
                expected[:, part, other] = np.maximum(here, x[:, :, row, column].max(1))
    np.testing.assert_array_equal(max_to_width(x, 4 * 9 + 3), expected.reshape(2, -1))
    # Of a spectrogram's map, with fewer places than would go into the width.
    np.testing.assert_array_equal(max_to_width(x[:, 0], 1000), x[:, 0].reshape(2, -1))


# ---- the probe


def staged_features(x_of_stages, y):
    """Features of a split whose stages are given."""
    stages = {f'video/stage_{number}': x for number, x in x_of_stages.items()}
    return {**labelled(np.zeros((len(y), 1)), y), 'stages': stages}


def test_a_probe_of_each_stage_and_the_best_one():
    rng = np.random.default_rng(0)
    splits = {}
    for seed, split in enumerate(('train', 'test')):
        x, y = blobs(60, 3, 6, seed)
        # Wide, so that small steps add up in few epochs.
        x = np.tile(x, (1, 30))
        noise = rng.normal(size=x.shape).astype(np.float32)
        half = np.where(np.arange(len(y))[:, None] % 2, x, noise)
        splits[split] = staged_features({1: noise, 2: x, 4: half}, y)
    view = KnownFeatures(splits, 'abc')
    entry = {'type': 'stage_probe', 'stages': (1, 2, 4), 'stage_width': 180, 'epochs': 300}
    result = run_evaluator(view, **entry)
    scalars = result.scalars
    assert scalars['stage_2/accuracy'] > 0.95
    assert scalars['stage_1/accuracy'] < scalars['stage_4/accuracy'] < scalars['stage_2/accuracy']
    assert scalars['best_stage'] == 2
    assert scalars['best_stage/accuracy'] == scalars['stage_2/accuracy']
    assert 'stage_2/accuracy/interval' in result.artifacts
    assert any('chosen on the clips that are tested on' in remark for remark in result.remarks)
    # All stages in each request, so that the data are encoded once.
    for _, request in view.requests:
        assert request['stages'] == tuple(Stage('video', number, 180) for number in (1, 2, 4))


def test_the_published_classifier_takes_the_published_steps():
    """Batch norm and a linear layer, three steps of Adam on one batch, in NumPy float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 3, size=(10, 4)), rng.integers(0, 3, 10)
    start = {
        'scale': rng.normal(1, 0.1, 4),
        'shift': rng.normal(size=4),
        'kernel': rng.normal(size=(4, 3)),
        'bias': rng.normal(size=3),
    }
    params = {name: value.copy() for name, value in start.items()}
    first = {name: 0.0 for name in params}
    second = dict(first)
    rates = (0.1, 0.1, 0.01)
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    for step, rate in enumerate(rates, start=1):
        hidden = z * params['scale'] + params['shift']
        logits = hidden @ params['kernel'] + params['bias']
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        error = (probs - np.eye(3)[y]) / len(y)
        back = error @ params['kernel'].T
        grads = {
            'scale': (back * z).sum(0),
            'shift': back.sum(0),
            'kernel': hidden.T @ error,
            'bias': error.sum(0),
        }
        for name, grad in grads.items():
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            params[name] -= rate * mean / (np.sqrt(square) + 1e-8)
    got = solvers._normed_fit(
        jax.tree.map(jnp.float32, start),
        jax.random.key(0),
        jnp.float32(x),
        jnp.asarray(y),
        len(x),
        jnp.float32(rates),
    )
    for name, value in params.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5)
