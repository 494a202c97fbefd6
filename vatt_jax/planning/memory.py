"""The memory of one device in a plan: what the step takes, whether it fits, what to try if not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from vatt_jax.performance import chips
from vatt_jax.planning.compilation import Compiled
from vatt_jax.training import loop


def shares(shape: Any, shardings: Any) -> float:
    """Return the bytes of a sharded tree on one device.

    Args:
        shape: tree of arrays or ShapeDtypeStructs.
        shardings: tree of the same structure.
    """
    leaves = jax.tree.leaves(shape)
    leaf_shardings = jax.tree.leaves(
        shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding)
    )
    total = 0.0
    for leaf, leaf_sharding in zip(leaves, leaf_shardings, strict=True):
        total += math.prod(leaf_sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def add_memory(
    result: dict[str, Any], topology: chips.Topology, built: loop.Built, compiled: Compiled | None
) -> None:
    """Add 'memory' and 'compiled' to a plan.

    Args:
        result: the plan so far; 'mesh', 'model' and the batch sizes are read.
        topology: the machine that is planned for.
        built: what the config builds, shapes only.
        compiled: what the compiler made of the step, None where there is no compiler.
    """
    limit = topology.of_device(topology.chip.memory)
    state = shares(built.shape, built.shardings)
    batch_leaves = jax.tree.leaves(built.batch)
    batch_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch_leaves)
    replica, fsdp = built.mesh.axis_sizes[:2]  # the axes that rows are sharded over
    batch = batch_bytes / (replica * fsdp)
    memory: dict[str, Any] = {'limit': limit, 'state': state, 'batch': batch}

    if compiled is None:
        # Without temporaries it can be known not to fit, but not to fit.
        is_too_much = limit is not None and state + batch > limit
        memory |= {
            'arguments': state + batch,
            'temporaries': None,
            'peak': None,
            'fits': False if is_too_much else None,
        }
    elif compiled.memory is None:
        memory |= {
            'arguments': state + batch,
            'temporaries': None,
            'peak': compiled.needed,
            'limit': compiled.limit or limit,
            'fits': False,
        }
    else:
        memory |= {k: compiled.memory[k] for k in ('arguments', 'temporaries', 'peak', 'live')}
        if limit is None:
            memory['fits'] = None
        else:
            # The compiler for TPUs refuses what does not fit.
            is_tpu = topology.chip.platform == 'tpu'
            compiler_agrees = is_tpu and compiled.memory['live'] is not None
            memory['fits'] = compiler_agrees or memory['peak'] <= limit
    if memory['fits'] is False:
        memory['would_fit'] = would_fit(result, memory)
    result['memory'] = memory
    result['compiled'] = None if compiled is None else {'seconds': round(compiled.seconds, 1)}


def would_fit(result: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    """List what to try when a step does not fit.

    These are estimates from what the compiler said, to be planned in their turn.

    Args:
        result: the plan; 'mesh', 'model', 'per_device_batch' and 'accumulate' are read.
        memory: 'limit', 'state' and 'peak' in bytes on one device; peak may be None.

    Returns:
        Config changes in sentences.
    """
    limit, state, peak = memory['limit'], memory['state'], memory['peak']
    mesh = result['mesh']
    data_parallel = mesh['replica'] * mesh['fsdp']
    sharded_state = state * mesh['fsdp'] / data_parallel
    advice = []

    # Sharding helps where it is the state that fills the memory, rather than the activations.
    if peak:
        worthwhile = min(0.1 * peak, peak - limit)
    else:
        worthwhile = 0.2 * limit
    if state - sharded_state >= worthwhile:
        advice.append(
            f'config.mesh.fsdp={data_parallel}: parameters and optimizer over all data-parallel '
            f'devices, about {sharded_state / 1e9:.1f} GB each instead of {state / 1e9:.1f}'
        )
    if result['model']['remat'] != 'full' and result['model']['layers']:
        advice.append("config.model.remat='full': the backward pass recomputes each layer")

    if state >= limit:
        advice.append(
            f'parameters and optimizer alone are {state / 1e9:.1f} GB of {limit / 1e9:.1f}: a '
            'batch of any size is too much without a wider fsdp or model axis'
        )
    elif peak:
        advice += _smaller_batch(result, memory, data_parallel)
    else:
        advice.append(
            'fewer clips a device at a time: a smaller config.batch_size, or config.accumulate '
            'where the loss may see one microbatch at a time'
        )
    return advice


def _smaller_batch(
    result: Mapping[str, Any], memory: Mapping[str, Any], data_parallel: int
) -> list[str]:
    """The batch that would fit: what is not the state grows with the rows of a microbatch."""
    limit, state, peak = memory['limit'], memory['state'], memory['peak']
    fraction = 0.9 * (limit - state) / max(peak - state, 1.0)
    microbatch = result['per_device_batch'] / result['accumulate']
    rows = int(microbatch * fraction)
    if not 0 < rows < microbatch:
        return []
    num_microbatches = 2 ** math.ceil(math.log2(result['per_device_batch'] / rows))
    return [
        f'about {rows} clips a device at a time: config.batch_size={rows * data_parallel}, or '
        f'config.accumulate={num_microbatches} where the loss may see one microbatch at a time'
    ]
