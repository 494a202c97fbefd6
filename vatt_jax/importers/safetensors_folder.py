"""Models as safetensors: a folder that other tools read, and that holds no code.

    model.safetensors    {'params/…' | 'batch_stats/…' | 'objective/…': array}, paths joined by /
    config.json          the resolved config of the run
    info.json            tokenizer, names of classes, sources

It holds what computes; what training goes on from (optimizer slots, an objective's memory, columns)
stays in the run folder.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vatt_jax import extras, objectives
from vatt_jax.config import ConfigError, from_json, to_json
from vatt_jax.importers import parameter_map
from vatt_jax.importers.messages import escaped, shown
from vatt_jax.importers.parameter_map import Entry, Path, Report
from vatt_jax.parallel import sharding
from vatt_jax.run_folder import NotWritten, RunFolder, write_atomically

MODEL, CONFIG, INFO = 'model.safetensors', 'config.json', 'info.json'
# In the file beside the arrays, so that readers can tell this layout from others. One entry: the
# library writes several in an order that varies, and equal models would give different files.
METADATA = {'format': 'vatt_jax 1'}
GROUPS = ('params', 'batch_stats', 'objective')
# Without these groups a config makes no model, and no run.
NEEDED = ('name', 'model', 'objective', 'optimizer', 'checkpoint', 'compute_dtype')


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether `export_checkpoint` made this folder."""
    return (pathlib.Path(path) / MODEL).is_file()


# ---- out
def export_checkpoint(
    run: str | os.PathLike, folder: str | os.PathLike, overwrite: bool = False
) -> int:
    """Write a model of ours as safetensors, with its config beside it.

    Args:
        run: a run folder, of which the newest model is taken, or one checkpoint folder.
        folder: the folder to write into; made where there is none.
        overwrite: whether to replace a model that is there.

    Returns:
        The number of arrays.

    Raises:
        ConfigError: there is no checkpoint, or the folder holds a model.
    """
    numpy_io = _safetensors().numpy
    folder = pathlib.Path(folder)
    files = [folder / name for name in (MODEL, CONFIG, INFO)]
    parameter_map.check_export(folder, files, overwrite)
    # `vatt_jax.load` would have two models to choose from.
    if RunFolder(folder).checkpoints.exists() or RunFolder(folder).phases.exists():
        raise ConfigError(f'--out={folder} is the folder of a run; name another folder')
    config, info, ours = parameter_map.read_run(run)
    # The library writes the bytes of an array as they lie.
    arrays = {'/'.join(path): np.ascontiguousarray(value) for path, value in ours.items()}
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(folder / CONFIG, to_json(config))
        write_atomically(folder / INFO, json.dumps(info, indent=1))
        # Last: a folder without it is no model.
        temporary = folder / f'{MODEL}.tmp'
        numpy_io.save_file(arrays, temporary, metadata=METADATA)
        os.replace(temporary, folder / MODEL)
    except (OSError, NotWritten, _safetensors().SafetensorError) as error:
        raise parameter_map.not_written(folder, error) from error
    return len(arrays)


# ---- in
def import_checkpoint(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    config: ConfigDict | None = None,
    base: ConfigDict | None = None,
    vocabulary: Sequence[str] | None = None,
) -> tuple[ConfigDict, Report]:
    """Make a run folder that holds such a model as step 0, with fresh optimizer slots.

    Args:
        folder: what `export_checkpoint` wrote.
        out: the run folder to make.
        config: what the model must fit; None: the config beside it.
        base: not used; the stored config is whole.
        vocabulary: words in the order of the word table, <pad> first; None: the stored ones.

    Returns:
        The config of the run, and what was read.

    Raises:
        ConfigError: anything does not fit; nothing is written then.
    """
    out = parameter_map.check_new(out)
    folder = pathlib.Path(folder)
    stored_config, info = _read_descriptions(folder)
    config = stored_config if config is None else config
    shapes, read = _open(folder)
    with_objective = any(name.startswith('objective/') for name in shapes)
    state, arrays, report = _read_arrays(folder, config, info, shapes, read, with_objective)
    parameter_map.write_run(out, config, state, arrays, info, vocabulary)
    return config, report


def load_model(
    folder: str | os.PathLike, mesh: Mesh
) -> tuple[ConfigDict, dict[str, Any], dict[str, Any]]:
    """Load such a model; see `vatt_jax.training.checkpoint.load_model`.

    Args:
        folder: what `export_checkpoint` wrote.
        mesh: the variables are replicated over it.

    Returns:
        The run's config, the variables of the model, and `info`. Among the variables are, as
        'objective', the parameters of a fine-tuned model's classifier; {} of other objectives.

    Raises:
        ConfigError: a file is missing or damaged, or the arrays do not fit the config.
    """
    folder = pathlib.Path(folder)
    config, info = _read_descriptions(folder)
    shapes, read = _open(folder)
    with_classifier = _has_classifier(config, info, shapes)
    _, arrays, _ = _read_arrays(folder, config, info, shapes, read, with_classifier)
    variables: dict[str, Any] = {}
    for group in GROUPS:
        flat = {path[1:]: value for path, value in arrays.items() if path[0] == group}
        variables[group] = unflatten_dict(flat)
    return config, jax.device_put(variables, sharding.replicated(mesh)), info


def _has_classifier(
    config: ConfigDict, info: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether the file holds a classifier of classes that are known.

    The heads of other objectives serve training alone, and their code may not be at hand.
    """
    if config.objective.name != 'classification':
        return False
    # Built: a stored config need not name the label.
    label = objectives.build(config.objective).config.label
    return label in info['labels'] and any(_is_objective(name) for name in shapes)


def _read_arrays(
    folder: pathlib.Path,
    config: ConfigDict,
    info: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    with_objective: bool,
) -> tuple[Any, dict[Path, np.ndarray], Report]:
    """The abstract TrainState, the arrays by path, and what was read."""
    state = parameter_map.abstract_state(config, info['labels'], with_objective)
    expected = parameter_map.variables(state)
    entries = []
    for path, like in expected.items():
        shape = tuple(like.shape)
        entries.append(Entry(path, None, '/'.join(path), shape, ('',) * len(shape)))
    arrays, report = parameter_map.to_ours(
        read, shapes, entries, str(folder / MODEL), expected, bookkeeping=_is_objective
    )
    return state, arrays, report


def _is_objective(key: str) -> bool:
    return key.startswith('objective/')


def _open(
    folder: pathlib.Path,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Shapes {name: shape} of the file, and a function that reads one array."""
    library = _safetensors()
    path = folder / MODEL
    try:
        file = library.safe_open(path, framework='numpy')
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, library.SafetensorError) as error:
        raise _unreadable(path, error) from error
    if not any(name.split('/')[0] in GROUPS for name in shapes):
        raise ConfigError(
            f'{path}: expected arrays of {", ".join(GROUPS)}, got '
            f'{shown(sorted(shapes)[:3])}; it is no model of this library'
        )

    def read(name: str) -> np.ndarray:
        try:
            return np.asarray(file.get_tensor(name))
        # Types that NumPy does not know by name are errors of several kinds.
        except Exception as error:
            raise _unreadable(path, error, name) from error

    return shapes, read


def _unreadable(path: pathlib.Path, error: Exception, name: str = '') -> ConfigError:
    where = f'{path}: {escaped(name)}' if name else str(path)
    return ConfigError(
        f'{where} cannot be read ({type(error).__name__}: {escaped(str(error), 200)}); fetch or '
        'export it again'
    )


def _read_descriptions(folder: pathlib.Path) -> tuple[ConfigDict, dict[str, Any]]:
    """The config and the info beside the arrays."""
    if not is_model_folder(folder):
        raise ConfigError(
            f'{folder} holds no {MODEL}; expected a folder that --format=safetensors --export made'
        )
    try:
        config = from_json((folder / CONFIG).read_text(encoding='utf-8'))
        info = json.loads((folder / INFO).read_text(encoding='utf-8'))
    # Files may be missing, no text, no JSON, JSON of something else, or nested too deep.
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f'{folder}: {CONFIG} and {INFO} belong to {MODEL} and cannot be read '
            f'({type(error).__name__}: {escaped(str(error), 200)}); copy or export them again'
        ) from error
    missing = [name for name in NEEDED if name not in config]
    if missing:
        raise ConfigError(f'{folder / CONFIG}: expected the config of a run, it lacks {missing}')
    if not isinstance(info, dict) or not isinstance(info.get('labels'), dict):
        raise ConfigError(f'{folder / INFO}: expected a group with labels, got {shown(info)}')
    return config, info


def _safetensors() -> Any:
    # Imported here: everything else of the library works without it.
    with extras.needed('exchange', f'reading and writing {MODEL}'):
        import safetensors
        import safetensors.numpy
    return safetensors
