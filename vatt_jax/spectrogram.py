"""Log-mel spectrograms on device: what the spectrogram towers of VATT and MMV read. Fields are those of `config.model.inputs.audio.mel`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.config import ConfigError, with_defaults

# VATT's: log(1 + 10000 · mel), each clip stretched to [0, 1]. MMV's: offset 1e-6, scale 1, stretch False.
DEFAULTS = {
    'bins': 80,             # mel bands
    'window': 2048,         # samples of one frame, Hann (periodic)
    'transform': 0,         # length of the Fourier transform, the frame padded with zeros behind; 0: that of the window
    'hop': 1024,            # samples from frame to frame; the end is padded with zeros, so there are ceil(S / hop) frames
    'low': 80.0, 'high': 7600.0,  # Hz
    'offset': 1.0, 'scale': 1e4,  # log(offset + scale · mel magnitude)
    'stretch': True,        # minimum and maximum of each clip to 0 and 1
}


def shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    """(frames, bands) of `config.model.inputs.audio`."""
    mel = with_defaults(spec['mel'], DEFAULTS, 'config.model.inputs.audio.mel')
    return -(-spec['samples'] // mel.hop), mel.bins


def log_mel(x: jax.Array, rate: int, mel: Mapping[str, Any]) -> jax.Array:
    """float32 [B S] at `rate` Hz -> [B T F]. Magnitudes, not powers; HTK's mel scale; triangles of height 1."""
    m = with_defaults(mel, DEFAULTS, 'config.model.inputs.audio.mel')
    if m.high > rate / 2 or m.low >= m.high:
        raise ConfigError(f'config.model.inputs.audio.mel: bands from low={m.low:g} to high={m.high:g} Hz at rate={rate}; '
                          f'low < high <= {rate / 2:g} is wanted')
    frames = -(-x.shape[1] // m.hop)
    x = jnp.pad(x, ((0, 0), (0, max(0, (frames - 1) * m.hop + m.window - x.shape[1]))))
    x = x[:, np.arange(frames)[:, None] * m.hop + np.arange(m.window)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(m.window) / m.window)
    if m.transform and m.transform < m.window:
        raise ConfigError(f'config.model.inputs.audio.mel: transform={m.transform} is shorter than window={m.window}; at least that is wanted')
    magnitude = jnp.abs(jnp.fft.rfft(x * jnp.asarray(window, jnp.float32), m.transform or m.window))
    y = jnp.log(m.offset + m.scale * jnp.matmul(magnitude, mel_matrix(m, rate), precision='highest'))
    if not m.stretch:
        return y
    low, high = y.min((1, 2), keepdims=True), y.max((1, 2), keepdims=True)
    # A silent clip has no range: zeros, not 0/0.
    return (y - low) / jnp.where(high > low, high - low, 1.0)


def mel_matrix(m, rate: int) -> np.ndarray:
    """float32 [transform/2 + 1, bins]: overlapping triangles, equally wide in mel; the constant component counts in none."""
    to_mel = lambda f: 1127.0 * np.log1p(np.asarray(f) / 700.0)
    f = to_mel(np.linspace(0, rate / 2, (m.transform or m.window) // 2 + 1))[:, None]
    edges = np.linspace(to_mel(m.low), to_mel(m.high), m.bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0.0, np.minimum((f - lower) / (centre - lower), (upper - f) / (upper - centre)))
    weights[0] = 0
    return weights.astype(np.float32)
