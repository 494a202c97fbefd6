"""Refreshes of which each process has its own records: a program that several processes run.

python -m tests.divided_refreshes FOLDER
"""

import pathlib
import sys

import jax
import numpy as np

from tests import tiny_refreshes
from vatt_jax.parallel import distributed, hosts
from vatt_jax.training import columns


def main(folder: pathlib.Path) -> None:
    """Write what this process found to FOLDER/<process>.npz."""
    distributed.initialize(timeout=60)
    found = tiny_refreshes.run(hosts.own_stretch(tiny_refreshes.NUM_RECORDS))
    # Small blocks and a file, as of large columns.
    hosts.EXCHANGED_BYTES = 256
    columns.MAPPED_BYTES = 1
    labels = {name: part for name, part in found.items() if name.startswith('column/')}
    joined = columns.join(labels)
    assert all(isinstance(column, np.memmap) for column in joined.values())
    np.savez(folder / f'{jax.process_index()}.npz', **{**found, **joined})
    distributed.leave()


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
