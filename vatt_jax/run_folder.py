"""A run folder: the names of its files, all in one place, and how they are written."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder itself, `--workdir`.
    """

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The resolved config (JSON)."""
        return self.path / 'config.json'

    @property
    def provenance(self) -> pathlib.Path:
        """Commit, versions and hardware of the newest start (JSON)."""
        return self.path / 'provenance.json'

    @property
    def checkpoints(self) -> pathlib.Path:
        """One folder for each saved step."""
        return self.path / 'checkpoints'

    @property
    def metrics(self) -> pathlib.Path:
        """What was logged, one JSON object a line."""
        return self.path / 'metrics.jsonl'

    @property
    def tensorboard(self) -> pathlib.Path:
        """The same numbers as event files of TensorBoard."""
        return self.path / 'tensorboard'

    @property
    def wandb_id(self) -> pathlib.Path:
        """Under which Weights & Biases knows the run."""
        return self.path / 'wandb_id'

    @property
    def clu(self) -> pathlib.Path:
        """What CLU's writers wrote."""
        return self.path / 'clu'

    @property
    def done(self) -> pathlib.Path:
        """The last word of a training that reached config.steps (JSON); absent before."""
        return self.path / 'done.json'

    @property
    def lock(self) -> pathlib.Path:
        """Held by the process that trains here."""
        return self.path / 'run.lock'

    @property
    def timings(self) -> pathlib.Path:
        """Seconds of each stage, over restarts (JSON)."""
        return self.path / 'timings.json'

    @property
    def profile(self) -> pathlib.Path:
        """The trace of config.profile, for XProf or TensorBoard."""
        return self.path / 'profile'

    @property
    def compiled(self) -> pathlib.Path:
        """Compiled programs, kept for the next start."""
        return self.path / 'compiled'

    @property
    def plans(self) -> pathlib.Path:
        """Plans made before the run, as tables and as JSON."""
        return self.path / 'plan'

    @property
    def report(self) -> pathlib.Path:
        """The report page (HTML)."""
        return self.path / 'report' / 'index.html'

    @property
    def phases(self) -> pathlib.Path:
        """The run folders of config.phases (vatt_jax/phase_folders.py); absent without them."""
        return self.path / 'phases'

    def evaluation(self, name: str) -> pathlib.Path:
        """Folder of one evaluation, named by `evaluation_name` or by its tag."""
        return self.path / 'evals' / name

    def results(self, name: str) -> pathlib.Path:
        """What that evaluation found (JSON)."""
        return self.evaluation(name) / 'results.json'

    def has_evaluation(self, name: str) -> bool:
        """Whether that evaluation is finished; its folder appears whole or not at all."""
        return self.results(name).exists()

    def evaluated_steps(self) -> list[int]:
        """Steps with a finished evaluation, in ascending order."""
        steps = []
        for results in (self.path / 'evals').glob('step_*/results.json'):
            name = results.parent.name
            number = name.removeprefix('step_')
            # Others are a user's own, such as step_001000_old.
            if number.isdecimal() and name == evaluation_name(int(number)):
                steps.append(int(number))
        return sorted(steps)

    def embeddings(self, split: str) -> pathlib.Path:
        """Embeddings of a split of the evaluation data (npz)."""
        return self.path / 'embeddings' / f'{split}.npz'


# The evaluation of the same network before training.
RANDOM_INIT = 'random_init'


def evaluation_name(step: int) -> str:
    """Name of the evaluation of a step."""
    # Six digits, so that file listings show most runs in order of step.
    return f'step_{step:06d}'


def readable_size(num_bytes: float) -> str:
    """Returns '1.5 GB' or '300 kB'."""
    for unit, name in ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB')):
        if num_bytes >= unit:
            return f'{num_bytes / unit:.1f} {name}'
    return f'{num_bytes / 1e3:.0f} kB'


def free_space(path: pathlib.Path) -> int | None:
    """Bytes that may still be written where `path` is or will be; None where it is not known."""
    for folder in (path.absolute(), *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue  # not made yet
        except OSError:
            return None
    return None


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION = (errno.EROFS, errno.EACCES, errno.EPERM)


class NotWritten(RuntimeError):
    """A file of a run could not be written. The message says which and why."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Gives the errors of writing a file its name; the system's own messages may lack it.

    Raises:
        NotWritten: the body raised an OSError that is about room or permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM + NO_PERMISSION:
            raise
        reason = error.strerror or str(error)
        if error.errno in NO_PERMISSION:
            remedy = 'Its folder has to be one that this user may write'
        else:
            free = free_space(path)
            room = '' if free is None else f' ({readable_size(free)} are free there)'
            reason += room
            remedy = (
                'Make room: checkpoints that were saved are whole, and the same command continues '
                'from the newest'
            )
        raise NotWritten(f'{path} could not be written: {reason}. {remedy}') from error


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that a kill leaves either as it was or complete.

    Raises:
        NotWritten: it could not be written; what was there before stays.
    """
    # In the same folder, since a rename is atomic within one file system only.
    temporary = path.with_name(path.name + '.tmp')
    with writing(path):
        # Not the encoding of whoever's terminal it is.
        temporary.write_text(text, encoding='utf-8')
        os.replace(temporary, path)
