"""The objective stica against its definition over given maps, in NumPy float64."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import erf

import data_pipelines
from configs import default
from tests import tiny
from tests.test_gdt import assert_same_gradients
from vatt_jax import config as configs
from vatt_jax import objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.models import Encoded
from vatt_jax.models.time_pooling import TimePooling
from vatt_jax.objectives import stica
from vatt_jax.objectives.base import select_streams
from vatt_jax.objectives.feature_crops import Crop, crop_moments, draw_offsets
from vatt_jax.objectives.forward import map_of
from vatt_jax.objectives.stica import STiCA
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

B, T, H, W, D = 8, 4, 5, 6, 8
VIEWS = ('video', 'video.second')
FIELDS = {
    'space_crops': (2, 2),
    'time_crops': (2, 1),
    'space_sizes': (4, 2),
    'time_sizes': (3, 2),
    'heads': 2,
    'mlp': 12,
    'width': 5,
    'hidden': 0,
    'dropout': 0.0,
    'method': 'dense',
}

# ---- the definition


def unit(x):
    """x / |x| over the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True)) * params['scale'] + params['bias']


def pool_time(moments, params, heads):
    """One clip's moments [M D], by the transformer; without parameters, their mean."""
    x = moments
    num_layers = len(params) // 6
    for layer in range(num_layers):
        p = {name: params[f'layer_{layer}_{name}'] for name in ('query', 'key', 'in', 'out')}
        query = x @ p['query']['kernel'] + p['query']['bias']
        key = x @ p['key']['kernel'] + p['key']['bias']
        attended = np.zeros_like(x)
        size = x.shape[1] // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
            attended[:, part] = scores / scores.sum(1, keepdims=True) @ x[:, part]
        x = layer_norm(x + attended, params[f'layer_{layer}_norm_1'])
        hidden = x @ p['in']['kernel'] + p['in']['bias']
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        y = hidden @ p['out']['kernel'] + p['out']['bias']
        x = layer_norm(x + y, params[f'layer_{layer}_norm_2'])
    return x[0] if num_layers else x.mean(0)


def resampled(frames, num_moments):
    """Means of the frames that each of `num_moments` equal parts of time touches."""
    length = len(frames)
    moments = []
    for moment in range(num_moments):
        first = moment * length // num_moments
        end = -(-(moment + 1) * length // num_moments)
        moments.append(frames[first:end].mean(0))
    return np.stack(moments)


def cut(clip, crop, offsets, num_moments):
    """Moments [M D] of a crop of one clip [T H W D]."""
    if crop is not None and crop.axis == 'space':
        row, column = offsets
        clip = clip[:, row : row + crop.size, column : column + crop.size]
    if crop is not None and crop.axis == 'time':
        (frame,) = offsets
        clip = clip[frame : frame + crop.size]
    return resampled(clip.mean((1, 2)), num_moments)


def nce(queries, keys, temperature):
    losses = []
    for b, query in enumerate(queries):
        scores = keys @ query / temperature
        losses.append(np.log(np.exp(scores).sum()) - scores[b])
    return np.mean(losses)


def embed(arrays, params, places, num_moments):
    """{view: unit embeddings of the whole map and its crops}, and those of the sound."""
    embeddings = {}
    kernel = params['video']['kernel']
    for view in VIEWS:
        of_crops = []
        for crop, offsets in places[view]:
            rows = []
            for b in range(B):
                moments = cut(arrays[view][b], crop, offsets[b], num_moments)
                rows.append(pool_time(moments, params['time_pooling'], FIELDS['heads']))
            of_crops.append(unit(np.stack(rows) @ kernel + params['video']['bias']))
        embeddings[view] = of_crops
    sound = arrays['audio'] @ params['audio']['kernel'] + params['audio']['bias']
    return {**embeddings, 'audio': unit(sound)}


def definition(arrays, held, params, places, num_moments):
    """The loss; differentiated by `arrays`, of which `held` are the detached copies."""
    x = embed(arrays, params, places, num_moments)
    fixed = embed(held, params, places, num_moments)
    first, second = VIEWS

    cross = []
    for view in VIEWS:
        to_sound = nce(x[view][0], fixed['audio'], 0.1)
        to_video = nce(x['audio'], fixed[view][0], 0.1)
        cross.append((to_sound + to_video) / 2)

    # By what the crops are called: which place has which crop is the objective's matter.
    numbers = {}
    for view in VIEWS:
        for number, (crop, _) in enumerate(places[view]):
            numbers[view, crop.name if crop else 'whole'] = number
    terms = []
    for axis in ('space', 'time'):
        num_large, num_small = FIELDS[f'{axis}_crops']
        if num_large == 2:
            one = numbers[first, f'{axis}/large/1']
            other = numbers[second, f'{axis}/large/1']
            forwards = nce(x[first][one], fixed[second][other], 0.5)
            backwards = nce(x[second][other], fixed[first][one], 0.5)
            terms.append((forwards + backwards) / 2)
        for large in range(num_large):
            key = fixed[first][numbers[first, f'{axis}/large/{large}']]
            for small in range(num_small):
                query = x[second][numbers[second, f'{axis}/small/{small}']]
                terms.append(nce(query, key, 0.5))
    return np.mean(cross) / 2 + np.mean(terms) / 2


# ---- the objective on given maps


@pytest.fixture(scope='module')
def arrays():
    """Maps of both views and features of the sound that float32 holds exactly."""
    rng = np.random.default_rng(0)
    shapes = {**dict.fromkeys(VIEWS, (B, T, H, W, D)), 'audio': (B, 7)}
    return {name: np.float64(np.float32(rng.normal(size=s))) for name, s in shapes.items()}


@pytest.fixture
def given_maps(monkeypatch):
    """Towers are replaced by arrays that the batch holds."""

    def run_towers(model, variables, batch, rng, maps):
        named = {name: batch[name]['data'] for name in batch if name not in ('valid', 'index')}
        return {**{map_of(view): named[view] for view in maps}, 'audio': named['audio']}, {}

    monkeypatch.setattr(stica, 'run_towers', run_towers)


def build(**fields):
    return STiCA({**FIELDS, **fields})


def params_of(objective):
    """Parameters drawn at random, none of them zero."""
    shape = (1, T if objective.config.layers else 1, D)
    pooling = objective.time_pooling.init(jax.random.key(0), jnp.zeros(shape)).get('params', {})
    rng = np.random.default_rng(1)
    params = {
        'time_pooling': jax.tree.map(
            lambda x: jnp.float32(rng.normal(0.3, 0.5, x.shape)), nn.meta.unbox(pooling)
        )
    }
    for modality, width in (('video', D), ('audio', 7)):
        kernel = jnp.float32(rng.normal(size=(width, FIELDS['width'])))
        params[modality] = {'kernel': kernel, 'bias': jnp.full(FIELDS['width'], 0.1)}
    return params


def loss_of(objective, params, arrays, valid=None):
    """The Loss of maps and sounds."""
    batch = {'valid': jnp.ones(B, bool), 'index': jnp.arange(B)}
    for name, data in arrays.items():
        is_valid = batch['valid'] if valid is None else valid
        batch[name] = {'data': data, 'valid': is_valid}
    state = {'norm': {'video': {}, 'audio': {}}}
    variables = {'params': {}, 'batch_stats': {}}
    return objective.loss(None, variables, params, state, batch, Rng.create(0, 0, jnp.arange(B)))


def places_of(objective):
    """{view: ((crop, offsets [B axes]), …)} as drawn; the whole map first."""
    places = {}
    for view in VIEWS:
        rng = Rng.create(0, 0, jnp.arange(B)).at('crops').at(view)
        found = [(None, np.zeros((B, 0), int))]
        for crop in objective.crops[view]:
            site = rng.at(crop.name)
            drawn = [(site.at('rows'), H), (site.at('columns'), W)]
            if crop.axis == 'time':
                drawn = [(site, T)]
            offsets = [draw_offsets(s, length, crop.size) for s, length in drawn]
            found.append((crop, np.concatenate(offsets, axis=1)))
        places[view] = tuple(found)
    return places


@pytest.mark.parametrize('layers', [0, 2])
def test_loss_and_gradient_are_the_definition(arrays, given_maps, layers):
    objective = build(layers=layers)
    params = params_of(objective)
    in_float32 = {name: jnp.float32(x) for name, x in arrays.items()}
    loss = jax.jit(jax.value_and_grad(lambda x: loss_of(objective, params, x).value))
    value, grads = loss(in_float32)

    exact = jax.tree.map(np.float64, jax.device_get(params))
    arguments = (exact, places_of(objective), T if layers else 1)
    np.testing.assert_allclose(value, definition(arrays, arrays, *arguments), rtol=1e-5)

    # Central differences along one random direction; what is detached stays.
    rng = np.random.default_rng(2)
    direction = {name: rng.normal(size=x.shape) for name, x in arrays.items()}
    ends = []
    for step in (1e-5, -1e-5):
        moved = {name: x + step * direction[name] for name, x in arrays.items()}
        ends.append(definition(moved, arrays, *arguments))
    slope = (ends[0] - ends[1]) / 2e-5
    got = sum(np.sum(np.float64(grads[name]) * direction[name]) for name in arrays)
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-6)


def test_eight_devices_give_the_loss_of_one(arrays, given_maps):
    # One term of each kind of query.
    fields = {'space_crops': (2, 1), 'time_crops': (0, 0)}
    objective = build(method='auto', **fields)
    params = params_of(objective)
    in_float32 = {name: np.float32(x) for name, x in arrays.items()}
    kept = jnp.arange(B) != 3
    # A clip that cannot be read, too, with NaN in its place.
    in_float32['video'][3] = np.nan
    expected = jax.jit(lambda x: loss_of(build(**fields), params, x, kept))(in_float32)
    assert np.isfinite(expected.value)
    mesh = jax.make_mesh((8,), ('replica',), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('replica'))
        spread = {name: jax.device_put(x, rows) for name, x in in_float32.items()}
        got = jax.jit(lambda x: loss_of(objective, params, x, kept))(spread)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-5)
    for name in expected.metrics:
        np.testing.assert_allclose(got.metrics[name], expected.metrics[name], rtol=1e-5)


def test_the_published_number_of_terms():
    """2 large and 4 small crops of space, 2 and 1 of time: twelve terms, as the code counts."""
    first, second, pairs = stica.make_pairs(STiCA({}).config)
    counts = {}
    for pair in pairs:
        counts[pair.name] = counts.get(pair.name, 0) + 1
    assert counts == {'space_large': 1, 'space_small': 8, 'time_large': 1, 'time_small': 2}
    # Those of no term are not made.
    assert (len(first), len(second)) == (4, 7)
    assert {pair.both_ways for pair in pairs if pair.name.endswith('small')} == {False}


# ---- crops


@pytest.mark.parametrize(
    'length, size, published, places',
    [
        (7, 6, False, {0, 1}),
        (7, 6, True, {0}),
        (7, 4, False, {0, 1, 2, 3}),
        (7, 4, True, {0, 1, 2}),
        (4, 2, True, {0, 1}),
        (7, 7, True, {0}),
    ],
)
def test_a_crop_is_drawn_at_every_place_alike(length, size, published, places):
    offsets = np.ravel(draw_offsets(Rng.create(0, 0, jnp.arange(4000)), length, size, published))
    values, counts = np.unique(offsets, return_counts=True)
    assert set(values) == places
    # Five deviations of a binomial.
    expected = 4000 / len(places)
    assert np.abs(counts - expected).max() <= 5 * math.sqrt(expected)


def test_clips_and_crops_draw_apart():
    """A map that holds its places: what a crop averages says where it was."""
    rows = np.broadcast_to(np.arange(7.0)[:, None], (32, 2, 7, 7))
    columns = np.broadcast_to(np.arange(7.0), (32, 2, 7, 7))
    x = jnp.float32(np.stack([rows, columns], -1))
    crops = (Crop('space', 4, 'one'), Crop('space', 4, 'other'))
    rng = Rng.create(0, 0, jnp.arange(32))
    moments = crop_moments(x, crops, 2, rng)
    places = np.array(moments[:, 1:, 0]) - 1.5  # [B crops 2]
    np.testing.assert_allclose(places, np.round(places), atol=1e-5)
    # Of 16 places, of each clip and crop.
    assert len(np.unique(np.round(places.reshape(-1, 2)), axis=0)) > 8
    assert not np.allclose(places[:, 0], places[:, 1])


def test_heads_of_the_transformer_divide_the_width():
    with pytest.raises(ConfigError, match='objective.heads: expected a divisor .* of 8 .*got 3'):
        TimePooling(1, 3, 4).init(jax.random.key(0), jnp.zeros((1, 2, 8)))


# ---- in evaluation, and mistakes


def test_evaluators_see_the_whole_map(arrays):
    objective = build()
    params = params_of(objective)
    tokens = jnp.float32(arrays['video'].reshape(B, -1, D))
    encoded = {
        'video': Encoded(tokens.mean(1), tokens, grid=(T, H, W)),
        'audio': Encoded(jnp.float32(arrays['audio'])),
    }
    space = objective.embed(params, {'norm': {'video': {}, 'audio': {}}}, encoded)['stica']
    exact = jax.tree.map(np.float64, jax.device_get(params))
    expected = embed(arrays, exact, places_of(objective), T)
    for name, rows in (('video', expected['video'][0]), ('audio', expected['audio'])):
        np.testing.assert_allclose(unit(np.float64(space[name])), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'views': ('video', 'video')}, 'views: expected two views of one modality'),
        ({'sound': 'video.third'}, 'sound: expected another modality than that of views'),
        ({'space_crops': (3, 1)}, r'space_crops: expected at most 2 large .* got \(3, 1\)'),
        ({'time_crops': (0, 1)}, r'time_crops: .* a large one where there are small ones'),
        (
            {'space_crops': (1, 0), 'time_crops': (0, 0)},
            'space_crops, .*time_crops: expected two large crops, or a large and a small one',
        ),
        ({'crop_weight': 2.0}, 'crop_weight=2: expected a number from 0 to 1'),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        STiCA(fields)


# ---- through the loop


def config(**overrides):
    """STiCA on the synthetic source, over a transformer whose maps are 2×2×2."""
    c = tiny.config(**{'steps': 3, 'batch_size': 8, **overrides})
    del c.model.towers['text']
    for tower in c.model.towers.values():
        tower.layers, tower.drop_token = 1, 0.0
    c.model.head = ConfigDict({'name': 'none'})
    sizes = {'space_sizes': (1, 1), 'time_sizes': (2, 1), 'space_crops': (2, 1)}
    c.objective = ConfigDict({'name': 'stica', **FIELDS, **sizes, 'hidden': 8, 'dropout': 0.1})
    c.data.views = (('video.second', {'kind': 'shift', 'seconds': 0.0}),)
    return c


def test_crops_are_parts_of_the_map():
    c = config()
    c.objective.space_sizes = (3, 2)
    with pytest.raises(ConfigError, match='space_sizes: expected sizes from 1 to 2, since the map'):
        loop.build(c, data_pipelines.open(c))


def first_gradients(**overrides):
    """(gradients, Loss) of the first step, on the host; a clip lacks its sound."""
    c = config(**overrides)
    data = data_pipelines.open(c)
    built = loop.build(c, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = next(data.train(0, c.batch_size))
        batch['audio']['valid'][3] = False
        batch = select_streams(batch, built.objective.streams())
        batch = feature_extractor.place_on_mesh(batch, built.mesh)
        compute_gradients = jax.jit(train_step.gradients(c, built.model, built.objective))
        rng = Rng.create(c.seed, 0, batch['position'])
        return jax.device_get(
            compute_gradients(
                state.params, state.batch_stats, state.frozen, state.objective, batch, rng
            )
        )


@pytest.fixture(scope='module')
def whole_batch():
    return first_gradients()


@pytest.mark.slow
def test_towers_in_microbatches_have_the_gradient_of_the_whole_batch(whole_batch):
    """Each clip crops its own map, whatever the microbatch."""
    assert_same_gradients(first_gradients(accumulate=4, accumulation='exact'), whole_batch)


@pytest.mark.slow
def test_the_gradient_is_the_same_on_eight_devices(whole_batch):
    got = first_gradients(mesh__replica=4, mesh__fsdp=2)
    assert_same_gradients(got, whole_batch)


@pytest.mark.slow
def test_a_model_of_a_run_embeds_in_the_space_of_the_heads():
    """Tokens are made for the objective although no evaluator asks for maps."""
    c = config()
    data = data_pipelines.open(c)
    built = loop.build(c, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
    variables = {'params': state.params['model'], 'batch_stats': state.batch_stats}
    objective = (built.objective, state.params['objective'], state.objective)
    extractor = FeatureExtractor(c, variables, built.mesh, *objective)
    features = extractor(next(iter(data.one_pass('test', 8))))
    assert {name: x.shape for name, x in features['spaces']['stica'].items()} == {
        'video': (8, 5),
        'video.second': (8, 5),
        'audio': (8, 5),
    }
    chex.assert_tree_all_finite(features['spaces'])


# ---- named configs


@pytest.mark.parametrize('spec', ['demo,synthetic', 'demo,time,mean', 'kinetics,second,code'])
def test_fields_of_the_settings_are_known(spec):
    c = configs.load(f'configs/stica.py:{spec}')
    configs.check_fields(c, default.get_config())
    made = [name for name, _ in c.data.views]
    assert {'video', 'audio', *made} == set(objectives.build(c.objective).streams())


@pytest.mark.slow
@pytest.mark.parametrize('spec', ['demo', 'kinetics', 'kinetics,second'])
def test_settings_can_be_built(spec):
    """The published crops are parts of the published maps, 8×7×7 and 4×7×7."""
    c = configs.load(f'configs/stica.py:{spec}')
    c.mesh.replica = 1
    loop.check(c)


def test_the_objective_holds_the_published_values():
    c = configs.load('configs/stica.py:kinetics')
    objective = objectives.build(c.objective).config
    published = {
        'temperature': 0.1,
        'crop_temperature': 0.5,
        'crop_weight': 0.5,
        'layers': 2,
        'heads': 4,
        'mlp': 2048,
        'width': 256,
        'hidden': 512,
        'dropout': 0.3,
    }
    assert {name: objective[name] for name in published} == published
    assert (c.batch_size, c.steps) == (512, 150 * 451)
    with pytest.raises(ConfigError, match='choose one of space, time, mean, code, second'):
        configs.load('configs/stica.py:kinetics,synthetic')
