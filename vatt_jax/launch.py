"""Starts one command as several processes of this machine that train group.

    # two processes
    python -m vatt_jax.launch --processes=2 run.py --config=configs/demo.py --workdir=runs/two
    # one GPU each
    python -m vatt_jax.launch --processes=8 --each=gpu run.py --config=configs/vatt.py:bbs …
    # four simulated CPU devices each
    python -m vatt_jax.launch --processes=2 --each=4 run.py …
    # where the package is installed and there is no run.py
    python -m vatt_jax.launch --processes=2 vatt-jax --config=demo --workdir=runs/two

Process 0 writes to the terminal; the output of the others is shown when they fail. SIGTERM and
SIGINT go to all of them, once: they save the same step and leave. When one fails, the rest is given
20 seconds and then ended. The exit code is that of the first to fail (128 + signal for a killed
one), 0 when all succeed. Several machines: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

GRACE = 20.0  # seconds
LINES = 60  # of a silent process's output, remembered for the case that it fails


def environment(process: int, processes: int, port: int, each: str) -> dict[str, str]:
    """Return the variables one process gets beside the environment there is.

    Args:
        process: The number of this process.
        processes: How many there are.
        port: Port of the coordinator on this machine.
        each: Devices of each process, see `--each`.
    """
    variables = {
        'VATT_COORDINATOR': f'127.0.0.1:{port}',
        'VATT_PROCESSES': str(processes),
        'VATT_PROCESS': str(process),
    }
    if each == 'gpu':
        variables['VATT_DEVICES'] = str(process)
    elif each:
        variables['JAX_NUM_CPU_DEVICES'] = each
        # On a machine with a GPU the simulated devices would otherwise not be used.
        variables['JAX_PLATFORMS'] = 'cpu'
    return variables


def _free_port() -> int:
    with socket.socket() as listener:
        # Port 0: the system picks one. It is released again before the coordinator binds it, so
        # another program could take it in between; that is rare.
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


class ProcessGroup:
    """The processes of one command, from start to the exit code of them all."""

    def __init__(self, command: list[str], processes: int, each: str = '', grace: float = GRACE):
        """Make the group; `start` starts its processes.

        Args:
            command: The program and its arguments.
            processes: How many to start.
            each: Devices of each process, see `--each`.
            grace: Seconds that the others are given when one fails.
        """
        self.command = command
        self.processes = processes
        self.each = each
        self.grace = grace
        self.asked = False  # whether a signal was forwarded
        self.started = False  # whether all processes are there to forward it to
        self.early: int | None = None  # the signal that came before they were
        # The last lines of each process; those of process 0 go to the terminal.
        self.heard: list[collections.deque[str]] = [
            collections.deque(maxlen=LINES) for _ in range(processes)
        ]
        self.children: list[subprocess.Popen[bytes]] = []
        self.listeners: list[threading.Thread] = []

    def start(self) -> None:
        """Start the processes; `forward` may be called as a signal handler from before on."""
        port = _free_port()
        for process in range(self.processes):
            output: dict[str, Any] = {}
            if process > 0:
                # One pipe for both streams keeps their lines in order.
                output = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
            child = subprocess.Popen(
                self.command,
                env=os.environ | environment(process, self.processes, port, self.each),
                # A session of its own: a terminal's Ctrl-C reaches this process alone, which
                # forwards it once.
                start_new_session=True,
                **output,
            )
            self.children.append(child)
        # A process whose output nobody reads would stop when the pipe is full.
        for process in range(1, self.processes):
            # Daemons: a grandchild that holds a pipe open must not keep this process from leaving.
            listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
            listener.start()
            self.listeners.append(listener)
        self.started = True
        if self.early is not None:
            self.forward(self.early)

    def _listen(self, process: int) -> None:
        output = self.children[process].stdout
        assert output is not None  # a pipe, as started above
        for line in output:
            # Native libraries write whatever bytes they like.
            self.heard[process].append(line.decode(errors='replace').rstrip('\n'))

    def _send(self, number: int) -> None:
        """Send a signal to all that still run."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def forward(self, number: int, *_: Any) -> None:
        """Handle a signal: send it to all that still run, the second time SIGKILL."""
        if not self.started:
            # A process that is being started would not get it.
            self.early = number
            return
        self._send(signal.SIGKILL if self.asked else number)
        self.asked = True

    def wait(self) -> int:
        """Wait until every process has ended and return the exit code of the whole."""
        failed = self._wait_for_all()
        for listener in self.listeners:
            # Their last lines may still be in the pipes.
            listener.join(5)
        if failed is None:
            return 0
        if self.heard[failed]:
            print(f'process {failed} said last:', *self.heard[failed], sep='\n', file=sys.stderr)
        code = self.children[failed].returncode
        # Popen reports a signal as its negative number, shells as 128 + number.
        ending = f'signal {-code}' if code < 0 else f'exit code {code}'
        print(
            f'process {failed} of {len(self.children)} ended with {ending}',
            file=sys.stderr,
            flush=True,
        )
        return 128 - code if code < 0 else code

    def _wait_for_all(self) -> int | None:
        """Wait for all processes and return the number of the first to fail, None without one."""
        failed: int | None = None
        failed_at = 0.0
        while any(child.poll() is None for child in self.children):
            if failed is None:
                failed = self._any_failed()
                failed_at = time.monotonic()
            if failed is not None:
                # Those that are left wait for the failed one in a collective.
                elapsed = time.monotonic() - failed_at
                # SIGTERM first: a process that is not stuck then leaves by itself.
                if elapsed > 2 * self.grace:
                    self._send(signal.SIGKILL)
                elif elapsed > self.grace:
                    self._send(signal.SIGTERM)
            # Polled, since there is no portable way to wait for any of several Popen objects.
            time.sleep(0.05)
        return self._any_failed() if failed is None else failed

    def _any_failed(self) -> int | None:
        for process, child in enumerate(self.children):
            if child.poll():  # neither running (None) nor successful (0)
                return process
        return None


def _parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; a mistake is a sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog='python -m vatt_jax.launch',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--processes', type=int, required=True)
    parser.add_argument(
        '--each',
        default='',
        help=(
            'gpu: one GPU for each process; a number: so many simulated CPU devices; default: all '
            'there is'
        ),
    )
    # REMAINDER: flags after the script are the script's.
    parser.add_argument(
        'command',
        nargs=argparse.REMAINDER,
        help='run.py, or vatt-jax where it is installed, and its arguments',
    )
    flags = parser.parse_args(argv)
    if flags.processes < 1:
        parser.error(f'--processes={flags.processes}: expected a positive number.')
    is_device_count = flags.each.isdigit() and int(flags.each) > 0
    if flags.each not in ('', 'gpu') and not is_device_count:
        parser.error(f'--each={flags.each}: expected gpu or a positive number of CPU devices.')
    if flags.command and flags.command[0] == 'vatt-jax':
        # The installed command, which is no file here.
        flags.command[:1] = ['-m', 'vatt_jax']
    elif not flags.command or not os.path.exists(flags.command[0]):
        script = flags.command[0] if flags.command else 'nothing'
        parser.error(
            f'{script} is no file; give the script to start, such as run.py or vatt-jax, and its '
            'arguments'
        )
    return flags


def main(argv: list[str]) -> int:
    """Run the command line and return the exit code."""
    flags = _parse_flags(argv)
    group = ProcessGroup([sys.executable, *flags.command], flags.processes, flags.each)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, group.forward)
    # After the handlers: a signal in between would end this process and leave the others behind.
    group.start()
    return group.wait()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
