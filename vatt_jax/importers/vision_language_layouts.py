"""Which variable of the releases of ViLBERT and UNITER is which of ours.

    vilbert   BertForMultiModalPreTraining of vilbert_beta and vilbert-multi-task
    uniter    UniterForPretraining
    bert      Hugging Face's BertForPreTraining, by which both begin

A layout names modules; the names of their leaves follow from ours. Kernels of PyTorch are (out,
in), ours (in, out), with heads and their width as two axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vatt_jax.importers.parameter_map import Entry, Path

# Our leaf -> theirs. Tables are `weight`, too.
LEAVES = {'kernel': 'weight', 'bias': 'bias', 'scale': 'weight'}
TEXT_EMBEDDINGS = {
    'word_table': 'embeddings.word_embeddings',
    'position_table': 'embeddings.position_embeddings',
    'type_table': 'embeddings.token_type_embeddings',
    'norm': 'embeddings.LayerNorm',
}
# A layer of BERT.
LAYER = {
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
    'out': 'attention.output.dense',
    'attention_norm': 'attention.output.LayerNorm',
    'mlp_in': 'intermediate.dense',
    'mlp_out': 'output.dense',
    'mlp_norm': 'output.LayerNorm',
}
# ViLBERT numbers the streams of a co-attention: 1 are the regions, 2 the words.
CO_LAYER = {
    f'{stream}/{ours}': theirs
    for stream, number, letter in (('image', 1, 'v'), ('text', 2, 't'))
    for ours, theirs in {
        'query': f'biattention.query{number}',
        'key': f'biattention.key{number}',
        'value': f'biattention.value{number}',
        'out': f'biOutput.dense{number}',
        'attention_norm': f'biOutput.LayerNorm{number}',
        'mlp_in': f'{letter}_intermediate.dense',
        'mlp_out': f'{letter}_output.dense',
        'mlp_norm': f'{letter}_output.LayerNorm',
    }.items()
}
WORD_HEAD = {
    'word_head/transform/dense': 'cls.predictions.transform.dense',
    'word_head/transform/norm': 'cls.predictions.transform.LayerNorm',
    # Of no module of theirs.
    'word_head/bias': 'cls.predictions',
}


def prefixed(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Modules of a part under the names of the whole."""
    return {f'{ours}/{name}': f'{theirs}.{target}' for name, target in modules.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        modules: our module or table -> theirs.
        layers: what our layers' names begin with -> (theirs, modules of a layer).
        tied: their second name of a variable -> its first.
    """

    modules: Mapping[str, str]
    layers: Mapping[str, tuple[str, Mapping[str, str]]]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)


LAYOUTS: dict[str, Layout] = {
    'vilbert': Layout(
        modules={
            **prefixed('text_embeddings', 'bert', TEXT_EMBEDDINGS),
            'region_embeddings/features': 'bert.v_embeddings.image_embeddings',
            'region_embeddings/boxes': 'bert.v_embeddings.image_location_embeddings',
            'region_embeddings/norm': 'bert.v_embeddings.LayerNorm',
            'text_pooler': 'bert.t_pooler.dense',
            'image_pooler': 'bert.v_pooler.dense',
            **WORD_HEAD,
            'region_head/transform/dense': 'cls.imagePredictions.transform.dense',
            'region_head/transform/norm': 'cls.imagePredictions.transform.LayerNorm',
            'region_head/decoder': 'cls.imagePredictions.decoder',
            'match_head': 'cls.bi_seq_relationship',
        },
        layers={
            'text_layer_': ('bert.encoder.layer.', LAYER),
            'image_layer_': ('bert.encoder.v_layer.', LAYER),
            'co_layer_': ('bert.encoder.c_layer.', CO_LAYER),
        },
        tied={'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight'},
    ),
    'uniter': Layout(
        modules={
            **prefixed('text_embeddings', 'uniter', TEXT_EMBEDDINGS),
            'region_embeddings/mask_table': 'uniter.img_embeddings.mask_embedding',
            'region_embeddings/features': 'uniter.img_embeddings.img_linear',
            'region_embeddings/features_norm': 'uniter.img_embeddings.img_layer_norm',
            'region_embeddings/boxes': 'uniter.img_embeddings.pos_linear',
            'region_embeddings/boxes_norm': 'uniter.img_embeddings.pos_layer_norm',
            'region_embeddings/norm': 'uniter.img_embeddings.LayerNorm',
            'pooler': 'uniter.pooler.dense',
            **WORD_HEAD,
            'feature_head/transform/dense': 'feat_regress.net.0',
            'feature_head/transform/norm': 'feat_regress.net.2',
            'feature_head/bias': 'feat_regress',
            'class_head/transform/dense': 'region_classifier.net.0',
            'class_head/transform/norm': 'region_classifier.net.2',
            'class_head/decoder': 'region_classifier.net.3',
            'match_head': 'itm_output',
        },
        layers={'layer_': ('uniter.encoder.layer.', LAYER)},
        tied={
            'cls.predictions.decoder.weight': 'uniter.embeddings.word_embeddings.weight',
            'feat_regress.weight': 'uniter.img_embeddings.img_linear.weight',
        },
    ),
}
# Text alone: what a BERT has of either model.
BERT: dict[str, Layout] = {
    'vilbert': Layout(
        modules={**prefixed('text_embeddings', 'bert', TEXT_EMBEDDINGS), **WORD_HEAD},
        layers={'text_layer_': ('bert.encoder.layer.', LAYER)},
        tied=LAYOUTS['vilbert'].tied,
    ),
    'uniter': Layout(
        modules={
            **prefixed('text_embeddings', 'bert', TEXT_EMBEDDINGS),
            'pooler': 'bert.pooler.dense',
            **WORD_HEAD,
        },
        layers={'layer_': ('bert.encoder.layer.', LAYER)},
        tied=LAYOUTS['vilbert'].tied,
    ),
}


def entries(layout: Layout, variables: Mapping[Path, Any]) -> list[Entry]:
    """The lines of one model.

    Args:
        layout: of its file.
        variables: {our path: shape and type}.

    Returns:
        One for each variable that the layout has.
    """
    lines = []
    for path, like in variables.items():
        theirs = their_name(layout, path)
        if theirs is not None:
            lines.append(entry(path, theirs, tuple(like.shape)))
    return lines


def their_name(layout: Layout, path: Path) -> str | None:
    """Their name of a variable; None where the layout has none."""
    *modules, leaf = path[1:]  # after 'params'
    name = '/'.join(modules)
    table = f'{name}/{leaf}' if name else leaf
    if table in layout.modules:
        suffix = 'bias' if leaf == 'bias' else 'weight'
        return f'{layout.modules[table]}.{suffix}'
    if name in layout.modules:
        return f'{layout.modules[name]}.{LEAVES[leaf]}'
    layer, _, module = name.partition('/')
    stem, _, number = layer.rpartition('_')
    if f'{stem}_' not in layout.layers:
        return None
    their_layer, layer_modules = layout.layers[f'{stem}_']
    return f'{their_layer}{number}.{layer_modules[module]}.{LEAVES[leaf]}'


def entry(path: Path, theirs: str, shape: tuple[int, ...]) -> Entry:
    """One line, with the order of their axes among ours."""
    order: tuple[int, ...] = ()
    their_shape = shape
    if path[-1] == 'kernel':
        # What comes out stands first in theirs: heads and their width, or the stream's width.
        order = {2: (1, 0), 3: (2, 0, 1) if path[-2] == 'out' else (1, 2, 0)}[len(shape)]
        inputs = shape[0] * shape[1] if path[-2] == 'out' else shape[0]
        their_shape = (math.prod(shape) // inputs, inputs)
    elif len(shape) == 2 and path[-1] == 'bias':
        their_shape = (shape[0] * shape[1],)
    return Entry(
        ours=path,
        layer=None,
        theirs=theirs,
        shape=their_shape,
        fields=('',) * len(their_shape),
        order=order,
        axes=shape if order else (),
    )
