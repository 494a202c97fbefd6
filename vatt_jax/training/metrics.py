"""What a run reports: one live line, `metrics.jsonl` and the trackers of its config."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vatt_jax.run_folder import RunFolder, writing
from vatt_jax.training.trackers import Trackers

# Results that are reported for a step after its checkpoint is saved.
AFTER = ('eval/', 'refresh/')


class Writer:
    """Writes scalars to `<workdir>/metrics.jsonl` and to trackers.

    On resume, lines that came after the checkpoint of the resumed step are dropped, so that the
    file reads as if the run had never stopped: lines of later steps, and what is reported for a
    step once it is saved (AFTER), which the continued run reports again.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        active: bool = True,
        trackers: Trackers | None = None,
    ):
        """Open the files.

        Args:
            workdir: The run folder.
            step: The step the run starts or resumes from.
            active: False on all processes but the main one: nothing is written.
            trackers: Get all numbers too; closed with this.

        Raises:
            NotWritten: The file cannot be written.
        """
        self.file: IO[str] | None = None
        self.trackers = trackers
        if not active:
            return
        self.path = RunFolder(workdir).metrics
        with writing(self.path):
            if self.path.exists():
                _drop_later_lines(self.path, step)
            self.file = self.path.open('a')

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """Write one line {'step': …, 'time': …, **scalars}; numbers also go to the trackers.

        JSON has neither NaN nor infinity: they are written as null. The time is UTC (ISO 8601).

        Raises:
            NotWritten: The file cannot be written.
        """
        if self.file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
        # json.dumps would write NaN, which few readers take; allow_nan=False guards this
        # conversion.
        finite: dict[str, Any] = {}
        for name, value in scalars.items():
            is_finite = not isinstance(value, float) or math.isfinite(value)
            finite[name] = value if is_finite else None
        line = json.dumps({'step': step, 'time': now, **finite}, allow_nan=False)
        with writing(self.path):
            self.file.write(line + '\n')
            self.file.flush()  # so that a killed run loses no line
        numbers = {k: float(v) for k, v in scalars.items() if isinstance(v, (int, float))}
        if self.trackers is not None and numbers:
            self.trackers.scalars(step, numbers)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self.file is not None:
            # A line that could not be written is still held, and was reported.
            with contextlib.suppress(OSError):
                self.file.close()
        if self.trackers is not None:
            self.trackers.close()


def _drop_later_lines(path: pathlib.Path, step: int) -> None:
    """Rewrite metrics.jsonl with the lines older than the checkpoint of `step`."""
    lines = [line for line in path.read_text().splitlines() if _before(line, step)]
    # Written beside it and renamed: a kill at any moment leaves one of the two files whole.
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(f'{line}\n' for line in lines))
    os.replace(temporary, path)


def _before(line: str, step: int) -> bool:
    """Return whether a line of metrics.jsonl is older than the checkpoint of `step`.

    False for a line that a kill cut short.
    """
    try:
        values = json.loads(line)
        # Of the checkpoint's own step, what training logged stays; what followed the save is
        # repeated.
        if values['step'] != step:
            return values['step'] < step
        return not any(name.startswith(AFTER) for name in values)
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """One live line on a terminal; plain lines now and then in a log."""

    def __init__(self, steps: int, start: int, quiet: bool, active: bool = True):
        """Begin the line.

        Args:
            steps: Steps of the whole run.
            start: The step the run starts or resumes from.
            quiet: Plain lines even on a terminal, and fewer of them.
            active: False on all processes but the main one: nothing is shown.
        """
        self.steps = steps
        self.start = start
        self.active = active
        self.began = time.monotonic()
        self.last_shown = self.began
        self.interval = 30.0 if quiet else 10.0  # seconds between plain lines
        self.live: Live | None = None
        self.values: dict[str, float] = {}  # of the last line of the log
        # In a log file a live line would be one control sequence after another.
        # Names of files and runs are text, not rich's [styles] and :pictures:.
        console = Console(stderr=False, markup=False, emoji=False, highlight=False)
        if active and not quiet and console.is_terminal:
            self.live = Live(console=console, refresh_per_second=4, transient=False)
            self.live.start()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the state of the run.

        Args:
            step: Steps taken.
            values: loss, lr, clips_per_s, data_wait, goodput, and mfu where it is known.
        """
        self.values = values
        is_first_or_last = step in (self.start + 1, self.steps)
        self._show(step, values, at_once=is_first_or_last)

    def advance(self, step: int, loss: float) -> None:
        """Show a step whose speed was not measured, with the speed that was measured last."""
        self._show(step, {**self.values, 'loss': loss})

    def _show(self, step: int, values: dict[str, float], at_once: bool = False) -> None:
        if not self.active:
            return
        now = time.monotonic()
        if self.live:
            self.live.update(Text(self._line(step, values, now)))
        elif at_once or now - self.last_shown > self.interval:
            self._print(self._line(step, values, now))
            self.last_shown = now

    def _line(self, step: int, values: dict[str, float], now: float) -> str:
        # Averaged over this process's life, evaluations and compilation included: the rest has them
        # too.
        seconds_per_step = (now - self.began) / max(1, step - self.start)
        remaining = seconds_per_step * (self.steps - step)
        parts = [f'step {step}/{self.steps}', f'loss {values["loss"]:.4f}']
        # Measured for the first time at the first line of the log.
        if 'clips_per_s' in values:
            parts += [f'lr {values["lr"]:.2e}', f'{values["clips_per_s"]:.0f} clips/s']
        if 'mfu' in values:
            parts.append(f'MFU {100 * values["mfu"]:.1f}%')
        if 'clips_per_s' in values:
            parts += [
                f'waiting for data {100 * values["data_wait"]:.0f}%',
                f'goodput {100 * values["goodput"]:.0f}%',
            ]
        parts.append(f'ETA {duration(remaining)}')
        return '  '.join(parts)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.active:
            return
        if self.live:
            # Above the live line.
            self.live.console.print(text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        # Whoever read it, such as `head`, has gone; the run need not go too.
        except BrokenPipeError:
            self.active = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        """End the live line."""
        if self.live:
            self.live.stop()
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return '1:02:03' or '2:03'."""
    minutes, secs = divmod(int(seconds), 60)
    if int(seconds) < 3600:
        return f'{minutes}:{secs:02d}'
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{secs:02d}'


class Meter:
    """Speed since the last reading, and the share of the time since its start that went into steps.

    The caller adds to the attributes as things happen.

    Attributes:
        clips: Clips trained on since the last reading.
        waited: Seconds since then that waited for data.
        lost: Seconds since then that waited for checkpoints.
    """

    def __init__(self, flops: float | None = None, peak: float | None = None):
        """Start the clock.

        Args:
            flops: FLOPs of one clip's training step, as the model needs them.
            peak: FLOP/s of all chips together by their data sheet. Where either is None, unknown,
                there is no MFU.
        """
        self.flops = flops
        self.peak = peak
        self.start = time.monotonic()
        self.useful = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin anew; what went before (compilation, evaluation, a refresh) was no step."""
        self.began = time.monotonic()
        self.waited = 0.0
        self.lost = 0.0
        self.clips = 0

    def read(self) -> dict[str, float]:
        """Return the figures since the last reading and begin anew.

        Returns:
            clips_per_s: Clips trained on each second.
            data_wait: Share of the time that waited for data.
            goodput: Share of all time since the start that neither waited for data or checkpoints,
                nor compiled, evaluated or refreshed.
            mfu: FLOPs that the model needs, as a share of the data sheet's; absent if unknown.
        """
        now = time.monotonic()
        elapsed = max(1e-9, now - self.began)  # no division by zero
        self.useful += max(0.0, elapsed - self.waited - self.lost)
        figures = {
            'clips_per_s': self.clips / elapsed,
            'data_wait': self.waited / elapsed,
            'goodput': self.useful / max(1e-9, now - self.start),
        }
        if self.flops and self.peak:
            # Model FLOPs utilisation (PaLM): FLOPs that the model needs, without those
            # that rematerialisation repeats, over the chips' peak.
            figures['mfu'] = self.clips / elapsed * self.flops / self.peak
        self.reset()
        return figures
