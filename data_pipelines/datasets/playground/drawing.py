"""Episodes to frames: anti-aliased signed distances, all frames of a scene at once."""

from __future__ import annotations

import colorsys
import functools
import math

import numpy as np

from data_pipelines.datasets.playground.world import (
    COLORS,
    FLOOR,
    LEFT,
    REACH,
    RIGHT,
    Config,
    Episode,
    Thing,
)

# Share of the frame; more than anything hangs over its edge.
MARGIN = 0.5
# No shape goes further from its centre, in radii.
FURTHEST = 1.25
# Smaller things are not shown, as a share of the frame.
SMALLEST = 0.01


def frames(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """uint8 [T H W 3]: the scenes one after another, with the camera's noise."""
    pixels = np.concatenate([scene(config.size, episode) for episode in episodes])
    if config.camera_noise:
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * config.camera_noise
    return np.clip(pixels, 0, 255).astype(np.uint8)


def scene(size: int, episode: Episode) -> np.ndarray:
    """float32 [T H W 3] in 0…255. size: H = W, in pixels."""
    # A margin as wide as the largest thing lets windows hang over the frame's edge without being
    # clipped.
    margin = math.ceil(MARGIN * size)
    around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    canvas = np.pad(backdrop(size, episode), around)
    # The subject in front.
    for thing in [*episode.distractors, *episode.bystanders, episode.subject]:
        draw(canvas, thing, size, margin)
    return canvas[:, margin:-margin, margin:-margin]


def backdrop(size: int, episode: Episode) -> np.ndarray:
    """A dim room whose pattern drifts, with a floor and two posts, in every scene alike.

    Returns:
        float32 [T H W 3].
    """
    light, hue, saturation, ky, kx, vy, vx, phase, twist = map(float, episode.background)
    t = (episode.times - episode.begin)[:, None]  # [T 1]
    position = np.linspace(0, 1, size)[None]  # [1 H], and as well [1 W]
    drifting = sine_of_sum(
        ky * (position + 0.05 * vy * t) + phase,
        kx * (position + 0.05 * vx * t),
    )
    turning = sine_of_sum(
        -3 * twist * position + 0.4 * vx * t,
        np.broadcast_to(3 * twist * position, (len(t), size)),
    )
    wave = drifting + 0.5 * turning
    value = np.clip(light + 0.04 * wave, 0.02, 0.7)
    tint = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0), np.float32)
    canvas = value[..., None] * (tint * 255)
    # Floor, left post, right post.
    canvas[:, math.ceil(FLOOR * size) :] *= 0.55
    canvas[:, :, : int(LEFT * size)] *= 0.55
    canvas[:, :, math.ceil(RIGHT * size) :] *= 0.55
    return canvas


def sine_of_sum(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """sin(rows + columns) for every pixel, from sines and cosines of each alone.

    sin(a + b) = sin a · cos b + cos a · sin b: a product of matrices instead of a sine per pixel.

    Args:
        rows: angles [T H].
        columns: angles [T W].

    Returns:
        float32 [T H W].
    """
    left = np.stack([np.sin(rows), np.cos(rows)], -1)  # [T H 2]
    right = np.stack([np.cos(columns), np.sin(columns)], 1)  # [T 2 W]
    return left.astype(np.float32) @ right.astype(np.float32)


def draw(canvas: np.ndarray, thing: Thing, size: int, margin: int) -> None:
    """Paints a thing onto the canvas in place, through a window that follows it.

    Args:
        canvas: [T size+2·margin size+2·margin 3].
        thing: what is painted.
        size: of the frame without its margin, in pixels.
        margin: in pixels.
    """
    num_frames = canvas.shape[0]
    if num_frames == 0:
        return
    half = int(math.ceil(FURTHEST * float(thing.radius.max()) * size)) + 2
    span = np.arange(2 * half + 1)
    corner = np.floor(thing.center * size).astype(int) - half
    # In a long scene a thing may drift off beyond the margin: its window stays behind, empty.
    corner = np.clip(corner, -margin, size + margin - len(span))
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span  # [T S]

    # u, v: pixel centres in the thing's own coordinates, in radii.
    radius = (np.maximum(thing.radius, 1e-3) * size).astype(np.float32)[:, None, None]
    y = (rows + 0.5) - thing.center[:, :1] * size
    x = (columns + 0.5) - thing.center[:, 1:] * size
    v = y.astype(np.float32)[:, :, None] / radius
    u = x.astype(np.float32)[:, None, :] / radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    u, v = cos * u + sin * v, cos * v - sin * u

    # The distance to the outline in pixels is the coverage of a pixel on it.
    coverage = np.clip(0.5 - distance(thing.kind, u, v) * radius, 0, 1)
    is_shown = (thing.radius > SMALLEST)[:, None, None]
    alpha = coverage * is_shown
    color = np.array(COLORS[thing.color], np.float32) * pattern(thing.texture, u, v)[..., None]
    window = (
        np.arange(num_frames)[:, None, None],
        (rows + margin)[:, :, None],
        (columns + margin)[:, None, :],
    )
    below = canvas[window]
    canvas[window] = below + alpha.astype(np.float32)[..., None] * (color - below)


def distance(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance, in radii, to a shape of radius about 1; negative inside; v points down."""
    from_center = np.sqrt(u * u + v * v)
    if kind == 'disc':
        return from_center - 0.95
    if kind == 'ring':
        return np.abs(from_center - 0.72) - 0.23
    if kind in ('plank', 'pole'):
        half_height, half_width = REACH[kind]
        return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)
    raise ValueError(f'expected a kind of thing ({", ".join(REACH)}), got {kind!r}')


def pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Brightness of the surface, 0.55…1."""
    if texture == 'striped':
        return np.where(np.sin(7.5 * v) > 0, 1.0, 0.55).astype(np.float32)
    if texture == 'dotted':
        return np.where(np.sin(8 * u) * np.sin(8 * v) > 0.35, 0.55, 1.0).astype(np.float32)
    return np.ones_like(u)


@functools.cache
def outline(kind: str) -> np.ndarray:
    """float64 [N 2] (u, v): the points of a shape that are furthest in one of 360 directions."""
    line = np.linspace(-FURTHEST, FURTHEST, 501)
    u, v = (grid.ravel() for grid in np.meshgrid(line, line))
    inside = distance(kind, u, v) <= 0
    points = np.stack([u[inside], v[inside]], -1)
    turns = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    directions = np.stack([np.cos(turns), np.sin(turns)])  # [2 360]
    return points[np.unique((points @ directions).argmax(0))]


def extent(thing: Thing) -> np.ndarray:
    """float64 [4]: y0 x0 y1 x1 of a thing around its centre, in radii."""
    u, v = outline(thing.kind).T
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    x, y = cos * u - sin * v, sin * u + cos * v
    return np.array([y.min(), x.min(), y.max(), x.max()])


def boxes(config: Config, episodes: list[Episode]) -> list[list[list[float]]]:
    """[frame][object] -> y0 x0 y1 x1 as shares of the frame, clipped to it.

    In the order of `Episode.things`; the box of what is not there is [0 0 0 0].
    """
    by_frame: list[list[list[float]]] = []
    for episode in episodes:
        things = episode.things
        around = [np.tile(x.center, 2) + x.radius[:, None] * extent(x) for x in things]
        tight = np.stack(around, 1)  # [T objects 4]
        clipped = np.clip(tight, 0, 1).round(4)
        large_enough = np.stack([x.radius > SMALLEST for x in things], 1)  # [T objects]
        in_frame = (clipped[..., 2:] > clipped[..., :2]).all(-1)
        shown = large_enough & in_frame
        by_frame += np.where(shown[..., None], clipped, 0.0).tolist()
    return by_frame
