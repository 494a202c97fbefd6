"""report/index.html of a run with phases: what each came to, with links to their own pages."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from vatt_jax import config as configs
from vatt_jax import phase_folders, phases
from vatt_jax.config import ConfigError
from vatt_jax.phases import Phase
from vatt_jax.reporting import headline, report
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.reporting.results_table import rows
from vatt_jax.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Line:
    """A phase in the table.

    Attributes:
        name: of the phase.
        link: to its own page; '' where there is none.
        objective: its name.
        start: what it starts from.
        steps: how far it has come.
        loss: the last one that was logged; '' for none.
        numbers: its main results.
    """

    name: str
    link: str
    objective: str
    start: str
    steps: str
    loss: str
    numbers: str


def build(workdir: pathlib.Path) -> pathlib.Path:
    """Writes <workdir>/report/index.html.

    Args:
        workdir: the run folder of all phases.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the folder holds no run with phases, or a file in it cannot be read.
    """
    config = configs.stored(workdir)
    if config is None or not config.phases:
        raise ConfigError(f'{workdir} holds no run with phases; name another folder')
    page = RunFolder(workdir).report
    found = phases.resolve(config, workdir)
    begun = phase_folders.begun(workdir.absolute())
    runs = {phase.name: FinishedRun(phase.folder) for phase in found if phase.folder in begun}
    evaluated = [run for run in runs.values() if run.results]
    header, body = rows(evaluated[-1], evaluated[:-1]) if evaluated else ([], [])
    if evaluated:
        header[1] = evaluated[-1].name
    template = report.environment().get_template('phases.html')
    text = template.render(
        title=config.name,
        lines=[_line(phase, runs.get(phase.name), page.parent) for phase in found],
        header=header,
        body=body,
        style=(report.PAGE / 'style.css').read_text(encoding='utf-8'),
    )
    report.write_page(page, text.encode('utf-8', 'replace'))
    return page


def _line(phase: Phase, run: FinishedRun | None, page_folder: pathlib.Path) -> Line:
    own_page = RunFolder(phase.folder).report
    link = os.path.relpath(own_page, page_folder.absolute()) if own_page.exists() else ''
    losses = [line['loss'] for line in run.metrics if 'loss' in line] if run else []
    results = headline.numbers(run) if run else []
    return Line(
        name=phase.name,
        link=link,
        objective=phase.config.objective.name,
        start=_start(phase),
        steps=f'{run.step if run else 0} of {phase.config.steps}',
        loss=f'{losses[-1]:.4f}' if losses else '',
        numbers=', '.join(f'{number.label} {number.value}' for number in results),
    )


def _start(phase: Phase) -> str:
    """'phase rgb', the path of a run elsewhere, or 'scratch'."""
    if not phase.config.init_from:
        return 'scratch'
    folder = pathlib.Path(phase.config.init_from)
    position = phase_folders.number_and_name(folder)
    if position is None or folder.parent != phase.folder.parent:
        return phase.config.init_from
    return f'phase {position[1]}'
