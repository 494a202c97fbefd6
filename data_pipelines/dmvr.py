"""Existing DMVR records (TFRecord files of SequenceExamples) -> an index beside them.

The records are read as they are, where they are:

    python -m data_pipelines.dmvr --train='records/train-*' --test='records/test-*' \\
        --fps=10 --rate=48000 --out=data/mine_dmvr

reads every record once, checks it, and writes to --out where it begins and what it holds. From then
on --out is a dataset like any other (config.data.train.NAME.path): random access, exact resume,
mixtures, evaluation. What is expected in the
records: docs/data.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import io
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Before TensorFlow is imported, which reads it once: its notices would drown the messages.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.preparation.console import Console
from data_pipelines.storage import piece_tables, record_messages
from data_pipelines.storage import record_index as indices
from data_pipelines.storage.index_writer import IndexWriter
from data_pipelines.storage.records import SPLITS
from vatt_jax import extras
from vatt_jax.command_line import expand_home
from vatt_jax.config import fail
from vatt_jax.terminal import printable, use_plain_characters

try:
    # All of these import the reader of media files, whose packages are an extra.
    from data_pipelines.preparation import arguments, decoded_files, record_contents
except extras.MissingExtra as error:
    # A program that imports this file gets the exception.
    if __name__ == '__main__':
        fail(str(error))
    raise

FRAMES = ('image/encoded',)
AUDIO = ('WAVEFORM/feature/floats', 'waveform/floats')
LABELS = ('clip/label', 'label')  # with /index and /text
HEADER = 12  # bytes of a TFRecord before the data: its length and the checksum of that
FOOTER = 4  # bytes behind the data: its checksum
# Resampling overshoots full scale a little; integers written as floats are far beyond it.
_LOUDEST = 4.0  # beyond this, samples are no sound in [-1, 1] that was clipped late


@dataclasses.dataclass
class IndexedSplit:
    """What was found in the files of one split, in record order.

    Attributes:
      paths: the files.
      records: what each record holds, as `Index.from_records` takes it.
      crc: checksum of each record.
      rows: (number of the file, offset, bytes) of each record.
      pieces: where the frames and seconds of each record lie in it.
    """

    paths: list[str]
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    crc: list[int] = dataclasses.field(default_factory=list)
    rows: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    pieces: list[record_messages.Pieces] = dataclasses.field(default_factory=list)


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
    """Write the folder `out` for the records in the files that the patterns match.

    What follows a damaged record in its file is skipped.

    Args:
      out: folder of the index.
      train: pattern of the files of this split; '' for none. Likewise `validation` and `test`.
      validation: see `train`.
      test: see `train`.
      fps: of the stored frames, which DMVR records do not say.
      rate: of the stored samples, which DMVR records do not say either.
      name: of the dataset; '' for that of the folder.
      tokenizer: kind of the tokenizer trained on the captions.
      vocabulary: its size, at most.
      overwrite: replace an index.
      quiet: print nothing.

    Returns:
      {'splits': {split: {'records', 'sentences', 'hours', 'without_audio', 'without_video'}},
      'skipped': {place: reason}}.

    Raises:
      DataError: no record can be read, or fps and rate contradict the records.
    """
    say = Console(quiet)
    target = pathlib.Path(out)
    name = name or arguments.dataset_name(target)
    # Of the settings only fps and rate matter here; the others pass the check.
    settings = decoded_files.Settings(float(fps), 256, int(rate), 90, 0.0)
    arguments.check_arguments(settings, name, vocabulary, 0.0, 0.0, 1)
    # Wrong arguments are refused before the folder is touched.
    splits = _find_files({'train': train, 'validation': validation, 'test': test})
    # Before the records are read, which may take hours.
    modules = ('tensorflow', *record_contents.tokenizer_modules(tokenizer))
    extras.check('reading DMVR records', *modules)
    _make_target(target, overwrite)

    parser = RecordParser(fps, rate)
    skipped: dict[str, str] = {}
    for split_name, split in splits.items():
        for number, path in enumerate(split.paths):
            say(f'{path} …')
            _index_file(split, number, path, parser, skipped)
        for record in split.records:
            record['split'] = split_name  # the tokenizer is trained on captions of `train` alone
    all_records: list[dict[str, Any]] = []
    for split in splits.values():
        all_records.extend(split.records)
    if not all_records:
        first_skipped = next(iter(skipped.items()), 'the files are empty')
        raise DataError(f'no record can be read ({first_skipped})')
    _check_rates(all_records, fps, rate)
    label_classes = _number_labels(all_records, parser.class_names)

    # The records agree with each other and with fps and rate: from here on files are written.
    staging = target / '.staging'
    record_contents.train_tokenizer(all_records, tokenizer, vocabulary, staging)
    # A rename is atomic: the file is there whole or not at all.
    os.replace(staging / 'tokenizer.json', target / 'tokenizer.json')
    split_summaries = {}
    for split_name, split in splits.items():
        if split.records:
            split_summaries[split_name] = _save_split(
                target, split_name, split, label_classes, int(rate)
            )
    summary: dict[str, Any] = {'splits': split_summaries, 'skipped': skipped}

    # Records without video have no size to compare.
    short_sides = [min(r['height'], r['width']) for r in all_records if r['frames']]
    labels = {}
    if label_classes:
        # The index in this list is the number of the class, so gaps in the numbers are filled.
        num_classes = max(parser.class_names, default=-1) + 1
        labels['class'] = [parser.class_names.get(i, f'class {i}') for i in range(num_classes)]
    stored_files = {}
    for split_name, split in splits.items():
        # The records stay where they are, so the index names their files.
        stored_files[split_name] = [[os.path.abspath(p), os.path.getsize(p)] for p in split.paths]
    indices.write_json(target / 'skipped.json', skipped)
    indices.write_json(
        target / 'index.json',
        {
            'version': indices.VERSION,
            'name': name,
            'fps': float(fps),
            'size': min(short_sides, default=0),  # pixels of the shortest side of all videos
            'rate': int(rate),
            'labels': labels,
            'multi_hot': [label for label, count in label_classes.items() if count is not None],
            'splits': split_summaries,
            'folds': [],  # DMVR records have none
            'format': {'kind': 'dmvr', **parser.feature_names},
            'files': stored_files,
        },
    )
    # Last: a folder with this file is complete.
    indices.write_json(target / 'prepare.json', {'summary': summary})
    shutil.rmtree(staging)
    say.summary(target, {**summary, 'seconds': 0}, [])
    return summary


def _find_files(patterns: Mapping[str, str]) -> dict[str, IndexedSplit]:
    """The files of every split for which a pattern is given; DataError where there are none."""
    splits = {}
    for name, pattern in patterns.items():
        if pattern:
            # glob returns files in the file system's order, which differs between machines.
            splits[name] = IndexedSplit(sorted(glob.glob(pattern)))
    if not splits:
        raise DataError(
            "no records are named: give --train='FOLDER/train-*', and --validation and --test "
            'if there are any'
        )
    for name, split in splits.items():
        if not split.paths:
            raise DataError(f'no file matches --{name}={patterns[name]}')
    return splits


def _make_target(target: pathlib.Path, overwrite: bool) -> None:
    """Make the empty folder of the index; DataError if that would delete anything but an index."""
    if target.exists() and any(target.iterdir()):
        is_staging = (target / '.staging').is_dir()
        # An interrupted index may be replaced without --overwrite: prepare.json comes last.
        is_unfinished = is_staging and not (target / 'prepare.json').is_file()
        may_replace = overwrite and (target / 'index.json').is_file()
        if not is_unfinished and not may_replace:
            raise DataError(
                f'--out={target} is not empty; choose another, or pass --overwrite to replace '
                'an index'
            )
        shutil.rmtree(target)
    (target / '.staging').mkdir(parents=True)


def _index_file(
    split: IndexedSplit, number: int, path: str, parser: RecordParser, skipped: dict[str, str]
) -> None:
    """Add the records of the `number`-th file to the split, unreadable ones to `skipped`."""
    # The record's own bytes begin after HEADER; offset + HEADER is what the index stores.
    for offset, raw in _read_records(path, skipped):
        where = f'{path}, byte {offset}'
        record = parser.parse(raw, where)
        # Numbered over the split, so that unnamed records of two files of one name differ.
        record_id = record['id'] or f'{os.path.basename(path)}:{len(split.records)}'
        split.records.append({**record, 'id': record_id})
        split.crc.append(zlib.crc32(raw))
        split.rows.append((number, offset + HEADER, len(raw)))
        try:
            split.pieces.append(
                record_messages.pieces_of_sequence_example(
                    raw,
                    parser.feature_names.get('frames', ''),
                    parser.feature_names.get('audio', ''),
                    parser.rate,
                )
            )
        except ValueError as e:
            raise DataError(f'{where}: {e}') from None


def _save_split(
    target: pathlib.Path,
    name: str,
    split: IndexedSplit,
    label_classes: dict[str, int | None],
    rate: int,
) -> dict[str, Any]:
    """Write the tables of one split; return its summary."""
    index_folder = indices.folder_of(target, name)
    with IndexWriter(index_folder, label_classes) as index_writer:
        for record, crc in zip(split.records, split.crc):
            index_writer.add(record, crc)
    second_bytes = 4 * rate  # float32
    with piece_tables.PiecesWriter(
        target, name, split.paths, second_bytes, piece_tables.SEQUENCE_EXAMPLE
    ) as pieces_writer:
        for row, pieces in zip(split.rows, split.pieces):
            pieces_writer.add(*row, pieces.frames, pieces.seconds)
    return indices.Index.open(index_folder).summary()


def _read_records(path: str, skipped: dict[str, str]) -> Iterator[tuple[int, bytes]]:
    """(where the record begins, its bytes), checksums compared, up to the first damage."""
    import tensorflow as tf

    with open(path, 'rb') as f:
        if f.read(2) == b'\x1f\x8b':  # gzip's magic number
            raise DataError(
                f'{path} is compressed (gzip), so its records cannot be reached one by one; '
                'unpack it first'
            )
    offset = 0
    try:
        for raw in tf.data.TFRecordDataset(path).as_numpy_iterator():
            yield offset, raw
            # TFRecordDataset says no offsets; a TFRecord is length, its crc, data, crc without
            # padding.
            offset += HEADER + len(raw) + FOOTER
    # TensorFlow's reader stops here: what follows in this file is not reached.
    except (tf.errors.DataLossError, tf.errors.OutOfRangeError) as e:
        # TensorFlow adds the name of its operation and a stack to the message.
        reason = str(e).splitlines()[0].split(' [Op')[0][:120]
        skipped[f'{path}, from byte {offset}'] = f'corrupt: {reason}'


class RecordParser:
    """Reads what DMVR records hold, and checks that all of them are laid out alike.

    Attributes:
      fps: of the stored frames.
      rate: of the stored samples.
      feature_names: {'frames', 'audio'} -> which of the possible features these records have.
      class_names: number of a class -> its name, as far as records name them.
    """

    def __init__(self, fps: float, rate: int):
        self.fps = fps
        self.rate = rate
        self.feature_names: dict[str, str] = {}
        self.class_names: dict[int, str] = {}

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        """What one record holds, as `Index.from_records` takes it.

        Args:
          raw: a serialized SequenceExample.
          where: its place in the errors.

        Raises:
          DataError: the record is no SequenceExample, or not one of DMVR's, or laid out in another
            way than those before.
        """
        import tensorflow as tf

        try:
            # Another message may parse as well, unknown fields being passed over; then the features
            # that are looked up below are missing.
            example = tf.train.SequenceExample.FromString(raw)
        except Exception as e:  # the library's own kinds
            raise DataError(
                f'{where}: this is not a SequenceExample ({type(e).__name__}); '
                'are these DMVR records?'
            ) from None
        lists = example.feature_lists.feature_list
        context = example.context.feature

        frame_features = self._feature_list(lists, 'frames', FRAMES, where)
        # Encoded pictures, JPEG as a rule, one for each frame.
        frames = [f.bytes_list.value[0] for f in frame_features if f.bytes_list.value]
        audio_features = self._feature_list(lists, 'audio', AUDIO, where)
        # Meant to be samples in [-1, 1], in one piece (record_messages refuses several).
        sound = [np.asarray(f.float_list.value, np.float32) for f in audio_features]
        num_samples = sum(len(piece) for piece in sound)
        if not frames and not num_samples:
            present = ', '.join([*lists, *context]) or 'nothing'
            raise DataError(
                f'{where} has neither {FRAMES[0]} nor {" nor ".join(AUDIO)}; it has {present}'
            )
        if num_samples:
            loudest = max(float(np.abs(piece).max(initial=0)) for piece in sound)
            if not loudest <= _LOUDEST:  # written so that it holds for NaN too
                raise DataError(
                    f'{where}: its sound is not in [-1, 1]; were integers written as floats?'
                )
        height, width = _frame_shape(frames, where)
        labels = self._labels(context, where)
        duration = len(frames) / self.fps if frames else num_samples / self.rate  # seconds
        captions = [caption for caption in _strings(context, 'caption/string') if caption]
        # DMVR's captions have no times: each is of the whole clip.
        sentences = [{'text': text, 'start': 0.0, 'end': duration} for text in captions]
        # A DMVR record is a clip that was cut already, so it is one segment.
        segment = {
            'start': 0.0,
            'end': duration,
            'caption': captions[0] if captions else '',
            'labels': {},
        }
        return {
            'id': _clip_id(context),
            'frames': len(frames),
            'samples': num_samples,
            'height': height,
            'width': width,
            'duration': duration,
            'ground_truth': '{}',  # JSON of what else is known of a clip: nothing here
            'labelled': sorted(set(labels)),
            'sentences': sentences,
            'segments': [segment],
        }

    def _feature_list(
        self, lists: Mapping[str, Any], kind: str, possible: Sequence[str], where: str
    ) -> list[Any]:
        """The features of the first possible list that is there, the same in all records."""
        present = [name for name in possible if name in lists]
        if not present:
            return []
        # The index names one feature list for all records, by which they are read.
        known = self.feature_names.setdefault(kind, present[0])
        if known != present[0]:
            raise DataError(
                f'{where} has its {kind} in {present[0]!r}, records before in {known!r}; '
                'index them apart'
            )
        return list(lists[present[0]].feature)

    def _labels(self, context: Mapping[str, Any], where: str) -> list[int]:
        """Numbers of the record's classes; their names are added to `class_names`."""
        for prefix in LABELS:  # the first that is there
            if f'{prefix}/index' not in context:
                continue
            labels = list(context[f'{prefix}/index'].int64_list.value)
            for label, text in zip(labels, _strings(context, f'{prefix}/text')):
                known = self.class_names.setdefault(label, text)
                if known != text:
                    raise DataError(f'{where}: label {label} is {text!r} here and {known!r} before')
            for label in labels:
                self.class_names.setdefault(label, f'class {label}')
            return labels
        return []


def _strings(context: Mapping[str, Any], key: str) -> list[str]:
    if key not in context:
        return []
    return [value.decode('utf-8', 'replace') for value in context[key].bytes_list.value]


def _seconds(context: Mapping[str, Any], key: str) -> float | None:
    """A timestamp, which DMVR stores in microseconds; None if the record has none."""
    if key not in context or not context[key].int64_list.value:
        return None
    return context[key].int64_list.value[0] / 1e6


def _frame_shape(frames: Sequence[bytes], where: str) -> tuple[int, int]:
    """(height, width) of the first frame, (0, 0) without frames."""
    from PIL import Image

    if not frames:
        return 0, 0
    try:
        # PIL reads the header alone here. Frames of one record have one size.
        width, height = Image.open(io.BytesIO(frames[0])).size
    except OSError:
        raise DataError(f'{where}: its first frame is no image') from None
    return height, width


def _clip_id(context: Mapping[str, Any]) -> str:
    """File and times of the clip, '' if the record does not name its file."""
    file = ''
    for key in ('video/filename', 'clip/media_id', 'clip/data_path'):
        file = ''.join(_strings(context, key))
        if _strings(context, key):
            break  # also with an empty name: the fields behind are for records without this one
    start = _seconds(context, 'clip/start/timestamp')
    end = _seconds(context, 'clip/end/timestamp')
    if file and start is not None and end is not None:
        return f'{file}@{start:g}-{end:g}'
    return file


def _number_labels(
    records: list[dict[str, Any]], class_names: dict[int, str]
) -> dict[str, int | None]:
    """Give each record's segment its label `class`.

    Returns:
      {label: number of classes if some record has several, else None}.
    """
    if not class_names:
        return {}
    num_classes = max(class_names) + 1
    # One record with several classes makes the label multi-hot for all, as arrays of one shape.
    is_multi_hot = any(len(record['labelled']) > 1 for record in records)
    for record in records:
        labelled = record['labelled']
        value: int | list[int] = -1  # unknown
        if is_multi_hot:
            value = [int(i in labelled) for i in range(num_classes)]
        elif labelled:
            value = labelled[0]
        record['segments'][0]['labels']['class'] = value
    return {'class': num_classes if is_multi_hot else None}


def _check_rates(records: list[dict[str, Any]], fps: float, rate: int) -> None:
    """Frames and sound of a record must last about equally long, or fps or rate is wrong."""
    with_both = [record for record in records if record['samples'] and record['frames']]
    # Seconds of sound over seconds of frames.
    ratios = [r['samples'] / rate / (r['frames'] / fps) for r in with_both]
    # The median: single records may lack the end of their sound.
    if ratios and not 0.8 < np.median(ratios) < 1.25:
        frames, samples = with_both[0]['frames'], with_both[0]['samples']
        raise DataError(
            f'--fps={fps:g} and --rate={rate} cannot both be right: a record has {frames} frames '
            f'({frames / fps:.2f} s) and {samples} samples ({samples / rate:.2f} s)'
        )


def main(arguments: list[str] | None = None) -> int:
    use_plain_characters()
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.dmvr',
        allow_abbrev=False,
        description='An index for existing DMVR records, which are then read as they are '
        '(docs/data.md).',
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
        arguments = expand_home(sys.argv[1:] if arguments is None else arguments)
        index(**vars(parser.parse_args(arguments)))
    except (DataError, extras.MissingExtra) as e:
        print(f'error: {printable(str(e))}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
