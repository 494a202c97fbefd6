"""Is this the sound of this moment? Pairs in and out of sync, told apart by their distance.

AVTS (Korbar, Tran and Torresani 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.losses import margin
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.objectives.forward import project
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'synchronisation',
    # What is in sync: a stream of video and one of sound.
    'video': 'video',
    'audio': 'audio',
    # Sound of another moment of the same record, at least half a second away and not overlapping.
    'hard': 'audio.shifted',
    # The same, overlapping.
    'super_hard': 'audio.overlapping',
    # Common space that they are compared in.
    'space': 'va',
    # Distance up to which pairs out of sync are pushed apart.
    'margin': 0.99,
    # Embeddings are scaled to length 1 before they are compared. Published: no.
    'normalise': False,
    # (first step, shares of easy, hard and super-hard negatives) of each stage, in order.
    'curriculum': ((0, (1.0, 0.0, 0.0)),),
}
# Kinds of negatives, by their place in the shares. Easy: the sound of another record.
EASY, HARD, SUPER_HARD = 0, 1, 2
EXAMPLE = '((0, (1.0, 0.0, 0.0)), (5000, (0.75, 0.25, 0.0)))'


class Synchronisation(Objective):
    """The margin loss of one pair in sync and one out of sync for each clip of the batch.

    Which kind of sound the second one has is drawn for each clip, by the shares of the stage of
    the curriculum. A clip whose record has no sound of that kind takes an easy one. A clip without
    video or sound, or alone with its record in the batch, leaves out the pairs that it cannot
    make.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        check_range(self.config.margin, 0, math.inf, 'config.objective.margin')
        _check(self.config)
        # Streams of kinds that no stage draws are neither loaded nor encoded.
        self.same_record_streams: dict[int, str] = {}
        for kind, field in ((HARD, 'hard'), (SUPER_HARD, 'super_hard')):
            if any(shares[kind] > 0 for _, shares in self.config.curriculum):
                self.same_record_streams[kind] = self.config[field]

    def streams(self) -> tuple[str, ...]:
        return (self.config.video, self.config.audio, *self.same_record_streams.values())

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        members = spec.outputs.spaces.get(self.config.space, {})
        for stream in self.streams():
            if stream not in members:
                raise ConfigError(
                    f'config.objective.space: expected a space with {stream!r}, got '
                    f'{self.config.space!r} with {", ".join(members) or "nothing"} '
                    '(config.model.head)'
                )
        # `compute_loss` is not passed the step of the run; `after_update` writes it here.
        return {}, {'step': jnp.zeros((), jnp.int32)}

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        valid = {stream: batch[stream]['valid'] for stream in pooled}
        embeddings, batch_stats = self._project(model, variables, pooled, valid)  # stream -> [B E]
        video = embeddings[self.config.video]
        audio = embeddings[self.config.audio]

        kind, negative, negative_valid = self._negatives(embeddings, valid, state, batch, rng)
        # In sync first, then out of sync: [B 2 E] and [B 2], spread over devices like the batch.
        sounds = jnp.stack([audio, negative], axis=1)
        videos = jnp.broadcast_to(video[:, None], sounds.shape)
        pair_valid = jnp.stack([valid[self.config.audio], negative_valid], axis=1)
        pair_valid = pair_valid & valid[self.config.video][:, None]
        is_match = jnp.broadcast_to(jnp.array([True, False]), pair_valid.shape)
        loss = margin.contrastive_margin(
            videos, sounds, is_match, margin=self.config.margin, valid=pair_valid
        )

        distance = jax.lax.stop_gradient(margin.distance(videos, sounds))  # [B 2]
        says_match = distance < self.config.margin / 2
        metrics = {
            'distance/match': masked_mean(distance[:, 0], pair_valid[:, 0]),
            'distance/mismatch': masked_mean(distance[:, 1], pair_valid[:, 1]),
            # Chance is one half: there are as many pairs of either kind.
            'accuracy': masked_mean(says_match == is_match, pair_valid),
        }
        for number, stream in self.same_record_streams.items():
            metrics[f'share/{stream}'] = masked_mean(kind == number, pair_valid[:, 1])
        return Loss(loss, metrics, batch_stats, state)

    def _project(
        self, model: Any, variables: Any, pooled: Mapping[str, Any], valid: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """(stream -> embedding [B E] in the space, the model's new batch statistics)."""
        spaces, batch_stats = project(model, variables, pooled, valid)
        embeddings = spaces[self.config.space]
        if self.config.normalise:
            embeddings = {stream: heads.unit(x) for stream, x in embeddings.items()}
        return embeddings, batch_stats

    def _negatives(
        self,
        embeddings: Mapping[str, Any],
        valid: Mapping[str, Any],
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> tuple[Int[Array, ' B'], Float[Array, 'B E'], Bool[Array, ' B']]:
        """The kind of each clip's negative, its embedding, and whether there is one."""
        audio_valid = valid[self.config.audio]
        partner, has_partner = draw_partners(batch['record'], audio_valid, rng.at('partners'))
        kind = draw_kinds(self.config.curriculum, state['step'], rng.at('kinds'))
        negative = embeddings[self.config.audio][partner]  # easy
        negative_valid = has_partner
        is_easy = jnp.ones(len(kind), bool)
        for number, stream in self.same_record_streams.items():
            is_chosen = (kind == number) & valid[stream]
            negative = jnp.where(is_chosen[:, None], embeddings[stream], negative)
            negative_valid = jnp.where(is_chosen, True, negative_valid)
            is_easy = is_easy & ~is_chosen
        return jnp.where(is_easy, EASY, kind), negative, negative_valid

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Note the step that comes next, which says the stage of the curriculum."""
        # A step that is not finite keeps the old state, so the one after it is drawn by the shares
        # of the step before. Counting `compute_loss` instead would count microbatches.
        return model_params, params, {'step': jnp.asarray(step + 1, jnp.int32)}


def draw_kinds(curriculum: Any, step: Any, rng: Rng) -> Int[Array, ' B']:
    """The kind of each clip's negative, by the shares of the stage that `step` is in."""
    starts = np.array([start for start, _ in curriculum])
    shares = np.array([shares for _, shares in curriculum], np.float64)  # [stages kinds]
    # In float64: where the last kinds have no share the bound before them is exactly 1.
    bounds = np.cumsum(shares, axis=1) / shares.sum(axis=1, keepdims=True)
    stage = jnp.sum(step >= jnp.asarray(starts)) - 1
    stage_bounds = jnp.asarray(bounds[:, :-1], jnp.float32)[stage]
    # A number in [0, 1) is of the kind whose bounds it lies between.
    u = rng.uniform()
    return jnp.sum(u[:, None] >= stage_bounds, axis=1).astype(jnp.int32)


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    if not config.margin > 0:
        raise ConfigError(
            f'config.objective.margin: expected a positive number, got {config.margin}.'
        )
    stages = config.curriculum
    if not isinstance(stages, tuple) or not stages or not all(_is_stage(stage) for stage in stages):
        raise ConfigError(
            'config.objective.curriculum: expected (first step, (easy, hard, super-hard)) for each '
            f'stage, with shares that sum to 1, got {stages!r}. Write it like {EXAMPLE}.'
        )
    starts = [start for start, _ in stages]
    if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:])):
        raise ConfigError(
            f'config.objective.curriculum: expected stages from step 0 on, in order, got {starts}.'
        )


def _is_stage(stage: Any) -> bool:
    """Whether this is (step, three shares that sum to 1)."""
    if not isinstance(stage, tuple) or len(stage) != 2:
        return False
    start, shares = stage
    if not isinstance(start, int) or not isinstance(shares, tuple) or len(shares) != 3:
        return False
    if not all(isinstance(share, (int, float)) and share >= 0 for share in shares):
        return False
    return math.isclose(sum(shares), 1.0, abs_tol=1e-6)
