"""What the metrics share: arguments checked, and runs of n words counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# A run of words.
NGram = tuple[str, ...]
# One candidate for each picture, and the references of each; words with white space between.
Captions = Sequence[str]
References = Sequence[Sequence[str]]


def count_ngrams(words: Sequence[str], n: int) -> Counter[NGram]:
    """How often each run of n words occurs."""
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def split_captions(
    candidates: Captions, references: References
) -> list[tuple[list[str], list[list[str]]]]:
    """(words of the candidate, words of each of its references) of each picture.

    Raises:
        ValueError: there is no picture, their numbers differ, or one has no reference.
    """
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(
            f'expected as many candidates as lists of references, and at least one, got '
            f'{len(candidates)} and {len(references)}'
        )
    pictures = []
    for number, (candidate, of_picture) in enumerate(zip(candidates, references)):
        if isinstance(of_picture, str) or not len(of_picture):
            raise ValueError(
                f'references[{number}]: expected a list of at least one caption, got {of_picture!r}'
            )
        pictures.append((candidate.split(), [reference.split() for reference in of_picture]))
    return pictures
