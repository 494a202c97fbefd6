"""What is trained beside a frozen language model.

A step differentiates by the first of the two trees that `split` returns. Of the second there are no
gradients and no optimizer slots, and its arrays stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where FlamingoLM and ClipCap keep the parameters of the language model.
LANGUAGE = 'language'


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into (the new ones, those of the language model)."""
    new = {name: tree for name, tree in params.items() if name != LANGUAGE}
    return new, {LANGUAGE: params[LANGUAGE]}


def merge(new: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Join what `split` split."""
    return {**frozen, **new}
