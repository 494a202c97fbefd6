"""Streams that are another one read backwards, made on the device instead of sent to it.

They mirror what the device stage made of their source, so both share its augmentation. A view of
kind `reverse` (config.data.views), in contrast, is augmented by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import modality_of

WHERE = 'config.augment.mirrored'
EXAMPLE = '(("audio.reversed", "audio"),)'
# Modalities whose data have time along the axis after the rows.
MODALITIES = ('video', 'audio')


def check(config: Mapping[str, Any]) -> None:
    """Checks `config.augment.mirrored`.

    Raises:
        ConfigError: an entry is no pair of a view and the stream of its modality that it mirrors.
    """
    names = set()
    for pair in config.get('mirrored', ()):
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(n, str) for n in pair)
        ):
            raise ConfigError(
                f'{WHERE}: expected pairs of streams such as {EXAMPLE}, got {pair!r}.'
            )
        name, source = pair
        modality = modality_of(source)
        if modality not in MODALITIES or not name.startswith(f'{modality}.') or name == source:
            raise ConfigError(
                f'{WHERE}: expected a view of video or audio and the stream of the same modality '
                f'that it mirrors, such as {EXAMPLE}, got {pair!r}.'
            )
        if source in names:
            raise ConfigError(
                f'{WHERE}: expected {source!r} to come with the batch, but it is mirrored itself.'
            )
        names.add(name)


def add(batch: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the mirrored streams.

    Args:
        batch: a device batch after `preprocess.device_stage`. A stream without its source in the
            batch is not made: the objective does not read it, or misses it.
        config: `config.augment`; that of older runs lacks the field.
    """
    result = dict(batch)
    for name, source in config.get('mirrored', ()):
        if source in batch:
            stream = batch[source]
            # [B T …] or, of waveforms, [B S].
            result[name] = {**stream, 'data': stream['data'][:, ::-1]}
    return result
