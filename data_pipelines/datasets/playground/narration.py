"""What is said: lower-case sentences in the manner of ASR, some about now, some about before or later, some about nothing."""

from __future__ import annotations

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
    s = episode.subject
    words = [
        'a',
        SCALES[s.size][0],
        s.color,
        LOOKS[s.texture][0],
        NOUNS[s.kind][0],
        VERBS[episode.event][0],
    ]
    return ' '.join(w for w in words if w)


def sentence(rng: np.random.Generator, episode: Episode) -> str:
    """A spoken sentence about an episode; it leaves things out now and then, and wraps them in filler."""
    s = episode.subject
    pick = lambda options: str(rng.choice(options))
    words = [
        pick(OPENINGS),
        pick(('a', 'the', 'this')),
        pick(SCALES[s.size]) if rng.uniform() < 0.6 else '',
        s.color if rng.uniform() < 0.4 else '',
        pick(LOOKS[s.texture]) if rng.uniform() < 0.35 else '',
        pick(NOUNS[s.kind]) if rng.uniform() < 0.9 else 'thing',
        pick(VERBS[episode.event]) if rng.uniform() < 0.95 else '',
        pick(CLOSINGS),
    ]
    return ' '.join(w for w in words if w)


def narrate(rng: np.random.Generator, episodes: list[Episode]) -> list[dict]:
    """[{'start', 'end', 'text'}] in order of time. Sentences about an episode come near it, often a little early or late, so those
    nearest to a clip are partly about its neighbours; and people also talk about other things."""
    out = []
    for e in episodes:
        for _ in range(int(rng.integers(1, 3))):
            middle = rng.uniform(e.begin + 0.2, e.end - 0.2) + rng.normal(0, 0.35)
            out.append((middle, sentence(rng, e)))
    for _ in range(int(rng.integers(1, 3))):
        out.append((rng.uniform(episodes[0].begin, episodes[-1].end), str(rng.choice(CHATTER))))
    said = []
    for middle, text in sorted(out):
        length = 0.35 * len(text.split()) ** 0.8
        start = max(0.0, middle - length / 2)
        said.append({'start': round(start, 3), 'end': round(start + length, 3), 'text': text})
    return sorted(said, key=lambda s: (s['start'], s['end']))
