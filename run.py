#!/usr/bin/env python
"""Trains, evaluates, embeds, reports and plans: the entry point of runs in a clone.

python run.py                                                    # the demo, into runs/demo
python run.py --config=configs/demo.py:agnostic --workdir=runs/agnostic --config.seed=1
python run.py --mode=eval   --workdir=runs/demo                  # newest checkpoint, own config

Everything else: python run.py --help. Where the package is installed, `vatt-jax` is the same
command. Its body is vatt_jax/cli.py.
"""

from vatt_jax.cli import entry, main, open_data, read_config
from vatt_jax.modes.process import keep_freed_memory

__all__ = ['entry', 'keep_freed_memory', 'main', 'open_data', 'read_config']

if __name__ == '__main__':
    entry()
