"""Adapters against definitions in NumPy float64, in CLIP's tower and in VATT's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict

from tests import tiny, tiny_clip
from tests.test_clip_towers import B, layer_norm, openai_block, openai_patches, theirs, variables_of
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.importers import clip_layouts
from vatt_jax.models import adapters
from vatt_jax.rng import Rng

LAYERS, HEADS = tiny_clip.SIZE['layers'], tiny_clip.SIZE['heads']


def adapted_clip(**fields):
    """`config.model` of a tiny CLIP whose adapter has these fields, and a batch."""
    m = tiny_clip.model('clip')
    m.adapter = fields
    return m, tiny_clip.batch(m, B)


def clip_variables(m, batch):
    """(variables of noise, those of the towers by their released names, those of the adapters)."""
    variables = variables_of(models.build(m), batch)
    new, base = adapters.split(variables['params'])
    sizes = clip_layouts.Sizes(tiny_clip.SIZE['head_width'], tiny_clip.SIZE['heads'])
    weights = theirs('openai', {'params': base}, sizes)
    float64 = {path: np.asarray(x, np.float64) for path, x in flatten_dict(new, sep='/').items()}
    return variables, weights, float64


def encode(m, variables, batch, stream, features=False):
    """What the tower makes of a stream."""
    model = models.build(m)
    rng = Rng.create(0, 0, jnp.arange(B))

    def apply(variables):
        return model.apply(
            variables,
            stream,
            batch[stream],
            train=False,
            rng=rng,
            features=features,
            method='encode',
        )

    return jax.jit(apply)(variables)


def prompted_picture(weights, picture, prompts, deep):
    """VPT's forward pass: behind the class token, behind positions (and CLIP's first norm)."""
    x = openai_patches(weights['visual.conv1.weight'], picture)
    x = np.concatenate([weights['visual.class_embedding'][None], x])
    x = layer_norm(weights, 'visual.ln_pre.', x + weights['visual.positional_embedding'])
    num_patches = len(x) - 1
    x = np.concatenate([x[:1], prompts[0], x[1:]])
    for layer in range(LAYERS):
        if deep and layer > 0:
            x = np.concatenate([x[:1], prompts[layer], x[-num_patches:]])
        x = openai_block(weights, f'visual.transformer.resblocks.{layer}.', x, HEADS)
    return layer_norm(weights, 'visual.ln_post.', x)


@pytest.mark.parametrize('deep, scan', [(True, True), (False, False)])
def test_vpt_in_clip_is_its_definition(deep, scan):
    m, batch = adapted_clip(name='vpt', prompts=3, deep=deep, modalities=('video',))
    m.scan = scan
    variables, weights, new = clip_variables(m, batch)
    prompts = new['adapters_video/prompts']
    assert prompts.shape == (LAYERS if deep else 1, 3, 16)
    encoded = encode(m, variables, batch, 'video', features=True)
    pooled = encode(m, variables, batch, 'video').pooled
    for row in range(B):
        picture = np.asarray(batch['video']['data'][row, 0], np.float64)
        expected = prompted_picture(weights, picture, prompts, deep)
        np.testing.assert_allclose(pooled[row], expected[0], rtol=2e-4, atol=2e-4)
        # Prompts are not among the features.
        np.testing.assert_allclose(encoded.tokens[row], expected[4:], rtol=2e-4, atol=2e-4)


def test_lora_in_clip_is_the_sum_of_two_matrices():
    m, batch = adapted_clip(name='lora', rank=2, alpha=6.0, modalities=('video',))
    m.remat = 'dots'
    m.adapter.projections = ('query', 'value', 'out', 'mlp_in', 'mlp_out')
    variables, weights, new = clip_variables(m, batch)
    # Written into the weights of the release: 6 / 2 · A · B, transposed as torch has them.
    for layer in range(LAYERS):
        block = f'visual.transformer.resblocks.{layer}.'
        for name in m.adapter.projections:
            down = new[f'adapters_video/{name}_down'][layer].reshape(-1, 2)
            up = new[f'adapters_video/{name}_up'][layer].reshape(2, -1)
            delta = 3.0 * (down @ up).T
            if name in ('query', 'value'):
                first = {'query': 0, 'value': 32}[name]
                weights[f'{block}attn.in_proj_weight'][first : first + 16] += delta
            else:
                key = {'out': 'attn.out_proj', 'mlp_in': 'mlp.c_fc', 'mlp_out': 'mlp.c_proj'}[name]
                weights[f'{block}{key}.weight'] += delta
    pooled = encode(m, variables, batch, 'video').pooled
    for row in range(B):
        picture = np.asarray(batch['video']['data'][row, 0], np.float64)
        no_prompts = np.zeros((LAYERS, 0, 16))
        expected = prompted_picture(weights, picture, no_prompts, deep=False)
        np.testing.assert_allclose(pooled[row], expected[0], rtol=3e-4, atol=3e-4)


def test_lora_begins_as_the_model_without_it():
    m, batch = adapted_clip(name='lora', modalities=('video',))
    variables = variables_of(models.build(m), batch)
    new, base = adapters.split(variables['params'])
    tower = adapters.Tower('video', LAYERS, 16, 24, HEADS, 8)
    module = adapters.build(m.adapter, {'video': tower}, 'float32')['video']
    initial = meta.unbox(module.init(jax.random.key(0), method='layers'))['params']
    assert jax.tree.structure(initial) == jax.tree.structure(new['adapters_video'])
    begun = {'params': {**base, 'adapters_video': initial}}
    adapted = encode(m, begun, batch, 'video').pooled
    m.adapter = {}
    alone = encode(m, {'params': base}, batch, 'video').pooled
    np.testing.assert_array_equal(adapted, alone)


# ---- VATT's layers
def vatt_block(layer, x):
    """One pre-LN layer on the tokens x [N D]; kernels as VATT's tower has them."""

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return normed * layer[f'{name}/scale'] + layer.get(f'{name}/bias', 0)

    y = norm('attention_norm', x)
    heads = []
    for head in range(layer['query/kernel'].shape[1]):
        query, key, value = (
            y @ layer[f'{name}/kernel'][:, head] + layer[f'{name}/bias'][head]
            for name in ('query', 'key', 'value')
        )
        logits = query @ key.T / math.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value)
    attended = np.stack(heads, 1)  # [N heads kv]
    x = x + np.einsum('nhk,hkd->nd', attended, layer['out/kernel']) + layer['out/bias']
    hidden = norm('mlp_norm', x) @ layer['mlp_in/kernel'] + layer['mlp_in/bias']
    erf = np.vectorize(math.erf)
    hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
    return x + hidden @ layer['mlp_out/kernel'] + layer['mlp_out/bias']


@pytest.mark.parametrize('modality', ['video', pytest.param('audio', marks=pytest.mark.slow)])
def test_vpt_in_vatts_towers_is_its_definition(modality):
    c = tiny.config()
    c.model.adapter = {'name': 'vpt', 'prompts': 2, 'bottleneck': 5}
    c.model.towers.audio.layers = 2
    c.model.towers = {modality: c.model.towers[modality]}
    c.model.head = {'name': 'none'}
    noise = np.random.default_rng(3)
    shape = {'video': (B, 4, 16, 16, 3), 'audio': (B, 1024)}[modality]
    stream = {'data': noise.normal(size=shape).astype(np.float32), 'valid': np.ones(B, bool)}
    variables = variables_of(models.build(c.model), {modality: stream})
    pooled = encode(c.model, variables, {modality: stream}, modality).pooled

    flat = flatten_dict(variables['params'], sep='/')
    flat = {path: np.asarray(x, np.float64) for path, x in flat.items()}
    adapter = f'adapters_{modality}/'
    prompts = flat[f'{adapter}prompts'] @ flat[f'{adapter}projection/kernel']
    prompts += flat[f'{adapter}projection/bias']
    encoder = f'encoders_{modality}/'
    rng = Rng.create(0, 0, jnp.arange(B))
    front = models.build(c.model).apply(
        variables, method=lambda model: model.fronts[modality](stream['data'], rng, False)
    )
    for row in range(B):
        x = np.asarray(front.x[row], np.float64)
        num_patches = len(x) - 1
        for number in range(2):
            x = np.concatenate([x[:1], prompts[number], x[-num_patches:]])
            prefix = f'{encoder}layers/'
            layer = {
                path.removeprefix(prefix): value[number]
                for path, value in flat.items()
                if path.startswith(prefix)
            }
            x = vatt_block(layer, x)
        x = x[0] - x[0].mean()
        x = x / np.sqrt((x**2).mean() + 1e-6)
        expected = x * flat[f'{encoder}final_norm/scale'] + flat[f'{encoder}final_norm/bias']
        np.testing.assert_allclose(pooled[row], expected, rtol=2e-4, atol=2e-4)


def test_initial_prompts_are_uniform_within_the_papers_bound():
    tower = adapters.Tower('video', layers=2, width=16, patch_values=3 * 8 * 8)
    fields = {'name': 'vpt', 'prompts': 200}
    module = adapters.build(fields, {'video': tower}, 'float32')['video']
    prompts = meta.unbox(module.init(jax.random.key(0), method='layers'))['params']['prompts']
    bound = math.sqrt(6 / (3 * 8 * 8 + 16))
    assert 0.99 * bound < np.abs(prompts).max() <= bound
    assert abs(np.std(prompts) - bound / math.sqrt(3)) < 0.02 * bound


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'name': 'lore'}, "config.model.adapter.name='lore': choose one of lora"),
        ({'name': 'lora', 'rank': 0}, 'config.model.adapter.rank'),
        ({'name': 'lora', 'projections': ('q',)}, "projections='q': choose one of query"),
        ({'name': 'vpt', 'prompts': 0}, 'config.model.adapter.prompts'),
        ({'name': 'vpt', 'deepness': True}, 'config.model.adapter.deepness'),
        ({'name': 'vpt', 'modalities': ('text',)}, "vpt cannot adapt the tower of 'text'"),
        ({'name': 'vpt', 'modalities': ('audio',)}, 'config.model.adapter.modalities'),
    ],
)
def test_a_mistake_is_a_sentence(fields, message):
    m, batch = adapted_clip(**fields)
    with pytest.raises(ConfigError) as error:
        variables_of(models.build(m), batch)
    assert message in str(error.value)


def test_a_network_without_layers_is_refused():
    m = tiny_clip.model('resnet')
    m.adapter = {'name': 'vpt'}
    with pytest.raises(
        ConfigError, match='vpt.* can adapt no tower .*video: it has no transformer'
    ):
        variables_of(models.build(m), tiny_clip.batch(m, B))
