"""Embeddings in, captions out: a model trained by config.objective.name='captioning'."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Int

from vatt_jax.config import ConfigError, check_range
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.inputs.tokenizer import PAD, UNKNOWN, Tokenizer


class Captioner:
    """What a model writes of embeddings.

    Args:
        encoder: the frozen model with its objective and the parameters of it.
        tokenizer: of the captions that it was trained on.

    Raises:
        ConfigError: the objective writes no captions, or there is no tokenizer.
    """

    def __init__(self, encoder: FeatureExtractor, tokenizer: Tokenizer | None) -> None:
        objective = encoder.objective
        if not hasattr(objective, 'write'):
            name = 'none' if objective is None else objective.config.name
            raise ConfigError(
                f"captions are written by config.objective.name='captioning', got {name!r} "
                '(docs/clipcap.md)'
            )
        if tokenizer is None:
            raise ConfigError('captions need the tokenizer of the training data, which has none')
        self.objective = objective
        self._encoder, self._tokenizer = encoder, tokenizer

    def write(self, embeddings: Float[np.ndarray, 'N E'], beam: int, batch_size: int) -> list[str]:
        """A caption of each embedding (`objective.embeddings`).

        Args:
            embeddings: of N clips.
            beam: width of the search; 1: the likeliest word, always.
            batch_size: captions written together.

        Raises:
            ConfigError: the beam is no positive number.
        """
        check_range(beam, 1, 1 << 10, 'beam')
        encoder = self._encoder
        params, _ = encoder.heads
        captions: list[str] = []
        for begin in range(0, len(embeddings), batch_size):
            part = embeddings[begin : begin + batch_size]
            # All batches have one size, so that the search is compiled once.
            padded = np.pad(part, ((0, batch_size - len(part)), (0, 0)))
            with jax.set_mesh(encoder.mesh):
                ids = self.objective.write(encoder.model, encoder.variables, params, padded, beam)
            captions += self._tokenizer.decode(self._known(np.asarray(ids)[: len(part)]))
        return captions

    def _known(self, ids: Int[np.ndarray, 'B L']) -> Int[np.ndarray, 'B L']:
        """Captions without the unknown word, which is no answer: it would match any other one."""
        unknown = getattr(self._tokenizer, 'unknown', UNKNOWN)
        # Words first, in their order; 0 behind them.
        is_kept = (ids != unknown) & (ids != PAD)
        order = np.argsort(~is_kept, axis=1, kind='stable')
        return np.take_along_axis(np.where(is_kept, ids, PAD), order, axis=1)
