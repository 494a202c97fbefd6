"""Damaged checkpoints, full disks, and which checkpoints stay: a good one is never lost."""

import json
import resource
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError
from vatt_jax.importers import parameter_map
from vatt_jax.parallel import sharding
from vatt_jax.training import checkpoint, starting_values

MESH = sharding.make_mesh({'replica': 1})
SHARDINGS = {'params': {'w': sharding.replicated(MESH)}}
LARGE = 1 << 18  # float32 values: 1 MB


def make_state(step, size=1000):
    """The state of a step: random numbers that depend on the step alone."""
    values = np.random.default_rng(step).standard_normal(size).astype(np.float32)
    return {'params': {'w': jax.device_put(values, SHARDINGS['params']['w'])}}


def open_checkpoints(folder, **fields):
    """The checkpoints of a run folder; `fields` are those of config.checkpoint."""
    config = ConfigDict({'keep': 3, 'keep_every': 0, 'best': '', **fields})
    return checkpoint.Checkpoints(folder / 'checkpoints', config)


def save_steps(folder, steps, **fields):
    """Saves a checkpoint of each step; returns the folder they lie in."""
    checkpoints = open_checkpoints(folder, **fields)
    for step in steps:
        checkpoints.save(step, make_state(step), {'step': step}, {})
    checkpoints.wait()
    checkpoints.close()
    return folder / 'checkpoints'


def restore(folder, step, size=1000):
    """(state, meta) of a saved step."""
    checkpoints = open_checkpoints(folder)
    shape = {'params': {'w': jax.ShapeDtypeStruct((size,), np.float32)}}
    state, meta, _ = checkpoints.restore(step, shape, SHARDINGS)
    checkpoints.close()
    return state, meta


def largest_file(folder):
    """The largest file of a checkpoint, its manifest aside."""
    files = []
    for path in folder.rglob('*'):
        if path.is_file() and path.name != checkpoint.MANIFEST:
            files.append(path)
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def remove_a_file(folder):
    largest_file(folder).unlink()


def break_the_manifest(folder):
    (folder / checkpoint.MANIFEST).write_text('{')


def init_from(path):
    return starting_values.read(str(path))


def load_model(path):
    return checkpoint.load_model(path, MESH)


@pytest.mark.parametrize(
    'damage, reason',
    [
        (flip_a_bit, 'is not what was written'),
        (remove_a_file, 'is missing'),
        (break_the_manifest, 'manifest.json cannot be read'),
    ],
)
def test_a_damaged_checkpoint_is_reported_set_aside_and_the_one_before_is_used(
    tmp_path, damage, reason
):
    folder = save_steps(tmp_path, [1, 2, 3])
    messages = []
    assert checkpoint.newest_sound(folder, messages.append) == 3
    assert not messages

    damage(folder / '3')
    for read in (checkpoint.find_verified, parameter_map.read_run, init_from, load_model):
        with pytest.raises(ConfigError, match=f'checkpoint .*3 is damaged .*{reason}'):
            read(folder / '3')
    assert checkpoint.newest_sound(folder, messages.append) == 2
    assert '3.damaged' in messages[0]
    assert reason in messages[0]
    assert 'going back to step 2' in messages[0]
    assert checkpoint.steps(folder) == [1, 2]
    assert (folder / '3.damaged').is_dir()

    state, meta = restore(tmp_path, 2)
    chex.assert_trees_all_equal(state, make_state(2), strict=True)
    assert meta == {'step': 2}

    # The step can be saved again.
    save_steps(tmp_path, [3])
    assert checkpoint.newest_sound(folder) == 3
    for step in (1, 2, 3):
        flip_a_bit(folder / str(step))
    with pytest.raises(ConfigError, match='every checkpoint in .* is damaged'):
        checkpoint.newest_sound(folder)
    assert checkpoint.steps(folder) == [1, 2, 3]


def remove_the_end_mark(folder):
    (folder / checkpoint.COMPLETE).unlink()


def remove_state_and_manifest(folder):
    shutil.rmtree(folder / 'state')
    (folder / checkpoint.MANIFEST).unlink()


def write_null(folder):
    (folder / checkpoint.MANIFEST).write_text('null')


@pytest.mark.parametrize(
    'remove, reason',
    [
        (remove_the_end_mark, '_CHECKPOINT_METADATA is missing'),
        (remove_state_and_manifest, 'state is missing'),
        (write_null, 'expected file names with digests'),
    ],
)
def test_a_checkpoint_that_is_half_there_is_set_aside_and_its_step_is_saved_again(
    tmp_path, remove, reason
):
    folder = save_steps(tmp_path, [1, 2])
    remove(folder / '2')
    # Left by an earlier start, or by whatever synchronises the folder.
    (folder / '2.damaged').write_text('')
    messages = []
    assert checkpoint.newest_sound(folder, messages.append) == 1
    assert len(messages) == 1 and reason in messages[0]
    # Orbax alone takes any folder with a number for a saved step.
    save_steps(tmp_path, [2])
    assert checkpoint.newest_sound(folder) == 2


@pytest.mark.parametrize('name', ['3 (1)', 'step_3', '003', '3 - Copy'])
def test_renamed_checkpoints_are_never_passed_over_in_silence(tmp_path, name):
    folder = save_steps(tmp_path, [2, 3])
    (folder / '3').rename(folder / name)
    messages = []
    assert checkpoint.newest_sound(folder, messages.append) == 2
    assert len(messages) == 1 and 'step 2 is used; rename it to 3' in messages[0]
    with pytest.warns(UserWarning, match='step 2 is used; rename it to 3'):
        assert checkpoint.find(tmp_path).name == '2'

    (folder / '2').rename(folder / 'step_2')
    with pytest.raises(ConfigError, match='under other names than their steps'):
        checkpoint.newest_sound(folder)


@pytest.mark.parametrize('name', ['.DS_Store', '._3', '²', '7', '3 (1)', '9' * 200])
def test_what_synchronised_folders_add_does_no_harm(tmp_path, name):
    folder = save_steps(tmp_path, [2, 3])
    if name == '3 (1)':
        shutil.copytree(folder / '3', folder / name)
    else:
        (folder / name).write_text('')
    messages = []
    assert checkpoint.newest_sound(folder, messages.append) == 3
    assert checkpoint.find(folder).name == '3'
    assert not messages


def test_a_folder_without_checkpoints_and_one_without_manifest(tmp_path):
    assert checkpoint.newest_sound(tmp_path / 'none') is None
    folder = save_steps(tmp_path, [1])
    (folder / '1' / checkpoint.MANIFEST).unlink()  # of a run that is older
    assert checkpoint.newest_sound(folder) == 1


@pytest.mark.parametrize('sizes', [{'replica': 1}, {'fsdp': 8}, {'replica': 2, 'fsdp': 4}])
def test_a_restored_tree_has_the_saved_values_dtypes_and_shardings(tmp_path, sizes):
    """Saved on one device, restored over several; every dtype that a state holds."""
    values = np.random.default_rng(0).standard_normal((8, 16))
    saved = {
        'step': jnp.asarray(7, jnp.int32),
        'params': {'kernel': jnp.asarray(values, jnp.float32)},
        'opt_state': {'mu': jnp.asarray(values, jnp.bfloat16)},
        'objective': {'labels': jnp.arange(16, dtype=jnp.int32), 'seen': jnp.arange(16) % 3 == 0},
    }
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(7, saved, {'step': 7}, {})
    checkpoints.wait()

    mesh = sharding.make_mesh(sizes)
    by_rows = NamedSharding(mesh, P('fsdp'))
    shardings = {
        'step': sharding.replicated(mesh),
        'params': {'kernel': by_rows},
        'opt_state': {'mu': by_rows},
        'objective': {'labels': by_rows, 'seen': sharding.replicated(mesh)},
    }
    shape = jax.eval_shape(lambda: saved)
    state, _, _ = checkpoints.restore(7, shape, shardings)
    checkpoints.close()
    chex.assert_trees_all_equal_shapes_and_dtypes(state, saved)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(saved))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, state), shardings)
    chex.assert_shape(
        state['params']['kernel'].addressable_shards[0].data, (8 // sizes.get('fsdp', 1), 16)
    )


def test_a_full_disk_loses_nothing(tmp_path):
    """While step 2 is written no file may grow beyond 100 kB.

    It is reported, step 1 stays, and when there is room step 2 is saved.
    """
    checkpoints = open_checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1, LARGE), {'step': 1}, {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    message = 'the checkpoint of step 2 could not be written .*; the checkpoint of step 1 is whole'
    try:
        with pytest.raises(checkpoint.CheckpointNotSaved, match=message):
            checkpoints.save(2, make_state(2, LARGE), {'step': 2}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest_sound(tmp_path / 'checkpoints') == 1
    state, _ = restore(tmp_path, 1, LARGE)
    chex.assert_trees_all_equal(state, make_state(1, LARGE), strict=True)

    checkpoints = open_checkpoints(tmp_path, keep=1)
    checkpoints.save(2, make_state(2, LARGE), {'step': 2}, {})
    checkpoints.wait()
    checkpoints.close()
    assert checkpoint.steps(tmp_path / 'checkpoints') == [2]
    assert checkpoint.newest_sound(tmp_path / 'checkpoints') == 2


def test_the_best_and_the_newest_stay(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep=1, best='probe/top1')
    for step, top1 in ((1, 0.3), (2, 0.7), (3, 0.5), (4, 0.7), (5, None), (6, 0.1)):
        checkpoints.save(step, make_state(step), {'step': step}, {})
        checkpoints.wait()
        if top1 is None:
            continue
        folder = tmp_path / 'evals' / f'step_{step:06d}'
        folder.mkdir(parents=True)
        results = {'probe': {'scalars': {'top1': top1}, 'artifacts': {}}}
        (folder / 'results.json').write_text(json.dumps(results))
    checkpoints.close()
    assert checkpoint.steps(tmp_path / 'checkpoints') == [2, 6]
