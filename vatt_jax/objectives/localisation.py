"""Localisation from sound, beside self-labelling: where a thing is, and which kind of thing it is.

Afouras, Asano, Fagan, Vedaldi and Metze (CVPR 2022): every position of a picture's map and the
sound of its moment go into a common space. How well they fit is a heat map; its maximum is the
score of picture and sound, by which a picture must find its own sound among those of the batch, and
a sound its picture. On the same towers, SeLaVi's self-labelling finds classes. Boxes of heat maps
with these classes are what a detector learns from (docs/detection.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.losses import max_over_positions
from vatt_jax.losses.blockwise import How
from vatt_jax.objectives import heads, self_labelling
from vatt_jax.objectives.base import Encoding, Loss, Spec, select_streams
from vatt_jax.objectives.forward import map_of, run_towers
from vatt_jax.objectives.self_labelling import SelfLabelling
from vatt_jax.rng import Rng

DEFAULTS = {
    # Fields of self-labelling: views, clusters, heads, prior, refreshes … Its `warmup` steps, which
    # come before the first labels, learn to localise alone.
    **self_labelling.DEFAULTS,
    'name': 'localisation',
    # Streams that are compared: the map of the first, the pooled feature of the second.
    'picture': 'video',
    'sound': 'audio',
    # λ: share of the contrast in the loss; the other is that of the labels.
    'contrast': 0.5,
    # Share of the contrast in which the score is that of the pooled picture. The maximum has its
    # gradient at one position, which before training is an arbitrary one: from scratch, the loss
    # may stay where it began for hundreds of steps. 0: the maximum alone, as published.
    'pooled_share': 0.0,
    # Positions along each edge of the map that are left out. Padding marks them in every picture
    # alike, and the maximum settles there for sounds that fit nothing. Heat maps have their mean
    # there. 0: none, as published.
    'margin': 0,
    # Of the common space.
    'width': 256,
    'temperature': 0.07,
    # blockwise | dense: the same loss, with all products in memory.
    'method': 'blockwise',
}
METHODS = {
    'blockwise': max_over_positions.max_over_positions,
    'dense': max_over_positions.dense,
}
# Entry of the parameters beside those of the labels' heads, which are named by modality.
PROJECTIONS = 'projections'
# Names of what `heat_maps` returns.
HEAT, SALIENCY = 'heat', 'saliency'


class Localisation(SelfLabelling):
    """λ · contrast of maps and sounds + (1 - λ) · self-labelling.

    A clip that lacks a picture or its sound is left out of the contrast. Parameters are those of
    self-labelling, and 'projections': {'picture', 'sound'} into the common space.
    """

    DEFAULTS = DEFAULTS

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = self.config
        check_range(c.contrast, 0, 1, 'config.objective.contrast')
        check_range(c.pooled_share, 0, 1, 'config.objective.pooled_share')
        check_range(c.margin, 0, 1 << 10, 'config.objective.margin')
        check_range(c.width, 1, 1 << 20, 'config.objective.width')
        check_range(c.temperature, 1e-6, 1e6, 'config.objective.temperature')
        choose(c.method, METHODS, 'config.objective.method')
        if c.picture == c.sound:
            raise ConfigError(
                'config.objective.sound: expected another stream than that of picture, got '
                f'{c.sound!r} for both'
            )
        # Of every position by itself: a convolution of 1 × 1.
        self.projection = heads.Head(c.width)

    def streams(self) -> tuple[str, ...]:
        c = self.config
        return tuple(dict.fromkeys((*c.views, c.picture, c.sound)))

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        params, state = super().init(key, spec)
        self._check_margin(spec.outputs.encoded[self.config.picture].grid)
        projections = {}
        for i, name in enumerate(('picture', 'sound')):
            width = heads.width_of(spec, self.config[name])
            # Beyond the keys of self-labelling.
            own_key = jax.random.fold_in(key, 5000 + i)
            projections[name], _ = heads.init(self.projection, own_key, width)
        return {**params, PROJECTIONS: projections}, state

    def _check_margin(self, grid: tuple[int, ...]) -> None:
        margin = self.config.margin
        # Towers without a map are refused elsewhere.
        if grid and 2 * margin >= min(grid[-2:]):
            raise ConfigError(
                f'config.objective.margin={margin}: the map of {grid[-2]} × {grid[-1]} positions '
                'has nothing left; try a smaller one'
            )

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
        pooled, batch_stats = run_towers(model, variables, streams, rng, (self.config.picture,))
        return Encoding(pooled, batch_stats, state)

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
        labelling = super().compute_loss(model, variables, params, state, pooled, batch, rng)
        inner = self._inner(pooled[map_of(c.picture)])
        contrast = self._contrast(params, inner, pooled, batch)
        if c.pooled_share:
            # A map of one position: the whole picture.
            whole = pooled[c.picture][:, None]  # [B 1 D]
            of_whole = self._contrast(params, whole, pooled, batch)
            contrast = (1 - c.pooled_share) * contrast + c.pooled_share * of_whole
        value = c.contrast * contrast + (1 - c.contrast) * labelling.value
        metrics = {
            'loss/contrast': contrast,
            'loss/labels': labelling.value,
            **labelling.metrics,
        }
        # Before the first labels self-labelling keeps all parameters; the contrast needs none.
        return Loss(value, metrics, labelling.batch_stats, labelling.state, apply_update=True)

    def _inner(self, grid: Float[Array, 'B T h w *D']) -> Float[Array, 'B T h2 w2 *D']:
        """A map without its margin."""
        margin = self.config.margin
        height, width = grid.shape[2:4]
        return grid[:, :, margin : height - margin, margin : width - margin]

    def _contrast(
        self,
        params: Any,
        feature_map: Float[Array, 'B *grid D'],
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
    ) -> Float[Array, '']:
        """InfoNCE of maps and the sounds of the batch."""
        c = self.config
        return METHODS[c.method](
            self.project(params, 'picture', feature_map),
            self.project(params, 'sound', pooled[c.sound]),
            x_valid=batch[c.picture]['valid'] & batch['valid'],
            y_valid=batch[c.sound]['valid'] & batch['valid'],
            temperature=c.temperature,
            how=How(),
        )

    def project(
        self, params: Any, name: str, features: Float[Array, 'B *grid D']
    ) -> Float[Array, 'B *grid E']:
        """Features in the common space, un-normalised.

        Args:
          params: the objective's parameters.
          name: picture or sound.
          features: of every position, or of the whole.
        """
        rows = features.reshape(-1, features.shape[-1])
        rng = Rng.create(0, 0, jnp.zeros(len(rows), jnp.uint32))  # nothing is drawn
        projected: Any
        _, projected = self.projection.apply(
            {'params': params[PROJECTIONS][name]}, rows, jnp.ones(len(rows), bool), rng, False
        )
        return projected.reshape(*features.shape[:-1], -1)

    # ---- Evaluation.

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        """See SelfLabelling. A loaded model has no statistics of the heads, and no clusters."""
        return super().predict(params, state, encoded) if 'norm' in state else {}

    def heat_maps(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """'heat': cosines of every position and the sound; 'saliency': lengths of features.

        The latter needs no sound and, of a network before training, is a baseline.
        """
        c = self.config
        if c.picture not in encoded or encoded[c.picture].tokens is None:
            return {}
        picture = encoded[c.picture]
        tokens = picture.tokens.astype(jnp.float32)
        grid = tokens.reshape(len(tokens), *picture.grid, -1)  # [B T h w D]
        maps = {SALIENCY: jnp.linalg.norm(grid, axis=-1)}
        if c.sound in encoded:
            positions = heads.unit(self.project(params, 'picture', grid))
            sound = heads.unit(self.project(params, 'sound', encoded[c.sound].pooled))
            maps[HEAT] = jnp.einsum('b...e,be->b...', positions, sound, precision='highest')
        return {name: self._without_margin(x) for name, x in maps.items()}

    def _without_margin(self, heat: Float[Array, 'B T h w']) -> Float[Array, 'B T h w']:
        """A map whose margin has the mean of the rest, below every threshold of β > 0."""
        if not self.config.margin:
            return heat
        inner = self._inner(heat)
        mean = inner.mean((2, 3), keepdims=True)
        margin = (self.config.margin,) * 2
        # Padded with zeros around what is measured from the mean.
        return jnp.pad(inner - mean, ((0, 0), (0, 0), margin, margin)) + mean
