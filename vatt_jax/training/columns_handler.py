"""How orbax saves and restores columns, as an item of a checkpoint beside state and meta."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from vatt_jax.training import columns as pieces


class ColumnsHandler(ocp.AsyncCheckpointHandler):
    """Every host writes its rows of all columns; each reads what it needs of all.

    Orbax's own handler of arrays would have one host write every column whole.
    """

    async def async_save(self, directory: Any, args: ColumnsSave) -> list[future.Future]:
        """Start writing this host's rows (orbax calls this on every host)."""

        async def write() -> None:
            # In a thread: the loop that runs this also writes the state.
            await asyncio.to_thread(
                pieces.write_piece,
                directory,
                args.columns,
                jax.process_index(),
                jax.process_count(),
            )

        # It waits until the main host has made the folder.
        return [future.CommitFutureAwaitingContractedSignals(write(), name='columns_save')]

    def save(self, directory: Any, args: ColumnsSave) -> None:
        """Write this host's rows."""
        pieces.write_piece(directory, args.columns, jax.process_index(), jax.process_count())

    def restore(self, directory: Any, args: ColumnsRestore) -> pieces.Columns:
        """Read all columns, also those of a checkpoint from before there were pieces."""
        if pieces.has_pieces(directory):
            return pieces.read_pieces(directory)
        restored = ocp.StandardCheckpointHandler().restore(
            directory, args=ocp.args.StandardRestore()
        )
        # A tree of arrays, each written whole by one host. Orbax refuses to save an empty tree, so
        # there is a placeholder. Copies, since orbax may still own its buffers.
        arrays = {name: np.array(array) for name, array in restored.items() if name != '_'}
        return pieces.keep(arrays)


@ocp.args.register_with_handler(ColumnsHandler, for_save=True)
@dataclasses.dataclass
class ColumnsSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
      columns: name -> [M …], the same on all hosts. They must not change while they are written.
    """

    columns: pieces.SavedColumns


@ocp.args.register_with_handler(ColumnsHandler, for_restore=True)
@dataclasses.dataclass
class ColumnsRestore(ocp.args.CheckpointArgs):
    """That columns are to be restored; nothing need be known of them."""
