"""VATT's evaluations of frozen features as the release codes them, on prepared datasets (docs/datasets.md), for an imported run or one of your own.

    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpt-500000 --config=configs/vatt.py:mbs --out=runs/vatt_mbs --vocabulary=words.txt
    python run.py --mode=eval --workdir=runs/vatt_mbs --config=configs/vatt_probes.py:hmdb51,mbs       # all folds; hmdb51,mbs,1: the first
    python run.py --mode=eval --workdir=runs/vatt_mbs --config=configs/vatt_probes.py:msrvtt,mbs

Tasks: ucf101, hmdb51 (folds 1-3), esc50 (1-5), youcook2, msrvtt; records are looked for in data/TASK/records. Sizes: those of configs/vatt.py.
Minutes on one accelerator. What is published of them, and how surely: docs/vatt.md.
"""

from ml_collections import ConfigDict

from configs import vatt
from vatt_jax.config import choose

ALL = 1 << 20
# One middle clip to learn from, four windows tested, probabilities (SVM: decision values) averaged.
PROBE = {
    'type': 'linear_probe',
    'windows': 4,
    'train_limit': ALL,
    'test_limit': ALL,
    'baseline': False,
}
RETRIEVAL = {
    'type': 'retrieval',
    'limit': ALL,
    'windows': 4,
    'pairs': (('text', 'video', 'vat'),),
    'baseline': False,
}
# task -> (stream of the probe, folds) or (None, split)
TASKS = {
    'ucf101': ('video', 3),
    'hmdb51': ('video', 3),
    'esc50': ('audio', 5),
    'youcook2': (None, 'validation'),
    'msrvtt': (None, 'test'),
}


def get_config(arg: str = 'hmdb51,mbs'):
    task, *rest = (arg or 'hmdb51,mbs').split(',')
    stream, of = TASKS[choose(task, TASKS, 'configs/vatt_probes.py: task')]
    size, *fold = rest or ['mbs']
    if len(fold) > (1 if stream else 0):
        wanted = (
            f'one fold of {of}, or none for all, is wanted' if stream else f'{task} has no folds'
        )
        raise ValueError(f'configs/vatt_probes.py:{arg}: {wanted}; leave out {fold[-1]!r}')
    for option in fold:
        choose(
            option, [str(i + 1) for i in range(of)], f'configs/vatt_probes.py:{task},{size} fold'
        )
    c = vatt.get_config(size)
    c.name = f'VATT {size} on {task}'
    c.compute_dtype, c.batch_size, c.report = 'float32', 32, False  # clips at a time
    c.model.inputs.video.fps = 12.5  # every other frame of 25 a second
    c.data.train = {
        task: {'path': f'data/{task}/records', 'split': 'train', 'weight': 1.0, 'share': 0.0}
    }
    if stream:
        if fold:
            probe, c.data.train[task].fold = PROBE, int(fold[0])
        else:  # all clips once, and where each is in every fold
            probe = {
                **PROBE,
                'train': 'clips',
                'folds': tuple((f'fold{i + 1}', 'test') for i in range(of)),
            }
        c.evals = ConfigDict(
            {solver: {**probe, 'stream': stream, 'solver': solver} for solver in ('head', 'svm')}
        )
    else:
        c.evals = ConfigDict(
            {
                name: {**RETRIEVAL, 'split': of, 'pool': pool}
                for name, pool in (('embeddings', 'embeddings'), ('cosines', 'similarities'))
            }
        )
    return c
