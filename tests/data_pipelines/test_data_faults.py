"""What goes wrong with real files and disks, and is not tested elsewhere; docs/data.md has the table of all."""

import contextlib
import resource

import av
import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, clock, write_wav
from test_data_prepare import SMALL, folder_of

from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import annotation_files, decoded_files
from data_pipelines.storage.records import Prepared, Split


def test_zero_bytes_and_wrong_extensions(tmp_path):
    """The content decides: an mp4 called .avi is read, a text or a picture called .mp4 is skipped, a wav called .mp4 is sound alone."""
    folder = tmp_path / 'videos'
    folder_of(folder, 1)
    whole = (folder / 'v0.mp4').read_bytes()
    (folder / 'empty.mp4').write_bytes(b'')
    (folder / 'called.avi').write_bytes(whole)
    (folder / 'text.mp4').write_text('not a film\n' * 50)
    (folder / 'page.webm').write_text('<html>404</html>')
    write_wav(folder / 'sound.mp4', clock(1.0)[1])
    result = prepare.prepare(str(folder), '', str(tmp_path / 'out'), **SMALL, validation=0, test=0)
    assert {k: v.split(':')[0] for k, v in result['skipped'].items()} == dict.fromkeys(
        ('empty.mp4', 'text.mp4', 'page.webm'), 'corrupt'
    )
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    frames = dict(zip(list(index.id), index.frames.tolist()))
    assert frames == {'v0.mp4': 10, 'called.avi': 10, 'sound.mp4': 0}


@pytest.mark.parametrize(
    'layout, rate', [('5.1', 48000), ('5.1', 44100), ('mono', 44100), ('stereo', 22050)]
)
def test_many_channels_and_other_rates_become_mono_in_time(tmp_path, layout, rate):
    frames, _ = clock(2.0)
    tone = (6000 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)).astype(np.int16)
    tone[rate:] = 0  # a tone for a second, then silence
    channels = len(av.AudioLayout(layout).channels)
    with av.open(str(tmp_path / 'a.mkv'), 'w') as c:
        v = c.add_stream('libx264', rate=FPS)
        v.height, v.width, v.pix_fmt = *frames.shape[1:3], 'yuv420p'
        a = c.add_stream('pcm_s16le', rate=rate, layout=layout)
        for f in frames:
            c.mux(v.encode(av.VideoFrame.from_ndarray(f, format='rgb24')))
        c.mux(v.encode())
        sound = av.AudioFrame.from_ndarray(
            np.repeat(tone, channels)[None], format='s16', layout=layout
        )
        sound.sample_rate, sound.pts = rate, 0
        c.mux(a.encode(sound))
        c.mux(a.encode())
    got = media.read(tmp_path / 'a.mkv', FPS, SIZE, RATE)
    pcm = media.fit_audio(got.audio, len(list(got.frames)), FPS, RATE).astype(float)
    assert (
        len(pcm) == 2 * RATE
        and np.abs(pcm[RATE + 200 :]).max() < 100 < np.abs(pcm[: RATE - 200]).max()
    )
    spectrum = np.abs(np.fft.rfft(pcm[:RATE] * np.hanning(RATE)))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_captions_beyond_the_end(tmp_path):
    folder_of(tmp_path / 'videos', 1)
    (tmp_path / 'c.csv').write_text(
        'video,start,end,text\nv0.mp4,0,0.5,inside\nv0.mp4,0.6,9,over it\nv0.mp4,1.2,2,behind it\n'
    )
    prepare.prepare(
        str(tmp_path / 'videos'),
        str(tmp_path / 'c.csv'),
        str(tmp_path / 'out'),
        **SMALL,
        validation=0,
        test=0,
    )
    index = Split(Prepared(tmp_path / 'out'), 'train').index
    assert list(index.sentence_text) == ['inside', 'over it']
    np.testing.assert_allclose(index.sentence_end, [0.5, 1.0])


@pytest.mark.parametrize(
    'name, text',
    [('c.csv', 'video,start,end,text\na,0,1,caf\xe9\n'), ('c.json', '{"a": ["caf\xe9"]}')],
)
def test_captions_that_are_not_utf8_are_one_sentence(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode('latin-1'))
    with pytest.raises(DataError, match=rf'{name}.*utf-?8'):
        annotation_files.read_captions(tmp_path / name)


def test_truncated_shard(tmp_path):
    prepare.prepare(
        folder_of(tmp_path / 'videos', 2), '', str(tmp_path / 'out'), **SMALL, validation=0, test=0
    )
    shard = next((tmp_path / 'out').glob('*array_record*'))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match='is not the file of .* prepare it again with --overwrite'):
        Split(Prepared(tmp_path / 'out'), 'train')
    shard.unlink()
    with pytest.raises(DataError, match='has 0 files .* had 1 .* prepare it again'):
        Split(Prepared(tmp_path / 'out'), 'train')


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
    videos, out = folder_of(tmp_path / 'videos', 4), tmp_path / 'out'
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
    staged = lambda: [p for p in (out / '.staging' / 'files').glob('*/*') if '.' not in p.name]
    with largest_file(10_000):
        assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        'make room and start the same command again' in error
        and error.count('\n') == 1
        and not staged()
    )
    with largest_file(50_000):  # enough for each decoded file, not for the records
        assert prepare.main(arguments) == 2
    assert (
        'make room and start the same command again' in (error := capsys.readouterr().err)
        and error.count('\n') == 1
    )
    assert len(staged()) == 4 and not (out / 'prepare.json').exists()
    with pytest.raises(DataError, match='not finished'):
        Prepared(out)
    monkeypatch.setattr(decoded_files, 'stage', None)  # nothing is decoded again
    assert prepare.main(arguments) == 0
    part = Split(Prepared(out), 'train')
    assert len(part) == 4 and not any(part.read(np.arange(4))[1])
    frames, sound = part.clip(0, range(10), [0])
    assert len(frames) == 10 and np.frombuffer(sound[0], '<i2').shape == (RATE,)
