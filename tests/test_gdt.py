"""The objective gdt against its definition, term by term and clip by clip, in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
from tests import tiny
from tests.test_microbatch import relative_distance
from tests.test_train import losses, run, state_of, stop_at
from vatt_jax.config import ConfigError
from vatt_jax.inference import feature_extractor
from vatt_jax.models import Encoded, layers
from vatt_jax.objectives.base import select_streams
from vatt_jax.objectives.gdt import GDT, needed_views
from vatt_jax.objectives.transformations import HYPOTHESES
from vatt_jax.rng import Rng
from vatt_jax.training import loop, train_step

B, E = 8, 5
TEMPERATURE = 0.2

# The first clip and the second one, forwards and reversed, by the names of their streams.
F, R, F2, R2 = '', '.reversed', '.second', '.second_reversed'
# Hypothesis -> its terms (kind, view, transformed view), all of equal weight, in the order in which
# the published code computes them. v: distinctive, i: invariant, b: base.
TERMS = {
    1: [('b', F, None)],
    2: [('v', F, R)],
    3: [('b', F, R), ('i', F, R)],
    4: [('v', F, F2)],
    5: [('b', F, F2), ('i', F, F2)],
    6: [('v', F, R), ('v', F2, R2), ('v', F, F2), ('v', R, R2)],
    7: [('b', F, R), ('i', F, R), ('i', F2, R2), ('v', F, F2), ('v', R, R2)],
    8: [('b', F, F2), ('v', F, R), ('v', F2, R2), ('i', F, F2), ('i', R, R2)],
    9: [('b', F, R), ('b', F, F2), ('i', F, R), ('i', F2, R2), ('i', F, F2), ('i', R, R2)],
}


def unit(x):
    """x / |x| over the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def definition(queries, keys, hypothesis, num_replicas, published):
    """The loss, as the mean of what each replica computes of its own clips.

    Args:
        queries: stream -> [B E]; the loss is differentiated by these.
        keys: the same, held fixed.
        hypothesis: 1 to 9.
        num_replicas: each holds B / num_replicas clips.
        published: lists of gathered keys grow in place.
    """
    queries = {name: unit(x) for name, x in queries.items()}
    keys = {name: unit(x) for name, x in keys.items()}
    size = B // num_replicas
    of_replicas = []
    for replica in range(num_replicas):
        own = range(replica * size, (replica + 1) * size)
        away = [b for b in range(B) if b not in own]
        # What this replica has gathered from the others: a list of keys for each stream.
        gathered = {name: [x[b] for b in away] for name, x in keys.items()}
        terms = []
        for kind, view, transformed in TERMS[hypothesis]:
            total = []
            for q_modality, k_modality in (('video', 'audio'), ('audio', 'video')):
                remote = gathered_keys(gathered, k_modality, kind, view, transformed, published)
                for this, other in ((view, transformed), (transformed, view)):
                    if this is None:
                        continue
                    positive = k_modality + (other if kind == 'i' else this)
                    local = [keys[positive][b] for b in own]
                    hard = [keys[k_modality + other][b] for b in own] if kind == 'v' else []
                    candidates = np.stack(local + remote + hard)
                    for place, b in enumerate(own):
                        scores = candidates @ queries[q_modality + this][b] / TEMPERATURE
                        total.append(np.log(np.exp(scores).sum()) - scores[place])
            terms.append(np.mean(total))
        of_replicas.append(np.mean(terms))
    return np.mean(of_replicas)


def gathered_keys(gathered, modality, kind, view, transformed, published):
    """Remote negatives of both views; with `published`, the list that is used stays extended."""
    first = gathered[modality + view]
    if transformed is None:
        return list(first)
    second = gathered[modality + transformed]
    if kind == 'i':
        first, second = second, first
    if not published:
        return first + second
    first += second
    return list(first)


@pytest.fixture(scope='module')
def embeddings():
    """stream -> float64 [B E] that float32 holds exactly, for all eight streams."""
    rng = np.random.default_rng(0)
    names = [modality + view for modality in ('video', 'audio') for view in (F, R, F2, R2)]
    return {name: np.float64(np.float32(rng.normal(size=(B, E)))) for name in names}


def build(hypothesis, **fields):
    """The objective of a hypothesis."""
    roles = HYPOTHESES[hypothesis]._asdict()
    return GDT({'temperature': TEMPERATURE, 'method': 'dense', **roles, **fields})


def loss_of(objective, embeddings, valid=None):
    """The objective's Loss of given embeddings, without heads."""
    num_clips = len(next(iter(embeddings.values())))
    batch = {'valid': jnp.ones(num_clips, bool)}
    for name in embeddings:
        batch[name] = {'valid': batch['valid'] if valid is None else valid[name]}
    rng = Rng.create(0, 0, jnp.arange(num_clips))
    return objective.compute_loss(
        None, {'batch_stats': {}}, {}, {'norm': {}}, embeddings, batch, rng
    )


@pytest.fixture
def without_heads(monkeypatch):
    """Pooled features are the embeddings."""
    monkeypatch.setattr(GDT, '_embed', lambda self, params, norm, pooled, *_: (pooled, norm))


CASES = [(h, 1, False) for h in HYPOTHESES]
CASES += [(h, 4, False) for h in (2, 7, 9)]
CASES += [(h, 4, True) for h in HYPOTHESES]


@pytest.mark.parametrize('hypothesis, replicas, published', CASES)
def test_loss_and_gradient_are_the_definition(
    embeddings, without_heads, hypothesis, replicas, published
):
    """Clean and published negatives; one replica stands for as many as there are clips."""
    objective = build(hypothesis, replicas=replicas, published_negatives=published)
    streams = {name: embeddings[name] for name in objective.streams()}
    arrays = {name: jnp.float32(x) for name, x in streams.items()}
    value, grads = jax.value_and_grad(lambda x: loss_of(objective, x).value)(arrays)

    num_replicas = B if replicas == 1 else replicas
    arguments = (hypothesis, num_replicas, published)
    expected = definition(streams, streams, *arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)

    # Central differences of queries along one random direction; keys stay.
    rng = np.random.default_rng(1)
    direction = {name: rng.normal(size=x.shape) for name, x in streams.items()}
    ends = []
    for step in (1e-5, -1e-5):
        moved = {name: x + step * direction[name] for name, x in streams.items()}
        ends.append(definition(moved, streams, *arguments))
    slope = (ends[0] - ends[1]) / 2e-5
    got = sum(np.sum(np.float64(grads[name]) * direction[name]) for name in streams)
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)


def test_published_negatives_are_more():
    """Where a transformation is invariant, or two are used; lists of one term do not grow."""
    for hypothesis in HYPOTHESES:
        counts = []
        for published in (False, True):
            terms = build(hypothesis, published_negatives=published).terms
            counts.append(sum(len(term.remote) for term in terms))
        assert (counts[1] > counts[0]) == (hypothesis in (3, 5, 6, 7, 8, 9))


@pytest.mark.parametrize('hypothesis', [6, 7])
def test_blocks_and_eight_devices_give_the_loss_in_memory(embeddings, without_heads, hypothesis):
    expected = loss_of(build(hypothesis), {n: jnp.float32(x) for n, x in embeddings.items()})
    mesh = jax.make_mesh((8,), ('replica',), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('replica'))
        spread = {name: jax.device_put(np.float32(x), rows) for name, x in embeddings.items()}
        got = jax.jit(lambda x: loss_of(build(hypothesis, method='auto'), x))(spread)
    np.testing.assert_allclose(got.value, expected.value, rtol=1e-5)
    for name in expected.metrics:
        np.testing.assert_allclose(got.metrics[name], expected.metrics[name], rtol=1e-5)


@pytest.mark.parametrize('hypothesis', [6, 9])
def test_what_is_not_there_counts_for_nothing(embeddings, without_heads, hypothesis):
    """Clips without sound, with NaN in their place: the loss of the others, zero gradient."""
    objective = build(hypothesis)
    arrays = {name: np.float32(x) for name, x in embeddings.items()}
    kept = np.arange(B) % 3 != 0
    expected = loss_of(objective, {name: x[kept] for name, x in arrays.items()})
    valid = {}
    for name in arrays:
        arrays[name][~kept] = np.nan
        valid[name] = jnp.asarray(kept)
    loss = lambda x: loss_of(objective, x, valid)  # noqa: E731
    got, grads = jax.value_and_grad(lambda x: loss(x).value)(arrays)
    np.testing.assert_allclose(got, expected.value, rtol=1e-5)
    for grad in grads.values():
        np.testing.assert_array_equal(grad[~kept], 0)
        assert np.isfinite(grad).all()
    told_apart = loss(arrays).metrics['told_apart/shift']
    np.testing.assert_allclose(told_apart, expected.metrics['told_apart/shift'], rtol=1e-6)


def test_a_sentence_is_that_of_both_directions(without_heads):
    """Two directions of a video find one sentence, whose key counts once."""
    rng = np.random.default_rng(2)
    names = ('video', 'video.reversed', 'text')
    arrays = {name: np.float32(rng.normal(size=(B, E))) for name in names}
    objective = build(3, modalities=('video', 'text'))
    assert objective.streams() == names

    x = {name: unit(np.float64(array)) for name, array in arrays.items()}

    def nce(query, positive, *negatives):
        rows = []
        for b in range(B):
            scores = [positive @ query[b] / TEMPERATURE]
            scores += [np.delete(keys, b, 0) @ query[b] / TEMPERATURE for keys in negatives]
            rows.append(np.log(np.exp(np.concatenate(scores)).sum()) - scores[0][b])
        return np.mean(rows)

    forwards, backwards, text = (x[name] for name in names)
    to_text = (nce(forwards, text) + nce(backwards, text)) / 2
    to_video = (nce(text, forwards, backwards) + nce(text, backwards, forwards)) / 2
    got = loss_of(objective, {name: jnp.float32(array) for name, array in arrays.items()})
    np.testing.assert_allclose(got.value, (to_text + to_video) / 2, rtol=1e-5)


def test_told_apart_is_the_share_of_queries_nearer_to_their_own_view(without_heads):
    """One direction of sound is a turn of the other; half of the videos turn with it."""
    sound = np.eye(4, dtype=np.float32)
    video = sound.copy()
    turned = np.roll(sound, 1, axis=1)
    names = {'video': video, 'audio': sound, 'audio.reversed': turned}
    # The first two clips look the same backwards as they sound, the others as forwards.
    names['video.reversed'] = np.concatenate([turned[:2], video[2:]])
    got = loss_of(build(2), {name: jnp.asarray(x) for name, x in names.items()})
    # Of 16 queries, the reversed videos and sounds of two clips are nearer to the other view.
    queries = [(video, sound, turned), (names['video.reversed'], turned, sound)]
    queries += [(sound, video, names['video.reversed']), (turned, names['video.reversed'], video)]
    expected = np.mean([np.sum(q * (own - other), 1) > 0 for q, own, other in queries])
    assert got.metrics['told_apart/reversal'] == expected
    assert 0.5 < expected < 1


# ---- through the loop


def config(hypothesis=6, **overrides):
    """GDT on the synthetic source, with towers of one layer."""
    c = tiny.config(**{'steps': 3, 'batch_size': 8, **overrides})
    del c.model.towers['text']
    for tower in c.model.towers.values():
        tower.layers = 1
    c.model.head = ConfigDict({'name': 'none'})
    roles = HYPOTHESES[hypothesis]._asdict()
    sizes = {'width': 6, 'hidden': 8, 'dropout': 0.1}
    # In memory: it compiles faster than blocks, which it is compared with above.
    c.objective = ConfigDict({'name': 'gdt', 'method': 'dense', **sizes, **roles})
    c.data.views, c.augment.mirrored = needed_views(c.objective)
    return c


@pytest.mark.slow
def test_killed_and_continued_is_uninterrupted(tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    expected = run(whole, config())
    with stop_at(2):
        run(cut, config())
    got = run(cut, config())
    assert got['digests'] == expected['digests']
    assert losses(cut) == losses(whole)
    state, *_ = state_of(whole, config())
    cut_state, *_ = state_of(cut, config())
    chex.assert_trees_all_equal(cut_state.params, state.params)
    chex.assert_trees_all_equal(cut_state.objective, state.objective)
    chex.assert_tree_all_finite(state.params)


def first_gradients(**overrides):
    """(gradients, Loss) of the first step, on the host; a clip lacks its sound."""
    # The reversal alone: half the streams, and a mirrored one among them.
    c = config(2, **overrides)
    data = data_pipelines.open(c)
    built = loop.build(c, data)
    with jax.set_mesh(built.mesh):
        state = built.init()
        batch = next(data.train(0, c.batch_size))
        batch['audio']['valid'][3] = False
        batch = select_streams(batch, built.objective.streams())
        batch = feature_extractor.place_on_mesh(batch, built.mesh)
        compute_gradients = jax.jit(train_step.gradients(c, built.model, built.objective))
        rng = Rng.create(c.seed, 0, batch['position'])
        return jax.device_get(
            compute_gradients(
                state.params, state.batch_stats, state.frozen, state.objective, batch, rng
            )
        )


def assert_same_gradients(got, expected):
    """Equal but for rounding in float32; gradients, by the norm of all parameters together."""
    (grads, loss), (expected_grads, expected_loss) = got, expected
    np.testing.assert_allclose(loss.value, expected_loss.value, rtol=1e-5)
    chex.assert_trees_all_close(loss.metrics, expected_loss.metrics, rtol=1e-5)
    chex.assert_trees_all_close(loss.state, expected_loss.state, rtol=1e-5, atol=1e-6)
    assert relative_distance(grads, expected_grads) < 2e-5


@pytest.fixture(scope='module')
def whole_batch():
    return first_gradients()


@pytest.mark.slow
def test_towers_in_microbatches_have_the_gradient_of_the_whole_batch(whole_batch):
    """The loss reads the masks of the mirrored stream, which no microbatch is left with."""
    assert_same_gradients(first_gradients(accumulate=4, accumulation='exact'), whole_batch)


@pytest.mark.slow
def test_the_gradient_is_the_same_on_eight_devices(whole_batch):
    got = first_gradients(mesh__replica=4, mesh__fsdp=2)
    assert_same_gradients(got, whole_batch)


def test_evaluators_see_the_heads_in_evaluation_mode():
    """Linear heads: the pooled features times the kernel, of sentences as of clips."""
    objective = GDT({'modalities': ('video', 'text'), **HYPOTHESES[1]._asdict(), 'hidden': 0})
    rng = np.random.default_rng(0)
    widths = {'video': 3, 'text': 4}
    params = {}
    for modality, width in widths.items():
        kernel = rng.normal(size=(width, objective.config.width))
        params[modality] = {'kernel': jnp.float32(kernel), 'bias': jnp.ones(len(kernel.T))}
    pooled = {'video': rng.normal(size=(2, 3)), 'text': rng.normal(size=(2, 5, 4))}
    encoded = {name: Encoded(jnp.float32(x)) for name, x in pooled.items()}
    encoded['audio'] = Encoded(jnp.zeros((2, 7)))
    space = objective.embed(params, {'norm': {'video': {}, 'text': {}}}, encoded)['gdt']
    assert set(space) == {'video', 'text'}
    for name, x in pooled.items():
        expected = x @ np.float64(params[name]['kernel']) + 1
        np.testing.assert_allclose(space[name], expected, rtol=1e-4, atol=1e-5)


# ---- what the objective asks for, and mistakes


def test_the_views_are_those_that_the_hypothesis_needs():
    views, mirrored = needed_views(HYPOTHESES[6]._asdict())
    assert dict(views) == {
        'video.reversed': {'kind': 'reverse'},
        'video.second': {'kind': 'clip'},
        'video.second_reversed': {'kind': 'reverse', 'of': 'second'},
        'audio.second': {'kind': 'clip'},
    }
    assert dict(mirrored) == {
        'audio.reversed': 'audio',
        'audio.second_reversed': 'audio.second',
    }
    views, mirrored = needed_views(HYPOTHESES[2]._asdict(), redraw_sound=True)
    assert dict(views) == {
        'video.reversed': {'kind': 'reverse'},
        'audio.reversed': {'kind': 'reverse'},
    }
    assert mirrored == ()
    fields = {**HYPOTHESES[7]._asdict(), 'modalities': ('video', 'text')}
    views, mirrored = needed_views(fields)
    assert 'text.second' in dict(views)
    assert not any('text' in name and 'reversed' in name for name, _ in views)


@pytest.mark.parametrize('hypothesis', HYPOTHESES)
def test_missing_views_are_named(hypothesis):
    c = config(hypothesis)
    needed = [name for name, _ in (*c.data.views, *c.augment.mirrored)]
    c.data.views = c.augment.mirrored = ()
    data = data_pipelines.open(c)
    if hypothesis == 1:
        assert not needed
        loop.build(c, data)
        return
    names = ', '.join(map(repr, sorted(needed)))
    with pytest.raises(ConfigError, match=f'expected the streams {names}, the data has'):
        loop.build(c, data)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'shift': 'both'}, "config.objective.shift='both': choose one of unused, invariant"),
        ({'modalities': ('video',)}, 'expected at least two different modalities'),
        ({'method': 'rign'}, "config.objective.method='rign': choose one of auto, gather"),
        (
            {'modalities': ('video', 'text')},
            "config.objective.reversal: expected unused or invariant with 'text', which has no "
            'direction',
        ),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        GDT(fields)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'replicas': 3}, r'replicas: expected a divisor of the \(micro\)batch of 8 clips, got 3'),
        (
            {'modalities': ('video', 'text'), 'reversal': 'unused', 'shift': 'unused'},
            "expected one feature for a clip, got 'text' with 2. Set .*candidates=1",
        ),
    ],
)
def test_what_the_batch_does_not_have_is_named(fields, message):
    c = tiny.config(batch_size=8)
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict({'name': 'gdt', **HYPOTHESES[1]._asdict(), **fields})
    with pytest.raises(ConfigError, match=message):
        loop.build(c, data_pipelines.open(c))


# ---- evaluation


def test_evaluators_see_embeddings_by_the_heads_running_statistics():
    rng = np.random.default_rng(1)
    objective = build(6, width=3, hidden=4)

    def array(*shape):
        return np.float32(rng.normal(size=shape))

    params = {'hidden': array(E, 4), 'kernel': array(4, 3), 'bias': array(3)}
    params['norm'] = {'scale': array(4), 'bias': array(4)}
    stats = {'norm': {'mean': array(4), 'var': array(4) ** 2}}
    x = array(B, E)
    encoded = {
        'audio.shifted': Encoded(jnp.asarray(x)),
        'text': Encoded(jnp.ones((B, 2, E))),
    }
    trees = {'audio': params, 'video': params}
    state = {'norm': {'audio': stats, 'video': stats}}
    found = objective.embed(trees, state, encoded)

    hidden = np.float64(x) @ params['hidden']
    deviation = np.sqrt(stats['norm']['var'] + layers.NORMS['plain']['eps'])
    normed = (hidden - stats['norm']['mean']) / deviation
    normed = normed * params['norm']['scale'] + params['norm']['bias']
    expected = np.maximum(normed, 0) @ params['kernel'] + params['bias']
    # Text is not among the modalities.
    assert found['gdt'].keys() == {'audio.shifted'}
    np.testing.assert_allclose(found['gdt']['audio.shifted'], expected, rtol=1e-5, atol=1e-5)
