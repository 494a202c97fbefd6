"""Rows on hosts -> rows spread over devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Int, Int32, Shaped

from vatt_jax.parallel import hosts


def mesh_by_process(mesh: Mesh) -> Mesh:
    """The mesh with the devices of each process side by side, and without axis types.

    That of one process keeps its order.
    """
    devices = sorted(mesh.devices.flat, key=lambda device: device.process_index)
    return Mesh(np.array(devices).reshape(mesh.devices.shape), mesh.axis_names)


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How rows lie on devices: each process has some, and they lie on its own devices.

    Rows are numbered through, those of process 0 first. On the devices the rows of each process are
    followed by its padding.

    Attributes:
      sharding: By rows, over all axes of a mesh of `mesh_by_process`.
      lengths: Rows of each process of the mesh, without padding.
      num_devices: Devices of each process.
      process: This one's number among those of the mesh.
      rows_per_device: With padding; shard_map takes equal shares only.
    """

    sharding: NamedSharding
    lengths: tuple[int, ...]
    num_devices: tuple[int, ...]
    process: int
    rows_per_device: int

    @property
    def total(self) -> int:
        """Rows of all processes, without padding."""
        return sum(self.lengths)

    @property
    def own(self) -> slice:
        """The numbers of this process's rows."""
        first = sum(self.lengths[: self.process])
        return slice(first, first + self.lengths[self.process])

    @property
    def counts(self) -> Int32[np.ndarray, ' devices']:
        """Rows of each device that are no padding."""
        counts = []
        for length, num_devices in zip(self.lengths, self.num_devices):
            begins = self.rows_per_device * np.arange(num_devices)
            counts.append(np.clip(length - begins, 0, self.rows_per_device))
        return np.concatenate(counts).astype(np.int32)

    @property
    def first_places(self) -> list[int]:
        """Where the rows of each process begin on the devices."""
        first_devices = np.cumsum(self.num_devices) - self.num_devices
        return (self.rows_per_device * first_devices).tolist()

    def places(self, numbers: Int[np.ndarray, ' n']) -> Int[np.ndarray, ' n']:
        """Where rows of these numbers lie on the devices, padding counted."""
        ends = np.cumsum(self.lengths)
        process = np.searchsorted(ends, numbers, side='right')
        shift = np.array(self.first_places) - (ends - self.lengths)
        return numbers + shift[process]

    def place(self, own: Shaped[np.ndarray, 'n ...']) -> jax.Array:
        """Spreads rows over all devices, padded with zeros.

        Args:
          own: The rows of this process.
        """
        num_rows = self.rows_per_device * self.sharding.mesh.size
        first_place = self.first_places[self.process]

        # Each process is asked for the rows of its own devices only, and only the part that
        # reaches beyond its last row is copied.
        def part(index: Any) -> np.ndarray:  # a slice for each axis
            first, last, _ = index[0].indices(num_rows)
            rows = own[first - first_place : last - first_place]
            missing = last - first - len(rows)
            if not missing:
                return rows
            return np.concatenate([rows, np.zeros((missing, *own.shape[1:]), own.dtype)])

        return jax.make_array_from_callback((num_rows, *own.shape[1:]), self.sharding, part)

    def fetch(self, placed: jax.Array) -> Shaped[np.ndarray, 'n ...']:
        """The rows of this process, without padding, of an array that lies as `place` lays it."""
        return hosts.own_rows(placed)[: self.lengths[self.process]]


def lay_out(num_rows: int, mesh: Mesh) -> RowLayout:
    """Agrees with the other processes of a mesh on where all rows lie.

    Args:
      num_rows: Rows of this process.
      mesh: Of `mesh_by_process`.
    """
    process_of_device = [device.process_index for device in mesh.devices.flat]
    processes, num_devices = np.unique(process_of_device, return_counts=True)
    lengths = np.array([num_rows])
    # A mesh of this process alone is nobody else's business.
    if len(processes) > 1:
        lengths = hosts.gather(np.int64(num_rows))[processes]
    rows_per_device = -(-lengths // num_devices)
    return RowLayout(
        sharding=NamedSharding(mesh, Spec(mesh.axis_names)),
        lengths=tuple(lengths.tolist()),
        num_devices=tuple(num_devices.tolist()),
        process=processes.tolist().index(jax.process_index()) if len(processes) > 1 else 0,
        rows_per_device=max(1, int(rows_per_device.max())),
    )
