"""An anchor-free detector (FCOS) on a picture tower, trained on boxes in COCO's format.

Method and results: docs/detector.md. On constructed pictures, in minutes on two CPU cores:

    python -m data_pipelines.datasets.shapes --out=runs/data/shapes
    python run.py --config=configs/detector.py:shapes --workdir=runs/detector

On boxes of one's own, true ones or pseudo-boxes, with the tower of an earlier run:

    python run.py --config=configs/detector.py:boxes --workdir=runs/detector \\
        "--config.data.train={'mine': {'path': 'data/pseudo.json'}}" \\
        --config.data.eval.path=data/true --config.init_from=runs/localisation

On what configs/detection.py:demo found by sound (the chain: benchmarks/detection.py):

    python run.py --mode=pseudo_boxes --workdir=runs/localisation --out=runs/pseudo_boxes
    python run.py --mode=pseudo_boxes --workdir=runs/localisation --out=runs/true_boxes \\
        --split=validation,test --true=all
    python run.py --config=configs/detector.py:playground --workdir=runs/detector \\
        "--config.data.train={'pseudo': {'path': 'runs/pseudo_boxes'}}" \\
        --config.data.eval.path=runs/true_boxes --config.init_from=runs/localisation \\
        --config.evals.detection.naming=hungarian

With the published sizes, ResNet-50 on pictures of 224 pixels:

    python run.py --config=configs/detector.py:published --workdir=runs/detector
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, detection

VARIANTS = ('shapes', 'boxes', 'playground', 'published')


def get_config(arg: str = 'shapes') -> ConfigDict:
    arg = arg or 'shapes'
    choose(arg, VARIANTS, 'configs/detector.py')
    c = default.get_config()
    c.name = f'detector {arg}'
    c.objective = ConfigDict({'name': 'detection'})
    c.data.source = 'coco'
    # True boxes; '': those beside what is trained on.
    c.data.eval.path = ''
    # Hue is no cue of instruments' classes; shapes have random colours anyhow.
    c.augment.hue = 0.05
    c.evals.detection = {'type': 'detection', 'split': 'test', 'naming': ''}
    c.report = True
    if arg == 'published':
        set_published(c)
    else:
        set_small(c)
    if arg == 'playground':
        set_playground(c)
    if arg == 'shapes':
        c.data.train.shapes = default.records('runs/data/shapes')
    return c


def set_small(c: ConfigDict) -> None:
    """A run of minutes on two CPU cores, in place."""
    c.jax_platform = 'cpu'
    c.compiler_options = {
        'xla_cpu_use_fusion_emitters': False,
        'xla_llvm_disable_expensive_passes': True,
    }
    c.steps, c.batch_size = 600, 32
    c.model.inputs.video.update({'frames': 1, 'size': 64, 'fps': 1.0})
    c.model.towers.video = ConfigDict(
        {
            'name': 'vit',
            'layers': 3,
            'width': 96,
            'mlp': 192,
            'heads': 4,
            'head_width': 24,
            'dropout': 0.0,
            'attention_dropout': 0.0,
            'patch': (1, 8, 8),
            # The detector reads the whole grid.
            'drop_token': 0.0,
            'position_dropout': 0.0,
            'patch_init': 4.0,
        }
    )
    c.model.head = ConfigDict({'name': 'none'})
    c.objective.width = 48
    c.optimizer.update({'name': 'adamw', 'weight_decay': 0.02, 'clip': 1.0, 'frozen': ()})
    c.optimizer.schedule.update({'peak': 2e-3, 'warmup': 50, 'end': 1e-5})
    c.checkpoint.every, c.log_every = 200, 25
    c.eval_every = 300


def set_playground(c: ConfigDict) -> None:
    """The tower and the pictures of configs/detection.py:demo, in place."""
    localisation = detection.get_config('demo,synthetic').model
    c.model.inputs.video = localisation.inputs.video
    c.model.towers.video = localisation.towers.video
    # Of a map of 16 × 16: things are five to nine of its cells large.
    c.objective.levels = (0, -1)
    # The tower knows the pictures already.
    c.optimizer.rates = ((r'^model/', 0.3),)
    c.eval_every = 0


def set_published(c: ConfigDict) -> None:
    """Sizes near the published ones, in place: docs/detector.md says what was chosen here."""
    c.steps, c.batch_size, c.compute_dtype = 50_000, 64, 'bfloat16'
    c.model.inputs.video.update({'frames': 1, 'size': 448, 'fps': 1.0, 'range': (0.0, 1.0)})
    c.model.towers.video = ConfigDict({'name': 'tsm_resnet'})
    c.model.head = ConfigDict({'name': 'none'})
    c.objective.update({'width': 256, 'convs': 4, 'levels': (2, 1, 0, -1), 'reach': 8.0})
    c.objective.update({'candidates': 1000, 'detections': 100})
    c.optimizer.update({'name': 'adamw', 'weight_decay': 0.05, 'clip': 1.0, 'frozen': ()})
    # The tower is trained already: a tenth of the rate of the new layers.
    c.optimizer.rates = ((r'^model/', 0.1),)
    c.optimizer.schedule.update({'peak': 1e-3, 'warmup': 1000, 'end': 0.0})
    c.data.train.instruments = default.records('data/instruments')
    c.checkpoint.every, c.log_every = 5000, 50
    c.eval_every = 10_000
