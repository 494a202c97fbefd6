"""CLIP over video and audio: layers over frames, sound in the frozen space, its config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import data_pipelines
from configs import clip_video, default
from tests import tiny_clip
from tests.test_clip_towers import encode, layer_norm, openai_block, variables_of
from vatt_jax import config as configs
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.optim.parameter_paths import matches
from vatt_jax.training import loop

B, T = 2, 3
LAYERS = 2


# ---- layers over frames


def clips():
    return np.random.default_rng(2).normal(size=(B, T, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def over_frames():
    """(config, variables of noise) of a tiny CLIP with layers over three frames."""
    config = tiny_clip.model('clip')
    config.inputs.video.frames = T
    config.towers.video.time_layers = LAYERS
    batch = tiny_clip.batch(config, B)
    batch['video']['data'] = clips()
    return config, variables_of(models.build(config, 'float32'), batch)


def by_their_names(params):
    """The encoder's variables as `openai_block` reads them, float64."""
    flat = {path: np.asarray(x, np.float64) for path, x in flatten_dict(params).items()}
    weights = {}
    for leaf, name in (('scale', 'weight'), ('bias', 'bias')):
        weights[f'last.{name}'] = flat['final_norm', leaf]
        for layer in range(LAYERS):
            weights[f'{layer}.ln_1.{name}'] = flat['layers', 'attention_norm', leaf][layer]
            weights[f'{layer}.ln_2.{name}'] = flat['layers', 'mlp_norm', leaf][layer]
    for layer in range(LAYERS):
        parts = {part: flat['layers', part, 'kernel'][layer] for part in ('query', 'key', 'value')}
        width = len(parts['query'])
        fused = [kernel.reshape(width, width).T for kernel in parts.values()]
        weights[f'{layer}.attn.in_proj_weight'] = np.concatenate(fused)
        biases = [flat['layers', part, 'bias'][layer].reshape(-1) for part in parts]
        weights[f'{layer}.attn.in_proj_bias'] = np.concatenate(biases)
        out = flat['layers', 'out', 'kernel'][layer].reshape(width, width)
        weights[f'{layer}.attn.out_proj.weight'] = out.T
        weights[f'{layer}.attn.out_proj.bias'] = flat['layers', 'out', 'bias'][layer]
        for ours, name in (('mlp_in', 'c_fc'), ('mlp_out', 'c_proj')):
            weights[f'{layer}.mlp.{name}.weight'] = flat['layers', ours, 'kernel'][layer].T
            weights[f'{layer}.mlp.{name}.bias'] = flat['layers', ours, 'bias'][layer]
    return weights


def without_times(config, variables):
    """The same CLIP without layers over frames."""
    config = config.copy_and_resolve_references()
    config.towers.video.time_layers = 0
    params = {k: v for k, v in variables['params'].items() if k != 'times_video'}
    return config, {**variables, 'params': params}


def test_layers_over_frames_are_clips_blocks_on_the_vectors_of_frames(over_frames):
    config, variables = over_frames
    got = encode(config, variables, 'video', clips()).pooled
    plain = without_times(config, variables)
    frames = [encode(*plain, 'video', clips()[:, [t]]).pooled for t in range(T)]
    vectors = np.stack(frames, 1).astype(np.float64)  # [B T D]
    times = variables['params']['times_video']
    weights = by_their_names(times['encoder'])
    for row in range(B):
        x = vectors[row] + np.asarray(times['position_table'], np.float64)
        for layer in range(LAYERS):
            x = openai_block(weights, f'{layer}.', x, heads=2)
        mixed = layer_norm(weights, 'last.', x)
        expected = (vectors[row] + float(times['gate']) * mixed).mean(0)
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-4)


def test_layers_over_frames_begin_as_the_mean_of_the_frames(over_frames):
    config, variables = over_frames
    times = {**variables['params']['times_video'], 'gate': jnp.zeros(())}
    begun = {**variables, 'params': {**variables['params'], 'times_video': times}}
    got = encode(config, begun, 'video', clips()).pooled
    mean = encode(*without_times(config, variables), 'video', clips()).pooled
    np.testing.assert_array_equal(got, mean)


@pytest.mark.parametrize('frames, layers', [(1, 2), (4, -1)])
def test_layers_over_frames_that_are_none_are_refused(frames, layers):
    config = tiny_clip.model('clip')
    config.inputs.video.frames = frames
    config.towers.video.time_layers = layers
    batch = tiny_clip.batch(config, B)
    message = f'time_layers={layers}: expected a positive number for clips of several frames'
    with pytest.raises(ConfigError, match=message):
        variables_of(models.build(config, 'float32'), batch)


# ---- the config


@pytest.mark.parametrize(
    'name',
    ['demo', 'demo,temporal', 'demo,sentences', 'demo,synthetic', 'b32_audioset', 'rn50_audioset'],
)
def test_every_name_is_a_config(name):
    c = clip_video.get_config(name)
    configs.check_fields(c, default.get_config())
    assert set(c.model.towers) == {'video', 'text', 'audio'}
    # Sound meets sentences in no loss, unless that is asked for.
    taught = {pair[:2] for pair in c.objective.pairs if pair[3]}
    assert (('audio', 'text') in taught) == ('sentences' in name)
    assert (('video', 'text') in taught) == ('temporal' in name)
    if name.startswith('demo'):
        assert c.init_from == ('' if 'synthetic' in name else 'runs/clip')


@pytest.mark.parametrize(
    'name, message',
    [
        ('b33_audioset', "configs/clip_video.py:b33_audioset model='clip_b33': choose one of"),
        ('b32_cc3m', "dataset='cc3m': choose one of audioset"),
        ('demo,fast', "configs/clip_video.py:demo option='fast': choose one of synthetic"),
        ('rn50_audioset,temporal', 'option temporal is of the vit towers'),
    ],
)
def test_a_mistake_in_a_name_is_named(name, message):
    with pytest.raises(ConfigError) as error:
        clip_video.get_config(name)
    assert message in str(error.value)


def test_what_is_trained_is_what_is_new():
    c = clip_video.get_config('demo,temporal')
    c.model.towers.text.vocab = 9
    state = parameter_map.abstract_state(c, {})
    names = ['/'.join(path) for path in flatten_dict({'model': state.params['model']})]
    trained = {name for name in names if not matches(name, c.optimizer.frozen)}
    new = {name for name in names if matches(name.removeprefix('model/'), c.init_skip)}
    assert trained == new
    parts = {name.split('/')[1] for name in trained}
    assert parts == {'fronts_audio', 'encoders_audio', 'times_video', 'head'}
    assert {name for name in trained if '/head/' in name} == {
        'model/head/audio_vt/kernel',
        'model/head/audio_vt/bias',
    }


@pytest.mark.slow
@pytest.mark.parametrize('options', ['', ',temporal', ',sentences'])
def test_a_tiny_run_leaves_the_frozen_space_as_it_was(tmp_path, options):
    def run(name, steps):
        c = clip_video.get_config(f'demo,synthetic{options}')
        c.steps, c.batch_size, c.report, c.log_every = steps, 8, False, 1
        c.optimizer.schedule.warmup = 0
        c.evals = {}
        c.data.synthetic_size = 32
        loop.train(c, data_pipelines.open(c), tmp_path / name, quiet=True)
        return parameter_map.read_run(tmp_path / name)[2]

    short, long = run('short', 1), run('long', 3)
    for path, value in long.items():
        if path[0] == 'params':
            name = '/'.join(('model', *path[1:]))
            is_frozen = matches(name, clip_video.FROZEN)
            assert np.array_equal(value, short[path]) == is_frozen, name
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(long))
