"""Interlaced video comes out as whole pictures at its own rate, as the scene was filmed."""

import fractions

import av
import numpy as np
import pytest

from data_pipelines import media

FPS = 25
HEIGHT, WIDTH = 96, 128
FRAMES = 40
# Field order of setfield -> which lines are taken first.
FIRST_LINE = {'tff': 0, 'bff': 1}
# Decoded lines of an H.264 file that is hardly compressed differ by noise of about 0.5.
NOISE = 1.5


def scene(time):
    """uint8 [H W 3]: a bright bar that moves by 120 pixels a second over soft stripes."""
    columns = np.arange(WIDTH)
    bar = np.where((columns - 120 * time) % WIDTH < 24, 200, 40)
    stripes = 10 * np.sin(np.arange(HEIGHT) / 9)
    gray = (bar[None, :] + stripes[:, None]).astype(np.uint8)
    return np.stack([gray] * 3, axis=-1)


def woven(number, order):
    """The picture of a camera that takes every other line, and half a picture later the others."""
    first = FIRST_LINE[order]
    picture = scene(number / FPS)
    picture[1 - first :: 2] = scene((number + 0.5) / FPS)[1 - first :: 2]
    return picture


def marking_filter(order, picture):
    """A graph that marks pictures as interlaced, with this line first."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=WIDTH, height=HEIGHT, format=picture.format, time_base=picture.time_base
    )
    graph.link_nodes(source, graph.add('setfield', f'mode={order}'), graph.add('buffersink'))
    graph.configure()
    return graph


def write(path, codec, pictures, order=None):
    with av.open(str(path), 'w') as file:
        stream = file.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, 'yuv420p'
        stream.options = {'crf': '10'} if codec == 'libx264' else {'b': '6000000', 'qscale': '2'}
        if order:
            stream.options = {**stream.options, 'flags': '+ildct+ilme'}
        graph = None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24').reformat(format='yuv420p')
            frame.pts, frame.time_base = number, fractions.Fraction(1, FPS)
            if order:
                graph = graph or marking_filter(order, frame)
                graph.push(frame)
                frame = graph.vpull()
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def frames_of(path, **part):
    return np.stack(list(media.read(path, FPS, HEIGHT, 0, **part).frames)).astype(float)


def combing(frames):
    """How far a line lies from the mean of the lines above and below it."""
    return np.abs(frames[:, 1:-1] - (frames[:, :-2] + frames[:, 2:]) / 2).mean()


@pytest.mark.parametrize('codec, suffix', [('libx264', 'mp4'), ('mpeg2video', 'mpg')])
@pytest.mark.parametrize('order', sorted(FIRST_LINE))
def test_moving_edges_are_whole(tmp_path, codec, suffix, order):
    path = tmp_path / f'television.{suffix}'
    pictures = [woven(number, order) for number in range(FRAMES)]
    write(path, codec, pictures, order)
    frames = frames_of(path)
    filmed = np.stack([scene(number / FPS) for number in range(FRAMES)]).astype(float)
    assert frames.shape == filmed.shape
    assert combing(np.stack(pictures).astype(float)) > 5
    assert combing(frames) < combing(filmed) + 0.5
    # Each at its own time: half a picture later, the bar is 2.4 pixels further.
    for frame, expected in zip(frames, filmed):
        assert np.abs(frame - expected).mean() < NOISE


def test_a_part_is_that_of_the_whole(tmp_path):
    path = tmp_path / 'television.mp4'
    write(path, 'libx264', [woven(number, 'tff') for number in range(FRAMES)], 'tff')
    np.testing.assert_array_equal(
        frames_of(path, part=(0.4, 0.8)), frames_of(path)[round(0.4 * FPS) : round(0.8 * FPS)]
    )


def test_what_is_not_marked_is_left_as_it_is(tmp_path):
    """Fine horizontal lines, which a filter would blur."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[::2] = 255
    path = tmp_path / 'lines.mp4'
    write(path, 'libx264', [picture] * 10)
    assert np.abs(frames_of(path) - picture).mean() < 10
