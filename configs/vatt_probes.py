"""VATT's evaluations of frozen features as the release codes them, on prepared datasets.

    python -m vatt_jax.importers --format=vatt_tf --checkpoint=ckpt-500000 \\
        --config=configs/vatt.py:mbs --out=runs/vatt_mbs --vocabulary=words.txt
    python run.py --mode=eval --workdir=runs/vatt_mbs --config=configs/vatt_probes.py:hmdb51,mbs
        all folds; hmdb51,mbs,1: the first
    python run.py --mode=eval --workdir=runs/vatt_mbs --config=configs/vatt_probes.py:msrvtt,mbs

Tasks: ucf101, hmdb51 (folds 1-3), esc50 (1-5), youcook2, msrvtt. Records are looked for in
data/TASK/records (docs/datasets.md). Sizes: those of configs/vatt.py. A run of your own works as
well as an imported one. Minutes on one accelerator. What is published, and how surely:
docs/vatt.md.
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, vatt

NO_LIMIT = 1 << 20
# The probe learns from one middle clip of each example; four windows are tested and their
# probabilities (SVM: decision values) averaged.
PROBE = {
    'type': 'linear_probe',
    'windows': 4,
    'train_limit': NO_LIMIT,
    'test_limit': NO_LIMIT,
    'baseline': False,
}
RETRIEVAL = {
    'type': 'retrieval',
    'limit': NO_LIMIT,
    'windows': 4,
    'pairs': (('text', 'video', 'vat'),),
    'baseline': False,
}
# Task -> (stream of the probe, number of folds).
PROBE_TASKS = {'ucf101': ('video', 3), 'hmdb51': ('video', 3), 'esc50': ('audio', 5)}
# Task -> split of the gallery.
RETRIEVAL_TASKS = {'youcook2': 'validation', 'msrvtt': 'test'}


def get_config(arg: str = 'hmdb51,mbs') -> ConfigDict:
    task, *rest = (arg or 'hmdb51,mbs').split(',')
    choose(task, [*PROBE_TASKS, *RETRIEVAL_TASKS], 'configs/vatt_probes.py: task')
    size, *folds = rest or ['mbs']
    check_folds(task, size, folds)
    c = vatt.get_config(size)
    c.name = f'VATT {size} on {task}'
    # batch_size: clips at a time.
    c.compute_dtype, c.batch_size, c.report = 'float32', 32, False
    # Every other frame of 25 a second.
    c.model.inputs.video.fps = 12.5
    c.data.train = {task: default.records(f'data/{task}/records')}
    if task in RETRIEVAL_TASKS:
        gallery = {**RETRIEVAL, 'split': RETRIEVAL_TASKS[task]}
        c.evals = ConfigDict()
        c.evals.embeddings = {**gallery, 'pool': 'embeddings'}
        c.evals.cosines = {**gallery, 'pool': 'similarities'}
        return c
    stream, num_folds = PROBE_TASKS[task]
    probe = {**PROBE, 'stream': stream}
    if folds:
        c.data.train[task].fold = int(folds[0])
    else:
        # All clips are passed over once; labels say where each is in every fold.
        probe['train'] = 'clips'
        probe['folds'] = tuple((f'fold{i + 1}', 'test') for i in range(num_folds))
    c.evals = ConfigDict()
    for solver in ('head', 'svm'):
        c.evals[solver] = {**probe, 'solver': solver}
    return c


def check_folds(task: str, size: str, folds: list[str]) -> None:
    """Raises ValueError where a task has no such fold."""
    if task in RETRIEVAL_TASKS:
        if folds:
            raise ValueError(
                f'configs/vatt_probes.py: {task} has no folds, got {folds[-1]!r}; leave it out'
            )
        return
    _, num_folds = PROBE_TASKS[task]
    if len(folds) > 1:
        raise ValueError(
            f'configs/vatt_probes.py:{task}: expected one fold of {num_folds}, or none for all, '
            f'got {len(folds)}; leave out {folds[-1]!r}'
        )
    known = [str(i + 1) for i in range(num_folds)]
    for fold in folds:
        choose(fold, known, f'configs/vatt_probes.py:{task},{size} fold')
