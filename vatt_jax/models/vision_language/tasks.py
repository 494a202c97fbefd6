"""Heads that ViLBERT and UNITER are fine-tuned with, on what `encode` returns.

VQA           Classifier(2 * width, answers) on the vector of a pair
VCR           UNITER: Classifier(2 * width, 2, 'relu') on each candidate; ViLBERT: PairScore
retrieval     PairScore
expressions   RegionScores
NLVR2         PictureClassifier on the vectors of both pictures' pairs
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, Float

from vatt_jax.models.vision_language.heads import Classifier, dense

# Score of regions that are not there, as UNITER has it: small, and still finite.
NOT_THERE = -1e4


class PairScore(nn.Module):
    """How well a sentence and a picture match: linear in the vector of the pair.

    Attributes:
        dtype: to compute in.
    """

    dtype: str = 'float32'

    @nn.compact
    def __call__(self, pooled: Float[Array, '*batch D']) -> Float[Array, '*batch']:
        return dense(1, self.dtype, 'score')(pooled)[..., 0]


def score_of_matching(match_head: Any) -> dict[str, Any]:
    """Parameters of PairScore with which UNITER's retrieval begins: those of "it matches".

    Args:
        match_head: parameters of the model's head of that name.
    """
    head: Any = meta.unbox(match_head)
    return {'score': {'kernel': head['kernel'][:, 1:], 'bias': head['bias'][1:]}}


class RegionScores(nn.Module):
    """How well each region fits an expression.

    Attributes:
        dtype: to compute in.
    """

    dtype: str = 'float32'

    @nn.compact
    def __call__(
        self, regions: Float[Array, 'B N D'], is_there: Bool[Array, 'B N']
    ) -> Float[Array, 'B N']:
        """Score regions.

        Args:
            regions: what the model made of them.
            is_there: those that may be meant; of ViLBERT not the global one.
        """
        scores = dense(1, self.dtype, 'score')(regions)[..., 0]
        return jnp.where(is_there, scores, NOT_THERE)


class PictureClassifier(nn.Module):
    """Whether a sentence is true of two pictures (NLVR2).

    Attributes:
        hidden: whether there is a layer before the classifier (ViLBERT) or none (UNITER).
        dtype: to compute in.
    """

    hidden: bool = False
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, pooled: Float[Array, 'B 2 D']) -> Float[Array, 'B 2']:
        """Classify.

        Args:
            pooled: vectors of the sentence with the left picture, and with the right one.
        """
        both = pooled.reshape(len(pooled), -1)
        if self.hidden:
            return Classifier(both.shape[-1], 2, dtype=self.dtype, name='classifier')(both)
        return dense(2, self.dtype, 'classifier')(both)
