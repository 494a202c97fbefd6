"""The transformations of GDT as a table, and the terms of the loss that follow from it.

A view of a record is one of two clips in one of two directions of time. GDT (Patrick et al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

UNUSED, INVARIANT, DISTINCTIVE = 'unused', 'invariant', 'distinctive'
ROLES = (UNUSED, INVARIANT, DISTINCTIVE)
# The role of a term without a transformation: the same view in the other modality.
BASE = 'base'


class Roles(NamedTuple):
    """What each transformation is."""

    shift: str
    reversal: str


# The combinations by their published numbers.
HYPOTHESES = {
    1: Roles(shift=UNUSED, reversal=UNUSED),
    2: Roles(shift=UNUSED, reversal=DISTINCTIVE),
    3: Roles(shift=UNUSED, reversal=INVARIANT),
    4: Roles(shift=DISTINCTIVE, reversal=UNUSED),
    5: Roles(shift=INVARIANT, reversal=UNUSED),
    6: Roles(shift=DISTINCTIVE, reversal=DISTINCTIVE),
    7: Roles(shift=DISTINCTIVE, reversal=INVARIANT),
    8: Roles(shift=INVARIANT, reversal=DISTINCTIVE),
    9: Roles(shift=INVARIANT, reversal=INVARIANT),
}


class View(NamedTuple):
    """One view of a record: which of its two clips, and in which direction of time."""

    clip: int
    is_reversed: bool


FIRST = View(0, False)
# View -> the suffix of its streams.
SUFFIXES = {
    FIRST: '',
    View(0, True): 'reversed',
    View(1, False): 'second',
    View(1, True): 'second_reversed',
}
# A sentence has no direction of time: it is that of its clip, however the clip is played.
WITHOUT_DIRECTION = ('text',)


def stream_of(modality: str, view: View) -> str:
    """The stream that holds a view of a modality."""
    if modality in WITHOUT_DIRECTION:
        view = View(view.clip, False)
    suffix = SUFFIXES[view]
    return f'{modality}.{suffix}' if suffix else modality


class Term(NamedTuple):
    """One summand of the loss: what queries of a pair of views must find.

    Attributes:
      transformation: what makes one view of the pair out of the other: shift | reversal | none.
      role: base: the same view in another modality. distinctive: that one too, with the query's own
        transformed view among the negatives. invariant: the transformed view.
      views: the pair, or FIRST alone.
      remote: views whose keys of other replicas are negatives; some may occur several times.
    """

    transformation: str
    role: str
    views: tuple[View, ...]
    remote: tuple[View, ...]

    def other(self, view: View) -> View:
        """The other view of the pair."""
        return self.views[1] if view == self.views[0] else self.views[0]

    def positive(self, view: View) -> View:
        """The view that a query of this view must find."""
        return self.other(view) if self.role == INVARIANT else view


def make_terms(roles: Roles, published_negatives: bool = False) -> list[Term]:
    """The terms of the loss, all of equal weight.

    Each transformation has a term for each value of the other one; an invariance has one base term
    besides, which ties both of its views to their own partners (published code).

    Args:
      roles: of the transformations.
      published_negatives: see `_pile_up`.
    """
    pairs = _pairs_by_transformation(roles)
    terms = []
    for transformation, views in pairs.items():
        if getattr(roles, transformation) == INVARIANT:
            terms.append(Term(transformation, BASE, views[0], views[0]))
    for transformation, views in pairs.items():
        role = getattr(roles, transformation)
        terms += [Term(transformation, role, pair, pair) for pair in views]
    if not terms:
        terms = [Term('none', BASE, (FIRST,), (FIRST,))]
    return _pile_up(terms) if published_negatives else terms


def _pairs_by_transformation(roles: Roles) -> dict[str, list[tuple[View, View]]]:
    """Transformation -> the pairs of views that it maps to each other; used ones alone."""
    clips = (0,) if roles.shift == UNUSED else (0, 1)
    directions = (False,) if roles.reversal == UNUSED else (False, True)
    pairs = {}
    if roles.reversal != UNUSED:
        pairs['reversal'] = [(View(clip, False), View(clip, True)) for clip in clips]
    if roles.shift != UNUSED:
        pairs['shift'] = [(View(0, direction), View(1, direction)) for direction in directions]
    return pairs


def _pile_up(terms: Sequence[Term]) -> list[Term]:
    """The terms with the remote negatives that they have in the published code.

    It gathers the keys of each view into one list, and each term extends the list of one view by
    that of the other, in place: what earlier terms appended is there for the later ones.
    """
    gathered = {view: [view] for term in terms for view in term.views}
    piled = []
    for term in terms:
        if len(term.views) == 2:
            # The list that grows is that of the positive of the pair's first view.
            grown = term.positive(term.views[0])
            gathered[grown] += gathered[term.other(grown)]
            term = term._replace(remote=tuple(gathered[grown]))
        piled.append(term)
    return piled
