"""Word vectors in word2vec's formats, at the sizes of VATT's, MMV's and MIL-NCE's tables (narrower)."""

import jax.numpy as jnp
import numpy as np
import pytest

import data_pipelines
from tests import tiny
from tests.test_train import state_of
from vatt_jax.config import ConfigError
from vatt_jax.inputs import tokenizer, word_vectors
from vatt_jax.training import loop


def write(path, names, vectors, form):
    v, d = vectors.shape
    with open(path, 'wb') as f:
        if form != 'glove':
            f.write(f'{v} {d}\n'.encode())
        for name, row in zip(names, vectors.astype('<f4')):
            if form.startswith('binary'):
                f.write(name.encode() + b' ' + row.tobytes() + (b'\n' if form == 'binary' else b''))
            else:
                f.write((name + ' ' + ' '.join(repr(float(x)) for x in row) + '\n').encode())
    return path


@pytest.mark.parametrize('form', ['text', 'glove', 'binary', 'binary without breaks'])
@pytest.mark.parametrize('count', [1 << 16, 66250])
def test_both_tables_in_every_form(tmp_path, form, count):
    vectors = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    vectors[7] = np.frombuffer(b'\n \n 0 1\n 2 3 4\n\n', '<f4')[
        :4
    ]  # bytes that look like separators
    vectors[7] = np.where(np.isfinite(vectors[7]), vectors[7], 0)
    names = ['<pad>', '<unk>', 'été', *(f'w{i}' for i in range(count - 3))]
    got, table = word_vectors.read(write(tmp_path / 'v', names, vectors, form))
    assert got == names and table.dtype == np.float32
    np.testing.assert_array_equal(table, vectors)
    own = word_vectors.tokenizer(tmp_path / 'v')
    assert own.size == count and own.encode(['Été w0 nowhere'], 4).tolist() == [[2, 3, 1, 0]]


def test_damaged_files_are_one_sentence(tmp_path):
    vectors = np.ones((5, 3))
    for form in ('text', 'binary'):
        path = write(tmp_path / form, 'abcde', vectors, form)
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


def test_rows_by_word_others_stay(tmp_path):
    own = tokenizer.Words(['soup', 'onion', 'knife'])
    table = jnp.asarray(
        np.random.default_rng(0).normal(size=(9, 3)), jnp.float32
    )  # more rows than words
    params = {'text': {'word_table': table}, 'video': {'kernel': jnp.ones(2)}}
    path = write(tmp_path / 'v', ['knife', 'fork', 'soup'], np.arange(9.0).reshape(3, 3), 'binary')
    got, said = word_vectors.fill(path, params, own.to_spec())
    want = np.array(table)
    want[2], want[4] = [6, 7, 8], [0, 1, 2]
    np.testing.assert_array_equal(got['text']['word_table'], want)
    assert '2 of 5 words' in said
    for change, say in (
        (
            dict(params={'text': {'word_table': table[:, :2]}}),
            'set word_width of the text tower to 3',
        ),
        (dict(params={'video': params['video']}), 'has no word table'),
        (dict(spec=tokenizer.Words(['spoon']).to_spec()), 'none of its 3 words'),
    ):
        with pytest.raises(ConfigError, match=say):
            word_vectors.fill(**{'path': path, 'params': params, 'spec': own.to_spec(), **change})


def test_a_run_starts_from_the_file_and_says_so_without_one(tmp_path, capsys):
    c = tiny.config(steps=3, optimizer__weight_decay=0.0)
    c.model.towers.text.frozen_words = True
    data = data_pipelines.open(c)
    vocabulary = data.info['tokenizer']['vocabulary']
    vectors = np.random.default_rng(0).normal(size=(len(vocabulary), 16)).astype(np.float32)
    c.init_words = str(write(tmp_path / 'v', vocabulary, vectors, 'text'))
    loop.train(c, data, tmp_path / 'run')
    tables = [
        v
        for k, v in flat(state_of(tmp_path / 'run', c)[0].params).items()
        if k.endswith('word_table')
    ]
    np.testing.assert_array_equal(tables[0][2 : 2 + len(vocabulary)], vectors)
    c.init_words = ''
    loop.train(c, data_pipelines.open(c), tmp_path / 'random')
    assert 'random word vectors that stay so' in capsys.readouterr().out


def flat(tree):
    from flax.traverse_util import flatten_dict

    return {'/'.join(k): np.asarray(v) for k, v in flatten_dict(dict(tree)).items()}
