"""Tables of the host: rows by training record that steps read and write (`Objective.tables`).

Every host has the whole table, as it has whole columns (columns.py): any clip may look up any row.
A step is given the rows that its clips look up, and returns new rows of the batch's records, of all
hosts to all hosts, which store them. Two steps overlap:

    step n      computes on the devices
    host        stores what step n - 1 wrote, then reads rows for step n + 1
    devices     put rows that step n wrote in the place of those that the host read too early

so the host never waits for a step that the next one could not wait for too, and every step sees
what all steps before it wrote.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import device_part, place_on_mesh
from vatt_jax.objectives.base import Objective
from vatt_jax.parallel import hosts, sharding
from vatt_jax.rng import Rng
from vatt_jax.training import columns, train_state
from vatt_jax.training.columns import Columns
from vatt_jax.training.metrics import Meter
from vatt_jax.training.table_storage import Snapshot, StoredTable

# Rows lie anywhere, so reading them waits for memory, or for a disk: several readers wait at once.
READERS = 8
# Records whose first rows are made at once.
MADE_AT_ONCE = 1 << 16


def first(objective: Objective, tables: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> Columns:
    """The tables of a run that begins: name -> [M …].

    Each host makes the rows of its records, and they are joined, so that all have the same bits.

    Args:
        objective: whose tables they are.
        tables: name -> [M …], abstract.
        seed: of the run.
    """
    parts = {}
    for name, table in tables.items():
        own = hosts.own_stretch(len(table))
        shape = (own.stop - own.start, *table.shape[1:])
        parts[name] = columns.room_for(shape, np.dtype(table.dtype))
        row = jax.ShapeDtypeStruct(table.shape[1:], table.dtype)
        # Without optimisation, as the state is initialised: both give a record the same bits.
        make = jax.jit(
            functools.partial(objective.first_rows, name=name, row=row),
            compiler_options={'xla_backend_optimization_level': 0},
        )
        with _host_device():
            key = train_state.objective_key(seed)
            for begin in range(0, shape[0], MADE_AT_ONCE):
                part = parts[name][begin : begin + MADE_AT_ONCE]
                # One shape for all blocks: what is beyond the last one is thrown away.
                records = own.start + begin + np.arange(min(MADE_AT_ONCE, shape[0]))
                made = make(key, records=records.astype(np.int32))
                part[:] = np.asarray(made)[: len(part)]
    return {name: columns.writable(table) for name, table in columns.join(parts).items()}


class HostTables:
    """The tables of a run, between two steps.

    Args:
        arrays: name -> [M …], as the run goes on with them; they are written in place.
        objective: whose tables they are.
        mesh: of the run.
        seed: of the run.
        meter: the time that steps wait for rows is added to it.
    """

    def __init__(self, arrays: Columns, objective: Objective, mesh: Mesh, seed: int, meter: Meter):
        self.mesh = mesh
        self.seed = seed
        self.meter = meter
        self._tables = {name: StoredTable(array) for name, array in arrays.items()}
        self._lookups = jax.jit(functools.partial(_lookups, objective), static_argnums=2)
        rows = sharding.batch_sharding(mesh)
        # The rows that were read are replaced in their own memory.
        self._overlay = jax.jit(_overlay, donate_argnums=0, out_shardings=rows)
        # What the newest step wrote, {'records': [B], 'rows': {name: [B …]}}, still to be computed.
        self._pending: dict[str, Any] | None = None
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, 'table-rows')

    def place(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The device batch of a host batch, joined with the rows that its clips look up.

        Args:
            batch: this host's rows.
            step: optimizer steps taken.
        """
        device_batch = place_on_mesh(batch, self.mesh)
        if not self._tables:
            return device_batch
        began = time.monotonic()
        lookups = self._looked_up(batch, step)  # [b K]
        rows = {name: self._read(table, lookups) for name, table in self._tables.items()}
        self.meter.waited += time.monotonic() - began

        def to_devices(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh), x)

        tables = jax.tree.map(to_devices, rows)
        if self._pending is not None:
            tables = self._overlay(tables, to_devices(lookups), self._pending)
        return {**device_batch, 'tables': tables}

    def hold(self, written: dict[str, Any] | None) -> None:
        """Takes what a step writes that was just dispatched; stores what the one before wrote."""
        self.settle()
        self._pending = written

    def settle(self) -> None:
        """Stores what is held, if anything, which waits for its step."""
        if self._pending is None:
            return
        written, self._pending = self._pending, None
        records = np.asarray(written['records'])
        for name, rows in written['rows'].items():
            self._tables[name].store(records, np.asarray(rows))

    def snapshots(self) -> dict[str, Snapshot]:
        """The tables as they are, for a checkpoint, which is written while steps go on."""
        found = {}
        for name, table in self._tables.items():
            found[name] = table.snapshot(hosts.own_stretch(len(table.array)))
        return found

    def close(self) -> None:
        """Ends the readers."""
        self._readers.shutdown()

    def _looked_up(self, batch: Mapping[str, Any], step: int) -> Int[np.ndarray, 'b K']:
        """The records whose rows this host's clips are given."""
        inputs = {name: batch[name] for name in ('record', 'columns') if name in batch}
        num_records = len(next(iter(self._tables.values())).array)
        with _host_device():
            # As the step makes it (train_step.make).
            rng = Rng.create(self.seed, np.int32(step), device_part(batch)['position'])
            return np.asarray(self._lookups(inputs, rng, num_records))

    def _read(
        self, table: StoredTable, lookups: Int[np.ndarray, 'b K']
    ) -> Shaped[np.ndarray, 'b K ...']:
        rows = np.empty((*lookups.shape, *table.array.shape[1:]), table.array.dtype)
        clips = np.array_split(np.arange(len(lookups)), min(READERS, len(lookups)))
        reads = []
        for part in clips:
            chosen = slice(part[0], part[-1] + 1)
            reads.append(self._readers.submit(table.read, lookups[chosen], rows[chosen]))
        for read in reads:
            read.result()
        return rows


@contextlib.contextmanager
def _host_device() -> Iterator[None]:
    """Compute on the host's own processor.

    The queue of an accelerator holds the step under way, and the result would wait for it.

    Raises:
        ConfigError: JAX was told to do without it.
    """
    try:
        device = jax.local_devices(backend='cpu')[0]
    except RuntimeError as error:
        raise ConfigError(
            f'memories on the host: expected JAX to have the backend of the host beside '
            f'{jax.default_backend()}, got {error}; add it (JAX_PLATFORMS=cuda,cpu) or leave '
            'JAX_PLATFORMS unset'
        ) from error
    with jax.set_mesh(Mesh(np.array([device]), ('host',))):
        yield


def _lookups(
    objective: Objective, batch: Mapping[str, Any], rng: Rng, num_records: int
) -> jax.Array:
    return objective.lookups(batch, rng, num_records)


def _overlay(
    tables: Mapping[str, Shaped[Array, 'B K ...']],
    lookups: Int[Array, 'B K'],
    written: Mapping[str, Any],
) -> dict[str, Shaped[Array, 'B K ...']]:
    """The rows that were read, those of records that a step wrote by what it wrote."""
    records = written['records']
    order = jnp.argsort(records)
    # A clip of each record that is looked up, if there is one. Clips of one record wrote the same.
    place = jnp.searchsorted(records[order], lookups)
    clip = order[jnp.minimum(place, len(records) - 1)]  # [B K]
    is_written = (records[clip] == lookups)[..., None]
    newest = {}
    for name, rows in tables.items():
        newest[name] = jnp.where(is_written, written['rows'][name][clip], rows)
    return newest
