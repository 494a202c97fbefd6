"""A causal language model on the captions of clips (docs/language_model.md).

python run.py --config=configs/language.py:demo --workdir=runs/language
    on the playground's captions, small enough for two CPU cores
python run.py --config=configs/language.py:demo,llama --workdir=runs/language_llama
    with rotary positions, RMS norms, SwiGLU and grouped queries
python run.py --config=configs/language.py:demo,synthetic --workdir=runs/try
    no files, no TensorFlow
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo

OPTIONS = ('synthetic', 'llama')


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo',), 'configs/language.py')
    for option in options:
        choose(option, OPTIONS, f'configs/language.py:{name} option')
    c = default.get_config()
    c.name = f'language model {" ".join([name, *options])}'
    c.steps, c.batch_size = 400, 64
    c.jax_platform = 'cpu'
    c.compiler_options = {
        'xla_cpu_use_fusion_emitters': False,
        'xla_llvm_disable_expensive_passes': True,
    }
    demo.set_model(c.model, shared=False)
    c.model.towers = ConfigDict({'text': tower('llama' in options)})
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({'name': 'next_token'})
    o = c.optimizer
    o.name, o.weight_decay, o.frozen, o.clip = 'adamw', 0.01, (), 1.0
    o.schedule.update({'peak': 3e-3, 'warmup': 40, 'end': 1e-5})
    demo.set_data(c.data, synthetic='synthetic' in options)
    c.checkpoint.every, c.log_every = 200, 25
    # What is told is words; evaluators compare vectors of clips.
    c.evals = ConfigDict()
    return c


def tower(llama: bool) -> dict:
    """Two layers; sentences have at most 12 words (`demo.set_model`)."""
    return {
        'name': 'language',
        'kind': 'llama' if llama else 'gpt2',
        'vocab': 0,
        'layers': 2,
        'width': 64,
        'mlp': 128,
        'heads': 4,
        'key_heads': 2 if llama else 4,
        'head_width': 16,
        'context': 16,
    }
