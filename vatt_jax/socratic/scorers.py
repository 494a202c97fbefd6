"""Scorers: how well texts fit a clip, by a trained CLIP, VATT or MMV."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError

# Lists of texts whose embeddings are kept: pipelines ask the same names of every clip.
MOST_LISTS = 64
# Texts that are encoded at a time.
AT_ONCE = 32


class ModelScorer:
    """Cosines of one modality of a clip and texts, in a common space of a model.

    Args:
        model: what `vatt_jax.load` returns.
        modality: of the clip: video or audio (image and flow where the model has them).
        template: a sentence with {} where the text goes.
        space: the common space; '': the only one of the modality and text.

    Raises:
        ConfigError: the model has no such modality, or no text.
    """

    def __init__(self, model: Any, modality: str, template: str = '{}', space: str = '') -> None:
        for needed in (modality if modality != 'image' else 'video', 'text'):
            if needed not in model.modalities:
                raise ConfigError(
                    f'ModelScorer: expected a model of {needed}, got one of '
                    f'{", ".join(model.modalities)}'
                )
        if '{}' not in template:
            raise ConfigError(f'ModelScorer(template={template!r}): expected {{}} in it')
        self.model, self.modality, self.template = model, modality, template
        self.space = space or None
        self._texts: dict[tuple[str, ...], Any] = {}

    def __call__(self, clip: Any, texts: Sequence[str]) -> Float[np.ndarray, ' N']:
        """Cosines with each text.

        Args:
            clip: a path of a media file; or {modality: what `model.embed` takes of it}, or, of
                clips that were encoded together, {modality: a row of what it returned}.
            texts: N of them.

        Raises:
            ConfigError: the clip has not the modality, or model and texts share no space.
        """
        scores = self.model.similarity(self._embedded(clip), self.embed(texts), self.space)
        if not np.isfinite(scores).all():
            raise ConfigError(f'ModelScorer: the clip has no {self.modality}')
        return scores

    def embed(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Embeddings of texts in the template, {space: [N E]}."""
        key = tuple(texts)
        if key not in self._texts:
            if len(self._texts) >= MOST_LISTS:
                self._texts.pop(next(iter(self._texts)))
            # `replace`, not `format`: a text may hold braces.
            sentences = [self.template.replace('{}', text) for text in texts]
            # Filled up, so that lists of all lengths run the same compiled program.
            filled = sentences + sentences[-1:] * (-len(sentences) % AT_ONCE)
            embedded = self.model.embed(text=filled, batch_size=AT_ONCE, quiet=True)['text']
            self._texts[key] = {space: rows[: len(texts)] for space, rows in embedded.items()}
        return self._texts[key]

    def _embedded(self, clip: Any) -> Mapping[str, Any]:
        """The clip's embedding in each space."""
        given = clip
        if not isinstance(clip, (str, os.PathLike)):
            if not isinstance(clip, Mapping) or self.modality not in clip:
                found = ', '.join(clip) if isinstance(clip, Mapping) else repr(clip)[:80]
                raise ConfigError(
                    f'ModelScorer: expected a path or a clip with {self.modality!r}, got {found}'
                )
            given = clip[self.modality]
        if isinstance(given, Mapping):
            return given
        return self.model.embed(**{self.modality: given}, quiet=True)[self.modality]
