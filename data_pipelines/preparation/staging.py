"""All media files -> staged files, side by side in worker processes or in a Beam pipeline."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, worker_processes
from data_pipelines.preparation.console import Console
from vatt_jax import extras

# How often a file may end the process that decodes it: a system that runs out of memory kills a
# process for no fault of its file.
_TRIES = 2


def stage_all(
    files: Sequence[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    processes: int,
    console: Console,
    beam_options: str = '',
) -> None:
    """Stage every file that an earlier run has not staged yet.

    Args:
        files: the media files.
        settings: how they are decoded.
        stage_dir: the staging folder.
        processes: number of worker processes; with 1, files are decoded in this process.
        console: where progress is shown.
        beam_options: options of an Apache Beam pipeline that does the work instead; '' for none.

    Raises:
        DataError: if Beam is asked for and not installed, or its pipeline fails. A media file that
            cannot be used raises nothing: its staged file holds the reason.
    """
    # The name of a staged file contains the settings and the state of the source, so its existence
    # is enough.
    num_done = len(files) - sum(1 for _ in _waiting(files, settings, stage_dir))
    if num_done:
        console(f'continuing: {num_done} of {len(files)} files are already decoded.')
    if num_done == len(files):
        return
    # Looked for again while others are decoded: a list of them may be longer than memory.
    waiting = _waiting(files, settings, stage_dir)
    if beam_options:
        _stage_with_beam(list(waiting), settings, stage_dir, beam_options, console)
        return
    with console.progress(len(files), num_done) as advance:
        # In this process: a file that crashes the decoder ends the command then.
        if processes == 1:
            for file in waiting:
                target = decoded_files.staged_path(stage_dir, file, settings)
                decoded_files.stage_file(file, settings, str(target))
                advance()
            return

        def stage(worker: worker_processes.Worker, file: decoded_files.File) -> None:
            stage_in(worker, file, settings, decoded_files.staged_path(stage_dir, file, settings))
            advance()

        worker_processes.for_each(waiting, processes, stage)


def _waiting(
    files: Iterable[decoded_files.File], settings: decoded_files.Settings, stage_dir: pathlib.Path
) -> Iterator[decoded_files.File]:
    """The files that are not staged yet."""
    for file in files:
        if not decoded_files.staged_path(stage_dir, file, settings).is_file():
            yield file


def _stage_with_beam(
    waiting: Sequence[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    beam_options: str,
    console: Console,
) -> None:
    # Imported here: apache-beam is an optional dependency.
    try:
        from data_pipelines.preparation import beam
    except ImportError as error:
        raise DataError(
            f'--beam={beam_options} needs apache-beam ({error}); in an environment of its own: '
            f'{extras.install_command("beam")}'
        ) from None
    counts = beam.stage(waiting, settings, stage_dir, beam_options)
    parts = [f'{count} {result}' for result, count in sorted(counts.items())]
    console('Beam: ' + ', '.join(parts))


def stage_in(
    worker: worker_processes.Worker,
    file: decoded_files.File,
    settings: decoded_files.Settings,
    target: pathlib.Path,
) -> None:
    """Stage one file in a worker process; one that crashes it is marked as corrupt."""
    for _ in range(_TRIES):
        try:
            worker.call(decoded_files.stage_file, file, settings, str(target))
            return
        except worker_processes.WorkerCrashed:
            if worker.is_closed:
                # Because of an error elsewhere: the file is not to blame.
                raise
    decoded_files.write_crashed(file, str(target))
