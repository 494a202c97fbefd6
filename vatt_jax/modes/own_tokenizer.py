"""The tokenizer that a run was trained with, for data that were prepared with another one."""

from __future__ import annotations

import pathlib
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.training import checkpoint


def with_own_tokenizer(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """The config with which data number words as the model of a run was trained to read them.

    A released model brings its vocabulary, and data have one of their own: numbers of the one mean
    other words in the other. Sentences are stored as text, so that any tokenizer reads them.

    Args:
        config: with the kind of the tokenizer, or its whole description, which then counts.
        workdir: the run folder.

    Raises:
        ConfigError: the folder holds no checkpoint.
    """
    spec = _readable_info(checkpoint.find(workdir).parent).get('tokenizer')
    if not spec or not isinstance(config.model.inputs.text.get('tokenizer'), str):
        return config
    changed = config.copy_and_resolve_references()
    # The field holds a name, and a description is a dict.
    with changed.ignore_type(), changed.unlocked():
        changed.model.inputs.text.tokenizer = spec
    return changed


def _readable_info(checkpoints: pathlib.Path) -> dict[str, Any]:
    """What the data said of themselves, by the newest checkpoint that says it; {}: none does.

    It is the same in all of a run. A damaged checkpoint is named, or passed over, where the model
    is read.
    """
    for step in reversed(checkpoint.steps(checkpoints)):
        try:
            info: dict[str, Any] = checkpoint.read_meta(checkpoints / str(step))['info']
        except ConfigError:
            continue
        return info
    return {}
