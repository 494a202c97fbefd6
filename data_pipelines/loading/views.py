"""The streams of a batch and the windows they share: config.model.inputs and views -> stream names -> starts in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows

KINDS = {
    'clip': {'kind'},
    'shift': {'kind', 'seconds'},
    'reverse': {'kind'},
    'window': {'kind', 'number', 'of'},
}
OPTIONAL = {'window': {'crop'}}


@dataclasses.dataclass(frozen=True)
class View:
    """One stream. suffix: '' for the main window; all streams of one suffix share one window. spec: the config's entry."""

    stream: str
    modality: str
    suffix: str
    spec: tuple[tuple[str, Any], ...] = (('kind', 'main'),)

    def __getattr__(self, name: str) -> Any:
        fields = dict(object.__getattribute__(self, 'spec'))
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    @property
    def crop(self) -> float | None:
        """Where along the frame's longer side its largest square lies, 0 to 1; None: as the request says (random, or the middle)."""
        return dict(self.spec).get('crop')


def streams(
    inputs: Mapping[str, Any],
    views: Mapping[str, Any] | Iterable[tuple[str, Any]] | None,
    window: Mapping[str, Any] | None = None,
) -> tuple[View, ...]:
    """The main stream of each modality of config.model.inputs, then the views. Raises DataError naming the wrong view.

    views: {stream: {'kind': …}}, or pairs of the same (config.data.views: config fields take no dots). window: of the main streams, as a view of
    kind `window`; None: the request's own (random, or the middle one).
    """
    if window is not None:
        _check('window', window)
        if window['kind'] != 'window':
            raise DataError(f"window={dict(window)}: a view of kind 'window' is wanted")
    main = {} if window is None else {'spec': tuple(sorted(window.items()))}
    out = [View(m, m, '', **main) for m in ('video', 'audio', 'text') if m in inputs]
    windows: dict[str, tuple] = {}
    try:
        given = {stream: dict(spec) for stream, spec in dict(views or {}).items()}
    except (TypeError, ValueError):
        raise DataError(
            f'config.data.views is {views!r}; pairs of a stream and a view are wanted, such as '
            "(('video.second', {'kind': 'clip'}),)"
        ) from None
    for stream, spec in given.items():
        modality, _, suffix = stream.partition('.')
        if modality not in inputs or not suffix:
            raise DataError(
                f'config.data.views has {stream!r}; a view is named modality.suffix with a modality of '
                f'config.model.inputs ({", ".join(inputs)})'
            )
        _check(f'config.data.views: {stream!r}', spec)
        view = View(stream, modality, suffix, tuple(sorted(spec.items())))
        if windows.setdefault(suffix, view.spec) != view.spec:
            raise DataError(
                f'config.data.views: the streams with suffix {suffix!r} share one window, so their entries must '
                f'be equal; {stream!r} differs'
            )
        out.append(view)
    return tuple(out)


def _check(where: str, spec: Mapping[str, Any]) -> None:
    kind = spec.get('kind')
    if kind not in KINDS or not KINDS[kind] <= set(spec) <= KINDS[kind] | OPTIONAL.get(kind, set()):
        raise DataError(
            f'{where} is {dict(spec)}; views are '
            + '; '.join(
                f'{k}: {", ".join([*sorted(v), *(f"{o} (if wanted)" for o in OPTIONAL.get(k, ()))])}'
                for k, v in KINDS.items()
            )
        )
    if (
        kind == 'shift'
        and spec['seconds'] != 'random'
        and not isinstance(spec['seconds'], (int, float))
    ):
        raise DataError(f'{where}.seconds is {spec["seconds"]!r}; give a number or "random"')
    if kind == 'window' and not 0 <= spec['number'] < spec['of']:
        raise DataError(
            f'{where}: number runs from 0 to of - 1; got {spec["number"]} of {spec["of"]}'
        )
    if 'crop' in spec and not (isinstance(spec['crop'], (int, float)) and 0 <= spec['crop'] <= 1):
        raise DataError(
            f'{where}.crop is {spec["crop"]!r}; give a number from 0 (left, top) to 1 (right, bottom)'
        )


def window_seconds(inputs: Mapping[str, Any]) -> float:
    """Length of a window: the longer of the video clip and the audio clip (0 for text alone)."""
    lengths = [0.0]
    if 'video' in inputs:
        lengths.append(inputs['video']['frames'] / inputs['video']['fps'])
    if 'audio' in inputs:
        lengths.append(inputs['audio']['samples'] / inputs['audio']['rate'])
    return max(lengths)


def starts(
    views: tuple[View, ...],
    window: float,
    duration: np.ndarray,
    draw: Callable[[str], np.ndarray],
    segments: tuple[np.ndarray, np.ndarray] | None,
    step: np.ndarray | float,
) -> dict[str, np.ndarray]:
    """Window starts {suffix: float64 [B]}.

    duration: seconds [B]. draw(site): uniform numbers [B]. segments: (begin, end) [B] in evaluation, None in training, where
    the main window is uniform over the record. step: seconds between stored frames [B]; starts are multiples of it.
    """
    anywhere = lambda site: frame_windows.anywhere(duration, window, step, draw(site))
    within = segments if segments is not None else (np.zeros_like(duration), duration)
    spaced = lambda v: frame_windows.spaced(*within, duration, window, v.number, v.of)
    of_main = next((v for v in views if not v.suffix and v.kind == 'window'), None)
    if of_main is not None:
        main = spaced(of_main)
    else:
        main = (
            anywhere('window')
            if segments is None
            else frame_windows.centred(*segments, duration, window)
        )
    out = {'': frame_windows.snap(main, step)}
    for v in views:
        if v.suffix in out:
            continue
        if v.kind == 'clip' or v.kind == 'shift' and v.seconds == 'random':
            start = anywhere(f'window.{v.suffix}')
        elif v.kind == 'shift':
            start = frame_windows.shifted(out[''], float(v.seconds), duration, window)
        elif v.kind == 'window':
            start = spaced(v)
        else:
            start = out['']
        out[v.suffix] = frame_windows.snap(start, step)
    return out
