"""The search for weights of tasks: its parts by themselves, and as a whole over pretended runs."""

import csv
import json
import pathlib
import subprocess
import types

import numpy as np
import pytest

from vatt_jax import cli, evolve
from vatt_jax.config import ConfigError, from_json, to_json
from vatt_jax.evals import cluster_sizes as evaluator
from vatt_jax.evolve import Individual
from vatt_jax.modes.flags import parse
from vatt_jax.run_folder import RunFolder, evaluation_name

CONFIG = '--config=tests/configs/tiny.py:plain'
FLAGS = ['--population=3', '--generations=3', '--clusters=4', '--seed=5', CONFIG]


# ---- fitness
def test_zipf_is_one_over_the_rank():
    np.testing.assert_allclose(evaluator.zipf(4, 1.0), np.array([12, 6, 4, 3]) / 25)
    np.testing.assert_allclose(evaluator.zipf(3, 2.0), np.array([36, 9, 4]) / 49)
    np.testing.assert_allclose(evaluator.zipf(5, 0.0), 0.2)


def test_divergence_is_zero_at_the_law_in_any_order():
    prior = evaluator.zipf(6, 1.0)
    assert evaluator.divergence(prior[[3, 0, 5, 1, 2, 4]], prior) == pytest.approx(0, abs=1e-12)


def test_divergence_of_everything_in_one_cluster():
    """log 1 / (1/2): the share of the first of two clusters by Zipf's law is 2/3."""
    got = evaluator.divergence(np.array([0.0, 1.0]), evaluator.zipf(2, 1.0))
    assert got == pytest.approx(np.log(3 / 2))


def test_sizes_of_nearest_and_of_gaussian_clusters():
    x = np.array([[0.0], [0.0], [0.0], [2.0]])
    labels = np.array([7, 7, 7, 2])  # numbers of clusters, some of them empty
    np.testing.assert_allclose(evaluator.cluster_sizes(x, labels, width=0.0), [0.25, 0.75])
    # exp(-4 / 2) of a clip goes to the other cluster, relative to 1.
    away = np.exp(-2.0) / (1 + np.exp(-2.0))
    expected = [0.25 * (1 - away) + 0.75 * away, 0.75 * (1 - away) + 0.25 * away]
    np.testing.assert_allclose(evaluator.cluster_sizes(x, labels, width=2.0), expected)


# ---- selection and mutation
def test_a_tournament_among_all_is_won_by_the_best():
    divergences = [0.5, 0.2, 0.9, 0.3]
    rng = np.random.default_rng(0)
    assert evolve.tournament(divergences, 4, rng) == 1
    assert evolve.tournament(divergences, 99, rng) == 1


def test_chances_in_a_tournament_of_two():
    """Of four, the k-th best wins in 4 - k of the 6 pairs."""
    rng = np.random.default_rng(0)
    won = [evolve.tournament([0.5, 0.2, 0.9, 0.3], 2, rng) for _ in range(6000)]
    shares = np.bincount(won, minlength=4) / len(won)
    np.testing.assert_allclose(shares, [1 / 6, 3 / 6, 0, 2 / 6], atol=0.03)


def test_mutation_is_gaussian_within_the_range():
    rng = np.random.default_rng(0)
    middle = np.full(20_000, 0.5)
    changed = evolve.mutate(middle, 0.05, rng)
    assert changed.mean() == pytest.approx(0.5, abs=2e-3)
    assert changed.std() == pytest.approx(0.05, rel=0.03)
    wild = evolve.mutate(middle, 10.0, rng)
    assert wild.min() == evolve.LEAST_WEIGHT
    assert wild.max() == 1


def test_the_first_generation_begins_with_the_configs_own_weights():
    own = np.array([10.0, 1.0, 5.0])
    first, *others = evolve.first_generation(own, 50, np.random.default_rng(0))
    np.testing.assert_allclose(first, [1, 0.1, 0.5])
    assert len(others) == 49
    assert np.min(others) >= evolve.LEAST_WEIGHT
    assert np.max(others) <= 1


def test_children_are_near_the_best_parents():
    parents = [
        Individual(0, 0, np.array([0.2, 0.2]), 0.9),
        Individual(0, 1, np.array([0.8, 0.4]), 0.1),
    ]
    rng = np.random.default_rng(0)
    children = evolve.next_generation(parents, 30, 2, 0.01, rng)
    np.testing.assert_allclose(children, np.tile(parents[1].weights, (30, 1)), atol=0.05)


# ---- the search over pretended runs
def searched_weights(objective):
    """Those of pairs, or of the tasks `a` and `b`."""
    if 'weights' in objective:
        return objective.weights.a, objective.weights.b
    return [pair[3] for pair in objective.pairs]


@pytest.fixture
def runs(monkeypatch):
    """Runs that take no time; their divergence is the distance of the weights from (1, 0.3).

    Attributes of the result: `started`, the folders of all runs; `die_at`, the number of the run
    that is killed.
    """
    state = types.SimpleNamespace(started=[], die_at=None)

    def pretend(command, check):
        assert not check
        flags, overrides = parse(command[3:])
        folder = RunFolder(pathlib.Path(flags.workdir))
        config = cli.read_config(flags, overrides, folder.path)
        state.started.append(folder.path)
        folder.config.write_text(to_json(config))
        if len(state.started) == state.die_at:
            return subprocess.CompletedProcess(command, -9)
        weights = searched_weights(config.objective)
        divergence = float(np.hypot(weights[0] - 1, weights[1] - 0.3))
        results = folder.results(evaluation_name(config.steps))
        results.parent.mkdir(parents=True)
        results.write_text(json.dumps({'fitness': {'scalars': {'divergence': divergence}}}))
        folder.done.write_text('{}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evolve.subprocess, 'run', pretend)
    return state


def table(workdir):
    """The rows of search.csv."""
    with open(workdir / 'search.csv') as file:
        return list(csv.DictReader(file))


def test_the_search_improves_and_writes_what_it_found(runs, tmp_path, capsys):
    flags = [flag for flag in FLAGS if 'generations' not in flag]
    evolve.main([f'--workdir={tmp_path}', *flags, '--generations=12'])
    rows = table(tmp_path)
    assert len(rows) == 36
    divergences = [float(row['divergence']) for row in rows]
    assert divergences == sorted(divergences)
    of_first = [float(row['divergence']) for row in rows if row['generation'] == '0']
    assert min(divergences) < min(of_first) / 3
    best = rows[0]
    expected = np.hypot(float(best['video-audio']) - 1, float(best['video-text']) - 0.3)
    assert divergences[0] == pytest.approx(expected)
    assert (
        f'generation-{best["generation"]}/individual-{best["individual"]}'
        in (capsys.readouterr().out.splitlines()[-1])
    )


def test_weights_of_tasks_are_searched(runs, tmp_path):
    """A task of weight 0 stays left out."""
    task = {'name': 'temporal_order'}
    tasks = {'a': task, 'b': {**task, 'change': 'shuffled'}, 'off': {**task, 'stream': 'audio'}}
    objective = {'name': 'multi_task', 'tasks': tasks, 'weights': {'a': 0.5, 'b': 1.0, 'off': 0.0}}
    evolve.main([f'--workdir={tmp_path}', *FLAGS, f'--config.objective={objective}'])
    rows = table(tmp_path)
    assert len(rows) == 9
    assert list(rows[0]) == ['generation', 'individual', 'divergence', 'a', 'b']
    (own,) = [row for row in rows if (row['generation'], row['individual']) == ('0', '0')]
    assert (own['a'], own['b']) == ('0.5', '1.0')
    for row in rows:
        expected = np.hypot(float(row['a']) - 1, float(row['b']) - 0.3)
        assert float(row['divergence']) == pytest.approx(expected)
    stored = from_json(runs.started[-1].joinpath('config.json').read_text()).objective
    assert stored.weights.off == 0
    assert stored.tasks.b.parts == 4


@pytest.mark.parametrize('die_at', [1, 4, 9])
def test_a_killed_search_continues_as_if_it_had_not_been(die_at, runs, tmp_path):
    evolve.main([f'--workdir={tmp_path / "whole"}', *FLAGS])
    whole = table(tmp_path / 'whole')
    assert len(runs.started) == 9

    workdir = tmp_path / 'killed'
    runs.started.clear()
    runs.die_at = die_at
    with pytest.raises(ConfigError, match='ended with code -9 before it was finished'):
        evolve.main([f'--workdir={workdir}', *FLAGS])
    evolve.main([f'--workdir={workdir}', *FLAGS])
    assert table(workdir) == whole
    # The killed run alone was started twice.
    assert len(runs.started) == 10
    assert runs.started[die_at - 1] == runs.started[die_at]


def test_a_folder_of_another_search_is_refused(runs, tmp_path):
    evolve.main([f'--workdir={tmp_path}', *FLAGS])
    with pytest.raises(ConfigError, match='holds a run of other weights'):
        evolve.main([f'--workdir={tmp_path}', *FLAGS, '--seed=6'])


def test_an_objective_without_two_pairs_is_refused(tmp_path):
    one = "--config.objective={'name': 'contrastive', 'pairs': (('video', 'audio', 'va', 1.0),)}"
    with pytest.raises(ConfigError, match='expected two pairs or more'):
        evolve.main([f'--workdir={tmp_path}', *FLAGS, one])
    labels = "--config.objective={'name': 'kmeans_labels'}"
    with pytest.raises(ConfigError, match='expected two pairs or more'):
        evolve.main([f'--workdir={tmp_path}', *FLAGS, labels])
    task = {'a': {'name': 'temporal_order'}}
    alone = f'--config.objective={ {"name": "multi_task", "tasks": task} }'
    with pytest.raises(ConfigError, match='two tasks or more .*, got multi_task with 1'):
        evolve.main([f'--workdir={tmp_path}', *FLAGS, alone])


@pytest.mark.parametrize('flag', ['--population=0', '--generations=0', '--spread=0'])
def test_flags_that_make_no_sense(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evolve.main([f'--workdir={tmp_path}', flag])
    assert flag.split('=')[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_generations_of_real_runs(tmp_path):
    flags = [
        f'--workdir={tmp_path}',
        '--population=3',
        '--clusters=4',
        CONFIG,
        '--config.steps=4',
        '--config.log_every=4',
        # Compiles faster; six runs do.
        "--config.compiler_options={'xla_llvm_disable_expensive_passes': True}",
    ]
    evolve.main([*flags, '--generations=1'])
    first = {row['individual']: row for row in table(tmp_path)}
    # As if it had been killed before its last word.
    RunFolder(tmp_path / 'generation-0/individual-2').done.unlink()
    evolve.main([*flags, '--generations=2'])
    rows = table(tmp_path)
    assert len(rows) == 6
    for row in rows:
        assert np.isfinite(float(row['divergence']))
        if row['generation'] == '0':
            assert row == first[row['individual']]
