"""What a trained detector finds in pictures of users."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.detection.squares import in_square, to_pixels
from vatt_jax.inference import arrays
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.objectives.detection import Detection


class PictureDetector:
    """Detects objects in batches of pictures.

    Args:
        config: the run's resolved config.
        variables: {'params', 'batch_stats'} of the model.
        info: {'labels', …} of the data.
        mesh: the devices it runs on.
        heads: parameters of the objective.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Mapping[str, Any],
        info: Mapping[str, Any],
        mesh: Mesh,
        heads: Mapping[str, Any],
    ):
        objective = Detection(config.objective)
        self._extractor = FeatureExtractor(config, variables, mesh, objective, heads, {})
        self._video = config.model.inputs.video
        self._names = list(info['labels'][objective.config.label])

    def detect(self, images: Any, batch_size: int, min_score: float) -> Any:
        """See `vatt_jax.api.Model.detect`."""
        where = 'detect(image=…)'
        items, is_single = arrays.list_images(images, where)
        if not items:
            raise ConfigError('detect(image=[]): the list is empty')
        found = []
        for begin in range(0, len(items), batch_size):
            pictures = [_picture(item, where) for item in items[begin : begin + batch_size]]
            found += self._detect_batch(pictures, batch_size, min_score)
        return found[0] if is_single else found

    def _detect_batch(
        self, pictures: Sequence[PIL.Image.Image], batch_size: int, min_score: float
    ) -> list[dict[str, Any]]:
        """Detections of no more pictures than the program takes."""
        # Powers of two: few sizes, so few compilations.
        rows = min(batch_size, 1 << (len(pictures) - 1).bit_length())
        size = self._video.size
        frames = np.zeros((rows, self._video.frames, size, size, 3), np.uint8)
        for row, picture in enumerate(pictures):
            frames[row] = in_square(picture, size)
        is_valid = np.arange(rows) < len(pictures)
        stream = {
            'data': frames,
            'valid': is_valid,
            # The whole square, as fractions: y0 x0 y1 x1.
            'box': np.tile(np.array([0, 0, 1, 1], np.float32), (rows, 1)),
            'flip': np.zeros(rows, bool),
        }
        batch = {'video': stream, 'position': np.arange(rows), 'valid': is_valid}
        predictions = self._extractor(batch)['predictions']
        found = []
        for row, picture in enumerate(pictures):
            of_picture = {name: value[row] for name, value in predictions.items()}
            found.append(self._in_pixels(of_picture, picture, min_score))
        return found

    def _in_pixels(
        self, predictions: Mapping[str, np.ndarray], picture: PIL.Image.Image, min_score: float
    ) -> dict[str, Any]:
        """Detections of one picture without padding."""
        boxes = to_pixels(predictions['boxes'], picture.width, picture.height)
        is_inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=-1)
        # Padding has score 0.
        kept = is_inside & (predictions['scores'] >= max(min_score, 1e-6))
        classes = predictions['classes'][kept]
        return {
            'boxes': boxes[kept].astype(np.float32),
            'scores': predictions['scores'][kept],
            'classes': classes,
            'names': [self._names[number] for number in classes],
        }


def _picture(item: Any, where: str) -> PIL.Image.Image:
    """A picture of a path, an array or PIL, in RGB.

    Raises:
        ConfigError: it cannot be read.
    """
    if isinstance(item, arrays.FILES):
        path = os.fsdecode(item)
        try:
            with PIL.Image.open(path) as stored:
                return stored.convert('RGB')
        # Of damaged files PIL raises several types, all of these kinds.
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f'detect(image={path!r}): {error}') from error
    pixels = arrays.picture(item, where)  # [H W C]
    rgb: UInt8[np.ndarray, 'H W 3'] = arrays.to_uint8(pixels, arrays.pixel_scale([pixels], where))
    return PIL.Image.fromarray(rgb)
