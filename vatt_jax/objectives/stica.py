"""STiCA: contrast across modalities, and within video between crops of feature maps.

Patrick et al. 2021, as in the authors' code: docs/gdt.md.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.inputs.batch import modality_of
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.models.time_pooling import TimePooling
from vatt_jax.objectives import heads
from vatt_jax.objectives.base import Encoding, Loss, Objective, Spec, select_streams
from vatt_jax.objectives.feature_crops import Crop, crop_moments
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.rng import Rng

DEFAULTS = {
    'name': 'stica',
    # Two augmented views of a clip's pictures, of whose maps crops are contrasted.
    'views': ('video', 'video.second'),
    # What both are contrasted with as a whole.
    'sound': 'audio',
    # Number of (large, small) crops of space and of time; at most two large ones. (0, 0): none.
    'space_crops': (2, 4),
    'time_crops': (2, 1),
    # Side of a crop of space, length of one of time, in places of the map (large, small). Those
    # published are for a map of 4×7×7.
    'space_sizes': (6, 4),
    'time_sizes': (3, 2),
    # True: the last place of a crop is never drawn, as in the authors' code.
    'published_offsets': False,
    # Share of the loss between crops.
    'crop_weight': 0.5,
    # Across modalities, and between crops.
    'temperature': 0.1,
    'crop_temperature': 0.5,
    # Of the transformer that pools time; 0 layers: the mean.
    'layers': 2,
    'heads': 4,
    'mlp': 2048,
    # Of the embedding, and of the heads' hidden layer (0: none).
    'width': 256,
    'hidden': 512,
    # Before each layer of the heads.
    'dropout': 0.3,
    # auto | gather | ring | dense, see the objective `contrastive`.
    'method': 'auto',
}
# Name of the common space that the heads lead to, for evaluators.
SPACE = 'stica'
# Field -> smallest and largest value.
RANGES = {
    'crop_weight': (0, 1),
    'temperature': (1e-6, math.inf),
    'crop_temperature': (1e-6, math.inf),
    'layers': (0, 1000),
    'heads': (1, math.inf),
    'mlp': (1, math.inf),
    'width': (1, math.inf),
    'hidden': (0, math.inf),
    'dropout': (0, 1),
}
AXES = ('space', 'time')
MOST_LARGE = 2
# The whole map comes first among its crops.
WHOLE = 0


class Pair(NamedTuple):
    """A term of the loss between crops.

    Attributes:
        name: for metrics; of terms of one kind the same.
        first: number of the first view's crop.
        second: number of the second view's crop.
        both_ways: each finds the other; False: the second, a small crop, finds the first.
    """

    name: str
    first: int
    second: int
    both_ways: bool


class STiCA(Objective):
    """InfoNCE across modalities and between crops, whose keys carry no gradient.

        loss = (1 - w) · mean over views of (video to sound + sound to video) / 2
               + w · mean over pairs of crops

    Crops of the first view are paired with those of the second: a large crop with the other view's
    large one, in both directions, and each small crop of the second view with each large one of the
    first, which alone is a key.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        _check(c)
        first, second, self.pairs = make_pairs(c)
        self.crops = dict(zip(c.views, (first, second)))
        self.head = heads.Head(c.width, c.hidden, c.dropout)
        self.time_pooling = TimePooling(c.layers, c.heads, c.mlp)
        is_dense = c.method == 'dense'
        self.how = similarity.How('auto' if is_dense else c.method)
        self.loss_function = (dense if is_dense else nce).info_nce

    def streams(self) -> tuple[str, ...]:
        return (*self.config.views, self.config.sound)

    def map_streams(self) -> tuple[str, ...]:
        return tuple(self.config.views)

    @property
    def pictures(self) -> str:
        """Modality of the views."""
        return modality_of(self.config.views[0])

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        video = spec.outputs.encoded[c.views[0]]
        _check_sizes(c, video.grid)
        width = video.tokens.shape[-1]
        pooling_key, video_key, sound_key = jax.random.split(key, 3)
        moments = jnp.zeros((1, self._num_moments(video.grid[0]), width))
        # Without layers it has no parameters.
        pooling = self.time_pooling.init(pooling_key, moments).get('params', {})
        params, norm = {'time_pooling': pooling}, {}
        sound_width = heads.width_of(spec, c.sound)
        params[self.pictures], norm[self.pictures] = heads.init(self.head, video_key, width)
        modality = modality_of(c.sound)
        params[modality], norm[modality] = heads.init(self.head, sound_key, sound_width)
        return params, {'norm': norm}

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        c = self.config
        streams = select_streams(batch, self.streams())
        features, batch_stats = run_towers(model, variables, streams, rng, maps=tuple(c.views))
        pooled = {c.sound: features[c.sound]}
        for view in c.views:
            feature_map = features[map_of(view)]  # [B T H W D]
            # Averaged here, so that no map is held for the loss of all clips.
            pooled[crops_of(view)] = crop_moments(
                feature_map,
                self.crops[view],
                self._num_moments(feature_map.shape[1]),
                rng.at('crops').at(view),
                c.published_offsets,
            )
        return Encoding(pooled, batch_stats, state)

    def _num_moments(self, num_frames: int) -> int:
        """To how many moments time is pooled before the transformer."""
        # A mean of overlapping bins would count some frames twice.
        return num_frames if self.config.layers else 1

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
        # Clips that cannot be read are in the batch, but of no stream.
        valid = {name: batch[name]['valid'] & batch['valid'] for name in self.streams()}  # [B]
        norm = state['norm']
        cross = []
        crops = {}
        for view in c.views:
            crops[view], norm = self._embed_crops(params, norm, view, pooled, valid, rng)
            # Once for each view, as published: dropout differs.
            sound, norm = self._head(params, norm, c.sound, pooled[c.sound], valid, rng.at(view))
            cross.append(
                self._both_ways(
                    crops[view][WHOLE], sound, valid[view], valid[c.sound], c.temperature
                )
            )
        cross_loss = jnp.mean(jnp.stack(cross))
        terms = self._crop_losses(crops, valid)
        all_terms = [loss for losses in terms.values() for loss in losses]
        crop_loss = jnp.mean(jnp.stack(all_terms))
        metrics = {f'loss/{name}': jnp.mean(jnp.stack(losses)) for name, losses in terms.items()}
        metrics.update({'loss/cross': cross_loss, 'loss/crops': crop_loss})
        loss = (1 - c.crop_weight) * cross_loss + c.crop_weight * crop_loss
        return Loss(loss, metrics, variables['batch_stats'], {**state, 'norm': norm})

    def _embed_crops(
        self,
        params: Any,
        norm: Mapping[str, Any],
        view: str,
        pooled: Mapping[str, Any],
        valid: Mapping[str, Any],
        rng: Rng,
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """(unit embeddings [B E] of a view's whole map and crops, the heads' new statistics)."""
        moments = pooled[crops_of(view)]  # [B N M D]
        vectors = self._pool_time(params, moments)  # [B N D]
        embeddings = []
        new_norm = dict(norm)
        for number in range(vectors.shape[1]):
            # Crop by crop, as published: each is normalised by statistics of its own.
            embedding, new_norm = self._head(
                params, new_norm, view, vectors[:, number], valid, rng.at(number)
            )
            embeddings.append(embedding)
        return embeddings, new_norm

    def _pool_time(self, params: Any, moments: Float[Array, '... M D']) -> Float[Array, '... D']:
        """The vector of each row of moments."""
        *leading, num_moments, width = moments.shape
        rows = moments.reshape(-1, num_moments, width)
        vectors: Any = self.time_pooling.apply({'params': params['time_pooling']}, rows)
        return jnp.reshape(vectors, (*leading, width))

    def _head(
        self,
        params: Any,
        norm: Mapping[str, Any],
        stream: str,
        features: Float[Array, 'B D'],
        valid: Mapping[str, Any],
        rng: Rng,
    ) -> tuple[Float[Array, 'B E'], dict[str, Any]]:
        """(unit embeddings, the heads' new batch statistics)."""
        modality = modality_of(stream)
        outputs, stats = heads.apply(
            self.head,
            params[modality],
            norm[modality],
            {stream: features},
            {stream: valid[stream]},
            rng.at('heads').at(stream),
            train=True,
        )
        return heads.unit(outputs[stream][1]), {**norm, modality: stats}

    def _crop_losses(
        self, crops: Mapping[str, list[jax.Array]], valid: Mapping[str, Any]
    ) -> dict[str, list[jax.Array]]:
        """Name of a kind of term -> its losses."""
        first, second = self.config.views
        temperature = self.config.crop_temperature
        losses = collections.defaultdict(list)
        for pair in self.pairs:
            key, query = crops[first][pair.first], crops[second][pair.second]
            if pair.both_ways:
                loss = self._both_ways(query, key, valid[second], valid[first], temperature)
            else:
                loss = self._one_way(query, key, valid[second], valid[first], temperature)
            losses[pair.name].append(loss)
        return losses

    def _both_ways(
        self, x: Any, y: Any, x_valid: Any, y_valid: Any, temperature: float
    ) -> Float[Array, '']:
        """Mean InfoNCE of x among all y and of y among all x."""
        forward = self._one_way(x, y, x_valid, y_valid, temperature)
        backward = self._one_way(y, x, y_valid, x_valid, temperature)
        return (forward + backward) / 2

    def _one_way(
        self, query: Any, key: Any, query_valid: Any, key_valid: Any, temperature: float
    ) -> Float[Array, '']:
        """InfoNCE of queries among the keys of all clips, which carry no gradient."""
        return self.loss_function(
            query,
            key,
            x_valid=query_valid,
            y_valid=key_valid,
            temperature=temperature,
            how=self.how,
        )

    def embed(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, dict[str, jax.Array]]:
        """The space `stica`, of pictures and sound."""
        embeddings = {}
        for name, stream in encoded.items():
            modality = modality_of(name)
            if modality not in (self.pictures, modality_of(self.config.sound)):
                continue
            features = stream.pooled
            if modality == self.pictures:
                features = self._pool_whole(params, stream)
            rng = Rng.create(0, 0, jnp.zeros(len(features), jnp.uint32))  # nothing is drawn
            outputs, _ = heads.apply(
                self.head,
                params[modality],
                state['norm'][modality],
                {name: features},
                {name: jnp.ones(len(features), bool)},
                rng,
                train=False,
            )
            embeddings[name] = outputs[name][1]
        return {SPACE: embeddings}

    def _pool_whole(self, params: Any, stream: Any) -> Float[Array, 'B D']:
        """The vector of a whole map, in evaluation."""
        feature_map = stream.tokens.reshape(len(stream.tokens), *stream.grid, -1)
        rng = Rng.create(0, 0, jnp.zeros(len(feature_map), jnp.uint32))  # nothing is drawn
        moments = crop_moments(feature_map, (), self._num_moments(stream.grid[0]), rng)
        return self._pool_time(params, moments[:, WHOLE])


def crops_of(view: str) -> str:
    """The name under which the moments of a view's crops [B N M D] go to the loss."""
    return f'{view}/crops'


def make_pairs(config: Any) -> tuple[tuple[Crop, ...], tuple[Crop, ...], tuple[Pair, ...]]:
    """(crops of the first view, crops of the second view, their pairs).

    The first large crop of the second view and the small ones of the first are in no term, and are
    not made.
    """
    first: list[Crop] = []
    second: list[Crop] = []
    pairs: list[Pair] = []
    for axis in AXES:
        num_large, num_small = config[f'{axis}_crops']
        large_size, small_size = config[f'{axis}_sizes']
        large = [Crop(axis, large_size, f'{axis}/large/{i}') for i in range(num_large)]
        small = [Crop(axis, small_size, f'{axis}/small/{i}') for i in range(num_small)]
        if not large[1:] and not small:
            continue
        # The whole map is number 0.
        large_numbers = range(1 + len(first), 1 + len(first) + len(large))
        partner_numbers = range(1 + len(second), 1 + len(second) + len(large[1:]))
        for number, partner in zip(large_numbers[1:], partner_numbers):
            pairs.append(Pair(f'{axis}_large', number, partner, True))
        first += large
        second += large[1:]
        small_numbers = range(1 + len(second), 1 + len(second) + len(small))
        second += small
        for number in large_numbers:
            pairs += [Pair(f'{axis}_small', number, other, False) for other in small_numbers]
    return tuple(first), tuple(second), tuple(pairs)


def _check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work."""
    choose(config.method, (*similarity.METHODS, 'dense'), 'config.objective.method')
    views = tuple(config.views)
    if len(views) != 2 or views[0] == views[1] or len({modality_of(view) for view in views}) > 1:
        raise ConfigError(
            'config.objective.views: expected two views of one modality, got '
            f"{views}. Set views=('video', 'video.second') and "
            "config.data.views=(('video.second', {'kind': 'shift', 'seconds': 0.0}),)."
        )
    if modality_of(config.sound) == modality_of(views[0]):
        raise ConfigError(
            'config.objective.sound: expected another modality than that of views, got '
            f'{config.sound!r}.'
        )
    for axis in AXES:
        num_large, num_small = config[f'{axis}_crops']
        if not 0 <= num_large <= MOST_LARGE or num_small < 0 or (num_small and not num_large):
            raise ConfigError(
                f'config.objective.{axis}_crops: expected at most {MOST_LARGE} large crops, and a '
                f'large one where there are small ones, got {(num_large, num_small)}.'
            )
    if not make_pairs(config)[2]:
        raise ConfigError(
            'config.objective.space_crops, config.objective.time_crops: expected two large crops, '
            f'or a large and a small one, of space or of time, got {tuple(config.space_crops)} and '
            f'{tuple(config.time_crops)}.'
        )


def _check_sizes(config: Any, grid: tuple[int, ...]) -> None:
    """Raise ConfigError unless all crops are parts of a map of time, rows and columns."""
    if len(grid) != 3:
        raise ConfigError(
            'config.objective.views: expected maps of time, rows and columns, got a tower of '
            f'{config.views[0]!r} with a grid {grid}. Choose a tower that makes maps.'
        )
    lengths = {'space': min(grid[1:]), 'time': grid[0]}
    for axis, length in lengths.items():
        for size in config[f'{axis}_sizes']:
            if not 1 <= size <= length:
                raise ConfigError(
                    f'config.objective.{axis}_sizes: expected sizes from 1 to {length}, since the '
                    f'map of a clip is {"×".join(map(str, grid))}, got '
                    f'{tuple(config[f"{axis}_sizes"])}.'
                )
