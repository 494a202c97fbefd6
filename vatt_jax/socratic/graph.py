"""A typed graph of steps: checked as it is built, logged as it runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vatt_jax.config import ConfigError


class StepError(RuntimeError):
    """A step failed.

    Attributes:
        log: of the steps before it.
    """

    def __init__(self, message: str, log: Log) -> None:
        super().__init__(message)
        self.log = log


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Texts with their scores, the best first.

    Attributes:
        texts: N of them.
        scores: of each, descending.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        name: for messages and the page.
        expected: what a value must be, for messages.
        accepts: whether a value is of this kind.
    """

    name: str
    expected: str
    accepts: Callable[[Any], bool] = dataclasses.field(repr=False, compare=False)


def _is_texts(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(text, str) for text in value)


# What a scorer takes: a path, or the arrays of each modality (scorers.py).
CLIP = Kind('clip', 'anything but None', lambda value: value is not None)
TEXT = Kind('text', 'a string', lambda value: isinstance(value, str))
TEXTS = Kind('texts', 'a list of strings, not empty', _is_texts)
RANKING = Kind('ranking', 'a Ranking', lambda value: isinstance(value, Ranking))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a graph; steps.py makes them.

    Attributes:
        name: by which later steps read what it makes.
        action: score | generate | function, for the log.
        reads: argument -> the input or the earlier step whose value it gets.
        takes: argument -> the kinds it may be of.
        makes: kind of the result.
        run: the arguments by name -> the result; with a prompt, the prompt -> the result.
        prompt: the arguments by name -> what a generator is asked; None: nothing is.
    """

    name: str
    action: str
    reads: Mapping[str, str]
    takes: Mapping[str, tuple[Kind, ...]]
    makes: Kind
    run: Callable[..., Any]
    prompt: Callable[..., str] | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a step did.

    Attributes:
        step: its name.
        action: of the step.
        inputs: name of an input or step -> its value.
        prompt: what a generator was asked; '' for others.
        output: the result.
        seconds: that it took.
    """

    step: str
    action: str
    inputs: dict[str, Any]
    prompt: str
    output: Any
    seconds: float


@dataclasses.dataclass
class Log:
    """What a graph did with one clip.

    Attributes:
        values: name of an input or step -> its value.
        entries: of the steps, in their order.
    """

    values: dict[str, Any]
    entries: list[Entry] = dataclasses.field(default_factory=list)

    @property
    def output(self) -> Any:
        """What the last step made."""
        return self.entries[-1].output


class Graph:
    """Steps in the order in which they run.

    Args:
        inputs: name -> kind of what `run` is given.
        steps: each reads inputs and steps before it.

    Raises:
        ConfigError: there is no step, two have one name, or one reads what is not there or of
            another kind; the message names the step.
    """

    def __init__(self, inputs: Mapping[str, Kind], steps: Sequence[Step]) -> None:
        self.inputs, self.steps = dict(inputs), tuple(steps)
        if not self.steps:
            raise ConfigError('Graph: expected at least one step, got none')
        # Steps may read what stands above them alone, so the graph has no circles.
        known = dict(self.inputs)
        for step in self.steps:
            _check_step(step, known)
            known[step.name] = step.makes

    def run(self, **inputs: Any) -> Log:
        """Runs all steps on one clip.

        Args:
            **inputs: of the graph.

        Raises:
            ConfigError: one is missing, unknown, or of another kind.
            StepError: a step raised an error, or made something of another kind than it declares.
        """
        if set(inputs) != set(self.inputs):
            raise ConfigError(
                f'Graph.run: expected the inputs {", ".join(self.inputs)}, got '
                f'{", ".join(inputs) or "none"}'
            )
        for name, kind in self.inputs.items():
            if not kind.accepts(inputs[name]):
                raise ConfigError(
                    f'Graph.run({name}=…): expected a {kind.name} ({kind.expected}), got '
                    f'{_shown(inputs[name])}'
                )
        log = Log(dict(inputs))
        for step in self.steps:
            entry = _run_step(step, log)
            log.entries.append(entry)
            log.values[step.name] = entry.output
        return log


def _check_step(step: Step, known: Mapping[str, Kind]) -> None:
    """Checks a step against the kinds of inputs and earlier steps."""
    if step.name in known:
        raise ConfigError(f'step {step.name!r}: there is an input or a step of this name already')
    if set(step.reads) != set(step.takes):
        raise ConfigError(
            f'step {step.name!r}: expected the arguments {", ".join(step.takes) or "none"}, got '
            f'{", ".join(step.reads) or "none"}'
        )
    for argument, source in step.reads.items():
        if source not in known:
            raise ConfigError(
                f'step {step.name!r}: {argument} reads {source!r}, which is no input and no step '
                f'before it; there are {", ".join(known)}'
            )
        kinds = step.takes[argument]
        if known[source] not in kinds:
            raise ConfigError(
                f'step {step.name!r}: {argument} takes {" or ".join(kind.name for kind in kinds)}, '
                f'but {source!r} is {known[source].name}'
            )


def _run_step(step: Step, log: Log) -> Entry:
    """Runs one step on the values so far."""
    arguments = {name: log.values[source] for name, source in step.reads.items()}
    prompt = ''
    start = time.perf_counter()
    try:
        if step.prompt is None:
            output = step.run(**arguments)
        else:
            prompt = step.prompt(**arguments)
            output = step.run(prompt)
    except Exception as error:  # of injected models, which may raise anything
        raise StepError(
            f'step {step.name!r} failed: {type(error).__name__}: {error}', log
        ) from error
    seconds = time.perf_counter() - start
    if not step.makes.accepts(output):
        raise StepError(
            f'step {step.name!r}: expected it to make a {step.makes.name} '
            f'({step.makes.expected}), got {_shown(output)}',
            log,
        )
    inputs = {source: log.values[source] for source in step.reads.values()}
    return Entry(step.name, step.action, inputs, prompt, output, seconds)


def _shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:79]}…'
