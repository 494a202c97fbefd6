"""Spectrograms on device: what the spectrogram towers of VATT, MMV and SeLaVi read. Fields are those of `config.model.inputs.audio.mel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.config import ConfigError, choose, with_defaults

# VATT's: log(1 + 10000 · mel), each clip stretched to [0, 1]. MMV's: offset 1e-6, scale 1, stretch False.
# SeLaVi's: form filterbank, bins 257, window 480, hop 240, transform 1024, low 0, high 12000 at 24 kHz.
DEFAULTS = {
    'form': 'mel',  # mel (as TensorFlow makes it) | filterbank (as speech recognition does, see filterbank())
    'bins': 80,  # mel bands
    'window': 2048,  # samples of one frame
    'hop': 1024,  # samples from frame to frame; the end is padded with zeros. mel: ceil(S / hop) frames
    'transform': 0,  # length of the Fourier transform, at least the window; 0: the window
    'low': 80.0,
    'high': 7600.0,  # Hz
    # mel alone:
    'offset': 1.0,
    'scale': 1e4,  # log(offset + scale · mel magnitude)
    'stretch': True,  # minimum and maximum of each clip to 0 and 1
}
EMPHASIS = 0.97  # filterbank: what is subtracted of the sample before
FLOOR = float(
    np.finfo(np.float64).eps
)  # filterbank: least energy, that of bands between two frequencies of the transform


def shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    """(frames, bands) of `config.model.inputs.audio`."""
    m = _fields(spec['mel'])
    return _frames(spec['samples'], m), m.bins


def log_mel(x: jax.Array, rate: int, mel: Mapping[str, Any]) -> jax.Array:
    """float32 [B S] in [-1, 1] at `rate` Hz -> [B T F]. Magnitudes, not powers; Hann window (periodic); HTK's mel scale; triangles of height 1."""
    m = _fields(mel)
    if m.high > rate / 2 or m.low >= m.high:
        raise ConfigError(
            f'config.model.inputs.audio.mel: bands from low={m.low:g} to high={m.high:g} Hz at rate={rate}; '
            f'low < high <= {rate / 2:g} is wanted'
        )
    if m.form == 'filterbank':
        return filterbank(x, rate, m)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(m.window) / m.window)
    magnitude = jnp.abs(_transform(x, m, jnp.asarray(window, jnp.float32)))
    y = jnp.log(
        m.offset + m.scale * jnp.matmul(magnitude, mel_matrix(m, rate), precision='highest')
    )
    if not m.stretch:
        return y
    low, high = y.min((1, 2), keepdims=True), y.max((1, 2), keepdims=True)
    # A silent clip has no range: zeros, not 0/0.
    return (y - low) / jnp.where(high > low, high - low, 1.0)


def filterbank(x: jax.Array, rate: int, m) -> jax.Array:
    """float32 [B S] -> [B T F]: log energies in the scale of 16-bit samples. Pre-emphasis, frames without taper, |X|² / length of the transform,
    triangles between whole frequencies of the transform; T = 1 + ceil((S - window) / hop)."""
    x = x * 32768
    x = jnp.concatenate([x[:, :1], x[:, 1:] - EMPHASIS * x[:, :-1]], 1)
    power = jnp.abs(_transform(x, m)) ** 2 / _length(m)
    return jnp.log(jnp.maximum(jnp.matmul(power, bank_matrix(m, rate), precision='highest'), FLOOR))


def _fields(mel: Mapping[str, Any]):
    m = with_defaults(mel, DEFAULTS, 'config.model.inputs.audio.mel')
    choose(m.form, ('mel', 'filterbank'), 'config.model.inputs.audio.mel.form')
    if m.transform and m.transform < m.window:
        raise ConfigError(
            f'config.model.inputs.audio.mel.transform={m.transform} is less than window={m.window}; at least that is wanted, or 0'
        )
    return m


def _length(m) -> int:
    return m.transform or m.window


def _frames(samples: int, m) -> int:
    return (
        -(-samples // m.hop) if m.form == 'mel' else 1 + max(0, -(-(samples - m.window) // m.hop))
    )


def _transform(x: jax.Array, m, taper=None) -> jax.Array:
    """complex64 [B T transform/2 + 1] of the frames of x."""
    frames = _frames(x.shape[1], m)
    x = jnp.pad(x, ((0, 0), (0, max(0, (frames - 1) * m.hop + m.window - x.shape[1]))))
    x = x[:, np.arange(frames)[:, None] * m.hop + np.arange(m.window)]
    return jnp.fft.rfft(x if taper is None else x * taper, _length(m))


def mel_matrix(m, rate: int) -> np.ndarray:
    """float32 [transform/2 + 1, bins]: overlapping triangles, equally wide in mel; the constant component counts in none."""
    to_mel = lambda f: 1127.0 * np.log1p(np.asarray(f) / 700.0)
    f = to_mel(np.linspace(0, rate / 2, _length(m) // 2 + 1))[:, None]
    edges = np.linspace(to_mel(m.low), to_mel(m.high), m.bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(
        0.0, np.minimum((f - lower) / (centre - lower), (upper - f) / (upper - centre))
    )
    weights[0] = 0
    return weights.astype(np.float32)


def bank_matrix(m, rate: int) -> np.ndarray:
    """float32 [transform/2 + 1, bins]: triangles whose corners are rounded down to frequencies of the transform; narrow ones may be empty."""
    mel = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (m.low, m.high)), m.bins + 2)
    corner = np.floor((_length(m) + 1) * 700 * (10 ** (mel / 2595) - 1) / rate)
    lower, centre, upper = corner[:-2], corner[1:-1], corner[2:]
    f = np.arange(_length(m) // 2 + 1)[:, None]
    rising, falling = (
        (f - lower) / np.maximum(centre - lower, 1),
        (upper - f) / np.maximum(upper - centre, 1),
    )
    weights = np.where(
        (f >= lower) & (f < centre), rising, np.where((f >= centre) & (f < upper), falling, 0.0)
    )
    return weights.astype(np.float32)
