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

MARGIN = 0.5  # share of the frame; more than anything hangs over its edge
FURTHEST = 1.25  # radii; no shape goes further from its centre


def frames(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """uint8 [T size size 3]."""
    out = np.concatenate([scene(config.size, e) for e in episodes])
    if config.camera_noise:
        out += rng.standard_normal(out.shape, dtype=np.float32) * config.camera_noise
    return np.clip(out, 0, 255).astype(np.uint8)


def scene(size: int, episode: Episode) -> np.ndarray:
    """float32 [T size size 3] in 0…255."""
    # A margin as wide as the largest thing lets windows hang over the frame's edge without being clipped.
    margin = math.ceil(MARGIN * size)
    canvas = np.pad(backdrop(size, episode), ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    for thing in [*episode.distractors, episode.subject]:
        draw(canvas, thing, size, margin)
    return canvas[:, margin:-margin, margin:-margin]


def backdrop(size: int, episode: Episode) -> np.ndarray:
    """A dim room whose pattern drifts, with a floor and two posts to run against, in every scene alike."""
    light, hue, saturation, ky, kx, vy, vx, phase, twist = map(float, episode.background)
    t = (episode.times - episode.begin)[:, None]
    place = np.linspace(0, 1, size)[None]
    wave = sine_of_sum(
        ky * (place + 0.05 * vy * t) + phase, kx * (place + 0.05 * vx * t)
    ) + 0.5 * sine_of_sum(
        -3 * twist * place + 0.4 * vx * t, np.broadcast_to(3 * twist * place, (len(t), size))
    )
    value = np.clip(light + 0.04 * wave, 0.02, 0.7)
    tint = np.array(colorsys.hsv_to_rgb(hue, saturation, 1.0), np.float32)
    canvas = value[..., None] * (tint * 255)
    canvas[:, math.ceil(FLOOR * size) :] *= 0.55
    canvas[:, :, : int(LEFT * size)] *= 0.55
    canvas[:, :, math.ceil(RIGHT * size) :] *= 0.55
    return canvas


def sine_of_sum(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float32 [T H W] of angles [T H] + [T W], from sines and cosines of each alone."""
    left, right = (
        np.stack([np.sin(rows), np.cos(rows)], -1),
        np.stack([np.cos(columns), np.sin(columns)], 1),
    )
    return left.astype(np.float32) @ right.astype(np.float32)


def draw(canvas: np.ndarray, thing: Thing, size: int, margin: int) -> None:
    """Paints a thing onto canvas [T size+2·margin size+2·margin 3] in place, through a window that follows it."""
    frames_ = canvas.shape[0]
    if frames_ == 0:
        return
    half = int(math.ceil(FURTHEST * float(thing.radius.max()) * size)) + 2
    corner = np.floor(thing.center * size).astype(int) - half
    span = np.arange(2 * half + 1)
    rows, columns = corner[:, :1] + span, corner[:, 1:] + span  # [T S]
    radius = (np.maximum(thing.radius, 1e-3) * size).astype(np.float32)[:, None, None]
    v = (((rows + 0.5) - thing.center[:, :1] * size).astype(np.float32))[:, :, None] / radius
    u = (((columns + 0.5) - thing.center[:, 1:] * size).astype(np.float32))[:, None, :] / radius
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    u, v = c * u + s * v, c * v - s * u
    alpha = (
        np.clip(0.5 - distance(thing.kind, u, v) * radius, 0, 1)
        * (thing.radius > 0.01)[:, None, None]
    )
    color = np.array(COLORS[thing.color], np.float32) * pattern(thing.texture, u, v)[..., None]
    at = (
        np.arange(frames_)[:, None, None],
        (rows + margin)[:, :, None],
        (columns + margin)[:, None, :],
    )
    below = canvas[at]
    canvas[at] = below + alpha.astype(np.float32)[..., None] * (color - below)


def distance(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside), in radii, to a shape of radius about 1; v points down."""
    r = np.sqrt(u * u + v * v)
    if kind == 'disc':
        return r - 0.95
    if kind == 'ring':
        return np.abs(r - 0.72) - 0.23
    if kind in ('plank', 'pole'):
        high, wide = REACH[kind]
        return np.maximum(np.abs(u) - wide, np.abs(v) - high)
    raise ValueError(f'no object kind {kind!r}')


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
    u, v = (x.ravel() for x in np.meshgrid(line, line))
    inside = distance(kind, u, v) <= 0
    points = np.stack([u[inside], v[inside]], -1)
    turns = np.linspace(0, 2 * np.pi, 360, endpoint=False)
    return points[np.unique((points @ np.stack([np.cos(turns), np.sin(turns)])).argmax(0))]


def extent(thing: Thing) -> np.ndarray:
    """float64 [4]: y0 x0 y1 x1 of a thing around its centre, in radii."""
    u, v = outline(thing.kind).T
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    x, y = c * u - s * v, s * u + c * v
    return np.array([y.min(), x.min(), y.max(), x.max()])


def boxes(config: Config, episodes: list[Episode]) -> list[list[list[float]]]:
    """[frame][object] -> y0 x0 y1 x1 as shares of the frame, clipped to it; the subject first, [0 0 0 0] while it is not there."""
    out = []
    for e in episodes:
        things = [e.subject, *e.distractors]
        tight = np.stack(
            [np.tile(x.center, 2) + x.radius[:, None] * extent(x) for x in things], 1
        )  # [T objects 4]
        shown = np.stack([x.radius > 0.01 for x in things], 1)
        out += np.where(shown[..., None], np.clip(tight, 0, 1).round(4), 0.0).tolist()
    return out
