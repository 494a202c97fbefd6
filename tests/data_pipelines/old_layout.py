"""A prepared folder in the layout of version 1, written with NumPy alone.

`tests/data/dataset_of_version_1.tar.gz` was written by the code of that version (commit 070bd9e);
this is for datasets that are not worth an archive: DMVR records, folds.
"""

import json
import shutil
import zlib

import numpy as np

from data_pipelines.storage import record_index
from data_pipelines.storage.records import Prepared, Split


def write_index(path, index):
    """index-SPLIT.npz of an index."""
    arrays = {}
    for name in (*record_index.NUMBERS, *record_index.OFFSETS):
        arrays[name] = getattr(index, name)
    for name in record_index.TEXTS:
        encoded = [text.encode() for text in getattr(index, name)]
        arrays[f'{name}/data'] = np.frombuffer(b''.join(encoded), np.uint8)
        arrays[f'{name}/offsets'] = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    for name, values in index.labels.items():
        arrays[f'labels/{name}'] = values
    if index.folds is not None:
        arrays['folds'] = index.folds
    np.savez(path, **arrays)


def write_pieces(folder, split, prepared, index):
    """places-SPLIT.npz and pieces-SPLIT.npy, with checksums of what the records hold."""
    tables = prepared.tables(split, index)
    opened = prepared.pieces(split, index)
    places = np.array([tables.place(i) for i in range(len(index))], np.int64).reshape(-1, 3)
    rows = []
    for i in range(len(index)):
        record = opened[i]
        seconds = -(-int(index.samples[i]) // prepared.meta['rate'])
        for offset, size, _ in tables.pieces(i, range(index.frames[i]), range(seconds)):
            rows.append((offset, size, zlib.crc32(record[offset : offset + size])))
    np.save(folder / f'pieces-{split}.npy', np.array(rows, np.uint32).reshape(-1, 3))
    np.savez(
        folder / f'places-{split}.npz',
        shard=places[:, 0].astype(np.int32),
        offset=places[:, 1],
        length=places[:, 2],
        bytes=tables.file_sizes,
    )


def as_version_1(new, old):
    """Copy a prepared folder, in the layout of version 1."""
    shutil.copytree(new, old, ignore=shutil.ignore_patterns('index-*', 'pieces-*'))
    prepared = Prepared(new)
    for split in prepared.meta['splits']:
        index = prepared.index(split)
        write_index(old / f'index-{split}.npz', index)
        write_pieces(old, split, prepared, index)
    meta = json.loads((old / 'index.json').read_text())
    (old / 'index.json').write_text(json.dumps({**meta, 'version': 1}))
    finished = json.loads((old / 'prepare.json').read_text())
    if 'files' in finished:
        finished['files'] = sorted(path.name for path in old.iterdir() if path.is_file())
        (old / 'prepare.json').write_text(json.dumps(finished))


def contents(folder, split, fold=0):
    """All that a split says of its records, and all bytes of them, as plain Python."""
    opened = Split(Prepared(folder, fold), split)
    index = opened.index
    found = {name: getattr(index, name).tolist() for name in record_index.NUMBERS}
    found |= {name: getattr(index, name).tolist() for name in record_index.OFFSETS}
    found |= {name: list(getattr(index, name)) for name in record_index.TEXTS}
    found['labels'] = {name: values.tolist() for name, values in index.labels.items()}
    found['dtypes'] = {name: values.dtype for name, values in index.labels.items()}
    found['folds'] = None if index.folds is None else index.folds.tolist()
    found['max_captions'] = index.max_captions
    records, reasons = opened.read(np.arange(len(opened)))
    assert not any(reasons)
    found['records'] = records
    rate = opened.prepared.meta['rate']
    for i in range(len(opened)):
        seconds = -(-int(index.samples[i]) // rate)
        found[f'pieces {i}'] = opened.clip(i, range(index.frames[i]), range(seconds))
    return found
