"""The named configs are found from any folder, by files that lie anywhere.

As in a clone, and in the layout of a wheel, where they are vatt_jax.configs.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

from vatt_jax import config as configs
from vatt_jax import named_configs
from vatt_jax.command_line import expand_home, run_command
from vatt_jax.config import ConfigError
from vatt_jax.modes.flags import parse

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(named_configs.summaries())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same(config, expected):
    assert configs.to_json(config) == configs.to_json(expected)


def test_summaries_list_what_can_be_loaded():
    assert {'default', 'demo', 'vatt'} <= set(NAMES)
    # Read by configs, but none itself.
    assert 'machines' not in NAMES
    assert all(named_configs.summaries().values())


@pytest.mark.parametrize('spec', ['demo', 'demo.py', 'configs/demo', 'configs/demo.py'])
@pytest.mark.parametrize('argument', ['', ':synthetic'])
def test_a_named_config_is_found_from_any_folder(spec, argument, elsewhere):
    expected = configs.load(f'{ROOT}/configs/demo.py{argument}')
    assert_same(configs.load(f'{spec}{argument}'), expected)


@pytest.mark.parametrize('name', NAMES)
def test_every_named_config_loads(name, elsewhere):
    assert_same(configs.load(name), configs.load(f'{ROOT}/configs/{name}.py'))


def test_a_file_that_is_here_comes_before_a_named_config(elsewhere):
    (elsewhere / 'configs').mkdir()
    (elsewhere / 'configs' / 'demo.py').write_text(
        'from configs import default\n'
        'def get_config():\n'
        '    c = default.get_config()\n'
        '    c.name = "mine"\n'
        '    return c\n'
    )
    assert configs.load('configs/demo.py').name == 'mine'
    assert configs.load('demo').name == 'demo'


def test_a_folder_or_another_file_of_that_name_is_no_config(elsewhere):
    (elsewhere / 'demo').mkdir()
    (elsewhere / 'vatt').write_text('notes')
    assert configs.load('demo').name == 'demo'
    assert configs.load('vatt').name == 'VATT mbs'


@pytest.mark.parametrize(
    'spec, words',
    [
        ('demos', ['no file demos and no named config', 'did you mean configs/demo.py?']),
        ('configs/dmo.py', ['did you mean configs/demo.py?']),
        ('zzz', ['expected a file or one of configs/', 'configs/default.py, configs/demo.py']),
        ('machines', ['no file machines and no named config']),
        ('empty/demo.py', ['no file empty/demo.py; folder empty has no Python files']),
        ('nowhere/demo.py', ['folder nowhere does not exist']),
        ('README.md', ['README.md is not a Python file']),
        ('demo:nothing', ["got 'nothing'", 'synthetic']),
    ],
)
def test_mistakes(spec, words, elsewhere):
    (elsewhere / 'empty').mkdir()
    (elsewhere / 'README.md').write_text('# mine')
    with pytest.raises(ConfigError) as caught:
        configs.load(spec)
    for word in words:
        assert word in str(caught.value)


# What users write, in a file that lies anywhere: name of the file -> its text.
OWN_FILES = {
    'mine.py': 'from configs import demo\nget_config = demo.get_config\n',
    # Not mistaken for the named config that it imports.
    'demo.py': 'from configs import demo\nget_config = demo.get_config\n',
    'late.py': ('def get_config():\n    from configs import demo\n    return demo.get_config()\n'),
    # Annotations are strings, which dataclasses look up in their module.
    'with_dataclass.py': (
        'from __future__ import annotations\n'
        'import dataclasses\n'
        'from configs import demo\n'
        '@dataclasses.dataclass\n'
        'class Task:\n'
        '    steps: int = 3\n'
        'get_config = demo.get_config\n'
    ),
}


@pytest.mark.parametrize('name', OWN_FILES)
def test_own_files_import_the_named_configs(name, elsewhere):
    (elsewhere / name).write_text(OWN_FILES[name])
    assert_same(configs.load(name), configs.load(f'{ROOT}/configs/demo.py'))


@pytest.mark.parametrize('name', NAMES)
def test_a_copy_of_a_named_config_works(name, elsewhere):
    shutil.copy(named_configs.folder() / f'{name}.py', elsewhere / 'copy.py')
    assert_same(configs.load('copy.py'), configs.load(name))


def test_files_of_an_own_folder_called_configs_import_one_another(elsewhere):
    own = elsewhere / 'configs'
    own.mkdir()
    (own / 'base.py').write_text('from configs import default\nSTEPS = 77\n')
    (own / 'mine.py').write_text(
        'from configs import base, default\n'
        'def get_config():\n'
        '    c = default.get_config()\n'
        '    c.steps = base.STEPS\n'
        '    return c\n'
    )
    assert configs.load('configs/mine.py').steps == 77


def test_another_package_called_configs_is_left_as_it_was(elsewhere, monkeypatch):
    theirs = types.ModuleType('configs')
    child = types.ModuleType('configs.default')
    monkeypatch.setitem(sys.modules, 'configs', theirs)
    monkeypatch.setitem(sys.modules, 'configs.default', child)
    (elsewhere / 'broken.py').write_text('from configs import default\nraise KeyError("no")\n')
    with pytest.raises(ConfigError, match='broken.py cannot be run'):
        configs.load('broken.py')
    assert configs.load('demo').name == 'demo'
    assert sys.modules['configs'] is theirs
    assert sys.modules['configs.default'] is child
    assert named_configs.module('machines').MACHINES


# ---- in the layout of a wheel
@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder with what a wheel installs, put together by setup.py."""
    pytest.importorskip('setuptools')
    source = tmp_path_factory.mktemp('source')
    for name in ('vatt_jax', 'data_pipelines', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    # Without pyproject.toml, which an older setuptools cannot read: packages stand in setup.py.
    shutil.copy(ROOT / 'setup.py', source)
    site = tmp_path_factory.mktemp('site')
    command = [sys.executable, 'setup.py', '--quiet', 'build_py', f'--build-lib={site}']
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return site


def from_site(site, folder, *argv):
    """`python …` in another folder, with the layout of a wheel on its path and no clone."""
    environment = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONIOENCODING': 'ascii'}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, text=True, capture_output=True
    )


def test_a_wheel_has_every_package(site):
    for name in ('vatt_jax', 'data_pipelines'):
        in_clone = {path.relative_to(ROOT) for path in (ROOT / name).rglob('*.py')}
        in_wheel = {path.relative_to(site) for path in (site / name).rglob('*.py')}
        named = {path for path in in_wheel if path.parts[:2] == ('vatt_jax', 'configs')}
        assert in_wheel - named == in_clone
    in_clone = {path.name for path in (ROOT / 'configs').glob('*.py')}
    assert {path.name for path in (site / 'vatt_jax' / 'configs').glob('*.py')} == in_clone
    # A package of that name would hide those of other programs.
    assert not (site / 'configs').exists()


IN_A_WHEEL = """
import importlib, json, sys
import vatt_jax
from vatt_jax import config as configs
from vatt_jax import named_configs

loaded = {}
for name in named_configs.summaries():
    loaded[name] = json.loads(configs.to_json(configs.load(name)))
    loaded[f'configs/{name}.py'] = json.loads(configs.to_json(configs.load(f'configs/{name}.py')))
    module = importlib.import_module(f'vatt_jax.configs.{name}')
    loaded[f'vatt_jax.configs.{name}'] = json.loads(configs.to_json(module.get_config()))
for name in sys.argv[1:]:
    loaded[name] = json.loads(configs.to_json(configs.load(name)))
assert 'configs' not in sys.modules
print(json.dumps(loaded))
"""


def test_a_wheel_finds_its_configs(site, elsewhere):
    for name, text in OWN_FILES.items():
        (elsewhere / name).write_text(text)
    done = from_site(site, elsewhere, '-c', IN_A_WHEEL, *OWN_FILES)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    for name in NAMES:
        expected = json.loads(configs.to_json(configs.load(f'{ROOT}/configs/{name}.py')))
        # The own demo.py of this folder is the same config.
        assert loaded[name] == expected
        assert loaded[f'configs/{name}.py'] == expected
        assert loaded[f'vatt_jax.configs.{name}'] == expected
    for name in OWN_FILES:
        assert loaded[name] == loaded['demo']


def test_help_of_the_installed_command(site, elsewhere):
    """Flags by mode, the named configs, and no character that a plain terminal lacks."""
    done = from_site(site, elsewhere, '-m', 'vatt_jax', '--help')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage: python -m vatt_jax ')
    for mode in ('train', 'embed', 'report', 'deflate', 'plan'):
        assert f'\n--mode={mode}:\n' in done.stdout
    for name, summary in named_configs.summaries().items():
        assert f'  {name} ' in done.stdout
        assert summary in done.stdout
    deflate = done.stdout.split('--mode=deflate:')[1].split('--mode=plan:')[0]
    assert '--naive' in deflate
    assert '--topology' not in deflate


def test_a_mistake_of_the_installed_command_is_one_sentence(site, elsewhere):
    done = from_site(site, elsewhere, '-m', 'vatt_jax', '--config=demo', '--config.stepz=2')
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config.stepz=2: config has no field 'stepz'")
    assert done.stderr.count('\n') == 1
    assert not list(elsewhere.iterdir())


def test_the_importers_of_a_wheel_find_their_defaults(site, elsewhere):
    done = from_site(
        site,
        elsewhere,
        *('-m', 'vatt_jax.importers', '--format=mmv', '--checkpoint=nowhere.pkl'),
        *('--config=mmv:s3d_fac_vat', '--out=run'),
    )
    assert done.returncode == 2, done.stderr
    assert 'nowhere.pkl' in done.stderr
    assert done.stderr.count('\n') == 1


def test_a_home_folder_is_expanded(elsewhere, monkeypatch):
    """Shells expand ~ only where a word begins with it, so --config=~/mine.py comes as it is."""
    monkeypatch.setenv('HOME', str(elsewhere))
    flags, overrides = parse(
        ['--config=~/mine.py', '--workdir=~/runs/a', '--out=~/out', '--config.init_from=~/b']
    )
    assert flags.config == f'{elsewhere}/mine.py'
    assert flags.workdir == f'{elsewhere}/runs/a'
    assert flags.out == f'{elsewhere}/out'
    assert overrides == [('init_from', f'{elsewhere}/b')]
    assert expand_home(['--name=a~/b', '--x=~', '~/y']) == [
        '--name=a~/b',
        f'--x={elsewhere}',
        '~/y',
    ]


def test_run_py_by_a_python_without_the_dependencies(elsewhere):
    """-S: without the packages of this environment."""
    done = subprocess.run(
        [sys.executable, '-S', str(ROOT / 'run.py')], text=True, capture_output=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {sys.executable} has no module ')
    assert done.stderr.count('\n') == 1


def test_the_command_to_type_is_that_of_this_folder(elsewhere, monkeypatch):
    assert run_command() == 'vatt-jax'
    monkeypatch.chdir(ROOT)
    assert run_command() == 'python run.py'


@pytest.mark.parametrize(
    'program, command',
    [
        ('/opt/env/bin/vatt-jax', 'vatt-jax'),
        ('C:/env/Scripts/vatt-jax.exe', 'vatt-jax'),
        ('/opt/env/lib/vatt_jax/__main__.py', 'python -m vatt_jax'),
        ('run.py', 'python run.py'),
        ('../my clone/run.py', "python '../my clone/run.py'"),
        # Programs that start no runs.
        ('/opt/env/lib/data_pipelines/prepare.py', 'python run.py'),
        ('/opt/env/lib/vatt_jax/importers/__main__.py', 'python run.py'),
        ('', 'python run.py'),
    ],
)
def test_the_command_to_type_is_the_one_that_was_typed(monkeypatch, program, command):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [program])
    assert run_command() == command
