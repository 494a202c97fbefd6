"""Several processes: finding one another, one voice, barriers, and stopping together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vatt_jax.command_line import run_command
from vatt_jax.config import ConfigError

PATIENCE = 600  # seconds that processes wait for one another
TPU_PORT = 8482  # of the coordinator where the environment names hosts only
# Ports computed from a job's number lie in 61440 to 65535, above those that Linux hands out.
FIRST_PORT, NUM_PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Position:
    """This process among the others.

    Attributes:
        address: host:port of process 0.
        processes: How many processes there are.
        process: The number of this one.
        devices: The local accelerators it may use, None for all.
    """

    address: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def find_position(environment: Mapping[str, str]) -> Position | None:
    """Find where an environment puts this process.

    The first that applies:

    - VATT_COORDINATOR, VATT_PROCESSES, VATT_PROCESS: set by hand, by vatt_jax.launch, or by a
      Kubernetes job, whose JOB_COMPLETION_INDEX stands in for the last;
    - a SLURM step (srun);
    - Open MPI;
    - Cloud TPU hosts under GKE, with or without several slices.

    One process of a host takes all its accelerators; where there are several, each takes the one of
    its local number. (jax.distributed's own detection gives a process one accelerator even where it
    is the only one of its host.)

    Args:
        environment: Environment variables.

    Returns:
        The position, None for a process that is alone.

    Raises:
        ConfigError: The variables contradict one another.
    """
    # What a user sets counts before what a scheduler set: a script inside a SLURM job may start its
    # own processes.
    for detect in (_explicit, _slurm, _open_mpi, _cloud_tpu):
        found = detect(environment)
        if found is None:
            continue
        if not 0 <= found.process < found.processes:
            raise ConfigError(
                f'this is process {found.process} of {found.processes}: give the number of '
                'processes and the position of this one among them, 0 to one less (VATT_PROCESSES, '
                'VATT_PROCESS)'
            )
        return found if found.processes > 1 else None
    return None


def _explicit(env: Mapping[str, str]) -> Position | None:
    """Read the variables of this project."""
    address = env.get('VATT_COORDINATOR')
    if not address:
        for name in ('VATT_PROCESSES', 'VATT_PROCESS'):
            if env.get(name):
                raise ConfigError(
                    f'{name}={env[name]} without VATT_COORDINATOR: give host:port of process 0 too'
                )
        return None
    if not re.search(r':\d+$', address):
        raise ConfigError(f'VATT_COORDINATOR={address}: expected host:port, such as node1:8476.')
    process = env.get('VATT_PROCESS') or env.get('JOB_COMPLETION_INDEX', '')
    processes = env.get('VATT_PROCESSES', '')
    are_numbers = processes.isdecimal() and process.isdecimal()
    if not are_numbers or int(process) >= int(processes):
        raise ConfigError(
            f'VATT_COORDINATOR={address} with VATT_PROCESSES={processes!r} and '
            f'VATT_PROCESS={process!r}: give the number of processes and the position of this one '
            'among them, 0 to one less'
        )
    return Position(address, int(processes), int(process), _device_numbers(env, 'VATT_DEVICES'))


def _slurm(env: Mapping[str, str]) -> Position | None:
    """Read the variables of a step that srun started.

    Inside salloc or a batch script, without srun, there is one process whatever SLURM_NTASKS says.
    The shell of `srun --pty` is a step of one task, of whose variables some may be missing.
    """
    if 'SLURM_STEP_NODELIST' not in env or 'SLURM_PROCID' not in env:
        return None
    # SLURM_NTASKS is the job's number, of which a step may take fewer.
    count_name = 'SLURM_STEP_NUM_TASKS' if env.get('SLURM_STEP_NUM_TASKS') else 'SLURM_NTASKS'
    process = _number(env, 'SLURM_PROCID', 'srun')
    if process == 0 and not env.get(count_name):
        # A step that does not say how many tasks it has is that of a shell.
        return Position('', 1, 0)
    processes = _number(env, count_name, 'srun')
    if processes == 1 and process == 0:
        return Position('', 1, 0)
    # Tasks of each node, '4', '4(x2)' or '2,1'. The count in brackets is one of nodes.
    tasks_per_node = env.get('SLURM_STEP_TASKS_PER_NODE', '1')
    task_counts = re.findall(r'(?:^|,)(\d+)', tasks_per_node)
    devices = None
    if any(int(count) > 1 for count in task_counts):
        devices = (_number(env, 'SLURM_LOCALID', 'srun'),)
    # SLURM puts rank 0 on the first node of the step, unless configured otherwise.
    host = first_host(env['SLURM_STEP_NODELIST'])
    # From the job's number: two jobs on one host seldom get the same port.
    port = FIRST_PORT + _number(env, 'SLURM_JOB_ID', 'srun') % NUM_PORTS
    return Position(f'{host}:{port}', processes, process, devices)


def _number(env: Mapping[str, str], name: str, launcher: str) -> int:
    """Return a variable that the launcher sets to a number of at least 0.

    Raises:
        ConfigError: It is not set, or is no such number.
    """
    text = env.get(name, '').strip()
    # isascii: int() knows digits of other scripts too, which no launcher writes.
    if text.isascii() and text.isdigit():
        return int(text)
    found = f'{name}={text!r}' if name in env else f'{name} is not set'
    raise ConfigError(
        f'the environment is that of a process of {launcher}, but {found}: expected a number. '
        f'Start with {launcher} in full, or name the position by VATT_COORDINATOR=host:port, '
        'VATT_PROCESSES and VATT_PROCESS; VATT_COORDINATOR=localhost:1 VATT_PROCESSES=1 '
        'VATT_PROCESS=0 is one process alone'
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list: 'gpu[007-009,12],login' -> 'gpu007'.

    Raises:
        ConfigError: The list names none.
    """
    # prefix, first number in the brackets, suffix
    found = re.match(r'([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?', nodes)
    if not found:
        raise ConfigError(f'SLURM_STEP_NODELIST={nodes!r} names no host')
    return ''.join(part or '' for part in found.groups())


def _open_mpi(env: Mapping[str, str]) -> Position | None:
    """Read the variables of mpirun."""
    if 'OMPI_COMM_WORLD_SIZE' not in env:
        return None
    processes = _number(env, 'OMPI_COMM_WORLD_SIZE', 'mpirun')
    if processes == 1:
        # Whatever else is set or not: there is nobody to find.
        return Position('', 1, 0)
    process = _number(env, 'OMPI_COMM_WORLD_RANK', 'mpirun')
    local_processes = _number(env, 'OMPI_COMM_WORLD_LOCAL_SIZE', 'mpirun')
    devices = None
    if local_processes > 1:
        devices = (_number(env, 'OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun'),)
    # Version 4 tells where mpirun runs, which is where rank 0 is unless it was placed elsewhere;
    # version 5 does not. '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911': job number, then the
    # addresses of that host, IPv6 ones in brackets.
    mpirun = re.search(
        r'^(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://(\[[^,\]]+))',
        env.get('OMPI_MCA_orte_hnp_uri', ''),
    )
    if local_processes == processes:
        # All on this host. Without a job number, that of mpirun itself is one all processes share.
        number = int(mpirun[1]) // NUM_PORTS if mpirun else os.getppid()
        host = '127.0.0.1'
    elif mpirun:
        number = int(mpirun[1]) // NUM_PORTS
        host = mpirun[2] or mpirun[3] + ']'
    else:
        raise ConfigError(
            'Open MPI does not say where process 0 is; name it: mpirun '
            f'-x VATT_COORDINATOR=host:8476 -x VATT_PROCESSES={processes} … '
            f"sh -c 'VATT_PROCESS=$OMPI_COMM_WORLD_RANK {run_command()} …'"
        )
    return Position(f'{host}:{FIRST_PORT + number % NUM_PORTS}', processes, process, devices)


def _cloud_tpu(env: Mapping[str, str]) -> Position | None:
    """Read GKE's variables of a TPU pod slice, and of several slices (MEGASCALE_…)."""
    # Hosts of this slice only; every slice has as many.
    hosts = [host for host in env.get('TPU_WORKER_HOSTNAMES', '').split(',') if host]
    slices = 1
    if env.get('MEGASCALE_NUM_SLICES'):
        slices = _number(env, 'MEGASCALE_NUM_SLICES', 'GKE')
    processes = len(hosts) * slices
    # Without a number the hosts are what TPU VMs without GKE say of themselves.
    if not hosts or 'TPU_WORKER_ID' not in env or processes <= 1:
        return None
    coordinator = env.get('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]
    host = coordinator.split(':')[0]  # its port there is that of another service
    # Numbered slice by slice, so that the processes of a slice are neighbours.
    slice_number = 0
    if slices > 1:
        slice_number = _number(env, 'MEGASCALE_SLICE_ID', 'GKE')
    process = slice_number * len(hosts) + _number(env, 'TPU_WORKER_ID', 'GKE')
    return Position(f'{host}:{TPU_PORT}', processes, process)


def _device_numbers(env: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    text = env.get(name, '')
    if not text:
        return None
    if not re.fullmatch(r'\d+(,\d+)*', text):
        raise ConfigError(
            f'{name}={text}: expected numbers of local accelerators, such as 0 or 0,1.'
        )
    return tuple(int(number) for number in text.split(','))


def initialize(environment: Mapping[str, str] = os.environ, timeout: int = PATIENCE) -> None:
    """Join the other processes, if the environment says there are any.

    VATT_COORDINATOR=auto leaves the search to JAX (Cloud TPU VMs without GKE, whose hosts are known
    to their metadata server only).

    Args:
        environment: Environment variables.
        timeout: Seconds to wait for the others.

    Raises:
        ConfigError: The environment contradicts itself, or the others were not found in time.
    """
    if environment.get('VATT_COORDINATOR') == 'auto':
        try:
            jax.distributed.initialize(initialization_timeout=timeout)
        # Of several types, by what is missing.
        except Exception as error:
            raise ConfigError(
                'VATT_COORDINATOR=auto: JAX did not find the other processes by itself '
                f'({str(error).strip().splitlines()[0]}); it does on Cloud TPU VMs. Elsewhere set '
                'VATT_COORDINATOR=host:port, VATT_PROCESSES and VATT_PROCESS'
            ) from error
    else:
        position = find_position(environment)
        if position is None:
            return
        try:
            jax.distributed.initialize(
                position.address,
                position.processes,
                position.process,
                local_device_ids=position.devices,
                # The place is known; JAX's own detection would overrule what is left out
                # (local_device_ids).
                cluster_detection_method='deactivate',
                initialization_timeout=timeout,
            )
        except RuntimeError as error:
            raise ConfigError(
                f'process {position.process} on {socket.gethostname()} did not find the other '
                f'{position.processes - 1} by way of {position.address} within {timeout} s '
                f'({str(error).splitlines()[0]}); check that all of them started and reach that '
                'address'
            ) from error
    # So that a barrier can name the host of a process that does not come.
    _client().key_value_set(f'vatt/host/{jax.process_index()}', socket.gethostname())


def _client() -> Any:
    # There is no public way to JAX's key-value store and barriers, which need no device.
    from jax._src import distributed

    return distributed.global_state.client


class ProcessGone(RuntimeError):
    """Processes that did not come to a barrier in time. The message names them and their hosts."""


def barrier(name: str, timeout: float = PATIENCE) -> None:
    """Wait until every process is here.

    Args:
        name: The name of this point in the program; each is passed once.
        timeout: Seconds to wait.

    Raises:
        ProcessGone: Naming the processes that did not come.
    """
    count = jax.process_count()
    if count == 1:
        return
    client = _client()
    began = time.monotonic()
    # Left before waiting, so that those who come can be told from those who do not.
    client.key_value_set(f'vatt/barrier/{name}/{jax.process_index()}', 'here', allow_overwrite=True)
    try:
        # JAX takes milliseconds. A barrier of a name can be passed once, hence names, not a
        # counter.
        client.wait_at_barrier(f'vatt/{name}', int(timeout * 1000))
    except Exception as error:  # its type differs from version to version
        try:
            present = _read_folder(client, f'vatt/barrier/{name}/')
            hosts = _read_folder(client, 'vatt/host/')
        except Exception:  # the coordinator itself is gone
            raise ProcessGone(
                f'the coordinating process cannot be reached at {name!r}: '
                f'{str(error).splitlines()[0]}'
            ) from error
        missing = [str(number) for number in range(count) if str(number) not in present]
        descriptions = [
            f'process {number} on {hosts.get(number, "an unknown host")}' for number in missing
        ]
        who = ', '.join(descriptions) or f'none is missing: {error}'
        elapsed = time.monotonic() - began
        raise ProcessGone(
            f'{len(missing)} of {count} processes did not come to {name!r} within {elapsed:.0f} s: '
            f'{who}'
        ) from error


def _read_folder(client: Any, folder: str) -> dict[str, str]:
    """Return last part of the key -> value for the keys below a folder of the store."""
    return {key.rsplit('/', 1)[1]: value for key, value in client.key_value_dir_get(folder)}


def leave() -> None:
    """Leave together, the last thing that processes do.

    One that simply ended would close connections on which another still reads the last collective,
    and the end of the coordinating one would abort the others.
    """
    if jax.distributed.is_initialized():
        # A barrier itself: it waits for all processes.
        jax.distributed.shutdown()


def raise_if_process_gone(error: BaseException, timeout: float = 20) -> None:
    """Find out whether a collective failed because a process is gone.

    Where one process was killed, the others fail in the step under way.

    Args:
        error: What the failed collective raised.
        timeout: Seconds to wait for the others to come here.

    Raises:
        ProcessGone: Not every process came.
    """
    try:
        # A process that is alive failed in the same collective, and comes here within seconds.
        barrier('the end of a failed step', timeout)
    except ProcessGone as absent:
        raise ProcessGone(
            f'{absent}. The step under way failed ({str(error).splitlines()[0][:200]}). The same '
            'command, started again on all hosts, continues from the last checkpoint'
        ) from error


def is_main() -> bool:
    """Return True on the one process that writes logs."""
    return jax.process_index() == 0


def broadcast_from_main(value: int) -> int:
    """Return the main process's value on every process.

    What is read from the run folder is read once: another process would see the files of a moment
    later, go another way and leave the others waiting in a collective.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # int32: without jax_enable_x64 an int64 would be truncated in silence.
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class StopSignal:
    """SIGTERM asks the loop to save and leave after the step under way.

    It comes with preemption or at a scheduler's time limit. A context: outside of it the signal
    does what it did before. In a thread that is not the main one, where Python allows no handlers,
    it always does. One inside of another tells that one as well.
    """

    def __enter__(self) -> StopSignal:
        self._asked = False
        self._ends_at_once = False
        self._outer: StopSignal | None = None
        # With several processes, jax.distributed has installed its own handler.
        is_main_thread = threading.current_thread() is threading.main_thread()
        self._handles = is_main_thread and jax.process_count() == 1
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
            outer = getattr(self._previous, '__self__', None)
            self._outer = outer if isinstance(outer, StopSignal) else None
        return self

    def _ask(self, *_: Any) -> None:
        if self._ends_at_once:
            os._exit(0)
        # Only a flag: a handler runs between any two bytecodes, where saving would see half a step.
        self._asked = True
        if self._outer is not None:
            self._outer._ask()

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """The signal ends the process in the body, where all is saved."""
        if self._asked:
            os._exit(0)
        self._ends_at_once = True
        yield
        self._ends_at_once = False

    @property
    def asked(self) -> bool:
        """Whether this process was asked; others may not know yet."""
        return self._asked

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after this step, the same on every process."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        # JAX's service has taken note of SIGTERM on any of the hosts and agreed on a step, a little
        # ahead, that all have yet to reach.
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)
