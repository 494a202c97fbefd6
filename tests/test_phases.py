"""config.phases: trainings one after the other in one run folder."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
import run as command
import vatt_jax
from configs import default
from tests import runs, tiny
from tests.configs import phases as tiny_phases
from tests.configs import tiny as tiny_config
from vatt_jax import config as configs
from vatt_jax import models, objectives, phase_folders, phases
from vatt_jax.config import ConfigError
from vatt_jax.inputs.batch import place_on_mesh
from vatt_jax.modes import plan as plan_mode
from vatt_jax.modes import train, train_phases
from vatt_jax.objectives.contrastive import Contrastive
from vatt_jax.parallel.distributed import StopSignal
from vatt_jax.planning import plan as plans
from vatt_jax.planning import reading
from vatt_jax.reporting.finished_run import FinishedRun
from vatt_jax.rng import Rng
from vatt_jax.training import checkpoint, loop, start

CONFIG = '--config=tests/configs/phases.py'


def resolved(*given, **fields):
    """The phases of a default config with these fields."""
    config = default.get_config()
    config.phases = given
    config.update(fields)
    return phases.resolve(config, pathlib.Path('runs/chain'))


def run(workdir, config, open_data=data_pipelines.open):
    """Trains all phases; returns done.json, None where the run was stopped before its end."""
    config = config.copy_and_resolve_references()
    configs.check_fields(config, default.get_config())
    train_phases.run(config, workdir, open_data, quiet=True)
    file = workdir / 'done.json'
    return json.loads(file.read_text()) if file.exists() else None


def digests(done):
    """What two runs are compared by: everything but how long it took."""
    return {
        name: {field: value for field, value in summary.items() if field != 'seconds'}
        for name, summary in done['phases'].items()
    }


def variables(folder, **trees):
    """The newest model of a run folder, as NumPy; `trees` as for `read_model`."""
    return checkpoint.read_model(checkpoint.find(folder), **trees)


def loss_lines(folder):
    """The lines of metrics.jsonl that are of training steps."""
    return [line for line in runs.log_lines(folder) if 'loss' in line]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder, done.json) of two phases that were never interrupted."""
    folder = tmp_path_factory.mktemp('phases') / 'whole'
    return folder, run(folder, tiny_phases.get_config())


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of that folder, to be written to."""
    return shutil.copytree(whole[0], tmp_path / 'copied')


@pytest.fixture
def cli(monkeypatch, capfd):
    """Calls run.py's own entry in this process; returns (exit code, output)."""

    def leave(code):
        raise SystemExit(code)

    def call(*argv):
        monkeypatch.setattr(sys, 'argv', ['run.py', *argv])
        monkeypatch.setattr(os, '_exit', leave)
        code = 0
        capfd.readouterr()
        try:
            command.entry()
        except SystemExit as error:
            code = error.code
        return code, ''.join(capfd.readouterr())

    return call


# ---- configs


def test_a_phase_is_the_config_with_some_fields_changed():
    first, second = resolved(
        ('rgb', {'steps': 7, 'optimizer': {'schedule': {'peak': 1}}, 'optimizer.clip': 2}),
        ('flow', {'evals': {'probe': {'type': 'linear_probe'}}, 'objective.form': 'clip'}),
        steps=9,
        name='both',
    )
    assert (first.number, first.name, second.number, second.name) == (1, 'rgb', 2, 'flow')
    assert first.folder == pathlib.Path('runs/chain/phases/1-rgb').absolute()
    assert (first.config.steps, second.config.steps) == (7, 9)
    # Types are those of the fields, other fields of a group stay.
    assert repr(first.config.optimizer.schedule.peak) == '1.0'
    assert first.config.optimizer.schedule.warmup == 5000
    assert first.config.optimizer.clip == 2.0
    # Groups whose names are free are replaced, and fields added to them.
    assert second.config.evals.to_dict() == {'probe': {'type': 'linear_probe'}}
    assert second.config.objective.to_dict() == {'name': 'contrastive', 'form': 'clip'}
    assert first.config.objective.to_dict() == {'name': 'contrastive'}
    assert (first.config.name, first.config.phases) == ('both: rgb', ())


def test_phases_survive_json_and_the_check_of_fields():
    config = default.get_config()
    config.phases = [('rgb', ConfigDict({'steps': 7, 'data': {'views': [('a', {'b': 1})]}}))]
    configs.check_fields(config, default.get_config())
    stored = configs.from_json(configs.to_json(config))
    assert stored.phases == (('rgb', {'steps': 7, 'data': {'views': (('a', {'b': 1}),)}}),)
    assert not configs.differing_fields(config, stored)


def test_references_are_folders_of_earlier_phases_wherever_they_stand():
    phase = resolved(
        ('rgb', {}),
        ('flow', {}),
        ('again', {'init_from': 'phase:rgb', 'objective.samplers': ('phase:flow', 'runs/other')}),
    )[-1]
    beside = str(pathlib.Path('runs/chain/phases').absolute())
    assert phase.config.init_from == f'{beside}/1-rgb'
    assert phase.config.objective.samplers == (f'{beside}/2-flow', 'runs/other')


@pytest.mark.parametrize(
    'given, message',
    [
        (('rgb',), 'expected pairs of a name and the fields'),
        ((('rgb', 'steps'),), r'config\.phases\.rgb: expected a dictionary'),
        ((('rgb', {3: 4}),), r'config\.phases\.rgb: expected a dictionary'),
        ((('r/gb', {}),), "expected a name of letters.*'r/gb'"),
        ((('rgb', {}), ('rgb', {})), "two of them are named 'rgb'"),
        ((('rgb', {'stepz': 3}),), r"config\.phases\.rgb: config has no field 'stepz'.*'steps'"),
        ((('rgb', {'optimizer': {'klip': 3}}),), r"phases\.rgb: config\.optimizer has no .*'klip'"),
        ((('rgb', {'steps': 'many'}),), r'config\.phases\.rgb: steps: expected int'),
        ((('rgb', {'steps.x': 3}),), r'steps is a value, not a group'),
        ((('rgb', {'optimizer': 3}),), r'optimizer is a group of fields'),
        ((('rgb', {'jax_platform': 'cpu'}),), 'the same in all phases; set config.jax_platform'),
        ((('rgb', {'phases': ()}),), 'the same in all phases'),
        ((('rgb', {'init_from': 'phase:rgb'}),), "'phase:rgb' does not come before it.*the first"),
        (
            (('a', {}), ('b', {'init_from': 'phase:c'}), ('c', {})),
            "phases.b: 'phase:c' does not come before it; expected an earlier phase, one of a",
        ),
        ((('a', {}), ('b', {'init_from': 'phase:x'})), "'phase:x' is no phase.*one of a"),
    ],
)
def test_mistakes_in_phases_are_sentences(given, message):
    with pytest.raises(ConfigError, match=message):
        resolved(*given)


def test_a_field_of_one_phase_is_set_from_the_command_line():
    config = tiny_phases.get_config()
    assignments = [
        ('phases.text.steps', '5'),
        ('phases.text.objective.form', 'clip'),
        ('phases.audio.evals', "{'probe': {'type': 'linear_probe'}}"),
        ('steps', '3'),
    ]
    phases.override(config, assignments)
    audio, text = phases.resolve(config, pathlib.Path('runs/chain'))
    assert (audio.config.steps, text.config.steps) == (3, 5)
    assert text.config.objective.form == 'clip'
    assert audio.config.evals.to_dict() == {'probe': {'type': 'linear_probe'}}


@pytest.mark.parametrize(
    'path, text, message',
    [
        ('phases.video.steps', '5', "there is no phase 'video'; there are audio, text"),
        ('phases.text', '5', r'such as phases\.text\.steps'),
        ('phases.text.steps', 'x', 'expected int'),
        ('phases.text.stepz', '5', "no field 'stepz'"),
    ],
)
def test_mistakes_on_the_command_line_are_sentences(path, text, message):
    with pytest.raises(ConfigError, match=message):
        phases.override(tiny_phases.get_config(), [(path, text)])


def test_a_title_is_no_reference(tmp_path):
    phases.check_has_none(tiny.config(name='phase: one'), tmp_path)


def test_a_reference_outside_of_phases_is_refused(tmp_path):
    config = tiny.config(init_from='phase:rgb')
    with pytest.raises(ConfigError, match="config.init_from='phase:rgb' refers to a phase"):
        train.run(config, tmp_path / 'run', data_pipelines.open)


def test_the_example_of_the_page_is_taken(tmp_path):
    page = (pathlib.Path(__file__).parent.parent / 'docs' / 'phases.md').read_text()
    example, *_ = re.findall(r'```python\n(.*?)```', page, re.S)
    (tmp_path / 'two_phases.py').write_text(example)
    config = configs.load(str(tmp_path / 'two_phases.py'))
    configs.check_fields(config, default.get_config())
    sound, words = phases.resolve(config, tmp_path)
    assert words.config.init_from == str(sound.folder)
    train_phases._check_configs([sound, words])


# ---- training


def begin(config):
    """The state that a run of this config begins with, and its origin in words."""
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    with jax.set_mesh(built.mesh):
        begun = start._begin(config, built, data)
    return jax.device_get(begun.state), begun.origin


def test_the_second_phase_starts_from_the_first(whole):
    """Its model is the first one's, bit for bit, but for what is skipped."""
    folder, _ = whole
    first = variables(folder / 'phases' / '1-audio')['params']
    config = resolve_tiny(folder)[1]
    state, origin = begin(config)
    assert f'starting from {folder}/phases/1-audio' in origin
    params = state.params['model']
    for name in ('encoders_video', 'fronts_video'):
        chex.assert_trees_all_equal(params[name], first[name], strict=True)
    fresh, _ = begin(ConfigDict({**config, 'init_from': ''}))
    for name in ('encoders_text', 'fronts_text'):
        assert name not in first
        chex.assert_trees_all_equal(params[name], fresh.params['model'][name], strict=True)
    # And this is where it went on from: the loss of its first step is that of this state.
    logged = [line['loss'] for line in loss_lines(folder / 'phases' / '2-text')]
    assert logged[0] == pytest.approx(first_loss(config, state), rel=1e-5)


def first_loss(config, state):
    """The loss of the first step from this state."""
    data = data_pipelines.open(config)
    built = loop.build(config, data)
    batches = data.train(0, config.batch_size)
    with jax.set_mesh(built.mesh):
        state = jax.device_put(state, built.shardings)
        _, metrics = built.step(state, place_on_mesh(next(batches), built.mesh))
    batches.close()
    return float(metrics['loss'])


def test_each_phase_is_a_run_folder(whole):
    folder, done = whole
    assert list(done['phases']) == ['audio', 'text']
    for phase, config in zip(('1-audio', '2-text'), resolve_tiny(folder), strict=True):
        own = folder / 'phases' / phase
        assert [line['step'] for line in loss_lines(own)] == [1, 2, 3, 4]
        assert runs.done(own)['digests']
        assert list((own / 'tensorboard').glob('events*'))
        assert configs.stored(own).objective == config.objective
    assert configs.stored(folder).phases == tiny_phases.get_config().phases


def resolve_tiny(folder):
    """The configs of the phases of tests/configs/phases.py."""
    return [phase.config for phase in phases.resolve(tiny_phases.get_config(), folder)]


class stop_after:
    """SIGTERM's effect after so many steps of all phases together, without a signal."""

    def __init__(self, num_steps):
        self.num_left = num_steps

    def __enter__(self):
        self.original = StopSignal.should_stop
        StopSignal.should_stop = lambda *_: self.count()

    def count(self):
        self.num_left -= 1
        return self.num_left <= 0

    def __exit__(self, *_):
        StopSignal.should_stop = self.original


def test_stopped_in_each_phase_and_continued_is_exact(whole, tmp_path):
    folder, expected = whole
    with stop_after(3):
        assert run(tmp_path, tiny_phases.get_config()) is None
    assert [path.name for path in phase_folders.begun(tmp_path)] == ['1-audio']
    with stop_after(2):
        assert run(tmp_path, tiny_phases.get_config()) is None
    assert phase_folders.last_finished(tmp_path).name == '1-audio'
    done = run(tmp_path, tiny_phases.get_config())
    assert digests(done) == digests(expected)
    for phase in ('1-audio', '2-text'):
        assert runs.log_lines(tmp_path / 'phases' / phase) == runs.log_lines(
            folder / 'phases' / phase
        )


def test_killed_between_phases_and_continued_is_exact(whole, tmp_path, monkeypatch):
    _, expected = whole
    training = train_phases.Training.run

    def killed_in_the_second(self, *arguments):
        if self.workdir.name == '2-text':
            raise KeyboardInterrupt
        return training(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_phases.Training, 'run', killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tiny_phases.get_config())
    assert [path.name for path in phase_folders.all_folders(tmp_path)] == ['1-audio']
    # What is finished is not even opened.
    first = runs.snapshot(tmp_path / 'phases' / '1-audio')
    assert digests(run(tmp_path, tiny_phases.get_config())) == digests(expected)
    assert runs.snapshot(tmp_path / 'phases' / '1-audio') == first


def test_a_signal_between_steps_ends_the_chain_and_not_one_phase_alone(tmp_path, monkeypatch):
    """SIGTERM once the last check of the first phase is over: the second one does not begin."""
    finish = train_phases.loop.train

    def train_and_signal(*arguments, **options):
        with StopSignal():  # as the one of the loop, inside of that of all phases
            result = finish(*arguments, **options)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train.loop, 'train', train_and_signal)
    assert run(tmp_path, tiny_phases.get_config()) is None
    assert [path.name for path in phase_folders.begun(tmp_path)] == ['1-audio']
    assert phase_folders.last_finished(tmp_path).name == '1-audio'


@pytest.mark.slow
def test_data_are_opened_once_for_phases_that_read_the_same(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(train_phases, '_train', lambda phase, data, *_: data.open(phase.config))
    monkeypatch.setattr(train_phases, '_finish', lambda *_: None)

    def open_data(config):
        opened.append(config.data.synthetic_size)
        return object()

    config = tiny_phases.get_config()
    config.phases = (
        ('a', {}),
        ('b', {'steps': 3}),
        ('c', {'data.synthetic_size': 48}),
        ('d', {'data.synthetic_size': 48}),
    )
    run(tmp_path, config, open_data)
    assert opened == [40, 48]


def test_a_moved_run_goes_on_and_its_phases_find_one_another(copied):
    assert configs.stored(copied / 'phases' / '2-text').init_from == f'{copied}/phases/1-audio'
    text = (copied / 'phases' / '2-text' / 'config.json').read_text()
    assert '"init_from": "phase:audio"' in text
    done = run(copied, tiny_phases.get_config('longer'))
    assert list(done['phases']) == ['audio', 'text', 'more']
    losses = [line['loss'] for line in loss_lines(copied / 'phases' / '3-more')]
    assert losses != [line['loss'] for line in loss_lines(copied / 'phases' / '2-text')]


# ---- mistakes before the first phase


def with_second(**fields):
    """The config of two phases, with these fields of the second changed."""
    config = tiny_phases.get_config()
    (_, audio), (name, text) = config.phases
    changes = {path.replace('__', '.'): value for path, value in fields.items()}
    config.phases = (('audio', audio), (name, {**text, **changes}))
    return config


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'objective__form': 'klip'}, 'phase text: config.objective.form='),
        ({'objective__nme': 'x'}, 'phase text: config.objective.nme='),
        ({'model__towers__video__width': 30}, 'phase text: '),
        ({'init_skip': ()}, 'phase text: config.init_from=.*has no parameter .*init_skip'),
        ({'init_skip': ('(',)}, r'phase text: config.init_skip: .* is not a regular expression'),
        ({'init_trees': ('modle',)}, "phase text: config.init_trees='modle': choose one of model"),
        ({'init_trees': ()}, r'phase text: config.init_trees=\(\): expected some of'),
        ({'evals': {'x': {'type': 'y'}}}, 'phase text: '),
        ({'batch_size': 0}, 'phase text: config.batch_size=0'),
    ],
)
def test_mistakes_of_later_phases_are_found_before_the_first(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / 'run', with_second(**fields), open_data=lambda _: pytest.fail('opened'))
    assert not (tmp_path / 'run').exists()


def test_another_model_of_a_finished_phase_is_refused(whole):
    config = tiny_phases.get_config()
    config.model.towers.video.layers = 2
    before = runs.snapshot(whole[0])
    with pytest.raises(ConfigError, match='phase audio: .*layers=1 and this config has 2'):
        run(whole[0], config)
    assert runs.snapshot(whole[0]) == before


def test_other_phases_than_those_of_the_folder_are_refused(whole):
    config = tiny_phases.get_config()
    config.phases = (('new', {}), *config.phases)
    with pytest.raises(ConfigError, match='holds the phase 1-audio.*1-new, 2-audio, 3-text'):
        run(whole[0], config)


def test_other_steps_of_a_phase_that_was_started_from_are_refused(whole):
    config = tiny_phases.get_config()
    config.steps = 5
    with pytest.raises(ConfigError, match='phase audio has taken its 4 steps .* steps=5'):
        run(whole[0], config)


def test_folders_with_and_without_phases_are_not_mixed(whole, plain_run):
    with pytest.raises(ConfigError, match='holds a run without phases, and this config has 2'):
        run(plain_run, tiny_phases.get_config())
    with pytest.raises(ConfigError, match='holds a run with phases, and this config has none'):
        train.run(tiny.config(), whole[0], data_pipelines.open)


def test_a_second_process_is_refused(copied):
    from vatt_jax.training.run_lock import RunLock

    lock = RunLock(copied)
    done = (copied / 'done.json').read_bytes()
    script = (
        'import pathlib, sys\n'
        'from vatt_jax.training.run_lock import RunLock\n'
        f'lock = RunLock(pathlib.Path({str(copied)!r}))\n'
        'lock.acquire()\n'
        'print("held", flush=True)\n'
        'sys.stdin.read()\n'
    )
    import subprocess

    with subprocess.Popen(
        [sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(ConfigError, match='trains in it'):
            run(copied, tiny_phases.get_config('longer'))
    assert (copied / 'done.json').read_bytes() == done
    lock.acquire()
    lock.close()


# ---- trees of earlier phases


class Remembering(Contrastive):
    """Video with audio; remembers how often each record was seen, and holds an earlier model."""

    def __init__(self, config):
        own = dict(config)
        self.sampler = own.pop('sampler')
        own.pop('sampler_model', None)
        super().__init__(ConfigDict({**own, 'name': 'contrastive'}))

    def frozen_models(self):
        return {'sampler': self.sampler}

    def init(self, key, spec):
        params, _ = super().init(key, spec)
        model = models.build(configs.stored(self.sampler).model, 'float32')
        rng = Rng.create(0, 0, jnp.zeros(spec.batch['index'].shape, jnp.uint32))
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec.batch)
        made = nn.meta.unbox(model.init(key, batch, train=False, rng=rng))
        sampler = {'params': made['params'], 'batch_stats': made.get('batch_stats', {})}
        return params, {'seen': jnp.zeros(spec.size, jnp.int32), 'sampler': sampler}

    def compute_loss(self, model, variables, params, state, pooled, batch, rng):
        loss = super().compute_loss(model, variables, params, state, pooled, batch, rng)
        seen = state['seen'].at[batch['record']].add(1)
        return loss.replace(state={**state, 'seen': seen})


REMEMBERING = {**tiny_phases.AUDIO, 'name': 'remembering', 'learn_temperature': True}


@pytest.fixture(scope='module')
def remembered(tmp_path_factory):
    """The folder of three phases: audio; mined with the first's model; both once more."""
    folder = tmp_path_factory.mktemp('remembered')
    config = tiny_phases.get_config()
    mined = {'objective': {**REMEMBERING, 'sampler': 'phase:audio'}, 'init_from': 'phase:audio'}
    again = {
        'objective': {**REMEMBERING, 'sampler': 'phase:mined'},
        'init_from': 'phase:mined',
        'init_trees': ('model', 'objective', 'state'),
        # So that what it began with is what it ends with.
        'optimizer.frozen': ('^objective/',),
    }
    config.phases = (
        ('audio', {'objective': tiny_phases.AUDIO}),
        ('mined', mined),
        ('again', again),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(objectives.OBJECTIVES, 'remembering', Remembering)
        run(folder, config)
    return folder


@pytest.mark.slow
def test_an_objective_holds_the_frozen_model_of_an_earlier_phase(remembered):
    audio, mined, again = phase_folders.begun(remembered)
    for phase, source in ((mined, audio), (again, mined)):
        sampler = variables(phase, state=True)['state']['sampler']
        chex.assert_trees_all_equal(sampler['params'], variables(source)['params'], strict=True)


@pytest.mark.slow
def test_a_phase_starts_from_what_an_earlier_one_remembers(remembered):
    _, mined, again = phase_folders.begun(remembered)
    first = variables(mined, objective=True, state=True)
    second = variables(again, objective=True, state=True)
    # Four steps of eight clips each.
    assert first['state']['seen'].sum() == 32
    assert second['state']['seen'].sum() == 64
    assert (second['state']['seen'] >= first['state']['seen']).all()
    assert np.ptp(np.asarray(first['objective']['log_scale'])) == 0
    assert first['objective']['log_scale'] != np.float32(np.log(1 / 0.07))
    chex.assert_trees_all_equal(second['objective'], first['objective'], strict=True)


def start_from(folder, **fields):
    """The state that a run with the objective of `remembered` begins with."""
    config = tiny_phases.get_config()
    config.phases = ()
    sampler = str(folder / 'phases' / '1-audio')
    config.objective = ConfigDict({**REMEMBERING, 'sampler': sampler})
    config.init_from = str(folder / 'phases' / '2-mined')
    for name, value in fields.items():
        config[name] = value
    return begin(config)[0]


@pytest.fixture
def remembering(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, 'remembering', Remembering)


@pytest.mark.slow
def test_only_the_trees_that_are_listed_are_taken(remembered, remembering):
    there = variables(remembered / 'phases' / '2-mined', objective=True, state=True)
    state = start_from(remembered, init_trees=('state',), init_skip=('^state/sampler',))
    chex.assert_trees_all_equal(state.objective['seen'], there['state']['seen'])
    assert state.params['objective']['log_scale'] != there['objective']['log_scale']
    kernel = state.params['model']['fronts_video']['patch']['kernel']
    assert (kernel != there['params']['fronts_video']['patch']['kernel']).any()

    state = start_from(remembered, init_trees=('objective',))
    assert state.params['objective']['log_scale'] == there['objective']['log_scale']
    assert state.objective['seen'].sum() == 0

    renamed = ((r'^objective/log_scale$', 'objective/log_scale'), (r'^state/seen$', 'state/had'))
    with pytest.raises(ConfigError, match="it has no array 'state/had' .for 'state/seen'."):
        start_from(remembered, init_trees=('state',), init_rename=renamed)
    with pytest.raises(ConfigError, match='leaves every parameter out'):
        start_from(remembered, init_trees=('state',), init_skip=('^state/',))


@pytest.mark.slow
def test_trees_that_the_objective_lacks_and_shapes_that_differ_are_named(remembered, remembering):
    with pytest.raises(ConfigError, match='state/seen has shape .40,., this objective wants .48,.'):
        bigger = tiny_phases.get_config().data
        bigger.synthetic_size = 48
        start_from(remembered, init_trees=('model', 'state'), data=bigger)
    with pytest.raises(ConfigError, match="the objective of this config has no state; .*'state'"):
        start_from(remembered, init_trees=('state',), objective=ConfigDict(tiny_phases.AUDIO))


# ---- what reads a run folder


def test_the_model_of_a_run_is_that_of_its_last_finished_phase(whole, tmp_path):
    folder, _ = whole
    expected = variables(folder / 'phases' / '2-text')['params']
    chex.assert_trees_all_equal(variables(folder)['params'], expected)
    model = vatt_jax.load(folder)
    assert model.config.name == 'two phases: text'
    assert set(model.modalities) == {'video', 'text'}
    assert vatt_jax.load(folder / 'phases' / '1-audio').config.name == 'two phases: audio'
    assert FinishedRun(folder).path.name == '2-text'

    copy = shutil.copytree(folder, tmp_path / 'copy')
    (copy / 'phases' / '2-text' / 'done.json').unlink()
    assert vatt_jax.load(copy).config.name == 'two phases: audio'
    (copy / 'phases' / '1-audio' / 'done.json').unlink()
    with pytest.raises(ConfigError, match='no checkpoint of a finished phase.*2-text'):
        vatt_jax.load(copy)


def test_modes_read_the_last_finished_phase(copied, cli):
    """Evaluation with the run's own config and with the chain's, embeddings, export."""
    workdir = f'--workdir={copied}'
    last = copied / 'phases' / '2-text'
    code, output = cli('--mode=eval', workdir, f'--config.evals={{"probe": {tiny_config.PROBE}}}')
    assert code == 0, output
    assert (last / 'evals' / 'step_000004' / 'results.json').exists()
    code, output = cli('--mode=embed', workdir, '--split=test')
    assert code == 0, output
    with np.load(last / 'embeddings' / 'test.npz') as arrays:
        assert {'pooled/video', 'pooled/text'} <= set(arrays.files)
    # With the config of all phases, of the run and of one phase.
    for workdir in (copied, copied / 'phases' / '1-audio'):
        code, output = cli('--mode=eval', CONFIG, f'--workdir={workdir}')
        assert code == 0, output


def test_evaluation_and_pages_are_made_for_finished_phases(copied, cli):
    """The same phases with evaluators and a report: nothing is trained, the rest is made up for."""
    code, output = cli(f'{CONFIG}:reported', f'--workdir={copied}', '--quiet')
    assert code == 0, output
    assert 'compiling the training step' not in output
    for phase in ('1-audio', '2-text'):
        assert (copied / 'phases' / phase / 'evals' / 'random_init' / 'results.json').exists()
        assert (copied / 'phases' / phase / 'report' / 'index.html').exists()
    page = (copied / 'report' / 'index.html').read_text()
    links = re.findall('href="([^"]*)"', page)
    assert len(links) == 2
    for link in links:
        assert (copied / 'report' / link).exists()
    for text in ('phase audio', 'scratch', '4 of 4', 'probe accuracy', 'two phases: audio, seed 0'):
        assert text in page, text


@pytest.mark.slow
def test_each_phase_is_planned(tmp_path):
    log = tmp_path / 'log'
    workdir = tmp_path / 'plan'
    process = runs.start(CONFIG, '--mode=plan', '--topology=cpu:1', f'--workdir={workdir}', log=log)
    assert runs.finish(process, log) == 0, log.read_text()
    output = log.read_text()
    assert 'phase 1 of 2: audio' in output
    assert 'phase 2 of 2: text' in output
    for phase in ('1-audio', '2-text'):
        assert len(list((workdir / 'phases' / phase / 'plan').glob('*.json'))) == 1
        assert configs.stored(workdir / 'phases' / phase).model.towers.text.vocab > 0
    assert phase_folders.begun(workdir) == []


def test_a_phase_that_holds_an_earlier_model_is_planned_before_that_is_trained(
    tmp_path, remembering, monkeypatch
):
    """Each phase in its own folder, and the config of the first where the second looks for it."""
    planned = []

    def plan_one(config, data, target, folder, *_):
        built = loop.assemble(config, data, loop.mesh_of(config))
        planned.append((folder.parent.name, sorted(built.shape.objective)))
        return {}

    monkeypatch.setattr(plans, 'plan', plan_one)
    monkeypatch.setattr(plans, 'table', lambda _: '')
    monkeypatch.setattr(jax.config, 'update', lambda *_: None)
    monkeypatch.setattr(reading, 'measure', lambda *_: None)
    config = tiny_phases.get_config()
    mined = {'objective': {**REMEMBERING, 'sampler': 'phase:audio'}, 'init_from': 'phase:audio'}
    config.phases = (('audio', {'objective': tiny_phases.AUDIO}), ('mined', mined))
    plan_mode.run(config, tmp_path, data_pipelines.open_or_synthetic, 'cpu:8')
    assert planned == [('1-audio', []), ('2-mined', ['sampler', 'seen'])]
    assert phase_folders.begun(tmp_path) == []


# ---- kills, several processes


@pytest.mark.slow
def test_two_processes_train_phases_together(tmp_path):
    """Evaluation and pages between phases too: the same order of examples as one process has."""

    def start_processes(workdir, count):
        started, logs = [], []
        coordinator = f'127.0.0.1:{runs.free_port()}'
        for i in range(count):
            log = tmp_path / f'{workdir.name}{i}.txt'
            process = runs.start(
                f'{CONFIG}:reported',
                f'--workdir={workdir}',
                '--config.mesh.replica=-1',
                '--quiet',
                log=log,
                devices=8 // count,
                VATT_COORDINATOR=coordinator if count > 1 else '',
                VATT_PROCESSES=str(count) if count > 1 else '',
                VATT_PROCESS=str(i) if count > 1 else '',
            )
            started.append(process)
            logs.append(log)
        for process, log in zip(started, logs, strict=True):
            assert runs.finish(process, log) == 0, log.read_text()[-3000:]

    start_processes(tmp_path / 'one', 1)
    start_processes(tmp_path / 'two', 2)
    one, two = runs.done(tmp_path / 'one'), runs.done(tmp_path / 'two')
    for name in ('audio', 'text'):
        assert two['phases'][name]['order'] == one['phases'][name]['order']
    for phase in ('1-audio', '2-text'):
        expected = [line['loss'] for line in loss_lines(tmp_path / 'one' / 'phases' / phase)]
        losses = [line['loss'] for line in loss_lines(tmp_path / 'two' / 'phases' / phase)]
        # What differs by rounding alone, Adam's first steps magnify, and the second phase begins
        # with parameters that four of them have made.
        np.testing.assert_allclose(losses, expected, rtol=1e-2)
        if phase == '1-audio':
            # The rate was 0 in step 1: both losses are of equal parameters.
            np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-6)
        assert (tmp_path / 'two' / 'phases' / phase / 'report' / 'index.html').exists()
    assert (tmp_path / 'two' / 'report' / 'index.html').exists()


@contextlib.contextmanager
def started(workdir, log):
    process = runs.start(CONFIG, f'--workdir={workdir}', '--quiet', log=log)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_ends_with_the_same_numbers(tmp_path):
    """kill -9 and SIGTERM after random times, which fall into both phases and between them."""
    reference = tmp_path / 'reference'
    with started(reference, tmp_path / 'reference.txt') as process:
        assert runs.finish(process, tmp_path / 'reference.txt') == 0
    rng = random.Random(0)
    log, workdir = tmp_path / 'log.txt', tmp_path / 'run'
    seen = set()
    for attempt in range(40):
        with started(workdir, log) as process:
            if attempt == 0:
                # However fast the machine: the first kill is in the first phase.
                while process.exitcode is None and not phase_folders.begun(workdir):
                    time.sleep(0.01)
            else:
                process.join(rng.uniform(3, 25))
            if rng.random() < 0.3:
                process.terminate()
                process.join(60)
        seen.add(len(phase_folders.begun(workdir)))
        if (workdir / 'done.json').exists():
            break
    assert {1, 2} <= seen
    with started(workdir, log) as process:
        assert runs.finish(process, log) == 0, log.read_text()
    assert digests(runs.done(workdir)) == digests(runs.done(reference))
