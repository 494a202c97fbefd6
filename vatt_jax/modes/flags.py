"""The command line of run.py."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vatt_jax.config import ConfigError

MODES = ('train', 'eval', 'embed', 'report', 'deflate', 'plan', 'index', 'search', 'export')


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError, reported as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message}; see python run.py --help')


def parse(
    argv: list[str], description: str | None = None
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and ('field.path', 'text') of every --config.field.path=text."""
    parser = Parser(
        prog='run.py',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        '--config',
        default='',
        help="FILE.py[:arg]; default: the folder's own, else configs/demo.py",
    )
    add('--workdir', default='runs/demo', help='the run folder')
    add('--mode', default='train', choices=MODES)
    add('--quiet', action='store_true', help='plain log lines instead of the live one')
    add('--split', default='test', help='embed: which split of config.data.eval')
    add('--machine', default='', help='entry of configs/machines.py, whose mesh the config takes')
    add(
        '--topology',
        default='',
        help='plan: v5p:8x8x4 | v5e:16x16 | v6e:16x16 | tpu7x:4x4x4 | v5e:16x16*4 (four slices) | '
        'h100:8x8 (hosts × GPUs) | cpu:8; default: that of --machine',
    )
    add(
        '--quick',
        action='store_true',
        help='plan, TPU and GPU: stop before code is generated; several times faster, memory is '
        'that of the buffer assignment',
    )
    add('--search', action='store_true', help='plan: vary batch per device, remat and FSDP width')
    add('--compare', default='', help='report: other run folders shown beside it, with commas')
    add('--out', default='', help='deflate: the run folder to make; index, export: the folder')
    add('--naive', action='store_true', help='deflate: sum the kernels, and fit nothing')
    add('--fit', default=1000, type=int, help='deflate: steps of config.batch_size pictures')
    add('--rate', default=1e-3, type=float, help='deflate: first learning rate of these steps')
    add('--videos', default='', help='index: folder of videos and sounds')
    add('--window', default=0.0, type=float, help="index: seconds; default: the model's clips")
    add('--stride', default=0.0, type=float, help='index: seconds; default: --window')
    add('--index', default='', help='search: folder that --mode=index made')
    add('--query', default='', help='search: a sentence')
    add('--query_audio', default='', help='search: a file, whose sound is looked for')
    add('--query_video', default='', help='search: a file, whose pictures are looked for')
    add(
        '--against',
        default='',
        choices=('', 'video', 'audio'),
        help='search: compare with pictures or sound; default: of the same kind as the query, '
        'pictures for a sentence',
    )
    add('--space', default='', help='search: the common space; default: the first that both have')
    add('--top', default=10, type=int, help='search: how many hits')
    add('--approximate', action='store_true', help='search: by a graph of neighbours (USearch)')
    add('--serve', action='store_true', help='search: a web page on this machine')
    add('--port', default=8000, type=int, help='search: port of the page; 0: any that is free')
    add('--licence', default='', help="export: what the weights' model card says of their licence")

    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix('--config.').partition('=')
        value = text if equals else next(words, None)
        if value is None:
            raise ConfigError(f'--config.{name} lacks a value; write --config.{name}=VALUE')
        overrides.append((name, value))
    return parser.parse_args(rest), overrides
