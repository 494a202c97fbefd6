"""Files window by window through the towers of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vatt_jax import api
from vatt_jax.config import ConfigError

# Clips that go through the model at a time; bounds the memory of an index run.
BATCH = 16
# Modalities of files, which an index holds.
MODALITIES = ('video', 'audio')
# (modality, space) -> (rows of the windows that have it, unit embeddings [N E]).
Features = dict[tuple[str, str], tuple[Int[np.ndarray, ' N'], Float[np.ndarray, 'N E']]]


class WindowFeatures:
    """Reads files in windows and embeds them.

    A window that is longer than the model's own clips is the mean of several of them, evenly
    spaced; a shorter one repeats, as in `embed`.

    Args:
        model: a trained model.
        seconds: length of a window; 0: that of the model's clips.
        stride: seconds from window to window; 0: `seconds`.

    Raises:
        ConfigError: the model has neither a video nor an audio tower, or a length is negative.
    """

    def __init__(self, model: api.Model, seconds: float = 0.0, stride: float = 0.0):
        self.model = model
        self.modalities = tuple(name for name in MODALITIES if name in model.modalities)
        if not self.modalities:
            raise ConfigError(
                'the model has neither a video nor an audio tower, so files cannot be searched'
            )
        for flag, value in {'--window': seconds, '--stride': stride}.items():
            if not 0 <= value < float('inf'):
                raise ConfigError(f'{flag}: expected a positive number of seconds, got {value:g}')
        clip_seconds = [self._clip_seconds(name) for name in self.modalities]
        self.seconds = seconds or max(clip_seconds)
        self.stride = stride or self.seconds
        self._guard: Any = None

    def _clip_seconds(self, modality: str) -> float:
        spec = self.model.inputs[modality]
        if modality == 'video':
            return spec['frames'] / spec['fps']
        return spec['samples'] / spec['rate']

    def read(self, path: str | os.PathLike, modalities: Sequence[str] = ()) -> Iterator[list[Any]]:
        """Yields the windows of a file (data_pipelines.media_windows.Window), a few at a time.

        Args:
            path: the file.
            modalities: what of it to read; (): all that the model has towers for.

        Raises:
            MediaError: the file cannot be read.
        """
        # Replaceable by any reader of windows with start, end, frames and samples.
        from data_pipelines import media_windows

        modalities = modalities or self.modalities
        video = self.model.inputs['video'] if 'video' in modalities else {'fps': 0, 'size': 1}
        rate = self.model.inputs['audio']['rate'] if 'audio' in modalities else 0
        yield from self.guard.iterate(
            media_windows.read_batches,
            path,
            video['fps'],
            video['size'],
            rate,
            self.seconds,
            self.stride,
            math.ceil(BATCH / self._clips_per_window()),
        )

    @property
    def guard(self) -> Any:
        """What reads files (data_pipelines.guarded_reading): one that crashes it is skipped."""
        if self._guard is None:
            from data_pipelines import guarded_reading

            self._guard = guarded_reading.GuardedReader()
        return self._guard

    def _clips_per_window(self) -> int:
        return max(self._num_clips(name) for name in self.modalities)

    def _num_clips(self, modality: str) -> int:
        return max(1, round(self.seconds / self._clip_seconds(modality)))

    def embed(self, windows: Sequence[Any]) -> Features:
        """Embeddings of windows, by modality and common space.

        Args:
            windows: as `read` yields them.

        Returns:
            {(modality, space): (rows of `windows`, unit embeddings)}. Windows without pictures, or
            without any sound but silence, are left out.
        """
        features: Features = {}
        for modality in self.modalities:
            rows, clips = [], []
            for row, window in enumerate(windows):
                array = window.frames if modality == 'video' else window.samples
                # Digital silence would be the neighbour of all other silence.
                if array is None or (modality == 'audio' and not array.any()):
                    continue
                parts = self._split(modality, array)
                clips.extend(parts)
                rows.extend([row] * len(parts))
            if clips:
                given: dict[str, Any] = {modality: clips}
                embedded = self.model.embed(**given, batch_size=BATCH)[modality]
                for space, vectors in _searchable(embedded).items():
                    features[modality, space] = _mean_by_row(np.asarray(rows), vectors)
        return features

    def _split(self, modality: str, array: np.ndarray) -> list[np.ndarray]:
        """Clips of the model's own length, evenly spaced over a window."""
        spec = self.model.inputs[modality]
        length = spec['frames'] if modality == 'video' else spec['samples']
        last = max(0, len(array) - length)
        count = self._num_clips(modality) if last else 1
        # One clip is taken from the middle, as `embed` does.
        begins = np.linspace(0, last, count) if count > 1 else [last / 2]
        return [array[int(begin) : int(begin) + length] for begin in begins]

    def embed_file(
        self, path: str | os.PathLike, modality: str
    ) -> dict[str, Float[np.ndarray, ' E']]:
        """One embedding for a whole file and each space: the mean of its windows.

        Raises:
            ConfigError: the file cannot be read, or has nothing of this modality.
        """
        from data_pipelines import media

        flag = f'--query_{modality}={os.fspath(path)!r}'
        sums: dict[str, np.ndarray] = {}
        try:
            for windows in self.read(path, (modality,)):
                for (found, space), (_, vectors) in self.embed(windows).items():
                    if found == modality:
                        sums[space] = sums.get(space, 0) + vectors.sum(axis=0)
        except (media.MediaError, OSError) as error:
            raise ConfigError(f'{flag}: {error}') from error
        if not sums:
            what = 'pictures' if modality == 'video' else 'sound other than silence'
            raise ConfigError(f'{flag}: expected a file with {what}, found none in it')
        return {space: _unit(vector) for space, vector in sums.items()}

    def embed_text(self, sentence: str) -> dict[str, Float[np.ndarray, ' E']]:
        """The embedding of a sentence in each space.

        Raises:
            ConfigError: the model does not take text.
        """
        return _searchable(self.model.embed(text=sentence)['text'])


def _searchable(embedded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The unit embeddings of common spaces; of a model without any, the pooled features."""
    # `valid` tells which rows are of nothing; there are none here.
    spaces = {
        name: vectors for name, vectors in embedded.items() if name not in ('pooled', 'valid')
    }
    return spaces or {'pooled': _unit(embedded['pooled'])}


def _mean_by_row(
    rows: Int[np.ndarray, ' M'], vectors: Float[np.ndarray, 'M E']
) -> tuple[Int[np.ndarray, ' N'], Float[np.ndarray, 'N E']]:
    """The mean of the vectors of each row, of unit length."""
    unique, first = np.unique(rows, return_index=True)
    return unique, _unit(np.add.reduceat(vectors, first, axis=0))


def _unit(x: Float[np.ndarray, '*rows E']) -> Float[np.ndarray, '*rows E']:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.maximum(length, 1e-12)).astype(np.float32)
