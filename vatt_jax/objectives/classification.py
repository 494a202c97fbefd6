"""Supervised fine-tuning: a linear classifier on a modality's pooled feature, with the tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses.classification import balanced_binary_cross_entropy, softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'classification',
    'stream': 'video',
    # Which of the data's labels.
    'label': 'class',
    # softmax: one class each (VATT: video, image) | sigmoid: several (VATT: AudioSet)
    'form': 'softmax',
    # Before the classifier (VATT: 0.5 for video, 0 for audio).
    'dropout': 0.5,
    # softmax: of labels (VATT: 0.1)
    'smoothing': 0.1,
    # Waveforms and their labels mixed with those of the batch's next clip by a share
    # ~ Beta(mixup, mixup); 0: off (VATT: 5)
    'mixup': 0,
    # sigmoid: > 1 counts classes in each of so many parts of the batch, as the official code does
    # on so many devices.
    'replicas': 1,
}
# Field -> smallest and largest value.
RANGES = {
    'dropout': (0, 1),
    'smoothing': (0, 1),
    'mixup': (0, math.inf),
    'replicas': (1, math.inf),
}
FORMS = ('softmax', 'sigmoid')


class Classification(Objective):
    """Cross entropy of a linear classifier with the labels of the data.

    softmax: cross entropy with label smoothing (VATT paper; glorot-normal classifier).
    sigmoid: binary cross entropies, rows weighted by how rare their classes are in the batch; the
    bias starts where every class has probability 1/P (glorot-uniform classifier). Rows without the
    label or the modality count for nothing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        c = self.config
        choose(c.form, FORMS, 'config.objective.form')
        is_audio = c.stream.split('.')[0] == 'audio'
        if c.mixup and not (is_audio and c.form == 'sigmoid'):
            raise ConfigError(
                'config.objective.mixup: expected an audio stream and form="sigmoid" (waveforms '
                f'are mixed, with multi-hot labels), got mixup={c.mixup} with {c.stream!r} and '
                f'{c.form!r}. Set mixup=0.'
            )
        self.mixes_examples = c.mixup > 0

    def streams(self) -> tuple[str, ...]:
        return (self.config.stream,)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        if c.label not in spec.labels:
            available = ', '.join(spec.labels) or 'no labels'
            raise ConfigError(
                f'config.objective.label: expected a label of the data ({available}), got '
                f'{c.label!r}.'
            )
        if c.mixup and spec.batch[c.stream]['data'].ndim != 2:  # not waveforms [B S]
            raise ConfigError(
                'config.objective.mixup: expected waveforms to mix, but '
                'config.model.inputs.audio.mel makes this model read spectrograms. Set mixup=0.'
            )
        # Fine-tuning reads the pooled backbone feature, not an embedding in a common space.
        width = spec.outputs.encoded[c.stream].pooled.shape[-1]
        num_classes = spec.labels[c.label]
        initializers = jax.nn.initializers
        if c.form == 'softmax':
            kernel_init = initializers.glorot_normal()
            bias_init = initializers.zeros
        else:
            # sigmoid(bias) = 1/P
            kernel_init = initializers.glorot_uniform()
            bias_init = initializers.constant(-math.log(max(num_classes - 1, 1)))
        params = {
            'kernel': logical(kernel_init, 'embed', 'classes')(key, (width, num_classes)),
            'bias': logical(bias_init, 'classes')(key, (num_classes,)),
        }
        return params, {}

    def counted_rows(self, batch: Mapping[str, Any]) -> jax.Array:
        """bool [B]: rows that have the label and the modality."""
        label = batch['labels'][self.config.label]
        if label.ndim == 1:
            has_label = label >= 0
        else:
            # Multi-hot labels have no -1: a row of zeros is a clip without the label.
            has_label = label.sum(-1) > 0
        return has_label & batch[self.config.stream]['valid']

    def mix_examples(self, batch: Any, rng: Rng) -> Any:
        """The batch with each waveform mixed with the next one, if mixup is on."""
        c = self.config
        if not self.mixes_examples:
            return batch
        share = mixup_share(self.counted_rows(batch), c.mixup, rng.at('mixup'))
        stream = batch[c.stream]
        return {**batch, c.stream: {**stream, 'data': mix(stream['data'], share)}}

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Any,
    ) -> Loss:
        c = self.config
        counted = self.counted_rows(batch)  # [B]
        label = self._label(batch, num_classes=params['bias'].shape[0])
        if self.mixes_examples:
            # The same random bits as in `mix_examples`, so the same shares as the waveforms.
            label = mix(label, mixup_share(counted, c.mixup, rng.at('mixup')))

        features = pooled[c.stream].astype(jnp.float32)  # [B D]
        # Bits are keyed by example, so the mask does not depend on how the batch is sharded.
        features = rng.at('classifier').dropout(features, c.dropout)
        logits = features @ params['kernel'] + params['bias']  # [B P]
        predicted = logits.argmax(-1)
        # A batch may hold no labelled row at all (few labels, or padding): 0 / 1 then, not NaN.
        num_counted = jnp.maximum(counted.sum(), 1)
        if c.form == 'softmax':
            # Labels of -1 weigh nothing; they only need to be valid indices.
            targets = jnp.maximum(label, 0)
            value = softmax_cross_entropy(logits, targets, weight=counted, smoothing=c.smoothing)
            is_correct = predicted == label
            metrics = {'accuracy': jnp.sum(is_correct & counted) / num_counted}
        else:
            value = balanced_binary_cross_entropy(
                logits, label, weight=counted, replicas=c.replicas
            )
            # The best-scored class is one of the labels. Under mixup these include the next clip's.
            is_correct = jnp.take_along_axis(label, predicted[:, None], 1)[:, 0] > 0
            metrics = {'first_is_right': jnp.sum(is_correct & counted) / num_counted}
        return Loss(value, metrics, variables['batch_stats'], state)

    def _label(self, batch: Mapping[str, Any], num_classes: int) -> jax.Array:
        """Labels in the shape of the form: int [B] for softmax, float32 [B P] for sigmoid."""
        c = self.config
        label = batch['labels'][c.label]
        if c.form == 'softmax':
            if label.ndim != 1:
                raise ConfigError(
                    f'config.objective.label: expected one class for each clip, got {c.label!r} '
                    'with several. Set config.objective.form="sigmoid".'
                )
            return label
        if label.ndim == 1:
            return jax.nn.one_hot(label, num_classes)
        return label.astype(jnp.float32)

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The name of the label -> logits [B P]."""
        if self.config.stream not in encoded:
            return {}
        # No dropout here; the evaluator applies softmax or sigmoid after pooling over windows.
        features = encoded[self.config.stream].pooled.astype(jnp.float32)
        return {self.config.label: features @ params['kernel'] + params['bias']}


def mixup_share(counted: Bool[Array, ' B'], alpha: int, rng: Rng) -> Float[Array, ' B']:
    """How much of each row stays when it is mixed with the next one (mixup; Zhang et al., 2018).

    Args:
      counted: the rows that count; a row that does not, or whose next one does not, stays whole.
      alpha: of the distribution Beta(alpha, alpha), a whole number.
      rng: random bits of the rows.

    Returns:
      float32 [B] in [0, 1].
    """
    # Beta(a, a) for whole a: the middle one of 2a - 1 uniform draws
    draws = jnp.sort(rng.uniform((2 * alpha - 1,)), -1)  # [B 2a-1]
    share = draws[:, alpha - 1]
    return jnp.where(counted & jnp.roll(counted, -1), share, 1.0)


def mix(x: Num[Array, 'B D'], share: Float[Array, ' B']) -> Num[Array, 'B D']:
    """`share` of each row and the rest of the next one."""
    share = share[:, None]
    # The last row is mixed with the first one.
    next_rows = jnp.roll(x, -1, 0)
    return share.astype(x.dtype) * x + (1 - share).astype(x.dtype) * next_rows
