"""Existing DMVR records, written here as DMVR's own example script lays them out, read through an index beside the same clips in our records."""

import pathlib

import numpy as np
import pytest
import tensorflow as tf
from clocks import FPS, RATE, audio_time, video_time
from test_data_synthetic import equal, rows

import data_pipelines
from data_pipelines import dmvr
from data_pipelines.errors import DataError
from data_pipelines.storage.records import Prepared, Split

KINDS = ('early', 'late', 'never')


def sequence_example(
    frames,
    audio,
    name='v.mp4',
    caption=('a word',),
    labels=(),
    audio_name='WAVEFORM/feature/floats',
):
    e = tf.train.SequenceExample()
    for f in frames:
        e.feature_lists.feature_list['image/encoded'].feature.add().bytes_list.value[:] = [f]
    if audio is not None:
        e.feature_lists.feature_list[audio_name].feature.add().float_list.value[:] = audio
    context = e.context.feature
    context['video/filename'].bytes_list.value[:] = [name.encode()]
    context['clip/start/timestamp'].int64_list.value[:] = [0]
    context['clip/end/timestamp'].int64_list.value[:] = [2_500_000]
    if caption:
        context['caption/string'].bytes_list.value[:] = [c.encode() for c in caption]
    if labels:
        context['clip/label/index'].int64_list.value[:] = labels
        context['clip/label/text'].bytes_list.value[:] = [KINDS[i].encode() for i in labels]
    return e.SerializeToString()


def write(path, records):
    with tf.io.TFRecordWriter(str(path)) as f:
        for r in records:
            f.write(r)


@pytest.fixture(scope='module')
def twins(prepared, tmp_path_factory):
    """(folder of the clocks in our records, folder of an index of the same clips as DMVR records), in one order, two shards of training."""
    from tensorflow_datasets.proto import tf_example_pb2

    root = tmp_path_factory.mktemp('dmvr')
    for split in ('train', 'test'):
        part, out = Split(Prepared(prepared[0]), split), []
        for i, raw in enumerate(part.read(np.arange(len(part)))[0]):
            f = tf_example_pb2.Example.FromString(raw).features.feature
            pcm = np.frombuffer(f['audio'].bytes_list.value[0], '<i2')
            first, last = part.index.sentence_offset[i : i + 2]
            out.append(
                sequence_example(
                    f['frames'].bytes_list.value,
                    pcm / np.float32(32767.0) if len(pcm) else None,
                    part.index.id[i],
                    part.index.sentence_text[first:last],
                    [i % 2],
                )
            )
        half = len(out) // 2
        write(root / f'{split}-00000-of-00002', out[:half])
        write(root / f'{split}-00001-of-00002', out[half:])
    summary = dmvr.index(
        str(root / 'index'),
        str(root / 'train-*'),
        '',
        str(root / 'test-*'),
        fps=FPS,
        rate=RATE,
        quiet=True,
    )
    assert (
        summary['splits']['train']['records'] == 13
        and summary['splits']['train']['without_audio'] == 1
        and not summary['skipped']
    )
    return prepared[0], root / 'index'


@pytest.fixture
def open_(config):
    opened = []

    def make(**train):
        config.data.train = train
        config.data.eval = {'path': next(iter(train.values()))['path']}
        opened.append(data_pipelines.open(config))
        return opened[-1]

    yield make
    for data in opened:
        data.close()


def test_the_same_batches_as_from_our_records(twins, open_):
    ours, theirs = (open_(clocks={'path': str(path)}) for path in twins)
    for which in (
        lambda d: d.train(0, 8),
        lambda d: d.one_pass('test', 5, by='records'),
        lambda d: d.one_pass('train', 8, by='records', augment=True),
    ):
        a, b = (rows(which(d), 1) for d in (ours, theirs))
        for key in a:
            if not key.startswith(('labels', 'text')):
                np.testing.assert_array_equal(a[key], b[key], key)
    assert theirs.info['labels'] == {'class': ['early', 'late']}
    got = rows(theirs.one_pass('test', 5, by='records'), 1)
    np.testing.assert_array_equal(got['labels/class'], np.arange(5) % 2)
    # Captions have no times: a clip gets the first candidates of its record.
    want = [t['sentences'][:3] for t in ours.texts('test', 'records')]
    np.testing.assert_array_equal(
        got['text/data'], np.stack([theirs.tokenizer.encode(w, 6) for w in want])
    )


def test_resume_and_mixture_with_our_records(twins, open_):
    data = open_(ours={'path': str(twins[0]), 'share': 0.5}, theirs={'path': str(twins[1])})
    whole = rows(data.train(0, 8), 3)
    assert (whole['source'].reshape(3, 8) == 0).sum(1).tolist() == [4, 4, 4]
    equal(rows(data.train(8, 8), 2), {k: v[8:] for k, v in whole.items()})
    parts = [rows(data.train(8, 8, process=(i, 2)), 1) for i in range(2)]
    equal(
        {k: np.concatenate([p[k] for p in parts]) for k in whole},
        {k: v[8:16] for k, v in whole.items()},
    )
    # Equal records give equal clips, whichever form they are stored in.
    seen = whole['video/valid'] & whole['audio/valid']
    shown, heard = video_time(whole['video/data']), audio_time(whole['audio/data'])[:, :18]
    inside = whole['video/start'] < 1.2
    np.testing.assert_allclose(
        shown[seen & inside],
        (whole['video/start'][:, None] + np.arange(8) / FPS)[seen & inside],
        atol=0.06,
    )
    np.testing.assert_allclose(
        heard[seen & inside],
        (whole['audio/start'][:, None] + (np.arange(18) + 0.5) * 0.04)[seen & inside],
        atol=0.08,
    )


def test_damage(twins, tmp_path, prepared):
    good = [sequence_example([], np.sin(np.arange(RATE) / 9), f'v{i}') for i in range(4)]
    write(tmp_path / 'train-0', good)
    data = bytearray((tmp_path / 'train-0').read_bytes())
    size = len(data) // 4
    data[2 * size + 500] ^= 1  # in the third record
    (tmp_path / 'train-0').write_bytes(data)
    write(tmp_path / 'train-1', good)
    whole = (tmp_path / 'train-1').read_bytes()
    (tmp_path / 'train-1').write_bytes(whole[: len(whole) - 100])
    result = dmvr.index(
        str(tmp_path / 'out'), str(tmp_path / 'train-*'), fps=FPS, rate=RATE, quiet=True
    )
    assert result['splits']['train']['records'] == 5
    assert [k.rpartition('/')[2] for k in result['skipped']] == [
        f'train-0, from byte {2 * size}',
        f'train-1, from byte {3 * size}',
    ]
    # Bits that flip later are noticed when the record is read; the others go on.
    part = Split(Prepared(tmp_path / 'out'), 'train')
    assert not any(part.read(np.arange(5))[1])
    data[100] ^= 1
    (tmp_path / 'train-0').write_bytes(data)
    assert [bool(r) for r in part.read(np.arange(5))[1]] == [True, False, False, False, False]
    (tmp_path / 'train-1').write_bytes(whole)
    with pytest.raises(DataError, match='train-1 is not the file of .* bytes that'):
        Split(Prepared(tmp_path / 'out'), 'train')


def test_several_labels_and_the_other_names(tmp_path):
    write(
        tmp_path / 'a',
        [
            sequence_example([], np.zeros(RATE), 'x', (), (2, 0), 'waveform/floats'),
            sequence_example([], np.zeros(RATE), 'y', (), (), 'waveform/floats'),
        ],
    )
    dmvr.index(str(tmp_path / 'out'), str(tmp_path / 'a'), rate=RATE, quiet=True)
    p = Prepared(tmp_path / 'out')
    assert p.meta['labels'] == {'class': ['early', 'class 1', 'never']} and p.meta['multi_hot'] == [
        'class'
    ]
    np.testing.assert_array_equal(Split(p, 'train').index.labels['class'], [[1, 0, 1], [0, 0, 0]])
    assert list(Split(p, 'train').index.id) == ['x@0-2.5', 'y@0-2.5'] and p.format == {
        'kind': 'dmvr',
        'audio': 'waveform/floats',
    }


def jpeg():
    from data_pipelines import media

    return media.encode_jpeg(np.zeros((32, 32, 3), np.uint8), 90)


@pytest.mark.parametrize(
    'records, say',
    [
        (lambda: [b'\xff\xff\xff'], 'this is not a SequenceExample'),
        (
            lambda: [sequence_example([], None)],
            'has neither image/encoded nor WAVEFORM/feature/floats',
        ),
        (lambda: [sequence_example([], np.full(RATE, 1e30))], 'were integers written as floats?'),
        (lambda: [sequence_example([b'no picture'], None)], 'its first frame is no image'),
        (
            lambda: [sequence_example([jpeg()] * 5, np.zeros(RATE))],
            'cannot both be right: a record has 5 frames .0.50 s. and 8000 samples .1.00 s.',
        ),
        (
            lambda: [
                sequence_example([], np.zeros(9)),
                sequence_example([], np.zeros(9), audio_name='waveform/floats'),
            ],
            'index them apart',
        ),
    ],
)
def test_one_clear_sentence(tmp_path, records, say):
    write(tmp_path / 'a', records())
    with pytest.raises(DataError, match=say):
        dmvr.index(str(tmp_path / 'out'), str(tmp_path / 'a'), fps=FPS, rate=RATE, quiet=True)


def test_command(tmp_path, capsys):
    write(tmp_path / 'a', [sequence_example([], np.zeros(RATE))])
    call = lambda *a: dmvr.main([f'--out={tmp_path / "out"}', f'--rate={RATE}', '--quiet', *a])
    for arguments, say in (
        ([], "give --train='FOLDER/train-*'"),
        ([f'--train={tmp_path}/b*'], 'no file matches --train='),
        ([f'--train={tmp_path}/a'], ''),
        ([f'--train={tmp_path}/a'], 'is not empty; choose another, or pass --overwrite'),
        ([f'--train={tmp_path}/a', '--overwrite'], ''),
    ):
        assert call(*arguments) == (2 if say else 0)
        error = capsys.readouterr().err
        assert say in error and error.count('\n') == bool(say)
    import gzip

    pathlib.Path(tmp_path, 'z').write_bytes(gzip.compress(b'x'))
    assert (
        dmvr.main([f'--out={tmp_path / "zip"}', f'--train={tmp_path}/z']) == 2
        and 'is compressed (gzip)' in capsys.readouterr().err
    )
