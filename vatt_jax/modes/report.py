"""--mode=report: the report page, and its table on the terminal."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from vatt_jax.object_store import is_url, run_mirror
from vatt_jax.reporting import report
from vatt_jax.run_folder import RunFolder, writing


def run(workdir: pathlib.Path, others: Sequence[str] = ()) -> None:
    """Writes <workdir>/report/index.html.

    Args:
        workdir: the run folder.
        others: run folders to show beside it, here or on an object store.

    Raises:
        ConfigError: one of the folders holds no run.
    """
    folders = []
    for other in others:
        folders.append(os.fspath(run_mirror.fetch_run(other)) if is_url(other) else other)
    # No JAX device is touched, so that a report can be made beside a running training.
    with writing(RunFolder(workdir).report):
        path = report.build(workdir, folders)
    print(report.table(workdir, folders))
    print(f'report: {path}')
