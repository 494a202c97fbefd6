"""The streams of a batch and the windows they share.

config.model.inputs and views -> stream names -> starts in seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.loading import frame_windows
from vatt_jax.inputs import modalities
from vatt_jax.inputs.modalities import MODALITIES

# Kind of view -> the fields of its entry, and those it may have besides.
# clip: a window of its own, anywhere, or at an `interval` from the main one; for the share `same`
# of the clips it is the main one itself. shift: the main one, moved; with `apart` so far that at
# least so many seconds lie between the two. reverse: the main one, or that of the suffix `of`, read
# backwards. window: the `number`-th of `of`, evenly spaced.
KINDS = {
    'clip': {'kind'},
    'shift': {'kind', 'seconds'},
    'reverse': {'kind'},
    'window': {'kind', 'number', 'of'},
}
OPTIONAL = {
    'clip': {'interval', 'same'},
    'shift': {'apart'},
    'reverse': {'of'},
    'window': {'crop'},
}

# Names of densities of the interval between two windows -> their power (frame_windows.interval).
INTERVALS = {'uniform': 0.0, 'linear': 1.0}


@dataclasses.dataclass(frozen=True)
class View:
    """One stream; the fields of its entry are attributes too, such as `kind`.

    Attributes:
      stream: its name in the batch.
      modality: entry of MODALITIES.
      suffix: '' for the main window; all streams of one suffix share one window.
      spec: the config's entry, as sorted pairs.
    """

    stream: str
    modality: str
    suffix: str
    spec: tuple[tuple[str, Any], ...] = (('kind', 'main'),)

    def __getattr__(self, name: str) -> Any:
        # Not self.spec: while a copy is made it may be missing, and looking it up would recurse.
        fields = dict(object.__getattribute__(self, 'spec'))
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    @property
    def crop(self) -> float | None:
        """Where along the frame's longer side its largest square lies, 0 to 1.

        None: as the request says (random, or the middle).
        """
        return dict(self.spec).get('crop')

    @property
    def reversed_suffix(self) -> str:
        """Of a view of kind reverse: the suffix whose window it shows; '' is the main one."""
        return dict(self.spec).get('of', '')

    @property
    def reversed_stream(self) -> str:
        """Of a view of kind reverse: the stream that it is the mirror of."""
        return f'{self.modality}.{self.reversed_suffix}' if self.reversed_suffix else self.modality

    @property
    def interval(self) -> float | None:
        """Power of the density of the distance from the main window.

        None: there is no such density.
        """
        given = dict(self.spec).get('interval')
        return INTERVALS[given] if isinstance(given, str) else given

    @property
    def same(self) -> float:
        """Share of the clips whose window is the main one.

        Crop and colours are drawn anew, so that these alone differ.
        """
        return dict(self.spec).get('same', 0.0)

    @property
    def apart(self) -> float | None:
        """Least seconds between this window and the main one. None: they may overlap.

        A record may have no such window; then the stream is not valid.
        """
        return dict(self.spec).get('apart')


def streams(
    inputs: Mapping[str, Any],
    views: Mapping[str, Any] | Iterable[Any] | None,
    window: Mapping[str, Any] | None = None,
) -> tuple[View, ...]:
    """The main stream of each modality of config.model.inputs, then the views.

    Args:
      inputs: config.model.inputs.
      views: {stream: {'kind': …}}, or pairs of the same (config.data.views: config fields take no
        dots).
      window: of the main streams, as a view of kind `window`; None: the request's own (random, or
        the middle one).

    Raises:
      DataError: naming the wrong view.
    """
    main_spec: tuple[tuple[str, Any], ...] = (('kind', 'main'),)
    if window is not None:
        _check('window', window)
        if window['kind'] != 'window':
            raise DataError(f"window={dict(window)}: expected a view of kind 'window'")
        main_spec = tuple(sorted(window.items()))
    result = []
    # In a fixed order, whatever the config's.
    for modality in MODALITIES:
        if modality in inputs:
            result.append(View(modality, modality, '', main_spec))
    spec_of_suffix: dict[str, tuple[tuple[str, Any], ...]] = {}
    for stream, spec in _as_dicts(views).items():
        modality, _, suffix = stream.partition('.')  # 'video.second' -> 'video', 'second'
        if modality not in inputs or not suffix:
            raise DataError(
                f'config.data.views has {stream!r}; a view is named modality.suffix with a '
                f'modality of config.model.inputs ({", ".join(inputs)})'
            )
        _check(f'config.data.views: {stream!r}', spec)
        # Sorted pairs: hashable, and equal whatever the order in the config.
        view = View(stream, modality, suffix, tuple(sorted(spec.items())))
        # 'video.second' and 'audio.second' must show one moment to be a pair.
        if spec_of_suffix.setdefault(suffix, view.spec) != view.spec:
            raise DataError(
                f'config.data.views: the streams with suffix {suffix!r} share one window, so '
                f'their entries must be equal; {stream!r} differs'
            )
        result.append(view)
    _check_reversed(result)
    _check_one_interval(result)
    return tuple(result)


def _check_reversed(views: Iterable[View]) -> None:
    """Raise DataError for a reversed view of a window that no other view has."""
    windows = {view.suffix for view in views if view.kind != 'reverse'} | {''}
    for view in views:
        if view.kind == 'reverse' and view.reversed_suffix not in windows:
            others = sorted(windows - {''})
            expected = f'one of {", ".join(others)}' if others else 'no field `of`'
            raise DataError(
                f'config.data.views: {view.stream!r}.of: expected {expected}, the suffixes of '
                f'views that are not reversed themselves, got {view.reversed_suffix!r}'
            )


def _check_one_interval(views: list[View]) -> None:
    """Raise DataError where two windows want a distance from the main one."""
    # The main window is drawn together with the one at an interval from it.
    suffixes = sorted({view.suffix for view in views if view.interval is not None})
    if len(suffixes) > 1:
        raise DataError(
            f'config.data.views: expected an interval for one suffix alone, got it for '
            f'{", ".join(suffixes)}; leave it out of the others'
        )


def _as_dicts(views: Any) -> dict[str, dict[str, Any]]:
    try:
        return {stream: dict(spec) for stream, spec in dict(views or {}).items()}
    except (TypeError, ValueError):
        raise DataError(
            f'config.data.views: expected pairs of a stream and a view, such as '
            f"(('video.second', {{'kind': 'clip'}}),), got {views!r}."
        ) from None


def _check(where: str, spec: Mapping[str, Any]) -> None:
    """Raise DataError for an entry that is no view, naming it as `where`."""
    kind = spec.get('kind')
    fields = set(spec)
    # required <= given <= required | optional, as sets.
    if kind not in KINDS or not KINDS[kind] <= fields <= KINDS[kind] | OPTIONAL.get(kind, set()):
        raise DataError(f'{where} is {dict(spec)}; views are {_describe_kinds()}')
    if kind == 'shift':
        seconds = spec['seconds']
        is_number = isinstance(seconds, (int, float)) and math.isfinite(seconds)
        if seconds != 'random' and not is_number:
            raise DataError(f'{where}.seconds is {seconds!r}; give a number or "random"')
        if 'apart' in spec:
            _check_apart(where, spec)
    if kind == 'window' and not 0 <= spec['number'] < spec['of']:
        raise DataError(
            f'{where}: number runs from 0 to of - 1; got {spec["number"]} of {spec["of"]}'
        )
    if 'interval' in spec:
        interval = spec['interval']
        is_power = isinstance(interval, (int, float)) and 0 <= interval < math.inf
        if not is_power and interval not in INTERVALS:
            raise DataError(
                f'{where}.interval is {interval!r}; give {" or ".join(INTERVALS)}, or the power of '
                'the density, a number of at least 0'
            )
    if 'same' in spec:
        same = spec['same']
        if not (isinstance(same, (int, float)) and 0 <= same <= 1):
            raise DataError(
                f'{where}.same is {same!r}; give the share of clips that keep the main window, a '
                'number from 0 to 1'
            )
    if 'crop' in spec:
        crop = spec['crop']
        if not (isinstance(crop, (int, float)) and 0 <= crop <= 1):
            raise DataError(
                f'{where}.crop is {crop!r}; give a number from 0 (left, top) to 1 (right, bottom)'
            )


def _check_apart(where: str, spec: Mapping[str, Any]) -> None:
    """Raise DataError for a wrong `apart` of a shift."""
    apart = spec['apart']
    if not (isinstance(apart, (int, float)) and 0 <= apart < math.inf):
        raise DataError(f'{where}.apart is {apart!r}; give the least seconds between the windows')
    if spec['seconds'] != 'random':
        # A fixed shift says by itself how far the windows are apart.
        raise DataError(
            f'{where}.apart: expected seconds "random" beside it, got {spec["seconds"]!r}'
        )


def _describe_kinds() -> str:
    descriptions = []
    for kind, required in KINDS.items():
        optional = [f'{field} (optional)' for field in sorted(OPTIONAL.get(kind, ()))]
        descriptions.append(f'{kind}: {", ".join([*sorted(required), *optional])}')
    return '; '.join(descriptions)


def window_seconds(inputs: Mapping[str, Any]) -> float:
    """Length of a window in seconds: that of the longest clip of any modality (0 for text)."""
    lengths = [modalities.seconds(modality, spec) for modality, spec in inputs.items()]
    return max(lengths, default=0.0)


def starts(
    views: tuple[View, ...],
    window: float,
    duration: np.ndarray,
    draw: Callable[[str], np.ndarray],
    segments: tuple[np.ndarray, np.ndarray] | None,
    step: np.ndarray | float,
) -> dict[str, np.ndarray]:
    """Window starts {suffix: float64 [B]}, in seconds.

    NaN where a record has no such window, as only shifts with `apart` can have it: see `present`.
    Where a view wants an interval from the main window and training leaves both free, the two are
    drawn together (`frame_windows.pair`). In an evaluation the main window is given, and the other
    is anywhere.

    Args:
      views: the streams.
      window: its length in seconds.
      duration: of the records [B], in seconds.
      draw: site -> uniform numbers [B].
      segments: (begin, end) [B] in evaluation; None in training, where the main window is uniform
        over the record.
      step: seconds between stored frames, [B] or one for all; starts are multiples of it.
    """
    # In training the whole record is the segment.
    begin, end = segments if segments is not None else (np.zeros_like(duration), duration)

    def anywhere(site: str) -> np.ndarray:
        return frame_windows.anywhere(duration, window, step, draw(site))

    def spaced(view: View) -> np.ndarray:
        return frame_windows.spaced(begin, end, duration, window, view.number, view.of)

    # All main streams have the same entry, so the first speaks for them.
    fixed_main_views = [view for view in views if not view.suffix and view.kind == 'window']
    at_interval = [view for view in views if view.interval is not None]
    result: dict[str, np.ndarray] = {}
    if fixed_main_views:
        main = spaced(fixed_main_views[0])
    elif segments is None and at_interval:
        suffix, power = at_interval[0].suffix, at_interval[0].interval
        assert power is not None  # as selected above
        sites = (f'interval.{suffix}', 'window', f'order.{suffix}')
        u = np.stack([draw(site) for site in sites], axis=1)  # [B 3]
        main, result[suffix] = frame_windows.pair(duration, window, step, u, power)
    elif segments is None:
        main = anywhere('window')
    else:
        main = frame_windows.centred(begin, end, duration, window)
    # Snapped before the others are derived from it, so that shifts are from a stored frame.
    result[''] = frame_windows.snap(main, step)
    for view in views:
        if view.suffix in result:  # the streams of one suffix share a window
            continue
        if view.apart is not None:
            start = frame_windows.apart(
                result[''], duration, window, view.apart, step, draw(f'window.{view.suffix}')
            )
        elif view.kind == 'clip' or (view.kind == 'shift' and view.seconds == 'random'):
            # A site of its own: the draw is independent of the main window's.
            start = anywhere(f'window.{view.suffix}')
        elif view.kind == 'shift':
            start = frame_windows.shifted(result[''], float(view.seconds), duration, window)
        elif view.kind == 'window':
            start = spaced(view)
        else:  # reverse: a window of the others, which may come later
            continue
        result[view.suffix] = frame_windows.snap(start, step)
    for view in views:
        if view.same > 0:
            # The streams of one suffix draw the same number.
            is_same = draw(f'same.{view.suffix}') < view.same
            result[view.suffix] = np.where(is_same, result[''], result[view.suffix])
    for view in views:
        if view.kind == 'reverse':
            result[view.suffix] = result[view.reversed_suffix]
    return result


def present(starts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{suffix: bool [B]}, which of the windows of `starts` there are."""
    return {suffix: ~np.isnan(start) for suffix, start in starts.items()}


def with_substitutes(starts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The starts, where a window is missing that of the main one, which is read in any case."""
    main = starts['']
    return {suffix: np.where(np.isnan(start), main, start) for suffix, start in starts.items()}
