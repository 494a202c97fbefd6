"""Videos to mp4 files with captions and ground truth, by several processes, resumable."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipelines.datasets.playground import boxes, drawing, narration, sound, world
from data_pipelines.datasets.playground.world import Config
from data_pipelines.preparation import worker_processes


def render(
    config: Config, out: str | os.PathLike, processes: int = 2, quiet: bool = False
) -> pathlib.Path:
    """Writes <out>/media/<split>/NNNNNN.mp4, <out>/captions.json and <out>/annotations.json.

    With `config.pictures` also <out>/images/<split>/NNNNNN_FFFF.png and <out>/boxes_<split>.json.

    Files that are there stay: each is written under another name first, so a file that exists is
    whole.

    Returns:
        <out>/media.
    """
    out = pathlib.Path(out)
    jobs = [(split, n) for split in world.SPLITS for n in range(getattr(config, split))]
    for split in world.SPLITS:
        (out / 'media' / split).mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not path_of(out, *job).exists()]
    if missing:
        _write_all(config, out, missing, processes, quiet)
    captions, videos = {}, {}
    for split, number in jobs:
        name = f'{split}/{number:06d}.mp4'
        episodes = world.video(config, split, number)
        captions[name] = narration.narrate(world.rng_of(config, split, number, 3), episodes)
        videos[name] = truth(config, episodes)
    labels = {
        'class': list(world.CLASSES),
        'event': list(world.EVENTS),
        'object': list(world.KINDS),
        'color': list(world.COLORS),
        'size': list(world.SIZES),
    }
    if config.pictures:
        for split in world.SPLITS:
            boxes.write(config, out, split)
    _write_json(out / 'captions.json', captions)
    _write_json(out / 'annotations.json', {'labels': labels, 'videos': videos})
    return out / 'media'


def _write_json(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def path_of(out: pathlib.Path, split: str, number: int) -> pathlib.Path:
    """Where one video is written."""
    return out / 'media' / split / f'{number:06d}.mp4'


def content(config: Config, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One video before it is encoded: frames uint8 [T H W 3] and audio int16 [S]."""
    episodes = world.video(config, split, number)
    frames = drawing.frames(config, episodes, world.rng_of(config, split, number, 1))
    audio = sound.waveform(config, episodes, world.rng_of(config, split, number, 2))
    return frames, audio


def write(config: Config, out: pathlib.Path, job: tuple[str, int]) -> None:
    """Draws and encodes one video. job: (split, number)."""
    from data_pipelines.media import write_mp4

    path = path_of(out, *job)
    temporary = path.with_suffix('.tmp.mp4')
    frames, audio = content(config, *job)
    # Before the video: where that is, its pictures are too.
    boxes.write_pictures(config, out, *job, frames)
    write_mp4(temporary, frames, config.fps, audio, config.rate)
    os.replace(temporary, path)


def _write_all(
    config: Config, out: pathlib.Path, jobs: list[tuple[str, int]], processes: int, quiet: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(quiet=quiet)) as progress_bar:
        task = progress_bar.add_task('playground: rendering', total=len(jobs))

        def render(worker: worker_processes.Worker, job: tuple[str, int]) -> None:
            worker.call(write, config, out, job)
            progress_bar.advance(task)

        worker_processes.for_each(jobs, max(1, processes), render)


def truth(config: Config, episodes: list[world.Episode]) -> dict[str, Any]:
    """The annotation of one video.

    Labelled segments, times of events, boxes by frame, and the looks of every object.
    """
    segments, events, objects = [], [], []
    for episode in episodes:
        subject = episode.subject
        segments.append(segment(episode))
        for time, event, _ in episode.sounds:
            heard = round(float(max(time, episode.begin)), 4)
            events.append({'time': heard, 'sound': event, 'object': subject.kind})
        looks = []
        for thing in episode.things:
            looks.append(
                {
                    'kind': thing.kind,
                    'color': thing.color,
                    'texture': thing.texture,
                    'size': thing.size,
                }
            )
        objects.append(looks)
    ground_truth: dict[str, Any] = {
        'events': events,
        'objects': objects,
        'boxes': drawing.boxes(config, episodes),
    }
    # Not in every playground: the files of those that are there stay what they are.
    if config.tells_sounding:
        ground_truth['fps'] = config.fps
        ground_truth['sounds'] = boxes.sounding(episodes)
        ground_truth['kinds'] = boxes.kinds(episodes)
    return {'segments': segments, 'ground_truth': ground_truth}


def segment(episode: world.Episode) -> dict[str, Any]:
    """The labelled segment of one scene."""
    subject = episode.subject
    return {
        'start': round(float(episode.begin), 3),
        'end': round(float(episode.end), 3),
        'caption': narration.caption(episode),
        'labels': {
            'class': world.CLASSES.index(episode.label),
            'event': world.EVENTS.index(episode.event),
            'object': world.KINDS.index(subject.kind),
            'color': list(world.COLORS).index(subject.color),
            'size': list(world.SIZES).index(subject.size),
        },
    }
