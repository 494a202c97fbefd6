"""The worked examples of CONTRIBUTING.md run as they stand there."""

import json
import pathlib
import re
import wave

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict

import data_pipelines
from data_pipelines.datasets import named
from data_pipelines.prepare import prepare
from tests import tiny
from vatt_jax import evals, objectives
from vatt_jax.models import multimodal
from vatt_jax.training import loop

PAGE = pathlib.Path(__file__).parent.parent / 'CONTRIBUTING.md'


def example(heading: str) -> str:
    """The Python block below a heading."""
    section = PAGE.read_text().split(f'### {heading}\n')[1]
    return re.search(r'```python\n(.*?)```', section, re.DOTALL).group(1)


@pytest.fixture
def registries():
    """Tables that an example adds to; what it added is gone afterwards."""
    tables = [
        objectives.OBJECTIVES,
        evals.EVALUATORS,
        multimodal.NETS,
        multimodal.TOWERS,
        named.DATASETS,
    ]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def train(tmp_path, **fields):
    """(what it built, the last evaluation's scalars) of three steps."""
    config = tiny.config(steps=3, **fields)
    data = data_pipelines.open(config)
    return loop.train(config, data, tmp_path / 'run', quiet=True)


def test_an_objective(registries, tmp_path):
    exec(example('An objective'), {'__name__': 'example'})
    objective = ConfigDict({'name': 'agreement'})
    size = {'name': 'wat', 'layers': 1, 'width': 32, 'mlp': 64, 'heads': 2, 'head_width': 16}
    built, _ = train(tmp_path, objective=objective, model__towers__audio={**size, 'patch': 64})
    assert built.objective.streams() == ('video', 'audio')
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert np.isfinite(json.loads(line)['cosine'])


@pytest.mark.slow
def test_a_tower(registries, tmp_path):
    exec(example('A tower'), {'__name__': 'example'})
    built, _ = train(tmp_path, model__towers__video={'name': 'mean_color', 'width': 8})
    chex.assert_shape(built.outputs.encoded['video'].pooled, (16, 8))


@pytest.mark.slow
def test_an_evaluator(registries, tmp_path):
    exec(example('An evaluator'), {'__name__': 'example'})
    _, scalars = train(tmp_path, evals=ConfigDict({'spread': {'type': 'spread'}}))
    assert 0 < scalars['spread/filled'] <= 1


def test_a_dataset(registries, tmp_path):
    exec(example('A dataset'), {'__name__': 'example'})
    folder = tmp_path / 'owner'
    (folder / 'songs').mkdir(parents=True)
    rows = ['file,species,split']
    songs = [('wren', 'train'), ('robin', 'train'), ('wren', 'test'), ('robin', 'test')]
    for i, (species, split) in enumerate(songs):
        tone = np.sin(np.arange(16000) * (0.1 + 0.05 * i)) * 8000
        with wave.open(str(folder / 'songs' / f'{i}.wav'), 'wb') as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(tone.astype('<i2').tobytes())
        rows.append(f'{i}.wav,{species},{split}')
    (folder / 'songs.csv').write_text('\n'.join(rows))
    out = tmp_path / 'records'
    prepare(
        dataset='bird_songs',
        manual_dir=str(folder),
        out=str(out),
        rate=2000,
        processes=1,
        quiet=True,
    )
    config = tiny.config(data__source='records')
    config.data.train = ConfigDict({'songs': {'path': str(out), 'split': 'train'}})
    data = data_pipelines.open(config)
    assert data.info['labels'] == {'species': ['robin', 'wren']}
    assert data.size('train') == 2
    assert data.size('test') == 2
    data.close()
