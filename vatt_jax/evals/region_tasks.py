"""Scores of the tasks that ViLBERT and UNITER are fine-tuned for: functions of arrays, NumPy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from vatt_jax.detection.boxes import box_iou

# A box is right above this IoU with the true one.
RIGHT = 0.5


def answer_score(logits: Float[np.ndarray, 'B P'], targets: Float[np.ndarray, 'B P']) -> float:
    """VQA's: the mean of the soft score that the best answer has.

    Args:
        logits: of each answer.
        targets: soft scores, such as min(1, people / 3).
    """
    best = np.argmax(logits, -1)
    return float(np.mean(targets[np.arange(len(targets)), best]))


def choice_scores(
    answers: Float[np.ndarray, 'B K'],
    answer: Int[np.ndarray, ' B'],
    rationales: Float[np.ndarray, 'B K'],
    rationale: Int[np.ndarray, ' B'],
) -> dict[str, float]:
    """VCR's: shares of right answers, of right rationales given the answer, and of both at once.

    Args:
        answers: score of each answer.
        answer: number of the right one.
        rationales: score of each rationale, beside the right answer.
        rationale: number of the right one.
    """
    is_answered = np.argmax(answers, -1) == answer
    is_explained = np.argmax(rationales, -1) == rationale
    return {
        'answer': float(np.mean(is_answered)),
        'rationale': float(np.mean(is_explained)),
        'both': float(np.mean(is_answered & is_explained)),
    }


def expression_accuracy(
    scores: Float[np.ndarray, 'B N'],
    boxes: Float[np.ndarray, 'B N 4'],
    true: Float[np.ndarray, 'B 4'],
) -> float:
    """Share of expressions whose best region has an IoU above 0.5 with the true box.

    Args:
        scores: of each region.
        boxes: corners of each region, in the units of `true`.
        true: the box that is meant.
    """
    is_right = []
    for row, best in enumerate(np.argmax(scores, -1)):
        overlap = box_iou(boxes[row, best][None], true[row][None])[0, 0]
        is_right.append(overlap > RIGHT)
    return float(np.mean(is_right))


def consistency(is_right: Bool[np.ndarray, ' B'], sentence: Int[np.ndarray, ' B']) -> float:
    """NLVR2's: share of sentences that are judged rightly for all their pairs of pictures.

    Args:
        is_right: whether a pair was judged rightly.
        sentence: number of its sentence.
    """
    numbers = np.unique(sentence)
    return float(np.mean([is_right[sentence == number].all() for number in numbers]))


def recall_at(scores: Float[np.ndarray, 'B K'], is_match: Bool[np.ndarray, 'B K'], k: int) -> float:
    """Retrieval's: share of queries with a candidate that matches among the k best.

    Args:
        scores: of each query and candidate.
        is_match: whether they belong together.
        k: how many are looked at.
    """
    best = np.argsort(-scores, -1, kind='stable')[:, :k]
    return float(np.mean(np.take_along_axis(is_match, best, -1).any(-1)))
