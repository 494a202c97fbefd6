"""Contrastive losses: blockwise, gathered, in a ring and dense, against their definitions.

The definitions are written out in NumPy float64. Losses are called outside of jit where many cases
share shapes: then their two programs, sums and derivative, are compiled once for all.
"""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import typecheck
from vatt_jax.losses import dense, nce, similarity
from vatt_jax.losses.similarity import NEVER, How
from vatt_jax.parallel import sharding

FORMS = ('asymmetric', 'symmetric', 'clip', 'mil_nce', 'siglip', 'nt_xent', 'info_nce')
# One candidate per clip.
SINGLE = ('nt_xent',)
# Compiling takes longer than running here.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


# ---- definitions


def log_sum(scores):
    """log Σ exp over the last axis, which is not empty."""
    top = scores.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(scores - top).sum(-1))


def unit(x):
    """x / |x| over the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def definition(
    form, x, y, x_valid, y_mask, temperature, *, bias=-10.0, replicas=1, queue=None, raw=False
):
    """The loss of a batch from the papers' formulas, float64 [].

    x, y and temperature may have a further first axis: that many losses at once.

    Args:
        form: which loss.
        x: [B E].
        y: [B K E].
        x_valid: bool [B].
        y_mask: bool [B K].
        temperature: a number.
        bias: of siglip.
        replicas: equal parts of the batch, whose means are averaged.
        queue: further keys of info_nce.
        raw: embeddings are taken as they are; else put on the unit sphere, but for mil_nce.
    """
    if not raw and form != 'mil_nce':
        x, y = unit(x), unit(y)
    temperature = np.asarray(temperature)
    valid = x_valid & y_mask.any(1)
    # s(x_b, y_ak), [B A K]
    scores = np.einsum('...be,...ake->...bak', x, y) / temperature[..., None, None, None]
    losses = []
    for i in range(len(valid)):
        if not valid[i]:
            losses.append(np.zeros(scores.shape[:-3]))
        elif form == 'siglip':
            losses.append(siglip_of_clip(i, scores, y_mask, bias))
        elif form == 'nt_xent':
            losses.append(nt_xent_of_clip(i, scores, x, y, x_valid, y_mask, temperature))
        elif form == 'info_nce':
            data = queue.data if raw else unit(queue.data)
            further = x[..., i, :] @ data.T / temperature[..., None]
            losses.append(info_nce_of_clip(i, scores, y_mask, further, queue))
        else:
            losses.append(nce_of_clip(form, i, scores, x_valid, y_mask))
    means = []
    for loss, counts in zip(
        np.split(np.stack(losses, -1), replicas, -1), np.split(valid, replicas), strict=True
    ):
        means.append(loss[..., counts].sum(-1) / max(1, counts.sum()))
    return np.mean(means, 0)


def both_ways(i, scores, x_valid, y_mask):
    """Scores of x_i with every usable candidate; of i's candidates with every usable x; of own."""
    forward = scores[..., i, :, :][..., y_mask]
    backward = scores[..., x_valid, i, :][..., y_mask[i]]
    own = scores[..., i, i, :][..., y_mask[i]]
    return forward, backward.reshape(*scores.shape[:-3], -1), own


def nce_of_clip(form, i, scores, x_valid, y_mask):
    """The NCE losses of clip i, whose forward, backward and own scores have sums of exp F, B and P.

    asymmetric, mil_nce  log(F + B) - log P  (MMV; MIL-NCE: one sum over both directions)
    symmetric            log F + log B - 2 log P
    clip                 half of it
    """
    forward, backward, own = both_ways(i, scores, x_valid, y_mask)
    if form in ('asymmetric', 'mil_nce'):
        return log_sum(np.concatenate([forward, backward], -1)) - log_sum(own)
    symmetric = log_sum(forward) + log_sum(backward) - 2 * log_sum(own)
    if form == 'symmetric':
        return symmetric
    assert form == 'clip'
    return symmetric / 2


def siglip_of_clip(i, scores, y_mask, bias):
    """SigLIP, equation 1: Σ_a log(1 + exp(-z_ia (s(x_i, y_a) + bias))), z = 1 for own pairs."""
    is_own = np.arange(len(y_mask)) == i
    z = np.broadcast_to(np.where(is_own, 1, -1)[:, None], y_mask.shape)[y_mask]
    forward = scores[..., i, :, :][..., y_mask]
    return np.logaddexp(0, -z * (forward + bias)).sum(-1)


def nt_xent_of_clip(i, scores, x, y, x_valid, y_mask, temperature):
    """SimCLR, equation 1, for both views: the other view among all views but itself."""
    forward, backward, own = both_ways(i, scores, x_valid, y_mask)
    others = np.arange(len(x_valid)) != i
    losses = []
    for view, usable, across in (
        (x, x_valid, forward),
        (y[..., 0, :], y_mask[:, 0], backward),
    ):
        products = np.einsum('...e,...be->...b', view[..., i, :], view)
        within = products / temperature[..., None]
        every = np.concatenate([across, within[..., others & usable]], -1)
        losses.append(log_sum(every) - log_sum(own))
    return (losses[0] + losses[1]) / 2


def info_nce_of_clip(i, scores, y_mask, further, queue):
    """log Σ exp over all keys - log Σ exp over own ones, those of the batch and of the queue."""
    forward = scores[..., i, :, :][..., y_mask]
    own = scores[..., i, i, :][..., y_mask[i]]
    every = np.concatenate([forward, further[..., queue.valid]], -1)
    positives = np.concatenate([own, further[..., queue.valid & (queue.own == i)]], -1)
    return log_sum(every) - log_sum(positives)


def finite_differences(f, *arrays, step=1e-5):
    """Central differences of f by every element of its arrays, float64.

    f takes many sets of arrays at once, along a further first axis.
    """
    gradients = []
    for position, array in enumerate(arrays):
        size = np.size(array)
        moved = [np.repeat(np.asarray(a, np.float64)[None], 2 * size, 0) for a in arrays]
        shifts = step * np.concatenate([np.eye(size), -np.eye(size)])
        moved[position].reshape(2 * size, size)[...] += shifts
        up, down = np.split(f(*moved), 2)
        gradients.append(((up - down) / (2 * step)).reshape(np.shape(array)))
    return gradients


# ---- cases

B, E, M = 10, 6, 16
BLOCKS = How(block=8)


class Queue(NamedTuple):
    """data [M E], valid bool [M], own int [M]: the clip that a key is a positive of."""

    data: np.ndarray
    valid: np.ndarray
    own: np.ndarray


class Inputs(NamedTuple):
    """x [B E], y [B K E], temperature, x_valid [B], y_mask [B K]: what a loss is a function of."""

    x: np.ndarray
    y: np.ndarray
    temperature: float
    x_valid: np.ndarray
    y_mask: np.ndarray
    queue: Queue


def float32_values(x):
    """A float64 array of values that float32 holds."""
    return np.float64(np.float32(x))


CASES = ('random', 'cold', 'similar', 'dominant', 'masked', 'one clip', 'nothing')


def case(name, k, seed=0):
    """Inputs of one kind, with k candidates per clip."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, E))
    y = rng.normal(size=(B, k, E))
    data = rng.normal(size=(M, E))
    x_valid = np.ones(B, bool)
    y_mask = np.ones((B, k), bool)
    queue_valid = np.ones(M, bool)
    temperature = 0.2
    if name == 'cold':
        temperature = 0.01
    elif name == 'similar':
        x, y, data = 1 + 0.01 * x, 1 + 0.01 * y, 1 + 0.01 * data
    elif name == 'dominant':
        temperature = 0.01
        x[3] = y[3, 0]
        x[4:] = -x[3] + 0.1 * x[4:]
    elif name == 'masked':
        x_valid = rng.uniform(size=B) > 0.3
        y_mask = rng.uniform(size=(B, k)) > 0.3
        queue_valid = rng.uniform(size=M) > 0.3
    elif name == 'one clip':
        x_valid[:] = np.arange(B) == 2
        y_mask[:] = x_valid[:, None]
        queue_valid[:] = False
    elif name == 'nothing':
        x_valid[:] = False
        y_mask[::2] = False
    else:
        assert name == 'random'
    queue = Queue(float32_values(data), queue_valid, rng.integers(0, B, M))
    temperature = float(np.float32(temperature))
    return Inputs(float32_values(x), float32_values(y), temperature, x_valid, y_mask, queue)


def inputs(form, name):
    """A case for a form of the loss."""
    given_case = case(name, 1 if form in SINGLE else 2)
    if form == 'mil_nce':
        # Raw dot products are larger than cosines.
        return given_case._replace(temperature=20 * given_case.temperature)
    return given_case


def single(*values):
    """As JAX arrays, float64 ones in float32."""

    def convert(value):
        if np.asarray(value).dtype == np.float64:
            return jnp.asarray(value, jnp.float32)
        return jnp.asarray(value)

    return jax.tree.map(convert, values)


def value_and_gradients(module, form, how, replicas=1):
    """The loss under test and its gradients by x, y and temperature, a function of `Inputs`."""

    def loss(x, y, temperature, x_valid, y_mask, queue):
        options = {}
        if form == 'info_nce':
            options = {
                'keys': (nce.Keys(queue.data, queue.valid, own=queue.own),),
                'ids': jnp.arange(len(x)),
                'stop_gradient': False,
            }
        return getattr(module, form)(
            x,
            y,
            x_valid=x_valid,
            y_mask=y_mask,
            temperature=temperature,
            replicas=replicas,
            how=how,
            **options,
        )

    return jax.value_and_grad(loss, (0, 1, 2))


@functools.cache
def expected_value_and_gradients(form, name):
    """The definition and its finite differences by x, y and temperature."""
    x, y, temperature, x_valid, y_mask, queue = inputs(form, name)

    def loss(x, y, temperature):
        return definition(form, x, y, x_valid, y_mask, temperature, queue=queue)

    return loss(x, y, temperature), finite_differences(loss, x, y, temperature)


def check(f, form, names=CASES):
    """Values and gradients of f are those of the definition.

    To a relative 1e-5; where a result is a small difference of large terms, to no more than what
    rounding the largest score costs.
    """
    for name in names:
        args = inputs(form, name)
        arrays = single(*args)
        value, gradients = f(*arrays)
        chex.assert_shape(value, ())
        chex.assert_type(value, jnp.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, arrays[:3])

        expected_value, expected_gradients = expected_value_and_gradients(form, name)
        t = args.temperature
        eps = np.finfo(np.float32).eps
        if form == 'mil_nce':
            products = args.x @ args.y.reshape(-1, E).T
            eps *= max(1, np.nanmax(np.abs(products)))
        np.testing.assert_allclose(
            value, expected_value, rtol=1e-5, atol=eps / t, err_msg=f'{form} {name}'
        )
        floors = (2 * eps / t, 2 * eps / t, 4 * eps / t**2)
        for by, got, expected, floor in zip(
            ('x', 'y', 'temperature'), gradients, expected_gradients, floors, strict=True
        ):
            error = np.linalg.norm(np.asarray(got, np.float64) - expected)
            norm = np.linalg.norm(expected)
            assert error <= 1e-5 * norm + floor, (
                f'{form}, {name}, gradient by {by}: {error} of {norm}'
            )


# ---- values and gradients


@pytest.mark.parametrize('form', FORMS)
def test_blockwise_value_and_gradients_are_the_definition(form):
    check(value_and_gradients(nce, form, BLOCKS), form)


@pytest.mark.parametrize('form', FORMS)
def test_dense_value_and_gradients_are_the_definition(form):
    check(value_and_gradients(dense, form, How()), form)


@pytest.mark.slow
def test_compiled_as_a_whole_it_is_the_definition():
    """As in training; one block, whose scores are stored for the derivative."""
    check(jax.jit(value_and_gradients(nce, 'asymmetric', How())), 'asymmetric')


@pytest.fixture
def mesh():
    """All four axes: loss rows are spread over the model axis too."""
    devices = sharding.make_mesh({'replica': 2, 'fsdp': 2, 'model': 2, 'seq': 1})
    with jax.set_mesh(devices):
        yield devices


@pytest.mark.parametrize('method', ['gather', pytest.param('ring', marks=pytest.mark.slow)])
def test_on_eight_devices_it_is_the_definition(mesh, method):
    """Ten clips on eight devices: padded rows are nowhere to be seen, and masks compile once."""
    f = value_and_gradients(nce, 'asymmetric', How(method))
    chex.clear_trace_counter()

    @quick_jit
    @chex.assert_max_traces(n=1)
    def compiled(*args):
        return f(*args)

    check(compiled, 'asymmetric', ('random', 'masked', 'nothing'))


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('how', [How('gather'), How('gather', 8), How('ring'), How('ring', 8)])
def test_every_loss_on_eight_devices(mesh, form, how):
    check(quick_jit(value_and_gradients(nce, form, how)), form)


# ---- sums of rows, columns and positives


@functools.cache
def sums_and_gradients(kind, how, mesh=None):
    """Sums and gradients by x, y and scale, compiled once per shape.

    Sums are those of rows, columns and positives; of rows alone for sigmoids. Gradients are for
    their cotangents.
    """

    @quick_jit
    def compute(x, y, scale, x_valid, y_valid, apart, own, cotangents):
        options = {'x_valid': x_valid, 'y_valid': y_valid, 'own': own, 'how': how}

        def sums(x, y, scale):
            if kind == 'sigmoid':
                return (similarity.sigmoid_sum(x, y, scale, -1.0, **options),)
            return tuple(similarity.log_sum_exp(x, y, scale, apart=apart, **options))

        values, pull_back = jax.vjp(sums, x, y, scale)
        return values, pull_back(cotangents)

    return compute


def softmax_definition(scores, mask, axis):
    """log Σ exp of the scores that the mask holds, and its derivative by each score."""
    with np.errstate(over='ignore', divide='ignore'):
        top = np.where(mask, scores, -1e300).max(axis, keepdims=True)
        exps = np.where(mask, np.exp(scores - top), 0)
        total = exps.sum(axis, keepdims=True)
        log_sums = np.where(total > 0, top + np.log(total), NEVER)
    return log_sums.squeeze(axis), exps / np.where(total > 0, total, 1)


def sigmoid_definition(scores, mask, is_own):
    """Row sums of log(1 + exp(z (s - 1))), z = -1 for own pairs, and the derivative by s."""
    z = np.where(is_own, -1, 1)
    terms = np.logaddexp(0, z * (scores - 1)) * mask
    return terms.sum(1), mask * z / (1 + np.exp(-z * (scores - 1)))


def check_sums(kind, how, m, n, e, masked, seed, mesh=None):
    """Random embeddings [m e] and [n e], exclusions, positives and masks, against float64."""
    rng = np.random.default_rng(seed)
    x = float32_values(rng.normal(size=(m, e)))
    y = float32_values(rng.normal(size=(n, e)))
    scale = float32_values(rng.uniform(0.1, 30))
    threshold = 0.2 if masked else -1
    x_valid = rng.uniform(size=m) > threshold
    y_valid = rng.uniform(size=n) > threshold
    apart = [rng.integers(0, 4, m), rng.integers(0, 4, n)]
    own = [rng.integers(0, 4, m), rng.integers(0, 4, n)]
    # The sums of what is not valid mean nothing: their cotangents are zero.
    valid = [x_valid] if kind == 'sigmoid' else [x_valid, y_valid, x_valid]
    cotangents = [rng.normal(size=len(v)) * v for v in valid]

    scores = x @ y.T * scale
    is_own = own[0][:, None] == own[1]
    is_apart = apart[0][:, None] != apart[1]
    if kind == 'sigmoid':
        rows, row_slopes = sigmoid_definition(scores, y_valid, is_own)
        expected_sums = [rows]
        by_score = row_slopes * cotangents[0][:, None]
    else:
        rows, row_slopes = softmax_definition(scores, is_apart & y_valid, 1)
        columns, column_slopes = softmax_definition(scores, is_apart & x_valid[:, None], 0)
        positives, positive_slopes = softmax_definition(scores, is_apart & y_valid & is_own, 1)
        expected_sums = [rows, columns, positives]
        by_score = (
            row_slopes * cotangents[0][:, None]
            + column_slopes * cotangents[1]
            + positive_slopes * cotangents[2][:, None]
        )

    arrays = single(x, y, scale)
    sums, gradients = sums_and_gradients(kind, how, mesh)(
        *arrays,
        x_valid if masked else None,
        y_valid if masked else None,
        apart,
        own,
        single(*cotangents),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(sums, single(*expected_sums))
    names = ('rows', 'columns', 'positives')
    for name, got, expected, v in zip(names, sums, expected_sums, valid):
        np.testing.assert_allclose(
            np.asarray(got)[v], expected[v], rtol=1e-5, atol=1e-4, err_msg=name
        )

    x, y = x * x_valid[:, None], y * y_valid[:, None]
    norm = np.linalg.norm
    expected_gradients = (
        by_score @ y * scale,
        by_score.T @ x * scale,
        np.sum(by_score * (x @ y.T)),
    )
    # A score is rounded; a gradient is as wrong as what the rounded weights are multiplied by.
    rounding = np.finfo(np.float32).eps * (1 + np.abs(scores).max()) * norm(by_score)
    factors = (scale * norm(y), scale * norm(x), norm(x @ y.T))
    for by, got, expected, factor in zip(
        ('x', 'y', 'scale'), gradients, expected_gradients, factors, strict=True
    ):
        error = norm(np.asarray(got, np.float64) - expected)
        assert error <= 1e-5 * norm(expected) + 3 * rounding * factor, (
            f'gradient by {by}: {error} of {norm(expected)}'
        )


# m, n, e, masked, block; few shapes, as each is compiled.
ODD_SHAPES = (
    (1, 1, 1, True, 0),
    (5, 12, 4, True, 0),
    (23, 9, 3, False, 8),
    (7, 40, 5, True, 16),
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(ODD_SHAPES))
def test_sums_over_sets_of_odd_shapes(seed, shape):
    """Rows, columns, positives, exclusions and masks, of sizes that no block divides."""
    m, n, e, masked, block = shape
    check_sums('softmax', How(block=block), m, n, e, masked, seed)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    e=st.integers(1, 9),
    block=st.sampled_from([0, 8, 16]),
    kind=st.sampled_from(['softmax', 'sigmoid']),
    masked=st.booleans(),
)
def test_sums_over_sets_of_any_shape(seed, m, n, e, block, kind, masked):
    check_sums(kind, How(block=block), m, n, e, masked, seed)


@pytest.mark.parametrize(
    'kind, method, masked',
    [
        ('softmax', 'gather', True),
        ('softmax', 'ring', False),
        ('sigmoid', 'ring', True),
        pytest.param('softmax', 'gather', False, marks=pytest.mark.slow),
        pytest.param('softmax', 'ring', True, marks=pytest.mark.slow),
        pytest.param('sigmoid', 'gather', True, marks=pytest.mark.slow),
    ],
)
def test_sums_on_eight_devices(mesh, kind, method, masked):
    """Several blocks of rows and of keys on each device, the last ones padded.

    What travels behind the keys comes home to its own block.
    """
    for seed in range(3):
        check_sums(kind, How(method, 8), 8 * 10 - 3, 8 * 21 - 5, 4, masked, seed, mesh)


@pytest.mark.parametrize('how', [How(), BLOCKS])
def test_keys_without_gradient_get_none_and_rows_have_the_same(how):
    random = case('random', 1)
    x, y = single(random.x, random.y[:, 0])

    def gradients(stop_gradient):
        def loss(x, y):
            sums = similarity.log_sum_exp(x, y, columns=False, stop_gradient=stop_gradient, how=how)
            return jnp.sum(sums.rows**2)

        return jax.grad(loss, (0, 1))(x, y)

    stopped_x, stopped_y = gradients(True)
    expected_x, expected_y = gradients(False)
    chex.assert_trees_all_close(stopped_x, expected_x, rtol=1e-6)
    chex.assert_trees_all_equal(stopped_y, jnp.zeros_like(y))
    assert np.asarray(expected_y).any()


# ---- bfloat16


@quick_jit
def clip_in_bfloat16(x, y, x_valid, y_mask):
    """Value and gradients of CLIP's loss in bfloat16; x, y [16 16] are already units."""
    how = How(block=8, dtype='bfloat16')

    def loss(x, y):
        return nce.clip(
            x, y, x_valid=x_valid, y_mask=y_mask, temperature=0.1, normalise=False, how=how
        )

    return jax.value_and_grad(loss, (0, 1))(x, y)


def test_bfloat16_embeddings_are_summed_in_float32():
    """Against the definition on the rounded embeddings.

    The value to float32's precision, the gradients to bfloat16's.
    """
    rng = np.random.default_rng(0)
    x = np.float64(unit(rng.normal(size=(16, 16))).astype(jnp.bfloat16))
    y = np.float64(unit(rng.normal(size=(16, 16))).astype(jnp.bfloat16))
    x_valid = rng.uniform(size=16) > 0.3
    y_mask = rng.uniform(size=(16, 1)) > 0.3

    def expected_loss(x, y):
        return definition('clip', x, y[..., None, :], x_valid, y_mask, 0.1, raw=True)

    arrays = single(x, y)
    value, gradients = clip_in_bfloat16(*arrays, x_valid, y_mask)
    chex.assert_type(value, jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, arrays)
    np.testing.assert_allclose(value, expected_loss(x, y), rtol=1e-5)
    for got, expected in zip(gradients, finite_differences(expected_loss, x, y), strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert error < 1e-2 * np.linalg.norm(expected)


def test_near_convergence_bfloat16_gradients_still_point_the_right_way():
    """A pull and a push that cancel to a thousandth are joined before they are rounded."""
    all_valid, all_there = np.ones(16, bool), np.ones((16, 1), bool)
    _, (got, _) = clip_in_bfloat16(jnp.eye(16), jnp.eye(16), all_valid, all_there)
    # Both directions' softmax; the gradient by a score is softmax - 1 for own pairs, over B clips
    # and the temperature of 0.1.
    softmax = np.exp(10 * np.eye(16)) / (np.exp(10.0) + 15)
    expected = (softmax - np.eye(16)) / 16 * 10
    error = np.linalg.norm(np.asarray(got, np.float64) - expected)
    assert error < 1e-2 * np.linalg.norm(expected)


# ---- properties


def test_memory_grows_with_the_batch_not_with_its_square():
    """Temporary memory of value and gradient, from the compiler."""

    def temporary_bytes(module, rows):
        def loss(x, y):
            return module.symmetric(x, y, normalise=False)

        shape = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
        lowered = quick_jit(jax.value_and_grad(loss, (0, 1))).lower(shape, shape)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    of_4096 = temporary_bytes(nce, 4096)
    of_8192 = temporary_bytes(nce, 8192)
    assert of_8192 < 2.2 * of_4096
    assert temporary_bytes(dense, 8192) > 20 * of_8192


@pytest.mark.parametrize('form', ['asymmetric', 'nt_xent'])
def test_replicas_average_each_replica_first(form):
    args = inputs(form, 'masked')
    value, _ = value_and_gradients(nce, form, BLOCKS, replicas=5)(*single(*args))
    fields = (args.x, args.y, args.x_valid, args.y_mask, args.temperature)
    expected = definition(form, *fields, replicas=5)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert abs(value - definition(form, *fields)) > 1e-3


@pytest.mark.parametrize('module', [nce, dense])
@pytest.mark.parametrize('form', ['asymmetric', 'siglip', 'nt_xent'])
def test_masked_rows_get_exactly_no_gradient_even_when_they_hold_nan(module, form):
    args = inputs(form, 'masked')
    args.x[~args.x_valid] = np.nan
    args.y[~args.y_mask] = np.nan
    how = BLOCKS if module is nce else How()
    value, gradients = value_and_gradients(module, form, how)(*single(*args))
    chex.assert_tree_all_finite((value, gradients))
    by_x, by_y, _ = map(np.asarray, gradients)
    assert (by_x[~args.x_valid] == 0).all()
    assert (by_y[~args.y_mask] == 0).all()
    assert np.abs(by_x).sum() > 0
    assert np.abs(by_y).sum() > 0


def test_a_perfect_model_tends_to_log_two_asymmetric_and_zero_symmetric():
    @quick_jit
    def losses(x):
        asymmetric = nce.asymmetric(x, x, temperature=0.02)
        symmetric = nce.symmetric(x, x, temperature=0.02)
        return asymmetric, symmetric

    asymmetric, symmetric = losses(jnp.eye(6))
    np.testing.assert_allclose(asymmetric, np.log(2), rtol=1e-5)
    np.testing.assert_allclose(symmetric, 0, atol=1e-5)


@pytest.mark.parametrize(
    'form, y_shape, options, message',
    [
        ('nt_xent', (4, 2, 3), {}, 'expected one candidate per clip, got 2'),
        ('asymmetric', (4, 2, 3), {'replicas': 3}, 'replicas=3 does not divide the batch of 4'),
        (
            'asymmetric',
            (4, 2, 3),
            {'how': How('rign')},
            "method='rign': choose one of auto, gather, ring",
        ),
        ('asymmetric', (5, 3), {}, r'got x \(4, 3\) and y \(5, 3\)'),
    ],
)
def test_what_does_not_fit_is_named(form, y_shape, options, message):
    loss = functools.partial(getattr(nce, form), **options)
    with typecheck.off(), pytest.raises(ValueError, match=message):
        jax.eval_shape(loss, jnp.ones((4, 3)), jnp.ones(y_shape))


def test_keys_with_ids_need_ids_of_the_queries():
    x = jnp.ones((4, 3))
    queue = nce.Keys(jnp.ones((7, 3)), apart=jnp.arange(7))
    with pytest.raises(ValueError, match='expected ids, .*, got None'):
        jax.eval_shape(lambda: nce.info_nce(x, x, keys=(queue,)))


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_float64_gradients_are_finite_differences(form):
    with jax.enable_x64(True):
        for name in ('random', 'masked', 'cold'):
            value, gradients = value_and_gradients(nce, form, BLOCKS)(*inputs(form, name))
            chex.assert_type([value, *gradients], np.float64)
            expected_value, expected_gradients = expected_value_and_gradients(form, name)
            np.testing.assert_allclose(value, expected_value, rtol=1e-10)
            for got, expected in zip(gradients, expected_gradients, strict=True):
                atol = 1e-6 * np.abs(expected).max()
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


# ---- several processes

CHILD = textwrap.dedent("""
    import json
    import sys

    import jax
    import numpy as np

    process, port, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 4)
    jax.distributed.initialize(f'127.0.0.1:{port}', 2, process, initialization_timeout=120)

    import jax.numpy as jnp

    from vatt_jax.losses import nce
    from vatt_jax.losses.similarity import How
    from vatt_jax.parallel import sharding

    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6)).astype(np.float32)
    y = rng.normal(size=(16, 2, 6)).astype(np.float32)
    own_rows = slice(8 * process, 8 * process + 8)

    def loss(x, y):
        return nce.asymmetric(x, y, temperature=0.2, how=How(method))

    mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        x = jax.make_array_from_process_local_data(rows, x[own_rows])
        y = jax.make_array_from_process_local_data(rows, y[own_rows])
        value, (by_x, by_y) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, y)
        norm = jax.jit(jnp.linalg.norm)
        result = [float(value), float(norm(by_x)), float(norm(by_y))]
    print('RESULT', json.dumps(result), flush=True)
    jax.distributed.shutdown()
""")


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['gather', 'ring'])
def test_two_processes_compute_the_same_loss(method):
    port = free_port()
    env = {'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)}
    for name, value in os.environ.items():
        if not name.startswith(('XLA_', 'JAX_', 'PYTHONPATH')):
            env[name] = value
    processes = []
    for process in range(2):
        processes.append(
            subprocess.Popen(
                [sys.executable, '-c', CHILD, str(process), str(port), method],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = '\n'.join(outputs).splitlines()
    results = [json.loads(line[7:]) for line in lines if line.startswith('RESULT')]
    assert len(results) == 2, outputs

    rng = np.random.default_rng(0)
    x = float32_values(rng.normal(size=(16, 6)))
    y = float32_values(rng.normal(size=(16, 2, 6)))

    def loss(x, y):
        return definition('asymmetric', x, y, np.ones(16, bool), np.ones((16, 2), bool), 0.2)

    by_x, by_y = finite_differences(loss, x, y)
    expected = [loss(x, y), np.linalg.norm(by_x), np.linalg.norm(by_y)]
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=1e-5)
