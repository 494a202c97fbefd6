"""Byte pairs of released language models, and texts written after prompts."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from tests import tiny_language
from tests.tiny_language import FORMS
from vatt_jax.config import ConfigError
from vatt_jax.inference.text_generator import TextGenerator
from vatt_jax.inputs.byte_pairs import BytePairs
from vatt_jax.models.language import CausalLM, Rules

TEXTS = ['The dog runs.', 'the dog, the cat', 'a cat  runs away', 'Ünïcode 🐈']


@pytest.fixture(scope='module')
def tokenizer_folders(tmp_path_factory):
    """One tokenizer, as tokenizer.json with a mark that begins a text, and as GPT-2's two files."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    two = tmp_path_factory.mktemp('two')
    learnt = json.loads(model.to_str())['model']
    (two / 'vocab.json').write_text(json.dumps(learnt['vocab']))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in learnt['merges'])]
    (two / 'merges.txt').write_text('\n'.join(lines) + '\n')
    one = tmp_path_factory.mktemp('one')
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)]
    )
    # Cutting that a file asks for is not obeyed: it would be silent.
    model.enable_truncation(2)
    model.save(str(one / 'tokenizer.json'))
    return one, two


def test_texts_come_back_from_their_numbers(tokenizer_folders):
    one, two = map(BytePairs.find, tokenizer_folders)
    ids, mask = two.encode(TEXTS)
    assert ids.shape == mask.shape
    assert mask.any(axis=0).all()
    assert two.decode(ids, mask.sum(1)) == TEXTS
    marked, marked_mask = one.encode(TEXTS)
    assert (marked[:, 0] == 0).all()
    np.testing.assert_array_equal(marked[:, 1:], ids)
    np.testing.assert_array_equal(marked_mask[:, 1:], mask)
    # Marks are no text.
    assert one.decode(marked, marked_mask.sum(1)) == TEXTS
    np.testing.assert_array_equal(one.encode(TEXTS, marks=False)[0], ids)
    assert two.number('<|endoftext|>') == 0
    assert two.encode([])[0].shape == (0, 0)


def test_tokenizers_that_are_none(tmp_path):
    assert BytePairs.find(tmp_path) is None
    (tmp_path / 'tokenizer.json').write_text('{"model": 3}')
    with pytest.raises(ConfigError, match=r'tokenizer\.json is no tokenizer'):
        BytePairs.find(tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    (tmp_path / 'vocab.json').write_text('{"a": 0}')
    (tmp_path / 'merges.txt').write_text('#version\na b c\n')
    with pytest.raises(ConfigError, match=r'vocab\.json is no tokenizer'):
        BytePairs.find(tmp_path)


# ---- texts in, texts out
def test_a_generator_writes_after_prompts(tokenizer_folders):
    tokenizer = BytePairs.find(tokenizer_folders[1])
    form = dataclasses.replace(FORMS['gpt2'], vocab=tokenizer.size, context=40)
    model = CausalLM(form)
    variables = tiny_language.tree(form)
    rules = Rules(4, ends=(0,), temperature=1.0)
    write = TextGenerator(model, variables, tokenizer, rules)
    first, second = write.write(TEXTS[:2]), write.write(TEXTS[:2])
    assert first != second
    again = TextGenerator(model, variables, tokenizer, rules)
    assert [again.write(TEXTS[:2]), again.write(TEXTS[:2])] == [first, second]
    with pytest.raises(ConfigError, match='prompt 1 has no words'):
        write.write(['a', ''])
    with pytest.raises(ConfigError, match='has room for 36'):
        write('the dog ' * 40)
    with pytest.raises(ConfigError, match='expected a tokenizer'):
        TextGenerator(model, variables, None, rules)
    with pytest.raises(ConfigError, match='expected the tokenizer of this model'):
        TextGenerator(CausalLM(FORMS['gpt2']), variables, tokenizer, rules)
