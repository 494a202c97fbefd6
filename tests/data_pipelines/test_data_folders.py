"""Folders as strangers have them: links in circles, half downloads, two runs into one folder."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from clocks import RATE, write_wav

from data_pipelines.errors import DataError
from data_pipelines.preparation import (
    arguments,
    decoded_files,
    folder_listing,
    media_catalog,
    splits,
    target_folder,
    worker_processes,
)
from data_pipelines.preparation.console import Console
from data_pipelines.prepare import main, prepare


def write_sounds(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_wav(folder / name, np.zeros(RATE * 3 // 2, np.int16))


def ids(folder):
    return [file.id for file in folder_listing.list_media(folder).files]


def sentence(capsys):
    """What was printed as an error, which is one line."""
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    return error


# ---- What is found.


def test_links_in_circles_are_followed_once(tmp_path):
    write_sounds(tmp_path / 'a' / 'b', 'x.wav')
    (tmp_path / 'a' / 'b' / 'up').symlink_to('..')
    (tmp_path / 'a' / 'b' / 'self').symlink_to('.')
    (tmp_path / 'far').mkdir()
    (tmp_path / 'far' / 'away').symlink_to(tmp_path / 'a')
    assert ids(tmp_path) == ['a/b/x.wav', 'far/away/b/x.wav']
    # From within the circle, too, and for the subtitles beside the files.
    (tmp_path / 'a' / 'b' / 'x.srt').write_text('1\n00:00:01,000 --> 00:00:02,000\nhi\n')
    catalog = media_catalog.from_folder(str(tmp_path / 'a'))
    assert list(catalog.sentences) == ['b/x.wav']


def test_what_is_left_out_is_told(tmp_path, capsys):
    videos = tmp_path / 'videos'
    write_sounds(videos, 'good.wav', 'no_suffix', 'x.wav.part', 'photo.heic', '._good.wav')
    write_sounds(videos / '$RECYCLE.BIN', 'deleted.wav')
    (videos / 'gone.wav').symlink_to('nowhere')
    (videos / 'notes.txt').write_text('of the author')
    out = tmp_path / 'out'
    flags = [f'--rate={RATE}', '--processes=1']
    assert main([f'--videos={videos}', f'--out={out}', *flags]) == 0
    skipped = json.loads((out / 'skipped.json').read_text())
    assert {name: reason.split(':')[0] for name, reason in skipped.items()} == {
        'gone.wav': 'missing',
        'x.wav.part': 'unfinished',
    }
    printed = capsys.readouterr().out
    assert 'left out, as no media by their names: ' in printed
    assert '1 .heic' in printed and '1 without a suffix' in printed
    assert '.txt' not in printed


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    write_sounds(tmp_path, 'a.wav')
    write_sounds(tmp_path / 'secret', 'b.wav')
    scandir = os.scandir

    def refuse(path):
        # Tests may run as a user who may read everything.
        if os.fspath(path).endswith('secret'):
            raise PermissionError(13, 'Permission denied', os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    listing = folder_listing.list_media(tmp_path)
    assert [file.id for file in listing.files] == ['a.wav']
    assert listing.skipped == {'secret': 'not readable: Permission denied'}


@pytest.mark.parametrize(
    'videos, message',
    [
        ('a.wav', 'expected a folder of media files, got a file'),
        ('*.wav', 'does not exist; patterns are not searched'),
        ('https://example.com/videos', 'does not exist; addresses are not read'),
        ('nowhere', 'does not exist'),
        ('pictures', r'no media file below .*; found 1 \.jpg'),
    ],
)
def test_what_is_no_folder_of_media(tmp_path, monkeypatch, videos, message):
    monkeypatch.chdir(tmp_path)
    write_sounds(tmp_path, 'a.wav')
    write_sounds(tmp_path / 'pictures', 'a.jpg')
    with pytest.raises(DataError, match=message):
        prepare(videos, out='out', quiet=True)
    # Nothing is left of a folder that nothing was written to.
    assert not os.path.exists('out')


def test_a_file_that_is_still_being_written(tmp_path):
    write_sounds(tmp_path, 'a.wav')
    [file] = folder_listing.list_media(tmp_path).files
    settings = decoded_files.Settings(fps=10.0, size=64, rate=RATE, quality=90, min_seconds=1.0)
    target = tmp_path / 'staged'
    decoded_files.stage_file(file, settings, str(target))
    assert 'skipped' not in decoded_files.header(target)
    # As long as before, and written to.
    os.utime(tmp_path / 'a.wav', ns=(0, file.modified + 1))
    decoded_files.stage_file(file, settings, str(target))
    assert decoded_files.header(target)['skipped'].startswith('changed: ')


# ---- Where it goes.


def test_one_writer_at_a_time(tmp_path):
    write_sounds(tmp_path / 'videos', 'a.wav', 'b.wav')
    out = tmp_path / 'out'
    with target_folder.only_writer(out):
        with pytest.raises(DataError, match='another process is writing to this folder'):
            prepare(str(tmp_path / 'videos'), out=str(out), quiet=True, processes=1)
        # Another folder is free.
        prepare(str(tmp_path / 'videos'), out=f'{out}2', quiet=True, processes=1, rate=RATE)
    assert not out.exists()
    # The lock ends with its holder.
    assert prepare(str(tmp_path / 'videos'), out=str(out), quiet=True, processes=1)['fresh']


def test_of_two_runs_at_once_one_writes(tmp_path):
    write_sounds(tmp_path / 'videos', *[f'{i}.wav' for i in range(6)])
    results = []

    def run():
        try:
            result = prepare(str(tmp_path / 'videos'), out=str(tmp_path / 'out'), quiet=True)
            results.append(result['fresh'])
        except DataError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others = [result for result in results if result is not True]
    # The second one came too late, or found everything done.
    assert len(others) == 1
    assert others == [False] or 'another process' in others[0]


@pytest.mark.parametrize(
    'out, message',
    [
        ('x' * 300, 'cannot be made (File name too long)'),
        ('file/below', 'cannot be made (Not a directory)'),
        ('file', 'is a file'),
    ],
)
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys, out, message):
    monkeypatch.chdir(tmp_path)
    write_sounds(tmp_path / 'videos', 'a.wav')
    (tmp_path / 'file').write_text('')
    assert main(['--videos=videos', f'--out={out}', '--processes=1']) == 2
    assert message in sentence(capsys)


def test_the_working_folder_is_gone(tmp_path, monkeypatch, capsys):
    write_sounds(tmp_path / 'videos', 'a.wav')
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    assert main([f'--videos={tmp_path / "videos"}', '--out=out', '--processes=1']) == 2
    assert 'out cannot be made' in sentence(capsys)


@pytest.mark.parametrize('content', ['{', '{}', '[]', '3', '\udcff'])
def test_a_note_of_an_earlier_run_that_is_damaged(tmp_path, content):
    write_sounds(tmp_path / 'videos', 'a.wav')
    (tmp_path / 'out').mkdir()
    note = tmp_path / 'out' / 'prepare.json'
    note.write_text(content, errors='surrogateescape')
    for overwrite in (False, True):
        with pytest.raises(DataError, match='expected prepare.json of an earlier run'):
            prepare(
                str(tmp_path / 'videos'),
                out=str(tmp_path / 'out'),
                quiet=True,
                overwrite=overwrite,
                processes=1,
            )
    assert note.exists()


def test_names_of_long_folders_fit_into_names_of_files():
    name = arguments.dataset_name(pathlib.Path('1' + 'x' * 250))
    settings = decoded_files.Settings(fps=10.0, size=256, rate=8000, quality=90, min_seconds=1.0)
    arguments.check_arguments(settings, name, 10, 0.0, 0.0, 1)
    with pytest.raises(DataError, match='128 at most'):
        arguments.check_arguments(settings, name + 'x', 10, 0.0, 0.0, 1)


# ---- What comes out, and what is said.


def test_a_single_file_is_trained_on():
    for i in range(60):
        # Of some, the hash says test.
        file = decoded_files.File(f'{i}.mp4', f'{i}.mp4', 0, 0)
        [number], _ = splits.assign([file], {}, False, False, 0.05, 0.05)
        assert splits.STORED_SPLITS[number] == 'train'


def test_times_in_milliseconds_are_noticed(tmp_path, capsys):
    write_sounds(tmp_path / 'videos', 'a.wav', 'b.wav')
    (tmp_path / 'captions.csv').write_text(
        'video,start,end,text\na.wav,0,900,first\na.wav,1000,1400,second\nb.wav,500,800,third\n'
    )
    flags = [f'--captions={tmp_path / "captions.csv"}', f'--rate={RATE}', '--processes=1']
    assert main([f'--videos={tmp_path / "videos"}', f'--out={tmp_path / "out"}', *flags]) == 0
    assert (
        '2 of 3 sentences begin behind the end of their file and are left out, for example in '
        'a.wav (1000 s of 1.5 s); times are expected in seconds' in capsys.readouterr().out
    )


@pytest.mark.parametrize('columns', ['0', '1', '20', '-1', 'x'])
def test_terminals_of_any_width(tmp_path, monkeypatch, capsys, columns):
    monkeypatch.setenv('COLUMNS', columns)
    counts = dict.fromkeys(
        ('records', 'segments', 'sentences', 'hours', 'without_audio', 'without_video'), 12345
    )
    splits = dict.fromkeys(('train', 'validation', 'test'), counts)
    summary = {'splits': splits, 'skipped': {}, 'seconds': 1}
    console = Console(quiet=False)
    console('one line')
    console.summary(tmp_path, summary, [])
    printed = capsys.readouterr().out
    assert 'one line\n' in printed
    assert printed.count('12345') == 18


def test_an_interrupt_while_workers_start():
    """Ctrl-C reaches them, too; what is printed is what the command says."""
    # What a worker does first, and then a signal.
    first = worker_processes._PROGRAM.partition('import json')[0]
    program = f'{first} import os; os.kill(os.getpid(), signal.SIGINT); print("alive")'
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, 'alive\n', '')
