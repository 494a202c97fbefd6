"""Optical flow beside the frames that it is of: prepared, stored, and read with their windows."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from batches import assert_equal
from scipy import ndimage

import data_pipelines
from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.prepare import prepare
from data_pipelines.storage.records import Prepared, Split
from tests import tiny
from vatt_jax.inference.item_windows import ItemReader
from vatt_jax.inference.requests import Request
from vatt_jax.inputs import optical_flow

FPS, SIZE, WIDTH = 10.0, 48, 64
# Steps of the values that JPEG and H.264 of the frames may cost together.
TOLERANCE = 4
SMALL = {
    'fps': FPS,
    'size': SIZE,
    'rate': 8000,
    'quality': 95,
    'min_seconds': 0.5,
    'processes': 1,
    'quiet': True,
}


def steps(count, seed):
    """[count 2]: how far everything moves right and down from each frame to the next, in pixels."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(-5, 6, count), rng.integers(-3, 4, count)], -1)


def write_video(path, count, seed, width=WIDTH):
    """So many frames of a texture that moves by `steps`."""
    margin = 60
    height = SIZE
    noise = np.random.default_rng(100 + seed).normal(size=(height + 2 * margin, width + 2 * margin))
    smooth = ndimage.gaussian_filter(noise, 2)
    large = np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    large = np.repeat(large[..., None], 3, -1)
    position = np.array([margin, margin])
    frames = []
    for step in [np.zeros(2, int), *steps(count - 1, seed)]:
        position = position - step
        x, y = position
        frames.append(large[y : y + height, x : x + width])
    media.write_mp4(path, np.stack(frames), FPS, None, 8000, crf=3)


COUNTS = {'train/a.mp4': 24, 'train/b.mp4': 30, 'train/short.mp4': 5, 'test/c.mp4': 20}
SEEDS = {name: i for i, name in enumerate(COUNTS)}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('moving')
    for name, count in COUNTS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_video(path, count, SEEDS[name])
    return folder


@pytest.fixture(scope='module')
def with_flow(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp('out') / 'with_flow'
    prepare(str(videos), out=str(out), flow='dis', **SMALL)
    return out


@pytest.fixture(scope='module')
def without_flow(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp('out') / 'without_flow'
    prepare(str(videos), out=str(out), **SMALL)
    return out


def config(train, **overrides):
    """Of a run that reads six frames and six flows, as stored, of these folders."""
    c = tiny.config(**overrides)
    c.data.source = 'records'
    c.data.train = {name: {'path': str(path)} for name, path in train.items()}
    c.data.eval = {'path': str(next(iter(train.values())))}
    c.data.crop, c.data.aspect, c.data.flip = (1.0, 1.0), (1.0, 1.0), 0.0
    c.model.inputs.video.update({'frames': 6, 'size': SIZE, 'fps': FPS})
    c.model.inputs.audio.update({'samples': 800, 'rate': 8000})
    c.model.inputs.flow = {'frames': 6, 'size': SIZE, 'fps': FPS, 'channels': 2}
    return c


def training_batch(c, size=12):
    data = data_pipelines.open(c)
    batch = next(data.train(0, size))
    data.close()
    return batch


def numbers_of(batch, name, count):
    """Which stored frames a row's window shows; a short record repeats."""
    begin = np.round(batch[name]['start'] * FPS).astype(int)  # [B]
    return (begin[:, None] + np.arange(6)) % np.asarray(count)[:, None]


def ids(folder, split='train'):
    return list(Split(Prepared(folder), split).index.id)


def expected_steps(batch, name, folder):
    """[B T 2]: by construction, how far the texture moves behind each frame of a stream."""
    names = ids(folder)
    of_rows = [names[i] for i in batch['index']]
    numbers = numbers_of(batch, name, [COUNTS[video] for video in of_rows])
    found = []
    for video, row in zip(of_rows, numbers):
        known = steps(COUNTS[video] - 1, SEEDS[video])
        # The last frame repeats what is before it.
        found.append(np.concatenate([known, known[-1:]])[row])
    return np.stack(found)


def middle(values):
    """Median displacement of the middle of each picture, in pixels: [... H W 2] -> [... 2]."""
    inner = optical_flow.to_pixels(values)[..., 12:-12, 16:-16, :]
    return np.median(inner, axis=(-3, -2))


def test_a_window_of_flow_is_that_of_the_frames_beside_it(with_flow):
    batch = training_batch(config({'mine': with_flow}))
    flow, video = batch['flow'], batch['video']
    assert flow['data'].dtype == np.uint8
    assert flow['data'].shape == (12, 6, SIZE, WIDTH, 2)
    assert video['data'].shape == (12, 6, SIZE, WIDTH, 3)
    assert flow['valid'].all()
    np.testing.assert_array_equal(flow['start'], video['start'])
    expected = expected_steps(batch, 'flow', with_flow)
    np.testing.assert_allclose(middle(flow['data']), expected, atol=0.35)
    # Computed anew from the frames of the same window; the last one needs a frame behind it.
    for row in np.flatnonzero(batch['index'] == ids(with_flow).index('train/b.mp4')):
        anew = optical_flow.of_frames(list(video['data'][row]), 'dis')[:-1]
        difference = np.abs(anew.astype(int) - flow['data'][row][:-1])[:, 8:-8, 8:-8]
        assert np.median(difference) <= TOLERANCE


def test_records_say_how_flow_was_computed_and_have_one_for_each_frame(with_flow):
    meta = json.loads((with_flow / 'index.json').read_text())
    assert meta['flow'] == {'method': 'dis', 'bound': optical_flow.BOUND}
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(with_flow))
    for example in builder.as_data_source('train'):
        assert len(example['flow']) == len(example['frames'])
        # The last one repeats.
        assert example['flow'][-1] == example['flow'][-2]


def test_without_flow_a_folder_is_that_of_before(without_flow):
    meta = json.loads((without_flow / 'index.json').read_text())
    assert 'flow' not in meta
    assert meta['version'] == 2
    assert not list((without_flow / 'pieces-train').glob('flow*'))
    c = config({'mine': without_flow})
    c.model.inputs.flow = {}
    assert 'flow' not in training_batch(c)


def test_videos_with_flow_are_those_without(with_flow, without_flow):
    with_it, without_it = config({'mine': with_flow}), config({'mine': without_flow})
    without_it.model.inputs.flow = {}
    batch = training_batch(with_it)
    del batch['flow']
    assert_equal(batch, training_batch(without_it))


def test_in_a_mixture_flow_may_be_missing(with_flow, without_flow):
    batch = training_batch(config({'with': with_flow, 'without': without_flow}), 24)
    has_flow = batch['source'] == 0
    assert 0 < has_flow.sum() < 24
    np.testing.assert_array_equal(batch['flow']['valid'], has_flow)
    assert batch['video']['valid'].all()
    assert (batch['flow']['data'][~has_flow] == 0).all()
    assert (batch['flow']['data'][has_flow] > 0).all()


def test_flow_that_no_dataset_has(without_flow):
    with pytest.raises(DataError, match='has no optical flow; prepare it again with --flow'):
        data_pipelines.open(config({'mine': without_flow}))


@pytest.mark.parametrize(
    'field, value, words',
    [
        ('fps', 5.0, 'stores the flow between frames at 10 per second'),
        ('fps', 20.0, 'flow.fps is 20'),
        ('size', 64, 'flow.size is 64'),
    ],
)
def test_inputs_that_the_stored_flow_does_not_fit(with_flow, field, value, words):
    c = config({'mine': with_flow})
    c.model.inputs.flow[field] = value
    with pytest.raises(DataError, match=words):
        data_pipelines.open(c)


def test_two_meanings_of_flow(with_flow, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(with_flow, other)
    meta = json.loads((other / 'index.json').read_text())
    meta['flow']['method'] = 'tvl1'
    (other / 'index.json').write_text(json.dumps(meta))
    with pytest.raises(DataError, match='prepare both with the same --flow'):
        data_pipelines.open(config({'one': with_flow, 'two': other}))


def test_views_of_flow(with_flow):
    c = config({'mine': with_flow})
    c.data.views = (
        ('flow.second', {'kind': 'clip'}),
        ('video.second', {'kind': 'clip'}),
        ('flow.back', {'kind': 'reverse'}),
        ('video.back', {'kind': 'reverse'}),
    )
    batch = training_batch(c, 24)
    np.testing.assert_array_equal(batch['flow.second']['start'], batch['video.second']['start'])
    assert (batch['flow.second']['start'] != batch['flow']['start']).any()
    expected = expected_steps(batch, 'flow.second', with_flow)
    np.testing.assert_allclose(middle(batch['flow.second']['data']), expected, atol=0.35)
    # Backwards from frame n to n - 1 everything moves against the flow of frame n - 1.
    for row in np.flatnonzero(batch['index'] == ids(with_flow).index('train/a.mp4')):
        known = steps(COUNTS['train/a.mp4'] - 1, SEEDS['train/a.mp4'])
        numbers = numbers_of(batch, 'flow', [COUNTS['train/a.mp4']] * 24)[row][::-1]
        found = middle(batch['flow.back']['data'][row])
        np.testing.assert_allclose(found, -known[np.maximum(numbers - 1, 0)], atol=0.35)


def test_crops_and_mirroring_are_drawn_for_each_stream(with_flow):
    c = config({'mine': with_flow})
    c.data.crop, c.data.flip = (0.3, 1.0), 0.5
    batch = training_batch(c, 24)
    for part in ('box', 'flip'):
        assert (batch['flow'][part] != batch['video'][part]).any()
    evaluation = next(data_pipelines.open(c).one_pass('test', 1))
    np.testing.assert_array_equal(evaluation['flow']['box'], evaluation['video']['box'])
    assert not evaluation['flow']['flip'].any()


def test_flow_of_h264_is_stored_as_jpeg(videos, with_flow, tmp_path):
    prepare(str(videos), out=str(tmp_path / 'h264'), flow='dis', store='h264', **SMALL)
    batch = training_batch(config({'mine': tmp_path / 'h264'}))
    # As planes: H * 3 / 2 rows.
    assert batch['video']['data'].shape == (12, 6, SIZE * 3 // 2, WIDTH)
    expected = training_batch(config({'mine': with_flow}))
    assert_equal(batch['flow'], expected['flow'])


def test_frames_of_several_shapes_are_cut_where_their_flow_is(videos, tmp_path):
    mixed = tmp_path / 'videos'
    shutil.copytree(videos, mixed)
    write_video(mixed / 'train' / 'wide.mp4', 24, 9, width=96)
    prepare(str(mixed), out=str(tmp_path / 'mixed'), flow='dis', **SMALL)
    batch = training_batch(config({'mine': tmp_path / 'mixed'}), 16)
    assert batch['flow']['data'].shape == (16, 6, SIZE, SIZE, 2)
    wide = batch['index'] == ids(tmp_path / 'mixed').index('train/wide.mp4')
    assert wide.any()
    for row in np.flatnonzero(wide):
        anew = optical_flow.of_frames(list(batch['video']['data'][row]), 'dis')[:-1]
        stored = batch['flow']['data'][row][:-1]
        difference = np.abs(anew.astype(int) - stored)[:, 8:-8, 8:-8]
        assert np.median(difference) <= TOLERANCE


def test_a_damaged_flow_empties_its_row_alone(with_flow, tmp_path):
    copy = tmp_path / 'damaged'
    shutil.copytree(with_flow, copy)
    split = Split(Prepared(copy), 'train')
    row = ids(copy).index('train/a.mp4')
    _, _, flows = split.clip(row, [], [], range(COUNTS['train/a.mp4']))
    (path,) = (pathlib.Path(path) for path in split.prepared.files('train').paths)
    raw = path.read_bytes()
    # Of the first window of two; the frames of all windows are whole.
    at = raw.index(flows[2]) + 200
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    c = config({'mine': copy}, data__max_corrupt=1.0)
    data = data_pipelines.open(c)
    batch = next(
        data.one_pass(
            'train', 3, by='records', views={'flow.w': {'kind': 'window', 'number': 0, 'of': 2}}
        )
    )
    data.close()
    np.testing.assert_array_equal(batch['valid'], np.arange(3) != row)
    assert (batch['flow']['data'][row] == 0).all()
    c.model.inputs.flow = {}
    assert next(data_pipelines.open(c).one_pass('train', 3, by='records'))['valid'].all()


@pytest.mark.parametrize('as_array', [False, True])
def test_what_users_embed_is_what_was_prepared(as_array, videos, with_flow):
    c = config({'mine': with_flow})
    data = data_pipelines.open(c)
    stored = next(data.one_pass('test', 1))['flow']
    item = videos / 'test' / 'c.mp4'
    if as_array:
        item = np.stack(list(media.read(item, FPS, SIZE, 8000).frames))
    reader = ItemReader(data.inputs, lambda key, message: None, data.info['flow'])
    request = Request('embed', None, 1, None, None, 'raise', True)
    (piece,) = reader.pieces('flow', item, request, 'embed(flow=…)', False)
    # The middle window of 20 frames: of 21 between them for files and arrays, 20 for records.
    assert abs(piece.start - stored['start'][0]) <= 1 / FPS + 1e-6
    begin = round(float(piece.start) * FPS)
    same = next(
        data.one_pass('test', 1, window={'kind': 'window', 'number': begin, 'of': 15}, by='records')
    )['flow']
    assert same['start'] == pytest.approx(piece.start)
    square = same['data'][0][:, :, 8:-8]
    difference = np.abs(piece.data['flow'].astype(int) - square)
    # What JPEG changed.
    assert difference.mean() < 0.5
    assert difference.max() <= 8


def test_a_still_picture_has_no_motion(tmp_path):
    frames = np.repeat(np.full((1, SIZE, WIDTH, 3), 90, np.uint8), 12, 0)
    (tmp_path / 'videos').mkdir()
    media.write_mp4(tmp_path / 'videos' / 'still.mp4', frames, FPS, None, 8000)
    prepare(str(tmp_path / 'videos'), out=str(tmp_path / 'out'), flow='dis', **SMALL)
    batch = training_batch(config({'mine': tmp_path / 'out'}), 1)
    assert (batch['flow']['data'] == optical_flow.ZERO).all()


@pytest.mark.slow
def test_workers_read_the_same(with_flow):
    c = config({'mine': with_flow})
    c.data.views = (('flow.back', {'kind': 'reverse'}),)
    expected = training_batch(c)
    c.data.workers = 1
    assert_equal(training_batch(c), expected)


def test_commands_that_make_no_sense(videos, tmp_path):
    with pytest.raises(DataError, match="--flow='farneback': choose one of dis, tvl1"):
        prepare(str(videos), out=str(tmp_path / 'a'), flow='farneback', **SMALL)
    with pytest.raises(DataError, match='--size=8 makes no sense'):
        prepare(str(videos), out=str(tmp_path / 'b'), flow='dis', **{**SMALL, 'size': 8})


def test_the_same_folder_with_and_without_flow(videos, tmp_path):
    small = {**SMALL, 'out': str(tmp_path / 'out')}
    assert prepare(str(videos), flow='dis', **small)['fresh']
    assert not prepare(str(videos), flow='dis', **small)['fresh']
    with pytest.raises(DataError, match='already prepared with other settings'):
        prepare(str(videos), **small)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*array_record*')}
    prepare(str(videos), flow='dis', overwrite=True, **small)
    after = {path.name: path.read_bytes() for path in (tmp_path / 'out').glob('*array_record*')}
    assert before == after
