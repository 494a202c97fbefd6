"""Files on an object store: requests that fail, copies in the cache, run folders kept equal.

The store is a local S3 server, with a proxy before it that answers 503, cuts connections or hangs.
"""

import json
import multiprocessing
import os
import pathlib
import shutil
import time

import chex
import fsspec
import pytest

import data_pipelines
import vatt_jax
from tests import tiny
from vatt_jax import cli, extras
from vatt_jax.config import ConfigError
from vatt_jax.importers import __main__ as importers
from vatt_jax.modes import workdir
from vatt_jax.object_store import Store, StoreError, StoreSettings, is_url, join, run_mirror, urls
from vatt_jax.object_store.local_copies import Snapshot
from vatt_jax.object_store.run_mirror import ALL, NEWEST, NONE, RunMirror
from vatt_jax.parallel import distributed
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.training import checkpoint

# Tries follow one another at once.
QUICK = StoreSettings(timeout=20.0, tries=4, backoff=0.01)


def put(url, files):
    """Writes {name: content} below a URL."""
    store = Store(url, QUICK)
    for name, content in files.items():
        store.write(name, content)
    return store


def test_urls():
    assert is_url('s3://bucket/folder') and is_url('gs://bucket')
    assert not is_url('runs/demo') and not is_url(pathlib.Path('/runs')) and not is_url('C:\\runs')
    assert urls.protocol('S3://bucket') == 's3'
    assert join('gs://bucket/runs/', 'one', 'config.json') == 'gs://bucket/runs/one/config.json'
    assert urls.last_name('s3://bucket/data/') == 'data'


@pytest.fixture(params=['s3', 'gs'])
def url_of_any_store(request):
    """URL of a new folder on Amazon's and on Google's kind of store."""
    if request.param == 's3':
        url, _ = request.getfixturevalue('object_store')
        return url
    return request.getfixturevalue('google_store')


def test_files_go_there_and_come_back(url_of_any_store, tmp_path):
    url = url_of_any_store
    assert Store(url).files() == {}
    content = os.urandom(1000)
    (tmp_path / 'file').write_bytes(content)
    store = Store(url)
    store.upload(tmp_path / 'file', 'a/file')
    store.write('b', b'text')
    files = store.files()
    assert {name: file.size for name, file in files.items()} == {'a/file': 1000, 'b': 4}
    assert store.read('b') == b'text'
    assert store.info('a/file') == files['a/file'] and store.info('c') is None
    assert store.read_ranges('a/file', [(990, 10), (0, 3)]) == [content[990:], content[:3]]
    store.download('a/file', tmp_path / 'new' / 'copy', files['a/file'])
    assert (tmp_path / 'new' / 'copy').read_bytes() == content
    store.delete(['a/file', 'never there'])
    assert list(store.files()) == ['b']
    # Another version of a file is told from the one before.
    store.write('b', b'TEXT')
    assert store.files()['b'] != files['b']


@pytest.mark.parametrize('fault, count', [('unavailable', 2), ('cut', 2)])
def test_failures_that_pass_are_not_noticed(object_store, fault, count):
    url, faults = object_store
    store = put(url, {'file': bytes(range(100))})
    faults.requests.clear()
    setattr(faults, fault, count)
    assert store.read_ranges('file', [(10, 5), (50, 10)]) == [
        bytes(range(10, 15)),
        bytes(range(50, 60)),
    ]
    assert getattr(faults, fault) == 0
    # Only what did not arrive is requested again.
    assert len(faults.requests) == 2 + count


def test_a_request_that_hangs_is_given_up_and_sent_again(object_store):
    url, faults = object_store
    store = Store(url, StoreSettings(timeout=2.0, tries=2, backoff=0.01))
    store.write('file', b'content')
    faults.hang = 1
    begin = time.monotonic()
    assert store.read('file') == b'content'
    assert 1.9 < time.monotonic() - begin < 10


@pytest.mark.parametrize(
    'fault, reason',
    [('unavailable', '503|reduce|unavailable'), ('hang', 'no answer within 2 seconds')],
)
def test_failures_that_stay_are_one_sentence(object_store, fault, reason):
    url, faults = object_store
    store = Store(url, StoreSettings(timeout=2.0, tries=3, backoff=0.01))
    store.write('file', b'content')
    setattr(faults, fault, 100)
    with pytest.raises(StoreError, match=f'(?i)reading {url}/file failed, the last of 3.*{reason}'):
        store.read_ranges('file', [(0, 3)])
    assert 97 >= getattr(faults, fault) >= 96
    setattr(faults, fault, 0)


def test_what_does_not_pass_is_told_at_once(object_store, monkeypatch):
    url, faults = object_store
    with pytest.raises(StoreError, match='s3://no-such-bucket does not exist'):
        Store('s3://no-such-bucket/runs', QUICK).files()
    with pytest.raises(FileNotFoundError):
        Store(url, QUICK).read('nothing')
    assert len(faults.requests) < 8
    with pytest.raises(StoreError, match='nosuch:// cannot be opened'):
        Store('nosuch://bucket/runs')


def test_no_credentials(object_store, monkeypatch, tmp_path):
    url, _ = object_store
    for name in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'):
        monkeypatch.delenv(name)
    # Else the address of a cloud machine's metadata is asked, and the files of whoever runs this.
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'none'))
    with pytest.raises(StoreError, match='was refused.*credentials.*docs/object_stores.md'):
        Store(url, QUICK).files()


def test_a_missing_extra_is_one_sentence(monkeypatch):
    def missing(*_args, **_options):
        raise ImportError('Install s3fs to access S3')

    monkeypatch.setattr(fsspec, 'filesystem', missing)
    with pytest.raises(extras.MissingExtra, match='s3:// needs the extra .s3.*pip install "s3fs'):
        Store('s3://bucket/runs', StoreSettings(timeout=31.0))


def _fetch(url, cache, results):
    os.environ['VATT_JAX_CACHE'] = cache
    store = Store(url, QUICK)
    snapshot = Snapshot(store, store.files(), 'records')
    snapshot.fetch(lambda name: name != 'unwanted')
    results.put((snapshot.folder / 'big').stat().st_size)


@pytest.mark.slow
def test_a_file_is_fetched_once_a_machine(object_store, tmp_path):
    url, faults = object_store
    put(url, {'big': bytes(100_000), 'unwanted': b''})
    faults.requests.clear()
    faults.latency = 0.05
    context = multiprocessing.get_context('spawn')
    results = context.Queue()
    arguments = (url, str(tmp_path / 'cache'), results)
    processes = [context.Process(target=_fetch, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [100_000] * 3
    for process in processes:
        process.join()
    reads = [request for request in faults.requests if request.startswith('GET')]
    assert len([request for request in reads if '/big' in request]) == 1
    assert [path.name for path in (tmp_path / 'cache').rglob('*') if path.name == 'unwanted'] == []


# ---- Run folders.


def checkpoint_files(step, content=b'x'):
    return {
        f'checkpoints/{step}/state/data': content,
        f'checkpoints/{step}/_CHECKPOINT_METADATA': b'{}',
    }


def test_what_a_command_needs_of_a_run():
    files = [*checkpoint_files(9), *checkpoint_files(10), 'config.json', 'compiled/x', '.session']
    files += ['checkpoints/11/state/data', 'checkpoints/12.orbax-checkpoint-tmp/state/data']
    newest = [*checkpoint_files(10), 'config.json']
    assert run_mirror.select(files, ALL) == [*checkpoint_files(9), *newest]
    assert run_mirror.select(files, NEWEST) == newest
    assert run_mirror.select(files, NONE) == ['config.json']


def test_what_a_command_needs_of_a_run_with_phases():
    """The newest checkpoint of each phase: later phases and the model of the run need them."""

    def of(phase, step):
        return [f'phases/{phase}/{name}' for name in checkpoint_files(step)]

    files = ['config.json', 'phases/1-a/config.json', 'phases/1-a/run.lock']
    files += [*of('1-a', 4), *of('1-a', 10), *of('2-b', 4), 'phases/2-b/checkpoints/6/state/data']
    kept = ['config.json', 'phases/1-a/config.json']
    newest = [*of('1-a', 10), *of('2-b', 4)]
    assert run_mirror.select(files, ALL) == [*kept, *of('1-a', 4), *newest]
    assert run_mirror.select(files, NEWEST) == [*kept, *newest]
    assert run_mirror.select(files, NONE) == kept


def written(mirror, files):
    """Writes {name: content} into the local folder of a mirror."""
    for name, content in files.items():
        path = mirror.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def opened(url, trains=True, checkpoints=ALL):
    mirror = RunMirror(url, QUICK)
    mirror.pull(checkpoints, trains)
    return mirror


def contents(mirror):
    return {name: (mirror.folder / name).read_bytes() for name in mirror._local_files()}


def test_a_run_goes_on_on_another_machine(object_store, tmp_path, monkeypatch):
    url, faults = object_store
    first = opened(url)
    assert Store(url).files() == {}  # a mistake in the config leaves nothing behind
    files = {'config.json': b'{}', 'metrics.jsonl': b'1\n', **checkpoint_files(1)}
    written(first, files)
    first.push()
    # The file that makes a checkpoint complete is the last.
    puts = [request for request in faults.requests if request.startswith('PUT')]
    assert '_CHECKPOINT_METADATA' in puts[-1]
    written(first, {'metrics.jsonl': b'1\n2\n', **checkpoint_files(2), 'checkpoints/2/x.tmp': b''})
    shutil.rmtree(first.folder / 'checkpoints' / '1')
    first.start()
    first.close()

    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'another machine'))
    second = opened(url)
    expected = {'config.json': b'{}', 'metrics.jsonl': b'1\n2\n', **checkpoint_files(2)}
    assert contents(second) == expected
    second.close()
    # What is here already is not fetched again.
    faults.requests.clear()
    third = opened(url)
    assert contents(third) == expected
    assert not any(name in request for request in faults.requests for name in ('data', 'metrics'))
    third.close()


def test_what_a_killed_training_had_not_uploaded_is_uploaded_next_time(object_store):
    url, _ = object_store
    first = opened(url)
    written(first, {'config.json': b'{}', **checkpoint_files(1)})
    first.push()
    written(first, checkpoint_files(2))
    first._lock.release()  # as the system does when a process is killed
    second = opened(url)
    assert {**checkpoint_files(1), **checkpoint_files(2)}.items() <= contents(second).items()
    assert 'checkpoints/2/_CHECKPOINT_METADATA' in Store(url).files()
    second.close()


def test_where_another_training_took_over_the_rest_is_set_aside(
    object_store, tmp_path, monkeypatch, capfd
):
    url, _ = object_store
    first = opened(url)
    written(first, {'config.json': b'{}', **checkpoint_files(1)})
    first.push()
    written(first, checkpoint_files(2, b'unsent'))
    first._lock.release()
    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'another machine'))
    other = opened(url)
    written(other, checkpoint_files(2, b'other'))
    other.push()
    other.close()

    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'cache'))
    third = opened(url)
    assert contents(third)['checkpoints/2/state/data'] == b'other'
    left = list(third.folder.parent.glob('left_*/checkpoints/2/state/data'))
    assert [path.read_bytes() for path in left] == [b'unsent']
    assert str(left[0].parents[3].name) in capfd.readouterr().err
    third.close()


def test_files_removed_from_the_cache_by_hand_stay_on_the_store(object_store):
    url, _ = object_store
    first = opened(url)
    written(first, {'config.json': b'{}', **checkpoint_files(1)})
    first.start()
    first.close()
    shutil.rmtree(first.folder / 'checkpoints')
    second = opened(url)
    second.start()
    second.close()
    assert contents(second).keys() == {'config.json', *checkpoint_files(1)}
    assert checkpoint_files(1).keys() <= Store(url).files().keys()


def test_two_commands_use_one_run_at_a_time(object_store):
    url, _ = object_store
    training = opened(url)
    written(training, {'config.json': b'{}', **checkpoint_files(1)})
    training.push()
    written(training, checkpoint_files(2))
    evaluating = opened(url, trains=False, checkpoints=NEWEST)
    assert evaluating.folder != training.folder
    written(evaluating, {'evals/step_000001/results.json': b'{}'})
    evaluating.start()
    evaluating.close()
    training.start()
    training.close()
    files = Store(url).files()
    assert 'evals/step_000001/results.json' in files and 'checkpoints/2/state/data' in files


def test_a_store_that_is_away_at_the_end_loses_nothing(object_store):
    url, faults = object_store
    mirror = opened(url)
    mirror.start()
    written(mirror, {'config.json': b'{}', **checkpoint_files(1)})
    faults.unavailable = 1000
    with pytest.raises(StoreError, match='the same command on this machine uploads it'):
        mirror.close()
    faults.unavailable = 0
    again = opened(url)
    again.start()
    again.close()


def test_hosts_that_do_not_share_the_local_folder_are_told(object_store, monkeypatch):
    url, _ = object_store
    monkeypatch.setattr(distributed, 'is_main', lambda: False)
    monkeypatch.setattr(distributed, 'broadcast_from_main', lambda value: 0)
    with pytest.raises(StoreError, match='several hosts.*VATT_JAX_CACHE to a folder of a shared'):
        with workdir.opened(url, 'train', QUICK):
            pass
    # On the main process's own machine the folder is there, and this process uploads nothing.
    main = opened(url)
    with workdir.opened(url, 'train', QUICK) as folder:
        assert folder == main.folder
    main.close()
    monkeypatch.setattr(distributed, 'broadcast_from_main', lambda value: -1)
    with pytest.raises(StoreError, match='the main process could not open it'):
        with workdir.opened(url, 'train', QUICK):
            pass


# A playground that would be made on a store.
ELSEWHERE = {'data__source': 'records', 'data__make': {'path': 's3://bucket/playground'}}

TINY = """
from tests import tiny

def get_config(arg=''):
    # A constant rate: the first steps are the same however many follow.
    config = tiny.config(steps=2, optimizer__schedule__name='constant')
    config.evals = {'probe': {'type': 'linear_probe', 'stream': 'video', 'label': 'class'}}
    return config
"""


@pytest.mark.slow
def test_a_run_on_a_store_trains_resumes_and_is_evaluated(
    object_store, tmp_path, monkeypatch, capsys
):
    url, _ = object_store
    check_a_run(url, tmp_path, monkeypatch, capsys)


@pytest.mark.slow  # the same code but for the package that speaks to the store
def test_a_run_on_a_google_store_trains_resumes_and_is_evaluated(
    google_store, tmp_path, monkeypatch, capsys
):
    check_a_run(google_store, tmp_path, monkeypatch, capsys)


def check_a_run(url, tmp_path, monkeypatch, capsys):
    (tmp_path / 'tiny_config.py').write_text(TINY)
    config = f'--config={tmp_path / "tiny_config.py"}'
    local = tmp_path / 'local'
    cli.main([config, f'--workdir={local}', '--quiet', '--config.steps=4'])

    cli.main([config, f'--workdir={url}/run', '--quiet'])
    # Another machine.
    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'another machine'))
    cli.main([config, f'--workdir={url}/run', '--quiet', '--config.steps=4'])
    assert 'continuing from step 2' in capsys.readouterr().out
    cli.main(['--mode=eval', f'--workdir={url}/run'])

    store = Store(f'{url}/run')
    lines = store.read('metrics.jsonl').decode().splitlines()
    expected = (local / 'metrics.jsonl').read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in lines if '"loss"' in line]
    assert losses == [json.loads(line)['loss'] for line in expected if '"loss"' in line]
    files = store.files()
    assert {'config.json', 'done.json', 'evals/step_000004/results.json'} <= files.keys()
    model = vatt_jax.load(f'{url}/run')
    expected = vatt_jax.load(local).embed(text=['a word'])
    chex.assert_trees_all_equal(model.embed(text=['a word']), expected)
    # What config.init_from and --compare read.
    assert checkpoint.find(f'{url}/run').name == '4'
    assert FinishedRun(run_mirror.fetch_run(f'{url}/run')).step == 4


def test_a_folder_that_holds_no_run(object_store):
    url, _ = object_store
    with pytest.raises(ConfigError, match='holds no run'):
        cli.main(['--mode=eval', f'--workdir={url}/nothing'])


@pytest.mark.parametrize(
    'command',
    [
        lambda: cli.main(['--mode=export', '--out=s3://bucket/model']),
        lambda: importers.main(['--format=vatt_tf', '--checkpoint=x', '--out=s3://bucket/run']),
        lambda: data_pipelines.open_or_make(tiny.config(**ELSEWHERE), check=lambda config: None),
    ],
)
def test_what_is_only_written_locally_says_so(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match='=s3://bucket/.*: expected a folder of this machine'):
        command()
    assert list(tmp_path.iterdir()) == []
