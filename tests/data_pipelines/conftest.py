"""Tiny real videos and a dataset prepared from them."""

import json
import pathlib

import numpy as np
import pytest
from clocks import FPS, RATE, SIZE, clock, write_wav


@pytest.fixture(scope='session')
def media_folder(tmp_path_factory) -> pathlib.Path:
    """train: 11 clocks, one silent, one wav; test: 5 clocks; broken files of three kinds; captions and annotations beside."""
    from data_pipelines import media

    root = tmp_path_factory.mktemp('media')
    videos = root / 'videos'
    for split, n in (('train', 11), ('test', 5)):
        (videos / split).mkdir(parents=True)
        for i in range(n):
            frames, audio = clock(2.0 + 0.1 * i)
            media.write_mp4(videos / split / f'{split}{i:02d}.mp4', frames, FPS, audio, RATE)
    frames, _ = clock(2.5)
    media.write_mp4(videos / 'train' / 'silent.mp4', frames, FPS)
    write_wav(videos / 'train' / 'sound.wav', clock(2.5)[1])
    whole = (videos / 'train' / 'train03.mp4').read_bytes()
    (videos / 'train' / 'cut.mp4').write_bytes(whole[: len(whole) // 3])
    (videos / 'train' / 'noise.mp4').write_bytes(np.random.default_rng(0).bytes(5000))
    frames, audio = clock(0.4)
    media.write_mp4(videos / 'train' / 'short.mp4', frames, FPS, audio, RATE)
    (videos / 'notes.txt').write_text('not media')
    lines = ['video,start,end,text']
    for split, n in (('train', 11), ('test', 5)):
        for i in range(n):
            lines += [
                f'{split}/{split}{i:02d}.mp4,{k * 0.4:.1f},{k * 0.4 + 0.4:.1f},"word{k} of video {split}{i}, yes"'
                for k in range(6)
            ]
    lines.append('train/nowhere.mp4,0,1,unused')
    (root / 'captions.csv').write_text('\n'.join(lines) + '\n')
    segments = lambda i: [
        {'start': 0.0, 'end': 1.0, 'caption': f'dark {i}', 'labels': {'class': 0, 'tags': [0]}},
        {
            'start': 1.0,
            'end': 9.0,
            'caption': f'light {i}',
            'labels': {'class': 'late', 'tags': ['b', 'c']},
        },
    ]
    (root / 'annotations.json').write_text(
        json.dumps(
            {
                'labels': {'class': ['early', 'late'], 'tags': ['a', 'b', 'c']},
                'videos': {
                    f'test/test{i:02d}.mp4': {'segments': segments(i), 'ground_truth': {'i': i}}
                    for i in range(5)
                },
            }
        )
    )
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

    c = get_config()
    c.data.train = {'clocks': {'path': str(prepared[0])}}
    c.model.inputs.video.update(frames=8, size=SIZE, fps=float(FPS))
    c.model.inputs.audio.update(samples=6400, rate=RATE)
    c.model.inputs.text.update(candidates=3, words=6)
    return c
