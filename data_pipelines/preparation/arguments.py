"""Checks of what preparation is asked for, shared by `prepare` and `dmvr`."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from vatt_jax import extras
from vatt_jax.config import ConfigError
from vatt_jax.inputs import optical_flow

# Characters of a dataset's name: files are called so, with split and number behind it.
_MAX_NAME = 128


def check_arguments(
    settings: decoded_files.Settings,
    name: str,
    vocabulary: int,
    validation: float,
    test: float,
    processes: int,
) -> None:
    """Raise DataError for the first argument that makes no sense."""
    # yuv420p halves the colour planes, so H.264 needs an even size.
    size_fits = 8 <= settings.size <= 4096 and not (settings.crf and settings.size % 2)
    if settings.flow:
        size_fits &= settings.size >= optical_flow.SMALLEST
    # (flag, its value, whether it makes sense)
    checks: list[tuple[str, float, bool]] = [
        # The bounds are generous; they catch units that were mixed up, such as a rate in kHz.
        ('fps', settings.fps, 0 < settings.fps <= 120),
        ('rate', settings.rate, 1000 <= settings.rate <= 192000),
        ('size', settings.size, size_fits),
        ('quality', settings.quality, 1 <= settings.quality <= 100),
        ('min_seconds', settings.min_seconds, settings.min_seconds >= 0),
        # Two entries are padding and unknown words.
        ('vocabulary', vocabulary, vocabulary >= 3 and vocabulary % 1 == 0),
        ('processes', processes, processes >= 1),
        ('validation', validation, validation >= 0 and validation + test < 1),
        ('test', test, test >= 0),
    ]
    for flag, value, makes_sense in checks:
        if not makes_sense:
            raise DataError(f'--{flag}={value} makes no sense; see --help for what it means')
    # tfds derives a class and a folder from the name and accepts only snake case.
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name) or len(name) > _MAX_NAME:
        raise DataError(
            f'--name={name}: expected lower-case letters, digits and underscores, '
            f'beginning with a letter, {_MAX_NAME} at most'
        )


def path_argument(name: str, value: Any) -> str:
    """An argument that is a path, as text; '' for None, and `~` is the home folder.

    Args:
        name: of the argument.
        value: as it was given.

    Raises:
        DataError: it is no path.
    """
    if value is None:
        return ''
    if not isinstance(value, str | bytes | os.PathLike):
        raise DataError(f'{name}: expected a path, got {type(value).__name__}')
    return os.path.expanduser(os.fsdecode(value))


def stored_crf(store: str, crf: int) -> int:
    """`crf` as `decoded_files.Settings` has it: 0 if frames are stored as JPEG."""
    if store not in ('jpeg', 'h264') or not 1 <= crf <= 51:
        raise DataError(
            f'--store={store} --crf={crf} makes no sense; --store is jpeg or h264, '
            '--crf from 1 (best) to 51'
        )
    return crf if store == 'h264' else 0


def flow_method(flow: str) -> str:
    """The method of optical flow, '' for none.

    Args:
        flow: the argument.

    Raises:
        DataError: there is no such method, or what is installed lacks it.
        MissingExtra: OpenCV is not installed.
    """
    if flow:
        try:
            # Before anything is decoded.
            optical_flow.Flows(flow)
        except extras.MissingExtra:
            raise
        except ConfigError as error:
            raise DataError(f'--{error}') from None
    return flow


def resize_method(resize: str) -> str:
    """How image files are scaled; DataError for what is no way to do so."""
    if resize not in media.RESIZES:
        raise DataError(f'--resize={resize}: expected {" or ".join(media.RESIZES)}')
    return resize


def dataset_name(out: pathlib.Path) -> str:
    """A name that tfds accepts, from the name of the folder."""
    name = re.sub(r'[^a-z0-9]+', '_', out.resolve().name.lower()).strip('_')
    if not name:
        return 'videos'
    if not re.match('[a-z]', name):
        name = f'set_{name}'
    return name[:_MAX_NAME]
