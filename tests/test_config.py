"""Config mistakes are one sentence that names field, value and remedy, before anything is built."""

import json
import warnings

import pytest
from ml_collections import ConfigDict

from configs import default, demo, selavi
from vatt_jax import config as configs
from vatt_jax import optim
from vatt_jax.config import ConfigError


def changed(**overrides):
    c = default.get_config()
    configs.override(c, [(k.replace('__', '.'), v) for k, v in overrides.items()])
    return c


@pytest.mark.parametrize(
    'spec',
    [
        *(f'configs/demo.py:{v}' for v in demo.VARIANTS),
        *(f'configs/selavi.py:demo,{v}' for v in (*selavi.METHODS, 'synthetic')),
        'configs/finetune.py',
        'configs/finetune.py:scratch',
        'configs/vatt_finetune.py:demo,20',
        'configs/vatt_finetune.py:demo,20,scratch',
    ],
)
def test_small_configs_pass_the_checks(spec):
    c = configs.load(spec)
    configs.check_fields(c, default.get_config())
    configs.check_values(c)
    optim.check(c.optimizer, c.steps)


def test_overrides_keep_types():
    c = changed(
        batch_size='64',
        optimizer__schedule__peak='1e-3',
        data__crop='(0.5, 1)',
        model__scan='true',
        name='hello',
    )
    assert c.batch_size == 64 and c.optimizer.schedule.peak == 1e-3 and c.data.crop == (0.5, 1)
    assert c.model.scan is True and c.name == 'hello'


@pytest.mark.parametrize(
    'path, text, told',
    [
        ('batchsize', '4', ['batchsize', "'batch_size'"]),
        ('optimizer.schedule.peek', '1', ['optimizer.schedule', 'peek', "'peak'"]),
        ('batch_size', '3.5', ['config.batch_size=3.5', 'int']),
        ('batch_size', 'many', ["config.batch_size='many'", 'int']),
        ('optimizer', 'adam', ['group', 'name']),
        ('seed.x', '1', ['seed', 'value']),
        ('model.scan', '1', ['config.model.scan=1', 'bool']),
    ],
)
def test_bad_overrides(path, text, told):
    with pytest.raises(ConfigError) as error:
        configs.override(default.get_config(), [(path, text)])
    for word in told:
        assert word in str(error.value)


def test_a_group_of_free_names_is_replaced_as_a_whole():
    """What docs/data.md tells the owners of videos to write."""
    c = demo.get_config()
    configs.override(
        c,
        [
            ('data.train', "{'mine': {'path': 'data/mine', 'weight': 2}}"),
            ('data.train.mine.weight', '3'),
            ('evals', "{'r': {'type': 'retrieval', 'pairs': [['a', 'b', 'c']]}}"),
        ],
    )
    assert c.data.train.to_dict() == {'mine': {'path': 'data/mine', 'weight': 3}}
    assert list(c.evals) == ['r'] and c.evals.r.pairs == (('a', 'b', 'c'),)
    configs.check_fields(c, default.get_config())
    for path, text, told in (
        ('data.train', 'data/mine', 'replace it by a dictionary in quotes, such as'),
        ('evals', '{1: 2}', 'a dictionary'),
        ('optimizer', "{'name': 'sgd'}", 'name one of them'),
    ):
        with pytest.raises(ConfigError, match=told):
            configs.override(c, [(path, text)])


@pytest.mark.parametrize(
    'path, text, told',
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
    ],
)
def test_values_that_make_no_sense(path, text, told):
    c = default.get_config()
    configs.override(c, [(path, text)])
    with pytest.raises(ConfigError, match=told):
        configs.check_batch(c, devices=8, processes=1)


def test_misspelt_field_in_a_config_file():
    c = default.get_config()
    c.optimizer.sheduler = 3
    with pytest.raises(ConfigError, match=r"config.optimizer.sheduler=3.*'schedule'"):
        configs.check_fields(c, default.get_config())


def test_wrong_type_in_a_config_file():
    c = default.get_config()
    with c.ignore_type():
        c.steps = '100'
    with pytest.raises(ConfigError, match="config.steps='100'"):
        configs.check_fields(c, default.get_config())


@pytest.mark.parametrize(
    'fields, told',
    [
        (dict(batch_size='100'), 'batch_size=100 does not divide over 8'),
        (dict(mesh__replica='16'), 'needs 16 devices and there are 8'),
        (dict(mesh__replica='-1', mesh__fsdp='3'), '3 does not divide the 8'),
        (dict(accumulate='0'), 'config.accumulate=0'),
    ],
)
def test_batch_and_mesh(fields, told):
    with pytest.raises(ConfigError, match=told):
        configs.check_batch(changed(**fields), devices=8, processes=1)


def test_json_round_trip():
    c = default.get_config()
    assert configs.differing_fields(c, configs.from_json(configs.to_json(c))) == []
    d = changed(model__head__va='64')
    assert configs.differing_fields(c, d) == ['model.head.va']


def test_missing_config_file_lists_the_others():
    with pytest.raises(ConfigError, match='configs/default.py'):
        configs.load('configs/nothing.py')


def test_a_run_older_than_a_field_has_its_default():
    old = changed(batch_size='32', data__crop='(0.5, 1)')
    del old.augment.volume, old.model.inputs.video.range, old.compiler_options, old.data.flip
    old.model.head = ConfigDict(
        {'name': 'joint', 'joint': 8}
    )  # of another graph: it has no va and vat to be completed by
    new = configs.fill_missing(old, default.get_config())
    configs.check_fields(new, default.get_config())
    want = default.get_config()
    want.batch_size, want.data.crop, want.model.head = (
        32,
        (0.5, 1),
        ConfigDict({'name': 'joint', 'joint': 8}),
    )
    assert configs.differing_fields(new, want) == []


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
    c = default.get_config()
    with pytest.warns(FutureWarning) as caught:
        configs.override(c, [(old, text)])
    assert len(caught) == 1
    assert f'use config.{new.split(".")[0]}' in str(caught[0].message)
    assert configs.differing_fields(c, default.get_config()) == [new]
    assert dict(configs.flatten(c))[new] == value


def test_a_stored_config_with_an_old_name_is_accepted_with_one_warning(renamed, tmp_path):
    want = changed(optimizer__schedule__peak='3e-3')
    fields = want.to_dict()
    fields['optimizer']['rate'] = fields['optimizer']['schedule'].pop('peak')
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    with pytest.warns(FutureWarning, match='use config.optimizer.schedule.peak') as caught:
        got = configs.stored(tmp_path)
    assert len(caught) == 1
    assert configs.differing_fields(got, want) == []
    configs.check_fields(got, default.get_config())


def test_a_group_left_empty_by_a_rename_is_gone(monkeypatch):
    monkeypatch.setitem(configs.RENAMED_FIELDS, 'gone.group.color', 'augment.color')
    fields = default.get_config().to_dict()
    fields['gone'] = {'group': {'color': fields['augment'].pop('color')}}
    with pytest.warns(FutureWarning, match='config.gone.group.color was renamed'):
        got = configs.from_json(json.dumps(fields))
    assert configs.differing_fields(got, default.get_config()) == []
    configs.check_fields(got, default.get_config())


def test_names_of_today_are_accepted_without_a_warning(renamed):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        c = configs.from_json(configs.to_json(changed(optimizer__schedule__peak='3e-3')))
    assert c.optimizer.schedule.peak == 3e-3
