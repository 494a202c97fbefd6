"""Optical flow as a stream: the device stage, towers, training, evaluation, and what users call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import vatt_jax
from configs import default
from data_pipelines.loading import synthetic
from tests import tiny, typecheck
from vatt_jax import models
from vatt_jax.config import ConfigError, check_values
from vatt_jax.evals import changes
from vatt_jax.exchange import standalone
from vatt_jax.inputs import optical_flow, preprocess
from vatt_jax.rng import Rng
from vatt_jax.training import build, loop

FLOW = {'frames': 4, 'size': 16, 'fps': 8.0, 'channels': 2}


def config(channels=2, **overrides):
    """Video and flow, which are compared in one space."""
    c = tiny.config(**overrides)
    c.model.inputs.flow = {**FLOW, 'channels': channels}
    del c.model.towers['audio']
    del c.model.towers['text']
    c.model.towers.flow = c.model.towers.video.to_dict()
    c.model.head = ConfigDict({'name': 'joint', 'joint': 16})
    c.objective = ConfigDict({'name': 'contrastive', 'pairs': (('video', 'flow', 'joint', 1.0),)})
    return c


# ---- The device stage.


def stage(stream, augment=False, **spec):
    """What the device makes of a stream of flow."""
    spec = {'channels': 2, 'size': stream['data'].shape[3], **spec}
    augmentation = default.augment()
    augmentation.color = 1.0
    rng = Rng.create(0, 0, jnp.arange(len(stream['data']), dtype=jnp.uint32))
    batch = {'flow': {**stream, 'valid': stream.get('valid', np.ones(len(stream['data']), bool))}}
    out = preprocess.device_stage(
        jax.tree.map(jnp.asarray, batch),
        {'flow': spec},
        augmentation,
        rng,
        augment=augment,
        dtype='float32',
    )
    assert set(out['flow']) == {'data', 'valid'}
    return np.asarray(out['flow']['data'])


def stream(rows=3, size=12, box=(0, 0, 1, 1), flip=False):
    rng = np.random.default_rng(0)
    return {
        'data': rng.integers(1, 256, (rows, 2, size, size, 2)).astype(np.uint8),
        'box': np.tile(np.float32(box), (rows, 1)),
        'flip': np.full(rows, flip),
    }


def expected(data):
    return optical_flow.to_pixels(data) / optical_flow.BOUND


def test_values_become_shares_of_the_bound():
    given = stream()
    np.testing.assert_allclose(stage(given), expected(given['data']), atol=1e-5)
    still = {**given, 'data': np.full_like(given['data'], optical_flow.ZERO)}
    assert (stage(still, size=5) == 0).all()
    # JPEG may make 0 of the smallest value.
    assert stage({**given, 'data': np.zeros_like(given['data'])}).min() == -1


def test_a_mirrored_clip_moves_the_other_way():
    given = stream(flip=True)
    mirrored = expected(given['data'])[..., ::-1, :] * [-1, 1]
    np.testing.assert_allclose(stage(given), mirrored, atol=1e-5)


def test_a_crop_cuts_places_and_leaves_displacements():
    # From row 3 to 9 and column 6 to 12, at their own size.
    given = stream(box=(0.25, 0.5, 0.75, 1.0))
    cut = expected(given['data'])[:, :, 3:9, 6:12]
    np.testing.assert_allclose(stage(given, size=6), cut, atol=1e-5)
    # Twice the size: the same displacements.
    uniform = {**given, 'data': np.full_like(given['data'], 200)}
    np.testing.assert_allclose(stage(uniform, size=12), (200 - 128) / 127, atol=1e-5)


def test_a_third_channel_is_zeros_and_nothing_is_augmented():
    given = stream()
    found = stage(given, augment=True, channels=3)
    np.testing.assert_array_equal(found[..., :2], stage(given))
    assert (found[..., 2] == 0).all()


def test_rows_without_flow_are_zeros():
    given = {**stream(), 'data': np.zeros((3, 2, 12, 12, 2), np.uint8)}
    assert (stage({**given, 'valid': np.array([False, True, False])})[[0, 2]] == 0).all()


# ---- The synthetic source.


def displacement(line, following):
    """Pixels by which a line must be moved to look most like another, whatever its brightness."""
    x = np.arange(len(line))
    inner = slice(6, -6)
    shifts = np.linspace(-5, 5, 201)
    alike = [
        np.corrcoef(np.interp(x - shift, x, line)[inner], following[inner])[0, 1]
        for shift in shifts
    ]
    return shifts[np.argmax(alike)]


def test_the_flow_of_gratings_is_how_far_they_move():
    c = config()
    spec = {'frames': 4, 'size': 64, 'fps': 12.0}
    c.model.inputs.video.update(spec)
    c.model.inputs.flow.update(spec)
    data = data_pipelines.open(c)
    assert data.info['flow']['size'] == 64
    batch = next(data.train(0, 16))
    assert set(batch['labels']['class'] % 4) == {0, 1, 2, 3}
    for frames, flow in zip(batch['video']['data'], batch['flow']['data']):
        gray = frames.sum(-1, dtype=float)  # [T H W]
        closed_form = optical_flow.to_pixels(flow)
        for t in range(3):
            # The pattern changes along one axis only.
            x, y = 0.0, 0.0
            if gray[t, 0].std() > 0:
                x = displacement(gray[t, 0], gray[t + 1, 0])
            else:
                y = displacement(gray[t, :, 0], gray[t + 1, :, 0])
            assert abs(x) + abs(y) > 1
            np.testing.assert_allclose(closed_form[t, 9, 9], [x, y], atol=0.25)


def test_a_reversed_view_moves_the_other_way():
    c = config()
    c.data.views = (('flow.back', {'kind': 'reverse'}),)
    batch = next(data_pipelines.open(c).train(0, 8))
    forward = optical_flow.to_pixels(batch['flow']['data'])
    back = optical_flow.to_pixels(batch['flow.back']['data'])
    np.testing.assert_allclose(back[:, :-1], -forward[:, -2::-1], atol=1e-5)
    np.testing.assert_allclose(back[:, -1], -forward[:, 0], atol=1e-5)


def test_flow_of_prepared_batches(tmp_path):
    c = config()
    data = data_pipelines.open(c)
    batches = {'train': [next(data.train(0, 8))]}
    synthetic.save_npz(batches, str(tmp_path / 'batches.npz'), data.info)
    c.data.source, c.data.npz = 'npz', str(tmp_path / 'batches.npz')
    c.data.views = (('flow.back', {'kind': 'reverse'}),)
    stored = data_pipelines.open(c)
    assert stored.info['flow'] == data.info['flow']
    batch = next(stored.one_pass('train', 8, by='records'))
    np.testing.assert_array_equal(batch['flow']['data'], batches['train'][0]['flow']['data'])
    first = batch['flow']['data'][:, 0]
    np.testing.assert_array_equal(batch['flow.back']['data'][:, -1], optical_flow.negative(first))


# ---- Configs.


@pytest.mark.parametrize(
    'change, words',
    [
        ({'channels': 4}, 'flow.channels=4: choose one of 2, 3'),
        ({'frames': 0}, 'flow.frames=0: expected a positive number'),
        ({'fps': 0.0}, 'flow.fps=0: expected a positive number'),
        ({'size': 'large'}, 'flow.size'),
        ({'range': (0, 1)}, 'flow.range: no such field'),
    ],
)
def test_values_of_inputs_flow(change, words):
    c = config()
    check_values(c)
    c.model.inputs.flow = {**FLOW, **change}
    with pytest.raises(ConfigError, match=words):
        check_values(c)


def test_a_description_of_flow_is_whole():
    c = config()
    c.model.inputs.flow = {'frames': 4}
    with pytest.raises(ConfigError, match="lacks the field 'size'; start from flow()"):
        check_values(c)


def test_a_tower_without_its_input():
    c = config()
    c.model.inputs.flow = {}
    with pytest.raises(ConfigError, match='config.model.inputs.flow is empty; set it to flow'):
        build.check(c)
    del c.model.towers['flow']
    with pytest.raises(ConfigError, match="config.data.mismatch='flow'"):
        c.data.mismatch = ('flow',)
        check_values(c)


def test_a_tower_of_another_kind():
    c = config()
    c.model.towers.flow = {'name': 'wat'}
    with pytest.raises(ConfigError, match="flow.name='wat' is a tower for audio"):
        build.check(c)


# ---- Towers.

NARROW = {'multiplier': 0.05}
TOWERS = {
    's3d': NARROW,
    'i3d': {},
    'r2plus1d': NARROW,
    'tsm_resnet': NARROW,
    'vit': {'layers': 1, 'width': 16, 'mlp': 16, 'heads': 2, 'head_width': 8, 'patch': (2, 8, 8)},
}


@pytest.mark.parametrize('channels', [2, 3])
@pytest.mark.parametrize('name', TOWERS)
def test_towers_for_video_read_flow_without_common_spaces(name, channels):
    c = config(channels)
    c.model.inputs.flow.update({'frames': 8, 'size': 64})
    c.model.towers = ConfigDict({'flow': {'name': name, **TOWERS[name]}})
    c.model.head = ConfigDict({'name': 'none'})
    model = models.build(c.model, 'float32')
    batch = preprocess.abstract(c.model.inputs, ('flow',), 2, 'float32')
    assert batch['flow']['data'].shape == (2, 8, 64, 64, channels)
    rng = Rng.create(0, 0, jnp.arange(2, dtype=jnp.uint32))

    def run(key, batch):
        variables = model.init(key, batch, rng=rng, train=False)
        return variables['params'], model.apply(variables, batch, rng=rng, train=False)

    params, outputs = jax.eval_shape(run, jax.random.key(0), batch)
    assert outputs.encoded['flow'].pooled.shape[0] == 2
    assert outputs.spaces == {}
    if name == 's3d':
        # Blocks of 2×2×2 pixels.
        kernel = params['nets_flow']['conv_1a']['conv_0']['conv']['kernel']
        assert kernel.value.shape[-2] == 8 * channels


# ---- A run.


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder, scalars) of a run of two steps that is evaluated by its flow."""
    c = config(steps=2, optimizer__schedule__warmup=1)
    probe = {'type': 'linear_probe', 'train_limit': 32, 'test_limit': 32, 'strengths': (0.1,)}
    c.evals = {
        'probe': {**probe, 'stream': 'flow'},
        'simple_probe': {**probe, 'type': 'simple_probe', 'stream': 'flow'},
        'neighbours': {'type': 'neighbours', 'stream': 'flow'},
        'retrieval': {'type': 'retrieval', 'pairs': (('flow', 'video', 'joint'),), 'limit': 32},
    }
    folder = tmp_path_factory.mktemp('flow_run')
    result = loop.train(c, data_pipelines.open(c), folder, quiet=True)
    return folder, result


def test_training_and_evaluation_read_flow(run):
    folder, _ = run
    text = (folder / 'metrics.jsonl').read_text()
    for name in ('eval/probe/accuracy', 'eval/neighbours/', 'eval/retrieval/flow_to_video/R@1'):
        assert name in text
    assert 'eval/simple_probe/accuracy' in text


def test_users_embed_the_flow_of_clips(run):
    folder, _ = run
    model = vatt_jax.load(folder)
    assert set(model.modalities) == {'video', 'flow'}
    assert 'flow of 4 frames of 16×16 at 8 fps' in repr(model)
    clip = np.random.default_rng(0).integers(0, 256, (9, 20, 30, 3)).astype(np.uint8)
    embedded = model.embed(video=clip, flow=clip)
    assert embedded['flow']['pooled'].shape == (32,)
    assert embedded['flow']['joint'].shape == (16,)
    assert model.similarity(embedded['flow'], embedded['video'], 'joint').shape == ()
    windows = model.embed(flow=[clip, clip[:2]], windows=2)['flow']
    assert windows['joint'].shape == (4, 16)
    np.testing.assert_array_equal(windows['item'], [0, 0, 1, 1])
    # Of a clip that stands still nothing is known but that.
    still = np.repeat(clip[:1], 6, 0)
    other = np.repeat(clip[1:2], 6, 0)
    np.testing.assert_array_equal(
        model.embed(flow=still)['flow']['pooled'], model.embed(flow=other)['flow']['pooled']
    )


def test_a_model_without_a_tower_for_flow(plain_run):
    model = vatt_jax.load(plain_run)
    with pytest.raises(
        ConfigError, match='this model has no flow tower; it has audio, text, video'
    ):
        model.embed(flow=np.zeros((4, 16, 16, 3), np.uint8))


def test_without_motion_a_clip_has_no_flow():
    data = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 2)).astype(np.uint8)
    changed = changes.single_frame({'flow': {'data': data}, 'valid': np.ones(2, bool)})
    assert (changed['flow']['data'] == optical_flow.ZERO).all()


@pytest.mark.slow
def test_an_exported_tower_reads_values_of_flow(run, tmp_path):
    folder, _ = run
    model = vatt_jax.load(folder)
    # Sizes of symbols are no ints.
    with typecheck.off():
        assert 'flow.jax' in model.export(tmp_path / 'exported')
    exported = standalone.Artifact(tmp_path / 'exported')
    assert exported.inputs['flow']['shape'] == ['B', 4, 'S', 'S', 2]
    data = stream(size=16)['data'][:, [0, 1, 0, 1]]
    batch = {'flow': {**stream(size=16), 'data': data, 'valid': np.ones(3, bool)}}
    batch |= {'position': np.arange(3), 'valid': np.ones(3, bool)}
    expected_features = model._encoder(batch)['pooled']['flow']
    np.testing.assert_allclose(
        exported.embed(flow=data)['flow']['pooled'], expected_features, atol=1e-5
    )
