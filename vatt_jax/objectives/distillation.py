"""Distillation between modalities: one network's feature is drawn to another one's.

In ELo (Piergiovanni, Angelova and Ryoo 2020) networks of optical flow and of sound pass on in this
way what they know to that of RGB, which alone is used afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, check_range, choose, with_defaults
from vatt_jax.losses import margin
from vatt_jax.objectives.base import Loss, Objective, Spec
from vatt_jax.objectives.forward import stage_of
from vatt_jax.objectives.online_codes import masked_mean
from vatt_jax.parallel.sharding import logical

DEFAULTS = {
    'name': 'distillation',
    # Whose features learn.
    'student': 'video',
    # Whose features they are drawn to; the loss sends no gradient to it.
    'teacher': 'flow',
    # Of which stage of the two towers, numbered from 1, averaged over positions; 0: the pooled
    # features, the last of each tower. Several stages are several tasks of `multi_task`.
    'stage': 0,
    # none: features are compared as they are, and must be of one width | linear: the student's pass
    # a linear layer to the width of the teacher's
    'projection': 'none',
}
PROJECTIONS = ('none', 'linear')


class Distillation(Objective):
    """Mean over clips of the Euclidean distance of the student's feature from the teacher's.

    Features are the pooled ones, or those of one stage. Both streams show the same clip. Clips that
    lack one of the two are left out: finite loss, zero gradient.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(with_defaults(config, DEFAULTS, 'config.objective'))
        c = self.config
        choose(c.projection, PROJECTIONS, 'config.objective.projection')
        check_range(c.stage, 0, 100, 'config.objective.stage')
        if c.student == c.teacher:
            raise ConfigError(
                f'config.objective.teacher: expected another stream than the student, got '
                f'{c.teacher!r} for both.'
            )

    def streams(self) -> tuple[str, ...]:
        return (self.config.student, self.config.teacher)

    def tower_stages(self) -> tuple[tuple[str, int], ...]:
        c = self.config
        return tuple((stream, c.stage) for stream in self.streams()) if c.stage else ()

    def _feature(self, stream: str) -> str:
        """The name of what is compared of a stream."""
        return stage_of(stream, self.config.stage) if self.config.stage else stream

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        c = self.config
        width = _width_of(spec, c.student, 'student', c.stage)
        teacher_width = _width_of(spec, c.teacher, 'teacher', c.stage)
        if c.projection == 'linear':
            initializers = jax.nn.initializers
            kernel_init = logical(initializers.lecun_normal(), 'embed', None)
            bias_init = logical(initializers.zeros, None)
            params = {
                'kernel': kernel_init(key, (width, teacher_width), jnp.float32),
                'bias': bias_init(key, (teacher_width,), jnp.float32),
            }
            return params, {}
        if width != teacher_width:
            raise ConfigError(
                f"config.objective.projection: expected 'linear' for features of different widths, "
                f"got 'none' for {width} of {c.student!r} and {teacher_width} of {c.teacher!r}."
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
        rng: Any,
    ) -> Loss:
        c = self.config
        valid = batch[c.student]['valid'] & batch[c.teacher]['valid']  # [B]
        # Cut out before anything is computed from them: not even NaN reaches their gradient.
        student = jnp.where(valid[:, None], pooled[self._feature(c.student)], 0).astype(
            jnp.float32
        )  # [B D]
        teacher = jnp.where(valid[:, None], pooled[self._feature(c.teacher)], 0).astype(jnp.float32)
        teacher = jax.lax.stop_gradient(teacher)
        if c.projection == 'linear':
            student = student @ params['kernel'] + params['bias']

        distance = margin.distance(student, teacher)  # [B]
        length = jnp.linalg.norm(teacher, axis=-1)  # [B]
        relative = jax.lax.stop_gradient(distance / jnp.maximum(length, 1e-6))
        metrics = {
            # Of the teacher's length: 1 is what a student at the origin has.
            'relative_distance': masked_mean(relative, valid),
            'teacher_length': masked_mean(length, valid),
        }
        return Loss(masked_mean(distance, valid), metrics, variables['batch_stats'], state)


def _width_of(spec: Spec, stream: str, field: str, stage: int) -> int:
    """Width D of a stream's pooled feature, or of that of a stage.

    Raises:
      ConfigError: a clip has several, as of sentences; or the tower has no such stage.
    """
    if stage:
        stages = spec.outputs.encoded[stream].stages
        if stage not in stages:
            numbers = ', '.join(map(str, stages)) or 'which has none'
            raise ConfigError(
                f'config.objective.stage: expected a stage of the tower of {stream!r} ({numbers}), '
                f'got {stage}. Convolutional towers have stages.'
            )
        return stages[stage].shape[-1]
    shape = spec.outputs.encoded[stream].pooled.shape
    if len(shape) != 2:
        raise ConfigError(
            f'config.objective.{field}: expected a stream with one feature per clip, got '
            f'{stream!r} with {shape[1]} candidates for each clip.'
        )
    return shape[-1]
