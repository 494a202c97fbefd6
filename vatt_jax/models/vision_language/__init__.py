"""ViLBERT and UNITER: Transformers over words and the regions of a picture.

sizes.py        the published sizes, and those of a release's config
embeddings.py   words and regions -> tokens
vilbert.py      two streams, co-attention
uniter.py       one stream
heads.py        masked words, masked regions, matching
"""

from vatt_jax.models.vision_language.sizes import UNITER, VILBERT, UniterSizes, VilbertSizes
from vatt_jax.models.vision_language.uniter import Uniter, UniterEncoded, UniterOutputs
from vatt_jax.models.vision_language.vilbert import Vilbert, VilbertEncoded, VilbertOutputs

__all__ = [
    'UNITER',
    'VILBERT',
    'Uniter',
    'UniterEncoded',
    'UniterOutputs',
    'UniterSizes',
    'Vilbert',
    'VilbertEncoded',
    'VilbertOutputs',
    'VilbertSizes',
]
