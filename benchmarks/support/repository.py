"""What a result file says of its origin: the commit of the sources and the processor."""

from __future__ import annotations

import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'benchmarks' / 'results'
CPU_INFO = pathlib.Path('/proc/cpuinfo')


def git(*command: str) -> str:
    """What a git command prints in this repository."""
    done = subprocess.run(['git', *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def commit(*source: str) -> str:
    """The short hash of HEAD, with a + where a file under `source` differs from it."""
    short_hash = git('rev-parse', '--short', 'HEAD')
    changed = git('status', '--porcelain', *source)
    return f'{short_hash}+' if changed else short_hash


def processor(unknown: str = '') -> str:
    """The processor's model name; `unknown`, else what Python knows, where Linux names none."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':')[1].strip()
    return unknown or platform.processor()
