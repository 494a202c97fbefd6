"""configs/mmv_probes.py: entries hold what is published, and an evaluator takes each of them."""

import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.training import loop, start

TASKS = ('ucf101', 'hmdb51', 'esc50', 'audioset', 'youcook2', 'msrvtt', 'demo')


def load(argument):
    """The probes' config of one argument."""
    return configs.load(f'configs/mmv_probes.py:{argument}')


@pytest.mark.parametrize('task', TASKS)
def test_entries_are_taken(task):
    config = load(task)
    configs.check_fields(config, default.get_config())
    assert config.evals
    for name, entry in config.evals.items():
        assert evals.build(name, entry)
    if task == 'demo':
        assert config.model.towers.video.name == 'tsm_resnet'
    else:
        assert config.model.towers.video.name == 's3d'
        assert config.data.train[task].path == f'data/{task}/records'


def test_published_values_of_ucf101():
    config = load('ucf101,tsm50_fac_vat')
    video = config.model.inputs.video
    assert video.fps == 12.5
    assert video.frames == 32
    assert video.size == 224

    svm = config.evals.svm
    assert svm.solver == 'svm'
    assert svm.standardise is True
    assert svm.passes == 10
    assert svm.windows == 10
    assert svm.strengths == (1e-3,)
    assert len(svm.folds) == 3


@pytest.mark.parametrize(
    'backbone, strength',
    [
        ('s3d', 3e-4),
        ('tsm50', 1e-4),
        ('tsm50x2', 3e-4),
    ],
)
def test_published_strengths_of_hmdb51(backbone, strength):
    assert load(f'hmdb51,{backbone}_fac_vat').evals.svm.strengths == (strength,)


def test_an_unknown_task_is_a_sentence():
    with pytest.raises(ConfigError, match="task='ucf': choose one of ucf101"):
        load('ucf')


def test_a_run_may_be_evaluated_at_another_frame_rate_and_is_not_trained_so(tmp_path, monkeypatch):
    run = configs.load('configs/mmv.py:s3d_fac_vat')
    (tmp_path / 'config.json').write_text(configs.to_json(run))
    monkeypatch.setattr(start, 'newest', lambda workdir: 0)
    other = load('ucf101,s3d_fac_vat')
    loop.check_run_folder(other, tmp_path, evaluating=True)

    message = 'holds a run with config.model.inputs.video.fps=10.0 and this config has 12.5'
    with pytest.raises(ConfigError, match=message):
        loop.check_run_folder(other, tmp_path)

    other.model.towers.video.multiplier = 0.5
    with pytest.raises(ConfigError, match='config.model.towers.video.multiplier'):
        loop.check_run_folder(other, tmp_path, evaluating=True)
