"""--mode=export: a model as programs that JAX alone runs."""

from __future__ import annotations

import pathlib

from vatt_jax import api
from vatt_jax.config import ConfigError


def run(workdir: pathlib.Path, out: str, licence: str = '') -> None:
    """Writes the artifact of a run's newest checkpoint; see vatt_jax.exchange.artifact.

    Args:
        workdir: the run folder.
        out: the folder to make.
        licence: of the weights, for the model card.

    Raises:
        ConfigError: no folder is named, it is there already, or the run holds no model.
    """
    if not out:
        raise ConfigError('--mode=export makes a folder; name it with --out')
    model = api.load(workdir)
    files = model.export(out, licence=licence)
    print(f'{", ".join(files)} → {out}')
