"""The roofline of a plan: how long a step takes at the least, by each resource of the machine."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from vatt_jax import optim
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.objectives.base import stream_names
from vatt_jax.performance import chips, hlo
from vatt_jax.planning.compilation import Compiled
from vatt_jax.training import loop


def add_roofline(
    result: dict[str, Any],
    topology: chips.Topology,
    config: ConfigDict,
    built: loop.Built,
    mesh: Any,
    compiled: Compiled | None,
) -> None:
    """Add 'collectives', 'roofline', 'host' and 'run' to a plan.

    Args:
        result: the plan so far; 'flops' and 'batch' are read.
        topology: the machine that is planned for.
        config: the whole config.
        built: what the config builds, shapes only.
        mesh: Mesh, or AbstractMesh where there are no devices to compile for.
        compiled: what the compiler made of the step, None where there is no compiler.
    """
    report = compiled.report if compiled else None
    if report:
        collectives = report.collectives
    elif compiled is None:
        # No program to read: what the shardings alone make necessary.
        collectives = least_collectives(built, mesh, config)
    else:  # it did not fit
        collectives = []
    result['collectives'] = hlo.summary(collectives)
    result['notes'] += _roofline_notes(report, topology, mesh)

    traffic = report.traffic if report else None  # bytes of one device's HBM
    moved = by_way(collectives, islands(mesh, topology))
    # Without a compiler nothing says that it does not fit.
    did_fit = compiled is None or compiled.memory is not None
    result['roofline'] = _roofline(result, topology, mesh.size, traffic, moved, did_fit)
    _add_host_and_run(result, topology, config, built)


def _roofline_notes(report: hlo.Report | None, topology: chips.Topology, mesh: Any) -> list[str]:
    notes = []
    if report and report.unknown:
        notes.append(
            f'{len(report.unknown)} loops whose number of turns is not in the program were counted '
            'once'
        )
    if mesh.size < topology.devices:
        notes.append(
            f'the mesh leaves {topology.devices - mesh.size} of {topology.devices} devices idle; '
            'config.mesh.replica=-1 takes all'
        )
    return notes


def _roofline(
    result: dict[str, Any],
    topology: chips.Topology,
    num_devices: int,
    traffic: float | None,
    moved: dict[str, float],
    did_fit: bool,
) -> dict[str, Any]:
    """Seconds of one step by compute, memory, links and network.

    With times t_i: a step takes at least max_i t_i, where all four overlap perfectly, and no longer
    than sum_i t_i, where nothing overlaps and everything else is free.
    """
    chip = topology.chip
    # Rates and amounts are per JAX device from here on, but for 'peak', which stays the chip's.
    network = None if chip.network is None else chip.network / chip.devices
    # FLOPs of all devices, recomputation included where a program was traced.
    executed = result['flops'].get('executed_step') or result['flops']['model_step']
    seconds = {
        'compute': _time(executed / num_devices, topology.of_device(chip.peak)),
        'memory': _time(traffic, topology.of_device(chip.bandwidth)),
        'links': _time(moved['links'], topology.link_rate),
        'network': _time(moved['network'], network),
    }
    roofline: dict[str, Any] = {
        'seconds': seconds,
        'bytes': {'memory': traffic, **moved},
        'rates': {
            'peak': chip.peak,
            'memory': chip.bandwidth,
            'links': topology.link_rate,
            'network': network,
        },
    }
    known = {resource: time for resource, time in seconds.items() if time is not None}
    if not known or not did_fit:
        return roofline
    if traffic is None:
        # Memory bounds most steps, several times over what the other resources would allow.
        result['notes'].append(
            'the memory traffic of a step is unknown without its compiler: no bound, MFU or hours '
            'are given, as they would be several times too good'
        )
        return roofline

    bound, serial = max(known.values()), sum(known.values())
    assert chip.peak is not None, 'a chip with any known rate has a known peak'
    # MFU counts the FLOPs that the model needs, not those that rematerialisation repeats.
    # Over all chips of the machine, those included that the mesh leaves idle.
    ideal = result['flops']['model_step'] / (topology.chips * chip.peak)
    return roofline | {
        'bound': bound,
        'serial': serial,
        'limited_by': max(known, key=lambda resource: known[resource]),
        'mfu': ideal / bound,
        'mfu_serial': ideal / serial,
        'clips_per_s': result['batch'] / bound,
        'clips_per_s_per_chip': result['batch'] / bound / topology.chips,
    }


def _time(amount: float | None, rate: float | None) -> float | None:
    """Seconds, None where the amount or the rate is unknown."""
    if amount is None or not rate:
        return None
    return amount / rate


def _add_host_and_run(
    result: dict[str, Any], topology: chips.Topology, config: ConfigDict, built: loop.Built
) -> None:
    """What each host must feed to its devices, and how long the run takes, both at the bound."""
    leaves = jax.tree.leaves(built.batch)
    # As they cross to the device, decoded; the files they come from are smaller.
    clip_bytes = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in leaves)
    picture_streams = []
    for name in stream_names(built.batch):
        if kind_of(modality_of(name)) == PICTURES:
            picture_streams.append(name)
    # Every view of a clip is decoded, so 'video.second' counts as well.  [B T H W C]
    clip_frames = sum(built.batch[name]['data'].shape[1] for name in picture_streams)
    host: dict[str, Any] = {'bytes_per_clip': clip_bytes, 'frames_per_clip': clip_frames}
    roofline = result['roofline']
    if 'bound' in roofline:
        # At the bound the devices are fastest: a host that feeds them then is never the limit.
        clip_rate = roofline['clips_per_s'] / topology.hosts
        host |= {
            'clips_per_s': clip_rate,
            'frames_per_s': clip_rate * clip_frames,
            'bytes_per_s': clip_rate * clip_bytes,
        }
        hours = config.steps * roofline['bound'] / 3600
        result['run'] = {'hours': hours, 'chip_hours': hours * topology.chips}
    result['host'] = host


# ---- collectives
def islands(mesh: Any, topology: chips.Topology) -> Int[np.ndarray, ' devices']:
    """Return which slice (or GPU host) each device of the mesh, in its order, belongs to."""
    if not isinstance(mesh, jax.sharding.Mesh):
        # An abstract mesh has no devices; they would be numbered island by island.
        return np.arange(topology.devices) // topology.island
    devices = mesh.devices.flat
    if topology.chip.platform == 'cuda':
        # In the topology that was asked for a process is a host.
        return np.array([device.process_index for device in devices])
    # Devices of a machine of one slice have no such attribute, or None.
    return np.array([getattr(device, 'slice_index', 0) or 0 for device in devices])


def by_way(
    collectives: list[hlo.Collective], island: Int[np.ndarray, ' devices']
) -> dict[str, float]:
    """Split what collectives move by the wires it goes over.

    At best, a collective runs within islands first and crosses between them once. A group of
    n devices in p islands, i = n / p in each, that handles b bytes (an all-reduce twice: scattered
    and gathered) makes each device take in b (i - 1) / i over links and b (p - 1) / (p i) over the
    network.

    Args:
        collectives: of one step.
        island: of each device, see `islands`.

    Returns:
        {'links', 'network'}: bytes that a device takes in over each in one step.
    """
    received = {'links': 0.0, 'network': 0.0}
    for collective in collectives:
        # Groups are alike as a rule, so the first one stands for all.
        if collective.members:
            members = island[list(collective.members)]
        else:
            # A group without numbers: as if it stayed on one island.
            members = np.zeros(collective.group, int)
        num_islands = len(np.unique(members))
        inside = collective.group // num_islands  # i: devices of the group on one island
        if collective.kind in ('collective-permute', 'collective-broadcast'):
            # A permute is point to point: nothing can be shared inside an island first. Pairs that
            # cross are the slowest, and the others wait for them.
            way = 'network' if num_islands > 1 else 'links'
            received[way] += collective.times * collective.received
            continue
        # An all-reduce is a reduce-scatter and an all-gather.
        passes = 2.0 if collective.kind == 'all-reduce' else 1.0
        amount = collective.times * passes * collective.bytes
        received['links'] += amount * (inside - 1) / max(inside, 1)
        received['network'] += amount * (num_islands - 1) / num_islands / max(inside, 1)
    return received


def least_collectives(built: loop.Built, mesh: Any, config: ConfigDict) -> list[hlo.Collective]:
    """List what the sharding asks for at the least, in the compute type.

    Gradients of replicated parameters are summed over the data axes. Sharded parameters are
    gathered for the forward and for the backward pass, and their gradients scattered and summed
    over the replicas. The loss moves little beside them and is left out.
    """
    # Bytes of an element; gradients are summed in the type they were computed in.
    itemsize = 2 if config.compute_dtype == 'bfloat16' else 4
    axis_sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    device_ids = np.arange(math.prod(mesh.axis_sizes)).reshape(mesh.axis_sizes)
    # The first group of each kind, by the numbers of its devices. [replica fsdp model seq]
    data_group = device_ids[:, :, 0, 0].reshape(-1)
    fsdp_group = device_ids[0, :, 0, 0]
    replica_group = device_ids[:, 0, 0, 0]

    replicated_bytes = sharded_bytes = 0.0
    sizes = named_sizes(built.shape.params)
    shardings = jax.tree.leaves(built.shardings.params)
    for (name, size), sharding in zip(sizes.items(), shardings, strict=True):
        if any(re.search(pattern, name) for pattern in config.optimizer.frozen):
            continue
        # As text, because an entry of a spec may be a tuple of axes.
        if 'fsdp' in str(sharding.spec) and axis_sizes['fsdp'] > 1:
            sharded_bytes += size * itemsize
        else:
            replicated_bytes += size * itemsize

    collectives = []
    if replicated_bytes:
        collectives.append(_collective('all-reduce', replicated_bytes, data_group))
    if sharded_bytes:
        collectives += [
            # Gathered for the forward pass, freed, and gathered again for the backward pass.
            _collective('all-gather', sharded_bytes, fsdp_group, times=2.0),
            _collective('reduce-scatter', sharded_bytes, fsdp_group),
        ]
        if axis_sizes['replica'] > 1:
            # Scattered first, so that only a shard is summed over the replicas (HSDP).
            shard_bytes = sharded_bytes / axis_sizes['fsdp']
            collectives.append(_collective('all-reduce', shard_bytes, replica_group))
    return [collective for collective in collectives if collective.group > 1]


def _collective(
    kind: str, num_bytes: float, group: Int[np.ndarray, ' devices'], times: float = 1.0
) -> hlo.Collective:
    return hlo.Collective(kind, num_bytes, len(group), times, tuple(group.tolist()))


def named_sizes(params: Any) -> dict[str, int]:
    """Return {path of a parameter: number of its elements}."""
    names = jax.tree.leaves(optim.paths(params))
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
    return dict(zip(names, sizes))
