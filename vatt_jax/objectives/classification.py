"""Supervised fine-tuning: a linear classifier on a modality's pooled feature, trained with the tower."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.losses.classification import balanced_binary_cross_entropy, softmax_cross_entropy
from vatt_jax.objectives.base import Loss, Objective
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'classification',
    'stream': 'video',
    'label': 'class',  # which of the data's labels
    'form': 'softmax',  # softmax: one class each (VATT: video, image) | sigmoid: several (VATT: AudioSet)
    'dropout': 0.5,  # before the classifier (VATT: 0.5 for video, 0 for audio)
    'smoothing': 0.1,  # softmax: of labels (VATT: 0.1)
    'mixup': 0,  # waveforms and their labels mixed with those of the batch's next clip by a share ~ Beta(mixup, mixup); 0: off (VATT: 5)
    'replicas': 1,  # sigmoid: > 1 counts classes in each of so many parts of the batch, as the official code does on so many devices
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
            raise ConfigError(
                f'config.objective.mixup={c.mixup}: waveforms are mixed, with multi-hot labels; it wants an audio stream and '
                f'form="sigmoid", here {c.stream!r} and {c.form!r}; set mixup=0'
            )

        self.mixes = c.mixup > 0

    def streams(self):
        return (self.config.stream,)

    def init(self, key, spec):
        name = self.config.label
        if name not in spec.labels:
            raise ConfigError(
                f'config.objective.label={name!r}: the data has {", ".join(spec.labels) or "no labels"}'
            )
        if self.config.mixup and spec.batch[self.config.stream]['data'].ndim != 2:
            raise ConfigError(
                'config.objective.mixup mixes waveforms, and config.model.inputs.audio.mel makes this model read spectrograms; '
                'set mixup=0'
            )
        width = spec.outputs.encoded[self.config.stream].pooled.shape[-1]
        classes = spec.labels[name]
        softmax = self.config.form == 'softmax'
        kernel = (
            jax.nn.initializers.glorot_normal() if softmax else jax.nn.initializers.glorot_uniform()
        )
        bias = (
            jax.nn.initializers.zeros
            if softmax
            else jax.nn.initializers.constant(-math.log(max(classes - 1, 1)))
        )
        return {
            'kernel': logical(kernel, 'embed', 'classes')(key, (width, classes)),
            'bias': logical(bias, 'classes')(key, (classes,)),
        }, {}

    def counted(self, batch) -> jax.Array:
        """bool [B]: rows that have the label and the modality."""
        label = batch['labels'][self.config.label]
        return (label >= 0 if label.ndim == 1 else label.sum(-1) > 0) & batch[self.config.stream][
            'valid'
        ]

    def meet(self, batch, rng):
        c = self.config
        if not self.mixes:
            return batch
        share, stream = own_share(self.counted(batch), c.mixup, rng.at('mixup')), batch[c.stream]
        return {**batch, c.stream: {**stream, 'data': mix(stream['data'], share)}}

    def judge(self, model, variables, params, state, pooled, batch, rng) -> Loss:
        c = self.config
        label, weight = batch['labels'][c.label], self.counted(batch)
        if c.form == 'softmax' and label.ndim != 1:
            raise ConfigError(
                f'config.objective.label={c.label!r} holds several classes for each clip; set config.objective.form="sigmoid"'
            )
        if c.form == 'sigmoid':
            label = (
                jax.nn.one_hot(label, params['bias'].shape[0])
                if label.ndim == 1
                else label.astype(jnp.float32)
            )
        if self.mixes:
            label = mix(label, own_share(weight, c.mixup, rng.at('mixup')))
        pooled = rng.at('classifier').dropout(pooled[c.stream].astype(jnp.float32), c.dropout)
        logits = pooled @ params['kernel'] + params['bias']
        count = jnp.maximum(weight.sum(), 1)
        if c.form == 'softmax':
            value = softmax_cross_entropy(
                logits, jnp.maximum(label, 0), weight=weight, smoothing=c.smoothing
            )
            metrics = {'accuracy': jnp.sum((logits.argmax(-1) == label) & weight) / count}
        else:
            value = balanced_binary_cross_entropy(logits, label, weight=weight, replicas=c.replicas)
            first = jnp.take_along_axis(label, logits.argmax(-1)[:, None], 1)[:, 0] > 0
            metrics = {'first_is_right': jnp.sum(first & weight) / count}
        return Loss(value, metrics, variables['batch_stats'], state)

    def predict(self, params, state, encoded):
        if self.config.stream not in encoded:
            return {}
        return {
            self.config.label: encoded[self.config.stream].pooled.astype(jnp.float32)
            @ params['kernel']
            + params['bias']
        }


def own_share(weight: jax.Array, alpha: int, rng: Rng) -> jax.Array:
    """float32 [B]: how much of each row stays when it is mixed with the next one (mixup; Zhang et al., 2018), ~ Beta(alpha, alpha); all of it
    where its own or the next clip does not count (weight bool [B])."""
    # Beta(a, a) for whole a: the middle one of 2a - 1 uniform draws
    share = jnp.sort(rng.uniform((2 * alpha - 1,)), -1)[:, alpha - 1]
    return jnp.where(weight & jnp.roll(weight, -1), share, 1.0)


def mix(x: jax.Array, share: jax.Array) -> jax.Array:
    """x [B D] with `share` [B] of each row and the rest of the next one."""
    share = share[:, None]
    return share.astype(x.dtype) * x + (1 - share).astype(x.dtype) * jnp.roll(x, -1, 0)
