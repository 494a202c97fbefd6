#!/usr/bin/env python
"""Trains, evaluates, embeds, reports and plans: the one entry point of runs.

python run.py                                                    # the demo, into runs/demo
python run.py --config=configs/demo.py:agnostic --workdir=runs/agnostic --config.seed=1
python run.py --mode=eval   --workdir=runs/demo                  # newest checkpoint, own config
python run.py --mode=embed  --workdir=runs/demo --split=test     # embeddings of a split, as npz
python run.py --mode=report --workdir=runs/demo                  # report/index.html
python run.py --mode=deflate --workdir=runs/mmv --out=runs/mmv_image   # for images: docs/mmv.md
python run.py --mode=plan --workdir=runs/plan --config=configs/vatt.py:mbs --topology=v5p:4x4x4
                                               # before the machines are rented: docs/scaling.md
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any, NoReturn

from ml_collections import ConfigDict

import data_pipelines
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.modes import process
from vatt_jax.modes.process import keep_freed_memory as keep_freed_memory  # benchmarks call it

# TensorFlow, which is imported late, decodes on the host and need not introduce itself.
# Read when TensorFlow is loaded, so before any import that might; setdefault leaves the user's own
# choice.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

MODES = ('train', 'eval', 'embed', 'report', 'deflate', 'plan')


def main(argv: list[str]) -> None:
    """Runs one mode. Each is imported when it is asked for: JAX takes seconds to import."""
    flags, overrides = parse(argv)
    workdir = pathlib.Path(flags.workdir)
    # Needs no config of its own and no device.
    if flags.mode == 'report':
        from vatt_jax.modes import report

        report.run(workdir, flags.compare.split(',') if flags.compare else ())
        return
    config = read_config(flags, overrides, workdir)
    # Before `process.prepare`, which would start the devices of this machine.
    if flags.mode == 'plan':
        from vatt_jax.modes import plan

        topology = flags.topology or topology_of(flags.machine)
        open_any = data_pipelines.open_or_synthetic
        plan.run(config, workdir, open_any, topology, flags.quick, flags.search)
        return

    # Sets the platform; what is imported below may use JAX at once.
    process.prepare(config, workdir)
    from vatt_jax.modes import deflate, embed, evaluate, train
    from vatt_jax.parallel import distributed

    if flags.mode == 'train':
        train.run(config, workdir, open_data, flags.quiet)
    elif flags.mode == 'eval':
        evaluate.run(config, workdir, open_data)
    elif flags.mode == 'embed':
        embed.run(config, workdir, open_data, flags.split)
    else:
        deflate.run(config, workdir, open_data, flags.out, flags.naive, flags.fit, flags.rate)
    # Last of all: no collective may come after it.
    distributed.leave()


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError, told as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message}; see python run.py --help')


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and ('field.path', 'text') of every --config.field.path=text."""
    parser = Parser(
        prog='run.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # --con would otherwise stand for --config, and a typo would train.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        '--config',
        default='',
        help="FILE.py[:arg]; default: the folder's own, else configs/demo.py",
    )
    add('--workdir', default='runs/demo', help='the run folder')
    add('--mode', default='train', choices=MODES)
    add('--quiet', action='store_true', help='plain log lines instead of the live one')
    add('--split', default='test', help='embed: which split of config.data.eval')
    add('--machine', default='', help='entry of configs/machines.py, whose mesh the config takes')
    add(
        '--topology',
        default='',
        help='plan: v5p:8x8x4 | v5e:16x16 | v6e:16x16 | tpu7x:4x4x4 | v5e:16x16*4 (four slices) | '
        'h100:8x8 (hosts × GPUs) | cpu:8; default: that of --machine',
    )
    add(
        '--quick',
        action='store_true',
        help='plan, TPU and GPU: stop before code is generated; several times faster, memory is '
        'that of the buffer assignment',
    )
    add('--search', action='store_true', help='plan: vary batch per device, remat and FSDP width')
    add('--compare', default='', help='report: other run folders shown beside it, with commas')
    add('--out', default='', help='deflate: the run folder to make')
    add('--naive', action='store_true', help='deflate: sum the kernels, and fit nothing')
    add('--fit', default=1000, type=int, help='deflate: steps of config.batch_size pictures')
    add('--rate', default=1e-3, type=float, help='deflate: first learning rate of these steps')

    # Fields are open-ended, so argparse cannot know them: --config.* is taken out first. Both
    # --config.a=1 and --config.a 1 are accepted.
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix('--config.').partition('=')
        value = text if equals else next(words, None)
        if value is None:
            raise ConfigError(f'--config.{name} lacks a value; write --config.{name}=VALUE')
        overrides.append((name, value))
    return parser.parse_args(rest), overrides


def read_config(
    flags: argparse.Namespace, overrides: list[tuple[str, str]], workdir: pathlib.Path
) -> ConfigDict:
    """The config with overrides, checked against configs/default.py."""
    from configs import default, machines

    stored = configs.stored(workdir)
    if stored is None and flags.mode not in ('train', 'plan'):
        raise ConfigError(
            f'--workdir={workdir} holds no run (no config.json); '
            'train first, or name another folder'
        )
    # A given config counts before the stored one; start compares the two.
    if flags.config or stored is None:
        config = configs.load(flags.config or 'configs/demo.py')
    else:
        # A run older than some fields: the defaults keep its behaviour.
        config = configs.complete(stored, default.get_config())
    # Machine first, then overrides: a field given by hand counts over the machine's.
    if flags.machine:
        machines.apply(config, flags.machine)
    configs.override(config, overrides)
    # After the overrides, which may have replaced whole groups.
    configs.check_fields(config, default.get_config())
    return config


def topology_of(machine: str) -> str:
    """Topology of an entry of configs/machines.py; '' for none."""
    from configs import machines

    return machines.MACHINES[machine].topology if machine else ''


def open_data(config: ConfigDict) -> Any:
    """The data object; makes the playground first where the config asks for it.

    That takes minutes, so what is wrong with the config whatever the data say is found before.
    """
    from vatt_jax.training import loop

    return data_pipelines.open_or_make(config, loop.check)


def entry() -> None:
    """main(), with a user's mistakes (exit code 2) and failed runs (1) told in one sentence."""
    process.exit_with_sentence(main, sys.argv[1:])


if __name__ == '__main__':
    entry()
