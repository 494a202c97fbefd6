"""Spectrograms on device: what the spectrogram towers of VATT, MMV and SeLaVi read.

Fields are those of `config.model.inputs.audio.mel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose, with_defaults

# VATT's: log(1 + 10000 · mel), each clip stretched to [0, 1].
# MMV's: offset 1e-6, scale 1, stretch False.
# SeLaVi's: form filterbank, bins 257, window 480, hop 240, transform 1024, low 0, high 12000 at
# 24 kHz.
DEFAULTS = {
    # mel (as TensorFlow makes it) | filterbank (as speech recognition does, see filterbank())
    'form': 'mel',
    'bins': 80,  # mel bands
    'window': 2048,  # samples of one frame
    # samples from frame to frame; the end is padded with zeros. mel: ceil(S / hop) frames
    'hop': 1024,
    'transform': 0,  # length of the Fourier transform, at least the window; 0: the window
    'low': 80.0,  # Hz
    'high': 7600.0,  # Hz
    # mel alone:
    'offset': 1.0,
    'scale': 1e4,  # log(offset + scale · mel magnitude)
    'stretch': True,  # minimum and maximum of each clip to 0 and 1
}
EMPHASIS = 0.97  # filterbank: share of the sample before that is subtracted
# filterbank: least energy, that of bands between two frequencies of the transform
FLOOR = float(np.finfo(np.float64).eps)


def shape(spec: ConfigDict | Mapping[str, Any]) -> tuple[int, int]:
    """Return (frames, bands) of `config.model.inputs.audio`."""
    mel = _fields(spec['mel'])
    return _num_frames(spec['samples'], mel), mel.bins


def log_mel(
    x: Float[Array | np.ndarray, 'B S'], rate: int, mel: ConfigDict | Mapping[str, Any]
) -> Float[Array, 'B T F']:
    """Compute log-mel magnitudes (not powers), or the filterbank where `form` asks for it.

    Hann window (periodic), HTK's mel scale, triangles of height 1.

    Args:
        x: Samples in [-1, 1].
        rate: Samples a second.
        mel: `config.model.inputs.audio.mel`.

    Raises:
        ConfigError: A field of `mel` makes no sense, or its bands lie beyond half the rate.
    """
    fields = _fields(mel)
    if fields.high > rate / 2 or fields.low >= fields.high:
        raise ConfigError(
            f'config.model.inputs.audio.mel: bands from low={fields.low:g} to '
            f'high={fields.high:g} Hz at rate={rate}; low < high <= {rate / 2:g} is expected'
        )
    if fields.form == 'filterbank':
        return filterbank(x, rate, fields)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fields.window) / fields.window)
    magnitude = jnp.abs(_transform(x, fields, jnp.asarray(window, jnp.float32)))
    # In full float32: an accelerator's fast product loses the quiet bands.
    bands = jnp.matmul(magnitude, mel_matrix(fields, rate), precision='highest')  # [B T F]
    y = jnp.log(fields.offset + fields.scale * bands)
    if not fields.stretch:
        return y
    low = y.min((1, 2), keepdims=True)
    high = y.max((1, 2), keepdims=True)
    # A silent clip has no range: zeros, not 0/0.
    return (y - low) / jnp.where(high > low, high - low, 1.0)


def filterbank(
    x: Float[Array | np.ndarray, 'B S'], rate: int, fields: ConfigDict
) -> Float[Array, 'B T F']:
    """Compute log energies in the scale of 16-bit samples, as speech recognition does.

    Pre-emphasis, frames without taper, |X|² / length of the transform, triangles between whole
    frequencies of the transform; T = 1 + ceil((S - window) / hop).

    Args:
        x: Samples in [-1, 1].
        rate: Samples a second.
        fields: All fields of `config.model.inputs.audio.mel`.
    """
    x = x * 32768
    # y[n] = x[n] - 0.97 x[n-1], the first sample as it is
    x = jnp.concatenate([x[:, :1], x[:, 1:] - EMPHASIS * x[:, :-1]], 1)
    power = jnp.abs(_transform(x, fields)) ** 2 / _transform_length(fields)
    energy = jnp.matmul(power, bank_matrix(fields, rate), precision='highest')  # [B T F]
    return jnp.log(jnp.maximum(energy, FLOOR))


def _fields(mel: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """Return all fields, checked."""
    fields = with_defaults(mel, DEFAULTS, 'config.model.inputs.audio.mel')
    choose(fields.form, ('mel', 'filterbank'), 'config.model.inputs.audio.mel.form')
    if fields.transform and fields.transform < fields.window:
        raise ConfigError(
            f'config.model.inputs.audio.mel.transform={fields.transform} is less than '
            f'window={fields.window}; expected at least that, or 0'
        )
    return fields


def _transform_length(fields: ConfigDict) -> int:
    return fields.transform or fields.window


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _num_frames(samples: int, fields: ConfigDict) -> int:
    if fields.form == 'mel':
        return _ceil_div(samples, fields.hop)
    return 1 + max(0, _ceil_div(samples - fields.window, fields.hop))


def _transform(
    x: Float[Array | np.ndarray, 'B S'], fields: ConfigDict, taper: jax.Array | None = None
) -> Complex64[Array, 'B T frequencies']:
    """Return the Fourier transform of the frames of x, transform/2 + 1 frequencies of each."""
    frames = _num_frames(x.shape[1], fields)
    missing = (frames - 1) * fields.hop + fields.window - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, max(0, missing))))
    starts = np.arange(frames)[:, None] * fields.hop
    x = x[:, starts + np.arange(fields.window)]  # [B T window]
    if taper is not None:
        x = x * taper
    return jnp.fft.rfft(x, _transform_length(fields))


def _hertz_to_mel(hertz: Any) -> np.ndarray | np.floating:
    """HTK's scale, in natural logarithms: 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


def mel_matrix(fields: ConfigDict, rate: int) -> Float[np.ndarray, 'frequencies F']:
    """Return overlapping triangles, equally wide in mel; the constant component counts in none."""
    frequencies = np.linspace(0, rate / 2, _transform_length(fields) // 2 + 1)
    mel = np.asarray(_hertz_to_mel(frequencies))[:, None]
    edges = np.linspace(_hertz_to_mel(fields.low), _hertz_to_mel(fields.high), fields.bins + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (mel - lower) / (centre - lower)
    falling = (upper - mel) / (upper - centre)
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights[0] = 0
    return weights.astype(np.float32)


def bank_matrix(fields: ConfigDict, rate: int) -> Float[np.ndarray, 'frequencies F']:
    """Return triangles whose corners are rounded down to frequencies of the transform.

    Narrow ones may be empty.
    """
    # The same scale in decimal logarithms, as speech recognition writes it. The two agree to five
    # digits, enough to round another way: they must not be exchanged.
    low_mel = 2595 * np.log10(1 + fields.low / 700)
    high_mel = 2595 * np.log10(1 + fields.high / 700)
    mel = np.linspace(low_mel, high_mel, fields.bins + 2)
    length = _transform_length(fields)
    corner = np.floor((length + 1) * 700 * (10 ** (mel / 2595) - 1) / rate)
    lower, centre, upper = corner[:-2], corner[1:-1], corner[2:]
    index = np.arange(length // 2 + 1)[:, None]
    # At least 1 below the line: an empty side is selected nowhere.
    rising = (index - lower) / np.maximum(centre - lower, 1)
    falling = (upper - index) / np.maximum(upper - centre, 1)
    is_rising = (index >= lower) & (index < centre)
    is_falling = (index >= centre) & (index < upper)
    weights = np.where(is_rising, rising, np.where(is_falling, falling, 0.0))
    return weights.astype(np.float32)
