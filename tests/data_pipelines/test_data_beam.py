"""Preparation by Apache Beam's DirectRunner.

Skipped without apache-beam, which the tests' environment cannot hold (docs/data.md).
"""

import importlib.util
import subprocess
import sys

import layouts
import numpy as np
import pytest
from clocks import FPS, RATE, clock
from test_data_prepare import SMALL, crashing_stage, num_records, write_clocks

import data_pipelines.preparation
from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, writing
from data_pipelines.storage.records import Prepared, Split

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec('apache_beam') is None, reason='apache-beam is not installed'
)
needs_croissant = pytest.mark.skipif(
    importlib.util.find_spec('mlcroissant') is None, reason='mlcroissant is not installed'
)
RUNNER = '--runner=DirectRunner'


@pytest.fixture
def videos(tmp_path):
    """A folder of three clocks, one truncated file and one that is too short."""
    folder = tmp_path / 'videos'
    write_clocks(folder, 3)
    whole = (folder / 'v0.mp4').read_bytes()
    (folder / 'cut.mp4').write_bytes(whole[: len(whole) // 3])
    frames, _ = clock(0.3)
    media.write_mp4(folder / 'short.mp4', frames, FPS)
    return str(folder)


@needs_beam
def test_the_same_records_faults_counted_and_no_work_repeated(
    videos, tmp_path, monkeypatch, capsys
):
    plain = prepare.prepare(videos, '', str(tmp_path / 'plain'), **SMALL, name='clocks')
    out = tmp_path / 'out'
    with monkeypatch.context() as patch:
        patch.setattr(writing, 'write_dataset', None)  # decoded, then ended
        fields = {**SMALL, 'quiet': False, 'name': 'clocks', 'beam': RUNNER}
        with pytest.raises(TypeError):
            prepare.prepare(videos, '', str(out), **fields)
    assert 'Beam: 1 corrupt, 3 decoded, 1 too short' in capsys.readouterr().out
    staged = list((out / '.staging' / 'files').glob('*/*'))
    assert len(staged) == 5
    staged[0].unlink()

    from data_pipelines.preparation import beam

    staged_by_beam = []
    original_stage = beam.stage

    def counting_stage(files, *arguments):
        staged_by_beam.extend(files)
        return original_stage(files, *arguments)

    monkeypatch.setattr(beam, 'stage', counting_stage)
    result = prepare.prepare(videos, '', str(out), **SMALL, name='clocks', beam=RUNNER)
    assert len(staged_by_beam) == 1  # the others stay staged
    assert {**result, 'seconds': 0} == {**plain, 'seconds': 0}
    for name in result['splits']:
        expected = Split(Prepared(tmp_path / 'plain'), name).index
        got = Split(Prepared(out), name).index
        assert list(got.id) == list(expected.id)
        np.testing.assert_array_equal(got.crc, expected.crc)


@needs_beam
def test_a_file_that_crashes_the_decoder_ends_no_worker(videos, tmp_path, monkeypatch):
    (tmp_path / 'videos' / 'bomb.mp4').write_bytes(b'x')
    monkeypatch.setattr(decoded_files, 'stage_file', crashing_stage)
    result = prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam=RUNNER)
    assert result['skipped'] == {'bomb.mp4': 'corrupt: it crashes the decoder'}
    assert num_records(result) == 5


@needs_beam
def test_a_pipeline_that_fails_is_one_sentence(videos, tmp_path):
    with pytest.raises(DataError, match='--beam=--runner=NoSuchRunner: the pipeline failed'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam='--runner=NoSuchRunner')


def test_without_beam_the_error_names_it(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    monkeypatch.delitem(sys.modules, 'data_pipelines.preparation.beam', raising=False)
    monkeypatch.delattr(data_pipelines.preparation, 'beam', raising=False)
    with pytest.raises(DataError, match='needs apache-beam'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam=RUNNER)


@needs_beam
@needs_croissant
def test_tfds_build(tmp_path):
    folder = tmp_path / 'esc50'
    files = layouts.encode_examples(tmp_path / 'encoded')
    layouts.write_layout(folder, layouts.esc50(files))
    command = [
        sys.executable,
        '-m',
        'tensorflow_datasets.scripts.cli.main',
        'build',
        '--imports=data_pipelines.datasets.builders',
        f'--manual_dir={folder}',
        f'--data_dir={tmp_path / "data"}',
        f'our_esc50/rate={RATE}',
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert Prepared(tmp_path / 'data' / 'our_esc50' / '1.0.0', 1).splits
