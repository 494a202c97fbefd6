"""TSM-ResNet: a ResNet over frames whose blocks see a part of the neighbouring frames' channels (Lin et al., 2019), as MMV has it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.models.towers.resnet_v2 import ResNetV2


def shift(x: jax.Array, share: float) -> jax.Array:
    """x [B T H W C] -> the same shape: the first `fold` = floor(share · C) channels are the *last* ones of the next frame, the last ones are the
    *first* ones of the frame before; zeros where there is no such frame.

    The usual layout takes both from the front. MMV's weights were trained with this one: it also exchanges the two ends.
    """
    fold = int(x.shape[-1] * share)
    if not fold:
        return x
    time = lambda before, after: ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2))
    later = jnp.pad(x[:, 1:, ..., -fold:], time(0, 1))
    earlier = jnp.pad(x[:, :-1, ..., :fold], time(1, 0))
    return jnp.concatenate([later, x[..., fold:-fold], earlier], -1)


class TSMResNet(nn.Module):
    """Video [B T H W 3] -> (pooled [B 2048·w], map [B T H/32 W/32 2048·w] after the last ReLU), w = `multiplier` (published: 1 and 2)."""

    depth: int = 50
    multiplier: float = 1.0
    share: float = 0.125  # of the channels, each way
    norm: str = 'debiased'
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        b, t = x.shape[:2]
        frames = lambda x: x.reshape(b * t, *x.shape[2:])
        video = lambda x: x.reshape(b, t, *x.shape[1:])
        net = ResNetV2(
            self.depth,
            self.multiplier,
            lambda x: frames(shift(video(x), self.share)),
            self.norm,
            self.dtype,
            name='resnet',
        )
        _, x = net(
            frames(x), jnp.repeat(jnp.broadcast_to(valid, (b,)), t) if train else None, train
        )
        return x.mean((1, 2)).reshape(b, t, -1).mean(1), video(x)
