"""Our reader against the incumbent's procedure on the same clips: CPU seconds and bytes on disk.

    python benchmarks/input_pipeline.py            # about 3 minutes; leave the machine alone
    python benchmarks/input_pipeline.py --quick    # to see that it runs

A clip: 10 s stored (100 frames of 340 x 256, 48 kHz sound, captions) of which 32 frames of
224 x 224, 3.2 s of sound and 5 sentences are used. The pictures are leaves of all sizes with a
texture of 1/f spectrum that pan and zoom, with moving objects and mild camera noise; at quality 90
a frame takes about as many bytes as one of photographs (some 26 kB). They are written as mp4,
prepared once as JPEG and once as H.264 by data_pipelines.prepare, and the very JPEG bytes of the
first go into DMVR records.

  incumbent      DMVR's procedure under VATT's settings, restated in tf.data: read whole
                 SequenceExamples in the order of the file, parse, gather the sound by an index
                 vector, decode 32 frames, resize for scale jitter (p 0.8), resize to 224, crop,
                 flip, to float32, colour jitter (p 0.8), noise on the sound, words by a table. Also
                 without the colour.
  ours           data_pipelines.open(config).train: random access, shuffle, checksums, decode, uint8
                 (or planes) and int16 out. Crop, resize, flip, colour and noise are the device's:
                 what they take as one jitted program on this CPU is the last table. It is no part
                 of the ratios, which therefore say nothing end to end.

CPU seconds are user + system of all threads of this process. Every variant lives in this process
with one worker thread and full queues; a turn takes some batches from one variant and waits until
its queues are full again, so exactly as many batches are made as were taken. Variants take turns;
medians over turns. Files are in the page cache: disks are not measured. Also printed is what a chip
would need, and how our reader scales over threads and worker processes (reader_scaling.py). Writes
benchmarks/results/input_pipeline.json.
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
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# As run.py has it.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import jax
import numpy as np
import reader_scaling
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image
from support import repository

import data_pipelines
from configs import vatt
from data_pipelines import dmvr, media
from data_pipelines.loading import order
from data_pipelines.prepare import prepare
from data_pipelines.storage.records import Prepared, Split
from vatt_jax.inference import feature_extractor
from vatt_jax.inputs import preprocess
from vatt_jax.modes import process
from vatt_jax.performance import chips, flops
from vatt_jax.planning import plan
from vatt_jax.rng import Rng
from vatt_jax.training import loop

# As every run on the CPU does; all variants share the heap. Before they compute.
process.keep_freed_memory()

RESULTS = repository.RESULTS / 'input_pipeline.json'
# A clip as it is stored.
FRAMES, HEIGHT, WIDTH, FPS, RATE = 100, 256, 340, 10, 48000
SECONDS = FRAMES // FPS
# What is used of it: frames of SIZE x SIZE, samples of sound, sentences of so many words.
USED_FRAMES, SIZE, SAMPLES, SENTENCES, SENTENCE_WORDS = 32, 224, 153600, 5, 16
BATCH = 4
VOCABULARY = [f'word{i}' for i in range(400)]
IMAGES, SOUND, CAPTIONS = 'image/encoded', 'WAVEFORM/feature/floats', 'caption/string'
# How many times less CPU than the incumbent each of our formats is to take.
GOALS = {'jpeg': 4.5, 'h264': 5.5, 'dmvr': 4.0}


# ---- clips


def make_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float [H W 3], standard deviation 1: amplitudes fall as 1/f, colours are of one cloud."""
    vertical, horizontal = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    frequency = np.hypot(vertical[:, None], horizontal[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        noise = rng.normal(size=(height, width))
        plane = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
        planes.append(plane / plane.std())
    gray, one, two = planes
    return np.stack([gray + 0.3 * one, gray - 0.15 * one + 0.15 * two, gray - 0.3 * two], -1)


def make_scene(rng: np.random.Generator, height: int, width: int, leaves: int) -> np.ndarray:
    """uint8 [H W 3]: leaves that hide each other, each with the texture on it.

    Their sizes follow a power law, the usual model of natural images.
    """
    picture = np.full((height, width, 3), 128.0)
    y, x = np.mgrid[:height, :width]
    for _ in range(leaves):
        radius = 8 / (1 - rng.uniform(0, 1) * (1 - (8 / 160) ** 2)) ** 0.5
        center_y, center_x = rng.uniform(0, height), rng.uniform(0, width)
        squeeze = rng.uniform(0.5, 1)
        top, left = max(0, int(center_y - radius)), max(0, int(center_x - radius))
        part = np.s_[top : int(center_y + radius) + 1, left : int(center_x + radius) + 1]
        squared_distance = (x[part] - center_x) ** 2 + ((y[part] - center_y) / squeeze) ** 2
        inside = squared_distance < radius**2
        picture[part][inside] = rng.uniform(60, 190) + rng.normal(0, 22, 3)
    contrast = rng.uniform(3, 9)
    return (picture + contrast * make_texture(rng, height, width)).clip(0, 255).astype(np.uint8)


def make_ellipse(width: int, height: int) -> Image.Image:
    """A mask of the largest ellipse in a rectangle."""
    y, x = np.mgrid[-1 : 1 : 1j * height, -1 : 1 : 1j * width]
    inside = np.hypot(y, x) < 1
    return Image.fromarray(inside.astype(np.uint8) * 255)


def make_sound(rng: np.random.Generator) -> np.ndarray:
    """float [SECONDS · RATE]: eight harmonics of slowly wandering pitch, and noise."""
    seconds = np.arange(SECONDS * RATE) / RATE
    sound = 0
    for k in range(1, 9):
        wander = 1 + 0.05 * np.sin(seconds + k)
        sound = sound + 2000 / k * np.sin(2 * np.pi * 110 * k * seconds * wander)
    return sound + rng.normal(0, 300, len(seconds))


def clip(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [100 256 340 3], int16 [480000])."""
    rng = np.random.default_rng(number)
    world = Image.fromarray(make_scene(rng, 480, 720, int(rng.integers(150, 600))))
    objects = []
    for side in rng.integers(40, 90, 2):
        objects.append(Image.fromarray(make_scene(rng, side, side, 40)))
    masks = [make_ellipse(picture.width, picture.height) for picture in objects]
    begin, end, phase = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3), rng.uniform(0, 6, 4)
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for i, time_in_clip in enumerate(np.linspace(0, 1, FRAMES)):
        # The camera pans and zooms over the world ...
        x, y, zoom = begin + (end - begin) * time_in_clip * 0.5
        view_width = 340 + 200 * zoom
        view_height = view_width * HEIGHT / WIDTH
        left, top = x * (world.width - view_width), y * (world.height - view_height)
        view = (left, top, left + view_width, top + view_height)
        frame = world.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, view)
        # ... in front of which the objects move.
        for picture, mask, phase_x, phase_y in zip(objects, masks, phase[:2], phase[2:]):
            object_x = int(WIDTH * (0.4 + 0.4 * np.sin(7 * time_in_clip + phase_x)))
            object_y = int(HEIGHT * (0.35 + 0.3 * np.cos(5 * time_in_clip + phase_y)))
            frame.paste(picture, (object_x, object_y), mask)
        noise = rng.normal(0, 1.0, (HEIGHT, WIDTH, 1))
        frames[i] = (np.asarray(frame) + noise).clip(0, 255)
    return frames, make_sound(rng).astype(np.int16)


def make_dataset(folder: pathlib.Path, clips: int) -> dict[str, pathlib.Path]:
    """Writes the same clips in every format.

    Returns:
        'jpeg', 'h264', 'dmvr': folders for config.data.train; 'tfrecord': the file of DMVR's
        records.
    """
    videos, captions = folder / 'videos', folder / 'captions.csv'
    videos.mkdir(parents=True)
    lines = ['video,start,end,text']
    rng = np.random.default_rng(0)
    for i in range(clips):
        frames, sound = clip(i)
        media.write_mp4(videos / f'{i}.mp4', frames, FPS, sound, RATE, crf=6, preset='ultrafast')
        for second in range(SECONDS):
            sentence = ' '.join(rng.choice(VOCABULARY, 9))
            lines.append(f'{i}.mp4,{second},{second + 1},{sentence}')
    captions.write_text('\n'.join(lines) + '\n')
    paths = {name: folder / name for name in ('jpeg', 'h264', 'dmvr', 'tfrecord')}
    for store in ('jpeg', 'h264'):
        prepare(
            str(videos),
            str(captions),
            str(paths[store]),
            store=store,
            size=HEIGHT,
            fps=FPS,
            rate=RATE,
            validation=0,
            test=0,
            quiet=True,
        )
    split = Split(Prepared(paths['jpeg']), 'train')
    with tf.io.TFRecordWriter(str(paths['tfrecord'])) as file:
        for row in range(len(split)):
            file.write(dmvr_record(split, row).SerializeToString())
    dmvr.index(str(paths['dmvr']), str(paths['tfrecord']), fps=FPS, rate=RATE, quiet=True)
    return paths


def dmvr_record(split: Split, row: int) -> tf.train.SequenceExample:
    """A prepared clip with its very JPEG bytes, sound and captions, as DMVR stores it."""
    frames, sound, _ = split.clip(row, range(FRAMES), range(SECONDS))
    record = tf.train.SequenceExample()
    lists = record.feature_lists.feature_list
    for jpeg in frames:
        lists[IMAGES].feature.add().bytes_list.value[:] = [jpeg]
    samples = np.frombuffer(b''.join(sound), '<i2') / np.float32(32767)
    lists[SOUND].feature.add().float_list.value[:] = samples
    first, last = split.index.sentence_offset[row : row + 2]
    sentences = [text.encode() for text in split.index.sentence_text[first:last]]
    record.context.feature[CAPTIONS].bytes_list.value[:] = sentences
    return record


# ---- the incumbent's procedure


def chance(probability: float):
    """True with that probability."""
    return tf.random.uniform([]) < probability


def maybe(probability: float, function, x):
    """function(x) with that probability, else x."""
    return tf.cond(chance(probability), lambda: function(x), lambda: x)


def parse(raw):
    """A record's captions, JPEGs and sound."""
    context, lists = tf.io.parse_single_sequence_example(
        raw,
        {CAPTIONS: tf.io.VarLenFeature(tf.string)},
        {
            IMAGES: tf.io.FixedLenSequenceFeature([], tf.string),
            SOUND: tf.io.VarLenFeature(tf.float32),
        },
    )
    return context[CAPTIONS], lists[IMAGES], lists[SOUND]


def decode_jpeg(jpeg):
    """uint8 [H W 3]."""
    return tf.io.decode_jpeg(jpeg, channels=3)


def jitter_scale(video):
    """Height and width 0.8 to 1.2 times as large, each for itself."""
    shape = tf.cast(tf.shape(video)[1:3], tf.float32) * tf.random.uniform([2], 0.8, 1.2)
    return tf.cast(tf.image.resize(video, tf.cast(shape, tf.int32)), video.dtype)


def resize_smallest(video):
    """The shorter side to SIZE."""
    height, width = tf.shape(video)[1], tf.shape(video)[2]
    if_wide = [SIZE, tf.maximum(SIZE, SIZE * width // height)]
    if_tall = [tf.maximum(SIZE, SIZE * height // width), SIZE]
    shape = tf.cond(height < width, lambda: if_wide, lambda: if_tall)
    return tf.cast(tf.image.resize(video, shape), video.dtype)


def jitter_color(video):
    """Brightness, saturation, contrast and hue, of values from -1 to 1."""
    video = tf.image.random_brightness((video + 1) / 2, 32 / 255)
    video = tf.image.random_saturation(video, 0.6, 1.4)
    video = tf.image.random_contrast(video, 0.6, 1.4)
    video = tf.image.random_hue(video, 0.2)
    return tf.clip_by_value(video, 0.0, 1.0) * 2 - 1


def incumbent_video(jpegs, begin, color: bool):
    """float32 [T SIZE SIZE 3]."""
    video = tf.map_fn(
        decode_jpeg,
        tf.gather(jpegs, begin + tf.range(USED_FRAMES)),
        fn_output_signature=tf.uint8,
    )
    video = maybe(0.8, jitter_scale, video)
    video = tf.image.random_crop(resize_smallest(video), [USED_FRAMES, SIZE, SIZE, 3])
    video = maybe(0.5, tf.image.flip_left_right, video)
    video = tf.image.convert_image_dtype(video, tf.float32) * 2 - 1
    if color:
        video = maybe(0.8, jitter_color, video)
    return tf.ensure_shape(video, [USED_FRAMES, SIZE, SIZE, 3])


def incumbent_audio(sound, begin):
    """float32 [S], from the sample that belongs to the first frame."""
    sound = tf.sparse.to_dense(sound)[0]
    size = tf.size(sound)
    first = tf.cast(begin, tf.float32) / FRAMES * tf.cast(size, tf.float32)
    first = tf.cast(tf.round(first), tf.int32)
    sound = tf.gather(sound, (first + tf.range(size)) % size)[:SAMPLES]
    sound += tf.random.normal([SAMPLES]) * 0.01 * tf.reduce_max(tf.abs(sound))
    return tf.ensure_shape(sound, [SAMPLES])


def incumbent_text(captions, table: tf.lookup.StaticHashTable):
    """int [K W], of neighbouring sentences."""
    captions = tf.strings.regex_replace(tf.sparse.to_dense(captions), r'[[:punct:]]', '')
    captions = tf.strings.lower(captions)
    last = tf.maximum(1, tf.size(captions) - SENTENCES + 1)
    first = tf.random.uniform([], maxval=last, dtype=tf.int32)
    words = tf.strings.split(captions[first : first + SENTENCES])
    return table.lookup(words.to_tensor('', shape=[SENTENCES, SENTENCE_WORDS]))


def incumbent(path: pathlib.Path, words: list[str], color: bool) -> Iterator[dict]:
    """Endless batches as DMVR makes them for VATT.

    Shuffling, which only holds records back, is left out.
    """
    ids = np.arange(2, len(words) + 2)
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(words, ids), 1)

    def example(raw):
        captions, jpegs, sound = parse(raw)
        last = FRAMES - USED_FRAMES + 1
        begin = tf.random.uniform([], maxval=last, dtype=tf.int32)
        return {
            'video': incumbent_video(jpegs, begin, color),
            'audio': incumbent_audio(sound, begin),
            'text': incumbent_text(captions, table),
        }

    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    data = tf.data.TFRecordDataset(str(path)).repeat().map(example, 1)
    data = data.batch(BATCH, drop_remainder=True).prefetch(1)
    return iter(data.with_options(options))


# ---- measuring


def make_config(path: pathlib.Path) -> ConfigDict:
    """VATT's config on a prepared dataset, with one worker thread."""
    config = vatt.get_config('bbs')
    config.data.train = {'clips': {'path': str(path)}}
    config.data.threads, config.data.prefetch = 1, 1
    return config


def cpu() -> float:
    """User and system seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def settle() -> float:
    """CPU seconds once no thread works any more."""
    last, quiet = cpu(), 0
    while quiet < 3:
        time.sleep(0.03)
        now = cpu()
        quiet = quiet + 1 if now - last < 1e-3 else 0
        last = now
    return last


def measure_turns(
    variants: Mapping[str, Iterator], turns: int, batches: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, dict]]:
    """Takes batches from all variants in turns, in one order and the other.

    Args:
        variants: iterators of batches.
        turns: of each.
        batches: taken in one turn.

    Returns:
        By variant: CPU ms per clip in each turn; that of random access and shuffle alone, of ours;
        and the last batch.
    """
    last_batch = {}
    # Traces, and fills the queues.
    for name, iterator in variants.items():
        for _ in range(2):
            last_batch[name] = next(iterator)
        settle()
    ms = {name: [] for name in variants}
    access_ms = {name: [] for name in GOALS}
    for turn in range(turns):
        names = list(variants)
        if turn % 2 == 0:
            names.reverse()
        for name in names:
            start = settle()
            for _ in range(batches):
                last_batch[name] = next(variants[name])
            spent = settle() - start
            ms[name].append(round(1e3 * spent / (batches * BATCH), 2))
        for name in GOALS:
            access_ms[name].append(measure_access(variants[name], turn))
    return ms, access_ms, last_batch


def measure_access(loader, turn: int, batches: int = 25) -> float:
    """CPU ms per clip of order, plan, reading and checking, without decoding."""
    start = settle()
    for step in range(batches):
        rows = loader._rows_of_batch(turn * batches + step)
        batch, request = loader._planner.plan(rows)
        loader._reader.read(rows, batch, request)
    return round(1e3 * (settle() - start) / (batches * BATCH), 3)


def measure_shuffle(batches: int = 200, batch_size: int = 256) -> float:
    """CPU ms per clip of the order alone, of 10⁸ clips."""
    start = settle()
    stream = order.Order([order.Source(10**8)], 0)
    for step in range(batches):
        stream.rows(order.train_positions(step, 0, batch_size))
    return 1e3 * (settle() - start) / (batches * batch_size)


def measure_device_stage(batch: dict, config: ConfigDict, repeats: int) -> list[float]:
    """CPU ms per clip of the device stage, jitted, on this CPU."""
    on_device = jax.device_put(feature_extractor.device_part(batch))

    @jax.jit
    def stage(batch, step):
        rng = Rng.create(0, step, batch['position'])
        return preprocess.device_stage(
            batch, config.model.inputs, config.augment, rng, augment=True, dtype='float32'
        )

    jax.block_until_ready(stage(on_device, 0))
    ms = []
    for i in range(repeats):
        start = settle()
        jax.block_until_ready(stage(on_device, i + 1))
        ms.append(round(1e3 * (settle() - start) / len(batch['position']), 2))
    return ms


def chip_demand() -> dict:
    """What chips at half their peak take in: VATT bbs, FLOPs of one clip's step."""
    config = vatt.get_config('bbs,synthetic')
    config.batch_size, config.mesh.replica = 2, 1
    built = loop.build(config, data_pipelines.open(config))
    variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
    counts = flops.by_tower(built.model, variables, plan.two_rows(built.inputs))
    flops_per_clip = flops.model_flops(counts)
    demand = {}
    for name, chip in chips.CHIPS.items():
        if chip.peak:
            rate = 0.5 * chip.peak / flops_per_clip
            demand[name] = {
                'clips_per_second': round(rate, 1),
                'frames_per_second': round(rate * USED_FRAMES),
            }
    return {'model': 'VATT bbs', 'flops_per_clip': flops_per_clip, 'chips': demand}


# ---- the tables


def bytes_on_disk(paths: dict[str, pathlib.Path]) -> dict[str, int]:
    """Of all clips, by format; DMVR's records need our index beside them."""
    sizes = {'incumbent': paths['tfrecord'].stat().st_size}
    for name in GOALS:
        sizes[name] = sum(file.stat().st_size for file in paths[name].iterdir())
    sizes['dmvr'] += sizes['incumbent']
    return sizes


def bytes_of_a_frame(path: pathlib.Path) -> int:
    """Mean over the first clip of a prepared dataset."""
    frames, _, _ = Split(Prepared(path), 'train').clip(0, range(FRAMES), [])
    return round(statistics.mean(len(frame) for frame in frames))


def compare_variants(
    ms: dict[str, list[float]],
    access_ms: dict[str, list[float]],
    last_batch: dict[str, dict],
    sizes: dict[str, int],
    clips: int,
) -> dict[str, dict]:
    """A row for each variant.

    Args:
        ms: CPU ms per clip, by variant and turn.
        access_ms: that of random access and shuffle alone, of ours.
        last_batch: by variant.
        sizes: bytes on disk.
        clips: as many there are.
    """
    incumbent_ms, incumbent_size = statistics.median(ms['incumbent']), sizes['incumbent']
    rows = {}
    for name, turns in ms.items():
        median_ms, size = statistics.median(turns), sizes.get(name, incumbent_size)
        rows[name] = {
            'cpu_ms': median_ms,
            'times_less': round(incumbent_ms / median_ms, 2),
            'bytes': round(size / clips),
            'of_bytes': round(size / incumbent_size, 3),
            'clips_per_second_and_core': round(1e3 / median_ms, 1),
            'turns_ms': turns,
        }
        if name in GOALS:
            video, audio = last_batch[name]['video'], last_batch[name]['audio']
            rows[name] |= {
                'random_access_and_shuffle_ms': statistics.median(access_ms[name]),
                'goal': GOALS[name],
                'bus_bytes': int(video['data'][0].nbytes + audio['data'][0].nbytes),
            }
    return rows


def print_variants(rows: dict[str, dict]) -> None:
    """Our variants beside the incumbent."""
    print(
        f'{"":26s} {"CPU ms/clip":>12s} {"times less":>11s} {"goal":>5s} {"kB/clip":>8s} '
        f'{"of bytes":>9s} {"clips/s/core":>13s} {"access ms":>10s}'
    )
    for name, row in rows.items():
        access_ms = row.get('random_access_and_shuffle_ms', '')
        print(
            f'{name:26s} {row["cpu_ms"]:12.1f} {row["times_less"]:11.2f} '
            f'{row.get("goal", ""):>5} {row["bytes"] / 1e3:8.0f} {row["of_bytes"]:9.2f} '
            f'{row["clips_per_second_and_core"]:13.0f} {access_ms:>10}'
        )


def print_demand(demand: dict, cpu_ms: float) -> None:
    """How many cores a chip would need, at so many CPU ms per clip."""
    for name, row in demand['chips'].items():
        cores = row['clips_per_second'] * cpu_ms / 1e3
        print(
            f'{name} at 50 % with {demand["model"]}: {row["clips_per_second"]:.0f} clips/s = '
            f'{row["frames_per_second"]} frames/s: {cores:.1f} such cores (jpeg)'
        )


def measure(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """Makes the clips in a folder, measures, prints and, unless --quick, writes the results."""
    began = time.monotonic()
    paths = make_dataset(folder, flags.clips)
    seconds_to_make = time.monotonic() - began
    words = json.loads((paths['jpeg'] / 'tokenizer.json').read_text())['vocabulary']
    variants = {
        'incumbent': incumbent(paths['tfrecord'], words, color=True),
        'incumbent without colour': incumbent(paths['tfrecord'], words, color=False),
    }
    for name in GOALS:
        variants[name] = data_pipelines.open(make_config(paths[name])).train(0, BATCH)
    ms, access_ms, last_batch = measure_turns(variants, flags.turns, flags.batches)
    shuffle_ms = measure_shuffle()
    config = make_config(paths['jpeg'])
    device_ms = {
        'frames whole, RGB (jpeg, dmvr)': measure_device_stage(
            last_batch['jpeg'], config, flags.turns
        ),
        'planes (h264)': measure_device_stage(last_batch['h264'], config, flags.turns),
    }
    rows = compare_variants(ms, access_ms, last_batch, bytes_on_disk(paths), flags.clips)
    frame_bytes = {name: bytes_of_a_frame(paths[name]) for name in ('jpeg', 'h264')}
    demand = chip_demand()

    print_variants(rows)
    print(
        f'a frame: {frame_bytes["jpeg"] / 1e3:.1f} kB as JPEG, {frame_bytes["h264"] / 1e3:.1f} kB '
        f'as H.264; shuffle alone {shuffle_ms:.4f} ms/clip'
    )
    device_stage = {}
    for name, turns in device_ms.items():
        device_stage[name] = {'median': statistics.median(turns), 'turns': turns}
        print(f'device stage on this CPU, {name}: {statistics.median(turns):.1f} CPU ms/clip')
    print_demand(demand, rows['jpeg']['cpu_ms'])
    for batches in variants.values():
        if hasattr(batches, 'close'):  # not TensorFlow's own
            batches.close()
    scaling = {}
    for name in ('jpeg', 'h264'):
        scaling[name] = reader_scaling.measure(str(paths[name]), flags.turns, flags.batches)
        reader_scaling.show(name, scaling[name])
    seconds = time.monotonic() - began
    print(f'{seconds:.0f} s, of which {seconds_to_make:.0f} to make the clips')
    if flags.quick:
        return
    results = {
        'commit': repository.git('rev-parse', 'HEAD'),
        'date': datetime.date.today().isoformat(),
        'machine': f'{repository.processor(platform.machine())}, {os.cpu_count()} cores',
        'tensorflow': tf.__version__,
        'config': {
            **vars(flags),
            'batch': BATCH,
            'stored': [FRAMES, HEIGHT, WIDTH],
            'used': [USED_FRAMES, SIZE, SIZE],
            'samples': SAMPLES,
            'threads': 1,
        },
        'variants': rows,
        'frame_bytes': frame_bytes,
        'shuffle_ms': round(shuffle_ms, 5),
        'device_stage_cpu_ms': device_stage,
        'needed': demand,
        'scaling': scaling,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


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


if __name__ == '__main__':
    main()
