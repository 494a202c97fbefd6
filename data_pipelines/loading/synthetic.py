"""Sources without TensorFlow: patterns computed from the position, and batches in one npz.

The synthetic world: every record has a class and an instance. The class decides the colour and
motion of a grating, the pitch of a tone and the words; the instance decides when the grating
flashes and the tone swells, so video and audio of one moment of one record belong together. There
is something to learn for every objective, and it costs a few milliseconds per clip.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int16, Int32, Int64, UInt8
from ml_collections import ConfigDict

from data_pipelines.errors import DataError
from data_pipelines.loading import order, sentence_windows, synthetic_regions
from data_pipelines.loading import views as view_rules
from data_pipelines.loading.data_source import (
    SPLITS,
    Data,
    Request,
    Rows,
    blank,
    blank_stream,
    tokenizer_of,
)
from data_pipelines.loading.texts import Texts
from vatt_jax.inputs import optical_flow
from vatt_jax.inputs import tokenizer as tokenizers
from vatt_jax.inputs.modalities import PICTURES, SOUND, kind_of

# Red, green and blue of each colour, at most 235: `_frames` adds 12.
_COLOURS = {
    'red': (230, 60, 50),
    'green': (70, 210, 80),
    'blue': (60, 90, 235),
    'yellow': (235, 215, 60),
}
# Direction along y (down) and x (right).
_MOTIONS = {'left': (0, -1), 'right': (0, 1), 'up': (-1, 0), 'down': (1, 0)}
# One for each colour, in their order.
_TONES = ('deep', 'low', 'high', 'shrill')
CLASSES = [f'{colour} {motion}' for colour, motion in itertools.product(_COLOURS, _MOTIONS)]
_PHRASES = (
    '{colour} stripes move {motion} with a {tone} tone',
    'a {tone} sound while {colour} bars go {motion}',
    'watch the {colour} pattern drift {motion}',
    'you hear something {tone} and see {colour}',
    'moving {motion} in {colour} again',
    'now everything flows {motion}',
)
_SENTENCES = 8  # per record, equally long
_LEVELS = 256  # of the phase tables

# Number of a class in CLASSES; elements of arrays are no int.
_Class = int | np.integer


class Synthetic(Data):
    """The synthetic world, with config.data.synthetic_size training records.

    Validation and test have an eighth of it, at least 32.
    """

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        num_train = int(config.data.synthetic_size)
        if num_train < 1:
            raise DataError(f'config.data.synthetic_size is {num_train}; it must be at least 1')
        num_held_out = max(32, num_train // 8)
        self._count = dict(zip(SPLITS, (num_train, num_held_out, num_held_out)))
        # Instances are drawn by position: the splits lie so far apart that they share none.
        self._first = dict(zip(SPLITS, (0, 1 << 40, 2 << 40)))
        # Longer than a window, so that windows of one record differ; in seconds.
        self._length = 2 * max(self.window, 1.0)
        gaps = [view.apart for view in self._views if view.apart is not None]
        if gaps:
            # Wherever the main window is, another one fits in before it or behind it.
            self._length += self.window + 2 * max(gaps)
        sentences = [sentence for kind in range(len(CLASSES)) for sentence in _sentences(kind)]
        words = tokenizers.Words.train(sentences, 1 << 16)
        self.tokenizer = tokenizer_of(self.inputs, words.to_spec(), 'the synthetic source')
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': {'class': list(CLASSES)},
            'sources': ['synthetic'],
        }
        if 'flow' in self.inputs:
            # As OpenCV would find it on frames of this size.
            size = self.inputs['flow']['size']
            self.info['flow'] = {'method': 'dis', 'bound': optical_flow.BOUND, 'size': size}

    def _sources(self, split: str, by: str) -> list[order.Source]:
        # A record is one segment, whichever `by` counts.
        return [order.Source(self._count[split], name='synthetic')]

    def _record(
        self, split: str, index: Int[np.ndarray, ' B']
    ) -> tuple[Int[np.ndarray, ' B'], Float64[np.ndarray, 'B 4']]:
        """Class and instance of records; the instance is four numbers in [0, 1)."""
        # Not config.seed: the world is the same in every run.
        instance = order.uniform(0, index + self._first[split], 'synthetic', 4)
        return index % len(CLASSES), instance

    def texts(self, split: str, by: str = 'segments') -> Texts:
        def entry(i: int) -> dict[str, Any]:
            kind = i % len(CLASSES)
            return {
                'id': f'{split}/{i}',
                'start': 0.0,
                'end': self._length,
                'caption': _caption(kind),
                'sentences': _sentences(kind),
            }

        return Texts(range(self.size(split, by)), entry)

    def _batches(
        self, request: Request, rows_of_batch: Callable[[int], Rows], num_batches: int | None
    ) -> Iterator[dict[str, Any]]:
        numbers = itertools.count() if num_batches is None else range(num_batches)
        return (self._make(request, rows_of_batch(number)) for number in numbers)

    def _make(self, request: Request, rows: Rows) -> dict[str, Any]:
        """One batch."""
        batch_size = len(rows.position)
        kind, instance = self._record(request.split, rows.index)  # [B], [B 4]
        starts = self._starts(request, rows)
        has_window = view_rules.present(starts)
        starts = view_rules.with_substitutes(starts)
        batch = _row_fields(rows)
        batch['labels'] = {'class': kind.astype(np.int32)}
        for view in request.views:
            start = starts[view.suffix]  # [B], in seconds
            stream: dict[str, Any] = {
                'valid': np.ones(batch_size, bool),
                'start': start.astype(np.float32),
            }
            if kind_of(view.modality) == PICTURES:
                make = self._flow if view.modality == 'flow' else self._video
                stream['data'] = make(kind, instance, start)  # [B T H W 3], of flow [B T H W 2]
                size = np.full(batch_size, self.inputs[view.modality]['size'])
                stream['box'], _ = self.crops(request, rows, view, size, size)
                # A mirrored grating moves the other way, and direction is the class: never flip.
                stream['flip'] = np.zeros(batch_size, bool)
            elif view.modality == 'audio':
                stream['data'] = self._audio(kind, instance, start)  # [B S]
            else:
                stream['data'], stream['mask'] = self._text(kind, start)  # [B K L], [B K]
                stream['valid'] = stream['mask'].any(axis=-1)
            if view.kind == 'reverse' and view.modality != 'text':
                stream['data'] = _reversed(stream['data'], view.modality)
            blank_stream(stream, ~has_window[view.suffix])
            batch[view.stream] = stream
        if request.segments and 'text' in self.inputs:
            batch['text.caption'] = self._captions(kind)
        regions = self.config.model.inputs.get('regions')
        if regions:
            batch['regions'] = synthetic_regions.make(kind, rows.index, **regions)
        return blank(batch, ~rows.valid)

    def _starts(self, request: Request, rows: Rows) -> dict[str, np.ndarray]:
        """Window starts {suffix: float64 [B]}, in seconds; NaN where there is no such window."""
        batch_size = len(rows.position)
        duration = np.full(batch_size, self._length)
        # Without pictures any step will do: sound and text can begin anywhere.
        pictures = self.inputs.get('video') or self.inputs.get('flow') or {'fps': 10.0}
        segments = None
        if request.centred:
            segments = (np.zeros(batch_size), duration)  # the whole record is its one segment
        draw = self.draws(request, rows)
        step = 1.0 / pictures['fps']
        return view_rules.starts(request.views, self.window, duration, draw, segments, step)

    def _video(
        self,
        kind: Int[np.ndarray, ' B'],
        instance: Float64[np.ndarray, 'B 4'],
        start: Float[np.ndarray, ' B'],
    ) -> UInt8[np.ndarray, 'B T H W 3']:
        spec = self.inputs['video']
        times = start[:, None] + np.arange(spec['frames']) / spec['fps']  # [B T]
        clips = [_frames(k, u, t, spec['size']) for k, u, t in zip(kind, instance, times)]
        return np.stack(clips)

    def _flow(
        self,
        kind: Int[np.ndarray, ' B'],
        instance: Float64[np.ndarray, 'B 4'],
        start: Float[np.ndarray, ' B'],
    ) -> UInt8[np.ndarray, 'B T H W 2']:
        spec = self.inputs['flow']
        # One more: the flow of a frame is the motion until the next.
        times = start[:, None] + np.arange(spec['frames'] + 1) / spec['fps']  # [B T+1]
        clips = [_flow(k, u, t, spec['size']) for k, u, t in zip(kind, instance, times)]
        return np.stack(clips)

    def _audio(
        self,
        kind: Int[np.ndarray, ' B'],
        instance: Float64[np.ndarray, 'B 4'],
        start: Float[np.ndarray, ' B'],
    ) -> Int16[np.ndarray, 'B S']:
        rate = self.inputs['audio']['rate']
        offsets = np.arange(self.inputs['audio']['samples']) / rate  # [S], in seconds
        clips = [_sound(k, u, t + offsets, rate) for k, u, t in zip(kind, instance, start)]
        return np.stack(clips)

    def _text(
        self, kind: Int[np.ndarray, ' B'], start: Float[np.ndarray, ' B']
    ) -> tuple[Int32[np.ndarray, 'B K L'], Bool[np.ndarray, 'B K']]:
        """Words of the sentences nearest to each window, and which sentences hold any."""
        num_candidates = self.inputs['text']['candidates']
        num_words = self.inputs['text']['words']
        begin = np.arange(_SENTENCES) * self._length / _SENTENCES
        end = begin + self._length / _SENTENCES
        chosen = []
        for k, window_start in zip(kind, start):
            sentences = _sentences(k)
            numbers = sentence_windows.candidates(
                begin, end, window_start, self.window, num_candidates
            )
            chosen.append([sentences[number] for number in numbers])
        return sentence_windows.encode(self.tokenizer, chosen, num_candidates, num_words)

    def _captions(self, kind: Int[np.ndarray, ' B']) -> dict[str, np.ndarray]:
        """The stream of the segments' captions."""
        captions = [[_caption(k)] for k in kind]
        data, mask = sentence_windows.encode(
            self.tokenizer, captions, 1, self.inputs['text']['words']
        )
        return {
            'data': data,
            'mask': mask,
            # A copy: contiguous, and no view of the mask.
            'valid': mask[:, 0].copy(),
            'start': np.zeros(len(kind), np.float32),
        }


def _row_fields(rows: Rows) -> dict[str, Any]:
    """The entries of a batch that say which rows it holds."""
    return {
        'index': rows.index.astype(np.int32),
        'source': rows.source,
        'position': rows.position,
        'valid': rows.valid.copy(),
    }


def _reversed(data: np.ndarray, modality: str) -> np.ndarray:
    """Clips [B time ...] played backwards."""
    if modality == 'flow':
        # Backwards, frame i moves to i - 1, against the flow of i - 1; the first has none of its
        # own.
        before = np.concatenate([data[:, :1], data[:, :-1]], axis=1)
        data = optical_flow.negative(before)
    # A view of negative stride would be copied by every later step that needs plain memory.
    return np.ascontiguousarray(data[:, ::-1])


def _names(kind: _Class) -> dict[str, str]:
    """The words of a class, by their names in _PHRASES."""
    colour, motion = CLASSES[kind].split()
    tone = _TONES[list(_COLOURS).index(colour)]
    return {'colour': colour, 'motion': motion, 'tone': tone}


def _caption(kind: _Class) -> str:
    return _PHRASES[0].format(**_names(kind))


def _sentences(kind: _Class) -> list[str]:
    names = _names(kind)
    return [_PHRASES[i % len(_PHRASES)].format(**names) for i in range(_SENTENCES)]


def _envelope(u: Float64[np.ndarray, ' 4'], t: Float[np.ndarray, ' n']) -> Float[np.ndarray, ' n']:
    """Loudness of the tone and brightness of the grating at seconds t, in [0.15, 1].

    This is the instance's own rhythm.
    """
    # 0.4 to 1.6 beats a second, from a phase of its own; tanh makes them nearly on and off.
    beat = np.sin(2 * np.pi * ((0.4 + 1.2 * u[0]) * t + u[1]))
    return 0.575 + 0.425 * np.tanh(3 * beat)


def _frames(
    kind: _Class, u: Float64[np.ndarray, ' 4'], t: Float[np.ndarray, ' T'], size: int
) -> UInt8[np.ndarray, 'T H W 3']:
    """The grating of a class and instance at seconds t."""
    # Integer phases into a table of colours: no sine per pixel.
    colour, motion = CLASSES[kind].split()
    dy, dx = _MOTIONS[motion]
    rise, drift = _phases(u, t, size)
    along = np.arange(size) * rise  # [size]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * np.arange(_LEVELS) / _LEVELS)
    table = wave[:, None] * np.array(_COLOURS[colour])  # [levels 3]
    brightness = _envelope(u, t)[:, None, None]
    table = (table[None] * brightness + 12).astype(np.uint8)  # [T levels 3]
    phase = along[None] - drift[:, None] * (dy + dx)  # [T size]
    line = table[np.arange(len(t))[:, None], phase % _LEVELS]  # [T size 3]
    # The pattern varies only along its motion, so a line of it is repeated over the frame.
    line = line[:, :, None] if dy else line[:, None]
    return np.broadcast_to(line, (len(t), size, size, 3))


def _phases(
    u: Float64[np.ndarray, ' 4'], t: Float[np.ndarray, ' T'], size: int
) -> tuple[int, Int64[np.ndarray, ' T']]:
    """Levels that a grating rises by in a pixel, and by which it has drifted at seconds t."""
    # Two to five stripes across the frame, which drift by 1.5 stripes a second.
    rise = int(_LEVELS * (2 + 3 * u[2]) / size)
    drift = (_LEVELS * (u[3] + 1.5 * t)).astype(np.int64)
    return rise, drift


def _flow(
    kind: _Class, u: Float64[np.ndarray, ' 4'], t: Float[np.ndarray, ' T_plus_1'], size: int
) -> UInt8[np.ndarray, 'T H W 2']:
    """How far the grating of `_frames` moves from each of the seconds t to the next, quantised."""
    _, motion = CLASSES[kind].split()
    dy, dx = _MOTIONS[motion]
    rise, drift = _phases(u, t, size)
    # Frames of more than 512 pixels may have less than a level a pixel, and show no stripes.
    pixels = np.diff(drift) / max(rise, 1)  # [T]
    flow = pixels[:, None] * np.array([dx, dy])  # [T 2]
    values = optical_flow.quantise(flow.astype(np.float32))
    return np.broadcast_to(values[:, None, None], (len(pixels), size, size, 2))


def _sound(
    kind: _Class, u: Float64[np.ndarray, ' 4'], t: Float[np.ndarray, ' S'], rate: int
) -> Int16[np.ndarray, ' S']:
    """The class's pitch in the instance's rhythm, at seconds t."""
    colour, motion = divmod(kind, len(_MOTIONS))
    # Colours are 0.9 octaves apart, motions 5 %. rate / 6 keeps all below half the sampling rate.
    octaves_down = 0.9 * (len(_COLOURS) - 1 - colour)
    pitch = min(rate / 6, 3000.0) / 2**octaves_down * (1 + 0.05 * motion)  # in Hz
    # The envelope is slow: computed at every 64th sample, it costs little.
    coarse = np.linspace(t[0], t[-1], max(2, len(t) // 64))
    swell = np.interp(t, coarse, _envelope(u, coarse))
    return (12000 * swell * np.sin(2 * np.pi * pitch * t)).astype(np.int16)


# ---- prepared batches in a file


def save_npz(
    batches: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    path: str,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write host batches to one file that `config.data.source = 'npz'` reads.

    Arrays are stored as 'video/data' … (or 'train:video/data' …) with all rows stacked; rows with
    valid False are left out.

    Args:
      batches: for all splits, or {split: batches}.
      path: of the file.
      info: the data object's, for tokenizer and class names.

    Raises:
      DataError: a split without batches.
    """
    # Without splits the arrays have no prefix, and the file serves every split.
    by_split: Mapping[str, Any] = batches if isinstance(batches, Mapping) else {'': batches}
    arrays: dict[str, Any] = {'info': np.array(json.dumps(dict(info or {})))}
    for split, split_batches in by_split.items():
        prefix = f'{split}:' if split else ''
        for name, array in _stacked(split, split_batches).items():
            arrays[f'{prefix}{name}'] = array
    # A file object: np.savez would append .npz to a path without it.
    with open(path, 'wb') as file:
        np.savez(file, **arrays)


def _stacked(split: str, batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The valid rows of all batches, one behind the other."""
    flat = [_flatten(batch) for batch in batches]
    if not flat:
        where = f' for split {split!r}' if split else ''
        raise DataError(f'save_npz: no batch{where}')
    is_valid = np.concatenate([batch['valid'] for batch in flat])
    arrays = {}
    for name in flat[0]:
        # The reader numbers the rows anew.
        if name in ('index', 'source', 'position', 'valid'):
            continue
        arrays[name] = np.concatenate([batch[name] for batch in flat])[is_valid]
    return arrays


def _flatten(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{'video': {'data': …}} -> {'video/data': …}."""
    arrays = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            for part, array in value.items():
                arrays[f'{name}/{part}'] = np.asarray(array)
        else:
            arrays[name] = np.asarray(value)
    return arrays


class Npz(Data):
    """config.data.npz: a file of `save_npz`.

    Clips are fixed: passes and training differ only in crop and flip. Views must be in the file,
    except `reverse`, which is made.
    """

    tokenizer: tokenizers.Tokenizer

    def __init__(self, config: ConfigDict):
        """Read the whole file into memory.

        Raises:
          DataError: a missing file, a missing stream, or a stream whose shape is not that of
            config.model.inputs.
        """
        super().__init__(config)
        path = pathlib.Path(config.data.npz)
        if not config.data.npz or not path.is_file():
            raise DataError(
                f'config.data.npz is {str(config.data.npz)!r}, which is not a file; make one with '
                'data_pipelines.loading.synthetic.save_npz'
            )
        stored = _load(path)
        info = json.loads(str(stored.pop('info', '{}')))
        self._rows = {split: _rows_of_split(stored, split, path) for split in SPLITS}
        if not any(self._rows.values()):
            raise DataError(f'{path} holds no batches')
        self._check(path)
        if info.get('tokenizer'):
            # Through a tokenizer and back, so that a spec of the file is checked as any other.
            spec = tokenizers.from_spec(info['tokenizer']).to_spec()
            self.tokenizer = tokenizer_of(self.inputs, spec, str(path))
        else:
            self.tokenizer = tokenizers.Words([])  # the file's words have numbers, but no names
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': self._label_classes(info.get('labels') or {}),
            'sources': [path.name],
        }
        if info.get('flow'):
            self.info['flow'] = info['flow']

    def _label_classes(self, named: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Classes of every label: those the file names, and numbers for the others."""
        classes = dict(named)
        for rows in self._rows.values():
            for name, values in _labels(rows).items():
                if name in classes:
                    continue
                if values.ndim > 1:  # multi-hot [M P]
                    num_classes = values.shape[1]
                else:
                    num_classes = int(values.max(initial=-1)) + 1
                classes[name] = [str(i) for i in range(num_classes)]
        return classes

    def _check(self, path: pathlib.Path) -> None:
        """Check that every split with rows has every view in the shape of config.model.inputs."""
        for split, rows in self._rows.items():
            if not rows:
                continue
            for view in self._views:
                has_stream = f'{view.stream}/data' in rows
                name = view.stream if has_stream else view.reversed_stream
                can_make = has_stream or name == view.stream or view.kind == 'reverse'
                if not can_make or f'{name}/data' not in rows:
                    raise DataError(
                        f'{path} has no array {view.stream}/data for split {split!r}; a file of '
                        'prepared batches cannot make other windows'
                    )
                shape = rows[f'{name}/data'].shape[1:]
                expected = self._row_shape(view.modality)
                sizes_match = all(e in (None, size) for size, e in zip(shape, expected))
                if len(shape) != len(expected) or not sizes_match:
                    expected_text = str(expected).replace('None', 'any')
                    raise DataError(
                        f'{path}: {name}/data has rows of shape {shape}, '
                        f'config.model.inputs.{view.modality} expects {expected_text}'
                    )

    def _row_shape(self, modality: str) -> tuple[int | None, ...]:
        """Shape of a row of a stream's data; None where any size will do."""
        spec = self.inputs[modality]
        kind = kind_of(modality)
        if kind == PICTURES:
            # Frames are cropped and resized on the device, from whatever size they have.
            return (spec['frames'], None, None, 2 if modality == 'flow' else 3)
        if kind == SOUND:
            return (spec['samples'],)
        return (spec['candidates'], spec['words'])

    def _sources(self, split: str, by: str) -> list[order.Source]:
        rows = self._rows[split]
        num_rows = len(next(iter(rows.values()))) if rows else 0  # the same in every array
        return [order.Source(num_rows, name='npz')]

    def texts(self, split: str, by: str = 'segments') -> Texts:
        def entry(i: int) -> dict[str, Any]:
            return {
                'id': f'{split}/{i}',
                'start': 0.0,
                'end': self.window,
                'caption': '',
                'sentences': [],
            }

        return Texts(range(self.size(split, by)), entry)

    def _batches(
        self, request: Request, rows_of_batch: Callable[[int], Rows], num_batches: int | None
    ) -> Iterator[dict[str, Any]]:
        # Here, not in `_make`: the error comes when the pass is made. One of no batches needs
        # nothing of the file.
        if num_batches != 0:
            for view in request.views:
                self._check_stored(request.split, view)
        numbers = itertools.count() if num_batches is None else range(num_batches)
        return (self._make(request, rows_of_batch(number)) for number in numbers)

    def _check_stored(self, split: str, view: view_rules.View) -> None:
        """Raise DataError for a view that the file neither holds nor gives by reversing."""
        # A file holds one window of each row, the one that was chosen when it was written.
        is_other_window = not view.suffix and view.kind == 'window' and view.of > 1
        is_missing = f'{view.stream}/data' not in self._rows[split] and view.kind != 'reverse'
        if is_other_window or is_missing:
            missing = 'other window of' if is_other_window else 'stream'
            raise DataError(
                f'the npz has no {missing} {view.stream!r}; '
                'a file of prepared batches cannot make other windows'
            )

    def _make(self, request: Request, rows: Rows) -> dict[str, Any]:
        """One batch."""
        stored = self._rows[request.split]
        batch = _row_fields(rows)
        labels = {name: values[rows.index] for name, values in _labels(stored).items()}
        if labels:
            batch['labels'] = labels
        views = list(request.views)
        if request.segments and 'text.caption/data' in stored:
            views.append(view_rules.View('text.caption', 'text', 'caption'))
        for view in views:
            batch[view.stream] = self._stream(request, rows, view)
        return blank(batch, ~rows.valid)

    def _stream(self, request: Request, rows: Rows, view: view_rules.View) -> dict[str, Any]:
        """One stream of a batch, as stored, or reversed here if the file does not hold it."""
        stored = self._rows[request.split]
        batch_size = len(rows.position)
        is_made = f'{view.stream}/data' not in stored
        source = view.reversed_stream if is_made else view.stream

        def stored_or(part: str, default: Any) -> Any:
            name = f'{source}/{part}'
            return stored[name][rows.index] if name in stored else default

        stream = {
            'data': stored_or('data', None),
            'valid': stored_or('valid', np.ones(batch_size, bool)),
            'start': stored_or('start', np.zeros(batch_size, np.float32)),
        }
        if kind_of(view.modality) == PICTURES:
            height, width = (np.full(batch_size, n) for n in stream['data'].shape[2:4])
            stream['box'], stream['flip'] = self.crops(request, rows, view, height, width)
            # In an evaluation the crop that was stored holds, unless the view asks for another.
            if not request.augment and view.crop is None:
                stream['box'] = stored_or('box', stream['box'])
                stream['flip'] = stored_or('flip', stream['flip'])
        if view.modality == 'text':
            # Word number 0 is padding.
            stream['mask'] = stored_or('mask', (stream['data'] != 0).any(axis=-1))  # [B K]
            stream['valid'] = stream['mask'].any(axis=-1)
        elif is_made:
            stream['data'] = _reversed(stream['data'], view.modality)
        return stream


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    try:
        # No pickles: a file from elsewhere must not run code.
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f'{path} is not a readable npz of prepared batches ({e})') from None


def _rows_of_split(
    stored: Mapping[str, np.ndarray], split: str, path: pathlib.Path
) -> dict[str, np.ndarray]:
    """The arrays of a split, without its prefix: its own, else those of all splits."""
    own = {}
    shared = {}
    for name, array in stored.items():
        prefix, separator, rest = name.partition(':')
        if not separator:
            shared[name] = array
        elif prefix == split:
            own[rest] = array
    rows = own or shared
    lengths = {name: len(array) for name, array in rows.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f'{path}: arrays of split {split!r} differ in rows: {lengths}')
    return rows


def _labels(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The labels among the arrays of a split, by their names."""
    labels = {}
    for name, array in rows.items():
        if name.startswith('labels/'):
            labels[name.removeprefix('labels/')] = array
    return labels
