"""Log-mel against its definition (VATT fact: magnitudes, HTK mel, natural log of 1 + 10000 x, stretched to [0, 1])."""

import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.inputs import preprocess, spectrogram
from vatt_jax.rng import Rng


def definition(x, rate, bins, window, hop, low, high, offset, scale, stretch, transform=0):
    """Frame by frame, band by band, float64; the transform as a sum of cosines and sines."""
    n, transform = np.arange(window), transform or window
    hann = 0.5 * (1 - np.cos(2 * np.pi * n / window))
    wave = np.exp(-2j * np.pi * np.outer(np.arange(transform // 2 + 1), n) / transform)
    mel = lambda f: 1127 * np.log(1 + f / 700)
    edges = [mel(low) + (mel(high) - mel(low)) * i / (bins + 1) for i in range(bins + 2)]
    out = []
    for t in range(-(-len(x) // hop)):
        frame = np.zeros(window)
        part = x[t * hop : t * hop + window]
        frame[: len(part)] = part
        magnitude = np.abs(wave @ (frame * hann))
        row = []
        for b in range(bins):
            total = 0.0
            for k in range(1, transform // 2 + 1):
                m = mel(k * rate / transform)
                total += magnitude[k] * max(
                    0.0,
                    min(
                        (m - edges[b]) / (edges[b + 1] - edges[b]),
                        (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1]),
                    ),
                )
            row.append(np.log(offset + scale * total))
        out.append(row)
    out = np.array(out)
    return (out - out.min()) / (out.max() - out.min()) if stretch else out


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
    x = np.random.default_rng(0).normal(size=(2, 600)) * 0.1
    got = spectrogram.log_mel(jnp.asarray(x, jnp.float32), 4000, mel)
    assert got.shape == (2, *spectrogram.shape({'samples': 600, 'mel': mel})) == (2, 10, 7)
    for b in range(2):
        np.testing.assert_allclose(got[b], definition(x[b], 4000, **mel), rtol=1e-4, atol=2e-5)


def test_a_silent_clip_is_finite_and_zero():
    assert not np.asarray(spectrogram.log_mel(jnp.zeros((1, 4096)), 48000, {'hop': 1024})).any()


def test_published_shape_and_the_device_stage():
    audio = {'samples': 4096, 'rate': 48000, 'mel': {'bins': 80}}
    assert spectrogram.shape({**audio, 'samples': 153600}) == (150, 80)
    stream = {
        'data': np.random.default_rng(0).integers(-3000, 3000, (2, 4096)).astype(np.int16),
        'valid': np.array([True, False]),
    }
    out = preprocess.device_stage(
        {'audio': stream},
        {'audio': audio},
        {'audio_noise': 0.0},
        Rng.create(0, 0, np.arange(2)),
        augment=True,
        dtype='float32',
    )['audio']['data']
    want = spectrogram.log_mel(
        jnp.asarray(stream['data'], jnp.float32) / 32768, 48000, audio['mel']
    )
    np.testing.assert_array_equal(out[0], want[0])
    assert not np.asarray(out[1]).any()


def test_bands_above_half_the_rate():
    with pytest.raises(
        ConfigError, match='expected low < high <= 4000 Hz at rate=8000, got .* high=7600'
    ):
        spectrogram.log_mel(jnp.zeros((1, 4096)), 8000, {'bins': 8})


def bank_definition(x, rate, bins, window, hop, transform, low, high):
    """Log-filterbank energies of one clip in 16-bit scale, as speech recognition makes them, band by band, float64."""
    x = np.asarray(x, np.float64) * 32768
    x = np.append(x[0], [x[i] - 0.97 * x[i - 1] for i in range(1, len(x))])
    frames = 1 + int(np.ceil((len(x) - window) / hop))
    x = np.concatenate([x, np.zeros(frames * hop + window)])
    wave = np.exp(
        -2j * np.pi * np.outer(np.arange(transform // 2 + 1), np.arange(window)) / transform
    )
    power = np.array(
        [np.abs(wave @ x[t * hop : t * hop + window]) ** 2 / transform for t in range(frames)]
    )
    mel, back = lambda f: 2595 * np.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    corner = [
        int((transform + 1) * back(mel(low) + (mel(high) - mel(low)) * i / (bins + 1)) // rate)
        for i in range(bins + 2)
    ]
    out = np.zeros((frames, bins))
    for b in range(bins):
        first, middle, last = corner[b : b + 3]
        for k in range(first, middle):
            out[:, b] += power[:, k] * (k - first) / (middle - first)
        for k in range(middle, last):
            out[:, b] += power[:, k] * (last - k) / (last - middle)
    return np.log(np.where(out == 0, 2.0**-52, out))


def test_filterbank_is_its_definition():
    """Some of its bands lie between two frequencies of the transform and are empty."""
    mel = {'bins': 40, 'window': 60, 'hop': 30, 'transform': 128, 'low': 0.0, 'high': 1900.0}
    x = np.random.default_rng(0).normal(size=(2, 610)).astype(np.float32) * 0.1
    got = spectrogram.log_mel(jnp.asarray(x), 4000, {'form': 'filterbank', **mel})
    want = np.stack([bank_definition(row, 4000, **mel) for row in x])
    assert (
        got.shape
        == want.shape
        == (2, *spectrogram.shape({'samples': 610, 'mel': {'form': 'filterbank', **mel}}))
        == (2, 20, 40)
    )
    assert (want.min(1) == np.log(2.0**-52)).any() and (want.min(1) > 0).any()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_published_shape_of_the_filterbank_and_a_transform_too_short():
    from vatt_jax.models import presets

    assert spectrogram.shape({'samples': 24000, 'mel': presets.FILTERBANK}) == (99, 257)
    with pytest.raises(ConfigError, match='transform: expected at least window=128, .* got 64'):
        spectrogram.shape({'samples': 600, 'mel': {'window': 128, 'transform': 64}})
