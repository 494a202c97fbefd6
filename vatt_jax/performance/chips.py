"""What accelerators can do by their data sheets, and how machines are put together from them.

The one table of such numbers: the plan and whatever reports MFU read them here. All rates are per
chip and per second, dense (no sparsity), in one direction unless it says so.

Sources, read in November 2026 (docs.cloud.google.com/tpu/docs/NAME and
www.nvidia.com/en-us/data-center/NAME/):

    v4     275 TFLOP/s, 32 GiB, 1228 GB/s; six links of 50 GB/s each way (Jouppi et al. 2023)
    v5e    197 TFLOP/s, 16 GB, 819 GB/s; ICI 400 GB/s both ways together over four ports; 6.4 Tb/s
    of
           data-centre network for a pod of 256
    v5p    459 TFLOP/s, 95 GiB, 2765 GB/s; ICI 1200 GB/s both ways; 50 Gb/s DCN a chip
    v6e    918 TFLOP/s, 32 GB, 1640 GB/s; ICI 3200 Gb/s one way summed over four ports (800 GB/s
    both
           ways); 25.6 Tb/s DCN for a pod of 256
    tpu7x  2307 TFLOP/s bf16, 192 GiB, 7380 GB/s; ICI 1200 GB/s both ways; 100 Gb/s DCN a chip; two
           devices a chip
    h100   SXM: 989.4 TFLOP/s bf16 dense (half of the sparse figure), 80 GB, 3.35 TB/s; NVLink
           900 GB/s both ways; DGX H100: eight GPUs, eight ports of 400 Gb/s
    h200   the same but 141 GB, 4.8 TB/s

Where a page says GB for memory that is GiB on the chip, the smaller number stands.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from vatt_jax.config import ConfigError

# Data sheets count in both, see above; rates are always in powers of ten.
GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates in units per second; None: unknown (the CPU).

    Attributes:
        peak: dense bf16 FLOP/s.
        memory: bytes.
        bandwidth: of that memory.
        link: one way, of one link (torus) or of all links together (switch).
        wrap: a torus axis whose length is a multiple of it closes to a ring; 0: a switch.
        network: one way, this chip's share of the network between hosts (GPU) or slices (TPU).
        host: chips of one host.
        devices: JAX devices of one chip.
        axes: of the torus.
    """

    name: str  # as written in --topology
    platform: str  # tpu | cuda | cpu
    peak: float | None = None  # FLOP/s
    memory: float | None = None  # bytes
    bandwidth: float | None = None  # bytes/s
    link: float | None = None  # bytes/s, one way
    wrap: int = 0  # chips
    network: float | None = None  # bytes/s, one way
    host: int = 1  # chips
    devices: int = 1  # JAX devices
    axes: int = 1  # numbers that a shape has


# name, platform, peak, memory, bandwidth, link, wrap, network, host. Network rates are bits over 8.
# A link's rate is the page's total divided by the ports (four on v5e and v6e, six on v5p and tpu7x)
# and, where the page counts both ways, by two.
CHIPS = {
    c.name: c
    for c in (
        # Three axes: cubes of 4 x 4 x 4 behind optical switches, which close an axis of whole cubes
        # to a ring. Two axes (v5e, v6e): only the full side of a pod, 16 chips, is closed.
        Chip('v4', 'tpu', 275e12, 32 * GIB, 1228 * GB, 50 * GB, 4, 25e9 / 8, 4, axes=3),
        Chip('v5e', 'tpu', 197e12, 16 * GB, 819 * GB, 50 * GB, 16, 25e9 / 8, 8, axes=2),
        Chip('v5p', 'tpu', 459e12, 95 * GIB, 2765 * GB, 100 * GB, 4, 50e9 / 8, 4, axes=3),
        Chip('v6e', 'tpu', 918e12, 32 * GB, 1640 * GB, 100 * GB, 16, 100e9 / 8, 8, axes=2),
        Chip(
            'tpu7x',
            'tpu',
            2307e12,
            192 * GIB,
            7380 * GB,
            100 * GB,
            4,
            100e9 / 8,
            4,
            devices=2,
            axes=3,
        ),
        # Hosts and GPUs of a host are two axes; a switch joins the GPUs of a host, each to all.
        Chip('h100', 'cuda', 989.4e12, 80 * GB, 3350 * GB, 450 * GB, 0, 400e9 / 8, 8, axes=2),
        Chip('h200', 'cuda', 989.4e12, 141 * GB, 4800 * GB, 450 * GB, 0, 400e9 / 8, 8, axes=2),
        Chip('cpu', 'cpu'),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: `slices` equal tori of `shape` chips (TPU), `shape` = (hosts, GPUs of a host), or
    (devices,) of this CPU."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1  # joined by the data-centre network; TPU only

    def __str__(self) -> str:
        return f'{self.chip.name}:{"x".join(map(str, self.shape))}' + (
            f'*{self.slices}' if self.slices > 1 else ''
        )

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        # A slice smaller than a host still takes one.
        return 1 if self.chip.platform == 'cpu' else -(-self.chips // self.chip.host)

    @property
    def island(self) -> int:
        """Devices that reach one another without the network: a slice, or the GPUs of one host."""
        return self.devices // self.slices if self.chip.platform != 'cuda' else self.shape[1]

    @property
    def link_rate(self) -> float | None:
        """Bytes a second that a *device* can take from its island over all its links, at best.

        Of each torus axis longer than one chip one link, two where the axis is a ring.
        """
        if self.chip.link is None:
            return None
        # A switch: the rate is that of all links together.
        if not self.chip.wrap:
            return self.chip.link
        # Inside an open axis a chip has two neighbours, but a collective waits for the ends, which
        # have one.
        links = sum((2 if n % self.chip.wrap == 0 else 1) for n in self.shape if n > 1)
        # A single chip has no axis to count: all of its links, so that the rate is not 0.
        return self.chip.link * (links or 2 * self.chip.axes) / self.chip.devices

    def of_device(self, rate: float | None) -> float | None:
        """A chip's rate or bytes as one device's share."""
        return None if rate is None else rate / self.chip.devices


def gpu_target(chip: Chip) -> str:
    """What XLA's compiler for GPUs has to know of a Hopper GPU that is not here.

    In its text format (GpuTargetConfigProto). Limits of compute capability 9.0: CUDA programming
    guide, table of technical specifications; 132 multiprocessors, 50 MiB of L2, 1.98 GHz: data
    sheets.
    """
    info = {
        'threads_per_block_limit': 1024,
        'threads_per_warp': 32,
        'shared_memory_per_block': 48 * 1024,
        'shared_memory_per_core': 228 * 1024,
        'shared_memory_per_block_optin': 227 * 1024,
        'threads_per_core_limit': 2048,
        # A core is a streaming multiprocessor in these names.
        'core_count': 132,
        'fpus_per_core': 128,
        'block_dim_limit_x': 2**31 - 1,
        'block_dim_limit_y': 65535,
        'block_dim_limit_z': 65535,
        'registers_per_core_limit': 65536,
        'registers_per_block_limit': 65536,
        'l2_cache_size': 50 * 2**20,
        'clock_rate_ghz': 1.98,
        'memory_bandwidth': int(chip.bandwidth or 0),
        'device_memory_size': int(chip.memory or 0),
    }
    # device_description_str is what JAX reports as device_kind on the GPU itself.
    kind = next(kind for kind, name in KINDS.items() if name == chip.name)
    fields = ' '.join(f'{key}: {value}' for key, value in info.items())
    return (
        f'gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 }} }} '
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } '
        f'runtime_version {{ major: 12 minor: 8 }} device_description_str: "{kind}"'
    )


# JAX's device_kind -> chip
# JAX calls the v5e 'TPU v5 lite' and the v5p 'TPU v5'; the product names are accepted too.
KINDS = {
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5e': 'v5e',
    'TPU v5': 'v5p',
    'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e',
    'TPU v6e': 'v6e',
    'TPU7x': 'tpu7x',
    'NVIDIA H100 80GB HBM3': 'h100',
    'NVIDIA H200': 'h200',
}


def peak_of(devices: Sequence[Any]) -> float | None:
    """FLOP/s of these JAX devices together by the data sheet; None where it is not in the table."""
    # A peak is a chip's; where a chip is two JAX devices each has half.
    chip = CHIPS.get(KINDS.get(devices[0].device_kind, ''))
    if chip is None or chip.peak is None:
        return None
    return chip.peak / chip.devices * len(devices)


def parse(text: str) -> Topology:
    """'v5p:8x8x4', 'v5e:16x16*4' (four slices), 'h100:8x8' (hosts × GPUs), 'cpu:8'.

    Raises:
        ConfigError: it is none of these; the message says what would work.
    """
    flag = f'--topology={text}'
    # chip:AxBxC, and *slices where there are several.
    found = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?', text)
    if not found:
        raise ConfigError(
            f'{flag}: expected a chip and a shape, such as v5p:8x8x4, v5e:16x16, v5e:16x16*4 '
            '(four slices), h100:8x8 (hosts × GPUs) or cpu:8'
        )
    name, shape, slices = found[1], tuple(int(n) for n in found[2].split('x')), int(found[3] or 1)
    if name not in CHIPS:
        raise ConfigError(f'{flag}: no chip {name!r}; there are {", ".join(CHIPS)}')
    chip = CHIPS[name]
    if len(shape) != chip.axes:
        example = {
            1: f'{name}:8',
            2: f'{name}:8x8' if chip.platform == 'cuda' else f'{name}:16x16',
            3: f'{name}:4x4x4',
        }[chip.axes]
        raise ConfigError(
            f'{flag}: {name} has {chip.axes} axes, {len(shape)} given; write it like {example}'
        )
    if 0 in shape or slices == 0:
        raise ConfigError(f'{flag}: every size is a positive number')
    if slices > 1 and chip.platform != 'tpu':
        raise ConfigError(f'{flag}: only TPUs come in slices; leave out *{slices}')
    if chip.platform == 'cuda' and shape[1] > chip.host:
        raise ConfigError(
            f'{flag}: a host has {chip.host} GPUs, {shape[1]} asked for; write hosts × GPUs, '
            f'such as {name}:{-(-shape[0] * shape[1] // chip.host)}x{chip.host}'
        )
    return Topology(chip, shape, slices)


def environment(topology: Topology) -> dict[str, str]:
    """What JAX is to find in the environment when it starts, to compile for this topology.

    No accelerator of this machine is touched, libtpu neither looks for hardware nor keeps others
    from being loaded, and the plugin for GPUs does not miss their libraries.
    """
    # JAX itself runs on the CPU; the target's compiler is loaded by name (planning/compilation.py).
    cpu = {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3', 'ABSL_MIN_LOG_LEVEL': '3'}
    if topology.chip.platform == 'cpu':
        return cpu | {'JAX_NUM_CPU_DEVICES': str(topology.devices)}
    return cpu | {
        # No metadata server to ask: that exists on Google's virtual machines only.
        'TPU_SKIP_MDS_QUERY': '1',
        # Stands in for what that server would say; the slice that is compiled for is named later.
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_WORKER_ID': '0',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_MIN_LOG_LEVEL': '3',
        # libtpu takes a lock on the machine's TPUs, also where there are none.
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
