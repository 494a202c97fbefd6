"""run.py from the command line: its modes, and mistakes, each one sentence.

A mistake is an error before anything is built or written.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

import data_pipelines
import run
from tests import runs, tiny
from tests.configs.coclr import infonce_config
from vatt_jax.modes import process
from vatt_jax.training import loop, train_state

ROOT = pathlib.Path(__file__).parent.parent
TINY = '--config=tests/configs/tiny.py'


class Finished(NamedTuple):
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def shell(*argv: str) -> Finished:
    """`python …` with nothing of this process's JAX settings."""
    environment = {
        'JAX_COMPILATION_CACHE_DIR': str(runs.CACHE),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        # Compiling costs more here than running: see conftest.py.
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': '--xla_cpu_use_fusion_emitters=false',
    }
    for name, value in os.environ.items():
        if not name.startswith(('XLA_', 'JAX_', 'VATT_')):
            environment[name] = value
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=550,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(monkeypatch, capfd):
    """Calls run.py's own entry in this process; os._exit is the one thing replaced."""

    def leave(code):
        raise SystemExit(code)

    def call(*argv: str) -> Finished:
        monkeypatch.setattr(sys, 'argv', ['run.py', *argv])
        monkeypatch.setattr(os, '_exit', leave)
        code = 0
        capfd.readouterr()
        try:
            run.entry()
        except SystemExit as error:
            code = error.code
        stdout, stderr = capfd.readouterr()
        return Finished(code, stdout, stderr)

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
        'named run',
    )
    assert done.code == 0, done.stderr
    return workdir, done


@pytest.fixture
def trained_copy(trained, tmp_path):
    """A run folder to be written to."""
    return shutil.copytree(trained[0], tmp_path / 'run')


def evaluation_of(workdir):
    """results.json of the last step."""
    return json.loads((workdir / 'evals' / 'step_000004' / 'results.json').read_text())


def test_train_prints_its_progress(trained):
    _, done = trained
    assert re.search(
        r'named run: starting from scratch; 0\.\d+ M parameters, 40 training records', done.stdout
    )
    assert re.search(
        r'step 4/4  loss \d+\.\d+  lr \S+  \d+ clips/s  '
        r'waiting for data \d+%  goodput \d+%  ETA 0:00',
        done.stdout,
    )
    before, _, after = done.stdout.partition('named run: starting from scratch')
    for line in (
        'parameters: ',
        'one step: ',
        'one epoch: 5.0 batches of 40',
        'memory: ',
        'checkp',
    ):
        assert f'\n{line}' in before
    assert 'compiling the training step' in after and 'step 4: evaluating probe, retrieval' in after
    assert '\x1b' not in done.stdout  # no colours where no terminal is
    assert 'Traceback' not in done.stderr


def test_train_writes_its_folder(trained):
    workdir, _ = trained
    config = json.loads((workdir / 'config.json').read_text())
    assert config['steps'] == 4
    assert config['name'] == 'named run'
    assert config['model']['towers']['text']['vocab'] > 0
    assert [line['step'] for line in runs.log_lines(workdir) if 'loss' in line] == [2, 4]
    assert list((workdir / 'tensorboard').glob('events*'))
    assert (workdir / 'checkpoints' / '4').is_dir()
    timings = json.loads((workdir / 'timings.json').read_text())
    assert set(timings) == {'data', 'training'}


def test_the_same_command_again_changes_no_result(trained, trained_copy, cli):
    workdir, _ = trained
    code, out, err = cli(
        TINY,
        f'--workdir={trained_copy}',
        '--quiet',
        '--config.steps=4',
        '--config.log_every=2',
        '--config.name=named run',
    )
    assert code == 0, err
    assert 'continuing from step 4' in out
    assert runs.log_lines(trained_copy) == runs.log_lines(workdir)
    before, after = runs.done(workdir), runs.done(trained_copy)
    assert before['digests'] == after['digests']
    assert before['order'] == after['order']


def test_eval_embed_and_report(trained, cli):
    """Each works from the run folder alone: config, weights and tokenizer come from there."""
    workdir, _ = trained
    first = evaluation_of(workdir)
    code, out, err = cli(f'--workdir={workdir}', '--mode=eval')
    assert code == 0, err
    assert 'random init' in out
    assert re.search(r'retrieval audio → video R@10\s+\d', out)
    again = evaluation_of(workdir)
    assert set(again) == set(first)
    for name in first:
        assert again[name]['scalars'] == first[name]['scalars'], name
    assert (workdir / 'evals' / 'random_init' / 'results.json').exists()
    assert (workdir / 'evals' / 'step_000004' / 'gallery.npz').exists()

    code, out, err = cli(
        f'--workdir={workdir}', '--mode=embed', '--split=validation', '--config.batch_size=16'
    )
    assert code == 0, err
    assert '32 examples' in out
    with np.load(workdir / 'embeddings' / 'validation.npz') as written:
        chex.assert_shape(written['pooled/video'], (32, 32))
        chex.assert_shape(written['space/va/audio'], (32, 16))
        lengths = np.linalg.norm(written['space/va/video'], axis=-1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        assert written['id'].tolist() == [f'validation/{i}' for i in range(32)]

    code, out, err = cli(f'--workdir={workdir}', '--mode=report')
    assert code == 0, err
    page = (workdir / 'report' / 'index.html').read_text()
    assert 'named run' in page
    assert '<svg' in page
    assert 'data:image/png' in page
    assert 'src="http' not in page


@pytest.mark.slow
def test_a_teacher_is_evaluated_and_embedded(cli, tmp_path, monkeypatch):
    """From the run folder alone; its embeddings lie in a file of their own beside the student's."""
    evaluator = {'type': 'neighbours', 'of': 'pooled', 'windows': 1, 'first': (1,)}
    config = infonce_config(steps=2, evals__neighbours=evaluator)
    loop.train(config, data_pipelines.open(config), tmp_path, quiet=True)
    evaluated = []
    variables_of = train_state.evaluation_variables

    def evaluation_variables(state, objective, which):
        evaluated.append(which)
        return variables_of(state, objective, which)

    monkeypatch.setattr(train_state, 'evaluation_variables', evaluation_variables)
    code, out, err = cli(f'--workdir={tmp_path}', '--mode=eval', '--config.evaluated=teacher')
    assert code == 0, err
    assert 'neighbours R@1' in out
    # The trained network and the random one.
    assert evaluated == ['teacher', 'teacher']

    pooled = {}
    for which in ('student', 'teacher'):
        code, out, err = cli(f'--workdir={tmp_path}', '--mode=embed', f'--config.evaluated={which}')
        assert code == 0, err
        path = pathlib.Path(out.split(' → ')[1].strip())
        with np.load(path) as written:
            pooled[which] = written['pooled/video']
    assert len(list((tmp_path / 'embeddings').iterdir())) == 2
    assert np.abs(pooled['teacher'] - pooled['student']).max() > 1e-5

    code, _, err = cli(f'--workdir={tmp_path}', '--mode=embed', '--config.evaluated=mean')
    assert code == 2
    assert "config.evaluated='mean': choose one of student, teacher" in err


# Arguments beside --config and --workdir -> what the sentence must name: the field, the value, the
# remedy.
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


def assert_mistake(done: Finished, words: list[str]) -> None:
    """Exit code 2 and exactly one line on standard error, which has all of these words."""
    assert done.code == 2, done.stderr
    assert re.fullmatch(r'error: .*\n', done.stderr), done.stderr  # one line: . is no line break
    assert 'Traceback' not in done.stderr
    for word in words:
        assert word in done.stderr, f'{word!r} is not in {done.stderr!r}'


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(name, cli, tmp_path):
    arguments, words = MISTAKES[name]
    assert_mistake(cli(TINY, f'--workdir={tmp_path / "run"}', '--quiet', *arguments), words)
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
    assert_mistake(cli(f'--config={spec}', f'--workdir={tmp_path / "run"}'), words)
    assert not list(tmp_path.iterdir())


CONFIG_FILE = """
from tests.configs import tiny


def get_config():
    c = tiny.get_config()
{lines}
    return c
"""


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
        (
            '    c.steps = [][0]',
            ['get_config() raised IndexError: list index out of range', 'mine.py, line'],
        ),
        ('    raise SystemExit(3)', ['get_config() raised SystemExit: 3', 'mine.py, line']),
        ('    1 / 0', ['get_config() raised ZeroDivisionError', 'mine.py, line']),
        ('    return None', ['expected get_config()', 'to return a ConfigDict, got NoneType']),
    ],
)
def test_mistakes_in_a_config_file(lines, words, cli, tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(CONFIG_FILE.format(lines=lines))
    assert_mistake(cli(f'--config={file}', f'--workdir={tmp_path / "run"}'), words)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--config.model.towers.video.name=vat'], ["config.model.towers.video.name='vat'", 'vit']),
        (['--config.evals.sync.limt=3'], ['config.evals', 'limt']),
        (['--config.optimizer.schedule.warmup=9999'], ['schedule.warmup=9999']),
        (['--config.model.towers.audio.patch=99999'], ['config.model.towers.audio.patch', '99999']),
        (['--config.data.make.seconds=1.0'], ['seconds=1.0', 'leave less than']),
        # Own videos: no playground is made.
        (['--config.data.train={"mine": {"path": "nowhere"}}'], ['nowhere does not exist']),
    ],
)
def test_mistakes_are_errors_before_the_playground_is_rendered(arguments, words, cli, tmp_path):
    done = cli(
        '--config=configs/demo.py',
        f'--workdir={tmp_path / "run"}',
        f'--config.data.make.path={tmp_path / "world"}',
        *arguments,
    )
    assert_mistake(done, words)
    assert not list(tmp_path.iterdir())


def test_workdir_that_is_a_file(cli, tmp_path):
    file = tmp_path / 'run'
    file.write_text('mine')
    done = cli(TINY, f'--workdir={file}')
    assert_mistake(done, [f'--workdir={file}: expected a folder, this is a file'])
    assert file.read_text() == 'mine'


@pytest.mark.parametrize(
    'arguments, words',
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
def test_mistakes_leave_an_existing_run_alone(arguments, words, trained, cli):
    workdir, _ = trained
    before = runs.snapshot(workdir)
    assert_mistake(cli(TINY, f'--workdir={workdir}', '--quiet', *arguments), words)
    assert runs.snapshot(workdir) == before


@pytest.mark.parametrize('mode', ['train', 'eval', 'embed'])
@pytest.mark.parametrize(
    'damage, word',
    [
        ('arrays', 'damaged'),
        ('meta', 'damaged'),
        ('config', 'cannot be read'),
    ],
)
def test_unreadable_checkpoint(mode, damage, word, trained_copy, cli):
    arguments = [f'--workdir={trained_copy}', f'--mode={mode}', '--quiet']
    if damage == 'config':
        (trained_copy / 'config.json').write_text('{"steps": 4,')
    else:
        arguments.append('--config.steps=8')
        # Orbax puts the bytes of arrays into folders named d.
        folder_name = {'arrays': 'd', 'meta': 'meta'}[damage]
        damaged = [
            path
            for path in (trained_copy / 'checkpoints').rglob(f'{folder_name}/*')
            if path.is_file()
        ]
        assert damaged
        for path in damaged:
            path.write_bytes(b'')
    before = runs.snapshot(trained_copy)
    assert_mistake(cli(*arguments), [str(trained_copy), word])
    assert runs.snapshot(trained_copy) == before


def test_a_mistake_from_a_real_shell(tmp_path):
    done = shell('run.py', TINY, f'--workdir={tmp_path / "run"}', '--config.batchsize=4')
    assert_mistake(done, ["no field 'batchsize'", "did you mean 'batch_size'?"])
    assert done.stdout == ''
    assert not (tmp_path / 'run').exists()


CORE_DEPENDENCIES_ALONE = """
import sys
for name in (
    'tensorflow', 'tensorflow_datasets', 'array_record', 'av', 'soxr', 'tokenizers',
    'sentencepiece',
):
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
features = model.embed(text='red stripes move', audio=np.zeros(1024, np.int16))
print('embedded', features['text']['vat'].shape)
"""


def test_trains_and_embeds_without_tensorflow(tmp_path):
    """With core dependencies alone every module is imported, a run trains, evaluates and reports.

    Its checkpoint embeds.
    """
    workdir = tmp_path / 'run'
    done = shell(
        '-c',
        CORE_DEPENDENCIES_ALONE,
        TINY,
        '--quiet',
        '--config.steps=3',
        '--config.report=true',
        f'--workdir={workdir}',
    )
    assert done.code == 0, done.stderr[-3000:]
    assert 'embedded (8,)' in done.stdout
    assert (workdir / 'report' / 'index.html').exists()


@pytest.mark.parametrize(
    'platform, jax_cache, field, expected',
    [
        ('tpu', None, '', 'RUN/compiled'),
        ('tpu', '/jax', '', '/jax'),
        ('tpu', '/jax', '/own', '/own'),
        ('cpu', None, '', None),
        ('cpu', None, '/own', '/own'),
    ],
)
def test_compiled_programs_are_stored_for_the_next_start(
    tmp_path, monkeypatch, platform, jax_cache, field, expected
):
    before = jax.config.jax_compilation_cache_dir
    config = tiny.config(compilation_cache=field)
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    if expected is not None:
        expected = expected.replace('RUN', str(tmp_path))
    try:
        jax.config.update('jax_compilation_cache_dir', jax_cache)
        process.keep_compiled(config, tmp_path)
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
