"""SpecAugment (Park et al. 2019) without time warping: bands and frames of a spectrogram masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError
from vatt_jax.inputs import spectrogram
from vatt_jax.rng import Rng

WHERE = 'config.augment.spec_augment'
# Axis of a spectrogram -> the fields of its masks.
FIELDS = {
    'time': ('time_masks', 'time_width'),
    'frequency': ('frequency_masks', 'frequency_width'),
}


def is_on(config: Mapping[str, Any]) -> bool:
    """Whether anything is masked. config: `config.augment`; older runs lack the field."""
    fields = config.get('spec_augment', {})
    return any(fields.get(masks, 0) > 0 for masks, _ in FIELDS.values())


def check(config: Mapping[str, Any], audio: Mapping[str, Any]) -> None:
    """Checks masks against the spectrogram that they are for.

    Args:
        config: `config.augment`.
        audio: `config.model.inputs.audio`.

    Raises:
        ConfigError: the model reads no spectrogram, or a mask may be wider than it.
    """
    if not is_on(config):
        return
    if not audio.get('mel'):
        raise ConfigError(
            f'{WHERE}: expected a model that reads spectrograms, got waveforms '
            '(config.model.inputs.audio.mel is empty). Set frequency_masks and time_masks to 0.'
        )
    for length, (_, width) in zip(spectrogram.shape(audio), FIELDS.values(), strict=True):
        if config['spec_augment'][width] > length:
            raise ConfigError(
                f'{WHERE}.{width}: expected at most {length}, the size of the spectrogram, got '
                f'{config["spec_augment"][width]}.'
            )


def spec_augment(
    x: Float[Array, 'B T F'], config: Mapping[str, Any], rng: Rng
) -> Float[Array, 'B T F']:
    """The spectrograms with their masks at 0, the mean of a normalised one.

    Args:
        x: log-mel spectrograms.
        config: `config.augment.spec_augment`.
        rng: of this stream.
    """
    is_masked: jax.Array = jnp.zeros((1, 1, 1), bool)
    for axis, (site, (masks, width)) in enumerate(FIELDS.items(), start=1):
        along = _cover(x.shape[axis], config[masks], config[width], rng.at(site))  # [B length]
        is_masked = is_masked | jnp.expand_dims(along, 3 - axis)
    return jnp.where(is_masked, 0, x)


def _cover(length: int, masks: int, width: int, rng: Rng) -> Bool[Array, 'B length']:
    """Which places along an axis lie under one of the masks, each of fewer than `width` places."""
    place = jnp.arange(length)
    draws = rng.uniform((masks, 2))  # [B masks 2]
    # Rounded down, as published, so that a mask of `width` itself does not occur.
    size = jnp.floor(draws[..., 0] * width)
    # Every place at which the mask fits is equally likely.
    start = jnp.floor(draws[..., 1] * (length - size + 1))  # [B masks]
    is_behind = place >= start[..., None]
    is_before = place < (start + size)[..., None]
    return jnp.any(is_behind & is_before, axis=1)
