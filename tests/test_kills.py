"""A run that is killed (-9) again and again ends with the numbers of one that never was; SIGTERM saves and leaves with code 0."""

import pathlib
import random
import time

import pytest

from tests import runs

CONFIG = '--config=tests/configs/tiny.py'


def losses_told(workdir: pathlib.Path) -> list[int]:
    file = workdir / 'metrics.jsonl'
    return (
        [line['step'] for line in runs.log_lines(workdir) if 'loss' in line]
        if file.exists() and file.read_text().endswith('\n')
        else []
    )


class Watch:
    """Phases of a started run, told from what it has written since the start."""

    def __init__(self, workdir: pathlib.Path, log: pathlib.Path, rng: random.Random):
        self.workdir, self.log, self.rng = workdir, log, rng
        self.said = len(self.text())
        self.kept, self.saves, self.seen = None, rng.randint(1, 2), set()

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ''

    def starting(self) -> bool:
        return True

    def compiling(self) -> bool:
        """The first thing said comes when the state is there and the step is about to be compiled."""
        return 'training records' in self.text()[self.said :]

    def stepping(self) -> bool:
        """Another step is logged than those that were kept of before."""
        if not self.compiling():
            return False
        steps = losses_told(self.workdir)
        self.kept = steps if self.kept is None else self.kept
        return steps != self.kept

    def saving(self) -> bool:
        """The folder of a checkpoint under way is there, for the first or second time since the start."""
        self.seen |= {p.name for p in (self.workdir / 'checkpoints').glob('*tmp*')}
        return self.compiling() and len(self.seen) >= self.saves

    def evaluating(self) -> bool:
        """A step is done after which an evaluation is due, and its results are not there."""
        steps = losses_told(self.workdir)
        return (
            self.compiling()
            and bool(steps)
            and steps[-1] % 4 == 0
            and not (self.workdir / 'evals' / f'step_{steps[-1]:06d}').exists()
        )

    def writing_results(self) -> bool:
        return any((self.workdir / 'evals').glob('*.tmp'))

    def refreshing(self) -> bool:
        return 'refresh' in self.text()[self.said :]


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
    """Waits. True when the process is in that phase, False when it ended before."""
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
    """SIGTERM in that phase: code 0, a checkpoint of the last step told, and no done.json. False when the run ended before."""
    if reaches(process, watch, phase):
        process.terminate()
    assert runs.finish(process, watch.log) == 0, watch.text()[-3000:]
    if (watch.workdir / 'done.json').exists():
        return False
    steps = losses_told(watch.workdir)
    assert f'asked to stop: step {steps[-1]} is saved' in watch.text()[watch.said :]
    assert (watch.workdir / 'checkpoints' / str(steps[-1])).is_dir()
    return True


def survive(
    folder: pathlib.Path, variant: str, phases: list[str], seed: int
) -> tuple[list[pathlib.Path], list[str]]:
    """Finished run folders, and the phases in which a run was killed, or with a leading ~ asked to stop. A run that ends before that is
    followed by a fresh one."""
    rng, killed, workdirs = random.Random(seed), [], []
    phases = list(phases)
    while phases or not workdirs or not (workdirs[-1] / 'done.json').exists():
        if not workdirs or (workdirs[-1] / 'done.json').exists():
            workdirs.append(folder / f'run{len(workdirs)}')
            assert len(workdirs) < 8
        workdir, log = workdirs[-1], folder / f'log{len(workdirs)}.txt'
        phase = phases[0] if phases else None
        watch = Watch(workdir, log, rng)
        # what shall be caught in compilation is compiled anew
        process = runs.start(
            f'{CONFIG}{variant}',
            f'--workdir={workdir}',
            '--quiet',
            log=log,
            cache=None if phase == 'compiling' else runs.CACHE,
        )
        if phase is None:
            assert runs.finish(process, log) == 0, log.read_text()[-3000:]
        elif (stop_at if phase[0] == '~' else kill_at)(process, watch, phase.lstrip('~')):
            killed.append(phases.pop(0))
        else:
            assert process.exitcode == 0, log.read_text()[-3000:]
    return workdirs, killed


def uninterrupted(folder: pathlib.Path, variant: str) -> pathlib.Path:
    log = folder / 'log.txt'
    process = runs.start(f'{CONFIG}{variant}', f'--workdir={folder / "run"}', '--quiet', log=log)
    assert runs.finish(process, log) == 0, log.read_text()[-3000:]
    return folder / 'run'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp('whole'), '')


def assert_same(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Parameters, moments, statistics, objective state and the order of records by digest; every line of the log; every result."""
    got, want = runs.done(workdir), runs.done(whole)
    for key in ('digests', 'order', 'step', 'consumed', 'skipped_steps'):
        assert got[key] == want[key], key
    assert set(got['digests']) == {'params', 'batch_stats', 'opt_state', 'objective'}
    assert runs.log_lines(workdir) == runs.log_lines(whole)
    results = lambda folder: {
        p.parent.name: p.read_text() for p in (folder / 'evals').glob('*/results.json')
    }
    assert results(workdir) == results(whole)


def test_killed_and_asked_to_stop_in_each_phase(whole, tmp_path):
    """One run, five times interrupted: the same command continues each time, and nothing shows in the end."""
    phases = ['compiling', '~compiling', 'saving', '~stepping', 'evaluating']
    workdirs, killed = survive(tmp_path, '', phases, seed=1)
    assert killed == phases
    for workdir in workdirs:
        assert_same(workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fourteen_kills(whole, tmp_path):
    phases = [
        'starting',
        'compiling',
        'saving',
        'stepping',
        'evaluating',
        'writing_results',
        'saving',
    ] * 2
    random.Random(7).shuffle(phases)
    workdirs, killed = survive(tmp_path, '', phases, seed=7)
    assert killed == phases
    for workdir in workdirs:
        assert_same(workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_six_kills_of_a_run_with_refreshes(tmp_path):
    """Self-labelling: fresh classifiers and labels of the whole set at steps 0, 3, 6 and 9; the killed run repeats them exactly."""
    want = uninterrupted(tmp_path, ':kmeans')
    phases = ['refreshing', 'saving', 'refreshing', 'stepping', 'evaluating', 'saving']
    workdirs, killed = survive(tmp_path, ':kmeans', phases, seed=3)
    assert killed == phases
    for workdir in workdirs:
        assert_same(workdir, want)
