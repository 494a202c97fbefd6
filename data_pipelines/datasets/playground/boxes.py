"""True boxes with what is heard, as COCO files beside the pictures they belong to."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipelines.datasets.playground import drawing, sound, world
from data_pipelines.datasets.playground.world import Config, Episode

# Seconds before and after a picture in which a sound counts as its own: one second of sound is
# what a picture is compared with.
HEARD_AROUND = 0.5
PICTURES = 'images'


def sounding(episodes: list[Episode]) -> list[list[bool]]:
    """[frame][object]: whether the object is heard within HEARD_AROUND of the frame.

    Objects are in the order of `Episode.things`, of which the first alone makes sounds.
    """
    by_frame = []
    for episode in episodes:
        num_silent = len(episode.things) - 1
        for time in episode.times.tolist():
            by_frame.append([_is_heard(episode, time), *([False] * num_silent)])
    return by_frame


def kinds(episodes: list[Episode]) -> list[list[str]]:
    """[frame][object]: the kind of each object, in the order of `sounding`."""
    by_frame = []
    for episode in episodes:
        of_scene = [thing.kind for thing in episode.things]
        by_frame += [of_scene] * len(episode.times)
    return by_frame


def _is_heard(episode: Episode, time: float) -> bool:
    for start, kind, _ in episode.sounds:
        seconds = sound.IMPACT if kind == 'impact' else world.GLIDE
        # What would sound before its scene or after it is cut off.
        begin, end = max(start, episode.begin), min(start + seconds, episode.end)
        if begin < time + HEARD_AROUND and end > time - HEARD_AROUND:
            return True
    return False


def picture_name(split: str, number: int, frame: int) -> str:
    """The file of a frame, relative to the folder of pictures."""
    return f'{split}/{number:06d}_{frame:04d}.png'


def chosen_frames(config: Config, episodes: list[Episode]) -> list[int]:
    """Numbers of the frames that are written: `config.pictures` of each scene, evenly spread."""
    frames = []
    first = 0
    for episode in episodes:
        count = len(episode.times)
        # The middles of equal parts.
        places = (np.arange(config.pictures) + 0.5) * count / max(config.pictures, 1)
        frames += [first + int(place) for place in places]
        first += count
    return sorted(set(frames))


def write_pictures(
    config: Config, out: pathlib.Path, split: str, number: int, frames: np.ndarray
) -> None:
    """Writes the chosen frames of a video, uint8 [T H W 3], as PNG files."""
    from PIL import Image

    for frame in chosen_frames(config, world.video(config, split, number)):
        path = out / PICTURES / picture_name(split, number, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix('.tmp')
        Image.fromarray(frames[frame]).save(temporary, 'PNG')
        os.replace(temporary, path)


def coco(config: Config, split: str) -> dict[str, Any]:
    """The boxes of a split's pictures in COCO's format.

    Beyond COCO, images have `video`, `frame` and `time` (seconds), annotations `sounds`: whether
    the object is heard around that time. Categories are the kinds of objects.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(getattr(config, split)):
        episodes = world.video(config, split, number)
        things, times = [], []
        for episode in episodes:
            things += [episode.things] * len(episode.times)
            times += episode.times.tolist()
        boxes, heard = drawing.boxes(config, episodes), sounding(episodes)
        for frame in chosen_frames(config, episodes):
            image = {
                'id': len(images) + 1,
                'file_name': picture_name(split, number, frame),
                'width': config.size,
                'height': config.size,
                'video': f'{split}/{number:06d}.mp4',
                'frame': frame,
                'time': round(times[frame], 4),
            }
            images.append(image)
            for thing, box, sounds in zip(things[frame], boxes[frame], heard[frame], strict=True):
                if any(box):
                    entry = _annotation(config, thing, box, sounds)
                    ids = {'id': len(annotations) + 1, 'image_id': image['id']}
                    annotations.append({**ids, **entry})
    categories = [{'id': i + 1, 'name': kind} for i, kind in enumerate(world.KINDS)]
    return {'images': images, 'annotations': annotations, 'categories': categories}


def _annotation(
    config: Config, thing: world.Thing, box: list[float], sounds: bool
) -> dict[str, Any]:
    y0, x0, y1, x1 = (config.size * edge for edge in box)
    bbox = [round(edge, 3) for edge in (x0, y0, x1 - x0, y1 - y0)]
    return {
        'category_id': world.KINDS.index(thing.kind) + 1,
        'bbox': bbox,
        'area': round(bbox[2] * bbox[3], 3),
        'iscrowd': 0,
        'sounds': sounds,
    }


def write(config: Config, out: pathlib.Path, split: str) -> None:
    """Writes <out>/boxes_<split>.json."""
    path = out / f'boxes_{split}.json'
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(coco(config, split)))
    os.replace(temporary, path)
