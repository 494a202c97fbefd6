"""The memory of one device in a plan: what the step takes, whether it fits, what to try if not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from vatt_jax.performance import chips
from vatt_jax.planning.compilation import Compiled
from vatt_jax.training import checkpoint, loop


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
        # shard_shape is one device's; what is replicated counts whole on each.
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
    # All numbers are bytes of one JAX device, which on some TPUs is half a chip.
    limit = topology.of_device(topology.chip.memory)
    state = shares(built.shape, built.shardings)
    batch_leaves = jax.tree.leaves(built.batch)
    batch_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch_leaves)
    replica, fsdp = built.mesh.axis_sizes[:2]  # the axes that rows are sharded over
    # Along the model and seq axes devices hold copies of the same rows.
    batch = batch_bytes / (replica * fsdp)
    # What objectives remember (memory banks, queues), which is part of the state.
    objective = shares(built.shape.objective, built.shardings.objective)
    memory: dict[str, Any] = {
        'limit': limit,
        'state': state,
        'objective': objective,
        'batch': batch,
        # Not of a device: what each host keeps of all records, on its disk where memory is short.
        'host_tables': checkpoint.size_of(built.tables),
        'moves_to_host': built.objective.moves_to_host(),
    }

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
            # The compiler gave up: all that is known of it is in its message.
            'arguments': state + batch,
            'temporaries': None,
            'peak': compiled.needed,
            # The compiler's limit is below the data sheet's, as the runtime reserves some memory.
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
        memory: 'limit', 'state' and 'peak' in bytes on one device; peak may be None. Of objectives
            that remember also 'objective', bytes of it, and 'moves_to_host'
            (`Objective.moves_to_host`).

    Returns:
        Config changes in sentences.
    """
    limit, state, peak = memory['limit'], memory['state'], memory['peak']
    mesh = result['mesh']
    data_parallel = mesh['replica'] * mesh['fsdp']
    # As if all of the state could be sharded, which holds but for small arrays.
    sharded_state = state * mesh['fsdp'] / data_parallel
    advice = []

    # Sharding helps where it is the state that fills the memory, rather than the activations.
    if peak:
        # A tenth of the peak, or less where less is missing.
        worthwhile = min(0.1 * peak, peak - limit)
    else:
        # Nothing is known of the activations; the state has to be a good part of the memory.
        worthwhile = 0.2 * limit
    if state - sharded_state >= worthwhile:
        advice.append(
            f'config.mesh.fsdp={data_parallel}: parameters and optimizer over all data-parallel '
            f'devices, about {sharded_state / 1e9:.1f} GB each instead of {state / 1e9:.1f}'
        )
    remembered = memory.get('objective', 0.0)
    if memory.get('moves_to_host') and remembered >= worthwhile:
        advice.append(
            f'{memory["moves_to_host"]}: memories of the objective on every host, '
            f'{remembered / 1e9:.1f} GB less on each device'
        )
    # Only transformer encoders have layers that remat knows of.
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
    # peak(rows) ≈ state + rows · (peak - state) / microbatch, solved for the limit, with a margin
    # of a tenth.
    fraction = 0.9 * (limit - state) / max(peak - state, 1.0)
    microbatch = result['per_device_batch'] / result['accumulate']
    rows = int(microbatch * fraction)  # clips of one device at a time
    if not 0 < rows < microbatch:
        return []
    # A power of two, as batch sizes mostly are: it has to divide the batch.
    num_microbatches = 2 ** math.ceil(math.log2(result['per_device_batch'] / rows))
    return [
        f'about {rows} clips a device at a time: config.batch_size={rows * data_parallel}, or '
        f'config.accumulate={num_microbatches} where the loss may see one microbatch at a time'
    ]
