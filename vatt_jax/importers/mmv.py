"""Official MMV checkpoints (JAX and Haiku) to our parameters, and back.

They are dill pickles of `params` and `state`, both {module path: {name: array}}. The names of the
two layouts follow from each other (`official`), so the table comes from our own tree. Haiku's `~`
(what a constructor made, rather than a call) is passed over in reading, as is whether batch norms
are cross-replica ones.
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
# S3D: our unit -> theirs, before the inception blocks and within one.
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
# our leaf -> theirs; a batch norm's scale and bias are in NORM_LEAVES
LEAVES = {
    'kernel': 'w',
    'bias': 'b',
    'word_table': 'embeddings',
    'mean': '~/mean_ema/average',
    'var': '~/var_ema/average',
    # Mean and variance have a counter each, which are always equal. Ours is one.
    'count': '~/mean_ema/counter',
}
NORM_LEAVES = {'scale': 'scale', 'bias': 'offset'}
DECAY = 0.9  # of their running statistics
STEM_WIDTH = 64  # channels of every published stem, where multiplier = 1

# (module path, kind of layer, number of axes of a kernel or of a batch norm's arrays)
Module = tuple[str, str, int]


# ---- names
def _numbered(name: str, i: int | str) -> str:
    """Haiku's name of the i-th module of one kind."""
    return f'{name}_{i}' if int(i) else name


def official(ours: Path) -> Module | None:
    """Find the official layer that one of our paths belongs to.

    Args:
        ours: path of a variable.

    Returns:
        Its module path, its kind (conv | linear | embed | norm) and the number of axes of a
        kernel's or a batch norm's array; None where the official layout has no such layer.
    """
    _, part, *rest = ours
    layer = '/'.join(rest[:-1])
    if part == 'head':
        return _head(layer)
    if part == 'nets_text':
        return _text(layer)
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


def _head(layer: str) -> Module | None:
    if layer in LINEAR:
        return f'{HEADS}/{LINEAR[layer][0]}', 'linear', 2
    if layer in NORMS:
        return f'{HEADS}/{NORMS[layer][0]}', 'norm', 2
    return None


def _text(layer: str) -> Module | None:
    if layer == 'projection':
        # A convolution over single words, that is, a linear layer: [1, word width, D].
        return f'{ROOT}/text_module/~/text_conv1', 'conv', 3
    if layer == '':
        # The word table lies at the top of our tower.
        return f'{ROOT}/text_module/~/embed', 'embed', 2
    return None


def _s3d(layer: str) -> Module | None:
    # mixed_4b/b1_in/conv_0/norm: block, unit, number of the convolution, which layer of it. A unit
    # has one convolution, or a spatial and a temporal one, and at its end may have a gate.
    match = re.fullmatch(r'(?:mixed_(\w\w)/)?(\w+)/(?:conv_(\d)/(conv|norm)|gate/dense)', layer)
    if match is None:
        return None
    block, unit, i, layer_kind = match.groups()
    if block is None:
        official_unit = STEMS.get(unit)
    else:
        official_unit = f'Mixed_{block}/{BRANCHES.get(unit)}'
    prefix = f'{ROOT}/visual_module/~/S3D/{official_unit}'
    if layer_kind is None:
        return f'{prefix}/self_gating', 'linear', 2
    # Their convolutions are made by the constructor (`~`), their norms by the call.
    if layer_kind == 'conv':
        return f'{prefix}/~/{_numbered("conv3_d", i)}', 'conv', 5
    return f'{prefix}/{_numbered(NORM, i)}', 'norm', 5


def _resnet(layer: str, prefix: str, stem: str, block: str, constructed: str) -> Module | None:
    """A layer of a ResNet, which the two towers name differently.

    Args:
        layer: ours, within the ResNet.
        prefix: module path of the network.
        stem: name of the first convolution.
        block: name of a residual block, with group references to the unit and the block.
        constructed: what stands before the name of a block's convolutions.
    """
    if layer == 'stem':
        return f'{prefix}/{stem}', 'conv', 4
    if layer == 'norm':
        return f'{prefix}/{NORM}', 'norm', 4
    match = re.fullmatch(r'unit_(\d)_block_(\d+)/(?:norm_(\d)|(conv_\d|shortcut))', layer)
    if match is None:
        return None
    unit, block_number, norm, convolution = match.groups()
    block_path = f'{prefix}/' + re.sub(r'(\d)_(\d+)', block, f'{unit}_{block_number}')
    if norm is not None:
        return f'{block_path}/{_numbered(NORM, norm)}', 'norm', 4
    if convolution == 'shortcut':
        convolution = 'shortcut_conv'
    return f'{block_path}/{constructed}{convolution}', 'conv', 4


def layout(variables: Mapping[Path, Any]) -> list[Entry]:
    """List every variable of ours that the official layout has.

    Args:
        variables: our paths -> anything with a shape.
    """
    entries = []
    for ours, like in variables.items():
        module = official(ours)
        if module is None:
            continue
        module_path, kind, axes = module
        leaf = ours[-1]
        shape = tuple(like.shape)
        if kind == 'norm' and leaf in NORM_LEAVES:
            name = NORM_LEAVES[leaf]
        else:
            name = LEAVES[leaf]
        # Haiku's batch norms hold [1 … 1 C], and its kernels have axes of length 1 that ours
        # leave out.
        if kind == 'norm' and leaf != 'count':
            shape = (1,) * (axes - 1) + shape
        elif leaf == 'kernel':
            shape = (1,) * (axes - len(shape)) + shape
        group = 'state' if ours[0] == 'batch_stats' else 'params'
        key = f'{group}/{module_path}/{name}'
        entries.append(Entry(ours, None, key, shape, _fields(ours, len(shape))))
    return entries


def _fields(ours: Path, dimensions: int) -> tuple[str, ...]:
    """The config field behind each dimension."""
    if dimensions == 0:
        return ()
    part, leaf = ours[1], ours[-1]
    layer = '/'.join(ours[2:-1])
    if part == 'head':
        names = LINEAR[layer][1] if layer in LINEAR else (NORMS[layer][1],)
        fields = [f'model.{name}' for name in names]
    elif part == 'nets_text':
        word_width, width = 'model.towers.text.word_width', 'model.towers.text.width'
        if leaf == 'word_table':
            fields = ['model.towers.text.vocab', word_width]
        else:
            fields = [word_width, width]
    else:
        tower = f'model.towers.{part.removeprefix("nets_")}'
        # S3D's stem sees pixels or blocks of them: its kernel's size and channels say which.
        if layer.startswith('conv_1a/conv_0/conv'):
            fields = [f'{tower}.space_to_depth'] * 4 + [f'{tower}.multiplier']
        else:
            fields = [f'{tower}.multiplier'] * 2
    # The fields are those of the last dimensions (channels); the first are kernel sizes, or 1. A
    # vector has the last one.
    return tuple(([''] * dimensions + fields)[-dimensions:])


# ---- files
def _canonical(key: str) -> str:
    """A key without what differs between builds of the same network."""
    key = '/'.join(part for part in key.split('/') if part != '~')
    return re.sub(r'(/)_*(?:cross_replica_)?batch_norm', rf'\1{NORM}', key)


def open_checkpoint(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read an MMV checkpoint.

    Returns:
        {'params/<module>/<name>' | 'state/…': array}, in canonical spelling.

    Raises:
        ConfigError: it is no MMV checkpoint.
    """
    tree = pickles.read(path)
    # Other entries, such as a step, are ignored.
    if not (isinstance(tree, dict) and {'params', 'state'} <= set(tree)):
        raise ConfigError(
            f'--checkpoint={path} holds {_described(tree)}; an MMV checkpoint is a dict with '
            'params and state'
        )
    arrays: dict[str, np.ndarray] = {}
    for group in ('params', 'state'):
        modules = tree[group]
        if not isinstance(modules, dict) or not all(isinstance(v, dict) for v in modules.values()):
            raise ConfigError(
                f'--checkpoint={path}: {group}: expected a mapping of module paths to '
                'arrays by name'
            )
        for module, module_arrays in modules.items():
            for name, value in module_arrays.items():
                if not isinstance(value, (np.ndarray, np.generic, int, float)):
                    raise ConfigError(
                        f'--checkpoint={path}: {group} {module} {name}: expected an array, '
                        f'got a {type(value).__name__}'
                    )
                key = _canonical(f'{group}/{module}/{name}')
                # Two spellings of one variable: there is no telling which is meant.
                if key in arrays:
                    raise ConfigError(f'--checkpoint={path} has {key} twice')
                arrays[key] = np.asarray(value)
    if not any(key.startswith(f'params/{ROOT}/') for key in arrays):
        raise ConfigError(
            f'--checkpoint={path} is no MMV checkpoint: no module path starts with {ROOT}/; it has '
            f'{", ".join(sorted(arrays)[:3])}'
        )
    return arrays


def _described(tree: Any) -> str:
    """What a file holds instead, in a few words."""
    if not isinstance(tree, dict):
        return f'a {type(tree).__name__}'
    keys = ', '.join(map(repr, list(tree)[:8]))
    return f'a dict of {keys or "nothing"}'


def infer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer towers and head of `config.model` from the shapes of a checkpoint.

    Args:
        shapes: {canonical key: shape}.

    Returns:
        The fields `towers` and `head` of `config.model`.

    Raises:
        ConfigError: a variable whose shape is needed is missing.
    """
    reader = _SizeReader(shapes)
    towers: dict[str, Any] = {'video': reader.video_tower()}
    # A model of two modalities lacks the third tower.
    if reader.has('audio_module'):
        towers['audio'] = reader.audio_tower()
    if reader.has('text_module'):
        towers['text'] = reader.text_tower()

    # The released graph. Shapes cannot tell it from `fac_plain`, which lacks a ReLU.
    head: dict[str, Any] = {'name': presets.MMV_GRAPHS['fac'][0]}
    heads = '~_get_pair_embedding_heads'
    if 'audio' in towers:
        head['va'] = reader.shape(f'{heads}/audio_embd/final_projection')[1]
    if 'text' in towers:
        # From the fine space to the coarse one: there without audio, too.
        head['va'] = reader.shape(f'{heads}/vis_embd/final_projection')[0]
        head['vat'] = reader.shape(f'{heads}/txt_embd/final_projection')[1]
    return {'towers': towers, 'head': head}


class _SizeReader:
    """Reads sizes of towers off the shapes of their variables."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, module: str, name: str = 'w') -> tuple[int, ...]:
        key = _canonical(f'params/{ROOT}/{module}/{name}')
        if key not in self.shapes:
            raise ConfigError(f'the checkpoint has no {key}; without it its sizes are unknown')
        return self.shapes[key]

    def has(self, module: str) -> bool:
        prefix = _canonical(f'params/{ROOT}/{module}/')
        return any(key.startswith(prefix) for key in self.shapes)

    def video_tower(self) -> dict[str, Any]:
        if self.has('visual_module/S3D'):
            stem = self.shape('visual_module/S3D/Conv2d_1a_7x7/conv3_d')  # [T H W C D]
            # 24 channels: blocks of 2 x 2 x 2 RGB pixels.
            return presets.tower(
                's3d', space_to_depth=stem[3] != 3, multiplier=stem[4] / STEM_WIDTH
            )
        if self.has('visual_module/TSMResNetV2'):
            stem = self.shape('visual_module/TSMResNetV2/tsm_resnet_stem')  # [H W C D]
            return presets.tower('tsm50', multiplier=stem[3] / STEM_WIDTH)
        raise ConfigError(
            'the checkpoint has neither visual_module/S3D nor visual_module/TSMResNetV2'
        )

    def audio_tower(self) -> dict[str, Any]:
        network = 'audio_module/res_net_v2'
        # Only bottleneck blocks have a third convolution. Of the others, the first unit has three
        # blocks in ResNet-34 and two in ResNet-18.
        if self.has(f'{network}/block_group_0/block_0/conv_2'):
            depth = 50
        elif self.has(f'{network}/block_group_0/block_2'):
            depth = 34
        else:
            depth = 18
        stem = self.shape(f'{network}/initial_conv')  # [H W C D]
        return presets.tower('resnet2d_v2_50', depth=depth, multiplier=stem[3] / STEM_WIDTH)

    def text_tower(self) -> dict[str, Any]:
        vocab, word_width = self.shape('text_module/embed', 'embeddings')
        width = self.shape('text_module/text_conv1')[2]  # [1, word width, D]
        return presets.tower('mmv_words', vocab=vocab, word_width=word_width, width=width)


def bookkeeping(key: str) -> bool:
    """Whether a variable is a running sum or a counter behind an average."""
    return key.endswith(('_ema/hidden', '_ema/counter'))


# ---- whole checkpoints
def import_checkpoint(
    path: str | os.PathLike,
    out: str | os.PathLike,
    config: ConfigDict | None = None,
    base: ConfigDict | None = None,
    vocabulary: Sequence[str] | None = None,
) -> tuple[ConfigDict, Report]:
    """Make a run folder that holds an official checkpoint as step 0.

    `vatt_jax.load`, --mode=eval, init_from and further training take it. Running statistics are the
    `average`s, with the number of their batches.

    Args:
        path: the checkpoint.
        out: the run folder to make.
        config: what the checkpoint must fit; it may have fewer modalities. None: `base` with the
            sizes of the checkpoint.
        base: configs/default.py; needed where `config` is None.
        vocabulary: words in the order of the word table, <pad> first.

    Returns:
        The config of the run, and what was read, resized and left out.

    Raises:
        ConfigError: anything does not fit; nothing is written then.
    """
    out = parameter_map.check_new(out)
    arrays = open_checkpoint(path)
    shapes = {key: array.shape for key, array in arrays.items()}
    if config is None:
        config = _inferred_config(shapes, base)
    _check_graph(config)
    # What the release is evaluated in; published training configs say bfloat16.
    config.compute_dtype = 'float32'

    state = parameter_map.abstract_state(config, {})
    variables = parameter_map.variables(state)
    # The keys of `arrays` are canonical, so those of the table must be, too.
    entries = []
    for entry in layout(variables):
        key = _canonical(entry.theirs)
        entries.append(Entry(entry.ours, entry.layer, key, entry.shape, entry.fields))
    ours, report = parameter_map.to_ours(
        arrays.__getitem__, shapes, entries, f'--checkpoint={path}', variables, bookkeeping
    )
    info = {
        'labels': {},
        'sources': [],
        'imported': {'from': pathlib.Path(path).name, 'kind': 'mmv'},
    }
    parameter_map.write_run(out, config, state, ours, info, vocabulary)
    return config, report


def _inferred_config(shapes: Mapping[str, tuple[int, ...]], base: ConfigDict | None) -> ConfigDict:
    """The default config with the towers and the head of the checkpoint."""
    assert base is not None, 'base is needed where no config is given'
    inferred = infer(shapes)
    modalities = _modalities(inferred['towers'])
    # Only its inputs and pairs are used: towers and head come from the checkpoint.
    fields, pairs = presets.mmv('s3d', 'fac', modalities)

    config = base.copy_and_resolve_references()
    config.name = f'MMV {inferred["towers"]["video"]["name"]}'
    config.model.inputs.video.range = fields.inputs.video.range
    mel = config.model.inputs.audio.get('mel')
    config.model.inputs.audio.mel = mel or fields.inputs.audio.mel
    config.model.towers = ConfigDict(inferred['towers'])
    config.model.head = ConfigDict(inferred['head'])
    # A checkpoint does not record its objective; this one is for further training.
    config.objective = ConfigDict(
        {'name': 'contrastive', 'pairs': pairs, 'temperature': 0.07, 'form': 'asymmetric'}
    )
    return config


def _modalities(towers: Mapping[str, Any]) -> str:
    """The key of presets.MMV_SUBSETS for these towers."""
    if set(towers) == {'video', 'audio'}:
        return 'va'
    if set(towers) == {'video', 'text'}:
        return 'vt'
    return 'vat'


def _check_graph(config: ConfigDict) -> None:
    # The two graphs have the same variables; they differ by a ReLU between the spaces.
    known = [presets.MMV_GRAPHS[graph][0] for graph in ('fac', 'fac_plain')]
    name = config.model.head.name
    if name not in known:
        raise ConfigError(
            f'config.model.head.name={name!r}: MMV checkpoints were released with the graph '
            f'{known[0]} (its weights also fit {known[1]}); choose a config such as '
            'configs/mmv.py:s3d_fac_vat'
        )


def export_checkpoint(run: str | os.PathLike, path: str | os.PathLike) -> int:
    """Write a model of ours as an official checkpoint, a plain pickle.

    The running sums (`hidden`) are those that the averages come from. The two heads between sound
    and words, which FAC does not use, are not made.

    Args:
        run: a run folder, of which the newest model is taken, or one checkpoint folder.
        path: the file to write.

    Returns:
        The number of variables.

    Raises:
        ConfigError: the model has parts that the official layout has not.
    """
    config, _, ours = parameter_map.read_run(run)
    _check_graph(config)
    entries = layout(ours)
    parameter_map.check_same(run, ours, entries)
    theirs = parameter_map.to_theirs(ours, entries)

    tree: dict[str, dict[str, dict[str, np.ndarray]]] = {'params': {}, 'state': {}}
    for key, value in theirs.items():
        group, rest = key.split('/', 1)
        module, name = rest.rsplit('/', 1)
        tree[group].setdefault(module, {})[name] = value
    # Haiku's ExponentialMovingAverage: average = hidden / (1 - decay^counter), so that the zeros
    # it begins with have no weight. Ours keeps the average alone.
    for module, statistics in tree['state'].items():
        norm = module.rsplit('/', 1)[0]
        count = np.asarray(theirs[f'state/{norm}/mean_ema/counter'], np.int32)
        weight = 1 - DECAY ** float(count)
        statistics['counter'] = count
        statistics['hidden'] = (statistics['average'] * weight).astype(np.float32)

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        pickle.dump(tree, file, 4)  # protocol 4: what Python 3.4 and later read
    return len(entries)
