"""configs/mmv_probes.py: what is published stands in the entries, and every entry is one that an evaluator takes."""

import pytest

from configs import default
from vatt_jax import config as configs
from vatt_jax import evals
from vatt_jax.config import ConfigError
from vatt_jax.training import loop, start

TASKS = ('ucf101', 'hmdb51', 'esc50', 'audioset', 'youcook2', 'msrvtt', 'demo')


@pytest.mark.parametrize('task', TASKS)
def test_entries_are_taken(task):
    c = configs.load(f'configs/mmv_probes.py:{task}')
    configs.check_fields(c, default.get_config())
    assert c.evals and all(evals.build(name, entry) for name, entry in c.evals.items())
    assert c.model.towers.video.name == ('tsm_resnet' if task == 'demo' else 's3d')
    assert task == 'demo' or c.data.train[task].path == f'data/{task}/records'


def test_published_values():
    load = lambda arg: configs.load(f'configs/mmv_probes.py:{arg}')
    ucf = load('ucf101,tsm50_fac_vat')
    assert (
        ucf.model.inputs.video.fps,
        ucf.model.inputs.video.frames,
        ucf.model.inputs.video.size,
    ) == (12.5, 32, 224)
    e = ucf.evals.svm
    assert (e.solver, e.standardise, e.passes, e.windows, e.strengths) == (
        'svm',
        True,
        10,
        10,
        (1e-3,),
    ) and len(e.folds) == 3
    assert {
        n: load(f'hmdb51,{n}_fac_vat').evals.svm.strengths for n in ('s3d', 'tsm50', 'tsm50x2')
    } == {'s3d': (3e-4,), 'tsm50': (1e-4,), 'tsm50x2': (3e-4,)}
    with pytest.raises(ConfigError, match="task='ucf': choose one of ucf101"):
        load('ucf')


def test_a_run_may_be_evaluated_at_another_frame_rate_and_is_not_trained_so(tmp_path, monkeypatch):
    c = configs.load('configs/mmv.py:s3d_fac_vat')
    (tmp_path / 'config.json').write_text(configs.to_json(c))
    monkeypatch.setattr(start, 'newest', lambda workdir: 0)
    other = configs.load('configs/mmv_probes.py:ucf101,s3d_fac_vat')
    loop.check_run_folder(other, tmp_path, evaluating=True)
    with pytest.raises(
        ConfigError,
        match='holds a run with config.model.inputs.video.fps=10.0 and this config has 12.5',
    ):
        loop.check_run_folder(other, tmp_path)
    other.model.towers.video.multiplier = 0.5
    with pytest.raises(ConfigError, match='config.model.towers.video.multiplier'):
        loop.check_run_folder(other, tmp_path, evaluating=True)
