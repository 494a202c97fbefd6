"""The detector's own layers: a pyramid over a tower's last map, and heads that its levels share.

Anchor-free, after FCOS (Tian et al., 2019): every place of every level says which class it belongs
to, how far the four sides of its box are, and how central it lies. The pyramid is made of the last
map alone, by up- and down-sampling, as ViTDet (Li et al., 2022) does for backbones without stages.

Places and boxes are in fractions of the picture that the model sees: (0, 0) is its upper left
corner, (1, 1) its lower right one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from vatt_jax.models.towers.convolutions import Conv
from vatt_jax.parallel.sharding import logical

# Channels that are normalised together (FCOS: 8 of 256).
GROUP_CHANNELS = 8
# Initial probability of every class at every place: focal loss begins calm (RetinaNet).
PRIOR = 0.01
# Distances are at most e to this, in cells: a wild logit must not overflow.
LARGEST_LOG_DISTANCE = 6.0


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the L places of all levels are, the finest level first.

    Attributes:
        centre: (x, y) of each.
        cell: (width, height) of a cell of its level.
        level: number of its level.
    """

    centre: Float32[np.ndarray, 'L 2']
    cell: Float32[np.ndarray, 'L 2']
    level: np.ndarray


# A pytree: it crosses the boundary of jit.
@flax.struct.dataclass
class Predictions:
    """What the heads say of every place.

    Attributes:
        class_logits: [B L P].
        boxes: [B L 4], corners, in fractions of the picture.
        centre_logits: [B L].
    """

    class_logits: Any
    boxes: Any
    centre_logits: Any


def level_grid(grid: tuple[int, int], exponent: int) -> tuple[int, int]:
    """(rows, columns) of a level that is 2^exponent times as fine as the map."""
    if exponent >= 0:
        return grid[0] << exponent, grid[1] << exponent
    factor = 1 << -exponent
    # As a convolution pads that keeps the last, incomplete cell.
    return math.ceil(grid[0] / factor), math.ceil(grid[1] / factor)


def places(grid: tuple[int, int], levels: tuple[int, ...]) -> Places:
    """The places of all levels.

    Args:
        grid: (rows, columns) of the tower's map.
        levels: exponents, see `Detector`.
    """
    centres, cells, numbers = [], [], []
    for number, exponent in enumerate(levels):
        rows, columns = level_grid(grid, exponent)
        y, x = np.meshgrid(
            (np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing='ij'
        )
        centre = np.stack([x.ravel(), y.ravel()], axis=-1)
        centres.append(centre)
        cells.append(np.broadcast_to([1 / columns, 1 / rows], centre.shape))
        numbers.append(np.full(len(centre), number, np.int32))
    return Places(
        np.concatenate(centres).astype(np.float32),
        np.concatenate(cells).astype(np.float32),
        np.concatenate(numbers),
    )


class Detector(nn.Module):
    """A tower's map [B h w D] -> `Predictions` at all places.

    Attributes:
        num_classes: P.
        width: of the pyramid and the heads, a multiple of 8.
        convs: hidden layers of each head.
        levels: of the pyramid, finest first: level e is 2^e times as fine as the map.
    """

    num_classes: int
    width: int = 64
    convs: int = 2
    levels: tuple[int, ...] = (1, 0, -1)

    @nn.compact
    def __call__(self, feature_map: Float[Array, 'B h w D']) -> Predictions:
        # Heads are small, and their outputs feed logarithms: float32 even on bfloat16 towers.
        x = feature_map.astype(jnp.float32)
        x = _Layer(self.width, kernel=1, name='lateral')(x)
        class_head = _Head(self.width, self.convs, name='class_head')
        box_head = _Head(self.width, self.convs, name='box_head')
        class_output = _Output(self.num_classes, -math.log(1 / PRIOR - 1), name='classes')
        box_output = _Output(4, name='distances')
        centre_output = _Output(1, name='centre')
        scales = self.param('scales', logical(nn.initializers.ones, None), (len(self.levels),))

        rows, columns = feature_map.shape[1:3]
        where = places((rows, columns), self.levels)
        class_logits, distances, centre_logits = [], [], []
        for number, exponent in enumerate(self.levels):
            level = self._level(x, exponent)
            class_logits.append(_flat(class_output(class_head(level))))
            of_boxes = box_head(level)
            # Each level learns the unit of its distances (FCOS), beside the size of its cells.
            logits = scales[number] * _flat(box_output(of_boxes))
            distances.append(jnp.exp(jnp.minimum(logits, LARGEST_LOG_DISTANCE)))
            centre_logits.append(_flat(centre_output(of_boxes))[..., 0])
        return Predictions(
            jnp.concatenate(class_logits, axis=1),
            boxes_of(jnp.concatenate(distances, axis=1), where),
            jnp.concatenate(centre_logits, axis=1),
        )

    def _level(self, x: jax.Array, exponent: int) -> jax.Array:
        """The map at another fineness, halved or doubled step by step."""
        for step in range(exponent):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _Layer(self.width, name=f'finer_{exponent}_{step}')(x)
        for step in range(-exponent):
            x = _Layer(self.width, stride=2, name=f'coarser_{-exponent}_{step}')(x)
        if exponent == 0:
            x = _Layer(self.width, name='same')(x)
        return x


def boxes_of(distances: Float[Array, 'B L 4'], where: Places) -> Float[Array, 'B L 4']:
    """Corners of boxes whose sides are so many cells left, above, right and below of a place."""
    cell = jnp.asarray(where.cell)
    low = where.centre - distances[..., :2] * cell
    high = where.centre + distances[..., 2:] * cell
    return jnp.concatenate([low, high], axis=-1)


def _flat(x: Float[Array, 'B h w O']) -> Float[Array, 'B places O']:
    return x.reshape(x.shape[0], -1, x.shape[-1])


class _Layer(nn.Module):
    """Convolution, group norm, ReLU."""

    width: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, strides = (self.kernel,) * 2, (self.stride,) * 2
        x = Conv(self.width, kernel, strides, init='kaiming', name='conv')(x)
        # Of one picture by itself: batches of detectors are small, and microbatches stay exact.
        x = nn.GroupNorm(num_groups=self.width // GROUP_CHANNELS, name='norm')(x)
        return jax.nn.relu(x)


class _Head(nn.Module):
    """The hidden layers of a head."""

    width: int
    convs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(self.convs):
            x = _Layer(self.width, name=f'layer_{number}')(x)
        return x


class _Output(nn.Module):
    """The last layer of a head, with a bias."""

    features: int
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Small at first (FCOS: a normal of 0.01), so that the bias decides.
        kernel = self.param(
            'kernel',
            logical(nn.initializers.normal(0.01), None, None, None, None),
            (3, 3, x.shape[-1], self.features),
        )
        bias_init = logical(nn.initializers.constant(self.bias), None)
        bias = self.param('bias', bias_init, (self.features,))
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        return y + bias
