"""Prepared folders on an object store: the same batches as from the folder on this machine."""

import dataclasses
import itertools
import math

import pytest

import data_pipelines
from data_pipelines.errors import DataError
from data_pipelines.loading.requests_in_flight import FEWEST, MOST, LineEstimate, RequestsInFlight
from data_pipelines.storage import record_files
from data_pipelines.storage.records import Prepared, Split
from tests.data_pipelines import batches
from vatt_jax.object_store import Store, StoreError, StoreSettings
from vatt_jax.object_store.store import move_side_by_side

QUICK = {'timeout': 20.0, 'tries': 4, 'backoff': 0.01}


def upload(folder, url):
    """Copies a folder to a store."""
    store = Store(url, StoreSettings(**QUICK))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()]
    move_side_by_side(lambda name: store.upload(folder / name, name), names)
    return store


@pytest.fixture
def on_store(prepared, object_store):
    """(URL of the prepared clocks on a store, faults)."""
    url, faults = object_store
    upload(prepared[0], f'{url}/clocks')
    faults.requests.clear()
    return f'{url}/clocks', faults


@pytest.fixture
def remote_config(config, on_store):
    remote = config.copy_and_resolve_references()
    remote.data.train.clocks.path = on_store[0]
    remote.object_store.update(QUICK)
    return remote


def first_batches(config, count=3):
    data = data_pipelines.open(config)
    try:
        return list(itertools.islice(data.train(0, 4), count)), data.problems()
    finally:
        data.close()


def test_batches_are_those_of_the_local_folder(config, remote_config):
    expected, _ = first_batches(config)
    found, problems = first_batches(remote_config)
    for got, wanted in zip(found, expected, strict=True):
        batches.assert_equal(got, wanted)
    assert problems['corrupt'] == 0


def test_tables_are_fetched_once_and_records_by_ranges(remote_config, on_store):
    _, faults = on_store
    first_batches(remote_config)
    gets = [request for request in faults.requests if request.startswith('GET')]
    tables = [request for request in gets if '/index-train/' in request]
    assert tables and len(tables) == len(set(tables))
    assert not any('-test' in request for request in gets)  # no split that nothing reads
    assert any('array_record' in request for request in gets)
    faults.requests.clear()
    first_batches(remote_config)
    gets = [request for request in faults.requests if request.startswith('GET')]
    assert gets and all('array_record' in request or 'list-type' in request for request in gets)


@pytest.mark.parametrize('fault', ['unavailable', 'cut', 'hang'])
def test_a_failure_that_passes_is_no_damage(config, remote_config, on_store, fault):
    _, faults = on_store
    remote_config.object_store.timeout = 2.0
    remote_config.data.max_corrupt = 0.0
    first_batches(remote_config, 1)
    expected, _ = first_batches(config, 2)
    setattr(faults, fault, 2)
    found, problems = first_batches(remote_config, 2)
    assert getattr(faults, fault) == 0
    for got, wanted in zip(found, expected, strict=True):
        batches.assert_equal(got, wanted)
    assert problems['corrupt'] == 0


def test_a_store_that_stays_away_ends_reading_in_one_sentence(remote_config, on_store):
    _, faults = on_store
    data = data_pipelines.open(remote_config)
    iterator = data.train(0, 4)
    next(iterator)
    faults.unavailable = 10_000
    with pytest.raises(
        StoreError, match='reading s3://.*array_record.* failed, the last of 4 tries'
    ):
        for _ in range(20):
            next(iterator)
    assert data.problems()['corrupt'] == 0
    faults.unavailable = 0
    data.close()


def test_a_damaged_record_is_one_there_too(remote_config, on_store, prepared):
    url, _ = on_store
    store = Store(url)
    (name,) = [name for name in store.files() if '-test.array_record' in name]
    content = bytearray(store.read(name))
    table = Split(Prepared(prepared[0]), 'test')._pieces._tables
    _, offset, length = table.place(0)
    middle = offset + length // 2
    content[middle : middle + 2000] = bytes(2000)
    store.write(name, bytes(content))
    records, reasons = Split(Prepared(url), 'test').read([0, 1])
    assert reasons == ['its bytes are not those that were written (crc32)', '']
    # Of another size: not the file that the tables were made for.
    store.write(name, bytes(content[:-1]))
    with pytest.raises(DataError, match=f'{url}/{name} is not the file of'):
        Split(Prepared(url), 'test')


def test_folders_that_are_not_there_or_not_finished(on_store):
    url, _ = on_store
    with pytest.raises(DataError, match=f'the prepared dataset {url}/nothing does not exist'):
        Prepared(f'{url}/nothing')
    Store(url).delete(['prepare.json'])
    with pytest.raises(DataError, match=f'{url} is not a folder made by'):
        Prepared(url)


def test_a_folder_of_version_1(tmp_path, object_store):
    """Its tables are files, not folders."""
    url, _ = object_store
    old = tmp_path / 'old'
    for name in ('prepare.json', 'index.json', 'index-train.npz', 'x-train.array_record-0-of-1'):
        old.mkdir(exist_ok=True)
        (old / name).write_text('{}')
    upload(old, url)
    from data_pipelines.storage.remote_folder import RemoteFolder

    remote = RemoteFolder(url, StoreSettings(**QUICK))
    remote.fetch_tables('train')
    assert (remote.folder / 'index-train.npz').is_file()
    assert remote.files('train').paths == [f'{url}/x-train.array_record-0-of-1']
    assert not (remote.folder / 'x-train.array_record-0-of-1').exists()


def test_near_parts_are_read_together():
    parts = [(100, 10), (0, 10), (15, 5), (205, 1), (2, 3)]
    alone = [((0, 10), [1, 4]), ((15, 5), [2]), ((100, 10), [0]), ((205, 1), [3])]
    assert list(record_files.runs(parts, apart=0)) == alone
    assert list(record_files.runs(parts, apart=5)) == [((0, 20), [1, 4, 2]), *alone[2:]]
    assert list(record_files.runs(parts, apart=95)) == [((0, 206), [1, 4, 2, 0, 3])]
    assert list(record_files.runs([], apart=5)) == []


# ---- How many requests are under way.


@dataclasses.dataclass
class Line:
    """A line with a latency and a bandwidth that its requests share, in simulated time."""

    latency: float  # seconds
    bandwidth: float  # bytes/s
    now: float = 0.0

    def clock(self):
        return self.now

    def read(self, estimate, num_bytes):
        """As many reads at once as the estimate says; returns their number."""
        number = estimate.number()
        # Each gets its share of the line, or its own best rate where that is less.
        seconds = max(self.latency, number * num_bytes / self.bandwidth)
        self.now += seconds
        for _ in range(number):
            estimate.add(num_bytes, seconds)
        return number


def test_requests_grow_to_the_product_of_bandwidth_and_latency():
    line = Line(latency=0.1, bandwidth=100e6)
    estimate = LineEstimate(StoreSettings(), line.clock)
    numbers = [line.read(estimate, 250_000) for _ in range(60)]
    assert numbers[0] == FEWEST
    # 100 MB/s for 0.1 s are 40 reads of 250 kB. Twice as many fill the line for certain.
    assert 40 <= numbers[-1] <= 81
    # The line is full, and no more reads are added.
    assert len(set(numbers[-10:])) == 1


def test_a_known_bandwidth_and_the_memory_bound_the_number():
    line = Line(latency=0.05, bandwidth=1e9)
    estimate = LineEstimate(StoreSettings(bandwidth=200.0), line.clock)
    line.read(estimate, 500_000)
    assert estimate.number() == math.ceil(200e6 * 0.05 / 500_000)  # 20
    small = LineEstimate(StoreSettings(bandwidth=200.0, memory=5), line.clock)
    line.read(small, 500_000)
    assert small.number() == 10
    fast = LineEstimate(StoreSettings(bandwidth=10_000.0), line.clock)
    line.read(fast, 1000)
    assert fast.number() == MOST
    line.latency = 0.0001
    near = LineEstimate(StoreSettings(bandwidth=1.0), line.clock)
    line.read(near, 1_000_000)
    assert near.number() == FEWEST


def test_results_are_in_order_and_errors_come_out():
    pool = RequestsInFlight(StoreSettings())

    def read(item):
        if item == 70:
            raise StoreError('away')
        return item * item

    assert pool.map(read, range(50), lambda result: 1) == [x * x for x in range(50)]
    with pytest.raises(StoreError, match='away'):
        pool.map(read, range(100), lambda result: 1)
    assert pool.map(read, [3], lambda result: 1) == [9]


def test_rows_are_read_side_by_side(remote_config, on_store):
    _, faults = on_store
    data = data_pipelines.open(remote_config)
    faults.latency = 0.1
    iterator = data.train(0, 8)
    next(iterator)
    assert 4 <= faults.most_at_once
    data.close()


# ---- Preparing.


def test_prepare_writes_to_a_store(media_folder, prepared, object_store, tmp_path, capsys):
    from data_pipelines.prepare import main

    url, faults = object_store
    arguments = [
        f'--videos={media_folder / "videos"}',
        f'--captions={media_folder / "captions.csv"}',
        f'--annotations={media_folder / "annotations.json"}',
        f'--out={url}/made',
        '--fps=10',
        '--size=64',
        '--rate=8000',
        '--name=clocks',
    ]
    assert main(arguments) == 0
    assert f"'path': '{url}/made'" in capsys.readouterr().out
    puts = [request for request in faults.requests if request.startswith('PUT')]
    assert puts[-1].endswith('/made/prepare.json')
    split = Split(Prepared(f'{url}/made'), 'train')
    assert len(split) > 0 and split.read([0])[1] == ['']
    # Nothing is left here, and nothing is done again.
    assert not list((tmp_path / 'cache').rglob('*.array_record*'))
    faults.requests.clear()
    assert main(arguments) == 0
    assert 'nothing to do' in capsys.readouterr().out
    assert not any(request.startswith('PUT') for request in faults.requests)
    # Other settings are refused as in a local folder, unless they are to replace it.
    assert main([*arguments, '--quality=50']) == 2
    assert 'already prepared with other settings' in capsys.readouterr().err
    assert main([*arguments, '--quality=50', '--overwrite']) == 0
    assert Split(Prepared(f'{url}/made'), 'train').read([0])[1] == ['']
