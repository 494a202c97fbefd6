"""AVTS: the curriculum, who is whose negative, the loss of a batch, and runs through the loop."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from tests.test_train import log_lines, run, stop_at
from vatt_jax.config import ConfigError
from vatt_jax.objectives.base import Spec
from vatt_jax.objectives.partners import draw_partners
from vatt_jax.objectives.synchronisation import (
    EASY,
    HARD,
    SUPER_HARD,
    Synchronisation,
    draw_kinds,
)
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

TWO_STAGES = ((0, (1.0, 0.0, 0.0)), (100, (0.75, 0.25, 0.0)))


# ---- the curriculum


@pytest.mark.parametrize(
    'shares', [(1, 0, 0), (0, 1, 0), (0.75, 0.25, 0), (0.5, 0.3, 0.2), (0, 0, 1), (0.9, 0, 0.1)]
)
def test_kinds_come_in_the_shares_of_the_stage(shares):
    curriculum = ((0, (0.0, 0.0, 1.0)), (7, shares), (9, (0.0, 0.0, 1.0)))
    n = 40_000
    for step in (7, 8):
        kinds = draw_kinds(curriculum, step, Rng.create(0, step, np.arange(n)))
        counts = np.bincount(kinds, minlength=3)
        assert len(counts) == 3
        for count, share in zip(counts, shares, strict=True):
            # Five standard deviations of a binomial; a kind without a share never comes.
            assert abs(count - n * share) <= 5 * np.sqrt(n * share * (1 - share))
    for step in (0, 6, 9, 10**6):
        np.testing.assert_array_equal(draw_kinds(curriculum, step, Rng.create(0, 0, [1, 2])), 2)


def test_kinds_depend_on_seed_step_and_position_alone():
    curriculum = ((0, (0.5, 0.3, 0.2)),)

    def kinds(positions, seed=0, step=5):
        return np.array(draw_kinds(curriculum, step, Rng.create(seed, step, positions)))

    whole = kinds(np.arange(64))
    np.testing.assert_array_equal(kinds(np.arange(64)[::-1]), whole[::-1])
    np.testing.assert_array_equal(kinds(np.arange(32, 48)), whole[32:48])
    assert (kinds(np.arange(64), seed=1) != whole).any()
    assert (kinds(np.arange(64), step=6) != whole).any()


# ---- easy negatives


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    heard=st.lists(st.booleans(), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_an_easy_negative_is_of_another_record_wherever_there_is_one(records, heard, seed):
    records, heard = np.array(records), np.array(heard)
    rng = Rng.create(seed, 0, np.arange(8))
    found = draw_partners(jnp.array(records), jnp.array(heard), rng)
    partner, has_partner = jax.device_get(found)
    for i in range(8):
        others = np.flatnonzero((records != records[i]) & heard)
        assert has_partner[i] == (len(others) > 0)
        if has_partner[i]:
            assert partner[i] in others


@pytest.mark.parametrize('num_rows', [2, 3, 32])
def test_of_different_records_each_sound_is_taken_once(num_rows):
    records, heard = jnp.arange(num_rows), jnp.ones(num_rows, bool)
    partners = set()
    for seed in range(40):
        rng = Rng.create(seed, 0, np.arange(num_rows))
        partner, has_partner = draw_partners(records, heard, rng)
        assert has_partner.all()
        np.testing.assert_array_equal(np.sort(partner), np.arange(num_rows))
        partners.add(tuple(np.array(partner).tolist()))
    # Drawn anew, not one fixed shift: of three clips there are two circles.
    assert len(partners) == {2: 1, 3: 2, 32: 40}[num_rows]


def test_choices_are_the_same_on_eight_devices():
    batch = {'record': np.arange(16) % 11, 'position': np.arange(100, 116)}

    @jax.jit
    def choices(batch):
        rng = Rng.create(3, 120, batch['position'])
        heard = batch['record'] != 5
        partners = draw_partners(batch['record'], heard, rng.at('partners'))
        return *partners, draw_kinds(TWO_STAGES, 120, rng.at('kinds'))

    expected = jax.device_get(choices(batch))
    mesh = sharding.make_mesh({'replica': 4, 'fsdp': 2})
    rows = NamedSharding(mesh, PartitionSpec(('replica', 'fsdp')))
    chex.assert_trees_all_equal(jax.device_get(choices(jax.device_put(batch, rows))), expected)
    assert set(expected[2]) == {EASY, HARD}


# ---- the loss of a batch


class TestLossOfGivenEmbeddings:
    """The objective on six clips, whose embeddings are given instead of a model's."""

    # The second record twice; clip 3 is silent, 4 has no picture, 5 no other moment.
    records = [0, 1, 1, 2, 3, 4]
    valid = {
        'video': [1, 1, 1, 1, 0, 1],
        'audio': [1, 1, 1, 0, 1, 1],
        'audio.shifted': [1, 1, 1, 0, 1, 0],
        'audio.overlapping': [1, 1, 1, 0, 1, 1],
    }

    def embeddings(self, scale=0.3):
        """Random embeddings, within reach of the margin; NaN where a clip lacks the stream."""
        rng = np.random.default_rng(0)
        found = {}
        for stream, valid in self.valid.items():
            x = scale * rng.normal(size=(6, 4))
            found[stream] = np.float32(np.where(np.array(valid)[:, None], x, np.nan))
        return found

    def batch(self):
        fields = {'record': jnp.array(self.records)}
        for stream, valid in self.valid.items():
            fields[stream] = {'valid': jnp.array(valid, bool), 'data': None}
        return fields

    def loss(self, objective, embeddings=None, step=0):
        embeddings = jax.tree.map(jnp.asarray, embeddings or self.embeddings())
        model = types.SimpleNamespace(apply=lambda *_, **__: ({'va': embeddings}, {}))
        streams = dict.fromkeys(objective.streams())
        rng = Rng.create(0, step, jnp.arange(6))
        state = {'step': jnp.int32(step)}
        return objective.compute_loss(model, {}, {}, state, streams, self.batch(), rng)

    def definition(self, objective, step=0):
        """(loss, pairs) in float64, pair by pair, by the choices that are drawn."""
        c = objective.config
        rng = Rng.create(0, step, jnp.arange(6))
        kinds = np.array(draw_kinds(c.curriculum, step, rng.at('kinds')))
        batch = self.batch()
        heard = batch['audio']['valid']
        found = draw_partners(batch['record'], heard, rng.at('partners'))
        partner, _ = jax.device_get(found)
        x = {stream: np.float64(value) for stream, value in self.embeddings().items()}
        if c.normalise:
            x = {s: v / np.linalg.norm(v, axis=1, keepdims=True) for s, v in x.items()}
        streams = {HARD: 'audio.shifted', SUPER_HARD: 'audio.overlapping'}
        losses = []
        for i in range(6):
            if not self.valid['video'][i]:
                continue
            if self.valid['audio'][i]:
                losses.append(np.sum((x['video'][i] - x['audio'][i]) ** 2))
            stream = streams.get(int(kinds[i]))
            if stream is None or not self.valid[stream][i]:
                other = x['audio'][partner[i]]
            else:
                other = x[stream][i]
            d = np.linalg.norm(x['video'][i] - other)
            losses.append(max(0, c.margin - d) ** 2)
        return np.mean(losses), len(losses)

    @pytest.mark.parametrize('normalise', [False, True])
    @pytest.mark.parametrize(
        'shares', [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.3, 0.3)]
    )
    def test_it_is_the_mean_over_the_pairs_that_there_are(self, shares, normalise):
        objective = Synchronisation({'curriculum': ((0, shares),), 'normalise': normalise})
        got = self.loss(objective)
        expected, num_pairs = self.definition(objective)
        # Five clips with a picture, one of them silent; each has a negative all the same.
        assert num_pairs == 9
        chex.assert_shape(got.value, ())
        chex.assert_type(got.value, jnp.float32)
        np.testing.assert_allclose(got.value, expected, rtol=1e-5)
        chex.assert_tree_all_finite(got.metrics)

    def test_what_is_not_there_has_zero_gradient_and_the_rest_a_finite_one(self):
        objective = Synchronisation({'curriculum': ((0, (0.4, 0.3, 0.3)),)})

        def loss(embeddings):
            return self.loss(objective, embeddings).value

        gradients = jax.grad(loss)(self.embeddings())
        chex.assert_tree_all_finite(gradients)
        for stream, gradient in gradients.items():
            missing = ~np.array(self.valid[stream], bool)
            np.testing.assert_array_equal(gradient[missing], 0)
        # Clip 4 has no picture: its sounds of other moments are compared with nothing.
        np.testing.assert_array_equal(gradients['audio.shifted'][4], 0)

    def test_a_model_that_is_right_has_no_loss_and_full_accuracy(self):
        embeddings = {stream: np.zeros((6, 4), np.float32) for stream in self.valid}
        embeddings['audio.shifted'] += 1.0  # at distance 2
        objective = Synchronisation({'curriculum': ((0, (0.0, 1.0, 0.0)),)})
        got = self.loss(objective, embeddings)
        # All but the negative of clip 5, which has no other moment, and of the silent clip 3.
        np.testing.assert_allclose(got.value, 2 * 0.99**2 / 9, rtol=1e-6)
        np.testing.assert_allclose(got.metrics['accuracy'], 7 / 9, rtol=1e-6)
        np.testing.assert_allclose(got.metrics['share/audio.shifted'], 3 / 5, rtol=1e-6)
        np.testing.assert_allclose(got.metrics['distance/match'], 0)
        np.testing.assert_allclose(got.metrics['distance/mismatch'], 3 * 2 / 5, rtol=1e-6)

    def test_a_model_that_tells_nothing_does_best_at_a_quarter_of_the_squared_margin(self):
        """What docs/avts.md compares with: all pairs at one distance, half the margin."""
        embeddings = {stream: np.zeros((6, 4), np.float32) for stream in self.valid}
        embeddings['video'][:, 0] = 0.99 / 2
        assert self.valid['audio'][3] == 0
        objective = Synchronisation({})
        np.testing.assert_allclose(self.loss(objective, embeddings).value, 0.99**2 / 4, rtol=1e-6)


def test_streams_that_no_stage_draws_are_not_encoded():
    assert Synchronisation({}).streams() == ('video', 'audio')
    hard = Synchronisation({'curriculum': TWO_STAGES})
    assert hard.streams() == ('video', 'audio', 'audio.shifted')
    all_kinds = Synchronisation({'curriculum': ((0, (0.5, 0.25, 0.25)),)})
    assert all_kinds.streams() == ('video', 'audio', 'audio.shifted', 'audio.overlapping')


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'margin': 0.0}, 'config.objective.margin: expected a positive number, got 0'),
        ({'curriculum': ()}, 'config.objective.curriculum: expected (first step, (easy, hard'),
        ({'curriculum': ((0, (0.5, 0.4, 0.0)),)}, 'with shares that sum to 1'),
        ({'curriculum': ((0, (1.5, -0.5, 0.0)),)}, 'with shares that sum to 1'),
        ({'curriculum': ((0, (1.0, 0.0)),)}, 'with shares that sum to 1'),
        ({'curriculum': ((0.5, (1.0, 0.0, 0.0)),)}, 'with shares that sum to 1'),
        ({'curriculum': ((5, (1.0, 0.0, 0.0)),)}, 'expected stages from step 0 on, in order'),
        (
            {'curriculum': ((0, (1.0, 0.0, 0.0)), (9, (1.0, 0.0, 0.0)), (9, (0.0, 1.0, 0.0)))},
            'expected stages from step 0 on, in order, got [0, 9, 9]',
        ),
    ],
)
def test_a_mistake_in_the_config_is_named(fields, message):
    with pytest.raises(ConfigError) as error:
        Synchronisation(fields)
    assert message in str(error.value)


def test_a_space_that_lacks_a_stream_is_named():
    spaces = {'va': {'video': jax.ShapeDtypeStruct((4, 8), jnp.float32)}}
    spec = Spec(None, types.SimpleNamespace(spaces=spaces), {}, 64, {})
    message = "config.objective.space: expected a space with 'audio', got 'va' with video"
    with pytest.raises(ConfigError, match=message):
        Synchronisation({}).init(jax.random.key(0), spec)


# ---- through the loop


def config_of(**overrides):
    """Tiny towers; the curriculum changes at step 3 of 6."""
    config = tiny.config(**overrides)
    del config.model.towers['text']
    config.model.head = type(config)({'name': 'linear', 'va': 16})
    far = {'kind': 'shift', 'seconds': 'random', 'apart': 0.5}
    config.data.views = (('audio.shifted', far),)
    curriculum = ((0, (1.0, 0.0, 0.0)), (3, (0.25, 0.75, 0.0)))
    config.objective = type(config)({'name': 'synchronisation', 'curriculum': curriculum})
    return config


def logged(folder):
    """The log's lines of the steps."""
    return [line for line in log_lines(folder) if 'loss' in line]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder, done.json) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp('sync')
    return folder, run(folder, config_of())


def test_a_run_goes_through_the_curriculum(whole):
    steps = logged(whole[0])
    shares = [step['share/audio.shifted'] for step in steps]
    assert shares[:3] == [0, 0, 0]
    assert all(share > 0.25 for share in shares[3:])


def test_stopped_in_the_middle_of_the_curriculum_it_continues_exactly(whole, tmp_path):
    # Behind the change at step 3, so that the stage is read from what was saved.
    with stop_at(4):
        run(tmp_path / 'cut', config_of())
    done = run(tmp_path / 'cut', config_of())
    assert done['digests'] == whole[1]['digests']


@pytest.mark.slow
def test_one_device_and_eight_learn_the_same(whole, tmp_path):
    config = config_of()
    config.mesh.update({'replica': 2, 'fsdp': 4})
    run(tmp_path, config)
    for one, eight in zip(logged(whole[0]), logged(tmp_path), strict=True):
        for name in ('loss', 'distance/mismatch'):
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-3)
        assert eight['share/audio.shifted'] == one['share/audio.shifted']


class LinearModel:
    """Stands for a model: one matrix for each modality, from features to the space `va`."""

    def apply(self, variables, encoded, **_):
        embeddings = {}
        for stream, features in encoded.items():
            matrix = variables['params'][stream.split('.')[0]]
            embeddings[stream] = features.pooled @ matrix
        return {'va': embeddings}, {}


@pytest.mark.parametrize('shares', [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)])
def test_a_linear_model_learns_which_sound_belongs_to_a_video(shares):
    """Features of both modalities are mixtures of four hidden numbers of the moment."""
    rng = np.random.default_rng(0)
    mixing = {stream: rng.normal(size=(4, 12)) for stream in ('video', 'audio')}
    moments = rng.normal(size=(64, 4))
    pooled = {
        'video': jnp.float32(moments @ mixing['video']),
        'audio': jnp.float32(moments @ mixing['audio']),
        # Another moment of the same record.
        'audio.shifted': jnp.float32(rng.normal(size=(64, 4)) @ mixing['audio']),
    }
    batch = {'record': jnp.arange(64)}
    for stream in pooled:
        batch[stream] = {'valid': jnp.ones(64, bool), 'data': None}
    objective = Synchronisation({'curriculum': ((0, shares),)})
    pooled = {stream: pooled[stream] for stream in objective.streams()}
    params = {m: jnp.float32(0.1 * rng.normal(size=(12, 8))) for m in ('video', 'audio')}

    @jax.jit
    def step(params, number):
        def loss(params):
            step_rng = Rng.create(0, number, jnp.arange(64))
            state = {'step': number}
            variables = {'params': params, 'batch_stats': {}}
            found = objective.compute_loss(
                LinearModel(), variables, {}, state, pooled, batch, step_rng
            )
            return found.value, found

        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients), found

    for number in range(400):
        params, found = step(params, number)
    # Less than half of what a model that tells nothing can reach.
    assert found.value < 0.5 * 0.99**2 / 4
    assert found.metrics['accuracy'] > 0.9
