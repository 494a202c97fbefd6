"""Everything that touches files.

TensorFlow is imported only for prepared records, never by importing this package.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from data_pipelines.errors import DataError

__all__ = ['DataError', 'open']


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
    raise DataError(f'config.data.source: expected one of records, synthetic, npz, got {source!r}.')
