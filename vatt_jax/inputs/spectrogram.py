"""Spectrograms on device: what the spectrogram towers of VATT, MMV and SeLaVi read.

Fields are those of `config.model.inputs.audio.mel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose, with_defaults

WHERE = 'config.model.inputs.audio.mel'
# VATT's: log(1 + 10000 · mel), each clip stretched to [0, 1].
# MMV's: offset 1e-6, scale 1, stretch False.
# SeLaVi's: form filterbank, bins 257, window 480, hop 240, transform 1024, low 0, high 12000 at 24
# kHz.
# AVID's: form decibels, bins 257, window 1024, hop 240.
DEFAULTS = {
    # mel (as TensorFlow makes it) | filterbank (as speech recognition does, see filterbank())
    # decibels (of the plain spectrum, see decibels())
    'form': 'mel',
    # Mel bands.
    'bins': 80,
    # Samples of one frame.
    'window': 2048,
    # Samples from frame to frame. The end is padded with zeros; mel and decibels have
    # ceil(S / hop) frames.
    'hop': 1024,
    # Length of the Fourier transform, at least the window. 0: the window.
    'transform': 0,
    # Hz.
    'low': 80.0,
    'high': 7600.0,
    # mel alone: log(offset + scale · mel magnitude), then minimum and maximum of each clip to 0 and
    # 1.
    'offset': 1.0,
    'scale': 1e4,
    'stretch': True,
    # Subtracted from the result, and what it is divided by (GDT: 1.93 and 17.89).
    'mean': 0.0,
    'deviation': 1.0,
}
# filterbank: share of the sample before that is subtracted.
EMPHASIS = 0.97
# filterbank: least energy, that of bands between two frequencies of the transform.
FLOOR = float(np.finfo(np.float64).eps)
# decibels: below a clip's loudest value, and of the least power.
DYNAMIC_RANGE, LEAST_POWER = 100.0, 1e-10


def shape(spec: Mapping[str, Any] | ConfigDict) -> tuple[int, int]:
    """(frames, bands) of `config.model.inputs.audio`."""
    mel = _fields(spec['mel'])
    return _num_frames(spec['samples'], mel), mel.bins


def log_mel(x: Float[Array, 'B S'], rate: int, mel: Any) -> Float[Array, 'B T F']:
    """Log-mel spectrograms, less `mean` and over `deviation`.

    Form mel: magnitudes, not powers; periodic Hann window; HTK's mel scale; triangles of height 1.

    Args:
        x: samples in [-1, 1].
        rate: samples a second.
        mel: `config.model.inputs.audio.mel`.

    Raises:
        ConfigError: a field is wrong, or the bands do not fit the rate.
    """
    mel = _fields(mel)
    if mel.high > rate / 2 or mel.low >= mel.high:
        raise ConfigError(
            f'{WHERE}: expected low < high <= {rate / 2:g} Hz at rate={rate}, '
            f'got low={mel.low:g} and high={mel.high:g}'
        )
    if mel.form == 'filterbank':
        y = filterbank(x, rate, mel)
    elif mel.form == 'decibels':
        y = decibels(x, mel)
    else:
        y = _log_mel(x, rate, mel)
    return (y - mel.mean) / mel.deviation


def _log_mel(x: Float[Array, 'B S'], rate: int, mel: ConfigDict) -> Float[Array, 'B T F']:
    """Logarithms of mel magnitudes, stretched where `stretch`."""
    magnitude = jnp.abs(_transform(x, mel, _hann(mel)))
    bands = jnp.matmul(magnitude, mel_matrix(mel, rate), precision='highest')
    y = jnp.log(mel.offset + mel.scale * bands)
    if not mel.stretch:
        return y
    low, high = y.min((1, 2), keepdims=True), y.max((1, 2), keepdims=True)
    # A silent clip has no range: zeros, not 0/0.
    return (y - low) / jnp.where(high > low, high - low, 1.0)


def filterbank(x: Float[Array, 'B S'], rate: int, mel: ConfigDict) -> Float[Array, 'B T F']:
    """Log energies of bands, in the scale of 16-bit samples, as speech recognition computes them.

    Pre-emphasis, frames without taper, |X|² / length of the transform, triangles between whole
    frequencies of the transform; T = 1 + ceil((S - window) / hop).
    """
    x = x * 32768
    x = jnp.concatenate([x[:, :1], x[:, 1:] - EMPHASIS * x[:, :-1]], 1)
    power = jnp.abs(_transform(x, mel)) ** 2 / _length(mel)
    energy = jnp.matmul(power, bank_matrix(mel, rate), precision='highest')
    return jnp.log(jnp.maximum(energy, FLOOR))


def decibels(x: Float[Array, 'B S'], mel: ConfigDict) -> Float[Array, 'B T F']:
    """Powers of equally wide bands in dB, at most 100 dB below the clip's loudest one (AVID).

    The first band is the constant component, each of the others the mean of as many frequencies.
    """
    power = jnp.abs(_transform(x, mel, _hann(mel))) ** 2  # [B T transform/2 + 1]
    constant, others = power[..., :1], power[..., 1:]
    num_clips, num_frames, _ = power.shape
    means = others.reshape(num_clips, num_frames, mel.bins - 1, -1).mean(-1)
    bands = jnp.concatenate([constant, means], -1)
    y = 10 * jnp.log10(jnp.maximum(bands, LEAST_POWER))
    return jnp.maximum(y, y.max((1, 2), keepdims=True) - DYNAMIC_RANGE)


def _hann(mel: ConfigDict) -> jax.Array:
    """The periodic Hann window."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(mel.window) / mel.window)
    return jnp.asarray(window, jnp.float32)


def _fields(given: Any) -> ConfigDict:
    """The fields of a spectrogram, defaults filled in. Raises ConfigError for a wrong one."""
    mel = with_defaults(given, DEFAULTS, WHERE)
    choose(mel.form, ('mel', 'filterbank', 'decibels'), f'{WHERE}.form')
    if mel.transform and mel.transform < mel.window:
        raise ConfigError(
            f'{WHERE}.transform: expected at least window={mel.window}, or 0 for that, '
            f'got {mel.transform}'
        )
    if not mel.deviation > 0:
        raise ConfigError(f'{WHERE}.deviation: expected a positive number, got {mel.deviation:g}')
    if mel.form == 'decibels' and (mel.bins < 2 or (_length(mel) // 2) % (mel.bins - 1)):
        raise ConfigError(
            f'{WHERE}.bins: expected one more than a divisor of {_length(mel) // 2}, half of the '
            f'transform, got {mel.bins}'
        )
    return mel


def _length(mel: ConfigDict) -> int:
    return mel.transform or mel.window


def _num_frames(samples: int, mel: ConfigDict) -> int:
    # -(-a // b) is the quotient rounded up.
    if mel.form != 'filterbank':
        return -(-samples // mel.hop)
    return 1 + max(0, -(-(samples - mel.window) // mel.hop))


def _transform(x: jax.Array, mel: ConfigDict, taper: jax.Array | None = None) -> jax.Array:
    """complex64 [B T transform/2 + 1] of the frames of x [B S]. taper: [window]."""
    num_frames = _num_frames(x.shape[1], mel)
    end = (num_frames - 1) * mel.hop + mel.window
    x = jnp.pad(x, ((0, 0), (0, max(0, end - x.shape[1]))))
    starts = np.arange(num_frames)[:, None] * mel.hop
    frames = x[:, starts + np.arange(mel.window)]  # [B T window]
    if taper is not None:
        frames = frames * taper
    return jnp.fft.rfft(frames, _length(mel))


def mel_matrix(mel: ConfigDict, rate: int) -> Float[np.ndarray, 'frequencies bins']:
    """float32 [transform/2 + 1, bins]: overlapping triangles, equally wide in mel.

    The constant component counts in none.
    """

    def to_mel(frequency: Any) -> Any:
        return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)

    frequency = to_mel(np.linspace(0, rate / 2, _length(mel) // 2 + 1))[:, None]
    edges = np.linspace(to_mel(mel.low), to_mel(mel.high), mel.bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequency - lower) / (centre - lower)
    falling = (upper - frequency) / (upper - centre)
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights[0] = 0
    return weights.astype(np.float32)


def bank_matrix(mel: ConfigDict, rate: int) -> Float[np.ndarray, 'frequencies bins']:
    """float32 [transform/2 + 1, bins]: triangles between whole frequencies of the transform.

    Their corners are rounded down, so that narrow ones may be empty.
    """
    lowest = 2595 * np.log10(1 + mel.low / 700)
    highest = 2595 * np.log10(1 + mel.high / 700)
    edges = np.linspace(lowest, highest, mel.bins + 2)
    corner = np.floor((_length(mel) + 1) * 700 * (10 ** (edges / 2595) - 1) / rate)
    lower, centre, upper = corner[:-2], corner[1:-1], corner[2:]
    number = np.arange(_length(mel) // 2 + 1)[:, None]
    # Empty triangles have no slope; the comparisons below leave them out.
    rising = (number - lower) / np.maximum(centre - lower, 1)
    falling = (upper - number) / np.maximum(upper - centre, 1)
    is_rising = (number >= lower) & (number < centre)
    is_falling = (number >= centre) & (number < upper)
    weights = np.where(is_rising, rising, np.where(is_falling, falling, 0.0))
    return weights.astype(np.float32)
