"""Fields of the objective: what they mean, and what they may be."""

from __future__ import annotations

from typing import Any

from vatt_jax.config import LARGEST_COUNT, ConfigError, check_range, choose
from vatt_jax.inputs.batch import modality_of
from vatt_jax.objectives.region_pretraining import networks, steps
from vatt_jax.objectives.region_pretraining.pairs import SIDES
from vatt_jax.objectives.region_pretraining.uniter import (
    CLASSES,
    CONTRAST,
    DIVERGENCE,
    FEATURES,
    TASKS,
)

DEFAULTS = {
    'name': 'region_pretraining',
    # vilbert | uniter, and one of its presets: base | large | small | tiny
    # (models/vision_language/sizes.py).
    'model': 'vilbert',
    'size': 'base',
    'text': 'text',
    # The stream of pictures whose tower's map is cut into regions, a cell each; '': the regions of
    # the data (the entry `regions` of a batch).
    'picture': '',
    # Task -> its weight in the sum, or how often it is drawn. words | features, classes,
    # divergence, contrast (of masked regions) | match
    'tasks': {'words': 1.0, 'divergence': 1.0, 'match': 1.0},
    # sum: all tasks at every step (ViLBERT) | one: one a step, drawn (UNITER)
    'schedule': 'sum',
    # joint: words and regions of a pair are hidden at once (ViLBERT) | conditional: one of them
    'masking': 'joint',
    # Of words, and of regions, that are hidden; of hidden regions those that become zeros.
    'word_share': 0.15,
    'region_share': 0.15,
    'zero_share': 0.9,
    # At least one word, and one region (UNITER).
    'at_least_one': False,
    # What a mismatched pair has of another one: words (ViLBERT) | regions (UNITER).
    'replaced': 'words',
    # Of pairs that are mismatched.
    'mismatched': 0.5,
    # How many other pairs are looked at, of which the one is taken whose picture is most like the
    # own (hard negatives). 1: any.
    'candidates': 1,
    # Words and regions of mismatched pairs are not to be told.
    'matched_only': False,
    # The divergence is divided by the number of classes (UNITER as released).
    'mean_over_classes': False,
    # Weight of word-region alignment beside matching (UNITER: 0.1).
    'alignment': 0.0,
    # Rows of the word table. 0: as many as the tokenizer has numbers, and the marks that it lacks.
    'vocabulary': 0,
    # Numbers of [CLS], [SEP], [MASK] in the tokenizer (BERT's: 101, 102, 103); (): it has none.
    'special': (),
    # Smallest number of a proper word (BERT's uncased: 999, cased: 106).
    'first_word': 2,
}
# Tasks that need a detector's probabilities, and those that tell a feature.
OF_CLASSES, OF_FEATURES = {CLASSES, DIVERGENCE}, {FEATURES, CONTRAST}


def check(config: Any) -> None:
    """Raise ConfigError for values of `config.objective` that cannot work.

    Args:
        config: `config.objective`, with its defaults.
    """
    where = 'config.objective'
    presets = networks.PRESETS[choose(config.model, networks.PRESETS, f'{where}.model')]
    choose(config.size, presets, f'{where}.size')
    choose(config.schedule, steps.SCHEDULES, f'{where}.schedule')
    choose(config.masking, steps.MASKINGS, f'{where}.masking')
    choose(config.replaced, SIDES, f'{where}.replaced')
    for field in ('word_share', 'region_share', 'zero_share', 'mismatched'):
        check_range(config[field], 0, 1, f'{where}.{field}')
    check_range(config.candidates, 1, LARGEST_COUNT, f'{where}.candidates')
    for field in ('vocabulary', 'first_word'):
        check_range(config[field], 0, LARGEST_COUNT, f'{where}.{field}')
    check_range(config.alignment, 0, float('inf'), f'{where}.alignment')
    if modality_of(config.text) != 'text':
        raise ConfigError(f'{where}.text: expected text or a view of it, got {config.text!r}')
    tasks = config.tasks
    for name, weight in tasks.items():
        choose(name, TASKS, f'{where}.tasks')
        check_range(weight, 0, float('inf'), f'{where}.tasks.{name}')
    names = {name for name in tasks if tasks[name] > 0}
    if not names:
        raise ConfigError(f'{where}.tasks: expected a task of a positive weight, got {dict(tasks)}')
    if config.model == 'vilbert' and names & OF_CLASSES and names & OF_FEATURES:
        raise ConfigError(
            f'{where}.tasks: vilbert tells one thing of a region, classes or a feature, got '
            f'{", ".join(sorted(names & (OF_CLASSES | OF_FEATURES)))}'
        )
