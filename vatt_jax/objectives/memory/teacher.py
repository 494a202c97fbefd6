"""A teacher: a copy of the model, or of a part of it, that follows the student slowly (MoCo).

It is part of an objective's state under the name `teacher`: {'params', 'batch_stats'}. It has no
optimizer slots, lies on the mesh as the student does, and begins at the student when a run begins
(`Objective.begin`). An objective with heads of its own keeps a copy of these beside it and hands
both to `follow`.

MoCo shuffles keys over devices before its encoder, since a device's batch norm would otherwise tell
a query which keys come from its own device. Here batch norm takes its statistics over the global
batch, on any mesh, so no key stands out by its device and there is nothing to shuffle. That
queries and their keys are normalised by statistics of the same clips is left, as in MoCo on one
device; the teacher's statistics are those of its own features of other windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax


def create(model_params: Any, batch_stats: Any, patterns: Iterable[str] = ()) -> dict[str, Any]:
    """A teacher of these parameters.

    Args:
        model_params: the student's, boxed with logical axes or not.
        batch_stats: the model's.
        patterns: regular expressions of the parameter paths that the teacher has copies of, such as
            '^nets_video/'; (): of all. What it has no copy of it shares with the student.

    Returns:
        {'params', 'batch_stats'}.
    """
    return {'params': select(model_params, patterns), 'batch_stats': batch_stats}


def select(params: Any, patterns: Iterable[str]) -> Any:
    """The part of a tree whose paths match one of the regular expressions; all of it for ()."""
    patterns = tuple(patterns)
    if not patterns:
        return params
    chosen = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep='/').items():
        if any(re.search(pattern, path) for pattern in patterns):
            chosen[path] = leaf
    return flax.traverse_util.unflatten_dict(chosen, sep='/')


def begin(teacher: Mapping[str, Any], model_params: Any, batch_stats: Any) -> dict[str, Any]:
    """The teacher with the values that the student has now."""
    return {'params': _part_like(teacher['params'], model_params), 'batch_stats': batch_stats}


def variables(teacher: Mapping[str, Any], model_params: Any) -> dict[str, Any]:
    """What the model is applied with as the teacher: {'params', 'batch_stats'}.

    Args:
        teacher: the teacher.
        model_params: the student's, for what the teacher has no copy of.
    """
    params = _overlaid(model_params, teacher['params'])
    return {'params': params, 'batch_stats': teacher['batch_stats']}


def follow(copy: Any, student: Any, momentum: float | jax.Array) -> Any:
    """momentum · copy + (1 - momentum) · student, for every array of the copy.

    Args:
        copy: parameters of a teacher, a part of the student's tree.
        student: its parameters.
        momentum: how much of the copy stays.
    """

    def step(old: jax.Array, new: jax.Array) -> jax.Array:
        # In this form a copy that equals its student stays what it is, bit by bit.
        return old + (1 - momentum) * (new - old)

    return jax.tree.map(step, copy, _part_like(copy, student))


def _part_like(part: Any, whole: Any) -> Any:
    """The part of `whole` that has the names of `part`."""
    if not isinstance(part, Mapping):
        return whole
    return {name: _part_like(entry, whole[name]) for name, entry in part.items()}


def _overlaid(whole: Any, part: Any) -> Any:
    """`whole` with the arrays of `part` in the place of its own."""
    if not isinstance(part, Mapping):
        return part
    merged = dict(whole)
    for name, entry in part.items():
        merged[name] = _overlaid(whole[name], entry)
    return merged
