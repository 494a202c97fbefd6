"""Everything that touches files. TensorFlow is imported only for prepared records, never by importing this package."""

from __future__ import annotations

from typing import Any

from data_pipelines.errors import DataError

__all__ = ['DataError', 'open']


def open(config) -> Any:
    """The data object of docs/architecture.md for a resolved config; `config.data.source` chooses which.

    Raises DataError when the data is missing or does not fit the config.
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
    raise DataError(f'config.data.source is {source!r}; it is one of records, synthetic, npz')
