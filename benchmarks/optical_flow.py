"""Optical flow of 8 bits: how it is stored, what that costs, and by how much it is off.

    python benchmarks/optical_flow.py [--clips=2]

The clips are those of benchmarks/input_pipeline.py (100 frames of 256 x 340 at 10 a second, a
camera that pans and zooms, moving objects, noise). Their flow is computed by dis, quantised, and
stored in each form; the error is the decoded value against the quantised one, in pixels. CPU
seconds are of one thread. Writes benchmarks/results/optical_flow.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import input_pipeline
import numpy as np
import tensorflow as tf
from PIL import Image

from data_pipelines import media
from vatt_jax.inputs import optical_flow

RESULTS = pathlib.Path(__file__).parent / 'results' / 'optical_flow.json'
PIXELS = optical_flow.BOUND / optical_flow.STEPS  # of a step


def planes_of(flow: np.ndarray) -> np.ndarray:
    """[T rows W]: as `prepare` stores them."""
    return np.stack([optical_flow.to_planes(values) for values in flow])


def as_jpeg(planes: np.ndarray, quality: int) -> tuple[list[int], np.ndarray]:
    """Bytes of each flow, and the planes that come back."""
    encoded = [media.encode_jpeg(plane, quality) for plane in planes]
    decoded = [tf.image.decode_jpeg(jpeg, channels=1).numpy()[..., 0] for jpeg in encoded]
    return [len(jpeg) for jpeg in encoded], np.stack(decoded)


def as_jpeg_of_three(planes: np.ndarray, quality: int) -> tuple[list[int], np.ndarray]:
    """The same, the planes as two colours of three, which JPEG leaves as they are."""
    sizes, decoded = [], []
    for plane in planes:
        first, second = np.split(plane, 2)
        colours = np.stack([first, second, np.full_like(first, optical_flow.ZERO)], -1)
        stream = io.BytesIO()
        Image.fromarray(colours).save(stream, 'JPEG', quality=quality, keep_rgb=True, subsampling=0)
        sizes.append(len(stream.getvalue()))
        back = tf.image.decode_jpeg(stream.getvalue(), channels=3).numpy()
        decoded.append(np.concatenate([back[..., 0], back[..., 1]]))
    return sizes, np.stack(decoded)


def as_png(planes: np.ndarray, _: int) -> tuple[list[int], np.ndarray]:
    sizes = []
    for plane in planes:
        stream = io.BytesIO()
        Image.fromarray(plane).save(stream, 'PNG')
        sizes.append(len(stream.getvalue()))
    return sizes, planes


def as_h264(planes: np.ndarray, crf: int) -> tuple[list[int], np.ndarray]:
    grey = [np.repeat(plane[..., None], 3, -1) for plane in planes]
    packets = media.encode_h264(iter(grey), input_pipeline.FPS, crf)
    decoded = media.decode_h264(packets, list(range(len(packets))), 'rgb24')
    return [len(packet) for packet in packets], decoded[..., 0]


Form = Callable[[np.ndarray, int], tuple[list[int], np.ndarray]]
FORMS: dict[str, tuple[Form, int]] = {
    'jpeg 75': (as_jpeg, 75),
    'jpeg 90': (as_jpeg, 90),
    'jpeg 95': (as_jpeg, 95),
    'jpeg of three planes 90': (as_jpeg_of_three, 90),
    'png': (as_png, 0),
    'h264 crf 10': (as_h264, 10),
    'h264 crf 18': (as_h264, 18),
}


def measure(name: str, planes: np.ndarray) -> dict[str, float]:
    form, setting = FORMS[name]
    sizes, decoded = form(planes, setting)
    errors = np.abs(decoded.astype(int) - planes) * PIXELS
    return {
        'bytes': round(float(np.mean(sizes))),
        'mean': round(float(errors.mean()), 3),
        'rms': round(float(np.sqrt((errors**2).mean())), 3),
        'largest': round(float(errors.max()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description='Optical flow of 8 bits.')
    parser.add_argument('--clips', type=int, default=2)
    clips = parser.parse_args().clips

    all_planes, num_frames, seconds, frame_bytes = [], 0, 0.0, 0
    for number in range(clips):
        frames, _ = input_pipeline.clip(number)
        begin = time.process_time()
        with optical_flow.one_thread():
            flow = optical_flow.of_frames(list(frames), 'dis')
        seconds += time.process_time() - begin
        num_frames += len(frames)
        frame_bytes += sum(len(media.encode_jpeg(frame, 90)) for frame in frames)
        all_planes.append(planes_of(flow))
    planes = np.concatenate(all_planes)

    results = {
        'clips': clips,
        'frames': num_frames,
        'dis_ms_a_frame': round(1000 * seconds / num_frames, 2),
        'jpeg_90_bytes_of_a_frame': round(frame_bytes / num_frames),
        'forms': {name: measure(name, planes) for name in FORMS},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
