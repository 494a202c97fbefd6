"""The registry of models: a new one is a Linen module with encode, interact and project."""

from __future__ import annotations

from typing import Any

from flax.core import freeze

from vatt_jax.config import choose
from vatt_jax.models.multimodal import Encoded, MultimodalEncoder, Outputs

MODELS = {'vatt': MultimodalEncoder}  # config.model.name -> module

__all__ = ['MODELS', 'Encoded', 'Outputs', 'build']


def build(config: Any, dtype: str = 'float32', frozen: bool = False) -> MultimodalEncoder:
    """Build the module of a model config.

    Args:
        config: `config.model`, a ConfigDict.
        dtype: of activations.
        frozen: whether it computes in training as in evaluation, but for adapters.

    Raises:
        ConfigError: for an unknown name or field.
    """
    name = choose(config.name, MODELS, 'config.model.name')
    # Linen modules are hashed by their attributes, so the config must be immutable.
    return MODELS[name](freeze(config.to_dict()), dtype, frozen)
