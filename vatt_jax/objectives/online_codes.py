"""Online clustering: each view predicts the soft code of another view of the same clip.

SwAV (Caron et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.clustering.sinkhorn import soft_codes
from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'online_codes',
    'views': ('video', 'video.second'),
    # Views whose codes are predicted by all others; (): all.
    'assign': (),
    # Prototypes.
    'clusters': 3000,
    # Of the projection: linear, batch norm, relu, linear; 0: linear.
    'hidden': 2048,
    # Of the space that features and prototypes share.
    'width': 128,
    # Of the transport problem that makes codes.
    'epsilon': 0.05,
    # Of Sinkhorn; far from convergence on purpose: more of them changes the codes.
    'iterations': 3,
    # Of predictions.
    'temperature': 0.1,
    # Features of former steps, for each view of `assign`, that make codes together with the
    # batch's; 0: none.
    'queue': 0,
    # Step from which the queue is used (it is full before).
    'queue_start': 0,
    # Steps in which prototypes do not move.
    'freeze': 0,
}
# Field -> smallest and largest value.
RANGES = {
    'epsilon': (0, math.inf),
    'temperature': (0, math.inf),
}
SMALLEST_VALUES = {
    'clusters': 2,
    'width': 1,
    'iterations': 1,
    'hidden': 0,
    'queue': 0,
    'queue_start': 0,
    'freeze': 0,
}
# What a row of the queue holds.
# NO_VIEW: a row of a clip without this view. It takes a row all the same: shapes are static, so
# every step pushes B rows.
EMPTY, NO_VIEW, FEATURE = 0, 1, 2


class OnlineCodes(Objective):
    """Swapped prediction of codes.

    The mean over views a of `assign` and views v ≠ a of the cross entropy between a's code and v's
    softmax over prototypes. Codes have equal mass for every prototype over the *global* batch.
    Views of a modality share their projection; all share the prototypes.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        c = self.config
        self.assigned_views = tuple(c.assign) or tuple(c.views)
        _check(c)
        self.modalities = heads.by_modality(c.views)
        self.head = heads.Head(c.width, c.hidden)

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.views)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        projection = {}
        norm = {}
        for i, (modality, views) in enumerate(self.modalities.items()):
            widths = [heads.width_of(spec, view) for view in views]  # checks every view
            projection[modality], norm[modality] = heads.init(
                self.head, jax.random.fold_in(key, i), widths[0]
            )
        prototypes_key = jax.random.fold_in(key, len(self.modalities))

        def unit_columns(_: Any, shape: Any) -> jax.Array:
            return heads.unit(jax.random.normal(prototypes_key, shape), 0)

        # Prototypes are columns [E P]: sharded over P, and normalised over E.
        params = {
            'projection': projection,
            'prototypes': logical(unit_columns, None, 'classes')(key, (c.width, c.clusters)),
        }
        # 'seen' counts this objective's steps, from which freeze and queue_start are read:
        # `compute_loss` is not passed the step of the run.
        state: dict[str, Any] = {'norm': norm, 'seen': jnp.zeros((), jnp.int32)}
        if c.queue:

            def zeros(_: Any, shape: Any) -> jax.Array:
                return jnp.zeros(shape)

            state['queue'] = {}
            for view in self.assigned_views:
                state['queue'][view] = {
                    # One queue for each view, of projected features: scores are computed anew with
                    # the prototypes of the step.
                    'features': logical(zeros, 'memory', None)(key, (c.queue, c.width)),
                    'filled': logical(zeros, 'memory')(key, (c.queue,)),
                }
        return params, state

    def project(
        self,
        params: Any,
        norm: Any,
        pooled: Mapping[str, Any],
        valid: Mapping[str, Any],
        rng: Rng,
        train: bool,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """({view: unit features [B E]}, new batch statistics)."""
        projected = {}
        new_norm = dict(norm)
        for modality, views in self.modalities.items():
            # In evaluation a model may lack some of the views; in training all are there.
            modality_pooled = {view: pooled[view] for view in views if view in pooled}
            if not modality_pooled:
                continue
            results, new_norm[modality] = heads.apply(
                self.head,
                params['projection'][modality],
                norm[modality],
                modality_pooled,
                valid,
                rng,
                train,
            )
            for view, (_, outputs) in results.items():
                # SwAV: features and prototypes on the unit sphere, so scores are
                # cosines.
                projected[view] = heads.unit(outputs, -1)
        return projected, new_norm

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
        valid = {view: batch[view]['valid'] & batch['valid'] for view in c.views}  # [B]
        features, norm = self.project(
            params,
            state['norm'],
            {view: pooled[view] for view in c.views},
            valid,
            rng.at('projection'),
            train=True,
        )
        prototypes = params['prototypes']  # [E P]
        is_frozen = state['seen'] < c.freeze
        # In a traced step freezing cannot be an `if`. Of this `where` the first branch has no
        # gradient, so prototypes get exactly zero while frozen; decoupled weight decay only changes
        # their lengths, which `after_update` restores.
        prototypes = jnp.where(is_frozen, jax.lax.stop_gradient(prototypes), prototypes)

        scores = {}
        log_probs = {}
        for view in c.views:
            scores[view] = features[view] @ prototypes  # [B P]
            log_probs[view] = jax.nn.log_softmax(scores[view] / c.temperature, -1)

        new_state = {**state, 'norm': norm, 'seen': state['seen'] + 1}
        total: Any = 0.0
        prototypes_used: Any = 0.0
        metrics: dict[str, Any] = {}
        # ℓ(z_v, q_a) = - Σ_k q_a(k) log p_v(k) (SwAV). Codes q carry no gradient.
        for assigned in self.assigned_views:
            code, queue = self.codes(
                scores[assigned], features[assigned], valid[assigned], prototypes, state, assigned
            )
            if queue is not None:
                new_state['queue'] = {**new_state['queue'], assigned: queue}
            losses = []
            for view in c.views:
                if view != assigned:
                    cross_entropy = -(code * log_probs[view]).sum(-1)  # [B]
                    # A clip needs both views: the code of a missing one is zero, its prediction
                    # meaningless.
                    losses.append(masked_mean(cross_entropy, valid[assigned] & valid[view]))
            view_loss = sum(losses) / len(losses)
            metrics[f'loss/{assigned}'] = view_loss
            total = total + view_loss / len(self.assigned_views)
            # Near 1 where training has collapsed onto one prototype, at most min(B, P).
            num_used = _perplexity(scores[assigned], valid[assigned])
            prototypes_used = prototypes_used + num_used / len(self.assigned_views)
        metrics['prototypes_used'] = prototypes_used
        return Loss(total, metrics, variables['batch_stats'], new_state)

    def codes(
        self,
        scores: jax.Array,
        features: jax.Array,
        valid: jax.Array,
        prototypes: jax.Array,
        state: Any,
        view: str,
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Soft codes of a view, made together with its queue.

        Args:
          scores: [B P], of features against prototypes.
          features: [B E].
          valid: bool [B].
          prototypes: [E P].
          state: the objective's state.
          view: name of the view.

        Returns:
          (codes [B P] of the batch's rows, the view's new queue or None).
        """
        c = self.config
        if not c.queue:
            return soft_codes(scores, c.epsilon, c.iterations, valid), None
        queue = state['queue'][view]
        # The queue counts once its last row has been reached.
        is_full = queue['filled'][-1] > EMPTY
        # Features of a network that has hardly been trained would spoil the codes: SwAV starts its
        # queue after 15 epochs.
        is_ready = is_full & (state['seen'] >= c.queue_start)
        all_scores = jnp.concatenate([scores, queue['features'] @ prototypes])  # [B+Q P]
        is_used = jnp.concatenate([valid, is_ready & (queue['filled'] > NO_VIEW)])
        # Equal mass over batch and queue together, but only the batch has a loss. A batch much
        # smaller than the number of prototypes cannot be split evenly among them (SwAV).
        codes = soft_codes(all_scores, c.epsilon, c.iterations, is_used)[: len(features)]

        # Newest first; also right where the batch is larger than the queue.
        def push(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.concatenate([new.astype(old.dtype), old])[: c.queue]

        new_queue = {
            'features': push(jax.lax.stop_gradient(features), queue['features']),
            'filled': push(NO_VIEW + valid, queue['filled']),  # NO_VIEW + 1 is FEATURE
        }
        return codes, new_queue

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Scale prototypes to length 1 again."""
        # The published code normalises before the forward pass of each step; after the update is
        # the same, and checkpoints hold unit prototypes.
        params = {**params, 'prototypes': heads.unit(params['prototypes'], 0)}
        return model_params, params, state

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """cluster/prototypes -> [B P]: sum over views of log p."""
        pooled = {view: encoded[view].pooled for view in self.config.views if view in encoded}
        if not pooled:
            return {}
        num_rows = len(next(iter(pooled.values())))
        valid = {view: jnp.ones(num_rows, bool) for view in pooled}
        rng = Rng.create(0, 0, jnp.zeros(num_rows, jnp.uint32))  # unused in evaluation mode
        features, _ = self.project(params, state['norm'], pooled, valid, rng, train=False)
        log_probs = []
        for x in features.values():
            logits = x @ params['prototypes'] / self.config.temperature
            log_probs.append(jax.nn.log_softmax(logits, -1))
        # Views as independent evidence: a product of their probabilities, not normalised.
        total: Any = sum(log_probs)
        return {'cluster/prototypes': total}


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    if len(config.views) < 2:
        raise ConfigError(
            f'config.objective.views: expected at least two views, got {tuple(config.views)}. '
            'Set views=("video", "video.second") and '
            "config.data.views=(('video.second', {'kind': 'clip'}),)."
        )
    unknown = sorted(set(config.assign) - set(config.views))
    if unknown:
        raise ConfigError(
            f'config.objective.assign: expected some of config.objective.views '
            f'({", ".join(config.views)}), got {unknown[0]!r}.'
        )
    for field, smallest in SMALLEST_VALUES.items():
        if config[field] < smallest:
            raise ConfigError(
                f'config.objective.{field}: expected at least {smallest}, got {config[field]}.'
            )
    for field in ('epsilon', 'temperature'):
        if not config[field] > 0:
            raise ConfigError(
                f'config.objective.{field}: expected a positive number, got {config[field]}.'
            )


def _perplexity(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """How many prototypes are used: exp(-Σ_k p_k log p_k), p_k the share of rows nearest to k."""
    nearest = jax.nn.one_hot(scores.argmax(-1), scores.shape[-1])  # [B P]
    counts = jnp.where(valid[:, None], nearest, 0).sum(0)
    share = counts / jnp.maximum(valid.sum(), 1)  # [P]
    # 0 log 0 = 0; the inner `where` keeps the logarithm finite where the outer one drops it.
    log_share = jnp.log(jnp.where(share > 0, share, 1))
    return jnp.exp(-jnp.where(share > 0, share * log_share, 0).sum())


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of x [B] over the rows that are valid; 0 if none is."""
    # `where` instead of a product: NaN times 0 is NaN.
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)
