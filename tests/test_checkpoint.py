"""Checkpoints that were damaged, could not be written, or are the best: detected, told, and never at the cost of a good one."""

import json
import pathlib
import resource

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint

MESH = sharding.make_mesh({'replica': 1})
SHARDINGS = {'params': {'w': sharding.replicated(MESH)}}


def state(step, size=1000):
    return {
        'params': {
            'w': jax.device_put(
                np.random.default_rng(step).standard_normal(size).astype(np.float32),
                SHARDINGS['params']['w'],
            )
        }
    }


def keeper(folder, **fields):
    return checkpoint.Checkpoints(
        folder / 'checkpoints', ConfigDict({'keep': 3, 'keep_every': 0, 'best': '', **fields})
    )


def saved(folder, steps, **fields):
    k = keeper(folder, **fields)
    for step in steps:
        k.save(step, state(step), {'step': step}, {})
    k.wait()
    k.close()
    return folder / 'checkpoints'


def restored(folder, step, size=1000):
    k = keeper(folder)
    shape = {'params': {'w': jax.ShapeDtypeStruct((size,), np.float32)}}
    got, meta, _ = k.restore(step, shape, SHARDINGS)
    k.close()
    return np.asarray(got['params']['w']), meta


def largest(folder):
    return max(
        (p for p in folder.rglob('*') if p.is_file() and p.name != checkpoint.MANIFEST),
        key=lambda p: p.stat().st_size,
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    'harm, why',
    [
        (lambda f: flip(largest(f)), 'is not what was written'),
        (lambda f: largest(f).unlink(), 'is missing'),
        (lambda f: (f / checkpoint.MANIFEST).write_text('{'), 'manifest.json cannot be read'),
    ],
)
def test_a_damaged_checkpoint_is_told_set_aside_and_the_one_before_is_used(tmp_path, harm, why):
    folder = saved(tmp_path, [1, 2, 3])
    said = []
    assert checkpoint.newest_sound(folder, said.append) == 3 and not said
    harm(folder / '3')
    for take in (
        checkpoint.find_verified,
        parameter_map.read_run,
        lambda path: checkpoint.init_from(str(path), {}, {}, (), ()),
    ):
        with pytest.raises(ConfigError, match=f'checkpoint .*3 is damaged .*{why}'):
            take(folder / '3')
    with pytest.raises(ConfigError, match=f'checkpoint .*3 is damaged .*{why}'):
        checkpoint.load_model(folder / '3', MESH)
    assert (
        checkpoint.newest_sound(folder, said.append) == 2
        and '3.damaged' in said[0]
        and why in said[0]
        and 'going back to step 2' in said[0]
    )
    assert checkpoint.steps(folder) == [1, 2] and (folder / '3.damaged').is_dir()
    got, meta = restored(tmp_path, 2)
    np.testing.assert_array_equal(got, state(2)['params']['w'])
    assert meta == {'step': 2} and saved(tmp_path, [3]) and checkpoint.newest_sound(folder) == 3
    for step in (1, 2, 3):
        flip(largest(folder / str(step)))
    with pytest.raises(ConfigError, match='every checkpoint in .* is damaged'):
        checkpoint.newest_sound(folder)
    assert checkpoint.steps(folder) == [1, 2, 3]


def test_a_folder_without_checkpoints_and_one_without_manifest(tmp_path):
    assert checkpoint.newest_sound(tmp_path / 'none') is None
    folder = saved(tmp_path, [1])
    (folder / '1' / checkpoint.MANIFEST).unlink()  # of a run that is older
    assert checkpoint.newest_sound(folder) == 1


def test_a_full_disk_loses_nothing(tmp_path):
    """No file may grow beyond 100 kB while step 2 is written: told, step 1 stays, and when there is room step 2 is saved."""
    k = keeper(tmp_path, keep=1)
    k.save(1, state(1, 1 << 18), {'step': 1}, {})
    k.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            checkpoint.CheckpointNotSaved,
            match='the checkpoint of step 2 could not be written .*; the checkpoint of step 1 is whole',
        ):
            k.save(2, state(2, 1 << 18), {'step': 2}, {})
            k.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest_sound(tmp_path / 'checkpoints') == 1
    np.testing.assert_array_equal(
        restored(tmp_path, 1, 1 << 18)[0], state(1, 1 << 18)['params']['w']
    )
    k = keeper(tmp_path, keep=1)
    k.save(2, state(2, 1 << 18), {'step': 2}, {})
    k.wait()
    k.close()
    assert (
        checkpoint.steps(tmp_path / 'checkpoints') == [2]
        and checkpoint.newest_sound(tmp_path / 'checkpoints') == 2
    )


def test_the_best_and_the_newest_stay(tmp_path):
    k = keeper(tmp_path, keep=1, best='probe/top1')
    for step, value in ((1, 0.3), (2, 0.7), (3, 0.5), (4, 0.7), (5, None), (6, 0.1)):
        k.save(step, state(step), {'step': step}, {})
        k.wait()
        if value is not None:
            folder = tmp_path / 'evals' / f'step_{step:06d}'
            folder.mkdir(parents=True)
            (folder / 'results.json').write_text(
                json.dumps({'probe': {'scalars': {'top1': value}, 'artifacts': {}}})
            )
    k.close()
    assert checkpoint.steps(pathlib.Path(tmp_path / 'checkpoints')) == [2, 6]
