"""What training says of its steps: late metrics, bad steps, unreadable records, a trace."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from vatt_jax.run_folder import RunFolder
from vatt_jax.training.metrics import Meter, Progress, Writer
from vatt_jax.training.start import TrainingRun


class TrainingStopped(RuntimeError):
    """The run cannot go on: several non-finite steps in a row. The message says what to do."""


class LateMetrics:
    """Reads the metrics of each step after the next one was dispatched.

    Reading a metric waits for its step. One step late it is computed already, so reading stops
    nothing: the device has the next step to work on. Before anything that must know of every
    step (evaluation, refresh, saving), `settle` is called by itself.

    Args:
        config: of the run.
        data: the data object, asked for its unreadable records.
        run: `run.order`, the digest of the records seen, follows the metrics.
        writer, progress, meter: what is written, shown and measured.
        bad_steps: looks at every step.
    """

    def __init__(
        self,
        config: ConfigDict,
        data: Any,
        run: TrainingRun,
        writer: Writer,
        progress: Progress,
        meter: Meter,
        bad_steps: BadStepGuard,
    ):
        self.config = config
        self.run = run
        self.writer = writer
        self.progress = progress
        self.meter = meter
        self.bad_steps = bad_steps
        self.unreadable = UnreadableRecords(data, writer, progress)
        # One step at most: `settle` comes before each `hold`.
        self.pending: tuple[int, dict[str, jax.Array]] | None = None

    def hold(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was just dispatched."""
        # Still futures: nothing is read, so nothing is waited for.
        self.pending = (step, metrics)

    def settle(self) -> None:
        """Reads what is held, if anything.

        Raises:
            TrainingStopped: too many non-finite steps in a row.
        """
        if self.pending is None:
            return
        step, device_metrics = self.pending
        # Before anything can raise: the same metrics must not be read twice.
        self.pending = None
        # np.asarray of a JAX array blocks until its step has been computed.
        metrics = {name: np.asarray(value) for name, value in device_metrics.items()}
        records = np.stack([metrics.pop('source'), metrics.pop('index')], axis=1)  # [B 2]
        # The digest grows with every step, in order. Steps that were skipped count: their records
        # were seen.
        self.run.order = extend_order(self.run.order, records)
        scalars = {name: float(value) for name, value in metrics.items()}

        # Each step is looked at, whatever log_every is.
        self.bad_steps.look_at(step, scalars['bad'], records)
        if step % self.config.log_every == 0 or step == self.config.steps:
            speed = self.meter.read()
            self.writer.write(step, {**scalars, 'order': self.run.order[:16], **speed})
            self.progress.show(step, {**scalars, **speed})
            self.unreadable.report(step)
        else:
            self.progress.advance(step, scalars['loss'])


def extend_order(order: str, records: Integer[np.ndarray, 'B 2']) -> str:
    """Digest of all records seen: of the digest before, and one step's (source, index) pairs."""
    # A chain, so that the digest alone is enough to go on from: a resumed run needs no list of
    # records. int32 whatever the platform's default integer is.
    return hashlib.sha256(order.encode() + records.astype(np.int32).tobytes()).hexdigest()


class BadStepGuard:
    """Reports non-finite steps, and ends the run when there are `limit` of them in a row."""

    def __init__(
        self,
        limit: int,
        latest_saved: Callable[[], int | None],
        workdir: pathlib.Path,
        writer: Writer,
        progress: Progress,
    ):
        self.limit = limit
        self.latest_saved = latest_saved
        self.workdir = workdir
        self.writer = writer
        self.progress = progress

    def look_at(self, step: int, num_bad: float, records: Integer[np.ndarray, 'B 2']) -> None:
        """Looks at one step.

        Args:
            step: its number.
            num_bad: non-finite steps in a row, up to this one; 0: it was finite.
            records: (source, index) of its examples.

        Raises:
            TrainingStopped: the limit is reached.
        """
        if not num_bad:
            return
        # The update was skipped on the device already (train_step); here it is only reported.
        names = [f'{source}:{index}' for source, index in records.tolist()]
        self.progress.say(
            f'step {step}: non-finite loss or gradient, update skipped; records {" ".join(names)}'
        )
        self.writer.write(step, {'event': 'non-finite step', 'records': names})
        # Counted in the state (train_state.bad), so that a resumed run goes on counting.
        if num_bad >= self.limit:
            raise TrainingStopped(
                f'{int(num_bad)} non-finite steps in a row up to step {step}; the last good '
                f'checkpoint is step {self.latest_saved()}. Lower config.optimizer.schedule.peak, '
                'set config.optimizer.clip, or look at the records listed in '
                f'{RunFolder(self.workdir).metrics}'
            )


class UnreadableRecords:
    """Reports the records that the data could not read, each once."""

    def __init__(self, data: Any, writer: Writer, progress: Progress):
        self.data = data
        self.writer = writer
        self.progress = progress
        self.num_reported = 0

    def report(self, step: int) -> None:
        # The list only grows, so what lies beyond the last report is new.
        found = self.data.problems()['indices'][self.num_reported :]
        if not found:
            return
        self.num_reported += len(found)
        records = [f'{source}:{index} {reason}' for source, index, reason in found]
        self.writer.write(step, {'event': 'unreadable records', 'records': records})
        example = ' '.join(str(part) for part in found[0])
        self.progress.say(
            f'step {step}: {len(found)} more records cannot be read, such as {example}'
        )


class Profiler:
    """Traces the steps first..last of config.profile, on the main process.

    Args:
        steps: (first, last), or () for no trace.
        folder: where the trace goes.
        active: False: never traces.
        progress: the finished trace is reported to it.
    """

    def __init__(
        self, steps: tuple[int, ...], folder: pathlib.Path, active: bool, progress: Progress
    ):
        # Steps count from 1: 0 never comes.
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self.active = active
        self.progress = progress
        self.is_tracing = False

    def before_step(self, step: int) -> None:
        if self.active and step == self.first:
            # Started before the dispatch, which belongs to the trace as much as the device's work
            # does.
            jax.profiler.start_trace(str(self.folder))
            self.is_tracing = True

    def after_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if self.is_tracing and step == self.last:
            # Steps are dispatched ahead of time: the trace must hold the work, not its dispatch.
            jax.block_until_ready(metrics['loss'])
            self.close()
            self.progress.say(
                f'trace of steps {self.first} to {self.last} in {self.folder}; '
                'look at it with XProf or TensorBoard'
            )

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self.is_tracing:
            jax.profiler.stop_trace()
            self.is_tracing = False
