"""The slow half of `prepare`, decoding, as an Apache Beam pipeline.

It is chosen by --beam='--runner=DirectRunner' or the options of any other runner, and needs the
extra `beam`.

Each file is an element of its own. One that cannot be used, or crashes the decoder, is staged as
skipped with its reason, as without Beam, and counted; what was staged before is not decoded again.
--out must be a folder that all workers see under the same path, and so must the files.
"""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Iterator, Sequence

import apache_beam
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, staging, worker_processes

_NAMESPACE = 'prepare'  # of the counters


class Stage(apache_beam.DoFn):
    """Stages a `decoded_files.File`; the output is 'decoded', or the reason why it is skipped."""

    def __init__(self, settings: decoded_files.Settings, stage_dir: str):
        self._settings = settings
        self._stage_dir = stage_dir
        # Made by the first element: a DoFn is pickled on its way to the workers.
        self._worker: worker_processes.Worker | None = None

    def process(self, file: decoded_files.File) -> Iterator[str]:
        """Stage one file and count the result."""
        target = decoded_files.staged_path(pathlib.Path(self._stage_dir), file, self._settings)
        if not target.is_file():  # a runner may try an element twice
            self._stage(file, target)
        # Only what precedes the colon: the rest differs from file to file.
        # Read back from the file: the same for an element that another attempt has staged.
        reason = decoded_files.header(target).get('skipped', '').split(':')[0]
        result = reason or 'decoded'
        Metrics.counter(_NAMESPACE, result).inc()
        yield result

    def _stage(self, file: decoded_files.File, target: pathlib.Path) -> None:
        # In a process of its own: a file may kill it, and the Beam worker goes on.
        if self._worker is None:
            self._worker = worker_processes.Worker()
        staging.stage_in(self._worker, file, self._settings, target)

    def teardown(self) -> None:
        """End the worker process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def stage(
    files: Sequence[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    options: str,
) -> dict[str, int]:
    """Stage files in a Beam pipeline.

    Args:
        files: the media files.
        settings: how they are decoded.
        stage_dir: the staging folder, which all workers see under this path.
        options: of Beam, as on a command line.

    Returns:
        Number of files that were decoded, and that were skipped for each kind of reason.

    Raises:
        DataError: if the pipeline does not finish, or files are not there afterwards.
    """
    try:
        # Split as a shell would, so that options may contain quoted spaces.
        pipeline = apache_beam.Pipeline(options=PipelineOptions(shlex.split(options)))
        (
            pipeline
            | 'files' >> apache_beam.Create(list(files))
            # Without it, a runner may fuse the steps and decode all files in one worker.
            | 'spread' >> apache_beam.Reshuffle()
            # Absolute, since workers may run in another directory.
            | 'decode' >> apache_beam.ParDo(Stage(settings, str(stage_dir.resolve())))
        )
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as error:  # runners raise what they like
        first_line = str(error).partition('\n')[0]
        raise DataError(
            f'--beam={options}: the pipeline failed ({type(error).__name__}: {first_line}); '
            'the same command goes on from here'
        ) from error

    # A worker on a machine without this folder writes to its own disk and reports success.
    missing = [
        file.id
        for file in files
        if not decoded_files.staged_path(stage_dir, file, settings).is_file()
    ]
    if missing:
        raise DataError(
            f'the Beam pipeline ended in state {state} and {len(missing)} files are not below '
            f'{stage_dir}, for example {missing[0]}; do all workers see this folder?'
        )
    counters = result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))['counters']
    # `result` is the committed count where the runner has one: elements that were tried again
    # count once.
    return {counter.key.metric.name: counter.result for counter in counters}
