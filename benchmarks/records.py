"""JPEG frames against short pieces of H.264 in the record, and DMVR's own record read by us: bytes and CPU seconds per clip, in one run.

    python benchmarks/records.py [--clips=12 --rounds=7]

A clip is 10 s stored (100 frames of 256 x 384 at 10 a second, sound at 48 kHz) of which 32 consecutive frames and 3.2 s of sound are wanted, full
frames in uint8, as the device takes them. The pictures pan and zoom over two photographs (scikit-learn's samples) with a moving object and mild
camera noise: smooth motion flatters video a little. Each form goes from the record's bytes to arrays through the reader's own code. CPU
seconds are user + system of all threads of this process; forms are measured in turns, and medians over the rounds are reported. Crop,
resize and colour happen on the device and are not in any of these figures; the YUV row leaves the conversion to RGB to the device too.
Not measured: reading from disk (records lie in memory). Beside it, what preparing a clip costs: an mp4 file (H.264, AAC) -> a staged file.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from data_pipelines import media

FRAMES, HEIGHT, WIDTH, FPS, RATE, WANTED = 100, 256, 384, 10, 48000, 32


def clip(number: int) -> np.ndarray:
    """uint8 [100 256 384 3]."""
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[number % 2])
    rng = np.random.default_rng(number)
    begin, end = (rng.uniform(0, 1, 3) for _ in range(2))
    thing = photo.resize((64, 48)).rotate(int(rng.integers(360)), expand=True)
    out = []
    for t in np.linspace(0, 1, FRAMES):
        x, y, zoom = begin + (end - begin) * t
        w = 300 + 300 * zoom
        h = w * HEIGHT / WIDTH
        left, top = x * (photo.width - w), y * (photo.height - h)
        frame = photo.resize(
            (WIDTH, HEIGHT), Image.Resampling.BILINEAR, (left, top, left + w, top + h)
        )
        frame.paste(
            thing,
            (
                int(WIDTH * (0.5 + 0.4 * np.sin(7 * t + number))),
                int(HEIGHT * (0.4 + 0.3 * np.cos(5 * t))),
            ),
        )
        out.append(
            np.clip(np.asarray(frame) + rng.normal(0, 2, (HEIGHT, WIDTH, 1)), 0, 255).astype(
                np.uint8
            )
        )
    return np.stack(out)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def forms() -> dict:
    """name -> (frames [T H W 3], pcm -> record bytes; record bytes, first frame -> (frames, sound); bytes of pictures alone)."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    count = WANTED * RATE // FPS
    raw = lambda values: tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    def example(pictures, pcm):
        features = {'frames': raw(pictures), 'audio': raw([pcm.astype('<i2').tobytes()])}
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    def dmvr(pictures, pcm):
        e = tf.train.SequenceExample()
        for p in pictures:
            e.feature_lists.feature_list['image/encoded'].feature.add().bytes_list.value[:] = [p]
        e.feature_lists.feature_list['WAVEFORM/feature/floats'].feature.add().float_list.value[
            :
        ] = pcm / np.float32(32767)
        return e.SerializeToString()

    def decode(frames, first):
        return tf.map_fn(
            lambda i: tf.io.decode_jpeg(frames[i], channels=3),
            first + tf.range(WANTED),
            fn_output_signature=tf.uint8,
        )

    def parse(record, first):
        got = tf.io.parse_single_example(
            record,
            {
                'frames': tf.io.RaggedFeature(tf.string),
                'audio': tf.io.FixedLenFeature([], tf.string),
            },
        )
        return got['frames'], tf.io.decode_raw(
            tf.strings.substr(got['audio'], 2 * first * RATE // FPS, 2 * count), tf.int16
        )

    @tf.function(autograph=False)
    def of_jpeg(record, first):
        frames, sound = parse(record, first)
        return decode(frames, first), sound

    @tf.function(autograph=False)
    def of_dmvr(record, first):
        got = tf.io.parse_single_sequence_example(
            record,
            sequence_features={
                'image/encoded': tf.io.RaggedFeature(tf.string),
                'WAVEFORM/feature/floats': tf.io.RaggedFeature(tf.float32),
            },
        )[1]
        at = first * RATE // FPS
        sound = got['WAVEFORM/feature/floats'].flat_values[at : at + count]
        return decode(got['image/encoded'].flat_values, first), tf.cast(
            tf.round(tf.clip_by_value(sound, -1.0, 1.0) * 32767.0), tf.int16
        )

    def of_video(form):
        @tf.function(autograph=False)
        def read(record, first):
            packets, sound = parse(record, first)
            decode = lambda p, f: media.decode_h264(
                p[f // media.GOP * media.GOP : f + WANTED], f % media.GOP + np.arange(WANTED), form
            )
            return tf.numpy_function(decode, [packets, first], tf.uint8), sound

        return read

    jpegs = lambda frames: [media.encode_jpeg(f, 90) for f in frames]
    out = {'JPEG q90 in DMVR record': (jpegs, dmvr, of_dmvr), 'JPEG q90': (jpegs, example, of_jpeg)}
    for crf in (20, 23, 26):
        out[f'H.264 crf {crf}, to RGB'] = (
            lambda frames, crf=crf: media.encode_h264(frames, FPS, crf),
            example,
            of_video('rgb24'),
        )
        out[f'H.264 crf {crf}, to YUV planes'] = (
            out[f'H.264 crf {crf}, to RGB'][0],
            example,
            of_video('yuv420p'),
        )
    return out


def staged(clips: list[np.ndarray], pcm: np.ndarray) -> dict:
    """What data_pipelines.prepare spends on one clip: {store: {'cpu_ms', 'bytes'}}."""
    from data_pipelines.preparation import decoded_files

    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, c in enumerate(clips):
            media.write_mp4(f'{folder}/{i}.mp4', c, FPS, pcm, RATE)
        for store, crf in (('jpeg', 0), ('h264', 23)):
            settings = decoded_files.Settings(FPS, HEIGHT, RATE, 90, 0.0, crf)
            began = cpu()
            for i in range(len(clips)):
                decoded_files.stage_file(
                    decoded_files.File(f'{i}.mp4', f'{folder}/{i}.mp4', 0, 0),
                    settings,
                    f'{folder}/{store}/{i}',
                )
            spent = (cpu() - began) / len(clips)
            sizes = [p.stat().st_size for p in pathlib.Path(folder, store).iterdir()]
            out[store] = {'cpu_ms': round(1e3 * spent, 1), 'bytes': round(statistics.mean(sizes))}
    return out


def cpu() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--clips', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=7)
    flags = parser.parse_args()
    import tensorflow as tf

    s = np.arange(FRAMES * RATE // FPS) / RATE
    pcm = (9000 * np.sin(2 * np.pi * 300 * s) * np.sin(s)).astype(np.int16)
    clips = [clip(i) for i in range(flags.clips)]
    table, kept, encoded = {}, {}, {}
    for name, (encode, record, read) in forms().items():
        if encode not in encoded:
            began = cpu()
            encoded[encode] = [encode(c) for c in clips], cpu() - began
        pictures, spent = encoded[encode][0], encoded[encode][1] / len(clips)
        kept[name] = [record(p, pcm) for p in pictures], read
        table[name] = {
            'bytes': round(statistics.mean(map(len, kept[name][0]))),
            'picture_bytes': round(statistics.mean(sum(map(len, p)) for p in pictures)),
            'cpu_ms_to_encode': round(1e3 * spent, 1),
            'rounds_ms': [],
        }
        frames, _ = read(tf.constant(kept[name][0][0]), tf.constant(13))
        if frames.shape[-1] == 3:
            table[name]['psnr_db'] = round(decibels(frames.numpy(), clips[0][13 : 13 + WANTED]), 1)
    for turn in range(flags.rounds + 1):
        for name, (records, read) in kept.items():
            given = [tf.constant(r) for r in records]
            began = cpu()
            for i, r in enumerate(given):
                frames, sound = read(r, tf.constant((17 * i + 29 * turn) % (FRAMES - WANTED)))
                frames.numpy(), sound.numpy()
            if turn:  # the first warms up
                table[name]['rounds_ms'].append(round(1e3 * (cpu() - began) / len(records), 2))
    prepared = staged(clips, pcm)
    base = statistics.median(table['JPEG q90']['rounds_ms'])
    print(
        f'{"":32s} {"kB/clip":>8s} {"pictures":>9s} {"CPU ms/clip":>12s} {"of JPEG":>8s} {"dB":>6s}'
    )
    for name, row in table.items():
        row['cpu_ms'] = statistics.median(row['rounds_ms'])
        print(
            f'{name:32s} {row["bytes"] / 1e3:8.0f} {row["picture_bytes"] / 1e3:9.0f} {row["cpu_ms"]:12.2f} {row["cpu_ms"] / base:8.2f} '
            f'{row.get("psnr_db", ""):>6}'
        )
    for store, row in prepared.items():
        print(
            f'preparing, --store={store}: {row["cpu_ms"]:.0f} CPU ms and {row["bytes"] / 1e3:.0f} kB a clip of 10 s'
        )
    commit = subprocess.run(
        ['git', '-C', str(ROOT), 'rev-parse', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    path = ROOT / 'benchmarks/results/records.json'
    path.write_text(
        json.dumps(
            {
                'commit': commit,
                'machine': f'{platform.machine()}, {os.cpu_count()} cores',
                'config': {
                    **vars(flags),
                    'frames': FRAMES,
                    'height': HEIGHT,
                    'width': WIDTH,
                    'wanted': WANTED,
                },
                'forms': table,
                'preparing': prepared,
            },
            indent=1,
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
