"""Terminals that know ASCII alone, and names that are markup or control codes."""

import os
import pathlib
import subprocess
import sys

import pytest

from vatt_jax.planning import table as plan_table
from vatt_jax.terminal import printable

ROOT = pathlib.Path(__file__).parent.parent
# What the library prints, and what a file name may hold: a byte that is no UTF-8 among it.
TEXT = 'step 1 → 2 … 3×4 caf\udce9 日'


@pytest.mark.parametrize(
    'encoding, expected',
    [
        ('ascii', b'step 1 -> 2 ... 3x4 caf\\xe9 \\u65e5'),
        ('latin-1', b'step 1 -> 2 ... 3\xd74 caf\\xe9 \\u65e5'),
        ('utf-8', 'step 1 → 2 … 3×4 caf\\xe9 日'.encode()),
    ],
)
def test_characters_that_a_terminal_lacks(encoding, expected):
    program = (
        'import sys; from vatt_jax.terminal import use_plain_characters; use_plain_characters(); '
        f'print({TEXT!a}); print({TEXT!a}, file=sys.stderr)'
    )
    result = subprocess.run(
        [sys.executable, '-c', program],
        cwd=ROOT,
        env={**os.environ, 'PYTHONIOENCODING': encoding},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected
    assert result.stderr.strip() == expected


@pytest.mark.parametrize(
    'name, expected',
    [
        ('plain é 日本 [x].mp4', 'plain é 日本 [x].mp4'),
        ('two\nlines', 'two\\nlines'),
        ('\x1b[31mred', '\\x1b[31mred'),
        ('caf\udce9', 'caf\\xe9'),
        ('right\u202eto left', 'right\\u202eto left'),
    ],
)
def test_names_do_not_control_the_terminal(name, expected):
    assert printable(name) == expected


def test_names_in_a_plan_are_text():
    page = plan_table._Page(80)
    page.show('[/b] :smile:', ['', 'x'], [['[red]a[/b]', ':cat:']])
    page.say('[/b] :smile:')
    text = page.text()
    assert text.count('[/b] :smile:') == 2
    assert '[red]a[/b]' in text and ':cat:' in text


@pytest.mark.parametrize('command', ['run.py', 'data_pipelines.prepare', 'data_pipelines.dmvr'])
def test_help_on_a_terminal_of_ascii(command):
    arguments = [command] if command.endswith('.py') else ['-m', command]
    result = subprocess.run(
        [sys.executable, *arguments, '--help'],
        cwd=ROOT,
        env={**os.environ, 'PYTHONIOENCODING': 'ascii', 'COLUMNS': '30'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert '--' in result.stdout
