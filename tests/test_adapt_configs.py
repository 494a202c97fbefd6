"""configs/adapt.py: every method, and a tiny run of each beside a model of noise."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import data_pipelines
import vatt_jax
from configs import adapt, clip, default, demo
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.models import adapters
from vatt_jax.training import checkpoint, loop

METHODS = [*adapt.CLASSIFIED, *adapt.NAMED]


def small(c):
    """The same in seconds."""
    c.steps, c.batch_size, c.report, c.log_every = 2, 8, False, 1
    c.data.synthetic_size, c.checkpoint.every = 32, 2
    c.optimizer.schedule.warmup = 0
    return c


def write_base(folder, c):
    """A run folder with a model of noise, of the synthetic data."""
    data = data_pipelines.open(c)
    loop.resolve(c, data)
    state = parameter_map.abstract_state(c, {}, with_objective=False)
    noise = np.random.default_rng(0)
    arrays = {}
    for path, leaf in parameter_map.variables(state).items():
        x = 0.2 * noise.normal(size=leaf.shape)
        is_scale = path[-1] in ('scale', 'var')
        arrays[path] = (1 + np.abs(x) if is_scale else x).astype(leaf.dtype)
    parameter_map.write_run(folder, c, state, arrays, data.info)
    return folder


@pytest.mark.parametrize('method', METHODS)
def test_every_method_is_a_config(method):
    base = 'clip' if method in adapt.NAMED else 'demo'
    c = adapt.get_config(f'{base},{method},labels=5')
    configs.check_fields(c, default.get_config())
    configs.check_values(c)
    assert bool(c.base) != (method == 'full')
    assert c.data.train.playground.per_class == 5
    if c.model.adapter:
        assert c.model.adapter.name in adapters.ADAPTERS


@pytest.mark.parametrize(
    'name, message',
    [
        ('demo,lore', "configs/adapt.py method='lore': choose one of linear"),
        ('demo,lora,label=5', "option='label': choose one of labels"),
        ('demo,lora,labels=few', 'labels=few: expected a number of segments'),
        ('nowhere,lora', 'nowhere: expected demo, clip or the folder of a run'),
    ],
)
def test_a_mistake_in_a_name_is_named(name, message):
    with pytest.raises(ConfigError) as error:
        adapt.get_config(name)
    assert message in str(error.value)


def test_the_model_of_any_run_is_taken_as_it_is(tmp_path):
    stored = demo.get_config('agnostic')
    stored.model.packed, stored.model.attention = True, 'xla'
    (tmp_path / 'config.json').write_text(configs.to_json(stored))
    c = adapt.get_config(f'{tmp_path},vpt')
    assert c.base == str(tmp_path)
    assert c.model.adapter.name == 'vpt'
    assert (c.model.packed, c.model.attention) == (False, 'dense')
    assert c.model.encoder == stored.model.encoder


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_a_tiny_run(tmp_path, method):
    is_named = method in adapt.NAMED
    name = 'clip' if is_named else 'demo'
    source = clip.get_config('demo,synthetic') if is_named else demo.get_config('synthetic')
    base = write_base(tmp_path / 'base', small(source))
    c = small(adapt.get_config(f'{name},{method},synthetic'))
    c.evals = {}
    if is_named:
        c.evals = {'zero_shot': {'type': 'zero_shot', 'label': 'class', 'split': 'test'}}
        c.objective.candidates = 12
    setattr(c, 'init_from' if method == 'full' else 'base', str(base))
    _, scalars = loop.train(c, data_pipelines.open(c), tmp_path / 'run', quiet=True)
    assert all(np.isfinite(value) for value in scalars.values())

    values = checkpoint.read_model(checkpoint.find(tmp_path / 'run'))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(values))
    before = checkpoint.read_model(checkpoint.find(base))
    _, rest = adapters.split(values['params'])
    source = flatten_dict(before['params'])
    same = [np.array_equal(x, source[path]) for path, x in flatten_dict(rest).items()]
    assert all(same) == (method != 'full')
    model = vatt_jax.load(tmp_path / 'run')
    spec = model.inputs['video']
    frames = np.zeros((spec['frames'], spec['size'], spec['size'], 3), np.uint8)
    names = ['a red disc', 'a blue ring'] if is_named else None
    assert np.isfinite(model.classify(video=frames, names=names)['scores']).all()
