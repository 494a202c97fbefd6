"""The device stage: what is left to do to a batch once its bytes are on the accelerator.

Pixels and samples cross the bus as uint8 and int16; crop, resize, flip, colour and noise happen
here, in the same program as the towers. Semantics after the official VATT loader ("VGG" style),
with one crop and one resample instead of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError
from vatt_jax.inputs import spectrogram
from vatt_jax.rng import Rng

# Y, U, V of 0 to 255 (ITU-R BT.601, Y from 16 to 235: what data_pipelines stores) -> R, G, B of -1
# to 1, as rgb = _FROM_PLANES · yuv + _FROM_PLANES_SHIFT.
_FROM_PLANES = np.float32(
    np.array(
        [
            [1 / 219, 0, 1.402 / 224],
            [1 / 219, -0.344136 / 224, -0.714136 / 224],
            [1 / 219, 1.772 / 224, 0],
        ]
    )
    * 2
)
_FROM_PLANES_SHIFT = np.float32(-1 - _FROM_PLANES @ np.array([16, 128, 128]))


def device_stage(
    batch: Mapping[str, Any], inputs: Any, config: Any, rng: Rng, *, augment: bool, dtype: str
) -> dict[str, Any]:
    """Turn the streams of a batch into floats.

    Args:
        batch: The device batch.
        inputs: `config.model.inputs`.
        config: `config.augment`.
        rng: Already at its site.
        augment: False: no jitter and no noise.
        dtype: Of the streams returned.

    Returns:
        The batch with video [B T size size 3] in the model's own range and audio [B S] in [-1, 1]
        or as log-mel [B T F]; text as it was. Rows that are not valid come out as zeros.
    """
    out = dict(batch)
    for name, stream in batch.items():
        if not isinstance(stream, Mapping) or 'data' not in stream:
            continue
        modality = name.split('.')[0]
        if modality not in STAGES:
            continue
        data = STAGES[modality](stream, inputs[modality], config, rng.at(name), augment)
        valid = stream['valid'].reshape((-1,) + (1,) * (data.ndim - 1))
        # The box and the flip are applied; nobody after this needs them.
        rest = {key: value for key, value in stream.items() if key not in ('box', 'flip')}
        out[name] = {**rest, 'data': jnp.where(valid, data, 0).astype(dtype)}
    return out


def abstract(inputs: Any, streams: tuple[str, ...], rows: int, dtype: str) -> dict[str, Any]:
    """Return the abstract device batch of a model's own inputs.

    It is what `device_stage` makes of `rows` examples with these streams.

    Args:
        inputs: `config.model.inputs`.
        streams: Names of the streams, a modality or 'modality.view'.
        rows: Examples.
        dtype: Of video and audio.
    """
    batch: dict[str, Any] = {
        'index': jax.ShapeDtypeStruct((rows,), 'int32'),
        'position': jax.ShapeDtypeStruct((rows,), 'uint32'),
        'valid': jax.ShapeDtypeStruct((rows,), bool),
    }
    for name in streams:
        modality = name.split('.')[0]
        shape, stream_dtype = _stream_shape(modality, inputs[modality], dtype)
        batch[name] = {
            'data': jax.ShapeDtypeStruct((rows, *shape), stream_dtype),
            'valid': jax.ShapeDtypeStruct((rows,), bool),
        }
        if modality == 'text':
            mask_shape = (rows, inputs[modality]['candidates'])
            batch[name]['mask'] = jax.ShapeDtypeStruct(mask_shape, bool)
    return batch


def _stream_shape(modality: str, spec: Any, dtype: str) -> tuple[tuple[int, ...], str]:
    """Return the shape of one example, without B, and the dtype."""
    if modality == 'video':
        return (spec['frames'], spec['size'], spec['size'], 3), dtype
    if modality == 'audio':
        if spec.get('mel'):
            return spectrogram.shape(spec), dtype
        return (spec['samples'],), dtype
    if modality == 'text':
        return (spec['candidates'], spec['words']), 'int32'
    raise KeyError(modality)


def video(
    stream: Mapping[str, Any], spec: Any, config: Any, rng: Rng, augment: bool
) -> Float[Array, 'B T size size 3']:
    """Cut out the box, resize, mirror where `flip`, and jitter the colours.

    Two batched matrix products do it all: one for rows, one for columns and colour together. Colour
    jitter is affine in a pixel's channels, and so is the conversion of planes; a colour plane of
    half the size is doubled by being resampled with weights of its own.

    Args:
        stream: 'data', uint8 [B T H W 3] or planes [B T 3H/2 W]; 'box' [B 4], fractions (top, left,
            bottom, right); 'flip', bool [B].
        spec: `config.model.inputs.video`.
        config: `config.augment`.
        rng: Already at the stream's name.
        augment: Whether to jitter.

    Returns:
        float32 in `range` of the spec.

    Raises:
        ConfigError: `range` makes no sense.
    """
    size = spec['size']
    is_rgb = stream['data'].ndim == 5
    resample_video = _resample_rgb if is_rgb else _resample_planes
    x, shift = resample_video(stream, size, config, rng, augment)  # [B T size size·3], [B 3]
    batch, frames = x.shape[:2]
    # Colours stay beside columns until the end: as a last axis of their own TPUs pad them from 3 to
    # 128.
    x = jnp.clip(x + jnp.tile(shift, size)[:, None, None], -1, 1)
    x = x.reshape(batch, frames, size, size, 3)
    return _to_range(x, tuple(spec.get('range', (-1.0, 1.0))))  # older checkpoints: VATT's


def _resample_rgb(
    stream: Mapping[str, Any], size: int, config: Any, rng: Rng, augment: bool
) -> tuple[jax.Array, jax.Array]:
    """Resample and colour frames [B T H W 3]: [B T size size·3], and the shift [B 3] to add."""
    data = stream['data']
    batch, frames, height, width = data.shape[:4]
    rows, columns = _axis_weights(stream, height, width, size)
    x = data.astype(jnp.float32) * (2 / 255) - 1
    # The mean is taken over time, then over the resampled frame: the weights of each source row and
    # column say how much it counts.
    mean = jnp.einsum('bhwc,bh,bw->bc', x.mean(1), rows.mean(1), columns.mean(1))
    matrix, shift = _color_transform(mean, config, rng, augment)
    mixed = jnp.einsum('bjw,bdc->bwcjd', columns, matrix).reshape(batch, width * 3, size * 3)
    x = jnp.matmul(x.reshape(batch, frames * height, width * 3), mixed)
    x = x.reshape(batch, frames, height, size * 3)
    return jnp.einsum('bih,bthk->btik', rows, x), shift


def _resample_planes(
    stream: Mapping[str, Any], size: int, config: Any, rng: Rng, augment: bool
) -> tuple[jax.Array, jax.Array]:
    """Do the same to planes [B T 3H/2 W]: H rows of Y, then U and V of half the height and width.

    Each row of chroma of the stored array holds two rows of a plane side by side.
    """
    data = stream['data']
    batch, frames = data.shape[:2]
    height, width = data.shape[2] * 2 // 3, data.shape[3]
    x = data.astype(jnp.float32)
    chroma = x[:, :, height:].reshape(batch, frames, 2, height // 2, width // 2)
    planes = [x[:, :, :height], chroma[:, :, 0], chroma[:, :, 1]]
    luma_weights = _axis_weights(stream, height, width, size)
    chroma_weights = _axis_weights(stream, height // 2, width // 2, size)
    weights = [luma_weights, chroma_weights, chroma_weights]

    means, resampled = [], []
    for plane, (rows, columns) in zip(planes, weights):
        means.append(jnp.einsum('bhw,bh,bw->b', plane.mean(1), rows.mean(1), columns.mean(1)))
        resampled.append(jnp.einsum('bih,bthw->btiw', rows, plane))
    mean = jnp.stack(means, -1)  # [B 3], Y U V

    # jitter · (from_planes · yuv + planes_shift) + shift, as one matrix and one shift
    matrix, shift = _color_transform(
        mean @ _FROM_PLANES.T + _FROM_PLANES_SHIFT, config, rng, augment
    )
    shift = matrix @ _FROM_PLANES_SHIFT + shift
    matrix = matrix @ _FROM_PLANES

    mixed = []
    for channel, (_, columns) in enumerate(weights):
        mixed.append(jnp.einsum('bjw,bd->bwjd', columns, matrix[..., channel]))
    # Y, U and V side by side, W + W/2 + W/2 columns: one product sums over all three.
    x = jnp.concatenate(resampled, -1).reshape(batch, frames * size, 2 * width)
    x = jnp.matmul(x, jnp.concatenate(mixed, 1).reshape(batch, 2 * width, size * 3))
    return x.reshape(batch, frames, size, size * 3), shift


def _axis_weights(
    stream: Mapping[str, Any], height: int, width: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of rows [B size H] and of columns [B size W], mirrored where `flip`."""
    box = stream['box'].astype(jnp.float32)
    columns = resample(box[:, 1], box[:, 3], width, size)
    rows = resample(box[:, 0], box[:, 2], height, size)
    return rows, jnp.where(stream['flip'][:, None, None], columns[:, ::-1], columns)


def _color_transform(
    mean: jax.Array, config: Any, rng: Rng, augment: bool
) -> tuple[jax.Array, jax.Array]:
    """Return (matrix [B 3 3], shift [B 3]) of the jitter, the identity where there is none."""
    if augment and config['color'] > 0:
        return color_jitter(mean, config, rng.at('color'))
    batch = len(mean)
    return jnp.broadcast_to(jnp.eye(3), (batch, 3, 3)), jnp.zeros((batch, 3))


def _to_range(x: jax.Array, pixel_range: tuple[float, ...]) -> jax.Array:
    """Map pixels from [-1, 1] to the range the model was made for."""
    if len(pixel_range) != 2 or pixel_range[0] >= pixel_range[1]:
        raise ConfigError(
            f'config.model.inputs.video.range={pixel_range}: expected the values of black and of '
            'white, such as (-1.0, 1.0) or (0.0, 1.0).'
        )
    if pixel_range == (-1, 1):
        return x
    low, high = pixel_range
    return (x + 1) * ((high - low) / 2) + low


def resample(
    low: Float[Array, ' B'], high: Float[Array, ' B'], length: int, size: int
) -> Float[Array, 'B size length']:
    """Return weights that read `size` pixels linearly from a part of a line.

    Pixel centres are half-integers; when shrinking, the triangle widens to the step, so nothing
    aliases. Rows sum to 1. The whole axis at its own size gives the identity.

    Args:
        low: Where the part begins, a fraction of the line.
        high: Where it ends.
        length: Pixels of the line.
        size: Pixels to read.
    """
    step = (high - low) * length / size  # source pixels from one target pixel to the next
    centre = low[:, None] * length + (jnp.arange(size) + 0.5) * step[:, None]  # [B size]
    reach = jnp.maximum(step, 1.0)[:, None, None]
    distance = jnp.abs(centre[:, :, None] - (jnp.arange(length) + 0.5))  # [B size length]
    weight = jnp.maximum(0.0, 1.0 - distance / reach)
    # At the border part of the triangle lies outside; an empty box must not give 0/0.
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def color_jitter(
    mean: Float[Array, 'B 3'], config: Any, rng: Rng
) -> tuple[Float[Array, 'B 3 3'], Float[Array, 'B 3']]:
    """Draw brightness, saturation, contrast and hue once per clip, with probability `color`.

    The official loader clips between the operations; here once, after.

    Args:
        mean: The clip's mean pixel, about which contrast turns.
        config: `config.augment`.
        rng: Already at its site.

    Returns:
        matrix and shift of y = matrix · x + shift for pixels x in [-1, 1]; the identity for clips
        that are left alone.
    """

    def draw(site: str, low: float, high: float) -> jax.Array:
        return rng.at(site).uniform((), low, high)[:, None, None]  # [B 1 1]

    identity = jnp.eye(3)
    # luma of ITU-R BT.601 in every channel
    gray = jnp.broadcast_to(jnp.array([0.299, 0.587, 0.114]), (3, 3))
    saturation = draw('saturation', 1 - config['saturation'], 1 + config['saturation'])
    contrast = draw('contrast', 1 - config['contrast'], 1 + config['contrast'])
    # Twice: brightness is a share of 0 to 1, and pixels here span 2.
    brightness = 2 * draw('brightness', -config['brightness'], config['brightness'])

    # Brightness, then saturation: x -> matrix · (x + brightness)
    matrix = gray + (identity - gray) * saturation
    offset = matrix @ (brightness * jnp.ones((3, 1)))
    # Contrast about the mean of what came out: x -> centre + contrast · (x - centre)
    centre = matrix @ mean[..., None] + offset
    matrix = contrast * matrix
    shift = centre + contrast * (offset - centre)
    rotation = _hue(draw('hue', -config['hue'], config['hue'])[:, 0, 0])
    matrix = rotation @ matrix
    shift = (rotation @ shift)[..., 0]
    applied = draw('apply', 0.0, 1.0) < config['color']
    return jnp.where(applied, matrix, identity), jnp.where(applied[:, 0], shift, 0)


def _hue(turn: Float[Array, ' B']) -> Float[Array, 'B 3 3']:
    """Rotate the colour plane (YIQ) by `turn` of a full circle; luma stays."""
    to_yiq = jnp.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    rows = [
        jnp.stack([one, zero, zero], -1),
        jnp.stack([zero, cos, -sin], -1),
        jnp.stack([zero, sin, cos], -1),
    ]
    return jnp.linalg.inv(to_yiq) @ jnp.stack(rows, -2) @ to_yiq


def audio(
    stream: Mapping[str, Any], spec: Any, config: Any, rng: Rng, augment: bool
) -> Float[Array, 'B ...']:
    """Scale samples to [-1, 1], vary the volume and add noise.

    Args:
        stream: 'data', int16 [B S].
        spec: `config.model.inputs.audio`.
        config: `config.augment`. The sound gets louder or softer by up to a share `volume` (and is
            then perhaps beyond 1), and gaussian noise of `audio_noise` times the clip's peak.
        rng: Already at the stream's name.
        augment: Whether to do either.

    Returns:
        float32 [B S], or its log-mel [B T F] (after both) where the model's inputs ask for one.
    """
    x = stream['data'].astype(jnp.float32) / 32768
    volume = config.get('volume', 0.0)  # runs older than this field do not have it
    if augment and volume > 0:
        x = x * rng.at('volume').uniform((), 1 - volume, 1 + volume)[:, None]
    if augment and config['audio_noise'] > 0:
        noise = rng.at('noise').normal(x.shape[1:])
        peak = jnp.abs(x).max(-1, keepdims=True)
        x = x + noise * config['audio_noise'] * peak
    if spec.get('mel'):
        return spectrogram.log_mel(x, spec['rate'], spec['mel'])
    return x


STAGES = {'video': video, 'audio': audio}
