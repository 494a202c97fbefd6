"""Fine-tuning VATT as published: actions in video, events in sound, objects in images.

    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpt-500000 \\
        --config=configs/vatt.py:mbs --out=runs/vatt_mbs
    python run.py --config=configs/vatt_finetune.py:k400,mbs --workdir=runs/k400 \\
        --config.init_from=runs/vatt_mbs
    python run.py --config=configs/vatt_finetune.py:imagenet,bbs,scratch --workdir=runs/scratch
        the same network from random initial values

Tasks: k400, k600, k700, mit, audioset, imagenet. Sizes: those of configs/vatt.py (default mbs). The
paper's batch is 64, the code's default 8 (`k400,mbs,code`); steps after the release's checkpoints.
What each published row needs: docs/vatt.md.

`demo` is the same recipe on the playground's classes, from the run of `make demo`, in minutes on
two CPU cores. Its table over numbers of labels is made by benchmarks/few_labels.py:

    python run.py --config=configs/vatt_finetune.py:demo,20 --workdir=runs/demo20
        from runs/demo, 20 labels of each class
    python run.py --config=configs/vatt_finetune.py:demo,20,scratch --workdir=runs/scratch20
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo, vatt


@dataclasses.dataclass(frozen=True)
class Task:
    """A published fine-tuning task.

    Attributes:
        stream: what is classified.
        steps: optimizer steps, after the release's checkpoints.
        split: the split that is tested: of these sets, the one with public labels.
        windows: clips of each example whose logits are averaged when testing.
        crops: squares of each frame, where it is longer than high.
    """

    stream: str
    steps: int
    split: str
    windows: int = 4
    crops: int = 3


TASKS = {
    'k400': Task('video', 100_000, 'validation'),
    'k600': Task('video', 100_000, 'validation'),
    'k700': Task('video', 100_000, 'validation'),
    'mit': Task('video', 150_000, 'validation'),
    'audioset': Task('audio', 50_000, 'test', crops=1),
    # An image has one window.
    'imagenet': Task('video', 100_000, 'validation', windows=1, crops=1),
}


def get_config(arg: str = 'k400') -> ConfigDict:
    name, *options = (arg or 'k400').split(',')
    choose(name, [*TASKS, 'demo'], 'configs/vatt_finetune.py: task')
    if name == 'demo':
        return demo_config(options)
    size = 'mbs'
    if options and options[0] not in ('scratch', 'code'):
        size = options.pop(0)
    for option in options:
        choose(option, ['scratch', 'code'], f'configs/vatt_finetune.py:{name},{size} option')
    task = TASKS[name]
    c = default.get_config()
    c.name = f'VATT {" ".join([size, *options])} on {name}'
    c.steps, c.compute_dtype = task.steps, 'bfloat16'
    c.batch_size = 8 if 'code' in options else 64
    if 'scratch' not in options:
        # An imported pretraining run or one of your own; the classifier alone starts fresh.
        c.init_from = f'runs/vatt_{size}'

    m = c.model
    pretrained = vatt.get_config(size).model
    m.update(pretrained)
    m.towers = {task.stream: pretrained.towers[task.stream]}
    m.head = {'name': 'none'}
    # 32 frames at stride 2 of 25 a second.
    m.inputs.video.fps = 12.5
    if name == 'imagenet':
        # One temporal patch: the image four times. The table keeps its 8 rows, of which the spline
        # reads the first. DropToken keeps half of a table's 1568 places, as in the official code:
        # with 196 tokens it drops none.
        m.inputs.video.frames = 4

    set_recipe(c, task.stream)
    if task.stream == 'audio':
        # Waveforms are mixed; what reads spectrograms (mmv) goes without.
        mixup = 0 if m.inputs.audio.mel else 5
        c.objective.update({'form': 'sigmoid', 'dropout': 0.0, 'smoothing': 0.0, 'mixup': mixup})
    d = c.data
    d.train[name] = default.records(f'data/{name}/records')
    # The crops of Inception.
    d.crop, d.aspect, d.flip = (0.08, 1.0), (0.5, 2.0), 0.5
    c.augment.audio_noise = 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 5_000, 10, 50
    c.evals = classification(task.split, windows=task.windows, crops=task.crops)
    return c


def set_recipe(c: ConfigDict, stream: str) -> None:
    """Objective and optimizer as published, in place: clipped by the backbone's gradient norm."""
    c.objective = {'name': 'classification', 'stream': stream, 'label': 'class'}
    o = c.optimizer
    o.name, o.momentum, o.weight_decay = 'keras_sgd', 0.9, 0.0
    o.clip, o.clip_paths, o.clip_lookups = 0.75, (r'^model/',), True
    o.frozen = (r'word_table',)
    o.schedule.update({'name': 'warmup_cosine', 'peak': 5e-3, 'warmup': 2_500, 'end': 0.0})


def classification(split: str, **fields: Any) -> dict[str, Any]:
    """The one evaluator of fine-tuning: scores of the trained classifier."""
    return {
        'classification': {'type': 'classification', 'label': 'class', 'split': split, **fields}
    }


def demo_config(options: list[str]) -> ConfigDict:
    """The published recipe at the size of the playground."""
    labels = [option for option in options if option.isdigit()]
    where = 'configs/vatt_finetune.py:demo option (a number of labels, or scratch)'
    for option in options:
        choose(option, ['scratch', *labels], where)
    c = demo.get_config()
    c.name = ' '.join(['fine-tuned demo', *options])
    c.steps, c.batch_size, c.report = 300, 64, False
    c.init_from = '' if 'scratch' in options else 'runs/demo'
    set_recipe(c, 'video')
    # A three-hundredth of the published steps, so ten times their rate; and the demo's milder crop:
    # a tenth of a scene does not tell its class.
    c.optimizer.schedule.update({'peak': 5e-2, 'warmup': 30})
    if labels:
        # Of the videos that pretraining saw without labels.
        c.data.train.playground.update({'label': 'class', 'per_class': int(labels[0])})
    # The playground's frames are square, so there is one square of each.
    c.evals = classification('test', windows=4)
    c.checkpoint.every = 300
    return c
