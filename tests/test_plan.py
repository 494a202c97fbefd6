"""Plans: what is exact is checked against the state and by hand, what is a bound against its own definition; a real compile for eight CPU devices."""

import importlib.util
import json
import pathlib
import re

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
from vatt_jax.parallel import sharding
from vatt_jax.performance import chips, flops, hlo
from vatt_jax.planning import compilation, plan

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    'text, chips_, devices, hosts, island',
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
def test_topologies(text, chips_, devices, hosts, island):
    t = chips.parse(text)
    assert (t.chips, t.devices, t.hosts, t.island, str(t)) == (chips_, devices, hosts, island, text)


@pytest.mark.parametrize(
    'text, sentence',
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
def test_impossible_topologies_are_sentences(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        chips.parse(text)


def test_rates_of_links():
    """Bytes a device can take in: two links on an axis that closes to a ring, one on one that does not; a switch gives all it has."""
    rate = lambda text: chips.parse(text).link_rate / 1e9
    assert rate('v5e:16x16') == 200 and rate('v5e:4x4') == 100 and rate('v5e:16x4') == 150
    assert rate('v5p:4x4x4') == 600 and rate('v5p:2x2x1') == 200 and rate('tpu7x:4x4x4') == 300
    assert rate('h100:8x8') == 450 and chips.parse('cpu:8').link_rate is None


def test_bytes_inside_and_between_islands():
    """Eight devices in two islands: a sum goes round inside, and a quarter of it, each device's share, between them."""
    island = np.repeat([0, 1], 4)
    everyone = tuple(range(8))
    assert plan.by_way([hlo.Collective('all-reduce', 80.0, 8, 3.0, everyone)], island) == {
        'links': 3 * 2 * 80 * 3 / 4,
        'network': 3 * 2 * 80 / 4 / 2,
    }
    assert plan.by_way([hlo.Collective('all-gather', 80.0, 8, 1.0, everyone)], island) == {
        'links': 60,
        'network': 10,
    }
    assert plan.by_way([hlo.Collective('reduce-scatter', 80.0, 4, 1.0, (4, 5, 6, 7))], island) == {
        'links': 60,
        'network': 0,
    }
    assert plan.by_way([hlo.Collective('all-gather', 80.0, 2, 1.0, (0, 4))], island) == {
        'links': 0,
        'network': 40,
    }
    assert plan.by_way([hlo.Collective('collective-permute', 80.0, 2, 2.0, (3, 4))], island) == {
        'links': 0,
        'network': 160,
    }


def test_out_of_memory_is_understood():
    message = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm '
        'capacity by 4.75G.'
    )
    assert plan.out_of_memory(message) == (20.5 * 2**30, 15.75 * 2**30)
    assert plan.out_of_memory('INVALID_ARGUMENT: something else') is None
    result = {
        'mesh': {'replica': 4, 'fsdp': 1, 'model': 1, 'seq': 1},
        'model': {'remat': 'none', 'layers': True},
        'per_device_batch': 32.0,
        'accumulate': 1,
    }
    told = '\n'.join(plan.would_fit(result, {'limit': 16e9, 'state': 4e9, 'peak': 28e9}))
    # 24 GB for 32 clips, and nine tenths of 12 GB to spend: 14 clips
    assert (
        'config.mesh.fsdp=4' in told
        and "config.model.remat='full'" in told
        and 'about 14 clips' in told
        and 'config.batch_size=56' in told
    )
    assert 'config.accumulate=4' in told
    without = plan.would_fit(
        {**result, 'model': {'remat': 'none', 'layers': False}},
        {'limit': 16e9, 'state': 4e9, 'peak': 28e9},
    )
    assert not any(
        'remat' in t for t in without
    )  # convolutional towers have no layers to compute again
    told = '\n'.join(
        plan.would_fit(
            {**result, 'mesh': {'replica': 1, 'fsdp': 4}},
            {'limit': 3e9, 'state': 4e9, 'peak': None},
        )
    )
    assert 'alone are 4.0 GB of 3.0' in told and 'config.mesh' not in told
    # where activations fill the memory, sharing 4 GB of parameters is no advice
    assert not any(
        'fsdp' in t for t in plan.would_fit(result, {'limit': 16e9, 'state': 4e9, 'peak': 100e9})
    )
    assert any(
        'fsdp' in t for t in plan.would_fit(result, {'limit': 99e9, 'state': 4e9, 'peak': 100e9})
    )  # it is enough here
    (few,) = plan.would_fit(
        {**result, 'model': {'remat': 'full', 'layers': False}},
        {'limit': 100e9, 'state': 4e9, 'peak': None},
    )
    assert few.startswith('fewer clips a device at a time')


@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    """(folder, config, data, plan) of the tiny config on 2 × 2 CPU devices, compiled."""
    folder = tmp_path_factory.mktemp('plan')
    config = tiny.config(batch_size=8, mesh__replica=2, mesh__fsdp=2)
    data = data_pipelines.open(config)
    plan.loop.resolve(config, data)
    return (
        folder,
        config,
        data,
        plan.plan(config, data, chips.parse('cpu:4'), folder, ['said beforehand']),
    )


def test_a_plan_of_the_real_step(planned):
    _, config, data, p = planned
    built = plan.loop.assemble(
        config, data, sharding.make_mesh(dict(config.mesh), jax.devices()[:4])
    )
    with jax.set_mesh(built.mesh):
        state = built.init()
    assert (
        p['parameters']['trained']
        == p['parameters']['total']
        == sum(x.size for x in jax.tree.leaves(state.params))
    )
    assert p['parameters']['optimizer_slots'] == 2 * p['parameters']['total']
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert p['memory']['state'] == own
    # what the compiler says of its arguments: the state and this device's four clips
    assert own + p['memory']['batch'] == pytest.approx(p['memory']['arguments'], rel=0.01)
    assert (
        p['memory']['temporaries'] > 0
        and p['memory']['peak'] > p['memory']['arguments']
        and p['memory']['fits'] is None
    )
    assert (
        p['mesh'] == {'replica': 2, 'fsdp': 2, 'model': 1, 'seq': 1} and p['per_device_batch'] == 2
    )
    # every gradient is summed over the devices one way or another
    received = sum(c['received'] for c in p['collectives'])
    assert received > 4 * p['parameters']['trained']
    assert p['flops']['executed_step'] > 0.9 * p['flops']['model_step'] > 0
    assert (
        p['host']['frames_per_clip'] == 4
        and p['host']['bytes_per_clip'] > 4 * 16 * 16 * 3 + 1024 * 2
    )
    assert (
        'bound' not in p['roofline'] and p['roofline']['bytes']['memory'] > p['memory']['arguments']
    )
    assert 'said beforehand' in p['notes']


def test_a_plan_is_kept_and_shown(planned, monkeypatch):
    folder, config, data, p = planned
    monkeypatch.setattr(plan, 'compile_step', lambda *a: pytest.fail('compiled again'))
    again = plan.plan(config, data, chips.parse('cpu:4'), folder, ['said beforehand'])
    assert (
        again.pop('cached')
        and not p['cached']
        and again == json.loads(json.dumps({k: v for k, v in p.items() if k != 'cached'}))
    )
    named = config.copy_and_resolve_references()
    named.name, named.log_every = 'another name', 7  # nothing that a plan depends on
    assert plan.plan(named, data, chips.parse('cpu:4'), folder, ['said beforehand'])['cached']
    (text,) = [f.read_text() for f in folder.glob('*.txt')]
    assert text == plan.table(p)
    for piece in (
        'tiny on cpu:4',
        'replica=2 × fsdp=2',
        'batch 8 (2 clips a device)',
        'trained',
        'all-reduce',
        'temporaries',
        'note: said before',
    ):
        assert piece in text, text
    config = config.copy_and_resolve_references()
    config.model.remat = 'full'
    assert plan.digest(config, chips.parse('cpu:4'), data, []) != plan.digest(
        named, chips.parse('cpu:4'), data, []
    )


def test_a_plan_without_a_compiler(monkeypatch):
    """GPUs that are not here: the state is exact, collectives are the least there can be, and the plan says what it lacks and what would help."""
    monkeypatch.setattr(compilation, 'PLUGINS', ())
    config = tiny.config(batch_size=128, mesh__replica=-1, compute_dtype='bfloat16')
    data = data_pipelines.open(config)
    p = plan.plan(config, data, chips.parse('h100:8x8'))
    assert (
        p['compiled'] is None
        and p['memory']['temporaries'] is None
        and p['memory']['fits'] is None
        and p['memory']['limit'] == 80e9
    )
    (reduce,) = p['collectives']
    trained = p['parameters']['trained']
    assert (reduce['kind'], reduce['group'], reduce['bytes']) == ('all-reduce', 64, 2 * trained)
    assert p['roofline']['bytes']['network'] == pytest.approx(2 * 2 * trained / 8 * 7 / 8)
    seconds = p['roofline']['seconds']
    assert seconds['memory'] is None and seconds['network'] == pytest.approx(
        2 * 2 * trained / 8 * 7 / 8 / 50e9
    )
    assert seconds['compute'] == pytest.approx(p['flops']['model_step'] / 64 / 989.4e12)
    assert p['roofline']['bound'] == max(t for t in seconds.values() if t is not None)
    assert p['roofline']['mfu'] == pytest.approx(seconds['compute'] / p['roofline']['bound'])
    assert p['run']['chip_hours'] == pytest.approx(
        config.steps * p['roofline']['bound'] * 64 / 3600
    )
    shown = plan.table(p)
    assert 'pip install --no-deps jax-cuda12-plugin==' in shown
    assert (
        'nothing was compiled' in shown
        and 'without recomputation' in shown
        and 'chip-hours' in shown
    )
    config.mesh.fsdp = 8
    sharded = plan.plan(config, data, chips.parse('h100:8x8'))
    kinds = {(c['kind'], c['group']): c for c in sharded['collectives']}
    assert kinds['all-gather', 8]['count'] == 2 and kinds['all-reduce', 8][
        'bytes'
    ] == pytest.approx(kinds['reduce-scatter', 8]['bytes'] / 8)
    assert sharded['memory']['state'] < p['memory']['state']


def test_a_step_that_reads_columns_is_traced_with_them():
    """k-means labels come to a batch from the last refresh; nothing has been refreshed when a run is planned."""
    config = tiny_cli.get_config('kmeans')
    built = plan.loop.assemble(
        config, data_pipelines.open(config), sharding.make_mesh({'replica': 1})
    )
    assert {k: (x.shape, x.dtype) for k, x in built.batch['columns'].items()} == {
        'cluster.joint': ((8,), np.int32)
    }
    with jax.set_mesh(built.mesh):
        assert flops.count(built.step.trace(built.shape, built.batch).jaxpr.jaxpr).flops > 0


def test_what_cannot_be_compiled_here_is_replaced_and_told():
    config = tiny.config(model__attention='cudnn')
    config.compiler_options = {'xla_cpu_use_fusion_emitters': False, 'xla_tpu_x': 1}
    told = ' '.join(plan.suit(config, chips.CHIPS['v5e']))
    assert config.model.attention == 'dense' and dict(config.compiler_options) == {'xla_tpu_x': 1}
    assert 'cudnn is a kernel of GPUs; on v5e dense is planned' in told
    assert 'xla_cpu_use_fusion_emitters' in told and 'that of bfloat16' in told


@pytest.mark.parametrize('name', ['lbs', 'agnostic_medium', 'mmv'])
def test_auto_attention_is_planned_as_the_machine_would_run_it(name):
    """splash where nothing asks for dropout on probabilities, which the option `fused` states; dense as published."""

    def planned(config, chip):
        notes = plan.suit(config, chips.CHIPS[chip])
        return config.model.attention, ' '.join(notes)

    fused = lambda: vatt.get_config(f'{name},synthetic,fused')
    assert planned(fused(), 'v5e')[0] == 'splash' and planned(fused(), 'cpu')[0] == 'dense'
    assert (
        planned(fused(), 'h100')[0] == 'triton'
        and 'another fused kernel (triton) is compiled in its place' in planned(fused(), 'h100')[1]
    )
    published = vatt.get_config(f'{name},synthetic')
    published.model.attention = 'auto'
    assert planned(published, 'v5e')[0] == ('splash' if name == 'mmv' else 'dense')
    published.model.attention = 'splash'
    assert 'splash is a kernel of TPUs; on h100 dense is planned' in planned(published, 'h100')[1]


@pytest.mark.slow
def test_no_logits_in_the_compiled_program(tmp_path, monkeypatch):
    """VATT with fused attention for v5e:2x2: no buffer as large as tokens × tokens for each clip and head, which the dense program has."""
    pytest.importorskip('libtpu', reason='compiling for TPUs takes libtpu')
    import subprocess
    import sys

    script = (
        "import os, sys; from vatt_jax.performance import chips; t = chips.parse('v5e:2x2'); os.environ.update(chips.environment(t)); "
        'import data_pipelines; from configs import vatt; from vatt_jax.performance import hlo; from vatt_jax.planning import plan; '
        "c = vatt.get_config('bbs,synthetic' + sys.argv[1]); c.batch_size = 16; "
        "[t.update({'layers': 2}) for t in c.model.towers.values()]; read = hlo.read; "
        "hlo.read = lambda text: (open(sys.argv[2], 'w').write(text), read(text))[1]; plan.plan(c, data_pipelines.open(c), t, quick=True); "
        'os._exit(0)'
    )
    found = {}
    for option in (',fused', ''):
        file = tmp_path / f'program{option}.txt'
        done = subprocess.run(
            [sys.executable, '-c', script, option, str(file)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        dims = [
            [int(n) for n in d.split(',')]
            for d in re.findall(r'\b(?:f32|bf16|pred)\[([\d,]+)\]', file.read_text())
        ]
        found[option] = [d for d in dims if len(d) >= 3 and sum(n in (785, 896) for n in d) >= 2]
    assert not found[',fused'] and found['']


@pytest.mark.slow
def test_search_tells_each_and_names_the_fastest(monkeypatch):
    monkeypatch.setattr(compilation, 'PLUGINS', ())
    config = tiny.config(batch_size=64, mesh__replica=-1)
    lines = []
    best = plan.search(
        config, data_pipelines.open(config), chips.parse('h100:1x8'), None, report=lines.append
    )
    rates = [float(line.split()[6]) for line in lines[1:-1] if 'not' not in line]
    assert best['roofline']['clips_per_s'] == pytest.approx(max(rates), rel=1e-2)
    assert (
        lines[-1].startswith('fastest that fits: config.mesh.fsdp=')
        and f'config.batch_size={best["batch"]}' in lines[-1]
    )
    widths = {line.split()[0] for line in lines[1:-1]}
    assert widths == {'1', '8'}


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--topology=v7:4x4'], ["--topology=v7:4x4: no chip 'v7'", 'v5e']),
        ([], ['--mode=plan: expected --topology']),
        (['--topology=v5e:4x4', '--search', '--quick'], ['--search has further plans', 'drop one']),
        (['--machine=laptop'], ["--machine='laptop'", 'v5e_256']),
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
    assert code == 2 and all(w in err for w in words), err


def test_a_missing_libtpu_is_told():
    if importlib.util.find_spec('libtpu'):
        pytest.skip('libtpu is here')
    with pytest.raises(
        ConfigError, match=r"libtpu, which is not installed; pip install 'vatt_jax\[tpu\]'"
    ):
        plan.devices_of(chips.parse('v5e:4x4'))


@pytest.mark.parametrize('machine', machines.MACHINES)
def test_machines_take_every_config(machine):
    """Only mesh and platform change, the mesh fills the machine, and the published batch divides over it."""
    topology = chips.parse(machines.MACHINES[machine].topology)
    for config in [vatt.get_config(name) for name in presets.MODELS] + [default.get_config()]:
        before = dict(configs.flatten(config))
        config.batch_size = 4096
        machines.apply(config, machine)
        shape = configs.check_batch(config, topology.devices, 1)
        assert np.prod(shape) == topology.devices
        configs.check_fields(config, default.get_config())
        changed = {k for k, v in configs.flatten(config) if before[k] != v} - {'batch_size'}
        assert changed <= {'mesh.replica', 'mesh.fsdp', 'mesh.model', 'mesh.seq', 'jax_platform'}


@pytest.mark.parametrize('file', ['jobset.yaml', 'jobset_gpu.yaml'])
def test_launch_files_agree_with_machines(file):
    """Pods times accelerators of a pod make the machine that the command names; its flags are run.py's."""
    import run

    manifest = yaml.safe_load((ROOT / 'launch' / file).read_text())
    job = manifest['spec']['replicatedJobs'][0]
    spec = job['template']['spec']
    (container,) = spec['template']['spec']['containers']
    flags, overrides = run.parse(container['args'])
    configs.load(flags.config)
    assert not overrides and spec['completions'] == spec['parallelism']
    (each,) = container['resources']['limits'].values()
    assert (
        chips.parse(machines.MACHINES[flags.machine].topology).chips
        == job['replicas'] * spec['completions'] * each
    )


def test_slurm_script_agrees_with_machines():
    script = (ROOT / 'launch' / 'slurm.sh').read_text()
    value = lambda name: int(re.search(rf'#SBATCH --{name}=(\d+)', script)[1])
    machine = re.search(r'--machine=(\w+)', script)[1]
    assert (
        value('nodes') * value('gpus-per-node')
        == chips.parse(machines.MACHINES[machine].topology).chips
    )
    assert value('ntasks-per-node') == 1 and '#SBATCH --signal=TERM@' in script


COMPILERS = [('libtpu', 'v5e:2x2'), ('jax_cuda12_plugin', 'h100:2x2')]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bbs', 'mmv'])
@pytest.mark.parametrize('compiler, topology', COMPILERS)
def test_published_configs_compile(name, compiler, topology, tmp_path):
    """The real step of a published config for v5e:2x2 or two hosts of two H100, to its buffer assignment, in a process of its own."""
    pytest.importorskip(compiler, reason=f'compiling for {topology} takes {compiler}')
    import subprocess
    import sys

    done = subprocess.run(
        [
            sys.executable,
            'run.py',
            '--mode=plan',
            f'--config=configs/vatt.py:{name},synthetic',
            f'--topology={topology}',
            '--config.batch_size=16',
            '--quick',
            f'--workdir={tmp_path}',
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=1800,
    )
    assert done.returncode == 0 and 'clips/s' in done.stdout, done.stdout + done.stderr
    (p,) = [json.loads(f.read_text()) for f in (tmp_path / 'plan').glob('*.json')]
    assert p['memory']['peak'] > p['memory']['state'] and p['notes'] == [plan.QUICK]
    reduced = sum(c['bytes'] for c in p['collectives'] if c['kind'] == 'all-reduce')
    assert reduced > 2 * 0.95 * p['parameters']['trained']  # every gradient, in bfloat16
    assert (p['roofline']['bytes']['network'] > 0) == (
        compiler != 'libtpu'
    )  # two hosts of GPUs, one slice
    assert 0 < p['roofline']['mfu'] < 1


@pytest.mark.slow
@pytest.mark.parametrize('compiler, topology', COMPILERS)
def test_a_quick_plan_is_that_of_the_whole_compile(tmp_path, compiler, topology):
    """The same program and arguments; of the temporaries all but what the generation of code adds."""
    pytest.importorskip(compiler, reason=f'compiling for {topology} takes {compiler}')
    import subprocess
    import sys

    script = (
        f"import os, sys, json; from vatt_jax.performance import chips; t = chips.parse('{topology}'); os.environ.update(chips.environment(t)); "
        'import data_pipelines; from tests import tiny; from vatt_jax.planning import plan; '
        "c = tiny.config(batch_size=64, mesh__replica=2, mesh__fsdp=2, compute_dtype='bfloat16', model__scan=True); "
        'made = [plan.plan(c, data_pipelines.open(c), t, quick=quick) for quick in (False, True)]; '
        'print(json.dumps(made), flush=True); os._exit(0)'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=ROOT, text=True, capture_output=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, quick = json.loads(done.stdout.splitlines()[-1])
    assert quick['notes'] == [*whole['notes'], plan.QUICK]
    assert (
        quick['collectives'] == whole['collectives']
        and quick['roofline']['bytes'] == whole['roofline']['bytes']
    )
    assert quick['memory']['arguments'] == whole['memory']['arguments']
    assert (
        0 < quick['memory']['temporaries'] <= 1.001 * whole['memory']['temporaries']
        and quick['memory']['live'] is None
    )
