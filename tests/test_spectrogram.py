"""Log-mel spectrograms and log-filterbanks against their definitions.

VATT's log-mel: magnitudes, HTK mel scale, natural log of 1 + 10000 x, stretched to [0, 1].
"""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess, spectrogram
from vatt_jax.models import presets
from vatt_jax.rng import Rng


def fourier_basis(transform, window):
    """Rows are the frequencies 0 … transform/2, columns the samples of a window."""
    frequency = np.arange(transform // 2 + 1)
    sample = np.arange(window)
    return np.exp(-2j * np.pi * np.outer(frequency, sample) / transform)


def htk_mel(hertz):
    return 1127 * np.log(1 + hertz / 700)


def triangle_weight(mel, left, centre, right):
    """The height at `mel` of a triangle that is 1 at its centre and 0 at both ends."""
    rising = (mel - left) / (centre - left)
    falling = (right - mel) / (right - centre)
    return max(0.0, min(rising, falling))


def log_mel_definition(
    samples, rate, bins, window, hop, low, high, offset, scale, stretch, transform=0
):
    """Frame by frame, band by band, float64; the transform as a sum of cosines and sines."""
    transform = transform or window
    hann = 0.5 * (1 - np.cos(2 * np.pi * np.arange(window) / window))
    basis = fourier_basis(transform, window)
    lowest, highest = htk_mel(low), htk_mel(high)
    edges = [lowest + (highest - lowest) * i / (bins + 1) for i in range(bins + 2)]
    num_frames = -(-len(samples) // hop)  # rounded up
    rows = []
    for t in range(num_frames):
        frame = np.zeros(window)
        part = samples[t * hop : t * hop + window]
        frame[: len(part)] = part
        magnitude = np.abs(basis @ (frame * hann))
        row = []
        for b in range(bins):
            total = 0.0
            for k in range(1, transform // 2 + 1):
                mel = htk_mel(k * rate / transform)
                total += magnitude[k] * triangle_weight(mel, *edges[b : b + 3])
            row.append(np.log(offset + scale * total))
        rows.append(row)
    log_mel = np.array(rows)
    if not stretch:
        return log_mel
    return (log_mel - log_mel.min()) / (log_mel.max() - log_mel.min())


@pytest.mark.parametrize(
    'form',
    [
        {'offset': 1.0, 'scale': 1e4, 'stretch': True},
        {'offset': 1e-6, 'scale': 1.0, 'stretch': False},
        {'offset': 1e-6, 'scale': 1.0, 'stretch': False, 'transform': 200},
    ],
)
def test_log_mel_is_its_definition(form):
    mel = {'bins': 7, 'window': 128, 'hop': 64, 'low': 80.0, 'high': 1900.0, **form}
    samples = np.random.default_rng(0).normal(size=(2, 600)) * 0.1
    got = spectrogram.log_mel(jnp.asarray(samples, jnp.float32), 4000, mel)
    expected = np.stack([log_mel_definition(clip, 4000, **mel) for clip in samples])
    assert spectrogram.shape({'samples': 600, 'mel': mel}) == (10, 7)
    chex.assert_shape([got, expected], (2, 10, 7))
    chex.assert_type(got, jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_a_silent_clip_is_finite_and_zero():
    silence = jnp.zeros((1, 4096))
    log_mel = spectrogram.log_mel(silence, 48000, {'hop': 1024})
    chex.assert_tree_all_finite(log_mel)
    np.testing.assert_array_equal(log_mel, 0)


def test_published_shape_of_log_mel():
    audio = {'samples': 153600, 'rate': 48000, 'mel': {'bins': 80}}
    assert spectrogram.shape(audio) == (150, 80)


def test_the_device_stage_makes_log_mel_of_valid_rows():
    audio = {'samples': 4096, 'rate': 48000, 'mel': {'bins': 80}}
    samples = np.random.default_rng(0).integers(-3000, 3000, (2, 4096)).astype(np.int16)
    stream = {'data': jnp.asarray(samples), 'valid': jnp.array([True, False])}
    out = preprocess.device_stage(
        {'audio': stream},
        {'audio': audio},
        {'audio_noise': 0.0},
        Rng.create(0, 0, np.arange(2)),
        augment=True,
        dtype='float32',
    )['audio']['data']
    expected = spectrogram.log_mel(jnp.asarray(samples, jnp.float32) / 32768, 48000, audio['mel'])
    chex.assert_trees_all_equal_shapes_and_dtypes(out, expected)
    np.testing.assert_array_equal(out[0], expected[0])
    np.testing.assert_array_equal(out[1], 0)


def test_bands_above_half_the_rate():
    with pytest.raises(
        ConfigError, match='expected low < high <= 4000 Hz at rate=8000, got .* high=7600'
    ):
        spectrogram.log_mel(jnp.zeros((1, 4096)), 8000, {'bins': 8})


def log10_mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


def hertz_of_log10_mel(mel):
    return 700 * (10 ** (mel / 2595) - 1)


def filterbank_definition(samples, rate, bins, window, hop, transform, low, high):
    """Log-filterbank energies of one clip in 16-bit scale, as speech recognition makes them.

    Band by band, float64.
    """
    x = np.asarray(samples, np.float64) * 32768
    # Pre-emphasis: y_i = x_i - 0.97 x_{i-1}.
    x = np.append(x[0], [x[i] - 0.97 * x[i - 1] for i in range(1, len(x))])
    num_frames = 1 + int(np.ceil((len(x) - window) / hop))
    x = np.concatenate([x, np.zeros(num_frames * hop + window)])
    basis = fourier_basis(transform, window)
    frames = np.stack([x[t * hop : t * hop + window] for t in range(num_frames)])
    power = np.abs(frames @ basis.T) ** 2 / transform
    lowest, highest = log10_mel(low), log10_mel(high)
    corners = []
    for i in range(bins + 2):
        hertz = hertz_of_log10_mel(lowest + (highest - lowest) * i / (bins + 1))
        corners.append(int((transform + 1) * hertz // rate))
    energies = np.zeros((num_frames, bins))
    for b in range(bins):
        first, middle, last = corners[b : b + 3]
        for k in range(first, middle):
            energies[:, b] += power[:, k] * (k - first) / (middle - first)
        for k in range(middle, last):
            energies[:, b] += power[:, k] * (last - k) / (last - middle)
    return np.log(np.where(energies == 0, 2.0**-52, energies))


def test_filterbank_is_its_definition():
    """Some of its bands lie between two frequencies of the transform and are empty."""
    sizes = {'bins': 40, 'window': 60, 'hop': 30, 'transform': 128, 'low': 0.0, 'high': 1900.0}
    mel = {'form': 'filterbank', **sizes}
    samples = np.random.default_rng(0).normal(size=(2, 610)).astype(np.float32) * 0.1
    got = spectrogram.log_mel(jnp.asarray(samples), 4000, mel)
    expected = np.stack([filterbank_definition(clip, 4000, **sizes) for clip in samples])
    assert spectrogram.shape({'samples': 610, 'mel': mel}) == (20, 40)
    chex.assert_shape([got, expected], (2, 20, 40))
    lowest_of_band = expected.min(1)
    assert (lowest_of_band == np.log(2.0**-52)).any()
    assert (lowest_of_band > 0).any()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_published_shape_of_the_filterbank():
    assert spectrogram.shape({'samples': 24000, 'mel': presets.FILTERBANK}) == (99, 257)


def test_decibels_are_their_definition():
    """Frame by frame: a constant component, pairs of frequencies, 100 dB below the loudest."""
    mel = {'form': 'decibels', 'bins': 17, 'window': 64, 'hop': 30, 'low': 0.0, 'high': 2000.0}
    samples = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32) * 0.1
    samples[1, 100:] *= 1e-7
    got = spectrogram.log_mel(jnp.asarray(samples), 4000, mel)
    assert spectrogram.shape({'samples': 300, 'mel': mel}) == (10, 17)
    hann = 0.5 * (1 - np.cos(2 * np.pi * np.arange(64) / 64))
    basis = fourier_basis(64, 64)
    expected = np.zeros((2, 10, 17))
    for clip in range(2):
        padded = np.concatenate([np.float64(samples[clip]), np.zeros(64)])
        for t in range(10):
            power = np.abs(basis @ (padded[t * 30 : t * 30 + 64] * hann)) ** 2
            bands = [power[0], *(power[1 + 2 * b : 3 + 2 * b].mean() for b in range(16))]
            expected[clip, t] = 10 * np.log10(np.maximum(bands, 1e-10))
        floor = expected[clip].max() - 100
        expected[clip] = np.maximum(expected[clip], floor)
    assert (expected[1] == expected[1].min()).sum() > 20
    np.testing.assert_allclose(got, expected, atol=1e-2)
    assert spectrogram.shape({'samples': 48000, 'mel': presets.DECIBELS}) == (200, 257)
    with pytest.raises(ConfigError, match='bins: expected one more than a divisor of 32, .* got 8'):
        spectrogram.shape({'samples': 300, 'mel': {**mel, 'bins': 8}})


def test_a_transform_shorter_than_the_window():
    with pytest.raises(ConfigError, match='transform: expected at least window=128, .* got 64'):
        spectrogram.shape({'samples': 600, 'mel': {'window': 128, 'transform': 64}})
