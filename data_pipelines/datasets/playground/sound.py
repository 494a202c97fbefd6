"""Episodes to a waveform: each kind of object has its timbre, each event its sound, at its own instant."""
from __future__ import annotations

import numpy as np

from data_pipelines.datasets.playground.world import GLIDE, SIZES, Config, Episode

# kind -> (partials as multiples of the pitch, their strengths, tremolo in Hz)
TIMBRES = {
    'disc': ((1.0, 2.0), (1.0, 0.15), 0.0),                                    # a flute: almost a sine
    'square': ((1.0, 3.0, 5.0, 7.0), (1.0, 0.6, 0.4, 0.3), 0.0),               # a clarinet: odd partials
    'triangle': ((1.0, 2.76, 5.4), (0.6, 1.0, 0.7), 0.0),                      # a bell: inharmonic
    'star': ((1.0, 1.06, 2.0, 2.12, 3.0, 3.18), (1, 1, 0.7, 0.7, 0.5, 0.5), 0.0),  # out of tune: beats
    'ring': ((1.0, 2.0, 3.0), (1.0, 0.8, 0.6), 27.0),                          # a buzzer: tremolo
    'cross': ((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (0.3, 0.5, 0.7, 1.0, 1.0, 0.8), 0.0),  # brass: bright
}
PITCH = {'small': 520.0, 'medium': 350.0, 'large': 235.0}                      # Hz: small things sound high
DECAY = 0.2                                                                    # seconds in which an impact falls to 1/e
LOUDNESS = 2.5                                                                 # of a note at full strength, before the limiter
RING = 0.6                                                                     # seconds of an impact that are rendered


def waveform(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """int16 [seconds * rate]."""
    total = round(config.seconds * config.rate)
    out = np.zeros(total + config.rate, np.float32)
    for e in episodes:
        assert e.subject.size in SIZES
        pitch = PITCH[e.subject.size] * rng.uniform(0.96, 1.04)
        for time, what, strength in e.sounds:
            add(out, config.rate, time, e.end, strength * note(config.rate, e.subject.kind, what, pitch, rng))
    # Recorded as people record: loud, the peaks bent over. A wave at a tenth of full scale would drown in the towers' position codes.
    out = np.tanh(LOUDNESS * out[:total]) + rng.standard_normal(total, dtype=np.float32) * config.sound_noise
    return (np.clip(out, -1, 1) * 32767).astype(np.int16)


def note(rate: int, kind: str, what: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """float32: an impact (struck, decaying) or a glide (appear: an octave up and louder; vanish: its mirror image)."""
    partials, strengths, tremolo = TIMBRES[kind]
    seconds = RING if what == 'impact' else GLIDE
    t = np.arange(int(seconds * rate)) / rate
    if what == 'impact':
        cycles, envelope = pitch * t, np.exp(-t / DECAY) * np.minimum(1, t / 0.004)
    else:
        cycles = pitch * 0.71 * GLIDE / np.log(2) * (2 ** (t / GLIDE) - 1)
        envelope = (0.35 + 0.65 * t / GLIDE) * np.minimum(1, np.minimum(t, GLIDE - t) / 0.02)
    wave = np.zeros(len(t))
    for partial, strength in zip(partials, strengths):
        if partial * pitch * 1.5 < 0.45 * rate:
            wave += strength * np.sin(2 * np.pi * (partial * cycles + rng.uniform()))
    wave *= envelope / np.sqrt(np.sum(np.square(strengths)))
    if tremolo:
        wave *= 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * tremolo * t))
    return (wave[::-1] if what == 'vanish' else wave).astype(np.float32)


def add(out: np.ndarray, rate: int, time: float, end: float, wave: np.ndarray) -> None:
    """Adds `wave` at `time` in place; what would sound before the start or after its scene is cut, with a short fade."""
    first = round(time * rate)
    wave = wave[max(0, -first):]
    first = max(0, first)
    last = min(first + len(wave), round(end * rate), len(out))
    if last - first < 8:
        return
    piece = wave[:last - first].copy()
    fade = min(len(piece), int(0.005 * rate))
    piece[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    out[first:last] += piece
