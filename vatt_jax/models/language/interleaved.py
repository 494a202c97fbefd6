"""Layers of another model between those of a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (tokens, (parameters, number, memory) of a layer) -> (tokens, memory)
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """One layer before the last of every n layers of a decoder: before layers n-1, 2n-1, … from 0.

    Layers of the decoder behind the last whole n have none.

    Attributes:
        inputs: parameters, and what else each of them reads, [layers // n …].
        every: n.
        apply: (tokens [B N D], entry of `inputs`) -> tokens [B N D].
    """

    inputs: Any
    every: int
    apply: Callable[[jax.Array, Any], jax.Array]

    def scan(
        self,
        step: Step,
        x: jax.Array,
        layers: Any,
        unroll: bool,
    ) -> tuple[jax.Array, Any]:
        """Apply all layers, group by group.

        Args:
            step: applies one layer of the decoder.
            x: tokens [B N D].
            layers: what the decoder's layers are given, [layers …].
            unroll: whether no loop is compiled.

        Returns:
            What `lax.scan` of the decoder's layers alone returns.
        """
        num_layers = len(jax.tree.leaves(layers)[0])
        num_groups = num_layers // self.every
        num_grouped = num_groups * self.every

        def in_groups(leaf: jax.Array) -> jax.Array:
            return leaf[:num_grouped].reshape(num_groups, self.every, *leaf.shape[1:])

        def run_group(x: jax.Array, group: Any) -> tuple[jax.Array, Any]:
            layers, inputs = group
            x, memory = jax.lax.scan(step, x, _rows(layers, 0, self.every - 1), unroll=unroll)
            x = self.apply(x, inputs)
            x, last = jax.lax.scan(step, x, _rows(layers, self.every - 1, None), unroll=unroll)
            return x, _joined(memory, last)

        groups = (jax.tree.map(in_groups, layers), self.inputs)
        x, memory = jax.lax.scan(run_group, x, groups, unroll=unroll)
        memory = jax.tree.map(lambda leaf: leaf.reshape(num_grouped, *leaf.shape[2:]), memory)
        x, rest = jax.lax.scan(step, x, _rows(layers, num_grouped, None), unroll=unroll)
        return x, _joined(memory, rest)


def _rows(tree: Any, start: int, stop: int | None) -> Any:
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)
