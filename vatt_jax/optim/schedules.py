"""Learning rate schedules from `config.optimizer.schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose

SCHEDULES = ('warmup_cosine', 'warmup_quarter_cosine', 'warmup_linear', 'constant', 'vatt')

# ((step, rate), …): the rate is reached at the step, and interpolated in between.
Levels = tuple[tuple[Any, Any], ...]


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Make the function step -> learning rate (float32).

    - `vatt`: linear warm-up to the first level, a half-period cosine from each level to the next,
      and from the last one to 0 at the run's end (official VATT). Its pre-training has 1e-4 at 5k
      and 5e-5 at 500k. The latter is the end of the run, where the official formula divides zero
      by zero and returns NaN; this one returns the last level.
    - `warmup_cosine`: linear warm-up, then half a period from peak to end.
    - `warmup_quarter_cosine`: linear warm-up, then the first quarter of a period, so that the rate
      falls fastest at the end (VATT paper).
    - `warmup_linear`: linear warm-up, then linearly to end (BERT, ViLBERT, UNITER).
    - `constant`: linear warm-up, then the peak.

    Every warm-up begins at `start` (`warmup_learning_rate` of the official schedules).

    Args:
        config: `config.optimizer.schedule`.
        steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: A field has a value that makes no sense, or the warm-up fills the run.
    """
    _check_fields(config)
    # Configs of runs from before this field do not have it.
    start = config.get('start', 0.0)
    if config.name == 'constant':
        return _constant(start, config.peak, config.warmup)
    levels = _levels(config, steps)
    if config.name == 'warmup_quarter_cosine':
        return _through_levels(start, levels, _quarter_cosine)
    if config.name == 'warmup_linear':
        return _through_levels(start, levels, _line)
    return _through_levels(start, levels, _half_cosine)


def _check_fields(config: ConfigDict) -> None:
    choose(config.name, SCHEDULES, 'config.optimizer.schedule.name')
    for field in ('start', 'peak', 'warmup', 'end'):
        value = config.get(field, 0.0)
        # Not `value < 0`, which is False for NaN.
        if not 0 <= value < math.inf:
            raise ConfigError(
                f'config.optimizer.schedule.{field}={value:g}: expected a number of at least 0.'
            )
    if config.name != 'vatt':
        return
    are_pairs = all(_is_level(level) for level in config.levels)
    if not config.levels or not are_pairs:
        raise ConfigError(
            f'config.optimizer.schedule.levels={config.levels}: expected (step, rate) pairs, such '
            'as ((5000, 1e-4), (500000, 5e-5)).'
        )


def _is_level(level: Any) -> bool:
    """Return whether this is a (step, rate) pair of finite numbers of at least 0."""
    if not isinstance(level, tuple) or len(level) != 2:
        return False
    return all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in level)


def _levels(config: ConfigDict, steps: int) -> Levels:
    """Return the levels that the rate passes through, the warm-up's end first."""
    if config.name == 'vatt':
        levels = config.levels
        # The last level may be the end of the run; otherwise the rate falls to 0 from there.
        if levels[-1][0] < steps:
            levels = (*levels, (steps, 0.0))
    else:
        # The others are special cases: a single descent from the warm-up's end.
        levels = ((config.warmup, config.peak), (steps, config.end))
        if config.warmup >= steps:
            raise ConfigError(
                f'config.optimizer.schedule.warmup={config.warmup} leaves nothing of '
                f'config.steps={steps}; try --config.optimizer.schedule.warmup={steps // 10}, or '
                f'more steps (--config.steps={10 * config.warmup})'
            )
    for (step, _), (next_step, _) in zip(levels, levels[1:]):
        if step >= next_step:
            raise ConfigError(f'config.optimizer.schedule.levels={levels}: the steps must increase')
    return levels


def _constant(start: float, peak: float, warmup: int) -> optax.Schedule:
    def rate(step: Any) -> jax.Array:
        # At least 1 below the line: both branches of `where` are computed.
        warming_up = (peak - start) * step / max(1, warmup) + start
        return jnp.where(step < warmup, warming_up, peak)

    return rate


def _half_cosine(progress: jax.Array) -> jax.Array:
    # Flat at both ends.
    return 0.5 * (1 + jnp.cos(math.pi * progress))


def _quarter_cosine(progress: jax.Array) -> jax.Array:
    # Flat at the start, steepest at the end.
    return jnp.cos(math.pi / 2 * progress)


def _line(progress: jax.Array) -> jax.Array:
    return 1 - progress


def _through_levels(
    initial: float, levels: Levels, curve: Callable[[jax.Array], jax.Array]
) -> optax.Schedule:
    """Warm up from `initial` to the first level, then follow `curve` (1 to 0) between levels."""

    def rate(step: Any) -> jax.Array:
        # Exact for steps up to 2^24, about 17 million.
        step = jnp.asarray(step, jnp.float32)
        first_step, first_rate = levels[0]
        # max: without warm-up first_step is 0.
        value = (first_rate - initial) * step / max(1, first_step) + initial
        if len(levels) == 1:
            return jnp.where(step < first_step, value, first_rate)
        # Branch-free, as the step is traced: later segments overwrite earlier ones. Beyond the last
        # level progress stays 1.
        for (start, start_rate), (end, end_rate) in zip(levels, levels[1:]):
            progress = jnp.clip((step - start) / (end - start), 0.0, 1.0)  # 0 at start, 1 at end
            segment = end_rate + (start_rate - end_rate) * curve(progress)
            value = jnp.where(step >= start, segment, value)
        return value.astype(jnp.float32)

    return rate
