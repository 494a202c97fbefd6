"""From prepared records to host batches: contract, windows, labels, mixtures, damage."""

import shutil

import chex
import numpy as np
import pytest
from batches import assert_contract, assert_equal, concatenate, stack, take
from clocks import FPS, RATE, SIZE, audio_time, clock, piece_middles, video_time
from hypothesis import given
from hypothesis import strategies as st

import data_pipelines
from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows
from data_pipelines.prepare import prepare

LABEL_CLASSES = {'class': None, 'tags': 3}


@pytest.fixture
def data(config):
    """The prepared clocks, opened."""
    opened = data_pipelines.open(config)
    yield opened
    opened.close()


def first_batch(config, *arguments):
    """The first training batch of a config's data, which is closed again."""
    data = data_pipelines.open(config)
    batch = next(data.train(*arguments))
    data.close()
    return batch


def check_clocks(batch, view=''):
    """Pictures and sounds of a batch tell the time that `start` says."""
    video, audio = batch[f'video{view}'], batch[f'audio{view}']
    start = video['start'][:, None]
    expected = start + np.arange(8) / FPS
    # The shortest record is 2 s; behind its end nothing is read in these tests.
    is_inside = (expected < 2.0 - 0.05) & video['valid'][:, None]
    shown = video_time(video['data'])
    np.testing.assert_allclose(shown[is_inside], expected[is_inside], atol=0.06)

    has_both = audio['valid'] & video['valid']
    heard = audio_time(audio['data'])[:, :18]
    expected = start + piece_middles(18)
    np.testing.assert_allclose(heard[has_both], expected[has_both], atol=0.08)


def test_contract_and_clocks(config, data):
    iterator = data.train(0, 13)
    assert_contract(next(iterator), config, 13, label_classes=LABEL_CLASSES)
    iterator.close()
    batch = stack(data.train(0, 13), 3)
    assert sorted(batch['index'][:13]) == list(range(13))
    assert sorted(batch['index'][13:26]) == list(range(13))
    check_clocks(batch)
    assert len(np.unique(batch['video']['start'])) > 5

    # The silent video and the sound without pictures: zeros and valid False, the rest of the row as
    # ever.
    assert batch['valid'].all()
    ids = [text['id'] for text in data.texts('train', 'records')]
    is_silent = batch['index'] == ids.index('train/silent.mp4')
    silent = take(batch, is_silent)
    assert not silent['audio']['valid'].any()
    assert not silent['audio']['data'].any()
    assert silent['video']['valid'].all()
    is_sound = batch['index'] == ids.index('train/sound.wav')
    sound = take(batch, is_sound)
    assert not sound['video']['valid'].any()
    assert not sound['video']['data'].any()
    assert sound['audio']['data'].any()
    has_captions = ~(is_silent | is_sound)
    assert not batch['text']['valid'][~has_captions].any()
    assert batch['text']['mask'][has_captions].all()


@pytest.fixture(scope='session')
def stored_as_video(media_folder, tmp_path_factory):
    """The clocks prepared as H.264."""
    out = tmp_path_factory.mktemp('video') / 'set'
    prepare(
        str(media_folder / 'videos'),
        str(media_folder / 'captions.csv'),
        str(out),
        processes=1,
        quiet=True,
        store='h264',
        crf=12,
        annotations=str(media_folder / 'annotations.json'),
        fps=FPS,
        size=SIZE,
        rate=RATE,
        name='clocks',
    )
    return out


def record_bytes(folder):
    """Size of all records of a prepared dataset."""
    return sum(path.stat().st_size for path in folder.glob('*array_record*'))


def test_frames_stored_as_video_have_the_same_plan_times_and_sounds(
    config, data, stored_as_video, prepared
):
    from_jpegs = next(data.train(0, 13))
    config.data.train = {'video': {'path': str(stored_as_video)}}
    config.data.views = (('video.back', {'kind': 'reverse'}),)
    video_data = data_pipelines.open(config)
    from_video = next(video_data.train(0, 13))
    video_data.close()
    assert record_bytes(stored_as_video) < record_bytes(prepared[0])
    ids_of_jpegs = [text['id'] for text in data.texts('train', 'records')]
    ids_of_video = [text['id'] for text in video_data.texts('train', 'records')]
    assert sorted(ids_of_jpegs) == sorted(ids_of_video)
    assert set(from_video['index']) == set(range(13))
    assert from_video['video']['valid'].sum() == from_jpegs['video']['valid'].sum() == 12

    # The training step gets planes and makes RGB of them itself.
    planes = from_video['video']['data']
    chex.assert_shape(planes, (13, 8, SIZE * 3 // 2, SIZE))
    np.testing.assert_array_equal(from_video['video.back']['data'], planes[:, ::-1])
    from_video['video']['data'] = on_device(planes)
    check_clocks(from_video)


def test_passes_over_frames_stored_as_video_are_rgb(config, stored_as_video):
    config.data.eval = {'path': str(stored_as_video)}
    data = data_pipelines.open(config)
    batch = next(data.one_pass('test', 5))
    data.close()
    assert_contract(batch, config, 5, ['text.caption'], LABEL_CLASSES)
    check_clocks(batch)


def test_both_forms_of_frames_mix(config, stored_as_video, prepared):
    config.data.train = {
        'video': {'path': str(stored_as_video)},
        'jpeg': {'path': str(prepared[0])},
    }
    data = data_pipelines.open(config)
    batch = stack(data.train(0, 16), 2)
    data.close()
    assert_contract(batch, config, 32, label_classes=LABEL_CLASSES)
    assert set(batch['source']) == {0, 1}
    check_clocks(batch)


def test_frames_of_several_shapes_stored_as_video_are_cut_to_squares(config, tmp_path):
    (tmp_path / 'wide').mkdir()
    for width in (64, 96):
        frames, _ = clock(1.0, 64, width)
        media.write_mp4(tmp_path / 'wide' / f'{width}.mp4', frames, FPS)
    prepare(
        str(tmp_path / 'wide'),
        '',
        str(tmp_path / 'out'),
        fps=FPS,
        size=SIZE,
        rate=RATE,
        processes=1,
        quiet=True,
        store='h264',
        validation=0,
        test=0,
    )
    config.data.train = {'wide': {'path': str(tmp_path / 'out')}}
    video = first_batch(config, 0, 4)['video']
    chex.assert_shape(video['data'], (4, 8, 64, 64, 3))
    expected = video['start'][:, None] + np.arange(8) / FPS
    np.testing.assert_allclose(video_time(video['data']), expected, atol=0.06)


def on_device(planes):
    """uint8 [B T H W 3] of planes [B T 3H/2 W] with square frames, by the device stage."""
    import jax

    from vatt_jax.inputs import preprocess
    from vatt_jax.rng import Rng

    num_rows, size = len(planes), planes.shape[3]
    stream = {
        'data': planes,
        'box': np.tile(np.float32([0, 0, 1, 1]), (num_rows, 1)),
        'flip': np.zeros(num_rows, bool),
    }
    rng = Rng.create(0, 0, np.arange(num_rows))
    stream = jax.device_put(stream)
    pixels = preprocess.video(stream, {'size': size}, {'color': 0.0}, rng, augment=False)
    # From [-1, 1].
    return np.rint((np.asarray(pixels) + 1) * 127.5).astype(np.uint8)


def test_planes_are_what_the_decoder_makes_rgb_of():
    """The device stage computes BT.601 of the planes, one colour pixel for four of brightness.

    With y = (Y - 16) / 219, u = (U - 128) / 224 and v = (V - 128) / 224:
    R = y + 1.402 v,  G = y - (0.114 · 1.772 u + 0.299 · 1.402 v) / 0.587,  B = y + 1.772 u.
    """
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (6, 4, 4, 3))
    patches = np.kron(colors, np.ones((16, 16, 1))).astype(np.uint8)  # [T 64 64 3]
    packets = media.encode_h264(patches, FPS, 4)
    rgb = media.decode_h264(packets, range(6))
    planes = media.decode_h264(packets, range(6), 'yuv420p')
    chex.assert_shape(planes, (6, 96, 64))
    got = on_device(planes[None])[0].astype(int)

    y = (planes[:, :64].astype(float) - 16) / 219
    chroma = (planes[:, 64:].astype(float) - 128) / 224
    chroma = chroma.reshape(6, 2, 32, 32).repeat(2, 2).repeat(2, 3)
    u, v = chroma[:, 0], chroma[:, 1]
    red = y + 1.402 * v
    green = y - (0.114 * 1.772 * u + 0.299 * 1.402 * v) / 0.587
    blue = y + 1.772 * u
    expected = 255 * np.stack([red, green, blue], -1).clip(0, 1)

    # Away from the borders of patches, where colour pixels may be doubled otherwise.
    is_inner = np.kron(np.ones((4, 4), bool), np.pad(np.ones((10, 10), bool), 3))
    error = np.abs(got - expected)[:, is_inner]
    assert error.max() < 2
    assert error.mean() < 0.35
    assert np.abs(got - rgb)[:, is_inner].max() <= 3
    assert np.abs(got - patches)[:, is_inner].mean() < 5


def test_any_frame_of_a_stored_video():
    frames, _ = clock(3.5, 48, 64)
    frames[:, 10:20, 10:20, 0] += np.arange(35, dtype=np.uint8)[:, None, None]
    packets = media.encode_h264(frames, FPS, 10)
    assert len(packets) == 35
    whole = media.decode_h264(packets, np.arange(35))
    chex.assert_equal_shape([whole, frames])
    assert np.abs(whole.astype(int) - frames).mean() < 3
    in_any_order = np.random.default_rng(0).permutation(35)
    for numbers in ([34], [9, 10, 11], [20, 3, 3, 34, 0], in_any_order):
        np.testing.assert_array_equal(media.decode_h264(packets, np.array(numbers)), whole[numbers])
    # Nothing before the last beginning is needed.
    np.testing.assert_array_equal(media.decode_h264(packets[20:30], np.array([5])), whole[[25]])
    some = packets[:3] + packets[20:23]
    np.testing.assert_array_equal(media.decode_h264(some, np.array([4, 1])), whole[[21, 1]])
    with pytest.raises(media.MediaError, match='0 of 1 frames decode'):
        media.decode_h264(packets[8:10], np.array([0]))


def test_sentences_are_those_of_the_window(data):
    batch = stack(data.train(0, 13), 2)
    table = data.texts('train', 'records')
    text = batch['text']
    for i, start, words, mask in zip(batch['index'], text['start'], text['data'], text['mask']):
        if not mask.any():
            continue
        # Sentence k lies at 0.4 k … 0.4 k + 0.4; the window's middle is start + 0.4.
        distance = np.abs(np.arange(6) * 0.4 + 0.2 - (start + 0.4))
        distance_of_three = [distance[k : k + 3].sum() for k in range(4)]
        nearest = np.argmin(distance_of_three)
        sentences = table[i]['sentences']
        matches = []
        for k in range(len(sentences) - 2):
            encoded = data.tokenizer.encode(sentences[k : k + 3], 6)
            if (encoded == words).all():
                matches.append(k)
        # Contiguous, in order, nearest (to one sentence).
        assert len(matches) == 1
        assert abs(matches[0] - nearest) <= 1


def test_resume_anywhere_with_any_batch_size_and_number_of_hosts(data):
    whole = stack(data.train(0, 8), 4)
    assert_equal(stack(data.train(16, 8), 2), take(whole, slice(16, None)))
    assert_equal(stack(data.train(20, 4), 3), take(whole, slice(20, None)))
    for hosts in (2, 4):
        of_hosts = [next(data.train(8, 8, process=(i, hosts))) for i in range(hosts)]
        assert_equal(concatenate(of_hosts), take(whole, slice(8, 16)))


@pytest.mark.parametrize(
    'by, split, size',
    [('records', 'train', 13), ('segments', 'test', 10), ('records', 'test', 5)],
)
def test_one_pass_is_exactly_once(data, by, split, size):
    assert data.size(split, by) == size
    of_hosts = [list(data.one_pass(split, 6, process=(i, 2), by=by)) for i in range(2)]
    assert len(of_hosts[0]) == len(of_hosts[1]) == -(-size // 6)
    rows = concatenate([*of_hosts[0], *of_hosts[1]])
    assert sorted(rows['index'][rows['valid']]) == list(range(size))
    last = of_hosts[1][-1]
    padding = take(last, ~last['valid'])
    assert not padding['video']['valid'].any()
    assert not padding['video']['data'].any()


def test_one_pass_repeats_ends_early_and_names_a_split_that_is_not_there(data):
    assert sum(batch['valid'].sum() for batch in data.one_pass('test', 4, limit=3)) == 3
    assert_equal(next(data.one_pass('test', 10)), next(data.one_pass('test', 10)))
    with pytest.raises(DataError, match="no split 'validation'"):
        data.one_pass('validation', 4)


def test_segments_windows_labels_captions(config, data):
    batch = next(data.one_pass('test', 10))
    assert_contract(batch, config, 10, ['text.caption'], LABEL_CLASSES)
    table = data.texts('test', 'segments')
    is_dark = np.array([text['caption'].startswith('dark') for text in table])
    labels = {
        'class': np.where(is_dark, 0, 1).astype(np.int32),
        'tags': np.where(is_dark[:, None], [1, 0, 0], [0, 1, 1]).astype(np.float32),
    }
    assert_equal(batch['labels'], labels)

    middle = np.array([(text['start'] + text['end']) / 2 for text in table])
    length = np.array([2.0 + 0.1 * int(text['id'][-6:-4]) for text in table])
    expected_start = np.clip(middle - 0.4, 0, length - 0.8)
    np.testing.assert_allclose(batch['video']['start'], expected_start, atol=0.1 + 1e-6)
    check_clocks(batch)
    captions = data.tokenizer.encode([text['caption'] for text in table], 6)
    np.testing.assert_array_equal(batch['text.caption']['data'][:, 0], captions)
    np.testing.assert_array_equal(batch['video']['box'], np.tile([0, 0, 1, 1], (10, 1)))
    assert not batch['video']['flip'].any()
    assert table[0]['ground_truth'].startswith('{"i"')

    # In passes over records the label is that of the segment on show.
    batch = next(data.one_pass('test', 5, by='records', augment=True))
    middle = batch['video']['start'] + 0.4
    np.testing.assert_array_equal(batch['labels']['class'][middle > 1.01], 1)
    np.testing.assert_array_equal(batch['labels']['class'][middle < 0.99], 0)


def test_views_of_training(config):
    views = {
        'video.second': {'kind': 'clip'},
        'audio.second': {'kind': 'clip'},
        'text.second': {'kind': 'clip'},
        'audio.late': {'kind': 'shift', 'seconds': 0.5},
        'audio.any': {'kind': 'shift', 'seconds': 'random'},
        'video.back': {'kind': 'reverse'},
        'audio.back': {'kind': 'reverse'},
        'video.second_back': {'kind': 'reverse', 'of': 'second'},
        'audio.second_back': {'kind': 'reverse', 'of': 'second'},
    }
    config.data.views = tuple(views.items())
    data = data_pipelines.open(config)
    batch = stack(data.train(0, 13), 2)
    data.close()
    assert_contract(batch, config, 26, views, LABEL_CLASSES)
    check_clocks(batch)
    check_clocks(batch, '.second')
    second = batch['video.second']
    np.testing.assert_array_equal(second['start'], batch['text.second']['start'])
    assert (second['start'] != batch['video']['start']).mean() > 0.5
    assert (second['box'] != batch['video']['box']).any()
    np.testing.assert_array_equal(batch['video.back']['data'], batch['video']['data'][:, ::-1])
    np.testing.assert_array_equal(batch['audio.back']['data'], batch['audio']['data'][:, ::-1])
    for modality in ('video', 'audio'):
        forward, backward = batch[f'{modality}.second'], batch[f'{modality}.second_back']
        np.testing.assert_array_equal(backward['data'], forward['data'][:, ::-1])
        np.testing.assert_array_equal(backward['start'], forward['start'])

    late = batch['audio.late']
    shift = np.abs(late['start'] - batch['audio']['start'])
    np.testing.assert_allclose(shift, 0.5, atol=1e-5)
    is_heard = late['valid']
    heard = audio_time(late['data'])[:, :18]
    expected = late['start'][:, None] + piece_middles(18)
    np.testing.assert_allclose(heard[is_heard], expected[is_heard], atol=0.08)


def test_windows_at_an_interval(config):
    """CVRL's two windows are drawn together, by the same draws on one host and on two."""
    view = {'kind': 'clip', 'interval': 2.0}
    config.data.views = (('video.second', view), ('audio.second', view))
    data = data_pipelines.open(config)
    batch = next(data.train(0, 26))
    of_hosts = [next(data.train(0, 26, process=(i, 2))) for i in range(2)]
    data.close()
    check_clocks(batch)
    check_clocks(batch, '.second')
    assert (batch['video.second']['start'] != batch['video']['start']).mean() > 0.5
    assert_equal(concatenate(of_hosts), batch)


def test_a_record_without_a_window_far_enough_has_an_empty_stream(config):
    far = {'kind': 'shift', 'seconds': 'random', 'apart': 0.3}
    views = {'audio.far': far, 'video.far': far, 'text.far': far}
    config.data.views = tuple(views.items())
    data = data_pipelines.open(config)
    batch = stack(data.train(0, 13), 4)
    durations = np.array([entry['end'] for entry in data.texts('train', 'records')])
    data.close()
    assert_contract(batch, config, 52, views, LABEL_CLASSES)

    window = 0.8
    duration = durations[batch['index']]
    start = batch['video']['start']
    fits_before = start >= window + 0.3 - 1e-4
    fits_behind = duration - start >= 2 * window + 0.3 - 1e-4
    expected = batch['valid'] & (fits_before | fits_behind)
    has_frames, has_sound = batch['video']['valid'], batch['audio']['valid']
    np.testing.assert_array_equal(batch['video.far']['valid'], expected & has_frames)
    np.testing.assert_array_equal(batch['audio.far']['valid'], expected & has_sound)
    assert 0 < expected.sum() < len(expected)

    shift = np.abs(batch['audio.far']['start'] - start)
    assert shift[batch['audio.far']['valid']].min() >= window + 0.3 - 1e-4
    for name in views:
        missing = take(batch[name], ~expected)
        assert not any(part.any() for part in missing.values())
    is_heard = batch['audio.far']['valid']
    heard = audio_time(batch['audio.far']['data'])[:, :18]
    sought = batch['audio.far']['start'][:, None] + piece_middles(18)
    np.testing.assert_allclose(heard[is_heard], sought[is_heard], atol=0.08)


def test_windows_of_a_pass(config):
    """The views that a pass is given stand instead of the config's."""
    config.data.views = (('video.second', {'kind': 'clip'}),)
    data = data_pipelines.open(config)
    views = {f'video.w{i}': {'kind': 'window', 'number': i, 'of': 3} for i in range(3)}
    batch = next(data.one_pass('test', 10, views=views))
    assert_contract(batch, config, 10, [*views, 'text.caption'], LABEL_CLASSES)
    starts = np.stack([batch[name]['start'] for name in views], axis=1)  # [B 3]
    for i, text in enumerate(data.texts('test')):
        last = max(text['end'] - 0.8, text['start'])
        expected = np.linspace(text['start'], last, 3)
        np.testing.assert_allclose(starts[i], expected, atol=0.1 + 1e-6)

    # The same windows as main streams, pictures and sound together.
    main = next(data.one_pass('test', 10, views={}, window=views['video.w2']))
    np.testing.assert_array_equal(main['video']['data'], batch['video.w2']['data'])
    np.testing.assert_array_equal(main['audio']['start'], batch['video.w2']['start'])
    check_clocks(main)
    data.close()


@pytest.mark.parametrize(
    'window, message',
    [
        ({'kind': 'window', 'number': 3, 'of': 3}, 'number runs from 0'),
        ({'kind': 'clip'}, "expected a view of kind 'window'"),
        ({'kind': 'window', 'number': 0, 'of': 1, 'crop': 2}, 'crop is 2; give a number from 0'),
    ],
)
def test_wrong_windows_of_a_pass_say_what_is_wrong(data, window, message):
    with pytest.raises(DataError, match=message):
        data.one_pass('test', 10, window=window)


def test_fewer_frames_per_second_than_stored(config):
    config.model.inputs.video.update(fps=4.0, frames=3)
    data = data_pipelines.open(config)
    video = next(data.one_pass('test', 5, by='records'))['video']
    data.close()
    expected = video['start'][:, None] + np.arange(3) / 4
    shown = video_time(video['data'])
    chex.assert_equal_shape([shown, expected])
    # Half a stored frame, and the codec.
    assert np.abs(shown - expected).max() < 0.05 + 0.04


def test_short_records_repeat(config):
    config.model.inputs.video.update(frames=40)
    config.model.inputs.audio.update(samples=4 * RATE)
    data = data_pipelines.open(config)
    batch = next(data.train(0, 13))
    table = data.texts('train', 'records')
    data.close()
    for i in np.flatnonzero(batch['video']['valid'] & batch['audio']['valid']):
        length = table[batch['index'][i]]['end']
        expected = np.arange(40) / FPS % round(length, 6)
        np.testing.assert_allclose(video_time(batch['video']['data'][i]), expected, atol=0.06)
        pcm = batch['audio']['data'][i]
        period = round(length * RATE)
        num_repeated = 4 * RATE - period
        repeated = pcm[period : 2 * period][:num_repeated]
        np.testing.assert_array_equal(repeated, pcm[:num_repeated][:period])


def change_checksums(folder, changed):
    """Write the table of a prepared folder anew, with other checksums of one record's pieces."""
    from data_pipelines.storage import piece_tables
    from data_pipelines.storage.records import Prepared

    prepared = Prepared(folder)
    index = prepared.index('train')
    tables = prepared.tables('train', index)
    shutil.rmtree(piece_tables.folder_of(folder, 'train'))
    paths = prepared.files('train').paths
    with piece_tables.PiecesWriter(folder, 'train', paths, 2 * RATE, 1) as writer:
        for i in range(len(index)):
            num_seconds = -(-int(index.samples[i]) // RATE)
            table = np.array(tables.pieces(i, range(index.frames[i]), range(num_seconds)))
            table = table.astype(np.uint32)
            table[:, 2] ^= i == changed
            frames, seconds = np.split(table, [index.frames[i]])
            writer.add(*tables.place(i), frames, seconds)


@pytest.fixture(params=['flipped bits', 'other record'])
def damaged(prepared, tmp_path, request):
    """A copy of the clocks in which record 4 of the training split is unreadable.

    Each frame and each second of sound has one flipped bit, or is not the one that was noted.
    """
    from data_pipelines.storage import array_record_files
    from data_pipelines.storage.records import Prepared

    out = tmp_path / 'damaged'
    shutil.copytree(prepared[0], out)
    if request.param == 'other record':
        change_checksums(out, 4)
        return out
    index = Prepared(out).index('train')
    tables = Prepared(out).tables('train', index)
    num_seconds = -(-int(index.samples[4]) // RATE)
    pieces = tables.pieces(4, range(index.frames[4]), range(num_seconds))
    shard = next(out.glob('*-train.array_record*'))
    content = bytearray(shard.read_bytes())
    _, begin, _ = tables.place(4)
    for offset, size, _ in pieces:
        content[array_record_files.physical(begin + offset + size // 2)] ^= 0x10
    shard.write_bytes(content)
    return out


def test_unreadable_record_keeps_its_row(config, damaged):
    clean_data = data_pipelines.open(config)
    clean = stack(clean_data.train(0, 13), 2)
    clean_data.close()
    config.data.train = {'clocks': {'path': str(damaged)}}
    config.data.max_corrupt = 0.5
    data = data_pipelines.open(config)
    batch = stack(data.train(0, 13), 2)
    is_damaged = batch['index'] == 4
    assert is_damaged.sum() == 2
    assert clean['valid'].all()
    np.testing.assert_array_equal(batch['valid'], ~is_damaged)
    np.testing.assert_array_equal(batch['position'], clean['position'])
    assert_equal(take(batch, ~is_damaged), take(clean, ~is_damaged))

    damaged_rows = take(batch, is_damaged)
    assert not damaged_rows['valid'].any()
    for stream in ('video', 'audio', 'text'):
        for name in {'valid', 'data', 'mask', 'box'} & set(damaged_rows[stream]):
            assert not damaged_rows[stream][name].any(), (stream, name)
    np.testing.assert_array_equal(damaged_rows['labels']['class'], -1)
    problems = data.problems()
    assert problems['corrupt'] >= 2
    assert problems['read'] >= 26
    assert [(source, i) for source, i, _ in problems['indices']] == [('clocks/train', 4)]
    data.close()


def test_too_many_unreadable_records_stop_the_run(config, damaged):
    config.data.train = {'clocks': {'path': str(damaged)}}
    data = data_pipelines.open(config)
    with pytest.raises(DataError, match='max_corrupt=0.01'):
        for _ in range(20):
            iterator = data.train(0, 13)
            next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    data.close()


def test_mixture_of_sources(config, prepared):
    path = str(prepared[0])
    config.data.train = {
        'a': {'path': path, 'share': 0.25},
        'b': {'path': path, 'split': 'test'},
        'c': {'path': path, 'weight': 3.0},
    }
    sizes = [13, 5, 13]
    data = data_pipelines.open(config)
    assert data.size('train') == 31
    assert data.info['sources'] == ['a', 'b', 'c']
    batch = stack(data.train(0, 16), 6)
    is_first = batch['source'].reshape(6, 16) == 0
    assert is_first.sum(1).tolist() == [4] * 6
    total = np.bincount(batch['source'], minlength=3)
    assert 0.5 < total[2] / total[1] / 3 < 2
    for source, size in enumerate(sizes):
        of_source = batch['index'][batch['source'] == source]
        assert sorted(of_source[:size]) == list(range(size))
    check_clocks(batch)

    batch = next(data.one_pass('train', 31, by='records'))
    expected = []
    for source, size in enumerate(sizes):
        expected += [(source, i) for i in range(size)]
    assert sorted(zip(batch['source'], batch['index'])) == expected
    position = data.offsets('train')[batch['source']] + batch['index']
    np.testing.assert_array_equal(position, batch['position'])
    data.close()


def test_without_captioned_segments_there_is_no_caption_stream(data):
    """So that retrieval asks with the sentences that were spoken: the training split has these."""
    spoken = next(data.one_pass('train', 4))
    captioned = next(data.one_pass('test', 4))
    assert 'text.caption' not in spoken
    assert spoken['text']['valid'].any()
    assert captioned['text.caption']['valid'].all()


def test_a_source_without_a_path_is_what_is_made(config, prepared, tmp_path):
    (tmp_path / 'records').symlink_to(prepared[0])
    config.data.train = {'made': {'weight': 2}}
    with pytest.raises(DataError, match='config.data.train.made has no path'):
        data_pipelines.open(config)
    config.data.make = {'path': str(tmp_path)}
    data = data_pipelines.open(config)
    assert data.size('train') == 13
    data.close()


def test_few_labels(config, prepared):
    """Exactly so many segments of each class are known, and fewer are a part of more.

    Records are drawn in proportion to their known segments; passes know all.
    """

    def known_segments(per_class, label='class'):
        """({(record, class)} of the rows with a label, records that were drawn)."""
        config.data.train = {
            'clocks': {
                'path': str(prepared[0]),
                'split': 'test',
                'label': label,
                'per_class': per_class,
            }
        }
        data = data_pipelines.open(config)
        batch = stack(data.train(0, 32), 5)
        in_a_pass = next(data.one_pass('test', 10))['labels']['class']
        data.close()
        assert sorted(in_a_pass) == [0] * 5 + [1] * 5
        classes, tags = batch['labels']['class'], batch['labels']['tags']
        is_known = classes >= 0
        assert not tags[~is_known].any()
        assert tags[is_known].any(-1).all()
        known = zip(batch['index'][is_known].tolist(), classes[is_known].tolist())
        return set(known), set(batch['index'].tolist())

    two, records = known_segments(2)
    assert sorted(label for _, label in two) == [0, 0, 1, 1]
    assert records == {record for record, _ in two}
    four, _ = known_segments(4)
    assert two < four
    assert len(four) == 8
    message = "per_class=6: class 'early' of label 'class' has 5 segments in split 'test'"
    with pytest.raises(DataError, match=message):
        known_segments(6)
    message = "has no label 'tags' with one class for each segment; it has class"
    with pytest.raises(DataError, match=message):
        known_segments(2, label='tags')


def test_frames_of_a_clip_faster_than_its_record():
    """A window inside its record never begins again at frame 0; a longer one repeats the record."""
    frames = np.array([4, 4])
    # 2 stored frames a second: 2 s; a window of 1 s at 10 frames a second, from 1 s and from 1.5 s.
    numbers = frame_windows.frame_numbers(np.array([1.0, 1.5]), frames, 2.0, 10.0, 10)
    assert numbers[0].tolist() == [2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    assert numbers[1].tolist() == [3, 3, 3, 0, 0, 0, 0, 0, 1, 1]
    # Twice as many: the last frame is exactly between two stored ones.
    numbers = frame_windows.frame_numbers(np.zeros(1), np.array([4]), 2.0, 4.0, 8)
    assert numbers[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 3]


@given(
    start=st.integers(0, 40),
    duration=st.integers(0, 60),
    window=st.integers(1, 20),
    gap=st.integers(0, 10),
    u=st.floats(0, 1, exclude_max=True),
)
def test_windows_apart_are_those_that_do_not_touch(start, duration, window, gap, u):
    """In steps of 0.1 s, against all starts tried one by one."""
    start = min(start, max(duration - window, 0))  # the first window is inside its record
    possible = []
    for other in range(duration - window + 1):
        seconds_between = max(other - (start + window), start - (other + window))
        if seconds_between >= gap:
            possible.append(other)
    arrays = np.array([start, duration]) * 0.1
    found = frame_windows.apart(arrays[:1], arrays[1:], window * 0.1, gap * 0.1, 0.1, np.array([u]))
    if not possible:
        assert np.isnan(found[0])
        return
    # Uniform: the share u of the list, in its order.
    expected = possible[int(u * len(possible))]
    np.testing.assert_allclose(found[0], expected * 0.1, atol=1e-9)


@pytest.mark.parametrize(
    'position, expected',
    [
        (0.0, [[0, 0, 1, 0.5], [0, 0, 2 / 3, 1], [0, 0, 1, 1]]),
        (0.5, [[0, 0.25, 1, 0.75], [1 / 6, 0, 5 / 6, 1], [0, 0, 1, 1]]),
        (1.0, [[0, 0.5, 1, 1], [1 / 3, 0, 1, 1], [0, 0, 1, 1]]),
    ],
)
def test_squares_along_the_longer_side(position, expected):
    """Boxes (y0 x0 y1 x1) of a wide, a high and a square frame."""
    height, width = np.array([60, 90, 50]), np.array([120, 60, 50])
    boxes = frame_windows.square_boxes(height, width, position)
    np.testing.assert_allclose(boxes, expected, atol=1e-6)


def test_frames_of_different_shapes_are_cut_to_squares(config, tmp_path):
    (tmp_path / 'videos').mkdir()
    ramp = np.linspace(0, 255, 128).astype(np.uint8)
    wide = np.broadcast_to(ramp[None, None, :, None], (12, SIZE, 128, 3))
    media.write_mp4(tmp_path / 'videos' / 'wide.mp4', wide, FPS)
    media.write_mp4(tmp_path / 'videos' / 'high.mp4', wide.transpose(0, 2, 1, 3), FPS)
    media.write_mp4(tmp_path / 'videos' / 'even.mp4', clock(1.2)[0], FPS)
    prepare(
        str(tmp_path / 'videos'),
        '',
        str(tmp_path / 'out'),
        fps=FPS,
        size=SIZE,
        rate=RATE,
        quiet=True,
        processes=1,
        validation=0.0,
        test=0.0,
    )
    config.data.train = {'shapes': {'path': str(tmp_path / 'out')}}
    data = data_pipelines.open(config)
    ids = [text['id'] for text in data.texts('train', 'records')]

    def check_squares(stream, expected):
        """The first frames of the wide and the high video show this part of the ramp."""
        for name, other_axis in (('wide.mp4', 0), ('high.mp4', 1)):
            frame = stream['data'][ids.index(name), 0].astype(float).mean(-1)  # [H W]
            np.testing.assert_allclose(frame.mean(other_axis), expected.astype(float), atol=6)

    batch = next(data.one_pass('train', 3, by='records'))
    chex.assert_shape(batch['video']['data'], (3, 8, SIZE, SIZE, 3))
    check_squares(batch['video'], ramp[32:96])

    # Three squares of each frame, as multi-view testing takes them; two of them in one pass.
    for crop, expected in ((0.0, ramp[:64]), (1.0, ramp[64:])):
        window = {'kind': 'window', 'number': 0, 'of': 1, 'crop': crop}
        views = {'video.middle': {**window, 'crop': 0.5}}
        batch = next(data.one_pass('train', 3, by='records', window=window, views=views))
        check_squares(batch['video'], expected)
        check_squares(batch['video.middle'], ramp[32:96])

    # Training moves the square along the long side.
    batch = stack(data.train(0, 3), 5)
    is_wide = batch['index'] == ids.index('wide.mp4')
    brightness = batch['video']['data'][is_wide].astype(float).mean((1, 2, 3, 4))
    assert len(brightness) == 5
    assert brightness.std() > 5
    data.close()


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model.inputs.video.fps': 25.0}, 'model.inputs.video.fps is 25.*--fps=25'),
        ({'model.inputs.video.size': 224}, 'model.inputs.video.size is 224.*--size=224'),
        ({'model.inputs.audio.rate': 48000}, 'model.inputs.audio.rate is 48000.*--rate=48000'),
        (
            {'model.inputs.text.tokenizer': 'wordpiece'},
            "tokenizer is 'wordpiece'.*--tokenizer=wordpiece",
        ),
        ({'data.train': {}}, 'data.train is empty'),
        ({'data.train': {'a': {'path': 'nowhere'}}}, 'nowhere does not exist'),
        ({'data.train': {'a': {'path': 'tests'}}}, 'not a folder made by'),
        ({'data.train': {'a': {}}}, 'has no path'),
        (
            {'data.train': {'a': 'data/mine'}},
            'config.data.train.a: expected a group of fields, such as '
            "{'path': FOLDER}, got 'data/mine'",
        ),
        (
            {'data.train': {'a': {'path': 'tests', 'weight': 'much'}}},
            "config.data.train.a.weight: expected float, such as 1.0, got 'much'",
        ),
        (
            {'data.train': {'a': {'path': 'tests', 'spilt': 'test'}}},
            "config.data.train.a has no field 'spilt'",
        ),
        ({'data.views': (3,)}, 'config.data.views: expected pairs of a stream and a view'),
    ],
)
def test_what_does_not_fit_is_named(config, changes, message):
    for path, value in changes.items():
        parents, _, field = path.rpartition('.')
        node = config
        for name in parents.split('.'):
            node = node[name]
        node[field] = value
    with pytest.raises(DataError, match=message):
        data_pipelines.open(config)


def test_the_tokenizer_of_a_trained_model_is_used(config):
    from vatt_jax.inputs import tokenizer

    spec = tokenizer.train('words', ['video yes'], 10).to_spec()
    with config.unlocked(), config.ignore_type():
        config.model.inputs.text.tokenizer = spec
    data = data_pipelines.open(config)
    assert data.info['tokenizer'] == spec
    assert next(data.train(0, 13))['text']['data'].max() == 3
    data.close()
