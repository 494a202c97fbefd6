"""Prepared records -> host batches, on tf.data.

The index says what every row needs before anything is read, so a batch is planned in NumPy (windows, crops, sentences, labels;
every draw keyed by the row's position), just the frames and the sound that were chosen are read and checked, and TensorFlow's threads
decode the frames. Nothing in the graph is random and nothing is shuffled there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
import tensorflow as tf

from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows, order, sample_windows, sentence_windows
from data_pipelines.loading import views as view_rules
from data_pipelines.loading.data_source import SPLITS, Data, Request, Rows, blank, tokenizer_of
from data_pipelines.storage.records import Prepared, Split, read_from
from vatt_jax.inputs.tokenizer import Tokenizer

with contextlib.suppress(RuntimeError):  # too late if TensorFlow is in use already
    tf.config.set_visible_devices([], 'GPU')  # the accelerator belongs to JAX

_PATIENCE = 100  # records read before the share of unreadable ones is judged
_REPORTED = 1000  # unreadable records listed by problems()


class Records(Data):
    """config.data.train is the training mixture {name: {path, split, weight, share, fold, label, per_class}} (no path: what config.data.make
    makes); config.data.eval {path, fold} the dataset that evaluation passes read (default: the first training source). `train` by records means
    the mixture, everything else the evaluation dataset.

    info['tokenizer'] is that of config.model.inputs.text if it holds a spec, else the first source's. Raises DataError.
    """

    def __init__(self, config):
        super().__init__(config)
        mixture, evaluated = read_from(config)
        if not mixture and not evaluated['path']:
            raise DataError(
                "config.data.source is 'records' and config.data.train is empty; set it to "
                "{'mine': {'path': FOLDER}} with a folder made by python -m data_pipelines.prepare"
            )
        place = lambda entry: (entry['path'], entry['fold'])
        opened: dict[tuple[str, int], Prepared] = {}
        for entry in [*mixture.values(), *([evaluated] if evaluated['path'] else [])]:
            if place(entry) not in opened:
                opened[place(entry)] = Prepared(*place(entry))
                opened[place(entry)].check(self.inputs)
        sizes = {p.meta['size'] for p in opened.values()}
        if (
            len({opened[place(e)].meta['size'] for e in mixture.values()}) > 1
            and 'video' in self.inputs
        ):
            raise DataError(
                f'the sources of config.data.train store frames of different sizes {sorted(sizes)}; prepare them with '
                'the same --size'
            )
        self._mixture = [
            (name, entry, Split(opened[place(entry)], entry['split'], name))
            for name, entry in mixture.items()
        ]
        self._evaluated = (
            opened[place(evaluated)] if evaluated['path'] else self._mixture[0][2].prepared
        )
        self._few = {
            name: few_labels(part, entry['label'], entry['per_class'], config.seed)
            for name, entry, part in self._mixture
            if entry['per_class']
        }
        self._splits = {
            s.split: s
            for name, _, s in self._mixture
            if s.prepared is self._evaluated and s.split in SPLITS and name not in self._few
        }
        first = self._mixture[0][2].prepared if self._mixture else self._evaluated
        self.tokenizer: Tokenizer = tokenizer_of(self.inputs, first.tokenizer(), str(first.path))
        # Class numbers must mean the same everywhere, so sources that share a label share its names.
        labels: dict[str, list[str]] = {}
        self._multi: dict[str, int | None] = {}
        for prepared in opened.values():
            for label, names in prepared.labels.items():
                if labels.setdefault(label, names) != names:
                    raise DataError(
                        f'label {label!r} has other classes in {prepared.path} than in the datasets before it'
                    )
                self._multi[label] = (
                    len(names)
                    if label in prepared.meta['multi_hot'] or self._multi.get(label)
                    else None
                )
        self.info = {
            'tokenizer': self.tokenizer.to_spec(),
            'labels': labels,
            'sources': [name for name, _, _ in self._mixture] or [self._evaluated.meta['name']],
        }
        self._lock = threading.Lock()
        self._seen: set[tuple[str, str, int]] = set()
        self._iterators: weakref.WeakSet[_Batches] = weakref.WeakSet()

    # ---- what a split is made of
    def _parts(self, split: str, by: str) -> list[Split]:
        if split == 'train' and by == 'records' and self._mixture:
            return [part for _, _, part in self._mixture]
        if split not in self._evaluated.splits:
            return []
        if split not in self._splits:
            self._splits[split] = Split(self._evaluated, split)
        return [self._splits[split]]

    def _sources(self, split, by):
        parts = self._parts(split, by)
        if split == 'train' and by == 'records' and self._mixture:
            return [
                order.Source(
                    len(part),
                    float(entry['weight']),
                    float(entry['share']),
                    self._few.get(name),
                    name,
                )
                for name, entry, part in self._mixture
            ]
        return [
            order.Source(len(p) if by == 'records' else len(p.index.segment_record), name=p.name)
            for p in parts
        ]

    def texts(self, split, by='segments'):
        out = []
        for part in self._parts(split, by):
            t = part.index
            for i in range(len(t) if by == 'records' else len(t.segment_record)):
                r = i if by == 'records' else int(t.segment_record[i])
                own = (
                    range(t.segment_offset[r], t.segment_offset[r + 1]) if by == 'records' else [i]
                )
                start = 0.0 if by == 'records' else float(t.segment_start[i])
                end = float(t.duration[r]) if by == 'records' else float(t.segment_end[i])
                spoken = range(t.sentence_offset[r], t.sentence_offset[r + 1])
                out.append(
                    {
                        'id': t.id[r],
                        'start': start,
                        'end': end,
                        'caption': ' '.join(filter(None, (t.segment_caption[j] for j in own))),
                        'sentences': [
                            t.sentence_text[j]
                            for j in spoken
                            if t.sentence_end[j] >= start and t.sentence_start[j] <= end
                        ],
                        'ground_truth': t.ground_truth[r],
                    }
                )
        return out

    def _batches(
        self, request: Request, rows: Callable[[int], Rows], number: int | None
    ) -> Iterator[dict[str, Any]]:
        parts = self._parts(request.split, 'segments' if request.segments else 'records')
        if not parts:
            raise DataError(
                f'{self._evaluated.path} has no split {request.split!r}; it has '
                f'{", ".join(self._evaluated.splits)} (config.data.eval names the dataset that evaluators read)'
            )
        iterator = _Batches(self, _Plan(self, request, parts), rows, number)
        self._iterators.add(iterator)
        return iterator

    def close(self) -> None:
        for iterator in list(self._iterators):
            iterator.close()

    def _count(
        self, name: str, split: str, numbers: np.ndarray, reasons: list[str], size: int
    ) -> None:
        """Adds reads to problems(); raises DataError when too many records cannot be read."""
        with self._lock:
            p = self._problems
            p['read'] += len(numbers)
            for number, reason in zip(numbers, reasons):
                if reason:
                    p['corrupt'] += 1
                    if (name, split, int(number)) not in self._seen and len(self._seen) < _REPORTED:
                        self._seen.add((name, split, int(number)))
                        p['indices'].append((f'{name}/{split}', int(number), reason))
            limit = self.config.data.max_corrupt
            if p['read'] >= min(_PATIENCE, max(size, 1)) and p['corrupt'] > limit * p['read']:
                name, number, reason = p['indices'][0]
                raise DataError(
                    f'{p["corrupt"]} of {p["read"]} records could not be read, more than config.data.max_corrupt='
                    f'{limit:g} (first: record {number} of {name}: {reason}); prepare the data again with --overwrite'
                )


def few_labels(part: Split, label: str, per_class: int, seed: int) -> np.ndarray:
    """float64 [M]: sampling weights of the records of a source of which only `per_class` labelled segments of each class are known: how many of
    these a record has. All other labels of `part.index` become unknown, in place.

    Segments are taken in a random order of the records that the seed decides, so fewer are a part of more. Raises DataError for a class that has
    too few.
    """
    where = f'config.data.train.{part.name}'
    stored = part.index.labels.get(label)
    if stored is None or stored.ndim != 1:
        raise DataError(
            f'{where}.per_class={per_class}: {part.prepared.path} has no label {label!r} with one class for each segment; it has '
            f'{", ".join(k for k, v in part.index.labels.items() if v.ndim == 1) or "none"} (field label)'
        )
    place = order.permute(part.index.segment_record, len(part), seed, 'few labels')
    known = np.zeros(len(stored), bool)
    for number, name in enumerate(part.prepared.labels[label]):
        own = np.flatnonzero(stored == number)
        if len(own) < per_class:
            raise DataError(
                f'{where}.per_class={per_class}: class {name!r} of label {label!r} has {len(own)} segments in split {part.split!r}'
            )
        known[own[np.argsort(place[own], kind='stable')[:per_class]]] = True
    unknown = lambda x: np.where(
        known if x.ndim == 1 else known[:, None], x, -1 if x.ndim == 1 else 0
    ).astype(x.dtype)
    part.index.labels = {name: unknown(x) for name, x in part.index.labels.items()}
    return np.bincount(part.index.segment_record[known], minlength=len(part)).astype(np.float64)


class _Plan:
    """Rows -> everything about a batch but its pixels and samples, and what to fetch for those."""

    def __init__(self, data: Records, request: Request, parts: list[Split]):
        self.data, self.request, self.parts = data, request, parts
        self.inputs, self.views = data.inputs, request.views
        self.videos = [v for v in self.views if v.modality == 'video']
        self.audios = [v for v in self.views if v.modality == 'audio']
        self.captioned = (
            request.segments
            and 'text' in self.inputs
            and any(len(p.index.segment_caption.data) for p in parts)
        )
        shapes = {
            (int(h), int(w))
            for p in parts
            for h, w in np.unique(
                np.stack([p.index.height, p.index.width], 1)[p.index.frames > 0], axis=0
            )
        }
        size = parts[0].prepared.meta['size']
        # Frames of one shape travel whole and the device crops. Mixed shapes are cut to squares of their common short side here:
        # anywhere along the long side in training, the middle in evaluation; views may say where.
        self.square = len(shapes) > 1
        laid_out = [p.prepared.format for p in parts]
        self.formats = [f for i, f in enumerate(laid_out) if f not in laid_out[:i]]
        self.height, self.width = (size, size) if self.square or not shapes else next(iter(shapes))
        # Video goes to the training step as the decoder leaves it, which converts and doubles the colour planes; other passes want RGB.
        self.planes = (
            request.split == 'train'
            and not request.segments
            and not self.square
            and all(f.get('frames') == 'h264' for f in laid_out)
        )

    def gather(self, rows: Rows, pick: Callable[[Any], np.ndarray], dtype) -> np.ndarray:
        """Column of the index for each row, over the sources."""
        out = np.zeros(len(rows.index), dtype)
        for i, part in enumerate(self.parts):
            mine = (rows.source == i) & rows.valid
            out[mine] = pick(part)[rows.index[mine]]
        return out

    def __call__(self, rows: Rows) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(batch without video and audio data, what `fetch` and the graph need)."""
        request, b = self.request, len(rows.index)
        segment = rows.index
        if request.segments:
            record = self.gather(rows, lambda p: p.index.segment_record, np.int64)
            span = tuple(
                self.gather(rows, lambda p, n=n: getattr(p.index, f'segment_{n}'), np.float64)
                for n in ('start', 'end')
            )
            rows = Rows(rows.position, rows.source, record, rows.valid)
        duration = self.gather(rows, lambda p: p.index.duration, np.float64)
        frames = self.gather(rows, lambda p: p.index.frames, np.int64)
        samples = self.gather(rows, lambda p: p.index.samples, np.int64)
        stored_fps = np.array([p.prepared.meta['fps'] for p in self.parts])[rows.source]
        if not request.segments:
            span = (np.zeros(b), duration)
        starts = view_rules.starts(
            self.views,
            self.data.window,
            duration,
            self.data._draw(request, rows),
            span if request.centred else None,
            1.0 / stored_fps,
        )

        batch: dict[str, Any] = {
            'index': segment.astype(np.int32),
            'source': rows.source.astype(np.int32),
            'position': rows.position,
            'valid': rows.valid.copy(),
        }
        for v in self.views:
            stream: dict[str, Any] = {'start': starts[v.suffix].astype(np.float32)}
            if v.modality == 'text':
                stream['data'], stream['mask'] = self._sentences(rows, starts[v.suffix])
                stream['valid'] = stream['mask'].any(-1)
            else:
                stream['valid'] = (frames if v.modality == 'video' else samples) > 0
            if v.modality == 'video':
                height, width = np.full(b, self.height), np.full(b, self.width)
                stream['box'], stream['flip'] = self.data._crops(request, rows, v, height, width)
            batch[v.stream] = stream
        if self.captioned:
            captions = [
                [self.parts[s].index.segment_caption[g]] if ok else []
                for s, g, ok in zip(rows.source, segment, rows.valid)
            ]
            data, mask = sentence_windows.encode(
                self.data.tokenizer, captions, 1, self.inputs['text']['words']
            )
            batch['text.caption'] = {
                'data': data,
                'mask': mask,
                'valid': mask.any(-1),
                'start': span[0].astype(np.float32),
            }
        middle = starts[''] + self.data.window / 2
        batch['labels'] = self._labels(
            rows, segment if request.segments else self._segment_at(rows, middle)
        )
        return batch, self._wanted(rows, starts, frames, samples, stored_fps)

    def _wanted(self, rows: Rows, starts, frames, samples, stored_fps) -> dict[str, np.ndarray]:
        b, want = (
            len(rows.index),
            {
                'format': np.array(
                    [self.formats.index(p.prepared.format) for p in self.parts], np.int32
                )[rows.source]
            },
        )
        if self.videos:
            v = self.inputs['video']
            numbers = [
                frame_windows.frame_numbers(
                    starts[x.suffix], frames, stored_fps, v['fps'], v['frames']
                )
                for x in self.videos
            ]
            numbers = [
                n[:, ::-1] if x.kind == 'reverse' else n for n, x in zip(numbers, self.videos)
            ]
            want['frames'] = np.where((frames > 0)[:, None, None], np.stack(numbers, 1), -1).astype(
                np.int32
            )
            if self.square:
                height = self.gather(rows, lambda p: p.index.height, np.int64)
                width = self.gather(rows, lambda p: p.index.width, np.int64)
                own = np.full(b, 0.5)
                if self.request.augment:
                    own = order.uniform(
                        self.data.config.seed, rows.position, f'{self.request.site}/square', 1
                    )[:, 0]
                at = np.stack(
                    [own if v.crop is None else np.full(b, v.crop) for v in self.videos], 1
                )
                room = np.stack([height, width], 1) - self.height
                want['corner'] = np.maximum(
                    np.floor(room[:, None] * at[..., None] + 0.5), 0
                ).astype(np.int32)
        if self.audios:
            rate = self.inputs['audio']['rate']
            firsts = [
                sample_windows.first_samples(starts[x.suffix], samples, rate) for x in self.audios
            ]
            want['samples'] = np.where((samples > 0)[:, None], np.stack(firsts, 1), -1).astype(
                np.int64
            )
            want['total'] = samples
        return want

    def _sentences(self, rows: Rows, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k, chosen = self.inputs['text']['candidates'], []
        for source, record, start, ok in zip(rows.source, rows.index, starts, rows.valid):
            t = self.parts[source].index
            first, last = t.sentence_offset[record : record + 2] if ok else (0, 0)
            run = sentence_windows.candidates(
                t.sentence_start[first:last], t.sentence_end[first:last], start, self.data.window, k
            )
            chosen.append([t.sentence_text[first + i] for i in run])
        return sentence_windows.encode(self.data.tokenizer, chosen, k, self.inputs['text']['words'])

    def _segment_at(self, rows: Rows, moment: np.ndarray) -> np.ndarray:
        """The segment of each record that holds the moment [B] (the last one that does), -1 if none does."""
        out = np.full(len(rows.index), -1, np.int64)
        for i, (source, record, ok) in enumerate(zip(rows.source, rows.index, rows.valid)):
            t = self.parts[source].index
            first, last = t.segment_offset[record : record + 2] if ok else (0, 0)
            if (
                last == first + 1
                and t.segment_start[first] == 0
                and t.segment_end[first] >= t.duration[record] - 1e-3
            ):
                out[i] = (
                    first  # one segment for the whole record, also where the window is longer than both
                )
                continue
            hit = np.flatnonzero(
                (t.segment_start[first:last] <= moment[i])
                & (moment[i] <= t.segment_end[first:last])
            )
            if len(hit):
                out[i] = first + hit[-1]
        return out

    def _labels(self, rows: Rows, segment: np.ndarray) -> dict[str, np.ndarray]:
        labels = {}
        for name, classes in self.data._multi.items():
            value = (
                np.full(len(segment), -1, np.int32)
                if classes is None
                else np.zeros((len(segment), classes), np.float32)
            )
            for i, part in enumerate(self.parts):
                stored = part.index.labels.get(name)
                mine = (rows.source == i) & rows.valid & (segment >= 0)
                if stored is None or not mine.any():
                    continue
                stored = stored[segment[mine]]
                if classes is not None and stored.ndim == 1:
                    value[np.flatnonzero(mine)[stored >= 0], stored[stored >= 0]] = 1.0
                else:
                    value[mine] = stored
            labels[name] = value
        return labels


@dataclasses.dataclass
class _Read:
    """What was read of one row. packets: of frames; shown: which of them is entry i; corner [n 2]: where entry i is cut; back: the entry of each
    frame of each view; audio int16 [views S]."""

    packets: list[bytes]
    shown: list[int]
    corner: list[tuple[int, int]]
    back: list[int]
    audio: np.ndarray | None


class _Batches(Iterator):
    """Iterator of host batches; close() stops its threads. After an error it is over."""

    def __init__(self, data: Records, plan: _Plan, rows: Callable[[int], Rows], number: int | None):
        self._data, self._plan, self._rows, self.closed = data, plan, rows, False
        self._planned: dict[int, dict[str, Any]] = {}
        self._error: BaseException | None = None
        self._iterator = iter(self._dataset(number))

    def _dataset(self, number: int | None) -> tf.data.Dataset:
        d, plan = self._data.config.data, self._plan
        names, types, shapes = ['step'], [tf.int64], [[None]]
        if plan.videos:
            names += ['format', 'packets', 'shown', 'corner', 'back']
            types += [tf.int32, tf.string, tf.int32, tf.int32, tf.int32]
            shapes += [
                [None],
                [None, None],
                [None, None],
                [None, None, 2],
                [None, len(plan.videos) * plan.inputs['video']['frames']],
            ]

        def fetch(step):
            return {
                n: tf.ensure_shape(x, s)
                for n, x, s in zip(names, tf.numpy_function(self._fetch, [step], types), shapes)
            }

        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = max(2, d.threads + 1)
        batches = tf.data.Dataset.range(
            number if number is not None else np.iinfo(np.int64).max
        ).map(fetch)
        if plan.videos:  # rows are decoded side by side, across the border of batches too, so that a heavy row keeps nobody waiting
            batches = (
                batches.prefetch(1)
                .unbatch()
                .map(self._row, num_parallel_calls=max(1, d.threads), deterministic=True)
                .batch(len(self._rows(0).index), drop_remainder=True)
            )
        return batches.prefetch(max(1, d.prefetch)).with_options(options)

    def _fetch(self, step: np.ndarray) -> list[np.ndarray]:
        """Plans a batch and reads its rows; what TensorFlow needs to decode the frames."""
        if self.closed:
            raise RuntimeError('closed')
        try:
            rows = self._rows(int(step))
            batch, wanted = self._plan(rows)
            read = self._read(rows, batch, wanted)
            for i, v in enumerate(self._plan.audios):
                sound = np.stack([r.audio[i] for r in read])
                batch[v.stream]['data'] = sound[:, ::-1] if v.kind == 'reverse' else sound
            self._planned[int(step)] = batch
            out = [np.full(len(read), step)]
            if self._plan.videos:
                most = [
                    max(1, *(len(getattr(r, name)) for r in read)) for name in ('packets', 'shown')
                ]
                packets = np.full((len(read), most[0]), b'', object)
                shown, corner = (
                    np.full((len(read), most[1]), -1, np.int32),
                    np.zeros((len(read), most[1], 2), np.int32),
                )
                for i, r in enumerate(read):
                    packets[i, : len(r.packets)], shown[i, : len(r.shown)] = r.packets, r.shown
                    if r.corner:
                        corner[i, : len(r.corner)] = r.corner
                out += [
                    wanted['format'],
                    packets,
                    shown,
                    corner,
                    np.array([r.back for r in read], np.int32),
                ]
            return out
        except Exception as e:
            self._error = e
            raise

    def _read(
        self, rows: Rows, batch: dict[str, Any], wanted: dict[str, np.ndarray]
    ) -> list[_Read]:
        """What of each row is wanted; nothing where padding or unreadable. Rows that cannot be read are emptied in `batch`."""
        if self._plan.request.segments:
            record = self._plan.gather(rows, lambda p: p.index.segment_record, np.int64)
        else:
            record = rows.index
        out: list[_Read] = []
        bad = ~rows.valid
        for i, part in enumerate(self._plan.parts):
            mine = (rows.source == i) & rows.valid
            reasons = []
            for row in np.flatnonzero(mine):
                try:
                    got, reason = (
                        self._read_row(
                            part, int(record[row]), {k: x[row] for k, x in wanted.items()}
                        ),
                        '',
                    )
                except (ValueError, OSError) as e:
                    got, reason = None, str(e)
                out.append((row, got))
                reasons.append(reason)
                bad[row] = bool(reason)
            if reasons:
                self._data._count(
                    part.name,
                    part.split,
                    record[mine],
                    reasons,
                    sum(len(p) for p in self._plan.parts),
                )
        blank(batch, bad)
        read = dict(out)
        return [read.get(row) or self._nothing() for row in range(len(record))]

    def _nothing(self) -> _Read:
        back = (
            len(self._plan.videos) * self._plan.inputs['video']['frames']
            if self._plan.videos
            else 0
        )
        audio = (
            np.zeros((len(self._plan.audios), self._plan.inputs['audio']['samples']), np.int16)
            if self._plan.audios
            else None
        )
        return _Read([], [], [], [0] * back, audio)

    def _read_row(self, part: Split, record: int, wanted: dict[str, np.ndarray]) -> _Read:
        out, form, rate = self._nothing(), part.prepared.format, part.prepared.meta['rate']
        frames: list[int] = []
        if self._plan.videos and wanted['frames'][0, 0] >= 0:
            # Overlapping views ask for the same frames: each is decoded once (once for each place it is cut at).
            entries: dict[tuple[int, ...], int] = {}
            corner = (
                wanted['corner'].tolist() if self._plan.square else [()] * len(self._plan.videos)
            )
            out.back = [
                entries.setdefault((n, *at), len(entries))
                for numbers, at in zip(wanted['frames'].tolist(), corner)
                for n in numbers
            ]
            frames = sorted({n for n, *_ in entries})
            if (
                form.get('frames') == 'h264'
            ):  # a frame needs those before it, as far back as the last that decodes alone
                gop, last = form['gop'], {n // form['gop']: n for n in frames}
                frames = [n for g, end in last.items() for n in range(g * gop, end + 1)]
            place = {n: i for i, n in enumerate(frames)}
            out.shown, out.corner = (
                [place[n] for n, *_ in entries],
                [tuple(at) for _, *at in entries if at],
            )
        total, spans = int(wanted.get('total', 0)), []
        if self._plan.audios and total:
            count = self._plan.inputs['audio']['samples']
            spans = [(int(first), count) for first in wanted['samples']]
        seconds = sorted(
            {s for first, count in spans for s in sample_windows.seconds(first, count, total, rate)}
        )
        out.packets, sound = part.clip(record, frames, seconds)
        if spans:
            kind = '<f4' if form['kind'] == 'dmvr' else '<i2'
            pieces = {s: np.frombuffer(x, kind) for s, x in zip(seconds, sound)}
            out.audio = np.stack(
                [
                    sample_windows.to_int16(
                        sample_windows.window(pieces, first, count, total, rate)
                    )
                    for first, count in spans
                ]
            )
        return out

    # ---- in the graph: one row
    def _row(self, row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        v, plan = self._plan.inputs['video'], self._plan
        size = (plan.height * 3 // 2, plan.width) if plan.planes else (plan.height, plan.width, 3)
        shown = tf.boolean_mask(row['shown'], row['shown'] >= 0)
        shape = (len(plan.videos), v['frames'], *size)

        def of_jpeg():
            def decode(i):
                if not plan.square:
                    return tf.image.decode_jpeg(row['packets'][shown[i]], channels=3)
                return tf.image.decode_and_crop_jpeg(
                    row['packets'][shown[i]], tf.concat([row['corner'][i], size[:2]], 0), channels=3
                )

            return tf.map_fn(
                decode,
                tf.range(tf.size(shown)),
                fn_output_signature=tf.TensorSpec(size, tf.uint8),
                parallel_iterations=1,
            )

        def of_video():
            corner = [row['corner']] if plan.square else []
            decoded = tf.numpy_function(
                functools.partial(_from_video, size, plan.planes),
                [row['packets'], shown, *corner],
                tf.uint8,
            )
            return tf.ensure_shape(decoded, [None, *size])

        decoders = [of_video if f.get('frames') == 'h264' else of_jpeg for f in plan.formats]

        def pictures():
            decoded = (
                tf.switch_case(row['format'], decoders) if len(decoders) > 1 else decoders[0]()
            )
            once = (
                tf.size(shown) == shape[0] * shape[1]
            )  # then the entries are in order already, and copying would cost as much as some decoding
            return tf.reshape(
                tf.cond(once, lambda: decoded, lambda: tf.gather(decoded, row['back'])), shape
            )

        return {
            'step': row['step'],
            'video': tf.cond(tf.size(shown) > 0, pictures, lambda: tf.zeros(shape, tf.uint8)),
        }

    # ---- iterator
    def __next__(self) -> dict[str, Any]:
        if self.closed:
            raise StopIteration
        try:
            arrays = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        except Exception as e:
            error = self._error
            self.close()
            if isinstance(error, DataError):
                raise error from None
            raise DataError(
                f'a record cannot be decoded although its bytes are as written ({str(e).splitlines()[0][:200]}); '
                'prepare the data again with --overwrite'
            ) from e
        batch = self._planned.pop(int(arrays['step'][0]))
        pictures = (
            np.asarray(memoryview(arrays['video'])) if self._plan.videos else None
        )  # not .numpy(), which copies
        for i, v in enumerate(self._plan.videos):
            batch[v.stream]['data'] = np.ascontiguousarray(pictures[:, i])
        return batch

    def close(self) -> None:
        self.closed = True
        self._iterator = None
        self._planned.clear()


def _from_video(
    size: tuple[int, ...],
    planes: bool,
    packets: np.ndarray,
    shown: np.ndarray,
    corners: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [n, *size]: pictures `shown` [n] of packets that begin with one that decodes alone, cut at corners [≥n 2] if there are any."""
    from data_pipelines import media

    frames = media.decoded([p for p in packets if p], shown, 'yuv420p' if planes else 'rgb24')
    return (
        frames
        if corners is None
        else np.stack([f[y : y + size[0], x : x + size[1]] for f, (y, x) in zip(frames, corners)])
    )
