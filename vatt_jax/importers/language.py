"""Released language models of Hugging Face's layouts to our parameters, and back.

    config.json                the architecture
    model.safetensors          the weights, or several files and model.safetensors.index.json
    generation_config.json     which words end a text, where config.json does not say all of them
    tokenizer.json             or vocab.json and merges.txt

GPT-2, Llama, Mistral and Qwen2. Nothing of a file is executed. Names and orders of numbers:
`language_layouts`; fields: `language_configs`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vatt_jax.config import ConfigError
from vatt_jax.importers import language_configs, language_layouts, parameter_map
from vatt_jax.importers.language_layouts import BOOKKEEPING, HEAD, LAYOUTS
from vatt_jax.importers.messages import escaped, shown
from vatt_jax.importers.parameter_map import Path, Report
from vatt_jax.importers.safetensors_files import INDEX, MODEL, open_folder, safetensors
from vatt_jax.inputs.byte_pairs import BytePairs
from vatt_jax.models.language import CausalLM, Form
from vatt_jax.models.language.tower import MODEL as MODEL_OF_TOWER
from vatt_jax.models.language.tower import LanguageTower
from vatt_jax.run_folder import NotWritten, write_atomically

CONFIG, GENERATION = 'config.json', 'generation_config.json'
TYPES = ('float32', 'bfloat16', 'float16')
ADVICE = f'{CONFIG} and the weights belong to two models; fetch the folder again'


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A language model.

    Attributes:
        model: the module; `model.clone(dtype='bfloat16')` computes otherwise.
        variables: {'params': …}, float32.
        ends: numbers of the words that end a text.
        tokenizer: None where the folder has none.
        report: what was read and what was left out.
    """

    model: CausalLM
    variables: dict[str, Any]
    ends: tuple[int, ...]
    tokenizer: BytePairs | None
    report: Report


def load(folder: str | os.PathLike) -> Loaded:
    """Read a folder as `save_pretrained` of Hugging Face's transformers writes it.

    Raises:
        ConfigError: a file is missing or damaged, the model is of another kind or has parts that
            our decoder has not, or the weights do not fit the config.
    """
    folder = pathlib.Path(folder)
    config = _read_json(folder / CONFIG)
    layout, form = language_configs.form_of(config, str(folder / CONFIG))
    shapes, read = open_folder(folder)
    prefix = LAYOUTS[layout].prefix
    # Files of the model without its head have no prefix.
    names = {name.removeprefix(prefix): name for name in shapes}
    expected = abstract_variables(form)
    arrays, report = parameter_map.to_ours(
        lambda name: read(names[name]),
        {name: shapes[theirs] for name, theirs in names.items()},
        language_layouts.layout(layout, expected),
        str(folder),
        expected,
        bookkeeping=lambda name: BOOKKEEPING.search(name) is not None,
        advice=ADVICE,
    )
    variables = unflatten_dict(arrays)
    return Loaded(CausalLM(form), variables, _ends(folder, config), BytePairs.find(folder), report)


def from_run(run: str | os.PathLike) -> tuple[CausalLM, dict[str, Any]]:
    """The decoder that a run trained (tower `language`), and its variables {'params': …}.

    Args:
        run: a run folder, of which the newest model is taken, or one checkpoint folder.

    Raises:
        ConfigError: there is no checkpoint, or it has no such tower.
    """
    config, _, ours = parameter_map.read_run(run)
    tower = config.model.towers.get('text', {})
    if tower.get('name') != 'language':
        raise ConfigError(
            f'{run}: config.model.towers.text.name: expected language, got {tower.get("name")!r}'
        )
    fields = {name: value for name, value in tower.items() if name != 'name'}
    begin = ('params', 'nets_text', MODEL_OF_TOWER)
    own = {('params', *path[3:]): x for path, x in ours.items() if path[:3] == begin}
    return LanguageTower(**fields).decoder(parent=None), unflatten_dict(own)


def save(
    folder: str | os.PathLike,
    form: Form,
    variables: Mapping[str, Any],
    ends: Sequence[int] = (),
    dtype: str = 'float32',
    overwrite: bool = False,
) -> int:
    """Write config.json and model.safetensors, as `load` and Hugging Face's transformers read them.

    Args:
        folder: made where there is none.
        form: the architecture.
        variables: {'params': …}.
        ends: numbers of the words that end a text.
        dtype: of the weights, entry of TYPES; float32 loses nothing.
        overwrite: whether to replace a model that is there.

    Returns:
        The number of arrays.

    Raises:
        ConfigError: no public model has these parts, the variables are those of another form, or
            the folder holds a model or cannot be written.
    """
    folder = pathlib.Path(folder)
    if dtype not in TYPES:
        raise ConfigError(f'dtype={dtype!r}: choose one of {", ".join(TYPES)}')
    layout, config = language_configs.config_of(form)
    ours = {path: np.asarray(x) for path, x in flatten_dict(nn.meta.unbox(variables)).items()}
    entries = language_layouts.layout(layout, abstract_variables(form))
    parameter_map.check_same('this model', ours, entries)
    files = [folder / name for name in (CONFIG, MODEL, INDEX)]
    parameter_map.check_export(folder, files, overwrite)
    arrays = {}
    for name, array in parameter_map.to_theirs(ours, entries).items():
        full_name = name if name == HEAD else LAYOUTS[layout].prefix + name
        # The library writes the bytes of an array as they lie.
        arrays[full_name] = np.ascontiguousarray(array.astype(jax.numpy.dtype(dtype)))
    # Told in any case: an absent one is word 2 or so to other programs, an ordinary word here.
    config['eos_token_id'] = ends[0] if len(ends) == 1 else list(ends) or None
    config['torch_dtype'] = dtype
    _write(folder, config, arrays)
    return len(arrays)


def abstract_variables(form: Form) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes of all variables of a form: {('params', …): …}."""
    ids = jax.ShapeDtypeStruct((1, 1), np.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(CausalLM(form).init, key, ids)
    return dict(flatten_dict(nn.meta.unbox(tree)))


def _write(
    folder: pathlib.Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    library = safetensors()
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2))
        # Renamed when it is whole: a full disk leaves no half of a file.
        temporary = folder / f'{MODEL}.tmp'
        # The mark by which the libraries of PyTorch know such files.
        library.numpy.save_file(dict(arrays), temporary, metadata={'format': 'pt'})
        os.replace(temporary, folder / MODEL)
        # Of a model in several files that was here, which is not this one.
        (folder / INDEX).unlink(missing_ok=True)
    except (OSError, NotWritten, library.SafetensorError) as error:
        raise parameter_map.not_written(folder, error) from error


def _ends(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Words that end a text. Chat models name further ones in generation_config.json."""
    where, found = folder / CONFIG, config.get('eos_token_id')
    if (folder / GENERATION).is_file():
        generation = _read_json(folder / GENERATION)
        if generation.get('eos_token_id') is not None:
            where, found = folder / GENERATION, generation['eos_token_id']
    if found is None:
        return ()
    ends = found if isinstance(found, list) else [found]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ConfigError(
            f'{where}: eos_token_id: expected a number of a word, or several, got {shown(found)}'
        )
    return tuple(ends)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f'{path} cannot be read ({type(error).__name__}: {escaped(str(error), 200)}); expected '
            'a folder of Hugging Face with a config.json and weights'
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected a group of fields, got {shown(content)}')
    return content
