"""The modalities, and of what kind the data of each one's streams are.

Whoever treats streams by what they hold asks for the kind: a further modality of a known kind is
one line of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Frames [T H W C] that are cropped and mirrored on the device.
PICTURES = 'pictures'
# Samples [S].
SOUND = 'sound'
# Word numbers [K L] of candidate sentences.
WORDS = 'words'

# Modality -> its kind, in the order in which the streams of a batch stand.
MODALITIES = {'video': PICTURES, 'flow': PICTURES, 'audio': SOUND, 'text': WORDS}


def kind_of(modality: str) -> str:
    """The kind of a modality; '' of a name that is none."""
    return MODALITIES.get(modality, '')


def described(inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The modalities that `config.model.inputs` describes, in the table's order.

    An empty description, as that of `flow` is by default, stands for no such stream.
    """
    return {name: dict(inputs[name]) for name in MODALITIES if inputs.get(name)}


def seconds(modality: str, spec: Mapping[str, Any]) -> float:
    """Length of a clip in seconds; 0 of text.

    Args:
        modality: of the clip.
        spec: its description in `config.model.inputs`.
    """
    kind = kind_of(modality)
    if kind == PICTURES:
        return spec['frames'] / spec['fps']
    if kind == SOUND:
        return spec['samples'] / spec['rate']
    return 0.0
