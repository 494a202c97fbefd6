"""Time stamps that restart: files that were joined end to end, recordings whose sender restarted.

The parts of a DVD, of a broadcast or of a web radio follow each other in one file, and each may
count from zero again. Only the packets of pictures and sound together tell where the next part
begins: laid end to end by itself, each track would drift away from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Containers without an index of times: their parts can be joined by writing them behind each other.
_JOINABLE = ('mpegts', 'mpeg', 'ogg', 'matroska,webm', 'flv', 'nut')
# Of these, FFmpeg estimates the length by the first and the last time stamp.
_ESTIMATED = ('mpegts', 'mpeg', 'ogg')
# Seconds by which a track goes back where a new part begins; less is a clock that is inexact.
_RESTART = 1.0
# Seconds by which a track goes ahead that may be the damage of a single time stamp.
_LEAP = 10.0


def packets(container: Any, stream: Any, others: list[Any]) -> Iterator[Any]:
    """Yield the packets of one track, with time stamps that go on where those of the file restart.

    Args:
        container: an opened file.
        stream: the track.
        others: tracks that play along with it.
    """
    if container.format.name not in _JOINABLE:
        yield from container.demux(stream)
        return
    clock = _Clock()
    tracks = {track.index: track for track in [stream, *others]}
    for packet in container.demux(*tracks.values()):
        clock.advance(packet)
        if packet.stream.index == stream.index:
            yield packet


def restarts(container: Any, tracks: list[Any]) -> bool:
    """Whether the clock of a file restarts, so that its length is not what FFmpeg estimates.

    All packets are read for it, where the container has no header that would say more.

    Args:
        container: an opened file.
        tracks: whose time stamps count.
    """
    if container.format.name not in _ESTIMATED:
        return False
    clock = _Clock()
    for packet in container.demux(*tracks):
        clock.advance(packet)
        if clock.has_restarted:
            return True
    return False


class _Clock:
    """Adds to the time stamps of each part the length of those before it."""

    def __init__(self) -> None:
        self._offset = 0.0  # seconds
        self._end = 0.0  # of all tracks so far, in seconds
        self._last: dict[int, float] = {}  # track -> time of its last packet
        self._before_leap: dict[int, float] = {}  # track -> where it was when it last leapt ahead

    @property
    def has_restarted(self) -> bool:
        return self._offset != 0.0

    def advance(self, packet: Any) -> None:
        """Correct the time stamps of the next packet of the file, in place."""
        # By the order of decoding: pictures that look ahead are shown in another one.
        if packet.dts is not None:
            self._follow(packet)
        if self._offset:
            ticks = round(self._offset / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts + ticks
            packet.dts = None if packet.dts is None else packet.dts + ticks

    def _follow(self, packet: Any) -> None:
        track = packet.stream.index
        time = float(packet.dts * packet.time_base) + self._offset
        last = self._last.get(track, time)
        if time < last - _RESTART and not self._is_return(track, time):
            self._offset += self._end - time
            time = self._end
        elif time > last + _LEAP:
            self._before_leap[track] = last
        self._last[track] = time
        seconds = float((packet.duration or 0) * packet.time_base)
        self._end = max(self._end, time + seconds)

    def _is_return(self, track: int, time: float) -> bool:
        """Whether a track comes back from a damaged time stamp to where it was."""
        return abs(time - self._before_leap.get(track, float('-inf'))) < _LEAP
