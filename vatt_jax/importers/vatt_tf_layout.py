"""The variables of official VATT checkpoints: which parameter of ours each of them is.

Both layouts hold the same numbers: every variable of one is a reshape of a variable of the other,
or one layer of it (ours are stacked over layers). So a single table (`layout`) serves reading and
writing, and also says which config field decides each dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.importers.parameter_map import Entry, Path
from vatt_jax.models.multimodal import AXES, patch_of
from vatt_jax.models.towers.i3d import MIXED

# Keys are paths of attributes in the official objects, as tf.train.Checkpoint names them.
ROOT = 'model/layer_with_weights-0'
BASE = f'{ROOT}/_base_layer'  # backbones of a pretrained model
FINETUNED_BASE = f'{ROOT}/_base'  # the only backbone of a fine-tuned one
CLASSIFIER = f'{ROOT}/_ops/cls'
HEAD = f'{ROOT}/_head_layer/_bridge_heads/0'
UNIFIED = f'{BASE}/unified_backbone/unified_transformer'

# Our modalities, towers and axes -> the official words for them.
SHORT = {'video': 'vid', 'audio': 'aud', 'text': 'txt'}
PATCH = {'vit': 'voxel_to_patch', 'wat': 'wave_to_patch', 'spt': 'spectrum_to_patch'}
AXIS = {
    'temporal': 'temporal',
    'vertical': 'vertical',
    'horizontal': 'horizontal',
    'spectral': 'spectoral',  # sic, in the official names
}
# I3D: our unit -> theirs, before the Mixed blocks and within one.
I3D_STEM = {
    'conv_1a': 'conv3d_1a_7x7',
    'conv_2b': 'conv3d_2b_1x1',
    'conv_2c': 'conv3d_2c_3x3',
}
I3D_UNITS = {
    'b0': 'unit3d_b0_0',
    'b1_in': 'unit3d_b1_0',
    'b1': 'unit3d_b1_1',
    'b2_in': 'unit3d_b2_0',
    'b2': 'unit3d_b2_1',
    'b3': 'unit3d_b3_1',
}
# ResNet-2D: our convolution of a block -> places of theirs, and of its norm, in the block's lists.
RESNET_UNITS = {
    'conv_1': ('conv_relu_dropblock_layers/0', 'conv_relu_dropblock_layers/1'),
    'conv_2': ('conv_relu_dropblock_layers/3', 'conv_relu_dropblock_layers/4'),
    'conv_3': ('conv_relu_dropblock_layers/6', 'conv_relu_dropblock_layers/7'),
    'short': ('projection_layers/0', 'projection_layers/1'),
}
RESNET_STEM = ('initial_conv_relu_max_pool/0', 'initial_conv_relu_max_pool/2')
# Of a batch norm: our name -> theirs.
STATISTICS = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}


@dataclasses.dataclass(frozen=True)
class Dim:
    """One dimension of a variable.

    Attributes:
        size: number of elements along it.
        field: the config field that decides the size, '' where none does.
    """

    size: int
    field: str


def layout(
    model: Mapping[str, Any],
    objective: ConfigDict | Mapping[str, Any] | None = None,
    classes: int = 0,
) -> Iterator[Entry]:
    """List every variable of a model.

    Args:
        model: `config.model` with all defaults filled in (see `filled`).
        objective: `config.objective` where the checkpoint is fine-tuned, that is, holds one tower
            and a classifier; None for a pretrained one.
        classes: number of classes of that classifier.

    Yields:
        One entry for each variable of the official checkpoint.

    Raises:
        ConfigError: the official layout has no such tower or head.
    """
    if objective is not None:
        # A stream is modality[.view]: 'video' or 'video.second'.
        modality = objective['stream'].split('.')[0]
        yield from _tower(model, modality, FINETUNED_BASE)
        dims = (_pooled_width(model, modality), Dim(classes, 'objective.label'))
        yield from _dense(('objective',), CLASSIFIER, dims)
        return

    if model['shared']:
        for modality in model['towers']:
            yield from _shared_front(model, modality)
        shared_encoder = ('params', 'shared_encoder')
        yield from _encoder(shared_encoder, f'{UNIFIED}/tx', model['encoder'], 'model.encoder')
    else:
        for modality in model['towers']:
            backbone = f'{BASE}/{SHORT[modality]}_backbone'
            if modality == 'text':
                yield from _text_tower(model, backbone)
            else:
                yield from _tower(model, modality, f'{backbone}/_base')
    yield from _head(model)


# ---- layers
def _variable(ours: Path, theirs: str, *dims: Dim, layer: int | None = None) -> Entry:
    shape = tuple(dim.size for dim in dims)
    fields = tuple(dim.field for dim in dims)
    return Entry(ours, layer, theirs, shape, fields)


def _dense(
    ours: Path,
    theirs: str,
    dims: Sequence[Dim],
    bias: bool = True,
    layer: int | None = None,
) -> Iterator[Entry]:
    """A dense layer or a convolution; `dims` are those of the official kernel, outputs last."""
    yield _variable((*ours, 'kernel'), f'{theirs}/kernel', *dims, layer=layer)
    if bias:
        yield _variable((*ours, 'bias'), f'{theirs}/bias', dims[-1], layer=layer)


def _layer_norm(ours: Path, theirs: str, width: Dim, layer: int | None = None) -> Iterator[Entry]:
    yield _variable((*ours, 'scale'), f'{theirs}/gamma', width, layer=layer)
    yield _variable((*ours, 'bias'), f'{theirs}/beta', width, layer=layer)


def _batch_norm(ours: Path, theirs: str, width: Dim) -> Iterator[Entry]:
    """A batch norm; its running statistics live in a tree of their own."""
    for our_leaf, their_leaf in STATISTICS.items():
        group = 'params' if our_leaf in ('scale', 'bias') else 'batch_stats'
        yield _variable((group, *ours, our_leaf), f'{theirs}/{their_leaf}', width)


def _positions(
    ours: Path, theirs: str, axes: Sequence[str], rows: Sequence[Dim], width: Dim
) -> Iterator[Entry]:
    """Learned position tables, one for each axis, and the norm after their sum."""
    for axis, num_rows in zip(axes, rows, strict=True):
        table = f'{theirs}/{AXIS[axis]}_position_embeddings/embeddings'
        yield _variable((*ours, f'{axis}_positions'), table, num_rows, width)
    yield from _layer_norm((*ours, 'norm'), f'{theirs}/layernorm', width)


def _patch_projection(
    ours: Path, theirs: str, tower: Mapping[str, Any], where: str, width: Dim
) -> Iterator[Entry]:
    """The convolution that makes a token of each patch of pixels, samples or mel bins."""
    # RGB; waves and spectrograms have one channel. Kernel: [*patch C D].
    channels = 3 if tower['name'] == 'vit' else 1
    patch_dims = [Dim(size, f'{where}.patch') for size in patch_of(tower)]
    yield from _dense((*ours, 'patch'), theirs, (*patch_dims, Dim(channels, ''), width))


# ---- encoders
def _encoder_dims(size: Mapping[str, Any], where: str) -> tuple[Dim, Dim, Dim]:
    """Width, inner width of the attention (all heads), and width inside the MLP."""
    # `inner` is a product of two fields; the error for a misfit names the first of them.
    width = Dim(size['width'], f'{where}.width')
    inner = Dim(size['heads'] * size['head_width'], f'{where}.heads')
    mlp = Dim(size['mlp'], f'{where}.mlp')
    return width, inner, mlp


def _encoder(
    ours: Path,
    theirs: str,
    size: Mapping[str, Any],
    where: str,
    bias: bool = True,
    final_norm: bool = True,
) -> Iterator[Entry]:
    """A pre-LN (or post-LN) transformer in the layout of the video tower's `tx`."""
    width, inner, mlp = _encoder_dims(size, where)
    # Every layer has the same path of ours: row i of arrays stacked for lax.scan.
    layers = (*ours, 'layers')
    for i in range(size['layers']):
        block = f'{theirs}/layers/{i}'
        attention, feed_forward = f'{block}/mha', f'{block}/feed_forward'

        yield from _layer_norm((*layers, 'attention_norm'), f'{block}/layer_norm', width, i)
        yield from _dense((*layers, 'query'), f'{attention}/q', (width, inner), bias, i)
        yield from _dense((*layers, 'key'), f'{attention}/k', (width, inner), bias, i)
        yield from _dense((*layers, 'value'), f'{attention}/v', (width, inner), bias, i)
        yield from _dense((*layers, 'out'), f'{attention}/o', (inner, width), bias, i)

        yield from _layer_norm((*layers, 'mlp_norm'), f'{feed_forward}/layer_norm', width, i)
        yield from _dense((*layers, 'mlp_in'), f'{feed_forward}/mlp/wi', (width, mlp), bias, i)
        yield from _dense((*layers, 'mlp_out'), f'{feed_forward}/mlp/wo', (mlp, width), bias, i)
    # A post-LN encoder ends with the norm of its last layer.
    if final_norm:
        yield from _layer_norm((*ours, 'final_norm'), f'{theirs}/final_layer_norm', width)


def _t5_encoder(ours: Path, theirs: str, size: Mapping[str, Any], where: str) -> Iterator[Entry]:
    """T5: no biases, scale-only norms before attention, one relative bias for all layers."""
    width, inner, mlp = _encoder_dims(size, where)
    layers = (*ours, 'layers')
    for i in range(size['layers']):
        block = f'{theirs}/layers/{i}'
        attention = f'{block}/self_attention/attention'
        feed_forward = f'{block}/feed_forward'

        # T5's norm scales by the root mean square alone, and calls its scale a weight.
        norm = f'{block}/self_attention/layer_norm/weight'
        yield _variable((*layers, 'attention_norm', 'scale'), norm, width, layer=i)
        yield from _dense((*layers, 'query'), f'{attention}/q', (width, inner), False, i)
        yield from _dense((*layers, 'key'), f'{attention}/k', (width, inner), False, i)
        yield from _dense((*layers, 'value'), f'{attention}/v', (width, inner), False, i)
        yield from _dense((*layers, 'out'), f'{attention}/o', (inner, width), False, i)

        # The norm before the MLP is an ordinary one in the official code, scale and bias.
        yield from _layer_norm((*layers, 'mlp_norm'), f'{feed_forward}/layer_norm', width, i)
        yield from _dense((*layers, 'mlp_in'), f'{feed_forward}/mlp/wi', (width, mlp), False, i)
        yield from _dense((*layers, 'mlp_out'), f'{feed_forward}/mlp/wo', (mlp, width), False, i)

    # All layers use the bias of the first.
    first_attention = f'{theirs}/layers/0/self_attention/attention'
    yield _variable(
        (*ours, 'relative_bias'),
        f'{first_attention}/relative_attention_bias/embeddings',
        Dim(size['buckets'], f'{where}.buckets'),
        Dim(size['heads'], f'{where}.heads'),
    )
    yield _variable((*ours, 'final_norm', 'scale'), f'{theirs}/final_layer_norm/weight', width)


# ---- towers
def _tower(model: Mapping[str, Any], modality: str, theirs: str) -> Iterator[Entry]:
    """A video or audio tower with layers of its own."""
    tower = model['towers'][modality]
    if tower['name'] in PATCH:
        return _patch_tower(model, modality, theirs)
    if tower['name'] == 'i3d':
        return _i3d(tower['blocks'], modality, theirs)
    if tower['name'] == 'resnet2d':
        return _resnet2d(tower['blocks'], modality, theirs)
    known = [*PATCH, 'i3d', 'resnet2d']
    raise ConfigError(
        f'config.model.towers.{modality}.name={tower["name"]!r}: the official layout of '
        f'{", ".join(known)} is known; choose one of them'
    )


def _conv_norm(ours: Path, convolution: str, norm: str, kernel: Sequence[int]) -> Iterator[Entry]:
    """A convolution without bias, of this shape, and the batch norm after it."""
    dims = [Dim(size, '') for size in kernel]
    yield from _dense(('params', *ours, 'conv'), convolution, dims, bias=False)
    yield from _batch_norm((*ours, 'norm'), f'{norm}/bn', dims[-1])


def _i3d(blocks: Sequence[int], modality: str, theirs: str) -> Iterator[Entry]:
    net = f'nets_{modality}'
    stem_kernels = {
        'conv_1a': (7, 7, 7, 3, 64),
        'conv_2b': (1, 1, 1, 64, 64),
        'conv_2c': (3, 3, 3, 64, 192),
    }
    for name, kernel in stem_kernels.items():
        unit = f'{theirs}/{I3D_STEM[name]}'
        yield from _conv_norm((net, name), f'{unit}/conv3d', unit, kernel)
    channels = 192
    for block in i3d_blocks(blocks):
        pointwise, (reduced_1, wide_1), (reduced_2, wide_2), pooled = MIXED[block]
        kernels = {
            'b0': (1, 1, 1, channels, pointwise),
            'b1_in': (1, 1, 1, channels, reduced_1),
            'b1': (3, 3, 3, reduced_1, wide_1),
            'b2_in': (1, 1, 1, channels, reduced_2),
            'b2': (3, 3, 3, reduced_2, wide_2),
            'b3': (1, 1, 1, channels, pooled),
        }
        for name, kernel in kernels.items():
            unit = f'{theirs}/{block}/{I3D_UNITS[name]}'
            yield from _conv_norm((net, block, name), f'{unit}/conv3d', unit, kernel)
        channels = pointwise + wide_1 + wide_2 + pooled


def i3d_blocks(blocks: Sequence[int]) -> list[str]:
    """Names of an I3D's Mixed blocks: the first few of each stage."""
    names = []
    for stage, count in zip((3, 4, 5), blocks, strict=True):
        of_stage = [name for name in MIXED if name.startswith(f'mixed_{stage}')]
        names += of_stage[:count]
    return names


def _resnet2d(blocks: Sequence[int], modality: str, theirs: str) -> Iterator[Entry]:
    net = f'nets_{modality}'
    convolution, norm = (f'{theirs}/{place}' for place in RESNET_STEM)
    yield from _conv_norm((net, 'stem'), f'{convolution}/conv2d', norm, (7, 7, 1, 64))
    channels = 64
    for group, num_blocks in enumerate(blocks):
        width = 64 << group  # times four at the end of a block
        for block in range(num_blocks):
            kernels = {
                'conv_1': (1, 1, channels, width),
                'conv_2': (3, 3, width, width),
                'conv_3': (1, 1, width, 4 * width),
            }
            if block == 0:
                kernels['short'] = (1, 1, channels, 4 * width)
            prefix = f'{theirs}/block_groups/{group}/layers/{block}'
            ours = (net, f'group_{group + 1}_block_{block + 1}')
            for name, kernel in kernels.items():
                convolution, norm = (f'{prefix}/{place}' for place in RESNET_UNITS[name])
                yield from _conv_norm((*ours, name), f'{convolution}/conv2d', norm, kernel)
            channels = 4 * width


def _patch_tower(model: Mapping[str, Any], modality: str, theirs: str) -> Iterator[Entry]:
    """A video or audio tower with an encoder of its own (vit, wat, spt).

    A tower whose encoder is the shared one comes here too where it is fine-tuned alone: the
    official code makes it a tower of its own then.
    """
    tower, shared = model['towers'][modality], model['shared']
    where = f'model.towers.{modality}'
    if shared and tower['name'] == 'spt':
        raise ConfigError(
            f'config.{where}.name="spt" with config.model.shared=True: the official spectrogram '
            'tower has no biases and a shared encoder has; choose wat'
        )

    if shared:
        size, size_field, encoder = model['encoder'], 'model.encoder', 'shared_encoder'
    else:
        size, size_field, encoder = tower, where, f'encoders_{modality}'
    width = Dim(size['width'], f'{size_field}.width')
    front = ('params', f'fronts_{modality}')

    patch = f'{theirs}/{PATCH[tower["name"]]}'
    yield from _patch_projection(front, patch, tower, where, width)
    yield _variable((*front, 'agg'), f'{theirs}/agg_embedding', width)
    # Between patches and encoder: always there where modalities share the encoder.
    if shared or tower['pre']:
        yield from _dense((*front, 'projection'), f'{theirs}/pre_proj', (width, width))

    rows = [Dim(num_rows, f'{where}.positions') for num_rows in tower['positions']]
    lookup = f'{theirs}/pos_embedding_lookup'
    yield from _positions((*front, 'positions'), lookup, AXES[tower['name']], rows, width)

    # The official spectrogram tower switches off the biases of its whole encoder.
    has_bias = tower['name'] != 'spt'
    yield from _encoder(('params', encoder), f'{theirs}/tx', size, size_field, has_bias)
    if tower['post']:
        dims = (width, Dim(tower['post'], f'{where}.post'))
        yield from _dense(('params', f'posts_{modality}'), f'{theirs}/post_proj', dims)


def _text_tower(model: Mapping[str, Any], theirs: str) -> Iterator[Entry]:
    tower, where = model['towers']['text'], 'model.towers.text'
    name = tower['name']
    if name not in ('t5', 'bert', 'linear'):
        raise ConfigError(
            f'config.{where}.name={name!r}: the official layout of t5, bert and linear is known; '
            'choose one of them'
        )
    language_model = f'{theirs}/base_lm'
    # A front feeds an encoder; a net is a whole tower.
    front = ('params', 'nets_text' if name == 'linear' else 'fronts_text')
    vocab = Dim(tower['vocab'], f'{where}.vocab')
    word_width = Dim(tower['word_width'], f'{where}.word_width')
    width = Dim(tower['width'], f'{where}.width')

    yield _variable((*front, 'word_table'), f'{theirs}/embedding/embeddings', vocab, word_width)
    if name == 'linear':
        # A convolution over words of size one.
        dims = (Dim(1, ''), word_width, width)
        yield from _dense((*front, 'projection'), f'{language_model}/conv1d', dims)
        return

    # The token put before the words, before they are projected. Official bert_small has a second
    # one behind the projection.
    if name == 't5':
        yield _variable((*front, 'agg'), f'{theirs}/agg_embedding', word_width)
    elif tower['extra']:
        yield _variable((*front, 'word_agg'), f'{theirs}/agg_embedding', word_width)
    yield from _dense((*front, 'projection'), f'{theirs}/pre_proj', (word_width, width), False)

    encoder = ('params', 'encoders_text')
    if name == 't5':
        yield from _t5_encoder(encoder, language_model, tower, where)
        return
    yield _variable((*front, 'agg'), f'{language_model}/agg_embedding', width)
    # BERT has a table of positions, where T5 has its relative bias alone.
    rows = [Dim(tower['positions'], f'{where}.positions')]
    lookup = f'{language_model}/pos_embedding_lookup'
    yield from _positions((*front, 'positions'), lookup, ['temporal'], rows, width)
    yield from _encoder(encoder, f'{language_model}/tx', tower, where, final_norm=tower['pre_norm'])


def _shared_front(model: Mapping[str, Any], modality: str) -> Iterator[Entry]:
    """What a modality has of its own before and behind the shared encoder."""
    tower, where = model['towers'][modality], f'model.towers.{modality}'
    front = ('params', f'fronts_{modality}')
    raw = f'{UNIFIED}/raw_to_embeddings/{modality}'
    width = Dim(model['encoder']['width'], 'model.encoder.width')

    if modality == 'text':
        axes: Sequence[str] = ('temporal',)
        # T5 has no position table by itself, so no field of the tower gives its length.
        rows = [Dim(model['inputs']['text']['words'], 'model.inputs.text.words')]
        vocab = Dim(tower['vocab'], f'{where}.vocab')
        raw_width = Dim(tower['word_width'], f'{where}.word_width')
        yield _variable((*front, 'word_table'), f'{raw}/embeddings', vocab, raw_width)
    else:
        axes = AXES[tower['name']]
        rows = [Dim(num_rows, f'{where}.positions') for num_rows in tower['positions']]
        # Patches are projected to the encoder's width at once, words to their own.
        raw_width = width
        yield from _patch_projection(front, raw, tower, where, width)

    projection = f'{UNIFIED}/pre_proj/{modality}'
    yield from _dense((*front, 'projection'), projection, (raw_width, width))
    lookup = f'{UNIFIED}/pos_embedding_lookup/{modality}'
    yield from _positions((*front, 'positions'), lookup, axes, rows, width)
    yield _variable((*front, 'agg'), f'{UNIFIED}/{SHORT[modality]}_agg_embedding', width)
    if tower['post']:
        dims = (width, Dim(tower['post'], f'{where}.post'))
        yield from _dense(('params', f'posts_{modality}'), f'{UNIFIED}/post_proj/{modality}', dims)


# ---- the common spaces
def _pooled_width(model: Mapping[str, Any], modality: str) -> Dim:
    """Width of the vector that a tower pools its tokens into."""
    tower, where = model['towers'][modality], f'model.towers.{modality}'
    if tower['name'] == 'i3d':
        pointwise, (_, wide_1), (_, wide_2), pooled = MIXED[i3d_blocks(tower['blocks'])[-1]]
        return Dim(pointwise + wide_1 + wide_2 + pooled, f'{where}.blocks')
    if tower['name'] == 'resnet2d':
        return Dim(128 << len(tower['blocks']), f'{where}.blocks')
    # Not every tower has a field `post`.
    if tower.get('post'):
        return Dim(tower['post'], f'{where}.post')
    if model['shared']:
        return Dim(model['encoder']['width'], 'model.encoder.width')
    return Dim(tower['width'], f'{where}.width')


def _head(model: Mapping[str, Any]) -> Iterator[Entry]:
    head, towers = model['head'], model['towers']
    if head['name'] == 'none':
        return
    if head['name'] != 'fac':
        raise ConfigError(
            f'config.model.head.name={head["name"]!r}: official checkpoints have the head fac'
        )
    ours = ('params', 'head')
    # A space without a width is left out, with what leads to it alone.
    va = Dim(head.get('va', 0), 'model.head.va')  # video-audio space
    vat = Dim(head.get('vat', 0), 'model.head.vat')  # video-audio-text space

    # FAC, fine and coarse (VATT paper): video goes to the fine space `va`, and from
    # there to the coarse one `vat`; audio goes to `va` and text to `vat` by one layer each.
    if 'video' in towers and va.size:
        dims = (_pooled_width(model, 'video'), va)
        yield from _dense((*ours, 'video_hidden'), f'{HEAD}/vid_to_hid', dims, bias=False)
        yield from _batch_norm(('head', 'video_va_pre_norm'), f'{HEAD}/hid_to_va/pre_bn', va)
        yield from _dense((*ours, 'video_va'), f'{HEAD}/hid_to_va/dense', (va, va), bias=False)
        yield from _batch_norm(('head', 'video_va_norm'), f'{HEAD}/hid_to_va/bn', va)
    if 'video' in towers and vat.size:
        yield from _dense((*ours, 'video_vat'), f'{HEAD}/va_to_vat/dense', (va, vat), bias=False)
        yield from _batch_norm(('head', 'video_vat_norm'), f'{HEAD}/va_to_vat/bn', vat)
    if 'audio' in towers and va.size:
        dims = (_pooled_width(model, 'audio'), va)
        yield from _dense((*ours, 'audio_va'), f'{HEAD}/aud_to_va', dims)
    if 'text' in towers and vat.size:
        dims = (_pooled_width(model, 'text'), vat)
        yield from _dense((*ours, 'text_vat'), f'{HEAD}/txt_to_vat', dims)
