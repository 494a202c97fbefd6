"""Runs of run.py in processes of their own: started, watched, killed, and read afterwards.

The processes are forked from a server that has imported everything and touched no device
(multiprocessing's forkserver), so a start costs a second instead of the imports' several; from
`run.entry()` on it is what the command line does.
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


def end_with_parent() -> None:
    """Ends this process when the one that started it ends: no orphans."""
    multiprocessing.parent_process().join()
    os._exit(1)


def enter(argv: list[str], log: str, cache: str, devices: int, environment: dict[str, str]) -> None:
    """In the child: run.py with these arguments. Output goes to the file `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, 'w', buffering=1)
    sys.stderr = os.fdopen(2, 'w', buffering=1)
    os.environ.update(environment)
    import jax

    import run

    threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update('jax_num_cpu_devices', devices)
    jax.config.update('jax_compilation_cache_dir', cache or None)
    # Compiling costs more here than running.
    jax.config.update('jax_disable_most_optimizations', True)
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
    """A started process: kill(), terminate(), join(), exitcode.

    Args:
        argv: Arguments of run.py.
        log: Its output goes here.
        cache: Of compiled programs; None: everything is compiled anew.
        devices: Simulated devices.
        environment: Variables beside those of this process.
    """
    process = _server.Process(
        target=enter,
        args=(list(argv), str(log), str(cache or ''), devices, environment),
        daemon=True,
    )
    process.start()
    return process


def finish(process, log: pathlib.Path, timeout: float = 550) -> int:
    """Exit code. A process that does not end in time is killed, and the test fails with its log."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f'no end after {timeout} s:\n{log.read_text()[-3000:]}')
    return process.exitcode


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def done(workdir: pathlib.Path) -> dict:
    """done.json of a finished run."""
    return json.loads((workdir / 'done.json').read_text())


# What the speed of the machine decides.
TIMINGS = ('time', 'clips_per_s', 'data_wait', 'goodput', 'mfu')


def log_lines(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what time alone decides."""
    lines = []
    for text in (workdir / 'metrics.jsonl').read_text().splitlines():
        line = json.loads(text)
        for name in TIMINGS:
            line.pop(name, None)
        lines.append(line)
    return lines


def snapshot(folder: pathlib.Path) -> dict[str, tuple]:
    """{path: (bytes, time of last change)} of everything below a folder but the lock of a run."""
    if not folder.exists():
        return {}
    found = {}
    for path in sorted(folder.rglob('*')):
        # The lock holds the number of the last process that took it.
        if path.name == 'run.lock':
            continue
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (content, path.stat().st_mtime_ns)
    return found
