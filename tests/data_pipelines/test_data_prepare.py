import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, audio_time, clock, video_time, write_wav

from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import (
    annotation_files,
    decoded_files,
    record_contents,
    staging,
)
from data_pipelines.storage.record_index import Index, Strings
from data_pipelines.storage.records import Prepared, Split

SMALL = dict(fps=FPS, size=SIZE, rate=RATE, quiet=True, processes=1, min_seconds=0.5)


def folder_of(path, number, seconds=1.0):
    path.mkdir(exist_ok=True)
    for i in range(number):
        frames, audio = clock(seconds)
        media.write_mp4(path / f'v{i}.mp4', frames, FPS, audio, RATE)
    return str(path)


def test_what_comes_out(prepared, media_folder):
    out, result = prepared
    assert (
        result['fresh']
        and result['splits']['train']['records'] == 13
        and result['splits']['test']['records'] == 5
    )
    assert (
        result['splits']['train']['without_audio'] == 1
        and result['splits']['train']['without_video'] == 1
    )
    reasons = {k: v.split(':')[0] for k, v in result['skipped'].items()}
    assert reasons == {
        'train/cut.mp4': 'corrupt',
        'train/noise.mp4': 'corrupt',
        'train/short.mp4': 'too short',
    }
    assert json.loads((out / 'skipped.json').read_text()) == result['skipped']
    assert not (out / '.staging').exists()
    vocabulary = json.loads((out / 'tokenizer.json').read_text())['vocabulary']
    assert 'train3' in vocabulary and 'test3' not in vocabulary  # of the training captions alone


def test_it_is_a_tfds_dataset(prepared):
    import tensorflow_datasets as tfds

    out, _ = prepared
    builder = tfds.builder_from_directory(str(out))
    assert builder.info.name == 'clocks' and builder.info.splits['train'].num_examples == 13
    by_id = {e['id'].decode(): e for e in builder.as_data_source('test')}
    e = by_id['test/test04.mp4']
    assert (
        len(e['frames']) == 24
        and len(e['audio']) == 2 * round(2.4 * RATE)
        and (e['height'], e['width']) == (SIZE, SIZE)
    )
    assert e['caption_text'][1] == b'word1 of video test4, yes' and json.loads(
        e['ground_truth']
    ) == {'i': 4}
    assert [int(x) for x in e['segment_labels']['class']] == [0, 1]
    np.testing.assert_array_equal(np.stack(e['segment_labels']['tags']), [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_allclose(e['segment_end'], [1.0, 2.4], atol=1e-6)  # cut to the record
    np.testing.assert_allclose(
        audio_time(np.frombuffer(e['audio'], '<i2'))[3:-3],
        ((np.arange(60) + 0.5) * 0.04)[3:-3],
        atol=0.06,
    )


def test_index_tells_what_the_records_hold(prepared):
    out, _ = prepared
    split = Split(Prepared(out), 'train')
    t = split.index
    raw, reasons = split.read(np.arange(13))
    assert not any(reasons)
    from tensorflow_datasets.proto import tf_example_pb2

    for i, r in enumerate(raw):
        f = tf_example_pb2.Example.FromString(r).features.feature
        assert f['id'].bytes_list.value[0].decode() == t.id[i]
        assert (
            len(f['frames'].bytes_list.value) == t.frames[i]
            and len(f['audio'].bytes_list.value[0]) == 2 * t.samples[i]
        )
        first, last = t.sentence_offset[i : i + 2]
        assert [x.decode() for x in f['caption_text'].bytes_list.value] == t.sentence_text[
            first:last
        ]
    i = list(t.id).index('train/sound.wav')
    assert t.frames[i] == 0 and t.duration[i] == 2.5
    assert (t.segment_record == np.arange(13)).all() and (
        t.segment_end == t.duration.astype(np.float32)
    ).all()


def test_second_run_decodes_nothing_and_other_settings_are_refused(
    prepared, media_folder, monkeypatch
):
    out, _ = prepared
    same = dict(
        annotations=str(media_folder / 'annotations.json'),
        fps=FPS,
        size=SIZE,
        rate=RATE,
        name='clocks',
        quiet=True,
    )
    args = (str(media_folder / 'videos'), str(media_folder / 'captions.csv'), str(out))
    with monkeypatch.context() as m:
        m.setattr(staging, 'stage_all', None)  # nothing is decoded again
        assert not prepare.prepare(*args, **same)['fresh']
    with pytest.raises(DataError, match='other settings.*--overwrite'):
        prepare.prepare(*args, **{**same, 'size': 32})
    with pytest.raises(DataError, match='other tokenizer'):
        prepare.prepare(*args, **same, tokenizer='wordpiece')


def children(pid):
    """Process ids below `pid` (Linux; elsewhere none)."""
    out = []
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
        except OSError:  # gone meanwhile
            continue
        if parent == pid:
            out.append(int(stat.parent.name))
    return out


def test_killed_run_goes_on(tmp_path, monkeypatch):
    videos, out = folder_of(tmp_path / 'videos', 30, 3.0), tmp_path / 'out'
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

    def staged():
        return [p for p in (out / '.staging' / 'files').glob('*/*') if '.' not in p.name]

    process = subprocess.Popen(command)
    while len(staged()) < 3:
        time.sleep(0.002)
        assert process.poll() is None
    workers = [w for pid in children(process.pid) for w in (pid, *children(pid))]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f'/proc/{w}').exists() for w in workers):  # they notice, and go
        assert time.monotonic() < deadline, 'worker processes live on without their parent'
        time.sleep(0.01)
    assert 3 <= len(staged()) < 30 and not (out / 'prepare.json').exists()
    with pytest.raises(DataError, match='not finished'):
        Prepared(out)
    done, original = [], decoded_files.stage_file
    monkeypatch.setattr(decoded_files, 'stage', lambda *a: (done.append(a[0].id), original(*a)))
    left = 30 - len(staged())
    result = prepare.prepare(videos, '', str(out), **SMALL)
    assert len(done) == left and sum(s['records'] for s in result['splits'].values()) == 30
    # The same bytes as a run that was never killed.
    again = prepare.prepare(videos, '', str(tmp_path / 'again'), **SMALL, name='out')
    assert again['splits'] == result['splits']
    np.testing.assert_array_equal(
        Split(Prepared(out), 'train').index.crc,
        Split(Prepared(tmp_path / 'again'), 'train').index.crc,
    )


def test_killed_while_writing(tmp_path, monkeypatch):
    videos, out = folder_of(tmp_path / 'videos', 3), tmp_path / 'out'
    with monkeypatch.context() as m:
        calls = []

        def replace(a, b, original=os.replace):
            calls.append(b)
            if str(b) == str(out / 'tokenizer.json'):
                raise KeyboardInterrupt
            original(a, b)

        m.setattr(os, 'replace', replace)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(videos, '', str(out), **SMALL)
    assert (out / 'dataset_info.json').exists() and not (out / 'prepare.json').exists()
    monkeypatch.setattr(decoded_files, 'stage', None)  # nothing is decoded again
    result = prepare.prepare(videos, '', str(out), **SMALL)
    assert sum(s['records'] for s in result['splits'].values()) == 3
    assert all(len(Split(Prepared(out), s)) for s in result['splits'])


def test_overwrite(tmp_path):
    videos, out = folder_of(tmp_path / 'videos', 2), tmp_path / 'out'
    prepare.prepare(videos, '', str(out), **SMALL)
    (out / 'mine.txt').write_text('kept')
    os.remove(tmp_path / 'videos' / 'v0.mp4')
    with pytest.raises(DataError, match='other files'):
        prepare.prepare(videos, '', str(out), **SMALL)
    result = prepare.prepare(videos, '', str(out), **SMALL, overwrite=True)
    assert sum(s['records'] for s in result['splits'].values()) == 1


def crashing_stage(file, settings, target):
    if 'bomb' in file.id:
        os._exit(11)
    decoded_files.write(
        target,
        {'id': file.id, 'lengths': [], 'samples': 8000, 'height': 0, 'width': 0, 'duration': 1.0},
        [bytes(16000)],
    )


def test_a_file_that_crashes_the_decoder_is_skipped(tmp_path, monkeypatch):
    (tmp_path / 'videos').mkdir()
    for name in ('a', 'bomb', 'c', 'd'):
        write_wav(tmp_path / 'videos' / f'{name}.wav', np.zeros(8000, np.int16))
    monkeypatch.setattr(decoded_files, 'stage', crashing_stage)
    result = prepare.prepare(
        str(tmp_path / 'videos'), '', str(tmp_path / 'out'), **{**SMALL, 'processes': 2}
    )
    assert result['skipped'] == {'bomb.wav': 'corrupt: it crashes the decoder'}
    assert sum(s['records'] for s in result['splits'].values()) == 3


class PoolThatBreaks(futures.ProcessPoolExecutor):
    """A pool whose first worker is killed before the second task is submitted."""

    def submit(self, *task):
        if self._processes:
            for process in list(self._processes.values()):
                os.kill(process.pid, signal.SIGKILL)
            while not self._broken:
                time.sleep(0.01)
        return super().submit(*task)


def test_no_file_is_lost_where_the_pool_breaks_between_two_tasks(tmp_path, monkeypatch):
    (tmp_path / 'videos').mkdir()
    for name in ('a', 'b', 'c', 'd'):
        write_wav(tmp_path / 'videos' / f'{name}.wav', np.zeros(8000, np.int16))
    first_pool, make_pool = [PoolThatBreaks], decoded_files.pool

    def pool(processes):
        if not first_pool:
            return make_pool(processes)
        context = multiprocessing.get_context('spawn')
        return first_pool.pop()(processes, context, decoded_files.die_with_parent)

    monkeypatch.setattr(decoded_files, 'pool', pool)
    result = prepare.prepare(
        str(tmp_path / 'videos'), '', str(tmp_path / 'out'), **{**SMALL, 'processes': 2}
    )
    assert not first_pool
    assert sum(s['records'] for s in result['splits'].values()) == 4


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
    assert (
        'all 1 files' in (error := capsys.readouterr().err)
        and 'no audio' in error
        and error.count('\n') == 1
    )


@pytest.mark.parametrize(
    'change, say',
    [
        (dict(videos='none'), 'does not exist'),
        (dict(captions='none.csv'), 'captions file none.csv does not exist'),
        (dict(fps=0.0), '--fps=0.0'),
        (dict(name='My Set'), '--name=My Set'),
        (dict(validation=0.7, test=0.5), '--validation=0.7'),
        (dict(videos='.'), 'no media file'),
    ],
)
def test_one_clear_sentence(tmp_path, monkeypatch, change, say):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'videos').mkdir()
    write_wav(tmp_path / 'videos' / 'a.wav', np.zeros(8000, np.int16))
    if change.get('videos') == '.':
        (tmp_path / 'videos' / 'a.wav').unlink()
    with pytest.raises(DataError, match=say):
        prepare.prepare(**{'videos': 'videos', 'captions': '', 'out': 'out', **SMALL, **change})


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    videos = folder_of(tmp_path / 'videos', 1)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').write_text('x')
    with pytest.raises(DataError, match='holds other files'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL)


def test_splits_by_hash_are_stable_and_in_proportion():
    names = [f'v{i}.mp4' for i in range(4000)]
    split = [record_contents.split_of(n, False, 0.1, 0.2) for n in names]
    assert abs(split.count('test') - 800) < 100 and abs(split.count('validation') - 400) < 80
    assert (
        record_contents.split_of('val/x.mp4', True, 0, 0) == 'validation'
        and record_contents.split_of('x.mp4', True, 0, 0) == 'train'
    )


# ---- captions and annotations


def test_caption_formats_agree(tmp_path):
    want = {
        'a.mp4': [
            {'text': 'one, two', 'start': 0.0, 'end': 1.5},
            {'text': 'three', 'start': 2.0, 'end': 3.0},
        ],
        'b': [{'text': 'ÅÄÖ', 'start': 0.0, 'end': float('inf')}],
    }
    (tmp_path / 'c.csv').write_text(
        '﻿Video, start,end,text\na.mp4,0,1.5,"one, two"\na.mp4,2,3,three\nb,,,ÅÄÖ\n',
        encoding='utf-8',
    )
    (tmp_path / 'd.json').write_text(
        json.dumps(
            {
                'a.mp4': [
                    {'text': 'one, two', 'start': 0, 'end': 1.5},
                    {'text': 'three', 'start': 2, 'end': 3},
                ],
                'b': ['ÅÄÖ'],
            }
        )
    )
    (tmp_path / 'l.json').write_text(
        json.dumps(
            [
                {'video': 'a.mp4', 'text': 'one, two', 'end': 1.5},
                {'video': 'a.mp4', 'start': 2, 'end': 3, 'text': 'three'},
                {'video': 'b', 'text': 'ÅÄÖ'},
            ]
        )
    )
    for name in ('c.csv', 'd.json', 'l.json'):
        assert annotation_files.read_captions(tmp_path / name) == want, name


def test_names_mean_files():
    names = annotation_files.NameResolver(
        ['train/a.mp4', 'test/a.mp4', 'train/deep/b.webm', 'c.mp4']
    )
    assert names('train/a.mp4') == 'train/a.mp4' and names('train/a') == 'train/a.mp4'
    assert (
        names('b') == names('deep/b.webm') == names('./train/deep/b') == 'train/deep/b.webm'
        and names('c') == 'c.mp4'
    )
    assert names('a.mp4') is None and names('zzz') is None  # two answer, none answers


def test_label_csv(tmp_path):
    (tmp_path / 'l.csv').write_text('video,label\na.mp4,run\nb.mp4,jump\n')
    classes, videos = annotation_files.read_annotations(tmp_path / 'l.csv')
    assert classes == {'class': ['jump', 'run']} and videos['a.mp4']['segments'][0]['labels'] == {
        'class': 1
    }
    assert annotation_files.multi_hot_sizes(classes, videos) == {'class': None}
    (tmp_path / 'l.csv').write_text('video,label\na.mp4,run\na.mp4,jump\nb.mp4,jump\n')
    classes, videos = annotation_files.read_annotations(tmp_path / 'l.csv')
    assert annotation_files.multi_hot_sizes(classes, videos) == {'class': 2} and videos['a.mp4'][
        'segments'
    ][0]['labels'] == {'class': [1, 0]}


@pytest.mark.parametrize(
    'text, say',
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
def test_wrong_annotations_name_the_place(tmp_path, text, say):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(DataError, match=say):
        annotation_files.read_annotations(tmp_path / 'a.json')


def test_strings():
    s = Strings.from_texts(['a', '', 'Å☃', 'z'])
    assert list(s) == ['a', '', 'Å☃', 'z'] and s[1:3] == ['', 'Å☃'] and s[-1] == 'z' and len(s) == 4


def test_damaged_index_is_one_sentence(tmp_path):
    (tmp_path / 'i.npz').write_bytes(b'PK nothing')
    with pytest.raises(DataError, match='prepare the data again'):
        Index.load(tmp_path / 'i.npz')


def test_stored_frames_show_the_right_moment(prepared):
    import io

    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    split = Split(Prepared(prepared[0]), 'test')
    f = tf_example_pb2.Example.FromString(split.read(np.array([0]))[0][0]).features.feature
    frames = np.stack([np.asarray(Image.open(io.BytesIO(b))) for b in f['frames'].bytes_list.value])
    np.testing.assert_allclose(video_time(frames), np.arange(len(frames)) / FPS, atol=0.06)
