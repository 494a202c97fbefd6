"""Compile a training step for a machine that is not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
import re
import tempfile
import threading
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax import extras
from vatt_jax.config import ConfigError
from vatt_jax.models import attention
from vatt_jax.models.multimodal import NETS, SIZE
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, hlo

# The first file that a compiler dumps after those a quick plan reads.
CODE = {'tpu': 'after_buffer_assignment.txt', 'cuda': '.ptx'}
# JAX's plugins, one for each major version of CUDA; either will do.
PLUGINS = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
PLUGIN_ADVICE = (
    f'To compile without a GPU: pip install --no-deps jax-cuda12-plugin=={jax.__version__} '
    f'jax-cuda12-pjrt=={jax.__version__} (0.5 GB, no other NVIDIA library)'
)
# XLA refuses options of another platform.
OPTION_PLATFORMS = {'xla_cpu': 'cpu', 'xla_llvm': 'cpu', 'xla_gpu': 'cuda', 'xla_tpu': 'tpu'}


@dataclasses.dataclass
class Compiled:
    """What the compiler made of a step.

    Attributes:
        seconds: the time it took.
        memory: bytes on one device, None where the step did not fit: 'arguments', 'temporaries',
            'outputs' (those that do not reuse the arguments' memory), 'peak' (their sum) and
            'live' (the compiler's own peak).
        report: collectives and memory traffic of the program.
        needed: bytes that a step which did not fit asks for, where the compiler says so.
        limit: bytes that there are, likewise.
    """

    seconds: float
    memory: dict[str, float | None] | None
    report: hlo.Report | None = None
    needed: float | None = None
    limit: float | None = None


# ---- a config that this machine can compile
def suit(config: ConfigDict, chip: chips.Chip) -> list[str]:
    """Change in place what cannot be compiled for a chip from here.

    Args:
        config: a whole config; `model.attention` and `compiler_options` may change.
        chip: the chip that is planned for.

    Returns:
        What was changed, in sentences.
    """
    notes = _suit_attention(config, chip)
    foreign = [name for name in config.compiler_options if _is_foreign(name, chip.platform)]
    if foreign:
        options = config.compiler_options.items()
        config.compiler_options = ConfigDict({k: v for k, v in options if k not in foreign})
        notes.append(f'compiler_options left out, of another platform: {", ".join(foreign)}')
    # Not changed: the plan is that of the run, even if its MFU looks low.
    if config.compute_dtype != 'bfloat16' and chip.peak:
        notes.append(
            f'compute_dtype is {config.compute_dtype}; the peak it is compared with is that of '
            'bfloat16'
        )
    return notes


def _suit_attention(config: ConfigDict, chip: chips.Chip) -> list[str]:
    platform = {'cuda': 'gpu'}.get(chip.platform, chip.platform)  # JAX's name of it
    if config.model.attention == 'auto':
        # Decided here as attention decides it on the machine itself: fused kernels cannot drop
        # attention probabilities.
        if _has_attention_dropout(config.model):
            config.model.attention = 'dense'
        else:
            config.model.attention = attention.FUSED.get(platform, 'dense')
    kernel = config.model.attention
    # Kernels without a home (dense) run everywhere.
    if attention.HOME.get(kernel, platform) != platform:
        config.model.attention = 'dense'
        return [
            f'attention: {kernel} is a kernel of {attention.HOME[kernel].upper()}s; on '
            f'{chip.name} dense is planned'
        ]
    if kernel == 'cudnn':
        config.model.attention = 'triton'
        return [
            'attention: cuDNN cannot be lowered without its GPU; another fused kernel (triton) is '
            'compiled in its place'
        ]
    return []


def _has_attention_dropout(model: ConfigDict) -> bool:
    encoders = list(model.towers.values())
    if model.shared:
        encoders.append(model.encoder)
    for encoder in encoders:
        if encoder.get('name') in NETS:  # convolutional: no attention
            continue
        if encoder.get('attention_dropout', SIZE['attention_dropout']):
            return True
    return False


def _is_foreign(option: str, platform: str) -> bool:
    for prefix, owner in OPTION_PLATFORMS.items():
        if option.startswith(prefix) and platform != owner:
            return True
    return False


# ---- devices that are not there
def devices_of(topology: chips.Topology) -> tuple[list[Any] | None, str]:
    """Find devices to compile for.

    Args:
        topology: the machine that is planned for.

    Returns:
        The devices and '', or None and the reason why nothing can be compiled for them.

    Raises:
        ConfigError: there is no such machine, or a package that could describe it is missing.
    """
    platform = topology.chip.platform
    if platform == 'cpu':
        return _cpu_devices(topology), ''
    if platform == 'cuda':
        # Looked for, not imported: importing is up to JAX, when it loads its plugins.
        if any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
            return _gpu_devices(topology), ''
        return None, (
            f'{topology.chip.name}: this JAX has no compiler for GPUs, so nothing was compiled: no '
            'temporaries, no memory traffic, no recomputation; collectives are the least that the '
            f'sharding asks for. {PLUGIN_ADVICE}'
        )
    if platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
        raise ConfigError(
            f'--topology={topology}: compiling for TPUs takes the package libtpu, which is not '
            f'installed; {extras.install_command("tpu")}'
        )
    return _tpu_devices(topology), ''


def _cpu_devices(topology: chips.Topology) -> list[Any]:
    devices = jax.devices('cpu')
    if len(devices) < topology.devices:
        raise ConfigError(
            f'--topology={topology}: JAX was started with {len(devices)} CPU devices; set '
            f'JAX_NUM_CPU_DEVICES={topology.devices}'
        )
    return devices[: topology.devices]


def _gpu_devices(topology: chips.Topology) -> list[Any]:
    from jax.experimental import topologies

    hosts, gpus = topology.shape
    try:
        description = topologies.get_topology_desc(
            platform='cuda',
            topology_name=topology.chip.name,
            # Slices, hosts of a slice, GPUs of a host.
            topology=f'1x{hosts}x{gpus}',
            target_config=chips.gpu_target(topology.chip),
        )
        return list(description.devices)
    except Exception as error:
        raise ConfigError(
            f'--topology={topology}: JAX {jax.__version__} and its plugin for GPUs cannot compile '
            f'for it ({str(error).splitlines()[0]}). {PLUGIN_ADVICE}'
        ) from error


def _tpu_devices(topology: chips.Topology) -> list[Any]:
    from jax.experimental import topologies

    chip = topology.chip
    options: dict[str, Any] = {}
    if topology.slices > 1:
        options['num_slices'] = topology.slices
    if math.prod(topology.shape) == 1:
        # libtpu's default host has several chips, more than this machine.
        options['chips_per_host_bounds'] = (1, 1, 1)
    if chip.name == 'v4':
        options['chip_config_name'] = 'megacore'  # two cores as one device
    name = f'{chip.name}:{"x".join(map(str, topology.shape))}'
    try:
        description = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
        return list(description.devices)
    except Exception as error:
        raise ConfigError(
            f'--topology={topology}: libtpu knows no such machine ({str(error).splitlines()[0]}); '
            'slices are boxes such as v5e:4x4, v5e:16x16, v5p:4x4x4, v5p:8x8x4, v6e:8x8'
        ) from error


def abstract_mesh(config: ConfigDict, topology: chips.Topology) -> jax.sharding.AbstractMesh:
    """Make a mesh of no devices: enough to say how everything is sharded."""
    shape = sharding.mesh_shape(dict(config.mesh), topology.devices)
    # Auto, as in sharding.make_mesh: the compiler propagates shardings.
    axis_types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(shape, sharding.MESH_AXES, axis_types=axis_types)


# ---- the compiler
def compile_step(traced: Any, topology: chips.Topology, quick: bool = False) -> Compiled:
    """Compile a traced step for the devices it was traced for, and read the result.

    Args:
        traced: what `jax.jit(...).trace` returned.
        topology: the machine of those devices.
        quick: read the scheduled program and its buffer assignment as soon as the compiler has
            written them. It is left alone with the generation of code, most of its work, of which
            a plan reads next to nothing. Its thread cannot be stopped, so the calling process
            must end soon, by os._exit.

    Returns:
        Memory, collectives and traffic, or what is known of a step that does not fit.
    """
    start = time.monotonic()
    platform = topology.chip.platform
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as dump:
        # The text comes from XLA's own dump: as_text() fails for some TPU programs (word tables
        # that it gathers on the SparseCores).
        options: dict[str, Any] = {
            'xla_dump_to': dump,
            'xla_dump_hlo_as_text': True,
            # jit names a module after its function; other programs are not dumped.
            'xla_dump_hlo_module_re': 'jit_step.*',
        }
        if platform == 'cuda':
            # Products as calls of cuBLAS: to choose tiles of its own, the compiler would have to
            # time them on the GPU.
            options |= {'xla_gpu_enable_triton_gemm': False, 'xla_gpu_autotune_level': 0}
        # The target's lowering rules (its kernels), although JAX's own backend here is the CPU.
        lowered = traced.lower(lowering_platforms=(platform,))
        code_suffix = CODE[platform] if quick else None
        compiled, error = _run_compiler(lowered, options, dump, code_suffix)
        if error is not None:
            # Too much memory is a result; any other error is an error.
            sizes = out_of_memory(str(error))
            if sizes is None:
                raise error
            needed, limit = sizes
            seconds = time.monotonic() - start
            return Compiled(seconds, memory=None, needed=needed, limit=limit)

        # The file appears before code is generated: a quick plan reads it while `compiled` is None.
        program = _find_dump(dump, 'after_optimizations.txt')
        text = program.read_text() if program else compiled.as_text()
        memory = _memory_of(compiled, dump)
    seconds = time.monotonic() - start
    return Compiled(seconds, memory, hlo.read(text))


def _run_compiler(
    lowered: Any, options: dict[str, Any], dump: str, code_suffix: str | None
) -> tuple[Any, Exception | None]:
    """Compile to the end, or until a file that ends in `code_suffix` is dumped.

    Returns:
        The compiled program, None while the compiler is still at work; and its error, if any.
    """
    result: dict[str, Any] = {}

    def work() -> None:
        try:
            result['compiled'] = lowered.compile(compiler_options=options)
        except Exception as error:  # XLA's errors have one type
            result['error'] = error

    if code_suffix is None:
        work()
    else:
        # compile() cannot be interrupted, so it runs beside this thread, which watches the dump.
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive() and not _find_dump(dump, code_suffix):
            thread.join(0.5)
        thread.join(2.0)  # a program that does not fit is refused here
    return result.get('compiled'), result.get('error')


def _find_dump(dump: str, ending: str) -> pathlib.Path | None:
    return next(iter(pathlib.Path(dump).glob(f'*{ending}')), None)


def _memory_of(compiled: Any, dump: str) -> dict[str, float | None]:
    """Bytes on one device: the parts, their sum, and the compiler's own peak."""
    if compiled is None:
        assignment = _find_dump(dump, 'buffer-assignment.txt')
        assert assignment is not None, 'XLA dumps it before any code'
        # Before code generation, which may still add scratch: a little below the final numbers.
        parts = hlo.buffers(assignment.read_text())
        live = None
    else:
        analysis = compiled.memory_analysis()
        parts = {
            'arguments': float(analysis.argument_size_in_bytes),
            'temporaries': float(analysis.temp_size_in_bytes),
            # The step donates its state: outputs that alias arguments take no memory of their own.
            'outputs': float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        }
        live = float(getattr(analysis, 'peak_memory_in_bytes', 0))
    # What is reserved; the compiler's own peak leaves out the gaps between buffers.
    peak = float(sum(parts.values()))
    return {**{name: float(size) for name, size in parts.items()}, 'peak': peak, 'live': live}


def out_of_memory(message: str) -> tuple[float | None, float | None] | None:
    """Read XLA's complaint about memory.

    Returns:
        Bytes needed and bytes available, each None where it does not say; None where the message
        is about something else.
    """
    if 'RESOURCE_EXHAUSTED' not in message and 'Ran out of memory' not in message:
        return None
    # TPU: 'Ran out of memory in memory space hbm. Used 18.20G of 15.75G hbm.'
    match = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)', message)
    if not match:
        return None, None
    return _bytes(match[1], match[2]), _bytes(match[3], match[4])


def _bytes(number: str, unit: str) -> float:
    # XLA's K, M, G and T are powers of 1024.
    exponent = ' KMGT'.index(unit or ' ')
    return float(number) * 1024**exponent
