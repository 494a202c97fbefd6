"""Constructed pictures with exact boxes: coloured shapes on noise, in COCO's format.

    python -m data_pipelines.datasets.shapes --out=runs/data/shapes

A detector can be tried on them in minutes without anything downloaded. Colours say nothing of the
class; shapes overlap little; pictures are wide, square or high.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, UInt8

from vatt_jax.command_line import expand_home
from vatt_jax.detection import coco

CLASSES = ('disc', 'square', 'triangle')
COUNTS = {'train': 600, 'test': 120}
# Sides of shapes and of the shorter side of pictures, as shares of the longer one.
SIDES = (0.18, 0.45)
LEAST_ASPECT = 0.7
# IoU of two shapes of a picture, at most.
MOST_OVERLAP = 0.05
# Places that are tried for each shape.
_TRIES = 20


def make(
    folder: pathlib.Path, counts: dict[str, int] | None = None, size: int = 96, seed: int = 0
) -> None:
    """Write SPLIT.json and the pictures of a dataset.

    Args:
        folder: to write into.
        counts: split -> pictures; None: COUNTS.
        size: longer side of the pictures, in pixels.
        seed: of all that is drawn.
    """
    for number, (split, count) in enumerate((counts or COUNTS).items()):
        rng = np.random.default_rng([seed, number])
        document = _make_split(folder, split, count, size, rng)
        coco.write(folder / f'{split}.json', document)


def _make_split(
    folder: pathlib.Path, split: str, count: int, size: int, rng: np.random.Generator
) -> coco.Document:
    (folder / coco.IMAGES).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        picture, boxes, classes = draw(rng, size)
        name = f'{split}_{number:05d}.png'
        PIL.Image.fromarray(picture).save(folder / coco.IMAGES / name)
        height, width = picture.shape[:2]
        images.append(coco.make_image(number, name, width, height))
        for box, kind in zip(coco.from_corners(boxes), classes, strict=True):
            annotations.append(
                coco.make_annotation(len(annotations) + 1, number, kind + 1, box.tolist())
            )
    return {
        'images': images,
        'annotations': annotations,
        'categories': coco.make_categories(CLASSES),
    }


def draw(
    rng: np.random.Generator, size: int
) -> tuple[UInt8[np.ndarray, 'H W 3'], Float[np.ndarray, 'N 4'], list[int]]:
    """A picture with one to four shapes.

    Returns:
        (pixels, corners in pixels, classes).
    """
    shorter = round(size * rng.uniform(LEAST_ASPECT, 1))
    height, width = (shorter, size) if rng.integers(2) else (size, shorter)
    noise = rng.normal(0, 25, (height, width, 3)) + rng.uniform(60, 190, 3)
    picture = np.clip(noise, 0, 255).astype(np.uint8)
    boxes = np.zeros((0, 4))
    classes = []
    for _ in range(rng.integers(1, 5)):
        box = _free_box(rng, size, height, width, boxes)
        if box is None:
            continue
        kind = int(rng.integers(len(CLASSES)))
        x0, y0, x1, y1 = box.astype(int)
        mask = _mask(kind, y1 - y0, x1 - x0)
        picture[y0:y1, x0:x1][mask] = rng.integers(0, 256, 3)
        boxes = np.concatenate([boxes, box[None]])
        classes.append(kind)
    return picture, boxes, classes


def _free_box(
    rng: np.random.Generator, size: int, height: int, width: int, others: Float[np.ndarray, 'N 4']
) -> Float[np.ndarray, ' 4'] | None:
    """A box of whole pixels that meets no other; None if none was found."""
    for _ in range(_TRIES):
        box_width, box_height = np.round(rng.uniform(*SIDES, 2) * size)
        # Neither flat nor thin: their shapes would be hard to tell.
        box_height = np.clip(box_height, 0.7 * box_width, 1.4 * box_width).round()
        if box_width > width or box_height > height:
            continue
        x0 = rng.integers(0, int(width - box_width) + 1)
        y0 = rng.integers(0, int(height - box_height) + 1)
        box = np.array([x0, y0, x0 + box_width, y0 + box_height], np.float64)
        if not len(others) or coco.overlaps(box[None], others).max() <= MOST_OVERLAP:
            return box
    return None


def _mask(kind: int, height: int, width: int) -> Bool[np.ndarray, 'h w']:
    """The pixels of a shape that touches all sides of its box."""
    y = (np.arange(height) + 0.5)[:, None] / height
    x = (np.arange(width) + 0.5)[None] / width
    if CLASSES[kind] == 'disc':
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    if CLASSES[kind] == 'square':
        return np.ones((height, width), bool)
    return np.abs(x - 0.5) <= y / 2


def main(argv: list[str]) -> None:
    """The command of this file."""
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.datasets.shapes', description=__doc__.splitlines()[0]
    )
    parser.add_argument('--out', required=True, help='folder to write')
    parser.add_argument('--train', type=int, default=COUNTS['train'], help='pictures to train on')
    parser.add_argument('--test', type=int, default=COUNTS['test'], help='pictures to test on')
    parser.add_argument('--size', type=int, default=96, help='longer side, in pixels')
    parser.add_argument('--seed', type=int, default=0)
    flags: Any = parser.parse_args(expand_home(argv))
    counts = {'train': flags.train, 'test': flags.test}
    make(pathlib.Path(flags.out), counts, flags.size, flags.seed)
    print(f'{flags.out}: {flags.train} pictures to train on, {flags.test} to test on')


if __name__ == '__main__':
    main(sys.argv[1:])
