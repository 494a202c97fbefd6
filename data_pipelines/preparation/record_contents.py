"""What is known about each decoded file: its times, sentences, segments, labels and split."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files
from data_pipelines.preparation.media_catalog import MediaCatalog
from data_pipelines.storage import record_index
from data_pipelines.storage.records import CLIPS, SPLITS

# Names that first-level folders may have -> the split that their files are in.
_SPLIT_FOLDERS = {
    'train': 'train',
    'validation': 'validation',
    'val': 'validation',
    'valid': 'validation',
    'test': 'test',
}
# Records that a split of anyone's folder has at least, where there are enough files.
_LEAST_RECORDS = 2


def make_record(
    file: decoded_files.File, header: Mapping[str, Any], catalog: MediaCatalog
) -> dict[str, Any]:
    """Join what was decoded of a file with what its annotations say.

    Times are cut to the record, and entries that begin behind its end are dropped. A record without
    segments gets one that spans it. Without sentences, the captions of its segments are used.

    Args:
        file: the media file.
        header: of its staged file.
        catalog: captions and annotations of all files.

    Returns:
        The fields of `record_index.Index`, still without the split.
    """
    # Of what was decoded; what the container declares may be longer.
    duration = header['duration']
    annotation = catalog.annotations.get(file.id) or {}
    segments = _cut_to(duration, annotation.get('segments') or [])
    if not segments:
        # Evaluation goes by segments, so a record without one would never be evaluated.
        segments = [{'start': 0.0, 'end': duration, 'caption': '', 'labels': {}}]

    sentences = _cut_to(duration, catalog.sentences.get(file.id) or [])
    if not sentences:
        sentences = [
            {'text': segment['caption'], 'start': segment['start'], 'end': segment['end']}
            for segment in segments
            if segment['caption']
        ]
    # The index promises the sentences of a record in the order of their start times.
    sentences.sort(key=lambda sentence: (sentence['start'], sentence['end']))

    return {
        'id': file.id,
        'frames': len(header['lengths']),
        'samples': header['samples'],
        'height': header['height'],
        'width': header['width'],
        'duration': duration,
        'sentences': sentences,
        'segments': [_with_all_labels(segment, catalog.multi_hot) for segment in segments],
        'ground_truth': annotation.get('ground_truth', {}),
    }


def _cut_to(duration: float, entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the entries that begin within the record, ending with it at the latest."""
    return [
        # An entry without times ends at infinity, which becomes the end of the record here.
        {**entry, 'end': min(entry['end'], duration)}
        for entry in entries
        if entry['start'] < duration
    ]


def remark_on_late_sentences(
    records: Iterable[Mapping[str, Any]], catalog: MediaCatalog
) -> list[str]:
    """Say how many sentences begin behind the end of their file: their times may be milliseconds.

    Args:
        records: as of `make_record`.
        catalog: what was given.

    Returns:
        A sentence for the user, or none.
    """
    num_late = 0
    num_given = 0
    example = ''
    for record in records:
        starts = [sentence['start'] for sentence in catalog.sentences.get(record['id']) or []]
        late = [start for start in starts if start >= record['duration']]
        num_given += len(starts)
        num_late += len(late)
        if late and not example:
            example = f'{record["id"]} ({late[0]:g} s of {record["duration"]:g} s)'
    if not num_late:
        return []
    return [
        f'{num_late} of {num_given} sentences begin behind the end of their file and are left out, '
        f'for example in {example}; times are expected in seconds'
    ]


def _with_all_labels(
    segment: Mapping[str, Any], multi_hot: Mapping[str, int | None]
) -> dict[str, Any]:
    """The segment with a value for every label of the dataset; -1 where it is unknown."""
    labels = {}
    for name, num_classes in multi_hot.items():
        # Every segment has every label, because labels are stored as columns.
        value = segment['labels'].get(name, -1)
        labels[name] = value if num_classes is None else _to_multi_hot(value, num_classes)
    return {**segment, 'labels': labels}


def _to_multi_hot(value: int | list[int], num_classes: int) -> list[int]:
    classes = value if isinstance(value, list) else [value]
    # -1 (unknown) is no class: a row of zeros.
    return [int(i in classes) for i in range(num_classes)]


def assign_splits(
    records: Iterable[dict[str, Any]],
    catalog: MediaCatalog,
    by_folder: bool,
    validation: float,
    test: float,
) -> list[str]:
    """Give each record its split, in place, and turn its ground truth into JSON.

    Args:
        records: as of `make_record`.
        catalog: official splits or folds, if the dataset has any.
        by_folder: whether first-level folders say the split.
        validation: share of the files, where nothing else says it.
        test: share of the files, likewise.

    Returns:
        Sentences for the user: what the shares alone would not have done, or could not do.
    """
    records = list(records)
    for record in records:
        official = catalog.splits.get(record['id'])
        if catalog.folds:
            # One pool of clips; each fold divides it in its own way.
            assert official is not None
            # Stored once, not once for each fold.
            record['split'] = CLIPS
            record['folds'] = [SPLITS.index(split) if split else -1 for split in official]
            record['ground_truth'] = {**record['ground_truth'], 'folds': list(official)}
        elif official:
            record['split'] = official
        else:
            record['split'] = split_of(record['id'], by_folder, validation, test)
        # Last: the folds above are added to it.
        record['ground_truth'] = json.dumps(record['ground_truth'])
    if catalog.splits or by_folder:
        return []
    return _fill_small_splits(records, {'test': test, 'validation': validation})


def _fill_small_splits(records: Sequence[dict[str, Any]], shares: Mapping[str, float]) -> list[str]:
    """Move records of `train` into splits that have a share and, by chance, hardly a record.

    Of a dozen files, a twentieth is none, and retrieval among one clip says nothing.

    Args:
        records: with the splits of their hashes; changed in place.
        shares: split -> share of the files.

    Returns:
        A sentence for each such split.
    """
    # Most files are for training, however few there are.
    least = min(_LEAST_RECORDS, len(records) // 3)
    remarks = []
    if not any(record['split'] == 'train' for record in records):
        # A single file, as a first try has it.
        for record in records:
            record['split'] = 'train'
    for split, share in shares.items():
        if not share:
            continue
        num_records = sum(record['split'] == split for record in records)
        if not num_records and not least:
            remarks.append(
                f'the split {split} is empty: {len(records)} files are too few to divide; '
                'evaluation needs more, or a folder of their own (docs/data.md)'
            )
        training = [record for record in records if record['split'] == 'train']
        # Those that a slightly larger share would have taken.
        training.sort(key=lambda record: _position(record['id']))
        moved = training[: max(0, least - num_records)]
        for record in moved:
            record['split'] = split
        if moved:
            remarks.append(
                f'the share {share:g} of {len(records)} files leaves {num_records} in the split '
                f'{split}; also in it: {", ".join(record["id"] for record in moved)}'
            )
    return remarks


def has_split_folders(files: Iterable[decoded_files.File]) -> bool:
    """Whether any file is below a first-level folder named like a split."""
    for file in files:
        folder, slash, _ = file.id.partition('/')
        # Without a slash it is a file that lies at the top.
        if slash and folder.lower() in _SPLIT_FOLDERS:
            return True
    return False


def split_of(file_id: str, by_folder: bool, validation: float, test: float) -> str:
    """The split of a file that no annotation assigns to one.

    Args:
        file_id: path of the file below the folder.
        by_folder: whether first-level folders say the split; files elsewhere are for training.
        validation: share of the files, if folders do not say it.
        test: likewise.
    """
    if by_folder:
        folder, slash, _ = file_id.partition('/')
        return _SPLIT_FOLDERS.get(folder.lower(), 'train') if slash else 'train'
    position = _position(file_id)
    # Test first: a larger share for validation leaves the test set as it is.
    if position < test:
        return 'test'
    if position < test + validation:
        return 'validation'
    return 'train'


def tokenizer_modules(kind: str) -> tuple[str, ...]:
    """Optional modules that train a kind of tokenizer, to be looked for before long work."""
    return {'wordpiece': ('tokenizers',), 'sentencepiece': ('sentencepiece',)}.get(kind, ())


def _position(file_id: str) -> float:
    """A random number of a file, uniform in [0, 1)."""
    # A hash of the name alone: files added later leave the earlier ones in their splits.
    # sha256, as Python's hash() of a string differs from run to run.
    digest = hashlib.sha256(file_id.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64


def train_tokenizer(
    records: Sequence[Mapping[str, Any]], kind: str, size: int, stage_dir: pathlib.Path
) -> None:
    """Train a tokenizer on the text of the training split and write `tokenizer.json`.

    Args:
        records: with their splits.
        kind: words, wordpiece or sentencepiece.
        size: of the vocabulary, at most.
        stage_dir: folder of the file.

    Raises:
        DataError: if the tokenizer cannot be trained, with the reason.
    """
    # Imported here: a tokenizer may bring libraries that decoding does without.
    from vatt_jax.inputs import tokenizer as tokenizers

    # Words of validation and test must not enter the vocabulary.
    training = [record for record in records if record['split'] == 'train']
    texts = []
    for record in training:
        texts += [sentence['text'] for sentence in record['sentences']]
    # All sentences before all captions: a trainer may depend on the order of its texts.
    for record in training:
        texts += [segment['caption'] for segment in record['segments'] if segment['caption']]
    try:
        tokenizer = tokenizers.train(kind, texts, size)
    # Too few texts for the size, a library that is not installed, an error inside one.
    except (ValueError, ImportError, RuntimeError) as error:
        raise DataError(f'--tokenizer={kind}: {error}') from None
    record_index.write_json(stage_dir / 'tokenizer.json', tokenizer.to_spec())
