"""What a run tells: one live line, `metrics.jsonl`, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Writer:
    """Scalars to `<workdir>/metrics.jsonl` and TensorBoard. `active` False (not the main process): writes nothing.

    On resume, lines that came after the checkpoint of the resumed step are dropped, so the file reads as if the run had never stopped:
    lines of later steps, and what is told of a step once it is saved (AFTER), which the continued run tells again."""

    def __init__(self, workdir: pathlib.Path, step: int, active: bool = True):
        self.file = None
        if not active:
            return
        path = workdir / 'metrics.jsonl'
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _before(line, step)]
            temporary = path.with_suffix('.tmp')
            temporary.write_text(''.join(line + '\n' for line in lines))
            os.replace(temporary, path)
        self.file = path.open('a')
        from tensorboardX import SummaryWriter  # imported late: it takes a second

        self.board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1, flush_secs=30)

    def write(self, step: int, scalars: dict[str, Any]) -> None:
        """One line {'step': …, **scalars}; numbers also go to TensorBoard. JSON has no NaN and no infinity: they are null."""
        if self.file is None:
            return
        told = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in scalars.items()
        }
        self.file.write(json.dumps({'step': step, **told}, allow_nan=False) + '\n')
        self.file.flush()
        for name, value in scalars.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.board.close()


AFTER = ('eval/', 'refresh/')


def _before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is older than the checkpoint of `step`. False for a line that a kill cut short."""
    try:
        values = json.loads(line)
        return (
            values['step'] < step
            or values['step'] == step
            and not any(name.startswith(AFTER) for name in values)
        )
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """One live line on a terminal; plain lines now and then in a log (`quiet`, or no terminal)."""

    def __init__(self, steps: int, start: int, quiet: bool, active: bool = True):
        self.steps, self.start, self.active = steps, start, active
        self.began = self.said = time.monotonic()
        console = Console(stderr=False)
        self.live = (
            Live(console=console, refresh_per_second=4, transient=False)
            if active and not quiet and console.is_terminal
            else None
        )
        self.every = 30.0 if quiet else 10.0
        if self.live:
            self.live.start()

    def show(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        now = time.monotonic()
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        mfu = f'MFU {100 * values["mfu"]:.1f}%  ' if 'mfu' in values else ''
        line = (
            f'step {step}/{self.steps}  loss {values["loss"]:.4f}  lr {values["lr"]:.2e}  {values["clips_per_s"]:.0f} clips/s  {mfu}'
            f'waiting for data {100 * values["data_wait"]:.0f}%  goodput {100 * values["goodput"]:.0f}%  ETA {duration(left)}'
        )
        if self.live:
            self.live.update(Text(line))
        elif now - self.said > self.every or step == self.steps or step == self.start + 1:
            print(line, flush=True)
            self.said = now

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            (
                self.live.console.print(text, markup=False, highlight=False)
                if self.live
                else print(text, flush=True)
            )

    def close(self) -> None:
        if self.live:
            self.live.stop()
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """'1:02:03' or '2:03'."""
    s = int(seconds)
    return (
        f'{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}' if s >= 3600 else f'{s // 60}:{s % 60:02d}'
    )


class Meter:
    """Speed since the last reading, and what of the time since its start went into steps.

    flops: of one clip's training step as the model needs it. peak: FLOP/s of all chips together by their data sheet. None: unknown, then no MFU.
    """

    def __init__(self, flops: float | None = None, peak: float | None = None):
        self.flops, self.peak = flops, peak
        self.start, self.useful = time.monotonic(), 0.0
        self.reset()

    def reset(self) -> None:
        """Begins anew; what went before (compilation, evaluation, a refresh) was no step."""
        self.began, self.waited, self.lost, self.clips = time.monotonic(), 0.0, 0.0, 0

    def read(self) -> dict[str, float]:
        """clips_per_s; data_wait: share of the time; goodput: share of all time since the start that neither waited for data or checkpoints, nor
        compiled, evaluated or refreshed; mfu: FLOPs that the model needs, of the data sheet's."""
        now = time.monotonic()
        took = max(1e-9, now - self.began)
        self.useful += max(0.0, took - self.waited - self.lost)
        out = {
            'clips_per_s': self.clips / took,
            'data_wait': self.waited / took,
            'goodput': self.useful / max(1e-9, now - self.start),
        }
        if self.flops and self.peak:
            out['mfu'] = self.clips / took * self.flops / self.peak
        self.reset()
        return out
