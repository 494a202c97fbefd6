"""Sounds as libraries hand them over, made into the 16-bit mono samples that a model reads.

As in arrays.py, what has one meaning is taken, and what has two is told or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16

from vatt_jax import extras
from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays
from vatt_jax.inference.arrays import FILES, Tell

# An axis of a sound that is no longer is one of channels (7.1 has eight), a longer one of samples.
MOST_CHANNELS = 8
# Floats up to here are taken for [-1, 1]: decoding overshoots.
SOUND_OVERSHOOT = 2.0
# Samples per second of a sound; kilohertz lie below, and noise of other meanings above.
RATES = (200, 10_000_000)


def list_sounds(value: Any, where: str, tell: Tell) -> tuple[list[Any], bool, Any]:
    """The sounds of an argument: (sounds, whether a single one was given, its rate if it came).

    An axis of channels is never taken for one of clips: [S, 2] is one stereo sound.
    """
    value = arrays.iterated(value, where)
    if isinstance(value, FILES):
        return [value], True, None
    pair = _samples_and_rate(value, where)
    if pair is not None:
        return [pair[0]], True, pair[1]
    if arrays.is_list(value):
        pairs = [_samples_and_rate(item, where) for item in value]
        if any(pair is not None for pair in pairs):
            sounds, rate = _sounds_of_one_rate(pairs, where)
            return sounds, False, rate
        if len(value) > 0 and np.isscalar(value[0]) and not isinstance(value[0], FILES):
            return [arrays.as_array(value, where)], True, None
        return list(value), False, None
    x = arrays.unless_strings(value, where)
    if isinstance(x, list):
        return x, False, None
    if x.ndim <= 1:
        return [x], True, None
    if x.ndim == 2 and x.shape[1] <= MOST_CHANNELS:
        # [S C]; `samples` refuses it where there are no more samples than channels.
        return [x], True, None
    if x.ndim == 2 and x.shape[0] == 2:
        tell(
            'two sounds',
            f'{where}: {arrays.shape_of(x)} is read as two sounds; pass x.mean(0) or [x] if it is '
            'a stereo one',
        )
    return list(x), False, None


def _samples_and_rate(value: Any, where: str) -> tuple[np.ndarray, Any] | None:
    """What readers of sound files return: a pair in either order, or a dict of `datasets`.

    Returns:
        (samples, rate), None for anything else.
    """
    if isinstance(value, Mapping) and value.keys() >= {'array', 'sampling_rate'}:
        return arrays.as_array(value['array'], where), value['sampling_rate']
    if not isinstance(value, tuple) or len(value) != 2:
        return None
    first, second = value
    if arrays.is_number(second) and np.ndim(first) > 0:
        return arrays.as_array(first, where), second
    if arrays.is_number(first) and np.ndim(second) > 0:
        return arrays.as_array(second, where), first
    return None


def _sounds_of_one_rate(
    pairs: Sequence[tuple[np.ndarray, Any] | None], where: str
) -> tuple[list[np.ndarray], Any]:
    """(sounds, their rate) of a list of pairs.

    Raises:
        ConfigError: they have several rates, or some have none.
    """
    rates = {None if pair is None else pair[1] for pair in pairs}
    if len(rates) != 1:
        found = ' and '.join(sorted('none' if rate is None else str(rate) for rate in rates))
        raise ConfigError(
            f'{where}: expected sounds of one rate, got {found}; embed those of each rate by '
            'themselves'
        )
    return [pair[0] for pair in pairs if pair is not None], rates.pop()


def samples(value: Any, where: str, tell: Tell) -> Int16[np.ndarray, ' S']:
    """One sound as 16-bit mono samples.

    Args:
        value: [S], [S C] or [C S] of integers, or of floats in [-1, 1].
        where: of the call and argument, for messages.
        tell: is told what was assumed.

    Raises:
        ConfigError: it is no sound.
    """
    x = arrays.as_array(value, where)
    is_channel = [n <= MOST_CHANNELS for n in x.shape]
    if x.ndim not in (1, 2) or x.size == 0 or (x.ndim == 2 and sum(is_channel) != 1):
        raise ConfigError(
            f'{where}: expected samples [S], or [S C] with up to {MOST_CHANNELS} channels, '
            f'got {arrays.shape_of(x)}; several sounds go in as a list'
        )
    x = _to_int16(x, where, tell)
    if x.ndim == 2:
        mean = x.mean(is_channel.index(True), dtype=np.float64)
        x = np.round(mean).astype(np.int16)
    return x


def _to_int16(x: np.ndarray, where: str, tell: Tell) -> np.ndarray:
    """Samples of any type as 16-bit ones, in the same shape."""
    if x.dtype == np.int16:
        return x
    if x.dtype.kind == 'f':
        return _floats_to_int16(x, where, tell)
    if x.dtype == np.uint8:
        # Wave files of 8 bits are unsigned, with silence at 128.
        return (x.astype(np.int16) - 128) * 256
    if x.dtype == np.int8:
        return x.astype(np.int16) * 256
    if x.dtype == np.int32:
        # Every decoder hands 24 bits over as the upper ones of 32.
        peak = int(np.abs(x.astype(np.int64)).max())
        if peak < 2**23:
            tell(
                'quiet int32',
                f'{where}: int32 samples are read with full scale 2**31, and these reach {peak} '
                'only; pass x / 2**23 if they are 24-bit numbers, x / 2**15 if they are 16-bit',
            )
        return (x >> 16).astype(np.int16)
    # Not by magnitudes: the smallest integer has none.
    if x.dtype == np.int64 and -32768 <= x.min() and x.max() <= 32768:
        # Python's own integers.
        return np.clip(x, -32768, 32767).astype(np.int16)
    raise ConfigError(
        f'{where}: expected int16, int32, uint8 or float samples, got {arrays.shape_of(x)} with '
        f'values {x.min()} to {x.max()}; pass floats in [-1, 1]'
    )


def _floats_to_int16(x: np.ndarray, where: str, tell: Tell) -> np.ndarray:
    peak = np.abs(x).max()
    if not np.isfinite(peak) or peak > SOUND_OVERSHOOT:
        raise ConfigError(
            f'{where}: expected finite floats in [-1, 1], got magnitudes up to {peak:g}; divide '
            'by the full scale, which is 32768 of 16-bit numbers'
        )
    # Resamplers overshoot by less; this much is heard.
    if peak > 1.001:
        tell(
            'clipped',
            f'{where}: samples reach {peak:.3g} and are clipped to [-1, 1], as decoders of mp3 '
            'and AAC expect',
        )
    return np.clip(np.round(x.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def resampled(
    x: Int16[np.ndarray, ' S'], rate: Any, model_rate: float, where: str
) -> Int16[np.ndarray, ' S2']:
    """Samples at the model's rate.

    Raises:
        ConfigError: the rate is none, or soxr is not installed.
    """
    if not arrays.is_number(rate) or not RATES[0] <= rate <= RATES[1]:
        raise ConfigError(
            f'{where[:-1]}, rate={rate!r}): expected samples per second, such as 44100'
        )
    if rate == model_rate:
        return x
    purpose = f'{where[:-1]}, rate={rate}): the model reads {model_rate} Hz, and resampling'
    with extras.needed('video', purpose):
        import soxr
    y = soxr.resample(x, float(rate), float(model_rate))
    if not len(y):
        raise ConfigError(f'{where[:-1]}, rate={rate}): {len(x)} samples are no sound')
    return y
