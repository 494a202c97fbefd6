"""One training step of either model: which tasks it has, what is hidden for them, their losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vatt_jax.inputs.masking import RegionMasking, WordMasking, corrupted_sides
from vatt_jax.inputs.regions import Regions, Words
from vatt_jax.models.vision_language import Uniter, Vilbert
from vatt_jax.objectives.region_pretraining.networks import as_read, as_uniter
from vatt_jax.objectives.region_pretraining.pairs import Pairs, Told, hide, mismatched
from vatt_jax.objectives.region_pretraining.uniter import (
    MATCH,
    WORDS,
    UniterLosses,
    uniter_task_loss,
)
from vatt_jax.rng import Rng

# All tasks of a step summed, or one a step.
SUM, ONE = 'sum', 'one'
SCHEDULES = (SUM, ONE)
# Both sides of a pair are hidden at once, or one of them.
JOINT, CONDITIONAL = 'joint', 'conditional'
MASKINGS = (JOINT, CONDITIONAL)


@dataclasses.dataclass(frozen=True)
class Steps:
    """What the steps of a run are.

    Attributes:
        tasks: entries of uniter.TASKS.
        weights: of each task in the sum, or how often it is drawn.
        schedule: entry of SCHEDULES.
        masking: entry of MASKINGS.
        words: how words are hidden.
        regions: how regions are hidden.
        side: what a mismatched pair has of another one, entry of pairs.SIDES.
        share: of pairs that are mismatched.
        candidates: see `mismatched`.
        matched_only: words and regions of mismatched pairs are not to be told.
        losses: how losses are taken.
    """

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    schedule: str
    masking: str
    words: WordMasking
    regions: RegionMasking
    side: str
    share: float
    candidates: int
    matched_only: bool
    losses: UniterLosses


def drawn_task(steps: Steps, rng: Rng) -> Int[Array, '']:
    """The task of a step, its place in `steps.tasks`: the same for all examples."""
    # The upper 24 bits are exact in float32.
    drawn = (rng.at('task').shared_bits(()) >> 8).astype(jnp.float32) / (1 << 24)
    edges = jnp.cumsum(jnp.array(steps.weights, jnp.float32))
    return jnp.sum(drawn * edges[-1] >= edges[:-1]).astype(jnp.int32)


def hidden_sides(
    steps: Steps, task: Int[Array, ''] | None, rng: Rng
) -> tuple[Bool[Array, ' B'], Bool[Array, ' B']]:
    """Pairs whose words, and pairs whose regions, are hidden.

    Args:
        steps: of the run.
        task: of the step; None: all of them.
        rng: of the batch.
    """
    everyone = jnp.ones(rng.examples.shape, bool)
    if task is None:
        tells_words = WORDS in steps.tasks
        tells_regions = bool(set(steps.tasks) - {WORDS, MATCH})
        if not (tells_words and tells_regions):
            return everyone & tells_words, everyone & tells_regions
        return corrupted_sides(steps.masking, rng)
    tells = {name: task == number for number, name in enumerate(steps.tasks)}
    is_words = everyone & tells.get(WORDS, False)
    # Matching is of whole pairs.
    is_masked = everyone & ~(everyone & tells.get(MATCH, False))
    if steps.masking == JOINT:
        return is_masked, is_masked
    return is_words, is_masked & ~is_words


def inputs(
    steps: Steps,
    module: Vilbert | Uniter,
    pairs: Pairs,
    record: Int[Array, ' B'],
    task: Int[Array, ''] | None,
    rng: Rng,
) -> tuple[Words, Regions, Told]:
    """What the model reads in a step, and what it is to tell.

    Args:
        steps: of the run.
        module: the network.
        pairs: that all match.
        record: of which picture each is.
        task: of the step; None: all of them.
        rng: of the batch.
    """
    if MATCH in steps.tasks:
        is_matching = task is None or task == steps.tasks.index(MATCH)
        share = jnp.where(is_matching, steps.share, 0.0)
        pairs = mismatched(pairs, record, steps.side, rng, share, steps.candidates)
    of_words, of_regions = hidden_sides(steps, task, rng)
    words, seen, told = hide(pairs, steps.words, steps.regions, rng, of_words, of_regions)
    if steps.matched_only:
        told = dataclasses.replace(
            told,
            is_masked_word=told.is_masked_word & told.is_match[:, None],
            is_masked_region=told.is_masked_region & told.is_match[:, None],
        )
    return words, *as_read(module, seen, told)


def losses(
    steps: Steps,
    module: Vilbert | Uniter,
    params: Any,
    read: tuple[Words, Regions, Told],
    task: Int[Array, ''] | None,
    rng: Rng,
) -> tuple[Float[Array, ''], dict[str, Array], dict[str, Array]]:
    """The loss of a step, and of each task.

    One pass through the layers, whatever the tasks; a task that is not drawn costs nothing.

    Args:
        steps: of the run.
        module: the network.
        params: of it.
        read: of `inputs`.
        task: likewise.
        rng: of the batch.

    Returns:
        (loss, loss by task, accuracy by task: 0 of tasks that have none). With a task alone the
        others are 0.
    """
    words, regions, told = read
    variables = {'params': params}
    encoded: Any = module.apply(variables, words, regions, rng, True, method='encode')

    def of_task(name: str, encoded: Any) -> tuple[Array, Array]:
        told_by: Any = module.apply(variables, encoded, method='tell')
        outputs: Any = as_uniter(told_by)
        loss = uniter_task_loss(outputs, words, regions, told, name, steps.losses)
        return loss.astype(jnp.float32), accuracy(outputs, told, name)

    if task is None:
        found = {name: of_task(name, encoded) for name in steps.tasks}
        by_task = {name: loss for name, (loss, _) in found.items()}
        total = sum(
            (weight * by_task[name] for name, weight in zip(steps.tasks, steps.weights)),
            jnp.zeros(()),
        )
        return total, by_task, {name: right for name, (_, right) in found.items()}

    # Heads of the drawn task alone are computed.
    branches = [functools.partial(of_task, name) for name in steps.tasks]
    loss, right = jax.lax.switch(task, branches, encoded)
    is_drawn = {name: task == number for number, name in enumerate(steps.tasks)}
    by_task = {name: jnp.where(drawn, loss, 0) for name, drawn in is_drawn.items()}
    return loss, by_task, {name: jnp.where(drawn, right, 0) for name, drawn in is_drawn.items()}


def accuracy(outputs: Any, told: Told, task: str) -> Float[Array, '']:
    """Share of masked words, or of pairs, that are told right; 0 of other tasks.

    Args:
        outputs: as UNITER has them.
        told: what is to be told.
        task: entry of uniter.TASKS.
    """
    if task == WORDS:
        is_right = outputs.word_logits.argmax(-1) == told.words
        counts = told.is_masked_word
    elif task == MATCH:
        is_right = (outputs.match_logits.argmax(-1) > 0) == told.is_match
        counts = told.valid
    else:
        return jnp.zeros(())
    num_right = jnp.sum(is_right & counts, dtype=jnp.float32)
    return num_right / jnp.maximum(jnp.sum(counts), 1)


def latest(old: Mapping[str, Array], new: Mapping[str, Array], task: Array) -> dict[str, Array]:
    """Numbers by task: that of the task of this step is new, others are those of earlier steps.

    Args:
        old: task -> number.
        new: likewise, in the order of the tasks.
        task: of the step.
    """
    found = {}
    for number, (name, value) in enumerate(new.items()):
        found[name] = jnp.where(task == number, value, old[name])
    return found
