"""What a detector saw in one picture, whichever file it comes from, and batches of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from data_pipelines.errors import DataError
from vatt_jax.inputs import regions as region_inputs
from vatt_jax.inputs.regions import Regions


@dataclasses.dataclass(frozen=True)
class Picture:
    """Regions of one picture, in the order of their file: the surest one first.

    Attributes:
        name: what the file of features calls it.
        features: [N F], float32.
        corners: [N 4], x0 y0 x1 y1 as shares of the picture's width and height.
        classes: [N P], the detector's probabilities; None: the file has none.
        confidence: [N], of the best class of each; None: the file has none.
    """

    name: str
    features: Float[np.ndarray, 'N F']
    corners: Float[np.ndarray, 'N 4']
    classes: Float[np.ndarray, 'N P'] | None = None
    confidence: Float[np.ndarray, ' N'] | None = None

    def __post_init__(self) -> None:
        count = len(self.corners)
        if self.features.ndim != 2 or self.corners.shape != (count, 4):
            raise DataError(
                f'{self.name}: expected features [N F] and corners [N 4], got '
                f'{self.features.shape} and {self.corners.shape}'
            )
        for field in ('features', 'classes', 'confidence'):
            values = getattr(self, field)
            if values is None:
                continue
            if len(values) != count:
                raise DataError(
                    f'{self.name}: {field}: expected one row for each of {count} boxes, '
                    f'got {len(values)}'
                )
            if not np.isfinite(values).all():
                raise DataError(f'{self.name}: {field}: expected finite numbers')
        if not np.isfinite(self.corners).all():
            raise DataError(f'{self.name}: corners: expected finite numbers')


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which regions of a picture are kept: UNITER's rule and its published numbers.

    As many as have a confidence above the threshold, but no fewer than `least` and no more than
    `most`; always the first ones of the file. Without confidences: the first `most`.

    Attributes:
        threshold: of the confidence.
        least: fewest regions, where the picture has as many.
        most: most regions.
    """

    threshold: float = 0.2
    least: int = 10
    most: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most:
            raise DataError(
                f'least, most: expected 0 < least <= most, got {self.least} and {self.most}'
            )

    def of(self, picture: Picture) -> Picture:
        """The picture with the regions that are kept."""
        count = self.most
        if picture.confidence is not None:
            count = max(self.least, int(np.sum(picture.confidence > self.threshold)))
            count = min(self.most, count)
        return dataclasses.replace(
            picture,
            features=picture.features[:count],
            corners=picture.corners[:count],
            classes=None if picture.classes is None else picture.classes[:count],
            confidence=None if picture.confidence is None else picture.confidence[:count],
        )


def as_shares(
    boxes: Float[np.ndarray, 'N 4'], width: float, height: float, where: str
) -> Float[np.ndarray, 'N 4']:
    """Boxes in pixels as shares of the picture.

    Raises:
        DataError: the picture has no size, or a box is not x0 y0 x1 y1.
    """
    if not (width > 0 and height > 0):
        raise DataError(f'{where}: expected a width and height above 0, got {width} x {height}')
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise DataError(f'{where}: boxes: expected 4 numbers each, got shape {boxes.shape}')
    return (boxes / np.array([width, height, width, height])).astype(np.float32)


def to_regions(pictures: Sequence[Picture], length: int, form: int) -> Regions:
    """Pictures as one batch: [B N F] and boxes of 5 (ViLBERT) or 7 (UNITER) numbers.

    ViLBERT's region of the whole picture is put before these by the model's side
    (`inputs.regions.add_global`), after masking: what is hidden is missing in its mean.

    Args:
        pictures: B of them.
        length: N; regions beyond it are cut off.
        form: entry of `inputs.regions.FORMS`.
    """
    widths = {picture.features.shape[-1] for picture in pictures}
    if len(widths) != 1:
        raise DataError(
            f'features: expected one width in a batch, got {sorted(widths)}; '
            'files of different detectors do not mix'
        )
    features = [picture.features for picture in pictures]
    return region_inputs.pad(features, [picture.corners for picture in pictures], length, form)


def to_classes(pictures: Sequence[Picture], length: int) -> Float[np.ndarray, 'B N P'] | None:
    """The detector's probabilities, zeros at padding; None where no picture has any.

    Raises:
        DataError: some pictures have them and some have not, or of another number of classes.
    """
    known = [picture.classes for picture in pictures if picture.classes is not None]
    if not known:
        return None
    if len(known) != len(pictures) or len({rows.shape[-1] for rows in known}) != 1:
        raise DataError(
            'classes: expected all pictures of a batch to have probabilities of the same classes'
        )
    classes = np.zeros((len(known), length, known[0].shape[-1]), np.float32)
    for row, rows in enumerate(known):
        classes[row, : min(len(rows), length)] = rows[:length]
    return classes
