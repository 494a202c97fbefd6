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

from data_pipelines.errors import DataError
from data_pipelines.loading import order, sentence_windows
from data_pipelines.loading import views as view_rules
from data_pipelines.loading.data_source import SPLITS, Data, Request, Rows, blank, tokenizer_of
from vatt_jax.inputs import tokenizer as tokenizers

_COLOURS = {
    'red': (230, 60, 50),
    'green': (70, 210, 80),
    'blue': (60, 90, 235),
    'yellow': (235, 215, 60),
}
_MOTIONS = {'left': (0, -1), 'right': (0, 1), 'up': (-1, 0), 'down': (1, 0)}
_TONES = ('deep', 'low', 'high', 'shrill')
CLASSES = [f'{c} {m}' for c, m in itertools.product(_COLOURS, _MOTIONS)]
_PHRASES = (
    '{c} stripes move {m} with a {t} tone',
    'a {t} sound while {c} bars go {m}',
    'watch the {c} pattern drift {m}',
    'you hear something {t} and see {c}',
    'moving {m} in {c} again',
    'now everything flows {m}',
)
_SENTENCES = 8  # per record, equally long
_LEVELS = 256  # of the phase tables


class Synthetic(Data):
    """The synthetic world, with config.data.synthetic_size training records.

    Validation and test have an eighth of it, at least 32.
    """

    def __init__(self, config):
        super().__init__(config)
        train = int(config.data.synthetic_size)
        if train < 1:
            raise DataError(f'config.data.synthetic_size is {train}; it must be at least 1')
        self._count = dict(zip(SPLITS, (train, max(32, train // 8), max(32, train // 8))))
        self._first = dict(zip(SPLITS, (0, 1 << 40, 2 << 40)))
        self._length = 2 * max(self.window, 1.0)
        words = tokenizers.Words.train(
            (s for i in range(len(CLASSES)) for s in _sentences(i)), 1 << 16
        )
        self.tokenizer = tokenizer_of(self.inputs, words.to_spec(), 'the synthetic source')
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': {'class': list(CLASSES)},
            'sources': ['synthetic'],
        }

    def _sources(self, split, by):
        return [order.Source(self._count[split], name='synthetic')]

    def _record(self, split: str, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(class int64 [B], instance float64 [B 4] in [0, 1)) of records."""
        u = order.uniform(0, index + self._first[split], 'synthetic', 4)
        return index % len(CLASSES), u

    def texts(self, split, by='segments'):
        return [
            {
                'id': f'{split}/{i}',
                'start': 0.0,
                'end': self._length,
                'caption': _caption(i % len(CLASSES)),
                'sentences': _sentences(i % len(CLASSES)),
            }
            for i in range(self._count[split])
        ]

    def _batches(self, request, rows, number):
        steps = itertools.count() if number is None else range(number)
        return (self._make(request, rows(step)) for step in steps)

    def _make(self, request: Request, rows: Rows) -> dict[str, Any]:
        b = len(rows.position)
        kind, instance = self._record(request.split, rows.index)
        duration = np.full(b, self._length)
        fps = self.inputs['video']['fps'] if 'video' in self.inputs else 10.0
        segments = (np.zeros(b), duration) if request.centred else None
        starts = view_rules.starts(
            request.views, self.window, duration, self.draws(request, rows), segments, 1.0 / fps
        )
        batch: dict[str, Any] = {
            'index': rows.index.astype(np.int32),
            'source': rows.source,
            'position': rows.position,
            'valid': rows.valid.copy(),
            'labels': {'class': kind.astype(np.int32)},
        }
        for v in request.views:
            start = starts[v.suffix]
            stream: dict[str, Any] = {'valid': np.ones(b, bool), 'start': start.astype(np.float32)}
            if v.modality == 'video':
                n, size = self.inputs['video']['frames'], self.inputs['video']['size']
                at = start[:, None] + np.arange(n) / fps
                stream['data'] = np.stack(
                    [_frames(k, u, t, size) for k, u, t in zip(kind, instance, at)]
                )
                stream['box'], stream['flip'] = self.crops(
                    request, rows, v, np.full(b, size), np.full(b, size)
                )
                # A mirrored grating moves the other way, and direction is the class: never flip.
                stream['flip'] = np.zeros(b, bool)
            elif v.modality == 'audio':
                n, rate = self.inputs['audio']['samples'], self.inputs['audio']['rate']
                stream['data'] = np.stack(
                    [
                        _sound(k, u, t + np.arange(n) / rate, rate)
                        for k, u, t in zip(kind, instance, start)
                    ]
                )
            else:
                stream['data'], stream['mask'] = self._text(kind, start)
                stream['valid'] = stream['mask'].any(-1)
            if dict(v.spec)['kind'] == 'reverse' and v.modality != 'text':
                stream['data'] = np.ascontiguousarray(stream['data'][:, ::-1])
            batch[v.stream] = stream
        if request.segments and 'text' in self.inputs:
            data, mask = sentence_windows.encode(
                self.tokenizer, [[_caption(k)] for k in kind], 1, self.inputs['text']['words']
            )
            batch['text.caption'] = {
                'data': data,
                'mask': mask,
                'valid': mask[:, 0].copy(),
                'start': np.zeros(b, np.float32),
            }
        return blank(batch, ~rows.valid)

    def _text(self, kind: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k, words = self.inputs['text']['candidates'], self.inputs['text']['words']
        begin = np.arange(_SENTENCES) * self._length / _SENTENCES
        end = begin + self._length / _SENTENCES
        chosen = [
            [_sentences(c)[i] for i in sentence_windows.candidates(begin, end, t, self.window, k)]
            for c, t in zip(kind, start)
        ]
        return sentence_windows.encode(self.tokenizer, chosen, k, words)


def _names(kind: int) -> dict[str, str]:
    c, m = CLASSES[kind].split()
    return {'c': c, 'm': m, 't': _TONES[list(_COLOURS).index(c)]}


def _caption(kind: int) -> str:
    return _PHRASES[0].format(**_names(kind))


def _sentences(kind: int) -> list[str]:
    return [_PHRASES[i % len(_PHRASES)].format(**_names(kind)) for i in range(_SENTENCES)]


def _envelope(u: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Loudness of the tone and brightness of the grating at seconds t, in [0.15, 1].

    This is the instance's own rhythm.
    """
    beat = np.sin(2 * np.pi * ((0.4 + 1.2 * u[0]) * t + u[1]))
    return 0.575 + 0.425 * np.tanh(3 * beat)


def _frames(kind: int, u: np.ndarray, t: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T size size 3]. Integer phases into a table of colours: no sine per pixel."""
    c, m = CLASSES[kind].split()
    dy, dx = _MOTIONS[m]
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * np.arange(_LEVELS) / _LEVELS)
    table = wave[:, None] * np.array(_COLOURS[c])  # [levels 3]
    along = np.arange(size) * int(_LEVELS * (2 + 3 * u[2]) / size)  # stripes across the frame
    table = (table[None] * _envelope(u, t)[:, None, None] + 12).astype(np.uint8)  # [T levels 3]
    phase = along[None] - (_LEVELS * (u[3] + 1.5 * t)).astype(np.int64)[:, None] * (dy + dx)
    line = table[np.arange(len(t))[:, None], phase % _LEVELS]  # [T size 3]
    line = line[:, :, None] if dy else line[:, None]
    return np.broadcast_to(line, (len(t), size, size, 3))


def _sound(kind: int, u: np.ndarray, t: np.ndarray, rate: int) -> np.ndarray:
    """int16 [S]: the class's pitch (kept below half the sampling rate) in the instance's rhythm."""
    colour, motion = divmod(kind, len(_MOTIONS))
    pitch = min(rate / 6, 3000.0) / 2 ** (0.9 * (len(_COLOURS) - 1 - colour)) * (1 + 0.05 * motion)
    coarse = np.linspace(t[0], t[-1], max(2, len(t) // 64))
    swell = np.interp(t, coarse, _envelope(u, coarse))
    return (12000 * swell * np.sin(2 * np.pi * pitch * t)).astype(np.int16)


# ---- prepared batches in a file


def save_npz(
    batches: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    path: str,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Host batches -> one file that `config.data.source = 'npz'` reads.

    batches: for all splits, or {split: batches}. Arrays are stored as 'video/data' … (or
      'train:video/data' …) with all rows
    stacked; rows with valid False are left out. info: the data object's, for tokenizer and class
    names.
    """
    by_split = batches if isinstance(batches, Mapping) else {'': batches}
    out: dict[str, np.ndarray] = {'info': np.array(json.dumps(dict(info or {})))}
    for split, some in by_split.items():
        flat = [_flatten(b) for b in some]
        if not flat:
            raise DataError(f'save_npz: no batch{f" for split {split!r}" if split else ""}')
        keep = np.concatenate([b['valid'] for b in flat])
        for name in flat[0]:
            if name not in ('index', 'source', 'position', 'valid'):
                out[f'{split}:{name}' if split else name] = np.concatenate([b[name] for b in flat])[
                    keep
                ]
    with open(path, 'wb') as f:
        np.savez(f, **out)  # type: ignore[arg-type]  # numpy's stub takes arrays for flags


def _flatten(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    out = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            out.update({f'{name}/{part}': np.asarray(array) for part, array in value.items()})
        else:
            out[name] = np.asarray(value)
    return out


class Npz(Data):
    """config.data.npz: a file of `save_npz`.

    Clips are fixed: passes and training differ only in crop and flip.

    Views must be in the file, except `reverse`, which is made. Raises DataError for a missing file,
    a missing stream, or a stream whose shape is not that of config.model.inputs.
    """

    def __init__(self, config):
        super().__init__(config)
        path = pathlib.Path(config.data.npz)
        if not config.data.npz or not path.is_file():
            raise DataError(
                f'config.data.npz is {str(config.data.npz)!r}, which is not a file; make one with '
                'data_pipelines.loading.synthetic.save_npz'
            )
        try:
            with np.load(path, allow_pickle=False) as f:
                stored = {name: f[name] for name in f.files}
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f'{path} is not a readable npz of prepared batches ({e})') from None
        info = json.loads(str(stored.pop('info', '{}')))
        self._rows: dict[str, dict[str, np.ndarray]] = {}
        for split in SPLITS:
            own = {k.partition(':')[2]: v for k, v in stored.items() if k.startswith(f'{split}:')}
            rows = own or {k: v for k, v in stored.items() if ':' not in k}
            lengths = {k: len(v) for k, v in rows.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f'{path}: arrays of split {split!r} differ in rows: {lengths}')
            self._rows[split] = rows
        if not any(self._rows.values()):
            raise DataError(f'{path} holds no batches')
        self._check(path)
        words = (
            tokenizers.from_spec(info['tokenizer'])
            if info.get('tokenizer')
            else tokenizers.Words([])
        )
        self.tokenizer = (
            tokenizer_of(self.inputs, words.to_spec(), str(path))
            if info.get('tokenizer')
            else words
        )
        labels = info.get('labels') or {}
        for rows in self._rows.values():
            for name in [k.partition('/')[2] for k in rows if k.startswith('labels/')]:
                values = rows[f'labels/{name}']
                count = values.shape[1] if values.ndim > 1 else int(values.max(initial=-1)) + 1
                labels.setdefault(name, [str(i) for i in range(count)])
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': labels,
            'sources': [path.name],
        }

    def _check(self, path: pathlib.Path) -> None:
        """Check that every split with rows has every view in the shape of config.model.inputs."""
        for split, rows in self._rows.items():
            if not rows:
                continue
            for view in self._views:
                has_stream = f'{view.stream}/data' in rows
                name = view.stream if has_stream else view.modality
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
        if modality == 'video':
            return (spec['frames'], None, None, 3)
        if modality == 'audio':
            return (spec['samples'],)
        return (spec['candidates'], spec['words'])

    def _sources(self, split, by):
        rows = self._rows[split]
        return [order.Source(len(next(iter(rows.values()))) if rows else 0, name='npz')]

    def texts(self, split, by='segments'):
        return [
            {'id': f'{split}/{i}', 'start': 0.0, 'end': self.window, 'caption': '', 'sentences': []}
            for i in range(self.size(split, by))
        ]

    def _batches(
        self, request: Request, rows: Callable[[int], Rows], number: int | None
    ) -> Iterator[dict[str, Any]]:
        for v in request.views:
            moved = not v.suffix and v.kind == 'window' and v.of > 1
            if (
                moved or f'{v.stream}/data' not in self._rows[request.split] and v.kind != 'reverse'
            ) and number != 0:
                raise DataError(
                    f'the npz has no {"other window of" if moved else "stream"} {v.stream!r}; '
                    'a file of prepared batches cannot make other windows'
                )
        steps = itertools.count() if number is None else range(number)
        return (self._make(request, rows(step)) for step in steps)

    def _make(self, request: Request, rows: Rows) -> dict[str, Any]:
        stored = self._rows[request.split]
        batch: dict[str, Any] = {
            'index': rows.index.astype(np.int32),
            'source': rows.source,
            'position': rows.position,
            'valid': rows.valid.copy(),
        }
        labels = {
            k.partition('/')[2]: v[rows.index] for k, v in stored.items() if k.startswith('labels/')
        }
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
        source = view.modality if is_made else view.stream

        def stored_or(part: str, default: Any) -> Any:
            name = f'{source}/{part}'
            return stored[name][rows.index] if name in stored else default

        stream = {
            'data': stored_or('data', None),
            'valid': stored_or('valid', np.ones(batch_size, bool)),
            'start': stored_or('start', np.zeros(batch_size, np.float32)),
        }
        if view.modality == 'video':
            height, width = (np.full(batch_size, n) for n in stream['data'].shape[2:4])
            stream['box'], stream['flip'] = self.crops(request, rows, view, height, width)
            if not request.augment and view.crop is None:
                stream['box'] = stored_or('box', stream['box'])
                stream['flip'] = stored_or('flip', stream['flip'])
        if view.modality == 'text':
            stream['mask'] = stored_or('mask', (stream['data'] != 0).any(axis=-1))
            stream['valid'] = stream['mask'].any(axis=-1)
        elif is_made:
            stream['data'] = np.ascontiguousarray(stream['data'][:, ::-1])
        return stream
