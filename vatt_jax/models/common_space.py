"""Common spaces: which modality projects into which space, through what. A graph is a table, not code."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import choose
from vatt_jax.models.layers import BatchNorm, Dense

# graph -> modality -> steps in order. A step: ('dense' | 'dense_bias', name, space whose width it has),
# ('bn', name), ('relu',), or ('emit', space): the value so far is the modality's embedding in that space.
GRAPHS = {
    # VATT's fine and coarse: video-audio fine, video-text coarse on top of it (paper, section 3.4; official `fac` head).
    'fac': {
        'video': (('dense', 'hidden', 'va'), ('bn', 'va_pre_norm'), ('relu',), ('dense', 'va', 'va'), ('bn', 'va_norm'), ('emit', 'va'),
                  ('relu',), ('dense', 'vat', 'vat'), ('bn', 'vat_norm'), ('emit', 'vat')),
        'audio': (('dense_bias', 'va', 'va'), ('emit', 'va')),
        'text': (('dense_bias', 'vat', 'vat'), ('emit', 'vat')),
    },
    # one space for all (official `joint` head)
    'joint': {m: (('relu',), ('dense', 'joint', 'joint'), ('bn', 'norm'), ('emit', 'joint')) for m in ('video', 'audio', 'text')},
    # encoders alone (fine-tuning)
    'none': {},
}


class CommonSpaces(nn.Module):
    """config: {'name': entry of GRAPHS, <space>: width, …}."""
    config: Mapping[str, Any]

    @nn.compact
    def __call__(self, pooled, valid, train: bool):
        """{stream: [B(,K) D]}, {stream: bool [B]} -> {space: {stream: float32 [B(,K) E]}}, un-normalised.

        Streams of one modality share parameters and, in training, batch statistics of one pass over all of them.
        """
        graph = GRAPHS[choose(self.config['name'], GRAPHS, 'config.model.head.name')]
        spaces: dict[str, dict] = {}
        for modality, steps in graph.items():
            names = [s for s in pooled if s.split('.')[0] == modality]
            if not names:
                continue
            # all views in one pass: one set of batch statistics, one update of the running ones
            lead = [pooled[s].shape[:-1] for s in names]
            rows = [jnp.broadcast_to(valid[s].reshape(valid[s].shape + (1,) * (len(l) - 1)), l).reshape(-1) for s, l in zip(names, lead)]
            x = jnp.concatenate([pooled[s].reshape(-1, pooled[s].shape[-1]) for s in names])
            weight = jnp.concatenate(rows)
            for kind, *rest in steps:
                if kind in ('dense', 'dense_bias'):
                    x = Dense(self.config[rest[1]], ('hidden', None), bias=kind == 'dense_bias', name=f'{modality}_{rest[0]}')(x)
                elif kind == 'bn':
                    x = BatchNorm(name=f'{modality}_{rest[0]}')(x, weight, train)
                elif kind == 'relu':
                    x = jax.nn.relu(x)
                else:
                    begin = 0
                    for s, l, r in zip(names, lead, rows):
                        spaces.setdefault(rest[0], {})[s] = x[begin:begin + len(r)].reshape(*l, -1).astype(jnp.float32)
                        begin += len(r)
        return spaces
