import itertools
import shutil

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, audio_time, clock, video_time
from test_data_synthetic import equal, rows

import data_pipelines
from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows
from data_pipelines.prepare import prepare


@pytest.fixture
def data(config):
    d = data_pipelines.open(config)
    yield d
    d.close()


def check_clocks(got, view=''):
    """Pictures and sounds of a stacked batch tell the time that `start` says."""
    start = got[f'video{view}/start']
    seen = got[f'video{view}/valid']
    want = start[:, None] + np.arange(8) / FPS
    inside = (
        want < 2.0 - 0.05
    )  # the shortest record is 2 s; behind its end nothing is read in these tests
    shown = video_time(got[f'video{view}/data'])
    np.testing.assert_allclose(shown[seen][inside[seen]], want[seen][inside[seen]], atol=0.06)
    heard = got[f'audio{view}/valid'] & seen
    told = audio_time(got[f'audio{view}/data'])[:, :18]
    np.testing.assert_allclose(
        told[heard], (start[:, None] + (np.arange(18) + 0.5) * 0.04)[heard], atol=0.08
    )


def test_contract_and_clocks(data):
    b = next(it := data.train(0, 13))
    it.close()
    assert (
        b['video']['data'].shape == (13, 8, SIZE, SIZE, 3) and b['video']['data'].dtype == np.uint8
    )
    assert b['audio']['data'].shape == (13, 6400) and b['audio']['data'].dtype == np.int16
    assert b['text']['data'].shape == (13, 3, 6) and b['text']['data'].dtype == np.int32
    assert (
        b['position'].dtype == np.int64
        and b['index'].dtype == np.int32
        and b['source'].dtype == np.int32
    )
    got = rows(data.train(0, 13), 3)
    assert sorted(got['index'][:13]) == list(range(13)) == sorted(got['index'][13:26])
    check_clocks(got)
    assert len(np.unique(got['video/start'])) > 5
    # The silent video and the sound without pictures: zeros and valid False, the rest of the row as ever.
    ids = [t['id'] for t in data.texts('train', 'records')]
    silent, sound = (
        got['index'] == ids.index('train/silent.mp4'),
        got['index'] == ids.index('train/sound.wav'),
    )
    assert (
        not got['audio/valid'][silent].any()
        and not got['audio/data'][silent].any()
        and got['video/valid'][silent].all()
    )
    assert (
        not got['video/valid'][sound].any()
        and not got['video/data'][sound].any()
        and got['audio/data'][sound].any()
    )
    assert got['valid'].all() and not got['text/valid'][silent | sound].any()
    assert got['text/mask'][~(silent | sound)].all()


@pytest.fixture(scope='session')
def stored_as_video(media_folder, tmp_path_factory):
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


def test_frames_stored_as_video(config, data, stored_as_video, prepared, tmp_path):
    """One reader for both forms: the same plan, times and sounds, and in one mixture."""
    jpegs = rows(data.train(0, 13), 1)
    config.data.train = {'video': {'path': str(stored_as_video)}}
    config.data.views = (('video.back', {'kind': 'reverse'}),)
    video_data = data_pipelines.open(config)
    videos = rows(video_data.train(0, 13), 1)
    video_data.close()
    sizes = [
        sum(p.stat().st_size for p in path.glob('*array_record*'))
        for path in (stored_as_video, prepared[0])
    ]
    assert sizes[0] < sizes[1]
    ids = [[t['id'] for t in d.texts('train', 'records')] for d in (data, video_data)]
    assert sorted(ids[0]) == sorted(ids[1]) and set(videos['index']) == set(range(13))
    # The training step gets planes and makes RGB of them itself; other passes get RGB.
    assert videos['video/data'].shape == (13, 8, SIZE * 3 // 2, SIZE)
    np.testing.assert_array_equal(videos['video.back/data'], videos['video/data'][:, ::-1])
    videos['video/data'] = on_device(videos['video/data'])
    check_clocks(videos)
    config.data.eval = {'path': str(stored_as_video)}
    video_data = data_pipelines.open(config)
    check_clocks(tested := rows(video_data.one_pass('test', 5), 1))
    assert tested['video/data'].shape == (5, 8, SIZE, SIZE, 3)
    video_data.close()
    assert videos['video/valid'].sum() == jpegs['video/valid'].sum() == 12
    config.data.train = {
        'video': {'path': str(stored_as_video)},
        'jpeg': {'path': str(prepared[0])},
    }
    config.data.views = ()
    both = data_pipelines.open(config)
    got = rows(both.train(0, 16), 2)
    both.close()
    assert {0, 1} == set(got['source'])
    check_clocks(got)
    # Frames of several shapes: squares are cut here too.
    (tmp_path / 'wide').mkdir()
    for i, width in enumerate((64, 96)):
        media.write_mp4(tmp_path / 'wide' / f'{i}.mp4', clock(1.0, 64, width)[0], FPS)
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
    wide = data_pipelines.open(config)
    got = rows(wide.train(0, 4), 1)
    wide.close()
    assert got['video/data'].shape == (4, 8, 64, 64, 3)
    np.testing.assert_allclose(
        video_time(got['video/data']), got['video/start'][:, None] + np.arange(8) / FPS, atol=0.06
    )


def on_device(planes):
    """uint8 [B T H W 3] of planes [B T 3H/2 W] with square frames, by the device stage."""
    from vatt_jax.inputs import preprocess

    b, size = len(planes), planes.shape[3]
    stream = {
        'data': planes,
        'box': np.tile(np.float32([0, 0, 1, 1]), (b, 1)),
        'flip': np.zeros(b, bool),
    }
    x = preprocess.video(stream, {'size': size}, {'color': 0.0}, None, False)
    return np.rint((np.asarray(x) + 1) * 127.5).astype(np.uint8)


def test_planes_are_what_the_decoder_makes_rgb_of():
    rng = np.random.default_rng(0)
    patches = np.kron(rng.integers(0, 256, (6, 4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    packets = media.encode_h264(patches, FPS, 4)
    rgb, planes = (
        media.decode_h264(packets, range(6)),
        media.decode_h264(packets, range(6), 'yuv420p'),
    )
    assert planes.shape == (6, 96, 64)
    got = on_device(planes[None])[0].astype(int)
    # The definition of BT.601, each colour pixel for four: away from the borders of patches, where they may be doubled otherwise.
    y, (u, v) = (
        planes[:, :64].astype(float),
        planes[:, 64:].reshape(6, 2, 32, 32).repeat(2, 2).repeat(2, 3).astype(float).swapaxes(0, 1),
    )
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    want = 255 * np.stack(
        [y + 1.402 * v, y - (0.114 * 1.772 * u + 0.299 * 1.402 * v) / 0.587, y + 1.772 * u], -1
    ).clip(0, 1)
    inner = np.kron(np.ones((4, 4), bool), np.pad(np.ones((10, 10), bool), 3))
    assert np.abs(got - want)[:, inner].max() < 2 and np.abs(got - want)[:, inner].mean() < 0.35
    assert np.abs(got - rgb)[:, inner].max() <= 3 and np.abs(got - patches)[:, inner].mean() < 5


def test_any_frame_of_a_stored_video():
    frames = clock(3.5, 48, 64)[0]
    frames[:, 10:20, 10:20, 0] += np.arange(35, dtype=np.uint8)[:, None, None]
    packets = media.encode_h264(frames, FPS, 10)
    assert len(packets) == 35
    whole = media.decode_h264(packets, np.arange(35))
    assert np.abs(whole.astype(int) - frames).mean() < 3
    for numbers in ([34], [9, 10, 11], [20, 3, 3, 34, 0], np.random.default_rng(0).permutation(35)):
        np.testing.assert_array_equal(media.decode_h264(packets, np.array(numbers)), whole[numbers])
    # Nothing before the last beginning is needed.
    np.testing.assert_array_equal(media.decode_h264(packets[20:30], np.array([5])), whole[[25]])
    np.testing.assert_array_equal(
        media.decode_h264(packets[:3] + packets[20:23], np.array([4, 1])), whole[[21, 1]]
    )
    with pytest.raises(media.MediaError, match='0 of 1 frames decode'):
        media.decode_h264(packets[8:10], np.array([0]))


def test_sentences_are_those_of_the_window(data):
    got = rows(data.train(0, 13), 2)
    table = data.texts('train', 'records')
    for i, start, numbers, mask in zip(
        got['index'], got['text/start'], got['text/data'], got['text/mask']
    ):
        if not mask.any():
            continue
        # Sentence k lies at 0.4 k … 0.4 k + 0.4; the window's middle is start + 0.4.
        distance = np.abs(np.arange(6) * 0.4 + 0.2 - (start + 0.4))
        first = np.argmin([distance[k : k + 3].sum() for k in range(4)])
        sentences = table[i]['sentences']
        want = [data.tokenizer.encode(sentences[k : k + 3], 6) for k in range(len(sentences) - 2)]
        match = [k for k, w in enumerate(want) if (w == numbers).all()]
        assert (
            len(match) == 1 and abs(match[0] - first) <= 1
        )  # contiguous, in order, nearest (to one sentence)


def test_resume_anywhere_batch_size_and_hosts(data):
    whole = rows(data.train(0, 8), 4)
    equal(rows(data.train(16, 8), 2), {k: v[16:] for k, v in whole.items()})
    equal(rows(data.train(20, 4), 3), {k: v[20:] for k, v in whole.items()})
    for hosts in (2, 4):
        parts = [rows(data.train(8, 8, process=(i, hosts)), 1) for i in range(hosts)]
        equal(
            {k: np.concatenate([p[k] for p in parts]) for k in whole},
            {k: v[8:16] for k, v in whole.items()},
        )


def test_one_pass_exactly_once(data):
    for by, split, size in (
        ('records', 'train', 13),
        ('segments', 'test', 10),
        ('records', 'test', 5),
    ):
        assert data.size(split, by) == size
        parts = [list(data.one_pass(split, 6, process=(i, 2), by=by)) for i in range(2)]
        assert len(parts[0]) == len(parts[1]) == -(-size // 6)
        seen = np.concatenate([b['index'][b['valid']] for b in itertools.chain(*parts)])
        assert sorted(seen) == list(range(size))
        pad = parts[1][-1]
        assert (
            not pad['video']['valid'][~pad['valid']].any()
            and not pad['video']['data'][~pad['valid']].any()
        )
    assert sum(b['valid'].sum() for b in data.one_pass('test', 4, limit=3)) == 3
    equal(rows(data.one_pass('test', 10), 1), rows(data.one_pass('test', 10), 1))
    with pytest.raises(DataError, match="no split 'validation'"):
        data.one_pass('validation', 4)


def test_segments_windows_labels_captions(data):
    got = rows(data.one_pass('test', 10), 1)
    table = data.texts('test', 'segments')
    early = np.array([t['caption'].startswith('dark') for t in table])
    np.testing.assert_array_equal(got['labels/class'], np.where(early, 0, 1))
    np.testing.assert_array_equal(
        got['labels/tags'], np.where(early[:, None], [1.0, 0, 0], [0.0, 1, 1])
    )
    assert got['labels/tags'].dtype == np.float32
    centre = np.array([(t['start'] + t['end']) / 2 for t in table])
    length = np.array([2.0 + 0.1 * int(t['id'][-6:-4]) for t in table])
    np.testing.assert_allclose(
        got['video/start'], np.clip(centre - 0.4, 0, length - 0.8), atol=0.1 + 1e-6
    )
    check_clocks(got)
    np.testing.assert_array_equal(
        got['text.caption/data'][:, 0], data.tokenizer.encode([t['caption'] for t in table], 6)
    )
    np.testing.assert_array_equal(got['video/box'], np.tile([0, 0, 1, 1], (10, 1)))
    assert not got['video/flip'].any() and table[0]['ground_truth'].startswith('{"i"')
    # In passes over records the label is that of the segment on show.
    records = rows(data.one_pass('test', 5, by='records', augment=True), 1)
    middle = records['video/start'] + 0.4
    np.testing.assert_array_equal(records['labels/class'][middle > 1.01], 1)
    np.testing.assert_array_equal(records['labels/class'][middle < 0.99], 0)


def test_views(config):
    config.data.views = (
        ('video.second', {'kind': 'clip'}),
        ('audio.second', {'kind': 'clip'}),
        ('text.second', {'kind': 'clip'}),
        ('audio.late', {'kind': 'shift', 'seconds': 0.5}),
        ('audio.any', {'kind': 'shift', 'seconds': 'random'}),
        ('video.back', {'kind': 'reverse'}),
        ('audio.back', {'kind': 'reverse'}),
    )
    data = data_pipelines.open(config)
    got = rows(data.train(0, 13), 2)
    check_clocks(got)
    check_clocks(got, '.second')
    np.testing.assert_array_equal(got['video.second/start'], got['text.second/start'])
    assert (got['video.second/start'] != got['video/start']).mean() > 0.5
    np.testing.assert_array_equal(got['video.back/data'], got['video/data'][:, ::-1])
    np.testing.assert_array_equal(got['audio.back/data'], got['audio/data'][:, ::-1])
    np.testing.assert_allclose(np.abs(got['audio.late/start'] - got['audio/start']), 0.5, atol=1e-5)
    heard = got['audio.late/valid']
    told = audio_time(got['audio.late/data'])[:, :18]
    np.testing.assert_allclose(
        told[heard],
        (got['audio.late/start'][:, None] + (np.arange(18) + 0.5) * 0.04)[heard],
        atol=0.08,
    )
    assert (got['video.second/box'] != got['video/box']).any()
    # Windows of a pass: the given views instead of the config's.
    names = {f'video.w{i}': {'kind': 'window', 'number': i, 'of': 3} for i in range(3)}
    got = rows(data.one_pass('test', 10, views=names), 1)
    assert 'video.second/data' not in got
    for i, t in enumerate(data.texts('test')):
        last = max(t['end'] - 0.8, t['start'])
        want = np.linspace(t['start'], last, 3)
        np.testing.assert_allclose(
            [got[f'video.w{j}/start'][i] for j in range(3)], want, atol=0.1 + 1e-6
        )
    # The same windows as main streams, pictures and sound together.
    main = rows(
        data.one_pass('test', 10, views={}, window={'kind': 'window', 'number': 2, 'of': 3}), 1
    )
    np.testing.assert_array_equal(main['video/data'], got['video.w2/data'])
    np.testing.assert_array_equal(main['audio/start'], got['video.w2/start'])
    check_clocks(main)
    for wrong, say in (
        ({'kind': 'window', 'number': 3, 'of': 3}, 'number runs from 0'),
        ({'kind': 'clip'}, "expected a view of kind 'window'"),
        ({'kind': 'window', 'number': 0, 'of': 1, 'crop': 2}, 'crop is 2; give a number from 0'),
    ):
        with pytest.raises(DataError, match=say):
            data.one_pass('test', 10, window=wrong)
    data.close()


def test_fewer_frames_per_second_than_stored(config):
    config.model.inputs.video.update(fps=4.0, frames=3)
    data = data_pipelines.open(config)
    got = rows(data.one_pass('test', 5, by='records'), 1)
    wanted = got['video/start'][:, None] + np.arange(3) / 4
    assert (
        np.abs(video_time(got['video/data']) - wanted).max() < 0.05 + 0.04
    )  # half a stored frame, and the codec


def test_short_records_repeat(config):
    config.model.inputs.video.update(frames=40)
    config.model.inputs.audio.update(samples=4 * RATE)
    data = data_pipelines.open(config)
    got = rows(data.train(0, 13), 1)
    table = data.texts('train', 'records')
    for i, valid, frames, pcm in zip(
        got['index'], got['video/valid'] & got['audio/valid'], got['video/data'], got['audio/data']
    ):
        if valid:
            length = table[i]['end']
            np.testing.assert_allclose(
                video_time(frames), np.arange(40) / FPS % round(length, 6), atol=0.06
            )
            n = round(length * RATE)
            np.testing.assert_array_equal(pcm[n : 2 * n][: 4 * RATE - n], pcm[: 4 * RATE - n][:n])


@pytest.fixture(params=['flipped bits', 'other record'])
def damaged(prepared, tmp_path, request):
    """A copy in whose record 4 of the training split each frame and each second of sound has one flipped bit, or is not the one that was noted."""
    from data_pipelines.storage import byte_offsets
    from data_pipelines.storage.records import Prepared, Split

    out = tmp_path / 'damaged'
    shutil.copytree(prepared[0], out)
    index = Split(Prepared(out), 'train').index
    first, last = byte_offsets.firsts(index.frames, index.samples, RATE)[4:6]
    pieces = np.load(out / 'pieces-train.npy')
    if request.param == 'other record':
        pieces[first:last, 2] ^= 1
        np.save(out / 'pieces-train.npy', pieces)
        return out
    shard = next(out.glob('*-train.array_record*'))
    content = bytearray(shard.read_bytes())
    begin = int(np.load(out / 'places-train.npz')['offset'][4])
    for offset, size, _ in pieces[first:last].tolist():
        content[byte_offsets._physical(begin + offset + size // 2)] ^= 0x10
    shard.write_bytes(content)
    return out


def test_unreadable_record_keeps_its_row(config, damaged):
    clean = rows(data_pipelines.open(config).train(0, 13), 2)
    config.data.train = {'clocks': {'path': str(damaged)}}
    config.data.max_corrupt = 0.5
    data = data_pipelines.open(config)
    got = rows(data.train(0, 13), 2)
    bad = got['index'] == 4
    assert bad.sum() == 2 and clean['valid'].all()
    np.testing.assert_array_equal(got['valid'], ~bad)
    equal({k: v[~bad] for k, v in got.items()}, {k: v[~bad] for k, v in clean.items()})
    for k, v in got.items():
        if k.endswith(('/valid', '/data', '/mask', '/box')):
            assert not v[bad].any(), k
    np.testing.assert_array_equal(got['position'], clean['position'])
    np.testing.assert_array_equal(got['labels/class'][bad], -1)
    problems = data.problems()
    assert problems['corrupt'] >= 2 and problems['read'] >= 26
    assert [(s, i) for s, i, _ in problems['indices']] == [('clocks/train', 4)]
    data.close()


def test_too_many_unreadable_records_stop_the_run(config, damaged):
    config.data.train = {'clocks': {'path': str(damaged)}}
    data = data_pipelines.open(config)
    with pytest.raises(DataError, match='max_corrupt=0.01'):
        for _ in range(20):
            next(it := data.train(0, 13))
    with pytest.raises(StopIteration):
        next(it)
    data.close()


def test_mixture_of_sources(config, prepared):
    path = str(prepared[0])
    config.data.train = {
        'a': {'path': path, 'share': 0.25},
        'b': {'path': path, 'split': 'test'},
        'c': {'path': path, 'weight': 3.0},
    }
    data = data_pipelines.open(config)
    assert data.size('train') == 31 and data.info['sources'] == ['a', 'b', 'c']
    got = rows(data.train(0, 16), 6)
    counts = np.stack([np.bincount(s, minlength=3) for s in got['source'].reshape(6, 16)])
    assert (counts[:, 0] == 4).all()
    total = np.bincount(got['source'], minlength=3)
    assert 0.5 < total[2] / total[1] / 3 < 2
    for s, n in ((0, 13), (1, 5), (2, 13)):
        assert sorted(got['index'][got['source'] == s][:n]) == list(range(n))
    check_clocks(got)
    got = rows(data.one_pass('train', 31, by='records'), 1)
    assert sorted(zip(got['source'], got['index'])) == [
        (s, i) for s, n in ((0, 13), (1, 5), (2, 13)) for i in range(n)
    ]
    np.testing.assert_array_equal(
        data.offsets('train')[got['source']] + got['index'], got['position']
    )
    data.close()


def test_without_captioned_segments_there_is_no_caption_stream(config, prepared):
    """So that retrieval asks with the sentences that were spoken: the training split here has these alone."""
    data = data_pipelines.open(config)
    got, captioned = (next(iter(data.one_pass(split, 4))) for split in ('train', 'test'))
    assert (
        'text.caption' not in got
        and got['text']['valid'].any()
        and captioned['text.caption']['valid'].all()
    )
    data.close()


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
    """Exactly so many segments of each class are known, in records drawn in proportion; fewer are a part of more; passes know all."""

    def known(n, **fields):
        config.data.train = {
            'clocks': {
                'path': str(prepared[0]),
                'split': 'test',
                'label': 'class',
                'per_class': n,
                **fields,
            }
        }
        data = data_pipelines.open(config)
        got = rows(data.train(0, 32), 5)
        everything = rows(data.one_pass('test', 10), 1)['labels/class']
        data.close()
        assert sorted(everything) == [0] * 5 + [1] * 5
        unknown = got['labels/class'] < 0
        assert not got['labels/tags'][unknown].any() and got['labels/tags'][~unknown].any(-1).all()
        return {(int(i), int(c)) for i, c in zip(got['index'], got['labels/class']) if c >= 0}, set(
            got['index'].tolist()
        )

    two, records = known(2)
    assert sorted(c for _, c in two) == [0, 0, 1, 1] and records == {i for i, _ in two}
    four, _ = known(4)
    assert two < four and len(four) == 8
    with pytest.raises(
        DataError,
        match="per_class=6: class 'early' of label 'class' has 5 segments in split 'test'",
    ):
        known(6)
    with pytest.raises(
        DataError, match="has no label 'tags' with one class for each segment; it has class"
    ):
        known(2, label='tags')


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


def test_squares_along_the_longer_side():
    height, width = np.array([60, 90, 50]), np.array([120, 60, 50])
    for place, want in (
        (0.0, [[0, 0, 1, 0.5], [0, 0, 2 / 3, 1], [0, 0, 1, 1]]),
        (0.5, [[0, 0.25, 1, 0.75], [1 / 6, 0, 5 / 6, 1], [0, 0, 1, 1]]),
        (1.0, [[0, 0.5, 1, 1], [1 / 3, 0, 1, 1], [0, 0, 1, 1]]),
    ):
        np.testing.assert_allclose(
            frame_windows.square_boxes(height, width, place), want, atol=1e-6
        )


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
    got = rows(data.one_pass('train', 3, by='records'), 1)
    assert got['video/data'].shape == (3, 8, SIZE, SIZE, 3)
    ids = [t['id'] for t in data.texts('train', 'records')]
    middle = ramp[32:96].astype(float)
    for name, axis in (('wide.mp4', 0), ('high.mp4', 1)):
        seen = got['video/data'][ids.index(name), 0].astype(float).mean(-1).mean(axis)
        np.testing.assert_allclose(seen, middle, atol=6)
    # Three squares of each frame, as multi-view testing takes them; two of them in one pass.
    for place, part in ((0.0, ramp[:64]), (1.0, ramp[64:])):
        window = {'kind': 'window', 'number': 0, 'of': 1, 'crop': place}
        got = rows(
            data.one_pass(
                'train',
                3,
                by='records',
                window=window,
                views={'video.middle': {**window, 'crop': 0.5}},
            ),
            1,
        )
        for name, axis in (('wide.mp4', 0), ('high.mp4', 1)):
            for stream, wanted in (('video', part), ('video.middle', ramp[32:96])):
                seen = got[f'{stream}/data'][ids.index(name), 0].astype(float).mean(-1).mean(axis)
                np.testing.assert_allclose(seen, wanted.astype(float), atol=6)
    got = rows(data.train(0, 3), 5)
    wide = got['video/data'][got['index'] == ids.index('wide.mp4')].astype(float).mean((1, 2, 3, 4))
    assert len(wide) == 5 and wide.std() > 5  # training moves the square along the long side
    data.close()


@pytest.mark.parametrize(
    'change, say',
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
            "config.data.train.a: expected a group of fields, such as {'path': FOLDER}, got 'data/mine'",
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
def test_what_does_not_fit_is_named(config, change, say):
    for path, value in change.items():
        node, _, field = path.rpartition('.')
        where = config
        for part in node.split('.'):
            where = where[part]
        where[field] = value
    with pytest.raises(DataError, match=say):
        data_pipelines.open(config)


def test_a_trained_models_tokenizer_is_kept(config):
    from vatt_jax.inputs import tokenizer

    spec = tokenizer.train('words', ['video yes'], 10).to_spec()
    with config.unlocked(), config.ignore_type():
        config.model.inputs.text.tokenizer = spec
    data = data_pipelines.open(config)
    assert data.info['tokenizer'] == spec
    assert rows(data.train(0, 13), 1)['text/data'].max() == 3
    data.close()
