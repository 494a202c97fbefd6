"""Video prompting (Ju et al. 2022, "Prompting visual-language models for efficient video ...").

Two adapters of one name. In the text tower a learnt vector stands in every slot of the sentence,
and the name of the class at a fixed place among them:

    begin, v1 … v_prefix, name, v …, end, v …     the end at its own place + prefix + postfix

In the picture tower a small Transformer in the manner of CLIP sees the vectors of all frames, with
learnt times added, before these are averaged.

Theirs sees the frames in the common space; here it is part of the tower, before the matrix into
that space.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.config import ConfigError, check_range
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.models.adapters.coop import arrange, check_room
from vatt_jax.models.transformer import Block
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS: dict[str, Any] = {
    'name': 'video_prompting',
    # Towers to adapt, by modality; (): all that can be.
    'modalities': (),
    # Learnt vectors before the name of a class, and between it and the end mark.
    'prefix': 16,
    'postfix': 16,
    # Layers of the Transformer over frames; 0: none, frames are averaged.
    'layers': 1,
    'heads': 8,
}


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    for field, smallest in (('prefix', 0), ('postfix', 0), ('layers', 0), ('heads', 1)):
        check_range(config[field], smallest, 1 << 16, f'{where}.{field}')


class VideoPrompting(Adapter):
    """Slots [L D] of a text tower; times [T D] and layers of a tower that sees frame by frame."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        if tower.mixes_frames:
            return 'it has layers over frames of its own (time_layers)'
        if tower.context or tower.by_frame:
            return ''
        return 'it is neither a text tower of CLIP nor one that sees every frame by itself'

    def setup(self) -> None:
        c, tower = self.config, self.tower
        init = jax.nn.initializers.normal(0.01)
        if tower.context:
            check_room(c['prefix'] + c['postfix'], tower, 'prefix')
            shape = (tower.context, tower.width)
            self.slots = self.param('slots', logical(init, None, 'embed'), shape, jnp.float32)
            return
        if tower.width % c['heads']:
            raise ConfigError(
                f'config.model.adapter.heads: expected a divisor of the width {tower.width} of the '
                f'tower, got {c["heads"]}'
            )
        shape = (tower.frames, tower.width)
        self.times = self.param('times', logical(init, None, 'embed'), shape, jnp.float32)
        self.blocks = [
            Block(
                width=tower.width,
                mlp=4 * tower.width,
                heads=c['heads'],
                head_width=tower.width // c['heads'],
                dropout=0.0,
                attention_dropout=0.0,
                eps=1e-5,
                activation='quick_gelu',
                kernel_init='clip',
                depth=c['layers'],
                dtype=self.dtype,
            )
            for _ in range(c['layers'])
        ]

    def words(
        self, x: Float[Array, 'R L D'], read: Int[Array, ' R']
    ) -> tuple[Float[Array, 'R L D'], Int[Array, ' R']]:
        c = self.config
        slots = self.slots[: x.shape[1]]
        return arrange(x, read, slots, c['prefix'], c['postfix'], self.tower.marks)

    def frames(self, vectors: Float[Array, 'B T D']) -> Float[Array, 'B D']:
        x = vectors + self.times.astype(vectors.dtype)
        # Without dropout nothing is drawn, but layers take an Rng.
        rng = Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32))
        for block in self.blocks:
            x = block(x, None, None, rng, False)
        return x.mean(1)
