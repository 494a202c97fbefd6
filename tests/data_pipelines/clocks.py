"""Videos whose brightness and loudness tell the time."""

import wave

import numpy as np

FPS, RATE, SIZE = 10, 8000, 64


def clock(seconds, height=SIZE, width=SIZE, fps=FPS, rate=RATE, sound=True):
    """(frames uint8 [T H W 3], audio int16 [S]): at second t brightness is 20 + 60 t and loudness 2000 + 8000 t (up to 3.5 s)."""
    t = np.arange(round(seconds * fps)) / fps
    frames = np.broadcast_to(
        (20 + 60 * t).astype(np.uint8)[:, None, None, None], (len(t), height, width, 3)
    ).copy()
    s = np.arange(round(seconds * rate)) / rate
    audio = ((2000 + 8000 * s) * np.sin(2 * np.pi * 500 * s)).astype(np.int16)
    return frames, audio if sound else None


def video_time(frames):
    """Seconds that frames [..., H W 3] show."""
    return (frames.astype(np.float64).mean((-1, -2, -3)) - 20) / 60


def audio_time(pcm, rate=RATE, piece=320):
    """Seconds told by pieces [n] of sound [S]: peak loudness of each piece, which lies about its middle."""
    pieces = (
        pcm[..., : pcm.shape[-1] // piece * piece]
        .reshape(*pcm.shape[:-1], -1, piece)
        .astype(np.float64)
    )
    return (np.sqrt((pieces**2).mean(-1)) * np.sqrt(2) - 2000) / 8000


def write_wav(path, audio, rate=RATE):
    with wave.open(str(path), 'wb') as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(audio.astype('<i2').tobytes())
