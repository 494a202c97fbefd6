"""Supervised fine-tuning: a linear classifier on a modality's pooled feature, trained with the tower."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.losses.classification import balanced_binary_cross_entropy, softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective, only
from vatt_jax.rng import Rng
from vatt_jax.sharding import logical

DEFAULTS = {
    'name': 'classification',
    'stream': 'video',
    'label': 'class',        # which of the data's labels
    'form': 'softmax',       # softmax: one class each (VATT: video, image) | sigmoid: several (VATT: AudioSet)
    'dropout': 0.5,          # before the classifier (VATT: 0.5 for video, 0 for audio)
    'smoothing': 0.1,        # softmax: of labels (VATT: 0.1)
    'mixup': 0,              # waveforms and their labels mixed with those of the batch's next clip by a share ~ Beta(mixup, mixup); 0: off (VATT: 5)
    'replicas': 1,           # sigmoid: > 1 counts classes in each of so many parts of the batch, as the official code does on so many devices
}
FORMS = ('softmax', 'sigmoid')


class Classification(Objective):
    """softmax: cross entropy with label smoothing (VATT paper, section 4.2; glorot-normal classifier). sigmoid: binary cross entropies, rows
    weighted by how rare their classes are in the batch; the bias starts where every class has probability 1/P (glorot-uniform classifier).
    Rows without the label or the modality count for nothing.
    """

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        choose(c.form, FORMS, 'config.objective.form')
        if c.mixup and (c.stream.split('.')[0] != 'audio' or c.form != 'sigmoid'):
            raise ConfigError(f'config.objective.mixup={c.mixup}: waveforms are mixed, with multi-hot labels; it wants an audio stream and '
                              f'form="sigmoid", here {c.stream!r} and {c.form!r}; set mixup=0')

    def streams(self):
        return (self.config.stream,)

    def init(self, key, spec):
        name = self.config.label
        if name not in spec.labels:
            raise ConfigError(f'config.objective.label={name!r}: the data has {", ".join(spec.labels) or "no labels"}')
        if self.config.mixup and spec.batch[self.config.stream]['data'].ndim != 2:
            raise ConfigError('config.objective.mixup mixes waveforms, and config.model.inputs.audio.mel makes this model read spectrograms; '
                              'set mixup=0')
        width = spec.outputs.encoded[self.config.stream].pooled.shape[-1]
        classes = spec.labels[name]
        softmax = self.config.form == 'softmax'
        kernel = jax.nn.initializers.glorot_normal() if softmax else jax.nn.initializers.glorot_uniform()
        bias = jax.nn.initializers.zeros if softmax else jax.nn.initializers.constant(-math.log(max(classes - 1, 1)))
        return {'kernel': logical(kernel, 'embed', 'classes')(key, (width, classes)), 'bias': logical(bias, 'classes')(key, (classes,))}, {}

    def loss(self, model, variables, params, state, batch, rng) -> Loss:
        c = self.config
        label = batch['labels'][c.label]
        if c.form == 'softmax':
            if label.ndim != 1:
                raise ConfigError(f'config.objective.label={c.label!r} holds several classes for each clip; set config.objective.form="sigmoid"')
            known = label >= 0
        else:
            classes = params['bias'].shape[0]
            label = jax.nn.one_hot(label, classes) if label.ndim == 1 else label.astype(jnp.float32)
            known = label.sum(-1) > 0
        weight = known & batch[c.stream]['valid']
        if c.mixup:
            batch, label, weight = mixed(batch, c.stream, label, weight, c.mixup, rng.at('mixup'))
        encoded, updates = model.apply(variables, only(batch, self.streams()), train=True, rng=rng, mutable=['batch_stats'],
                                       method='encode_all')
        pooled = rng.at('classifier').dropout(encoded[c.stream].pooled.astype(jnp.float32), c.dropout)
        logits = pooled @ params['kernel'] + params['bias']
        count = jnp.maximum(weight.sum(), 1)
        if c.form == 'softmax':
            value = softmax_cross_entropy(logits, jnp.maximum(label, 0), weight=weight, smoothing=c.smoothing)
            metrics = {'accuracy': jnp.sum((logits.argmax(-1) == label) & weight) / count}
        else:
            value = balanced_binary_cross_entropy(logits, label, weight=weight, replicas=c.replicas)
            first = jnp.take_along_axis(label, logits.argmax(-1)[:, None], 1)[:, 0] > 0
            metrics = {'first_is_right': jnp.sum(first & weight) / count}
        return Loss(value, metrics, {**variables['batch_stats'], **updates.get('batch_stats', {})}, state)

    def predict(self, params, state, encoded):
        if self.config.stream not in encoded:
            return {}
        return {self.config.label: encoded[self.config.stream].pooled.astype(jnp.float32) @ params['kernel'] + params['bias']}


def mixed(batch, stream: str, label: jax.Array, weight: jax.Array, alpha: int, rng: Rng):
    """(batch, label [B P], weight [B]) with each row's data and label a mixture of its own and the next row's (mixup; Zhang et al., 2018), the
    own share ~ Beta(alpha, alpha). A row whose own or next clip does not count stays as it is."""
    # Beta(a, a) for whole a: the middle one of 2a - 1 uniform draws
    share = jnp.sort(rng.uniform((2 * alpha - 1,)), -1)[:, alpha - 1]
    share = jnp.where(weight & jnp.roll(weight, -1), share, 1.0)[:, None]
    mix = lambda x: share.astype(x.dtype) * x + (1 - share).astype(x.dtype) * jnp.roll(x, -1, 0)
    return {**batch, stream: {**batch[stream], 'data': mix(batch[stream]['data'])}}, mix(label), weight
