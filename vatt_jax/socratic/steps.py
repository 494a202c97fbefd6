"""The three kinds of steps: texts scored against a clip, text generated, a plain function."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vatt_jax.config import ConfigError
from vatt_jax.socratic.graph import CLIP, RANKING, TEXT, TEXTS, Kind, Ranking, Step

# score(clip, texts) -> float [N], higher for what fits better.
Scorer = Callable[[Any, Sequence[str]], Any]
# generate(prompt) -> text.
Generator = Callable[[str], str]
# Marks of lists before their items: '- ', '* ', '3. ', '3) '.
BULLET = re.compile(r'^\s*(?:[-*•]|\d+[.)])\s+')


def score(name: str, scorer: Scorer, clip: str, texts: str, keep: int = 1) -> Step:
    """Texts ranked by how well they fit the clip.

    Args:
        name: of the step.
        scorer: (clip, N texts) -> N scores.
        clip: the input that it looks at or listens to.
        texts: the input or step whose texts are scored.
        keep: number of the best that remain.

    Raises:
        ConfigError: `keep` is no positive number.
    """
    if keep < 1:
        raise ConfigError(f'step {name!r}: keep expects a positive number, got {keep}')

    def run(clip: Any, texts: Any) -> Ranking:
        candidates = texts_of(texts)
        scores = np.asarray(scorer(clip, candidates), float)
        if scores.shape != (len(candidates),) or not np.isfinite(scores).all():
            raise ValueError(
                f'the scorer gave {scores!r}, expected {len(candidates)} finite numbers, one for '
                'each text'
            )
        # Stable: what ties stays in the order of the texts.
        best = np.argsort(-scores, kind='stable')[:keep].tolist()
        return Ranking(tuple(candidates[i] for i in best), tuple(scores[best].tolist()))

    takes = {'clip': (CLIP,), 'texts': (TEXTS, RANKING)}
    return Step(name, 'score', {'clip': clip, 'texts': texts}, takes, RANKING, run)


def generate(
    name: str, generator: Generator, template: str, makes: Kind = TEXT, **reads: str
) -> Step:
    """Text that a language model, or any other function, makes of a prompt.

    Args:
        name: of the step.
        generator: prompt -> text.
        template: of the prompt, with the names of `reads` in braces. Several texts are joined by
            commas.
        makes: TEXT, or TEXTS: the answer's lines, without the marks of a list.
        **reads: name in the template -> input or step.

    Raises:
        ConfigError: the template names other values than `reads`, or `makes` is another kind.
    """
    named = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if named != set(reads):
        raise ConfigError(
            f'step {name!r}: the template names {", ".join(sorted(named)) or "nothing"}, the step '
            f'reads {", ".join(sorted(reads)) or "nothing"}'
        )
    if makes not in (TEXT, TEXTS):
        raise ConfigError(f'step {name!r}: makes expects TEXT or TEXTS, got {makes!r}')

    def prompt(**values: Any) -> str:
        return template.format(**{key: ', '.join(texts_of(x)) for key, x in values.items()})

    def run(prompt: str) -> Any:
        answer = generator(prompt)
        if makes is TEXT or not isinstance(answer, str):
            return answer
        return lines_of(answer)

    takes: dict[str, tuple[Kind, ...]] = dict.fromkeys(reads, (TEXT, TEXTS, RANKING))
    return Step(name, 'generate', reads, takes, makes, run, prompt)


def function(
    name: str, run: Callable[..., Any], takes: Mapping[str, Kind], makes: Kind, **reads: str
) -> Step:
    """A plain function of values by name.

    Args:
        name: of the step.
        run: the arguments by name -> the result.
        takes: argument -> kind.
        makes: kind of the result.
        **reads: argument -> input or step.
    """
    kinds = {argument: (kind,) for argument, kind in takes.items()}
    return Step(name, 'function', reads, kinds, makes, run)


def texts_of(value: Any) -> list[str]:
    """The texts of a text, of several, or of a ranking."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Ranking):
        return list(value.texts)
    return list(value)


def lines_of(answer: str) -> list[str]:
    """Lines of an answer that say something, each once, without the marks of a list."""
    lines = [BULLET.sub('', line).strip() for line in answer.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))
