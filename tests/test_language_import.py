"""Hugging Face's folders of language models: in, out, and what is said of those that do not fit."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests import tiny_language
from tests.tiny_language import FORMS
from vatt_jax.config import ConfigError
from vatt_jax.importers import language, language_configs
from vatt_jax.models.language import PUBLISHED, Form, Scaling

GPT2_CONFIG = {
    'model_type': 'gpt2',
    'vocab_size': 13,
    'n_positions': 12,
    'n_ctx': 12,
    'n_embd': 8,
    'n_layer': 2,
    'n_head': 2,
    'n_inner': 12,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-05,
    'bos_token_id': 12,
    'eos_token_id': 12,
    'attn_pdrop': 0.1,
    'torch_dtype': 'float32',
}
LLAMA_CONFIG = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': 13,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 4,
    'hidden_act': 'silu',
    'max_position_embeddings': 12,
    'rms_norm_eps': 1e-05,
    'rope_theta': 100.0,
    'rope_scaling': {
        'rope_type': 'llama3',
        'factor': 4.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 16,
    },
    'attention_bias': False,
    'eos_token_id': [1, 2],
}
CONFIGS = {'gpt2': GPT2_CONFIG, 'llama': LLAMA_CONFIG}
D, MLP = 8, 12
GPT2_SHAPES = {
    'wte.weight': (13, D),
    'wpe.weight': (12, D),
    'ln_f.weight': (D,),
    'ln_f.bias': (D,),
}
LLAMA_SHAPES = {
    'model.embed_tokens.weight': (13, D),
    'model.norm.weight': (D,),
    'lm_head.weight': (13, D),
}
for layer in range(2):
    GPT2_SHAPES |= {
        f'h.{layer}.ln_1.weight': (D,),
        f'h.{layer}.ln_1.bias': (D,),
        f'h.{layer}.attn.bias': (1, 1, 12, 12),
        f'h.{layer}.attn.c_attn.weight': (D, 3 * D),
        f'h.{layer}.attn.c_attn.bias': (3 * D,),
        f'h.{layer}.attn.c_proj.weight': (D, D),
        f'h.{layer}.attn.c_proj.bias': (D,),
        f'h.{layer}.ln_2.weight': (D,),
        f'h.{layer}.ln_2.bias': (D,),
        f'h.{layer}.mlp.c_fc.weight': (D, MLP),
        f'h.{layer}.mlp.c_fc.bias': (MLP,),
        f'h.{layer}.mlp.c_proj.weight': (MLP, D),
        f'h.{layer}.mlp.c_proj.bias': (D,),
    }
    LLAMA_SHAPES |= {
        f'model.layers.{layer}.input_layernorm.weight': (D,),
        f'model.layers.{layer}.self_attn.q_proj.weight': (16, D),
        f'model.layers.{layer}.self_attn.k_proj.weight': (8, D),
        f'model.layers.{layer}.self_attn.v_proj.weight': (8, D),
        f'model.layers.{layer}.self_attn.o_proj.weight': (D, 16),
        f'model.layers.{layer}.post_attention_layernorm.weight': (D,),
        f'model.layers.{layer}.mlp.gate_proj.weight': (MLP, D),
        f'model.layers.{layer}.mlp.up_proj.weight': (MLP, D),
        f'model.layers.{layer}.mlp.down_proj.weight': (D, MLP),
    }
SHAPES = {'gpt2': GPT2_SHAPES, 'llama': LLAMA_SHAPES}


def arrays_of(name, dtype='float32'):
    noise = np.random.default_rng(0)
    return {key: noise.normal(size=s).astype(dtype) for key, s in SHAPES[name].items()}


def write_folder(folder, name, arrays=None, **changes):
    """A folder in the layout of a release."""
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps({**CONFIGS[name], **changes}))
    save_file(arrays_of(name) if arrays is None else arrays, folder / 'model.safetensors')
    return folder


def shard(folder, name, arrays):
    """The same in two files with an index."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(CONFIGS[name]))
    files = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
    weight_map = {key: files[i % 2] for i, key in enumerate(arrays)}
    for file in files:
        save_file({k: x for k, x in arrays.items() if weight_map[k] == file}, folder / file)
    index = {'metadata': {'total_size': 1}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


# ---- in and out
@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_a_folder_comes_in_and_goes_out_as_it_was(tmp_path, name):
    arrays = arrays_of(name)
    loaded = language.load(write_folder(tmp_path / 'in', name, arrays))
    assert loaded.report.unused == []
    assert loaded.ends == ((12,) if name == 'gpt2' else (1, 2))
    assert loaded.tokenizer is None
    language.save(tmp_path / 'out', loaded.model.form, loaded.variables, loaded.ends)
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    if name == 'gpt2':
        # The triangles of ones are no parameters, and models with their head have a prefix.
        assert loaded.report.bookkeeping == 2
        arrays = {f'transformer.{k}': x for k, x in arrays.items() if not k.endswith('.attn.bias')}
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
    again = language.load(tmp_path / 'out')
    assert (again.model, again.ends) == (loaded.model, loaded.ends)
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    said = json.loads((tmp_path / 'out' / 'config.json').read_text())
    expected = CONFIGS[name]
    assert {key: said[key] for key in said.keys() & expected.keys()} == {
        key: expected[key] for key in said.keys() & expected.keys()
    }


def test_files_with_an_index_and_bfloat16(tmp_path):
    arrays = arrays_of('llama', ml_dtypes.bfloat16)
    loaded = language.load(shard(tmp_path / 'in', 'llama', arrays))
    assert loaded.variables['params']['word_table'].dtype == np.float32
    language.save(tmp_path / 'out', loaded.model.form, loaded.variables, dtype='bfloat16')
    found = load_file(tmp_path / 'out' / 'model.safetensors')
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


def test_what_is_loaded_is_the_released_network(tmp_path):
    """Logits against the definition, which reads the arrays of the file."""
    for name in ('gpt2', 'llama'):
        arrays = arrays_of(name)
        loaded = language.load(write_folder(tmp_path / name, name, arrays))
        words = np.array([3, 1, 4, 1, 5])
        weights = {k.removeprefix('model.'): x.astype(np.float64) for k, x in arrays.items()}
        expected = tiny_language.LOGITS[name](weights, FORMS[name], words)
        logits = jax.jit(loaded.model.apply)(loaded.variables, words[None]).logits[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    'form',
    [
        *PUBLISHED.values(),
        dataclasses.replace(FORMS['llama'], biased=('query', 'key', 'value')),
        dataclasses.replace(FORMS['llama'], biased=('query', 'key', 'value', 'out')),
        dataclasses.replace(FORMS['llama'], rope_scaling=Scaling('linear', 2.0)),
        dataclasses.replace(FORMS['gpt2'], tied=False, activation='gelu'),
    ],
)
def test_forms_through_config_json_and_back(form):
    layout, config = language_configs.config_of(form)
    assert language_configs.form_of(json.loads(json.dumps(config)), 'x') == (layout, form)


def test_absent_fields_are_those_of_the_kind():
    """An absent window is Mistral's own, null is none; so with heads of keys."""
    config = {**LLAMA_CONFIG, 'max_position_embeddings': 9000, 'num_attention_heads': 64}
    config['head_dim'] = 4
    del config['num_key_value_heads']
    for kind, key_heads, context in (
        ('llama', 64, 9000),
        ('mistral', 8, 4096),
        ('qwen2', 32, 9000),
    ):
        form = language_configs.form_of({**config, 'model_type': kind}, 'config.json')[1]
        assert (form.key_heads, form.context) == (key_heads, context)
    null = {'num_key_value_heads': None, 'sliding_window': None, 'model_type': 'mistral'}
    form = language_configs.form_of({**config, **null}, 'config.json')[1]
    assert (form.key_heads, form.context) == (64, 9000)


def test_a_model_without_ends_says_so(tmp_path):
    """Other programs would take word 2 for the end."""
    loaded = language.load(write_folder(tmp_path / 'in', 'llama'))
    language.save(tmp_path / 'out', loaded.model.form, loaded.variables, ())
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] is None
    assert language.load(tmp_path / 'out').ends == ()


def test_forms_of_other_files():
    newer = {**LLAMA_CONFIG, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 7.0}}
    form = language_configs.form_of(newer, 'x')[1]
    assert (form.rope_base, form.rope_scaling) == (7.0, None)
    window = {**LLAMA_CONFIG, 'model_type': 'mistral', 'sliding_window': 5}
    assert language_configs.form_of(window, 'x')[1].context == 5
    qwen = {**LLAMA_CONFIG, 'model_type': 'qwen2'}
    assert language_configs.form_of(qwen, 'x')[1].biased == ('query', 'key', 'value')
    plain = {k: v for k, v in GPT2_CONFIG.items() if k != 'n_inner'}
    assert language_configs.form_of(plain, 'x')[1].mlp == 4 * D


# ---- what does not fit
def test_arrays_that_do_not_fit_are_named(tmp_path):
    arrays = arrays_of('gpt2')
    arrays['h.0.adapter.weight'] = np.zeros(3, np.float32)
    loaded = language.load(write_folder(tmp_path / 'more', 'gpt2', arrays))
    assert loaded.report.unused == ['h.0.adapter.weight']
    del arrays['h.1.mlp.c_fc.bias']
    with pytest.raises(ConfigError, match=r'lacks 1 of the .*h\.1\.mlp\.c_fc\.bias'):
        language.load(write_folder(tmp_path / 'fewer', 'gpt2', arrays))
    with pytest.raises(ConfigError, match=r'wte\.weight has shape \[13, 8\].* expects \[14, 8\]'):
        language.load(write_folder(tmp_path / 'other', 'gpt2', vocab_size=14))


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('gpt2', {'model_type': 'bert'}, 'model_type: expected one of gpt2'),
        ('gpt2', {'n_layer': 'two'}, 'n_layer: expected a value of type int'),
        ('gpt2', {'n_layer': True}, 'n_layer: expected a value of type int'),
        ('gpt2', {'n_layer': 0}, 'Form.layers'),
        ('gpt2', {'n_head': 3}, 'a width of 8 does not divide over 3 heads'),
        ('gpt2', {'activation_function': 'sine'}, 'activation_function: expected one of'),
        ('gpt2', {'add_cross_attention': True}, 'add_cross_attention: expected False'),
        ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
        ('gpt2', {'eos_token_id': 'end'}, 'eos_token_id: expected a number of a word'),
        ('llama', {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 'rope_type: expected'),
        ('llama', {'rope_scaling': {'rope_type': 'llama3'}}, 'factor: expected a value'),
        ('llama', {'num_key_value_heads': 3}, 'Form.key_heads'),
        ('llama', {'rms_norm_eps': None}, 'rms_norm_eps: expected a value of type float'),
    ],
)
def test_configs_that_do_not_fit(tmp_path, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        language.load(write_folder(tmp_path / 'in', name, **changes))


names = st.sampled_from(['type', 'rope_type', 'factor', 'llama3', 'linear', 'mistral', 'gelu', ''])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | names,
    lambda x: st.lists(x, max_size=2) | st.dictionaries(names, x, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(['gpt2', 'llama']), st.data())
def test_any_config_is_a_form_or_an_error_of_ours(name, data):
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(CONFIGS[name])), values))
    try:
        _, form = language_configs.form_of({**CONFIGS[name], **changed}, 'config.json')
    except ConfigError:
        return
    assert isinstance(form, Form)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r'config\.json cannot be read'):
        language.load(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(GPT2_CONFIG))
    with pytest.raises(ConfigError, match=r'model\.safetensors or model\.safetensors\.index'):
        language.load(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0nothing ')
    with pytest.raises(ConfigError, match=r'model\.safetensors cannot be read'):
        language.load(tmp_path)


def test_indices_that_do_not_fit(tmp_path):
    folder = shard(tmp_path / 'in', 'llama', arrays_of('llama'))
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    index['weight_map']['lm_head.bias'] = 'model-00001-of-00002.safetensors'
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r'its files lack arrays that it names: lm_head\.bias'):
        language.load(folder)
    index['weight_map']['lm_head.bias'] = '../elsewhere.safetensors'
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match='expected names of files in the folder'):
        language.load(folder)
    path.write_text('{}')
    with pytest.raises(ConfigError, match='expected a group weight_map'):
        language.load(folder)


def test_what_cannot_be_saved(tmp_path):
    form = FORMS['llama']
    variables = tiny_language.tree(form)
    mixed = dataclasses.replace(form, rms=False)
    with pytest.raises(ConfigError, match='neither GPT-2 nor Llama has these parts'):
        language.save(tmp_path / 'a', mixed, variables)
    with pytest.raises(ConfigError, match='lacks some'):
        language.save(tmp_path / 'a', FORMS['gpt2'], variables)
    with pytest.raises(ConfigError, match="dtype='int8'"):
        language.save(tmp_path / 'a', form, variables, dtype='int8')
    language.save(tmp_path / 'a', form, variables)
    with pytest.raises(ConfigError, match='exists'):
        language.save(tmp_path / 'a', form, variables)
    language.save(tmp_path / 'a', form, variables, overwrite=True)
