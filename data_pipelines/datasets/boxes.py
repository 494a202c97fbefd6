"""Datasets with boxes, from their owners' files to COCO's format: what detectors are measured on.

    python -m data_pipelines.datasets.boxes --dataset=openimages --folder=data/openimages \\
        --out=data/true
    python -m data_pipelines.datasets.boxes --dataset=vggsound --folder=data/vggsound --out=data/vgg

Pictures are expected in `images` below --out; sizes are read from them, so that one that is not
there is left out and counted. What its owners say of a box beyond COCO stays in further fields.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import PIL.Image

from data_pipelines.errors import DataError
from vatt_jax.command_line import expand_home
from vatt_jax.detection import coco

# Names of OpenImages' classes of musical instruments. Which 15 of them the paper took is not known
# here; --classes names others.
INSTRUMENTS = (
    'Accordion',
    'Banjo',
    'Cello',
    'Drum',
    'Flute',
    'Guitar',
    'Harmonica',
    'Harp',
    'Oboe',
    'Organ (Musical Instrument)',
    'Piano',
    'Saxophone',
    'Trombone',
    'Trumpet',
    'Violin',
)
# Columns of OpenImages' box files that are kept as they are, under these names.
FLAGS = {
    'IsOccluded': 'occluded',
    'IsTruncated': 'truncated',
    'IsGroupOf': 'group_of',
    'IsDepiction': 'depiction',
    'IsInside': 'inside',
}


@dataclasses.dataclass(frozen=True)
class Box:
    """A box as its owners have it.

    Attributes:
        name: of its class.
        corners: x0, y0, x1, y1 in fractions of the picture.
        is_crowd: a group in one box.
        further: fields of its own.
    """

    name: str
    corners: tuple[float, float, float, float]
    is_crowd: bool = False
    further: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its boxes; `label` is the class of the whole, '' where there is none."""

    file_name: str
    boxes: list[Box]
    label: str = ''


def openimages(
    folder: pathlib.Path, split: str, classes: Sequence[str]
) -> tuple[list[Picture], list[str]]:
    """OpenImages: SPLIT-annotations-bbox.csv and class-descriptions-boxable.csv (V4 to V7).

    A box of IsGroupOf (more than five instances that touch) becomes a crowd.
    """
    descriptions = _find(folder, 'class-descriptions-boxable.csv', '*class-descriptions*.csv')
    name_of = {}
    with descriptions.open(newline='') as file:
        for identifier, name in csv.reader(file):
            name_of[identifier] = name
    names = list(classes) or list(INSTRUMENTS)
    unknown = sorted(set(names) - set(name_of.values()))
    if unknown:
        raise DataError(f'{descriptions}: no class {unknown[0]!r}; --classes names others')
    pictures: dict[str, Picture] = {}
    path = _find(folder, f'{split}-annotations-bbox.csv', f'*{split}*annotations-bbox.csv')
    for row in _rows(path, ('ImageID', 'LabelName', 'XMin', 'XMax', 'YMin', 'YMax')):
        name = name_of.get(row['LabelName'], '')
        if name not in names:
            continue
        low = float(row['XMin']), float(row['YMin'])
        high = float(row['XMax']), float(row['YMax'])
        # -1: unknown.
        flags = {field: int(row.get(column) or -1) for column, field in FLAGS.items()}
        picture = pictures.setdefault(row['ImageID'], Picture(f'{row["ImageID"]}.jpg', []))
        picture.boxes.append(Box(name, (*low, *high), flags['group_of'] == 1, flags))
    return list(pictures.values()), names


def vggsound(
    folder: pathlib.Path, split: str, classes: Sequence[str]
) -> tuple[list[Picture], list[str]]:
    """VGG-Sound: vggsound.csv (ID, start, label, split; no header), pictures ID_START.jpg.

    Classes of instruments are those whose label begins with 'playing'. Boxes are those of VGG-SS
    (vggss.json: file, class, bbox in fractions) where that file is there; else pictures have a
    class and no box.
    """
    boxes_of: dict[str, list[Box]] = {}
    box_file = next(iter(sorted(folder.glob('vggss.json'))), None)
    if box_file is not None:
        for entry in json.loads(box_file.read_text()):
            boxes = [Box(entry['class'], tuple(box)) for box in entry['bbox']]
            boxes_of[entry['file']] = boxes
    pictures = []
    found = set()
    path = _find(folder, 'vggsound.csv')
    for row in _rows(path, ('id', 'start', 'label', 'split'), has_header=False):
        is_chosen = row['label'] in classes if classes else row['label'].startswith('playing ')
        if not is_chosen:
            continue
        found.add(row['label'])
        if row['split'] == split:
            stem = f'{row["id"]}_{int(float(row["start"])):06d}'
            pictures.append(Picture(f'{stem}.jpg', boxes_of.get(stem, []), row['label']))
    return pictures, sorted(found)


def audioset(
    folder: pathlib.Path, split: str, classes: Sequence[str]
) -> tuple[list[Picture], list[str]]:
    """AudioSet: its segments lists and class_labels_indices.csv, pictures ID_START.jpg.

    Several classes of a clip: the picture's label is its only chosen one; clips with several are
    left out. Boxes have no official file.
    """
    name_of = {}
    labels_path = _find(folder, 'class_labels_indices.csv')
    for row in _rows(labels_path, ('mid', 'display_name')):
        name_of[row['mid']] = row['display_name']
    wanted = list(classes) or sorted(set(name_of.values()) & set(INSTRUMENTS))
    lists = {'train': ('balanced_train_segments', 'unbalanced_train_segments')}
    pictures = []
    for stem in lists.get(split, ('eval_segments',)):
        path = folder / f'{stem}.csv'
        if not path.is_file():
            continue
        columns = ('id', 'start', 'end', 'labels')
        for row in _rows(path, columns, has_header=False):
            names = [name_of.get(mid, '') for mid in row['labels'].split(',')]
            chosen = [name for name in names if name in wanted]
            if len(chosen) == 1:
                start = int(float(row['start']))
                pictures.append(Picture(f'{row["id"]}_{start:06d}.jpg', [], chosen[0]))
    return pictures, wanted


# (folder, split, classes) -> (pictures, names of the classes)
Reader = Callable[[pathlib.Path, str, Sequence[str]], tuple[list[Picture], list[str]]]
DATASETS: dict[str, Reader] = {
    'openimages': openimages,
    'vggsound': vggsound,
    'audioset': audioset,
}


def _find(folder: pathlib.Path, *patterns: str) -> pathlib.Path:
    """The first file that one of the patterns, tried in turn, names."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise DataError(f'{folder}: expected the file {patterns[0]}, as its owners distribute it')


def _rows(
    path: pathlib.Path, columns: Sequence[str], has_header: bool = True
) -> Iterator[dict[str, str]]:
    """Rows of a csv; lines that begin with # are none."""
    with path.open(newline='', encoding='utf-8') as file:
        lines = (line for line in file if not line.startswith('#'))
        reader = csv.DictReader(
            lines, fieldnames=None if has_header else list(columns), skipinitialspace=True
        )
        for row in reader:
            missing = [column for column in columns if row.get(column) is None]
            if missing:
                raise DataError(
                    f'{path}: expected the columns {", ".join(columns)}, got a line without '
                    f'{missing[0]}'
                )
            yield row


def to_document(
    pictures: Sequence[Picture], names: Sequence[str], images: pathlib.Path
) -> tuple[coco.Document, int]:
    """(the pictures that are there in COCO's format, how many are not there).

    Args:
        pictures: of a dataset.
        names: of its classes.
        images: folder with the pictures.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    num_missing = 0
    for picture in pictures:
        try:
            with PIL.Image.open(images / picture.file_name) as stored:
                width, height = stored.size
        except OSError:
            num_missing += 1
            continue
        number = len(entries)
        image = coco.make_image(number, picture.file_name, width, height)
        if picture.label:
            image['label'] = picture.label
        entries.append(image)
        for box in picture.boxes:
            x0, y0, x1, y1 = box.corners
            pixels = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
            annotations.append(
                coco.make_annotation(
                    len(annotations) + 1,
                    number,
                    list(names).index(box.name) + 1,
                    pixels,
                    box.is_crowd,
                    **box.further,
                )
            )
    categories = coco.make_categories(names)
    return {'images': entries, 'annotations': annotations, 'categories': categories}, num_missing


def main(argv: list[str]) -> None:
    """The command of this file."""
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.datasets.boxes', description=__doc__.splitlines()[0]
    )
    parser.add_argument('--dataset', choices=sorted(DATASETS), required=True)
    parser.add_argument('--folder', required=True, help="with the owners' files")
    parser.add_argument('--out', required=True, help='folder of images/, where json is written')
    parser.add_argument('--split', default='test', help='train, validation or test')
    parser.add_argument('--classes', default='', help='names, separated by ;')
    flags: Any = parser.parse_args(expand_home(argv))
    classes = [name for name in flags.classes.split(';') if name]
    out = pathlib.Path(flags.out)
    pictures, names = DATASETS[flags.dataset](pathlib.Path(flags.folder), flags.split, classes)
    document, num_missing = to_document(pictures, names, out / coco.IMAGES)
    coco.write(out / f'{flags.split}.json', document)
    print(
        f'{out}/{flags.split}.json: {len(document["images"])} pictures with '
        f'{len(document["annotations"])} boxes of {len(names)} classes; '
        f'{num_missing} pictures are not in {out / coco.IMAGES}'
    )


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f'error: {error}')
