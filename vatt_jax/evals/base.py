"""What an evaluator is, and the features they share.

An evaluator is a class with `run(self, view) -> Result`, registered in `vatt_jax/evals/__init__.py` and configured by an
entry of `config.evals`. The same object runs during training and by `--mode=eval`. Evaluators ask `view` for features;
equal requests are computed once per evaluation, so adding an evaluator on the same split costs no second pass.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inference.encoder import Encoder, features_of


@dataclasses.dataclass
class Result:
    """scalars: name -> number (logged as `<evaluator>/<name>`). artifacts: name -> NumPy array or JSON-able value for
    the report (saved with the evaluation, never logged)."""

    scalars: dict[str, float]
    artifacts: dict[str, Any] = dataclasses.field(default_factory=dict)


# Named changes of a host batch before encoding (controls); each takes and returns a host batch.
def single_frame(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Every frame of a clip replaced by its middle one: what is left without motion."""
    out = dict(batch)
    for name, s in batch.items():
        if name.split('.')[0] == 'video':
            middle = s['data'][:, s['data'].shape[1] // 2][:, None]
            out[name] = {**s, 'data': np.broadcast_to(middle, s['data'].shape)}
    return out


CHANGES: dict[str, Callable] = {'single_frame': single_frame}


class View:
    """Features of dataset splits under one encoder, computed on first use and kept while the evaluation lasts.

    data: the data object of docs/architecture.md. batch_size: global.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: Any,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        seed: int = 0,
    ):
        self.encoder, self.data, self.batch_size, self.process, self.seed = (
            encoder,
            data,
            batch_size,
            process,
            seed,
        )
        self._kept: dict[str, dict[str, Any]] = {}

    def features(
        self,
        split: str,
        *,
        by: str = 'segments',
        views: Mapping[str, Any] | None = None,
        change: str = '',
        limit: int | None = None,
        keep: tuple[str, ...] = (),
        maps: tuple[str, ...] = (),
        window: Mapping[str, Any] | None = None,
        draw: str = '',
    ) -> dict[str, Any]:
        """See `encoder.features_of`. `change`: entry of CHANGES. `views`: extra streams, as config.data.views. `window`: see `one_pass`.
        `draw`: windows, crops and flips as in training, other ones for every name; '': the middle ones."""
        key = json.dumps(
            [split, by, views, change, limit, keep, maps, window, draw],
            sort_keys=True,
            default=dict,
        )
        if key not in self._kept:
            batches = self.data.one_pass(
                split,
                self.batch_size,
                process=self.process,
                by=by,
                views=views,
                limit=limit,
                window=window,
                augment=bool(draw),
                draw=draw,
            )
            if change:
                batches = map(CHANGES[change], batches)
            self._kept[key] = features_of(self.encoder, batches, keep, maps)
        return self._kept[key]


def over_windows(
    view: View, split: str, windows: int, crops: int = 1, **asked
) -> list[dict[str, Any]]:
    """`view.features` of each of `windows` windows spaced linearly from an example's first to its last, times `crops` squares spaced
    along the frame's longer side (VATT: 4 times 3). One of each: the middle window, the middle square. All have the same examples in the same order.
    """
    if windows < 1 or crops < 1:
        raise ConfigError(
            f'config.evals: windows={windows}, crops={crops}; positive numbers are wanted'
        )
    if windows == crops == 1:
        return [view.features(split, **asked)]
    places = [{'crop': i / (crops - 1)} for i in range(crops)] if crops > 1 else [{}]
    return [
        view.features(
            split, window={'kind': 'window', 'number': i, 'of': windows, **place}, **asked
        )
        for i in range(windows)
        for place in places
    ]
