"""Plan a run before its machine is there: compile the real training step for it, and read it.

    python run.py --mode=plan --config=configs/vatt.py:mbs --workdir=runs/plan --topology=v5p:4x4x4

What is exact: parameters, FLOPs (flops.py), what the compiler reserves on each device, the
collectives and the memory traffic of its program (hlo.py). What is a bound: the roofline, each of
compute, memory, links and network at its data sheet's rate (chips.py); a step takes at least the
longest of them, and no longer than their sum where everything else is free. Where no compiler is
to be had (GPUs without JAX's plugin for them), the parts that need one are left out and the plan
says so. docs/scaling.md
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, flops
from vatt_jax.planning.compilation import (
    CODE,
    PLUGINS,
    Compiled,
    abstract_mesh,
    compile_step,
    devices_of,
    out_of_memory,
    suit,
)
from vatt_jax.planning.memory import add_memory, would_fit
from vatt_jax.planning.roofline import add_roofline, by_way, named_sizes
from vatt_jax.planning.search import search
from vatt_jax.planning.table import table
from vatt_jax.training import loop

__all__ = [
    'QUICK',
    'Compiled',
    'by_way',
    'compile_step',
    'describe',
    'devices_of',
    'digest',
    'out_of_memory',
    'plan',
    'search',
    'suit',
    'table',
    'two_rows',
    'would_fit',
]

# Fields of the config that change nothing of a plan.
# They are left out of the digest, so that a stored plan is found again after such a change.
# `steps` is not among them: hours of the run are part of a plan.
IRRELEVANT_FIELDS = (
    'name',
    'report',
    'init_from',
    'init_trees',
    'init_words',
    'init_rename',
    'init_skip',
    'checkpoint',
    'max_bad_steps',
    'evals',
    'evaluated',
    'eval_every',
    'log_every',
    'trackers',
    'jax_platform',
    'profile',
    'compilation_cache',
)
QUICK = 'no code was generated: memory is that of the buffer assignment'


def plan(
    config: ConfigDict,
    data: Any,
    topology: chips.Topology,
    folder: pathlib.Path | None = None,
    notes: Iterable[str] = (),
    quick: bool = False,
) -> dict[str, Any]:
    """Plan a config on a machine.

    Args:
        config: a whole config; it is not changed.
        data: the data object, of which shapes, sizes and vocabulary are read.
        topology: the machine that is planned for.
        folder: where plans are stored, as JSON and as text; one of the same config, code and
            libraries is read from there. None: nowhere.
        notes: sentences to be shown with the result.
        quick: see `compile_step`.

    Returns:
        The plan as a JSON-able dict.

    Raises:
        ConfigError: config and topology do not fit each other.
    """
    config = config.copy_and_resolve_references()
    # The size of the vocabulary may come from the data; it changes parameters and FLOPs.
    loop.resolve(config, data)
    configs.check_batch(config, topology.devices, 1)
    # For other platforms there is no file to wait for, and the whole compile is read.
    quick = quick and topology.chip.platform in CODE
    # suit() may change the config, so it comes before the digest.
    all_notes = [*notes, *suit(config, topology.chip)]
    if quick:
        # Notes are part of the digest: quick plans and whole ones are stored side by side.
        all_notes.append(QUICK)

    path = None
    if folder:
        # ':' and '*' have meanings of their own in paths, URLs and shells.
        machine = str(topology).replace(':', '_').replace('*', '_slices')
        path = folder / f'{machine}_{digest(config, topology, data, all_notes)}.json'
        if path.exists():
            return json.loads(path.read_text()) | {'cached': True}

    result = _make_plan(config, data, topology, all_notes, quick)
    result['cached'] = False
    if path:
        # A search that is killed must not leave half a plan to be read.
        path.parent.mkdir(parents=True, exist_ok=True)
        loop.write_atomically(path, json.dumps(result, indent=1))
        loop.write_atomically(path.with_suffix('.txt'), table(result))
    return result


def _make_plan(
    config: ConfigDict, data: Any, topology: chips.Topology, notes: list[str], quick: bool
) -> dict[str, Any]:
    devices, why_not = devices_of(topology)
    mesh: Any
    if devices:
        mesh = sharding.make_mesh(dict(config.mesh), devices)
    else:
        mesh = abstract_mesh(config, topology)
    # Shapes and shardings only: no parameter is allocated, however large the model.
    built = loop.assemble(config, data, mesh)
    result = describe(config, topology, built, data.size('train'))
    result['notes'] = list(notes)
    if why_not:
        result['notes'].append(why_not)

    compiled, executed = None, None
    if devices:
        with jax.set_mesh(mesh):
            # Traced once, for the compiler and for the count of FLOPs.
            traced = built.step.trace(built.shape, built.batch)
            compiled = compile_step(traced, topology, quick)
        # Of the program before it is partitioned: FLOPs of all devices together, with what
        # rematerialisation repeats.
        executed = flops.count(traced.jaxpr.jaxpr)
        if executed.unknown:
            result['notes'].append(
                'FLOPs executed: counted once although it may turn more often: '
                f'{", ".join(executed.unknown)}'
            )
    result['flops']['executed_step'] = executed.flops if executed else None
    add_memory(result, topology, built, compiled)
    add_roofline(result, topology, config, built, mesh, compiled)
    return result


def digest(config: ConfigDict, topology: chips.Topology, data: Any, notes: Sequence[str]) -> str:
    """Hash all that a plan depends on.

    That is the config, the machine, the shapes of the data, this package's sources and the
    versions of the libraries.
    """
    # Any change of the package makes all plans anew; which files matter is not worth finding out.
    source = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parents[1].rglob('*.py')):
        source.update(file.read_bytes())
    fields = {}
    for field, value in configs.flatten(config):
        # Leaf by leaf, the first part of the dotted name being the field.
        if field.split('.')[0] not in IRRELEVANT_FIELDS:
            fields[field] = value
    packages = ('libtpu', *PLUGINS)
    versions = [jax.__version__, jax.lib.__version__, *map(_version, packages)]
    parts = [
        fields,
        str(topology),
        data.size('train'),
        data.info,
        list(notes),
        source.hexdigest(),
        versions,
    ]
    # default: values that JSON does not know, such as dtypes.
    text = json.dumps(parts, sort_keys=True, default=str)
    # 48 bits: enough to tell the plans of a folder apart.
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ''


def describe(
    config: ConfigDict, topology: chips.Topology, built: loop.Built, examples: int
) -> dict[str, Any]:
    """Return the part of a plan that is known without a compiler.

    Args:
        config: a whole config.
        topology: the machine that is planned for.
        built: what the config builds, shapes only.
        examples: size of the training set.
    """
    replica, fsdp = built.mesh.axis_sizes[:2]  # the axes that rows are sharded over
    model_params = built.shape.variables()['params']
    has_layers = any(name.startswith('encoder') for name in model_params)
    return {
        'config': config.name,
        'topology': str(topology),
        'devices': topology.devices,
        'chips': topology.chips,
        'hosts': topology.hosts,
        'mesh': dict(zip(sharding.MESH_AXES, built.mesh.axis_sizes)),
        'batch': config.batch_size,
        'accumulate': config.accumulate,
        # In one step; microbatches (`accumulate`) divide it further.
        'per_device_batch': config.batch_size / (replica * fsdp),
        'steps': config.steps,
        'examples': examples,
        'model': {
            'attention': config.model.attention,
            'scan': config.model.scan,
            'remat': config.model.remat,
            'compute_dtype': config.compute_dtype,
            'layers': has_layers,
        },
        'parameters': _count_parameters(config, built),
        'flops': _count_flops(config, built),
    }


def _count_parameters(config: ConfigDict, built: loop.Built) -> dict[str, Any]:
    frozen = 0
    for name, size in named_sizes(built.shape.params).items():
        # As the optimizer does it: patterns are searched for, not matched from the start.
        if any(re.search(pattern, name) for pattern in config.optimizer.frozen):
            frozen += size
    base_params = built.shape.frozen.get('params', {})
    frozen += _num_elements(base_params)
    total = _num_elements(built.shape.params) + _num_elements(base_params)
    # Scalars are counters.
    slots = [leaf for leaf in jax.tree.leaves(built.shape.opt_state) if leaf.ndim]
    parts = sorted(built.shape.variables()['params'].items())
    return {
        'total': total,
        'trained': total - frozen,
        'optimizer_slots': _num_elements(slots),  # moments and the like
        'of': {part: _num_elements(tree) for part, tree in parts},  # top-level module -> parameters
    }


def _count_flops(config: ConfigDict, built: loop.Built) -> dict[str, Any]:
    """FLOPs of a clip and of a step, by the model's definition rather than by the program."""
    # Dense attention, whatever the config says: kernels compute padding too.
    dense = ConfigDict(config.model.to_dict() | {'attention': 'dense'})
    model = models.build(dense, config.compute_dtype)
    # ShapeDtypeStructs all of them: FLOPs are counted by tracing, nothing is computed.
    inputs = two_rows(built.inputs)
    forward = flops.by_tower(model, built.shape.variables(), inputs)
    own = flops.of_own_network(model, built.objective, built.shape, inputs)
    if own:
        forward['objective'] = dict.fromkeys(('needed', 'all_tokens'), own)
    per_clip = {kind: flops.model_flops(forward, kind) for kind in ('needed', 'all_tokens')}
    return {
        'forward_per_clip': forward,
        'model_per_clip': per_clip,
        # What the pooled output needs and no more (performance/flops.py): the numerator of MFU.
        'model_step': per_clip['needed'] * config.batch_size,
    }


def _num_elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def two_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the abstract batch with two clips.

    What a clip costs does not depend on how many there are.
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), dict(batch))
