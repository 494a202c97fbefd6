"""A folder of media files and their captions, or a named dataset -> a tfds dataset in ArrayRecord, ready for training. Once, offline.

    python -m data_pipelines.prepare --videos=my_videos --captions=captions.csv --out=data/mine
    python -m data_pipelines.prepare --dataset=ucf101 --manual_dir=downloads/ucf101 --out=data/ucf101

It can be killed at any moment and started again: each decoded file is kept until the dataset is whole. A file that cannot be
used is skipped with its reason and never stops the others. What goes in and what comes out: docs/data.md, docs/datasets.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures as futures
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines import media
from data_pipelines.datasets import named
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, media_catalog
from data_pipelines.storage import record_index as indices
from data_pipelines.storage.records import CLIPS, SPLITS, note_places, shards

_FOLDERS = {
    'train': 'train',
    'validation': 'validation',
    'val': 'validation',
    'valid': 'validation',
    'test': 'test',
}
_DONE = 'prepare.json'


def _say_disk(function):
    """A disk that takes no more is one sentence too; the library that writes the records says it in its own way."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (OSError, RuntimeError) as e:
            full = [
                os.strerror(n)
                for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                if getattr(e, 'errno', None) == n or os.strerror(n) in str(e)
            ]
            if not full:
                raise
            raise DataError(
                f'writing the dataset failed: {full[0]}; what is decoded is kept, so make room and start the same command again'
            ) from e

    return call


@_say_disk
def prepare(
    videos: str = '',
    captions: str = '',
    out: str = '',
    *,
    annotations: str = '',
    dataset: str = '',
    manual_dir: str = '',
    fps: float = 10.0,
    size: int = 256,
    rate: int = 48000,
    quality: int = 90,
    store: str = 'jpeg',
    crf: int = 23,
    processes: int = 2,
    min_seconds: float | None = None,
    name: str = '',
    vocabulary: int = 65536,
    tokenizer: str = 'words',
    validation: float = 0.05,
    test: float = 0.05,
    require_audio: bool = False,
    beam: str = '',
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Prepares the folder `videos` (`captions` and `annotations` may be ''), or the named `dataset` below `manual_dir`, into the folder
    `out`. The rest is in `--help`.

    Returns {'splits': {split: {'records', 'segments', 'sentences', 'hours', 'without_audio', 'without_video'}}, 'skipped':
    {file: reason}, 'labels', 'seconds', 'fresh': False if everything was there already}; of a dataset with folds there is one split `clips`, and
    'folds': [{split: records}]. Raises DataError with one sentence.
    """
    began = time.monotonic()
    say = _Console(quiet)
    if not out or not (dataset or videos):
        raise DataError('give --out, and --videos or --dataset with --manual_dir')
    if dataset and (captions or annotations):
        raise DataError(
            f'--dataset={dataset} brings its own captions and annotations; leave --captions and --annotations out'
        )
    target = pathlib.Path(out)
    min_seconds = (0.0 if dataset else 1.0) if min_seconds is None else min_seconds
    settings = decoded_files.Settings(
        float(fps), int(size), int(rate), int(quality), float(min_seconds), _crf(store, crf)
    )
    name = name or _dataset_name(target)
    _check_arguments(settings, name, vocabulary, validation, test, processes)
    given = (
        named.read(dataset, manual_dir, videos)
        if dataset
        else media_catalog.mine(videos, captions, annotations)
    )
    files = given.files

    identity = {  # all that decides what comes out
        'settings': settings.words(),
        'name': name,
        'vocabulary': vocabulary,
        'tokenizer': tokenizer,
        'validation': validation,
        'test': test,
        'require_audio': require_audio,
        **given.identity,
        'files': hashlib.sha256(
            '\n'.join(sorted(f.key(settings) for f in files)).encode()
        ).hexdigest(),
    }
    done = _finished(target, identity, overwrite)
    if done:
        shutil.rmtree(
            target / '.staging', ignore_errors=True
        )  # left if the last run was killed at its very end
        say(f'{target} is already prepared from these files with these settings; nothing to do.')
        return {**done['summary'], 'fresh': False}
    stage_dir = target / '.staging'
    stage_dir.mkdir(parents=True, exist_ok=True)

    _stage_all(files, settings, stage_dir, processes, say, beam)
    records, skipped = [], dict(given.skipped)
    if dataset:
        skipped |= dict.fromkeys(given.missing, 'missing: no such file')
    for file in files:
        head = decoded_files.header(decoded_files.place(stage_dir, file, settings))
        reason = head.get('skipped') or (
            'no audio' if require_audio and not head['samples'] else None
        )
        if reason:
            skipped[file.id] = reason
        else:
            records.append(
                _record(
                    file, head, given.sentences.get(file.id), given.marks.get(file.id), given.multi
                )
            )
    if not records:
        indices.write_json(target / 'skipped.json', skipped)
        first = next(iter(skipped.items()))
        raise DataError(
            f'all {len(skipped)} files below {videos or manual_dir} were skipped, for example {first[0]} ({first[1]}); see '
            f'{target / "skipped.json"}'
        )
    folders = not dataset and _folders(files)
    for record in records:
        if given.folds:
            record['split'], of = CLIPS, given.splits[record['id']]
            record['folds'] = [SPLITS.index(s) if s else -1 for s in of]
            record['ground_truth'] = {**record['ground_truth'], 'folds': list(of)}
        else:
            record['split'] = given.splits.get(record['id']) or _split_of(
                record['id'], folders, validation, test
            )
        record['ground_truth'] = json.dumps(record['ground_truth'])
    _tokenizer(records, tokenizer, vocabulary, stage_dir)

    say(f'writing {len(records)} records …')
    by_id = {f.id: f for f in files}
    produced = _write(records, by_id, settings, stage_dir, name, given.multi)
    summary = _publish(produced, stage_dir, target, name, settings, given, records, skipped)
    summary['seconds'] = round(time.monotonic() - began, 1)
    indices.write_json(
        target / _DONE,
        {
            'identity': identity,
            'files': sorted(p.name for p in target.iterdir() if p.is_file()),
            'summary': summary,
        },
    )
    shutil.rmtree(stage_dir, ignore_errors=True)
    say.summary(target, summary, [] if dataset else given.missing)
    if given.unused:
        say(f'{given.unused} media files are in no annotation file and were not used.')
    return {**summary, 'fresh': True}


# ---- what there is


def _check_arguments(
    s: decoded_files.Settings,
    name: str,
    vocabulary: int,
    validation: float,
    test: float,
    processes: int,
) -> None:
    for what, value, right in (
        ('fps', s.fps, 0 < s.fps <= 120),
        ('rate', s.rate, 1000 <= s.rate <= 192000),
        ('size', s.size, 8 <= s.size <= 4096 and not (s.crf and s.size % 2)),
        ('quality', s.quality, 1 <= s.quality <= 100),
        ('min_seconds', s.min_seconds, s.min_seconds >= 0),
        ('vocabulary', vocabulary, vocabulary >= 3),
        ('processes', processes, processes >= 1),
        ('validation', validation, validation >= 0 and validation + test < 1),
        ('test', test, test >= 0),
    ):
        if not right:
            raise DataError(f'--{what}={value} makes no sense; see --help for what it means')
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
        raise DataError(
            f'--name={name} must be lower-case letters, digits and underscores, beginning with a letter'
        )


def _crf(store: str, crf: int) -> int:
    if store not in ('jpeg', 'h264') or not 1 <= crf <= 51:
        raise DataError(
            f'--store={store} --crf={crf} makes no sense; --store is jpeg or h264, --crf from 1 (best) to 51'
        )
    return crf if store == 'h264' else 0


def _dataset_name(out: pathlib.Path) -> str:
    words = re.sub(r'[^a-z0-9]+', '_', out.resolve().name.lower()).strip('_')
    return words if re.match('[a-z]', words) else f'set_{words}' if words else 'videos'


def is_finished(target: pathlib.Path) -> bool:
    """Whether `target` holds a whole dataset: its last file is there."""
    return (target / _DONE).is_file()


def _finished(
    target: pathlib.Path, identity: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """What stands in `target` if it is exactly what is asked for. Makes room for new data, or raises DataError."""
    if target.exists() and not target.is_dir():
        raise DataError(f'--out={target} is a file')
    done = target / _DONE
    if not is_finished(target):
        if target.is_dir() and not (target / '.staging').exists() and any(target.iterdir()):
            raise DataError(f'--out={target} holds other files; choose a new or empty folder')
        return None
    old = json.loads(done.read_text(encoding='utf-8'))
    if old['identity'] == json.loads(json.dumps(identity)):
        return old
    if not overwrite:
        changed = [
            k for k in identity if old['identity'].get(k) != json.loads(json.dumps(identity[k]))
        ]
        raise DataError(
            f'{target} is already prepared with other {" and ".join(changed)}; choose another --out, or pass '
            '--overwrite to replace it'
        )
    done.unlink()  # first: without it the folder is unfinished, whatever happens next
    (target / '.staging').mkdir(exist_ok=True)
    for entry in old['files']:
        (target / entry).unlink(missing_ok=True)
    return None


# ---- decoding


def _stage_all(
    files: list[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    processes: int,
    say: _Console,
    beam: str = '',
) -> None:
    """Stages every file that is not staged yet, by Beam with these options if there are any."""
    waiting = [f for f in files if not decoded_files.place(stage_dir, f, settings).is_file()]
    if len(waiting) < len(files):
        say(f'continuing: {len(files) - len(waiting)} of {len(files)} files are already decoded.')
    if not waiting:
        return
    if beam:
        try:
            from data_pipelines.preparation import beam as pipelines
        except ImportError as e:
            raise DataError(
                f"--beam={beam} needs apache-beam ({e}); pip install 'vatt_jax[beam]' into an environment of its own"
            ) from None
        counts = pipelines.stage(waiting, settings, stage_dir, beam)
        say('Beam: ' + ', '.join(f'{count} {what}' for what, count in sorted(counts.items())))
        return
    with say.progress(len(files), len(files) - len(waiting)) as step:
        if processes == 1:
            for file in waiting:
                decoded_files.stage(
                    file, settings, str(decoded_files.place(stage_dir, file, settings))
                )
                step()
            return
        while waiting:
            waiting = _stage_some(waiting, settings, stage_dir, processes, step)


def _stage_some(
    waiting: list[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    processes: int,
    step: Any,
) -> list[decoded_files.File]:
    """Stages files side by side until done, or until one kills its process; returns what is left."""
    queue, running = list(reversed(waiting)), {}
    place = lambda f: str(decoded_files.place(stage_dir, f, settings))
    pool = decoded_files.pool(min(processes, len(waiting)))
    try:
        while queue or running:
            while queue and len(running) < 4 * processes:
                file = queue.pop()
                running[pool.submit(decoded_files.stage, file, settings, place(file))] = file
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                future.result()
                del running[future]
                step()
        return []
    except BrokenProcessPool:
        # One of these files crashed the decoder (or the machine ran out of memory): try each alone.
        for file in running.values():
            if pathlib.Path(place(file)).is_file():
                step()
                continue
            alone = decoded_files.pool(1)
            try:
                alone.submit(decoded_files.stage, file, settings, place(file)).result()
            except BrokenProcessPool:
                decoded_files.crashed(file, place(file))
            finally:
                alone.shutdown()
            step()
        return list(reversed(queue))
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what is known about a file


def _record(
    file: decoded_files.File,
    head: Mapping[str, Any],
    sentences: list[dict] | None,
    marks: Mapping[str, Any] | None,
    multi: Mapping[str, int | None],
) -> dict[str, Any]:
    """Times cut to the record; entries that lie behind its end are dropped; without segments, one spans it."""
    duration = head['duration']
    inside = lambda rows: [
        {**r, 'end': min(r['end'], duration)} for r in rows if r['start'] < duration
    ]
    segments = inside((marks or {}).get('segments') or []) or [
        {'start': 0.0, 'end': duration, 'caption': '', 'labels': {}}
    ]
    spoken = inside(sentences or []) or [
        {'text': s['caption'], 'start': s['start'], 'end': s['end']}
        for s in segments
        if s['caption']
    ]
    spoken.sort(key=lambda s: (s['start'], s['end']))
    segments = [
        {**s, 'labels': {n: _label(s['labels'].get(n, -1), k) for n, k in multi.items()}}
        for s in segments
    ]
    return {
        'id': file.id,
        'frames': len(head['lengths']),
        'samples': head['samples'],
        'height': head['height'],
        'width': head['width'],
        'duration': duration,
        'sentences': spoken,
        'segments': segments,
        'ground_truth': (marks or {}).get('ground_truth', {}),
    }


def _label(value: int | list[int], classes: int | None) -> int | list[int]:
    if classes is None:
        return value
    chosen = value if isinstance(value, list) else [value]
    return [int(i in chosen) for i in range(classes)]


def _folders(files: list[decoded_files.File]) -> bool:
    return any('/' in f.id and f.id.split('/')[0].lower() in _FOLDERS for f in files)


def _split_of(file: str, folders: bool, validation: float, test: float) -> str:
    if folders:  # files beside the folders are for training
        return _FOLDERS.get(file.split('/')[0].lower(), 'train') if '/' in file else 'train'
    # Of the name alone: more files later leave these where they are.
    u = int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], 'big') / 2**64
    return 'test' if u < test else 'validation' if u < test + validation else 'train'


def _tokenizer(
    records: list[dict[str, Any]], kind: str, size: int, stage_dir: pathlib.Path
) -> None:
    from vatt_jax.inputs import tokenizer as tokenizers

    texts = [s['text'] for r in records if r['split'] == 'train' for s in r['sentences']]
    texts += [
        s['caption']
        for r in records
        if r['split'] == 'train'
        for s in r['segments']
        if s['caption']
    ]
    try:
        made = tokenizers.train(kind, texts, size)
    except (ValueError, ImportError, RuntimeError) as e:
        raise DataError(f'--tokenizer={kind}: {e}') from None
    indices.write_json(stage_dir / 'tokenizer.json', made.to_spec())


# ---- writing


def _write(
    records: list[dict[str, Any]],
    files: Mapping[str, decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    name: str,
    multi: Mapping[str, int | None],
) -> pathlib.Path:
    """The tfds dataset, below the staging folder; returns its folder."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    from data_pipelines.datasets import folder

    shutil.rmtree(stage_dir / 'tfds', ignore_errors=True)

    def examples(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for r in records:
            if r['split'] == split:
                frames, pcm = decoded_files.content(
                    decoded_files.place(stage_dir, files[r['id']], settings)
                )
                yield (
                    r['id'],
                    {
                        'id': r['id'],
                        'fps': settings.fps,
                        'height': r['height'],
                        'width': r['width'],
                        'rate': settings.rate,
                        'frames': frames,
                        'audio': pcm,
                        **{
                            f'caption_{k}': [s[k] for s in r['sentences']]
                            for k in ('text', 'start', 'end')
                        },
                        **{
                            f'segment_{k}': [s[k] for s in r['segments']]
                            for k in ('start', 'end', 'caption')
                        },
                        'segment_labels': {
                            n: [s['labels'][n] for s in r['segments']] for n in multi
                        },
                        'ground_truth': r['ground_truth'],
                    },
                )

    splits = {
        split: (lambda split=split: examples(split))
        for split in (*SPLITS, CLIPS)
        if any(r['split'] == split for r in records)
    }
    labels = {n: (classes or 0, classes is not None) for n, classes in multi.items()}
    return pathlib.Path(folder.write(str(stage_dir / 'tfds'), name, labels, splits))


def _publish(
    produced: pathlib.Path,
    stage_dir: pathlib.Path,
    target: pathlib.Path,
    name: str,
    settings: decoded_files.Settings,
    given: media_catalog.Inputs,
    records: list[dict[str, Any]],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """Moves the dataset into place with its sidecars, reading every record back on the way. Returns the summary."""
    known = {r['id']: r for r in records}
    # Everything in this folder is from this run or a killed one: the check in _finished saw to that.
    for old in target.iterdir():
        if old.is_file():
            old.unlink()
    summary: dict[str, Any] = {
        'splits': {},
        'skipped': dict(skipped),
        'labels': {k: list(v) for k, v in given.classes.items()},
    }
    for split in (*SPLITS, CLIPS):
        if not shards(produced, split):
            continue
        noted = list(note_places(produced, split, settings.rate))
        rows, crc = [known[id] for id, _ in noted], [c for _, c in noted]
        if len(rows) != sum(r['split'] == split for r in records):
            raise DataError(
                f'{produced}: {len(rows)} of the records of split {split} can be read back; is the disk sound?'
            )
        table = indices.Index.of(rows, crc, dict(given.multi))
        table.save(stage_dir / f'index-{split}.npz')
        os.replace(stage_dir / f'index-{split}.npz', target / f'index-{split}.npz')
        summary['splits'][split] = {
            'records': len(table),
            'segments': len(table.segment_record),
            'sentences': len(table.sentence_start),
            'hours': round(float(table.duration.sum()) / 3600, 3),
            'without_audio': int((table.samples == 0).sum()),
            'without_video': int((table.frames == 0).sum()),
        }
    if given.folds:
        summary['folds'] = [
            media_catalog.counts(SPLITS[r['folds'][k]] for r in records if r['folds'][k] >= 0)
            for k in range(given.folds)
        ]
    for file in produced.iterdir():
        os.replace(file, target / file.name)
    os.replace(stage_dir / 'tokenizer.json', target / 'tokenizer.json')
    indices.write_json(target / 'skipped.json', dict(skipped))
    indices.write_json(
        target / 'index.json',
        {
            'version': indices.VERSION,
            'name': name,
            'fps': settings.fps,
            'size': settings.size,
            'rate': settings.rate,
            'quality': settings.quality,
            'labels': summary['labels'],
            'multi_hot': [n for n, k in given.multi.items() if k is not None],
            'splits': summary['splits'],
            'folds': summary.get('folds', []),
            'format': {
                'kind': 'example',
                **({'frames': 'h264', 'gop': media.GOP} if settings.crf else {}),
            },
        },
    )
    return summary


# ---- what the user sees


class _Console:
    def __init__(self, quiet: bool):
        from rich.console import Console

        self.console = Console(quiet=quiet, highlight=False)

    def __call__(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)  # commands stay whole

    def progress(self, total: int, done: int) -> Any:
        """Context: a function to call after each file."""
        import contextlib

        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        @contextlib.contextmanager
        def bar():
            with Progress(
                TextColumn('decoding'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn('left'),
                TimeRemainingColumn(),
                console=self.console,
            ) as progress:
                task = progress.add_task('', total=total, completed=done)
                yield lambda: progress.advance(task)

        return bar()

    def summary(self, target: pathlib.Path, summary: Mapping[str, Any], unknown: list[str]) -> None:
        from rich.table import Table

        columns = ('records', 'segments', 'sentences', 'hours', 'without_audio', 'without_video')
        table = Table(title=f'{target}', title_justify='left')
        table.add_column('split')
        for column in columns:
            table.add_column(column.replace('_', ' '), justify='right')
        for split, row in summary['splits'].items():
            table.add_row(split, *(str(row[c]) for c in columns))
        self.console.print(table)
        if summary['skipped']:
            reasons: dict[str, list[str]] = {}
            for file, reason in summary['skipped'].items():
                reasons.setdefault(reason.split(':')[0], []).append(file)
            table = Table(
                title=f'{len(summary["skipped"])} files skipped (skipped.json)',
                title_justify='left',
            )
            for column in ('reason', 'files', 'for example'):
                table.add_column(column)
            for reason, some in sorted(reasons.items(), key=lambda item: -len(item[1])):
                table.add_row(reason, str(len(some)), f'{some[0]} ({summary["skipped"][some[0]]})')
            self.console.print(table)
        if unknown:
            self(
                f'{len(unknown)} names in captions or annotations have no file here, for example {unknown[0]!r}.'
            )
        self(
            f'done in {summary["seconds"]} s. Train on it: python run.py --config=FILE '
            f"\"--config.data.train={{'mine': {{'path': {str(target)!r}}}}}\""
        )


def _page(dataset: str) -> str:
    """What --help says of a named dataset."""
    if dataset not in named.DATASETS:
        return ''
    title, text, files = named.of(dataset).page()
    return f'{title}\n\n{textwrap.indent(files, "  ")}\n\n{text}'


def main(arguments: list[str] | None = None) -> int:
    page = next(
        (a.partition('=')[2] for a in arguments or sys.argv[1:] if a.startswith('--dataset=')), ''
    )
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.prepare',
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_page(page),
        description='Media files and captions, or a named dataset -> a dataset for training (docs/data.md, docs/datasets.md).',
    )
    add = parser.add_argument
    add(
        '--videos',
        default='',
        help='folder of media files, searched through; with --dataset: where its media are, if not below --manual_dir',
    )
    add(
        '--captions',
        default='',
        help='CSV (video,start,end,text) or JSON; without it the captions of annotated segments serve',
    )
    add(
        '--dataset',
        default='',
        metavar='NAME',
        help=f'instead of --captions and --annotations: {", ".join(named.DATASETS)}',
    )
    add(
        '--manual_dir',
        default='',
        help='folder with the files of --dataset; --dataset=NAME --help says which',
    )
    add('--out', default='', help='folder of the dataset, new or of an earlier run of this command')
    add(
        '--annotations',
        default='',
        help='JSON (labels, segments, ground truth) or CSV (video,label)',
    )
    add('--fps', type=float, default=10.0, help='stored frames per second')
    add(
        '--size',
        type=int,
        default=256,
        help='pixels of the short side of stored frames; even for --store=h264',
    )
    add('--rate', type=int, default=48000, help='stored sound samples per second, mono')
    add('--quality', type=int, default=90, help='JPEG quality, 1 to 100')
    add(
        '--store',
        default='jpeg',
        choices=('jpeg', 'h264'),
        help='frames as JPEG, or as short pieces of video (docs/data.md)',
    )
    add('--crf', type=int, default=23, help='quality of h264, 1 (best) to 51')
    add('--processes', type=int, default=2, help='files decoded side by side')
    add(
        '--beam',
        default='',
        metavar='OPTIONS',
        help="decode in an Apache Beam pipeline with these options: --beam='--runner=DirectRunner'",
    )
    add(
        '--min_seconds',
        type=float,
        default=None,
        help='shorter files are skipped; default: 1, of named datasets 0',
    )
    add('--name', default='', help='name of the dataset; default: from --out')
    add('--vocabulary', type=int, default=65536, help='size of the vocabulary, at most')
    add('--tokenizer', default='words', choices=('words', 'wordpiece', 'sentencepiece'))
    add(
        '--validation',
        type=float,
        default=0.05,
        help='share of the files, unless folders train, validation, test say it',
    )
    add('--test', type=float, default=0.05, help='share of the files, as for --validation')
    add('--require_audio', action='store_true', help='skip videos without sound')
    add('--overwrite', action='store_true', help='replace a dataset that was prepared differently')
    add('--quiet', action='store_true', help='print errors only')
    try:
        prepare(**vars(parser.parse_args(arguments)))
    except DataError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; the same command goes on from here', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
