"""The command line: `vatt-jax`, `python -m vatt_jax`, and run.py of a clone."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import named_configs, phases
from vatt_jax.command_line import run_command
from vatt_jax.config import ConfigError
from vatt_jax.modes import process
from vatt_jax.modes import workdir as workdirs
from vatt_jax.modes.flags import parse
from vatt_jax.object_store import StoreSettings, check_local

# TensorFlow, which is imported late, decodes on the host and need not introduce itself.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


def main(argv: list[str]) -> None:
    """Runs one mode. Each is imported when it is asked for: JAX takes seconds to import."""
    flags, overrides = parse(argv, run_command())
    check_local(flags.out, '--out')
    if flags.mode == 'report':
        from vatt_jax.modes import report

        others = flags.compare.split(',') if flags.compare else ()
        with workdirs.opened(flags.workdir, flags.mode, StoreSettings()) as workdir:
            report.run(workdir, [os.path.expanduser(folder) for folder in others])
        return
    if flags.mode == 'search':
        from vatt_jax.modes import search

        flags.workdir = search.model_folder(flags.index, flags.workdir)
    config = read_config(flags, overrides, workdirs.with_config(flags.workdir))
    settings = StoreSettings.from_config(config)
    if flags.mode == 'plan':
        import data_pipelines
        from vatt_jax.modes import plan

        topology = flags.topology or topology_of(flags.machine)
        open_any = data_pipelines.open_or_synthetic
        with workdirs.opened(flags.workdir, flags.mode, settings) as workdir:
            plan.run(config, workdir, open_any, topology, flags.quick, flags.search)
        return

    process.prepare(config, workdirs.for_compiled(flags.workdir))
    from vatt_jax.parallel import distributed

    with workdirs.opened(flags.workdir, flags.mode, settings) as workdir:
        run_mode(flags, config, workdir)
        # Before the last upload: until then, other processes may write.
        distributed.leave()


def run_mode(flags: argparse.Namespace, config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs a mode that computes. Evaluators, trackers and the search load for theirs alone."""
    if flags.mode == 'train':
        run_training(flags, config, workdir)
        return
    # The others work with one model.
    config, workdir = phases.config_of_model(config, workdir), phases.model_folder(workdir)
    if flags.mode == 'eval':
        from vatt_jax.modes import evaluate

        evaluate.run(config, workdir, open_data)
    elif flags.mode == 'embed':
        from vatt_jax.modes import embed

        embed.run(config, workdir, open_data, flags.split or 'test')
    elif flags.mode == 'index':
        from vatt_jax.modes import index

        index.run(workdir, flags.videos, flags.out, flags.window, flags.stride, flags.workdir)
    elif flags.mode == 'search':
        from vatt_jax.modes import search

        search.run(workdir, flags)
    elif flags.mode == 'export':
        from vatt_jax.modes import export

        export.run(workdir, flags.out, flags.licence)
    elif flags.mode == 'pseudo_boxes':
        from vatt_jax.modes import pseudo_boxes

        splits = tuple((flags.split or 'train').split(','))
        options = pseudo_boxes.Options(splits, flags.beta, flags.boxes, flags.score, flags.true)
        pseudo_boxes.run(config, workdir, open_data, flags.out, options)
    else:
        from vatt_jax.modes import deflate

        deflate.run(config, workdir, open_data, flags.out, flags.naive, flags.fit, flags.rate)


def run_training(flags: argparse.Namespace, config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs --mode=train, of one training or of several."""
    if config.phases:
        from vatt_jax.modes import train_phases

        train_phases.run(config, workdir, open_data, flags.quiet)
    else:
        from vatt_jax.modes import train

        train.run(config, workdir, open_data, flags.quiet)


def read_config(
    flags: argparse.Namespace, overrides: list[tuple[str, str]], workdir: pathlib.Path
) -> ConfigDict:
    """The config with overrides, checked against configs/default.py."""
    default = named_configs.module('default')
    stored = configs.stored(workdir)
    if stored is None and flags.mode not in ('train', 'plan'):
        raise ConfigError(
            f'--workdir={flags.workdir} holds no run (no config.json); '
            'train first, or name another folder'
        )
    if flags.config or stored is None:
        config = configs.load(flags.config or 'configs/demo.py')
    else:
        # A run older than some fields: the defaults keep its behaviour.
        config = configs.fill_missing(stored, default.get_config())
    if flags.machine:
        named_configs.module('machines').apply(config, flags.machine)
    phases.override(config, overrides)
    configs.check_fields(config, default.get_config())
    return config


def topology_of(machine: str) -> str:
    """Topology of an entry of configs/machines.py; '' for none."""
    return named_configs.module('machines').MACHINES[machine].topology if machine else ''


def open_data(config: ConfigDict) -> Any:
    """The data object; makes the playground first where the config asks for it.

    That takes minutes, so what is wrong with the config whatever the data say is found before.
    """
    import data_pipelines

    def check(config: ConfigDict) -> None:
        # Of no use to modes that find their data made.
        from vatt_jax.training import loop

        loop.check(config)

    return data_pipelines.open_or_make(config, check)


def entry() -> None:
    """main(), with a user's mistakes (exit code 2) and failed runs (1) told in one sentence."""
    process.exit_with_sentence(main, sys.argv[1:])
