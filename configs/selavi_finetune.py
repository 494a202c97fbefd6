"""SeLaVi's protocols on labelled videos: fine-tuning, and retrieval by nearest neighbours.

    python run.py --config=configs/selavi_finetune.py:ucf101,1 --workdir=runs/ucf1 \\
        --config.init_from=runs/selavi_vggsound
        the first of three splits
    python run.py --config=configs/selavi_finetune.py:demo --workdir=runs/selavi_tuned
        the playground's classes, from runs/selavi
    python run.py --config=configs/selavi_finetune.py:demo,scratch --workdir=runs/selavi_scratch
    python run.py --mode=eval --workdir=runs/selavi_vggsound \\
        "--config.data.eval={'path': 'data/ucf101/records', 'fold': 1}" \\
        "--config.evals={'neighbours': {'type': 'neighbours'}}"
        retrieval, by the pretrained model

Published for UCF-101 and HMDB-51. Fine-tuning: 12 passes over ten clips of each video, SGD. The
rate rises to eight times its first value over two passes, and falls to a twentieth after 6 and
after 10. Test: ten windows, three squares each, mean of the logits. What differs from the published
code: docs/self_labelling.md.
"""

from ml_collections import ConfigDict

from . import default, selavi

# Videos of the first training split.
NUM_VIDEOS = {'ucf101': 9_537, 'hmdb51': 3_570}
CLIPS_PER_VIDEO = 10
BATCH_SIZE = 32


def get_config(arg: str = 'ucf101') -> ConfigDict:
    name, *options = (arg or 'ucf101').split(',')
    check_options(name, options)
    is_demo = name == 'demo'
    if is_demo:
        c = selavi.get_config('demo')
        # Ten clips of a scene show nearly the same, so a sixteenth of them counts as a pass.
        epoch = 1200 * CLIPS_PER_VIDEO // BATCH_SIZE // 16
        pretrained = 'runs/selavi'
    else:
        c = labelled_config(name, options)
        epoch = NUM_VIDEOS[name] * CLIPS_PER_VIDEO // BATCH_SIZE
        pretrained = 'runs/selavi_vggsound'
    c.name = f'SeLaVi fine-tuned on {" ".join([name, *options])}'
    c.steps, c.batch_size, c.report = 12 * epoch, BATCH_SIZE, False
    c.init_from = '' if 'scratch' in options else pretrained
    c.model.towers = {'video': c.model.towers.video}
    c.objective = {
        'name': 'classification',
        'stream': 'video',
        'label': 'class',
        'dropout': 0.0,
        'smoothing': 0.0,
    }
    set_optimizer(c.optimizer, epoch)
    c.augment.color = 1.0
    c.checkpoint.every = epoch
    c.evals = {
        'classification': {
            'type': 'classification',
            'label': 'class',
            'split': 'test',
            'windows': 2 if is_demo else 10,
            # The playground's frames are square.
            'crops': 1 if is_demo else 3,
        }
    }
    return c


def check_options(name: str, options: list[str]) -> None:
    """Raises ValueError for a dataset or an option that there is not."""
    names = (*NUM_VIDEOS, 'demo')
    if name not in names:
        raise ValueError(
            f'configs/selavi_finetune.py: expected one of {", ".join(names)}, got {name!r}'
        )
    known = ('scratch',) if name == 'demo' else ('1', '2', '3', 'scratch')
    for option in options:
        if option not in known:
            raise ValueError(
                f'configs/selavi_finetune.py:{name}: expected an option of {", ".join(known)}, '
                f'got {option!r}'
            )


def labelled_config(name: str, options: list[str]) -> ConfigDict:
    """The model of the published pretraining, on one split of a labelled dataset."""
    c = default.get_config()
    source = selavi.get_config('vggsound')
    c.model, c.compute_dtype = source.model, source.compute_dtype
    c.model.inputs.video.update({'frames': 32, 'size': 112})
    splits = [option for option in options if option.isdigit()]
    split = splits[0] if splits else '1'
    # All clips are stored once; the fold says which of them are for training.
    c.data.train[name] = {**default.records(f'data/{name}/records'), 'fold': int(split)}
    c.data.crop, c.data.aspect = source.data.crop, source.data.aspect
    return c


def set_optimizer(o: ConfigDict, epoch: int) -> None:
    """SGD and the steps of its rate, in place. epoch: optimizer steps of one pass."""
    # keras_sgd puts the decay into the velocity, as PyTorch's SGD does.
    o.name, o.momentum = 'keras_sgd', 0.9
    o.weight_decay, o.decay_skip = 5e-3, ()
    o.clip, o.frozen = 0.0, ()
    peak = 8 * 2.5e-4
    # Level until the step before each fall, so that no cosine smooths it.
    levels = (
        (2 * epoch, peak),
        (6 * epoch - 1, peak),
        (6 * epoch, peak / 20),
        (10 * epoch - 1, peak / 20),
        (10 * epoch, peak / 400),
        (12 * epoch, peak / 400),
    )
    o.schedule.update({'name': 'vatt', 'levels': levels})
    # The classifier's rate is ten times the backbone's.
    o.rates = ((r'^objective/', 10.0),)
