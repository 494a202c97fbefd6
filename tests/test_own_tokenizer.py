"""Data of other words are read with the tokenizer that the evaluated model was trained with."""

import data_pipelines
from vatt_jax.inputs import tokenizer as tokenizers
from vatt_jax.modes import own_tokenizer


def test_the_model_numbers_the_words_of_other_data(tiny_run, monkeypatch):
    folder, config, data = tiny_run
    # As an imported model has it: another vocabulary of the same kind.
    words = tokenizers.Words(['quagga', 'red'])
    info = {'tokenizer': words.to_spec()}
    monkeypatch.setattr(own_tokenizer.checkpoint, 'read_meta', lambda path: {'info': info})
    changed = own_tokenizer.with_own_tokenizer(config, folder)
    read = data_pipelines.open(changed)
    assert read.info['tokenizer'] == words.to_spec()
    assert read.info['tokenizer'] != data.info['tokenizer']
    # The caller's config is as it was, and one that describes a tokenizer keeps it.
    assert config.model.inputs.text.tokenizer == 'words'
    assert own_tokenizer.with_own_tokenizer(changed, folder) is changed


def test_a_run_has_the_tokenizer_of_its_data(tiny_run):
    folder, config, data = tiny_run
    read = data_pipelines.open(own_tokenizer.with_own_tokenizer(config, folder))
    assert read.info['tokenizer'] == data.info['tokenizer']


def test_a_model_without_a_tokenizer_changes_nothing(tiny_run, monkeypatch):
    folder, config, _ = tiny_run
    monkeypatch.setattr(own_tokenizer.checkpoint, 'read_meta', lambda path: {'info': {}})
    assert own_tokenizer.with_own_tokenizer(config, folder) is config
