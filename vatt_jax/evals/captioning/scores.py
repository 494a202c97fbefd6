"""All scores of a set of captions: tokenised, compared, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vatt_jax.config import ConfigError, choose
from vatt_jax.evals.captioning import files
from vatt_jax.evals.captioning.bleu_score import bleu
from vatt_jax.evals.captioning.cider_score import cider, cider_d
from vatt_jax.evals.captioning.meteor_score import meteor_like
from vatt_jax.evals.captioning.ngrams import Captions, References
from vatt_jax.evals.captioning.rouge_score import rouge_l
from vatt_jax.evals.captioning.tokenization import tokenize


def _bleu(candidates: Captions, references: References) -> dict[str, float]:
    scores = bleu(candidates, references)
    return {f'BLEU-{n}': value for n, value in enumerate(scores, 1)}


def _meteor_like(candidates: Captions, references: References) -> dict[str, float]:
    return {'METEOR-like': meteor_like(candidates, references)}


def _rouge_l(candidates: Captions, references: References) -> dict[str, float]:
    return {'ROUGE-L': float(rouge_l(candidates, references).mean())}


def _cider(candidates: Captions, references: References) -> dict[str, float]:
    return {'CIDEr': float(cider(candidates, references).mean())}


def _cider_d(candidates: Captions, references: References) -> dict[str, float]:
    return {'CIDEr-D': float(cider_d(candidates, references).mean())}


# Name -> function of tokenised captions.
METRICS: dict[str, Callable[[Captions, References], dict[str, float]]] = {
    'BLEU': _bleu,
    'METEOR-like': _meteor_like,
    'ROUGE-L': _rouge_l,
    'CIDEr': _cider,
    'CIDEr-D': _cider_d,
}

# Name -> why it is not among them.
UNAVAILABLE = {
    'SPICE': 'it parses captions into scene graphs by programs in Java (a parser, WordNet). Write '
    'the captions with write_results and run the evaluation of COCO captions on that file',
    'METEOR': 'it needs Java, WordNet and a table of paraphrases. METEOR-like matches equal words '
    'alone; for the full score write the captions with write_results and run the evaluation of '
    'COCO captions on that file',
}


def score(
    candidates: Captions, references: References, metrics: Sequence[str] = tuple(METRICS)
) -> dict[str, float]:
    """Scores of captions as people and models write them.

    Args:
        candidates: a caption for each picture.
        references: the captions of each.
        metrics: entries of METRICS.

    Returns:
        Name -> score: BLEU, METEOR-like and ROUGE-L in [0, 1], CIDEr and CIDEr-D in [0, 10].

    Raises:
        ConfigError: a metric is not there.
        ValueError: see `split_captions`.
    """
    for name in metrics:
        if name in UNAVAILABLE:
            raise ConfigError(f'metrics: {name} is not available: {UNAVAILABLE[name]}.')
        choose(name, METRICS, 'metrics')
    candidates = [tokenize(caption) for caption in candidates]
    references = [[tokenize(caption) for caption in captions] for captions in references]
    scores = {}
    for name in metrics:
        scores.update(METRICS[name](candidates, references))
    return scores


def score_files(
    results: str | os.PathLike,
    references: str | os.PathLike,
    metrics: Sequence[str] = tuple(METRICS),
    allow_missing: bool = False,
) -> dict[str, float]:
    """Scores of a file of results against a file of references, in COCO's formats.

    Args:
        results: see `files.read_results`.
        references: see `files.read_references`.
        metrics: entries of METRICS.
        allow_missing: see `files.pair`.

    Raises:
        ConfigError: a file or a metric is not what it should be.
    """
    captions = files.read_results(results)
    of_pictures = files.read_references(references)
    candidates, known = files.pair(captions, of_pictures, allow_missing)
    if not candidates:
        raise ConfigError(f'{results}: expected the caption of at least one picture, got none')
    return score(candidates, known, metrics)
