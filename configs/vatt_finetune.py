"""Fine-tuning VATT as published: actions in video, events in sound, objects in images.

    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpt-500000 --config=configs/vatt.py:mbs --out=runs/vatt_mbs
    python run.py --config=configs/vatt_finetune.py:k400,mbs --workdir=runs/k400 --config.init_from=runs/vatt_mbs

    python run.py --config=configs/vatt_finetune.py:imagenet,bbs,scratch --workdir=runs/imagenet_scratch      # the same network from nothing

    python run.py --config=configs/vatt_finetune.py:demo,20 --workdir=runs/demo20            # from runs/demo, 20 labels of each class
    python run.py --config=configs/vatt_finetune.py:demo,20,scratch --workdir=runs/scratch20 # the same network from nothing

Tasks: k400, k600, k700, mit, audioset, imagenet. Sizes: those of configs/vatt.py (default mbs). The paper's batch is 64, the code's default 8
(`k400,mbs,code`); steps after the release's checkpoints. What each published row needs: docs/vatt.md. `demo` is the same recipe on the playground's
classes, from the run of `make demo`, minutes on two CPU cores; table over numbers of labels: benchmarks/few_labels.py.
"""

from configs import default, demo, vatt
from vatt_jax.config import choose

# task -> (stream, steps, split that is tested: of these sets the one with public labels). K400/600/700 90-100 k steps, Moments in Time 150 k,
# AudioSet 50 k
TASKS = {
    'k400': ('video', 100_000, 'validation'),
    'k600': ('video', 100_000, 'validation'),
    'k700': ('video', 100_000, 'validation'),
    'mit': ('video', 150_000, 'validation'),
    'audioset': ('audio', 50_000, 'test'),
    'imagenet': ('video', 100_000, 'validation'),
}


def get_config(arg: str = 'k400'):
    task, *options = (arg or 'k400').split(',')
    choose(task, [*TASKS, 'demo'], 'configs/vatt_finetune.py: task')
    if task == 'demo':
        return _demo(options)
    size, *options = (
        options if options and options[0] not in ('scratch', 'code') else ['mbs', *options]
    )
    for option in options:
        choose(option, ['scratch', 'code'], f'configs/vatt_finetune.py:{task},{size} option')
    stream, steps, split = TASKS[task]
    pretrained = vatt.get_config(size)
    c = default.get_config()
    c.name = f'VATT {" ".join([size, *options])} on {task}'
    c.steps, c.batch_size, c.compute_dtype = steps, 8 if 'code' in options else 64, 'bfloat16'
    c.init_from = (
        '' if 'scratch' in options else 'runs/vatt_' + size
    )  # an imported or own pretraining run; the classifier alone starts fresh
    m = c.model
    m.update(pretrained.model)
    m.towers = {stream: pretrained.model.towers[stream]}
    m.head = {'name': 'none'}
    m.inputs.video.fps = 12.5  # 32 frames at stride 2 of 25
    if task == 'imagenet':  # one temporal patch: the image four times
        # The table keeps its 8 rows, of which the spline reads the first. DropToken keeps half of a table's 1568 places, as in the official
        # code: with 196 tokens it drops none.
        m.inputs.video.frames = 4
    _recipe(c, stream)
    if stream == 'audio':
        # Waveforms are mixed; what reads spectrograms (mmv) goes without.
        c.objective.update(
            {
                'form': 'sigmoid',
                'dropout': 0.0,
                'smoothing': 0.0,
                'mixup': 0 if m.inputs.audio.mel else 5,
            }
        )
    d = c.data
    d.train[task] = {'path': f'data/{task}/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}
    d.crop, d.aspect, d.flip = (0.08, 1.0), (0.5, 2.0), 0.5  # Inception style
    c.augment.audio_noise = 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 5_000, 10, 50
    # Four windows; three squares of each frame where it is longer than high. An image has one window.
    views = {'video': (4, 3), 'audio': (4, 1)}[stream] if task != 'imagenet' else (1, 1)
    c.evals = {
        'classification': {
            'type': 'classification',
            'label': 'class',
            'split': split,
            'windows': views[0],
            'crops': views[1],
        }
    }
    return c


def _recipe(c, stream: str) -> None:
    """Objective and optimizer as published, the clip by the gradient's norm on the backbone alone."""
    c.objective = {'name': 'classification', 'stream': stream, 'label': 'class'}
    o = c.optimizer
    o.name, o.momentum, o.clip, o.clip_paths, o.weight_decay, o.frozen = (
        'keras_sgd',
        0.9,
        0.75,
        (r'^model/',),
        0.0,
        (r'word_table',),
    )
    o.schedule.update({'name': 'warmup_cosine', 'peak': 5e-3, 'warmup': 2_500, 'end': 0.0})


def _demo(options):
    labels = [o for o in options if o.isdigit()]
    for option in options:
        choose(
            option,
            ['scratch', *labels],
            'configs/vatt_finetune.py:demo option (a number of labels, or scratch)',
        )
    c = demo.get_config()
    c.name = ' '.join(['fine-tuned demo', *options])
    c.steps, c.batch_size, c.report = 300, 64, False
    c.init_from = '' if 'scratch' in options else 'runs/demo'
    _recipe(c, 'video')
    # A three-hundredth of the published steps, so ten times their rate; and the demo's milder crop: a tenth of a scene does not tell its class.
    c.optimizer.schedule.update({'peak': 5e-2, 'warmup': 30})
    if labels:  # of the videos that pretraining saw without labels
        c.data.train.playground.update({'label': 'class', 'per_class': int(labels[0])})
    # The playground's frames are square, so there is one square of each.
    c.evals = {
        'classification': {
            'type': 'classification',
            'label': 'class',
            'split': 'test',
            'windows': 4,
        }
    }
    c.checkpoint.every = 300
    return c
