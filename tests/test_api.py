"""vatt_jax.load(…).embed(…) as a user calls it, against the encoder's own pass over the data."""

import pathlib
import shutil

import numpy as np
import pytest

import data_pipelines
import vatt_jax
from vatt_jax.config import ConfigError
from vatt_jax.modes import embed as embed_mode

FRAMES, SIZE, SAMPLES, RATE = (
    4,
    16,
    1024,
    2000,
)  # of tests/tiny.py; its windows are half a second at 8 fps


@pytest.fixture(scope='module')
def model(tiny_run):
    return vatt_jax.load(tiny_run[0])


@pytest.fixture(scope='module')
def clips(tiny_run):
    return next(iter(tiny_run[2].one_pass('test', 8, limit=8)))


def pictures(t=FRAMES, h=SIZE, w=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def same(a, b, atol=1e-5):
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=atol)


def test_a_run_folder_and_one_checkpoint_load_alike(tiny_run, model, clips):
    folder, config, _ = tiny_run
    other = vatt_jax.load(str(folder / 'checkpoints' / '2'))
    same(
        model.embed(video=clips['video']['data'][0])['video'],
        other.embed(video=clips['video']['data'][0])['video'],
        0,
    )
    assert (
        other.config.model == config.model
        and other.info['labels']['class']
        and 'video: 4 frames of 16×16 at 8 fps' in repr(other)
    )
    assert 'encoders_video/layers/query/kernel' in other.paths()


def test_embed_agrees_with_mode_embed(tiny_run, model, clips, tmp_path):
    """The same clips through `run.py --mode=embed` on a copy of the folder: same numbers for frames, sound and words."""
    folder, config, data = tiny_run
    shutil.copytree(folder / 'checkpoints', tmp_path / 'checkpoints')
    embed_mode.run(config, tmp_path, data_pipelines.open, split='test')
    with np.load(tmp_path / 'embeddings' / 'test.npz') as stored:
        written = {k: stored[k] for k in stored.files}
    assert (
        written['index'].tolist() == list(range(data.size('test', 'segments')))
        and written['id'][3] == 'test/3'
    )
    captions = [t['caption'] for t in data.texts('test')[:8]]
    out = model.embed(video=clips['video']['data'], audio=clips['audio']['data'], text=captions)
    assert {m: set(v) for m, v in out.items()} == {
        'video': {'pooled', 'va', 'vat'},
        'audio': {'pooled', 'va'},
        'text': {'pooled', 'vat'},
    }
    for modality, stream in (('video', 'video'), ('audio', 'audio'), ('text', 'text.caption')):
        for key, value in out[modality].items():
            stored = written[f'pooled/{stream}' if key == 'pooled' else f'space/{key}/{stream}'][:8]
            np.testing.assert_allclose(
                value, stored[:, 0] if modality == 'text' else stored, atol=1e-5
            )


def test_shapes_and_unit_length(model):
    out = model.embed(
        video=pictures(), audio=np.zeros(SAMPLES, np.int16), text='red stripes move left'
    )
    assert {k: v.shape for k, v in out['video'].items()} == {
        'pooled': (32,),
        'va': (16,),
        'vat': (8,),
    }  # one item, no batch axis
    assert {k: v.shape for k, v in out['audio'].items()} == {'pooled': (32,), 'va': (16,)}
    assert {k: v.shape for k, v in out['text'].items()} == {'pooled': (32,), 'vat': (8,)}
    out = model.embed(
        video=[pictures(seed=s) for s in range(3)], text=['a', 'red', 'never seen words']
    )
    assert (
        out['video']['vat'].shape == out['text']['vat'].shape == (3, 8)
        and out['video']['va'].dtype == np.float32
    )
    for features in out.values():
        for name, x in features.items():
            if name != 'pooled':
                np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    assert model.embed(video=pictures()[None])['video']['va'].shape == (1, 16)
    assert model.embed(text=('red',))['text']['vat'].shape == (1, 8)
    assert np.isfinite(model.embed(text='')['text']['vat']).all()


def test_video_of_any_size_and_length(model):
    """A list of mixed clips is each clip alone; of a longer one the middle counts, a shorter one repeats, a wide one's middle square."""
    mixed = [
        pictures(4, 16, 16, 0),
        pictures(7, 40, 64, 1),
        pictures(2, 16, 16, 2),
        pictures(5, 9, 11, 3),
        pictures(4, 16, 16, 4),
    ]
    together = model.embed(video=mixed, batch_size=2)['video']
    for i, clip in enumerate(mixed):
        same({k: v[i] for k, v in together.items()}, model.embed(video=clip)['video'])
    long = pictures(10)
    same(model.embed(video=long)['video'], model.embed(video=long[3:7])['video'], 0)
    short = pictures(2)
    same(model.embed(video=short)['video'], model.embed(video=short[[0, 1, 0, 1]])['video'], 0)
    wide = pictures(4, 32, 52)
    same(model.embed(video=wide)['video'], model.embed(video=wide[:, :, 10:42])['video'], 0)


def test_size_of_the_frames_hardly_matters(model):
    """A smooth picture at five sizes: nearly the same embedding, and far from another picture's."""

    def smooth(n, turn=0.0):
        y, x = (np.arange(n) + 0.5)[:, None] / n, (np.arange(n) + 0.5)[None] / n
        wave = np.stack(
            [np.sin(3 * x + turn + c) * np.cos(2 * y + c) + 0 * y for c in range(3)], -1
        )
        return np.broadcast_to((127 + 120 * wave).astype(np.uint8), (FRAMES, n, n, 3))

    embed = lambda *a: model.embed(video=smooth(*a))['video']['pooled']
    spread = np.linalg.norm(embed(16, 2.0) - embed(16))
    for n in (24, 32, 64, 200):
        assert np.linalg.norm(embed(n) - embed(16)) < 0.1 * spread


def test_audio_int16_float_and_other_rates(model):
    t = np.arange(3 * SAMPLES) / RATE
    wave = 0.5 * np.sin(2 * np.pi * 200 * t)
    pcm = np.round(wave * 32768).astype(np.int16)
    want = model.embed(audio=pcm)['audio']
    same(model.embed(audio=wave)['audio'], want)
    same(model.embed(audio=wave.astype(np.float32))['audio'], want)
    same(model.embed(audio=pcm[SAMPLES : 2 * SAMPLES])['audio'], want)  # the middle
    same(model.embed(audio=pcm, rate=RATE)['audio'], want)
    batch = model.embed(audio=np.stack([pcm, pcm[::-1]]))['audio']
    same({k: v[0] for k, v in batch.items()}, want)
    same(model.embed(audio=list(wave))['audio'], want)  # a list of numbers is one sound
    four = np.arange(12 * SAMPLES) / (4 * RATE)
    away = model.embed(audio=0.5 * np.sin(2 * np.pi * 430 * t))['audio']['pooled']
    close = model.embed(audio=0.5 * np.sin(2 * np.pi * 200 * four), rate=4 * RATE)['audio'][
        'pooled'
    ]
    assert np.linalg.norm(close - want['pooled']) < 0.1 * np.linalg.norm(away - want['pooled'])
    same(
        model.embed(audio=pcm[:300])['audio'],
        model.embed(audio=np.resize(pcm[:300], SAMPLES))['audio'],
    )  # a short one repeats


def test_media_files(model, tmp_path):
    """An mp4 by its path: its pictures and, from the same window, its sound; another sound may be given instead."""
    from data_pipelines import media

    t, s = np.arange(16), np.arange(4000)
    frames = np.broadcast_to((40 + 12 * t).astype(np.uint8)[:, None, None, None], (16, 32, 32, 3))
    sound = (9000 * np.sin(2 * np.pi * 200 * s / RATE) * (s / 4000)).astype(np.int16)
    both, silent = tmp_path / 'both.mp4', tmp_path / 'silent.mp4'
    # stored at a rate that AAC knows
    media.write_mp4(
        both, frames, 8, np.interp(np.arange(16000) / 8000, s / RATE, sound).astype(np.int16), 8000
    )
    media.write_mp4(silent, frames, 8)
    out = model.embed(video=both)
    assert set(out) == {'video', 'audio'} and out['video']['va'].shape == out['audio'][
        'va'
    ].shape == (16,)
    decoded = media.read(both, 8.0, SIZE, RATE)
    pictures_, heard = np.stack(list(decoded.frames)), decoded.audio
    assert len(pictures_) == 16
    same(out['video'], model.embed(video=pictures_[6:10])['video'], 0)
    same(
        out['audio'], model.embed(audio=heard[1500 : 1500 + SAMPLES])['audio'], 0
    )  # frame 6 of 8 fps is second 0.75
    batch = model.embed(video=[str(both), pictures_[6:10]])
    assert set(batch) == {'video'}  # one item has no sound of its own
    same(
        {k: v[0] for k, v in batch['video'].items()},
        {k: v[1] for k, v in batch['video'].items()},
        0,
    )
    assert set(model.embed(video=silent)) == {'video'}
    given = model.embed(video=[both, both], audio=pathlib.Path(both))
    assert given['video']['va'].shape == (2, 16) and given['audio']['va'].shape == (16,)
    for call, sentence in (
        ({'audio': silent}, r"embed\(audio='.*silent.mp4'\): the file has no sound"),
        ({'video': tmp_path / 'nowhere.mp4'}, r"embed\(video='.*nowhere.mp4'\): .*No such file"),
        ({'audio': tmp_path / 'nowhere.mp4'}, r"embed\(audio='.*nowhere.mp4'\): .*No such file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            model.embed(**call)
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(both.read_bytes()[:700])
    for modality in ('video', 'audio'):
        with pytest.raises(ConfigError, match='broken.mp4.*corrupt'):
            model.embed(**{modality: broken})


@pytest.mark.parametrize(
    'call, sentence',
    [
        ({}, r'embed\(\) was given nothing; name at least one of video=, audio=, text='),
        ({'video': []}, r'embed\(video=\[\]\): the list is empty'),
        (
            {'video': np.zeros((4, 16, 16, 3), np.float32)},
            r'embed\(video=…\): expected uint8 frames \[T H W 3\] .*, got float32 \[4, 16, 16, 3\]',
        ),
        ({'video': np.zeros((4, 16, 16, 1), np.uint8)}, r'got uint8 \[4, 16, 16, 1\]'),
        ({'video': np.zeros((16, 16, 3), np.uint8)}, r'got uint8 \[16, 16, 3\]'),
        ({'video': np.zeros((0, 16, 16, 3), np.uint8)}, r'got uint8 \[0, 16, 16, 3\]'),
        (
            {'audio': np.zeros(8, np.int32)},
            r'embed\(audio=…\): expected int16 or float samples \[S\] \(mono\), got int32 \[8\]',
        ),
        ({'audio': np.zeros((2, 2, 8), np.int16)}, r'got int16 \[2, 8\]'),
        ({'audio': np.zeros(0, np.int16)}, r'got int16 \[0\]'),
        (
            {'audio': np.full(8, 3.5)},
            r'expected finite floats in \[-1, 1\], got magnitudes up to 3.5',
        ),
        ({'audio': np.full(8, np.nan)}, r'finite floats'),
        ({'audio': np.zeros(8), 'rate': 0}, r'rate=0\): expected a positive number'),
        ({'text': [3]}, r'embed\(text=…\): expected strings, got int'),
        ({'text': [None]}, r'got NoneType'),
    ],
)
def test_wrong_input_is_a_sentence(model, call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        model.embed(**call)


def test_unreadable_folders_are_sentences(tiny_run, tmp_path):
    with pytest.raises(ConfigError, match='holds no checkpoint: expected a run folder'):
        vatt_jax.load(tmp_path / 'nowhere')
    shutil.copytree(tiny_run[0] / 'checkpoints' / '2', tmp_path / '2')
    shutil.rmtree(tmp_path / '2' / 'meta')
    (tmp_path / '2' / 'meta').mkdir()
    with pytest.raises(ConfigError, match='is damaged .meta/.* is missing'):
        vatt_jax.load(tmp_path / '2')
    (tmp_path / '2' / 'manifest.json').unlink()  # as of runs before there were digests
    with pytest.raises(ConfigError, match='cannot be read'):
        vatt_jax.load(tmp_path / '2')
