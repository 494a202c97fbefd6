"""Configs: overrides, stored configs, and mistakes.

A mistake is one sentence that names field, value and remedy, before anything is built.
"""

import json
import warnings

import pytest
from ml_collections import ConfigDict

from configs import default, demo, selavi
from vatt_jax import config as configs
from vatt_jax import optim
from vatt_jax.config import ConfigError


def default_with(**overrides):
    """The default config with fields from the command line; __ stands for the dots of a path."""
    config = default.get_config()
    pairs = [(name.replace('__', '.'), text) for name, text in overrides.items()]
    configs.override(config, pairs)
    return config


def assert_same_fields(a, b):
    assert configs.differing_fields(a, b) == []


@pytest.mark.parametrize(
    'spec',
    [
        *(f'configs/demo.py:{variant}' for variant in demo.VARIANTS),
        *(f'configs/selavi.py:demo,{method}' for method in selavi.METHODS),
        'configs/selavi.py:demo,synthetic',
        'configs/finetune.py',
        'configs/finetune.py:scratch',
        'configs/vatt_finetune.py:demo,20',
        'configs/vatt_finetune.py:demo,20,scratch',
    ],
)
def test_small_configs_pass_the_checks(spec):
    config = configs.load(spec)
    configs.check_fields(config, default.get_config())
    configs.check_values(config)
    optim.check(config.optimizer, config.steps)


def test_overrides_keep_types():
    config = default_with(
        batch_size='64',
        optimizer__schedule__peak='1e-3',
        data__crop='(0.5, 1)',
        model__scan='true',
        name='hello',
    )
    assert config.batch_size == 64
    assert config.optimizer.schedule.peak == 1e-3
    assert config.data.crop == (0.5, 1)
    assert config.model.scan is True
    assert config.name == 'hello'


@pytest.mark.parametrize(
    'path, text, words',
    [
        ('batchsize', '4', ['batchsize', "'batch_size'"]),
        ('optimizer.schedule.peek', '1', ['optimizer.schedule', 'peek', "'peak'"]),
        ('batch_size', '3.5', ['config.batch_size: expected int', 'got 3.5 (float)']),
        ('batch_size', 'many', ['config.batch_size: expected int', "got 'many' (str)"]),
        ('optimizer', 'adam', ['group', 'name']),
        ('seed.x', '1', ['seed', 'value']),
        ('model.scan', '1', ['config.model.scan: expected bool', 'got 1 (int)']),
    ],
)
def test_bad_overrides(path, text, words):
    with pytest.raises(ConfigError) as error:
        configs.override(default.get_config(), [(path, text)])
    for word in words:
        assert word in str(error.value)


def test_a_group_of_free_names_is_replaced_as_a_whole():
    """What docs/data.md says owners of videos should write."""
    config = demo.get_config()
    configs.override(
        config,
        [
            ('data.train', "{'mine': {'path': 'data/mine', 'weight': 2}}"),
            ('data.train.mine.weight', '3'),
            ('evals', "{'r': {'type': 'retrieval', 'pairs': [['a', 'b', 'c']]}}"),
        ],
    )
    assert config.data.train.to_dict() == {'mine': {'path': 'data/mine', 'weight': 3}}
    assert list(config.evals) == ['r']
    assert config.evals.r.pairs == (('a', 'b', 'c'),)
    configs.check_fields(config, default.get_config())


@pytest.mark.parametrize(
    'path, text, message',
    [
        ('data.train', 'data/mine', 'replace it by a dictionary in quotes, such as'),
        ('evals', '{1: 2}', 'a dictionary'),
        ('optimizer', "{'name': 'sgd'}", 'name one of them'),
    ],
)
def test_groups_that_cannot_be_replaced_so(path, text, message):
    config = demo.get_config()
    with pytest.raises(ConfigError, match=message):
        configs.override(config, [(path, text)])


@pytest.mark.parametrize(
    'path, text, message',
    [
        ('eval_every', '-1', 'config.eval_every=-1: expected a positive number, or 0 for none'),
        ('checkpoint.keep_every', '-2', 'config.checkpoint.keep_every=-2'),
        ('data.prefetch', '0', 'config.data.prefetch=0: expected a positive number'),
        ('data.flip', '1.5', 'config.data.flip=1.5: expected a number from 0 to 1'),
        ('data.crop', '(0.5,)', r'config.data.crop=\(0.5,\): expected two numbers'),
        ('data.crop', '(0.5, 2)', 'and at most 1'),
        ('data.aspect', '(0, 1)', 'config.data.aspect='),
        (
            'data.mismatch',
            "('smell',)",
            "config.data.mismatch='smell': choose one of audio, text, video",
        ),
        (
            'model.inputs.video.size',
            '0',
            'config.model.inputs.video.size=0: expected a positive number',
        ),
        (
            'model.inputs.video.fps',
            '0',
            'config.model.inputs.video.fps=0: expected a positive number',
        ),
        ('augment.saturation', '-1', 'config.augment.saturation=-1: expected a number from 0 to 1'),
        ('augment.brightness', '-1e999', 'config.augment.brightness=-inf: expected a number from'),
        ('augment.hue', '0.6', 'config.augment.hue=0.6: expected a number from 0 to 0.5'),
        ('seed', '-1', 'config.seed=-1: expected a number from 0 to 4.29497e'),
        (
            'steps',
            '10000000000',
            'config.steps=10000000000: expected a number of at most 2147483647',
        ),
        ('data.aspect', '(1, 1e999)', 'config.data.aspect='),
        (
            'evals',
            "{'a/b': {'type': 'sync'}}",
            "config.evals has an entry named 'a/b': expected let",
        ),
        ('data.train', "{' ': {}}", "config.data.train has an entry named ' '"),
    ],
)
def test_values_that_make_no_sense(path, text, message):
    config = default.get_config()
    configs.override(config, [(path, text)])
    with pytest.raises(ConfigError, match=message):
        configs.check_batch(config, devices=8, processes=1)


@pytest.mark.parametrize('text', ["{'a/../../b': {'type': 'sync'}}", "{'a': {'b.c': 1}}"])
def test_names_with_dots_are_refused(text):
    with pytest.raises(ConfigError, match='--config.evals=.*Expected names of letters, digits'):
        configs.override(default.get_config(), [('evals', text)])


def test_misspelt_field_in_a_config_file():
    config = default.get_config()
    config.optimizer.sheduler = 3
    with pytest.raises(ConfigError, match=r"config.optimizer.sheduler=3.*'schedule'"):
        configs.check_fields(config, default.get_config())


def test_wrong_type_in_a_config_file():
    config = default.get_config()
    with config.ignore_type():
        config.steps = '100'
    with pytest.raises(
        ConfigError, match=r"config.steps: expected int, such as \d+, got '100' \(str\)"
    ):
        configs.check_fields(config, default.get_config())


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'batch_size': '100'}, 'batch_size=100 does not divide over 8'),
        ({'mesh__replica': '16'}, 'needs 16 devices and there are 8'),
        ({'mesh__replica': '-1', 'mesh__fsdp': '3'}, '3 does not divide the 8'),
        ({'accumulate': '0'}, 'config.accumulate=0'),
    ],
)
def test_batch_and_mesh(fields, message):
    with pytest.raises(ConfigError, match=message):
        configs.check_batch(default_with(**fields), devices=8, processes=1)


def test_json_round_trip():
    config = default.get_config()
    assert_same_fields(config, configs.from_json(configs.to_json(config)))


def test_differing_fields_are_named_by_path():
    other = default_with(model__head__va='64')
    assert configs.differing_fields(default.get_config(), other) == ['model.head.va']


def test_missing_config_file_lists_the_others():
    with pytest.raises(ConfigError, match='configs/default.py'):
        configs.load('configs/nothing.py')


def test_a_run_older_than_a_field_has_its_default():
    # Of another graph: it has no va and vat to be completed by.
    joint_head = {'name': 'joint', 'joint': 8}
    old = default_with(batch_size='32', data__crop='(0.5, 1)')
    del old.augment.volume
    del old.model.inputs.video.range
    del old.compiler_options
    del old.data.flip
    old.model.head = ConfigDict(joint_head)
    new = configs.fill_missing(old, default.get_config())
    configs.check_fields(new, default.get_config())
    expected = default.get_config()
    expected.batch_size = 32
    expected.data.crop = (0.5, 1)
    expected.model.head = ConfigDict(joint_head)
    assert_same_fields(new, expected)


@pytest.fixture
def renamed(monkeypatch):
    """The fields as they would be called in an older version: one moved, one group renamed."""
    monkeypatch.setitem(configs.RENAMED_FIELDS, 'optimizer.rate', 'optimizer.schedule.peak')
    monkeypatch.setitem(configs.RENAMED_FIELDS, 'augmentation', 'augment')


@pytest.mark.parametrize(
    'old, new, text, value',
    [
        ('optimizer.rate', 'optimizer.schedule.peak', '3e-3', 3e-3),
        ('augmentation.color', 'augment.color', '0.25', 0.25),
    ],
)
def test_an_override_by_an_old_name_is_accepted_with_one_warning(renamed, old, new, text, value):
    config = default.get_config()
    with pytest.warns(FutureWarning) as caught:
        configs.override(config, [(old, text)])
    assert len(caught) == 1
    assert f'use config.{new.split(".")[0]}' in str(caught[0].message)
    assert configs.differing_fields(config, default.get_config()) == [new]
    assert dict(configs.flatten(config))[new] == value


def test_a_stored_config_with_an_old_name_is_accepted_with_one_warning(renamed, tmp_path):
    expected = default_with(optimizer__schedule__peak='3e-3')
    fields = expected.to_dict()
    fields['optimizer']['rate'] = fields['optimizer']['schedule'].pop('peak')
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    with pytest.warns(FutureWarning, match='use config.optimizer.schedule.peak') as caught:
        stored = configs.stored(tmp_path)
    assert len(caught) == 1
    assert_same_fields(stored, expected)
    configs.check_fields(stored, default.get_config())


def test_a_group_left_empty_by_a_rename_is_gone(monkeypatch):
    monkeypatch.setitem(configs.RENAMED_FIELDS, 'gone.group.color', 'augment.color')
    fields = default.get_config().to_dict()
    fields['gone'] = {'group': {'color': fields['augment'].pop('color')}}
    with pytest.warns(FutureWarning, match='config.gone.group.color was renamed'):
        config = configs.from_json(json.dumps(fields))
    assert_same_fields(config, default.get_config())
    configs.check_fields(config, default.get_config())


def test_names_of_today_are_accepted_without_a_warning(renamed):
    stored = configs.to_json(default_with(optimizer__schedule__peak='3e-3'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        config = configs.from_json(stored)
    assert config.optimizer.schedule.peak == 3e-3
