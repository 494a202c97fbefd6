"""The speed of one core, measured on the data of a run."""

import numpy as np
import pytest

import data_pipelines
from data_pipelines.loading import reading_speed


class Batches:
    """Batches of 8 clips that take 0.5 s of a clock each, the first two a second longer."""

    def __init__(self):
        self.seconds = 0.0
        self.number = 0
        self.is_closed = False

    def __next__(self):
        self.seconds += 1.5 if self.number < 2 else 0.5
        self.number += 1
        return {'valid': np.ones(8, bool)}

    def close(self):
        self.is_closed = True


def test_the_first_batches_do_not_count(config, monkeypatch):
    batches = Batches()
    monkeypatch.setattr(reading_speed, 'RecordBatches', lambda *_: batches)
    monkeypatch.setattr(reading_speed.time, 'process_time', lambda: batches.seconds)
    data = data_pipelines.open(config)
    assert data.clips_per_core_second(64) == pytest.approx(8 / 0.5)
    assert batches.is_closed
    data.close()


def test_measuring_leaves_no_trace(config):
    config.data.workers = 2
    config.data.train.clocks.share = 1.0
    data = data_pipelines.open(config)
    assert data.clips_per_core_second(20) > 0
    assert data.problems()['read'] == 0
    data.close()


@pytest.mark.parametrize('batch_size, hosts', [(2048, 256), (64, 8), (20, 2), (17, 1), (3, 1)])
def test_parts_of_at_least_eight_rows(batch_size, hosts):
    assert reading_speed._most_hosts(batch_size) == hosts
