"""What is read from compiled programs.

A real one of eight CPU devices, and the forms that only TPU programs have: those are in data/hlo,
as libtpu writes them.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vatt_jax.parallel import sharding
from vatt_jax.performance import hlo

PROGRAMS = pathlib.Path(__file__).parent / 'data' / 'hlo'

F32, BF16, S32 = 4, 2, 4  # bytes of an element


def program_of_tpu(name):
    """The text of a program."""
    return (PROGRAMS / f'{name}.txt').read_text()


@pytest.fixture(scope='module')
def program():
    """A loop of five turns in which a device's 16 × 8 floats are summed over eight devices.

    Then they are gathered, scattered and passed on once.
    """
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})

    def device(x):
        def turn(carry, _):
            total = jax.lax.psum(carry, ('replica', 'fsdp'))
            return jnp.tanh(total @ jnp.ones((8, 8))), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        gathered = jax.lax.all_gather(x, 'fsdp', tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, 'fsdp', tiled=True)
        return jax.lax.ppermute(scattered, 'replica', [(0, 1), (1, 0)])

    rows = P(('replica', 'fsdp'))
    step = jax.shard_map(device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    x = jax.ShapeDtypeStruct((128, 8), jnp.float32)
    return jax.jit(step).lower(x).compile().as_text()


SHARD = 16 * 8 * F32  # bytes of a device's array


def test_collectives_of_a_loop(program):
    """A ring over n devices receives (n - 1) / n of the whole; a sum goes round twice."""
    report = hlo.read(program)
    assert report.unknown == []
    assert report.devices == 8
    rows = {}
    for row in hlo.summary(report.collectives):
        rows[row['kind'], row['group']] = row

    reduce = rows['all-reduce', 8]
    assert reduce['count'] == 5
    assert reduce['bytes'] == 5 * SHARD
    assert reduce['received'] == 5 * 2 * SHARD * 7 / 8
    for kind in ('all-gather', 'reduce-scatter'):
        assert rows[kind, 4]['bytes'] == 4 * SHARD
        assert rows[kind, 4]['received'] == 3 * SHARD
    assert rows['collective-permute', 2]['received'] == SHARD


def test_devices_of_a_collective(program):
    members = {each.kind: each.members for each in hlo.read(program).collectives}
    assert members['all-gather'] == (0, 1, 2, 3)
    assert members['all-reduce'] == tuple(range(8))
    assert members['collective-permute'] == (0, 4)


def test_traffic_grows_with_the_loop(program):
    """Each turn reads and writes at least what it sums: traffic is that of five turns, not one."""
    once = program.replace('"known_trip_count":{"n":"5"}', '"known_trip_count":{"n":"1"}')
    assert once != program
    five_turns, one_turn = hlo.read(program).traffic, hlo.read(once).traffic
    turn = (five_turns - one_turn) / 4
    assert 4 * SHARD <= turn <= 20 * SHARD
    assert five_turns > 5 * turn


@pytest.mark.parametrize(
    'text, expected',
    [
        ('replica_groups={{0,1,2},{3,4,5}}', [0, 1, 2]),
        ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [0, 2, 4, 6]),
        ('source_target_pairs={{3,1},{1,3}}', [3, 1]),
        ('replica_groups={}', []),
    ],
)
def test_groups_in_every_notation(text, expected):
    attributes = f', channel_id=1, {text}, use_global_device_ids=true'
    assert hlo.first_group(attributes) == expected


def loop_on_tpu(turns):
    """A loop whose number of turns is not written in it, with on-chip memory S(1).

    A gather begins before the loop, is carried on behind the arithmetic of each turn and ends
    after it.
    """
    return program_of_tpu('loop_on_tpu').replace('LIMIT', str(turns))


def test_a_program_as_libtpu_writes_it():
    report = hlo.read(loop_on_tpu(11))
    assert report.unknown == []
    (gather,) = report.collectives
    assert gather.kind == 'all-gather'
    assert gather.group == 4
    assert gather.times == 1.0
    gathered = 32 * 16 * F32
    assert gather.bytes == gathered

    # What goes to on-chip memory is not HBM's.
    counter = S32
    read_one_layer = 4 * 4 * BF16 + counter
    broadcast_counter = counter
    update_one_row_in_place = 8 * F32 + counter
    next_counter = 2 * counter
    condition = counter
    turn = read_one_layer + broadcast_counter + update_one_row_in_place + next_counter + condition
    gather_before_the_loop = 8 * 16 * F32 + gathered
    last_condition = counter
    assert report.traffic == 11 * turn + gather_before_the_loop + last_condition
    assert hlo.read(loop_on_tpu(12)).traffic - report.traffic == turn


def test_a_loop_of_unknown_length_is_reported():
    counted = hlo.read(loop_on_tpu(11))
    unknown = hlo.read(loop_on_tpu(11).replace('direction=LT', 'direction=GT'))
    assert unknown.unknown == ['loop']
    assert unknown.traffic < counted.traffic


def test_a_kernel_on_several_lines_does_not_end_its_computation():
    """Pallas kernels carry their parameters as text with line breaks.

    What comes after them in a loop counts too.
    """
    report = hlo.read(program_of_tpu('kernel_on_several_lines'))
    (reduce,) = report.collectives
    array = 256 * F32
    assert reduce.kind == 'all-reduce'
    assert reduce.bytes == array
    assert reduce.group == 2
    # the kernel and the sum read and write it
    assert report.traffic == 4 * array


def test_fusions_within_fusions():
    """A product whose weights are sliced by a fusion within the fusion.

    An update in place by another; a cast; a reduce-scatter as TPUs have it.
    """
    report = hlo.read(program_of_tpu('fusions_within_fusions'))
    product = 8 * 4 * F32 + 4 * 4 * BF16 + 8 * 4 * F32
    cast = 16 * 4 * F32
    counter = S32
    # the all-reduce's own buffer in the fusion is not marked as on-chip
    scatters = 2 * 16 * 4 * BF16 * 2
    assert report.traffic == pytest.approx(product + cast + counter + scatters)

    scatter, _ = report.collectives  # two on the channel of collectives that were put together
    assert scatter.kind == 'reduce-scatter'
    assert scatter.group == 4
    assert scatter.bytes == 128.0
    assert scatter.received == 96.0


def test_buffers_of_hbm():
    """Arguments, temporaries with constants, and outputs that are no argument's.

    What is thread-local or of another memory (color 1) is left out.
    """
    assert hlo.buffers(program_of_tpu('buffer_assignment')) == {
        'arguments': 4096 + 1024,
        'temporaries': 8192 + 64,
        'outputs': 2048,
    }
