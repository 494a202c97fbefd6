"""Pictures and sounds as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image


def png(image: UInt8[np.ndarray, 'H W 3']) -> str:
    """A picture, exactly; for few colours, such as matrices."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG', optimize=True)
    return uri('image/png', file.getvalue())


def jpeg(image: UInt8[np.ndarray, 'H W 3'], quality: int = 75) -> str:
    """A picture, in a tenth of the bytes; for frames of films."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality, optimize=True)
    return uri('image/jpeg', file.getvalue())


def wav(samples: Int16[np.ndarray, ' S'], rate: int) -> str:
    """A mono sound. rate: samples a second."""
    file = io.BytesIO()
    with wave.open(file, 'wb') as writer:
        writer.setnchannels(1)
        # Bytes of a sample.
        writer.setsampwidth(2)
        writer.setframerate(rate)
        # WAV is little-endian, whatever the machine is.
        writer.writeframes(samples.astype('<i2').tobytes())
    return uri('audio/wav', file.getvalue())


def uri(kind: str, content: bytes) -> str:
    """A data URI. kind: the media type."""
    return f'data:{kind};base64,{base64.b64encode(content).decode()}'
