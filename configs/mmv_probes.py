"""MMV's probes of frozen features as published, on labelled data that were prepared (docs/data.md), for an imported run or one of your own.

    python -m vatt_jax.importers --format=mmv --checkpoint=mmv_s3d.pkl --config=configs/mmv.py:s3d_fac_vat --out=runs/mmv_s3d
    python run.py --mode=eval --workdir=runs/mmv_s3d --config=configs/mmv_probes.py:ucf101,s3d_fac_vat
    python run.py --mode=eval --workdir=runs/mmv_fac_vat --config=configs/mmv_probes.py:demo,demo_fac_vat     # on the playground

Tasks: ucf101, hmdb51, esc50, audioset, youcook2, msrvtt, demo; records are looked for in data/TASK/records. The second part is the network, an
argument of configs/mmv.py. What of the protocols is published, and what is our choice: docs/mmv.md.
"""

from ml_collections import ConfigDict

from configs import mmv
from vatt_jax.config import choose

HMDB_C = {
    's3d': 3e-4,
    's3d_pixels': 3e-4,
    'tsm50': 1e-4,
    'tsm50x2': 3e-4,
}  # published for the released networks
SVM = {
    'type': 'linear_probe',
    'solver': 'svm',
    'standardise': True,
    'passes': 10,
    'windows': 10,
    'train_limit': 1 << 20,
    'test_limit': 1 << 20,
    'baseline': False,
}


def folds(count):
    """All clips are passed over once; the labels fold1, … say which are tested in each official division (docs/datasets.md)."""
    return {'train': 'clips', 'folds': tuple((f'fold{i + 1}', 'test') for i in range(count))}


RETRIEVAL = {
    'type': 'retrieval',
    'limit': 1 << 20,
    'windows': 4,
    'pool': 'embeddings',
    'pairs': (('text', 'video', 'vat'),),
    'baseline': False,
}


def get_config(arg: str = 'ucf101,s3d_fac_vat'):
    task, _, network = (arg or 'ucf101,s3d_fac_vat').partition(',')
    choose(task, TASKS, 'configs/mmv_probes.py: task')
    c = mmv.get_config(network or ('demo_fac_vat' if task == 'demo' else 's3d_fac_vat'))
    c.name = f'{c.name} on {task}'
    c.report = False
    c.evals = ConfigDict()
    if task != 'demo':
        c.compute_dtype, c.batch_size = 'float32', 32  # as the release evaluates; clips at a time
        c.data.train = {
            task: {'path': f'data/{task}/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}
        }
        c.data.flip = 0.5
    TASKS[task](c, network.partition('_')[0])
    return c


def ucf101(c, backbone):
    """32 frames, every other one of 25 a second; 224 pixels. Frames are 320×240: a square of their full height."""
    c.model.inputs.video.update({'fps': 12.5, 'size': 224})
    c.data.crop, c.data.aspect = (0.75, 0.75), (1.0, 1.0)
    c.evals.svm = {**SVM, 'strengths': (1e-3,), **folds(3)}


def hmdb51(c, backbone):
    """32 frames one after the other; 200 of 224 pixels, of squares, as frames differ in shape. That the files have 25 a second is our reading."""
    c.model.inputs.video.update({'fps': 25.0, 'size': 200})
    c.data.crop, c.data.aspect = (0.8, 0.8), (1.0, 1.0)
    c.evals.svm = {**SVM, 'strengths': (HMDB_C.get(backbone, 3e-4),), **folds(3)}


def esc50(c, backbone):
    """Sound alone, five folds."""
    c.evals.svm = {**SVM, 'stream': 'audio', 'strengths': (1e-3,), **folds(5)}


def audioset(c, backbone):
    c.evals.mlp = {
        **SVM,
        'solver': 'mlp',
        'standardise': False,
        'stream': 'audio',
        'strengths': (),
        'passes': 1,
        'epochs': 30,
    }


def youcook2(c, backbone):
    c.evals.zero_shot = {**RETRIEVAL, 'split': 'validation'}


def msrvtt(c, backbone):
    c.evals.zero_shot = {**RETRIEVAL, 'split': 'test', 'limit': 1000}


def demo(c, backbone):
    """The same on the playground, with fewer passes; clips of a known class."""
    some = {'passes': 3, 'windows': 4, 'train_limit': 1200, 'test_limit': 512}
    for stream in ('video', 'audio'):
        if stream in c.model.towers:
            c.evals[f'svm_{stream}'] = {**SVM, **some, 'stream': stream, 'strengths': (1e-3,)}
            c.evals[f'mlp_{stream}'] = {
                **SVM,
                **some,
                'stream': stream,
                'solver': 'mlp',
                'standardise': False,
                'strengths': (),
                'epochs': 30,
            }
    if 'vat' in c.model.head:
        c.evals.zero_shot = {**RETRIEVAL, 'limit': 512}


TASKS = {f.__name__: f for f in (ucf101, hmdb51, esc50, audioset, youcook2, msrvtt, demo)}
