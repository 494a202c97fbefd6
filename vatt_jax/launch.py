"""Starts one command as several processes of this machine that train together.

    python -m vatt_jax.launch --processes=2 run.py --config=configs/demo.py --workdir=runs/two
    python -m vatt_jax.launch --processes=8 --each=gpu run.py --config=configs/vatt.py:bbs --workdir=runs/bbs      # one GPU each
    python -m vatt_jax.launch --processes=2 --each=4 run.py …                                                      # four simulated CPU devices each

Process 0 speaks; what the others say is shown when they fail. SIGTERM and SIGINT go to all of them, once: they save the same step and leave.
When one fails, the rest is given 20 seconds and then ended. The exit code is that of the first to fail (128 + signal for a killed one),
0 when all succeed. Several machines: docs/scaling.md.
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

GRACE = 20.0  # seconds
LINES = 60  # of a silent process's output that are kept for the case that it fails


def environment(process: int, processes: int, port: int, each: str) -> dict[str, str]:
    """What process number `process` gets beside the environment there is."""
    own = {
        'VATT_COORDINATOR': f'127.0.0.1:{port}',
        'VATT_PROCESSES': str(processes),
        'VATT_PROCESS': str(process),
    }
    if each == 'gpu':
        return own | {'VATT_DEVICES': str(process)}
    return own | ({'JAX_NUM_CPU_DEVICES': each, 'JAX_PLATFORMS': 'cpu'} if each else {})


class Together:
    """The processes of one command, from start to the exit code of them all."""

    def __init__(self, command: list[str], processes: int, each: str = '', grace: float = GRACE):
        self.grace, self.heard = grace, [collections.deque(maxlen=LINES) for _ in range(processes)]
        self.asked = False
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        # Sessions of their own: a terminal's Ctrl-C reaches this process alone, which hands it on once.
        self.children = [
            subprocess.Popen(
                command,
                env=os.environ | environment(i, processes, port, each),
                start_new_session=True,
                **({} if i == 0 else {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}),
            )
            for i in range(processes)
        ]
        self.listeners = [
            threading.Thread(target=self._listen, args=(i,), daemon=True)
            for i in range(1, processes)
        ]
        for t in self.listeners:
            t.start()

    def _listen(self, i: int) -> None:
        for line in self.children[i].stdout:
            self.heard[i].append(line.decode(errors='replace').rstrip('\n'))

    def forward(self, number: int, *_) -> None:
        """A signal handler: sends it to all that still run. The second time SIGKILL."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if self.asked else number)
        self.asked = True

    def wait(self) -> int:
        """Exit code of the whole, once every process has ended."""
        first, since = None, 0.0
        while any(c.poll() is None for c in self.children):
            failed = [i for i, c in enumerate(self.children) if c.poll() not in (None, 0)]
            if failed and first is None:
                first, since = failed[0], time.monotonic()
            waited = time.monotonic() - since if first is not None else 0.0
            if waited > self.grace:
                for child in self.children:
                    if child.poll() is None:
                        child.send_signal(
                            signal.SIGTERM if waited < 2 * self.grace else signal.SIGKILL
                        )
            time.sleep(0.05)
        if first is None:
            first = next((i for i, c in enumerate(self.children) if c.returncode), None)
        for t in self.listeners:
            t.join(5)
        if first is None:
            return 0
        if self.heard[first]:
            print(f'process {first} said last:', *self.heard[first], sep='\n', file=sys.stderr)
        code = self.children[first].returncode
        how = f'signal {-code}' if code < 0 else f'exit code {code}'
        print(
            f'process {first} of {len(self.children)} ended with {how}', file=sys.stderr, flush=True
        )
        return 128 - code if code < 0 else code


def main(argv: list[str]) -> int:
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
        help='gpu: one GPU for each process; a number: so many simulated CPU devices; default: all there is',
    )
    parser.add_argument('command', nargs=argparse.REMAINDER, help='run.py and its arguments')
    flags = parser.parse_args(argv)
    if flags.processes < 1:
        parser.error(f'--processes={flags.processes}: a positive number is wanted')
    if flags.each not in ('', 'gpu') and not (flags.each.isdigit() and int(flags.each)):
        parser.error(f'--each={flags.each}: gpu or a positive number of CPU devices is wanted')
    if not flags.command or not os.path.exists(flags.command[0]):
        parser.error(
            f'{flags.command[0] if flags.command else "nothing"} is no file; give the script to start, such as run.py, and its arguments'
        )
    together = Together([sys.executable, *flags.command], flags.processes, flags.each)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, together.forward)
    return together.wait()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
