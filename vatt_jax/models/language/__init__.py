"""Causal language models: the decoder of GPT-2 and of Llama, its cache, and how it writes text.

    form         what an architecture is: sizes, positions, norms; published ones
    rotary       rotary positions
    decoder      one layer
    cache        keys and values of the tokens so far
    causal_lm    the model
    interleaved  layers of another model between its own
    sampling     which tokens may come next: temperature, top-k, top-p
    decoding     greedy and sampled text
    beam         beam search

Examples and sources: docs/language_model.md.
"""

from vatt_jax.models.language.beam import Beams, beam_search
from vatt_jax.models.language.cache import Cache
from vatt_jax.models.language.causal_lm import CausalLM, LMOutputs
from vatt_jax.models.language.decoding import Generated, Rules, generate
from vatt_jax.models.language.form import PUBLISHED, Form
from vatt_jax.models.language.interleaved import Interleaved
from vatt_jax.models.language.rotary import Scaling

__all__ = [
    'PUBLISHED',
    'Beams',
    'Cache',
    'CausalLM',
    'Form',
    'Generated',
    'Interleaved',
    'LMOutputs',
    'Rules',
    'Scaling',
    'beam_search',
    'generate',
]
