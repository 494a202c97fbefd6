"""Which classes are taken for which: a table for few classes, a picture and lists for many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from vatt_jax.reporting import data_uris

# More cannot be read as a table of numbers.
MOST_CLASSES_IN_A_TABLE = 24
# Pairs of classes that are listed, the most frequent ones.
LISTED_PAIRS = 50
# Rows of the table of classes or clusters.
LISTED_CLASSES = 1000
# Cells whose counts the picture knows when it is pointed at.
MOST_CELLS = 20_000
# Pixels along a side of the picture.
PICTURE_SIDE = 512


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a small table.

    Attributes:
        count: clips.
        share: of the clips of its true class, from 0 to 1.
        title: what it says, in words.
        is_right: whether it lies on the diagonal.
    """

    count: int
    share: float
    title: str
    is_right: bool


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """How one class fared.

    Attributes:
        name: of the class.
        clips: of that class.
        recall: share of them that were predicted so; None without clips.
        taken_for: the most frequent other prediction, with its count; '' for none.
    """

    name: str
    clips: int
    recall: float | None
    taken_for: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A frequent confusion."""

    true: str
    predicted: str
    count: int
    share: float


@dataclasses.dataclass(frozen=True)
class Confusion:
    """All that is shown of one evaluator's confusions.

    Attributes:
        title: of the evaluator.
        names: of the classes.
        cells: row of each true class; [] where there are too many classes.
        picture: data URI of the same as a picture; '' where there is a table.
        summary: the picture in words.
        data: what the script says of a cell of the picture: `names` and `counts`, flat (row,
            column, count) of the largest.
        classes: how each class fared.
        pairs: the most frequent confusions.
    """

    title: str
    names: list[str]
    cells: list[list[Cell]]
    picture: str
    summary: str
    data: dict[str, Any]
    classes: list[ClassRow]
    pairs: list[Pair]


def confusion(
    title: str, counts: Int[np.ndarray, 'P P'], class_names: Sequence[str]
) -> Confusion | None:
    """What to show of a confusion matrix; None for one without clips.

    Args:
        title: of the evaluator.
        counts: clips by true class (row) and predicted class (column).
        class_names: maybe fewer than there are classes; the rest are numbered.
    """
    if not counts.sum():
        return None
    numbers = [str(i) for i in range(len(counts))]
    names = [*class_names[: len(counts)], *numbers[len(class_names) :]]
    # By true class, so that rare classes are as dark as frequent ones; empty rows stay 0.
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    is_small = len(counts) <= MOST_CLASSES_IN_A_TABLE
    right = np.trace(counts) / counts.sum()
    return Confusion(
        title=title,
        names=names,
        cells=_cells(counts, shares, names) if is_small else [],
        picture='' if is_small else data_uris.png(picture(shares)),
        summary=(
            f'{len(counts)} classes, {counts.sum()} clips, {100 * right:.1f} % of them on the '
            'diagonal'
        ),
        data={} if is_small else {'names': names, 'counts': _largest_cells(counts)},
        classes=_class_rows(counts, shares, names),
        pairs=_pairs(counts, shares, names),
    )


def picture(shares: Shaped[np.ndarray, 'P P']) -> UInt8[np.ndarray, 'N N 3']:
    """Shares as shades of blue on white; one pixel a class, or several classes of many."""
    if len(shares) > PICTURE_SIDE:
        # The largest share of every block: an average would hide single confusions.
        starts = np.linspace(0, len(shares), PICTURE_SIDE, endpoint=False).astype(int)
        rows = np.maximum.reduceat(shares, starts, 0)
        shares = np.maximum.reduceat(rows, starts, 1)
    # The smallest share that is not 0 is a quarter of full blue, to be seen at all.
    x = np.where(shares > 0, 0.25 + 0.75 * np.sqrt(shares), 0)[..., None]
    blue = np.array([30, 80, 200])
    return (255 - x * (255 - blue)).astype(np.uint8)


def _cells(
    counts: Int[np.ndarray, 'P P'], shares: Shaped[np.ndarray, 'P P'], names: Sequence[str]
) -> list[list[Cell]]:
    rows = []
    for i, true in enumerate(names):
        row = []
        for j, predicted in enumerate(names):
            count, share = int(counts[i, j]), float(shares[i, j])
            words = f'{true} taken for {predicted}: {count} ({100 * share:.0f} %)'
            if i == j:
                words = f'{true} recognised: {count} ({100 * share:.0f} %)'
            row.append(Cell(count, share, words, i == j))
        rows.append(row)
    return rows


def _class_rows(
    counts: Int[np.ndarray, 'P P'], shares: Shaped[np.ndarray, 'P P'], names: Sequence[str]
) -> list[ClassRow]:
    rows = []
    for i, name in enumerate(names[:LISTED_CLASSES]):
        clips = int(counts[i].sum())
        others = counts[i].copy()
        others[i] = 0
        worst = int(others.argmax())
        taken_for = f'{names[worst]} ({others[worst]})' if others[worst] else ''
        recall = float(shares[i, i]) if clips else None
        rows.append(ClassRow(name, clips, recall, taken_for))
    return rows


def _pairs(
    counts: Int[np.ndarray, 'P P'], shares: Shaped[np.ndarray, 'P P'], names: Sequence[str]
) -> list[Pair]:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    # Stable: of equal counts, the one of the lower class first.
    order = np.argsort(-wrong, axis=None, kind='stable')[:LISTED_PAIRS]
    pairs = []
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[i, j]:
            pairs.append(Pair(names[i], names[j], int(wrong[i, j]), float(shares[i, j])))
    return pairs


def _largest_cells(counts: Int[np.ndarray, 'P P']) -> list[int]:
    """Flat (row, column, count) of the largest cells that are not 0."""
    order = np.argsort(-counts, axis=None, kind='stable')[:MOST_CELLS]
    rows, columns = np.unravel_index(order, counts.shape)
    found = np.stack([rows, columns, counts[rows, columns]], 1)
    return found[found[:, 2] > 0].ravel().tolist()
