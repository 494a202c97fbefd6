"""What an objective is: everything the loop needs to know about what is being learnt.

The loop (train.py, train_step.py, train_state.py) names no method; a method is a subclass of `Objective` registered in
`vatt_jax/objectives/__init__.py`. All methods but `refresh` are pure and traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np

from vatt_jax.rng import Rng


@flax.struct.dataclass
class Loss:
    """value: float32 []. metrics: name -> float32 []. batch_stats: the model's new statistics. state: the objective's
    new state. apply_update: bool [], False while the objective still fills its memory and parameters must not move."""

    value: jax.Array
    metrics: dict[str, jax.Array]
    batch_stats: Any
    state: Any
    apply_update: jax.Array | bool = True


@dataclasses.dataclass(frozen=True)
class Spec:
    """What an objective may size itself by. model: the Linen module; outputs: `jax.eval_shape` of its Outputs on one
    global (micro)batch that a loss sees; batch: abstract device batch of it; size: records of the training set (M); labels: name -> classes.
    batch_stats: the model's, abstract. init: (key, batch) -> (Outputs, the model's initial variables, boxed)."""

    model: Any
    outputs: Any
    batch: Any
    size: int
    labels: Mapping[str, int]
    batch_stats: Any = dataclasses.field(default_factory=dict)
    init: Callable[..., Any] | None = None


@dataclasses.dataclass
class Refreshed:
    """What a refresh returns. `params`/`state` replace the objective's; parameters whose path (relative to the
    objective's tree) matches `fresh_slots` get new optimizer slots; `columns`: name -> array [M] by training record,
    from now on joined to every batch as batch['columns'][name] (and, if listed in `weights`, used for sampling)."""

    params: Any
    state: Any
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    fresh_slots: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Records:
    """The training set as a refresh sees it. size: M. columns: name -> array [M …], as the last refresh left them (none: the first one).

    encode(fn, augment=True, draw=0): the traced `fn(model, variables, params, batch, rng) -> {name: [B …]}` over every training record
    once, on all hosts and devices: {name: host array [n …]} and `index` int64 [n], the records' rows in columns, in their order; records that
    cannot be read are left out. Evaluation statistics; augment: windows, crops and device augmentation as in training, other ones at
    every step and for every draw.
    """

    size: int
    columns: Mapping[str, np.ndarray]
    encode: Callable[..., dict[str, np.ndarray]]


class Objective:
    """config: the resolved `config.objective`. mixes: whether `meet` does anything."""

    mixes = False

    def __init__(self, config):
        self.config = config

    def streams(self) -> tuple[str, ...] | None:
        """The streams to load and encode; None: all of the batch."""
        return None

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        """(params, state): trained parameters (may be boxed with logical axes) and untrained arrays."""
        return {}, {}

    def meet(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Any]:
        """The batch as the towers see it, where clips meet before them (mixup)."""
        return dict(batch)

    def encode(
        self, model, variables, batch: Mapping[str, Any], rng: Rng
    ) -> tuple[dict[str, jax.Array], Any]:
        """({stream: pooled [B(,K) D]}, the model's new statistics): the towers. Each clip by itself, unless a tower has batch statistics."""
        pooled, updates = model.apply(
            variables,
            only(batch, self.streams()),
            train=True,
            rng=rng,
            mutable=['batch_stats'],
            method=_pooled,
        )
        return pooled, updates.get('batch_stats', {})

    def judge(
        self,
        model,
        variables,
        params,
        state,
        pooled: Mapping[str, jax.Array],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        """What follows on `encode`: heads and loss of all clips together. batch: masks, labels and columns are read, streams' data are not."""
        raise NotImplementedError

    def loss(self, model, variables, params, state, batch: Mapping[str, Any], rng: Rng) -> Loss:
        """batch: the device batch after `preprocess.device_stage`, joined with `columns`. Between `encode` and `judge` is where a step may be
        cut: towers in microbatches, loss of the whole (config.accumulation)."""
        batch = self.meet(batch, rng)
        pooled, stats = self.encode(model, variables, batch, rng)
        return self.judge(
            model, {**variables, 'batch_stats': stats}, params, state, pooled, batch, rng
        )

    def predict(self, params, state, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Outputs of trained heads for evaluators, name -> [B P]; `encoded`: {stream: Encoded} in evaluation mode."""
        return {}

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What refreshes join to every record: name -> shape and type of one record's entry."""
        return {}

    def after_update(self, model_params, params, state, step: jax.Array) -> tuple[Any, Any, Any]:
        """Constraints on what was just updated (renormalise prototypes, momentum encoder, memory write). Pure."""
        return model_params, params, state

    def running_losses(self, state) -> dict[str, float]:
        """Running training loss of outputs of `predict` that compete (heads), where it is kept."""
        return {}

    def refresh_due(self, step: int, steps: int) -> bool:
        """Host side: does a refresh come before this step of a run of `steps`? A pure function of both, so that resume repeats it."""
        return False

    def refresh(self, variables, params, state, step: int, records: Records) -> Refreshed:
        """What training goes on with from `step` on. Every host computes the same from the same `records`."""
        raise NotImplementedError


def _pooled(model, batch, *, train: bool, rng: Rng) -> dict[str, jax.Array]:
    return {
        name: e.pooled
        for name, e in model.interact(model.encode_all(batch, train=train, rng=rng)).items()
    }


def streams(batch: Mapping[str, Any]) -> list[str]:
    """Names of the streams of a batch."""
    return [k for k, v in batch.items() if isinstance(v, Mapping) and 'data' in v]


def only(batch: Mapping[str, Any], names: tuple[str, ...] | None) -> dict[str, Any]:
    """The batch without the streams that are not in `names` (None: all)."""
    drop = set(streams(batch)) - set(names if names is not None else streams(batch))
    return {k: v for k, v in batch.items() if k not in drop}
