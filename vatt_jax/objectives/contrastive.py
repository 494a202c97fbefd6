"""Contrastive learning between modalities in common spaces.

VATT, MMV, CLIP, SigLIP, SimCLR-like.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.objectives.forward import project

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
    # (stream, stream, space, weight). Of weight 0: its loss is logged and its towers are part of
    # the model, as of a frozen tower that only evaluations read; nothing is learnt from the pair.
    'pairs': (
        ('video', 'audio', 'va', 1.0),
        ('video', 'text', 'vat', 1.0),
    ),
    # asymmetric: one denominator for both directions (VATT, MMV)
    # symmetric: a denominator for each direction, their losses added
    # clip: half of symmetric
    # siglip: every pair a yes/no question
    # nt_xent: negatives within views too
    # mil_nce: asymmetric on raw dot products
    'form': 'asymmetric',
    # 0: the form's usual one (FORMS); initial value when learnt.
    'temperature': 0.0,
    # One per pair, as exp(-log_scale).
    'learn_temperature': False,
    # Smallest and largest value of a learnt 1/temperature (CLIP: 1 and 100).
    'scales': (0.0, 100.0),
    # siglip; learnt with the temperature.
    'bias': -10.0,
    # True: sentences that are all padding count as candidates too, as in the official code.
    'padded': False,
    # symmetric: True: scaled by each modality's mask, one factor times the other, as the official
    # code does.
    'each_mask': False,
    # > 1: the official per-replica normalisation of masked clips, by reshaping.
    'replicas': 1,
    # auto | gather | ring: how keys reach queries on a mesh | dense: the definition, with all
    # scores in memory
    'method': 'auto',
    # Rows and keys of one block of scores; 0: chosen by size.
    'block': 0,
    # What the scores are multiplied in: float32 | bfloat16 (sums stay float32).
    'dtype': 'float32',
}
# Field -> smallest and largest value.
RANGES = {
    # 0 is the form's own.
    'temperature': (0, math.inf),
    'block': (0, math.inf),
    'bias': (-math.inf, math.inf),
}
EXAMPLE = '("video", "audio", "va", 1.0)'


class Contrastive(Objective):
    """Weighted mean over pairs of streams of a contrastive loss (VATT paper).

    Each clip has one candidate or (MIL-NCE) several sentences. A clip that lacks a pair's modality
    is left out of that pair: finite loss, zero gradient.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        c = self.config
        _check(c)
        # 0 cannot be a temperature, so it stands for the form's own.
        self.temperature = c.temperature or FORMS[c.form]
        is_dense = c.method == 'dense'
        self.how = similarity.How('auto' if is_dense else c.method, c.block, c.dtype)
        self.loss_function = getattr(dense if is_dense else nce, c.form)

    def streams(self) -> tuple[str, ...]:
        names: list[str] = []
        for first, second, _, _ in self.config.pairs:
            names += [first, second]
        return tuple(dict.fromkeys(names))  # each once, in the order of the pairs

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        spaces = spec.outputs.spaces
        for first, second, space, _ in c.pairs:
            first_shape = _embedding(spaces, space, first).shape
            second_shape = _embedding(spaces, space, second).shape  # [B E] or [B K E]
            num_candidates = second_shape[1] if len(second_shape) == 3 else 1
            one_each = c.form == 'nt_xent'  # every embedding is a query there
            if len(first_shape) != 2 or (one_each and num_candidates > 1):
                raise ConfigError(
                    f'config.objective.pairs: expected a first stream with one embedding per clip '
                    f'(for nt_xent the second too), got {first!r} {first_shape} with {second!r} '
                    f'{second_shape} for form={c.form!r}. For several candidates set '
                    'form="asymmetric".'
                )
        num_rows = spec.batch['index'].shape[0]
        if num_rows % c.replicas:
            raise ConfigError(
                f'config.objective.replicas: expected a divisor of the (micro)batch of {num_rows} '
                f'clips, got {c.replicas}.'
            )
        if not c.learn_temperature:
            return {}, {}
        ones = jnp.ones(len(c.pairs), jnp.float32)
        # log(1 / temperature), as in CLIP: the logarithm keeps the temperature positive, and a step
        # of the optimizer changes it by a ratio.
        params = {'log_scale': -jnp.log(self.temperature) * ones}
        if c.form == 'siglip':
            params['bias'] = c.bias * ones
        return params, {}

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
        # The common spaces are part of the loss, not of `encode` (objectives/base.py): with
        # accumulation they see the whole batch, of which only pooled vectors are in memory.
        valid = {stream: batch[stream]['valid'] for stream in pooled}
        spaces, batch_stats = project(model, variables, pooled, valid)
        total: Any = 0.0
        total_weight = 0.0
        metrics = {}
        for i, (first, second, space, weight) in enumerate(self.config.pairs):
            x = _embedding(spaces, space, first, ' in training')  # [B E]
            y = _embedding(spaces, space, second, ' in training')  # [B E] or [B K E]
            options = self._fixed_options()
            learnt = self._learnt_options(params, i)
            options.update(learnt)
            for name, value in learnt.items():
                metrics[f'{name}/{first}-{second}'] = jax.lax.stop_gradient(value)

            # Padding sentences: without a mask they count as candidates.
            mask = None if self.config.padded else batch[second].get('mask')
            pair_loss = self.loss_function(
                x,
                y,
                x_valid=batch[first]['valid'],
                y_valid=batch[second]['valid'],
                y_mask=mask,
                replicas=self.config.replicas,
                how=self.how,
                **options,
            )
            metrics[f'loss/{first}-{second}'] = pair_loss
            if weight:  # else there is nothing to derive
                total = total + weight * pair_loss
                total_weight = total_weight + weight
        # Divided by the sum of weights, so that adding a pair does not change the scale of the
        # loss.
        mean_loss = jnp.asarray(total / total_weight, jnp.float32)
        return Loss(mean_loss, metrics, batch_stats, state)

    def _fixed_options(self) -> dict[str, Any]:
        """Arguments of the loss function that the config fixes."""
        # Where the temperature is learnt, `compute_loss` replaces these two by `_learnt_options`.
        options = {'temperature': self.temperature}
        if self.config.form == 'siglip':
            options['bias'] = self.config.bias
        if self.config.form == 'symmetric':
            options['each_mask'] = self.config.each_mask
        return options

    def _learnt_options(self, params: Any, pair: int) -> dict[str, jax.Array]:
        """Arguments of the loss function that are parameters of the pair of this number."""
        if not self.config.learn_temperature:
            return {}
        learnt = {'temperature': jnp.exp(-params['log_scale'][pair])}
        if 'bias' in params:
            learnt['bias'] = params['bias'][pair]
        return learnt

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Hold learnt temperatures within their bounds (CLIP)."""
        if params:
            low, high = self.config.scales
            # Clipped after the update instead of in the loss: a clip in the loss would have zero
            # gradient beyond the bound, so the scale could never return.
            log_scale = jnp.clip(params['log_scale'], jnp.log(low), jnp.log(high))
            params = {**params, 'log_scale': log_scale}
        return model_params, params, state


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    if not config.pairs:
        raise ConfigError(
            f'config.objective.pairs: expected at least one pair, got none. Name one, such as '
            f'{EXAMPLE}.'
        )
    for pair in config.pairs:
        if not _is_pair(pair):
            raise ConfigError(
                'config.objective.pairs: expected (stream, stream, space, weight of at least 0), '
                f'got {pair!r}. Write it like {EXAMPLE}.'
            )
    if not any(weight for *_, weight in config.pairs):
        raise ConfigError(
            'config.objective.pairs: expected a pair with a weight above 0, got none; nothing '
            'would be learnt'
        )
    choose(config.form, FORMS, 'config.objective.form')
    choose(config.method, (*similarity.METHODS, 'dense'), 'config.objective.method')
    choose(config.dtype, ('float32', 'bfloat16'), 'config.objective.dtype')
    if config.each_mask and config.form != 'symmetric':
        raise ConfigError(
            'config.objective.each_mask: expected False unless form="symmetric", got True with '
            f'form={config.form!r}.'
        )
    if len(config.scales) != 2 or not 0 <= config.scales[0] < config.scales[1]:
        raise ConfigError(
            'config.objective.scales: expected two rising numbers of at least 0, such as '
            f'(1.0, 100.0), got {config.scales}.'
        )
    if config.replicas < 1:
        raise ConfigError(
            f'config.objective.replicas: expected a positive number, got {config.replicas}.'
        )


def _is_pair(pair: Any) -> bool:
    """Whether this is (stream, stream, space, weight of at least 0)."""
    if not isinstance(pair, tuple) or len(pair) != 4:
        return False
    weight = pair[3]
    return isinstance(weight, (int, float)) and weight >= 0


def _embedding(
    spaces: Mapping[str, Mapping[str, Any]], space: str, stream: str, when: str = ''
) -> Any:
    """The stream's embeddings in the space: [B E], or [B K E] of candidates."""
    if stream not in spaces.get(space, {}):
        available = [f'{name} in {key}' for key, members in spaces.items() for name in members]
        raise ConfigError(
            f'config.objective.pairs: the model has no {stream!r} in space {space!r}{when}; '
            f'it has {", ".join(available)}'
        )
    return spaces[space][stream]
