"""What goes wrong with real files and disks, and is not tested elsewhere.

docs/data.md has the table of all.
"""

import contextlib
import resource

import av
import chex
import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, clock, write_wav
from test_data_prepare import SMALL, staged_files, write_clocks

from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, decoded_files
from data_pipelines.storage.records import Prepared, Split

ALL_TRAIN = {**SMALL, 'validation': 0, 'test': 0}


def test_zero_bytes_and_wrong_extensions(tmp_path):
    """The content decides, not the extension.

    An mp4 called .avi is read, a text or a page called .mp4 is skipped, a wav called .mp4 is sound
    alone.
    """
    folder = tmp_path / 'videos'
    write_clocks(folder, 1)
    whole = (folder / 'v0.mp4').read_bytes()
    (folder / 'empty.mp4').write_bytes(b'')
    (folder / 'called.avi').write_bytes(whole)
    (folder / 'text.mp4').write_text('not a film\n' * 50)
    (folder / 'page.webm').write_text('<html>404</html>')
    write_wav(folder / 'sound.mp4', clock(1.0)[1])
    result = prepare.prepare(str(folder), '', str(tmp_path / 'out'), **ALL_TRAIN)
    reasons = {name: reason.split(':')[0] for name, reason in result['skipped'].items()}
    assert reasons == {'empty.mp4': 'empty', 'text.mp4': 'corrupt', 'page.webm': 'a web page'}
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    num_frames = dict(zip(list(index.id), index.frames.tolist()))
    assert num_frames == {'v0.mp4': 10, 'called.avi': 10, 'sound.mp4': 0}


@pytest.mark.parametrize(
    'layout, rate', [('5.1', 48000), ('5.1', 44100), ('mono', 44100), ('stereo', 22050)]
)
def test_many_channels_and_other_rates_become_mono_in_time(tmp_path, layout, rate):
    """A tone of a second, then silence."""
    frames, _ = clock(2.0)
    tone = 6000 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    tone[rate:] = 0
    channels = len(av.AudioLayout(layout).channels)
    interleaved = np.repeat(tone.astype(np.int16), channels)[None]
    with av.open(str(tmp_path / 'a.mkv'), 'w') as file:
        video = file.add_stream('libx264', rate=FPS)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = 'yuv420p'
        sound = file.add_stream('pcm_s16le', rate=rate, layout=layout)
        for frame in frames:
            file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        file.mux(video.encode())
        samples = av.AudioFrame.from_ndarray(interleaved, format='s16', layout=layout)
        samples.sample_rate = rate
        samples.pts = 0
        file.mux(sound.encode(samples))
        file.mux(sound.encode())

    content = media.read(tmp_path / 'a.mkv', FPS, SIZE, RATE)
    num_frames = len(list(content.frames))
    pcm = media.fit_audio(content.audio, num_frames, FPS, RATE).astype(float)
    chex.assert_shape(pcm, (2 * RATE,))
    assert np.abs(pcm[RATE + 200 :]).max() < 100
    assert np.abs(pcm[: RATE - 200]).max() > 100
    spectrum = np.abs(np.fft.rfft(pcm[:RATE] * np.hanning(RATE)))  # one bin a hertz
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_captions_beyond_the_end(tmp_path):
    videos = write_clocks(tmp_path / 'videos', 1)
    lines = [
        'video,start,end,text',
        'v0.mp4,0,0.5,inside',
        'v0.mp4,0.6,9,over it',
        'v0.mp4,1.2,2,behind it',
    ]
    captions = tmp_path / 'c.csv'
    captions.write_text('\n'.join(lines) + '\n')
    prepare.prepare(videos, str(captions), str(tmp_path / 'out'), **ALL_TRAIN)
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    assert list(index.sentence_text) == ['inside', 'over it']
    np.testing.assert_allclose(index.sentence_end, [0.5, 1.0])


@pytest.mark.parametrize(
    'name, text',
    [('c.csv', 'video,start,end,text\na,0,1,caf\xe9\n'), ('c.json', '{"a": ["caf\xe9"]}')],
)
def test_captions_that_are_not_utf8_are_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode('latin-1'))
    with pytest.raises(DataError, match=rf'{name}, line .: expected UTF-8, .* --encoding=cp1252'):
        annotation_files.read_captions(tmp_path / name)


def test_truncated_shard(tmp_path):
    videos, out = write_clocks(tmp_path / 'videos', 2), tmp_path / 'out'
    prepare.prepare(videos, '', str(out), **ALL_TRAIN)
    shard = next(out.glob('*array_record*'))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match='is not the file of .* prepare it again with --overwrite'):
        Split(Prepared(out), 'train')
    shard.unlink()
    with pytest.raises(DataError, match='has 0 files .* had 1 .* prepare it again'):
        Split(Prepared(out), 'train')


@contextlib.contextmanager
def largest_file(size):
    """The disk takes no file longer than this: writing fails as on a full one, in libraries too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_decoding_and_while_writing(tmp_path, monkeypatch, capsys):
    videos, out = write_clocks(tmp_path / 'videos', 4), tmp_path / 'out'
    arguments = [
        f'--videos={videos}',
        f'--out={out}',
        f'--fps={FPS}',
        f'--size={SIZE}',
        f'--rate={RATE}',
        '--processes=1',
        '--min_seconds=0.5',
        '--validation=0',
        '--test=0',
        '--quiet',
    ]

    def fails_in_one_sentence():
        """The command fails and says to make room."""
        assert prepare.main(arguments) == 2
        error = capsys.readouterr().err
        assert 'make room and start the same command again' in error
        assert error.count('\n') == 1

    with largest_file(10_000):
        fails_in_one_sentence()
    assert not staged_files(out)
    with largest_file(50_000):  # enough for each decoded file, not for the records
        fails_in_one_sentence()
    assert len(staged_files(out)) == 4
    assert not (out / 'prepare.json').exists()
    with pytest.raises(DataError, match='not finished'):
        Prepared(out)

    monkeypatch.setattr(decoded_files, 'stage_file', None)  # nothing is decoded again
    assert prepare.main(arguments) == 0
    split = Split(Prepared(out), 'train')
    assert len(split) == 4
    _, reasons = split.read(np.arange(4))
    assert not any(reasons)
    frames, sound, _ = split.clip(0, range(10), [0])
    assert len(frames) == 10
    chex.assert_shape(np.frombuffer(sound[0], '<i2'), (RATE,))
