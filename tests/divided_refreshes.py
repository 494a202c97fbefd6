"""Refreshes of which each process has its own records: a program that several processes run.

python -m tests.divided_refreshes FOLDER
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import tiny_refreshes
from vatt_jax.parallel import distributed, hosts
from vatt_jax.training import columns


def main(folder: pathlib.Path) -> None:
    """Write what this process found to FOLDER/<process>.npz."""
    distributed.initialize(timeout=60)
    found = tiny_refreshes.run(hosts.own_stretch(tiny_refreshes.NUM_RECORDS))
    # Small blocks and a file, as of large columns.
    hosts.EXCHANGED_BYTES = 256
    found['own stretch'] = own_stretch_of_rows()
    columns.MAPPED_BYTES = 1
    labels = {name: part for name, part in found.items() if name.startswith('column/')}
    joined = columns.join(labels)
    assert all(isinstance(column, np.memmap) for column in joined.values())
    np.savez(folder / f'{jax.process_index()}.npz', **{**found, **joined})
    distributed.leave()


def own_stretch_of_rows() -> np.ndarray:
    """This process's records of an array whose first rows lie with the last process."""
    mesh = Mesh(np.array(jax.devices())[::-1].reshape(4, 2), ('rows', 'copies'))
    make = jax.jit(rows_of_array, out_shardings=NamedSharding(mesh, PartitionSpec('rows')))
    return hosts.own_stretch_of(make(), tiny_refreshes.NUM_RECORDS)


def rows_of_array() -> jax.Array:
    """int32 [608 3], a few rows more than there are records."""
    return jnp.arange(608 * 3, dtype=jnp.int32).reshape(608, 3) ** 2


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
