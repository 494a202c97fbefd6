"""A score like METEOR 1.5 (Denkowski and Lavie 2014), of equal words alone.

METEOR aligns words that are equal, share a stem, are synonyms (WordNet) or paraphrases (a table),
and weighs content words more than function words. Here words match if they are equal, and all
weigh the same; alignment, formula and constants are METEOR's. Its numbers lie lower than those that
papers report and must not stand beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vatt_jax.evals.captioning.ngrams import Captions, References, split_captions

# Of METEOR 1.5 for English, ranking task: weight of recall, and shape and height of the penalty on
# fragments. (δ = 0.75, the weight of content words, has no counterpart here.)
ALPHA = 0.85
BETA = 0.2
GAMMA = 0.6
# Partial alignments that are kept, as in METEOR. Captions seldom have as many.
BEAM = 40


class Statistics(NamedTuple):
    """What a score is made of.

    Attributes:
        matches: words of the candidate that are aligned with words of the reference.
        chunks: runs of matches that are neighbours in the same order in both; 0 of equal captions,
            which are not in fragments.
        candidate: words of the candidate.
        reference: words of the reference.
    """

    matches: int = 0
    chunks: int = 0
    candidate: int = 0
    reference: int = 0

    def score(self) -> float:
        """The weighted harmonic mean of precision and recall, less the penalty on fragments."""
        if not self.matches:
            return 0.0
        precision = self.matches / self.candidate
        recall = self.matches / self.reference
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        return mean * (1 - GAMMA * (self.chunks / self.matches) ** BETA)


# The words of a reference that are taken so far, and the one that the candidate's last word took.
Alignment = tuple[frozenset[int], int]
# Where the last word took none: no word of the reference follows it.
NO_PLACE = -2


def meteor_like(candidates: Captions, references: References) -> float:
    """The score of a set of pictures, in [0, 1], from statistics summed over them (METEOR).

    Args:
        candidates: a caption for each picture; words with white space between. The reference of
            the best score counts for each.
        references: the captions of each.

    Raises:
        ValueError: see `split_captions`.
    """
    total = Statistics()
    for candidate, of_picture in split_captions(candidates, references):
        found = [align(candidate, reference) for reference in of_picture]
        best = max(found, key=Statistics.score)
        total = Statistics(*(a + b for a, b in zip(total, best)))
    return total.score()


def align(candidate: Sequence[str], reference: Sequence[str]) -> Statistics:
    """The alignment with the most matches, and of those the fewest chunks (within the beam)."""
    places: dict[str, list[int]] = {}
    for place, word in enumerate(reference):
        places.setdefault(word, []).append(place)
    # How many words of a kind find no match: the candidate has so many more than the reference.
    left_over = Counter(candidate) - Counter(reference)

    chunks: dict[Alignment, int] = {(frozenset(), NO_PLACE): 0}
    seen: Counter[str] = Counter()
    for word in candidate:
        grown: dict[Alignment, int] = {}
        for (used, last), count in chunks.items():
            free = [place for place in places.get(word, []) if place not in used]
            num_matched = len(places.get(word, [])) - len(free)
            if seen[word] - num_matched < left_over[word]:
                _keep_fewest(grown, (used, NO_PLACE), count)
            for place in free:
                _keep_fewest(grown, (used | {place}, place), count + (place != last + 1))
        seen[word] += 1
        chunks = dict(sorted(grown.items(), key=lambda entry: entry[1])[:BEAM])
    matches = len(candidate) - left_over.total()
    num_chunks = 0 if candidate == reference else min(chunks.values())
    return Statistics(matches, num_chunks, len(candidate), len(reference))


def _keep_fewest(chunks: dict[Alignment, int], alignment: Alignment, count: int) -> None:
    chunks[alignment] = min(count, chunks.get(alignment, count))
