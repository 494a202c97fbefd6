"""SimCLR and CVRL: their heads by definition, their configs, and that they learn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

import data_pipelines
from configs import default, simclr
from tests import tiny
from vatt_jax import config as configs
from vatt_jax import evals, models, objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.inputs import augmentation
from vatt_jax.models.common_space import CommonSpaces
from vatt_jax.training import loop

DEMOS = ['demo', *(f'demo,{option}' for option in simclr.OPTIONS)]
PUBLISHED = ['kinetics400', 'kinetics400,cvrl', 'kinetics600,cvrl', 'kinetics400,cvrl,synthetic']


# ---- heads
@pytest.mark.parametrize('graph, hidden_layers', [('simclr', 1), ('cvrl', 3)])
def test_the_head_is_its_definition(graph, hidden_layers):
    """Dense, batch norm and ReLU of each hidden layer; then dense alone, for both views alike."""
    rng = np.random.default_rng(0)
    names = ('video', 'video.second')
    pooled = {name: rng.normal(size=(6, 7)).astype(np.float32) for name in names}
    valid = {name: np.ones(6, bool) for name in names}
    module = CommonSpaces({'name': graph, 'hidden': 5, 'video': 3})

    def init():
        return module.init(jax.random.key(0), pooled, valid, False)

    variables = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.uniform(size=leaf.shape), dict(meta.unbox(init()))
    )
    got = module.apply(variables, pooled, valid, False)
    assert set(got) == {'video'}

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
    stats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['batch_stats'])
    for name in names:
        x = pooled[name].astype(np.float64)
        for number in range(hidden_layers):
            layer, norm = f'video_hidden_{number}', f'video_hidden_{number}_norm'
            x = x @ params[layer]['kernel'] + params[layer]['bias']
            x = (x - stats[norm]['mean']) / np.sqrt(stats[norm]['var'] + 1e-5)
            x = np.maximum(x * params[norm]['scale'] + params[norm]['bias'], 0)
        last = params['video_projection']
        expected = x @ last['kernel'] + last['bias']
        np.testing.assert_allclose(got['video'][name], expected, rtol=1e-4, atol=1e-5)
    assert len(params) == 2 * hidden_layers + 1


@pytest.mark.parametrize(
    'config, message',
    [
        ({'name': 'simclr', 'video': 3}, 'config.model.head.hidden is missing'),
        ({'name': 'simclr', 'hidden': 3}, "no width for any space of the graph 'simclr'"),
        ({'name': 'simclr', 'hidden': 0, 'video': 3}, 'has the spaces video, audio, hidden'),
        ({'name': 'fac', 'hidden': 3, 'va': 3}, 'config.model.head.hidden=3'),
    ],
)
def test_mistakes_in_the_head_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        CommonSpaces(config).init(
            jax.random.key(0), {'video': jnp.ones((2, 4))}, {'video': jnp.ones(2, bool)}, False
        )


# ---- configs
@pytest.mark.parametrize('arg', [*DEMOS, *PUBLISHED])
def test_passes_the_checks(arg):
    c = configs.load(f'configs/simclr.py:{arg}')
    configs.check_fields(c, default.get_config())
    configs.check_values(c)
    optim.check(c.optimizer, c.steps)
    models.build(c.model, c.compute_dtype)
    objective = objectives.build(c.objective)
    assert objective.streams() == ('video', 'video.second')
    for name, entry in c.evals.items():
        evals.build(name, entry)


def test_the_published_values():
    c = configs.load('configs/simclr.py:kinetics600,cvrl')
    # 200 of its 800 passes are the 71,488 steps of the released config, within a pass of rounding.
    assert abs(c.steps / 4 - 71_488) < 357
    rate = optim.schedule(c.optimizer.schedule, c.steps)
    # Of the sum of both views' losses, of which ours is half.
    assert float(rate(c.optimizer.schedule.warmup)) / 2 == pytest.approx(0.32)
    assert c.optimizer.weight_decay * 2 == pytest.approx(1e-6)
    assert c.optimizer.schedule.warmup == pytest.approx(1787, abs=5)
    assert (c.data.crop, c.data.aspect, c.data.flip) == ((0.3, 1.0), (0.5, 2.0), 0.5)
    assert dict(c.data.views) == {'video.second': {'kind': 'clip', 'interval': 'linear'}}
    assert c.model.head.to_dict() == {'name': 'cvrl', 'hidden': 2048, 'video': 128}
    # The first view is always blurred, the second seldom, and solarised.
    shares = []
    for view in ('video', 'video.second'):
        fields = augmentation.of_stream(c.augment, view)
        shares.append([fields[name] for name in ('color', 'grey', 'blur', 'solarise')])
    assert shares == [[0.8, 0.2, 1.0, 0.0], [0.8, 0.2, 0.1, 0.2]]


@pytest.mark.parametrize('option, strong', [('coclr', 0.3), ('plain', 0.0), ('cvrl', 1.0)])
def test_options_of_augmentation(option, strong):
    assert configs.load(f'configs/simclr.py:demo,{option}').augment.strong == strong


@pytest.mark.parametrize('arg', ['demos', 'demo,blurred', 'kinetics400,demo'])
def test_what_is_not_there_is_named(arg):
    with pytest.raises(ConfigError, match='choose one of'):
        configs.load(f'configs/simclr.py:{arg}')


# ---- learning
def small_config(method, is_convolutional):
    """A run of 24 steps on the synthetic source; another tower compiles many times faster."""
    c = configs.load(f'configs/simclr.py:demo,synthetic,{method}')
    c.steps, c.batch_size, c.log_every = 24, 16, 1
    c.model.inputs.video.update({'frames': 4, 'size': 16})
    c.model.inputs.audio.update({'samples': 320, 'rate': 400})
    c.model.towers.video.multiplier = 1 / 16
    if not is_convolutional:
        c.model.towers = {'video': tiny.config().model.towers.video}
    c.model.head.update({'hidden': 32, 'video': 16})
    c.optimizer.schedule.warmup = 4
    c.data.synthetic_size = 64
    c.evals, c.report, c.mesh.replica = {}, False, 1
    return c


@pytest.mark.parametrize(
    'method, is_convolutional',
    [
        pytest.param('cvrl', False, marks=pytest.mark.slow),
        pytest.param('cvrl', True, marks=pytest.mark.slow),
        pytest.param('coclr', True, marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls(method, is_convolutional, tmp_path):
    c = small_config(method, is_convolutional)
    loop.train(c, data_pipelines.open(c), tmp_path, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < np.mean(losses[:4]) - 0.2
