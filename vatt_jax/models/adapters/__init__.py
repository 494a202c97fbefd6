"""Adapters by name, and which parameters of a model are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax.core import freeze

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.models.adapters import coop, lora, pgn, video_prompting, visual_prompt, vpt
from vatt_jax.models.adapters.base import Adapter, Tower

__all__ = ['ADAPTERS', 'Adapter', 'Tower', 'build', 'merge', 'split']

# config.model.adapter.name -> (its page, module).
ADAPTERS: dict[str, tuple[Any, type[Adapter]]] = {
    'lora': (lora, lora.LoRA),
    'vpt': (vpt, vpt.VPT),
    'visual_prompt': (visual_prompt, visual_prompt.VisualPrompt),
    'coop': (coop, coop.CoOp),
    'pgn': (pgn, pgn.PGN),
    'video_prompting': (video_prompting, video_prompting.VideoPrompting),
}
WHERE = 'config.model.adapter'
# What the names of adapters' parameters begin with, in those of a model.
PREFIX = 'adapters_'


def build(config: Mapping[str, Any], towers: Mapping[str, Tower], dtype: str) -> dict[str, Adapter]:
    """Build the adapters of a model.

    Args:
        config: config.model.adapter.
        towers: of the model, by modality.
        dtype: of activations.

    Returns:
        {modality: module}.

    Raises:
        ConfigError: a field is wrong, or no tower, or none of those named, can be adapted so.
    """
    page, module = ADAPTERS[choose(config['name'], ADAPTERS, f'{WHERE}.name')]
    fields = with_defaults(config, page.DEFAULTS, WHERE)
    page.check(fields, WHERE)
    misfits = {modality: module.misfit(tower) for modality, tower in towers.items()}
    for modality in fields.modalities:
        choose(modality, towers, f'{WHERE}.modalities')
        if misfits[modality]:
            raise ConfigError(
                f'{WHERE}.modalities: {fields.name} cannot adapt the tower of {modality!r}, '
                f'{misfits[modality]}'
            )
    chosen = fields.modalities or [name for name, reason in misfits.items() if not reason]
    if not chosen:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in misfits.items())
        raise ConfigError(f'{WHERE}.name={fields.name!r} can adapt no tower ({reasons})')
    plain = fields.to_dict()
    # Linen modules are hashed by their attributes, so the fields must be immutable.
    return {name: module(freeze(plain), towers[name], dtype) for name in chosen}


def split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters or statistics of a model into (those of adapters, those of the towers)."""
    new, base = {}, {}
    for name, tree in variables.items():
        if name.startswith(PREFIX):
            new[name] = tree
        else:
            base[name] = tree
    return new, base


def merge(new: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Join what `split` split."""
    return {**base, **new}
