"""Tiny real videos and a dataset prepared from them."""

import json
import pathlib

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, clock, write_wav

NUM_CLOCKS = {'train': 11, 'test': 5}
NUM_SENTENCES = 6


def write_videos(folder):
    """Clocks of both splits, one silent, one without pictures, and broken files of three kinds."""
    from data_pipelines import media

    for split, count in NUM_CLOCKS.items():
        (folder / split).mkdir(parents=True)
        for i in range(count):
            frames, audio = clock(2.0 + 0.1 * i)
            media.write_mp4(folder / split / f'{split}{i:02d}.mp4', frames, FPS, audio, RATE)
    train = folder / 'train'
    frames, audio = clock(2.5)
    media.write_mp4(train / 'silent.mp4', frames, FPS)
    write_wav(train / 'sound.wav', audio)

    whole = (train / 'train03.mp4').read_bytes()
    (train / 'cut.mp4').write_bytes(whole[: len(whole) // 3])
    (train / 'noise.mp4').write_bytes(np.random.default_rng(0).bytes(5000))
    frames, audio = clock(0.4)
    media.write_mp4(train / 'short.mp4', frames, FPS, audio, RATE)
    (folder / 'notes.txt').write_text('not media')


def caption_table():
    """Captions of every clock as CSV: sentence k is said from 0.4 k to 0.4 k + 0.4 seconds."""
    lines = ['video,start,end,text']
    for split, count in NUM_CLOCKS.items():
        for i in range(count):
            for k in range(NUM_SENTENCES):
                begin = k * 0.4
                span = f'{begin:.1f},{begin + 0.4:.1f}'
                text = f'word{k} of video {split}{i}, yes'
                lines.append(f'{split}/{split}{i:02d}.mp4,{span},"{text}"')
    lines.append('train/nowhere.mp4,0,1,unused')
    return '\n'.join(lines) + '\n'


def annotations_of_test_videos():
    """Two labelled and captioned segments of every clock of the test split, JSON-able."""
    videos = {}
    for i in range(NUM_CLOCKS['test']):
        dark = {
            'start': 0.0,
            'end': 1.0,
            'caption': f'dark {i}',
            'labels': {'class': 0, 'tags': [0]},
        }
        light = {
            'start': 1.0,
            'end': 9.0,
            'caption': f'light {i}',
            'labels': {'class': 'late', 'tags': ['b', 'c']},
        }
        videos[f'test/test{i:02d}.mp4'] = {'segments': [dark, light], 'ground_truth': {'i': i}}
    return {'labels': {'class': ['early', 'late'], 'tags': ['a', 'b', 'c']}, 'videos': videos}


@pytest.fixture(scope='session')
def media_folder(tmp_path_factory) -> pathlib.Path:
    """A folder with videos/, captions.csv and annotations.json."""
    root = tmp_path_factory.mktemp('media')
    write_videos(root / 'videos')
    (root / 'captions.csv').write_text(caption_table())
    (root / 'annotations.json').write_text(json.dumps(annotations_of_test_videos()))
    return root


@pytest.fixture(scope='session')
def prepared(media_folder, tmp_path_factory):
    """(folder, result of prepare)."""
    from data_pipelines.prepare import prepare

    out = tmp_path_factory.mktemp('prepared') / 'set'
    result = prepare(
        str(media_folder / 'videos'),
        str(media_folder / 'captions.csv'),
        str(out),
        processes=2,
        quiet=True,
        annotations=str(media_folder / 'annotations.json'),
        fps=FPS,
        size=SIZE,
        rate=RATE,
        name='clocks',
    )
    return out, result


@pytest.fixture
def config(prepared):
    """Run config for the prepared clocks: 0.8 s windows."""
    from configs.default import get_config

    folder, _ = prepared
    config = get_config()
    config.data.train = {'clocks': {'path': str(folder)}}
    config.model.inputs.video.update(frames=8, size=SIZE, fps=float(FPS))
    config.model.inputs.audio.update(samples=6400, rate=RATE)
    config.model.inputs.text.update(candidates=3, words=6)
    return config
