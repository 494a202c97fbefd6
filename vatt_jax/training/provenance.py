"""What a run was made with: commit, versions and hardware, for whoever reads it later."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import subprocess
from typing import Any

import flax
import jax
import numpy as np

from vatt_jax import __version__


def describe() -> dict[str, Any]:
    """The fields of provenance.json.

    Returns:
        `started`: time in UTC (ISO 8601); `commit`: '' outside a git checkout of this library;
        `versions`: package -> version; `device`, `devices`, `processes`, `cpu_cores`, `platform`.
    """
    started = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    versions = {
        'python': platform.python_version(),
        'vatt_jax': __version__,
        'jax': jax.__version__,
        'flax': flax.__version__,
        'numpy': np.__version__,
    }
    return {
        'started': started.isoformat(),
        'commit': _commit(),
        'versions': versions,
        'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(),
        'processes': jax.process_count(),
        'cpu_cores': os.cpu_count() or 0,
        # Without the name of the machine: reports are passed on.
        'platform': f'{platform.system()} {platform.machine()}',
    }


def _commit() -> str:
    """Short commit of this library's checkout, with '+' where files differ from it."""
    file = pathlib.Path(__file__)
    # An installed library may lie inside a repository of somebody else, which does not track it.
    if not _git(file.parent, 'ls-files', file.name):
        return ''
    commit = _git(file.parent, 'rev-parse', '--short', 'HEAD')
    changed = _git(file.parent, 'status', '--porcelain', '--untracked-files=no')
    return f'{commit}+' if changed else commit


def _git(folder: pathlib.Path, *arguments: str) -> str:
    """What a git command prints; '' where it fails, as there need be no git."""
    try:
        finished = subprocess.run(
            ['git', *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return finished.stdout.strip() if finished.returncode == 0 else ''
