"""ViLBERT and UNITER: masked words, masked regions, matching of sentences and pictures.

Method, deviations and plans: docs/vilbert_uniter.md.

    python run.py --config=configs/vilbert_uniter.py:vilbert,demo --workdir=runs/vilbert
        on the playground: regions are the cells of a picture tower that is trained along; all
        tasks at every step
    python run.py --config=configs/vilbert_uniter.py:uniter,demo --workdir=runs/uniter
        one stream, one task a step
    python run.py --config=configs/vilbert_uniter.py:uniter,demo,frozen --workdir=runs/uniter_frozen
        cells of the tower of runs/demo (configs/demo.py), which stays as it is
    python run.py --config=configs/vilbert_uniter.py:vilbert,demo,synthetic --workdir=runs/try
        no files, no TensorFlow
    python run.py --config=configs/vilbert_uniter.py:uniter,demo,synthetic,regions \\
        --workdir=runs/try
        likewise, with regions and classes as of a detector
    python run.py --mode=plan --config=configs/vilbert_uniter.py:vilbert,published,synthetic \\
        --machine=v5p_64 --workdir=runs/plan
        ViLBERT base on Conceptual Captions; uniter,published: UNITER large

Options:

    conditional | joint
                what is hidden at once, other than as published
    hard        mismatched pairs are of the most alike of eight pictures
    frozen, synthetic, regions
                see above
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo

MODELS = ('vilbert', 'uniter')
SIZES = ('demo', 'published')
OPTIONS = ('conditional', 'joint', 'hard', 'frozen', 'synthetic', 'regions')
# Of Conceptual Captions as ViLBERT had it.
NUM_PAIRS = 3_100_000
# Biases and norms have no weight decay.
DECAY_SKIP = (r'bias$', r'scale$', r'norm')


def get_config(arg: str = 'vilbert,demo') -> ConfigDict:
    model, *rest = (arg or 'vilbert').split(',')
    size, *options = rest or ['demo']
    choose(model, MODELS, 'configs/vilbert_uniter.py')
    choose(size, SIZES, f'configs/vilbert_uniter.py:{model}')
    for option in options:
        choose(option, OPTIONS, f'configs/vilbert_uniter.py:{model},{size} option')
    c = demo_config(model, options) if size == 'demo' else published_config(model, options)
    c.name = ' '.join([model, size, *options])
    for masking in ('conditional', 'joint'):
        if masking in options:
            c.objective.masking = masking
    if 'hard' in options:
        c.objective.candidates = 8
    return c


def recipe(model: str) -> ConfigDict:
    """What the two papers do differently, as fields of the objective."""
    if model == 'vilbert':
        # The objective's defaults.
        return ConfigDict({'name': 'region_pretraining', 'model': model})
    return ConfigDict(
        {
            'name': 'region_pretraining',
            'model': model,
            # As often as UNITER draws them for Conceptual Captions.
            'tasks': {'match': 9.0, 'words': 12.0, 'features': 6.0, 'divergence': 6.0},
            'schedule': 'one',
            'masking': 'conditional',
            'zero_share': 1.0,
            'at_least_one': True,
            'replaced': 'regions',
            'mean_over_classes': True,
            'alignment': 0.1,
        }
    )


def demo_config(model: str, options: list[str]) -> ConfigDict:
    """A network of the playground's size."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    c.model.inputs.text.candidates = 1
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = recipe(model)
    c.objective.size = 'small'
    if 'regions' in options:
        set_regions(c, regions=8, width=48, classes=20)
    else:
        set_cells(c)
    if 'frozen' in options:
        c.init_from = 'runs/demo'
        c.optimizer.frozen = (r'^model/',)
    c.optimizer.decay_skip = DECAY_SKIP
    c.evals = ConfigDict()
    c.evals.region_words = {'type': 'region_words'}
    c.evals.matching = {'type': 'matching', 'stream': 'text'}
    return c


def set_regions(c: ConfigDict, regions: int, width: int, classes: int) -> None:
    """Regions of the data, and no tower, in place."""
    c.model.towers = ConfigDict()
    c.model.inputs.regions = ConfigDict({'regions': regions, 'width': width, 'classes': classes})


def set_cells(c: ConfigDict) -> None:
    """Regions are the 4 × 4 cells of the picture tower, in place. No detector says their class."""
    c.model.towers = ConfigDict({'video': c.model.towers.video})
    # The whole grid is read.
    c.model.towers.video.drop_token = 0.0
    c.objective.picture = 'video'
    if c.objective.model == 'vilbert':
        c.objective.tasks = {'words': 1.0, 'contrast': 1.0, 'match': 1.0}
    else:
        c.objective.tasks = {'match': 9.0, 'words': 12.0, 'contrast': 12.0}


def published_config(model: str, options: list[str]) -> ConfigDict:
    """ViLBERT base as published, or UNITER large."""
    c = default.get_config()
    c.compute_dtype = 'bfloat16'
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = recipe(model)
    # Of both vocabularies of BERT, cased and not; proper words begin with '!'.
    c.objective.special = (101, 102, 103)
    text = c.model.inputs.text
    text.candidates, text.tokenizer = 1, 'wordpiece'
    o = c.optimizer
    o.name, o.frozen, o.decay_skip = 'adamw', (), DECAY_SKIP
    o.eps, o.weight_decay = 1e-6, 0.01
    if model == 'vilbert':
        c.objective.update({'size': 'base', 'vocabulary': 30522, 'first_word': 999})
        c.batch_size = 512
        c.steps = 10 * NUM_PAIRS // c.batch_size
        # With the marks 36.
        text.words = 34
        set_regions(c, regions=36, width=2048, classes=1601)
        schedule = {'peak': 1e-4, 'warmup': c.steps // 10}
    else:
        c.objective.update({'size': 'large', 'vocabulary': 28996, 'first_word': 106})
        # As many tokens as 8 devices × 6 microbatches of 10240, at the full length.
        c.batch_size, c.steps = 3072, 200_000
        text.words = 60
        set_regions(c, regions=100, width=2048, classes=1601)
        o.b2, o.clip = 0.98, 5.0
        schedule = {'peak': 5e-5, 'warmup': 10_000}
    o.schedule.update({'name': 'warmup_linear', 'end': 0.0, **schedule})
    if 'synthetic' in options:
        # Its sentences are words of its own, which fit BERT's larger table.
        c.data.source, text.tokenizer = 'synthetic', 'words'
    else:
        c.data.train.captions = default.records('data/conceptual_captions/regions')
    c.checkpoint.every, c.log_every = 5_000, 50
    c.evals = ConfigDict()
    return c
