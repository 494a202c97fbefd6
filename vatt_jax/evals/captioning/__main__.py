"""Scores of captions in COCO's formats (docs/captioning.md).

python -m vatt_jax.evals.captioning --results=captions.json --references=annotations.json
"""

from __future__ import annotations

import argparse
import sys

from vatt_jax import config as configs
from vatt_jax.command_line import expand_home
from vatt_jax.config import ConfigError
from vatt_jax.evals.captioning.scores import METRICS, score_files


def main(argv: list[str]) -> None:
    """Prints a line for each score.

    Args:
        argv: the flags, without the name of the program.

    Raises:
        ConfigError: a file or a metric is not what it should be.
    """
    flags = _parser().parse_args(expand_home(argv))
    metrics = flags.metrics.split(',')
    scores = score_files(flags.results, flags.references, metrics, flags.allow_missing)
    for name, value in scores.items():
        print(f'{name:12} {value:.4f}')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m vatt_jax.evals.captioning',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--results', required=True, help='JSON list of image_id and caption')
    add('--references', required=True, help='JSON object with such a list, "annotations"')
    add('--metrics', default=','.join(METRICS), help='with commas; default: all')
    add('--allow_missing', action='store_true', help='leave out pictures without a caption')
    return parser


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        configs.fail(str(error))
