"""Instance discrimination against memories of all records: AVID, and CMA on top of it.

Morgado et al. 2020. Every record has a unit vector in the memory of each view. A clip must tell its
record's vector from those of random other records (AVID), and then also vectors of the records
that agree with its own by sight and by sound (CMA).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses.noise_contrastive import noise_contrastive
from vatt_jax.objectives.base import Loss, Objective, RefreshResult, Spec, TrainingRecords
from vatt_jax.objectives.forward import project
from vatt_jax.objectives.heads import unit
from vatt_jax.objectives.memory import agreement, host_agreement, negatives, table
from vatt_jax.parallel import hosts

DEFAULTS = {
    'name': 'instance_memory',
    # Common space whose embeddings are compared.
    'space': 'va',
    # ((view of the clip, view of the memory), …): where a clip finds its own record.
    # Across modalities: AVID-Cross; each with itself: AVID-Self; all four: AVID-Joint.
    'directions': (('video', 'audio'), ('audio', 'video')),
    # Random other records that a clip is told from.
    'negatives': 1024,
    'temperature': 0.07,
    # Share of the old vector where a new one is written.
    'momentum': 0.5,
    # Where the memories are: device, divided over all; host, for those that do not fit there.
    'memory': 'device',
    # ---- CMA
    # Records that agree best with a clip's own, which it finds too (CMA: 32); 0: none.
    'positives': 0,
    # Where it finds them.
    'positive_directions': (('video', 'video'), ('audio', 'audio')),
    # The first so many of the negatives are for that.
    'positive_negatives': 64,
    # Weight of it; that of the clip's own record is 1 less this.
    'positive_weight': 0.5,
    # Steps between refreshes of who agrees with whom; the first comes before step 0.
    'every': 10_000,
}
# Field -> smallest and largest value.
RANGES = {
    'temperature': (0, math.inf),
    'momentum': (0, 1),
    'positive_weight': (0, 1),
}
SMALLEST_VALUES = {'negatives': 1, 'positives': 0, 'positive_negatives': 1, 'every': 1}


class Term(NamedTuple):
    """One loss of the mean.

    Attributes:
      name: of its metric.
      query: view of the clips.
      memory: view of the memory.
      num_positives: 0: the clip's own record; else the records that agree with it.
      num_negatives: of the random records, the first so many.
      weight: those of all terms sum to 1.
    """

    name: str
    query: str
    memory: str
    num_positives: int
    num_negatives: int
    weight: float


class InstanceMemory(Objective):
    """Weighted mean of noise-contrastive losses of clips against memories.

    state: {'memory': {view: [rows E]}, 'num_records': M, 'log_z', 'has_z'}. Memories on
    the host are its tables `memory/<view>` instead. The constant Z of the losses is the mean of
    exp(score) over the negatives of the first direction in the first batch, and stays so. A clip
    that lacks a direction's modality is left out of it, and is not written to the memory of that
    view.

    Attributes:
      terms: what the loss is the mean of, that of the first direction first.
      views: all that have a memory.
      is_on_host: whether memories are tables of the host.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        _check(self.config)
        self.is_on_host = self.config.memory == 'host'
        self.terms = _terms(self.config)
        views = [view for term in self.terms for view in (term.query, term.memory)]
        self.views = tuple(dict.fromkeys(views))  # each once, in the order of the terms

    def streams(self) -> tuple[str, ...]:
        return self.views

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        num_positives = self.config.positives
        if not num_positives:
            return {}
        return {'positives': jax.ShapeDtypeStruct((num_positives,), np.int32)}

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        num_positives = self.config.positives
        # Of the records, one is the clip's own and one at least must be left for negatives.
        if spec.size < num_positives + 2:
            raise ConfigError(
                f'config.objective.positives: expected at most {spec.size - 2} for a training set '
                f'of {spec.size} records, got {num_positives}.'
            )
        state: dict[str, Any] = {
            # Tables have more rows than there are records.
            'num_records': jnp.asarray(spec.size, jnp.int32),
            'log_z': jnp.zeros(()),
            'has_z': jnp.zeros((), bool),
        }
        if not self.is_on_host:
            state['memory'] = {}
            for view in self.views:
                width = self._embedding(spec.outputs.spaces, view).shape[-1]
                state['memory'][view] = table.init(self._key(key, view), spec.size, width)
        return {}, state

    def _key(self, key: jax.Array, view: str) -> jax.Array:
        """That of the first vectors of a view's memory."""
        return jax.random.fold_in(key, self.views.index(view))

    # ---- Memories on the host.

    def tables(self, spec: Spec) -> dict[str, jax.ShapeDtypeStruct]:
        if not self.is_on_host:
            return {}
        rows = {}
        for view in self.views:
            width = self._embedding(spec.outputs.spaces, view).shape[-1]
            rows[_table_of(view)] = jax.ShapeDtypeStruct((width,), jnp.float32)
        return rows

    def moves_to_host(self) -> str:
        return '' if self.is_on_host else "config.objective.memory='host'"

    def first_rows(
        self, key: jax.Array, name: str, row: jax.ShapeDtypeStruct, records: jax.Array
    ) -> jax.Array:
        (view,) = (view for view in self.views if _table_of(view) == name)
        return table.first_rows(self._key(key, view), records, row.shape[0])

    def new_rows(
        self, batch: Mapping[str, Any], writes: Any, is_finite: jax.Array
    ) -> dict[str, jax.Array]:
        rows = {}
        for view in self.views:
            rows[_table_of(view)] = table.new_rows(
                batch['tables'][_table_of(view)][:, 0],  # the clip's own record is looked up first
                batch['record'],
                writes['embedding'][view],
                writes['valid'][view] & is_finite,
                self.config.momentum,
            )
        return rows

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
        is_present = {view: batch[view]['valid'] & batch['valid'] for view in self.views}
        spaces, batch_stats = project(model, variables, pooled, is_present)
        embeddings = {view: unit(self._embedding(spaces, view)) for view in self.views}  # [B E]
        scores = self._scores(state, embeddings, batch, rng)

        valid = [is_present[term.query] & is_present[term.memory] for term in self.terms]
        # The first term's positive is the clip's own record.
        normalisation = _normalisation(state, scores[0][:, 1:], valid[0])
        total: Any = 0.0
        metrics = {'log_z': normalisation['log_z']}
        for term, term_scores, is_valid in zip(self.terms, scores, valid, strict=True):
            num_positives = max(term.num_positives, 1)
            loss = noise_contrastive(
                term_scores[:, :num_positives],
                term_scores[:, num_positives:],
                log_z=normalisation['log_z'],
                valid=is_valid,
            )
            metrics[f'loss/{term.name}'] = loss
            total = total + term.weight * loss

        # Written when all is scored, so that no clip finds itself.
        writes = {
            'record': batch['record'],
            'embedding': jax.lax.stop_gradient(embeddings),
            'valid': is_present,
        }
        return Loss(total, metrics, batch_stats, {**state, **normalisation}, writes=writes)

    def _scores(
        self, state: Any, embeddings: Mapping[str, Any], batch: Mapping[str, Any], rng: Any
    ) -> list[jax.Array]:
        """Scores of each term, [B positives + negatives]."""
        if not self.is_on_host:
            rows = self.lookups(batch, rng, state['num_records'])  # [B 1+P+K]
        scores = []
        for term in self.terms:
            query, columns = embeddings[term.query], self._looked_up(term)
            if self.is_on_host:
                joined = batch['tables'][_table_of(term.memory)]  # [B 1+P+K E]
                cosines = table.joined_scores(joined, query, columns)
            else:
                picked = rows[:, np.asarray(columns)]
                cosines = table.scores(state['memory'][term.memory], query, picked)
            scores.append(cosines / self.config.temperature)
        return scores

    def lookups(self, batch: Mapping[str, Any], rng: Any, num_records: Any) -> jax.Array:
        """[B 1+P+K]: a clip's own record, those that agree with it, random others."""
        known = batch['record'][:, None]
        if self.config.positives:
            known = jnp.concatenate([known, batch['columns']['positives']], -1)
        # The same for all terms, as in the authors' code.
        drawn = negatives.draw(rng.at('negatives'), num_records, self.config.negatives, known)
        return jnp.concatenate([known, drawn], -1)

    def _looked_up(self, term: Term) -> list[int]:
        """Which columns of `lookups` are the positives and the negatives of a term, in order."""
        first_negative = 1 + self.config.positives
        positives = range(1, first_negative) if term.num_positives else range(1)
        return [*positives, *range(first_negative, first_negative + term.num_negatives)]

    def _embedding(self, spaces: Mapping[str, Mapping[str, Any]], view: str) -> Any:
        """The view's embeddings [B E]."""
        space = self.config.space
        embedding = spaces.get(space, {}).get(view)
        if embedding is None or embedding.ndim != 2:
            raise ConfigError(
                f'config.objective.directions: expected views with one embedding for each clip in '
                f'the space {space!r}, got {view!r}. Set config.model.head.name="avid" and '
                'compare video with audio.'
            )
        return embedding

    def write_memory(self, state: Any, writes: Any, is_finite: jax.Array) -> Any:
        if self.is_on_host:
            return state
        memory = {}
        for view, rows in state['memory'].items():
            memory[view] = table.write(
                rows,
                writes['record'],
                writes['embedding'][view],
                writes['valid'][view] & is_finite,
                self.config.momentum,
            )
        return {**state, 'memory': memory}

    # ---- A refresh (CMA).

    def refresh_due(self, step: int, steps: int) -> bool:
        return self.config.positives > 0 and step % self.config.every == 0

    def refresh(
        self, variables: Any, params: Any, state: Any, step: int, records: TrainingRecords
    ) -> RefreshResult:
        # Memories are of the records of all hosts, `records` of this one's.
        num_records = int(state['num_records'])
        found = self._own_neighbours(state, num_records, records)
        mean = hosts.total(found.mean_agreement.sum(dtype=np.float64)) / num_records
        least = hosts.gather(found.least_agreement.min(initial=np.inf)).min()
        return RefreshResult(
            params,
            state,
            columns={'positives': np.asarray(found.records)},
            metrics={'agreement': float(mean), 'least_agreement': float(least)},
        )

    def _own_neighbours(self, state: Any, num_records: int, records: TrainingRecords) -> _Agreeing:
        """The neighbours of this host's records, as NumPy arrays."""
        count = self.config.positives
        if self.is_on_host:
            tables = [records.tables[_table_of(view)] for view in self.views]
            own = hosts.own_stretch(num_records)
            agreements, positives = host_agreement.find_neighbours(tables, own, count)
            return _Agreeing(positives, agreements.mean(-1), agreements.min(-1))
        memories = [state['memory'][view] for view in self.views]
        found = _find_neighbours(memories, num_records, count)
        return _Agreeing(*(hosts.own_stretch_of(part, num_records) for part in found))


def _table_of(view: str) -> str:
    """The name of a view's memory on the host: that of its path in the state, on the devices."""
    return f'memory/{view}'


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    choose(config.memory, ('device', 'host'), 'config.objective.memory')
    for field in ('directions', 'positive_directions'):
        directions = config[field]
        are_pairs = all(isinstance(d, tuple) and len(d) == 2 for d in directions)
        if not directions or not are_pairs:
            raise ConfigError(
                f'config.objective.{field}: expected pairs (view of the clip, view of the memory), '
                f'got {directions!r}. Write them like (("video", "audio"),).'
            )
    for field, smallest in SMALLEST_VALUES.items():
        if config[field] < smallest:
            raise ConfigError(
                f'config.objective.{field}: expected at least {smallest}, got {config[field]}.'
            )
    if not config.temperature > 0:
        raise ConfigError(
            f'config.objective.temperature: expected a positive number, got {config.temperature}.'
        )
    if config.positives and config.positive_negatives > config.negatives:
        raise ConfigError(
            f'config.objective.positive_negatives: expected at most negatives={config.negatives}, '
            f'got {config.positive_negatives}.'
        )


def _terms(config: Any) -> list[Term]:
    """The terms of the loss: a table of the directions."""
    positive_weight = config.positive_weight if config.positives else 0.0
    terms = []
    for query, memory in config.directions:
        weight = (1 - positive_weight) / len(config.directions)
        terms.append(Term(f'{query}-{memory}', query, memory, 0, config.negatives, weight))
    if not config.positives:
        return terms
    for query, memory in config.positive_directions:
        weight = positive_weight / len(config.positive_directions)
        name = f'positives/{query}-{memory}'
        terms.append(Term(name, query, memory, config.positives, config.positive_negatives, weight))
    return terms


def _normalisation(state: Any, scores: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """log_z as it is or, of the first batch that has valid clips, of its negatives; has_z."""
    scores = jax.lax.stop_gradient(scores)
    log_sum = jax.nn.logsumexp(jnp.where(valid[:, None], scores, -jnp.inf))
    # Without a valid clip this is not finite, and not used.
    log_mean = log_sum - jnp.log(valid.sum() * scores.shape[1])
    is_new = ~state['has_z'] & valid.any()
    return {
        'log_z': jnp.where(is_new, log_mean, state['log_z']),
        'has_z': state['has_z'] | valid.any(),
    }


class _Agreeing(NamedTuple):
    """Neighbours of records: of all, spread over the devices as the memories are, or of a host's.

    Attributes:
      records: their numbers.
      mean_agreement: of a record with its neighbours.
      least_agreement: the same with the farthest of them.
    """

    records: Int[Array | np.ndarray, 'rows X']
    mean_agreement: Float[Array | np.ndarray, ' rows']
    least_agreement: Float[Array | np.ndarray, ' rows']


@functools.partial(jax.jit, static_argnums=(1, 2))
def _find_neighbours(memories: list[jax.Array], num_records: int, count: int) -> _Agreeing:
    """`agreement.find_neighbours`; of the agreement only what is reported."""
    found = agreement.find_neighbours(memories, num_records, count)
    result = _Agreeing(found.records, found.agreement.mean(-1), found.agreement.min(-1))
    axes = table.data_axes(memories[0])
    # Rows stay where they are found: all of them would take as much as a memory on every device.
    return jax.lax.with_sharding_constraint(result, jax.P(axes)) if axes else result
