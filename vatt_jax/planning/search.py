"""Other ways to run the same model: which of them is the fastest that fits."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.performance import chips

# Widths are those of `_line` and of the columns in `consider`.
HEADER = (
    f'{"fsdp":>5} {"remat":>6} {"batch":>7} {"a device":>9} {"peak GB":>8} {"ms":>8} '
    f'{"clips/s":>9} {"MFU %":>6}  limited by'
)


def search(
    config: ConfigDict,
    data: Any,
    topology: chips.Topology,
    folder: pathlib.Path | None,
    notes: Iterable[str] = (),
    report: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Find the fastest plan that fits, by its bound.

    FSDP width is varied first, then rematerialisation, then clips per device, each with the best
    so far. What `folder` holds already is read, so an interrupted search goes on where it was.

    Args:
        config: where the search begins; it is not changed.
        data: the data object, see `plan`.
        topology: the machine that is planned for.
        folder: where plans are stored, None for nowhere.
        notes: sentences to be shown with each plan.
        report: takes a line about each plan as soon as it is known.

    Returns:
        The best plan, {} where none fits.
    """
    report(HEADER)
    candidates = _Search(config, data, topology, folder, notes, report)
    # One field after the other, not all combinations: each plan is a whole compile, of minutes.
    candidates.consider({})
    # A fixed number of replicas leaves fsdp no other width.
    if config.mesh.replica == -1:
        for width in _fsdp_widths(config, topology):
            candidates.consider({'mesh.fsdp': width})
    # From the fastest, which stores all activations, to the smallest.
    for remat in ('none', 'dots', 'full'):
        candidates.consider({'model.remat': remat})
    # Half first: if nothing fits yet, a smaller batch may.
    for factor in (0.5, 2, 4):
        # Read anew each time: once a larger batch is the best, the next is larger still.
        batch_size = int(candidates.best_config.batch_size * factor)
        candidates.consider({'batch_size': batch_size})

    best = candidates.best_config
    if candidates.best is None:
        report('none of these fits')
        return {}
    report(
        f'fastest that fits: config.mesh.fsdp={best.mesh.fsdp}, '
        f'config.model.remat={best.model.remat!r}, config.batch_size={best.batch_size}'
    )
    return candidates.best


def _fsdp_widths(config: ConfigDict, topology: chips.Topology) -> list[int]:
    """No sharding, over the devices of a host, over those of an island (slice)."""
    # abs: -1 stands for the rest, and is one device at the least.
    data_parallel = topology.devices // (abs(config.mesh.model) * abs(config.mesh.seq))
    host_devices = topology.chip.host * topology.chip.devices
    widths = {1, min(host_devices, data_parallel), min(topology.island, data_parallel)}
    return sorted(widths)


class _Search:
    """The plans seen so far and the best of them."""

    def __init__(
        self,
        config: ConfigDict,
        data: Any,
        topology: chips.Topology,
        folder: pathlib.Path | None,
        notes: Iterable[str],
        report: Callable[[str], Any],
    ) -> None:
        self.data, self.topology, self.folder = data, topology, folder
        self.notes = notes
        self.report = report
        # Until some plan fits, changes are made to the config that was given.
        self.best: dict[str, Any] | None = None
        self.best_config = config
        self.seen: set[tuple[int, str, int]] = set()

    def consider(self, changes: Mapping[str, Any]) -> None:
        """Plan the best config so far with some fields changed, unless that was done before."""
        # Imported here: `plan` has `search` among its own names.
        from vatt_jax.planning import plan as plans

        config = self.best_config.copy_and_resolve_references()
        # override() takes what a command line would hold, strings, and checks them.
        configs.override(config, [(field, str(value)) for field, value in changes.items()])
        # The three fields that are varied; several rounds may arrive at the same values.
        key = config.mesh.fsdp, config.model.remat, config.batch_size
        if key in self.seen:
            return
        columns = f'{key[0]:>5} {key[1]:>6} {key[2]:>7}'
        try:
            result = plans.plan(config, self.data, self.topology, self.folder, self.notes)
        except ConfigError as error:
            # Such as a batch that does not divide over the devices: the search goes on.
            self.report(f'{columns}  {error}')
            return
        self.seen.add(key)
        self.report(f'{columns} {_line(result)}')
        if self._is_better(result):
            self.best, self.best_config = result, config

    def _is_better(self, result: Mapping[str, Any]) -> bool:
        # None (unknown) counts as fitting.
        if result['memory']['fits'] is False or 'bound' not in result['roofline']:
            return False
        if self.best is None:
            return True
        # Clips per second, not time of a step: the batch is one of the fields that vary.
        return result['roofline']['clips_per_s'] > self.best['roofline']['clips_per_s']


def _line(result: Mapping[str, Any]) -> str:
    memory, roofline = result['memory'], result['roofline']
    peak = '?' if memory['peak'] is None else f'{memory["peak"] / 1e9:.2f}'
    columns = f'{result["per_device_batch"]:>9g} {peak:>8}'
    if memory['fits'] is False:
        return f'{columns}   does not fit'
    if 'bound' not in roofline:
        return f'{columns}   no roofline'
    return (
        f'{columns} {1e3 * roofline["bound"]:>8.1f} {roofline["clips_per_s"]:>9.0f} '
        f'{100 * roofline["mfu"]:>6.1f}  {roofline["limited_by"]}'
    )
