"""Each missing optional package is one sentence with the command that installs it."""

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from vatt_jax import extras
from vatt_jax.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
EXTRAS = {**PYPROJECT['project']['optional-dependencies']}
# For developers of a clone: nothing imports them late.
for name in ('dev', 'docs'):
    del EXTRAS[name]


def requirements(lines) -> set[tuple[str, str]]:
    """(name, versions) of those that this machine installs."""
    found = set()
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            found.add((str(requirement).split(';')[0].strip(), str(requirement.specifier)))
    return found


def test_requirements_are_those_of_pyproject():
    assert set(extras.REQUIREMENTS) == set(EXTRAS)
    for name, lines in EXTRAS.items():
        assert requirements(extras.REQUIREMENTS[name]) == requirements(lines), name


def test_a_failed_import_is_one_sentence():
    with pytest.raises(extras.MissingExtra) as caught:
        with extras.needed('video', 'reading files'):
            raise ModuleNotFoundError("No module named 'av'", name='av')
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == (
        "reading files needs the extra 'video' (No module named 'av'): "
        'pip install "av>=17" "soxr>=1.0"'
    )


def test_check_names_all_that_is_missing_and_one_command(monkeypatch):
    extras.check('nothing')
    for name in ('av', 'soxr', 'tokenizers'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(extras.MissingExtra) as caught:
        extras.check('this', 'av', 'soxr', 'numpy', 'tokenizers')
    assert str(caught.value) == (
        'this needs packages that are not installed (av, soxr, tokenizers): '
        'pip install "av>=17" "soxr>=1.0" "tokenizers>=0.21" "sentencepiece>=0.2"'
    )


BASE_INSTALLATION = """
import runpy, sys
for name in MISSING:
    sys.modules[name] = None  # importing it raises ImportError
module = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_module(module, run_name='__main__', alter_sys=True)
"""
ALL_OPTIONAL = tuple(extras.EXTRA_OF)
WITHOUT_DATA = tuple(name for name, extra in extras.EXTRA_OF.items() if extra == 'data')
PREPARE = ['data_pipelines.prepare', '--videos=media', '--out=out', '--quiet']


@pytest.mark.parametrize(
    'missing, argv, words',
    [
        (ALL_OPTIONAL, PREPARE, ["needs the extra 'video'", '"av>=17"']),
        # Before anything is decoded.
        (WITHOUT_DATA, PREPARE, ['writing records needs packages', '"array-record>=0.8"']),
        (
            ('sentencepiece',),
            [*PREPARE, '--tokenizer=sentencepiece'],
            ['not installed (sentencepiece)', '"sentencepiece>=0.2"'],
        ),
        (
            ALL_OPTIONAL,
            ['data_pipelines.dmvr', '--train=media/*', '--out=out'],
            ["needs the extra 'video'"],
        ),
        (
            WITHOUT_DATA,
            ['data_pipelines.dmvr', '--train=media/*', '--out=out'],
            ['reading DMVR records', 'tensorflow'],
        ),
        (
            ALL_OPTIONAL,
            ['vatt_jax', '--workdir=run'],
            ['the playground', '--config=demo:synthetic', '"av>=17"', '"tensorflow-datasets>='],
        ),
        (
            ALL_OPTIONAL,
            ['vatt_jax.importers', '--format=vatt_tf', '--checkpoint=media/a', '--out=run'],
            ['reading and writing TensorFlow checkpoints', '"tensorflow'],
        ),
    ],
)
def test_commands_of_a_base_installation(missing, argv, words, tmp_path):
    """In a process of its own: the packages stay importable for the other tests."""
    (tmp_path / 'media').mkdir()
    (tmp_path / 'media' / 'a.mp4').write_bytes(b'')
    (tmp_path / 'media' / 'a.index').write_bytes(b'')
    done = subprocess.run(
        [sys.executable, '-c', BASE_INSTALLATION.replace('MISSING', repr(missing)), *argv],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['media']


@pytest.mark.parametrize('platform, package', [('cuda', 'jax[cuda13]'), ('tpu', 'jax[tpu]')])
def test_a_platform_without_its_plugin(platform, package, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'vatt_jax', '--config=demo:synthetic', '--workdir=run'),
            f'--config.jax_platform={platform}',
        ],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        text=True,
        capture_output=True,
    )
    if done.returncode == 0:
        pytest.skip(f'{platform} is here')
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: no device could be used')
    assert package in last
