"""Runs from and to the Hugging Face hub, through huggingface_hub.

A repository holds a run folder with its newest checkpoint, and the model card:

    README.md
    config.json
    checkpoints/<step>/…
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

from vatt_jax import extras
from vatt_jax.config import ConfigError, to_json
from vatt_jax.exchange import model_card
from vatt_jax.importers import safetensors_folder
from vatt_jax.training import checkpoint

PREFIX = 'hf://'
# owner/name, and maybe @revision.
ADDRESS = re.compile(r'hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')
# Of a repository: a run folder, one checkpoint, or weights in a file of their own. What else lies
# there may be large.
FILES = ['config.json', 'checkpoints/**', 'meta/**', 'state/**', '*.json', '*.safetensors']


def download(address: str) -> pathlib.Path:
    """The local copy of a repository, downloaded where it is not there already.

    Args:
        address: hf://owner/name or hf://owner/name@revision.

    Raises:
        ConfigError: the address is no such, or the repository cannot be had.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f'expected hf://owner/name or hf://owner/name@revision, got {address!r}')
    hub = _library(address)
    repository, revision = match.groups()
    try:
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=FILES)
    except Exception as error:
        raise _failure(address, 'a repository that can be downloaded', error) from error
    return pathlib.Path(folder)


def push(
    model: Any,
    repository: str,
    licence: str = '',
    private: bool = False,
    token: str | None = None,
) -> str:
    """Uploads the checkpoint that a model was loaded from, with its config and a model card.

    Args:
        model: an `api.Model`.
        repository: owner/name; made where it is not there.
        licence: of the weights, for the model card.
        private: whether a new repository is only its owner's.
        token: of the hub; None: that of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the model is of no folder, or the hub refuses.
    """
    address = f'{PREFIX}{repository}'
    if ADDRESS.fullmatch(address) is None or '@' in repository:
        raise ConfigError(f'push_to_hub: expected owner/name, got {repository!r}')
    if model.path is None:
        raise ConfigError('push_to_hub: expected a model that was loaded from a folder')
    if model.config.get('base'):
        raise ConfigError(
            'push_to_hub: expected a model whose folder holds all of it, got what was trained '
            f'beside {model.config.base}; write it as safetensors (python -m vatt_jax.importers '
            '--format=safetensors --export=RUN --out=FOLDER) and push that folder'
        )
    hub = _library(address)
    files, run = _files_of(model.path)
    card = model_card.text(model.config, model.variables, model.info, run, licence)
    operations = [hub.CommitOperationAdd(model_card.NAME, card.encode())]
    if 'config.json' not in files:
        operations.append(hub.CommitOperationAdd('config.json', to_json(model.config).encode()))
    for name, path in files.items():
        operations.append(hub.CommitOperationAdd(name, str(path)))
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository, operations, commit_message=f'{model.config.name}, by vatt_jax'
        )
    except Exception as error:
        raise _failure(address, 'a repository that can be written', error) from error
    return str(commit.commit_url)


def _files_of(path: pathlib.Path) -> tuple[dict[str, pathlib.Path], pathlib.Path | None]:
    """({name in the repository: file}, the run folder if there is one) of a loaded folder."""
    if safetensors_folder.is_model_folder(path):
        names = (safetensors_folder.MODEL, safetensors_folder.CONFIG, safetensors_folder.INFO)
        return {name: path / name for name in names if (path / name).exists()}, None
    folder = checkpoint.find_verified(path)
    files = {}
    for file in sorted(folder.rglob('*')):
        if file.is_file():
            inside = file.relative_to(folder).as_posix()
            files[f'checkpoints/{folder.name}/{inside}'] = file
    return files, model_card.run_folder_of(folder)


def _library(address: str) -> Any:
    with extras.needed('hub', address):
        import huggingface_hub
    return huggingface_hub


def _failure(address: str, expected: str, error: Exception) -> ConfigError:
    """One sentence of what the hub or the network said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return ConfigError(f'{address}: expected {expected}, got {type(error).__name__}: {said}')
