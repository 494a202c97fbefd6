"""Pictures with boxes -> host batches: what a detector is trained on.

A dataset is a folder with SPLIT.json in COCO's format (vatt_jax/detection/coco.py) and the pictures
in `images`, or one such json file. A picture keeps its aspect ratio: it lies in the upper left
corner of a grey square, so that one number takes boxes from fractions of the square to pixels.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Float32, UInt8
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.loading import order
from data_pipelines.loading.data_source import SPLITS, Data, Request, Rows, blank, tokenizer_of
from data_pipelines.loading.record_reader import ReadProblems
from data_pipelines.loading.texts import Texts
from data_pipelines.storage.records import read_entries
from vatt_jax.config import ConfigError
from vatt_jax.detection import coco, squares
from vatt_jax.inputs import tokenizer as tokenizers

# The label that names the classes of boxes.
LABEL = 'object'
# A box of which a crop shows less is no example of its class, and no background.
LEAST_SHOWN = 0.5


@dataclasses.dataclass(frozen=True)
class Pictures:
    """One json file, open.

    Attributes:
        name: of the source.
        folder: with the pictures.
        document: the file.
        annotations: of each picture, in its order.
        numbers: id of a category -> number of its class.
    """

    name: str
    folder: pathlib.Path
    document: coco.Document
    annotations: list[list[dict[str, Any]]]
    numbers: dict[Any, int]

    @property
    def class_names(self) -> list[str]:
        return coco.class_names(self.document)

    def __len__(self) -> int:
        return len(self.document['images'])


class Coco(Data):
    """The data object of pictures with boxes.

    config.data.train is the mixture {name: {path, split, weight, share}}; config.data.eval {path}
    the dataset that evaluation passes read (default: the first of the mixture). All of the mixture
    have the same classes; those of the evaluation dataset may differ, as where a detector of
    clusters is measured by true boxes.

    A batch has `boxes` beside its stream: `corners` float32 [B N 4] (x0 y0 x1 y1, fractions of what
    the model sees), `class` int32, `valid` and `ignored` bool [B N].
    """

    def __init__(self, config: ConfigDict):
        """Read the files of a resolved config.

        Raises:
          DataError: nothing to read, a file that is no COCO json, or sources of other classes.
        """
        super().__init__(config)
        entries, evaluation_entry = read_entries(config)
        if not entries:
            raise DataError(
                "config.data.source is 'coco' and config.data.train is empty; set it to "
                "{'mine': {'path': FOLDER}} with a folder of SPLIT.json and images/"
            )
        # The smallest crop of training is no smaller than what the model sees.
        size = self.inputs['video']['size']
        self._canvas = math.ceil(size / math.sqrt(config.data.crop[0]))
        self._mixture = []
        for name, entry in entries.items():
            self._mixture.append(_open(name, entry['path'], entry['split']))
        self._entries = list(entries.values())
        evaluated = evaluation_entry['path'] or self._entries[0]['path']
        self._splits = _evaluated_splits(evaluated)
        names = self._mixture[0].class_names
        for source in self._mixture[1:]:
            if source.class_names != names:
                raise DataError(
                    f'config.data.train.{source.name} has other categories than '
                    f'{self._mixture[0].name}; sources of one run have the same'
                )
        # One shape for every batch, whatever pictures it holds.
        opened = [*self._mixture, *self._splits.values()]
        counts = [len(boxes) for source in opened for boxes in source.annotations]
        self._num_boxes = max([1, *counts])
        words = tokenizers.Words([])
        self.tokenizer = tokenizer_of(self.inputs, words.to_spec(), 'pictures')
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': {LABEL: names},
            'sources': [source.name for source in self._mixture],
        }
        self._problems = ReadProblems(config.data.max_corrupt)

    # ---- what a split is made of
    def _opened(self, split: str, by: str) -> list[Pictures]:
        if split == 'train' and by == 'records':
            return self._mixture
        return [self._splits[split]] if split in self._splits else []

    def _sources(self, split: str, by: str) -> list[order.Source]:
        opened = self._opened(split, by)
        if opened is not self._mixture:
            return [order.Source(len(source), name=source.name) for source in opened]
        sources = []
        for source, entry in zip(opened, self._entries, strict=True):
            weight, share = float(entry['weight']), float(entry['share'])
            sources.append(order.Source(len(source), weight=weight, share=share, name=source.name))
        return sources

    def boxes(self, split: str) -> coco.Document:
        """The file of a split of the evaluation dataset: pictures in the order of a pass.

        Raises:
          DataError: it has no such split.
        """
        return self._split(split).document

    def picture(self, split: str, place: int) -> UInt8[np.ndarray, 'S S 3']:
        """A picture of the evaluation dataset in its square; grey where it cannot be read."""
        return self._read(self._split(split), place)[0]

    def _split(self, split: str) -> Pictures:
        if split not in self._splits:
            raise DataError(
                f'the pictures that are evaluated have no split {split!r}; they have '
                f'{", ".join(self._splits)} (config.data.eval names their folder)'
            )
        return self._splits[split]

    def texts(self, split: str, by: str = 'segments') -> Texts:
        opened = self._opened(split, by)
        images = [image for source in opened for image in source.document['images']]

        def entry(i: int) -> dict[str, Any]:
            name = images[i]['file_name']
            return {'id': name, 'start': 0.0, 'end': 0.0, 'caption': '', 'sentences': []}

        return Texts(range(len(images)), entry)

    def problems(self) -> dict[str, Any]:
        return self._problems.summary()

    # ---- batches
    def _batches(
        self, request: Request, rows_of_batch: Callable[[int], Rows], num_batches: int | None
    ) -> Iterator[dict[str, Any]]:
        by = 'segments' if request.segments else 'records'
        opened = self._opened(request.split, by)
        if not opened:
            self._split(request.split)  # raises
        for view in request.views:
            if view.modality == 'video' and view.stream != 'video':
                raise DataError(
                    f'config.data.views: pictures with boxes have no view {view.stream!r}'
                )
        numbers = itertools.count() if num_batches is None else iter(range(num_batches))
        make = functools.partial(self._make, request, opened)
        return self._read_ahead(make, rows_of_batch, numbers)

    def _read_ahead(
        self,
        make: Callable[..., dict[str, Any]],
        rows_of_batch: Callable[[int], Rows],
        numbers: Iterator[int],
    ) -> Iterator[dict[str, Any]]:
        """Batches in their order, the next ones being read meanwhile."""
        data_config = self.config.data
        pool = concurrent.futures.ThreadPoolExecutor(data_config.threads)
        # Batches wait for their pictures: two kinds of work, so two pools.
        batch_pool = concurrent.futures.ThreadPoolExecutor(1)
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for number in itertools.islice(numbers, data_config.prefetch):
                waiting.append(batch_pool.submit(make, pool, rows_of_batch(number)))
            while waiting:
                batch = waiting.popleft().result()
                for number in itertools.islice(numbers, 1):
                    waiting.append(batch_pool.submit(make, pool, rows_of_batch(number)))
                yield batch
        finally:
            batch_pool.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)

    def _make(
        self,
        request: Request,
        opened: list[Pictures],
        pool: concurrent.futures.Executor,
        rows: Rows,
    ) -> dict[str, Any]:
        """One batch."""
        sources = [opened[number] for number in rows.source]
        read = list(pool.map(self._read, sources, rows.index.tolist()))
        is_read = np.array([not reason for _, reason in read])
        self._count(opened, rows, [reason for _, reason in read])
        batch: dict[str, Any] = {
            'index': rows.index.astype(np.int32),
            'source': rows.source,
            'position': rows.position,
            'valid': rows.valid.copy(),
        }
        sides = np.full(len(rows.index), self._canvas)
        (view,) = [view for view in request.views if view.stream == 'video']
        crop, flip = self.crops(request, rows, view, sides, sides)
        pictures = np.stack([picture for picture, _ in read])  # [B H W 3]
        frames = self.inputs['video']['frames']
        batch['video'] = {
            'data': np.repeat(pictures[:, None], frames, axis=1),
            'valid': is_read & rows.valid,
            'start': np.zeros(len(rows.index), np.float32),
            'box': crop,
            'flip': flip,
        }
        batch['boxes'] = self._boxes(sources, rows, crop, flip)
        batch['labels'] = {LABEL: self._multi_hot(batch['boxes'], sources)}
        return blank(batch, ~(is_read & rows.valid))

    def _read(self, source: Pictures, index: int) -> tuple[UInt8[np.ndarray, 'H W 3'], str]:
        """(a picture in its square, why it could not be read)."""
        image = source.document['images'][index]
        path = source.folder / image['file_name']
        try:
            with PIL.Image.open(path) as stored:
                picture = stored.convert('RGB')
        # Of damaged files PIL raises several types, all of these kinds.
        except (OSError, ValueError, SyntaxError) as error:
            return np.zeros((self._canvas, self._canvas, 3), np.uint8), f'{path}: {error}'
        return squares.in_square(picture, self._canvas), ''

    def _count(self, opened: list[Pictures], rows: Rows, reasons: list[str]) -> None:
        total = sum(len(source) for source in opened)
        for number, source in enumerate(opened):
            chosen = np.flatnonzero((rows.source == number) & rows.valid)
            of_source = [reasons[row] for row in chosen]
            self._problems.add(source.name, rows.index[chosen], of_source, total)

    def _boxes(
        self,
        sources: list[Pictures],
        rows: Rows,
        crop: Float32[np.ndarray, 'B 4'],
        flip: Bool[np.ndarray, ' B'],
    ) -> dict[str, np.ndarray]:
        """The boxes of a batch as its crops show them; see the class."""
        batch_size = len(sources)
        boxes = {
            'corners': np.zeros((batch_size, self._num_boxes, 4), np.float32),
            'class': np.zeros((batch_size, self._num_boxes), np.int32),
            'valid': np.zeros((batch_size, self._num_boxes), bool),
            'ignored': np.zeros((batch_size, self._num_boxes), bool),
        }
        for row, (source, index) in enumerate(zip(sources, rows.index.tolist(), strict=True)):
            image = source.document['images'][index]
            corners, classes, is_crowd = coco.boxes_of(source.annotations[index], source.numbers)
            corners = corners / max(image['width'], image['height'])
            shown, share = crop_boxes(corners, crop[row], bool(flip[row]))
            count = len(shown)
            boxes['corners'][row, :count] = shown
            boxes['class'][row, :count] = classes
            boxes['valid'][row, :count] = share > 0
            boxes['ignored'][row, :count] = is_crowd | (share < LEAST_SHOWN)
        return boxes

    def _multi_hot(
        self, boxes: Mapping[str, np.ndarray], sources: list[Pictures]
    ) -> Float32[np.ndarray, 'B P']:
        """Which classes each picture shows; zeros where classes are not those of training."""
        names = self.info['labels'][LABEL]
        labels = np.zeros((len(sources), len(names)), np.float32)
        rows, places = np.nonzero(boxes['valid'] & ~boxes['ignored'])
        is_known = np.array([source.class_names == names for source in sources])
        rows, places = rows[is_known[rows]], places[is_known[rows]]
        labels[rows, boxes['class'][rows, places]] = 1
        return labels


def crop_boxes(
    corners: Float[np.ndarray, 'N 4'], crop: Float[np.ndarray, ' 4'], is_flipped: bool
) -> tuple[Float[np.ndarray, 'N 4'], Float[np.ndarray, ' N']]:
    """Boxes as a crop shows them.

    Args:
      corners: x0, y0, x1, y1 in fractions of the square.
      crop: y0, x0, y1, x1 in the same.
      is_flipped: whether the crop is mirrored.

    Returns:
      (corners in fractions of the crop, cut at its edge; share of each box that is shown).
    """
    low, high = crop[[1, 0]], crop[[3, 2]]
    moved = (corners - np.tile(low, 2)) / np.tile(high - low, 2)
    shown = np.clip(moved, 0, 1)
    if is_flipped:
        shown[:, [0, 2]] = 1 - shown[:, [2, 0]]
    whole = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    left = (shown[:, 2] - shown[:, 0]) * (shown[:, 3] - shown[:, 1])
    # A box without area shows nothing.
    return shown, np.where(whole > 0, left / np.maximum(whole, 1e-12), 0)


def _open(name: str, path: str, split: str) -> Pictures:
    """One json file: that of a split in a folder, or the file itself."""
    file = pathlib.Path(path)
    if file.suffix != '.json':
        file = file / f'{split}.json'
    try:
        document = coco.read(file)
    except ConfigError as error:
        raise DataError(f'config.data: {error}') from error
    return Pictures(
        name,
        file.parent / coco.IMAGES,
        document,
        coco.by_image(document),
        coco.class_numbers(document),
    )


def _evaluated_splits(path: str) -> dict[str, Pictures]:
    """The splits of a folder that are there; of a file, `test` alone."""
    file = pathlib.Path(path)
    if file.suffix == '.json':
        return {'test': _open(file.stem, path, 'test')}
    splits = {}
    for split in SPLITS:
        if (file / f'{split}.json').is_file():
            splits[split] = _open(file.name, path, split)
    return splits
