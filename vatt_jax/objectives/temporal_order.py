"""Is this how it went? Clips whose time was changed, told apart from those as they were recorded.

Two tasks of ELo's (Piergiovanni, Angelova and Ryoo 2020): the order of frames (Misra, Zitnick and
Hebert 2016), and the arrow of time (Wei et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec
from vatt_jax.objectives.forward import run_towers
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.rng import Rng

REVERSED, SHUFFLED = 'reversed', 'shuffled'
DEFAULTS = {
    'name': 'temporal_order',
    # Of video, flow or audio.
    'stream': 'video',
    # reversed: played backwards | shuffled: in parts, in another order
    'change': REVERSED,
    # shuffled: parts of equal length.
    'parts': 4,
    # Of the classifier's hidden layer; 0: none.
    'hidden': 0,
}
# Field -> smallest and largest value.
RANGES = {'parts': (2, math.inf), 'hidden': (0, math.inf)}
MODALITIES = ('video', 'flow', 'audio')


class TemporalOrder(Objective):
    """Cross entropy of a classifier of two classes on the pooled feature: as it was, or changed.

    A coin tossed for each clip says which. So both classes are in every batch, and batch norm
    cannot take away what tells them apart, as it would of one pass for each class. Clips without
    the stream are left out.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        choose(c.change, (REVERSED, SHUFFLED), 'config.objective.change')
        if modality_of(c.stream) not in MODALITIES:
            raise ConfigError(
                f'config.objective.stream: expected one of {", ".join(MODALITIES)} or a view of '
                f'it, got {c.stream!r}.'
            )
        self.head = heads.Head(outputs=2, hidden=c.hidden)

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        length = spec.batch[c.stream]['data'].shape[1]
        if c.change == SHUFFLED and length < c.parts:
            raise ConfigError(
                f'config.objective.parts: expected at most {length}, the length of {c.stream!r} in '
                f'time, got {c.parts}.'
            )
        width = spec.outputs.encoded[c.stream].pooled.shape[-1]
        params, norm = heads.init(self.head, key, width)
        return params, {'norm': norm}

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        stream = self.config.stream
        data = batch[stream]['data']  # [B time …]
        is_changed = draw_changed(rng).reshape(-1, *(1,) * (data.ndim - 1))  # [B 1 …]
        data = jnp.where(is_changed, self._change(data, rng), data)
        streams = {stream: {**batch[stream], 'data': data}}
        pooled, batch_stats = run_towers(model, variables, streams, rng)
        return Encoding(pooled, batch_stats, state)

    def _change(self, data: Float[Array, 'B time ...'], rng: Rng) -> Float[Array, 'B time ...']:
        """All clips, changed."""
        if self.config.change == SHUFFLED:
            return shuffle(data, self.config.parts, rng.at('order'))
        return play_backwards(data, modality_of(self.config.stream))

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        stream = self.config.stream
        valid = batch[stream]['valid']
        outputs, norm = heads.apply(
            self.head,
            params,
            state['norm'],
            {stream: pooled[stream]},
            {stream: valid},
            rng.at('head'),
            train=True,
        )
        _, logits = outputs[stream]  # [B 2]
        # The same coins as in `encode`.
        label = draw_changed(rng).astype(jnp.int32)
        value = softmax_cross_entropy(logits, label, weight=valid)
        metrics = {'accuracy': masked_mean(logits.argmax(-1) == label, valid)}
        return Loss(value, metrics, variables['batch_stats'], {**state, 'norm': norm})


def draw_changed(rng: Rng) -> Bool[Array, ' B']:
    """Which clips are changed, each with probability one half."""
    return rng.at('is_changed').uniform() < 0.5


def play_backwards(data: Float[Array, 'B time ...'], modality: str) -> Float[Array, 'B time ...']:
    """The clips with their time reversed."""
    if modality == 'flow':
        # What moved from frame i - 1 to frame i now moves from i to i - 1: the opposite motion, and
        # it belongs to frame i. Nothing moved to the first frame, which takes its own flow.
        data = -jnp.concatenate([data[:, :1], data[:, :-1]], axis=1)
    return data[:, ::-1]


def shuffle(data: Float[Array, 'B time ...'], parts: int, rng: Rng) -> Float[Array, 'B time ...']:
    """The clips in parts of equal length, in an order drawn for each; never the one they had.

    Args:
      data: clips; what is left over behind the last part stays there.
      parts: their number.
      rng: of the clips.
    """
    num_clips, duration = data.shape[:2]
    length = duration // parts
    in_order = jnp.arange(parts)
    order = rng.permutation(parts)  # [B parts]
    is_same = (order == in_order).all(axis=1)
    order = jnp.where(is_same[:, None], jnp.roll(in_order, 1), order)

    within = jnp.arange(length)
    times = (order[:, :, None] * length + within).reshape(num_clips, -1)
    rest = jnp.arange(parts * length, duration)
    rest = jnp.broadcast_to(rest, (num_clips, len(rest)))
    times = jnp.concatenate([times, rest], axis=1)  # [B time]
    return jnp.take_along_axis(data, times.reshape(*times.shape, *(1,) * (data.ndim - 2)), axis=1)
