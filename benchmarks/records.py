"""JPEG frames against short pieces of H.264 in the record, and DMVR's own record: bytes and time.

    python benchmarks/records.py [--clips=12 --rounds=7]

A clip is 10 s stored (100 frames of 256 x 384 at 10 a second, sound at 48 kHz) of which 32
consecutive frames and 3.2 s of sound are read, full frames in uint8, as the device takes them. The
pictures pan and zoom over two photographs (scikit-learn's samples) with a moving object and mild
camera noise: smooth motion flatters video a little.

Each form goes from the record's bytes to arrays through the reader's own code. CPU seconds are
user + system of all threads of this process; forms are measured in turns, and medians over the
rounds are reported. Crop, resize and colour happen on the device and are not in any of these
figures; the YUV row leaves the conversion to RGB to the device too. Not measured: reading from disk
(records lie in memory).

Beside it, what preparing a clip costs: an mp4 file (H.264, AAC) -> a staged file. Writes
benchmarks/results/records.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
import tensorflow as tf
from PIL import Image
from support import repository

from data_pipelines import media
from data_pipelines.preparation import decoded_files

RESULTS = repository.RESULTS / 'records.json'

STORED_FRAMES, HEIGHT, WIDTH, FPS, RATE = 100, 256, 384, 10, 48000
READ_FRAMES = 32
READ_SAMPLES = READ_FRAMES * RATE // FPS
WAVEFORM = 'WAVEFORM/feature/floats'


class Form(NamedTuple):
    """A kind of record.

    Attributes:
        encode: frames uint8 [T, H, W, 3] -> bytes of each picture or packet. Forms with the same
            function share what it makes.
        serialize: (these bytes, pcm int16 [samples]) -> the record.
        read: (record, number of the first frame) -> (frames, sound), as tensors.
    """

    encode: Callable[[np.ndarray], list[bytes]]
    serialize: Callable[[list[bytes], np.ndarray], bytes]
    read: Callable


def make_clip(number: int) -> np.ndarray:
    """uint8 [100, 256, 384, 3]."""
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[number % 2])
    rng = np.random.default_rng(number)
    begin, end = (rng.uniform(0, 1, 3) for _ in range(2))
    angle = int(rng.integers(360))
    thing = photo.resize((64, 48)).rotate(angle, expand=True)
    frames = []
    for t in np.linspace(0, 1, STORED_FRAMES):
        x, y, zoom = begin + (end - begin) * t
        view_width = 300 + 300 * zoom
        view_height = view_width * HEIGHT / WIDTH
        left, top = x * (photo.width - view_width), y * (photo.height - view_height)
        view = (left, top, left + view_width, top + view_height)
        picture = photo.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, view)
        thing_left = int(WIDTH * (0.5 + 0.4 * np.sin(7 * t + number)))
        thing_top = int(HEIGHT * (0.4 + 0.3 * np.cos(5 * t)))
        picture.paste(thing, (thing_left, thing_top))
        noise = rng.normal(0, 2, (HEIGHT, WIDTH, 1))
        frames.append(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    return np.stack(frames)


def psnr(frames: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / error))


def cpu() -> float:
    """User and system seconds of this process so far."""
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


# ---- forms


def encode_jpegs(frames: np.ndarray) -> list[bytes]:
    """Each frame for itself."""
    return [media.encode_jpeg(frame, 90) for frame in frames]


def encode_h264(frames: np.ndarray, crf: int) -> list[bytes]:
    """Packets, one for each frame."""
    return media.encode_h264(frames, FPS, crf)


def serialize_example(pictures: list[bytes], pcm: np.ndarray) -> bytes:
    """Our record."""
    frames = tf.train.Feature(bytes_list=tf.train.BytesList(value=pictures))
    sound = tf.train.Feature(bytes_list=tf.train.BytesList(value=[pcm.astype('<i2').tobytes()]))
    features = tf.train.Features(feature={'frames': frames, 'audio': sound})
    return tf.train.Example(features=features).SerializeToString()


def serialize_dmvr(pictures: list[bytes], pcm: np.ndarray) -> bytes:
    """DMVR's record: one sequence of pictures, one of floats."""
    example = tf.train.SequenceExample()
    lists = example.feature_lists.feature_list
    for picture in pictures:
        lists['image/encoded'].feature.add().bytes_list.value[:] = [picture]
    lists[WAVEFORM].feature.add().float_list.value[:] = pcm / np.float32(32767)
    return example.SerializeToString()


def decode_jpegs(frames: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
    """Frames from number `first` on, uint8 [T, H, W, 3]."""

    def decode(number):
        return tf.io.decode_jpeg(frames[number], channels=3)

    numbers = first + tf.range(READ_FRAMES)
    return tf.map_fn(decode, numbers, fn_output_signature=tf.uint8)


def parse_example(record: tf.Tensor, first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """All pictures or packets of our record, and the sound from frame `first` on."""
    features = {
        'frames': tf.io.RaggedFeature(tf.string),
        'audio': tf.io.FixedLenFeature([], tf.string),
    }
    example = tf.io.parse_single_example(record, features)
    begin = 2 * first * RATE // FPS  # two bytes a sample
    sound = tf.strings.substr(example['audio'], begin, 2 * READ_SAMPLES)
    return example['frames'], tf.io.decode_raw(sound, tf.int16)


@tf.function(autograph=False)
def read_jpeg(record, first):
    """Reads our record of pictures."""
    frames, sound = parse_example(record, first)
    return decode_jpegs(frames, first), sound


@tf.function(autograph=False)
def read_dmvr(record, first):
    """Reads DMVR's record."""
    features = {
        'image/encoded': tf.io.RaggedFeature(tf.string),
        WAVEFORM: tf.io.RaggedFeature(tf.float32),
    }
    _, sequences = tf.io.parse_single_sequence_example(record, sequence_features=features)
    begin = first * RATE // FPS
    sound = sequences[WAVEFORM].flat_values[begin : begin + READ_SAMPLES]
    sound = tf.round(tf.clip_by_value(sound, -1.0, 1.0) * 32767.0)
    frames = decode_jpegs(sequences['image/encoded'].flat_values, first)
    return frames, tf.cast(sound, tf.int16)


def h264_reader(pixel_format: str) -> Callable:
    """The reader of our record of packets; pixel_format: rgb24 | yuv420p."""

    def decode(packets, first):
        gop = first // media.GOP * media.GOP  # where the pictures that refer to no other begin
        numbers = first % media.GOP + np.arange(READ_FRAMES)
        return media.decode_h264(packets[gop : first + READ_FRAMES], numbers, pixel_format)

    @tf.function(autograph=False)
    def read(record, first):
        packets, sound = parse_example(record, first)
        return tf.numpy_function(decode, [packets, first], tf.uint8), sound

    return read


def make_forms() -> dict[str, Form]:
    """{row of the table: form}."""
    forms = {
        'JPEG q90 in DMVR record': Form(encode_jpegs, serialize_dmvr, read_dmvr),
        'JPEG q90': Form(encode_jpegs, serialize_example, read_jpeg),
    }
    for crf in (20, 23, 26):
        encode = functools.partial(encode_h264, crf=crf)
        to_rgb, to_yuv = h264_reader('rgb24'), h264_reader('yuv420p')
        forms[f'H.264 crf {crf}, to RGB'] = Form(encode, serialize_example, to_rgb)
        forms[f'H.264 crf {crf}, to YUV planes'] = Form(encode, serialize_example, to_yuv)
    return forms


# ---- measurements


def write_records(
    forms: dict[str, Form], clips: list[np.ndarray], pcm: np.ndarray
) -> tuple[dict[str, list[bytes]], dict[str, dict]]:
    """Writes the clips in each form.

    Args:
        forms: as of `make_forms`.
        clips: uint8 [T, H, W, 3] of each.
        pcm: int16 [samples], the sound of all.

    Returns:
        The records of each form, and a row of the result file for each, without times of reading.
    """
    encoded: dict[Callable, tuple[list[list[bytes]], float]] = {}
    records, table = {}, {}
    for name, form in forms.items():
        if form.encode not in encoded:
            began = cpu()
            pictures = [form.encode(clip) for clip in clips]
            encoded[form.encode] = pictures, (cpu() - began) / len(clips)
        pictures, seconds = encoded[form.encode]
        records[name] = [form.serialize(of_clip, pcm) for of_clip in pictures]
        picture_bytes = [sum(len(picture) for picture in of_clip) for of_clip in pictures]
        table[name] = {
            'bytes': round(statistics.mean(len(record) for record in records[name])),
            'picture_bytes': round(statistics.mean(picture_bytes)),
            'cpu_ms_to_encode': round(1e3 * seconds, 1),
            'rounds_ms': [],
        }
        frames, _ = form.read(tf.constant(records[name][0]), tf.constant(13))
        if frames.shape[-1] == 3:
            reference = clips[0][13 : 13 + READ_FRAMES]
            table[name]['psnr_db'] = round(psnr(frames.numpy(), reference), 1)
    return records, table


def read_all(form: Form, records: list[bytes], turn: int) -> float:
    """CPU milliseconds to read one record; frames begin elsewhere in each turn."""
    tensors = [tf.constant(record) for record in records]
    began = cpu()
    for i, record in enumerate(tensors):
        first = (17 * i + 29 * turn) % (STORED_FRAMES - READ_FRAMES)
        frames, sound = form.read(record, tf.constant(first))
        frames.numpy()
        sound.numpy()
    return 1e3 * (cpu() - began) / len(records)


def prepare(clips: list[np.ndarray], pcm: np.ndarray) -> dict[str, dict]:
    """What data_pipelines.prepare spends on one clip: {store: {'cpu_ms', 'bytes'}}."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, clip in enumerate(clips):
            media.write_mp4(f'{folder}/{i}.mp4', clip, FPS, pcm, RATE)
        for store, crf in (('jpeg', 0), ('h264', 23)):
            settings = decoded_files.Settings(FPS, HEIGHT, RATE, 90, 0.0, crf)
            began = cpu()
            for i in range(len(clips)):
                file = decoded_files.File(f'{i}.mp4', f'{folder}/{i}.mp4', 0, 0)
                decoded_files.stage_file(file, settings, f'{folder}/{store}/{i}')
            seconds = (cpu() - began) / len(clips)
            sizes = [path.stat().st_size for path in pathlib.Path(folder, store).iterdir()]
            table[store] = {
                'cpu_ms': round(1e3 * seconds, 1),
                'bytes': round(statistics.mean(sizes)),
            }
    return table


def print_tables(table: dict[str, dict], prepared: dict[str, dict]) -> None:
    """Reading, beside the time of JPEG; and preparing."""
    print(
        f'{"":32s} {"kB/clip":>8s} {"pictures":>9s} {"CPU ms/clip":>12s} {"of JPEG":>8s} {"dB":>6s}'
    )
    jpeg = table['JPEG q90']['cpu_ms']
    for name, row in table.items():
        print(
            f'{name:32s} {row["bytes"] / 1e3:8.0f} {row["picture_bytes"] / 1e3:9.0f} '
            f'{row["cpu_ms"]:12.2f} {row["cpu_ms"] / jpeg:8.2f} {row.get("psnr_db", ""):>6}'
        )
    for store, row in prepared.items():
        print(
            f'preparing, --store={store}: {row["cpu_ms"]:.0f} CPU ms '
            f'and {row["bytes"] / 1e3:.0f} kB a clip of 10 s'
        )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--clips', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=7)
    flags = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    seconds = np.arange(STORED_FRAMES * RATE // FPS) / RATE
    tone = 9000 * np.sin(2 * np.pi * 300 * seconds) * np.sin(seconds)
    pcm = tone.astype(np.int16)
    clips = [make_clip(i) for i in range(flags.clips)]
    forms = make_forms()
    records, table = write_records(forms, clips, pcm)
    for turn in range(flags.rounds + 1):
        for name, form in forms.items():
            milliseconds = read_all(form, records[name], turn)
            if turn:  # the first warms up
                table[name]['rounds_ms'].append(round(milliseconds, 2))
    for row in table.values():
        row['cpu_ms'] = statistics.median(row['rounds_ms'])
    prepared = prepare(clips, pcm)
    print_tables(table, prepared)

    commit = repository.git('rev-parse', 'HEAD')
    settings = {
        **vars(flags),
        'frames': STORED_FRAMES,
        'height': HEIGHT,
        'width': WIDTH,
        'wanted': READ_FRAMES,
    }
    results = {
        'commit': commit,
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'config': settings,
        'forms': table,
        'preparing': prepared,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
