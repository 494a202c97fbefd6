"""Episodes to sound: every event is heard at its instant, in the voice of the object it happens to."""

from __future__ import annotations

import numpy as np

from data_pipelines.datasets.playground.world import GLIDE, SIZES, Config, Episode

PITCH = {
    'small': 310.0,
    'medium': 280.0,
    'large': 250.0,
}  # Hz of the lowest tone: small things sound high
TONES = (1.0, 1.7, 2.9, 4.9)  # the four tones every voice is made of, in multiples of the lowest
# kind -> the chords it alternates between. Over time every kind has as much of each tone; what tells them apart is which sound together.
VOICES = {
    'disc': ((0, 1), (2, 3)),
    'ring': ((0, 2), (1, 3)),
    'plank': ((0, 3), (1, 2)),
    'pole': ((0, 1, 2, 3),),
}
CHORD = 0.16  # seconds of one chord
IMPACT = 2 * CHORD  # seconds an impact is heard
EDGE = 0.006  # seconds in which a chord comes or goes
BEND = {
    'impact': 0.0,
    'appear': 0.4,
    'vanish': -0.4,
}  # octaves by which the pitch has moved at the end
LOUDNESS = {
    'small': 0.16,
    'medium': 0.25,
    'large': 0.4,
}  # of a tone at full strength, share of full scale: large things are loud


def waveform(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """int16 [S]: the sounds of all episodes over faint noise."""
    total = round(config.seconds * config.rate)
    out = np.zeros(total + config.rate, np.float32)
    for e in episodes:
        assert e.subject.size in SIZES
        pitch = PITCH[e.subject.size] * rng.uniform(0.97, 1.03)
        loud = LOUDNESS[e.subject.size] * rng.uniform(0.85, 1.0)  # the microphone's distance
        for time, what, strength in e.sounds:
            add(
                out,
                config.rate,
                time,
                e.begin,
                e.end,
                loud * strength * note(config.rate, e.subject.kind, what, pitch, rng),
            )
    out = out[:total] + rng.standard_normal(total, dtype=np.float32) * config.sound_noise
    return (np.clip(out, -1, 1) * 32767).astype(np.int16)


def note(rate: int, kind: str, what: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """float32: an impact (short), or something that appears (long, bending upwards) or vanishes (bending downwards)."""
    seconds = IMPACT if what == 'impact' else GLIDE
    t = np.arange(int(seconds * rate)) / rate
    cycles = pitch * np.cumsum(2 ** (BEND[what] * t / seconds)) / rate
    chords = VOICES[kind]
    turn = (t / CHORD + rng.integers(2)) % 2
    wave = np.zeros(len(t))
    for number, chord in enumerate(chords):
        gate = (
            0.5
            if len(chords) == 1
            else np.clip(0.5 + (0.5 - np.abs(turn - 0.5 - number)) * CHORD / EDGE, 0, 1)
        )
        for tone in chord:
            wave += gate * np.sin(2 * np.pi * (TONES[tone] * cycles + rng.uniform()))
    return (wave * np.clip(np.minimum(t, seconds - t) / EDGE, 0, 1)).astype(np.float32)


def add(
    out: np.ndarray, rate: int, time: float, begin: float, end: float, wave: np.ndarray
) -> None:
    """Adds `wave` at `time` in place; what would sound before its scene begins or after it ends is cut, with a short fade."""
    first, start = round(time * rate), round(begin * rate)
    late = first < start
    wave = wave[max(0, start - first) :]
    first = max(start, first)
    last = min(first + len(wave), round(end * rate), len(out))
    if last - first < 8:
        return
    piece = wave[: last - first].copy()
    fade = min(len(piece), int(0.005 * rate))
    ramp = np.linspace(1, 0, fade, dtype=np.float32)
    piece[len(piece) - fade :] *= ramp
    if late:
        piece[:fade] *= ramp[::-1]
    out[first:last] += piece
