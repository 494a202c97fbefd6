"""What the commands of this project share in reading their arguments."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Iterable


def expand_home(arguments: Iterable[str]) -> list[str]:
    """Expand ~ in --flag=~/path, as shells do only where a word begins with it.

    Without this, --out=~/data would make a folder called ~.

    Args:
        arguments: of a command.

    Returns:
        The arguments with the home folder in the place of ~.
    """
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if flag.startswith('--') and (value == '~' or value.startswith('~/')):
            argument = f'{flag}{equals}{os.path.expanduser(value)}'
        expanded.append(argument)
    return expanded


def run_command() -> str:
    """The command that starts runs, for messages: as the user typed it to get here.

    Other programs (`prepare`, a notebook) name the one that is to be typed in the current folder.
    """
    program = pathlib.Path(sys.argv[0])
    if program.stem == 'vatt-jax':
        return 'vatt-jax'
    # Other packages have a __main__.py, too.
    if program.parts[-2:] == ('vatt_jax', '__main__.py'):
        return 'python -m vatt_jax'
    if program.name == 'run.py':
        return f'python {shlex.quote(str(program))}'
    return 'python run.py' if os.path.exists('run.py') else 'vatt-jax'
