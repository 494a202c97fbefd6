"""Classifying the playground's events and objects from few labels, from the run of `make demo`.

python run.py --config=configs/finetune.py --workdir=runs/finetune
    from runs/demo
python run.py --config=configs/finetune.py:scratch --workdir=runs/finetune_scratch
    the same network from random initial values
"""

from ml_collections import ConfigDict

from . import demo


def get_config(arg: str = '') -> ConfigDict:
    if arg not in ('', 'scratch'):
        raise ValueError(f'configs/finetune.py: expected scratch or nothing, got {arg!r}')
    c = demo.get_config()
    c.name = f'finetune {arg}'.strip()
    c.steps, c.batch_size = 300, 64
    c.init_from = '' if arg == 'scratch' else 'runs/demo'
    c.report = False
    c.objective = {'name': 'classification', 'stream': 'video', 'label': 'class'}

    o = c.optimizer
    o.schedule.update({'peak': 3e-4, 'warmup': 30, 'end': 1e-6})
    # The new classifier learns faster than what is already trained.
    o.rates = ((r'^objective/', 5.0),)

    # The validation split, never seen in pretraining, is the labelled set: 8 videos' worth of
    # segments for each class.
    c.data.train.playground.split = 'validation'
    c.evals = {'classification': {'type': 'classification', 'label': 'class', 'split': 'test'}}
    c.checkpoint.every = 300
    return c
