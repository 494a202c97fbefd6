"""Classes of clips, sounds and pictures: by their names (zero-shot), or by a trained classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.inference import zero_shot
from vatt_jax.inference.embedder import Embedder, Rows
from vatt_jax.inference.requests import TOWERS, Request, only_input
from vatt_jax.inputs import class_sentences


def by_names(
    embedder: Embedder,
    given: Mapping[str, Any],
    request: Request,
    names: Any,
    templates: Any,
    space: str | None,
) -> dict[str, Any]:
    """The class whose sentences are nearest; see `vatt_jax.api.Model.classify`.

    Args:
        embedder: of a model with a text tower.
        given: the one input.
        request: how it is read.
        names: of P classes.
        templates: sentences in which {} stands for the name.
        space: the common space; None: the only one with text.

    Raises:
        ConfigError: an argument is of another kind, or there is no such space.
    """
    name = only_input(given, request.call)
    # First, since it reads an iterator to its end.
    names = class_sentences.check_names(names, request.call)
    sentences = class_sentences.prompts(names, templates, request.call)
    rows = embedder.rows(given, request)[name]
    texts = embedder.encode_text(sentences, request, request.where('names'))
    tower = TOWERS.get(name, name)
    spaces = {key: {'text'} for key in texts if key not in ('pooled', 'logits')}
    for key in set(spaces) & set(rows.features):
        spaces[key].add(tower)
    space = zero_shot.common_space(spaces, tower, space, request.call)
    classes = zero_shot.class_embeddings(texts[space], len(names))
    rows.features = {'scores': rows.features[space] @ classes.T}
    return _as_output(rows, names, name, request)


def by_classifier(
    embedder: Embedder,
    given: Mapping[str, Any],
    request: Request,
    objective: ConfigDict,
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """The most probable class of a fine-tuned model; see `vatt_jax.api.Model.predict`.

    Args:
        embedder: of a model with a classifier.
        given: the one input, of the modality that the model was fine-tuned on.
        request: how it is read.
        objective: its config.
        info: {'labels': {label: class names}, …} of the data.

    Raises:
        ConfigError: an input is of another modality or cannot be read.
    """
    name = only_input(given, request.call)
    stream = objective.stream.split('.')[0]
    if TOWERS.get(name, name) != stream:
        raise ConfigError(
            f'{request.call}({name}=…): this model was fine-tuned on {stream}; pass {stream}=…'
        )
    rows = embedder.rows(given, request)[name]
    logits = rows.features['logits']
    if objective.form == 'softmax':
        scores = np.asarray(jax.nn.softmax(logits, -1))
    else:
        scores = np.asarray(jax.nn.sigmoid(logits))
    rows.features = {'scores': scores, 'logits': logits}
    return _as_output(rows, names_of_classes(info, objective, logits.shape[-1]), name, request)


def names_of_classes(info: Mapping[str, Any], objective: ConfigDict, count: int) -> list[str]:
    """The names of a classifier's `count` classes; numbers where the data have other names."""
    names = list(info.get('labels', {}).get(objective.label, ()))
    # An import without --classes.
    return names if len(names) == count else [str(number) for number in range(count)]


def _as_output(rows: Rows, names: list[str], name: str, request: Request) -> dict[str, Any]:
    """What `classify` and `predict` return."""
    out: dict[str, Any] = rows.as_output(request.has_windows and name != 'image')
    predicted: list[str | None] = []
    for scores, is_valid in zip(rows.features['scores'], rows.valid):
        # An item that could not be read is of no class.
        predicted.append(names[scores.argmax()] if is_valid else None)
    is_one = out['scores'].ndim == 1
    return {'names': names, 'predicted': predicted[0] if is_one else predicted, **out}
