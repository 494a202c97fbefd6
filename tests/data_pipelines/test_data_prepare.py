"""Folders of media files and captions become a dataset, whatever stops it half-way."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, audio_time, clock, piece_middles, video_time, write_wav
from PIL import Image

from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import (
    annotation_files,
    decoded_files,
    file_names,
    splits,
    staging,
)
from data_pipelines.storage.records import Prepared, Split

SMALL = {
    'fps': FPS,
    'size': SIZE,
    'rate': RATE,
    'quiet': True,
    'processes': 1,
    'min_seconds': 0.5,
}


def write_clocks(folder, count, seconds=1.0):
    """The folder as a string, filled with so many clocks."""
    folder.mkdir(exist_ok=True)
    frames, audio = clock(seconds)
    for i in range(count):
        media.write_mp4(folder / f'v{i}.mp4', frames, FPS, audio, RATE)
    return str(folder)


def write_silences(folder, *names):
    """The folder as a string, filled with a second of silence under each name."""
    folder.mkdir()
    for name in names:
        write_wav(folder / f'{name}.wav', np.zeros(8000, np.int16))
    return str(folder)


def staged_files(out):
    """Files decoded so far by a run that has not finished; half-written ones have a suffix."""
    paths = (out / '.staging' / 'files').glob('*/*')
    return [path for path in paths if '.' not in path.name]


def num_records(result):
    """Records of all splits."""
    return sum(split['records'] for split in result['splits'].values())


def example_features(raw):
    """The features of a serialized Example by name."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(raw).features.feature


def test_the_result_counts_records_and_skipped_files(prepared):
    out, result = prepared
    assert result['fresh']
    train, test = result['splits']['train'], result['splits']['test']
    assert train['records'] == 13
    assert test['records'] == 5
    assert train['without_audio'] == 1
    assert train['without_video'] == 1
    reasons = {name: reason.split(':')[0] for name, reason in result['skipped'].items()}
    assert reasons == {
        'train/cut.mp4': 'corrupt',
        'train/noise.mp4': 'corrupt',
        'train/short.mp4': 'too short',
    }
    assert json.loads((out / 'skipped.json').read_text()) == result['skipped']
    assert not (out / '.staging').exists()


def test_the_vocabulary_is_that_of_the_training_captions_alone(prepared):
    out, _ = prepared
    vocabulary = json.loads((out / 'tokenizer.json').read_text())['vocabulary']
    assert 'train3' in vocabulary
    assert 'test3' not in vocabulary


def test_it_is_a_tfds_dataset(prepared):
    import tensorflow_datasets as tfds

    out, _ = prepared
    builder = tfds.builder_from_directory(str(out))
    assert builder.info.name == 'clocks'
    assert builder.info.splits['train'].num_examples == 13
    examples = {example['id'].decode(): example for example in builder.as_data_source('test')}
    example = examples['test/test04.mp4']
    assert len(example['frames']) == 24
    assert (example['height'], example['width']) == (SIZE, SIZE)
    assert example['caption_text'][1] == b'word1 of video test4, yes'
    assert json.loads(example['ground_truth']) == {'i': 4}
    labels = example['segment_labels']
    assert [int(label) for label in labels['class']] == [0, 1]
    np.testing.assert_array_equal(np.stack(labels['tags']), [[1, 0, 0], [0, 1, 1]])
    # The second segment is cut to the record.
    np.testing.assert_allclose(example['segment_end'], [1.0, 2.4], atol=1e-6)
    pcm = np.frombuffer(example['audio'], '<i2')
    assert len(pcm) == round(2.4 * RATE)
    np.testing.assert_allclose(audio_time(pcm)[3:-3], piece_middles(60)[3:-3], atol=0.06)


def test_the_index_says_what_the_records_hold(prepared):
    out, _ = prepared
    split = Split(Prepared(out), 'train')
    index = split.index
    raw_records, reasons = split.read(np.arange(13))
    assert not any(reasons)
    for i, raw in enumerate(raw_records):
        feature = example_features(raw)
        assert feature['id'].bytes_list.value[0].decode() == index.id[i]
        assert len(feature['frames'].bytes_list.value) == index.frames[i]
        assert len(feature['audio'].bytes_list.value[0]) == 2 * index.samples[i]
        first, last = index.sentence_offset[i : i + 2]
        sentences = [text.decode() for text in feature['caption_text'].bytes_list.value]
        assert sentences == index.sentence_text[first:last]
    sound = list(index.id).index('train/sound.wav')
    assert index.frames[sound] == 0
    assert index.duration[sound] == 2.5
    # Without annotations a record is one segment.
    np.testing.assert_array_equal(index.segment_record, np.arange(13))
    np.testing.assert_array_equal(index.segment_end, index.duration.astype(np.float32))


def test_second_run_decodes_nothing_and_other_settings_are_refused(
    prepared, media_folder, monkeypatch
):
    out, _ = prepared
    paths = (str(media_folder / 'videos'), str(media_folder / 'captions.csv'), str(out))
    same = {
        'annotations': str(media_folder / 'annotations.json'),
        'fps': FPS,
        'size': SIZE,
        'rate': RATE,
        'name': 'clocks',
        'quiet': True,
    }
    with monkeypatch.context() as patch:
        patch.setattr(staging, 'stage_all', None)  # nothing is decoded again
        assert not prepare.prepare(*paths, **same)['fresh']
    with pytest.raises(DataError, match='other settings.*--overwrite'):
        prepare.prepare(*paths, **{**same, 'size': 32})
    with pytest.raises(DataError, match='other tokenizer'):
        prepare.prepare(*paths, **same, tokenizer='wordpiece')


def child_processes(pid):
    """Process ids of the children of `pid` (Linux; elsewhere none)."""
    children = []
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
        except OSError:  # gone meanwhile
            continue
        if parent == pid:
            children.append(int(stat.parent.name))
    return children


def wait_until_gone(pids, seconds=10):
    """Waits for processes to notice that their parent is gone."""
    deadline = time.monotonic() + seconds
    while any(pathlib.Path(f'/proc/{pid}').exists() for pid in pids):
        assert time.monotonic() < deadline, 'worker processes live on without their parent'
        time.sleep(0.01)


def test_killed_run_goes_on(tmp_path, monkeypatch):
    videos, out = write_clocks(tmp_path / 'videos', 30, 3.0), tmp_path / 'out'
    command = [
        sys.executable,
        '-m',
        'data_pipelines.prepare',
        f'--videos={videos}',
        f'--out={out}',
        f'--fps={FPS}',
        f'--size={SIZE}',
        f'--rate={RATE}',
        '--processes=2',
        '--min_seconds=0.5',
        '--quiet',
    ]
    process = subprocess.Popen(command)
    while len(staged_files(out)) < 3:
        time.sleep(0.002)
        assert process.poll() is None
    workers = []
    for pid in child_processes(process.pid):
        workers += [pid, *child_processes(pid)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(workers)
    num_staged = len(staged_files(out))
    assert 3 <= num_staged < 30
    assert not (out / 'prepare.json').exists()
    with pytest.raises(DataError, match='not finished'):
        Prepared(out)

    decoded = []
    stage_file = decoded_files.stage_file

    def counting_stage(file, *arguments):
        decoded.append(file.id)
        stage_file(file, *arguments)

    monkeypatch.setattr(decoded_files, 'stage_file', counting_stage)
    result = prepare.prepare(videos, '', str(out), **SMALL)
    assert len(decoded) == 30 - num_staged
    assert num_records(result) == 30
    # The same bytes as a run that was never killed.
    again = prepare.prepare(videos, '', str(tmp_path / 'again'), **SMALL, name='out')
    assert again['splits'] == result['splits']
    np.testing.assert_array_equal(
        Split(Prepared(out), 'train').index.crc,
        Split(Prepared(tmp_path / 'again'), 'train').index.crc,
    )


def test_killed_while_writing(tmp_path, monkeypatch):
    videos, out = write_clocks(tmp_path / 'videos', 3), tmp_path / 'out'
    original_replace = os.replace

    def interrupted_replace(source, target):
        if str(target) == str(out / 'tokenizer.json'):
            raise KeyboardInterrupt
        original_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', interrupted_replace)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(videos, '', str(out), **SMALL)
    assert (out / 'dataset_info.json').exists()
    assert not (out / 'prepare.json').exists()
    monkeypatch.setattr(decoded_files, 'stage_file', None)  # nothing is decoded again
    result = prepare.prepare(videos, '', str(out), **SMALL)
    assert num_records(result) == 3
    for name in result['splits']:
        assert len(Split(Prepared(out), name)) > 0


def test_overwrite(tmp_path):
    videos, out = write_clocks(tmp_path / 'videos', 2), tmp_path / 'out'
    prepare.prepare(videos, '', str(out), **SMALL)
    (out / 'mine.txt').write_text('kept')
    os.remove(tmp_path / 'videos' / 'v0.mp4')
    with pytest.raises(DataError, match='other files'):
        prepare.prepare(videos, '', str(out), **SMALL)
    result = prepare.prepare(videos, '', str(out), **SMALL, overwrite=True)
    assert num_records(result) == 1


def crashing_stage(file, settings, target):
    """Stages a second of silence, but ends the process on a file called bomb."""
    if 'bomb' in file.id:
        os._exit(11)
    header = {
        'id': file.id,
        'lengths': [],
        'samples': 8000,
        'height': 0,
        'width': 0,
        'duration': 1.0,
    }
    decoded_files.write(target, header, [bytes(16000)])


def test_a_file_that_crashes_the_decoder_is_skipped(tmp_path, monkeypatch):
    videos = write_silences(tmp_path / 'videos', 'a', 'bomb', 'c', 'd')
    monkeypatch.setattr(decoded_files, 'stage_file', crashing_stage)
    result = prepare.prepare(videos, '', str(tmp_path / 'out'), **{**SMALL, 'processes': 2})
    assert result['skipped'] == {'bomb.wav': 'corrupt: it crashes the decoder'}
    assert num_records(result) == 3


def stage_or_die_once(file, settings, target):
    """Stages a second of silence, but each file ends its first process."""
    mark = pathlib.Path(f'{target}.tried')
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    crashing_stage(file, settings, target)


def test_no_file_is_lost_where_workers_are_killed(tmp_path, monkeypatch):
    # As by a system that runs out of memory.
    videos = write_silences(tmp_path / 'videos', 'a', 'b', 'c', 'd')
    monkeypatch.setattr(decoded_files, 'stage_file', stage_or_die_once)
    result = prepare.prepare(videos, '', str(tmp_path / 'out'), **{**SMALL, 'processes': 2})
    assert result['skipped'] == {}
    assert num_records(result) == 4


def test_require_audio_and_nothing_left(tmp_path, capsys):
    (tmp_path / 'videos').mkdir()
    media.write_mp4(tmp_path / 'videos' / 'a.mp4', clock(1.0)[0], FPS)
    arguments = [
        f'--videos={tmp_path / "videos"}',
        f'--out={tmp_path / "out"}',
        f'--rate={RATE}',
        f'--size={SIZE}',
        '--processes=1',
        '--require_audio',
        '--quiet',
    ]
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert 'all 1 files' in error
    assert 'no audio' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'videos': 'none'}, 'does not exist'),
        ({'captions': 'none.csv'}, 'captions file none.csv does not exist'),
        ({'fps': 0.0}, '--fps=0.0'),
        ({'name': 'My Set'}, '--name=My Set'),
        ({'validation': 0.7, 'test': 0.5}, '--validation=0.7'),
        ({'videos': 'empty'}, 'no media file'),
    ],
)
def test_wrong_arguments_are_one_clear_sentence(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_silences(tmp_path / 'videos', 'a')
    (tmp_path / 'empty').mkdir()
    arguments = {'videos': 'videos', 'captions': '', 'out': 'out', **SMALL, **changes}
    with pytest.raises(DataError, match=message):
        prepare.prepare(**arguments)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    videos = write_clocks(tmp_path / 'videos', 1)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').write_text('x')
    with pytest.raises(DataError, match='holds other files'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL)


def test_splits_by_hash_are_in_proportion():
    names = [f'v{i}.mp4' for i in range(4000)]
    assigned = [splits.split_of(name, False, 0.1, 0.2) for name in names]
    assert abs(assigned.count('test') - 800) < 100
    assert abs(assigned.count('validation') - 400) < 80


def test_splits_by_folder():
    assert splits.split_of('val/x.mp4', True, 0, 0) == 'validation'
    assert splits.split_of('x.mp4', True, 0, 0) == 'train'


# ---- captions and annotations


def test_caption_formats_agree(tmp_path):
    expected = {
        'a.mp4': [
            {'text': 'one, two', 'start': 0.0, 'end': 1.5},
            {'text': 'three', 'start': 2.0, 'end': 3.0},
        ],
        'b': [{'text': 'ÅÄÖ', 'start': 0.0, 'end': float('inf')}],
    }
    byte_order_mark = '\ufeff'
    lines = [
        'Video, start,end,text',
        'a.mp4,0,1.5,"one, two"',
        'a.mp4,2,3,three',
        'b,,,ÅÄÖ',
    ]
    table = byte_order_mark + '\n'.join(lines) + '\n'
    (tmp_path / 'table.csv').write_text(table, encoding='utf-8')
    by_video = {
        'a.mp4': [
            {'text': 'one, two', 'start': 0, 'end': 1.5},
            {'text': 'three', 'start': 2, 'end': 3},
        ],
        'b': ['ÅÄÖ'],
    }
    (tmp_path / 'by_video.json').write_text(json.dumps(by_video))
    in_a_list = [
        {'video': 'a.mp4', 'text': 'one, two', 'end': 1.5},
        {'video': 'a.mp4', 'start': 2, 'end': 3, 'text': 'three'},
        {'video': 'b', 'text': 'ÅÄÖ'},
    ]
    (tmp_path / 'in_a_list.json').write_text(json.dumps(in_a_list))
    for name in ('table.csv', 'by_video.json', 'in_a_list.json'):
        assert annotation_files.read_captions(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    'name, expected',
    [
        ('train/a.mp4', 'train/a.mp4'),
        ('train/a', 'train/a.mp4'),
        ('b', 'train/deep/b.webm'),
        ('deep/b.webm', 'train/deep/b.webm'),
        ('./train/deep/b', 'train/deep/b.webm'),
        ('c', 'c.mp4'),
        ('a.mp4', None),  # two files answer to it
        ('zzz', None),
    ],
)
def test_names_mean_files(name, expected):
    files = ['train/a.mp4', 'test/a.mp4', 'train/deep/b.webm', 'c.mp4']
    assert file_names.NameResolver(files)(name) == expected


def test_a_label_a_video_is_a_class(tmp_path):
    (tmp_path / 'l.csv').write_text('video,label\na.mp4,run\nb.mp4,jump\n')
    classes, videos = annotation_files.read_annotations(tmp_path / 'l.csv')
    assert classes == {'class': ['jump', 'run']}
    assert videos['a.mp4']['segments'][0]['labels'] == {'class': 1}
    assert annotation_files.multi_hot_sizes(classes, videos) == {'class': None}


def test_several_labels_a_video_are_multi_hot(tmp_path):
    (tmp_path / 'l.csv').write_text('video,label\na.mp4,run\na.mp4,jump\nb.mp4,jump\n')
    classes, videos = annotation_files.read_annotations(tmp_path / 'l.csv')
    assert videos['a.mp4']['segments'][0]['labels'] == {'class': [1, 0]}
    assert annotation_files.multi_hot_sizes(classes, videos) == {'class': 2}


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"videos": {"a": {"segments": [{"labels": {"k": 1}}]}}}', "label 'k' is not among"),
        (
            '{"labels": {"k": ["x"]}, "videos": {"a": {"segments": [{"labels": {"k": 1}}]}}}',
            "1 is not a class of 'k'",
        ),
        (
            '{"labels": {"k": ["x"]}, "videos": {"a": {"segments": [{"start": 3, "end": 1}]}}}',
            'ends .1 s. before it starts',
        ),
        ('[1]', 'expected the form'),
        ('{', 'not readable JSON'),
    ],
)
def test_wrong_annotations_say_what_is_wrong(tmp_path, text, message):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(DataError, match=message):
        annotation_files.read_annotations(tmp_path / 'a.json')


def test_stored_frames_show_the_right_moment(prepared):
    split = Split(Prepared(prepared[0]), 'test')
    raw_records, _ = split.read(np.array([0]))
    encoded = example_features(raw_records[0])['frames'].bytes_list.value
    frames = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in encoded])
    np.testing.assert_allclose(video_time(frames), np.arange(len(frames)) / FPS, atol=0.06)
