"""Evaluations of a run: config.evals on one state, written to the run folder and logged."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from vatt_jax import evals
from vatt_jax.evals import base as evals_base
from vatt_jax.inference import feature_extractor
from vatt_jax.parallel import distributed
from vatt_jax.run_folder import RunFolder, evaluation_name
from vatt_jax.training import other_models, tracked_evaluation, train_state
from vatt_jax.training.build import Built, process_position
from vatt_jax.training.metrics import Progress, Writer
from vatt_jax.training.train_state import TrainState

# The scalars that are worth a place on the terminal, by the last part of their names.
HEADLINES = ('R@10', 'accuracy', 'top1', 'divergence', 'AP50')


def evaluate(
    config: ConfigDict,
    built: Built,
    state: TrainState,
    data: Any,
    workdir: pathlib.Path,
    step: int,
    *,
    tag: str = '',
    gallery: bool = False,
    again: bool = False,
    writer: Writer | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Runs config.evals on a state.

    A result folder appears whole or not at all, so an evaluation that was killed is simply run
    again, and one that is there is read and reported.

    Args:
        config: of the run.
        built: of that config.
        state: what to evaluate.
        data: the data object of docs/architecture.md.
        workdir: the run folder; results go to `evals/<tag>` in it.
        step: of the state.
        tag: of a baseline, for which only the evaluators with `baseline` run; default
            step_NNNNNN, and all evaluators.
        gallery: also keep what the report shows of the retrievals.
        again: evaluate anew where results are there already.
        writer: scalars are logged to it.
        progress: the most telling scalars are reported to it.

    Returns:
        Scalars, 'evaluator/name' -> value.
    """
    run_folder, name = RunFolder(workdir), tag or evaluation_name(step)
    folder = run_folder.evaluation(name)
    # All processes go by what the main one sees: evaluating takes all of them.
    if not again and distributed.broadcast_from_main(run_folder.has_evaluation(name)):
        results = evals.load(folder)
        return _report(results, folder, step, writer, progress)

    variables = train_state.evaluation_variables(state, built.objective, config.evaluated)
    if built.encoder is None:
        built.encoder = feature_extractor.FeatureExtractor(
            config, variables, built.mesh, built.objective
        )
    # The same compiled programs on this state's values.
    state_encoder = built.encoder.on(variables, state.params['objective'], state.objective)

    # Read once, however many evaluations come.
    def open_run(run: str) -> feature_extractor.FeatureExtractor:
        if run not in built.others:
            built.others[run] = other_models.open_model(run, built.mesh)
        return built.others[run]

    view = evals_base.FeatureView(
        state_encoder, data, config.batch_size, process_position(), config.seed, open_run
    )
    # Every process takes part: a batch is encoded on the devices of all.
    results = evals.run_all(config.evals, view, baseline=bool(tag))

    # Called by `evals.save` on the folder while it is temporary: results and gallery appear
    # together.
    def save_gallery(path: pathlib.Path) -> None:
        evals.gallery.save(path, results, config.evals, data, config.batch_size)

    if distributed.is_main():
        # The gallery reads clips by their place in the whole pass, of which a process among several
        # has a part only.
        with_gallery = gallery and jax.process_count() == 1
        evals.save(results, folder, save_gallery if with_gallery else None)
    return _report(results, folder, step, writer, progress)


def _report(
    results: Mapping[str, evals_base.Result],
    folder: pathlib.Path,
    step: int,
    writer: Writer | None,
    progress: Progress | None,
) -> dict[str, float]:
    scalars = {}
    for evaluator, result in results.items():
        for name, value in result.scalars.items():
            scalars[f'{evaluator}/{name}'] = value
    if writer is not None:
        writer.write(step, {f'eval/{name}': value for name, value in scalars.items()})
        if writer.trackers is not None:
            tracked_evaluation.report(writer.trackers, step, results, folder)
    if progress is not None:
        headlines = []
        for name, value in scalars.items():
            if name.rsplit('/', 1)[-1] in HEADLINES:
                headlines.append(f'{name} {value:.3g}')
        progress.say(f'step {step}: ' + '  '.join(headlines))
        for evaluator, result in results.items():
            for remark in result.remarks:
                progress.say(f'{evaluator}: {remark}')
    return scalars
