"""Which variable of open_flamingo's and ClipCap's checkpoints is which of ours.

Linear layers are (out, in) in both; keys and values are end to end in one matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vatt_jax.importers import language_layouts
from vatt_jax.importers.parameter_map import Entry, Path
from vatt_jax.models.media_language.new_parts import LANGUAGE

FUSED = ('key', 'value')
GATES = ('attention_gate', 'mlp_gate')
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}

# Our modules of a block -> theirs.
RESAMPLER_LAYER = {
    'media_norm': '0.norm_media',
    'attention_norm': '0.norm_latents',
    'query': '0.to_q',
    **dict.fromkeys(FUSED, '0.to_kv'),
    'out': '0.to_out',
    'mlp_norm': '1.0',
    'mlp_in': '1.1',
    'mlp_out': '1.3',
}
GATED_LAYER = {
    'attention_norm': 'attn.norm',
    'query': 'attn.to_q',
    **dict.fromkeys(FUSED, 'attn.to_kv'),
    'out': 'attn.to_out',
    'mlp_norm': 'ff.0',
    'mlp_in': 'ff.1',
    'mlp_out': 'ff.3',
    'attention_gate': 'attn_gate',
    'mlp_gate': 'ff_gate',
}
MAPPER_LAYER = {
    'attention_norm': 'norm1',
    'query': 'attn.to_queries',
    **dict.fromkeys(FUSED, 'attn.to_keys_values'),
    'out': 'attn.project',
    'mlp_norm': 'norm2',
    'mlp_in': 'mlp.fc1',
    'mlp_out': 'mlp.fc2',
}
RESAMPLER_TABLES = {
    'latents': 'latents',
    'frame_table': 'frame_embs',
    'media_table': 'media_time_embs',
}
# The two linear layers of the MLP mapper, with tanh between them; that of the Transformer.
MAPPER_LINEAR = {'mlp_in': 'model.0', 'mlp_out': 'model.2', 'linear': 'linear'}
# Prefixes of names.
RESAMPLER, MAPPER, GPT = 'perceiver.', 'clip_project.', 'gpt.'
GATED = 'lang_encoder.gated_cross_attn_layers.{}.'
NEW_ROWS = 'new rows of the word table'  # no variable of theirs, but a part of one


def flamingo(variables: Mapping[Path, Any], every: int) -> list[Entry]:
    """Every new variable of a FlamingoLM whose word table is tied, or which has no new words.

    Args:
        variables: our paths ('params', …) -> anything with a shape.
        every: n of the model.
    """
    entries = []
    for path, like in variables.items():
        shape = tuple(like.shape)
        if path[1] == 'gated_layers':
            for number in range(shape[0]):
                # Their list has an entry for every layer of the language model.
                prefix = GATED.format((number + 1) * every - 1)
                entries.append(_of_block(path, number, prefix, GATED_LAYER, path[2], shape[1:]))
        elif path[1] == 'new_rows':
            entries.append(_plain(path, NEW_ROWS, shape))
        else:
            entries.append(_of_resampler(path, shape))
    return entries


def clipcap(variables: Mapping[Path, Any]) -> list[Entry]:
    """Every variable of a ClipCap, the language model's of GPT-2's form among them.

    Args:
        variables: our paths ('params', …) -> anything with a shape.
    """
    language = {}
    entries = []
    for path, like in variables.items():
        if path[1] == LANGUAGE:
            language['params', *path[2:]] = like
        else:
            entries.append(_of_mapper(path, tuple(like.shape)))
    prefix = GPT + language_layouts.LAYOUTS['gpt2'].prefix
    for entry in language_layouts.layout('gpt2', language):
        ours = ('params', LANGUAGE, *entry.ours[1:])
        entries.append(dataclasses.replace(entry, ours=ours, theirs=prefix + entry.theirs))
    return entries


def _of_resampler(path: Path, shape: tuple[int, ...]) -> Entry:
    module = path[2]
    if module in RESAMPLER_TABLES:
        # Theirs has an axis for the tokens of a medium.
        theirs_shape = (shape[0], 1, shape[1]) if module == 'media_table' else shape
        return _plain(path, RESAMPLER + RESAMPLER_TABLES[module], theirs_shape)
    if module == 'final_norm':
        return _plain(path, f'{RESAMPLER}norm.{LEAVES[path[-1]]}', shape)
    kind, _, number = module.rpartition('_')
    part = 'media_norm' if kind == 'media_norms' else path[3]
    prefix = f'{RESAMPLER}layers.{number}.'
    return _of_block(path, None, prefix, RESAMPLER_LAYER, part, shape)


def _of_mapper(path: Path, shape: tuple[int, ...]) -> Entry:
    module = path[2]
    if module == 'constants':
        return _plain(path, f'{MAPPER}prefix_const', shape)
    if module in MAPPER_LINEAR:
        theirs = f'{MAPPER}{MAPPER_LINEAR[module]}.{LEAVES[path[-1]]}'
        return (
            _matrix(path, None, theirs, shape) if len(shape) == 2 else _plain(path, theirs, shape)
        )
    number = module.rpartition('_')[2]
    prefix = f'{MAPPER}transformer.layers.{number}.'
    return _of_block(path, None, prefix, MAPPER_LAYER, path[3], shape)


def _of_block(
    path: Path,
    layer: int | None,
    prefix: str,
    modules: Mapping[str, str],
    module: str,
    shape: tuple[int, ...],
) -> Entry:
    """A variable of a CrossBlock, or of the norm of its context."""
    theirs = prefix + modules[module]
    if module in GATES:
        return Entry(path, layer, theirs, (1,), ('',))
    leaf = path[-1]
    theirs = f'{theirs}.{LEAVES[leaf]}'
    if leaf != 'kernel':
        return Entry(path, layer, theirs, shape, ('',))
    # [in heads kv], [heads kv out] or [in out].
    num_inputs = 2 if module == 'out' else 1
    entry = _matrix(
        path, layer, theirs, (math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:]))
    )
    if module not in FUSED:
        return entry
    num_outputs, num_inputs = entry.shape
    both = (num_outputs * len(FUSED), num_inputs)
    return dataclasses.replace(entry, shape=both, part=(FUSED.index(module), len(FUSED)))


def _matrix(path: Path, layer: int | None, theirs: str, shape: tuple[int, ...]) -> Entry:
    """A matrix (in, out) of ours."""
    return Entry(path, layer, theirs, shape[::-1], ('', ''), order=(1, 0), axes=shape)


def _plain(path: Path, theirs: str, shape: tuple[int, ...]) -> Entry:
    return Entry(path, None, theirs, shape, ('',) * len(shape))
