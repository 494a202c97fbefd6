"""What share of the chips' appetite hosts read: the line before a run, and with a plan."""

import pytest

import data_pipelines
from tests import tiny
from vatt_jax.planning import preflight, reading
from vatt_jax.planning.reading import Reader
from vatt_jax.training import loop

# 62.5 clips/s a core: 125 by the two that are busy, 500 by all.
READER = Reader(clips_per_core_second=62.5, lanes=2, cores=8)


def test_without_a_known_chip_the_speed_alone():
    assert reading.of_run(READER, None, hosts=1) == (
        'one core of this host reads 62.5 clips/s, the 2 of 8 that config.data keeps busy '
        '125 clips/s'
    )


@pytest.mark.parametrize(
    'appetite, hosts, verdict',
    [
        # 2 hosts read 250; 500 each take 8 cores, which each has.
        (
            1000.0,
            2,
            '25 % of that is read; 8 such cores a host would feed them '
            '(config.data.threads, config.data.workers)',
        ),
        # 4000 are 8 hosts of 500; on one host, 64 cores.
        (4000.0, 1, '3.1 % of that is read; 64 such cores a host would feed them, or 8 hosts of 8'),
        (50.0, 1, '2.5 times that is read'),
        (125.0, 1, '1 times that is read'),
    ],
)
def test_the_share_that_is_read_and_what_would_do(appetite, hosts, verdict):
    line = reading.of_run(READER, appetite, hosts)
    assert f' take {appetite:.0f} clips/s at 50 % of their peak: ' in line
    assert line.endswith(verdict)


def test_beside_a_plan():
    plan = {'hosts': 2, 'roofline': {'clips_per_s': 1000.0}}
    line = reading.of_plan(READER, plan)
    assert 'one core of this machine reads 62.5 clips/s' in line
    assert 'the chips of 2 hosts take 1000 clips/s at the bound: 25 % of that is read' in line
    # Where nothing was compiled there is no bound.
    assert reading.of_plan(READER, {'hosts': 2, 'roofline': {}}) is None


class Decoded:
    """A data object that decodes."""

    def clips_per_core_second(self, batch_size):
        assert batch_size == 16
        return 100.0


@pytest.mark.parametrize(
    'threads, workers, lanes', [(1, 0, 1), (2, 0, 2), (2, 2, 4), (1, 3, 3), (8, 8, 4)]
)
def test_lanes_are_those_of_the_config_as_far_as_there_are_cores(
    threads, workers, lanes, monkeypatch
):
    monkeypatch.setattr(reading, 'usable_cores', lambda: 4)
    config = tiny.config(batch_size=16, data__threads=threads, data__workers=workers)
    assert reading.measure(config, Decoded()) == Reader(100.0, lanes, 4)


def test_data_that_are_made_have_no_line():
    config = tiny.config()
    assert reading.measure(config, data_pipelines.open(config)) is None


def test_preflight_compares_with_half_the_peak_of_the_chips(monkeypatch):
    config = tiny.config(batch_size=16)
    built = loop.build(config, data_pipelines.open(config))
    # Chips that take 800 clips/s at half their peak.
    peak = 2 * 800 * preflight._flops_per_clip(config, built)
    monkeypatch.setattr(preflight.chips, 'peak_of', lambda devices: peak)
    monkeypatch.setattr(reading, 'usable_cores', lambda: 2)
    line = preflight.feeding(config, built, Decoded())
    assert (
        'the chips of 1 host take 800 clips/s at 50 % of their peak: 25 % of that is read' in line
    )
    assert preflight.feeding(config, built, data_pipelines.open(config)) == ''
