"""Existing DMVR records, read through an index beside the same clips in our records.

They are written here as DMVR's own example script lays them out.
"""

import gzip
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from batches import assert_contract, assert_equal, concatenate, stack, take
from clocks import FPS, RATE, audio_time, piece_middles, video_time

import data_pipelines
from data_pipelines import dmvr, media
from data_pipelines.errors import DataError
from data_pipelines.storage.records import Prepared, Split

CLASSES = ('early', 'late', 'never')


def sequence_example(
    frames,
    audio,
    name='v.mp4',
    captions=('a word',),
    labels=(),
    audio_name='WAVEFORM/feature/floats',
):
    """A serialized SequenceExample of JPEG frames and float audio (or None)."""
    example = tf.train.SequenceExample()
    features = example.feature_lists.feature_list
    for frame in frames:
        features['image/encoded'].feature.add().bytes_list.value[:] = [frame]
    if audio is not None:
        features[audio_name].feature.add().float_list.value[:] = audio
    context = example.context.feature
    context['video/filename'].bytes_list.value[:] = [name.encode()]
    context['clip/start/timestamp'].int64_list.value[:] = [0]
    context['clip/end/timestamp'].int64_list.value[:] = [2_500_000]
    if captions:
        encoded = [caption.encode() for caption in captions]
        context['caption/string'].bytes_list.value[:] = encoded
    if labels:
        names = [CLASSES[label].encode() for label in labels]
        context['clip/label/index'].int64_list.value[:] = labels
        context['clip/label/text'].bytes_list.value[:] = names
    return example.SerializeToString()


def write_tfrecord(path, records):
    """A TFRecord file of these records."""
    with tf.io.TFRecordWriter(str(path)) as file:
        for record in records:
            file.write(record)


def as_sequence_examples(split):
    """The records of a prepared split in DMVR's form, in the same order."""
    from tensorflow_datasets.proto import tf_example_pb2

    raw_records, _ = split.read(np.arange(len(split)))
    examples = []
    for i, raw in enumerate(raw_records):
        feature = tf_example_pb2.Example.FromString(raw).features.feature
        pcm = np.frombuffer(feature['audio'].bytes_list.value[0], '<i2')
        first, last = split.index.sentence_offset[i : i + 2]
        example = sequence_example(
            feature['frames'].bytes_list.value,
            pcm / np.float32(32767.0) if len(pcm) else None,
            split.index.id[i],
            split.index.sentence_text[first:last],
            [i % 2],
        )
        examples.append(example)
    return examples


@pytest.fixture(scope='module')
def both_forms(prepared, tmp_path_factory):
    """(folder of the clocks in our records, folder of an index of the same clips in DMVR records).

    Both are in one order; the DMVR records of each split lie in two shards.
    """
    folder, _ = prepared
    root = tmp_path_factory.mktemp('dmvr')
    for name in ('train', 'test'):
        examples = as_sequence_examples(Split(Prepared(folder), name))
        half = len(examples) // 2
        write_tfrecord(root / f'{name}-00000-of-00002', examples[:half])
        write_tfrecord(root / f'{name}-00001-of-00002', examples[half:])
    summary = dmvr.index(
        str(root / 'index'),
        str(root / 'train-*'),
        '',
        str(root / 'test-*'),
        fps=FPS,
        rate=RATE,
        quiet=True,
    )
    assert summary['splits']['train']['records'] == 13
    assert summary['splits']['train']['without_audio'] == 1
    assert not summary['skipped']
    return folder, root / 'index'


@pytest.fixture
def open_sources(config):
    """Opens data that trains on the given sources and evaluates on the first of them."""
    opened = []

    def open_(**sources):
        first, *_ = sources.values()
        config.data.train = sources
        config.data.eval = {'path': first['path']}
        opened.append(data_pipelines.open(config))
        return opened[-1]

    yield open_
    for data in opened:
        data.close()


@pytest.mark.parametrize(
    'method, arguments, fields',
    [
        ('train', (0, 8), {}),
        ('one_pass', ('test', 5), {'by': 'records'}),
        ('one_pass', ('train', 8), {'by': 'records', 'augment': True}),
    ],
)
def test_the_same_batches_as_from_our_records(both_forms, open_sources, method, arguments, fields):
    batches = []
    for folder in both_forms:
        data = open_sources(clocks={'path': str(folder)})
        batch = next(getattr(data, method)(*arguments, **fields))
        # Labels and times of sentences are others.
        batch.pop('labels')
        batch = {name: value for name, value in batch.items() if not name.startswith('text')}
        batches.append(batch)
    ours, theirs = batches
    assert_equal(theirs, ours)


def test_labels_and_captions_of_dmvr_records(both_forms, open_sources, config):
    ours, theirs = [open_sources(clocks={'path': str(folder)}) for folder in both_forms]
    assert theirs.info['labels'] == {'class': ['early', 'late']}
    batch = next(theirs.one_pass('test', 5, by='records'))
    assert_contract(batch, config, 5, label_classes={'class': None})
    np.testing.assert_array_equal(batch['labels']['class'], np.arange(5) % 2)
    # Captions have no times: a clip gets the first candidates of its record.
    expected = []
    for text in ours.texts('test', 'records'):
        expected.append(theirs.tokenizer.encode(text['sentences'][:3], 6))
    np.testing.assert_array_equal(batch['text']['data'], np.stack(expected))


def test_resume_and_mixture_with_our_records(both_forms, open_sources):
    ours, theirs = both_forms
    data = open_sources(ours={'path': str(ours), 'share': 0.5}, theirs={'path': str(theirs)})
    whole = stack(data.train(0, 8), 3)
    is_ours = whole['source'].reshape(3, 8) == 0
    assert is_ours.sum(1).tolist() == [4, 4, 4]
    assert_equal(stack(data.train(8, 8), 2), take(whole, slice(8, None)))
    of_hosts = [next(data.train(8, 8, process=(i, 2))) for i in range(2)]
    assert_equal(concatenate(of_hosts), take(whole, slice(8, 16)))

    # Equal records give equal clips, whichever form they are stored in.
    video, audio = whole['video'], whole['audio']
    is_inside = video['valid'] & audio['valid'] & (video['start'] < 1.2)
    expected = video['start'][:, None] + np.arange(8) / FPS
    shown = video_time(video['data'])
    np.testing.assert_allclose(shown[is_inside], expected[is_inside], atol=0.06)
    expected = audio['start'][:, None] + piece_middles(18)
    heard = audio_time(audio['data'])[:, :18]
    np.testing.assert_allclose(heard[is_inside], expected[is_inside], atol=0.08)


def test_damaged_records_are_skipped_or_noticed_when_read(tmp_path):
    good = [sequence_example([], np.sin(np.arange(RATE) / 9), f'v{i}') for i in range(4)]
    first_shard, second_shard = tmp_path / 'train-0', tmp_path / 'train-1'
    write_tfrecord(first_shard, good)
    content = bytearray(first_shard.read_bytes())
    size = len(content) // 4
    content[2 * size + 500] ^= 1  # in the third record
    first_shard.write_bytes(content)
    write_tfrecord(second_shard, good)
    whole = second_shard.read_bytes()
    second_shard.write_bytes(whole[: len(whole) - 100])
    result = dmvr.index(
        str(tmp_path / 'out'), str(tmp_path / 'train-*'), fps=FPS, rate=RATE, quiet=True
    )
    assert result['splits']['train']['records'] == 5
    assert [name.rpartition('/')[2] for name in result['skipped']] == [
        f'train-0, from byte {2 * size}',
        f'train-1, from byte {3 * size}',
    ]

    # Bits that flip later are noticed when the record is read; the others go on.
    split = Split(Prepared(tmp_path / 'out'), 'train')
    _, reasons = split.read(np.arange(5))
    assert not any(reasons)
    content[100] ^= 1
    first_shard.write_bytes(content)
    _, reasons = split.read(np.arange(5))
    assert [bool(reason) for reason in reasons] == [True, False, False, False, False]
    second_shard.write_bytes(whole)
    with pytest.raises(DataError, match='train-1 is not the file of .* bytes that'):
        Split(Prepared(tmp_path / 'out'), 'train')


def test_several_labels_and_the_other_name_of_the_audio(tmp_path):
    audio_name = 'waveform/floats'
    silence = np.zeros(RATE)
    records = [
        sequence_example([], silence, 'x', (), labels=(2, 0), audio_name=audio_name),
        sequence_example([], silence, 'y', (), labels=(), audio_name=audio_name),
    ]
    write_tfrecord(tmp_path / 'a', records)
    dmvr.index(str(tmp_path / 'out'), str(tmp_path / 'a'), rate=RATE, quiet=True)
    prepared = Prepared(tmp_path / 'out')
    assert prepared.meta['labels'] == {'class': ['early', 'class 1', 'never']}
    assert prepared.meta['multi_hot'] == ['class']
    assert prepared.format == {'kind': 'dmvr', 'audio': audio_name}
    index = Split(prepared, 'train').index
    np.testing.assert_array_equal(index.labels['class'], [[1, 0, 1], [0, 0, 0]])
    assert list(index.id) == ['x@0-2.5', 'y@0-2.5']


def black_jpeg():
    """An encoded picture."""
    return media.encode_jpeg(np.zeros((32, 32, 3), np.uint8), 90)


@pytest.mark.parametrize(
    'examples, message',
    [
        ([b'\xff\xff\xff'], 'this is not a SequenceExample'),
        ([([], None)], 'has neither image/encoded nor WAVEFORM/feature/floats'),
        ([([], np.full(RATE, 1e30))], 'were integers written as floats?'),
        ([([b'no picture'], None)], 'its first frame is no image'),
        (
            [(['a picture'] * 5, np.zeros(RATE))],
            'cannot both be right: a record has 5 frames .0.50 s. and 8000 samples .1.00 s.',
        ),
        (
            [([], np.zeros(9)), ([], np.zeros(9), 'waveform/floats')],
            'index them apart',
        ),
    ],
)
def test_wrong_records_are_one_clear_sentence(tmp_path, examples, message):
    """`examples` are raw bytes, or (frames, audio, name of the audio) of a SequenceExample."""
    records = []
    for example in examples:
        if isinstance(example, bytes):
            records.append(example)
            continue
        frames, audio, *audio_name = example
        frames = [black_jpeg() if frame == 'a picture' else frame for frame in frames]
        names = {'audio_name': audio_name[0]} if audio_name else {}
        records.append(sequence_example(frames, audio, **names))
    write_tfrecord(tmp_path / 'a', records)
    with pytest.raises(DataError, match=message):
        dmvr.index(str(tmp_path / 'out'), str(tmp_path / 'a'), fps=FPS, rate=RATE, quiet=True)


def test_two_pictures_in_one_entry_are_refused(tmp_path):
    """The pieces would be numbered otherwise than the frames."""
    example = tf.train.SequenceExample()
    feature = example.feature_lists.feature_list['image/encoded'].feature.add()
    feature.bytes_list.value[:] = [black_jpeg()] * 2
    write_tfrecord(tmp_path / 'a', [example.SerializeToString()])
    with pytest.raises(DataError, match='expected 1 frames of one picture each .* got 2 and 0'):
        dmvr.index(str(tmp_path / 'out'), str(tmp_path / 'a'), fps=FPS, rate=RATE, quiet=True)
    # What was begun is gone, and the same command may be given again.
    assert list((tmp_path / 'out' / '.staging').iterdir()) == []


def test_most_records_decide_whether_the_rates_are_right(tmp_path):
    """One of three lacks most of its sound; two of three would be wrong rates."""
    whole = sequence_example([black_jpeg()] * FPS, np.zeros(RATE), name='whole')
    short = sequence_example([black_jpeg()] * FPS, np.zeros(RATE // 2), name='short')
    write_tfrecord(tmp_path / 'a', [whole, short, whole])
    dmvr.index(str(tmp_path / 'good'), str(tmp_path / 'a'), fps=FPS, rate=RATE, quiet=True)
    write_tfrecord(tmp_path / 'b', [whole, short, short])
    with pytest.raises(DataError, match=f'a record has {FPS} frames .* and {RATE} samples'):
        dmvr.index(str(tmp_path / 'bad'), str(tmp_path / 'b'), fps=FPS, rate=RATE, quiet=True)


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    write_tfrecord(tmp_path / 'a', [sequence_example([], np.zeros(RATE))])
    # Arguments -> error message, in this order: the third writes what the fourth finds.
    calls = [
        ([], "give --train='FOLDER/train-*'"),
        ([f'--train={tmp_path}/b*'], 'no file matches --train='),
        ([f'--train={tmp_path}/a'], ''),
        ([f'--train={tmp_path}/a'], 'is not empty; choose another, or pass --overwrite'),
        ([f'--train={tmp_path}/a', '--overwrite'], ''),
    ]
    for arguments, message in calls:
        code = dmvr.main([f'--out={tmp_path / "out"}', f'--rate={RATE}', '--quiet', *arguments])
        assert code == (2 if message else 0)
        error = capsys.readouterr().err
        assert message in error
        assert error.count('\n') == bool(message)


def test_compressed_records_are_refused(tmp_path, capsys):
    pathlib.Path(tmp_path, 'z').write_bytes(gzip.compress(b'x'))
    assert dmvr.main([f'--out={tmp_path / "zip"}', f'--train={tmp_path}/z']) == 2
    assert 'is compressed (gzip)' in capsys.readouterr().err
