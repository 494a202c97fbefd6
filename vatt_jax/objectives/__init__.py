"""The registry of objectives: a new one is a class, an entry here and a config."""

from __future__ import annotations

from typing import Any

from vatt_jax.config import choose
from vatt_jax.objectives.base import Encoding, Loss, Objective, RefreshResult, Spec, TrainingRecords
from vatt_jax.objectives.captioning import Captioning
from vatt_jax.objectives.class_names import ClassNames
from vatt_jax.objectives.classification import Classification
from vatt_jax.objectives.coclr import CoCLR
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.objectives.dense_prediction import DensePrediction
from vatt_jax.objectives.detection import Detection
from vatt_jax.objectives.distillation import Distillation
from vatt_jax.objectives.gdt import GDT
from vatt_jax.objectives.instance_memory import InstanceMemory
from vatt_jax.objectives.joint_prediction import JointPrediction
from vatt_jax.objectives.kmeans_labels import KMeansLabels
from vatt_jax.objectives.lejepa import LeJEPA
from vatt_jax.objectives.localisation import Localisation
from vatt_jax.objectives.masked_words import MaskedWords
from vatt_jax.objectives.matching import Matching
from vatt_jax.objectives.multi_task import MultiTask
from vatt_jax.objectives.next_token import NextToken
from vatt_jax.objectives.online_codes import OnlineCodes
from vatt_jax.objectives.region_pretraining.objective import RegionPretraining
from vatt_jax.objectives.self_labelling import SelfLabelling
from vatt_jax.objectives.stica import STiCA
from vatt_jax.objectives.synchronisation import Synchronisation
from vatt_jax.objectives.temporal_order import TemporalOrder

# The key is the value of config.objective.name.
OBJECTIVES: dict[str, type[Objective]] = {
    'contrastive': Contrastive,
    'kmeans_labels': KMeansLabels,
    'self_labelling': SelfLabelling,
    'online_codes': OnlineCodes,
    'localisation': Localisation,
    'matching': Matching,
    'masked_words': MaskedWords,
    'synchronisation': Synchronisation,
    'coclr': CoCLR,
    'classification': Classification,
    'class_names': ClassNames,
    'detection': Detection,
    'gdt': GDT,
    'stica': STiCA,
    'instance_memory': InstanceMemory,
    'temporal_order': TemporalOrder,
    'distillation': Distillation,
    'dense_prediction': DensePrediction,
    'next_token': NextToken,
    'captioning': Captioning,
    'joint_prediction': JointPrediction,
    'lejepa': LeJEPA,
    'region_pretraining': RegionPretraining,
    'multi_task': MultiTask,
}

__all__ = [
    'OBJECTIVES',
    'Encoding',
    'Loss',
    'Objective',
    'RefreshResult',
    'Spec',
    'TrainingRecords',
    'build',
]


def build(config: Any) -> Objective:
    """Build the objective that `config.objective` describes.

    Args:
      config: the group `config.objective`; its field `name` selects an entry of OBJECTIVES.

    Returns:
      The objective, with its config checked and completed by defaults.

    Raises:
      ConfigError: for an unknown name or field.
    """
    # All other fields are checked by the class: each objective has its own DEFAULTS.
    name = choose(config.name, OBJECTIVES, 'config.objective.name')
    objective = OBJECTIVES[name]
    if issubclass(objective, MultiTask):
        # Its tasks are objectives in turn, and its file cannot import this one.
        return objective(config, build)
    return objective(config)
