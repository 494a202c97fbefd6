"""Classification by the names of the classes, as CLIP does it without training, trained.

A clip is compared with a sentence of every class in a common space with text, by cosine:

    logits [B P] = scale · video · classes;  loss: cross entropy with the label

It has no parameters of its own, so something of the model must be trained: pixels, prompts or
words (docs/adaptation.md). Sentences go through the text tower at every step, so that learnt words
get gradients; with many classes `candidates` bounds what that costs. The classifier of a trained
model is `vatt_jax.load(…).classify(…, names=…)`, and its evaluator is `zero_shot`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.inputs import class_sentences, tokenizer
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.forward import project, run_towers
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'class_names',
    # What is classified.
    'stream': 'video',
    # Which of the data's labels.
    'label': 'class',
    # Common space of the stream and text; '': the only one.
    'space': '',
    # The sentence of a class; {} stands for its name.
    'template': '{}',
    # Factor on cosines (CLIP: 100; Ju et al.: 1 / 0.07).
    'scale': 100.0,
    # Classes that a batch is told from: its own and others drawn at random (Ju et al.: up to 400).
    # 0: all.
    'candidates': 0,
}


class ClassNames(Objective):
    """Cross entropy of cosines with the sentences of all classes, or of some.

    Rows without the label or the modality count for nothing. The text of the data is not read: it
    is among the streams so that the model has its text tower.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        check_range(self.config.scale, 0, math.inf, 'config.objective.scale')
        check_range(self.config.candidates, 0, 1 << 24, 'config.objective.candidates')

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream, 'text')

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        if c.label not in spec.labels:
            available = ', '.join(spec.labels) or 'no labels'
            raise ConfigError(
                f'config.objective.label: expected a label of the data ({available}), got '
                f'{c.label!r}.'
            )
        # Whether there is one, before a step is compiled.
        self._space(spec.outputs.spaces)
        num_words = spec.batch['text']['data'].shape[-1]
        num_rows = spec.batch['index'].shape[0]
        num_classes = spec.labels[c.label]
        if c.candidates and c.candidates < min(num_rows, num_classes):
            raise ConfigError(
                f'config.objective.candidates={c.candidates}: expected at least '
                f'{min(num_rows, num_classes)}, as many classes as a (micro)batch may hold, or 0'
            )
        return {}, {'sentences': self._sentences(spec, num_words)}

    def _sentences(self, spec: Spec, num_words: int) -> Int[Array, 'P L']:
        """The sentence of every class, as numbers of words."""
        c = self.config
        names = spec.info.get('labels', {}).get(c.label)
        spec_of_tokenizer = spec.info.get('tokenizer')
        if not names or not spec_of_tokenizer:
            raise ConfigError(
                'config.objective.name=class_names: expected data that name their classes and '
                'carry a tokenizer, got none'
            )
        texts = class_sentences.prompts(list(names), [c.template], 'config.objective')
        return jnp.asarray(tokenizer.from_spec(spec_of_tokenizer).encode(texts, num_words))

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        # Not the text of the data.
        streams = select_streams(batch, (self.config.stream,))
        pooled, batch_stats = run_towers(model, variables, streams, rng)
        return Encoding(pooled, batch_stats, state)

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        c = self.config
        label = batch['labels'][c.label]  # [B]
        if label.ndim != 1:
            raise ConfigError(
                f'config.objective.label: expected one class for each clip, got {c.label!r} with '
                'several'
            )
        counted = (label >= 0) & batch[c.stream]['valid']  # [B]
        sentences = state['sentences']  # [P L]
        target = jnp.maximum(label, 0)
        if c.candidates and c.candidates < len(sentences):
            chosen = choose_classes(target, counted, len(sentences), c.candidates, rng)  # [C]
            sentences = sentences[chosen]
            # Of rows that do not count any class will do.
            target = jnp.argmax(chosen[None] == target[:, None], axis=1)

        clips, classes = self._embed(model, variables, pooled, batch, sentences, rng)
        logits = c.scale * clips @ classes.T  # [B P]
        value = softmax_cross_entropy(logits, target, weight=counted)
        is_correct = (logits.argmax(-1) == target) & counted
        accuracy = jnp.sum(is_correct) / jnp.maximum(counted.sum(), 1)
        return Loss(value, {'accuracy': accuracy}, variables['batch_stats'], state)

    def _embed(
        self,
        model: Any,
        variables: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        sentences: Int[Array, 'P L'],
        rng: Rng,
    ) -> tuple[Float[Array, 'B E'], Float[Array, 'P E']]:
        """Clips and classes in the common space, of unit length."""
        c = self.config
        # One clip with P candidates; its random bits are those of the first of the batch.
        first = rng.replace(examples=rng.examples[:1])  # type: ignore[attr-defined]
        encoded = model.apply(
            variables,
            'text',
            {'data': sentences[None]},
            train=True,
            rng=first,
            mutable=['batch_stats'],
            method='encode',
        )[0]
        valid = {c.stream: batch[c.stream]['valid']}
        clips, _ = project(model, variables, {c.stream: pooled[c.stream]}, valid)
        texts, _ = project(model, variables, {'text': encoded.pooled}, {'text': jnp.ones(1, bool)})
        space = self._space(
            {name: {**clips.get(name, {}), **texts.get(name, {})} for name in clips}
        )
        return _unit(clips[space][c.stream]), _unit(texts[space]['text'][0])

    def _space(self, spaces: Mapping[str, Mapping[str, Any]]) -> str:
        """The common space of the stream and text."""
        c = self.config
        shared = []
        for name, streams in spaces.items():
            members = {modality_of(stream) for stream in streams}
            if {modality_of(c.stream), 'text'} <= members:
                shared.append(name)
        if c.space in shared:
            return c.space
        if c.space or len(shared) != 1:
            raise ConfigError(
                f'config.objective.space: expected a common space of {c.stream!r} and text '
                f'({", ".join(shared) or "the model has none"}), got {c.space!r}'
            )
        return shared[0]


def choose_classes(
    target: Int[Array, ' B'], counted: Array, num_classes: int, num_chosen: int, rng: Rng
) -> Int[Array, ' C']:
    """The classes of a batch, and others drawn at random, `num_chosen` of them.

    Args:
        target: class of each row.
        counted: bool [B], rows whose class has to be among them.
        num_classes: P.
        num_chosen: C, at least as many as the batch has.
        rng: of the step.
    """
    bits = rng.at('candidates').shared_bits((num_classes,))  # uint32 [P]
    # Floats in [0, 1); the classes of the batch come first.
    rank = bits.astype(jnp.float32) / 2.0**32
    present = jnp.zeros(num_classes).at[target].max(counted.astype(jnp.float32))
    _, chosen = jax.lax.top_k(rank + 2 * present, num_chosen)
    return chosen


def _unit(x: Float[Array, 'N E']) -> Float[Array, 'N E']:
    """Rows of unit length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
