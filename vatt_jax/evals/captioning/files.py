"""Files of captions in COCO's formats.

Results are a list of {"image_id": …, "caption": …}, one for each picture. References are an object
whose list "annotations" has the same fields and any number of captions for each picture; further
fields are ignored.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vatt_jax.config import ConfigError
from vatt_jax.run_folder import write_atomically

# What a picture is called by: a number in COCO's own files.
ImageId = int | str
FIELDS = ('image_id', 'caption')


def read_results(path: str | os.PathLike) -> dict[ImageId, str]:
    """The caption of each picture, in the order of the file.

    Raises:
        ConfigError: the file cannot be read, is of another form, or has two captions of a picture.
    """
    document = _read(path)
    if not isinstance(document, list):
        raise ConfigError(f'{path}: expected results, a list of {{"image_id", "caption"}}')
    captions: dict[ImageId, str] = {}
    for number, entry in enumerate(document):
        image, caption = _fields(entry, f'{path}: [{number}]')
        if image in captions:
            raise ConfigError(
                f'{path}: [{number}]: image_id {image!r} has a second caption; expected one each'
            )
        captions[image] = caption
    return captions


def write_results(path: str | os.PathLike, captions: Mapping[ImageId, str]) -> None:
    """Writes a caption of each picture; the file appears whole or not at all."""
    entries = [{'image_id': image, 'caption': caption} for image, caption in captions.items()]
    write_atomically(pathlib.Path(path), json.dumps(entries))


def read_references(path: str | os.PathLike) -> dict[ImageId, list[str]]:
    """The captions of each picture, in the order of the file.

    Raises:
        ConfigError: the file cannot be read or is of another form.
    """
    document = _read(path)
    annotations = document.get('annotations') if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise ConfigError(f'{path}: expected references, an object with a list "annotations"')
    captions: dict[ImageId, list[str]] = {}
    for number, entry in enumerate(annotations):
        image, caption = _fields(entry, f'{path}: annotations[{number}]')
        captions.setdefault(image, []).append(caption)
    return captions


def write_references(path: str | os.PathLike, references: Mapping[ImageId, Sequence[str]]) -> None:
    """Writes the captions of each picture; the file appears whole or not at all."""
    annotations: list[dict[str, Any]] = []
    for image, captions in references.items():
        for caption in captions:
            annotations.append({'id': len(annotations), 'image_id': image, 'caption': caption})
    document = {'images': [{'id': image} for image in references], 'annotations': annotations}
    write_atomically(pathlib.Path(path), json.dumps(document))


def pair(
    results: Mapping[ImageId, str],
    references: Mapping[ImageId, Sequence[str]],
    allow_missing: bool = False,
) -> tuple[list[str], list[list[str]]]:
    """Candidates and references of the same pictures, in the order of the results.

    Args:
        results: see `read_results`.
        references: see `read_references`.
        allow_missing: pictures that have references alone are left out, as COCO's example does.

    Raises:
        ConfigError: a picture has a caption and no reference, or a reference and no caption.
    """
    unknown = [image for image in results if image not in references]
    if unknown:
        raise ConfigError(
            f'results: {len(unknown)} of {len(results)} pictures have no reference, the first is '
            f'image_id {unknown[0]!r}; ids of the references are like '
            f'{next(iter(references), None)!r}'
        )
    missing = [image for image in references if image not in results]
    if missing and not allow_missing:
        raise ConfigError(
            f'results: {len(missing)} of {len(references)} pictures have no caption, the first is '
            f'image_id {missing[0]!r}; allow_missing (--allow_missing) leaves them out'
        )
    return list(results.values()), [list(references[image]) for image in results]


def _read(path: str | os.PathLike) -> Any:
    try:
        return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    # RecursionError: brackets within brackets, thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f'{path}: expected a JSON file of captions, got {error}') from error


def _fields(entry: Any, where: str) -> tuple[ImageId, str]:
    """The two fields of an entry."""
    if not isinstance(entry, dict) or any(field not in entry for field in FIELDS):
        raise ConfigError(f'{where}: expected an object with image_id and caption')
    image, caption = (entry[field] for field in FIELDS)
    if isinstance(image, bool) or not isinstance(image, int | str):
        raise ConfigError(f'{where}: image_id: expected a number or a name, got {image!r}')
    if not isinstance(caption, str):
        raise ConfigError(f'{where}: caption: expected a sentence, got {caption!r}')
    return image, caption
