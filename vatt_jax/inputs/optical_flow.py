"""Dense optical flow of frames, and its two planes of 8 bits: the modality `flow`.

Flow i of a clip is the motion from frame i to frame i + 1: what frame i shows at (y, x), frame
i + 1 shows at (y + vertical, x + horizontal). The last frame has none behind it, and repeats the
flow before it; T frames have T flows, and flow i stands beside frame i.

Displacements are in pixels of the frames that they were computed on. Beyond ±BOUND they are cut,
as CoCLR (Han et al. 2020) and the two-stream networks before it do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from vatt_jax import extras
from vatt_jax.config import ConfigError, choose

# Pixels that the largest value stands for.
BOUND = 20.0
# Value of no motion. One step in the middle of 0 to 255, so that it is exact.
ZERO = 128
# Steps from no motion to the bound, on either side: values are 1 to 255.
STEPS = 127
# Pixels of the short side of the smallest frames that dis takes.
SMALLEST = 12
# Rows and columns that JPEG encodes together.
_BLOCK = 8

# (frame, next frame), grey -> horizontal and vertical displacement.
Estimate = Callable[[UInt8[np.ndarray, 'H W'], UInt8[np.ndarray, 'H W']], np.ndarray]


def quantise(flow: Float32[np.ndarray, '... 2']) -> UInt8[np.ndarray, '... 2']:
    """Pixels -> values; the error is at most half a step, BOUND / STEPS / 2 = 0.079 pixels.

    Args:
        flow: horizontal and vertical displacements.
    """
    steps = np.clip(flow, -BOUND, BOUND) * np.float32(STEPS / BOUND)
    return (ZERO + np.rint(steps)).astype(np.uint8)


def to_pixels(values: UInt8[np.ndarray, '... 2']) -> Float32[np.ndarray, '... 2']:
    """Values -> pixels, the inverse of `quantise`."""
    return (values.astype(np.float32) - ZERO) * np.float32(BOUND / STEPS)


def negative(values: UInt8[np.ndarray, '... 2']) -> UInt8[np.ndarray, '... 2']:
    """The opposite motion."""
    # JPEG may turn the smallest value, 1, into 0, whose opposite would be 256.
    opposite = 2 * ZERO - np.maximum(values, 1).astype(np.int16)
    return opposite.astype(np.uint8)


def still(height: int, width: int) -> UInt8[np.ndarray, 'H W 2']:
    """The values where nothing moves."""
    return np.full((height, width, 2), ZERO, np.uint8)


def to_planes(values: UInt8[np.ndarray, 'H W 2']) -> UInt8[np.ndarray, 'rows W']:
    """Both planes as one grey picture, horizontal above vertical, to be stored as JPEG.

    Each is filled up to whole blocks of JPEG with its last row, so that no block holds both.
    """
    missing = -len(values) % _BLOCK
    planes = np.pad(values, ((0, missing), (0, 0), (0, 0)), 'edge')
    return np.concatenate([planes[..., 0], planes[..., 1]])


class Flows:
    """The flow between consecutive frames, as they come.

    Args:
        method: entry of METHODS.

    Raises:
        MissingExtra: OpenCV is not installed.
        ConfigError: there is no such method, or this OpenCV lacks it.
    """

    def __init__(self, method: str):
        self._estimate = METHODS[choose(method, METHODS, 'flow')](_opencv())
        self._grey: np.ndarray | None = None

    def next(self, frame: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'H W 2'] | None:
        """The flow from the frame before to this one; None of the first frame."""
        cv2 = _opencv()
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        flow = None
        if self._grey is not None:
            flow = quantise(self._estimate(self._grey, grey))
        self._grey = grey
        return flow


def of_frames(
    frames: Sequence[UInt8[np.ndarray, 'H W 3']], method: str
) -> UInt8[np.ndarray, 'T H W 2']:
    """The flow of each frame of a clip; see the module.

    Args:
        frames: RGB, of one size.
        method: entry of METHODS.
    """
    flows = Flows(method)
    found = [flow for flow in map(flows.next, frames) if flow is not None]
    if not found:
        found = [still(*frames[0].shape[:2])]
    # The last one stands for the last frame too. A single frame has the one of no motion.
    return np.stack([*found, found[-1]][: len(frames)])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it OpenCV computes in the thread that calls it.

    Where files are decoded side by side, each has a core already.
    """
    cv2 = _opencv()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _opencv() -> Any:
    with extras.needed('flow', 'optical flow'):
        import cv2
    return cv2


def _dis(cv2: Any) -> Estimate:
    """Dense inverse search (Kroeger et al. 2016)."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda frame, following: dis.calc(frame, following, None)


def _tvl1(cv2: Any) -> Estimate:
    """TV-L1 (Zach et al. 2007), in OpenCV's contributed modules."""
    if not hasattr(cv2, 'optflow'):
        raise ConfigError(
            "flow='tvl1': this OpenCV has no TV-L1; choose 'dis', or install the package that has "
            'both: pip uninstall opencv-python-headless, then '
            'pip install opencv-contrib-python-headless'
        )
    tvl1 = cv2.optflow.createOptFlow_DualTVL1()
    return lambda frame, following: tvl1.calc(frame, following, None)


# Name -> maker of the estimator.
METHODS: dict[str, Callable[[Any], Estimate]] = {'dis': _dis, 'tvl1': _tvl1}
