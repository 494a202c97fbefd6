"""The objective's dataset-wide refresh, between two steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import mirrored, preprocess
from vatt_jax.objectives.base import RefreshResult, TrainingRecords, select_streams
from vatt_jax.parallel import hosts, sharding
from vatt_jax.rng import Rng
from vatt_jax.training import columns, train_state
from vatt_jax.training.build import Built, process_position
from vatt_jax.training.start import TrainingRun
from vatt_jax.training.table_storage import read_only
from vatt_jax.training.train_state import TrainState

MOVED_AT_ONCE = 1 << 16  # rows


def refresh(config: ConfigDict, built: Built, data: Any, run: TrainingRun) -> RefreshResult:
    """Refreshes the objective before the next step, and puts the outcome into `run`.

    Args:
        config: of the run.
        built: of that config.
        data: the data object of docs/architecture.md.
        run: as it stands, tables of the host settled; state, columns and weights are replaced.

    Returns:
        What the objective returned.
    """
    state = run.state
    encode = RecordEncoder(config, built, data, state, run.step)
    own = encode.own
    refreshed = built.objective.refresh(
        encode.variables,
        state.params['objective'],
        state.objective,
        run.step,
        TrainingRecords(
            own.stop - own.start,
            {name: column[own] for name, column in run.columns.items()},
            encode,
            config.seed,
            {name: read_only(table) for name, table in run.tables.items()},
        ),
    )
    run.state = _with_refreshed(built, state, refreshed)
    # Columns that this refresh does not name stay as the last one left them.
    run.columns = {**run.columns, **columns.join(refreshed.columns)}
    run.weights = refreshed.weights
    return refreshed


def _with_refreshed(built: Built, state: TrainState, refreshed: RefreshResult) -> TrainState:
    # The objective computes on the host; here its trees get back the layout that the step expects,
    # whose in_shardings refuse any other.
    params = _put(refreshed.params, built.shardings.params['objective'])
    state = state.replace(
        params={**state.params, 'objective': params},
        objective=_put(refreshed.state, built.shardings.objective),
    )

    def fresh_slots(state: TrainState) -> Any:
        # Moments of a replaced parameter (a head whose classes are new) belong to the old one.
        return train_state.fresh_slots(built.tx, state, refreshed.fresh_slots)

    # Under jit with explicit shardings: slots made outside would sit on one device.
    make_slots = jax.jit(fresh_slots, out_shardings=built.shardings.opt_state)
    return state.replace(opt_state=make_slots(state))


def _put(tree: Any, shardings: Any) -> Any:
    """Host arrays -> arrays on the mesh."""
    return jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), tree, shardings)


class RecordRows:
    """Collects what is found of the records in any order, each array once in memory.

    Lists of batches that are joined and sorted at the end take three times as much, and features of
    a large training set take what there is.
    """

    def __init__(self, size: int):
        """`size`: how many records there are."""
        self._is_found = np.zeros(size, bool)
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, records: Int[np.ndarray, ' b'], rows: Mapping[str, np.ndarray]) -> None:
        """Store some rows.

        Args:
            records: their records, which were not there before.
            rows: name -> [b …].
        """
        for name, values in rows.items():
            if name not in self._arrays:
                shape = (len(self._is_found), *values.shape[1:])
                self._arrays[name] = np.empty(shape, values.dtype)
            self._arrays[name][records] = values
        self._is_found[records] = True

    def joined(self) -> dict[str, np.ndarray]:
        """{name: [n …]} and `index` int64 [n], the records that were found, ascending; once."""
        index = np.flatnonzero(self._is_found)
        joined = {'index': index}
        for name, array in self._arrays.items():
            if len(index) < len(array):
                _move_up(array, index)
            joined[name] = array[: len(index)]
        return joined


def _move_up(array: np.ndarray, rows: Int[np.ndarray, ' n']) -> None:
    """Make these rows, which ascend, the first ones of an array, in place."""
    for begin in range(0, len(rows), MOVED_AT_ONCE):
        block = rows[begin : begin + MOVED_AT_ONCE]
        # No row moves down, so none that is still to move is written over.
        array[begin : begin + len(block)] = array[block]


class RecordEncoder:
    """Applies a traced function to every training record once (`TrainingRecords.encode`).

    Attributes:
        variables: the model's trained variables; not their averages.
        own: the records of this host, which it reads and whose outputs it keeps.
    """

    def __init__(self, config: ConfigDict, built: Built, data: Any, state: TrainState, step: int):
        self.config = config
        self.built = built
        self.data = data
        self.step = step
        self.own = hosts.own_stretch(data.size('train'))
        self.objective_params = state.params['objective']
        self.variables = state.variables()

    def __call__(
        self, function: Callable[..., dict[str, jax.Array]], augment: bool = True, draw: int = 0
    ) -> dict[str, np.ndarray]:
        """Encodes this host's records; all hosts call it together.

        Args:
            function: traced; (model, variables, params, batch, rng) -> {name: [B ...]}.
            augment: windows, crops and device augmentation as in training.
            draw: number of the draw; windows and augmentation differ from draw to draw, as they
                do from step to step.

        Returns:
            {name: [n ...]} and `index` int64 [n], the records' numbers among this host's,
            ascending. Records that cannot be read are left out.
        """
        forward = self._compiled(function, augment)
        # Each record once, in a fixed order. The draw's name carries the step, so that windows
        # differ from refresh to refresh and a resumed run draws the same.
        # Of one process the rows are all of them, and users' data objects need know no stretches.
        stretches = {'in_stretches': True} if jax.process_count() > 1 else {}
        batches = self.data.one_pass(
            'train',
            self.config.batch_size,
            process=process_position(),
            by='records',
            augment=augment,
            draw=f'{self.step}/{draw}',
            **stretches,
        )
        found = RecordRows(self.own.stop - self.own.start)
        for batch in batches:
            batch = select_streams(batch, self.built.objective.streams())
            outputs = forward(
                self.variables,
                self.objective_params,
                feature_extractor.place_on_mesh(batch, self.built.mesh),
                np.uint32(self.step),
                np.uint32(draw),
            )
            # Fetched batch by batch: the outputs of the whole training set need not fit on the
            # device.
            outputs = {name: hosts.own_rows(array) for name, array in outputs.items()}
            # Padding rows of the last batches and records that cannot be read are no records.
            is_valid = np.asarray(batch['valid'])
            kept = {name: array[is_valid] for name, array in outputs.items()}
            # The position in the pass is the record's number in the training set.
            found.add(batch['position'][is_valid] - self.own.start, kept)
        return found.joined()

    def _compiled(self, function: Callable[..., dict[str, jax.Array]], augment: bool) -> Any:
        """The jitted pass, compiled once for all refreshes: step and draw are its arguments."""
        config, built = self.config, self.built

        def forward(
            variables: Any, params: Any, batch: dict[str, Any], step: Any, draw: Any
        ) -> dict[str, jax.Array]:
            # A site of its own, so that no bit is shared with the training step of the same number.
            rng = Rng.create(config.seed, step, batch['position']).at('refresh').at(draw)
            batch = preprocess.device_stage(
                batch,
                config.model.inputs,
                config.augment,
                rng.at('augment'),
                augment=augment,
                dtype=config.compute_dtype,
            )
            batch = mirrored.add(batch, config.augment)
            return function(built.model, variables, params, batch, rng)

        # Runs that share `built` share these passes: nothing of this refresh may be traced in.
        if (function, augment) not in built.passes:
            built.passes[function, augment] = jax.jit(
                forward, out_shardings=sharding.batch_sharding(built.mesh)
            )
        return built.passes[function, augment]
