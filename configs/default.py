"""Every field there is, with its meaning. Other configs import this one and change lines.

python run.py --config=configs/demo.py --workdir=runs/demo --config.batch_size=64
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    c = ConfigDict()
    # Shown in logs and reports.
    c.name = 'default'
    # Of initial values, order of examples, augmentation and dropout.
    c.seed = 0
    # Optimizer steps of the whole run.
    c.steps = 100_000
    # Clips per optimizer step, over all devices and hosts.
    c.batch_size = 128
    # Microbatches per step, so that the activations of one at a time are in memory.
    c.accumulate = 1
    # plain: each microbatch has a loss of its own
    # exact: one loss of the whole batch; the towers run twice
    c.accumulation = 'plain'
    # Of activations: float32 (CPU) or bfloat16 (accelerators). Parameters stay float32.
    c.compute_dtype = 'float32'

    c.model = model()
    # Entry of vatt_jax.objectives.OBJECTIVES and its own fields.
    c.objective = ConfigDict({'name': 'contrastive'})
    c.optimizer = optimizer()
    c.data = data()
    c.augment = augment()

    # ---- machine
    # '' (what JAX finds) | cpu | cuda | tpu
    c.jax_platform = ''
    # Of the training step: name -> value of XLA options (the compiler_options of jax.jit).
    c.compiler_options = ConfigDict()
    # Folder of compiled programs for the next start. '': <workdir>/compiled, on a CPU none.
    c.compilation_cache = ''
    # Devices along each mesh axis; -1: all devices that are left.
    c.mesh = ConfigDict({'replica': -1, 'fsdp': 1, 'model': 1, 'seq': 1})

    # ---- start
    # Start from this run folder or checkpoint, when the run has no checkpoint of its own.
    # 'phase:NAME': from an earlier phase.
    c.init_from = ''
    # What is taken from there: model (parameters and batch statistics), objective (its
    # parameters), state (what it remembers: memories, queues, normalisers).
    c.init_trees = ('model',)
    # ((regex, replacement), ...): our path -> its path in init_from. Paths of the objective's trees
    # begin with objective/ and state/.
    c.init_rename = ()
    # Such paths (regex) to leave at their initial values.
    c.init_skip = ()
    # Run folder or checkpoint whose model stays as it is: only what is new beside it
    # (model.adapter, the objective) is trained and saved (docs/adaptation.md). '': none, all of the
    # model is trained.
    c.base = ''
    # File of word vectors (word2vec, text or binary) for the word table of a run that starts from
    # scratch. '': random ones.
    c.init_words = ''

    # ---- phases (docs/phases.md)
    # ((name, {field: value}), ...): trainings one after the other in one run folder, each with
    # these fields changed. (): one training.
    c.phases = ()

    # ---- files on object stores (docs/object_stores.md)
    c.object_store = object_store()

    # ---- save and watch
    c.checkpoint = checkpoint()
    # (first, last): steps whose trace the profiler writes to <workdir>/profile. (): none.
    c.profile = ()
    # Steps between lines of metrics.jsonl.
    c.log_every = 10
    # Where these lines go as well: tensorboard | wandb | clu.
    c.trackers = ('tensorboard',)
    # Non-finite steps in a row that stop the run.
    c.max_bad_steps = 5

    # ---- evaluation
    # Steps between evaluations during training. 0: only at the end.
    c.eval_every = 0
    # Which model: student (the one that is trained) | teacher (its momentum copy, of objectives
    # that keep one).
    c.evaluated = 'student'
    # name -> {type: entry of vatt_jax.evals.EVALUATORS, ... its own fields}
    c.evals = ConfigDict()
    # After training: evaluate the random initialisation too, and write the report.
    c.report = False
    return c


def model() -> ConfigDict:
    """What the model is."""
    m = ConfigDict()
    # Entry of vatt_jax.models.MODELS.
    m.name = 'vatt'
    # True: modality-agnostic, one encoder for all modalities (VATT-MA).
    m.shared = False
    m.inputs = model_inputs()
    # modality -> tower. Named sizes: vatt_jax/models/presets.py.
    m.towers = ConfigDict()
    # Size of the shared encoder when m.shared.
    m.encoder = ConfigDict()
    # Graph of common spaces (vatt_jax/models/common_space.py) and the width of each space.
    m.head = ConfigDict({'name': 'fac', 'va': 512, 'vat': 256})
    # New parameters inside the towers: entry of vatt_jax.models.adapters.ADAPTERS and its own
    # fields. Empty: none.
    m.adapter = ConfigDict()
    # Layers in which streams attend to each other after their towers (docs/fusion.md), with the
    # fields of vatt_jax.models.fusion.DEFAULTS. Empty: none, modalities meet in the loss alone.
    m.fusion = ConfigDict()
    # dense: the definition, and the only one with dropout on attention probabilities
    # xla | cudnn, triton (GPU) | splash (TPU): that kernel
    # auto: the machine's kernel in towers without attention_dropout, else dense
    m.attention = 'dense'
    # Scan over layers (compiles fast; for deep towers) instead of unrolling. Same parameters.
    m.scan = False
    # One pass of the shared encoder for all modalities instead of one for each. Same parameters
    # and values.
    m.packed = False
    # What the backward pass recomputes: none | dots | full.
    m.remat = 'none'
    return m


def model_inputs() -> ConfigDict:
    """The preprocessing that the model expects. It is stored in the model's checkpoints."""
    inputs = ConfigDict()
    inputs.video = ConfigDict(
        {
            'frames': 32,
            'size': 224,
            'fps': 10.0,
            # Of pixels, black to white (VATT -1 to 1, MMV 0 to 1).
            'range': (-1.0, 1.0),
            # Of each colour within that range: mean, and standard deviation that the rest is
            # divided by (CLIP). (): neither.
            'mean': (),
            'deviation': (),
            # linear: a triangle, wider where the picture shrinks
            # bicubic: Pillow's, likewise (CLIP)
            # bilinear: of the four nearest pixels whatever the size (SigLIP)
            'resize': 'linear',
        }
    )
    # Optical flow, of data that were prepared with it (docs/data.md). Empty: none. Else flow().
    inputs.flow = ConfigDict()
    # mel: empty for waveforms, else the log-mel fields of vatt_jax/inputs/spectrogram.py.
    inputs.audio = ConfigDict({'samples': 153600, 'rate': 48000, 'mel': ConfigDict()})
    # Regions of pictures beside the streams, of data that have them: `regions`, the most of a
    # picture, `width` of their features, `classes` of the detector. Empty: none.
    inputs.regions = ConfigDict()
    # tokenizer: words | wordpiece | sentencepiece | clip | siglip, with the vocabulary of the data;
    # or the whole description of one (docs/clip.md).
    inputs.text = ConfigDict({'candidates': 5, 'words': 16, 'tokenizer': 'words'})
    return inputs


def flow() -> dict[str, Any]:
    """Optical flow as an input: `config.model.inputs.flow = default.flow()`, and lines changed."""
    return {
        'frames': 32,
        'size': 224,
        # That at which the data are stored: displacements are from one stored frame to the next.
        'fps': 10.0,
        # 2: horizontal and vertical. 3: and zeros, for towers whose first kernel reads 3.
        'channels': 2,
    }


def optimizer() -> ConfigDict:
    """How parameters are updated."""
    o = ConfigDict()
    # adam | adamw | sgd | lamb (optax) | keras_adam | keras_sgd (the forms of the official VATT)
    o.name = 'adam'
    o.b1, o.b2, o.eps = 0.9, 0.999, 1e-7
    # Of sgd.
    o.momentum = 0.9
    # Decoupled, multiplied by the learning rate.
    o.weight_decay = 0.0
    # Parameter paths (regex) without weight decay.
    o.decay_skip = (r'bias$', r'scale$', r'norm', r'position', r'agg')
    # Largest global norm of the gradients. 0: no clipping.
    o.clip = 0.0
    # Parameter paths (regex) that are clipped, by the norm of these alone. (): all.
    o.clip_paths = ()
    # True: in that norm the gradients of position tables count token by token, before tokens that
    # share a row are summed, as TensorFlow counts them (official VATT).
    o.clip_lookups = False
    # Parameter paths (regex) that are never updated.
    o.frozen = (r'word_table',)
    # ((regex, factor), ...): factor of the learning rate by parameter path; the first match wins.
    o.rates = ()
    # Decay of an exponential average of the parameters, used by evaluation. 0: none.
    o.ema = 0.0

    s = o.schedule = ConfigDict()
    # warmup_cosine | warmup_quarter_cosine | warmup_linear | constant
    # vatt: levels below, with a cosine between them and to 0 after the last
    s.name = 'warmup_cosine'
    # Learning rate after the warm-up.
    s.peak = 1e-4
    # Steps of linear warm-up.
    s.warmup = 5000
    # Learning rate at the first step of the warm-up.
    s.start = 0.0
    # Learning rate at the last step.
    s.end = 5e-5
    # vatt: (step, rate) pairs.
    s.levels = ((5000, 1e-4), (500000, 5e-5))
    return o


def data() -> ConfigDict:
    """Where examples come from and how they are read."""
    d = ConfigDict()
    # records | synthetic | npz | coco (pictures with boxes: docs/detector.md)
    d.source = 'records'
    # records: the training mixture, name -> {path, split, weight, share, fold}; see records().
    # path '': what `make` makes. With {label: 'class', per_class: 20} all labels but those of 20
    # segments of each class are unknown, and these segments are drawn.
    d.train = ConfigDict()
    # How often an epoch has each record, each time another clip of it, at random places (AVID: 10).
    d.clips_per_epoch = 1
    # {path, fold}: the dataset whose splits the evaluators name. Empty: the first training source.
    d.eval = ConfigDict()
    # Fields of the playground and its path; it is rendered and prepared when it is needed and not
    # there yet.
    d.make = ConfigDict()
    # npz: file of prepared batches.
    d.npz = ''
    # synthetic: examples per epoch.
    d.synthetic_size = 4096
    # ((stream name, {'kind': ...}), ...): more views of the same record (docs/data.md).
    d.views = ()
    # Area of the random crop in training, as a share of the frame. (1, 1): the whole frame.
    d.crop = (0.6, 1.0)
    # Aspect ratio of that crop.
    d.aspect = (0.8, 1.25)
    # Probability of a mirrored clip in training.
    d.flip = 0.5
    # Control experiment: modalities that come from another clip in training, so that nothing can
    # be learnt across them.
    d.mismatch = ()
    # Batches held ready.
    d.prefetch = 3
    # Parallel readers and decoders, in each process that reads.
    d.threads = 2
    # Processes that read and decode beside this one, for hosts of many cores (docs/data.md); the
    # batches are the same. 0: none, the threads are of this process.
    d.workers = 0
    # Share of unreadable records that stops the run.
    d.max_corrupt = 0.01
    return d


def object_store() -> ConfigDict:
    """How records and run folders on s3://, gs:// and the like are read and written."""
    o = ConfigDict()
    # Seconds that a request may take, in addition to those that its bytes need at 1 MB/s.
    o.timeout = 30.0
    # How often a request is sent before its failure counts.
    o.tries = 5
    # Seconds before the second try; twice as many before each further one.
    o.backoff = 0.5
    # MB/s at which records are to be read: with the latency it says how many requests are under way
    # at once. 0: measured.
    o.bandwidth = 0.0
    # MB that requests under way may hold.
    o.memory = 256
    return o


def augment() -> ConfigDict:
    """Augmentation on the device."""
    a = ConfigDict()
    # Probability of colour jitter per clip, and its strengths.
    a.color = 0.8
    a.brightness, a.contrast, a.saturation, a.hue = 32 / 255, 0.4, 0.4, 0.2
    # Brightness as a factor within 1 ± this (SimCLR); `brightness` is a shift.
    a.gain = 0.0
    # Probability that a clip turns grey, after the jitter.
    a.grey = 0.0
    # Probability of Gaussian blur per clip; its standard deviation in pixels of the clip that the
    # model sees, uniform between these; width of its kernel, as a share of the picture.
    a.blur, a.blur_sigma, a.blur_width = 0.0, (0.1, 2.0), 0.1
    # Probability that the brighter half of a clip's values is turned round, after the blur (BYOL).
    a.solarise = 0.0
    # Probability that a clip takes all of the above at all; otherwise it is only cropped and
    # mirrored.
    a.strong = 1.0
    # ((stream, {field: value}), ...): sets of their own for streams, such as
    # (('video.second', {'blur': 0.1}),); what they do not name is as above.
    a.views = ()
    # Standard deviation of Gaussian noise, as a share of the clip's maximum.
    a.audio_noise = 0.01
    # Sound is multiplied by a factor within 1 ± this, drawn for each clip.
    a.volume = 0.0
    # SpecAugment of log-mel: how many masks, and their width in bands or frames: a whole number
    # below this one, drawn for each mask.
    a.spec_augment = ConfigDict(
        {'frequency_masks': 0, 'frequency_width': 0, 'time_masks': 0, 'time_width': 0}
    )
    # ((stream, source), ...): streams of video or audio that are another one read backwards, made
    # on the device after augmentation, which both share (docs/data.md).
    a.mirrored = ()
    return a


def checkpoint() -> ConfigDict:
    """What is saved, and for how long."""
    k = ConfigDict()
    # Steps between checkpoints. The last step is always saved.
    k.every = 1000
    # How many of the newest checkpoints stay.
    k.keep = 2
    # 'evaluator/scalar', such as 'probe/accuracy': the checkpoint at which it was highest stays.
    k.best = ''
    # Each checkpoint whose step is a multiple of this stays. 0: none.
    k.keep_every = 0
    return k


def records(path: str, split: str = 'train') -> dict[str, Any]:
    """An entry of config.data.train: one prepared dataset of the mixture, drawn by its size.

    Args:
        path: the folder that `python -m data_pipelines.prepare` wrote.
        split: the split to train on.
    """
    return {'path': path, 'split': split, 'weight': 1.0, 'share': 0.0}
