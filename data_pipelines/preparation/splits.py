"""Which record is in which split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int8

from data_pipelines.preparation.decoded_files import File
from data_pipelines.storage.records import CLIPS, SPLITS

# All splits that may be stored; a record's is a position in this list.
STORED_SPLITS = (*SPLITS, CLIPS)
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


def assign(
    files: Sequence[File],
    official: Mapping[str, str | Sequence[str]],
    has_folds: bool,
    by_folder: bool,
    validation: float,
    test: float,
) -> tuple[Int8[np.ndarray, ' M'], list[str]]:
    """Find the split of each record.

    Args:
        files: of the records.
        official: file id -> split, or one for each fold; empty without official splits.
        has_folds: whether a record's split differs from fold to fold.
        by_folder: whether first-level folders say the split.
        validation: share of the files, where nothing else says it.
        test: share of the files, likewise.

    Returns:
        The number of each record's split in STORED_SPLITS, and sentences for the user: what the
        shares alone would not have done, or could not do.
    """
    splits = np.zeros(len(files), np.int8)
    if has_folds:
        # One pool of clips, stored once; each fold divides it in its own way.
        splits[:] = STORED_SPLITS.index(CLIPS)
        return splits, []
    for i, file in enumerate(files):
        split = official.get(file.id) or split_of(file.id, by_folder, validation, test)
        splits[i] = STORED_SPLITS.index(split)
    if official or by_folder:
        return splits, []
    return splits, _fill_small_splits(splits, files, {'test': test, 'validation': validation})


def _fill_small_splits(
    splits: Int8[np.ndarray, ' M'], files: Sequence[File], shares: Mapping[str, float]
) -> list[str]:
    """Move records of `train` into splits that have a share and, by chance, hardly a record.

    Of a dozen files, a twentieth is none, and retrieval among one clip says nothing.

    Args:
        splits: those of the files' hashes; changed in place.
        files: of the records.
        shares: split -> share of the files.

    Returns:
        A sentence for each such split.
    """
    # Most files are for training, however few there are.
    least = min(_LEAST_RECORDS, len(files) // 3)
    remarks = []
    training_number = STORED_SPLITS.index('train')
    if not (splits == training_number).any():
        # A single file, as a first try has it.
        splits[:] = training_number
    for split, share in shares.items():
        if not share:
            continue
        number = STORED_SPLITS.index(split)
        num_records = int((splits == number).sum())
        if not num_records and not least:
            remarks.append(
                f'the split {split} is empty: {len(files)} files are too few to divide; '
                'evaluation needs more, or a folder of their own (docs/data.md)'
            )
        if num_records >= least:
            continue
        # Those that a slightly larger share would have taken.
        training = np.flatnonzero(splits == training_number)
        positions = [_position(files[int(i)].id) for i in training]
        moved = training[np.argsort(positions, kind='stable')][: least - num_records]
        splits[moved] = number
        if len(moved):
            remarks.append(
                f'the share {share:g} of {len(files)} files leaves {num_records} in the split '
                f'{split}; also in it: {", ".join(files[int(i)].id for i in moved)}'
            )
    return remarks


def has_split_folders(files: Iterable[File]) -> bool:
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


def _position(file_id: str) -> float:
    """A random number of a file, uniform in [0, 1)."""
    # A hash of the name alone: files added later leave the earlier ones in their splits.
    # sha256, as Python's hash() of a string differs from run to run.
    digest = hashlib.sha256(file_id.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64
