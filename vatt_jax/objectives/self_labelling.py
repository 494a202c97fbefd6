"""Self-labelling by optimal transport: SeLa and SeLaVi.

SeLa has one view (Asano et al. 2019), SeLaVi views of several modalities (Asano et al. 2020). Every
record has one label for each head; all views learn to predict it. A refresh encodes the training
set and finds the labels that agree best with what the heads say now, among all labelings with the
prescribed cluster sizes (clustering/sinkhorn.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vatt_jax.clustering import metrics as agreement
from vatt_jax.clustering import sinkhorn
from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import (
    Loss,
    Objective,
    RefreshResult,
    Spec,
    TrainingRecords,
    select_streams,
)
from vatt_jax.parallel import hosts
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'self_labelling',
    # Streams that learn the label they share; a single one: SeLa.
    'views': ('video', 'audio'),
    'clusters': 24,
    # Labelings side by side on the same towers.
    'heads': 1,
    # Groups of heads; each is labelled from random clips of its own (decorrelated heads).
    'groups': 1,
    # Width of a head's hidden layer with batch norm (SeLaVi: 512); 0: a linear head.
    'hidden': 0,
    # Before each layer of a head (SeLaVi: 0.3).
    'dropout': 0.0,
    # Training sees logits scaled to length 1, refreshes and evaluation do not: SeLaVi's public code
    # with several heads.
    'unit_logits': False,
    # λ of the transport problem, on the geometric mean of the views' probabilities (SeLa: 25).
    'strength': 20.0,
    # Cluster sizes: uniform | gaussian | zipf | exponential.
    'prior': 'uniform',
    # gaussian: deviation / mean; zipf: exponent; exponential: log of the largest over the smallest.
    'spread': 0.1,
    # The prior as a vector of P shares instead.
    'shares': (),
    # gaussian as in the published code: shares go with 1 / size, and each refresh reshuffles them.
    'published_prior': False,
    # Before the first refresh, number the clusters of each modality's head as the first one does.
    'align': True,
    # Planned over the run; the first comes before any training, the last would come at its end and
    # does not.
    'refreshes': 100,
    # Of the schedule: step · (i / (refreshes - 1)) ^ power (SeLaVi 1.5, SeLa 2).
    'power': 1.5,
    # Steps before the first refresh in which only batch statistics move (SeLaVi: about 20).
    'warmup': 0,
    # Start a refresh from the last one's potentials and Newton matrix (heads · clusters² numbers of
    # state).
    'warm': True,
    # Of the solver: sum of |cluster share - prior|; 0: the published stopping rule.
    'tolerance': 0.0,
}
# Field -> smallest and largest value.
RANGES = {
    'dropout': (0, 1),
    'strength': (0, math.inf),
    'spread': (0, math.inf),
    'power': (0, math.inf),
    'tolerance': (0, math.inf),
}
PRIORS = ('uniform', 'gaussian', 'zipf', 'exponential')
SMALLEST_VALUES = {
    'clusters': 2,
    'heads': 1,
    'groups': 1,
    'refreshes': 2,
    'hidden': 0,
    'warmup': 0,
}
PAIRED = 16384  # rows at most that alignment compares; rows of one block of `product_mass`
HIDDEN_BLOCK = 16384  # rows that pass through the hidden layer at a time


class SelfLabelling(Objective):
    """Mean over views and heads of the cross entropy with the record's label (SeLaVi).

    params and state['norm'] are {modality: {head: …}}; views of a modality share its heads. The
    column `label` is [M heads], -1 for records that no refresh could read. A record that lacks
    modalities is labelled by those it has.

    Attributes:
      DEFAULTS: the fields of config.objective, of a subclass with its own.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = DEFAULTS

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, self.DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        _check(self.config)
        self.modalities = heads.by_modality(self.config.views)
        self.head = heads.Head(self.config.clusters, self.config.hidden, self.config.dropout)
        self.head_names = [str(head) for head in range(self.config.heads)]

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.views)

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        c = self.config
        return {'label': jax.ShapeDtypeStruct((c.heads,), heads.label_dtype(c.clusters))}

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        if spec.size < c.clusters:
            raise ConfigError(
                f'config.objective.clusters: expected at most one cluster per record, got '
                f'{c.clusters} for {spec.size} records. Set fewer clusters.'
            )
        params: dict[str, Any] = {}
        norm: dict[str, Any] = {}
        for i, (modality, views) in enumerate(self.modalities.items()):
            widths = [heads.width_of(spec, view) for view in views]  # checks every view
            modality_key = jax.random.fold_in(key, i)
            params[modality], norm[modality] = {}, {}
            for head in self.head_names:
                head_key = jax.random.fold_in(modality_key, int(head))
                head_params, head_stats = heads.init(self.head, head_key, widths[0])
                params[modality][head] = head_params
                norm[modality][head] = head_stats

        # The keys of sizes start at 1000, beyond those of modalities.
        sizes = [self.sizes(jax.random.fold_in(key, 1000 + i)) for i in range(c.heads)]
        state = {
            'norm': norm,
            # Drawn once: the same sizes are matched to clusters at every refresh.
            'sizes': jnp.stack(sizes),  # [heads P]
            # Running mean of each head: `chosen/…` of the clustering evaluator.
            'loss': jnp.zeros(c.heads),
            'seen': jnp.zeros((), jnp.int32),
            # g of the transport problem (clustering/sinkhorn.py), in float32 between refreshes.
            'potentials': jnp.zeros((c.heads, c.clusters)),
            'refreshes': jnp.zeros((), jnp.int32),
        }
        if c.warm:
            state['newton'] = jnp.zeros((c.heads, c.clusters, c.clusters))
        return params, state

    def sizes(self, key: jax.Array) -> jax.Array:
        """Draw the relative sizes of one head's clusters.

        Returns:
          float32 [P], positive, of mean 1; largest first but for the gaussian ones.
        """
        c = self.config
        rank = jnp.arange(c.clusters)
        if c.shares:
            sizes = jnp.asarray(c.shares, jnp.float32)
        elif c.prior == 'uniform':
            sizes = jnp.ones(c.clusters)
        elif c.prior == 'zipf':
            sizes = (1.0 + rank) ** -c.spread
        elif c.prior == 'exponential':
            # From 1 down to exp(-spread).
            sizes = jnp.exp(-c.spread * rank / (c.clusters - 1))
        else:
            # gaussian: N(1, spread²), as SeLaVi with spread 0.1; every head has a key of its own.
            noise = jax.random.normal(key, (c.clusters,))
            sizes = jnp.maximum(1 + c.spread * noise, 0.01)  # a size stays positive
        return sizes / sizes.mean()

    # ---- A step.

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
        views = self.config.views
        is_present = {view: batch[view]['valid'] for view in views}
        logits, norm = self.apply_heads(
            params, state['norm'], pooled, is_present, rng.at('heads'), train=True
        )
        batch_stats = variables['batch_stats']
        state = {**state, 'norm': norm, 'seen': state['seen'] + 1}
        # A static condition: batches have columns from the first refresh on, when the step is
        # traced again.
        if 'columns' not in batch:
            # Before the first refresh there are no labels: only batch statistics move.
            return Loss(jnp.zeros(()), {}, batch_stats, state, jnp.zeros((), bool))

        labels = batch['columns']['label'].astype(jnp.int32)  # [B heads]
        losses_by_view = []
        metrics = {}
        for view in views:
            row_counts = batch['valid'] & is_present[view]  # [B]
            is_labelled = (labels >= 0) & row_counts[:, None]  # [B heads]
            view_losses = []
            num_correct = 0
            for i, head in enumerate(self.head_names):
                _, head_logits = logits[head][view]  # [B P]
                predicted = head_logits.argmax(-1)
                num_correct += ((predicted == labels[:, i]) & is_labelled[:, i]).sum()
                if self.config.unit_logits:
                    head_logits = heads.unit(head_logits)
                # Labels of -1 weigh nothing; they only need to be valid indices.
                targets = jnp.maximum(labels[:, i], 0)
                view_losses.append(
                    softmax_cross_entropy(head_logits, targets, weight=is_labelled[:, i])
                )
            view_loss = jnp.stack(view_losses)  # [heads]
            losses_by_view.append(view_loss)
            metrics[f'loss/{view}'] = view_loss.mean()
            # Both count rows times heads.
            metrics[f'accuracy/{view}'] = num_correct / jnp.maximum(is_labelled.sum(), 1)

        loss_by_head: Any = sum(losses_by_view) / len(views)  # [heads]
        # The running loss starts from the first value instead of from 0.
        running = 0.99 * state['loss'] + 0.01 * loss_by_head
        state['loss'] = jnp.where(state['loss'] > 0, running, loss_by_head)
        return Loss(loss_by_head.mean(), metrics, batch_stats, state)

    def apply_heads(
        self,
        params: Any,
        norm: Any,
        pooled: Mapping[str, Any],
        valid: Mapping[str, Any],
        rng: Rng,
        train: bool,
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Apply all heads to the views that are there.

        Returns:
          ({head: {view: (hidden [B W], logits [B P])}}, the heads' new batch statistics).
        """
        results: dict[str, dict[str, Any]] = {head: {} for head in self.head_names}
        new_norm: dict[str, dict[str, Any]] = {modality: {} for modality in self.modalities}
        for modality, views in self.modalities.items():
            modality_pooled = {view: pooled[view] for view in views if view in pooled}
            modality_valid = {view: valid[view] for view in views if view in valid}
            if not modality_pooled:
                continue
            for head in self.head_names:
                by_view, new_norm[modality][head] = heads.apply(
                    self.head,
                    params[modality][head],
                    norm[modality][head],
                    modality_pooled,
                    modality_valid,
                    rng.at(head),
                    train,
                )
                results[head].update(by_view)
        return results, new_norm

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Sum over views of log p for every head.

        Its maximum is the label that evaluation reads (no transport).

        Returns:
          cluster/<head> -> [B P].
        """
        pooled = {view: encoded[view].pooled for view in self.config.views if view in encoded}
        if not pooled:
            return {}
        num_rows = len(next(iter(pooled.values())))
        valid = {view: jnp.ones(num_rows, bool) for view in pooled}
        rng = Rng.create(0, 0, jnp.zeros(num_rows, jnp.uint32))  # unused in evaluation mode
        logits, _ = self.apply_heads(params, state['norm'], pooled, valid, rng, train=False)
        predictions = {}
        for head, by_view in logits.items():
            log_probs = [jax.nn.log_softmax(z, -1) for _, z in by_view.values()]
            total: Any = sum(log_probs)
            predictions[f'cluster/{head}'] = total
        return predictions

    def running_losses(self, state: Any) -> dict[str, float]:
        losses = np.asarray(state['loss'])
        return {f'cluster/{head}': float(loss) for head, loss in zip(self.head_names, losses)}

    # ---- A refresh, on the host.

    def refresh_due(self, step: int, steps: int) -> bool:
        c = self.config
        # `schedule` is cached: this is called at every step.
        return step in schedule(steps - c.warmup, c.refreshes, c.power, c.warmup)

    def features(
        self, model: Any, variables: Any, params: Any, batch: Mapping[str, Any], rng: Any
    ) -> dict[str, jax.Array]:
        """Pooled features (<view>, float32 [B D]) and validity (<view>/valid) of every view."""
        streams = select_streams(batch, self.streams())
        encoded = model.apply(variables, streams, train=False, rng=rng, method='encode_all')
        features = {}
        for view in self.config.views:
            # Features, not logits: heads are applied later, one at a time, so that logits of all
            # heads, [M heads P], never exist.
            features[view] = encoded[view].pooled.astype(jnp.float32)
            features[f'{view}/valid'] = batch[view]['valid']
        return features

    def refresh(
        self, variables: Any, params: Any, state: Any, step: int, records: TrainingRecords
    ) -> RefreshResult:
        c = self.config
        mesh = jax.sharding.get_mesh()
        # Whole copies on the host, which `relabel` may change in place.
        replicated = jax.device_put((params, state), jax.NamedSharding(mesh, jax.P()))
        params, state = jax.tree.map(np.array, replicated)

        new_labels = np.full((records.size, c.heads), -1, heads.label_dtype(c.clusters))
        metrics: dict[str, list[float]] = {}
        for group in range(c.groups):
            # One pass over the records for each group of heads, with other random windows and
            # crops.
            encoded = records.encode(self.features, draw=group)
            valid = np.stack([encoded[f'{view}/valid'] for view in c.views], 1)  # [n views]
            # A record without any of the views has no evidence for a label.
            is_used = valid.any(1)
            rows = encoded['index']
            features = {view: encoded[view] for view in c.views}
            # A copy of the features of millions of records only where it leaves some out.
            if not is_used.all():
                rows, valid = rows[is_used], valid[is_used]
                features = {view: x[is_used] for view, x in features.items()}
            for i in range(group, c.heads, c.groups):
                labels, head_metrics = self.relabel(i, params, state, features, valid, mesh)
                new_labels[rows, i] = labels
                if 'label' in records.columns:
                    old_labels = records.columns['label'][rows, i]
                    head_metrics |= _changes(old_labels, labels, c.clusters)
                for name, value in head_metrics.items():
                    metrics.setdefault(name, []).append(float(value))
        state['refreshes'] = state['refreshes'] + 1
        return RefreshResult(
            params,
            state,
            columns={'label': new_labels},
            metrics={name: float(np.mean(values)) for name, values in metrics.items()},
        )

    def relabel(
        self,
        head_index: int,
        params: Any,
        state: Any,
        features: Mapping[str, Float[np.ndarray, 'n _']],
        valid: Bool[np.ndarray, 'n V'],
        mesh: Any,
    ) -> tuple[Int[np.ndarray, ' n'], dict[str, Any]]:
        """Find the labels of one head by optimal transport, on all hosts together.

        Params (aligned, the first time) and the head's part of the state are changed in place.

        Args:
          head_index: number of the head.
          params: the objective's parameters, on the host.
          state: the objective's state, on the host.
          features: view -> pooled features [n D] of this host's records.
          valid: which views each record has, at least one.
          mesh: devices of the solver.

        Returns:
          (labels int32 [n], name -> number to report).
        """
        c = self.config
        head = self.head_names[head_index]
        is_first = not state['refreshes']
        # All but the last layer, so that the logits are one matrix product, which the solver can do
        # blockwise.
        hidden = {
            view: self.hidden_features(params, state['norm'], view, head, features[view])
            for view in c.views
        }
        if is_first and c.align:
            # Untrained heads number their clusters at random, and a mean over views of unrelated
            # numberings would say nothing.
            self.align(params, head, hidden, valid)

        # The solver reads the logits as products of views and kernels.
        views, kernels = self._transport_inputs(params, head, hidden, valid)
        prior = self._update_sizes(head_index, state, views, kernels, mesh)
        start = self._previous_solution(head_index, state) if c.warm and not is_first else None
        solution = sinkhorn.solve(
            views,
            prior,
            c.strength,
            heads=kernels,
            tolerance=c.tolerance or 'published',
            start=start,
            mesh=mesh,
        )
        state['potentials'][head_index] = solution.potentials
        if c.warm:
            newton = solution.preconditioner
            state['newton'][head_index] = 0 if newton is None else newton

        # Of the labels, which are the argmax of the relaxed plan: near the prior, not equal to it.
        sizes = hosts.total(np.bincount(solution.labels, minlength=c.clusters))  # [P]
        shares = sizes / sizes.sum()
        metrics = {
            'passes': solution.work,
            'residual': solution.residual,
            'published_error': solution.published_error,
            'converged': solution.converged,
            'largest_cluster': shares.max(),
            'empty_clusters': (shares == 0).sum(),
        }
        # The weights of views leave labels as they are, but not the cost of records that lack a
        # view, so the cost is reported only where every record has all views.
        if not hosts.total(np.sum(~valid)):
            metrics = {'cost': solution.cost, **metrics}
        return solution.labels, metrics

    def _transport_inputs(
        self,
        params: Any,
        head: str,
        hidden: Mapping[str, Float[np.ndarray, 'n _']],
        valid: Bool[np.ndarray, 'n V'],
    ) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
        """(views [n D+1], (kernel [D+1 P], bias [P]) of each) whose products are the logits."""
        c = self.config
        # A last column carries the bias, so that one weight per row gives the mean over the views
        # that a record has.
        # The solver divides by the number V of views. With V / (views of the record) as weight, and
        # 0 for missing views, that becomes the mean over those it has.
        weights = valid * (len(c.views) / valid.sum(1, keepdims=True)).astype(np.float32)  # [n V]
        views = []
        kernels = []
        for i, view in enumerate(c.views):
            num_rows, width = hidden[view].shape
            # Written in place: products and concatenations would be two more arrays of this size.
            weighted = np.empty((num_rows, width + 1), np.float32)
            np.multiply(hidden[view], weights[:, i : i + 1], out=weighted[:, :width])
            weighted[:, width] = weights[:, i]
            views.append(weighted)
            last_layer = params[heads.modality_of(view)][head]
            kernel = np.concatenate([last_layer['kernel'], last_layer['bias'][None]])  # [D+1 P]
            # The bias is a row of the kernel now; as a bias it would escape the weights.
            kernels.append((kernel, np.zeros(c.clusters, np.float32)))
        return views, kernels

    def _update_sizes(
        self,
        head_index: int,
        state: Any,
        views: Sequence[np.ndarray],
        kernels: Sequence[tuple[np.ndarray, np.ndarray]],
        mesh: Any,
    ) -> np.ndarray:
        """Assign the sizes to clusters, in place, and return the share of each cluster [P]."""

        def mass() -> np.ndarray:
            if self.config.published_prior:
                return product_mass(views, kernels)
            # Without transport (g = 0): what the model would say if left to itself.
            return sinkhorn.shares(views, self.config.strength, heads=kernels, mesh=mesh)

        sizes, prior = self.prior(state['sizes'][head_index], mass)
        state['sizes'][head_index] = sizes
        return prior

    def _previous_solution(self, head_index: int, state: Any) -> sinkhorn.Start:
        """Where the last refresh of this head ended."""
        newton = state['newton'][head_index]
        # All zeros: the last solution came without a matrix.
        preconditioner = newton if newton.any() else None
        return sinkhorn.Start(state['potentials'][head_index], preconditioner)

    def hidden_features(
        self, params: Any, norm: Any, view: str, head: str, features: Float[np.ndarray, 'n _']
    ) -> Float[np.ndarray, 'n _']:
        """What the view's last layer sees in evaluation mode: float32 [n W] on the host."""
        if not self.config.hidden:
            return features
        modality = heads.modality_of(view)
        width = params[modality][head]['kernel'].shape[0]
        hidden = np.empty((len(features), width), np.float32)
        pending: list[tuple[int, jax.Array]] = []  # (first row, block)
        with _own_devices():
            for first in range(0, len(features), HIDDEN_BLOCK):
                block = features[first : first + HIDDEN_BLOCK]
                computed = _hidden(self.head, params[modality][head], norm[modality][head], block)
                pending.append((first, computed))
                # Fetched one block late, so that a block is computed while the next one is sent;
                # not later, or the device would hold them all.
                if len(pending) > 1:
                    _store_block(hidden, *pending.pop(0))
        for first, computed in pending:
            _store_block(hidden, first, computed)
        return hidden

    def align(
        self,
        params: Any,
        head: str,
        hidden: Mapping[str, Float[np.ndarray, 'n _']],
        valid: Bool[np.ndarray, 'n V'],
    ) -> None:
        """Renumber, in place, the clusters of every modality's head but the first.

        The permutation has the least L1 distance between what the two say of the same records:
        SeLaVi's "modality alignment", solved exactly instead of by random swaps.
        """
        from scipy.optimize import linear_sum_assignment

        first_views = {modality: views[0] for modality, views in self.modalities.items()}
        # One view of each modality is enough: views of a modality share the head.
        reference, *others = first_views

        def has_modality(modality: str) -> np.ndarray:
            return valid[:, list(self.config.views).index(first_views[modality])]  # [n]

        def probabilities(modality: str, rows: np.ndarray) -> np.ndarray:
            last_layer = params[modality][head]
            x = hidden[first_views[modality]][rows]
            logits = x @ last_layer['kernel'] + last_layer['bias']
            with _own_devices():
                return np.asarray(jax.nn.softmax(logits))  # [rows P]

        for modality in others:
            rows = np.flatnonzero(has_modality(reference) & has_modality(modality))
            rows = rows[: _share_of(PAIRED, len(rows))]
            p = probabilities(reference, rows)
            q = probabilities(modality, rows)
            # cost[k, l] = sum over rows of |p_k - q_l|
            num_clusters = p.shape[1]
            part = np.stack([np.abs(p[:, k : k + 1] - q).sum(0) for k in range(num_clusters)])
            cost = hosts.total(part)
            # order[k] is the old number of what becomes cluster k. Columns of the last layer move;
            # hidden layers and their statistics stay.
            _, order = linear_sum_assignment(cost)
            last_layer = params[modality][head]
            params[modality][head] = {
                **last_layer,
                'kernel': last_layer['kernel'][:, order],
                'bias': last_layer['bias'][order],
            }

    def prior(
        self, sizes: np.ndarray, mass: Callable[[], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Assign sizes to clusters: the largest one goes to the cluster with most mass.

        In the published code the sort of sizes is along an axis of one, so what is left of it is a
        permutation; `published_prior` does the same, and its shares go with 1 / size.

        Args:
          sizes: [P], as the last refresh left them.
          mass: gives [P], the column means without transport or, with `published_prior`, the sums
            of the product of the views' probabilities. Called only where sizes differ.

        Returns:
          (sizes [P] by cluster, share of each cluster [P]).
        """
        if (sizes == sizes[0]).all():
            return sizes, np.full(len(sizes), 1 / len(sizes))
        # Smallest first, as `np.sort(sizes)` below.
        by_mass = np.argsort(mass(), kind='stable')
        assigned = np.empty(len(sizes), sizes.dtype)
        if self.config.published_prior:
            # In whatever order the last refresh left them, hence a reshuffle.
            assigned[by_mass] = sizes
            return assigned, (1 / assigned) / (1 / assigned).sum()
        # `sizes` itself is returned as it was, so that nothing depends on earlier refreshes.
        assigned[by_mass] = np.sort(sizes)
        return sizes, assigned / assigned.sum()


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    choose(config.prior, PRIORS, 'config.objective.prior')
    for field, smallest in SMALLEST_VALUES.items():
        if config[field] < smallest:
            raise ConfigError(
                f'config.objective.{field}: expected at least {smallest}, got {config[field]}.'
            )
    if config.groups > config.heads:
        raise ConfigError(
            f'config.objective.groups: expected at most one group per head, got {config.groups} '
            f'for {config.heads} heads. Set heads to at least as many.'
        )
    if not config.views:
        raise ConfigError(
            'config.objective.views: expected at least one stream, got none. '
            'Name one, such as ("video",).'
        )
    if config.shares:
        try:
            sinkhorn.check_prior(config.shares)
        except ValueError as error:
            raise ConfigError(f'config.objective.shares: {error}') from error
        if len(config.shares) != config.clusters:
            raise ConfigError(
                f'config.objective.shares: expected one share for each of the {config.clusters} '
                f'clusters, got {len(config.shares)}. Change shares or clusters.'
            )


def product_mass(
    views: Sequence[Float[np.ndarray, 'n _']],
    kernels: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Float[np.ndarray, ' P']:
    """Sums over records of the product over views of their probabilities.

    Args:
      views: features of each view, of this host's records.
      kernels: (kernel [D P], bias [P]) of each view.

    Returns:
      float64 [P], of the records of all hosts.
    """
    num_clusters = len(kernels[0][1])
    total = np.zeros(num_clusters)
    for first in range(0, len(views[0]), PAIRED):
        probs = []
        for features, (kernel, bias) in zip(views, kernels):
            block = features[first : first + PAIRED].astype(np.float64)
            logits = block @ kernel + bias  # [rows P]
            probs.append(sinkhorn.soft_assignments(logits, np.zeros(num_clusters)))
        total += np.prod(probs, 0).sum(0)
    return hosts.total(total)


def _changes(
    old: Int[np.ndarray, ' n'], new: Int[np.ndarray, ' n'], num_clusters: int
) -> dict[str, float]:
    """How labels of all hosts differ from those of the last refresh; {} if some were unknown."""
    # Labels of -1 (unreadable then, readable now) cannot be compared.
    if hosts.total(np.sum(old < 0)):
        return {}
    counts = agreement.contingency(new, old, (num_clusters, num_clusters))
    table = hosts.total(counts)
    return {
        'changed': (table.sum() - np.trace(table)) / table.sum(),
        'NMI_to_last': agreement.nmi_of_counts(table),
    }


def _share_of(limit: int, count: int) -> int:
    """How many of this host's rows are among the first `limit` of all hosts'.

    Args:
      limit: rows that are taken of all.
      count: rows of this host.
    """
    before = hosts.gather(np.int64(count))[: jax.process_index()].sum()
    return min(max(limit - int(before), 0), count)


def _own_devices() -> contextlib.AbstractContextManager[Any]:
    """Compute on this process's part of the mesh: others have other rows, and as many calls."""
    return jax.set_mesh(jax.sharding.get_mesh().local_mesh)


def _store_block(rows: np.ndarray, first: int, block: jax.Array) -> None:
    rows[first : first + len(block)] = np.asarray(block)


# Linen modules are hashable dataclasses, so `head` can be static. Of each width at most two shapes
# are compiled: whole blocks and the last one.
@functools.partial(jax.jit, static_argnames='head')
def _hidden(head: heads.Head, params: Any, stats: Any, x: Any) -> jax.Array:
    """[n W]: the head's hidden layer in evaluation mode."""
    rng = Rng.create(0, 0, jnp.zeros(len(x), jnp.uint32))  # unused in evaluation mode
    valid = jnp.ones(len(x), bool)
    results, _ = heads.apply(head, params, stats, {'x': x}, {'x': valid}, rng, False)
    hidden, _ = results['x']
    return hidden


@functools.cache
def schedule(steps: int, count: int, power: float, first: int = 0) -> frozenset[int]:
    """Steps before which a refresh comes: first + steps · (i / (count - 1)) ^ power.

    There is one per step at most, so that times that fall into one step move on to the next ones.
    The end of the run is never one.

    Args:
      steps: length of the run after `first`.
      count: refreshes planned over the run.
      power: above 1, refreshes are more frequent at the beginning.
      first: step of the first refresh.
    """
    due = []
    last = -1
    for i in range(count):
        time = steps * (i / (count - 1)) ** power
        # Rounding must not push a whole number to the next step.
        last = max(last + 1, math.ceil(time - 1e-9))
        if last >= steps:
            break
        due.append(first + last)
    return frozenset(due)
