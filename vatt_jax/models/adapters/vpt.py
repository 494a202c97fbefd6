"""Visual prompt tuning: learnt tokens among those of a frozen transformer (Jia et al. 2022).

shallow: p tokens enter at the first layer and go through all of them. deep: every layer has p of
its own, which take the place of what became of the ones before.

They stand behind the aggregate token, after positions were added, without positions of their own;
order means nothing to attention. In CLIP they enter after the first norm, as in every layer
(assumed: the paper's models have no such norm). Here also for video and sound, whose patches are
cuboids and stretches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import check_range
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.models.layer_inputs import LayerInputs
from vatt_jax.models.layers import Dense
from vatt_jax.parallel.sharding import logical

DEFAULTS: dict[str, Any] = {
    'name': 'vpt',
    # Towers to adapt, by modality; (): all that can be.
    'modalities': (),
    # p, the number of prompts.
    'prompts': 10,
    # Whether every layer has its own.
    'deep': True,
    # Width in which prompts are learnt; one matrix takes them to the tower's. 0: that width.
    'bottleneck': 0,
}


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    check_range(config['prompts'], 1, 1 << 16, f'{where}.prompts')
    check_range(config['bottleneck'], 0, 1 << 16, f'{where}.bottleneck')


class VPT(Adapter):
    """Prompts [layers p D], of shallow ones [1 p D]."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        if not tower.layers:
            return 'it has no transformer layers'
        return '' if tower.patch_values else 'its tokens are words, whose order is read'

    def setup(self) -> None:
        c, tower = self.config, self.tower
        width = c['bottleneck'] or tower.width
        # Glorot uniform of the matrix from a patch to its token, as in the authors' code.
        limit = (6 / (tower.patch_values + width)) ** 0.5

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        init = logical(uniform, 'layers', None, 'embed')
        num_layers = tower.layers if c['deep'] else 1
        shape = (num_layers, c['prompts'], width)
        self.prompts = self.param('prompts', init, shape, jnp.float32)
        if c['bottleneck']:
            # Theirs is PyTorch's Kaiming normal with fan-out and the gain of a leaky ReLU of
            # slope 0, which is that of a ReLU.
            self.projection = Dense(tower.width, (None, 'embed'), init='kaiming')

    def layers(self) -> LayerInputs:
        prompts = self.prompts
        if self.config['bottleneck']:
            prompts = self.projection(prompts)
        deep_prompts = prompts if self.config['deep'] else None
        return LayerInputs(prompts=prompts[0], deep_prompts=deep_prompts)
