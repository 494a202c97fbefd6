"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard, Weights & Biases, CLU's writers.

`config.trackers` names entries of TRACKERS. Each imports its library when a run opens it, so that
none is needed until it is asked for. A new one is a class with the methods of `Tracker` and an
entry in TRACKERS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose
from vatt_jax.run_folder import RunFolder


class Tracker:
    """What a run reports to. Methods that a service has no place for may stay as they are."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take numbers of a step, name -> value; NaN and infinity may be among them."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text in Markdown."""

    def image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W 3']) -> None:
        """Take a picture, RGB of 0 to 255."""

    def close(self) -> None:
        """Write what is held back, and end."""


class TensorBoard(Tracker):
    """Event files in `<workdir>/tensorboard`, by tensorboardX: no TensorFlow is needed.

    They are written where they are handed over. tensorboardX's own SummaryWriter leaves that to a
    thread, which a full disk ends, and the run would then wait for it for ever.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = RunFolder(workdir).tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        # Names have seconds only: a random ending tells two starts of one second apart.
        self.writer = EventsWriter(str(folder / 'events'), f'.{secrets.token_hex(4)}')
        self.event = Event
        self.flushed = time.monotonic()
        # TensorBoard drops what earlier starts wrote of the steps after `step`.
        session = SessionLog(status=SessionLog.START)
        self.writer.write_event(Event(step=step + 1, wall_time=time.time(), session_log=session))

    def _write(self, step: int, summary: Any) -> None:
        self.writer.write_event(self.event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self.flushed > self.FLUSH_SECONDS:
            self.writer.flush()
            self.flushed = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, Summary(value=points))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX import summary

        self._write(step, summary.text(name, text))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W 3']) -> None:
        from tensorboardX import summary

        # tensorboardX makes its PNG by Pillow, which only media files need otherwise.
        if importlib.util.find_spec('PIL') is not None:
            self._write(step, summary.image(name, image, dataformats='HWC'))

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, named as the config; its settings are wandb's (WANDB_PROJECT, …).

    A run that is continued goes on in the same one. Its service takes no step twice: what a killed
    run had reported beyond its last checkpoint stays there, and is not replaced.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, step: int) -> None:
        import wandb

        self.wandb = wandb
        id_file = RunFolder(workdir).wandb_id
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        self.run = wandb.init(
            id=id_file.read_text().strip(),
            resume='allow',
            name=config.name,
            config=config.to_dict(),
            dir=str(workdir),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        # A preformatted block: Html takes no Markdown.
        escaped = text.replace('&', '&amp;').replace('<', '&lt;')
        self.run.log({name: self.wandb.Html(f'<pre>{escaped}</pre>')}, step=step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W 3']) -> None:
        self.run.log({name: self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Clu(Tracker):
    """The default writer of CLU (Common Loop Utils), with its files in `<workdir>/clu`."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, step: int) -> None:
        from clu import metric_writers

        self.writer = metric_writers.create_default_writer(str(RunFolder(workdir).clu))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.write_scalars(step, dict(values))

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.write_texts(step, {name: text})

    def image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W 3']) -> None:
        self.writer.write_images(step, {name: image[None]})

    def close(self) -> None:
        self.writer.flush()
        self.writer.close()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracker that a config may name.

    Attributes:
        make: (config, workdir, step) -> Tracker.
        module: What it imports.
        package: What to install for it.
    """

    make: Callable[[ConfigDict, pathlib.Path, int], Tracker]
    module: str
    package: str


TRACKERS = {
    'tensorboard': Entry(TensorBoard, 'tensorboardX', 'tensorboardX'),
    'wandb': Entry(WeightsAndBiases, 'wandb', 'wandb'),
    'clu': Entry(Clu, 'clu', 'clu tensorflow'),
}


def check(names: Sequence[str]) -> None:
    """Check `config.trackers` before anything is built.

    Raises:
        ConfigError: A name is unknown, or its library is not installed.
    """
    for name in names:
        entry = TRACKERS[choose(name, TRACKERS, 'config.trackers')]
        if importlib.util.find_spec(entry.module) is None:
            raise ConfigError(
                f'config.trackers has {name!r}, whose library {entry.module} is not installed; '
                f'pip install {entry.package}, or leave it out'
            )


class Trackers:
    """All trackers of a run. One that fails is reported once and left out; the run goes on."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        step: int,
        say: Callable[[str], object],
    ) -> None:
        """Open them, and hand them the config as a text.

        Args:
            config: Of the run.
            workdir: The run folder.
            step: The step the run starts or resumes from.
            say: Takes a line for the user.
        """
        self.say = say
        self.open: dict[str, Tracker] = {}
        for name in config.get('trackers', ('tensorboard',)):
            with self._guard(name):
                self.open[name] = TRACKERS[name].make(config, workdir, step)
        document = json.dumps(config.to_dict(), indent=1)
        self.text(step, 'config', f'```json\n{document}\n```')

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        # A full disk, a service that is down, a library of another version: none of it is worth a
        # training run.
        except Exception as error:
            self.open.pop(name, None)
            reason = ' '.join(str(error).split())[:200]
            self.say(
                f'tracker {name} failed ({type(error).__name__}: {reason}) and takes no more; the '
                'run goes on, and metrics.jsonl has all numbers'
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over numbers; see `Tracker`."""
        for name, tracker in list(self.open.items()):
            with self._guard(name):
                tracker.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Hand over a text; see `Tracker`."""
        for tracker_name, tracker in list(self.open.items()):
            with self._guard(tracker_name):
                tracker.text(step, name, text)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, 'H W 3']) -> None:
        """Hand over a picture; see `Tracker`."""
        for tracker_name, tracker in list(self.open.items()):
            with self._guard(tracker_name):
                tracker.image(step, name, image)

    def close(self) -> None:
        """Close them all."""
        for name, tracker in list(self.open.items()):
            with self._guard(name):
                tracker.close()
        self.open.clear()
