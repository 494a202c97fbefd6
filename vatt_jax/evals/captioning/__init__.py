"""Scores of generated captions, as the evaluation of COCO captions has them (docs/captioning.md).

Each metric is a function of lists: one candidate for each of M pictures, and the references of
each. They split at white space; `tokenize` makes such sentences of captions as people write them,
and `score` does both.
"""

from vatt_jax.evals.captioning.bleu_score import bleu
from vatt_jax.evals.captioning.cider_score import cider, cider_d
from vatt_jax.evals.captioning.files import (
    pair,
    read_references,
    read_results,
    write_references,
    write_results,
)
from vatt_jax.evals.captioning.meteor_score import meteor_like
from vatt_jax.evals.captioning.rouge_score import rouge_l
from vatt_jax.evals.captioning.scores import METRICS, score, score_files
from vatt_jax.evals.captioning.tokenization import tokenize

__all__ = [
    'METRICS',
    'bleu',
    'cider',
    'cider_d',
    'meteor_like',
    'pair',
    'read_references',
    'read_results',
    'rouge_l',
    'score',
    'score_files',
    'tokenize',
    'write_references',
    'write_results',
]
