"""What a run folder holds, read once for the report and its table."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from vatt_jax import config as configs
from vatt_jax import evals
from vatt_jax.config import ConfigError


class FinishedRun:
    """A run folder as the report sees it.

    Attributes:
        path: the folder.
        config: the stored config, as a dict.
        timings: stage -> seconds; {} where there are none.
        done: what done.json says; {} for a run that is not complete.
        metrics: the lines of metrics.jsonl.
        evaluation_folder: of the newest evaluation, if any.
        results: evaluator -> Result of that evaluation.
        baseline: the same of the random initialisation; {} where it was not evaluated.

    Raises:
        ConfigError: the folder holds no run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        stored = configs.stored(self.path)
        if stored is None:
            raise ConfigError(
                f'{self.path} holds no run (no config.json); train first, or name another folder'
            )
        self.config: dict[str, Any] = stored.to_dict()
        self.timings = _read_json(self.path / 'timings.json')
        self.done = _read_json(self.path / 'done.json')
        # A run under way can be reported too: all of these may be absent or short.
        self.metrics = _read_lines(self.path / 'metrics.jsonl')
        # By results.json, which tells a finished evaluation; names sort by step.
        evaluations = sorted((self.path / 'evals').glob('step_*/results.json'))
        self.evaluation_folder = evaluations[-1].parent if evaluations else None
        self.results = {}
        if self.evaluation_folder is not None:
            self.results = evals.load(self.evaluation_folder)
        # run_folder.RANDOM_INIT.
        random_init = self.path / 'evals' / 'random_init'
        self.baseline = {}
        if (random_init / 'results.json').exists():
            self.baseline = evals.load(random_init)

    @property
    def name(self) -> str:
        return f'{self.config["name"]}, seed {self.config["seed"]}'


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; one that a kill cut short is passed over."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line:
            lines.append(line)
    return lines
