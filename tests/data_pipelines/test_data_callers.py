"""`prepare` called from anywhere, and workers that crash, hang, or cannot be started."""

import functools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, write_wav

from data_pipelines.errors import DataError
from data_pipelines.preparation import worker_processes
from data_pipelines.preparation.worker_processes import Worker, WorkerCrashed
from data_pipelines.prepare import prepare
from tests import typecheck

ROOT = pathlib.Path(__file__).parents[2]

# Every way to call a library: the body of a script that prints what came out.
CALL = """
    import sys
    sys.path.insert(0, {root!r})
    from data_pipelines.prepare import prepare

    def call(out):
        result = prepare({videos!r}, out=out, processes=2, quiet=True, size={size}, rate={rate})
        return sum(split['records'] for split in result['splits'].values()), result['skipped']
"""
CALLERS = {
    'without a main guard': """
        print(call({out!r}))
    """,
    'in a thread': """
        import threading
        thread = threading.Thread(target=lambda: print(call({out!r})))
        thread.start()
        thread.join()
    """,
    # Each writes, while the others print.
    'in three threads at once': """
        import threading
        def run(number):
            call({out!r} + str(number))
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(call({out!r} + '0'))
    """,
    # Workers of multiprocessing.Pool are daemons, which may not have children of their own.
    'in a worker of a pool': """
        import multiprocessing
        if __name__ == '__main__':
            with multiprocessing.get_context('fork').Pool(1) as pool:
                print(pool.apply(call, ({out!r},)))
    """,
}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Three good files."""
    folder = tmp_path_factory.mktemp('videos')
    for name in 'abc':
        write_wav(folder / f'{name}.wav', np.zeros(2 * RATE, np.int16))
    return folder


def program(caller, videos, out):
    values = {'root': str(ROOT), 'videos': str(videos), 'out': str(out)}
    text = textwrap.dedent(CALL) + textwrap.dedent(CALLERS[caller])
    return text.format(**values, size=SIZE, rate=RATE)


@pytest.mark.parametrize(
    'caller, from_stdin', [*[(caller, False) for caller in CALLERS], ('without a main guard', True)]
)
def test_prepare_is_called_from_anywhere(tmp_path, videos, caller, from_stdin):
    text = program(caller, videos, tmp_path / 'out')
    (tmp_path / 'script.py').write_text(text)
    arguments = ['-'] if from_stdin else [str(tmp_path / 'script.py')]
    result = subprocess.run(
        [sys.executable, *arguments],
        # Another folder than the repository's: workers find the package as their caller does.
        cwd=tmp_path,
        input=text if from_stdin else '',
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == '(3, {})'


def test_paths_are_taken_as_scripts_have_them(tmp_path, videos, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    options = {'quiet': True, 'rate': RATE, 'processes': 1}
    assert prepare(videos, None, '~/set', **options)['fresh']
    assert (tmp_path / 'set' / 'prepare.json').is_file()
    # The same folder, named in other ways.
    for same in (tmp_path / 'set', os.fsencode(tmp_path / 'set')):
        with typecheck.off():
            assert not prepare(os.fsencode(videos), captions=None, out=same, **options)['fresh']


@pytest.mark.parametrize('argument', ['videos', 'out', 'captions', 'annotations', 'manual_dir'])
@pytest.mark.parametrize('value', [['a'], 3, {'a': 1}])
def test_what_is_no_path(tmp_path, videos, argument, value):
    arguments = {'videos': videos, 'out': tmp_path / 'out', argument: value}
    message = f'{argument}: expected a path, got {type(value).__name__}'
    with typecheck.off(), pytest.raises(DataError, match=message):
        prepare(**arguments)


def test_a_worker_that_cannot_be_started_is_not_the_files_fault(tmp_path, videos, monkeypatch):
    for executable in ('/nowhere/python', '/bin/false'):
        monkeypatch.setattr(sys, 'executable', executable)
        with pytest.raises(
            DataError, match='could not be started with sys.executable=.*processes=1'
        ):
            prepare(str(videos), out=str(tmp_path / 'out'), quiet=True, processes=2, fps=FPS)
    monkeypatch.undo()
    result = prepare(str(videos), out=str(tmp_path / 'out'), quiet=True, processes=2, fps=FPS)
    assert result['skipped'] == {}


def test_a_worker_passes_on_results_and_errors():
    worker = Worker()
    try:
        assert worker.call(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            worker.call(divmod, 7, 0)
        # What is printed does not get between the messages.
        worker.call(print, 'x' * 100)
        assert worker.call(len, b'x' * 10_000_000) == 10_000_000
        with pytest.raises(WorkerCrashed, match='exit code 3'):
            worker.call(os._exit, 3)
        # The next call has a new process.
        first = worker.call(os.getpid)
        assert worker.call(os.getpid) == first != os.getpid()
    finally:
        worker.close()
    with pytest.raises(WorkerCrashed):
        worker.call(os.getpid)


def test_a_call_is_given_up_when_its_worker_is_closed():
    worker = Worker()
    pid = worker.call(os.getpid)
    threading.Timer(0.3, worker.close).start()
    begin = time.monotonic()
    with pytest.raises(WorkerCrashed):
        worker.call(time.sleep, 60)
    assert time.monotonic() - begin < 10
    deadline = time.monotonic() + 10
    while pathlib.Path(f'/proc/{pid}').exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_for_each_does_all_items_and_stops_at_an_error():
    done = []
    worker_processes.for_each(
        range(20), 3, lambda worker, item: done.append(worker.call(abs, -item))
    )
    assert sorted(done) == list(range(20))
    worker_processes.for_each([], 3, functools.partial(Worker.call))

    begun = []

    def fail(worker, item):
        begun.append(item)
        worker.call(divmod, 1, 0 if item == 3 else 1)

    with pytest.raises(ZeroDivisionError):
        worker_processes.for_each(range(1000), 2, fail)
    assert len(begun) < 1000
