"""Models of other runs that evaluators read (`Evaluator.other_runs`): checked, opened.

Unlike the frozen models of an objective they are no part of the run: they are read anew from their
run folder, which has to stay, by every start that evaluates.
"""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vatt_jax import evals
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.training import checkpoint, frozen_models


def check(config: ConfigDict, info: dict[str, Any]) -> None:
    """Checks that the other runs are there, and that their models read the data of this one.

    Args:
        config: of this run.
        info: what its data say of themselves.

    Raises:
        ConfigError: naming the field of the evaluator.
    """
    for name in config.evals:
        evaluator = evals.build(name, config.evals[name])
        for field, streams in evaluator.other_runs().items():
            run = evaluator.config[field]
            where = f'{evaluator.where}.{field}'
            model_config, other_info = frozen_models.read_config(where, run)
            # Whatever else it has towers for is encoded as well, where the data have it.
            also = [m for m in model_config.towers if m in config.model.inputs]
            read = dict.fromkeys((*streams, *also))
            frozen_models.check_inputs(f'{where}={run}', model_config, config, tuple(read))
            frozen_models.check_tokenizer(f'{where}={run}', other_info, info, tuple(read))


def open_model(run: str, mesh: Mesh) -> FeatureExtractor:
    """The newest model of a run: the student, averaged where the run averaged.

    Args:
        run: its folder.
        mesh: the devices it runs on.

    Raises:
        ConfigError: it cannot be read.
    """
    config, variables, _ = checkpoint.load_model(run, mesh)
    return FeatureExtractor(config, variables, mesh)
