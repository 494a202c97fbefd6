"""The registry of objectives: a new one is a class, an entry here and a config."""

from __future__ import annotations

from vatt_jax.config import choose
from vatt_jax.objectives.base import Loss, Objective, Records, Refreshed, Spec
from vatt_jax.objectives.classification import Classification
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.objectives.kmeans_labels import KMeansLabels
from vatt_jax.objectives.online_codes import OnlineCodes
from vatt_jax.objectives.self_labelling import SelfLabelling

OBJECTIVES = {
    'contrastive': Contrastive,
    'kmeans_labels': KMeansLabels,
    'self_labelling': SelfLabelling,
    'online_codes': OnlineCodes,
    'classification': Classification,
}

__all__ = ['OBJECTIVES', 'Loss', 'Objective', 'Records', 'Refreshed', 'Spec', 'build']


def build(config) -> Objective:
    """The objective of `config.objective`. Raises ConfigError for an unknown name or field."""
    return OBJECTIVES[choose(config.name, OBJECTIVES, 'config.objective.name')](config)
