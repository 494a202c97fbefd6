"""The published runs: each passes the checks, holds the published values and builds (shapes)."""

import math

import chex
import jax
import jax.numpy as jnp
import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax import evals, models, optim
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map, vatt_tf
from vatt_jax.inputs import preprocess
from vatt_jax.models import presets
from vatt_jax.rng import Rng


def with_options(file, names, options):
    """Specifications of a config file: every name with every option."""
    specs = []
    for name in names:
        for option in options:
            specs.append(f'configs/{file}.py:{name}{option}')
    return specs


TASKS = ('k400', 'k600', 'k700', 'mit', 'audioset', 'imagenet')
PRETRAINING = with_options('vatt', presets.MODELS, ('', ',paper', ',code', ',synthetic'))
FINETUNING = [
    *with_options('vatt_finetune', TASKS, ('', ',bbs', ',agnostic_medium', ',mmv', ',bbs,scratch')),
    *with_options('vatt_finetune', ('demo',), ('', ',20', ',5,scratch')),
]
PROBES = [
    'configs/vatt_probes.py:',
    'configs/vatt_probes.py:ucf101',
    'configs/vatt_probes.py:hmdb51,bbs,3',
    'configs/vatt_probes.py:esc50,agnostic_medium,5',
    'configs/vatt_probes.py:youcook2,lbs',
    'configs/vatt_probes.py:msrvtt',
]


@pytest.mark.parametrize('spec', PRETRAINING + FINETUNING + PROBES)
def test_passes_the_checks(spec):
    config = configs.load(spec)
    configs.check_fields(config, default.get_config())
    optim.schedule(config.optimizer.schedule, config.steps)
    for name, entry in config.evals.items():
        assert evals.build(name, entry)
    if spec not in PRETRAINING:
        assert config.evals


def load_probe(argument):
    """The probes' config of one argument."""
    return configs.load(f'configs/vatt_probes.py:{argument}')


def test_probes_of_esc50_as_the_release_codes_them():
    config = load_probe('esc50,bbs,4')
    assert config.data.train.esc50.fold == 4
    assert config.model.inputs.video.fps == 12.5
    assert config.model.towers == configs.load('configs/vatt.py:bbs').model.towers

    head = config.evals.head
    assert head.stream == 'audio'
    assert head.windows == 4
    assert head.solver == 'head'
    assert 'passes' not in head
    assert not head.get('folds')
    assert config.evals.svm.solver == 'svm'


def test_probes_of_other_tasks_as_the_release_codes_them():
    folds = load_probe('hmdb51').evals.svm.folds
    assert folds == (('fold1', 'test'), ('fold2', 'test'), ('fold3', 'test'))
    pools = {entry.pool for entry in load_probe('msrvtt').evals.values()}
    assert pools == {'embeddings', 'similarities'}
    assert load_probe('youcook2').evals.cosines.split == 'validation'


def test_a_fold_that_does_not_exist_is_a_sentence():
    with pytest.raises(ConfigError, match="hmdb51,mbs fold='4': choose one of 1, 2, 3"):
        load_probe('hmdb51,mbs,4')
    with pytest.raises(ConfigError, match="msrvtt has no folds, got '1'; leave it out"):
        load_probe('msrvtt,mbs,1')


def test_published_values_of_pretraining():
    config = configs.load('configs/vatt.py:mbs')
    assert config.steps == 500_000
    assert config.batch_size == 2048
    assert config.optimizer.name == 'keras_adam'
    assert config.optimizer.clip == 0.0
    rate = optim.schedule(config.optimizer.schedule, config.steps)
    assert abs(rate(5_000) - 1e-4) < 1e-9
    assert abs(rate(500_000) - 5e-5) < 1e-9


def test_published_schedule_of_the_paper():
    """A quarter of a period falls fastest at its end: cos(pi / 4) of the way down at half of it."""
    schedule = configs.load('configs/vatt.py:mbs,paper').optimizer.schedule
    assert schedule.name == 'warmup_quarter_cosine'
    assert schedule.warmup == 10_000
    rate = optim.schedule(schedule, 500_000)
    half_way = 5e-5 + 5e-5 * math.cos(math.pi / 4)
    assert abs(rate(10_000) - 1e-4) < 1e-9
    assert abs(rate(255_000) - half_way) < 1e-9
    assert abs(rate(500_000) - 5e-5) < 1e-9


def test_what_the_options_paper_and_code_change():
    default_, paper, code = (
        configs.load(f'configs/vatt.py:mbs{option}') for option in ('', ',paper', ',code')
    )
    assert default_.batch_size == 2048
    assert paper.batch_size == 2048
    assert code.batch_size == 8
    assert code.optimizer == default_.optimizer
    assert paper.optimizer != default_.optimizer

    assert configs.load('configs/vatt_finetune.py:k400,mbs').batch_size == 64
    assert configs.load('configs/vatt_finetune.py:k400,mbs,code').batch_size == 8
    with pytest.raises(ConfigError, match='paper and code exclude each other'):
        configs.load('configs/vatt.py:mbs,paper,code')


def test_published_values_of_finetuning():
    config = configs.load('configs/vatt_finetune.py:k400')
    assert config.steps == 100_000
    optimizer = config.optimizer
    assert optimizer.name == 'keras_sgd'
    assert optimizer.clip == 0.75
    assert optimizer.clip_paths == ('^model/',)
    rate = optim.schedule(optimizer.schedule, config.steps)
    assert abs(rate(2_500) - 5e-3) < 1e-8
    assert rate(100_000) < 1e-9
    assert config.evals.classification.windows == 4
    assert config.evals.classification.crops == 3


def test_the_demo_takes_a_number_of_labels_and_scratch():
    config = configs.load('configs/vatt_finetune.py:demo,20')
    assert config.data.train.playground.per_class == 20
    assert config.init_from
    assert not configs.load('configs/vatt_finetune.py:demo,20,scratch').init_from
    message = r"demo option \(a number of labels, or scratch\)='lots'"
    with pytest.raises(ConfigError, match=message):
        configs.load('configs/vatt_finetune.py:demo,lots')


@pytest.mark.parametrize(
    'spec, classes',
    [
        ('configs/vatt.py:bbs', None),
        ('configs/vatt.py:agnostic_medium', None),
        ('configs/vatt.py:mmv', None),
        ('configs/vatt_finetune.py:audioset', 527),
        ('configs/vatt_finetune.py:imagenet,agnostic_medium', 1000),
        ('configs/vatt_finetune.py:imagenet,mmv', 1000),
        ('configs/vatt_finetune.py:audioset,mmv', 527),
        ('configs/vatt_finetune.py:k400,mmv', 400),
    ],
)
def test_builds(spec, classes):
    """A classifier has a kernel and a bias as wide as there are classes; a contrastive run none."""
    config = configs.load(spec)
    labels = {}
    if classes:
        labels = {'class': [str(index) for index in range(classes)]}
    state = parameter_map.abstract_state(config, labels)
    leaves = jax.tree.leaves(state.params['objective'])
    expected = [classes, classes] if classes else []
    assert [leaf.shape[-1] for leaf in leaves] == expected
    chex.assert_type(leaves, jnp.float32)
    chex.assert_type(jax.tree.leaves(state.params['model']), jnp.float32)


@pytest.mark.parametrize(
    'spec, task, size',
    [
        ('k400,mbs,scratch', 'k400', 'mbs'),
        ('imagenet,scratch', 'imagenet', 'mbs'),
        ('audioset,bbs,scratch', 'audioset', 'bbs'),
    ],
)
def test_scratch_is_the_same_network_from_nothing(spec, task, size):
    scratch = configs.load(f'configs/vatt_finetune.py:{spec}')
    pretrained = configs.load(f'configs/vatt_finetune.py:{task},{size}')
    assert not scratch.init_from
    assert pretrained.init_from == f'runs/vatt_{size}'
    assert scratch.model == pretrained.model
    assert scratch.optimizer == pretrained.optimizer


def test_an_unknown_option_is_a_sentence():
    with pytest.raises(ConfigError, match="k400,mbs option='scrath': choose one of scratch, code"):
        configs.load('configs/vatt_finetune.py:k400,mbs,scrath')


@pytest.mark.parametrize(
    'task, tokens',
    [
        ('imagenet', 196),
        ('k400', 784),
    ],
)
def test_an_image_keeps_all_its_patches_in_training(task, tokens):
    """One temporal patch of 14 × 14: DropToken keeps half of the table's 8 × 14 × 14 positions.

    In a clip of 32 frames it drops half.
    """
    config = configs.load(f'configs/vatt_finetune.py:{task},bbs')
    config.model.towers.video.layers = 1
    model = models.build(config.model)
    batch = preprocess.abstract(config.model.inputs, ('video',), 2, 'float32')
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros(2)))

    def encode(batch, rng):
        variables = model.init(jax.random.key(0), batch, train=False, rng=rng)
        stream = batch['video']
        return model.apply(
            variables, 'video', stream, train=True, rng=rng, features=True, method='encode'
        )

    encoded = jax.eval_shape(encode, batch, rng)
    width = config.model.towers.video.width
    chex.assert_shape(encoded.pooled, (2, width))
    chex.assert_shape(encoded.tokens, (2, tokens, width))


@pytest.mark.parametrize(
    'name',
    [
        'vatt.py:bbs',
        'vatt.py:mbs',
        'vatt.py:lbs',
        'vatt.py:agnostic_medium',
        'vatt_finetune.py:k400,bbs',
        'vatt_finetune.py:audioset,bbs',
        'vatt_finetune.py:k400,agnostic_medium',
        'vatt_finetune.py:audioset,agnostic_medium',
    ],
)
def test_the_official_layout_covers_published_models(name):
    """Each parameter of ours is one of theirs, and the other way, for every size of the release."""
    config = configs.load(f'configs/{name}')
    filled = vatt_tf.filled(config)
    if name.startswith('vatt_finetune'):
        state = parameter_map.abstract_state(config, {'class': ['a', 'b', 'c']})
        entries = list(vatt_tf.layout(filled, config.objective, 3))
    else:
        state = parameter_map.abstract_state(config, {})
        entries = list(vatt_tf.layout(filled))

    ours = parameter_map.variables(state)
    assert {entry.ours for entry in entries} == set(ours)
    assert len({entry.theirs for entry in entries}) == len(entries)
    parameters = sum(math.prod(entry.shape) for entry in entries)
    assert parameters == sum(leaf.size for leaf in ours.values())
