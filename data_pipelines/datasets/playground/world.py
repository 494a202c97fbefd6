"""What happens: objects, events and words of one video, decided from (seed, split, number) alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

KINDS = ('disc', 'ring', 'plank', 'pole')
EVENTS = ('bounce', 'collide', 'appear', 'vanish')
COLORS = {
    'red': (225, 50, 45),
    'orange': (245, 145, 30),
    'yellow': (240, 225, 60),
    'green': (60, 190, 70),
    'cyan': (60, 210, 220),
    'blue': (55, 85, 230),
    'purple': (150, 60, 200),
    'white': (245, 245, 245),
}
TEXTURES = ('plain', 'striped', 'dotted')
SIZES = {'small': 0.165, 'medium': 0.21, 'large': 0.27}  # radius, as a share of the frame's height
REACH = {
    'disc': (0.95, 0.95),
    'ring': (0.95, 0.95),
    'plank': (0.4, 1.1),
    'pole': (1.1, 0.4),
}  # half height, half width, in radii
TILT = 0.12  # radians; most that a subject leans
CLASSES = tuple(f'{event} {kind}' for event in EVENTS for kind in KINDS)
SPLITS = ('train', 'validation', 'test')
FLOOR, LEFT, RIGHT = 0.93, 0.06, 0.94  # where things hit, shares of the frame


@dataclasses.dataclass(frozen=True)
class Config:
    """A playground. Everything follows from these numbers.

    train, validation, test: videos per split. seconds, fps, size (pixels, square), rate (Hz): of each mp4 file. episodes: scenes per
    video. held_out: share of (colour, kind) pairs, at most a half, that only the test split shows, among all others. distractors: most
    silent objects per scene. camera_noise, sound_noise: standard deviations, in 8-bit levels and as a share of full scale.
    """

    train: int = 1200
    validation: int = 128
    test: int = 256
    seconds: float = 8.0
    episodes: int = 3
    fps: float = 8.0
    size: int = 64
    rate: int = 8000
    seed: int = 0
    held_out: float = 0.2
    distractors: int = 2
    camera_noise: float = 3.0
    sound_noise: float = 0.01

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if isinstance(value, bool) or not isinstance(
                value, (int, float) if wanted is float else wanted
            ):
                raise ValueError(
                    f'playground {field.name}={value!r}: a {wanted.__name__} is wanted, such as {field.default!r}'
                )
        for name in ('train', 'validation', 'test', 'seconds', 'episodes', 'fps', 'size', 'rate'):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f'playground {name}={getattr(self, name)}: a positive number is wanted'
                )
        for name in ('seed', 'distractors', 'camera_noise', 'sound_noise'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'playground {name}={getattr(self, name)}: it cannot be negative')
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(
                f'playground held_out={self.held_out}: a share from 0 to 0.5 of the (colour, kind) pairs is wanted'
            )
        if self.seconds / self.episodes < 1.5:
            raise ValueError(
                f'playground: {self.episodes} episodes in seconds={self.seconds} leave less than 1.5 s each; '
                f'try seconds={1.5 * self.episodes:g}'
            )
        if self.seconds / self.episodes * self.fps < 4:
            raise ValueError(
                f'playground fps={self.fps}: {self.seconds / self.episodes:g} s a scene would be fewer than 4 pictures'
            )
        if self.rate < 5000:
            raise ValueError(
                f'playground rate={self.rate}: the highest tone is near 2000 Hz; 5000 or more is wanted'
            )
        if self.size % 2:
            raise ValueError(f'playground size={self.size}: H.264 wants an even number')


@dataclasses.dataclass
class Thing:
    """An object of a scene. center [T 2] (y, x) and radius [T], shares of the frame, at the scene's frame times."""

    kind: str
    color: str
    texture: str
    size: str
    angle: float
    center: np.ndarray
    radius: np.ndarray


@dataclasses.dataclass
class Episode:
    """One scene. sounds: (time in the video, kind of sound, strength), a little before `begin` where one is under way as the scene
    starts. times: of its frames, seconds in the video."""

    begin: float
    end: float
    event: str
    subject: Thing
    distractors: list[Thing]
    background: np.ndarray
    sounds: list[tuple[float, str, float]]
    times: np.ndarray

    @property
    def label(self) -> str:
        return f'{self.event} {self.subject.kind}'


RISE = 0.4  # how far up a thing goes while it appears or vanishes, share of the frame
GLIDE = 0.8  # seconds an appearance or a vanishing takes
NEXT = 0.42  # least seconds from one post to the other: a sound is over before the next


def held_out_pairs(config: Config) -> set[tuple[str, str]]:
    """(colour, kind) pairs that nothing has in training and validation videos: every colour and every kind stays common in training."""
    rng = np.random.default_rng((config.seed, 11))
    shift = int(rng.integers(len(COLORS)))
    count = round(config.held_out * len(COLORS) * len(KINDS))
    pairs = [
        (c, k)
        for i, c in enumerate(COLORS)
        for j, k in enumerate(KINDS)
        if (i + shift - j) % len(COLORS) in (0, 3, 5, 1)
    ]
    pairs = sorted(
        pairs,
        key=lambda p: ((list(COLORS).index(p[0]) + shift - KINDS.index(p[1])) % len(COLORS), p),
    )
    return set(pairs[:count])


def rng_of(config: Config, split: str, number: int, site: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, SPLITS.index(split), number, site))


def video(config: Config, split: str, number: int) -> list[Episode]:
    """The episodes of one video, one after another. Classes go round, so each split is balanced to within one."""
    rng = rng_of(config, split, number, 0)
    held = set() if split == 'test' else held_out_pairs(config)
    inner = config.seconds * (np.arange(1, config.episodes) / config.episodes)
    jitter = 0.12 * config.seconds / config.episodes
    edges = np.concatenate(
        [[0.0], inner + rng.uniform(-jitter, jitter, len(inner)), [config.seconds]]
    )
    times = np.arange(round(config.seconds * config.fps)) / config.fps
    order = np.random.default_rng((config.seed, SPLITS.index(split), 7)).permutation(len(CLASSES))
    out = []
    for e, (begin, end) in enumerate(zip(edges, edges[1:])):
        place = number * config.episodes + e
        # a new pass over all classes starts elsewhere, so neighbours in a video are not always the same pair
        event, kind = CLASSES[order[(place + place // len(CLASSES) * 5) % len(CLASSES)]].split()
        allowed = [c for c in COLORS if (c, kind) not in held]
        look = (
            kind,
            str(rng.choice(allowed)),
            str(rng.choice(TEXTURES)),
            str(rng.choice(list(SIZES))),
        )
        out.append(
            episode(
                config, rng, begin, end, event, look, times[(times >= begin) & (times < end)], held
            )
        )
    return out


def episode(
    config: Config,
    rng: np.random.Generator,
    begin: float,
    end: float,
    event: str,
    look,
    times: np.ndarray,
    held,
) -> Episode:
    """look: (kind, colour, texture, size) of the subject. times: of the scene's frames. held: (colour, kind) pairs not to be shown."""
    kind, color, texture, size = look
    t, length = times - begin, end - begin
    radius = np.full(len(t), SIZES[size] * rng.uniform(0.93, 1.07))
    r = float(radius[0]) if len(radius) else SIZES[size]
    center, sounds = {'bounce': bounce, 'collide': collide, 'appear': grow, 'vanish': grow}[event](
        rng, t, length, r * np.array(REACH[kind])
    )
    if event in ('appear', 'vanish'):
        scale, starts = swell(rng, t, length, event)
        radius, sounds = radius * scale, [(s, event, 1.0) for s in starts]
        # it comes up from below as it grows, and floats off as it shrinks
        center[:, 0] += (RISE if event == 'appear' else -RISE) * (1 - scale)
    subject = Thing(kind, color, texture, size, float(rng.uniform(-TILT, TILT)), center, radius)
    others = (
        [drifting(rng, t, kind, held) for _ in range(rng.integers(1, config.distractors + 1))]
        if config.distractors
        else []
    )
    hue, light = rng.uniform(0, 1), rng.uniform(0.1, 0.3)
    background = np.array(
        [
            light,
            hue,
            rng.uniform(0.05, 0.25),
            *rng.uniform(-6, 6, 4),
            rng.uniform(0, 6.28),
            rng.uniform(-2, 2),
        ]
    )
    return Episode(
        begin,
        end,
        event,
        subject,
        others,
        background,
        [(begin + s, what, strength) for s, what, strength in sounds],
        times,
    )


def bounce(rng, t, length, reach):
    """(center [T 2], sounds) of a thing of half height and half width `reach`. Falls onto the floor and bounces, losing a fifth of its
    speed each time; thrown up again when it gets slow."""
    top = rng.uniform(0.15, 0.35)
    ground = FLOOR - reach[0]
    gravity = rng.uniform(2.2, 3.4)
    x = rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06) * t
    when = rng.uniform(0.0, 0.5)  # let go after a while: the rhythm has no fixed phase
    hits, speed, clock = (
        [],
        math.sqrt(2 * gravity * (ground - top)),
        when + math.sqrt(2 * (ground - top) / gravity),
    )
    y = np.where(t < when, top, top + 0.5 * gravity * (t - when) ** 2)
    while clock < length:
        hits.append((clock, 'impact', min(1.0, 0.35 + 0.35 * speed)))
        speed *= 0.8
        if speed < 0.8:
            speed = 1.7
        flight = 2 * speed / gravity
        here = t >= clock
        y = np.where(here, ground - speed * (t - clock) + 0.5 * gravity * (t - clock) ** 2, y)
        clock += flight
    return np.stack([np.minimum(y, ground), np.broadcast_to(x, t.shape)], -1), hits


def collide(rng, t, length, reach):
    """Runs against the left and the right post in turn, at constant speed."""
    low, high = LEFT + reach[1], RIGHT - reach[1]
    span = high - low
    speed, x0, way = (
        min(rng.uniform(0.75, 1.25), span / NEXT),
        rng.uniform(low, high),
        rng.choice([-1, 1]),
    )
    phase = (x0 - low if way > 0 else 2 * span - (x0 - low)) + speed * t
    folded = np.mod(phase, 2 * span)
    x = low + np.where(folded > span, 2 * span - folded, folded)
    start = x0 - low if way > 0 else 2 * span - (x0 - low)
    first = span - start % span
    hits = [(h, 'impact', 0.8) for h in np.arange(first / speed, length, span / speed)]
    y = rng.uniform(0.3, 0.7) + rng.uniform(-0.03, 0.03) * t
    return np.stack([np.broadcast_to(y, t.shape), x], -1), hits


def grow(rng, t, length, reach):
    drift = rng.uniform(-0.08, 0.08, 2)
    return rng.uniform((0.46, 0.32), (0.56, 0.68)) + drift * (t - length / 2)[:, None], []


def swell(rng, t, length, event):
    """(scale [T], start times): grows from nothing in GLIDE seconds and is gone at the end of its period; vanish is the reverse."""
    period = rng.uniform(1.3, 1.6)
    phase = rng.uniform(0, period)
    at = np.mod(t + phase, period)
    scale = np.clip(at / GLIDE, 0, 1) if event == 'appear' else np.clip((period - at) / GLIDE, 0, 1)
    offset = 0.0 if event == 'appear' else period - GLIDE
    starts = np.arange(-phase + offset, length, period)
    return scale, [float(s) for s in starts if s > -GLIDE * 0.5 and s < length - 0.1]


def drifting(rng, t, kind, held) -> Thing:
    """A small silent object of another kind."""
    other = str(rng.choice([k for k in KINDS if k != kind]))
    start, velocity = rng.uniform(0.1, 0.9, 2), rng.uniform(-0.12, 0.12, 2)
    fold = lambda x: 1 - np.abs(np.mod(x, 2) - 1)
    color = str(rng.choice([c for c in COLORS if (c, other) not in held]))
    return Thing(
        other,
        color,
        'plain',
        'tiny',
        float(rng.uniform(-1, 1)),
        fold(start + velocity * t[:, None]),
        np.full(len(t), rng.uniform(0.045, 0.065)),
    )
