"""Builds the wheel, installs it alone with its core dependencies, and uses it from another folder.

    python tools/wheel_test.py                 # by this Python; make wheel-test
    python tools/wheel_test.py --keep=DIR      # leave the environment there

Takes about a minute of two CPU cores and leaves nothing behind. Nothing of the clone is on the path
of what is tested: `vatt-jax` trains two steps on synthetic data, the run embeds arrays, and what
needs an extra says so in one sentence.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
# What the wheel is built from. Copied, because setuptools would take files from an old build/.
SOURCES = ('vatt_jax', 'data_pipelines', 'configs')
BUILD_FILES = ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE')

# A small network, so that compiling takes seconds.
TRAIN = (
    '--config=demo:synthetic',
    '--workdir=run',
    '--quiet',
    '--config.steps=2',
    '--config.batch_size=8',
    '--config.log_every=1',
    '--config.optimizer.schedule.warmup=1',
    '--config.data.synthetic_size=64',
    '--config.model.towers.video.layers=1',
    '--config.model.towers.audio.layers=1',
    '--config.model.towers.text.layers=1',
    '--config.report=false',
    '--config.evals={}',
)
EMBED = """
import numpy as np
import vatt_jax

model = vatt_jax.load('run')
frames = np.zeros((8, 32, 32, 3), np.uint8)
out = model.embed(video=frames, audio=np.zeros(16000, np.int16), text='a red ring')
assert out['video']['va'].shape == (128,), out['video']['va'].shape
print('embedded', sorted(out))
"""
# Shaped as configs are that users write.
OWN_CONFIG = """
from configs import demo


def get_config():
    config = demo.get_config('synthetic')
    config.name = 'mine'
    return config
"""


def main() -> int:
    """Build, install, use; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--keep', default='', metavar='DIR', help='leave the environment there')
    flags = parser.parse_args()
    start = time.monotonic()
    if flags.keep:
        folder = pathlib.Path(flags.keep).absolute()
        folder.mkdir(parents=True)
        check(folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            check(pathlib.Path(temporary))
    version = sys.version.split()[0]
    print(f'the wheel works on Python {version} ({time.monotonic() - start:.0f} s)')
    return 0


def check(folder: pathlib.Path) -> None:
    """Everything, below an empty folder."""
    binaries = install(build(folder), folder)
    elsewhere = folder / 'elsewhere'
    elsewhere.mkdir()
    python, command = str(binaries / 'python'), str(binaries / 'vatt-jax')

    run([command, '--version'], elsewhere, expect=['vatt_jax'])
    run([python, '-m', 'vatt_jax', '--help'], elsewhere, expect=['named configs:', 'vatt_probes'])
    run([command, *TRAIN], elsewhere, expect=['step 2/2'])
    # Reads files of the package that are not Python.
    run([command, '--mode=report', '--workdir=run'], elsewhere, expect=['report'])
    run([python, '-c', EMBED], elsewhere, expect=['embedded'])

    # Fails at its last flag, so the config was found and read.
    (elsewhere / 'mine.py').write_text(OWN_CONFIG)
    bad_field = '--config.stepz=1'
    for config in ('mine.py', 'configs/demo.py', 'vatt:mbs'):
        run([command, f'--config={config}', bad_field], elsewhere, ["no field 'stepz'"], code=2)

    # Each missing extra is one sentence.
    missing = ['pip install "']
    run([command, '--workdir=none'], elsewhere, missing, code=2)
    prepare = [python, '-m', 'data_pipelines.prepare', '--videos=.', '--out=none']
    run(prepare, elsewhere, missing, code=2)
    run([python, '-m', 'data_pipelines.dmvr', '--train=x', '--out=none'], elsewhere, missing, 2)
    importers = [python, '-m', 'vatt_jax.importers', '--out=none']
    run([*importers, '--checkpoint=mine.py'], elsewhere, missing, code=2)
    run([*importers, '--format=mmv', '--checkpoint=x.pkl'], elsewhere, ['x.pkl'], code=2)
    run([*importers, '--help'], elsewhere, expect=['--checkpoint'])


def build(folder: pathlib.Path) -> pathlib.Path:
    """The path of a new wheel."""
    source, built = folder / 'source', folder / 'dist'
    for name in SOURCES:
        no_byte_code = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, source / name, ignore=no_byte_code)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '--quiet']
    run([*pip, '--no-deps', f'--wheel-dir={built}', str(source)], folder)
    (wheel,) = built.glob('*.whl')
    return wheel


def install(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The folder of binaries of a new environment with the wheel and what it depends on."""
    run([sys.executable, '-m', 'venv', str(folder / 'venv')], folder)
    binaries = folder / 'venv' / ('Scripts' if os.name == 'nt' else 'bin')
    pip = [str(binaries / 'python'), '-m', 'pip', '--disable-pip-version-check', 'install']
    constraints = f'--constraint={ROOT / "constraints.txt"}'
    run([*pip, '--quiet', '--no-compile', constraints, str(wheel)], folder)
    return binaries


def run(
    command: list[str], folder: pathlib.Path, expect: list[str] | None = None, code: int = 0
) -> None:
    """Run a command there, without the variables that would put the clone on its path.

    Raises:
        SystemExit: its exit code or output is another one.
    """
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    for name in ('PYTHONPATH', 'PYTHONHOME', 'JAX_COMPILATION_CACHE_DIR'):
        environment.pop(name, None)
    words = [os.path.basename(command[0]), *command[1:4]]
    print('$', ' '.join(words).replace('\n', ' ')[:100], flush=True)
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    output = done.stdout + done.stderr
    missing = [text for text in expect or () if text not in output]
    is_sentence = code != 2 or done.stderr.count('\n') == 1
    if done.returncode != code or missing or not is_sentence:
        print(output)
        sys.exit(f'expected exit code {code} and {expect}, got {done.returncode}: {command}')


if __name__ == '__main__':
    sys.exit(main())
