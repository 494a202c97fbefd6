"""The attention types of Hendricks et al. (TACL 2021): whose keys each stream attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.models.fusion.blocks import BlockOptions, CrossBlock
from vatt_jax.rng import Rng

CO, MERGED, SPECIFIC, ASYMMETRIC, SINGLE = 'co', 'merged', 'specific', 'asymmetric', 'single'
TYPES = (CO, MERGED, SPECIFIC, ASYMMETRIC, SINGLE)
SELF, IDENTITY = 'self', 'identity'
# What the streams do that are not the querying one of an asymmetric layer.
PASSIVE = (SELF, IDENTITY)
# Name of the parameters that all streams of a single-stream layer share.
SHARED = 'shared'


def sources(
    kind: str, stream: str, streams: Sequence[str], query: str = '', passive: str = SELF
) -> tuple[str, ...]:
    """The streams whose keys and values a stream attends to; (): the layer leaves it as it is.

    Of three streams, `co` and `asymmetric` attend to both others at once (the paper has two).

    Args:
        kind: entry of TYPES.
        stream: the one that is updated.
        streams: all of them.
        query: the stream that attends to the others in an asymmetric layer.
        passive: entry of PASSIVE.
    """
    others = tuple(name for name in streams if name != stream)
    if kind in (MERGED, SINGLE):
        return tuple(streams)
    if kind == SPECIFIC:
        return (stream,)
    if kind == CO or stream == query:
        return others
    return (stream,) if passive == SELF else ()


def part_of(kind: str, stream: str) -> str:
    """Name of the parameters that a layer of this type has for a stream."""
    # Safetensors and PyTorch separate the parts of a path by dots.
    return SHARED if kind == SINGLE else stream.replace('.', '_')


class FusionLayer(nn.Module):
    """One layer over several streams.

    Each stream has its own norms, projections and feed-forward part (`CrossBlock`), of its own
    width; with the type `single` all share one. Keys and values are projected by the stream that
    they are of, and joined along the tokens where several are attended to.

    Attributes:
        kind: entry of TYPES.
        streams: names of all streams, also of those that a batch may lack.
        options: of the blocks.
        query: see `sources`.
        passive: see `sources`.
        mlps: (stream, hidden width of its feed-forward part) where it is not options.mlp
            (ViLBERT).
    """

    kind: str
    streams: tuple[str, ...]
    options: BlockOptions
    query: str = ''
    passive: str = SELF
    mlps: tuple[tuple[str, int], ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        rng: Rng,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Update the streams.

        Args:
            x: {stream: [B N D]}; one that is missing counts as masked.
            masks: {stream: bool [B N]}, its tokens that may be attended to.
            rng: of the layer.
            train: whether dropout is on.
        """
        blocks = self._blocks(x)
        normed = {name: blocks[name].normed(tokens) for name, tokens in x.items()}
        reads = {}
        for name in x:
            reads[name] = sources(self.kind, name, self.streams, self.query, self.passive)
        keys, values = {}, {}
        for name in x:
            # Projections that no stream reads would be parameters without a gradient.
            if any(name in read for read in reads.values()):
                keys[name], values[name] = blocks[name].keys_and_values(normed[name])

        updated = {}
        for name, tokens in x.items():
            if not reads[name]:
                updated[name] = tokens
                continue
            present = [source for source in reads[name] if source in x]
            key, value, mask = self._join(keys, values, masks, present, len(tokens))
            updated[name] = blocks[name].attend(
                tokens, normed[name], key, value, mask, rng.at(name), train
            )
        return updated

    def _blocks(self, x: Mapping[str, jax.Array]) -> dict[str, CrossBlock]:
        """The block of each stream, one and the same for all in a single-stream layer."""
        made: dict[str, CrossBlock] = {}
        blocks = {}
        mlps = dict(self.mlps)
        for name, tokens in x.items():
            part = part_of(self.kind, name)
            if part not in made:
                mlp = mlps.get(name, self.options.mlp)
                options = dataclasses.replace(self.options, mlp=mlp)
                made[part] = CrossBlock(tokens.shape[-1], options, name=part)
            blocks[name] = made[part]
        return blocks

    def _join(
        self,
        keys: Mapping[str, jax.Array],
        values: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        names: Sequence[str],
        batch_size: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(keys, values, mask) of some streams, end to end along the tokens."""
        if not names:
            # All that would be read is missing: one key, which is masked.
            shape = (batch_size, 1, self.options.heads, self.options.head_width)
            nothing = jnp.zeros(shape, self.options.dtype)
            return nothing, nothing, jnp.zeros((batch_size, 1), bool)
        key = jnp.concatenate([keys[name] for name in names], axis=1)
        value = jnp.concatenate([values[name] for name in names], axis=1)
        return key, value, jnp.concatenate([masks[name] for name in names], axis=1)
