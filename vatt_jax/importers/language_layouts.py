"""Which variable of a Hugging Face language model is which of ours.

    gpt2    GPT2LMHeadModel: matrices (in, out), queries, keys and values in one
    llama   LlamaForCausalLM, and Mistral's and Qwen2's, which have the same names: matrices
            (out, in)

Names are those of the files without their prefix.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vatt_jax.importers.parameter_map import Entry, Path

# Our modules of a layer that GPT-2 has end to end in one matrix, in its order.
FUSED = ('query', 'key', 'value')
LEAVES = {'kernel': 'weight', 'bias': 'bias', 'scale': 'weight'}
# The output matrix, which is (out, in) in every layout and stands outside of the prefix.
HEAD = 'lm_head.weight'
# What is no parameter: GPT-2's triangle of ones, Llama's frequencies.
BOOKKEEPING = re.compile(r'\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$')


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        prefix: of all names but HEAD; files of the model without its head lack it.
        variables: our variable or module -> theirs; modules end in a point.
        layer: what the names of a layer begin with; {} is its number.
        modules: our module of a layer -> theirs.
        transposed: whether matrices are (out, in).
    """

    prefix: str
    variables: Mapping[str, str]
    layer: str
    modules: Mapping[str, str]
    transposed: bool


LAYOUTS = {
    'gpt2': Layout(
        prefix='transformer.',
        variables={
            'word_table': 'wte.weight',
            'position_table': 'wpe.weight',
            'final_norm': 'ln_f.',
        },
        layer='h.{}.',
        modules={
            'attention_norm': 'ln_1.',
            **{name: 'attn.c_attn.' for name in FUSED},
            'out': 'attn.c_proj.',
            'mlp_norm': 'ln_2.',
            'mlp_in': 'mlp.c_fc.',
            'mlp_out': 'mlp.c_proj.',
        },
        transposed=False,
    ),
    'llama': Layout(
        prefix='model.',
        variables={'word_table': 'embed_tokens.weight', 'final_norm': 'norm.'},
        layer='layers.{}.',
        modules={
            'attention_norm': 'input_layernorm.',
            **{name: f'self_attn.{name[0]}_proj.' for name in FUSED},
            'out': 'self_attn.o_proj.',
            'mlp_norm': 'post_attention_layernorm.',
            'mlp_in': 'mlp.up_proj.',
            'mlp_gate': 'mlp.gate_proj.',
            'mlp_out': 'mlp.down_proj.',
        },
        transposed=True,
    ),
}


def layout(name: str, variables: Mapping[Path, Any]) -> list[Entry]:
    """Every variable of ours, with theirs, without the prefix.

    Args:
        name: key of LAYOUTS.
        variables: our paths ('params', …) -> anything with a shape.
    """
    table = LAYOUTS[name]
    entries: list[Entry] = []
    for path, like in variables.items():
        shape = tuple(like.shape)
        if path[1] == 'layers':
            # Layers are stacked along the first axis.
            for layer in range(shape[0]):
                entries.append(_layer_entry(table, path, layer, shape[1:]))
        else:
            entries.append(_entry(table, path, shape))
    return entries


def _entry(table: Layout, path: Path, shape: tuple[int, ...]) -> Entry:
    """A variable that belongs to no layer."""
    if path[1] == 'output':
        return _matrix(path, None, HEAD, shape, transposed=True)
    theirs = table.variables[path[1]]
    if theirs.endswith('.'):
        theirs += LEAVES[path[-1]]
    return Entry(path, None, theirs, shape, ('',) * len(shape))


def _layer_entry(table: Layout, path: Path, layer: int, shape: tuple[int, ...]) -> Entry:
    """A variable of one layer."""
    _, _, module, leaf = path
    theirs = table.layer.format(layer) + table.modules[module] + LEAVES[leaf]
    is_fused = module in FUSED and not table.transposed
    if leaf == 'kernel':
        # [in heads kv], [heads kv out] or [in out].
        num_inputs = 2 if module == 'out' else 1
        matrix = (math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:]))
        entry = _matrix(path, layer, theirs, matrix, table.transposed)
    else:
        entry = Entry(path, layer, theirs, (math.prod(shape),), ('',))
    return _part(entry, FUSED.index(module)) if is_fused else entry


def _matrix(
    path: Path, layer: int | None, theirs: str, shape: tuple[int, ...], transposed: bool
) -> Entry:
    """A matrix (in, out) of ours."""
    if not transposed:
        return Entry(path, layer, theirs, shape, ('', ''))
    return Entry(path, layer, theirs, shape[::-1], ('', ''), order=(1, 0), axes=shape)


def _part(entry: Entry, number: int) -> Entry:
    """One of the three that are end to end along the last axis."""
    *rest, length = entry.shape
    return dataclasses.replace(
        entry,
        shape=(*rest, length * len(FUSED)),
        part=(number, len(FUSED)),
        part_axis=len(rest),
    )
