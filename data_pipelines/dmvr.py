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
import contextlib
import glob
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Before TensorFlow is imported, which reads it once: its notices would drown the messages.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from data_pipelines.errors import DataError
from data_pipelines.preparation.console import Console
from data_pipelines.preparation.dmvr_records import RecordParser
from data_pipelines.storage.columns import write_json
from data_pipelines.storage.record_index import VERSION, Index
from data_pipelines.storage.records import SPLITS
from vatt_jax import extras
from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError, fail
from vatt_jax.object_store import check_local
from vatt_jax.terminal import printable, use_plain_characters

try:
    # All of these import the reader of media files, whose packages are an extra.
    from data_pipelines.preparation import arguments, decoded_files, dmvr_split, record_contents
except extras.MissingExtra as error:
    # A program that imports this file gets the exception.
    if __name__ == '__main__':
        fail(str(error))
    raise


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
    check_local(out, '--out')
    target = pathlib.Path(out)
    name = name or arguments.dataset_name(target)
    # Of the settings only fps and rate matter here; the others pass the check.
    settings = decoded_files.Settings(float(fps), 256, int(rate), 90, 0.0)
    arguments.check_arguments(settings, name, vocabulary, 0.0, 0.0, 1)
    # Wrong arguments are refused before the folder is touched.
    paths = _find_files({'train': train, 'validation': validation, 'test': test})
    # Before the records are read, which may take hours.
    modules = ('tensorflow', *record_contents.tokenizer_modules(tokenizer))
    extras.check('reading DMVR records', *modules)
    _make_target(target, overwrite)

    parser = RecordParser(fps, rate)
    skipped: dict[str, str] = {}
    staging = target / '.staging'
    indices = _read_splits(paths, parser, staging, skipped, say)
    # The records agree with each other and with fps and rate: from here on files are written.
    _train_tokenizer(indices.get('train'), tokenizer, vocabulary, staging / 'tokenizer.json')
    # Renames: each table is there whole or not at all.
    for entry in list(staging.iterdir()):
        os.replace(entry, target / entry.name)

    split_summaries = {split: found.summary() for split, found in indices.items()}
    summary: dict[str, Any] = {'splits': split_summaries, 'skipped': skipped}
    write_json(target / 'skipped.json', skipped)
    description = {'version': VERSION, 'name': name, 'splits': split_summaries}
    write_json(target / 'index.json', {**description, **_contents(parser, paths)})
    # Last: a folder with this file is complete.
    write_json(target / 'prepare.json', {'summary': summary})
    shutil.rmtree(staging)
    say.summary(target, {**summary, 'seconds': 0}, [])
    return summary


def _read_splits(
    paths: Mapping[str, Sequence[str]],
    parser: RecordParser,
    staging: pathlib.Path,
    skipped: dict[str, str],
    say: Console,
) -> dict[str, Index]:
    """Read all records and write the tables of the splits.

    Args:
      paths: the files of each split.
      parser: reads the records.
      staging: folder of the tables.
      skipped: place -> reason, of what cannot be read; filled here.
      say: prints.

    Returns:
      The indices of the splits that have records.

    Raises:
      DataError: no record can be read, or fps and rate contradict the records.
    """
    with contextlib.ExitStack() as unfinished:
        writers = {}
        for split, files in paths.items():
            writer = dmvr_split.SplitWriter(staging, split, files, parser)
            writers[split] = unfinished.enter_context(writer)
            for number, path in enumerate(files):
                say(f'{path} …')
                writer.add_file(number, path, skipped)
        if not any(writer.num_records for writer in writers.values()):
            first_skipped = next(iter(skipped.items()), 'the files are empty')
            raise DataError(f'no record can be read ({first_skipped})')
        parser.check_rates()
        # Only now is it known whether a record has several classes, and how many there are.
        indices = {}
        for split, writer in writers.items():
            if writer.num_records:
                indices[split] = writer.close()
    return indices


def _train_tokenizer(training: Index | None, kind: str, size: int, path: pathlib.Path) -> None:
    """Train a tokenizer on the captions of the split train, and write its file."""
    # Imported here: a tokenizer may bring libraries that nothing else needs.
    from vatt_jax.inputs import tokenizer as tokenizers

    sentences: Sequence[str] = [] if training is None else training.sentence_text
    captions: Sequence[str] = [] if training is None else training.segment_caption
    try:
        # Iterators: together the texts may be larger than the memory.
        tokenizer = tokenizers.train(kind, itertools.chain(sentences, captions), size)
    # Too few texts for the size, a library that is not installed, an error inside one.
    except (ValueError, ImportError, RuntimeError) as e:
        raise DataError(f'--tokenizer={kind}: {e}') from None
    write_json(path, tokenizer.to_spec())


def _find_files(patterns: Mapping[str, str]) -> dict[str, list[str]]:
    """The files of every split for which a pattern is given; DataError where there are none."""
    paths = {}
    for split, pattern in patterns.items():
        if pattern:
            # glob returns files in the file system's order, which differs between machines.
            paths[split] = sorted(glob.glob(pattern))
    if not paths:
        raise DataError(
            "no records are named: give --train='FOLDER/train-*', and --validation and --test "
            'if there are any'
        )
    for split, files in paths.items():
        if not files:
            raise DataError(f'no file matches --{split}={patterns[split]}')
    return paths


def _contents(parser: RecordParser, paths: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What index.json says of the records that were parsed, in the files of each split."""
    stored_files = {}
    for split, files in paths.items():
        # The records stay where they are.
        stored_files[split] = [[os.path.abspath(path), os.path.getsize(path)] for path in files]
    return {
        'fps': float(parser.fps),
        'size': parser.short_side,
        'rate': int(parser.rate),
        'labels': parser.labels(),
        'multi_hot': ['class'] if parser.is_multi_hot else [],
        'folds': [],  # DMVR records have none
        'format': {'kind': 'dmvr', **parser.feature_names},
        'files': stored_files,
    }


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
    parser.add_argument('--tokenizer', default='words', choices=record_contents.TOKENIZERS)
    parser.add_argument('--overwrite', action='store_true', help='replace an index')
    parser.add_argument('--quiet', action='store_true', help='print errors only')
    try:
        arguments = expand_home(sys.argv[1:] if arguments is None else arguments)
        index(**vars(parser.parse_args(arguments)))
    except (DataError, ConfigError) as e:
        print(f'error: {printable(str(e))}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
