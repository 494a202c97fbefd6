"""LeJEPA: views of a clip agree, and embeddings are Gaussian; neither teacher nor negatives.

Balestriero and LeCun (2025), as in the authors' code. With views of video and of sound it is the
loss of AV-JEPA (Robson et al. 2026) without its early fusion: docs/jepa.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.losses import gaussianity
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.objectives.collapse import spread
from vatt_jax.objectives.forward import project
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.rng import Rng

DEFAULTS: dict[str, Any] = {
    'name': 'lejepa',
    # Streams of one clip that are to agree.
    'views': ('video', 'video.second'),
    # Those of them whose mean is what all are drawn to (global views); (): all.
    'centre': (),
    # Common space in which they do.
    'space': 'projection',
    # Of Gaussianity; the rest is the agreement's.
    'weight': 0.02,
    # Along which it is tested, other ones in every step.
    'directions': 256,
    # Points of the test's quadrature, and the largest of them.
    'knots': 17,
    'largest': 3.0,
}
# Field -> smallest and largest value.
RANGES = {
    'weight': (0, 1),
    'directions': (1, math.inf),
    'knots': (2, math.inf),
    'largest': (1e-6, math.inf),
}


class LeJEPA(Objective):
    """Distance from the mean of a clip's views, and SIGReg of each view.

        loss = (1 - w) · mean over views, clips and features of (z - mean of the clip's views)²
               + w · mean over views of SIGReg (losses/gaussianity.py)

    Gradients flow through the mean as well. A clip's views are those streams that it has.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        for field, (low, high) in RANGES.items():
            check_range(c[field], low, high, f'config.objective.{field}')
        if len(c.views) < 2:
            raise ConfigError(
                f'config.objective.views: expected at least two streams, got {c.views}.'
            )
        for name in c.centre:
            if name not in c.views:
                raise ConfigError(
                    f'config.objective.centre: expected names of views ({", ".join(c.views)}), '
                    f'got {name!r}.'
                )

    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.views)

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        members = spec.outputs.spaces.get(c.space, {})
        for view in c.views:
            if view not in members or members[view].ndim != 2:
                raise ConfigError(
                    f'config.objective.space={c.space!r}: expected a common space with one '
                    f'embedding of {view!r} for each clip; set config.model.head='
                    "{'name': 'lejepa', 'hidden': 2048, 'projection': 128}"
                )
        return {}, {}

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
        c = self.config
        valid = {view: batch[view]['valid'] & batch['valid'] for view in c.views}
        features = {view: pooled[view] for view in c.views}
        spaces, batch_stats = project(model, variables, features, valid)
        embeddings = spaces[c.space]  # {view: [B E]}
        distance = disagreement(embeddings, valid, tuple(c.centre or c.views))
        directions = gaussianity.draw_directions(
            embeddings[c.views[0]].shape[-1], c.directions, rng
        )
        statistics = {}
        for view in c.views:
            statistics[view] = gaussianity.sliced_epps_pulley(
                embeddings[view], valid[view], directions, c.knots, c.largest
            )
        sigreg = jnp.stack(list(statistics.values())).mean()
        metrics = {'disagreement': distance, 'sigreg': sigreg}
        for view in c.views:
            metrics[f'sigreg/{view}'] = statistics[view]
            metrics[f'spread/{view}'] = spread(embeddings[view], valid[view])
        value = (1 - c.weight) * distance + c.weight * sigreg
        return Loss(value, metrics, batch_stats, state)


def disagreement(
    embeddings: Mapping[str, Float[Array, 'B E']],
    valid: Mapping[str, Bool[Array, ' B']],
    centre: tuple[str, ...],
) -> Float[Array, '']:
    """Mean squared distance of views from the mean of those of the centre.

    Args:
        embeddings: by view.
        valid: the clips that have it.
        centre: views whose mean it is; a clip that has none of them is left out, as is one with a
            single view, which has nothing to agree with.
    """
    # Cut out before anything is computed from them: not even NaN reaches their gradient.
    known = {view: jnp.where(valid[view][:, None], x, 0) for view, x in embeddings.items()}
    total = sum(known[view] for view in centre)
    count = sum(valid[view].astype(jnp.float32) for view in centre)  # [B]
    num_views = sum(valid[view].astype(jnp.int32) for view in embeddings)  # [B]
    mean = total / jnp.maximum(count, 1)[:, None]  # [B E]
    distances, counted = [], []
    for view, embedding in known.items():
        distances.append(jnp.square(embedding - mean).mean(-1))
        counted.append(valid[view] & (count > 0) & (num_views > 1))
    return masked_mean(jnp.concatenate(distances), jnp.concatenate(counted))
