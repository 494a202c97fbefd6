"""The slow half of `prepare`, decoding, as an Apache Beam pipeline: --beam='--runner=DirectRunner' or any other runner's options.

Each file is an element of its own. One that cannot be used, or crashes the decoder, is staged as skipped with its reason, as on the plain path, and
counted; what was staged before is not decoded again. --out must be a folder that all workers see under the same path, and so must the files.
Needs the extra `beam`.
"""

from __future__ import annotations

import pathlib
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import apache_beam
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files

_NAMESPACE = 'prepare'


class Stage(apache_beam.DoFn):
    """staging.File -> 'decoded', or the reason why it is skipped."""

    def __init__(self, settings: decoded_files.Settings, stage_dir: str):
        self._settings, self._stage_dir, self._pool = settings, stage_dir, None

    def process(self, file: decoded_files.File) -> Iterator[str]:
        target = decoded_files.place(pathlib.Path(self._stage_dir), file, self._settings)
        if not target.is_file():  # a runner may try an element twice
            self._pool = self._pool or decoded_files.pool(
                1
            )  # a process of its own: it may be killed by a file and the worker goes on
            try:
                self._pool.submit(decoded_files.stage, file, self._settings, str(target)).result()
            except BrokenProcessPool:
                self._pool = None
                decoded_files.crashed(file, str(target))
        result = decoded_files.header(target).get('skipped', '').split(':')[0] or 'decoded'
        Metrics.counter(_NAMESPACE, result).inc()
        yield result

    def teardown(self) -> None:
        if self._pool:
            self._pool.shutdown()
            self._pool = None


def stage(
    files: Sequence[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    options: str,
) -> dict[str, int]:
    """Stages the files; options: of Beam, as on a command line. Returns how many were decoded, and skipped for each kind of reason.

    Raises DataError if the pipeline does not finish, or files are not there afterwards.
    """
    try:
        pipeline = apache_beam.Pipeline(options=PipelineOptions(shlex.split(options)))
        (
            pipeline
            | 'files' >> apache_beam.Create(list(files))
            | 'spread' >> apache_beam.Reshuffle()
            | 'decode' >> apache_beam.ParDo(Stage(settings, str(stage_dir.resolve())))
        )
        result = pipeline.run()
        state = result.wait_until_finish()
    except Exception as e:  # runners raise what they like
        raise DataError(
            f'--beam={options}: the pipeline failed ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}); the same command '
            'goes on from here'
        ) from e
    missing = [f.id for f in files if not decoded_files.place(stage_dir, f, settings).is_file()]
    if missing:
        raise DataError(
            f'the Beam pipeline ended in state {state} and {len(missing)} files are not below {stage_dir}, for example {missing[0]}; '
            'do all workers see this folder?'
        )
    return {
        c.key.metric.name: c.result
        for c in result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))['counters']
    }
