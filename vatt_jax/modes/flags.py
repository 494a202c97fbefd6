"""The flags of the command line (vatt_jax/cli.py)."""

from __future__ import annotations

import argparse
from typing import NoReturn

import vatt_jax
from vatt_jax import named_configs
from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError

MODES = (
    'train',
    'eval',
    'embed',
    'report',
    'deflate',
    'plan',
    'index',
    'search',
    'export',
    'pseudo_boxes',
)

# COMMAND stands for what the user typed.
DESCRIPTION = """\
Trains, evaluates, embeds, reports and plans.

COMMAND
    the demo, into runs/demo
COMMAND --config=demo:agnostic --workdir=runs/agnostic --config.seed=1
    a named config with its argument, one of its fields changed
COMMAND --config=mine.py --workdir=runs/mine
    a config file of your own
COMMAND --mode=eval --workdir=runs/demo
    the run's newest checkpoint, with the run's own config
COMMAND --mode=embed --workdir=runs/demo --split=test
    embeddings of a split, as npz
COMMAND --mode=report --workdir=runs/demo
    report/index.html
COMMAND --mode=deflate --workdir=runs/mmv --out=runs/mmv_image
    a network for images out of one for video: docs/mmv.md
COMMAND --mode=plan --workdir=runs/plan --config=vatt:mbs --topology=v5p:4x4x4
    a run on machines that are not rented yet: docs/scaling.md
COMMAND --mode=index --workdir=runs/demo --videos=FOLDER --out=INDEX
    embeddings of a folder of videos, window by window: docs/search.md
COMMAND --mode=search --index=INDEX --query="a dog barks"
    the stretches that match; --serve shows a web page
COMMAND --mode=export --workdir=runs/demo --out=FOLDER
    programs that JAX alone runs: docs/export.md
COMMAND --mode=pseudo_boxes --workdir=runs/localisation --out=FOLDER
    pictures with boxes that sound found, for a detector: docs/detection.md

The same command again continues a run from its newest checkpoint."""


class Parser(argparse.ArgumentParser):
    """A mistake is a ConfigError, reported as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f'{message}; see {self.prog} --help')

    def format_help(self) -> str:
        """The help with the named configs, which are looked up only here."""
        self.epilog = _list_named_configs()
        return super().format_help()


def parse(
    argv: list[str], command: str = 'vatt-jax'
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Parse the command line.

    Args:
        argv: the arguments.
        command: what the user typed before them, for --help and messages.

    Returns:
        Flags, and ('field.path', 'text') of every --config.field.path=text.
    """
    overrides, rest = [], []
    words = iter(expand_home(argv))
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix('--config.').partition('=')
        value = text if equals else next(words, None)
        if value is None:
            raise ConfigError(f'--config.{name} lacks a value; write --config.{name}=VALUE')
        overrides.append((name, value))
    return _parser(command).parse_args(rest), overrides


def _parser(command: str) -> Parser:
    parser = Parser(
        prog=command,
        usage='%(prog)s [--mode=MODE] [--config=CONFIG] [--workdir=DIR] '
        '[--config.FIELD=VALUE ...] [flags of the mode]',
        description=DESCRIPTION.replace('COMMAND', command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f'vatt_jax {vatt_jax.__version__}'
    parser.add_argument('--version', action='version', version=version)
    _add_common_flags(parser)

    add = parser.add_argument_group('--mode=train').add_argument
    add('--quiet', action='store_true', help='plain log lines instead of the live one')

    add = parser.add_argument_group('--mode=embed').add_argument
    add(
        '--split',
        default='',
        help='which split of config.data.eval; default: test, of pseudo_boxes train, which takes '
        'several with commas',
        metavar='SPLIT',
    )

    add = parser.add_argument_group('--mode=report').add_argument
    add(
        '--compare',
        default='',
        metavar='DIRS',
        help='other run folders shown beside it, with commas',
    )

    _add_deflate_flags(parser)
    _add_plan_flags(parser)
    _add_search_flags(parser)
    _add_box_flags(parser)
    add = parser.add_argument_group('--mode=export (and --out)').add_argument
    add('--licence', default='', metavar='NAME', help='of the weights, for the model card')
    return parser


def _add_common_flags(parser: Parser) -> None:
    add = parser.add_argument_group('all modes').add_argument
    add('--mode', default='train', choices=MODES, help='what to do; default: train')
    add(
        '--config',
        default='',
        metavar='CONFIG',
        help='FILE.py[:ARGUMENT] or NAME[:ARGUMENT] of a named config, see below; default: the '
        "run folder's own, else demo",
    )
    # Not parsed by argparse, which sees it in the help alone: see `parse`.
    add(
        '--config.FIELD',
        default=argparse.SUPPRESS,
        metavar='VALUE',
        help='a field of the config, such as --config.optimizer.schedule.peak=1e-3; '
        'configs/default.py has them all',
    )
    add('--workdir', default='runs/demo', metavar='DIR', help='the run folder; default: runs/demo')
    add(
        '--machine',
        default='',
        metavar='NAME',
        help='entry of configs/machines.py, whose mesh the config takes',
    )


def _add_deflate_flags(parser: Parser) -> None:
    add = parser.add_argument_group('--mode=deflate').add_argument
    add('--out', default='', metavar='DIR', help='the folder to make; also of index and export')
    add('--naive', action='store_true', help='sum the kernels, and fit nothing')
    add(
        '--fit',
        default=1000,
        type=int,
        metavar='STEPS',
        help='steps of config.batch_size pictures; default: 1000',
    )
    add(
        '--rate',
        default=1e-3,
        type=float,
        metavar='RATE',
        help='first learning rate of these steps; default: 0.001',
    )


def _add_plan_flags(parser: Parser) -> None:
    add = parser.add_argument_group('--mode=plan').add_argument
    add(
        '--topology',
        default='',
        metavar='CHIPS',
        help='v5p:8x8x4 | v5e:16x16 | v6e:16x16 | tpu7x:4x4x4 | v5e:16x16*4 (four slices) | '
        'h100:8x8 (hosts x GPUs) | cpu:8; default: that of --machine',
    )
    add(
        '--quick',
        action='store_true',
        help='TPU and GPU: stop before code is generated; several times faster, memory is that of '
        'the buffer assignment',
    )
    add('--search', action='store_true', help='vary batch per device, remat and FSDP width')


def _add_search_flags(parser: Parser) -> None:
    add = parser.add_argument_group('--mode=index (and --out)').add_argument
    add('--videos', default='', metavar='DIR', help='folder of videos and sounds')
    add(
        '--window',
        default=0.0,
        type=float,
        metavar='SECONDS',
        help="length of a window; default: that of the model's clips",
    )
    add(
        '--stride',
        default=0.0,
        type=float,
        metavar='SECONDS',
        help='from window to window; default: --window',
    )

    add = parser.add_argument_group('--mode=search').add_argument
    add('--index', default='', metavar='DIR', help='folder that --mode=index made')
    add('--query', default='', metavar='TEXT', help='a sentence')
    add('--query_audio', default='', metavar='FILE', help='a file, whose sound is looked for')
    add('--query_video', default='', metavar='FILE', help='a file, whose pictures are looked for')
    add(
        '--against',
        default='',
        choices=('video', 'audio'),
        help='compare with pictures or with sound; default: of the same kind as the query, '
        'pictures for a sentence',
    )
    add(
        '--space',
        default='',
        metavar='NAME',
        help='the common space; default: the first that both have',
    )
    add('--top', default=10, type=int, metavar='N', help='how many hits; default: 10')
    add('--approximate', action='store_true', help='by a graph of neighbours (USearch)')
    add('--serve', action='store_true', help='a web page, for this machine alone')
    add(
        '--port',
        default=8000,
        type=int,
        metavar='PORT',
        help='of the page; 0: any that is free; default: 8000',
    )


def _add_box_flags(parser: Parser) -> None:
    add = parser.add_argument_group('--mode=pseudo_boxes (and --out, --split)').add_argument
    add(
        '--beta',
        default=0.5,
        type=float,
        metavar='SHARE',
        help='of the threshold beta * maximum + (1 - beta) * mean of a heat map; default: 0.5',
    )
    add('--boxes', default=1, type=int, metavar='N', help='of a picture at most; default: 1')
    add(
        '--score',
        default=-1.0,
        type=float,
        metavar='COSINE',
        help='boxes of lower scores are left out; default: none is',
    )
    add(
        '--true',
        default='',
        metavar='PART',
        help='classes | boxes | all: what comes from the truth of the data instead',
    )


def _list_named_configs() -> str:
    """The named configs with their first lines, for --help."""
    found = named_configs.summaries()
    width = max(len(name) for name in found)
    lines = ['named configs:']
    for name, summary in found.items():
        lines.append(f'  {name:<{width}}  {summary}')
    lines.append('')
    lines.append('Arguments, sizes and options of each: the text at the top of its file in')
    lines.append(f'{named_configs.folder()}.')
    return '\n'.join(lines)
