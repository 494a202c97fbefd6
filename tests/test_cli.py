"""run.py from the command line: the four modes, and every mistake told in one sentence before anything is built or written."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import run
from tests import runs, tiny
from vatt_jax.modes import process

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=tests/configs/tiny.py'


def shell(*argv: str) -> subprocess.CompletedProcess:
    """`python run.py …` with nothing of this process's JAX settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('XLA_', 'JAX_', 'VATT_'))}
    env |= {
        'JAX_COMPILATION_CACHE_DIR': str(runs.CACHE),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, text=True, capture_output=True, timeout=550
    )


@pytest.fixture
def cli(monkeypatch, capfd):
    """(exit code, stdout, stderr) of run.py's own entry, in this process; os._exit is the one thing replaced."""

    def leave(code):
        raise SystemExit(code)

    def call(*argv: str):
        monkeypatch.setattr(sys, 'argv', ['run.py', *argv])
        monkeypatch.setattr(os, '_exit', leave)
        code = 0
        capfd.readouterr()
        try:
            run.entry()
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(run folder, finished process) of a real `python run.py --mode=train`."""
    workdir = tmp_path_factory.mktemp('cli') / 'run'
    done = shell(
        'run.py',
        TINY,
        f'--workdir={workdir}',
        '--quiet',
        '--config.steps=4',
        '--config.log_every=2',
        '--config.name',
        'said aloud',
    )
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_train(trained):
    workdir, done = trained
    assert re.search(
        r'said aloud: starting from scratch; 0\.\d+ M parameters, 40 training records', done.stdout
    )
    assert re.search(
        r'step 4/4  loss \d+\.\d+  lr \S+  \d+ clips/s  waiting for data \d+%  goodput \d+%  ETA 0:00',
        done.stdout,
    )
    assert '\x1b' not in done.stdout and 'Traceback' not in done.stderr
    config = json.loads((workdir / 'config.json').read_text())
    assert (
        config['steps'] == 4
        and config['name'] == 'said aloud'
        and config['model']['towers']['text']['vocab'] > 0
    )
    assert [line['step'] for line in runs.log_lines(workdir) if 'loss' in line] == [2, 4]
    assert (
        list((workdir / 'tensorboard').glob('events*')) and (workdir / 'checkpoints' / '4').is_dir()
    )
    assert set(json.loads((workdir / 'timings.json').read_text())) == {'data', 'training'}


def test_the_same_command_again_changes_no_result(trained, cli, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir)
    code, out, err = cli(
        TINY,
        f'--workdir={workdir}',
        '--quiet',
        '--config.steps=4',
        '--config.log_every=2',
        '--config.name=said aloud',
    )
    assert code == 0, err
    assert 'continuing from step 4' in out
    assert runs.log_lines(workdir) == runs.log_lines(trained[0])
    before, after = runs.done(trained[0]), runs.done(workdir)
    assert before['digests'] == after['digests'] and before['order'] == after['order']


def test_eval_embed_and_report(trained, cli):
    """Each works from the run folder alone: config, weights and tokenizer come from there."""
    workdir, _ = trained
    first = json.loads((workdir / 'evals' / 'step_000004' / 'results.json').read_text())
    code, out, err = cli(f'--workdir={workdir}', '--mode=eval')
    assert code == 0, err
    assert 'random init' in out and re.search(r'retrieval audio → video R@10\s+\d', out)
    again = json.loads((workdir / 'evals' / 'step_000004' / 'results.json').read_text())
    assert {k: v['scalars'] for k, v in again.items()} == {
        k: v['scalars'] for k, v in first.items()
    }
    assert (workdir / 'evals' / 'random_init' / 'results.json').exists()
    assert (workdir / 'evals' / 'step_000004' / 'gallery.npz').exists()

    code, out, err = cli(
        f'--workdir={workdir}', '--mode=embed', '--split=validation', '--config.batch_size=16'
    )
    assert code == 0 and '32 examples' in out, err
    written = np.load(workdir / 'embeddings' / 'validation.npz')
    assert written['pooled/video'].shape == (32, 32) and written['space/va/audio'].shape == (32, 16)
    np.testing.assert_allclose(np.linalg.norm(written['space/va/video'], axis=-1), 1, rtol=1e-5)
    assert written['id'].tolist() == [f'validation/{i}' for i in range(32)]

    code, out, err = cli(f'--workdir={workdir}', '--mode=report')
    assert code == 0, err
    page = (workdir / 'report' / 'index.html').read_text()
    assert (
        'said aloud' in page
        and '<svg' in page
        and 'data:image/png' in page
        and 'src="http' not in page
    )


# arguments beside --config and --workdir -> what the sentence must name: the field, the value, the remedy
MISTAKES = {
    'unknown field': (
        ['--config.batchsize=4'],
        ['--config.batchsize=4', "no field 'batchsize'", "'batch_size'"],
    ),
    'misspelt field': (
        ['--config.optimizer.schedule.peek=1'],
        ['optimizer.schedule', "'peek'", "did you mean 'peak'"],
    ),
    'misspelt field of an evaluator': (
        ['--config.evals.probe.train_limt=1'],
        ['train_limt', "did you mean 'train_limit'"],
    ),
    'group for a value': (
        ['--config.optimizer=adam'],
        ['optimizer is a group', 'name one of them'],
    ),
    'no value': (['--config.steps'], ['--config.steps lacks a value', '--config.steps=VALUE']),
    'wrong type': (
        ['--config.batch_size=many'],
        ["config.batch_size: expected int, such as 8, got 'many' (str)"],
    ),
    'fraction for a count': (
        ['--config.steps=2.5'],
        ['config.steps: expected int', 'got 2.5 (float)'],
    ),
    'not positive': (
        ['--config.checkpoint.every=0'],
        ['config.checkpoint.every=0', 'positive number'],
    ),
    'unknown choice': (
        ['--config.compute_dtype=float31'],
        ["config.compute_dtype='float31'", 'float32, bfloat16'],
    ),
    'unknown platform': (
        ['--config.jax_platform=abacus'],
        ["config.jax_platform='abacus'", 'cpu, cuda, tpu'],
    ),
    'unknown objective': (
        ['--config.objective.name=contrasting'],
        ["config.objective.name='contrasting'", 'contrastive'],
    ),
    'unknown optimizer': (
        ['--config.optimizer.name=adams'],
        ["config.optimizer.name='adams'", 'adamw'],
    ),
    'unknown evaluator': (
        ['--config.evals.probe.type=probing'],
        ["config.evals.probe.type='probing'", 'linear_probe'],
    ),
    'unknown tower': (
        ['--config.model.towers.video.name=vat'],
        ["config.model.towers.video.name='vat'", 'vit'],
    ),
    'indivisible batch': (
        ['--config.mesh.replica=8', '--config.batch_size=12'],
        ['config.batch_size=12', '8 data-parallel', '8 or 16 would'],
    ),
    'indivisible microbatch': (
        ['--config.accumulate=3'],
        ['config.batch_size=8', 'config.accumulate=3', '6 or 9 would'],
    ),
    'mesh too large': (
        ['--config.mesh.replica=16'],
        ['replica=16', 'needs 16 devices', 'there are 8', 'use fewer'],
    ),
    'warm-up longer than the run': (
        ['--config.optimizer.schedule.warmup=99'],
        ['schedule.warmup=99', 'config.steps=12', 'try'],
    ),
    'missing npz': (
        ['--config.data.source=npz', '--config.data.npz=nowhere.npz'],
        ['config.data.npz', 'nowhere.npz', 'not a file', 'save_npz'],
    ),
    'no records': (['--config.data.source=records'], ['config.data.train']),
    'unknown source': (
        ['--config.data.source=tape'],
        ['config.data.source', 'tape', 'records, synthetic, npz'],
    ),
    'init_from nowhere': (['--config.init_from=nowhere'], ['nowhere', 'holds no checkpoint']),
    'unknown mode': (['--mode=trian'], ['--mode', 'trian', 'train', 'report']),
    'unknown flag': (['--wrkdir=x'], ['--wrkdir=x', '--help']),
    'eval without a run': (['--mode=eval'], ['holds no', 'train first']),
    'embed without a run': (['--mode=embed'], ['holds no', 'train first']),
    'report without a run': (['--mode=report'], ['holds no run', 'train first']),
}


def told(code, err: str, words: list[str]) -> None:
    """Exit code 2 and exactly one line on standard error, which says all of this."""
    assert code == 2, err
    assert (
        err.startswith('error: ')
        and err.endswith('\n')
        and err.count('\n') == 1
        and 'Traceback' not in err
    ), err
    for word in words:
        assert word in err, f'{word!r} is not in {err!r}'


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(name, cli, tmp_path):
    extra, words = MISTAKES[name]
    code, _, err = cli(TINY, f'--workdir={tmp_path / "run"}', '--quiet', *extra)
    told(code, err, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'spec, words',
    [
        ('configs/demos.py', ['no file configs/demos.py', 'configs/demo.py']),
        ('nowhere/demo.py', ['folder nowhere does not exist']),
        ('configs/demo.py:nothing', ["got 'nothing'", 'synthetic']),
        ('tests/tiny.py', ['tests/tiny.py', 'get_config']),
        ('README.md', ['README.md']),
    ],
)
def test_config_file_mistakes(spec, words, cli, tmp_path):
    told(*cli(f'--config={spec}', f'--workdir={tmp_path / "run"}')[::2], words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'lines, words',
    [
        (
            '    c.evals.probe.train_limt = 3',
            ['config.evals.probe.train_limt=3', "did you mean 'train_limit'"],
        ),
        (
            '    c.optimizer.sheduler = 3',
            ['config.optimizer.sheduler=3', "did you mean 'schedule'"],
        ),
        (
            '    c.model.towers.video.widht = 3',
            ['config.model.towers.video.widht=3', "did you mean 'width'"],
        ),
        (
            '    c.objective.tempreature = 0.1',
            ['config.objective.tempreature=0.1', "did you mean 'temperature'"],
        ),
        ('    c.steps = "100"', ['config', 'steps']),
        ('    c.stepz.x', ['stepz']),
        ('    c.steps = ', ['cannot be run (SyntaxError']),
    ],
)
def test_mistakes_in_a_config_file(lines, words, cli, tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(
        f'from tests.configs import tiny\n\n\ndef get_config():\n    c = tiny.get_config()\n{lines}\n    return c\n'
    )
    told(*cli(f'--config={file}', f'--workdir={tmp_path / "run"}')[::2], words)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'extra, words',
    [
        (['--config.model.towers.video.name=vat'], ["config.model.towers.video.name='vat'", 'vit']),
        (['--config.evals.sync.limt=3'], ['config.evals', 'limt']),
        (['--config.optimizer.schedule.warmup=9999'], ['schedule.warmup=9999']),
        (['--config.model.towers.audio.patch=99999'], ['config.model.towers.audio.patch', '99999']),
        (['--config.data.make.seconds=1.0'], ['seconds=1.0', 'leave less than']),
        (
            ['--config.data.train={"mine": {"path": "nowhere"}}'],
            ['nowhere does not exist'],
        ),  # own videos: no playground is made
    ],
)
def test_mistakes_are_told_before_the_playground_is_rendered(extra, words, cli, tmp_path):
    told(
        *cli(
            '--config=configs/demo.py',
            f'--workdir={tmp_path / "run"}',
            f'--config.data.make.path={tmp_path / "world"}',
            *extra,
        )[::2],
        words,
    )
    assert not list(tmp_path.iterdir())


def test_workdir_that_is_a_file(cli, tmp_path):
    (tmp_path / 'run').write_text('mine')
    told(
        *cli(TINY, f'--workdir={tmp_path / "run"}')[::2],
        [f'--workdir={tmp_path / "run"}: expected a folder, this is a file'],
    )
    assert (tmp_path / 'run').read_text() == 'mine'


@pytest.mark.parametrize(
    'extra, words',
    [
        (
            ['--config.model.towers.video.mlp=128'],
            ['config.model.towers.video.mlp=64', '128', 'another --workdir'],
        ),
        (
            ['--config.optimizer.name=sgd'],
            ["config.optimizer.name='adam'", "'sgd'", 'another --workdir'],
        ),
        (['--config.mesh.replica=16'], ['needs 16 devices']),
        (['--config.evals.probe.type=probing'], ["config.evals.probe.type='probing'"]),
        (
            ['--mode=eval', '--config.model.towers.video.mlp=128'],
            ['config.model.towers.video.mlp=64'],
        ),
        (['--mode=embed', '--split=tset'], ["'tset'", 'train, validation, test']),
        (['--mode=report', '--compare=nowhere'], ['nowhere holds no run']),
    ],
)
def test_mistakes_leave_an_existing_run_alone(extra, words, trained, cli):
    workdir, _ = trained
    before = runs.snapshot(workdir)
    told(*cli(TINY, f'--workdir={workdir}', '--quiet', *extra)[::2], words)
    assert runs.snapshot(workdir) == before


@pytest.mark.parametrize('mode', ['train', 'eval', 'embed'])
@pytest.mark.parametrize('damage', ['arrays', 'meta', 'config'])
def test_unreadable_checkpoint(mode, damage, trained, cli, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(trained[0], workdir)
    if damage == 'config':
        (workdir / 'config.json').write_text('{"steps": 4,')
    for file in (workdir / 'checkpoints').rglob('*'):
        if file.is_file() and (
            file.parent.name == 'd'
            if damage == 'arrays'
            else damage == 'meta' and file.parent.name == 'meta'
        ):
            file.write_bytes(b'')
    before = runs.snapshot(workdir)
    told(
        *cli(
            f'--workdir={workdir}',
            f'--mode={mode}',
            '--quiet',
            '--config.steps=8' if damage != 'config' else '--quiet',
        )[::2],
        [str(workdir), 'cannot be read' if damage == 'config' else 'damaged'],
    )
    assert runs.snapshot(workdir) == before


def test_a_mistake_from_a_real_shell(tmp_path):
    done = shell('run.py', TINY, f'--workdir={tmp_path / "run"}', '--config.batchsize=4')
    told(done.returncode, done.stderr, ["no field 'batchsize'", "did you mean 'batch_size'?"])
    assert done.stdout == '' and not (tmp_path / 'run').exists()


WITHOUT = """
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'array_record', 'av', 'soxr', 'PIL', 'tokenizers', 'sentencepiece'):
    sys.modules[name] = None  # importing it raises ImportError
import importlib, pkgutil
import configs, data_pipelines.loading.synthetic, vatt_jax
for package in (vatt_jax, configs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        importlib.import_module(module.name)
import run
sys.argv = ['run.py', *sys.argv[1:]]
run.entry()
import numpy as np
model = vatt_jax.load(sys.argv[-1].partition('=')[2])
print('embedded', model.embed(text='red stripes move', audio=np.zeros(1024, np.int16))['text']['vat'].shape)
"""


def test_trains_and_embeds_without_tensorflow(tmp_path):
    """With core dependencies alone: every module is imported, a run trains, evaluates and reports, and its checkpoint embeds."""
    done = shell(
        '-c',
        WITHOUT,
        TINY,
        '--quiet',
        '--config.steps=3',
        '--config.report=true',
        f'--workdir={tmp_path / "run"}',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'embedded (8,)' in done.stdout and (tmp_path / 'run' / 'report' / 'index.html').exists()


@pytest.mark.parametrize(
    'platform, told, field, want',
    [
        ('tpu', None, '', 'RUN/compiled'),
        ('tpu', '/told', '', '/told'),
        ('tpu', '/told', '/own', '/own'),
        ('cpu', None, '', None),
        ('cpu', None, '/own', '/own'),
    ],
)
def test_compiled_programs_are_kept_for_the_next_start(
    tmp_path, monkeypatch, platform, told, field, want
):
    import jax

    before, config = jax.config.jax_compilation_cache_dir, tiny.config(compilation_cache=field)
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    try:
        jax.config.update('jax_compilation_cache_dir', told)
        process.keep_compiled(config, tmp_path)
        assert jax.config.jax_compilation_cache_dir == (want and want.replace('RUN', str(tmp_path)))
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
