"""An index of files, its neighbours, run.py --mode=index and --mode=search, and the page."""

import io
import os
import pathlib
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import wave

import av
import numpy as np
import pytest

import run
import vatt_jax
from data_pipelines import media, media_windows, short_clips
from tests import browser, crashing_reader
from vatt_jax.config import ConfigError
from vatt_jax.modes import index as index_mode
from vatt_jax.search import index as search_index
from vatt_jax.search.index import Index
from vatt_jax.search.neighbours import Approximate, Exact
from vatt_jax.search.searcher import Searcher
from vatt_jax.search.window_features import WindowFeatures

# Of tests/tiny.py: clips of half a second at 8 fps, sound at 2000 Hz.
FPS, RATE = 8, 2000
HOSTILE = '<img src=x onerror=alert(1)> [b] {{ 7*7 }}.mp4'


def write_clip(path, seed, seconds=2.0, with_sound=True):
    """Pictures and a sound that no other seed has."""
    rng = np.random.default_rng(seed)
    frames = np.repeat(rng.integers(0, 256, (round(seconds * 2), 4, 6, 3)), 4, axis=0)
    frames = frames.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
    sound = None
    if with_sound:
        time = np.arange(round(seconds * 8000)) / 8000
        sound = (9000 * np.sin(2 * np.pi * (150 + 70 * seed) * time)).astype(np.int16)
    media.write_mp4(path, frames, FPS, sound, rate=8000)


def remux(source, target, kinds=('video', 'audio')):
    """The same streams in another container."""
    with av.open(str(source)) as given, av.open(str(target), 'w') as made:
        streams = {}
        for stream in given.streams:
            if stream.type in kinds:
                streams[stream] = made.add_stream_from_template(stream)
        for packet in given.demux(*streams):
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                made.mux(packet)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Four videos, one of them below a folder and one without sound, and two files that are bad."""
    folder = tmp_path_factory.mktemp('videos')
    (folder / 'more').mkdir()
    write_clip(folder / 'a.mp4', 1)
    write_clip(folder / 'more' / HOSTILE, 2)
    write_clip(folder / 'silent.mp4', 3, with_sound=False)
    write_clip(folder / 'short.mp4', 4, seconds=0.5)
    os.rename(os.fsencode(folder / 'short.mp4'), os.fsencode(folder) + b'/caf\xe9.mp4')
    os.mkfifo(folder / 'pipe.mp4')
    remux(folder / 'a.mp4', folder / 'old.flv')
    remux(folder / 'a.mp4', folder / 'tone.m4a', kinds=('audio',))
    (folder / 'broken.mp4').write_bytes(b'not a video' * 50)
    (folder / 'empty.wav').touch()
    (folder / 'read me.txt').write_text('no media')
    return folder


@pytest.fixture(scope='module')
def made(plain_run, folder, tmp_path_factory):
    """(index folder, what making it printed)."""
    out = tmp_path_factory.mktemp('index') / 'index'
    index_mode.run(plain_run, str(folder), str(out), window=1.0, stride=0.5)
    return out


@pytest.fixture(scope='module')
def model(plain_run):
    return vatt_jax.load(plain_run)


@pytest.fixture(scope='module')
def searcher(made, model):
    with Index(made) as index:
        return Searcher(index, model)


def rows_of(path):
    """Everything that an index says, in order."""
    with sqlite3.connect(path / 'index.sqlite') as connection:
        return {
            'files': connection.execute('SELECT path, reason FROM files ORDER BY path').fetchall(),
            'windows': connection.execute(
                'SELECT path, start, stop FROM windows JOIN files ON files.id = file '
                'ORDER BY path, start'
            ).fetchall(),
            'vectors': connection.execute(
                'SELECT path, modality, space, vectors FROM embeddings '
                'JOIN files ON files.id = file ORDER BY path, modality, space, embeddings.rowid'
            ).fetchall(),
        }


def test_what_an_index_holds(made, folder):
    rows = rows_of(made)
    reasons = dict(rows['files'])
    hostile = f'more/{HOSTILE}'.encode()
    assert set(reasons) == {
        b'a.mp4', hostile, b'silent.mp4', b'caf\xe9.mp4', b'broken.mp4', b'empty.wav',
        b'old.flv', b'tone.m4a',
    }  # fmt: skip
    assert 'corrupt' in reasons[b'broken.mp4']
    assert reasons[b'empty.wav']
    starts = [(path, start, stop) for path, start, stop in rows['windows'] if path == b'a.mp4']
    assert starts == [(b'a.mp4', 0, 1), (b'a.mp4', 0.5, 1.5), (b'a.mp4', 1, 2)]
    silent = {modality for path, modality, _, _ in rows['vectors'] if path == b'silent.mp4'}
    assert silent == {'video'}
    with Index(made) as index:
        assert index.spaces() == {'video': ['va', 'vat'], 'audio': ['va']}
        _, vectors = index.embeddings('video', 'va')
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_window_is_the_mean_of_its_clips(made, model, folder):
    """Against `embed` of the clips, by hand."""
    frames = np.stack(list(media.read(folder / 'a.mp4', FPS, 16, RATE).frames))
    clips = model.embed(video=[frames[4:8], frames[8:12]])['video']['va'].astype(np.float64)
    expected = clips.sum(axis=0) / np.linalg.norm(clips.sum(axis=0))
    with Index(made) as index:
        windows = index.windows()
        numbers, vectors = index.embeddings('video', 'va')
    for number, vector in zip(numbers, vectors):
        window = windows[number]
        if str(window.path) == 'a.mp4' and window.start == 0.5:
            np.testing.assert_allclose(vector, expected, atol=1e-5)
            return
    raise AssertionError('the window is not in the index')


def test_an_index_made_again_reads_nothing(made, plain_run, folder, monkeypatch, capsys):
    before = rows_of(made)

    def refuse(*_):
        raise AssertionError('a finished file was read again')

    monkeypatch.setattr(WindowFeatures, 'read', refuse)
    index_mode.run(plain_run, str(folder), str(made), window=1.0, stride=0.5)
    assert rows_of(made) == before
    assert 'broken.mp4' in capsys.readouterr().out


def test_a_killed_index_continues_to_the_same(made, plain_run, folder, tmp_path):
    """Killed within its third file, by an error that nothing catches."""
    out = tmp_path / 'index'
    read = WindowFeatures.read
    num_files = 0

    def read_two(self, path, modalities=()):
        nonlocal num_files
        num_files += 1
        for number, windows in enumerate(read(self, path, modalities)):
            if num_files == 3 and number == 0:
                yield windows
                raise KeyboardInterrupt
            yield windows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WindowFeatures, 'read', read_two)
        with pytest.raises(KeyboardInterrupt):
            index_mode.run(plain_run, str(folder), str(out), window=1.0, stride=0.5)
    assert 0 < len(rows_of(out)['files']) < 8
    index_mode.run(plain_run, str(folder), str(out), window=1.0, stride=0.5)
    assert rows_of(out) == rows_of(made)


def test_a_file_that_crashes_the_decoder_is_skipped(plain_run, folder, tmp_path, capsys):
    """It ends a real process; the others go on, and the next run does not try it again."""
    videos = tmp_path / 'videos'
    videos.mkdir()
    for name in ('a.mp4', 'bomb.mp4', 'c.mp4'):
        shutil.copy(folder / 'a.mp4', videos / name)
    arguments = (plain_run, str(videos), str(tmp_path / 'index'), 1.0, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media_windows, 'read_batches', crashing_reader.read_batches)
        index_mode.run(*arguments)
    assert 'skipped bomb.mp4: corrupt: it crashes the decoder' in capsys.readouterr().out
    rows = rows_of(tmp_path / 'index')
    assert {path for path, _, _ in rows['windows']} == {b'a.mp4', b'c.mp4'}
    assert dict(rows['files'])[b'bomb.mp4'] == 'corrupt: it crashes the decoder'
    index_mode.run(*arguments)
    assert rows_of(tmp_path / 'index') == rows


def test_without_worker_processes_files_are_read_all_the_same(model, folder, monkeypatch):
    expected = [len(windows) for windows in WindowFeatures(model, 1.0).read(folder / 'a.mp4')]
    monkeypatch.setattr(sys, 'executable', '/nowhere/python')
    found = [len(windows) for windows in WindowFeatures(model, 1.0).read(folder / 'a.mp4')]
    assert found == expected == [2]


def test_changed_and_vanished_files(plain_run, folder, tmp_path, capsys):
    videos = tmp_path / 'videos'
    videos.mkdir()
    write_clip(videos / 'one.mp4', 5, seconds=1.0)
    write_clip(videos / 'two.mp4', 6, seconds=1.0)
    arguments = (plain_run, str(videos), str(tmp_path / 'index'), 1.0, 1.0)
    index_mode.run(*arguments)
    before = rows_of(tmp_path / 'index')
    write_clip(videos / 'one.mp4', 7, seconds=2.0)
    (videos / 'two.mp4').unlink()
    index_mode.run(*arguments)
    after = rows_of(tmp_path / 'index')
    assert [path for path, _ in after['files']] == [b'one.mp4']
    assert len(after['windows']) == 2
    assert after['vectors'][0] != before['vectors'][0]
    assert '1 files are gone from the folder and left the index: two.mp4' in capsys.readouterr().out
    # A folder that is not mounted must not empty the index.
    (videos / 'one.mp4').unlink()
    with pytest.raises(ConfigError, match='found none'):
        index_mode.run(*arguments)
    assert rows_of(tmp_path / 'index') == after


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'window': 2.0}, '--window: expected 1.0'),
        ({'stride': 1.0}, '--stride: expected 0.5'),
        ({'videos': '/nowhere'}, '--videos=/nowhere: expected a folder'),
        ({'videos': ''}, 'name it with --videos'),
        ({'out': ''}, 'name its folder with --out'),
        ({'window': -1.0}, '--window: expected a positive number'),
        ({'stride': float('nan')}, '--stride: expected a positive number'),
    ],
)
def test_mistakes_are_told(made, plain_run, folder, changes, message):
    before = rows_of(made)
    arguments = {'videos': str(folder), 'out': str(made), 'window': 1.0, 'stride': 0.5}
    with pytest.raises(ConfigError, match=message):
        index_mode.run(plain_run, **{**arguments, **changes})
    assert rows_of(made) == before


def test_an_index_that_cannot_be_written(made, plain_run, folder, tmp_path):
    arguments = {'videos': str(folder), 'window': 1.0, 'stride': 0.5}
    # Another process is writing.
    busy = tmp_path / 'busy'
    shutil.copytree(made, busy)
    with Index(busy, create=True) as index:
        index.forget(b'a.mp4')
    with sqlite3.connect(busy / 'index.sqlite') as other:
        other.execute('DELETE FROM files')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_index, 'TIMEOUT', 0.1)
            with pytest.raises(ConfigError, match='database is locked.*the same command continues'):
                index_mode.run(plain_run, out=str(busy), **arguments)
        other.rollback()
    index_mode.run(plain_run, out=str(busy), **arguments)
    assert rows_of(busy) == rows_of(made)
    # A file that is no database stays as it is.
    no_index = tmp_path / 'none' / 'index.sqlite'
    no_index.parent.mkdir()
    no_index.write_bytes(b'something else' * 1000)
    with pytest.raises(ConfigError, match='expected an index that can be opened'):
        index_mode.run(plain_run, out=str(no_index.parent), **arguments)
    with pytest.raises(ConfigError, match='expected an index that can be opened'):
        Index(no_index.parent)
    assert no_index.read_bytes() == b'something else' * 1000


# ---- questions


def test_a_file_finds_itself(searcher, folder):
    path = os.fsdecode(os.fsencode(folder) + b'/caf\xe9.mp4')
    hits = searcher.search(video=path)
    assert os.fsencode(hits[0].window.path) == b'caf\xe9.mp4'
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_sound_finds_its_file_and_text_any(searcher, folder):
    by_sound = searcher.search(audio=folder / 'more' / HOSTILE, against='audio')
    assert by_sound[0].window.path.name == HOSTILE
    assert searcher.search(audio=folder / 'a.mp4', against='video')
    by_text = searcher.search(text='red stripes move left', count=3)
    assert len(by_text) == 3


def test_overlapping_windows_are_one_hit(searcher):
    hits = searcher.search(text='red', count=100)
    for i, hit in enumerate(hits):
        for other in hits[:i]:
            same_file = hit.window.file == other.window.file
            overlap = hit.window.start < other.window.end and other.window.start < hit.window.end
            assert not (same_file and overlap)


@pytest.mark.parametrize(
    ('query', 'message'),
    [
        ({}, 'got 0'),
        ({'text': 'a', 'audio': 'b.wav'}, 'got 2'),
        ({'text': 'a', 'against': 'audio'}, 'no common space'),
        ({'text': 'a', 'space': 'va'}, 'no common space'),
        ({'text': 'a', 'count': 0}, '--top: expected a positive number'),
        ({'audio': 'silent.mp4'}, 'no sound'),
        ({'video': 'missing.mp4'}, 'missing.mp4'),
        ({'video': 'broken.mp4'}, 'corrupt'),
    ],
)
def test_questions_that_cannot_be_answered(searcher, folder, query, message):
    query = dict(query)
    for kind in ('audio', 'video'):
        if kind in query:
            query[kind] = folder / query[kind]
    with pytest.raises(ConfigError, match=message):
        searcher.search(**query)


def test_another_model_is_refused(made, model):
    other = vatt_jax.api.Model(
        model.config,
        {**model.variables, 'params': {**model.variables['params'], 'more': np.zeros(1)}},
        model.info,
        model._encoder.mesh,
    )
    with Index(made) as index, pytest.raises(ConfigError, match='other weights'):
        Searcher(index, other)


def test_neighbours_against_numpy(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = vectors[3]
    scores = vectors.astype(np.float64) @ query
    expected = np.argsort(-scores)[:10]
    rows, found = Exact(vectors).find(query, 10)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(found, scores[expected], atol=1e-5)
    assert len(Exact(vectors[:3]).find(query, 10)[0]) == 3

    pytest.importorskip('usearch')
    path = tmp_path / 'graph'
    for _ in range(2):
        # Made, then read.
        rows, found = Approximate(vectors, path).find(query, 10)
        assert len(set(rows.tolist()) & set(expected.tolist())) >= 8
        np.testing.assert_allclose(found, scores[rows], atol=1e-3)


def test_approximate_search_finds_the_same(made, model, searcher, folder):
    pytest.importorskip('usearch')
    with Index(made) as index:
        approximate = Searcher(index, model, approximate=True)
    expected = searcher.search(video=folder / 'silent.mp4', count=2)
    hits = approximate.search(video=folder / 'silent.mp4', count=2)
    assert [hit.window for hit in hits] == [hit.window for hit in expected]


def test_from_the_command_line(plain_run, folder, tmp_path, capsys):
    # The run folder is written to by compilation caches.
    shutil.copytree(plain_run, tmp_path / 'run')
    out = tmp_path / 'index'
    run.main([
        '--mode=index', f'--workdir={tmp_path / "run"}', f'--videos={folder}', f'--out={out}',
        '--window=1',
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert 'skipped broken.mp4: corrupt' in printed
    assert 'skipped empty.wav: ' in printed
    assert '6 files, ' in printed
    assert '2 files skipped' in printed
    run.main(['--mode=search', f'--index={out}', f'--query_video={folder / "a.mp4"}', '--top=2'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    # The same pictures in two containers.
    assert {line.split()[-1] for line in lines} <= {'a.mp4', 'old.flv'}
    with pytest.raises(ConfigError, match='--mode=search reads an index'):
        run.main(['--mode=search', '--query=a'])
    with pytest.raises(ConfigError, match='found none; make it'):
        run.main(['--mode=search', f'--index={tmp_path}', '--query=a'])


# ---- the page


@pytest.fixture(scope='module')
def app(searcher):
    pytest.importorskip('flask')
    from vatt_jax.search import page

    return page.make_app(searcher)


@pytest.fixture(scope='module')
def client(app):
    return app.test_client()


def window_named(searcher, name):
    """The number of the first window of a file."""
    for number, window in searcher.windows.items():
        if os.fsencode(window.path) == name:
            return number
    raise AssertionError(f'{name} is not in the index')


def test_the_page_answers_a_sentence(client):
    assert b'Search 16 stretches' in client.get('/').data
    answer = client.post('/', data={'query': 'red stripes'})
    assert answer.status_code == 200
    html = answer.text
    assert '<video' in html
    # Hostile names and queries stay text.
    assert '&lt;img src=x onerror=alert(1)&gt; [b] {{ 7*7 }}.mp4' in html
    assert '<img src=x' not in html
    assert 'caf\\xe9.mp4' in html
    assert '<b>bold' not in client.post('/', data={'query': '<b>bold</b> "quoted"'}).text
    assert 'knows none of these words' not in html
    assert 'knows none of these words' in client.post('/', data={'query': 'zyzzyva'}).text
    policy = answer.headers['Content-Security-Policy']
    assert "default-src 'none'" in policy
    assert 'script' not in policy


def test_the_page_takes_a_file(client, folder):
    # As long as a window, so that it is not a mean of several.
    content = open(os.fsencode(folder) + b'/caf\xe9.mp4', 'rb')
    data = {'file': (content, 'mine.mp4'), 'against': 'video'}
    answer = client.post('/', data=data, content_type='multipart/form-data')
    assert 'score 1.000' in answer.text
    assert 'hits for the file mine.mp4' in answer.text
    broken = {'file': ((folder / 'broken.mp4').open('rb'), '../<i>broken.mp4')}
    answer = client.post('/', data=broken, content_type='multipart/form-data')
    assert 'corrupt' in answer.text
    assert '<i>' not in answer.text
    assert '/tmp' not in answer.text
    assert 'Enter a sentence' in client.post('/', data={}).text


def test_uploads_that_name_other_files(client, folder):
    """A playlist would have the page read any file of this machine, or fetch from the network."""
    clip = folder / 'a.mp4'
    playlists = {
        'x.m3u8': f'\n#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{clip}\n#EXT-X-ENDLIST\n',
        'x.m3u': f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n',
        'x.mp4': f"ffconcat version 1.0\nfile '{clip}'\n",
        'x.mpd': f'<?xml version="1.0"?><MPD><BaseURL>{clip}</BaseURL></MPD>',
        'x.sdp': 'v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n',
    }
    for name, content in playlists.items():
        data = {'file': (io.BytesIO(content.encode()), name)}
        answer = client.post('/', data=data, content_type='multipart/form-data')
        assert 'a playlist: download the video itself' in answer.text, name


def test_uploads_that_cannot_be_stored(client, folder, monkeypatch):
    content = (folder / 'a.mp4').read_bytes()

    def answer(name):
        data = {'file': (io.BytesIO(content), name)}
        return client.post('/', data=data, content_type='multipart/form-data')

    # Longer than a name of a file may be.
    assert 'score ' in answer('x.' + 'a' * 300).text
    monkeypatch.setattr(tempfile, 'tempdir', str(folder / 'nowhere'))
    assert 'no folder for the file could be made (No such file' in answer('x.mp4').text


def test_files_are_served_in_parts(client, searcher, folder):
    number = window_named(searcher, b'a.mp4')
    content = (folder / 'a.mp4').read_bytes()
    answer = client.get(f'/media/{number}')
    assert answer.data == content
    assert answer.mimetype == 'video/mp4'
    part = client.get(f'/media/{number}', headers={'Range': 'bytes=10-19'})
    assert part.status_code == 206
    assert part.data == content[10:20]
    thumbnail = client.get(f'/thumbnail/{number}')
    assert thumbnail.mimetype == 'image/jpeg'
    assert thumbnail.data[:2] == b'\xff\xd8'
    # Every window shows its own middle, here of a file of other pictures every half second.
    numbers = [n for n, w in searcher.windows.items() if str(w.path) == 'a.mp4']
    pictures = {client.get(f'/thumbnail/{n}').data for n in numbers}
    assert len(pictures) == len(numbers) == 3


def as_a_browser_reads(content):
    """(names of the codecs, seconds) of a file in memory."""
    with av.open(io.BytesIO(content)) as file:
        codecs = [stream.codec_context.name for stream in file.streams]
        return codecs, file.duration / av.time_base


def test_what_browsers_do_not_play_is_played_as_a_clip(client, searcher, folder):
    number = window_named(searcher, b'old.flv')
    window = searcher.windows[number]
    answer = client.get(f'/clip/{number}')
    assert answer.mimetype == 'video/mp4'
    codecs, seconds = as_a_browser_reads(answer.data)
    assert codecs == ['h264', 'aac']
    assert seconds == pytest.approx(window.end - window.start, abs=0.1)
    # Players ask for parts.
    part = client.get(f'/clip/{number}', headers={'Range': 'bytes=4-7'})
    assert (part.status_code, part.data) == (206, b'ftyp')
    # Pictures are those of the window.
    shown = list(media.read(io_file(folder, answer.data), FPS, 32, 0).frames)
    expected = list(media.read(folder / 'old.flv', FPS, 32, 0).frames)
    first = round(window.start * FPS)
    differences = [np.abs(a.astype(float) - b).mean() for a, b in zip(shown, expected[first:])]
    assert len(differences) == FPS
    # Where the picture changes, the clip's 25 a second may be one late.
    assert np.mean(np.array(differences) < 12) >= 0.8

    html = client.post('/', data={'query': 'red stripes'}).text
    assert f'src="/clip/{number}"' in html or 'old.flv' not in html
    assert client.get('/clip/999999').status_code == 404


def io_file(folder, content):
    """A file of this content, outside of the indexed folder."""
    path = folder.parent / 'clip of the page.mp4'
    path.write_bytes(content)
    return path


def test_sound_that_browsers_do_not_play_becomes_wav(tmp_path, folder):
    with av.open(str(tmp_path / 'tone.aiff'), 'w') as file:
        stream = file.add_stream('pcm_s16be', rate=8000, layout='mono')
        time = np.arange(4 * 8000) / 8000
        samples = (9000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format='s16', layout='mono')
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    assert not short_clips.plays_in_browsers(tmp_path / 'tone.aiff')
    kind, content = short_clips.short_clip(tmp_path / 'tone.aiff', 1.0, 2.0)
    assert kind == 'audio/wav'
    with wave.open(io.BytesIO(content)) as file:
        assert file.getnframes() == file.getframerate()
        heard = np.frombuffer(file.readframes(file.getnframes()), '<i2')
    spectrum = np.abs(np.fft.rfft(heard.astype(float)))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize('name, plays', [('a.mp4', True), ('tone.m4a', True), ('old.flv', False)])
def test_which_files_browsers_play(folder, name, plays):
    assert short_clips.plays_in_browsers(folder / name) == plays


def test_a_codec_that_browsers_lack_makes_a_clip(tmp_path):
    with av.open(str(tmp_path / 'old.mp4'), 'w') as file:
        stream = file.add_stream('mpeg4', rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 32, 32, 'yuv420p'
        for _ in range(8):
            picture = np.zeros((32, 32, 3), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        file.mux(stream.encode())
    assert not short_clips.plays_in_browsers(tmp_path / 'old.mp4')
    _, content = short_clips.short_clip(tmp_path / 'old.mp4', 0.0, 0.5)
    assert as_a_browser_reads(content)[0] == ['h264']


def test_the_page_has_an_icon(client):
    answer = client.get('/favicon.ico')
    assert answer.status_code == 200
    assert answer.mimetype == 'image/svg+xml'


def test_nothing_else_is_served(client, searcher, folder, tmp_path):
    for url in (
        '/media/999999',
        '/thumbnail/999999',
        '/clip/-1',
        '/media/-1',
        '/media/../index.sqlite',
        '/media/%2e%2e%2fetc%2fpasswd',
        '/static/../page.py',
        '/static/%2e%2e/page.py',
        '/media//etc/passwd',
    ):
        assert client.get(url).status_code in (404, 405), url
    assert client.get('/', headers={'Host': 'evil.example'}).status_code == 400

    # A file that becomes a link out of the folder is no longer served.
    number = window_named(searcher, b'silent.mp4')
    secret = tmp_path / 'secret.mp4'
    secret.write_bytes(b'secret')
    kept = tmp_path / 'kept.mp4'
    shutil.move(folder / 'silent.mp4', kept)
    try:
        (folder / 'silent.mp4').symlink_to(secret)
        assert client.get(f'/media/{number}').status_code == 404
        assert client.get(f'/thumbnail/{number}').status_code == 404
    finally:
        (folder / 'silent.mp4').unlink()
        shutil.move(kept, folder / 'silent.mp4')
    assert client.get(f'/media/{number}').status_code == 200


def test_the_page_in_a_browser(app, searcher, folder, tmp_path):
    """A sentence, then a file; a clip plays from its time; nothing is wider than the window."""
    if browser.CHROMIUM is None:
        pytest.skip('there is no chromium')
    from werkzeug.serving import make_server

    server = make_server('127.0.0.1', 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    screenshots = pathlib.Path(os.environ.get('SCREENSHOTS', tmp_path))
    page = browser.Browser(tmp_path / 'profile')
    try:
        address = f'http://127.0.0.1:{server.server_port}/'
        page.go_to(address)
        page.run('document.querySelector("[name=query]").value = "red stripes"; 1')
        page.submit('button')
        names = page.run('[...document.querySelectorAll(".name")].map(x => x.innerText)')
        assert f'more/{HOSTILE}' in names
        assert page.run('document.querySelectorAll("img[src=x]").length') == 0
        pictures = (
            'performance.getEntriesByType("resource").filter('
            'x => x.name.includes("/thumbnail/") && x.responseEnd > 0).length'
        )
        page.wait_for(f'{pictures} >= {len(names)}')
        for width in (1280, 400):
            page.resize(width)
            assert page.run('document.documentElement.scrollWidth') <= width
            page.screenshot(screenshots / f'search-{width}.png', whole=True)

        # Played from the time of its window.
        last = '[...document.querySelectorAll("video")].find(x => !/#t=0\\.0,/.test(x.src))'
        start = float(page.run(f'({last}).src').split('#t=')[1].split(',')[0])
        assert start > 0
        if page.run("document.createElement('video').canPlayType('video/mp4; codecs=avc1')"):
            page.run(f'({last}).muted = true; ({last}).play()')
            page.wait_for(f'({last}).currentTime > 0')
            assert page.run(f'({last}).currentTime') >= start - 0.1

        page.choose_file('[name=file]', folder / 'a.mp4')
        page.run('document.querySelector("[name=query]").value = ""; 1')
        page.submit('button')
        assert 'hits for the file a.mp4' in page.run('document.body.innerText')
        assert page.run('document.querySelector(".name").innerText') in ('a.mp4', 'old.flv')
        # Everything came from this machine.
        for requested in page.requests:
            assert requested.startswith((address, 'about:')), requested
        complaints = [text for text in page.messages if '404' not in text]
        assert complaints == []
    finally:
        page.close()
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken(searcher):
    pytest.importorskip('flask')
    from vatt_jax.search import page

    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        with pytest.raises(ConfigError, match='--port: expected a free port'):
            page.serve(searcher, taken.getsockname()[1])
