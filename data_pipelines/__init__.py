"""Everything that touches files.

TensorFlow is imported only for prepared records, never by importing this package.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from vatt_jax import extras
from vatt_jax.object_store import check_local

# What the sentence about missing packages says of config.data.make, and the packages.
_PLAYGROUND = 'the playground (config.data.make; --config=demo:synthetic trains without it)'
_PLAYGROUND_MODULES = ('av', 'PIL', 'tensorflow', 'tensorflow_datasets', 'array_record')

__all__ = ['DataError', 'open', 'open_or_make', 'open_or_synthetic']


def open(config: ConfigDict) -> Any:
    """The data object of docs/architecture.md for a resolved config.

    Args:
        config: `config.data.source` chooses which.

    Raises:
        DataError: the data is missing or does not fit the config.
    """
    source = config.data.source
    if source == 'records':
        from data_pipelines.loading.records_source import Records

        return Records(config)
    if source == 'synthetic':
        from data_pipelines.loading.synthetic import Synthetic

        return Synthetic(config)
    if source == 'npz':
        from data_pipelines.loading.synthetic import Npz

        return Npz(config)
    if source == 'coco':
        from data_pipelines.loading.coco_source import Coco

        return Coco(config)
    raise DataError(
        f'config.data.source: expected one of records, synthetic, npz, coco, got {source!r}.'
    )


def open_or_make(config: ConfigDict, check: Callable[[ConfigDict], None]) -> Any:
    """The data object of a config; makes the playground first where it is asked for and absent.

    Args:
        config: of the run; config.data.make describes the playground.
        check: raises for whatever is wrong with the config regardless of data. It is called
            before the playground is made, which takes minutes.

    Raises:
        DataError: the data are missing or do not fit the config.
    """
    if config.data.source == 'records' and config.data.make:
        from data_pipelines.datasets import playground
        from data_pipelines.storage.records import read_entries

        made = config.data.make.get('path', '')
        check_local(made, 'config.data.make.path')
        mixture, evaluated = read_entries(config)
        paths = [entry['path'] for entry in mixture.values()]
        paths.append(evaluated['path'])
        # A config that reads other records keeps the description, and needs no playground.
        if not made or os.path.join(made, 'records') in paths:
            extras.check(_PLAYGROUND, *_PLAYGROUND_MODULES)
            if not playground.is_made(made):
                check(config)
            playground.make(**config.data.make)
    return open(config)


def open_or_synthetic(config: ConfigDict) -> tuple[Any, list[str]]:
    """(data object, remarks): synthetic data where those of the config are not here."""
    try:
        return open(config), []
    except (DataError, ImportError) as error:
        synthetic = config.copy_and_resolve_references()
        synthetic.data.source = 'synthetic'
        remark = (
            f'the data are not here ({error}): frames of the size that the model reads, and a run '
            'of unknown epochs'
        )
        return open(synthetic), [remark]
