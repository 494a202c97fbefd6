"""ELo: many self-supervised tasks and distillation, in a sum whose weights are evolved.

Piergiovanni, Angelova and Ryoo (2020). Method, what is left out and what of the settings is
certain: docs/elo.md.

    python run.py --config=configs/elo.py:demo --workdir=runs/elo
        on the playground, video and sound, with the weights below
    python -m vatt_jax.evolve --workdir=runs/elo_search --config=elo --config.steps=100
        the search for weights: 40 short runs
    python run.py --config=configs/elo.py:demo,synthetic --workdir=runs/elo_synthetic
        no files, no TensorFlow
    python run.py --config=configs/elo.py:demo,flow --workdir=runs/elo_flow \\
        "--config.data.train={'mine': {'path': 'data/mine'}}"
        optical flow as well, on data that were prepared with --flow (docs/data.md);
        demo,flow,synthetic: in closed form
    python run.py --config=configs/elo.py:kinetics --workdir=runs/elo_kinetics
        the published networks on video, flow and sound; youtube8m too; kinetics,stages: with
        distillation of two more stages

Weights are fields, too: --config.objective.weights.distilled_audio=0.5, and 0 leaves a task out.
"""

from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets

from . import coclr, default, mmv, selavi

# Name -> clips; what can be downloaded of Kinetics becomes fewer.
DATASETS = {'kinetics': 230_976, 'youtube8m': 2_000_000}
# stages: features of two more stages of the towers are distilled, beside the pooled ones.
OPTIONS = {'demo': ('flow', 'stages', 'synthetic'), **{name: ('stages',) for name in DATASETS}}
STAGES = (2, 3)
EPOCHS = 100
# Distances of features are larger than the other losses by about so much.
DISTILLATION_WEIGHT = 0.1
SPACE = 'joint'


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, OPTIONS, 'configs/elo.py')
    for option in options:
        choose(option, OPTIONS[name], f'configs/elo.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(name)
    c.name = f'ELo {" ".join([name, *options])}'
    others = tuple(modality for modality in c.model.towers if modality != 'video')
    c.objective = objective(others, STAGES if 'stages' in options else ())
    set_evaluations(c)
    return c


def objective(others: tuple[str, ...], stages: tuple[int, ...] = ()) -> ConfigDict:
    """The tasks of the video and of the other modalities, and distillation from these.

    Args:
      others: the modalities beside video.
      stages: of towers, whose features are distilled beside the pooled ones.
    """
    tasks = order_tasks('video')
    weights = dict.fromkeys(tasks, 1.0)
    for other in others:
        own = {f'aligned_{other}': alignment(other), **order_tasks(other)}
        tasks.update(own)
        weights.update(dict.fromkeys(own, 1.0))
        distilled: dict[str, Any] = {
            f'distilled_{other}': {'name': 'distillation', 'teacher': other}
        }
        for stage in stages:
            fields = {'name': 'distillation', 'teacher': other, 'stage': stage}
            distilled[f'distilled_{other}_{stage}'] = fields
        tasks.update(distilled)
        weights.update(dict.fromkeys(distilled, DISTILLATION_WEIGHT))
    return ConfigDict({'name': 'multi_task', 'tasks': tasks, 'weights': weights})


def order_tasks(modality: str) -> dict[str, dict[str, Any]]:
    """The arrow of time and the order of parts."""
    tasks = {}
    for change in ('reversed', 'shuffled'):
        fields = {'name': 'temporal_order', 'stream': modality, 'change': change}
        tasks[f'{change}_{modality}'] = fields
    return tasks


def alignment(other: str) -> dict[str, Any]:
    """Whether a clip of another modality belongs to the video."""
    # Embeddings of length 1: others do not leave the plateau of this loss for a long time.
    return {'name': 'synchronisation', 'audio': other, 'space': SPACE, 'normalise': True}


def set_evaluations(c: ConfigDict) -> None:
    """The fitness, and what the search does not see: linear probes and retrieval."""
    evals = c.evals = ConfigDict()
    evals.cluster_sizes = {'type': 'cluster_sizes'}
    for stream in c.model.towers:
        evals[f'probe_{stream}'] = selavi.whole_probe(stream)
    pairs = (('audio', 'video', SPACE), ('video', 'audio', SPACE))
    evals.retrieval = {'type': 'retrieval', 'limit': 768, 'pairs': pairs}


def demo_config(options: list[str]) -> ConfigDict:
    """ELo at the size of the playground."""
    is_synthetic = 'synthetic' in options
    c = mmv.get_config('demo_fac_va,synthetic' if is_synthetic else 'demo_fac_va')
    c.steps = 400
    c.model.head = ConfigDict({'name': 'joint', SPACE: 64})
    # Networks of one width, so that features compare.
    towers = {modality: coclr.DEMO_TOWERS[modality] for modality in ('video', 'audio')}
    if 'flow' in options:
        towers['flow'] = coclr.DEMO_TOWERS['flow']
        coclr.describe_flow(c.model.inputs)
    c.model.towers = ConfigDict(towers)
    o = c.optimizer
    o.clip = 1.0
    o.schedule.update({'peak': 1e-3, 'warmup': 40})
    c.checkpoint.every = 100
    return c


def published_config(name: str) -> ConfigDict:
    """The published networks; docs/elo.md says what of the rest is certain."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = 256, 'bfloat16'
    epoch = DATASETS[name] // c.batch_size
    c.steps = EPOCHS * epoch
    m = c.model
    m.inputs.video.update({'frames': 32, 'size': 224, 'fps': 16.0, 'range': (-1.0, 1.0)})
    coclr.describe_flow(m.inputs)
    # The two seconds of the video.
    m.inputs.audio.update({'samples': 48_000, 'rate': 24_000, 'mel': presets.FILTERBANK})
    towers = {'video': 'r3d_50', 'flow': 'r3d_50', 'audio': 'resnet2d_v2_50'}
    m.towers = ConfigDict({modality: presets.tower(tower) for modality, tower in towers.items()})
    m.head = ConfigDict({'name': 'joint', SPACE: 512})

    o = c.optimizer
    # keras_sgd puts the decay into the velocity.
    o.name, o.momentum, o.frozen = 'keras_sgd', 0.9, ()
    o.weight_decay, o.decay_skip, o.clip = 1e-4, (r'bias$', r'scale$'), 1.0
    o.schedule.update({'name': 'warmup_cosine', 'peak': 0.1, 'warmup': 5 * epoch, 'end': 0.0})
    c.data.train[name] = default.records(f'data/{name}/records')
    c.data.crop, c.data.aspect = (0.4, 1.0), (0.75, 1.33)
    c.augment.audio_noise = 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = epoch, 5, 50
    return c
