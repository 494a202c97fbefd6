"""Official VATT checkpoints (TensorFlow 2: `ckpt-N.index`, `.data-*`) to our parameters and back.

Which variable is which stands in `vatt_tf_layout`, which size is which field in `vatt_tf_sizes`.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vatt_jax import extras
from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.importers import parameter_map
from vatt_jax.importers.messages import escaped, listed, shown
from vatt_jax.importers.parameter_map import Report
from vatt_jax.importers.vatt_tf_layout import CLASSIFIER, ROOT, layout
from vatt_jax.importers.vatt_tf_sizes import (
    HEAD_WIDTH,
    Shapes,
    differences,
    encoders_without_heads,
    filled,
    infer,
    kind,
    unknown_heads,
)
from vatt_jax.inputs import spectrogram
from vatt_jax.objectives import classification

__all__ = [
    'ROOT',
    'export_checkpoint',
    'filled',
    'import_checkpoint',
    'layout',
    'open_checkpoint',
    'write_checkpoint',
]

CONFIG_NEEDED = (
    'set these fields as the checkpoint has them; --config is needed, since a checkpoint does not '
    'record how many heads its encoders have'
)
# What TensorFlow appends to the path of every variable.
SUFFIX = '/.ATTRIBUTES/VARIABLE_VALUE'


# ---- files
def open_checkpoint(prefix: str) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Open a TensorFlow checkpoint.

    Args:
        prefix: path of the checkpoint without `.index`.

    Returns:
        The shapes {key without SUFFIX: shape}, and a function that reads the array of one key.

    Raises:
        ConfigError: there is no such checkpoint, or it cannot be read.
    """
    tf = _tensorflow()
    prefix = _prefix_of(prefix)
    if not pathlib.Path(f'{prefix}.index').is_file():
        raise ConfigError(f'--checkpoint={prefix}: no file {prefix}.index; {_nearby(prefix)}')
    _check_data_files(prefix)
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes = reader.get_variable_to_shape_map()
        shapes = {key: tuple(shape) for key, shape in shapes.items()}
    except Exception as error:  # TensorFlow's errors have many types
        raise ConfigError(
            f'--checkpoint={prefix}: {prefix}.index cannot be read ({_reason(error)}); fetch the '
            'checkpoint again'
        ) from error
    # A serialized description of the objects, stored among the variables.
    shapes.pop('_CHECKPOINTABLE_OBJECT_GRAPH', None)
    full_keys = {key.removesuffix(SUFFIX): key for key in shapes}

    def read(key: str) -> np.ndarray:
        try:
            # Of a scalar TensorFlow makes a NumPy scalar.
            return np.asarray(reader.get_tensor(full_keys[key]))
        except Exception as error:
            files = ', '.join(str(file) for file in _data_files(prefix))
            raise ConfigError(
                f'--checkpoint={prefix}: {escaped(key)} cannot be read from {files} '
                f'({_reason(error)}): the file is cut short or damaged; fetch it again'
            ) from error

    return {key.removesuffix(SUFFIX): shape for key, shape in shapes.items()}, read


def _reason(error: Exception) -> str:
    """The type and the first line of an error of TensorFlow's."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {escaped(lines[0], 200)}'


def _check_data_files(prefix: str) -> None:
    """Check that the files with the numbers are all there; their names say how many."""
    names = [file.name for file in _data_files(prefix)]
    if not names:
        raise ConfigError(
            f'--checkpoint={prefix}: {prefix}.index is there and no file '
            f'{prefix}.data-00000-of-00001; fetch it too, into the same folder'
        )
    count = re.search(r'-of-(\d+)$', names[0])
    if count and len(names) < int(count[1]):
        raise ConfigError(
            f'--checkpoint={prefix}: expected {int(count[1])} files {prefix}.data-…, got '
            f'{len(names)}; fetch the others too'
        )


def _lost_bookkeeping(prefix: str, shapes: Shapes, read: Callable[[str], np.ndarray]) -> list[str]:
    """Variables of the optimizer and the like that the data files, cut short, no longer hold.

    Those of the model are read anyway. These are read only where the files are too short: a whole
    checkpoint has twice as many numbers of them as of the model.
    """
    reader = _tensorflow().train.load_checkpoint(prefix)
    expected_bytes = 0
    for key, dtype in reader.get_variable_to_dtype_map().items():
        name = key.removesuffix(SUFFIX)
        # The description of objects is text, whose length is not recorded; it comes first.
        if name in shapes and dtype.size:
            expected_bytes += math.prod(shapes[name]) * dtype.size
    try:
        # Stored with its length, of at least two bytes, and a checksum of four.
        expected_bytes += len(reader.get_tensor('_CHECKPOINTABLE_OBJECT_GRAPH')) + 6
    except Exception:  # there is none, or it is lost
        pass
    found_bytes = sum(file.stat().st_size for file in _data_files(prefix))
    if found_bytes >= expected_bytes:
        return []
    lost = []
    for name in sorted(shapes):
        if not bookkeeping(name):
            continue
        try:
            read(name)
        except ConfigError:
            lost.append(name)
    return lost


def _nearby(prefix: str) -> str:
    """What there is in the folder instead."""
    folder = pathlib.Path(prefix).parent
    if pathlib.Path(prefix).is_dir():
        folder = pathlib.Path(prefix)
    prefixes = sorted(str(path.with_suffix('')) for path in folder.glob('*.index'))
    if prefixes:
        return f'there are {listed(prefixes)}'
    if pathlib.Path(prefix).is_file():
        return 'it is a file of its own; name its kind with --format (a pickle: --format=mmv)'
    return f'folder {folder} holds no TensorFlow checkpoint'


def _prefix_of(path: str) -> str:
    """The path without the end of one of a checkpoint's files, as shells complete it."""
    return re.sub(r'\.(index|data-\d{5}-of-\d{5})$', '', path)


def _data_files(prefix: str | os.PathLike) -> list[pathlib.Path]:
    """The files that hold the numbers of a checkpoint."""
    path = pathlib.Path(prefix)
    # Not by a pattern: a name may hold characters that patterns give a meaning.
    if not path.parent.is_dir():
        return []
    begin = f'{path.name}.data-'
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(begin))


def write_checkpoint(prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write variables as tf.train.Checkpoint does.

    The keys are the same, and so is the object graph by which the official code restores them.

    Args:
        prefix: path of the checkpoint without `.index`.
        arrays: {key without SUFFIX: array}.

    Raises:
        ConfigError: it cannot be written.
    """
    tf = _tensorflow()
    # Official code restores by object graph rather than by key. Modules nested as the keys are give
    # both.
    root = tf.train.Checkpoint()
    nodes: dict[tuple[str, ...], Any] = {(): root}

    def node(path: tuple[str, ...]) -> Any:
        """The module at a path, made together with its parents where there is none yet."""
        if path not in nodes:
            nodes[path] = tf.Module()
            # Attributes of a module are tracked, even those named '0', which no code could write.
            setattr(node(path[:-1]), path[-1], nodes[path])
        return nodes[path]

    for key, value in arrays.items():
        *parents, name = key.split('/')
        setattr(node(tuple(parents)), name, tf.Variable(value))
    pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    # Not `save`, which would add a counter to the variables and a number to the name.
    try:
        root.write(prefix)
    except Exception as error:  # TensorFlow's errors have many types
        raise parameter_map.not_written(pathlib.Path(prefix), error) from error


def _tensorflow() -> Any:
    # Imported here: everything else of the library works without TensorFlow.
    with extras.needed('data', 'reading and writing TensorFlow checkpoints'):
        import tensorflow as tf
    tf.config.set_visible_devices([], 'GPU')  # else it would reserve the memory JAX needs
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
    """Make a run folder that holds an official checkpoint as step 0.

    `vatt_jax.load`, --mode=eval, init_from and further training take it. Optimizer slots are not
    imported: training goes on with fresh ones.

    Args:
        prefix: path of the checkpoint without `.index`.
        out: the run folder to make.
        config: what the checkpoint must fit; None: `base` with the sizes of the checkpoint.
        base: configs/default.py; needed where `config` is None.
        vocabulary: words in the order of the word table, <pad> first.
        classes: names of a fine-tuned model's classes, in the order of its logits.

    Returns:
        The config of the run, and what was read, resized and left out.

    Raises:
        ConfigError: anything does not fit; nothing is written then.
    """
    out = parameter_map.check_new(out)
    prefix = _prefix_of(prefix)
    shapes, read = open_checkpoint(prefix)
    checkpoint_kind = kind(shapes)
    is_inferred = config is None
    if config is None:
        config = _inferred_config(prefix, shapes, checkpoint_kind, base)

    # Only fine-tuned checkpoints have a classifier, which is the objective's in our layout.
    objective, labels, num_classes = None, {}, 0
    if checkpoint_kind == 'finetuned':
        _check_classifier(prefix, config)
        objective = with_defaults(config.objective, classification.DEFAULTS, 'config.objective')
        names = _class_names(prefix, shapes, classes)
        labels, num_classes = {objective.label: names}, len(names)
    elif config.objective.name == 'classification' and not is_inferred:
        raise ConfigError(
            f'--checkpoint={prefix} is pretrained ({checkpoint_kind}) and config.objective.name is '
            'classification; choose a config of configs/vatt.py here, and fine-tune with '
            '--config.init_from'
        )
    # What the release is evaluated in; published training configs say bfloat16.
    config.compute_dtype = 'float32'
    model = filled(config)
    # A fine-tuned tower fits both kinds of model: the official code gives it an encoder of its own.
    if checkpoint_kind != 'finetuned' and model['shared'] != (checkpoint_kind == 'ut_fac'):
        scope = 'modality-agnostic' if model['shared'] else 'modality-specific'
        raise ConfigError(
            f'--checkpoint={prefix} is {checkpoint_kind}, and config.model.shared='
            f'{model["shared"]} makes a {scope} model; choose another config'
        )

    entries = list(layout(model, objective, num_classes))
    # Nothing is learnt yet of a tower alone.
    with_objective = objective is not None or config.objective.name != 'classification'
    state = parameter_map.abstract_state(config, labels, with_objective)
    try:
        unlike = differences(infer(shapes), model, objective)
    except ConfigError:  # a variable that decides a size is missing: to_ours lists it
        unlike = []
    arrays, report = parameter_map.to_ours(
        read,
        shapes,
        entries,
        f'--checkpoint={prefix}',
        parameter_map.variables(state),
        bookkeeping,
        unlike,
        CONFIG_NEEDED if unknown_heads(shapes) else parameter_map.ADVICE,
    )
    report.unreadable = _lost_bookkeeping(prefix, shapes, read)
    if is_inferred:
        report.assumed += [
            f'heads of {HEAD_WIDTH} in {encoder}: a checkpoint does not record how many there are'
            for encoder in encoders_without_heads(shapes)
        ]
    # `sources` is empty: no data of ours went into these weights.
    info = {
        'labels': labels,
        'sources': [],
        'imported': {'from': pathlib.Path(prefix).name, 'kind': checkpoint_kind},
    }
    parameter_map.write_run(out, config, state, arrays, info, vocabulary)
    return config, report


def bookkeeping(key: str) -> bool:
    """Whether a variable belongs to the optimizer or to counters, not to the model."""
    return not key.startswith('model/') or '/.OPTIMIZER_SLOT/' in key


def _inferred_config(
    prefix: str, shapes: Shapes, checkpoint_kind: str, base: ConfigDict | None
) -> ConfigDict:
    """The default config with the sizes of the checkpoint."""
    assert base is not None, 'base is needed where no config is given'
    inferred = infer(shapes)
    _check_head_width(prefix, shapes)

    # A copy: `base` belongs to the caller.
    config = base.copy_and_resolve_references()
    config.name = f'VATT {checkpoint_kind}'
    config.model.update({'shared': inferred['shared'], 'head': ConfigDict(inferred['head'])})
    # Replaced, not updated: the default's towers have fields that these have not.
    config.model.towers = ConfigDict(inferred['towers'])
    config.model.encoder = ConfigDict(inferred['encoder'])
    # A spectrogram tower needs the parameters of the spectrogram, which no shape records.
    has_spectrogram_tower = any(
        tower.name in ('spt', 'resnet2d') for tower in config.model.towers.values()
    )
    if has_spectrogram_tower and not config.model.inputs.audio.get('mel'):
        config.model.inputs.audio.mel = ConfigDict(spectrogram.DEFAULTS)
    # Pairs of modalities that the file has. A tower alone has none, and is there to be fine-tuned.
    towers, head = inferred['towers'], inferred['head']
    pairs = [
        ('video', modality, space, 1.0)
        for modality, space in (('audio', 'va'), ('text', 'vat'))
        if 'video' in towers and modality in towers and space in head
    ]
    if pairs:
        if len(pairs) < 2:
            config.objective = ConfigDict({'name': 'contrastive', 'pairs': tuple(pairs)})
    else:
        modality = next(iter(towers))
        config.objective = ConfigDict(
            {'name': 'classification', 'stream': modality, 'label': 'class'}
        )
    return config


def _check_head_width(prefix: str, shapes: Shapes) -> None:
    """Refuse to guess how many heads an encoder has where they are not of the official width."""
    unknown = unknown_heads(shapes)
    if unknown:
        fields = [
            f'config.{field}.heads × head_width = {width}' for field, width in unknown.items()
        ]
        raise ConfigError(
            f'--checkpoint={prefix}: its encoders are not made of heads of {HEAD_WIDTH}, as '
            'official ones are, and a checkpoint does not record how many heads there are; give a '
            f'--config with {", ".join(fields)}'
        )


def _check_classifier(prefix: str, config: ConfigDict) -> None:
    if config.objective.name != 'classification':
        raise ConfigError(
            f'--checkpoint={prefix} is fine-tuned (it has {CLASSIFIER}) and config.objective.name '
            f'is {config.objective.name!r}; choose a config of configs/vatt_finetune.py'
        )
    if config.model.head.name != 'none':
        raise ConfigError(
            f'--checkpoint={prefix} is fine-tuned and has no common spaces; set '
            'config.model.head={"name": "none"}'
        )


def _class_names(prefix: str, shapes: Shapes, classes: Sequence[str] | None) -> list[str]:
    """The names given, or numbers; as many as the classifier has outputs."""
    bias = f'{CLASSIFIER}/bias'
    if bias not in shapes:
        raise ConfigError(
            f'--checkpoint={prefix} lacks {bias}, so the number of its classes is unknown'
        )
    if len(shapes[bias]) != 1:
        raise ConfigError(
            f'--checkpoint={prefix}: {bias} has shape {shown(list(shapes[bias]))}, expected one '
            'axis of classes'
        )
    num_classes = shapes[bias][0]
    # The checkpoint holds no names; a classifier needs some to report and predict with.
    if classes is None:
        return [str(i) for i in range(num_classes)]
    if len(classes) != num_classes:
        raise ConfigError(
            f'--classes has {len(classes)} names and the checkpoint {num_classes} classes'
        )
    return list(classes)


def export_checkpoint(
    run: str | os.PathLike, prefix: str | os.PathLike, overwrite: bool = False
) -> int:
    """Write a model of ours as an official checkpoint of weights.

    Args:
        run: a run folder, of which the newest model is taken, or one checkpoint folder.
        prefix: path of the checkpoint to write, without `.index`.
        overwrite: whether to replace a checkpoint that is there.

    Returns:
        The number of variables written.

    Raises:
        ConfigError: the model has parts that the official layout has not, or the checkpoint exists.
    """
    out = pathlib.Path(prefix)
    parameter_map.check_export(out, [pathlib.Path(f'{out}.index'), *_data_files(out)], overwrite)
    config, info, ours = parameter_map.read_run(run)
    objective, num_classes = None, 0
    # A tower imported alone is to be fine-tuned, and has no classifier yet.
    has_classifier = any(path[0] == 'objective' for path in ours)
    if config.objective.name == 'classification' and has_classifier:
        objective = with_defaults(config.objective, classification.DEFAULTS, 'config.objective')
        num_classes = len(info['labels'][objective.label])
    entries = list(layout(filled(config), objective, num_classes))
    parameter_map.check_same(run, ours, entries)
    write_checkpoint(str(prefix), parameter_map.to_theirs(ours, entries))
    return len(entries)
