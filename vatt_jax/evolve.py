"""Weights of the tasks of an objective, found by evolution without labels (ELo).

    python -m vatt_jax.evolve --workdir=runs/elo --population=8 --generations=5 \\
        --config=elo --config.steps=100

Every individual is one short run of its own weights of config.objective, of the tasks of a
multi_task or of the pairs of a contrastive, in <workdir>/generation-G/individual-I; its fitness is
how near the sizes of clusters of its features come to Zipf's law (the evaluator cluster_sizes; the
lower the better). A generation's weights are those of the winners of tournaments among all runs so
far, with Gaussian noise. All that is known so far stands in <workdir>/search.csv, best first.

Killed at any instant, the same command goes on: runs that are finished are read, not repeated, and
the others continue from their checkpoints. After Piergiovanni et al., "Evolving Losses for
Unsupervised Video Representation Learning" (2020); docs/elo.md says what is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from vatt_jax import cli, objectives
from vatt_jax import config as configs
from vatt_jax.config import ConfigError
from vatt_jax.modes import process
from vatt_jax.modes.flags import parse
from vatt_jax.run_folder import RunFolder, evaluation_name, write_atomically

# Weights lie between this and 1 (ELo: 0 and 1). Pairs want weights above 0; their mean is weighted,
# so that a common factor means nothing. Tasks are summed: a factor is one of the loss.
LEAST_WEIGHT = 0.01
# Name of the entry of config.evals that individuals are judged by.
FITNESS = 'fitness'

Weights = Float[np.ndarray, ' W']  # of the tasks or pairs


@dataclasses.dataclass(frozen=True)
class Individual:
    """One run of the search.

    Attributes:
        generation: its number.
        number: in its generation.
        weights: of the tasks or pairs.
        divergence: from Zipf's law; the lower the better.
    """

    generation: int
    number: int
    weights: Weights
    divergence: float


def first_generation(own: Weights, population: int, rng: np.random.Generator) -> list[Weights]:
    """The config's own weights, scaled so that the largest is 1, and uniform ones beside them."""
    others = rng.uniform(LEAST_WEIGHT, 1, (population - 1, len(own)))
    return [np.clip(own / own.max(), LEAST_WEIGHT, 1), *others]


def tournament(divergences: Sequence[float], size: int, rng: np.random.Generator) -> int:
    """Number of the best of `size` (or all) that are drawn without replacement."""
    drawn = rng.choice(len(divergences), min(size, len(divergences)), replace=False)
    return int(drawn[np.argmin(np.asarray(divergences)[drawn])])


def mutate(weights: Weights, spread: float, rng: np.random.Generator) -> Weights:
    """The weights with Gaussian noise of this standard deviation, cut to their range."""
    return np.clip(weights + rng.normal(0, spread, weights.shape), LEAST_WEIGHT, 1)


def next_generation(
    so_far: Sequence[Individual],
    population: int,
    size: int,
    spread: float,
    rng: np.random.Generator,
) -> list[Weights]:
    """Mutated winners of one tournament each, among all individuals so far.

    The best one is never lost: it stays among those that tournaments draw from.
    """
    divergences = [individual.divergence for individual in so_far]
    children = []
    for _ in range(population):
        parent = so_far[tournament(divergences, size, rng)]
        children.append(mutate(parent.weights, spread, rng))
    return children


@dataclasses.dataclass(frozen=True)
class Searched:
    """What of an objective is searched.

    Attributes:
        objective: `config.objective`, completed.
        field: `weights`, by names of tasks, or `pairs`.
        names: of the weights.
        own: the weights that the config gives.
    """

    objective: ConfigDict
    field: str
    names: tuple[str, ...]
    own: Weights

    @classmethod
    def of(cls, objective: ConfigDict) -> Searched:
        """Find the weights of an objective.

        Raises:
            ConfigError: it has fewer than two.
        """
        if 'weights' in objective:
            field = 'weights'
            # A task of weight 0 was left out on purpose.
            entries = [(name, weight) for name, weight in objective.weights.items() if weight > 0]
        else:
            field = 'pairs'
            pairs = objective.get('pairs', ())
            entries = [(f'{first}-{second}', weight) for first, second, _, weight in pairs]
        if len(entries) < 2:
            raise ConfigError(
                'config.objective: expected two pairs or more (contrastive), or two tasks or more '
                f'(multi_task), whose weights are searched, got {objective.name} with '
                f'{len(entries)}.'
            )
        names = tuple(name for name, _ in entries)
        return cls(objective, field, names, np.array([weight for _, weight in entries], float))

    def with_weights(self, weights: Weights) -> dict[str, Any]:
        """config.objective with these weights, as a run stores it."""
        fields = self.objective.to_dict()
        values = [float(weight) for weight in weights]
        if self.field == 'weights':
            fields['weights'].update(zip(self.names, values, strict=True))
        else:
            pairs = zip(fields['pairs'], values, strict=True)
            fields['pairs'] = tuple((*pair[:3], weight) for pair, weight in pairs)
        return fields


class Search:
    """The search in a folder: what is asked for, and the runs that are there."""

    def __init__(self, flags: argparse.Namespace, arguments: list[str]) -> None:
        self.flags = flags
        # Of each run, without those that the search adds.
        self.arguments = arguments
        run_flags, overrides = parse([*arguments, f'--workdir={flags.workdir}'])
        self.config = cli.read_config(run_flags, overrides, flags.workdir)
        # The objective fills in what the config leaves out.
        self.searched = Searched.of(objectives.build(self.config.objective).config)

    def run(self) -> list[Individual]:
        """All generations, each individual run or read; returns them all."""
        flags = self.flags
        so_far: list[Individual] = []
        for generation in range(flags.generations):
            # Weights are a function of the seed and of the generations before: a search that was
            # killed finds the same ones again.
            rng = np.random.default_rng([flags.seed, generation])
            if generation == 0:
                children = first_generation(self.searched.own, flags.population, rng)
            else:
                children = next_generation(
                    so_far, flags.population, flags.tournament, flags.spread, rng
                )
            for number, weights in enumerate(children):
                so_far.append(self.evaluate(generation, number, weights))
                self.write_table(so_far)
        return so_far

    def evaluate(self, generation: int, number: int, weights: Weights) -> Individual:
        """The individual of these weights, from its run folder if its run is finished."""
        name = f'generation-{generation}/individual-{number}'
        folder = RunFolder(self.flags.workdir / name)
        objective = self.searched.with_weights(weights)
        if not folder.done.exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            code = subprocess.run(self.command(folder, objective), check=False).returncode
            # SIGTERM ends a run with code 0, too.
            if code or not folder.done.exists():
                raise ConfigError(
                    f'{folder.path}: the run ended with code {code} before it was finished; the '
                    'same command continues the search there'
                )
        stored = configs.stored(folder.path)
        if stored is None or stored.objective.to_dict() != objective:
            raise ConfigError(
                f'{folder.path} holds a run of other weights or another objective: expected '
                f'{objective}; name another --workdir, or the config and --seed of this search'
            )
        results = folder.results(evaluation_name(self.config.steps))
        divergence = json.loads(results.read_text())[FITNESS]['scalars']['divergence']
        if math.isnan(divergence):
            divergence = math.inf  # the worst
        print(f'{name}: divergence {divergence:.4f}, weights {_text(weights)}', flush=True)
        return Individual(generation, number, weights, divergence)

    def command(self, folder: RunFolder, objective: dict[str, Any]) -> list[str]:
        """What starts or continues an individual's run."""
        fitness = {
            'type': 'cluster_sizes',
            'stream': self.flags.stream,
            'clusters': self.flags.clusters,
            'baseline': False,
        }
        return [
            *(sys.executable, '-m', 'vatt_jax', *self.arguments),
            f'--config.objective={objective}',
            f'--config.evals={ {FITNESS: fitness} }',
            '--config.report=False',
            f'--workdir={folder.path}',
        ]

    def write_table(self, so_far: Sequence[Individual]) -> None:
        """search.csv: a line for each individual, the best first."""
        lines = [','.join(['generation', 'individual', 'divergence', *self.searched.names])]
        for one in sorted(so_far, key=lambda individual: individual.divergence):
            numbers = [one.generation, one.number, one.divergence, *one.weights]
            lines.append(','.join(str(number) for number in numbers))
        write_atomically(self.flags.workdir / 'search.csv', '\n'.join(lines) + '\n')


def _text(weights: Weights) -> str:
    return ', '.join(f'{weight:.2f}' for weight in weights)


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the search, and the arguments of its runs."""
    parser = argparse.ArgumentParser(
        prog='python -m vatt_jax.evolve',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--population', type=int, default=8, help='runs of a generation')
    parser.add_argument('--generations', type=int, default=5)
    parser.add_argument('--tournament', type=int, default=3, help='runs that a parent is best of')
    parser.add_argument('--spread', type=float, default=0.2, help='standard deviation of the noise')
    parser.add_argument(
        '--seed', type=int, default=0, help='of the search; config.seed is the runs’'
    )
    parser.add_argument('--stream', default='video', help='whose features are clustered')
    parser.add_argument('--clusters', type=int, default=32)
    flags, arguments = parser.parse_known_args(argv)
    for name in ('population', 'generations', 'tournament'):
        if getattr(flags, name) < 1:
            parser.error(f'--{name}: expected a positive number, got {getattr(flags, name)}.')
    if not flags.spread > 0:
        parser.error(f'--spread: expected a number above 0, got {flags.spread}.')
    return flags, arguments


def main(argv: list[str]) -> None:
    """Run the search and say what was best."""
    flags, arguments = parse_flags(argv)
    individuals = Search(flags, arguments).run()
    best = min(individuals, key=lambda individual: individual.divergence)
    print(
        f'best: generation-{best.generation}/individual-{best.number}, divergence '
        f'{best.divergence:.4f}, weights {_text(best.weights)}; all: {flags.workdir}/search.csv'
    )


if __name__ == '__main__':
    process.exit_with_sentence(main, sys.argv[1:])
