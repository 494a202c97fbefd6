"""Heat maps of users' pictures and sounds: where in a picture is what is heard?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError
from vatt_jax.detection.boxes import upsample
from vatt_jax.inference import arrays, sounds
from vatt_jax.inference.arrays import FILES
from vatt_jax.inference.embedder import as_stream
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.inference.item_windows import ItemReader
from vatt_jax.inference.notices import Notices
from vatt_jax.inference.requests import Request
from vatt_jax.objectives.localisation import HEAT

# A picture and its sound, as towers take them.
Pair = dict[str, np.ndarray]


class Localiser:
    """Pairs of pictures and sounds -> heat maps.

    Args:
        extractor: a model with the heads of the objective `localisation`.
        inputs: modality -> its description in `config.model.inputs`.
        notices: what the user is told.
    """

    def __init__(
        self, extractor: FeatureExtractor, inputs: Mapping[str, Any], notices: Notices
    ) -> None:
        self._extractor, self._notices = extractor, notices
        self._reader = ItemReader(inputs, notices.tell)

    def heat_maps(
        self, given: Mapping[str, Any], request: Request, size: tuple[int, int] | None
    ) -> dict[str, Any]:
        """See `vatt_jax.api.Model.localise`.

        Args:
            given: 'video' or 'image', and 'audio' where it is given apart.
            request: how they are read.
            size: height and width of the maps; None: those of the model.

        Raises:
            ConfigError: as of `Model.localise`.
        """
        name = self._picture_name(given, request)
        where = request.where(name)
        list_items = arrays.list_images if name == 'image' else arrays.list_videos
        items, is_single = list_items(given[name], where)
        if not items:
            raise ConfigError(f'{where}: the list is empty')
        sound_items: Sequence[Any] = [None] * len(items)
        if 'audio' in given:
            sound_where = request.where('audio')
            sound_items, _, rate = sounds.list_sounds(
                given['audio'], sound_where, self._notices.tell
            )
            if rate is not None:
                request = Request('localise', rate, request.batch_size, None, None, 'raise', True)
            if len(sound_items) != len(items):
                raise ConfigError(
                    f'{sound_where}: expected a sound for each of {len(items)} pictures, got '
                    f'{len(sound_items)}'
                )
        pairs = [self._pair(name, *both, request) for both in zip(items, sound_items)]
        heat = self._encode(pairs, request.batch_size)  # [B T h w]
        out = {'score': heat.max((1, 2, 3)), 'heat': heat}
        if size is not None:
            out['heat'] = upsample(heat, *size).astype(np.float32)
        return {key: value[0] for key, value in out.items()} if is_single else out

    def _picture_name(self, given: Mapping[str, Any], request: Request) -> str:
        names = [name for name in ('video', 'image') if name in given]
        if len(names) != 1:
            raise ConfigError(
                f'{request.call}(): expected one of video= and image=, got '
                f'{" and ".join(names) or "none"}'
            )
        return names[0]

    def _pair(self, name: str, item: Any, sound: Any, request: Request) -> Pair:
        """The middle window of a clip or the picture, with its own sound or the one given."""
        where = request.where(name, item)
        takes_sound = sound is None and name == 'video' and isinstance(item, FILES)
        piece = next(self._reader.pieces(name, item, request, where, takes_sound))
        data = {'video': piece.data[name]}
        if sound is not None:
            where = request.where('audio', sound)
            piece = next(self._reader.pieces('audio', sound, request, where, False))
        if 'audio' not in piece.data:
            raise ConfigError(
                f'{where}: expected a picture with sound, got none; pass audio=, or a media file '
                'that has sound'
            )
        return {**data, 'audio': piece.data['audio']}

    def _encode(self, pairs: list[Pair], batch_size: int) -> Float[np.ndarray, 'B T h w']:
        shapes = {pair['video'].shape for pair in pairs}
        if len(shapes) > 1:
            # Of clips that the device resizes and clips that it does not.
            alone = [self._encode([pair], batch_size) for pair in pairs]
            return np.concatenate(alone)
        # Powers of two: few sizes, so few compilations.
        batch_size = min(batch_size, 1 << (len(pairs) - 1).bit_length())
        parts = []
        for begin in range(0, len(pairs), batch_size):
            rows = pairs[begin : begin + batch_size]
            batch: dict[str, Any] = {}
            for name in ('video', 'audio'):
                batch[name] = as_stream(name, np.stack([row[name] for row in rows]), batch_size)
            batch['position'] = np.arange(batch_size)
            batch['valid'] = batch['video']['valid']
            maps = self._extractor(batch, ('video',))['heat_maps']
            parts.append(maps[HEAT][: len(rows)])
        return np.concatenate(parts)
