"""Common spaces: which modality projects into which space, through what. A graph is a table, not code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, choose
from vatt_jax.models.layers import BatchNorm, Dense


@dataclasses.dataclass(frozen=True)
class Graph:
    """paths: modality -> steps in order, from the pooled vector of its tower. A step:

    ('dense' | 'dense_bias', name, space whose width it has), ('bn', name), ('relu',);
    ('emit', space): the value so far is the modality's embedding in that space;
    ('pooled',): begin anew at the tower's vector;
    ('evaluation',): what follows is left out in training.
    Equal names are the same parameters. norm, init: entries of layers.NORMS and layers.INITS, for all of them.
    """

    paths: Mapping[str, tuple]
    norm: str = 'plain'
    init: str = 'glorot'

    def spaces(self) -> list[str]:
        return list(
            dict.fromkeys(s[1] for steps in self.paths.values() for s in steps if s[0] == 'emit')
        )


def mlp(name: str, space: str) -> tuple:
    """MMV's head of video: two layers, batch norm after each, ReLU between."""
    return (
        ('dense_bias', f'{name}_hidden', space),
        ('bn', f'{name}_hidden_norm'),
        ('relu',),
        ('dense', name, space),
        ('bn', f'{name}_norm'),
        ('emit', space),
    )


def linear(name: str, space: str) -> tuple:
    return (('dense_bias', name, space), ('emit', space))


def fine_and_coarse(between: tuple) -> Graph:
    """MMV's FAC: from the fine space on, one map to the coarse one for video and audio. Its batch norm sees video alone in training, so the path of
    audio goes on in evaluation only."""
    coarse = (
        *between,
        ('dense_bias', 'va_to_vat', 'vat'),
        ('bn', 'va_to_vat_norm'),
        ('emit', 'vat'),
    )
    return Graph(
        {
            'video': (*mlp('video_va', 'va'), *coarse),
            'audio': (*linear('audio_va', 'va'), ('evaluation',), *coarse),
            'text': linear('text_vat', 'vat'),
        },
        'debiased',
        'fan_in',
    )


GRAPHS = {
    # VATT's fine and coarse: video-audio fine, video-text coarse on top of it (paper, section 3.4; official `fac` head).
    'fac': Graph(
        {
            'video': (
                ('dense', 'video_hidden', 'va'),
                ('bn', 'video_va_pre_norm'),
                ('relu',),
                ('dense', 'video_va', 'va'),
                ('bn', 'video_va_norm'),
                ('emit', 'va'),
                ('relu',),
                ('dense', 'video_vat', 'vat'),
                ('bn', 'video_vat_norm'),
                ('emit', 'vat'),
            ),
            'audio': linear('audio_va', 'va'),
            'text': linear('text_vat', 'vat'),
        }
    ),
    # one space for all (official `joint` head)
    'joint': Graph(
        {
            m: (('relu',), ('dense', f'{m}_joint', 'joint'), ('bn', f'{m}_norm'), ('emit', 'joint'))
            for m in ('video', 'audio', 'text')
        }
    ),
    # MMV's (paper, section 3.1). Shared: one space for all. Disjoint: a space for each pair, with heads of its own.
    'mmv_shared': Graph(
        {
            'video': mlp('video_joint', 'joint'),
            'audio': linear('audio_joint', 'joint'),
            'text': linear('text_joint', 'joint'),
        },
        'debiased',
        'fan_in',
    ),
    'mmv_disjoint': Graph(
        {
            'video': (*mlp('video_va', 'va'), ('pooled',), *mlp('video_vt', 'vt')),
            'audio': (*linear('audio_va', 'va'), ('pooled',), *linear('audio_at', 'at')),
            'text': (*linear('text_vt', 'vt'), ('pooled',), *linear('text_at', 'at')),
        },
        'debiased',
        'fan_in',
    ),
    # Between the fine and the coarse space: nothing, ReLU (released), batch norm and ReLU.
    'mmv_fac': fine_and_coarse(()),
    'mmv_fac_relu': fine_and_coarse((('relu',),)),
    'mmv_fac_bnrelu': fine_and_coarse((('bn', 'va_norm'), ('relu',))),
    # encoders alone (fine-tuning)
    'none': Graph({}),
}


class CommonSpaces(nn.Module):
    """config: {'name': entry of GRAPHS, <space>: width, …}; a space without a width is left out, with all that leads to it alone."""

    config: Mapping[str, Any]

    @nn.compact
    def __call__(self, pooled, valid, train: bool):
        """{stream: [B(,K) D]}, {stream: bool [B]} -> {space: {stream: float32 [B(,K) E]}}, un-normalised.

        Streams of one modality share parameters and, in training, batch statistics of one pass over all of them.
        """
        graph = GRAPHS[choose(self.config['name'], GRAPHS, 'config.model.head.name')]
        layers: dict[str, nn.Module] = {}
        spaces: dict[str, dict] = {}

        def layer(make, name):
            if name not in layers:
                layers[name] = make(name=name)
            return layers[name]

        for modality, steps in paths(graph, self.config).items():
            names = [s for s in pooled if s.split('.')[0] == modality]
            if not names:
                continue
            # all views in one pass: one set of batch statistics, one update of the running ones
            lead = [pooled[s].shape[:-1] for s in names]
            rows = [
                jnp.broadcast_to(valid[s].reshape(valid[s].shape + (1,) * (len(l) - 1)), l).reshape(
                    -1
                )
                for s, l in zip(names, lead)
            ]
            start = x = jnp.concatenate([pooled[s].reshape(-1, pooled[s].shape[-1]) for s in names])
            weight = jnp.concatenate(rows)
            for kind, *rest in steps:
                if kind in ('dense', 'dense_bias'):
                    x = layer(
                        lambda name: Dense(
                            self.config[rest[1]],
                            ('hidden', None),
                            bias=kind == 'dense_bias',
                            init=graph.init,  # noqa: B023
                            name=name,
                        ),
                        rest[0],
                    )(x)
                elif kind == 'bn':
                    x = layer(lambda name: BatchNorm(graph.norm, name=name), rest[0])(
                        x, weight, train
                    )
                elif kind == 'relu':
                    x = jax.nn.relu(x)
                elif kind == 'pooled':
                    x = start
                elif kind == 'evaluation':
                    if train:
                        break
                else:
                    begin = 0
                    for s, l, r in zip(names, lead, rows):
                        spaces.setdefault(rest[0], {})[s] = (
                            x[begin : begin + len(r)].reshape(*l, -1).astype(jnp.float32)
                        )
                        begin += len(r)
        return spaces


def paths(graph: Graph, config: Mapping[str, Any]) -> dict[str, list]:
    """The graph's paths without what leads to no space that has a width: modality -> steps. Raises ConfigError for other fields than spaces,
    for none, and where a space is reached through one that has no width."""
    known = graph.spaces()
    for field, width in (
        config.items() if known else ()
    ):  # without spaces, widths left over from another graph mean nothing
        if field != 'name' and (field not in known or not isinstance(width, int) or width < 1):
            raise ConfigError(
                f'config.model.head.{field}={width!r}: the graph {config["name"]!r} has the spaces {", ".join(known)}; '
                'give those that are wanted a positive width'
            )
    if known and not any(s in config for s in known):
        raise ConfigError(
            f'config.model.head has no width for any space of the graph {config["name"]!r}; it has {", ".join(known)}'
        )
    out = {}
    for modality, steps in graph.paths.items():
        branches: list[list] = [[]]
        for step in steps:
            branches.append([step]) if step[0] == 'pooled' else branches[-1].append(step)
        wanted = lambda step: step[0] != 'emit' or step[1] in config
        ends = [
            max((i + 1 for i, s in enumerate(b) if s[0] == 'emit' and wanted(s)), default=0)
            for b in branches
        ]
        out[modality] = [s for b, end in zip(branches, ends) for s in b[:end] if wanted(s)]
        for step in out[modality]:
            if step[0].startswith('dense') and step[2] not in config:
                raise ConfigError(
                    f'config.model.head.{step[2]} is missing: {modality} reaches other spaces of {config["name"]!r} through that one'
                )
    return out
