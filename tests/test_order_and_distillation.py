"""The tasks temporal_order and distillation, against their definitions in NumPy float64."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_jax.config import ConfigError
from vatt_jax.objectives import Spec, temporal_order
from vatt_jax.objectives.distillation import Distillation
from vatt_jax.objectives.temporal_order import TemporalOrder
from vatt_jax.rng import Rng

B, T, D, E = 6, 9, 4, 3


def rng_of(examples=B, seed=0):
    return Rng.create(seed, 0, jnp.arange(examples, dtype=jnp.uint32))


def spec_of(**widths):
    """What `init` sees of streams of these pooled shapes, clips of T frames."""
    encoded, batch = {}, {}
    for stream, shape in widths.items():
        encoded[stream] = types.SimpleNamespace(pooled=np.zeros((B, *shape)))
        batch[stream] = {'data': np.zeros((B, T, 2))}
    outputs = types.SimpleNamespace(encoded=encoded)
    return Spec(model=None, outputs=outputs, batch=batch, size=B, labels={})


# ---- distillation


def distil(objective, params, pooled, valid):
    batch = {stream: {'valid': jnp.array(mask)} for stream, mask in valid.items()}
    return objective.compute_loss(None, {'batch_stats': {}}, params, {}, pooled, batch, None)


@pytest.mark.parametrize('projection', ['none', 'linear'])
def test_distillation_is_the_mean_distance_and_only_the_student_learns(projection):
    draw = np.random.default_rng(0)
    width = D if projection == 'linear' else E
    student, teacher = draw.normal(size=(B, width)), draw.normal(size=(B, E))
    kernel, bias = draw.normal(size=(D, E)), draw.normal(size=E)
    valid = {'video': [1, 1, 0, 1, 1, 1], 'flow': [1, 1, 1, 0, 1, 1]}
    valid = {stream: np.array(mask, bool) for stream, mask in valid.items()}
    objective = Distillation({'projection': projection})
    spec = spec_of(video=(width,), flow=(E,))
    params = nn.meta.unbox(objective.init(jax.random.key(0), spec)[0])
    if projection == 'linear':
        assert jax.tree.map(jnp.shape, params) == {'kernel': (D, E), 'bias': (E,)}
        params = {'kernel': jnp.float32(kernel), 'bias': jnp.float32(bias)}

    # NumPy float64, clip by clip.
    counted = [b for b in range(B) if valid['video'][b] and valid['flow'][b]]
    expected, student_grad = 0.0, np.zeros_like(student)
    kernel_grad = np.zeros_like(kernel)
    for b in counted:
        mapped = student[b] @ kernel + bias if projection == 'linear' else student[b]
        difference = mapped - teacher[b]
        distance = np.sqrt((difference**2).sum())
        expected += distance / len(counted)
        direction = difference / distance / len(counted)
        student_grad[b] = kernel @ direction if projection == 'linear' else direction
        kernel_grad += np.outer(student[b], direction) if projection == 'linear' else 0

    def loss_of(params, pooled):
        # Not even NaN of a clip that lacks a stream shows.
        pooled = {
            stream: jnp.where(valid[stream][:, None], x, jnp.nan) for stream, x in pooled.items()
        }
        return distil(objective, params, pooled, valid).value

    pooled = {'video': jnp.float32(student), 'flow': jnp.float32(teacher)}
    value, (params_grad, grads) = jax.jit(jax.value_and_grad(loss_of, (0, 1)))(params, pooled)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads['video'], student_grad, atol=1e-6)
    np.testing.assert_array_equal(grads['flow'], 0)
    if projection == 'linear':
        np.testing.assert_allclose(params_grad['kernel'], kernel_grad, atol=1e-5)


def test_a_student_at_its_teacher_has_a_finite_gradient():
    same = jnp.ones((B, E))
    valid = {stream: np.ones(B, bool) for stream in ('video', 'flow')}
    grad = jax.grad(lambda x: distil(Distillation({}), {}, {'video': x, 'flow': same}, valid).value)
    np.testing.assert_array_equal(grad(same), 0)


def test_metrics_of_distillation():
    pooled = {'video': jnp.zeros((B, E)), 'flow': 2 * jnp.eye(B, E)}
    valid = {'video': np.ones(B, bool), 'flow': np.arange(B) < E}
    metrics = distil(Distillation({}), {}, pooled, valid).metrics
    assert metrics == {'relative_distance': 1.0, 'teacher_length': 2.0}


@pytest.mark.parametrize(
    'fields, widths, message',
    [
        ({'projection': 'deep'}, {}, "objective.projection='deep': choose one of none, linear"),
        ({'teacher': 'video'}, {}, "objective.teacher: expected another stream .*'video' for both"),
        ({}, {'video': (D,), 'flow': (E,)}, "projection: expected 'linear'.*4 of 'video' and 3"),
        (
            {'teacher': 'text'},
            {'video': (D,), 'text': (2, D)},
            "teacher: expected a stream with one feature per clip, got 'text' with 2",
        ),
    ],
)
def test_mistakes_of_distillation(fields, widths, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(fields).init(jax.random.key(0), spec_of(**widths))


# ---- temporal order


def test_coins_are_fair_and_belong_to_clips():
    changed = np.asarray(temporal_order.draw_changed(rng_of(4096)))
    assert abs(changed.mean() - 0.5) < 0.03
    few = rng_of(4096).replace(examples=jnp.array([7, 3], jnp.uint32))
    np.testing.assert_array_equal(temporal_order.draw_changed(few), changed[[7, 3]])


@pytest.mark.parametrize('shape', [(60, T), (2, T, 2, 3, 1)])
def test_shuffled_parts_are_another_order_of_them(shape):
    """Every order but the clip's own comes up, and what is left over stays."""
    parts, length = 4, 2
    clips = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shuffle = jax.jit(temporal_order.shuffle, static_argnums=1)
    got = np.asarray(shuffle(clips, parts, rng_of(len(clips))))
    orders = set()
    for clip, shuffled in zip(clips, got, strict=True):
        pieces = np.split(clip[: parts * length], parts)
        order = []
        for piece in np.split(shuffled[: parts * length], parts):
            order += [number for number in range(parts) if np.array_equal(pieces[number], piece)]
        assert sorted(order) == list(range(parts))
        assert order != list(range(parts))
        np.testing.assert_array_equal(shuffled[parts * length :], clip[parts * length :])
        orders.add(tuple(order))
    # Of 23 orders, in 60 draws.
    assert len(orders) > 15 or len(clips) == 2


def test_backwards():
    clip = np.random.default_rng(0).normal(size=(B, T, 2)).astype(np.float32)
    for modality in ('video', 'audio'):
        got = temporal_order.play_backwards(jnp.asarray(clip), modality)
        np.testing.assert_array_equal(got, clip[:, ::-1])


def test_backwards_flow_is_that_of_the_frames_in_reverse():
    """A point at x(t) has the flow x(t + 1) - x(t), and in the last frame that of the one before"""

    def flow_of(places):
        steps = np.diff(places)
        return np.append(steps, steps[-1])

    places = np.random.default_rng(0).normal(size=T)
    flow = np.broadcast_to(flow_of(places)[None, :, None], (1, T, 2))
    got = np.asarray(temporal_order.play_backwards(jnp.asarray(flow), 'flow'))[0, :, 0]
    expected = flow_of(places[::-1])
    np.testing.assert_allclose(got[:-1], expected[:-1], rtol=1e-5)


class Towers:
    """Features are the data, weighted by time and summed over it."""

    def apply(self, variables, batch, train, **options):
        assert train
        weights = variables['params']
        pooled = {name: jnp.einsum('btc,t->bc', x['data'], weights) for name, x in batch.items()}
        return pooled, {'batch_stats': {'seen': 1}}


@pytest.mark.parametrize('change', ['reversed', 'shuffled'])
def test_the_loss_of_a_batch(change):
    """Of clips whose coin says so the changed ones are encoded, and the label says it."""
    objective = TemporalOrder({'change': change, 'parts': 3})
    params, state = nn.meta.unbox(objective.init(jax.random.key(0), spec_of(video=(2,))))
    draw = np.random.default_rng(0)
    clips, weights = draw.normal(size=(B, T, 2)), draw.normal(size=T)
    valid = np.array([1, 1, 1, 0, 1, 1], bool)
    batch = {'video': {'data': jnp.float32(clips), 'valid': jnp.array(valid)}}
    variables = {'params': jnp.float32(weights), 'batch_stats': {'seen': 0}}

    @jax.jit
    def step(rng):
        encoding = objective.encode(Towers(), variables, params, state, batch, rng)
        loss = objective.compute_loss(None, variables, params, state, encoding.pooled, batch, rng)
        shuffled = temporal_order.shuffle(batch['video']['data'], 3, rng.at('order'))
        return encoding, loss, temporal_order.draw_changed(rng), shuffled

    encoding, loss, is_changed, shuffled = jax.device_get(step(rng_of()))
    assert encoding.batch_stats == {'seen': 1}
    assert is_changed.any() and not is_changed.all()
    changed = clips[:, ::-1] if change == 'reversed' else np.float64(shuffled)
    total, hits = 0.0, 0
    for b in np.flatnonzero(valid):
        feature = weights @ (changed[b] if is_changed[b] else clips[b])
        logits = feature @ np.float64(params['kernel']) + np.float64(params['bias'])
        label = int(is_changed[b])
        total += np.log(np.exp(logits).sum()) - logits[label]
        hits += logits.argmax() == label
    np.testing.assert_allclose(loss.value, total / valid.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics['accuracy'], hits / valid.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'change': 'slow'}, "objective.change='slow': choose one of reversed, shuffled"),
        ({'stream': 'text'}, 'objective.stream: expected one of video, flow, audio .*text'),
        ({'change': 'shuffled', 'parts': 10}, "parts: expected at most 9, .*'video' .*got 10"),
    ],
)
def test_mistakes_of_temporal_order(fields, message):
    with pytest.raises(ConfigError, match=message):
        TemporalOrder(fields).init(jax.random.key(0), spec_of(video=(2,)))
