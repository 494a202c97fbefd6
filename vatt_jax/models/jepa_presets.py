"""Sizes of joint-embedding predictors, from tiny to ViT-g, as fields of `config.model`.

    c.model.update(jepa_presets.model('giant', ('video', 'audio')))

Encoders are those of the published code of V-JEPA and V-JEPA 2 in layers and widths; tubelets of
2×16×16. What differs within them (positions, an aggregate token): docs/jepa.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

NO_DROPOUT = {'dropout': 0.0, 'attention_dropout': 0.0}


def _size(layers: int, width: int, heads: int, mlp: int = 0) -> dict[str, Any]:
    """A transformer; mlp 0: four times the width."""
    return {
        'layers': layers,
        'width': width,
        'mlp': mlp or 4 * width,
        'heads': heads,
        'head_width': width // heads,
        **NO_DROPOUT,
    }


SIZES: dict[str, dict[str, Any]] = {
    'tiny': _size(12, 192, 3),
    'small': _size(12, 384, 6),
    'base': _size(12, 768, 12),
    'large': _size(24, 1024, 16),
    'huge': _size(32, 1280, 16),
    # V-JEPA 2's ViT-g: 22 heads, and a hidden width of 48/11 of the width.
    'giant': _size(40, 1408, 22, 6144),
}
# Of towers whose tokens an objective chooses and trains one by one.
TOKENS = {'drop_token': 0.0, 'position_dropout': 0.0, 'pool': 'mean'}
VIDEO = {'name': 'vit', 'patch': (2, 16, 16), **TOKENS}
# AST's patches (assumed: no source at hand says MJEPA's).
# Positions by the grid itself: what is hidden are blocks of it.
AUDIO = {'name': 'spt', 'patch': (16, 16), 'transposed': False, **TOKENS}
# 16 of every fourth frame of 30 a second, with ImageNet's mean and deviation; the sound of the same
# 2.13 s at 16 kHz, 128 bands every 10 ms (assumed).
INPUTS: dict[str, dict[str, Any]] = {
    'video': {
        'frames': 16,
        'size': 224,
        'fps': 7.5,
        'range': (0.0, 1.0),
        'mean': (0.485, 0.456, 0.406),
        'deviation': (0.229, 0.224, 0.225),
    },
    'audio': {
        'samples': 34_080,
        'rate': 16_000,
        'mel': {
            'bins': 128,
            'window': 400,
            'hop': 160,
            'transform': 1024,
            'low': 20.0,
            'high': 8000.0,
            'offset': 1e-6,
            'scale': 1.0,
            'stretch': False,
        },
    },
}


def model(size: str, modalities: Sequence[str]) -> ConfigDict:
    """Fields of `config.model`: one tower, or one encoder for both modalities.

    Args:
        size: key of SIZES.
        modalities: video, audio, or both.

    Returns:
        `towers`, `encoder`, `shared` and `inputs`.

    Raises:
        ConfigError: for an unknown size.
    """
    sizes = SIZES[choose(size, SIZES, 'jepa_presets.model')]
    return ConfigDict({**towers(sizes, modalities), 'inputs': INPUTS})


def towers(sizes: dict[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """`towers`, `encoder` and `shared` for an encoder of these sizes."""
    fronts = {'video': VIDEO, 'audio': AUDIO}
    if len(modalities) > 1:
        chosen = {modality: dict(fronts[modality]) for modality in modalities}
        return {'shared': True, 'encoder': dict(sizes), 'towers': chosen}
    chosen = {modality: {**fronts[modality], **sizes} for modality in modalities}
    return {'shared': False, 'encoder': {}, 'towers': chosen}
