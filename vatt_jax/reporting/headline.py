"""What a run came to, in a few lines: the main numbers, warnings and what to do next."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence

from vatt_jax.command_line import run_command
from vatt_jax.evals import Result
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.reporting.results_table import form_of, label_of

# The one number of each type of evaluator, the first of these that it has.
MAIN_SCALARS: Mapping[str, Sequence[str]] = {
    'retrieval': ('text_to_video/R@10', 'audio_to_video/R@10'),
    'classification': ('accuracy', 'mAP'),
    'zero_shot': ('accuracy', 'mAP'),
    'linear_probe': ('accuracy', 'mAP'),
    'clustering': ('NMI',),
    'neighbours': ('R@1',),
    'sync': ('accuracy',),
}
MOST_NUMBERS = 4
# With fewer clips, one clip more or less moves a recall by more than a percentage point.
FEW_CLIPS = 100


@dataclasses.dataclass(frozen=True)
class Number:
    """A main result.

    Attributes:
        label: what was measured.
        value: as text.
        context: chance, and the untrained network, as text.
        verdict: what it means.
        is_good: whether training is seen in it.
    """

    label: str
    value: str
    context: str
    verdict: str
    is_good: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """Something to do next.

    Attributes:
        text: what and why.
        command: to be typed; '' where there is none.
    """

    text: str
    command: str


def numbers(run: FinishedRun) -> list[Number]:
    """The main results of a run's newest evaluation."""
    found = []
    # In the order of MAIN_SCALARS: what the methods are compared by comes first.
    for kind in MAIN_SCALARS:
        for name, result in run.results.items():
            key = _main_scalar(kind, result)
            if key and run.is_plain(name, (kind,)):
                found.append(_number(name, key, result, run.baseline.get(name)))
    return found[:MOST_NUMBERS]


def _main_scalar(kind: str, result: Result) -> str:
    for key in MAIN_SCALARS[kind]:
        if key in result.scalars:
            return key
    # Other pairs of streams, such as those of a run without text and video.
    if kind == 'retrieval':
        for key in result.scalars:
            if key.endswith('/R@10'):
                return key
    return ''


def _number(name: str, key: str, result: Result, baseline: Result | None) -> Number:
    form = form_of(key)
    value = result.scalars[key]
    chance = result.artifacts.get(f'{key}/chance')
    interval = result.artifacts.get(f'{key}/interval')
    untrained = baseline.scalars.get(key) if baseline is not None else None
    context = []
    if chance is not None:
        context.append(f'chance {form(chance)}')
    if untrained is not None:
        context.append(f'untrained {form(untrained)}')
    verdict, is_good = _verdict(value, interval, chance, untrained)
    return Number(
        label=label_of(name, key, is_only_one=False),
        value=form(value),
        context=', '.join(context),
        verdict=verdict,
        is_good=is_good,
    )


def _verdict(
    value: float,
    interval: Sequence[float] | None,
    chance: float | None,
    untrained: float | None,
) -> tuple[str, bool]:
    """What a number means against what needs no training. Higher is better in all of them."""
    if chance is not None and chance >= 1:
        return 'says nothing: too few clips to be wrong', False
    # The lower end of the interval, where there is one: less could be luck.
    sure = interval[0] if interval is not None else value
    if chance is not None and sure <= chance:
        return 'not surely above chance', False
    if untrained is not None and sure <= untrained:
        return 'not surely above the untrained network', False
    if untrained is not None:
        return 'above chance and the untrained network', True
    return 'above chance', True


def warnings(run: FinishedRun) -> list[str]:
    """What a reader should know before believing a number."""
    found = [_few_clips(clips, names) for clips, names in _small_galleries(run).items()]
    if run.done.get('skipped_steps'):
        found.append(
            f'{run.done["skipped_steps"]} steps were skipped because loss or gradients were not '
            'finite; a lower learning rate or clipping (config.optimizer.clip) may help.'
        )
    if run.done.get('corrupt_records'):
        found.append(
            f'{run.done["corrupt_records"]} records could not be read and were left out; the '
            'log of the training names them.'
        )
    return found


def _small_galleries(run: FinishedRun) -> dict[int, list[str]]:
    """Number of clips -> the retrievals that have as few; controls are left out."""
    found: dict[int, list[str]] = {}
    for name, result in run.results.items():
        if not run.is_plain(name, ('retrieval',)):
            continue
        for key, value in result.scalars.items():
            # 'text_to_video/clips': clips of the gallery of one pair of streams.
            if key.endswith('/clips') and value < FEW_CLIPS:
                pair = key.removesuffix('/clips').replace('_to_', ' → ')
                found.setdefault(int(value), []).append(f'{name.replace("_", " ")} {pair}')
    return found


def _few_clips(clips: int, names: Sequence[str]) -> str:
    return (
        f'only {clips} clips were held out ({", ".join(names)}), so one clip moves R@1 by '
        f'{100 / clips:.0f} percentage points{_certain_recalls(clips)}. Hold out {FEW_CLIPS} or '
        'more.'
    )


def _certain_recalls(clips: int) -> str:
    """', and R@5 and R@10 are 100 % whatever the model does' for three clips."""
    certain = [f'R@{k}' for k in (1, 5, 10) if k >= clips]
    if not certain:
        return ''
    verb = 'is' if len(certain) == 1 else 'are'
    return f', and {" and ".join(certain)} {verb} 100 % whatever the model does'


def next_steps(run: FinishedRun) -> list[Step]:
    """What to do next, most useful first."""
    workdir = shlex.quote(str(run.path))
    command = f'{run_command()} --workdir={workdir}'
    if not run.done:
        trained = f'Training is at step {run.step} of {run.config["steps"]}'
        return [Step(f'{trained}; the same command continues it.', command)]
    if not run.results:
        return [Step('Nothing was evaluated yet.', f'{command} --mode=eval')]
    steps = []
    found = numbers(run)
    if found and not any(number.is_good for number in found):
        steps.append(
            Step(
                'No result is surely above what an untrained network reaches: train longer or on '
                'more clips, and check that captions and sound belong to their clips '
                '(docs/data.md).',
                '',
            )
        )
    seed = run.config['seed'] + 1
    steps += [
        Step(
            'Embed your own clips, sounds and sentences with this model.',
            f"vatt_jax.load({str(run.path)!r}).embed(video='clip.mp4')",
        ),
        Step(
            'See how much is luck: the same training with another seed, by adding to its command',
            f'--config.seed={seed} --workdir={workdir}-seed{seed}',
        ),
        Step(
            'Then look at both runs side by side.',
            f'{command} --mode=report --compare={workdir}-seed{seed}',
        ),
    ]
    return steps
