"""Layers in which streams meet, between the towers and what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError
from vatt_jax.models.fusion.blocks import BlockOptions
from vatt_jax.models.fusion.layer import SELF, SINGLE, FusionLayer, part_of
from vatt_jax.models.layers import Dense, LayerNorm
from vatt_jax.rng import Rng

WHERE = 'config.model.fusion'


class FusionStack(nn.Module):
    """Layers of one or several attention types over sequences, and a final norm if pre_norm.

    Attributes:
        streams: names of the streams that meet.
        types: entry of layer.TYPES, of each layer.
        options: of all blocks.
        query: see `layer.sources`.
        passive: see `layer.sources`.
        width: that every stream is projected to first; 0: each keeps its own.
        remat: entry of transformer.REMAT, what the backward pass computes again.
    """

    streams: tuple[str, ...]
    types: tuple[str, ...]
    options: BlockOptions
    query: str = ''
    passive: str = SELF
    width: int = 0
    remat: str = 'none'

    @nn.compact
    def __call__(
        self,
        x: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        rng: Rng,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Let sequences attend to each other.

        Args:
            x: {stream: [B N D]}.
            masks: {stream: bool [B N]}, the tokens that may be attended to.
            rng: of the batch.
            train: whether dropout is on.

        Returns:
            {stream: [B N D]}.
        """
        dtype = self.options.dtype
        sequences = {name: jnp.asarray(tokens, dtype) for name, tokens in x.items()}
        if self.width:
            sequences = {name: self._widen(name, tokens) for name, tokens in sequences.items()}
        if SINGLE in self.types:
            check_widths(sequences)
        layer = self._layer_class()
        # Unrolled: fusion stacks are shallow, and their layers may be of different types.
        for number, kind in enumerate(self.types):
            sequences = layer(
                kind=kind,
                streams=self.streams,
                options=self.options,
                query=self.query,
                passive=self.passive,
                name=f'layer_{number}',
            )(sequences, masks, rng.at(number), train)
        if not self.options.pre_norm:
            return sequences
        # Pre-LN leaves the plain sum of all residuals.
        return self._normed(sequences)

    def _normed(self, sequences: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Sequences after a final norm, which streams share if they share the last layer."""
        norms: dict[str, LayerNorm] = {}
        normed = {}
        for name, tokens in sequences.items():
            part = part_of(self.types[-1], name)
            if part not in norms:
                norms[part] = LayerNorm(eps=self.options.eps, name=f'{part}_final_norm')
            normed[name] = norms[part](tokens)
        return normed

    def _widen(self, name: str, x: jax.Array) -> jax.Array:
        """The sequence of a stream in the width of all."""
        part = f'{part_of("", name)}_in'
        return Dense(self.width, (None, 'embed'), dtype=self.options.dtype, name=part)(x)

    def _layer_class(self) -> Any:
        """The layer, with what the backward pass is to compute again."""
        if self.remat == 'none':
            return FusionLayer
        policy = None
        if self.remat == 'dots':
            # As in transformer.Encoder: products with weights are saved, logits are not.
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # `train` decides what is traced; `self` is the argument 0.
        return nn.remat(FusionLayer, policy=policy, static_argnums=(4,))


class Fusion(nn.Module):
    """Encoded streams in, the same out, after a stack over their sequences.

    The sequence of a stream is its pooled vector and its tokens, those of all its sentences one
    after another. Streams that the stack does not name pass as they are.

    Attributes:
        stack: the layers.
    """

    stack: FusionStack

    def __call__(
        self,
        encoded: Mapping[str, Any],
        valid: Mapping[str, Any] | None,
        rng: Rng | None,
        train: bool,
    ) -> dict[str, Any]:
        """Let streams attend to each other.

        Args:
            encoded: {stream: multimodal.Encoded}, with tokens.
            valid: {stream: bool [B]}, the clips that have it; None: all.
            rng: of the batch; None where nothing is drawn.
            train: whether dropout is on.

        Raises:
            ValueError: there is no rng in training.
        """
        if rng is None and train:
            raise ValueError('interact(train=True): expected the rng of the batch, got None')
        x, masks = {}, {}
        for name in self.stack.streams:
            if name not in encoded:
                continue
            is_there = None if valid is None else valid.get(name)
            x[name], masks[name] = to_sequence(name, encoded[name], is_there)
        if not x:
            return dict(encoded)
        if rng is None:
            rng = Rng.create(0, 0, jnp.zeros(len(next(iter(x.values()))), jnp.uint32))
        fused = self.stack(x, masks, rng.at('fusion'), train)
        changed = {name: from_sequence(encoded[name], tokens) for name, tokens in fused.items()}
        return {**encoded, **changed}


def to_sequence(name: str, stream: Any, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """One stream as a sequence.

    Args:
        name: of the stream.
        stream: its Encoded, pooled [B D] or [B K D], tokens [B N D] or [B K L D].
        valid: bool [B], the clips that have it; None: all.

    Returns:
        (tokens [B 1+N D], or [B K·(1+L) D] of K sentences; which may be attended to, bool of the
        same axes).

    Raises:
        ConfigError: the tower pools another width than its tokens have.
    """
    pooled, tokens = stream.pooled, stream.tokens
    if pooled.shape[-1] != tokens.shape[-1]:
        raise ConfigError(
            f'{WHERE}.streams: expected towers whose pooled vector is as wide as their tokens, got '
            f'{pooled.shape[-1]} and {tokens.shape[-1]} of {name!r}; leave it out or choose '
            'another tower'
        )
    x = jnp.concatenate([pooled[..., None, :], tokens], axis=-2)
    is_key = jnp.ones(x.shape[:-1], bool)
    if stream.mask is not None:
        # A sentence of padding alone has a pooled vector, which says nothing.
        has_words = stream.mask.any(-1, keepdims=True)
        is_key = jnp.concatenate([has_words, stream.mask], axis=-1)
    batch_size, width = len(x), x.shape[-1]
    is_key = is_key.reshape(batch_size, -1)
    if valid is not None:
        is_key = is_key & valid[:, None]
    return x.reshape(batch_size, -1, width), is_key


def from_sequence(stream: Any, x: jax.Array) -> Any:
    """The Encoded of a stream with the sequence [B 1+N D] that `to_sequence` made of it."""
    *leading, num_tokens, _ = stream.tokens.shape
    x = x.reshape(*leading, 1 + num_tokens, x.shape[-1])
    return stream.replace(pooled=x[..., 0, :], tokens=x[..., 1:, :])


def check_widths(x: Mapping[str, jax.Array]) -> None:
    """Check that streams can share their weights.

    Raises:
        ConfigError: their widths differ.
    """
    widths = {name: tokens.shape[-1] for name, tokens in x.items()}
    if len(set(widths.values())) > 1:
        found = ', '.join(f'{name} {width}' for name, width in widths.items())
        raise ConfigError(
            f'{WHERE}.types: expected streams of one width for {SINGLE!r}, which shares all '
            f'weights, got {found}; set {WHERE}.width to project them to one'
        )
