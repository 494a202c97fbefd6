"""Both pipelines on the playground, whose few words a generator by rules knows.

What each comes to is compared with the same models without the other's words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vatt_jax.config import ConfigError
from vatt_jax.evals import statistics
from vatt_jax.socratic import pipelines
from vatt_jax.socratic.generators import TemplateGenerator
from vatt_jax.socratic.graph import Log
from vatt_jax.socratic.rerank import rerank
from vatt_jax.socratic.scorers import ModelScorer

# How the playground's captions say its events.
VERBS = {
    'bounce': 'bounces on the floor',
    'collide': 'crashes into the wall',
    'appear': 'appears',
    'vanish': 'vanishes',
}
SOUNDS = tuple(f'something {verb}' for verb in VERBS.values())
LABELS = ('event', 'object', 'color')


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of a split that have pictures and sound, encoded.

    Attributes:
        embedded: {'video', 'audio'} of each, rows of what `embed` returns.
        captions: of each.
        labels: LABELS -> name of the class of each.
        names: LABELS -> all classes.
        shown: number of a clip -> (frames uint8 [T H W 3], samples int16 [S]), of the first ones.
        left_out: clips without pictures or without sound.
    """

    embedded: list[dict[str, Any]]
    captions: list[str]
    labels: dict[str, list[str]]
    names: dict[str, list[str]]
    shown: dict[int, tuple[np.ndarray, np.ndarray]]
    left_out: int


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of right answers, its 95 % interval, and what chance gives."""

    value: float
    interval: tuple[float, float]
    chance: float


def generator() -> TemplateGenerator:
    """What a language model would know of the playground."""

    def possible_activities(match: re.Match[str]) -> str:
        return '\n'.join(f'{entity} {match[2]}' for entity in match[1].split(', '))

    return TemplateGenerator(
        (
            # Whatever is seen: any kind of thing may do all of it.
            (r'Which sounds could be heard', '\n'.join(SOUNDS)),
            (r'shows (.+)\. One hears: something (.+)\. What could', possible_activities),
            (r'likeliest first: ([^,]+?)(?:,.*)?\. Say in one sentence what happens', r'\1'),
            (r'sounds like (.+)\. One hears: something (.+)\. Say in one sentence', r'\1 \2'),
        )
    )


def entity_names(names: Mapping[str, Sequence[str]]) -> list[str]:
    """'a red disc' of every colour and kind."""
    return [f'a {color} {kind}' for kind in names['object'] for color in names['color']]


def check_names(names: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError where labels are not those of a playground."""
    missing = [label for label in LABELS if label not in names]
    if missing or set(names['event']) != set(VERBS):
        raise ConfigError(
            f'expected the labels of a playground ({", ".join(LABELS)}; events '
            f'{", ".join(VERBS)}), got {", ".join(names) or "none"}'
        )


# ---- the six steps


def run_activity(see: ModelScorer, hear: ModelScorer, clips: Clips) -> list[Log]:
    """The log of the six steps on every clip."""
    graph = pipelines.activity(see, hear, generator())
    names = entity_names(clips.names)
    return [graph.run(clip=clip, names=names) for clip in clips.embedded]


def activity_shares(
    logs: Sequence[Log], see: ModelScorer, clips: Clips, seed: int = 0
) -> dict[str, dict[str, Share]]:
    """How often event, kind and colour are right: in six steps, and by the pictures alone.

    Alone, the scorer ranks all sentences of entity and event.

    Returns:
        {'six steps' | 'pictures alone': {label: Share}}.
    """
    entities = entity_names(clips.names)
    sentences = [f'{entity} {verb}' for entity in entities for verb in VERBS.values()]
    alone = [sentences[int(np.argmax(see(clip, sentences)))] for clip in clips.embedded]
    found = {'six steps': [log.output for log in logs], 'pictures alone': alone}
    return {way: _shares(answers, LABELS, clips, seed) for way, answers in found.items()}


def _shares(
    sentences: Sequence[str], labels: Sequence[str], clips: Clips, seed: int
) -> dict[str, Share]:
    """How often sentences, one of each clip, say its class of each label."""
    shares = {}
    for label in labels:
        pairs = zip(sentences, clips.labels[label], strict=True)
        is_right = np.array([_says(sentence, name) for sentence, name in pairs])
        shares[label] = _share(is_right, 1 / len(clips.names[label]), seed)
    return shares


def _says(sentence: str, name: str) -> bool:
    """Whether a sentence has the word of a class, or of an event its verb."""
    return f' {VERBS.get(name, name)}' in sentence


# ---- re-ranking


def run_hearing(hear: ModelScorer, clips: Clips) -> list[Log]:
    """The log of what is heard, on every clip."""
    graph = pipelines.hearing(hear, generator())
    things = [f'a {kind}' for kind in clips.names['object']]
    return [graph.run(clip=clip, things=things, sounds=list(SOUNDS)) for clip in clips.embedded]


def hearing_shares(logs: Sequence[Log], clips: Clips, seed: int = 0) -> dict[str, Share]:
    """How often the summaries of sounds name the right event and kind."""
    return _shares([log.output for log in logs], ('event', 'object'), clips, seed)


def retrieval_shares(
    logs: Sequence[Log], see: ModelScorer, hear: ModelScorer, clips: Clips, seed: int = 0
) -> dict[str, dict[str, Share]]:
    """R@1, R@5 and R@10 of captions and clips, before and after re-ranking.

    `direct` has the cosine of the sound itself in the place of that of its summary, `others` the
    summaries of other clips, `truth` those of what was heard in truth.

    Returns:
        {'text → video, base' …: {'R@1' …: Share}}.
    """
    captions = see.embed(clips.captions)
    base = np.stack([see(clip, clips.captions) for clip in clips.embedded])  # [videos captions]
    by_sound = np.stack([hear(clip, clips.captions) for clip in clips.embedded])
    summaries = [log.output for log in logs]
    others = np.random.default_rng(seed).permutation(len(summaries))
    truth = [
        f'a {kind} {VERBS[event]}'
        for kind, event in zip(clips.labels['object'], clips.labels['event'], strict=True)
    ]
    seconds = {
        'words': _text_cosines(see, summaries, captions),
        'direct': by_sound,
        'others': _text_cosines(see, [summaries[i] for i in others], captions),
        'truth': _text_cosines(see, truth, captions),
    }
    shares: dict[str, dict[str, Share]] = {}
    for direction in ('video → text', 'text → video'):
        is_turned = direction == 'text → video'
        first = base.T if is_turned else base
        shares[f'{direction}, base'] = _recalls(first, seed)
        for name, second in seconds.items():
            second = second.T if is_turned else second
            for combination in ('product', 'standard'):
                anew = rerank(first, second, combination=combination)
                shares[f'{direction}, {name}, {combination}'] = _recalls(anew, seed)
    return shares


def _text_cosines(
    see: ModelScorer, texts: Sequence[str], captions: Mapping[str, Any]
) -> Float[np.ndarray, 'N M']:
    """Cosines of N texts with M captions."""
    names = sorted(set(texts))
    cosines = see.model.similarity(see.embed(names), captions, see.space)
    return cosines[[names.index(text) for text in texts]]


def _recalls(scores: Float[np.ndarray, 'N N'], seed: int) -> dict[str, Share]:
    recalls = {}
    compared = statistics.compare_with_own(scores, np.eye(len(scores), dtype=bool))
    for k in (1, 5, 10):
        hits = statistics.hits_of_best(*compared, k)
        recalls[f'R@{k}'] = _share(hits, min(1.0, k / len(scores)), seed)
    return recalls


def _share(is_right: np.ndarray, chance: float, seed: int) -> Share:
    return Share(float(is_right.mean()), statistics.bootstrap(is_right, seed=seed), chance)
