"""Optimizers and schedules from config, chosen per parameter path."""

from vatt_jax.optim.build import OPTIMIZERS, build, check, scale_by_path
from vatt_jax.optim.keras import KerasAdamState, guarded, kept, scale_by_keras_adam
from vatt_jax.optim.paths import check_patterns, matches, paths
from vatt_jax.optim.schedules import SCHEDULES, schedule

__all__ = [
    'OPTIMIZERS',
    'SCHEDULES',
    'KerasAdamState',
    'build',
    'check',
    'check_patterns',
    'guarded',
    'kept',
    'matches',
    'paths',
    'scale_by_keras_adam',
    'scale_by_path',
    'schedule',
]
