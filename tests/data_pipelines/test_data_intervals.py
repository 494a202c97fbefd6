"""Two clips whose distance in time has a density of its own (CVRL)."""

import numpy as np
import pytest
import scipy.integrate
from batches import assert_equal, concatenate, stack, take
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipelines
from configs.default import get_config
from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows, order
from data_pipelines.loading.views import starts, streams

LINEAR = {'kind': 'clip', 'interval': 'linear'}
STEP = 0.1  # seconds between stored frames
WINDOW = 1.0  # seconds


def grid(num_points):
    """Three coordinates [num_points² · 2, 3] that fill the unit cube evenly."""
    middle = (np.arange(num_points) + 0.5) / num_points
    axes = np.meshgrid(middle, middle, [0.25, 0.75], indexing='ij')
    return np.stack([axis.ravel() for axis in axes], axis=1)


def pair_on_grid(power, num_starts, num_points=300):
    """Numbers of the first and of the second start, over a grid of uniform numbers."""
    u = grid(num_points)
    duration = np.full(len(u), WINDOW + (num_starts - 1) * STEP)
    pair = frame_windows.pair(duration, WINDOW, STEP, u, power)
    return [np.rint(start / STEP).astype(int) for start in pair]


@settings(max_examples=40, deadline=None)
@given(power=st.floats(0, 12), u=st.floats(0, 0.999))
def test_the_share_below_a_distance_is_the_integral_of_the_density(power, u):
    distance = float(frame_windows.interval(np.array([u]), power)[0])
    assert 0 <= distance < 1
    # Relative to the density at 0, which makes its integral over all distances 1 / (power + 1).
    below, _ = scipy.integrate.quad(lambda t: (1 - t) ** power, 0, distance)
    everything, _ = scipy.integrate.quad(lambda t: (1 - t) ** power, 0, 1)
    assert below / everything == pytest.approx(u, abs=1e-6)


def test_linear_is_two_independent_windows():
    """All pairs of starts are equally frequent: a triangle of distances is what two draws have."""
    num_starts = 5
    first, second = pair_on_grid(1.0, num_starts)
    count = np.zeros((num_starts, num_starts))
    np.add.at(count, (first, second), 1)
    np.testing.assert_allclose(count / count.sum(), 1 / num_starts**2, atol=5e-4)


@pytest.mark.parametrize('power', [0.0, 3.0])
def test_other_densities_of_the_distance(power):
    """The mean distance is that of its density, 1 / (power + 2) of the range."""
    num_starts = 2000
    first, second = pair_on_grid(power, num_starts)
    distance = (first - second) / num_starts
    assert np.abs(distance).mean() == pytest.approx(1 / (power + 2), abs=2e-3)
    # Neither window is the earlier one more often.
    assert distance.mean() == pytest.approx(0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    duration=st.floats(0, 30),
    power=st.floats(0, 50),
    u=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
)
def test_both_windows_are_inside_their_record_and_on_stored_frames(duration, power, u):
    pair = frame_windows.pair(np.array([duration]), WINDOW, STEP, np.array([u]), power)
    latest = max(0.0, duration - WINDOW)
    for start in pair:
        assert -1e-9 <= start[0] <= latest + 1e-6
        assert start[0] / STEP == pytest.approx(np.rint(start[0] / STEP), abs=1e-6)


def config_with(views):
    config = get_config()
    config.data.source = 'synthetic'
    config.model.inputs.video.update(frames=4, size=8, fps=5.0)
    config.model.inputs.audio.update(samples=320, rate=400)
    config.model.inputs.text.update(candidates=2, words=4)
    config.data.views = tuple(views.items())
    return config


def test_streams_of_the_interval_share_their_window():
    data = data_pipelines.open(config_with({'video.second': LINEAR, 'audio.second': LINEAR}))
    batch = stack(data.train(0, 32), 4)
    second = batch['video.second']['start']
    np.testing.assert_array_equal(second, batch['audio.second']['start'])
    main = batch['video']['start']
    np.testing.assert_array_equal(main, batch['audio']['start'])
    assert (main < second).any()
    assert (main > second).any()


def test_a_steep_density_keeps_the_windows_together():
    steep = {'kind': 'clip', 'interval': 30.0}
    distances = []
    for view in (LINEAR, steep):
        batch = stack(data_pipelines.open(config_with({'video.second': view})).train(0, 32), 4)
        distance = np.abs(batch['video']['start'] - batch['video.second']['start'])
        distances.append(distance.mean())
    assert distances[1] < distances[0] / 3


def test_one_process_draws_what_several_draw():
    data = data_pipelines.open(config_with({'video.second': LINEAR}))
    whole = next(data.train(8, 12))
    of_hosts = [next(data.train(8, 12, process=(i, 3))) for i in range(3)]
    assert_equal(concatenate(of_hosts), whole)
    resumed = next(data.train(14, 6))
    assert_equal(resumed, take(whole, slice(6, None)))


def test_an_evaluation_keeps_its_main_window():
    """Without and with the view: the middle of the segment."""
    plain = stack(data_pipelines.open(config_with({})).one_pass('test', 16), 2)
    data = data_pipelines.open(config_with({'video.second': LINEAR}))
    batch = stack(data.one_pass('test', 16), 2)
    np.testing.assert_array_equal(batch['video']['start'], plain['video']['start'])
    assert len(np.unique(batch['video.second']['start'])) > 2


def test_the_draw_is_that_of_the_pair():
    """Sites of the order: any source that draws by them gets the same windows."""
    views = streams({'video': {}}, {'video.second': LINEAR})
    position = np.arange(50)

    def draw(site):
        return order.uniform(0, position, site, 1)[:, 0]

    duration = np.linspace(1.5, 9.0, len(position))
    got = starts(views, WINDOW, duration, draw, None, STEP)
    sites = ('interval.second', 'window', 'order.second')
    u = np.stack([draw(site) for site in sites], axis=1)
    first, second = frame_windows.pair(duration, WINDOW, STEP, u, 1.0)
    np.testing.assert_allclose(got[''], first, atol=1e-9)
    np.testing.assert_allclose(got['second'], second, atol=1e-9)


# ---- one window twice (CoCLR)

HALF = {'kind': 'clip', 'same': 0.5}


@pytest.mark.parametrize('other', [{'kind': 'clip'}, LINEAR], ids=['clip', 'interval'])
def test_a_share_of_the_clips_has_one_window_twice(other):
    """By a draw of its own: the other clips have the windows that they had without it."""
    position = np.arange(4000)
    duration = np.full(len(position), 9.0)

    def draw(site):
        return order.uniform(0, position, site, 1)[:, 0]

    def starts_with(spec):
        views = streams({'video': {}}, {'video.second': spec})
        return starts(views, WINDOW, duration, draw, None, STEP)

    without, found = starts_with(other), starts_with({**other, 'same': 0.3})
    is_same = draw('same.second') < 0.3
    assert is_same.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(found[''], without[''])
    expected = np.where(is_same, without[''], without['second'])
    np.testing.assert_array_equal(found['second'], expected)
    # Whether a clip is among them has nothing to do with where its window lies.
    assert abs(np.corrcoef(is_same, found[''])[0, 1]) < 0.06
    always = starts_with({**other, 'same': 1.0})
    np.testing.assert_array_equal(always['second'], always[''])


def test_one_window_twice_has_two_crops_and_holds_for_all_streams():
    """The same on three hosts as on one."""
    data = data_pipelines.open(config_with({'video.second': HALF, 'audio.second': HALF}))
    whole = next(data.train(8, 12))
    of_hosts = [next(data.train(8, 12, process=(i, 3))) for i in range(3)]
    assert_equal(concatenate(of_hosts), whole)

    batch = stack(data.train(0, 32), 2)
    is_same = batch['video']['start'] == batch['video.second']['start']
    assert 0.3 < is_same.mean() < 0.7
    np.testing.assert_array_equal(batch['video.second']['start'], batch['audio.second']['start'])
    np.testing.assert_array_equal(
        batch['video']['data'][is_same], batch['video.second']['data'][is_same]
    )
    assert (batch['video']['box'] != batch['video.second']['box']).any(-1).all()
    different = batch['video']['data'][~is_same] != batch['video.second']['data'][~is_same]
    assert different.any((1, 2, 3, 4)).mean() > 0.9


@pytest.mark.parametrize(
    'views, message',
    [
        (
            {'video.a': {'kind': 'clip', 'interval': 'cubic'}},
            "interval is 'cubic'; give uniform or",
        ),
        ({'video.a': {'kind': 'clip', 'interval': -1.0}}, 'a number of at least 0'),
        ({'video.a': {'kind': 'clip', 'interval': float('nan')}}, 'a number of at least 0'),
        (
            {'video.a': LINEAR, 'video.b': LINEAR},
            'an interval for one suffix alone, got it for a, b',
        ),
        (
            {'video.a': {'kind': 'reverse', 'interval': 'linear'}},
            r'clip: kind, interval \(optional\), same \(optional\)',
        ),
        ({'video.a': {'kind': 'clip', 'same': 1.5}}, r"'video.a'.same is 1.5; give the share of"),
        ({'video.a': {'kind': 'clip', 'same': 'half'}}, "same is 'half'; give the share of"),
        ({'video.a': {'kind': 'clip', 'same': float('nan')}}, 'same is nan; give the share of'),
    ],
)
def test_mistakes_are_named(views, message):
    with pytest.raises(DataError, match=message):
        streams({'video': {}}, views)
