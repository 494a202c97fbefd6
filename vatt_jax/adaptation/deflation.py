"""Image networks out of video networks (MMV, section 3.2): the time axis is taken out of the kernels, and then the batch norms are fitted anew.

A deflated model is the same model whose clips have one frame: heads, common spaces, evaluators and embed(image=…) work as before. On a clip of
equal frames it would compute what the video network does, were it not for the zeros that the latter sees before the first and after the last frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vatt_jax import models
from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.inference.encoder import place
from vatt_jax.inputs import preprocess
from vatt_jax.models.multimodal import TOWERS
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

TOWER = 'nets_video'
FITTED = re.compile(rf'^{TOWER}/(.*/)?norm[^/]*/(scale|bias)$')


def still_config(config: ConfigDict) -> ConfigDict:
    """The config of the deflated model. Raises ConfigError for a tower that cannot be deflated."""
    out = config.copy_and_resolve_references()
    t = _tower(config)
    if t['name'] == 's3d':
        out.model.towers.video.still = True
    else:
        out.model.towers.video.share = 0.0
    out.model.inputs.video.frames = 1
    out.name = f'{config.name} deflated'
    out.init_from, out.report = '', False
    return out


def _tower(config) -> ConfigDict:
    if 'video' not in config.model.towers or config.model.towers.video.name not in (
        's3d',
        'tsm_resnet',
    ):
        has = config.model.towers.video.name if 'video' in config.model.towers else 'none'
        raise ConfigError(
            f'config.model.towers.video.name={has!r}: s3d and tsm_resnet can be deflated'
        )
    t = with_defaults(
        config.model.towers.video,
        TOWERS[config.model.towers.video.name][1],
        'config.model.towers.video',
    )
    if config.model.inputs.video.frames == 1 or t.get('still'):
        raise ConfigError(
            f'config.model.inputs.video.frames={config.model.inputs.video.frames}: this model is one for images already'
        )
    return t


def naive(config, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the deflated model (n-def): kernels summed over time; where channels are shifted in time, their exchange without the shift,
    written into the kernel that reads them, so that a plain ResNet is left."""
    t = _tower(config)
    flat = dict(flatten_dict(dict(params), sep='/'))
    for name, x in flat.items():
        if not name.startswith(f'{TOWER}/') or not name.endswith('/kernel'):
            continue
        if t['name'] == 's3d' and np.ndim(x) == 5:
            x = np.asarray(x, np.float64).sum(0, keepdims=True)
            if (
                t['space_to_depth'] and '/conv_1a/' in name
            ):  # channels (frame of two, row, column, colour): both frames are one
                x = x.reshape(*x.shape[:3], 2, -1, x.shape[-1]).sum(3)
            flat[name] = x.astype(np.float32)
        elif t['name'] == 'tsm_resnet' and name.endswith('/conv_0/kernel'):
            flat[name] = np.asarray(x)[:, :, exchanged(x.shape[2], t['share'])]
    return unflatten_dict(flat, sep='/')


def exchanged(width: int, share: float) -> np.ndarray:
    """Channel numbers as TSM's shift leaves them on equal frames: the last ones first, the first ones last. Its own inverse."""
    fold, order = int(width * share), np.arange(width)
    return np.concatenate([order[width - fold :], order[fold : width - fold], order[:fold]])


def refit(
    config,
    variables: Mapping[str, Any],
    still: ConfigDict,
    params: Mapping[str, Any],
    pictures: Iterator[Mapping[str, Any]],
    steps: int,
    rate: float,
    mesh,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[dict[str, Any], list[float]]:
    """(parameters, loss of each step) of the deflated model (def) after its batch norms' scales and offsets were fitted; all else stays.

    The loss is the mean absolute difference between its pooled vector of a picture and the video network's of the clip that shows nothing else, both
    with running statistics. config, variables: of the video network. still, params: of the deflated one. pictures: host batches with `video`
    [B 1 H W 3]. rate: of Adam, falling to 0 as half a cosine. mesh: the batch is spread over it.
    """
    teacher, student = (models.build(c.model, c.compute_dtype) for c in (config, still))
    frames, spec = config.model.inputs.video.frames, still.model.inputs.video.to_dict()
    flat = flatten_dict(dict(params), sep='/')
    fitted = {k: jnp.asarray(v) for k, v in flat.items() if FITTED.match(k)}
    rest = {k: v for k, v in flat.items() if k not in fitted}
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    encode = lambda model, v, x, rng: model.apply(
        v, 'video', {'data': x}, train=False, rng=rng, method='encode'
    ).pooled.astype(jnp.float32)

    @jax.jit
    def step(fitted, slots, variables, rest, batch):
        rng = Rng.create(0, 0, batch['position'])
        x = preprocess.video(batch['video'], spec, config.augment, rng, False).astype(
            config.compute_dtype
        )
        target = encode(
            teacher, variables, jnp.broadcast_to(x, (len(x), frames, *x.shape[2:])), rng
        )
        valid = batch['video']['valid']

        def loss(fitted):
            own = {
                'params': unflatten_dict({**rest, **fitted}, sep='/'),
                'batch_stats': variables['batch_stats'],
            }
            away = jnp.abs(encode(student, own, x, rng) - target).mean(-1)
            return jnp.where(valid, away, 0).sum() / jnp.maximum(valid.sum(), 1)

        value, slope = jax.value_and_grad(loss)(fitted)
        change, slots = tx.update(slope, slots, fitted)
        return optax.apply_updates(fitted, change), slots, value

    losses = []
    with jax.set_mesh(mesh):
        one = sharding.replicated(mesh)
        fitted, variables, rest = (jax.device_put(x, one) for x in (fitted, dict(variables), rest))
        slots = jax.jit(tx.init, out_shardings=one)(fitted)
        for number in range(steps):
            batch = next(pictures)
            batch = {
                'video': {k: batch['video'][k] for k in ('data', 'valid', 'box', 'flip')},
                'position': batch['position'],
            }
            fitted, slots, value = step(fitted, slots, variables, rest, place(batch, mesh))
            losses.append(float(value))
            told(number + 1, losses[-1])
    return unflatten_dict(
        {**flat, **{k: np.asarray(v) for k, v in jax.device_get(fitted).items()}}, sep='/'
    ), losses
