"""The page of a pipeline: tables of what it came to, and every step on a few clips."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax.reporting import data_uris, report
from vatt_jax.socratic.graph import Entry, Log, Ranking

# Of a list of texts, and of the pictures of a clip, what is shown.
MOST_TEXTS = 8
MOST_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers of a pipeline.

    Attributes:
        title: of the table.
        hint: what is to be known of it.
        header: names of the columns, the first of which holds the names of the rows.
        rows: cells as text.
    """

    title: str
    hint: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A clip and what a pipeline made of it.

    Attributes:
        title: of the pipeline.
        truth: what is known of the clip.
        log: of the steps.
        frames: uint8 [T H W 3]; None: no pictures are shown.
        samples: int16 [S]; None: no sound is offered.
        rate: samples a second.
    """

    title: str
    truth: str
    log: Log
    frames: np.ndarray | None = None
    samples: np.ndarray | None = None
    rate: int = 0


def write(
    path: pathlib.Path, title: str, tables: Sequence[Table], examples: Sequence[Example]
) -> None:
    """Writes the page whole or not at all: one file that needs no server.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        tables: shown first.
        examples: shown below.

    Raises:
        ConfigError: a file stands where the folder belongs.
    """
    template = report.environment().get_template('socratic.html')
    text = template.render(
        title=title,
        tables=tables,
        examples=[_shown_example(example) for example in examples],
        style=(report.PAGE / 'style.css').read_text(encoding='utf-8'),
    )
    report.write_page(path, text.encode('utf-8', 'replace'))


def _shown_example(example: Example) -> dict[str, Any]:
    pictures = []
    if example.frames is not None:
        # Evenly from the first to the last.
        count = min(MOST_PICTURES, len(example.frames))
        chosen = np.linspace(0, len(example.frames) - 1, count).astype(int)
        pictures = [data_uris.jpeg(example.frames[i]) for i in chosen]
    sound = ''
    if example.samples is not None:
        sound = data_uris.wav(example.samples, example.rate)
    return {
        'title': example.title,
        'truth': example.truth,
        'pictures': pictures,
        'sound': sound,
        'steps': [_shown_step(entry) for entry in example.log.entries],
        'seconds': sum(entry.seconds for entry in example.log.entries),
    }


def _shown_step(entry: Entry) -> dict[str, Any]:
    """What the template shows of a step. A prompt holds its inputs already."""
    inputs: Mapping[str, Any] = {} if entry.prompt else entry.inputs
    return {
        'name': entry.step.replace('_', ' '),
        'action': entry.action,
        'prompt': entry.prompt,
        'inputs': [(name.replace('_', ' '), _lines(value)) for name, value in inputs.items()],
        'output': _lines(entry.output),
        'milliseconds': f'{1000 * entry.seconds:.1f}',
    }


def _lines(value: Any) -> list[tuple[str, str]]:
    """(text, its score or '') of a value; of a clip nothing."""
    if isinstance(value, str):
        return [(value, '')]
    if isinstance(value, Ranking):
        scores = [f'{score:.3f}'.replace('-', '−') for score in value.scores]
        return list(zip(value.texts, scores, strict=True))
    if isinstance(value, (list, tuple)):
        lines = [(str(text), '') for text in value[:MOST_TEXTS]]
        if len(value) > MOST_TEXTS:
            lines.append((f'… and {len(value) - MOST_TEXTS} more', ''))
        return lines
    return []
