"""Our reader against the incumbent's procedure on the same clips: CPU seconds per clip, bytes on disk, what a chip would need.

    python benchmarks/input_pipeline.py            # about 3 minutes; leave the machine alone meanwhile
    python benchmarks/input_pipeline.py --quick    # to see that it runs

A clip: 10 s stored (100 frames of 340 x 256, 48 kHz sound, captions) of which 32 frames of 224 x 224, 3.2 s of sound and 5 sentences are used. The
pictures are leaves of all sizes with a texture of 1/f spectrum that pan and zoom, with moving objects and mild camera noise; at quality 90 a frame
takes about as many bytes as one of photographs (some 26 kB). They are written as mp4, prepared once as JPEG and once as H.264 by
data_pipelines.prepare, and the very JPEG bytes of the first go into DMVR records.

  incumbent      DMVR's procedure under VATT's settings, restated in tf.data: read whole SequenceExamples in the order of the file, parse, gather the
                 sound by an index vector, decode 32 frames, resize for scale jitter (p 0.8), resize to 224, crop, flip, to float32, colour jitter
                 (p 0.8), noise on the sound, words by a table. Also without the colour.
  ours           data_pipelines.open(config).train: random access, shuffle, checksums, decode, uint8 (or planes) and int16 out. Crop, resize, flip,
                 colour and noise are the device's: what they take as one jitted program on this CPU is the last table. It is no part of the ratios,
                 which therefore say nothing end to end.

CPU seconds are user + system of all threads of this process. Every variant lives in this process with one worker thread and full queues; a turn
takes some batches from one variant and waits until its queues are full again, so exactly as many batches are made as were taken. Variants take turns;
medians over turns. Files are in the page cache: disks are not measured. Writes benchmarks/results/input_pipeline.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['JAX_PLATFORMS'] = 'cpu'
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run

run.keep_freed_memory()  # as every run on the CPU does; all variants share the heap. Before threads begin

import jax
import numpy as np
import tensorflow as tf
from PIL import Image

import data_pipelines
from configs import vatt
from data_pipelines import dmvr, media
from data_pipelines.loading import order
from data_pipelines.prepare import prepare
from data_pipelines.storage.records import Prepared, Split
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.performance import chips, flops
from vatt_jax.planning import plan
from vatt_jax.rng import Rng
from vatt_jax.training import loop

RESULTS = ROOT / 'benchmarks' / 'results' / 'input_pipeline.json'
FRAMES, HEIGHT, WIDTH, FPS, RATE = 100, 256, 340, 10, 48000
T, SIZE, S, K, L, BATCH = 32, 224, 153600, 5, 16, 4
WORDS = [f'word{i}' for i in range(400)]
SOUND, GOALS = 'WAVEFORM/feature/floats', {'jpeg': 4.5, 'h264': 5.5, 'dmvr': 4.0}


# ---- clips


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float [H W 3], standard deviation 1: amplitudes fall as 1/f, colours are those of one cloud."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / f, (height, width))
        for _ in range(3)
    ]
    gray, one, two = (p / p.std() for p in planes)
    return np.stack([gray + 0.3 * one, gray - 0.15 * one + 0.15 * two, gray - 0.3 * two], -1)


def scene(rng: np.random.Generator, height: int, width: int, leaves: int) -> np.ndarray:
    """uint8 [H W 3]: leaves of power-law sizes that hide each other (the usual model of natural images), each with the texture on it."""
    picture = np.full((height, width, 3), 128.0)
    y, x = np.mgrid[:height, :width]
    for _ in range(leaves):
        radius = 8 / (1 - rng.uniform(0, 1) * (1 - (8 / 160) ** 2)) ** 0.5
        cy, cx, squeeze = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 1)
        top, left = max(0, int(cy - radius)), max(0, int(cx - radius))
        part = np.s_[top : int(cy + radius) + 1, left : int(cx + radius) + 1]
        inside = (x[part] - cx) ** 2 + ((y[part] - cy) / squeeze) ** 2 < radius**2
        picture[part][inside] = rng.uniform(60, 190) + rng.normal(0, 22, 3)
    return (picture + rng.uniform(3, 9) * texture(rng, height, width)).clip(0, 255).astype(np.uint8)


def clip(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [100 256 340 3], int16 [480000])."""
    rng = np.random.default_rng(number)
    world = Image.fromarray(scene(rng, 480, 720, int(rng.integers(150, 600))))
    things = [Image.fromarray(scene(rng, s, s, 40)) for s in rng.integers(40, 90, 2)]
    masks = [
        Image.fromarray(
            (np.hypot(*np.mgrid[-1 : 1 : 1j * t.height, -1 : 1 : 1j * t.width]) < 1).astype(
                np.uint8
            )
            * 255
        )
        for t in things
    ]
    begin, end, phase = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3), rng.uniform(0, 6, 4)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for i, t in enumerate(np.linspace(0, 1, FRAMES)):
        x, y, zoom = begin + (end - begin) * t * 0.5
        w = 340 + 200 * zoom
        h = w * HEIGHT / WIDTH
        left, top = x * (world.width - w), y * (world.height - h)
        frame = world.resize(
            (WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + w, top + h)
        )
        for thing, mask, a, b in zip(things, masks, phase[:2], phase[2:]):
            frame.paste(
                thing,
                (
                    int(WIDTH * (0.4 + 0.4 * np.sin(7 * t + a))),
                    int(HEIGHT * (0.35 + 0.3 * np.cos(5 * t + b))),
                ),
                mask,
            )
        frames[i] = (np.asarray(frame) + rng.normal(0, 1.0, (HEIGHT, WIDTH, 1))).clip(0, 255)
    s = np.arange(FRAMES * RATE // FPS) / RATE
    sound = sum(
        2000 / k * np.sin(2 * np.pi * 110 * k * s * (1 + 0.05 * np.sin(s + k))) for k in range(1, 9)
    ) + rng.normal(0, 300, len(s))
    return frames, sound.astype(np.int16)


def make(folder: pathlib.Path, number: int) -> dict[str, pathlib.Path]:
    """{'jpeg', 'h264', 'dmvr': folders for config.data.train, 'tfrecord': the file of DMVR's records}."""
    (folder / 'videos').mkdir(parents=True)
    lines = ['video,start,end,text']
    rng = np.random.default_rng(0)
    for i in range(number):
        frames, sound = clip(i)
        media.write_mp4(
            folder / 'videos' / f'{i}.mp4', frames, FPS, sound, RATE, crf=6, preset='ultrafast'
        )
        lines += [f'{i}.mp4,{k},{k + 1},{" ".join(rng.choice(WORDS, 9))}' for k in range(10)]
    (folder / 'captions.csv').write_text('\n'.join(lines) + '\n')
    out = {k: folder / k for k in ('jpeg', 'h264', 'dmvr', 'tfrecord')}
    for store in ('jpeg', 'h264'):
        prepare(
            str(folder / 'videos'),
            str(folder / 'captions.csv'),
            str(out[store]),
            store=store,
            size=HEIGHT,
            fps=FPS,
            rate=RATE,
            validation=0,
            test=0,
            quiet=True,
        )
    part = Split(Prepared(out['jpeg']), 'train')
    with tf.io.TFRecordWriter(str(out['tfrecord'])) as file:
        for i in range(len(part)):
            frames, sound = part.clip(i, range(FRAMES), range(FRAMES // FPS))
            e = tf.train.SequenceExample()
            for f in frames:
                e.feature_lists.feature_list['image/encoded'].feature.add().bytes_list.value[:] = [
                    f
                ]
            e.feature_lists.feature_list[SOUND].feature.add().float_list.value[:] = np.frombuffer(
                b''.join(sound), '<i2'
            ) / np.float32(32767)
            first, last = part.index.sentence_offset[i : i + 2]
            e.context.feature['caption/string'].bytes_list.value[:] = [
                t.encode() for t in part.index.sentence_text[first:last]
            ]
            file.write(e.SerializeToString())
    dmvr.index(str(out['dmvr']), str(out['tfrecord']), fps=FPS, rate=RATE, quiet=True)
    return out


# ---- the incumbent's procedure


def incumbent(path: pathlib.Path, words: list[str], color: bool):
    """Endless batches as DMVR makes them for VATT; shuffling, which only holds records back, is left out."""
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(words, np.arange(2, len(words) + 2)), 1
    )
    chance = lambda p: tf.random.uniform([]) < p

    def parse(raw):
        context, lists = tf.io.parse_single_sequence_example(
            raw,
            {'caption/string': tf.io.VarLenFeature(tf.string)},
            {
                'image/encoded': tf.io.FixedLenSequenceFeature([], tf.string),
                SOUND: tf.io.VarLenFeature(tf.float32),
            },
        )
        return context['caption/string'], lists['image/encoded'], lists[SOUND]

    def jitter(x):
        shape = tf.cast(tf.shape(x)[1:3], tf.float32) * tf.random.uniform([2], 0.8, 1.2)
        return tf.cast(tf.image.resize(x, tf.cast(shape, tf.int32)), x.dtype)

    def smallest(x):
        h, w = tf.shape(x)[1], tf.shape(x)[2]
        if_wide, if_tall = (
            [SIZE, tf.maximum(SIZE, SIZE * w // h)],
            [tf.maximum(SIZE, SIZE * h // w), SIZE],
        )
        return tf.cast(
            tf.image.resize(x, tf.cond(h < w, lambda: if_wide, lambda: if_tall)), x.dtype
        )

    def tint(x):
        x = tf.image.random_brightness((x + 1) / 2, 32 / 255)
        x = tf.image.random_saturation(x, 0.6, 1.4)
        x = tf.image.random_contrast(x, 0.6, 1.4)
        x = tf.image.random_hue(x, 0.2)
        return tf.clip_by_value(x, 0.0, 1.0) * 2 - 1

    def example(raw):
        captions, frames, sound = parse(raw)
        begin = tf.random.uniform([], maxval=FRAMES - T + 1, dtype=tf.int32)
        video = tf.map_fn(
            lambda f: tf.io.decode_jpeg(f, channels=3),
            tf.gather(frames, begin + tf.range(T)),
            fn_output_signature=tf.uint8,
        )
        video = tf.cond(chance(0.8), lambda: jitter(video), lambda: video)
        video = tf.image.random_crop(smallest(video), [T, SIZE, SIZE, 3])
        video = tf.cond(chance(0.5), lambda: tf.image.flip_left_right(video), lambda: video)
        video = tf.image.convert_image_dtype(video, tf.float32) * 2 - 1
        if color:
            video = tf.cond(chance(0.8), lambda: tint(video), lambda: video)
        sound = tf.sparse.to_dense(sound)[0]
        first = tf.cast(
            tf.round(tf.cast(begin, tf.float32) / FRAMES * tf.cast(tf.size(sound), tf.float32)),
            tf.int32,
        )
        sound = tf.gather(sound, (first + tf.range(tf.size(sound))) % tf.size(sound))[:S]
        sound += tf.random.normal([S]) * 0.01 * tf.reduce_max(tf.abs(sound))
        said = tf.strings.lower(
            tf.strings.regex_replace(tf.sparse.to_dense(captions), r'[[:punct:]]', '')
        )
        at = tf.random.uniform([], maxval=tf.maximum(1, tf.size(said) - K + 1), dtype=tf.int32)
        text = table.lookup(tf.strings.split(said[at : at + K]).to_tensor('', shape=[K, L]))
        return {
            'video': tf.ensure_shape(video, [T, SIZE, SIZE, 3]),
            'audio': tf.ensure_shape(sound, [S]),
            'text': text,
        }

    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    data = (
        tf.data.TFRecordDataset(str(path))
        .repeat()
        .map(example, 1)
        .batch(BATCH, drop_remainder=True)
        .prefetch(1)
        .with_options(options)
    )
    return iter(data)


def config(path: pathlib.Path):
    c = vatt.get_config('bbs')
    c.data.train = {'clips': {'path': str(path)}}
    c.data.threads, c.data.prefetch = 1, 1
    return c


# ---- measuring


def cpu() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def settle() -> float:
    """CPU seconds once no thread works any more."""
    last, quiet = cpu(), 0
    while quiet < 3:
        time.sleep(0.03)
        now = cpu()
        quiet = quiet + 1 if now - last < 1e-3 else 0
        last = now
    return last


def of_device(batch, c, repeats: int) -> list[float]:
    """CPU ms per clip of the device stage, jitted, on this CPU."""
    rows = len(batch['position'])
    given = jax.device_put(feature_extractor.device_part(batch))
    stage = jax.jit(
        lambda b, step: preprocess.device_stage(
            b,
            c.model.inputs,
            c.augment,
            Rng.create(0, step, b['position']),
            augment=True,
            dtype='float32',
        )
    )
    jax.block_until_ready(stage(given, 0))
    out = []
    for i in range(repeats):
        began = settle()
        jax.block_until_ready(stage(given, i + 1))
        out.append(round(1e3 * (settle() - began) / rows, 2))
    return out


def needed() -> dict:
    """What chips at half their peak take in: VATT bbs, FLOPs of one clip's step."""
    c = vatt.get_config('bbs,synthetic')
    c.batch_size, c.mesh.replica = 2, 1
    built = loop.build(c, data_pipelines.open(c))
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    one = flops.model_flops(flops.by_tower(built.model, variables, plan.two_rows(built.inputs)))
    rates = {name: 0.5 * chip.peak / one for name, chip in chips.CHIPS.items() if chip.peak}
    return {
        'model': 'VATT bbs',
        'flops_per_clip': one,
        'chips': {
            name: {'clips_per_second': round(r, 1), 'frames_per_second': round(r * T)}
            for name, r in rates.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--clips', type=int, default=12)
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--batches', type=int, default=3, help='taken in one turn')
    parser.add_argument('--quick', action='store_true', help='few clips and turns, no result file')
    flags = parser.parse_args()
    if flags.quick:
        flags.clips, flags.turns, flags.batches = 4, 2, 2
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        measure(flags, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(flags, folder: pathlib.Path) -> None:
    began = time.monotonic()
    paths = make(folder, flags.clips)
    made = time.monotonic() - began
    words = json.loads((paths['jpeg'] / 'tokenizer.json').read_text())['vocabulary']
    opened = {name: data_pipelines.open(config(paths[name])) for name in GOALS}
    variants = {
        'incumbent': incumbent(paths['tfrecord'], words, True),
        'incumbent without colour': incumbent(paths['tfrecord'], words, False),
        **{name: data.train(0, BATCH) for name, data in opened.items()},
    }
    bytes_ = {'incumbent': paths['tfrecord'].stat().st_size}
    for name in ('jpeg', 'h264'):
        bytes_[name] = sum(p.stat().st_size for p in paths[name].iterdir())
    bytes_['dmvr'] = bytes_['incumbent'] + sum(p.stat().st_size for p in paths['dmvr'].iterdir())
    turns, last = {name: [] for name in variants}, {}
    access = {name: [] for name in opened}
    for name, it in variants.items():  # traces, fills the queues
        for _ in range(2):
            last[name] = next(it)
        settle()
    for turn in range(flags.turns):
        for name, it in list(variants.items())[:: 1 if turn % 2 else -1]:
            start = settle()
            for _ in range(flags.batches):
                last[name] = next(it)
            turns[name].append(round(1e3 * (settle() - start) / (flags.batches * BATCH), 2))
        for name in opened:  # order, plan, read and check, without decoding
            it, count = variants[name], 25
            start = settle()
            for step in range(count):
                rows = it._rows(turn * count + step)
                batch, wanted = it._plan(rows)
                it._read(rows, batch, wanted)
            access[name].append(round(1e3 * (settle() - start) / (count * BATCH), 3))
    shuffle = settle()
    stream = order.Order([order.Source(10**8)], 0)
    for step in range(200):
        stream.rows(order.train_positions(step, 0, 256))
    shuffle = 1e3 * (settle() - shuffle) / (200 * 256)
    c = config(paths['jpeg'])
    device = {
        'frames whole, RGB (jpeg, dmvr)': of_device(last['jpeg'], c, flags.turns),
        'planes (h264)': of_device(last['h264'], c, flags.turns),
    }

    base = statistics.median(turns['incumbent'])
    table = {}
    for name, values in turns.items():
        ms, size = statistics.median(values), bytes_.get(name, bytes_['incumbent']) / flags.clips
        table[name] = {
            'cpu_ms': ms,
            'times_less': round(base / ms, 2),
            'bytes': round(size),
            'of_bytes': round(size / bytes_['incumbent'] * flags.clips, 3),
            'clips_per_second_and_core': round(1e3 / ms, 1),
            'turns_ms': values,
        }
        if name in access:
            table[name] |= {
                'random_access_and_shuffle_ms': statistics.median(access[name]),
                'goal': GOALS[name],
                'bus_bytes': int(
                    last[name]['video']['data'][0].nbytes + last[name]['audio']['data'][0].nbytes
                ),
            }
    pictures = {
        name: round(
            statistics.mean(Split(Prepared(paths[name]), 'train')._pieces._pieces[:FRAMES, 1])
        )
        for name in ('jpeg', 'h264')
    }
    demand = needed()
    print(
        f'{"":26s} {"CPU ms/clip":>12s} {"times less":>11s} {"goal":>5s} {"kB/clip":>8s} {"of bytes":>9s} {"clips/s/core":>13s} {"access ms":>10s}'
    )
    for name, row in table.items():
        print(
            f'{name:26s} {row["cpu_ms"]:12.1f} {row["times_less"]:11.2f} {row.get("goal", ""):>5} {row["bytes"] / 1e3:8.0f} {row["of_bytes"]:9.2f} '
            f'{row["clips_per_second_and_core"]:13.0f} {row.get("random_access_and_shuffle_ms", ""):>10}'
        )
    print(
        f'a frame: {pictures["jpeg"] / 1e3:.1f} kB as JPEG, {pictures["h264"] / 1e3:.1f} kB as H.264; shuffle alone {shuffle:.4f} ms/clip'
    )
    for name, values in device.items():
        print(f'device stage on this CPU, {name}: {statistics.median(values):.1f} CPU ms/clip')
    for name, row in demand['chips'].items():
        cores = row['clips_per_second'] * table['jpeg']['cpu_ms'] / 1e3
        print(
            f'{name} at 50 % with {demand["model"]}: {row["clips_per_second"]:.0f} clips/s = {row["frames_per_second"]} frames/s: '
            f'{cores:.1f} such cores (jpeg)'
        )
    print(f'{time.monotonic() - began:.0f} s, of which {made:.0f} to make the clips')
    if flags.quick:
        return
    commit = subprocess.run(
        ['git', '-C', str(ROOT), 'rev-parse', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    model = next(
        (
            line.partition(':')[2].strip()
            for line in open('/proc/cpuinfo')
            if line.startswith('model name')
        ),
        platform.machine(),
    )
    RESULTS.write_text(
        json.dumps(
            {
                'commit': commit,
                'date': datetime.date.today().isoformat(),
                'machine': f'{model}, {os.cpu_count()} cores',
                'tensorflow': tf.__version__,
                'config': {
                    **vars(flags),
                    'batch': BATCH,
                    'stored': [FRAMES, HEIGHT, WIDTH],
                    'used': [T, SIZE, SIZE],
                    'samples': S,
                    'threads': 1,
                },
                'variants': table,
                'frame_bytes': pictures,
                'shuffle_ms': round(shuffle, 5),
                'device_stage_cpu_ms': {
                    k: {'median': statistics.median(v), 'turns': v} for k, v in device.items()
                },
                'needed': demand,
            },
            indent=1,
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
