"""Word vectors in word2vec's formats, at the sizes of VATT's, MMV's and MIL-NCE's tables.

The vectors here are narrower than theirs.
"""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import data_pipelines
from tests import tiny
from tests.test_train import state_of
from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer, word_vectors
from vatt_jax.training import loop


def write_vectors(path, words, vectors, form):
    """Writes the file format `form` byte by byte, and returns the path."""
    count, width = vectors.shape
    with open(path, 'wb') as file:
        if form != 'glove':
            file.write(f'{count} {width}\n'.encode())
        for word, vector in zip(words, vectors.astype('<f4')):
            if form == 'binary':
                file.write(word.encode() + b' ' + vector.tobytes() + b'\n')
            elif form == 'binary without breaks':
                file.write(word.encode() + b' ' + vector.tobytes())
            else:
                numbers = ' '.join(repr(float(x)) for x in vector)
                file.write(f'{word} {numbers}\n'.encode())
    return path


@pytest.mark.parametrize('form', ['text', 'glove', 'binary', 'binary without breaks'])
@pytest.mark.parametrize('count', [1 << 16, 66250])
def test_both_tables_in_every_form(tmp_path, form, count):
    vectors = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    like_separators = np.frombuffer(b'\n \n 0 1\n 2 3 4\n\n', '<f4')[:4]
    vectors[7] = np.where(np.isfinite(like_separators), like_separators, 0)
    words = ['<pad>', '<unk>', 'été', *(f'w{i}' for i in range(count - 3))]
    path = write_vectors(tmp_path / 'v', words, vectors, form)

    got_words, table = word_vectors.read(path)
    assert got_words == words
    chex.assert_trees_all_equal(table, vectors, strict=True)

    words_tokenizer = word_vectors.tokenizer(path)
    assert words_tokenizer.size == count
    assert words_tokenizer.encode(['Été w0 nowhere'], 4).tolist() == [[2, 3, 1, 0]]


def test_damaged_files_are_one_sentence(tmp_path):
    vectors = np.ones((5, 3))
    for form in ('text', 'binary'):
        path = write_vectors(tmp_path / form, 'abcde', vectors, form)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(
            ConfigError, match='config.init_words=.*(cut off|ends in vector 4|is not a word)'
        ):
            word_vectors.read(path)
    (tmp_path / 'x').write_text('one two three\nfour five six\n')
    with pytest.raises(ConfigError, match='vector 1 is not a word and 2 numbers'):
        word_vectors.read(tmp_path / 'x')
    with pytest.raises(ConfigError, match='cannot be read'):
        word_vectors.read(tmp_path / 'none')


@pytest.fixture
def three_words(tmp_path):
    """Arguments of word_vectors.fill: a table with more rows than words, and a file of three."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, 3)), jnp.float32)
    vectors = np.arange(9.0).reshape(3, 3)
    return {
        'path': write_vectors(tmp_path / 'v', ['knife', 'fork', 'soup'], vectors, 'binary'),
        'params': {'text': {'word_table': table}, 'video': {'kernel': jnp.ones(2)}},
        'spec': tokenizer.Words(['soup', 'onion', 'knife']).to_spec(),
    }


def test_rows_of_words_in_the_file_change_and_others_stay(three_words):
    filled, message = word_vectors.fill(**three_words)
    table = np.array(three_words['params']['text']['word_table'])
    table[2], table[4] = [6, 7, 8], [0, 1, 2]  # soup, knife
    expected = {**three_words['params'], 'text': {'word_table': table}}
    chex.assert_trees_all_equal(filled, expected)
    assert '2 of 5 words' in message


def test_vectors_that_do_not_fit_are_one_sentence(three_words):
    params = three_words['params']
    narrow = {'text': {'word_table': params['text']['word_table'][:, :2]}}
    with pytest.raises(ConfigError, match='set word_width of the text tower to 3'):
        word_vectors.fill(**{**three_words, 'params': narrow})
    with pytest.raises(ConfigError, match='has no word table'):
        word_vectors.fill(**{**three_words, 'params': {'video': params['video']}})
    with pytest.raises(ConfigError, match='none of its 3 words'):
        word_vectors.fill(**{**three_words, 'spec': tokenizer.Words(['spoon']).to_spec()})


def word_tables(params):
    """All arrays of the parameters named word_table."""
    leaves = flatten_dict(dict(params), sep='/')
    return [np.asarray(leaf) for path, leaf in leaves.items() if path.endswith('word_table')]


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_says_so_without_one(tmp_path, capsys):
    config = tiny.config(steps=3, optimizer__weight_decay=0.0)
    config.model.towers.text.frozen_words = True
    data = data_pipelines.open(config)
    vocabulary = data.info['tokenizer']['vocabulary']
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 16)).astype(np.float32)
    config.init_words = str(write_vectors(tmp_path / 'v', vocabulary, vectors, 'text'))
    loop.train(config, data, tmp_path / 'run')
    state = state_of(tmp_path / 'run', config)[0]
    table = word_tables(state.params)[0]
    np.testing.assert_array_equal(table[2 : 2 + len(vocabulary)], vectors)

    config.init_words = ''
    loop.train(config, data_pipelines.open(config), tmp_path / 'random')
    assert 'random word vectors that stay so' in capsys.readouterr().out
