"""What happens: objects, events and words of one video, decided from (seed, split, number) alone.

Lengths are shares of the frame's height and width, times are in seconds, and positions are (y, x)
from the upper left corner. The order of random draws is part of the dataset: a draw that moves
changes every video.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

KINDS = ('disc', 'ring', 'plank', 'pole')
EVENTS = ('bounce', 'collide', 'appear', 'vanish')
CLASSES = tuple(f'{event} {kind}' for event in EVENTS for kind in KINDS)
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
# Radius, as a share of the frame's height.
SIZES = {'small': 0.165, 'medium': 0.21, 'large': 0.27}
# Half height and half width, in radii.
REACH = {
    'disc': (0.95, 0.95),
    'ring': (0.95, 0.95),
    'plank': (0.4, 1.1),
    'pole': (1.1, 0.4),
}
# Most that a subject leans, in radians.
TILT = 0.12
# Where things hit.
FLOOR, LEFT, RIGHT = 0.93, 0.06, 0.94
# How far up a thing goes while it appears or vanishes.
RISE = 0.4
# Seconds that an appearance or a vanishing takes.
GLIDE = 0.8
# Least seconds from one post to the other, so that a sound is over before the next.
SHORTEST_CROSSING = 0.42
# Places that are tried for a silent thing of a subject's size.
BYSTANDER_PLACES = 6
SPLITS = ('train', 'validation', 'test')

# (seconds since the scene began, kind of sound, strength)
Sound = tuple[float, str, float]
# A (colour, kind) pair.
Look = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Config:
    """A playground. Everything follows from these numbers.

    Attributes:
        train, validation, test: videos per split.
        seconds, fps, size, rate: of each mp4 file; size in pixels (frames are square), rate in Hz.
        episodes: scenes per video.
        seed: of everything that is drawn.
        held_out: share of (colour, kind) pairs, at most a half, that only the test split shows,
            among all others.
        distractors: most silent objects per scene.
        camera_noise: standard deviation in 8-bit levels.
        sound_noise: standard deviation as a share of full scale.
        silent: most silent things of a subject's size per scene.
        mute: kinds that are never heard, with commas; of their subjects there is no sound.
        pictures: per scene that are written as files, with boxes.
        flow: method of the optical flow that is prepared too, dis or tvl1; '' for none.

    Raises:
        ValueError: a number is of the wrong type or outside its range, or the scenes would be too
            short to show anything.
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
    silent: int = 0
    mute: str = ''
    pictures: int = 0
    flow: str = ''

    @property
    def mute_kinds(self) -> tuple[str, ...]:
        """`mute` as kinds."""
        return tuple(kind.strip() for kind in self.mute.split(',') if kind.strip())

    @property
    def tells_sounding(self) -> bool:
        """Whether the truth says which object is heard; else it is always the subject."""
        return bool(self.silent or self.mute or self.pictures)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_scenes()

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = type(field.default)
            allowed = (int, float) if expected is float else (expected,)
            # bool is an int to isinstance.
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ValueError(
                    f'playground {field.name}: expected {expected.__name__}, such as '
                    f'{field.default!r}, got {value!r}'
                )

    def _check_ranges(self) -> None:
        for name in ('train', 'validation', 'test', 'seconds', 'episodes', 'fps', 'size', 'rate'):
            value = getattr(self, name)
            # `not >` also refuses NaN.
            if not value > 0:
                raise ValueError(f'playground {name}: expected a positive number, got {value}')
        not_negative = ('seed', 'distractors', 'camera_noise', 'sound_noise', 'silent', 'pictures')
        for name in not_negative:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f'playground {name}: expected 0 or more, got {value}')
        if not 0 <= self.held_out <= 0.5:
            raise ValueError(
                'playground held_out: expected a share from 0 to 0.5 of the (colour, kind) pairs, '
                f'got {self.held_out}'
            )
        unknown = [kind for kind in self.mute_kinds if kind not in KINDS]
        if unknown or set(self.mute_kinds) == set(KINDS):
            raise ValueError(
                f'playground mute: expected some of {", ".join(KINDS)}, with commas, not all of '
                f'them, got {self.mute!r}'
            )
        if self.rate < 5000:
            raise ValueError(
                f'playground rate: expected 5000 or more, as the highest tone is near 2000 Hz, '
                f'got {self.rate}'
            )
        if self.size % 2:
            raise ValueError(
                f'playground size: expected an even number, as H.264 needs one, got {self.size}'
            )

    def _check_scenes(self) -> None:
        scene = self.seconds / self.episodes
        if scene < 1.5:
            raise ValueError(
                f'playground: {self.episodes} episodes in seconds={self.seconds} leave less than '
                f'1.5 s each; try seconds={1.5 * self.episodes:g}'
            )
        if scene * self.fps < 4:
            raise ValueError(
                f'playground fps={self.fps}: {scene:g} s a scene would be fewer than 4 pictures'
            )


@dataclasses.dataclass
class Thing:
    """An object of a scene.

    Attributes:
        angle: by which it leans, in radians.
        center: [T 2] (y, x) at the times of the scene's frames.
        radius: [T] at these times.
    """

    kind: str
    color: str
    texture: str
    size: str
    angle: float
    center: np.ndarray
    radius: np.ndarray


@dataclasses.dataclass
class Episode:
    """One scene.

    Attributes:
        begin, end: seconds in the video.
        background: [9] parameters of the backdrop (drawing.backdrop).
        sounds: with times in the video; a little before `begin` where a sound is under way as the
            scene starts.
        times: [T] of its frames, seconds in the video.
        bystanders: silent things of a subject's size.
    """

    begin: float
    end: float
    event: str
    subject: Thing
    distractors: list[Thing]
    background: np.ndarray
    sounds: list[Sound]
    times: np.ndarray
    bystanders: list[Thing] = dataclasses.field(default_factory=list)

    @property
    def things(self) -> list[Thing]:
        """All objects, the subject first."""
        return [self.subject, *self.bystanders, *self.distractors]

    @property
    def label(self) -> str:
        return f'{self.event} {self.subject.kind}'


def held_out_pairs(config: Config) -> set[Look]:
    """(colour, kind) pairs that nothing has in training and validation videos.

    They are spread so that every colour and every kind stays common in training.
    """
    rng = np.random.default_rng((config.seed, 11))
    shift = int(rng.integers(len(COLORS)))
    count = round(config.held_out * len(COLORS) * len(KINDS))

    # Numbers the diagonals of the table of colours and kinds; each holds every kind once.
    def diagonal(color: str, kind: str) -> int:
        return (list(COLORS).index(color) + shift - KINDS.index(kind)) % len(COLORS)

    candidates = []
    for color in COLORS:
        for kind in KINDS:
            # Four diagonals are half of all pairs, the most that may be held out.
            if diagonal(color, kind) in (0, 3, 5, 1):
                candidates.append((color, kind))
    candidates.sort(key=lambda pair: (diagonal(*pair), pair))
    return set(candidates[:count])


def rng_of(config: Config, split: str, number: int, site: int) -> np.random.Generator:
    """The generator of one video and purpose (site)."""
    return np.random.default_rng((config.seed, SPLITS.index(split), number, site))


def video(config: Config, split: str, number: int) -> list[Episode]:
    """The episodes of one video, one after another.

    Classes go round, so each split is balanced to within one.
    """
    rng = rng_of(config, split, number, 0)
    held: set[Look] = set() if split == 'test' else held_out_pairs(config)
    inner = config.seconds * (np.arange(1, config.episodes) / config.episodes)
    jitter = 0.12 * config.seconds / config.episodes
    cuts = inner + rng.uniform(-jitter, jitter, len(inner))
    edges = np.concatenate([[0.0], cuts, [config.seconds]])
    times = np.arange(round(config.seconds * config.fps)) / config.fps
    order = np.random.default_rng((config.seed, SPLITS.index(split), 7)).permutation(len(CLASSES))
    episodes = []
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        scene = number * config.episodes + i
        # A new pass over all classes starts elsewhere, so neighbours in a video are not always the
        # same pair.
        pass_number = scene // len(CLASSES)
        event, kind = CLASSES[order[(scene + pass_number * 5) % len(CLASSES)]].split()
        allowed = [color for color in COLORS if (color, kind) not in held]
        color = str(rng.choice(allowed))
        texture = str(rng.choice(TEXTURES))
        size = str(rng.choice(list(SIZES)))
        shown = times[(times >= begin) & (times < end)]
        look = (kind, color, texture, size)
        episodes.append(episode(config, rng, begin, end, event, look, shown, held))
    return episodes


def episode(
    config: Config,
    rng: np.random.Generator,
    begin: float,
    end: float,
    event: str,
    look: tuple[str, str, str, str],
    times: np.ndarray,
    held: set[Look],
) -> Episode:
    """One scene between two times of the video.

    Args:
        look: (kind, colour, texture, size) of the subject.
        times: [T] of the scene's frames.
        held: (colour, kind) pairs not to be shown.
    """
    kind, color, texture, size = look
    t, length = times - begin, end - begin
    radius = np.full(len(t), SIZES[size] * rng.uniform(0.93, 1.07))
    first_radius = float(radius[0]) if len(radius) else SIZES[size]
    reach = first_radius * np.array(REACH[kind])
    center, sounds = MOTIONS[event](rng, t, length, reach)
    if event in ('appear', 'vanish'):
        scale, starts = swell(rng, t, length, event)
        radius = radius * scale
        sounds = [(start, event, 1.0) for start in starts]
        # It comes up from below as it grows, and floats off as it shrinks.
        direction = RISE if event == 'appear' else -RISE
        center[:, 0] += direction * (1 - scale)
    angle = float(rng.uniform(-TILT, TILT))
    subject = Thing(kind, color, texture, size, angle, center, radius)
    distractors = []
    if config.distractors:
        for _ in range(rng.integers(1, config.distractors + 1)):
            distractors.append(drifting(rng, t, kind, held))
    bystanders = []
    if config.silent:
        for _ in range(rng.integers(1, config.silent + 1)):
            bystanders.append(bystander(rng, t, length, subject, held))
    if kind in config.mute_kinds:
        sounds = []
    in_video = [(begin + time, sound, strength) for time, sound, strength in sounds]
    return Episode(
        begin, end, event, subject, distractors, backdrop(rng), in_video, times, bystanders
    )


def backdrop(rng: np.random.Generator) -> np.ndarray:
    """[9]: light, hue, saturation, four wave numbers and speeds, phase and twist."""
    hue, light = rng.uniform(0, 1), rng.uniform(0.1, 0.3)
    saturation = rng.uniform(0.05, 0.25)
    waves = rng.uniform(-6, 6, 4)
    phase, twist = rng.uniform(0, 6.28), rng.uniform(-2, 2)
    return np.array([light, hue, saturation, *waves, phase, twist])


def bounce(
    rng: np.random.Generator, t: np.ndarray, length: float, reach: np.ndarray
) -> tuple[np.ndarray, list[Sound]]:
    """Falls onto the floor and bounces, losing a fifth of its speed each time.

    It is thrown up again when it gets slow.

    Args:
        t: [T] seconds since the scene began.
        length: of the scene, in seconds.
        reach: [2] half height and half width of the thing.

    Returns:
        Its centre [T 2], and the sounds of its impacts.
    """
    top = rng.uniform(0.15, 0.35)
    ground = FLOOR - reach[0]
    gravity = rng.uniform(2.2, 3.4)
    x = rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06) * t
    # Let go after a while: the rhythm has no fixed phase.
    release = rng.uniform(0.0, 0.5)
    y = np.where(t < release, top, top + 0.5 * gravity * (t - release) ** 2)
    speed = math.sqrt(2 * gravity * (ground - top))
    impact = release + math.sqrt(2 * (ground - top) / gravity)
    sounds: list[Sound] = []
    while impact < length:
        sounds.append((impact, 'impact', min(1.0, 0.35 + 0.35 * speed)))
        speed *= 0.8
        if speed < 0.8:
            speed = 1.7
        # A parabola from this impact on; the next one overwrites what lies behind it.
        flown = t - impact
        y = np.where(t >= impact, ground - speed * flown + 0.5 * gravity * flown**2, y)
        impact += 2 * speed / gravity
    center = np.stack([np.minimum(y, ground), np.broadcast_to(x, t.shape)], -1)
    return center, sounds


def collide(
    rng: np.random.Generator, t: np.ndarray, length: float, reach: np.ndarray
) -> tuple[np.ndarray, list[Sound]]:
    """Runs against the left and the right post in turn, at constant speed. As `bounce`."""
    low, high = LEFT + reach[1], RIGHT - reach[1]
    span = high - low
    speed = min(rng.uniform(0.75, 1.25), span / SHORTEST_CROSSING)
    first_x = rng.uniform(low, high)
    moves_right = rng.choice([-1, 1]) > 0
    # The way there and back is unfolded to a circle of twice the span.
    start = first_x - low if moves_right else 2 * span - (first_x - low)
    unfolded = np.mod(start + speed * t, 2 * span)
    x = low + np.where(unfolded > span, 2 * span - unfolded, unfolded)
    to_first_post = span - start % span
    impacts = np.arange(to_first_post / speed, length, span / speed)
    sounds: list[Sound] = [(impact, 'impact', 0.8) for impact in impacts]
    y = rng.uniform(0.3, 0.7) + rng.uniform(-0.03, 0.03) * t
    return np.stack([np.broadcast_to(y, t.shape), x], -1), sounds


def hover(
    rng: np.random.Generator, t: np.ndarray, length: float, reach: np.ndarray
) -> tuple[np.ndarray, list[Sound]]:
    """Drifts slowly around the middle, silently. As `bounce`."""
    drift = rng.uniform(-0.08, 0.08, 2)
    middle = rng.uniform((0.46, 0.32), (0.56, 0.68))
    return middle + drift * (t - length / 2)[:, None], []


Motion = Callable[
    [np.random.Generator, np.ndarray, float, np.ndarray], tuple[np.ndarray, list[Sound]]
]
MOTIONS: dict[str, Motion] = {
    'bounce': bounce,
    'collide': collide,
    'appear': hover,
    'vanish': hover,
}


def swell(
    rng: np.random.Generator, t: np.ndarray, length: float, event: str
) -> tuple[np.ndarray, list[float]]:
    """Grows from nothing in GLIDE seconds and is gone at the end of its period; vanish reverses it.

    Returns:
        The scale [T] in [0, 1], and the times at which it starts to grow or to shrink.
    """
    period = rng.uniform(1.3, 1.6)
    phase = rng.uniform(0, period)
    since = np.mod(t + phase, period)
    if event == 'appear':
        scale, offset = np.clip(since / GLIDE, 0, 1), 0.0
    else:
        scale, offset = np.clip((period - since) / GLIDE, 0, 1), period - GLIDE
    starts = np.arange(-phase + offset, length, period)
    # A change that is half over as the scene begins, or has no time left, is not heard.
    return scale, [float(s) for s in starts if -GLIDE * 0.5 < s < length - 0.1]


def bystander(
    rng: np.random.Generator, t: np.ndarray, length: float, subject: Thing, held: set[Look]
) -> Thing:
    """A silent object as large as a subject, of another kind, that drifts apart from it."""
    kind = str(rng.choice([k for k in KINDS if k != subject.kind]))
    color = str(rng.choice([c for c in COLORS if (c, kind) not in held]))
    texture, size = str(rng.choice(TEXTURES)), str(rng.choice(list(SIZES)))
    angle = float(rng.uniform(-TILT, TILT))
    drift = rng.uniform(-0.08, 0.08, 2)
    # Of several places the one that is furthest from the subject: it should hide little of it.
    middles = rng.uniform(0.2, 0.8, (BYSTANDER_PLACES, 2))
    paths = middles[:, None] + drift * (t - length / 2)[:, None]  # [places T 2]
    distances = np.linalg.norm(paths - subject.center, axis=-1).sum(-1)  # [places]
    center = paths[int(distances.argmax())]
    radius = np.full(len(t), SIZES[size] * rng.uniform(0.93, 1.07))
    return Thing(kind, color, texture, size, angle, center, radius)


def drifting(rng: np.random.Generator, t: np.ndarray, kind: str, held: set[Look]) -> Thing:
    """A small silent object of another kind than the subject's."""
    other = str(rng.choice([k for k in KINDS if k != kind]))
    start, velocity = rng.uniform(0.1, 0.9, 2), rng.uniform(-0.12, 0.12, 2)
    color = str(rng.choice([c for c in COLORS if (c, other) not in held]))
    angle = float(rng.uniform(-1, 1))
    # Folded back at the edges of the frame.
    center = 1 - np.abs(np.mod(start + velocity * t[:, None], 2) - 1)
    radius = np.full(len(t), rng.uniform(0.045, 0.065))
    return Thing(other, color, 'plain', 'tiny', angle, center, radius)
