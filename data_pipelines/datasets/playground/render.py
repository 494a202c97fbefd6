"""Videos to mp4 files with captions and ground truth, by several processes, resumable."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib

import numpy as np

from data_pipelines.datasets.playground import drawing, narration, sound, world
from data_pipelines.datasets.playground.world import Config


def render(
    config: Config, out: str | os.PathLike, processes: int = 2, quiet: bool = False
) -> pathlib.Path:
    """Writes <out>/media/<split>/NNNNNN.mp4, <out>/captions.json and <out>/annotations.json; returns <out>/media.

    Files that are there are kept: each is written under another name first, so a file that exists is whole.
    """
    out = pathlib.Path(out)
    jobs = [(split, n) for split in world.SPLITS for n in range(getattr(config, split))]
    for split in world.SPLITS:
        (out / 'media' / split).mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not path_of(out, *job).exists()]
    if missing:
        _write_all(config, out, missing, processes, quiet)
    captions, videos = {}, {}
    for split, n in jobs:
        name = f'{split}/{n:06d}.mp4'
        episodes = world.video(config, split, n)
        captions[name] = narration.narrate(world.rng_of(config, split, n, 3), episodes)
        videos[name] = truth(config, episodes)
    labels = {
        'class': list(world.CLASSES),
        'event': list(world.EVENTS),
        'object': list(world.KINDS),
        'color': list(world.COLORS),
        'size': list(world.SIZES),
    }
    for file, value in (
        ('captions.json', captions),
        ('annotations.json', {'labels': labels, 'videos': videos}),
    ):
        temporary = out / (file + '.tmp')
        temporary.write_text(json.dumps(value))
        os.replace(temporary, out / file)
    return out / 'media'


def path_of(out: pathlib.Path, split: str, number: int) -> pathlib.Path:
    return out / 'media' / split / f'{number:06d}.mp4'


def content(config: Config, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames uint8 [T size size 3], audio int16 [S]) of one video, before they are encoded."""
    episodes = world.video(config, split, number)
    return (
        drawing.frames(config, episodes, world.rng_of(config, split, number, 1)),
        sound.waveform(config, episodes, world.rng_of(config, split, number, 2)),
    )


def write(config: Config, out: pathlib.Path, job: tuple[str, int]) -> None:
    from data_pipelines.media import write_mp4

    path = path_of(out, *job)
    temporary = path.with_suffix('.tmp.mp4')
    frames, audio = content(config, *job)
    write_mp4(temporary, frames, config.fps, audio, config.rate)
    os.replace(temporary, path)


def _write_all(config: Config, out: pathlib.Path, jobs: list, processes: int, quiet: bool) -> None:
    from rich.progress import track

    context = multiprocessing.get_context(
        'spawn'
    )  # forking a process that runs TensorFlow or JAX threads can hang
    with concurrent.futures.ProcessPoolExecutor(max(1, processes), mp_context=context) as pool:
        done = pool.map(functools.partial(write, config, out), jobs, chunksize=8)
        for _ in track(done, description='playground: rendering', total=len(jobs), disable=quiet):
            pass


def truth(config: Config, episodes: list[world.Episode]) -> dict:
    """The annotation of one video: labelled segments, event times, boxes by frame, every object's looks."""
    segments, events, objects = [], [], []
    for e in episodes:
        s = e.subject
        segments.append(
            {
                'start': round(float(e.begin), 3),
                'end': round(float(e.end), 3),
                'caption': narration.caption(e),
                'labels': {
                    'class': world.CLASSES.index(e.label),
                    'event': world.EVENTS.index(e.event),
                    'object': world.KINDS.index(s.kind),
                    'color': list(world.COLORS).index(s.color),
                    'size': list(world.SIZES).index(s.size),
                },
            }
        )
        events += [
            {'time': round(float(max(t, e.begin)), 4), 'sound': what, 'object': s.kind}
            for t, what, _ in e.sounds
        ]
        objects.append(
            [
                {'kind': x.kind, 'color': x.color, 'texture': x.texture, 'size': x.size}
                for x in (s, *e.distractors)
            ]
        )
    return {
        'segments': segments,
        'ground_truth': {
            'events': events,
            'objects': objects,
            'boxes': drawing.boxes(config, episodes),
        },
    }
