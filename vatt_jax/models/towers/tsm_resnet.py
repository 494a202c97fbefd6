"""TSM-ResNet: a ResNet over frames with a temporal shift (Lin et al., 2019), as MMV has it.

Its blocks see a part of the neighbouring frames' channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.models.towers.resnet_v2 import ResNetV2


def shift(x: Float[Array, 'B T H W C'], share: float) -> Float[Array, 'B T H W C']:
    """Exchange channels with the neighbouring frames.

    The first n = floor(share · C) channels become the *last* ones of the next frame, the last n the
    *first* ones of the frame before; zeros where there is no such frame. The usual layout takes
    both from the front. MMV's weights were trained with this one: it also exchanges the two ends.

    Args:
        x: video or its features.
        share: of the channels, each way.
    """
    num_shifted = int(x.shape[-1] * share)
    if num_shifted == 0:
        return x
    # One frame of zeros at the end, or the beginning, where there is no neighbour.
    no_padding = ((0, 0),) * (x.ndim - 2)
    from_next = jnp.pad(x[:, 1:, ..., -num_shifted:], ((0, 0), (0, 1), *no_padding))
    from_previous = jnp.pad(x[:, :-1, ..., :num_shifted], ((0, 0), (1, 0), *no_padding))
    # The two ends are exchanged, see above; the usual order would not fit MMV's weights.
    unshifted = x[..., num_shifted:-num_shifted]
    return jnp.concatenate([from_next, unshifted, from_previous], axis=-1)


class TSMResNet(nn.Module):
    """Video [B T H W 3] -> (pooled [B 2048·w], map [B T H/32 W/32 2048·w]), w = `multiplier`.

    The map is that after the last ReLU. Without a shift (`share` 0) it is a ResNet over pictures.

    Attributes:
        depth: entry of resnet_v2.DEPTHS.
        multiplier: of all widths (published: 1 and 2).
        share: of the channels that are shifted, each way.
        stride: of the map, see resnet_v2.ResNetV2.
        norm: entry of layers.NORMS.
        dtype: of activations.
    """

    depth: int = 50
    multiplier: float = 1.0
    share: float = 0.125
    stride: int = 32
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B T H W C'], valid: Any, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        batch_size, num_frames = x.shape[:2]

        def to_frames(video: jax.Array) -> jax.Array:
            return video.reshape(batch_size * num_frames, *video.shape[2:])

        def to_video(frames: jax.Array) -> jax.Array:
            return frames.reshape(batch_size, num_frames, *frames.shape[1:])

        def shift_frames(frames: jax.Array) -> jax.Array:
            return to_frames(shift(to_video(frames), self.share))

        frame_valid = None
        if train:
            # Batch statistics are over frames, and an invalid clip leaves out all of its own.
            frame_valid = jnp.repeat(jnp.broadcast_to(valid, (batch_size,)), num_frames)
        _, feature_map = ResNetV2(
            depth=self.depth,
            multiplier=self.multiplier,
            mix=shift_frames,
            to_map=to_video,
            stride=self.stride,
            norm=self.norm,
            dtype=self.dtype,
            name='resnet',
        )(to_frames(x), frame_valid, train)  # [B·T H/32 W/32 D]
        # Over space first, then over time.
        frame_means = feature_map.mean((1, 2)).reshape(batch_size, num_frames, -1)
        return frame_means.mean(1), to_video(feature_map)
