"""--mode=train of a config with phases: one training after the other in one run folder."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import phase_folders, phases
from vatt_jax.config import ConfigError
from vatt_jax.modes import report
from vatt_jax.modes.train import Training, say
from vatt_jax.parallel import distributed
from vatt_jax.phases import Phase
from vatt_jax.run_folder import RunFolder, write_atomically
from vatt_jax.training import loop, starting_values
from vatt_jax.training.run_lock import RunLock


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], Any],
    quiet: bool = False,
) -> None:
    """Trains the phases to the end of the last or to SIGTERM; the same command continues.

    Args:
        config: of all phases.
        workdir: the run folder of them all.
        open_data: config -> data object; may take minutes, as it may make the data first.
        quiet: plain log lines instead of the live one.

    Raises:
        ConfigError: any phase has a mistake, before the first one trains; or the folder holds
            something else.
    """
    found = phases.resolve(config, workdir)
    _check_folder(found, workdir)
    _check_configs(found)
    data = _KeptData(open_data)
    with distributed.StopSignal() as stop, contextlib.closing(RunLock(workdir)) as lock:
        # Not earlier, so that a mistake in the first phase leaves no folder behind.
        begin = functools.partial(_claim_folder, config, workdir, lock)
        for phase in found:
            if _is_finished(phase):
                continue
            if stop.asked:
                return
            say(f'phase {phase.number} of {len(found)}: {phase.name}')
            with _telling(phase):
                if not _train(phase, data, stop, quiet, begin):
                    return
            # Its arrays leave the devices before those of the next phase come.
            gc.collect()
    _finish(found, workdir)


def _claim_folder(config: ConfigDict, workdir: pathlib.Path, lock: RunLock) -> None:
    """Makes the folder of all phases that of this config, and of this process."""
    workdir.mkdir(parents=True, exist_ok=True)
    lock.take()
    if distributed.is_main():
        RunFolder(workdir).done.unlink(missing_ok=True)
        write_atomically(RunFolder(workdir).config, configs.to_json(config))


def _train(
    phase: Phase,
    data: _KeptData,
    stop: distributed.StopSignal,
    quiet: bool,
    before: Callable[[], object],
) -> bool:
    """Trains one phase. Returns whether it came to its end."""
    training = Training(phase.config, phase.folder)
    if not training.run(data.open, quiet, before):
        return False
    if phase.config.report:
        # All is saved, and the same command makes what is missing.
        with stop.ending_at_once():
            training.evaluate()
            if distributed.is_main():
                report.run(phase.folder)
    return True


def _finish(found: list[Phase], workdir: pathlib.Path) -> None:
    """Writes done.json and the page of all phases, and lets the other processes go."""
    distributed.leave()
    if not distributed.is_main():
        return
    summaries = {}
    for phase in found:
        summaries[phase.name] = json.loads(RunFolder(phase.folder).done.read_text())
    write_atomically(RunFolder(workdir).done, json.dumps({'phases': summaries}, indent=1))
    if any(phase.config.report for phase in found):
        report.run(workdir)


def _is_finished(phase: Phase) -> bool:
    """Whether nothing is left to do in a phase; the same on every process."""
    folder = RunFolder(phase.folder)
    is_finished = False
    if distributed.is_main() and folder.done.exists():
        step = json.loads(folder.done.read_text())['step']
        is_reported = folder.report.exists() or not phase.config.report
        is_finished = step == phase.config.steps and is_reported
    return bool(distributed.broadcast_from_main(is_finished))


def _check_configs(found: list[Phase]) -> None:
    """Checks all of each config that does not depend on the data.

    Raises:
        ConfigError: of the first phase with a mistake.
    """
    models: dict[str, Any] = {}
    earlier: dict[str, Phase] = {}
    for phase in found:
        folder = str(phase.folder)
        with _telling(phase):
            loop.check_run_folder(phase.config, phase.folder)
            models[folder] = loop.check(phase.config)
            source = phase.config.init_from
            if source in earlier and _start_can_be_checked(phase.config, earlier[source].config):
                starting_values.check_model(phase.config, models[source], models[folder])
        earlier[folder] = phase


def _start_can_be_checked(config: ConfigDict, source: ConfigDict) -> bool:
    """Whether the shapes of both models are known well enough before the data are."""
    if 'model' not in config.init_trees:
        return False
    # A size that the data decide is the same unknown one for both, unless only one states it.
    for modality, tower in config.model.towers.items():
        other = source.model.towers.get(modality, tower)
        if (tower.get('vocab', 1) == 0) != (other.get('vocab', 1) == 0):
            return False
    return True


def _check_folder(found: list[Phase], workdir: pathlib.Path) -> None:
    """Checks that the folder holds these phases as far as it holds any.

    Raises:
        ConfigError: it holds a run without phases, or other phases, or one that was longer or
            shorter and has been started from.
    """
    if RunFolder(workdir).checkpoints.is_dir():
        raise ConfigError(
            f'--workdir={workdir} holds a run without phases, and this config has '
            f'{len(found)}; choose another --workdir'
        )
    begun = phase_folders.begun(workdir.absolute())
    expected = [phase.folder for phase in found]
    for folder in begun:
        if folder not in expected:
            names = ', '.join(path.name for path in expected)
            raise ConfigError(
                f'--workdir={workdir} holds the phase {folder.name}, and those of this config are '
                f'{names}; add phases at the end, or choose another --workdir'
            )
    # Later phases started from what the others had come to.
    for phase in found[: len(begun) - 1]:
        stored = configs.stored(phase.folder)
        if stored is not None and stored.steps != phase.config.steps:
            raise ConfigError(
                f'--workdir={workdir}: the phase {phase.name} has taken its {stored.steps} steps '
                f'and later ones have begun, and this config has steps={phase.config.steps} for '
                'it; choose another --workdir'
            )


@contextlib.contextmanager
def _telling(phase: Phase) -> Iterator[None]:
    """Says of which phase a mistake is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f'phase {phase.name}: {error}') from error


class _KeptData:
    """The data object, opened anew only where a phase reads other data than the one before.

    Args:
        open_data: config -> data object.
    """

    # What a data object reads of a config.
    FIELDS = ('data.', 'model.inputs.', 'seed', 'object_store.')

    def __init__(self, open_data: Callable[[ConfigDict], Any]):
        self._open_data = open_data
        self._data: Any = None
        self._fields: list[Any] | None = None

    def open(self, config: ConfigDict) -> Any:
        """The data object of a config."""
        flat = dict(configs.flatten(config))
        fields = [item for item in flat.items() if item[0].startswith(self.FIELDS)]
        if fields != self._fields:
            # The old one first: two may not fit into memory.
            self._data = None
            self._data = self._open_data(config)
            self._fields = fields
        return self._data
