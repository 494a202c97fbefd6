"""Eight simulated CPU devices and a compilation cache for every test."""

import json
import os
import pathlib

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Compiling costs more here than running: XLA's older code generator takes half the time. For this
# process and those it starts.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'

import jax
import jaxtyping
import pytest

from tests import typecheck  # noqa: F401 - the hook looks the checker up in the package

# Annotations, shapes included, are checked whenever a function of the project is called.
jaxtyping.install_import_hook(['vatt_jax', 'data_pipelines'], 'tests.typecheck.typechecker')

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_disable_most_optimizations', True)
_cache = pathlib.Path(__file__).parent.parent / '.jax_cache'
jax.config.update('jax_compilation_cache_dir', str(_cache))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


# Fields that loop.build does not read.
UNREAD = (
    'name',
    'report',
    'init_from',
    'init_trees',
    'init_rename',
    'init_skip',
    'checkpoint',
    'max_bad_steps',
)
_built = {}


@pytest.fixture(autouse=True, scope='session')
def share_what_is_built():
    """Runs of one config in one process share its traced and compiled functions.

    The command line's own processes do not.
    """
    from ml_collections import ConfigDict

    from vatt_jax.config import to_json
    from vatt_jax.training import loop

    build = loop.build

    def shared(config, data):
        loop.resolve(config, data)
        fields = {name: value for name, value in config.items() if name not in UNREAD}
        info = json.dumps(data.info, sort_keys=True, default=str)
        key = (to_json(ConfigDict(fields)), info)
        if key not in _built:
            _built[key] = build(config, data)
        return _built[key]

    loop.build = shared
    yield
    loop.build = build


@pytest.fixture(scope='session')
def plain_run(tmp_path_factory):
    """The folder of a run of two steps, without evaluation. For reading."""
    import data_pipelines
    from tests import tiny
    from vatt_jax.training import loop

    config = tiny.config(steps=2, optimizer__schedule__warmup=1)
    folder = tmp_path_factory.mktemp('plain_run')
    loop.train(config, data_pipelines.open(config), folder, quiet=True)
    return folder


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """(folder, config, data) of a run of two steps with an evaluator of each kind.

    It is evaluated beside its random initialisation, gallery and report included. For reading:
    whoever writes copies it.
    """
    import data_pipelines
    from tests import tiny
    from vatt_jax.modes import evaluate
    from vatt_jax.reporting import report
    from vatt_jax.training import loop

    config = tiny.config(name='tiny <run>', steps=2, report=True, optimizer__schedule__warmup=1)
    gallery = {
        'type': 'retrieval',
        'limit': 29,
        'pairs': (('text', 'video', 'vat'), ('audio', 'video', 'va')),
    }
    probe = {'type': 'linear_probe', 'train_limit': 48, 'test_limit': 32, 'strengths': (0.1,)}
    config.evals = {
        'retrieval': gallery,
        'single_frame_retrieval': {**gallery, 'change': 'single_frame', 'baseline': False},
        'sync': {'type': 'sync', 'limit': 29, 'seconds': 0.5},
        'probe_video': {**probe, 'stream': 'video'},
        'simple_probe_spectrum': {
            **probe,
            'type': 'simple_probe',
            'stream': 'audio',
            'baseline': False,
        },
    }
    folder = tmp_path_factory.mktemp('tiny_run')
    data = data_pipelines.open(config)
    loop.train(config, data, folder, quiet=True)
    evaluate.compare(config, data, folder)
    report.build(folder)
    return folder, config, data


@pytest.fixture(scope='session')
def store_server():
    """(URL, faults) of a local object store: see tests/object_store.py."""
    from tests import object_store

    with object_store.serve() as server:
        yield server


@pytest.fixture
def object_store(store_server, tmp_path, monkeypatch):
    """(URL of a new folder on the store, faults); local copies go below tmp_path."""
    from tests.object_store import BUCKET, CREDENTIALS
    from vatt_jax.object_store import store

    url, faults = store_server
    for name, value in {'AWS_ENDPOINT_URL': url, **CREDENTIALS}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'cache'))
    store._file_system.cache_clear()
    faults.requests.clear()
    yield f's3://{BUCKET}/{tmp_path.name}', faults
    faults.unavailable = faults.cut = faults.hang = 0
    faults.latency = 0.0


@pytest.fixture(scope='session')
def google_server():
    """URL of a local server that speaks Google's protocol."""
    from gcp_storage_emulator.server import create_server

    from tests import runs

    port = runs.free_port()
    server = create_server('localhost', port, in_memory=True, default_bucket='bucket')
    with server:
        yield f'http://localhost:{port}'


@pytest.fixture
def google_store(google_server, tmp_path, monkeypatch):
    """gs:// URL of a new folder on a local server; local copies go below tmp_path."""
    from vatt_jax.object_store import store

    monkeypatch.setenv('STORAGE_EMULATOR_HOST', google_server)
    monkeypatch.setenv('VATT_JAX_CACHE', str(tmp_path / 'cache'))
    store._file_system.cache_clear()
    yield f'gs://bucket/{tmp_path.name}'
    store._file_system.cache_clear()
