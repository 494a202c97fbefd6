"""Object detection from sound, first half: where things are, of which kind, and boxes of both.

Method, boxes and published numbers: docs/detection.md.

On the playground, in a world of two large things of which one is heard:

    python run.py --config=configs/detection.py:demo --workdir=runs/localisation
        pictures of 128 pixels, maps of 16 × 16, sounds of one second
    python run.py --config=configs/detection.py:demo,contrast --workdir=runs/contrast
        the contrast alone, without self-labelling
    python run.py --config=configs/detection.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow
    python run.py --mode=pseudo_boxes --workdir=runs/localisation --out=runs/pseudo_boxes
        boxes of the training pictures in COCO's format, for a detector

    python run.py --config=configs/detection.py:vggsound --workdir=runs/localisation_vggsound
        the published setting as far as it is known

vggsound, audioset, general (300 clusters): over data prepared as docs/data.md says (--fps=8
--size=256 --rate=16000 --require_audio).
"""

import dataclasses

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo, mmv

OPTIONS = ('contrast', 'synthetic')


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Clusters and their sizes, as published; training videos."""

    clusters: int
    prior: str
    videos: int


# 54 000 videos of 50 instrument classes; the number of AudioSet's is not in the sources at hand.
DATASETS = {
    'vggsound': Dataset(39, 'uniform', 54_000),
    'audioset': Dataset(30, 'gaussian', 54_000),
    'general': Dataset(300, 'uniform', 170_752),
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo', *DATASETS), 'configs/detection.py')
    for option in options:
        choose(option, OPTIONS, f'configs/detection.py:{name} option')
    is_synthetic = 'synthetic' in options
    c = demo_config(is_synthetic) if name == 'demo' else published_config(name, is_synthetic)
    c.name = f'localisation {" ".join([name, *options])}'
    c.model.head = ConfigDict({'name': 'none'})
    if 'contrast' in options:
        c.objective.contrast = 1.0
    c.evals = ConfigDict()
    c.evals.clusters = {'type': 'clustering', 'label': 'class'}
    # Synthetic data have no boxes, nor do the published training sets.
    if name == 'demo' and not is_synthetic:
        c.evals.clusters.label = 'object'
        c.evals.boxes = {'type': 'localisation', 'beta_split': 'validation'}
    return c


def demo_config(is_synthetic: bool) -> ConfigDict:
    """A run of the playground's size."""
    c = demo.get_config('synthetic' if is_synthetic else '')
    c.steps = 1000
    m = c.model
    mmv.set_model(c, 'tsm50', 'fac', 'va')
    m.inputs.video.update({'frames': 1, 'size': 128, 'fps': 8.0})
    m.inputs.audio.update({'samples': 8000, 'rate': 8000})
    mmv.shrink_towers(m, None)
    # A map of 16 × 16, of pictures that know no other frames; each position sees 59 pixels, about
    # as much as a thing is large. Deeper networks, or smaller pictures, see the whole picture from
    # every position, and put what they know anywhere.
    m.towers.video.update({'depth': 10, 'share': 0.0, 'stride': 8, 'multiplier': 0.125})
    c.objective = ConfigDict(
        {
            'name': 'localisation',
            'clusters': 8,
            'contrast': 0.5,
            # Without it the loss does not move in the steps of this run.
            'pooled_share': 0.5,
            # Two of sixteen positions: where padding and the world's floor and posts are.
            'margin': 2,
            'width': 64,
            'temperature': 0.1,
            'hidden': 64,
            'refreshes': 6,
            'warmup': 500,
        }
    )
    o = c.optimizer
    o.name, o.weight_decay, o.clip = 'adam', 0.0, 0.0
    o.schedule.update({'peak': 2e-3, 'warmup': 60, 'end': 0.0})
    c.augment.audio_noise = 0.0
    c.checkpoint.every = 200
    if not is_synthetic:
        c.data.make.update(
            {
                'path': 'runs/data/boxes',
                'train': 1200,
                'validation': 128,
                'test': 256,
                'seconds': 3.0,
                'episodes': 1,
                'silent': 1,
                'distractors': 0,
                'pictures': 1,
                'size': 128,
            }
        )
    return c


def published_config(name: str, is_synthetic: bool) -> ConfigDict:
    """A published run: K and sizes of clusters are the paper's, the rest is ours and stated."""
    dataset = DATASETS[name]
    c = default.get_config()
    c.batch_size, c.compute_dtype = 256, 'bfloat16'
    epoch = dataset.videos // c.batch_size
    c.steps = 100 * epoch
    mmv.set_model(c, 'tsm50', 'fac', 'va')
    m = c.model
    m.inputs.video.update({'frames': 1, 'size': 224, 'fps': 8.0, 'range': (0.0, 1.0)})
    m.inputs.audio.update({'samples': 16_000, 'rate': 16_000})
    m.inputs.audio.mel.update({'window': 512, 'hop': 160})
    # A ResNet-50 over pictures, with a map of 14 × 14.
    m.towers.video.update({'share': 0.0, 'stride': 16})
    c.objective = ConfigDict(
        {
            'name': 'localisation',
            'clusters': dataset.clusters,
            'prior': dataset.prior,
            'contrast': 0.5,
            'hidden': 512,
            'dropout': 0.3,
            'refreshes': 100,
            'warmup': 10 * epoch,
        }
    )
    o = c.optimizer
    o.name, o.weight_decay, o.frozen = 'adam', 0.0, ()
    o.schedule.update({'name': 'warmup_cosine', 'peak': 1e-3, 'warmup': 5 * epoch, 'end': 0.0})
    if is_synthetic:
        c.data.source = 'synthetic'
    else:
        c.data.train[name] = default.records(f'data/{name}/records')
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 10 * epoch, 5, 50
    return c
