"""The playground: a small world, rendered to mp4 files (docs/playground.md).

What is seen, heard and said in it explains each other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.datasets.playground.render import render
from data_pipelines.datasets.playground.world import Config
from data_pipelines.errors import DataError

__all__ = ['Config', 'is_made', 'make', 'render']


def is_made(path: str | os.PathLike) -> bool:
    """Whether nothing is left to be rendered or prepared."""
    from data_pipelines.prepare import is_finished

    return is_finished(pathlib.Path(path) / 'records')


def make(
    path: str | os.PathLike = '', processes: int = 2, quiet: bool = False, **fields: Any
) -> pathlib.Path:
    """Renders a playground into <path>/media and prepares it as any user's mp4 files are.

    What is there already stays.

    Args:
        path: the folder to make it in.
        processes: that render and decode.
        quiet: without progress bars.
        **fields: of Config.

    Returns:
        The folder of prepared records, <path>/records.

    Raises:
        DataError: a field is wrong, or <path> holds another playground.
        MissingExtra: flow is asked for, and OpenCV is not installed.
    """
    # Imported here: it imports TensorFlow, which is not needed to render a playground alone.
    from data_pipelines.preparation.arguments import flow_method
    from data_pipelines.prepare import prepare

    config = checked_config(fields)
    if not path:
        raise DataError(
            'the playground has no path; name the folder it is made in, such as '
            'path=runs/data/playground'
        )
    path = pathlib.Path(path)
    if not is_made(path):
        flow_method(config.flow)  # before minutes of rendering
    claim_folder(path, config)
    records = path / 'records'
    if not is_made(path):
        render(config, path, processes, quiet)
        prepare(
            str(path / 'media'),
            str(path / 'captions.json'),
            str(records),
            annotations=str(path / 'annotations.json'),
            fps=config.fps,
            size=config.size,
            rate=config.rate,
            processes=processes,
            name='playground',
            quiet=quiet,
            flow=config.flow,
        )
    return records


def checked_config(fields: Mapping[str, Any]) -> Config:
    """The Config of these fields. Raises DataError for an unknown name or a wrong value."""
    known = {f.name for f in dataclasses.fields(Config)}
    for name, value in fields.items():
        if name not in known:
            raise DataError(
                f'the playground has no field {name!r} (={value!r}); '
                f'it has {", ".join(sorted(known))}'
            )
    try:
        return Config(**fields)
    except ValueError as error:
        raise DataError(str(error)) from error


def claim_folder(path: pathlib.Path, config: Config) -> None:
    """Notes in `path` which playground it holds. Raises DataError when it holds another one."""
    note = path / 'playground.json'
    asked = dataclasses.asdict(config)
    if not note.exists():
        path.mkdir(parents=True, exist_ok=True)
        # Under another name first, so that a note that is there is whole.
        temporary = note.with_suffix('.tmp')
        temporary.write_text(json.dumps(asked, indent=1))
        os.replace(temporary, note)
        return
    # A playground older than some fields: their defaults are what it was made with.
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    found = {**defaults, **json.loads(note.read_text())}
    for field, value in asked.items():
        if found[field] != value:
            raise DataError(
                f'{path} holds a playground with {field}={found[field]!r}, got {value!r}; '
                'name another path'
            )
