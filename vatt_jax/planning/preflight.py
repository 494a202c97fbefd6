"""What a run will take, said before its first step; what clearly cannot fit is refused.

The same questions as a plan's (planning/plan.py), asked of the machine that is there.
"""

from __future__ import annotations

import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, flops
from vatt_jax.planning import reading
from vatt_jax.planning.compilation import out_of_memory
from vatt_jax.planning.memory import shares, would_fit
from vatt_jax.run_folder import RunFolder, free_space, readable_size
from vatt_jax.training import checkpoint, loop

# Beyond the device's memory by this factor a step is refused: what the compiler reserves is an
# upper bound, and the runtime may do with a little less.
CLEARLY = 1.05


def before_training(
    config: ConfigDict,
    built: loop.Built,
    data: Any,
    workdir: pathlib.Path,
    say: Callable[[str], object],
) -> None:
    """Say what a run takes: parameters, FLOPs, batches, reading, memory, room for checkpoints.

    Args:
        config: Of the run.
        built: Of that config.
        data: The data object of docs/architecture.md.
        workdir: The run folder; nothing is written to it.
        say: Takes a line.

    Raises:
        ConfigError: The step needs clearly more memory than a device has, or the disk has clearly
            too little room for one checkpoint.
    """
    say(f'parameters: {parameters(config, built)}')
    say(f'one step: {work(config, built)}')
    say(f'one epoch: {epochs(config, data)}')
    reading_line = feeding(config, built, data)
    if reading_line:
        say(f'reading: {reading_line}')
    say(f'memory: {memory(config, built, say)}')
    if built.tables:
        say(f'tables of the host: {host_tables(built.tables)}')
    say(f'checkpoints: {room(config, built, workdir)}')


def parameters(config: ConfigDict, built: loop.Built) -> str:
    """Return the number of parameters of each tower, and of the rest."""
    towers = dict.fromkeys(config.model.towers, 0)
    shared = 0
    for module, tree in built.shape.variables()['params'].items():
        owners = [name for name in towers if module == name or module.endswith(f'_{name}')]
        if owners:
            towers[owners[0]] += _count(tree)
        else:
            shared += _count(tree)
    parts = [f'{name} {_millions(size)}' for name, size in towers.items()]
    parts.append(f'shared and heads {_millions(shared)}')
    objective = _count(built.shape.params['objective'])
    if objective:
        parts.append(f'objective {_millions(objective)}')
    return ', '.join(parts)


def work(config: ConfigDict, built: loop.Built) -> str:
    """Return the FLOPs of a step, as the model needs them."""
    total = _flops_per_clip(config, built) * config.batch_size
    return f'{total / 1e12:.3g} TFLOP for {config.batch_size} clips'


def _flops_per_clip(config: ConfigDict, built: loop.Built) -> float:
    return flops.per_clip(config, built.inputs, built.objective, built.shape)


def epochs(config: ConfigDict, data: Any) -> str:
    """Return the batches of an epoch, and how many epochs the run is."""
    size, clips = data.size('train'), config.data.clips_per_epoch
    batches = size * clips / config.batch_size
    records = f'{size} records' if clips == 1 else f'{clips} clips of each of {size} records'
    return f'{batches:.1f} batches of {records}; {config.steps} steps are ' + (
        f'{config.steps / batches:.1f} epochs' if batches else 'no epoch'
    )


def feeding(config: ConfigDict, built: loop.Built, data: Any) -> str:
    """Return how many clips this host reads, and what share of the chips that feeds.

    Returns:
        '' where the data are made, not read.
    """
    reader = reading.measure(config, data)
    if reader is None:
        return ''
    peak = chips.peak_of(jax.devices())
    appetite = None
    if peak is not None:
        appetite = reading.UTILIZATION * peak / _flops_per_clip(config, built)
    line = reading.of_run(reader, appetite, jax.process_count())
    if config.data.workers:
        line += (
            f'; {config.data.workers} processes start with the first batch, which takes each some '
            f'{reading.SECONDS_TO_START} s of a core'
        )
    return line


def memory(config: ConfigDict, built: loop.Built, say: Callable[[str], object]) -> str:
    """Return what a step takes on one device beside what the device has.

    Raises:
        ConfigError: It is clearly more.
    """
    state, batch = _arguments(built)
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get('bytes_limit')
    if limit is None:
        return _host_memory(state + batch)
    temporaries = _temporaries(config, built, limit, say)
    needed = state + batch + (temporaries or 0)
    if needed > CLEARLY * limit:
        raise _too_large(config, built, needed if temporaries else None, limit)
    parts = f'parameters and optimizer {readable_size(state)}, batch {readable_size(batch)}'
    if temporaries is not None:
        parts += f', temporaries {readable_size(temporaries)}'
    return f'{readable_size(needed)} of {readable_size(limit)} a device ({parts})'


def _arguments(built: loop.Built) -> tuple[float, float]:
    """Return the bytes of state and batch on one device."""
    replica, fsdp = built.mesh.axis_sizes[:2]  # the axes that rows are sharded over
    return (
        shares(built.shape, built.shardings),
        checkpoint.size_of(built.batch) / (replica * fsdp),
    )


def _host_memory(needed: float) -> str:
    """The same where devices share the memory of this host (a CPU)."""
    devices = jax.local_device_count()
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if needed * devices > CLEARLY * total:
        raise ConfigError(
            f'the state and one batch alone take {readable_size(needed * devices)} for {devices} '
            f'device(s), and this host has {readable_size(total)}; lower config.batch_size or '
            'choose a smaller model'
        )
    return (
        f'{readable_size(needed)} a device for parameters, optimizer and batch, beside the '
        f'activations; this host has {readable_size(total)}'
    )


def _temporaries(
    config: ConfigDict, built: loop.Built, limit: float, say: Callable[[str], object]
) -> float | None:
    """Return the bytes that the compiled step takes beside its arguments; None: not known.

    Raises:
        ConfigError: The compiler itself finds that it does not fit.
    """
    # The program is compiled again for the first step; without a cache of compiled ones that would
    # take as long once more.
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return None
    say('compiling the training step, which takes minutes for large models …')
    try:
        with jax.set_mesh(built.mesh):
            analysis = built.step.lower(built.shape, built.batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        raise _too_large(config, built, found[0], found[1] or limit) from error
    if analysis is None:
        return None
    # The step donates its state: outputs that alias arguments take no memory of their own.
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return float(analysis.temp_size_in_bytes + outputs)


def _too_large(
    config: ConfigDict, built: loop.Built, needed: float | None, limit: float
) -> ConfigError:
    """Return the error with the advice of a plan."""
    state, batch = _arguments(built)
    replica, fsdp = built.mesh.axis_sizes[:2]
    layout = {
        'mesh': dict(zip(sharding.MESH_AXES, built.mesh.axis_sizes)),
        'model': {
            'remat': config.model.remat,
            'layers': any(name.startswith('encoder') for name in built.shape.variables()['params']),
        },
        'per_device_batch': config.batch_size / (replica * fsdp),
        'accumulate': config.accumulate,
    }
    memory = {
        'limit': limit,
        'state': state,
        'peak': needed,
        'objective': shares(built.shape.objective, built.shardings.objective),
        'moves_to_host': built.objective.moves_to_host(),
    }
    advice = would_fit(layout, memory)
    return ConfigError(
        f'a training step takes {readable_size(needed or state + batch)} on each device, which '
        f'has {readable_size(limit)}; what would fit: {"; or ".join(advice)} (estimates; see '
        '--mode=plan)'
    )


def host_tables(tables: Mapping[str, Any]) -> str:
    """Return what this host keeps of all records beside what there is for it.

    Args:
        tables: Of `Built`.

    Raises:
        ConfigError: Neither its memory nor its folder of temporary files has room for it.
    """
    size = checkpoint.size_of(tables)
    folder = pathlib.Path(tempfile.gettempdir())
    free = free_space(folder)
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if size > total and free is not None and size > free:
        raise ConfigError(
            f'tables of the host take {readable_size(size)} of each process; expected room in '
            f'{folder}, which has {readable_size(free)}, or in memory, which is '
            f'{readable_size(total)}. Set TMPDIR to a folder of a larger disk'
        )
    return f'{readable_size(size)}, in memory where it fits and mapped from {folder}'


def room(config: ConfigDict, built: loop.Built, workdir: pathlib.Path) -> str:
    """Return what checkpoints take on disk beside what is free.

    Raises:
        ConfigError: One alone is clearly more than is free.
    """
    size = checkpoint.size_of((built.shape, built.tables))
    # The oldest goes once the newest is complete.
    at_a_time = config.checkpoint.keep + 1
    free = free_space(RunFolder(workdir).checkpoints)
    line = f'{readable_size(size)} each, up to {at_a_time} at a time'
    if free is None:
        return line
    if free < 0.5 * size:
        raise ConfigError(
            f'--workdir={workdir}: a checkpoint takes up to {readable_size(size)}, and '
            f'{readable_size(free)} are free there; make room or choose another --workdir'
        )
    line += f'; {readable_size(free)} are free'
    if free < at_a_time * size:
        line += ', which may not do: make room, or lower config.checkpoint.keep'
    return line


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _millions(count: int) -> str:
    return f'{count / 1e6:.2f} M'
