"""Self-labelling by optimal transport: SeLa (one view; Asano et al. 2019) and SeLaVi (views of several modalities; Asano et al. 2020).

Every record has one label for each head; all views learn to predict it. A refresh encodes the training set and finds the labels that
agree best with what the heads say now, among all labelings with the prescribed cluster sizes (clustering/sinkhorn.py).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.clustering import metrics as agreement
from vatt_jax.clustering import sinkhorn
from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Loss, Objective, Refreshed, only
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'self_labelling',
    'views': ('video', 'audio'),  # streams that learn the label they share; a single one: SeLa
    'clusters': 24,
    'heads': 1,  # labelings side by side on the same towers
    'groups': 1,  # of heads; each group is labelled from random clips of its own (decorrelated heads)
    'hidden': 0,  # width of a head's hidden layer with batch norm (SeLaVi: 512); 0: a linear head
    'dropout': 0.0,  # before each layer of a head (SeLaVi: 0.3)
    'unit_logits': False,  # training sees logits scaled to length 1, refreshes and evaluation do not: SeLaVi's public code with several heads
    'strength': 20.0,  # λ of the transport problem, on the geometric mean of the views' probabilities (SeLa: 25)
    'prior': 'uniform',  # cluster sizes: uniform | gaussian | zipf | exponential
    'spread': 0.1,  # gaussian: deviation / mean; zipf: exponent; exponential: log of the largest over the smallest
    'shares': (),  # the prior as a vector of P shares instead
    'published_prior': False,  # gaussian as in the published code: shares go with 1 / size, and each refresh reshuffles them
    'align': True,  # before the first refresh, number the clusters of each modality's head as the first one does
    'refreshes': 100,  # planned over the run; the first comes before any training, the last would come at its end and does not
    'power': 1.5,  # of the schedule: step · (i / (refreshes - 1)) ^ power (SeLaVi 1.5, SeLa 2)
    'warmup': 0,  # steps before the first refresh in which only batch statistics move (SeLaVi: about 20)
    'warm': True,  # start a refresh from the last one's potentials and Newton matrix (heads · clusters² numbers of state)
    'tolerance': 0.0,  # of the solver: sum of |cluster share - prior|; 0: the published stopping rule
}
PRIORS = ('uniform', 'gaussian', 'zipf', 'exponential')
PAIRED = 16384  # rows at most that alignment compares


class SelfLabelling(Objective):
    """Mean over views and heads of the cross entropy with the record's label (SeLaVi, section 3).

    params and state['norm']: {modality: {head: …}}; views of a modality share its heads. Columns: label int32 [M heads], -1 for records
    that no refresh could read. A record that lacks modalities is labelled by those it has.
    """

    def __init__(self, config):
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        choose(c.prior, PRIORS, 'config.objective.prior')
        for field, low in (
            ('clusters', 2),
            ('heads', 1),
            ('groups', 1),
            ('refreshes', 2),
            ('hidden', 0),
            ('warmup', 0),
        ):
            if c[field] < low:
                raise ConfigError(f'config.objective.{field}={c[field]}: at least {low} is wanted')
        if c.groups > c.heads:
            raise ConfigError(
                f'config.objective.groups={c.groups}: there are only {c.heads} heads; set heads to at least as many'
            )
        if not c.views:
            raise ConfigError(
                'config.objective.views is empty; name at least one stream, such as ("video",)'
            )
        if c.shares:
            try:
                sinkhorn.check_prior(c.shares)
            except ValueError as error:
                raise ConfigError(f'config.objective.shares: {error}') from error
            if len(c.shares) != c.clusters:
                raise ConfigError(
                    f'config.objective.shares has {len(c.shares)} entries and config.objective.clusters={c.clusters}'
                )
        self.modalities = heads.by_modality(c.views)
        self.head = heads.Head(c.clusters, c.hidden, c.dropout)
        self.names = [str(h) for h in range(c.heads)]

    def streams(self):
        return tuple(self.config.views)

    def columns(self):
        return {'label': jax.ShapeDtypeStruct((self.config.heads,), jnp.int32)}

    def init(self, key, spec):
        c = self.config
        if spec.size < c.clusters:
            raise ConfigError(
                f'config.objective.clusters={c.clusters}: the training set has {spec.size} records only'
            )
        params, norm = {}, {}
        for i, (modality, views) in enumerate(self.modalities.items()):
            widths = {v: heads.width_of(spec, v) for v in views}
            made = {
                h: heads.init(
                    self.head,
                    jax.random.fold_in(jax.random.fold_in(key, i), int(h)),
                    widths[views[0]],
                )
                for h in self.names
            }
            params[modality], norm[modality] = (
                {h: m[0] for h, m in made.items()},
                {h: m[1] for h, m in made.items()},
            )
        sizes = jnp.stack([self.sizes(jax.random.fold_in(key, 1000 + i)) for i in range(c.heads)])
        state = {
            'norm': norm,
            'sizes': sizes,
            'loss': jnp.zeros(c.heads),
            'seen': jnp.zeros((), jnp.int32),
            'potentials': jnp.zeros((c.heads, c.clusters)),
            'refreshes': jnp.zeros((), jnp.int32),
        }
        return params, state | (
            {'newton': jnp.zeros((c.heads, c.clusters, c.clusters))} if c.warm else {}
        )

    def sizes(self, key) -> jax.Array:
        """float32 [P], positive, of mean 1: the sizes of one head's clusters, largest first but for the gaussian ones."""
        c, rank = self.config, jnp.arange(self.config.clusters)
        x = {
            'uniform': lambda: jnp.ones(c.clusters),
            'zipf': lambda: (1.0 + rank) ** -c.spread,
            'exponential': lambda: jnp.exp(-c.spread * rank / (c.clusters - 1)),
            'gaussian': lambda: jnp.maximum(
                1 + c.spread * jax.random.normal(key, (c.clusters,)), 0.01
            ),
        }[c.prior]()
        x = jnp.asarray(c.shares, jnp.float32) if c.shares else x
        return x / x.mean()

    # ---- a step
    def judge(self, model, variables, params, state, pooled, batch, rng) -> Loss:
        views = self.config.views
        logits, norm = self.apply(
            params,
            state['norm'],
            pooled,
            {v: batch[v]['valid'] for v in views},
            rng.at('heads'),
            True,
        )
        stats = variables['batch_stats']
        state = {**state, 'norm': norm, 'seen': state['seen'] + 1}
        if 'columns' not in batch:  # before the first refresh
            return Loss(jnp.zeros(()), {}, stats, state, jnp.zeros((), bool))
        label = batch['columns']['label']
        each, metrics = {}, {}
        for v in views:
            seen = (label >= 0) & (batch['valid'] & batch[v]['valid'])[:, None]
            z = {
                h: heads.unit(logits[h][v][1]) if self.config.unit_logits else logits[h][v][1]
                for h in self.names
            }
            each[v] = jnp.stack(
                [
                    softmax_cross_entropy(z[h], jnp.maximum(label[:, i], 0), weight=seen[:, i])
                    for i, h in enumerate(self.names)
                ]
            )
            right = sum(
                ((logits[h][v][1].argmax(-1) == label[:, i]) & seen[:, i]).sum()
                for i, h in enumerate(self.names)
            )
            metrics |= {
                f'loss/{v}': each[v].mean(),
                f'accuracy/{v}': right / jnp.maximum(seen.sum(), 1),
            }
        by_head = sum(each.values()) / len(views)
        state['loss'] = jnp.where(state['loss'] > 0, 0.99 * state['loss'] + 0.01 * by_head, by_head)
        return Loss(by_head.mean(), metrics, stats, state)

    def apply(self, params, norm, pooled, valid, rng, train):
        """({head: {view: (hidden, logits)}}, new batch statistics of the heads)."""
        out, new = {h: {} for h in self.names}, {m: {} for m in self.modalities}
        for modality, views in self.modalities.items():
            mine = lambda x, views=views: {v: x[v] for v in views if v in x}
            for h in self.names:
                if mine(pooled):
                    results, new[modality][h] = heads.apply(
                        self.head,
                        params[modality][h],
                        norm[modality][h],
                        mine(pooled),
                        mine(valid),
                        rng.at(h),
                        train,
                    )
                    out[h] |= results
        return out, new

    def predict(self, params, state, encoded):
        """cluster/<head> [B P]: sum over views of log p, whose maximum is the label that evaluation reads (no transport)."""
        pooled = {v: encoded[v].pooled for v in self.config.views if v in encoded}
        if not pooled:
            return {}
        valid = {v: jnp.ones(len(x), bool) for v, x in pooled.items()}
        rng = Rng.create(0, 0, jnp.zeros(len(next(iter(pooled.values()))), jnp.uint32))
        logits, _ = self.apply(params, state['norm'], pooled, valid, rng, False)
        return {
            f'cluster/{h}': sum(jax.nn.log_softmax(z, -1) for _, z in by_view.values())
            for h, by_view in logits.items()
        }

    def running_losses(self, state):
        return {f'cluster/{h}': float(x) for h, x in zip(self.names, np.asarray(state['loss']))}

    # ---- a refresh
    def refresh_due(self, step, steps):
        return step in schedule(
            steps - self.config.warmup, self.config.refreshes, self.config.power, self.config.warmup
        )

    def features(self, model, variables, params, batch, rng):
        """Pooled features and validity of every view."""
        encoded = model.apply(
            variables, only(batch, self.streams()), train=False, rng=rng, method='encode_all'
        )
        return {v: encoded[v].pooled.astype(jnp.float32) for v in self.config.views} | {
            f'{v}/valid': batch[v]['valid'] for v in self.config.views
        }

    def refresh(self, variables, params, state, step, records) -> Refreshed:
        c, mesh = self.config, jax.sharding.get_mesh()
        params, state = jax.tree.map(
            np.array, jax.device_put((params, state), jax.NamedSharding(mesh, jax.P()))
        )
        column = np.full((records.size, c.heads), -1, np.int32)
        told: dict[str, list[float]] = {}
        for group in range(c.groups):
            rows = records.encode(self.features, draw=group)
            valid = np.stack([rows[f'{v}/valid'] for v in c.views], 1)
            use = valid.any(1)
            index = rows['index'][use]
            for i in range(group, c.heads, c.groups):
                labels, here = self.relabel(
                    i, params, state, {v: rows[v][use] for v in c.views}, valid[use], mesh
                )
                column[index, i] = labels
                before = (
                    records.columns['label'][index, i]
                    if 'label' in records.columns
                    else np.full(1, -1)
                )
                if (before >= 0).all():
                    here |= {
                        'changed': np.mean(before != labels),
                        'NMI_to_last': agreement.nmi(labels, before),
                    }
                for name, value in here.items():
                    told.setdefault(name, []).append(float(value))
        state['refreshes'] = state['refreshes'] + 1
        return Refreshed(
            params,
            state,
            columns={'label': column},
            metrics={k: float(np.mean(v)) for k, v in told.items()},
        )

    def relabel(self, i, params, state, features, valid, mesh):
        """(labels int32 [n], what is to be told) of head number i from features {view: [n D]} and valid [n views], at least one of a row; params
        (aligned, the first time) and the head's part of state are changed in place."""
        c, h, first = self.config, self.names[i], not state['refreshes']
        hidden = {v: self.hidden(params, state['norm'], v, h, features[v]) for v in c.views}
        if first and c.align:
            self.align(params, h, hidden, valid)
        # A last column carries the bias, so that one weight per row gives the mean over the views that a record has.
        weight = valid * (len(c.views) / valid.sum(1, keepdims=True)).astype(np.float32)
        views = [
            np.concatenate([hidden[v], np.ones((len(valid), 1), np.float32)], 1)
            * weight[:, j : j + 1]
            for j, v in enumerate(c.views)
        ]
        last = [params[v.split('.')[0]][h] for v in c.views]
        kernels = [
            (np.concatenate([p['kernel'], p['bias'][None]]), np.zeros(c.clusters, np.float32))
            for p in last
        ]
        mass = (
            (lambda: product_mass(views, kernels))
            if c.published_prior
            else lambda: sinkhorn.shares(views, c.strength, heads=kernels, mesh=mesh)
        )
        state['sizes'][i], prior = self.prior(state['sizes'][i], mass)
        start = None
        if c.warm and not first:
            start = sinkhorn.Start(
                state['potentials'][i], state['newton'][i] if state['newton'][i].any() else None
            )
        found = sinkhorn.solve(
            views,
            prior,
            c.strength,
            heads=kernels,
            tolerance=c.tolerance or 'published',
            start=start,
            mesh=mesh,
        )
        state['potentials'][i] = found.potentials
        if c.warm:
            state['newton'][i] = 0 if found.preconditioner is None else found.preconditioner
        sizes = np.bincount(found.labels, minlength=c.clusters) / len(valid)
        # The weights above leave labels as they are, not the cost of records that lack a view.
        cost = {'cost': found.cost} if valid.all() else {}
        return found.labels, {
            **cost,
            'passes': found.work,
            'residual': found.residual,
            'published_error': found.published_error,
            'converged': found.converged,
            'largest_cluster': sizes.max(),
            'empty_clusters': (sizes == 0).sum(),
        }

    def hidden(self, params, norm, view, h, x) -> np.ndarray:
        """float32 [n W]: what the view's last layer sees, in evaluation mode; x: host features [n D]."""
        if not self.config.hidden:
            return x
        modality = view.split('.')[0]
        blocks = [
            _hidden(self.head, params[modality][h], norm[modality][h], x[i : i + 16384])
            for i in range(0, len(x), 16384)
        ]
        return np.concatenate([np.asarray(b) for b in blocks])

    def align(self, params, h, hidden, valid) -> None:
        """Renumbers, in place, the clusters of every modality's head but the first: the permutation of least L1 distance between what the two
        say of the same records (SeLaVi's "modality alignment", solved exactly instead of by random swaps)."""
        from scipy.optimize import linear_sum_assignment

        views = {m: vs[0] for m, vs in self.modalities.items()}
        reference, *others = views
        place = {v: j for j, v in enumerate(self.config.views)}
        for modality in others:
            rows = np.flatnonzero(
                valid[:, place[views[reference]]] & valid[:, place[views[modality]]]
            )[:PAIRED]
            p, q = (
                np.asarray(
                    jax.nn.softmax(
                        hidden[views[m]][rows] @ params[m][h]['kernel'] + params[m][h]['bias']
                    )
                )
                for m in (reference, modality)
            )
            cost = np.stack([np.abs(p[:, k : k + 1] - q).sum(0) for k in range(p.shape[1])])
            order = linear_sum_assignment(cost)[1]
            old = params[modality][h]
            params[modality][h] = {
                **old,
                'kernel': old['kernel'][:, order],
                'bias': old['bias'][order],
            }

    def prior(self, sizes, mass) -> tuple[np.ndarray, np.ndarray]:
        """(sizes, share of each cluster [P]): the largest size goes to the cluster with most mass. mass() [P]: column means without transport;
        published_prior: sums of the views' product. There the sort is along an axis of one, so what is left of it is a permutation."""
        if (sizes == sizes[0]).all():
            return sizes, np.full(len(sizes), 1 / len(sizes))
        rank, placed = np.argsort(mass(), kind='stable'), np.empty(len(sizes), sizes.dtype)
        if self.config.published_prior:
            placed[rank] = sizes
            return placed, (1 / placed) / (1 / placed).sum()
        placed[rank] = np.sort(sizes)
        return sizes, placed / placed.sum()


def product_mass(views, kernels) -> np.ndarray:
    """float64 [P]: sums over records of the product over views of their probabilities. views: features [n D]; kernels: (kernel [D P], bias [P])."""
    total = np.zeros(len(kernels[0][1]))
    for i in range(0, len(views[0]), PAIRED):
        logits = [x[i : i + PAIRED].astype(np.float64) @ k + b for x, (k, b) in zip(views, kernels)]
        total += np.prod(
            [sinkhorn.soft_assignments(z, np.zeros(z.shape[1])) for z in logits], 0
        ).sum(0)
    return total


@functools.partial(jax.jit, static_argnames='head')
def _hidden(head, params, stats, x):
    rng = Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32))
    return heads.apply(head, params, stats, {'x': x}, {'x': jnp.ones(len(x), bool)}, rng, False)[0][
        'x'
    ][0]


@functools.cache
def schedule(steps: int, count: int, power: float, first: int = 0) -> frozenset[int]:
    """Steps before which a refresh comes: first + steps · (i / (count - 1)) ^ power, one per step at most, so that times that fall into one
    step move on to the next ones; the end of the run is never one."""
    out, last = [], -1
    for i in range(count):
        last = max(last + 1, math.ceil(steps * (i / (count - 1)) ** power - 1e-9))
        if last >= steps:
            break
        out.append(first + last)
    return frozenset(out)
