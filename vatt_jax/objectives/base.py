"""What an objective is: everything the loop needs to know about what is being learnt.

The training code (vatt_jax/training) names no method; a method is a subclass of `Objective`
registered in `vatt_jax/objectives/__init__.py`. A training step calls `loss`, which is
`mix_examples`, `encode` and `compute_loss` in turn, and then `after_update`. All methods but
`refresh` and those marked as host side are pure and traced.

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
    """

    value: jax.Array
    metrics: dict[str, jax.Array]
    batch_stats: Any
    state: Any
    # Batch statistics and `state` change even where this is False; `after_update` then sees the old
    # parameters.
    apply_update: jax.Array | bool = True


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an objective may size itself by.

    Attributes:
      model: the Linen module.
      outputs: `jax.eval_shape` of the model's Outputs on one global (micro)batch that a loss sees.
      batch: the abstract device batch of the same.
      size: number of records in the training set (M).
      labels: label name -> number of classes.
      batch_stats: the model's batch statistics, abstract.
      init: (key, batch) -> (Outputs, the model's initial variables, boxed).
      model_params: the model's initial parameters, boxed with logical axes, in the call of
        `Objective.init` that makes the run's values: what a copy of the model starts from.
        config.init_from replaces the model's own later.
    """

    model: Any
    outputs: Any
    batch: Any
    size: int
    labels: Mapping[str, int]
    batch_stats: Any = dataclasses.field(default_factory=dict)
    init: Callable[..., Any] | None = None
    model_params: Any = None


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


class Objective:
    """A training method: towers' features in, loss out.

    Attributes:
      config: the resolved `config.objective`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @functools.cached_property
    def mixes_examples(self) -> bool:
        """Whether `mix_examples` does anything; methods that can leave it off set this."""
        # Mixing couples the clips of a batch before the towers, so microbatches of towers cannot be
        # exact: `training.train_step.check` refuses the combination.
        return type(self).mix_examples is not Objective.mix_examples

    def streams(self) -> tuple[str, ...] | None:
        """The streams to load and encode; None: all of the batch."""
        return None

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        """Create what the objective trains and remembers.

        Returns:
          (params, state): trained parameters (may be boxed with logical axes) and untrained arrays.
        """
        return {}, {}

    def mix_examples(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Any]:
        """The batch as the towers see it, where clips are mixed before them (mixup)."""
        return dict(batch)

    def encode(
        self, model: Any, variables: Any, batch: Mapping[str, Any], rng: Rng
    ) -> tuple[dict[str, jax.Array], Any]:
        """Run the towers. Each clip by itself, unless a tower has batch statistics.

        Returns:
          ({stream: pooled features [B(,K) D]}, the model's new batch statistics).
        """
        pooled, updates = model.apply(
            variables,
            select_streams(batch, self.streams()),
            train=True,
            rng=rng,
            mutable=['batch_stats'],
            # Only the towers. Projections to common spaces belong to `compute_loss`, since their
            # batch norm takes statistics over all clips together.
            method=_pooled_features,
        )
        # Flax leaves a mutable collection out of `updates` if no module has variables in it.
        return pooled, updates.get('batch_stats', {})

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
          batch: masks, labels and columns are read, the data of streams are not.
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
        pooled, batch_stats = self.encode(model, variables, batch, rng)
        # What `compute_loss` returns as new statistics must include those of the towers.
        variables = {**variables, 'batch_stats': batch_stats}
        return self.compute_loss(model, variables, params, state, pooled, batch, rng)

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


def _pooled_features(
    model: Any, batch: Mapping[str, Any], *, train: bool, rng: Rng
) -> dict[str, jax.Array]:
    """stream -> pooled features [B(,K) D]; a method for `model.apply`."""
    encoded = model.interact(model.encode_all(batch, train=train, rng=rng))
    # Without token maps, which would otherwise be held for every microbatch.
    return {name: stream.pooled for name, stream in encoded.items()}


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
