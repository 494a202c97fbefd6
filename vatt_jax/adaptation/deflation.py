"""Image networks out of video networks (MMV).

The time axis is taken out of the kernels, and then the batch norms are fitted anew. A deflated
model is the same model whose clips have one frame: heads, common spaces, evaluators and
embed(image=…) work as before. On a clip of equal frames it would compute what the video network
does, were it not for the zeros that the latter sees before the first and after the last frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Integer
from ml_collections import ConfigDict

from vatt_jax import models
from vatt_jax.config import ConfigError, with_defaults
from vatt_jax.inference.feature_extractor import place_on_mesh
from vatt_jax.inputs import preprocess
from vatt_jax.models.multimodal import TOWERS
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng

TOWER = 'nets_video'
DEFLATABLE = ('s3d', 'tsm_resnet')
# Scales and offsets of the tower's batch norms: all that the fit changes.
FITTED = re.compile(rf'^{TOWER}/(.*/)?norm[^/]*/(scale|bias)$')


def still_config(config: ConfigDict) -> ConfigDict:
    """The config of the deflated model.

    Args:
        config: of the video network.

    Raises:
        ConfigError: the tower cannot be deflated.
    """
    tower = _video_tower(config)
    # A deep copy: the video network's config is still needed.
    still = config.copy_and_resolve_references()
    if tower['name'] == 's3d':
        still.model.towers.video.still = True
    else:
        # No channel is shifted: what the shift did is in the kernels (`naive`).
        still.model.towers.video.share = 0.0
    still.model.inputs.video.frames = 1
    still.name = f'{config.name} deflated'
    # The new folder holds a finished model: nothing is to be started from or reported when it is
    # opened.
    still.init_from = still.base = ''
    still.report = False
    return still


def _video_tower(config: ConfigDict) -> ConfigDict:
    """The video tower's fields, defaults included. Raises ConfigError where it has no time axis."""
    towers = config.model.towers
    name = towers.video.name if 'video' in towers else 'none'
    if name not in DEFLATABLE:
        raise ConfigError(
            f'config.model.towers.video.name={name!r}: {" and ".join(DEFLATABLE)} can be deflated'
        )
    tower = with_defaults(towers.video, TOWERS[name][1], 'config.model.towers.video')
    frames = config.model.inputs.video.frames
    if frames == 1 or tower.get('still'):
        raise ConfigError(
            f'config.model.inputs.video.frames={frames}: this model is one for images already'
        )
    return tower


def naive(config: ConfigDict, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the deflated model before any fit (n-def).

    Kernels are summed over time. Where channels are shifted in time instead (TSM), what is left
    on equal frames is their exchange; it is written into the kernel that reads them, so that a
    plain ResNet is left.

    Args:
        config: of the video network.
        params: its parameters.
    """
    tower = _video_tower(config)
    flat = dict(flatten_dict(dict(params), sep='/'))
    for name, kernel in flat.items():
        if not name.startswith(f'{TOWER}/') or not name.endswith('/kernel'):
            continue
        # [t h w C D]; kernels of fewer axes (gates) have no time.
        if tower['name'] == 's3d' and np.ndim(kernel) == 5:
            reads_blocks = tower['space_to_depth'] and '/conv_1a/' in name
            flat[name] = _sum_over_time(kernel, reads_blocks)
        elif tower['name'] == 'tsm_resnet' and name.endswith('/conv_0/kernel'):
            # The first convolution of each block is the one that reads shifted channels.
            channels = exchanged(kernel.shape[2], tower['share'])
            flat[name] = np.asarray(kernel)[:, :, channels]  # [h w C D]
    return unflatten_dict(flat, sep='/')


def _sum_over_time(
    kernel: Float[Array | np.ndarray, 't h w C D'], reads_blocks: bool
) -> Float[np.ndarray, '1 h w c D']:
    """A kernel for equal frames. reads_blocks: its channels are those of blocks of pixels."""
    # On equal frames x: sum over t of K_t x = (sum over t of K_t) x. In float64, since the terms
    # often cancel.
    summed = np.asarray(kernel, np.float64).sum(0, keepdims=True)
    if reads_blocks:
        # Channels of a block are (frame of two, row, column, colour): both frames are one.
        height, width, out_channels = summed.shape[1], summed.shape[2], summed.shape[-1]
        by_frame = summed.reshape(1, height, width, 2, -1, out_channels)
        # Axis 3 is the frame of the two within a block.
        summed = by_frame.sum(3)
    return summed.astype(np.float32)


def exchanged(width: int, share: float) -> Integer[np.ndarray, ' C']:
    """Channel numbers as TSM's shift leaves them on equal frames. Its own inverse.

    The last ones come first and the first ones last.

    Args:
        width: number of channels (C).
        share: of the channels that is shifted in each direction.
    """
    # Rounded down, as the tower does it.
    num_shifted = int(width * share)
    channels = np.arange(width)
    first = channels[:num_shifted]
    middle = channels[num_shifted : width - num_shifted]
    last = channels[width - num_shifted :]
    # On equal frames a shift in time changes no values, it only lets both groups change places.
    return np.concatenate([last, middle, first])


def ignore_loss(step: int, loss: float) -> None:
    """A `report` that says nothing."""


def refit(
    config: ConfigDict,
    variables: Mapping[str, Any],
    still: ConfigDict,
    params: Mapping[str, Any],
    pictures: Iterator[Mapping[str, Any]],
    steps: int,
    rate: float,
    mesh: Any,
    report: Callable[[int, float], None] = ignore_loss,
) -> tuple[dict[str, Any], list[float]]:
    """Fits the batch norms' scales and offsets of the deflated model (def); all else stays.

    The loss is the mean absolute difference between its pooled vector of a picture and the video
    network's of the clip that shows nothing else, both with running statistics.

    Args:
        config: of the video network.
        variables: 'params' and 'batch_stats' of the video network.
        still: config of the deflated model.
        params: of the deflated model.
        pictures: host batches with `video` [B 1 H W 3].
        steps: of Adam.
        rate: of Adam, falling to 0 as half a cosine.
        mesh: the batch is spread over it.
        report: called with the number and the loss of each step.

    Returns:
        Parameters of the deflated model, and the loss of each step.
    """
    teacher = models.build(config.model, config.compute_dtype)
    student = models.build(still.model, still.compute_dtype)
    num_frames = config.model.inputs.video.frames
    input_spec = still.model.inputs.video.to_dict()
    flat = flatten_dict(dict(params), sep='/')
    # Two flat dicts, so that gradients and slots exist for the fitted parameters alone.
    fitted = {name: jnp.asarray(x) for name, x in flat.items() if FITTED.match(name)}
    fixed = {name: x for name, x in flat.items() if name not in fitted}
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(
        fitted: Any, slots: Any, variables: Any, fixed: Any, batch: dict[str, Any]
    ) -> tuple[Any, Any, Array]:
        rng = Rng.create(0, 0, batch['position'])
        # No augmentation: teacher and student see the same pixels.
        frame = preprocess.video(batch['video'], input_spec, config.augment, rng, False)
        frame = frame.astype(config.compute_dtype)  # [B 1 H W 3]
        # The picture for as long as the video network's clips are [B T H W 3].
        clip = jnp.broadcast_to(frame, (len(frame), num_frames, *frame.shape[2:]))
        # Outside of `loss`, so no gradient is taken through the teacher.
        target = _pooled(teacher, variables, clip, rng)  # [B D]
        is_valid = batch['video']['valid']  # [B]

        def loss(fitted: Any) -> Array:
            student_variables = {
                'params': unflatten_dict({**fixed, **fitted}, sep='/'),
                # The video network's: both towers have the same batch norms.
                'batch_stats': variables['batch_stats'],
            }
            output = _pooled(student, student_variables, frame, rng)  # [B D]
            # MMV's L1 between the two embeddings.
            distance = jnp.abs(output - target).mean(-1)  # [B]
            return jnp.where(is_valid, distance, 0).sum() / jnp.maximum(is_valid.sum(), 1)

        value, grads = jax.value_and_grad(loss)(fitted)
        updates, slots = tx.update(grads, slots, fitted)
        return optax.apply_updates(fitted, updates), slots, value

    losses = []
    with jax.set_mesh(mesh):
        replicated = sharding.replicated(mesh)
        fitted = jax.device_put(fitted, replicated)
        # As arguments of the step rather than closed over, or they would be constants of the
        # program.
        variables = jax.device_put(dict(variables), replicated)
        fixed = jax.device_put(fixed, replicated)
        slots = jax.jit(tx.init, out_shardings=replicated)(fitted)
        for number in range(1, steps + 1):
            batch = place_on_mesh(_video_only(next(pictures)), mesh)
            fitted, slots, value = step(fitted, slots, variables, fixed, batch)
            losses.append(float(value))
            report(number, losses[-1])
    for name, x in jax.device_get(fitted).items():
        flat[name] = np.asarray(x)
    return unflatten_dict(flat, sep='/'), losses


def _pooled(
    model: nn.Module, variables: Any, clip: Float[Array, 'B T H W C'], rng: Rng
) -> Float[Array, 'B D']:
    """The video tower's pooled vector, with running statistics."""
    encoded: Any = model.apply(
        variables, 'video', {'data': clip}, train=False, rng=rng, method='encode'
    )
    # The difference of two nearly equal bfloat16 vectors would be mostly rounding.
    return encoded.pooled.astype(jnp.float32)


def _video_only(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the fit reads of a host batch: one picture an example, whatever else is loaded."""
    video = {name: batch['video'][name] for name in ('data', 'valid', 'box', 'flip')}
    return {'video': video, 'position': batch['position']}
