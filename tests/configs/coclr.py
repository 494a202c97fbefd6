"""InfoNCE and CoCLR by networks of one layer, on the synthetic source.

python run.py --config=tests/configs/coclr.py[:infonce|coclr|chain] --workdir=DIR
"""

from ml_collections import ConfigDict

from tests import small_nets, tiny

assert small_nets  # registers its networks
# Three batches of 16 fill it.
QUEUE, MOMENTUM = 40, 0.9


def get_config(arg: str = 'infonce'):
    # The sampler is named on the command line.
    config = coclr_config('') if arg == 'coclr' else infonce_config()
    config.jax_platform = 'cpu'
    if arg == 'chain':
        config.steps = 4
        config.phases = chain()
    return config


def chain():
    """InfoNCE on sound, then CoCLR on video with it."""
    sound = infonce_config('audio')
    mining = coclr_config('phase:sound')
    found = []
    for name, phase in (('sound', sound), ('video', mining)):
        fields = {
            'model.towers': phase.model.towers.to_dict(),
            'data.views': phase.data.views,
            'objective': phase.objective.to_dict(),
        }
        found.append((name, fields))
    return tuple(found)


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
