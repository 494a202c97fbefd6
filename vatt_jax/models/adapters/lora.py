"""LoRA: matrices of low rank beside those of the layers (Hu et al. 2021).

A frozen kernel W becomes W + (alpha / r) · A · B, of which only A and B are trained. A begins at
random and B at zero, so that the model begins as it is.

Section 4.1 of the paper: by default of queries and values alone, as in its experiments. A is
uniform within 1/sqrt(inputs) of 0, as the authors' code is remembered to have it; the paper says
normal, without a deviation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.models.layer_inputs import LayerInputs, LowRank
from vatt_jax.parallel.sharding import logical

DEFAULTS: dict[str, Any] = {
    'name': 'lora',
    # Towers to adapt, by modality; (): all that can be.
    'modalities': (),
    # r, the inner dimension.
    'rank': 4,
    # The product counts alpha / r times.
    'alpha': 8.0,
    # Of the layers: query | key | value | out | mlp_in | mlp_out
    'projections': ('query', 'value'),
}
# Axes of a kernel: those of its inputs and those of its outputs.
PROJECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'query': (('embed',), ('heads', 'kv')),
    'key': (('embed',), ('heads', 'kv')),
    'value': (('embed',), ('heads', 'kv')),
    'out': (('heads', 'kv'), ('embed',)),
    'mlp_in': (('embed',), ('mlp',)),
    'mlp_out': (('mlp',), ('embed',)),
}


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    check_range(config['rank'], 1, 1 << 16, f'{where}.rank')
    if not config['projections']:
        raise ConfigError(f'{where}.projections=(): expected some of {", ".join(PROJECTIONS)}')
    for name in config['projections']:
        choose(name, PROJECTIONS, f'{where}.projections')


class LoRA(Adapter):
    """A and B of every projection that is adapted, of all layers."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        return '' if tower.layers else 'it has no transformer layers'

    def setup(self) -> None:
        self.matrices = {name: self._pair(name) for name in self.config['projections']}

    def _pair(self, name: str) -> LowRank:
        tower, rank = self.tower, self.config['rank']
        lengths = {
            'embed': tower.width,
            'heads': tower.heads,
            'kv': tower.head_width,
            'mlp': tower.mlp,
        }
        inputs, outputs = PROJECTIONS[name]
        input_shape = tuple(lengths[axis] for axis in inputs)
        output_shape = tuple(lengths[axis] for axis in outputs)
        num_inputs = 1
        for length in input_shape:
            num_inputs *= length

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            limit = num_inputs**-0.5
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        zeros = jax.nn.initializers.zeros
        down = self.param(
            f'{name}_down',
            logical(uniform, 'layers', *inputs, None),
            (tower.layers, *input_shape, rank),
            jnp.float32,
        )
        up = self.param(
            f'{name}_up',
            logical(zeros, 'layers', None, *outputs),
            (tower.layers, rank, *output_shape),
            jnp.float32,
        )
        return LowRank(down, up, self.config['alpha'] / rank)

    def layers(self) -> LayerInputs:
        return LayerInputs(low_rank=dict(self.matrices))
