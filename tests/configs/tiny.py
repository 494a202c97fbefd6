"""The config of tests/tiny.py for runs that start from the command line.

Smaller still, since what is tested starts many times.

python run.py --config=tests/configs/tiny.py[:kmeans|plain|prime|labels|memory|host_memory] \
    --workdir=DIR
"""

from ml_collections import ConfigDict

from tests import tiny

VARIANTS = ('', 'kmeans', 'plain', 'prime', 'labels', 'memory', 'host_memory')
RETRIEVAL = {
    'type': 'retrieval',
    'limit': 20,
    'pairs': (('audio', 'video', 'va'), ('text', 'video', 'vat')),
}
PROBE = {'type': 'linear_probe', 'train_limit': 32, 'test_limit': 16, 'strengths': (1.0,)}
SELF_LABELLING = {
    'name': 'self_labelling',
    'views': ('video', 'audio'),
    'clusters': 4,
    'heads': 2,
    'groups': 2,
    'hidden': 8,
    'prior': 'gaussian',
    'refreshes': 3,
    'power': 1.0,
}
# CMA, with refreshes before steps 0 and 3.
INSTANCE_MEMORY = {
    'name': 'instance_memory',
    'negatives': 16,
    'positives': 3,
    'positive_negatives': 4,
    'every': 3,
}
KMEANS_LABELS = {
    'name': 'kmeans_labels',
    'views': ('video', 'video.second', 'audio'),
    'clusters': 4,
    'every': 3,
    'iterations': 3,
}


def get_config(arg: str = ''):
    if arg not in VARIANTS:
        raise ValueError(
            f'tests/configs/tiny.py: expected one of {", ".join(VARIANTS[1:])}, got {arg!r}'
        )
    c = tiny.config(
        steps=12, batch_size=8, data__synthetic_size=40, checkpoint__every=2, jax_platform='cpu'
    )
    for tower in c.model.towers.values():
        tower.layers = 1
    c.eval_every = 4
    c.evals = ConfigDict({'retrieval': RETRIEVAL, 'probe': PROBE})
    if arg == 'plain':
        c.eval_every = 0
        c.evals = ConfigDict()
    if arg in ('prime', 'labels'):
        # 37 test records, in batches of 16
        c.steps = 4
        c.batch_size = 16
        c.eval_every = 0
        c.data.synthetic_size = 8 * 37
    if arg == 'prime':
        c.evals = ConfigDict({'retrieval': {**RETRIEVAL, 'limit': 1000}})
    if arg == 'labels':
        # refreshes before steps 0 and 2, the second from where the first ended
        c.objective = ConfigDict(SELF_LABELLING)
        c.evals = ConfigDict({'clusters': {'type': 'clustering', 'baseline': False}})
    if arg in ('memory', 'host_memory'):
        # Every record comes more than once.
        c.steps, c.batch_size, c.eval_every = 6, 16, 0
        del c.model.towers['text']
        c.model.head = ConfigDict({'name': 'avid', 'hidden': 16, 'va': 8})
        c.objective = ConfigDict(INSTANCE_MEMORY)
        if arg == 'host_memory':
            c.objective.memory = 'host'
        c.evals = ConfigDict()
    if arg == 'kmeans':
        c.data.views = (('video.second', {'kind': 'clip'}),)
        c.objective = ConfigDict(KMEANS_LABELS)
        c.evals = ConfigDict({'probe': PROBE})
    return c
