"""What a file is that was given as a checkpoint and is none of the importer's."""

from __future__ import annotations

import os
import pathlib

from vatt_jax.config import ConfigError
from vatt_jax.run_folder import RunFolder

FETCH = 'a web page; its address asks for a login, or is not that of the file itself'
UNPACK = 'compressed; unpack it first'
UNREAD = 'which no importer reads'
# First bytes -> what it is and what to do.
BEGINNINGS = (
    (b'<!doctype', FETCH),
    (b'<html', FETCH),
    (b'<?xml', FETCH),
    (b'version https://git-lfs', 'a pointer of Git LFS; git lfs pull fetches the file itself'),
    (b'\x1f\x8b', UNPACK),
    (b'bzh', UNPACK),
    (b'\xfd7zxz\0', UNPACK),
    (b'\x28\xb5\x2f\xfd', UNPACK),
    (b'7z\xbc\xaf', UNPACK),
    (b'\x89hdf', f'HDF5 (Keras), {UNREAD}'),
    (b'\x93numpy', f'an array of NumPy, {UNREAD}'),
    (b'gguf', f'GGUF, {UNREAD}'),
)
# Where the word of a tar archive lies.
TAR = slice(257, 262)
# The importer of each kind.
PICKLE, TENSORFLOW, SAFETENSORS = 'mmv', 'vatt_tf', 'safetensors'


def check(path: str | os.PathLike, wanted: str) -> None:
    """Raise ConfigError where a path is clearly of another kind than the importer reads.

    Args:
        path: given as --checkpoint; it need not exist, as the prefix of a TensorFlow checkpoint.
        wanted: the --format.

    Raises:
        ConfigError: with what it is and what to do.
    """
    path = pathlib.Path(path)
    # Beside a prefix there may be a folder of its name, and a copy of a folder may lack a part.
    has_index = wanted == TENSORFLOW and path.with_name(f'{path.name}.index').is_file()
    has_model = wanted == SAFETENSORS and (path / 'model.safetensors').is_file()
    found = _kind_of_folder(path) or _kind_of_file(path)
    if wanted not in (PICKLE, TENSORFLOW, SAFETENSORS) and _is_of_clip(path):
        return
    if not found or has_index or has_model:
        return
    importer, description = found
    if importer != wanted:
        advice = f'; give --format={importer}' if importer else ''
        raise ConfigError(
            f'--checkpoint={path}: expected a checkpoint for --format={wanted}, got '
            f'{description}{advice}'
        )


def _is_of_clip(path: pathlib.Path) -> bool:
    """Whether a path may be weights of CLIP or SigLIP, whose names alone tell the formats apart."""
    if path.is_dir():
        return any(path.glob('*model.safetensors'))
    found = _kind_of_file(path)
    return path.suffix in ('.npz', '.safetensors') or (found is not None and found[0] == PICKLE)


def _kind_of_folder(path: pathlib.Path) -> tuple[str, str] | None:
    """(its importer or '', description) of a folder; None where nothing is sure."""
    if not path.is_dir():
        return None
    run = RunFolder(path)
    if run.checkpoints.is_dir() or run.phases.is_dir() or (path / 'state').is_dir():
        return '', 'a run of this library, which vatt_jax.load and --config.init_from read as it is'
    if (path / 'info.json').is_file():
        return SAFETENSORS, 'a folder with a model of safetensors'
    if (path / 'saved_model.pb').is_file():
        return '', f'a SavedModel of TensorFlow, {UNREAD}; name the prefix of a checkpoint'
    if (path / 'pytorch_model.bin').is_file() or (path / 'model.safetensors').is_file():
        return '', f'a model of another library, {UNREAD}'
    if any(path.glob('*.index')):
        return TENSORFLOW, 'a folder of TensorFlow checkpoints'
    return '', 'a folder without a checkpoint; name the file in it'


def _kind_of_file(path: pathlib.Path) -> tuple[str, str] | None:
    """(its importer or '', description) of a file; None where nothing is sure."""
    try:
        with open(path, 'rb') as file:
            content = file.read(512)
    # Whoever reads it says what is wrong with it.
    except (OSError, ValueError):
        return None
    for beginning, description in BEGINNINGS:
        # Pages and archives are written in either case.
        if content[:64].lstrip().lower().startswith(beginning):
            return '', f'a file that is {description}'
    if content[TAR] == b'ustar':
        return '', 'an archive; unpack it first'
    if path.suffix == '.npz':
        return '', f'arrays of NumPy, {UNREAD}'
    if path.suffix == '.safetensors' or content[8:10] == b'{"':
        return '', 'a file of safetensors; name its folder, with --format=safetensors'
    if path.suffix == '.index' or '.data-0' in path.name:
        return TENSORFLOW, 'a part of a TensorFlow checkpoint'
    # Pickles since protocol 2, and the zip archives of torch.save.
    if content[:1] == b'\x80' or content[:4] == b'PK\x03\x04':
        return PICKLE, 'a pickle or a file of PyTorch'
    return None
