"""Clips and pictures as libraries hand them over, made into what a model reads.

OpenCV, PIL, torch and decoders disagree about axes, types and ranges. What has one meaning
is taken; what has two is refused with the calls that say which is meant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from vatt_jax.config import ConfigError

FILES = (str, bytes, os.PathLike)
# Of grey, RGB and RGBA pictures.
CHANNELS = (1, 3, 4)
# Floats up to here are taken for [0, 1]: resizing overshoots.
PIXEL_OVERSHOOT = 0.1
LONGEST_PATH = 4096

# (key, message): says something to the user, once for each key.
Tell = Callable[[str, str], None]


def as_array(value: Any, where: str) -> np.ndarray:
    """The numbers of an array of NumPy, JAX, TensorFlow, torch or decord, or of nested lists.

    Args:
        value: the array.
        where: of the call and argument, for messages.

    Raises:
        ConfigError: it is no array of numbers.
    """
    if np.ma.is_masked(value):
        # Under a mask lies whatever was there; NumPy would hand it over.
        raise ConfigError(
            f'{where}: expected an array without masked values, got {np.ma.count_masked(value)} of '
            f'{np.size(value)}; pass x.filled(…) with what stands for them'
        )
    if isinstance(value, jax.core.Tracer):
        raise ConfigError(
            f'{where}: expected an array with values, got one that JAX traces; call it outside of '
            'jax.jit, jax.grad and jax.vmap'
        )
    try:
        if hasattr(value, 'detach'):
            # A torch tensor may need gradients or lie on a device, and NumPy knows no bfloat16.
            value = value.detach().cpu()
            if 'bfloat16' in str(value.dtype):
                value = value.float()
        elif hasattr(value, 'asnumpy'):
            value = value.asnumpy()
        x = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split('\n')[0]
        advice = '; items of several shapes go in as a list of arrays' if is_list(value) else ''
        raise ConfigError(
            f'{where}: expected an array, got {type(value).__name__} ({reason}){advice}'
        ) from error
    if x.dtype.name == 'bfloat16':
        return x.astype(np.float32)
    if x.dtype.kind == 'O':
        raise ConfigError(
            f'{where}: expected an array or a list of them, got {type(value).__name__}'
        )
    if x.dtype.kind not in 'iuf':
        raise ConfigError(f'{where}: expected an array of numbers, got {shape_of(x)}')
    # Files of other machines bring the other order of bytes.
    return x.astype(x.dtype.newbyteorder('='), copy=False)


def shape_of(x: np.ndarray) -> str:
    """The type and shape of an array, for messages."""
    return f'{x.dtype} {list(x.shape)}'


def is_number(value: Any) -> bool:
    """Whether a value is one number."""
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in 'iuf'


def is_list(value: Any) -> bool:
    """Whether a value is a sequence of items, and no text, path or array."""
    return isinstance(value, Sequence) and not isinstance(value, FILES)


def iterated(value: Any, where: str) -> Any:
    """A list of what an iterator yields; anything else as it is.

    Raises:
        ConfigError: it is an open file, or the content of one.
    """
    is_open_file = hasattr(value, 'read') and hasattr(value, 'seek')
    is_content = isinstance(value, bytes) and (b'\0' in value or len(value) > LONGEST_PATH)
    # PIL's pictures can be read from as well.
    if (is_open_file and not _is_pil(value)) or is_content:
        raise ConfigError(
            f'{where}: expected a path or an array, got {type(value).__name__} with the content '
            'of a file; pass its path'
        )
    if isinstance(value, memoryview):
        # A sequence to Python, but of several axes none that can be indexed.
        return np.asarray(value)
    return list(value) if hasattr(value, '__next__') else value


# ---- Pictures and clips.


def _is_pil(value: Any) -> bool:
    return hasattr(value, 'getbands') and hasattr(value, 'convert')


def _is_decoded_frame(value: Any) -> bool:
    """Whether a value is a frame of PyAV."""
    return hasattr(value, 'pict_type') and hasattr(value, 'to_ndarray')


def _is_one_picture(value: Any) -> bool:
    if _is_pil(value) or _is_decoded_frame(value):
        return True
    if isinstance(value, FILES) or is_list(value):
        return False
    shape = np.shape(value)
    if len(shape) == 2:
        return True
    return len(shape) == 3 and (shape[-1] in CHANNELS or shape[0] == 3)


def list_videos(value: Any, where: str) -> tuple[list[Any], bool]:
    """The clips of an argument: (clips, whether a single one was given).

    Pictures in a list are the frames of one clip.
    """
    value = iterated(value, where)
    if isinstance(value, FILES) or _is_pil(value) or _is_decoded_frame(value):
        return [value], True
    if is_list(value):
        clips = list(value)
        if clips and all(_is_one_picture(clip) for clip in clips):
            return [clips], True
        return clips, False
    x = unless_strings(value, where)
    if isinstance(x, list):
        return x, False
    if x.ndim <= 4:
        return [x], True
    return list(x), False


def list_images(value: Any, where: str) -> tuple[list[Any], bool]:
    """The pictures of an argument: (pictures, whether a single one was given)."""
    value = iterated(value, where)
    if isinstance(value, FILES) or _is_pil(value) or _is_decoded_frame(value):
        return [value], True
    if is_list(value):
        return list(value), False
    x = unless_strings(value, where)
    if isinstance(x, list):
        return x, False
    if x.ndim <= 2 or (x.ndim == 3 and x.shape[-1] in CHANNELS):
        return [x], True
    if x.ndim == 3 and x.shape[0] in CHANNELS:
        raise ConfigError(
            f'{where}: {shape_of(x)} may be one picture [C H W] or {x.shape[0]} grey ones [B H W]; '
            'pass np.moveaxis(x, 0, -1) or x[..., None]'
        )
    return list(x), False


def unless_strings(value: Any, where: str) -> np.ndarray | list[Any]:
    """An array of numbers, or the strings of an array of them."""
    is_numpy = isinstance(value, np.ndarray) or hasattr(value, 'to_numpy')
    if is_numpy and np.asarray(value).dtype.kind in 'OUS':
        return list(np.asarray(value).ravel())
    return as_array(value, where)


def picture(value: Any, where: str) -> Shaped[np.ndarray, 'H W C']:
    """One picture with its channels last, in the type it came in.

    Raises:
        ConfigError: it is no picture.
    """
    if _is_pil(value):
        return _pil_pixels(value, where)
    if _is_decoded_frame(value):
        return value.to_ndarray(format='rgb24')
    x = as_array(value, where)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim == 3 and x.shape[-1] not in CHANNELS and x.shape[0] == 3:
        x = np.moveaxis(x, 0, -1)
    if x.ndim != 3 or x.shape[-1] not in CHANNELS or 0 in x.shape:
        raise ConfigError(
            f'{where}: expected a picture [H W 3] (RGB), [H W 4] or [H W], got {shape_of(x)}'
        )
    return x


def _pil_pixels(image: Any, where: str) -> UInt8[np.ndarray, 'H W 3']:
    from PIL import ImageOps

    if image.mode.startswith(('I', 'F')):
        raise ConfigError(
            f'{where}: expected pixels of 8 bits, got a picture of mode {image.mode!r}; scale it '
            'to 0…255 first'
        )
    # Cameras store the sensor's orientation and note the rotation in EXIF.
    return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))


def frames(value: Any, where: str) -> Shaped[np.ndarray, 'T H W C']:
    """The frames of one clip with their channels last, in the type they came in.

    Frames of a list are resized to the shape of the first one.

    Args:
        value: [T H W C], [T H W] (grey), [T 3 H W], one picture, or a list of pictures.
        where: of the call and argument, for messages.

    Raises:
        ConfigError: it is no clip, or may be one in two ways.
    """
    if is_list(value):
        if not value:
            raise ConfigError(f'{where}: a clip has no frames; leave it out')
        return _frames_of_list([picture(item, where) for item in value], where)
    if _is_pil(value) or _is_decoded_frame(value):
        return picture(value, where)[None]
    x = as_array(value, where)
    if x.ndim == 2:
        x = x[None, ..., None]
    elif x.ndim == 3 and x.shape[-1] in CHANNELS:
        x = x[None]
    elif x.ndim == 3 and x.shape[0] in CHANNELS:
        raise ConfigError(
            f'{where}: {shape_of(x)} may be one picture [C H W] or {x.shape[0]} grey frames '
            '[T H W]; pass np.moveaxis(x, 0, -1) or x[..., None]'
        )
    elif x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[-1] not in CHANNELS and x.shape[1] == 3:
        x = np.moveaxis(x, 1, -1)
    if x.ndim != 4 or x.shape[-1] not in CHANNELS or 0 in x.shape:
        raise ConfigError(
            f'{where}: expected frames [T H W 3] (RGB), [T H W 4], [T H W] or [T 3 H W], '
            f'got {shape_of(x)}{_advice(x)}'
        )
    return x


def _frames_of_list(pictures: list[np.ndarray], where: str) -> UInt8[np.ndarray, 'T H W 3']:
    scales = {}
    for dtype in {x.dtype for x in pictures}:
        # Of all frames together: a black one alone tells nothing.
        scales[dtype] = pixel_scale([x for x in pictures if x.dtype == dtype], where)
    height, width = pictures[0].shape[:2]
    clip = []
    for x in pictures:
        clip.append(resized(to_uint8(x, scales[x.dtype]), height, width))
    return np.stack(clip)


def _advice(x: np.ndarray) -> str:
    if x.ndim != 4 or 0 in x.shape:
        return ''
    if x.shape[0] in CHANNELS and x.shape[1] in CHANNELS:
        return (
            '; np.moveaxis(x, 0, -1) puts the channels of [C T H W] last, np.moveaxis(x, 1, -1) '
            'those of [T C H W]'
        )
    if x.shape[1] in CHANNELS:
        return '; np.moveaxis(x, 1, -1) puts channels last, a list of clips holds several'
    if x.shape[0] in CHANNELS:
        return '; np.moveaxis(x, 0, -1) puts channels last, a list of clips holds several'
    return ''


def to_uint8(x: Shaped[np.ndarray, '... H W C'], scale: float) -> UInt8[np.ndarray, '... H W 3']:
    """RGB of 0…255. Grey is repeated, transparency is left out.

    Args:
        x: pixels with channels last.
        scale: what they are multiplied by, see `pixel_scale`.
    """
    if x.shape[-1] == 1:
        x = np.repeat(x, 3, axis=-1)
    x = x[..., :3]
    if x.dtype != np.uint8:
        # float16 reaches 255 in steps of 1/8: the product is made in float32.
        x = np.clip(np.round(x.astype(np.float32) * scale), 0, 255).astype(np.uint8)
    # Reversed channels (OpenCV) are a view with negative strides.
    return np.ascontiguousarray(x)


def pixel_scale(pictures: Sequence[np.ndarray], where: str) -> float:
    """What pixels of one type are multiplied by to run from 0 to 255.

    Raises:
        ConfigError: they run neither from 0 to 1 nor from 0 to 255.
    """
    first = pictures[0]
    if first.dtype == np.uint8:
        return 1.0
    low = min(float(x.min()) for x in pictures)
    high = max(float(x.max()) for x in pictures)
    found = f'got {shape_of(first)} with values {low:g} to {high:g}'
    if first.dtype.kind in 'iu':
        if first.dtype == np.uint16 or low < 0 or high > 255:
            raise ConfigError(
                f'{where}: expected uint8 frames of 0…255, {found}; pass (x >> 8).astype(np.uint8) '
                'of pixels of 16 bits, x.astype(np.uint8) of pixels of 8 bits'
            )
        return 1.0
    if not np.isfinite(low) or not np.isfinite(high):
        raise ConfigError(f'{where}: expected finite floats in [0, 1], {found}')
    if low >= -PIXEL_OVERSHOOT and high <= 1 + PIXEL_OVERSHOOT:
        return 255.0
    # Standardised pixels reach a few units to both sides of 0; between 1 and 16 nothing is sure.
    if low >= -255 * PIXEL_OVERSHOOT and 16 <= high <= 255 * (1 + PIXEL_OVERSHOOT):
        return 1.0
    raise ConfigError(
        f'{where}: expected floats in [0, 1] or 0…255, {found}; undo a normalisation first: '
        '(x + 1) / 2 of [-1, 1], x * std + mean of standardised pixels'
    )


def resized(
    frame: UInt8[np.ndarray, 'H W 3'], height: int, width: int
) -> UInt8[np.ndarray, '{height} {width} 3']:
    """A frame at another size.

    Along an axis that shrinks, whole blocks of pixels are averaged, so that nothing aliases.
    """
    for axis, side in enumerate((height, width)):
        n = frame.shape[axis]
        if n < side:
            nearest = ((np.arange(side) + 0.5) * n / side).astype(int)
            frame = np.take(frame, np.minimum(nearest, n - 1), axis)
    if frame.shape[:2] == (height, width):
        return frame
    row_edges = np.linspace(0, frame.shape[0], height + 1).astype(int)
    column_edges = np.linspace(0, frame.shape[1], width + 1).astype(int)
    by_rows = np.add.reduceat(frame.astype(np.float32), row_edges[:-1], 0)
    sums = np.add.reduceat(by_rows, column_edges[:-1], 1)
    area = np.diff(row_edges)[:, None, None] * np.diff(column_edges)[None, :, None]
    return np.round(sums / area).astype(np.uint8)


def central_square(
    frame: UInt8[np.ndarray, 'H W 3'], side: int
) -> UInt8[np.ndarray, '{side} {side} 3']:
    """The central square of a frame at `side` pixels."""
    height, width = frame.shape[:2]
    n = min(height, width)
    top, left = (height - n) // 2, (width - n) // 2
    return resized(frame[top : top + n, left : left + n], side, side)


def short_side_square(
    frame: UInt8[np.ndarray, 'H W 3'], side: int
) -> UInt8[np.ndarray, '{side} {side} 3']:
    """The short side resized to `side` by Pillow's bicubic, then the square in the middle.

    As CLIP's pictures are published (torchvision's Resize and CenterCrop).
    """
    from PIL import Image

    height, width = frame.shape[:2]
    short = min(height, width)
    # Cut, not rounded.
    new_height, new_width = int(side * height / short), int(side * width / short)
    picture = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = round((new_height - side) / 2), round((new_width - side) / 2)
    return np.asarray(picture)[top : top + side, left : left + side]


# ---- Windows.


def window_begins(
    length: int, window: int, rate: float, windows: int | None, stride: float | None
) -> list[int]:
    """Where windows begin in something of `length` frames or samples.

    Args:
        length: of the whole.
        window: of each.
        rate: frames or samples per second.
        windows: that many, evenly from the first to the last; 1: the middle one; None: the middle
            one, or with `stride` all.
        stride: seconds from one to the next, from the beginning on; the last ones lie whole within
            the length. None: as `windows` says.
    """
    last = max(length - window, 0)
    if stride is not None:
        # A stride shorter than a frame begins at each of them once.
        step = max(stride * rate, 1.0)
        count = int(last / step + 1e-6) + 1
        if windows is not None:
            count = min(count, windows)
        return [min(round(i * step), last) for i in range(count)]
    if windows is None or windows == 1:
        return [last // 2]
    return [round(begin) for begin in np.linspace(0, last, windows).tolist()]


def fill_window(x: np.ndarray, length: int) -> np.ndarray:
    """The first `length` of the first axis; what is shorter repeats."""
    if len(x) >= length:
        return x[:length]
    return x[np.arange(length) % len(x)]
