"""Machines by name: the mesh that a config takes to run there. The rest of the config stays.

    python run.py --config=configs/vatt.py:mbs --machine=v5p_64 --workdir=runs/mbs
    python run.py --mode=plan --config=configs/vatt.py:mbs --machine=v5p_64 --workdir=runs/plan
        before the machine is rented

Another width is one flag away: --machine=v5e_256 --config.mesh.fsdp=16.
"""

import dataclasses

from ml_collections import ConfigDict

from vatt_jax.config import choose


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine and the mesh that suits it.

    Attributes:
        topology: what --mode=plan compiles for.
        platform: config.jax_platform.
        replica, fsdp, model, seq: sizes of the mesh axes; -1: all devices that are left.
    """

    topology: str
    platform: str
    replica: int = -1
    fsdp: int = 1
    model: int = 1
    seq: int = 1


MACHINES = {
    'cpu': Machine('cpu:1', 'cpu', replica=1),
    'gpu': Machine('h100:1x1', 'cuda', replica=1),
    # One host.
    'gpu_8': Machine('h100:1x8', 'cuda'),
    # Eight hosts; parameters are sharded inside each, gradients are summed between them.
    'gpu_64': Machine('h100:8x8', 'cuda', fsdp=8),
    'v5e_16': Machine('v5e:4x4', 'tpu'),
    'v5e_256': Machine('v5e:16x16', 'tpu'),
    'v5p_64': Machine('v5p:4x4x4', 'tpu'),
    'v5p_256': Machine('v5p:4x8x8', 'tpu'),
    'v6e_256': Machine('v6e:16x16', 'tpu'),
    # Four slices; only gradients cross between them.
    'v5e_1024': Machine('v5e:16x16*4', 'tpu'),
}


def apply(config: ConfigDict, name: str) -> None:
    """Sets config.mesh and config.jax_platform in place.

    Raises:
        ConfigError: no machine has this name.
    """
    machine = MACHINES[choose(name, MACHINES, '--machine')]
    config.mesh.update(
        {
            'replica': machine.replica,
            'fsdp': machine.fsdp,
            'model': machine.model,
            'seq': machine.seq,
        }
    )
    config.jax_platform = machine.platform
