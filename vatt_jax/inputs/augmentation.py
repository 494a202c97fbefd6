"""What is drawn for a clip: its colours, grey, blur, solarisation.

One draw holds for all frames of a clip, so that augmentation adds no motion (CVRL calls this
temporally consistent). All but the last is linear in the picture, and `preprocess.video` folds it
into the products that resample the frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vatt_jax.rng import Rng

# Luma weights of BT.601.
LUMA = (0.299, 0.587, 0.114)

# Fields that configs of older runs lack, with the values at which nothing happens.
YOUNGER_FIELDS = {
    'gain': 0.0,
    'grey': 0.0,
    'blur': 0.0,
    'solarise': 0.0,
    'strong': 1.0,
    'views': (),
}


def of_stream(config: Mapping[str, Any], stream: str) -> dict[str, Any]:
    """The augmentation of one stream: what `views` says of it replaces the common fields.

    Args:
        config: `config.augment`.
        stream: its name, such as 'video.second'.
    """
    fields = {**YOUNGER_FIELDS, **config}
    for name, changes in fields['views']:
        if name == stream:
            fields.update(changes)
    return fields


def same_colors(num_clips: int) -> tuple[Float[Array, 'B 3 3'], Float[Array, 'B 3']]:
    """Matrix and shift that leave every colour as it is."""
    return jnp.broadcast_to(jnp.eye(3), (num_clips, 3, 3)), jnp.zeros((num_clips, 3))


def colors(
    mean: Float[Array, 'B 3'], config: Mapping[str, Any], rng: Rng
) -> tuple[Float[Array, 'B 3 3'], Float[Array, 'B 3']]:
    """Jitter and then grey, each with its probability, in clips that take the strong set.

    Args:
        mean: the clip's mean pixel.
        config: `config.augment` of the stream.
        rng: of the stream.

    Returns:
        matrix and shift of y = matrix · x + shift for pixels x in [-1, 1].
    """
    if config['color'] > 0:
        matrix, shift = color_jitter(mean, config, rng.at('color'))
    else:
        matrix, shift = same_colors(len(mean))
    if config['grey'] > 0:
        is_grey = _happens(config['grey'], rng.at('grey'))[:, None]  # [B 1]
        luma = jnp.array(LUMA)
        matrix = jnp.where(is_grey[..., None], (luma @ matrix)[:, None, :], matrix)
        shift = jnp.where(is_grey, (shift @ luma)[:, None], shift)
    if config['strong'] < 1:
        is_strong = takes_strong_set(config, rng)[:, None]
        same_matrix, same_shift = same_colors(len(mean))
        matrix = jnp.where(is_strong[..., None], matrix, same_matrix)
        shift = jnp.where(is_strong, shift, same_shift)
    return matrix, shift


def takes_strong_set(config: Mapping[str, Any], rng: Rng) -> Bool[Array, ' B']:
    """Which clips are changed beyond crop and mirroring."""
    return _happens(config['strong'], rng.at('strong'))


def _happens(probability: float, rng: Rng) -> Bool[Array, ' B']:
    return rng.uniform(()) < probability


def blur(size: int, config: Mapping[str, Any], rng: Rng) -> Float[Array, 'B size size'] | None:
    """Gaussian blur along one axis of the output picture, as a matrix; None where it is off.

    The kernel ends at `blur_width` of the picture and is cut, too, at the picture's edges, where
    what is inside counts for all of it, as in `preprocess.resample`.

    Args:
        size: of the output picture, in pixels.
        config: `config.augment` of the stream: `blur`, the probability; `blur_sigma`, least and
            greatest standard deviation in pixels of the output, uniform; `blur_width`.
        rng: of the stream.

    Returns:
        Weights that make a blurred row of `size` pixels of a sharp one; each line sums to 1. The
        identity for clips that are not blurred.
    """
    if config['blur'] == 0:
        return None
    sigma = rng.at('blur_sigma').uniform((), *config['blur_sigma'])[:, None, None]  # [B 1 1]
    position = jnp.arange(size)
    distance = jnp.abs(position[:, None] - position)  # [size size]
    weight = jnp.exp(-(distance**2) / (2 * sigma**2))  # [B size size]
    weight = jnp.where(distance <= blur_radius(size, config['blur_width']), weight, 0)
    weight = weight / weight.sum(-1, keepdims=True)
    is_blurred = _happens(config['blur'], rng.at('blur'))
    if config['strong'] < 1:
        is_blurred = is_blurred & takes_strong_set(config, rng)
    return jnp.where(is_blurred[:, None, None], weight, jnp.eye(size))


def solarised(
    x: Float[Array, 'B T H W'], config: Mapping[str, Any], rng: Rng
) -> Float[Array, 'B T H W']:
    """Values of the brighter half turned round its middle, with the probability `solarise`.

    White becomes black and grey stays (BYOL, CVRL's code); it comes last, after the blur.

    Args:
        x: of -1 to 1; colours may lie side by side along an axis.
        config: `config.augment` of the stream.
        rng: of the stream.
    """
    if config['solarise'] == 0:
        return x
    is_solarised = _happens(config['solarise'], rng.at('solarise'))
    if config['strong'] < 1:
        is_solarised = is_solarised & takes_strong_set(config, rng)
    # 1 - v of a value v in [0, 1] is -x of x in [-1, 1].
    return jnp.where(is_solarised[:, None, None, None] & (x >= 0), -x, x)


def blur_radius(size: int, width: float) -> int:
    """Pixels on either side of a pixel that its blur reads.

    Half of `width` of the picture, rounded down (SimCLR: a tenth; 11 of 224), but at least 1.
    """
    return max(1, int(size * width) // 2)


def color_jitter(
    mean: Float[Array, 'B 3'], config: Any, rng: Rng
) -> tuple[Float[Array, 'B 3 3'], Float[Array, 'B 3']]:
    """Brightness, saturation, contrast and hue, one draw per clip, with probability `color`.

    Brightness is a shift (official VATT), a factor (`gain`, SimCLR's), or both, the factor first.
    The official loader clips between the operations; here pixels are clipped once, after them.

    Args:
        mean: the clip's mean pixel, about which contrast turns.
        config: `config.augment` of the stream.
        rng: of the colours of this stream.

    Returns:
        matrix and shift of y = matrix · x + shift for pixels x in [-1, 1]; the identity for clips
        that are not jittered.
    """

    def draw(site: str, low: float, high: float) -> jax.Array:
        return rng.at(site).uniform((), low, high)[:, None, None]  # [B 1 1]

    eye = jnp.eye(3)
    # The same for each output channel.
    gray = jnp.broadcast_to(jnp.array(LUMA), (3, 3))
    saturation = draw('saturation', 1 - config['saturation'], 1 + config['saturation'])
    contrast = draw('contrast', 1 - config['contrast'], 1 + config['contrast'])
    #  saturation  x -> s x + (1 - s) luma(x)
    matrix = gray + (eye - gray) * saturation
    # Pixels are twice as wide as in [0, 1], so brightness is too.
    brightness = 2 * draw('brightness', -config['brightness'], config['brightness'])
    #  brightness  x -> x + b, before the saturation
    if config['gain'] > 0:
        #  gain        x -> g x + (g - 1): black, which is -1, stays black
        gain = draw('gain', 1 - config['gain'], 1 + config['gain'])
        brightness = brightness + (gain - 1)
    shift = matrix @ (brightness * jnp.ones((3, 1)))  # [B 3 1]
    if config['gain'] > 0:
        matrix = matrix * gain
    #  contrast    x -> c x + (1 - c) mean: the mean pixel is the fixed point
    centre = matrix @ mean[..., None] + shift
    matrix, shift = contrast * matrix, centre + contrast * (shift - centre)
    turn = _hue(draw('hue', -config['hue'], config['hue'])[:, 0, 0])
    matrix, shift = turn @ matrix, (turn @ shift)[..., 0]
    # One draw for all four.
    applied = draw('apply', 0.0, 1.0) < config['color']  # [B 1 1]
    return jnp.where(applied, matrix, eye), jnp.where(applied[:, 0], shift, 0)


def _hue(turn: jax.Array) -> jax.Array:
    """float32 [B 3 3]: rotation of the colour plane (YIQ) by `turn` [B] of a full circle.

    Luma stays.
    """
    to_yiq = jnp.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    rotation = jnp.stack(
        [
            jnp.stack([one, zero, zero], -1),
            jnp.stack([zero, cos, -sin], -1),
            jnp.stack([zero, sin, cos], -1),
        ],
        -2,
    )
    return jnp.linalg.inv(to_yiq) @ rotation @ to_yiq
