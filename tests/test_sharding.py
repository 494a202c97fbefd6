"""Logical names become mesh axes by the rules of one file, and what is said to be sharded is sharded."""

import math
import re

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


@pytest.mark.parametrize(
    'names, sizes, shape, want',
    [
        (('batch', 'length', 'embed'), {'replica': 8}, (16, 4, 8), P('replica', None, None)),
        (
            ('batch', 'length', 'embed'),
            {'replica': 2, 'fsdp': 4},
            (16, 4, 8),
            P(('replica', 'fsdp'), None, None),
        ),  # fsdp is spent on rows
        (
            ('embed', 'heads', 'kv'),
            {'replica': 2, 'fsdp': 2, 'model': 2},
            (8, 4, 16),
            P('fsdp', 'model', None),
        ),
        (
            ('embed', 'heads', 'kv'),
            {'replica': 2, 'fsdp': 2, 'model': 2},
            (8, 3, 16),
            P('fsdp', None, None),
        ),  # 3 heads over 2
        (('embed', 'mlp'), {'fsdp': 8}, (12, 64), P(None, None)),  # 12 over 8
        (('mlp', 'embed'), {'fsdp': 8}, (64, 16), P(None, 'fsdp')),
        (('heads', 'mlp'), {'model': 4}, (8, 8), P('model', None)),  # an axis serves once
        (('batch', 'length', None), {'seq': 4}, (3, 8, 5), P(None, 'seq', None)),
        (('memory', 'joint'), {'replica': 2, 'fsdp': 4}, (64, 5), P(('replica', 'fsdp'), None)),
        ((None, 'vocab'), {'replica': 8}, (8, 8), P(None, None)),
        ((), {'replica': 8}, (), P()),
    ],
)
def test_rules(names, sizes, shape, want):
    assert mesh_spec(names, sizes, shape) == want


@pytest.mark.parametrize(
    'sizes, shape, want',
    [
        ({'replica': 8}, (8, 6, 4, 2), (48, 4, 2)),
        ({'replica': 4, 'model': 2}, (8, 6, 4), (48, 4)),
        (
            {'replica': 4, 'seq': 2},
            (8, 6, 4),
            (8, 6, 4),
        ),  # the mesh splits tokens: rows of the flat array would be scattered
        ({'replica': 8}, (8, 4), (8, 4)),
    ],
)
def test_rows_for_a_product(sizes, shape, want):
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    with jax.set_mesh(sharding.make_mesh(sizes)):
        np.testing.assert_array_equal(sharding.as_rows(jnp.asarray(x)), x.reshape(want))
    assert sharding.as_rows(jnp.asarray(x)).ndim == max(2, len(shape) - 1)  # without a mesh: flat


def test_every_rule_names_mesh_axes():
    for name, axes in sharding.RULES.items():
        assert set(axes or ()) <= set(sharding.MESH_AXES), name


def test_an_unknown_logical_axis_is_an_error():
    """Wherever it is named, also where no mesh is set and nothing would be sharded."""
    with pytest.raises(
        ShardingError,
        match=r"logical axis 'embde' has no rule in vatt_jax/parallel/sharding.py; known: batch, embed",
    ):
        logical(nn.initializers.zeros, 'embde', 'mlp')
    with pytest.raises(ShardingError, match="'tokens' has no rule"):
        constrain(jnp.zeros((2, 2)), 'batch', 'tokens')
    boxed = {'kernel': nn.LogicallyPartitioned(jnp.zeros((2, 2)), ('embed', 'widht'))}
    with pytest.raises(ShardingError, match="'widht' has no rule"):
        sharding.tree_shardings(boxed, sharding.make_mesh({'replica': 1}))
    with pytest.raises(ValueError):
        mesh_spec(('batch', 'embed'), {'replica': 2}, (4, 4, 4))  # a name for every dimension


@pytest.mark.parametrize(
    'sizes, want',
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
def test_mesh_shapes(sizes, want):
    assert mesh_shape(sizes, 8) == want
    mesh = sharding.make_mesh(sizes)
    assert mesh.axis_names == sharding.MESH_AXES and mesh.devices.shape == want
    assert list(mesh.devices.flat) == jax.devices()[: np.prod(want)]


@pytest.mark.parametrize(
    'sizes, sentence',
    [
        (
            {'replica': 16},
            r'config.mesh \(replica=16, fsdp=1, model=1, seq=1\) needs 16 devices and there are 8; use fewer, or set one axis to -1',
        ),
        ({'replica': -1, 'fsdp': 3}, '3 does not divide the 8 devices'),
        ({'replica': -1, 'fsdp': -1}, 'at most one is -1'),
        ({'replica': 0}, 'sizes are positive'),
        ({'fsdp': -2}, 'sizes are positive'),
        ({'data': 8}, "unknown axis 'data'; axes are replica, fsdp, model, seq"),
    ],
)
def test_impossible_meshes_are_sentences(sizes, sentence):
    with pytest.raises(ShardingError, match=sentence):
        mesh_shape(sizes, 8)
    with pytest.raises(ShardingError, match=sentence):
        sharding.make_mesh(sizes)


def block_on(mesh):
    """(forward function, parameter shardings, parameters placed by them) of one transformer layer of width 32, 4 heads."""
    block, rng = (
        Block(width=32, mlp=64, heads=4, head_width=8, dropout=0.0, attention_dropout=0.0),
        Rng.create(0, 0, jnp.arange(16)),
    )
    make = lambda key: block.init(key, jnp.zeros((16, 8, 32)), None, None, rng, False)
    shardings = sharding.tree_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    params = jax.jit(lambda key: nn.unbox(make(key)), out_shardings=shardings)(jax.random.key(0))
    return lambda params, x: block.apply(params, x, None, None, rng, False), shardings, params


@pytest.mark.parametrize(
    'sizes, query, mlp_in',
    [
        ({'fsdp': 8}, P('fsdp', None, None), P('fsdp', None)),
        ({'replica': 2, 'fsdp': 2, 'model': 2}, P('fsdp', 'model', None), P('fsdp', 'model')),
    ],
)
def test_parameters_and_activations_of_a_block_are_sharded(sizes, query, mlp_in):
    """Each device holds its share of the kernels, the result keeps its rows apart, and the numbers are those of one device."""
    mesh = sharding.make_mesh(sizes)
    forward, _, params = block_on(mesh)
    kernel = params['params']['query']['kernel']
    assert (
        kernel.sharding.spec == query
        and params['params']['mlp_in']['kernel'].sharding.spec == mlp_in
    )
    split = sizes['fsdp'] * sizes.get('model', 1)
    for name in ('query', 'out', 'mlp_in', 'mlp_out'):
        whole = params['params'][name]['kernel']
        assert all(s.data.size == whole.size // split for s in whole.addressable_shards), name
    assert params['params']['attention_norm']['scale'].sharding.spec == P('fsdp')

    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 32)), jnp.float32)
    with jax.set_mesh(mesh):
        y = jax.jit(forward)(params, jax.device_put(x, sharding.batch_sharding(mesh)))
    rows = sizes.get('replica', 1) * sizes['fsdp']
    assert {s.data.shape for s in y.addressable_shards} == {(16 // rows, 8, 32)}
    np.testing.assert_allclose(y, forward(jax.device_get(params), x), atol=1e-5)


def test_a_pinned_activation_is_sharded_inside_a_program():
    """The input says nothing, the constraint alone spreads the rows; what does not divide stays whole, and without a mesh nothing happens."""
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})
    x = jnp.ones((16, 6))
    pin = lambda x: constrain(x * 2, 'batch', None)
    with jax.set_mesh(mesh):
        y = jax.jit(pin)(x)
        odd = jax.jit(lambda x: constrain(x * 2, 'batch', None))(x[:12])
    assert y.sharding.spec[0] == ('replica', 'fsdp') and y.addressable_shards[0].data.shape == (
        2,
        6,
    )
    assert odd.addressable_shards[0].data.shape == (12, 6)
    assert jax.jit(lambda x: constrain(x * 2, 'batch', None))(x).sharding.is_fully_replicated


def test_tokens_that_do_not_divide_are_split_all_the_same():
    """Five over four devices: no device holds a whole hidden layer, keys and values come from the others, numbers as on one device."""
    mesh = sharding.make_mesh({'replica': 2, 'seq': 4})
    forward, _, params = block_on(mesh)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 32)), jnp.float32)
    of = jax.value_and_grad(lambda params, x: jnp.sin(forward(params, x)).sum())
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, sharding.batch_sharding(mesh))
        compiled = jax.jit(of).lower(params, on_mesh).compile()
        (value, grads), y = compiled(params, on_mesh), jax.jit(forward)(params, on_mesh)
    assert {'seq'} in tiny.axes_of_collectives(compiled, mesh) and not re.search(
        r'f32\[8,5,64\]|f32\[40,64\]', compiled.as_text()
    )
    want, want_grads = jax.jit(of)(jax.device_get(params), x)
    np.testing.assert_allclose(value, want, rtol=2e-5)
    np.testing.assert_allclose(y, forward(jax.device_get(params), x), atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_leaves_without_names_are_replicated():
    mesh = sharding.make_mesh({'fsdp': 8})
    kernel = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 4), jnp.float32), ('embed', None))
    tree = {'count': jax.ShapeDtypeStruct((), jnp.int32), 'kernel': kernel}
    got = sharding.tree_shardings(tree, mesh)
    assert got['count'].spec == P() and got['kernel'].spec == P('fsdp', None)
