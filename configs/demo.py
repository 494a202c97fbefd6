"""VATT on the playground, small enough for two CPU cores.

    python run.py                                          # this config, into runs/demo
    python run.py --config=configs/demo.py:agnostic        # one shared encoder for all modalities
    python run.py --config=configs/demo.py:shuffled        # control: audio and text of other clips; must stay at chance
    python run.py --config=configs/demo.py:synthetic       # no files, no TensorFlow
"""
from configs import default

VARIANTS = ('', 'agnostic', 'shuffled', 'synthetic')


def get_config(arg: str = ''):
    if arg not in VARIANTS:
        raise ValueError(f'configs/demo.py has no variant {arg!r}; there are {", ".join(v for v in VARIANTS if v)}')
    c = default.get_config()
    c.name = f'demo {arg}'.strip()
    c.steps, c.batch_size = 1500, 64
    c.jax_platform = 'cpu'
    c.report = False

    m = c.model
    m.inputs.video.update({'frames': 8, 'size': 64, 'fps': 4.0})
    m.inputs.audio.update({'samples': 16000, 'rate': 8000})
    m.inputs.text.update({'candidates': 3, 'words': 12})
    size = {'layers': 3, 'width': 128, 'mlp': 512, 'heads': 4, 'head_width': 32, 'dropout': 0.0, 'attention_dropout': 0.0}
    m.towers.video = {'name': 'vit', **size, 'patch': (2, 16, 16), 'drop_token': 0.5}
    m.towers.audio = {'name': 'wat', **size, 'patch': 256, 'drop_token': 0.5}
    m.towers.text = {'name': 't5', **size, 'layers': 2, 'vocab': 0, 'word_width': 64, 'frozen_words': False}
    m.head.update({'va': 128, 'vat': 64})
    if arg == 'agnostic':
        m.shared = True

    o = c.optimizer
    o.name, o.weight_decay, o.frozen, o.clip = 'adamw', 0.02, (), 1.0
    o.schedule.update({'peak': 1e-3, 'warmup': 100, 'end': 1e-5})

    d = c.data
    if arg == 'synthetic':
        d.source = 'synthetic'
    else:
        d.make = {'path': 'runs/data/playground', 'train': 1600, 'validation': 128, 'test': 256, 'seconds': 8.0, 'size': 64,
                  'fps': 8.0, 'rate': 8000, 'seed': 0}
        d.train.playground = {'path': 'runs/data/playground/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}
    c.checkpoint.every, c.log_every = 250, 25

    e = c.evals
    e.retrieval = {'type': 'retrieval', 'split': 'test', 'limit': 512}
    for stream in ('video', 'audio'):
        e[f'probe_{stream}'] = {'type': 'linear_probe', 'stream': stream, 'label': 'class', 'train_limit': 2400, 'test_limit': 768}
    return c
