"""What share of its chips' appetite for clips a host feeds: told before a run and with a plan."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Of their data sheets' FLOP/s, what chips may be expected to reach in training.
UTILIZATION = 0.5
# CPU time until a process of config.data.workers has imported what it needs.
SECONDS_TO_START = 14


@dataclasses.dataclass(frozen=True)
class Reader:
    """The reader of one host.

    Attributes:
        clips_per_core_second: read and decoded by one core.
        lanes: cores that config.data keeps busy.
        cores: of the host.
    """

    clips_per_core_second: float
    lanes: int
    cores: int

    @property
    def clips_per_second(self) -> float:
        """Of the cores that are kept busy, if they do nothing else."""
        return self.lanes * self.clips_per_core_second


def measure(config: ConfigDict, data: Any) -> Reader | None:
    """Measure the reader of this host, for a second or two.

    Args:
        config: of the run.
        data: the data object of docs/architecture.md.

    Returns:
        None where nothing is decoded.
    """
    rate = data.clips_per_core_second(config.batch_size)
    if rate is None:
        return None
    cores = usable_cores()
    decoders = config.data.threads * max(1, config.data.workers)
    return Reader(rate, min(cores, decoders), cores)


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def of_run(reader: Reader, appetite: float | None, hosts: int) -> str:
    """Return the line before a run: what the reader makes, beside what its chips take.

    Args:
        reader: of each host.
        appetite: clips/s of all hosts' chips together; None: unknown.
        hosts: of the run.
    """
    line = _speed(reader, 'this host')
    if appetite is None:
        return line
    return f'{line}; the chips of {_count(hosts, "host")} take {appetite:.0f} clips/s at ' + (
        f'{100 * UTILIZATION:.0f} % of their peak: {_verdict(reader, appetite, hosts)}'
    )


def of_plan(reader: Reader, plan: Mapping[str, Any]) -> str | None:
    """Return the same line of a plan, for hosts with the cores of this machine.

    Args:
        reader: of this machine.
        plan: what `plan.plan` returned.

    Returns:
        None where the plan knows no rate of its chips.
    """
    appetite = plan['roofline'].get('clips_per_s')
    if appetite is None:
        return None
    return (
        f'{_speed(reader, "this machine")}; the chips of {_count(plan["hosts"], "host")} take '
        f'{appetite:.0f} clips/s at the bound: {_verdict(reader, appetite, plan["hosts"])}'
    )


def _speed(reader: Reader, where: str) -> str:
    rate = reader.clips_per_core_second
    return (
        f'one core of {where} reads {rate:.3g} clips/s, the {reader.lanes} of {reader.cores} that '
        f'config.data keeps busy {reader.clips_per_second:.3g} clips/s'
    )


def _verdict(reader: Reader, appetite: float, hosts: int) -> str:
    """Return what share is fed, and what would feed all of it."""
    share = hosts * reader.clips_per_second / appetite
    if share >= 1:
        return f'{share:.3g} times that is read'
    cores_of_host = math.ceil(appetite / hosts / reader.clips_per_core_second)
    all_cores = reader.cores * reader.clips_per_core_second
    hosts_needed = math.ceil(appetite / all_cores)
    remedy = f'{_count(cores_of_host, "such core")} a host would feed them'
    if hosts_needed > hosts:
        remedy += f', or {_count(hosts_needed, "host")} of {reader.cores}'
    else:
        remedy += ' (config.data.threads, config.data.workers)'
    return f'{100 * share:.2g} % of that is read; {remedy}'


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'
