"""The training loop, read top to bottom: build, start, step, evaluate, save."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax.parallel import distributed
from vatt_jax.run_folder import write_atomically
from vatt_jax.training import frozen_models
from vatt_jax.training.build import (
    Built,
    assemble,
    build,
    check,
    check_compiler_options,
    mesh_of,
    resolve,
)
from vatt_jax.training.evaluation import evaluate
from vatt_jax.training.metrics import duration
from vatt_jax.training.refresh import refresh
from vatt_jax.training.run_lock import RunLock
from vatt_jax.training.session import Session, open_session
from vatt_jax.training.start import (
    TrainingRun,
    check_run_folder,
    newest,
    newest_sound,
    start,
)
from vatt_jax.training.step_log import TrainingStopped

# Re-exported: callers of `train` find here what they call before and after it.
__all__ = [
    'Built',
    'TrainingStopped',
    'assemble',
    'build',
    'check',
    'check_compiler_options',
    'check_run_folder',
    'evaluate',
    'mesh_of',
    'newest',
    'newest_sound',
    'resolve',
    'train',
    'write_atomically',
]


def train(
    config: ConfigDict,
    data: Any,
    workdir: str | pathlib.Path,
    *,
    quiet: bool = False,
    before: Callable[[Built], object] | None = None,
) -> tuple[Built, dict[str, float]]:
    """Trains to config.steps or to SIGTERM, continuing whatever the run folder holds.

    Args:
        config: of the run.
        data: the data object of docs/architecture.md.
        workdir: the run folder.
        quiet: plain log lines instead of the live one.
        before: called once all is built and nothing is written yet; what it raises ends the run.

    Returns:
        What it built, compiled by now, and the last evaluation's scalars.

    Raises:
        ConfigError: config, data or checkpoint do not fit; before anything is written.
        TrainingStopped: the run cannot go on.
    """
    workdir = pathlib.Path(workdir)
    lock = RunLock(workdir)
    # SIGTERM is caught from here on, not only from the first step: building and compiling take
    # minutes.
    with distributed.StopSignal() as stop, contextlib.closing(lock):
        frozen_models.recall(config, workdir)
        built = build(config, data)
        # After the build, which fills in what only the data know, and before anything is written.
        check_run_folder(config, workdir)
        if before is not None:
            before(built)
        # `sharding.constrain` looks this mesh up when the step is traced.
        with jax.set_mesh(built.mesh):
            run, checkpoints = start(config, built, data, workdir, lock)
            session = open_session(config, built, data, workdir, run, checkpoints, quiet)
            with session.closing():
                scalars = _run_steps(session, run, stop)
    return built, scalars


def _run_steps(
    session: Session, run: TrainingRun, stop: distributed.StopSignal
) -> dict[str, float]:
    """The loop itself. Returns the last evaluation's scalars."""
    config, built, meter = session.config, session.built, session.meter
    first_step = run.step + 1
    if run.step < config.steps:
        session.progress.say('compiling the training step …')
        compiling_since = time.monotonic()
    scalars: dict[str, float] = {}
    while run.step < config.steps:
        # At the top of the loop, so that a run resumed here makes up for an evaluation that was cut
        # short; finished ones are only read. Step 0 is the random initialisation, evaluated
        # elsewhere.
        if config.eval_every and run.step and run.step % config.eval_every == 0:
            scalars = _evaluate(session, run)
            meter.reset()
        # Likewise: the checkpoint of this step holds the state before the refresh, which a resumed
        # run repeats.
        if built.objective.refresh_due(run.step, config.steps):
            _refresh(session, run)
            meter.reset()

        batch = session.batches.next(run)  # this host's rows, NumPy
        session.profiler.before_step(run.step + 1)
        # The call (train_step.make, jitted) returns before the device is done: the host goes on to
        # the next batch, and state and metrics are arrays still to be computed.
        run.state, metrics = built.step(run.state, session.tables.place(batch, run.step))
        run.step += 1
        # Examples of all processes: the position in the training order where a resumed run reads
        # on.
        run.consumed += config.batch_size
        session.profiler.after_step(run.step, metrics)
        if run.step == first_step:
            seconds = time.monotonic() - compiling_since
            session.progress.say(f'compiled in {duration(seconds)}')
            meter.reset()
        # Metrics are read one step late, so that the wait for a step overlaps with the next one.
        session.tables.hold(metrics.pop('written', None))  # stores that of the step before
        session.metrics.settle()  # waits for the step before this one, and logs it
        session.metrics.hold(run.step, metrics)
        meter.clips += config.batch_size

        # Called by every process at every step: JAX needs that to find a step at which all can
        # stop.
        is_stopping = stop.should_stop(run.step)
        if is_stopping or run.step % config.checkpoint.every == 0 or run.step == config.steps:
            session.save(run)
        if is_stopping and run.step < config.steps:
            session.checkpoints.wait()
            session.progress.say(
                f'asked to stop: step {run.step} is saved; the same command continues'
            )
            return scalars

    # A save runs in the background. It must be complete before the run counts as done: a full disk
    # shows here, not after hours of evaluation.
    session.checkpoints.wait()
    # The gallery of retrievals is for the report, which shows the last evaluation.
    if config.evals and not stop.asked:
        scalars = _evaluate(session, run, gallery=config.report)
    if stop.asked:
        session.progress.say(f'asked to stop: step {run.step} is saved; the same command evaluates')
    else:
        session.finish(run)
    return scalars


def _evaluate(session: Session, run: TrainingRun, gallery: bool = False) -> dict[str, float]:
    session.metrics.settle()
    names = ', '.join(session.config.evals)
    session.progress.say(f'step {run.step}: evaluating {names} …')
    return evaluate(
        session.config,
        session.built,
        run.state,
        session.data,
        session.folder.path,
        run.step,
        gallery=gallery,
        writer=session.writer,
        progress=session.progress,
    )


def _refresh(session: Session, run: TrainingRun) -> None:
    session.metrics.settle()
    session.tables.settle()
    session.progress.say(f'step {run.step}: refresh')
    refreshed = refresh(session.config, session.built, session.data, run)
    metrics = {f'refresh/{name}': value for name, value in refreshed.metrics.items()}
    # Under `refresh/`, a prefix that a resumed run drops from the file and writes again
    # (metrics.AFTER).
    session.writer.write(run.step, metrics)
    if refreshed.weights:
        session.batches.close()  # what is prefetched was drawn with the old weights
