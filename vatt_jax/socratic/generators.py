"""Generators: any function from a prompt to text. Here one by rules, which needs no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from vatt_jax.config import ConfigError

Answer = str | Callable[[re.Match[str]], str]


class TemplateGenerator:
    """Answers by rules, for tests and for worlds of a few words.

    Args:
        rules: (pattern, answer) in the order in which they are tried. The first pattern that the
            prompt holds decides; in the answer \\1, \\2 … are its groups. Or a function of the
            match.

    Raises:
        ConfigError: there is no rule, or a pattern is no regular expression.
    """

    def __init__(self, rules: Sequence[tuple[str, Answer]]) -> None:
        if not rules:
            raise ConfigError(
                'TemplateGenerator: expected at least one (pattern, answer), got none'
            )
        self._rules: list[tuple[re.Pattern[str], Answer]] = []
        for pattern, answer in rules:
            try:
                self._rules.append((re.compile(pattern), answer))
            except re.error as error:
                raise ConfigError(
                    f'TemplateGenerator: {pattern!r} is no regular expression ({error})'
                ) from error

    def __call__(self, prompt: str) -> str:
        """The answer to a prompt. Raises ConfigError where no rule has one."""
        for pattern, answer in self._rules:
            match = pattern.search(prompt)
            if match:
                return answer(match) if callable(answer) else match.expand(answer)
        raise ConfigError(
            f'TemplateGenerator: no rule for the prompt {prompt!r}; there are '
            f'{", ".join(repr(pattern.pattern) for pattern, _ in self._rules)}'
        )
