"""Every field there is, with its meaning. Other configs import this one and change lines.

python run.py --config=configs/demo.py --workdir=runs/demo --config.batch_size=64
"""

from ml_collections import ConfigDict


def get_config(arg: str = '') -> ConfigDict:
    c = ConfigDict()
    c.name = 'default'  # shown in logs and reports
    c.seed = 0  # of initial values, order, augmentation and dropout
    c.steps = 100_000  # optimizer steps of the whole run
    c.batch_size = 128  # clips per optimizer step, over all devices and hosts
    c.accumulate = (
        1  # microbatches per step, so that the activations of one at a time are in memory
    )
    c.accumulation = 'plain'  # plain: each microbatch has a loss of its own | exact: one loss of the whole batch, towers run twice
    c.compute_dtype = 'float32'  # of activations: float32 (CPU) or bfloat16 (accelerators); parameters stay float32

    # ---- what the model is
    m = c.model = ConfigDict()
    m.name = 'vatt'  # entry of vatt_jax.models.MODELS
    m.shared = False  # True: modality-agnostic, one encoder for all modalities (VATT-MA)
    m.inputs = ConfigDict(
        {  # the preprocessing the model expects; stored in its checkpoint
            'video': ConfigDict(
                {'frames': 32, 'size': 224, 'fps': 10.0, 'range': (-1.0, 1.0)}
            ),  # of pixels, black to white: VATT -1 to 1, MMV 0 to 1
            'audio': ConfigDict(
                {'samples': 153600, 'rate': 48000, 'mel': ConfigDict()}
            ),  # empty: waveform; else log-mel, fields of vatt_jax/inputs/spectrogram.py
            'text': ConfigDict(
                {'candidates': 5, 'words': 16, 'tokenizer': 'words'}
            ),  # words | wordpiece | sentencepiece; the data's vocabulary
        }
    )
    m.towers = ConfigDict()  # modality -> tower; named sizes: vatt_jax/models/presets.py
    m.encoder = ConfigDict()  # the shared encoder's size when m.shared
    m.head = ConfigDict(
        {'name': 'fac', 'va': 512, 'vat': 256}
    )  # graph (models/common_space.py) and widths of its spaces
    m.attention = 'dense'  # dense (the definition, the only one with dropout on probabilities) | xla | cudnn, triton (GPU) |
    # splash (TPU) | auto: the kernel of the machine in towers without attention_dropout, else dense
    m.scan = False  # scan over layers (fast compile, for deep towers) instead of unrolling; same parameters
    m.packed = False  # one pass of the shared encoder for all modalities, instead of one each; same parameters, same values
    m.remat = 'none'  # none | dots | full: what the backward pass recomputes

    # ---- what is learnt
    c.objective = ConfigDict(
        {'name': 'contrastive'}
    )  # entry of vatt_jax.objectives.OBJECTIVES and its own fields

    # ---- optimizer
    o = c.optimizer = ConfigDict()
    o.name = 'adam'  # adam | adamw | sgd | lamb (optax) | keras_adam | keras_sgd (the official VATT's forms)
    o.b1, o.b2, o.eps = 0.9, 0.999, 1e-7
    o.momentum = 0.9  # sgd
    o.weight_decay = 0.0  # decoupled, multiplied by the learning rate
    o.decay_skip = (
        r'bias$',
        r'scale$',
        r'norm',
        r'position',
        r'agg',
    )  # parameter paths (regex) without weight decay
    o.clip = 0.0  # global-norm clipping of gradients; 0: off
    o.clip_paths = ()  # parameter paths (regex) that are clipped, by the norm of these alone; (): all
    o.frozen = (r'word_table',)  # parameter paths (regex) that are never updated
    o.rates = ()  # ((regex, factor), ...): learning-rate factor by parameter path, first match wins
    o.ema = 0.0  # decay of an exponential average of the parameters, used by evaluation; 0: off
    s = o.schedule = ConfigDict()
    s.name = 'warmup_cosine'  # warmup_cosine | warmup_quarter_cosine | constant | vatt (levels below, cosine between them and to 0)
    s.peak = 1e-4  # learning rate after warm-up
    s.warmup = 5000  # steps of linear warm-up from 0
    s.end = 5e-5  # learning rate at the last step
    s.levels = ((5000, 1e-4), (500000, 5e-5))  # vatt: (step, rate) pairs

    # ---- data
    d = c.data = ConfigDict()
    d.source = 'records'  # records | synthetic | npz
    d.train = ConfigDict()  # name -> {path, split, weight, share, fold}: the training mixture (records); path '': what `make` makes;
    # {label: 'class', per_class: 20} too: all labels but those of 20 segments of each class are
    # unknown, and these are drawn
    d.eval = (
        ConfigDict()
    )  # {path, fold}: dataset whose splits the evaluators name; empty: the first training source
    d.make = (
        ConfigDict()
    )  # playground fields and its path: rendered and prepared when it is read and not there yet
    d.npz = ''  # npz: file of prepared batches
    d.synthetic_size = 4096  # synthetic: examples per epoch
    d.views = ()  # ((stream name, {'kind': …}), …): more views of the same record (docs/data.md)
    d.crop = (
        0.6,
        1.0,
    )  # area of the random crop in training, as a share of the frame; (1, 1): whole frame
    d.aspect = (0.8, 1.25)  # aspect ratio of that crop
    d.flip = 0.5  # probability of a mirrored clip in training
    d.mismatch = ()  # control: modalities that, in training, come from another clip; nothing can be learnt across them
    d.prefetch = 3  # batches held ready
    d.threads = 2  # parallel readers and decoders
    d.max_corrupt = 0.01  # share of unreadable records that stops the run

    # ---- augmentation on device
    a = c.augment = ConfigDict()
    a.color = 0.8  # probability of colour jitter per clip
    a.brightness, a.contrast, a.saturation, a.hue = 32 / 255, 0.4, 0.4, 0.2
    a.audio_noise = 0.01  # gaussian, as a share of the clip's maximum
    a.volume = 0.0  # sound times a factor within 1 ± this, drawn for each clip

    # ---- machine
    c.jax_platform = ''  # '' (what JAX finds) | cpu | cuda | tpu
    c.compiler_options = (
        ConfigDict()
    )  # of the training step: name -> value of XLA options (jax.jit's compiler_options)
    c.compilation_cache = (
        ''  # folder of compiled programs for the next start; '': <workdir>/compiled, on a CPU none
    )
    c.mesh = ConfigDict(
        {'replica': -1, 'fsdp': 1, 'model': 1, 'seq': 1}
    )  # -1: all devices that are left

    # ---- start, save, watch
    c.init_from = (
        ''  # start from this run folder or checkpoint (when the run has no checkpoint of its own)
    )
    c.init_rename = ()  # ((regex, replacement), ...): our parameter path -> its path in init_from
    c.init_skip = ()  # parameter paths (regex) to leave at their initial values
    c.init_words = ''  # word vectors (word2vec, text or binary) for the word table of a run that starts; '': random ones
    k = c.checkpoint = ConfigDict()
    k.every = 1000  # steps between checkpoints; the last step is always saved
    k.keep = 2  # newest checkpoints kept
    k.best = ''  # 'evaluator/scalar': also keep the checkpoint at which it was highest, such as 'probe/accuracy'
    k.keep_every = 0  # also keep each checkpoint whose step is a multiple of this; 0: none
    c.profile = ()  # (first, last): steps whose trace the profiler writes to <workdir>/profile; (): none
    c.log_every = 10  # steps between lines of metrics.jsonl
    c.max_bad_steps = 5  # non-finite steps in a row that stop the run

    # ---- evaluation
    c.eval_every = 0  # steps between evaluations during training; 0: only at the end
    c.evals = ConfigDict()  # name -> {type: entry of vatt_jax.evals.EVALUATORS, ...its own fields}
    c.report = False  # after training: evaluate the random initialisation too, and write the report
    return c
