"""Runs of run.py in processes of their own: started, watched, killed, and read afterwards.

The processes are forked from a server that has imported everything and touched no device (multiprocessing's forkserver), so a start
costs a second instead of the imports' several; from `run.entry()` on it is what the command line does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import socket
import sys
import threading

CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'
_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(
    [
        'run',
        'configs.demo',
        'data_pipelines.loading.synthetic',
        'tensorboardX',
        'tests.tiny',
        'tests.runs',
        'sklearn.linear_model',
        'sklearn.model_selection',
        'sklearn.pipeline',
        'sklearn.preprocessing',
        'vatt_jax.api',
        'vatt_jax.evals',
        'vatt_jax.modes.train',
        'vatt_jax.reporting.report',
        'vatt_jax.training.loop',
    ]
)


def enter(argv: list[str], log: str, cache: str, devices: int, environment: dict[str, str]) -> None:
    """In the child: run.py with these arguments. Output goes to the file `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
    os.environ.update(environment)
    import jax

    import run

    threading.Thread(
        target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True
    ).start()  # no orphans
    jax.config.update('jax_num_cpu_devices', devices)
    jax.config.update('jax_compilation_cache_dir', cache or None)
    jax.config.update(
        'jax_disable_most_optimizations', True
    )  # compiling costs more here than running
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    sys.argv = ['run.py', *argv]
    run.entry()


def start(
    *argv: str,
    log: pathlib.Path,
    cache: pathlib.Path | None = CACHE,
    devices: int = 1,
    **environment: str,
):
    """A started process (kill(), terminate(), join(), exitcode). cache None: everything is compiled anew."""
    process = _server.Process(
        target=enter,
        args=(list(argv), str(log), str(cache or ''), devices, environment),
        daemon=True,
    )
    process.start()
    return process


def finish(process, log: pathlib.Path, timeout: float = 550) -> int:
    """Exit code; a process that does not end in time is killed and the test fails with what it said."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f'no end after {timeout} s:\n{log.read_text()[-3000:]}')
    return process.exitcode


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def done(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / 'done.json').read_text())


def log_lines(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what time alone decides."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if k not in ('time', 'clips_per_s', 'data_wait', 'goodput', 'mfu')
        }
        for line in lines
    ]


def snapshot(folder: pathlib.Path) -> dict[str, tuple]:
    """{path: (bytes, time of last change)} of everything below a folder."""
    return (
        {
            str(p.relative_to(folder)): (
                p.read_bytes() if p.is_file() else None,
                p.stat().st_mtime_ns,
            )
            for p in sorted(folder.rglob('*'))
        }
        if folder.exists()
        else {}
    )
