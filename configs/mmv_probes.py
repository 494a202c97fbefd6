"""MMV's probes of frozen features as published, on labelled data that were prepared.

    python -m vatt_jax.importers --format=mmv --checkpoint=mmv_s3d.pkl \\
        --config=configs/mmv.py:s3d_fac_vat --out=runs/mmv_s3d
    python run.py --mode=eval --workdir=runs/mmv_s3d \\
        --config=configs/mmv_probes.py:ucf101,s3d_fac_vat
    python run.py --mode=eval --workdir=runs/mmv_fac_vat \\
        --config=configs/mmv_probes.py:demo,demo_fac_vat
        on the playground

Tasks: ucf101, hmdb51, esc50, audioset, youcook2, msrvtt, demo. Records are looked for in
data/TASK/records (docs/data.md). The second part is the network, an argument of configs/mmv.py.
What of the protocols is published, and what is our choice: docs/mmv.md.
"""

from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, mmv

NO_LIMIT = 1 << 20
# Regularisation of HMDB-51's classifier, published for the released networks.
HMDB_STRENGTHS = {'s3d': 3e-4, 's3d_pixels': 3e-4, 'tsm50': 1e-4, 'tsm50x2': 3e-4}
SVM = {
    'type': 'linear_probe',
    'solver': 'svm',
    'standardise': True,
    'passes': 10,
    'windows': 10,
    'train_limit': NO_LIMIT,
    'test_limit': NO_LIMIT,
    'baseline': False,
}
MLP = {**SVM, 'solver': 'mlp', 'standardise': False, 'strengths': (), 'epochs': 30}
RETRIEVAL = {
    'type': 'retrieval',
    'limit': NO_LIMIT,
    'windows': 4,
    'pool': 'embeddings',
    'pairs': (('text', 'video', 'vat'),),
    'baseline': False,
}


def get_config(arg: str = 'ucf101,s3d_fac_vat') -> ConfigDict:
    task, _, network = (arg or 'ucf101,s3d_fac_vat').partition(',')
    choose(task, TASKS, 'configs/mmv_probes.py: task')
    if not network:
        network = 'demo_fac_vat' if task == 'demo' else 's3d_fac_vat'
    c = mmv.get_config(network)
    c.name = f'{c.name} on {task}'
    c.report = False
    c.evals = ConfigDict()
    if task != 'demo':
        # As the release evaluates; batch_size: clips at a time.
        c.compute_dtype, c.batch_size = 'float32', 32
        c.data.train = {task: default.records(f'data/{task}/records')}
        c.data.flip = 0.5
    backbone = network.partition('_')[0]
    TASKS[task](c, backbone)
    return c


def over_folds(count: int) -> dict[str, Any]:
    """Fields of a probe over all official divisions.

    All clips are passed over once; the labels fold1, ... say which are tested in each division
    (docs/datasets.md).
    """
    return {'train': 'clips', 'folds': tuple((f'fold{i + 1}', 'test') for i in range(count))}


def ucf101(c: ConfigDict, backbone: str) -> None:
    """32 frames, every other one of 25 a second; 224 pixels."""
    c.model.inputs.video.update({'fps': 12.5, 'size': 224})
    # Frames are 320×240: a square of their full height.
    c.data.crop, c.data.aspect = (0.75, 0.75), (1.0, 1.0)
    c.evals.svm = {**SVM, 'strengths': (1e-3,), **over_folds(3)}


def hmdb51(c: ConfigDict, backbone: str) -> None:
    """32 frames one after the other; 200 of 224 pixels.

    Of squares, as frames differ in shape. That the files have 25 frames a second is our reading.
    """
    c.model.inputs.video.update({'fps': 25.0, 'size': 200})
    c.data.crop, c.data.aspect = (0.8, 0.8), (1.0, 1.0)
    strength = HMDB_STRENGTHS.get(backbone, 3e-4)
    c.evals.svm = {**SVM, 'strengths': (strength,), **over_folds(3)}


def esc50(c: ConfigDict, backbone: str) -> None:
    """Sound alone, five folds."""
    c.evals.svm = {**SVM, 'stream': 'audio', 'strengths': (1e-3,), **over_folds(5)}


def audioset(c: ConfigDict, backbone: str) -> None:
    """Sound alone, a small network instead of a linear classifier."""
    c.evals.mlp = {**MLP, 'stream': 'audio', 'passes': 1}


def youcook2(c: ConfigDict, backbone: str) -> None:
    """Zero-shot retrieval of clips by their captions."""
    c.evals.zero_shot = {**RETRIEVAL, 'split': 'validation'}


def msrvtt(c: ConfigDict, backbone: str) -> None:
    """Zero-shot retrieval among 1000 clips."""
    c.evals.zero_shot = {**RETRIEVAL, 'split': 'test', 'limit': 1000}


def demo(c: ConfigDict, backbone: str) -> None:
    """The same on the playground, with fewer passes; clips of a known class."""
    fewer = {'passes': 3, 'windows': 4, 'train_limit': 1200, 'test_limit': 512}
    for stream in ('video', 'audio'):
        if stream in c.model.towers:
            c.evals[f'svm_{stream}'] = {**SVM, **fewer, 'stream': stream, 'strengths': (1e-3,)}
            c.evals[f'mlp_{stream}'] = {**MLP, **fewer, 'stream': stream}
    if 'vat' in c.model.head:
        c.evals.zero_shot = {**RETRIEVAL, 'limit': 512}


TASKS = {
    'ucf101': ucf101,
    'hmdb51': hmdb51,
    'esc50': esc50,
    'audioset': audioset,
    'youcook2': youcook2,
    'msrvtt': msrvtt,
    'demo': demo,
}
