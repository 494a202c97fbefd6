"""The device stage: what is left to do to a batch once its bytes are on the accelerator.

Pixels and samples cross the bus as uint8 and int16; crop, resize, flip, colour and noise happen here, in the same program as the
towers. Semantics after the official VATT loader ("VGG" style), with one crop and one resample instead of two.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vatt_jax import spectrogram
from vatt_jax.config import ConfigError
from vatt_jax.rng import Rng


def device_stage(batch: Mapping[str, Any], inputs, config, rng: Rng, *, augment: bool, dtype: str) -> dict[str, Any]:
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
    out: dict[str, Any] = {k: jax.ShapeDtypeStruct((rows,), t) for k, t in (('index', 'int32'), ('position', 'uint32'), ('valid', bool))}
    for name in streams:
        modality = name.split('.')[0]
        spec = inputs[modality]
        shape, of = {'video': lambda: ((spec['frames'], spec['size'], spec['size'], 3), dtype),  # noqa: B023
                     'audio': lambda: (spectrogram.shape(spec) if spec.get('mel') else (spec['samples'],), dtype),  # noqa: B023
                     'text': lambda: ((spec['candidates'], spec['words']), 'int32')}[modality]()  # noqa: B023
        out[name] = {'data': jax.ShapeDtypeStruct((rows, *shape), of), 'valid': jax.ShapeDtypeStruct((rows,), bool)}
        if modality == 'text':
            out[name]['mask'] = jax.ShapeDtypeStruct((rows, spec['candidates']), bool)
    return out


def video(stream, spec, config, rng: Rng, augment: bool) -> jax.Array:
    """uint8 [B T H W 3] -> float32 [B T size size 3] in `range`: the box cut out, resized, mirrored where `flip`, jittered.

    Two batched matrix products do it all: rows, then columns and colour together (colour jitter is affine in a pixel's channels).
    """
    size, (b, t, height, width, c) = spec['size'], stream['data'].shape
    box = stream['box'].astype(jnp.float32)
    rows = resample(box[:, 0], box[:, 2], height, size)
    columns = resample(box[:, 1], box[:, 3], width, size)
    columns = jnp.where(stream['flip'][:, None, None], columns[:, ::-1], columns)
    x = stream['data'].astype(jnp.float32) * (2 / 255) - 1
    if not augment or config['color'] <= 0:
        matrix, shift = jnp.broadcast_to(jnp.eye(c), (b, c, c)), jnp.zeros((b, c))
    else:
        # mean over time, then over the resampled frame: the weights of each source row and column say how much it counts
        mean = jnp.einsum('bhwc,bh,bw->bc', x.mean(1), rows.mean(1), columns.mean(1))
        matrix, shift = color_jitter(mean, config, rng.at('color'))
    mixed = jnp.einsum('bjw,bdc->bwcjd', columns, matrix).reshape(b, width * c, size * c)
    x = jnp.matmul(x.reshape(b, t * height, width * c), mixed).reshape(b, t, height, size * c)
    x = jnp.einsum('bih,bthk->btik', rows, x).reshape(b, t, size, size, c)
    x = jnp.clip(x + shift[:, None, None, None], -1, 1)
    wanted = tuple(spec.get('range', (-1.0, 1.0)))  # checkpoints older than this field: VATT's
    if len(wanted) != 2 or wanted[0] >= wanted[1]:
        raise ConfigError(f'config.model.inputs.video.range={wanted}: values of black and of white are wanted, such as (-1.0, 1.0) or (0.0, 1.0)')
    low, high = wanted
    return x if wanted == (-1, 1) else (x + 1) * ((high - low) / 2) + low


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
    bright = matrix @ (2 * draw('brightness', -config['brightness'], config['brightness']) * jnp.ones((3, 1)))
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
    turn = jnp.stack([jnp.stack([one, zero, zero], -1), jnp.stack([zero, c, -s], -1), jnp.stack([zero, s, c], -1)], -2)
    return jnp.linalg.inv(to_yiq) @ turn @ to_yiq


def audio(stream, spec, config, rng: Rng, augment: bool) -> jax.Array:
    """int16 [B S] -> float32 [B S] in [-1, 1], with gaussian noise of `audio_noise` times the clip's peak; its log-mel [B T F] where the
    model's inputs ask for one (after the noise)."""
    x = stream['data'].astype(jnp.float32) / 32768
    if augment and config['audio_noise'] > 0:
        x = x + rng.at('noise').normal(x.shape[1:]) * config['audio_noise'] * jnp.abs(x).max(-1, keepdims=True)
    return spectrogram.log_mel(x, spec['rate'], spec['mel']) if spec.get('mel') else x


STAGES = {'video': video, 'audio': audio}
