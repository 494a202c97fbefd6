"""Language models of a few hundred parameters, and the released networks in NumPy float64.

The definitions read variables by the names of Hugging Face's files, and go token by token and head
by head.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from vatt_jax.importers import language, language_layouts, parameter_map
from vatt_jax.models.language import Form, Scaling

SIZE = {'vocab': 13, 'layers': 2, 'width': 8, 'mlp': 12, 'head_width': 4, 'context': 12}
FORMS = {
    'gpt2': Form(**SIZE, heads=2, key_heads=2),
    'llama': Form(
        **SIZE,
        heads=4,
        key_heads=2,
        positions='rotary',
        rope_base=100.0,
        rope_scaling=Scaling('llama3', factor=4.0, low=1.0, high=4.0, original=16),
        rms=True,
        eps=1e-5,
        activation='silu',
        gated=True,
        biased=(),
        tied=False,
    ),
}


def variables(form, seed=0):
    """Variables of noise: biases of 0 and scales of 1 would hide their being left out."""
    noise = np.random.default_rng(seed)
    drawn = {}
    for path, like in language.abstract_variables(form).items():
        x = 0.5 * noise.normal(size=like.shape)
        if path[-1] == 'scale':
            x = 1 + np.abs(x)
        drawn[path] = jnp.asarray(x, jnp.float32)
    return drawn


def tree(form, seed=0):
    """The same as the module takes them."""
    return unflatten_dict(variables(form, seed))


def theirs(layout, form, seed=0):
    """The same by the names of a release without prefix, float64."""
    flat = {path: np.asarray(x, np.float64) for path, x in variables(form, seed).items()}
    return parameter_map.to_theirs(flat, language_layouts.layout(layout, flat))


@functools.cache
def logits_of(model):
    """The jitted logits of a module."""
    return jax.jit(lambda variables, *inputs: model.apply(variables, *inputs).logits)


# ---- definitions
def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def attend(query, keys, values):
    """One query [kv], the keys and values [n kv] that it sees."""
    logits = keys @ query / math.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum() @ values


def gpt2_logits(weights, form, ids):
    """Logits [N V] of one text without padding."""

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + form.eps)
        return x * weights[f'{name}.weight'] + weights[f'{name}.bias']

    def linear(name, x):
        return x @ weights[f'{name}.weight'] + weights[f'{name}.bias']

    x = weights['wte.weight'][ids] + weights['wpe.weight'][: len(ids)]
    for layer in range(form.layers):
        name = f'h.{layer}'
        y = linear(f'{name}.attn.c_attn', norm(f'{name}.ln_1', x))
        query, key, value = np.split(y, 3, axis=-1)
        attended = np.zeros_like(query)
        for n in range(len(ids)):
            for head in range(form.heads):
                part = slice(head * form.head_width, (head + 1) * form.head_width)
                attended[n, part] = attend(query[n, part], key[: n + 1, part], value[: n + 1, part])
        x = x + linear(f'{name}.attn.c_proj', attended)
        hidden = gelu_tanh(linear(f'{name}.mlp.c_fc', norm(f'{name}.ln_2', x)))
        x = x + linear(f'{name}.mlp.c_proj', hidden)
    return norm('ln_f', x) @ weights['wte.weight'].T


def llama3_frequencies(form):
    """Frequencies by the length of their waves, as Llama 3.1 lowers them."""
    scaling, lowered = form.rope_scaling, []
    for i in range(form.head_width // 2):
        frequency = form.rope_base ** (-2 * i / form.head_width)
        wave = 2 * math.pi / frequency
        if wave < scaling.original / scaling.high:
            lowered.append(frequency)
        elif wave > scaling.original / scaling.low:
            lowered.append(frequency / scaling.factor)
        else:
            share = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
            lowered.append((1 - share) * frequency / scaling.factor + share * frequency)
    return np.array(lowered)


def turned(x, position, frequencies):
    """A head [kv] whose pairs, as complex numbers, are turned."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([z.real, z.imag])


def llama_logits(weights, form, ids):
    """Logits [N V] of one text without padding."""
    frequencies = llama3_frequencies(form)
    kv, group = form.head_width, form.heads // form.key_heads

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + form.eps) * weights[f'{name}.weight']

    def linear(name, x):
        return x @ weights[f'{name}.weight'].T

    def heads(name, x):
        return linear(name, x).reshape(len(x), -1, kv)

    x = weights['embed_tokens.weight'][ids]
    for layer in range(form.layers):
        name = f'layers.{layer}'
        y = norm(f'{name}.input_layernorm', x)
        query = heads(f'{name}.self_attn.q_proj', y)
        key = heads(f'{name}.self_attn.k_proj', y)
        value = heads(f'{name}.self_attn.v_proj', y)
        attended = np.zeros_like(query)
        for n in range(len(ids)):
            for head in range(form.heads):
                of_group = head // group
                keys = [turned(key[m, of_group], m, frequencies) for m in range(n + 1)]
                attended[n, head] = attend(
                    turned(query[n, head], n, frequencies),
                    np.stack(keys),
                    value[: n + 1, of_group],
                )
        x = x + linear(f'{name}.self_attn.o_proj', attended.reshape(len(ids), -1))
        y = norm(f'{name}.post_attention_layernorm', x)
        gate = silu(linear(f'{name}.mlp.gate_proj', y))
        x = x + linear(f'{name}.mlp.down_proj', gate * linear(f'{name}.mlp.up_proj', y))
    return norm('norm', x) @ weights['lm_head.weight'].T


LOGITS = {'gpt2': gpt2_logits, 'llama': llama_logits}
