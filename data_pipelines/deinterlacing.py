"""Interlaced video -> whole pictures, by FFmpeg's filter bwdif.

Cameras of television and DV take the odd and the even lines of a picture at different times. Shown
together, what moves has combed edges. Of each picture the lines that were taken first stay, and
the others are interpolated from them and from the neighbouring pictures, so that the rate of
pictures and their time stamps stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import av

# One picture for each picture; the order of the lines and whether a picture is interlaced at all
# are what the picture itself says.
_OPTIONS = 'mode=send_frame:parity=auto:deint=interlaced'
# Columns and lines that the filter needs.
_LEAST_SIZE = 4


def deinterlaced(pictures: Iterable[Any]) -> Iterator[Any]:
    """Yield the pictures of a video, those that are marked as interlaced without combed edges.

    Pictures before the first interlaced one are passed on untouched, at no cost.

    Args:
        pictures: decoded (av.VideoFrame), in order.
    """
    graph = None
    form: tuple[Any, ...] = ()  # that the graph was made for
    for picture in pictures:
        if graph is None and not picture.interlaced_frame:
            yield picture
            continue
        # The size may change in the middle of a broadcast.
        new_form = (picture.width, picture.height, picture.format.name, picture.time_base)
        if graph is not None and new_form != form:
            yield from _flushed(graph)
            graph = None
        if min(picture.width, picture.height) < _LEAST_SIZE:
            yield picture
            continue
        if graph is None:
            graph = _graph(picture)
            form = new_form
        graph.push(picture)
        yield from _ready(graph)
    if graph is not None:
        yield from _flushed(graph)


def _graph(picture: av.VideoFrame) -> av.filter.Graph:
    """A filter graph for pictures such as this one."""
    graph = av.filter.Graph()
    # Files are decoded side by side; threads inside each would only compete.
    graph.threads = 1
    source = graph.add_buffer(
        width=picture.width,
        height=picture.height,
        format=picture.format,
        time_base=picture.time_base,
    )
    graph.link_nodes(source, graph.add('bwdif', _OPTIONS), graph.add('buffersink')).configure()
    return graph


def _ready(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """Yield what the filter has finished: it looks one picture ahead."""
    with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.vpull()


def _flushed(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """Yield what the filter still holds."""
    graph.vpush(None)
    yield from _ready(graph)
