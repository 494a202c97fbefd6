"""Pictures and sounds as data URIs, so that a page is one file."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib

import numpy as np
from jaxtyping import Int16, UInt8


def png(image: UInt8[np.ndarray, 'H W 3']) -> str:
    """A picture. PNG is a zlib stream in three chunks, so no picture library is needed."""
    height, width, _ = image.shape
    # Each row begins with its filter, of which 0 is none.
    rows = image.reshape(height, width * 3)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1).tobytes()
    # 8 bits a channel, colour type 2 (RGB), the only compression and filter method, not interlaced.
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    data = (
        b'\x89PNG\r\n\x1a\n'
        + _png_chunk(b'IHDR', header)
        + _png_chunk(b'IDAT', zlib.compress(filtered, 9))
        + _png_chunk(b'IEND', b'')
    )
    return 'data:image/png;base64,' + base64.b64encode(data).decode()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    # The length counts the data alone, the checksum also the kind.
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)


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
    return 'data:audio/wav;base64,' + base64.b64encode(file.getvalue()).decode()
