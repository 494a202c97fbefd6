"""Model cards: what a model is, what it was trained on and how well it does, beside its files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vatt_jax.reporting import results_table
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.run_folder import RunFolder

NAME = 'README.md'
UNSTATED = 'other'


def run_folder_of(path: pathlib.Path) -> pathlib.Path | None:
    """The run folder that a model was loaded from: itself, or the one around a checkpoint."""
    for folder in (path, path.parent, path.parent.parent):
        if RunFolder(folder).config.exists():
            return folder
    return None


def text(
    config: ConfigDict,
    variables: Mapping[str, Any],
    info: Mapping[str, Any],
    run: pathlib.Path | None = None,
    licence: str = '',
) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        config: the run's resolved config.
        variables: {'params', 'batch_stats'}.
        info: {'sources', …} of the data.
        run: the run folder, for its evaluation.
        licence: of the weights; '': not stated.
    """
    header = {
        'license': licence or UNSTATED,
        'library_name': 'vatt_jax',
        'tags': ['video', 'audio', 'jax', 'self-supervised', config.objective.name],
    }
    # JSON is YAML, and needs no care with quotes.
    lines = ['---']
    lines += [f'{name}: {json.dumps(value)}' for name, value in header.items()]
    lines += ['---', '', f'# {_plain(config.name)}', '']
    count = sum(np.size(x) for x in jax.tree.leaves(variables['params']))
    lines += [f'{count / 1e6:.2f} M parameters, trained with vatt_jax ({config.objective.name}).']
    lines += ['', '## Inputs', '', '| modality | tower | input |', '|---|---|---|']
    for modality, tower in config.model.towers.items():
        spec = config.model.inputs[modality].to_dict()
        fields = ', '.join(f'{name} {value}' for name, value in spec.items())
        lines.append(f'| {modality} | {tower["name"]} | {_plain(fields)} |')
    lines += ['', '## Trained on', '', *_trained_on(config, info)]
    lines += ['', '## Evaluation', '', *_evaluation(run)]
    lines += ['', '## Licence', '']
    if licence:
        lines.append(f'{_plain(licence)}.')
    else:
        lines.append(
            'Not stated. The code is Apache-2.0; that of the weights is up to their authors, and '
            'the terms of the data may bind them.'
        )
    return '\n'.join(lines) + '\n'


def _trained_on(config: ConfigDict, info: Mapping[str, Any]) -> list[str]:
    lines = [f'{config.steps} steps of {config.batch_size} clips, seed {config.seed}.']
    sources = info.get('sources') or []
    for source in sources:
        if isinstance(source, Mapping):
            source = ', '.join(f'{name} {value}' for name, value in source.items())
        lines.append(f'- {_plain(str(source))}')
    if not sources:
        lines.append('The data are not recorded with these weights.')
    return lines


def _evaluation(run: pathlib.Path | None) -> list[str]:
    """The results table of a run, or a sentence."""
    rows: list[list[str]] = []
    if run is not None:
        header, rows = results_table.rows(FinishedRun(run))
    if not rows:
        return ['No evaluation lies beside these weights.']
    lines = [_row(header), '|' + '---|' * len(header)]
    lines += [_row(row) for row in rows]
    lines += ['', 'Held-out data; intervals by bootstrap, where there are any.']
    return lines


def _row(cells: list[str]) -> str:
    return '| ' + ' | '.join(_plain(cell) for cell in cells) + ' |'


def _plain(value: str) -> str:
    """Text that stays text in a Markdown table."""
    for letter in '\\`*_[]<>|':
        value = value.replace(letter, '\\' + letter)
    return ' '.join(value.split())
