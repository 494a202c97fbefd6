"""Attention types against their definition, and what holds between them."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from vatt_jax.models.attention import attention_or_zero
from vatt_jax.models.fusion import BlockOptions, CrossBlock, FusionLayer, FusionStack
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

B = 3  # clips in a batch
TOKENS = {'language': 4, 'image': 5, 'sound': 3}
WIDTHS = {'language': 8, 'image': 12, 'sound': 6}
OPTIONS = BlockOptions(mlp=10, heads=2, head_width=3)
# BERT's conventions, with the eps large enough to be seen.
POST_NORM = dataclasses.replace(
    OPTIONS, pre_norm=False, eps=1e-2, activation='relu', kernel_init='bert'
)
NO_BIAS = dataclasses.replace(OPTIONS, bias=False, activation='gelu_tanh', kernel_init='clip')
RNG = Rng.create(0, 0, jnp.arange(B))


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def streams_of(*names, width=0):
    """({stream: tokens}, {stream: mask}); the last clip has no image at all."""
    x, masks = {}, {}
    for seed, name in enumerate(names):
        x[name] = noise(seed, B, TOKENS[name], width or WIDTHS[name])
        masks[name] = np.arange(TOKENS[name])[None] < np.array([[TOKENS[name]], [2], [1]])
    if 'image' in masks:
        masks['image'][2] = False
    return x, masks


def drawn(init, *inputs):
    """Noise in the place of the parameters that `init` makes: zeros and ones would hide mistakes.

    It is keyed by the path, so that layers of different types get equal values where they have
    equal parameters.
    """
    shapes = meta.unbox(jax.eval_shape(init, *inputs))['params']

    def draw(path, leaf):
        return jnp.asarray(0.5 * noise(number_of(path), *leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def initial(module, *inputs):
    """Parameters of a layer or stack."""
    return drawn(lambda *inputs: module.init(jax.random.key(0), *inputs, RNG, False), *inputs)


def number_of(path):
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(jax.tree_util.keystr(path)))


def apply(module, params, *inputs):
    def call(params, *inputs):
        return module.apply({'params': params}, *inputs, RNG, False)

    return jax.jit(call)(params, *inputs)


def f64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# ---- the definition, in float64 and clip by clip


def erf(x):
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    'gelu': lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'relu': lambda x: np.maximum(x, 0),
}


def layer_norm(params, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * params['scale'] + params['bias']


def project(params, x):
    """x [N D] -> [N heads kv]."""
    return np.einsum('nd,dhk->nhk', x, params['kernel']) + params.get('bias', 0)


def attend(query, key, value, mask):
    """[Nq heads kv]; keys whose mask is False are not there, and no key gives zero."""
    out = np.zeros_like(query)
    for head in range(query.shape[1]):
        k, v = key[mask, head], value[mask, head]
        for row in range(len(query)):
            if len(k):
                logits = k @ query[row, head] / np.sqrt(query.shape[2])
                weights = np.exp(logits - logits.max())
                out[row, head] = weights @ v / weights.sum()
    return out


def dense(params, x):
    return x @ params['kernel'] + params.get('bias', 0)


def define_layer(params, x, masks, reads, options):
    """{stream: [N D]} of one clip, whose streams attend to what `reads` says."""
    pre = options.pre_norm
    normed = {}
    for name, tokens in x.items():
        normed[name] = tokens
        if pre and 'attention_norm' in params[name]:
            normed[name] = layer_norm(params[name]['attention_norm'], tokens, options.eps)
    updated = {}
    for name, tokens in x.items():
        part = params[name]
        if not reads[name]:
            updated[name] = tokens
            continue
        key = np.concatenate([project(params[s]['key'], normed[s]) for s in reads[name]])
        value = np.concatenate([project(params[s]['value'], normed[s]) for s in reads[name]])
        mask = np.concatenate([masks[s] for s in reads[name]])
        context = attend(project(part['query'], normed[name]), key, value, mask)
        out = np.einsum('nhk,hkd->nd', context, part['out']['kernel']) + part['out'].get('bias', 0)
        y = tokens + out
        if not pre:
            y = layer_norm(part['attention_norm'], y, options.eps)
        hidden = layer_norm(part['mlp_norm'], y, options.eps) if pre else y
        hidden = ACTIVATIONS[options.activation](dense(part['mlp_in'], hidden))
        y = y + dense(part['mlp_out'], hidden)
        updated[name] = y if pre else layer_norm(part['mlp_norm'], y, options.eps)
    return updated


def define(params, x, masks, reads, options):
    """The same of all clips."""
    params, x = f64(params), f64(x)
    clips = []
    for clip in range(B):
        tokens = {name: value[clip] for name, value in x.items()}
        clip_masks = {name: value[clip] for name, value in masks.items()}
        clips.append(define_layer(params, tokens, clip_masks, reads, options))
    return jax.tree.map(lambda *rows: np.stack(rows), *clips)


L, I, S = 'language', 'image', 'sound'
# (type, other fields, who attends to whom)
CASES = {
    'co': ('co', {}, {L: [I], I: [L]}),
    'merged': ('merged', {}, {L: [L, I], I: [L, I]}),
    'specific': ('specific', {}, {L: [L], I: [I]}),
    'language queries': ('asymmetric', {'query': L}, {L: [I], I: [I]}),
    'image queries': ('asymmetric', {'query': I}, {L: [L], I: [L]}),
    'passive as it is': ('asymmetric', {'query': L, 'passive': 'identity'}, {L: [I], I: []}),
    'three, co': ('co', {}, {L: [I, S], I: [L, S], S: [L, I]}),
    'three, merged': ('merged', {}, {L: [L, I, S], I: [L, I, S], S: [L, I, S]}),
    'three, asymmetric': ('asymmetric', {'query': S}, {L: [L], I: [I], S: [L, I]}),
}


@pytest.mark.parametrize(
    'case, options',
    [
        *[(case, OPTIONS) for case in CASES],
        ('co', POST_NORM),
        ('merged', POST_NORM),
        ('merged', NO_BIAS),
        ('passive as it is', POST_NORM),
    ],
)
def test_each_type_is_its_definition(case, options):
    kind, fields, reads = CASES[case]
    x, masks = streams_of(*reads)
    layer = FusionLayer(kind, tuple(reads), options, **fields)
    params = initial(layer, x, masks)
    got = apply(layer, params, x, masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, x)
    chex.assert_trees_all_close(got, define(params, x, masks, reads, options), atol=3e-5)


def test_a_stream_that_only_is_looked_at_stays_and_has_keys_alone():
    kind, fields, reads = CASES['passive as it is']
    x, masks = streams_of(*reads)
    layer = FusionLayer(kind, tuple(reads), OPTIONS, **fields)
    params = initial(layer, x, masks)
    assert set(params[I]) == {'attention_norm', 'key', 'value'}
    np.testing.assert_array_equal(apply(layer, params, x, masks)[I], x[I])


def test_vilberts_streams_differ_in_feed_forward_width():
    x, masks = streams_of(L, I)
    layer = FusionLayer('co', (L, I), POST_NORM, mlps=((I, 7),))
    params = initial(layer, x, masks)
    assert params[L]['mlp_in']['kernel'].shape == (8, 10)
    assert params[I]['mlp_in']['kernel'].shape == (12, 7)
    expected = define(params, x, masks, CASES['co'][2], POST_NORM)
    chex.assert_trees_all_close(apply(layer, params, x, masks), expected, atol=3e-5)


def test_merged_without_the_other_side_is_modality_specific():
    x, masks = streams_of(L, I)
    masks[I][:] = False
    merged, specific = (FusionLayer(kind, (L, I), OPTIONS) for kind in ('merged', 'specific'))
    params = initial(merged, x, masks)
    got = apply(merged, params, x, masks)[L]
    np.testing.assert_allclose(got, apply(specific, params, x, masks)[L], atol=2e-6)
    # A stream that is not in the batch counts as masked.
    alone = {L: x[L]}, {L: masks[L]}
    np.testing.assert_allclose(got, apply(merged, params, *alone)[L], atol=2e-6)


def test_co_attention_to_a_missing_stream_is_to_a_masked_one():
    x, masks = streams_of(L, I)
    masks[I][:] = False
    layer = FusionLayer('co', (L, I), OPTIONS)
    params = initial(layer, x, masks)
    got = apply(layer, params, {L: x[L]}, {L: masks[L]})[L]
    np.testing.assert_array_equal(got, apply(layer, params, x, masks)[L])


def test_single_stream_is_merged_with_tied_weights():
    x, masks = streams_of(L, I, width=8)
    single, merged = (FusionLayer(kind, (L, I), OPTIONS) for kind in ('single', 'merged'))
    params = initial(single, x, masks)
    assert set(params) == {'shared'}
    tied = {L: params['shared'], I: params['shared']}
    got = apply(single, params, x, masks)
    chex.assert_trees_all_close(got, apply(merged, tied, x, masks), atol=1e-6)
    chex.assert_trees_all_close(got, define(tied, x, masks, CASES['merged'][2], OPTIONS), atol=3e-5)


@pytest.mark.parametrize('implementation', ['dense', 'xla'])
@pytest.mark.parametrize('mask_rank', [2, 3])
def test_a_query_without_keys_gets_exactly_zero_and_a_finite_gradient(implementation, mask_rank):
    query, key, value = (jnp.asarray(noise(seed, B, 4, 2, 3)) for seed in range(3))
    mask = np.ones((B, 4, 4)[:mask_rank], bool) if mask_rank == 3 else np.ones((B, 4), bool)
    mask[1] = False

    def attended(query, key, value):
        return attention_or_zero(
            query, key, value, mask=mask, scale=0.5, implementation=implementation
        )

    got = attended(query, key, value)
    np.testing.assert_array_equal(got[1], 0)
    assert np.abs(got[0]).min() > 0
    gradients = jax.grad(lambda *qkv: attended(*qkv).sum(), (0, 1, 2))(query, key, value)
    chex.assert_tree_all_finite(gradients)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1], 0)


def test_a_block_attends_to_a_context_of_another_width():
    """Keys and values of what is given, as it is; a mask of queries and keys."""
    x, context = noise(0, B, 4, 8), noise(1, B, 5, 6)
    mask = np.random.default_rng(2).random((B, 4, 5)) < 0.5
    mask[0, 1] = False
    block = CrossBlock(8, OPTIONS, context_width=6)
    params = initial(block, x, context, mask)
    got = apply(block, params, x, context, mask)
    p = f64(params)
    for clip in range(B):
        normed = layer_norm(p['attention_norm'], np.float64(x[clip]), 1e-6)
        query, key = project(p['query'], normed), project(p['key'], np.float64(context[clip]))
        value = project(p['value'], np.float64(context[clip]))
        rows = [attend(query[i : i + 1], key, value, mask[clip, i])[0] for i in range(4)]
        y = x[clip] + np.einsum('nhk,hkd->nd', rows, p['out']['kernel']) + p['out']['bias']
        hidden = ACTIVATIONS['gelu'](dense(p['mlp_in'], layer_norm(p['mlp_norm'], y, 1e-6)))
        np.testing.assert_allclose(got[clip], y + dense(p['mlp_out'], hidden), atol=3e-5)


# ---- several layers


def test_a_mixed_schedule_is_its_layers_and_a_final_norm():
    x, masks = streams_of(L, I)
    stack = FusionStack((L, I), ('specific', 'co', 'merged'), OPTIONS)
    params = initial(stack, x, masks)
    expected = x
    for number, case in enumerate(('specific', 'co', 'merged')):
        layer = params[f'layer_{number}']
        expected = define(layer, expected, masks, CASES[case][2], OPTIONS)
    for name in x:
        norm = f64(params[f'{name}_final_norm'])
        expected[name] = layer_norm(norm, expected[name], OPTIONS.eps)
    chex.assert_trees_all_close(apply(stack, params, x, masks), expected, atol=1e-4)


@pytest.mark.parametrize('remat', ['dots', pytest.param('full', marks=pytest.mark.slow)])
def test_recomputing_changes_neither_value_nor_gradient(remat):
    x, masks = streams_of(L, I)
    dropping = dataclasses.replace(OPTIONS, dropout=0.3, attention_dropout=0.3)

    def value_and_gradient(remat):
        stack = FusionStack((L, I), ('merged',), dropping, remat=remat)

        def total(params, x):
            out = stack.apply({'params': params}, x, masks, RNG, True)
            return sum(jnp.sum(jnp.sin(y)) for y in out.values())

        return jax.jit(jax.value_and_grad(total))(params, x)

    params = initial(FusionStack((L, I), ('merged',), OPTIONS), x, masks)
    got, expected = value_and_gradient(remat), value_and_gradient('none')
    chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-5)


def test_eight_devices_compute_what_one_does():
    """Parameters sharded by the rules of all transformers: width, heads and mlp."""
    names = (L, I)
    x = {name: noise(seed, 8, 6, 8) for seed, name in enumerate(names)}
    masks = {name: np.arange(6)[None] < np.arange(1, 9)[:, None] for name in names}
    stack = FusionStack(names, ('co', 'single'), dataclasses.replace(OPTIONS, dropout=0.2, heads=4))
    rng = Rng.create(0, 0, jnp.arange(8))

    def init():
        return stack.init(jax.random.key(0), x, masks, rng, False)['params']

    def forward(params, x):
        return stack.apply({'params': params}, x, masks, rng, True)

    params = initial(stack, x, masks)
    expected = jax.jit(forward)(params, x)
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2})
    layout = sharding.tree_shardings(jax.eval_shape(init), mesh)
    query = layout['layer_0'][L]['query']['kernel'].spec
    assert query == jax.sharding.PartitionSpec('fsdp', 'model', None)
    with jax.set_mesh(mesh):
        got = jax.jit(forward)(
            jax.device_put(params, layout), jax.device_put(x, sharding.batch_sharding(mesh))
        )
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-5)
