"""Questions to an index: a sentence, a sound or a video in, stretches of files out."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from vatt_jax import api
from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer
from vatt_jax.search.index import Index, Window
from vatt_jax.search.neighbours import Approximate, Exact
from vatt_jax.search.window_features import WindowFeatures
from vatt_jax.training import checkpoint

# What a query is compared with where the caller does not say, in order of preference.
PREFERRED = {
    'text': ('video', 'audio'),
    'video': ('video', 'audio'),
    'audio': ('audio', 'video'),
}


@dataclasses.dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        window: where it is.
        score: cosine similarity with the query.
    """

    window: Window
    score: float


class Searcher:
    """An index and the model that made it.

    Args:
        index: an open index; read once.
        model: the model.
        approximate: search a graph of neighbours instead of all windows.

    Raises:
        ConfigError: the index is empty, or another model made it.
    """

    def __init__(self, index: Index, model: api.Model, approximate: bool = False):
        about = index.about()
        if about.get('model') != checkpoint.digest(model.variables):
            raise ConfigError(
                f'--index={index.folder}: expected the model that made it, '
                f'{about.get("workdir")} as it was then; got one with other weights. Index again '
                'with another --out'
            )
        self.folder = pathlib.Path(os.fsdecode(bytes.fromhex(about['folder'])))
        self.spaces = index.spaces()
        if not self.spaces:
            raise ConfigError(f'--index={index.folder}: expected windows in it, found none')
        self.windows = index.windows()
        self.features = WindowFeatures(model, about['window'], about['stride'])
        self._index_folder = index.folder
        self._approximate = approximate
        self._embeddings = {}
        for modality, spaces in self.spaces.items():
            for space in spaces:
                self._embeddings[modality, space] = index.embeddings(modality, space)
        self._neighbours: dict[tuple[str, str], Exact | Approximate] = {}

    @property
    def takes_text(self) -> bool:
        """Whether the model embeds sentences."""
        return 'text' in self.features.model.modalities

    def knows(self, sentence: str) -> bool:
        """Whether the model knows any word of a sentence; all others have one embedding."""
        model = self.features.model
        if model.tokenizer is None:
            return True
        numbers = model.tokenizer.encode([sentence], model.inputs['text']['words'])
        unknown = getattr(model.tokenizer, 'unknown', tokenizer.UNKNOWN)
        return bool(np.any((numbers != tokenizer.PAD) & (numbers != unknown)))

    def search(
        self,
        text: str = '',
        audio: str | os.PathLike = '',
        video: str | os.PathLike = '',
        against: str = '',
        space: str = '',
        count: int = 10,
    ) -> list[Hit]:
        """The stretches nearest to one query.

        Of windows of one file that overlap, the best one is an answer.

        Args:
            text: a sentence.
            audio: a file, whose sound is the query.
            video: a file, whose pictures are the query.
            against: what of the indexed files is compared, 'video' or 'audio'; '': that of the
                query's own kind, pictures for a sentence.
            space: the common space; '': the first that both sides have.
            count: the most answers.

        Raises:
            ConfigError: no query or several, or one that the model or index cannot answer.
        """
        given = {'text': text, 'audio': audio, 'video': video}
        kinds = [kind for kind, value in given.items() if os.fspath(value)]
        if len(kinds) != 1:
            raise ConfigError(
                'expected one of --query=TEXT, --query_audio=FILE and --query_video=FILE, '
                f'got {len(kinds)}'
            )
        if count < 1:
            raise ConfigError(f'--top: expected a positive number, got {count}')
        kind = kinds[0]
        if kind == 'text':
            query = self.features.embed_text(text)
        else:
            query = self.features.embed_file(given[kind], kind)
        modality, space = self._choose(kind, query, against, space)
        return self._find(query[space], modality, space, count)

    def _choose(
        self, kind: str, query: dict[str, np.ndarray], against: str, space: str
    ) -> tuple[str, str]:
        """(modality, space) in which a query is compared."""
        modalities = (against,) if against else PREFERRED[kind]
        for modality in modalities:
            for name in self.spaces.get(modality, ()):
                # Pooled features of two towers have nothing in common.
                is_shared = name in query and (name != 'pooled' or modality == kind)
                if is_shared and space in ('', name):
                    return modality, name
        available = []
        for modality, names in self.spaces.items():
            available.append(f'{modality}: {", ".join(names)}')
        raise ConfigError(
            f'a {kind} query (in {", ".join(query)}) has no common space with what is asked for '
            f'({against or "--against not given"}, {space or "--space not given"}); the index has '
            f'{"; ".join(available)}'
        )

    def _find(self, vector: np.ndarray, modality: str, space: str, count: int) -> list[Hit]:
        numbers, _ = self._embeddings[modality, space]
        neighbours = self._neighbours_of(modality, space)
        # Overlapping windows fall away, so more are asked for until there are enough.
        asked = 2 * count
        while True:
            rows, scores = neighbours.find(vector, asked)
            hits: list[Hit] = []
            for row, score in zip(rows, scores):
                window = self.windows[int(numbers[row])]
                if not any(_overlap(window, hit.window) for hit in hits):
                    hits.append(Hit(window, float(score)))
            if len(hits) >= count or asked >= len(numbers):
                return hits[:count]
            asked *= 4

    def _neighbours_of(self, modality: str, space: str) -> Exact | Approximate:
        if (modality, space) not in self._neighbours:
            numbers, vectors = self._embeddings[modality, space]
            if self._approximate:
                # Another graph as soon as anything in it changes.
                content = hashlib.sha256(numbers.tobytes() + vectors.tobytes()).hexdigest()
                path = self._index_folder / f'neighbours-{modality}-{space}-{content[:16]}.usearch'
                self._neighbours[modality, space] = Approximate(vectors, path)
            else:
                self._neighbours[modality, space] = Exact(vectors)
        return self._neighbours[modality, space]


def _overlap(a: Window, b: Window) -> bool:
    return a.file == b.file and a.start < b.end and b.start < a.end
