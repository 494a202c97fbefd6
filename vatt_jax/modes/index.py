"""--mode=index: the embeddings of a folder of videos and sounds, window by window."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sqlite3
import time
from collections.abc import Iterator

import jax

from vatt_jax import api
from vatt_jax.config import ConfigError
from vatt_jax.object_store import is_url
from vatt_jax.search import index as search_index
from vatt_jax.search.window_features import WindowFeatures
from vatt_jax.terminal import printable
from vatt_jax.training import checkpoint

# Seconds between two lines of progress.
PRINT_EVERY = 10.0


def run(
    workdir: pathlib.Path, videos: str, out: str, window: float, stride: float, name: str = ''
) -> None:
    """Makes the index `out` of a folder, or brings it up to date.

    Files that are done and have not changed are not read again; files that are gone leave the
    index. What cannot be read is skipped with its reason.

    Args:
        workdir: the run folder, whose newest checkpoint embeds.
        videos: the folder.
        out: the index to make or to continue.
        window: seconds of a window; 0: the length of the model's clips.
        stride: seconds from window to window; 0: `window`.
        name: where the run is, if `workdir` is a copy of it; searching loads the model from there.

    Raises:
        ConfigError: a wrong argument, no file to index, or an index of something else.
    """
    _check_flags(videos, out)
    from data_pipelines import media

    folder = pathlib.Path(videos)
    paths, unreadable = search_index.find_media(folder, media.SUFFIXES)
    if not paths:
        raise ConfigError(
            f'--videos={videos}: expected files of {", ".join(media.SUFFIXES)}, found none in it'
        )
    model = api.load(workdir)
    features = WindowFeatures(model, window, stride)
    with (
        _told(out),
        search_index.Index(out, create=True) as index,
        contextlib.closing(features.guard),
    ):
        about = {
            'workdir': name if is_url(name) else str(workdir.absolute()),
            'model': checkpoint.digest(model.variables),
            'folder': os.fsencode(folder.resolve()).hex(),
            'window': features.seconds,
            'stride': features.stride,
        }
        index.claim(about, {'model': '--workdir (digest of its weights)', **SETTINGS})
        for place, reason in unreadable:
            print(f'skipped {printable(os.fsdecode(place))}: {reason}')
        if not unreadable:
            _forget_gone(index, paths)
        _index_files(index, features, folder, paths)
        num_files, num_windows = index.count()
        num_skipped = len(index.skipped())
        print(
            f'{num_files} files, {num_windows} windows of {features.seconds:g} s every '
            f'{features.stride:g} s, {num_skipped} files skipped → {out}'
        )
        if not num_windows:
            raise ConfigError(
                f'--videos={videos}: none of {len(paths)} files could be read; the reasons are '
                'above, and `ffmpeg -i FILE` says more'
            )


# What an index cannot change: name in `about` -> flag.
SETTINGS = {'folder': '--videos (as bytes)', 'window': '--window', 'stride': '--stride'}


@contextlib.contextmanager
def _told(out: str) -> Iterator[None]:
    """What SQLite raises (a full disk, another process that writes) as one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise ConfigError(
            f'--out={out}: expected an index that can be written, got: {error}. What was finished '
            'stays, and the same command continues'
        ) from error


def _check_flags(videos: str, out: str) -> None:
    if not videos:
        raise ConfigError('--mode=index reads a folder of media files; name it with --videos')
    if not out:
        raise ConfigError('--mode=index makes an index; name its folder with --out')
    if jax.process_count() > 1:
        raise ConfigError(
            f'--mode=index works in one process, this is one of {jax.process_count()}; run it '
            'outside of the launcher'
        )


def _forget_gone(index: search_index.Index, paths: list[bytes]) -> None:
    gone = sorted(set(index.stamps()) - set(paths))
    for path in gone:
        index.forget(path)
    if gone:
        print(f'{len(gone)} files are gone from the folder and left the index: {_few(gone)}')


def _index_files(
    index: search_index.Index,
    features: WindowFeatures,
    folder: pathlib.Path,
    paths: list[bytes],
) -> None:
    """Reads the files that are new or have changed."""
    from data_pipelines import media

    done = index.stamps()
    known_reasons = index.skipped()
    root = os.fsencode(folder)
    printed = time.monotonic()
    for number, path in enumerate(paths, start=1):
        full_path = os.fsdecode(os.path.join(root, path))
        try:
            stamp = search_index.stamp_of(os.fsencode(full_path))
        except OSError as error:
            # Not noted in the index: permissions may be others tomorrow.
            print(f'skipped {printable(os.fsdecode(path))}: {error.strerror or error}')
            continue
        if done.get(path) == stamp:
            if path in known_reasons:
                print(f'skipped {printable(os.fsdecode(path))}: {known_reasons[path]} (as before)')
            continue
        try:
            with index.write_file(path, stamp) as writer:
                for windows in features.read(full_path):
                    writer.add(windows, features.embed(windows))
        # UnicodeError: a reader that takes no name that is not text.
        except (media.MediaError, OSError, UnicodeError) as error:
            index.skip_file(path, stamp, str(error))
            print(f'skipped {printable(os.fsdecode(path))}: {error}', flush=True)
        if time.monotonic() - printed > PRINT_EVERY:
            printed = time.monotonic()
            print(f'{number} of {len(paths)} files', flush=True)


def _few(paths: list[bytes], count: int = 5) -> str:
    names = ', '.join(printable(os.fsdecode(path)) for path in paths[:count])
    return names if len(paths) <= count else f'{names}, …'
