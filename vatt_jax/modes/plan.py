"""--mode=plan: what a run would take on machines that need not be here."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import phase_folders, phases
from vatt_jax.config import ConfigError
from vatt_jax.performance import chips
from vatt_jax.run_folder import RunFolder, write_atomically


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], tuple[Any, list[str]]],
    topology: str,
    quick: bool = False,
    search: bool = False,
) -> None:
    """Prints the plan of a run and keeps it in <workdir>/plan/, as a table and as JSON.

    Of a run with phases the plan of each, in its own folder.

    Args:
        config: of the run.
        workdir: its folder.
        open_data: config -> (data object, remarks about it); stands in for data that are not here.
        topology: such as v5p:4x4x4, see `chips.parse`.
        quick: stop before code is generated.
        search: vary the batch per device, rematerialisation and FSDP width.

    Raises:
        ConfigError: no topology, or one that the config does not fit.
    """
    if not topology:
        raise ConfigError(
            '--mode=plan: expected --topology, such as v5p:4x4x4, v5e:16x16, h100:8x8 or cpu:8, '
            'or --machine'
        )
    if search and quick:
        raise ConfigError(
            '--quick leaves the compiler at work when its plan is made, and --search has further '
            'plans to make; drop one of them'
        )
    target = chips.parse(topology)
    # Before JAX starts; a config may have imported it, which does not start it.
    os.environ.update(chips.environment(target))
    import jax

    # The host only drives the compiler. Whatever accelerator it has is not the one planned for.
    jax.config.update('jax_platforms', 'cpu')
    if target.chip.platform == 'cpu':
        # A CPU topology is compiled for, and so simulated by, as many devices of this host.
        jax.config.update('jax_num_cpu_devices', target.devices)
    found = phases.resolve(config, workdir)
    for phase in found:
        print(f'phase {phase.number} of {len(found)}: {phase.name}', flush=True)
        _plan_one(phase.config, phase.folder, open_data, target, quick, search)
    if not found:
        _plan_one(config, workdir, open_data, target, quick, search)
    if quick:
        os._exit(0)  # the compiler is still at work, and Python would wait for it


def _plan_one(
    config: ConfigDict,
    workdir: pathlib.Path,
    open_data: Callable[[ConfigDict], tuple[Any, list[str]]],
    target: chips.Topology,
    quick: bool,
    search: bool,
) -> None:
    # An array made at import time would start a backend, before the settings of `run`.
    from vatt_jax.planning import plan, reading

    data, remarks = open_data(config)
    _describe_phase(config, workdir, data)
    folder = RunFolder(workdir).plans
    if search:
        plan.search(config, data, target, folder, remarks)
        return
    result = plan.plan(config, data, target, folder, remarks, quick)
    print(plan.table(result), end='', flush=True)
    # Not kept with the plan: it is of the machine that plans.
    reader = reading.measure(config, data)
    line = reading.of_plan(reader, result) if reader else None
    if line:
        print(f'reading: {line}', flush=True)


def _describe_phase(config: ConfigDict, workdir: pathlib.Path, data: Any) -> None:
    """Writes the config of a phase into its folder, where later ones look for its model."""
    file = RunFolder(workdir).config
    if file.exists() or phase_folders.number_and_name(workdir) is None:
        return
    from vatt_jax.training import loop

    described = config.copy_and_resolve_references()
    loop.resolve(described, data)
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, configs.to_json(phase_folders.with_references(described, workdir)))
