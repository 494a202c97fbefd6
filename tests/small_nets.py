"""Networks of one layer that stand for towers: batch norm as in CoCLR's, and seconds to compile.

Importing this makes them towers that a config may name: small_video and small_audio.
"""

import flax.linen as nn
import jax

from vatt_jax.models.layers import BatchNorm, Dense
from vatt_jax.models.multimodal import register_net


class SmallNet(nn.Module):
    """Data [B …] -> (pooled [B D], map [B 1 D])."""

    width: int = 12
    normed: bool = True
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x, valid, train: bool):
        x = Dense(self.width, ('embed', None), name='linear')(x.reshape(len(x), -1))
        if self.normed:
            x = BatchNorm(name='norm')(x, valid, train)
        x = jax.nn.relu(x)
        return x, x[:, None]


register_net('small_video', 'video', SmallNet)
register_net('small_audio', 'audio', SmallNet)
