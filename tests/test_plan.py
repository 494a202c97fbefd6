"""Plans of training steps.

What is exact is checked against the state and by hand, what is a bound against its own
definition; a real compile for eight CPU devices.
"""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import yaml

import data_pipelines
from configs import default, machines, vatt
from tests import tiny
from tests.configs import tiny as tiny_cli
from tests.test_cli import cli  # noqa: F401
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.models import presets
from vatt_jax.modes.flags import parse
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, flops, hlo
from vatt_jax.planning import compilation, plan

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30


# ---- topologies
@pytest.mark.parametrize(
    'text, number_of_chips, devices, hosts, island',
    [
        ('v5p:8x8x4', 256, 256, 64, 256),
        ('v5e:16x16', 256, 256, 32, 256),
        ('v5e:16x16*4', 1024, 1024, 128, 256),
        ('v6e:16x16', 256, 256, 32, 256),
        ('tpu7x:4x4x4', 64, 128, 16, 128),
        ('h100:8x8', 64, 64, 8, 8),
        ('h200:1x8', 8, 8, 1, 8),
        ('cpu:8', 8, 8, 1, 8),
    ],
)
def test_topologies(text, number_of_chips, devices, hosts, island):
    topology = chips.parse(text)
    assert topology.chips == number_of_chips
    assert topology.devices == devices
    assert topology.hosts == hosts
    assert topology.island == island
    assert str(topology) == text


@pytest.mark.parametrize(
    'text, message',
    [
        ('v5p', 'expected a chip and a shape, such as v5p:8x8x4'),
        ('v9:4x4', "no chip 'v9'; there are v4, v5e, v5p"),
        ('v5p:8x8', 'v5p has 3 axes, 2 given; write it like v5p:4x4x4'),
        ('v5e:16', 'write it like v5e:16x16'),
        ('cpu:2x2', 'write it like cpu:8'),
        ('h100:1x64', 'a host has 8 GPUs, 64 asked for; write hosts × GPUs, such as h100:8x8'),
        ('h100:8x8*2', 'only TPUs come in slices'),
        ('v5e:0x4', 'positive'),
        ('v5e:16x16,slices=2', 'v5e:16x16\\*4'),
    ],
)
def test_impossible_topologies_are_sentences(text, message):
    with pytest.raises(ConfigError, match=message):
        chips.parse(text)


@pytest.mark.parametrize(
    'text, gigabytes',
    [
        ('v5e:16x16', 200),
        ('v5e:4x4', 100),
        ('v5e:16x4', 150),
        ('v5p:4x4x4', 600),
        ('v5p:2x2x1', 200),
        ('tpu7x:4x4x4', 300),
        ('h100:8x8', 450),
    ],
)
def test_rates_of_links(text, gigabytes):
    """Bytes a device can take in.

    Two links on an axis that closes to a ring, one on one that does not; a switch gives all it
    has.
    """
    assert chips.parse(text).link_rate / 1e9 == gigabytes


def test_cpus_have_no_links():
    assert chips.parse('cpu:8').link_rate is None


# ---- what collectives send
ISLAND = np.repeat([0, 1], 4)  # eight devices in two islands
EVERYONE = tuple(range(8))


@pytest.mark.parametrize(
    'kind, times, members, links, network',
    [
        ('all-reduce', 3.0, EVERYONE, 3 * 2 * 80 * 3 / 4, 3 * 2 * 80 / 4 / 2),
        ('all-gather', 1.0, EVERYONE, 60, 10),
        ('reduce-scatter', 1.0, (4, 5, 6, 7), 60, 0),
        ('all-gather', 1.0, (0, 4), 0, 40),
        ('collective-permute', 2.0, (3, 4), 0, 160),
    ],
)
def test_bytes_inside_and_between_islands(kind, times, members, links, network):
    """A sum goes round inside, and a quarter of it, each device's share, between islands."""
    collective = hlo.Collective(kind, 80.0, len(members), times, members)
    assert plan.by_way([collective], ISLAND) == {'links': links, 'network': network}


# ---- memory
def test_out_of_memory_is_understood():
    message = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
        'hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.'
    )
    assert plan.out_of_memory(message) == (20.5 * GIB, 15.75 * GIB)
    assert plan.out_of_memory('INVALID_ARGUMENT: something else') is None


def advice(memory, remat='none', layers=True, replica=4, fsdp=1):
    """What would fit, for 32 clips a device."""
    result = {
        'mesh': {'replica': replica, 'fsdp': fsdp, 'model': 1, 'seq': 1},
        'model': {'remat': remat, 'layers': layers},
        'per_device_batch': 32.0,
        'accumulate': 1,
    }
    return plan.would_fit(result, memory)


def test_what_would_fit():
    """24 GB for 32 clips, and nine tenths of 12 GB to spend: 14 clips."""
    lines = '\n'.join(advice({'limit': 16e9, 'state': 4e9, 'peak': 28e9}))
    assert 'config.mesh.fsdp=4' in lines
    assert "config.model.remat='full'" in lines
    assert 'about 14 clips' in lines
    assert 'config.batch_size=56' in lines
    assert 'config.accumulate=4' in lines


def test_convolutional_towers_have_no_layers_to_compute_again():
    lines = advice({'limit': 16e9, 'state': 4e9, 'peak': 28e9}, layers=False)
    assert lines
    assert not any('remat' in line for line in lines)


def test_a_state_that_is_too_large_alone():
    lines = '\n'.join(advice({'limit': 3e9, 'state': 4e9, 'peak': None}, replica=1, fsdp=4))
    assert 'alone are 4.0 GB of 3.0' in lines
    assert 'config.mesh' not in lines


def test_sharing_parameters_is_advised_where_it_is_enough():
    """Where activations fill the memory, sharing 4 GB of parameters is no advice."""
    too_little = advice({'limit': 16e9, 'state': 4e9, 'peak': 100e9})
    enough = advice({'limit': 99e9, 'state': 4e9, 'peak': 100e9})
    assert not any('fsdp' in line for line in too_little)
    assert any('fsdp' in line for line in enough)


def test_fewer_clips_are_the_last_advice():
    memory = {'limit': 100e9, 'state': 4e9, 'peak': None}
    (line,) = advice(memory, remat='full', layers=False)
    assert line.startswith('fewer clips a device at a time')


# ---- a plan that is compiled
BEFOREHAND = 'said beforehand'


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    """(folder, config, data, plan) of the tiny config on 2 × 2 CPU devices, compiled."""
    folder = tmp_path_factory.mktemp('plan')
    config = tiny.config(batch_size=8, mesh__replica=2, mesh__fsdp=2)
    data = data_pipelines.open(config)
    plan.loop.resolve(config, data)
    made = plan.plan(config, data, chips.parse('cpu:4'), folder, [BEFOREHAND])
    return folder, config, data, made


def test_memory_of_a_plan_is_that_of_the_real_state(planned):
    _, config, data, made = planned
    mesh = sharding.make_mesh(dict(config.mesh), jax.devices()[:4])
    built = plan.loop.assemble(config, data, mesh)
    with jax.set_mesh(built.mesh):
        state = built.init()

    parameters, memory = made['parameters'], made['memory']
    total = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert parameters['trained'] == total
    assert parameters['total'] == total
    assert parameters['optimizer_slots'] == 2 * total

    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)]
    own = sum(shard.nbytes for shard in shards)
    assert memory['state'] == own
    # what the compiler says of its arguments: the state and this device's four clips
    assert own + memory['batch'] == pytest.approx(memory['arguments'], rel=0.01)
    assert memory['temporaries'] > 0
    assert memory['peak'] > memory['arguments']
    assert memory['fits'] is None


def test_a_plan_of_the_real_step(planned):
    _, _, _, made = planned
    assert made['mesh'] == {'replica': 2, 'fsdp': 2, 'model': 1, 'seq': 1}
    assert made['per_device_batch'] == 2
    # every gradient is summed over the devices one way or another
    received = sum(collective['received'] for collective in made['collectives'])
    assert received > 4 * made['parameters']['trained']
    assert made['flops']['model_step'] > 0
    assert made['flops']['executed_step'] > 0.9 * made['flops']['model_step']
    assert made['host']['frames_per_clip'] == 4
    assert made['host']['bytes_per_clip'] > 4 * 16 * 16 * 3 + 1024 * 2
    assert 'bound' not in made['roofline']
    assert made['roofline']['bytes']['memory'] > made['memory']['arguments']
    assert BEFOREHAND in made['notes']


def test_a_plan_is_stored_and_not_compiled_again(planned, monkeypatch):
    folder, config, data, made = planned
    topology = chips.parse('cpu:4')
    monkeypatch.setattr(plan, 'compile_step', lambda *args: pytest.fail('compiled again'))

    again = plan.plan(config, data, topology, folder, [BEFOREHAND])
    assert again.pop('cached')
    assert not made['cached']
    without_cached = {name: value for name, value in made.items() if name != 'cached'}
    assert again == json.loads(json.dumps(without_cached))

    # nothing that a plan depends on
    renamed = config.copy_and_resolve_references()
    renamed.name, renamed.log_every = 'another name', 7
    assert plan.plan(renamed, data, topology, folder, [BEFOREHAND])['cached']

    recomputed = config.copy_and_resolve_references()
    recomputed.model.remat = 'full'
    digest = plan.digest(recomputed, topology, data, [])
    assert digest != plan.digest(renamed, topology, data, [])


def test_a_plan_is_shown_as_a_table(planned):
    folder, _, _, made = planned
    (file,) = folder.glob('*.txt')
    text = file.read_text()
    assert text == plan.table(made)
    pieces = (
        'tiny on cpu:4',
        'replica=2 × fsdp=2',
        'batch 8 (2 clips a device)',
        'trained',
        'all-reduce',
        'temporaries',
        'note: said before',
    )
    for piece in pieces:
        assert piece in text, text


# ---- plans that are not compiled
def test_a_plan_without_a_compiler(monkeypatch):
    """GPUs that are not here.

    The state is exact, collectives are the least there can be, and the plan says what it lacks
    and what would help.
    """
    monkeypatch.setattr(compilation, 'PLUGINS', ())
    config = tiny.config(batch_size=128, mesh__replica=-1, compute_dtype='bfloat16')
    data = data_pipelines.open(config)
    made = plan.plan(config, data, chips.parse('h100:8x8'))
    memory, roofline = made['memory'], made['roofline']
    assert made['compiled'] is None
    assert memory['temporaries'] is None
    assert memory['fits'] is None
    assert memory['limit'] == 80e9

    # the sum of gradients in bfloat16, over eight hosts of eight GPUs
    (reduce,) = made['collectives']
    gradients = 2 * made['parameters']['trained']
    assert reduce['kind'] == 'all-reduce'
    assert reduce['group'] == 64
    assert reduce['bytes'] == gradients
    between_hosts = 2 * gradients / 8 * 7 / 8
    assert roofline['bytes']['network'] == pytest.approx(between_hosts)

    seconds = roofline['seconds']
    assert seconds['memory'] is None
    assert seconds['network'] == pytest.approx(between_hosts / 50e9)
    compute = made['flops']['model_step'] / 64 / 989.4e12
    assert seconds['compute'] == pytest.approx(compute)
    # Compute and network alone would promise a step that memory does not allow.
    assert not {'bound', 'mfu', 'clips_per_s'} & set(roofline)
    assert 'run' not in made

    shown = plan.table(made)
    assert 'pip install --no-deps jax-cuda12-plugin==' in shown
    assert 'nothing was compiled' in shown
    assert 'without recomputation' in shown
    assert 'no bound, MFU or hours are given' in shown
    assert 'MFU ' not in shown.replace('MFU or', '') and 'chip-hours' not in shown

    config.mesh.fsdp = 8
    sharded = plan.plan(config, data, chips.parse('h100:8x8'))
    collectives = {(each['kind'], each['group']): each for each in sharded['collectives']}
    assert collectives['all-gather', 8]['count'] == 2
    scattered = collectives['reduce-scatter', 8]['bytes']
    assert collectives['all-reduce', 8]['bytes'] == pytest.approx(scattered / 8)
    assert sharded['memory']['state'] < memory['state']


def test_a_step_that_reads_columns_is_traced_with_them():
    """k-means labels come to a batch from the last refresh.

    Nothing has been refreshed when a run is planned.
    """
    config = tiny_cli.get_config('kmeans')
    mesh = sharding.make_mesh({'replica': 1})
    built = plan.loop.assemble(config, data_pipelines.open(config), mesh)
    # Four clusters and -1 fit into eight bits.
    expected = {'cluster.joint': jax.ShapeDtypeStruct((8,), np.int8)}
    chex.assert_trees_all_equal_shapes_and_dtypes(built.batch['columns'], expected)
    with jax.set_mesh(built.mesh):
        traced = built.step.trace(built.shape, built.batch)
        assert flops.count(traced.jaxpr.jaxpr).flops > 0


def test_what_cannot_be_compiled_here_is_replaced_and_reported():
    config = tiny.config(model__attention='cudnn')
    config.compiler_options = {'xla_cpu_use_fusion_emitters': False, 'xla_tpu_x': 1}
    notes = ' '.join(plan.suit(config, chips.CHIPS['v5e']))
    assert config.model.attention == 'dense'
    assert dict(config.compiler_options) == {'xla_tpu_x': 1}
    assert 'cudnn is a kernel of GPUs; on v5e dense is planned' in notes
    assert 'xla_cpu_use_fusion_emitters' in notes
    assert 'that of bfloat16' in notes


def suited(config, chip):
    """(attention, notes) as they are planned on a chip."""
    notes = plan.suit(config, chips.CHIPS[chip])
    return config.model.attention, ' '.join(notes)


MODELS_OF_ATTENTION = pytest.mark.parametrize('name', ['lbs', 'agnostic_medium', 'mmv'])


@MODELS_OF_ATTENTION
@pytest.mark.parametrize(
    'chip, attention',
    [
        ('v5e', 'splash'),
        ('cpu', 'dense'),
        ('h100', 'triton'),
    ],
)
def test_fused_attention_is_planned_as_the_machine_would_run_it(name, chip, attention):
    """The option `fused` states that nothing asks for dropout on probabilities."""
    planned_attention, notes = suited(vatt.get_config(f'{name},synthetic,fused'), chip)
    assert planned_attention == attention
    if chip == 'h100':
        assert 'another fused kernel (triton) is compiled in its place' in notes


@MODELS_OF_ATTENTION
def test_auto_attention_is_planned_as_the_machine_would_run_it(name):
    """Dense as published, where probabilities have dropout; MMV has none."""
    published = vatt.get_config(f'{name},synthetic')
    published.model.attention = 'auto'
    attention, _ = suited(published, 'v5e')
    assert attention == ('splash' if name == 'mmv' else 'dense')

    published.model.attention = 'splash'
    _, notes = suited(published, 'h100')
    assert 'splash is a kernel of TPUs; on h100 dense is planned' in notes


# ---- programs in a process of their own
def python(*arguments):
    """Standard output of a Python process in the repository; it has half an hour."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


PROGRAM_OF_VATT = """
import os
import sys

from vatt_jax.performance import chips

topology = chips.parse('v5e:2x2')
os.environ.update(chips.environment(topology))

import data_pipelines
from configs import vatt
from vatt_jax.performance import hlo
from vatt_jax.planning import plan

_, option, file = sys.argv
config = vatt.get_config('bbs,synthetic' + option)
config.batch_size = 16
for tower in config.model.towers.values():
    tower.update({'layers': 2})
read = hlo.read


def write_and_read(text):
    with open(file, 'w') as program:
        program.write(text)
    return read(text)


hlo.read = write_and_read
plan.plan(config, data_pipelines.open(config), topology, quick=True)
os._exit(0)
"""


def is_tokens_by_tokens(dims):
    """Whether an array of three axes or more has two of the video's tokens, padded or not."""
    return len(dims) >= 3 and sum(size in (785, 896) for size in dims) >= 2


@pytest.mark.slow
def test_no_logits_in_the_compiled_program(tmp_path):
    """VATT with fused attention for v5e:2x2.

    No buffer as large as tokens × tokens for each clip and head, which the dense program has.
    """
    pytest.importorskip('libtpu', reason='compiling for TPUs takes libtpu')
    logits = {}
    for option in (',fused', ''):
        file = tmp_path / f'program{option}.txt'
        python('-c', PROGRAM_OF_VATT, option, str(file))
        logits[option] = []
        for shape in re.findall(r'\b(?:f32|bf16|pred)\[([\d,]+)\]', file.read_text()):
            dims = [int(size) for size in shape.split(',')]
            if is_tokens_by_tokens(dims):
                logits[option].append(dims)
    assert not logits[',fused']
    assert logits['']


@pytest.mark.slow
def test_search_reports_each_and_names_the_fastest(monkeypatch):
    monkeypatch.setattr(compilation, 'PLUGINS', ())
    config = tiny.config(batch_size=64, mesh__replica=-1)
    lines = []
    best = plan.search(
        config, data_pipelines.open(config), chips.parse('h100:1x8'), None, report=lines.append
    )
    rows, last = lines[1:-1], lines[-1]
    rates = [float(row.split()[6]) for row in rows if 'not' not in row]
    assert best['roofline']['clips_per_s'] == pytest.approx(max(rates), rel=1e-2)
    assert last.startswith('fastest that fits: config.mesh.fsdp=')
    assert f'config.batch_size={best["batch"]}' in last
    assert {row.split()[0] for row in rows} == {'1', '8'}


@pytest.mark.parametrize(
    'arguments, words',
    [
        (
            ['--topology=v7:4x4'],
            ["--topology=v7:4x4: no chip 'v7'", 'v5e'],
        ),
        (
            [],
            ['--mode=plan: expected --topology'],
        ),
        (
            ['--topology=v5e:4x4', '--search', '--quick'],
            ['--search has further plans', 'drop one'],
        ),
        (
            ['--machine=laptop'],
            ["--machine='laptop'", 'v5e_256'],
        ),
        (
            ['--topology=h100:1x8', '--config.batch_size=12', '--config.mesh.replica=-1'],
            ['config.batch_size=12'],
        ),
        (
            ['--topology=h100:1x8', '--config.mesh.replica=3', '--config.mesh.fsdp=16'],
            ['config.mesh', 'there are 8'],
        ),
    ],
)
def test_mistakes_on_the_command_line(cli, tmp_path, arguments, words):  # noqa: F811
    code, _, err = cli(
        '--mode=plan', '--config=tests/configs/tiny.py', f'--workdir={tmp_path}', *arguments
    )
    assert code == 2, err
    for word in words:
        assert word in err


def test_a_missing_libtpu_is_reported():
    if importlib.util.find_spec('libtpu'):
        pytest.skip('libtpu is here')
    message = r'libtpu, which is not installed; pip install "jax\[tpu\]\S+"'
    with pytest.raises(ConfigError, match=message):
        plan.devices_of(chips.parse('v5e:4x4'))


# ---- machines and launch files
@pytest.mark.parametrize('machine', machines.MACHINES)
def test_machines_take_every_config(machine):
    """Only mesh and platform change, the mesh fills the machine, and the batch divides over it."""
    topology = chips.parse(machines.MACHINES[machine].topology)
    of_machine = {'mesh.replica', 'mesh.fsdp', 'mesh.model', 'mesh.seq', 'jax_platform'}
    for config in [*map(vatt.get_config, presets.MODELS), default.get_config()]:
        before = dict(configs.flatten(config))
        config.batch_size = 4096
        machines.apply(config, machine)
        shape = configs.check_batch(config, topology.devices, 1)
        assert np.prod(shape) == topology.devices
        configs.check_fields(config, default.get_config())
        changed = {name for name, value in configs.flatten(config) if before[name] != value}
        assert changed - {'batch_size'} <= of_machine


def chips_of(machine):
    """Number of chips of a named machine."""
    return chips.parse(machines.MACHINES[machine].topology).chips


@pytest.mark.parametrize('file', ['jobset.yaml', 'jobset_gpu.yaml'])
def test_launch_files_agree_with_machines(file):
    """Pods times accelerators of a pod make the machine that the command names.

    Its flags are run.py's.
    """
    manifest = yaml.safe_load((ROOT / 'launch' / file).read_text())
    job = manifest['spec']['replicatedJobs'][0]
    spec = job['template']['spec']
    (container,) = spec['template']['spec']['containers']
    flags, overrides = parse(container['args'])
    configs.load(flags.config)
    assert not overrides
    assert spec['completions'] == spec['parallelism']
    (accelerators,) = container['resources']['limits'].values()
    assert chips_of(flags.machine) == job['replicas'] * spec['completions'] * accelerators


def test_slurm_script_agrees_with_machines():
    script = (ROOT / 'launch' / 'slurm.sh').read_text()

    def option(name):
        return int(re.search(rf'#SBATCH --{name}=(\d+)', script)[1])

    machine = re.search(r'--machine=(\w+)', script)[1]
    assert option('nodes') * option('gpus-per-node') == chips_of(machine)
    assert option('ntasks-per-node') == 1
    assert '#SBATCH --signal=TERM@' in script


# ---- compilers of machines that are not here
COMPILERS = [
    ('libtpu', 'v5e:2x2'),
    ('jax_cuda12_plugin', 'h100:2x2'),
]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bbs', 'mmv'])
@pytest.mark.parametrize('compiler, topology', COMPILERS)
def test_published_configs_compile(name, compiler, topology, tmp_path):
    """The real step of a published config for v5e:2x2 or two hosts of two H100.

    To its buffer assignment, in a process of its own.
    """
    pytest.importorskip(compiler, reason=f'compiling for {topology} takes {compiler}')
    shown = python(
        'run.py',
        '--mode=plan',
        f'--config=configs/vatt.py:{name},synthetic',
        f'--topology={topology}',
        '--config.batch_size=16',
        '--quick',
        f'--workdir={tmp_path}',
    )
    assert 'clips/s' in shown
    (file,) = (tmp_path / 'plan').glob('*.json')
    made = json.loads(file.read_text())
    assert made['memory']['peak'] > made['memory']['state']
    assert made['notes'] == [plan.QUICK]

    # every gradient, in bfloat16
    reduces = [each for each in made['collectives'] if each['kind'] == 'all-reduce']
    assert sum(each['bytes'] for each in reduces) > 2 * 0.95 * made['parameters']['trained']
    # two hosts of GPUs, one slice of TPUs
    has_network = compiler != 'libtpu'
    assert (made['roofline']['bytes']['network'] > 0) == has_network
    assert 0 < made['roofline']['mfu'] < 1


WHOLE_AND_QUICK_PLAN = """
import json
import os
import sys

from vatt_jax.performance import chips

topology = chips.parse(sys.argv[1])
os.environ.update(chips.environment(topology))

import data_pipelines
from tests import tiny
from vatt_jax.planning import plan

config = tiny.config(
    batch_size=64,
    mesh__replica=2,
    mesh__fsdp=2,
    compute_dtype='bfloat16',
    model__scan=True,
)
plans = []
for quick in (False, True):
    plans.append(plan.plan(config, data_pipelines.open(config), topology, quick=quick))
print(json.dumps(plans), flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize('compiler, topology', COMPILERS)
def test_a_quick_plan_is_that_of_the_whole_compile(compiler, topology):
    """The same program and arguments.

    Of the temporaries all but what the generation of code adds.
    """
    pytest.importorskip(compiler, reason=f'compiling for {topology} takes {compiler}')
    shown = python('-c', WHOLE_AND_QUICK_PLAN, topology)
    whole, quick = json.loads(shown.splitlines()[-1])
    assert quick['notes'] == [*whole['notes'], plan.QUICK]
    assert quick['collectives'] == whole['collectives']
    assert quick['roofline']['bytes'] == whole['roofline']['bytes']
    assert quick['memory']['arguments'] == whole['memory']['arguments']
    assert 0 < quick['memory']['temporaries'] <= 1.001 * whole['memory']['temporaries']
    assert quick['memory']['live'] is None
