"""CLIP's and SigLIP's towers against the released networks, written down in NumPy float64.

The definitions read the variables by the names of the releases, so that they check the tables of
the importers as well.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from flax.traverse_util import flatten_dict

from tests import tiny_clip
from vatt_jax import models
from vatt_jax.config import ConfigError
from vatt_jax.importers import clip_layouts, parameter_map
from vatt_jax.models import presets
from vatt_jax.rng import Rng

B = 2  # pictures in a batch


def variables_of(model, batch, seed=0):
    """Variables of noise: biases of 0 and scales of 1 would hide their being left out."""
    rng = Rng.create(0, 0, jnp.arange(B))
    abstract = meta.unbox(
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False, rng=rng))
    )
    noise = np.random.default_rng(seed)

    def draw(path, like):
        x = 0.3 * noise.normal(size=like.shape)
        if path[-1].key in ('scale', 'var'):
            x = 1 + np.abs(x)
        return jnp.asarray(x, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def theirs(layout, variables, sizes):
    """The same variables by the names of a release, float64."""
    flat = {path: np.asarray(x, np.float64) for path, x in flatten_dict(variables).items()}
    entries = clip_layouts.layout(layout, flat, sizes)
    assert {entry.ours for entry in entries} == set(flat)
    return parameter_map.to_theirs(flat, entries)


def spaces(config, batch, variables):
    """What the model makes of a batch, in the common space."""
    model = models.build(config, 'float32')
    rng = Rng.create(0, 0, jnp.arange(B))

    def apply(variables):
        return model.apply(variables, batch, train=False, rng=rng).spaces['vt']

    return jax.jit(apply)(variables)


# ---- definitions
def layer_norm(weights, name, x, eps=1e-5, leaves=('weight', 'bias')):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * weights[name + leaves[0]] + weights[name + leaves[1]]


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(query, key, value, heads, causal=False):
    """Heads one after the other; query [Q D], key and value [N D] -> [Q D]."""
    out = np.zeros_like(query)
    head_width = query.shape[1] // heads
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        for row in range(len(query)):
            seen = row + 1 if causal else len(key)
            logits = key[:seen, part] @ query[row, part] / math.sqrt(head_width)
            weights = np.exp(logits - logits.max())
            out[row, part] = weights / weights.sum() @ value[:seen, part]
    return out


def openai_block(weights, name, x, heads, causal=False):
    """A ResidualAttentionBlock on the tokens x [N D] of one row."""
    y = layer_norm(weights, f'{name}ln_1.', x)
    fused = y @ weights[f'{name}attn.in_proj_weight'].T + weights[f'{name}attn.in_proj_bias']
    attended = attend(*np.split(fused, 3, axis=1), heads, causal)
    out = f'{name}attn.out_proj.'
    x = x + attended @ weights[f'{out}weight'].T + weights[f'{out}bias']
    y = layer_norm(weights, f'{name}ln_2.', x)
    hidden = quick_gelu(y @ weights[f'{name}mlp.c_fc.weight'].T + weights[f'{name}mlp.c_fc.bias'])
    return x + hidden @ weights[f'{name}mlp.c_proj.weight'].T + weights[f'{name}mlp.c_proj.bias']


def openai_patches(kernel, picture):
    """A strided convolution, patch by patch: [H W 3] -> [N D], row by row."""
    side = kernel.shape[-1]
    rows = []
    for top in range(0, picture.shape[0] - side + 1, side):
        for left in range(0, picture.shape[1] - side + 1, side):
            patch = picture[top : top + side, left : left + side]
            rows.append(np.einsum('dchw,hwc->d', kernel, patch))
    return np.stack(rows)


def openai_picture(weights, picture, layers, heads, kept=None):
    """VisionTransformer on one picture [H W 3], or on some of its patches."""
    x = openai_patches(weights['visual.conv1.weight'], picture)
    x = np.concatenate([weights['visual.class_embedding'][None], x])
    x = x + weights['visual.positional_embedding']
    if kept is not None:
        x = x[[0, *(1 + kept)]]
    x = layer_norm(weights, 'visual.ln_pre.', x)
    for layer in range(layers):
        x = openai_block(weights, f'visual.transformer.resblocks.{layer}.', x, heads)
    return layer_norm(weights, 'visual.ln_post.', x[0]) @ weights['visual.proj']


def openai_sentence(weights, ids, layers, heads):
    """encode_text on one row of numbers [L]."""
    x = weights['token_embedding.weight'][ids] + weights['positional_embedding'][: len(ids)]
    for layer in range(layers):
        x = openai_block(weights, f'transformer.resblocks.{layer}.', x, heads, causal=True)
    return layer_norm(weights, 'ln_final.', x)[np.argmax(ids)] @ weights['text_projection']


def convolution(kernel, x, stride=1):
    """Zeros around, kernel (out, in, rows, columns); [H W C] -> [H' W' D]."""
    pad = kernel.shape[-1] // 2
    padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    height = (x.shape[0] + 2 * pad - kernel.shape[-1]) // stride + 1
    width = (x.shape[1] + 2 * pad - kernel.shape[-1]) // stride + 1
    out = np.zeros((height, width, len(kernel)))
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            seen = padded[top : top + kernel.shape[-1], left : left + kernel.shape[-1]]
            out[row, column] = np.einsum('dchw,hwc->d', kernel, seen)
    return out


def batch_norm(weights, name, x):
    scale = weights[f'{name}weight'] / np.sqrt(weights[f'{name}running_var'] + 1e-5)
    return (x - weights[f'{name}running_mean']) * scale + weights[f'{name}bias']


def mean_pool(x):
    """Means of squares of two pixels."""
    height, width = x.shape[0] // 2, x.shape[1] // 2
    out = np.zeros((height, width, x.shape[2]))
    for row in range(height):
        for column in range(width):
            out[row, column] = x[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1))
    return out


def bottleneck(weights, name, x, stride):
    shortcut = x
    y = x
    for number in (1, 2, 3):
        if number == 3 and stride == 2:
            y = mean_pool(y)
        y = batch_norm(
            weights, f'{name}bn{number}.', convolution(weights[f'{name}conv{number}.weight'], y)
        )
        if number < 3:
            y = np.maximum(y, 0)
    if f'{name}downsample.0.weight' in weights:
        shortcut = mean_pool(x) if stride == 2 else x
        shortcut = convolution(weights[f'{name}downsample.0.weight'], shortcut)
        shortcut = batch_norm(weights, f'{name}downsample.1.', shortcut)
    return np.maximum(y + shortcut, 0)


def attention_pool(weights, x, heads):
    """AttentionPool2d on one map [H W C]."""
    points = x.reshape(-1, x.shape[-1])
    points = np.concatenate([points.mean(0, keepdims=True), points])
    points = points + weights['visual.attnpool.positional_embedding']

    def project(name, points):
        name = f'visual.attnpool.{name}_proj.'
        return points @ weights[f'{name}weight'].T + weights[f'{name}bias']

    attended = attend(project('q', points[:1]), project('k', points), project('v', points), heads)
    return project('c', attended)[0]


def openai_resnet(weights, picture, blocks, heads):
    """ModifiedResNet on one picture [H W 3]."""
    x = picture
    for number in (1, 2, 3):
        x = convolution(weights[f'visual.conv{number}.weight'], x, 2 if number == 1 else 1)
        x = np.maximum(batch_norm(weights, f'visual.bn{number}.', x), 0)
    x = mean_pool(x)
    for group, num_blocks in enumerate(blocks, 1):
        for block in range(num_blocks):
            stride = 2 if group > 1 and block == 0 else 1
            x = bottleneck(weights, f'visual.layer{group}.{block}.', x, stride)
    return attention_pool(weights, x, heads)


FLAX = ('scale', 'bias')


def flax_attention(weights, name, queries, keys):
    """MultiHeadDotProductAttention; queries [Q D], keys [N D] -> [Q D]."""

    def project(part, x):
        kernel = weights[f'{name}{part}/kernel']  # [D heads kv]
        projected = np.einsum('nd,dhk->nhk', x, kernel) + weights[f'{name}{part}/bias']
        return projected.reshape(len(x), -1)

    heads = weights[f'{name}query/kernel'].shape[1]
    attended = attend(
        project('query', queries), project('key', keys), project('value', keys), heads
    )
    kernel = weights[f'{name}out/kernel']  # [heads kv D]
    return attended @ kernel.reshape(-1, kernel.shape[-1]) + weights[f'{name}out/bias']


def flax_mlp(weights, name, x):
    hidden = x @ weights[f'{name}Dense_0/kernel'] + weights[f'{name}Dense_0/bias']
    return gelu_tanh(hidden) @ weights[f'{name}Dense_1/kernel'] + weights[f'{name}Dense_1/bias']


def big_vision_encoder(weights, name, x, layers):
    for layer in range(layers):
        block = f'{name}encoderblock_{layer}/'
        y = layer_norm(weights, f'{block}LayerNorm_0/', x, 1e-6, FLAX)
        x = x + flax_attention(weights, f'{block}MultiHeadDotProductAttention_0/', y, y)
        y = layer_norm(weights, f'{block}LayerNorm_1/', x, 1e-6, FLAX)
        x = x + flax_mlp(weights, f'{block}MlpBlock_0/', y)
    return layer_norm(weights, f'{name}encoder_norm/', x, 1e-6, FLAX)


def siglip_picture(weights, picture, layers):
    """big_vision's ViT with its MAP head, on one picture [H W 3]."""
    kernel = weights['params/img/embedding/kernel'].transpose(3, 2, 0, 1)
    x = openai_patches(kernel, picture) + weights['params/img/embedding/bias']
    x = x + weights['params/img/pos_embedding'][0]
    x = big_vision_encoder(weights, 'params/img/Transformer/', x, layers)
    head = 'params/img/MAPHead_0/'
    probe = weights[f'{head}probe'][0]
    y = flax_attention(weights, f'{head}MultiHeadDotProductAttention_0/', probe, x)
    normed = layer_norm(weights, f'{head}LayerNorm_0/', y, 1e-6, FLAX)
    return (y + flax_mlp(weights, f'{head}MlpBlock_0/', normed))[0]


def siglip_sentence(weights, ids, layers):
    """big_vision's text transformer on one row of numbers [L]."""
    x = weights['params/txt/Embed_0/embedding'][ids] + weights['params/txt/pos_embedding'][0]
    x = big_vision_encoder(weights, 'params/txt/Encoder_0/', x, layers)
    return x[-1] @ weights['params/txt/head/kernel'] + weights['params/txt/head/bias']


# ---- tests
@pytest.fixture(scope='module')
def vit():
    """(config, batch, variables, their variables) of a tiny CLIP."""
    config = tiny_clip.model('clip')
    batch = tiny_clip.batch(config, B)
    variables = variables_of(models.build(config, 'float32'), batch)
    return config, batch, variables, theirs('openai', variables, clip_layouts.Sizes(8, 2))


def test_clip_is_the_released_network(vit):
    config, batch, variables, weights = vit
    got = spaces(config, batch, variables)
    for row in range(B):
        picture = openai_picture(weights, batch['video']['data'][row, 0], layers=2, heads=2)
        np.testing.assert_allclose(got['video'][row], picture, rtol=1e-4, atol=1e-4)
        ids = batch['text']['data'][row, 0]
        sentence = openai_sentence(weights, ids, layers=2, heads=2)
        np.testing.assert_allclose(got['text'][row, 0], sentence, rtol=1e-4, atol=1e-4)


def encode(config, variables, modality, data, features=False):
    """One stream through its tower, in one compilation."""
    model = models.build(config, 'float32')

    def apply(variables, data):
        rng = Rng.create(0, 0, jnp.arange(B))
        stream = {'data': data}
        return model.apply(
            variables, modality, stream, train=False, rng=rng, features=features, method='encode'
        )

    return jax.jit(apply)(variables, data)


@pytest.mark.parametrize('modality, shape', [('video', (B, 4, 16)), ('text', (B, 1, 6, 16))])
def test_features_hold_the_same_vector_and_every_token(vit, modality, shape):
    config, batch, variables, _ = vit
    data = batch[modality]['data']
    alone = encode(config, variables, modality, data)
    encoded = encode(config, variables, modality, data, features=True)
    np.testing.assert_allclose(alone.pooled, encoded.pooled, atol=1e-5)
    assert alone.tokens is None
    assert encoded.tokens.shape == shape
    if modality == 'text':
        np.testing.assert_array_equal(encoded.mask, data != 0)


def test_the_frames_of_a_clip_are_pictures_whose_vectors_are_averaged(vit):
    config, batch, variables, _ = vit
    data = batch['video']['data']
    clip = np.concatenate([data, data[::-1]], axis=1)
    pictures = encode(config, variables, 'video', data).pooled
    mean = (pictures + pictures[::-1]) / 2
    np.testing.assert_allclose(encode(config, variables, 'video', clip).pooled, mean, atol=1e-5)


def test_dropped_patches_leave_no_trace_and_the_class_token_stays(vit):
    config, batch, variables, weights = vit
    config = config.copy_and_resolve_references()
    config.towers.video.drop_token = 0.5
    model = models.build(config, 'float32')
    rng = Rng.create(3, 0, jnp.arange(B))

    @jax.jit
    def apply(variables):
        encoded = model.apply(
            variables, 'video', batch['video'], train=True, rng=rng, method='encode'
        )
        spaces = model.apply(variables, {'video': encoded}, train=True, method='project')
        return encoded.kept, spaces['vt']['video']

    kept, got = jax.device_get(apply(variables))
    assert kept.shape == (B, 2)
    # Each picture drops patches of its own.
    assert set(kept[0]) != set(kept[1])
    for row in range(B):
        picture = batch['video']['data'][row, 0]
        expected = openai_picture(weights, picture, layers=2, heads=2, kept=kept[row])
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-4)


def test_a_larger_picture_reads_the_positions_resized(vit):
    config, batch, variables, weights = vit
    large = np.kron(batch['video']['data'], np.ones((1, 1, 2, 2, 1), np.float32))
    # Positions that are equal all over the grid are so at any size.
    table = np.array(variables['params']['fronts_video']['position_table'])
    table[1:] = table[1]
    constant = jax.tree.map(lambda x: x, variables)
    constant['params']['fronts_video']['position_table'] = jnp.asarray(table)
    weights = {**weights, 'visual.positional_embedding': np.vstack([table[:1], [table[1]] * 16])}
    got = spaces(config, {**batch, 'video': {**batch['video'], 'data': large}}, constant)
    expected = openai_picture(weights, large[0, 0], layers=2, heads=2)
    np.testing.assert_allclose(got['video'][0], expected, rtol=1e-4, atol=1e-4)


def test_resnet_is_the_released_network():
    config = tiny_clip.model('resnet')
    batch = tiny_clip.batch(config, B)
    variables = variables_of(models.build(config, 'float32'), batch)
    weights = theirs('openai_resnet', variables, clip_layouts.Sizes(0, 4))
    got = spaces(config, batch, variables)
    for row in range(B):
        expected = openai_resnet(weights, batch['video']['data'][row, 0], (1, 2, 1, 1), heads=4)
        np.testing.assert_allclose(got['video'][row], expected, rtol=2e-4, atol=2e-4)


def test_siglip_is_the_released_network():
    config = tiny_clip.model('siglip')
    batch = tiny_clip.batch(config, B)
    variables = variables_of(models.build(config, 'float32'), batch)
    weights = theirs('big_vision', variables, clip_layouts.Sizes(8, 2))
    got = spaces(config, batch, variables)
    for row in range(B):
        picture = siglip_picture(weights, batch['video']['data'][row, 0], layers=2)
        np.testing.assert_allclose(got['video'][row], picture, rtol=1e-4, atol=1e-4)
        sentence = siglip_sentence(weights, batch['text']['data'][row, 0], layers=2)
        np.testing.assert_allclose(got['text'][row, 0], sentence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'tower, fields, message',
    [
        ('video', {'pool': 'mean'}, "config.model.towers.video.pool='mean': choose one of class"),
        ('video', {'activation': 'tanh'}, "activation='tanh': choose one of gelu"),
        ('video', {'patch': 17}, 'config.model.towers.video.patch: expected a number from 1 to 16'),
        ('video', {'drop_token': 0.9}, 'drop_token=0.9 leaves none of 4 tokens'),
        ('video', {'pool': 'map', 'heads': 3}, 'expected a divisor of width=16'),
        ('text', {'positions': 3}, 'config.model.towers.text.positions=3: expected at least'),
        ('text', {'init': 'he'}, "config.model.towers.text.init='he': choose one of glorot"),
    ],
)
def test_a_mistake_in_a_tower_is_named(tower, fields, message):
    config = tiny_clip.model('clip')
    config.towers[tower].update(fields)
    batch = tiny_clip.batch(config, B)
    model = models.build(config, 'float32')
    with pytest.raises(ConfigError) as error:
        jax.eval_shape(
            lambda: model.init(
                jax.random.key(0), batch, train=False, rng=Rng.create(0, 0, jnp.arange(B))
            )
        )
    assert message in str(error.value)


@pytest.mark.parametrize(
    'name, expected',
    [
        ('clip_b32', 151_277_313),  # with the temperature
        ('clip_l14', 427_616_513),
    ],
)
def test_published_numbers_of_parameters(name, expected):
    config = presets.clip(name)
    config.update({'name': 'vatt', 'attention': 'dense', 'remat': 'none', 'scan': True})
    model = models.build(config)
    batch = tiny_clip.batch(config, B)
    rng = Rng.create(0, 0, jnp.arange(B))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False, rng=rng))
    leaves = jax.tree.leaves(meta.unbox(variables['params']))
    assert sum(math.prod(leaf.shape) for leaf in leaves) + 1 == expected
