"""The command that trains on what was prepared: it can be copied from the terminal and runs."""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from data_pipelines.preparation.decoded_files import Settings
from vatt_jax.command_line import run_command

# Inputs of configs/demo.py, a small model for two CPU cores.
_DEMO_FPS = 4.0
_DEMO_SIZE = 32
_DEMO_RATE = 8000
_DEMO_SAMPLES = 16000
# WaT cuts sound into patches of so many samples.
_DEMO_PATCH = 256


def training_command(
    target: pathlib.Path | str,
    name: str,
    settings: Settings,
    tokenizer: str,
    summary: Mapping[str, Any],
) -> str:
    """Command line that trains the demo's model on a prepared dataset.

    Args:
        target: folder or URL of the dataset.
        name: of the dataset.
        settings: how it is stored.
        tokenizer: kind of its tokenizer.
        summary: of `prepare`.
    """
    words = [*shlex.split(run_command()), '--config=configs/demo.py', f'--workdir=runs/{name}']
    entry: dict[str, Any] = {'path': str(target)}
    if summary.get('folds'):
        entry['fold'] = 1
    words.append(f'--config.data.train={ {name: entry} }')
    words += [f'--config.model.inputs.{field}' for field in _inputs(settings, tokenizer)]
    words.append(f'--config.evals={_evaluations(summary)}')
    return ' '.join(_quoted(word) for word in words)


def _inputs(settings: Settings, tokenizer: str) -> list[str]:
    """Fields of the model's inputs that differ from the demo's, so that it fits the data."""
    fields = []
    if settings.fps < _DEMO_FPS:
        fields.append(f'video.fps={settings.fps}')
    if settings.size < _DEMO_SIZE:
        fields.append(f'video.size={settings.size}')
    if settings.rate != _DEMO_RATE:
        # As many seconds, in whole patches.
        samples = _DEMO_SAMPLES * settings.rate / _DEMO_RATE
        fields.append(f'audio.rate={settings.rate}')
        fields.append(f'audio.samples={round(samples / _DEMO_PATCH) * _DEMO_PATCH}')
    if tokenizer != 'words':
        fields.append(f'text.tokenizer={tokenizer}')
    return fields


def _evaluations(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation that the data allow: retrieval by words, else by sound, else none."""
    splits = summary['splits']
    # With folds, the one split `clips` is divided into train and test.
    test = splits.get('clips') or splits.get('test')
    if test is None:
        return {}
    # Retrieval is among two clips at least.
    num_videos = test['records'] - test['without_video']
    if min(num_videos, test['sentences']) >= 2:
        return {'retrieval': {'type': 'retrieval'}}
    if num_videos - test['without_audio'] >= 2:
        return {'retrieval': {'type': 'retrieval', 'pairs': (('audio', 'video', 'va'),)}}
    return {}


def _quoted(word: str) -> str:
    """A word for the shell, in double quotes where they do: single ones are in the dicts."""
    quoted = shlex.quote(word)
    # Within double quotes, these mean something to the shell.
    if quoted == word or any(character in word for character in '"\\$`!'):
        return quoted
    return f'"{word}"'
