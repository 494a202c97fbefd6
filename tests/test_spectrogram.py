"""Log-mel against its definition (VATT fact: magnitudes, HTK mel, natural log of 1 + 10000 x, stretched to [0, 1])."""
import numpy as np
import pytest

from vatt_jax import preprocess, spectrogram
from vatt_jax.config import ConfigError
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
        part = x[t * hop:t * hop + window]
        frame[:len(part)] = part
        magnitude = np.abs(wave @ (frame * hann))
        row = []
        for b in range(bins):
            total = 0.0
            for k in range(1, transform // 2 + 1):
                m = mel(k * rate / transform)
                total += magnitude[k] * max(0.0, min((m - edges[b]) / (edges[b + 1] - edges[b]), (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1])))
            row.append(np.log(offset + scale * total))
        out.append(row)
    out = np.array(out)
    return (out - out.min()) / (out.max() - out.min()) if stretch else out


@pytest.mark.parametrize('form', [{'offset': 1.0, 'scale': 1e4, 'stretch': True}, {'offset': 1e-6, 'scale': 1.0, 'stretch': False},
                                  {'offset': 1e-6, 'scale': 1.0, 'stretch': False, 'transform': 200}])
def test_log_mel_is_its_definition(form):
    mel = {'bins': 7, 'window': 128, 'hop': 64, 'low': 80.0, 'high': 1900.0, **form}
    x = np.random.default_rng(0).normal(size=(2, 600)) * 0.1
    got = spectrogram.log_mel(np.asarray(x, np.float32), 4000, mel)
    assert got.shape == (2, *spectrogram.shape({'samples': 600, 'mel': mel})) == (2, 10, 7)
    for b in range(2):
        np.testing.assert_allclose(got[b], definition(x[b], 4000, **mel), rtol=1e-4, atol=2e-5)


def test_a_transform_shorter_than_the_window():
    with pytest.raises(ConfigError, match='transform=64 is shorter than window=128'):
        spectrogram.log_mel(np.zeros((1, 600), np.float32), 4000, {'window': 128, 'hop': 64, 'transform': 64, 'high': 1900.0})


def test_a_silent_clip_is_finite_and_zero():
    assert not np.asarray(spectrogram.log_mel(np.zeros((1, 4096), np.float32), 48000, {'hop': 1024})).any()


def test_published_shape_and_the_device_stage():
    audio = {'samples': 4096, 'rate': 48000, 'mel': {'bins': 80}}
    assert spectrogram.shape({**audio, 'samples': 153600}) == (150, 80)
    stream = {'data': np.random.default_rng(0).integers(-3000, 3000, (2, 4096)).astype(np.int16), 'valid': np.array([True, False])}
    out = preprocess.device_stage({'audio': stream}, {'audio': audio}, {'audio_noise': 0.0}, Rng.create(0, 0, np.arange(2)), augment=True,
                                  dtype='float32')['audio']['data']
    want = spectrogram.log_mel(stream['data'].astype(np.float32) / 32768, 48000, audio['mel'])
    np.testing.assert_array_equal(out[0], want[0])
    assert not np.asarray(out[1]).any()


def test_bands_above_half_the_rate():
    with pytest.raises(ConfigError, match='high=7600 Hz at rate=8000; low < high <= 4000'):
        spectrogram.log_mel(np.zeros((1, 4096), np.float32), 8000, {'bins': 8})
