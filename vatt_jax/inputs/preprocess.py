"""The device stage: what is left to do to a batch once its bytes are on the accelerator.

Pixels and samples cross the bus as uint8 and int16; crop, resize, flip, colour and noise happen
here, in the same program as the towers. Semantics after the official VATT loader ("VGG" style),
with one crop and one resample instead of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vatt_jax.config import ConfigError, choose
from vatt_jax.inputs import augmentation, mirrored, optical_flow, spec_augment, spectrogram
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.rng import Rng


def check(inputs: Any, config: Any) -> None:
    """Checks what of the augmentation depends on the model's inputs or on other streams.

    Args:
        inputs: `config.model.inputs`.
        config: `config.augment`.

    Raises:
        ConfigError: a field of `config.augment` is wrong.
    """
    mirrored.check(config)
    if 'audio' in inputs:
        spec_augment.check(config, inputs['audio'])


def device_stage(
    batch: Mapping[str, Any], inputs: Any, config: Any, rng: Rng, *, augment: bool, dtype: str
) -> dict[str, Any]:
    """Turns the bytes of a batch into what towers read.

    Args:
        batch: a device batch.
        inputs: `config.model.inputs`.
        config: `config.augment`.
        rng: of the stage; each stream derives its own from it by its name.
        augment: False for no jitter and no noise. The crop is taken in any case.
        dtype: of the float streams that come out.

    Returns:
        The batch with float streams: video [B T size size 3] in the model's own range, flow
        [B T size size C] in [-1, 1], audio [B S] in [-1, 1] or as log-mel [B T F]; text as it was.
        Rows that are not valid are zeros.
    """
    out = dict(batch)
    for name, stream in batch.items():
        if not (isinstance(stream, Mapping) and 'data' in stream):
            continue
        modality = name.split('.')[0]
        if modality not in STAGES:  # text: ids stay as they are
            continue
        own_config = augmentation.of_stream(config, name)
        data = STAGES[modality](stream, inputs[modality], own_config, rng.at(name), augment)
        valid = stream['valid'].reshape((-1,) + (1,) * (data.ndim - 1))  # [B 1 …]
        # These described the bytes; the floats are cropped and flipped already.
        rest = {key: value for key, value in stream.items() if key not in ('box', 'flip')}
        out[name] = {**rest, 'data': jnp.where(valid, data, 0).astype(dtype)}
    return out


def abstract(inputs: Any, streams: Sequence[str], rows: int, dtype: str) -> dict[str, Any]:
    """The abstract batch that `device_stage` makes of `rows` examples.

    Args:
        inputs: `config.model.inputs`.
        streams: names of the streams of the batch.
        rows: examples of the batch.
        dtype: of float streams.
    """
    batch: dict[str, Any] = {
        'index': jax.ShapeDtypeStruct((rows,), 'int32'),
        'position': jax.ShapeDtypeStruct((rows,), 'uint32'),
        'valid': jax.ShapeDtypeStruct((rows,), bool),
    }
    for name in streams:
        modality = name.split('.')[0]
        spec = inputs[modality]
        shape: tuple[int, ...]
        if modality == 'text':
            shape = (spec['candidates'], spec['words'])
        elif kind_of(modality) == PICTURES:
            # Of video 3 colours.
            shape = (spec['frames'], spec['size'], spec['size'], spec.get('channels', 3))
        elif spec.get('mel'):
            shape = spectrogram.shape(spec)
        else:
            shape = (spec['samples'],)
        of = 'int32' if modality == 'text' else dtype
        batch[name] = {
            'data': jax.ShapeDtypeStruct((rows, *shape), of),
            'valid': jax.ShapeDtypeStruct((rows,), bool),
        }
        if modality == 'text':
            batch[name]['mask'] = jax.ShapeDtypeStruct((rows, spec['candidates']), bool)
    return batch


# Mean pixel of each clip [B 3] -> (matrix [B 3 3], shift [B 3]) of its colours.
Jitter = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
# (height, width) in pixels -> weights of rows [B size height] and of columns [B size width].
Weights = Callable[[int, int], tuple[jax.Array, jax.Array]]


def video(
    stream: Mapping[str, Any], spec: Any, config: Any, rng: Rng, augment: bool
) -> Float[Array, 'B T H W 3']:
    """The box cut out of every frame, resized, mirrored where `flip`, and augmented.

    Two batched matrix products do it all: one over rows, one over columns and colour together.
    Colour jitter is affine in a pixel's channels, and so is the conversion of planes. Blur is
    linear in rows and in columns, so that the weights of resampling take it in.

    Args:
        stream: `data` uint8 [B T H W 3], or planes Y, U, V [B T 3H/2 W]; `box` [B 4]; `flip` [B].
        spec: `config.model.inputs.video`.
        config: `config.augment` of this stream.
        rng: of this stream.
        augment: False for neither jitter nor blur nor solarisation.

    Returns:
        float32 [B T size size 3] in `spec.range`, standardised where `spec` has mean and deviation.

    Raises:
        ConfigError: the range is not two rising numbers, or there is no such way to resize.
    """
    data, size = stream['data'], spec['size']
    num_clips = data.shape[0]

    def weights(height: int, width: int) -> tuple[jax.Array, jax.Array]:
        return _crop_weights(stream, height, width, size, spec.get('resize', 'linear'))

    def jitter(mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        if augment:
            return augmentation.colors(mean, config, rng)
        return augmentation.same_colors(num_clips)

    blur = augmentation.blur(size, config, rng) if augment else None
    from_bytes = _from_pixels if data.ndim == 5 else _from_planes
    x, shift = from_bytes(data, size, weights, jitter, blur)  # [B T size size·3], [B 3]
    # Colours stay beside columns until the end: as a last axis of their own TPUs pad them from 3 to
    # 128.
    x = jnp.clip(x + jnp.tile(shift, size)[:, None, None], -1, 1)
    if augment:
        x = augmentation.solarised(x, config, rng)
    x = x.reshape(*data.shape[:2], size, size, 3)
    return _standardised(_in_range(x, spec), spec)


def _crop_weights(
    stream: Mapping[str, Any], height: int, width: int, size: int, kernel: str = 'linear'
) -> tuple[Float[Array, 'B size height'], Float[Array, 'B size width']]:
    """What cuts the box out of every frame, resizes it and mirrors it: weights of rows and columns.

    Args:
        stream: `box` [B 4]; `flip` [B].
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        size: of the result.
        kernel: entry of KERNELS.
    """
    choose(kernel, KERNELS, 'config.model.inputs.video.resize')
    box = stream['box'].astype(jnp.float32)
    columns = resample(box[:, 1], box[:, 3], width, size, kernel)
    rows = resample(box[:, 0], box[:, 2], height, size, kernel)
    flipped = jnp.where(stream['flip'][:, None, None], columns[:, ::-1], columns)
    return rows, flipped


def _from_pixels(
    data: jax.Array, size: int, weights: Weights, jitter: Jitter, blur: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """uint8 [B T H W 3] -> pixels of -1 to 1 [B T size size·3] without their shift, shift [B 3]."""
    b, t, height, width, _ = data.shape
    rows, columns = weights(height, width)
    x = data.astype(jnp.float32) * (2 / 255) - 1  # [B T H W 3]
    # The mean over time, then over the resampled frame: the weights of each source row and column
    # say how much it counts.
    mean = jnp.einsum('bhwc,bh,bw->bc', x.mean(1), rows.mean(1), columns.mean(1))
    matrix, shift = jitter(mean)  # [B 3 3], [B 3]
    rows, columns = _blurred(rows, columns, blur)
    # In the einsums: h, w a row and a column of the frame and i, j of the output; c a colour of the
    # frame and d of the output; k = j·3 + d.
    # Columns and colours in one matrix [B W·3 size·3].
    mixed = jnp.einsum('bjw,bdc->bwcjd', columns, matrix).reshape(b, width * 3, size * 3)
    x = jnp.matmul(x.reshape(b, t * height, width * 3), mixed).reshape(b, t, height, size * 3)
    return jnp.einsum('bih,bthk->btik', rows, x), shift


def _from_planes(
    data: jax.Array, size: int, weights: Weights, jitter: Jitter, blur: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """uint8 planes [B T 3H/2 W] -> the same as `_from_pixels`.

    A colour plane of half the size is doubled by being resampled with weights of its own.
    """
    b, t = data.shape[:2]
    height, width = data.shape[2] * 2 // 3, data.shape[3]
    x = data.astype(jnp.float32)
    chroma = x[:, :, height:].reshape(b, t, 2, height // 2, width // 2)  # U, then V
    planes = [x[:, :, :height], chroma[:, :, 0], chroma[:, :, 1]]  # Y, U, V
    luma_axes = weights(height, width)
    chroma_axes = weights(height // 2, width // 2)
    axes = [luma_axes, chroma_axes, chroma_axes]
    # As in `_from_pixels`, of each plane.
    means = []
    for plane, (rows, columns) in zip(planes, axes, strict=True):
        means.append(jnp.einsum('bhw,bh,bw->b', plane.mean(1), rows.mean(1), columns.mean(1)))
    mean = jnp.stack(means, -1)  # [B 3]
    matrix, shift = jitter(mean @ _FROM_PLANES.T + _FROM_PLANES_SHIFT)
    # Conversion first, then jitter, as one affine map.
    matrix, shift = matrix @ _FROM_PLANES, matrix @ _FROM_PLANES_SHIFT + shift
    resized, mixed = [], []
    for channel, (plane, (rows, columns)) in enumerate(zip(planes, axes, strict=True)):
        rows, columns = _blurred(rows, columns, blur)
        resized.append(jnp.einsum('bih,bthw->btiw', rows, plane))
        mixed.append(jnp.einsum('bjw,bd->bwjd', columns, matrix[..., channel]))
    x = jnp.concatenate(resized, -1)  # [B T size 2W]: Y of W columns, U and V of W/2 each
    # The sum over the three planes is part of the product: they lie side by side along its inner
    # axis.
    by_columns = jnp.concatenate(mixed, 1).reshape(b, 2 * width, size * 3)
    x = jnp.matmul(x.reshape(b, t * size, 2 * width), by_columns)
    return x.reshape(b, t, size, size * 3), shift


def _blurred(
    rows: jax.Array, columns: jax.Array, blur: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Weights of resampling [B size H] and [B size W] that blur what they read, as well."""
    if blur is None:
        return rows, columns
    return blur @ rows, blur @ columns


def _in_range(x: jax.Array, spec: Any) -> jax.Array:
    """Pixels of -1 to 1 in the range of the model."""
    # Checkpoints older than this field are VATT's.
    black_white = tuple(spec.get('range', (-1.0, 1.0)))
    if len(black_white) != 2 or black_white[0] >= black_white[1]:
        raise ConfigError(
            'config.model.inputs.video.range: expected the values of black and of white, such as '
            f'(-1.0, 1.0) or (0.0, 1.0), got {black_white}'
        )
    low, high = black_white
    if black_white == (-1, 1):
        return x
    return (x + 1) * ((high - low) / 2) + low


def _standardised(x: jax.Array, spec: Any) -> jax.Array:
    """Pixels without their mean, divided by their standard deviation, where the model has these."""
    mean, deviation = tuple(spec.get('mean', ())), tuple(spec.get('deviation', ()))
    if not mean and not deviation:
        return x
    if len(mean) != 3 or len(deviation) != 3 or min(deviation) <= 0:
        raise ConfigError(
            'config.model.inputs.video: expected mean and deviation of three colours, the latter '
            f'positive, or neither, got {mean} and {deviation}'
        )
    return (x - jnp.array(mean)) / jnp.array(deviation)


# Y, U, V of 0 to 255 (ITU-R BT.601, Y from 16 to 235: what data_pipelines stores) -> R, G, B of -1
# to 1.
_BT_601 = np.array(
    [
        [1 / 219, 0, 1.402 / 224],
        [1 / 219, -0.344136 / 224, -0.714136 / 224],
        [1 / 219, 1.772 / 224, 0],
    ]
)
_FROM_PLANES = np.float32(_BT_601 * 2)
_FROM_PLANES_SHIFT = np.float32(-1 - _FROM_PLANES @ np.array([16, 128, 128]))


def _triangle(distance: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1.0 - distance)


def _keys_cubic(distance: jax.Array) -> jax.Array:
    """Keys's cubic with a = -1/2, which Pillow's bicubic is."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))


# Name -> the weight of a pixel at a distance of so many steps, and whether a step is that of the
# output where this is the larger one, so that nothing aliases.
KERNELS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    'linear': (_triangle, True),
    'bicubic': (_keys_cubic, True),
    'bilinear': (_triangle, False),
}


def resample(
    low: Float[Array, ' B'],
    high: Float[Array, ' B'],
    length: int,
    size: int,
    kernel: str = 'linear',
) -> Float[Array, 'B size length']:
    """Weights that read `size` pixels from the part low..high of `length` pixels.

    Pixel centres are half-integers. When shrinking, the kernel widens to the step, but for
    `bilinear`. Rows sum to 1. The whole axis at its own size gives the identity.

    Args:
        low: where the part begins, as a fraction of the axis.
        high: where it ends.
        length: of the axis, in pixels.
        size: pixels to make.
        kernel: entry of KERNELS.
    """
    weigh, widens = KERNELS[kernel]
    # Source pixels from one output pixel to the next.
    step = (high - low) * length / size  # [B]
    centre = low[:, None] * length + (jnp.arange(size) + 0.5) * step[:, None]  # [B size]
    reach = jnp.maximum(step, 1.0)[:, None, None] if widens else 1.0
    distance = jnp.abs(centre[:, :, None] - (jnp.arange(length) + 0.5))  # [B size length]
    weight = weigh(distance / reach)
    # At the edge of the axis part of the kernel lies outside; what is inside counts for all of
    # it.
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def audio(
    stream: Mapping[str, Any], spec: Any, config: Any, rng: Rng, augment: bool
) -> Float[Array, 'B ...']:
    """Samples as floats, louder or softer, with noise; their log-mel where the model wants one.

    Args:
        stream: `data` int16 [B S].
        spec: `config.model.inputs.audio`.
        config: `config.augment`: `audio_noise`, a share of the clip's peak; `volume`, the most by
            which the factor of loudness differs from 1 (samples may then exceed 1); and
            `spec_augment`, masks of the log-mel.
        rng: of this stream.
        augment: False for none of them.

    Returns:
        float32 [B S] in [-1, 1], or log-mel [B T F] of it.
    """
    # 2^15, the magnitude of the lowest int16.
    x = stream['data'].astype(jnp.float32) / 32768
    # Configs of runs from before this field do not have it.
    volume = config.get('volume', 0.0)
    if augment and volume > 0:
        x = x * rng.at('volume').uniform((), 1 - volume, 1 + volume)[:, None]
    if augment and config['audio_noise'] > 0:
        # By the clip's own peak, so that quiet clips are not drowned.
        noise = rng.at('noise').normal(x.shape[1:]) * config['audio_noise']
        x = x + noise * jnp.abs(x).max(-1, keepdims=True)
    if not spec.get('mel'):
        return x
    y = spectrogram.log_mel(x, spec['rate'], spec['mel'])
    if augment and spec_augment.is_on(config):
        return spec_augment.spec_augment(y, config['spec_augment'], rng.at('spec_augment'))
    return y


def flow(
    stream: Mapping[str, Any], spec: Any, config: Any, rng: Rng, augment: bool
) -> Float[Array, 'B T H W C']:
    """The box cut out of every field of flow, resized, mirrored where `flip`.

    A mirrored clip moves the other way: its horizontal displacements change sign. Resizing does not
    change the values, as in public two-stream networks, which resize flow as if it were pictures:
    they are displacements of stored pixels whatever the crop, and stay within [-1, 1].

    Args:
        stream: `data` uint8 [B T H W 2], horizontal and vertical (optical_flow.py); `box` [B 4];
            `flip` [B].
        spec: `config.model.inputs.flow`.
        config: `config.augment`; nothing of it applies.
        rng: of this stream; nothing is drawn.
        augment: likewise.

    Returns:
        float32 [B T size size channels] in [-1, 1], of the bound. Channels behind the two are
        zeros.
    """
    data, size = stream['data'], spec['size']
    rows, columns = _crop_weights(stream, data.shape[2], data.shape[3], size)
    # JPEG may turn the smallest value, 1, into 0.
    x = jnp.maximum((data.astype(jnp.float32) - optical_flow.ZERO) / optical_flow.STEPS, -1)
    # h, w a row and a column of the field, i and j of the output.
    x = jnp.einsum('bih,bthwc,bjw->btijc', rows, x, columns)
    sign = jnp.where(stream['flip'][:, None], jnp.array([-1.0, 1.0]), 1.0)  # [B 2]
    x = x * sign[:, None, None, None]
    missing = spec['channels'] - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * 4 + ((0, missing),))


# Modality -> what its streams go through.
STAGES: dict[str, Callable[..., jax.Array]] = {'video': video, 'flow': flow, 'audio': audio}
