"""ClipCap: a language model tells clips in words, after a prefix made of their embedding.

Mokady et al. (2021). Method, deviations and published numbers: docs/clipcap.md.

    python run.py --config=configs/clipcap.py:demo --workdir=runs/clipcap
        on the playground, two phases: towers of video and words, then captions
    python run.py --config=configs/clipcap.py:demo,transformer --workdir=runs/clipcap_transformer
        the other form: mapped by a Transformer, the language model stays as it is
    python run.py --config=configs/clipcap.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow

The captions of a finished run: vatt_jax.load('runs/clipcap/phases/2-captions').caption(video=…).
"""

from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo, language

OPTIONS = ('transformer', 'synthetic')
SPACE = 'joint'
# Paths of parameters that stay as they are.
PICTURES = (r'^model/(fronts|encoders)_video', r'^model/head/')
LANGUAGE = (r'^model/nets_text/',)


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo',), 'configs/clipcap.py')
    for option in options:
        choose(option, OPTIONS, f'configs/clipcap.py:{name} option')
    c = default.get_config()
    c.name = f'ClipCap {" ".join([name, *options])}'
    c.steps, c.batch_size = 600, 64
    c.jax_platform = 'cpu'
    c.compiler_options = demo.get_config().compiler_options
    c.report = True
    demo.set_model(c.model, shared=False)
    c.model.towers = ConfigDict({'video': c.model.towers.video, 'text': language.tower(False)})
    # Room for a prefix and the twelve words of a sentence.
    c.model.towers.text['context'] = 24
    c.model.head = ConfigDict({'name': SPACE, SPACE: 64})
    o = c.optimizer
    o.name, o.weight_decay, o.frozen, o.clip = 'adamw', 0.01, (), 1.0
    o.schedule.update({'peak': 1e-3, 'warmup': 60, 'end': 1e-5})
    demo.set_data(c.data, synthetic='synthetic' in options)
    c.checkpoint.every, c.log_every = 200, 25
    c.phases = (
        ('towers', towers_phase()),
        ('captions', captions_phase('transformer' in options)),
    )
    return c


def towers_phase() -> dict[str, Any]:
    """Video learns from words, and the language model to tell each word from those before it."""
    match = {'name': 'contrastive', 'pairs': (('video', 'text', SPACE, 1.0),), 'form': 'clip'}
    return {
        'objective': {
            'name': 'multi_task',
            'tasks': {'match': match, 'words': {'name': 'next_token'}},
        },
        'evals': {'probe_video': demo.evaluations().probe_video.to_dict()},
    }


def captions_phase(is_transformer: bool) -> dict[str, Any]:
    """The mapper learns, with the language model or beside it as it is."""
    objective: dict[str, Any] = {'name': 'captioning', 'media': 'video', 'prefix': 4}
    if is_transformer:
        objective.update({'mapper': 'transformer', 'tokens': 4, 'layers': 2, 'heads': 4})
    return {
        'steps': 400,
        'init_from': 'phase:towers',
        'optimizer.frozen': (*PICTURES, *LANGUAGE) if is_transformer else PICTURES,
        'optimizer.schedule.warmup': 40,
        'objective': objective,
        'evals': {'captions': {'type': 'captions', 'limit': 256}},
    }
