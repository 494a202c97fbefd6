"""A dataset that lies beside the path that a config names."""

import pathlib
import shutil

import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage.records import Prepared


def test_a_dataset_one_folder_away_is_pointed_out(tmp_path, prepared):
    folder, _ = prepared
    # --out=data/NAME, where the config reads data/NAME/records.
    shutil.copytree(folder, tmp_path / 'above')
    with pytest.raises(DataError, match=f'there is one in {tmp_path}/above: name that path'):
        Prepared(tmp_path / 'above' / 'records')
    # The other way round.
    shutil.copytree(folder, tmp_path / 'below' / 'records')
    with pytest.raises(DataError, match=f'there is one in {tmp_path}/below/records: name that'):
        Prepared(tmp_path / 'below')
    # And where there is none.
    with pytest.raises(DataError) as error:
        Prepared(pathlib.Path(tmp_path / 'nowhere' / 'records'))
    assert 'there is one' not in str(error.value)
    (tmp_path / 'other').mkdir()
    with pytest.raises(DataError, match='is not a folder made by .*prepare$'):
        Prepared(tmp_path / 'other')
