"""Files of any name, on any terminal: prepared, and named truly where they are skipped."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from clocks import FPS, RATE, SIZE, clock

from data_pipelines import media
from data_pipelines.errors import DataError
from data_pipelines.preparation import media_catalog
from data_pipelines.prepare import main, prepare
from data_pipelines.storage.record_index import Index

ROOT = pathlib.Path(__file__).parents[2]
# Name of a good file, as bytes -> its id.
NAMES = {
    b'caf\xe9.mp4': 'caf\\xe9.mp4',
    'é composed.mp4'.encode(): 'é composed.mp4',
    'e\u0301 decomposed.mp4'.encode(): 'e\u0301 decomposed.mp4',
    b'new\nline.mp4': 'new\nline.mp4',
    b'\x1b[31mred.mp4': '\x1b[31mred.mp4',
    b':smile: [b].mp4': ':smile: [b].mp4',
    b'UPPER.MP4': 'UPPER.MP4',
    b' spaces .mp4': ' spaces .mp4',
    b'-dash.mp4': '-dash.mp4',
    b'a:b.mp4': 'a:b.mp4',
    b'x' * 251 + b'.mp4': 'x' * 251 + '.mp4',
}
BROKEN = ('a [/b].mp4', '[red]:smile:.mp4', 'two\nlines.mp4', '\x1b[2J.mp4')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with files of all these names."""
    folder = tmp_path_factory.mktemp('names')
    frames, audio = clock(1.0)
    media.write_mp4(folder / 'plain.mp4', frames, FPS, audio, RATE)
    content = (folder / 'plain.mp4').read_bytes()
    (folder / 'plain.mp4').unlink()
    for name in NAMES:
        with open(os.path.join(os.fsencode(folder), name), 'wb') as file:
            file.write(content)
    (folder / 'a [').mkdir()
    for name in BROKEN:
        (folder / name).write_text('no media')
    # A pipe: whoever opens it waits for ever.
    os.mkfifo(folder / 'pipe.mp4')
    return folder


def run(folder, out, **environment):
    """The command in a process of its own."""
    command = [sys.executable, '-m', 'data_pipelines.prepare', f'--videos={folder}', f'--out={out}']
    command += [f'--fps={FPS}', f'--size={SIZE}', f'--rate={RATE}', '--processes=1']
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True)


@pytest.mark.parametrize(
    'environment',
    [
        {'PYTHONIOENCODING': 'ascii', 'COLUMNS': '30'},
        # The locale decides how Python reads names of files, too.
        {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
        {'PYTHONIOENCODING': 'utf-8'},
    ],
)
def test_files_of_any_name(tmp_path, folder, environment):
    result = run(folder, tmp_path / 'set', **environment)
    assert result.returncode == 0, result.stderr
    description = json.loads((tmp_path / 'set' / 'index.json').read_text())
    ids = []
    for split in description['splits']:
        ids += list(Index.open(tmp_path / 'set' / f'index-{split}').id)
    assert sorted(ids) == sorted(NAMES.values())

    skipped = json.loads((tmp_path / 'set' / 'skipped.json').read_text())
    assert sorted(skipped) == sorted(BROKEN)
    printed = result.stdout.decode()
    assert 'skipped: 4' in printed
    assert '\x1b' not in printed
    if environment.get('PYTHONIOENCODING') != 'utf-8':
        assert printed.isascii()
        assert 'writing 11 records ...' in printed


@pytest.mark.parametrize('name', BROKEN)
def test_the_skipped_file_is_named_as_it_is(tmp_path, capsys, name):
    videos = tmp_path / 'videos'
    (videos / name).parent.mkdir(parents=True)
    (videos / name).write_text('no media')
    frames, _ = clock(1.0)
    media.write_mp4(videos / 'good.mp4', frames, FPS)
    assert main([f'--videos={videos}', f'--out={tmp_path / "[red]"}', '--processes=1']) == 0
    printed = capsys.readouterr().out
    shown = name.replace('\n', '\\n').replace('\x1b', '\\x1b')
    assert f'corrupt: 1, for example {shown} (corrupt: ' in printed
    # The folder, which is a style of rich's.
    assert '[red]' in printed
    # And where nothing is left.
    (videos / 'good.mp4').unlink()
    assert main([f'--videos={videos}', f'--out={tmp_path / "none"}', '--processes=1']) == 2
    error = capsys.readouterr().err
    assert shown in error and error.count('\n') == 1


def test_ids_do_not_depend_on_the_locale(folder):
    ids = [file.id for file in media_catalog.scan(folder)]
    assert sorted(ids) == sorted([*NAMES.values(), *BROKEN])
    for file_id in ids:
        file_id.encode()  # raises for what no record can store


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(tmp_path, folder, capsys):
    out = tmp_path / 'caf\udce9'
    assert main([f'--videos={folder}', f'--out={out}']) == 2
    error = capsys.readouterr().err
    assert 'caf\\xe9: expected a path that is UTF-8' in error and error.count('\n') == 1
    assert not out.exists()


def test_pipes_are_no_media(tmp_path):
    os.mkfifo(tmp_path / 'a.mp4')
    with pytest.raises(DataError, match='no media file below'):
        prepare(str(tmp_path), out=str(tmp_path / 'out'), quiet=True)
