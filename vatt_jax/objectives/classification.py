"""Supervised fine-tuning: a linear classifier on a modality's pooled feature, trained with the tower."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective, only
from vatt_jax.sharding import logical

DEFAULTS = {
    'name': 'classification',
    'stream': 'video',
    'label': 'class',        # which of the data's labels
    'dropout': 0.5,          # before the classifier (VATT: 0.5 for video, 0 for audio)
    'smoothing': 0.1,        # of labels
}


class Classification(Objective):
    """Cross entropy with label smoothing (VATT paper, section 4.2). Rows without the label or the modality count for nothing."""

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))

    def streams(self):
        return (self.config.stream,)

    def init(self, key, spec):
        name = self.config.label
        if name not in spec.labels:
            raise ConfigError(f'config.objective.label={name!r}: the data has {", ".join(spec.labels) or "no labels"}')
        width = spec.outputs.encoded[self.config.stream].pooled.shape[-1]
        classes = spec.labels[name]
        return {'kernel': logical(jax.nn.initializers.glorot_normal(), 'embed', 'classes')(key, (width, classes)),
                'bias': logical(jax.nn.initializers.zeros, 'classes')(key, (classes,))}, {}

    def loss(self, model, variables, params, state, batch, rng) -> Loss:
        stream, label = self.config.stream, batch['labels'][self.config.label]
        encoded, updates = model.apply(variables, only(batch, self.streams()), train=True, rng=rng, mutable=['batch_stats'],
                                       method='encode_all')
        pooled = rng.at('classifier').dropout(encoded[stream].pooled.astype(jnp.float32), self.config.dropout)
        logits = pooled @ params['kernel'] + params['bias']
        weight = ((label >= 0) & batch[stream]['valid']).astype(jnp.float32)
        value = softmax_cross_entropy(logits, jnp.maximum(label, 0), weight=weight, smoothing=self.config.smoothing)
        accuracy = jnp.sum((logits.argmax(-1) == label) * weight) / jnp.maximum(weight.sum(), 1)
        stats = {**variables['batch_stats'], **updates.get('batch_stats', {})}
        return Loss(value, {'accuracy': accuracy}, stats, state)

    def predict(self, params, state, encoded):
        if self.config.stream not in encoded:
            return {}
        return {self.config.label: encoded[self.config.stream].pooled.astype(jnp.float32) @ params['kernel'] + params['bias']}
