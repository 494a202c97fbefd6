"""configs/clip.py: every name, what it trains, and a tiny run of it."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import data_pipelines
from configs import clip, default
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.models import presets
from vatt_jax.optim.parameter_paths import matches
from vatt_jax.training import loop


@pytest.mark.parametrize('name', [*presets.CLIPS, 'demo', 'demo,siglip', 'demo,resnet'])
def test_every_name_is_a_config(name):
    if not name.startswith('demo'):
        name = f'{name.removeprefix("clip_")}_cc12m'
    c = clip.get_config(name)
    configs.check_fields(c, default.get_config())
    assert set(c.model.towers) == {'video', 'text'}
    is_siglip = 'siglip' in name
    assert c.objective.form == ('siglip' if is_siglip else 'clip')
    assert c.model.head.name.startswith('siglip' if is_siglip else 'clip')


@pytest.mark.parametrize('name', ['b32_laion400m', 'siglip_b16_cc12m'])
def test_a_recipe_opens_without_its_data(name):
    c = clip.get_config(f'{name},synthetic')
    # Rows of the word table are enough for the words of the synthetic source.
    assert 0 < data_pipelines.open(c).tokenizer.size <= c.model.towers.text.vocab


def test_a_recipe_sees_its_set_as_often_as_published():
    c = clip.get_config('b32_laion400m')
    assert (c.batch_size, c.optimizer.weight_decay, c.optimizer.b2) == (32_768, 0.2, 0.98)
    assert round(c.steps * c.batch_size / 407_332_084, 2) == 32
    assert clip.get_config('rn50_yfcc15m').optimizer.schedule.peak == 5e-4


@pytest.mark.parametrize(
    'name, message',
    [
        ('b32_cc4m', "configs/clip.py:b32_cc4m dataset='cc4m': choose one of cc3m"),
        ('b33_cc3m', "configs/clip.py:b33_cc3m model='clip_b33': choose one of clip_b32"),
        ('demo,fast', "configs/clip.py:demo option='fast': choose one of synthetic"),
        ('rn50_cc3m,flip', 'option flip drops patches, which a ResNet lacks'),
    ],
)
def test_a_mistake_in_a_name_is_named(name, message):
    with pytest.raises(ConfigError) as error:
        clip.get_config(name)
    assert message in str(error.value)


def test_what_is_decayed_and_what_is_locked():
    c = clip.get_config('demo,locked')
    c.model.towers.text.vocab = 9
    state = parameter_map.abstract_state(c, {})
    flat = flatten_dict({'model': state.params['model'], 'objective': state.params['objective']})
    names = ['/'.join(path) for path in flat]
    locked = {name for name in names if matches(name, c.optimizer.frozen)}
    expected = {name for name in names if '_video/' in name}
    assert locked == expected
    for name in names:
        leaf = flat[tuple(name.split('/'))]
        # Of stacked layers the first axis is that of the layers; biases of heads have two more.
        is_vector = name.endswith(('bias', 'scale', 'class_token'))
        assert matches(name, c.optimizer.decay_skip) == is_vector, (name, leaf.shape)


@pytest.mark.slow
@pytest.mark.parametrize('options', ['', ',siglip', ',resnet', ',flip,locked'])
def test_a_tiny_run(tmp_path, options):
    c = clip.get_config(f'demo,synthetic{options}')
    c.steps, c.batch_size, c.report, c.log_every = 3, 8, False, 1
    c.optimizer.schedule.warmup = 0
    c.evals = {}
    c.data.synthetic_size = 32
    loop.train(c, data_pipelines.open(c), tmp_path / 'run', quiet=True)
    _, _, ours = parameter_map.read_run(tmp_path / 'run')
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))
    if 'locked' not in options:
        assert ours[('objective', 'log_scale')] != np.float32(np.log(1 / 0.07))
        return
    c.steps = 1
    loop.train(c, data_pipelines.open(c), tmp_path / 'shorter', quiet=True)
    _, _, before = parameter_map.read_run(tmp_path / 'shorter')
    for path, value in ours.items():
        is_locked = path[1].endswith('_video')
        assert np.array_equal(value, before[path]) == is_locked, path


@pytest.mark.slow
@pytest.mark.parametrize('option', ['flip', 'siglip'])
def test_one_device_is_eight_and_microbatches_are_the_batch(tmp_path, option):
    def losses(name, mesh, accumulate):
        c = clip.get_config(f'demo,synthetic,{option}')
        c.steps, c.batch_size, c.report, c.log_every = 2, 16, False, 1
        c.optimizer.schedule.warmup = 0
        c.evals = {}
        c.data.synthetic_size = 32
        c.accumulate, c.accumulation = accumulate, 'exact'
        c.mesh.update(mesh)
        # Whose compiled program takes a while.
        c.model.towers.video.layers = c.model.towers.text.layers = 2
        loop.train(c, data_pipelines.open(c), tmp_path / name, quiet=True)
        lines = (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
        return [json.loads(line)['loss'] for line in lines if 'loss' in line]

    alone = losses('alone', {'replica': 1}, 1)
    eight = losses('eight', {'replica': 2, 'fsdp': 2, 'model': 2}, 1)
    parts = losses('parts', {'replica': 1}, 2)
    assert len(alone) == 2
    np.testing.assert_allclose(eight, alone, rtol=2e-4)
    np.testing.assert_allclose(parts, alone, rtol=2e-4)
