"""The process around a mode: its settings before, its exit code after."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import extras, phases
from vatt_jax.config import ConfigError
from vatt_jax.run_folder import RunFolder
from vatt_jax.terminal import use_plain_characters

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8

CUDA_PLUGINS = ('jax_cuda12_plugin', 'jax_cuda13_plugin')

# Failures that one sentence explains -> exit code. By name: their modules are imported late.
EXIT_CODES = {
    'DataError': 2,
    'ShardingError': 2,
    'StoreError': 1,
    'TrainingStopped': 1,
    'ProcessGone': 1,
    'CheckpointNotSaved': 1,
    'NotWritten': 1,
}
# What the system says of files that a sentence explains -> exit code: 2 where another folder has to
# be named, 1 where the same command works once there is room.
SYSTEM_ERRORS = {
    errno.EACCES: 2,
    errno.EPERM: 2,
    errno.EROFS: 2,
    errno.ENAMETOOLONG: 2,
    errno.ENOSPC: 1,
    errno.EDQUOT: 1,
    errno.EFBIG: 1,
}


def prepare(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Platform, processes and compilation cache, as the config has them.

    Raises:
        ConfigError: no device can be used, or the batch does not divide over them.
    """
    # First of all, before JAX and its threads.
    if config.jax_platform == 'cpu':
        keep_freed_memory()
    import jax

    from vatt_jax.parallel import distributed

    # An update, not an environment variable: JAX may have been imported by the config file.
    if config.jax_platform:
        jax.config.update('jax_platforms', config.jax_platform)
    # Before the first use of a device, after which JAX refuses it.
    distributed.initialize()
    num_devices, num_processes = _count_devices(config.jax_platform)
    remark = hidden_gpus(config.jax_platform, jax.default_backend(), os.environ)
    if remark and distributed.is_main():
        print(remark, file=sys.stderr, flush=True)
    # Cheap, and before the data are made or opened.
    for each in phases.all_configs(config):
        configs.check_batch(each, num_devices, num_processes)
    keep_compiled(config, workdir)


def hidden_gpus(chosen: str, platform: str, environment: Mapping[str, str]) -> str:
    """The sentence about GPUs that the environment hides; JAX itself goes on on the CPU in silence.

    Args:
        chosen: config.jax_platform; whoever chose a platform need not be reminded.
        platform: what JAX runs on.
        environment: environment variables.

    Returns:
        '' where there is nothing to say.
    """
    visible = environment.get('CUDA_VISIBLE_DEVICES')
    if chosen or platform != 'cpu' or visible is None or visible.strip() not in ('', '-1'):
        return ''
    # Without JAX's plugin for GPUs there would be none either way.
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        return ''
    return (
        f'CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs, so this runs on the CPU; unset it, or '
        'set --config.jax_platform=cpu if that is meant'
    )


def keep_freed_memory() -> None:
    """Has glibc keep the memory that is freed. Does nothing where there is no glibc.

    It gives large blocks back to the system as they are freed. On the CPU that is all temporaries
    of every step, and to fault them in again took a quarter of its time. To be called before
    threads begin, so that they share few heaps.
    """
    if sys.platform != 'linux':
        return
    # CDLL(None) is the process itself; musl has no mallopt.
    set_option = getattr(ctypes.CDLL(None), 'mallopt', None)
    if set_option is None:
        return
    # No block by mmap, whose pages go back as soon as it is freed ...
    set_option(M_MMAP_MAX, 0)
    # ... nor is the top of the heap returned, up to the largest threshold that an int holds ...
    set_option(M_TRIM_THRESHOLD, 2**31 - 1)
    # ... and few arenas, or each thread's would keep freed memory of its own.
    set_option(M_ARENA_MAX, 4)


def keep_compiled(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Keeps programs that take more than a second to compile, for the next start of the same run.

    They go to config.compilation_cache, else where JAX was told to (JAX_COMPILATION_CACHE_DIR),
    else into the run folder. The latter not on a CPU, whose programs are for one processor.
    """
    import jax

    folder = config.compilation_cache
    # JAX adds its options at run time, unseen by type checkers.
    chosen_elsewhere = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder and not chosen_elsewhere and jax.default_backend() != 'cpu':
        folder = RunFolder(workdir.absolute()).compiled
    if folder:
        jax.config.update('jax_compilation_cache_dir', str(folder))


def _count_devices(platform: str) -> tuple[int, int]:
    """(devices, processes) of the whole run, on config.jax_platform."""
    import jax

    try:
        return jax.device_count(), jax.process_count()
    # What JAX raises where a platform fails to start, here at its first use: an AssertionError
    # without a word where the platform's plugin is not installed.
    except (RuntimeError, AssertionError) as error:
        first_line = (str(error) or f'JAX has no plugin for {platform}').splitlines()[0]
        advice = '--config.jax_platform=cpu runs on the CPU'
        if platform in extras.REQUIREMENTS:
            command = extras.install_command(platform)
            advice += f', and where the chips are there, {command} adds JAX for them'
        raise ConfigError(f'no device could be used ({first_line}); {advice}') from error


def exit_with_sentence(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs `main`; mistakes and failures that one sentence explains end without a traceback.

    Args:
        main: takes the arguments.
        argv: the arguments.
    """
    use_plain_characters()
    try:
        main(argv)
    except ConfigError as error:
        configs.fail(str(error))
    except KeyboardInterrupt:
        print('interrupted; the same command continues from the last checkpoint', file=sys.stderr)
        # 128 + SIGINT, as shells have it.
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough. Python would fail once more at
        # its end, when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        code = EXIT_CODES.get(type(error).__name__)
        message = str(error)
        if code is None and isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            code = SYSTEM_ERRORS[error.errno]
            message = _about_file(error)
        if code is None:
            import jax

            # A single process ends as Python does, with its traceback and exit code 1.
            if not jax.distributed.is_initialized():
                raise
            code = 1
            traceback.print_exc()
        else:
            print(f'error: {message}', file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        # Out at once: at its end Python would wait for the other processes, and they for this one.
        os._exit(code)


def _about_file(error: OSError) -> str:
    """The sentence for an error of the file system."""
    reason = error.strerror or str(error)
    # Errors of writing to an open file have no name.
    if error.filename is None:
        return f'a file could not be written: {reason}; the same command continues once it can be'
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f'{error.filename} could not be written: {reason}; make room and start again'
    return f'{error.filename}: {reason}; choose another folder, or change its permissions'
