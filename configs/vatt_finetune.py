"""Fine-tuning VATT as published: actions in video, events in sound, objects in images. (On the playground: configs/finetune.py.)

    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpt-500000 --config=configs/vatt.py:mbs --out=runs/vatt_mbs
    python run.py --config=configs/vatt_finetune.py:k400,mbs --workdir=runs/k400 --config.init_from=runs/vatt_mbs

Tasks: k400, k600, k700, mit, audioset, imagenet. Sizes: those of configs/vatt.py (default mbs). The paper's batch is 64, the code's default 8;
steps after the release's checkpoints. What each published row needs: docs/vatt.md.
"""
from configs import default, vatt
from vatt_jax.config import choose

# task -> (stream, steps): K400/600/700 90-100 k, Moments in Time 150 k, AudioSet 50 k
TASKS = {'k400': ('video', 100_000), 'k600': ('video', 100_000), 'k700': ('video', 100_000), 'mit': ('video', 150_000),
         'audioset': ('audio', 50_000), 'imagenet': ('video', 100_000)}


def get_config(arg: str = 'k400'):
    task, *options = (arg or 'k400').split(',')
    choose(task, TASKS, 'configs/vatt_finetune.py: task')
    size = options[0] if options else 'mbs'
    stream, steps = TASKS[task]
    pretrained = vatt.get_config(size)
    c = default.get_config()
    c.name = f'VATT {size} on {task}'
    c.steps, c.batch_size, c.compute_dtype = steps, 64, 'bfloat16'
    c.init_from = 'runs/vatt_' + size    # an imported or own pretraining run; the classifier alone starts fresh
    m = c.model
    m.update(pretrained.model)
    m.towers = {stream: pretrained.model.towers[stream]}
    m.head = {'name': 'none'}
    m.inputs.video.fps = 12.5            # 32 frames at stride 2 of 25
    if task == 'imagenet':               # one temporal patch: the image four times; the temporal table is resized to one row
        m.inputs.video.frames, m.towers.video.positions = 4, (1, 14, 14)

    c.objective = {'name': 'classification', 'stream': stream, 'label': 'class'}
    if stream == 'audio':
        c.objective.update({'form': 'sigmoid', 'dropout': 0.0, 'smoothing': 0.0, 'mixup': 5})
    o = c.optimizer
    o.name, o.momentum, o.clip, o.clip_paths = 'keras_sgd', 0.9, 0.75, (r'^model/',)
    o.schedule.update({'name': 'warmup_cosine', 'peak': 5e-3, 'warmup': 2_500, 'end': 0.0})

    d = c.data
    d.train[task] = {'path': f'data/{task}/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}
    d.crop, d.aspect, d.flip = (0.08, 1.0), (0.5, 2.0), 0.5    # Inception style
    c.augment.audio_noise = 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 5_000, 10, 50
    c.evals = {'classification': {'type': 'classification', 'label': 'class', 'split': 'test'}}
    return c
