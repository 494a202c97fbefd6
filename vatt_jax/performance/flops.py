"""Floating-point operations, counted from what a program traces to: 2·m·n·k of every matrix product and convolution.

The compiler's own count is wrong under a scan, whose body it counts once. Here a scan counts as often as it runs, a `shard_map` body once
for each device, a Pallas kernel once for each step of its grid. Elementwise work is not counted, as usual in an MFU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax.rng import Rng


@dataclasses.dataclass
class Count:
    """flops: float. unknown: what was counted once although it may run more often (loops without a fixed number of turns)."""

    flops: float = 0.0
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, tuple(dict.fromkeys(self.unknown + other.unknown)))

    def times(self, n: float) -> Count:
        return Count(self.flops * n, self.unknown)


def of(function: Callable[..., Any], *args: Any) -> Count:
    """Of one call of `function`; the arguments may be abstract."""
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def count(jaxpr) -> Count:
    """Of one evaluation of a jaxpr, on all devices together."""
    total = Count()
    for eqn in jaxpr.eqns:
        rule = RULES.get(eqn.primitive.name)
        total += rule(eqn) if rule else inner(eqn)
    return total


def inner(eqn) -> Count:
    """The jaxprs an equation holds, each once."""
    total = Count()
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, 'jaxpr', part)
            if hasattr(part, 'eqns'):
                total += count(part)
    return total


def _dot_general(eqn) -> Count:
    (contracted, _), _ = eqn.params['dimension_numbers']
    depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return Count(2.0 * math.prod(eqn.outvars[0].aval.shape) * depth)


def _convolution(eqn) -> Count:
    """Taps on the zeros that a dilated input is spread with (gradients of strided convolutions) do not count."""
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
    spread = math.prod(eqn.params['lhs_dilation'])
    return Count(
        2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / out_features / spread
    )


def _scan(eqn) -> Count:
    return inner(eqn).times(eqn.params['length'])


def _while(eqn) -> Count:
    body = inner(eqn)
    return Count(body.flops, (*body.unknown, 'while loop')) if body.flops else body


def _cond(eqn) -> Count:
    return max((count(b.jaxpr) for b in eqn.params['branches']), key=lambda c: c.flops)


def _shard_map(eqn) -> Count:
    return inner(eqn).times(eqn.params['mesh'].size)


def _pallas(eqn) -> Count:
    return inner(eqn).times(
        math.prod(n for n in eqn.params['grid_mapping'].grid if isinstance(n, int))
    )


def _fused_attention(products: int):
    """q [B N heads d], k [B M heads d]: `products` matrix products of N × M × d for each head."""

    def rule(eqn) -> Count:
        (b, n, heads, d), m = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        return Count(2.0 * products * b * heads * n * m * d)

    return rule


RULES = {
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
    'scan': _scan,
    'while': _while,
    'cond': _cond,
    'shard_map': _shard_map,
    'pallas_call': _pallas,
    'dot_product_attention_fwd': _fused_attention(2),
    'dot_product_attention_bwd': _fused_attention(5),
}


def towers(model, variables: Any, batch: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{stream: {'needed': …, 'all_tokens': …}, 'heads': {…}}: FLOPs of one clip's forward pass in training (DropToken included).

    needed: what the pooled output takes; in the last layer keys and values of all tokens and the rest for the aggregate token.
    all_tokens: every token through every layer, as published counts have it. variables, batch: abstract (the batch after the device stage).
    """
    rows = batch['index'].shape[0]
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros((rows,), jnp.uint32)))
    out, encoded = {}, {}
    for name, stream in batch.items():
        if not (isinstance(stream, Mapping) and 'data' in stream):
            continue

        out[name] = {}
        for kind, features in (('all_tokens', True), ('needed', False)):

            def encode(variables, stream, rng, name=name, features=features):
                return model.apply(
                    variables,
                    name,
                    stream,
                    train=True,
                    rng=rng,
                    features=features,
                    method='encode',
                    mutable=['batch_stats'],
                )[0]

            jaxpr, encoded[name] = jax.make_jaxpr(encode, return_shape=True)(variables, stream, rng)
            out[name][kind] = count(jaxpr.jaxpr).flops / rows
    valid = {name: batch[name]['valid'] for name in encoded}
    heads = of(
        lambda v, e, ok: model.apply(
            v, e, valid=ok, train=True, method='project', mutable=['batch_stats']
        )[0],
        variables,
        encoded,
        valid,
    )
    out['heads'] = dict.fromkeys(('needed', 'all_tokens'), heads.flops / rows)
    return out


def per_clip(config, inputs, variables) -> float:
    """FLOPs that one clip needs in a training step. config: resolved; inputs: abstract batch after the device stage; variables: abstract."""
    from ml_collections import ConfigDict

    from vatt_jax import models

    plain = models.build(
        ConfigDict(config.model.to_dict() | {'attention': 'dense'}), config.compute_dtype
    )  # kernels compute padding too
    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), dict(inputs))
    return model_flops(towers(plain, variables, two))


def model_flops(counts: Mapping[str, Mapping[str, float]], kind: str = 'needed') -> float:
    """FLOPs of one clip in a training step: forward, and twice as much backward. `counts`: of `towers`."""
    return 3.0 * sum(c[kind] for c in counts.values())
