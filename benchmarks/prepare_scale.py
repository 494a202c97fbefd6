"""Preparing a million videos: peak memory, and kills at random moments.

    python benchmarks/prepare_scale.py memory --videos=10000    # some minutes
    python benchmarks/prepare_scale.py memory --videos=100000 --sentences=3
    python benchmarks/prepare_scale.py whole --videos=1000000 --sentences=3     # an hour or two
    python benchmarks/prepare_scale.py kills                    # some twenty minutes

`memory` prepares a folder whose videos count as decoded already: their staged files are written
directly, with one frame of a hundred bytes and as many sentences as a video of HowTo100M has. What
is left is all that data_pipelines.prepare does besides decoding. Written are the largest resident
memory of its process in MB, the part of it that is no page of a file (sampled), and its seconds.
`--cache_mb` gives the catalog's database another page cache than its own.

`whole` leaves nothing out: files are decoded too, by two processes. Each is a link to one of a few
sounds of a third of a second, so that a million of them take an hour and no room. Memory is that of
the command itself, without its workers.

`kills` prepares small real videos with four workers, and kills the command (SIGKILL) at random
moments until it has been killed often enough. What comes out in the end has to be the files of a
run that nobody killed, byte for byte.

All write benchmarks/results/prepare_scale.json.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from support import repository

from data_pipelines import media
from data_pipelines.preparation import decoded_files, media_catalog

RESULTS = repository.RESULTS / 'prepare_scale.json'
SETTINGS = decoded_files.Settings(fps=10.0, size=32, rate=8000, quality=90, min_seconds=0.0)
# Sentences of a video of HowTo100M, on average; each of eight words.
NUM_SENTENCES = 113
WORDS = tuple(f'word{number}' for number in range(20000))
VIDEOS_PER_FOLDER = 1000
# A file has at most 65,000 names on ext4.
LINKS_PER_FILE = 50_000
# Of the files of `whole`, in seconds.
SOUND_LENGTH = 0.3
# In a process of its own, whose memory is nothing but that of the preparation. RUSAGE_SELF leaves
# worker processes out.
MEASURED_PROGRAM = """
import re, resource, sys, threading, time
from data_pipelines import prepare
from data_pipelines.preparation import store

cache_mb = int(sys.argv[1])
if cache_mb:
    store._CACHE_KIB = cache_mb << 10
largest_kb = 0

def watch():
    global largest_kb
    while True:
        status = open('/proc/self/status').read()
        largest_kb = max(largest_kb, int(re.search(r'RssAnon:\\s*(\\d+)', status)[1]))
        time.sleep(0.05)

threading.Thread(target=watch, daemon=True).start()
code = prepare.main(sys.argv[2:])
print('anonymous_mb', largest_kb // 1024)
print('peak_mb', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


def write_names(folder: pathlib.Path, count: int) -> list[str]:
    """Make empty files in place of videos; returns their paths below the folder."""
    names = []
    for number in range(count):
        name = f'{number // VIDEOS_PER_FOLDER:04d}/video{number:07d}.mp4'
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        names.append(name)
    return names


def write_sounds(folder: pathlib.Path, count: int) -> list[str]:
    """Make links to short sounds; returns their paths below the folder."""
    rate = int(SETTINGS.rate)
    noise = np.random.default_rng(0).integers(-999, 999, int(rate * SOUND_LENGTH))
    names = []
    for number in range(count):
        source = folder.parent / f'sound{number // LINKS_PER_FILE}.wav'
        if not source.exists():
            with wave.open(str(source), 'wb') as file:
                file.setparams((1, 2, rate, 0, 'NONE', ''))
                file.writeframes(noise.astype('<i2').tobytes())
        name = f'{number // VIDEOS_PER_FOLDER:04d}/sound{number:07d}.wav'
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(source)
        names.append(name)
    return names


def write_captions(
    path: pathlib.Path, names: list[str], num_sentences: int, length: float = 1.0
) -> None:
    """Write a table of captions, `length` seconds each, one after another."""
    draw = random.Random(0)
    with path.open('w') as table:
        table.write('video,start,end,text\n')
        for name in names:
            for number in range(num_sentences):
                begin, end = number * length, (number + 1) * length
                text = ' '.join(draw.choices(WORDS, k=8))
                table.write(f'{name},{begin:g},{end:g},{text}\n')


def write_staged(videos: pathlib.Path, stage_dir: pathlib.Path, seconds: int) -> None:
    """Write staged files of one frame as if all videos were decoded."""
    frame = bytes(100)
    header = {
        'height': 32,
        'width': 32,
        'samples': 0,
        'lengths': [len(frame)],
        'duration': float(seconds),
    }
    for file in media_catalog.scan(videos):
        target = decoded_files.staged_path(stage_dir, file, SETTINGS)
        decoded_files.write(str(target), {'id': file.id, **header}, [frame])


def command_line(root: pathlib.Path, out: pathlib.Path, *flags: str) -> list[str]:
    """Arguments of data_pipelines.prepare for the videos below `root`."""
    return [
        f'--videos={root / "videos"}',
        f'--captions={root / "captions.csv"}',
        f'--out={out}',
        f'--fps={SETTINGS.fps}',
        f'--size={SETTINGS.size}',
        f'--rate={SETTINGS.rate}',
        f'--min_seconds={SETTINGS.min_seconds}',
        '--name=scale',
        *flags,
    ]


def measure_memory(num_videos: int, num_sentences: int, cache_mb: int) -> dict[str, Any]:
    """Prepare a folder of staged videos.

    Args:
        num_videos: videos in the folder.
        num_sentences: sentences of each.
        cache_mb: page cache of the catalog's database; 0 for its own.

    Returns:
        'videos', 'sentences' of each, and see `measure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        out = root / 'out'
        names = write_names(root / 'videos', num_videos)
        write_captions(root / 'captions.csv', names, num_sentences)
        write_staged(root / 'videos', out / '.staging', num_sentences)
        found = measure(root, out, num_videos, cache_mb, processes=1)
    return {'videos': num_videos, 'sentences': num_sentences, **found}


def measure_whole(num_videos: int, num_sentences: int, cache_mb: int) -> dict[str, Any]:
    """Prepare a folder of sounds, decoding included; see `measure_memory`."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        names = write_sounds(root / 'videos', num_videos)
        length = SOUND_LENGTH / num_sentences
        write_captions(root / 'captions.csv', names, num_sentences, length)
        found = measure(root, root / 'out', num_videos, cache_mb, processes=2)
    return {'videos': num_videos, 'sentences': num_sentences, **found}


def measure(
    root: pathlib.Path, out: pathlib.Path, num_videos: int, cache_mb: int, processes: int
) -> dict[str, Any]:
    """Prepare `root` in a process of its own.

    Returns:
        'peak_mb' of resident memory, 'anonymous_mb' of it that are no pages of files, 'seconds'.
    """
    started = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, '-c', MEASURED_PROGRAM, str(cache_mb)),
            *command_line(root, out, f'--processes={processes}'),
        ],
        cwd=repository.ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f'the preparation failed:\n{done.stdout}\n{done.stderr}')
    seconds = time.monotonic() - started
    with (out / 'prepare.json').open() as file:
        splits = json.load(file)['summary']['splits']
    assert sum(split['records'] for split in splits.values()) == num_videos
    return {
        'peak_mb': int(done.stdout.split('peak_mb')[1]),
        'anonymous_mb': int(done.stdout.split('anonymous_mb')[1].split()[0]),
        'seconds': round(seconds, 1),
    }


# ---- Kills.


def write_videos(folder: pathlib.Path, count: int) -> list[str]:
    """Write small videos with sound: a few that differ, under many names."""
    draw = np.random.default_rng(0)
    names = []
    sources: list[pathlib.Path] = []
    for number in range(count):
        name = f'{number // VIDEOS_PER_FOLDER:04d}/video{number:07d}.mp4'
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 50:
            frames = draw.integers(0, 255, (5, 32, 32, 3), np.uint8)
            sound = draw.integers(-999, 999, 4000).astype(np.int16)
            media.write_mp4(path, frames, 10, sound, SETTINGS.rate)
            sources.append(path)
        else:
            shutil.copyfile(sources[number % len(sources)], path)
        names.append(name)
    return names


def run_killed(command: list[str], seconds: float) -> int:
    """Run a command and kill it after a while; returns its exit code, negative if it was killed."""
    process = subprocess.Popen(command, cwd=repository.ROOT, stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait()


def progress(out: pathlib.Path) -> str:
    """What a killed run has left: 'nothing', 'N decoded', or also 'records'."""
    staging = out / '.staging'
    num_decoded = sum('.' not in path.name for path in staging.glob('files/*/*'))
    has_records = any(staging.glob('tfds/**/*array_record*')) or any(out.glob('*array_record*'))
    return f'{num_decoded} decoded' + (', records begun' if has_records else '')


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """Files that are in one of two prepared folders only, or differ."""
    names = set()
    for folder in (expected, found):
        names |= {path.relative_to(folder) for path in folder.rglob('*') if path.is_file()}
    # It holds the seconds that the command took.
    names.discard(pathlib.Path('prepare.json'))
    different = []
    for name in sorted(names):
        both = (expected / name, found / name)
        if not all(map(os.path.isfile, both)) or not filecmp.cmp(*both, shallow=False):
            different.append(str(name))
    return different


def measure_kills(num_videos: int, num_kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Kill the preparation of real videos again and again.

    Returns:
        'videos', 'kills', 'processes', 'states': what each kill has left, 'finished': how often
        a run was whole before it was killed, 'different': files that are not those of an
        uninterrupted run.
    """
    draw = random.Random(seed)
    states: list[str] = []
    different: list[str] = []
    num_finished = 0
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_captions(root / 'captions.csv', write_videos(root / 'videos', num_videos), 3)
        whole, out = root / 'whole', root / 'out'
        flags = ('--quiet', f'--processes={processes}')
        program = [sys.executable, '-m', 'data_pipelines.prepare']
        started = time.monotonic()
        subprocess.run(
            [*program, *command_line(root, whole, *flags)], cwd=repository.ROOT, check=True
        )
        duration = time.monotonic() - started
        command = [*program, *command_line(root, out, *flags)]
        while len(states) < num_kills:
            if run_killed(command, draw.uniform(0, 0.7 * duration)) < 0:
                states.append(progress(out))
                print(f'kill {len(states)}: {states[-1]}', flush=True)
            else:
                # Whole before its time: once more from the beginning.
                num_finished += 1
                different += differences(whole, out)
                shutil.rmtree(out)
        subprocess.run(command, cwd=repository.ROOT, check=True)
        different += differences(whole, out)
    return {
        'videos': num_videos,
        'kills': num_kills,
        'processes': processes,
        'states': states,
        'finished': num_finished + 1,
        'different': different,
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('part', choices=('memory', 'whole', 'kills'))
    parser.add_argument('--videos', type=int, default=0, help='number of videos')
    parser.add_argument(
        '--sentences', type=int, default=NUM_SENTENCES, help='of each video, not of `kills`'
    )
    parser.add_argument('--cache_mb', type=int, default=0, help='of the catalog, not of `kills`')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--processes', type=int, default=4, help='of the runs that are killed')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    flags = parser.parse_args()
    if flags.part != 'kills':
        measured = measure_memory if flags.part == 'memory' else measure_whole
        result = measured(flags.videos or 10000, flags.sentences, flags.cache_mb)
        key = f'{flags.part}, {result["videos"]} videos'
        if flags.cache_mb:
            key = f'{key}, cache of {flags.cache_mb} MB'
    else:
        result = measure_kills(flags.videos or 2000, flags.kills, flags.processes, flags.seed)
        key = 'kills'
    print(json.dumps(result, indent=1))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[key] = {**result, 'commit': repository.commit('data_pipelines')}
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    if result.get('different'):
        raise SystemExit('files differ from those of an uninterrupted run')


if __name__ == '__main__':
    main()
