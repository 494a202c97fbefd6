"""What a detector found, for the report: boxes with names on pictures, and a bar for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vatt_jax.reporting import data_uris

# Classes of the chart, the best ones.
SHOWN_CLASSES = 60
# Hues of classes, in degrees apart: neighbours in the list look different.
HUE_STEP = 137


def detections(title: str, artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one evaluator of detections.

    Args:
        title: of its part of the page.
        artifacts: of the evaluator `detection`.
    """
    by_class = artifacts['by_class']
    hues = {name: number * HUE_STEP % 360 for number, name in enumerate(by_class)}
    pictures = []
    for picture, pixels in zip(artifacts['pictures'], artifacts['pixels'], strict=True):
        pictures.append(_picture(picture, pixels, hues))
    return {
        'title': title,
        'bars': _bars(by_class, hues),
        'names': {cluster: name or '-' for cluster, name in artifacts.get('names', {}).items()},
        'pictures': pictures,
    }


def _bars(
    by_class: Mapping[str, Mapping[str, float | None]], hues: Mapping[str, int]
) -> list[dict[str, Any]]:
    """AP50 of each class that has boxes, the best first."""
    known: list[dict[str, Any]] = []
    for name, values in by_class.items():
        if values['AP50'] is not None:
            known.append({'name': name, 'hue': hues[name], **values})
    known.sort(key=lambda bar: -bar['AP50'])
    return known[:SHOWN_CLASSES]


def _picture(
    picture: Mapping[str, Any], pixels: UInt8[np.ndarray, 'S S 3'], hues: Mapping[str, int]
) -> dict[str, Any]:
    """One picture with its boxes, true ones dashed."""
    width, height = picture['size']
    scale = len(pixels) / max(width, height)
    # Of the square the part with the picture.
    shown = pixels[: max(1, round(height * scale)), : max(1, round(width * scale))]
    found = f'{len(picture["found"])} found, {len(picture["true"])} true'
    return {
        'file': picture['file'],
        'uri': data_uris.jpeg(shown),
        'width': width,
        'height': height,
        'boxes': _boxes(picture['true'], hues, True) + _boxes(picture['found'], hues, False),
        'summary': f'{found}; {100 * picture["faults"]:.0f} % of them alone',
    }


def _boxes(
    boxes: Sequence[Mapping[str, Any]], hues: Mapping[str, int], is_true: bool
) -> list[dict[str, Any]]:
    drawn = []
    for box in boxes:
        x0, y0, x1, y1 = box['box']
        label = '' if is_true else f'{box["name"]} {box["score"]:.2f}'
        drawn.append(
            {
                'x': x0,
                'y': y0,
                'width': x1 - x0,
                'height': y1 - y0,
                'hue': hues[box['name']],
                'label': label,
                'title': box['name'] + (' (true)' if is_true else ''),
                'is_true': is_true,
            }
        )
    return drawn
