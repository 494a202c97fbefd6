"""A newcomer's first steps: a dozen files, the printed command, packages that are missing."""

import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, clock, write_wav

import run as entry
from data_pipelines import media
from data_pipelines.preparation import splits
from data_pipelines.preparation.decoded_files import File, Settings
from data_pipelines.preparation.training_command import training_command
from data_pipelines.prepare import main
from vatt_jax.modes.flags import parse
from vatt_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = Settings(fps=10.0, size=256, rate=8000, quality=90, min_seconds=1.0)


def splits_of(names, validation=0.05, test=0.05):
    """(split of each name, remarks)."""
    files = [File(name, name, 0, 0) for name in names]
    numbers, remarks = splits.assign(files, {}, False, False, validation, test)
    return [splits.STORED_SPLITS[number] for number in numbers], remarks


@pytest.mark.parametrize('count, least', [(3, 1), (5, 1), (6, 2), (14, 2)])
def test_a_dozen_files_have_all_splits(count, least):
    names = [f'video{i}.mp4' for i in range(count)]
    by_hash = [splits.split_of(name, False, 0.05, 0.05) for name in names]
    assigned, remarks = splits_of(names)
    told = ' '.join(remarks)
    for split in ('validation', 'test'):
        assert assigned.count(split) == max(least, by_hash.count(split))
    assert assigned.count('train') >= least
    for name, before, after in zip(names, by_hash, assigned):
        # Files are moved out of the training split alone, and each is told.
        assert before in (after, 'train')
        assert (name in told) == (before != after)


def test_splits_without_a_share_stay_empty_and_too_few_files_are_told():
    assert splits_of(['a', 'b', 'c'], validation=0.0, test=0.0) == (['train'] * 3, [])
    assigned, remarks = splits_of(['a'])
    assert assigned == ['train']
    assert [remark.split(':')[0] for remark in remarks] == [
        'the split test is empty',
        'the split validation is empty',
    ]


def printed_command(capsys, *arguments):
    """What `prepare` says at its end, as the arguments of run.py."""
    assert main([*arguments, '--processes=1', f'--fps={FPS}']) == 0
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    words = shlex.split(last_line)
    assert words[:5] == ['Train', 'on', 'it:', 'python', 'run.py']
    return words[5:]


@pytest.mark.parametrize(
    'folder, flags, expected',
    [
        ('plain', [f'--rate={RATE}'], "{'retrieval': {'type': 'retrieval'}}"),
        ("it's a $set", [], "'pairs': (('audio', 'video', 'va'),)"),
        ('silent', [f'--size={SIZE // 4}'], 'config.evals={}'),
    ],
)
def test_the_printed_command_is_one_that_run_py_takes(
    tmp_path, capsys, monkeypatch, folder, flags, expected
):
    videos = tmp_path / 'videos'
    videos.mkdir()
    captions = ['video,text']
    frames, audio = clock(1.5)
    for i in range(6):
        sound = None if folder == 'silent' else audio
        media.write_mp4(videos / f'{i}.mp4', frames, FPS, sound, RATE)
        captions.append(f'{i}.mp4,clip {i}')
    if folder == 'plain':
        (tmp_path / 'captions.csv').write_text('\n'.join(captions))
        flags = [*flags, f'--captions={tmp_path / "captions.csv"}']
    out = tmp_path / folder
    words = printed_command(capsys, f'--videos={videos}', f'--out={out}', *flags)
    assert any(expected in word for word in words), words

    monkeypatch.chdir(ROOT)
    parsed, overrides = parse([*words, f'--workdir={tmp_path / "run"}'], entry.__doc__)
    config = entry.read_config(parsed, overrides, tmp_path / 'run')
    loop.check(config)
    # Rates, sizes and tokenizers fit each other.
    data = entry.open_data(config)
    loop.resolve(config, data)
    assert data.size('train') >= 1
    batch = next(iter(data.one_pass('test', 2, by='segments')))
    assert batch['video']['valid'][0]


def test_the_command_fits_data_of_other_rates():
    # Retrieval among one clip is no evaluation.
    test = {'records': 1, 'sentences': 5, 'without_audio': 0, 'without_video': 0}
    splits = {'train': {}, 'test': test}
    settings = Settings(fps=2.0, size=24, rate=44100, quality=90, min_seconds=1.0)
    command = training_command(
        pathlib.Path('data/x'), 'x', settings, 'wordpiece', {'splits': splits}
    )
    for word in (
        '--config.model.inputs.video.fps=2.0',
        '--config.model.inputs.video.size=24',
        '--config.model.inputs.audio.rate=44100',
        # 2 s, in whole patches of 256.
        '--config.model.inputs.audio.samples=88320',
        '--config.model.inputs.text.tokenizer=wordpiece',
        '--config.evals={}',
    ):
        assert word in shlex.split(command)


# ---- Packages.

WITHOUT = """
import runpy, sys
for name in sys.argv[1].split(','):
    sys.modules[name] = None
module, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_module(module, run_name='__main__', alter_sys=True)
"""


@pytest.mark.parametrize(
    'missing, command',
    [
        ('av', 'data_pipelines.prepare --videos=VIDEOS --out=OUT'),
        ('tensorflow', 'data_pipelines.prepare --videos=VIDEOS --out=OUT'),
        ('tokenizers', 'data_pipelines.prepare --videos=VIDEOS --out=OUT --tokenizer=wordpiece'),
        ('av', 'data_pipelines.dmvr --train=x --out=OUT'),
        ('av', 'data_pipelines.datasets.playground --out=OUT --train=1'),
        ('tensorflow', 'run --workdir=OUT --config.data.train={"a":{"path":"OUT"}}'),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, missing, command):
    (tmp_path / 'videos').mkdir()
    write_wav(tmp_path / 'videos' / 'a.wav', np.zeros(2 * RATE, np.int16))
    command = command.replace('VIDEOS', str(tmp_path / 'videos'))
    command = command.replace('OUT', str(tmp_path / 'out'))
    result = subprocess.run(
        [sys.executable, '-c', WITHOUT, missing, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith('error: ')
    assert missing in result.stderr
    assert 'pip install' in result.stderr
    assert result.stderr.count('\n') == 1
    # Said before anything is decoded.
    assert not (tmp_path / 'out' / '.staging').exists()
