"""Mixtures of hundreds of sources, each opened at its first record."""

import json
import shutil

import chex
import numpy as np
import pytest

import data_pipelines
from data_pipelines.errors import DataError
from data_pipelines.loading import lazy_split, records_source
from data_pipelines.storage import frame_shapes
from data_pipelines.storage.records import Prepared, Split

NUM_SOURCES = 300


@pytest.fixture
def mixture(config, prepared, tmp_path):
    """Config of 300 sources of 13 and of 5 records, each in a folder of its own."""
    config.data.train = {}
    for i in range(NUM_SOURCES):
        folder = tmp_path / f'{i:03d}'
        folder.symlink_to(prepared[0])
        split = 'test' if i % 3 else 'train'
        config.data.train[f's{i:03d}'] = {'path': str(folder), 'split': split, 'weight': 1 + i % 2}
    return config


@pytest.fixture
def opened(monkeypatch):
    """Names of the splits that were opened, in order."""
    names = []

    class Counted(Split):
        def __init__(self, prepared, split, name=''):
            names.append(name)
            super().__init__(prepared, split, name)

    monkeypatch.setattr(lazy_split, 'Split', Counted)
    return names


def test_sources_are_opened_when_their_records_come(mixture, opened, monkeypatch):
    data = data_pipelines.open(mixture)
    assert data.size('train') == 100 * 13 + 200 * 5
    assert data.info['sources'][299] == 's299'
    np.testing.assert_array_equal(np.diff(data.offsets('train')[:4]), [13, 5, 5])
    assert not opened
    iterator = data.train(0, 8)
    batches = [next(iterator) for _ in range(2)]
    data.close()
    occurred = {f's{i:03d}' for i in np.concatenate([batch['source'] for batch in batches])}
    assert occurred <= set(opened)
    # Those of the batches that are read ahead come too; never all, and none twice.
    assert len(opened) == len(set(opened)) < 100

    monkeypatch.setattr(records_source, 'OPENED_AT_ONCE', NUM_SOURCES)
    opened.clear()
    eager = data_pipelines.open(mixture)
    assert len(opened) == NUM_SOURCES
    iterator = eager.train(0, 8)
    chex.assert_trees_all_equal(batches, [next(iterator) for _ in range(2)])
    eager.close()


def test_a_pass_over_the_mixture_opens_one_source_after_another(mixture, opened):
    mixture.data.prefetch = 1
    data = data_pipelines.open(mixture)
    batches = data.one_pass('train', 13, by='records')
    batch = next(batches)
    assert batch['source'].tolist() == [0] * 13
    assert len(opened) < 20
    assert opened == sorted(opened)
    assert data.texts('train', 'records')[13 + 5]['id'].startswith('test/')
    assert opened.count('s002') == 1
    data.close()


def test_a_damaged_source_is_named_when_it_is_opened(mixture, prepared, tmp_path, monkeypatch):
    """Of many sources at its first record, of a few at once."""
    for i in range(NUM_SOURCES):
        folder = tmp_path / f'{i:03d}'
        folder.unlink()
        folder.mkdir()
        for file in prepared[0].iterdir():
            if not file.name.startswith('index-'):
                (folder / file.name).symlink_to(file)
    data = data_pipelines.open(mixture)
    with pytest.raises(DataError, match=r'index-(train|test)'):
        next(data.train(0, 8))
    monkeypatch.setattr(records_source, 'OPENED_AT_ONCE', NUM_SOURCES)
    with pytest.raises(DataError, match='index-train'):
        data_pipelines.open(mixture)


def test_index_json_of_another_index_is_refused(prepared, tmp_path):
    folder = tmp_path / 'set'
    shutil.copytree(prepared[0], folder)
    path = folder / 'index.json'
    description = json.loads(path.read_text())
    description['splits']['train']['records'] = 12
    path.write_text(json.dumps(description))
    split = lazy_split.LazySplit(Prepared(folder), 'train')
    assert len(split) == 12
    with pytest.raises(DataError, match="split 'train' has 12 records and its index has 13"):
        split.open()


def test_what_index_json_says_is_what_the_index_says(prepared):
    """Sizes, segments and shapes; and older folders, which do not name them all."""
    for name in ('train', 'test'):
        split = lazy_split.LazySplit(Prepared(prepared[0]), name)
        told = (len(split), split.num_segments, split.frame_shapes())
        split._description = {}
        assert told == (len(split), split.num_segments, split.frame_shapes())
        index = split.index
        shapes = set(zip(index.height.tolist(), index.width.tolist()))
        assert split.frame_shapes() == shapes - {(0, 0)}


def test_shapes_of_frames_are_found_block_by_block(monkeypatch):
    monkeypatch.setattr(frame_shapes, '_AT_ONCE', 3)
    frames = np.array([1, 0, 2, 3, 4, 5, 6, 7], np.int32)
    height = np.array([24, 99, 24, 32, 24, 24, 24, 24], np.int32)
    width = np.array([32, 99, 32, 24, 32, 32, 32, 40], np.int32)
    found = frame_shapes.frame_shapes(frames, height, width)
    assert found == {(24, 32), (32, 24), (24, 40)}
