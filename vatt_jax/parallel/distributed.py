"""Several processes: finding one another, one voice, waiting for one another, and stopping together."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vatt_jax.config import ConfigError

PATIENCE = 600  # seconds that processes wait for one another
TPU_PORT = 8482  # of the coordinator where the environment names hosts only


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the others. address: host:port of process 0. devices: the local accelerators it may use, None: all."""

    address: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def place(environment: Mapping[str, str]) -> Place | None:
    """Where an environment puts this process; None: alone. Raises ConfigError for a contradiction.

    The first that applies: VATT_COORDINATOR, VATT_PROCESSES, VATT_PROCESS (set by hand, by vatt_jax.launch, or by a Kubernetes job,
    whose JOB_COMPLETION_INDEX stands in for the last); a SLURM step (srun); Open MPI; Cloud TPU hosts under GKE, with or without several slices.
    One process of a host takes all its accelerators; where there are several, each takes the one of its local number. (jax.distributed's own
    detection gives a process one accelerator even where it is the only one of its host.)
    """
    for rule in (_explicit, _slurm, _open_mpi, _cloud_tpu):
        found = rule(environment)
        if found is not None:
            if not 0 <= found.process < found.processes:
                raise ConfigError(
                    f'this is process {found.process} of {found.processes}: give the number of processes and the place of this one '
                    'among them, 0 to one less (VATT_PROCESSES, VATT_PROCESS)'
                )
            return found if found.processes > 1 else None
    return None


def _explicit(env: Mapping[str, str]) -> Place | None:
    address = env.get('VATT_COORDINATOR')
    if not address:
        left = [name for name in ('VATT_PROCESSES', 'VATT_PROCESS') if env.get(name)]
        if left:
            raise ConfigError(
                f'{left[0]}={env[left[0]]} without VATT_COORDINATOR: give host:port of process 0 too'
            )
        return None
    if not re.search(r':\d+$', address):
        raise ConfigError(f'VATT_COORDINATOR={address}: host:port is wanted, such as node1:8476')
    own = env.get('VATT_PROCESS') or env.get('JOB_COMPLETION_INDEX', '')
    count = env.get('VATT_PROCESSES', '')
    if not (count.isdigit() and own.isdigit() and int(own) < int(count)):
        raise ConfigError(
            f'VATT_COORDINATOR={address} with VATT_PROCESSES={count!r} and VATT_PROCESS={own!r}: give the number of '
            'processes and the place of this one among them, 0 to one less'
        )
    return Place(address, int(count), int(own), _numbers(env, 'VATT_DEVICES'))


def _slurm(env: Mapping[str, str]) -> Place | None:
    """A step that srun started. Inside salloc or a batch script, without srun, there is one process whatever SLURM_NTASKS says."""
    if 'SLURM_STEP_NODELIST' not in env or 'SLURM_PROCID' not in env:
        return None
    count = int(env.get('SLURM_STEP_NUM_TASKS') or env['SLURM_NTASKS'])
    port = 61440 + int(env['SLURM_JOB_ID']) % 4096  # two jobs on a host seldom meet
    # '4', '4(x2)' or '2,1': tasks of each node
    several = any(
        int(n) > 1 for n in re.findall(r'(?:^|,)(\d+)', env.get('SLURM_STEP_TASKS_PER_NODE', '1'))
    )
    return Place(
        f'{first_host(env["SLURM_STEP_NODELIST"])}:{port}',
        count,
        int(env['SLURM_PROCID']),
        (int(env['SLURM_LOCALID']),) if several else None,
    )


def first_host(nodes: str) -> str:
    """'gpu[007-009,12],login' -> 'gpu007': the first host of a SLURM list."""
    found = re.match(r'([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?', nodes)
    if not found:
        raise ConfigError(f'SLURM_STEP_NODELIST={nodes!r} names no host')
    return ''.join(part or '' for part in found.groups())


def _open_mpi(env: Mapping[str, str]) -> Place | None:
    if 'OMPI_COMM_WORLD_SIZE' not in env:
        return None
    count, own, here = (
        int(env[f'OMPI_COMM_WORLD_{name}']) for name in ('SIZE', 'RANK', 'LOCAL_SIZE')
    )
    devices = (int(env['OMPI_COMM_WORLD_LOCAL_RANK']),) if here > 1 else None
    if count == 1:
        return Place('', 1, own)
    # Version 4 tells where mpirun runs, which is where rank 0 is unless it was placed elsewhere; version 5 does not.
    found = re.search(
        r'^(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://(\[[^,\]]+))', env.get('OMPI_MCA_orte_hnp_uri', '')
    )
    if here == count:
        number = int(found[1]) // 4096 if found else os.getppid()
        return Place(f'127.0.0.1:{61440 + number % 4096}', count, own, devices)
    if not found:
        raise ConfigError(
            'Open MPI does not say where process 0 is; name it: mpirun -x VATT_COORDINATOR=host:8476 -x VATT_PROCESSES='
            f"{count} … sh -c 'VATT_PROCESS=$OMPI_COMM_WORLD_RANK python run.py …'"
        )
    return Place(
        f'{found[2] or found[3] + "]"}:{61440 + int(found[1]) // 4096 % 4096}', count, own, devices
    )


def _cloud_tpu(env: Mapping[str, str]) -> Place | None:
    """GKE's variables of a TPU pod slice, and of several slices (MEGASCALE_…)."""
    hosts = [h for h in env.get('TPU_WORKER_HOSTNAMES', '').split(',') if h]
    slices = int(env.get('MEGASCALE_NUM_SLICES') or 1)
    if not hosts or 'TPU_WORKER_ID' not in env or len(hosts) * slices == 1:
        return None
    first = (env.get('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]).split(':')[0]
    own = int(env.get('MEGASCALE_SLICE_ID') or 0) * len(hosts) + int(env['TPU_WORKER_ID'])
    return Place(f'{first}:{TPU_PORT}', len(hosts) * slices, own)


def _numbers(env: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    text = env.get(name, '')
    if not text:
        return None
    if not re.fullmatch(r'\d+(,\d+)*', text):
        raise ConfigError(
            f'{name}={text}: numbers of local accelerators are wanted, such as 0 or 0,1'
        )
    return tuple(int(n) for n in text.split(','))


def initialize(environment: Mapping[str, str] = os.environ, timeout: int = PATIENCE) -> None:
    """Joins the other processes, if the environment says there are any. VATT_COORDINATOR=auto leaves the search to JAX (Cloud TPU VMs without
    GKE, whose hosts are known to their metadata server only)."""
    if environment.get('VATT_COORDINATOR') == 'auto':
        jax.distributed.initialize(initialization_timeout=timeout)
    else:
        own = place(environment)
        if own is None:
            return
        try:
            jax.distributed.initialize(
                own.address,
                own.processes,
                own.process,
                local_device_ids=own.devices,
                cluster_detection_method='deactivate',
                initialization_timeout=timeout,
            )
        except RuntimeError as error:
            raise ConfigError(
                f'process {own.process} on {socket.gethostname()} did not find the other {own.processes - 1} by way of '
                f'{own.address} within {timeout} s ({str(error).splitlines()[0]}); look whether all of them started and reach '
                'that address'
            ) from error
    _client().key_value_set(f'vatt/host/{jax.process_index()}', socket.gethostname())


def _client():
    from jax._src import (
        distributed,
    )  # there is no public way to its store and barriers, which need no device

    return distributed.global_state.client


class Absent(RuntimeError):
    """Processes that did not come to a barrier in time. The message names them and their hosts."""


def barrier(name: str, timeout: float = PATIENCE) -> None:
    """Waits until every process is here. Raises Absent, which names those that did not come within `timeout` seconds."""
    count = jax.process_count()
    if count == 1:
        return
    client, began = _client(), time.monotonic()
    client.key_value_set(f'vatt/barrier/{name}/{jax.process_index()}', 'here', allow_overwrite=True)
    try:
        client.wait_at_barrier(f'vatt/{name}', int(timeout * 1000))
    except Exception as error:  # of a type that differs with the version
        keys = lambda folder: {
            key.rsplit('/', 1)[1]: value for key, value in client.key_value_dir_get(folder)
        }
        try:
            came, hosts = keys(f'vatt/barrier/{name}/'), keys('vatt/host/')
        except Exception:  # the coordinator itself is gone
            raise Absent(
                f'the coordinating process cannot be reached at {name!r}: {str(error).splitlines()[0]}'
            ) from error
        missing = [str(i) for i in range(count) if str(i) not in came]
        told = (
            ', '.join(f'process {i} on {hosts.get(i, "an unknown host")}' for i in missing)
            or f'none is missing: {error}'
        )
        raise Absent(
            f'{len(missing)} of {count} processes did not come to {name!r} within {time.monotonic() - began:.0f} s: {told}'
        ) from error


def leave() -> None:
    """The last thing that processes do together. One that simply ended would close connections on which another still reads the last collective,
    and the end of the coordinating one would abort the others."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def look_for_absent(error: BaseException, timeout: float = 20) -> None:
    """To be called with what a failed collective raised. Raises Absent when not every process comes here within `timeout` seconds: where one of
    them was killed, the others fail in the step under way."""
    try:
        barrier('the end of a failed step', timeout)
    except Absent as absent:
        raise Absent(
            f'{absent}. The step under way failed ({str(error).splitlines()[0][:200]}). The same command, started again on all hosts, '
            'continues from the last checkpoint'
        ) from error


def is_main() -> bool:
    """True on the one process that writes logs."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """The main process's value on every process. What is read from the run folder is read once: another process would see the files
    of a moment later, go another way and leave the others waiting in a collective."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Stop:
    """SIGTERM (preemption, a scheduler's time limit) asks the loop to save and leave after the step under way. A context: outside
    of it the signal does what it did before."""

    def __enter__(self) -> Stop:
        self._asked = False
        if jax.process_count() == 1:  # with several, jax.distributed has installed its own handler
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether this process was asked; others may not know yet."""
        return self._asked

    def now(self, step: int) -> bool:
        """The same answer on every process at the same step."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
