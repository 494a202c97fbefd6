"""--mode=report: the report page, and its table on the terminal."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from vatt_jax import phase_folders, phases
from vatt_jax.object_store import is_url, run_mirror
from vatt_jax.reporting import phases_page, report
from vatt_jax.run_folder import RunFolder, writing


def run(workdir: pathlib.Path, others: Sequence[str] = ()) -> None:
    """Writes <workdir>/report/index.html.

    Of a run with phases that page links to the pages of the phases, and those are made that are
    missing; the table is that of the last finished one.

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
    if phases.has_phases(workdir):
        path = _build_of_phases(workdir)
    print(f'report: {path}')


def _build_of_phases(workdir: pathlib.Path) -> pathlib.Path:
    """Writes the page of all phases, and those of the phases that have none."""
    for folder in phase_folders.begun(workdir):
        page = RunFolder(folder).report
        if not page.exists():
            with writing(page):
                report.build(folder)
    with writing(RunFolder(workdir).report):
        return phases_page.build(workdir)
