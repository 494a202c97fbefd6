"""Classification without training: the class whose name is nearest in a common space with text."""

from __future__ import annotations

from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.evals import statistics
from vatt_jax.evals.base import (
    Evaluator,
    FeatureView,
    Result,
    count_unlabelled,
    features_over_windows,
    has_label,
)
from vatt_jax.evals.classification import single_label
from vatt_jax.inference import zero_shot
from vatt_jax.inputs.batch import modality_of


class ZeroShot(Evaluator):
    """Accuracy of the nearest class name, as `Model.classify(names=…)` finds it.

    Each class is the mean of its sentences: its name in every template. Top-1 and top-5 where a
    clip has one class; mAP, AUC and d' where it may have several (the label is multi-hot). Clips
    without the label or the stream are left out. Cosines are averaged over windows and crops.
    """

    DEFAULTS = {
        'type': 'zero_shot',
        'label': 'class',
        'split': 'test',
        'limit': 100_000,
        # What is classified.
        'stream': 'video',
        # Common space of the stream and text; '': the only one.
        'space': '',
        # Sentences in which {} stands for the name of a class.
        'templates': zero_shot.TEMPLATES,
        # Of the classes, in the order of the label; (): those of the data.
        'names': (),
        # Also evaluate the random initialisation.
        'baseline': True,
        # Of each example in time, and squares of each window in space.
        'windows': 1,
        'crops': 1,
    }

    def check(self, data: Any, outputs: Any) -> None:
        super().check(data, outputs)
        members = {}
        for space, streams in outputs.spaces.items():
            members[space] = {modality_of(stream) for stream in streams}
        self._space(members)
        self._prompts(data)
        if not data.info.get('tokenizer'):
            raise ConfigError(f'{self.where}: the data have no tokenizer, so names have no words')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        names, prompts = self._prompts(view.data)
        parts = features_over_windows(view, c.split, c.windows, c.crops, limit=c.limit)
        sentences = view.sentences(prompts)
        members = {}
        for space, streams in parts[0]['spaces'].items():
            members[space] = {modality_of(stream) for stream in streams}
            if space in sentences.embeddings:
                members[space].add('text')
        space = self._space(members)
        classes = zero_shot.class_embeddings(sentences.embeddings[space], len(names))  # [P E]
        cosines = [part['spaces'][space][c.stream] @ classes.T for part in parts]
        scores = np.mean(cosines, 0)  # [N P]

        targets = parts[0]['labels'][c.label]  # [N], or multi-hot [N P]
        is_multi_label = targets.ndim > 1
        is_valid = parts[0]['valid'][c.stream]
        is_used = has_label(targets) & is_valid
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: none of {len(targets)} clips of split {c.split!r} has the label '
                f'{c.label!r} and {c.stream}.'
            )
        scores, targets = scores[is_used], targets[is_used]
        if is_multi_label:
            result = Result(*statistics.multi_label(scores, targets, view.seed))
        else:
            result = single_label(scores, targets, view.seed)
        # The same number for every clip: which of them wins says nothing.
        is_known: Any = sentences.is_known.reshape(len(names), -1).any(-1)
        unknown = [name for name, known in zip(names, is_known) if not known]
        result.artifacts['names_without_known_words'] = unknown
        result.scalars['clips'] = float(is_used.sum())
        count_unlabelled(result, c.label, {c.split: is_used[is_valid]})
        return result

    def _space(self, members: dict[str, set[str]]) -> str:
        stream = modality_of(self.config.stream)
        return zero_shot.common_space(members, stream, self.config.space or None, self.where)

    def _prompts(self, data: Any) -> tuple[list[str], list[str]]:
        """(class names, their sentences)."""
        c = self.config
        classes = list(data.info['labels'][c.label])
        names = list(c.names) or classes
        if len(names) != len(classes):
            raise ConfigError(
                f'{self.where}.names: expected {len(classes)} names, one for each class of label '
                f'{c.label!r}, got {len(names)}'
            )
        return names, zero_shot.prompts(names, c.templates, self.where)
