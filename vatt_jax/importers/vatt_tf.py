"""Official VATT checkpoints (TensorFlow 2, `ckpt-N.index` and `.data-*`) to our parameters, and back.

Both layouts hold the same numbers: every variable of one is a reshape of a variable of the other, or a layer of it. So one table (`layout`)
says what is what, for reading and for writing, and what each dimension is called in a config.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.importers import parameter_map
from vatt_jax.importers.parameter_map import Entry, Report
from vatt_jax.inputs import spectrogram
from vatt_jax.models.multimodal import AXES, SIZE, TOWERS, extent, patch_of
from vatt_jax.objectives import classification

SUFFIX = '/.ATTRIBUTES/VARIABLE_VALUE'
ROOT = 'model/layer_with_weights-0'
HEAD_WIDTH = 64  # every official model; a kernel does not tell it
MODALITIES = ('video', 'audio', 'text')
SHORT = {'video': 'vid', 'audio': 'aud', 'text': 'txt'}
PATCH = {'vit': 'voxel_to_patch', 'wat': 'wave_to_patch', 'spt': 'spectrum_to_patch'}
AXIS = {
    'temporal': 'temporal',
    'vertical': 'vertical',
    'horizontal': 'horizontal',
    'spectral': 'spectoral',
}  # sic
STATISTICS = {'scale': 'gamma', 'bias': 'beta', 'mean': 'moving_mean', 'var': 'moving_variance'}


# ---- the table
def layout(
    model: Mapping[str, Any], objective: Mapping[str, Any] | None = None, classes: int = 0
) -> Iterator[Entry]:
    """Every variable of a model. model: `config.model`, with all defaults filled in (`filled`). objective: `config.objective` where a classifier
    of `classes` classes belongs to the checkpoint (fine-tuned)."""
    towers = model['towers']
    if objective is not None:
        modality = objective['stream'].split('.')[0]
        base = f'{ROOT}/_base'
        yield from _patched(model, modality, base)
        yield from _dense(
            ('objective',),
            f'{ROOT}/_ops/cls',
            (_width(model, modality), classes),
            (_width_field(model, modality), 'objective.label'),
        )
        return
    if model['shared']:
        unified = f'{ROOT}/_base_layer/unified_backbone/unified_transformer'
        for modality in towers:
            yield from _shared_front(model, modality, unified)
        yield from _encoder(
            ('params', 'shared_encoder'), f'{unified}/tx', model['encoder'], 'model.encoder'
        )
    else:
        for modality in towers:
            if modality == 'text':
                yield from _text(model, f'{ROOT}/_base_layer/txt_backbone')
            else:
                yield from _patched(
                    model, modality, f'{ROOT}/_base_layer/{SHORT[modality]}_backbone/_base'
                )
    yield from _head(model)


def _width(model, modality) -> int:
    """Of the pooled vector."""
    t = model['towers'][modality]
    return t.get('post') or (model['encoder'] if model['shared'] else t)['width']


def _width_field(model, modality) -> str:
    where = f'model.towers.{modality}'
    return (
        f'{where}.post'
        if model['towers'][modality].get('post')
        else 'model.encoder.width'
        if model['shared']
        else f'{where}.width'
    )


def _dense(ours, theirs, shape, fields, bias=True) -> Iterator[Entry]:
    """shape: of their kernel; fields: behind its dimensions."""
    yield Entry((*ours, 'kernel'), None, f'{theirs}/kernel', shape, fields)
    if bias:
        yield Entry((*ours, 'bias'), None, f'{theirs}/bias', shape[-1:], fields[-1:])


def _norm(ours, theirs, width, field, layer=None, names=('gamma', 'beta')) -> Iterator[Entry]:
    for mine, name in zip(('scale', 'bias'), names):
        yield Entry((*ours, mine), layer, f'{theirs}/{name}', (width,), (field,))


def _positions(ours, theirs, sizes, axes, width, rows, field) -> Iterator[Entry]:
    for size, axis in zip(sizes, axes, strict=True):
        yield Entry(
            (*ours, f'{axis}_positions'),
            None,
            f'{theirs}/{AXIS[axis]}_position_embeddings/embeddings',
            (size, width),
            (rows, field),
        )
    yield from _norm((*ours, 'norm'), f'{theirs}/layernorm', width, field)


def _encoder(ours, theirs, size, where, bias=True, final=True) -> Iterator[Entry]:
    """A pre-LN (or post-LN) stack in the layout of the video tower's `tx`."""
    d, h, f = size['width'], size['heads'] * size['head_width'], size['mlp']
    width, heads, mlp = f'{where}.width', f'{where}.heads', f'{where}.mlp'
    for i in range(size['layers']):
        here, layers = f'{theirs}/layers/{i}', (*ours, 'layers')

        def dense(name, key, n, m, fields):
            yield Entry((*layers, name, 'kernel'), i, f'{here}/{key}/kernel', (n, m), fields)  # noqa: B023
            if bias:
                yield Entry((*layers, name, 'bias'), i, f'{here}/{key}/bias', (m,), fields[1:])  # noqa: B023

        yield from _norm((*layers, 'attention_norm'), f'{here}/layer_norm', d, width, i)
        for name, key in (('query', 'q'), ('key', 'k'), ('value', 'v')):
            yield from dense(name, f'mha/{key}', d, h, (width, heads))
        yield from dense('out', 'mha/o', h, d, (heads, width))
        yield from _norm((*layers, 'mlp_norm'), f'{here}/feed_forward/layer_norm', d, width, i)
        yield from dense('mlp_in', 'feed_forward/mlp/wi', d, f, (width, mlp))
        yield from dense('mlp_out', 'feed_forward/mlp/wo', f, d, (mlp, width))
    if final:
        yield from _norm((*ours, 'final_norm'), f'{theirs}/final_layer_norm', d, width)


def _t5(ours, theirs, t, where) -> Iterator[Entry]:
    d, h, f = t['width'], t['heads'] * t['head_width'], t['mlp']
    width, heads, mlp = f'{where}.width', f'{where}.heads', f'{where}.mlp'
    for i in range(t['layers']):
        here, layers = f'{theirs}/layers/{i}', (*ours, 'layers')
        attention = f'{here}/self_attention'
        yield Entry(
            (*layers, 'attention_norm', 'scale'),
            i,
            f'{attention}/layer_norm/weight',
            (d,),
            (width,),
        )
        for name, key in (('query', 'q'), ('key', 'k'), ('value', 'v')):
            yield Entry(
                (*layers, name, 'kernel'),
                i,
                f'{attention}/attention/{key}/kernel',
                (d, h),
                (width, heads),
            )
        yield Entry(
            (*layers, 'out', 'kernel'), i, f'{attention}/attention/o/kernel', (h, d), (heads, width)
        )
        yield from _norm((*layers, 'mlp_norm'), f'{here}/feed_forward/layer_norm', d, width, i)
        yield Entry(
            (*layers, 'mlp_in', 'kernel'),
            i,
            f'{here}/feed_forward/mlp/wi/kernel',
            (d, f),
            (width, mlp),
        )
        yield Entry(
            (*layers, 'mlp_out', 'kernel'),
            i,
            f'{here}/feed_forward/mlp/wo/kernel',
            (f, d),
            (mlp, width),
        )
    yield Entry(
        (*ours, 'relative_bias'),
        None,
        f'{theirs}/layers/0/self_attention/attention/relative_attention_bias/embeddings',
        (t['buckets'], t['heads']),
        (f'{where}.buckets', heads),
    )
    yield Entry(
        (*ours, 'final_norm', 'scale'), None, f'{theirs}/final_layer_norm/weight', (d,), (width,)
    )


def _patched(model, modality, theirs) -> Iterator[Entry]:
    """A video or audio tower of its own (vit, wat, spt); or one whose encoder is the shared one: fine-tuned alone, the official code makes it a
    tower of its own too."""
    t, where, shared = model['towers'][modality], f'model.towers.{modality}', model['shared']
    if t['name'] not in PATCH:
        raise ConfigError(
            f'config.{where}.name={t["name"]!r}: the official layout of {", ".join(PATCH)} is known; choose one of them'
        )
    if shared and t['name'] == 'spt':
        raise ConfigError(
            f'config.{where}.name="spt" with config.model.shared=True: the official spectrogram tower has no biases and a shared '
            'encoder has; choose wat'
        )
    size, at = (model['encoder'], 'model.encoder') if shared else (t, where)
    d, front, width = size['width'], ('params', f'fronts_{modality}'), f'{at}.width'
    yield from _patches(front, f'{theirs}/{PATCH[t["name"]]}', t, d, where, width)
    yield Entry((*front, 'agg'), None, f'{theirs}/agg_embedding', (d,), (width,))
    if shared or t['pre']:
        yield from _dense((*front, 'projection'), f'{theirs}/pre_proj', (d, d), (width, width))
    yield from _positions(
        (*front, 'positions'),
        f'{theirs}/pos_embedding_lookup',
        t['positions'],
        AXES[t['name']],
        d,
        f'{where}.positions',
        width,
    )
    yield from _encoder(
        ('params', 'shared_encoder' if shared else f'encoders_{modality}'),
        f'{theirs}/tx',
        size,
        at,
        bias=t['name'] != 'spt',
    )
    if t['post']:
        yield from _dense(
            ('params', f'posts_{modality}'),
            f'{theirs}/post_proj',
            (d, t['post']),
            (width, f'{where}.post'),
        )


def _patches(front, theirs, t, d, where, width) -> Iterator[Entry]:
    shape = (*patch_of(t), 3 if t['name'] == 'vit' else 1, d)
    yield from _dense(
        (*front, 'patch'), theirs, shape, (f'{where}.patch',) * (len(shape) - 2) + ('', width)
    )


def _text(model, theirs) -> Iterator[Entry]:
    t, where = model['towers']['text'], 'model.towers.text'
    if t['name'] not in ('t5', 'bert', 'linear'):
        raise ConfigError(
            f'config.{where}.name={t["name"]!r}: the official layout of t5, bert and linear is known; choose one of them'
        )
    own = 'nets_text' if t['name'] == 'linear' else 'fronts_text'
    d, front, field = t['width'], ('params', own), f'{where}.width'
    table = (t['vocab'], t['word_width'])
    yield Entry(
        (*front, 'word_table'),
        None,
        f'{theirs}/embedding/embeddings',
        table,
        (f'{where}.vocab', f'{where}.word_width'),
    )
    if t['name'] == 'linear':
        yield from _dense(
            (*front, 'projection'),
            f'{theirs}/base_lm/conv1d',
            (1, t['word_width'], d),
            ('', f'{where}.word_width', field),
        )
        return
    if t['name'] == 't5' or t['extra']:
        yield Entry(
            (*front, 'agg' if t['name'] == 't5' else 'word_agg'),
            None,
            f'{theirs}/agg_embedding',
            (t['word_width'],),
            (f'{where}.word_width',),
        )
    yield from _dense(
        (*front, 'projection'),
        f'{theirs}/pre_proj',
        (t['word_width'], d),
        (f'{where}.word_width', field),
        bias=False,
    )
    encoder = ('params', 'encoders_text')
    if t['name'] == 't5':
        yield from _t5(encoder, f'{theirs}/base_lm', t, where)
        return
    yield Entry((*front, 'agg'), None, f'{theirs}/base_lm/agg_embedding', (d,), (field,))
    yield from _positions(
        (*front, 'positions'),
        f'{theirs}/base_lm/pos_embedding_lookup',
        (t['positions'],),
        ('temporal',),
        d,
        f'{where}.positions',
        field,
    )
    yield from _encoder(encoder, f'{theirs}/base_lm/tx', t, where, final=t['pre_norm'])


def _shared_front(model, modality, theirs) -> Iterator[Entry]:
    t, d, where = model['towers'][modality], model['encoder']['width'], f'model.towers.{modality}'
    front, raw = ('params', f'fronts_{modality}'), f'{theirs}/raw_to_embeddings/{modality}'
    if modality == 'text':
        sizes, axes, into, of = (
            (model['inputs']['text']['words'],),
            ('temporal',),
            t['word_width'],
            f'{where}.word_width',
        )
        yield Entry(
            (*front, 'word_table'),
            None,
            f'{raw}/embeddings',
            (t['vocab'], into),
            (f'{where}.vocab', of),
        )
    else:
        sizes, axes, into, of = t['positions'], AXES[t['name']], d, 'model.encoder.width'
        yield from _patches(front, raw, t, d, where, 'model.encoder.width')
    yield from _dense(
        (*front, 'projection'),
        f'{theirs}/pre_proj/{modality}',
        (into, d),
        (of, 'model.encoder.width'),
    )
    rows = 'model.inputs.text.words' if modality == 'text' else f'{where}.positions'
    yield from _positions(
        (*front, 'positions'),
        f'{theirs}/pos_embedding_lookup/{modality}',
        sizes,
        axes,
        d,
        rows,
        'model.encoder.width',
    )
    yield Entry(
        (*front, 'agg'),
        None,
        f'{theirs}/{SHORT[modality]}_agg_embedding',
        (d,),
        ('model.encoder.width',),
    )
    if t['post']:
        yield from _dense(
            ('params', f'posts_{modality}'),
            f'{theirs}/post_proj/{modality}',
            (d, t['post']),
            ('model.encoder.width', f'{where}.post'),
        )


def _head(model) -> Iterator[Entry]:
    head = model['head']
    if head['name'] != 'fac':
        raise ConfigError(
            f'config.model.head.name={head["name"]!r}: official checkpoints have the head fac'
        )
    theirs, ours = f'{ROOT}/_head_layer/_bridge_heads/0', ('params', 'head')
    va, vat, towers = head['va'], head['vat'], model['towers']
    into = lambda modality, space: (
        (_width(model, modality), head[space]),
        (_width_field(model, modality), f'model.head.{space}'),
    )

    def norm(name, key, width, field):
        for mine, name_ in STATISTICS.items():
            group = 'params' if mine in ('scale', 'bias') else 'batch_stats'
            yield Entry(
                (group, 'head', name, mine), None, f'{theirs}/{key}/{name_}', (width,), (field,)
            )

    if 'video' in towers:
        yield from _dense(
            (*ours, 'video_hidden'), f'{theirs}/vid_to_hid', *into('video', 'va'), bias=False
        )
        yield from norm('video_va_pre_norm', 'hid_to_va/pre_bn', va, 'model.head.va')
        yield from _dense(
            (*ours, 'video_va'),
            f'{theirs}/hid_to_va/dense',
            (va, va),
            ('model.head.va',) * 2,
            bias=False,
        )
        yield from norm('video_va_norm', 'hid_to_va/bn', va, 'model.head.va')
        yield from _dense(
            (*ours, 'video_vat'),
            f'{theirs}/va_to_vat/dense',
            (va, vat),
            ('model.head.va', 'model.head.vat'),
            bias=False,
        )
        yield from norm('video_vat_norm', 'va_to_vat/bn', vat, 'model.head.vat')
    if 'audio' in towers:
        yield from _dense((*ours, 'audio_va'), f'{theirs}/aud_to_va', *into('audio', 'va'))
    if 'text' in towers:
        yield from _dense((*ours, 'text_vat'), f'{theirs}/txt_to_vat', *into('text', 'vat'))


# ---- sizes
def kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """'tx_fac', 'ut_fac' or 'finetuned', by the names of the variables."""
    for name, prefix in (
        ('ut_fac', f'{ROOT}/_base_layer/unified_backbone/'),
        ('tx_fac', f'{ROOT}/_base_layer/'),
        ('finetuned', f'{ROOT}/_base/'),
    ):
        if any(k.startswith(prefix) for k in shapes):
            return name
    first = ', '.join(sorted(shapes)[:3]) or 'nothing'
    raise ConfigError(
        f'this is no VATT checkpoint: no variable starts with {ROOT}/_base_layer/ or {ROOT}/_base/; it has {first}'
    )


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`config.model`'s towers, encoder, shared and head, as far as the shapes tell them; dropout rates and inputs they do not.
    Raises ConfigError when a variable that tells a size is missing."""

    def size(key):
        if key not in shapes:
            raise ConfigError(
                f'the checkpoint has no variable {key}; without it its sizes are unknown'
            )
        return shapes[key]

    def stack(theirs, query='mha/q', mlp='feed_forward/mlp'):
        layers = {
            int(m[1])
            for m in (re.match(re.escape(theirs) + r'/layers/(\d+)/', k) for k in shapes)
            if m
        }
        width, inner = size(f'{theirs}/layers/0/{query}/kernel')
        heads = inner // HEAD_WIDTH if inner % HEAD_WIDTH == 0 else 1
        return {
            'layers': len(layers),
            'width': width,
            'mlp': size(f'{theirs}/layers/0/{mlp}/wi/kernel')[1],
            'heads': heads,
            'head_width': inner // heads,
        }

    def patches(theirs, name):
        *patch, _, _ = size(f'{theirs}/kernel')
        return {'name': name, 'patch': tuple(patch) if len(patch) > 1 else patch[0]}

    def tables(theirs, name):
        return tuple(
            size(f'{theirs}/{AXIS[axis]}_position_embeddings/embeddings')[0] for axis in AXES[name]
        )

    def own(theirs):
        name = next((n for n, key in PATCH.items() if f'{theirs}/{key}/kernel' in shapes), None)
        if name is None:
            raise ConfigError(
                f'{theirs} has no {" nor ".join(PATCH.values())}; a vit, wat or spt tower is wanted'
            )
        post = shapes.get(f'{theirs}/post_proj/kernel')
        return {
            **patches(f'{theirs}/{PATCH[name]}', name),
            **stack(f'{theirs}/tx'),
            'positions': tables(f'{theirs}/pos_embedding_lookup', name),
            'pre': f'{theirs}/pre_proj/kernel' in shapes,
            'post': post[1] if post else 0,
        }

    def text(theirs):
        vocab, word_width = size(f'{theirs}/embedding/embeddings')
        t = {'vocab': vocab, 'word_width': word_width}
        lm = f'{theirs}/base_lm'
        if f'{lm}/conv1d/kernel' in shapes:
            return {'name': 'linear', **t, 'width': size(f'{lm}/conv1d/kernel')[-1]}
        if f'{lm}/pos_embedding_lookup/temporal_position_embeddings/embeddings' in shapes:
            rows = size(f'{lm}/pos_embedding_lookup/temporal_position_embeddings/embeddings')[0]
            # Official bert_small is told by its second token: it has norms after the sums, whether or not its file holds a final norm.
            extra = f'{theirs}/agg_embedding' in shapes
            return {
                'name': 'bert',
                **t,
                **stack(f'{lm}/tx'),
                'positions': rows,
                'extra': extra,
                'pre_norm': not extra and f'{lm}/tx/final_layer_norm/gamma' in shapes,
            }
        buckets, heads = size(
            f'{lm}/layers/0/self_attention/attention/relative_attention_bias/embeddings'
        )
        s = stack(lm, 'self_attention/attention/q')
        inner = s['heads'] * s['head_width']
        return {
            'name': 't5',
            **t,
            **s,
            'heads': heads,
            'head_width': inner // heads,
            'buckets': buckets,
        }

    of = kind(shapes)
    if of == 'finetuned':
        t = own(f'{ROOT}/_base')
        return {
            'shared': False,
            'encoder': {},
            'towers': {TOWERS[t['name']][0]: t},
            'head': {'name': 'none'},
        }
    base = f'{ROOT}/_base_layer'
    head = f'{ROOT}/_head_layer/_bridge_heads/0'
    heads = {
        'name': 'fac',
        'va': size(f'{head}/aud_to_va/kernel')[1],
        'vat': size(f'{head}/txt_to_vat/kernel')[1],
    }
    if of == 'tx_fac':
        return {
            'shared': False,
            'encoder': {},
            'head': heads,
            'towers': {
                'video': own(f'{base}/vid_backbone/_base'),
                'audio': own(f'{base}/aud_backbone/_base'),
                'text': text(f'{base}/txt_backbone'),
            },
        }
    u = f'{base}/unified_backbone/unified_transformer'
    post = {m: size(f'{u}/post_proj/{m}/kernel')[1] for m in MODALITIES}
    vocab, word_width = size(f'{u}/raw_to_embeddings/text/embeddings')
    towers = {
        m: {
            **patches(f'{u}/raw_to_embeddings/{m}', name),
            'positions': tables(f'{u}/pos_embedding_lookup/{m}', name),
            'post': post[m],
        }
        for m, name in (('video', 'vit'), ('audio', 'wat'))
    }
    towers['text'] = {'name': 't5', 'vocab': vocab, 'word_width': word_width, 'post': post['text']}
    return {'shared': True, 'encoder': stack(f'{u}/tx'), 'towers': towers, 'head': heads}


def filled(config) -> dict[str, Any]:
    """`config.model` as a plain dict with every default of its towers and encoder written out, position tables included."""
    model = config.model.to_dict()
    if model['shared']:
        model['encoder'] = with_defaults(model['encoder'], SIZE, 'config.model.encoder').to_dict()
    for modality, given in model['towers'].items():
        where = f'config.model.towers.{modality}'
        t = with_defaults(
            given, TOWERS[choose(given['name'], TOWERS, f'{where}.name')][1], where
        ).to_dict()
        if t['name'] in AXES and not t['positions']:
            t['positions'] = tuple(
                n // p for n, p in zip(extent(modality, model['inputs']), patch_of(t), strict=True)
            )
        model['towers'][modality] = t
    return model


def differences(
    told: Mapping[str, Any], model: Mapping[str, Any], objective: Mapping[str, Any] | None = None
) -> list[str]:
    """Where `config.model` (filled) and a classifier's objective are not what `infer` told, as 'config.field=ours (checkpoint: theirs)'. Position
    tables are resized, so they do not count; nor does how an encoder's heads share their width, save T5's, whose bias has a column for each."""
    out = []
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    if objective is not None and objective['stream'].split('.')[0] not in told['towers']:
        out.append(
            f'config.objective.stream={objective["stream"]!r} (checkpoint: {", ".join(told["towers"])})'
        )

    def compare(where, theirs, mine):
        if theirs.get('name') != mine.get('name'):
            out.append(
                f'config.{where}.name={mine.get("name")!r} (checkpoint: {theirs.get("name")!r})'
            )
            return
        inner = lambda t: t['heads'] * t['head_width']
        same_heads = (
            'heads' in theirs
            and 'heads' in mine
            and inner(theirs) == inner(mine)
            and theirs.get('name') != 't5'
        )
        for field, value in theirs.items():
            if (
                field == 'positions'
                or field in ('heads', 'head_width')
                and same_heads
                or field not in mine
            ):
                continue
            if plain(mine[field]) != plain(value):
                out.append(f'config.{where}.{field}={mine[field]!r} (checkpoint: {plain(value)!r})')

    for modality, theirs in told['towers'].items():
        if modality in model['towers']:
            mine = model['towers'][modality]
            if (
                model['shared'] and not told['shared']
            ):  # fine-tuned: with a projection it comes from a shared encoder
                compare(
                    'model.encoder',
                    {k: v for k, v in theirs.items() if k in SIZE},
                    model['encoder'],
                )
                if not theirs['pre']:
                    out.append('config.model.shared=True (checkpoint: a tower without pre_proj)')
                theirs = {k: v for k, v in theirs.items() if k not in SIZE and k != 'pre'}
            compare(f'model.towers.{modality}', theirs, mine)
    if told['shared'] and model['shared']:
        compare('model.encoder', told['encoder'], model['encoder'])
    if model['head']['name'] != 'none' and told['head']['name'] != 'none':
        compare('model.head', told['head'], model['head'])
    return out


def bookkeeping(key: str) -> bool:
    return not key.startswith('model/') or '/.OPTIMIZER_SLOT/' in key


# ---- files
def open_checkpoint(prefix: str) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """({key without SUFFIX: shape}, reader of one key). Raises ConfigError when there is no such checkpoint or it cannot be read."""
    tf = _tensorflow()
    folder = pathlib.Path(prefix).parent
    if not pathlib.Path(f'{prefix}.index').is_file():
        near = (
            sorted(str(p.with_suffix('')) for p in folder.glob('*.index'))
            if folder.is_dir()
            else []
        )
        raise ConfigError(
            f'--checkpoint={prefix}: no file {prefix}.index; '
            + (
                f'there are {", ".join(near[:5])}'
                if near
                else f'folder {folder} holds no TensorFlow checkpoint'
            )
        )
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = {
            k: tuple(v)
            for k, v in reader.get_variable_to_shape_map().items()
            if k != '_CHECKPOINTABLE_OBJECT_GRAPH'
        }
    except Exception as error:
        raise ConfigError(
            f'--checkpoint={prefix} cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})'
        ) from error
    full = {k.removesuffix(SUFFIX): k for k in shapes}
    return {k.removesuffix(SUFFIX): v for k, v in shapes.items()}, lambda key: reader.get_tensor(
        full[key]
    )


def write_checkpoint(prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes variables as tf.train.Checkpoint does: same keys, and the object graph by which the official code restores them."""
    tf = _tensorflow()
    root = tf.train.Checkpoint()
    nodes: dict[tuple[str, ...], Any] = {(): root}

    def node(path: tuple[str, ...]):
        if path not in nodes:
            nodes[path] = tf.Module()
            setattr(node(path[:-1]), path[-1], nodes[path])
        return nodes[path]

    for key, value in arrays.items():
        *parents, last = key.split('/')
        setattr(node(tuple(parents)), last, tf.Variable(value))
    pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    root.write(prefix)


def _tensorflow():
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ConfigError(
            f'reading and writing TensorFlow checkpoints needs TensorFlow ({error}); install the data extra'
        ) from error
    tf.config.set_visible_devices([], 'GPU')
    return tf


# ---- whole checkpoints
def import_checkpoint(
    prefix: str,
    out: str | os.PathLike,
    config: ConfigDict | None = None,
    base: ConfigDict | None = None,
    vocabulary: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[ConfigDict, Report]:
    """Makes `out` a run folder that holds the checkpoint as step 0: load, --mode=eval, init_from and further training take it.

    config: what the checkpoint must fit; None: `base` (configs/default.py) with the sizes that the checkpoint tells. vocabulary: words in the
    order of the word table, <pad> first. classes: names of a fine-tuned model's classes. Optimizer slots are not taken: training goes
    on with fresh ones. Raises ConfigError when anything does not fit, before anything is written.
    """
    out = parameter_map.check_new(out)
    shapes, read = open_checkpoint(prefix)
    of = kind(shapes)
    if config is None:
        told = infer(shapes)
        odd = [
            where
            for where, t in [('encoder', told['encoder']), *told['towers'].items()]
            if t.get('name') != 't5' and t.get('head_width', HEAD_WIDTH) != HEAD_WIDTH
        ]
        if odd:
            raise ConfigError(
                f'--checkpoint={prefix}: queries of {", ".join(odd)} are not made of heads of {HEAD_WIDTH}, as official ones are, and '
                'a checkpoint does not tell how many heads there are; give a --config'
            )
        config = base.copy_and_resolve_references()
        config.name = f'VATT {of}'
        config.model.update({'shared': told['shared'], 'head': ConfigDict(told['head'])})
        config.model.towers, config.model.encoder = (
            ConfigDict(told['towers']),
            ConfigDict(told['encoder']),
        )
        if any(t.name == 'spt' for t in config.model.towers.values()):
            config.model.inputs.audio.mel = config.model.inputs.audio.get('mel') or ConfigDict(
                spectrogram.DEFAULTS
            )
        if of == 'finetuned':
            modality = next(iter(told['towers']))
            config.objective = ConfigDict(
                {'name': 'classification', 'stream': modality, 'label': 'class'}
            )
    objective, labels, count = None, {}, 0
    if of == 'finetuned':
        if config.objective.name != 'classification':
            raise ConfigError(
                f'--checkpoint={prefix} is fine-tuned (it has {ROOT}/_ops/cls) and config.objective.name is '
                f'{config.objective.name!r}; choose a config of configs/vatt_finetune.py'
            )
        if config.model.head.name != 'none':
            raise ConfigError(
                f'--checkpoint={prefix} is fine-tuned and has no common spaces; set config.model.head={{"name": "none"}}'
            )
        objective = with_defaults(config.objective, classification.DEFAULTS, 'config.objective')
        if f'{ROOT}/_ops/cls/bias' not in shapes:
            raise ConfigError(
                f'--checkpoint={prefix} lacks {ROOT}/_ops/cls/bias, so the number of its classes is unknown'
            )
        count = shapes[f'{ROOT}/_ops/cls/bias'][0]
        if classes is not None and len(classes) != count:
            raise ConfigError(
                f'--classes has {len(classes)} names and the checkpoint {count} classes'
            )
        labels = {
            objective.label: list(classes)
            if classes is not None
            else [str(i) for i in range(count)]
        }
    elif config.objective.name == 'classification':
        raise ConfigError(
            f'--checkpoint={prefix} is pretrained ({of}) and config.objective.name is classification; choose a config of '
            'configs/vatt.py here, and fine-tune with --config.init_from'
        )
    config.compute_dtype = (
        'float32'  # what the release is evaluated in; published training configs say bfloat16
    )
    model = filled(config)
    if model['shared'] != (of == 'ut_fac') and of != 'finetuned':
        raise ConfigError(
            f'--checkpoint={prefix} is {of}, and config.model.shared={model["shared"]} makes '
            f'{"a modality-agnostic" if model["shared"] else "a modality-specific"} model; choose another config'
        )
    entries = list(layout(model, objective, count))
    state = parameter_map.abstract_state(config, labels)
    try:
        unlike = differences(infer(shapes), model, objective)
    except ConfigError:  # a variable that tells a size is missing: to_ours lists it
        unlike = []
    arrays, report = parameter_map.to_ours(
        read,
        shapes,
        entries,
        f'--checkpoint={prefix}',
        parameter_map.variables(state),
        bookkeeping,
        unlike,
    )
    parameter_map.write_run(
        out,
        config,
        state,
        arrays,
        {
            'labels': labels,
            'sources': [],
            'imported': {'from': pathlib.Path(prefix).name, 'kind': of},
        },
        vocabulary,
    )
    return config, report


def export_checkpoint(run: str | os.PathLike, prefix: str) -> int:
    """Writes the newest model of a run (or one checkpoint folder) as an official checkpoint of weights; returns the number of variables."""
    config, info, ours = parameter_map.read_run(run)
    objective, classes = None, 0
    if config.objective.name == 'classification':
        objective = with_defaults(config.objective, classification.DEFAULTS, 'config.objective')
        classes = len(info['labels'][objective.label])
    entries = list(layout(filled(config), objective, classes))
    parameter_map.check_same(run, ours, entries)
    write_checkpoint(prefix, parameter_map.to_theirs(ours, entries))
    return len(entries)
