"""What a training writes to and reads from while it runs: opened together, closed together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.parallel import distributed
from vatt_jax.performance import chips, flops
from vatt_jax.run_folder import RunFolder, write_atomically
from vatt_jax.training import checkpoint
from vatt_jax.training.batches import TrainBatches
from vatt_jax.training.build import Built
from vatt_jax.training.checkpoint import Checkpoints
from vatt_jax.training.columns import SavedColumns
from vatt_jax.training.host_tables import HostTables
from vatt_jax.training.metrics import Meter, Progress, Writer
from vatt_jax.training.start import TrainingRun
from vatt_jax.training.step_log import BadStepGuard, LateMetrics, Profiler
from vatt_jax.training.trackers import Trackers


@dataclasses.dataclass
class Session:
    """The open files, streams and clocks of one training."""

    config: ConfigDict
    built: Built
    data: Any
    folder: RunFolder
    checkpoints: Checkpoints
    writer: Writer
    progress: Progress
    meter: Meter
    batches: TrainBatches
    metrics: LateMetrics
    profiler: Profiler
    tables: HostTables
    # time.monotonic(), for the `seconds` of done.json: of this start, not of the whole run.
    began: float

    def save(self, run: TrainingRun) -> None:
        """Starts saving the run as it stands. No time of the steps' goes into it."""
        self.metrics.settle()  # the order of all records seen is saved too
        self.tables.settle()
        began = time.monotonic()
        # All that a resumed run needs beside the arrays; the config and the data's info make the
        # folder enough to load the model elsewhere.
        meta = {
            'step': run.step,
            'consumed': run.consumed,
            'order': run.order,
            'weights': list(run.weights),
            'config': self.config.to_dict(),
            'info': self.built.info,
            'base': run.base,
        }
        # Arrays are copied off the device before this returns; the next step may then overwrite
        # them. Tables of the host are read as they are now, whatever later steps store.
        columns: SavedColumns = {**run.columns, **self.tables.snapshots()}
        # The frozen model is named in `meta`, and not written again.
        self.checkpoints.save(run.step, run.state.replace(frozen={}), meta, columns)
        self.meter.lost += time.monotonic() - began

    def finish(self, run: TrainingRun) -> None:
        """Writes done.json, and reports the records that could not be read."""
        problems = self.data.problems()
        if distributed.is_main():
            # A digest reads whole arrays, of which a process among several holds a part only.
            digests = {}
            if jax.process_count() == 1:
                for group in ('params', 'batch_stats', 'opt_state', 'objective'):
                    digests[group] = checkpoint.digest(getattr(run.state, group))
                if run.tables:
                    digests['tables'] = checkpoint.digest(run.tables)
            summary = {
                'step': run.step,
                'consumed': run.consumed,
                'order': run.order,
                'seconds': round(time.monotonic() - self.began, 1),
                'skipped_steps': int(run.state.skipped),
                'corrupt_records': problems['corrupt'],
                'digests': digests,
            }
            write_atomically(self.folder.done, json.dumps(summary, indent=1))
        if problems['corrupt']:
            self.progress.say(
                f'{problems["corrupt"]} of {problems["read"]} records could not be read: '
                f'{problems["indices"][:10]}'
            )

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Closes everything at the end, however it comes.

        Raises:
            distributed.ProcessGone: a step failed because other processes are gone.
        """
        others_are_here = True
        try:
            yield
        # What a collective raises when a peer dies, and also what an out-of-memory raises: only
        # whether the others come to a barrier tells the two apart.
        except jax.errors.JaxRuntimeError as error:
            others_are_here = False  # until all of them come
            distributed.raise_if_process_gone(error)
            others_are_here = True
            raise
        finally:
            self.profiler.close()
            self.batches.close()
            self.tables.close()
            self.progress.close()
            self.writer.close()
            # A save under way is finished even when the run fails, so that what was written is
            # whole; without the other processes it cannot be.
            if others_are_here:
                self.checkpoints.wait()
                self.checkpoints.close()


def open_session(
    config: ConfigDict,
    built: Built,
    data: Any,
    workdir: pathlib.Path,
    run: TrainingRun,
    checkpoints: Checkpoints,
    quiet: bool,
) -> Session:
    """Opens all that a training needs beside its state, and says what is about to run.

    Args:
        config: of the run.
        built: of that config.
        data: the data object of docs/architecture.md.
        workdir: the run folder.
        run: where it starts.
        checkpoints: the run's, open for saving.
        quiet: plain log lines instead of the live one.
    """
    folder, is_main = RunFolder(workdir), distributed.is_main()
    # Opened on every process and inactive on all but one, so that no caller asks which process it
    # is.
    progress = Progress(config.steps, run.step, quiet, is_main)
    trackers = Trackers(config, workdir, run.step, progress.say) if is_main else None
    writer = Writer(workdir, run.step, is_main, trackers)
    progress.say(_greeting(config, data, run))
    meter = _meter(config, built)
    bad_steps = BadStepGuard(config.max_bad_steps, checkpoints.latest, workdir, writer, progress)
    return Session(
        config=config,
        built=built,
        data=data,
        folder=folder,
        checkpoints=checkpoints,
        writer=writer,
        progress=progress,
        meter=meter,
        batches=TrainBatches(config, data, built.objective, meter),
        metrics=LateMetrics(config, data, run, writer, progress, meter, bad_steps),
        profiler=Profiler(config.profile, folder.profile, is_main, progress),
        tables=HostTables(run.tables, built.objective, built.mesh, config.seed, meter),
        began=time.monotonic(),
    )


def _greeting(config: ConfigDict, data: Any, run: TrainingRun) -> str:
    params = run.state.params
    num_params, num_frozen = 0, 0
    # Of the model and of the objective: both are trained.
    for path, array in zip(jax.tree.leaves(optim.paths(params)), jax.tree.leaves(params)):
        num_params += array.size
        if optim.matches(path, config.optimizer.frozen):
            num_frozen += array.size
    for array in jax.tree.leaves(run.state.frozen.get('params', {})):
        num_params += array.size
        num_frozen += array.size
    frozen = f' ({num_frozen / 1e6:.2f} M of them frozen)' if num_frozen else ''
    return (
        f'{config.name}: {run.origin}; {num_params / 1e6:.2f} M parameters{frozen}, '
        f'{data.size("train")} training records, {jax.device_count()} × '
        f'{jax.devices()[0].device_kind}, {jax.process_count()} process(es)'
    )


def _meter(config: ConfigDict, built: Built) -> Meter:
    """The run's speedometer; it tells MFU where the chips' peak is known."""
    peak = chips.peak_of(list(built.mesh.devices.flat))
    if not peak:
        # A chip that is not in the table: FLOPs need not be counted, which traces the towers.
        return Meter(None, peak)
    return Meter(flops.per_clip(config, built.inputs, built.objective, built.shape), peak)
