"""Which variable of CLIP's and SigLIP's releases is which of ours, in each of four layouts.

    openai         OpenAI's state dict, which open_clip has too: queries, keys and values are one
                   matrix
    openai_resnet  the same with a ResNet
    hf_clip        Hugging Face's CLIPModel
    hf_siglip      Hugging Face's SiglipModel
    big_vision     SigLIP's checkpoints, {path joined by /: array}

A layout is a table of modules; `layout` makes the lines of one model out of it. Kernels of PyTorch
are (out, in), those of its convolutions (out, in, rows, columns); ours and big_vision's are (in,
out) and (rows, columns, in, out).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from vatt_jax.importers.parameter_map import Entry, Path

# Our modules of a layer that hold a kernel, by the order of PyTorch's fused projection.
FUSED = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        variables: our variable or module -> theirs; the leaf's name is added to a module's, which
            ends in `.` or `/`.
        layers: modality -> what the names of its layers begin with; {} is the number.
        layer_modules: our module of a layer -> theirs.
        leaves: our leaf -> theirs.
        is_torch: whether kernels lie as PyTorch's do.
        fused: our leaf -> theirs, of modules that hold queries, keys and values end to end. They
            are the modules of that name which `variables` or `layer_modules` has three times.
        tables: number of axes of length 1 before a table of positions.
        scalar: shape of what the objective learns.
    """

    variables: Mapping[str, str]
    layers: Mapping[str, str]
    layer_modules: Mapping[str, str]
    leaves: Mapping[str, str]
    is_torch: bool = True
    fused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tables: int = 0
    scalar: tuple[int, ...] = ()


TORCH_LEAVES = {'kernel': 'weight', 'bias': 'bias', 'scale': 'weight'}
HF_LAYER = {
    'attention_norm': 'layer_norm1.',
    'mlp_norm': 'layer_norm2.',
    **{name: f'self_attn.{name[0]}_proj.' for name in FUSED},
    'out': 'self_attn.out_proj.',
    'mlp_in': 'mlp.fc1.',
    'mlp_out': 'mlp.fc2.',
}
HF_LAYERS = {
    'video': 'vision_model.encoder.layers.{}.',
    'text': 'text_model.encoder.layers.{}.',
}
HF_MODULES = {
    'fronts_video/patch': 'vision_model.embeddings.patch_embedding.',
    'fronts_video/position_table': 'vision_model.embeddings.position_embedding.weight',
    'encoders_video/final_norm': 'vision_model.post_layernorm.',
    'fronts_text/word_table': 'text_model.embeddings.token_embedding.weight',
    'fronts_text/position_table': 'text_model.embeddings.position_embedding.weight',
    'encoders_text/final_norm': 'text_model.final_layer_norm.',
}
FLAX_ATTENTION = 'MultiHeadDotProductAttention_0'
OPENAI_TEXT = {
    'fronts_text/word_table': 'token_embedding.weight',
    'fronts_text/position_table': 'positional_embedding',
    'encoders_text/final_norm': 'ln_final.',
    'head/text_vt/kernel': 'text_projection',
    'log_scale': 'logit_scale',
}
OPENAI_LAYERS = {
    'video': 'visual.transformer.resblocks.{}.',
    'text': 'transformer.resblocks.{}.',
}
OPENAI_LAYER = {
    'attention_norm': 'ln_1.',
    'mlp_norm': 'ln_2.',
    **{name: 'attn.' for name in FUSED},
    'out': 'attn.out_proj.',
    'mlp_in': 'mlp.c_fc.',
    'mlp_out': 'mlp.c_proj.',
}
IN_PROJECTION = {'kernel': 'in_proj_weight', 'bias': 'in_proj_bias'}
LAYOUTS: dict[str, Layout] = {
    'openai': Layout(
        variables={
            'fronts_video/patch': 'visual.conv1.',
            'fronts_video/class_token': 'visual.class_embedding',
            'fronts_video/position_table': 'visual.positional_embedding',
            'fronts_video/norm': 'visual.ln_pre.',
            'encoders_video/final_norm': 'visual.ln_post.',
            'head/video_vt/kernel': 'visual.proj',
            **OPENAI_TEXT,
        },
        layers=OPENAI_LAYERS,
        layer_modules=OPENAI_LAYER,
        leaves=TORCH_LEAVES,
        fused=IN_PROJECTION,
    ),
    'openai_resnet': Layout(
        variables={
            'nets_video/pool/position_table': 'visual.attnpool.positional_embedding',
            'nets_video/pool/query': 'visual.attnpool.q_proj.',
            'nets_video/pool/key': 'visual.attnpool.k_proj.',
            'nets_video/pool/value': 'visual.attnpool.v_proj.',
            'head/video_vt': 'visual.attnpool.c_proj.',
            **OPENAI_TEXT,
        },
        layers=OPENAI_LAYERS,
        layer_modules=OPENAI_LAYER,
        leaves={**TORCH_LEAVES, 'mean': 'running_mean', 'var': 'running_var'},
        fused=IN_PROJECTION,
    ),
    'hf_clip': Layout(
        variables={
            **HF_MODULES,
            'fronts_video/class_token': 'vision_model.embeddings.class_embedding',
            # Their spelling.
            'fronts_video/norm': 'vision_model.pre_layrnorm.',
            'head/video_vt': 'visual_projection.',
            'head/text_vt': 'text_projection.',
            'log_scale': 'logit_scale',
        },
        layers=HF_LAYERS,
        layer_modules=HF_LAYER,
        leaves=TORCH_LEAVES,
    ),
    'hf_siglip': Layout(
        variables={
            **HF_MODULES,
            'pools_video/probe': 'vision_model.head.probe',
            **{f'pools_video/{name}': 'vision_model.head.attention.' for name in FUSED},
            'pools_video/out': 'vision_model.head.attention.out_proj.',
            'pools_video/norm': 'vision_model.head.layernorm.',
            'pools_video/mlp_in': 'vision_model.head.mlp.fc1.',
            'pools_video/mlp_out': 'vision_model.head.mlp.fc2.',
            'head/text_vt': 'text_model.head.',
            'log_scale': 'logit_scale',
            'bias': 'logit_bias',
        },
        layers=HF_LAYERS,
        layer_modules=HF_LAYER,
        leaves=TORCH_LEAVES,
        scalar=(1,),
        fused=IN_PROJECTION,
    ),
    'big_vision': Layout(
        variables={
            'fronts_video/patch': 'params/img/embedding/',
            'fronts_video/position_table': 'params/img/pos_embedding',
            'encoders_video/final_norm': 'params/img/Transformer/encoder_norm/',
            'pools_video/probe': 'params/img/MAPHead_0/probe',
            **{
                f'pools_video/{name}': f'params/img/MAPHead_0/{FLAX_ATTENTION}/{name}/'
                for name in (*FUSED, 'out')
            },
            'pools_video/norm': 'params/img/MAPHead_0/LayerNorm_0/',
            'pools_video/mlp_in': 'params/img/MAPHead_0/MlpBlock_0/Dense_0/',
            'pools_video/mlp_out': 'params/img/MAPHead_0/MlpBlock_0/Dense_1/',
            'fronts_text/word_table': 'params/txt/Embed_0/embedding',
            'fronts_text/position_table': 'params/txt/pos_embedding',
            'encoders_text/final_norm': 'params/txt/Encoder_0/encoder_norm/',
            'head/text_vt': 'params/txt/head/',
            'log_scale': 'params/t',
            'bias': 'params/b',
        },
        layers={
            'video': 'params/img/Transformer/encoderblock_{}/',
            'text': 'params/txt/Encoder_0/encoderblock_{}/',
        },
        layer_modules={
            'attention_norm': 'LayerNorm_0/',
            'mlp_norm': 'LayerNorm_1/',
            **{name: f'{FLAX_ATTENTION}/{name}/' for name in (*FUSED, 'out')},
            'mlp_in': 'MlpBlock_0/Dense_0/',
            'mlp_out': 'MlpBlock_0/Dense_1/',
        },
        leaves={'kernel': 'kernel', 'bias': 'bias', 'scale': 'scale'},
        is_torch=False,
        tables=1,
        scalar=(1,),
    ),
}
# Our convolutions of a block of a ResNet -> number of theirs.
CONVOLUTIONS = {'reduce': 1, 'spatial': 2, 'expand': 3}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What no shape of ours says.

    Attributes:
        patch: side of a patch in pixels; 0 of a ResNet.
        heads: of the attention that pools pictures.
    """

    patch: int
    heads: int


def layout(name: str, variables: Mapping[Path, Any], sizes: Sizes) -> list[Entry]:
    """Every variable of ours that a layout has.

    Args:
        name: key of LAYOUTS.
        variables: our paths -> anything with a shape.
        sizes: of the model.
    """
    table = LAYOUTS[name]
    entries: list[Entry] = []
    for path, like in variables.items():
        shape = tuple(like.shape)
        if path[2:3] == ('layers',):
            # Layers are stacked along the first axis.
            for layer in range(shape[0]):
                entries.append(_layer_entry(table, path, layer, shape[1:]))
            continue
        entry = _entry(table, path, shape, sizes)
        if entry is not None:
            entries.append(entry)
    return entries


def _layer_entry(table: Layout, path: Path, layer: int, shape: tuple[int, ...]) -> Entry:
    """A variable of one layer of a transformer."""
    _, encoder, _, module, leaf = path
    begin = table.layers[encoder.removeprefix('encoders_')].format(layer)
    theirs = begin + table.layer_modules[module]
    # [in heads kv], [heads kv out] or [in out].
    num_inputs = 2 if module == 'out' else 1
    is_fused = list(table.layer_modules.values()).count(table.layer_modules[module]) > 1
    return _dense_entry(table, path, layer, theirs, module if is_fused else '', shape, num_inputs)


def _entry(table: Layout, path: Path, shape: tuple[int, ...], sizes: Sizes) -> Entry | None:
    """A variable that belongs to no layer of a transformer; None where the layout lacks it."""
    ours, leaf = '/'.join(path[1:]), path[-1]
    if path[0] == 'objective' and ours in table.variables:
        return _plain(path, table.variables[ours], table.scalar)
    if ours in table.variables:
        ones = (1,) * (table.tables if leaf == 'position_table' else 0)
        if leaf == 'probe':
            ones = (1,)
        return _plain(path, table.variables[ours], (*ones, *shape))
    module = '/'.join(path[1:-1])
    theirs = table.variables.get(module) or _resnet_module(module)
    if theirs is None:
        return None
    name = theirs + table.leaves[leaf]
    if leaf == 'kernel' and module == 'fronts_video/patch':
        return _convolution(table, path, name, (sizes.patch, sizes.patch, 3, shape[1]))
    if leaf == 'kernel' and len(shape) == 4:
        return _convolution(table, path, name, shape)
    if module.startswith('pools_video/') and not table.is_torch:
        return _plain(path, name, _by_heads(path, shape, sizes.heads))
    is_fused = list(table.variables.values()).count(theirs) > 1
    return _dense_entry(table, path, None, theirs, path[-2] if is_fused else '', shape, 1)


def _dense_entry(
    table: Layout,
    path: Path,
    layer: int | None,
    theirs: str,
    fused: str,
    shape: tuple[int, ...],
    num_inputs: int,
) -> Entry:
    """A kernel, bias or scale of a dense layer or of a norm.

    Args:
        table: the layout.
        path: our variable.
        layer: its row of ours, where layers are stacked.
        theirs: their module.
        fused: our module, where theirs holds queries, keys and values end to end; else ''.
        shape: of our variable, of one layer.
        num_inputs: axes of a kernel that are its input.
    """
    leaf = path[-1]
    if not table.is_torch:
        return Entry(path, layer, theirs + table.leaves[leaf], shape, _fields(path, shape))
    axes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    their_shape: tuple[int, ...] = (math.prod(shape),)
    if leaf == 'kernel':
        axes = (math.prod(shape[:num_inputs]), math.prod(shape[num_inputs:]))
        order = (1, 0)
        their_shape = (axes[1], axes[0])
    if not fused:
        name = theirs + table.leaves[leaf]
        fields = _fields(path, their_shape)
        return Entry(path, layer, name, their_shape, fields, order, axes)
    part = (FUSED.index(fused), len(FUSED))
    their_shape = (their_shape[0] * len(FUSED), *their_shape[1:])
    name = theirs + table.fused[leaf]
    return Entry(path, layer, name, their_shape, _fields(path, their_shape), order, axes, part)


def _convolution(table: Layout, path: Path, name: str, axes: tuple[int, ...]) -> Entry:
    """A kernel (rows, columns, in, out)."""
    if not table.is_torch:
        return _plain(path, name, axes)
    order = (3, 2, 0, 1)
    shape = tuple(axes[axis] for axis in order)
    return Entry(path, None, name, shape, _fields(path, shape), order, axes)


def _plain(path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    """A variable that differs by a reshape alone."""
    return Entry(path, None, name, shape, _fields(path, shape))


def _by_heads(path: Path, shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """The shape of big_vision's variable of the attention that pools pictures."""
    if path[-2] in FUSED:
        return (*shape[:-1], heads, shape[-1] // heads)
    if path[-2] == 'out' and path[-1] == 'kernel':
        return (heads, shape[0] // heads, shape[1])
    return shape


def _resnet_module(module: str) -> str | None:
    """OpenAI's name of a convolution or norm of a ResNet, with the point behind it."""
    stem = re.fullmatch(r'nets_video/stem_(\d)/(conv|norm)', module)
    if stem is not None:
        number, kind = stem.groups()
        return f'visual.{"conv" if kind == "conv" else "bn"}{number}.'
    block = re.fullmatch(r'nets_video/group_(\d)_block_(\d+)/(\w+)/(conv|norm)', module)
    if block is None:
        return None
    group, number, convolution, kind = block.groups()
    begin = f'visual.layer{group}.{number}.'
    if convolution == 'short':
        return f'{begin}downsample.{"0" if kind == "conv" else "1"}.'
    return f'{begin}{"conv" if kind == "conv" else "bn"}{CONVOLUTIONS[convolution]}.'


def _fields(path: Path, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The config field behind each dimension of theirs, where one can be named."""
    if len(shape) == 0 or path[0] == 'objective':
        return ('',) * len(shape)
    modality = path[1].rsplit('_', 1)[-1]
    if path[1] == 'head':
        return ('model.head.vt',) * len(shape)
    tower = f'model.towers.{modality}'
    if path[-1] == 'position_table':
        return ('',) * (len(shape) - 2) + (f'{tower}.positions', f'{tower}.width')
    if path[-1] == 'word_table':
        return (f'{tower}.vocab', f'{tower}.width')
    size = 'features' if path[1] == 'nets_video' else 'width'
    if path[-2] in ('mlp_in', 'mlp_out'):
        size = 'mlp'
    return (f'{tower}.{size}',) * len(shape)
