"""Pretraining of ViLBERT and UNITER on region features: what is hidden, and the losses.

objective.py is what run.py trains: one mechanism for both models (steps.py). The rest are pure
functions of arrays. A step of ViLBERT by itself:

    pairs = mismatched(pairs, record, 'words', rng)
    words, regions, told = vilbert_inputs(pairs, masking, rng)
    outputs = model.apply(variables, words, regions, rng, True)
    losses = vilbert_losses(outputs, told)

and of UNITER, with the task of the step or all of them:

    losses = uniter_losses(model, variables, pairs, record, task, masking, rng, True)
"""

from vatt_jax.objectives.region_pretraining.pairs import Pairs, Told, mismatched
from vatt_jax.objectives.region_pretraining.uniter import (
    ALL,
    COCO_SBU,
    GENOME_CC,
    TASKS,
    UniterLosses,
    task_of_step,
    uniter_inputs,
    uniter_losses,
    uniter_task_loss,
)
from vatt_jax.objectives.region_pretraining.vilbert import (
    VilbertLosses,
    vilbert_inputs,
    vilbert_losses,
)

__all__ = [
    'ALL',
    'COCO_SBU',
    'GENOME_CC',
    'TASKS',
    'Pairs',
    'Told',
    'UniterLosses',
    'VilbertLosses',
    'mismatched',
    'task_of_step',
    'uniter_inputs',
    'uniter_losses',
    'uniter_task_loss',
    'vilbert_inputs',
    'vilbert_losses',
]
