"""Machines by name: the mesh block that a config takes to run there. Everything else of the config stays what it is.

    python run.py --config=configs/vatt.py:mbs --machine=v5p_64 --workdir=runs/mbs
    python run.py --mode=plan --config=configs/vatt.py:mbs --machine=v5p_64 --workdir=runs/plan      # before it is rented

Another width is one flag away: --machine=v5e_256 --config.mesh.fsdp=16.
"""

import dataclasses

from vatt_jax.config import choose


@dataclasses.dataclass(frozen=True)
class Machine:
    """topology: for --mode=plan. platform: config.jax_platform. mesh: sizes by axis; -1: all devices that are left."""

    topology: str
    platform: str
    replica: int = -1
    fsdp: int = 1
    model: int = 1
    seq: int = 1


MACHINES = {
    'cpu': Machine('cpu:1', 'cpu', replica=1),
    'gpu': Machine('h100:1x1', 'cuda', replica=1),
    'gpu_8': Machine('h100:1x8', 'cuda'),  # one host
    'gpu_64': Machine(
        'h100:8x8', 'cuda', fsdp=8
    ),  # eight hosts; parameters are shared inside each, gradients summed between them
    'v5e_16': Machine('v5e:4x4', 'tpu'),
    'v5e_256': Machine('v5e:16x16', 'tpu'),
    'v5p_64': Machine('v5p:4x4x4', 'tpu'),
    'v5p_256': Machine('v5p:4x8x8', 'tpu'),
    'v6e_256': Machine('v6e:16x16', 'tpu'),
    'v5e_1024': Machine('v5e:16x16*4', 'tpu'),  # four slices: only gradients cross between them
}


def apply(config, name: str) -> None:
    """Sets config.mesh and config.jax_platform in place. Raises ConfigError for an unknown name."""
    m = MACHINES[choose(name, MACHINES, '--machine')]
    config.mesh.update({'replica': m.replica, 'fsdp': m.fsdp, 'model': m.model, 'seq': m.seq})
    config.jax_platform = m.platform
