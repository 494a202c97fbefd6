"""The playground: a small world, rendered to mp4 files, whose sights, sounds and words explain each other (docs/playground.md)."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from data_pipelines.datasets.playground.render import render
from data_pipelines.datasets.playground.world import Config
from data_pipelines.errors import DataError

__all__ = ['Config', 'is_made', 'make', 'render']


def is_made(path: str | os.PathLike) -> bool:
    """Whether nothing is left to be rendered or prepared."""
    from data_pipelines.prepare import is_finished

    return is_finished(pathlib.Path(path) / 'records')


def make(
    path: str | os.PathLike = '', processes: int = 2, quiet: bool = False, **fields
) -> pathlib.Path:
    """Renders a playground into <path>/media and prepares it into <path>/records, as any user's mp4 files are; returns the latter.

    fields: of Config. What is there already is kept. Raises DataError for a wrong field, or when <path> holds another playground.
    """
    from data_pipelines.prepare import prepare

    known = {f.name for f in dataclasses.fields(Config)}
    for name, value in fields.items():
        if name not in known:
            raise DataError(
                f'the playground has no field {name!r} (={value!r}); it has {", ".join(sorted(known))}'
            )
    try:
        config = Config(**fields)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not path:
        raise DataError(
            'the playground has no path; name the folder it is made in, such as path=runs/data/playground'
        )
    path = pathlib.Path(path)
    stamp = path / 'playground.json'
    wanted = dataclasses.asdict(config)
    if stamp.exists():
        have = json.loads(stamp.read_text())
        changed = [k for k in wanted if have.get(k) != wanted[k]]
        if changed:
            raise DataError(
                f'{path} holds a playground with {changed[0]}={have.get(changed[0])!r} and {wanted[changed[0]]!r} is asked '
                'for; name another path, or remove that folder'
            )
    else:
        path.mkdir(parents=True, exist_ok=True)
        temporary = stamp.with_suffix('.tmp')
        temporary.write_text(json.dumps(wanted, indent=1))
        os.replace(temporary, stamp)
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
        )
    return records
