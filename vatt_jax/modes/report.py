"""--mode=report: the report page, and its table on the terminal."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from vatt_jax.reporting import report
from vatt_jax.run_folder import RunFolder, writing


def run(workdir: pathlib.Path, others: Sequence[str] = ()) -> None:
    """Writes <workdir>/report/index.html.

    Args:
        workdir: the run folder.
        others: run folders to show beside it.

    Raises:
        ConfigError: one of the folders holds no run.
    """
    # No JAX device is touched, so that a report can be made beside a running training.
    with writing(RunFolder(workdir).report):
        path = report.build(workdir, others)
    print(report.table(workdir, others))
    print(f'report: {path}')
