"""Preparation by Apache Beam's DirectRunner.

Skipped without apache-beam, which the tests' environment cannot hold (docs/data.md).
"""

import subprocess
import sys

import layouts
import numpy as np
import pytest
from clocks import FPS, RATE, clock
from test_data_prepare import SMALL, crashing_stage, folder_of

import data_pipelines.preparation
from data_pipelines import media, prepare
from data_pipelines.errors import DataError
from data_pipelines.preparation import decoded_files, writing
from data_pipelines.storage.records import Prepared, Split

HAVE = pytest.mark.skipif(
    'not __import__("importlib.util").util.find_spec("apache_beam")',
    reason='apache-beam is not installed',
)
RUNNER = '--runner=DirectRunner'


@pytest.fixture
def videos(tmp_path):
    folder_of(tmp_path / 'videos', 3)
    whole = (tmp_path / 'videos' / 'v0.mp4').read_bytes()
    (tmp_path / 'videos' / 'cut.mp4').write_bytes(whole[: len(whole) // 3])
    media.write_mp4(tmp_path / 'videos' / 'short.mp4', clock(0.3)[0], FPS)
    return str(tmp_path / 'videos')


@HAVE
def test_the_same_records_faults_counted_work_kept(videos, tmp_path, monkeypatch, capsys):
    plain = prepare.prepare(videos, '', str(tmp_path / 'plain'), **SMALL, name='clocks')
    with monkeypatch.context() as m:
        m.setattr(writing, 'write_dataset', None)  # decoded, then ended
        with pytest.raises(TypeError):
            prepare.prepare(
                videos,
                '',
                str(tmp_path / 'out'),
                **{**SMALL, 'quiet': False},
                name='clocks',
                beam=RUNNER,
            )
    assert 'Beam: 1 corrupt, 3 decoded, 1 too short' in capsys.readouterr().out
    staged = {
        p: p.stat().st_mtime_ns for p in (tmp_path / 'out' / '.staging' / 'files').glob('*/*')
    }
    assert len(staged) == 5
    gone = next(iter(staged))
    gone.unlink()
    from data_pipelines.preparation import beam

    done, original = [], beam.stage
    monkeypatch.setattr(
        beam, 'stage', lambda files, *a: (done.extend(files), original(files, *a))[1]
    )
    result = prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, name='clocks', beam=RUNNER)
    assert len(done) == 1  # what is staged is kept
    assert {**result, 'seconds': 0} == {**plain, 'seconds': 0}
    for split in result['splits']:
        a, b = (Split(Prepared(tmp_path / x), split).index for x in ('plain', 'out'))
        assert list(a.id) == list(b.id)
        np.testing.assert_array_equal(a.crc, b.crc)


@HAVE
def test_a_file_that_crashes_the_decoder_ends_no_worker(videos, tmp_path, monkeypatch):
    (tmp_path / 'videos' / 'bomb.mp4').write_bytes(b'x')
    monkeypatch.setattr(decoded_files, 'stage_file', crashing_stage)
    result = prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam=RUNNER)
    assert (
        result['skipped'] == {'bomb.mp4': 'corrupt: it crashes the decoder'}
        and sum(s['records'] for s in result['splits'].values()) == 5
    )


@HAVE
def test_a_pipeline_that_fails_is_one_sentence(videos, tmp_path):
    with pytest.raises(DataError, match='--beam=--runner=NoSuchRunner: the pipeline failed'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam='--runner=NoSuchRunner')


def test_without_beam_it_is_said(videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    monkeypatch.delitem(sys.modules, 'data_pipelines.preparation.beam', raising=False)
    monkeypatch.delattr(data_pipelines.preparation, 'beam', raising=False)
    with pytest.raises(DataError, match='needs apache-beam'):
        prepare.prepare(videos, '', str(tmp_path / 'out'), **SMALL, beam=RUNNER)


@HAVE
@pytest.mark.skipif(
    'not __import__("importlib.util").util.find_spec("mlcroissant")',
    reason='mlcroissant is not installed',
)
def test_tfds_build(tmp_path):
    folder = tmp_path / 'esc50'
    layouts.write(folder, layouts.LAYOUTS['esc50'](layouts.encodings(tmp_path / 'encoded')))
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Prepared(tmp_path / 'data' / 'our_esc50' / '1.0.0', 1).splits
