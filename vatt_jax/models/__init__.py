"""The registry of models: a new one is a Linen module with encode / interact / project, and an entry here."""

from __future__ import annotations

from flax.core import freeze

from vatt_jax.config import choose
from vatt_jax.models.multimodal import VATT, Encoded, Outputs

MODELS = {'vatt': VATT}

__all__ = ['MODELS', 'Encoded', 'Outputs', 'build']


def build(config, dtype: str = 'float32'):
    """The module of `config.model`. Raises ConfigError for an unknown name or field."""
    return MODELS[choose(config.name, MODELS, 'config.model.name')](freeze(config.to_dict()), dtype)
