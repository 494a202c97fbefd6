"""Language models that read pictures, videos and sounds, as tokens or as a prefix.

    resampler    any number of tokens of a medium -> a fixed number (Flamingo)
    media        which media each word sees, and which words count in the loss (Flamingo)
    flamingo     a frozen language model with gated cross-attention between its layers
    mappers      an embedding -> vectors that stand before the words (ClipCap)
    clipcap      captions of embeddings
    new_parts    what is trained beside a frozen language model

Examples and sources: docs/flamingo.md.
"""

from vatt_jax.models.media_language.clipcap import ClipCap, write_captions
from vatt_jax.models.media_language.flamingo import FlamingoCache, FlamingoLM
from vatt_jax.models.media_language.mappers import MLPMapper, TransformerMapper
from vatt_jax.models.media_language.media import counted_words, seen_media
from vatt_jax.models.media_language.new_parts import merge, split
from vatt_jax.models.media_language.resampler import PerceiverResampler

__all__ = [
    'ClipCap',
    'FlamingoCache',
    'FlamingoLM',
    'MLPMapper',
    'PerceiverResampler',
    'TransformerMapper',
    'counted_words',
    'merge',
    'seen_media',
    'split',
    'write_captions',
]
