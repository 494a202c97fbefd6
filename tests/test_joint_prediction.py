"""Joint-embedding prediction: masks, what the context encoder sees, the loss, the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from configs import default, jepa
from tests import tiny
from vatt_jax import config as configs
from vatt_jax import models, objectives
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import block_masks
from vatt_jax.inputs.block_masks import BlockMask
from vatt_jax.models.predictor import sincos_positions
from vatt_jax.objectives import collapse, joint_prediction
from vatt_jax.objectives.base import select_streams
from vatt_jax.objectives.forward import encode_streams
from vatt_jax.rng import Rng
from vatt_jax.training import loop

GRID = (4, 6, 6)
N = 144
# Compiled as a whole, which is faster than operation by operation.
draw = jax.jit(block_masks.draw, static_argnums=(0, 1))
inside_blocks = jax.jit(block_masks.inside_blocks, static_argnums=(0, 1))
SMALL = {'width': 16, 'layers': 1, 'mlp': 16, 'heads': 2}


def rng_of(examples, step=0):
    return Rng.create(7, step, jnp.asarray(examples))


def test_seen_and_predicted_tokens_are_apart_and_of_fixed_number():
    mask = BlockMask(keep=0.3, predict=0.5)
    kept, hidden = draw(mask, GRID, rng_of(range(64)))
    assert kept.shape == (64, 43) and hidden.shape == (64, 72)
    for seen, told in zip(np.asarray(kept), np.asarray(hidden)):
        assert len({*seen, *told}) == 43 + 72
    inside = np.asarray(inside_blocks(mask, GRID, rng_of(range(64))))
    for clip in range(64):
        num_outside = N - inside[clip].sum()
        # Where the blocks leave enough, nothing inside them is seen, and nothing outside told.
        assert inside[clip][kept[clip]].sum() == max(0, 43 - num_outside)
        assert (~inside[clip][hidden[clip]]).sum() == max(0, 72 - (N - num_outside))


def test_masks_are_keyed_by_seed_step_and_example():
    kept, _ = draw(BlockMask(), GRID, rng_of([3, 8, 5]))
    again, _ = draw(BlockMask(), GRID, rng_of([5, 3]))
    np.testing.assert_array_equal(again, np.asarray(kept)[[2, 0]])
    later, _ = draw(BlockMask(), GRID, rng_of([3, 8, 5], step=1))
    assert (np.asarray(later) != np.asarray(kept)).any(axis=1).all()


@pytest.mark.parametrize('grid', [GRID, (9, 8)])
def test_a_block_is_a_cuboid_of_the_drawn_size(grid):
    mask = BlockMask(blocks=1, area=(0.3, 0.6), aspect=(0.75, 1.5), time=(0.5, 1.0))
    inside = np.asarray(inside_blocks(mask, grid, rng_of(range(200))))
    duration, height, width = (1, *grid)[-3:]
    for clip in inside.reshape(200, duration, height, width):
        extents = [len(np.unique(index)) for index in np.nonzero(clip)]
        assert clip.sum() == np.prod(extents)
        frames, rows, columns = extents
        assert max(1, duration // 2) <= frames <= duration
        # Rounded sides of a block of the area, cut to the grid.
        largest = 0.6 * height * width
        assert rows <= min(height, round((largest * 1.5) ** 0.5))
        assert columns <= min(width, round((largest / 0.75) ** 0.5))
        assert rows * columns >= 0.3 * height * width - (rows + columns)
    assert (inside.any(axis=0)).all()


def test_positions_are_sines_of_each_axis():
    found = np.asarray(sincos_positions((2, 3), 8))
    frequencies = 10_000.0 ** -np.array([0, 0.5])
    for token, place in enumerate(np.ndindex(2, 3)):
        expected = []
        for index in place:
            expected += [*np.sin(index * frequencies), *np.cos(index * frequencies)]
        np.testing.assert_allclose(found[token], expected, atol=1e-6)


def model_config():
    config = tiny.config()
    size = config.model.towers.video.to_dict()
    size.update({'dropout': 0.0, 'attention_dropout': 0.0, 'position_dropout': 0.0, 'pool': 'mean'})
    config.model.towers = ConfigDict({'video': size})
    config.model.head = ConfigDict({'name': 'none'})
    masks = ({'keep': 0.25, 'predict': 0.5}, {'blocks': 2, 'keep': 0.25, 'predict': 0.75})
    config.objective = ConfigDict(
        {
            'name': 'joint_prediction',
            'video_masks': masks,
            'audio_masks': masks,
            'momentum': (0.5, 1.0),
            'momentum_steps': 4,
            **SMALL,
        }
    )
    config.optimizer.schedule.warmup = 1
    return config


@pytest.fixture(scope='module')
def encoder():
    """(model, its variables, a batch of one stream)."""
    model = models.build(model_config().model, 'float32')
    data = jax.random.normal(jax.random.key(0), (3, 4, 16, 16, 3))
    batch = {'video': {'data': data, 'valid': jnp.ones(3, bool)}}
    rng = rng_of(range(3))
    variables = model.init(jax.random.key(1), batch, rng=rng, train=False)
    return model, variables, batch


def test_what_is_hidden_is_not_seen(encoder):
    model, variables, batch = encoder
    kept = jnp.array([[0, 5], [3, 1], [7, 2]])
    tokens = []
    for value in (0.0, 9.0):
        # Eight tubelets of 2×8×8: those that are not kept become another value.
        data = np.array(batch['video']['data']).reshape(3, 2, 2, 2, 8, 2, 8, 3)
        for clip in range(3):
            for token, place in enumerate(np.ndindex(2, 2, 2)):
                if token not in kept[clip]:
                    data[clip, place[0], :, place[1], :, place[2]] = value
        stream = {**batch['video'], 'data': jnp.asarray(data.reshape(3, 4, 16, 16, 3))}
        seen = {'video': {**stream, 'keep': kept}}
        encoded, _ = encode_streams(model, variables, seen, rng_of(range(3)), train=True)
        tokens.append(encoded['video'].tokens)
    assert tokens[0].shape == (3, 2, 32)
    np.testing.assert_array_equal(tokens[0], tokens[1])


def test_all_tokens_in_order_are_the_whole_clip_and_its_vector_their_mean(encoder):
    model, variables, batch = encoder
    rng = rng_of(range(3))
    whole, _ = encode_streams(model, variables, batch, rng, train=False)
    order = jnp.broadcast_to(jnp.arange(8), (3, 8))
    kept = {'video': {**batch['video'], 'keep': order}}
    same, _ = encode_streams(model, variables, kept, rng, train=True)
    np.testing.assert_allclose(same['video'].tokens, whole['video'].tokens, atol=1e-6)
    mean = np.asarray(whole['video'].tokens).mean(1)
    np.testing.assert_allclose(whole['video'].pooled, mean, atol=1e-6)
    pooled = model.apply(variables, 'video', batch['video'], train=False, rng=rng, method='encode')
    np.testing.assert_allclose(pooled.pooled, mean, atol=1e-5)


@pytest.mark.parametrize('name', joint_prediction.DISTANCES)
def test_the_distance_of_a_clip(name):
    objective = objectives.build(
        ConfigDict({'name': 'joint_prediction', 'distance': name, **SMALL})
    )
    draws = np.random.default_rng(0)
    predicted, tokens = draws.normal(size=(2, 3, 5)), draws.normal(2, 3, size=(2, 7, 5))
    hidden = np.array([[6, 0, 2], [1, 1, 4]])
    targets = joint_prediction.normalise(jnp.asarray(tokens, jnp.float32))
    found = objective._distance(jnp.asarray(predicted, jnp.float32), targets, jnp.asarray(hidden))
    for clip in range(2):
        total = 0.0
        for place, token in enumerate(hidden[clip]):
            x = tokens[clip, token]
            target = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            for difference in np.abs(predicted[clip, place] - target):
                if name == 'l1':
                    total += difference
                elif name == 'l2' or difference <= 1:
                    total += difference**2 / 2
                else:
                    total += difference - 0.5
        np.testing.assert_allclose(found[clip], total / 15, rtol=1e-5)


def test_the_spread_of_a_batch_is_zero_only_where_it_has_collapsed():
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    valid = np.array([1, 1, 0, 1, 1, 0], bool)
    found = collapse.spread(jnp.asarray(features), jnp.asarray(valid))
    np.testing.assert_allclose(found, features[valid].std(0).mean(), rtol=1e-6)
    assert collapse.spread(jnp.ones((6, 4)), jnp.asarray(valid)) == 0


def test_a_step_moves_the_teacher_by_the_schedule_and_nothing_else_of_it():
    config = model_config()
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batches = data.train(0, config.batch_size)
        for step in range(2):
            before = jax.device_get(state)
            batch = select_streams(next(batches), ('video',))
            state, metrics = built.step(state, feature_extractor.place_on_mesh(batch, built.mesh))
            after = jax.device_get(state)
            momentum = 0.5 + 0.5 * step / 4
            old = jax.tree.leaves(before.objective['teacher']['params'])
            new = jax.tree.leaves(after.objective['teacher']['params'])
            student = jax.tree.leaves(after.params['model'])
            for copy, former, own in zip(new, old, student, strict=True):
                expected = momentum * former + (1 - momentum) * own
                np.testing.assert_allclose(copy, expected, atol=1e-6)
    # It begins at the student, is in no optimizer, and features have not collapsed.
    assert metrics['spread/target/video'] > 0.01
    assert metrics['loss'] == metrics['error/video/video'] > 0
    slots = jax.tree.leaves(after.opt_state)
    trained = jax.tree.leaves(after.params)
    assert sum(np.size(leaf) for leaf in slots) < 2.1 * sum(leaf.size for leaf in trained)


@pytest.mark.slow
def test_a_run_keeps_its_teacher(tmp_path):
    config = model_config()
    config.steps = 2
    loop.train(config, data_pipelines.open(config), tmp_path / 'run')
    frames = np.zeros((1, 4, 16, 16, 3), np.uint8)
    student = vatt_jax.load(tmp_path / 'run').embed(video=frames)
    teacher = vatt_jax.load(tmp_path / 'run', which='teacher').embed(video=frames)
    assert jax.tree.map(np.shape, student) == jax.tree.map(np.shape, teacher)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'pairs': ()}, 'pairs'),
        ({'pairs': (('video', 'video', 0.0),)}, 'weight above 0'),
        ({'momentum': (0.9, 1.5)}, 'momentum'),
        ({'width': 10, 'heads': 4}, 'divisor'),
        ({'video_masks': ()}, 'at least one mask'),
        ({'video_masks': ({'area': (0.9, 0.1)},) * 2}, r'video_masks\[0\].area'),
        ({'video_masks': ({'keep': 0.7, 'predict': 0.5},) * 2}, 'keep . predict'),
        ({'audio_masks': ({'side': 1},) * 2}, r'audio_masks\[0\].side'),
    ],
)
def test_mistakes_are_sentences(fields, message):
    with pytest.raises(ConfigError, match=message):
        objectives.build(ConfigDict({'name': 'joint_prediction', **fields}))


@pytest.mark.parametrize('name', ['demo', 'giant'])
@pytest.mark.parametrize('options', ['', 'audio', 'audio_video', 'lejepa', 'audio_video,text'])
def test_configs_have_known_fields(name, options):
    config = jepa.get_config(f'{name},{options}'.rstrip(','))
    configs.check_fields(config, default.get_config())
    configs.check_values(config)
    objectives.build(config.objective)
