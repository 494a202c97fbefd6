"""Released weights of CLIP and SigLIP to our parameters, and back.

    openai_clip   OpenAI's .pt, a TorchScript archive or a state dict
    open_clip     open_clip's safetensors (or .pt) of models without a text tower of another library
    hf_clip       Hugging Face's safetensors of CLIPModel and SiglipModel
    big_vision    SigLIP's .npz

Nothing of a file is executed. Names and orders of numbers: `clip_layouts`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vatt_jax import extras
from vatt_jax.config import ConfigError
from vatt_jax.importers import clip_layouts, parameter_map, pickles
from vatt_jax.importers.messages import escaped, listed
from vatt_jax.importers.parameter_map import Report
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.inputs import tokenizer
from vatt_jax.models import presets

Shapes = Mapping[str, tuple[int, ...]]
# A variable that only files of this layout have, in the order in which they are looked for.
SIGNS = {
    'visual.attnpool.positional_embedding': 'openai_resnet',
    'visual.class_embedding': 'openai',
    'vision_model.head.probe': 'hf_siglip',
    'vision_model.embeddings.class_embedding': 'hf_clip',
    'params/img/pos_embedding': 'big_vision',
}
# What the variables of no model are called: sizes, masks, counters, optimizers.
BOOKKEEPING = re.compile(
    r'(^|\.)(input_resolution|context_length|vocab_size|attn_mask|position_ids'
    r'|num_batches_tracked)$|^opt/'
)
# Files of a folder, in the order in which they are looked for.
FOLDER_FILES = ('open_clip_model.safetensors', 'model.safetensors')
# Width of a head where no file says it; SigLIP's So400m has heads of 72.
HEAD_WIDTHS = {1152: 72}


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of files.

    Attributes:
        name: of the --format.
        layouts: entries of clip_layouts.LAYOUTS that it may hold.
        suffix: of its files.
        activation: of CLIP's towers where no file says it.
    """

    name: str
    layouts: tuple[str, ...]
    suffix: str
    activation: str = 'quick_gelu'

    def import_checkpoint(
        self,
        path: str | os.PathLike,
        out: str | os.PathLike,
        config: ConfigDict | None = None,
        base: ConfigDict | None = None,
        tokenizer_file: str = '',
    ) -> tuple[ConfigDict, Report]:
        """Make a run folder that holds released weights as step 0.

        Args:
            path: the file, or the folder that holds it.
            out: the run folder to make.
            config: what the weights must fit; None: `base` with their sizes.
            base: configs/default.py; needed where `config` is None.
            tokenizer_file: merges, `tokenizer.json` or SentencePiece model of the release; '':
                sentences cannot be encoded.

        Returns:
            The config of the run, and what was read and left out.

        Raises:
            ConfigError: anything does not fit; nothing is written then.
        """
        out = parameter_map.check_new(out)
        where = f'--checkpoint={path}'
        arrays = read_arrays(pathlib.Path(path), where)
        layout = self._layout(arrays, where)
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        assumed: list[str] = []
        if config is None:
            assert base is not None, 'base is needed where no config is given'
            said = _said_beside(pathlib.Path(path))
            config, assumed = inferred_config(layout, shapes, base, said, self.activation, where)
        config.compute_dtype = 'float32'
        state = parameter_map.abstract_state(config, {})
        variables = parameter_map.variables(state)
        entries = clip_layouts.layout(layout, variables, sizes_of(config.model))
        ours, report = parameter_map.to_ours(
            arrays.__getitem__,
            shapes,
            entries,
            where,
            variables,
            lambda key: BOOKKEEPING.search(key) is not None,
        )
        report.assumed += assumed
        info: dict[str, Any] = {
            'labels': {},
            'sources': [],
            'imported': {'from': pathlib.Path(path).name, 'kind': self.name},
        }
        if tokenizer_file:
            info['tokenizer'] = _tokenizer_spec(tokenizer_file, config)
        parameter_map.write_run(out, config, state, ours, info)
        return config, report

    def export_checkpoint(
        self, run: str | os.PathLike, path: str | os.PathLike, overwrite: bool = False
    ) -> int:
        """Write a model of ours in this format: the weights, without their configuration.

        Args:
            run: a run folder, of which the newest model is taken, or one checkpoint folder.
            path: the file to write.
            overwrite: whether to replace a file that is there.

        Returns:
            The number of variables.

        Raises:
            ConfigError: the model has parts that the format has not, or the file exists.
        """
        path = pathlib.Path(path)
        parameter_map.check_export(path, [path], overwrite)
        config, _, ours = parameter_map.read_run(run)
        layout = _layout_of_model(config.model, self)
        entries = clip_layouts.layout(layout, ours, sizes_of(config.model))
        parameter_map.check_same(run, ours, entries)
        theirs = parameter_map.to_theirs(ours, entries)
        # Renamed when it is whole: a full disk leaves no half of a file.
        temporary = path.with_name(f'{path.name}.tmp')
        try:
            _write_arrays(temporary, theirs, self.suffix)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise parameter_map.not_written(path, error) from error
        return len(theirs)

    def _layout(self, arrays: Mapping[str, Any], where: str) -> str:
        for sign, layout in SIGNS.items():
            if sign in arrays and layout in self.layouts:
                return layout
        raise ConfigError(
            f'{where}: expected weights of {self.name}, with one of '
            f'{", ".join(sign for sign, layout in SIGNS.items() if layout in self.layouts)}; got '
            f'{listed(sorted(arrays), 3) or "no arrays"}'
        )


FORMATS = {
    'openai_clip': Format('openai_clip', ('openai', 'openai_resnet'), '.pt'),
    # Its own models have the exact GELU, those of the `-quickgelu` configs CLIP's.
    'open_clip': Format('open_clip', ('openai', 'openai_resnet'), '.safetensors', 'gelu'),
    'hf_clip': Format('hf_clip', ('hf_clip', 'hf_siglip'), '.safetensors'),
    'big_vision': Format('big_vision', ('big_vision',), '.npz'),
}


def sizes_of(model: Any) -> clip_layouts.Sizes:
    """What the tables need to know of `config.model` besides shapes."""
    video = model.towers.video
    return clip_layouts.Sizes(video.get('patch', 0), video.get('heads', 0))


def _layout_of_model(model: Any, format: Format) -> str:
    """The layout of a format that a model of ours is written in."""
    graph = model.head.name
    by_graph = {'clip': 'openai', 'clip_resnet': 'openai_resnet', 'siglip': 'big_vision'}
    if format.name == 'hf_clip':
        by_graph = {'clip': 'hf_clip', 'siglip': 'hf_siglip'}
    layout = by_graph.get(graph, '')
    if layout not in format.layouts:
        raise ConfigError(
            f'config.model.head.name={graph!r}: --format={format.name} holds models of '
            f'{", ".join(g for g, name in by_graph.items() if name in format.layouts)}'
        )
    return layout


def _tokenizer_spec(path: str, config: ConfigDict) -> dict[str, Any]:
    """The description of a release's tokenizer, which must number the rows of the word table."""
    kind = 'siglip' if config.model.head.name == 'siglip' else 'clip'
    try:
        found = tokenizer.from_file(kind, path)
    # The libraries raise errors of several kinds, Exception among them, where a file is no model.
    except Exception as error:
        raise ConfigError(
            f'--vocabulary={path} is no tokenizer of {kind} ({type(error).__name__}: '
            f'{escaped(str(error), 200)}); give the merges or tokenizer.json of clip, or the '
            'SentencePiece model of siglip'
        ) from error
    vocab = config.model.towers.text.vocab
    if found.size != vocab:
        raise ConfigError(
            f'--vocabulary={path}: expected {vocab} numbers, one for each row of the word table, '
            f'got {found.size}'
        )
    return found.to_spec()


# ---- files
def read_arrays(path: pathlib.Path, where: str) -> dict[str, np.ndarray]:
    """Read {name: array} of any of the files, without executing what they ask for.

    Raises:
        ConfigError: the file is of another kind, or damaged.
    """
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise ConfigError(f'{where}: expected a folder with {" or ".join(FOLDER_FILES)}')
        path = found[0]
    if path.suffix == '.npz':
        return _read_npz(path, where)
    if path.suffix == '.safetensors':
        return _read_safetensors(path, where)
    tree = pickles.read(path)
    # Training scripts save the state dict among other things.
    if isinstance(tree, dict) and isinstance(tree.get('state_dict'), dict):
        tree = tree['state_dict']
    arrays: dict[str, np.ndarray] = {}
    _flatten(tree, '', arrays)
    # Of DistributedDataParallel.
    return {key.removeprefix('module.'): array for key, array in arrays.items()}


def _flatten(tree: Any, prefix: str, arrays: dict[str, np.ndarray]) -> None:
    """Put the arrays of nested modules into `arrays`, under names joined by points."""
    if isinstance(tree, np.ndarray):
        arrays[prefix] = tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            _flatten(value, f'{prefix}.{name}' if prefix else str(name), arrays)


def _read_npz(path: pathlib.Path, where: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # Objects among the arrays are a ValueError.
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(
            f'{where} cannot be read ({type(error).__name__}: {escaped(str(error), 200)})'
        ) from error
    return _unstacked({name: _as_numbers(array) for name, array in arrays.items()})


def _as_numbers(array: np.ndarray) -> np.ndarray:
    """bfloat16, which .npz files hold as two raw bytes, by its name."""
    if array.dtype == np.dtype('V2'):
        import ml_dtypes

        return array.view(ml_dtypes.bfloat16)
    return array


def _unstacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scanned layers of big_vision, [layers …], as it names them one by one."""
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if '/encoderblock/' not in name or not array.ndim:
            out[name] = array
            continue
        for layer, value in enumerate(array):
            out[name.replace('/encoderblock/', f'/encoderblock_{layer}/')] = value
    return out


def _read_safetensors(path: pathlib.Path, where: str) -> dict[str, np.ndarray]:
    library = _safetensors()
    try:
        return dict(library.numpy.load_file(path))
    # Types that NumPy does not know by name are errors of several kinds.
    except Exception as error:
        raise ConfigError(
            f'{where} cannot be read ({type(error).__name__}: {escaped(str(error), 200)}); fetch '
            'it again'
        ) from error


def _write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray], suffix: str) -> None:
    """Write a file of the kind that a suffix stands for."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if suffix == '.npz':
        with open(path, 'wb') as file:
            # Typeshed takes the names of arrays for those of options.
            np.savez(file, **arrays)  # type: ignore[arg-type]
    elif suffix == '.safetensors':
        # The mark by which the libraries of PyTorch know such files.
        _safetensors().numpy.save_file(arrays, path, metadata={'format': 'pt'})
    else:
        torch_writer.write(path, arrays)


def _safetensors() -> Any:
    # Imported here: everything else of the library works without it.
    with extras.needed('exchange', 'reading and writing safetensors'):
        import safetensors
        import safetensors.numpy
    return safetensors


def _said_beside(path: pathlib.Path) -> dict[str, Any]:
    """What the JSON beside released weights says of the activation: {'activation': …} or {}."""
    folder = path if path.is_dir() else path.parent
    for name in ('config.json', 'open_clip_config.json'):
        try:
            said = json.loads((folder / name).read_text(encoding='utf-8'))
        except (OSError, ValueError):
            continue
        if not isinstance(said, dict):
            continue
        vision, model = said.get('vision_config'), said.get('model_cfg')
        if isinstance(vision, dict) and 'hidden_act' in vision:
            return {'activation': str(vision['hidden_act'])}
        if isinstance(model, dict):
            return {'activation': 'quick_gelu' if model.get('quick_gelu') else 'gelu'}
    return {}


# ---- sizes
def inferred_config(
    layout: str,
    shapes: Shapes,
    base: ConfigDict,
    said: Mapping[str, Any],
    activation: str,
    where: str,
) -> tuple[ConfigDict, list[str]]:
    """The default config with the towers of the weights, and what had to be assumed.

    Raises:
        ConfigError: a variable whose shape is needed is missing.
    """
    config = base.copy_and_resolve_references()
    is_siglip = layout in ('hf_siglip', 'big_vision')
    fields = presets.clip('siglip_b16' if is_siglip else 'clip_b32')
    if layout == 'openai_resnet':
        fields = presets.clip('clip_rn50')
    try:
        _set_sizes(fields, layout, shapes)
    except KeyError as error:
        raise ConfigError(
            f'{where} lacks {escaped(str(error.args[0]))}, without which its sizes are unknown'
        ) from error
    assumed = []
    if not is_siglip:
        chosen = said.get('activation', activation)
        if 'activation' not in said:
            assumed.append(f'activation {chosen}; the file does not say it')
        for tower in fields.towers.values():
            if 'layers' in tower:
                tower.activation = chosen
    if layout != 'big_vision':
        assumed.append('heads of 64 (of width 1152: 72), as of all released models')
    config.name = f'{"SigLIP" if is_siglip else "CLIP"} {fields.towers.video.name}'
    config.model.towers, config.model.head = fields.towers, fields.head
    config.model.inputs.video.update(fields.inputs.video)
    config.model.inputs.text.update(fields.inputs.text)
    config.objective = ConfigDict(presets.CLIP_OBJECTIVES['siglip' if is_siglip else 'clip'])
    # Released word tables are trained.
    config.optimizer.frozen = ()
    return config, assumed


def _set_sizes(fields: ConfigDict, layout: str, shapes: Shapes) -> None:
    """Set sizes of towers, head and inputs in place. KeyError: a variable is missing."""
    table = clip_layouts.LAYOUTS[layout]
    video, text = fields.towers.video, fields.towers.text
    _set_transformer(text, 'text', table, shapes)
    text.vocab = shapes[table.variables['fronts_text/word_table']][0]
    text.positions = shapes[table.variables['fronts_text/position_table']][-2]
    fields.inputs.text.words = text.positions
    if layout == 'openai_resnet':
        _set_resnet(video, shapes)
        fields.inputs.video.size = video.size
    else:
        _set_transformer(video, 'video', table, shapes)
        kernel = shapes[table.variables['fronts_video/patch'] + table.leaves['kernel']]
        video.patch = kernel[2] if table.is_torch else kernel[0]
        num_positions = shapes[table.variables['fronts_video/position_table']][-2]
        has_class_token = 'fronts_video/class_token' in table.variables
        side = round((num_positions - has_class_token) ** 0.5)
        video.positions = (side, side)
        fields.inputs.video.size = side * video.patch
    fields.head.vt = _space_width(layout, shapes)


def _space_width(layout: str, shapes: Shapes) -> int:
    """Width of the common space, by the sentences' projection."""
    name, axis = {
        'hf_clip': ('text_projection.weight', 0),
        'hf_siglip': ('text_model.head.weight', 0),
        'big_vision': ('params/txt/head/kernel', 1),
    }.get(layout, ('text_projection', 1))
    return shapes[name][axis]


def _set_transformer(
    tower: ConfigDict, modality: str, table: clip_layouts.Layout, shapes: Shapes
) -> None:
    """Set layers, width, hidden width and heads of a transformer in place."""
    begin = table.layers[modality]
    norm = table.layer_modules['attention_norm'] + table.leaves['scale']
    tower.layers = 0
    while begin.format(tower.layers) + norm in shapes:
        tower.layers += 1
    first = begin.format(0)
    tower.width = shapes[first + norm][0]
    tower.mlp = shapes[first + table.layer_modules['mlp_in'] + table.leaves['bias']][0]
    if table.is_torch:
        tower.head_width = HEAD_WIDTHS.get(tower.width, 64)
        tower.heads = max(1, tower.width // tower.head_width)
    else:
        bias = shapes[first + table.layer_modules['query'] + table.leaves['bias']]
        tower.heads, tower.head_width = bias


def _set_resnet(tower: ConfigDict, shapes: Shapes) -> None:
    """Set blocks, channels and size of pictures of a ResNet in place."""
    blocks = []
    for group in (1, 2, 3, 4):
        count = 0
        while f'visual.layer{group}.{count}.conv1.weight' in shapes:
            count += 1
        blocks.append(count)
    tower.blocks = tuple(blocks)
    tower.features = shapes['visual.layer1.0.conv1.weight'][0]
    side = round((shapes['visual.attnpool.positional_embedding'][0] - 1) ** 0.5)
    tower.size = 32 * side
