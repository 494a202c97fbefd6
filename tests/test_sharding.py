"""Logical names become mesh axes by the rules of one file, and arrays are sharded accordingly."""

import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny
from vatt_jax.models.transformer import Block
from vatt_jax.parallel import sharding
from vatt_jax.parallel.sharding import ShardingError, constrain, logical, mesh_shape, mesh_spec
from vatt_jax.rng import Rng

ROWS = ('batch', 'length', 'embed')
KERNEL = ('embed', 'heads', 'kv')
DATA = {'replica': 2, 'fsdp': 4}
ALL_THREE = {'replica': 2, 'fsdp': 2, 'model': 2}


@pytest.mark.parametrize(
    'names, sizes, shape, expected',
    [
        (ROWS, {'replica': 8}, (16, 4, 8), P('replica', None, None)),
        # fsdp is spent on rows
        (ROWS, DATA, (16, 4, 8), P(('replica', 'fsdp'), None, None)),
        (KERNEL, ALL_THREE, (8, 4, 16), P('fsdp', 'model', None)),
        # 3 heads over 2
        (KERNEL, ALL_THREE, (8, 3, 16), P('fsdp', None, None)),
        # 12 over 8
        (('embed', 'mlp'), {'fsdp': 8}, (12, 64), P(None, None)),
        (('mlp', 'embed'), {'fsdp': 8}, (64, 16), P(None, 'fsdp')),
        # an axis serves once
        (('heads', 'mlp'), {'model': 4}, (8, 8), P('model', None)),
        (('batch', 'length', None), {'seq': 4}, (3, 8, 5), P(None, 'seq', None)),
        (('memory', 'joint'), DATA, (64, 5), P(('replica', 'fsdp'), None)),
        ((None, 'vocab'), {'replica': 8}, (8, 8), P(None, None)),
        ((), {'replica': 8}, (), P()),
    ],
)
def test_rules_make_logical_names_mesh_axes(names, sizes, shape, expected):
    assert mesh_spec(names, sizes, shape) == expected


@pytest.mark.parametrize(
    'sizes, shape, expected_shape',
    [
        ({'replica': 8}, (8, 6, 4, 2), (48, 4, 2)),
        ({'replica': 4, 'model': 2}, (8, 6, 4), (48, 4)),
        # the mesh splits tokens: rows of the flat array would be scattered
        ({'replica': 4, 'seq': 2}, (8, 6, 4), (8, 6, 4)),
        ({'replica': 8}, (8, 4), (8, 4)),
    ],
)
def test_rows_for_a_product(sizes, shape, expected_shape):
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        rows = sharding.as_rows(jnp.asarray(x))
    chex.assert_shape(rows, expected_shape)
    chex.assert_trees_all_equal(rows, x.reshape(expected_shape))
    # Without a mesh: flat.
    chex.assert_rank(sharding.as_rows(jnp.asarray(x)), max(2, len(shape) - 1))


def test_every_rule_names_mesh_axes():
    for name, axes in sharding.RULES.items():
        assert set(axes or ()) <= set(sharding.MESH_AXES), name


def test_an_unknown_logical_axis_is_an_error():
    """Wherever it is named, also where no mesh is set and nothing would be sharded."""
    message = (
        "logical axis 'embde' has no rule in vatt_jax/parallel/sharding.py; known: batch, embed"
    )
    with pytest.raises(ShardingError, match=message):
        logical(nn.initializers.zeros, 'embde', 'mlp')
    with pytest.raises(ShardingError, match="'tokens' has no rule"):
        constrain(jnp.zeros((2, 2)), 'batch', 'tokens')
    boxed = {'kernel': nn.LogicallyPartitioned(jnp.zeros((2, 2)), ('embed', 'widht'))}
    with pytest.raises(ShardingError, match="'widht' has no rule"):
        sharding.tree_shardings(boxed, sharding.make_mesh({'replica': 1}))
    with pytest.raises(ValueError):
        mesh_spec(('batch', 'embed'), {'replica': 2}, (4, 4, 4))  # a name for every dimension


@pytest.mark.parametrize(
    'sizes, expected_shape',
    [
        ({'replica': -1}, (8, 1, 1, 1)),
        ({'replica': -1, 'fsdp': 4}, (2, 4, 1, 1)),
        ({'replica': 2, 'fsdp': 2, 'model': -1}, (2, 2, 2, 1)),
        ({'replica': 1, 'seq': -1}, (1, 1, 1, 8)),
        ({}, (1, 1, 1, 1)),
        ({'replica': 8, 'fsdp': -1}, (8, 1, 1, 1)),
        ({'fsdp': 3}, (1, 3, 1, 1)),
    ],
)
def test_mesh_shapes(sizes, expected_shape):
    assert mesh_shape(sizes, 8) == expected_shape
    mesh = sharding.make_mesh(sizes)
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.devices.shape == expected_shape
    assert list(mesh.devices.flat) == jax.devices()[: np.prod(expected_shape)]


@pytest.mark.parametrize(
    'sizes, message',
    [
        (
            {'replica': 16},
            r'config.mesh \(replica=16, fsdp=1, model=1, seq=1\) needs 16 devices and there are 8; '
            'use fewer, or set one axis to -1',
        ),
        ({'replica': -1, 'fsdp': 3}, '3 does not divide the 8 devices'),
        ({'replica': -1, 'fsdp': -1}, 'at most one is -1'),
        ({'replica': 0}, 'sizes are positive'),
        ({'fsdp': -2}, 'sizes are positive'),
        ({'data': 8}, "unknown axis 'data'; axes are replica, fsdp, model, seq"),
    ],
)
def test_impossible_meshes_are_sentences(sizes, message):
    with pytest.raises(ShardingError, match=message):
        mesh_shape(sizes, 8)
    with pytest.raises(ShardingError, match=message):
        sharding.make_mesh(sizes)


def block_on(mesh):
    """(forward function, its parameters placed on the mesh) of a layer of width 32 and 4 heads."""
    block = Block(width=32, mlp=64, heads=4, head_width=8, dropout=0.0, attention_dropout=0.0)
    rng = Rng.create(0, 0, jnp.arange(16))

    def init(key):
        return block.init(key, jnp.zeros((16, 8, 32)), None, None, rng, False)

    def init_without_boxes(key):
        return nn.unbox(init(key))

    def forward(params, x):
        return block.apply(params, x, None, None, rng, False)

    key = jax.random.key(0)
    shardings = sharding.tree_shardings(jax.eval_shape(init, key), mesh)
    params = jax.jit(init_without_boxes, out_shardings=shardings)(key)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, params), shardings)
    return forward, params


@pytest.mark.parametrize(
    'sizes, query, mlp_in',
    [
        ({'fsdp': 8}, P('fsdp', None, None), P('fsdp', None)),
        ({'replica': 2, 'fsdp': 2, 'model': 2}, P('fsdp', 'model', None), P('fsdp', 'model')),
    ],
)
def test_parameters_and_activations_of_a_block_are_sharded(sizes, query, mlp_in):
    """Each device holds its share of the kernels, the result keeps its rows apart.

    The numbers are those of one device.
    """
    mesh = sharding.make_mesh(sizes)
    forward, params = block_on(mesh)
    layers = params['params']
    assert layers['query']['kernel'].sharding.spec == query
    assert layers['mlp_in']['kernel'].sharding.spec == mlp_in
    num_parts = sizes['fsdp'] * sizes.get('model', 1)
    for name in ('query', 'out', 'mlp_in', 'mlp_out'):
        kernel = layers[name]['kernel']
        for shard in kernel.addressable_shards:
            assert shard.data.size == kernel.size // num_parts, name
    assert layers['attention_norm']['scale'].sharding.spec == P('fsdp')

    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 32)), jnp.float32)
    with jax.set_mesh(mesh):
        y = jax.jit(forward)(params, jax.device_put(x, sharding.batch_sharding(mesh)))
    num_row_parts = sizes.get('replica', 1) * sizes['fsdp']
    for shard in y.addressable_shards:
        chex.assert_shape(shard.data, (16 // num_row_parts, 8, 32))
    chex.assert_equal_shape([x, y])
    np.testing.assert_allclose(y, forward(jax.device_get(params), x), atol=1e-5)


def double_rows(x):
    """2x, its rows pinned to the data axes of the mesh."""
    return constrain(x * 2, 'batch', None)


def test_a_pinned_activation_is_sharded_inside_a_program():
    """The input is not sharded, the constraint alone spreads the rows.

    What does not divide stays whole, and without a mesh nothing happens.
    """
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})
    x = jnp.ones((16, 6))
    with jax.set_mesh(mesh):
        sharded = jax.jit(double_rows)(x)
        twelve_rows = jax.jit(double_rows)(x[:12])
    assert sharded.sharding.spec[0] == ('replica', 'fsdp')
    chex.assert_shape(sharded.addressable_shards[0].data, (2, 6))
    chex.assert_shape(twelve_rows.addressable_shards[0].data, (12, 6))
    assert jax.jit(double_rows)(x).sharding.is_fully_replicated
    chex.assert_trees_all_equal(sharded, 2 * x)


def test_tokens_that_do_not_divide_are_split_all_the_same():
    """Five over four devices: no device holds a whole hidden layer.

    Keys and values come from the others; the numbers are those of one device.
    """
    mesh = sharding.make_mesh({'replica': 2, 'seq': 4})
    forward, params = block_on(mesh)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 32)), jnp.float32)

    def loss(params, x):
        return jnp.sin(forward(params, x)).sum()

    value_and_grad = jax.value_and_grad(loss)
    with jax.set_mesh(mesh):
        x_on_mesh = jax.device_put(x, sharding.batch_sharding(mesh))
        compiled = jax.jit(value_and_grad).lower(params, x_on_mesh).compile()
        value, grads = compiled(params, x_on_mesh)
        y = jax.jit(forward)(params, x_on_mesh)
    assert {'seq'} in tiny.axes_of_collectives(compiled, mesh)
    assert not re.search(r'f32\[8,5,64\]|f32\[40,64\]', compiled.as_text())

    params_on_host = jax.device_get(params)
    expected_value, expected_grads = jax.jit(value_and_grad)(params_on_host, x)
    np.testing.assert_allclose(value, expected_value, rtol=2e-5)
    np.testing.assert_allclose(y, forward(params_on_host, x), atol=1e-5)
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_close(
        jax.device_get(grads), jax.device_get(expected_grads), rtol=1e-7, atol=1e-4
    )


def test_leaves_without_names_are_replicated():
    mesh = sharding.make_mesh({'fsdp': 8})
    kernel = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 4), jnp.float32), ('embed', None))
    tree = {'count': jax.ShapeDtypeStruct((), jnp.int32), 'kernel': kernel}
    shardings = sharding.tree_shardings(tree, mesh)
    assert shardings['count'].spec == P()
    assert shardings['kernel'].spec == P('fsdp', None)
