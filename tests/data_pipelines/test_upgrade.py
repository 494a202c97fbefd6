"""Folders of version 1 are read, and become folders of the present version."""

import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from old_layout import as_version_1, contents
from test_data_dmvr import both_forms  # noqa: F401

from data_pipelines import upgrade
from data_pipelines.errors import DataError
from data_pipelines.storage import columns, piece_tables, record_index, version_1
from data_pipelines.storage.records import Prepared, Split

# Made by `prepare` at commit 070bd9e: --fps=2 --size=16 --rate=2000 of three clocks, one silent
# file and one of sound alone, with captions and annotations.
ARCHIVE = pathlib.Path(__file__).parent.parent / 'data' / 'dataset_of_version_1.tar.gz'
OLD_TABLES = ('index-*.npz', 'places-*.npz', 'pieces-*.npy')


@pytest.fixture
def old(tmp_path):
    """A folder that the code of version 1 wrote."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter='data')
    return tmp_path / 'dataset_of_version_1'


def old_tables(folder):
    """Names of tables of version 1 in a folder."""
    return sorted(path.name for pattern in OLD_TABLES for path in folder.glob(pattern))


def assert_upgraded(folder):
    """The tables are the present ones alone, and `prepare` knows them as its own."""
    assert not old_tables(folder)
    assert not list(folder.glob(f'*{columns.TEMPORARY}*'))
    assert json.loads((folder / 'index.json').read_text())['version'] == 2
    finished = json.loads((folder / 'prepare.json').read_text())
    present = {path.name for path in folder.iterdir()} - {'prepare.json'}
    assert set(finished.get('files', present)) == present


def test_a_folder_of_version_1_is_read_as_it_is(old):
    index = Split(Prepared(old), 'test').index
    assert list(index.id) == ['test/test0.mp4']
    assert list(index.sentence_text) == ['first of test/test0, ☃', 'then, more']
    assert list(index.segment_caption) == ['first of test/test0, ☃', 'light']
    np.testing.assert_array_equal(index.labels['class'], [0, 1])
    np.testing.assert_array_equal(index.labels['tags'], [[1, 0, 0], [0, 1, 1]])
    np.testing.assert_array_equal(index.frames, [2])
    np.testing.assert_array_equal(index.samples, [2000])
    assert json.loads(index.ground_truth[0]) == {'i': 1}
    split = Split(Prepared(old), 'train')
    assert sorted(split.index.id) == [
        'train/silent.mp4',
        'train/sound.wav',
        'train/train0.mp4',
        'train/train1.mp4',
    ]
    assert old_tables(old)


def test_an_upgraded_folder_says_the_same(old):
    before = {split: contents(old, split) for split in ('train', 'test')}
    assert upgrade.upgrade(str(old), quiet=True) == {'train': 4, 'test': 1}
    assert_upgraded(old)
    for split, expected in before.items():
        assert contents(old, split) == expected
    assert upgrade.upgrade(str(old), quiet=True) == {}
    assert_upgraded(old)


def test_what_the_command_prints(old, capsys):
    assert upgrade.main([str(old)]) == 0
    printed = capsys.readouterr().out
    assert 'train: 4 records; index ' in printed
    assert 'is of version 2 now; old tables removed: 15.3 kB.' in printed
    assert upgrade.main([str(old)]) == 0
    assert 'is of version 2 already; nothing to do.' in capsys.readouterr().out
    assert upgrade.main([str(old / 'nowhere')]) == 2
    assert 'does not exist' in capsys.readouterr().err


def test_dmvr_records_before_and_after(both_forms, tmp_path):  # noqa: F811
    _, folder = both_forms
    as_version_1(folder, tmp_path / 'old')
    for split in ('train', 'test'):
        assert contents(tmp_path / 'old', split) == contents(folder, split)
    upgrade.upgrade(str(tmp_path / 'old'), quiet=True)
    assert_upgraded(tmp_path / 'old')
    for split in ('train', 'test'):
        assert contents(tmp_path / 'old', split) == contents(folder, split)
        name = f'pieces-{split}'
        for path in (folder / name).iterdir():
            assert (tmp_path / 'old' / name / path.name).read_bytes() == path.read_bytes()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize('moment', range(7))
def test_a_killed_upgrade_goes_on(old, monkeypatch, moment):
    """Killed behind any step that others can see: a table gets its name, a JSON file changes."""
    before = {split: contents(old, split) for split in ('train', 'test')}
    steps = []

    def kill_after(function):
        def step(*arguments):
            result = function(*arguments)
            steps.append(function.__name__)
            if len(steps) == moment + 1:
                raise Killed
            return result

        return step

    with monkeypatch.context() as patch:
        patch.setattr(columns.TableWriter, 'publish', kill_after(columns.TableWriter.publish))
        patch.setattr(upgrade, 'write_json', kill_after(columns.write_json))
        patch.setattr(pathlib.Path, 'unlink', kill_after(pathlib.Path.unlink))
        with pytest.raises(Killed):
            upgrade.upgrade(str(old), quiet=True)
    assert {split: contents(old, split) for split in before} == before
    upgrade.upgrade(str(old), quiet=True)
    assert_upgraded(old)
    assert {split: contents(old, split) for split in before} == before


def test_half_a_table_of_a_killed_upgrade_is_removed(old):
    (old / f'index-train{columns.TEMPORARY}1').mkdir()
    upgrade.upgrade(str(old), quiet=True)
    assert_upgraded(old)


def test_new_tables_of_other_records_are_written_anew(old, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(old, other)
    upgrade.upgrade(str(other), quiet=True)
    # As if version 1 had prepared the folder again, behind a killed upgrade.
    shutil.copytree(other / 'index-test', old / 'index-train')
    shutil.copytree(other / 'pieces-test', old / 'pieces-train')
    before = contents(old, 'train')
    upgrade.upgrade(str(old), quiet=True)
    assert contents(old, 'train') == before


@pytest.mark.parametrize('name', ['index-train.npz', 'places-train.npz', 'pieces-train.npy'])
@pytest.mark.parametrize('damage', ['cut', 'missing', 'noise'])
def test_damaged_old_tables_stay_as_they_are(old, name, damage):
    path = old / name
    content = path.read_bytes()
    if damage == 'missing':
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == 'cut' else bytes(len(content)))
    if (name, damage) == ('places-train.npz', 'missing'):
        # Older than these tables: the records are read once.
        upgrade.upgrade(str(old), quiet=True)
        Split(Prepared(old), 'train')
        return
    with pytest.raises(DataError, match='cannot be read.*with --overwrite') as error:
        upgrade.upgrade(str(old), quiet=True)
    assert '\n' not in str(error.value)
    assert Prepared(old).version == 1
    assert 'index-test.npz' in old_tables(old)


def test_records_that_were_replaced_are_refused(old):
    with open(next(old.glob('*-train.array_record*')), 'ab') as file:
        file.write(b'x')
    with pytest.raises(DataError, match='is not the file of .* bytes'):
        upgrade.upgrade(str(old), quiet=True)


def test_a_full_disk_is_one_sentence(old, monkeypatch, capsys):
    def fail(self, data):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(columns.ColumnWriter, '_write', fail)
    assert upgrade.main([str(old), '--quiet']) == 2
    error = capsys.readouterr().err
    assert 'No space left on device' in error
    assert error.endswith('the same command goes on from here\n')
    assert not list(old.glob(f'*{columns.TEMPORARY}*'))


def test_a_later_version_is_refused(old):
    meta = json.loads((old / 'index.json').read_text())
    (old / 'index.json').write_text(json.dumps({**meta, 'version': 3}))
    with pytest.raises(DataError, match='expected index version 1 to 2, got 3'):
        upgrade.upgrade(str(old), quiet=True)


def test_a_dataset_without_tables_gets_them_when_opened(old, monkeypatch):
    expected = contents(old, 'train')
    for path in (version_1.places_path(old, 'train'), version_1.pieces_path(old, 'train')):
        path.unlink()

    def refuse(*arguments):
        raise OSError('read only')

    with monkeypatch.context() as patch:
        patch.setattr(columns, 'ColumnWriter', refuse)
        with pytest.raises(DataError, match='make the folder writable once'):
            Split(Prepared(old), 'train')
    assert contents(old, 'train') == expected
    assert columns.is_table(piece_tables.folder_of(old, 'train'))
    upgrade.upgrade(str(old), quiet=True)
    assert_upgraded(old)
    assert contents(old, 'train') == expected


def test_folds_before_and_after(tmp_path):
    """Splits are selections of one pool of clips; a fold's split has its own `max_captions`."""
    from test_record_index import CHECKSUMS, MULTI_HOT, RECORDS, write_index

    new = write_index(tmp_path / 'new', RECORDS)
    from old_layout import write_index as write_old

    write_old(tmp_path / 'old.npz', new)
    read = version_1.load_index(tmp_path / 'old.npz')
    upgrade._upgrade_index(tmp_path / 'old.npz', tmp_path / 'upgraded')
    for path in (tmp_path / 'new').iterdir():
        if path.name != columns.TABLE_FILE:
            assert (tmp_path / 'upgraded' / path.name).read_bytes() == path.read_bytes()
    upgraded = record_index.Index.open(tmp_path / 'upgraded')
    for index in (read, upgraded):
        np.testing.assert_array_equal(index.folds, new.folds)
        np.testing.assert_array_equal(index.crc, CHECKSUMS)
        assert list(index.labels) == list(MULTI_HOT)
        assert index.max_captions == new.max_captions
