"""Self-labelling on the playground: classes of scenes found without labels, by towers of the demo's size. docs/self_labelling.md

    python run.py --config=configs/selavi.py:demo --workdir=runs/selavi               # SeLaVi: alignment, Gaussian sizes, 4 heads in 2 groups
    python run.py --config=configs/selavi.py:demo,one_head --workdir=runs/one_head    # one ingredient less: one_head | unaligned | uniform
    python run.py --config=configs/selavi.py:demo,sela --workdir=runs/sela            # video alone
    python run.py --config=configs/selavi.py:demo,xdc --workdir=runs/xdc              # k-means labels of the other modality
    python run.py --config=configs/selavi.py:demo,swav --workdir=runs/swav            # online codes of pairs of views
    python run.py --config=configs/selavi.py:demo,synthetic --workdir=runs/synthetic  # no files, no TensorFlow

Videos here hold one scene each, because a record has one label. The results' table compares with k-means of the features, and with both at
random initialisation.
"""
from ml_collections import ConfigDict

from configs import demo

CLASSES = 16
OPTIONS = ('demo', 'one_head', 'unaligned', 'uniform', 'sela', 'xdc', 'swav', 'synthetic')


def get_config(arg: str = 'demo'):
    options = arg.split(',')
    for o in options:
        if o not in OPTIONS:
            raise ValueError(f'configs/selavi.py has no option {o!r}; there are {", ".join(OPTIONS)}')
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    c.name = f'selavi {" ".join(options)}'
    c.steps = 1000
    del c.model.towers['text']
    c.model.head = ConfigDict({'name': 'none'})
    for tower in c.model.towers.values():
        tower.drop_token = 0.25

    o = c.objective = ConfigDict({
        'name': 'self_labelling', 'views': ('video', 'audio'), 'clusters': CLASSES, 'heads': 4, 'groups': 2, 'hidden': 128, 'dropout': 0.1,
        'prior': 'gaussian', 'refreshes': 40, 'warmup': 10})
    if 'one_head' in options:
        o.heads = o.groups = 1
    if 'unaligned' in options:
        o.align = False
    if 'uniform' in options:
        o.prior = 'uniform'
    if 'sela' in options:
        o.views = ('video',)
        del c.model.towers['audio']
    if 'xdc' in options:
        c.objective = ConfigDict({'name': 'kmeans_labels', 'views': ('video', 'audio'), 'targets': 'other', 'clusters': CLASSES, 'every': 100})
    if 'swav' in options:
        c.objective = ConfigDict({'name': 'online_codes', 'views': ('video', 'audio'), 'clusters': 64, 'width': 64, 'hidden': 128})

    if 'synthetic' not in options:
        c.data.make.update({'path': 'runs/data/scenes', 'train': 1200, 'validation': 16, 'test': 256, 'seconds': 3.0, 'episodes': 1})
        c.data.train = ConfigDict({'scenes': {'path': 'runs/data/scenes/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}})

    e = c.evals = ConfigDict()
    if c.objective.name == 'self_labelling':
        e.clusters = {'type': 'clustering'}
        e.clusters_test = {'type': 'clustering', 'split': 'test'}
    for stream in tuple(c.model.towers):
        e[f'kmeans_{stream}'] = {'type': 'clustering', 'of': 'features', 'streams': (stream,)}
        e[f'probe_{stream}'] = {'type': 'linear_probe', 'stream': stream, 'label': 'class', 'train_limit': 1200, 'test_limit': 256}
    if len(c.model.towers) > 1:
        e.kmeans = {'type': 'clustering', 'of': 'features', 'streams': ('video', 'audio')}
    return c
