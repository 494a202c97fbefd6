"""What stands around the order of examples, from ten thousand videos to a million.

    python benchmarks/data_scale.py                   # 10^4, 10^5, 10^6 videos: half an hour, 7 GB
    python benchmarks/data_scale.py --videos=10000    # a minute

Every video has 113 captions of eight words, as HowTo100M's have, a hundred frames and ten seconds
of sound. Their tables are written by the writers of `prepare`, record by record; the records
themselves are a file of zeros, which takes no room on the disk and is never read, since batches of
text come from the index alone. (`prepare` as a whole is measured by benchmarks/prepare_scale.py.)

Each line is measured in a process of its own: seconds, and the memory that the part adds to what
Python and the libraries take before it, without pages of mapped files, which all processes of a
machine share and the system takes back when it needs them:

  write   the index and the byte offsets, with their bytes on the disk
  open    a data object of the split, as in every process of a run
  batch   512 training rows at random places, text alone; from the second on
  pass    the first 20,480 rows of an evaluation pass, text alone
  texts   data.texts('train'), and a thousand random entries of it

The growth is the exponent of a fit over the sizes: 0 is flat, 1 proportional to the videos. Writes
benchmarks/results/data_scale.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import numpy as np
from support import repository

import data_pipelines
from configs.default import get_config
from data_pipelines.storage import record_index, records
from data_pipelines.storage.index_writer import IndexWriter
from vatt_jax.inputs import tokenizer

RESULTS = repository.RESULTS / 'data_scale.json'

NUM_SENTENCES = 113
NUM_FRAMES = 100
FRAME_BYTES = 9000
NUM_SECONDS = 10
RATE = 16000
SIDE = 256  # pixels
WORDS = tuple(f'word{number}' for number in range(5000))
BATCH = 512
BATCHES = 20
PASS_ROWS = 20_480
NUM_TEXTS = 1000
PARTS = ('write', 'open', 'batch', 'pass', 'texts')


def memory_mb() -> float:
    """Resident memory of this process without pages of files."""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon'):
            return int(line.split()[1]) / 1024
    raise SystemExit('this benchmark reads /proc/self/status, which is only on Linux')


def seconds_since(began: float) -> float:
    return round(time.perf_counter() - began, 4)


# ---- The tables.


def synthetic_records(num_videos: int) -> Iterator[dict[str, Any]]:
    """What `prepare` knows of each video."""
    draw = random.Random(0)
    for number in range(num_videos):
        sentences = [
            {
                'start': float(second),
                'end': second + 1.0,
                'text': ' '.join(draw.choices(WORDS, k=8)),
            }
            for second in range(NUM_SENTENCES)
        ]
        segment = {'start': 0.0, 'end': float(NUM_SENTENCES), 'caption': '', 'labels': {}}
        yield {
            'id': f'{number // 1000:04d}/video{number:07d}.mp4',
            'frames': NUM_FRAMES,
            'samples': NUM_SECONDS * RATE,
            'height': SIDE,
            'width': SIDE,
            'duration': float(NUM_SENTENCES),
            'ground_truth': '{}',
            'sentences': sentences,
            'segments': [segment],
        }


def synthetic_pieces() -> tuple[np.ndarray, np.ndarray, int]:
    """Offset, bytes and crc32 of the frames and seconds of a record, and the record's length."""
    # Of a BytesList: one byte for the tag of a frame and two for its length.
    stride = FRAME_BYTES + 3
    frames = np.zeros((NUM_FRAMES, 3), np.uint32)
    frames[:, 0] = 100 + stride * np.arange(NUM_FRAMES)
    frames[:, 1] = FRAME_BYTES
    seconds = np.zeros((NUM_SECONDS, 3), np.uint32)
    sound_begin = 100 + stride * NUM_FRAMES
    seconds[:, 0] = sound_begin + 2 * RATE * np.arange(NUM_SECONDS)
    seconds[:, 1] = 2 * RATE
    return frames, seconds, sound_begin + 2 * RATE * NUM_SECONDS


def write_dataset(folder: pathlib.Path, num_videos: int) -> None:
    """Make a prepared folder whose records are zeros."""
    frames, seconds, length = synthetic_pieces()
    with open(folder / 'scale-train.array_record-00000-of-00001', 'wb') as file:
        file.truncate(num_videos * length)
    pieces = records.pieces_writer(folder, 'train', RATE)
    with IndexWriter(record_index.folder_of(folder, 'train'), {}) as index, pieces:
        for number, record in enumerate(synthetic_records(num_videos)):
            index.add(record, number)
            pieces.add(0, number * length, length, frames, seconds)
    split = record_index.Index.open(record_index.folder_of(folder, 'train'))
    description = {
        'version': record_index.VERSION,
        'name': 'scale',
        'fps': 10.0,
        'size': SIDE,
        'rate': RATE,
        'quality': 90,
        'labels': {},
        'multi_hot': [],
        'splits': {'train': split.summary()},
        'folds': [],
        'format': {'kind': 'example'},
    }
    words = tokenizer.train('words', WORDS, len(WORDS) + 2)
    record_index.write_json(folder / 'tokenizer.json', words.to_spec())
    record_index.write_json(folder / 'index.json', description)
    record_index.write_json(folder / 'prepare.json', {'files': []})


def size_mb(folder: pathlib.Path) -> float:
    """Bytes below a folder, in MB."""
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6


# ---- What a run does with them.


def text_config(folder: pathlib.Path) -> Any:
    """A run that reads text alone."""
    config = get_config()
    for modality in ('video', 'audio'):
        del config.model.inputs[modality]
    config.batch_size = BATCH
    config.data.train = {'scale': {'path': str(folder)}}
    return config


def write(folder: pathlib.Path, num_videos: int) -> dict[str, float]:
    began = time.perf_counter()
    write_dataset(folder, num_videos)
    return {
        'seconds': seconds_since(began),
        'index_mb': round(size_mb(folder / 'index-train'), 1),
        'offsets_mb': round(size_mb(folder / 'pieces-train'), 1),
    }


def open_split(folder: pathlib.Path, num_videos: int) -> dict[str, float]:
    config = text_config(folder)
    began = time.perf_counter()
    data = data_pipelines.open(config)
    assert data.size('train') == num_videos
    return {'seconds': seconds_since(began)}


def read_batches(folder: pathlib.Path, num_videos: int) -> dict[str, float]:
    data = data_pipelines.open(text_config(folder))
    batches = data.train(0, BATCH)
    next(batches)
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return {'seconds': round(seconds_since(began) / BATCHES, 5)}


def read_pass(folder: pathlib.Path, num_videos: int) -> dict[str, float]:
    data = data_pipelines.open(text_config(folder))
    began = time.perf_counter()
    num_rows = 0
    for batch in data.one_pass('train', BATCH, limit=min(PASS_ROWS, num_videos)):
        num_rows += int(batch['valid'].sum())
    assert num_rows == min(PASS_ROWS, num_videos)
    # So that passes over fewer videos compare.
    return {'seconds': round(seconds_since(began) * PASS_ROWS / num_rows, 4)}


def read_texts(folder: pathlib.Path, num_videos: int) -> dict[str, float]:
    data = data_pipelines.open(text_config(folder))
    places = random.Random(0).choices(range(num_videos), k=NUM_TEXTS)
    began = time.perf_counter()
    texts = data.texts('train')
    assert len(texts) == num_videos
    for place in places:
        assert len(texts[place]['sentences']) == NUM_SENTENCES
    return {'seconds': seconds_since(began)}


FUNCTIONS: dict[str, Callable[[pathlib.Path, int], dict[str, float]]] = {
    'write': write,
    'open': open_split,
    'batch': read_batches,
    'pass': read_pass,
    'texts': read_texts,
}


def warm_up() -> None:
    """Use everything once: what the libraries take for themselves is no part of what grows."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(pathlib.Path(folder), BATCH)
        data = data_pipelines.open(text_config(pathlib.Path(folder)))
        next(data.train(0, BATCH))
        data.close()


def run_part(part: str, folder: str, num_videos: int, answer: Any) -> None:
    """Body of a process: sends the figures of one part."""
    warm_up()
    before = memory_mb()
    figures = FUNCTIONS[part](pathlib.Path(folder), num_videos)
    answer.send({**figures, 'memory_mb': round(memory_mb() - before, 1)})


def measure(part: str, folder: str, num_videos: int) -> dict[str, float]:
    """Run a part in a process of its own."""
    # Not forked: a copy of this process would begin with its memory.
    context = multiprocessing.get_context('spawn')
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_part, args=(part, folder, num_videos, send))
    process.start()
    # Ours has to be closed, or a process that dies would leave `recv` waiting.
    send.close()
    try:
        figures = receive.recv()
    except EOFError:
        raise SystemExit(f'{part} with {num_videos} videos ended without figures') from None
    process.join()
    return figures


# ---- Figures.


def growth(sizes: list[int], values: list[float]) -> float | None:
    """The exponent p of values ~ sizes^p; None where a value is not above 0, or for one size."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return round(float(slope), 2)


def print_growth(sizes: list[int], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Exponents of each part's figures."""
    exponents: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        of_part = [row for row in rows if row['part'] == part]
        exponents[part] = {}
        for name in of_part[0]:
            if name not in ('part', 'videos'):
                exponents[part][name] = growth(sizes, [row[name] for row in of_part])
        print(f'{part:6} growth {exponents[part]}')
    return exponents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--videos', default='10000,100000,1000000', help='sizes, with commas')
    args = parser.parse_args()
    sizes = [int(size) for size in args.videos.split(',')]
    rows = []
    for num_videos in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for part in PARTS:
                figures = measure(part, folder, num_videos)
                rows.append({'part': part, 'videos': num_videos, **figures})
                print(f'{num_videos:8} videos  {part:6} {figures}', flush=True)
    results = {
        'commit': repository.commit('data_pipelines', 'benchmarks/data_scale.py'),
        'date': datetime.date.today().isoformat(),
        'hardware': f'{os.cpu_count()} × {repository.processor()}',
        'load_average': os.getloadavg(),
        'config': {'captions': NUM_SENTENCES, 'frames': NUM_FRAMES, 'seconds': NUM_SECONDS},
        'rows': rows,
        'growth': print_growth(sizes, rows),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    print(f'written: {RESULTS.relative_to(repository.ROOT)}')


if __name__ == '__main__':
    main()
