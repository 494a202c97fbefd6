"""Two and more trainings of tests/configs/tiny.py, one after the other, each of a few steps.

python run.py --config=tests/configs/phases.py[:reported|longer] --workdir=DIR
"""

from tests.configs import tiny

AUDIO = {'name': 'contrastive', 'pairs': (('video', 'audio', 'va', 1.0),)}
TEXT = {'name': 'contrastive', 'pairs': (('video', 'text', 'vat', 1.0),), 'form': 'mil_nce'}
# What the phase `audio` has no values for.
NEW = (r'text',)


def get_config(arg: str = ''):
    if arg not in ('', 'reported', 'longer'):
        raise ValueError(f'tests/configs/phases.py: expected reported or longer, got {arg!r}')
    c = tiny.get_config('plain')
    c.name = 'two phases'
    c.steps = 4
    c.phases = (
        ('audio', {'objective': AUDIO}),
        ('text', {'objective': TEXT, 'init_from': 'phase:audio', 'init_skip': NEW, 'seed': 1}),
    )
    if arg == 'longer':
        c.phases = (*c.phases, ('more', {'objective': TEXT, 'init_from': 'phase:text', 'seed': 1}))
    if arg == 'reported':
        c.report = True
        c.evals = {'probe': tiny.PROBE}
    return c
