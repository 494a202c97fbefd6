"""Classification without training: the class whose name is nearest in a common space with text."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

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
from vatt_jax.inference import prompt_files, zero_shot
from vatt_jax.inputs import class_sentences
from vatt_jax.inputs.batch import modality_of

# Whose embeddings are in memory: 1000 classes of 80 templates are 80,000.
SENTENCES_AT_ONCE = 8192


class ZeroShot(Evaluator):
    """Accuracy of the nearest class name, as `Model.classify(names=…)` finds it.

    Each class is its name in every template: the mean of these sentences, each of unit length,
    normalised again (CLIP, Radford et al. 2021, section 3.1.4). Top-1, top-5 and the mean over
    classes of top-1 where a clip has one class; mAP, AUC and d' where it may have several (the
    label is multi-hot). Clips without the label or the stream are left out. Cosines are averaged
    over windows and crops. With a model of pictures, `windows` are as many frames, and the mean of
    their cosines orders classes as the mean of the unit frame embeddings does.

    Classes of the data that have no clip compete as well. A set with a part of the classes
    (ImageNet-R has 200 of 1000) is prepared with these alone, and their names are looked up by id.
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
        # Sentences in which {} or {c} stands for the name of a class.
        'templates': class_sentences.TEMPLATES,
        # Or a file of them: a line each, a JSON list, or FILE.json:KEY of an object of lists.
        'templates_file': '',
        # Of the classes, in the order of the label, as they are written; (): those of the data,
        # with words in the place of underscores and the like.
        'names': (),
        # Or a file of them (inference/prompt_files.py): a line each, a JSON list or object.
        'names_file': '',
        # A file of the ids of these names in order, such as WordNet ids, by which the classes of
        # the data are found among them; '': the names' own, or none.
        'ids_file': '',
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
        self._names(data)
        self._templates()
        if not data.info.get('tokenizer'):
            raise ConfigError(f'{self.where}: the data have no tokenizer, so names have no words')

    def run(self, view: FeatureView) -> Result:
        c = self.config
        names = self._names(view.data)
        parts = features_over_windows(view, c.split, c.windows, c.crops, limit=c.limit)
        classes_by_space, is_known = self._classes(view, names)
        scores = self._scores(parts, classes_by_space)  # [N P]

        targets = parts[0]['labels'][c.label]  # [N], or multi-hot [N P]
        is_valid = parts[0]['valid'][c.stream]
        is_used = has_label(targets) & is_valid
        if not is_used.any():
            raise ConfigError(
                f'{self.where}: none of {len(targets)} clips of split {c.split!r} has the label '
                f'{c.label!r} and {c.stream}.'
            )
        if targets.ndim > 1:
            result = Result(*statistics.multi_label(scores[is_used], targets[is_used], view.seed))
        else:
            result = single_label(scores[is_used], targets[is_used], view.seed)
        # The same number for every clip: which of them wins says nothing.
        unknown = [name for name, known in zip(names, is_known) if not known]
        result.artifacts['names_without_known_words'] = unknown
        result.scalars['clips'] = float(is_used.sum())
        count_unlabelled(result, c.label, {c.split: is_used[is_valid]})
        repeats = class_sentences.repeated(names)
        if repeats:
            result.remarks.append(
                f'classes of one name cannot be told apart: {", ".join(map(repr, repeats[:5]))}'
            )
        return result

    def _scores(
        self,
        parts: list[dict[str, Any]],
        classes_by_space: dict[str, Float[np.ndarray, 'P E']],
    ) -> Float[np.ndarray, 'N P']:
        """Cosines of clips and classes, averaged over windows and crops."""
        members = {}
        for space, streams in parts[0]['spaces'].items():
            members[space] = {modality_of(stream) for stream in streams}
            if space in classes_by_space:
                members[space].add('text')
        space = self._space(members)
        classes = classes_by_space[space]
        cosines = [part['spaces'][space][self.config.stream] @ classes.T for part in parts]
        return np.mean(cosines, axis=0)

    def _classes(
        self, view: FeatureView, names: list[str]
    ) -> tuple[dict[str, Float[np.ndarray, 'P E']], Bool[np.ndarray, ' P']]:
        """Embeddings of the classes by space, and whether any word of each is in the vocabulary."""
        templates = self._templates()
        num_classes = max(1, SENTENCES_AT_ONCE // len(templates))  # at once
        parts: dict[str, list[np.ndarray]] = {}
        is_known = []
        for begin in range(0, len(names), num_classes):
            block = names[begin : begin + num_classes]
            prompts = [text for name in block for text in class_sentences.fill(templates, name)]
            sentences = view.sentences(prompts)
            for space, embeddings in sentences.embeddings.items():
                classes = zero_shot.class_embeddings(embeddings, len(block))
                parts.setdefault(space, []).append(classes)
            is_known.append(sentences.is_known.reshape(len(block), -1).any(-1))
        by_space = {space: np.concatenate(classes) for space, classes in parts.items()}
        return by_space, np.concatenate(is_known)

    def _space(self, members: dict[str, set[str]]) -> str:
        stream = modality_of(self.config.stream)
        return zero_shot.common_space(members, stream, self.config.space or None, self.where)

    def _names(self, data: Any) -> list[str]:
        """What each class is called in sentences."""
        c = self.config
        classes = list(data.info['labels'][c.label])
        given = self._given_names()
        if given is None:
            classes = class_sentences.check_names(classes, self.where)
            return [class_sentences.class_words(name) for name in classes]
        field = 'names_file' if c.names_file else 'names'
        names = prompt_files.match_classes(classes, given, f'{self.where}.{field}')
        return class_sentences.check_names(names, self.where, may_repeat=True)

    def _given_names(self) -> prompt_files.ClassNames | None:
        """Names of the config, with their ids; None where there are none."""
        c = self.config
        if c.names and c.names_file:
            raise ConfigError(f'{self.where}: names and names_file are given; leave one out')
        if c.names_file:
            given = prompt_files.read_names(c.names_file, f'{self.where}.names_file')
        elif c.names:
            given = prompt_files.ClassNames(tuple(c.names))
        elif c.ids_file:
            raise ConfigError(f'{self.where}.ids_file: expected names or names_file beside it')
        else:
            return None
        if c.ids_file:
            listed = prompt_files.read_names(c.ids_file, f'{self.where}.ids_file')
            given = prompt_files.ClassNames(given.names, listed.ids or listed.names)
        return given

    def _templates(self) -> list[str]:
        c = self.config
        if not c.templates_file:
            return class_sentences.check_templates(c.templates, self.where)
        if tuple(c.templates) != class_sentences.TEMPLATES:
            raise ConfigError(
                f'{self.where}: templates and templates_file are given; leave one out'
            )
        where = f'{self.where}.templates_file'
        return class_sentences.check_templates(
            prompt_files.read_templates(c.templates_file, where), where
        )
