"""What files are that are called like media files: empty ones, web pages, half a download."""

from __future__ import annotations

import contextlib
import os

_PROBE_BYTES = 512
# What the first bytes of a file are, in lower case -> what it is, and what to do about it.
_SIGNS = (
    (
        b'<!doctype html',
        'a web page: the address asked for a login or was wrong; download it again',
    ),
    (b'<html', 'a web page: the address asked for a login or was wrong; download it again'),
    (b'version https://git-lfs', 'a pointer of Git LFS: fetch its content with git lfs pull'),
    (b'/annex/objects/', 'a pointer of git-annex: fetch its content with git annex get'),
    (b'pk\x03\x04', 'an archive: unpack it first'),
    (b'\x1f\x8b', 'an archive: unpack it first'),
    (b'rar!', 'an archive: unpack it first'),
    (b'7z\xbc\xaf', 'an archive: unpack it first'),
)
# FFmpeg plays what these name, wherever on this machine or in the network that lies. Their first
# bytes, or an element near the beginning.
_PLAYLIST_SIGNS = (b'#extm3u', b'ffconcat version')
_PLAYLIST_ELEMENTS = (b'<mpd', b'<compositionplaylist', b'\nc=in ip')
_PLAYLIST_BYTES = 1 << 16
# The same as formats of FFmpeg, where the file hid it from us.
PLAYLIST_FORMATS = frozenset({'hls', 'dash', 'concat', 'imf', 'sdp', 'webm_dash_manifest'})
PLAYLIST = 'a playlist: download the video itself'
# Boxes of an mp4 file that say where its samples lie: of the whole, or of the first fragment.
_INDEXES = (b'moov', b'moof')


def explain(path: str | os.PathLike) -> str:
    """Say what a file is that no decoder opens; '' where its first bytes tell nothing.

    Args:
        path: the file.
    """
    with contextlib.suppress(OSError):
        if not os.path.isfile(path):
            return ''
        size = os.path.getsize(path)
        if not size:
            return 'empty: it has no bytes; copy or download it again'
        with open(path, 'rb') as stream:
            begin = stream.read(_PROBE_BYTES)
        if not begin.strip(b'\0'):
            return 'empty: it begins with zeros, as a download that was broken off'
        if is_playlist(path):
            return PLAYLIST
        for sign, meaning in _SIGNS:
            if begin.lstrip().lower().startswith(sign):
                return meaning
        if begin[4:8] == b'ftyp' and _find_index(path, size) is None:
            return 'truncated: its index (moov) is missing, as in recordings that were broken off'
    return ''


def is_playlist(path: str | os.PathLike) -> bool:
    """Whether a file only names others, which a reader would follow anywhere.

    Args:
        path: the file.
    """
    with contextlib.suppress(OSError):
        with open(path, 'rb') as stream:
            begin = stream.read(_PROBE_BYTES).removeprefix(b'\xef\xbb\xbf').lstrip().lower()
            if begin.startswith(_PLAYLIST_SIGNS):
                return True
            # Containers of media have zeros in their headers, and text has none.
            if b'\0' in begin:
                return False
            text = begin + stream.read(_PLAYLIST_BYTES).lower()
        return any(element in text for element in _PLAYLIST_ELEMENTS)
    return False


def has_cut_index(path: str | os.PathLike) -> bool:
    """Whether an mp4 file ends within its index, which then lists some of its tracks only.

    Args:
        path: the file.
    """
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            size = os.path.getsize(path)
            index_end = _find_index(path, size)
            return index_end is not None and index_end > size
    return False


def _find_index(path: str | os.PathLike, size: int) -> int | None:
    """Byte at which the index of an mp4 file ends; None without one."""
    position = 0
    with open(path, 'rb') as stream:
        while position < size:
            stream.seek(position)
            header = stream.read(16)
            length, kind = int.from_bytes(header[:4], 'big'), header[4:8]
            if length == 1:
                # Sizes above 4 GiB stand behind the name.
                length = int.from_bytes(header[8:16], 'big')
            if kind in _INDEXES:
                return position + length
            if length < 8:  # up to the end of the file, or no box
                return None
            position += length
    return None
