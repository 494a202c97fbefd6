"""Visual prompting: learnt pixels that are added to the picture (Bahng et al. 2022).

    frame    a frame along the border, `width` pixels wide
    patch    a square of `width` pixels in the upper left corner
    random   the same square anywhere, in every clip at a place of its own

Added to what the tower reads, colours shifted and scaled as it expects them, equally in all frames
of a clip. Initial values are normal with deviation 1, as in the authors' code. Also for networks
without tokens. In evaluation `random` draws its place by the clip's position in the pass, so that
equal passes give equal results (theirs draws one place for a whole batch).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.models.adapters.base import Adapter, Tower
from vatt_jax.parallel.sharding import logical
from vatt_jax.rng import Rng

DEFAULTS: dict[str, Any] = {
    'name': 'visual_prompt',
    # Towers to adapt, by modality; (): all that can be.
    'modalities': (),
    # frame | patch | random
    'form': 'frame',
    # Pixels: of the frame on each side, or of the square.
    'width': 30,
}
FORMS = ('frame', 'patch', 'random')


def check(config: Any, where: str) -> None:
    """Check the fields.

    Raises:
        ConfigError: one of them has a value that makes no sense.
    """
    choose(config['form'], FORMS, f'{where}.form')
    check_range(config['width'], 1, 1 << 16, f'{where}.width')


def frame_places(size: int, width: int) -> Int[np.ndarray, 'n 2']:
    """Rows and columns of the pixels within `width` of the border, row by row."""
    is_inside = np.zeros((size, size), bool)
    is_inside[width : size - width, width : size - width] = True
    return np.argwhere(~is_inside)


class VisualPrompt(Adapter):
    """The learnt pixels: [n 3] of a frame, [width width 3] of a square."""

    @classmethod
    def misfit(cls, tower: Tower) -> str:
        return '' if tower.size else 'it reads no pictures'

    def setup(self) -> None:
        size, width, form = self.tower.size, self.config['width'], self.config['form']
        # A frame of half the side covers the picture.
        largest = (size + 1) // 2 if form == 'frame' else size
        if width > largest:
            raise ConfigError(
                f'config.model.adapter.width: expected at most {largest} for form={form!r} and '
                f'pictures of {size} pixels, got {width}'
            )
        init = jax.nn.initializers.normal(1.0)
        if form == 'frame':
            shape: tuple[int, ...] = (len(frame_places(size, width)), 3)
        else:
            shape = (width, width, 3)
        self.values = self.param('pixels', logical(init, *(None,) * len(shape)), shape)

    def pixels(self, data: Float[Array, 'B T H W 3'], rng: Rng) -> Float[Array, 'B T H W 3']:
        if data.shape[2:4] != (self.tower.size, self.tower.size):
            raise ConfigError(
                f'config.model.adapter: its pixels are for pictures of {self.tower.size}, got '
                f'{data.shape[2]} × {data.shape[3]}'
            )
        prompt = self._prompt(data.shape[2:], rng)  # [1 H W 3] or [B H W 3]
        return data + prompt[:, None].astype(data.dtype)

    def _prompt(self, shape: tuple[int, ...], rng: Rng) -> Float[Array, 'b H W 3']:
        """Zeros with the learnt pixels in their place."""
        empty = jnp.zeros(shape, jnp.float32)
        width = self.config['width']
        if self.config['form'] == 'frame':
            rows, columns = frame_places(self.tower.size, width).T
            return empty.at[rows, columns].set(self.values)[None]
        if self.config['form'] == 'patch':
            return empty.at[:width, :width].set(self.values)[None]
        num_places = shape[0] - width + 1
        corners = jnp.floor(rng.at('visual_prompt').uniform((2,)) * num_places)  # [B 2]

        def place(corner: jax.Array) -> jax.Array:
            start = (*corner.astype(jnp.int32), 0)
            return jax.lax.dynamic_update_slice(empty, self.values, start)

        return jax.vmap(place)(corners)
