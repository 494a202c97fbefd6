"""Floating-point operations, counted from what a program traces to.

A matrix product of [m k] and [k n] counts 2·m·n·k, a convolution likewise. Elementwise work is not
counted, as usual in an MFU.

The compiler's own count is wrong under a scan, whose body it counts once. Here a scan counts as
often as it runs, the body of a `shard_map` once for each device, and a Pallas kernel once for each
step of its grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr

from vatt_jax.inputs.batch import modality_of
from vatt_jax.objectives.base import Objective
from vatt_jax.rng import Rng


@dataclasses.dataclass
class Count:
    """A number of FLOPs.

    Attributes:
      flops: Of all devices together.
      unknown: What was counted once although it may run more often: loops without a fixed number of
        iterations.
    """

    flops: float = 0.0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Count) -> Count:
        # A dict rather than a set removes repeats: it keeps their order.
        unknown = tuple(dict.fromkeys(self.unknown + other.unknown))
        return Count(self.flops + other.flops, unknown)

    def times(self, factor: float) -> Count:
        return Count(self.flops * factor, self.unknown)


def count_call(function: Callable[..., Any], *args: Any) -> Count:
    """Count one call of a function; the arguments may be abstract."""
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def count(jaxpr: Jaxpr) -> Count:
    """Count one evaluation of a jaxpr, on all devices together."""
    total = Count()
    for eqn in jaxpr.eqns:
        # An operation without a rule is elementwise, or holds the jaxpr of what it calls (jit,
        # remat, custom_vjp).
        rule = RULES.get(eqn.primitive.name, inner)
        total += rule(eqn)
    return total


def inner(eqn: Any) -> Count:
    """Count the jaxprs that an equation holds, each once."""
    total = Count()
    for value in eqn.params.values():
        parts = value if isinstance(value, (tuple, list)) else (value,)
        for part in parts:
            # A ClosedJaxpr holds its Jaxpr in an attribute; some primitives have a Jaxpr itself.
            jaxpr: Any = getattr(part, 'jaxpr', part)
            if hasattr(jaxpr, 'eqns'):
                total += count(jaxpr)
    return total


# ---- Rules: of one equation of a jaxpr. `invars` and `outvars` are its operands and results.


def _dot_general(eqn: Any) -> Count:
    (contracted, _), _ = eqn.params['dimension_numbers']
    lhs_shape = eqn.invars[0].aval.shape
    depth = math.prod(lhs_shape[axis] for axis in contracted)
    # The output has the batch dimensions and both free ones; each element is a sum over `depth`.
    return Count(2.0 * math.prod(eqn.outvars[0].aval.shape) * depth)


def _convolution(eqn: Any) -> Count:
    kernel_shape = eqn.invars[1].aval.shape
    output_size = math.prod(eqn.outvars[0].aval.shape)
    # One output element sums over the kernel's taps and its input features. In a grouped
    # convolution the kernel has the input features of one group only, so this holds there as well.
    out_features = kernel_shape[eqn.params['dimension_numbers'].rhs_spec[0]]
    # Gradients of strided convolutions spread their input with zeros. Taps on these do not count.
    dilation = math.prod(eqn.params['lhs_dilation'])
    return Count(2.0 * output_size * math.prod(kernel_shape) / out_features / dilation)


def _scan(eqn: Any) -> Count:
    return inner(eqn).times(eqn.params['length'])


def _while(eqn: Any) -> Count:
    body = inner(eqn)
    # A loop without products changes no count, however often it runs.
    if not body.flops:
        return body
    return Count(body.flops, (*body.unknown, 'while loop'))


def _cond(eqn: Any) -> Count:
    # Which branch runs is known only at run time: the most expensive one.
    branches = [count(branch.jaxpr) for branch in eqn.params['branches']]
    return max(branches, key=lambda branch: branch.flops)


def _shard_map(eqn: Any) -> Count:
    # Shapes inside are those of one device.
    return inner(eqn).times(eqn.params['mesh'].size)


def _pallas(eqn: Any) -> Count:
    # The jaxpr is that of one grid step. Dimensions of the grid can be dynamic: these count once.
    grid = eqn.params['grid_mapping'].grid
    return inner(eqn).times(math.prod(size for size in grid if isinstance(size, int)))


def _fused_attention(products: int) -> Callable[[Any], Count]:
    """Rule of a kernel with `products` matrix products of N × M × d for each head."""

    def rule(eqn: Any) -> Count:
        batch, num_queries, heads, width = eqn.invars[0].aval.shape  # q [B N heads d]
        num_keys = eqn.invars[1].aval.shape[1]  # k [B M heads d]
        return Count(2.0 * products * batch * heads * num_queries * num_keys * width)

    return rule


RULES: dict[str, Callable[[Any], Count]] = {
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
    'scan': _scan,
    'while': _while,
    'cond': _cond,
    'shard_map': _shard_map,
    'pallas_call': _pallas,
    # cuDNN's attention. Forward: q·kᵀ and p·v.
    'dot_product_attention_fwd': _fused_attention(2),
    # Backward: q·kᵀ once more, since p is not stored, and the gradients of p, q, k and v.
    'dot_product_attention_bwd': _fused_attention(5),
}


# ---- Models


def by_tower(model: Any, variables: Any, batch: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Count the forward pass of one clip in training, DropToken included.

    Args:
      model: The Flax module.
      variables: Abstract variables of it.
      batch: Abstract batch after the device stage.

    Returns:
      FLOPs by stream, of the 'fusion' where streams meet, and of the 'heads', each with
        'needed': what the pooled output takes; in the last layer these are the keys and values of
          all tokens, and the rest for the aggregate token only, unless streams meet.
        'all_tokens': every token through every layer, as published counts have it.
    """
    num_clips = batch['index'].shape[0]
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros((num_clips,), jnp.uint32)))
    flops: dict[str, dict[str, float]] = {}
    encoded: dict[str, Any] = {}
    is_fused = bool(model.config.get('fusion'))
    for name, stream in batch.items():
        # Beside streams a batch has columns such as 'index'.
        if not isinstance(stream, Mapping) or 'data' not in stream:
            continue
        # A stream that only a frozen model reads is not counted: nothing of it is trained.
        if modality_of(name) not in model.config['towers']:
            continue
        all_tokens, _ = _encode(model, variables, name, stream, rng, features=True)
        needed, encoded[name] = _encode(model, variables, name, stream, rng, features=is_fused)
        flops[name] = {
            'all_tokens': all_tokens.flops / num_clips,
            'needed': needed.flops / num_clips,
        }

    valid = {name: batch[name]['valid'] for name in encoded}
    if is_fused:
        fusion, encoded = _interact(model, variables, encoded, valid, rng)
        flops['fusion'] = dict.fromkeys(('all_tokens', 'needed'), fusion.flops / num_clips)

    def project(variables: Any, encoded: Any, valid: Any) -> Any:
        # With `mutable`, `apply` returns (output, updated collections).
        projected, _ = model.apply(
            variables, encoded, valid=valid, train=True, method='project', mutable=['batch_stats']
        )
        return projected

    heads = count_call(project, variables, encoded, valid).flops / num_clips
    flops['heads'] = {'needed': heads, 'all_tokens': heads}
    return flops


def _encode(
    model: Any, variables: Any, name: str, stream: Mapping[str, Any], rng: Any, *, features: bool
) -> tuple[Count, Any]:
    """Count `model.encode` of one stream, and give the abstract value of its result.

    Args:
      model: The Flax module.
      variables: Abstract variables of it.
      name: Of the stream.
      stream: Its part of the abstract batch.
      rng: Abstract.
      features: Whether the features of all tokens are asked for, so that none is cut from the last
        layer.
    """

    def encode(variables: Any, stream: Any, rng: Any) -> Any:
        encoded, _ = model.apply(
            variables,
            name,
            stream,
            train=True,
            rng=rng,
            features=features,
            method='encode',
            # Batch norm updates its running statistics in training.
            mutable=['batch_stats'],
        )
        return encoded

    jaxpr, encoded = jax.make_jaxpr(encode, return_shape=True)(variables, stream, rng)
    return count(jaxpr.jaxpr), encoded


def _interact(
    model: Any, variables: Any, encoded: Mapping[str, Any], valid: Mapping[str, Any], rng: Any
) -> tuple[Count, Any]:
    """Count `model.interact`, and give the abstract value of its result."""

    def interact(variables: Any, encoded: Any, valid: Any, rng: Any) -> Any:
        return model.apply(variables, encoded, valid=valid, train=True, rng=rng, method='interact')

    jaxpr, fused = jax.make_jaxpr(interact, return_shape=True)(variables, encoded, valid, rng)
    return count(jaxpr.jaxpr), fused


def of_own_network(model: Any, objective: Any, state: Any, batch: Mapping[str, Any]) -> float:
    """Count the forward pass of one clip through a network of the objective's own.

    Args:
      model: The Flax module.
      objective: What is being learnt.
      state: Abstract TrainState.
      batch: Abstract batch after the device stage.

    Returns:
      FLOPs of its layers, without heads; 0 where it has no such network (`Objective.own_pass`).
    """
    if type(objective).own_pass is Objective.own_pass:
        return 0.0
    num_clips = batch['index'].shape[0]
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros((num_clips,), jnp.uint32)))
    variables, params = state.variables(), state.params['objective']

    def encode(variables: Any, params: Any, objective_state: Any, batch: Any, rng: Any) -> Any:
        return objective.encode(model, variables, params, objective_state, batch, rng).pooled

    # The towers, whose outputs these are, are counted by themselves.
    pooled = jax.eval_shape(encode, variables, params, state.objective, dict(batch), rng)
    return count_call(objective.own_pass, params, pooled, dict(batch), rng).flops / num_clips


def per_clip(config: Any, inputs: Mapping[str, Any], objective: Any, state: Any) -> float:
    """Count what one clip needs in a training step.

    Args:
      config: Resolved.
      inputs: Abstract batch after the device stage.
      objective: What is being learnt.
      state: Abstract TrainState.

    Returns:
      FLOPs.
    """
    from ml_collections import ConfigDict

    from vatt_jax import models

    # Attention kernels compute padding too, which the model does not need.
    dense_config = ConfigDict(config.model.to_dict() | {'attention': 'dense'})
    model = models.build(dense_config, config.compute_dtype)

    def two_clips(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)

    # The count of one clip is the same at any batch size.
    batch = jax.tree.map(two_clips, dict(inputs))
    counts = by_tower(model, state.variables(), batch)
    own = of_own_network(model, objective, state, batch)
    return model_flops({**counts, 'objective': dict.fromkeys(('needed', 'all_tokens'), own)})


def model_flops(counts: Mapping[str, Mapping[str, float]], kind: str = 'needed') -> float:
    """FLOPs of one clip in a training step: forward, and twice as much backward.

    Args:
      counts: Of `towers`.
      kind: 'needed' or 'all_tokens'.
    """
    # The backward pass has two products for each one forward: the gradients of both factors.
    return 3.0 * sum(part[kind] for part in counts.values())
