import subprocess
import sys

import numpy as np
import pytest

import data_pipelines
from configs.default import get_config
from data_pipelines.errors import DataError
from data_pipelines.loading.synthetic import save_npz


def config(**data):
    c = get_config()
    c.data.source = 'synthetic'
    c.model.inputs.video.update(frames=8, size=16, fps=5.0)
    c.model.inputs.audio.update(samples=3200, rate=2000)
    c.model.inputs.text.update(candidates=3, words=6)
    c.data.update(data)
    return c


def rows(batches, count):
    """Streams, labels and marks of `count` batches, rows stacked."""
    flat = []
    for _ in range(count):
        b, one = next(batches), {}
        for k, v in b.items():
            one.update({f'{k}/{n}': x for n, x in v.items()} if isinstance(v, dict) else {k: v})
        flat.append(one)
    return {k: np.concatenate([f[k] for f in flat]) for k in flat[0]}


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def test_contract_of_a_batch():
    c = config(
        views=(
            ('video.second', {'kind': 'clip'}),
            ('audio.second', {'kind': 'clip'}),
            ('audio.shifted', {'kind': 'shift', 'seconds': 0.4}),
        )
    )
    d = data_pipelines.open(c)
    b = next(d.train(0, 6))
    assert b['video']['data'].shape == (6, 8, 16, 16, 3) and b['video']['data'].dtype == np.uint8
    assert b['audio']['data'].shape == (6, 3200) and b['audio']['data'].dtype == np.int16
    assert b['text']['data'].shape == (6, 3, 6) and b['text']['data'].dtype == np.int32
    assert (
        b['video']['box'].shape == (6, 4)
        and b['video']['box'].dtype == np.float32
        and b['video']['flip'].dtype == bool
    )
    assert (
        b['index'].dtype == np.int32
        and b['source'].dtype == np.int32
        and b['position'].dtype == np.int64
    )
    box = b['video']['box']
    assert (box >= 0).all() and (box <= 1).all() and (box[:, 2:] > box[:, :2]).all()
    np.testing.assert_array_equal(
        b['video.second']['start'], b['audio.second']['start']
    )  # one suffix, one window
    assert (b['video.second']['start'] != b['video']['start']).any()
    moved = np.abs(b['audio.shifted']['start'] - b['audio']['start'])
    np.testing.assert_allclose(moved, 0.4, atol=1e-6)
    assert d.info['tokenizer']['size'] > b['text']['data'].max()


def test_same_rows_after_resume_on_other_hosts_and_batch_sizes():
    d = data_pipelines.open(config(synthetic_size=40))
    whole = rows(d.train(0, 12), 5)
    np.testing.assert_array_equal(np.sort(whole['index'][:40]), np.arange(40))
    equal(rows(d.train(24, 12), 3), {k: v[24:] for k, v in whole.items()})
    equal(rows(d.train(24, 6), 6), {k: v[24:] for k, v in whole.items()})
    parts = [rows(d.train(0, 12, process=(i, 4)), 1) for i in range(4)]
    equal(
        {k: np.concatenate([p[k] for p in parts]) for k in whole},
        {k: v[:12] for k, v in whole.items()},
    )


def test_one_pass_padding_rows_are_empty():
    d = data_pipelines.open(config(synthetic_size=13))
    got = rows(d.one_pass('train', 8, by='records'), 2)
    assert got['valid'].sum() == 13 and sorted(got['index'][got['valid']]) == list(range(13))
    pad = ~got['valid']
    assert (
        not got['video/valid'][pad].any()
        and not got['video/data'][pad].any()
        and not got['text/mask'][pad].any()
    )
    assert (got['labels/class'][pad] == -1).all()
    assert got['text.caption/data'].shape == (16, 1, 6) if 'text.caption/data' in got else True
    assert rows(d.one_pass('train', 8, limit=3), 1)['valid'].sum() == 3


def test_sampling_columns_choose_records():
    d = data_pipelines.open(config(synthetic_size=10))
    weight = np.zeros(10)
    weight[[2, 7]] = 1
    assert set(rows(d.train(0, 8, columns={'w': weight}), 2)['index']) == {2, 7}
    with pytest.raises(DataError, match='10 records'):
        d.train(0, 8, columns={'w': np.ones(3)})


def test_modalities_belong_together():
    """Within one class, brightness over a clip follows loudness over the same clip, and not that of another record."""
    d = data_pipelines.open(config(synthetic_size=64))
    got = rows(d.one_pass('train', 64, by='records'), 1)
    light = got['video/data'].reshape(64, 8, -1).mean(-1)
    loud = np.abs(got['audio/data'].astype(float)).reshape(64, 8, -1).mean(-1)
    unit = lambda x: (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1e-9)
    similar = unit(light) @ unit(loud).T / 8
    assert np.diag(similar).mean() > 0.6 > 0.3 > np.abs(similar[~np.eye(64, dtype=bool)].mean())


def test_npz_round_trip(tmp_path):
    d = data_pipelines.open(config(synthetic_size=11))
    path = str(tmp_path / 'batches.npz')
    save_npz(
        {'train': d.one_pass('train', 8, by='segments'), 'test': d.one_pass('test', 8, limit=5)},
        path,
        d.info,
    )
    c = config(source='npz', npz=path, flip=0.0, crop=(1.0, 1.0), aspect=(1.0, 1.0))
    n = data_pipelines.open(c)
    assert n.size('train') == 11 and n.size('test') == 5 and n.size('validation') == 0
    a, b = rows(d.one_pass('train', 4), 3), rows(n.one_pass('train', 4), 3)
    equal(a, b)
    assert sorted(rows(n.train(0, 11), 1)['index']) == list(range(11))
    reverse = rows(n.one_pass('train', 4, views={'video.back': {'kind': 'reverse'}}), 1)
    with pytest.raises(DataError, match="no other window of 'video'"):
        n.one_pass('train', 4, window={'kind': 'window', 'number': 0, 'of': 2})
    np.testing.assert_array_equal(reverse['video.back/data'], reverse['video/data'][:, ::-1])
    with pytest.raises(DataError, match='other windows'):
        data_pipelines.open(config(source='npz', npz=path, views=(('video.x', {'kind': 'clip'}),)))
    c.model.inputs.audio.samples = 100
    with pytest.raises(DataError, match=r'audio/data has rows of shape \(3200,\)'):
        data_pipelines.open(c)


@pytest.mark.parametrize(
    'change, say',
    [
        (dict(source='x'), 'records, synthetic, npz'),
        (dict(source='npz'), 'not a file'),
        (dict(synthetic_size=0), 'at least 1'),
        (dict(views=(('depth.x', {'kind': 'clip'}),)), 'modality'),
        (dict(views=(('video.x', {'kind': 'zoom'}),)), 'clip'),
        (
            dict(views=(('video.x', {'kind': 'clip'}), ('audio.x', {'kind': 'reverse'}))),
            'share one window',
        ),
    ],
)
def test_errors_name_the_field(change, say):
    with pytest.raises(DataError, match=say):
        data_pipelines.open(config(**change))


def test_no_tensorflow(tmp_path):
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
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '(2, 2, 8, 8, 3) False', out.stderr
