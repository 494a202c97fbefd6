"""Runs on other people's machines: changed configs, full disks, folders of others, terminals."""

import concurrent.futures
import errno
import fcntl
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest

import data_pipelines
from tests import tiny
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.modes import embed, process
from vatt_jax.planning import preflight
from vatt_jax.run_folder import NotWritten, RunFolder, free_space, readable_size, write_atomically
from vatt_jax.training import checkpoint, loop, start, trackers
from vatt_jax.training.metrics import Progress, Writer
from vatt_jax.training.run_lock import RunLock


def short(**fields):
    return tiny.config(steps=fields.pop('steps', 2), optimizer__schedule__warmup=1, **fields)


def train(folder, config):
    loop.train(config, data_pipelines.open(config), folder, quiet=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of two steps, for reading."""
    folder = tmp_path_factory.mktemp('habits') / 'run'
    train(folder, short())
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


# ---- several trainings at once


def test_two_trainings_in_one_folder(copied):
    """The second one, a process of its own, is told who trains there and changes nothing."""
    held = RunLock(copied)
    held.acquire()
    code = (
        'import pathlib, sys\n'
        'from vatt_jax.config import ConfigError\n'
        'from vatt_jax.training.run_lock import RunLock\n'
        'try:\n'
        '    RunLock(pathlib.Path(sys.argv[1])).acquire()\n'
        'except ConfigError as error:\n'
        '    print(error)\n'
    )

    def second():
        command = [sys.executable, '-c', code, str(copied)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert f'process {os.getpid()} on ' in second()
    assert 'choose another --workdir' in second()
    held.close()
    assert second() == ''


def test_a_folder_that_another_run_is_writing_stays_as_it_is(copied, monkeypatch):
    def refuse(*_):
        raise BlockingIOError(errno.EAGAIN, 'held')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob('*') if path.is_file()}
    with pytest.raises(ConfigError, match='expected a folder that no other run is writing'):
        train(copied, short(steps=4))
    assert {path: path.stat().st_mtime_ns for path in copied.rglob('*') if path.is_file()} == before


def test_file_systems_without_locks(copied, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'no locks')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    RunLock(copied).acquire()


def test_training_in_a_thread(copied):
    """As notebooks and servers do; Python lets only the main thread handle signals."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(train, copied, short(steps=3)).result()
    assert (copied / 'checkpoints' / '3').is_dir()


# ---- the same command again with another config


def test_an_average_that_begins_later_is_refused_by_the_name_of_its_field(copied):
    before = sorted(path for path in copied.rglob('*') if path.is_file())
    with pytest.raises(ConfigError) as error:
        train(copied, short(steps=4, optimizer__ema=0.9))
    message = str(error.value)
    assert 'is sound and belongs to another config' in message
    assert 'config.optimizer.ema was 0.0 and is 0.9 now' in message
    assert f'--config.init_from={copied}' in message
    assert 'remove' not in message and 'delete' not in message
    assert checkpoint.newest_sound(copied / 'checkpoints') == 2
    assert before == sorted(path for path in copied.rglob('*') if path.is_file())


def test_weight_decay_may_begin_later(copied):
    train(copied, short(steps=4, optimizer__weight_decay=0.1, optimizer__clip=1.0))
    assert json.loads((copied / 'done.json').read_text())['step'] == 4


def test_an_unreadable_checkpoint_is_not_to_be_removed(copied, monkeypatch):
    """Of a run from before manifests, whose damage nobody can see."""
    step = copied / 'checkpoints' / '2'
    (step / checkpoint.MANIFEST).unlink()
    for file in step.rglob('d/*'):
        file.write_bytes(b'')
    with pytest.raises(ConfigError, match='cannot be read .*; nothing was changed. .* move '):
        train(copied, short(steps=4))


def test_embeddings_of_other_data_do_not_replace_those_that_are_there(copied):
    config = short()
    embed.run(config, copied, data_pipelines.open, 'test')
    embed.run(config, copied, data_pipelines.open, 'test')  # the same again: in its place
    assert [path.name for path in (copied / 'embeddings').iterdir()] == ['test.npz']
    embed.run(short(data__synthetic_size=128), copied, data_pipelines.open, 'test')
    names = sorted(path.name for path in (copied / 'embeddings').iterdir())
    assert names[0] == 'test.npz' and re.fullmatch(r'test_[0-9a-f]{8}\.npz', names[1])
    with np.load(copied / 'embeddings' / 'test.npz') as stored:
        assert json.loads(str(stored['source']))['synthetic_size'] == 64
    with np.load(copied / 'embeddings' / names[1]) as stored:
        assert json.loads(str(stored['source']))['synthetic_size'] == 128


# ---- folders that cannot be written


AS_NOBODY = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
import vatt_jax.training.start as start
os.setuid(65534)
try:
    start._check_writable(pathlib.Path({folder!r}))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason='only root may become another user')
def test_a_folder_of_another_user():
    # Not below pytest's own folder, which is closed to other users as a whole.
    home = pathlib.Path(tempfile.mkdtemp())
    home.chmod(0o755)
    closed = home / 'closed'
    closed.mkdir(mode=0o700)
    root = str(pathlib.Path(__file__).parent.parent)
    for folder in (home / 'run', closed / 'run' / 'deeper'):
        script = AS_NOBODY.format(root=root, folder=str(folder))
        done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
        assert 'ConfigError --workdir=' in done.stdout, done.stderr
        assert 'expected a folder that can be written, but' in done.stdout
    assert [path.name for path in home.iterdir()] == ['closed']
    shutil.rmtree(home)


@pytest.mark.parametrize('name', ['file/run', 'x' * 300])
def test_workdirs_that_cannot_be(name, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='--workdir=.*expected a folder that can be'):
        configs.stored(tmp_path / name)
        start.check_run_folder(short(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


# ---- disks that are full


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB, which looks to a program as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_metrics_that_cannot_be_written_end_the_run_with_a_sentence(tmp_path, small_files):
    writer = Writer(tmp_path, 0)
    small_files()
    with pytest.raises(NotWritten, match='metrics.jsonl could not be written: File too large'):
        for step in range(100):
            writer.write(step, {'text': 'x' * 1000})
    writer.close()


def test_event_files_that_cannot_be_written_do_not_block_the_run(tmp_path, small_files):
    said = []
    opened = trackers.Trackers(short(), tmp_path, 0, said.append)
    opened.open['tensorboard'].FLUSH_SECONDS = 0.0
    small_files()
    for step in range(100):
        opened.text(step, 'long', 'x' * 1000)
    opened.close()
    assert len(said) == 1 and 'tracker tensorboard failed (OSError: [Errno 27] File too' in said[0]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, small_files):
    write_atomically(tmp_path / 'done.json', 'old')
    small_files()
    with pytest.raises(NotWritten, match='done.json could not be written: File too large'):
        write_atomically(tmp_path / 'done.json', 'x' * 100_000)
    assert (tmp_path / 'done.json').read_text() == 'old'


def test_evaluations_that_cannot_be_written(tmp_path, small_files):
    from vatt_jax import evals

    noise = np.random.default_rng(0).normal(size=100_000)
    small_files()
    with pytest.raises(NotWritten, match='step_000002 could not be written'):
        evals.save({'a': evals.Result({}, {'x': noise})}, tmp_path / 'step_000002')
    assert not (tmp_path / 'step_000002').exists()


def test_a_disk_without_room_is_found_before_the_save(copied, monkeypatch):
    monkeypatch.setattr(checkpoint, 'free_space', lambda folder: 1000)
    with pytest.raises(
        checkpoint.CheckpointNotSaved,
        match=r'the checkpoint of step 4 .* \(1 kB are free\); it takes up to \d+ kB. Make room; '
        'the checkpoint of step 2 is whole',
    ):
        train(copied, short(steps=4))
    assert checkpoint.steps(copied / 'checkpoints') == [2]


def test_sizes_and_free_space(tmp_path):
    assert readable_size(1234) == '1 kB'
    assert readable_size(1.5e9) == '1.5 GB'
    assert readable_size(2e13) == '20.0 TB'
    assert free_space(tmp_path / 'not' / 'there') == pytest.approx(free_space(tmp_path), rel=0.5)


# ---- what the process makes of it


def exits(error, capsys, monkeypatch):
    def leave(code):
        raise SystemExit(code)

    def main(argv):
        raise error

    monkeypatch.setattr(os, '_exit', leave)
    with pytest.raises(SystemExit) as ended:
        process.exit_with_sentence(main, [])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    'error, code, sentence',
    [
        (
            OSError(errno.ENOSPC, 'No space left on device', '/a/b'),
            1,
            '/a/b could not be written: ',
        ),
        (OSError(errno.ENOSPC, 'No space left on device'), 1, 'a file could not be written: No sp'),
        (
            PermissionError(errno.EACCES, 'Permission denied', '/a'),
            2,
            '/a: Permission denied; choos',
        ),
        (OSError(errno.EROFS, 'Read-only file system', '/a'), 2, '/a: Read-only file system'),
        (NotWritten('x could not be written'), 1, 'error: x could not be written\n'),
    ],
)
def test_errors_of_the_file_system_are_sentences(error, code, sentence, capsys, monkeypatch):
    found, said = exits(error, capsys, monkeypatch)
    assert found == code
    assert sentence in said and said.count('\n') == 1


def test_other_errors_keep_their_traceback():
    def main(argv):
        raise FileNotFoundError(errno.ENOENT, 'No such file', '/a')

    with pytest.raises(FileNotFoundError):
        process.exit_with_sentence(main, [])


@pytest.mark.parametrize(
    'chosen, platform, visible, plugin, is_said',
    [
        ('', 'cpu', '', 'json', True),
        ('', 'cpu', '-1', 'json', True),
        ('cpu', 'cpu', '', 'json', False),
        ('', 'gpu', '', 'json', False),
        ('', 'cpu', '0', 'json', False),
        ('', 'cpu', None, 'json', False),
        ('', 'cpu', '', 'no_such_plugin', False),
    ],
)
def test_hidden_gpus_are_said(chosen, platform, visible, plugin, is_said, monkeypatch):
    monkeypatch.setattr(process, 'CUDA_PLUGINS', (plugin,))
    environment = {} if visible is None else {'CUDA_VISIBLE_DEVICES': visible}
    said = process.hidden_gpus(chosen, platform, environment)
    assert bool(said) == is_said
    if is_said:
        assert f'CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs' in said


SHOWING = """
import sys
sys.path.insert(0, {root!r})
from vatt_jax.modes import process
from vatt_jax.training.metrics import Progress

def main(argv):
    progress = Progress(10, 0, quiet=True)
    for step in range(1, 10):
        progress.say('1 × cpu …')
    print('still here', file=sys.stderr)

process.exit_with_sentence(main, [])
"""


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_terminals_without_some_characters_and_readers_that_leave(encoding):
    script = SHOWING.format(root=str(pathlib.Path(__file__).parent.parent))
    environment = {**os.environ, 'PYTHONIOENCODING': encoding}
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, capture_output=True, encoding='utf-8'
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ('1 x cpu ...' if encoding == 'ascii' else '1 × cpu …')
    # A pipe whose reader has gone, as that of `| head -0`.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, '-c', script], env=environment, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.stderr == b'still here\n' and done.returncode == 0


# ---- what is said before and while it runs


def test_the_line_moves_at_every_step(capsys):
    progress = Progress(10, 0, quiet=True)
    progress.interval = 0.0
    progress.advance(1, 0.5)
    progress.show(
        2, {'loss': 0.4, 'lr': 1e-3, 'clips_per_s': 8.0, 'data_wait': 0.5, 'goodput': 0.25}
    )
    progress.advance(3, 0.3)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith('step 1/10  loss 0.5000  ETA ')
    assert second.startswith('step 2/10  loss 0.4000  lr 1.00e-03  8 clips/s  waiting for data 50%')
    assert third.startswith('step 3/10  loss 0.3000  lr 1.00e-03  8 clips/s  waiting for data 50%')


@pytest.fixture(scope='module')
def built():
    config = short()
    data = data_pipelines.open(config)
    return config, loop.build(config, data), data


def test_a_run_says_what_it_will_take(built, tmp_path):
    config, made, data = built
    said = []
    preflight.before_training(config, made, data, tmp_path / 'run', said.append)
    lines = dict(line.split(': ', 1) for line in said)
    assert set(lines) == {'parameters', 'one step', 'one epoch', 'memory', 'checkpoints'}
    assert 'video 0.03 M' in lines['parameters'] and 'audio 0.01 M' in lines['parameters']
    assert lines['one step'].endswith(' TFLOP for 16 clips')
    assert lines['one epoch'] == '4.0 batches of 64 records; 2 steps are 0.5 epochs'
    assert 'this host has' in lines['memory']
    assert ' each, up to 3 at a time; ' in lines['checkpoints']
    assert not (tmp_path / 'run').exists()


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {'bytes_limit': self.limit}


@pytest.mark.parametrize('temporaries', [None, 5e6])
def test_what_clearly_cannot_fit_is_refused_with_advice(built, temporaries, monkeypatch):
    config, made, _ = built
    state, batch = preflight._arguments(made)
    needed = state + batch + (temporaries or 0)
    monkeypatch.setattr(preflight, '_temporaries', lambda *_: temporaries)
    monkeypatch.setattr(preflight.jax, 'local_devices', lambda: [Device(needed / 1.2)])
    with pytest.raises(ConfigError, match='a training step takes .* what would fit: .*config.'):
        preflight.memory(config, made, print)
    # Within five percent it may do.
    monkeypatch.setattr(preflight.jax, 'local_devices', lambda: [Device(needed / 1.04)])
    assert ' a device (parameters and optimizer ' in preflight.memory(config, made, print)


def test_temporaries_are_those_of_the_compiled_step(built):
    config, made, _ = built
    with preflight.jax.set_mesh(made.mesh):
        analysis = made.step.lower(made.shape, made.batch).compile().memory_analysis()
    found = preflight._temporaries(config, made, 1e9, print)
    assert found == pytest.approx(
        analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    )
    assert found > 0


def test_a_disk_without_room_for_one_checkpoint_is_refused(built, tmp_path, monkeypatch):
    config, made, _ = built
    monkeypatch.setattr(preflight, 'free_space', lambda folder: 1000)
    with pytest.raises(ConfigError, match='a checkpoint takes up to .* and 1 kB are free there'):
        preflight.room(config, made, tmp_path)
    size = checkpoint.size_of(made.shape)
    monkeypatch.setattr(preflight, 'free_space', lambda folder: 2 * size)
    assert 'which may not do: make room' in preflight.room(config, made, tmp_path)
    assert RunFolder(tmp_path).checkpoints.exists() is False
