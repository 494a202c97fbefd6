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
from vatt_jax.importers.messages import escaped, listed, shown
from vatt_jax.importers.parameter_map import Entry, Path, Report
from vatt_jax.models import presets

ROOT = 'text_audio_video'
HEADS_MODULE = '~_get_pair_embedding_heads'
HEADS = f'{ROOT}/{HEADS_MODULE}'
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
# Heads of the official graphs are called alike, whichever spaces they lead to. Their module -> our
# layer: of two layers with norms (MLP), or of one (LINEAR); and the space that decides its width.
MLP = {
    'video_va': ('vid2audio_embd', 'va'),
    'video_vt': ('vis_embd', 'vt'),
    # The shared graph uses the first head of each modality for both of its partners.
    'video_joint': ('vis_embd', 'joint'),
}
LINEAR = {
    'audio_va': ('audio_embd', 'va'),
    'audio_at': ('audio2txt_embd', 'at'),
    'audio_joint': ('audio_embd', 'joint'),
    'text_vat': ('txt_embd', 'vat'),
    'text_vt': ('txt_embd', 'vt'),
    'text_at': ('txt2audio_embd', 'at'),
    'text_joint': ('txt_embd', 'joint'),
}
# The width of what a tower gives its heads.
POOLED = {
    'video': 'towers.video.multiplier',
    'audio': 'towers.audio.multiplier',
    'text': 'towers.text.width',
}
# Between the spaces of FAC; fac_bnrelu has a batch norm there, made by a method of the network.
COARSE = 'vis_embd'
BETWEEN = '~_activate_interaction'
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
# Spaces of each graph that heads lead to directly.
GRAPH_SPACES = {
    'fac': ('va', 'vat'),
    'fac_bnrelu': ('va', 'vat'),
    'shared': ('joint',),
    'disjoint': ('va', 'vt', 'at'),
}
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
    if layer == 'va_norm':
        return f'{ROOT}/{BETWEEN}/{NORM}', 'norm', 2
    if layer == 'va_to_vat':
        return f'{HEADS}/{COARSE}/final_projection', 'linear', 2
    if layer == 'va_to_vat_norm':
        return f'{HEADS}/{COARSE}/{NORM}', 'norm', 2
    if layer in LINEAR:
        return f'{HEADS}/{LINEAR[layer][0]}/final_projection', 'linear', 2
    for name, (module, _) in MLP.items():
        layers = {
            f'{name}_hidden': ('final_projection_inner', 'linear', 2),
            f'{name}_hidden_norm': (NORM, 'norm', 2),
            name: ('final_projection', 'linear', 2),
            f'{name}_norm': (f'{NORM}_1', 'norm', 2),
        }
        if layer in layers:
            their_layer, kind, axes = layers[layer]
            return f'{HEADS}/{module}/{their_layer}', kind, axes
    return None


def _head_fields(layer: str) -> list[str]:
    """The config fields behind the dimensions of a layer of the head."""
    if layer.startswith('va_'):
        spaces = {'va_norm': ['head.va'], 'va_to_vat_norm': ['head.vat']}
        return spaces.get(layer, ['head.va', 'head.vat'])
    if layer in LINEAR:
        return [POOLED[layer.split('_')[0]], f'head.{LINEAR[layer][1]}']
    name = layer.removesuffix('_norm').removesuffix('_hidden')
    space = f'head.{MLP[name][1]}'
    if layer.endswith('_norm'):
        return [space]
    # Only the first layer reads the tower.
    return [POOLED['video'] if layer.endswith('_hidden') else space, space]


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
        fields = [f'model.{field}' for field in _head_fields(layer)]
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
    key = '/'.join(part for part in key.split('/') if part not in ('~', BETWEEN))
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
        if not _is_tree_of_modules(modules):
            raise ConfigError(
                f'--checkpoint={path}: {group}: expected a mapping of module paths to '
                f'arrays by name, got {shown(modules)}'
            )
        for module, module_arrays in modules.items():
            for name, value in module_arrays.items():
                key = _canonical(f'{group}/{module}/{name}')
                if not isinstance(value, (np.ndarray, np.generic, int, float)):
                    raise ConfigError(
                        f'--checkpoint={path}: {escaped(f"{group} {module} {name}")}: expected an '
                        f'array, got a {type(value).__name__}'
                    )
                # Two spellings of one variable: there is no telling which is meant.
                if key in arrays:
                    raise ConfigError(f'--checkpoint={path} has {escaped(key)} twice')
                arrays[key] = np.asarray(value)
    if not any(key.startswith(f'params/{ROOT}/') for key in arrays):
        raise ConfigError(
            f'--checkpoint={path} is no MMV checkpoint: no module path starts with {ROOT}/; it has '
            f'{listed(sorted(arrays), 3) or "no arrays"}'
        )
    return arrays


def _is_tree_of_modules(modules: Any) -> bool:
    """Whether it is {module path: {name: anything}}."""
    if not isinstance(modules, dict):
        return False
    for module, arrays in modules.items():
        if type(module) is not str or not isinstance(arrays, dict):
            return False
        if any(type(name) is not str for name in arrays):
            return False
    return True


def _described(tree: Any) -> str:
    """What a file holds instead, in a few words."""
    if not isinstance(tree, dict):
        return f'a {type(tree).__name__}'
    keys = ', '.join(shown(key) for key in list(tree)[:8])
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
    towers: dict[str, Any] = {}
    # A file may hold one tower alone.
    if reader.has('visual_module'):
        towers['video'] = reader.video_tower()
    if reader.has('audio_module'):
        towers['audio'] = reader.audio_tower()
    if reader.has('text_module'):
        towers['text'] = reader.text_tower()
    if not towers:
        raise ConfigError(
            'the checkpoint has no visual_module, audio_module or text_module, of which an MMV '
            'network is made'
        )
    return {'towers': towers, 'head': reader.head(towers)}


class _SizeReader:
    """Reads sizes of towers off the shapes of their variables."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, module: str, axes: str, name: str = 'w') -> tuple[int, ...]:
        """Shape of an array that must have these axes, as in 'T H W C D'."""
        key = _canonical(f'params/{ROOT}/{module}/{name}')
        if key not in self.shapes:
            raise ConfigError(f'the checkpoint has no {key}; without it its sizes are unknown')
        shape = self.shapes[key]
        if len(shape) != len(axes.split()):
            raise ConfigError(
                f'{key} has shape {shown(list(shape))}, expected {len(axes.split())} axes [{axes}]'
            )
        return shape

    def has(self, module: str) -> bool:
        prefix = _canonical(f'params/{ROOT}/{module}/')
        return any(key.startswith(prefix) for key in self.shapes)

    def video_tower(self) -> dict[str, Any]:
        if self.has('visual_module/S3D'):
            stem = self.shape('visual_module/S3D/Conv2d_1a_7x7/conv3_d', 'T H W C D')
            # 24 channels: blocks of 2 x 2 x 2 RGB pixels.
            return presets.tower(
                's3d', space_to_depth=stem[3] != 3, multiplier=stem[4] / STEM_WIDTH
            )
        if self.has('visual_module/TSMResNetV2'):
            stem = self.shape('visual_module/TSMResNetV2/tsm_resnet_stem', 'H W C D')
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
        stem = self.shape(f'{network}/initial_conv', 'H W C D')
        return presets.tower('resnet2d_v2_50', depth=depth, multiplier=stem[3] / STEM_WIDTH)

    def text_tower(self) -> dict[str, Any]:
        vocab, word_width = self.shape('text_module/embed', 'words C', 'embeddings')
        width = self.shape('text_module/text_conv1', '1 C D')[2]
        return presets.tower('mmv_words', vocab=vocab, word_width=word_width, width=width)

    # ---- common spaces
    def head(self, towers: Mapping[str, Any]) -> dict[str, Any]:
        """The graph, with the spaces that heads of these towers lead to."""
        graph = self.graph()
        widths: dict[str, int] = {}
        for layer, (module, space) in {**MLP, **LINEAR}.items():
            # Of graphs with heads of these names, the table has the layers of all.
            is_ours = layer.split('_')[0] in towers and space in GRAPH_SPACES[graph]
            if is_ours and self._has_head(module):
                widths[space] = self._head_width(module)
        if graph.startswith('fac'):
            self._add_coarse_space(widths, towers)
        if not widths:
            return {'name': 'none'}
        return {'name': presets.MMV_GRAPHS[graph][0], **widths}

    def graph(self) -> str:
        """The graph that heads of these names and layers belong to, a key of MMV_GRAPHS."""
        if self.has(f'{HEADS_MODULE}/{COARSE}/final_projection_inner'):
            # The head of video for words has two layers of its own.
            is_disjoint = self._has_head('vid2audio_embd') or self._has_head('audio2txt_embd')
            return 'disjoint' if is_disjoint else 'shared'
        # The others are FAC. Shapes cannot tell the released `fac` from `fac_plain`, which lacks a
        # ReLU.
        return 'fac_bnrelu' if self.has(NORM) else 'fac'

    def _has_head(self, module: str) -> bool:
        return self.has(f'{HEADS_MODULE}/{module}')

    def _head_width(self, module: str) -> int:
        return self.shape(f'{HEADS_MODULE}/{module}/final_projection', 'C E')[1]

    def _add_coarse_space(self, widths: dict[str, int], towers: Mapping[str, Any]) -> None:
        """FAC's coarse space, which video and sound reach through the fine one."""
        if self._has_head(COARSE):
            widths['va'], widths['vat'] = self.shape(
                f'{HEADS_MODULE}/{COARSE}/final_projection', 'C E'
            )
        elif 'vat' in widths and set(towers) != {'text'}:
            del widths['vat']
        elif 'vat' in widths:
            # The graph wants a width of the fine space, of which words alone make no layer.
            widths['va'] = widths['vat']


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
    is_inferred = config is None
    if config is None:
        config = _inferred_config(shapes, base)
    _check_graph(config)
    # What the release is evaluated in; published training configs say bfloat16.
    config.compute_dtype = 'float32'

    # MMV checkpoints have no classifier; a tower alone is there to be fine-tuned with one.
    with_objective = config.objective.name != 'classification'
    state = parameter_map.abstract_state(config, {}, with_objective)
    variables = parameter_map.variables(state)
    # The keys of `arrays` are canonical, so those of the table must be, too.
    entries = []
    for entry in layout(variables):
        key = _canonical(entry.theirs)
        entries.append(Entry(entry.ours, entry.layer, key, entry.shape, entry.fields))
    ours, report = parameter_map.to_ours(
        arrays.__getitem__,
        shapes,
        entries,
        f'--checkpoint={path}',
        variables,
        bookkeeping,
        _graph_difference(shapes, config.model.head.name),
    )
    if is_inferred and config.model.head.name == presets.MMV_GRAPHS['fac'][0]:
        report.assumed.append(
            'the graph fac, which was released: the arrays of fac_plain have the same shapes'
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
    towers, head = inferred['towers'], inferred['head']
    # Only its inputs are used: towers and head come from the checkpoint.
    fields, _ = presets.mmv('s3d', 'fac', 'vat')

    config = base.copy_and_resolve_references()
    config.name = f'MMV {next(iter(towers.values()))["name"]}'
    config.model.inputs.video.range = fields.inputs.video.range
    mel = config.model.inputs.audio.get('mel')
    config.model.inputs.audio.mel = mel or fields.inputs.audio.mel
    config.model.towers = ConfigDict(towers)
    config.model.head = ConfigDict(head)
    # A checkpoint does not record its objective; this one is for further training.
    pairs = _pairs(towers, head)
    if pairs:
        config.objective = ConfigDict(
            {'name': 'contrastive', 'pairs': pairs, 'temperature': 0.07, 'form': 'asymmetric'}
        )
    else:
        # Nothing to compare a tower with: what is left is to fine-tune it.
        config.objective = ConfigDict(
            {'name': 'classification', 'stream': next(iter(towers)), 'label': 'class'}
        )
    return config


def _graph_difference(shapes: Mapping[str, tuple[int, ...]], name: str) -> list[str]:
    """Say where the heads of a checkpoint belong to another graph than the config's."""
    try:
        found = infer(shapes)['head']['name']
    except ConfigError:  # what is missing is listed with all else
        return []
    # Which lack no layer of each other, or have none.
    alike = {presets.MMV_GRAPHS['fac'][0], presets.MMV_GRAPHS['fac_plain'][0]}
    if 'none' in (found, name) or found == name or {found, name} == alike:
        return []
    return [f'config.model.head.name={name!r} (checkpoint: {found!r})']


def _pairs(towers: Mapping[str, Any], head: Mapping[str, Any]) -> tuple:
    """The objective's pairs: video and each other tower, where both lead to one space."""
    spaces_of = dict(presets.MMV_GRAPHS.values())
    pairs = []
    for pair, spaces in spaces_of.get(head['name'], {}).items():
        partner = presets.MMV_PARTNERS[pair]
        if 'video' in towers and partner in towers and spaces[0] in head:
            pairs.append(('video', partner, spaces[0], 1.0))
    return tuple(pairs)


def _check_graph(config: ConfigDict) -> None:
    # `none`: towers alone.
    known = [*(name for name, _ in presets.MMV_GRAPHS.values()), 'none']
    name = config.model.head.name
    if name not in known:
        raise ConfigError(
            f'config.model.head.name: expected a graph of MMV ({", ".join(known)}), got {name!r}; '
            'choose a config such as configs/mmv.py:s3d_fac_vat'
        )


def export_checkpoint(
    run: str | os.PathLike, path: str | os.PathLike, overwrite: bool = False
) -> int:
    """Write a model of ours as an official checkpoint, a plain pickle.

    The running sums (`hidden`) are those that the averages come from. Heads that the graph does not
    use, of FAC those between sound and words, are not made.

    Args:
        run: a run folder, of which the newest model is taken, or one checkpoint folder.
        path: the file to write.
        overwrite: whether to replace a file that is there.

    Returns:
        The number of variables.

    Raises:
        ConfigError: the model has parts that the official layout has not, or the file exists.
    """
    path = pathlib.Path(path)
    parameter_map.check_export(path, [path], overwrite)
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

    # Renamed when it is whole: a full disk leaves no half of a file.
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            pickle.dump(tree, file, 4)  # protocol 4: what Python 3.4 and later read
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise parameter_map.not_written(path, error) from error
    return len(entries)
