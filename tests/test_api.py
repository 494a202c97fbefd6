"""vatt_jax.load(…).embed(…) as a user calls it, against the encoder's own pass over the data."""

import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

import data_pipelines
import vatt_jax
from data_pipelines import media
from vatt_jax.config import ConfigError
from vatt_jax.modes import embed as embed_mode

# Of tests/tiny.py; its windows are half a second at 8 fps.
FRAMES, SIZE, SAMPLES, RATE = 4, 16, 1024, 2000


@pytest.fixture(scope='module')
def model(tiny_run):
    folder, _, _ = tiny_run
    return vatt_jax.load(folder)


@pytest.fixture(scope='module')
def clips(tiny_run):
    """The first batch of the test split."""
    _, _, data = tiny_run
    return next(iter(data.one_pass('test', 8, limit=8)))


def random_frames(t=FRAMES, h=SIZE, w=SIZE, seed=0):
    """uint8 [t h w 3]."""
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def tone(pitch, count, rate=RATE):
    """`count` samples of a sine in [-0.5, 0.5]."""
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(count) / rate)


def assert_same(a, b, atol=1e-5):
    """The same names, shapes and dtypes, and values within `atol`."""
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_close(a, b, rtol=1e-7, atol=atol)


def item(features, i):
    """Features of the i-th item of a batch."""
    return jax.tree.map(lambda x: x[i], features)


def shapes(features):
    return {name: x.shape for name, x in features.items()}


def test_a_run_folder_and_one_checkpoint_load_alike(tiny_run, model, clips):
    folder, _, _ = tiny_run
    other = vatt_jax.load(str(folder / 'checkpoints' / '2'))
    video = clips['video']['data'][0]
    chex.assert_trees_all_equal(other.embed(video=video), model.embed(video=video), strict=True)
    assert other.config.model == model.config.model
    assert other.info['labels']['class']
    assert 'video: 4 frames of 16×16 at 8 fps' in repr(other)
    assert 'encoders_video/layers/query/kernel' in other.paths()


def test_embed_agrees_with_mode_embed(tiny_run, model, clips, tmp_path):
    """The clips through `run.py --mode=embed` on a copy of the folder give the same numbers."""
    folder, config, data = tiny_run
    shutil.copytree(folder / 'checkpoints', tmp_path / 'checkpoints')
    embed_mode.run(config, tmp_path, data_pipelines.open, split='test')
    with np.load(tmp_path / 'embeddings' / 'test.npz') as file:
        stored = {name: file[name] for name in file.files}
    num_segments = data.size('test', 'segments')
    np.testing.assert_array_equal(stored['index'], np.arange(num_segments))
    assert stored['id'][3] == 'test/3'

    captions = [text['caption'] for text in data.texts('test')[:8]]
    out = model.embed(video=clips['video']['data'], audio=clips['audio']['data'], text=captions)
    expected = {
        'video': {
            'pooled': stored['pooled/video'][:8],
            'va': stored['space/va/video'][:8],
            'vat': stored['space/vat/video'][:8],
        },
        'audio': {
            'pooled': stored['pooled/audio'][:8],
            'va': stored['space/va/audio'][:8],
        },
        # [N 1 …]: one caption a clip.
        'text': {
            'pooled': stored['pooled/text.caption'][:8, 0],
            'vat': stored['space/vat/text.caption'][:8, 0],
        },
    }
    assert_same(out, expected)


class SeveralCaptions:
    """Data of which clip i has 1 + i % 3 captions, all of them its one."""

    def __init__(self, data):
        self.data = data
        self.texts = data.texts

    def one_pass(self, *args, **options):
        for batch in self.data.one_pass(*args, **options):
            stream = batch['text.caption']
            count = 1 + batch['position'] % 3
            stream['data'] = np.repeat(stream['data'], 3, axis=1)
            stream['mask'] = stream['mask'] & (np.arange(3) < count[:, None])
            yield batch


def test_embeddings_of_several_captions_say_which_there_are(tiny_run, tmp_path):
    folder, config, data = tiny_run
    shutil.copytree(folder / 'checkpoints', tmp_path / 'checkpoints')
    embed_mode.run(config, tmp_path, lambda config: SeveralCaptions(data), split='test')
    with np.load(tmp_path / 'embeddings' / 'test.npz') as file:
        captions, mask = file['space/vat/text.caption'], file['mask/text.caption']
    chex.assert_shape(captions, (None, 3, 8))
    for number, row in enumerate(mask):
        assert row.tolist() == [k < 1 + number % 3 for k in range(3)]


def test_shapes_of_single_items(model):
    out = model.embed(
        video=random_frames(), audio=np.zeros(SAMPLES, np.int16), text='red stripes move left'
    )
    # No batch axis.
    assert shapes(out['video']) == {'pooled': (32,), 'va': (16,), 'vat': (8,)}
    assert shapes(out['audio']) == {'pooled': (32,), 'va': (16,)}
    assert shapes(out['text']) == {'pooled': (32,), 'vat': (8,)}


def test_shapes_and_unit_length_of_lists(model):
    video = [random_frames(seed=seed) for seed in range(3)]
    out = model.embed(video=video, text=['a', 'red', 'never seen words'])
    chex.assert_shape([out['video']['vat'], out['text']['vat']], (3, 8))
    chex.assert_type(jax.tree.leaves(out), np.float32)
    for features in out.values():
        for name, x in features.items():
            if name != 'pooled':
                np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)


def test_a_batch_of_one_has_a_batch_axis(model):
    chex.assert_shape(model.embed(video=random_frames()[None])['video']['va'], (1, 16))
    chex.assert_shape(model.embed(text=('red',))['text']['vat'], (1, 8))


def test_the_empty_sentence_has_finite_features(model):
    chex.assert_tree_all_finite(model.embed(text=''))


def test_video_of_any_size_and_length(model):
    """A list of mixed clips is each clip alone."""
    mixed = [
        random_frames(4, 16, 16, 0),
        random_frames(7, 40, 64, 1),
        random_frames(2, 16, 16, 2),
        random_frames(5, 9, 11, 3),
        random_frames(4, 16, 16, 4),
    ]
    together = model.embed(video=mixed, batch_size=2)
    for i, clip in enumerate(mixed):
        assert_same(item(together, i), model.embed(video=clip))


def test_what_of_a_video_is_seen(model):
    """Of a longer one the middle, a shorter one repeats, of a wide one the middle square."""
    long = random_frames(10)
    assert_same(model.embed(video=long), model.embed(video=long[3:7]), 0)
    short = random_frames(2)
    assert_same(model.embed(video=short), model.embed(video=short[[0, 1, 0, 1]]), 0)
    wide = random_frames(4, 32, 52)
    assert_same(model.embed(video=wide), model.embed(video=wide[:, :, 10:42]), 0)


def smooth_picture(size, phase=0.0):
    """The same smooth picture at any size, as a clip that stands still."""
    centres = (np.arange(size) + 0.5) / size
    y, x = centres[:, None], centres[None]
    channels = [np.sin(3 * x + phase + c) * np.cos(2 * y + c) for c in range(3)]
    picture = (127 + 120 * np.stack(channels, -1)).astype(np.uint8)
    return np.broadcast_to(picture, (FRAMES, size, size, 3))


def test_size_of_the_frames_hardly_matters(model):
    """A smooth picture at five sizes: nearly one embedding, and far from another picture's."""

    def embed(*picture):
        return model.embed(video=smooth_picture(*picture))['video']['pooled']

    spread = np.linalg.norm(embed(16, 2.0) - embed(16))
    for size in (24, 32, 64, 200):
        assert np.linalg.norm(embed(size) - embed(16)) < 0.1 * spread


def test_audio_as_int16_float_list_and_batch(model):
    wave = tone(200, 3 * SAMPLES)
    pcm = np.round(wave * 32768).astype(np.int16)
    expected = model.embed(audio=pcm)
    assert_same(model.embed(audio=wave), expected)
    assert_same(model.embed(audio=wave.astype(np.float32)), expected)
    assert_same(model.embed(audio=list(wave)), expected)  # a list of numbers is one sound
    batch = model.embed(audio=np.stack([pcm, pcm[::-1]]))
    assert_same(item(batch, 0), expected)


def test_what_of_a_sound_is_heard(model):
    """Of a longer one the middle; a shorter one repeats."""
    pcm = np.round(tone(200, 3 * SAMPLES) * 32768).astype(np.int16)
    assert_same(model.embed(audio=pcm), model.embed(audio=pcm[SAMPLES : 2 * SAMPLES]))
    repeated = np.resize(pcm[:300], SAMPLES)
    assert_same(model.embed(audio=pcm[:300]), model.embed(audio=repeated))


def test_audio_of_other_rates(model):
    pcm = np.round(tone(200, 3 * SAMPLES) * 32768).astype(np.int16)
    expected = model.embed(audio=pcm)
    assert_same(model.embed(audio=pcm, rate=RATE), expected)
    resampled = model.embed(audio=tone(200, 12 * SAMPLES, 4 * RATE), rate=4 * RATE)
    other = model.embed(audio=tone(430, 3 * SAMPLES))
    pooled = expected['audio']['pooled']
    distance = np.linalg.norm(resampled['audio']['pooled'] - pooled)
    assert distance < 0.1 * np.linalg.norm(other['audio']['pooled'] - pooled)


@pytest.fixture(scope='module')
def media_files(tmp_path_factory):
    """(both.mp4, silent.mp4): two seconds that become brighter; a sound that becomes louder."""
    folder = tmp_path_factory.mktemp('media')
    brightness = (40 + 12 * np.arange(16)).astype(np.uint8)
    frames = np.broadcast_to(brightness[:, None, None, None], (16, 32, 32, 3))
    sample = np.arange(4000)
    sound = 9000 * np.sin(2 * np.pi * 200 * sample / RATE) * (sample / 4000)
    # Stored at a rate that AAC knows.
    stored = np.interp(np.arange(16000) / 8000, sample / RATE, sound.astype(np.int16))
    media.write_mp4(folder / 'both.mp4', frames, 8, stored.astype(np.int16), 8000)
    media.write_mp4(folder / 'silent.mp4', frames, 8)
    return folder / 'both.mp4', folder / 'silent.mp4'


def test_a_media_file_gives_pictures_and_sound_of_one_window(model, media_files):
    both, silent = media_files
    out = model.embed(video=both)
    assert set(out) == {'video', 'audio'}
    chex.assert_shape([out['video']['va'], out['audio']['va']], (16,))
    decoded = media.read(both, 8.0, SIZE, RATE)
    frames, sound = np.stack(list(decoded.frames)), decoded.audio
    chex.assert_axis_dimension(frames, 0, 16)
    # Frame 6 of 8 fps is second 0.75.
    expected = model.embed(video=frames[6:10], audio=sound[1500 : 1500 + SAMPLES])
    assert_same(out, expected, 0)
    assert set(model.embed(video=silent)) == {'video'}

    # Frames have no sound of their own, nor has one of the files: their rows are marked.
    batch = model.embed(video=[str(both), frames[6:10], silent])
    np.testing.assert_array_equal(batch['audio']['valid'], [True, False, False])
    assert_same(item(batch['video'], 0), item(batch['video'], 1))
    assert_same(batch['audio']['va'][0], out['audio']['va'])
    assert not batch['audio']['va'][1:].any()
    assert set(model.embed(video=[silent, frames])) == {'video'}


def test_another_sound_may_be_given_beside_a_media_file(model, media_files):
    both, _ = media_files
    out = model.embed(video=[both, both], audio=pathlib.Path(both))
    chex.assert_shape(out['video']['va'], (2, 16))
    chex.assert_shape(out['audio']['va'], (16,))


def test_media_files_that_cannot_be_read_are_sentences(model, media_files, tmp_path):
    both, silent = media_files
    nowhere = tmp_path / 'nowhere.mp4'
    for call, message in (
        ({'audio': silent}, r"embed\(audio='.*silent.mp4'\): the file has no sound"),
        ({'video': nowhere}, r"embed\(video='.*nowhere.mp4'\): .*No such file"),
        ({'audio': nowhere}, r"embed\(audio='.*nowhere.mp4'\): .*No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.embed(**call)
    broken = tmp_path / 'broken.mp4'
    broken.write_bytes(both.read_bytes()[:700])
    for modality in ('video', 'audio'):
        with pytest.raises(ConfigError, match='broken.mp4.*corrupt'):
            model.embed(**{modality: broken})


@pytest.mark.parametrize(
    'call, message',
    [
        ({}, r'embed\(\) was given nothing; name at least one of video=, audio=, text='),
        ({'video': []}, r'embed\(video=\[\]\): the list is empty'),
        ({'video': np.zeros((0, 16, 16, 3), np.uint8)}, r'got uint8 \[0, 16, 16, 3\]'),
        ({'audio': np.zeros((2, 2, 8), np.int16)}, r'got int16 \[2, 8\]'),
        ({'audio': np.zeros(0, np.int16)}, r'got int16 \[0\]'),
        (
            {'audio': np.full(8, 3.5)},
            r'expected finite floats in \[-1, 1\], got magnitudes up to 3.5',
        ),
        ({'audio': np.full(8, np.nan)}, r'finite floats'),
        ({'audio': np.zeros(8), 'rate': 0}, r'rate=0\): expected samples per second'),
        ({'text': [3]}, r'embed\(text=…\): expected strings, got int'),
        ({'text': [None]}, r'got NoneType'),
    ],
)
def test_wrong_input_is_a_sentence(model, call, message):
    with pytest.raises(ConfigError, match=message):
        model.embed(**call)


def test_unreadable_folders_are_sentences(tiny_run, tmp_path):
    folder, _, _ = tiny_run
    with pytest.raises(ConfigError, match='holds no checkpoint: expected a run folder'):
        vatt_jax.load(tmp_path / 'nowhere')
    checkpoint = tmp_path / '2'
    shutil.copytree(folder / 'checkpoints' / '2', checkpoint)
    shutil.rmtree(checkpoint / 'meta')
    (checkpoint / 'meta').mkdir()
    with pytest.raises(ConfigError, match='is damaged .meta/.* is missing'):
        vatt_jax.load(checkpoint)
    (checkpoint / 'manifest.json').unlink()  # as of runs before there were digests
    with pytest.raises(ConfigError, match='cannot be read'):
        vatt_jax.load(checkpoint)
