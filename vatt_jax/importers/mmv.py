"""Official MMV checkpoints (JAX and Haiku: a dill pickle of `params` and `state`, both {module path: {name: array}}) to our parameters, and back.

The names of the two layouts follow from each other (`official`), so the table comes from our own tree. Haiku's `~` (what a constructor made, rather
than a call) is passed over in reading, as is whether batch norms are cross-replica ones.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map, pickles
from vatt_jax.importers.parameter_map import Entry, Path, Report
from vatt_jax.models import presets

ROOT = 'text_audio_video'
HEADS = f'{ROOT}/~_get_pair_embedding_heads'
NORM = '__cross_replica_batch_norm'
STEMS = {'conv_1a': 'Conv2d_1a_7x7', 'conv_2b': 'Conv2d_2b_1x1', 'conv_2c': 'Conv2d_2c_3x3'}
BRANCHES = {
    'b0': 'Branch_0_Conv2d_0a_1x1',
    'b1_in': 'Branch_1_Conv2d_0a_1x1',
    'b1': 'Branch_1_Conv2d_0b_3x3',
    'b2_in': 'Branch_2_Conv2d_0a_1x1',
    'b2': 'Branch_2_Conv2d_0b_3x3',
    'b3': 'Branch_3_Conv2d_0b_1x1',
}
# our layer of the head -> theirs, and the fields of `config.model` behind its dimensions
LINEAR = {
    'video_va_hidden': (
        'vid2audio_embd/final_projection_inner',
        ('towers.video.multiplier', 'head.va'),
    ),
    'video_va': ('vid2audio_embd/final_projection', ('head.va', 'head.va')),
    'va_to_vat': ('vis_embd/final_projection', ('head.va', 'head.vat')),
    'audio_va': ('audio_embd/final_projection', ('towers.audio.multiplier', 'head.va')),
    'text_vat': ('txt_embd/final_projection', ('towers.text.width', 'head.vat')),
}
NORMS = {
    'video_va_hidden_norm': (f'vid2audio_embd/{NORM}', 'head.va'),
    'video_va_norm': (f'vid2audio_embd/{NORM}_1', 'head.va'),
    'va_to_vat_norm': (f'vis_embd/{NORM}', 'head.vat'),
}
DECAY = 0.9  # of their running statistics


# ---- names
def _numbered(name: str, i: int | str) -> str:
    """Haiku's name of the i-th module of one kind."""
    return f'{name}_{i}' if int(i) else name


def official(ours: Path) -> tuple[str, str, int] | None:
    """(module path, kind of layer: conv | linear | embed | norm, axes of a kernel's or a batch norm's array) of the layer that one of our paths
    belongs to; None where the official layout has no such layer."""
    _, part, *rest = ours
    layer = '/'.join(rest[:-1])
    if part == 'head':
        if layer in LINEAR:
            return f'{HEADS}/{LINEAR[layer][0]}', 'linear', 2
        return (f'{HEADS}/{NORMS[layer][0]}', 'norm', 2) if layer in NORMS else None
    if part == 'nets_text':
        return {
            'projection': (f'{ROOT}/text_module/~/text_conv1', 'conv', 3),
            '': (f'{ROOT}/text_module/~/embed', 'embed', 2),
        }.get(layer)
    if part == 'nets_video' and rest[0] == 'resnet':
        return _resnet(
            layer.removeprefix('resnet/'),
            f'{ROOT}/visual_module/~/TSMResNetV2',
            'tsm_resnet_stem',
            r'tsm_resnet_unit_\1/block_\2',
            '',
        )
    if part == 'nets_audio' and rest[0] == 'resnet':
        return _resnet(
            layer.removeprefix('resnet/'),
            f'{ROOT}/audio_module/~/res_net_v2',
            '~/initial_conv',
            r'~/block_group_\1/block_\2',
            '~/',
        )
    if part == 'nets_video':
        return _s3d(layer)
    return None


def _s3d(layer: str) -> tuple[str, str, int] | None:
    m = re.fullmatch(r'(?:mixed_(\w\w)/)?(\w+)/(?:conv_(\d)/(conv|norm)|gate/dense)', layer)
    if m is None:
        return None
    block, unit, i, of = m.groups()
    unit = STEMS.get(unit) if block is None else f'Mixed_{block}/{BRANCHES.get(unit)}'
    at = f'{ROOT}/visual_module/~/S3D/{unit}'
    if of is None:
        return f'{at}/self_gating', 'linear', 2
    return (
        (f'{at}/~/{_numbered("conv3_d", i)}', 'conv', 5)
        if of == 'conv'
        else (f'{at}/{_numbered(NORM, i)}', 'norm', 5)
    )


def _resnet(layer: str, at: str, stem: str, block: str, made: str) -> tuple[str, str, int] | None:
    """made: what stands before the name of a block's convolutions."""
    if layer in ('stem', 'norm'):
        return (f'{at}/{stem}', 'conv', 4) if layer == 'stem' else (f'{at}/{NORM}', 'norm', 4)
    m = re.fullmatch(r'unit_(\d)_block_(\d+)/(?:norm_(\d)|(conv_\d|shortcut))', layer)
    if m is None:
        return None
    where = f'{at}/' + re.sub(r'(\d)_(\d+)', block, f'{m[1]}_{m[2]}')
    if m[3] is not None:
        return f'{where}/{_numbered(NORM, m[3])}', 'norm', 4
    return f'{where}/{made}{"shortcut_conv" if m[4] == "shortcut" else m[4]}', 'conv', 4


LEAVES = {
    'kernel': 'w',
    'bias': 'b',
    'word_table': 'embeddings',
    'mean': '~/mean_ema/average',
    'var': '~/var_ema/average',
    'count': '~/mean_ema/counter',
}


def layout(variables: Mapping[Path, Any]) -> list[Entry]:
    """Every variable of ours that the official layout has. variables: our paths -> anything with a shape."""
    out = []
    for ours, like in variables.items():
        found = official(ours)
        if found is None:
            continue
        module, kind, axes = found
        leaf, shape = ours[-1], tuple(like.shape)
        if kind == 'norm' and leaf in ('scale', 'bias'):
            name = {'scale': 'scale', 'bias': 'offset'}[leaf]
        else:
            name = LEAVES[leaf]
        if kind == 'norm' and leaf != 'count':
            shape = (1,) * (axes - 1) + shape
        elif leaf == 'kernel':
            shape = (1,) * (axes - len(shape)) + shape
        out.append(
            Entry(
                ours,
                None,
                f'{"state" if ours[0] == "batch_stats" else "params"}/{module}/{name}',
                shape,
                _fields(ours, len(shape)),
            )
        )
    return out


def _fields(ours: Path, dimensions: int) -> tuple[str, ...]:
    """The config field behind each dimension."""
    part, layer, leaf = ours[1], '/'.join(ours[2:-1]), ours[-1]
    if part == 'head':
        fields = [
            f'model.{f}' for f in (LINEAR[layer][1] if layer in LINEAR else (NORMS[layer][1],))
        ]
    elif part == 'nets_text':
        word, width = 'model.towers.text.word_width', 'model.towers.text.width'
        fields = ['model.towers.text.vocab', word] if leaf == 'word_table' else [word, width]
    else:
        tower = f'model.towers.{part.removeprefix("nets_")}'
        stem = layer.startswith(
            'conv_1a/conv_0/conv'
        )  # tells pixels from blocks of them by its channels and its size
        fields = (
            [f'{tower}.space_to_depth'] * 4 + [f'{tower}.multiplier']
            if stem
            else [f'{tower}.multiplier'] * 2
        )
    return tuple(([''] * dimensions + fields)[-dimensions:]) if dimensions else ()


# ---- files
def _canonical(key: str) -> str:
    """A key without what differs between builds of the same network."""
    key = '/'.join(p for p in key.split('/') if p != '~')
    return re.sub(r'(/)_*(?:cross_replica_)?batch_norm', rf'\1{NORM}', key)


def open_checkpoint(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{'params/<module>/<name>' | 'state/…': array}, in canonical spelling. Raises ConfigError when it is no MMV checkpoint."""
    tree = pickles.read(path)
    if not (isinstance(tree, dict) and {'params', 'state'} <= set(tree)):
        has = (
            f'a dict of {", ".join(map(repr, list(tree)[:8])) or "nothing"}'
            if isinstance(tree, dict)
            else f'a {type(tree).__name__}'
        )
        raise ConfigError(
            f'--checkpoint={path} holds {has}; an MMV checkpoint is a dict with params and state'
        )
    out: dict[str, np.ndarray] = {}
    for group in ('params', 'state'):
        modules = tree[group]
        if not isinstance(modules, dict) or not all(isinstance(v, dict) for v in modules.values()):
            raise ConfigError(
                f'--checkpoint={path}: {group} is no mapping of module paths to arrays by name'
            )
        for module, arrays in modules.items():
            for name, value in arrays.items():
                if not isinstance(value, (np.ndarray, np.generic, int, float)):
                    raise ConfigError(
                        f'--checkpoint={path}: {group} {module} {name} is a {type(value).__name__}; an array is wanted'
                    )
                key = _canonical(f'{group}/{module}/{name}')
                if key in out:
                    raise ConfigError(f'--checkpoint={path} has {key} twice')
                out[key] = np.asarray(value)
    if not any(k.startswith(f'params/{ROOT}/') for k in out):
        raise ConfigError(
            f'--checkpoint={path} is no MMV checkpoint: no module path starts with {ROOT}/; it has {", ".join(sorted(out)[:3])}'
        )
    return out


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """`config.model`'s towers and head, as the shapes (by canonical key) tell them. Raises ConfigError when a variable that tells is missing."""

    def size(module, name='w'):
        key = _canonical(f'params/{ROOT}/{module}/{name}')
        if key not in shapes:
            raise ConfigError(f'the checkpoint has no {key}; without it its sizes are unknown')
        return shapes[key]

    has = lambda module: any(k.startswith(_canonical(f'params/{ROOT}/{module}/')) for k in shapes)
    scale = lambda width: width / 64
    towers: dict[str, Any] = {}
    if has('visual_module/S3D'):
        stem = size('visual_module/S3D/Conv2d_1a_7x7/conv3_d')
        towers['video'] = presets.tower(
            's3d', space_to_depth=stem[3] != 3, multiplier=scale(stem[4])
        )
    elif has('visual_module/TSMResNetV2'):
        towers['video'] = presets.tower(
            'tsm50', multiplier=scale(size('visual_module/TSMResNetV2/tsm_resnet_stem')[3])
        )
    else:
        raise ConfigError(
            'the checkpoint has neither visual_module/S3D nor visual_module/TSMResNetV2'
        )
    if has('audio_module'):
        net = 'audio_module/res_net_v2'
        depth = (
            50
            if has(f'{net}/block_group_0/block_0/conv_2')
            else 34
            if has(f'{net}/block_group_0/block_2')
            else 18
        )
        towers['audio'] = presets.tower(
            'resnet2d_v2_50', depth=depth, multiplier=scale(size(f'{net}/initial_conv')[3])
        )
    if has('text_module'):
        vocab, word_width = size('text_module/embed', 'embeddings')
        towers['text'] = presets.tower(
            'mmv_words', vocab=vocab, word_width=word_width, width=size('text_module/text_conv1')[2]
        )
    head = {'name': presets.MMV_GRAPHS['fac'][0]}
    heads = '~_get_pair_embedding_heads'
    if 'audio' in towers:
        head['va'] = size(f'{heads}/audio_embd/final_projection')[1]
    if 'text' in towers:
        head |= {
            'va': size(f'{heads}/vis_embd/final_projection')[0],
            'vat': size(f'{heads}/txt_embd/final_projection')[1],
        }
    return {'towers': towers, 'head': head}


def bookkeeping(key: str) -> bool:
    """Running sums and counters behind the averages."""
    return key.endswith(('_ema/hidden', '_ema/counter'))


def import_checkpoint(
    path: str | os.PathLike,
    out: str | os.PathLike,
    config: ConfigDict | None = None,
    base: ConfigDict | None = None,
    vocabulary: Sequence[str] | None = None,
) -> tuple[ConfigDict, Report]:
    """Makes `out` a run folder that holds the checkpoint as step 0: load, --mode=eval, init_from and further training take it.

    config: what the checkpoint must fit; it may want fewer modalities. None: `base` (configs/default.py) with the sizes that the checkpoint tells.
    vocabulary: words in the order of the word table, <pad> first. Running statistics are the `average`s, with the number of their batches.
    Raises ConfigError when anything does not fit, before anything is written.
    """
    out = parameter_map.check_new(out)
    arrays = open_checkpoint(path)
    shapes = {k: v.shape for k, v in arrays.items()}
    if config is None:
        told = infer(shapes)
        modalities = {
            frozenset({'video', *m}): n
            for n, m in (('va', ['audio']), ('vt', ['text']), ('vat', ['audio', 'text']))
        }
        fields, pairs = presets.mmv('s3d', 'fac', modalities.get(frozenset(told['towers']), 'vat'))
        config = base.copy_and_resolve_references()
        config.name = f'MMV {told["towers"]["video"]["name"]}'
        config.model.inputs.video.range = fields.inputs.video.range
        config.model.inputs.audio.mel = (
            config.model.inputs.audio.get('mel') or fields.inputs.audio.mel
        )
        config.model.towers, config.model.head = (
            ConfigDict(told['towers']),
            ConfigDict(told['head']),
        )
        config.objective = ConfigDict(
            {'name': 'contrastive', 'pairs': pairs, 'temperature': 0.07, 'form': 'asymmetric'}
        )
    _check_graph(config)
    config.compute_dtype = (
        'float32'  # what the release is evaluated in; published training configs say bfloat16
    )
    state = parameter_map.abstract_state(config, {})
    entries = layout(parameter_map.variables(state))
    spelled = [Entry(e.ours, e.layer, _canonical(e.theirs), e.shape, e.fields) for e in entries]
    ours, report = parameter_map.to_ours(
        arrays.__getitem__,
        shapes,
        spelled,
        f'--checkpoint={path}',
        parameter_map.variables(state),
        bookkeeping,
    )
    parameter_map.write_run(
        out,
        config,
        state,
        ours,
        {'labels': {}, 'sources': [], 'imported': {'from': pathlib.Path(path).name, 'kind': 'mmv'}},
        vocabulary,
    )
    return config, report


def _check_graph(config) -> None:
    known = [presets.MMV_GRAPHS[g][0] for g in ('fac', 'fac_plain')]
    if config.model.head.name not in known:
        raise ConfigError(
            f'config.model.head.name={config.model.head.name!r}: MMV checkpoints were released with the graph {known[0]} (its weights '
            f'also fit {known[1]}); choose a config such as configs/mmv.py:s3d_fac_vat'
        )


def export_checkpoint(run: str | os.PathLike, path: str | os.PathLike) -> int:
    """Writes the newest model of a run (or one checkpoint folder) as an official checkpoint, a plain pickle; returns the number of variables.

    The running sums (`hidden`) are those that the averages come from. The two heads between sound and words, which FAC does not use, are not made.
    """
    config, _, ours = parameter_map.read_run(run)
    _check_graph(config)
    entries = layout(ours)
    parameter_map.check_same(run, ours, entries)
    tree: dict[str, dict[str, dict[str, np.ndarray]]] = {'params': {}, 'state': {}}
    theirs = parameter_map.to_theirs(ours, entries)
    for key, value in theirs.items():
        group, rest = key.split('/', 1)
        module, name = rest.rsplit('/', 1)
        tree[group].setdefault(module, {})[name] = value
    for module, of in tree['state'].items():
        count = np.asarray(theirs[f'state/{module.rsplit("/", 1)[0]}/mean_ema/counter'], np.int32)
        of |= {
            'counter': count,
            'hidden': (of['average'] * (1 - DECAY ** float(count))).astype(np.float32),
        }
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        pickle.dump(tree, file, 4)
    return len(entries)
