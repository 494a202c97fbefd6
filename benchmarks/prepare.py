"""Disk and time of preparing a thousand clips of each named dataset.

    python benchmarks/prepare.py            # some minutes
    python benchmarks/prepare.py --quick    # one file of each, no result file

For each dataset files are made with the codecs, picture size, rates and typical length of its clips
(FORMS; the pictures are those of input_pipeline.py), and go through data_pipelines.prepare's own
decoding with its default settings (10 frames a second of short side 256, JPEG of quality 90, sound
at 48 kHz). Written are bytes of records, CPU seconds for a thousand clips, and half of these as the
minutes on two cores. Videos of minutes are measured on 30 s and scaled.

What is not in it: reading slow disks, and writing the records, a copy. Real videos compress and
decode differently: take the numbers as orders of magnitude. Writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import fractions
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import av
import input_pipeline
import numpy as np
from PIL import Image
from support import repository

from data_pipelines.preparation import decoded_files

RESULTS = repository.RESULTS / 'prepare.json'

STORES = {'jpeg': 0, 'h264': 23}  # crf; 0: pictures as JPEG


class Form(NamedTuple):
    """A dataset's clips. Codecs '' and numbers 0 where a clip has no such stream."""

    container: str
    video_codec: str
    width: int
    height: int
    fps: int
    audio_codec: str
    audio_rate: int
    seconds: float
    seconds_measured: float


WEB = ('mp4', 'libx264', 340, 256, 30, 'aac', 44100)
FORMS = {
    'ucf101': Form('avi', 'mpeg4', 320, 240, 25, 'mp3', 44100, 7.2, 7.2),
    'hmdb51': Form('avi', 'mpeg4', 320, 240, 30, '', 0, 3.2, 3.2),
    'kinetics400, 600, 700': Form(*WEB, 10, 10),
    'moments_in_time': Form(*WEB, 3, 3),
    'esc50': Form('wav', '', 0, 0, 0, 'pcm_s16le', 44100, 5, 5),
    'audioset': Form(*WEB, 10, 10),
    'vggsound': Form(*WEB, 10, 10),
    'ave': Form(*WEB, 10, 10),
    'youcook2': Form(*WEB, 316, 30),
    'msrvtt, msrvtt_full': Form('mp4', 'libx264', 320, 240, 30, 'aac', 44100, 15, 15),
    'howto100m': Form(*WEB, 390, 30),
    'imagenet': Form('JPEG', '', 500, 375, 0, '', 0, 0, 0),
}


def resized(frame: np.ndarray, form: Form) -> Image.Image:
    """The frame at the form's size."""
    return Image.fromarray(frame).resize((form.width, form.height))


def add_video(out: Any, form: Form, frames: np.ndarray) -> tuple[Any, list]:
    """Adds a video stream.

    Args:
        out: container open for writing.
        form: of the file.
        frames: uint8 [T, H, W, 3] at 10 a second, repeated as often as it takes.

    Returns:
        The stream and the frames to encode.
    """
    options = {'threads': '1'}
    if form.video_codec == 'libx264':
        options |= {'crf': '23', 'preset': 'veryfast'}
    else:
        options |= {'qmin': '3', 'qmax': '6'}
    stream = out.add_stream(form.video_codec, rate=fractions.Fraction(form.fps), options=options)
    stream.width = form.width
    stream.height = form.height
    stream.pix_fmt = 'yuv420p'
    if form.video_codec == 'mpeg4':
        stream.bit_rate = 1_500_000
    pieces = []
    for i in range(round(form.seconds_measured * form.fps)):
        frame = resized(frames[i * 10 // form.fps % len(frames)], form)
        pieces.append(av.VideoFrame.from_ndarray(np.asarray(frame), format='rgb24'))
    return stream, pieces


def add_audio(out: Any, form: Form, pcm: np.ndarray) -> tuple[Any, list]:
    """Adds a stereo stream.

    Args:
        out: container open for writing.
        form: of the file.
        pcm: int16 [samples], repeated as often as it takes.

    Returns:
        The stream and the frames to encode.
    """
    rate = form.audio_rate
    stream = out.add_stream(form.audio_codec, rate=rate, layout='stereo')
    stereo = np.repeat(np.resize(pcm, round(form.seconds_measured * rate)), 2)[None]
    frame = av.AudioFrame.from_ndarray(stereo, format='s16', layout='stereo')
    frame.sample_rate = rate
    frame.pts = 0
    sample_format = stream.codec_context.codec.audio_formats[0].name
    resampler = av.AudioResampler(format=sample_format, layout='stereo', rate=rate)
    return stream, [*resampler.resample(frame), *resampler.resample(None)]


def write_clip(path: str, form: Form, number: int) -> None:
    """Writes a file of the form with the pictures and the sound of input_pipeline's clip."""
    frames, pcm = input_pipeline.clip(number)
    if form.container == 'JPEG':
        resized(frames[0], form).save(path, 'JPEG', quality=92)
        return
    with av.open(path, 'w') as out:
        tracks = []
        if form.video_codec:
            tracks.append(add_video(out, form, frames))
        if form.audio_codec:
            tracks.append(add_audio(out, form, pcm))
        for stream, pieces in tracks:
            for piece in pieces:
                out.mux(stream.encode(piece))
            out.mux(stream.encode())


def stage(path: str, crf: int, target: str) -> tuple[int, float]:
    """Prepares a file with default settings.

    Args:
        path: of the file.
        crf: of H.264; 0: pictures as JPEG.
        target: the staged file, written over.

    Returns:
        Bytes of the staged file, and CPU seconds.

    Raises:
        SystemExit: the file is skipped.
    """
    settings = decoded_files.Settings(10.0, 256, 48000, 90, 0.0, crf)
    began = input_pipeline.cpu()
    decoded_files.stage_file(decoded_files.File(path, path, 0, 0), settings, target)
    seconds = input_pipeline.cpu() - began
    header = decoded_files.header(pathlib.Path(target))
    if 'skipped' in header:
        raise SystemExit(f'{path}: {header["skipped"]}')
    return os.path.getsize(target), seconds


def measure(name: str, form: Form, count: int, folder: str) -> dict:
    """A dataset's row of the result file, from `count` files."""
    row: dict[str, Any] = {'form': list(form)}
    paths = []
    for i in range(count):
        path = f'{folder}/{name[:4]}{i}.{form.container}'
        if not os.path.exists(path):
            write_clip(path, form, i)
        paths.append(path)
    scale = form.seconds / form.seconds_measured if form.seconds_measured else 1.0
    for store, crf in STORES.items():
        staged = [stage(path, crf, f'{folder}/staged/{store}') for path in paths]
        sizes, seconds = zip(*staged)
        row[store] = {
            'bytes': round(scale * statistics.mean(sizes)),
            'cpu_seconds': round(scale * statistics.mean(seconds), 3),
        }
    return row


def print_row(name: str, row: dict) -> None:
    """GB of a thousand clips, and minutes on two cores."""
    jpeg, h264 = row['jpeg'], row['h264']
    jpeg_gb, h264_gb = jpeg['bytes'] / 1e6, h264['bytes'] / 1e6
    jpeg_minutes, h264_minutes = jpeg['cpu_seconds'] * 1000 / 120, h264['cpu_seconds'] * 1000 / 120
    print(
        f'{name:24s} {jpeg_gb:12.2f} {h264_gb:10.2f} {jpeg_minutes:21.1f} {h264_minutes:10.1f}',
        flush=True,
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--files', type=int, default=3, help='of each dataset')
    parser.add_argument('--quick', action='store_true', help='one file of each, no result file')
    flags = parser.parse_args()
    count = 1 if flags.quick else flags.files
    table = {}
    print(
        f'{"":24s} {"GB for JPEG":>12s} {"for H.264":>10s} '
        f'{"minutes on two cores":>21s} {"for H.264":>10s}     (1000 clips)'
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, form in FORMS.items():
            table[name] = measure(name, form, count, folder)
            print_row(name, table[name])
    if flags.quick:
        return
    commit = repository.git('rev-parse', 'HEAD')
    results = {
        'commit': commit,
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'files': count,
        'datasets': table,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
