"""Checkpoints of open_flamingo and of ClipCap to our parameters, and back.

    open_flamingo    checkpoint.pt: resampler, gated layers and word table, without the frozen rest
    ClipCap          coco_prefix-009.pt: the mapper, and GPT-2 whether it was trained or not

Nothing of a file is executed. Names and orders of numbers: `media_language_layouts`.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vatt_jax.config import ConfigError
from vatt_jax.importers import clip, language_layouts, parameter_map
from vatt_jax.importers import media_language_layouts as layouts
from vatt_jax.importers.parameter_map import Path, Report
from vatt_jax.importers.pickles import torch_writer
from vatt_jax.models.media_language import ClipCap, FlamingoLM, new_parts

ADVICE = 'give the model the sizes of the checkpoint'
# What their training script saves the state dict as.
STATE_DICT = 'model_state_dict.'
# A gated layer where it is saved, by the language model's own name of its layers.
GATED_NAME = re.compile(r'^lang_encoder\..+\.(\d+)\.gated_cross_attn_layer\.')
_IDS = jax.ShapeDtypeStruct((1, 1), np.int32)
WORD_TABLE = re.compile(r'^lang_encoder\.(.+\.)?(wte|embed_tokens|embed_in)\.weight$')


def load_flamingo(path: str | os.PathLike, model: FlamingoLM) -> tuple[dict[str, Any], Report]:
    """Read what open_flamingo trained.

    Args:
        path: of the file.
        model: of the checkpoint's sizes. Its language model may be of any kind: the file holds
            nothing of it but the word table, of which the last `new_words` rows are taken: the end
            of a chunk, the tag of a medium and, where the tokenizer had none, padding.

    Returns:
        The new parameters (the first tree of `new_parts.split`), and what was read. Outputs of new
        words that are not tied to the table are no part of such a file: they begin at 0.

    Raises:
        ConfigError: the file cannot be read or does not fit the model.
    """
    arrays = {}
    for name, array in clip.read_arrays(pathlib.Path(path), str(path)).items():
        name = name.removeprefix(STATE_DICT).removeprefix('module.')
        arrays[GATED_NAME.sub(layouts.GATED.format(r'\1'), name)] = array
    expected = new_variables(model)
    untied = expected.pop(('params', 'new_outputs'), None)
    if model.new_words:
        arrays[layouts.NEW_ROWS] = _new_rows(arrays, model, str(path))
    ours, report = parameter_map.to_ours(
        arrays.__getitem__,
        {name: array.shape for name, array in arrays.items()},
        layouts.flamingo(expected, model.every),
        str(path),
        expected,
        # The word table, and whatever else of the frozen language model was saved with it.
        bookkeeping=lambda name: name.startswith('lang_encoder.'),
        advice=ADVICE,
    )
    if untied is not None:
        ours['params', 'new_outputs'] = np.zeros(untied.shape, untied.dtype)
        report.assumed.append('outputs of new words, which such a file does not hold: 0')
    return unflatten_dict(ours)['params'], report


def save_flamingo(path: str | os.PathLike, model: FlamingoLM, params: Mapping[str, Any]) -> int:
    """Write what open_flamingo reads: the new parameters and the word table.

    Args:
        path: of the file, which is replaced.
        model: the module.
        params: all parameters.

    Returns:
        The number of arrays.

    Raises:
        ConfigError: the file cannot be written.
    """
    new, frozen = new_parts.split(nn.meta.unbox(params))
    ours = _flat(new)
    # Not saved by open_flamingo either.
    ours.pop(('params', 'new_outputs'), None)
    theirs = parameter_map.to_theirs(ours, layouts.flamingo(ours, model.every))
    new_rows = theirs.pop(layouts.NEW_ROWS, None)
    layout = language_layouts.LAYOUTS['gpt2' if model.form.positions == 'learned' else 'llama']
    arrays = {}
    for name, array in theirs.items():
        arrays[_with_layer_name(name, layout)] = array
    if new_rows is not None:
        table = np.asarray(frozen[new_parts.LANGUAGE]['word_table'])
        name = f'lang_encoder.{layout.prefix}{layout.variables["word_table"]}'
        arrays[name] = np.concatenate([table, new_rows])
    return _write(path, arrays)


def load_clipcap(path: str | os.PathLike, model: ClipCap) -> tuple[dict[str, Any], Report]:
    """Read a checkpoint of ClipCap.

    Args:
        path: of the file.
        model: of the checkpoint's sizes, its language model of GPT-2's form.

    Returns:
        All parameters, and what was read.

    Raises:
        ConfigError: the file cannot be read or does not fit the model.
    """
    arrays = clip.read_arrays(pathlib.Path(path), str(path))
    expected = clipcap_variables(model, _embedding_width(arrays))
    ours, report = parameter_map.to_ours(
        arrays.__getitem__,
        {name: array.shape for name, array in arrays.items()},
        layouts.clipcap(expected),
        str(path),
        expected,
        bookkeeping=_is_no_parameter,
        advice=ADVICE,
    )
    return unflatten_dict(ours)['params'], report


def save_clipcap(path: str | os.PathLike, params: Mapping[str, Any]) -> int:
    """Write what ClipCap's code reads, the output matrix (the word table) among it.

    Args:
        path: of the file, which is replaced.
        params: all parameters.

    Returns:
        The number of arrays.

    Raises:
        ConfigError: the file cannot be written.
    """
    ours = _flat(nn.meta.unbox(params))
    arrays = parameter_map.to_theirs(ours, layouts.clipcap(ours))
    table = ours['params', new_parts.LANGUAGE, 'word_table']
    return _write(path, {**arrays, layouts.GPT + language_layouts.HEAD: table})


def new_variables(model: FlamingoLM) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes of the new variables of a Flamingo: {('params', …): …}."""
    media = jax.ShapeDtypeStruct((1, 1, 1, 1, model.resampler.width), np.float32)
    variables = _shapes(model, _IDS, None, None, media)
    return {path: like for path, like in variables.items() if path[1] != new_parts.LANGUAGE}


def clipcap_variables(model: ClipCap, embedding_width: int) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes of all variables of a ClipCap: {('params', …): …}."""
    return _shapes(model, jax.ShapeDtypeStruct((1, embedding_width), np.float32), _IDS)


def _shapes(model: nn.Module, *inputs: Any) -> dict[Path, Any]:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return dict(flatten_dict(nn.meta.unbox(jax.eval_shape(model.init, key, *inputs))))


def _flat(params: Mapping[str, Any]) -> dict[Path, np.ndarray]:
    flat = flatten_dict(params)
    return {('params', *path): np.asarray(leaf) for path, leaf in flat.items()}


def _new_rows(arrays: Mapping[str, np.ndarray], model: FlamingoLM, where: str) -> np.ndarray:
    """The last rows of the word table, which their training does not keep apart."""
    tables = [array for name, array in arrays.items() if WORD_TABLE.match(name)]
    if not tables:
        raise ConfigError(
            f'{where}: expected the word table of the language model, whose last rows are those of '
            'new words, got none; a model with new_words=0 needs none'
        )
    num_rows = model.form.vocab + model.new_words
    if len(tables[0]) != num_rows:
        raise ConfigError(
            f'{where}: expected a word table of {num_rows} rows (vocab={model.form.vocab} and '
            f'new_words={model.new_words}), got {len(tables[0])}; {ADVICE}'
        )
    return tables[0][model.form.vocab :]


def _with_layer_name(name: str, layout: language_layouts.Layout) -> str:
    """The name under which a gated layer is saved: in the list of the language model's layers."""
    match = re.match(layouts.GATED.format(r'(\d+)'), name)
    if match is None:
        return name
    layer = layout.prefix + layout.layer.format(match[1])
    return f'lang_encoder.{layer}gated_cross_attn_layer.{name[match.end() :]}'


def _embedding_width(arrays: Mapping[str, np.ndarray]) -> int:
    """E, by the first linear layer of either mapper; 1 where a file has none, which is an error."""
    for first in ('model.0', 'linear'):
        kernel = arrays.get(f'{layouts.MAPPER}{first}.weight')
        if kernel is not None and kernel.ndim == 2:
            return kernel.shape[1]
    return 1


def _is_no_parameter(name: str) -> bool:
    # The output matrix is the word table.
    is_head = name == layouts.GPT + language_layouts.HEAD
    return is_head or language_layouts.BOOKKEEPING.search(name) is not None


def _write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> int:
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        torch_writer.write(path, arrays)
    except OSError as error:
        raise parameter_map.not_written(pathlib.Path(path), error) from error
    return len(arrays)
