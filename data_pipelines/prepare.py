"""A folder of media files with captions, or a named dataset -> a tfds dataset in ArrayRecord.

    python -m data_pipelines.prepare --videos=my_videos --captions=captions.csv --out=data/mine
    python -m data_pipelines.prepare --dataset=ucf101 --manual_dir=FOLDER --out=data/ucf101/records

This is done once, offline; training reads the result. The command can be killed at any moment and
started again: each decoded file stays until the dataset is whole. A file that cannot be used is
skipped with its reason and never stops the others. What goes in and what comes out is described in
docs/data.md and docs/datasets.md.

The parts, in the order in which they run (all below data_pipelines/preparation):

    media_catalog     which files there are and what their annotations say, kept in a store on disk
    staging           decodes every file, by decoded_files, into a staging folder
    splits            says which record is in which split
    record_contents   joins decoded files with their annotations
    writing           writes the records, reads them back and publishes the dataset
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import sqlite3
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64

from data_pipelines.errors import DataError
from data_pipelines.preparation.console import Console
from data_pipelines.preparation.store import Store
from data_pipelines.storage import columns, record_index
from vatt_jax import extras
from vatt_jax.command_line import expand_home
from vatt_jax.config import fail
from vatt_jax.object_store import StoreError
from vatt_jax.terminal import printable, use_plain_characters

try:
    # All of these import the reader of media files, whose packages are an extra.
    from data_pipelines.datasets import named
    from data_pipelines.preparation import (
        arguments,
        decoded_files,
        media_catalog,
        record_contents,
        remote_output,
        splits,
        staging,
        target_folder,
        training_command,
        writing,
    )
except extras.MissingExtra as error:
    # A program that imports this file gets the exception.
    if __name__ == '__main__':
        fail(str(error))
    raise

# Modules that write records.
_WRITERS = ('tensorflow', 'tensorflow_datasets', 'array_record')
# Written last: a folder without it is unfinished.
_FINISHED_FILE = 'prepare.json'
# Arguments of `prepare` that are paths.
_PATHS = ('videos', 'captions', 'out', 'annotations', 'manual_dir')
# Error numbers of a disk that takes no more: full, over the user's quota, file too large.
_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Function = TypeVar('Function', bound=Callable[..., Any])


def _explain_full_disk(function: Function) -> Function:
    """Decorator: turns the errors of a full disk into a DataError."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (OSError, RuntimeError, sqlite3.OperationalError) as error:
            cause = _full_disk_cause(error)
            if cause is None:
                raise
            raise DataError(
                f'writing the dataset failed: {cause}; decoded files stay where they are, so make '
                'room and start the same command again'
            ) from error

    return call  # type: ignore[return-value]  # functools.wraps keeps the signature


def _full_disk_cause(error: Exception) -> str | None:
    """The system's words for a full disk, if this is what the error is about."""
    if getattr(error, 'sqlite_errorcode', None) == sqlite3.SQLITE_FULL:
        return str(error)
    for number in _FULL_DISK_ERRORS:
        # In the system's own words, which the library passes on.
        message = os.strerror(number)
        # The library that writes ArrayRecord raises a RuntimeError with the message alone.
        if getattr(error, 'errno', None) == number or message in str(error):
            return message
    return None


def _with_paths(function: Function) -> Function:
    """Decorator: paths are what the command would make of them, and no other call writes to `out`.

    Notebooks have no shell that knows `~`, and scripts pass pathlib's paths.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name in _PATHS:
            if name in bound.arguments:
                bound.arguments[name] = arguments.path_argument(name, bound.arguments[name])
        with target_folder.only_writer(bound.arguments.get('out', '')):
            return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]  # functools.wraps keeps the signature


@_explain_full_disk
@remote_output.uploaded
@_with_paths
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
    flow: str = '',
    resize: str = 'area',
    processes: int = 2,
    min_seconds: float | None = None,
    name: str = '',
    vocabulary: int = 65536,
    tokenizer: str = 'words',
    encoding: str = '',
    validation: float = 0.05,
    test: float = 0.05,
    require_audio: bool = False,
    beam: str = '',
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Prepare a folder of media files, or a named dataset, for training.

    Args:
        videos: folder of media files; with `dataset`, where its media are if they are not below
            `manual_dir`.
        captions: file of captions (CSV, JSON, JSON Lines), or a folder of subtitle files; '' for
            the subtitle files beside the videos, if there are any; 'none' for no captions.
        out: folder of the result, new or of an earlier run; a URL (s3://…, gs://…) is prepared in
            the cache folder and then uploaded.
        annotations: JSON or CSV file of labels, segments and ground truth, '' for none.
        dataset: name of a named dataset, instead of captions and annotations.
        manual_dir: folder with the files of the named dataset.
        fps: stored frames per second.
        size: short side of stored frames, in pixels.
        rate: stored audio samples per second.
        quality: of JPEG, 1 to 100.
        store: 'jpeg', or 'h264' for short pieces of video.
        crf: quality of h264, 1 (best) to 51.
        flow: method of optical flow between the stored frames, 'dis' or 'tvl1'; '' for none.
        resize: how image files are scaled, 'area' or 'bicubic'.
        processes: number of files decoded side by side.
        min_seconds: shorter files are skipped; None means 1, and 0 for named datasets.
        name: of the result; '' derives it from `out`.
        vocabulary: size of the vocabulary, at most.
        tokenizer: kind of tokenizer.
        encoding: of text files that are neither UTF-8 nor UTF-16, '' to refuse them.
        validation: share of the files, where nothing else says the split.
        test: likewise.
        require_audio: whether videos without sound are skipped.
        beam: options of an Apache Beam pipeline that decodes; '' for worker processes.
        overwrite: whether a dataset that was prepared differently is replaced.
        quiet: whether only errors are printed.

    Returns:
        A dict with the entries
        'splits': {split: {'records', 'segments', 'sentences', 'hours', 'without_audio',
            'without_video'}}; a dataset with folds has the one split `clips`,
        'folds': [{split: number of records}], only of a dataset with folds,
        'skipped': {file: reason},
        'labels': {label: class names},
        'seconds': how long it took,
        'fresh': False if everything was there already.

    Raises:
        DataError: with one sentence that says what to mend.
    """
    start_time = time.monotonic()
    console = Console(quiet)
    _check_sources(videos, captions, annotations, out, dataset)
    target = pathlib.Path(out)
    # Inside the target: on the same file system, so that finished files move by a rename; and
    # hidden, so that a later scan for media files does not enter it.
    stage_dir = target / '.staging'
    if min_seconds is None:
        # Clips of a named dataset are all meant to be used, however short.
        min_seconds = 0.0 if dataset else 1.0
    # Converted, because these values are hashed as JSON: 10 and 10.0 would make two keys.
    settings = decoded_files.Settings(
        fps=float(fps),
        size=int(size),
        rate=int(rate),
        quality=int(quality),
        min_seconds=float(min_seconds),
        crf=arguments.stored_crf(store, crf),
        flow=arguments.flow_method(flow),
        resize=arguments.resize_method(resize),
    )
    name = name or arguments.dataset_name(target)
    arguments.check_arguments(settings, name, vocabulary, validation, test, processes)

    # All that decides what comes out: a folder that was prepared from the same is left as it is.
    identity = {
        # Neither `processes` nor `beam`: they change how fast it is done, not what comes out.
        'settings': settings.words(),
        'name': name,
        'vocabulary': vocabulary,
        'tokenizer': tokenizer,
        'validation': validation,
        'test': test,
        'require_audio': require_audio,
    }
    _check_is_ours(target)
    # On the disk that has room for the dataset: captions may take as much as all of them. Where
    # nothing can be written, there is nothing left to do, or the error that follows says so.
    catalog_folder = target if os.access(target, os.W_OK) else ''
    with contextlib.closing(Store(catalog_folder)) as catalog_store:
        if dataset:
            # From here on, a named dataset and anyone's folder are the same.
            catalog = named.read(dataset, manual_dir, videos, encoding, catalog_store)
        else:
            catalog = media_catalog.from_folder(
                videos, captions, annotations, encoding, catalog_store
            )
        for remark in catalog.remarks:
            console(remark)
        # A file that was added, removed or changed makes another dataset.
        identity |= {**catalog.identity, 'files': _digest_of_files(catalog.files, settings)}
        # Before anything is decoded, which may take days.
        finished = _finished_run(target, identity, overwrite)
        if finished:
            # Left behind if the last run was killed at its very end.
            shutil.rmtree(stage_dir, ignore_errors=True)
            place = remote_output.place_of(target)
            console(
                f'{place} is already prepared from these files with these settings; nothing to do.'
            )
            return {**finished['summary'], 'fresh': False}

        # Likewise: these are imported only when all files are decoded.
        extras.check('writing records', *_WRITERS, *record_contents.tokenizer_modules(tokenizer))
        target_folder.make(stage_dir)
        # Skips what an earlier run has staged already: this is the step that resumes.
        staging.stage_all(catalog.files, settings, stage_dir, processes, console, beam)

        skipped = dict(catalog.skipped)
        if dataset:
            skipped |= dict.fromkeys(catalog.missing, 'missing: no such file')
        usable = _usable_files(catalog.files, settings, stage_dir, require_audio, skipped)
        if not len(usable):
            raise _nothing_left(target, videos or manual_dir, skipped)
        records = record_contents.Records(catalog, usable, settings, stage_dir)
        for remark in record_contents.remark_on_late_sentences(records, catalog):
            console(remark)
        # Splits first: the tokenizer sees the text of the training split only.
        records.splits, remarks = splits.assign(
            records.files,
            catalog.splits,
            catalog.folds > 0,
            # Decided by all files, not by the usable ones: a file that is skipped does not change
            # the split of another.
            not dataset and splits.has_split_folders(catalog.files),
            validation,
            test,
        )
        for remark in remarks:
            console(remark)
        record_contents.train_tokenizer(records, tokenizer, vocabulary, stage_dir)

        console(f'writing {len(records)} records …')
        # Below the staging folder, and moved once it is whole.
        produced = writing.write_dataset(records, stage_dir, name, catalog.multi_hot)
        summary = writing.publish(produced, stage_dir, target, name, catalog, records, skipped)
    summary['seconds'] = round(time.monotonic() - start_time, 1)
    # The commit point: with this file, the dataset counts as whole. A run that is killed earlier
    # repeats everything after decoding.
    record_index.write_json(
        target / _FINISHED_FILE,
        {
            'identity': identity,
            # What --overwrite may delete, so that it never touches files of somebody else.
            'files': _written_files(target),
            'summary': summary,
        },
    )
    shutil.rmtree(stage_dir, ignore_errors=True)

    # Missing clips of a named dataset are in the table of skipped files already.
    place = remote_output.place_of(target)
    console.summary(place, summary, [] if dataset else catalog.missing)
    command = training_command.training_command(place, name, settings, tokenizer, summary)
    console(f'Train on it: {command}')
    if catalog.unused:
        console(f'{catalog.unused} media files are in no annotation file and were not used.')
    return {**summary, 'fresh': True}


def _usable_files(
    files: Iterable[decoded_files.File],
    settings: decoded_files.Settings,
    stage_dir: pathlib.Path,
    require_audio: bool,
    skipped: dict[str, str],
) -> Int64[np.ndarray, ' M']:
    """Numbers of the files that become records; the reasons of the others go into `skipped`."""
    usable = array.array('q')
    for number, file in enumerate(files):
        header = decoded_files.header(decoded_files.staged_path(stage_dir, file, settings))
        if header.get('skipped'):
            skipped[file.id] = header['skipped']
        elif require_audio and not header['samples']:
            skipped[file.id] = 'no audio'
        else:
            usable.append(number)
    return np.array(usable, np.int64)


def _nothing_left(target: pathlib.Path, folder: str, skipped: Mapping[str, str]) -> DataError:
    """The error of a dataset without records; its reasons survive it in `skipped.json`."""
    record_index.write_json(target / 'skipped.json', skipped)
    example, reason = next(iter(skipped.items()))
    return DataError(
        f'all {len(skipped)} files below {folder} were skipped, for example '
        f'{example} ({reason}); see {target / "skipped.json"}'
    )


# ---- Checks of the arguments.


def _check_sources(videos: str, captions: str, annotations: str, out: str, dataset: str) -> None:
    if not out or not (dataset or videos):
        raise DataError('give --out, and --videos or --dataset with --manual_dir')
    # --videos stays allowed: the media may lie elsewhere than the annotation files.
    if dataset and (captions or annotations):
        raise DataError(
            f'--dataset={dataset} brings its own captions and annotations; '
            'leave --captions and --annotations out'
        )
    try:
        str(pathlib.Path(out).resolve()).encode()
    except UnicodeEncodeError:
        # Before anything is decoded: the library that writes the records would fail at the end.
        raise DataError(
            f'--out={out}: expected a path that is UTF-8 in this locale; name another folder'
        ) from None


# ---- Earlier runs into the same folder.


def _digest_of_files(files: Sequence[decoded_files.File], settings: decoded_files.Settings) -> str:
    keys = np.fromiter((file.key(settings) for file in files), 'S32', len(files))
    # Sorted, so that the order of the scan does not matter.
    keys.sort()
    digest = hashlib.sha256()
    for i, key in enumerate(keys):
        digest.update(b'\n' + key if i else key)
    return digest.hexdigest()


def is_finished(target: pathlib.Path) -> bool:
    """Whether `target` holds a whole dataset: the file that is written last is there."""
    return (target / _FINISHED_FILE).is_file()


def _check_is_ours(target: pathlib.Path) -> None:
    """Raise DataError if `target` holds something that must not be replaced."""
    if target.exists() and not target.is_dir():
        raise DataError(f'--out={target} is a file')
    is_own = is_finished(target) or (target / '.staging').exists()  # left by a killed run
    # `publish` deletes loose files in the target, so a folder that is not ours is refused here.
    if target.is_dir() and not is_own and any(target.iterdir()):
        raise DataError(f'--out={target} holds other files; choose a new or empty folder')


def _written_files(target: pathlib.Path) -> list[str]:
    """Names of the files and tables in `target`."""
    names = []
    for path in target.iterdir():
        if path.is_file() or columns.is_table(path):
            names.append(path.name)
    return sorted(names)


def _finished_run(
    target: pathlib.Path, identity: Mapping[str, Any], overwrite: bool
) -> dict[str, Any] | None:
    """What an earlier run left in `target` if it is exactly what is asked for, else None.

    With `overwrite`, the files of a run that was different are removed.

    Raises:
        DataError: if it is another dataset and `overwrite` is not given.
    """
    if not is_finished(target):
        return None
    finished = _read_finished(target)
    # Compared as JSON has it, where tuples are lists.
    identity = json.loads(json.dumps(identity))
    if finished['identity'] == identity:
        return finished
    if not overwrite:
        # Names of the arguments that differ, which are also the fields of the identity.
        changed = [
            field for field in identity if finished['identity'].get(field) != identity[field]
        ]
        raise DataError(
            f'{remote_output.place_of(target)} is already prepared with other '
            f'{" and ".join(changed)}; choose another --out, or pass --overwrite to replace it'
        )
    # This file goes first: without it the folder is unfinished, whatever happens next. The staging
    # folder marks it as one of ours.
    (target / _FINISHED_FILE).unlink()
    (target / '.staging').mkdir(exist_ok=True)
    for entry in finished['files']:
        path = target / entry
        if columns.is_table(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return None


def _read_finished(target: pathlib.Path) -> dict[str, Any]:
    """What the run that finished `target` noted about itself."""
    path = target / _FINISHED_FILE
    try:
        finished = json.loads(path.read_text(encoding='utf-8'))
        if {'identity', 'files', 'summary'} <= set(finished):
            return finished
    except (OSError, ValueError, TypeError):  # unreadable, no JSON, JSON of something else
        pass
    raise DataError(
        f'--out={target}: expected {_FINISHED_FILE} of an earlier run, got a file that is damaged '
        'or of another program; choose another --out'
    )


# ---- The command.


def _dataset_help(dataset: str) -> str:
    """What --help says of a named dataset; '' of any other name."""
    if dataset not in named.DATASETS:
        return ''
    title, text, files = named.get_dataset(dataset).page()
    return f'{title}\n\n{textwrap.indent(files, "  ")}\n\n{text}'


def _parser(dataset: str) -> argparse.ArgumentParser:
    """The command's flags.

    Args:
        dataset: named dataset that --help describes, '' for none.
    """
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.prepare',
        # `main` looks for --dataset by its full name.
        allow_abbrev=False,
        # Line breaks in the epilog are part of a table of files.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_dataset_help(dataset),
        description='Media files and captions, or a named dataset -> a dataset for training '
        '(docs/data.md, docs/datasets.md).',
    )
    add = parser.add_argument
    # What goes in and where it goes.
    add(
        '--videos',
        default='',
        help='folder of media files, searched through; with --dataset: where its media are, '
        'if not below --manual_dir',
    )
    add(
        '--captions',
        default='',
        help='CSV (video,start,end,text), JSON, JSON Lines or a folder of subtitle files; without '
        'it subtitle files beside the videos, else the captions of annotated segments; none: none',
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
    add(
        '--out',
        default='',
        help='folder or URL of the dataset, new or of an earlier run of this command',
    )
    add(
        '--annotations',
        default='',
        help='JSON (labels, segments, ground truth) or CSV (video,label)',
    )
    # How it is stored.
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
    add(
        '--flow',
        nargs='?',
        default='',
        const='dis',
        metavar='METHOD',
        help='optical flow between the stored frames as well, by dis (the default) or tvl1',
    )
    add(
        '--resize',
        default='area',
        choices=('area', 'bicubic'),
        help='how image files are scaled; bicubic: as published results of CLIP have it',
    )
    # How the work is done.
    add('--processes', type=int, default=2, help='files decoded side by side')
    add(
        '--beam',
        default='',
        metavar='OPTIONS',
        help="decode in an Apache Beam pipeline with these options: --beam='--runner=DirectRunner'",
    )
    # What is chosen, and how it is divided.
    add(
        '--min_seconds',
        type=float,
        default=None,
        help='shorter files are skipped; default: 1, of named datasets 0',
    )
    add('--name', default='', help='name of the dataset; default: from --out')
    add('--vocabulary', type=int, default=65536, help='size of the vocabulary, at most')
    add('--tokenizer', default='words', choices=record_contents.TOKENIZERS)
    add(
        '--encoding',
        default='',
        help='of captions and annotations that are neither UTF-8 nor UTF-16, such as cp1252',
    )
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
    return parser


def _named_dataset(arguments: list[str]) -> str:
    """The value of --dataset, written --dataset=NAME or --dataset NAME; '' without one."""
    for number, argument in enumerate(arguments):
        if argument.startswith('--dataset='):
            return argument.partition('=')[2]
        if argument == '--dataset':
            # The last argument has none behind it; the parser says so.
            return ''.join(arguments[number + 1 : number + 2])
    return ''


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    use_plain_characters()
    # --help depends on --dataset, so this flag is looked up before the others are parsed.
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = expand_home(arguments)
    parser = _parser(_named_dataset(arguments))
    try:
        # Flags are called like the arguments of `prepare`, one for one.
        prepare(**vars(parser.parse_args(arguments)))
    except (DataError, StoreError, extras.MissingExtra) as error:
        print(f'error: {printable(str(error))}', file=sys.stderr)
        return 2  # as argparse exits after a wrong flag
    except KeyboardInterrupt:
        print('stopped; the same command goes on from here', file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
    except OSError as error:
        # Of the machine, not of the arguments: a disk that is gone, a folder that was removed.
        print(f'error: {printable(str(error))}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
