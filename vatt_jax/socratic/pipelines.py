"""Two pipelines of the paper: what happens in a clip, and what is said of its sound.

Zeng et al. 2022, "Socratic Models". The prompts are ours; the paper's are longer and of its models.
"""

from __future__ import annotations

from vatt_jax.socratic.graph import CLIP, TEXTS, Graph
from vatt_jax.socratic.steps import Generator, Scorer, generate, score

SOUNDS_PROMPT = 'A video shows {entities}. Which sounds could be heard? Name one a line.'
ACTIVITIES_PROMPT = (
    'A video shows {entities}. One hears: {sound}. What could be happening? Name one a line.'
)
SUMMARY_PROMPT = (
    'A video shows {entities}. One hears: {sound}. Likely activities, the likeliest first: '
    '{activities}. Say in one sentence what happens.'
)
HEARD_PROMPT = 'It sounds like {thing}. One hears: {sound}. Say in one sentence what is heard.'


def activity(
    see: Scorer, hear: Scorer, generator: Generator, entities: int = 2, activities: int = 3
) -> Graph:
    """What happens in a clip, in six steps: see, imagine, hear, imagine, see, say.

    Inputs: `clip`, and `names`, of all entities that may be seen.

    Args:
        see: scores texts by the pictures of a clip.
        hear: scores texts by its sound.
        generator: the language model.
        entities: number of those that are named.
        activities: number of those that are ranked first.
    """
    steps = [
        score('entities', see, clip='clip', texts='names', keep=entities),
        generate('possible_sounds', generator, SOUNDS_PROMPT, TEXTS, entities='entities'),
        score('sound', hear, clip='clip', texts='possible_sounds'),
        generate(
            'possible_activities',
            generator,
            ACTIVITIES_PROMPT,
            TEXTS,
            entities='entities',
            sound='sound',
        ),
        score('activities', see, clip='clip', texts='possible_activities', keep=activities),
        generate(
            'summary',
            generator,
            SUMMARY_PROMPT,
            entities='entities',
            sound='sound',
            activities='activities',
        ),
    ]
    return Graph({'clip': CLIP, 'names': TEXTS}, steps)


def hearing(hear: Scorer, generator: Generator) -> Graph:
    """What is said of a clip's sound; `rerank` compares it with captions.

    In the paper it is a transcript that the language model summarises. Inputs: `clip`, `things`
    that may be heard, and `sounds` that they make. Each is asked for by itself: among all pairs of
    them a scorer mostly minds the thing.

    Args:
        hear: scores texts by the sound of a clip.
        generator: the language model.
    """
    steps = [
        score('thing', hear, clip='clip', texts='things'),
        score('sound', hear, clip='clip', texts='sounds'),
        generate('summary', generator, HEARD_PROMPT, thing='thing', sound='sound'),
    ]
    return Graph({'clip': CLIP, 'things': TEXTS, 'sounds': TEXTS}, steps)
