"""Which map comes next? Features of coming blocks of a video, predicted at every position.

DPC (Han, Xie and Zisserman 2019), and with a memory and both directions MemDPC (2020). The
defaults are those of DPC's code. See docs/dpc.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses import nce
from vatt_jax.models.future_prediction import FuturePredictor
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'dense_prediction',
    # Of video or flow.
    'stream': 'video',
    # Blocks that a clip is cut into, the frames of each, and frames from the begin of one to the
    # next. The clip has exactly (blocks - 1) · stride + frames of them.
    'blocks': 8,
    'frames': 5,
    'stride': 5,
    # (first step, blocks to predict) of each stage, in order. DPC's curriculum predicts more later.
    'curriculum': ((0, 3),),
    # Slots of the memory that predictions are means of (MemDPC: 1024); 0: none (DPC).
    'memory': 0,
    # The past is predicted too, by an aggregator of its own (MemDPC).
    'bidirectional': False,
    # Of the aggregator: side of its convolutions, dropout of its state after each block.
    'kernel': 1,
    'dropout': 0.1,
    # Factor on the orthogonal initial kernels of aggregator and predictor (MemDPC: 0.1).
    'gain': 1.0,
}
# Field -> smallest and largest value.
RANGES = {
    'blocks': (2, math.inf),
    'frames': (1, math.inf),
    'stride': (1, math.inf),
    'memory': (0, math.inf),
    'kernel': (1, math.inf),
    'dropout': (0, 0.99),
    'gain': (1e-6, 1e6),
}
MODALITIES = ('video', 'flow')
EXAMPLE = '((0, 2), (10000, 3))'


class DensePrediction(Objective):
    """Cross entropy of each predicted position with the true features, among those of the batch.

    Rows are (clip, predicted block, position), and so are the keys: the same position at another
    time, other positions of the clip and other clips are negatives, in one softmax of plain dot
    products. Both sides carry gradient. With two directions their losses are added. Clips without
    the stream are left out.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        _check(self.config)

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        length = spec.batch[c.stream]['data'].shape[1]
        needed = (c.blocks - 1) * c.stride + c.frames
        if length != needed:
            raise ConfigError(
                f'config.objective.blocks: expected clips of {needed} frames ({c.blocks} blocks of '
                f'{c.frames}, one every {c.stride}), got {length} of {c.stream!r}. Set '
                f'config.model.inputs.{modality_of(c.stream)}.frames={needed}, or other blocks.'
            )
        width = heads.width_of(spec, c.stream)
        maps = jnp.zeros((1, c.blocks, 1, 1, width))
        rng = Rng.create(0, 0, jnp.zeros(1, jnp.uint32))  # nothing is drawn
        params = self._predictor(width).init(key, maps, 1, rng, False)['params']
        # `compute_loss` is not passed the step of the run; `after_update` writes it here.
        return params, {'step': jnp.zeros((), jnp.int32)}

    def _predictor(self, width: int) -> FuturePredictor:
        """The module for maps of this width."""
        c = self.config
        return FuturePredictor(width, c.memory, c.bidirectional, c.kernel, c.dropout, c.gain)

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        c = self.config
        stream = c.stream
        blocks = cut_blocks(batch[stream]['data'], c.blocks, c.frames, c.stride)
        # The tower sees each block as a clip of its own.
        streams = {
            stream: {
                'data': blocks.reshape(-1, *blocks.shape[2:]),  # [B·N frames H W C]
                'valid': jnp.repeat(batch[stream]['valid'], c.blocks),
            }
        }
        features, batch_stats = run_towers(
            model, variables, streams, rng.repeat(c.blocks), (stream,)
        )
        # Over the time of a block: [B·N h w D]. Their products have no temperature, so that
        # bfloat16 would show.
        maps = features[map_of(stream)].astype(jnp.float32).mean(1)
        pooled = {
            stream: features[stream].reshape(-1, c.blocks, features[stream].shape[-1]).mean(1),
            map_of(stream): maps.reshape(-1, c.blocks, *maps.shape[1:]),
        }
        return Encoding(pooled, batch_stats, state)

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
        maps = pooled[map_of(stream)].astype(jnp.float32)  # [B N h w D]
        # What is not there may be NaN, which times a gradient of zero would be NaN in the weights.
        maps = jnp.where(valid.reshape(-1, 1, 1, 1, 1), maps, 0)
        starts = np.array([start for start, _ in self.config.curriculum])
        stage = jnp.sum(state['step'] >= starts) - 1
        # The number of predicted blocks is a shape: one program for each stage.
        stages = [
            functools.partial(self._loss_of_stage, steps) for _, steps in self.config.curriculum
        ]
        value, metrics = jax.lax.switch(stage, stages, params, maps, valid, rng)
        return Loss(value, metrics, variables['batch_stats'], state)

    def _loss_of_stage(
        self,
        steps: int,
        params: Any,
        maps: Float[Array, 'B N h w D'],
        valid: Bool[Array, ' B'],
        rng: Rng,
    ) -> tuple[Float[Array, ''], dict[str, jax.Array]]:
        """(loss, metrics) where this many blocks are predicted."""
        predictor = self._predictor(maps.shape[-1])
        predicted: Any = predictor.apply({'params': params}, maps, steps, rng.at('dropout'), True)
        targets = {'forward': maps[:, -steps:], 'backward': maps[:, :steps]}
        value = jnp.zeros(())
        metrics = {'predicted_blocks': jnp.float32(steps)}
        for direction, x in predicted.items():
            loss = dense_nce(x, targets[direction], valid)
            metrics[f'loss/{direction}'] = loss
            metrics[f'accuracy/{direction}'] = accuracy_in_clip(x, targets[direction], valid)
            value = value + loss
        return value, metrics

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Note the step that comes next, which says the stage of the curriculum."""
        return model_params, params, {'step': jnp.asarray(step + 1, jnp.int32)}


def cut_blocks(
    clips: Float[Array, 'B T H W C'], blocks: int, frames: int, stride: int
) -> Float[Array, 'B N frames H W C']:
    """Blocks of `frames` frames, one every `stride` frames."""
    starts = [block * stride for block in range(blocks)]
    return jnp.stack([clips[:, start : start + frames] for start in starts], axis=1)


def dense_nce(
    predicted: Float[Array, 'B P h w D'],
    targets: Float[Array, 'B P h w D'],
    valid: Bool[Array, ' B'],
) -> Float[Array, '']:
    """Mean cross entropy of each (clip, block, position) among all of the valid clips.

    Its memory is linear in their number: scores are computed in blocks (losses/blockwise.py).
    """
    width = predicted.shape[-1]
    rows_per_clip = math.prod(predicted.shape[1:-1])
    row_valid = jnp.repeat(valid, rows_per_clip)
    return nce.info_nce(
        predicted.reshape(-1, width),
        targets.reshape(-1, width),
        x_valid=row_valid,
        y_valid=row_valid,
        temperature=1.0,
        normalise=False,
        stop_gradient=False,
    )


def accuracy_in_clip(
    predicted: Float[Array, 'B P h w D'],
    targets: Float[Array, 'B P h w D'],
    valid: Bool[Array, ' B'],
) -> Float[Array, '']:
    """Share of positions whose own target scores highest among those of their clip.

    Only the hard negatives are asked: other times and positions of the same clip. Chance is
    1 / (P·h·w), and the memory is linear in the clips.
    """
    num_clips, width = len(predicted), predicted.shape[-1]
    x = jax.lax.stop_gradient(predicted).reshape(num_clips, -1, width)
    y = jax.lax.stop_gradient(targets).reshape(num_clips, -1, width)
    scores = jnp.einsum('brd,bsd->brs', x, y)
    is_right = scores.argmax(-1) == jnp.arange(x.shape[1])
    return masked_mean(is_right.mean(-1), valid)


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    for field, (low, high) in RANGES.items():
        check_range(config[field], low, high, f'config.objective.{field}')
    if modality_of(config.stream) not in MODALITIES:
        raise ConfigError(
            f'config.objective.stream: expected one of {", ".join(MODALITIES)} or a view of it, '
            f'got {config.stream!r}.'
        )
    if config.kernel % 2 == 0:
        raise ConfigError(
            f'config.objective.kernel: expected an odd number, got {config.kernel}; try 1 or 3.'
        )
    _check_curriculum(config.curriculum, config.blocks)


def _check_curriculum(stages: Any, blocks: int) -> None:
    """Raise ConfigError where a stage cannot be, or predicts all blocks or none."""
    if not isinstance(stages, tuple) or not stages or not all(map(_is_stage, stages)):
        raise ConfigError(
            'config.objective.curriculum: expected (first step, blocks to predict) for each stage, '
            f'got {stages!r}. Write it like {EXAMPLE}.'
        )
    starts = [start for start, _ in stages]
    if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:])):
        raise ConfigError(
            f'config.objective.curriculum: expected stages from step 0 on, in order, got {starts}.'
        )
    for _, steps in stages:
        check_range(steps, 1, blocks - 1, 'config.objective.curriculum: blocks to predict')


def _is_stage(stage: Any) -> bool:
    """Whether this is a pair of whole numbers."""
    return isinstance(stage, tuple) and len(stage) == 2 and all(isinstance(n, int) for n in stage)
