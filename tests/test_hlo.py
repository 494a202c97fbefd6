"""What is read from compiled programs: real ones of eight CPU devices, and the forms that only TPU programs have."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vatt_jax.parallel import sharding
from vatt_jax.performance import hlo


@pytest.fixture(scope='module')
def program():
    """A loop of five turns in which a device's 16 × 8 floats are summed over eight devices, then gathered, scattered and passed on once."""
    mesh = sharding.make_mesh({'replica': 2, 'fsdp': 4})

    def device(x):
        def turn(c, _):
            return jnp.tanh(jax.lax.psum(c, ('replica', 'fsdp')) @ jnp.ones((8, 8))), None

        x, _ = jax.lax.scan(turn, x, None, length=5)
        gathered = jax.lax.all_gather(x, 'fsdp', tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, 'fsdp', tiled=True)
        return jax.lax.ppermute(scattered, 'replica', [(0, 1), (1, 0)])

    rows = P(('replica', 'fsdp'))
    f = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    return f.lower(jax.ShapeDtypeStruct((128, 8), jnp.float32)).compile().as_text()


def test_collectives_of_a_loop(program):
    report = hlo.read(program)
    size = 16 * 8 * 4
    assert report.unknown == [] and report.devices == 8
    rows = {(r['kind'], r['group']): r for r in hlo.summary(report.collectives)}
    assert rows['all-reduce', 8]['count'] == 5 and rows['all-reduce', 8]['bytes'] == 5 * size
    assert rows['all-reduce', 8]['received'] == 5 * 2 * size * 7 / 8
    assert (
        rows['all-gather', 4]['bytes'] == 4 * size and rows['all-gather', 4]['received'] == 3 * size
    )
    assert (
        rows['reduce-scatter', 4]['bytes'] == 4 * size
        and rows['reduce-scatter', 4]['received'] == 3 * size
    )
    assert rows['collective-permute', 2]['received'] == size
    members = {c.kind: c.members for c in report.collectives}
    assert (
        members['all-gather'] == (0, 1, 2, 3)
        and members['all-reduce'] == tuple(range(8))
        and members['collective-permute'] == (0, 4)
    )


def test_traffic_grows_with_the_loop(program):
    """Each turn reads and writes at least what it sums: the traffic is that of five turns, not of one."""
    once = program.replace('"known_trip_count":{"n":"5"}', '"known_trip_count":{"n":"1"}')
    assert once != program
    whole, one = hlo.read(program).traffic, hlo.read(once).traffic
    turn = (whole - one) / 4
    assert 4 * 16 * 8 * 4 <= turn <= 20 * 16 * 8 * 4 and whole > 5 * turn


@pytest.mark.parametrize(
    'text, want',
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
def test_groups_in_every_notation(text, want):
    assert hlo.first_group(f', channel_id=1, {text}, use_global_device_ids=true') == want


# As libtpu writes them: loops without a noted number of turns, on-chip memory S(1), and a gather that begins before a loop, is carried on
# behind the arithmetic of each turn and ends after it.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_start (p.0: f32[8,16]) -> (f32[32,16], u32[]) {
  %p.0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[32,16]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  %c.1 = u32[]{:S(2)} constant(0)
  ROOT %t.1 = (f32[32,16]{1,0:T(8,128)}, u32[]{:S(2)}) tuple(%all-gather.1, %c.1)
}

%fused_step (p.1: f32[8,16], p.2: f32[32,16], p.3: bf16[5,4,4], p.4: s32[]) -> (bf16[4,4], f32[32,16]) {
  %p.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %p.2 = f32[32,16]{1,0:T(8,128)} parameter(1)
  %p.3 = bf16[5,4,4]{2,1,0:T(8,128)(2,1)} parameter(2)
  %p.4 = s32[]{:T(128)} parameter(3)
  %zero = s32[]{:T(128)} constant(0)
  %slice.1 = bf16[1,4,4]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.3, %p.4, %zero, %zero), dynamic_slice_sizes={1,4,4}
  %one = bf16[4,4]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
  %all-gather.2 = f32[32,16]{1,0:T(8,128)} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t.2 = (bf16[4,4]{1,0:T(8,128)(2,1)S(1)}, f32[32,16]{1,0:T(8,128)}) tuple(%one, %all-gather.2)
}

%fused_update (q.0: f32[5,8], q.1: f32[1,8], q.2: s32[]) -> f32[5,8] {
  %q.0 = f32[5,8]{1,0} parameter(0)
  %q.1 = f32[1,8]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %update = f32[5,8]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2)
}

%body (state: (s32[], f32[8,16], f32[32,16], bf16[5,4,4], f32[5,8])) -> (s32[], f32[8,16], f32[32,16], bf16[5,4,4], f32[5,8]) {
  %state = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[32,16]{1,0}, bf16[5,4,4]{2,1,0}, /*index=4*/f32[5,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %y = f32[32,16]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %w = bf16[5,4,4]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=3
  %u = f32[5,8]{1,0} get-tuple-element(%state), index=4
  %fusion.2 = (bf16[4,4]{1,0:T(8,128)(2,1)S(1)}, f32[32,16]{1,0:T(8,128)}) fusion(%x, %y, %w, %i), kind=kOutput, calls=%fused_step
  %row = f32[1,8]{1,0:T(8,128)S(1)} broadcast(%i), dimensions={}
  %fusion.3 = f32[5,8]{1,0} fusion(%u, %row, %i), kind=kLoop, calls=%fused_update
  %next = s32[]{:T(128)S(6)} add(%i, %i)
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[32,16]{1,0}, bf16[5,4,4]{2,1,0}, f32[5,8]{1,0}) tuple(%next, %x, %y, %w, %fusion.3)
}

%condition (state.1: (s32[], f32[8,16], f32[32,16], bf16[5,4,4], f32[5,8])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[32,16]{1,0}, bf16[5,4,4]{2,1,0}, f32[5,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8,16], w.0: bf16[5,4,4], u.0: f32[5,8]) -> f32[32,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %w.0 = bf16[5,4,4]{2,1,0:T(8,128)(2,1)} parameter(1)
  %u.0 = f32[5,8]{1,0} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %fusion.1 = (f32[32,16]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%fused_start
  %gathered = f32[32,16]{1,0:T(8,128)} get-tuple-element(%fusion.1), index=0
  %start = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[32,16]{1,0}, bf16[5,4,4]{2,1,0}, f32[5,8]{1,0}) tuple(%zero.1, %a, %gathered, %w.0, %u.0)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0}, f32[32,16]{1,0}, bf16[5,4,4]{2,1,0}, f32[5,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %done = f32[32,16]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""


def test_a_program_as_libtpu_writes_it():
    report = hlo.read(TPU.replace('LIMIT', '11'))
    assert report.unknown == []
    (gather,) = report.collectives
    assert (gather.kind, gather.group, gather.times, gather.bytes) == (
        'all-gather',
        4,
        1.0,
        32 * 16 * 4,
    )
    # A turn reads one layer of the weights (and the counter) and updates one row in place; what goes to on-chip memory is not HBM's.
    counter = 4
    turn = (4 * 4 * 2 + counter) + counter + (8 * 4 + counter) + 2 * counter + counter
    assert report.traffic == 11 * turn + (8 * 16 * 4 + 32 * 16 * 4) + 4
    grown = hlo.read(TPU.replace('LIMIT', '12')).traffic
    assert grown - report.traffic == turn


def test_a_loop_of_unknown_length_is_told():
    text = TPU.replace('direction=LT', 'direction=GT').replace('LIMIT', '11')
    report = hlo.read(text)
    assert (
        report.unknown == ['loop'] and report.traffic < hlo.read(TPU.replace('LIMIT', '11')).traffic
    )


def test_a_kernel_on_several_lines_does_not_end_its_computation():
    """Pallas kernels carry their parameters as text with line breaks; what comes after them in a loop counts too."""
    program = """HloModule jit_step, num_partitions=2
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %kernel = f32[256]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{
 "xprof_metadata":"{\\"block_q\\": 896}"
}}, metadata={op_name="jit(step)/splash"}
  ROOT %total = f32[256]{0} all-reduce(%kernel), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
}
"""
    report = hlo.read(program)
    assert [(c.kind, c.bytes, c.group) for c in report.collectives] == [
        ('all-reduce', 1024.0, 2)
    ] and report.traffic == 4 * 1024


# A product whose weights are sliced by a fusion within the fusion; an update in place by another; a cast; a reduce-scatter as TPUs have it.
NESTED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%take (p.0: bf16[5,4,4], p.1: s32[]) -> bf16[4,4] {
  %p.0 = bf16[5,4,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,4,4]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,4,4}
  ROOT %one = bf16[4,4]{1,0} bitcast(%slice.1)
}

%put (q.0: f32[5,8,4], q.1: f32[1,8,4], q.2: s32[]) -> f32[5,8,4] {
  %q.0 = f32[5,8,4]{2,1,0} parameter(0)
  %q.1 = f32[1,8,4]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %update = f32[5,8,4]{2,1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2, %q.2)
}

%product (r.0: f32[8,4], r.1: bf16[5,4,4], r.2: s32[], r.3: f32[5,8,4]) -> f32[5,8,4] {
  %r.0 = f32[8,4]{1,0} parameter(0)
  %r.1 = bf16[5,4,4]{2,1,0} parameter(1)
  %r.2 = s32[] parameter(2)
  %r.3 = f32[5,8,4]{2,1,0} parameter(3)
  %weights = bf16[4,4]{1,0} fusion(%r.1, %r.2), kind=kLoop, calls=%take
  %y = f32[8,4]{1,0} convolution(%r.0, %weights), dim_labels=bf_io->bf
  %rows = f32[1,8,4]{2,1,0} bitcast(%y)
  ROOT %stacked = f32[5,8,4]{2,1,0} fusion(%r.3, %rows, %r.2), kind=kLoop, calls=%put
}

%cast (s.0: f32[16,4]) -> bf16[16,4] {
  %s.0 = f32[16,4]{1,0} parameter(0)
  ROOT %narrow = bf16[16,4]{1,0} convert(%s.0)
}

%all-reduce-scatter.1 (t.0: bf16[16,4]) -> bf16[4,4] {
  %t.0 = bf16[16,4]{1,0} parameter(0)
  %all-reduce.1 = bf16[16,4]{1,0} all-reduce(%t.0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %mine = bf16[4,4]{1,0} dynamic-slice(%all-reduce.1, %at, %at), dynamic_slice_sizes={4,4}
}

ENTRY %main (x: f32[8,4], w: bf16[5,4,4], n: s32[], u: f32[5,8,4], g: f32[16,4]) -> (f32[5,8,4], bf16[4,4]) {
  %x = f32[8,4]{1,0} parameter(0)
  %w = bf16[5,4,4]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %u = f32[5,8,4]{2,1,0} parameter(3)
  %g = f32[16,4]{1,0} parameter(4)
  %fusion.1 = f32[5,8,4]{2,1,0} fusion(%x, %w, %n, %u), kind=kOutput, calls=%product
  %fusion.2 = bf16[16,4]{1,0:S(1)} fusion(%g), kind=kLoop, calls=%cast
  %fusion.3 = bf16[4,4]{1,0:S(1)} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.4 = bf16[4,4]{1,0:S(1)} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (f32[5,8,4]{2,1,0}, bf16[4,4]{1,0:S(1)}) tuple(%fusion.1, %fusion.3)
}
"""


def test_fusions_within_fusions():
    report = hlo.read(NESTED)
    counter, product, cast = 4, 8 * 4 * 4 + 4 * 4 * 2 + 8 * 4 * 4, 16 * 4 * 4
    # the all-reduce's own buffer in the fusion is not marked as on-chip
    assert report.traffic == pytest.approx(product + cast + counter + 2 * 16 * 4 * 2 * 2)
    scatter, _ = report.collectives  # two on the channel of collectives that were put together
    assert (scatter.kind, scatter.group, scatter.bytes, scatter.received) == (
        'reduce-scatter',
        4,
        128.0,
        96.0,
    )


def test_buffers_of_hbm():
    text = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <119 sum @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4096, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 param @0> (size=4096,offset=0): f32[8,128]
allocation 2: size 1024, parameter 1, shape |bf16[4,128]| at ShapeIndex {}:
allocation 3: size 2048, output shape is |(f32[])|, maybe-live-out:
allocation 4: size 64, constant:
allocation 5: size 8192, preallocated-temp:
 value: <27 fusion @0> (size=512,offset=0): f32[128]
allocation 6: size 99999, color 1, preallocated-temp:
"""
    assert hlo.buffers(text) == {'arguments': 5120, 'temporaries': 8192 + 64, 'outputs': 2048}
