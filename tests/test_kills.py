"""A run that is killed (-9) again and again ends with the numbers of one that never was.

SIGTERM saves and leaves with code 0.
"""

import pathlib
import random
import time

import pytest

from tests import runs

CONFIG = '--config=tests/configs/tiny.py'


def steps_logged(workdir: pathlib.Path) -> list[int]:
    """The steps whose loss is logged; none while a line is being written."""
    file = workdir / 'metrics.jsonl'
    if not file.exists() or not file.read_text().endswith('\n'):
        return []
    return [line['step'] for line in runs.log_lines(workdir) if 'loss' in line]


class Watch:
    """The phase of a started run, read off what it has written since the start.

    Each phase of DELAYS is a method: whether the run is in it.
    """

    def __init__(self, workdir: pathlib.Path, log: pathlib.Path, rng: random.Random):
        self.workdir = workdir
        self.log = log
        self.rng = rng
        # Of the log: what earlier starts wrote.
        self.num_old_characters = len(self.text())
        self.steps_at_start: list[int] | None = None
        self.num_saves = rng.randint(1, 2)
        self.saves_seen: set[str] = set()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ''

    def new_text(self) -> str:
        return self.text()[self.num_old_characters :]

    def starting(self) -> bool:
        return True

    def compiling(self) -> bool:
        """The first line comes when the state is there and the step is about to be compiled."""
        return 'training records' in self.new_text()

    def stepping(self) -> bool:
        """The log has another step than those that were there at the start."""
        if not self.compiling():
            return False
        steps = steps_logged(self.workdir)
        if self.steps_at_start is None:
            self.steps_at_start = steps
        return steps != self.steps_at_start

    def saving(self) -> bool:
        """The folder of a checkpoint under way is there, the first or second since the start."""
        for path in (self.workdir / 'checkpoints').glob('*tmp*'):
            self.saves_seen.add(path.name)
        return self.compiling() and len(self.saves_seen) >= self.num_saves

    def evaluating(self) -> bool:
        """A step is done after which an evaluation is due, and its results are not there."""
        if not self.compiling():
            return False
        steps = steps_logged(self.workdir)
        if not steps or steps[-1] % 4:
            return False
        return not (self.workdir / 'evals' / f'step_{steps[-1]:06d}').exists()

    def writing_results(self) -> bool:
        return any((self.workdir / 'evals').glob('*.tmp'))

    def refreshing(self) -> bool:
        return 'refresh' in self.new_text()


# phase -> seconds after it begins in which the kill falls
DELAYS = {
    'starting': 3.0,
    'compiling': 1.5,
    'stepping': 0.05,
    'saving': 0.03,
    'evaluating': 0.4,
    'writing_results': 0.005,
    'refreshing': 0.5,
}


def reaches(process, watch: Watch, phase: str, timeout: float = 550) -> bool:
    """Waits until the process is in that phase. False when it ended before."""
    end = time.monotonic() + timeout
    while process.exitcode is None:
        try:
            if getattr(watch, phase)():
                return True
        except (OSError, ValueError):
            pass  # read while it was being written
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f'phase {phase} never came:\n{watch.text()[-3000:]}')
        time.sleep(0.002)
    return False


def kill_at(process, watch: Watch, phase: str) -> bool:
    """True when the process was killed in that phase, False when it ended before."""
    delay = watch.rng.uniform(0, DELAYS[phase])
    if reaches(process, watch, phase):
        process.join(delay)
        process.kill()
        process.join()
    return process.exitcode == -9


def stop_at(process, watch: Watch, phase: str) -> bool:
    """SIGTERM in that phase: code 0, a checkpoint of the last step, and no done.json.

    False when the run ended before.
    """
    if reaches(process, watch, phase):
        process.terminate()
    assert runs.finish(process, watch.log) == 0, watch.text()[-3000:]
    if (watch.workdir / 'done.json').exists():
        return False
    steps = steps_logged(watch.workdir)
    assert f'asked to stop: step {steps[-1]} is saved' in watch.new_text()
    assert (watch.workdir / 'checkpoints' / str(steps[-1])).is_dir()
    return True


def is_done(workdir: pathlib.Path) -> bool:
    return (workdir / 'done.json').exists()


def interrupt(
    folder: pathlib.Path, variant: str, phases: list[str], seed: int
) -> tuple[list[pathlib.Path], list[str]]:
    """Starts one command again and again, and interrupts it once in each phase.

    A run that ends before its phase comes is followed by a fresh one.

    Args:
        folder: For run folders and logs.
        variant: Of tests/configs/tiny.py.
        phases: In which to kill; with a leading ~: in which to ask to stop.
        seed: Of the moments within the phases.

    Returns:
        Finished run folders, and the phases in which a run was interrupted.
    """
    rng = random.Random(seed)
    workdirs: list[pathlib.Path] = []
    left, interrupted = list(phases), []
    while left or not workdirs or not is_done(workdirs[-1]):
        if not workdirs or is_done(workdirs[-1]):
            workdirs.append(folder / f'run{len(workdirs)}')
            assert len(workdirs) < 8
        workdir = workdirs[-1]
        log = folder / f'log{len(workdirs)}.txt'
        phase = left[0] if left else None
        watch = Watch(workdir, log, rng)
        # What is to be caught in compilation is compiled anew.
        process = runs.start(
            f'{CONFIG}{variant}',
            f'--workdir={workdir}',
            '--quiet',
            log=log,
            cache=None if phase == 'compiling' else runs.CACHE,
        )
        if phase is None:
            assert runs.finish(process, log) == 0, log.read_text()[-3000:]
            continue
        interrupt_at = stop_at if phase.startswith('~') else kill_at
        if interrupt_at(process, watch, phase.lstrip('~')):
            interrupted.append(left.pop(0))
        else:
            assert process.exitcode == 0, log.read_text()[-3000:]
    return workdirs, interrupted


def uninterrupted(folder: pathlib.Path, variant: str) -> pathlib.Path:
    """The run folder of a run that nothing happened to."""
    log = folder / 'log.txt'
    process = runs.start(f'{CONFIG}{variant}', f'--workdir={folder / "run"}', '--quiet', log=log)
    assert runs.finish(process, log) == 0, log.read_text()[-3000:]
    return folder / 'run'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp('whole'), '')


def evaluation_results(workdir: pathlib.Path) -> dict[str, str]:
    """{evaluation: its results.json} of a run folder."""
    files = (workdir / 'evals').glob('*/results.json')
    return {file.parent.name: file.read_text() for file in files}


def assert_same(workdir: pathlib.Path, expected_workdir: pathlib.Path) -> None:
    """Two runs did the same, bit for bit.

    Parameters, moments, statistics, objective state and the order of records by digest; every line
    of the log; every result.
    """
    done, expected = runs.done(workdir), runs.done(expected_workdir)
    for key in ('digests', 'order', 'step', 'consumed', 'skipped_steps'):
        assert done[key] == expected[key], key
    always = {'params', 'batch_stats', 'opt_state', 'objective'}
    assert set(done['digests']) - {'tables'} == always
    assert runs.log_lines(workdir) == runs.log_lines(expected_workdir)
    assert evaluation_results(workdir) == evaluation_results(expected_workdir)


def test_killed_and_asked_to_stop_in_each_phase(whole, tmp_path):
    """One run, five times interrupted: the same command continues each time.

    In the end nothing shows.
    """
    phases = ['compiling', '~compiling', 'saving', '~stepping', 'evaluating']
    workdirs, interrupted = interrupt(tmp_path, '', phases, seed=1)
    assert interrupted == phases
    for workdir in workdirs:
        assert_same(workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fourteen_kills(whole, tmp_path):
    each = ['starting', 'compiling', 'saving', 'stepping', 'evaluating', 'writing_results']
    phases = [*each, 'saving'] * 2
    random.Random(7).shuffle(phases)
    workdirs, interrupted = interrupt(tmp_path, '', phases, seed=7)
    assert interrupted == phases
    for workdir in workdirs:
        assert_same(workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_six_kills_of_a_run_with_refreshes(tmp_path):
    """Self-labelling: fresh classifiers and labels of the whole set at steps 0, 3, 6 and 9.

    The killed run repeats them exactly.
    """
    expected_workdir = uninterrupted(tmp_path, ':kmeans')
    phases = ['refreshing', 'saving', 'refreshing', 'stepping', 'evaluating', 'saving']
    workdirs, interrupted = interrupt(tmp_path, ':kmeans', phases, seed=3)
    assert interrupted == phases
    for workdir in workdirs:
        assert_same(workdir, expected_workdir)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_a_run_with_tables_on_the_host(tmp_path):
    """CMA: a checkpoint has the tables of its step, whatever later steps stored meanwhile."""
    expected_workdir = uninterrupted(tmp_path, ':host_memory')
    assert 'tables' in runs.done(expected_workdir)['digests']
    phases = ['refreshing', 'saving', 'compiling', 'saving']
    workdirs, interrupted = interrupt(tmp_path, ':host_memory', phases, seed=5)
    assert interrupted == phases
    for workdir in workdirs:
        assert_same(workdir, expected_workdir)
