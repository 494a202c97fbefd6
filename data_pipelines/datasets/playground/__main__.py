"""Renders and prepares a playground.

python -m data_pipelines.datasets.playground --out=runs/data/playground --train=1200 --seconds=8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from data_pipelines.datasets.playground import Config, make
from data_pipelines.errors import DataError
from vatt_jax import extras
from vatt_jax.terminal import use_plain_characters


def main() -> int:
    use_plain_characters()
    parser = argparse.ArgumentParser(
        prog='python -m data_pipelines.datasets.playground', description=__doc__
    )
    parser.add_argument('--out', required=True, help='folder of media/ and records/')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--quiet', action='store_true')
    for field in dataclasses.fields(Config):
        parser.add_argument(f'--{field.name}', type=type(field.default), default=field.default)
    flags = vars(parser.parse_args())
    try:
        print(make(flags.pop('out'), **flags))
    except (DataError, extras.MissingExtra) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
