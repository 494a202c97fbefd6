"""What of an index browsers play: files as they are, or short clips of them made on demand."""

from __future__ import annotations

import collections
import os
import threading
from typing import Any

from vatt_jax.config import ConfigError
from vatt_jax.search.index import Window

# Clips that are kept, of a few hundred kilobytes each.
MOST_CLIPS = 64


class Playable:
    """Looks at files and makes clips, one at a time, in a process of their own.

    The latest clips are kept in memory.
    """

    def __init__(self) -> None:
        # Imported late: reading media is an extra.
        from data_pipelines import guarded_reading

        self._guard = guarded_reading.GuardedReader()
        self._lock = threading.Lock()
        self._plays: dict[str, bool] = {}
        self._clips: collections.OrderedDict[int, tuple[str, bytes]] = collections.OrderedDict()

    def plays(self, path: os.PathLike) -> bool:
        """Whether browsers play a file as it is."""
        name = os.fspath(path)
        with self._lock:
            if name not in self._plays:
                self._plays[name] = self._opens_and_plays(name)
            return self._plays[name]

    def _opens_and_plays(self, name: str) -> bool:
        from data_pipelines import media, short_clips

        try:
            return bool(self._guard.call(short_clips.plays_in_browsers, name))
        except media.MediaError:
            return False

    def kind_of(self, path: str) -> str:
        """'video' for a file with pictures, 'audio' for one of sound alone.

        Raises:
            ConfigError: the file cannot be read.
        """
        from data_pipelines import media, short_clips

        try:
            with self._lock:
                return 'video' if self._guard.call(short_clips.has_pictures, path) else 'audio'
        except (media.MediaError, OSError) as error:
            raise ConfigError(f'{path}: {error}') from error

    def clip(self, path: os.PathLike, window: Window) -> tuple[str, bytes] | None:
        """(MIME type, content) of a window; None where the file can no longer be read."""
        from data_pipelines import media, short_clips

        with self._lock:
            if window.id in self._clips:
                self._clips.move_to_end(window.id)
                return self._clips[window.id]
            arguments: tuple[Any, ...] = (os.fspath(path), window.start, window.end)
            try:
                clip = self._guard.call(short_clips.short_clip, *arguments)
            except (media.MediaError, OSError):
                return None
            self._clips[window.id] = clip
            if len(self._clips) > MOST_CLIPS:
                self._clips.popitem(last=False)
            return clip
