"""Pictures with boxes in COCO's json format: what detectors are trained on and measured by.

images (id, file_name, width, height), annotations (id, image_id, category_id, bbox [x, y, w, h] in
pixels, area, iscrowd, and maybe score, sounds …) and categories (id, name). Pictures lie in a
folder `images` beside the file. NumPy only: data pipelines read these without starting JAX.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from vatt_jax.config import ConfigError
from vatt_jax.detection import squares

# Fields that every entry of a list must have.
REQUIRED = {
    'images': ('id', 'file_name', 'width', 'height'),
    'annotations': ('image_id', 'category_id', 'bbox'),
    'categories': ('id', 'name'),
}
IMAGES = 'images'

# A document in COCO's format.
Document = dict[str, Any]


def read(path: str | os.PathLike) -> Document:
    """Read and check a file.

    Raises:
        ConfigError: it cannot be read, lacks a list or a field, or an annotation names a picture
            or category that is not there.
    """
    path = pathlib.Path(path)
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: expected a file in COCO format, got {error}') from error
    check(document, str(path))
    return document


def check(document: Any, where: str) -> None:
    """Check a document.

    Args:
        document: what should be one.
        where: what messages begin with.

    Raises:
        ConfigError: see `read`.
    """
    if not isinstance(document, dict):
        raise ConfigError(f'{where}: expected lists {", ".join(REQUIRED)}, as COCO has them')
    for name, fields in REQUIRED.items():
        entries = document.get(name)
        if not isinstance(entries, list):
            raise ConfigError(f'{where}: expected a list {name!r}, as COCO has it')
        for number, entry in enumerate(entries):
            missing = [field for field in fields if field not in entry]
            if missing:
                raise ConfigError(f'{where}: {name}[{number}] lacks the field {missing[0]!r}')
    image_ids = {image['id'] for image in document['images']}
    category_ids = {category['id'] for category in document['categories']}
    for number, annotation in enumerate(document['annotations']):
        box = annotation['bbox']
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
            raise ConfigError(
                f'{where}: annotations[{number}].bbox: expected [x, y, width, height], got {box}'
            )
        if annotation['image_id'] not in image_ids:
            raise ConfigError(
                f'{where}: annotations[{number}].image_id={annotation["image_id"]!r} is no image'
            )
        if annotation['category_id'] not in category_ids:
            raise ConfigError(
                f'{where}: annotations[{number}].category_id={annotation["category_id"]!r} is no '
                'category'
            )


def write(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Write a document; the file appears whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(json.dumps(document))
    os.replace(temporary, path)


def make_image(number: int, file_name: str, width: int, height: int) -> dict[str, Any]:
    """An entry of `images`."""
    return {'id': number, 'file_name': file_name, 'width': width, 'height': height}


def make_annotation(
    number: int,
    image: int,
    category: int,
    box: Sequence[float],
    is_crowd: bool = False,
    **further: Any,
) -> dict[str, Any]:
    """An entry of `annotations`.

    Args:
        number: its id; COCO's own evaluation takes 0 for none, so they begin at 1.
        image: id of the picture.
        category: id of the class.
        box: x, y, width, height in pixels.
        is_crowd: a group that counts neither as found nor as missed.
        **further: fields such as `score`.
    """
    box = [float(value) for value in box]
    return {
        'id': number,
        'image_id': image,
        'category_id': category,
        'bbox': box,
        'area': box[2] * box[3],
        'iscrowd': int(is_crowd),
        **further,
    }


def make_categories(names: Iterable[str]) -> list[dict[str, Any]]:
    """Entries of `categories`, numbered from 1 on, as COCO's are."""
    return [{'id': number, 'name': name} for number, name in enumerate(names, 1)]


def class_names(document: Document) -> list[str]:
    """Names of the classes, in the order of their ids: class c is the c-th of them."""
    categories = sorted(document['categories'], key=lambda category: category['id'])
    return [category['name'] for category in categories]


def class_numbers(document: Document) -> dict[Any, int]:
    """Id of a category -> number of its class, from 0 on."""
    ids = sorted(category['id'] for category in document['categories'])
    return {identifier: number for number, identifier in enumerate(ids)}


def by_image(document: Document) -> list[list[dict[str, Any]]]:
    """The annotations of each picture, in the order of `images`."""
    place = {image['id']: number for number, image in enumerate(document['images'])}
    found: list[list[dict[str, Any]]] = [[] for _ in document['images']]
    for annotation in document['annotations']:
        found[place[annotation['image_id']]].append(annotation)
    return found


def boxes_of(
    annotations: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int]
) -> tuple[Float64[np.ndarray, 'N 4'], Int64[np.ndarray, ' N'], Bool[np.ndarray, ' N']]:
    """(corners in pixels, classes, whether they are crowds) of annotations.

    Args:
        annotations: of one picture.
        numbers: see `class_numbers`.
    """
    boxes = np.array([annotation['bbox'] for annotation in annotations], np.float64)
    classes = [numbers[annotation['category_id']] for annotation in annotations]
    is_crowd = [bool(annotation.get('iscrowd', 0)) for annotation in annotations]
    corners = to_corners(boxes.reshape(-1, 4))
    return corners, np.array(classes, np.int64), np.array(is_crowd, bool)


def to_corners(boxes: Float[np.ndarray, '*n 4']) -> Float[np.ndarray, '*n 4']:
    """x, y, width, height -> x0, y0, x1, y1."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def from_corners(corners: Float[np.ndarray, '*n 4']) -> Float[np.ndarray, '*n 4']:
    """x0, y0, x1, y1 -> x, y, width, height."""
    return np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=-1)


def overlaps(
    a: Float[np.ndarray, 'A 4'], b: Float[np.ndarray, 'C 4']
) -> Float64[np.ndarray, 'A C']:
    """IoU of every pair of corners; 0 of boxes without area."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _areas(a)[:, None] + _areas(b)[None] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1e-12), 0.0)


def _areas(corners: Float[np.ndarray, 'A 4']) -> Float[np.ndarray, ' A']:
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


def results_of(
    document: Document,
    boxes: Float[np.ndarray, 'I M 4'],
    scores: Float[np.ndarray, 'I M'],
    classes: Int[np.ndarray, 'I M'],
    identifiers: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
    """Detections as COCO's results: image_id, category_id, bbox in pixels, score.

    Args:
        document: with the first I pictures in its order, or more.
        boxes: corners in fractions of the square around each picture.
        scores: 0 where there is no detection.
        classes: of each.
        identifiers: category_id of each class; None: those of the document.
    """
    if identifiers is None:
        identifiers = sorted(category['id'] for category in document['categories'])
    results = []
    for image, corners, of_image, kinds in zip(document['images'], boxes, scores, classes):
        pixels = squares.to_pixels(corners, image['width'], image['height'])
        for box, score, kind in zip(from_corners(pixels), of_image, kinds):
            if score > 0 and min(box[2:]) > 0:
                results.append(
                    {
                        'image_id': image['id'],
                        'category_id': identifiers[kind],
                        'bbox': box.tolist(),
                        'score': float(score),
                    }
                )
    return results
