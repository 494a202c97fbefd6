"""Where the phases of a run lie, and the texts that refer to them.

    <workdir>/phases/1-rgb     the run folder of the first phase of config.phases, 'rgb'
    <workdir>/phases/2-flow    that of the second

In a config `phase:rgb` stands for the first of these wherever a run folder is named. Stored configs
keep it so: a run may be moved, and its phases still find one another.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.run_folder import RunFolder

PREFIX = 'phase:'
# Of phases: their folders are named by them.
NAME = re.compile(r'\w[\w-]*')
_FOLDER_NAME = re.compile(r'([1-9][0-9]*)-(.+)')


def folder_of(workdir: pathlib.Path, number: int, name: str) -> pathlib.Path:
    """The run folder of a phase; they are numbered from 1."""
    return RunFolder(workdir).phases / f'{number}-{name}'


def number_and_name(folder: pathlib.Path) -> tuple[int, str] | None:
    """(2, 'flow') of phases/2-flow; None where a folder is none of a phase."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    if match is None or folder.parent.name != 'phases':
        return None
    return int(match[1]), match[2]


def all_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the phases that are there, in their order; [] for a run without phases."""
    folder = RunFolder(workdir).phases
    if not folder.is_dir():
        return []
    numbered = {}
    for path in folder.iterdir():
        position = number_and_name(path)
        if position is not None and path.is_dir():
            numbered[position] = path
    return [numbered[position] for position in sorted(numbered)]


def begun(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Those of them that have begun to train, and were not only planned."""
    return [path for path in all_folders(workdir) if RunFolder(path).checkpoints.is_dir()]


def last_finished(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of the last phase that is finished; None where none is."""
    finished = [folder for folder in begun(workdir) if RunFolder(folder).done.exists()]
    return finished[-1] if finished else None


def referred(text: Any) -> str:
    """'rgb' of 'phase:rgb'; '' of what refers to no phase."""
    if not isinstance(text, str) or not text.startswith(PREFIX):
        return ''
    name = text.removeprefix(PREFIX)
    # A title may begin with the same word.
    return name if NAME.fullmatch(name) else ''


def replace(config: ConfigDict, function: Callable[[Any], Any]) -> None:
    """Replaces every value of a config by `function` of it, in place, also inside of sequences."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            replace(value, function)
            continue
        replaced = _replaced(value, function)
        if replaced != value:
            config[key] = replaced


def _replaced(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_replaced(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, function) for key, item in value.items()}
    return function(value)


def with_folders(config: ConfigDict, run_folder: pathlib.Path) -> ConfigDict:
    """The config of a phase with the folders that its references stand for.

    Args:
        config: as it was stored in `run_folder`.
        run_folder: of one phase. References to phases that are not beside it stay as they are.
    """
    if number_and_name(run_folder.absolute()) is None:
        return config
    folders = {}
    for folder in all_folders(run_folder.absolute().parent.parent):
        position = number_and_name(folder)
        assert position is not None
        folders[PREFIX + position[1]] = str(folder)
    replaced = config.copy_and_resolve_references()
    replace(replaced, lambda value: folders.get(value, value) if referred(value) else value)
    return replaced


def with_references(config: ConfigDict, run_folder: pathlib.Path) -> ConfigDict:
    """The inverse of `with_folders`: the config as it is stored in `run_folder`."""
    if number_and_name(run_folder.absolute()) is None:
        return config
    beside = run_folder.absolute().parent

    def to_reference(value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        folder = pathlib.Path(value).absolute()
        position = number_and_name(folder)
        if position is None or folder.parent != beside:
            return value
        return PREFIX + position[1]

    replaced = config.copy_and_resolve_references()
    replace(replaced, to_reference)
    return replaced
