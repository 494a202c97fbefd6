"""A run planned before its machine is there: the real training step is compiled for a named topology on this one, and measured by reading.

    python run.py --mode=plan --config=configs/vatt.py:mbs --workdir=runs/plan --topology=v5p:4x4x4

What is exact: parameters, FLOPs (flops.py), what the compiler reserves on each device, the collectives and the memory traffic of its program
(hlo.py). What is a bound: the roofline, each of compute, memory, links and network at its data sheet's rate (chips.py); a step takes at least
the longest of them, and no longer than their sum where everything else is free. Where no compiler is to be had (GPUs without JAX's plugin for
them), the parts that need one are left out and the plan says so. docs/scaling.md
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.models import attention
from vatt_jax.models.multimodal import NETS, SIZE
from vatt_jax.objectives.base import stream_names
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, flops, hlo
from vatt_jax.training import loop

# Fields that change nothing of a plan.
UNREAD = (
    'name',
    'report',
    'init_from',
    'init_words',
    'init_rename',
    'init_skip',
    'checkpoint',
    'max_bad_steps',
    'evals',
    'eval_every',
    'log_every',
    'jax_platform',
    'profile',
    'compilation_cache',
)
CODE = {
    'tpu': 'after_buffer_assignment.txt',
    'cuda': '.ptx',
}  # what a compiler writes next after what a quick plan reads
PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
PLUGIN_WANTED = (
    f'To compile without a GPU: pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} '
    '(0.5 GB, no other NVIDIA library)'
)
QUICK = 'no code was generated: memory is that of the buffer assignment'


@dataclasses.dataclass
class Compiled:
    """memory: bytes on one device {'arguments', 'temporaries', 'outputs' that do not reuse the arguments' memory, 'peak': their sum, 'live': the
    compiler's peak}; None: it did not fit. needed, limit: what the compiler says of that. report: collectives and traffic."""

    seconds: float
    memory: dict[str, float] | None
    report: hlo.Report | None = None
    needed: float | None = None
    limit: float | None = None


def plan(
    config: ConfigDict,
    data,
    topology: chips.Topology,
    folder: pathlib.Path | None = None,
    notes: Iterable[str] = (),
    quick: bool = False,
) -> dict[str, Any]:
    """The plan of `config` on `topology` as a JSON-able dict; read from `folder` if one of the same config, code and libraries is there.

    data: the data object, of which shapes, sizes and vocabulary are read. notes: to be told with the result. quick: see `compile_step`. Raises
    ConfigError where config and topology do not fit.
    """
    config = config.copy_and_resolve_references()
    loop.resolve(config, data)
    configs.check_batch(config, topology.devices, 1)
    quick = quick and topology.chip.platform in CODE
    notes = [*notes, *suit(config, topology.chip), *([QUICK] if quick else [])]
    key = digest(config, topology, data, notes)
    path = (
        folder / f'{str(topology).replace(":", "_").replace("*", "_slices")}_{key}.json'
        if folder
        else None
    )
    if path and path.exists():
        return json.loads(path.read_text()) | {'cached': True}
    devices, why_not = devices_of(topology)
    mesh = (
        sharding.make_mesh(dict(config.mesh), devices)
        if devices
        else abstract_mesh(config, topology)
    )
    built = loop.assemble(config, data, mesh)
    result = describe(config, topology, built, data.size('train'))
    result['notes'] = [*notes, *([why_not] if why_not else [])]
    traced = executed = compiled = None
    if devices:
        with jax.set_mesh(mesh):
            traced = built.step.trace(built.shape, built.batch)
            compiled = compile_step(traced, topology, quick)
        executed = flops.count(traced.jaxpr.jaxpr)
    result['flops']['executed_step'] = executed.flops if executed else None
    if executed and executed.unknown:
        result['notes'].append(
            f'FLOPs executed: counted once although it may turn more often: {", ".join(executed.unknown)}'
        )
    add_memory(result, topology, built, compiled)
    add_roofline(result, topology, config, built, mesh, compiled)
    result['cached'] = False
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        loop.write_atomically(path, json.dumps(result, indent=1))
        loop.write_atomically(path.with_suffix('.txt'), table(result))
    return result


def suit(config: ConfigDict, chip: chips.Chip) -> list[str]:
    """Changes in place what cannot be compiled for this chip from here; what was changed, in sentences."""
    notes, here = [], {'cuda': 'gpu'}.get(chip.platform, chip.platform)
    if config.model.attention == 'auto':
        parts = [
            *config.model.towers.values(),
            *([config.model.encoder] if config.model.shared else []),
        ]
        free = not any(
            p.get('attention_dropout', SIZE['attention_dropout'])
            for p in parts
            if p.get('name') not in NETS
        )
        config.model.attention = attention.FUSED.get(here, 'dense') if free else 'dense'
    kernel = config.model.attention
    if attention.HOME.get(kernel, here) != here:
        config.model.attention = 'dense'
        notes.append(
            f'attention: {kernel} is a kernel of {attention.HOME[kernel].upper()}s; on {chip.name} dense is planned'
        )
    elif kernel == 'cudnn':
        config.model.attention = 'triton'
        notes.append(
            'attention: cuDNN cannot be lowered without its GPU; another fused kernel (triton) is compiled in its place'
        )
    alien = [
        k
        for k in config.compiler_options
        if k.startswith(('xla_cpu', 'xla_llvm'))
        and chip.platform != 'cpu'
        or k.startswith('xla_gpu')
        and chip.platform != 'cuda'
        or k.startswith('xla_tpu')
        and chip.platform != 'tpu'
    ]
    if alien:
        config.compiler_options = ConfigDict(
            {k: v for k, v in config.compiler_options.items() if k not in alien}
        )
        notes.append(f'compiler_options left out, of another platform: {", ".join(alien)}')
    if config.compute_dtype != 'bfloat16' and chip.peak:
        notes.append(
            f'compute_dtype is {config.compute_dtype}; the peak it is compared with is that of bfloat16'
        )
    return notes


def digest(config: ConfigDict, topology: chips.Topology, data, notes) -> str:
    """Of all that a plan depends on: config, machine, shapes of the data, this package's sources, versions of the libraries."""
    source = hashlib.sha256()
    for file in sorted(pathlib.Path(__file__).parents[1].rglob('*.py')):
        source.update(file.read_bytes())
    read = {k: v for k, v in configs.flatten(config) if k.split('.')[0] not in UNREAD}
    versions = [jax.__version__, jax.lib.__version__, *map(_version, ('libtpu', *PLUGINS))]
    return hashlib.sha256(
        json.dumps(
            [
                read,
                str(topology),
                data.size('train'),
                data.info,
                list(notes),
                source.hexdigest(),
                versions,
            ],
            sort_keys=True,
            default=str,
        ).encode()
    ).hexdigest()[:12]


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ''


def devices_of(topology: chips.Topology) -> tuple[list | None, str]:
    """(devices to compile for, ''), or (None, why there are none)."""
    chip = topology.chip
    if chip.platform == 'cuda' and not any(importlib.util.find_spec(p) for p in PLUGINS):
        return None, (
            f'{chip.name}: this JAX has no compiler for GPUs, so nothing was compiled: no temporaries, no memory traffic, no '
            f'recomputation; collectives are the least that the sharding asks for. {PLUGIN_WANTED}'
        )
    if chip.platform == 'cpu':
        here = jax.devices('cpu')
        if len(here) < topology.devices:
            raise ConfigError(
                f'--topology={topology}: JAX was started with {len(here)} CPU devices; set JAX_NUM_CPU_DEVICES={topology.devices}'
            )
        return here[: topology.devices], ''
    if chip.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
        raise ConfigError(
            f'--topology={topology}: compiling for TPUs takes the package libtpu, which is not installed; '
            "pip install 'vatt_jax[tpu]' (or pip install -e '.[tpu]' in a clone)"
        )
    from jax.experimental import topologies

    if chip.platform == 'cuda':
        hosts, gpus = topology.shape
        try:
            return list(
                topologies.get_topology_desc(
                    platform='cuda',
                    topology_name=chip.name,
                    topology=f'1x{hosts}x{gpus}',
                    target_config=chips.gpu_target(chip),
                ).devices
            ), ''
        except Exception as error:
            raise ConfigError(
                f'--topology={topology}: JAX {jax.__version__} and its plugin for GPUs cannot compile for it '
                f'({str(error).splitlines()[0]}). {PLUGIN_WANTED}'
            ) from error
    more: dict[str, Any] = {'num_slices': topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) == 1:
        more['chips_per_host_bounds'] = (1, 1, 1)
    if chip.name == 'v4':
        more['chip_config_name'] = 'megacore'
    name = f'{chip.name}:{"x".join(map(str, topology.shape))}'
    try:
        return list(
            topologies.get_topology_desc(platform='tpu', topology_name=name, **more).devices
        ), ''
    except Exception as error:
        raise ConfigError(
            f'--topology={topology}: libtpu knows no such machine ({str(error).splitlines()[0]}); slices are boxes such as v5e:4x4, '
            'v5e:16x16, v5p:4x4x4, v5p:8x8x4, v6e:8x8'
        ) from error


def abstract_mesh(config: ConfigDict, topology: chips.Topology):
    """A mesh of no devices: enough to say how everything is shared."""
    shape = sharding.mesh_shape(dict(config.mesh), topology.devices)
    return jax.sharding.AbstractMesh(
        shape, sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
    )


def compile_step(traced, topology: chips.Topology, quick: bool = False) -> Compiled:
    """Compiles a traced step for the devices it was traced for, and reads the result.

    quick: reads the scheduled program and its buffer assignment as soon as the compiler has written them, and leaves it alone with the
    generation of code, most of its work, of which a plan reads next to nothing. The thread cannot be stopped: to be called by a process that ends
    soon (os._exit).
    """
    began = time.monotonic()
    platform = topology.chip.platform
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as dump:
        # The text comes from XLA's own dump: as_text() fails for some TPU programs (word tables that it gathers on the SparseCores).
        options = {
            'xla_dump_to': dump,
            'xla_dump_hlo_as_text': True,
            'xla_dump_hlo_module_re': 'jit_step.*',
        }
        if (
            platform == 'cuda'
        ):  # products as calls of cuBLAS: to choose tiles of its own, the compiler would have to time them on the GPU
            options |= {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}
        lowered = traced.lower(lowering_platforms=(platform,))
        result: dict[str, Any] = {}

        def work() -> None:
            try:
                result['compiled'] = lowered.compile(compiler_options=options)
            except Exception as error:  # XLA's errors have one type
                result['error'] = error

        find = lambda ending: next(iter(pathlib.Path(dump).glob(f'*{ending}')), None)
        if quick:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            while thread.is_alive() and not find(CODE[platform]):
                thread.join(0.5)
            thread.join(2.0)  # a program that does not fit is refused here
        else:
            work()
        if error := result.get('error'):
            needed = out_of_memory(str(error))
            if needed is None:
                raise error
            return Compiled(time.monotonic() - began, None, None, *needed)
        compiled, found = result.get('compiled'), find('after_optimizations.txt')
        text = found.read_text() if found else compiled.as_text()
        if compiled is None:
            memory = hlo.buffers(find('buffer-assignment.txt').read_text())
        else:
            m = compiled.memory_analysis()
            memory = {
                'arguments': m.argument_size_in_bytes,
                'temporaries': m.temp_size_in_bytes,
                'outputs': m.output_size_in_bytes - m.alias_size_in_bytes,
            }
    memory['peak'] = sum(
        memory.values()
    )  # what is reserved; the compiler's own peak leaves out the gaps between buffers
    memory['live'] = getattr(m, 'peak_memory_in_bytes', 0) if compiled else None
    seconds = time.monotonic() - began
    return Compiled(
        seconds, {k: None if v is None else float(v) for k, v in memory.items()}, hlo.read(text)
    )


def out_of_memory(message: str) -> tuple[float | None, float | None] | None:
    """(bytes needed, bytes there) of XLA's complaint; None when it is another one."""
    if 'RESOURCE_EXHAUSTED' not in message and 'Ran out of memory' not in message:
        return None
    found = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)', message)
    if not found:
        return None, None
    size = lambda number, unit: float(number) * 1024 ** ' KMGT'.index(unit or ' ')
    return size(found[1], found[2]), size(found[3], found[4])


def describe(
    config: ConfigDict, topology: chips.Topology, built: loop.Built, examples: int
) -> dict[str, Any]:
    """What is known without a compiler."""
    sizes = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    plain = models.build(
        ConfigDict(config.model.to_dict() | {'attention': 'dense'}), config.compute_dtype
    )  # kernels compute padding too
    counts = flops.towers(plain, variables, two_rows(built.inputs))
    slots = [x for x in jax.tree.leaves(built.shape.opt_state) if x.ndim]
    frozen = {
        k: v
        for k, v in _named(built.shape.params).items()
        if any(re.search(p, k) for p in config.optimizer.frozen)
    }
    total = sizes(built.shape.params)
    per_clip = {kind: flops.model_flops(counts, kind) for kind in ('needed', 'all_tokens')}
    batch = config.batch_size
    return {
        'config': config.name,
        'topology': str(topology),
        'devices': topology.devices,
        'chips': topology.chips,
        'hosts': topology.hosts,
        'mesh': dict(zip(sharding.MESH_AXES, built.mesh.axis_sizes)),
        'batch': batch,
        'accumulate': config.accumulate,
        'per_device_batch': batch / (built.mesh.axis_sizes[0] * built.mesh.axis_sizes[1]),
        'steps': config.steps,
        'examples': examples,
        'model': {k: config.model[k] for k in ('attention', 'scan', 'remat')}
        | {
            'compute_dtype': config.compute_dtype,
            'layers': any(name.startswith('encoder') for name in built.shape.params['model']),
        },
        'parameters': {
            'total': total,
            'trained': total - sum(frozen.values()),
            'optimizer_slots': sizes(slots),
            'of': {k: sizes(v) for k, v in sorted(built.shape.params['model'].items())},
        },
        'flops': {
            'forward_per_clip': counts,
            'model_per_clip': per_clip,
            'model_step': per_clip['needed'] * batch,
        },
    }


def two_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The abstract batch with two clips: what a clip costs does not depend on how many there are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), dict(batch))


def _named(params: Any) -> dict[str, int]:
    from vatt_jax import optim

    return dict(
        zip(
            jax.tree.leaves(optim.paths(params)),
            (math.prod(x.shape) for x in jax.tree.leaves(params)),
        )
    )


def shares(shape: Any, shardings: Any) -> float:
    """Bytes of a tree on one device."""
    total = 0.0
    for x, s in zip(
        jax.tree.leaves(shape),
        jax.tree.leaves(shardings, is_leaf=lambda s: isinstance(s, jax.sharding.Sharding)),
        strict=True,
    ):
        total += math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return total


def add_memory(
    result: dict[str, Any], topology: chips.Topology, built: loop.Built, compiled: Compiled | None
) -> None:
    """'memory': bytes on one device, what of it is the state, and whether it fits."""
    limit = topology.of_device(topology.chip.memory)
    rows = built.mesh.axis_sizes[0] * built.mesh.axis_sizes[1]
    state = shares(built.shape, built.shardings)
    batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(built.batch)) / rows
    out: dict[str, Any] = {'limit': limit, 'state': state, 'batch': batch}
    if compiled is None:
        out |= {
            'arguments': state + batch,
            'temporaries': None,
            'peak': None,
            'fits': None if limit is None or state + batch <= limit else False,
        }
    elif compiled.memory is None:
        out |= {
            'arguments': state + batch,
            'temporaries': None,
            'peak': compiled.needed,
            'limit': compiled.limit or limit,
            'fits': False,
        }
    else:
        out |= {k: compiled.memory[k] for k in ('arguments', 'temporaries', 'peak', 'live')}
        compiler_agrees = (
            topology.chip.platform == 'tpu' and compiled.memory['live'] is not None
        )  # else it had refused
        out['fits'] = None if limit is None else compiler_agrees or out['peak'] <= limit
    if out['fits'] is False:
        out['would_fit'] = would_fit(result, out)
    result['memory'] = out
    result['compiled'] = None if compiled is None else {'seconds': round(compiled.seconds, 1)}


def would_fit(result: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    """What to try when a step does not fit, from what the compiler said; estimates, to be planned in their turn."""
    limit, state, mesh = memory['limit'], memory['state'], result['mesh']
    out = []
    spread = mesh['replica'] * mesh['fsdp']
    shared = state * mesh['fsdp'] / spread
    # else it is not the state that fills the memory
    if state - shared >= (
        min(0.1 * memory['peak'], memory['peak'] - limit) if memory['peak'] else 0.2 * limit
    ):
        out.append(
            f'config.mesh.fsdp={spread}: parameters and optimizer over all data-parallel devices, about '
            f'{shared / 1e9:.1f} GB each instead of {state / 1e9:.1f}'
        )
    if result['model']['remat'] != 'full' and result['model']['layers']:
        out.append("config.model.remat='full': the backward pass recomputes each layer")
    if memory['peak'] and state < limit:
        # what is not the state grows with the rows of a microbatch
        share = 0.9 * (limit - state) / max(memory['peak'] - state, 1.0)
        rows = int(result['per_device_batch'] / result['accumulate'] * share)
        if 0 < rows < result['per_device_batch'] / result['accumulate']:
            parts = 2 ** math.ceil(math.log2(result['per_device_batch'] / rows))
            out.append(
                f'about {rows} clips a device at a time: config.batch_size={rows * spread}, or config.accumulate={parts} where the loss '
                'may see one microbatch at a time'
            )
    if not memory['peak'] and state < limit:
        out.append(
            'fewer clips a device at a time: a smaller config.batch_size, or config.accumulate where the loss may see one microbatch at a '
            'time'
        )
    if state >= limit:
        out.append(
            f'parameters and optimizer alone are {state / 1e9:.1f} GB of {limit / 1e9:.1f}: a batch of any size is too much without a '
            'wider fsdp or model axis'
        )
    return out


def add_roofline(
    result: dict[str, Any],
    topology: chips.Topology,
    config: ConfigDict,
    built: loop.Built,
    mesh,
    compiled: Compiled | None,
) -> None:
    """'collectives', 'roofline', 'host' and 'run'."""
    chip = topology.chip
    report = compiled.report if compiled else None
    collectives = (
        report.collectives
        if report
        else least_collectives(built, mesh, config)
        if compiled is None
        else []
    )
    if report and report.unknown:
        result['notes'].append(
            f'{len(report.unknown)} loops whose number of turns is not in the program were counted once'
        )
    if mesh.size < topology.devices:
        result['notes'].append(
            f'the mesh leaves {topology.devices - mesh.size} of {topology.devices} devices idle; config.mesh.replica=-1 takes all'
        )
    result['collectives'] = hlo.summary(collectives)
    moved = by_way(collectives, islands(mesh, topology))
    executed = result['flops'].get('executed_step') or result['flops']['model_step']
    of = lambda amount, rate: None if amount is None or not rate else amount / rate
    network = None if chip.network is None else chip.network / chip.devices
    times = {
        'compute': of(executed / mesh.size, topology.of_device(chip.peak)),
        'memory': of(report.traffic if report else None, topology.of_device(chip.bandwidth)),
        'links': of(moved['links'], topology.link_rate),
        'network': of(moved['network'], network),
    }
    known = {k: t for k, t in times.items() if t is not None}
    roofline: dict[str, Any] = {
        'seconds': times,
        'bytes': {'memory': report.traffic if report else None, **moved},
        'rates': {
            'peak': chip.peak,
            'memory': chip.bandwidth,
            'links': topology.link_rate,
            'network': network,
        },
    }
    if known and not (compiled and compiled.memory is None):
        bound, serial = max(known.values()), sum(known.values())
        ideal = result['flops']['model_step'] / (topology.chips * chip.peak)
        roofline |= {
            'bound': bound,
            'serial': serial,
            'limited_by': max(known, key=known.get),
            'mfu': ideal / bound,
            'mfu_serial': ideal / serial,
            'clips_per_s': result['batch'] / bound,
            'clips_per_s_per_chip': result['batch'] / bound / topology.chips,
        }
    result['roofline'] = roofline
    names = stream_names(built.batch)
    row = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(built.batch))
    frames = sum(built.batch[s]['data'].shape[1] for s in names if s.split('.')[0] == 'video')
    host: dict[str, Any] = {'bytes_per_clip': row, 'frames_per_clip': frames}
    if 'bound' in roofline:
        rate = roofline['clips_per_s'] / topology.hosts
        host |= {'clips_per_s': rate, 'frames_per_s': rate * frames, 'bytes_per_s': rate * row}
        seconds = config.steps * roofline['bound']
        result['run'] = {'hours': seconds / 3600, 'chip_hours': seconds / 3600 * topology.chips}
    result['host'] = host


def islands(mesh, topology: chips.Topology) -> np.ndarray:
    """int [devices]: which slice (or GPU host) each device of the mesh, in its order, belongs to."""
    if isinstance(mesh, jax.sharding.Mesh):
        of = (
            (lambda d: d.process_index)
            if topology.chip.platform == 'cuda'
            else lambda d: getattr(d, 'slice_index', 0) or 0
        )
        return np.array([of(d) for d in mesh.devices.flat])
    return np.arange(topology.devices) // topology.island


def by_way(collectives: list[hlo.Collective], island: np.ndarray) -> dict[str, float]:
    """{'links', 'network'}: bytes that a device takes in over each in one step, at best: within islands first, between them once."""
    out = {'links': 0.0, 'network': 0.0}
    for c in collectives:
        members = island[list(c.members)] if c.members else np.zeros(c.group, int)
        parts = len(np.unique(members))
        inside = c.group // parts
        once = 2.0 if c.kind == 'all-reduce' else 1.0
        if c.kind in ('collective-permute', 'collective-broadcast'):
            out['network' if parts > 1 else 'links'] += c.times * c.received
            continue
        out['links'] += c.times * once * c.bytes * (inside - 1) / max(inside, 1)
        out['network'] += c.times * once * c.bytes * (parts - 1) / parts / max(inside, 1)
    return out


def least_collectives(built: loop.Built, mesh, config: ConfigDict) -> list[hlo.Collective]:
    """What the sharding asks for at the least, in the compute type: gradients of replicated parameters summed over the data axes; sharded ones
    gathered for the forward and the backward pass, their gradients scattered and summed over the replicas. The loss moves little beside
    them and is left out."""
    width = 2 if config.compute_dtype == 'bfloat16' else 4
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    ids = np.arange(math.prod(mesh.axis_sizes)).reshape(mesh.axis_sizes)
    groups = {
        'data': ids[:, :, 0, 0].reshape(-1),
        'fsdp': ids[0, :, 0, 0],
        'replica': ids[:, 0, 0, 0],
    }
    whole = split = 0.0
    for (name, size), s in zip(
        _named(built.shape.params).items(), jax.tree.leaves(built.shardings.params), strict=True
    ):
        if any(re.search(p, name) for p in config.optimizer.frozen):
            continue
        if 'fsdp' in str(s.spec) and sizes['fsdp'] > 1:
            split += size * width
        else:
            whole += size * width
    one = lambda kind, size, name, times=1.0: hlo.Collective(
        kind, size, len(groups[name]), times, tuple(groups[name].tolist())
    )
    out = [one('all-reduce', whole, 'data')] if whole else []
    if split:
        out += [one('all-gather', split, 'fsdp', 2.0), one('reduce-scatter', split, 'fsdp')]
        if sizes['replica'] > 1:
            out.append(one('all-reduce', split / sizes['fsdp'], 'replica'))
    return [c for c in out if c.group > 1]


# ---- other ways to run the same model


def search(
    config: ConfigDict,
    data,
    topology: chips.Topology,
    folder: pathlib.Path | None,
    notes: Iterable[str] = (),
    tell=print,
) -> dict[str, Any]:
    """The fastest plan that fits, by its bound: FSDP width first, then rematerialisation, then clips per device, each with the best so far.

    A line is told of each as soon as it is known; what `folder` holds already is read, so an interrupted search goes on where it was.
    """
    tell(
        f'{"fsdp":>5} {"remat":>6} {"batch":>7} {"a device":>9} {"peak GB":>8} {"ms":>8} {"clips/s":>9} {"MFU %":>6}  limited by'
    )
    best, best_config, seen = None, config, {}

    def consider(change: Mapping[str, Any]) -> None:
        nonlocal best, best_config
        c = best_config.copy_and_resolve_references()
        configs.override(c, [(k, str(v)) for k, v in change.items()])
        key = c.mesh.fsdp, c.model.remat, c.batch_size
        if key in seen:
            return
        try:
            r = plan(c, data, topology, folder, notes)
        except ConfigError as error:
            tell(f'{key[0]:>5} {key[1]:>6} {key[2]:>7}  {error}')
            return
        seen[key] = r
        m, roof = r['memory'], r['roofline']
        peak = '?' if m['peak'] is None else f'{m["peak"] / 1e9:.2f}'
        ok = m['fits'] is not False and 'bound' in roof
        rest = (
            f'{1e3 * roof["bound"]:>8.1f} {roof["clips_per_s"]:>9.0f} {100 * roof["mfu"]:>6.1f}  {roof["limited_by"]}'
            if ok
            else '  does not fit'
            if m['fits'] is False
            else '  no roofline'
        )
        tell(f'{key[0]:>5} {key[1]:>6} {key[2]:>7} {r["per_device_batch"]:>9g} {peak:>8} {rest}')
        if ok and (best is None or roof['clips_per_s'] > best['roofline']['clips_per_s']):
            best, best_config = r, c

    consider({})
    data_parallel = topology.devices // (abs(config.mesh.model) * abs(config.mesh.seq))
    if config.mesh.replica == -1:
        for width in sorted(
            {
                1,
                min(topology.chip.host * topology.chip.devices, data_parallel),
                min(topology.island, data_parallel),
            }
        ):
            consider({'mesh.fsdp': width})
    for remat in ('none', 'dots', 'full'):
        consider({'model.remat': remat})
    for factor in (0.5, 2, 4):
        consider({'batch_size': int(best_config.batch_size * factor)})
    if best is None:
        tell('none of these fits')
        return {}
    tell(
        f'fastest that fits: config.mesh.fsdp={best_config.mesh.fsdp}, config.model.remat={best_config.model.remat!r}, '
        f'config.batch_size={best_config.batch_size}'
    )
    return best


# ---- what is shown


def table(result: Mapping[str, Any], width: int = 118) -> str:
    """The plan as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    page = io.StringIO()
    console = Console(width=width, file=page, color_system=None)
    say = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
    r, m, f, roof = result, result['memory'], result['flops'], result['roofline']
    rates, executed = roof['rates'], f.get('executed_step')
    amount = lambda x, unit=1.0: (
        'unknown' if x is None else f'{x / unit:.3g}' if abs(x) < 1000 * unit else f'{x / unit:.0f}'
    )

    def show(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
        t = Table(
            title=title,
            title_justify='left',
            title_style='',
            header_style='',
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for i, c in enumerate(columns):
            t.add_column(c, justify='right' if i else 'left')
        for row in rows:
            t.add_row(*row)
        console.print(t)
        say('')

    mesh = ' × '.join(f'{k}={v}' for k, v in r['mesh'].items() if v > 1) or 'one device'
    parts = f' in {r["accumulate"]} parts' if r['accumulate'] > 1 else ''
    say(
        f'{r["config"]} on {r["topology"]}: {r["devices"]} devices of {r["hosts"]} host{"s" * (r["hosts"] > 1)}, mesh {mesh}'
    )
    say(
        f'batch {r["batch"]} ({r["per_device_batch"]:g} clips a device{parts}), {r["model"]["compute_dtype"]}, attention {r["model"]["attention"]}, '
        f'remat {r["model"]["remat"]}, layers {"scanned" if r["model"]["scan"] else "unrolled"}\n'
    )
    p = r['parameters']
    show(
        'Parameters',
        ['', 'millions'],
        [
            [name, amount(n, 1e6)]
            for name, n in (
                ('trained', p['trained']),
                ('frozen', p['total'] - p['trained']),
                ('optimizer slots', p['optimizer_slots']),
            )
        ],
    )
    show(
        'FLOPs of one clip',
        ['', 'GFLOP needed', 'all tokens in all layers'],
        [
            *(
                [f'forward {name}', amount(c['needed'], 1e9), amount(c['all_tokens'], 1e9)]
                for name, c in f['forward_per_clip'].items()
            ),
            [
                'forward and backward',
                *(amount(f['model_per_clip'][k], 1e9) for k in ('needed', 'all_tokens')),
            ],
        ],
    )
    verdict = {True: 'fits', False: 'DOES NOT FIT', None: 'unknown'}[m['fits']]
    names = {
        'parameters, optimizer, statistics': 'state',
        'batch': 'batch',
        'arguments': 'arguments',
        'temporaries': 'temporaries',
        'peak': 'peak',
        'there is': 'limit',
    }
    show(
        'Memory of one device',
        ['', 'GB'],
        [*([k, amount(m[v], 1e9)] for k, v in names.items()), ['', verdict]],
    )
    for line in m.get('would_fit', ()):
        say(f'would fit, by estimate: {line}')
    if r['collectives']:
        show(
            'Collectives of one step',
            ['', 'devices', 'times', 'MB', 'MB received by each'],
            [
                [
                    c['kind'],
                    str(c['group']),
                    f'{c["count"]:g}',
                    amount(c['bytes'], 1e6),
                    amount(c['received'], 1e6),
                ]
                for c in r['collectives']
            ],
        )
    work = (executed or f['model_step']) / math.prod(r['mesh'].values())
    flop = f'{amount(work, 1e12)} TFLOP' if work > 1e11 else f'{amount(work, 1e9)} GFLOP'
    amounts = {
        'compute': flop + ('' if executed else ' (without recomputation)'),
        **{k: 'unknown' if v is None else f'{amount(v, 1e9)} GB' for k, v in roof['bytes'].items()},
    }
    speeds = {
        'compute': f'{rates["peak"] / r["devices"] * r["chips"] / 1e12:.0f} TFLOP/s'
        if rates['peak']
        else 'unknown',
        **{
            k: f'{amount(rates[k], 1e9)} GB/s' if rates[k] else 'unknown'
            for k in ('memory', 'links', 'network')
        },
    }
    show(
        'Roofline of one device and step',
        ['', 'amount', 'rate', 'ms'],
        [[k, amounts[k], speeds[k], amount(t, 1e-3)] for k, t in roof['seconds'].items()],
    )
    if 'bound' in roof:
        say(
            f'bound: {1e3 * roof["bound"]:.1f} ms a step by {roof["limited_by"]} ({1e3 * roof["serial"]:.1f} ms if nothing overlapped): '
            f'{roof["clips_per_s"]:.0f} clips/s, {roof["clips_per_s_per_chip"]:.1f} a chip, MFU {100 * roof["mfu"]:.1f} % '
            f'({100 * roof["mfu_serial"]:.1f} %)'
        )
        h = r['host']
        say(
            f'each of {r["hosts"]} hosts: {h["clips_per_s"]:.0f} clips/s, {h["frames_per_s"]:.0f} frames/s to decode, '
            f'{h["bytes_per_s"] / 1e9:.2f} GB/s to its devices'
        )
        say(
            f'{r["steps"]} steps: {r["run"]["hours"]:.1f} hours, {r["run"]["chip_hours"]:.0f} chip-hours, at the bound'
        )
    for note in r['notes']:
        say(f'note: {note}')
    say(
        f'compiled in {r["compiled"]["seconds"]} s'
        + (' (kept from before)' if r.get('cached') else '')
        if r['compiled']
        else 'nothing compiled'
    )
    return page.getvalue()
