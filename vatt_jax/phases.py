"""config.phases: trainings one after the other in one run folder (docs/phases.md)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import phase_folders
from vatt_jax.config import ConfigError
from vatt_jax.run_folder import RunFolder

# Of the process that trains all phases.
_OF_ALL = ('phases', 'jax_platform', 'compilation_cache', 'object_store')
_EXAMPLE = "('rgb', {'steps': 1000})"


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training of several.

    Attributes:
        number: its place, from 1.
        name: of the phase.
        config: the whole config of this training; earlier phases are named by their folders.
        folder: its run folder.
    """

    number: int
    name: str
    config: ConfigDict
    folder: pathlib.Path


def resolve(config: ConfigDict, workdir: pathlib.Path) -> list[Phase]:
    """The phases of a config, in their order; [] for a config without phases.

    Args:
        config: with all its fields; it is not changed.
        workdir: the run folder of them all; it need not exist.

    Raises:
        ConfigError: config.phases is malformed, sets a field that there is not, or a phase refers
            to one that does not come before it.
    """
    workdir = workdir.absolute()
    names = _names(config.phases)
    folders: dict[str, pathlib.Path] = {}
    found = []
    for number, (name, changes) in enumerate(config.phases, start=1):
        folder = phase_folders.folder_of(workdir, number, name)
        phase_config = _with_changes(config, name, changes)
        _resolve_references(phase_config, name, folders, names)
        found.append(Phase(number, name, phase_config, folder))
        folders[name] = folder
    return found


def all_configs(config: ConfigDict) -> list[ConfigDict]:
    """The config of each training: of every phase, or `config` itself where it has none."""
    # Where the folders are is of no interest here.
    return [phase.config for phase in resolve(config, pathlib.Path('.'))] or [config]


def _names(phases: Iterable[Any]) -> list[str]:
    names: list[str] = []
    for entry in phases:
        if not (isinstance(entry, (tuple, list)) and len(entry) == 2):
            raise ConfigError(
                f'config.phases: expected pairs of a name and the fields that it changes, such as '
                f'{_EXAMPLE}, got {entry!r}'
            )
        name, changes = entry
        if not (isinstance(name, str) and phase_folders.NAME.fullmatch(name)):
            raise ConfigError(
                f'config.phases: expected a name of letters, digits, _ and -, got {name!r}'
            )
        is_mapping = isinstance(changes, (Mapping, ConfigDict))
        if not is_mapping or not all(isinstance(path, str) for path in changes):
            raise ConfigError(
                f'config.phases.{name}: expected a dictionary of fields, such as {_EXAMPLE}, got '
                f'{changes!r}'
            )
        if name in names:
            raise ConfigError(f'config.phases: two of them are named {name!r}; rename one')
        names.append(name)
    return names


def _with_changes(config: ConfigDict, name: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The config of one phase; references are not resolved yet."""
    changed = config.copy_and_resolve_references()
    changed.phases = ()
    # Shown in logs and reports, where phases stand side by side.
    changed.name = f'{config.name}: {name}'
    for path, value in changes.items():
        if path.split('.')[0] in _OF_ALL:
            raise ConfigError(
                f'config.phases.{name}: {path} is the same in all phases; set config.{path}'
            )
        configs.assign(changed, path, value, f'config.phases.{name}')
    return changed


def _resolve_references(
    config: ConfigDict, name: str, earlier: Mapping[str, pathlib.Path], names: list[str]
) -> None:
    """Puts the folders of earlier phases in the place of 'phase:NAME', wherever it stands."""

    def folder_of(value: Any) -> Any:
        other = phase_folders.referred(value)
        if not other:
            return value
        if other in earlier:
            return str(earlier[other])
        choice = f'one of {", ".join(earlier)}' if earlier else 'none, since this is the first'
        if other in names:
            raise ConfigError(
                f'config.phases.{name}: {value!r} does not come before it; expected an earlier '
                f'phase, {choice}'
            )
        raise ConfigError(
            f'config.phases.{name}: {value!r} is no phase; expected an earlier one, {choice}'
        )

    phase_folders.replace(config, folder_of)


def override(config: ConfigDict, assignments: Iterable[tuple[str, str]]) -> None:
    """Set fields in place from the command line, see `config.override`.

    ('phases.rgb.steps', '200') sets the field `steps` of the phase `rgb` alone.

    Raises:
        ConfigError: There is no such phase or field, or the text is no value of its type.
    """
    of_phases = []
    for path, text in assignments:
        if path.startswith('phases.'):
            of_phases.append((path, text))
        else:
            configs.override(config, [(path, text)])
    # Last: what fields hold, and so of which type they are, is decided by then.
    for path, text in of_phases:
        _override_one(config, path, text)


def _override_one(config: ConfigDict, path: str, text: str) -> None:
    _, name, *rest = path.split('.')
    field = '.'.join(rest)
    names = _names(config.phases)
    where = f'--config.{path}={text}'
    if name not in names:
        there = f'there are {", ".join(names)}' if names else 'this config has none'
        raise ConfigError(f'{where}: there is no phase {name!r}; {there}')
    if not field:
        raise ConfigError(f'{where}: expected a field of the phase, such as phases.{name}.steps')
    changed = []
    for other, changes in config.phases:
        if other == name:
            changes = dict(changes)
            # Last in the order in which the fields are set.
            changes.pop(field, None)
            changes[field] = _parsed(_with_changes(config, name, changes), field, text)
        changed.append((other, changes))
    config.phases = tuple(changed)


def _parsed(config: ConfigDict, field: str, text: str) -> Any:
    """The value that a text stands for as a field of `config`, which is changed."""
    configs.override(config, [(field, text)])
    value: Any = config
    for key in field.split('.'):
        value = value[key]
    return value.to_dict() if isinstance(value, ConfigDict) else value


def has_phases(path: pathlib.Path) -> bool:
    """Whether a folder is that of a run with phases."""
    # A folder `phases` inside an ordinary run is the user's own.
    return bool(phase_folders.all_folders(path)) and not RunFolder(path).checkpoints.is_dir()


def model_folder(path: pathlib.Path) -> pathlib.Path:
    """The run folder whose model is meant: of a run with phases that of the last finished one.

    Args:
        path: a run folder, or anything else, which is returned as it is.

    Raises:
        ConfigError: no phase is finished.
    """
    if not has_phases(path):
        return path
    finished = phase_folders.last_finished(path)
    if finished is None:
        begun = phase_folders.begun(path)
        advice = f', or name the folder of one that has begun: {begun[-1]}' if begun else ''
        raise ConfigError(f'{path} holds no checkpoint of a finished phase; train on{advice}')
    return finished


def config_of_model(config: ConfigDict, path: pathlib.Path) -> ConfigDict:
    """The config that belongs to `model_folder(path)`.

    Args:
        config: of all phases; any other is returned as it is.
        path: the run folder of all phases or of one.

    Raises:
        ConfigError: no phase is finished, or `config` has other phases than the folder.
    """
    if not config.phases:
        return config
    folder = model_folder(path).absolute()
    workdir = path if has_phases(path) else folder.parent.parent
    for phase in resolve(config, workdir):
        if phase.folder == folder:
            return phase.config
    raise ConfigError(
        f'{folder} is of no phase of this config ({", ".join(_names(config.phases))}); leave '
        '--config out to use the one that is stored with the run'
    )


def check_has_none(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks that neither a config nor a run folder is about phases.

    Raises:
        ConfigError: the folder holds phases, or a field refers to one.
    """
    if has_phases(workdir):
        raise ConfigError(
            f'--workdir={workdir} holds a run with phases, and this config has none; choose '
            'another --workdir'
        )
    for field, value in configs.flatten(config):
        if phase_folders.referred(value):
            raise ConfigError(
                f'config.{field}={value!r} refers to a phase, which there are in config.phases '
                'alone; name a run folder'
            )
