"""InfoNCE and CoCLR by networks of one layer, on the synthetic source.

python run.py --config=tests/configs/coclr.py[:infonce|coclr] --workdir=DIR
"""

from ml_collections import ConfigDict

from tests import small_nets, tiny

assert small_nets  # registers its networks
# Three batches of 16 fill it.
QUEUE, MOMENTUM = 40, 0.9


def get_config(arg: str = 'infonce'):
    # The sampler is named on the command line.
    config = infonce_config() if arg == 'infonce' else coclr_config('')
    config.jax_platform = 'cpu'
    return config


def infonce_config(modality='video', normed=True, **overrides):
    config = tiny.config(optimizer__schedule__warmup=0, checkpoint__keep=10, **overrides)
    config.model.towers = ConfigDict({modality: {'name': f'small_{modality}', 'normed': normed}})
    config.model.head = ConfigDict({'name': 'projection', 'hidden': 10, 'projection': 8})
    second = f'{modality}.second'
    config.data.views = ((second, {'kind': 'clip'}),)
    config.objective = ConfigDict(
        {
            'name': 'coclr',
            'query': modality,
            'key': second,
            'queue': QUEUE,
            'momentum': MOMENTUM,
        }
    )
    return config


def coclr_config(sampler, **overrides):
    config = infonce_config(**overrides)
    config.data.views = (*config.data.views, ('audio.second', {'kind': 'clip'}))
    config.objective.update(
        {'sampler_stream': 'audio.second', 'sampler': str(sampler), 'nearest': 3}
    )
    return config
