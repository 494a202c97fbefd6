"""Heads on pooled features that several objectives train: small, shared by views of a modality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import modality_of
from vatt_jax.models.layers import BatchNorm
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng


class Head(nn.Module):
    """SeLaVi's head: dropout, linear, batch norm, relu, dropout, linear.

    With `hidden` 0 it is dropout and the last layer alone. Initial values are uniform, at most
    1/sqrt(fan in), as in the published code.

    Attributes:
      outputs: width O of the last layer.
      hidden: width W of the hidden layer; 0: none.
      dropout: rate before each layer.
      bias: whether the last layer has one.
    """

    outputs: int
    hidden: int = 0
    dropout: float = 0.0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Any, valid: Any, rng: Rng, train: bool) -> tuple[jax.Array, jax.Array]:
        """Apply the head.

        Args:
          x: features [B D].
          valid: bool [B], the rows that batch statistics count.
          rng: random bits of these rows.
          train: whether dropout and the batch's own statistics are used.

        Returns:
          (hidden [B W], outputs [B O]), float32. Without a hidden layer, `hidden` is what came in.
        """
        # PyTorch's default for nn.Linear: variance_scaling draws from ±sqrt(3 · scale / fan_in),
        # which is ±1/sqrt(fan_in) for a scale of 1/3.
        kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
        rate = self.dropout if train else 0.0
        # Heads are small, and their logits feed a softmax: float32 even where towers are bfloat16.
        x = x.astype(jnp.float32)
        if self.hidden:
            # No bias: batch norm would subtract it again.
            hidden_kernel = self.param(
                'hidden',
                logical(kernel_init, 'embed', None),
                (x.shape[-1], self.hidden),
                jnp.float32,
            )
            x = rng.at('in').dropout(x, rate) @ hidden_kernel
            x = jax.nn.relu(BatchNorm(name='norm')(x, valid, train))  # [B W]

        width = x.shape[-1]
        # The axis of classes can be sharded, as there may be thousands.
        kernel = self.param(
            'kernel', logical(kernel_init, 'embed', 'classes'), (width, self.outputs), jnp.float32
        )
        outputs = rng.at('out').dropout(x, rate) @ kernel  # [B O]
        if not self.bias:
            return x, outputs

        # PyTorch draws the bias from the same interval as the kernel.
        bound = width**-0.5

        def bias_init(key: Any, shape: Any, dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        bias = self.param('bias', logical(bias_init, 'classes'), (self.outputs,), jnp.float32)
        return x, outputs + bias


def init(head: Head, key: jax.Array, width: int) -> tuple[Any, Any]:
    """(parameters, batch statistics, {} if none) for features of this width."""
    # One dummy row: only shapes matter, and random bits depend on `key` alone.
    variables = head.init(
        key,
        jnp.zeros((1, width)),
        jnp.ones(1, bool),
        Rng.create(0, 0, jnp.zeros(1, jnp.uint32)),
        False,
    )
    return variables['params'], variables.get('batch_stats', {})


def apply(
    head: Head,
    params: Any,
    stats: Any,
    pooled: Mapping[str, Any],
    valid: Mapping[str, Any],
    rng: Rng,
    train: bool,
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], Any]:
    """Apply one head to the views of one modality: one pass, one set of batch statistics.

    Args:
      head: the module.
      params: its parameters.
      stats: its batch statistics.
      pooled: view -> features [B D].
      valid: view -> bool [B].
      rng: random bits of the batch's examples.
      train: see `Head`.

    Returns:
      ({view: (hidden [B W], outputs [B O])}, new batch statistics).
    """
    views = list(pooled)
    num_rows = len(pooled[views[0]])
    # Side by side, so that batch norm normalises all views of a modality by the same statistics.
    features = jnp.concatenate([pooled[view] for view in views])  # [V·B D]
    is_valid = jnp.concatenate([valid[view] for view in views])  # [V·B]
    if len(views) > 1:
        # Rows of one example in two views need different bits, so each view renames its examples.
        examples = jnp.concatenate([rng.at(view).bits(()) for view in views])
        rng = dataclasses.replace(rng, examples=examples)

    (hidden, outputs), updates = head.apply(
        {'params': params, 'batch_stats': stats},
        features,
        is_valid,
        rng,
        train,
        mutable=['batch_stats'],
    )
    results = {}
    for i, view in enumerate(views):
        rows = slice(i * num_rows, (i + 1) * num_rows)
        results[view] = (hidden[rows], outputs[rows])
    # A linear head has no batch norm, so `updates` is empty.
    return results, updates.get('batch_stats', stats)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """x scaled to length 1 along `axis`, with a finite gradient at zero."""
    squared_length = jnp.sum(x * x, axis, keepdims=True)
    # The maximum is inside the root: the derivative of a square root at 0 is infinite. 1e-12 is the
    # square of the smallest length, 1e-6.
    return x * jax.lax.rsqrt(jnp.maximum(squared_length, 1e-12))


def by_modality(views: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """modality -> its views, in the order given."""
    groups: dict[str, tuple[str, ...]] = {}
    for view in views:
        modality = modality_of(view)
        groups[modality] = groups.get(modality, ()) + (view,)
    return groups


def width_of(spec: Any, view: str) -> int:
    """Width D of the view's pooled feature.

    Raises:
      ConfigError: for text, of which a clip has several candidates.
    """
    shape = spec.outputs.encoded[view].pooled.shape
    if len(shape) != 2:
        raise ConfigError(
            f'config.objective.views: expected views with one feature per clip, got {view!r} with '
            f'{shape[1]} candidates for each clip. Leave it out of views.'
        )
    return shape[-1]


def label_dtype(classes: int) -> np.dtype:
    """The smallest type that holds a class number, or -1 for none.

    A label of a hundred million records takes as much memory as its type makes it take.
    """
    # The smallest one that holds -classes goes at least up to classes - 1.
    return np.min_scalar_type(-classes)
