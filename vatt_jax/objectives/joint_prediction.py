"""Joint-embedding prediction: what is hidden of a clip, told in features by what is seen.

V-JEPA (Bardes et al. 2024) on tubelets, the same on spectrogram patches, and within and across both
through one encoder, as MJEPA (2026) does. docs/jepa.md says which details are whose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs import block_masks
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.models.predictor import Predictor
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec
from vatt_jax.objectives.collapse import spread
from vatt_jax.objectives.forward import encode_streams
from vatt_jax.objectives.memory import teacher as teachers
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.rng import Rng

# Distance of a prediction from its target -> per element. Each is 0 at 0.
DISTANCES: dict[str, Callable[[jax.Array], jax.Array]] = {
    'l1': jnp.abs,
    'smooth_l1': optax.losses.huber_loss,
    'l2': lambda difference: jnp.square(difference) / 2,
}
# The published masks, as fields of block_masks.BlockMask.
V_JEPA_MASKS = (
    {'blocks': 8, 'area': (0.15, 0.15), 'keep': 0.23, 'predict': 0.47},
    {'blocks': 2, 'area': (0.7, 0.7), 'keep': 0.03, 'predict': 0.69},
)
DEFAULTS: dict[str, Any] = {
    'name': 'joint_prediction',
    # (stream that is seen, stream that is predicted, weight). One stream twice: within it. Streams
    # of two modalities share their window, and are predicted across.
    'pairs': (('video', 'video', 1.0),),
    # Masks of each clip, each a pass of the context encoder: fields of BlockMask
    # (vatt_jax/inputs/block_masks.py). Of pictures, and of spectrograms; as many of both.
    'video_masks': V_JEPA_MASKS,
    'audio_masks': V_JEPA_MASKS,
    # l1 | smooth_l1 | l2
    'distance': 'l1',
    # How much of the teacher stays in a step: at first, and after `momentum_steps`, linearly.
    'momentum': (0.998, 1.0),
    # 0: the first value in all steps.
    'momentum_steps': 0,
    # Of the predictor.
    'width': 384,
    'layers': 12,
    'mlp': 1536,
    'heads': 12,
}
# Field -> smallest and largest value.
RANGES = {
    'momentum_steps': (0, math.inf),
    'width': (1, math.inf),
    'layers': (1, 1000),
    'mlp': (1, math.inf),
    'heads': (1, math.inf),
}
# Added to the variance of targets: PyTorch's default.
EPSILON = 1e-5


class JointPrediction(Objective):
    """The distance of predicted from true features of hidden tokens.

        loss = mean over pairs, masks, clips, hidden tokens and features of
               |predictor(encoder(seen tokens)) - normalised teacher(all tokens)|

    The teacher follows the encoder, sees the whole clip, and gets no gradient; its tokens are
    normalised over their features, without scale and bias. A clip counts for a pair where it has
    both streams.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        choose(c.distance, DISTANCES, 'config.objective.distance')
        _check(c)
        self.masks = {
            kind: [
                block_masks.read(dict(fields), f'config.objective.{kind}_masks[{number}]')
                for number, fields in enumerate(c[f'{kind}_masks'])
            ]
            for kind in ('video', 'audio')
        }

    def streams(self) -> tuple[str, ...]:
        names = [name for seen, told, _ in self.config.pairs for name in (seen, told)]
        return tuple(dict.fromkeys(names))

    def masks_of(self, stream: str) -> list[block_masks.BlockMask]:
        """The masks of a stream."""
        return self.masks['video' if kind_of(modality_of(stream)) == PICTURES else 'audio']

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        grids, widths = {}, {}
        for stream in self.streams():
            encoded = spec.outputs.encoded[stream]
            grids[stream] = encoded.grid
            widths[stream] = encoded.pooled.shape[-1]
            _check_tower(spec.model, stream)
            for mask in self.masks_of(stream):
                block_masks.check_grid(mask, encoded.grid, f'config.objective: masks of {stream}')
        if len(set(widths.values())) > 1:
            raise ConfigError(
                'config.objective.pairs: expected towers of one width, which the predictor reads '
                f'and tells, got {widths}; set config.model.shared=True'
            )
        predictor = self._predictor(spec.model, grids, next(iter(widths.values())))
        params = _init_predictor(predictor, key)
        # Only what it reads: towers of other tasks have no copy.
        teacher = teachers.create(spec.model_params, spec.batch_stats, _patterns(self.streams()))
        return {'predictor': params}, {'teacher': teacher}

    def begin(self, model_params: Any, batch_stats: Any, state: Any) -> Any:
        return {**state, 'teacher': teachers.begin(state['teacher'], model_params, batch_stats)}

    def _predictor(self, model: Any, grids: Mapping[str, tuple[int, ...]], width: int) -> Predictor:
        """The predictor for tokens of these streams, computed as the model is."""
        c = self.config
        return Predictor(
            outputs=width,
            grids=tuple({modality_of(name): grid for name, grid in grids.items()}.items()),
            masks=len(c.video_masks),
            width=c.width,
            layers=c.layers,
            mlp=c.mlp,
            heads=c.heads,
            scan=model.config['scan'],
            remat=model.config['remat'],
            implementation=model.config['attention'],
            dtype=model.dtype,
        )

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        """Errors of all pairs [B], and what the encoders make of a clip as a whole [B D].

        The predictor is run here: it takes each clip by itself, as towers do.
        """
        streams = {name: batch[name] for name in self.streams()}
        targets, grids = self._targets(model, variables, state, streams, rng)
        width = next(iter(targets.values())).shape[-1]
        predictor = self._predictor(model, grids, width)
        errors: dict[tuple[str, str], list[jax.Array]] = {}
        found = {f'target/{name}': tokens.mean(1) for name, tokens in targets.items()}
        for number in range(len(self.config.video_masks)):
            masked = self._draw(number, grids, rng)
            context = _context(model, variables, streams, masked, rng.at(f'context_{number}'))
            for name, tokens in context.items():
                # Of the last mask.
                found[f'context/{name}'] = tokens.astype(jnp.float32).mean(1)
            for seen, told, _ in self.config.pairs:
                hidden = masked[told].hidden
                predicted: Any = predictor.apply(
                    {'params': params['predictor']},
                    context[seen],
                    masked[seen].kept,
                    hidden,
                    modality_of(seen),
                    modality_of(told),
                    number,
                    rng,
                )
                error = self._distance(predicted, targets[told], hidden)
                errors.setdefault((seen, told), []).append(error)
        for (seen, told), parts in errors.items():
            found[f'error/{seen}/{told}'] = jnp.stack(parts).mean(0)
        return Encoding(found, variables['batch_stats'], state)

    def _targets(
        self, model: Any, variables: Any, state: Any, streams: Mapping[str, Any], rng: Rng
    ) -> tuple[dict[str, Float[Array, 'B N D']], dict[str, tuple[int, ...]]]:
        """By stream: the teacher's tokens of the whole clip, normalised; and their grid."""
        teacher = teachers.variables(state['teacher'], variables['params'])
        teacher = jax.lax.stop_gradient(teacher)
        # Not in training mode: nothing is dropped.
        encoded, _ = encode_streams(model, teacher, streams, rng, train=False)
        targets = {name: normalise(stream.tokens) for name, stream in encoded.items()}
        return targets, {name: stream.grid for name, stream in encoded.items()}

    def _draw(
        self, number: int, grids: Mapping[str, tuple[int, ...]], rng: Rng
    ) -> dict[str, block_masks.Masked]:
        """The masks of one number, by stream."""
        masked = {}
        for name, grid in grids.items():
            site = rng.at(f'mask_{number}').at(name)
            masked[name] = block_masks.draw(self.masks_of(name)[number], grid, site)
        return masked

    def _distance(
        self,
        predicted: Float[Array, 'B M D'],
        targets: Float[Array, 'B N D'],
        hidden: Any,
    ) -> Float[Array, ' B']:
        """The mean distance of a clip's predictions from the targets at their places."""
        told = jnp.take_along_axis(targets, hidden[..., None], 1)  # [B M D]
        distance = DISTANCES[self.config.distance]
        return distance(predicted.astype(jnp.float32) - told).mean((1, 2))

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
        total, weights = jnp.zeros((), jnp.float32), 0.0
        metrics = {}
        for seen, told, weight in self.config.pairs:
            valid = batch[seen]['valid'] & batch[told]['valid'] & batch['valid']  # [B]
            name = f'error/{seen}/{told}'
            metrics[name] = masked_mean(pooled[name], valid)
            total = total + weight * metrics[name]
            weights += weight
        for stream in self.streams():
            valid = batch[stream]['valid'] & batch['valid']
            for side in ('context', 'target'):
                name = f'{side}/{stream}'
                metrics[f'spread/{name}'] = spread(pooled[name], valid)
        return Loss(total / weights, metrics, variables['batch_stats'], state)

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        """Let the teacher follow the student."""
        momentum = self.momentum(step)
        followed = teachers.follow(state['teacher']['params'], model_params, momentum)
        state = {**state, 'teacher': {**state['teacher'], 'params': followed}}
        return model_params, params, state

    def momentum(self, step: Any) -> Any:
        """How much of the teacher stays in this step."""
        first, last = self.config.momentum
        if not self.config.momentum_steps:
            return first
        progress = jnp.minimum(step / self.config.momentum_steps, 1.0)
        return first + (last - first) * progress

    def teacher(self, state: Any) -> dict[str, Any]:
        return state['teacher']


def normalise(tokens: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
    """Tokens of mean 0 and variance 1 over their features, float32."""
    tokens = tokens.astype(jnp.float32)
    centred = tokens - tokens.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + EPSILON)


def _context(
    model: Any,
    variables: Any,
    streams: Mapping[str, Any],
    masked: Mapping[str, block_masks.Masked],
    rng: Rng,
) -> dict[str, Float[Array, 'B K D']]:
    """By stream: the encoder's tokens of what is seen."""
    seen = {name: {**stream, 'keep': masked[name].kept} for name, stream in streams.items()}
    encoded, _ = encode_streams(model, variables, seen, rng, train=True)
    return {name: stream.tokens for name, stream in encoded.items()}


def _init_predictor(predictor: Predictor, key: jax.Array) -> Any:
    """Its parameters, boxed with logical axes."""
    modality = predictor.grids[0][0]
    # One token of one clip: no parameter's shape depends on their numbers.
    token = jnp.zeros((1, 1, predictor.outputs), predictor.dtype)
    place = jnp.zeros((1, 1), jnp.int32)
    rng = Rng.create(0, 0, jnp.zeros(1))
    return predictor.init(key, token, place, place, modality, modality, 0, rng)['params']


def _patterns(streams: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the parameters that encode these streams."""
    modalities = '|'.join(dict.fromkeys(modality_of(name) for name in streams))
    return (rf'^(fronts|encoders|posts)_({modalities})/', '^shared_encoder/')


def _check_tower(model: Any, stream: str) -> None:
    """Raise ConfigError for a tower that cannot be shown a part of its tokens."""
    modality = modality_of(stream)
    tower = model.config['towers'][modality]
    if tower['name'] not in ('vit', 'spt'):
        raise ConfigError(
            f'config.model.towers.{modality}.name: expected a transformer over tubelets (vit) or '
            f'spectrogram patches (spt), of whose tokens some are hidden, got {tower["name"]!r}'
        )
    if tower.get('post'):
        raise ConfigError(
            f'config.model.towers.{modality}.post={tower["post"]}: expected 0, since what is '
            'predicted are tokens of the encoder'
        )


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    where = 'config.objective.pairs'
    example = '("video", "video", 1.0)'
    if not config.pairs:
        raise ConfigError(f'{where}: expected at least one pair, such as {example}, got none.')
    for pair in config.pairs:
        if len(pair) != 3:
            raise ConfigError(f'{where}: expected pairs such as {example}, got {pair!r}.')
        check_range(pair[2], 0, math.inf, where)
        seen, told, _ = pair
        is_one_window = seen.partition('.')[2] == told.partition('.')[2]
        if seen != told and (modality_of(seen) == modality_of(told) or not is_one_window):
            raise ConfigError(
                f'{where}: expected a stream and itself, or streams of two modalities and one '
                f'window, got {seen!r} and {told!r}.'
            )
    if not sum(weight for *_, weight in config.pairs) > 0:
        raise ConfigError(f'{where}: expected a weight above 0, got none.')
    if not config.video_masks or len(config.video_masks) != len(config.audio_masks):
        raise ConfigError(
            'config.objective.video_masks: expected at least one mask, and as many audio_masks, '
            f'got {len(config.video_masks)} and {len(config.audio_masks)}.'
        )
    if config.width % config.heads:
        raise ConfigError(
            f'config.objective.heads: expected a divisor of width={config.width}, got '
            f'{config.heads}.'
        )
    if len(config.momentum) != 2:
        raise ConfigError(
            'config.objective.momentum: expected (first, last), such as (0.998, 1.0), got '
            f'{config.momentum}.'
        )
    for value in config.momentum:
        check_range(value, 0, 1, 'config.objective.momentum')
