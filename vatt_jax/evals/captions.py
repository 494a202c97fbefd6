"""Captions that a model writes of clips, beside those of their nearest neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError
from vatt_jax.evals import captioning
from vatt_jax.evals.base import Evaluator, FeatureView, Result
from vatt_jax.inference.captioner import Captioner
from vatt_jax.inputs import tokenizer
from vatt_jax.inputs.tokenizer import Tokenizer

# Captions in the report.
EXAMPLES = 16


class Captions(Evaluator):
    """Scores of written captions against all captions of their clip (docs/captioning.md).

    `CIDEr-D`, `BLEU-4` and the others are those of the model. `nearest/…`: the first caption of the
    clip of `train` with the nearest embedding, which is what a model must beat that only remembers.
    Chance is the first caption of a clip of `train` that is drawn.

    References are captions as the model reads them: lower-case words, cut where inputs cut them.
    Clips without a caption or without the medium are left out.
    """

    DEFAULTS = {
        'type': 'captions',
        'split': 'test',
        'limit': 512,
        # Where the neighbours come from.
        'train': 'train',
        'train_limit': 2000,
        # Of the search; 1: the likeliest word, always.
        'beam': 3,
        'metrics': tuple(captioning.METRICS),
        'baseline': False,
    }

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        if self.config.beam < 1:
            raise ConfigError(
                f'{self.where}.beam: expected a positive number, got {self.config.beam}'
            )
        if self.config.split == self.config.train:
            raise ConfigError(
                f'{self.where}.train: expected another split than the one that is told, whose '
                f'clips are their own neighbours, got {self.config.train!r} for both'
            )
        if not data.info.get('tokenizer'):
            raise ConfigError(f'{self.where}: the data have no captions; leave this evaluator out')
        if jax.process_count() > 1:
            raise ConfigError(
                f'{self.where}: captions are compared on one host; leave this evaluator out and '
                'evaluate the finished run with --mode=eval there'
            )

    def run(self, view: FeatureView) -> Result:
        c = self.config
        words = tokenizer.from_spec(view.data.info['tokenizer'])
        captioner = Captioner(view.encoder, words)
        embeddings, references = self._told_clips(view, c.split, c.limit, words)
        known, others = self._told_clips(view, c.train, c.train_limit, words)
        drawn = np.random.default_rng(view.seed).integers(len(known), size=len(embeddings))
        written = captioner.write(embeddings, c.beam, view.batch_size)
        neighbours = [others[i][0] for i in nearest(embeddings, known)]
        scalars = captioning.score(written, references, c.metrics)
        of_neighbours = captioning.score(neighbours, references, c.metrics)
        by_chance = captioning.score([others[i][0] for i in drawn], references, c.metrics)
        artifacts: dict[str, Any] = {f'{name}/chance': by_chance[name] for name in scalars}
        scalars.update({f'nearest/{name}': value for name, value in of_neighbours.items()})
        told = zip(written, neighbours, references)
        artifacts['examples'] = [
            {'caption': caption, 'nearest': neighbour, 'references': own}
            for caption, neighbour, own in itertools.islice(told, EXAMPLES)
        ]
        return Result(scalars, {'clips': len(references), 'shown': list(scalars), **artifacts})

    def _told_clips(
        self, view: FeatureView, split: str, limit: int, words: Tokenizer
    ) -> tuple[Float[np.ndarray, 'N E'], list[list[str]]]:
        """Embeddings of the clips of a split that have captions, and these.

        Raises:
            ConfigError: no clip has any.
        """
        objective = view.encoder.objective
        stream, media = objective.config.stream, objective.config.media
        features = view.features(split, limit=limit, keep=(stream,))
        embeddings = objective.embeddings(features)
        is_there = features['mask'][stream] & features['valid'][stream][:, None]  # [N K]
        is_told = is_there.any(1) & features['valid'][media]
        if not is_told.any():
            raise ConfigError(
                f'{self.where}: none of {len(is_told)} clips of split {split!r} has {media} and a '
                'caption'
            )
        captions = []
        for row in np.flatnonzero(is_told):
            captions.append(words.decode(features['data'][stream][row][is_there[row]]))
        return embeddings[is_told], captions


def nearest(queries: Float[np.ndarray, 'N E'], gallery: Float[np.ndarray, 'M E']) -> Sequence[int]:
    """The row of the gallery with the largest cosine, of each query."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    indices: list[int] = (unit(queries) @ unit(gallery).T).argmax(1).tolist()
    return indices
