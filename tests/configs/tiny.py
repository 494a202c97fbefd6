"""The config of tests/tiny.py for runs that start from the command line, smaller still: what is tested starts many times.

python run.py --config=tests/configs/tiny.py[:kmeans|plain|prime|labels] --workdir=DIR
"""

from ml_collections import ConfigDict

from tests import tiny


def get_config(arg: str = ''):
    if arg not in ('', 'kmeans', 'plain', 'prime', 'labels'):
        raise ValueError(
            f'tests/configs/tiny.py has no variant {arg!r}; there are kmeans, plain, prime, labels'
        )
    c = tiny.config(
        steps=12, batch_size=8, data__synthetic_size=40, checkpoint__every=2, jax_platform='cpu'
    )
    for tower in c.model.towers.values():
        tower.layers = 1
    c.eval_every = 4
    c.evals = ConfigDict(
        {
            'retrieval': {
                'type': 'retrieval',
                'limit': 20,
                'pairs': (('audio', 'video', 'va'), ('text', 'video', 'vat')),
            },
            'probe': {
                'type': 'linear_probe',
                'train_limit': 32,
                'test_limit': 16,
                'strengths': (1.0,),
            },
        }
    )
    if arg == 'plain':
        c.evals, c.eval_every = ConfigDict(), 0
    if arg == 'prime':  # 37 test records, in batches of 16
        c.steps, c.batch_size, c.eval_every, c.data.synthetic_size = 4, 16, 0, 8 * 37
        c.evals = ConfigDict({'retrieval': {**c.evals.retrieval, 'limit': 1000}})
    if arg == 'labels':  # refreshes before steps 0 and 2, the second from where the first ended
        c.steps, c.batch_size, c.eval_every, c.data.synthetic_size = 4, 16, 0, 8 * 37
        c.objective = ConfigDict(
            {
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
        )
        c.evals = ConfigDict({'clusters': {'type': 'clustering', 'baseline': False}})
    if arg == 'kmeans':
        c.data.views = (('video.second', {'kind': 'clip'}),)
        c.objective = ConfigDict(
            {
                'name': 'kmeans_labels',
                'views': ('video', 'video.second', 'audio'),
                'clusters': 4,
                'every': 3,
                'iterations': 3,
            }
        )
        c.evals = ConfigDict({'probe': c.evals.probe})
    return c
