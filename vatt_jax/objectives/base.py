"""What an objective is: everything the loop needs to know about what is being learnt.

The training code (vatt_jax/training) names no method; a method is a subclass of `Objective`
registered in `vatt_jax/objectives/__init__.py`. A training step calls `loss`, which is
`mix_examples`, `encode` and `compute_loss` in turn, and then `after_update` and `write_memory`. All
methods but `refresh` and those marked as host side are pure and traced.

`params` is the objective's own tree everywhere (heads, temperatures); the model's parameters are in
`variables`, or named `model_params`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np

from vatt_jax.objectives.forward import run_towers
from vatt_jax.rng import Rng


# A pytree: `jax.value_and_grad(..., has_aux=True)` carries it out of the traced loss.
@flax.struct.dataclass
class Loss:
    """What a step needs to know of a loss.

    Attributes:
      value: float32 [], the loss.
      metrics: name -> float32 [].
      batch_stats: the model's new batch statistics.
      state: the objective's new state.
      apply_update: bool [], False while the objective still fills its memory and parameters must
        not move.
      writes: arrays [B …] of the batch's clips for `Objective.write_memory`.
    """

    value: jax.Array
    metrics: dict[str, jax.Array]
    batch_stats: Any
    state: Any
    # Batch statistics and `state` change even where this is False; `after_update` then sees the old
    # parameters.
    apply_update: jax.Array | bool = True
    writes: Any = ()


# A pytree: it crosses the loops over microbatches.
@flax.struct.dataclass
class Encoding:
    """What the towers make of a batch.

    Attributes:
      pooled: stream -> pooled features [B(,K) D]; those of a teacher, and maps, have names of
        their own.
      batch_stats: the model's new batch statistics.
      state: the objective's new state: the batch statistics of a teacher.
    """

    pooled: dict[str, jax.Array]
    batch_stats: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an objective may size itself by.

    Attributes:
      model: the Linen module.
      outputs: `jax.eval_shape` of the model's Outputs on one global (micro)batch that a loss sees.
      batch: the abstract device batch of the same.
      size: number of records in the training set (M).
      labels: label name -> number of classes.
      batch_stats: the model's batch statistics, abstract; like model_params their initial values,
        boxed, in the call of `Objective.init` that makes the run's values.
      init: (key, batch) -> (Outputs, the model's initial variables, boxed).
      model_params: the model's initial parameters, boxed with logical axes, in the call of
        `Objective.init` that makes the run's values: what a copy of the model is shaped and
        sharded like. config.init_from replaces the model's own later, see `Objective.begin`.
      info: what the data say of themselves: tokenizer, names of classes.
    """

    model: Any
    outputs: Any
    batch: Any
    size: int
    labels: Mapping[str, int]
    batch_stats: Any = dataclasses.field(default_factory=dict)
    init: Callable[..., Any] | None = None
    model_params: Any = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RefreshResult:
    """What a refresh returns.

    Attributes:
      params: the objective's parameters from now on.
      state: the objective's state from now on.
      columns: name -> array [m …] by this host's training records, from now on joined to every
        batch as `batch['columns'][name]`.
      fresh_slots: parameters whose path (relative to the objective's tree) matches one of these
        regular expressions get new optimizer slots.
      weights: names of columns that are also used as sampling weights.
      metrics: name -> number to log.
    """

    params: Any
    state: Any
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # Without this, Adam's moments of the replaced parameters would drive the new ones.
    fresh_slots: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainingRecords:
    """What a refresh sees of the training set: the records of one host.

    Each host has m consecutive records, those of host 0 first; a single host has all, m = M. What
    must be known of all of them is summed or solved over hosts (parallel/hosts.py, clustering/).

    Attributes:
      size: number of records m.
      columns: name -> array [m …] as the last refresh left them; empty at the first one.
      tables: name -> array [M …], the tables of the host (`Objective.tables`) whole, of all records
        of all hosts; read-only.
      encode: `encode(fn, augment=True, draw=0)` applies the traced
        `fn(model, variables, params, batch, rng) -> {name: [B …]}` to every record once, with
        batch statistics in evaluation mode. All hosts call it together, since batches are theirs
        together. It returns {name: host array [n …]} and `index` int64 [n], the rows of these
        records in columns, in their order; records that cannot be read are left out. With
        `augment`, windows, crops and device augmentation are as in training, other ones at every
        step and for every draw.
      seed: of the run, for what a refresh draws itself.
    """

    size: int
    columns: Mapping[str, np.ndarray]
    encode: Callable[..., dict[str, np.ndarray]]
    seed: int = 0
    tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Objective:
    """A training method: towers' features in, loss out.

    Attributes:
      config: the resolved `config.objective`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        # Name of `frozen_models` -> its memory.frozen.FrozenModel; put here by training/build.py,
        # before `init`.
        self.frozen: Mapping[str, Any] = {}

    @functools.cached_property
    def mixes_examples(self) -> bool:
        """Whether `mix_examples` does anything; methods that can leave it off set this."""
        # Mixing couples the clips of a batch before the towers, so microbatches of towers cannot be
        # exact: `training.train_step.check` refuses the combination.
        return type(self).mix_examples is not Objective.mix_examples

    def streams(self) -> tuple[str, ...] | None:
        """The streams to load and encode; None: all of the batch."""
        return None

    def tower_stages(self) -> tuple[tuple[str, int], ...]:
        """(stream, number) of stages of towers that `compute_loss` reads beside pooled features.

        `encode` returns each as `forward.stage_of(stream, number)`, averaged over its positions.
        """
        return ()

    def frozen_models(self) -> dict[str, str]:
        """Models of other runs that the state holds: its entry -> a run folder.

        `init` makes the entry, {'params', 'batch_stats'} of the module in `frozen`; as the run
        begins, after `begin`, it gets the other run's values. That run's `config.model` is kept in
        config.objective, as the field `<entry>_model`, so that a run which goes on needs its own
        folder alone.
        """
        return {}

    def frozen_streams(self) -> tuple[str, ...]:
        """Those of `streams` that only frozen models read: the model needs no tower for them."""
        return ()

    def own_streams(self) -> tuple[str, ...]:
        """Those of `streams` that the objective reads itself, such as words of a network of its
        own: the model needs no tower for them."""
        return ()

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        """Create what the objective trains and remembers.

        Returns:
          (params, state): trained parameters (may be boxed with logical axes) and untrained arrays.
        """
        return {}, {}

    def begin(self, model_params: Any, batch_stats: Any, state: Any) -> Any:
        """The state as a run begins, with what it copies from the model. Pure.

        Called once, when config.init_from and word vectors have replaced what `init` was shown: a
        teacher begins at the student.

        Args:
          model_params: the model's parameters that the run begins with.
          batch_stats: the model's batch statistics.
          state: the objective's state as `init` made it.
        """
        return state

    def mix_examples(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Any]:
        """The batch as the towers see it, where clips are mixed before them (mixup)."""
        return dict(batch)

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        """Run the towers, and those of a teacher. Each clip by itself, but for batch statistics.

        Args:
          model: the Linen module.
          variables: {'params', 'batch_stats'} of the model.
          params: the objective's parameters.
          state: the objective's state.
          batch: the device batch after `preprocess.device_stage`.
          rng: random bits of these clips.
        """
        streams = select_streams(batch, self.streams())
        stages = self.tower_stages()
        pooled, batch_stats = run_towers(model, variables, streams, rng, stages=stages)
        return Encoding(pooled, batch_stats, state)

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        """What follows on `encode`: heads and loss of all clips together.

        Args:
          model: the Linen module.
          variables: {'params', 'batch_stats'} of the model, the statistics as `encode` left them.
          params: the objective's parameters.
          state: the objective's state.
          pooled: stream -> pooled features [B(,K) D].
          batch: masks, labels, columns and `record` (int32 [B], rows of the training set) are
            read, the data of streams are not.
          rng: random bits of the step.
        """
        raise NotImplementedError

    def loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        """The whole way from a batch to its loss.

        Between `encode` and `compute_loss` is where a step may be cut: towers in microbatches, loss
        of the whole (config.accumulation). A method that overrides this one cannot be cut, and is
        refused where it would be.

        Args:
          model: the Linen module.
          variables: {'params', 'batch_stats'} of the model.
          params: the objective's parameters.
          state: the objective's state.
          batch: the device batch after `preprocess.device_stage`, joined with `columns`.
          rng: random bits of the step.
        """
        # `rng` is the same object everywhere: callees derive their bits by naming a site with
        # `rng.at(...)`, so the order of calls is irrelevant.
        batch = self.mix_examples(batch, rng)
        encoding = self.encode(model, variables, params, state, batch, rng)
        # What `compute_loss` returns as new statistics must include those of the towers.
        variables = {**variables, 'batch_stats': encoding.batch_stats}
        return self.compute_loss(
            model, variables, params, encoding.state, encoding.pooled, batch, rng
        )

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Outputs of trained heads for evaluators.

        Args:
          params: the objective's parameters.
          state: the objective's state.
          encoded: {stream: Encoded} in evaluation mode.

        Returns:
          name -> [B P].
        """
        return {}

    def with_model(self, params: Any, model_params: Any) -> Any:
        """Parameters as `predict` reads them: with those of the model that a head shares.

        Args:
          params: the objective's parameters.
          model_params: the model's.
        """
        return params

    def predict_batch(
        self,
        params: Any,
        state: Any,
        encoded: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> dict[str, jax.Array]:
        """As `predict`, of objectives that read the batch itself (`own_streams`).

        Args:
          params: the objective's parameters.
          state: the objective's state.
          encoded: {stream: Encoded} in evaluation mode.
          batch: the device batch.
          rng: of these examples; the same in every evaluation.

        Returns:
          name -> [B P].
        """
        return {}

    def own_pass(
        self, params: Any, pooled: Mapping[str, Any], batch: Mapping[str, Any], rng: Rng
    ) -> Any:
        """The forward pass of a training step through layers of a network of the objective's own.

        Plans count its FLOPs. None: there is no such network.

        Args:
          params: the objective's parameters.
          pooled: what `encode` returns.
          batch: the device batch.
          rng: random bits of the step.
        """
        return None

    def map_streams(self) -> tuple[str, ...]:
        """Streams of which `init`, `predict` and `embed` read `Encoded.tokens`, features before
        pooling."""
        return ()

    def teacher(self, state: Any) -> dict[str, Any] | None:
        """The momentum copy of the model, {'params', 'batch_stats'}; None where there is none.

        It is the state's entry `teacher`, where `vatt_jax.load(…, which='teacher')` finds it in
        checkpoints. Parameters of which it has no copy are the model's.
        """
        return None

    def embed(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, dict[str, jax.Array]]:
        """Embeddings by heads of the objective's own, beside those of the model's common spaces.

        Args:
          params: the objective's parameters.
          state: the objective's state.
          encoded: {stream: Encoded} in evaluation mode.

        Returns:
          {space: {stream: float32 [B(,K) E]}}, un-normalised.
        """
        return {}

    def heat_maps(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Where in a picture something is, as heads of the objective see it.

        Args:
          params: the objective's parameters.
          state: the objective's state.
          encoded: {stream: Encoded} in evaluation mode, with tokens.

        Returns:
          name -> float32 [B T h w]; {} where a stream it takes is missing.
        """
        return {}

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What refreshes join to every record: name -> shape and type of one record's entry."""
        return {}

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Apply constraints to what was just updated (unit prototypes, momentum encoder). Pure.

        It sees what the step keeps, so that nothing can be derived from parameters that are thrown
        away. Where a step is not applied (`Loss.apply_update`, or gradients that are not finite)
        these are the old parameters, and they stay bit by bit, whatever is returned for them; the
        state that is returned is kept, but for steps that are not finite.

        Args:
          model_params: the model's parameters after the step.
          params: the objective's parameters after the step.
          state: the objective's state as `compute_loss` returned it; the old one where the step was
            not finite.
          step: int32 [], the number of the step.

        Returns:
          (model_params, params, state) with the constraints applied.
        """
        return model_params, params, state

    def write_memory(self, state: Any, writes: Any, is_finite: jax.Array) -> Any:
        """Write what the step's clips leave in large memories. Pure.

        State that `compute_loss` and `after_update` return is kept or dropped as a whole, which
        reads the old and the new one. A memory of millions of rows, of which a step changes a few,
        is written here, in place, when all else is decided.

        Args:
          state: the objective's state as the step keeps it.
          writes: `Loss.writes` of all clips of the step, microbatches joined.
          is_finite: bool []; where it is False, the state must be returned as it is, bit by bit.
        """
        return state

    # ---- Tables of the host, for memories that devices have no room for.

    def tables(self, spec: Spec) -> dict[str, jax.ShapeDtypeStruct]:
        """Tables that the host keeps: name -> shape and type of one training record's row.

        Before a step the rows that its clips look up are joined to the batch, as
        `batch['tables'][name]` [B K …], with all that earlier steps wrote; after it the rows of the
        batch's records are what `new_rows` says. They are part of checkpoints.
        """
        return {}

    def moves_to_host(self) -> str:
        """The config change that makes tables of the host of what it remembers; '': none does."""
        return ''

    def first_rows(
        self, key: jax.Array, name: str, row: jax.ShapeDtypeStruct, records: jax.Array
    ) -> jax.Array:
        """Rows of a table as a run begins. Pure.

        Args:
          key: the one that `init` was given.
          name: of the table.
          row: its entry of `tables`.
          records: int32 [n].

        Returns:
          [n …], each row a function of the key and its record alone.
        """
        raise NotImplementedError

    def lookups(self, batch: Mapping[str, Any], rng: Rng, num_records: Any) -> jax.Array:
        """The records whose rows each clip is given, of every table. Pure.

        It runs before the step, while the step before it is under way, on the host's own processor.

        Args:
          batch: `record` int32 [B], and `columns` where there are some.
          rng: random bits of the step, as `compute_loss` is given them.
          num_records: of the training set, M.

        Returns:
          int32 [B K].
        """
        raise NotImplementedError

    def new_rows(
        self, batch: Mapping[str, Any], writes: Any, is_finite: jax.Array
    ) -> dict[str, jax.Array]:
        """The rows of the batch's records after the step. Pure.

        Args:
          batch: the whole device batch, with its `record` and `tables`.
          writes: `Loss.writes` of all clips of the step, microbatches joined.
          is_finite: bool []; where it is False, rows must be returned as they were, bit by bit.

        Returns:
          table -> [B …], one row a clip; those of clips of one record are equal. A clip that
          writes nothing has its record's old row, or what other clips of the record write.
        """
        raise NotImplementedError

    def running_losses(self, state: Any) -> dict[str, float]:
        """Running training loss of outputs of `predict` that compete (heads), where it exists."""
        return {}

    def refresh_due(self, step: int, steps: int) -> bool:
        """Host side: does a refresh come before this step of a run of `steps`?

        A pure function of both, so that a resumed run repeats it.
        """
        return False

    def refresh(
        self, variables: Any, params: Any, state: Any, step: int, records: TrainingRecords
    ) -> RefreshResult:
        """What training goes on with from `step` on.

        Host side. Every host has its own `records`, and all must come to the same parameters and
        state.
        """
        raise NotImplementedError


def stream_names(batch: Mapping[str, Any]) -> list[str]:
    """Names of the streams of a batch (its entries that hold `data`)."""
    return [name for name, entry in batch.items() if isinstance(entry, Mapping) and 'data' in entry]


def select_streams(batch: Mapping[str, Any], names: tuple[str, ...] | None) -> dict[str, Any]:
    """The batch without the streams that are not in `names` (None: all are kept)."""
    if names is None:
        return dict(batch)
    # Entries that are not streams (labels, valid, index, columns) always stay.
    dropped = set(stream_names(batch)) - set(names)
    return {name: entry for name, entry in batch.items() if name not in dropped}
