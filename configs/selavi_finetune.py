"""SeLaVi's protocols on labelled videos, published for UCF-101 and HMDB-51: fine-tuning; and retrieval by nearest neighbours.

    python run.py --config=configs/selavi_finetune.py:ucf101,1 --workdir=runs/ucf1 --config.init_from=runs/selavi_vggsound    # first of three splits
    python run.py --config=configs/selavi_finetune.py:demo --workdir=runs/selavi_tuned     # the playground's classes, from runs/selavi
    python run.py --config=configs/selavi_finetune.py:demo,scratch --workdir=runs/selavi_scratch

    python run.py --mode=eval --workdir=runs/selavi_vggsound "--config.data.eval={'path': 'data/ucf101_1/records'}" \\
        "--config.evals={'neighbours': {'type': 'neighbours'}}"                            # retrieval, by the pretrained model

Fine-tuning: 12 passes over ten clips of each video, SGD; rates rise to eight times their first value over two passes and fall to a twentieth
after 6 and after 10. Test: ten windows, three squares each, mean of the logits. What differs from the published code: docs/self_labelling.md.
"""

from configs import default, selavi

# videos of the first training split
VIDEOS = {'ucf101': 9_537, 'hmdb51': 3_570}
BATCH = 32


def get_config(arg: str = 'ucf101'):
    name, *options = (arg or 'ucf101').split(',')
    if name not in (*VIDEOS, 'demo'):
        raise ValueError(
            f'configs/selavi_finetune.py has no dataset {name!r}; there are {", ".join(VIDEOS)}, demo'
        )
    known = ('scratch',) if name == 'demo' else ('1', '2', '3', 'scratch')
    for o in options:
        if o not in known:
            raise ValueError(
                f'configs/selavi_finetune.py:{name} has no option {o!r}; there are {", ".join(known)}'
            )
    demo = name == 'demo'
    c = selavi.get_config('demo') if demo else default.get_config()
    epoch = 1200 * 10 // BATCH if demo else VIDEOS[name] * 10 // BATCH
    if demo:
        epoch //= 16  # ten clips of a scene show nearly the same
    else:
        source = selavi.get_config('vggsound')
        c.model, c.compute_dtype = source.model, source.compute_dtype
        c.model.inputs.video.update({'frames': 32, 'size': 112})
        split = next((o for o in options if o.isdigit()), '1')
        c.data.train[name] = {
            'path': f'data/{name}_{split}/records',
            'split': 'train',
            'weight': 1.0,
            'share': 0.0,
        }
        c.data.crop, c.data.aspect = source.data.crop, source.data.aspect
    c.name = f'SeLaVi fine-tuned on {" ".join([name, *options])}'
    c.steps, c.batch_size, c.report = 12 * epoch, BATCH, False
    c.init_from = '' if 'scratch' in options else 'runs/selavi' if demo else 'runs/selavi_vggsound'
    c.model.towers = {'video': c.model.towers.video}
    c.objective = {
        'name': 'classification',
        'stream': 'video',
        'label': 'class',
        'dropout': 0.0,
        'smoothing': 0.0,
    }

    o = c.optimizer
    # keras_sgd puts the decay into the velocity, as PyTorch's SGD does
    o.name, o.momentum, o.weight_decay, o.decay_skip, o.clip, o.frozen = (
        'keras_sgd',
        0.9,
        5e-3,
        (),
        0.0,
        (),
    )
    peak = 8 * 2.5e-4
    levels = (
        (2 * epoch, peak),
        (6 * epoch - 1, peak),
        (6 * epoch, peak / 20),
        (10 * epoch - 1, peak / 20),
        (10 * epoch, peak / 400),
        (12 * epoch, peak / 400),
    )
    o.schedule.update({'name': 'vatt', 'levels': levels})
    o.rates = ((r'^objective/', 10.0),)  # the classifier's rate is ten times the backbone's
    c.augment.color = 1.0
    c.checkpoint.every = epoch
    squares = 1 if demo else 3  # the playground's frames are square
    c.evals = {
        'classification': {
            'type': 'classification',
            'label': 'class',
            'split': 'test',
            'windows': 2 if demo else 10,
            'crops': squares,
        }
    }
    return c
