"""Contrastive learning between modalities in common spaces: VATT, MMV, CLIP-like."""
from __future__ import annotations

import jax.numpy as jnp

from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.losses import nce
from vatt_jax.objectives.base import Loss, Objective, only

DEFAULTS = {
    'name': 'contrastive',
    'pairs': (('video', 'audio', 'va', 1.0), ('video', 'text', 'vat', 1.0)),  # (stream, stream, space, weight)
    'temperature': 0.07,
    'form': 'asymmetric',  # asymmetric: one denominator for both directions (VATT, MMV) | symmetric: one each
    'padded': False,       # True: sentences that are all padding count as candidates too, as in the official code
    'replicas': 1,         # > 1: the official per-replica normalisation of masked clips, by reshaping
}


class Contrastive(Objective):
    """Mean over pairs, weighted, of NCE (one candidate) or MIL-NCE (several sentences) losses (VATT paper, section 3.4).

    A clip that lacks a pair's modality is left out of that pair: finite loss, zero gradient.
    """

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        if not self.config.pairs:
            raise ConfigError('config.objective.pairs is empty; name at least one, such as ("video", "audio", "va", 1.0)')

    def streams(self):
        return tuple(dict.fromkeys(s for first, second, _, _ in self.config.pairs for s in (first, second)))

    def loss(self, model, variables, params, state, batch, rng) -> Loss:
        outputs, updates = model.apply(variables, only(batch, self.streams()), train=True, rng=rng, mutable=['batch_stats'])
        form = {'asymmetric': nce.asymmetric, 'symmetric': nce.symmetric}[self.config.form]
        total, weights, metrics = 0.0, 0.0, {}
        for first, second, space, weight in self.config.pairs:
            x, y = outputs.spaces[space][first], outputs.spaces[space][second]
            mask = None if self.config.padded else batch[second].get('mask')
            value = form(x, y, x_valid=batch[first]['valid'], y_valid=batch[second]['valid'], y_mask=mask,
                         temperature=self.config.temperature, replicas=self.config.replicas)
            metrics[f'loss/{first}-{second}'] = value
            total, weights = total + weight * value, weights + weight
        return Loss(jnp.asarray(total / weights, jnp.float32), metrics, updates.get('batch_stats', {}), state)
