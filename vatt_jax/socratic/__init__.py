"""Socratic models: trained models that talk to one another in words (Zeng et al. 2022).

A graph of steps, each of which scores texts against a clip, generates text from a prompt, or is a
plain function. What each reads and makes is declared and checked; what it did is logged and shown
(docs/socratic.md).
"""

from vatt_jax.socratic.generators import TemplateGenerator
from vatt_jax.socratic.graph import (
    CLIP,
    RANKING,
    TEXT,
    TEXTS,
    Graph,
    Kind,
    Log,
    Ranking,
    Step,
    StepError,
)
from vatt_jax.socratic.scorers import ModelScorer
from vatt_jax.socratic.steps import function, generate, score

__all__ = [
    'CLIP',
    'RANKING',
    'TEXT',
    'TEXTS',
    'Graph',
    'Kind',
    'Log',
    'ModelScorer',
    'Ranking',
    'Step',
    'StepError',
    'TemplateGenerator',
    'function',
    'generate',
    'score',
]
