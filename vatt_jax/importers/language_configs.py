"""config.json of Hugging Face language models <-> the architecture as we have it.

What a file says that our decoder does not do is an error which names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vatt_jax.config import ConfigError
from vatt_jax.importers.messages import shown
from vatt_jax.models.language.form import ATTENTION, PROJECTIONS, Form
from vatt_jax.models.language.rotary import Scaling

QKV = ('query', 'key', 'value')
MLP = ('mlp_in', 'mlp_gate', 'mlp_out')
# Theirs -> ours. The first of several is written.
ACTIVATIONS = {
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'silu': 'silu',
    'swish': 'silu',
    'quick_gelu': 'quick_gelu',
}
# Fields that must have this value, or be absent: what they would change is not built.
ONLY: dict[str, Mapping[str, Any]] = {
    'gpt2': {
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
        'add_cross_attention': False,
    },
    'llama': {},
    'mistral': {},
    'qwen2': {'use_sliding_window': False},
}


# What these kinds have where the field is not in the file.
MISTRAL_WINDOW = 4096
ABSENT_KEY_HEADS = {'mistral': 8, 'qwen2': 32}


def form_of(config: Mapping[str, Any], where: str) -> tuple[str, Form]:
    """The entry of language_layouts.LAYOUTS and the architecture of a config.json.

    Args:
        config: the content of the file.
        where: the file, for errors.

    Raises:
        ConfigError: a model of another kind, a field that is missing or of another type, or one
            whose value our decoder does not do.
    """
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in ONLY:
        raise ConfigError(
            f'{where}: model_type: expected one of {", ".join(ONLY)}, got {shown(kind)}'
        )
    for name, value in ONLY[kind].items():
        if config.get(name, value) != value:
            raise ConfigError(
                f'{where}: {name}: expected {value}, got {shown(config[name])}, which this '
                'decoder does not do'
            )
    fields = _Fields(config, where)
    if kind == 'gpt2':
        return 'gpt2', _gpt2(fields)
    return 'llama', _llama(fields, kind)


class _Fields:
    """Fields of a config.json, of the type that is asked for."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of a field. null counts as absent; without a default it must be there."""
        value = self.content.get(name)
        if value is None:
            value = default
        # True is an int for Python, and 1 stands for 1.0 in JSON.
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if kind is float and type(value) is int:
            value, is_right = float(value), True
        if not is_right:
            raise ConfigError(
                f'{self.where}: {name}: expected a value of type {kind.__name__}, got '
                f'{shown(value)}'
            )
        return value

    def activation(self, name: str, default: str) -> str:
        """Our name of an activation."""
        theirs = self.get(name, str, default)
        if theirs not in ACTIVATIONS:
            raise ConfigError(
                f'{self.where}: {name}: expected one of {", ".join(ACTIVATIONS)}, got '
                f'{shown(theirs)}'
            )
        return ACTIVATIONS[theirs]

    def head_width(self, width: int, heads: int) -> int:
        """Width of a head where the file does not say it."""
        if heads < 1 or width % heads:
            raise ConfigError(
                f'{self.where}: a width of {width} does not divide over {heads} heads'
            )
        return width // heads


def _gpt2(fields: _Fields) -> Form:
    width, heads = fields.get('n_embd', int), fields.get('n_head', int)
    return Form(
        vocab=fields.get('vocab_size', int),
        layers=fields.get('n_layer', int),
        width=width,
        mlp=fields.get('n_inner', int, 4 * width),
        heads=heads,
        key_heads=heads,
        head_width=fields.head_width(width, heads),
        context=fields.get('n_positions', int),
        eps=fields.get('layer_norm_epsilon', float, 1e-5),
        activation=fields.activation('activation_function', 'gelu_new'),
        tied=fields.get('tie_word_embeddings', bool, True),
    )


def _llama(fields: _Fields, kind: str) -> Form:
    width, heads = fields.get('hidden_size', int), fields.get('num_attention_heads', int)
    base, scaling = _rope(fields)
    return Form(
        vocab=fields.get('vocab_size', int),
        layers=fields.get('num_hidden_layers', int),
        width=width,
        mlp=fields.get('intermediate_size', int),
        heads=heads,
        key_heads=_key_heads(fields, kind, heads),
        head_width=fields.get('head_dim', int, 0) or fields.head_width(width, heads),
        context=_context(fields, kind),
        positions='rotary',
        rope_base=base,
        rope_scaling=scaling,
        rms=True,
        eps=fields.get('rms_norm_eps', float),
        activation=fields.activation('hidden_act', 'silu'),
        gated=True,
        biased=_biased(fields, kind),
        tied=fields.get('tie_word_embeddings', bool, False),
    )


def _context(fields: _Fields, kind: str) -> int:
    """Most tokens. Mistral's first release sees a window: it is exact for texts up to that."""
    context = fields.get('max_position_embeddings', int)
    # null says that there is no window.
    if kind == 'mistral' and fields.content.get('sliding_window', MISTRAL_WINDOW) is not None:
        return min(context, fields.get('sliding_window', int, MISTRAL_WINDOW))
    return context


def _key_heads(fields: _Fields, kind: str, heads: int) -> int:
    """Heads of keys and values; null says as many as of queries."""
    absent = ABSENT_KEY_HEADS.get(kind, heads)
    default = heads if 'num_key_value_heads' in fields.content else absent
    return fields.get('num_key_value_heads', int, default)


def _biased(fields: _Fields, kind: str) -> tuple[str, ...]:
    """Matrices with a bias, in the order of PROJECTIONS."""
    if kind == 'qwen2':
        return QKV
    biased: tuple[str, ...] = ()
    if fields.get('attention_bias', bool, False):
        biased += ATTENTION
    if fields.get('mlp_bias', bool, False):
        biased += MLP
    return biased


def _rope(fields: _Fields) -> tuple[float, Scaling | None]:
    """Base and scaling of rotary positions: `rope_parameters`, or the two older fields."""
    newer = fields.get('rope_parameters', dict, {})
    base = _Fields({**fields.content, **newer}, fields.where).get('rope_theta', float, 10_000.0)
    given = newer or fields.get('rope_scaling', dict, {})
    of_scaling = _Fields(given, f'{fields.where}: rope_scaling')
    # Older files call the kind `type`.
    kind = of_scaling.get('rope_type', str, given.get('type', 'default'))
    if kind == 'default':
        return base, None
    if kind == 'linear':
        return base, Scaling('linear', of_scaling.get('factor', float))
    if kind == 'llama3':
        return base, Scaling(
            'llama3',
            of_scaling.get('factor', float),
            of_scaling.get('low_freq_factor', float),
            of_scaling.get('high_freq_factor', float),
            of_scaling.get('original_max_position_embeddings', int),
        )
    raise ConfigError(
        f'{of_scaling.where}: rope_type: expected default, linear or llama3, got {shown(kind)}'
    )


# ---- out
def config_of(form: Form) -> tuple[str, dict[str, Any]]:
    """The entry of language_layouts.LAYOUTS and the config.json of an architecture.

    Raises:
        ConfigError: no public model has these parts together.
    """
    if _is_gpt2(form):
        return 'gpt2', _gpt2_config(form)
    kinds = {(): 'llama', ATTENTION: 'llama', MLP: 'llama', (*ATTENTION, *MLP): 'llama'}
    kinds[QKV] = 'qwen2'
    if form.positions == 'rotary' and form.rms and form.gated and form.biased in kinds:
        return 'llama', _llama_config(form, kinds[form.biased])
    raise ConfigError(
        'neither GPT-2 nor Llama has these parts together: '
        f'positions={form.positions!r}, rms={form.rms}, gated={form.gated}, '
        f'biased={form.biased}, key_heads={form.key_heads} of {form.heads} heads'
    )


def _is_gpt2(form: Form) -> bool:
    is_plain = not (form.rms or form.gated) and form.positions == 'learned'
    has_biases = {*PROJECTIONS} - {*form.biased} <= {'mlp_gate'}
    is_whole = form.key_heads == form.heads and form.heads * form.head_width == form.width
    return is_plain and has_biases and is_whole


def _their_activation(form: Form) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == form.activation)


def _gpt2_config(form: Form) -> dict[str, Any]:
    return {
        'model_type': 'gpt2',
        'architectures': ['GPT2LMHeadModel'],
        'vocab_size': form.vocab,
        'n_positions': form.context,
        'n_embd': form.width,
        'n_layer': form.layers,
        'n_head': form.heads,
        'n_inner': form.mlp,
        'activation_function': _their_activation(form),
        'layer_norm_epsilon': form.eps,
        'tie_word_embeddings': form.tied,
    }


def _llama_config(form: Form, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        'model_type': kind,
        'architectures': ['Qwen2ForCausalLM' if kind == 'qwen2' else 'LlamaForCausalLM'],
        'vocab_size': form.vocab,
        'hidden_size': form.width,
        'intermediate_size': form.mlp,
        'num_hidden_layers': form.layers,
        'num_attention_heads': form.heads,
        'num_key_value_heads': form.key_heads,
        'head_dim': form.head_width,
        'max_position_embeddings': form.context,
        'rms_norm_eps': form.eps,
        'hidden_act': _their_activation(form),
        'rope_theta': form.rope_base,
        'rope_scaling': _scaling_config(form.rope_scaling),
        'tie_word_embeddings': form.tied,
    }
    if kind == 'llama':
        config['attention_bias'] = 'query' in form.biased
        config['mlp_bias'] = 'mlp_in' in form.biased
    return config


def _scaling_config(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    config: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
    if scaling.kind == 'llama3':
        config['low_freq_factor'] = scaling.low
        config['high_freq_factor'] = scaling.high
        config['original_max_position_embeddings'] = scaling.original
    return config
