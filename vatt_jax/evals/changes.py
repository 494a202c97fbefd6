"""Named changes of a host batch before encoding (controls): host batch in, host batch out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vatt_jax.config import choose
from vatt_jax.inputs import optical_flow
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.masking import IGNORED
from vatt_jax.inputs.tokenizer import UNKNOWN
from vatt_jax.rng import Rng

Batch = Mapping[str, Any]
Change = Callable[[Batch], dict[str, Any]]
# Label of the words that `masked_words` hides.
HIDDEN_WORDS = 'hidden_words'


def single_frame(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Every frame of a clip replaced by its middle one: what is left without motion."""
    changed = dict(batch)
    for name, stream in batch.items():
        modality = modality_of(name)
        if modality == 'flow':
            # One frame has no motion.
            changed[name] = {**stream, 'data': np.full_like(stream['data'], optical_flow.ZERO)}
        if modality == 'video':
            frames = stream['data']  # [B T H W C]
            middle = frames[:, frames.shape[1] // 2][:, None]  # [B 1 H W C]
            # A view with stride 0 over time: no copy, but read-only.
            changed[name] = {**stream, 'data': np.broadcast_to(middle, frames.shape)}
    return changed


def of_another_clip(batch: Mapping[str, Any], stream: str) -> dict[str, Any]:
    """A stream of every clip replaced by that of a clip about half the batch away.

    An odd number of clips away, since data may come in cycles: the synthetic clips have 16 classes
    in turn, and words of the class alone.

    Clips of one record follow one another in passes by segment; ask for records to be sure of
    another one. A clip alone in its batch has no other: the stream is not valid there.
    """
    rows = np.flatnonzero(batch['valid'])
    partner = np.arange(len(batch['valid']))
    partner[rows] = np.roll(rows, (len(rows) // 2 - 1) | 1)
    exchanged = {name: array[partner] for name, array in batch[stream].items()}
    if len(rows) < 2:
        exchanged['valid'] = np.zeros_like(exchanged['valid'])
    return {**batch, stream: exchanged}


def without(batch: Batch, stream: str) -> dict[str, Any]:
    """No clip has this stream."""
    if stream not in batch:
        return dict(batch)
    absent = np.zeros_like(batch[stream]['valid'])
    return {**batch, stream: {**batch[stream], 'valid': absent}}


def masked_words(batch: Batch) -> dict[str, Any]:
    """One word of each sentence becomes the mask token, the unknown word.

    Which one is drawn by the place of the example in the pass. What was there is the label
    HIDDEN_WORDS, int [B K L], elsewhere IGNORED. Unknown words are not hidden.
    """
    text = batch['text']
    ids = text['data']  # [B K L]
    is_word = (ids > UNKNOWN) & text['mask'][..., None]
    mesh = jax.sharding.get_mesh()
    # On devices of this host: others have other rows.
    with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh.local_mesh):
        rng = Rng.create(0, 0, jnp.asarray(batch['position'])).at(HIDDEN_WORDS)
        drawn = np.asarray(rng.uniform(ids.shape[1:]))
    order = np.where(is_word, drawn, -1)
    is_first = np.arange(ids.shape[-1]) == order.argmax(-1)[..., None]
    is_hidden = is_word & is_first
    labels = {**batch.get('labels', {}), HIDDEN_WORDS: np.where(is_hidden, ids, IGNORED)}
    hidden = np.where(is_hidden, UNKNOWN, ids).astype(ids.dtype)
    return {**batch, 'text': {**text, 'data': hidden}, 'labels': labels}


CHANGES: dict[str, Change] = {'single_frame': single_frame, 'masked_words': masked_words}
for _stream in ('video', 'audio', 'text'):
    CHANGES[f'other_{_stream}'] = functools.partial(of_another_clip, stream=_stream)
    CHANGES[f'no_{_stream}'] = functools.partial(without, stream=_stream)


def change_of(name: str, where: str = 'change') -> Change:
    """The change of this name; of several, joined by +, one after another.

    Raises:
        ConfigError: CHANGES has no such entry.
    """
    changes = [CHANGES[choose(part, CHANGES, where)] for part in name.split('+')]

    def change(batch: Batch) -> dict[str, Any]:
        for one in changes:
            batch = one(batch)
        return dict(batch)

    return change
