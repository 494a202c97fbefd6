"""Prompt generation: prompts that depend on the picture (Loedeman et al. 2022, "PGN").

A small ResNet looks at the picture and mixes, for each of K prompts, the N vectors of a library:

    logits [K N] = network(picture);  prompt k = sum over n of softmax(logits)[k n] · library[n]

The prompts stand behind the patches, without positions, before the norm that CLIP has in front of
its layers; they go through all layers and are not read. With `input_dependent` False they are
learnt themselves, K vectors: the paper's baseline.

The network: a 3×3 convolution of stride 2 with batch norm and ReLU, four groups of one basic block
(16, 32, 64, 128 channels; stride 2 from the second on), the mean, a matrix. Its batch norm takes
statistics of the batch in training, as the only part of an adapted model. Of a tower that reads a
clip as a whole (VATT), the logits are means over frames: assumed, the paper has pictures.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import check_range
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.models.layers import Dense
from vatt_jax.models.towers.convolutions import ConvNorm
from vatt_jax.parallel.sharding import logical

DEFAULTS: dict[str, Any] = {
    'name': 'pgn',
    # Towers to adapt, by modality; (): all that can be.
    'modalities': (),
    # K, the number of prompts.
    'prompts': 16,
    # N, vectors of the library.
    'library': 256,
    # Whether the picture decides; else the prompts themselves are learnt.
    'input_dependent': True,
    # Channels of the network's groups.
    'widths': (16, 32, 64, 128),
}


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    check_range(config['prompts'], 1, 1 << 16, f'{where}.prompts')
    check_range(config['library'], 1, 1 << 20, f'{where}.library')
    for width in config['widths']:
        check_range(width, 1, 1 << 16, f'{where}.widths')


def mix(logits: Float[Array, 'R K N'], library: Float[Array, 'N D']) -> Float[Array, 'R K D']:
    """Prompts as mixtures of a library."""
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.einsum('rkn,nd->rkd', weights, library)


class MixingNetwork(nn.Module):
    """Pictures [R H W 3] -> logits [R outputs].

    Attributes:
        widths: channels of the groups.
        outputs: number of logits.
        dtype: of activations.
    """

    widths: tuple[int, ...]
    outputs: int
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Float[Array, 'R H W 3'], train: bool) -> Float[Array, 'R M']:
        options: dict[str, Any] = {'norm': 'torch', 'init': 'kaiming', 'dtype': self.dtype}
        valid = jnp.ones(len(x), bool)

        def convolve(
            name: str, x: jax.Array, width: int, side: int, stride: int, relu: bool
        ) -> jax.Array:
            convolution = ConvNorm(
                width, (side, side), (stride, stride), 'FIXED', relu=relu, name=name, **options
            )
            return convolution(x, valid, train)

        x = convolve('stem', x, self.widths[0], 3, 2, relu=True)
        for group, width in enumerate(self.widths):
            stride = 1 if group == 0 else 2
            shortcut = x
            if stride > 1 or x.shape[-1] != width:
                shortcut = convolve(f'group_{group}_short', x, width, 1, stride, relu=False)
            y = convolve(f'group_{group}_first', x, width, 3, stride, relu=True)
            y = convolve(f'group_{group}_second', y, width, 3, 1, relu=False)
            x = jax.nn.relu(y + shortcut)
        return Dense(self.outputs, ('embed', None), init='torch', name='logits')(x.mean((1, 2)))


class PGN(Adapter):
    """A library [N D] and the network that mixes it."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        if not tower.size:
            return 'it reads no pictures'
        return '' if tower.layers else 'it has no transformer layers'

    def setup(self) -> None:
        c = self.config
        num_rows = c['library'] if c['input_dependent'] else c['prompts']
        init = logical(jax.nn.initializers.normal(0.02), None, 'embed')
        self.library = self.param('library', init, (num_rows, self.tower.width), jnp.float32)
        if c['input_dependent']:
            num_logits = c['prompts'] * c['library']
            self.network = MixingNetwork(tuple(c['widths']), num_logits, self.dtype)

    def tokens(self, data: Float[Array, 'B T H W 3'], train: bool) -> Float[Array, 'R K D']:
        c = self.config
        num_clips, num_frames = data.shape[:2]
        num_rows = num_clips * num_frames if self.tower.by_frame else num_clips
        if not c['input_dependent']:
            return jnp.broadcast_to(self.library, (num_rows, *self.library.shape))
        pictures = data.reshape(-1, *data.shape[2:])  # [B·T H W 3]
        logits = self.network(pictures, train).reshape(num_clips, num_frames, -1)
        if self.tower.by_frame:
            logits = logits.reshape(num_rows, c['prompts'], c['library'])
        else:
            logits = logits.mean(1).reshape(num_rows, c['prompts'], c['library'])
        return mix(logits, self.library)
