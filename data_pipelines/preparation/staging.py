"""All media files -> staged files, side by side in worker processes or in a Beam pipeline."""

from __future__ import annotations

import concurrent.futures as futures
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.preparation.console import Console
from vatt_jax import extras

# Tasks submitted ahead for each worker: enough that none waits for the parent, few enough that
# little has to be tried again when a file crashes the pool.
_TASKS_PER_PROCESS = 4


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
    waiting = [
        file for file in files if not decoded_files.staged_path(stage_dir, file, settings).is_file()
    ]
    # The name of a staged file contains the settings and the state of the source, so its existence
    # is enough.
    num_done = len(files) - len(waiting)
    if num_done:
        console(f'continuing: {num_done} of {len(files)} files are already decoded.')
    if not waiting:
        return
    if beam_options:
        _stage_with_beam(waiting, settings, stage_dir, beam_options, console)
        return
    with console.progress(len(files), num_done) as advance:
        # In this process: a file that crashes the decoder ends the command then.
        if processes == 1:
            for file in waiting:
                target = decoded_files.staged_path(stage_dir, file, settings)
                decoded_files.stage_file(file, settings, str(target))
                advance()
            return
        # Each pass ends when all files are staged or when one of them has crashed the pool.
        while waiting:
            # The loop ends because each pass uses up at least the files that were running when the
            # pool broke.
            waiting = _stage_until_crash(waiting, settings, stage_dir, processes, advance)


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


def _stage_until_crash(
    waiting: Sequence[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    processes: int,
    advance: Callable[[], None],
) -> list[decoded_files.File]:
    """Stage files side by side until done, or until one of them kills its worker process.

    Returns:
        The files that were not submitted yet; empty when all are staged.
    """
    queue = list(reversed(waiting))  # taken from its end, so in the order of `waiting`
    running: dict[futures.Future, decoded_files.File] = {}
    # A new pool for each pass: one that is broken accepts no more work.
    pool = decoded_files.pool(min(processes, len(waiting)))
    try:
        while queue or running:
            while queue and len(running) < _TASKS_PER_PROCESS * processes:
                file = queue[-1]
                target = decoded_files.staged_path(stage_dir, file, settings)
                # Raises where the pool broke meanwhile: the file then stays in the queue.
                task = pool.submit(decoded_files.stage_file, file, settings, str(target))
                running[task] = queue.pop()
            # As soon as one is done, so that the queue of the workers is filled up again.
            finished, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for task in finished:
                # Before the deletion: the file of a task that broke the pool remains in `running`.
                task.result()  # raises what the worker raised, a full disk for example
                del running[task]
                advance()
        return []
    except BrokenProcessPool:
        # One of these files crashed the decoder (or the machine ran out of memory), and the pool
        # does not say which: try each alone.
        for file in running.values():
            target = decoded_files.staged_path(stage_dir, file, settings)
            if not target.is_file():
                _stage_alone(file, settings, target)
            advance()
        return list(reversed(queue))
    finally:
        # Without what waits: after an error or Ctrl-C nothing more is started.
        pool.shutdown(cancel_futures=True)


def _stage_alone(
    file: decoded_files.File, settings: decoded_files.Settings, target: pathlib.Path
) -> None:
    """Stage one file in a process of its own; one that kills this process is marked as corrupt."""
    pool = decoded_files.pool(1)
    try:
        pool.submit(decoded_files.stage_file, file, settings, str(target)).result()
    except BrokenProcessPool:
        decoded_files.write_crashed(file, str(target))
    finally:
        pool.shutdown()
