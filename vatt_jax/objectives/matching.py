"""Do these belong together? Clips with their own words and sound, told from mismatched ones.

Image-text matching of ViLBERT, UNITER and Hendricks et al. (TACL 2021), over any streams that meet
in the model (`config.model.fusion`). The classifier is linear in the vectors of the streams after
they met: where they do not attend to each other, a sum over streams is all that it has, and pairs
that match cannot be told from others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.config import LARGEST_COUNT, ConfigError, check_range, with_defaults
from vatt_jax.losses.classification import softmax_cross_entropy
from vatt_jax.objectives import forward, heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'matching',
    # Streams that belong together.
    'streams': ('video', 'text'),
    # Those of which one, drawn for each clip, is another clip's in the pair that does not match.
    'replaced': ('text',),
    # How many other clips are drawn, of which the one is taken whose stream is most like the one
    # that it replaces (hard negatives). 1: any.
    'candidates': 1,
    # 0: two classes, a pair that matches and one that does not. Above 0: the contrastive form, each
    # clip beside so many mismatched ones; memory is that of one, computation grows with them.
    'negatives': 0,
}
# Name of the prediction; its classes.
MATCHING = 'matching'
MISMATCH, MATCH = 0, 1
Features = Mapping[str, Any]


class Matching(Objective):
    """Cross entropy of two classes, for each clip of a pair that matches and one that does not.

    With `negatives` that of the pair that matches among so many that do not (contrastive form).

    The other clip is of the whole batch and of another record. Both pairs are left out where a clip
    lacks the stream that is replaced or all others, or where no clip can lend it one, so that the
    classes balance. Other streams that a clip lacks are masked.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        _check(self.config)
        self.head = heads.Head(outputs=2)

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.streams)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        check_meeting(self.config.streams, spec.model, 'matching')
        width = 0
        for stream in self.config.streams:
            width += spec.outputs.encoded[stream].pooled.shape[-1]
        params, _ = heads.init(self.head, key, width)
        return params, {}

    # ---- A step.

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        streams = select_streams(batch, self.streams())
        features, batch_stats = forward.encode_tokens(model, variables, streams, rng)
        return Encoding(features, batch_stats, state)

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
        valid = {stream: batch[stream]['valid'] for stream in self.config.streams}

        def logits_of(features: Features, valid: Mapping[str, Any], rng: Rng) -> jax.Array:
            met = forward.interact(model, variables, features, valid, rng)
            return self._classify(params, self._join(met, valid))  # [B 2]

        # Towers run once, fusion twice or more.
        match_logits = logits_of(pooled, valid, rng.at('match'))

        def mismatched(rng: Rng) -> tuple[jax.Array, jax.Array]:
            mixed, mixed_valid, usable = self._mismatch(pooled, valid, batch['record'], rng)
            return logits_of(mixed, mixed_valid, rng.at('mismatch')), usable

        if self.config.negatives:
            value, metrics = _contrast(match_logits, mismatched, self.config.negatives, rng)
        else:
            value, metrics = _tell_apart(match_logits, *mismatched(rng))
        return Loss(value, metrics, variables['batch_stats'], state)

    def _mismatch(
        self,
        features: Features,
        valid: Mapping[str, Any],
        record: Int[Array, ' B'],
        rng: Rng,
    ) -> tuple[dict[str, Any], dict[str, Any], Bool[Array, ' B']]:
        """(features with one stream of each clip replaced, what is valid of them, usable clips)."""
        replaced = self.config.replaced
        mixed, mixed_valid = dict(features), dict(valid)
        drawn = (rng.at('replaced').uniform() * len(replaced)).astype(jnp.int32)  # [B]
        usable = jnp.zeros(len(record), bool)
        for number, stream in enumerate(replaced):
            is_replaced = drawn == number
            others = jnp.any(
                jnp.stack([valid[other] for other in self.config.streams if other != stream]),
                axis=0,
            )
            # Clips that can match lend: what a stream says is in as many pairs of either kind.
            can_lend = valid[stream] & others
            likeness = None
            if self.config.candidates > 1:
                likeness = _likeness(features, stream)
            partner, has_partner = draw_partners(
                record, can_lend, rng.at(stream), likeness, self.config.candidates
            )
            for name in (stream, forward.tokens_of(stream), forward.mask_of(stream)):
                if name in features:
                    mixed[name] = _exchange(features[name], partner, is_replaced)
            mixed_valid[stream] = jnp.where(is_replaced, has_partner, valid[stream])
            usable = jnp.where(is_replaced, can_lend & has_partner, usable)
        return mixed, mixed_valid, usable

    # ---- The classifier.

    def _join(
        self, encoded: Mapping[str, Any], valid: Mapping[str, Any] | None
    ) -> Float[Array, 'B D']:
        """The vectors of all streams after they met, side by side; zero where one is missing."""
        vectors = []
        for stream in self.config.streams:
            vector = _clip_vector(encoded[stream].pooled, encoded[stream].mask)
            if valid is not None:
                vector = jnp.where(valid[stream][:, None], vector, 0)
            vectors.append(vector)
        return jnp.concatenate(vectors, axis=-1)

    def _classify(self, params: Any, features: Float[Array, 'B D']) -> Float[Array, 'B 2']:
        """Logits of mismatch and match."""
        rng = Rng.create(0, 0, jnp.zeros(len(features), jnp.uint32))  # nothing is drawn
        logits: Any
        is_row = jnp.ones(len(features), bool)
        _, logits = self.head.apply({'params': params}, features, is_row, rng, False)
        return logits

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """'matching': logits [B 2] of each clip as it is; {} where a stream is missing."""
        if not set(self.config.streams) <= set(encoded):
            return {}
        return {MATCHING: self._classify(params, self._join(encoded, None))}


def check_meeting(streams: Sequence[str], model: Any, name: str) -> None:
    """Check that a model's streams attend to each other.

    Args:
        streams: those that must.
        model: the Linen module.
        name: of the objective, for the message.

    Raises:
        ConfigError: one of them does not.
    """
    fusion = model.config.get('fusion')
    meeting = tuple(fusion.get('streams') or model.config['towers']) if fusion else ()
    if not set(streams) <= set(meeting):
        raise ConfigError(
            f'config.objective.name={name!r}: expected a model in which streams meet, '
            f'{", ".join(streams)}, got {", ".join(meeting) or "none"} by config.model.fusion; set '
            "--config.model.fusion=\"{'types': ('merged',)}\" or its field streams"
        )


def _tell_apart(
    match_logits: Float[Array, 'B 2'],
    mismatch_logits: Float[Array, 'B 2'],
    usable: Bool[Array, ' B'],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(cross entropy of two classes, metrics)."""
    matches = jnp.full(len(usable), MATCH)
    mismatches = jnp.full(len(usable), MISMATCH)
    value = 0.5 * (
        softmax_cross_entropy(match_logits, matches, weight=usable)
        + softmax_cross_entropy(mismatch_logits, mismatches, weight=usable)
    )
    says_match = masked_mean(match_logits.argmax(-1) == MATCH, usable)
    says_mismatch = masked_mean(mismatch_logits.argmax(-1) == MISMATCH, usable)
    metrics = {
        # Chance is one half: there are as many pairs of either kind.
        'accuracy': 0.5 * (says_match + says_mismatch),
        'accuracy/match': says_match,
        'accuracy/mismatch': says_mismatch,
        'share/usable': usable.astype(jnp.float32).mean(),
    }
    return value, metrics


def _contrast(
    match_logits: Float[Array, 'B 2'],
    mismatched: Callable[[Rng], tuple[jax.Array, jax.Array]],
    negatives: int,
    rng: Rng,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(cross entropy of the pair that matches among others of the clip, metrics).

    Args:
        match_logits: of clips as they are.
        mismatched: draws a mismatched form of each clip: (its logits [B 2], which are usable).
        negatives: how many are drawn, each anew: one may come twice.
        rng: of the batch.
    """

    # Computed again in the backward pass, one after another: one fusion is held, not all.
    @jax.checkpoint
    def score(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, usable = mismatched(rng.at(number))
        return logits[:, MATCH] - logits[:, MISMATCH], usable

    others, usable = jax.lax.map(score, jnp.arange(negatives))  # [negatives B]
    own = match_logits[:, MATCH] - match_logits[:, MISMATCH]  # [B]
    # Finite, so that a row without any other has a finite gradient, of weight 0.
    others = jnp.where(usable, others, -1e9)
    is_row = usable.any(0)
    scores = jnp.concatenate([own[None], others]).T  # [B 1+negatives]
    value = softmax_cross_entropy(scores, jnp.zeros(len(own), jnp.int32), weight=is_row)
    metrics = {
        # A tie is no answer: clips may have the same words.
        'accuracy': masked_mean(own > others.max(0), is_row),
        'share/usable': is_row.astype(jnp.float32).mean(),
    }
    return value, metrics


def _likeness(features: Features, stream: str) -> Float[Array, 'B B']:
    """Cosines of the vectors that the tower of a stream pools."""
    mask = features.get(forward.mask_of(stream))
    vector = _clip_vector(features[stream], mask)
    unit = heads.unit(jax.lax.stop_gradient(vector))
    return unit @ unit.T


def _exchange(
    x: Float[Array, 'B ...'], partner: Int[Array, ' B'], is_replaced: Bool[Array, ' B']
) -> Float[Array, 'B ...']:
    """Some rows replaced by those of their partners."""
    return jnp.where(is_replaced.reshape(-1, *(1,) * (x.ndim - 1)), x[partner], x)


def _clip_vector(pooled: Float[Array, 'B ...'], mask: jax.Array | None) -> Float[Array, 'B D']:
    """The vector of each clip: of text [B K D] the mean over its sentences that have words."""
    pooled = pooled.astype(jnp.float32)
    if pooled.ndim == 2:
        return pooled
    is_sentence = jnp.ones(pooled.shape[:2], bool) if mask is None else (mask > 0).any(-1)  # [B K]
    total = jnp.where(is_sentence[..., None], pooled, 0).sum(1)
    return total / jnp.maximum(is_sentence.sum(1, keepdims=True), 1)


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    if len(set(config.streams)) < 2 or len(set(config.streams)) != len(config.streams):
        raise ConfigError(
            'config.objective.streams: expected at least two different streams, got '
            f'{config.streams}.'
        )
    is_subset = set(config.replaced) <= set(config.streams)
    if not config.replaced or not is_subset:
        raise ConfigError(
            f'config.objective.replaced: expected some of the streams {config.streams}, got '
            f'{config.replaced}.'
        )
    check_range(config.candidates, 1, LARGEST_COUNT, 'config.objective.candidates')
    check_range(config.negatives, 0, LARGEST_COUNT, 'config.objective.negatives')
