"""The device stage: what is left to do to a batch once its bytes are on the accelerator.

Pixels and samples cross the bus as uint8 and int16; crop, resize, flip, colour and noise happen here, in the same program as the
towers. Semantics after the official VATT loader ("VGG" style), with one crop and one resample instead of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.inputs import spectrogram
from vatt_jax.rng import Rng


def device_stage(
    batch: Mapping[str, Any], inputs, config, rng: Rng, *, augment: bool, dtype: str
) -> dict[str, Any]:
    """The batch with float streams: video [B T size size 3] in the model's own range, audio [B S] in [-1, 1] or as log-mel [B T F]; text as it was.

    inputs: `config.model.inputs`. config: `config.augment`. rng: already at its site. augment False: no jitter and no noise.
    Rows that are not valid come out as zeros.
    """
    out = dict(batch)
    for name, stream in batch.items():
        if not (isinstance(stream, Mapping) and 'data' in stream):
            continue
        modality = name.split('.')[0]
        if modality not in STAGES:
            continue
        data = STAGES[modality](stream, inputs[modality], config, rng.at(name), augment)
        valid = stream['valid'].reshape((-1,) + (1,) * (data.ndim - 1))
        kept = {k: v for k, v in stream.items() if k not in ('box', 'flip')}
        out[name] = {**kept, 'data': jnp.where(valid, data, 0).astype(dtype)}
    return out


def abstract(inputs, streams: tuple[str, ...], rows: int, dtype: str) -> dict[str, Any]:
    """The abstract device batch of a model's own inputs: what `device_stage` makes of `rows` examples with these streams."""
    out: dict[str, Any] = {
        k: jax.ShapeDtypeStruct((rows,), t)
        for k, t in (('index', 'int32'), ('position', 'uint32'), ('valid', bool))
    }
    for name in streams:
        modality = name.split('.')[0]
        spec = inputs[modality]
        shape, of = {
            'video': lambda: ((spec['frames'], spec['size'], spec['size'], 3), dtype),  # noqa: B023
            'audio': lambda: (
                spectrogram.shape(spec) if spec.get('mel') else (spec['samples'],),
                dtype,
            ),  # noqa: B023
            'text': lambda: ((spec['candidates'], spec['words']), 'int32'),
        }[modality]()  # noqa: B023
        out[name] = {
            'data': jax.ShapeDtypeStruct((rows, *shape), of),
            'valid': jax.ShapeDtypeStruct((rows,), bool),
        }
        if modality == 'text':
            out[name]['mask'] = jax.ShapeDtypeStruct((rows, spec['candidates']), bool)
    return out


def video(stream, spec, config, rng: Rng, augment: bool) -> jax.Array:
    """uint8 [B T H W 3], or planes [B T 3H/2 W], -> float32 [B T size size 3] in `range`: the box cut out, resized, mirrored where `flip`,
    jittered.

    Two batched matrix products do it all: rows, and columns and colour together (colour jitter is affine in a pixel's channels, and so is the
    conversion of planes; a colour plane of half the size is doubled by being resampled with weights of its own).
    """
    data, size, box = stream['data'], spec['size'], stream['box'].astype(jnp.float32)
    b, t = data.shape[:2]

    def weights(height: int, width: int) -> tuple[jax.Array, jax.Array]:
        columns = resample(box[:, 1], box[:, 3], width, size)
        return resample(box[:, 0], box[:, 2], height, size), jnp.where(
            stream['flip'][:, None, None], columns[:, ::-1], columns
        )

    def jitter(mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        if augment and config['color'] > 0:
            return color_jitter(mean, config, rng.at('color'))
        return jnp.broadcast_to(jnp.eye(3), (b, 3, 3)), jnp.zeros((b, 3))

    # The mean is taken over time, then over the resampled frame: the weights of each source row and column say how much it counts.
    if data.ndim == 5:
        height, width = data.shape[2:4]
        rows, columns = weights(height, width)
        x = data.astype(jnp.float32) * (2 / 255) - 1
        matrix, shift = jitter(
            jnp.einsum('bhwc,bh,bw->bc', x.mean(1), rows.mean(1), columns.mean(1))
        )
        mixed = jnp.einsum('bjw,bdc->bwcjd', columns, matrix).reshape(b, width * 3, size * 3)
        x = jnp.matmul(x.reshape(b, t * height, width * 3), mixed).reshape(b, t, height, size * 3)
        x = jnp.einsum('bih,bthk->btik', rows, x)
    else:
        height, width = data.shape[2] * 2 // 3, data.shape[3]
        x = data.astype(jnp.float32)
        chroma = x[:, :, height:].reshape(b, t, 2, height // 2, width // 2)
        planes, axes = (
            [x[:, :, :height], chroma[:, :, 0], chroma[:, :, 1]],
            [weights(height, width), *[weights(height // 2, width // 2)] * 2],
        )
        mean = jnp.stack(
            [
                jnp.einsum('bhw,bh,bw->b', p.mean(1), r.mean(1), c.mean(1))
                for p, (r, c) in zip(planes, axes)
            ],
            -1,
        )
        matrix, shift = jitter(mean @ _FROM_PLANES.T + _FROM_PLANES_SHIFT)
        matrix, shift = matrix @ _FROM_PLANES, matrix @ _FROM_PLANES_SHIFT + shift
        x = jnp.concatenate(
            [jnp.einsum('bih,bthw->btiw', r, p) for p, (r, _) in zip(planes, axes)], -1
        )
        mixed = jnp.concatenate(
            [jnp.einsum('bjw,bd->bwjd', c, matrix[..., i]) for i, (_, c) in enumerate(axes)], 1
        )
        x = jnp.matmul(
            x.reshape(b, t * size, 2 * width), mixed.reshape(b, 2 * width, size * 3)
        ).reshape(b, t, size, size * 3)
    # colours stay beside columns until the end: as a last axis of their own TPUs pad them from 3 to 128
    x = jnp.clip(x + jnp.tile(shift, size)[:, None, None], -1, 1).reshape(b, t, size, size, 3)
    wanted = tuple(spec.get('range', (-1.0, 1.0)))  # checkpoints older than this field: VATT's
    if len(wanted) != 2 or wanted[0] >= wanted[1]:
        raise ConfigError(
            f'config.model.inputs.video.range={wanted}: values of black and of white are wanted, such as (-1.0, 1.0) or (0.0, 1.0)'
        )
    low, high = wanted
    return x if wanted == (-1, 1) else (x + 1) * ((high - low) / 2) + low


# Y, U, V of 0 to 255 (ITU-R BT.601, Y from 16 to 235: what data_pipelines stores) -> R, G, B of -1 to 1.
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


def resample(low: jax.Array, high: jax.Array, length: int, size: int) -> jax.Array:
    """float32 [B size length]: weights that read `size` pixels linearly from the part low..high ([B], fractions) of `length` pixels.

    Pixel centres are half-integers; when shrinking, the triangle widens to the step, so nothing aliases. Rows sum to 1. The whole
    axis at its own size gives the identity.
    """
    step = (high - low) * length / size
    centre = low[:, None] * length + (jnp.arange(size) + 0.5) * step[:, None]
    reach = jnp.maximum(step, 1.0)[:, None, None]
    distance = jnp.abs(centre[:, :, None] - (jnp.arange(length) + 0.5))
    weight = jnp.maximum(0.0, 1.0 - distance / reach)
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-6)


def color_jitter(mean: jax.Array, config, rng: Rng) -> tuple[jax.Array, jax.Array]:
    """(matrix [B 3 3], shift [B 3]) of y = matrix · x + shift for pixels x in [-1, 1]: brightness, saturation, contrast, hue, one draw
    per clip, with probability `color` (else the identity).

    mean [B 3]: the clip's mean pixel, about which contrast turns. The official loader clips between the operations; here once, after.
    """
    draw = lambda site, low, high: rng.at(site).uniform((), low, high)[:, None, None]
    eye = jnp.eye(3)
    gray = jnp.broadcast_to(jnp.array([0.299, 0.587, 0.114]), (3, 3))
    saturation = draw('saturation', 1 - config['saturation'], 1 + config['saturation'])
    contrast = draw('contrast', 1 - config['contrast'], 1 + config['contrast'])
    matrix = gray + (eye - gray) * saturation
    bright = matrix @ (
        2 * draw('brightness', -config['brightness'], config['brightness']) * jnp.ones((3, 1))
    )
    centre = matrix @ mean[..., None] + bright
    matrix, shift = contrast * matrix, centre + contrast * (bright - centre)
    turn = _hue(draw('hue', -config['hue'], config['hue'])[:, 0, 0])
    matrix, shift = turn @ matrix, (turn @ shift)[..., 0]
    applied = draw('apply', 0.0, 1.0) < config['color']
    return jnp.where(applied, matrix, eye), jnp.where(applied[:, 0], shift, 0)


def _hue(turn: jax.Array) -> jax.Array:
    """float32 [B 3 3]: rotation of the colour plane (YIQ) by `turn` [B] of a full circle; luma is kept."""
    to_yiq = jnp.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    c, s = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    zero, one = jnp.zeros_like(c), jnp.ones_like(c)
    turn = jnp.stack(
        [
            jnp.stack([one, zero, zero], -1),
            jnp.stack([zero, c, -s], -1),
            jnp.stack([zero, s, c], -1),
        ],
        -2,
    )
    return jnp.linalg.inv(to_yiq) @ turn @ to_yiq


def audio(stream, spec, config, rng: Rng, augment: bool) -> jax.Array:
    """int16 [B S] -> float32 [B S] in [-1, 1], with gaussian noise of `audio_noise` times the clip's peak, louder or softer by up to a share
    `volume` (and then perhaps beyond 1); its log-mel [B T F] where the model's inputs ask for one (after both)."""
    x = stream['data'].astype(jnp.float32) / 32768
    volume = config.get('volume', 0.0)  # runs from before it was there do not have it
    if augment and volume > 0:
        x = x * rng.at('volume').uniform((), 1 - volume, 1 + volume)[:, None]
    if augment and config['audio_noise'] > 0:
        x = x + rng.at('noise').normal(x.shape[1:]) * config['audio_noise'] * jnp.abs(x).max(
            -1, keepdims=True
        )
    return spectrogram.log_mel(x, spec['rate'], spec['mel']) if spec.get('mel') else x


STAGES = {'video': video, 'audio': audio}
