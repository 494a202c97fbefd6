"""Contrastive learning between modalities in common spaces: VATT, MMV, CLIP, SigLIP, SimCLR-like."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.models import Encoded
from vatt_jax.objectives.base import Loss, Objective

# form -> its usual temperature. docs/losses.md says what each is and who trains with it.
FORMS = {
    'asymmetric': 0.07,
    'symmetric': 0.07,
    'clip': 0.07,
    'siglip': 0.1,
    'nt_xent': 0.1,
    'mil_nce': 1.0,
}

DEFAULTS = {
    'name': 'contrastive',
    'pairs': (
        ('video', 'audio', 'va', 1.0),
        ('video', 'text', 'vat', 1.0),
    ),  # (stream, stream, space, weight)
    'form': 'asymmetric',  # asymmetric: one denominator for both directions (VATT, MMV) | symmetric: one each | clip: its half |
    # siglip: every pair a yes/no question | nt_xent: negatives within views too | mil_nce: raw dot products
    'temperature': 0.0,  # 0: the form's usual one (FORMS); initial value when learnt
    'learn_temperature': False,  # one per pair, as exp(log_scale), kept at or above 0.01 (CLIP, section 2.5)
    'bias': -10.0,  # siglip; learnt with the temperature
    'padded': False,  # True: sentences that are all padding count as candidates too, as in the official code
    'each_mask': False,  # symmetric: True: scaled by each modality's mask, one factor times the other, as the official code does
    'replicas': 1,  # > 1: the official per-replica normalisation of masked clips, by reshaping
    'method': 'auto',  # auto | gather | ring: how keys meet on a mesh | dense: the definition, with all scores in memory
    'block': 0,  # rows and keys of one block of scores; 0: chosen by size
    'dtype': 'float32',  # what the scores are multiplied in: float32 | bfloat16 (sums stay float32)
}


class Contrastive(Objective):
    """Mean over pairs, weighted, of a contrastive loss with one candidate or (MIL-NCE) several sentences (VATT paper, section 3.4).

    A clip that lacks a pair's modality is left out of that pair: finite loss, zero gradient.
    """

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        if not c.pairs:
            raise ConfigError(
                'config.objective.pairs is empty; name at least one, such as ("video", "audio", "va", 1.0)'
            )
        for pair in c.pairs:
            if not (
                isinstance(pair, tuple)
                and len(pair) == 4
                and isinstance(pair[3], (int, float))
                and pair[3] > 0
            ):
                raise ConfigError(
                    f'config.objective.pairs has {pair!r}; (stream, stream, space, weight above 0) is wanted, such as '
                    '("video", "audio", "va", 1.0)'
                )
        choose(c.form, FORMS, 'config.objective.form')
        choose(c.method, (*similarity.METHODS, 'dense'), 'config.objective.method')
        choose(c.dtype, ('float32', 'bfloat16'), 'config.objective.dtype')
        for field in ('temperature', 'block'):
            if c[field] < 0:
                raise ConfigError(
                    f'config.objective.{field}={c[field]}: a positive number is wanted, or 0 for the usual one'
                )
        if c.each_mask and c.form != 'symmetric':
            raise ConfigError(
                f'config.objective.each_mask=True goes with form="symmetric", here it is {c.form!r}; leave it False'
            )
        if c.replicas < 1:
            raise ConfigError(
                f'config.objective.replicas={c.replicas}: a positive number is wanted'
            )
        self.temperature = c.temperature or FORMS[c.form]
        self.how = similarity.How('auto' if c.method == 'dense' else c.method, c.block, c.dtype)
        self.form = getattr(dense if c.method == 'dense' else nce, c.form)

    def streams(self):
        return tuple(
            dict.fromkeys(s for first, second, _, _ in self.config.pairs for s in (first, second))
        )

    def init(self, key, spec):
        spaces = spec.outputs.spaces
        for first, second, space, _ in self.config.pairs:
            x, y = (_embedding(spaces, space, s).shape for s in (first, second))
            candidates = y[1] if len(y) == 3 else 1
            if len(x) != 2 or self.config.form == 'nt_xent' and candidates > 1:
                raise ConfigError(
                    f'config.objective.pairs: {first!r} {x} with {second!r} {y} does not fit form={self.config.form!r}; the first '
                    'stream has one embedding per clip, and for nt_xent the second too (several candidates: asymmetric)'
                )
        rows = spec.batch['index'].shape[0]
        if rows % self.config.replicas:
            raise ConfigError(
                f'config.objective.replicas={self.config.replicas} does not divide the (micro)batch of {rows} clips'
            )
        if not self.config.learn_temperature:
            return {}, {}
        each = jnp.ones(len(self.config.pairs), jnp.float32)
        params = {'log_scale': -jnp.log(self.temperature) * each}
        return params | (
            {'bias': self.config.bias * each} if self.config.form == 'siglip' else {}
        ), {}

    def judge(self, model, variables, params, state, pooled, batch, rng) -> Loss:
        spaces, updates = model.apply(
            variables,
            {s: Encoded(x) for s, x in pooled.items()},
            valid={s: batch[s]['valid'] for s in pooled},
            train=True,
            mutable=['batch_stats'],
            method='project',
        )
        total, weights, metrics = 0.0, 0.0, {}
        for i, (first, second, space, weight) in enumerate(self.config.pairs):
            x, y = (_embedding(spaces, space, s, ' in training') for s in (first, second))
            mask = None if self.config.padded else batch[second].get('mask')
            options = {'temperature': self.temperature}
            if self.config.form == 'siglip':
                options['bias'] = self.config.bias
            if self.config.form == 'symmetric':
                options['each_mask'] = self.config.each_mask
            if self.config.learn_temperature:
                learnt = {'temperature': jnp.exp(-params['log_scale'][i])} | (
                    {'bias': params['bias'][i]} if 'bias' in params else {}
                )
                options |= learnt
                metrics |= {
                    f'{name}/{first}-{second}': jax.lax.stop_gradient(v)
                    for name, v in learnt.items()
                }
            value = self.form(
                x,
                y,
                x_valid=batch[first]['valid'],
                y_valid=batch[second]['valid'],
                y_mask=mask,
                replicas=self.config.replicas,
                how=self.how,
                **options,
            )
            metrics[f'loss/{first}-{second}'] = value
            total, weights = total + weight * value, weights + weight
        return Loss(
            jnp.asarray(total / weights, jnp.float32),
            metrics,
            updates.get('batch_stats', {}),
            state,
        )

    def after_update(self, model_params, params, state, step):
        if params:
            params = {**params, 'log_scale': jnp.minimum(params['log_scale'], jnp.log(100.0))}
        return model_params, params, state


def _embedding(spaces, space: str, stream: str, when: str = ''):
    if stream not in spaces.get(space, {}):
        there = ', '.join(f'{s} in {name}' for name, streams in spaces.items() for s in streams)
        raise ConfigError(
            f'config.objective.pairs: the model has no {stream!r} in space {space!r}{when}; it has {there}'
        )
    return spaces[space][stream]
