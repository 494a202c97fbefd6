"""Displacements of textures that are moved by known amounts, and their values of 8 bits."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from data_pipelines import media
from vatt_jax.config import ConfigError
from vatt_jax.inputs import optical_flow

HALF_STEP = optical_flow.BOUND / optical_flow.STEPS / 2
# What DIS may miss an integer shift of a smooth texture by: two steps, a third of a pixel.
TOLERANCE = 4 * HALF_STEP


def texture(height, width, seed=0):
    """uint8 [H W 3]: smoothed noise, which has something to follow everywhere."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def moving(steps, height=64, width=96, margin=24):
    """Frames that show the texture further by each (right, down) of `steps`, in pixels."""
    large = texture(height + 2 * margin, width + 2 * margin)
    x = y = margin
    frames = []
    for right, down in [(0, 0), *steps]:
        x, y = x - right, y - down
        frames.append(large[y : y + height, x : x + width])
    return frames


STEPS = [(3, -2), (0, 0), (-5, 1), (0, 7)]


def test_the_flow_of_a_shifted_texture_is_the_shift():
    flow = optical_flow.to_pixels(optical_flow.of_frames(moving(STEPS), 'dis'))
    assert flow.shape == (5, 64, 96, 2)
    # At the edges something comes into the picture that was not there.
    inner = flow[:, 10:-10, 10:-10]
    for i, step in enumerate(STEPS):
        errors = np.abs(inner[i] - np.array(step))
        assert errors.max() < TOLERANCE, (i, errors.max())


def test_the_last_frame_has_the_flow_before_it():
    flow = optical_flow.of_frames(moving(STEPS), 'dis')
    np.testing.assert_array_equal(flow[-1], flow[-2])
    # Two clips that overlap agree where they do.
    np.testing.assert_array_equal(optical_flow.of_frames(moving(STEPS)[:3], 'dis')[:2], flow[:2])


def test_where_nothing_moves_the_flow_is_exactly_zero():
    frames = moving([(0, 0), (0, 0)])
    flow = optical_flow.of_frames(frames, 'dis')
    assert (flow == optical_flow.ZERO).all()
    assert (optical_flow.to_pixels(flow) == 0).all()
    np.testing.assert_array_equal(optical_flow.of_frames(frames[:1], 'dis'), flow[:1])


def test_a_mirrored_clip_moves_the_other_way():
    frames = moving([(4, 2)])
    flow = optical_flow.to_pixels(optical_flow.of_frames(frames, 'dis'))[0]
    mirrored = [frame[:, ::-1] for frame in frames]
    other = optical_flow.to_pixels(optical_flow.of_frames(mirrored, 'dis'))[0]
    inner = np.s_[10:-10, 10:-10]
    np.testing.assert_allclose(other[:, ::-1][inner] * [-1, 1], flow[inner], atol=2 * TOLERANCE)


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=16))
@settings(deadline=None)
def test_eight_bits_err_by_half_a_step_at_most(pixels):
    flow = np.array(pixels[: len(pixels) // 2 * 2], np.float32).reshape(-1, 2)
    found = optical_flow.to_pixels(optical_flow.quantise(flow))
    bounded = np.clip(flow, -optical_flow.BOUND, optical_flow.BOUND)
    assert np.abs(found - bounded).max() <= HALF_STEP * (1 + 1e-5)
    # Odd, so that mirrored clips are as exact as others.
    np.testing.assert_array_equal(optical_flow.to_pixels(optical_flow.quantise(-flow)), -found)


@given(st.integers(0, 255))
@settings(deadline=None)
def test_the_negative_of_a_value_is_that_of_its_pixels(value):
    values = np.full((1, 2), value, np.uint8)
    # JPEG may make 0 of 1, the smallest value; both stand for the bound.
    expected = -np.maximum(optical_flow.to_pixels(values), -optical_flow.BOUND)
    np.testing.assert_allclose(
        optical_flow.to_pixels(optical_flow.negative(values)), expected, atol=1e-5
    )


@pytest.mark.parametrize('height, width', [(16, 24), (13, 24), (20, 31)])
def test_planes_come_back_from_jpeg(height, width):
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width, 2)), (3, 3, 0))
    flow = (2 * smooth / smooth.std()).astype(np.float32)
    # Far apart, so that a block of both planes would show.
    values = optical_flow.quantise(flow + np.array([-12, 12], np.float32))
    encoded = media.encode_jpeg(optical_flow.to_planes(values), 90)
    planes = np.asarray(Image.open(io.BytesIO(encoded)))
    half = len(planes) // 2
    found = np.stack([planes[:height], planes[half : half + height]], -1)
    errors = np.abs(found.astype(int) - values)
    assert errors.max() <= 2


def test_where_nothing_moves_jpeg_changes_nothing():
    still = optical_flow.still(13, 24)
    planes = np.asarray(
        Image.open(io.BytesIO(media.encode_jpeg(optical_flow.to_planes(still), 50)))
    )
    assert (planes == optical_flow.ZERO).all()


def test_opencv_computes_in_one_thread_where_it_should():
    import cv2

    before = cv2.getNumThreads()
    with optical_flow.one_thread():
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == before


def test_a_method_that_there_is_not():
    with pytest.raises(ConfigError, match="flow='farneback': choose one of dis, tvl1"):
        optical_flow.Flows('farneback')


def test_tvl1_needs_contributed_modules():
    import cv2

    if hasattr(cv2, 'optflow'):
        frames = moving([(3, -2)])
        flow = optical_flow.to_pixels(optical_flow.of_frames(frames, 'tvl1'))[0]
        assert np.abs(flow[10:-10, 10:-10] - [3, -2]).max() < TOLERANCE
        return
    with pytest.raises(ConfigError, match='opencv-contrib-python-headless'):
        optical_flow.Flows('tvl1')
