"""What is said: lower-case sentences in the manner of ASR.

Some are about now, some about before or later, some about nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.datasets.playground.world import Episode

NOUNS = {
    'disc': ('disc', 'circle', 'round thing'),
    'ring': ('ring', 'hoop'),
    'plank': ('plank', 'board', 'flat thing'),
    'pole': ('pole', 'stick', 'tall thing'),
}
VERBS = {
    'bounce': (
        'bounces on the floor',
        'is bouncing up and down',
        'drops and bounces',
        'keeps hitting the ground',
    ),
    'collide': (
        'crashes into the wall',
        'runs from side to side',
        'hits the posts',
        'keeps colliding with the sides',
    ),
    'appear': ('appears', 'is growing out of nothing', 'pops up', 'shows up from nowhere'),
    'vanish': ('vanishes', 'is shrinking away', 'disappears', 'fades to nothing'),
}
LOOKS = {'plain': ('',), 'striped': ('striped', 'stripy'), 'dotted': ('dotted', 'spotted')}
SCALES = {'small': ('small', 'little'), 'medium': ('',), 'large': ('large', 'big')}
OPENINGS = (
    '',
    '',
    '',
    'um',
    'so',
    'and now',
    'okay',
    'you can see',
    'look here',
    'all right',
    'you know',
)
CLOSINGS = ('', '', '', 'right', 'as you can see', 'there you go', 'you see')
CHATTER = (
    'so yeah let us get started',
    'thanks for watching everybody',
    'do not forget to subscribe',
    'i had a really nice coffee this morning',
    'let me just fix the camera',
    'can you hear me okay',
    'we are going to do this again',
    'it is quite warm in here today',
    'this is my favorite part',
    'i think that is about it',
    'give me one second',
    'my neighbor is a bit loud sorry',
    'what a day what a day',
    'anyway where was i',
    'hello and welcome back',
    'leave me a comment below',
)


def caption(episode: Episode) -> str:
    """The clean sentence of an episode: 'a large red striped ring bounces on the floor'."""
    subject = episode.subject
    words = [
        'a',
        SCALES[subject.size][0],
        subject.color,
        LOOKS[subject.texture][0],
        NOUNS[subject.kind][0],
        VERBS[episode.event][0],
    ]
    return joined(words)


def sentence(rng: np.random.Generator, episode: Episode) -> str:
    """A spoken sentence about an episode; it leaves things out now and then, and adds filler."""

    def pick(options: Sequence[str]) -> str:
        return str(rng.choice(options))

    def sometimes(probability: float, options: Sequence[str], otherwise: str = '') -> str:
        # The first draw decides whether there is a second one.
        return pick(options) if rng.uniform() < probability else otherwise

    subject = episode.subject
    words = [
        pick(OPENINGS),
        pick(('a', 'the', 'this')),
        sometimes(0.6, SCALES[subject.size]),
        # The colour has one word, which is not drawn.
        subject.color if rng.uniform() < 0.4 else '',
        sometimes(0.35, LOOKS[subject.texture]),
        sometimes(0.9, NOUNS[subject.kind], 'thing'),
        sometimes(0.95, VERBS[episode.event]),
        pick(CLOSINGS),
    ]
    return joined(words)


def joined(words: list[str]) -> str:
    """The words that are not empty, with spaces between them."""
    return ' '.join(word for word in words if word)


def narrate(rng: np.random.Generator, episodes: list[Episode]) -> list[dict[str, Any]]:
    """[{'start', 'end', 'text'}] in order of time, seconds in the video.

    Sentences about an episode come near it, often a little early or late, so those nearest to a
    clip are partly about its neighbours. People also talk about other things.
    """
    spoken: list[tuple[float, str]] = []
    for scene in episodes:
        for _ in range(int(rng.integers(1, 3))):
            middle = rng.uniform(scene.begin + 0.2, scene.end - 0.2) + rng.normal(0, 0.35)
            spoken.append((middle, sentence(rng, scene)))
    for _ in range(int(rng.integers(1, 3))):
        middle = rng.uniform(episodes[0].begin, episodes[-1].end)
        spoken.append((middle, str(rng.choice(CHATTER))))
    sentences = []
    for middle, text in sorted(spoken):
        # Long sentences are said faster.
        length = 0.35 * len(text.split()) ** 0.8
        start = max(0.0, middle - length / 2)
        sentences.append({'start': round(start, 3), 'end': round(start + length, 3), 'text': text})
    return sorted(sentences, key=lambda s: (s['start'], s['end']))
