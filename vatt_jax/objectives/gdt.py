"""Generalised data transformations: contrast across modalities, with time turned and shifted.

GDT (Patrick et al. 2020). A clip's embedding tells its record from others, whatever the modality.
Two transformations of time, the shift to another clip of the record and the reversal of a clip, are
each *distinctive* (the embedding must tell the original from the transformed), *invariant* (it must
not) or *unused*. Which loss follows from that: docs/gdt.md.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.losses.info_nce import Keys
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.objectives.transformations import (
    BASE,
    DISTINCTIVE,
    FIRST,
    ROLES,
    SUFFIXES,
    WITHOUT_DIRECTION,
    Roles,
    Term,
    View,
    make_terms,
    stream_of,
)
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'gdt',
    # Each one's embedding finds that of each other one. Of text, one sentence for a clip.
    'modalities': ('video', 'audio'),
    # Of another clip of the record, and of time: unused | invariant | distinctive.
    'shift': DISTINCTIVE,
    'reversal': DISTINCTIVE,
    # Of the embedding, and of the head's hidden layer (0: none).
    'width': 256,
    'hidden': 512,
    # Before each layer of the head.
    'dropout': 0.3,
    'temperature': 0.07,
    # Parts of the batch, each a replica of the published code, whose own keys of the other view are
    # no negatives; 1: each clip is a part of its own.
    'replicas': 1,
    # True: negatives as they pile up in the published code (docs/gdt.md).
    'published_negatives': False,
    # auto | gather | ring | dense, see the objective `contrastive`.
    'method': 'auto',
}
# Name of the common space that the heads lead to, for evaluators.
SPACE = 'gdt'
# Field -> smallest and largest value.
RANGES = {
    'width': (1, math.inf),
    'hidden': (0, math.inf),
    'dropout': (0, 1),
    'temperature': (1e-6, math.inf),
    'replicas': (1, math.inf),
}


class GDT(Objective):
    """Mean over terms, over their two views and all ordered pairs of modalities, of InfoNCE.

    Keys carry no gradient, positives are in another modality. A clip that lacks a modality is left
    out of the pairs that need it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        for field, (low, high) in RANGES.items():
            check_range(self.config[field], low, high, f'config.objective.{field}')
        c = self.config
        _check(c)
        self.terms = make_terms(Roles(c.shift, c.reversal), c.published_negatives)
        self.head = heads.Head(c.width, c.hidden, c.dropout)
        is_dense = c.method == 'dense'
        self.how = similarity.How('auto' if is_dense else c.method)
        self.loss_function = (dense if is_dense else nce).info_nce

    def streams(self) -> tuple[str, ...]:
        views = dict.fromkeys(view for term in self.terms for view in term.views)
        names = [stream_of(m, view) for m in self.config.modalities for view in views]
        return tuple(dict.fromkeys(names))  # of text, some views are the same stream

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        params, norm = {}, {}
        for i, modality in enumerate(self.config.modalities):
            width = _width_of(spec, modality)
            params[modality], norm[modality] = heads.init(
                self.head, jax.random.fold_in(key, i), width
            )
        num_rows = spec.batch['index'].shape[0]
        if num_rows % self.config.replicas:
            raise ConfigError(
                f'config.objective.replicas: expected a divisor of the (micro)batch of {num_rows} '
                f'clips, got {self.config.replicas}.'
            )
        return params, {'norm': norm}

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
        # Clips that cannot be read are in the batch, but of no stream.
        valid = {name: batch[name]['valid'] & batch['valid'] for name in self.streams()}  # [B]
        embeddings, norm = self._embed(params, state['norm'], pooled, valid, rng.at('heads'))
        losses = []
        metrics = collections.defaultdict(list)
        for term in self.terms:
            loss = self._term_loss(term, embeddings, valid)
            losses.append(loss)
            metrics[f'loss/{term.transformation}/{term.role}'].append(loss)
            if term.role != BASE:
                share = self._share_told_apart(term, embeddings, valid)
                metrics[f'told_apart/{term.transformation}'].append(share)
        means = {name: _mean(values) for name, values in metrics.items()}
        return Loss(_mean(losses), means, variables['batch_stats'], {**state, 'norm': norm})

    def _embed(
        self,
        params: Any,
        norm: Mapping[str, Any],
        pooled: Mapping[str, Any],
        valid: Mapping[str, Any],
        rng: Any,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """({stream: unit embeddings [B E]}, new batch statistics of the heads)."""
        new_norm = dict(norm)
        embeddings = {}
        for name in self.streams():
            modality = modality_of(name)
            # View by view, as published: each is normalised by statistics of its own.
            outputs, new_norm[modality] = heads.apply(
                self.head,
                params[modality],
                new_norm[modality],
                # [B D]; the one sentence of a text is [B 1 D].
                {name: pooled[name].reshape(len(pooled[name]), -1)},
                valid,
                rng.at(name),
                train=True,
            )
            embeddings[name] = heads.unit(outputs[name][1])
        return embeddings, new_norm

    def embed(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, dict[str, jax.Array]]:
        """The space `gdt`, of all modalities that have a head."""
        embeddings = {}
        for name, stream in encoded.items():
            modality = modality_of(name)
            if modality not in params:
                continue
            *leading, width = stream.pooled.shape  # [B D]; of text [B K D]
            rows = stream.pooled.reshape(-1, width)
            rng = Rng.create(0, 0, jnp.zeros(len(rows), jnp.uint32))  # unused in evaluation mode
            outputs, _ = heads.apply(
                self.head,
                params[modality],
                state['norm'][modality],
                {name: rows},
                {name: jnp.ones(len(rows), bool)},
                rng,
                train=False,
            )
            embeddings[name] = outputs[name][1].reshape(*leading, -1)
        return {SPACE: embeddings}

    def _queries(self, term: Term) -> list[tuple[str, str, View]]:
        """(modality of queries, modality of keys, view of queries) of a term."""
        modalities = itertools.permutations(self.config.modalities, 2)
        return [(*pair, view) for pair in modalities for view in term.views]

    def _term_loss(
        self, term: Term, embeddings: Mapping[str, Any], valid: Mapping[str, Any]
    ) -> Float[Array, '']:
        """Mean InfoNCE of all queries of a term."""
        losses = []
        for modality, key_modality, view in self._queries(term):
            query = stream_of(modality, view)
            positive = stream_of(key_modality, term.positive(view))
            num_clips = len(embeddings[query])
            loss = self.loss_function(
                embeddings[query],
                embeddings[positive],
                x_valid=valid[query],
                y_valid=valid[positive],
                ids=_replica_of(num_clips, self.config.replicas),
                keys=self._further_keys(term, key_modality, view, embeddings, valid),
                temperature=self.config.temperature,
                replicas=self.config.replicas,
                how=self.how,
            )
            losses.append(loss)
        return _mean(losses)

    def _further_keys(
        self,
        term: Term,
        modality: str,
        view: View,
        embeddings: Mapping[str, Any],
        valid: Mapping[str, Any],
    ) -> tuple[Keys, ...]:
        """Negatives beside the keys of the batch in the positive's view.

        Args:
          term: whose queries they are for.
          modality: of the keys.
          view: of the queries.
          embeddings: stream -> unit embeddings [B E].
          valid: stream -> bool [B].
        """
        remote = [stream_of(modality, other) for other in term.remote]
        if not self.config.published_negatives:
            # Two views of a text are one stream, whose keys count once.
            remote = list(dict.fromkeys(remote))
        # The batch's own keys of this view, of all replicas, are there already.
        remote.remove(stream_of(modality, term.positive(view)))
        keys = []
        if term.role == DISTINCTIVE:
            hard = stream_of(modality, term.other(view))
            # Of the query's own clip, too: its transformed view is the hard negative.
            keys.append(Keys(embeddings[hard], valid[hard]))
            remote.remove(hard)
        for name in remote:
            replica = _replica_of(len(valid[name]), self.config.replicas)
            keys.append(Keys(embeddings[name], valid[name], apart=replica))
        return tuple(keys)

    def _share_told_apart(
        self, term: Term, embeddings: Mapping[str, Any], valid: Mapping[str, Any]
    ) -> Float[Array, '']:
        """Share of queries nearer to their own view, in another modality, than to the other one.

        One half: the transformation does not show.
        """
        shares = []
        for modality, key_modality, view in self._queries(term):
            query = stream_of(modality, view)
            same, other = (stream_of(key_modality, v) for v in (view, term.other(view)))
            if same == other:  # a sentence shows no reversal
                continue
            difference = embeddings[same] - embeddings[other]
            is_nearer = jnp.sum(embeddings[query] * difference, axis=-1) > 0  # [B]
            shares.append(_share(is_nearer, valid[query] & valid[same] & valid[other]))
        return jax.lax.stop_gradient(_mean(shares))


def needed_views(config: Any, redraw_sound: bool = False) -> tuple[tuple, tuple]:
    """(config.data.views, config.augment.mirrored) that give the objective its streams.

    Args:
      config: `config.objective`; fields that are left out have their defaults.
      redraw_sound: reversed sound is augmented by itself. False: it is the mirror of the augmented
        forward one (published).
    """
    objective = GDT(config)
    views, mirrored = {}, {}
    for modality, view in itertools.product(objective.config.modalities, SUFFIXES):
        name = stream_of(modality, view)
        forward = stream_of(modality, View(view.clip, False))
        if view == FIRST or name not in objective.streams():
            continue
        if name == forward:
            # The second clip; of text, also a clip in the other direction, which is no new stream.
            if not view.is_reversed:
                views[name] = {'kind': 'clip'}
        elif modality == 'audio' and not redraw_sound:
            mirrored[name] = forward
        else:
            views[name] = {'kind': 'reverse', **_of_clip(view.clip)}
    return tuple(views.items()), tuple(mirrored.items())


def _of_clip(clip: int) -> dict[str, str]:
    """The field `of` of a reversed view; the main window goes without."""
    return {'of': SUFFIXES[View(clip, False)]} if clip else {}


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    for field in ('shift', 'reversal'):
        choose(config[field], ROLES, f'config.objective.{field}')
    choose(config.method, (*similarity.METHODS, 'dense'), 'config.objective.method')
    modalities = tuple(config.modalities)
    if len(set(modalities)) != len(modalities) or len(modalities) < 2:
        raise ConfigError(
            'config.objective.modalities: expected at least two different modalities, got '
            f'{modalities}.'
        )
    for modality in modalities:
        if modality in WITHOUT_DIRECTION and config.reversal == DISTINCTIVE:
            raise ConfigError(
                f'config.objective.reversal: expected unused or invariant with {modality!r}, which '
                f'has no direction of time, got {DISTINCTIVE!r}.'
            )


def _width_of(spec: Spec, modality: str) -> int:
    """Width D of a modality's pooled feature.

    Raises:
      ConfigError: a clip has several candidates.
    """
    shape = spec.outputs.encoded[modality].pooled.shape
    if len(shape) == 3 and shape[1] > 1:
        raise ConfigError(
            f'config.objective.modalities: expected one feature for a clip, got {modality!r} with '
            f'{shape[1]}. Set config.model.inputs.text.candidates=1.'
        )
    return shape[-1]


def _replica_of(num_clips: int, replicas: int) -> Int[Array, ' B']:
    """The replica of each clip; of one replica, each clip stands for itself."""
    clips = jnp.arange(num_clips)
    return clips if replicas == 1 else clips // (num_clips // replicas)


def _mean(values: Sequence[Any]) -> Float[Array, '']:
    return jnp.mean(jnp.stack(values))


def _share(is_so: Bool[Array, ' B'], counted: Bool[Array, ' B']) -> Float[Array, '']:
    """Share of the counted rows; 0 if there is none."""
    return jnp.sum(is_so & counted) / jnp.maximum(counted.sum(), 1)
