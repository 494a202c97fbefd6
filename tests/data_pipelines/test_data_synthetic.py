"""The synthetic source and prepared batches in an npz file."""

import subprocess
import sys

import numpy as np
import pytest
from batches import assert_contract, assert_equal, concatenate, stack, take

import data_pipelines
from configs.default import get_config
from data_pipelines.errors import DataError
from data_pipelines.loading.synthetic import save_npz


def synthetic_config(**data_fields):
    """A small synthetic source, `data_fields` of config.data changed."""
    config = get_config()
    config.data.source = 'synthetic'
    config.model.inputs.video.update(frames=8, size=16, fps=5.0)
    config.model.inputs.audio.update(samples=3200, rate=2000)
    config.model.inputs.text.update(candidates=3, words=6)
    config.data.update(data_fields)
    return config


def test_batches_keep_the_contract():
    views = {
        'video.second': {'kind': 'clip'},
        'audio.second': {'kind': 'clip'},
        'audio.shifted': {'kind': 'shift', 'seconds': 0.4},
    }
    config = synthetic_config(views=tuple(views.items()))
    data = data_pipelines.open(config)
    batch = next(data.train(0, 6))
    assert_contract(batch, config, 6, views, {'class': None})
    assert_contract(
        next(data.one_pass('test', 6)), config, 6, [*views, 'text.caption'], {'class': None}
    )

    box = batch['video']['box']
    assert (box >= 0).all()
    assert (box <= 1).all()
    assert (box[:, 2:] > box[:, :2]).all()
    # One suffix, one window.
    np.testing.assert_array_equal(batch['video.second']['start'], batch['audio.second']['start'])
    assert (batch['video.second']['start'] != batch['video']['start']).any()
    shift = np.abs(batch['audio.shifted']['start'] - batch['audio']['start'])
    np.testing.assert_allclose(shift, 0.4, atol=1e-6)
    assert data.info['tokenizer']['size'] > batch['text']['data'].max()


def test_windows_apart_never_touch():
    far = {'kind': 'shift', 'seconds': 'random', 'apart': 0.5}
    views = {'audio.far': far, 'video.far': far}
    config = synthetic_config(views=tuple(views.items()))
    batch = stack(data_pipelines.open(config).train(0, 32), 4)
    assert_contract(batch, config, 128, views, {'class': None})
    # Synthetic records are long enough for every main window.
    assert batch['audio.far']['valid'].all()
    np.testing.assert_array_equal(batch['audio.far']['start'], batch['video.far']['start'])
    shift = batch['audio.far']['start'] - batch['audio']['start']
    window = 1.6
    assert np.abs(shift).min() >= window + 0.5 - 1e-5
    # Both before and behind.
    assert 0.2 < (shift > 0).mean() < 0.8


def test_same_rows_after_resume_on_other_hosts_and_batch_sizes():
    data = data_pipelines.open(synthetic_config(synthetic_size=40))
    whole = stack(data.train(0, 12), 5)
    np.testing.assert_array_equal(np.sort(whole['index'][:40]), np.arange(40))
    assert_equal(stack(data.train(24, 12), 3), take(whole, slice(24, None)))
    assert_equal(stack(data.train(24, 6), 6), take(whole, slice(24, None)))
    of_hosts = [next(data.train(0, 12, process=(i, 4))) for i in range(4)]
    assert_equal(concatenate(of_hosts), take(whole, slice(12)))


def test_stretches_of_hosts_are_the_rows_of_the_pass():
    """Seven records in batches of four on two hosts: the clips of one host that has all."""
    data = data_pipelines.open(synthetic_config(synthetic_size=7))
    options = {'by': 'records', 'augment': True, 'draw': 'a'}
    whole = stack(data.one_pass('train', 7, **options), 1)
    parts = []
    for host in range(2):
        batches = data.one_pass('train', 4, process=(host, 2), in_stretches=True, **options)
        rows = stack(batches, 2)
        assert rows['valid'].sum() == 3 + host
        parts.append(take(rows, rows['valid']))
    assert_equal(concatenate(parts), whole)


def test_padding_rows_of_one_pass_are_empty():
    config = synthetic_config(synthetic_size=13)
    data = data_pipelines.open(config)
    batch = stack(data.one_pass('train', 8, by='records'), 2)
    assert_contract(batch, config, 16, label_classes={'class': None})
    is_valid = batch['valid']
    assert is_valid.sum() == 13
    assert sorted(batch['index'][is_valid]) == list(range(13))
    padding = take(batch, ~is_valid)
    assert not padding['video']['valid'].any()
    assert not padding['video']['data'].any()
    assert not padding['text']['mask'].any()
    assert (padding['labels']['class'] == -1).all()
    assert next(data.one_pass('train', 8, limit=3))['valid'].sum() == 3


def test_sampling_columns_choose_records():
    data = data_pipelines.open(synthetic_config(synthetic_size=10))
    weights = np.zeros(10)
    weights[[2, 7]] = 1
    batch = stack(data.train(0, 8, columns={'w': weights}), 2)
    assert set(batch['index']) == {2, 7}
    with pytest.raises(DataError, match='10 records'):
        data.train(0, 8, columns={'w': np.ones(3)})


def test_modalities_belong_together():
    """Brightness over a clip follows the loudness of the same clip, not that of another record."""
    data = data_pipelines.open(synthetic_config(synthetic_size=64))
    batch = next(data.one_pass('train', 64, by='records'))
    brightness = batch['video']['data'].reshape(64, 8, -1).mean(-1)
    loudness = np.abs(batch['audio']['data'].astype(float)).reshape(64, 8, -1).mean(-1)

    def standardized(values):
        """Each row [8] with mean 0 and standard deviation 1."""
        deviations = values - values.mean(1, keepdims=True)
        return deviations / (values.std(1, keepdims=True) + 1e-9)

    correlation = standardized(brightness) @ standardized(loudness).T / 8
    of_other_records = correlation[~np.eye(64, dtype=bool)]
    assert np.diag(correlation).mean() > 0.6
    assert np.abs(of_other_records.mean()) < 0.3


def test_a_view_reversed_is_that_view_read_backwards(tmp_path):
    """In any order of the views, from the synthetic world and from a file of its batches."""
    views = (
        ('video.back', {'kind': 'reverse', 'of': 'second'}),
        ('audio.back', {'kind': 'reverse', 'of': 'second'}),
        ('video.second', {'kind': 'clip'}),
        ('audio.second', {'kind': 'clip'}),
    )
    synthetic = data_pipelines.open(synthetic_config(views=views))
    path = str(tmp_path / 'batches.npz')
    batch = next(synthetic.train(0, 8))
    for modality in ('video', 'audio'):
        second, back = batch[f'{modality}.second'], batch[f'{modality}.back']
        np.testing.assert_array_equal(back['data'], second['data'][:, ::-1])
        np.testing.assert_array_equal(back['start'], second['start'])
        assert (second['start'] != batch[modality]['start']).any()
    # Every video stream has a crop of its own.
    assert (batch['video.back']['box'] != batch['video.second']['box']).any()

    save_npz([{name: part for name, part in batch.items() if 'back' not in name}], path)
    stored = next(
        data_pipelines.open(synthetic_config(source='npz', npz=path, views=views)).train(0, 8)
    )
    for modality in ('video', 'audio'):
        second, back = stored[f'{modality}.second'], stored[f'{modality}.back']
        np.testing.assert_array_equal(back['data'], second['data'][:, ::-1])


def test_npz_round_trip(tmp_path):
    synthetic = data_pipelines.open(synthetic_config(synthetic_size=11))
    path = str(tmp_path / 'batches.npz')
    passes = {
        'train': synthetic.one_pass('train', 8, by='segments'),
        'test': synthetic.one_pass('test', 8, limit=5),
    }
    save_npz(passes, path, synthetic.info)
    config = synthetic_config(source='npz', npz=path, flip=0.0, crop=(1.0, 1.0), aspect=(1.0, 1.0))
    stored = data_pipelines.open(config)
    assert stored.size('train') == 11
    assert stored.size('test') == 5
    assert stored.size('validation') == 0
    assert_equal(
        stack(stored.one_pass('train', 4), 3),
        stack(synthetic.one_pass('train', 4), 3),
    )
    assert sorted(next(stored.train(0, 11))['index']) == list(range(11))
    batch = next(stored.one_pass('train', 4, views={'video.back': {'kind': 'reverse'}}))
    np.testing.assert_array_equal(batch['video.back']['data'], batch['video']['data'][:, ::-1])

    with pytest.raises(DataError, match="no other window of 'video'"):
        stored.one_pass('train', 4, window={'kind': 'window', 'number': 0, 'of': 2})
    second_clip = ('video.x', {'kind': 'clip'})
    with pytest.raises(DataError, match='other windows'):
        data_pipelines.open(synthetic_config(source='npz', npz=path, views=(second_clip,)))
    config.model.inputs.audio.samples = 100
    with pytest.raises(DataError, match=r'audio/data has rows of shape \(3200,\)'):
        data_pipelines.open(config)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'source': 'x'}, 'records, synthetic, npz'),
        ({'source': 'npz'}, 'not a file'),
        ({'synthetic_size': 0}, 'at least 1'),
        ({'views': (('depth.x', {'kind': 'clip'}),)}, 'modality'),
        ({'views': (('video.x', {'kind': 'zoom'}),)}, 'clip'),
        (
            {'views': (('audio.x', {'kind': 'shift', 'seconds': 1.0, 'apart': 0.5}),)},
            r'\.apart: expected seconds "random" beside it, got 1.0',
        ),
        (
            {'views': (('audio.x', {'kind': 'shift', 'seconds': 'random', 'apart': -1}),)},
            r'\.apart is -1; give the least seconds between the windows',
        ),
        ({'views': (('audio.x', {'kind': 'clip', 'apart': 1.0}),)}, r'seconds, apart \(optional\)'),
        (
            {'views': (('video.x', {'kind': 'clip'}), ('audio.x', {'kind': 'reverse'}))},
            'share one window',
        ),
        (
            {'views': (('video.x', {'kind': 'clip'}), ('video.y', {'kind': 'reverse', 'of': 'z'}))},
            r"'video.y'.of: expected one of x, the suffixes of views that are not .*, got 'z'",
        ),
        (
            {
                'views': (
                    ('video.x', {'kind': 'reverse'}),
                    ('video.y', {'kind': 'reverse', 'of': 'x'}),
                )
            },
            "'video.y'.of: expected no field `of`, .*, got 'x'",
        ),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(DataError, match=message):
        data_pipelines.open(synthetic_config(**fields))


def test_no_tensorflow(tmp_path):
    """Both sources without files work where neither TensorFlow nor a decoder is installed."""
    code = f"""
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'array_record', 'av'):
    sys.modules[name] = None
import data_pipelines, data_pipelines.loading.order
from data_pipelines.loading.synthetic import save_npz
from configs.default import get_config
c = get_config()
c.data.source = 'synthetic'
c.model.inputs.video.update(frames=2, size=8)
c.model.inputs.audio.samples = 800
d = data_pipelines.open(c)
save_npz([next(d.train(0, 4))], {str(tmp_path / 'b.npz')!r}, d.info)
c.data.source, c.data.npz = 'npz', {str(tmp_path / 'b.npz')!r}
print(next(data_pipelines.open(c).train(0, 2))['video']['data'].shape, 'jax' in sys.modules)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '(2, 2, 8, 8, 3) False', result.stderr
