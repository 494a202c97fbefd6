"""Episodes to sound: every event is heard at its instant, in the voice of its object."""

from __future__ import annotations

import numpy as np

from data_pipelines.datasets.playground.world import GLIDE, Config, Episode

# Hz of the lowest tone: small things sound high.
PITCH = {'small': 310.0, 'medium': 280.0, 'large': 250.0}
# The four tones that every voice is made of, in multiples of the lowest.
TONES = (1.0, 1.7, 2.9, 4.9)
# Kind -> the chords it alternates between, as numbers of TONES. Over time every kind has as much of
# each tone; what tells the kinds apart is which tones sound together.
VOICES: dict[str, tuple[tuple[int, ...], ...]] = {
    'disc': ((0, 1), (2, 3)),
    'ring': ((0, 2), (1, 3)),
    'plank': ((0, 3), (1, 2)),
    'pole': ((0, 1, 2, 3),),
}
# Seconds of one chord, and those for which an impact is heard.
CHORD = 0.16
IMPACT = 2 * CHORD
# Seconds in which a chord comes or goes.
EDGE = 0.006
# Octaves by which the pitch has moved at the end.
BEND = {'impact': 0.0, 'appear': 0.4, 'vanish': -0.4}
# Of a tone at full strength, as a share of full scale: large things are loud.
LOUDNESS = {'small': 0.16, 'medium': 0.25, 'large': 0.4}
# Seconds in which a sound that is cut off fades.
FADE = 0.005
# Fewer samples than this are not worth adding.
SHORTEST = 8


def waveform(config: Config, episodes: list[Episode], rng: np.random.Generator) -> np.ndarray:
    """int16 [S]: the sounds of all episodes over faint noise."""
    total = round(config.seconds * config.rate)
    # A second more, into which the last sounds may run.
    wave = np.zeros(total + config.rate, np.float32)
    for episode in episodes:
        subject = episode.subject
        pitch = PITCH[subject.size] * rng.uniform(0.97, 1.03)
        # The distance of the microphone.
        loudness = LOUDNESS[subject.size] * rng.uniform(0.85, 1.0)
        for time, event, strength in episode.sounds:
            sound = note(config.rate, subject.kind, event, pitch, rng)
            scaled = loudness * strength * sound
            add(wave, config.rate, time, episode.begin, episode.end, scaled)
    noise = rng.standard_normal(total, dtype=np.float32) * config.sound_noise
    return (np.clip(wave[:total] + noise, -1, 1) * 32767).astype(np.int16)


def note(rate: int, kind: str, event: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    """The sound of one event.

    An impact is short; what appears bends upwards, and what vanishes downwards, for longer.

    Args:
        rate: samples a second.
        kind: of the object, whose voice it is.
        event: 'impact', 'appear' or 'vanish'.
        pitch: Hz of the lowest tone at the start.

    Returns:
        float32 [S].
    """
    seconds = IMPACT if event == 'impact' else GLIDE
    t = np.arange(int(seconds * rate)) / rate
    cycles = pitch * np.cumsum(2 ** (BEND[event] * t / seconds)) / rate
    chords = VOICES[kind]
    # In [0, 2): which of two chords sounds, and how far through it the time is. The first one is
    # drawn.
    turn = (t / CHORD + rng.integers(2)) % 2
    wave = np.zeros(len(t))
    for number, chord in enumerate(chords):
        gate = chord_gate(turn, number) if len(chords) > 1 else 0.5
        for tone in chord:
            phase = rng.uniform()
            wave += gate * np.sin(2 * np.pi * (TONES[tone] * cycles + phase))
    envelope = np.clip(np.minimum(t, seconds - t) / EDGE, 0, 1)
    return (wave * envelope).astype(np.float32)


def chord_gate(turn: np.ndarray, number: int) -> np.ndarray:
    """[S]: 1 while a chord is on, 0 while it is off, with edges of EDGE seconds."""
    from_middle = np.abs(turn - 0.5 - number)
    return np.clip(0.5 + (0.5 - from_middle) * CHORD / EDGE, 0, 1)


def add(
    out: np.ndarray, rate: int, time: float, begin: float, end: float, wave: np.ndarray
) -> None:
    """Adds `wave` at `time` in place.

    What would sound before its scene begins or after it ends is cut, with a short fade.
    """
    first, scene_start = round(time * rate), round(begin * rate)
    starts_early = first < scene_start
    wave = wave[max(0, scene_start - first) :]
    first = max(scene_start, first)
    last = min(first + len(wave), round(end * rate), len(out))
    if last - first < SHORTEST:
        return
    piece = wave[: last - first].copy()
    fade = min(len(piece), int(FADE * rate))
    ramp = np.linspace(1, 0, fade, dtype=np.float32)
    piece[len(piece) - fade :] *= ramp
    if starts_early:
        piece[:fade] *= ramp[::-1]
    out[first:last] += piece
