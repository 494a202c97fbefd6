"""What a user asks for: the options of `embed`, `classify` and `predict`, checked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inference import arrays
from vatt_jax.inference.arrays import FILES

# Which tower encodes a kind of input, where it is not called the same.
TOWERS = {'image': 'video'}
ON_ERROR = ('raise', 'skip')


@dataclasses.dataclass(frozen=True)
class Request:
    """How inputs are read and encoded.

    Attributes:
        call: the method that was called, for messages.
        rate: as of `Model.embed`, like the next ones.
        batch_size: items encoded at a time.
        windows: of each clip and sound.
        stride: seconds from window to window.
        on_error: 'raise' or 'skip'.
        quiet: no progress bar.
        takes_sound: whether the sound of media files is encoded beside their pictures.

    Raises:
        ConfigError: one of them is of another kind or out of range.
    """

    call: str
    rate: Any
    batch_size: Any
    windows: Any
    stride: Any
    on_error: str
    quiet: bool
    takes_sound: bool = False

    def __post_init__(self) -> None:
        self._check_count('batch_size', self.batch_size)
        if self.windows is not None:
            self._check_count('windows', self.windows)
        stride = self.stride
        if stride is not None and not (arrays.is_number(stride) and 0 < stride < float('inf')):
            raise ConfigError(
                f'{self.call}(stride={stride!r}): expected a positive number of seconds'
            )
        if self.on_error not in ON_ERROR:
            raise ConfigError(
                f'{self.call}(on_error={self.on_error!r}): expected one of {", ".join(ON_ERROR)}'
            )

    def _check_count(self, name: str, value: Any) -> None:
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not is_whole or value < 1:
            raise ConfigError(
                f'{self.call}({name}={value!r}): expected a whole number of 1 or more'
            )

    @property
    def has_windows(self) -> bool:
        """Whether rows are windows of items, not items."""
        return self.windows is not None or self.stride is not None

    def where(self, name: str, value: Any = None, number: int | None = None) -> str:
        """The call and argument, for messages; `number` of an item of a list."""
        if isinstance(value, FILES):
            return f'{self.call}({name}={os.fsdecode(value)!r})'
        item = '' if number is None else f'[{number}]'
        return f'{self.call}({name}{item}=…)'


def given_inputs(**inputs: Any) -> dict[str, Any]:
    """The inputs that are not None."""
    return {name: value for name, value in inputs.items() if value is not None}


def only_input(given: Mapping[str, Any], call: str) -> str:
    """The name of the one input.

    Raises:
        ConfigError: there is none, or there are several.
    """
    if len(given) != 1:
        raise ConfigError(
            f'{call}(): expected one of video=, audio=, image= and flow=, '
            f'got {" and ".join(given) or "none"}'
        )
    return next(iter(given))
