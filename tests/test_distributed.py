"""Several processes: which position an environment gives each, barriers, and the launcher."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import runs
from vatt_jax import launch
from vatt_jax.config import ConfigError
from vatt_jax.parallel import distributed
from vatt_jax.parallel.distributed import Position

ROOT = pathlib.Path(__file__).parent.parent
SLURM = {
    'SLURM_JOB_ID': '70000',
    'SLURM_NTASKS': '4',
    'SLURM_PROCID': '2',
    'SLURM_LOCALID': '0',
    'SLURM_STEP_NODELIST': 'gpu[007-009,12]',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_STEP_TASKS_PER_NODE': '1(x4)',
}
OMPI = {
    'OMPI_COMM_WORLD_SIZE': '4',
    'OMPI_COMM_WORLD_RANK': '3',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


GKE = {'TPU_WORKER_HOSTNAMES': 'mbs-0.mbs,mbs-1.mbs', 'TPU_WORKER_ID': '1'}


SALLOC = {name: value for name, value in SLURM.items() if not name.startswith('SLURM_STEP')}
OMPI_WITHOUT_URI = {name: value for name, value in OMPI.items() if 'orte' not in name}


def by_hand(coordinator: str, processes: str, process: str, **more: str) -> dict[str, str]:
    """What a user sets."""
    return {
        'VATT_COORDINATOR': coordinator,
        'VATT_PROCESSES': processes,
        'VATT_PROCESS': process,
        **more,
    }


@pytest.mark.parametrize(
    'environment, expected',
    [
        ({}, None),
        (by_hand('node1:8476', '3', '2'), Position('node1:8476', 3, 2)),
        (
            by_hand('node1:8476', '2', '0', VATT_DEVICES='4,5'),
            Position('node1:8476', 2, 0, (4, 5)),
        ),
        (by_hand('node1:8476', '1', '0'), None),
        # a Kubernetes indexed job
        (
            {
                'VATT_COORDINATOR': 'mbs-0.mbs:8476',
                'VATT_PROCESSES': '8',
                'JOB_COMPLETION_INDEX': '5',
            },
            Position('mbs-0.mbs:8476', 8, 5),
        ),
        # what is said by hand comes first
        ({**SLURM, **by_hand('node1:8476', '2', '1')}, Position('node1:8476', 2, 1)),
        # srun with one task a node: all of its GPUs; with several: one each
        (SLURM, Position('gpu007:61808', 4, 2)),
        (
            {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_LOCALID': '1'},
            Position('gpu007:61808', 4, 2, (1,)),
        ),
        (
            {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '1,3', 'SLURM_LOCALID': '0'},
            Position('gpu007:61808', 4, 2, (0,)),
        ),
        # salloc or a batch script without srun is one process
        (SALLOC, None),
        ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, None),
        # the shell of `srun --pty bash`, with some variables not handed on
        (without({**SLURM, 'SLURM_PROCID': '0'}, 'SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS'), None),
        (
            without(
                {
                    **SLURM,
                    'SLURM_PROCID': '0',
                    'SLURM_STEP_NUM_TASKS': '1',
                    'SLURM_STEP_TASKS_PER_NODE': '4',
                },
                'SLURM_LOCALID',
                'SLURM_JOB_ID',
            ),
            None,
        ),
        # one task a node needs no local number
        (without(SLURM, 'SLURM_LOCALID'), Position('gpu007:61808', 4, 2)),
        # one process of mpirun, whatever else is unset
        ({'OMPI_COMM_WORLD_SIZE': '1'}, None),
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, None),
        # Open MPI with two tasks a node, with one, and with all on one node
        (OMPI, Position('10.96.0.1:62624', 4, 3, (1,))),
        (
            {
                **OMPI,
                'OMPI_COMM_WORLD_LOCAL_SIZE': '1',
                'OMPI_MCA_orte_hnp_uri': '4096.0;tcp6://[fe80::b9b,2620::2]:43370',
            },
            Position('[fe80::b9b]:61441', 4, 3),
        ),
        ({**OMPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '4'}, Position('127.0.0.1:62624', 4, 3, (1,))),
        ({**OMPI, 'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'}, None),
        # Cloud TPU hosts, of one slice and of several
        (GKE, Position('mbs-0.mbs:8482', 2, 1)),
        (
            {
                **GKE,
                'MEGASCALE_NUM_SLICES': '4',
                'MEGASCALE_SLICE_ID': '3',
                'MEGASCALE_COORDINATOR_ADDRESS': 'mbs-slice-0-0.mbs:8080',
            },
            Position('mbs-slice-0-0.mbs:8482', 8, 7),
        ),
        ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
    ],
)
def test_position_of_a_process(environment, expected):
    assert distributed.find_position(environment) == expected


@pytest.mark.parametrize(
    'environment, message',
    [
        ({'VATT_PROCESSES': '2'}, 'VATT_PROCESSES=2 without VATT_COORDINATOR'),
        ({'VATT_COORDINATOR': 'node1'}, 'VATT_COORDINATOR=node1: expected host:port'),
        (by_hand('node1:1', '2', '2'), "VATT_PROCESS='2': give the number of processes"),
        (
            by_hand('node1:1', '2', '0', VATT_DEVICES='all'),
            'VATT_DEVICES=all: expected numbers',
        ),
        ({**SLURM, 'SLURM_PROCID': '4'}, 'this is process 4 of 4'),
        (
            OMPI_WITHOUT_URI,
            'Open MPI does not say where process 0 is; name it: mpirun -x VATT_COORDINATOR',
        ),
        (
            without({**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '4'}, 'SLURM_LOCALID'),
            'of srun, but SLURM_LOCALID is not set: expected a number. .* VATT_COORDINATOR',
        ),
        (without(SLURM, 'SLURM_JOB_ID'), 'SLURM_JOB_ID is not set'),
        (
            without(SLURM, 'SLURM_NTASKS', 'SLURM_STEP_NUM_TASKS'),
            'SLURM_NTASKS is not set: expected a number',
        ),
        ({**SLURM, 'SLURM_PROCID': 'x'}, "SLURM_PROCID='x': expected a number"),
        ({**SLURM, 'SLURM_STEP_NODELIST': ''}, "SLURM_STEP_NODELIST='' names no host"),
        (
            without(OMPI, 'OMPI_COMM_WORLD_LOCAL_SIZE'),
            'of mpirun, but OMPI_COMM_WORLD_LOCAL_SIZE is not set',
        ),
        (without(OMPI, 'OMPI_COMM_WORLD_RANK'), 'OMPI_COMM_WORLD_RANK is not set'),
        (without(OMPI, 'OMPI_COMM_WORLD_LOCAL_RANK'), 'OMPI_COMM_WORLD_LOCAL_RANK is not set'),
        ({**OMPI, 'OMPI_COMM_WORLD_SIZE': ''}, "OMPI_COMM_WORLD_SIZE='': expected a number"),
        ({**GKE, 'TPU_WORKER_ID': ''}, "of GKE, but TPU_WORKER_ID='': expected a number"),
        ({**GKE, 'MEGASCALE_NUM_SLICES': 'two'}, "MEGASCALE_NUM_SLICES='two'"),
        ({**GKE, 'MEGASCALE_NUM_SLICES': '2'}, 'MEGASCALE_SLICE_ID is not set'),
    ],
)
def test_contradictions_are_sentences(environment, message):
    with pytest.raises(ConfigError, match=message):
        distributed.find_position(environment)


@pytest.mark.parametrize(
    'nodes, expected',
    [
        ('node1', 'node1'),
        ('node1,node2', 'node1'),
        ('n[01-04]', 'n01'),
        ('n[7,9-12],m3', 'n7'),
        ('rack[2-3]-a', 'rack2-a'),
    ],
)
def test_first_host(nodes, expected):
    assert distributed.first_host(nodes) == expected


def environment_without(*prefixes: str) -> dict[str, str]:
    """This process's environment without variables that begin so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


MISSED_BARRIER = """
import sys, time, jax
jax.config.update('jax_platforms', 'cpu')
from vatt_jax.parallel import distributed
distributed.initialize(timeout=60)
own = jax.process_index()
distributed.barrier('both', 60)
print('past both', flush=True)
if own == 0:
    try:
        distributed.barrier('one', 2)
    except distributed.ProcessGone as error:
        print('RESULT', error, flush=True)
    distributed._client().key_value_set('reported', 'yes')
else:
    distributed._client().blocking_key_value_get('reported', 60_000)
"""


def test_a_barrier_names_the_host_that_did_not_come(tmp_path):
    """Two processes; the second passes the first barrier and never comes to the next."""
    script = tmp_path / 'missed_barrier.py'
    script.write_text(MISSED_BARRIER)
    coordinator = f'127.0.0.1:{runs.free_port()}'
    environment = environment_without('XLA_', 'JAX_', 'VATT_', 'SLURM_')
    environment['PYTHONPATH'] = str(ROOT)
    started = []
    for process in range(2):
        started.append(
            subprocess.Popen(
                [sys.executable, str(script)],
                env={**environment, **by_hand(coordinator, '2', str(process))},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    results = [line for line in outputs[0].splitlines() if line.startswith('RESULT')]
    assert len(results) == 1, outputs
    assert "1 of 2 processes did not come to 'one' within" in results[0], outputs
    assert f'process 1 on {socket.gethostname()}' in results[0], outputs
    assert 'past both' in outputs[1]


HEAD_OF_A_SCRIPT = """
import os, pathlib, signal, sys, time
own = int(os.environ['VATT_PROCESS'])
folder = pathlib.Path(__file__).parent
"""


def write_script(tmp_path, body: str) -> pathlib.Path:
    """A script that imports nothing slow; `own` is the number of its process."""
    script = tmp_path / 'script.py'
    script.write_text(HEAD_OF_A_SCRIPT + body)
    return script


def launched(tmp_path, body: str, *flags: str) -> subprocess.Popen:
    """`python -m vatt_jax.launch` of a script."""
    script = write_script(tmp_path, body)
    return subprocess.Popen(
        [sys.executable, '-m', 'vatt_jax.launch', *flags, str(script), 'an argument'],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


PRINT_POSITION = """
host, port = os.environ['VATT_COORDINATOR'].split(':')
devices = os.environ['JAX_NUM_CPU_DEVICES']
print(own, os.environ['VATT_PROCESSES'], host, devices, sys.argv[1])
"""


def test_launch_gives_each_its_position_and_one_speaks(tmp_path):
    process = launched(tmp_path, PRINT_POSITION, '--processes=3', '--each=4')
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert out == '0 3 127.0.0.1 4 an argument\n'
    assert err == ''
    assert launch.environment(5, 8, 1, 'gpu')['VATT_DEVICES'] == '5'
    assert 'VATT_DEVICES' not in launch.environment(5, 8, 1, '')


FAIL_IN_ONE = """
print('the reason', flush=True)
if own == 1:
    sys.exit(7)
time.sleep(600)
"""


def test_launch_ends_with_the_code_of_the_first_to_fail(tmp_path):
    """The rest, which would wait for ever, is ended; what the silent process said is shown."""
    script = write_script(tmp_path, FAIL_IN_ONE)
    group = launch.ProcessGroup([sys.executable, str(script)], 2, grace=0.5)
    group.start()
    assert group.wait() == 7
    assert list(group.heard[1]) == ['the reason']
    assert [child.returncode for child in group.children] == [-signal.SIGTERM, 7]


KILL_ONE = """
if own == 0:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_launch_reports_a_killed_process(tmp_path):
    process = launched(tmp_path, KILL_ONE, '--processes=2')
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert 'process 0 of 2 ended with signal 9' in err


LEAVE_ON_SIGTERM = """
def leave(*_):
    (folder / f'left{own}').touch()
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
(folder / f'ready{own}').touch()
time.sleep(600)
"""


def test_launch_forwards_sigterm_to_all(tmp_path):
    process = launched(tmp_path, LEAVE_ON_SIGTERM, '--processes=2')
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob('ready*'))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(path.name for path in tmp_path.glob('left*')) == ['left0', 'left1']


def test_launch_forwards_a_signal_that_comes_while_processes_start(tmp_path):
    """SIGTERM between the starts of the two: neither is left behind."""
    (tmp_path / 'script.py').write_text('import time\ntime.sleep(60)\n')
    (tmp_path / 'driver.py').write_text(
        'import os, signal, subprocess, sys\n'
        'from vatt_jax import launch\n'
        'start = subprocess.Popen\n'
        'def start_under_fire(*args, **options):\n'
        '    child = start(*args, **options)\n'
        '    print(child.pid, flush=True)\n'
        '    if options["env"]["VATT_PROCESS"] == "0":\n'
        '        os.kill(os.getpid(), signal.SIGTERM)\n'
        '    return child\n'
        'subprocess.Popen = start_under_fire\n'
        'sys.exit(launch.main(sys.argv[1:]))\n'
    )
    driver = subprocess.run(
        [sys.executable, tmp_path / 'driver.py', '--processes=2', tmp_path / 'script.py'],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    children = [int(pid) for pid in driver.stdout.split()]
    left = []
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            left.append(pid)
        except ProcessLookupError:
            pass
    assert not left
    assert driver.returncode == 128 + signal.SIGTERM and len(children) == 2


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--processes=0', 'run.py'], '--processes=0: expected a positive number'),
        (['--processes=2', '--each=all', 'run.py'], '--each=all: expected gpu or a positive'),
        (['--processes=2', 'ran.py'], 'ran.py is no file'),
        (['--processes=2'], 'nothing is no file'),
    ],
)
def test_launch_refuses_in_a_sentence(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        launch.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_launch_starts_the_installed_command(tmp_path):
    """`vatt-jax` is no file of the current folder."""
    done = subprocess.run(
        [sys.executable, '-m', 'vatt_jax.launch', '--processes=1', 'vatt-jax', '--version'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('vatt_jax ')


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_by_the_launcher(tmp_path):
    """Two processes of four devices train, one speaks.

    SIGTERM to the launcher saves one step on both, and the same command ends the run.
    """
    workdir = tmp_path / 'run'
    command = [
        sys.executable,
        '-m',
        'vatt_jax.launch',
        '--processes=2',
        '--each=4',
        'run.py',
        '--config=tests/configs/tiny.py:plain',
        '--quiet',
        f'--workdir={workdir}',
        '--config.mesh.replica=8',
    ]
    environment = environment_without('XLA_', 'VATT_', 'SLURM_')
    environment['JAX_COMPILATION_CACHE_DIR'] = str(runs.CACHE)
    environment['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    first = subprocess.Popen(
        [*command, '--config.steps=4000'],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while first.poll() is None and not (workdir / 'checkpoints' / '2').is_dir():
        time.sleep(0.05)
    first.terminate()
    out, err = first.communicate(timeout=500)
    assert first.returncode == 0, out + err
    assert out.count('asked to stop: step') == 1, out + err
    assert out.count('starting from scratch') == 1, out + err

    steps = [path.name for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
    saved = max(int(step) for step in steps)
    second = subprocess.run(
        [*command, f'--config.steps={saved + 2}'],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=550,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert f'continuing from step {saved}' in second.stdout, second.stdout + second.stderr
    assert runs.done(workdir)['step'] == saved + 2
