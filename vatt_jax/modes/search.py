"""--mode=search: stretches of indexed files that match a sentence, a sound or a video."""

from __future__ import annotations

import argparse
import pathlib

from vatt_jax import api
from vatt_jax.config import ConfigError
from vatt_jax.object_store import is_url
from vatt_jax.search.index import Index
from vatt_jax.search.searcher import Searcher
from vatt_jax.terminal import printable


def model_folder(index: str, workdir: str) -> str:
    """The run folder that made an index, or `workdir` where that has moved.

    Raises:
        ConfigError: no index is named, or there is none.
    """
    if not index:
        raise ConfigError('--mode=search reads an index; name it with --index')
    with Index(index) as opened:
        recorded = opened.about().get('workdir', workdir)
    # One on a store is not looked for: its answer may take a while, and loading tells the same.
    return recorded if is_url(recorded) or pathlib.Path(recorded).exists() else workdir


def run(workdir: pathlib.Path, flags: argparse.Namespace) -> None:
    """Prints the answers to one query, or serves a page that answers many.

    Args:
        workdir: the run folder that made the index.
        flags: index, query, query_audio, query_video, against, space, top, approximate, serve,
            port.

    Raises:
        ConfigError: see Searcher.
    """
    with Index(flags.index) as index:
        searcher = Searcher(index, api.load(workdir), flags.approximate)
    if flags.serve:
        from vatt_jax.search import page

        page.serve(searcher, flags.port)
        return
    hits = searcher.search(
        flags.query, flags.query_audio, flags.query_video, flags.against, flags.space, flags.top
    )
    for hit in hits:
        window = hit.window
        name = printable(str(window.path))
        print(f'{hit.score:6.3f}  {window.start:7.1f} – {window.end:.1f} s  {name}')
