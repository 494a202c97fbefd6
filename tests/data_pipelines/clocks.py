"""Videos whose brightness and loudness tell the time."""

import wave

import numpy as np

FPS, RATE, SIZE = 10, 8000, 64
PIECE = 320  # samples over which loudness is measured: 0.04 s, twenty periods of the tone


def brightness(seconds):
    """uint8 brightness that a clock shows at these times."""
    return (20 + 60 * seconds).astype(np.uint8)


def clock(seconds, height=SIZE, width=SIZE, fps=FPS, rate=RATE, sound=True):
    """A video that tells the time.

    At second t brightness is 20 + 60 t and loudness 2000 + 8000 t, up to 3.5 s.

    Args:
      seconds: length.
      height: of the frames.
      width: of the frames.
      fps: frames per second.
      rate: samples per second.
      sound: whether there is any.

    Returns:
      frames uint8 [T H W 3], and audio int16 [S] or None.
    """
    frame_times = np.arange(round(seconds * fps)) / fps
    gray = brightness(frame_times)[:, None, None, None]
    frames = np.broadcast_to(gray, (len(frame_times), height, width, 3)).copy()
    if not sound:
        return frames, None
    sample_times = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * 500 * sample_times)
    return frames, ((2000 + 8000 * sample_times) * tone).astype(np.int16)


def video_time(frames):
    """Seconds [...] that frames [... H W 3] show."""
    return (frames.astype(np.float64).mean((-1, -2, -3)) - 20) / 60


def audio_time(pcm, piece=PIECE):
    """Seconds [... n] that the pieces of sound [... S] tell.

    Peak loudness of a piece of a sine is sqrt(2) times its root mean square; it is that of the
    middle of the piece.
    """
    num_pieces = pcm.shape[-1] // piece
    pieces = pcm[..., : num_pieces * piece].reshape(*pcm.shape[:-1], num_pieces, piece)
    root_mean_square = np.sqrt((pieces.astype(np.float64) ** 2).mean(-1))
    return (root_mean_square * np.sqrt(2) - 2000) / 8000


def piece_middles(count, rate=RATE, piece=PIECE):
    """Seconds [count] in whose neighbourhood each piece of `audio_time` lies."""
    return (np.arange(count) + 0.5) * piece / rate


def write_wav(path, audio, rate=RATE):
    """A wav file of one channel, int16 [S]."""
    with wave.open(str(path), 'wb') as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(audio.astype('<i2').tobytes())
