"""Episodes to a waveform: each kind of object has its timbre, each event its sound, at its own instant."""
from __future__ import annotations

import numpy as np

from data_pipelines.datasets.playground.world import GLIDE, SIZES, Config, Episode

# kind -> (partials as multiples of the pitch, their strengths, rattle in Hz). Two spectra, each rattling slowly or fast: half of what tells
# kinds apart is how a sound goes on, which an average over time does not hear.
TIMBRES = {
    'disc': ((1.0, 2.0, 3.0), (1.0, 0.5, 0.25), 6.0),                          # hollow, slow
    'triangle': ((1.0, 2.0, 3.0), (1.0, 0.5, 0.25), 15.0),                     # the same, fast
    'ring': ((1.0, 2.76, 5.4), (0.5, 1.0, 0.7), 6.0),                          # a bell (inharmonic), slow
    'cross': ((1.0, 2.76, 5.4), (0.5, 1.0, 0.7), 15.0),                        # the same, fast
}
PITCH = {'small': 520.0, 'medium': 350.0, 'large': 235.0}                      # Hz: small things sound high
DECAY = 0.2                                                                    # seconds in which an impact falls to 1/e
CHIRP = 0.06                                                                   # seconds of a sweep
LOUDNESS = 1.5                                                                 # of a note at full strength, before the limiter
RING = 0.6                                                                     # seconds of an impact that are rendered


def waveform(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """int16 [seconds * rate]."""
    total = round(config.seconds * config.rate)
    out = np.zeros(total + config.rate, np.float32)
    for e in episodes:
        assert e.subject.size in SIZES
        pitch = PITCH[e.subject.size] * rng.uniform(0.96, 1.04)
        near = rng.uniform(0.35, 1.0)                                           # how close the microphone is
        for time, what, strength in e.sounds:
            add(out, config.rate, time, e.begin, e.end, near * strength * note(config.rate, e.subject.kind, what, pitch, rng))
    # Recorded as people record: loud, the peaks bent over. A wave at a tenth of full scale would drown in the towers' position codes.
    out = np.tanh(LOUDNESS * out[:total]) + rng.standard_normal(total, dtype=np.float32) * config.sound_noise
    return (np.clip(out, -1, 1) * 32767).astype(np.int16)


def note(rate: int, kind: str, what: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """float32: an impact (struck, decaying), or quick sweeps (appear: upwards and louder; vanish: its mirror image, so that
    no average over time can tell them apart)."""
    partials, strengths, rattle = TIMBRES[kind]
    seconds = RING if what == 'impact' else GLIDE
    t = np.arange(int(seconds * rate)) / rate
    if what == 'impact':
        cycles, envelope = pitch * t, np.exp(-t / DECAY) * np.minimum(1, t / 0.004)
    else:
        # sweeps of an octave, upwards, one after another
        cycles = pitch * 0.71 * CHIRP / np.log(2) * (np.floor(t / CHIRP) + 2 ** (t / CHIRP % 1) - 1)
        envelope = (0.35 + 0.65 * t / GLIDE) * np.minimum(1, np.minimum(t, GLIDE - t) / 0.02)
    wave = np.zeros(len(t))
    for partial, strength in zip(partials, strengths):
        if partial * pitch * 1.5 < 0.45 * rate:
            wave += strength * np.sin(2 * np.pi * (partial * cycles + rng.uniform()))
    wave *= envelope / np.sqrt(np.sum(np.square(strengths)))
    if rattle:
        wave *= np.clip(0.5 + 3 * np.sin(2 * np.pi * (rattle * t + 0.1)), 0, 1)
    return (wave[::-1] if what == 'vanish' else wave).astype(np.float32)


def add(out: np.ndarray, rate: int, time: float, begin: float, end: float, wave: np.ndarray) -> None:
    """Adds `wave` at `time` in place; what would sound before its scene begins or after it ends is cut, with a short fade."""
    first, start = round(time * rate), round(begin * rate)
    late = first < start
    wave = wave[max(0, start - first):]
    first = max(start, first)
    last = min(first + len(wave), round(end * rate), len(out))
    if last - first < 8:
        return
    piece = wave[:last - first].copy()
    fade = min(len(piece), int(0.005 * rate))
    ramp = np.linspace(1, 0, fade, dtype=np.float32)
    piece[len(piece) - fade:] *= ramp
    if late:
        piece[:fade] *= ramp[::-1]
    out[first:last] += piece
