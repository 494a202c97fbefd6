"""What a run folder holds, read once for the report and its table."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

from vatt_jax import config as configs
from vatt_jax import evals, phases
from vatt_jax.config import ConfigError
from vatt_jax.run_folder import RANDOM_INIT, RunFolder, evaluation_name

# What reading a damaged npz or JSON file raises.
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class FinishedRun:
    """A run folder as the report sees it; of a run with phases the last finished one.

    Attributes:
        path: the folder.
        config: the stored config, as a dict.
        timings: stage -> seconds; {} where there are none.
        done: what done.json says; {} for a run that is not complete.
        provenance: what provenance.json says; {} for runs that are older than it.
        checkpoint: folder of the newest checkpoint, if any.
        metrics: the lines of metrics.jsonl.
        evaluation_folder: of the newest evaluation, if any.
        results: evaluator -> Result of that evaluation.
        baseline: the same of the random initialisation; {} where it was not evaluated.

    Raises:
        ConfigError: the folder holds no run, or a file in it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = phases.model_folder(pathlib.Path(path))
        stored = configs.stored(self.path)
        if stored is None:
            raise ConfigError(
                f'{self.path} holds no run (no config.json); train first, or name another folder'
            )
        self.config: dict[str, Any] = stored.to_dict()
        folder = RunFolder(self.path)
        self.timings = _read_json(folder.timings)
        self.done = _read_json(folder.done)
        self.provenance = _read_json(folder.provenance)
        self.checkpoint = _newest_checkpoint(folder.checkpoints)
        # A run under way can be reported too: all of these may be absent or short.
        self.metrics = _read_lines(folder.metrics)
        self.evaluation_folder: pathlib.Path | None = None
        self.results = {}
        steps = folder.evaluated_steps()
        if steps:
            self.evaluation_folder = folder.evaluation(evaluation_name(steps[-1]))
            self.results = _read_evaluation(self.evaluation_folder)
        self.baseline = {}
        if folder.has_evaluation(RANDOM_INIT):
            self.baseline = _read_evaluation(folder.evaluation(RANDOM_INIT))

    @property
    def name(self) -> str:
        return f'{self.config["name"]}, seed {self.config["seed"]}'

    @property
    def step(self) -> int:
        """The step it has come to, as far as its files say."""
        if 'step' in self.done:
            return self.done['step']
        return max((line.get('step', 0) for line in self.metrics), default=0)

    def is_plain(self, evaluator: str, types: Sequence[str]) -> bool:
        """Whether an evaluator is of one of these types and is no control.

        A control sees changed input, such as single frames, or other views of it.
        """
        entry = self.config['evals'].get(evaluator, {})
        return entry.get('type') in types and not entry.get('change') and not entry.get('views')


def _newest_checkpoint(folder: pathlib.Path) -> pathlib.Path | None:
    # Others, such as 1000.damaged, were set aside.
    steps = [path for path in folder.glob('*') if path.name.isdecimal()]
    return max(steps, key=lambda path: int(path.name), default=None)


def _read_evaluation(folder: pathlib.Path) -> dict[str, evals.Result]:
    try:
        return evals.load(folder)
    except DAMAGE as error:
        raise ConfigError(
            f'{folder} cannot be read ({type(error).__name__}: {error}); evaluate anew with '
            '--mode=eval'
        ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f'{path}: expected JSON, got {error}; move the file away') from error
    if not isinstance(content, dict):
        raise ConfigError(
            f'{path}: expected a JSON object, got {type(content).__name__}; move the file away'
        )
    return content


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines that say something of a step; one that a kill cut short is passed over."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('step'), int):
            lines.append(line)
    return lines
