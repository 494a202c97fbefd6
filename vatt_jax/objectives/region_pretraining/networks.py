"""The network of a run: ViLBERT or UNITER, as large as the data and its preset say."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import choose
from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.vision_language import (
    UNITER,
    VILBERT,
    Uniter,
    UniterOutputs,
    UniterSizes,
    Vilbert,
    VilbertOutputs,
    VilbertSizes,
)
from vatt_jax.objectives.region_pretraining.pairs import Told
from vatt_jax.objectives.region_pretraining.vilbert import with_global
from vatt_jax.rng import Rng

PRESETS: dict[str, dict[str, Any]] = {'vilbert': VILBERT, 'uniter': UNITER}
# Numbers of a box that each model reads.
BOX_FORMS = {'vilbert': 5, 'uniter': 7}


def sizes_of(
    model: str, size: str, vocabulary: int, feature_width: int, targets: int
) -> VilbertSizes | UniterSizes:
    """A preset, with what the data say.

    Args:
        model: entry of PRESETS.
        size: entry of its presets.
        vocabulary: rows of the word table.
        feature_width: of a region.
        targets: what is told of a region beside UNITER's features: classes, or a feature.

    Raises:
        ConfigError: there is no such model or size.
    """
    presets = PRESETS[choose(model, PRESETS, 'config.objective.model')]
    preset = presets[choose(size, presets, 'config.objective.size')]
    shared: dict[str, Any] = {'vocabulary': vocabulary, 'feature_width': feature_width}
    if isinstance(preset, VilbertSizes):
        return dataclasses.replace(preset, **shared, targets=targets)
    return dataclasses.replace(preset, **shared, classes=targets)


def network(sizes: VilbertSizes | UniterSizes, implementation: str, dtype: str) -> Vilbert | Uniter:
    """The module of these sizes."""
    if isinstance(sizes, VilbertSizes):
        return Vilbert(sizes, implementation, dtype)
    return Uniter(sizes, implementation, dtype)


def sizes_in(params: Any, model: str, size: str) -> VilbertSizes | UniterSizes:
    """Sizes of a network of which the parameters are there.

    Args:
        params: of the network.
        model: entry of PRESETS.
        size: entry of its presets.
    """
    embeddings = params['region_embeddings']
    head = params['region_head' if model == 'vilbert' else 'class_head']
    return sizes_of(
        model,
        size,
        vocabulary=params['text_embeddings']['word_table'].shape[0],
        feature_width=embeddings['features']['kernel'].shape[0],
        targets=head['decoder']['kernel'].shape[-1],
    )


def init(module: Vilbert | Uniter, key: jax.Array, num_words: int) -> Any:
    """Initial parameters, boxed with logical axes.

    Args:
        module: the network.
        key: of the values.
        num_words: of a sentence, marks included.
    """
    form = BOX_FORMS['vilbert' if isinstance(module, Vilbert) else 'uniter']
    words = Words(jnp.zeros((1, num_words), jnp.int32), jnp.ones((1, num_words), bool))
    regions = Regions(
        jnp.zeros((1, 2, module.sizes.feature_width)),
        jnp.zeros((1, 2, form)),
        jnp.ones((1, 2), bool),
    )
    rng = Rng.create(0, 0, jnp.zeros(1, jnp.uint32))  # nothing is drawn
    return module.init(key, words, regions, rng, False)['params']


def as_read(module: Vilbert | Uniter, seen: Regions, told: Told) -> tuple[Regions, Told]:
    """Regions as the network reads them: ViLBERT has a global one before all others."""
    return with_global(seen, told) if isinstance(module, Vilbert) else (seen, told)


def as_uniter(outputs: VilbertOutputs | UniterOutputs) -> UniterOutputs:
    """What either model tells, as UNITER has it.

    ViLBERT tells one thing of a region, and its label 0 is a pair that matches.
    """
    if isinstance(outputs, UniterOutputs):
        return outputs
    return UniterOutputs(
        encoded=outputs.encoded,
        word_logits=outputs.word_logits,
        region_features=outputs.region_logits,
        region_logits=outputs.region_logits,
        match_logits=outputs.match_logits[..., ::-1],
    )
