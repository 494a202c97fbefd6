"""UNITER (Chen et al. 2020): one task a step, which hides one side of a pair and not the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.inputs import masking
from vatt_jax.inputs.masking import WordMasking
from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.losses import masked_regions
from vatt_jax.losses.arguments import AnyArray
from vatt_jax.losses.word_region import word_region_alignment
from vatt_jax.models.vision_language import Uniter, UniterOutputs
from vatt_jax.objectives.region_pretraining.pairs import (
    Pairs,
    Told,
    hide,
    match_loss,
    mismatched,
    needed_classes,
)
from vatt_jax.rng import Rng

# Masked words; features, best class and all classes of masked regions; matching.
WORDS, FEATURES, CLASSES, DIVERGENCE, MATCH = 'words', 'features', 'classes', 'divergence', 'match'
# Which one of the batch's regions a masked one was: a third loss of ViLBERT's, not UNITER's.
CONTRAST = 'contrast'
TASKS = (WORDS, FEATURES, CLASSES, DIVERGENCE, CONTRAST, MATCH)
# In the place of a task: several, summed.
ALL = 'all'
# How often each is drawn, by the data that it is drawn for.
COCO_SBU = {MATCH: 6, WORDS: 8, FEATURES: 4, DIVERGENCE: 4}
GENOME_CC = {MATCH: 9, WORDS: 12, FEATURES: 6, DIVERGENCE: 6}
# UNITER's weight of word-region alignment beside matching.
ALIGNMENT = 0.1


@dataclasses.dataclass(frozen=True)
class UniterLosses:
    """How UNITER's losses are taken.

    Attributes:
        mean_over_classes: divide the divergence by the number of classes, as the released trainer
            does.
        alignment: weight of word-region alignment beside matching; 0: it is left out.
        tasks: those that ALL sums.

    Raises:
        ConfigError: a field is wrong.
    """

    mean_over_classes: bool = True
    alignment: float = ALIGNMENT
    tasks: tuple[str, ...] = tuple(COCO_SBU)

    def __post_init__(self) -> None:
        check_range(self.alignment, 0, float('inf'), 'alignment')
        for task in self.tasks:
            choose(task, TASKS, 'tasks')


def task_of_step(step: int, seed: int, mix: Mapping[str, float]) -> str:
    """The task of a step, drawn by its share: a function of seed and step alone.

    Args:
        step: of the optimizer.
        seed: config.seed.
        mix: {task: how often}, such as COCO_SBU.

    Raises:
        ConfigError: there is no such task, or none with a positive share.
    """
    for task, share in mix.items():
        choose(task, TASKS, 'mix')
        check_range(share, 0, float('inf'), f'mix.{task}')
    total = sum(mix.values())
    if not total > 0:
        raise ConfigError(f'mix: expected a task with a positive share, got {dict(mix)}')
    shares = np.array(list(mix.values())) / total
    drawn = np.random.default_rng((seed, step)).choice(len(shares), p=shares)
    return list(mix)[drawn]


def uniter_inputs(
    pairs: Pairs,
    task: str,
    words: WordMasking,
    rng: Rng,
    *,
    regions: masking.RegionMasking = masking.UNITER_REGIONS,
) -> tuple[Words, Regions, Told]:
    """Hide what the task is about; the other side stays whole.

    Args:
        pairs: as they are; for MATCH some of them `mismatched`.
        task: entry of TASKS.
        words: how words are hidden; UNITER hides at least one.
        rng: of the batch.
        regions: how regions are hidden.

    Returns:
        What the model reads, and what it is to tell.

    Raises:
        ConfigError: there is no such task.
    """
    choose(task, TASKS, 'task')
    nobody = jnp.zeros(rng.examples.shape, bool)
    of_words = ~nobody if task == WORDS else nobody
    of_regions = nobody if task in (WORDS, MATCH) else ~nobody
    return hide(pairs, words, regions, rng, of_words, of_regions)


def uniter_task_loss(
    outputs: UniterOutputs,
    words: Words,
    regions: Regions,
    told: Told,
    task: str,
    options: UniterLosses | None = None,
) -> Array:
    """The loss of one task.

    Args:
        outputs: of the model for `words` and `regions`.
        words: of `uniter_inputs`.
        regions: likewise.
        told: likewise.
        task: entry of TASKS.
        options: how losses are taken; None: as released.

    Raises:
        ConfigError: there is no such task, or it needs probabilities of classes and there are none.
    """
    choose(task, TASKS, 'task')
    options = options or UniterLosses()
    is_masked = told.is_masked_region
    if task == WORDS:
        return masked_regions.class_cross_entropy(
            outputs.word_logits, told.words, told.is_masked_word
        )
    if task == FEATURES:
        return masked_regions.feature_regression(outputs.region_features, told.features, is_masked)
    if task == CLASSES:
        classes = masked_regions.best_classes(needed_classes(told.classes))
        return masked_regions.class_cross_entropy(outputs.region_logits, classes, is_masked)
    if task == CONTRAST:
        return masked_regions.region_nce(
            outputs.region_features, told.features, is_masked, told.is_region
        )
    if task == DIVERGENCE:
        return masked_regions.class_divergence(
            outputs.region_logits,
            needed_classes(told.classes),
            is_masked,
            mean_over_classes=options.mean_over_classes,
        )
    # Label 1 is a pair that matches.
    loss = match_loss(outputs.match_logits, told.is_match, told.valid)
    if not options.alignment:
        return loss
    encoded = outputs.encoded
    return loss + options.alignment * word_region_alignment(
        encoded.words,
        encoded.regions,
        told.is_match,
        words.mask,
        regions.mask,
        valid=told.valid,
    )


def uniter_losses(
    model: Uniter,
    variables: Mapping[str, Any],
    pairs: Pairs,
    record: Int[AnyArray, ' B'],
    task: str,
    masking_of_words: WordMasking,
    rng: Rng,
    train: bool,
    options: UniterLosses | None = None,
) -> dict[str, Array]:
    """A step of UNITER: inputs, model and loss of a task, or of all, each with a pass of its own.

    Args:
        model: UNITER.
        variables: of it.
        pairs: that all match.
        record: see `mismatched`.
        task: entry of TASKS, static under jit; or ALL.
        masking_of_words: how words are hidden.
        rng: of the batch.
        train: whether dropout is on.
        options: how losses are taken; None: as released.

    Returns:
        {'loss': the sum, and the loss of each task}.
    """
    options = options or UniterLosses()
    losses = {}
    for name in options.tasks if task == ALL else (task,):
        task_rng = rng.at(name)
        given = pairs
        if name == MATCH:
            given = mismatched(pairs, record, 'regions', task_rng)
        words, regions, told = uniter_inputs(given, name, masking_of_words, task_rng)
        outputs: Any = model.apply(variables, words, regions, task_rng, train)
        losses[name] = uniter_task_loss(outputs, words, regions, told, name, options)
    return {'loss': sum(losses.values(), jnp.zeros(())), **losses}
