"""Online clustering: each view predicts the soft code of another view of the same clip (SwAV; Caron et al. 2020, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vatt_jax.clustering.sinkhorn import soft_codes
from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Loss, Objective
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'online_codes',
    'views': ('video', 'video.second'),
    'assign': (),  # views whose codes are predicted by all others; (): all
    'clusters': 3000,  # prototypes
    'hidden': 2048,  # of the projection: linear, batch norm, relu, linear; 0: linear
    'width': 128,  # of the space in which features meet prototypes
    'epsilon': 0.05,  # of the transport problem that makes codes
    'iterations': 3,  # of Sinkhorn; far from convergence on purpose: more of them changes the codes
    'temperature': 0.1,  # of predictions
    'queue': 0,  # features of former steps, for each view of `assign`, that make codes together with the batch's; 0: none
    'queue_start': 0,  # step from which the queue is used (it is full before)
    'freeze': 0,  # steps in which prototypes do not move
}


class OnlineCodes(Objective):
    """Mean over views a of `assign` and views v ≠ a of the cross entropy between a's code and v's softmax over prototypes. Codes: equal mass
    for every prototype over the *global* batch. Views of a modality share their projection; all share the prototypes."""

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        self.assign = tuple(c.assign) or tuple(c.views)
        if len(c.views) < 2:
            raise ConfigError(
                f'config.objective.views={tuple(c.views)}: two views at least are wanted, such as ("video", "video.second") with '
                "config.data.views=(('video.second', {'kind': 'clip'}),)"
            )
        if set(self.assign) - set(c.views):
            raise ConfigError(
                f'config.objective.assign names {sorted(set(self.assign) - set(c.views))[0]!r}, which is not among '
                f'config.objective.views ({", ".join(c.views)})'
            )
        for field, low in (
            ('clusters', 2),
            ('width', 1),
            ('iterations', 1),
            ('hidden', 0),
            ('queue', 0),
            ('queue_start', 0),
            ('freeze', 0),
        ):
            if c[field] < low:
                raise ConfigError(f'config.objective.{field}={c[field]}: at least {low} is wanted')
        for field in ('epsilon', 'temperature'):
            if not c[field] > 0:
                raise ConfigError(
                    f'config.objective.{field}={c[field]}: a positive number is wanted'
                )
        self.modalities = heads.by_modality(c.views)
        self.head = heads.Head(c.width, c.hidden)

    def streams(self):
        return tuple(self.config.views)

    def init(self, key, spec):
        c = self.config
        made = {}
        for i, (modality, views) in enumerate(self.modalities.items()):
            widths = [heads.width_of(spec, v) for v in views]
            made[modality] = heads.init(self.head, jax.random.fold_in(key, i), widths[0])
        prototypes = jax.random.normal(jax.random.fold_in(key, len(made)), (c.width, c.clusters))
        params = {
            'projection': {m: p for m, (p, _) in made.items()},
            'prototypes': logical(lambda *_: heads.unit(prototypes, 0), None, 'classes')(
                key, prototypes.shape
            ),
        }
        state = {'norm': {m: s for m, (_, s) in made.items()}, 'seen': jnp.zeros((), jnp.int32)}
        if c.queue:
            rows = lambda *shape: logical(
                lambda *_: jnp.zeros((c.queue, *shape)), 'memory', *[None] * len(shape)
            )(key, (c.queue, *shape))
            state['queue'] = {v: {'features': rows(c.width), 'filled': rows()} for v in self.assign}
        return params, state

    def project(self, params, norm, pooled, valid, rng, train):
        """({view: unit features [B E]}, new batch statistics)."""
        out, new = {}, dict(norm)
        for modality, views in self.modalities.items():
            mine = {v: pooled[v] for v in views if v in pooled}
            if mine:
                results, new[modality] = heads.apply(
                    self.head,
                    params['projection'][modality],
                    norm[modality],
                    mine,
                    valid,
                    rng,
                    train,
                )
                out |= {v: heads.unit(y, -1) for v, (_, y) in results.items()}
        return out, new

    def judge(self, model, variables, params, state, pooled, batch, rng) -> Loss:
        c = self.config
        valid = {v: batch[v]['valid'] & batch['valid'] for v in c.views}
        z, norm = self.project(
            params,
            state['norm'],
            {v: pooled[v] for v in c.views},
            valid,
            rng.at('projection'),
            True,
        )
        prototypes = params['prototypes']
        prototypes = jnp.where(
            state['seen'] < c.freeze, jax.lax.stop_gradient(prototypes), prototypes
        )
        scores = {v: x @ prototypes for v, x in z.items()}
        log_p = {v: jax.nn.log_softmax(s / c.temperature, -1) for v, s in scores.items()}
        new = {**state, 'norm': norm, 'seen': state['seen'] + 1}
        total, metrics, used = 0.0, {}, 0.0
        for a in self.assign:
            code, kept = self.codes(scores[a], z[a], valid[a], prototypes, state, a)
            if kept is not None:
                new['queue'] = {**new['queue'], a: kept}
            others = [v for v in c.views if v != a]
            each = [mean(-(code * log_p[v]).sum(-1), valid[a] & valid[v]) for v in others]
            metrics[f'loss/{a}'] = sum(each) / len(each)
            total = total + metrics[f'loss/{a}'] / len(self.assign)
            share = jnp.where(
                valid[a][:, None], jax.nn.one_hot(scores[a].argmax(-1), c.clusters), 0
            ).sum(0) / jnp.maximum(valid[a].sum(), 1)
            used = used + jnp.exp(
                -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum()
            ) / len(self.assign)
        return Loss(total, {**metrics, 'prototypes_used': used}, variables['batch_stats'], new)

    def codes(self, scores, z, valid, prototypes, state, view):
        """(codes [B P] of the batch's rows, the view's new queue or None)."""
        c = self.config
        if not c.queue:
            return soft_codes(scores, c.epsilon, c.iterations, valid), None
        queue = state['queue'][view]
        ready = (queue['filled'][-1] > 0) & (state['seen'] >= c.queue_start)
        rows = jnp.concatenate([scores, queue['features'] @ prototypes])
        use = jnp.concatenate([valid, ready & (queue['filled'] > 1)])
        push = lambda new, old: jnp.concatenate([new.astype(old.dtype), old])[: c.queue]
        # filled: 0 not yet, 1 a clip without this view, 2 a feature
        kept = {
            'features': push(jax.lax.stop_gradient(z), queue['features']),
            'filled': push(1 + valid, queue['filled']),
        }
        return soft_codes(rows, c.epsilon, c.iterations, use)[: len(z)], kept

    def after_update(self, model_params, params, state, step):
        return model_params, {**params, 'prototypes': heads.unit(params['prototypes'], 0)}, state

    def predict(self, params, state, encoded):
        """cluster/prototypes [B P]: sum over views of log p."""
        pooled = {v: encoded[v].pooled for v in self.config.views if v in encoded}
        if not pooled:
            return {}
        rows = len(next(iter(pooled.values())))
        valid = {v: jnp.ones(rows, bool) for v in pooled}
        z, _ = self.project(
            params,
            state['norm'],
            pooled,
            valid,
            Rng.create(0, 0, jnp.zeros(rows, jnp.uint32)),
            False,
        )
        return {
            'cluster/prototypes': sum(
                jax.nn.log_softmax(x @ params['prototypes'] / self.config.temperature, -1)
                for x in z.values()
            )
        }


def mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1)
