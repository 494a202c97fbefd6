"""Two-stream evaluation: further streams beside the first one, of this model or of another run's.

An evaluator whose entry has the fields of BESIDE looks at `stream` and at all streams of `beside`.
What it averages over them is its own affair: similarities (neighbours), probabilities (the probe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from vatt_jax.config import ConfigError
from vatt_jax.evals.base import REMEDY, FeatureView
from vatt_jax.inputs.batch import modality_of

# Fields of an entry of config.evals.
BESIDE: dict[str, Any] = {
    # Further streams, which are averaged with `stream` (two-stream).
    'beside': (),
    # Run folder (or phase:NAME) whose model encodes them. '': the model that is evaluated.
    'beside_run': '',
}


class StreamFeatures(NamedTuple):
    """What one stream is evaluated on.

    Attributes:
      stream: its name.
      windows: features of each window, as `FeatureView.features` returns them.
    """

    stream: str
    windows: list[dict[str, Any]]


def with_baseline(config: Any) -> Any:
    """An entry that leaves the untrained baseline out where another run's model is averaged in.

    That model has been trained, so the average of both says nothing about an untrained network. An
    entry may still ask for it.
    """
    return {'baseline': False, **config} if config.get('beside_run') else config


def check_entry(config: Any, where: str) -> None:
    """Raise ConfigError for fields that do not go together."""
    if config.beside_run and not config.beside:
        raise ConfigError(
            f'{where}.beside_run={config.beside_run!r}: expected the streams that its model '
            f"encodes, got none; set {where}.beside, such as ('flow',)"
        )


def own_streams(config: Any) -> tuple[str, ...]:
    """The streams that the evaluated model encodes."""
    return (config.stream,) if config.beside_run else (config.stream, *config.beside)


def check_encoded(config: Any, outputs: Any, where: str) -> None:
    """Raise ConfigError for a stream that the evaluated model does not encode, and for text.

    Args:
      config: the entry.
      outputs: the model's Outputs; abstract ones do.
      where: path of the entry.
    """
    encoded = {modality_of(stream) for stream in outputs.encoded}
    for stream in own_streams(config):
        if modality_of(stream) not in encoded:
            field = 'stream' if stream == config.stream else 'beside'
            raise ConfigError(
                f'{where}.{field}={stream!r}: the model encodes {", ".join(sorted(encoded))}; '
                f'{REMEDY}'
            )
    for stream in own_streams(config):
        if modality_of(stream) == 'text':
            raise ConfigError(
                f'{where}.stream: expected pictures or sound, which have one feature a clip, got '
                f'{stream!r}, which has one for each sentence; {REMEDY}'
            )


def other_runs(config: Any) -> dict[str, tuple[str, ...]]:
    """Field -> streams; see `Evaluator.other_runs`."""
    return {'beside_run': tuple(config.beside)} if config.beside_run else {}


def features(
    view: FeatureView,
    config: Any,
    request: Callable[[FeatureView, tuple[str, ...]], list[dict[str, Any]]],
) -> list[StreamFeatures]:
    """Features of `stream` and of each one beside it, of the same examples in the same order.

    Args:
      view: of the evaluated model.
      config: the entry.
      request: (view, its streams) -> features of each window. It is called once for each model.

    Raises:
      RuntimeError: the two passes over the data gave other examples.
    """
    streams = own_streams(config)
    windows = request(view, streams)
    found = [StreamFeatures(stream, windows) for stream in streams]
    if config.beside_run:
        others = tuple(config.beside)
        other_windows = request(view.of_run(config.beside_run), others)
        # A file that could be read in one pass alone would move all rows behind it.
        if not np.array_equal(windows[0]['index'], other_windows[0]['index']):
            raise RuntimeError('two passes over one split gave other examples')
        found += [StreamFeatures(stream, other_windows) for stream in others]
    return found


def all_valid(found: list[StreamFeatures]) -> Bool[np.ndarray, ' N']:
    """The examples that have all streams."""
    return np.all([windows[0]['valid'][stream] for stream, windows in found], 0)


def check_computed(found: list[StreamFeatures], kind: str, evaluator: str) -> None:
    """Raise ConfigError for a stream that the data or its model lack.

    Args:
      found: of `features`.
      kind: which features are read: pooled or maps.
      evaluator: its name, for the message.
    """
    for stream, windows in found:
        computed: Mapping[str, Any] = windows[0]
        if stream not in computed[kind]:
            raise ConfigError(
                f'{evaluator}: stream {stream!r} is not among {", ".join(computed["pooled"])}'
            )
