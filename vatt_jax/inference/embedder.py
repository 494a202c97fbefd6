"""Inputs of users -> rows of features: read, encoded in batches, and joined again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays, media_files, sounds
from vatt_jax.inference.arrays import FILES
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.inference.item_windows import ItemReader, Piece, in_turn
from vatt_jax.inference.notices import Notices, progress_bar, summary, warn
from vatt_jax.inference.requests import TOWERS, Request
from vatt_jax.inference.sentences import SentenceReader, list_texts
from vatt_jax.inputs.modalities import PICTURES, kind_of

# Features by name ('pooled', 'logits' or a common space): [N …].
Features = dict[str, np.ndarray]
# Of a batch of windows: how many there were, which of them the modality has, their features.
Part = tuple[int, list[int], Features]


@dataclasses.dataclass
class Rows:
    """Features of one modality, a row for each window of each item.

    Attributes:
        features: name -> [N ...].
        item: int32 [N], number of the item.
        start: float32 [N], seconds.
        valid: bool [N].
        is_single: whether a single item was given.
        tells_valid: whether some rows may be of nothing.
    """

    features: Features
    item: np.ndarray
    start: np.ndarray
    valid: np.ndarray
    is_single: bool
    tells_valid: bool = False

    def as_output(self, has_windows: bool) -> dict[str, np.ndarray]:
        """The features with what tells their rows apart."""
        out = dict(self.features)
        if self.tells_valid:
            out['valid'] = self.valid
        if has_windows:
            out['start'] = self.start
            if not self.is_single:
                out['item'] = self.item
        elif self.is_single:
            out = {key: rows[0] for key, rows in out.items()}
        return out


class Embedder:
    """Encodes what users give.

    Args:
        extractor: the model.
        inputs: modality -> its description in `config.model.inputs`.
        tokenizer: None where the checkpoint carries none.
        notices: what the user is told.
        flow: how optical flow is computed, see `ItemReader`.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        inputs: Mapping[str, Any],
        tokenizer: Any,
        notices: Notices,
        flow: Mapping[str, Any] | None = None,
    ):
        self._extractor, self._notices = extractor, notices
        self._reader = ItemReader(inputs, notices.tell, flow)
        if 'text' in inputs:
            self._sentences = SentenceReader(tokenizer, inputs['text']['words'], notices.tell)

    def rows(self, given: Mapping[str, Any], request: Request) -> dict[str, Rows]:
        """Rows of every input; those of the sound of media files come as `audio`.

        Args:
            given: 'video', 'audio', 'text', 'image' or 'flow' -> what the user passed.
            request: how it is read.

        Raises:
            ConfigError: the model lacks a tower, or an input cannot be read.
        """
        self._check_towers(given, request.call)
        # All are looked at before any is encoded: that may take hours.
        listed = {name: self._listed(name, value, request) for name, value in given.items()}
        results: dict[str, Rows] = {}
        for name, (items, is_single, rate) in listed.items():
            if name == 'text':
                results[name] = self._text_rows(items, is_single, request)
                continue
            asked = request if rate is None else dataclasses.replace(request, rate=rate)
            results.update(self._item_rows(name, items, is_single, asked))
        return results

    def encode_text(self, sentences: Sequence[Any], request: Request, where: str) -> Features:
        """Features [N …] of N sentences.

        Raises:
            ConfigError: they are no strings, or the model has no tokenizer.
        """
        words = self._sentences.words(sentences, where)
        return self._encode('text', list(words), request.batch_size)

    def _check_towers(self, given: Mapping[str, Any], call: str) -> None:
        if not given:
            raise ConfigError(
                f'{call}() was given nothing; name at least one of video=, audio=, text=, image=, '
                'flow='
            )
        modalities = self._extractor.modalities
        for name in given:
            tower = TOWERS.get(name, name)
            if tower not in modalities:
                raise ConfigError(
                    f'{call}({name}=…): this model has no {tower} tower; '
                    f'it has {", ".join(modalities)}'
                )

    def _listed(self, name: str, value: Any, request: Request) -> tuple[list[Any], bool, Any]:
        """(items, whether a single one was given, the rate of a sound that came with it)."""
        where = request.where(name)
        rate = None
        if name in ('video', 'flow'):
            items, is_single = arrays.list_videos(value, where)
        elif name == 'image':
            items, is_single = arrays.list_images(value, where)
        elif name == 'audio':
            items, is_single, rate = sounds.list_sounds(value, where, self._notices.tell)
            if rate is not None and request.rate is not None and rate != request.rate:
                raise ConfigError(
                    f'{request.call}(audio=(samples, {rate}), rate={request.rate}): expected one '
                    'rate; leave rate= out'
                )
        else:
            items, is_single = list_texts(value, where)
        if not items:
            raise ConfigError(f'{request.call}({name}=[]): the list is empty')
        paths = [item for item in items if isinstance(item, FILES) and name != 'text']
        missing = media_files.missing_files(paths, request.call, name)
        if missing and request.on_error == 'raise':
            raise ConfigError(missing)
        return items, is_single, rate

    def _text_rows(self, items: Sequence[Any], is_single: bool, request: Request) -> Rows:
        features = self.encode_text(items, request, request.where('text'))
        count = len(items)
        return Rows(
            features,
            np.arange(count, dtype=np.int32),
            np.zeros(count, np.float32),
            np.ones(count, bool),
            is_single,
        )

    def _item_rows(
        self, name: str, items: Sequence[Any], is_single: bool, request: Request
    ) -> dict[str, Rows]:
        """Rows of clips, sounds or pictures, encoded while the next ones are read."""
        has_files = any(isinstance(item, FILES) for item in items)
        takes_sound = name == 'video' and has_files and request.takes_sound
        readers = []
        for number, item in enumerate(items):
            where = request.where(name, item, None if is_single else number)
            readers.append(
                functools.partial(self._reader.pieces, name, item, request, where, takes_sound)
            )
        modalities = [name, 'audio'] if takes_sound else [name]
        collected = _Windows(self._encode, modalities, request.batch_size)
        bar = progress_bar(len(items), request.has_windows, has_files and not request.quiet)
        with bar as advance:
            for number, piece in in_turn(readers, has_files):
                advance(number)
                collected.add(number, piece)
            collected.flush()
        if collected.errors:
            warn(summary(collected.errors, len(items)))
        return collected.rows(name, is_single, request)

    def _encode(self, name: str, items: list[np.ndarray], batch_size: int) -> Features:
        """Features of prepared items of one kind."""
        shapes = sorted({item.shape for item in items})
        if len(shapes) == 1:
            return self._encode_alike(name, items, batch_size)
        # Clips that the device resizes and clips that it does not.
        features: Features = {}
        for shape in shapes:
            rows = [i for i, item in enumerate(items) if item.shape == shape]
            alike = self._encode_alike(name, [items[i] for i in rows], batch_size)
            for key, value in alike.items():
                if key not in features:
                    features[key] = np.zeros((len(items), *value.shape[1:]), value.dtype)
                features[key][rows] = value
        return features

    def _encode_alike(self, name: str, items: list[np.ndarray], batch_size: int) -> Features:
        """The same, of items of one shape."""
        # Powers of two: few sizes, so few compilations.
        batch_size = min(batch_size, 1 << (len(items) - 1).bit_length())
        parts = []
        for begin in range(0, len(items), batch_size):
            parts.append(self._encode_batch(name, items[begin : begin + batch_size], batch_size))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _encode_batch(self, name: str, items: list[np.ndarray], batch_size: int) -> Features:
        """The same, of no more items than the program takes."""
        tower = TOWERS.get(name, name)
        stream = as_stream(name, np.stack(items), batch_size)
        batch = {tower: stream, 'position': np.arange(batch_size), 'valid': stream['valid']}
        features = self._extractor(batch)
        named = {'pooled': features['pooled'][tower]}
        for space, members in features['spaces'].items():
            if tower in members:
                named[space] = members[tower]
        for logits in features['predictions'].values():
            named['logits'] = logits
        rows = {key: value[: len(items)] for key, value in named.items()}
        if name == 'text':
            # One candidate sentence each: [B 1 E] -> [B E].
            rows = {key: value[:, 0] for key, value in rows.items()}
        return rows


class _Windows:
    """Windows as they are read; a batch that is full is encoded.

    Args:
        encode: (modality, arrays, batch size) -> features.
        modalities: to encode.
        batch_size: windows of a batch.
    """

    def __init__(self, encode: Callable[..., Features], modalities: list[str], batch_size: int):
        self._encode, self._batch_size = encode, batch_size
        self._waiting: list[Piece] = []
        self._parts: dict[str, list[Part]] = {modality: [] for modality in modalities}
        self._items: list[int] = []
        self._starts: list[float] = []
        self.errors: list[str] = []

    def add(self, number: int, piece: Piece) -> None:
        """Takes a window of the item `number`."""
        self._items.append(number)
        self._starts.append(piece.start)
        if piece.error:
            self.errors.append(piece.error)
        self._waiting.append(piece)
        if len(self._waiting) == self._batch_size:
            self.flush()

    def flush(self) -> None:
        """Encodes the windows that wait."""
        if not self._waiting:
            return
        for modality, parts in self._parts.items():
            present = [i for i, piece in enumerate(self._waiting) if modality in piece.data]
            data = [self._waiting[i].data[modality] for i in present]
            features = self._encode(modality, data, self._batch_size) if data else {}
            parts.append((len(self._waiting), present, features))
        self._waiting = []

    def rows(self, name: str, is_single: bool, request: Request) -> dict[str, Rows]:
        """Rows by modality, of those that any window has.

        Raises:
            ConfigError: nothing of what was asked for, `name`, could be read.
        """
        results = {}
        for modality, parts in self._parts.items():
            joined = _joined(parts)
            if joined is None and modality == name:
                raise ConfigError(self.errors[0])
            if joined is None:
                continue
            features, is_valid = joined
            # A single window is as its key says: without sound there is no `audio`.
            may_lack_sound = modality != name and (request.has_windows or not is_single)
            results[modality] = Rows(
                features,
                np.array(self._items, np.int32),
                np.array(self._starts, np.float32),
                is_valid,
                is_single,
                tells_valid=request.on_error == 'skip' or may_lack_sound,
            )
        return results


def _joined(parts: Sequence[Part]) -> tuple[Features, np.ndarray] | None:
    """(features [N …], valid [N]) of all batches, zeros where there was nothing; None if all."""
    known: Features = {}
    for _, _, features in parts:
        known = known or features
    if not known:
        return None
    valid = []
    joined: dict[str, list[np.ndarray]] = {key: [] for key in known}
    for count, present, features in parts:
        is_valid = np.zeros(count, bool)
        is_valid[present] = True
        valid.append(is_valid)
        for key, example in known.items():
            rows = np.zeros((count, *example.shape[1:]), example.dtype)
            if present:
                rows[present] = features[key]
            joined[key].append(rows)
    all_features = {key: np.concatenate(rows) for key, rows in joined.items()}
    return all_features, np.concatenate(valid)


def as_stream(name: str, data: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """The stream of a batch of `rows` examples, the last ones padding."""
    padding = np.zeros((rows - len(data), *data.shape[1:]), data.dtype)
    is_valid = np.arange(rows) < len(data)
    data = np.concatenate([data, padding])
    stream = {'data': data, 'valid': is_valid}
    if kind_of(TOWERS.get(name, name)) == PICTURES:
        # The whole frame, as fractions: y0 x0 y1 x1.
        stream['box'] = np.tile(np.array([0, 0, 1, 1], np.float32), (rows, 1))
        stream['flip'] = np.zeros(rows, bool)
    if name == 'text':
        stream['mask'] = (data != 0).any(-1)
    return stream
