#!/usr/bin/env python
"""Trains, evaluates, embeds, reports and plans: the entry point of runs in a clone.

python run.py                                                    # the demo, into runs/demo
python run.py --config=configs/demo.py:agnostic --workdir=runs/agnostic --config.seed=1
python run.py --mode=eval   --workdir=runs/demo                  # newest checkpoint, own config

Everything else: python run.py --help. Where the package is installed, `vatt-jax` is the same
command. Its body is vatt_jax/cli.py.
"""

import sys

try:
    from vatt_jax.cli import entry, main, open_data, read_config
    from vatt_jax.modes.process import keep_freed_memory
except ModuleNotFoundError as missing:
    # Another Python than the one that has the dependencies; a module of our own is a bug.
    if str(missing.name).partition('.')[0] in ('vatt_jax', 'data_pipelines'):
        raise
    print(
        f'error: {sys.executable} has no module {missing.name!r}; use .venv/bin/python, which make '
        'sets up, or install what is needed: pip install .',
        file=sys.stderr,
    )
    sys.exit(2)

__all__ = ['entry', 'keep_freed_memory', 'main', 'open_data', 'read_config']

if __name__ == '__main__':
    entry()
