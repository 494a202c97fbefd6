"""Flamingo and ClipCap of a few hundred parameters, and the released networks in NumPy float64.

The definitions read variables by the names of open_flamingo's and ClipCap's files, and go word by
word and head by head.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tests import tiny_language
from tests.tiny_language import attend, gelu_tanh
from vatt_jax.importers import media_language, parameter_map
from vatt_jax.importers import media_language_layouts as layouts
from vatt_jax.models.language import CausalLM
from vatt_jax.models.media_language import (
    ClipCap,
    FlamingoLM,
    MLPMapper,
    PerceiverResampler,
    TransformerMapper,
)

# Three layers: a gated one before the second, none before the first and the last.
FORM = dataclasses.replace(tiny_language.FORMS['gpt2'], layers=3, context=16)
MEDIA_WIDTH = 6
RESAMPLER = PerceiverResampler(
    MEDIA_WIDTH, latents=3, layers=2, heads=2, head_width=5, mlp=7, frames=3, media=4
)
FLAMINGO = FlamingoLM(
    CausalLM(FORM), RESAMPLER, tag=FORM.vocab, every=2, heads=3, head_width=2, mlp=10
)
EMBEDDING = 5
MAPPERS = {
    'mlp': MLPMapper(FORM.width, prefix=3),
    'transformer': TransformerMapper(FORM.width, prefix=3, tokens=2, layers=2, heads=2),
}


def drawn(shapes, seed=0):
    """Noise of these shapes: biases of 0, scales of 1 and closed gates would hide mistakes."""
    noise = np.random.default_rng(seed)
    variables = {}
    for path, like in shapes.items():
        x = 0.5 * noise.normal(size=like.shape)
        variables[path] = jnp.asarray(1 + np.abs(x) if path[-1] == 'scale' else x, jnp.float32)
    return variables


def flamingo_variables(model=FLAMINGO):
    """{'params': …} of a Flamingo."""
    new = unflatten_dict(drawn(media_language.new_variables(model)))['params']
    language = tiny_language.tree(model.form)['params']
    return {'params': {**new, 'language': language}}


def flamingo_theirs(model=FLAMINGO):
    """The new ones by open_flamingo's names, and the language model's by GPT-2's, float64."""
    new = drawn(media_language.new_variables(model))
    entries = layouts.flamingo(new, model.every)
    new = {path: np.asarray(x, np.float64) for path, x in new.items()}
    return {
        **parameter_map.to_theirs(new, entries),
        **tiny_language.theirs('gpt2', model.form),
    }


def clipcap(mapper):
    """A ClipCap and its {'params': …}."""
    model = ClipCap(CausalLM(FORM), MAPPERS[mapper])
    return model, unflatten_dict(clipcap_drawn(model))


def clipcap_drawn(model):
    """{('params', …): array} of a ClipCap."""
    return drawn(media_language.clipcap_variables(model, EMBEDDING))


def clipcap_theirs(model):
    """The same by ClipCap's names, float64; GPT-2's without prefix too."""
    flat = {path: np.asarray(x, np.float64) for path, x in clipcap_drawn(model).items()}
    theirs = parameter_map.to_theirs(flat, layouts.clipcap(flat))
    prefix = 'gpt.transformer.'
    return {**theirs, **{name.removeprefix(prefix): x for name, x in theirs.items()}}


# ---- definitions
def norm(weights, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * weights[f'{name}.weight'] + weights[f'{name}.bias']


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def squared_relu(x):
    return np.maximum(x, 0) ** 2


def attend_heads(query, keys, values, heads):
    """One query [heads · kv] and the keys and values [n, heads · kv] that it sees."""
    parts = [
        attend(q, k, v)
        for q, k, v in zip(
            np.split(query, heads), np.split(keys, heads, -1), np.split(values, heads, -1)
        )
    ]
    return np.concatenate(parts)


def feed_forward(weights, name, x, activation):
    hidden = activation(norm(weights, f'{name}.0', x) @ weights[f'{name}.1.weight'].T)
    return hidden @ weights[f'{name}.3.weight'].T


def resample(weights, model, x, seen=None):
    """The R tokens of each of M media [M T S D]; seen: bool [M T S]."""
    activation = {'gelu': gelu, 'squared_relu': squared_relu}[model.activation]
    resampled = []
    for medium, tokens in enumerate(x):
        tokens = tokens + weights['perceiver.frame_embs'][: len(tokens), None]
        tokens = tokens + weights['perceiver.media_time_embs'][medium, 0]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        if seen is not None:
            tokens = tokens[seen[medium].reshape(-1)]
        z = weights['perceiver.latents']
        for layer in range(model.layers):
            name = f'perceiver.layers.{layer}'
            latents = norm(weights, f'{name}.0.norm_latents', z)
            media = norm(weights, f'{name}.0.norm_media', tokens)
            both = np.concatenate([media, latents]) @ weights[f'{name}.0.to_kv.weight'].T
            keys, values = np.split(both, 2, axis=-1)
            queries = latents @ weights[f'{name}.0.to_q.weight'].T
            attended = np.stack([attend_heads(q, keys, values, model.heads) for q in queries])
            z = z + attended @ weights[f'{name}.0.to_out.weight'].T
            z = z + feed_forward(weights, f'{name}.1', z, activation)
        resampled.append(norm(weights, 'perceiver.norm', z))
    return np.stack(resampled)


def gated_layer(weights, name, model, y, media, is_tag):
    """One gated layer over words [N D] and resampled media [M R Dm]."""
    queries = norm(weights, f'{name}.attn.norm', y) @ weights[f'{name}.attn.to_q.weight'].T
    attended = np.zeros_like(queries)
    for n in range(len(y)):
        last = is_tag[: n + 1].sum()
        if model.attend == 'immediate':
            seen = media[last - 1 : last] if last else media[:0]
        else:
            seen = media[:last]
        if len(seen):
            both = seen.reshape(-1, seen.shape[-1]) @ weights[f'{name}.attn.to_kv.weight'].T
            attended[n] = attend_heads(queries[n], *np.split(both, 2, axis=-1), model.heads)
    y = (
        y
        + np.tanh(weights[f'{name}.attn_gate']) * attended @ weights[f'{name}.attn.to_out.weight'].T
    )
    return y + np.tanh(weights[f'{name}.ff_gate']) * feed_forward(weights, f'{name}.ff', y, gelu)


def gpt2_layer(weights, form, layer, x):
    name = f'h.{layer}'

    def linear(part, x):
        return x @ weights[f'{name}.{part}.weight'] + weights[f'{name}.{part}.bias']

    y = linear('attn.c_attn', norm(weights, f'{name}.ln_1', x))
    query, key, value = np.split(y, 3, axis=-1)
    attended = [
        attend_heads(query[n], key[: n + 1], value[: n + 1], form.heads) for n in range(len(x))
    ]
    x = x + linear('attn.c_proj', np.stack(attended))
    hidden = gelu_tanh(linear('mlp.c_fc', norm(weights, f'{name}.ln_2', x)))
    return x + linear('mlp.c_proj', hidden)


def flamingo_logits(weights, model, ids, media):
    """Logits [N vocab + new words] of one text without padding, and media [M T S Dm]."""
    table = np.concatenate([weights['wte.weight'], weights[layouts.NEW_ROWS]])
    resampled = resample(weights, model.resampler, media)
    x = table[ids] + weights['wpe.weight'][: len(ids)]
    for layer in range(model.form.layers):
        if (layer + 1) % model.every == 0:
            name = f'lang_encoder.gated_cross_attn_layers.{layer}'
            x = gated_layer(weights, name, model, x, resampled, ids == model.tag)
        x = gpt2_layer(weights, model.form, layer, x)
    return norm(weights, 'ln_f', x) @ table.T


def counted(ids, tag, end):
    """Which words of a text count, by reading it word by word."""
    found, is_open = [], False
    for word in ids:
        found.append(is_open and word != tag)
        is_open = word == tag or (is_open and word != end)
    return found


def mlp_prefix(weights, model, embedding):
    hidden = embedding @ weights['clip_project.model.0.weight'].T
    hidden = np.tanh(hidden + weights['clip_project.model.0.bias'])
    x = hidden @ weights['clip_project.model.2.weight'].T + weights['clip_project.model.2.bias']
    return x.reshape(model.prefix, model.width)


def transformer_prefix(weights, model, embedding):
    def linear(name, x):
        return x @ weights[f'{name}.weight'].T + weights.get(f'{name}.bias', 0)

    x = linear('clip_project.linear', embedding).reshape(model.tokens, model.width)
    x = np.concatenate([x, weights['clip_project.prefix_const']])
    for layer in range(model.layers):
        name = f'clip_project.transformer.layers.{layer}'
        y = norm(weights, f'{name}.norm1', x)
        queries = linear(f'{name}.attn.to_queries', y)
        keys, values = np.split(linear(f'{name}.attn.to_keys_values', y), 2, axis=-1)
        attended = [attend_heads(query, keys, values, model.heads) for query in queries]
        x = x + linear(f'{name}.attn.project', np.stack(attended))
        hidden = np.maximum(linear(f'{name}.mlp.fc1', norm(weights, f'{name}.norm2', x)), 0)
        x = x + linear(f'{name}.mlp.fc2', hidden)
    return x[-model.prefix :]


PREFIXES = {'mlp': mlp_prefix, 'transformer': transformer_prefix}


def clipcap_logits(weights, form, prefix, ids):
    """Logits [n vocab] of the n words of one caption."""
    x = np.concatenate([prefix, weights['wte.weight'][ids]])
    x = x + weights['wpe.weight'][: len(x)]
    for layer in range(form.layers):
        x = gpt2_layer(weights, form, layer, x)
    logits = norm(weights, 'ln_f', x) @ weights['wte.weight'].T
    return logits[len(prefix) - 1 : -1]
