"""Optimizers and schedules from config, chosen per parameter path."""

from vatt_jax.optim.builder import OPTIMIZERS, build, check, scale_by_path
from vatt_jax.optim.keras import KerasAdamState, scale_by_keras_adam, skippable, tree_select
from vatt_jax.optim.parameter_paths import check_patterns, matches, paths
from vatt_jax.optim.schedules import SCHEDULES, schedule

__all__ = [
    'OPTIMIZERS',
    'SCHEDULES',
    'KerasAdamState',
    'build',
    'check',
    'check_patterns',
    'skippable',
    'tree_select',
    'matches',
    'paths',
    'scale_by_keras_adam',
    'scale_by_path',
    'schedule',
]
