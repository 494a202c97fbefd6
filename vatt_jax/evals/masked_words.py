"""Masked words: does a model tell a hidden word better with the picture that belongs to it?"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals import statistics
from vatt_jax.evals.base import Evaluator, FeatureView, Result
from vatt_jax.evals.changes import HIDDEN_WORDS
from vatt_jax.inputs.masking import IGNORED
from vatt_jax.objectives.masked_words import MASKED_WORDS

STREAMS = ('video', 'audio')


class MaskedWords(Evaluator):
    """Share of hidden words that the objective `masked_words` tells, one of each sentence.

    `accuracy`: with the clip's own streams; `accuracy/other`: with a stream of another clip;
    `accuracy/without`: without that stream, which no clip of the training may have lacked. `gain`
    is accuracy − accuracy/other. The same words of the same clips are hidden each time. Means over
    clips, of each of which the share is taken; examples are records, so that the other clip is of
    another one.
    """

    DEFAULTS = {
        'type': 'masked_words',
        'split': 'test',
        'limit': 512,
        # The stream that is another clip's, or missing: video or audio.
        'stream': 'video',
        'baseline': True,
    }

    def __init__(self, config: Any, where: str = 'config.evals') -> None:
        super().__init__(config, where)
        choose(self.config.stream, STREAMS, f'{where}.stream')

    def run(self, view: FeatureView) -> Result:
        stream = self.config.stream
        own, is_used = self._shares(view, '', True)
        other, has_other = self._shares(view, f'+other_{stream}', True)
        without, _ = self._shares(view, f'+no_{stream}', False)
        is_used = is_used & has_other
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: none of {len(is_used)} clips of split {self.config.split!r} has '
                f'{stream}, words and another clip beside it'
            )
        found = {'accuracy': own, 'accuracy/other': other, 'accuracy/without': without}
        found['gain'] = own - other
        scalars: dict[str, float] = {}
        artifacts: dict[str, Any] = {'clips': int(is_used.sum())}
        for name, values in found.items():
            scalars[name] = float(values[is_used].mean())
            artifacts[f'{name}/interval'] = statistics.bootstrap(values[is_used], seed=view.seed)
        return Result(scalars, artifacts)

    def _shares(
        self, view: FeatureView, change: str, has_stream: bool
    ) -> tuple[Float[np.ndarray, ' N'], Bool[np.ndarray, ' N']]:
        """The share of each clip's hidden words that is told; which clips have what it takes."""
        c = self.config
        features = view.features(
            c.split, by='records', limit=c.limit, change=f'masked_words{change}'
        )
        if MASKED_WORDS not in features['predictions']:
            raise ConfigError(
                f"{self.where}: expected config.objective.name='masked_words' (or a task of it), "
                'whose head is evaluated here; leave this evaluator out'
            )
        labels = features['labels'][HIDDEN_WORDS]  # [N K L]
        told = features['predictions'][MASKED_WORDS].reshape(labels.shape)
        is_hidden = labels != IGNORED
        is_right = (told == labels) & is_hidden
        counts = is_hidden.sum((1, 2))
        is_used = (counts > 0) & features['valid']['text']
        if has_stream:
            is_used &= features['valid'][c.stream]
        return is_right.sum((1, 2)) / np.maximum(counts, 1), is_used
