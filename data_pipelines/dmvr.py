"""Existing DMVR records (TFRecord files of SequenceExamples) -> an index beside them; the records are read as they are, where they are.

    python -m data_pipelines.dmvr --train='records/train-*' --test='records/test-*' --fps=10 --rate=48000 --out=data/mine_dmvr

reads every record once, checks it, and writes to --out where it begins and what it holds. From then on --out is a dataset like any other
(config.data.train.NAME.path): random access, exact resume, mixtures, evaluation. What is expected in the records: docs/data.md.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.storage import byte_offsets
from data_pipelines.storage import record_index as indices
from data_pipelines.storage.records import SPLITS

FRAMES = ('image/encoded',)
AUDIO = ('WAVEFORM/feature/floats', 'waveform/floats')
LABELS = ('clip/label', 'label')  # with /index and /text
HEADER, FOOTER = (
    12,
    4,
)  # bytes of a TFRecord before and behind the data: length and its checksum, checksum of the data
_LOUDEST = 4.0  # beyond this, samples are no sound in [-1, 1] that was clipped late


def index(
    out: str,
    train: str = '',
    validation: str = '',
    test: str = '',
    *,
    fps: float = 10.0,
    rate: int = 48000,
    name: str = '',
    tokenizer: str = 'words',
    vocabulary: int = 65536,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the folder `out` for the records in the files that the patterns match. fps, rate: of the stored frames and samples, which DMVR
    records do not say.

    Returns {'splits': {split: {'records', 'sentences', 'hours', 'without_audio', 'without_video'}}, 'skipped': {place: reason}}. What
    follows a damaged record in its file is skipped. Raises DataError for what no file can be read of, and for rates that contradict the records.
    """
    from data_pipelines.preparation.decoded_files import Settings
    from data_pipelines.prepare import _check_arguments, _Console, _dataset_name, _tokenizer

    say, target = _Console(quiet), pathlib.Path(out)
    name = name or _dataset_name(target)
    _check_arguments(Settings(float(fps), 256, int(rate), 90, 0.0), name, vocabulary, 0.0, 0.0, 1)
    files = {
        split: sorted(glob.glob(pattern))
        for split, pattern in zip(SPLITS, (train, validation, test))
        if pattern
    }
    if not files:
        raise DataError(
            "no records are named: give --train='FOLDER/train-*', and --validation and --test if there are any"
        )
    for split, paths in files.items():
        if not paths:
            raise DataError(
                f'no file matches --{split}={dict(zip(SPLITS, (train, validation, test)))[split]}'
            )
    if target.exists() and any(target.iterdir()):
        unfinished = (target / '.staging').is_dir() and not (target / 'prepare.json').is_file()
        if not unfinished and (not overwrite or not (target / 'index.json').is_file()):
            raise DataError(
                f'--out={target} is not empty; choose another, or pass --overwrite to replace an index'
            )
        shutil.rmtree(target)
    (target / '.staging').mkdir(parents=True)

    names: dict[str, str] = {}
    classes: dict[int, str] = {}
    skipped: dict[str, str] = {}
    records = {split: [] for split in files}
    crc = {split: [] for split in files}
    rows, pieces = ({split: [] for split in files} for _ in range(2))
    for split, paths in files.items():
        for number, path in enumerate(paths):
            say(f'{path} …')
            for offset, raw in _records(path, skipped):
                record = _look(raw, f'{path}, byte {offset}', fps, rate, names, classes)
                records[split].append(
                    {
                        **record,
                        'split': split,
                        'id': record['id'] or f'{os.path.basename(path)}:{len(records[split])}',
                    }
                )
                crc[split].append(zlib.crc32(raw))
                rows[split].append((number, offset + HEADER, len(raw)))
                try:
                    pieces[split].append(
                        byte_offsets.of_sequence_example(
                            raw, names.get('frames', ''), names.get('audio', ''), rate
                        )
                    )
                except ValueError as e:
                    raise DataError(f'{path}, byte {offset}: {e}') from None
    everything = [r for split in files for r in records[split]]
    if not everything:
        raise DataError(
            f'no record can be read ({next(iter(skipped.items()), "the files are empty")})'
        )
    _check_rates(everything, fps, rate)
    multi = _number_labels(everything, classes)
    stage = target / '.staging'
    _tokenizer(everything, tokenizer, vocabulary, stage)
    os.replace(stage / 'tokenizer.json', target / 'tokenizer.json')
    summary: dict[str, Any] = {'splits': {}, 'skipped': skipped}
    for split in files:
        if not records[split]:
            continue
        table = indices.Index.of(records[split], crc[split], multi)
        table.save(target / f'index-{split}.npz')
        byte_offsets.save(target, split, files[split], rows[split], pieces[split])
        summary['splits'][split] = {
            'records': len(table),
            'segments': len(table.segment_record),
            'sentences': len(table.sentence_start),
            'hours': round(float(table.duration.sum()) / 3600, 3),
            'without_audio': int((table.samples == 0).sum()),
            'without_video': int((table.frames == 0).sum()),
        }
    short = [min(r['height'], r['width']) for r in everything if r['frames']]
    indices.write_json(target / 'skipped.json', skipped)
    indices.write_json(
        target / 'index.json',
        {
            'version': indices.VERSION,
            'name': name,
            'fps': float(fps),
            'size': min(short, default=0),
            'rate': int(rate),
            'labels': {
                'class': [classes.get(i, f'class {i}') for i in range(max(classes, default=-1) + 1)]
            }
            if multi
            else {},
            'multi_hot': [n for n, k in multi.items() if k is not None],
            'splits': summary['splits'],
            'folds': [],
            'format': {'kind': 'dmvr', **names},
            'files': {
                split: [[os.path.abspath(p), os.path.getsize(p)] for p in paths]
                for split, paths in files.items()
            },
        },
    )
    indices.write_json(target / 'prepare.json', {'summary': summary})
    shutil.rmtree(stage)
    say.summary(target, {**summary, 'seconds': 0}, [])
    return summary


def _records(path: str, skipped: dict[str, str]) -> Iterator[tuple[int, bytes]]:
    """(where the record begins, its bytes), checksums compared, up to the first damage."""
    import tensorflow as tf

    with open(path, 'rb') as f:
        if f.read(2) == b'\x1f\x8b':
            raise DataError(
                f'{path} is compressed (gzip), so its records cannot be reached one by one; unpack it first'
            )
    offset = 0
    try:
        for raw in tf.data.TFRecordDataset(path).as_numpy_iterator():
            yield offset, raw
            offset += HEADER + len(raw) + FOOTER
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as e:
        skipped[f'{path}, from byte {offset}'] = (
            f'corrupt: {str(e).splitlines()[0].split(" [Op")[0][:120]}'
        )


def _look(
    raw: bytes, where: str, fps: float, rate: int, names: dict[str, str], classes: dict[int, str]
) -> dict[str, Any]:
    """What one record holds, as Index.of wants it. names: which of the possible features these records have; classes: names of labels; both grow."""
    import tensorflow as tf
    from PIL import Image

    try:
        example = tf.train.SequenceExample.FromString(raw)
    except Exception as e:  # the library's own kinds
        raise DataError(
            f'{where}: this is not a SequenceExample ({type(e).__name__}); are these DMVR records?'
        ) from None
    lists, context = example.feature_lists.feature_list, example.context.feature

    def feature(kind: str, possible: tuple[str, ...]) -> list[Any]:
        here = [n for n in possible if n in lists]
        if here and names.setdefault(kind, here[0]) != here[0]:
            raise DataError(
                f'{where} has its {kind} in {here[0]!r}, records before in {names[kind]!r}; index them apart'
            )
        return lists[here[0]].feature if here else []

    frames = [f.bytes_list.value[0] for f in feature('frames', FRAMES) if f.bytes_list.value]
    sound = [np.asarray(f.float_list.value, np.float32) for f in feature('audio', AUDIO)]
    samples = sum(map(len, sound))
    if not frames and not samples:
        raise DataError(
            f'{where} has neither {FRAMES[0]} nor {" nor ".join(AUDIO)}; it has {", ".join([*lists, *context]) or "nothing"}'
        )
    if (
        samples and not max(float(np.abs(s).max(initial=0)) for s in sound) <= _LOUDEST
    ):  # also for NaN
        raise DataError(f'{where}: its sound is not in [-1, 1]; were integers written as floats?')
    try:
        width, height = Image.open(io.BytesIO(frames[0])).size if frames else (0, 0)
    except OSError:
        raise DataError(f'{where}: its first frame is no image') from None
    said = lambda key: (
        [b.decode('utf-8', 'replace') for b in context[key].bytes_list.value]
        if key in context
        else []
    )
    number = lambda key: (
        context[key].int64_list.value[0] / 1e6
        if key in context and context[key].int64_list.value
        else None
    )
    labels: list[int] = []
    for prefix in LABELS:
        if f'{prefix}/index' in context:
            labels = list(context[f'{prefix}/index'].int64_list.value)
            for i, text in zip(labels, said(f'{prefix}/text')):
                if classes.setdefault(i, text) != text:
                    raise DataError(
                        f'{where}: label {i} is {text!r} here and {classes[i]!r} before'
                    )
            for i in labels:
                classes.setdefault(i, f'class {i}')
            break
    duration = len(frames) / fps if frames else samples / rate
    start, end = number('clip/start/timestamp'), number('clip/end/timestamp')
    file = ''.join(said('video/filename') or said('clip/media_id') or said('clip/data_path'))
    captions = [t for t in said('caption/string') if t]
    return {
        'id': f'{file}@{start:g}-{end:g}'
        if file and start is not None and end is not None
        else file,
        'frames': len(frames),
        'samples': samples,
        'height': height,
        'width': width,
        'duration': duration,
        'ground_truth': '{}',
        'labelled': sorted(set(labels)),
        'sentences': [{'text': t, 'start': 0.0, 'end': duration} for t in captions],
        'segments': [
            {
                'start': 0.0,
                'end': duration,
                'caption': captions[0] if captions else '',
                'labels': {},
            }
        ],
    }


def _number_labels(records: list[dict[str, Any]], classes: dict[int, str]) -> dict[str, int | None]:
    """Gives each record's segment its label `class`; returns {label: number of classes if some record has several, else None}."""
    if not classes:
        return {}
    count = max(classes) + 1
    several = any(len(r['labelled']) > 1 for r in records)
    for r in records:
        of = r['labelled']
        r['segments'][0]['labels']['class'] = (
            [int(i in of) for i in range(count)] if several else of[0] if of else -1
        )
    return {'class': count if several else None}


def _check_rates(records: list[dict[str, Any]], fps: float, rate: int) -> None:
    ratios = [
        r['samples'] / rate / (r['frames'] / fps) for r in records if r['samples'] and r['frames']
    ]
    if ratios and not 0.8 < np.median(ratios) < 1.25:
        one = next(r for r in records if r['samples'] and r['frames'])
        raise DataError(
            f'--fps={fps:g} and --rate={rate} cannot both be right: a record has {one["frames"]} frames '
            f'({one["frames"] / fps:.2f} s) and {one["samples"]} samples ({one["samples"] / rate:.2f} s)'
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.dmvr',
        allow_abbrev=False,
        description='An index for existing DMVR records, which are then read as they are (docs/data.md).',
    )
    for split in SPLITS:
        parser.add_argument(
            f'--{split}',
            default='',
            metavar='PATTERN',
            help=f"TFRecord files of the split {split}, quoted: 'records/{split}-*'",
        )
    parser.add_argument('--out', required=True, help='folder of the index')
    parser.add_argument('--fps', type=float, default=10.0, help='frames per second of the records')
    parser.add_argument(
        '--rate', type=int, default=48000, help='sound samples per second of the records'
    )
    parser.add_argument('--name', default='', help='name of the dataset; default: from --out')
    parser.add_argument(
        '--vocabulary', type=int, default=65536, help='size of the vocabulary, at most'
    )
    parser.add_argument(
        '--tokenizer', default='words', choices=('words', 'wordpiece', 'sentencepiece')
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an index')
    parser.add_argument('--quiet', action='store_true', help='print errors only')
    try:
        index(**vars(parser.parse_args(arguments)))
    except DataError as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
